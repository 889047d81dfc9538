//! Attention of mixed batches: prefill and decode in one launch.
//!
//! Blocks that stay on the GPU for the whole launch take the work of a batch
//! in turn, whatever mixture of long and short requests it is. The planner
//! gives each of them its share: a tile of queries, a KV head, and a part of
//! the keys. At the end of the same launch the parts are merged.
//!
//! Source of the contract: `csrc/batch_attention*.cu`,
//! `include/flashinfer/attention/persistent.cuh` and `TwoStageHolisticPlan` of
//! `attention/scheduler.cuh` of FlashInfer 0.6.13.

use super::{
    empty_states,
    mask::{Mask, MaskTensors, check_causal, requests_of},
    options::{PlanOptions, RunOptions, check_sm_scale},
    planned::{
        PlanInfo, Planned, Planning, ReplayKey, ReplayShape, check_output, check_rows, check_workspace,
        host_indices, make_plan,
    },
    spec::{AttentionSpec, Backend, Heads},
    workspace::{Need, Workspace},
};
use crate::{
    capture,
    cuda::DeviceAttribute,
    error::{FlashInferError, Result},
    ffi::{DlTensor, Function, Kernel, Signature, kernels},
    indices::{PageIndices, PageTable, RaggedIndices, RaggedTable},
    kv::PagedKv,
    module::Module,
    ops::{check::Check, page::check_cache},
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{TensorMut, TensorRef},
};

kernels! {
    struct Plan = "plan"(
        float_workspace: Tensor, int_workspace: Tensor, pinned_int_workspace: Tensor,
        qo_indptr: Tensor, kv_indptr: Tensor, kv_len: Tensor,
        batch_size: Int, num_qo_heads: Int, num_kv_heads: Int, head_dim_o: Int, causal: Bool,
    ) -> "Array<int>";
    struct Run = "run"(
        float_workspace: Tensor, int_workspace: Tensor, plan_info: IntArray, q: Tensor,
        k_cache: Tensor, v_cache: Tensor, kv_indices: Tensor, o: Tensor, maybe_lse: OptTensor,
        mask_mode: Int, layout: Int, num_qo_heads: Int, num_kv_heads: Int, page_size: Int,
        v_scale: Float, sm_scale: Float, logits_soft_cap: Float,
        maybe_k_cache_sf: OptTensorObject, maybe_v_cache_sf: OptTensorObject,
    ) -> "void";
}

/// Those that measure themselves take a buffer for it, too.
const MODULES: &str = "batch_attention_with_kv_cache_*_use_profiler_false";

pub(super) const SIGNATURES: &[(&str, Signature)] = &[(MODULES, Plan::SIGNATURE), (MODULES, Run::SIGNATURE)];

const PLAN_OP: &str = "BatchAttention::plan";
const RUN_OP: &str = "BatchAttentionPlan::run_with";
/// Numbers in a plan.
const PLAN_LEN: usize = 28;
/// Rows of a tile: of requests with more rows than the second, and of others.
/// A row is a query's head, among those that share a KV head.
const TILES: [usize; 2] = [128, 16];
/// Work items that the planner has room for, for each kind of tile.
const MAX_WORKS: usize = 65536;
/// Index arrays that describe the work items of one kind of tile.
const WORK_ARRAYS: usize = 10;

