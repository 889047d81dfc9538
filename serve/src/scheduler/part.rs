//! What a step computes of one choice.

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
    /// Tokens that may follow.
    pub draft: Vec<u32>,
}

impl Part {
    /// What comes next of a choice, at most `budget` tokens.
    pub fn next(choice: &Choice, sequence: &Sequence, budget: usize) -> Self {
        let rest = choice.tokens().len() - sequence.len();
        let len = rest.min(budget);
        let reads = rest > 1 || choice.answer().is_empty();
        Self { from: sequence.len(), len, whole: len == rest, reads, draft: Vec::new() }
    }

    /// The token that comes of a whole part.
    pub fn after(part: &Self) -> Self {
        Self { from: part.from + part.len, len: 1, whole: true, reads: false, draft: Vec::new() }
    }

    /// Tokens to compute.
    pub fn rows(&self) -> usize {
        self.len + self.draft.len()
    }

    /// Rows whose next token is wanted: the last one, and those of the draft.
    pub fn outputs(&self) -> usize {
        if self.whole { 1 + self.draft.len() } else { 0 }
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
