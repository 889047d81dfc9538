//! GPU time of paged batch decode on CUDA cores and on tensor cores: the
//! numbers behind the choice of `Backend::Auto`.
//!
//! `cargo bench --bench decode_backends` needs an NVIDIA GPU. Each figure is
//! the median over replays of a CUDA graph that holds the same run several
//! times, divided by their number; keys and values are larger than the L2
//! cache where the case allows it. Both kernels are measured in turn, and the
//! ratio is what to quote.

mod gpu;

use std::sync::Arc;

use cudarc::driver::{
    CudaStream,
    sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode},
};
use flashinfer_rs::{
    DType, FlashInferRuntime, PageIndices, PageTable, Stream,
    attention::{AttentionSpec, Backend, BatchDecode, Heads, PlanMode, RunOptions, Workspace},
    cudarc::{TensorExt, TensorExtMut},
    page::{KvLayout, PagedKv},
};
use half::bf16;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const PAGE_SIZE: usize = 16;
const RUNS: usize = 10;
const REPLAYS: usize = 20;

/// Median microseconds of one run.
fn gpu_time(
    cuda: &Arc<CudaStream>,
    decode: &BatchDecode,
    workspace: &mut Workspace,
    table: &PageTable,
    (batch, tokens): (usize, usize),
) -> Result<f64> {
    let heads = decode.heads().num_qo_heads;
    let pages = batch * tokens / PAGE_SIZE;
    let (shape, len) = ([pages, PAGE_SIZE, KV_HEADS, HEAD_DIM], batch * tokens * KV_HEADS * HEAD_DIM);
    let (k, v) = (cuda.alloc_zeros::<bf16>(len)?, cuda.alloc_zeros::<bf16>(len)?);
    let q = cuda.alloc_zeros::<bf16>(batch * heads * HEAD_DIM)?;
    let mut out = cuda.alloc_zeros::<bf16>(batch * heads * HEAD_DIM)?;
    let mut times = Vec::new();
    {
        let (k, v) = (k.tensor(cuda, &shape)?, v.tensor(cuda, &shape)?);
        let q = q.tensor(cuda, &[batch, heads, HEAD_DIM])?;
        let mut out = out.tensor_mut(cuda, &[batch, heads, HEAD_DIM])?;
        let (q, kv) = (q.view(), PagedKv::new(k.view(), v.view(), KvLayout::Nhd));
        let options = RunOptions::default();
        let plan = decode.plan(workspace, table, PlanMode::CudaGraph)?;
        plan.run(&q, &kv, &mut out.view_mut(), None, &options)?;
        cuda.synchronize()?;
        cuda.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)?;
        let captured = (0..RUNS).try_for_each(|_| plan.run(&q, &kv, &mut out.view_mut(), None, &options));
        let graph = cuda.end_capture(CUgraphInstantiate_flags(0))?.ok_or("nothing was captured")?;
        captured?;
        for replay in 0..REPLAYS + 3 {
            let start = cuda.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
            graph.launch()?;
            let end = cuda.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
            let time = f64::from(start.elapsed_ms(&end)?) * 1e3 / RUNS as f64;
            if replay >= 3 {
                times.push(time);
            }
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn main() -> Result<()> {
    let Some(cuda) = gpu::start()? else { return Ok(()) };
    let (runtime, stream) = (FlashInferRuntime::get()?, Stream::from(&cuda));
    println!("bf16, {KV_HEADS} KV heads, head_dim {HEAD_DIM}, page {PAGE_SIZE}");
    println!(
        "| query heads per KV head | batch | tokens | CUDA cores µs | tensor cores µs | tensor / CUDA |"
    );
    println!("|---|---|---|---|---|---|");
    for group in [1, 2, 3, 4, 8] {
        let heads = Heads { num_qo_heads: KV_HEADS * group, num_kv_heads: KV_HEADS };
        for (batch, tokens) in [(1, 1024), (1, 32768), (16, 1024), (64, 1024), (64, 8192), (256, 2048)] {
            let pages = tokens / PAGE_SIZE;
            let numbers: Vec<i32> = (0..(batch * pages) as i32).collect();
            let requests = numbers.chunks(pages).map(|pages| (pages, tokens));
            let indices = PageIndices::from_requests(batch * pages, PAGE_SIZE, requests)?;
            let table = PageTable::new(&stream, indices)?;
            let mut workspace = Workspace::with_sizes(&stream, 512 << 20, Workspace::DEFAULT_INT_BYTES)?;
            let mut time = |backend| -> Result<f64> {
                let spec = AttentionSpec::new(DType::BF16, HEAD_DIM).with_backend(backend);
                let decode = BatchDecode::new(runtime, &spec, heads)?;
                gpu_time(&cuda, &decode, &mut workspace, &table, (batch, tokens))
            };
            let (on_cuda, on_tensor) = (time(Backend::CudaCores)?, time(Backend::Fa2)?);
            println!(
                "| {group} | {batch} | {tokens} | {on_cuda:.1} | {on_tensor:.1} | {:.2} |",
                on_tensor / on_cuda
            );
        }
    }
    Ok(())
}
