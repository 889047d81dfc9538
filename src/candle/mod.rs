//! FlashInfer's kernels for candle's tensors.

// Without CUDA, what launches kernels is not called.
#![cfg_attr(not(feature = "candle-cuda"), allow(dead_code))]

mod attention;
mod layers;
mod op;
mod paged;
mod rope;
mod tensor;

pub use attention::{BatchDecode, BatchPrefill, DecodePlan, PrefillPlan};
pub use layers::{rms_norm, silu_and_mul};
pub use paged::{BatchTables, PagedKvCache, Step};
pub use rope::{PositionTable, Positions, RotaryEmbedding, rope};