/// Attention of ragged queries to their requests' pages, for batches in which
/// some requests decode and others prefill.
///
/// It does what [`BatchPrefill`](super::BatchPrefill) does over pages, with
/// one cooperative launch on tensor cores for all requests together, and
/// without a sliding window. [`Backend::Auto`] and [`Backend::Fa2`] select it.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{
///     DType, PageIndices, PageTable, RaggedIndices, RaggedTable, Stream,
///     attention::{AttentionSpec, BatchAttention, Heads, PlanOptions, Workspace},
///     cudarc::Tensor,
///     kv::{KvLayout, PagedKv},
/// };
/// use half::bf16;
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// let attention = BatchAttention::new(&stream, &AttentionSpec::new(DType::BF16, 128), Heads::new(32, 8))?;
///
/// // One request decodes its 50th token; one has 20 tokens, of which the last 8 are prefilled now.
/// let requests = [(&[0, 1, 2, 3][..], 50), (&[5, 4][..], 20)];
/// let table = PageTable::new(&stream, PageIndices::from_requests(8, 16, requests)?)?;
/// let queries = RaggedTable::new(&stream, RaggedIndices::from_lens([1, 8])?)?;
/// let bytes = attention.float_bytes();
/// let mut workspace = Workspace::with_sizes(&stream, bytes, Workspace::DEFAULT_INT_BYTES)?;
/// let plan = attention.plan(&mut workspace, &queries, &table, &PlanOptions::causal())?;
///
/// let q = Tensor::<bf16>::zeros(&stream, &[9, 32, 128])?;
/// let kv = Tensor::<bf16>::zeros(&stream, &[8, 2, 16, 8, 128])?;
/// let mut out = Tensor::<bf16>::zeros(&stream, &[9, 32, 128])?;
/// plan.run(&q.view(), &PagedKv::joined(kv.view(), KvLayout::Nhd)?, &mut out.view_mut())?;
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
#[derive(Clone, Copy, Debug)]
pub struct BatchAttention {
    spec: AttentionSpec,
    heads: Heads,
    group: usize,
    ordinal: u32,
    /// Blocks of a launch.
    blocks: usize,
    module: &'static Module,
    plan: Function,
    run: Function,
}

impl BatchAttention {
    /// Resolves the module of a spec for the stream's GPU; downloads the
    /// pinned wheel if no local source holds it and that is allowed.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument): no kernel can work
    /// on such heads. [`Unsupported`](FlashInferError::Unsupported): no such
    /// module can exist, or the spec names other kernels. Else the module cannot
    /// be had or opened.
    pub fn new(stream: &Stream, spec: &AttentionSpec, heads: Heads) -> Result<Self> {
        let group = heads.check("BatchAttention::new")?;
        if !matches!(spec.backend, Backend::Auto | Backend::Fa2) {
            return Err(FlashInferError::Unsupported {
                what: format!("attention of mixed batches with Backend::{:?}", spec.backend),
                available: "there is Backend::Fa2, which Backend::Auto takes, too".into(),
            });
        }
        let name = spec.batch_attention_module()?;
        let runtime = FlashInferRuntime::get()?;
        runtime.preload([&name])?;
        let module = runtime.module(&name)?;
        let ordinal = stream.ordinal();
        let multiprocessors = runtime.cuda().attribute(ordinal, DeviceAttribute::MultiprocessorCount)?;
        Ok(Self {
            spec: *spec,
            heads,
            group,
            ordinal,
            blocks: blocks(multiprocessors.unsigned_abs() as usize, spec.head_dim_vo),
            module,
            plan: module.function(Plan::SIGNATURE.function)?,
            run: module.function(Run::SIGNATURE.function)?,
        })
    }

