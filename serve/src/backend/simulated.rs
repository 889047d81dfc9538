//! A backend that computes no model: a stand-in for tests of everything above.
//!
//! It keeps tokens in place of keys and values. What it says of a row depends on every
//! token that the page table names, so that a page that is read by the wrong choice,
//! or before it is written, changes an answer. Its clock says what steps would have
//! taken.
//!
//! It is asynchronous, as a GPU is: what comes of a step, and that it failed, is known when it
//! is collected.

use std::{
    collections::VecDeque,
    thread,
    time::{Duration, Instant},
};

use flashinfer_rs::kv::PageAllocator;

use super::{Backend, Output, Sample, Step, StepCapacity, StepToken, sampler};
use crate::Result;

/// What follows some tokens, by numbers that look random.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Language {
    /// What follows is below this.
    pub vocab_size: usize,
    /// One in so many times the logits are NaN; 0 for never.
    pub nan: u64,
}

impl Language {
    /// The logits after some tokens, between 0 and 8.
    pub fn logits(self, tokens: impl IntoIterator<Item = u32>) -> Vec<f32> {
        let bits = tokens.into_iter().fold(0, |all, token| mix(all ^ u64::from(token)));
        if self.nan > 0 && mix(bits).is_multiple_of(self.nan) {
            return vec![f32::NAN; self.vocab_size];
        }
        let logit = |token| (mix(bits ^ mix(token)) >> 40) as f32 / (1 << 21) as f32;
        (0..self.vocab_size as u64).map(logit).collect()
    }
}

/// Numbers that look random (splitmix64).
pub fn mix(bits: u64) -> u64 {
    let bits = bits.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// What steps take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Costs {
    /// Each step, however small.
    pub step: Duration,
    /// Each of its tokens.
    pub token: Duration,
    /// What the host does while nothing is computed, where a step is enqueued after the one before
    /// it was collected.
    pub host: Duration,
}

/// Why a step of these tokens fails, if it is to.
type Failure = Box<dyn FnMut(&[u32]) -> Option<String> + Send>;

/// A step that was not collected.
struct InFlight {
    outcome: Result<Vec<Sample>>,
    logits: Vec<f32>,
    looks_at_logits: bool,
    /// What it takes.
    took: Duration,
    /// When it is computed, in real time.
    ends: Instant,
}

/// See the [module](self).
pub struct Simulated {
    pool: PageAllocator,
    capacity: StepCapacity,
    language: Language,
    costs: Costs,
    in_real_time: bool,
    asynchronous: bool,
    failure: Option<Failure>,
    /// The token of each slot of the pool.
    slots: Vec<u32>,
    /// In the order in which they are computed.
    in_flight: VecDeque<InFlight>,
    /// Those of the step that was collected last.
    logits: Vec<f32>,
    clock: Duration,
    rows: usize,
}

impl Simulated {
    /// The memory of a pool, and no tokens in it.
    pub fn new(pool: &PageAllocator, capacity: StepCapacity, language: Language) -> Self {
        Self {
            pool: pool.clone(),
            capacity,
            language,
            costs: Costs::default(),
            in_real_time: false,
            asynchronous: true,
            failure: None,
            slots: vec![u32::MAX; pool.num_pages() * pool.page_size()],
            in_flight: VecDeque::new(),
            logits: Vec::new(),
            clock: Duration::ZERO,
            rows: 0,
        }
    }

    /// Has steps take this on the clock.
    #[must_use]
    pub fn with_costs(mut self, costs: Costs) -> Self {
        self.costs = costs;
        self
    }

    /// Has steps take that time indeed, and not on the clock only.
    #[must_use]
    pub fn in_real_time(mut self) -> Self {
        self.in_real_time = true;
        self
    }

    /// Has each step be collected before the next.
    #[must_use]
    pub fn synchronous(mut self) -> Self {
        self.asynchronous = false;
        self
    }

    /// Has steps fail for whose tokens `failure` gives a reason.
    #[must_use]
    pub fn with_failure(mut self, failure: impl FnMut(&[u32]) -> Option<String> + Send + 'static) -> Self {
        self.failure = Some(Box::new(failure));
        self
    }

    /// What all steps that were collected took together.
    pub fn clock(&self) -> Duration {
        self.clock
    }

