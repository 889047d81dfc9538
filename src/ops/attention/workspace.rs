//! Scratch memory of attention plans.

use crate::{
    cuda::{DeviceBuffer, StagingBuffer},
    error::Result,
    kv::{RaggedIndices, RaggedTable},
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::RawTensor,
};

/// The buffers that a plan fills and its runs use: device memory for partial
/// results, device memory for the plan's index arrays, and page-locked host
/// memory in which they are prepared.
///
/// A workspace belongs to one stream. One plan at a time borrows it; layers
/// that run one after the other share the plan. Two streams, or two plans
/// alive at once, need two workspaces.
///
/// Dropping a workspace frees it in stream order, without waiting for the
/// device. During a graph capture it is leaked instead, which is safe.
pub struct Workspace {
    pub(super) float: DeviceBuffer,
    pub(super) int: DeviceBuffer,
    pub(super) staging: StagingBuffer,
    /// Offsets of batches with one query per request, made when first needed.
    one_query_each: Option<RaggedTable>,
}

impl Workspace {
    /// Bytes for partial results that upstream recommends: 128 MiB.
    pub const DEFAULT_FLOAT_BYTES: usize = 128 << 20;
    /// Bytes for index arrays that upstream uses: 8 MiB.
    pub const DEFAULT_INT_BYTES: usize = 8 << 20;

    /// A workspace of the default sizes.
    ///
    /// # Errors
    /// [`FlashInferError::Cuda`](crate::FlashInferError::Cuda): out of memory,
    /// no device, no driver; or the runtime cannot be started.
    pub fn new(stream: &Stream) -> Result<Self> {
        Self::with_sizes(stream, Self::DEFAULT_FLOAT_BYTES, Self::DEFAULT_INT_BYTES)
    }

    /// A workspace of other sizes, in bytes. Plans say when one is too small.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_sizes(stream: &Stream, float_bytes: usize, int_bytes: usize) -> Result<Self> {
        stream.check_usable_here("Workspace")?;
        let cuda = FlashInferRuntime::get()?.cuda();
        Ok(Self {
            float: DeviceBuffer::new(cuda, stream, float_bytes)?,
            int: DeviceBuffer::new(cuda, stream, int_bytes)?,
            staging: StagingBuffer::new(cuda, stream, int_bytes)?,
            one_query_each: None,
        })
    }

    /// Offsets `0..=batch`, on the host and on the device. They stay where
    /// they are until a larger batch comes.
    pub(super) fn one_query_each(&mut self, batch: usize) -> Result<(Vec<i32>, RawTensor)> {
        const FIRST: usize = 1024;
        let table = match self.one_query_each.take() {
            Some(table) if table.host().batch_size() >= batch => table,
            _ => {
                let requests = batch.max(FIRST).next_power_of_two();
                RaggedTable::new(self.stream(), RaggedIndices::from_lens(std::iter::repeat_n(1, requests))?)?
            }
        };
        let table = self.one_query_each.insert(table);
        Ok((table.host().indptr()[..=batch].to_vec(), table.first(batch)?))
    }

    /// The stream that the workspace belongs to.
    pub fn stream(&self) -> &Stream {
        self.float.stream()
    }
}

impl std::fmt::Debug for Workspace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Workspace({} + {} bytes, {:?})", self.float.len(), self.int.len(), self.stream())
    }
}
