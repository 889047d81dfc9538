//! Calls of tools: how a model writes them, found by its template; a constraint that has it
//! write some; and what it called.

mod object;
mod parser;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use rand::distr::{Alphanumeric, SampleString};
use serde_json::{Value, json};

pub use self::parser::{ToolParser, ToolPiece};
use super::Text;
use crate::constraint::{Constraint, InvalidConstraint};

/// How a model writes calls of tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>` for each: Hermes, Qwen and others.
    Hermes,
    /// `{"name": …, "parameters": {…}}`, behind `<|python_tag|>` or as all that is said: Llama 3.
    Llama,
    /// `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`: Mistral.
    Mistral,
    /// `[TOOL_CALLS]name[ARGS]{…}` for each, with `[CALL_ID]…` behind the name in some: later
    /// Mistral.
    MistralArgs,
}

impl ToolFormat {
    const HERMES_END: &str = "</tool_call>";
    const ARGS: &str = "[ARGS]";
    const CALL_ID: &str = "[CALL_ID]";

    /// That of a chat template, if it is one of these.
    pub(super) fn of(template: &str) -> Option<Self> {
        let has = |mark: &str| template.contains(mark);
        if !has("tools") {
            None
        } else if has("[TOOL_CALLS]") {
            Some(if has(Self::ARGS) { Self::MistralArgs } else { Self::Mistral })
        } else if has("<tool_call>") && has("arguments") && !has("<function=") && !has("<arg_key>") {
            Some(Self::Hermes)
        } else if has("\"parameters\": ") && has("<|start_header_id|>") {
            Some(Self::Llama)
        } else {
            None
        }
    }

    /// What a call, or a list of calls, begins with.
    pub fn mark(self) -> &'static str {
        match self {
            Self::Hermes => "<tool_call>",
            Self::Llama => "<|python_tag|>",
            Self::Mistral | Self::MistralArgs => "[TOOL_CALLS]",
        }
    }

    /// The control tokens that are marks of calls, for
    /// [`Request::shown`](crate::request::Request::shown).
    pub fn control_tokens(self, text: &Text) -> Vec<u32> {
        let marks = [self.mark(), Self::HERMES_END, Self::ARGS, Self::CALL_ID];
        marks.iter().filter_map(|mark| text.control_id(mark)).collect()
    }

    /// A name for a call: for Mistral's templates of nine letters and digits, as they want it.
    fn new_id(self) -> String {
        let random = |len| Alphanumeric.sample_string(&mut rand::rng(), len);
        match self {
            Self::Mistral | Self::MistralArgs => random(9),
            Self::Hermes | Self::Llama => format!("call_{}", random(24)),
        }
    }

    /// A constraint by which a model calls one of these tools, or, if `parallel`, one after the
    /// other, and says nothing else, but for JSON of the schema `otherwise`, if there is one, in
    /// place of calls. The tools are those of OpenAI's API:
    /// `{"type": "function", "function": {"name": …, "parameters": …}}`.
    ///
    /// # Errors
    /// There is none, or one has no name.
    pub fn constraint(
        self,
        text: &Text,
        tools: &[Value],
        parallel: bool,
        otherwise: Option<Value>,
    ) -> Result<Constraint, InvalidConstraint> {
        let problem = |problem| InvalidConstraint { kind: "list of tools", problem };
        if tools.is_empty() {
            return Err(problem("it is empty; expected at least one".into()));
        }
        let (key, open, close) = match self {
            Self::Hermes => {
                let [open, close] = [self.mark(), Self::HERMES_END].map(|mark| mark_rule(text, mark));
                ("arguments", format!(r#"{open} "\n""#), format!(r#""\n" {close}"#))
            }
            Self::Llama => ("parameters", String::new(), String::new()),
            Self::Mistral | Self::MistralArgs => ("arguments", String::new(), String::new()),
        };
        let (mut rules, mut schemas) = (String::new(), BTreeMap::new());
        for (at, tool) in tools.iter().enumerate() {
            let function = &tool["function"];
            let name = function["name"].as_str().filter(|name| !name.is_empty());
            let name = name.ok_or_else(|| problem(format!("tool {at} has no `function` with a `name`")))?;
            let [begin, end] = match self {
                Self::MistralArgs => {
                    let [mark, args] = [self.mark(), Self::ARGS].map(|mark| mark_rule(text, mark));
                    [format!("{mark} {} {args}", literal(name)), String::new()]
                }
                _ => {
                    let begin = format!("{{\"name\": {}, \"{key}\": ", Value::from(name));
                    [literal(&begin), literal("}")]
                }
            };
            rules += &format!("tool_{at}: {begin} @arguments_{at} {end}\n");
            let parameters = function.get("parameters").filter(|schema| !schema.is_null()).cloned();
            let parameters = parameters.unwrap_or_else(|| json!({ "type": "object" }));
            schemas.insert(format!("arguments_{at}"), parameters);
        }
        let any: Vec<_> = (0..tools.len()).map(|at| format!("tool_{at}")).collect();
        let call = format!("{open} call {close}");
        let more = |between: &str| if parallel { format!("({between} {call})*") } else { String::new() };
        let calls = match self {
            Self::Hermes => format!("{call} {}", more(r#""\n""#)),
            Self::Llama => call,
            Self::MistralArgs => format!("{call} {}", more("")),
            Self::Mistral => {
                format!(r#"{} "[" call {} "]""#, mark_rule(text, self.mark()), more("\", \""))
            }
        };
        let mut start = "start: calls".to_owned();
        if let Some(schema) = otherwise {
            start += " | @answer";
            schemas.insert("answer".into(), schema);
        }
        let rules = format!("{start}\ncalls: {calls}\ncall: {}\n{rules}", any.join("\n | "));
        Ok(Constraint::Lark { rules, schemas })
    }
}

/// What stands for a mark in a rule: its token, if it is one that text cannot have.
fn mark_rule(text: &Text, mark: &str) -> String {
    text.control_id(mark).map_or_else(|| literal(mark), |id| format!("<[{id}]>"))
}

/// A text in a rule.
fn literal(text: &str) -> String {
    Value::from(text).to_string()
}
