//! What the benchmarks share: a GPU, or the reason why there is none, and CUDA
//! graphs whose replay is timed.

use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaGraph, CudaStream,
    sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode},
};
use flashinfer_rs::FlashInferRuntime;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A stream of the first GPU; `None`, with the reason printed, where nothing
/// can be measured. `cargo test` runs benchmarks with an argument that only
/// asks whether they work.
pub fn start() -> Result<Option<Arc<CudaStream>>> {
    let reason = if std::env::args().any(|argument| argument == "--test" || argument == "--list") {
        "asked only to test".to_owned()
    } else {
        match FlashInferRuntime::get().and_then(|runtime| runtime.device_count()) {
            Ok(1..) => {
                let cuda = CudaContext::new(0)?.new_stream()?;
                println!("GPU: {}", cuda.context().name()?);
                return Ok(Some(cuda));
            }
            Ok(_) => "there is no GPU".into(),
            Err(error) => error.to_string(),
        }
    };
    println!("Nothing was measured: {reason}.");
    Ok(None)
}

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

pub fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
