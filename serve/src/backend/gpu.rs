//! The model on an NVIDIA GPU, in `f16`: cuBLASLt multiplies matrices, and
//! everything else is FlashInfer's kernels, but for the crate's `argmax` and one in `experts`.
//!
//! Steps in which each request has one new token are CUDA graphs, one for each
//! power of two of requests, which are captured when they are first needed. A
//! step writes the embeddings of its tokens and the index arrays to fixed
//! addresses, plans attention, launches the graph, and copies one number per
//! row back. Other steps, which read prompts, launch the same kernels one by
//! one, with prefill in place of decode.
//!
//! Residuals of some models come close to the largest number of `f16`. A norm
//! does not depend on the scale of its input, so the residual is kept scaled by
//! [`RESIDUAL_SCALE`], a power of two, which changes no digit: embeddings and
//! what is added in each layer are scaled by it, and `eps` by its square.

use std::{
    iter,
    ops::Range,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use candle_core::{DType as CandleDType, Tensor, quantized::GgmlDType};
use cudarc::driver::{
    CudaContext, CudaGraph, CudaSlice, CudaStream, DeviceRepr, PinnedHostSlice, ValidAsZeroBits,
};
use flashinfer_rs::{
    DType, FlashInferError, FlashInferRuntime, ModuleName, Result as FlashInferResult, RuntimeConfig, Stream,
    TensorMut, TensorRef,
    activation::{ActivationOptions, silu_and_mul},
    attention::{AttentionSpec, BatchDecode, BatchPrefill, Heads, PlanOptions, ReplayKey, Workspace},
    cudarc::{TensorExt, TensorExtMut},
    kv::{Batch, BatchCapacity, BatchTables, KvLayout, PageAllocator, PagedKv, PagedKvCache, Sequence},
    norm::{NormOptions, fused_add_rmsnorm, rmsnorm},
    page::append_paged_kv_cache,
    rope::{CosSinCache, RopeTensors, Rotation, apply_rope_pos_ids_cos_sin_cache},
    sampling::argmax,
};
use half::f16;

use crate::{
    Result,
    backend::{
        Engine, Step,
        experts::{Routing, RoutingSlices, RoutingTensors},
        graph,
        matmul::{CublasLt, Matmul, Product, Weight},
    },
    model::{
        self, Config, Ends,
        config::Gating,
        weights::{self, LayerMlp, Matrix},
    },
};

/// What the residual is multiplied by.
const RESIDUAL_SCALE: f32 = 1.0 / 16.0;
/// Scratch memory of products: what cuBLASLt is recommended to have on Hopper.
const SCRATCH_BYTES: usize = 32 << 20;
/// Elements of weights start at multiples of this many, which are 256 bytes.
const WEIGHT_ALIGNMENT: usize = 128;
/// The most requests in a batch, of those without new tokens too, for each row.
const REQUESTS_PER_ROW: usize = 4;

/// Where a weight lies in the memory of all weights.
type Place = Range<usize>;

/// A matrix and a bias.
struct Linear {
    matrix: Place,
    bias: Option<Place>,
}

/// The weights of one layer.
struct Layer {
    attention_norm: Place,
    qkv: Linear,
    attention_output: Linear,
    mlp_norm: Place,
    router: Option<Linear>,
    gate_up: Linear,
    down: Linear,
}

/// All weights that the device uses, in one piece of its memory.
struct Weights {
    memory: CudaSlice<f16>,
    used: usize,
}

impl Weights {
    /// Uploads a weight behind those that are there.
    fn push(&mut self, cuda: &Arc<CudaStream>, values: &[f16]) -> Result<Place> {
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            return Err(format!("a weight is {value} in f16, which the GPU computes in").into());
        }
        let place = self.used..self.used + values.len();
        let mut target =
            self.memory.try_slice_mut(place.clone()).ok_or("the model has more weights than it says")?;
        cuda.memcpy_htod(values, &mut target)?;
        self.used = place.end.next_multiple_of(WEIGHT_ALIGNMENT);
        Ok(place)
    }

    /// Uploads a matrix, and a bias for products that are multiplied by a factor.
    fn push_linear(
        &mut self,
        cuda: &Arc<CudaStream>,
        linear: &weights::Linear,
        factor: f32,
    ) -> Result<Linear> {
        let bias = linear.bias.as_ref().map(|bias| {
            let bias: Vec<_> = bias.iter().map(|bias| bias * factor).collect();
            self.push(cuda, &rounded(&bias))
        });
        Ok(Linear { bias: bias.transpose()?, matrix: self.push(cuda, &elements(&linear.dequantize()?)?)? })
    }
}

