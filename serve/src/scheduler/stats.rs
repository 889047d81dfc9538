//! What a scheduler counts.

/// What was counted so far. Answers that are cancelled or fail count as far as they
/// came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Steps.
    pub steps: usize,
    /// Steps that failed, of which each answer was then computed alone.
    pub failed_steps: usize,
    /// Answers that have begun.
    pub begun: usize,
    /// Answers that have ended, in whatever way.
    pub ended: usize,
    /// Tokens that were computed to read prompts, and what an answer had before it gave
    /// its pages back.
    pub read: usize,
    /// Tokens that were computed otherwise: one for each that follows, and drafts.
    pub decoded: usize,
    /// Tokens that were computed for nothing: by the time, their answer had ended.
    pub surplus: usize,
    /// Tokens that were found in the prefix cache, or in another answer to the same
    /// prompt, and never computed for their answer.
    pub saved: usize,
    /// Tokens that were computed again.
    pub recomputed: usize,
    /// Times that an answer gave its pages back.
    pub preemptions: usize,
    /// Drafts.
    pub drafts: usize,
    /// Tokens of drafts.
    pub drafted: usize,
    /// Tokens of drafts that became part of an answer.
    pub accepted: usize,
    /// Pages in use at most, those of cached prefixes included.
    pub pages: usize,
}
