//! An engine for language models on FlashInfer's kernels, and the program `flashinfer`.
//!
//! | module | its job |
//! |---|---|
//! | `cli` | the command line |
//! | `hub` | names of models to files |
//! | `scheduler`, `request`, `draft` | who computes what in a step, and when an answer ends |
//! | `backend` | what computes a step: the CPU, or an NVIDIA GPU |
//! | `model` | a GGUF file: configuration and weights |
//! | `text` | text to token ids and back, and templates of chats |

mod backend;
pub mod cli;
mod draft;
mod hub;
mod model;
mod request;
mod scheduler;
#[cfg(test)]
mod tests;
mod text;

/// What went wrong, in a sentence.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
/// A result with an [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
