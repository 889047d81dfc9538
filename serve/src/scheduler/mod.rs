//! Many requests through one backend and one pool of pages.
//!
//! A step computes at most [`Limits::step_tokens`] tokens. Each choice that
//! runs gets at least one of them: its last token, if it decodes, or the next
//! part of its prompt. What is left goes to prompts that wait, in the order in
//! which they came, and then to drafts. While no prompt waits or is read, and
//! without drafts, a step is one token of each choice.
//!
//! Those that run came before all that wait, and only the last of them may have
//! a part of its prompt unread. When pages run out, cached prefixes that nobody
//! uses go first. Then the last choice gives its pages back and waits again,
//! before all others. So the first always goes on, and no choice waits for
//! ever.
//!
//! What a choice has read is in the prefix cache from the next step on, and
//! what one gives back stays there as long as nobody needs the pages. A choice
//! that could share what a step reads waits for the next step. So nobody caches
//! a page under one of another choice that holds the same tokens, and what no
//! running choice uses can always be evicted.
//!
//! The answers to one request are choices of their own, one after the other. The
//! first reads the prompt; those that start later fork its sequence, and compute
//! the prompt's last token only.
//!
//! While a step is computed, the next one is planned and enqueued, where all that it has to be
//! told is known already: all choices decode, and nobody waits who could start. The tokens that
//! it begins with are chosen meanwhile, on the device. An end is seen one step later then, and
//! what the step in flight computes of that choice is dropped. The pages of the choice go back at
//! once: whatever uses them next is computed after that step.
//!
//! When a step fails, nothing of it counts, nor of the one that was enqueued after it: the
//! sequences are as before. Each choice is then computed alone, and one that fails again ends.

mod choice;
mod drafts;
mod flight;
mod part;
mod plan;
mod stats;
mod steps;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod traffic;

use std::{
    collections::{BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use flashinfer_rs::kv::{Batch, PageAllocator, PrefixCache, Sequence};

pub use self::{choice::Choice, drafts::DraftModel, stats::Stats};
use self::{
    drafts::{DraftedBy, StepTimes, Timed},
    flight::Flight,
    part::Part,
};
use crate::{
    Result,
    backend::{Logprobs, StepCapacity},
    request::{Bounds, Finish, Request, RequestId, SubmitError},
};

/// What bounds the steps, and every request.
#[derive(Clone, Debug)]
pub struct Limits {
    /// The most tokens that one step computes, so that longer prompts are read in
    /// parts. At least 1.
    pub step_tokens: usize,
    /// The most tokens of a step that reads prompts beside answers that go on, which wait for it: with
    /// fewer their tokens come more evenly, and prompts take longer. At least 1. Where answers are so
    /// many, prompts have as many tokens as they.
    pub chunk_tokens: usize,
    /// The most choices that run at a time. At least 1; no more than `step_tokens` do.
    pub max_running: usize,
    /// The most tokens of a prompt and its answer: the model's context.
    pub context: usize,
    /// The most tokens of a draft; 0 for no drafts.
    pub draft: usize,
    /// Tokens with which the model ends an answer.
    pub ends: BTreeSet<u32>,
}

impl Limits {
    /// The most tokens of prompts that a step reads beside so many answers that go on.
    pub fn prompt_tokens(&self, answers: usize) -> usize {
        match answers {
            0 => self.step_tokens,
            _ => self.chunk_tokens.saturating_sub(answers).max(answers),
        }
    }

    /// The largest step that there may be.
    pub fn step_capacity(&self) -> StepCapacity {
        let requests = self.max_running.min(self.step_tokens);
        let outputs = requests.saturating_mul(1 + self.draft).min(self.step_tokens);
        StepCapacity { tokens: self.step_tokens, requests, outputs }
    }
}

/// A token of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// The token.
    pub id: u32,
    /// As [`logprobs`](crate::sampling::SamplingParams::logprobs) asks.
    pub logprobs: Option<Logprobs>,
}

/// What came of a choice: a token, its end, or both.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// The request.
    pub request: RequestId,
    /// Which of its answers.
    pub choice: usize,
    /// The next token.
    pub token: Option<Token>,
    /// Why it ended, if it did.
    pub finish: Option<Finish>,
    /// See [`Usage::cached_tokens`](crate::request::Usage::cached_tokens).
    pub cached_tokens: usize,
    /// When the choice first ran; `None` if it only waited.
    pub started: Option<Instant>,
    /// With the first token of the first answer, as
    /// [`prompt_logprobs`](crate::sampling::SamplingParams::prompt_logprobs) asks.
    pub prompt_logprobs: Vec<Logprobs>,
}

/// What came of a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// What came of each choice, in the order of its tokens.
    pub updates: Vec<Update>,
    /// Why the step failed, if it did. The updates are of the choices alone then.
    pub failure: Option<String>,
}

