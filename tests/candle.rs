//! candle's tensors: attention by candle-flash-attn's functions, paged batches, and other operations.
#![cfg(feature = "candle")]

mod candle_common;

mod candle {
    mod captured;
    mod flash_attn;
    mod mla;
    mod ops;
    mod paged;
}
