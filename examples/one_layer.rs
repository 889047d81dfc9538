//! One layer of a llama model with random weights: what an engine calls, in which order.
//!
//! `cargo run --release --example one_layer`
//!
//! Two prompts go through the layer on the CPU, by `flashinfer_rs::reference`, and, where there
//! is a GPU, through FlashInfer's kernels, with cuBLASLt for the products of matrices.

use cudarc::{
    cublaslt::{CudaBlasLT, Matmul, MatmulConfig},
    driver::{CudaContext, CudaSlice},
};
use flashinfer_rs::{
    DType, FlashInferRuntime, Stream, TensorMut, TensorRef,
    activation::{ActivationOptions, silu_and_mul},
    attention::{AttentionSpec, BatchPrefill, Heads, PlanOptions, RunOptions, Workspace},
    gpu::Tensor,
    kv::{Batch, BatchCapacity, BatchTables, HeadsShape, KvLayout, PageAllocator, PagedKvCache, Sequence},
    norm::{NormOptions, fused_add_rmsnorm, rmsnorm},
    page::append_paged_kv_cache,
    reference::{self, Mask},
    rope::{
        CosSinCache, RopeFrequencies, RopeScaling, RopeTensors, Rotation, apply_rope_pos_ids_cos_sin_cache,
    },
};
use half::f16;
use rand::RngExt;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const HIDDEN: usize = 512;
const INTERMEDIATE: usize = 1024;
const QO: usize = 8;
const KV: usize = 2;
const HEAD_DIM: usize = 64;
const PAGES: usize = 16;
const PAGE_SIZE: usize = 4;
/// Tokens of the prompts.
const PROMPTS: [usize; 2] = [11, 5];
const ROWS: usize = PROMPTS[0] + PROMPTS[1];
/// The relative error up to which `f16` agrees with `f32`.
const BOUND: f32 = 5e-3;

/// Weights; those of products have a row for each output.
struct Layer {
    attention_norm: Vec<f16>,
    qkv: Vec<f16>,
    attention_output: Vec<f16>,
    mlp_norm: Vec<f16>,
    gate_up: Vec<f16>,
    down: Vec<f16>,
    /// That of the next layer, whose norm is computed with this layer's last sum.
    next_norm: Vec<f16>,
}

impl Layer {
    fn random() -> Self {
        let product = |outputs: usize, inputs: usize| {
            let bound = (3.0 / inputs as f32).sqrt();
            random(outputs * inputs, -bound, bound)
        };
        Self {
            attention_norm: random(HIDDEN, 0.5, 1.5),
            qkv: product((QO + KV + KV) * HEAD_DIM, HIDDEN),
            attention_output: product(HIDDEN, QO * HEAD_DIM),
            mlp_norm: random(HIDDEN, 0.5, 1.5),
            gate_up: product(2 * INTERMEDIATE, HIDDEN),
            down: product(HIDDEN, INTERMEDIATE),
            next_norm: random(HIDDEN, 0.5, 1.5),
        }
    }
}

fn random(len: usize, least: f32, most: f32) -> Vec<f16> {
    let mut rng = rand::rng();
    (0..len).map(|_| f16::from_f32(rng.random_range(least..most))).collect()
}

/// The prompts, with their tokens appended, and what the cache keeps of them.
fn prompts(dtype: DType) -> Result<(PageAllocator, Batch, HeadsShape)> {
    let pool = PageAllocator::new(PAGES, PAGE_SIZE)?;
    let mut batch = Batch::new(&pool);
    for _ in PROMPTS {
        batch.push(Sequence::new(&pool))?;
    }
    batch.append(PROMPTS)?;
    let (num_kv_heads, head_dim, layout) = (KV, HEAD_DIM, KvLayout::Nhd);
    Ok((pool, batch, HeadsShape { num_layers: 1, num_kv_heads, head_dim, dtype, layout }))
}

