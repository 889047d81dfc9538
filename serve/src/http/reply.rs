//! What replies of every kind have.

use std::sync::Arc;

use crate::text::Text;

/// What all that is sent of a request's answers has in common.
pub struct ReplyHead {
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    pub model: String,
    pub text: Arc<Text>,
    /// Whether log-probabilities are given.
    pub logprobs: bool,
    /// Whether ids of tokens are given.
    pub token_ids: bool,
}
