//! The paged KV cache: who owns which page.
//!
//! Index arrays decide which memory a kernel touches, and the host cannot look
//! at them again once they are on the device. So they are values of this
//! crate: checked on the host against the cache's size ([`PageIndices`],
//! [`RaggedIndices`], [`AppendIndices`]), then uploaded ([`OnDevice`]) together
//! with the host copy, so that what `plan` reads on the host and what `run`
//! reads on the device cannot disagree.

mod indices;
mod upload;

pub use indices::{AppendIndices, PageIndices, RaggedIndices};
pub use upload::{AppendTable, IndexArrays, OnDevice, PageTable, RaggedTable};
