//! Index arrays: what tells kernels where everything lies.
//!
//! Index arrays decide which memory a kernel touches, and the host cannot look
//! at them again once they are on the device. So they are values of this
//! crate, one file for each kind: checked on the host ([`PageIndices`] and
//! [`AppendIndices`] against the cache's size, [`RaggedIndices`] against the
//! number of rows, others against what they count), or right because a
//! [`Batch`](crate::kv::Batch) makes them; then uploaded ([`OnDevice`]) together with the
//! host copy, so that what `plan` reads on the host and what `run` reads on the
//! device cannot disagree.

mod append;
mod bounded;
mod items;
mod logit_edits;
mod masks;
mod packed;
mod pages;
mod ragged;
mod rows;
mod segments;
mod sequences;
mod table;

use crate::error::{FlashInferError, Result};

pub use append::{AppendIndices, AppendTable, HostSlotMapping, SlotMapping};
pub use bounded::{BoundedIndices, BoundedTable};
pub use items::{ItemIndices, ItemTable};
pub use logit_edits::{LogitEdit, LogitEditTable, LogitEdits};
pub use masks::{MaskIndices, MaskTable};
pub use packed::{BitOrder, PackedIndices, PackedTable};
pub use pages::{PageIndices, PageTable};
pub use ragged::{RaggedIndices, RaggedTable};
pub use rows::{RowIndices, RowTable};
pub use segments::{SegmentIndices, SegmentTable};
pub use sequences::{SequenceIndices, SequenceTable};
pub use table::{IndexArrays, OnDevice};
pub(crate) use {
    masks::check_shapes,
    packed::pack,
    pages::{RequestPages, check_cache_size, check_table_size},
};

/// `indptr` starts at 0, does not decrease and ends at `end`.
pub(crate) fn check_indptr(
    op: &'static str,
    argument: &'static str,
    indptr: &[i32],
    end: usize,
) -> Result<()> {
    let invalid = |problem: String| Err(FlashInferError::invalid(op, argument, problem));
    let (Some(&first), Some(&last)) = (indptr.first(), indptr.last()) else {
        return invalid("empty; it has one entry more than there are requests".into());
    };
    if first != 0 {
        return invalid(format!("starts at {first}; it must start at 0"));
    }
    if let Some(at) = indptr.windows(2).position(|pair| pair[0] > pair[1]) {
        return invalid(format!("decreases from {} to {} at entry {}", indptr[at], indptr[at + 1], at + 1));
    }
    if usize::try_from(last) != Ok(end) {
        return invalid(format!("ends at {last}, but there are {end} entries to delimit"));
    }
    Ok(())
}

/// What an error says.
#[cfg(test)]
fn problem<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.unwrap_err().to_string()
}
