//! FlashInfer's kernels for candle's tensors.

pub mod flash_attn;
mod tensor;

#[cfg(feature = "candle-cuda")]
pub use flash_attn::release_workspaces;
pub use flash_attn::{
    flash_attn, flash_attn_alibi, flash_attn_alibi_windowed, flash_attn_alibi_windowed_softcap,
    flash_attn_varlen, flash_attn_varlen_alibi, flash_attn_varlen_alibi_windowed,
    flash_attn_varlen_alibi_windowed_softcap, flash_attn_varlen_paged_windowed, flash_attn_varlen_windowed,
    flash_attn_windowed,
};

/// The examples of `docs/candle.md` compile.
#[cfg(doctest)]
#[doc = include_str!("../../docs/candle.md")]
mod documented {}
