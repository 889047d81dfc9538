//! Tokens per second, as llama-bench measures them: of a prompt that is read (`pp`), and of an
//! answer to a prompt of one token (`tg`).

use std::{fmt, time::Instant};

use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

use super::super::out::say;
use crate::{Llm, Result, SamplingParams, cli::answers::failure, request::Request};

/// What is measured, of so many tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Test {
    /// Reading a prompt.
    Prompt(usize),
    /// Generating an answer.
    Generate(usize),
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prompt(tokens) => write!(f, "pp{tokens}"),
            Self::Generate(tokens) => write!(f, "tg{tokens}"),
        }
    }
}

impl Test {
    /// Prints a row of a table, with a suffix of the test's name.
    ///
    /// # Errors
    /// The model's context has no room for so many tokens, or it computes no numbers.
    pub fn print(self, llm: &Llm, repetitions: usize, suffix: &str) -> Result<()> {
        self.rate(llm, 0)?;
        let before = llm.engine().status().stats;
        let rates = (1..=repetitions).map(|seed| self.rate(llm, seed)).collect::<Result<Vec<_>>>()?;
        let after = llm.engine().status().stats;
        let (mean, deviation) = mean_and_deviation(&rates);
        let (drafted, right) = (after.drafted - before.drafted, after.accepted - before.accepted);
        let share =
            if drafted > 0 { format!("{:.0} %", 1e2 * right as f64 / drafted as f64) } else { "".into() };
        say!("| {self}{suffix} | {mean:.2} | {deviation:.2} | {drafted} | {share} |");
        Ok(())
    }

    /// Tokens per second, once. Prompts are random, so that none is cached, and the same for the
    /// same seed, so that answers are.
    fn rate(self, llm: &Llm, seed: usize) -> Result<f64> {
        // The answer's first token belongs to the prompt.
        let (read, generated) = match self {
            Self::Prompt(tokens) => (tokens, 1),
            Self::Generate(tokens) => (1, tokens + 1),
        };
        let mut random = ChaCha8Rng::seed_from_u64((read as u64) << 32 | seed as u64);
        let vocab_size = llm.engine().bounds().vocab_size as u32;
        let prompt = (0..read).map(|_| random.random_range(0..vocab_size)).collect();
        let params =
            SamplingParams { max_tokens: Some(generated), ignore_eos: true, ..SamplingParams::default() };
        let start = Instant::now();
        let (mut first, mut tokens, mut end) = (None, 0, None);
        for event in llm.engine().submit(Request::new(prompt, params))? {
            first.get_or_insert_with(|| start.elapsed());
            tokens += event.tokens.len();
            end = event.end.or(end);
        }
        let (total, first) = (start.elapsed(), first.unwrap_or_default());
        if let Some(reason) = end.as_ref().and_then(|end| failure(&end.finish)) {
            return Err(reason.into());
        }
        if tokens != generated {
            return Err(format!("{self} ended after {tokens} of {generated} tokens").into());
        }
        Ok(match self {
            Self::Prompt(tokens) => tokens as f64 / first.as_secs_f64(),
            Self::Generate(tokens) => tokens as f64 / (total - first).as_secs_f64(),
        })
    }
}

/// The mean, and the standard deviation of a sample.
fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let freedom = values.len().saturating_sub(1).max(1);
    (mean, (squares / freedom as f64).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_have_deviations() {
        assert_eq!(mean_and_deviation(&[2.0, 4.0, 6.0]), (4.0, 2.0));
        assert_eq!(mean_and_deviation(&[5.0]), (5.0, 0.0));
        assert_eq!([Test::Prompt(512), Test::Generate(128)].map(|test| test.to_string()), ["pp512", "tg128"]);
    }
}
