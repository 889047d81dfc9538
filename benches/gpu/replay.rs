//! CUDA graphs whose replay is timed.

use std::sync::Arc;

use cudarc::driver::{
    CudaGraph, CudaStream,
    sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode},
};

use crate::gpu::Result;

/// A CUDA graph that holds the same run several times.
pub struct Replay {
    pub graph: CudaGraph,
    copies: usize,
}

impl Replay {
    pub fn capture<E>(
        cuda: &Arc<CudaStream>,
        copies: usize,
        mut run: impl FnMut() -> std::result::Result<(), E>,
    ) -> Result<Self>
    where
        Box<dyn std::error::Error>: From<E>,
    {
        run()?;
        cuda.synchronize()?;
        cuda.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)?;
        let captured = (0..copies).try_for_each(|_| run());
        let graph = cuda.end_capture(CUgraphInstantiate_flags(0))?.ok_or("nothing was captured")?;
        captured?;
        Ok(Self { graph, copies })
    }

    /// Microseconds of one run in one replay.
    pub fn time(&self, cuda: &Arc<CudaStream>) -> Result<f64> {
        let start = cuda.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
        self.graph.launch()?;
        let end = cuda.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
        Ok(f64::from(start.elapsed_ms(&end)?) * 1e3 / self.copies as f64)
    }
}