fn rounded(values: &[f32]) -> Vec<f16> {
    values.iter().copied().map(f16::from_f32).collect()
}

fn elements(tensor: &Tensor) -> Result<Vec<f16>> {
    Ok(tensor.flatten_all()?.to_dtype(CandleDType::F16)?.to_vec1()?)
}

/// What steps compute in, for as many rows as there may be.
struct Buffers {
    residual: CudaSlice<f16>,
    x: CudaSlice<f16>,
    qkv: CudaSlice<f16>,
    attention: CudaSlice<f16>,
    gate_up: CudaSlice<f16>,
    inner: CudaSlice<f16>,
    logits: CudaSlice<f32>,
    tokens: CudaSlice<i32>,
    scratch: CudaSlice<u8>,
    routing: Option<Routing>,
}

/// Views of the weights and buffers, for products of a number of rows.
struct Tensors<'t> {
    weights: TensorRef<'t>,
    residual: TensorMut<'t>,
    x: TensorMut<'t>,
    qkv: TensorMut<'t>,
    attention: TensorMut<'t>,
    gate_up: TensorMut<'t>,
    inner: TensorMut<'t>,
    logits: TensorMut<'t>,
    tokens: TensorMut<'t>,
    scratch: TensorMut<'t>,
    routing: Option<RoutingTensors<'t>>,
}

impl<'t> Tensors<'t> {
    fn weight(&self, place: &Place) -> Result<TensorRef<'t>> {
        Ok(self.weights.narrow(0, place.start, place.len())?)
    }

    fn linear(&self, linear: &Linear) -> Result<Weight<'t>> {
        let bias = linear.bias.as_ref().map(|bias| self.weight(bias));
        Ok(Weight { matrix: self.weight(&linear.matrix)?, bias: bias.transpose()? })
    }
}

/// Borrows weights and buffers for work on the stream, with views of so many
/// rows. All views are there before a capture that `work` makes, and after.
fn with_tensors<R>(
    cuda: &Arc<CudaStream>,
    config: &Config,
    weights: &Weights,
    buffers: &mut Buffers,
    rows: usize,
    work: impl FnOnce(&mut Tensors<'_>) -> Result<R>,
) -> Result<R> {
    let Config { hidden_size, intermediate_size, vocab_size, head_dim, heads, .. } = *config;
    let Heads { num_qo_heads, num_kv_heads } = heads;
    let experts = config.num_experts();
    let weights = weights.memory.tensor(cuda, &[weights.memory.len()])?;
    let mut residual = buffers.residual.tensor_mut(cuda, &[rows, hidden_size])?;
    let mut x = buffers.x.tensor_mut(cuda, &[rows, hidden_size])?;
    let mut qkv = buffers.qkv.tensor_mut(cuda, &[rows, num_qo_heads + 2 * num_kv_heads, head_dim])?;
    let mut attention = buffers.attention.tensor_mut(cuda, &[rows, num_qo_heads, head_dim])?;
    let mut gate_up = buffers.gate_up.tensor_mut(cuda, &[rows * experts, 2 * intermediate_size])?;
    let mut inner = buffers.inner.tensor_mut(cuda, &[rows * experts, intermediate_size])?;
    let mut logits = buffers.logits.tensor_mut(cuda, &[rows, vocab_size])?;
    let mut tokens = buffers.tokens.tensor_mut(cuda, &[rows])?;
    let mut scratch = buffers.scratch.tensor_mut(cuda, &[SCRATCH_BYTES])?;
    let mut routing = buffers.routing.as_mut().map(|routing| routing.slices(cuda, rows)).transpose()?;
    work(&mut Tensors {
        weights: weights.view(),
        residual: residual.view_mut(),
        x: x.view_mut(),
        qkv: qkv.view_mut(),
        attention: attention.view_mut(),
        gate_up: gate_up.view_mut(),
        inner: inner.view_mut(),
        logits: logits.view_mut(),
        tokens: tokens.view_mut(),
        scratch: scratch.view_mut(),
        routing: routing.as_mut().map(RoutingSlices::tensors),
    })
}

/// The products of a step, for one number of rows.
struct Products {
    qkv: Matmul,
    attention_output: Matmul,
    router: Option<Matmul>,
    gate_up: Matmul,
    down: Matmul,
    head: Matmul,
}

/// What is kept for steps of up to so many rows, a power of two.
struct Bucket {
    /// First to go: it works on what the others own.
    graph: Option<(ReplayKey, CudaGraph)>,
    products: Products,
    /// Where the embeddings of a step's tokens are gathered.
    input: PinnedHostSlice<f16>,
}

/// Runs a plan of attention: queries, the cache of a layer, and the output.
type Attention<'a> = dyn Fn(&TensorRef<'_>, &PagedKv<'_>, &mut TensorMut<'_>) -> FlashInferResult<()> + 'a;

