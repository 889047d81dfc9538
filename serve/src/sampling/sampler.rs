//! One answer's choice of tokens: its penalties and random numbers so far.

use std::{collections::BTreeMap, sync::Arc};

use flashinfer_rs::indices::LogitEdit;
use rand::{Rng, SeedableRng, rngs::ChaCha8Rng};

use toktrie::SimpleVob;

use super::SamplingParams;
use crate::backend::{LastEdit, Output};

/// What is known of a token whose logit may be edited.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    bias: f32,
    /// Whether it is in the prompt or the answer.
    anywhere: bool,
    /// How often it is in the answer.
    in_answer: u32,
}

impl Seen {
    /// The same once the token is in the answer once more.
    fn again(self) -> Self {
        Self { anywhere: true, in_answer: self.in_answer + 1, ..self }
    }
}

/// Makes the outputs of one answer.
#[derive(Clone, Debug)]
pub(crate) struct Sampler {
    params: Arc<SamplingParams>,
    seed: u64,
    choice: u64,
    /// Tokens with a bias, and those that penalties are for.
    seen: BTreeMap<u32, Seen>,
    /// Tokens that may not come before there are `min_tokens`.
    banned: Vec<u32>,
    /// Tokens of the answer.
    len: usize,
}

impl Sampler {
    /// The sampler of the answer with this number to a prompt. `ends` are the tokens
    /// that end it.
    pub fn new(
        params: &Arc<SamplingParams>,
        seed: u64,
        choice: usize,
        prompt: &[u32],
        ends: impl Iterator<Item = u32>,
    ) -> Self {
        let bias = |(&token, &bias): (&u32, &f32)| (token, Seen { bias, ..Seen::default() });
        let mut seen: BTreeMap<_, _> = params.logit_bias.iter().map(bias).collect();
        if params.repetition_penalty != 1.0 {
            prompt.iter().for_each(|&token| seen.entry(token).or_default().anywhere = true);
        }
        let banned = if params.min_tokens > 0 { ends.collect() } else { Vec::new() };
        Self { params: params.clone(), seed, choice: choice as u64, seen, banned, len: 0 }
    }

    /// Takes in the answer's next token.
    pub fn push(&mut self, token: u32) {
        self.len += 1;
        if self.has_penalties() {
            let seen = self.seen.entry(token).or_default();
            *seen = seen.again();
        }
    }

    /// Whether the choice of a token depends on those of the answer.
    pub fn has_penalties(&self) -> bool {
        let SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, .. } = *self.params;
        (repetition_penalty, presence_penalty, frequency_penalty) != (1.0, 0.0, 0.0)
    }

    /// How the token after the answer is chosen, from this row of logits: one that is allowed,
    /// if not all are.
    pub fn output(&self, row: usize, allowed: Option<Arc<SimpleVob>>) -> Output {
        self.output_at(self.len, row, allowed)
    }

    /// How the token after the next one is chosen, whatever that is: the row's own token.
    pub fn output_ahead(&self, row: usize) -> Output {
        let position = self.len + 1;
        let last_edit = self.has_penalties().then(|| self.last_edit(position));
        Output { last_edit, ..self.output_at(position, row, None) }
    }

    /// How the token at this position of the answer is chosen.
    fn output_at(&self, position: usize, row: usize, allowed: Option<Arc<SimpleVob>>) -> Output {
        let params = &*self.params;
        Output {
            row,
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
            uniform: match params.temperature {
                0.0 => 0.0,
                _ => uniform(self.seed, self.choice, position),
            },
            edits: self.edits(position, allowed.as_deref()),
            last_edit: None,
            logprobs: params.logprobs,
            allowed,
        }
    }

    /// The edits of the row for a position. Tokens that may not come yet do where no others are
    /// allowed.
    fn edits(&self, position: usize, allowed: Option<&SimpleVob>) -> Vec<LogitEdit> {
        let edits = self.seen.iter().map(|(&token, &seen)| self.edit(token, seen));
        let is_banned = |token: u32| self.banned.contains(&token);
        let only_banned = allowed.is_some_and(|allowed| allowed.iter().all(is_banned));
        if only_banned { edits.collect() } else { self.with_bans(position, edits) }
    }

    /// How the logit of the next token is edited for the position after it, whichever it is. Most
    /// tokens have the same edit then: those that were never in the answer, and have no bias.
    fn last_edit(&self, position: usize) -> LastEdit {
        let LogitEdit { repetition_penalty, bias, .. } = self.edit(0, Seen::default().again());
        let edits = self.seen.iter().map(|(&token, &seen)| self.edit(token, seen.again()));
        let others = edits.filter(|edit| edit.bias.to_bits() != bias.to_bits());
        LastEdit { repetition_penalty, bias, others: self.with_bans(position, others) }
    }

    /// The edit of a token.
    fn edit(&self, token: u32, seen: Seen) -> LogitEdit {
        let params = &*self.params;
        let times = seen.in_answer as f32;
        let penalty = params.presence_penalty * times.min(1.0) + params.frequency_penalty * times;
        let repetition_penalty = if seen.anywhere { params.repetition_penalty } else { 1.0 };
        LogitEdit { token, repetition_penalty, bias: seen.bias - penalty }
    }

    /// Edits in ascending order of tokens, and the bans of those that may not come at a position.
    fn with_bans(&self, position: usize, edits: impl Iterator<Item = LogitEdit>) -> Vec<LogitEdit> {
        if position >= self.params.min_tokens {
            return edits.collect();
        }
        let mut edits: BTreeMap<_, _> = edits.map(|edit| (edit.token, edit)).collect();
        for &token in &self.banned {
            edits.insert(token, LogitEdit::ban(token));
        }
        edits.into_values().collect()
    }
}

/// The random number in [0, 1) that decides at a position of an answer.
fn uniform(seed: u64, choice: u64, position: usize) -> f32 {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(choice);
    random.set_word_pos(position as u128);
    // As many bits as an `f32` below 1 has.
    (random.next_u32() >> 8) as f32 / (1 << 24) as f32
}
