//! Positions of tokens as operations take them.

use crate::{
    dtype::DType,
    error::Result,
    indices::{AppendTable, BoundedTable},
    kv::BatchTables,
    ops::check::Check,
    tensor::{RawTensor, TensorRef},
};

/// The position of each token, on a device.
///
/// Kernels that look up cosines and sines read the row that a position names,
/// wherever that is. So operations must know that all positions are below the
/// number of rows, and the host cannot look at them on the device:
///
/// - a [`BoundedTable`] and an [`AppendTable`], also that of [`BatchTables`], were
///   checked on the host;
/// - for positions made on the device, [`from_device_unchecked`](Self::from_device_unchecked)
///   takes the caller's word;
/// - a plain tensor may hold anything, and serves operations that compute
///   cosines and sines themselves, for which no position is harmful.
///
/// ```
/// # use flashinfer_rs::{TensorRef, rope::Positions, indices::{AppendTable, BoundedTable}};
/// fn positions<'a>(table: &'a BoundedTable, append: &'a AppendTable, made: TensorRef<'a>) -> [Positions<'a>; 3] {
///     [table.into(), append.into(), made.into()]
/// }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Positions<'a>(PositionSource<'a>);

#[derive(Clone, Copy, Debug)]
enum PositionSource<'a> {
    Table(&'a BoundedTable),
    Append(&'a AppendTable),
    /// A tensor, and the number that its positions are below, if that is known.
    Tensor(TensorRef<'a>, Option<usize>),
}

impl<'a> From<&'a BoundedTable> for Positions<'a> {
    fn from(table: &'a BoundedTable) -> Self {
        Self(PositionSource::Table(table))
    }
}

/// The positions of appended tokens in their requests.
impl<'a> From<&'a AppendTable> for Positions<'a> {
    fn from(append: &'a AppendTable) -> Self {
        Self(PositionSource::Append(append))
    }
}

/// The positions of a batch's new tokens.
impl<'a> From<&'a BatchTables> for Positions<'a> {
    fn from(tables: &'a BatchTables) -> Self {
        (&tables.append).into()
    }
}

/// Positions that the host knows nothing of: contiguous, `i32` or `i64`.
impl<'a> From<TensorRef<'a>> for Positions<'a> {
    fn from(tensor: TensorRef<'a>) -> Self {
        Self(PositionSource::Tensor(tensor, None))
    }
}

impl<'a> Positions<'a> {
    /// Positions made on the device: contiguous, `i32` or `i64`.
    ///
    /// # Safety
    /// Whenever work that uses them runs, each must be in `0..num_positions`.
    pub unsafe fn from_device_unchecked(tensor: TensorRef<'a>, num_positions: usize) -> Self {
        Self(PositionSource::Tensor(tensor, Some(num_positions)))
    }

    /// The number that all positions are below, if it is known.
    pub fn num_positions(&self) -> Option<usize> {
        match self.0 {
            PositionSource::Table(table) => Some(table.host().bound()),
            PositionSource::Append(append) => Some(append.host().num_positions()),
            PositionSource::Tensor(_, num_positions) => num_positions,
        }
    }

    /// Later positions, too, have to be below this, if work that uses them is
    /// being captured.
    pub(super) fn limit(&self, below: usize) {
        if let PositionSource::Append(append) = self.0 {
            append.limit(below);
        }
    }

    /// The tensor of `len` positions of one of these dtypes.
    pub(super) fn checked(
        &self,
        check: &Check<'_>,
        argument: &'static str,
        dtypes: &[DType],
        len: i64,
    ) -> Result<RawTensor> {
        let raw = match self.0 {
            PositionSource::Table(table) => table.values(false)?,
            PositionSource::Append(append) => append.positions()?,
            PositionSource::Tensor(tensor, _) => tensor.raw,
        };
        check.plain(argument, &raw, dtypes, &[len], raw.dtype.size())?;
        Ok(raw)
    }
}
