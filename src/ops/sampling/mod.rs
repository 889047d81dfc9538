//! Sampling tokens from logits or probabilities, in FlashInfer's module
//! `sampling`.
//!
//! A matrix of logits or probabilities has a row for each request and a column
//! for each token of the vocabulary. The steps, all on the device:
//!
//! 1. [`softmax`] turns logits into probabilities, with a temperature.
//! 2. A filter keeps the likely tokens: the `k` largest ([`top_k_renorm_probs`],
//!    or on logits [`top_k_mask_logits`]), the fewest that together have
//!    probability `p` ([`top_p_renorm_probs`]).
//! 3. [`sampling_from_probs`] draws a token for each request;
//!    [`sampling_from_logits`] does so without a softmax, and [`argmax`] takes
//!    the largest logit.
//!
//! [`top_k_sampling_from_probs`], [`top_p_sampling_from_probs`],
//! [`min_p_sampling_from_probs`] and [`top_k_top_p_sampling_from_probs`] filter
//! and draw at once: they draw, look how many tokens are likelier, and draw
//! again among these until the token passes. Tokens of equal probability pass
//! or fall together, so a filter may keep more than `k` of them: a `top_k` of 1
//! draws any of those that are likeliest, of 0.4, 0.4 and 0.2 either of the first
//! two. The likeliest, and always the same, is [`argmax`]'s.
//! [`chain_speculative_sampling`] accepts or replaces the tokens of a draft.
//!
//! **For a batch of requests, each with its own parameters and seed, there is [`sample`]**: it does
//! all of this in one launch, and what a request draws does not depend on the others.
//! [`edit_logits`] applies penalties, biases and bans before it.
//!
//! - **Rows of probabilities sum to 1** and hold no NaN, infinity or negative
//!   number. With rows that do not, all functions end, and touch nothing else;
//!   but what is drawn from them means little: what is missing to 1 counts for
//!   the last token, NaN for zero. [`argmax`] tells which rows of logits hold NaN.
//! - **`valid`** is 0, and the token 0, where nothing could be drawn: no
//!   probability of the row is above zero (`min_p` takes some token of a row of
//!   zeros all the same). A `top_k` of 0, or a `top_p` of 0 or NaN, which only a
//!   tensor can hold, lets nothing pass: there is no token then, or a likely one.
//! - **Parameters** are one number for all requests, or one for each
//!   ([`Parameter`]). Numbers are checked. Tensors are not, because the host
//!   cannot see them; a `top_k` below 0 or beyond the vocabulary keeps
//!   everything (of an `i64`, kernels take the lower 32 bits).
//! - **Random numbers** are those of Philox, from a seed and an offset
//!   ([`Random`]): the same two give the same tokens, so move the offset on
//!   after each call ([`Philox::take`]), on the host or in device memory. They
//!   are **of a call, not of a request**: the kernels take one seed, and a row's
//!   numbers depend on its place, so a request gets other tokens in another
//!   batch. Where each request has a seed, take [`sample`].
//! - Vocabularies have up to 2²³ tokens, matrices less than 2³² elements.
//!
//! Source of the contract: `csrc/sampling.cu`, `csrc/renorm.cu`,
//! `include/flashinfer/{sampling,topk}.cuh` of FlashInfer 0.6.13. The kernels of
//! [`argmax`], [`edit_logits`], [`sample`] and [`top_p_renorm_probs`] are this crate's.
//!
//! ```no_run
//! # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use flashinfer_rs::{Stream, gpu::Tensor, sampling::*};
//! let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
//! let (batch, vocab) = (8, 32000);
//! let logits = Tensor::<f32>::zeros(&stream, &[batch, vocab])?;
//! let mut probs = Tensor::<f32>::zeros(&stream, &[batch, vocab])?;
//! let mut tokens = Tensor::<i32>::zeros(&stream, &[batch])?;
//! let mut valid = Tensor::<u8>::zeros(&stream, &[batch])?;
//!
//! // Once: scratch memory, and where random numbers start.
//! let mut workspace = SamplingWorkspace::new(&stream, batch, vocab)?;
//! let mut random = Philox::new(42, 0);
//!
//! // For each step:
//! softmax(&mut workspace, &mut probs.view_mut(), &logits.view(), &SoftmaxOptions::with_temperature(0.7))?;
//! top_p_sampling_from_probs(
//!     &stream,
//!     &mut Samples::new(tokens.view_mut(), valid.view_mut()),
//!     &probs.view(),
//!     Parameter::Value(0.9),
//!     &SamplingOptions::with_random(random.take(Draws::Filtered { rows: batch })),
//! )?;
//! # Ok(()) }
//! # #[cfg(not(feature = "cudarc"))] fn main() {}
//! ```

