//! CUDA graphs: capturing work of several libraries, and how long work takes on the device.

use std::sync::Arc;

use cudarc::driver::{
    CudaStream,
    sys::{CUdevice_attribute, CUevent_flags},
};
use flashinfer_rs::{FlashInferError, Stream, graph::CapturedStep};

use crate::Result;

/// [`CapturedStep::capture_unchecked`] of work that fails with any error.
///
/// # Safety
/// As there: memory that `work` uses otherwise than through the crate's operations
/// stays alive as long as the step.
pub unsafe fn capture(stream: &Stream, work: impl FnOnce() -> Result<()>) -> Result<CapturedStep> {
    let mut failed = None;
    let body = || {
        work().map_err(|error| {
            let stand_in = FlashInferError::Unsupported { what: error.to_string(), available: String::new() };
            failed = Some(error);
            stand_in
        })
    };
    // SAFETY: as the caller says.
    let captured = unsafe { CapturedStep::capture_unchecked(stream, body) };
    match failed {
        Some(error) => Err(error),
        None => Ok(captured?),
    }
}

/// Enqueues work twice and waits; the milliseconds that it took the device the second
/// time, the first having kept it busy while the host enqueued that.
pub fn milliseconds(cuda: &Arc<CudaStream>, mut work: impl FnMut() -> Result<()>) -> Result<f32> {
    let timed = Some(CUevent_flags::CU_EVENT_DEFAULT);
    work()?;
    let start = cuda.record_event(timed)?;
    work()?;
    Ok(start.elapsed_ms(&cuda.record_event(timed)?)?)
}

/// Enqueues work and waits; the milliseconds that it took the device, of whose cache other memory was
/// written all over before.
pub fn cold_milliseconds(cuda: &Arc<CudaStream>, work: impl FnOnce() -> Result<()>) -> Result<f32> {
    let timed = Some(CUevent_flags::CU_EVENT_DEFAULT);
    let cache_bytes = cuda.context().attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?;
    let written = cuda.alloc_zeros::<u8>(2 * usize::try_from(cache_bytes)?)?;
    let start = cuda.record_event(timed)?;
    work()?;
    let end = cuda.record_event(timed)?;
    drop(written);
    Ok(start.elapsed_ms(&end)?)
}
