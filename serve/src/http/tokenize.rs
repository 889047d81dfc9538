//! `POST /tokenize` and `POST /detokenize`.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};

use super::{
    Server,
    chat::chat_options,
    completions::decode,
    error::{ApiError, BodyErrors},
    extract::{Body, MAX_BODY_BYTES},
    logprobs::token_text,
    prompt,
    types::{
        message,
        tokenize::{DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse},
    },
};
use crate::text::EncodeOptions;

/// The most tokens of an answer, as many as can be asked for their text.
const MAX_TOKENS: usize = 1_000_000;

/// The tokens of a text or a chat.
#[utoipa::path(
    post, path = "/tokenize", tag = "tokens", request_body = TokenizeRequest,
    responses((status = 200, body = TokenizeResponse), BodyErrors)
)]
pub async fn tokenize(
    State(server): State<Arc<Server>>,
    Body { turn, request }: Body<TokenizeRequest>,
) -> Result<Response, ApiError> {
    let llm = server.llm()?;
    server.name(request.model.as_deref())?;
    let tokens = match (request.prompt, &request.messages) {
        (Some(prompt), None) => {
            let bos = request.add_special_tokens.unwrap_or(true);
            let options = EncodeOptions { bos, ..EncodeOptions::default() };
            prompt::compute(&server, turn.clone(), move |llm| llm.text().encode_with(&prompt, &options))
                .await?
        }
        (None, Some(messages)) => {
            let options = chat_options(
                request.add_generation_prompt,
                request.continue_final_message,
                request.chat_template_kwargs.unwrap_or_default(),
            )?;
            let tools = request.tools.iter().flatten().filter_map(|tool| serde_json::to_value(tool).ok());
            prompt::chat(&server, turn.as_ref(), message::messages(messages)?, tools.collect(), options)
                .await?
        }
        _ => return Err(ApiError::parameter("prompt", "expected one of prompt and messages")),
    };
    if tokens.len() > MAX_TOKENS {
        let name = if request.messages.is_some() { "messages" } else { "prompt" };
        let message = format!("{name} has {} tokens; expected at most {MAX_TOKENS}", tokens.len());
        return Err(ApiError::parameter(name, message));
    }
    let token_strs = request.return_token_strs.unwrap_or(false);
    let max_model_len = server.max_model_len(llm);
    let text = llm.text().clone();
    let answer = move || TokenizeResponse {
        count: tokens.len(),
        max_model_len,
        token_strs: token_strs.then(|| tokens.iter().map(|&id| token_text(&text, id)).collect()),
        tokens,
    };
    // Writing a million of them takes a while.
    server.turns.compute(turn, move || Json(answer()).into_response()).await
}

/// The text of tokens.
#[utoipa::path(
    post, path = "/detokenize", tag = "tokens", request_body = DetokenizeRequest,
    responses((status = 200, body = DetokenizeResponse), BodyErrors)
)]
pub async fn detokenize(
    State(server): State<Arc<Server>>,
    Body { turn, request: DetokenizeRequest { model, tokens } }: Body<DetokenizeRequest>,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    let llm = server.llm()?;
    server.name(model.as_deref())?;
    let vocab_size = llm.text().vocab_size();
    if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab_size) {
        let message = format!("tokens has {token}; the model knows those below {vocab_size}");
        return Err(ApiError::parameter("tokens", message));
    }
    let bytes: usize = tokens.iter().map(|&token| llm.text().token_bytes(token).len()).sum();
    if bytes > MAX_BODY_BYTES {
        let message = format!("the text of tokens has {bytes} bytes; expected at most {MAX_BODY_BYTES}");
        return Err(ApiError::parameter("tokens", message));
    }
    let prompt = prompt::compute(&server, turn, move |llm| decode(llm.text(), &tokens)).await?;
    Ok(Json(DetokenizeResponse { prompt }))
}
