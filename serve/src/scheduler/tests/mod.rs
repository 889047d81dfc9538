//! Schedules on the simulated backend, on which a page that is read by the wrong
//! choice, or before it is written, changes an answer.

mod cancel;
mod day;
mod draft_models;
mod drafts;
mod failures;
mod flight;
mod forks;
mod random;
mod steps;

use flashinfer_rs::kv::PageAllocator;

use super::{
    testing::{Answer, Requests, greedy},
    *,
};
use crate::{
    backend::{
        sampler,
        simulated::{Language, Simulated, mix},
    },
    sampling::SamplingParams,
};

/// Tokens below this, always.
fn vocab(vocab_size: usize) -> Language {
    Language { vocab_size, nan: 0 }
}

fn limits(step_tokens: usize, draft: usize) -> Limits {
    Limits {
        step_tokens,
        chunk_tokens: step_tokens,
        max_running: usize::MAX,
        context: 1000,
        draft,
        ends: [].into(),
    }
}

/// Tokens below 1000 that differ from those of another seed.
fn tokens(seed: u64, len: usize) -> Vec<u32> {
    (0..len as u64).map(|at| mix(seed << 32 | at) as u32 % 1000).collect()
}

/// A pool, requests to it, and a backend of tokens below 1000.
fn setup(num_pages: usize, page_size: usize, limits: Limits) -> (PageAllocator, Requests, Simulated) {
    speaking(num_pages, page_size, limits, vocab(1000))
}

/// As [`setup`], with a backend that speaks so.
fn speaking(
    num_pages: usize,
    page_size: usize,
    limits: Limits,
    language: Language,
) -> (PageAllocator, Requests, Simulated) {
    let pool = PageAllocator::new(num_pages, page_size).unwrap();
    let backend = Simulated::new(&pool, limits.step_capacity(), language);
    let requests = Requests::new(&pool, language.vocab_size, limits);
    (pool, requests, backend)
}

/// What a request is answered: no pages, no other requests.
fn solo(
    prompt: &[u32],
    params: &SamplingParams,
    limits: &Limits,
    cache: usize,
    language: Language,
) -> Vec<Answer> {
    let request = Request::new(prompt.into(), params.clone());
    let choices = Choice::of(RequestId(0), request, limits);
    let answers = choices.map(|mut choice| {
        let mut answer = Answer::default();
        for at in choice.unscored() {
            let logits = language.logits(prompt[..=at].iter().copied());
            let count = params.prompt_logprobs.unwrap_or(0);
            answer.prompt_logprobs.push(sampler::logprobs(&logits, prompt[at + 1], count));
        }
        while choice.finish().is_none() {
            let logits = language.logits(choice.tokens().iter().copied());
            let sample = sampler::sample(&choice.outputs(0, &[]), &logits, language.vocab_size).unwrap();
            match sample[0].token {
                Some(id) => {
                    choice.push(id, limits, cache);
                    answer.tokens.push(Token { id, logprobs: sample[0].logprobs.clone() });
                }
                None => drop(choice.end(Finish::NoNumbers)),
            }
        }
        answer.finish = choice.finish().cloned();
        answer
    });
    answers.collect()
}

/// Answers without what depends on other requests.
fn compare(got: &Answer, want: &Answer, what: &str) {
    assert_eq!((&got.tokens, &got.finish), (&want.tokens, &want.finish), "{what}");
    assert_eq!(got.prompt_logprobs, want.prompt_logprobs, "{what}");
}
