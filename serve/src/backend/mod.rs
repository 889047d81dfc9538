//! What a backend computes: one step of a batch, in which some requests read
//! their prompts and others decode.

pub mod cpu;
mod experts;
pub mod gpu;
pub mod graph;
mod matmul;

use flashinfer_rs::kv::Batch;

use crate::Result;

/// The new tokens of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// The sequences, to which the new tokens were appended, and their index
    /// arrays. A request may have any number of new tokens: one that decodes, a
    /// part of a prompt, a draft, or none.
    pub batch: &'a Batch,
    /// The new tokens, request after request: the rows of `batch.queries()`.
    pub tokens: &'a [u32],
    /// The rows whose logits are wanted, in ascending order.
    pub outputs: &'a [usize],
}

/// A model on a device, with the memory of the batch's pool.
pub trait Engine {
    /// Computes a step: keys and values go to the cache, and the logits of its
    /// outputs are kept until the next step.
    fn step(&mut self, step: &Step<'_>) -> Result<()>;

    /// The logits of the last step, `[outputs, vocab_size]`.
    fn logits(&self) -> Result<Vec<f32>>;

    /// The token of the largest logit after each output of the last step, the
    /// first of those that are equal; `None` where a logit is NaN.
    fn greedy(&self) -> Result<Vec<Option<u32>>>;
}
