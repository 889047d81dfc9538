//! Scratch memory of the operations that need some.

use super::MAX_VOCAB;
use crate::{
    cuda::DeviceBuffer,
    error::{FlashInferError, Result},
    ops::check::Check,
    runtime::FlashInferRuntime,
    stream::Stream,
    topk::RowStates,
};

/// Scratch memory of [`softmax`](super::softmax) and of top-k, on one stream.
///
/// Top-k has [`RowStates`], through which blocks wait for each other. So an
/// operation borrows the workspace mutably and goes to its stream. A CUDA graph that was
/// captured with a workspace must not run at the same time as anything else
/// with this workspace, and not after it is dropped.
pub struct SamplingWorkspace {
    scratch: DeviceBuffer,
    pub(super) row_states: RowStates,
    max_batch: usize,
    max_vocab: usize,
}

impl SamplingWorkspace {
    /// Memory for matrices of up to `max_batch` rows of `max_vocab` tokens: 8
    /// bytes for each 8192 tokens of up to 128 rows, and [`RowStates`] for
    /// top-k.
    ///
    /// # Errors
    /// `max_vocab` is above 2²³; [`FlashInferError::Cuda`]: out of memory, no
    /// device, no driver; the runtime cannot be started; the stream is being
    /// captured.
    pub fn new(stream: &Stream, max_batch: usize, max_vocab: usize) -> Result<Self> {
        stream.check_usable_here("SamplingWorkspace")?;
        if max_vocab as u64 > MAX_VOCAB as u64 {
            let problem = format!("{max_vocab}; at most {MAX_VOCAB}");
            return Err(FlashInferError::invalid("SamplingWorkspace", "max_vocab", problem));
        }
        let row_states = RowStates::new(stream)?;
        let bytes = softmax_bytes(max_batch, max_vocab);
        let scratch = DeviceBuffer::new(FlashInferRuntime::get()?.cuda(), stream, bytes)?;
        Ok(Self { scratch, row_states, max_batch, max_vocab })
    }

    /// The stream that the workspace belongs to.
    pub fn stream(&self) -> &Stream {
        self.scratch.stream()
    }

    /// The parts, of which the stream belongs to the first.
    pub(super) fn parts(&mut self) -> (&DeviceBuffer, &mut RowStates, [usize; 2]) {
        (&self.scratch, &mut self.row_states, [self.max_batch, self.max_vocab])
    }
}

impl std::fmt::Debug for SamplingWorkspace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SamplingWorkspace({} rows of {}, {:?})", self.max_batch, self.max_vocab, self.stream())
    }
}

/// A matrix is no larger than what the scratch memory was made for.
pub(super) fn check_room(check: &Check<'_>, room: [usize; 2], [rows, vocab]: [i64; 2]) -> Result<()> {
    let [max_batch, max_vocab] = room.map(|size| size as u64);
    if rows as u64 <= max_batch && vocab as u64 <= max_vocab {
        return Ok(());
    }
    check.fail(
        "workspace",
        format!(
            "it is for {max_batch} rows of {max_vocab}, given are {rows} of {vocab}; make another by \
             sampling::SamplingWorkspace::new(&stream, {}, {})",
            max_batch.max(rows as u64),
            max_vocab.max(vocab as u64)
        ),
    )
}

/// A maximum and a sum for each part of a row, where few rows are divided.
fn softmax_bytes(batch: usize, vocab: usize) -> usize {
    batch.min(128) * vocab.div_ceil(8192) * 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_the_launchers() {
        assert_eq!(softmax_bytes(128, 24577), 128 * 4 * 8);
        assert_eq!(softmax_bytes(1000, 8192), 128 * 8);
        assert_eq!(softmax_bytes(usize::MAX, 1 << 23), 1 << 20);
    }

    #[test]
    fn a_larger_matrix_is_told_what_to_make() {
        // SAFETY: the legacy default stream; nothing is enqueued on it.
        let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
        let check = Check::new("test", &stream).unwrap();
        check_room(&check, [4, 1000], [4, 1000]).unwrap();
        let error = check_room(&check, [4, 1000], [5, 900]).unwrap_err().to_string();
        assert!(error.contains("sampling::SamplingWorkspace::new(&stream, 5, 1000)"), "{error}");
    }

    #[test]
    fn a_smaller_matrix_needs_no_more() {
        let sizes = [1, 100, 2047, 2048, 8192, 8193, 24576, 50257, 128256];
        for (at, &vocab) in sizes.iter().enumerate() {
            for &smaller in &sizes[..=at] {
                for (batch, fewer) in [(1, 1), (128, 127), (129, 128), (1024, 3)] {
                    assert!(softmax_bytes(fewer, smaller) <= softmax_bytes(batch, vocab));
                }
            }
        }
    }
}
