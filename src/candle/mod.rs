//! FlashInfer's kernels for candle's tensors.

// Without CUDA, what launches kernels is not called.
#![cfg_attr(not(feature = "candle-cuda"), allow(dead_code))]

mod attention;
pub mod flash_attn;
mod layers;
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
