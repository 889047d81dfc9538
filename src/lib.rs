//! FlashInfer's prebuilt GPU kernels for Rust.
pub mod artifacts;
