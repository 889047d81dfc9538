//! The object in which a model calls a tool, while its characters come:
//! `{"name": "f", "arguments": {"x": 1}}`, or that of the arguments only.

use std::mem;

/// The keys that such an object may have.
const KEYS: [&str; 5] = ["\"name\"", "\"arguments\"", "\"parameters\"", "\"id\"", "\"type\""];

/// How far a key or a value has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Before the object.
    #[default]
    Open,
    /// Before a key, or the end of an object without one.
    KeyOrEnd,
    /// Before a key.
    Key,
    InKey,
    Colon,
    /// Before a value.
    Value,
    InValue,
    /// Before a comma or the end.
    Comma,
}

/// What a character is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A part of the object.
    Inside,
    /// The object's end.
    End,
    /// None that such an object may have there.
    Wrong,
}

/// An object that comes in characters.
#[derive(Clone, Debug, Default)]
pub struct CallObject {
    state: State,
    key: String,
    value: String,
    /// Brackets that are open in the value.
    open: Vec<char>,
    in_string: bool,
    escaped: bool,
    name: Option<String>,
    /// Whether the arguments have begun.
    has_arguments: bool,
    /// Text of the arguments that was not taken.
    arguments: String,
    /// Whether the arguments only are written, whose end is the object's.
    is_bare: bool,
}

impl CallObject {
    /// Of a tool whose arguments only are written.
    pub fn of_arguments(name: &str) -> Self {
        Self {
            state: State::Value,
            key: "\"arguments\"".into(),
            name: Some(name.into()),
            is_bare: true,
            ..Self::default()
        }
    }

    /// The tool's name, once it is there.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Whether the arguments have begun.
    pub fn has_arguments(&self) -> bool {
        self.has_arguments
    }

    /// The text of the arguments that came since this was last called.
    pub fn take_arguments(&mut self) -> String {
        mem::take(&mut self.arguments)
    }

    /// Takes a character.
    pub fn push(&mut self, c: char) -> Step {
        match (self.state, c) {
            (State::InKey, _) => {
                self.key.push(c);
                if self.ends_string(c) {
                    self.state = State::Colon;
                    if !KEYS.contains(&self.key.as_str()) {
                        return Step::Wrong;
                    }
                }
            }
            (State::InValue, _) => return self.push_to_value(c),
            _ if is_blank(c) => {}
            (State::Open, '{') => self.state = State::KeyOrEnd,
            (State::KeyOrEnd | State::Key, '"') => {
                (self.key, self.in_string) = (c.into(), true);
                self.state = State::InKey;
            }
            (State::Colon, ':') => self.state = State::Value,
            (State::Value, _) => {
                self.value.clear();
                self.state = State::InValue;
                return self.push_to_value(c);
            }
            (State::Comma, ',') => self.state = State::Key,
            (State::KeyOrEnd | State::Comma, '}') => return Step::End,
            _ => return Step::Wrong,
        }
        Step::Inside
    }

    /// Whether a character ends the string that it is in.
    fn ends_string(&mut self, c: char) -> bool {
        let ends = c == '"' && !self.escaped;
        self.escaped = c == '\\' && !self.escaped;
        self.in_string = !ends;
        ends
    }

    fn push_to_value(&mut self, c: char) -> Step {
        let ends = if self.in_string {
            self.ends_string(c) && self.open.is_empty()
        } else {
            match c {
                '"' => self.in_string = true,
                '{' | '[' => self.open.push(c),
                '}' | ']' if !self.open.is_empty() => {
                    let opened = self.open.pop();
                    if opened != Some(if c == '}' { '{' } else { '[' }) {
                        return Step::Wrong;
                    }
                }
                // A number or a word ends before what follows.
                ',' | '}' | ' ' | '\n' | '\r' | '\t' if self.open.is_empty() => {
                    return match self.end_value() {
                        true if self.is_bare && is_blank(c) => Step::End,
                        true => self.push(c),
                        false => Step::Wrong,
                    };
                }
                _ if !self.open.is_empty() => {}
                '0'..='9' | 'a'..='z' | 'E' | '+' | '-' | '.' => {}
                _ => return Step::Wrong,
            }
            self.open.is_empty() && matches!(c, '}' | ']')
        };
        self.value.push(c);
        if self.is_arguments() && self.value.starts_with('{') {
            self.has_arguments = true;
            self.arguments.push(c);
            // It is given as it comes.
            self.value.truncate(1);
        }
        match ends {
            true if !self.end_value() => Step::Wrong,
            true if self.is_bare => Step::End,
            _ => Step::Inside,
        }
    }

    fn is_arguments(&self) -> bool {
        ["\"arguments\"", "\"parameters\""].contains(&self.key.as_str())
    }

    /// Takes in a value, and says whether it may be what it is.
    fn end_value(&mut self) -> bool {
        self.state = State::Comma;
        let text = || serde_json::from_str::<String>(&self.value).ok();
        if self.key == "\"name\"" {
            self.name = text();
            return self.name.is_some();
        }
        if !self.is_arguments() || self.value.starts_with('{') {
            return true;
        }
        // Some write the object as a string; and nothing where there is none.
        let inner = if self.value == "null" { Some("{}".to_owned()) } else { text() };
        self.has_arguments = inner.is_some();
        self.arguments.extend(inner);
        self.has_arguments
    }
}

/// Whether it may stand anywhere between the parts of JSON.
const fn is_blank(c: char) -> bool {
    matches!(c, ' ' | '\n' | '\r' | '\t')
}
