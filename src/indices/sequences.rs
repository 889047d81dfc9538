//! Sequences packed one after the other.

use super::table::{Array, Arrays, MAX_ARRAYS, OnDevice};
use crate::{
    capture::Facts,
    error::{FlashInferError, Result},
    stream::Stream,
    tensor::RawTensor,
};

/// Where each sequence of a packed batch starts and ends: sequence `i` has the
/// tokens `cu_seqlens[i]..cu_seqlens[i + 1]`.
///
/// Every sequence has at least one token: the kernels that take this array
/// wait forever for the tokens of an empty one. Leave sequences without new
/// tokens out of the batch; nothing would change for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceIndices {
    cu_seqlens: Vec<i64>,
}

impl SequenceIndices {
    /// Checks the array: one entry more than there are sequences, 0 first, the
    /// number of tokens last.
    ///
    /// # Errors
    /// It is empty, does not start at 0, does not grow from entry to entry, or
    /// ends beyond 2³¹ - 1.
    ///
    /// ```
    /// # use flashinfer_rs::indices::SequenceIndices;
    /// let sequences = SequenceIndices::new(vec![0, 3, 67])?;
    /// assert_eq!((sequences.batch_size(), sequences.num_tokens()), (2, 67));
    /// assert_eq!(sequences, SequenceIndices::from_lens([3, 64])?);
    /// assert!(SequenceIndices::new(vec![0, 3, 3]).is_err());
    /// # Ok::<(), flashinfer_rs::FlashInferError>(())
    /// ```
    pub fn new(cu_seqlens: Vec<i64>) -> Result<Self> {
        let invalid =
            |problem: String| Err(FlashInferError::invalid("SequenceIndices", "cu_seqlens", problem));
        let (Some(&first), Some(&last)) = (cu_seqlens.first(), cu_seqlens.last()) else {
            return invalid("empty; it has one entry more than there are sequences".into());
        };
        if first != 0 {
            return invalid(format!("starts at {first}; it must start at 0"));
        }
        if let Some(at) = cu_seqlens.windows(2).position(|pair| pair[0] >= pair[1]) {
            let (start, end) = (cu_seqlens[at], cu_seqlens[at + 1]);
            return invalid(if start == end {
                format!("sequence {at} is empty; leave it out of the batch")
            } else {
                format!("decreases from {start} to {end} at entry {}", at + 1)
            });
        }
        if last > i64::from(i32::MAX) {
            return invalid(format!("ends at {last}; the kernels count at most {} tokens", i32::MAX));
        }
        Ok(Self { cu_seqlens })
    }

    /// Sequences of these lengths.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn from_lens(lens: impl IntoIterator<Item = usize>) -> Result<Self> {
        let mut cu_seqlens = vec![0i64];
        let mut end = 0i64;
        for len in lens {
            // A sum beyond i64 is refused by `new`, which sees no growth or too much.
            end = end.saturating_add(i64::try_from(len).unwrap_or(i64::MAX));
            cu_seqlens.push(end);
        }
        Self::new(cu_seqlens)
    }

    /// The number of sequences.
    pub fn batch_size(&self) -> usize {
        self.cu_seqlens.len() - 1
    }

    /// The number of tokens of all sequences.
    pub fn num_tokens(&self) -> usize {
        self.cu_seqlens[self.batch_size()] as usize
    }

    /// Where each sequence starts, and the number of tokens.
    pub fn cu_seqlens(&self) -> &[i64] {
        &self.cu_seqlens
    }

    /// The number of tokens of one sequence.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn seq_len(&self, sequence: usize) -> usize {
        (self.cu_seqlens[sequence + 1] - self.cu_seqlens[sequence]) as usize
    }
}

impl Arrays for SequenceIndices {
    fn facts(&self) -> Facts {
        Facts::of([self.batch_size(), self.num_tokens()])
    }
    const OP: &'static str = "SequenceTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        [Array::I64(self.cu_seqlens()), Array::EMPTY, Array::EMPTY]
    }
}

/// The sequences of a packed batch on a device. See [`SequenceIndices`].
pub type SequenceTable = OnDevice<SequenceIndices>;

impl SequenceTable {
    /// Uploads sequences, with room for up to `max_batch` in later updates.
    ///
    /// # Errors
    /// As [`new`](Self::new); also when there are more sequences than that.
    pub fn with_capacity(stream: &Stream, host: SequenceIndices, max_batch: usize) -> Result<Self> {
        let room = (host.batch_size(), max_batch, "sequences");
        Self::allocate_for(stream, host, room, [max_batch.saturating_add(1), 0, 0])
    }

    /// Sequences whose device array, `cu_seqlens`, exists already.
    ///
    /// # Safety
    /// Whenever work that uses the table runs on `stream`, the device array
    /// must hold exactly the values of `host`. It must stay allocated for as
    /// long as the table and that work live.
    pub unsafe fn from_device_unchecked(
        stream: &Stream,
        host: SequenceIndices,
        cu_seqlens: *const i64,
    ) -> Self {
        Self::borrowed(stream, host, [cu_seqlens.cast(), std::ptr::null(), std::ptr::null()])
    }

    pub(crate) fn cu_seqlens(&self) -> Result<RawTensor> {
        self.array(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_are_checked() {
        let sequences = SequenceIndices::from_lens([1, 64, 3]).unwrap();
        assert_eq!(sequences.cu_seqlens(), [0, 1, 65, 68]);
        assert_eq!((sequences.batch_size(), sequences.num_tokens(), sequences.seq_len(1)), (3, 68, 64));
        let none = SequenceIndices::from_lens([]).unwrap();
        assert_eq!((none.batch_size(), none.num_tokens()), (0, 0));
        let problem = |cu_seqlens: &[i64]| SequenceIndices::new(cu_seqlens.to_vec()).unwrap_err().to_string();
        assert!(problem(&[]).contains("empty"));
        assert!(problem(&[1, 2]).contains("must start at 0"));
        assert!(problem(&[0, 2, 1]).contains("decreases from 2 to 1 at entry 2"));
        assert!(problem(&[0, -1]).contains("decreases"));
        assert!(problem(&[0, 2, 2, 3]).contains("sequence 1 is empty"));
        assert!(problem(&[0, 1 << 31]).contains("ends at"));
        assert!(SequenceIndices::new(vec![0, (1 << 31) - 1]).is_ok());
        assert!(SequenceIndices::from_lens([usize::MAX, 1]).is_err());
        assert!(SequenceIndices::from_lens([usize::MAX]).is_err());
    }
}
