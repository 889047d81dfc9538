//! Messages and texts to tokens.

use std::{fmt::Display, sync::Arc};

use tokio::task::spawn_blocking;

use super::{Server, error::ApiError};
use crate::{
    Llm,
    constraint::{Constraint, Grammar},
    sampling::SamplingParams,
    text::{ChatOptions, Message, TooManyTokens},
};

/// The tokens of a chat.
///
/// # Errors
/// The template does not take such a chat.
pub async fn chat(
    server: &Arc<Server>,
    messages: Vec<Message>,
    tools: Vec<serde_json::Value>,
    options: ChatOptions,
) -> Result<Vec<u32>, ApiError> {
    let rendered = compute(server, move |llm| llm.text().render_chat(&messages, &tools, &options)).await?;
    rendered.map_err(|error| match error.downcast_ref() {
        Some(TooManyTokens { fewest, most }) => too_long(format!("at least {fewest}"), *most, "messages"),
        None => ApiError::parameter("messages", error.to_string()),
    })
}

/// What answers have to be, compiled; `None` if they may be anything.
///
/// # Errors
/// It cannot be used; `name` is the parameter that has it.
pub async fn compile(
    server: &Arc<Server>,
    constraint: Option<Constraint>,
    name: &str,
) -> Result<Option<Grammar>, ApiError> {
    let Some(constraint) = constraint else { return Ok(None) };
    let compiled = compute(server, move |llm| llm.engine().compile(&constraint)).await?;
    compiled.map(Some).map_err(|error| ApiError::parameter(name, error.to_string()))
}

/// Computes something where that holds up no connection.
pub async fn compute<T: Send + 'static>(
    server: &Arc<Server>,
    work: impl FnOnce(&Llm) -> T + Send + 'static,
) -> Result<T, ApiError> {
    let server = server.clone();
    aside(move || server.llm().map(work)).await?
}

/// The same, of what needs no model.
pub async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    spawn_blocking(work).await.map_err(|error| {
        tracing::error!(%error, "a request was not worked out");
        ApiError::internal()
    })
}

/// A prompt that does not fit the model's context, though nothing were answered; `name` is the parameter that
/// has it.
pub fn too_long(tokens: impl Display, context: usize, name: &str) -> ApiError {
    let message = format!(
        "This model's maximum context length is {context} tokens, those of the answer included, and the \
         prompt has {tokens}; shorten {name}"
    );
    ApiError::context(name, message)
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
        return Err(too_long(tokens, context, name));
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
