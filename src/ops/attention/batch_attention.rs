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
    batch_attention_work::{MixedBatch, MixedWork, blocks, float_bytes, int_bytes},
    empty_states,
    mask::{Mask, MaskTensors, requests_of},
    modules::Family,
    options::{PlanOptions, RunOptions, check_sm_scale},
    paged_batch::PagedBatch,
    planned::{
        PlanInfo, Planned, Planning, ReplayKey, ReplayShape, check_gpu, check_output, check_workspace,
        host_indices, make_plan, run_over_pages,
    },
    spec::{AttentionSpec, Backend, Heads},
    workspace::{Need, Workspace},
};
use crate::{
    capture,
    error::{FlashInferError, Result},
    ffi::{DlTensor, Kernel, KernelFunction, Signature, kernels},
    indices::PageTable,
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
/// The second name is that of FlashInfer 0.7.4.
const MODULES: &str = "batch_attention_with_kv_cache_*_use_profiler_false";
const MODULES_0_7: &str = "batch_attention_with_kv_cache_*_use_profiler_false_kv_stride_equal";

pub(super) const SIGNATURES: &[(&str, &[Signature])] = &[
    (MODULES, Plan::SIGNATURES),
    (MODULES, Run::SIGNATURES),
    (MODULES_0_7, Plan::SIGNATURES),
    (MODULES_0_7, Run::SIGNATURES),
];

const PLAN_OP: &str = "BatchAttention::plan";
const RUN_OP: &str = "BatchAttentionPlan::run_with";
/// Numbers in a plan.
const PLAN_LEN: usize = 28;

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
///     DType, PageIndices, PageTable, Stream, attention::{AttentionSpec, BatchAttention, Heads,
///     PagedBatch, PlanOptions, Workspace}, gpu::Tensor, kv::{KvLayout, PagedKv}, indices::{RaggedIndices,
///     RaggedTable},
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
/// let plan = attention.plan(&mut workspace, PagedBatch::new(&queries, &table), &PlanOptions::causal())?;
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
    plan: KernelFunction,
    run: KernelFunction,
}

impl BatchAttention {
    /// Resolves the module of a spec for the stream's GPU; downloads the
    /// pinned wheel if no local source holds it and that is allowed.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument): no kernel can work
    /// on such heads. [`Unsupported`](FlashInferError::Unsupported): no such
    /// module can exist, or it is in no local source and FlashInfer publishes
    /// none, or the spec names other kernels. Else the module cannot be had or
    /// opened.
    pub fn new(stream: &Stream, spec: &AttentionSpec, heads: Heads) -> Result<Self> {
        let group = heads.check("BatchAttention::new")?;
        if !matches!(spec.backend, Backend::Auto | Backend::Fa2) {
            return Err(FlashInferError::Unsupported {
                what: format!("attention of mixed batches with Backend::{:?}", spec.backend),
                available: "there is Backend::Fa2, which Backend::Auto takes, too".into(),
            });
        }
        let (module, _) = spec.first_module(Family::Mixed, &[Backend::Fa2])?;
        let ordinal = stream.ordinal();
        let multiprocessors = FlashInferRuntime::get()?.cuda().multiprocessors(ordinal)?;
        Ok(Self {
            spec: *spec,
            heads,
            group,
            ordinal,
            blocks: blocks(multiprocessors, spec.head_dim_vo),
            module,
            plan: module.kernel(Plan::SIGNATURES)?,
            run: module.kernel(Run::SIGNATURES)?,
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
    /// plan whose runs do nothing.
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
        batch: impl Into<PagedBatch<'p>>,
        options: &PlanOptions<'_>,
    ) -> Result<BatchAttentionPlan<'p>> {
        let PagedBatch { queries, table } = batch.into();
        let stream = table.stream();
        let check = Check::new(PLAN_OP, stream)?;
        check_gpu(&check, "table", self.ordinal)?;
        check.on_stream("queries", queries.stream())?;
        let causal = options.is_causal("attention of mixed batches")?;
        options.split.refuse("attention of mixed batches")?;
        let (heads, group) = (self.heads, self.group);
        let (queries, pages) = (queries.host(), table.host());
        let batch = MixedBatch { queries, pages, heads, group, causal, graph: options.graph };
        let work = MixedWork::of(&check, &self.spec, batch)?;
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

    fn plan_work(
        &self,
        check: &Check<'_>,
        workspace: &mut Workspace,
        work: &MixedWork<'_>,
    ) -> Result<PlanInfo> {
        let Heads { num_qo_heads, num_kv_heads } = work.heads;
        let float = float_bytes(self.blocks, num_kv_heads, self.spec.head_dim_vo);
        let need = Need { float, int: int_bytes(self.blocks) };
        let planning = Planning { need, for_graph: work.graph, clear: false, numbers: PLAN_LEN };
        let (qo_indptr, kv_indptr) =
            (host_indices(work.queries.indptr())?, host_indices(work.table.indptr())?);
        let kv_len = host_indices(&work.kv_lens)?;
        make_plan(check, workspace, planning, |scratch, pinned, stream| {
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
            unsafe { kernel.call(&self.plan, stream) }
        })
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
    run_over_pages!();

    /// `out = softmax(q · kᵀ · sm_scale) · v` for each query and head, over the
    /// tokens that the query sees.
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
