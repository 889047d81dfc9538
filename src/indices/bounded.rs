//! Numbers below a bound.

use super::table::{Array, Arrays, MAX_ARRAYS, OnDevice};
use crate::{
    capture::Facts,
    error::{FlashInferError, Result},
    stream::Stream,
    tensor::RawTensor,
};

/// Numbers in `0..bound`: rows of a matrix, tokens of a vocabulary, or positions
/// in a sequence.
///
/// Kernels that look something up by them do not compare them with anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoundedIndices {
    bound: usize,
    narrow: Vec<i32>,
    wide: Vec<i64>,
}

impl BoundedIndices {
    /// Checks the numbers.
    ///
    /// # Errors
    /// A number is negative or not below `bound`.
    ///
    /// ```
    /// # use flashinfer_rs::indices::BoundedIndices;
    /// let rows = BoundedIndices::new(3, vec![2, 0, 0, 1])?;
    /// assert_eq!((rows.bound(), rows.values()), (3, &[2, 0, 0, 1][..]));
    /// assert!(BoundedIndices::new(3, vec![3]).is_err());
    /// # Ok::<(), flashinfer_rs::FlashInferError>(())
    /// ```
    pub fn new(bound: usize, values: Vec<i32>) -> Result<Self> {
        let outside = |&value: &i32| usize::try_from(value).map_or(true, |value| value >= bound);
        if let Some(at) = values.iter().position(outside) {
            return Err(FlashInferError::invalid(
                "BoundedIndices",
                "values",
                format!("entry {at} is {}, outside 0..{bound}", values[at]),
            ));
        }
        Ok(Self { bound, wide: values.iter().map(|&value| value.into()).collect(), narrow: values })
    }

    /// What all numbers are below.
    pub fn bound(&self) -> usize {
        self.bound
    }

    /// The numbers.
    pub fn values(&self) -> &[i32] {
        &self.narrow
    }
}

impl Arrays for BoundedIndices {
    fn facts(&self) -> Facts {
        Facts::of([self.narrow.len(), self.bound])
    }
    const OP: &'static str = "BoundedTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        [Array::I32(&self.narrow), Array::I64(&self.wide), Array::EMPTY]
    }
}

/// Numbers below a bound on a device. See [`BoundedIndices`].
pub type BoundedTable = OnDevice<BoundedIndices>;

impl BoundedTable {
    /// Uploads numbers, with room for up to `max_len` in later updates.
    ///
    /// # Errors
    /// As [`new`](Self::new); also when there are more numbers than that.
    pub fn with_capacity(stream: &Stream, host: BoundedIndices, max_len: usize) -> Result<Self> {
        let room = (host.values().len(), max_len, "numbers");
        Self::allocate_for(stream, host, room, [max_len, max_len, 0])
    }

    /// The numbers as `i32`, or as `i64`.
    pub(crate) fn values(&self, wide: bool) -> Result<RawTensor> {
        self.array(wide.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_checked() {
        let problem = |bound, values: &[i32]| {
            BoundedIndices::new(bound, values.to_vec()).map(drop).unwrap_err().to_string()
        };
        assert!(problem(4, &[0, 3, 4]).contains("entry 2 is 4, outside 0..4"));
        assert!(problem(4, &[-1]).contains("entry 0 is -1"));
        assert!(problem(0, &[0]).contains("outside 0..0"));
        let largest = BoundedIndices::new(usize::MAX, vec![i32::MAX]).unwrap();
        assert_eq!((largest.narrow, largest.wide), (vec![i32::MAX], vec![i64::from(i32::MAX)]));
        assert!(BoundedIndices::new(0, Vec::new()).is_ok());
    }
}
