//! `POST /v1/chat/completions`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{
    message::{ChatMessage, FunctionCall, Tool, ToolChoice, ToolKind},
    sampling::SamplingFields,
    usage::Usage,
};
use crate::http::{
    error::ApiError,
    extract::{Fields, RequestBody},
};

/// A chat, and how it is to be answered.
#[derive(Clone, Debug, ToSchema)]
pub struct ChatRequest {
    #[schema(inline)]
    #[serde(flatten)]
    pub sampling: SamplingFields,
    #[schema(inline)]
    #[serde(flatten)]
    pub chat: ChatFields,
}

/// The fields that only chats have.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct ChatFields {
    #[schema(min_items = 1)]
    pub messages: Vec<ChatMessage>,
    /// The most tokens of an answer; it goes before `max_tokens`. By default as many as the
    /// context has room for.
    #[schema(minimum = 1)]
    pub max_completion_tokens: Option<usize>,
    /// Whether tokens come with their log-probabilities.
    pub logprobs: Option<bool>,
    /// How many of the likeliest tokens come with them; needs `logprobs`.
    #[schema(minimum = 0, maximum = 20)]
    pub top_logprobs: Option<usize>,
    pub tools: Option<Vec<Tool>>,
    /// `auto` by default where there are tools.
    pub tool_choice: Option<ToolChoice>,
    /// Whether an answer may call several tools; true by default.
    pub parallel_tool_calls: Option<bool>,
    /// Whether the model's answer begins after the last message; true by default.
    pub add_generation_prompt: Option<bool>,
    /// Whether the last message, of the assistant, is continued; false by default.
    pub continue_final_message: Option<bool>,
    /// Further variables of the chat template.
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// The template's variable of this name.
    pub reasoning_effort: Option<String>,
}

impl RequestBody for ChatRequest {
    fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        Ok(Self { sampling: fields.section()?, chat: fields.section()? })
    }
}

/// The answers to a chat.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatCompletion {
    pub id: String,
    /// `chat.completion`
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    pub model: String,
    pub choices: Vec<ChatChoice>,
    pub usage: Usage,
    /// The ids of the prompt's tokens, where they are asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// An answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    pub index: usize,
    pub message: AssistantMessage,
    #[schema(required)]
    pub logprobs: Option<ChatLogprobs>,
    /// `stop`, `length` or `tool_calls`.
    pub finish_reason: &'static str,
    #[schema(required)]
    pub stop_reason: Option<StopReason>,
    /// The ids of its tokens, but for one that ended it, where they are asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// What ended an answer, if it was not the model.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum StopReason {
    /// The stop string.
    Text(String),
    /// The stop token.
    Token(u32),
}

/// What the model said.
#[derive(Debug, Serialize, ToSchema)]
pub struct AssistantMessage {
    /// `assistant`
    pub role: &'static str,
    /// Calls of tools may have none.
    #[schema(required)]
    pub content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<AnsweredToolCall>,
}

/// A call that the model made.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AnsweredToolCall {
    pub id: String,
    #[serde(rename = "type")]
    pub kind: ToolKind,
    pub function: FunctionCall,
}

/// Log-probabilities of an answer's tokens.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatLogprobs {
    pub content: Vec<ChatTokenLogprob>,
}

/// A token and its log-probability.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TokenLogprob {
    /// Its text, with marks for what is no whole character.
    pub token: String,
    /// The natural logarithm of its probability; -9999 for none.
    pub logprob: f32,
    /// Its bytes.
    #[schema(required)]
    pub bytes: Vec<u8>,
}

/// The same, with the likeliest tokens in its place.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatTokenLogprob {
    #[serde(flatten)]
    pub token: TokenLogprob,
    pub top_logprobs: Vec<TokenLogprob>,
}

/// A piece of streamed answers.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatCompletionChunk {
    pub id: String,
    /// `chat.completion.chunk`
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub choices: Vec<ChatChunkChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// The ids of the prompt's tokens, in the first piece, where they are asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// A piece of one answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChunkChoice {
    pub index: usize,
    pub delta: Delta,
    #[schema(required)]
    pub logprobs: Option<ChatLogprobs>,
    /// Not null in an answer's last piece.
    #[schema(required)]
    pub finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<StopReason>,
    /// The ids of the piece's tokens, where they are asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// What a piece adds to a message.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCallDelta>,
}

/// What a piece adds to a call of a tool.
#[derive(Debug, Serialize, ToSchema)]
pub struct ToolCallDelta {
    /// Which call of the message.
    pub index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<ToolKind>,
    pub function: FunctionDelta,
}

/// What a piece adds to a function's name and arguments.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct FunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub arguments: String,
}
