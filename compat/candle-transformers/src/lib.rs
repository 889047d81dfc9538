//! Models of candle on FlashInfer's kernels.
//!
//! - `tests/models.rs`: candle-transformers' own models, by way of the patch of candle-flash-attn.
//! - [`gemma2`]: Gemma 2 over a paged cache, with its window and soft cap.
//!
//! An example, `examples/candle_llama.rs`, and a benchmark of
//! attention alone, `benches/attention.rs`, use nothing but the public interface
//! of candle-flash-attn: built with the original in its place, they measure that.

pub mod gemma2;