    /// The module that serves the spec.
    pub fn module(&self) -> &'static Module {
        self.module
    }

    /// The spec.
    pub fn spec(&self) -> &AttentionSpec {
        &self.spec
    }

    /// The heads.
    pub fn heads(&self) -> Heads {
        self.heads
    }

    /// Bytes for partial results that a plan needs. The planner
    /// reserves the same for any batch: with 8 KV heads of 128, on a GPU of 132
    /// multiprocessors, 302 MiB, which is more than a workspace has by default.
    /// One that is made [`with_sizes`](Workspace::with_sizes) need not grow.
    pub fn float_bytes(&self) -> usize {
        float_bytes(self.blocks, self.heads.num_kv_heads, self.spec.head_dim_vo)
    }

    /// Divides the work of one step among the blocks of a launch, from the
    /// host copies of the index arrays, and enqueues the upload of the result,
    /// about 6 MiB, to the workspace.
    ///
    /// The plan serves every layer of the step. A step without queries gives a
    /// plan whose runs do nothing. `queries` can change once it is planned.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument):
    /// - queries and page table differ in their number of requests, streams
    ///   do not fit, or they are of another GPU than this value;
    /// - the mask is causal, and a request has tokens, but more queries than
    ///   tokens;
    /// - [`graph`](PlanOptions::graph) has fewer rows than there are queries;
    /// - the step has too much work for one plan, which has room for 65536
    ///   items (a tile of queries and a KV head, times the parts into which
    ///   its tokens are divided) of requests with many and of those with few
    ///   queries: split the step;
    /// - the workspace is too small and does not [grow](Workspace#growth);
    /// - the stream is being captured.
    ///
    /// [`Unsupported`](FlashInferError::Unsupported): another mask than none and
    /// the causal one, or a [`split`](PlanOptions::split). Else what the module or CUDA said. The workspace can be used again.
    pub fn plan<'p>(
        &self,
        workspace: &'p mut Workspace,
        queries: &RaggedTable,
        table: &'p PageTable,
        options: &PlanOptions<'_>,
    ) -> Result<BatchAttentionPlan<'p>> {
        let stream = table.stream();
        let check = Check::new(PLAN_OP, stream)?;
        if stream.ordinal() != self.ordinal {
            return check.fail(
                "table",
                format!("it is on {}; the module is for cuda:{}", stream.device(), self.ordinal),
            );
        }
        check.on_stream("queries", queries.stream())?;
        let causal = options.is_causal("attention of mixed batches")?;
        options.split.refuse("attention of mixed batches")?;
        let (heads, group) = (self.heads, self.group);
        let (queries, pages) = (queries.host(), table.host());
        let batch = MixedBatch { queries, pages, heads, group, causal, graph: options.graph };
        let work = Work::of(&check, &self.spec, batch)?;
        work.check_limits(&check, self.blocks)?;
        check_workspace(&check, workspace)?;
        let info = if work.is_empty() { None } else { Some(self.plan_work(&check, workspace, &work)?) };
        let requests = requests_of(work.queries, &work.kv_lens);
        let empty = empty_states::possible(work.graph, &MaskTensors::NONE, requests);
        if empty {
            empty_states::prepare()?;
        }
        Ok(BatchAttentionPlan {
            attention: *self,
            table,
            rows: work.rows,
            causal,
            graph: work.graph,
            empty,
            planned: Planned::new(workspace, info)?,
        })
    }

    fn plan_work(&self, check: &Check<'_>, workspace: &mut Workspace, work: &Work<'_>) -> Result<PlanInfo> {
        let Heads { num_qo_heads, num_kv_heads } = work.heads;
        let float = float_bytes(self.blocks, num_kv_heads, self.spec.head_dim_vo);
        let need = Need { float, int: int_bytes(self.blocks) };
        let planning = Planning { need, for_graph: work.graph, clear: false, numbers: PLAN_LEN };
        let stream = workspace.stream().clone();
        let (qo_indptr, kv_indptr) =
            (host_indices(work.queries.indptr())?, host_indices(work.table.indptr())?);
        let kv_len = host_indices(&work.kv_lens)?;
        make_plan(check, workspace, planning, |scratch, pinned| {
            let kernel = Plan {
                float_workspace: DlTensor::new(&scratch.float),
                int_workspace: DlTensor::new(&scratch.int),
                pinned_int_workspace: DlTensor::new(pinned),
                qo_indptr: DlTensor::new(&qo_indptr),
                kv_indptr: DlTensor::new(&kv_indptr),
                kv_len: DlTensor::new(&kv_len),
                batch_size: work.kv_lens.len() as i64,
                num_qo_heads: num_qo_heads as i64,
                num_kv_heads: num_kv_heads as i64,
                head_dim_o: self.spec.head_dim_vo as i64,
                causal: work.causal,
            };
            // SAFETY: the arrays are checked host arrays of one batch, whose
            // work fits the planner's arrays and whose sums fit 32 bits; the
            // host buffer is page-locked, as large as the device one and as
            // what the planner writes, and not written again before the copy
            // out of it is done.
            unsafe { kernel.call(&self.plan, &stream) }
        })
    }
}

