//! What it costs the host to enqueue a kernel: a bare launch, this crate, and
//! FlashInfer's Python API where it is installed, side by side in one run.
//!
//! `cargo bench --bench launch_overhead` needs an NVIDIA GPU. Each figure is
//! the median over repetitions of the time per call in a loop that does not
//! synchronize. Absolute times do not carry over to another machine; the
//! ratios, measured in one run, are what to quote.

mod gpu;

use std::{collections::BTreeMap, ffi::CString, path::Path, process::Command, sync::Arc, time::Instant};

use cudarc::driver::{CudaStream, result};
use flashinfer_rs::{
    AppendIndices, AppendTable, BoundedIndices, BoundedTable, DType, FlashInferRuntime, ModuleName,
    PageIndices, PageTable, Stream,
    activation::{self, ActivationOptions},
    attention::{AttentionSpec, Backend, BatchDecode, Heads, PlanMode, RunOptions, Workspace},
    cudarc::{TensorExt, TensorExtMut},
    norm,
    page::{self, KvLayout, PagedKv, PagedKvMut},
    rope::{self, CosSinCache, RopeFrequencies, RopeScaling, RopeTensors, Rotation},
    sampling::{self, Samples, SamplingOptions},
};
use half::bf16;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Calls per repetition: few enough that the launch queue does not fill.
const CALLS: usize = 100;
const REPETITIONS: usize = 60;
const WARM_UP: usize = 5;

const QO_HEADS: usize = 32;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const PAGE_SIZE: usize = 16;
const FFN: usize = 14336;
const MAX_POSITION: usize = 4096;
const VOCAB: usize = 32000;
/// Batch size and tokens per request of the decode cases.
const DECODE_CASES: [(usize, usize); 3] = [(1, 1024), (1, 32768), (64, 1024)];

/// A kernel that does nothing, for the floor.
const EMPTY_PTX: &str = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry empty() { ret; }\n";

