//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::State,
    response::{IntoResponse, Response},
};

use super::{
    Server,
    answers::{Answered, Answers, stop_reason},
    error::{ApiError, BodyErrors},
    extract::Body,
    log::RequestLog,
    logprobs, prompt, seconds_since_1970,
    sse::{self, Chunks},
    types::{
        chat::{
            AssistantMessage, ChatChoice, ChatChunkChoice, ChatCompletion, ChatCompletionChunk, ChatFields,
            ChatRequest, Delta,
        },
        message::{self, ToolChoice, ToolMode},
        usage::Usage,
    },
};
use crate::{
    sampling::SamplingParams,
    scheduler::Token,
    text::{ChatOptions, Text},
};

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
    Body(ChatRequest { sampling, chat }): Body<ChatRequest>,
) -> Result<Response, ApiError> {
    let llm = server.llm()?;
    let model = server.name(sampling.model.as_deref())?;
    let mut params = sampling.params()?;
    params.max_tokens = chat.max_completion_tokens.or(params.max_tokens);
    params.logprobs = chat.logprobs()?;
    chat.check_tools()?;
    let tokens = chat.prompt(llm.text()).await?;
    prompt::check_length(&tokens, &params, server.max_model_len(llm), "messages")
        .map_err(|error| chat.name_limit(error))?;
    let answers = submit(&server, &log, tokens, &params).map_err(|error| chat.name_limit(error))?;
    let reply = Reply {
        id: format!("chatcmpl-{}", log.id()),
        created: seconds_since_1970(),
        model,
        text: llm.text().clone(),
        logprobs: params.logprobs.is_some(),
        begun: vec![false; answers.len()],
    };
    match sampling.streams() {
        true => Ok(sse::response(answers, reply, sampling.includes_usage(), server.options.keep_alive)),
        false => reply.whole(answers).await.map(|chat| Json(chat).into_response()),
    }
}

fn submit(
    server: &Arc<Server>,
    log: &Arc<RequestLog>,
    tokens: Vec<u32>,
    params: &SamplingParams,
) -> Result<Answers, ApiError> {
    Answers::submit(server, log, vec![tokens], params)
        .map_err(|error| error.renamed("prompt", "messages").renamed("logprobs", "top_logprobs"))
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

    /// Checks what is asked of tools.
    fn check_tools(&self) -> Result<(), ApiError> {
        let none = matches!(self.tool_choice, Some(ToolChoice::Mode(ToolMode::None)));
        match none || self.tools.iter().flatten().next().is_none() {
            true => Ok(()),
            false => Err(ApiError::unsupported("tools", "tools are not supported; leave them out")),
        }
    }

    /// The tokens of the chat.
    async fn prompt(&self, text: &Arc<Text>) -> Result<Vec<u32>, ApiError> {
        let mut variables = self.chat_template_kwargs.clone().unwrap_or_default();
        if let Some(effort) = &self.reasoning_effort {
            variables.insert("reasoning_effort".into(), effort.clone().into());
        }
        let options = chat_options(self.add_generation_prompt, self.continue_final_message, variables)?;
        prompt::chat(text, message::messages(&self.messages)?, self.tools(), options).await
    }

    /// The tools that the model is told of.
    fn tools(&self) -> Vec<serde_json::Value> {
        if let Some(ToolChoice::Mode(ToolMode::None)) = self.tool_choice {
            return Vec::new();
        }
        // Their types have no keys but strings.
        self.tools.iter().flatten().filter_map(|tool| serde_json::to_value(tool).ok()).collect()
    }

    /// Names the limit of tokens as the request did.
    fn name_limit(&self, error: ApiError) -> ApiError {
        match self.max_completion_tokens {
            Some(_) => error.renamed("max_tokens", "max_completion_tokens"),
            None => error,
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
    variables: serde_json::Map<String, serde_json::Value>,
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

/// Answers on their way to what is sent.
struct Reply {
    id: String,
    created: u64,
    model: String,
    text: Arc<Text>,
    logprobs: bool,
    /// The answers whose role was sent.
    begun: Vec<bool>,
}

impl Reply {
    /// All answers at once.
    async fn whole(self, mut answers: Answers) -> Result<ChatCompletion, ApiError> {
        let mut contents: Vec<(String, Vec<Token>)> = vec![Default::default(); answers.len()];
        let mut choices = Vec::new();
        while let Some(answered) = answers.next().await {
            let Answered { choice: index, event } = answered?;
            let (content, tokens) = &mut contents[index];
            content.push_str(&event.text);
            tokens.extend(event.tokens);
            let Some(end) = event.end else { continue };
            choices.push(ChatChoice {
                index,
                message: AssistantMessage {
                    role: "assistant",
                    content: Some(std::mem::take(content)),
                    tool_calls: Vec::new(),
                },
                logprobs: self.logprobs.then(|| logprobs::of_chat(&self.text, tokens)),
                finish_reason: end.finish.reason(),
                stop_reason: stop_reason(&end.finish),
            });
        }
        choices.sort_by_key(|choice| choice.index);
        let Self { id, created, model, .. } = self;
        Ok(ChatCompletion { id, object: "chat.completion", created, model, choices, usage: answers.usage() })
    }

    fn chunk(&self, choices: Vec<ChatChunkChoice>, usage: Option<Usage>) -> ChatCompletionChunk {
        ChatCompletionChunk {
            id: self.id.clone(),
            object: "chat.completion.chunk",
            created: self.created,
            model: self.model.clone(),
            choices,
            usage,
        }
    }
}

impl Chunks for Reply {
    type Chunk = ChatCompletionChunk;

    fn answered(&mut self, Answered { choice: index, event }: Answered) -> Vec<ChatCompletionChunk> {
        let mut choices = Vec::new();
        let chunk = |delta, logprobs| ChatChunkChoice {
            index,
            delta,
            logprobs,
            finish_reason: None,
            stop_reason: None,
        };
        if !std::mem::replace(&mut self.begun[index], true) {
            let role = Delta { role: Some("assistant"), content: Some(String::new()), ..Delta::default() };
            choices.push(chunk(role, None));
        }
        let logprobs =
            (self.logprobs && !event.tokens.is_empty()).then(|| logprobs::of_chat(&self.text, &event.tokens));
        if !event.text.is_empty() || logprobs.is_some() {
            choices.push(chunk(Delta { content: Some(event.text), ..Delta::default() }, logprobs));
        }
        if let Some(end) = event.end {
            choices.push(ChatChunkChoice {
                finish_reason: Some(end.finish.reason()),
                stop_reason: stop_reason(&end.finish),
                ..chunk(Delta::default(), None)
            });
        }
        choices.into_iter().map(|choice| self.chunk(vec![choice], None)).collect()
    }

    fn usage(&self, usage: Usage) -> ChatCompletionChunk {
        self.chunk(Vec::new(), Some(usage))
    }
}
