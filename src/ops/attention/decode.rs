//! Paged batch decode: one query per request.
//!
//! There are two kernels for it: one of its own, on CUDA cores, and prefill
//! with one query per request, on tensor cores.
//!
//! Source of the contract: `csrc/batch_decode.cu`,
//! `include/flashinfer/attention/{decode,scheduler}.cuh` of FlashInfer 0.6.13.

use super::{
    batch_run::BatchRun,
    decode_need::planned_indptr,
    empty_states,
    mask::MaskTensors,
    modules::Family,
    options::{PlanOptions, RunOptions, check_sm_scale},
    output_scale::OutputScale,
    planned::{
        PlanInfo, Planned, Planning, ROPE_RCP_SCALE, ROPE_RCP_THETA, ReplayKey, ReplayShape, check_described,
        check_workspace, host_indices, make_plan, run_over_pages,
    },
    prefill_batch::{BatchShape, PrefillBatch},
    prefill_kernels::{PageArrays, PrefillKernels, RunTensors},
    resolve::flash_attention,
    spec::{AttentionSpec, Backend, Heads},
    workspace::{Need, Workspace},
};
use crate::{
    capture,
    device::Device,
    error::{FlashInferError, Result},
    ffi::{DlTensor, Kernel, KernelFunction, Signature, TensorObject, kernels},
    indices::PageTable,
    kv::PagedKv,
    module::Module,
    ops::{check::Check, enable_pdl},
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
    struct Plan = "plan"(
        float_workspace: Tensor, int_workspace: Tensor, pinned_int_workspace: Tensor, indptr: Tensor,
        batch_size: Int, num_qo_heads: Int, num_kv_heads: Int, page_size: Int, enable_cuda_graph: Bool,
        window_left: Int, logits_soft_cap: Float, head_dim_qk: Int, head_dim_vo: Int,
        empty_q_data: Tensor, empty_kv_data: Tensor,
    ) -> "Array<int>";
    struct Run = "run"(
        float_workspace: Tensor, int_workspace: Tensor, plan_info: IntArray, q: Tensor,
        paged_k_cache: Tensor, paged_v_cache: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor, o: Tensor, maybe_lse: OptTensor, kv_layout: Int, window_left: Int,
        enable_pdl: Bool, maybe_alibi_slopes: OptTensorObject, logits_soft_cap: Float, sm_scale: Float,
        rope_rcp_scale: Float, rope_rcp_theta: Float,
    ) -> "void";
}

pub(in crate::ops) const SIGNATURES: &[(&str, &[Signature])] =
    &[("batch_decode_with_kv_cache_*", Plan::SIGNATURES), ("batch_decode_with_kv_cache_*", Run::SIGNATURES)];

const PLAN_OP: &str = "BatchDecode::plan";
const RUN_OP: &str = "DecodePlan::run_with";
const NEW_OP: &str = "BatchDecode::new";
/// From this group size on, [`Backend::Auto`] decodes on tensor cores, which
/// are faster there; of 8-bit keys, which CUDA cores convert for each query
/// head, from the other. docs/attention.md has the numbers.
const TENSOR_CORES_FROM_GROUP: usize = 3;
const TENSOR_CORES_FROM_GROUP_8_BIT: usize = 2;
/// Query heads per KV head that the kernel is compiled for.
const GROUP_SIZES: [usize; 5] = [1, 2, 3, 4, 8];
/// Numbers in a plan.
const PLAN_LEN: usize = 10;

/// Paged batch decode: attention of one query per request to the request's
/// pages.
///
/// What [`Backend::Auto`] picks, on CUDA cores or on tensor cores,
/// [`backend`](Self::backend) says.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{
///     DType, PageIndices, PageTable, Stream,
///     attention::{AttentionSpec, BatchDecode, Heads, PlanOptions, Workspace},
///     gpu::Tensor,
///     kv::{KvLayout, PagedKv},
/// };
/// use half::f16;
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// let decode = BatchDecode::new(&stream, &AttentionSpec::new(DType::F16, 128), Heads::new(32, 8))?;
///
/// // One request of 50 tokens in 4 pages of 16.
/// let table = PageTable::new(&stream, PageIndices::from_requests(4, 16, [(&[0, 1, 2, 3][..], 50)])?)?;
/// let mut workspace = Workspace::new(&stream)?;
/// let plan = decode.plan(&mut workspace, &table, &PlanOptions::default())?;
///
/// let q = Tensor::<f16>::zeros(&stream, &[1, 32, 128])?;
/// let [k, v] = [(); 2].map(|()| Tensor::<f16>::zeros(&stream, &[4, 16, 8, 128]));
/// let (k, v) = (k?, v?);
/// let mut out = Tensor::<f16>::zeros(&stream, &[1, 32, 128])?;
/// plan.run(&q.view(), &PagedKv::new(k.view(), v.view(), KvLayout::Nhd), &mut out.view_mut())?;
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
#[derive(Clone, Copy, Debug)]
pub struct BatchDecode {
    spec: AttentionSpec,
    heads: Heads,
    kernels: Kernels,
}

