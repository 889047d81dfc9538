//! The fields that chats and completions have in common.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::{http::error::ApiError, sampling::SamplingParams};

/// How answers are chosen, how many, and how they are sent.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct SamplingFields {
    /// A model of `GET /v1/models`; without it, the one that is served.
    pub model: Option<String>,
    /// The answers to each prompt; 1 by default.
    #[schema(minimum = 1, maximum = 128)]
    pub n: Option<usize>,
    /// Whether the answer comes as server-sent events.
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    /// What logits are divided by; 1 by default, and 0 for the likeliest token.
    #[schema(minimum = 0)]
    pub temperature: Option<f32>,
    /// How much probability of the likeliest tokens may be drawn from: above 0, and 1 for all.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub top_p: Option<f32>,
    /// How many of the likeliest tokens may be drawn; 0 or -1 for all.
    #[schema(minimum = -1, maximum = 4294967295u32)]
    pub top_k: Option<i64>,
    /// The fraction of the largest probability that a token has to have.
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f32>,
    /// What random numbers begin with.
    pub seed: Option<i64>,
    /// What logits of tokens of the prompt and the answer are divided by.
    #[schema(exclusive_minimum = 0)]
    pub repetition_penalty: Option<f32>,
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f32>,
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f32>,
    /// What is added to logits, by token id: from -100 to 100.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    pub stop: Option<Stop>,
    /// Tokens that end an answer.
    pub stop_token_ids: Option<Vec<u32>>,
    /// The tokens that an answer has before anything may end it.
    #[schema(minimum = 0)]
    pub min_tokens: Option<usize>,
    /// The most tokens of an answer.
    #[schema(minimum = 1)]
    pub max_tokens: Option<usize>,
    /// Whether the model's own end tokens do not end an answer.
    pub ignore_eos: Option<bool>,
    pub response_format: Option<ResponseFormat>,
    /// Whether ids of tokens are given beside texts; false by default.
    pub return_token_ids: Option<bool>,
}

/// How a stream ends.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
pub struct StreamOptions {
    /// Whether a last chunk without choices says the usage.
    pub include_usage: Option<bool>,
}

/// Texts that end an answer.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string, or an array of strings")]
pub enum Stop {
    One(String),
    Several(Vec<String>),
}

/// What an answer has to be.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ResponseFormat {
    /// Any text.
    Text,
    /// A JSON object.
    JsonObject,
    /// JSON of a schema.
    JsonSchema { json_schema: JsonSchemaFormat },
}

/// A JSON schema, and its name.
#[expect(dead_code, reason = "an answer depends on the schema only, which always holds")]
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct JsonSchemaFormat {
    pub name: String,
    pub description: Option<String>,
    #[schema(required)]
    pub schema: Map<String, Value>,
    /// The schema always holds, also when this is `false`.
    pub strict: Option<bool>,
}

impl SamplingFields {
    /// Whether the answer is streamed.
    pub fn streams(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Whether a stream ends with its usage.
    pub fn includes_usage(&self) -> bool {
        self.stream_options.and_then(|options| options.include_usage).unwrap_or(false)
    }

    /// Whether ids of tokens are given.
    pub fn returns_token_ids(&self) -> bool {
        self.return_token_ids.unwrap_or(false)
    }

    /// The engine's parameters, with OpenAI's defaults.
    ///
    /// # Errors
    /// What has no such parameter. Ranges are checked by the engine.
    pub fn params(&self) -> Result<SamplingParams, ApiError> {
        if self.stream_options.is_some() && !self.streams() {
            let message =
                "stream_options is given for an answer that is not streamed; expected `stream: true`";
            return Err(ApiError::parameter("stream_options", message));
        }
        let top_k = match self.top_k.unwrap_or(0) {
            -1 => 0,
            top_k => u32::try_from(top_k).map_err(|_| {
                ApiError::parameter("top_k", format!("top_k is {top_k}; expected a number of at least -1"))
            })?,
        };
        Ok(SamplingParams {
            temperature: self.temperature.unwrap_or(1.0),
            top_k,
            top_p: self.top_p.unwrap_or(1.0),
            min_p: self.min_p.unwrap_or(0.0),
            // All 64 bits count, whatever the sign is.
            seed: self.seed.map(i64::cast_unsigned),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            logit_bias: self.logit_bias()?,
            logprobs: None,
            prompt_logprobs: None,
            stop: match &self.stop {
                None => Vec::new(),
                Some(Stop::One(stop)) => vec![stop.clone()],
                Some(Stop::Several(stops)) => stops.clone(),
            },
            stop_token_ids: self.stop_token_ids.clone().unwrap_or_default(),
            min_tokens: self.min_tokens.unwrap_or(0),
            max_tokens: self.max_tokens,
            n: self.n.unwrap_or(1),
            ignore_eos: self.ignore_eos.unwrap_or(false),
        })
    }

    /// The schema of an answer that has to be JSON.
    pub fn schema(&self) -> Option<Value> {
        match self.response_format.as_ref()? {
            ResponseFormat::Text => None,
            ResponseFormat::JsonObject => Some(json!({ "type": "object" })),
            ResponseFormat::JsonSchema { json_schema } => Some(Value::Object(json_schema.schema.clone())),
        }
    }

    fn logit_bias(&self) -> Result<BTreeMap<u32, f32>, ApiError> {
        let bias = |(token, bias): (&String, &f32)| match token.parse() {
            Ok(token) => Ok((token, *bias)),
            Err(_) => {
                let token = crate::http::error::shorten(token);
                let message = format!("logit_bias has the key {token:?}; expected ids of tokens");
                Err(ApiError::parameter("logit_bias", message))
            }
        };
        self.logit_bias.iter().flatten().map(bias).collect()
    }
}
