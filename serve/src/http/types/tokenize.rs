//! `POST /tokenize` and `POST /detokenize`, as vLLM has them.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::message::{ChatMessage, Tool};
use crate::http::{
    error::ApiError,
    extract::{Fields, RequestBody},
};

/// A text or a chat: one of `prompt` and `messages`.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct TokenizeRequest {
    pub model: Option<String>,
    pub prompt: Option<String>,
    pub messages: Option<Vec<ChatMessage>>,
    /// Whether a prompt begins with the token that begins texts; true by default.
    pub add_special_tokens: Option<bool>,
    /// Whether the tokens' texts are given, too; false by default.
    pub return_token_strs: Option<bool>,
    /// Whether the model's answer begins after the last message; true by default.
    pub add_generation_prompt: Option<bool>,
    /// Whether the last message, of the assistant, is continued; false by default.
    pub continue_final_message: Option<bool>,
    /// Further variables of the chat template.
    pub chat_template_kwargs: Option<Map<String, Value>>,
    pub tools: Option<Vec<Tool>>,
}

impl RequestBody for TokenizeRequest {
    fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        fields.section()
    }
}

/// Tokens of a text.
#[derive(Debug, Serialize, ToSchema)]
pub struct TokenizeResponse {
    pub count: usize,
    /// The most tokens of a prompt and its answer.
    pub max_model_len: usize,
    pub tokens: Vec<u32>,
    #[schema(required)]
    pub token_strs: Option<Vec<String>>,
}

/// Tokens.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct DetokenizeRequest {
    pub model: Option<String>,
    pub tokens: Vec<u32>,
}

impl RequestBody for DetokenizeRequest {
    fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        fields.section()
    }
}

/// Their text.
#[derive(Debug, Serialize, ToSchema)]
pub struct DetokenizeResponse {
    pub prompt: String,
}
