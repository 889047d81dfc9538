//! `POST /v1/completions`.

use std::{mem, slice, sync::Arc};

use axum::{
    Extension, Json,
    extract::State,
    response::{IntoResponse, Response},
};

use super::{
    Server,
    answers::{self, Answered, Answers, ids, stop_reason},
    error::{ApiError, BodyErrors},
    extract::Body,
    log::RequestLog,
    prompt,
    reply::ReplyHead,
    seconds_since_1970,
    sse::{self, Chunks},
    types::{
        completions::{
            Completion, CompletionChoice, CompletionFields, CompletionLogprobs, CompletionRequest, Prompt,
        },
        usage::Usage,
    },
};
use crate::{
    backend::Logprobs,
    constraint::Constraint,
    engine::Event,
    request::Request,
    text::{EncodeOptions, Text},
};

/// The most tokens of an answer, unless it is said.
const MAX_TOKENS: usize = 16;

/// How texts go on.
#[utoipa::path(
    post, path = "/v1/completions", tag = "answers", request_body = CompletionRequest,
    responses(
        (status = 200, description = "The answers, or with `stream` events of such, the last of which is `[DONE]`",
            content((Completion = "application/json"), (Completion = "text/event-stream"))),
        BodyErrors,
    )
)]
pub async fn completions(
    State(server): State<Arc<Server>>,
    Extension(log): Extension<Arc<RequestLog>>,
    Body { turn, request: CompletionRequest { sampling, completion } }: Body<CompletionRequest>,
) -> Result<Response, ApiError> {
    let llm = server.llm()?;
    let model = server.name(sampling.model.as_deref())?;
    let mut params = sampling.params()?;
    params.max_tokens.get_or_insert(MAX_TOKENS);
    params.logprobs = completion.logprobs;
    let echo = completion.echo.unwrap_or(false);
    params.prompt_logprobs = params.logprobs.filter(|_| echo);
    // As with vLLM, a token is computed, and not given.
    let echo_only = echo && params.max_tokens == Some(0);
    params.max_tokens = params.max_tokens.map(|most| if echo_only { 1 } else { most });
    let bounds = llm.engine().bounds();
    params.check(bounds.vocab_size)?;
    let CompletionFields { prompt, add_special_tokens, .. } = completion;
    let options = EncodeOptions { bos: add_special_tokens.unwrap_or(true), ..EncodeOptions::default() };
    if prompt.count() == 0 {
        return Err(ApiError::parameter("prompt", "prompt is an empty array; expected at least one prompt"));
    }
    answers::check_count(llm, prompt.count().saturating_mul(params.n))?;
    let context = server.max_model_len(llm);
    prompt.check_length(llm.text(), context)?;
    let prompts =
        prompt::compute(&server, turn.clone(), move |llm| prompt.encode(llm.text(), &options)).await?;
    for (tokens, _) in &prompts {
        if let Some(token) = tokens.iter().find(|token| **token as usize >= bounds.vocab_size) {
            let message =
                format!("prompt has the token {token}; the model knows those below {}", bounds.vocab_size);
            return Err(ApiError::parameter("prompt", message));
        }
        prompt::check_length(tokens, &params, context, "prompt")?;
    }
    let (prompts, texts): (Vec<Vec<u32>>, Vec<String>) = prompts.into_iter().unzip();
    let token_ids = sampling.returns_token_ids();
    let begin = |(prompt, text): (&Vec<u32>, String)| Beginning {
        echo: echo.then_some(text),
        prompt: prompt.clone(),
        logprobs: Vec::new(),
    };
    let beginnings = prompts.iter().zip(texts).map(begin).collect();
    let grammar = prompt::compile(
        &server,
        turn.as_ref(),
        sampling.schema().map(Constraint::JsonSchema),
        "response_format",
    )
    .await?;
    let request = |prompt| Request { grammar: grammar.clone(), ..Request::new(prompt, params.clone()) };
    let answers = Answers::submit(&server, &log, prompts.into_iter().map(request).collect())?;
    let head = ReplyHead {
        id: format!("cmpl-{}", log.id()),
        created: seconds_since_1970(),
        model,
        text: llm.text().clone(),
        logprobs: params.logprobs.is_some(),
        token_ids,
    };
    let reply = Reply {
        head,
        n: params.n,
        beginnings,
        echo_only,
        begun: vec![false; answers.len()],
        offsets: vec![0; answers.len()],
    };
    let (streams, usage) = (sampling.streams(), sampling.includes_usage());
    // What was asked needs no memory any more.
    drop((sampling, turn));
    match streams {
        true => Ok(sse::response(answers, reply, usage, server.options.keep_alive)),
        false => reply.whole(answers).await.map(|completion| Json(completion).into_response()),
    }
}

impl Prompt {
    /// Those that are texts, and those that are tokens.
    fn parts(&self) -> (&[String], &[Vec<u32>]) {
        match self {
            Self::Text(prompt) => (slice::from_ref(prompt), &[]),
            Self::Texts(prompts) => (prompts, &[]),
            Self::Tokens(prompt) => (&[], slice::from_ref(prompt)),
            Self::TokenLists(prompts) => (&[], prompts),
        }
    }

    fn count(&self) -> usize {
        let (texts, tokens) = self.parts();
        texts.len() + tokens.len()
    }

