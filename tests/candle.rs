//! candle's tensors: attention by candle-flash-attn's functions, paged batches, and other operations.
#![cfg(feature = "candle")]

mod candle_common;

mod candle {
    mod flash_attn;
    mod ops;
    mod paged;
}
