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
//! | `weights`, `heads` | the model's weights, and heads of any width |
//! | `buffers`, `products` | what steps compute in, and products by cuBLASLt |
//! | `network`, `layer` | what a step enqueues |
//! | `attention`, `tables` | plans, and index arrays |
//! | `sampler` | the choice of tokens |
//! | `measure` | how long things take |
//! | `kernels`, `rows`, `half`, `memory` | kernels of our own, and memory |

mod attention;
mod buffers;
mod half;
mod heads;
pub(super) mod kernels;
mod layer;
mod measure;
mod memory;
mod network;
mod products;
mod rows;
mod sampler;
mod tables;
mod weights;

use std::{
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use cudarc::driver::{CudaContext, CudaStream};
use flashinfer_rs::{
    FlashInferError, FlashInferRuntime, ModuleName, RuntimeConfig, Stream,
    attention::ReplayKey,
    graph::CapturedStep,
    kv::{Batch, HeadsShape, KvLayout, PageAllocator, PagedKvCache, Sequence},
    rope::CosSinCache,
};

pub use self::heads::HeadWidths;
use self::{
    attention::Attention,
    buffers::{Buffers, Outputs},
    kernels::Kernels,
    memory::Pinned,
    network::{Head, Network, Pass},
    products::{HeadProduct, Products},
    rows::Rows,
    sampler::Sampler,
    tables::{Tables, Uploaded},
    weights::Weights,
};
use crate::{
    Result,
    backend::{Backend, Output, Sample, Step, graph, matmul::CublasLt, sampler::logprobs},
    model::{self, Config, Ends, architecture::Activation, rope::Rope},
};

/// Edits of logits that there is room for at first.
const FIRST_EDITS: usize = 1024;

/// What is kept for steps of up to so many rows, a power of two.
#[derive(Default)]
struct Bucket {
    /// Takes the largest logits.
    greedy: Option<Graph>,
    /// Samples.
    sampled: Option<Graph>,
    products: Option<Products>,
    head: Option<HeadProduct>,
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
    /// Made when the first step samples.
    sampler: Option<Sampler>,
    /// What was chosen.
    chosen: Pinned<i32>,
    /// A row of logits, once one was wanted.
    row: Option<Pinned<f32>>,
    cache: PagedKvCache,
    tables: Tables,
    cublas: Rc<CublasLt>,
    cuda: Arc<CudaStream>,
    /// The graph that was the last step.
    launched: Option<Launched>,
    /// Whether steps may be graphs.
    graphs: bool,
    /// What the last step took until all was enqueued.
    enqueued: Duration,
    /// Where the last step's outputs are among the rows of logits.
    at: Vec<usize>,
}

/// Which graph was launched.
#[derive(Clone, Copy)]
struct Launched {
    bucket: usize,
    sampled: bool,
}

/// A stream of the first GPU, and the runtime with the modules that the model needs
/// beside those of attention.
fn start(config: &Config) -> Result<Arc<CudaStream>> {
    // SAFETY: opening a library of NVIDIA's runs nothing but its initializers.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err("there is no NVIDIA driver".into());
    }
    let mut runtime = RuntimeConfig::default();
    runtime.progress = Some(flashinfer_rs::progress::terminal());
    let runtime = FlashInferRuntime::initialize(runtime)?;
    if runtime.device_count()? == 0 {
        return Err("there is no NVIDIA GPU".into());
    }
    let activation = match config.activation {
        Activation::Silu => ModuleName::SILU_AND_MUL,
        Activation::GeluTanh => ModuleName::GELU_TANH_AND_MUL,
    };
    runtime.preload(&[ModuleName::NORM, ModuleName::ROPE, ModuleName::PAGE, activation])?;
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
        let widths = HeadWidths::new(config)?;
        let cuda = start(config)?;
        let stream = Stream::from(&cuda);
        let most = max_tokens.max(1).next_power_of_two();
        let positions = config.context_length.min(pool.num_pages() * pool.page_size());
        let rope = |rope: &Rope| CosSinCache::new(&stream, rope.for_length(positions), positions);
        let shape = HeadsShape { head_dim: widths.padded, ..config.kv_shape(config.dtype, KvLayout::Nhd) };
        let mut gpu = Self {
            buckets: (0..=most.ilog2()).map(|_| Bucket::default()).collect(),
            attention: Attention::new(&stream, config, widths, positions)?,
            buffers: Buffers::new(&stream, config, widths, most)?,
            outputs: Outputs::new(&stream, config, 1)?,
            tokens: Rows::new(&cuda, &stream, most, config.vocab_size)?,
            selected: Rows::new(&cuda, &stream, most, most)?,
            sampler: None,
            chosen: Pinned::zeros(&cuda, most)?,
            row: None,
            cache: PagedKvCache::new(&stream, pool, &[shape])?,
            tables: Tables::new(&stream, pool, most)?,
            cublas: CublasLt::new(&cuda)?,
            launched: None,
            graphs: true,
            enqueued: Duration::ZERO,
            at: Vec::new(),
            network: Network {
                widths,
                weights: Weights::new(&stream, config, widths, &ends, layers)?,
                ropes: config.ropes.iter().map(rope).collect::<std::result::Result<_, _>>()?,
                kernels: Kernels::new(&cuda, config.dtype)?,
                config: config.clone(),
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
            Uploaded::Decode => self.decode(bucket, step.outputs),
            Uploaded::Prefill => self.prefill(rows, bucket, step.outputs),
        }
    }

    /// Makes the products of so many rows, and has the fastest kernels for those of
    /// graphs.
    fn prepare_products(&mut self, bucket: usize, graph: bool) -> Result<()> {
        let Self { buckets, network, buffers, .. } = self;
        let products = match &mut buckets[bucket].products {
            Some(products) => products,
            empty => {
                let products = Products::new(&self.cublas, &network.config, network.widths, 1 << bucket)?;
                empty.insert(products)
            }
        };
        match graph {
            true => products.tune(&network.weights, buffers),
            false => Ok(()),
        }
    }

    /// Makes room for logits of so many rows, their product, and what is needed to
    /// choose tokens: the rows of outputs among them are `self.at`. Returns whether
    /// tokens are sampled.
    fn prepare_outputs(&mut self, bucket: usize, graph: bool, outputs: &[Output]) -> Result<bool> {
        let rows = 1 << bucket;
        if rows > self.outputs.capacity() {
            self.forget_graphs();
            self.outputs = Outputs::new(&self.network.stream, &self.network.config, rows)?;
        }
        let Self { buckets, network, buffers, outputs: memory, .. } = self;
        let head = match &mut buckets[bucket].head {
            Some(head) => head,
            empty => empty.insert(HeadProduct::new(&self.cublas, &network.config, rows)?),
        };
        if graph {
            head.tune(&network.weights, buffers, memory)?;
        }
        let is_greedy = |output: &Output| output.temperature == 0.0 && output.edits.is_empty();
        if outputs.iter().all(is_greedy) {
            return Ok(false);
        }
        let edits = outputs.iter().map(|output| output.edits.len()).sum();
        self.reserve_sampler(rows, edits)?;
        let Some(sampler) = &mut self.sampler else { return Ok(false) };
        sampler.set(&self.cuda, outputs, &self.at, rows)?;
        Ok(true)
    }

    /// Has a sampler with room for so many rows and edits.
    fn reserve_sampler(&mut self, rows: usize, edits: usize) -> Result<()> {
        let max_edits = self.sampler.as_ref().map_or(FIRST_EDITS, Sampler::max_edits);
        if self.sampler.as_ref().is_none_or(|sampler| !sampler.fits(rows, edits)) {
            self.forget_graphs();
            let rows = rows.max(self.outputs.capacity());
            let max_edits = max_edits.max(edits.next_power_of_two());
            let Network { stream, config, .. } = &self.network;
            let sampler = Sampler::new(&self.cuda, stream, rows, max_edits, config.vocab_size)?;
            self.sampler = Some(sampler);
        }
        Ok(())
    }

    /// A step of one new token for each request, filled up to a bucket: a graph.
    fn decode(&mut self, bucket: usize, outputs: &[Output]) -> Result<()> {
        self.at.extend(outputs.iter().map(|output| output.row));
        let sampled = self.prepare_outputs(bucket, true, outputs)?;
        let rows = 1 << bucket;
        let Self { buckets, network, attention, buffers, outputs, tokens, cache, tables, sampler, .. } = self;
        let Bucket { greedy, sampled: sampling, products: Some(products), head: Some(head) } =
            &mut buckets[bucket]
        else {
            return Err("the products of a step were not made".into());
        };
        let (captured, sampler) = if sampled { (sampling, sampler.as_mut()) } else { (greedy, None) };
        let tables = &tables.tables;
        let plans = attention.plan_decode(tables, self.graphs.then_some(rows))?;
        let keys = plans.replay_keys();
        if let Some(graph) = captured.as_ref().filter(|graph| Some(&graph.keys) == keys.as_ref()) {
            graph.step.launch(plans.decode())?;
            self.launched = Some(Launched { bucket, sampled });
            return Ok(());
        }
        let mut pass =
            Pass { rows, padded_rows: rows, tokens, tables, plans: &plans, products, cache, buffers };
        let mut head = Head { rows, selected: None, product: &head.product, outputs, sampler };
        let mut run = || {
            network.run(&mut pass)?;
            network.head(&mut pass, &mut head)
        };
        // This step runs without a graph, which loads all kernels.
        run()?;
        if let Some(keys) = keys {
            // SAFETY: what is not the crate's works on weights, buffers, outputs, rows and the
            // sampler of `self`, which are dropped, or replaced, after the graphs.
            let step = unsafe { graph::capture(&network.stream, run)? };
            *captured = Some(Graph { keys, step });
            self.launched = Some(Launched { bucket, sampled });
        }
        Ok(())
    }

    /// A step of any new tokens.
    fn prefill(&mut self, rows: usize, bucket: usize, outputs: &[Output]) -> Result<()> {
        self.at.extend(0..outputs.len());
        let wanted = (!outputs.is_empty()).then(|| outputs.len().next_power_of_two());
        let mut sampled = false;
        if let Some(wanted) = wanted {
            sampled = self.prepare_outputs(wanted.ilog2() as usize, false, outputs)?;
            let selected: Vec<_> = outputs.iter().map(|output| output.row).collect();
            self.selected.set(&self.cuda, &selected, wanted)?;
        }
        let Self { buckets, network, attention, buffers, tokens, cache, tables, selected, sampler, .. } =
            self;
        let Some(products) = &buckets[bucket].products else {
            return Err("the products of a step were not made".into());
        };
        let tables = &tables.tables;
        let plans = attention.plan_prefill(tables)?;
        let padded_rows = 1 << bucket;
        let mut pass = Pass { rows, padded_rows, tokens, tables, plans: &plans, products, cache, buffers };
        network.run(&mut pass)?;
        let Some(rows) = wanted else { return Ok(()) };
        let Some(HeadProduct { product, .. }) = &buckets[rows.ilog2() as usize].head else {
            return Err("the products of a step were not made".into());
        };
        let sampler = sampler.as_mut().filter(|_| sampled);
        let selected = Some(&*selected);
        network.head(&mut pass, &mut Head { rows, selected, product, outputs: &mut self.outputs, sampler })
    }

    /// To be called before memory is replaced that graphs work on.
    fn forget_graphs(&mut self) {
        self.launched = None;
        for bucket in &mut self.buckets {
            (bucket.greedy, bucket.sampled) = (None, None);
        }
    }

    /// What came of the outputs of a step, once it is computed.
    fn samples(&mut self, outputs: &[Output]) -> Result<Vec<Sample>> {
        let Some(last) = self.at.last() else { return Ok(Vec::new()) };
        self.chosen.download(&self.cuda, &self.outputs.tokens, 0, last + 1)?;
        // Waits as fast as can be; what `as_slice` waits for is over then.
        self.cuda.synchronize()?;
        let (chosen, vocab_size) = (self.chosen.as_slice()?, self.network.config.vocab_size);
        let mut samples = Vec::with_capacity(outputs.len());
        for (output, &at) in outputs.iter().zip(&self.at) {
            let token = u32::try_from(chosen[at]).ok();
            let mut sample = Sample { token, logprobs: None };
            if let (Some(token), Some(count)) = (token, output.logprobs) {
                let row = match &mut self.row {
                    Some(row) => row,
                    empty => empty.insert(Pinned::zeros(&self.cuda, vocab_size)?),
                };
                row.download(&self.cuda, &self.outputs.logits, at * vocab_size, vocab_size)?;
                sample.logprobs = Some(logprobs(row.as_slice()?, token, count));
            }
            samples.push(sample);
        }
        Ok(samples)
    }
}

impl Backend for Gpu {
    fn vocab_size(&self) -> usize {
        self.network.config.vocab_size
    }

    fn step(&mut self, step: &Step<'_>) -> Result<Vec<Sample>> {
        self.at.clear();
        self.launched = None;
        let start = Instant::now();
        self.check(step)?;
        if step.tokens.is_empty() {
            return Ok(Vec::new());
        }
        let computed = self.compute(step);
        self.tables.tables.release_padding();
        self.enqueued = start.elapsed();
        let samples = computed.and_then(|()| self.samples(step.outputs));
        if samples.is_err() {
            self.at.clear();
        }
        samples
    }

    fn logits(&self) -> Result<Vec<f32>> {
        let vocab_size = self.vocab_size();
        let all = if self.at.is_empty() { Vec::new() } else { self.outputs.logits.to_vec()? };
        Ok(self.at.iter().flat_map(|&row| &all[row * vocab_size..][..vocab_size]).copied().collect())
    }
}