    /// The tokens of all steps.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// What is wrong about a step.
    fn check(&self, step: &Step<'_>) -> Result<()> {
        let StepCapacity { tokens, requests, outputs } = self.capacity;
        let computing = (0..step.batch.len()).filter(|&request| step.batch.queries().len(request) > 0);
        for (what, count, most) in [
            ("tokens", step.tokens.len(), tokens),
            ("requests", computing.count(), requests),
            ("outputs", step.outputs.len(), outputs),
        ] {
            if count > most {
                return Err(format!("a step of {count} {what}; the backend was made for {most}").into());
            }
        }
        let last = step.outputs.last().map(|output| output.row);
        let ascend = step.outputs.is_sorted_by(|a, b| a.row < b.row);
        if !ascend || last.is_some_and(|row| row >= step.tokens.len()) {
            return Err("the outputs of a step are no ascending rows of it".into());
        }
        if step.tokens.len() != step.batch.queries().total() {
            return Err("the tokens of a step are not those of its batch".into());
        }
        let before = self.in_flight.back();
        let logits = before.is_some_and(|before| before.looks_at_logits);
        if self.in_flight.len() >= if self.asynchronous && !logits { 2 } else { 1 } {
            return Err("a step was enqueued before the one before it was collected".into());
        }
        match step.tokens.iter().find(|token| self.token(**token).is_none()) {
            Some(token) => Err(format!("{token:?} is of no output of the step before").into()),
            None => Ok(()),
        }
    }

    /// A token of a step. After NaN, or a step that failed, it is the first one, and nothing that
    /// comes of it counts.
    fn token(&self, token: StepToken) -> Option<u32> {
        match token {
            StepToken::Known(token) => Some(token),
            StepToken::Chosen(output) => match &self.in_flight.back()?.outcome {
                Ok(samples) => Some(samples.get(output)?.token.unwrap_or(0)),
                Err(_) => Some(0),
            },
        }
    }

    /// What comes of the outputs of a step that has these tokens: their logits.
    fn compute(&mut self, step: &Step<'_>, tokens: &[u32]) -> Result<Vec<f32>> {
        if let Some(problem) = self.failure.as_mut().and_then(|failure| failure(tokens)) {
            return Err(problem.into());
        }
        let size = self.pool.page_size();
        let slots = &mut self.slots;
        self.pool.copy_pages(|from, to| slots.copy_within(from * size..(from + 1) * size, to * size))?;
        let pages = step.batch.pages();
        let slot =
            |request, position| pages.pages(request)[position / size] as usize * size + position % size;
        let append = step.batch.append_indices();
        let rows: Vec<_> = append.batch_indices().iter().zip(append.positions()).collect();
        for (&(&request, &position), &token) in rows.iter().zip(tokens) {
            slots[slot(request as usize, position as usize)] = token;
        }
        let mut logits = Vec::new();
        for output in step.outputs {
            let (&request, &position) = rows[output.row];
            let before = (0..=position as usize).map(|position| slots[slot(request as usize, position)]);
            logits.extend(self.language.logits(before));
        }
        self.rows += tokens.len();
        Ok(logits)
    }
}

impl Backend for Simulated {
    fn vocab_size(&self) -> usize {
        self.language.vocab_size
    }

    fn is_asynchronous(&self) -> bool {
        self.asynchronous
    }

    fn enqueue(&mut self, step: &Step<'_>) -> Result<()> {
        self.check(step)?;
        let tokens: Vec<_> = step.tokens.iter().filter_map(|&token| self.token(token)).collect();
        let host = if self.in_flight.is_empty() { self.costs.host } else { Duration::ZERO };
        let took = host + self.costs.step + self.costs.token * tokens.len() as u32;
        let begins =
            self.in_flight.back().map_or_else(Instant::now, |before| before.ends.max(Instant::now()));
        let (outcome, logits) = match self.compute(step, &tokens) {
            Ok(logits) => {
                let outputs = Output::after_tokens(step.outputs, &tokens)?;
                (sampler::sample(&outputs, &logits, self.language.vocab_size), logits)
            }
            Err(error) => (Err(error), Vec::new()),
        };
        let looks_at_logits = step.outputs.iter().any(Output::needs_logits);
        self.in_flight.push_back(InFlight { outcome, logits, looks_at_logits, took, ends: begins + took });
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<Sample>> {
        let InFlight { outcome, logits, took, ends, .. } =
            self.in_flight.pop_front().ok_or("no step is in flight")?;
        self.clock += took;
        if self.in_real_time {
            thread::sleep(ends.saturating_duration_since(Instant::now()));
        }
        self.logits = logits;
        outcome
    }

    fn logits(&self) -> Result<Vec<f32>> {
        Ok(self.logits.clone())
    }
}