/// The blocks of a launch: as many as a GPU runs at once, of which each stays
/// on its multiprocessor.
fn blocks(multiprocessors: usize, head_dim_vo: usize) -> usize {
    if head_dim_vo < 256 { 2 * multiprocessors } else { multiprocessors }
}

/// Rows of partial results for which the planner reserves memory.
///
/// It counts the rows that are merged against this, not their parts. There
/// are fewer parts as well: a tile that is divided has less than twice
/// `tokens / part` of them, in up to 128 rows, and `part` is at least the tokens
/// of all tiles divided by `blocks`. So there are at most `256 * blocks`.
const fn partial_rows(blocks: usize) -> usize {
    4 * blocks * (TILES[0] + TILES[1])
}

/// Bytes of partial results: for each row and KV head an output of 16 bits,
/// and its sum.
fn float_bytes(blocks: usize, num_kv_heads: usize, head_dim_vo: usize) -> usize {
    partial_rows(blocks) * num_kv_heads * (2 * head_dim_vo + size_of::<f32>())
}

/// Bytes of the planner's index arrays, which are of one size for any batch:
/// those of work items, two lengths, two for each row to merge, and the number
/// of those rows. Each starts at a multiple of 16.
const fn int_bytes(blocks: usize) -> usize {
    let works = TILES.len() * WORK_ARRAYS * MAX_WORKS;
    (works + 4 + 2 * partial_rows(blocks) + 1) * size_of::<i32>()
}

/// What is planned.
#[derive(Clone, Copy, Debug)]
struct MixedBatch<'a> {
    queries: &'a RaggedIndices,
    pages: &'a PageIndices,
    heads: Heads,
    group: usize,
    causal: bool,
    graph: Option<usize>,
}

/// What the planner is given.
#[derive(Debug)]
struct Work<'a> {
    queries: &'a RaggedIndices,
    table: &'a PageIndices,
    kv_lens: Vec<i32>,
    heads: Heads,
    group: usize,
    causal: bool,
    /// Rows of the tensors: those of the batch, or the fixed number of a graph.
    rows: usize,
    graph: bool,
}

impl<'a> Work<'a> {
    /// Compares queries with a page table.
    fn of(check: &Check<'_>, spec: &AttentionSpec, batch: MixedBatch<'a>) -> Result<Self> {
        let MixedBatch { queries, pages: table, heads, group, causal, graph } = batch;
        if queries.batch_size() != table.batch_size() {
            return check.fail(
                "queries",
                format!(
                    "they are of {} requests, the page table is of {}",
                    queries.batch_size(),
                    table.batch_size()
                ),
            );
        }
        let rows = check_rows(check, graph, queries.total(), 0)?;
        spec.check_output_size(check, rows, heads)?;
        let kv_lens = table.seq_lens();
        if causal {
            check_causal(check, requests_of(queries, &kv_lens))?;
        }
        Ok(Self { queries, table, kv_lens, heads, group, causal, rows, graph: graph.is_some() })
    }

    /// Whether no plan is needed. A graph needs one, to do nothing.
    fn is_empty(&self) -> bool {
        self.kv_lens.is_empty() || self.queries.total() == 0 && !self.graph
    }

    /// For each request its kind of tile, its tiles, and its tokens.
    fn tiles(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        self.kv_lens.iter().enumerate().map(|(request, &len)| {
            let rows = self.queries.len(request) * self.group;
            let kind = usize::from(rows <= TILES[1]);
            (kind, rows.div_ceil(TILES[kind]), len as usize)
        })
    }

