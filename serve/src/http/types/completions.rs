//! `POST /v1/completions`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{chat::StopReason, sampling::SamplingFields, usage::Usage};
use crate::http::{
    error::ApiError,
    extract::{Fields, RequestBody},
};

/// Prompts, and how they are to be continued. `max_tokens` is 16 by default.
#[derive(Clone, Debug, ToSchema)]
pub struct CompletionRequest {
    #[schema(inline)]
    #[serde(flatten)]
    pub sampling: SamplingFields,
    #[schema(inline)]
    #[serde(flatten)]
    pub completion: CompletionFields,
}

/// The fields that only completions have.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct CompletionFields {
    pub prompt: Prompt,
    /// How many of the likeliest tokens come with their log-probabilities.
    #[schema(minimum = 0, maximum = 20)]
    pub logprobs: Option<usize>,
    /// Whether answers begin with their prompt, and log-probabilities with those of its tokens. With
    /// it, `max_tokens` may be 0.
    pub echo: Option<bool>,
    /// Whether a prompt of text begins with the token that begins texts; true by default.
    pub add_special_tokens: Option<bool>,
}

/// A text or its tokens, or several.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected a string, an array of strings, an array of tokens, or an array of such arrays"
)]
pub enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

impl RequestBody for CompletionRequest {
    fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        Ok(Self { sampling: fields.section()?, completion: fields.section()? })
    }
}

/// Continued prompts. A streamed answer comes in pieces of the same form.
#[derive(Debug, Serialize, ToSchema)]
pub struct Completion {
    pub id: String,
    /// `text_completion`
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    pub model: String,
    pub choices: Vec<CompletionChoice>,
    /// Streams have it in their last piece, where it is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// How a prompt goes on. Answers to one prompt follow each other.
#[derive(Debug, Serialize, ToSchema)]
pub struct CompletionChoice {
    pub index: usize,
    pub text: String,
    #[schema(required)]
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`; null in all pieces of a stream but the last.
    #[schema(required)]
    pub finish_reason: Option<&'static str>,
    #[schema(required)]
    pub stop_reason: Option<StopReason>,
    /// The ids of its tokens, but for one that ended it, where they are asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    /// The ids of the prompt's tokens, where they are asked for; in a stream once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// Log-probabilities of tokens, one after the other.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    /// Where each token begins, in characters of the answer.
    pub text_offset: Vec<usize>,
    /// The natural logarithms of their probabilities; -9999 for none, and null for the first token of
    /// a prompt.
    pub token_logprobs: Vec<Option<f32>>,
    pub tokens: Vec<String>,
    /// The likeliest tokens in the place of each, and the one that is there.
    pub top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
}
