//! Index arrays: who owns which page of the KV cache, and where the sequences
//! of a packed batch lie.
//!
//! Index arrays decide which memory a kernel touches, and the host cannot look
//! at them again once they are on the device. So they are values of this
//! crate: checked on the host ([`PageIndices`] and [`AppendIndices`] against the
//! cache's size, [`RaggedIndices`] and [`SequenceIndices`] against the number of
//! rows, [`PositionIndices`] against the number of positions, masks against the batch), then uploaded ([`OnDevice`]) together with the host copy,
//! so that what `plan` reads on the host and what `run` reads on the device
//! cannot disagree.

mod bounded;
mod indices;
pub(crate) mod masks;
pub(crate) mod packed;
mod positions;
mod rows;
mod segments;
mod sequences;
mod upload;

pub use bounded::BoundedIndices;
pub use indices::{AppendIndices, PageIndices, RaggedIndices};
pub use masks::{ItemIndices, MaskIndices};
pub use packed::{BitOrder, PackedIndices};
pub use positions::PositionIndices;
pub use rows::RowIndices;
pub use segments::SegmentIndices;
pub use sequences::SequenceIndices;
pub use upload::{
    AppendTable, BoundedTable, IndexArrays, ItemTable, MaskTable, OnDevice, PackedTable, PageTable,
    PositionTable, RaggedTable, RowTable, SegmentTable, SequenceTable,
};
