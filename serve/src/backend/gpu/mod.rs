//! The model on an NVIDIA GPU, in `f16` or `bf16`: cuBLASLt multiplies matrices, and
//! everything else is FlashInfer's kernels, but for a few small ones.
//!
//! Steps in which each request has one new token are CUDA graphs, one for each
//! power of two of requests, which are captured when they are first needed. A
//! step writes its tokens and the index arrays to fixed addresses, plans attention,
//! launches the graph, and copies one number per row back. Other steps, which read
//! prompts, launch the same kernels one by one, with prefill in place of decode.
//!
//! | file | its job |
//! |---|---|
//! | `weights` | the model's weights |
//! | `buffers` | what steps compute in, and products by cuBLASLt |
//! | `network` | what a step enqueues |
//! | `attention`, `tables` | plans, and index arrays |
//! | `tune`, `measure` | the fastest products; how long things take |
//! | `kernels`, `rows`, `half`, `pinned` | kernels of our own, and memory |

mod attention;
mod buffers;
mod half;
mod kernels;
mod measure;
mod network;
mod pinned;
mod rows;
mod tables;
mod tune;
mod weights;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use cudarc::driver::{CudaContext, CudaStream};
use flashinfer_rs::{
    DType, FlashInferError, FlashInferRuntime, ModuleName, RuntimeConfig, Stream,
    attention::{AttentionSpec, ReplayKey},
    graph::CapturedStep,
    kv::{Batch, KvLayout, PageAllocator, PagedKvCache, Sequence},
    rope::CosSinCache,
};

use self::{
    attention::Attention,
    buffers::{Buffers, Outputs, Products},
    kernels::Kernels,
    network::{Head, Network, Pass},
    pinned::Pinned,
    rows::Rows,
    tables::{Tables, Uploaded},
    weights::Weights,
};
use crate::{
    Result,
    backend::{
        Backend, Output, Sample, Step, graph,
        matmul::{CublasLt, Matmul},
        sampler,
    },
    model::{self, Config, Ends},
};

/// What is kept for steps of up to so many rows, a power of two.
#[derive(Default)]
struct Bucket {
    graph: Option<Graph>,
    products: Option<Products>,
    head: Option<Matmul>,
}

/// A captured step, and what tells the plans that it fits.
struct Graph {
    keys: Vec<ReplayKey>,
    step: CapturedStep,
}

