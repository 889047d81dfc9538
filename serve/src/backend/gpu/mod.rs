//! The model on an NVIDIA GPU, in `f16` or `bf16`: cuBLASLt multiplies matrices, and
//! everything else is FlashInfer's kernels, but for a few small ones.
//!
//! Steps in which each request has one new token are CUDA graphs, one for each
//! power of two of requests, which are captured when they are first needed. A
//! step writes its tokens and the index arrays to fixed addresses, plans attention,
//! launches the graph, and copies one number per row back. Small steps that check drafts
//! use the same graphs: each of their rows is a request of its own, which has the pages of its
//! sequence up to itself. Other steps, which read prompts, launch the same kernels one by one,
//! with prefill in place of decode.
//!
//! The host does all that while the GPU computes the step before: what that chooses is read
//! on the GPU, and reaches the host through the ring meanwhile. One stream orders all that is
//! computed. Uploads are made on another, to memory that every other step reads, so that none lies
//! between two graphs; page-locked memory is written again when the copies out of it are over, which
//! an event tells.
//!
//! | file | its job |
//! |---|---|
//! | `weights`, `heads` | the model's weights, and heads of any width |
//! | `buffers`, `products`, `multiplier`, `choices` | what steps compute in, their products, by what, and what was the fastest |
//! | `quantize`, `few_rows`, `programmatic` | 8-bit numbers, products of few rows, and launches that overlap |
//! | `network`, `layer`, `fused` | what a step enqueues |
//! | `steps`, `buckets`, `capture` | the course of a step, the graphs that are kept, and early ones |
//! | `append`, `attention`, `split` | what the cache gets, and plans |
//! | `lanes`, `tables`, `tokens` | what steps take in turn: index arrays, and tokens |
//! | `sampler`, `last_edits`, `ring` | the choice of tokens, and their way to the host |
//! | `ranks`, `nccl` | sums and logits of several GPUs, in memory that all of them reach, and by what |
//! | `measure`, `breakdown` | how long things take |
//! | `kernels`, `rows`, `half`, `memory` | kernels of our own, and memory |

mod append;
mod attention;
mod breakdown;
mod buckets;
mod buffers;
mod capture;
mod choices;
mod few_rows;
mod fused;
mod half;
mod heads;
pub(super) mod kernels;
mod lanes;
mod last_edits;
mod layer;
mod measure;
mod memory;
mod multiplier;
mod nccl;
mod network;
mod products;
mod programmatic;
mod quantize;
mod ranks;
mod ring;
mod rows;
mod sampler;
mod split;
mod steps;
mod tables;
mod tokens;
mod weights;

