//! What is asked of an engine, and how that ends.

use std::fmt;

use crate::{
    constraint::{Grammar, InvalidConstraint},
    sampling::{InvalidParameter, SamplingParams},
};

/// A prompt, and how it is to be answered.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The tokens of the prompt.
    pub prompt: Vec<u32>,
    /// How tokens of the answers are chosen, and when these end.
    pub params: SamplingParams,
    /// What the answers have to be, as [`Engine::compile`](crate::engine::Engine::compile) makes
    /// it of a [`Constraint`](crate::constraint::Constraint); `None` for any text. Their end
    /// tokens come only where they are complete, and they end where nothing can follow, even
    /// before [`min_tokens`](SamplingParams::min_tokens).
    pub grammar: Option<Grammar>,
    /// Control tokens that are shown in the answers' text by their names: marks that a caller
    /// looks for, such as those of [`ToolFormat`](crate::text::ToolFormat). Others never are.
    pub shown: Vec<u32>,
}

impl Request {
    /// A prompt whose answers may be any text, without control tokens.
    pub fn new(prompt: Vec<u32>, params: SamplingParams) -> Self {
        Self { prompt, params, ..Self::default() }
    }
}

/// A request's number, of one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub(crate) u64);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Finish {
    /// The model gave one of its end tokens.
    EndToken(u32),
    /// One of [`SamplingParams::stop_token_ids`] came.
    StopToken(u32),
    /// One of [`SamplingParams::stop`] came.
    StopString(String),
    /// The answer is all that its constraint asks for, and nothing can follow.
    Complete,
    /// At [`SamplingParams::max_tokens`].
    MaxTokens,
    /// At the model's context.
    Context,
    /// The whole cache holds no more.
    Cache,
    /// The model computed NaN, so that there is no next token.
    NoNumbers,
    /// The request was cancelled.
    Cancelled,
    /// The engine could not go on with it, for this reason.
    Failed(String),
}

impl Finish {
    /// The reason in a word, as OpenAI's and vLLM's servers say it.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::EndToken(_) | Self::StopToken(_) | Self::StopString(_) | Self::Complete => "stop",
            Self::MaxTokens | Self::Context | Self::Cache => "length",
            Self::Cancelled => "abort",
            Self::NoNumbers | Self::Failed(_) => "error",
        }
    }

    /// Whether the last token ended the answer and is no part of its text.
    pub fn hides_last_token(&self) -> bool {
        matches!(self, Self::EndToken(_) | Self::StopToken(_))
    }
}

impl fmt::Display for Finish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EndToken(_) => f.write_str("the model"),
            Self::StopToken(token) => write!(f, "the stop token {token}"),
            Self::StopString(stop) => write!(f, "the stop string {stop:?}"),
            Self::Complete => f.write_str("its constraint"),
            Self::MaxTokens => f.write_str("the limit of tokens"),
            Self::Context => f.write_str("the model's context"),
            Self::Cache => f.write_str("the cache's size"),
            Self::NoNumbers => f.write_str("logits that are no numbers"),
            Self::Cancelled => f.write_str("its caller"),
            Self::Failed(problem) => write!(f, "an error: {problem}"),
        }
    }
}

/// The tokens of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that were found when the prompt was first read: in the prefix cache,
    /// or in another answer to the same request.
    pub cached_tokens: usize,
    /// Tokens of the answer, with one that ended it.
    pub completion_tokens: usize,
}

/// What every request has to fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// The tokens that the model knows: those below this.
    pub vocab_size: usize,
    /// The most tokens of a prompt and its answer: the model's context.
    pub context: usize,
    /// The tokens for which the KV cache has room.
    pub cache_tokens: usize,
}

impl Bounds {
    /// Checks a request.
    ///
    /// # Errors
    /// A parameter is out of its range; the prompt is empty or has a token that is
    /// none; or it leaves no room for an answer in the context or the cache.
    pub fn check(&self, request: &Request) -> Result<(), SubmitError> {
        let Self { vocab_size, context, cache_tokens: cache } = *self;
        let (prompt, tokens) = (&request.prompt, request.prompt.len());
        request.params.check(vocab_size)?;
        if tokens == 0 {
            return Err(SubmitError::EmptyPrompt);
        }
        if let Some(&token) = prompt.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(SubmitError::UnknownToken { token, vocab_size });
        }
        if tokens >= context {
            return Err(SubmitError::Context { tokens, context });
        }
        if tokens >= cache {
            return Err(SubmitError::Cache { tokens, cache });
        }
        Ok(())
    }
}

/// Why a request is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// There is nothing to answer.
    #[error("the prompt is empty; give at least one token")]
    EmptyPrompt,
    /// The prompt has a token that the model does not know.
    #[error("the prompt has the token {token}; the model knows those below {vocab_size}")]
    UnknownToken {
        /// The token.
        token: u32,
        /// The number of tokens that the model knows.
        vocab_size: usize,
    },
    /// A parameter is out of its range.
    #[error(transparent)]
    Parameter(#[from] InvalidParameter),
    /// The constraint cannot be used.
    #[error(transparent)]
    Constraint(#[from] InvalidConstraint),
    /// The prompt leaves no room for an answer in the model's context.
    #[error(
        "the prompt has {tokens} tokens, and the model's context {context}, those of the answer included; \
         shorten it"
    )]
    Context {
        /// Tokens of the prompt.
        tokens: usize,
        /// The most tokens of a prompt and its answer.
        context: usize,
    },
    /// The prompt leaves no room for an answer in the KV cache.
    #[error(
        "the prompt has {tokens} tokens, and the cache holds {cache}, those of the answer included; shorten \
         it, or give more cache tokens (--cache-tokens)"
    )]
    Cache {
        /// Tokens of the prompt.
        tokens: usize,
        /// The most tokens of all requests that run.
        cache: usize,
    },
    /// As many wait as may.
    #[error(
        "the queue is full: {answers} answers to prompts of {tokens} tokens are in it, of {max_answers} and \
         {max_tokens}; try again later"
    )]
    QueueFull {
        /// Answers that run or wait.
        answers: usize,
        /// Tokens of their prompts.
        tokens: usize,
        /// The most answers.
        max_answers: usize,
        /// The most tokens.
        max_tokens: usize,
    },
    /// The engine's thread is gone, for this reason.
    #[error("the engine is gone: {0}")]
    Dead(String),
}