/// What steps read and do not change.
struct Network {
    stream: Stream,
    config: Config,
    layers: Vec<Layer>,
    norm: Place,
    head: Linear,
    rope: CosSinCache,
}

impl Network {
    /// Enqueues a step of `rows` rows, whose embeddings are in the residual.
    /// Logits and tokens are of all rows.
    fn run(
        &self,
        rows: usize,
        tensors: &mut Tensors<'_>,
        products: &Products,
        cache: &mut PagedKvCache,
        (tables, attend): (&BatchTables, &Attention<'_>),
        outputs: bool,
    ) -> Result<()> {
        let Heads { num_qo_heads, num_kv_heads } = self.config.heads;
        let experts = self.config.num_experts();
        let stream = &self.stream;
        let scale = f64::from(RESIDUAL_SCALE);
        let norm = NormOptions::with_eps(self.config.rms_eps * scale * scale);
        let rotation = Rotation::interleaved(self.rope.view()?, &tables.append);
        let first = self.layers.first().map_or(&self.norm, |layer| &layer.attention_norm);
        let weight = tensors.weight(first)?;
        let residual = tensors.residual.as_ref().narrow(0, 0, rows)?;
        rmsnorm(stream, &mut tensors.x.reborrow().narrow(0, 0, rows)?, &residual, &weight, &norm)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let weight = tensors.linear(&layer.qkv)?;
            products.qkv.run(&mut tensors.qkv, &tensors.x.as_ref(), &weight, &mut tensors.scratch)?;
            let (mut q, kv) = tensors.qkv.reborrow().narrow(0, 0, rows)?.split_at(1, num_qo_heads)?;
            let (mut k, v) = kv.split_at(1, num_kv_heads)?;
            let mut turned = RopeTensors::InPlace { q: q.reborrow(), k: k.reborrow() };
            apply_rope_pos_ids_cos_sin_cache(stream, &mut turned, &rotation)?;
            let (key, value) = (&k.as_ref(), &v.as_ref());
            append_paged_kv_cache(
                stream,
                key,
                value,
                &tables.append,
                &mut cache.layer_mut(0, index)?,
                &tables.pages,
            )?;
            let mut attention = tensors.attention.reborrow().narrow(0, 0, rows)?;
            attend(&q.as_ref(), &cache.layer(0, index)?, &mut attention)?;
            let weight = tensors.linear(&layer.attention_output)?;
            let attention = tensors.attention.as_ref();
            products.attention_output.run(&mut tensors.x, &attention, &weight, &mut tensors.scratch)?;
            self.add(rows, tensors, &layer.mlp_norm, &norm)?;
            let router = layer.router.as_ref().map(|router| tensors.linear(router)).transpose()?;
            if let (Some(weight), Some(product), Some(routing)) =
                (router, &products.router, &mut tensors.routing)
            {
                product.run(&mut routing.scores, &tensors.x.as_ref(), &weight, &mut tensors.scratch)?;
                routing.choose(rows)?;
            }
            let weight = tensors.linear(&layer.gate_up)?;
            products.gate_up.run(&mut tensors.gate_up, &tensors.x.as_ref(), &weight, &mut tensors.scratch)?;
            let mut inner = tensors.inner.reborrow().narrow(0, 0, rows * experts)?;
            let gate_up = tensors.gate_up.as_ref().narrow(0, 0, rows * experts)?;
            silu_and_mul(stream, &mut inner, &gate_up, &ActivationOptions::default())?;
            if let Some(routing) = &tensors.routing {
                routing.share(&mut inner)?;
            }
            let weight = tensors.linear(&layer.down)?;
            products.down.run(&mut tensors.x, &tensors.inner.as_ref(), &weight, &mut tensors.scratch)?;
            let next = self.layers.get(index + 1).map_or(&self.norm, |next| &next.attention_norm);
            self.add(rows, tensors, next, &norm)?;
        }
        if outputs {
            let weight = tensors.linear(&self.head)?;
            products.head.run(&mut tensors.logits, &tensors.x.as_ref(), &weight, &mut tensors.scratch)?;
            let mut tokens = tensors.tokens.reborrow().narrow(0, 0, rows)?;
            let logits = tensors.logits.as_ref().narrow(0, 0, rows)?;
            argmax(stream, &mut tokens, &logits)?;
        }
        Ok(())
    }

