//! `POST /v1/chat/completions`.

mod reply;
mod tools;

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::State,
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value};

use self::{reply::Reply, tools::Tools};
use super::{
    Server,
    answers::Answers,
    error::{ApiError, BodyErrors},
    extract::Body,
    log::RequestLog,
    prompt,
    reply::ReplyHead,
    seconds_since_1970, sse,
    turns::Turn,
    types::{
        chat::{ChatCompletion, ChatCompletionChunk, ChatFields, ChatRequest},
        message,
        sampling::SamplingFields,
    },
};
use crate::{request::Request, text::ChatOptions};

/// What the model says next in a chat.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "answers", request_body = ChatRequest,
    responses(
        (status = 200, description = "The answers, or with `stream` events of chunks, the last of which is `[DONE]`",
            content((ChatCompletion = "application/json"), (ChatCompletionChunk = "text/event-stream"))),
        BodyErrors,
    )
)]
pub async fn chat_completions(
    State(server): State<Arc<Server>>,
    Extension(log): Extension<Arc<RequestLog>>,
    Body { turn, request: ChatRequest { sampling, chat } }: Body<ChatRequest>,
) -> Result<Response, ApiError> {
    let model = server.name(sampling.model.as_deref())?;
    let tools = Tools::new(server.llm()?.text(), &chat)?;
    let max_completion_tokens = chat.max_completion_tokens.is_some();
    let named = |error: ApiError| {
        let error = error.renamed("prompt", "messages").renamed("logprobs", "top_logprobs");
        match max_completion_tokens {
            true => error.renamed("max_tokens", "max_completion_tokens"),
            false => error,
        }
    };
    let request = request(&server, turn.as_ref(), &sampling, chat, &tools).await.map_err(named)?;
    let head = ReplyHead {
        id: format!("chatcmpl-{}", log.id()),
        created: seconds_since_1970(),
        model,
        text: server.llm()?.text().clone(),
        logprobs: request.params.logprobs.is_some(),
        token_ids: sampling.returns_token_ids(),
    };
    let prompt = head.token_ids.then(|| request.prompt.clone());
    let answers = Answers::submit(&server, &log, vec![request]).map_err(named)?;
    let reply = Reply::new(head, prompt, &tools, answers.len());
    let (streams, usage) = (sampling.streams(), sampling.includes_usage());
    // What was asked needs no memory any more.
    drop((sampling, tools, turn));
    match streams {
        true => Ok(sse::response(answers, reply, usage, server.options.keep_alive)),
        false => reply.whole(answers).await.map(|chat| Json(chat).into_response()),
    }
}

/// What a chat asks of the engine.
async fn request(
    server: &Arc<Server>,
    turn: Option<&Turn>,
    sampling: &SamplingFields,
    chat: ChatFields,
    tools: &Tools,
) -> Result<Request, ApiError> {
    let mut params = sampling.params()?;
    params.max_tokens = chat.max_completion_tokens.or(params.max_tokens);
    params.logprobs = chat.logprobs()?;
    params.check(server.llm()?.engine().bounds().vocab_size)?;
    let parameter = if tools.have_to_be_called() { "tools" } else { "response_format" };
    let constraint = tools.constraint(server.llm()?.text(), sampling.schema())?;
    let mut variables = chat.chat_template_kwargs.unwrap_or_default();
    if let Some(effort) = chat.reasoning_effort {
        variables.insert("reasoning_effort".into(), effort.into());
    }
    let context = server.max_model_len(server.llm()?);
    let options = ChatOptions {
        max_tokens: Some(context),
        ..chat_options(chat.add_generation_prompt, chat.continue_final_message, variables)?
    };
    let messages = message::messages(&chat.messages)?;
    let prompt = prompt::chat(server, turn, messages, tools.told().to_vec(), options).await?;
    prompt::check_length(&prompt, &params, context, "messages")?;
    let grammar = prompt::compile(server, turn, constraint, parameter).await?;
    Ok(Request { grammar, shown: tools.shown().to_vec(), ..Request::new(prompt, params) })
}

impl ChatFields {
    /// The log-probabilities that are wanted.
    fn logprobs(&self) -> Result<Option<usize>, ApiError> {
        match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (false, None | Some(0)) => Ok(None),
            (false, Some(_)) => {
                let message = "top_logprobs is given without logprobs; expected `logprobs: true` beside it";
                Err(ApiError::parameter("top_logprobs", message))
            }
            (true, top) => Ok(Some(top.unwrap_or(0))),
        }
    }
}

/// How a chat is written.
///
/// # Errors
/// The model is to begin an answer and to continue one.
pub fn chat_options(
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    variables: Map<String, Value>,
) -> Result<ChatOptions, ApiError> {
    let continues = continue_final_message.unwrap_or(false);
    if continues && add_generation_prompt == Some(true) {
        let message = "continue_final_message and add_generation_prompt are both true; expected one of them";
        return Err(ApiError::parameter("continue_final_message", message));
    }
    Ok(ChatOptions {
        add_generation_prompt: add_generation_prompt.unwrap_or(!continues),
        continue_final_message: continues,
        variables,
        ..ChatOptions::default()
    })
}