/// The layer in `f16`, through FlashInfer's kernels.
fn on_gpu(layer: &Layer, frequencies: &RopeFrequencies, input: &[f16]) -> Result<Vec<f32>> {
    // Once for each process: what may have to be fetched, opened or uploaded.
    let cuda = CudaContext::new(0)?.new_stream()?;
    let stream = &Stream::from(&cuda);
    let prefill = BatchPrefill::new(stream, &AttentionSpec::new(DType::F16, HEAD_DIM), Heads::new(QO, KV))?;
    FlashInferRuntime::get()?.preload_cublas()?; // cudarc finds it in the process then.
    let blas = CudaBlasLT::new(cuda.clone())?;
    let cos_sin = CosSinCache::new(stream, frequencies, PAGES * PAGE_SIZE)?;
    let [attention_norm, mlp_norm, next_norm] = [&layer.attention_norm, &layer.mlp_norm, &layer.next_norm]
        .map(|norm| Tensor::from_slice(stream, &[HIDDEN], norm));
    let [qkv, attention_output, gate_up, down] =
        [&layer.qkv, &layer.attention_output, &layer.gate_up, &layer.down]
            .map(|weight| cuda.clone_htod(weight));
    // `x · weightᵀ`.
    let multiply = |x: Tensor<f16>, weight: &CudaSlice<f16>, shape: &[usize]| -> Result<Tensor<f16>> {
        let (x, outputs) = (x.into_cudarc()?, shape[1..].iter().product::<usize>());
        let inputs = weight.len() / outputs;
        let mut product = cuda.alloc_zeros::<f16>(ROWS * outputs)?;
        #[rustfmt::skip]
        let config = MatmulConfig {
            transa: true, transb: false, transc: false, alpha: 1.0, beta: 0.0,
            m: outputs as u64, n: ROWS as u64, k: inputs as u64,
            lda: inputs as i64, ldb: inputs as i64, ldc: outputs as i64,
            stride_a: None, stride_b: None, stride_c: None, stride_bias: None, batch_size: None,
        };
        // SAFETY: cuBLAS counts by columns: to it the weight is `[inputs, outputs]`, `x` is
        // `[inputs, rows]` and the product `[outputs, rows]`. They have that many elements, without gaps.
        unsafe { blas.matmul(config, weight, &x, &mut product, None, None)? };
        Ok(Tensor::from_cudarc(product, shape)?)
    };

    // Once for each step: the index arrays of the batch, and the plan for them.
    let (pool, batch, shape) = prompts(DType::F16)?;
    let mut cache = PagedKvCache::new(stream, &pool, &[shape])?;
    let capacity = BatchCapacity { requests: PROMPTS.len(), pages: PAGES, tokens: ROWS };
    let tables = BatchTables::new(stream, &batch, capacity)?;
    let mut workspace = Workspace::new(stream)?;
    let plan = prefill.plan_paged(&mut workspace, &tables, &PlanOptions::causal())?;

    // Once for each layer, but for the first norm.
    let norm = NormOptions::with_eps(1e-5);
    let mut residual = Tensor::from_slice(stream, &[ROWS, HIDDEN], input)?;
    let mut x = Tensor::<f16>::zeros(stream, &[ROWS, HIDDEN])?;
    rmsnorm(stream, &mut x.view_mut(), &residual.view(), &attention_norm?.view(), &norm)?;
    let mut qkv = multiply(x, &qkv?, &[ROWS, QO + KV + KV, HEAD_DIM])?;
    let (mut q, keys_and_values) = qkv.view_mut().split_at(1, QO)?;
    let (mut k, v) = keys_and_values.split_at(1, KV)?;
    let mut turned = RopeTensors::InPlace { q: q.reborrow(), k: k.reborrow() };
    apply_rope_pos_ids_cos_sin_cache(stream, &mut turned, &Rotation::new(cos_sin.view()?, &tables))?;
    append_paged_kv_cache(stream, &k.as_ref(), &v.as_ref(), &tables.slots(), &mut cache.layer_mut(0)?)?;
    let mut attention = Tensor::<f16>::zeros(stream, &[ROWS, QO, HEAD_DIM])?;
    plan.run(&q.as_ref(), &cache.layer(0)?, &mut attention.view_mut())?;
    let mut x = multiply(attention, &attention_output?, &[ROWS, HIDDEN])?;
    fused_add_rmsnorm(stream, &mut x.view_mut(), &mut residual.view_mut(), &mlp_norm?.view(), &norm)?;
    let x = multiply(x, &gate_up?, &[ROWS, 2 * INTERMEDIATE])?;
    let mut inner = Tensor::<f16>::zeros(stream, &[ROWS, INTERMEDIATE])?;
    silu_and_mul(stream, &mut inner.view_mut(), &x.view(), &ActivationOptions::default())?;
    let mut x = multiply(inner, &down?, &[ROWS, HIDDEN])?;
    fused_add_rmsnorm(stream, &mut x.view_mut(), &mut residual.view_mut(), &next_norm?.view(), &norm)?;
    Ok(x.to_vec()?.into_iter().map(f32::from).collect())
}

