//! What a caller says of how an answer is chosen, and when it ends.

use std::{collections::BTreeMap, fmt::Display};

/// The most answers to one request.
const MAX_N: usize = 128;
/// The most log-probabilities beside that of the chosen token.
const MAX_LOGPROBS: usize = 20;
/// The most tokens with a bias, stop strings, and stop ids.
const MAX_ENTRIES: usize = 1024;
/// The most bytes of all stop strings together.
const MAX_STOP_BYTES: usize = 16 << 10;
/// The lowest temperature that is not 0: with less, differences of logits overflow.
const MIN_TEMPERATURE: f32 = 1e-4;

/// How tokens are chosen, and when an answer ends.
///
/// The logits of a row are edited first: those of tokens of the prompt and of the
/// answer by [`repetition_penalty`](Self::repetition_penalty), then those of the
/// answer by the other penalties and those with a bias by that. They are divided by
/// the temperature, and their softmax is filtered by `min_p`, then `top_k`, then
/// `top_p`. What is left is drawn from.
///
/// The default takes the likeliest token, until the model ends its answer.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// What logits are divided by; 0 takes the largest one. At least 0.0001 else.
    pub temperature: f32,
    /// How many of the likeliest tokens may be drawn; 0 for all.
    pub top_k: u32,
    /// How much probability of the likeliest tokens may be drawn from: above 0, and 1
    /// for all.
    pub top_p: f32,
    /// The fraction of the largest probability that a token has to have: from 0, for
    /// all, to 1.
    pub min_p: f32,
    /// What random numbers begin with. The same seed gives the same answer, whatever
    /// else the engine computes, as far as logits are equal. `None` draws one.
    pub seed: Option<u64>,
    /// What the positive logit of a token that is in the prompt or the answer is
    /// divided by, and another multiplied by: above 0, and 1 for none.
    pub repetition_penalty: f32,
    /// What is subtracted from the logit of a token that is in the answer: from -2 to 2.
    pub presence_penalty: f32,
    /// What is subtracted from a token's logit for each time that it is in the answer:
    /// from -2 to 2.
    pub frequency_penalty: f32,
    /// What is added to logits, by token: from -100 to 100.
    pub logit_bias: BTreeMap<u32, f32>,
    /// How many of the likeliest tokens are given with their log-probabilities, up to
    /// 20, beside the chosen one; `None` for no log-probabilities.
    pub logprobs: Option<usize>,
    /// As [`logprobs`](Self::logprobs), of each token of the prompt but the first. No cached prefix
    /// is used then.
    pub prompt_logprobs: Option<usize>,
    /// Texts that end the answer, and are no part of it.
    pub stop: Vec<String>,
    /// Tokens that end the answer, and are no part of its text.
    pub stop_token_ids: Vec<u32>,
    /// The tokens that an answer has before anything may end it.
    pub min_tokens: usize,
    /// The most tokens of an answer, at least 1; `None` for as many as there is room for.
    pub max_tokens: Option<usize>,
    /// How many answers are made, from 1 to 128.
    pub n: usize,
    /// Whether the model's own end tokens do not end an answer.
    pub ignore_eos: bool,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: None,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            logprobs: None,
            prompt_logprobs: None,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            min_tokens: 0,
            max_tokens: None,
            n: 1,
            ignore_eos: false,
        }
    }
}

/// A parameter that cannot be what it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name} is {given}; expected {expected}")]
pub struct InvalidParameter {
    /// The field of [`SamplingParams`].
    pub name: &'static str,
    /// What it is.
    pub given: String,
    /// What it may be.
    pub expected: String,
}

impl SamplingParams {
    /// Checks the parameters for a model of so many tokens.
    ///
    /// # Errors
    /// The first that is out of its range.
    pub fn check(&self, vocab_size: usize) -> Result<(), InvalidParameter> {
        let fits = |fits: bool, name, given: &dyn Display, expected: &dyn Display| match fits {
            true => Ok(()),
            false => Err(InvalidParameter { name, given: given.to_string(), expected: expected.to_string() }),
        };
        let temperature = self.temperature;
        fits(
            temperature == 0.0 || (temperature.is_finite() && temperature >= MIN_TEMPERATURE),
            "temperature",
            &temperature,
            &format_args!("0, or a number of at least {MIN_TEMPERATURE}"),
        )?;
        fits(self.top_p > 0.0 && self.top_p <= 1.0, "top_p", &self.top_p, &"more than 0, and at most 1")?;
        fits((0.0..=1.0).contains(&self.min_p), "min_p", &self.min_p, &"a number from 0 to 1")?;
        let repetition = self.repetition_penalty;
        fits(repetition.is_normal() && repetition > 0.0, "repetition_penalty", &repetition, &"more than 0")?;
        for (name, penalty) in
            [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)]
        {
            fits((-2.0..=2.0).contains(&penalty), name, &penalty, &"a number from -2 to 2")?;
        }
        let token = |name, token: &u32| {
            let expected = format_args!("tokens below {vocab_size}, which the model knows");
            fits((*token as usize) < vocab_size, name, token, &expected)
        };
        for (id, bias) in &self.logit_bias {
            token("logit_bias", id)?;
            fits((-100.0..=100.0).contains(bias), "logit_bias", bias, &"numbers from -100 to 100")?;
        }
        self.stop_token_ids.iter().try_for_each(|id| token("stop_token_ids", id))?;
        for (name, len) in [
            ("logit_bias", self.logit_bias.len()),
            ("stop_token_ids", self.stop_token_ids.len()),
            ("stop", self.stop.len()),
        ] {
            let expected = format_args!("at most {MAX_ENTRIES}");
            fits(len <= MAX_ENTRIES, name, &format_args!("a list of {len}"), &expected)?;
        }
        fits(!self.stop.iter().any(String::is_empty), "stop", &"an empty string", &"strings of text")?;
        let bytes: usize = self.stop.iter().map(String::len).sum();
        let expected = format_args!("at most {MAX_STOP_BYTES}");
        fits(bytes <= MAX_STOP_BYTES, "stop", &format_args!("{bytes} bytes"), &expected)?;
        for (name, logprobs) in [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            let logprobs = logprobs.unwrap_or(0);
            fits(logprobs <= MAX_LOGPROBS, name, &logprobs, &format_args!("at most {MAX_LOGPROBS}"))?;
        }
        fits(self.max_tokens != Some(0), "max_tokens", &0, &"at least 1")?;
        let (min, max) = (self.min_tokens, self.max_tokens.unwrap_or(usize::MAX));
        fits(min <= max, "min_tokens", &min, &format_args!("at most max_tokens, which is {max}"))?;
        fits((1..=MAX_N).contains(&self.n), "n", &self.n, &format_args!("a number from 1 to {MAX_N}"))
    }
}
