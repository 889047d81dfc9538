//! How long prompts take, alone and beside answers that go on.

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroUsize,
    time::Instant,
};

use flashinfer_rs::kv::PageAllocator;
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

use super::{
    super::out::say,
    source::Source,
    steps::{PAGE_SIZE, median},
    table,
};
use crate::{
    Result,
    backend::gpu::{Gpu, GpuOptions},
    model::{Config, shard::Rank},
    request::{Request, RequestId},
    sampling::SamplingParams,
    scheduler::{Limits, Scheduler},
};

/// How often a prompt is read, after once that does not count.
const REPETITIONS: usize = 3;
/// Answers that go on while prompts are read, and tokens before them.
const ANSWERS: usize = 32;
const CONTEXT: usize = 128;
/// Steps of the answers alone.
const STEPS_ALONE: usize = 200;
/// Dense products of 16 bits that an H200 computes in a second, in floating point operations.
const PEAK: f64 = 989.4e12;

/// What is measured of a model.
pub struct Prompts<'a> {
    /// The tokens of prompts: a row of each table for each.
    pub tokens: &'a [NonZeroUsize],
    /// The most tokens of a step.
    pub step_tokens: usize,
    /// The most of a step that reads beside answers.
    pub chunk_tokens: usize,
}

/// A scheduler, and what it computes on.
struct Served {
    scheduler: Scheduler,
    gpu: Gpu,
    vocab_size: u32,
    requests: u64,
}

impl Prompts<'_> {
    /// Prints the tables.
    ///
    /// # Errors
    /// There is no GPU that can be used, the model does not fit it, or its context has no room for a
    /// prompt.
    pub fn run(&self, source: Source, options: GpuOptions) -> Result<()> {
        let part = source.divide(Rank::ALONE)?;
        let config = part.config.clone();
        let longest = self.tokens.iter().max().map_or(1, |tokens| tokens.get());
        if self.step_tokens <= ANSWERS {
            let problem =
                format!("{} tokens of a step leave no room beside {ANSWERS} answers", self.step_tokens);
            return Err(problem.into());
        }
        let limits = Limits {
            step_tokens: self.step_tokens,
            chunk_tokens: self.chunk_tokens,
            max_running: ANSWERS + 1,
            context: config.context_length,
            draft: 0,
            ends: BTreeSet::new(),
        };
        // While a prompt is read, each step has a token of each answer.
        let steps = longest.div_ceil(limits.prompt_tokens(ANSWERS).min(self.step_tokens - ANSWERS));
        let room = ANSWERS * (CONTEXT + 2 * STEPS_ALONE + steps) + 2 * longest;
        let pool = PageAllocator::new(room.div_ceil(PAGE_SIZE), PAGE_SIZE)?;
        let options = GpuOptions { max_tokens: self.step_tokens, ..options };
        let gpu = part.load(&pool, options, None)?;
        say!("{}; steps of up to {} tokens", gpu.name()?, self.step_tokens);
        let scheduler = Scheduler::new(&pool, config.vocab_size, limits);
        let mut served = Served { scheduler, gpu, vocab_size: config.vocab_size as u32, requests: 0 };
        let peak = format!("of {:.0}", PEAK / 1e12);
        table::head(&["prompt", "first token ms", "tokens/s", "TFLOP/s", &peak])?;
        for tokens in self.tokens {
            let tokens = tokens.get();
            served.read(tokens)?;
            let times = (0..REPETITIONS).map(|_| served.read(tokens)).collect::<Result<_>>()?;
            let (time, operations) = (median(times), operations(&config, tokens));
            let (rate, flops) = (tokens as f64 / time, operations / time);
            let share = 1e2 * flops / PEAK;
            say!("| {tokens} | {:.2} | {rate:.0} | {:.0} | {share:.0} % |", time * 1e3, flops / 1e12);
        }
        say!("");
        say!(
            "{ANSWERS} answers go on while a prompt is read, in steps of up to {} tokens: milliseconds from a \
             token to the next",
            self.chunk_tokens
        );
        table::head(&[
            "prompt",
            "first token ms",
            "median",
            "99 of 100",
            "longest",
            "median alone",
            "99 of 100 alone",
        ])?;
        self.tokens.iter().try_for_each(|tokens| served.row_beside(tokens.get()))
    }
}