/// The same in `f32`, through the CPU reference.
fn on_cpu(layer: &Layer, frequencies: &RopeFrequencies, input: &[f16]) -> Result<Vec<f32>> {
    let (pool, batch, shape) = prompts(DType::F32)?;
    let mut cache = PagedKvCache::on_host(&pool, &[shape])?;
    let norm = NormOptions::with_eps(1e-5);
    let (wide, q_shape, kv_shape) = ([ROWS, HIDDEN], [ROWS, QO, HEAD_DIM], [ROWS, KV, HEAD_DIM]);
    let mut residual: Vec<f32> = input.iter().copied().map(f32::from).collect();
    let mut x = vec![0.0; ROWS * HIDDEN];
    reference::rmsnorm(
        &mut TensorMut::from_slice(&mut x, &wide)?,
        &TensorRef::from_slice(&residual, &wide)?,
        &TensorRef::from_slice(&layer.attention_norm, &[HIDDEN])?,
        &norm,
    )?;
    let qkv = multiply(&x, &layer.qkv, HIDDEN);
    let heads = |range: std::ops::Range<usize>| -> Vec<f32> {
        let rows = qkv.chunks_exact((QO + KV + KV) * HEAD_DIM);
        rows.flat_map(|row| &row[range.start * HEAD_DIM..range.end * HEAD_DIM]).copied().collect()
    };
    let (mut q, mut k, v) = (heads(0..QO), heads(QO..QO + KV), heads(QO + KV..QO + KV + KV));
    let cos_sin = frequencies.cos_sin_rows(PAGES * PAGE_SIZE);
    reference::apply_rope_pos_ids_cos_sin_cache(
        &mut RopeTensors::InPlace {
            q: TensorMut::from_slice(&mut q, &q_shape)?,
            k: TensorMut::from_slice(&mut k, &kv_shape)?,
        },
        &Rotation {
            cos_sin_cache: TensorRef::from_slice(&cos_sin, &[cos_sin.len() / HEAD_DIM, HEAD_DIM])?,
            pos_ids: batch.append_indices().positions(),
            interleave: false,
        },
    )?;
    reference::append_paged_kv_cache(
        &TensorRef::from_slice(&k, &kv_shape)?,
        &TensorRef::from_slice(&v, &kv_shape)?,
        &batch.slots(),
        &mut cache.layer_mut(0)?,
    )?;
    let mut attention = vec![0.0; q.len()];
    reference::batch_prefill_paged(
        &AttentionSpec::new(DType::F32, HEAD_DIM),
        &TensorRef::from_slice(&q, &q_shape)?,
        &cache.layer(0)?,
        batch.queries(),
        batch.pages(),
        &mut TensorMut::from_slice(&mut attention, &q_shape)?,
        None,
        Mask::Causal,
        &RunOptions::default(),
    )?;
    let mut x = multiply(&attention, &layer.attention_output, QO * HEAD_DIM);
    let mut add_and_norm = |x: &mut [f32], weight: &[f16]| {
        reference::fused_add_rmsnorm(
            &mut TensorMut::from_slice(x, &wide)?,
            &mut TensorMut::from_slice(&mut residual, &wide)?,
            &TensorRef::from_slice(weight, &[HIDDEN])?,
            &norm,
        )
    };
    add_and_norm(&mut x, &layer.mlp_norm)?;
    let gate_up = multiply(&x, &layer.gate_up, HIDDEN);
    let mut inner = vec![0.0f32; ROWS * INTERMEDIATE];
    reference::silu_and_mul(
        &mut TensorMut::from_slice(&mut inner, &[ROWS, INTERMEDIATE])?,
        &TensorRef::from_slice(&gate_up, &[ROWS, 2 * INTERMEDIATE])?,
        &ActivationOptions::default(),
    )?;
    let mut x = multiply(&inner, &layer.down, INTERMEDIATE);
    add_and_norm(&mut x, &layer.next_norm)?;
    Ok(x)
}

/// `x · weightᵀ` for rows of `inputs` elements.
fn multiply(x: &[f32], weight: &[f16], inputs: usize) -> Vec<f32> {
    let dot = |row: &[f32], weight: &[f16]| row.iter().zip(weight).map(|(x, w)| x * w.to_f32()).sum();
    x.chunks_exact(inputs)
        .flat_map(|row| weight.chunks_exact(inputs).map(move |weight| dot(row, weight)))
        .collect()
}

fn main() -> Result<()> {
    let (layer, input) = (Layer::random(), random(ROWS * HIDDEN, -1.0, 1.0));
    let frequencies = RopeFrequencies::new(HEAD_DIM, 1e4, &RopeScaling::None)?;
    let expected = on_cpu(&layer, &frequencies, &input)?;
    println!("CPU: the first token's row begins with {:.4?}", &expected[..4]);
    let gpus = FlashInferRuntime::get().and_then(|runtime| runtime.device_count());
    if !matches!(gpus, Ok(1..)) {
        println!(
            "GPU: not run. {}",
            gpus.map_or_else(|error| error.to_string(), |_| "There is none.".into())
        );
        return Ok(());
    }
    let out = on_gpu(&layer, &frequencies, &input)?;
    println!("GPU: {:.4?}", &out[..4]);
    let squares = |[d, e]: [f32; 2], (a, b): (&f32, &f32)| [d + (a - b).powi(2), e + b.powi(2)];
    let [difference, whole] = out.iter().zip(&expected).fold([0.0; 2], squares);
    let error = (difference / whole).sqrt();
    println!("relative error {error:.1e}, expected at most {BOUND:.0e}");
    if error <= BOUND { Ok(()) } else { Err("the GPU and the CPU disagree".into()) }
}