/// The kernels of a decode.
#[derive(Clone, Copy, Debug)]
enum Kernels {
    CudaCores(DecodeKernels),
    TensorCores(PrefillKernels),
}

/// The functions of a decode module.
#[derive(Clone, Copy, Debug)]
struct DecodeKernels {
    module: &'static Module,
    plan: KernelFunction,
    run: KernelFunction,
}

impl DecodeKernels {
    fn load(module: &'static Module) -> Result<Self> {
        Ok(Self { module, plan: module.kernel(Plan::SIGNATURES)?, run: module.kernel(Run::SIGNATURES)? })
    }
}

impl BatchDecode {
    /// Resolves the module of a spec for these heads; downloads the pinned
    /// wheel if no local source holds it and that is allowed.
    ///
    /// # Errors
    /// [`FlashInferError::Unsupported`]: no such module can exist, or it is in no
    /// local source and FlashInfer publishes none; it has no kernel for the group
    /// size, or not for the stream's GPU; values have another width than keys.
    /// Else the module cannot be had or opened.
    pub fn new(stream: &Stream, spec: &AttentionSpec, heads: Heads) -> Result<Self> {
        spec.check_paged()?;
        if spec.backend == Backend::Fa3 {
            let runtime = FlashInferRuntime::get()?;
            flash_attention(spec.backend, runtime.compute_capability(stream.ordinal())?)?;
        }
        let group = heads.check(NEW_OP)?;
        let served = check_cuda_cores(spec, group, "use Backend::Fa2 or Backend::Auto");
        let cuda_cores = served.is_ok() && !spec.attention_sink;
        if spec.backend == Backend::CudaCores {
            served?;
        }
        let from_group =
            if spec.dtype_kv.size() == 1 { TENSOR_CORES_FROM_GROUP_8_BIT } else { TENSOR_CORES_FROM_GROUP };
        // Decode through prefill is FlashAttention 2 unless asked otherwise, as
        // upstream has it.
        let backends: &[Backend] = match spec.backend {
            Backend::Auto if cuda_cores && group < from_group => &[Backend::CudaCores, Backend::Fa2],
            Backend::Auto if cuda_cores => &[Backend::Fa2, Backend::CudaCores],
            Backend::Auto => &[Backend::Fa2],
            ref asked => std::slice::from_ref(asked),
        };
        let (module, backend) = spec.first_module(Family::Batch, backends)?;
        let kernels = match backend {
            Backend::CudaCores => Kernels::CudaCores(DecodeKernels::load(module)?),
            backend => Kernels::TensorCores(PrefillKernels::load(module, spec, backend == Backend::Fa3)?),
        };
        Ok(Self { spec: *spec, heads, kernels })
    }

