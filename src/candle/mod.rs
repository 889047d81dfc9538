//! FlashInfer's kernels for candle's tensors.
//!
//! Tensors on a CUDA device go to the kernels, on the device's own stream and
//! without waiting; tensors on the CPU to the [`reference`](mod@crate::reference).
//!
//! # Paged attention
//!
//! A [`PagedKvCache`] holds keys and values of many sequences, which
//! [`kv`](crate::kv) keeps: forks, prefixes that sequences share, truncation. In
//! each step [`BatchTables::update`] uploads the arrays of a
//! [`Batch`](crate::kv::Batch) once; [`BatchPrefill`] and [`BatchDecode`] plan it
//! once, and run it in each layer. Query heads may be a multiple of KV heads, which
//! are not repeated.
//!
//! | | `candle-nn` | here |
//! |---|---|---|
//! | keys and values | a tensor for each sequence, or padded to one length, and copied to grow | pages, of which one layer is one tensor, changed in place |
//! | several sequences | of one length, or masked | of any lengths, in one call |
//! | [`rms_norm`] | `ops::rms_norm` | the same signature |
//! | [`silu_and_mul`] | `silu` of one tensor, times another | one tensor with both, one kernel |
//! | [`rope`] | `rotary_emb::rope` and `rope_i`, for each of `q` and `k` | one kernel for both, each token at its own position |

// Without CUDA, what launches kernels is not called.
#![cfg_attr(not(feature = "candle-cuda"), allow(dead_code))]

mod attention;
pub mod flash_attn;
mod layers;
mod modules;
mod op;
mod paged;
mod rope;
mod tensor;

pub use attention::{BatchDecode, BatchPrefill, DecodePlan, PrefillPlan};
pub use flash_attn::{
    flash_attn, flash_attn_alibi, flash_attn_alibi_windowed, flash_attn_alibi_windowed_softcap,
    flash_attn_varlen, flash_attn_varlen_alibi, flash_attn_varlen_alibi_windowed,
    flash_attn_varlen_alibi_windowed_softcap, flash_attn_varlen_paged_windowed, flash_attn_varlen_windowed,
    flash_attn_windowed, release_workspaces,
};
pub use layers::{rms_norm, silu_and_mul};
pub use paged::{BatchTables, PagedKvCache, Step};
pub use rope::{PositionTable, Positions, RotaryEmbedding, rope};

/// The examples of `docs/candle.md` compile.
#[cfg(doctest)]
#[doc = include_str!("../../docs/candle.md")]
mod documented {}