impl Served {
    /// Submits a prompt of random tokens, so that none is cached.
    fn submit(&mut self, prompt: usize, answer: usize) -> Result<RequestId> {
        let id = RequestId(self.requests);
        self.requests += 1;
        let mut random = ChaCha8Rng::seed_from_u64(id.0);
        let prompt = (0..prompt).map(|_| random.random_range(0..self.vocab_size)).collect();
        let params =
            SamplingParams { max_tokens: Some(answer), ignore_eos: true, ..SamplingParams::default() };
        self.scheduler.submit(id, Request::new(prompt, params))?;
        Ok(id)
    }

    /// Takes a step: the requests that have a further token.
    fn step(&mut self) -> Result<Vec<RequestId>> {
        let report = self.scheduler.step(&mut self.gpu)?;
        if let Some(failure) = report.failure {
            return Err(failure.into());
        }
        Ok(report
            .updates
            .iter()
            .filter(|update| update.token.is_some())
            .map(|update| update.request)
            .collect())
    }

    /// The seconds until the first token of an answer to a prompt of so many.
    fn read(&mut self, tokens: usize) -> Result<f64> {
        let start = Instant::now();
        let id = self.submit(tokens, 1)?;
        while !self.step()?.contains(&id) {}
        let time = start.elapsed().as_secs_f64();
        while !self.scheduler.is_done() {
            self.step()?;
        }
        Ok(time)
    }

    /// Prints how answers go on beside a prompt, and alone.
    fn row_beside(&mut self, tokens: usize) -> Result<()> {
        let answers = (0..ANSWERS).map(|_| self.submit(CONTEXT, usize::MAX)).collect::<Result<Vec<_>>>()?;
        let mut last: BTreeMap<_, Instant> = BTreeMap::new();
        while last.len() < answers.len() {
            for id in self.step()? {
                last.insert(id, Instant::now());
            }
        }
        let mut alone = Vec::new();
        for _ in 0..STEPS_ALONE {
            self.step_between(&mut last, &mut alone)?;
        }
        let (start, mut beside) = (Instant::now(), Vec::new());
        let prompt = self.submit(tokens, 1)?;
        while !self.step_between(&mut last, &mut beside)?.contains(&prompt) {}
        let first = start.elapsed().as_secs_f64() * 1e3;
        for id in answers {
            self.scheduler.cancel(id, None)?;
        }
        while !self.scheduler.is_done() {
            self.step()?;
        }
        let [alone, beside] = [alone, beside].map(|mut times: Vec<f64>| {
            times.sort_by(f64::total_cmp);
            let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
            [at(0.5), at(0.99), at(1.0)]
        });
        say!(
            "| {tokens} | {first:.1} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} |",
            beside[0],
            beside[1],
            beside[2],
            alone[0],
            alone[1]
        );
        Ok(())
    }

    /// Takes a step, and adds the milliseconds since the last token of each request that has another.
    fn step_between(
        &mut self,
        last: &mut BTreeMap<RequestId, Instant>,
        times: &mut Vec<f64>,
    ) -> Result<Vec<RequestId>> {
        let (ids, now) = (self.step()?, Instant::now());
        for id in &ids {
            if let Some(before) = last.insert(*id, now) {
                times.push((now - before).as_secs_f64() * 1e3);
            }
        }
        Ok(ids)
    }
}

/// Floating point operations that reading a prompt of so many tokens takes, of which the last has
/// logits.
fn operations(config: &Config, tokens: usize) -> f64 {
    let [qo, kv] = config.widths();
    let (hidden, tokens) = (config.hidden_size as f64, tokens as f64);
    let [qo, kv, inner] = [qo, kv, config.num_experts() * config.intermediate_size].map(|width| width as f64);
    let products = hidden * (2.0 * qo + 2.0 * kv + 3.0 * inner);
    // Each token attends to itself and those before.
    let attention = 2.0 * qo * (tokens + 1.0) / 2.0;
    let layers = config.num_layers() as f64 * tokens * (products + attention);
    2.0 * (layers + hidden * config.vocab_size as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::synthetic::Shape;

    #[test]
    fn operations_are_two_for_each_number_of_a_matrix() {
        let config = Shape::Llama8b.config().unwrap();
        // 6.98e9 numbers in layers, 0.525e9 in the head, and attention of one token.
        let one = operations(&config, 1);
        assert_eq!(one, 2.0 * (6_979_321_856.0 + 525_336_576.0 + 32.0 * 8192.0));
        // Attention to 4096 tokens, which those of 8192 have on average, is 15 % more.
        let many = operations(&config, 8192) / 8192.0;
        assert!((1.15..1.16).contains(&(many / (2.0 * 6_979_321_856.0))), "{many}");
    }
}
