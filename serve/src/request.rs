//! A request: a prompt, the answer so far, and when that ends.

use std::{collections::BTreeSet, fmt};

use crate::Result;

/// What bounds every request.
#[derive(Clone, Debug)]
pub struct Limits {
    /// The most tokens that one step computes, which is also the most requests
    /// that run at a time. At least 1.
    pub step_tokens: usize,
    /// The most tokens of an answer. At least 1.
    pub max_tokens: usize,
    /// The most tokens of a prompt and its answer: the model's context.
    pub context: usize,
    /// The most tokens of a draft; 0 for no drafts.
    pub draft: usize,
    /// Tokens with which the model ends an answer.
    pub ends: BTreeSet<u32>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ended {
    /// The model gave one of [`Limits::ends`], which is the answer's last token.
    Model,
    /// At [`Limits::max_tokens`].
    MaxTokens,
    /// At [`Limits::context`].
    Context,
    /// The whole cache holds no more.
    Cache,
    /// The model computed NaN, so that there is no next token.
    NoNumbers,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Model => "the model",
            Self::MaxTokens => "--max-tokens",
            Self::Context => "the model's context",
            Self::Cache => "the cache's size",
            Self::NoNumbers => "logits that are no numbers",
        })
    }
}

/// A prompt, and what the model has added to it.
#[derive(Clone, Debug)]
pub struct Request {
    tokens: Vec<u32>,
    prompt: usize,
    /// Tokens that the cache held at some time.
    pub reached: usize,
    ended: Option<Ended>,
}

impl Request {
    /// A request without an answer.
    ///
    /// # Errors
    /// The prompt is empty, or leaves no room for an answer in the model's
    /// context or in a cache of so many tokens.
    pub fn new(prompt: Vec<u32>, limits: &Limits, cache: usize) -> Result<Self> {
        let len = prompt.len();
        if len == 0 {
            return Err("the prompt is empty".into());
        }
        if len >= limits.context {
            let context = limits.context;
            return Err(format!(
                "the prompt has {len} tokens, and the model's context {context}, those of the answer \
                 included; shorten it"
            )
            .into());
        }
        if len >= cache {
            return Err(format!(
                "the prompt has {len} tokens, and the cache holds {cache}, those of the answer included; \
                 shorten it, or give more --cache-tokens"
            )
            .into());
        }
        Ok(Self { tokens: prompt, prompt: len, reached: 0, ended: None })
    }

    /// The tokens of the prompt and of the answer.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The tokens that the model has added.
    pub fn answer(&self) -> &[u32] {
        &self.tokens[self.prompt..]
    }

    /// The tokens of the answer's text: all but the one that ended it.
    pub fn spoken(&self) -> &[u32] {
        let end = usize::from(self.ended == Some(Ended::Model));
        &self.tokens[self.prompt..self.tokens.len() - end]
    }

    /// Why the answer ended, if it did.
    pub fn ended(&self) -> Option<Ended> {
        self.ended
    }

    /// Ends the answer where there is no next token.
    pub fn fail(&mut self) {
        self.ended = Some(Ended::NoNumbers);
    }

    /// Adds a token to the answer, which may end it.
    pub fn push(&mut self, token: u32, limits: &Limits, cache: usize) {
        self.tokens.push(token);
        // What follows a token takes that token's place in the cache.
        self.ended = match self.tokens.len() {
            _ if limits.ends.contains(&token) => Some(Ended::Model),
            _ if self.answer().len() >= limits.max_tokens => Some(Ended::MaxTokens),
            len if len > limits.context => Some(Ended::Context),
            len if len > cache => Some(Ended::Cache),
            _ => None,
        };
    }
}
