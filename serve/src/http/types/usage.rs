//! What an answer took.

use serde::Serialize;
use utoipa::ToSchema;

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Usage {
    /// Tokens of the prompts.
    pub prompt_tokens: usize,
    /// Tokens of all answers, with those that ended them.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
    pub prompt_tokens_details: PromptTokensDetails,
}

/// What is known of a prompt's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Those that the prefix cache had.
    pub cached_tokens: usize,
}

impl Usage {
    /// Counts an answer. Its prompt counts with the first of its answers.
    pub fn add(&mut self, usage: &crate::request::Usage, first: bool) {
        if first {
            self.prompt_tokens += usage.prompt_tokens;
            self.prompt_tokens_details.cached_tokens += usage.cached_tokens;
        }
        self.completion_tokens += usage.completion_tokens;
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}
