//! FlashInfer's kernels for candle's tensors.

mod tensor;
