//! Paged batch decode on the GPU and on the CPU, compared.
//!
//! `cargo run --release --example paged_decode`
//!
//! Two cases on random data: one request of 50 tokens in `f16`, and a batch
//! of ragged lengths in `bf16`. Each runs through the CPU reference, which is
//! held against a plain attention over the gathered tokens, and, where there
//! is a GPU, through FlashInfer's kernel, which is held against the reference.
//! Without a GPU it opens the modules all the same and says what is missing.
//! It exits with 0 only if all that ran agreed.

use std::{process::ExitCode, time::Instant};

use cudarc::driver::{CudaContext, DeviceRepr, ValidAsZeroBits};
use flashinfer_rs::{
    DType, Element, FlashInferRuntime, PageIndices, PageTable, Stream, TensorMut, TensorRef,
    attention::{AttentionSpec, BatchDecode, Heads, PlanOptions, RunOptions, Workspace},
    cudarc::{TensorExt, TensorExtMut},
    kv::{KvLayout, PagedKv},
    reference,
};
use half::{bf16, f16};
use rand::{RngExt, SeedableRng, rngs::StdRng};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const QO_HEADS: usize = 32;
const KV_HEADS: usize = 8;
const HEADS: Heads = Heads::new(QO_HEADS, KV_HEADS);
const HEAD_DIM: usize = 128;
const PAGE_SIZE: usize = 16;

/// The relative error up to which a result agrees with the reference: that of
/// rounding the output and the products to the element type.
fn bound(dtype: DType) -> f64 {
    if dtype == DType::F16 { 1e-3 } else { 8e-3 }
}

/// One case: inputs on the host, and what the reference makes of them.
struct Case<T> {
    lengths: Vec<usize>,
    indices: PageIndices,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    expected: Vec<f64>,
}

impl<T: Element + From32> Case<T> {
    fn random(lengths: &[usize], rng: &mut StdRng) -> Result<Self> {
        // Pages are handed out in a random order, as after a while of serving.
        let needed: usize = lengths.iter().map(|tokens| tokens.div_ceil(PAGE_SIZE)).sum();
        let mut free: Vec<i32> = (0..needed as i32).collect();
        for last in (1..free.len()).rev() {
            free.swap(last, rng.random_range(0..=last));
        }
        let mut rest = free.as_slice();
        let requests = lengths.iter().map(|&tokens| {
            let (pages, others) = rest.split_at(tokens.div_ceil(PAGE_SIZE));
            rest = others;
            (pages, tokens)
        });
        let indices = PageIndices::from_requests(needed, PAGE_SIZE, requests.collect::<Vec<_>>())?;
        let mut random = |len: usize| -> Vec<T> {
            (0..len).map(|_| T::from_f32(rng.random_range(-1.0..1.0f32))).collect()
        };
        let cache = needed * PAGE_SIZE * KV_HEADS * HEAD_DIM;
        let (q, k, v) = (random(lengths.len() * QO_HEADS * HEAD_DIM), random(cache), random(cache));
        let mut case = Self { lengths: lengths.to_vec(), indices, q, k, v, expected: Vec::new() };
        let mut expected = vec![f64::NAN; case.q.len()];
        let (q, kv) = (TensorRef::from_slice(&case.q, &case.q_shape())?, case.cache()?);
        let mut out = TensorMut::from_slice(&mut expected, &case.q_shape())?;
        reference::batch_decode(
            &spec::<T>(),
            &q,
            &kv,
            &case.indices,
            &mut out,
            None,
            &RunOptions::default(),
        )?;
        case.expected = expected;
        Ok(case)
    }

    fn q_shape(&self) -> [usize; 3] {
        [self.lengths.len(), QO_HEADS, HEAD_DIM]
    }

    fn cache_shape(&self) -> [usize; 4] {
        [self.indices.num_pages(), PAGE_SIZE, KV_HEADS, HEAD_DIM]
    }

