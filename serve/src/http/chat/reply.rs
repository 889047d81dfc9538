//! Answers to a chat on their way to what is sent.

use std::{mem, sync::Arc};

use super::tools::Tools;
use crate::{
    engine::Event,
    http::{
        answers::{Answered, Answers, ids, stop_reason},
        error::ApiError,
        logprobs, seconds_since_1970,
        sse::Chunks,
        types::{
            chat::{
                AnsweredToolCall, AssistantMessage, ChatChoice, ChatChunkChoice, ChatCompletion,
                ChatCompletionChunk, Delta, FunctionDelta, ToolCallDelta,
            },
            message::{FunctionCall, ToolKind},
            usage::Usage,
        },
    },
    request::Finish,
    scheduler::Token,
    text::{
        Text,
        tools::{ToolParser, ToolPiece},
    },
};

/// All answers to a chat.
pub struct Reply {
    id: String,
    created: u64,
    model: String,
    text: Arc<Text>,
    logprobs: bool,
    /// Whether ids of tokens are given.
    token_ids: bool,
    /// Those of the prompt, until they were given.
    prompt: Option<Vec<u32>>,
    /// Whether an answer may call several tools.
    parallel: bool,
    choices: Vec<Choice>,
}

/// One of them.
#[derive(Default)]
struct Choice {
    /// Whether its role was sent.
    begun: bool,
    /// Finds calls, if there are tools, until the answer ends.
    parser: Option<ToolParser>,
    /// Whether the model is asked for a call of a certain tool.
    named: bool,
    /// Whether a tool was called.
    calls: bool,
    content: String,
    tool_calls: Vec<AnsweredToolCall>,
    tokens: Vec<Token>,
}

impl Choice {
    /// What an event says: text, and calls of tools.
    fn pieces(&mut self, event: &Event, parallel: bool) -> Vec<ToolPiece> {
        let Some(parser) = &mut self.parser else {
            let says = !event.text.is_empty();
            return says.then(|| ToolPiece::Text(event.text.clone())).into_iter().collect();
        };
        let mut pieces = parser.push(&event.text);
        if event.end.is_some() {
            pieces.extend(self.parser.take().into_iter().flat_map(ToolParser::finish));
        }
        pieces.retain(|piece| match piece {
            ToolPiece::Text(text) => !text.is_empty(),
            ToolPiece::Call { index, .. } | ToolPiece::Arguments { index, .. } => parallel || *index == 0,
        });
        self.calls |= pieces.iter().any(|piece| matches!(piece, ToolPiece::Call { .. }));
        pieces
    }

    /// A call that was asked for by its tool's name ends as any answer, as with OpenAI and vLLM.
    fn finish_reason(&self, finish: &Finish) -> &'static str {
        match finish.reason() {
            "stop" if self.calls && !self.named => "tool_calls",
            reason => reason,
        }
    }

    /// Adds a piece to the whole answer.
    fn add(&mut self, piece: ToolPiece) {
        match piece {
            ToolPiece::Text(text) => self.content += &text,
            ToolPiece::Call { id, name, .. } => {
                let function = FunctionCall { name, arguments: String::new() };
                self.tool_calls.push(AnsweredToolCall { id, kind: ToolKind::Function, function });
            }
            ToolPiece::Arguments { text, .. } => {
                if let Some(call) = self.tool_calls.last_mut() {
                    call.function.arguments += &text;
                }
            }
        }
    }

    /// The whole answer.
    fn message(&mut self) -> AssistantMessage {
        let says = !self.content.is_empty() || self.tool_calls.is_empty();
        AssistantMessage {
            role: "assistant",
            content: says.then(|| mem::take(&mut self.content)),
            tool_calls: mem::take(&mut self.tool_calls),
        }
    }
}

impl Reply {
    /// So many answers, of which nothing was said.
    pub fn new(id: &str, model: String, text: Arc<Text>, tools: &Tools, answers: usize) -> Self {
        let choice = || Choice { parser: tools.parser(), named: tools.are_named(), ..Choice::default() };
        Self {
            id: format!("chatcmpl-{id}"),
            created: seconds_since_1970(),
            model,
            text,
            logprobs: false,
            token_ids: false,
            prompt: None,
            parallel: tools.are_parallel(),
            choices: (0..answers).map(|_| choice()).collect(),
        }
    }

    /// With log-probabilities, if they are wanted.
    pub fn with_logprobs(self, logprobs: bool) -> Self {
        Self { logprobs, ..self }
    }

