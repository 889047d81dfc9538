//! The tools of a chat.

use serde_json::Value;

use crate::{
    constraint::Constraint,
    http::{
        error::{ApiError, shorten},
        types::{
            chat::ChatFields,
            message::{Tool, ToolChoice, ToolMode},
        },
    },
    text::{Text, ToolFormat, tools::ToolParser},
};

/// The tools that a model may call.
#[derive(Default)]
pub struct Tools {
    /// As templates take them.
    told: Vec<Value>,
    /// How the model calls them; `None` if it has none to call.
    format: Option<ToolFormat>,
    /// Control tokens that are marks of calls.
    shown: Vec<u32>,
    /// Those of which one has to be called.
    forced: Vec<Value>,
    /// Whether the request names the tool that is called.
    named: bool,
    parallel: bool,
}

impl Tools {
    /// The tools of a chat.
    ///
    /// # Errors
    /// The model's template knows no tools, or calls them in a form that is not read; one is to be called
    /// that is not there.
    pub fn new(text: &Text, chat: &ChatFields) -> Result<Self, ApiError> {
        let tools = chat.tools.as_deref().unwrap_or_default();
        let parallel = chat.parallel_tool_calls.unwrap_or(true);
        let forced = forced(tools, chat.tool_choice.as_ref())?;
        let none = matches!(chat.tool_choice, Some(ToolChoice::Mode(ToolMode::None)));
        if tools.is_empty() || none {
            return Ok(Self { parallel, ..Self::default() });
        }
        let format = text.tool_format();
        let format =
            format.map_err(|why| ApiError::unsupported("tools", format!("{why}; leave them out")))?;
        Ok(Self {
            told: values(tools),
            format: Some(format),
            shown: format.control_tokens(text),
            forced: values(forced),
            named: matches!(chat.tool_choice, Some(ToolChoice::Named(_))),
            parallel,
        })
    }

    /// The tools that the model is told of.
    pub fn told(&self) -> &[Value] {
        &self.told
    }

    /// Control tokens that are marks of calls.
    pub fn shown(&self) -> &[u32] {
        &self.shown
    }

    /// Whether the request names the tool that is called.
    pub fn are_named(&self) -> bool {
        self.named
    }

    /// Whether an answer may call several tools.
    pub fn are_parallel(&self) -> bool {
        self.parallel
    }

    /// What finds calls in an answer, if there may be some.
    pub fn parser(&self) -> Option<ToolParser> {
        Some(ToolParser::new(self.format?, &self.told))
    }

    /// What an answer has to be: calls, and nothing else, if the model has to call a tool; else JSON
    /// of a schema, if there is one, or calls in its place.
    ///
    /// # Errors
    /// A tool has no name.
    pub fn constraint(&self, text: &Text, schema: Option<Value>) -> Result<Option<Constraint>, ApiError> {
        let (tools, otherwise) = match self.have_to_be_called() {
            true => (&self.forced, None),
            false => (&self.told, schema),
        };
        let Some(format) = self.format.filter(|_| self.have_to_be_called() || otherwise.is_some()) else {
            return Ok(otherwise.map(Constraint::JsonSchema));
        };
        let constraint = format.constraint(text, tools, self.parallel, otherwise);
        constraint.map(Some).map_err(|error| ApiError::parameter("tools", error.to_string()))
    }

    /// Whether the model has to call a tool.
    pub fn have_to_be_called(&self) -> bool {
        !self.forced.is_empty()
    }
}

/// The tools of which one has to be called.
fn forced<'a>(tools: &'a [Tool], choice: Option<&ToolChoice>) -> Result<&'a [Tool], ApiError> {
    let wrong = |message: String| Err(ApiError::parameter("tool_choice", message));
    match choice {
        None | Some(ToolChoice::Mode(ToolMode::None | ToolMode::Auto)) => Ok(&[]),
        Some(ToolChoice::Mode(ToolMode::Required)) if tools.is_empty() => {
            wrong("tool_choice is `required`, and there are no tools; expected some".into())
        }
        Some(ToolChoice::Mode(ToolMode::Required)) => Ok(tools),
        Some(ToolChoice::Named(named)) => {
            let name = &named.function.name;
            match tools.iter().position(|tool| tool.function.name == *name) {
                Some(at) => Ok(&tools[at..=at]),
                None => wrong(format!("tool_choice names `{}`, which is none of the tools", shorten(name))),
            }
        }
    }
}

fn values(tools: &[Tool]) -> Vec<Value> {
    // Tools have no keys but strings, so this does not fail.
    tools.iter().filter_map(|tool| serde_json::to_value(tool).ok()).collect()
}
