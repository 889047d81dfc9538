//! Messages and texts to tokens.

use std::sync::Arc;

use tokio::task::spawn_blocking;

use super::{Server, error::ApiError};
use crate::{
    Llm,
    constraint::{Constraint, Grammar},
    sampling::SamplingParams,
    text::{ChatOptions, Message},
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
    rendered.map_err(|error| ApiError::parameter("messages", error.to_string()))
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
    spawn_blocking(move || server.llm().map(work)).await.unwrap_or_else(|error| {
        tracing::error!(%error, "a text was not computed");
        Err(ApiError::internal())
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