    /// With ids of tokens, if there are those of the prompt.
    pub fn with_token_ids(self, prompt: Option<Vec<u32>>) -> Self {
        Self { token_ids: prompt.is_some(), prompt, ..self }
    }

    /// All answers at once.
    pub async fn whole(mut self, mut answers: Answers) -> Result<ChatCompletion, ApiError> {
        let mut choices = Vec::new();
        while let Some(answered) = answers.next().await {
            let Answered { choice: index, event } = answered?;
            let choice = &mut self.choices[index];
            for piece in choice.pieces(&event, self.parallel) {
                choice.add(piece);
            }
            choice.tokens.extend(event.tokens);
            let Some(end) = event.end else { continue };
            choices.push(ChatChoice {
                index,
                message: choice.message(),
                logprobs: self.logprobs.then(|| logprobs::of_chat(&self.text, &choice.tokens)),
                finish_reason: choice.finish_reason(&end.finish),
                stop_reason: stop_reason(&end.finish),
                token_ids: self.token_ids.then(|| ids(&choice.tokens)),
            });
        }
        choices.sort_by_key(|choice| choice.index);
        let Self { id, created, model, prompt: prompt_token_ids, .. } = self;
        let (object, usage) = ("chat.completion", answers.usage());
        Ok(ChatCompletion { id, object, created, model, choices, usage, prompt_token_ids })
    }

    fn chunk(&mut self, choices: Vec<ChatChunkChoice>, usage: Option<Usage>) -> ChatCompletionChunk {
        ChatCompletionChunk {
            id: self.id.clone(),
            object: "chat.completion.chunk",
            created: self.created,
            model: self.model.clone(),
            choices,
            usage,
            prompt_token_ids: self.prompt.take(),
        }
    }
}

impl Chunks for Reply {
    type Chunk = ChatCompletionChunk;

    fn answered(&mut self, Answered { choice: index, event }: Answered) -> Vec<ChatCompletionChunk> {
        let choice = &mut self.choices[index];
        let mut deltas = Vec::new();
        if !mem::replace(&mut choice.begun, true) {
            let content = Some(String::new());
            deltas.push(Delta { role: Some("assistant"), content, ..Delta::default() });
        }
        let first = deltas.len();
        deltas.extend(choice.pieces(&event, self.parallel).into_iter().map(Delta::from));
        let mut logprobs =
            (self.logprobs && !event.tokens.is_empty()).then(|| logprobs::of_chat(&self.text, &event.tokens));
        let mut token_ids = (self.token_ids && !event.tokens.is_empty()).then(|| ids(&event.tokens));
        if (logprobs.is_some() || token_ids.is_some()) && deltas.len() == first {
            deltas.push(Delta { content: Some(String::new()), ..Delta::default() });
        }
        let mut choices: Vec<_> = deltas
            .into_iter()
            .enumerate()
            .map(|(at, delta)| ChatChunkChoice {
                index,
                delta,
                logprobs: if at == first { logprobs.take() } else { None },
                finish_reason: None,
                stop_reason: None,
                token_ids: if at == first { token_ids.take() } else { None },
            })
            .collect();
        if let Some(end) = event.end {
            choices.push(ChatChunkChoice {
                index,
                delta: Delta::default(),
                logprobs: None,
                finish_reason: Some(choice.finish_reason(&end.finish)),
                stop_reason: stop_reason(&end.finish),
                token_ids: None,
            });
        }
        choices.into_iter().map(|choice| self.chunk(vec![choice], None)).collect()
    }

    fn usage(&mut self, usage: Usage) -> ChatCompletionChunk {
        self.chunk(Vec::new(), Some(usage))
    }
}

impl From<ToolPiece> for Delta {
    fn from(piece: ToolPiece) -> Self {
        let call = match piece {
            ToolPiece::Text(text) => return Self { content: Some(text), ..Self::default() },
            ToolPiece::Call { index, id, name } => ToolCallDelta {
                index,
                id: Some(id),
                kind: Some(ToolKind::Function),
                function: FunctionDelta { name: Some(name), arguments: String::new() },
            },
            ToolPiece::Arguments { index, text } => ToolCallDelta {
                index,
                id: None,
                kind: None,
                function: FunctionDelta { name: None, arguments: text },
            },
        };
        Self { tool_calls: vec![call], ..Self::default() }
    }
}