    /// Refuses what the planner has no room for, and what it gets wrong
    /// without a word.
    fn check_limits(&self, check: &Check<'_>, blocks: usize) -> Result<()> {
        if blocks == 0 {
            return check.fail("stream", "its GPU has no multiprocessors".into());
        }
        let kv_heads = self.heads.num_kv_heads;
        let mut tiles = [0; TILES.len()];
        for (kind, own, _) in self.tiles() {
            tiles[kind] += own;
        }
        // A tile makes one work item for each KV head, and one more for each
        // further part into which its tokens are cut. A part has at least half
        // of what a block has on average, so there are at most twice as many
        // further parts as blocks.
        for (tiles, tile) in tiles.into_iter().zip(TILES) {
            let works = tiles.saturating_mul(kv_heads).saturating_add(2 * blocks);
            if works > MAX_WORKS {
                return check.fail(
                    "queries",
                    format!(
                        "{tiles} tiles of up to {tile} query heads with {kv_heads} KV heads, in up to {works} \
                         work items; a plan has room for {MAX_WORKS}, so split the step"
                    ),
                );
            }
        }
        // The planner keeps the share of a block in 32 bits, rounded up to a
        // multiple of 256.
        let tokens: usize = self.tiles().map(|(_, tiles, len)| tiles * len).sum();
        if tokens * kv_heads / blocks > i32::MAX as usize - 512 {
            return check.fail(
                "table",
                format!(
                    "{tokens} tokens to read for each of {kv_heads} KV heads; the planner counts up to 2^31 \
                     for each of {blocks} blocks, so split the step"
                ),
            );
        }
        Ok(())
    }
}

/// One step's plan, ready to run for each layer.
///
/// It borrows its workspace, which no other plan can then use, and its page
/// table, which cannot be updated meanwhile. Runs go to their stream. The
/// plan cannot be shared between threads, because its runs use the workspace
/// one after the other.
///
/// A run needs all multiprocessors at once: where part of the GPU is kept
/// from the process, or has less shared memory than two blocks take, CUDA
/// refuses it.
#[derive(Debug)]
pub struct BatchAttentionPlan<'p> {
    attention: BatchAttention,
    table: &'p PageTable,
    /// Rows of queries and outputs.
    rows: usize,
    causal: bool,
    /// Whether it is for a CUDA graph.
    graph: bool,
    /// Whether requests with queries may have no tokens.
    empty: bool,
    planned: Planned<'p>,
}

