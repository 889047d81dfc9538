//! Messages and texts to tokens.

use std::{fmt::Display, sync::Arc};

use super::{
    Server,
    error::ApiError,
    turns::{Turn, Turns},
};
use crate::{
    Error, Llm,
    constraint::{Constraint, Grammar},
    sampling::SamplingParams,
    text::{ChatError, ChatOptions, Message},
};

/// The tokens of a chat; `turn` is that of a large body.
///
/// # Errors
/// The template does not take such a chat.
pub async fn chat(
    server: &Arc<Server>,
    turn: Option<&Turn>,
    messages: Vec<Message>,
    tools: Vec<serde_json::Value>,
    options: ChatOptions,
) -> Result<Vec<u32>, ApiError> {
    let held = (Turns::of(&server.turns.chats).await?, turn.cloned());
    let work = move |llm: &Llm| llm.text().render_chat(&messages, &tools, &options);
    compute(server, held, work).await?.map_err(|error| not_written(&error))
}

/// Why a chat has no tokens.
fn not_written(error: &Error) -> ApiError {
    match error.downcast_ref() {
        Some(ChatError::TooManyTokens { fewest, most }) => {
            too_long(format!("at least {fewest}"), *most, "messages")
        }
        // Nothing that is asked can change that.
        Some(ChatError::NotRun(why)) => {
            tracing::error!(why, "a chat was not written");
            ApiError::internal()
        }
        _ => ApiError::parameter("messages", error.to_string()),
    }
}

/// What answers have to be, compiled; `None` if they may be anything.
///
/// # Errors
/// It cannot be used; `name` is the parameter that has it.
pub async fn compile(
    server: &Arc<Server>,
    turn: Option<&Turn>,
    constraint: Option<Constraint>,
    name: &str,
) -> Result<Option<Grammar>, ApiError> {
    let Some(constraint) = constraint else { return Ok(None) };
    let compiled = compute(server, turn.cloned(), move |llm| llm.engine().compile(&constraint)).await?;
    compiled.map(Some).map_err(|error| ApiError::parameter(name, error.to_string()))
}

/// Computes something where that holds up no connection; `held` are the turns that it is part of.
pub async fn compute<T: Send + 'static>(
    server: &Arc<Server>,
    held: impl Send + 'static,
    work: impl FnOnce(&Llm) -> T + Send + 'static,
) -> Result<T, ApiError> {
    let of_llm = server.clone();
    server.turns.compute(held, move || of_llm.llm().map(work)).await?
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

#[cfg(test)]
mod tests {
    use axum::{http::StatusCode, response::IntoResponse};

    use super::*;

    #[test]
    fn only_errors_of_the_chat_are_the_clients() {
        let of = |error: ChatError| {
            let error = not_written(&error.into());
            (error.clone().into_response().status(), error.body().error.param)
        };
        let messages = Some("messages".to_owned());
        for error in [
            ChatError::Template("no".into()),
            ChatError::TakesTooMuch("no".into()),
            ChatError::TooLong { most: 1 },
            ChatError::TooManyTokens { fewest: 2, most: 1 },
        ] {
            assert_eq!(of(error), (StatusCode::BAD_REQUEST, messages.clone()));
        }
        assert_eq!(of(ChatError::NotRun("no".into())), (StatusCode::INTERNAL_SERVER_ERROR, None));
    }
}