    /// Refuses prompts that are sure to be longer than the context, before they are tokenized.
    fn check_length(&self, text: &Text, context: usize) -> Result<(), ApiError> {
        let (texts, tokens) = self.parts();
        if let Some(tokens) = tokens.iter().map(Vec::len).find(|tokens| *tokens >= context) {
            return Err(prompt::too_long(tokens, context, "prompt"));
        }
        let mut fewest = texts.iter().map(|prompt| text.fewest_tokens(prompt.len()));
        match fewest.find(|fewest| *fewest >= context) {
            Some(fewest) => Err(prompt::too_long(format!("at least {fewest}"), context, "prompt")),
            None => Ok(()),
        }
    }

    /// The tokens and the text of each prompt.
    fn encode(self, text: &Arc<Text>, options: &EncodeOptions) -> Vec<(Vec<u32>, String)> {
        let of_text = |prompt: String| (text.encode_with(&prompt, options), prompt);
        let of_tokens = |tokens: Vec<u32>| {
            let decoded = decode(text, &tokens);
            (tokens, decoded)
        };
        match self {
            Self::Text(prompt) => vec![of_text(prompt)],
            Self::Texts(prompts) => prompts.into_iter().map(of_text).collect(),
            Self::Tokens(tokens) => vec![of_tokens(tokens)],
            Self::TokenLists(prompts) => prompts.into_iter().map(of_tokens).collect(),
        }
    }
}

/// The text of tokens.
pub fn decode(text: &Arc<Text>, tokens: &[u32]) -> String {
    let mut stream = text.stream();
    let mut decoded: String = tokens.iter().map(|&token| stream.push(token)).collect();
    decoded += &stream.finish();
    decoded
}

/// Answers on their way to what is sent.
struct Reply {
    head: ReplyHead,
    /// The answers to each prompt.
    n: usize,
    /// Whether nothing follows the prompt.
    echo_only: bool,
    /// What those to each prompt begin with.
    beginnings: Vec<Beginning>,
    /// The answers of which that was given.
    begun: Vec<bool>,
    /// Where the next token of each answer begins.
    offsets: Vec<usize>,
}

/// What comes before an answer's own text.
struct Beginning {
    /// The prompt, if it is echoed.
    echo: Option<String>,
    /// Its tokens.
    prompt: Vec<u32>,
    /// How likely these were, but for the first; empty until it is known.
    logprobs: Vec<Logprobs>,
}

impl Reply {
    /// All answers at once.
    async fn whole(mut self, mut answers: Answers) -> Result<Completion, ApiError> {
        let mut choices: Vec<_> = (0..answers.len()).map(|index| self.choice(index)).collect();
        while let Some(answered) = answers.next().await {
            let Answered { choice: index, event } = answered?;
            self.add(&mut choices[index], event);
        }
        Ok(self.chunk(choices, Some(answers.usage())))
    }

    /// An answer, or a piece of one, of which nothing was said.
    fn choice(&self, index: usize) -> CompletionChoice {
        CompletionChoice {
            index,
            text: String::new(),
            logprobs: self.head.logprobs.then(CompletionLogprobs::default),
            finish_reason: None,
            stop_reason: None,
            token_ids: self.head.token_ids.then(Vec::new),
            prompt_token_ids: None,
        }
    }

    /// Begins an answer, of which something came.
    fn begin(&mut self, choice: &mut CompletionChoice) {
        if mem::replace(&mut self.begun[choice.index], true) {
            return;
        }
        let Beginning { echo, prompt, logprobs } = &self.beginnings[choice.index / self.n];
        choice.prompt_token_ids = self.head.token_ids.then(|| prompt.clone());
        let Some(echo) = echo else { return };
        choice.text += echo;
        if let Some(of_choice) = &mut choice.logprobs {
            self.offsets[choice.index] = of_choice.push_prompt(&self.head.text, prompt, logprobs);
        }
    }

    /// Adds what came of it.
    fn add(&mut self, choice: &mut CompletionChoice, mut event: Event) {
        if !event.prompt_logprobs.is_empty() {
            self.beginnings[choice.index / self.n].logprobs = mem::take(&mut event.prompt_logprobs);
        }
        self.begin(choice);
        if self.echo_only {
            (event.text, event.tokens) = Default::default();
        }
        choice.text += &event.text;
        if let Some(logprobs) = &mut choice.logprobs {
            let offset = &mut self.offsets[choice.index];
            *offset = logprobs.push(&self.head.text, &event.tokens, *offset);
        }
        if let Some(token_ids) = &mut choice.token_ids {
            token_ids.extend(ids(&event.tokens));
        }
        if let Some(end) = event.end {
            choice.finish_reason = Some(end.finish.reason());
            choice.stop_reason = stop_reason(&end.finish);
        }
    }

    fn chunk(&self, choices: Vec<CompletionChoice>, usage: Option<Usage>) -> Completion {
        Completion {
            id: self.head.id.clone(),
            object: "text_completion",
            created: self.head.created,
            model: self.head.model.clone(),
            choices,
            usage,
        }
    }
}

impl Chunks for Reply {
    type Chunk = Completion;

    fn answered(&mut self, Answered { choice: index, event }: Answered) -> Vec<Completion> {
        let begins = !self.begun[index] && self.beginnings[index / self.n].echo.is_some();
        let has_tokens = (self.head.logprobs || self.head.token_ids) && !event.tokens.is_empty();
        if !begins && !has_tokens && event.text.is_empty() && event.end.is_none() {
            return Vec::new();
        }
        let mut choice = self.choice(index);
        self.add(&mut choice, event);
        vec![self.chunk(vec![choice], None)]
    }

    fn usage(&mut self, usage: Usage) -> Completion {
        self.chunk(Vec::new(), Some(usage))
    }
}