    /// The module that serves the spec.
    pub fn module(&self) -> &'static Module {
        match &self.kernels {
            Kernels::CudaCores(kernels) => kernels.module,
            Kernels::TensorCores(kernels) => kernels.module(),
        }
    }

    /// The kernels that were picked.
    pub fn backend(&self) -> Backend {
        match &self.kernels {
            Kernels::CudaCores(_) => Backend::CudaCores,
            Kernels::TensorCores(kernels) => kernels.backend(),
        }
    }

    /// The spec.
    pub fn spec(&self) -> &AttentionSpec {
        &self.spec
    }

    /// The heads.
    pub fn heads(&self) -> Heads {
        self.heads
    }

    /// Divides the work of one decode step among the GPU's multiprocessors,
    /// from the page table's host copy, and enqueues the upload of the result
    /// to the workspace.
    ///
    /// The plan serves every layer of the step. A batch without requests gives
    /// a plan whose runs do nothing.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument): workspace and
    /// page table belong to different streams; the workspace is too small and
    /// does not [grow](Workspace#growth); the stream is being captured;
    /// [`graph`](PlanOptions::graph) is not the number of requests;
    /// [`split`](PlanOptions::split) is out of range.
    /// [`Unsupported`](FlashInferError::Unsupported): a custom or multi-item
    /// mask; a `split` for other kernels than FlashAttention 2. Else what the
    /// module or CUDA said. The workspace can be used again.
    pub fn plan<'p>(
        &self,
        workspace: &'p mut Workspace,
        table: impl Into<&'p PageTable>,
        options: &PlanOptions<'_>,
    ) -> Result<DecodePlan<'p>> {
        let table = table.into();
        let stream = table.stream();
        let check = Check::new(PLAN_OP, stream)?;
        let batch = table.host().batch_size();
        // A single query sees all keys with either mask.
        options.is_causal("decode")?;
        if options.graph.is_some_and(|rows| rows != batch) {
            return check.fail(
                "graph",
                format!(
                    "{:?} rows; decode has one row for each request of the table, {batch} in all",
                    options.graph
                ),
            );
        }
        let graph = options.graph.is_some();
        check_workspace(&check, workspace)?;
        self.spec.check_output_size(&check, batch, self.heads)?;
        let pages = table.host().indptr().windows(2).map(|pair| (1, (pair[1] - pair[0]) as usize));
        let empty = empty_states::possible(graph, &MaskTensors::NONE, pages);
        if empty {
            empty_states::prepare()?;
        }
        let mut queries = None;
        let info = match &self.kernels {
            Kernels::CudaCores(kernels) => {
                options.split.refuse("decode on CUDA cores")?;
                match batch {
                    0 => None,
                    _ => Some(self.plan_on_cuda_cores(kernels, &check, workspace, table, graph)?),
                }
            }
            Kernels::TensorCores(kernels) if batch == 0 => {
                kernels.check_split(&check, options, table.host().page_size())?;
                None
            }
            Kernels::TensorCores(kernels) => {
                kernels.check_split(&check, options, table.host().page_size())?;
                let (indptr, device_indptr) = workspace.one_query_each(batch)?;
                queries = Some(device_indptr);
                let (indices, lens) = (table.host(), table.host().seq_lens());
                let batch = PrefillBatch {
                    qo_indptr: indptr.into(),
                    kv_indptr: indices.indptr().into(),
                    kv_lens: lens.into(),
                    shape: BatchShape {
                        page_size: indices.page_size(),
                        heads: self.heads,
                        causal: false,
                        rows: batch,
                        one_query_each: true,
                        cuda_graph: graph,
                        split: options.split,
                    },
                };
                Some(kernels.make_plan(&check, workspace, batch)?)
            }
        };
        Ok(DecodePlan {
            decode: *self,
            table,
            graph,
            queries,
            empty,
            planned: Planned::new(workspace, info)?,
        })
    }

    fn plan_on_cuda_cores(
        &self,
        kernels: &DecodeKernels,
        check: &Check<'_>,
        workspace: &mut Workspace,
        table: &PageTable,
        for_graph: bool,
    ) -> Result<PlanInfo> {
        let (stream, indices) = (table.stream(), table.host());
        let batch = indices.batch_size();
        let cuda = FlashInferRuntime::get()?.cuda();
        OutputScale::prepare(&self.spec)?;
        let planned = planned_indptr(indices.indptr());
        let need = Need::of_decode(
            &planned,
            indices.page_size(),
            self.heads,
            self.spec.head_dim_vo,
            for_graph,
            cuda.multiprocessors(stream.ordinal())?,
        );
        let planning = Planning { need, for_graph, clear: false, numbers: PLAN_LEN };
        let indptr = host_indices(&planned)?;
        let empty = |dtype| RawTensor::new(std::ptr::null_mut(), Device::Cpu, dtype, &[0], None);
        let (empty_q, empty_kv) = (empty(self.spec.dtype_q)?, empty(self.spec.dtype_kv)?);
        make_plan(check, workspace, planning, |scratch, pinned, stream| {
            let kernel = Plan {
                float_workspace: DlTensor::new(&scratch.float),
                int_workspace: DlTensor::new(&scratch.int),
                pinned_int_workspace: DlTensor::new(pinned),
                indptr: DlTensor::new(&indptr),
                batch_size: batch as i64,
                num_qo_heads: self.heads.num_qo_heads as i64,
                num_kv_heads: self.heads.num_kv_heads as i64,
                page_size: indices.page_size() as i64,
                enable_cuda_graph: for_graph,
                window_left: self.spec.window_left_code(),
                logits_soft_cap: self.spec.soft_cap_code(),
                head_dim_qk: self.spec.head_dim_qk as i64,
                head_dim_vo: self.spec.head_dim_vo as i64,
                empty_q_data: DlTensor::new(&empty_q),
                empty_kv_data: DlTensor::new(&empty_kv),
            };
            // SAFETY: indptr is a checked host array of batch + 1 entries; the
            // host buffer is page-locked, as large as the device one and as
            // what the planner can write, and not written again before the
            // copy out of it is done; partial results have room; head
            // dimensions are the module's.
            unsafe { kernel.call(&kernels.plan, stream) }
        })
    }
}