    /// Adds to the residual and norms the sum.
    fn add(&self, rows: usize, tensors: &mut Tensors<'_>, norm: &Place, options: &NormOptions) -> Result<()> {
        let weight = tensors.weight(norm)?;
        let mut x = tensors.x.reborrow().narrow(0, 0, rows)?;
        let mut residual = tensors.residual.reborrow().narrow(0, 0, rows)?;
        Ok(fused_add_rmsnorm(&self.stream, &mut x, &mut residual, &weight, options)?)
    }

    /// The products of so many rows.
    fn products(&self, cublas: &Rc<CublasLt>, rows: usize) -> Result<Products> {
        let Config { hidden_size, vocab_size, experts, biases, .. } = self.config;
        let [qo, qkv] = widths(&self.config);
        let inner = self.config.num_experts() * self.config.intermediate_size;
        let product = |input, output, bias, factor| {
            let product = Product { rows, input, output, factor, bias, dtype: DType::F16 };
            Matmul::new(cublas, product, SCRATCH_BYTES)
        };
        let precise = |output| {
            let product =
                Product { rows, input: hidden_size, output, factor: 1.0, bias: false, dtype: DType::F32 };
            Matmul::new(cublas, product, SCRATCH_BYTES)
        };
        Ok(Products {
            qkv: product(hidden_size, qkv, biases.qkv, 1.0)?,
            attention_output: product(qo, hidden_size, biases.attention_output, RESIDUAL_SCALE)?,
            router: experts.map(|experts| precise(experts.count)).transpose()?,
            gate_up: product(hidden_size, 2 * inner, biases.gate_up, 1.0)?,
            down: product(inner, hidden_size, biases.down, RESIDUAL_SCALE)?,
            head: precise(vocab_size)?,
        })
    }

    /// Takes the fastest kernels for products. What is in the buffers is lost.
    fn tune(&self, products: &mut Products, tensors: &mut Tensors<'_>) -> Result<()> {
        /// A product with the weight of every layer, one after the other.
        macro_rules! tune {
            ($product:ident, $out:ident, $x:ident, $weights:expr) => {
                products.$product.tune(|matmul| {
                    $weights.try_for_each(|weight: &Linear| {
                        let weight = tensors.linear(weight)?;
                        matmul.run(&mut tensors.$out, &tensors.$x.as_ref(), &weight, &mut tensors.scratch)
                    })
                })?
            };
        }
        tune!(qkv, qkv, x, self.layers.iter().map(|layer| &layer.qkv));
        tune!(attention_output, x, attention, self.layers.iter().map(|layer| &layer.attention_output));
        tune!(gate_up, gate_up, x, self.layers.iter().map(|layer| &layer.gate_up));
        tune!(down, x, inner, self.layers.iter().map(|layer| &layer.down));
        let routers = self.layers.iter().filter_map(|layer| layer.router.as_ref());
        let routers = routers.map(|router| tensors.linear(router)).collect::<Result<Vec<_>>>()?;
        if let (Some(product), Some(routing)) = (&mut products.router, &mut tensors.routing) {
            product.tune(|matmul| {
                routers.iter().try_for_each(|weight| {
                    matmul.run(&mut routing.scores, &tensors.x.as_ref(), weight, &mut tensors.scratch)
                })
            })?;
        }
        tune!(head, logits, x, iter::once(&self.head));
        Ok(())
    }
}

