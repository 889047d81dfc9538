//! A step of candle's tensors, captured into a CUDA graph.

use candle_core::{Device, Result};

use super::{op::invalid, tensor};
use crate::{FlashInferError, capture, graph::CapturedStep};

const OP: &str = "capture_step";

/// Runs `body` once, and captures a second run of it into a CUDA graph, which
/// [`launch`](CapturedStep::launch) computes again and again: candle's operations and this
/// crate's alike, on the stream of the device.
///
/// Attention in it is of plans for graphs ([`PagedDecode::plan_for_graph`]). For each launch,
/// update the tables, plan anew, and pass the plan. Lengths of requests, and pages, may then be
/// others; the number of requests stays. Queries, and whatever else changes, are written to the
/// same tensors before ([`Tensor::slice_set`]); results are read from tensors that `body` writes
/// in the same way.
///
/// What candle allocates in `body` belongs to the graph, and is freed in it where the tensor is
/// dropped. What it uploads, up to 4096 bytes at a time, is kept on the device by its cache for
/// graphs, which this function turns on: dimensions and strides for some of its operations, and numbers
/// that `body` makes on the host, which are in each launch what they were in the capture.
///
/// [`PagedDecode::plan_for_graph`]: super::PagedDecode::plan_for_graph
/// [`Tensor::slice_set`]: candle_core::Tensor::slice_set
///
/// # Safety
/// A graph has addresses in it, and keeps none of candle's memory alive. As long as the step is
/// launched:
///
/// - Tensors that `body` reads or writes and were made before it stay: weights, inputs, outputs,
///   [`RotaryEmbedding`](super::RotaryEmbedding), and the [`PagedCache`](super::PagedCache). They are
///   dropped in the order of the stream, which with candle's default stream means in this thread.
///   Index arrays and workspaces of this crate the step keeps itself.
/// - Before each launch, tables that `body` reads are updated for the batch as it is then, also
///   where no plan is passed, and it does not change before the launch is enqueued.
/// - No other thread multiplies matrices with the same [`Device`] while a launch runs: threads share
///   the scratch memory of cuBLAS.
/// - The thread that captured lives: what candle uploaded for graphs is that thread's.
/// - Each run of `body` enqueues the same work, and each launch is in the order of the stream with
///   whatever else uses those tensors.
///
/// In `body`, tensors that were made before are not dropped, and those that are made in it are
/// dropped before it ends.
///
/// # Errors
/// The device is not CUDA; its driver has no memory pools, from which candle allocates during a
/// capture; cudarc orders streams by events, which breaks a capture; the thread is capturing already, or
/// the stream is another thread's. Then nothing was run. What `body` returns, and what
/// [`CapturedStep::capture_unchecked`] refuses, such as plans that are not for a graph: then it has
/// run once, and nothing is captured.
///
/// ```no_run
/// # use candle_core::{Device, Result, Tensor};
/// # use flashinfer_rs::{candle::{PagedCache, PagedDecode, StepTables, capture_step}, kv::Batch};
/// /// Attention of one layer; `q`, `k`, `v` and `out` have a row for each request.
/// fn tokens(
///     device: &Device, decode: &mut PagedDecode,
///     (batch, cache, tables): (&mut Batch, &mut PagedCache, &mut StepTables),
///     ([q, k, v], out): ([&Tensor; 3], &Tensor),
/// ) -> Result<()> {
///     batch.append(vec![1; batch.len()]).map_err(candle_core::Error::wrap)?;
///     let step = tables.update(batch, cache)?;
///     let plan = decode.plan_for_graph(&step)?;
///     let body = || {
///         cache.append(&step, 0, k, v)?;
///         out.slice_set(&plan.run(q, cache, 0)?, 0, 0)
///     };
///     // SAFETY: the tensors and the cache outlive the step, which ends here, in this thread.
///     let captured = unsafe { capture_step(device, body) }?;
///     for _ in 0..100 {
///         // New rows: q.slice_set(…)
///         batch.append(vec![1; batch.len()]).map_err(candle_core::Error::wrap)?;
///         let step = tables.update(batch, cache)?;
///         captured.launch(&decode.plan_for_graph(&step)?).map_err(candle_core::Error::wrap)?;
///         // Results are in `out`.
///     }
///     Ok(())
/// }
/// ```
pub unsafe fn capture_step(device: &Device, mut body: impl FnMut() -> Result<()>) -> Result<CapturedStep> {
    let Some(stream) = tensor::stream(device) else {
        return invalid(OP, "device", format!("it is {:?}; CUDA has graphs", device.location()));
    };
    if capture::is_active() {
        return invalid(OP, "body", "this thread is capturing another step".into());
    }
    stream.check_usable_here(OP).map_err(tensor::error)?;
    #[cfg(feature = "candle-cuda")]
    let _uploads = {
        let device = device.as_cuda_device()?;
        check_device(device)?;
        device.enable_cuda_graph_htod_cache()
    };
    // Loads kernels, and uploads what candle's cache for graphs then has.
    body()?;
    let mut failed = None;
    let captured = || {
        body().map_err(|error| {
            let stand_in = FlashInferError::invalid(OP, "body", error.to_string());
            failed = Some(error);
            stand_in
        })
    };
    // SAFETY: as the caller says.
    let step = unsafe { CapturedStep::capture_unchecked(&stream, captured) };
    #[cfg(feature = "candle-cuda")]
    if step.is_err() {
        // What cudarc could not free in a capture that broke was the graph's. The next call is not to fail
        // for it.
        let _ = device.as_cuda_device()?.cuda_stream().context().check_err();
    }
    match failed {
        Some(error) => Err(error),
        None => step.map_err(tensor::error),
    }
}

/// candle can allocate during a capture, and cudarc waits for no events.
#[cfg(feature = "candle-cuda")]
fn check_device(device: &candle_core::CudaDevice) -> Result<()> {
    let stream = device.cuda_stream();
    if !stream.context().has_async_alloc() {
        return invalid(
            OP,
            "device",
            "it has no memory pools, so nothing can be allocated in a capture".into(),
        );
    }
    if stream.context().is_managing_stream_synchronization() {
        let problem = "cudarc orders its streams by events, for which a capture cannot wait; use Device::new_cuda, \
                       or call disable_event_tracking of the CudaDevice before its first tensor is made";
        return invalid(OP, "device", problem.into());
    }
    Ok(())
}
