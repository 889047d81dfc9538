//! An engine for language models on FlashInfer's kernels, and the program `flashinfer`.
//!
//! | module | its job |
//! |---|---|
//! | `cli` | the command line |
//! | [`http`] | OpenAI's API over the engine |
//! | `hub` | names of models to files |
//! | [`Llm`] | a model that is loaded and answers |
//! | [`engine`] | the thread that answers requests, and what comes back of them |
//! | [`request`], [`sampling`] | what is asked, how tokens are chosen, and why an answer ends |
//! | [`constraint`] | what an answer has to be: JSON of a schema, and others |
//! | [`group`] | processes that compute one model together |
//! | [`scheduler`] | who computes what in a step, and drafts |
//! | [`backend`] | what computes a step: the CPU, an NVIDIA GPU, or a stand-in for tests |
//! | `exit` | the end of the process |
//! | `frame` | messages between processes |
//! | `shorten` | texts of others in messages |
//! | `model` | a GGUF file: configuration and weights |
//! | `text` | text to token ids and back, and templates of chats |

pub mod backend;
pub mod cli;
pub mod constraint;
pub mod engine;
mod exit;
mod frame;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
pub mod group;
pub mod http;
mod hub;
mod llm;
mod model;
pub mod request;
pub mod sampling;
pub mod scheduler;
mod shorten;
#[cfg(test)]
mod tests;
pub mod text;

pub use llm::{Completion, Llm, LlmOptions, complete};
pub use sampling::SamplingParams;

/// What went wrong, in a sentence.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
/// A result with an [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
