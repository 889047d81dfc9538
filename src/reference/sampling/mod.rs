//! Sampling on the CPU.
//!
//! What a filter leaves of a row is computed exactly, and one number decides
//! the token. The numbers are those of the kernels: the same Philox, a sequence
//! for each row of the output. So without a filter, with `min_p`, and in chains
//! the tokens are those of the GPU, save where sums in `f32` fall on the other
//! side of a number. The kernels of the other filters draw repeatedly, and that
//! of logits draws a number for each token: they give other tokens of the same
//! distribution.

mod chain;
mod draw;
mod filter;
mod parameters;
mod philox;
mod renorm;
mod sample;
#[cfg(test)]
mod tests;

pub use chain::{ChainDraws, chain_speculative_sampling};
pub use draw::{argmax, sampling_from_logits, sampling_from_probs};
pub use filter::Filter;
pub use renorm::{filtered_probs, softmax, top_k_mask_logits};
pub use sample::{edit_logits, sample};

use crate::dtype::DType;

/// Element types of matrices beside the wide ones.
const DTYPES: [DType; 2] = [DType::F16, DType::BF16];
