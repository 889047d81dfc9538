//! Answers to a chat on their way to what is sent.

use std::mem;

use super::tools::Tools;
use crate::{
    engine::Event,
    http::{
        answers::{Answered, Answers, ids, stop_reason},
        error::ApiError,
        logprobs,
        reply::ReplyHead,
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
    text::tools::{ToolParser, ToolPiece},
};

/// All answers to a chat.
pub struct Reply {
    head: ReplyHead,
    /// The prompt's tokens, where ids are given, until they were.
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
    /// So many answers, of which nothing was said. `prompt` are its tokens, where ids are given.
    pub fn new(head: ReplyHead, prompt: Option<Vec<u32>>, tools: &Tools, answers: usize) -> Self {
        let choice = || Choice { parser: tools.parser(), named: tools.are_named(), ..Choice::default() };
        Self {
            head,
            prompt,
            parallel: tools.are_parallel(),
            choices: (0..answers).map(|_| choice()).collect(),
        }
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
                logprobs: self.head.logprobs.then(|| logprobs::of_chat(&self.head.text, &choice.tokens)),
                finish_reason: choice.finish_reason(&end.finish),
                stop_reason: stop_reason(&end.finish),
                token_ids: self.head.token_ids.then(|| ids(&choice.tokens)),
            });
        }
        choices.sort_by_key(|choice| choice.index);
        let Self { head: ReplyHead { id, created, model, .. }, prompt: prompt_token_ids, .. } = self;
        let (object, usage) = ("chat.completion", answers.usage());
        Ok(ChatCompletion { id, object, created, model, choices, usage, prompt_token_ids })
    }

    fn chunk(&mut self, choices: Vec<ChatChunkChoice>, usage: Option<Usage>) -> ChatCompletionChunk {
        ChatCompletionChunk {
            id: self.head.id.clone(),
            object: "chat.completion.chunk",
            created: self.head.created,
            model: self.head.model.clone(),
            choices,
            usage,
            prompt_token_ids: self.prompt.take(),
        }
    }
}

impl Chunks for Reply {
    type Chunk = ChatCompletionChunk;

    fn answered(&mut self, Answered { choice: index, event }: Answered) -> Vec<ChatCompletionChunk> {
        let (head, choice) = (&self.head, &mut self.choices[index]);
        let mut deltas = Vec::new();
        if !mem::replace(&mut choice.begun, true) {
            let content = Some(String::new());
            deltas.push(Delta { role: Some("assistant"), content, ..Delta::default() });
        }
        let first = deltas.len();
        deltas.extend(choice.pieces(&event, self.parallel).into_iter().map(Delta::from));
        let has_tokens = !event.tokens.is_empty();
        let mut logprobs =
            (head.logprobs && has_tokens).then(|| logprobs::of_chat(&head.text, &event.tokens));
        let mut token_ids = (head.token_ids && has_tokens).then(|| ids(&event.tokens));
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
