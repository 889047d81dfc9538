//! Scratch memory through which blocks that share a row find each other.

use crate::{
    artifacts::FlashInferVersion,
    cuda::{DeviceAttribute, DeviceBuffer},
    error::Result,
    ops::{FixedFunction, check::Check},
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::RawTensor,
};

/// So few multiprocessors that blocks which share a row may not all run at once.
const FEW_MULTIPROCESSORS: i32 = 16;

/// Scratch memory of radix top-k: counters through which the blocks that share
/// a row find each other.
///
/// The kernels expect zeros and leave zeros. Blocks of two launches must not
/// meet in one memory, so it belongs to one stream.
///
/// These blocks must all run at once. A kernel whose rows take few blocks each
/// waits for others that hold multiprocessors until they are done. But do not
/// launch rows of millions of scores on several streams at once: launches that
/// each got some of the multiprocessors would wait for each other forever.
pub struct RowStates {
    memory: DeviceBuffer,
    multiprocessors: i32,
    /// The most that a block can have.
    shared_bytes: i64,
    compute_capability: (i32, i32),
}

impl RowStates {
    /// What the blocks that share a row count with: three histograms of 256
    /// entries, five further numbers and, since FlashInfer 0.7.1, a sum of 64 bits.
    const STATE_BYTES: usize = (4 * (3 * 256 + 5usize)).next_multiple_of(8) + 8;
    /// What they count with to be deterministic: two numbers for each of up to
    /// 256 blocks. These follow the states of all rows.
    const DETERMINISTIC_BYTES: usize = 4 * 2 * 256;
    /// What a block needs of its shared memory beside scores: 10.6 KiB at most.
    const RESERVED_SHARED_BYTES: i64 = 16 << 10;

    /// Zeros, for launches on `stream`: some 5 KiB for every two
    /// multiprocessors of its GPU.
    ///
    /// # Errors
    /// [`FlashInferError::Cuda`](crate::FlashInferError::Cuda): out of memory, no device, no driver; the runtime
    /// cannot be started; the stream is being captured.
    pub fn new(stream: &Stream) -> Result<Self> {
        stream.check_usable_here("RowStates")?;
        let cuda = FlashInferRuntime::get()?.cuda();
        let attribute = |attribute| cuda.attribute(stream.ordinal(), attribute);
        let multiprocessors = attribute(DeviceAttribute::MultiprocessorCount)?;
        let shared_bytes = attribute(DeviceAttribute::MaxSharedMemoryPerBlockOptin)?.into();
        let compute_capability = cuda.compute_capability(stream.ordinal())?;
        let memory = DeviceBuffer::zeroed(cuda, stream, Self::bytes(multiprocessors))?;
        Ok(Self { memory, multiprocessors, shared_bytes, compute_capability })
    }

    /// Rows share nothing unless they take two blocks or more; as many rows are
    /// worked on at once as there are multiprocessors for their blocks.
    fn bytes(multiprocessors: i32) -> usize {
        let rows = usize::try_from(multiprocessors / 2).unwrap_or(0).max(1);
        rows * (Self::STATE_BYTES + Self::DETERMINISTIC_BYTES)
    }

    /// The stream that the memory belongs to.
    pub fn stream(&self) -> &Stream {
        self.memory.stream()
    }

    /// The memory as a tensor of bytes, for a launch on its stream.
    pub(crate) fn as_bytes(&mut self) -> Result<RawTensor> {
        self.memory.as_bytes()
    }

    /// The most bytes that a row of scores may have for a function: what all blocks that can share it hold, which is
    /// one where several [may wait forever](may_wait_forever).
    pub(crate) fn max_row_bytes(&self, function: &FixedFunction) -> Result<i64> {
        let may_wait = |version| may_wait_forever(self.compute_capability, self.multiprocessors, version);
        // The module is asked for its version only where that decides.
        let alone = may_wait(None) && may_wait(function.version(FlashInferRuntime::get()?)?);
        let blocks = if alone { 1 } else { self.multiprocessors };
        Ok(i64::from(blocks) * (self.shared_bytes - Self::RESERVED_SHARED_BYTES))
    }

    /// Whether blocks share one of these rows of scores, or go on from one to
    /// another. Then *radix* does not wait for all warps of a block where it
    /// should, unless it is deterministic.
    pub(super) fn has_races(&self, scores: &RawTensor) -> bool {
        let (rows, len) = (scores.shape()[0], scores.shape()[1]);
        let row_bytes = len.saturating_mul(scores.dtype.size() as i64);
        let at_once = Self::rows_at_once(self.multiprocessors, self.shared_bytes, row_bytes);
        at_once < i64::from(self.multiprocessors) || rows > at_once
    }

