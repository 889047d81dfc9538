//! Device memory. It is allocated and freed in the order of one stream, so that dropping it never
//! waits for the device.

use std::{
    any::Any,
    ffi::c_void,
    ptr::{self, NonNull},
    sync::Arc,
};

use super::{beside::is_beside, runtime::CudaRuntime};
use crate::{
    dtype::DType,
    error::{FlashInferError, Result},
    stream::Stream,
    tensor::{Owner, RawTensor},
};

/// Device memory, allocated and freed in the order of one stream. A captured
/// step that uses it has a share of it.
pub(crate) struct DeviceBuffer {
    allocation: Arc<Allocation>,
}

struct Allocation {
    runtime: &'static CudaRuntime,
    data: NonNull<c_void>,
    bytes: usize,
    stream: Stream,
}

// SAFETY: it is an address; work on it is ordered by its stream.
unsafe impl Send for Allocation {}
// SAFETY: as for `Send`; shared access only hands out the address.
unsafe impl Sync for Allocation {}

impl DeviceBuffer {
    /// At least one byte, aligned to 256, usable by later work on `stream`.
    ///
    /// # Errors
    /// Also while the stream is being captured: the memory would be the
    /// graph's, and there only while the graph runs.
    pub(crate) fn new(runtime: &'static CudaRuntime, stream: &Stream, bytes: usize) -> Result<Self> {
        if runtime.is_capturing(stream)? {
            return Err(FlashInferError::invalid(
                "device memory",
                "stream",
                "it is being captured into a CUDA graph; allocate before the capture",
            ));
        }
        let _device = runtime.on_device_of(stream)?;
        let bytes = bytes.max(1);
        let mut data = ptr::null_mut();
        // SAFETY: the stream is alive; one pointer is written.
        let code = unsafe { (runtime.symbols.malloc_async)(&mut data, bytes, stream.as_raw()) };
        runtime
            .check("cudaMallocAsync", code)
            .map_err(|error| error.in_part(&format!("{bytes} bytes of device memory")))?;
        let data = NonNull::new(data).ok_or(FlashInferError::Cuda {
            call: "cudaMallocAsync",
            code: 2,
            message: "a null pointer came back".into(),
        })?;
        let allocation = Allocation { runtime, data, bytes, stream: stream.clone() };
        let buffer = Self { allocation: Arc::new(allocation) };
        buffer.settle()?;
        Ok(buffer)
    }

    /// Where uploads are made on another stream, waits until the memory, which is there in the order
    /// of its own, is ready for them.
    fn settle(&self) -> Result<()> {
        if !is_beside(self.stream()) {
            return Ok(());
        }
        // SAFETY: no arguments.
        let code = unsafe { (self.runtime().symbols.device_synchronize)() };
        self.runtime().check("cudaDeviceSynchronize", code)
    }

    /// As [`new`](Self::new), filled with zeros in the order of the stream.
    pub(crate) fn zeroed(runtime: &'static CudaRuntime, stream: &Stream, bytes: usize) -> Result<Self> {
        let buffer = Self::new(runtime, stream, bytes)?;
        // SAFETY: the buffer has that many bytes, on the stream's device.
        unsafe { runtime.zero(stream, buffer.as_ptr(), buffer.len()) }?;
        buffer.settle()?;
        Ok(buffer)
    }

    pub(crate) fn as_ptr(&self) -> *mut c_void {
        self.allocation.data.as_ptr()
    }

    /// What keeps the memory alive.
    pub(crate) fn share(&self) -> Arc<dyn Any + Send + Sync> {
        self.allocation.clone()
    }

    /// The same, for views.
    pub(crate) fn owner(&self) -> Owner {
        Owner::of(&self.allocation)
    }

    /// The buffer as a tensor of bytes.
    pub(crate) fn as_bytes(&self) -> Result<RawTensor> {
        let mut raw = RawTensor::new(self.as_ptr(), self.stream().device(), DType::U8, &[self.len()], None)?;
        raw.owner = Some(self.owner());
        Ok(raw)
    }

    pub(crate) fn len(&self) -> usize {
        self.allocation.bytes
    }

    pub(super) fn runtime(&self) -> &'static CudaRuntime {
        self.allocation.runtime
    }

    pub(crate) fn stream(&self) -> &Stream {
        &self.allocation.stream
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // All work on the buffer was enqueued on its stream. Where that stream
        // cannot be named from here (another thread's default stream), wait for
        // the device. A failure, for example during graph capture, leaks the
        // memory: drop has no way to report it, and leaking is safe.
        let Ok(_device) = self.runtime.on_device_of(&self.stream) else { return };
        let stream = if self.stream.is_usable_here() {
            self.stream.as_raw()
        } else {
            // SAFETY: no arguments.
            if unsafe { (self.runtime.symbols.device_synchronize)() } != 0 {
                return;
            }
            ptr::null_mut()
        };
        // SAFETY: the pointer came from `cudaMallocAsync` and is freed once,
        // after all work that uses it in stream order; the stream is alive,
        // because `self.stream` is.
        unsafe { (self.runtime.symbols.free_async)(self.data.as_ptr(), stream) };
    }
}