/// The median microseconds per call.
fn host_time(cuda: &Arc<CudaStream>, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut times = Vec::with_capacity(REPETITIONS);
    for repetition in 0..WARM_UP + REPETITIONS {
        cuda.synchronize()?;
        let start = Instant::now();
        for _ in 0..CALLS {
            call()?;
        }
        let elapsed = start.elapsed().as_secs_f64() * 1e6 / CALLS as f64;
        if repetition >= WARM_UP {
            times.push(elapsed);
        }
    }
    cuda.synchronize()?;
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn bare_launches(cuda: &Arc<CudaStream>, launches: usize) -> Result<f64> {
    let ptx = CString::new(EMPTY_PTX)?;
    // SAFETY: the image is NUL-terminated PTX of a kernel without parameters.
    let (module, function) = unsafe {
        let module = result::module::load_data(ptx.as_ptr().cast())?;
        (module, result::module::get_function(module, CString::new("empty")?)?)
    };
    let time = host_time(cuda, || {
        for _ in 0..launches {
            // SAFETY: the kernel takes no parameters and touches nothing.
            unsafe { result::launch_kernel(function, (1, 1, 1), (32, 1, 1), 0, cuda.cu_stream(), &mut [])? };
        }
        Ok(())
    });
    // SAFETY: every launch has finished: `host_time` synchronizes last.
    unsafe { result::module::unload(module)? };
    time
}

/// One row of the result: this crate, and how many kernels it launches.
struct Row {
    name: String,
    rust: f64,
    launches: Option<usize>,
}

fn measure(cuda: &Arc<CudaStream>) -> Result<Vec<Row>> {
    let stream = Stream::from(cuda);
    let runtime = FlashInferRuntime::get()?;
    runtime.preload([&ModuleName::NORM, &ModuleName::PAGE])?;
    let mut rows = Vec::new();
    let mut row = |name: String, rust, launches| rows.push(Row { name, rust, launches });

    let (input, weight) = (cuda.alloc_zeros::<bf16>(4096)?, cuda.alloc_zeros::<bf16>(4096)?);
    let mut out = cuda.alloc_zeros::<bf16>(4096)?;
    {
        let (input, weight) = (input.tensor(cuda, &[1, 4096])?, weight.tensor(cuda, &[4096])?);
        let mut out = out.tensor_mut(cuda, &[1, 4096])?;
        let options = norm::NormOptions::default();
        let (input, weight) = (input.view(), weight.view());
        let time =
            host_time(cuda, || Ok(norm::rmsnorm(&stream, &mut out.view_mut(), &input, &weight, &options)?))?;
        row("rmsnorm 1x4096".into(), time, Some(1));
    }
    {
        let input = cuda.alloc_zeros::<bf16>(2 * FFN)?;
        let mut out = cuda.alloc_zeros::<bf16>(FFN)?;
        let input = input.tensor(cuda, &[1, 2 * FFN])?;
        let mut out = out.tensor_mut(cuda, &[1, FFN])?;
        let (input, options) = (input.view(), ActivationOptions::default());
        let time = host_time(cuda, || {
            Ok(activation::silu_and_mul(&stream, &mut out.view_mut(), &input, &options)?)
        })?;
        row("silu_and_mul".into(), time, Some(1));
    }
    {
        let cache = CosSinCache::new(
            &stream,
            &RopeFrequencies::new(HEAD_DIM, 1e4, &RopeScaling::default())?,
            MAX_POSITION,
        )?;
        let positions = BoundedTable::new(&stream, BoundedIndices::new(MAX_POSITION, vec![7])?)?;
        let rotation = Rotation::new(cache.view()?, &positions);
        let mut q = cuda.alloc_zeros::<bf16>(QO_HEADS * HEAD_DIM)?;
        let mut k = cuda.alloc_zeros::<bf16>(KV_HEADS * HEAD_DIM)?;
        let mut q = q.tensor_mut(cuda, &[1, QO_HEADS, HEAD_DIM])?;
        let mut k = k.tensor_mut(cuda, &[1, KV_HEADS, HEAD_DIM])?;
        let time = host_time(cuda, || {
            let mut tensors = RopeTensors::InPlace { q: q.view_mut(), k: k.view_mut() };
            Ok(rope::apply_rope_pos_ids_cos_sin_cache(&stream, &mut tensors, &rotation)?)
        })?;
        row("rope in place".into(), time, Some(1));
    }
    {
        let probs = cuda.clone_htod(&[1.0 / VOCAB as f32; VOCAB])?;
        let (mut output, mut valid) = (cuda.alloc_zeros::<i32>(1)?, cuda.alloc_zeros::<u8>(1)?);
        let probs = probs.tensor(cuda, &[1, VOCAB])?;
        let (mut output, mut valid) = (output.tensor_mut(cuda, &[1])?, valid.tensor_mut(cuda, &[1])?);
        let (probs, options) = (probs.view(), SamplingOptions::default());
        let time = host_time(cuda, || {
            let mut samples = Samples::new(output.view_mut(), valid.view_mut());
            Ok(sampling::top_p_sampling_from_probs(&stream, &mut samples, &probs, 0.9.into(), &options)?)
        })?;
        row("top_p_sampling".into(), time, Some(1));
    }

    let heads = Heads { num_qo_heads: QO_HEADS, num_kv_heads: KV_HEADS };
    let mut workspace = Workspace::new(&stream)?;
    for (batch, tokens) in DECODE_CASES {
        let pages = tokens / PAGE_SIZE;
        let numbers: Vec<i32> = (0..(batch * pages) as i32).collect();
        let requests = numbers.chunks(pages).map(|pages| (pages, tokens));
        let indices = PageIndices::from_requests(batch * pages, PAGE_SIZE, requests)?;
        let cache_len = batch * tokens * KV_HEADS * HEAD_DIM;
        let shape = [batch * pages, PAGE_SIZE, KV_HEADS, HEAD_DIM];
        let (mut k, mut v) = (cuda.alloc_zeros::<bf16>(cache_len)?, cuda.alloc_zeros::<bf16>(cache_len)?);
        let q = cuda.alloc_zeros::<bf16>(batch * QO_HEADS * HEAD_DIM)?;
        let mut out = cuda.alloc_zeros::<bf16>(batch * QO_HEADS * HEAD_DIM)?;
        let table = PageTable::new(&stream, indices.clone())?;
        let name = format!("b{batch} L{tokens}");

        if batch == 64 {
            let new = cuda.alloc_zeros::<bf16>(batch * KV_HEADS * HEAD_DIM)?;
            let ends: Vec<i32> = (0..=batch as i32).collect();
            let append = AppendTable::new(&stream, AppendIndices::last_tokens(&indices, &ends)?)?;
            let new = new.tensor(cuda, &[batch, KV_HEADS, HEAD_DIM])?;
            let (mut k, mut v) = (k.tensor_mut(cuda, &shape)?, v.tensor_mut(cuda, &shape)?);
            let new = new.view();
            let time = host_time(cuda, || {
                let mut cache = PagedKvMut::new(k.view_mut(), v.view_mut(), KvLayout::Nhd);
                Ok(page::append_paged_kv_cache(&stream, &new, &new, &append, &mut cache, &table)?)
            })?;
            row("append 64 tokens".into(), time, Some(1));
        }

        let q = q.tensor(cuda, &[batch, QO_HEADS, HEAD_DIM])?;
        let mut out = out.tensor_mut(cuda, &[batch, QO_HEADS, HEAD_DIM])?;
        let (k, v) = (k.tensor(cuda, &shape)?, v.tensor(cuda, &shape)?);
        let (q, kv) = (q.view(), PagedKv::new(k.view(), v.view(), KvLayout::Nhd));
        let options = RunOptions::default();
        for (backend, cores) in [(Backend::CudaCores, "CUDA"), (Backend::Fa2, "tensor")] {
            let spec = AttentionSpec::new(DType::BF16, HEAD_DIM).with_backend(backend);
            let decode = BatchDecode::new(runtime, &spec, heads)?;
            let time = host_time(cuda, || {
                decode.plan(&mut workspace, &table, PlanMode::Eager)?;
                Ok(())
            })?;
            row(format!("decode.plan {name}, {cores} cores"), time, None);
            let plan = decode.plan(&mut workspace, &table, PlanMode::Eager)?;
            let launches = if plan.splits_kv() { 2 } else { 1 };
            let time = host_time(cuda, || Ok(plan.run(&q, &kv, &mut out.view_mut(), None, &options)?))?;
            row(format!("decode.run {name}, {cores} cores"), time, Some(launches));
        }
    }
    Ok(rows)
}

/// The same calls through FlashInfer's Python API; `Err` says why there are none.
fn python() -> std::result::Result<BTreeMap<String, f64>, String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/launch_overhead.py");
    let script = if script.is_file() { script } else { "benches/launch_overhead.py".into() };
    let output = Command::new("python3")
        .arg(script)
        .args([CALLS.to_string(), REPETITIONS.to_string(), WARM_UP.to_string()])
        .output()
        .map_err(|error| format!("python3 cannot be run: {error}"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(stderr.lines().last().unwrap_or("python3 failed").to_owned());
    }
    let stdout = String::from_utf8_lossy(&output.stdout);
    Ok(stdout
        .lines()
        .filter_map(|line| line.strip_prefix("result\t")?.split_once('\t'))
        .filter_map(|(name, time)| Some((name.to_owned(), time.parse().ok()?)))
        .collect())
}

fn main() -> Result<()> {
    let Some(cuda) = gpu::start()? else { return Ok(()) };
    let floor = [bare_launches(&cuda, 1)?, bare_launches(&cuda, 2)?];
    let rows = measure(&cuda)?;
    let python = python();
    if let Err(reason) = &python {
        println!("FlashInfer's Python API is not measured: {reason}");
    }
    println!("bare launch: {:.2} µs; two: {:.2} µs", floor[0], floor[1]);
    println!(
        "| host time to enqueue | Rust µs | bare launches µs | Rust / bare | Python µs | Rust / Python |"
    );
    println!("|---|---|---|---|---|---|");
    for row in rows {
        let bare = row.launches.map(|launches| floor[launches - 1]);
        let python = python.as_ref().ok().and_then(|times| times.get(&row.name).copied());
        let cell = |value: Option<f64>| value.map_or("–".into(), |value| format!("{value:.2}"));
        println!(
            "| {} | {:.2} | {} | {} | {} | {} |",
            row.name,
            row.rust,
            cell(bare),
            cell(bare.map(|bare| row.rust / bare)),
            cell(python),
            cell(python.map(|python| row.rust / python)),
        );
    }
    Ok(())
}
