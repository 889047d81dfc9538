//! Paged batch decode: FlashInfer's kernel on the GPU, held against the CPU reference.
//!
//! `cargo run --release --example paged_decode`

use flashinfer_rs::{
    DType, FlashInferRuntime, PageIndices, PageTable, Stream, TensorMut, TensorRef,
    attention::{AttentionSpec, BatchDecode, Heads, PlanOptions, RunOptions, Workspace},
    gpu::Tensor,
    kv::{KvLayout, PagedKv},
    reference,
};
use half::f16;
use rand::RngExt;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const HEADS: Heads = Heads::new(32, 8);
/// Of queries and outputs: a row for each of three requests.
const Q_SHAPE: [usize; 3] = [3, 32, 128];
/// Of keys and of values: 32 pages of 16 tokens.
const KV_SHAPE: [usize; 4] = [32, 16, 8, 128];

fn random(shape: &[usize]) -> Vec<f16> {
    let mut rng = rand::rng();
    (0..shape.iter().product()).map(|_| f16::from_f32(rng.random_range(-1.0..1.0))).collect()
}

fn main() -> Result<()> {
    let spec = AttentionSpec::new(DType::F16, 128);
    let (q, k, v) = (random(&Q_SHAPE), random(&KV_SHAPE), random(&KV_SHAPE));
    // The requests have 50, 17 and 300 tokens, whose pages lie anywhere.
    let third: Vec<i32> = (8..27).rev().collect();
    let requests = [(&[3, 0, 5, 1][..], 50), (&[7, 2], 17), (&third, 300)];
    let indices = PageIndices::from_requests(KV_SHAPE[0], KV_SHAPE[1], requests)?;

    let mut expected = vec![0.0f64; q.len()];
    let host_k = TensorRef::from_slice(&k, &KV_SHAPE)?;
    let host_v = TensorRef::from_slice(&v, &KV_SHAPE)?;
    reference::batch_decode(
        &spec,
        &TensorRef::from_slice(&q, &Q_SHAPE)?,
        &PagedKv::new(host_k, host_v, KvLayout::Nhd),
        &indices,
        &mut TensorMut::from_slice(&mut expected, &Q_SHAPE)?,
        None,
        &RunOptions::default(),
    )?;
    println!("CPU: the first output begins with {:.4?}", &expected[..4]);

    let gpus = FlashInferRuntime::get().and_then(|runtime| runtime.device_count());
    if !matches!(gpus, Ok(1..)) {
        println!(
            "GPU: not run. {}",
            gpus.map_or_else(|error| error.to_string(), |_| "There is none.".into())
        );
        return Ok(());
    }
    let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
    let decode = BatchDecode::new(&stream, &spec, HEADS)?;
    let table = PageTable::new(&stream, indices)?;
    let mut workspace = Workspace::new(&stream)?;
    let q = Tensor::from_slice(&stream, &Q_SHAPE, &q)?;
    let (k, v) = (Tensor::from_slice(&stream, &KV_SHAPE, &k)?, Tensor::from_slice(&stream, &KV_SHAPE, &v)?);
    let mut out = Tensor::<f16>::zeros(&stream, &Q_SHAPE)?;
    // A plan serves all layers of a step.
    let plan = decode.plan(&mut workspace, &table, &PlanOptions::default())?;
    plan.run(&q.view(), &PagedKv::new(k.view(), v.view(), KvLayout::Nhd), &mut out.view_mut())?;

    let out: Vec<f64> = out.to_vec()?.into_iter().map(f64::from).collect();
    println!("GPU: {:.4?}, by {} from {}", &out[..4], decode.module().name(), decode.module().source());
    let squares =
        out.iter().zip(&expected).map(|(out, expected)| [(out - expected).powi(2), expected * expected]);
    let [difference, whole] = squares.fold([0.0; 2], |[a, b], [d, e]| [a + d, b + e]);
    let error = (difference / whole).sqrt();
    println!("relative error {error:.1e}, expected at most 1e-3");
    if error <= 1e-3 { Ok(()) } else { Err("the GPU and the CPU disagree".into()) }
}
