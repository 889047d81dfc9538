//! What a step computes of one choice.

use std::ops::Range;

use flashinfer_rs::kv::Sequence;

use super::Choice;

/// Tokens of a choice that a step computes.
#[derive(Debug)]
pub struct Part {
    /// Tokens of the choice that the cache has.
    pub from: usize,
    /// Tokens of the choice that follow these.
    pub len: usize,
    /// Whether they are all that the cache does not have.
    pub whole: bool,
    /// Whether they are of a prompt, or computed again.
    pub reads: bool,
    /// Rows of it after which the prompt goes on, and the log-probabilities of how are wanted.
    pub scores: Range<usize>,
    /// Tokens that may follow.
    pub draft: Vec<u32>,
}

impl Part {
    /// What comes next of a choice, at most `budget` tokens, and of them at most `outputs` rows
    /// of which something is wanted.
    pub fn next(choice: &Choice, sequence: &Sequence, budget: usize, outputs: usize) -> Self {
        let from = sequence.len();
        let rest = choice.tokens().len() - from;
        let unscored = choice.unscored();
        let begin = unscored.start.saturating_sub(from);
        let most = if unscored.is_empty() { rest } else { begin + outputs };
        let len = rest.min(budget).min(most);
        let scores = begin..unscored.end.saturating_sub(from).min(len);
        let reads = Self::reads(choice, sequence);
        Self { from, len, whole: len == rest, reads, scores, draft: Vec::new() }
    }

    /// Whether what comes next of a choice is of a prompt, or computed again.
    pub fn reads(choice: &Choice, sequence: &Sequence) -> bool {
        choice.tokens().len() - sequence.len() > 1 || choice.answer().is_empty()
    }

    /// The token that comes of a whole part.
    pub fn after(part: &Self) -> Self {
        let from = part.from + part.len;
        Self { from, len: 1, whole: true, reads: false, scores: 0..0, draft: Vec::new() }
    }

    /// Tokens to compute.
    pub fn rows(&self) -> usize {
        self.len + self.draft.len()
    }

    /// Rows of which something is wanted: those of the prompt, the last one, and the draft's.
    pub fn outputs(&self) -> usize {
        self.scores.len() + if self.whole { 1 + self.draft.len() } else { 0 }
    }

    /// Pages that a sequence takes from the pool for it, or one more: that of a last
    /// page which it shares and has to copy.
    pub fn further_pages(&self, sequence: &Sequence) -> usize {
        further_pages(sequence, self.rows())
    }
}

/// Pages that a sequence takes from the pool for further tokens, or one more.
pub fn further_pages(sequence: &Sequence, tokens: usize) -> usize {
    let (pool, pages) = (sequence.allocator(), sequence.pages());
    let shares = |page: &i32| pool.owners(*page) > 1;
    let partial = !sequence.len().is_multiple_of(pool.page_size());
    let copies = tokens > 0 && partial && pages.last().is_some_and(shares);
    (sequence.len() + tokens).div_ceil(pool.page_size()) - pages.len() + usize::from(copies)
}
