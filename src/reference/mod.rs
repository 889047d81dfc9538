//! The same operations on the CPU, for host tensors.
//!
//! Each function here is the counterpart of one that launches a kernel: the
//! same tensors (on [`Device::Cpu`](crate::Device::Cpu)), the same options and
//! the same index values in the same order, without a stream. They compute in
//! `f64`, so that they serve as the oracle of tests; they are also the CPU path
//! of backends that have both.
//!
//! They are less strict where a kernel's demands come from how it is written:
//! any strides are fine, nothing needs to be aligned, head dimensions and
//! group sizes are free, and each tensor may also be `f32` or `f64`. Rows are
//! read when they are needed; no tensor is converted as a whole. [`strict`] makes
//! them refuse what the kernels refuse.
//!
//! ```
//! use flashinfer_rs::{TensorMut, TensorRef, norm::NormOptions, reference};
//! let (input, weight, mut out) = ([3.0f32, 4.0], [1.0f32, 2.0], [0.0f32; 2]);
//! reference::rmsnorm(
//!     &mut TensorMut::from_slice(&mut out, &[1, 2])?,
//!     &TensorRef::from_slice(&input, &[1, 2])?,
//!     &TensorRef::from_slice(&weight, &[2])?,
//!     &NormOptions::with_eps(0.0),
//! )?;
//! let rms = 12.5f32.sqrt();
//! assert!((out[0] - 3.0 / rms).abs() < 1e-6 && (out[1] - 8.0 / rms).abs() < 1e-6);
//! # Ok::<(), flashinfer_rs::FlashInferError>(())
//! ```

mod activation;
mod attention;
mod cascade;
mod gdn;
mod gemm;
mod host;
mod mla;
mod norm;
mod page;
mod quantization;
mod rope;
mod sampling;
mod strict;
#[cfg(test)]
mod testing;
mod topk;

pub use activation::{gelu_and_mul, gelu_tanh_and_mul, silu_and_mul};
pub use attention::{
    HostMask, batch_decode, batch_prefill_paged, batch_prefill_ragged, single_decode, single_prefill,
};
#[cfg(feature = "candle")]
pub(crate) use attention::{KeysAndValues, flash_attention};
pub use cascade::{merge_state, merge_state_in_place, merge_states};
pub use gdn::gdn_prefill;
pub use gemm::{bmm_fp8, segment_gemm};
pub use mla::batch_mla;
pub use norm::{
    fused_add_rmsnorm, fused_add_rmsnorm_quant, fused_dit_layernorm, fused_qk_rmsnorm_rope,
    gemma_fused_add_rmsnorm, gemma_rmsnorm, layernorm, rmsnorm, rmsnorm_quant,
};
pub use page::{append_paged_kv_cache, append_paged_mla_kv_cache};
pub use quantization::{packbits, segment_packbits};
pub use rope::{
    apply_llama31_rope, apply_llama31_rope_pos_ids, apply_rope, apply_rope_pos_ids,
    apply_rope_pos_ids_cos_sin_cache, rope_append_paged_kv_cache, rope_quantize,
    rope_quantize_append_paged_kv_cache,
};
pub use sampling::{
    ChainDraws, Filter, argmax, chain_speculative_sampling, edit_logits, filtered_probs, sample,
    sampling_from_logits, sampling_from_probs, softmax, top_k_mask_logits,
};
pub use strict::{Strict, strict};
pub use topk::{radix_topk, radix_topk_page_table_transform, radix_topk_ragged_transform};
