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
//! When a step fails, nothing of it counts: the sequences are as before. Each
//! choice is then computed alone, and one that fails again ends.

mod choice;
mod part;
mod plan;
mod stats;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeSet, VecDeque},
    ops::Range,
    time::Instant,
};

use flashinfer_rs::kv::{Batch, PageAllocator, PrefixCache, Sequence};
use rayon::prelude::*;

use self::part::Part;
pub use self::{choice::Choice, stats::Stats};
use crate::{
    Result,
    backend::{Backend, Logprobs, Output, Sample, Step, StepCapacity},
    request::{Bounds, Finish, Request, RequestId, SubmitError},
};

/// What bounds the steps, and every request.
#[derive(Clone, Debug)]
pub struct Limits {
    /// The most tokens that one step computes, so that longer prompts are read in
    /// parts. At least 1.
    pub step_tokens: usize,
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
    stats: Stats,
}

impl Scheduler {
    /// No requests yet, to a model of so many tokens.
    pub fn new(pool: &PageAllocator, vocab_size: usize, limits: Limits) -> Self {
        let cache_tokens = pool.num_pages() * pool.page_size();
        Self {
            bounds: Bounds { vocab_size, context: limits.context, cache_tokens },
            limits,
            pool: pool.clone(),
            prefixes: PrefixCache::new(pool),
            waiting: VecDeque::new(),
            running: Vec::new(),
            batch: Batch::new(pool),
            stats: Stats::default(),
        }
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

    /// Whether all requests have ended.
    pub fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// What was counted so far.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Computes a step. Each choice whose last token was computed gets its next one,
    /// and those that follow as far as its draft was right. One for which the model
    /// computed NaN ends, and the others go on.
    ///
    /// # Errors
    /// A fault of this scheduler, which is of no use afterwards. What the backend
    /// fails at is in the report.
    pub fn step(&mut self, backend: &mut dyn Backend) -> Result<Report> {
        let mut report = Report::default();
        self.advance_grammars(&mut report)?;
        let parts = self.plan()?;
        if parts.is_empty() {
            return Ok(report);
        }
        self.stats.steps += 1;
        match self.compute(backend, &parts, 0..parts.len())? {
            Ok(samples) => self.take(&parts, samples, &mut report)?,
            Err(failure) => {
                self.stats.failed_steps += 1;
                report.failure = Some(failure);
                self.compute_alone(backend, &parts, &mut report)?;
            }
        }
        self.remove_ended()?;
        Ok(report)
    }

    /// Finds the tokens that constraints allow next, of all choices that run at once, and ends
    /// those for which there are none.
    fn advance_grammars(&mut self, report: &mut Report) -> Result<()> {
        if self.running.iter().any(Choice::is_constrained) {
            report.updates.par_extend(self.running.par_iter_mut().filter_map(Choice::advance_grammar));
            self.remove_ended()?;
        }
        Ok(())
    }

    /// Computes one token that is of no request: whether the backend computes anything.
    ///
    /// # Errors
    /// A fault of this scheduler. Inside is what the backend fails at, or that no page is
    /// free.
    pub fn probe(&mut self, backend: &mut dyn Backend) -> Result<Result<(), String>> {
        if !self.make_free(1) {
            return Ok(Err("no page is free to try whether anything can be computed".into()));
        }
        let mut batch = Batch::new(&self.pool);
        batch.push(Sequence::new(&self.pool))?;
        batch.append([1])?;
        let step = Step { batch: &batch, tokens: &[0], outputs: &[Output::greedy(0)] };
        Ok(backend.step(&step).map(drop).map_err(|error| error.to_string()))
    }

    /// Computes the parts of some of the choices that run. Of a step that the backend
    /// fails at, says why, and no sequence has changed.
    fn compute(
        &mut self,
        backend: &mut dyn Backend,
        parts: &[Part],
        of: Range<usize>,
    ) -> Result<Result<Vec<Sample>, String>> {
        let (mut tokens, mut outputs) = (Vec::new(), Vec::new());
        for index in of.clone() {
            let (choice, part) = (&self.running[index], &parts[index]);
            let computed = self.batch.sequences()[index].len();
            outputs.extend(choice.scores(tokens.len(), computed, part.scores.clone()));
            tokens.extend_from_slice(&choice.tokens()[computed..][..part.len]);
            if part.whole {
                outputs.extend(choice.outputs(tokens.len() - 1, &part.draft));
            }
            tokens.extend_from_slice(&part.draft);
        }
        let rows = |index: usize| if of.contains(&index) { parts[index].rows() } else { 0 };
        self.batch.append((0..parts.len()).map(rows))?;
        self.stats.pages = self.stats.pages.max(self.pool.used_pages());
        let samples = backend.step(&Step { batch: &self.batch, tokens: &tokens, outputs: &outputs });
        let failure = match samples {
            Ok(samples) if samples.len() == outputs.len() => return Ok(Ok(samples)),
            Ok(samples) => format!("the backend gave {} samples for {}", samples.len(), outputs.len()),
            Err(error) => error.to_string(),
        };
        for index in of.clone() {
            let before = self.batch.sequences()[index].len() - parts[index].rows();
            self.batch.truncate(index, before)?;
        }
        Ok(Err(failure))
    }

    /// After a step that failed: computes each part alone, and ends the choices for
    /// which that fails, too.
    fn compute_alone(
        &mut self,
        backend: &mut dyn Backend,
        parts: &[Part],
        report: &mut Report,
    ) -> Result<()> {
        for (index, part) in parts.iter().enumerate() {
            match self.compute(backend, parts, index..index + 1)? {
                Ok(samples) => self.finish(index, part, samples, report)?,
                Err(failure) => report.updates.push(self.running[index].end(Finish::Failed(failure))),
            }
        }
        Ok(())
    }

    /// Takes in the samples of all parts.
    fn take(&mut self, parts: &[Part], samples: Vec<Sample>, report: &mut Report) -> Result<()> {
        let mut samples = samples.into_iter();
        for (index, part) in parts.iter().enumerate() {
            let next = samples.by_ref().take(part.outputs()).collect();
            self.finish(index, part, next, report)?;
        }
        Ok(())
    }

    /// Takes in what the backend computed of a choice: the token after its last one
    /// and after each of the draft.
    fn finish(
        &mut self,
        index: usize,
        part: &Part,
        mut samples: Vec<Sample>,
        report: &mut Report,
    ) -> Result<()> {
        let (choice, sequence) = (&mut self.running[index], &self.batch.sequences()[index]);
        let computed = sequence.len() - part.draft.len();
        if part.reads {
            // Nobody is to read NaN.
            if samples.iter().all(|sample| sample.token.is_some()) {
                self.prefixes.insert(&choice.tokens()[..computed], sequence)?;
            }
            self.stats.read += part.len;
        } else {
            self.stats.decoded += part.len;
        }
        self.stats.decoded += part.draft.len();
        self.stats.drafted += part.draft.len();
        self.stats.recomputed += choice.reached.min(computed).saturating_sub(computed - part.len);
        let begins = choice.answer().is_empty();
        let next = samples.split_off(part.scores.len());
        let wrong = choice.score(samples);
        let samples = if wrong.is_some() { Vec::new() } else { next };
        report.updates.extend(wrong);
        let agrees = |(draft, sample): &(&u32, &Sample)| Some(**draft) == sample.token;
        let right = part.draft.iter().zip(&samples).take_while(agrees).count();
        for Sample { token, logprobs } in samples.into_iter().take(right + 1) {
            let Some(id) = token else {
                report.updates.push(choice.end(Finish::NoNumbers));
                break;
            };
            choice.push(id, &self.limits, self.bounds.cache_tokens);
            report.updates.push(choice.update(Some(Token { id, logprobs })));
            if choice.finish().is_some() {
                break;
            }
        }
        self.stats.begun += usize::from(begins && !choice.answer().is_empty());
        if part.whole {
            // The last token is not computed yet, unless none came; what was wrong goes.
            let len = choice.tokens().len() - usize::from(choice.finish() != Some(&Finish::NoNumbers));
            self.stats.accepted += len - computed;
            if len < sequence.len() {
                self.batch.truncate(index, len)?;
            }
            choice.reached = choice.reached.max(len);
        } else {
            choice.reached = choice.reached.max(computed);
        }
        Ok(())
    }

    /// Takes the choices that ran and have ended out.
    fn remove_ended(&mut self) -> Result<()> {
        for index in (0..self.running.len()).rev() {
            if self.running[index].finish().is_some() {
                self.batch.remove(index)?;
                self.running.remove(index);
                self.stats.ended += 1;
            }
        }
        Ok(())
    }
}
