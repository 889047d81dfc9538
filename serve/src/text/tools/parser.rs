//! Calls of tools in text that comes in pieces.

use std::{collections::HashSet, mem};

use serde_json::Value;

use super::{
    ToolFormat,
    object::{CallObject, Step},
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
    /// Before an object: behind a mark, in the name behind it, or between the calls of a list.
    Before,
    /// In an object of which it is not sure that it is a call.
    Candidate(Box<CallObject>),
    /// In the object of a call.
    Call(Box<CallObject>),
    /// Behind the object of a call.
    After,
}

/// Finds the calls in what a model says.
///
/// No mark of a call gets out, and what does is the same wherever the text was cut. What looked
/// like a call and is none comes back as it was. Blanks around calls are no text.
#[derive(Clone, Debug)]
pub struct ToolParser {
    format: ToolFormat,
    names: HashSet<String>,
    state: State,
    marks: Stops,
    /// Blanks that are text if other text follows.
    blanks: String,
    /// What came since the mark or the last call, which is text if no call follows.
    raw: String,
    /// Whether a mark said that a call comes. Without one, only objects that name one of the
    /// tools are calls.
    marked: bool,
    /// Whether anything but blanks was said.
    spoke: bool,
    calls: usize,
    pieces: Vec<ToolPiece>,
}

impl ToolParser {
    /// For calls of tools with these names.
    pub fn new<'a>(format: ToolFormat, names: impl IntoIterator<Item = &'a str>) -> Self {
        Self {
            format,
            names: names.into_iter().map(String::from).collect(),
            state: State::Text,
            marks: Stops::new(vec![format.mark().into()]),
            blanks: String::new(),
            raw: String::new(),
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
            State::Before => self.push_before(c),
            State::Candidate(object) => self.push_candidate(object, c),
            State::Call(object) => self.push_call(object, c),
            State::After => self.push_after(c),
        }
    }

    /// Outside of calls.
    fn push_text(&mut self, c: char) {
        if self.format == ToolFormat::Llama && !self.spoke && c == '{' {
            self.marked = false;
            return self.push_before(c);
        }
        self.spoke |= !c.is_whitespace();
        let (text, mark) = self.marks.push(c.encode_utf8(&mut [0; 4]));
        self.say(&text);
        if let Some(mark) = mark {
            (self.state, self.marked, self.raw) = (State::Before, true, mark);
        }
    }

    /// Before an object.
    fn push_before(&mut self, c: char) {
        if self.format == ToolFormat::MistralArgs {
            self.push_name(c);
        } else if c == '{' {
            self.push_candidate(Box::default(), c);
        } else if c.is_whitespace() || (c == '[' && self.format == ToolFormat::Mistral) {
            self.raw.push(c);
            self.state = State::Before;
        } else {
            self.give_up();
            self.push_char(c);
        }
    }

    /// Behind a mark that a tool's name follows, and `[ARGS]`.
    fn push_name(&mut self, c: char) {
        self.raw.push(c);
        let said = &self.raw[self.format.mark().len()..];
        let (name, behind) = said.split_at(said.find('[').unwrap_or(said.len()));
        let args = match behind.strip_prefix(ToolFormat::CALL_ID) {
            Some(id) => id.trim_start_matches(|c| c != '['),
            None => behind,
        };
        let is_name = !name.contains(['{', '}', '\n']) && (behind.is_empty() || !name.trim().is_empty());
        if is_name && args == ToolFormat::ARGS {
            let begin = format!("{{\"name\": {}, \"arguments\": ", Value::from(name.trim()));
            let mut object = Box::<CallObject>::default();
            begin.chars().for_each(|c| _ = object.push(c));
            self.state = State::Candidate(object);
        } else if is_name && (ToolFormat::ARGS.starts_with(args) || ToolFormat::CALL_ID.starts_with(behind)) {
            self.state = State::Before;
        } else {
            let behind = self.raw.split_off(self.raw.len() - behind.len());
            self.give_up();
            behind.chars().for_each(|c| self.push_char(c));
        }
    }

    /// Gives a character to an object. Where the arguments only are written, their end is its own.
    fn push_to(&self, object: &mut CallObject, c: char) -> Step {
        match object.push(c) {
            Step::Inside if self.format == ToolFormat::MistralArgs && object.is_value_over() => {
                object.push('}')
            }
            step => step,
        }
    }

    /// In an object that may be a call.
    fn push_candidate(&mut self, mut object: Box<CallObject>, c: char) {
        let step = self.push_to(&mut object, c);
        if step == Step::Wrong {
            self.give_up();
            return self.push_char(c);
        }
        self.raw.push(c);
        let is_offered = |name: &str| self.marked || self.names.contains(name);
        match object.name() {
            Some(name) if !is_offered(name) => self.give_up(),
            Some(name) if object.has_arguments() || step == Step::End => {
                let (index, id) = (self.calls, self.format.new_id());
                self.pieces.push(ToolPiece::Call { index, id, name: name.into() });
                self.calls += 1;
                self.spoke = true;
                self.raw.clear();
                self.blanks.clear();
                self.tell(object, step);
            }
            None if step == Step::End => self.give_up(),
            _ => self.state = State::Candidate(object),
        }
    }

    /// In the object of a call.
    fn push_call(&mut self, mut object: Box<CallObject>, c: char) {
        match self.push_to(&mut object, c) {
            // What is broken ends here.
            Step::Wrong => self.push_char(c),
            step => self.tell(object, step),
        }
    }

    /// Gives the arguments that have come.
    fn tell(&mut self, mut object: Box<CallObject>, step: Step) {
        let mut text = object.take_arguments();
        if step == Step::End && !object.has_arguments() {
            text = "{}".into();
        }
        let index = self.calls - 1;
        match self.pieces.last_mut() {
            Some(ToolPiece::Arguments { text: last, .. }) => *last += &text,
            _ if text.is_empty() => {}
            _ => self.pieces.push(ToolPiece::Arguments { index, text }),
        }
        self.state = if step == Step::End { State::After } else { State::Call(object) };
    }

    /// Behind the object of a call.
    fn push_after(&mut self, c: char) {
        self.raw.push(c);
        let closing = self.raw.trim_start();
        match (self.format, c) {
            (ToolFormat::Hermes, _) if closing == ToolFormat::HERMES_END => self.raw.clear(),
            (ToolFormat::Hermes, _) if ToolFormat::HERMES_END.starts_with(closing) => {
                self.state = State::After;
            }
            (ToolFormat::Mistral, ']') => self.raw.clear(),
            (ToolFormat::Mistral, ',') => (self.state, self.marked) = (State::Before, true),
            (ToolFormat::Llama, '{') => {
                self.raw.pop();
                self.marked = false;
                self.push_before(c);
            }
            (ToolFormat::Llama, ';') => self.state = State::After,
            _ if c.is_whitespace() => self.state = State::After,
            _ => mem::take(&mut self.raw).chars().for_each(|c| self.push_char(c)),
        }
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
