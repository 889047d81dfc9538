//! Drafts: tokens that may come next, which a step computes together with the last one.
//!
//! A token of a draft is kept if it is the one that the model chooses at its place, with the
//! random number of that place. So an answer is the same with drafts and without, drawn or not.
//! Rejection sampling (`chain_speculative_sampling`) keeps as much of a greedy draft, and more of a drawn one,
//! but answers would be equal in distribution only, and depend on when there are drafts. A
//! [`DraftModel`] draws with the same random numbers instead, so that where both models agree on
//! probabilities, they agree on tokens.
//!
//! Drafts cost time: a step of more rows takes longer, the next one cannot be enqueued before it is
//! known what was right, and a model takes steps of its own. So
//!
//! - each answer has a draft of as many tokens as are likely to be right, by its last ones
//!   ([`Acceptance`]), down to none. What n-grams would have said is compared all the time, which
//!   costs nothing; a model is tried again once in a while;
//! - a step has drafts if that many right tokens are worth its time, as measured
//!   ([`StepTimes`]).
//!
//! Where a step has no drafts, the next one is enqueued ahead as ever.

mod acceptance;
mod model;
mod ngrams;
mod times;

use self::{acceptance::Acceptance, ngrams::Ngrams};
pub use self::{
    model::DraftModel,
    times::{Drafts, Right, StepTimes, Timed},
};
use super::{Choice, Part, Scheduler};
use crate::backend::Sample;

/// What makes drafts.
#[derive(Debug)]
pub enum DraftedBy {
    /// What followed the last tokens before.
    Ngrams,
    /// A smaller model of the same vocabulary.
    Model(Box<DraftModel>),
    /// None: nobody asked for drafts, or the model failed.
    Nothing,
}

impl DraftedBy {
    /// How many tokens of a choice can be drafted, up to `most`.
    fn len(&self, choice: &mut Choice, most: usize) -> usize {
        let most = match self {
            Self::Ngrams if choice.has_ngram() => most,
            Self::Model(model) => most.min(model.room(choice)),
            Self::Ngrams | Self::Nothing => 0,
        };
        choice.drafts.acceptance.len(most)
    }

    /// Takes in how many of the drafted tokens were right, and what the model chose in the first
    /// place.
    pub fn learn(&self, choice: &mut Choice, drafted: usize, right: usize, first: Option<&Sample>) {
        if choice.is_constrained() {
            return;
        }
        match (self, first.and_then(|sample| sample.token)) {
            (_, Some(_)) if drafted > 0 => choice.drafts.acceptance.observe(drafted, right),
            (Self::Ngrams, Some(next)) => choice.compare_ngram(next),
            (Self::Model(_), Some(_)) => choice.drafts.acceptance.drift(),
            (Self::Nothing, _) | (_, None) => {}
        }
    }
}

/// What is known of the drafts of one answer.
#[derive(Clone, Debug, Default)]
pub struct AnswerDrafts {
    acceptance: Acceptance,
    ngrams: Ngrams,
    /// What n-grams say comes after so many tokens.
    guess: Option<(usize, Option<u32>)>,
}

impl AnswerDrafts {
    /// At most `most` tokens that may follow these.
    pub fn ngrams(&mut self, tokens: &[u32], most: usize) -> Vec<u32> {
        self.ngrams.draft(tokens, most)
    }

    /// The first of them.
    pub fn guess(&mut self, tokens: &[u32]) -> Option<u32> {
        match self.guess {
            Some((len, guess)) if len == tokens.len() => guess,
            _ => {
                let guess = self.ngrams(tokens, 1).first().copied();
                self.guess = Some((tokens.len(), guess));
                guess
            }
        }
    }

    /// Takes in what follows these tokens, which were no draft.
    pub fn compare(&mut self, tokens: &[u32], next: u32) {
        if let Some(guess) = self.guess(tokens) {
            self.acceptance.observe(1, usize::from(guess == next));
        }
    }
}

impl Scheduler {
    /// How many tokens are drafted of each choice that runs, of those that may have drafts by
    /// their place; `None` if a step is better without.
    pub(super) fn draft_lens(&mut self, may: impl Fn(usize) -> bool) -> Option<Vec<usize>> {
        if matches!(self.drafted_by, DraftedBy::Nothing) {
            return None;
        }
        let context = self.limits.context.min(self.bounds.cache_tokens);
        let mut expected = 0.0;
        let mut lens = Vec::new();
        for (place, choice) in self.running.iter_mut().enumerate() {
            let room = (choice.room() - 1).min(context.saturating_sub(choice.tokens().len()));
            let most = if may(place) && !choice.is_constrained() { self.limits.draft.min(room) } else { 0 };
            let len = if most > 0 { self.drafted_by.len(choice, most) } else { 0 };
            expected += choice.drafts.acceptance.expected(len);
            lens.push(len);
        }
        let pays = expected > 0.0 && self.times.pays(lens.len(), expected);
        if pays {
            self.expected = expected;
        }
        pays.then_some(lens)
    }

    /// Has choices that get a next token guess more, within the tokens and the
    /// pages that are left.
    pub(super) fn add_drafts(&mut self, parts: &mut [Part], mut budget: usize, mut pages: usize) {
        if budget == 0 {
            return;
        }
        let Some(lens) = self.draft_lens(|place| parts[place].whole) else { return };
        let drafts = self.drafts(&lens);
        let page_size = self.pool.page_size();
        for ((part, draft), (choice, sequence)) in
            parts.iter_mut().zip(drafts).zip(self.running.iter().zip(self.batch.sequences()))
        {
            let (len, before) = (choice.tokens().len(), part.further_pages(sequence));
            let slots = len.next_multiple_of(page_size) - len + pages * page_size;
            part.draft = draft;
            part.draft.truncate(budget.min(slots));
            budget -= part.draft.len();
            pages -= part.further_pages(sequence) - before;
        }
    }

    /// Drafts of the choices that run, of at most so many tokens. A model that fails makes no
    /// more, and the answers go on without.
    fn drafts(&mut self, lens: &[usize]) -> Vec<Vec<u32>> {
        match &mut self.drafted_by {
            DraftedBy::Ngrams => {
                let choices = self.running.iter_mut().zip(lens);
                choices
                    .map(|(choice, &len)| if len > 0 { choice.ngram_draft(len) } else { Vec::new() })
                    .collect()
            }
            DraftedBy::Model(model) => match model.draft(&self.running, lens) {
                Ok(drafts) => drafts,
                Err(error) => {
                    tracing::warn!(%error, "the draft model failed; answers go on without drafts");
                    self.drafted_by = DraftedBy::Nothing;
                    Vec::new()
                }
            },
            DraftedBy::Nothing => Vec::new(),
        }
    }
}
