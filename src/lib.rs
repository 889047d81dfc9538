//! FlashInfer's prebuilt GPU kernels for Rust.

pub mod artifacts;
mod cuda;
#[cfg(feature = "cudarc")]
pub mod cudarc;
mod error;
pub mod ffi;
mod kv;
mod library_file;
mod module;
mod ops;
pub mod reference;
mod runtime;
mod stream;
mod tensor;

pub use error::{FlashInferError, Result};
pub use kv::{
    AppendIndices, AppendTable, IndexArrays, OnDevice, PageIndices, PageTable, RaggedIndices, RaggedTable,
};
pub use module::{Module, ModuleName};
pub use ops::{attention, cascade, norm, page, signatures};
pub use runtime::{FlashInferRuntime, LibrarySource, RuntimeConfig};
pub use stream::Stream;
pub use tensor::{DType, Device, Element, MAX_RANK, TensorMut, TensorRef};

/// The compile-fail examples of `docs/soundness.md`.
#[cfg(doctest)]
#[doc = include_str!("../docs/soundness.md")]
struct SoundnessExamples;
