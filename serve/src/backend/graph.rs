//! CUDA graphs: capturing work, and how long it takes on the device.

use std::sync::Arc;

use cudarc::driver::{
    CudaGraph, CudaStream,
    sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode, cuGraphGetNodes},
};

use crate::Result;

/// Captures what `work` enqueues, without running it. Views of cudarc's slices
/// have to be made before, and dropped after.
pub fn capture(cuda: &Arc<CudaStream>, work: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
    cuda.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)?;
    let result = work();
    // The capture has to end in any case.
    let graph = cuda.end_capture(CUgraphInstantiate_flags(0));
    result?;
    graph?.ok_or_else(|| "the capture gave no CUDA graph".into())
}

/// Launches a graph twice and waits; the milliseconds that the second launch
/// took on the device, which the first kept busy while the host enqueued it.
pub fn milliseconds(cuda: &Arc<CudaStream>, graph: &CudaGraph) -> Result<f32> {
    let timed = Some(CUevent_flags::CU_EVENT_DEFAULT);
    graph.launch()?;
    let start = cuda.record_event(timed)?;
    graph.launch()?;
    Ok(start.elapsed_ms(&cuda.record_event(timed)?)?)
}

/// The number of kernels, copies and fills in a graph.
pub fn nodes(graph: &CudaGraph) -> Result<usize> {
    let mut count = 0;
    // SAFETY: the graph is alive; without an array the function only counts.
    unsafe { cuGraphGetNodes(graph.cu_graph(), std::ptr::null_mut(), &mut count) }.result()?;
    Ok(count)
}
