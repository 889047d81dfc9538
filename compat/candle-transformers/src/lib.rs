//! Tests of candle-transformers' models on FlashInfer's kernels: `tests/models.rs`.
//! An example, `examples/candle_llama.rs`, and a benchmark of
//! attention alone, `benches/attention.rs`, use nothing but the public interface
//! of candle-flash-attn: built with the original in its place, they measure that.
