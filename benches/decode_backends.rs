//! GPU time of paged batch decode on CUDA cores and on tensor cores: the
//! numbers behind the choice of `Backend::Auto`.
//!
//! `cargo bench --bench decode_backends` needs an NVIDIA GPU. Each figure is
//! the median over replays of a CUDA graph that holds the same run several
//! times, divided by their number; keys and values are random, and larger than
//! the L2 cache where the case allows it. The kernels are measured in turn, and
//! the ratios are what to quote.

mod gpu;
#[path = "gpu/replay.rs"]
mod replay;

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr};
use flashinfer_rs::{
    Element, FlashInferError, PageIndices, PageTable, Stream,
    attention::{AttentionSpec, Backend, BatchDecode, Heads, PlanOptions, Split, Workspace},
    gpu::{TensorExt, TensorExtMut},
    kv::{KvLayout, PagedKv},
};
use float8::F8E4M3;
use gpu::median;
use half::{bf16, f16};
use replay::Replay;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const PAGE_SIZE: usize = 16;
/// Requests, and tokens of each.
const CASES: [(usize, usize); 11] = [
    (1, 128),
    (1, 512),
    (1, 1024),
    (1, 32768),
    (16, 1024),
    (64, 128),
    (64, 512),
    (64, 1024),
    (64, 8192),
    (256, 128),
    (256, 2048),
];
const RUNS: usize = 10;
const REPLAYS: usize = 20;

/// An element type of queries, keys or values.
trait Number: Element + DeviceRepr + cudarc::driver::ValidAsZeroBits {
    fn from_f32(value: f32) -> Self;
}

macro_rules! numbers {
    ($($ty:ty),*) => {$(
        impl Number for $ty {
            fn from_f32(value: f32) -> Self { <$ty>::from_f32(value) }
        }
    )*};
}
numbers!(f16, bf16, F8E4M3);

/// Numbers between −2 and 2, which repeat after a while.
fn random<T: Number>(cuda: &Arc<CudaStream>, len: usize) -> Result<CudaSlice<T>> {
    const PERIOD: usize = 1 << 20;
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        T::from_f32((state >> 40) as f32 / (1 << 22) as f32 - 2.0)
    };
    let numbers = cuda.clone_htod(&(0..PERIOD).map(|_| next()).collect::<Vec<_>>())?;
    let mut slice = cuda.alloc_zeros::<T>(len)?;
    for start in (0..len).step_by(PERIOD) {
        let end = len.min(start + PERIOD);
        cuda.memcpy_dtod(&numbers.slice(..end - start), &mut slice.slice_mut(start..end))?;
    }
    Ok(slice)
}

/// Median microseconds of one run.
fn gpu_time<T: Number, K: Number>(
    cuda: &Arc<CudaStream>,
    (decode, split): (&BatchDecode, Split),
    workspace: &mut Workspace,
    table: &PageTable,
    (batch, tokens): (usize, usize),
) -> Result<f64> {
    let heads = decode.heads().num_qo_heads;
    let pages = batch * tokens / PAGE_SIZE;
    let (shape, len) = ([pages, PAGE_SIZE, KV_HEADS, HEAD_DIM], batch * tokens * KV_HEADS * HEAD_DIM);
    let (k, v) = (random::<K>(cuda, len)?, random::<K>(cuda, len)?);
    let q = random::<T>(cuda, batch * heads * HEAD_DIM)?;
    let mut out = cuda.alloc_zeros::<T>(batch * heads * HEAD_DIM)?;
    let (k, v) = (k.tensor(cuda, &shape)?, v.tensor(cuda, &shape)?);
    let q = q.tensor(cuda, &[batch, heads, HEAD_DIM])?;
    let mut out = out.tensor_mut(cuda, &[batch, heads, HEAD_DIM])?;
    let (q, kv) = (q.view(), PagedKv::new(k.view(), v.view(), KvLayout::Nhd));
    let plan = decode.plan(workspace, table, &PlanOptions::default().with_graph(batch).with_split(split))?;
    let replay = Replay::capture(cuda, RUNS, || plan.run(&q, &kv, &mut out.view_mut()))?;
    let times = (0..REPLAYS + 3).map(|_| replay.time(cuda)).skip(3).collect::<Result<_>>()?;
    Ok(median(times))
}

fn table<T: Number, K: Number>(cuda: &Arc<CudaStream>) -> Result<()> {
    let stream = Stream::from(cuda);
    println!("\nqueries {}, keys and values {}", T::DTYPE, K::DTYPE);
    println!(
        "| query heads per KV head | batch | tokens | CUDA cores µs | Fa2 µs | Fa2, undivided µs | Fa3 µs | \
         Fa2 / CUDA cores | undivided / CUDA cores | Fa3 / CUDA cores |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for group in [1, 2, 3, 4, 8] {
        let heads = Heads::new(KV_HEADS * group, KV_HEADS);
        for (batch, tokens) in CASES {
            let pages = tokens / PAGE_SIZE;
            let numbers: Vec<i32> = (0..(batch * pages) as i32).collect();
            let requests = numbers.chunks(pages).map(|pages| (pages, tokens));
            let indices = PageIndices::from_requests(batch * pages, PAGE_SIZE, requests)?;
            let table = PageTable::new(&stream, indices)?;
            let mut workspace = Workspace::with_sizes(&stream, 512 << 20, Workspace::DEFAULT_INT_BYTES)?;
            let mut time = |backend, split| -> Result<Option<f64>> {
                let spec =
                    AttentionSpec::new(T::DTYPE, HEAD_DIM).with_kv_dtype(K::DTYPE).with_backend(backend);
                let decode = match BatchDecode::new(&stream, &spec, heads) {
                    Ok(decode) => decode,
                    // Its module is not at hand, or cannot be.
                    Err(FlashInferError::Artifact(_) | FlashInferError::Unsupported { .. }) => {
                        return Ok(None);
                    }
                    Err(error) => return Err(error.into()),
                };
                gpu_time::<T, K>(cuda, (&decode, split), &mut workspace, &table, (batch, tokens)).map(Some)
            };
            let planned = Split::default();
            let cuda_cores = time(Backend::CudaCores, planned)?;
            let others =
                [(Backend::Fa2, planned), (Backend::Fa2, Split::disabled()), (Backend::Fa3, planned)];
            let mut times = vec![cuda_cores];
            for (backend, split) in others {
                times.push(time(backend, split)?);
            }
            let show = |time: &Option<f64>| time.map_or("–".into(), |time| format!("{time:.1}"));
            let ratio = |time: &Option<f64>| {
                let ratio = time.zip(cuda_cores).map(|(time, cuda_cores)| time / cuda_cores);
                ratio.map_or("–".into(), |ratio| format!("{ratio:.2}"))
            };
            let cells: Vec<String> = times.iter().map(show).chain(times[1..].iter().map(ratio)).collect();
            println!("| {group} | {batch} | {tokens} | {} |", cells.join(" | "));
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let Some(cuda) = gpu::start()? else { return Ok(()) };
    println!("{KV_HEADS} KV heads, head_dim {HEAD_DIM}, page {PAGE_SIZE}");
    table::<bf16, bf16>(&cuda)?;
    table::<f16, f16>(&cuda)?;
    table::<bf16, F8E4M3>(&cuda)
}
