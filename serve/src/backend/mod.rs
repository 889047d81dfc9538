//! What a backend computes: one step of a batch, in which some requests read
//! their prompts and others decode, and a token for each row that is to have one.

pub mod cpu;
pub mod device;
mod experts;
pub mod gpu;
pub mod graph;
mod last_edit;
mod matmul;
pub mod parallel;
pub mod precision;
pub mod sampler;
pub mod simulated;

use std::sync::Arc;

use flashinfer_rs::{indices::LogitEdit, kv::Batch};
use serde::{Deserialize, Serialize};

use toktrie::SimpleVob;

pub use self::last_edit::LastEdit;
use crate::Result;

/// The new tokens of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// The sequences, to which the new tokens were appended, and their index
    /// arrays. A request may have any number of new tokens: one that decodes, a
    /// part of a prompt, a draft, or none.
    pub batch: &'a Batch,
    /// The new tokens, request after request: the rows of `batch.queries()`.
    pub tokens: &'a [StepToken],
    /// The rows whose next token is wanted, in ascending order of rows.
    pub outputs: &'a [Output],
}

impl Step<'_> {
    /// The new tokens, if all are known.
    ///
    /// # Errors
    /// One is still to be chosen.
    pub fn known_tokens(&self) -> Result<Vec<u32>> {
        let known = |token: &StepToken| match *token {
            StepToken::Known(token) => Ok(token),
            StepToken::Chosen(_) => Err("a token of the step is not known; expected a step after the other"),
        };
        Ok(self.tokens.iter().map(known).collect::<Result<_, _>>()?)
    }
}

/// A new token of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StepToken {
    /// This one.
    Known(u32),
    /// The one that the step before chooses for this of its outputs, which the host need not know
    /// yet. Only where that step was enqueued and not collected.
    Chosen(usize),
}

impl StepToken {
    /// Tokens that are known.
    pub fn known(tokens: &[u32]) -> Vec<Self> {
        tokens.iter().copied().map(Self::Known).collect()
    }
}

/// A row that is to have a next token, and how that is chosen from the row's
/// logits: they are edited, divided by the temperature, and their softmax is
/// filtered by `min_p`, then `top_k`, then `top_p`; what is left is drawn from.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// The row of [`Step::tokens`].
    pub row: usize,
    /// What logits are divided by. 0 takes the largest logit, the first of those
    /// that are equal, whatever the filters and the number below say.
    pub temperature: f32,
    /// How many of the likeliest tokens are kept; 0 keeps all.
    pub top_k: u32,
    /// How much probability of the likeliest tokens is kept, above 0; 1 keeps all.
    pub top_p: f32,
    /// The fraction of the largest probability that a token has to have; 0 keeps all.
    pub min_p: f32,
    /// The random number that decides, in [0, 1): the token at which the
    /// cumulative distribution, in order of token ids, exceeds it.
    pub uniform: f32,
    /// Changes of logits before all that, in ascending order of tokens, each of
    /// which is there at most once and is a token of the vocabulary.
    pub edits: Vec<LogitEdit>,
    /// How the logit of the row's own token is edited, whichever of [`Step::tokens`] that is; `None`
    /// if it is edited as all others. Not together with `allowed`.
    pub last_edit: Option<LastEdit>,
    /// How many of the likeliest tokens come back with their log-probabilities,
    /// beside the chosen one; `None` for no log-probabilities at all.
    pub logprobs: Option<usize>,
    /// The only tokens that may be chosen, as bits; `None` for all.
    pub allowed: Option<Arc<SimpleVob>>,
}

impl Output {
    /// The likeliest token of a row.
    pub fn greedy(row: usize) -> Self {
        Self {
            row,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            uniform: 0.0,
            edits: Vec::new(),
            last_edit: None,
            logprobs: None,
            allowed: None,
        }
    }

    /// Whether this asks for the largest of the logits as they are.
    pub fn is_greedy(&self) -> bool {
        let edited = !self.edits.is_empty() || self.last_edit.is_some();
        self.temperature == 0.0 && !edited && self.allowed.is_none()
    }

    /// Whether the host looks at the row's logits.
    pub fn needs_logits(&self) -> bool {
        self.logprobs.is_some() || self.allowed.is_some()
    }
}

/// What came of an [`Output`].
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The token; `None` where a logit is NaN, or all that may be chosen are minus infinity.
    pub token: Option<u32>,
    /// As [`Output::logprobs`] asks; `None` also where there is no token.
    pub logprobs: Option<Logprobs>,
}

/// Natural logarithms of probabilities: those of the model, before edits,
/// temperature and filters.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// That of the token that was chosen.
    pub chosen: f32,
    /// The likeliest tokens, in descending order; of equal ones the first.
    pub top: Vec<TokenLogprob>,
}

/// A token and the natural logarithm of its probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// The logarithm of its probability.
    pub logprob: f32,
}

/// The largest step that a backend is to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepCapacity {
    /// New tokens.
    pub tokens: usize,
    /// Requests.
    pub requests: usize,
    /// Outputs.
    pub outputs: usize,
}

/// A model on a device, with the memory of the batch's pool.
///
/// What comes of an output depends on its row's logits and itself, and not on
/// what else is in the step.
pub trait Backend {
    /// The tokens that the model knows: those below this.
    fn vocab_size(&self) -> usize;

    /// Whether a step may be enqueued while the one before it is computed, unless that has an
    /// output that [needs its logits](Output::needs_logits). Two are in flight then at most. Else
    /// each step is collected before the next.
    fn is_asynchronous(&self) -> bool {
        false
    }

    /// Has a step computed: makes the copies of pages that are due
    /// ([`copy_pages`](flashinfer_rs::kv::PagedKvCache::copy_pages)), and writes keys
    /// and values to the cache, all of it after what was enqueued before. What the step says
    /// of sequences is read before this returns, and these can change then.
    ///
    /// # Errors
    /// The step is not in flight. Nothing can be said of the new tokens' keys and values; those
    /// of the tokens before them are as they were.
    fn enqueue(&mut self, step: &Step<'_>) -> Result<()>;

    /// Waits for the oldest step in flight, and gives a sample for each of its outputs, in their
    /// order.
    ///
    /// # Errors
    /// As for [`enqueue`](Self::enqueue), for a step that follows this one, too; or none is in
    /// flight.
    fn collect(&mut self) -> Result<Vec<Sample>>;

    /// Computes a step while none is in flight.
    ///
    /// # Errors
    /// Those of [`enqueue`](Self::enqueue) and [`collect`](Self::collect).
    fn step(&mut self, step: &Step<'_>) -> Result<Vec<Sample>> {
        self.enqueue(step)?;
        self.collect()
    }

    /// The logits of the outputs of the step that was collected last, as the model gave them,
    /// `[outputs, vocab_size]`: for tests. None after a step that failed, or if another was
    /// enqueued since; nor of ranks, if no output [needs them](Output::needs_logits).
    fn logits(&self) -> Result<Vec<f32>>;
}

impl<B: Backend + ?Sized> Backend for Box<B> {
    fn vocab_size(&self) -> usize {
        (**self).vocab_size()
    }

    fn is_asynchronous(&self) -> bool {
        (**self).is_asynchronous()
    }

    fn enqueue(&mut self, step: &Step<'_>) -> Result<()> {
        (**self).enqueue(step)
    }

    fn collect(&mut self) -> Result<Vec<Sample>> {
        (**self).collect()
    }

    fn logits(&self) -> Result<Vec<f32>> {
        (**self).logits()
    }
}
