//! Selecting the largest, in FlashInfer's module `topk`.

use crate::{
    cuda::DeviceBuffer, error::Result, runtime::FlashInferRuntime, stream::Stream, tensor::RawTensor,
};

/// Scratch memory of radix top-k: counters through which the blocks that share
/// a row find each other.
///
/// The kernels expect zeros and leave zeros. Blocks of two launches must not
/// meet in one memory, so it belongs to one stream.
pub struct RowStates {
    memory: DeviceBuffer,
}

impl RowStates {
    /// Upstream's size, which serves every GPU.
    const BYTES: usize = 1 << 20;

    /// Zeros, for launches on `stream`.
    ///
    /// # Errors
    /// [`FlashInferError::Cuda`](crate::FlashInferError::Cuda): out of memory,
    /// no device, no driver; or the runtime cannot be started.
    pub fn new(stream: &Stream) -> Result<Self> {
        stream.check_usable_here("RowStates")?;
        let memory = DeviceBuffer::zeroed(FlashInferRuntime::get()?.cuda(), stream, Self::BYTES)?;
        Ok(Self { memory })
    }

    /// The stream that the memory belongs to.
    pub fn stream(&self) -> &Stream {
        self.memory.stream()
    }

    /// The memory as a tensor of bytes, for one launch at a time.
    pub(crate) fn as_bytes(&mut self) -> Result<RawTensor> {
        self.memory.as_bytes()
    }
}
