//! One layer of a language model, from a GGUF file to logits: what an engine calls, in which order.
//!
//! `cargo run --release --example one_layer -- [MODEL.gguf]`
//!
//! A prompt runs through the first layer, the last norm and the output head: on the CPU
//! through `flashinfer_rs::reference`, and where there is a GPU, also through FlashInfer's
//! kernels, with cuBLASLt. Without a file it takes SmolLM2-135M-Instruct, fetched once.

#[path = "generate/cpu.rs"]
mod cpu;
#[allow(dead_code, reason = "what only `generate` uses")]
#[path = "generate/engine.rs"]
mod engine;
#[allow(dead_code, reason = "what only `generate` uses")]
#[path = "generate/model.rs"]
mod model;

use candle_core::{Device, Tensor};
use cudarc::{
    cublaslt::{CudaBlasLT, Matmul, MatmulConfig},
    driver::{CudaContext, CudaSlice},
};
use flashinfer_rs::{
    DType, FlashInferRuntime, ModuleName, Stream,
    activation::{ActivationOptions, silu_and_mul},
    artifacts::{Fetch, Member, Store, StoreConfig},
    attention::{AttentionSpec, BatchPrefill, PlanOptions, Workspace},
    cudarc::{TensorExt, TensorExtMut},
    kv::{Batch, BatchCapacity, BatchTables, KvLayout, PageAllocator, PagedKvCache, Sequence},
    norm::{NormOptions, fused_add_rmsnorm, rmsnorm},
    page::append_paged_kv_cache,
    rope::{CosSinCache, RopeTensors, Rotation, apply_rope_pos_ids_cos_sin_cache},
};
use half::f16;

use crate::{
    cpu::Cpu,
    engine::{Engine, Step},
    model::{Biases, Config, Ends, Layer, Model},
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// "The capital of France is", as SmolLM2's tokens.
const TOKENS: [u32; 5] = [504, 3575, 282, 4649, 314];
const PAGES: usize = 4;
const PAGE_SIZE: usize = 4;
/// The relative error up to which `f16` agrees with `f32`; rounding alone makes 6e-4.
const BOUND: f32 = 5e-3;

/// Logits of all tokens, `[tokens, vocab_size]`, through FlashInfer's kernels in `f16`.
fn on_gpu(runtime: &FlashInferRuntime, config: &Config, layer: &Layer, ends: &Ends) -> Result<Vec<f32>> {
    let Config { hidden_size, intermediate_size, heads, head_dim, .. } = *config;
    let (qo, kv, rows) = (heads.num_qo_heads, heads.num_kv_heads, TOKENS.len());
    let wide = [rows, hidden_size];

    // Once per process: what may have to be fetched, opened or looked up.
    let cuda = CudaContext::new(0)?.new_stream()?;
    let stream = &Stream::from(&cuda);
    runtime.preload(&[ModuleName::NORM, ModuleName::ROPE, ModuleName::PAGE, ModuleName::SILU_AND_MUL])?;
    let prefill = BatchPrefill::new(stream, &AttentionSpec::new(DType::F16, head_dim), heads)?;
    runtime.cublas_version()?; // Opens cuBLASLt, which cudarc then finds in the process.
    let blas = CudaBlasLT::new(cuda.clone())?;
    let cos_sin = CosSinCache::new(stream, &config.rope, PAGES * PAGE_SIZE)?;
    let upload = |values: &[f32]| {
        cuda.clone_htod(&values.iter().map(|&value| f16::from_f32(value)).collect::<Vec<_>>())
    };
    // `x · weightᵀ`. An engine uploads its weights once, not where it uses them.
    let multiply = |x: &CudaSlice<f16>, weight: &Tensor| -> Result<CudaSlice<f16>> {
        let ((out, input), weight) = (weight.dims2()?, upload(&values(weight)?)?);
        let mut product = cuda.alloc_zeros::<f16>(x.len() / input * out)?;
        #[rustfmt::skip]
        let config = MatmulConfig {
            transa: true, transb: false, transc: false, alpha: 1.0, beta: 0.0,
            m: out as u64, n: (x.len() / input) as u64, k: input as u64,
            lda: input as i64, ldb: input as i64, ldc: out as i64,
            stride_a: None, stride_b: None, stride_c: None, stride_bias: None, batch_size: None,
        };
        // SAFETY: cuBLAS counts by columns: to it the weight is `[input, out]`, `x` is `[input, rows]`
        // and the product `[out, rows]`. They have that many elements, without gaps.
        unsafe { blas.matmul(config, &weight, x, &mut product, None, None)? };
        Ok(product)
    };

    // Once per step: the index arrays of the batch, and the plan for them.
    let (pool, batch) = one_request()?;
    let mut cache = PagedKvCache::new(stream, &pool, &[config.kv_shape(DType::F16, KvLayout::Nhd)])?;
    let capacity = BatchCapacity { requests: 1, pages: PAGES, tokens: rows };
    let BatchTables { pages, queries, append, .. } = BatchTables::new(stream, &batch, capacity)?;
    let (mut workspace, causal) = (Workspace::new(stream)?, PlanOptions::causal());
    let plan = prefill.plan_paged(&mut workspace, &queries, &pages, &causal)?;

    // Once per layer, from here to the second `add_and_norm`. The norm before the first stands alone.
    let norm = NormOptions::with_eps(config.rms_eps);
    let tokens = Tensor::new(&TOKENS, &Device::Cpu)?;
    let mut residual = upload(&values(&ends.embedding.index_select(&tokens, 0)?)?)?;
    let mut x = cuda.alloc_zeros::<f16>(rows * hidden_size)?;
    rmsnorm(
        stream,
        &mut x.tensor_mut(&cuda, &wide)?.view_mut(),
        &residual.tensor(&cuda, &wide)?.view(),
        &upload(&layer.attention_norm)?.tensor(&cuda, &[hidden_size])?.view(),
        &norm,
    )?;
    let mut qkv = multiply(&x, &layer.qkv.weight)?;
    let mut qkv = qkv.tensor_mut(&cuda, &[rows, qo + kv + kv, head_dim])?;
    let (mut q, keys_and_values) = qkv.view_mut().split_at(1, qo)?;
    let (mut k, v) = keys_and_values.split_at(1, kv)?;
    let mut turned = RopeTensors::InPlace { q: q.reborrow(), k: k.reborrow() };
    let rotation = Rotation::interleaved(cos_sin.view()?, &append); // The order of rows in GGUF files.
    apply_rope_pos_ids_cos_sin_cache(stream, &mut turned, &rotation)?;
    append_paged_kv_cache(stream, &k.as_ref(), &v.as_ref(), &append, &mut cache.layer_mut(0, 0)?, &pages)?;
    let mut attention = cuda.alloc_zeros::<f16>(rows * qo * head_dim)?;
    let mut out = attention.tensor_mut(&cuda, &[rows, qo, head_dim])?;
    plan.run(&q.as_ref(), &cache.layer(0, 0)?, &mut out.view_mut())?;
    drop(out);
    x = multiply(&attention, &layer.attention_output.weight)?;
    let mut add_and_norm = |x: &mut CudaSlice<f16>, weight: &[f32]| -> Result<()> {
        Ok(fused_add_rmsnorm(
            stream,
            &mut x.tensor_mut(&cuda, &wide)?.view_mut(),
            &mut residual.tensor_mut(&cuda, &wide)?.view_mut(),
            &upload(weight)?.tensor(&cuda, &[hidden_size])?.view(),
            &norm,
        )?)
    };
    add_and_norm(&mut x, &layer.mlp_norm)?;
    let gate_up = multiply(&x, &layer.gate_up.weight)?;
    let mut inner = cuda.alloc_zeros::<f16>(rows * intermediate_size)?;
    silu_and_mul(
        stream,
        &mut inner.tensor_mut(&cuda, &[rows, intermediate_size])?.view_mut(),
        &gate_up.tensor(&cuda, &[rows, 2 * intermediate_size])?.view(),
        &ActivationOptions::default(),
    )?;
    x = multiply(&inner, &layer.down.weight)?;
    add_and_norm(&mut x, &ends.norm)?; // With the weight of the next layer's norm, if there is one.

    let logits = multiply(&x, ends.head.as_ref().unwrap_or(&ends.embedding))?;
    Ok(cuda.clone_dtoh(&logits)?.iter().map(|logit| logit.to_f32()).collect())
}

/// The same through the CPU reference in `f32`.
fn on_cpu(config: &Config, layer: &Layer, ends: &Ends) -> Result<Vec<f32>> {
    let (pool, batch) = one_request()?;
    let mut cpu = Cpu::new(config, ends.clone(), [Ok(layer.clone())].into_iter(), &pool)?;
    let outputs: Vec<_> = (0..TOKENS.len()).collect();
    cpu.step(&Step { batch: &batch, tokens: &TOKENS, outputs: &outputs })?;
    cpu.logits()
}

/// A pool of pages, and a batch of one request, to which the tokens were appended.
fn one_request() -> Result<(PageAllocator, Batch)> {
    let pool = PageAllocator::new(PAGES, PAGE_SIZE)?;
    let mut batch = Batch::new(&pool);
    batch.push(Sequence::new(&pool))?;
    batch.append([TOKENS.len()])?;
    Ok((pool, batch))
}

fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}