/// Refuses heads that decode on CUDA cores is not compiled for, and says what
/// to do instead.
pub(super) fn check_cuda_cores(spec: &AttentionSpec, group: usize, instead: &str) -> Result<()> {
    if GROUP_SIZES.contains(&group) && spec.head_dim_qk == spec.head_dim_vo {
        return Ok(());
    }
    Err(FlashInferError::Unsupported {
        what: format!(
            "decode on CUDA cores with {group} query heads per KV head and head dimensions {} and {}",
            spec.head_dim_qk, spec.head_dim_vo
        ),
        available: format!("it has {GROUP_SIZES:?} and equal dimensions; {instead}"),
    })
}

/// One step's plan, ready to run for each layer.
///
/// It borrows its workspace, which no other plan can then use, and its page
/// table, which cannot be updated meanwhile. Runs go to their stream. The
/// plan cannot be shared between threads, because its runs use the workspace
/// one after the other.
#[derive(Debug)]
pub struct DecodePlan<'p> {
    decode: BatchDecode,
    table: &'p PageTable,
    /// Whether it is for a CUDA graph.
    graph: bool,
    /// Query offsets on the device, for kernels that take them.
    queries: Option<RawTensor>,
    /// Whether requests may have no tokens.
    empty: bool,
    planned: Planned<'p>,
}