/// Refuses what only the CPU computes.
fn check(config: &Config) -> Result<()> {
    let plain = config.experts.is_none_or(|experts| {
        experts.shared.is_none() && experts.normalize && experts.gating == Gating::Softmax
    });
    let plain = plain && config.architecture.name == "llama" && [64, 128, 256].contains(&config.head_dim);
    let layers = config.layers.iter().all(|layer| layer.window.is_none());
    match plain && layers && config.embedding_scale == 1.0 && config.residual_scale == 1.0 {
        true => Ok(()),
        false => Err(format!("the GPU does not compute {} models yet", config.architecture.name).into()),
    }
}

/// The router of a layer, and the matrices of its experts in two; one without
/// experts has one.
fn mlp(mlp: &LayerMlp) -> Result<(Option<Matrix>, weights::Linear, weights::Linear)> {
    let experts = match mlp {
        LayerMlp::Dense(mlp) => return Ok((None, mlp.gate_up.clone(), mlp.down.clone())),
        LayerMlp::Experts(experts) => experts,
    };
    let down = experts.experts.iter().map(|expert| expert.down.dequantize()).collect::<Result<Vec<_>>>()?;
    let down = Matrix::new(&Tensor::cat(&down, 1)?, GgmlDType::F32)?;
    let gate_up = experts.experts.iter().flat_map(|expert| expert.gate_up.parts.iter().cloned()).collect();
    Ok((Some(experts.router.clone()), weights::Linear { parts: gate_up, bias: None }, down.into()))
}

/// The width of queries, and that of queries, keys and values.
fn widths(config: &Config) -> [usize; 2] {
    let Heads { num_qo_heads, num_kv_heads } = config.heads;
    [num_qo_heads, num_qo_heads + 2 * num_kv_heads].map(|heads| heads * config.head_dim)
}

/// Uploads the index arrays of a step, and returns whether it can be a graph's of
/// `bucket` requests. It can if each request has one new token, and if there is a
/// page for the requests that the graph has beyond them.
fn upload(tables: &mut BatchTables, cache: &mut PagedKvCache, batch: &Batch, bucket: usize) -> Result<bool> {
    if batch.queries().indptr().windows(2).all(|pair| pair[1] - pair[0] == 1) {
        match tables.update_padded(batch, cache, bucket) {
            Err(FlashInferError::OutOfPages { .. }) => {}
            updated => return Ok(updated.map(|()| true)?),
        }
    }
    tables.update(batch, cache)?;
    Ok(false)
}

/// The GPU's weights and cache. Dropped in this order.
pub struct Gpu {
    /// For 1, 2, 4, … rows; made when they are first needed.
    buckets: Vec<Option<Bucket>>,
    network: Network,
    /// Scaled, as residuals are.
    embedding: Vec<f16>,
    weights: Weights,
    buffers: Buffers,
    /// Where the tokens of a step are copied to.
    copied: PinnedHostSlice<i32>,
    cache: PagedKvCache,
    tables: BatchTables,
    workspace: Workspace,
    decode: BatchDecode,
    prefill: BatchPrefill,
    cublas: Rc<CublasLt>,
    cuda: Arc<CudaStream>,
    /// The bucket whose graph the workspace has a plan for.
    planned: Option<usize>,
    /// Whether steps may be graphs.
    graphs: bool,
    /// What the last step took until all was enqueued.
    enqueued: Duration,
    /// Of the last step.
    outputs: Vec<usize>,
    greedy: Vec<Option<u32>>,
}

/// A stream of the first GPU, and the runtime with the modules that every model
/// needs.
fn start() -> Result<Arc<CudaStream>> {
    // SAFETY: opening a library of NVIDIA's runs nothing but its initializers.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err("there is no NVIDIA driver".into());
    }
    let mut config = RuntimeConfig::default();
    config.progress = Some(flashinfer_rs::progress::terminal());
    let runtime = FlashInferRuntime::initialize(config)?;
    if runtime.device_count()? == 0 {
        return Err("there is no NVIDIA GPU".into());
    }
    runtime.preload(&[ModuleName::NORM, ModuleName::ROPE, ModuleName::PAGE, ModuleName::SILU_AND_MUL])?;
    runtime.preload_cublas()?;
    Ok(CudaContext::new(0)?.new_stream()?)
}