/// The GPU's weights and cache.
pub struct Gpu {
    /// For 1, 2, 4, … rows; filled when they are first needed. Dropped first: graphs
    /// work on what the others own.
    buckets: Vec<Bucket>,
    network: Network,
    attention: Attention,
    buffers: Buffers,
    outputs: Outputs,
    /// The tokens of a step.
    tokens: Rows,
    /// The rows whose logits are wanted.
    selected: Rows,
    /// What was chosen.
    chosen: Pinned<i32>,
    cache: PagedKvCache,
    tables: Tables,
    cublas: Arc<CublasLt>,
    cuda: Arc<CudaStream>,
    /// The bucket whose graph was the last step.
    launched: Option<usize>,
    /// Whether steps may be graphs.
    graphs: bool,
    /// What the last step took until all was enqueued.
    enqueued: Duration,
    /// Where the last step's outputs are among the rows of logits.
    at: Vec<usize>,
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
        let cuda = start()?;
        let stream = Stream::from(&cuda);
        let dtype = DType::F16;
        let most = max_tokens.max(1).next_power_of_two();
        let positions = config.context_length.min(pool.num_pages() * pool.page_size());
        let spec = AttentionSpec::new(dtype, config.head_dim);
        let specs = (0..config.num_layers).map(|_| spec);
        let mut gpu = Self {
            buckets: (0..=most.ilog2()).map(|_| Bucket::default()).collect(),
            attention: Attention::new(&stream, config.heads, specs, spec.default_sm_scale())?,
            buffers: Buffers::new(&stream, config, dtype, most)?,
            outputs: Outputs::new(&stream, config, dtype, 1)?,
            tokens: Rows::new(&cuda, &stream, most, config.vocab_size)?,
            selected: Rows::new(&cuda, &stream, most, most)?,
            chosen: Pinned::zeros(&cuda, most)?,
            cache: PagedKvCache::new(&stream, pool, &[config.kv_shape(dtype, KvLayout::Nhd)])?,
            tables: Tables::new(&stream, pool, most)?,
            cublas: CublasLt::new(&cuda)?,
            launched: None,
            graphs: true,
            enqueued: Duration::ZERO,
            at: Vec::new(),
            greedy: Vec::new(),
            network: Network {
                config: config.clone(),
                weights: Weights::new(&stream, dtype, &ends, layers)?,
                rope: CosSinCache::new(&stream, &config.rope, positions)?,
                kernels: Kernels::new(&cuda, dtype)?,
                stream,
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
                Ok(()) => {
                    self.step(&Step { batch: &batch, tokens, outputs: &[Output::greedy(0)] })?;
                }
                Err(FlashInferError::OutOfPages { .. }) => break,
                Err(error) => return Err(error.into()),
            }
        }
        // A step of nothing.
        batch.append([0])?;
        self.step(&Step { batch: &batch, tokens: &[], outputs: &[] })?;
        Ok(())
    }

    /// The GPU's name.
    pub fn name(&self) -> Result<String> {
        Ok(self.cuda.context().name()?)
    }

    /// Bytes of all weights that a step multiplies.
    pub fn weight_bytes(&self) -> usize {
        self.network.weights.bytes
    }

    /// Whether steps in which each request has one new token are graphs.
    pub fn set_graphs(&mut self, graphs: bool) {
        self.graphs = graphs;
    }

    /// Refuses what is no step.
    fn check(&self, step: &Step<'_>) -> Result<()> {
        let rows = step.tokens.len();
        if rows != step.batch.queries().total() || step.outputs.iter().any(|output| output.row >= rows) {
            return Err("the tokens or outputs of a step are not those of its batch".into());
        }
        let most = 1usize << (self.buckets.len() - 1);
        if rows > most {
            return Err(format!("a step of {rows} tokens; the engine was made for {most}").into());
        }
        let vocab_size = self.network.config.vocab_size;
        match step.tokens.iter().find(|&&token| token as usize >= vocab_size) {
            Some(token) => Err(format!("there is no token {token}").into()),
            None => Ok(()),
        }
    }

    /// Enqueues a step that has tokens.
    fn compute(&mut self, step: &Step<'_>) -> Result<()> {
        let rows = step.tokens.len();
        let padded_rows = rows.next_power_of_two();
        let bucket = padded_rows.ilog2() as usize;
        if self.tables.reserve(step.batch, padded_rows)? {
            self.forget_graphs();
        }
        let uploaded = self.tables.upload(step.batch, &mut self.cache, padded_rows)?;
        let tokens: Vec<_> = step.tokens.iter().map(|&token| token as usize).collect();
        self.tokens.set(&self.cuda, &tokens, padded_rows)?;
        self.prepare_products(bucket, uploaded == Uploaded::Decode)?;
        match uploaded {
            Uploaded::Decode => {
                self.at.extend_from_slice(step.outputs);
                self.decode(bucket)
            }
            Uploaded::Prefill => {
                self.at.extend(0..step.outputs.len());
                self.prefill(rows, bucket, step.outputs)
            }
        }
    }

    /// Makes the products of so many rows, and has the fastest kernels for those of
    /// graphs.
    fn prepare_products(&mut self, bucket: usize, graph: bool) -> Result<()> {
        let Self { buckets, network, buffers, .. } = self;
        let (rows, dtype) = (1 << bucket, DType::F16);
        let Bucket { products, graph: captured, .. } = &mut buckets[bucket];
        let products = match products {
            Some(products) => products,
            empty => empty.insert(Products::new(&self.cublas, &network.config, dtype, rows)?),
        };
        if graph && captured.is_none() {
            network.tune(products, buffers, rows)?;
        }
        Ok(())
    }

    /// Makes room for logits of so many rows, and their product.
    fn prepare_outputs(&mut self, bucket: usize, graph: bool) -> Result<()> {
        let (rows, dtype) = (1 << bucket, DType::F16);
        if rows > self.outputs.capacity() {
            self.forget_graphs();
            self.outputs = Outputs::new(&self.network.stream, &self.network.config, dtype, rows)?;
        }
        let Self { buckets, network, buffers, outputs, .. } = self;
        let Bucket { head, graph: captured, .. } = &mut buckets[bucket];
        let head = match head {
            Some(head) => head,
            empty => empty.insert(Outputs::product(&self.cublas, &network.config, dtype, rows)?),
        };
        if graph && captured.is_none() {
            network.tune_head(head, buffers, outputs, rows)?;
        }
        Ok(())
    }

    /// A step of one new token for each request, filled up to a bucket: a graph.
    fn decode(&mut self, bucket: usize) -> Result<()> {
        self.prepare_outputs(bucket, true)?;
        let rows = 1 << bucket;
        let Self { buckets, network, attention, buffers, outputs, tokens, cache, tables, .. } = self;
        let Bucket { graph, products: Some(products), head: Some(product) } = &mut buckets[bucket] else {
            return Err("the products of a step were not made".into());
        };
        let tables = &tables.tables;
        let plans = attention.plan_decode(tables, self.graphs.then_some(rows))?;
        let keys = plans.replay_keys();
        if let Some(graph) = graph.as_ref().filter(|graph| Some(&graph.keys) == keys.as_ref()) {
            graph.step.launch(plans.decode())?;
            self.launched = Some(bucket);
            return Ok(());
        }
        let mut pass =
            Pass { rows, padded_rows: rows, tokens, tables, plans: &plans, products, cache, buffers };
        let mut head = Head { rows, selected: None, product, outputs };
        let mut run = || {
            network.run(&mut pass)?;
            network.head(&mut pass, &mut head)
        };
        // This step runs without a graph, which loads all kernels.
        run()?;
        if let Some(keys) = keys {
            // SAFETY: what is not the crate's works on weights, buffers, outputs and rows of
            // `self`, which are dropped, or replaced, after the graphs.
            let step = unsafe { graph::capture(&network.stream, run)? };
            *graph = Some(Graph { keys, step });
            self.launched = Some(bucket);
        }
        Ok(())
    }

    /// A step of any new tokens.
    fn prefill(&mut self, rows: usize, bucket: usize, outputs: &[usize]) -> Result<()> {
        let wanted = (!outputs.is_empty()).then(|| outputs.len().next_power_of_two());
        if let Some(wanted) = wanted {
            self.prepare_outputs(wanted.ilog2() as usize, false)?;
            self.selected.set(&self.cuda, outputs, wanted)?;
        }
        let Self { buckets, network, attention, buffers, tokens, cache, tables, selected, .. } = self;
        let Some(products) = &buckets[bucket].products else {
            return Err("the products of a step were not made".into());
        };
        let tables = &tables.tables;
        let plans = attention.plan_prefill(tables)?;
        let padded_rows = 1 << bucket;
        let mut pass = Pass { rows, padded_rows, tokens, tables, plans: &plans, products, cache, buffers };
        network.run(&mut pass)?;
        let Some(rows) = wanted else { return Ok(()) };
        let Some(product) = &buckets[rows.ilog2() as usize].head else {
            return Err("the products of a step were not made".into());
        };
        let selected = Some(&*selected);
        network.head(&mut pass, &mut Head { rows, selected, product, outputs: &mut self.outputs })
    }

    /// To be called before memory is replaced that graphs work on.
    fn forget_graphs(&mut self) {
        self.launched = None;
        self.buckets.iter_mut().for_each(|bucket| bucket.graph = None);
    }
}