mod argmax;
mod chain;
mod draw;
mod edit_logits;
mod options;
mod renorm;
mod sample;
mod top_p;
mod workspace;

pub use argmax::argmax;
pub(crate) use chain::check_chain;
pub use chain::{ChainInput, ChainSamples, chain_speculative_sampling};
pub use draw::{
    FilterOrder, TopKTopP, min_p_sampling_from_probs, sampling_from_logits, sampling_from_probs,
    top_k_sampling_from_probs, top_k_top_p_sampling_from_logits, top_k_top_p_sampling_from_probs,
    top_p_sampling_from_probs,
};
pub use edit_logits::edit_logits;
pub use options::{Draws, Indices, Parameter, Philox, Random, Samples, SamplingOptions};
pub(crate) use options::{MIN_P, Rule, TEMPERATURE, TEMPERATURE_OR_0, TOP_P};
pub use renorm::{SoftmaxOptions, softmax, top_k_mask_logits, top_k_renorm_probs};
pub(crate) use renorm::{check_softmax, check_top_k};
pub(crate) use sample::check_sample;
pub use sample::{SampleOptions, sample};
pub(crate) use top_p::check_top_p_renorm_probs;
pub use top_p::top_p_renorm_probs;
pub use workspace::SamplingWorkspace;

use super::{FixedFunction, check::Check};
use crate::{
    dtype::DType,
    error::Result,
    ffi::{Kernel, Signature},
    module::ModuleName,
    tensor::RawTensor,
};

impl ModuleName {
    /// Softmax, sampling and renormalization.
    pub const SAMPLING: Self = Self::fixed("sampling");
}

pub(super) const SIGNATURES: &[(&str, &[Signature])] = &[
    ("sampling", renorm::Softmax::SIGNATURES),
    ("sampling", top_p::UPSTREAM),
    ("sampling", renorm::TopKRenorm::SIGNATURES),
    ("sampling", renorm::TOP_K_MASK),
    ("sampling", draw::FromLogits::SIGNATURES),
    ("sampling", draw::FromProbs::SIGNATURES),
    ("sampling", draw::TopP::SIGNATURES),
    ("sampling", draw::MIN_P),
    ("sampling", draw::TopK::SIGNATURES),
    ("sampling", draw::TopKTopPJoint::SIGNATURES),
    ("sampling", chain::Chain::SIGNATURES),
];

const fn function(declared: &'static [Signature]) -> FixedFunction {
    FixedFunction::of(ModuleName::SAMPLING, declared)
}

/// Element types of the radix kernels of top-k.
pub(crate) const KERNEL_DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// The longest row. From about twice as many on, the softmax of a few rows
/// would leave parts of its scratch memory unwritten and read them.
const MAX_VOCAB: i64 = 1 << 23;

/// Checks a matrix, or a stack of them, of a row for each request: contiguous,
/// aligned to the vectors in which rows are loaded, counted in 32 bits.
/// Returns the length of a row.
pub(crate) fn check_rows(
    check: &Check<'_>,
    argument: &'static str,
    tensor: &RawTensor,
    dtypes: &[DType],
    rank: usize,
) -> Result<i64> {
    check.tensor(argument, tensor, dtypes, &[rank])?;
    let (shape, size) = (tensor.shape(), tensor.dtype.size());
    let vocab = shape[rank - 1];
    if !(1..=MAX_VOCAB).contains(&vocab) || shape.iter().any(|&rows| rows > i64::from(i32::MAX)) {
        return check.fail(
            argument,
            format!(
                "its shape is {shape:?}; rows have at least 1 and at most {MAX_VOCAB} elements, and there are fewer than 2^31"
            ),
        );
    }
    check.contiguous(argument, tensor)?;
    check.offsets_in_32_bits(argument, tensor)?;
    check.aligned(
        argument,
        tensor,
        size << vocab.trailing_zeros().min((16 / size as u32).trailing_zeros()),
    )?;
    Ok(vocab)
}

/// Checks an output of [`check_rows`]' shape.
fn check_like(check: &Check<'_>, argument: &'static str, tensor: &RawTensor, like: &RawTensor) -> Result<()> {
    check_rows(check, argument, tensor, &[like.dtype], like.shape().len())?;
    check.shape(argument, tensor, like.shape())
}
