//! A call whose arguments stand each for itself, while its characters come:
//! `<parameter=x>1</parameter></function>`. What comes of them is the JSON of one object.

use std::{collections::BTreeMap, mem};

use serde_json::Value;

use super::{
    object::Step,
    syntax::{ParameterWords, marks},
    types::Types,
};
use crate::text::Stops;

/// How far an argument has come.
#[derive(Clone, Debug)]
enum State {
    /// Before an argument, or the end of all.
    Between,
    /// In a key.
    Key,
    /// Behind a key, before so many of the marks between it and its value.
    BehindKey(usize),
    InValue(InValue),
}

/// A value that has not ended.
#[derive(Clone, Debug)]
struct InValue {
    types: Types,
    /// What ends it.
    ends: Stops,
    /// Whether nothing of it has come.
    is_new: bool,
    /// What has come, if its type is only seen at its end.
    text: String,
}

/// A call that comes in characters, behind the tool's name.
#[derive(Clone, Debug)]
pub struct CallParameters {
    words: ParameterWords,
    name: String,
    types: BTreeMap<String, Types>,
    state: State,
    /// What came since the last argument, and is no value.
    raw: String,
    /// Where in `raw` what comes next begins.
    from: usize,
    key: String,
    /// Whether the first argument has begun.
    has_arguments: bool,
    /// Text of the arguments' JSON that was not taken.
    arguments: String,
}

impl CallParameters {
    /// Of this tool, whose arguments have these types, and others any.
    pub fn new(words: ParameterWords, name: &str, types: BTreeMap<String, Types>) -> Self {
        Self {
            words,
            name: name.into(),
            types,
            state: State::Between,
            raw: String::new(),
            from: 0,
            key: String::new(),
            has_arguments: false,
            arguments: String::new(),
        }
    }

    /// The tool's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether there are arguments.
    pub fn has_arguments(&self) -> bool {
        self.has_arguments
    }

    /// The JSON text of the arguments that came since this was last called.
    pub fn take_arguments(&mut self) -> String {
        mem::take(&mut self.arguments)
    }

    /// Ends arguments behind which something else comes, and gives what has come of that.
    pub fn break_off(&mut self) -> String {
        self.arguments.push('}');
        mem::take(&mut self.raw)
    }

    /// Takes a character.
    pub fn push(&mut self, c: char) -> Step {
        if let State::InValue(_) = self.state {
            return self.push_to_value(c);
        }
        self.raw.push(c);
        let said = self.raw[self.from..].trim_start();
        let step = match self.state {
            State::Between if said == self.words.end => {
                self.end();
                Step::End
            }
            State::Between if said == self.words.open => {
                self.begin_key();
                Step::Inside
            }
            State::Between if [self.words.end, self.words.open].iter().any(|it| it.starts_with(said)) => {
                Step::Inside
            }
            State::Key if c != '\n' => {
                let behind = marks(self.words.behind_key);
                if let Some(key) = said.strip_suffix(behind[0]) {
                    self.key = key.trim().into();
                    self.end_mark(behind.len() - 1);
                }
                Step::Inside
            }
            State::BehindKey(left) => {
                let behind = marks(self.words.behind_key);
                let mark = behind[behind.len() - left];
                if said == mark {
                    self.end_mark(left - 1);
                    Step::Inside
                } else if mark.starts_with(said) {
                    Step::Inside
                } else {
                    Step::Wrong
                }
            }
            _ => Step::Wrong,
        };
        if step == Step::Wrong {
            self.raw.pop();
        }
        step
    }

    fn begin_key(&mut self) {
        self.state = State::Key;
        self.from = self.raw.len();
    }

    /// Behind a mark between a key and its value, which so many follow.
    fn end_mark(&mut self, left: usize) {
        self.from = self.raw.len();
        self.state = State::BehindKey(left);
        if left > 0 {
            return;
        }
        let types = self.types.get(&self.key).copied().unwrap_or(Types::ANY);
        self.arguments += if self.has_arguments { ", " } else { "{" };
        self.has_arguments = true;
        self.arguments += &format!("{}: ", Value::from(self.key.as_str()));
        if types == Types::STRING {
            self.arguments.push('"');
        }
        let marks = self.words.ends_of_value().map(String::from);
        let lines = marks.iter().filter(|_| self.words.has_lines()).map(|mark| format!("\n{mark}"));
        let ends = Stops::new(lines.chain(marks.clone()).collect());
        self.state = State::InValue(InValue { types, ends, is_new: true, text: String::new() });
        self.forget();
    }

    fn push_to_value(&mut self, c: char) -> Step {
        let State::InValue(value) = &mut self.state else { return Step::Wrong };
        if mem::take(&mut value.is_new) && self.words.has_lines() && c == '\n' {
            return Step::Inside;
        }
        let (text, end) = value.ends.push(c.encode_utf8(&mut [0; 4]));
        if value.types == Types::STRING {
            let json = Value::from(text).to_string();
            self.arguments += &json[1..json.len() - 1];
        } else {
            value.text += &text;
        }
        let Some(end) = end else { return Step::Inside };
        self.arguments += &match value.types {
            Types::STRING => "\"".into(),
            types => types.json(&value.text),
        };
        self.state = State::Between;
        let end = end.trim_start();
        if end == self.words.end {
            self.end();
            return Step::End;
        }
        if end == self.words.open {
            self.raw = end.into();
            self.begin_key();
        }
        Step::Inside
    }

    fn end(&mut self) {
        if self.has_arguments {
            self.arguments.push('}');
        }
        self.forget();
    }

    fn forget(&mut self) {
        self.raw.clear();
        self.from = 0;
    }
}