impl Engine for Gpu {
    fn step(&mut self, step: &Step<'_>) -> Result<()> {
        self.at.clear();
        self.greedy.clear();
        self.launched = None;
        let start = Instant::now();
        self.check(step)?;
        if step.tokens.is_empty() {
            return Ok(());
        }
        let computed = self.compute(step);
        self.tables.tables.release_padding();
        self.enqueued = start.elapsed();
        if computed.is_err() {
            self.at.clear();
            return computed;
        }
        if let Some(last) = self.at.last() {
            self.chosen.download(&self.cuda, &self.outputs.tokens, last + 1)?;
            // Waits as fast as can be; what `as_slice` waits for is over then.
            self.cuda.synchronize()?;
            let chosen = self.chosen.as_slice()?;
            self.greedy.extend(self.at.iter().map(|&row| u32::try_from(chosen[row]).ok()));
        }
        Ok(())
    }

    fn logits(&self) -> Result<Vec<f32>> {
        let vocab_size = self.network.config.vocab_size;
        let all = if self.at.is_empty() { Vec::new() } else { self.outputs.logits.to_vec()? };
        Ok(self.at.iter().flat_map(|&row| &all[row * vocab_size..][..vocab_size]).copied().collect())
    }

    fn greedy(&self) -> Result<Vec<Option<u32>>> {
        Ok(self.greedy.clone())
    }
}