fn main() -> Result<()> {
    let model = Model::open(&match std::env::args_os().nth(1) {
        Some(path) => path.into(),
        None => Store::open(StoreConfig::from_env()?)?.locate(&Member::SmolLm2, Fetch::Allowed)?.path,
    })?;
    let (config, ends) = (Config { num_layers: 1, ..model.config.clone() }, model.ends()?);
    let layer = model.layers().next().ok_or("the model has no layers")??;
    if config.experts.is_some() || config.biases != Biases::default() {
        return Err("the model has biases or experts; the example `generate` runs it".into());
    }
    println!("Most likely after {TOKENS:?}, by the first layer of {}:", model.config.num_layers);
    let report = |device: &str, logits: &[f32]| {
        let mut tokens: Vec<_> = logits[logits.len() - config.vocab_size..].iter().enumerate().collect();
        tokens.sort_by(|a, b| b.1.total_cmp(a.1));
        println!("{device}: tokens and their logits {:.3?}", &tokens[..tokens.len().min(5)]);
    };
    let expected = on_cpu(&config, &layer, &ends)?;
    report("CPU", &expected);
    match FlashInferRuntime::get().and_then(|runtime| Ok((runtime, runtime.device_count()?))) {
        Err(error) => println!("GPU: this part did not run. {error}"),
        Ok((_, 0)) => println!("GPU: this part did not run. There is none."),
        Ok((runtime, _)) => {
            let logits = on_gpu(runtime, &config, &layer, &ends)?;
            report("GPU", &logits);
            let squares = |[d, e]: [f32; 2], (a, b): (&f32, &f32)| [d + (a - b).powi(2), e + b.powi(2)];
            let [difference, whole] = logits.iter().zip(&expected).fold([0.0; 2], squares);
            let error = (difference / whole).sqrt();
            println!("relative error {error:.1e}, at most {BOUND:.0e}");
            if error.is_nan() || error > BOUND {
                return Err("the GPU and the CPU disagree".into());
            }
        }
    }
    Ok(())
}