    fn cache(&self) -> Result<PagedKv<'_>> {
        let k = TensorRef::from_slice(&self.k, &self.cache_shape())?;
        let v = TensorRef::from_slice(&self.v, &self.cache_shape())?;
        Ok(PagedKv::new(k, v, KvLayout::Nhd))
    }

    /// Plain attention over each request's tokens in order: another way to the
    /// same numbers, to hold the reference against.
    fn plain_attention(&self) -> Vec<f64> {
        let mut out = Vec::with_capacity(self.q.len());
        for (request, &tokens) in self.lengths.iter().enumerate() {
            let pages = self.indices.pages(request);
            for head in 0..QO_HEADS {
                let row = |cache: &[T], token: usize| -> Vec<f64> {
                    let slot = pages[token / PAGE_SIZE] as usize * PAGE_SIZE + token % PAGE_SIZE;
                    let start = (slot * KV_HEADS + head / (QO_HEADS / KV_HEADS)) * HEAD_DIM;
                    cache[start..start + HEAD_DIM].iter().map(|x| x.to_f64()).collect()
                };
                let start = (request * QO_HEADS + head) * HEAD_DIM;
                let q: Vec<f64> = self.q[start..start + HEAD_DIM].iter().map(|x| x.to_f64()).collect();
                let weights: Vec<f64> = (0..tokens)
                    .map(|token| {
                        let dot: f64 = row(&self.k, token).iter().zip(&q).map(|(k, q)| k * q).sum();
                        (dot / (HEAD_DIM as f64).sqrt()).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                let mut sum = vec![0.0; HEAD_DIM];
                for (token, weight) in weights.iter().enumerate() {
                    for (sum, v) in sum.iter_mut().zip(row(&self.v, token)) {
                        *sum += weight / total * v;
                    }
                }
                out.extend(sum);
            }
        }
        out
    }
}

/// The two element types of the example.
trait From32 {
    fn from_f32(value: f32) -> Self;
    fn to_f64(&self) -> f64;
}
impl From32 for f16 {
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn to_f64(&self) -> f64 {
        Self::to_f64(*self)
    }
}
impl From32 for bf16 {
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn to_f64(&self) -> f64 {
        Self::to_f64(*self)
    }
}

fn spec<T: Element>() -> AttentionSpec {
    AttentionSpec::new(T::DTYPE, HEAD_DIM)
}

/// ‖out − expected‖ / ‖expected‖.
fn relative_error(out: impl IntoIterator<Item = f64>, expected: &[f64]) -> f64 {
    let difference: f64 = out.into_iter().zip(expected).map(|(out, expected)| (out - expected).powi(2)).sum();
    (difference / expected.iter().map(|x| x * x).sum::<f64>()).sqrt()
}

/// Prints one comparison and says whether it agreed.
fn report(what: &str, error: f64, bound: f64) -> bool {
    let agrees = error <= bound; // false for NaN
    println!(
        "  {what}: relative error {error:.1e}, at most {bound:.0e}: {}",
        if agrees { "agrees" } else { "WRONG" }
    );
    agrees
}

/// Runs one case; `Ok(false)` if something disagreed.
fn run<T>(name: &str, lengths: &[usize], rng: &mut StdRng, gpu: bool) -> Result<bool>
where
    T: Element + From32 + DeviceRepr + ValidAsZeroBits,
{
    let case = Case::<T>::random(lengths, rng)?;
    println!(
        "{name}: q {:?}, cache {:?} {}, {} tokens",
        case.q_shape(),
        case.cache_shape(),
        T::DTYPE,
        lengths.iter().sum::<usize>()
    );
    let plain = case.plain_attention();
    let mut agrees = report(
        "CPU reference against plain attention",
        relative_error(case.expected.iter().copied(), &plain),
        1e-9,
    );

    if gpu {
        agrees &= on_gpu(&case)?;
    }
    Ok(agrees)
}

/// The kernel's result against the reference, and what plan and run cost.
fn on_gpu<T>(case: &Case<T>) -> Result<bool>
where
    T: Element + From32 + DeviceRepr + ValidAsZeroBits,
{
    const CALLS: usize = 50;
    let cuda = CudaContext::new(0)?.new_stream()?;
    let stream = Stream::from(&cuda);
    let decode = BatchDecode::new(&stream, &spec::<T>(), HEADS)?;
    println!("  module {}", decode.module().name());
    println!("  from {}, on {:?}", decode.module().source(), decode.backend());
    let (q, k, v) = (cuda.clone_htod(&case.q)?, cuda.clone_htod(&case.k)?, cuda.clone_htod(&case.v)?);
    let mut out = cuda.clone_htod(&vec![T::from_f32(f32::NAN); case.q.len()])?;
    let table = PageTable::new(&stream, case.indices.clone())?;
    let mut workspace = Workspace::new(&stream)?;
    {
        let q = q.tensor(&cuda, &case.q_shape())?;
        let (k, v) = (k.tensor(&cuda, &case.cache_shape())?, v.tensor(&cuda, &case.cache_shape())?);
        let (q, kv) = (q.view(), PagedKv::new(k.view(), v.view(), KvLayout::Nhd));
        let mut out = out.tensor_mut(&cuda, &case.q_shape())?;
        // The first calls load the kernels; they are not timed.
        decode.plan(&mut workspace, &table, &PlanOptions::default())?.run(&q, &kv, &mut out.view_mut())?;
        cuda.synchronize()?;
        let start = Instant::now();
        for _ in 0..CALLS {
            decode.plan(&mut workspace, &table, &PlanOptions::default())?;
        }
        let plan_time = start.elapsed() / CALLS as u32;
        let plan = decode.plan(&mut workspace, &table, &PlanOptions::default())?;
        cuda.synchronize()?;
        let start = Instant::now();
        for _ in 0..CALLS {
            plan.run(&q, &kv, &mut out.view_mut())?;
        }
        let run_time = start.elapsed() / CALLS as u32;
        cuda.synchronize()?;
        println!("  plan {plan_time:.1?}, run {run_time:.1?} (host, mean of {CALLS} calls)");
    }
    let out = cuda.clone_dtoh(&out)?;
    let error = relative_error(out.iter().map(From32::to_f64), &case.expected);
    Ok(report("GPU against CPU reference", error, bound(T::DTYPE)))
}

/// Whether the runtime starts, and there is a GPU to use it with.
fn look_around() -> bool {
    let runtime = match FlashInferRuntime::get() {
        Ok(runtime) => runtime,
        Err(error) => {
            println!("No kernels: the runtime does not start. {error:#}");
            return false;
        }
    };
    println!("libtvm_ffi {} from {}", runtime.tvm_ffi_version(), runtime.tvm_ffi_source());
    match runtime.device_count() {
        Ok(1..) => true,
        Ok(_) | Err(_) => {
            println!(
                "No GPU: kernels are not run here, only the CPU reference. They need an NVIDIA GPU and NVIDIA's \
                 driver 580 or newer; `cargo run --features doctor --bin flashinfer-doctor` tells what this machine lacks."
            );
            false
        }
    }
}

fn main() -> Result<ExitCode> {
    let seed = std::env::args().nth(1).map_or_else(|| Ok(rand::random()), |seed| seed.parse())?;
    println!("seed {seed}");
    let rng = &mut StdRng::seed_from_u64(seed);
    let gpu = look_around();
    let mut agrees = run::<f16>("one request", &[50], rng, gpu)?;
    agrees &= run::<bf16>("ragged batch", &[1, 16, 17, 300, 2000, 0, 64], rng, gpu)?;
    if !gpu {
        println!("The GPU part did not run.");
    }
    Ok(if agrees { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