/// Requests, those of their choices that run, and the order of the others.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    bounds: Bounds,
    pool: PageAllocator,
    prefixes: PrefixCache,
    /// In the order in which they came. So are those that run, and these all
    /// came before.
    waiting: VecDeque<Choice>,
    running: Vec<Choice>,
    /// The sequences of those that run.
    batch: Batch,
    /// The steps in flight, the oldest first: at most one between calls.
    in_flight: VecDeque<Flight>,
    drafted_by: DraftedBy,
    /// What steps take.
    times: StepTimes,
    /// What the time of the last step tells.
    timed: Option<Timed>,
    /// How many tokens should be right of the last drafts.
    expected: f64,
    /// Whether the next step is not enqueued because of drafts.
    waits: bool,
    stats: Stats,
}

impl Scheduler {
    /// No requests yet, to a model of so many tokens.
    pub fn new(pool: &PageAllocator, vocab_size: usize, limits: Limits) -> Self {
        let cache_tokens = pool.num_pages() * pool.page_size();
        let drafted_by = if limits.draft > 0 { DraftedBy::Ngrams } else { DraftedBy::Nothing };
        Self {
            bounds: Bounds { vocab_size, context: limits.context, cache_tokens },
            limits,
            pool: pool.clone(),
            prefixes: PrefixCache::new(pool),
            waiting: VecDeque::new(),
            running: Vec::new(),
            batch: Batch::new(pool),
            in_flight: VecDeque::new(),
            drafted_by,
            times: StepTimes::default(),
            timed: None,
            expected: 0.0,
            waits: false,
            stats: Stats::default(),
        }
    }

    /// Has a model make the drafts, in place of n-grams.
    #[must_use]
    pub fn with_draft_model(self, model: DraftModel) -> Self {
        Self { drafted_by: DraftedBy::Model(Box::new(model)), ..self }
    }

    /// What a request has to fit.
    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// Adds a request, which becomes the last one.
    ///
    /// # Errors
    /// It could never be answered: see [`Bounds::check`].
    pub fn submit(&mut self, id: RequestId, request: Request) -> Result<(), SubmitError> {
        self.bounds.check(&request)?;
        self.waiting.extend(Choice::of(id, request, &self.limits));
        Ok(())
    }

    /// Ends the choices of a request, or the one with this number, and says of each
    /// that it was cancelled. Those that have ended are as they are.
    ///
    /// # Errors
    /// A fault of this scheduler, which is of no use afterwards.
    pub fn cancel(&mut self, id: RequestId, choice: Option<usize>) -> Result<Vec<Update>> {
        let meant = |it: &Choice| it.request == id && choice.is_none_or(|index| it.index == index);
        let choices = self.running.iter_mut().chain(&mut self.waiting).filter(|choice| meant(choice));
        let updates = choices.map(|choice| choice.end(Finish::Cancelled)).collect();
        let before = self.waiting.len();
        self.waiting.retain(|choice| choice.finish().is_none());
        self.stats.ended += before - self.waiting.len();
        self.remove_ended()?;
        Ok(updates)
    }

    /// The choices that run, in the order in which they came.
    pub fn running(&self) -> &[Choice] {
        &self.running
    }

    /// The number of choices that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The pages of the choices that run, each once.
    pub fn held_pages(&self) -> usize {
        self.held(&[]).into_iter().filter(|held| *held).count()
    }

    /// For each page of the pool whether one of the choices that run has it, or one of
    /// these sequences.
    fn held(&self, further: &[Sequence]) -> Vec<bool> {
        let mut held = vec![false; self.pool.num_pages()];
        for &page in self.batch.sequences().iter().chain(further).flat_map(Sequence::pages) {
            held[page as usize] = true;
        }
        held
    }

    /// Whether all requests have ended, and nothing is in flight.
    pub fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty() && self.in_flight.is_empty()
    }

    /// Says how long the last step took, so that there are drafts only where tokens come faster
    /// by them. Nothing else depends on it. If it is never said, a draft is as long as its tokens are
    /// likely to be right.
    pub fn observe_time(&mut self, took: Duration) {
        if let Some(timed) = self.timed.take() {
            self.times.observe(timed, took);
        }
    }

    /// What was counted so far.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Takes the choices that ran and have ended out.
    pub(super) fn remove_ended(&mut self) -> Result<()> {
        for index in (0..self.running.len()).rev() {
            if self.running[index].finish().is_some() {
                self.batch.remove(index)?;
                self.running.remove(index);
                self.in_flight.iter_mut().for_each(|flight| flight.remove(index));
                self.stats.ended += 1;
            }
        }
        Ok(())
    }
}
