//! Offsets of ragged rows.

use super::{
    check_indptr,
    table::{Array, Arrays, MAX_ARRAYS, OnDevice},
};
use crate::{
    capture::Facts,
    error::{FlashInferError, Result},
    stream::Stream,
    tensor::RawTensor,
};

/// Offsets that divide the rows of a ragged tensor among the requests of a
/// batch: request `i` has rows `indptr[i]..indptr[i + 1]`.
#[derive(Clone, Debug)]
pub struct RaggedIndices {
    pub(super) indptr: Vec<i32>,
}

impl RaggedIndices {
    /// Checks offsets.
    ///
    /// # Errors
    /// `indptr` is empty, does not start at 0, or decreases.
    ///
    /// ```
    /// # use flashinfer_rs::indices::RaggedIndices;
    /// let queries = RaggedIndices::new(vec![0, 5, 5, 6])?;
    /// assert_eq!([queries.len(0), queries.len(1), queries.len(2)], [5, 0, 1]);
    /// assert!(RaggedIndices::new(vec![0, 3, 2]).is_err());
    /// # Ok::<(), flashinfer_rs::FlashInferError>(())
    /// ```
    pub fn new(indptr: Vec<i32>) -> Result<Self> {
        let end = indptr.last().and_then(|&last| usize::try_from(last).ok()).unwrap_or_default();
        check_indptr("RaggedIndices", "indptr", &indptr, end)?;
        Ok(Self { indptr })
    }

    /// Offsets from each request's number of rows.
    ///
    /// # Errors
    /// There are 2³¹ rows or more.
    pub fn from_lens(lens: impl IntoIterator<Item = usize>) -> Result<Self> {
        let mut indptr = vec![0i32];
        let mut end = 0usize;
        for len in lens {
            end = end.saturating_add(len);
            let Ok(end) = i32::try_from(end) else {
                return Err(FlashInferError::invalid(
                    "RaggedIndices",
                    "lens",
                    format!("{end} rows; offsets are 32-bit, so at most {}", i32::MAX),
                ));
            };
            indptr.push(end);
        }
        Ok(Self { indptr })
    }

    /// Offsets of no requests.
    pub(crate) fn none() -> Self {
        Self { indptr: vec![0] }
    }

    /// As [`from_lens`](Self::from_lens), in place, for fewer than 2³¹ rows.
    pub(crate) fn refill(&mut self, lens: impl Iterator<Item = usize>) {
        self.indptr.truncate(1);
        let mut end = 0;
        self.indptr.extend(lens.map(|len| {
            end += len as i32;
            end
        }));
    }

    /// The number of requests.
    pub fn batch_size(&self) -> usize {
        self.indptr.len() - 1
    }

    /// The offsets.
    pub fn indptr(&self) -> &[i32] {
        &self.indptr
    }

    /// The number of rows of one request.
    ///
    /// # Panics
    /// If there is no such request.
    pub fn len(&self, request: usize) -> usize {
        (self.indptr[request + 1] - self.indptr[request]) as usize
    }

    /// The number of rows of all requests.
    pub fn total(&self) -> usize {
        self.indptr[self.indptr.len() - 1] as usize
    }
}

impl Arrays for RaggedIndices {
    fn facts(&self) -> Facts {
        Facts::of([self.batch_size(), self.total()])
    }
    const OP: &'static str = "RaggedTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        [Array::I32(&self.indptr), Array::EMPTY, Array::EMPTY]
    }
}

/// Offsets of ragged rows on a device. See [`RaggedIndices`].
pub type RaggedTable = OnDevice<RaggedIndices>;

impl RaggedTable {
    /// Uploads offsets, with room for up to `max_batch` requests in later
    /// updates.
    ///
    /// # Errors
    /// As [`new`](Self::new); also when there are more requests than that.
    pub fn with_capacity(stream: &Stream, host: RaggedIndices, max_batch: usize) -> Result<Self> {
        let room = (host.batch_size(), max_batch, "requests");
        Self::allocate_for(stream, host, room, [max_batch.saturating_add(1), 0, 0])
    }

    /// The offsets of the first `batch` requests, of which there are as many.
    pub(crate) fn first(&self, batch: usize) -> Result<RawTensor> {
        let indptr = self.indptr()?;
        let mut first = RawTensor::new(indptr.data, indptr.device, indptr.dtype, &[batch + 1], None)?;
        (first.stream, first.owner) = (indptr.stream, indptr.owner);
        Ok(first)
    }

    pub(crate) fn indptr(&self) -> Result<RawTensor> {
        self.array(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::indices::problem;

    #[test]
    fn ragged_offsets_are_checked() {
        let ragged = RaggedIndices::new(vec![0, 3, 3, 4]).unwrap();
        assert_eq!((ragged.batch_size(), ragged.total()), (3, 4));
        assert_eq!([ragged.len(0), ragged.len(1), ragged.len(2)], [3, 0, 1]);
        let from_lens = RaggedIndices::from_lens([3, 0, 1]).unwrap();
        assert_eq!(from_lens.indptr(), ragged.indptr());
        assert_eq!(RaggedIndices::new(vec![0]).unwrap().total(), 0);
        assert_eq!(RaggedIndices::from_lens([]).unwrap().batch_size(), 0);
        assert!(problem(RaggedIndices::new(vec![])).contains("empty"));
        assert!(problem(RaggedIndices::new(vec![1, 2])).contains("must start at 0"));
        assert!(problem(RaggedIndices::new(vec![-1, 2])).contains("must start at 0"));
        assert!(problem(RaggedIndices::new(vec![0, 2, 1])).contains("decreases"));
        assert!(problem(RaggedIndices::new(vec![0, -1])).contains("decreases"));
        assert!(problem(RaggedIndices::from_lens([1 << 30, 1 << 30])).contains("32-bit"));
        assert!(problem(RaggedIndices::from_lens([usize::MAX, 1])).contains("32-bit"));
    }
}
