//! Messages of a chat as they come.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::values::{MAX_VALUES, values};
use crate::{
    http::error::{ApiError, shorten},
    text::{self, Message, MessageContent, Role},
};

/// What somebody said.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct ChatMessage {
    #[schema(value_type = RoleName)]
    pub role: Role,
    /// Calls of tools may have none.
    pub content: Option<Content>,
    /// The name of who speaks, or of the tool.
    pub name: Option<String>,
    /// The calls that the assistant made.
    pub tool_calls: Option<Vec<ToolCall>>,
    /// The call that a tool's result answers.
    pub tool_call_id: Option<String>,
    /// What the assistant thought before it answered.
    pub reasoning_content: Option<String>,
}

/// The roles of a chat.
#[derive(ToSchema)]
#[schema(rename_all = "lowercase")]
#[expect(dead_code, reason = "it is read by the macro that documents `Role`")]
pub enum RoleName {
    System,
    Developer,
    User,
    Assistant,
    Tool,
}

/// Text, or parts of it, which are joined by line ends.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string, or an array of parts with a `type`")]
pub enum Content {
    Text(String),
    Parts(Vec<Part>),
}

/// A part of what is said: `text` is the only type that the models read.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct Part {
    #[serde(rename = "type")]
    #[schema(pattern = "^text$")]
    pub kind: String,
    #[schema(required, value_type = String)]
    pub text: Option<String>,
}

/// A call of a tool.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[expect(dead_code, reason = "there is one kind of tool")]
pub struct ToolCall {
    pub id: Option<String>,
    #[serde(rename = "type", default)]
    pub kind: ToolKind,
    pub function: FunctionCall,
}

/// The kind of a tool.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ToolKind {
    #[default]
    Function,
}

/// A function, and the text of a JSON object with its arguments.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct FunctionCall {
    pub name: String,
    pub arguments: String,
}

/// A tool that the model may call.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Tool {
    #[serde(rename = "type", default)]
    pub kind: ToolKind,
    pub function: FunctionDefinition,
}

/// A function, and the JSON schema of its arguments.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct FunctionDefinition {
    #[schema(min_length = 1)]
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Map<String, Value>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strict: Option<bool>,
}

/// Whether tools are called.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected `none`, `auto`, `required`, or the function to call")]
pub enum ToolChoice {
    Mode(ToolMode),
    Named(NamedTool),
}

/// Who decides whether tools are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ToolMode {
    /// None is called.
    None,
    /// The model decides.
    Auto,
    /// At least one is called.
    Required,
}

/// The function that is called.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[expect(dead_code, reason = "there is one kind of tool")]
pub struct NamedTool {
    #[serde(rename = "type")]
    pub kind: ToolKind,
    pub function: FunctionName,
}

/// A function by its name.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct FunctionName {
    pub name: String,
}

/// The messages of a chat as templates take them.
///
/// # Errors
/// There are none, or a part is no text.
pub fn messages(messages: &[ChatMessage]) -> Result<Vec<Message>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::parameter("messages", "messages is empty; expected at least one"));
    }
    // They are JSON in a string, which is read, too.
    let calls = messages.iter().flat_map(|message| message.tool_calls.iter().flatten());
    if calls.map(|call| values(call.function.arguments.as_bytes())).sum::<usize>() > MAX_VALUES {
        let message = format!("arguments of calls have too many values; expected at most {MAX_VALUES}");
        return Err(ApiError::parameter("messages", message));
    }
    messages.iter().enumerate().map(|(index, message)| message.to_text(index)).collect()
}

impl ChatMessage {
    fn to_text(&self, index: usize) -> Result<Message, ApiError> {
        let content = match &self.content {
            None => None,
            Some(Content::Text(text)) => Some(MessageContent::Text(text.clone())),
            Some(Content::Parts(parts)) => {
                let part =
                    |(at, part): (usize, &Part)| part.to_text(&format!("messages[{index}].content[{at}]"));
                Some(MessageContent::Parts(parts.iter().enumerate().map(part).collect::<Result<_, _>>()?))
            }
        };
        let calls = self.tool_calls.iter().flatten().map(|call| text::ToolCall {
            id: call.id.clone(),
            function: text::FunctionCall {
                name: call.function.name.clone(),
                arguments: Value::String(call.function.arguments.clone()),
            },
        });
        Ok(Message {
            role: self.role,
            content,
            reasoning_content: self.reasoning_content.clone(),
            tool_calls: calls.collect(),
            tool_call_id: self.tool_call_id.clone(),
            name: self.name.clone(),
        })
    }
}

impl Part {
    fn to_text(&self, path: &str) -> Result<text::Part, ApiError> {
        match (self.kind.as_str(), &self.text) {
            ("text", Some(text)) => Ok(text::Part::Text { text: text.clone() }),
            ("text", None) => {
                Err(ApiError::parameter(format!("{path}.text"), format!("{path}.text is missing")))
            }
            (kind, _) => {
                let kind = shorten(kind);
                let message =
                    format!("{path} is of type `{kind}`, which the model does not read; expected `text`");
                Err(ApiError::unsupported(format!("{path}.type"), message))
            }
        }
    }
}
