//! Page-locked host memory, and uploads out of it. It is not reused before the copies out of it are
//! done.

use std::ptr::{self, NonNull};

use super::{
    beside::upload_stream,
    buffer::DeviceBuffer,
    runtime::CudaRuntime,
    symbols::{EVENT_DISABLE_TIMING, HOST_TO_DEVICE, NOT_READY, RawEvent},
};
use crate::{
    error::{FlashInferError, Result},
    stream::Stream,
};

/// A CUDA event without timing.
struct Event {
    runtime: &'static CudaRuntime,
    raw: RawEvent,
}

impl Event {
    fn new(runtime: &'static CudaRuntime) -> Result<Self> {
        let mut raw = ptr::null_mut();
        // SAFETY: one handle is written.
        let code = unsafe { (runtime.symbols.event_create)(&mut raw, EVENT_DISABLE_TIMING) };
        runtime.check("cudaEventCreateWithFlags", code)?;
        Ok(Self { runtime, raw })
    }

    fn record(&self, stream: &Stream) -> Result<()> {
        // SAFETY: event and stream are alive and of one device.
        let code = unsafe { (self.runtime.symbols.event_record)(self.raw, stream.as_raw()) };
        self.runtime.check("cudaEventRecord", code)
    }

    /// Returns when the work recorded last is done; at once if none was.
    fn wait(&self) -> Result<()> {
        // SAFETY: the event is alive.
        let code = unsafe { (self.runtime.symbols.event_query)(self.raw) };
        if code != NOT_READY {
            return self.runtime.check("cudaEventQuery", code);
        }
        self.runtime.last_error();
        // SAFETY: the event is alive.
        let code = unsafe { (self.runtime.symbols.event_synchronize)(self.raw) };
        self.runtime.check("cudaEventSynchronize", code)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event is destroyed once.
        unsafe { (self.runtime.symbols.event_destroy)(self.raw) };
    }
}

/// A page-locked host buffer and the event of the last copy out of it.
struct Slot {
    data: NonNull<u8>,
    copied: Event,
}

impl Drop for Slot {
    fn drop(&mut self) {
        // Without knowing that the copy is done (during a graph capture, say)
        // the memory is leaked: that is safe, and drop cannot report it.
        if self.copied.wait().is_err() {
            return;
        }
        // SAFETY: the pointer came from `cudaHostAlloc` and is freed once; no
        // copy reads it any more.
        unsafe { (self.copied.runtime.symbols.free_host)(self.data.as_ptr().cast()) };
    }
}

/// Two page-locked host buffers used in turn, so that the host can prepare
/// the next upload while the last one is still being copied.
pub(crate) struct StagingBuffer {
    slots: [Slot; 2],
    next: usize,
    bytes: usize,
}

// SAFETY: the buffers are plain host memory that only `&mut self` writes; CUDA
// events may be used from any thread.
unsafe impl Send for StagingBuffer {}
// SAFETY: nothing can be done through a shared reference.
unsafe impl Sync for StagingBuffer {}

impl StagingBuffer {
    pub(crate) fn new(runtime: &'static CudaRuntime, stream: &Stream, bytes: usize) -> Result<Self> {
        let _device = runtime.on_device_of(stream)?;
        let bytes = bytes.max(1);
        let slot = || -> Result<Slot> {
            let copied = Event::new(runtime)?;
            let mut data = ptr::null_mut();
            // SAFETY: one pointer is written; flags 0 is the default.
            let code = unsafe { (runtime.symbols.host_alloc)(&mut data, bytes, 0) };
            runtime.check("cudaHostAlloc", code)?;
            let data = NonNull::new(data.cast::<u8>()).ok_or(FlashInferError::Cuda {
                call: "cudaHostAlloc",
                code: 2,
                message: "a null pointer came back".into(),
            })?;
            // SAFETY: `bytes` bytes were just allocated; zeroing makes them
            // initialized, so that they may be seen as a slice.
            unsafe { data.write_bytes(0, bytes) };
            Ok(Slot { data, copied })
        };
        Ok(Self { slots: [slot()?, slot()?], next: 0, bytes })
    }

    /// Lets `fill` write the buffer whose last copy is oldest, and enqueue
    /// copies out of it on `stream`; then marks it busy until they are done.
    ///
    /// Waits for that oldest copy, which is two uses back.
    pub(crate) fn stage<R>(
        &mut self,
        stream: &Stream,
        fill: impl FnOnce(&mut [u8]) -> Result<R>,
    ) -> Result<R> {
        let slot = &self.slots[self.next];
        // The handles of default streams mean those of the current device.
        let _device = slot.copied.runtime.on_device_of(stream)?;
        slot.copied.wait()?;
        self.next = 1 - self.next;
        // SAFETY: the slot holds `bytes` initialized bytes; `&mut self` and the
        // wait above make this the only access.
        let bytes = unsafe { std::slice::from_raw_parts_mut(slot.data.as_ptr(), self.bytes) };
        let result = fill(bytes);
        // Recorded also when `fill` failed: it may have enqueued a copy.
        if let Err(error) = slot.copied.record(&upload_stream(stream)) {
            // Without the event, only waiting tells that the copy is done.
            // SAFETY: no arguments.
            unsafe { (slot.copied.runtime.symbols.device_synchronize)() };
            return Err(error);
        }
        result
    }
}

/// Enqueues a copy of `source` to `target`, from its byte `offset` on, on the
/// target's stream, or [beside](super::upload_beside) it.
///
/// To be called within [`StagingBuffer::stage`], which sets the device.
///
/// # Safety
/// `source` must stay unchanged and page-locked until the copy is done.
pub(crate) unsafe fn upload(source: &[u8], target: &DeviceBuffer, offset: usize) -> Result<()> {
    if offset.checked_add(source.len()).is_none_or(|end| end > target.len()) {
        return Err(FlashInferError::invalid(
            "upload",
            "source",
            format!("{} bytes at {offset} of a buffer of {}", source.len(), target.len()),
        ));
    }
    // SAFETY: the target has room for the bytes; both pointers are alive until
    // the copy is done (the caller's promise and the target's stream order).
    let code = unsafe {
        (target.runtime().symbols.memcpy_async)(
            target.as_ptr().cast::<u8>().wrapping_add(offset).cast(),
            source.as_ptr().cast(),
            source.len(),
            HOST_TO_DEVICE,
            upload_stream(target.stream()).as_raw(),
        )
    };
    target.runtime().check("cudaMemcpyAsync", code)
}
