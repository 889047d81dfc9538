//! What the benchmarks share: a GPU, or the reason why there is none, and
//! medians.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream};
use flashinfer_rs::FlashInferRuntime;

pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

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

pub fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