use std::{
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use cudarc::driver::{CudaContext, CudaStream, sys::CUdevice_attribute};
use flashinfer_rs::{
    DType, FlashInferError, FlashInferRuntime, ModuleName, RuntimeConfig, Stream,
    kv::{Batch, HeadsShape, KvLayout, PageAllocator, PagedKvCache, Sequence},
    rope::CosSinCache,
};

use self::{
    append::{appends_at_once, check_quantized_keys},
    attention::Attention,
    buckets::{Bucket, Launched},
    buffers::{Buffers, Outputs},
    kernels::Kernels,
    lanes::{LANES, Lane, Uploads},
    measure::GraphTime,
    memory::Pinned,
    multiplier::Multiplier,
    network::Network,
    products::Products,
    ranks::Ranks,
    ring::Ring,
    weights::Weights,
};
pub use self::{breakdown::Breakdown, capture::capture_graphs, heads::HeadWidths, tables::MOST_ROWS};
use crate::{
    Result,
    backend::{
        Backend, Output, Sample, Step, StepToken,
        matmul::{Choice, CublasLt},
        precision::Precision,
    },
    group::Group,
    model::{self, Config, Ends, architecture::Activation, rope::Rope},
};

/// How many multiprocessors a GPU has.
const MULTIPROCESSORS: CUdevice_attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;

/// The GPU's weights and cache.
pub struct Gpu {
    /// For 1, 2, 4, … rows; filled when they are first needed. Dropped first: graphs
    /// work on what the others own.
    buckets: Vec<Bucket>,
    network: Network,
    attention: Attention,
    buffers: Buffers,
    multiplier: Multiplier,
    outputs: Outputs,
    lanes: [Lane; LANES],
    /// That of the last step.
    lane: usize,
    uploads: Uploads,
    /// What is chosen, on its way to the host.
    ring: Ring,
    /// A row of logits, once one was wanted.
    row: Option<Pinned<f32>>,
    cache: PagedKvCache,
    cublas: Rc<CublasLt>,
    cuda: Arc<CudaStream>,
    /// The graph that was the last step.
    launched: Option<Launched>,
    /// The times of graphs, if they are taken.
    graph_times: Option<Vec<GraphTime>>,
    /// Whether what is captured is broken down.
    breaks_down: bool,
    /// What the last captured step's kernels cost, if it was broken down.
    breakdown: Option<Breakdown>,
    /// Whether steps may be graphs.
    graphs: bool,
    /// How algorithms of products are chosen.
    choice: Choice,
    /// What the last step took until all was enqueued.
    enqueued: Duration,
    /// Where the last step's outputs are among the rows of logits.
    at: Vec<usize>,
    /// Whether its logits are all here.
    has_logits: bool,
}

/// How a model runs on a GPU.
#[derive(Clone, Copy, Debug)]
pub struct GpuOptions {
    /// The number of the GPU among those of this machine.
    pub ordinal: usize,
    /// The most new tokens of a step.
    pub max_tokens: usize,
    /// Whether a row's logits are the same, bit for bit, whatever else is in the step,
    /// and whether it reads a prompt, decodes, or checks a draft. Attention reads the
    /// keys of each new token by itself then, undivided, and products have one
    /// algorithm for all numbers of rows.
    pub deterministic: bool,
    /// The type of the matrices of layers. `e4m3` has a scale for each row, and rows that are
    /// multiplied by them are rounded to it, too, unless they are few. The embedding, the product that makes logits and
    /// those that score experts stay as they are.
    pub weights: Precision,
    /// The type of the KV cache. Keys and values that are rounded to `e4m3` have no scale: beyond
    /// 448 they become that.
    pub kv: Precision,
}

impl GpuOptions {
    /// For steps of so many tokens on the first GPU, as fast as can be.
    pub fn new(max_tokens: usize) -> Self {
        Self { ordinal: 0, max_tokens, deterministic: false, weights: Precision::Auto, kv: Precision::Auto }
    }

    /// The most rows of products, a power of two.
    fn max_rows(self) -> usize {
        self.max_tokens.max(1).next_power_of_two()
    }

    /// How algorithms of products are chosen.
    fn choice(self) -> Choice {
        if self.deterministic { Choice::AnyRows(self.max_rows()) } else { Choice::Fastest }
    }
}

/// Whether this machine has NVIDIA's driver.
fn has_driver() -> bool {
    // SAFETY: opening a library of NVIDIA's runs nothing but its initializers.
    unsafe { cudarc::driver::sys::is_culib_present() }
}

/// Whether this machine has a GPU of this number, and a driver.
pub fn is_there(ordinal: usize) -> bool {
    has_driver()
        && CudaContext::device_count()
            .is_ok_and(|count| usize::try_from(count).is_ok_and(|count| ordinal < count))
}

/// A stream of a GPU, and the runtime with the modules that the model needs
/// beside those of attention.
fn start(config: &Config, ordinal: usize) -> Result<Arc<CudaStream>> {
    if !has_driver() {
        return Err("there is no NVIDIA driver".into());
    }
    let mut runtime = RuntimeConfig::default();
    runtime.progress = Some(flashinfer_rs::progress::terminal());
    let runtime = FlashInferRuntime::initialize(runtime)?;
    match runtime.device_count()? as usize {
        0 => return Err("there is no NVIDIA GPU".into()),
        count if ordinal >= count => {
            return Err(format!("there is no NVIDIA GPU {ordinal}: this machine has {count}").into());
        }
        _ => {}
    }
    let activation = match config.activation {
        Activation::Silu => ModuleName::SILU_AND_MUL,
        Activation::GeluTanh => ModuleName::GELU_TANH_AND_MUL,
    };
    runtime.preload(&[ModuleName::NORM, ModuleName::ROPE, ModuleName::PAGE, activation])?;
    runtime.preload_cublas()?;
    Ok(CudaContext::new(ordinal)?.new_stream()?)
}

impl Gpu {
    /// Uploads the weights, and makes the memory of a pool and of steps.
    pub fn new(
        config: &Config,
        ends: Ends,
        layers: impl Iterator<Item = Result<model::Layer>>,
        pool: &PageAllocator,
        options: GpuOptions,
    ) -> Result<Self> {
        Self::of_rank(config, ends, layers, pool, options, None)
    }

    /// The same of a rank's part of a model. All ranks of the group do so at a time.
    pub fn of_rank(
        config: &Config,
        ends: Ends,
        layers: impl Iterator<Item = Result<model::Layer>>,
        pool: &PageAllocator,
        options: GpuOptions,
        group: Option<&Group>,
    ) -> Result<Self> {
        let widths = HeadWidths::new(config)?;
        let cuda = start(config, options.ordinal)?;
        let stream = Stream::from(&cuda);
        // Sums of many rows are NCCL's, whose order is another one.
        let fused = (!options.deterministic).then_some((config.dtype, config.hidden_size));
        let ranks = group.map(|group| Ranks::meet(group, &cuda, fused)).transpose()?;
        let (most, deterministic) = (options.max_rows(), options.deterministic);
        let [weights, kv] = [options.weights, options.kv].map(|precision| precision.dtype(config.dtype));
        let positions = config.context_length.min(pool.num_pages() * pool.page_size());
        if kv == DType::E4M3 {
            check_quantized_keys(config, widths)?;
        }
        let multiprocessors = cuda.context().attribute(MULTIPROCESSORS)?;
        let multiprocessors = usize::try_from(multiprocessors)?;
        let attention = Attention::new(&stream, config, widths, positions, options, multiprocessors)?;
        // What has no product for one row has none at all, which is better known at once.
        let cublas = CublasLt::new(&cuda)?;
        let choice = options.choice();
        let products = Products::new(&cublas, config, widths, weights, 1, choice)?;
        let multiplier = Multiplier::new(&cuda, config, widths, weights, most, choice)?;
        let rope = |rope: &Rope| CosSinCache::new(&stream, rope.for_length(positions), positions);
        let shape = HeadsShape { head_dim: widths.padded, ..config.kv_shape(kv, KvLayout::Nhd) };
        let lane = || Lane::new(&cuda, &stream, pool, most, deterministic);
        let buffers = Buffers::new(&stream, config, widths, kv, most, ranks.as_ref())?;
        let network = Network {
            widths,
            weights: Weights::new(&stream, config, widths, multiplier.quantizer(), &ends, layers)?,
            ropes: config.ropes.iter().map(rope).collect::<std::result::Result<_, _>>()?,
            appends_at_once: appends_at_once(&cuda, config)?,
            kernels: Kernels::new(&cuda, config.dtype)?,
            ranks,
            config: config.clone(),
            stream: stream.clone(),
        };
        let mut gpu = Self {
            buckets: (0..=most.ilog2()).map(|_| Bucket::default()).collect(),
            attention,
            buffers,
            outputs: network.outputs(1)?,
            lanes: [lane()?, lane()?],
            lane: 0,
            uploads: Uploads::new(&cuda)?,
            ring: Ring::new(&cuda, most)?,
            row: None,
            cache: PagedKvCache::new(&stream, pool, &[shape])?,
            cublas,
            launched: None,
            graph_times: None,
            breaks_down: false,
            breakdown: None,
            graphs: true,
            choice,
            enqueued: Duration::ZERO,
            at: Vec::new(),
            has_logits: true,
            network,
            multiplier,
            cuda,
        };
        gpu.buckets[0].products = Some(products);
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
                    self.step(&Step {
                        batch: &batch,
                        tokens: &StepToken::known(tokens),
                        outputs: &[Output::greedy(0)],
                    })?;
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

    /// That of the next step.
    fn next_lane(&self) -> usize {
        (self.lane + 1) % LANES
    }

    /// The most new tokens of a step.
    fn max_rows(&self) -> usize {
        1 << (self.buckets.len() - 1)
    }

    /// The GPU's name.
    pub fn name(&self) -> Result<String> {
        Ok(self.cuda.context().name()?)
    }

    /// Bytes of all weights that a step multiplies.
    pub fn weight_bytes(&self) -> usize {
        self.network.weights.bytes
    }

    /// Whether steps in which each request has one new token are graphs, and those that check drafts;
    /// these are prefill without.
    pub fn set_graphs(&mut self, graphs: bool) {
        self.graphs = graphs;
    }
}

impl Backend for Gpu {
    fn vocab_size(&self) -> usize {
        self.network.config.vocab_size
    }

    fn is_asynchronous(&self) -> bool {
        true
    }

    fn enqueue(&mut self, step: &Step<'_>) -> Result<()> {
        let start = Instant::now();
        self.ring.check()?;
        self.launched = None;
        self.at.clear();
        self.check(step)?;
        let (mut enqueued, mut lane) = (Ok(()), self.lane);
        if !step.tokens.is_empty() {
            lane = self.next_lane();
            enqueued = self.compute(step, lane);
            let Lane { tables, computed, .. } = &mut self.lanes[lane];
            tables.tables.release_padding();
            enqueued = enqueued.and(computed.record(&self.cuda).map_err(Into::into));
        }
        self.enqueued = start.elapsed();
        let chosen = &self.lanes[lane].chosen;
        let enqueued = enqueued.and_then(|()| self.ring.push(&self.cuda, chosen, &self.at, step.outputs));
        match &enqueued {
            Ok(()) => self.lane = lane,
            Err(_) => self.at.clear(),
        }
        enqueued
    }

    fn collect(&mut self) -> Result<Vec<Sample>> {
        let step = self.ring.pop()?;
        let samples = self.samples(&step);
        self.ring.give_back(step);
        if samples.is_err() {
            self.at.clear();
        }
        samples
    }

    fn logits(&self) -> Result<Vec<f32>> {
        let vocab_size = self.vocab_size();
        let none = self.at.is_empty() || self.ring.last().is_some() || !self.has_logits;
        let all = if none { Vec::new() } else { self.outputs.logits.to_vec()? };
        let at = if none { &[][..] } else { &self.at };
        Ok(at.iter().flat_map(|&row| &all[row * vocab_size..][..vocab_size]).copied().collect())
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // A step may be in flight, which works on what goes now. Who drops it wants no error.
        let _ = self.cuda.context().synchronize();
    }
}

#[cfg(test)]
mod tests {
    use flashinfer_rs::artifacts::Digest;

    /// The PTX is what `src/ops/ptx.sh` made of the sources beside it.
    #[test]
    fn ptx_is_made_of_its_source() {
        macro_rules! source {
            ($name:literal) => {{
                let source = concat!(include_str!("half.cuh"), include_str!(concat!($name, ".cu")));
                ($name, source, include_str!(concat!($name, ".ptx")))
            }};
        }
        for (name, source, ptx) in [source!("few_rows"), source!("kernels"), source!("quantize")] {
            let line = format!("// Made of {name}.cu by ptx.sh: sha256 {}", Digest::of(source.as_bytes()));
            assert_eq!(ptx.lines().next(), Some(line.as_str()), "run src/ops/ptx.sh");
        }
    }
}
