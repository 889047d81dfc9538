//! For tests: requests to a scheduler, and all that came of them.

use std::collections::BTreeMap;

use flashinfer_rs::kv::PageAllocator;

use super::{DraftModel, Limits, Report, Scheduler, Token};
use crate::{
    Result,
    backend::{Backend, Logprobs, Sample, Step, simulated::mix},
    request::{Finish, Request, RequestId, SubmitError},
    sampling::SamplingParams,
};

/// What came of one answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    pub tokens: Vec<Token>,
    pub finish: Option<Finish>,
    pub cached_tokens: usize,
    pub prompt_logprobs: Vec<Logprobs>,
}

impl Answer {
    /// The ids of its tokens.
    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }
}

/// Requests, numbered as they come.
pub struct Requests {
    pub scheduler: Scheduler,
    pub answers: BTreeMap<(usize, usize), Answer>,
    next: usize,
}

impl Requests {
    pub fn new(pool: &PageAllocator, vocab_size: usize, limits: Limits) -> Self {
        Self { scheduler: Scheduler::new(pool, vocab_size, limits), answers: BTreeMap::new(), next: 0 }
    }

    /// Has a model make the drafts.
    pub fn with_draft_model(self, model: DraftModel) -> Self {
        Self { scheduler: self.scheduler.with_draft_model(model), ..self }
    }

    /// Adds a request, and gives its number.
    pub fn submit(&mut self, prompt: &[u32], params: &SamplingParams) -> Result<usize, SubmitError> {
        let request = Request::new(prompt.into(), params.clone());
        self.scheduler.submit(RequestId(self.next as u64), request)?;
        for choice in 0..params.n {
            self.answers.insert((self.next, choice), Answer::default());
        }
        self.next += 1;
        Ok(self.next - 1)
    }

    /// Ends the answers to a request.
    pub fn cancel(&mut self, request: usize, choice: Option<usize>) {
        let updates = self.scheduler.cancel(RequestId(request as u64), choice).unwrap();
        self.take(&Report { updates, failure: None });
    }

    /// Takes a step.
    pub fn step(&mut self, backend: &mut dyn Backend) -> Report {
        let report = self.scheduler.step(backend).unwrap();
        self.take(&report);
        report
    }

    /// Takes steps until all is answered.
    pub fn finish(&mut self, backend: &mut dyn Backend) {
        while !self.scheduler.is_done() {
            self.step(backend);
        }
    }

    /// The first answer to a request.
    pub fn answer(&self, request: usize) -> &Answer {
        &self.answers[&(request, 0)]
    }

    fn take(&mut self, report: &Report) {
        for update in &report.updates {
            let answer = self.answers.get_mut(&(update.request.0 as usize, update.choice)).unwrap();
            assert_eq!(answer.finish, None, "an update after the end: {update:?}");
            answer.tokens.extend(update.token.clone());
            answer.finish = update.finish.clone();
            answer.cached_tokens = update.cached_tokens;
            answer.prompt_logprobs.extend(update.prompt_logprobs.clone());
        }
    }
}

/// Parameters of a greedy answer of so many tokens.
pub fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { max_tokens: Some(max_tokens), ..SamplingParams::default() }
}

/// A backend that fails once in a while: when a step is enqueued, or when it is collected.
pub struct Faulty<B> {
    pub backend: B,
    /// One in so many calls fails; 0 for none.
    pub one_in: u64,
    pub calls: u64,
}

impl<B> Faulty<B> {
    fn fail(&mut self) -> Result<()> {
        self.calls += 1;
        match self.one_in > 0 && mix(self.calls).is_multiple_of(self.one_in) {
            true => Err("a fault".into()),
            false => Ok(()),
        }
    }
}

/// A backend that chooses another token than its model would once in a while.
pub struct Mistaken<B> {
    pub backend: B,
    /// One in so many tokens is another; 0 for none.
    pub one_in: u64,
    pub tokens: u64,
}

impl<B: Backend> Backend for Mistaken<B> {
    fn vocab_size(&self) -> usize {
        self.backend.vocab_size()
    }

    fn enqueue(&mut self, step: &Step<'_>) -> Result<()> {
        self.backend.enqueue(step)
    }

    fn collect(&mut self) -> Result<Vec<Sample>> {
        let mut samples = self.backend.collect()?;
        let vocab_size = self.vocab_size() as u32;
        for token in samples.iter_mut().filter_map(|sample| sample.token.as_mut()) {
            self.tokens += 1;
            if self.one_in > 0 && mix(self.tokens).is_multiple_of(self.one_in) {
                *token = (*token + 1) % vocab_size;
            }
        }
        Ok(samples)
    }

    fn logits(&self) -> Result<Vec<f32>> {
        self.backend.logits()
    }
}

impl<B: Backend> Backend for Faulty<B> {
    fn vocab_size(&self) -> usize {
        self.backend.vocab_size()
    }

    fn is_asynchronous(&self) -> bool {
        self.backend.is_asynchronous()
    }

    fn enqueue(&mut self, step: &Step<'_>) -> Result<()> {
        self.fail()?;
        self.backend.enqueue(step)
    }

    fn collect(&mut self) -> Result<Vec<Sample>> {
        let samples = self.backend.collect()?;
        self.fail()?;
        Ok(samples)
    }

    fn logits(&self) -> Result<Vec<f32>> {
        self.backend.logits()
    }
}
