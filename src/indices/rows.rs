//! Which part of each row of scores takes part in a selection.

use super::table::{Array, Arrays, MAX_ARRAYS, OnDevice};
use crate::{
    capture::Facts,
    error::{FlashInferError, Result},
    stream::Stream,
    tensor::RawTensor,
};

const OP: &str = "RowIndices";

/// The parts of the rows of a tensor of scores, and the request that each row
/// belongs to: row `i` has the elements
/// `row_starts[i]..row_starts[i] + lengths[i]`, and is of request
/// `row_to_batch[i]`.
///
/// Without `row_starts` each part starts at 0; without `row_to_batch` row `i`
/// is of request `i`. This is what [`topk`](crate::topk)'s transforms take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowIndices {
    lengths: Vec<i32>,
    row_starts: Option<Vec<i32>>,
    row_to_batch: Option<Vec<i32>>,
    end: usize,
    batch_size: usize,
}

impl RowIndices {
    /// Rows of these lengths, which may be 0.
    ///
    /// # Errors
    /// A length is 2³¹ - 1 or more.
    ///
    /// ```
    /// # use flashinfer_rs::indices::RowIndices;
    /// let rows = RowIndices::new([5, 0, 3])?.with_row_starts([0, 0, 4])?.with_row_to_batch([0, 0, 1])?;
    /// assert_eq!((rows.len(), rows.end(), rows.batch_size()), (3, 7, 2));
    /// # Ok::<(), flashinfer_rs::FlashInferError>(())
    /// ```
    pub fn new(lengths: impl IntoIterator<Item = usize>) -> Result<Self> {
        let lengths = in_32_bits("lengths", lengths)?;
        let end = lengths.iter().copied().max().unwrap_or_default() as usize;
        let batch_size = lengths.len();
        Ok(Self { lengths, row_starts: None, row_to_batch: None, end, batch_size })
    }

    /// The same, with each row's first element.
    ///
    /// # Errors
    /// There are not as many as rows, or a part ends at 2³¹ or later.
    pub fn with_row_starts(mut self, row_starts: impl IntoIterator<Item = usize>) -> Result<Self> {
        let row_starts = self.for_each_row("row_starts", row_starts)?;
        let ends =
            row_starts.iter().zip(&self.lengths).map(|(&start, &len)| i64::from(start) + i64::from(len));
        let end = ends.max().unwrap_or_default();
        if end > i64::from(i32::MAX) {
            return Err(FlashInferError::invalid(
                OP,
                "row_starts",
                format!("a part ends at {end}; the kernels count at most {} elements", i32::MAX),
            ));
        }
        (self.row_starts, self.end) = (Some(row_starts), end as usize);
        Ok(self)
    }

    /// The same, with each row's request.
    ///
    /// # Errors
    /// There are not as many as rows, or a number is 2³¹ - 1 or more.
    pub fn with_row_to_batch(mut self, row_to_batch: impl IntoIterator<Item = usize>) -> Result<Self> {
        let row_to_batch = self.for_each_row("row_to_batch", row_to_batch)?;
        self.batch_size = row_to_batch.iter().max().map_or(0, |&last| last as usize + 1);
        self.row_to_batch = Some(row_to_batch);
        Ok(self)
    }

    fn for_each_row(
        &self,
        argument: &'static str,
        numbers: impl IntoIterator<Item = usize>,
    ) -> Result<Vec<i32>> {
        let numbers = in_32_bits(argument, numbers)?;
        if numbers.len() != self.len() {
            return Err(FlashInferError::invalid(
                OP,
                argument,
                format!("{} entries for {} rows", numbers.len(), self.len()),
            ));
        }
        Ok(numbers)
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.lengths.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.lengths.is_empty()
    }

    /// The elements of each row.
    pub fn lengths(&self) -> &[i32] {
        &self.lengths
    }

    /// The first element of each row, if it is not 0 for all.
    pub fn row_starts(&self) -> Option<&[i32]> {
        self.row_starts.as_deref()
    }

    /// The request of each row, if it is not the row's number.
    pub fn row_to_batch(&self) -> Option<&[i32]> {
        self.row_to_batch.as_deref()
    }

    /// One past the last element of any row.
    pub fn end(&self) -> usize {
        self.end
    }

    /// One more than the largest number of a request.
    pub fn batch_size(&self) -> usize {
        self.batch_size
    }

    /// The elements and the request of a row.
    pub(crate) fn row(&self, row: usize) -> (std::ops::Range<usize>, usize) {
        let start = self.row_starts.as_ref().map_or(0, |starts| starts[row] as usize);
        let request = self.row_to_batch.as_ref().map_or(row, |requests| requests[row] as usize);
        (start..start + self.lengths[row] as usize, request)
    }
}

