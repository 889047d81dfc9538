//! Messages of a chat, as OpenAI's API and chat templates have them.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Result;

/// Who says a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Who says how the model is to answer.
    System,
    /// As the system, in the names of newer APIs.
    Developer,
    /// Who asks.
    User,
    /// The model.
    Assistant,
    /// The result of a tool.
    Tool,
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 5] = [Self::System, Self::Developer, Self::User, Self::Assistant, Self::Tool];

    /// The name that templates know.
    pub const fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Developer => "developer",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// A part of what is said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Part {
    /// Text.
    Text {
        /// What it says.
        text: String,
    },
}

/// What is said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Content {
    /// Text.
    Text(String),
    /// Several parts, one after the other.
    Parts(Vec<Part>),
}

impl Content {
    /// The text; parts are joined by line ends, as vLLM joins them.
    pub fn to_text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Parts(parts) => {
                let texts: Vec<_> = parts.iter().map(|Part::Text { text }| text.as_str()).collect();
                texts.join("\n")
            }
        }
    }
}

/// A function and its arguments, as the model called it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FunctionCall {
    /// The function's name.
    pub name: String,
    /// An object, or the text of one as OpenAI's API has it.
    pub arguments: Value,
}

/// A call of a tool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ToolCall {
    /// What the tool's result names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// What was called, and with what.
    pub function: FunctionCall,
}

/// A message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// Calls of tools may have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Content>,
    /// What a model thought before it answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// The tools that the model called.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// The call that a tool's result answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// The name of who speaks, or of the tool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl Message {
    /// A message of text.
    pub fn new(role: Role, text: impl Into<String>) -> Self {
        Self {
            role,
            content: Some(Content::Text(text.into())),
            reasoning_content: None,
            tool_calls: Vec::new(),
            tool_call_id: None,
            name: None,
        }
    }

    /// The text of the message, if it has none an empty one.
    pub fn text(&self) -> String {
        self.content.as_ref().map_or_else(String::new, Content::to_text)
    }

    /// What a template sees: content is text, and what is not there has no key.
    ///
    /// # Errors
    /// Arguments that are no object.
    pub(super) fn for_template(&self, arguments: ArgumentsAs) -> Result<Value> {
        let mut map = Map::new();
        map.insert("role".into(), self.role.name().into());
        map.insert("content".into(), self.text().into());
        let optional = [
            ("reasoning_content", &self.reasoning_content),
            ("tool_call_id", &self.tool_call_id),
            ("name", &self.name),
        ];
        for (key, value) in optional {
            if let Some(value) = value {
                map.insert(key.into(), value.clone().into());
            }
        }
        if !self.tool_calls.is_empty() {
            let calls =
                self.tool_calls.iter().map(|call| call.for_template(arguments)).collect::<Result<_>>()?;
            map.insert("tool_calls".into(), Value::Array(calls));
        }
        Ok(map.into())
    }
}

/// What a call's arguments are for a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ArgumentsAs {
    /// An object, as most have it.
    Object,
    /// The text of one, which some join to other text.
    Text,
}

impl ToolCall {
    fn for_template(&self, arguments_as: ArgumentsAs) -> Result<Value> {
        let FunctionCall { name, arguments } = &self.function;
        let parsed = match arguments {
            Value::String(text) => serde_json::from_str(text).ok(),
            other => Some(other.clone()),
        };
        let object: Value = parsed.filter(Value::is_object).ok_or_else(|| {
            format!("the arguments of the call of `{name}` are {arguments}; expected a JSON object")
        })?;
        let arguments = match (arguments_as, arguments) {
            (ArgumentsAs::Object, _) => object,
            (ArgumentsAs::Text, Value::String(text)) => text.clone().into(),
            (ArgumentsAs::Text, _) => object.to_string().into(),
        };
        let mut map = Map::new();
        if let Some(id) = &self.id {
            map.insert("id".into(), id.clone().into());
        }
        map.insert("type".into(), "function".into());
        map.insert("function".into(), serde_json::json!({ "name": name, "arguments": arguments }));
        Ok(map.into())
    }
}