impl BatchAttentionPlan<'_> {
    /// `out = softmax(q · kᵀ · sm_scale) · v` for each query and head, over the
    /// tokens that the query sees, with the default options.
    ///
    /// # Errors
    /// As [`run_with`](Self::run_with).
    pub fn run(&self, q: &TensorRef<'_>, kv: &PagedKv<'_>, out: &mut TensorMut<'_>) -> Result<()> {
        self.run_with(q, kv, out, None, &RunOptions::default())
    }

    /// As [`run`](Self::run), with an LSE and options.
    ///
    /// With `n` queries in all, `q` and `out` are `[n, num_qo_heads, head_dim]`
    /// of the spec's dtypes, `out` contiguous; `kv` is the paged cache that the
    /// page table was checked for, of no more than 2³² elements from the first
    /// key to the last. `lse`, if given, is a contiguous `f32`
    /// `[n, num_qo_heads]` and takes the base-2 logarithm of each sum of
    /// exponentials. A query whose request has no tokens gets zeros, and −∞.
    /// Rows that a graph has beyond the batch's queries are left alone.
    ///
    /// Of scores below −50000 see [`attention`](super#very-negative-scores).
    /// These kernels have no programmatic dependent launch, so `enable_pdl`
    /// changes nothing.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) before anything
    /// is launched: a device, stream, dtype, shape, stride or alignment does
    /// not fit the plan, a tensor spans more than 2³² elements, or `sm_scale`
    /// is below 0.001. Else what the module or CUDA said.
    pub fn run_with(
        &self,
        q: &TensorRef<'_>,
        kv: &PagedKv<'_>,
        out: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        options: &RunOptions<'_>,
    ) -> Result<()> {
        let (spec, heads, table, stream) =
            (&self.attention.spec, self.attention.heads, self.table, self.stream());
        let check = Check::new(RUN_OP, stream)?;
        let lse = lse.map(|lse| &lse.raw);
        check_output(&check, spec, heads, self.rows, &q.raw, &out.raw, lse)?;
        options.check(&check, spec, heads)?;
        let sm_scale = options.logit_scale(spec);
        check_sm_scale(&check, sm_scale)?;
        let cache = check_cache(&check, [&kv.k.raw, &kv.v.raw], kv.layout, table, &[spec.dtype_kv])?;
        heads.check_cache(&check, cache, spec.head_dim_qk)?;
        // Unlike other kernels over pages, these multiply a page's number by
        // its stride in 32 bits. Values have the strides of keys.
        check.offsets_in_32_bits("kv.k", &kv.k.raw)?;
        let Some(info) = &self.planned.info else { return Ok(()) };
        let _covered = capture::runs(|| self.replay_key())?;

        let indices = table.indices()?;
        let (q, out) = (q.raw.with_plain_unit_strides(), out.raw.with_plain_unit_strides());
        let kernel = Run {
            float_workspace: DlTensor::new(&self.planned.scratch.float),
            int_workspace: DlTensor::new(&self.planned.scratch.int),
            plan_info: &info.object,
            q: DlTensor::new(&q),
            k_cache: DlTensor::new(&kv.k.raw),
            v_cache: DlTensor::new(&kv.v.raw),
            kv_indices: DlTensor::new(&indices),
            o: DlTensor::new(&out),
            maybe_lse: lse.map(DlTensor::new),
            mask_mode: self.causal.into(),
            layout: kv.layout.code(),
            num_qo_heads: heads.num_qo_heads as i64,
            num_kv_heads: heads.num_kv_heads as i64,
            page_size: table.host().page_size() as i64,
            v_scale: options.v_scale.unwrap_or(1.0).into(),
            sm_scale,
            logits_soft_cap: spec.soft_cap_code(),
            maybe_k_cache_sf: None,
            maybe_v_cache_sf: None,
        };
        // SAFETY: all tensors have the dtypes, shapes, strides and alignment
        // of this module and plan; the page numbers are the device copy of
        // those that the plan was made from, checked against a cache of at
        // most this many pages; mask, heads and page size are the plan's; the
        // workspace is the plan's, on its stream.
        unsafe {
            kernel.call(&self.attention.run, stream)?;
            match lse.filter(|_| self.empty) {
                Some(lse) => empty_states::mark_works(stream, lse, &self.planned.scratch.int, info),
                None => Ok(()),
            }
        }
    }

    /// The stream that runs go to.
    pub fn stream(&self) -> &Stream {
        self.table.stream()
    }

    /// What a graph that captures runs of this plan bakes in: replay it only
    /// after a plan with an equal key.
    ///
    /// # Errors
    /// It was not planned for a graph, or for a batch without requests.
    pub fn replay_key(&self) -> Result<ReplayKey> {
        let Some(info) = self.planned.info.as_ref().filter(|_| self.graph) else {
            return Err(ReplayKey::missing(self.graph));
        };
        let indices = self.table.addresses();
        // A launch has the same size for any number of requests. What its
        // tensors hold are rows.
        let (heads, rows, keys) = (self.attention.heads, self.rows, self.table.host().num_pages());
        let shape = ReplayShape { heads, batch: 0, rows, keys };
        let mask = if self.causal { Mask::Causal } else { Mask::None }.tensors(false)?;
        Ok(ReplayKey::new(info, &self.attention.spec, shape, &self.planned.scratch, indices, &mask))
    }

    /// The plan's numbers, as the module gave them: launch sizes and offsets
    /// into the workspace. They are the same for any batch.
    pub fn numbers(&self) -> &[i64] {
        self.planned.numbers()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    /// An H200's, with heads of 128.
    const BLOCKS: usize = 264;
    const HEADS: Heads = Heads::new(32, 8);
    /// A causal mask, or none, not for a graph.
    const CAUSAL: (bool, Option<usize>) = (true, None);
    const UNMASKED: (bool, Option<usize>) = (false, None);

    /// Calls with the work of requests with these queries and tokens, all
    /// tokens in one page.
    fn with_work<R>(
        requests: &[(usize, usize)],
        heads: Heads,
        (causal, graph): (bool, Option<usize>),
        use_work: impl FnOnce(&Check<'_>, &Work<'_>) -> Result<R>,
    ) -> Result<R> {
        let page_size = requests.iter().map(|&(_, tokens)| tokens).max().unwrap_or(1).max(1);
        let pages =
            requests.iter().map(|&(_, tokens)| (if tokens == 0 { &[][..] } else { &[0][..] }, tokens));
        let table = PageIndices::from_requests(1, page_size, pages)?;
        let queries = RaggedIndices::from_lens(requests.iter().map(|&(queries, _)| queries))?;
        // SAFETY: the legacy default stream; nothing is enqueued on it.
        let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
        let check = Check::new("test", &stream)?;
        let spec = AttentionSpec::new(DType::BF16, 128);
        let group = heads.check("test")?;
        let batch = MixedBatch { queries: &queries, pages: &table, heads, group, causal, graph };
        use_work(&check, &Work::of(&check, &spec, batch)?)
    }

    fn limits(requests: &[(usize, usize)], heads: Heads, options: (bool, Option<usize>)) -> Result<()> {
        with_work(requests, heads, options, |check, work| work.check_limits(check, BLOCKS))
    }

    #[track_caller]
    fn refused<T: std::fmt::Debug>(result: Result<T>, expected: &str) {
        match result {
            Err(FlashInferError::InvalidArgument { argument, .. }) => assert_eq!(argument, expected),
            other => panic!("expected {expected} to be refused, got {other:?}"),
        }
    }

    /// What the planner of a real module takes, and not a byte less.
    #[test]
    fn sizes_are_the_planners() {
        assert_eq!((blocks(132, 128), blocks(132, 64), blocks(132, 256)), (264, 264, 132));
        assert_eq!(float_bytes(264, 8, 128), 316_293_120);
        assert_eq!(float_bytes(264, 1, 64), 20_072_448);
        assert_eq!(float_bytes(132, 3, 256), 117_697_536);
        assert_eq!((int_bytes(264), int_bytes(132)), (6_459_412, 5_851_156));
        assert!(int_bytes(2 * 256) <= Workspace::DEFAULT_INT_BYTES);
    }

    #[test]
    fn queries_must_fit_the_page_table() {
        let fits = |requests: &[(usize, usize)], options| {
            with_work(requests, HEADS, options, |_, work| Ok((work.rows, work.is_empty())))
        };
        assert_eq!(fits(&[(3, 3), (0, 0), (1, 9)], CAUSAL).unwrap(), (4, false));
        assert_eq!(fits(&[(0, 3), (0, 0)], CAUSAL).unwrap(), (0, true));
        assert_eq!(fits(&[], UNMASKED).unwrap(), (0, true));
        assert_eq!(fits(&[(3, 1)], UNMASKED).unwrap(), (3, false));
        assert!(fits(&[(3, 0), (1, 1)], CAUSAL).is_ok(), "without tokens there is nothing to see");
        refused(fits(&[(2, 9), (4, 3)], CAUSAL), "queries");
        let rows = |rows| (true, Some(rows));
        assert_eq!(fits(&[(3, 3)], rows(5)).unwrap(), (5, false));
        assert_eq!(fits(&[(0, 3)], rows(5)).unwrap(), (5, false), "a graph is told to do nothing");
        assert_eq!(fits(&[], rows(5)).unwrap(), (5, true));
        refused(fits(&[(3, 3)], rows(2)), "graph");
        refused(fits(&[(3, 3)], rows(usize::MAX)), "graph");
        refused(fits(&[(3, 3)], rows(1 << 30)), "heads");
        refused(fits(&[(1 << 20, 1 << 20)], CAUSAL), "heads");
        for (num_qo_heads, num_kv_heads) in [(7, 2), (0, 2), (8, 0), (65536, 65536)] {
            let heads = Heads { num_qo_heads, num_kv_heads };
            refused(with_work(&[(1, 9)], heads, CAUSAL, |_, _| Ok(())), "heads");
        }
        let table = PageIndices::from_requests(1, 4, [(&[0][..], 1)]).unwrap();
        let queries = RaggedIndices::from_lens([1, 1]).unwrap();
        let other = with_work(&[], HEADS, CAUSAL, |check, _| {
            let batch = MixedBatch {
                queries: &queries,
                pages: &table,
                heads: HEADS,
                group: 4,
                causal: true,
                graph: None,
            };
            Work::of(check, &AttentionSpec::new(DType::BF16, 128), batch).map(drop)
        });
        refused(other, "queries");
    }

    #[test]
    fn too_much_work_is_refused() {
        let room = (MAX_WORKS - 2 * BLOCKS) / HEADS.num_kv_heads;
        // One tile of 16 rows for each request; four queries of four heads fill it.
        for queries in [1, 4] {
            assert!(limits(&vec![(queries, 100); room], HEADS, CAUSAL).is_ok());
            refused(limits(&vec![(queries, 100); room + 1], HEADS, CAUSAL), "queries");
        }
        // One tile of 128, and two.
        assert!(limits(&vec![(5, 100); room], HEADS, CAUSAL).is_ok());
        refused(limits(&vec![(5, 100); room + 1], HEADS, CAUSAL), "queries");
        refused(limits(&vec![(33, 100); room / 2 + 1], HEADS, CAUSAL), "queries");
        // Room for both kinds, and none taken by requests without queries.
        let mut both = vec![(1, 100); room];
        both.extend(vec![(5, 100); room]);
        both.extend(vec![(0, 100); room]);
        assert!(limits(&both, HEADS, UNMASKED).is_ok());
        // Sums of tokens, of requests that name one page again and again.
        let one = Heads::new(1, 1);
        assert!(limits(&[(128, (1 << 31) - 1)], one, UNMASKED).is_ok());
        let long = RaggedIndices::from_lens([128 * 300]).unwrap();
        let tokens = with_work(&[(1, (1 << 31) - 1)], one, UNMASKED, |check, work| {
            Work { queries: &long, kv_lens: work.kv_lens.clone(), ..*work }.check_limits(check, BLOCKS)
        });
        refused(tokens, "table");
    }

    /// Upstream's count of work items and of partial results, for any batch
    /// that is let through, against what there is room for.
    #[test]
    fn what_is_let_through_has_room() {
        let mut state = 7u64;
        let mut below = |bound: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % bound
        };
        let mut planned = 0;
        for _ in 0..2000 {
            let longest = 1 << below(20);
            let most = 1 << below(9);
            let requests: Vec<_> =
                (0..1 + below(200)).map(|_| (below(most) * below(2), below(longest))).collect();
            let num_kv_heads = [1, 2, 3, 8, 40][below(5)];
            let group = [1, 3, 4, 7, 17, 130][below(6)];
            let heads = Heads::new(num_kv_heads * group, num_kv_heads);
            let blocks = 2 * (1 + below(160));
            let made = with_work(&requests, heads, UNMASKED, |check, work| {
                work.check_limits(check, blocks)?;
                let tokens: usize = work.tiles().map(|(_, tiles, len)| tiles * len).sum();
                let share = (tokens * num_kv_heads).div_ceil(blocks).max(1);
                let share = if share <= 128 { 128 } else { share.next_multiple_of(256) };
                let parts = [share / num_kv_heads.min(2), share];
                let (mut works, mut rows) = ([0; 2], 0);
                for (kind, tiles, len) in work.tiles() {
                    let own = len.div_ceil(parts[kind]);
                    works[kind] += tiles * own.max(1) * num_kv_heads;
                    rows += if own > 1 { tiles * TILES[kind] * own } else { 0 };
                }
                Ok((works, rows))
            });
            let Ok((works, rows)) = made else { continue };
            assert!(works.iter().all(|&works| works <= MAX_WORKS), "{works:?}");
            assert!(rows <= partial_rows(blocks), "{rows} rows of partial results with {blocks} blocks");
            // The kernels number their elements in 32 bits.
            assert!(rows * num_kv_heads * 256 < 1 << 32);
            planned += 1;
        }
        assert!(planned > 1000, "{planned}");
    }
}
