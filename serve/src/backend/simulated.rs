//! A backend that computes no model: a stand-in for tests of everything above.
//!
//! It keeps tokens in place of keys and values. What it says of a row depends on every
//! token that the page table names, so that a page that is read by the wrong choice,
//! or before it is written, changes an answer. Its clock says what steps would have
//! taken.

use std::{thread, time::Duration};

use flashinfer_rs::kv::PageAllocator;

use super::{Backend, Sample, Step, StepCapacity, sampler};
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
}

/// Why a step fails, if it is to.
type Failure = Box<dyn FnMut(&Step<'_>) -> Option<String> + Send>;

/// See the [module](self).
pub struct Simulated {
    pool: PageAllocator,
    capacity: StepCapacity,
    language: Language,
    costs: Costs,
    in_real_time: bool,
    failure: Option<Failure>,
    /// The token of each slot of the pool.
    slots: Vec<u32>,
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
            failure: None,
            slots: vec![u32::MAX; pool.num_pages() * pool.page_size()],
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

    /// Has steps fail for which `failure` gives a reason.
    #[must_use]
    pub fn with_failure(mut self, failure: impl FnMut(&Step<'_>) -> Option<String> + Send + 'static) -> Self {
        self.failure = Some(Box::new(failure));
        self
    }

    /// What all steps took together.
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
        match step.tokens.len() == step.batch.queries().total() {
            true => Ok(()),
            false => Err("the tokens of a step are not those of its batch".into()),
        }
    }
}

impl Backend for Simulated {
    fn vocab_size(&self) -> usize {
        self.language.vocab_size
    }

    fn step(&mut self, step: &Step<'_>) -> Result<Vec<Sample>> {
        self.logits.clear();
        self.check(step)?;
        let took = self.costs.step + self.costs.token * step.tokens.len() as u32;
        self.clock += took;
        if self.in_real_time {
            thread::sleep(took);
        }
        if let Some(problem) = self.failure.as_mut().and_then(|failure| failure(step)) {
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
        for (&(&request, &position), &token) in rows.iter().zip(step.tokens) {
            slots[slot(request as usize, position as usize)] = token;
        }
        for output in step.outputs {
            let (&request, &position) = rows[output.row];
            let before = (0..=position as usize).map(|position| slots[slot(request as usize, position)]);
            self.logits.extend(self.language.logits(before));
        }
        self.rows += step.tokens.len();
        sampler::sample(step.outputs, &self.logits, self.language.vocab_size)
    }

    fn logits(&self) -> Result<Vec<f32>> {
        Ok(self.logits.clone())
    }
}