impl DecodePlan<'_> {
    run_over_pages!();

    /// `out = softmax(q · kᵀ · sm_scale) · v` for each request and head, over
    /// the request's tokens.
    ///
    /// `q` and `out` are `[batch, num_qo_heads, head_dim]` of the spec's
    /// dtypes, `out` contiguous; `kv` is the paged cache that the page table
    /// was checked for; `lse`, if given, is a contiguous `f32`
    /// `[batch, num_qo_heads]` and takes the base-2 logarithm of each sum of
    /// exponentials. A request without tokens gets zeros, and −∞; with
    /// attention sinks, the sink.
    ///
    /// Of scores below −50000 see [`attention`](super#very-negative-scores).
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) before
    /// anything is launched: a device, stream, dtype, shape, stride or
    /// alignment does not fit the plan. Else what the module or CUDA said.
    pub fn run_with(
        &self,
        q: &TensorRef<'_>,
        kv: &PagedKv<'_>,
        out: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        options: &RunOptions<'_>,
    ) -> Result<()> {
        let (spec, heads, table) = (&self.decode.spec, self.decode.heads, self.table);
        let check = Check::new(RUN_OP, self.stream())?;
        let lse = lse.map(|lse| &lse.raw);
        let rows = table.host().batch_size();
        let run = BatchRun { spec, heads, rows, q: &q.raw, out: &out.raw, lse, options };
        run.check(&check)?;
        run.check_pages(&check, kv, table)?;
        let Some(info) = &self.planned.info else { return Ok(()) };
        let _covered = capture::runs(|| self.replay_key())?;
        match (&self.decode.kernels, &self.queries) {
            (Kernels::TensorCores(kernels), Some(qo_indptr)) => {
                check_described(&check, kernels.backend() == Backend::Fa3, &[("q", &q.raw)])?;
                check_sm_scale(&check, options.logit_scale(spec))?;
                kernels.check_scale(&check, options)?;
                let (q, out) = (q.raw.with_plain_unit_strides(), out.raw.with_plain_unit_strides());
                let (scratch, mask) = (&self.planned.scratch, &MaskTensors::NONE);
                let run = RunTensors { scratch, info, q, qo_indptr, out, lse, mask, options };
                // SAFETY: all tensors have the dtypes, shapes, strides and
                // alignment of this module and plan; the index arrays are the
                // device copies of those that the plan was made from, checked
                // against a cache of at most this many pages; the workspace is
                // the plan's, on its stream.
                unsafe { kernels.run_paged(&run, table.stream(), kv, &PageArrays::of(table)?) }?;
            }
            (Kernels::CudaCores(kernels), _) => {
                OutputScale::check_ready(&check, spec.dtype_o, options.v_scale)?;
                // SAFETY: as above.
                unsafe { self.run_on_cuda_cores(kernels, info, &q.raw, kv, &out.raw, lse, options) }?;
            }
            // A plan on tensor cores has query offsets.
            (Kernels::TensorCores(_), None) => {}
        }
        let Some(lse) = lse.filter(|_| self.empty) else { return Ok(()) };
        let (indptr, last_page_len) = (table.indptr()?, table.last_page_len()?);
        let page_size = table.host().page_size();
        let rows = empty_states::EmptyRows {
            keys: empty_states::KeyLengths::Paged {
                indptr: &indptr,
                last_page_len: &last_page_len,
                page_size,
            },
            qo_indptr: None,
            batch: table.host().batch_size(),
            mask: &MaskTensors::NONE,
            window_left: spec.window_left_code(),
            sinks: options.sinks.as_ref(),
        };
        // SAFETY: as above; each request has one query.
        unsafe { rows.mark(self.stream(), lse) }
    }

    /// # Safety
    /// All tensors must have been checked for this spec and plan.
    #[expect(clippy::too_many_arguments, reason = "the checked arguments of `run`")]
    unsafe fn run_on_cuda_cores(
        &self,
        kernels: &DecodeKernels,
        info: &PlanInfo,
        q: &RawTensor,
        kv: &PagedKv<'_>,
        out: &RawTensor,
        lse: Option<&RawTensor>,
        options: &RunOptions<'_>,
    ) -> Result<()> {
        let (spec, table, stream) = (&self.decode.spec, self.table, self.stream());
        let (indptr, indices, last_page_len) = (table.indptr()?, table.indices()?, table.last_page_len()?);
        let kernel = Run {
            float_workspace: DlTensor::new(&self.planned.scratch.float),
            int_workspace: DlTensor::new(&self.planned.scratch.int),
            plan_info: &info.object,
            q: DlTensor::new(q),
            paged_k_cache: DlTensor::new(&kv.k.raw),
            paged_v_cache: DlTensor::new(&kv.v.raw),
            paged_kv_indptr: DlTensor::new(&indptr),
            paged_kv_indices: DlTensor::new(&indices),
            paged_kv_last_page_len: DlTensor::new(&last_page_len),
            o: DlTensor::new(out),
            maybe_lse: lse.map(DlTensor::new),
            kv_layout: kv.layout.code(),
            window_left: spec.window_left_code(),
            enable_pdl: enable_pdl(FlashInferRuntime::get()?, options.enable_pdl, stream.ordinal())?,
            maybe_alibi_slopes: options.alibi_slopes.as_ref().map(TensorObject::from),
            logits_soft_cap: spec.soft_cap_code(),
            sm_scale: options.logit_scale(spec),
            rope_rcp_scale: ROPE_RCP_SCALE,
            rope_rcp_theta: ROPE_RCP_THETA,
        };
        // SAFETY: promised by the caller.
        unsafe {
            kernel.call(&kernels.run, stream)?;
            OutputScale::apply(stream, out, options.v_scale)
        }
    }

    /// The stream that runs go to.
    pub fn stream(&self) -> &Stream {
        self.table.stream()
    }

    /// Whether long requests are divided among several blocks, whose partial
    /// results a second kernel merges.
    pub fn splits_kv(&self) -> bool {
        // The last of the planner's numbers, on CUDA cores and of FlashAttention
        // 2 alike; 3 never divides a request.
        let last = self.planned.info.as_ref().and_then(|info| info.numbers.last());
        self.decode.backend() != Backend::Fa3 && last.is_some_and(|&split| split != 0)
    }

    /// What a graph that captures runs of this plan bakes in: replay it only
    /// after a plan with an equal key. A [`CapturedStep`](crate::graph::CapturedStep)
    /// sees to that.
    ///
    /// # Errors
    /// It was not planned for a graph, or for a batch without requests.
    pub fn replay_key(&self) -> Result<ReplayKey> {
        let Some(info) = self.planned.info.as_ref().filter(|_| self.graph) else {
            return Err(ReplayKey::missing(self.graph));
        };
        let (decode, batch) = (&self.decode, self.table.host().batch_size());
        let queries = self.queries.as_ref().map(|indptr| indptr.data as usize);
        let indices = self.table.addresses().into_iter().chain(queries);
        let shape =
            ReplayShape { heads: decode.heads, batch, rows: batch, keys: self.table.host().num_pages() };
        Ok(ReplayKey::new(info, &decode.spec, shape, &self.planned.scratch, indices, &MaskTensors::NONE))
    }

    /// The plan's numbers, as the module gave them: launch sizes and offsets
    /// into the workspace.
    pub fn numbers(&self) -> &[i64] {
        self.planned.numbers()
    }
}