fn in_32_bits(argument: &'static str, numbers: impl IntoIterator<Item = usize>) -> Result<Vec<i32>> {
    let convert = |number: usize| {
        i32::try_from(number).ok().filter(|&number| number < i32::MAX).ok_or_else(|| {
            FlashInferError::invalid(OP, argument, format!("{number}; at most {} fits", i32::MAX - 1))
        })
    };
    numbers.into_iter().map(convert).collect()
}

impl Arrays for RowIndices {
    fn facts(&self) -> Facts {
        let given = usize::from(self.row_starts.is_some()) + 2 * usize::from(self.row_to_batch.is_some());
        Facts::of([self.len(), self.end, self.batch_size, given])
    }
    const OP: &'static str = "RowTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        let given = |array| Array::I32(<Option<&[i32]>>::unwrap_or_default(array));
        [Array::I32(&self.lengths), given(self.row_starts()), given(self.row_to_batch())]
    }
}

/// The parts of rows of scores on a device. See [`RowIndices`].
pub type RowTable = OnDevice<RowIndices>;

impl RowTable {
    /// Uploads the parts of rows, with room for up to `max_rows` in later
    /// updates; for `row_starts` and `row_to_batch` only if `host` has them.
    ///
    /// # Errors
    /// As [`new`](Self::new); also when there are more rows than that.
    pub fn with_capacity(stream: &Stream, host: RowIndices, max_rows: usize) -> Result<Self> {
        let room = |given: bool| if given { max_rows } else { 0 };
        let capacity = [max_rows, room(host.row_starts.is_some()), room(host.row_to_batch.is_some())];
        let have = (host.len(), max_rows, "rows");
        Self::allocate_for(stream, host, have, capacity)
    }

    /// Parts of rows whose device arrays exist already, for example because a
    /// kernel counts tokens; `row_starts` and `row_to_batch` are looked at if
    /// `host` has them.
    ///
    /// # Safety
    /// Whenever work that uses the table runs on `stream`, the device arrays
    /// must have as many entries as `host` has rows, and no part may end beyond
    /// [`host.end()`](RowIndices::end), start below 0 or have a length below 0,
    /// and no request may be below 0 or beyond
    /// [`host.batch_size()`](RowIndices::batch_size). They must stay allocated
    /// for as long as the table and that work live.
    pub unsafe fn from_device_unchecked(
        stream: &Stream,
        host: RowIndices,
        lengths: *const i32,
        row_starts: *const i32,
        row_to_batch: *const i32,
    ) -> Self {
        Self::borrowed(stream, host, [lengths.cast(), row_starts.cast(), row_to_batch.cast()])
    }

    pub(crate) fn lengths(&self) -> Result<RawTensor> {
        self.array(0)
    }

    pub(crate) fn row_starts(&self) -> Result<Option<RawTensor>> {
        self.host().row_starts.as_ref().map(|_| self.array(1)).transpose()
    }

    pub(crate) fn row_to_batch(&self) -> Result<Option<RawTensor>> {
        self.host().row_to_batch.as_ref().map(|_| self.array(2)).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_checked() {
        let rows = RowIndices::new([4, 0, 9]).unwrap();
        assert_eq!((rows.len(), rows.end(), rows.batch_size()), (3, 9, 3));
        assert_eq!(rows.row(2), (0..9, 2));
        let rows = rows.with_row_starts([8, 20, 0]).unwrap().with_row_to_batch([5, 0, 5]).unwrap();
        assert_eq!((rows.end(), rows.batch_size()), (20, 6));
        assert_eq!([rows.row(0), rows.row(1)], [(8..12, 5), (20..20, 0)]);
        assert!(RowIndices::new([1 << 31]).unwrap_err().to_string().contains("lengths"));
        assert!(RowIndices::new([usize::MAX]).is_err());
        let problem = |result: Result<RowIndices>| result.unwrap_err().to_string();
        assert!(problem(rows.clone().with_row_starts([0; 2])).contains("2 entries for 3 rows"));
        assert!(problem(rows.clone().with_row_starts([(1 << 31) - 3, 0, 0])).contains("ends at"));
        assert!(problem(rows.clone().with_row_to_batch([0; 4])).contains("4 entries for 3 rows"));
        assert!(problem(rows.with_row_to_batch([(1 << 31) - 1, 0, 0])).contains("row_to_batch"));
        let none = RowIndices::new([]).unwrap();
        assert!(none.is_empty() && none.end() == 0 && none.batch_size() == 0);
    }
}