    /// No more rows than are worked on at once: for each, there are
    /// multiprocessors for the blocks that it takes.
    fn rows_at_once(multiprocessors: i32, shared_bytes: i64, row_bytes: i64) -> i64 {
        let block_bytes = (shared_bytes - Self::RESERVED_SHARED_BYTES).max(1);
        let blocks = row_bytes / block_bytes + i64::from(row_bytes % block_bytes != 0);
        i64::from(multiprocessors) / blocks.max(1)
    }

    /// The most shared memory that a block can have on this GPU.
    pub(crate) fn shared_bytes(&self) -> i64 {
        self.shared_bytes
    }
}

impl std::fmt::Debug for RowStates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RowStates({} bytes, {:?})", self.memory.len(), self.stream())
    }
}

/// Whether blocks that share a row may wait for each other forever. Before FlashInfer 0.7 the first one that is done sets
/// their counter to zero, which others may still wait for: seen with compute capability 12.x (its issue 3610). And with
/// few multiprocessors they may not all run (issue 4544).
fn may_wait_forever(
    (major, _): (i32, i32),
    multiprocessors: i32,
    version: Option<FlashInferVersion>,
) -> bool {
    let is_old = version.is_none_or(|version| version < FlashInferVersion::new(0, 7, 0));
    multiprocessors <= FEW_MULTIPROCESSORS || major == 12 && is_old
}

/// A row of scores fits the shared memory of a GPU, where blocks share it: else
/// some of them would wait forever for others that cannot start.
pub(crate) fn check_row_bytes(
    check: &Check<'_>,
    argument: &'static str,
    scores: &RawTensor,
    max_row_bytes: i64,
) -> Result<()> {
    let len = scores.shape().last().copied().unwrap_or_default();
    let bytes = len.saturating_mul(scores.dtype.size() as i64);
    if bytes <= max_row_bytes {
        return Ok(());
    }
    check.fail(
        argument,
        format!(
            "rows of {len} elements are {bytes} bytes; the blocks that can share one on this GPU hold \
             {max_row_bytes}; split them, or use sampling::sample, or radix_topk with a tie break, which need no \
             such memory"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_follow_each_other_are_known() {
        // An H200: 132 multiprocessors, whose blocks hold at least 211 KiB each.
        let rows_at_once = |row_bytes| RowStates::rows_at_once(132, 232_448, row_bytes);
        assert_eq!([0, 4, 40_000, 216_064].map(rows_at_once), [132; 4]);
        assert_eq!([216_065, 432_128, 432_129, 1_024_000].map(rows_at_once), [66, 66, 44, 26]);
        // However little a GPU has, nothing divides by zero.
        assert_eq!(RowStates::rows_at_once(0, 0, i64::MAX), 0);
    }

    #[test]
    fn blocks_share_no_rows_where_they_may_wait_forever() {
        let version = |minor, patch| Some(FlashInferVersion::new(0, minor, patch));
        let versions = [None, version(6, 13), version(7, 0), version(7, 4)];
        let may_wait = |capability, multiprocessors| {
            versions.map(|version| may_wait_forever(capability, multiprocessors, version))
        };
        for capability in [(12, 0), (12, 1)] {
            assert_eq!(may_wait(capability, 170), [true, true, false, false], "{capability:?}");
        }
        for capability in [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0)] {
            assert_eq!(may_wait(capability, 17), [false; 4], "{capability:?}");
        }
        for capability in [(8, 6), (8, 7), (12, 0)] {
            assert_eq!(may_wait(capability, 16), [true; 4], "{capability:?}");
        }
    }

    /// Of 0.6.13 and of 0.7.1 and later, whose states have other sizes. On every GPU
    /// there is less than upstream's size, which serves 408 multiprocessors.
    #[test]
    fn row_states_are_as_large_as_a_launch_needs() {
        for multiprocessors in [1, 2, 3, 108, 132, 148, 192] {
            let bytes = RowStates::bytes(multiprocessors);
            for blocks in 2..=multiprocessors.max(2) {
                let rows = (multiprocessors / blocks).max(1) as usize;
                for state in [3092, 3104] {
                    assert!(rows * (state + 2048) <= bytes, "{multiprocessors}: rows of {blocks} blocks");
                }
            }
            assert!(bytes <= 1 << 20);
        }
    }
}