/// Page-locked memory of zeros.
fn pinned<T: DeviceRepr + ValidAsZeroBits>(cuda: &CudaStream, len: usize) -> Result<PinnedHostSlice<T>> {
    // SAFETY: the memory is written before anything reads it, and zeros are
    // numbers of the type.
    unsafe {
        let mut memory = cuda.context().alloc_pinned_with_flags::<T>(len, 0)?;
        memory.as_mut_ptr()?.write_bytes(0, len);
        Ok(memory)
    }
}

impl Gpu {
    /// Uploads the weights, and makes the memory of a pool and of steps of up to
    /// `max_tokens` new tokens.
    pub fn new(
        config: &Config,
        ends: Ends,
        layers: impl Iterator<Item = Result<model::Layer>>,
        pool: &PageAllocator,
        max_tokens: usize,
    ) -> Result<Self> {
        check(config)?;
        let cuda = start()?;
        let stream = Stream::from(&cuda);
        let Config { hidden_size, intermediate_size, vocab_size, head_dim, heads, .. } = *config;
        let [qo, qkv] = widths(config);
        let aligned = |len: usize| len.next_multiple_of(WEIGHT_ALIGNMENT);
        let experts = config.num_experts();
        let inner = experts * intermediate_size;
        // Norms and matrices, and then what biases there may be.
        let of_layer: usize = [1, 1, qkv, qo, experts, 2 * inner, inner]
            .map(|rows| aligned(rows * hidden_size))
            .into_iter()
            .chain([qkv, hidden_size, 2 * inner, hidden_size].map(aligned))
            .sum();
        let total = config.num_layers() * of_layer + aligned(hidden_size) + aligned(vocab_size * hidden_size);
        let mut weights = Weights { memory: cuda.alloc_zeros(total)?, used: 0 };
        let mut pushed = Vec::with_capacity(config.num_layers());
        for layer in layers {
            let layer = layer?;
            let mut linear = |linear: &weights::Linear, factor| weights.push_linear(&cuda, linear, factor);
            let qkv = linear(&layer.qkv, 1.0)?;
            let attention_output = linear(&layer.attention_output, RESIDUAL_SCALE)?;
            let (router, gate_up, down) = mlp(&layer.mlp)?;
            let router = router.map(|router| linear(&router.into(), 1.0)).transpose()?;
            let gate_up = linear(&gate_up, 1.0)?;
            let down = linear(&down, RESIDUAL_SCALE)?;
            let mut norm = |norm: &[f32]| weights.push(&cuda, &rounded(norm));
            let (attention_norm, mlp_norm) = (norm(&layer.attention_norm)?, norm(&layer.mlp_norm)?);
            pushed.push(Layer { attention_norm, qkv, attention_output, mlp_norm, router, gate_up, down });
        }
        let layers = pushed;
        let norm = weights.push(&cuda, &rounded(&ends.norm))?;
        let head = ends.head.as_ref().unwrap_or(&ends.embedding);
        let head = Linear { matrix: weights.push(&cuda, &elements(&head.dequantize()?)?)?, bias: None };
        let embedding = elements(&(ends.embedding.dequantize()? * f64::from(RESIDUAL_SCALE))?)?;

        let most = max_tokens.max(1).next_power_of_two();
        let buffers = Buffers {
            residual: cuda.alloc_zeros(most * hidden_size)?,
            x: cuda.alloc_zeros(most * hidden_size)?,
            qkv: cuda.alloc_zeros(most * qkv)?,
            attention: cuda.alloc_zeros(most * qo)?,
            gate_up: cuda.alloc_zeros(most * 2 * inner)?,
            inner: cuda.alloc_zeros(most * inner)?,
            logits: cuda.alloc_zeros(most * vocab_size)?,
            tokens: cuda.alloc_zeros(most)?,
            scratch: cuda.alloc_zeros(SCRATCH_BYTES)?,
            routing: config.experts.map(|experts| Routing::new(&cuda, experts, most)).transpose()?,
        };
        let positions = config.context_length.min(pool.num_pages() * pool.page_size());
        let requests = REQUESTS_PER_ROW * most;
        let pages = requests * positions.div_ceil(pool.page_size());
        let spec = AttentionSpec::new(DType::F16, head_dim);
        let mut gpu = Self {
            buckets: (0..=most.ilog2()).map(|_| None).collect(),
            embedding,
            weights,
            buffers,
            copied: pinned(&cuda, most)?,
            cache: PagedKvCache::new(&stream, pool, &[config.kv_shape(DType::F16, KvLayout::Nhd)])?,
            tables: BatchTables::new(
                &stream,
                &Batch::new(pool),
                BatchCapacity { requests, pages, tokens: most },
            )?,
            workspace: Workspace::new(&stream)?,
            decode: BatchDecode::new(&stream, &spec, heads)?,
            prefill: BatchPrefill::new(&stream, &spec, heads)?,
            cublas: CublasLt::new(&cuda)?,
            planned: None,
            graphs: true,
            enqueued: Duration::ZERO,
            outputs: Vec::new(),
            greedy: Vec::new(),
            network: Network {
                rope: CosSinCache::new(&stream, config.ropes[0].for_length(positions), positions)?,
                config: config.clone(),
                stream,
                layers,
                norm,
                head,
            },
            cuda,
        };
        gpu.warm_up(pool, most)?;
        Ok(gpu)
    }

