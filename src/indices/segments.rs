//! Segments of packed rows, each with a weight of its own.

use super::table::{Array, Arrays, MAX_ARRAYS, OnDevice};
use crate::{
    capture::Facts,
    error::{FlashInferError, Result},
    stream::Stream,
};

/// How the rows of a packed batch fall into segments, and with which weight
/// each segment is multiplied: segment `i` is the `lens[i]` rows behind those
/// of the segments before it.
///
/// Segments may be empty. A table that a CUDA graph uses keeps its number of
/// segments; empty ones stand for those that a step does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentIndices {
    /// First rows, lengths and weights.
    pub(crate) starts: Vec<i32>,
    pub(crate) lens: Vec<i32>,
    pub(crate) weights: Vec<i32>,
    num_rows: i32,
}

impl SegmentIndices {
    /// Segments of these lengths (`seg_lens`), of which each has the weight of
    /// its own number.
    ///
    /// # Errors
    /// They have more than 2³¹ - 1 rows, or there are as many segments.
    ///
    /// ```
    /// # use flashinfer_rs::indices::SegmentIndices;
    /// let segments = SegmentIndices::from_lens([3, 0, 5])?;
    /// assert_eq!((segments.batch_size(), segments.num_rows(), segments.num_weights()), (3, 8, 3));
    /// // The first and the last segment share a weight, of two.
    /// let segments = segments.with_weight_indices(&[1, 0, 1])?;
    /// assert_eq!(segments.num_weights(), 2);
    /// # Ok::<(), flashinfer_rs::FlashInferError>(())
    /// ```
    pub fn from_lens(lens: impl IntoIterator<Item = usize>) -> Result<Self> {
        let mut segments = Self { starts: Vec::new(), lens: Vec::new(), weights: Vec::new(), num_rows: 0 };
        for len in lens {
            let end = i32::try_from(len).ok().and_then(|len| segments.num_rows.checked_add(len));
            let (Some(end), Ok(number)) = (end, i32::try_from(segments.lens.len())) else {
                return Err(FlashInferError::invalid(
                    "SegmentIndices",
                    "seg_lens",
                    format!("segment {} of {len} rows ends beyond 2^31 - 1", segments.lens.len()),
                ));
            };
            segments.starts.push(segments.num_rows);
            segments.lens.push(end - segments.num_rows);
            segments.weights.push(number);
            segments.num_rows = end;
        }
        Ok(segments)
    }

    /// The same segments, with these weights.
    ///
    /// # Errors
    /// There are more or fewer than segments, or one is above 2³¹ - 2.
    pub fn with_weight_indices(mut self, weight_indices: &[usize]) -> Result<Self> {
        let invalid = |problem| Err(FlashInferError::invalid("SegmentIndices", "weight_indices", problem));
        if weight_indices.len() != self.batch_size() {
            return invalid(format!(
                "{} of them; expected one for each of {} segments",
                weight_indices.len(),
                self.batch_size()
            ));
        }
        for (to, &index) in self.weights.iter_mut().zip(weight_indices) {
            match i32::try_from(index) {
                Ok(index) if index < i32::MAX => *to = index,
                _ => return invalid(format!("{index} is no weight's number")),
            }
        }
        Ok(self)
    }

    /// The number of segments.
    pub fn batch_size(&self) -> usize {
        self.lens.len()
    }

    /// The number of rows of all segments.
    pub fn num_rows(&self) -> usize {
        self.num_rows as usize
    }

    /// The number of weights that there must be: the largest index and one.
    pub fn num_weights(&self) -> usize {
        self.weights.iter().max().map_or(0, |&largest| largest as usize + 1)
    }

    /// The rows and the weight of each segment.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (std::ops::Range<usize>, usize)> {
        let numbers = self.starts.iter().zip(&self.lens).zip(&self.weights);
        numbers.map(|((&start, &len), &weight)| (start as usize..(start + len) as usize, weight as usize))
    }
}

impl Arrays for SegmentIndices {
    fn facts(&self) -> Facts {
        Facts::of([self.batch_size(), self.num_rows(), self.num_weights()])
    }
    const OP: &'static str = "SegmentTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        [Array::I32(&self.starts), Array::I32(&self.lens), Array::I32(&self.weights)]
    }
}

/// The segments of a packed batch on a device. See [`SegmentIndices`].
pub type SegmentTable = OnDevice<SegmentIndices>;

impl SegmentTable {
    /// Uploads segments, with room for up to `max_segments` in later updates.
    ///
    /// # Errors
    /// As [`new`](Self::new); also when there are more segments than that.
    pub fn with_capacity(stream: &Stream, host: SegmentIndices, max_segments: usize) -> Result<Self> {
        let room = (host.batch_size(), max_segments, "segments");
        Self::allocate_for(stream, host, room, [max_segments; MAX_ARRAYS])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_checked() {
        let segments = SegmentIndices::from_lens([2, 0, 3]).unwrap();
        assert_eq!((&segments.starts[..], &segments.lens[..]), (&[0, 2, 2][..], &[2, 0, 3][..]));
        assert_eq!(segments.iter().collect::<Vec<_>>(), [(0..2, 0), (2..2, 1), (2..5, 2)]);
        let none = SegmentIndices::from_lens([]).unwrap();
        assert_eq!((none.batch_size(), none.num_rows(), none.num_weights()), (0, 0, 0));
        let problem = |result: Result<SegmentIndices>| result.unwrap_err().to_string();
        for lens in [&[1 << 31][..], &[(1 << 31) - 1, 1], &[usize::MAX]] {
            assert!(problem(SegmentIndices::from_lens(lens.iter().copied())).contains("beyond 2^31"));
        }
        assert!(SegmentIndices::from_lens([(1 << 31) - 1]).is_ok());
        assert!(problem(segments.clone().with_weight_indices(&[0, 1])).contains("each of 3 segments"));
        for wrong in [(1 << 31) - 1, 1 << 31, usize::MAX] {
            assert!(problem(segments.clone().with_weight_indices(&[0, wrong, 1])).contains("no weight's"));
        }
        let segments = segments.with_weight_indices(&[7, 0, 7]).unwrap();
        assert_eq!(segments.num_weights(), 8);
    }
}
