//! Bodies of requests and answers, as OpenAI's API and vLLM have them.
//!
//! They are types of our own, so that each field that is accepted has an effect, and the OpenAPI
//! document says no more than what holds.

pub mod chat;
pub mod completions;
pub mod message;
pub mod models;
pub mod sampling;
pub mod tokenize;
pub mod unsupported;
pub mod usage;
pub mod values;