    /// Computes a prompt and a token, if the pool has room for them: loads
    /// kernels, and captures the graph of one request.
    fn warm_up(&mut self, pool: &PageAllocator, most: usize) -> Result<()> {
        let mut batch = Batch::new(pool);
        batch.push(Sequence::new(pool))?;
        for tokens in [&[0; 2][..most.min(2)], &[0]] {
            match batch.append([tokens.len()]) {
                Ok(()) => self.step(&Step { batch: &batch, tokens, outputs: &[0] })?,
                Err(FlashInferError::OutOfPages { .. }) => break,
                Err(error) => return Err(error.into()),
            }
        }
        // A step of nothing.
        batch.append([0])?;
        self.step(&Step { batch: &batch, tokens: &[], outputs: &[] })
    }

    /// The stream that everything is enqueued on.
    pub fn cuda(&self) -> &Arc<CudaStream> {
        &self.cuda
    }

    /// The GPU's name.
    pub fn name(&self) -> Result<String> {
        Ok(self.cuda.context().name()?)
    }

    /// Bytes of all weights that a step reads.
    pub fn weight_bytes(&self) -> usize {
        self.weights.used * size_of::<f16>()
    }

    /// Replays the graph of the last step: the milliseconds that it takes, and
    /// its kernels. Its index arrays and plan are those of that step, and only
    /// of that.
    ///
    /// # Errors
    /// The last step was not a graph's.
    pub fn replay(&self) -> Result<(f32, usize)> {
        let bucket = self.planned.and_then(|index| self.buckets[index].as_ref());
        let Some(Bucket { graph: Some((_, graph)), .. }) = bucket else {
            return Err("the last step was not a graph's".into());
        };
        Ok((graph::milliseconds(&self.cuda, graph)?, graph::nodes(graph)?))
    }

    /// Whether steps in which each request has one new token are graphs.
    pub fn set_graphs(&mut self, graphs: bool) {
        self.graphs = graphs;
    }

    /// What the host took to enqueue the last step.
    pub fn enqueued(&self) -> Duration {
        self.enqueued
    }

    /// The milliseconds that attention to the pages of the last step takes in
    /// all layers, in a graph of nothing else.
    pub fn attention(&mut self) -> Result<f32> {
        let Self { network, weights, buffers, cache, tables, workspace, cuda, .. } = self;
        let heads = network.config.heads;
        self.planned = None;
        let rows = tables.pages.host().batch_size();
        let options = PlanOptions::default().with_graph(rows);
        let plan = self.decode.plan(workspace, &tables.pages, &options)?;
        let graph = with_tensors(cuda, &network.config, weights, buffers, rows, |tensors| {
            let q = tensors.qkv.as_ref().narrow(1, 0, heads.num_qo_heads)?;
            graph::capture(cuda, || {
                (0..network.layers.len())
                    .try_for_each(|layer| plan.run(&q, &cache.layer(0, layer)?, &mut tensors.attention))?;
                Ok(())
            })
        })?;
        graph::milliseconds(cuda, &graph)
    }

