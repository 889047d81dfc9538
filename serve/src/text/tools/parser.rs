//! Calls of tools in text that comes in pieces.

use std::{
    collections::{BTreeMap, HashMap},
    mem,
};

use serde_json::Value;

use super::{
    ToolFormat,
    call::Call,
    object::{CallObject, Step},
    parameters::CallParameters,
    syntax::{Form, Syntax, marks},
    types::Types,
};
use crate::text::Stops;

/// What a model says, piece by piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolPiece {
    /// Text that is no call.
    Text(String),
    /// A call begins, whose arguments follow.
    Call {
        /// Which of the answer's calls, from 0.
        index: usize,
        /// A name for the call that no other has.
        id: String,
        /// The tool's name.
        name: String,
    },
    /// More of the JSON text of a call's arguments.
    Arguments {
        /// Which of the answer's calls.
        index: usize,
        /// What follows.
        text: String,
    },
}

/// Where the text is.
#[derive(Clone, Debug)]
enum State {
    /// Outside of calls.
    Text,
    /// Before a call, of whose parts so many have come.
    Head(usize),
    /// In what may be a call.
    Candidate(Box<Call>),
    /// In a call.
    Call(Box<Call>),
    /// Behind a call, and so many of the marks that end it.
    After(usize),
}

/// A part of what comes before a call's arguments.
#[derive(Clone, Copy, Debug)]
enum Part {
    Mark(&'static str),
    /// One that may be left away.
    Bracket,
    Name,
    /// An id behind this mark, or nothing.
    Id(&'static str),
}

/// The parts of what comes before a call's arguments.
fn head(syntax: &Syntax) -> Vec<Part> {
    let marks = |words| marks(words).into_iter().map(Part::Mark);
    let mut parts: Vec<_> = marks(syntax.open).chain(marks(syntax.call_open)).collect();
    for part in &mut parts {
        if matches!(part, Part::Mark("[")) {
            *part = Part::Bracket;
        }
    }
    match &syntax.form {
        Form::Object { .. } => {}
        Form::NamedObject { id, behind_name } => {
            parts.push(Part::Name);
            parts.extend(id.map(Part::Id));
            parts.extend(marks(behind_name));
        }
        Form::NamedParameters { behind_name, .. } => {
            parts.push(Part::Name);
            parts.extend(marks(behind_name));
        }
    }
    parts
}

/// Finds the calls in what a model says.
///
/// No mark of a call gets out, and what does is the same wherever the text was cut. What looked
/// like a call and is none comes back as it was. Blanks around calls are no text.
#[derive(Clone, Debug)]
pub struct ToolParser {
    format: ToolFormat,
    /// What comes before a call's arguments.
    head: Vec<Part>,
    /// The marks that end a call.
    tail: Vec<&'static str>,
    /// The types of each tool's arguments, by their names.
    tools: HashMap<String, BTreeMap<String, Types>>,
    state: State,
    marks: Stops,
    /// Blanks that are text if other text follows.
    blanks: String,
    /// What came since the mark or the last call, which is text if no call follows.
    raw: String,
    /// Where in `raw` the part of the head begins that comes.
    from: usize,
    /// The tool's name, if it stands before the arguments.
    name: String,
    /// Whether a mark said that a call comes. Without one, only objects that name one of the
    /// tools are calls.
    marked: bool,
    /// Whether anything but blanks was said.
    spoke: bool,
    calls: usize,
    pieces: Vec<ToolPiece>,
}

impl ToolParser {
    /// For calls of these tools, which are those of OpenAI's API:
    /// `{"type": "function", "function": {"name": …, "parameters": …}}`.
    pub fn new(format: ToolFormat, tools: &[Value]) -> Self {
        let syntax = format.syntax();
        let tools = tools.iter().map(|tool| &tool["function"]);
        Self {
            format,
            head: head(syntax),
            tail: marks(&[syntax.call_close, syntax.close].concat()),
            tools: tools.filter_map(|tool| Some((tool["name"].as_str()?.into(), types(tool)))).collect(),
            state: State::Text,
            marks: Stops::new(syntax.entries.iter().map(|&mark| mark.into()).collect()),
            blanks: String::new(),
            raw: String::new(),
            from: 0,
            name: String::new(),
            marked: false,
            spoke: false,
            calls: 0,
            pieces: Vec::new(),
        }
    }

    /// The calls that have begun.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Takes more of what the model says.
    pub fn push(&mut self, text: &str) -> Vec<ToolPiece> {
        text.chars().for_each(|c| self.push_char(c));
        mem::take(&mut self.pieces)
    }

    /// What was held back, when nothing more comes.
    pub fn finish(mut self) -> Vec<ToolPiece> {
        let held = self.marks.finish();
        self.say(&held);
        // What was cut off behind calls is none.
        if self.calls == 0 {
            self.give_up();
            let blanks = mem::take(&mut self.blanks);
            self.add_text(&blanks);
        }
        self.pieces
    }

    fn push_char(&mut self, c: char) {
        match mem::replace(&mut self.state, State::Text) {
            State::Text => self.push_text(c),
            State::Head(at) => self.push_head(at, c),
            State::Candidate(call) => self.push_candidate(call, c),
            State::Call(call) => self.push_call(call, c),
            State::After(at) => self.push_after(at, c),
        }
    }

    /// Outside of calls.
    fn push_text(&mut self, c: char) {
        if self.may_be_bare() && !self.spoke && c == '{' {
            self.marked = false;
            return self.push_candidate(Box::default(), c);
        }
        self.spoke |= !c.is_whitespace();
        let (text, mark) = self.marks.push(c.encode_utf8(&mut [0; 4]));
        self.say(&text);
        if let Some(mark) = mark {
            let is_it = |part: &Part| matches!(part, Part::Mark(it) if *it == mark);
            let at = self.head.iter().position(is_it).map_or(0, |at| at + 1);
            (self.marked, self.raw) = (true, mark);
            self.begin_part(at);
        }
    }

    /// Whether an object is a call even without a mark.
    fn may_be_bare(&self) -> bool {
        self.format == ToolFormat::Llama
    }

    /// Goes on with this part of what comes before a call, or with the call.
    fn begin_part(&mut self, at: usize) {
        self.from = self.raw.len();
        if at < self.head.len() {
            self.state = State::Head(at);
            return;
        }
        let name = mem::take(&mut self.name);
        self.state = State::Candidate(Box::new(match &self.format.syntax().form {
            Form::Object { .. } => Call::default(),
            Form::NamedObject { .. } => Call::Object(CallObject::of_arguments(&name)),
            Form::NamedParameters { words, .. } => {
                let types = self.tools.get(&name).cloned().unwrap_or_default();
                Call::Parameters(CallParameters::new(*words, &name, types))
            }
        }));
    }

    /// Before a call's arguments.
    fn push_head(&mut self, at: usize, c: char) {
        let before = self.raw.len();
        self.raw.push(c);
        let said = self.raw[self.from..].trim_start();
        let ends_word = matches!(c, '<' | '>' | '[' | ']' | '{' | '}' | '\n');
        // What the part is followed by begins with this character.
        let next = |parser: &mut Self| {
            parser.raw.truncate(before);
            parser.begin_part(at + 1);
            parser.push_char(c);
        };
        self.state = State::Head(at);
        match self.head[at] {
            _ if said.is_empty() => {}
            Part::Mark(mark) if mark == said => self.begin_part(at + 1),
            Part::Bracket if said == "[" => self.begin_part(at + 1),
            Part::Mark(mark) if mark.starts_with(said) => {}
            Part::Bracket => next(self),
            Part::Name if !ends_word => {}
            Part::Name => {
                self.name = self.raw[self.from..before].trim().into();
                match self.name.is_empty() {
                    true => self.give_up_head(),
                    false => next(self),
                }
            }
            Part::Id(mark) if mark.starts_with(said) || (said.starts_with(mark) && !ends_word) => {}
            Part::Id(mark) if said.starts_with(mark) => next(self),
            Part::Id(_) => {
                // There is none, and what came belongs to the next part.
                let rest = self.raw.split_off(self.from);
                self.begin_part(at + 1);
                rest.chars().for_each(|c| self.push_char(c));
            }
            Part::Mark(_) => self.give_up_head(),
        }
    }

    /// In what may be a call.
    fn push_candidate(&mut self, mut call: Box<Call>, c: char) {
        let step = call.push(c);
        if step == Step::Wrong {
            return match *call {
                Call::Object(_) => {
                    self.give_up();
                    self.push_char(c);
                }
                Call::Parameters(_) => {
                    self.raw.push(c);
                    self.give_up_head();
                }
            };
        }
        self.raw.push(c);
        let is_offered = |name: &str| self.marked || self.tools.contains_key(name);
        match call.name() {
            Some(name) if !is_offered(name) => self.give_up(),
            Some(name) if call.has_arguments() || step == Step::End => {
                let (index, id) = (self.calls, self.format.new_id());
                self.pieces.push(ToolPiece::Call { index, id, name: name.into() });
                self.calls += 1;
                self.spoke = true;
                self.raw.clear();
                self.blanks.clear();
                self.tell(call, step);
            }
            None if step == Step::End => self.give_up(),
            _ => self.state = State::Candidate(call),
        }
    }

    /// In a call.
    fn push_call(&mut self, mut call: Box<Call>, c: char) {
        let step = call.push(c);
        if step != Step::Wrong {
            return self.tell(call, step);
        }
        // What is broken ends here.
        let rest = call.break_off();
        self.tell(call, Step::End);
        rest.chars().for_each(|c| self.push_char(c));
        self.push_char(c);
    }

    /// Gives the arguments that have come.
    fn tell(&mut self, mut call: Box<Call>, step: Step) {
        let mut text = call.take_arguments();
        if step == Step::End && !call.has_arguments() {
            text = "{}".into();
        }
        let index = self.calls - 1;
        match self.pieces.last_mut() {
            Some(ToolPiece::Arguments { text: last, .. }) => *last += &text,
            _ if text.is_empty() => {}
            _ => self.pieces.push(ToolPiece::Arguments { index, text }),
        }
        self.state = if step == Step::End { State::After(0) } else { State::Call(call) };
    }

    /// Behind a call.
    fn push_after(&mut self, at: usize, c: char) {
        self.raw.push(c);
        let said = self.raw.trim_start();
        let tail = &self.tail[at.min(self.tail.len())..];
        let between = self.format.syntax().between.concat();
        if let Some(found) = tail.iter().position(|mark| *mark == said) {
            let is_last = found + 1 == tail.len();
            self.raw.clear();
            self.state = if is_last { State::Text } else { State::After(at + found + 1) };
        } else if said.is_empty() || tail.iter().any(|mark| mark.starts_with(said)) {
            self.state = State::After(at);
        } else if said == between.trim_end() {
            // Another follows without a mark.
            self.marked = !self.may_be_bare();
            self.begin_part(self.head.len());
        } else if self.may_be_bare() && said == "{" {
            self.raw.pop();
            self.marked = false;
            self.push_candidate(Box::default(), c);
        } else {
            mem::take(&mut self.raw).chars().for_each(|c| self.push_char(c));
        }
    }

    /// Gives back a mark behind which no call came; and what came, in which there may be another.
    fn give_up_head(&mut self) {
        let raw = mem::take(&mut self.raw);
        let entries = self.format.syntax().entries.iter();
        let mark = entries.filter(|mark| raw.starts_with(**mark)).map(|mark| mark.len()).max().unwrap_or(0);
        let (mark, rest) = raw.split_at(mark);
        self.state = State::Text;
        self.spoke = true;
        self.say(mark);
        rest.chars().for_each(|c| self.push_char(c));
    }

    /// Gives back what looked like a call.
    fn give_up(&mut self) {
        self.state = State::Text;
        self.spoke = true;
        let raw = mem::take(&mut self.raw);
        self.say(&raw);
    }

    /// Gives text, but for the blanks that end it.
    fn say(&mut self, text: &str) {
        let words = text.trim_end();
        if !words.is_empty() {
            let blanks = mem::take(&mut self.blanks);
            self.add_text(&(blanks + words));
        }
        self.blanks += &text[words.len()..];
    }

    fn add_text(&mut self, text: &str) {
        match self.pieces.last_mut() {
            Some(ToolPiece::Text(last)) => *last += text,
            _ if text.is_empty() => {}
            _ => self.pieces.push(ToolPiece::Text(text.into())),
        }
    }
}

/// The types of a tool's arguments, by their names.
fn types(tool: &Value) -> BTreeMap<String, Types> {
    let root = &tool["parameters"];
    let properties = root["properties"].as_object().into_iter().flatten();
    properties.map(|(name, schema)| (name.clone(), Types::of(schema, root))).collect()
}
