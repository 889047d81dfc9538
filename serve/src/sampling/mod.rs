//! How tokens are chosen: what a caller says of it, and what that makes of each row.

mod params;
mod sampler;
#[cfg(test)]
mod tests;

pub use params::{InvalidParameter, SamplingParams};
pub(crate) use sampler::Sampler;