    /// Checks a step, and computes it if it has tokens.
    fn compute(&mut self, step: &Step<'_>) -> Result<()> {
        let Config { hidden_size, .. } = self.network.config;
        let rows = step.tokens.len();
        if rows != step.batch.queries().total() || step.outputs.iter().any(|&row| row >= rows) {
            return Err("the tokens or outputs of a step are not those of its batch".into());
        }
        if rows == 0 {
            return Ok(());
        }
        let bucket = rows.next_power_of_two();
        let index = bucket.ilog2() as usize;
        if index >= self.buckets.len() {
            let most = 1usize << (self.buckets.len() - 1);
            return Err(format!("a step of {rows} tokens; the engine was made for {most}").into());
        }
        self.planned = None;
        let Self { buckets, network, weights, buffers, cache, tables, workspace, cuda, planned, .. } = self;
        let kept = match &mut buckets[index] {
            Some(kept) => kept,
            empty => empty.insert(Bucket {
                graph: None,
                products: network.products(&self.cublas, bucket)?,
                input: pinned(cuda, bucket * hidden_size)?,
            }),
        };
        let Bucket { graph, products, input } = kept;
        let replays = upload(tables, cache, step.batch, bucket)?;
        if replays && graph.is_none() {
            let tune = |tensors: &mut Tensors<'_>| network.tune(products, tensors);
            with_tensors(cuda, &network.config, weights, buffers, bucket, tune)?;
        }

        let gathered = input.as_mut_slice()?;
        for (row, &token) in gathered.chunks_exact_mut(hidden_size).zip(step.tokens) {
            let embedding = self.embedding.chunks_exact(hidden_size).nth(token as usize);
            row.copy_from_slice(embedding.ok_or_else(|| format!("there is no token {token}"))?);
        }
        gathered[rows * hidden_size..].fill(f16::ZERO);
        cuda.memcpy_htod(&*input, &mut buffers.residual)?;

        if !replays {
            let options = PlanOptions::causal();
            let plan = self.prefill.plan_paged(workspace, &tables.queries, &tables.pages, &options)?;
            let outputs = !step.outputs.is_empty();
            let attend = |q: &TensorRef<'_>, kv: &PagedKv<'_>, out: &mut TensorMut<'_>| plan.run(q, kv, out);
            return with_tensors(cuda, &network.config, weights, buffers, bucket, |tensors| {
                network.run(rows, tensors, products, cache, (tables, &attend), outputs)
            });
        }
        let mut options = PlanOptions::default();
        options.graph = self.graphs.then_some(bucket);
        let plan = self.decode.plan(workspace, &tables.pages, &options)?;
        let key = plan.replay_key().ok();
        if let Some((_, graph)) = graph.as_ref().filter(|(made_for, _)| Some(made_for) == key.as_ref()) {
            graph.launch()?;
            *planned = Some(index);
            return Ok(());
        }
        // This step runs without a graph, which loads all kernels.
        let attend = |q: &TensorRef<'_>, kv: &PagedKv<'_>, out: &mut TensorMut<'_>| plan.run(q, kv, out);
        let captured = with_tensors(cuda, &network.config, weights, buffers, bucket, |tensors| {
            let mut run = || network.run(bucket, tensors, products, cache, (tables, &attend), true);
            run()?;
            self.graphs.then(|| graph::capture(cuda, run)).transpose()
        })?;
        let Some(captured) = captured else { return Ok(()) };
        *graph = key.map(|key| (key, captured));
        *planned = Some(index);
        Ok(())
    }
}

impl Engine for Gpu {
    fn step(&mut self, step: &Step<'_>) -> Result<()> {
        self.outputs.clear();
        self.greedy.clear();
        let start = Instant::now();
        self.compute(step)?;
        self.tables.release_padding();
        self.enqueued = start.elapsed();
        if !step.outputs.is_empty() {
            self.cuda.memcpy_dtoh(&self.buffers.tokens, &mut self.copied)?;
            // Waits as fast as can be; what `as_slice` waits for is over then.
            self.cuda.synchronize()?;
            let tokens = self.copied.as_slice()?;
            self.greedy.extend(step.outputs.iter().map(|&row| u32::try_from(tokens[row]).ok()));
            self.outputs.extend_from_slice(step.outputs);
        }
        Ok(())
    }

    fn logits(&self) -> Result<Vec<f32>> {
        let vocab = self.network.config.vocab_size;
        let Some(&last) = self.outputs.last() else { return Ok(Vec::new()) };
        let all = self.cuda.clone_dtoh(&self.buffers.logits.slice(..(last + 1) * vocab))?;
        Ok(self.outputs.iter().flat_map(|&row| &all[row * vocab..][..vocab]).copied().collect())
    }

    fn greedy(&self) -> Result<Vec<Option<u32>>> {
        Ok(self.greedy.clone())
    }
}
