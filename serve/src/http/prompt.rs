//! Messages and texts to tokens.

use std::sync::Arc;

use tokio::task::spawn_blocking;

use super::error::ApiError;
use crate::{
    sampling::SamplingParams,
    text::{ChatOptions, Message, Text},
};

/// The tokens of a chat.
///
/// # Errors
/// What the template says of such a chat.
pub async fn chat(
    text: &Arc<Text>,
    messages: Vec<Message>,
    tools: Vec<serde_json::Value>,
    options: ChatOptions,
) -> Result<Vec<u32>, ApiError> {
    compute(text, move |text| {
        text.render_chat(&messages, &tools, &options)
            .map_err(|error| ApiError::parameter("messages", format!("the chat template says: {error}")))
    })
    .await?
}

/// Computes something of a text where that holds up no connection.
pub async fn compute<T: Send + 'static>(
    text: &Arc<Text>,
    work: impl FnOnce(&Arc<Text>) -> T + Send + 'static,
) -> Result<T, ApiError> {
    let text = text.clone();
    spawn_blocking(move || work(&text)).await.map_err(|error| {
        tracing::error!(%error, "a text was not computed");
        ApiError::internal()
    })
}

/// Checks that a prompt and its answer fit the model's context.
///
/// # Errors
/// They do not; `name` is the parameter that has the prompt.
pub fn check_length(
    prompt: &[u32],
    params: &SamplingParams,
    context: usize,
    name: &str,
) -> Result<(), ApiError> {
    let tokens = prompt.len();
    if tokens >= context {
        let message = format!(
            "This model's maximum context length is {context} tokens, those of the answer included, and the \
             prompt has {tokens}; shorten {name}"
        );
        return Err(ApiError::context(name, message));
    }
    match params.max_tokens {
        Some(most) if most > context - tokens => {
            let message = format!(
                "This model's maximum context length is {context} tokens, and {} were asked for: {tokens} of \
                 the prompt and {most} of the answer; shorten {name}, or ask for fewer",
                tokens.saturating_add(most)
            );
            Err(ApiError::context("max_tokens", message))
        }
        _ => Ok(()),
    }
}
