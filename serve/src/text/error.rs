//! Why a chat cannot be given to a model.

/// What is wrong about a chat's template or its length.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChatError {
    /// The template does not take the chat, in its words, or something goes wrong in it.
    #[error("{0}")]
    Template(String),
    /// The template takes more memory or time than it may.
    #[error("{0}")]
    TakesTooMuch(String),
    /// The template could not be run, whatever it is.
    #[error("{0}")]
    NotRun(String),
    /// The chat has more bytes than a chat may have.
    #[error("the chat is too long; expected at most {most} bytes")]
    TooLong {
        /// The most bytes.
        most: usize,
    },
    /// The chat is more tokens than [`ChatOptions::max_tokens`](super::ChatOptions::max_tokens), found before
    /// they were counted.
    #[error("the chat is at least {fewest} tokens; expected at most {most}")]
    TooManyTokens {
        /// The fewest that it can be.
        fewest: usize,
        /// The most that it may be.
        most: usize,
    },
}
