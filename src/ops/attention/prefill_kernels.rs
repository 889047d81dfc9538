//! The kernels of batch prefill: their functions, what their planners take, and
//! the calls.
//!
//! There are two sets of kernels, FlashAttention 2 and 3. They take different
//! argument lists, which stand here side by side; everything above them is the
//! same. Decode on tensor cores is prefill with one query per request and uses
//! the same functions.
//!
//! Source of the contract: `csrc/batch_prefill.cu`, `csrc/batch_prefill_sm90.cu`,
//! `include/flashinfer/attention/{prefill,scheduler}.cuh` of FlashInfer 0.6.13.

use super::{
    mask::MaskTensors,
    options::{PlanOptions, RunOptions, Split},
    output_scale::OutputScale,
    planned::{
        LEAST_CHUNK, PlanInfo, Planning, ROPE_RCP_SCALE, ROPE_RCP_THETA, Scratch, host_indices, make_plan,
    },
    spec::{AttentionSpec, Backend, Heads},
    workspace::{Need, Workspace, arrays},
};
use crate::{
    cuda::DeviceAttribute,
    error::{FlashInferError, Result},
    ffi::{DlTensor, Function, Kernel, Signature, TensorObject, kernels},
    indices::{PageTable, RaggedTable},
    kv::{KvLayout, PagedKv},
    module::Module,
    ops::{check::Check, enable_pdl},
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorRef},
};

kernels! {
    struct Fa2Plan = "plan"(
        float_workspace: Tensor, int_workspace: Tensor, pinned_int_workspace: Tensor,
        qo_indptr: Tensor, kv_indptr: Tensor, kv_len_arr: Tensor,
        total_num_rows: Int, batch_size: Int, num_qo_heads: Int, num_kv_heads: Int, page_size: Int,
        enable_cuda_graph: Bool, head_dim_qk: Int, head_dim_vo: Int, causal: Bool, window_left: Int,
        fixed_split_size: Int, disable_split_kv: Bool, num_colocated_ctas: Int,
    ) -> "Array<int>";
    struct Fa3Plan = "plan"(
        float_workspace: Tensor, int_workspace: Tensor, pinned_int_workspace: Tensor,
        qo_indptr: Tensor, kv_indptr: Tensor, kv_len_arr: Tensor,
        total_num_rows: Int, batch_size: Int, num_qo_heads: Int, num_kv_heads: Int, page_size: Int,
        enable_cuda_graph: Bool, head_dim_qk: Int, head_dim_vo: Int, causal: Bool, window_left: Int,
    ) -> "Array<int>";
    struct Fa2PagedRun = "paged_run"(
        float_workspace: Tensor, int_workspace: Tensor, plan_info: IntArray, q: Tensor,
        paged_k_cache: Tensor, paged_v_cache: Tensor, qo_indptr: Tensor, paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor, o: Tensor, maybe_lse: OptTensor,
        mask_mode: Int, layout: Int, window_left: Int, enable_pdl: Bool,
        maybe_custom_mask: OptTensorObject, maybe_mask_indptr: OptTensorObject,
        maybe_alibi_slopes: OptTensorObject, maybe_prefix_len_ptr: OptTensorObject,
        maybe_token_pos_in_items_ptr: OptTensorObject, maybe_max_item_len_ptr: OptTensorObject,
        maybe_k_cache_sf: OptTensorObject, maybe_v_cache_sf: OptTensorObject,
        logits_soft_cap: Float, sm_scale: Float, rope_rcp_scale: Float, rope_rcp_theta: Float,
        token_pos_in_items_len: Int,
    ) -> "void";
    struct Fa2RaggedRun = "ragged_run"(
        float_workspace: Tensor, int_workspace: Tensor, plan_info: IntArray, q: Tensor, k: Tensor, v: Tensor,
        qo_indptr: Tensor, kv_indptr: Tensor, o: Tensor, maybe_lse: OptTensor,
        mask_mode: Int, layout: Int, window_left: Int, enable_pdl: Bool,
        maybe_custom_mask: OptTensorObject, maybe_mask_indptr: OptTensorObject,
        maybe_alibi_slopes: OptTensorObject, maybe_prefix_len_ptr: OptTensorObject,
        maybe_token_pos_in_items_ptr: OptTensorObject, maybe_max_item_len_ptr: OptTensorObject,
        maybe_k_cache_sf: OptTensorObject, maybe_v_cache_sf: OptTensorObject,
        logits_soft_cap: Float, sm_scale: Float, rope_rcp_scale: Float, rope_rcp_theta: Float,
        token_pos_in_items_len: Int,
    ) -> "void";
    struct Fa3PagedRun = "paged_run"(
        float_workspace: Tensor, int_workspace: Tensor, plan_info: IntArray, q: Tensor,
        paged_k_cache: Tensor, paged_v_cache: Tensor, qo_indptr: Tensor, paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor, o: Tensor, maybe_lse: OptTensor,
        mask_mode: Int, layout: Int, window_left: Int, enable_pdl: Bool,
        maybe_prefix_len_ptr: OptTensorObject, maybe_token_pos_in_items_ptr: OptTensorObject,
        maybe_max_item_len_ptr: OptTensorObject, maybe_scale_v: OptTensorObject,
        logits_soft_cap: Float, sm_scale: Float, scale_v_scalar: Float, token_pos_in_items_len: Int,
    ) -> "void";
    struct Fa3RaggedRun = "ragged_run"(
        float_workspace: Tensor, int_workspace: Tensor, plan_info: IntArray, q: Tensor, k: Tensor, v: Tensor,
        qo_indptr: Tensor, kv_indptr: Tensor, o: Tensor, maybe_lse: OptTensor,
        mask_mode: Int, layout: Int, window_left: Int, enable_pdl: Bool,
        maybe_prefix_len_ptr: OptTensorObject, maybe_token_pos_in_items_ptr: OptTensorObject,
        maybe_max_item_len_ptr: OptTensorObject, maybe_scale_v: OptTensorObject,
        logits_soft_cap: Float, sm_scale: Float, scale_v_scalar: Float, token_pos_in_items_len: Int,
    ) -> "void";
    struct SinkPagedRun = "paged_run"(
        float_workspace: Tensor, int_workspace: Tensor, plan_info: IntArray, q: Tensor,
        paged_k_cache: Tensor, paged_v_cache: Tensor, qo_indptr: Tensor, paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor, o: Tensor, maybe_lse: OptTensor,
        mask_mode: Int, layout: Int, window_left: Int, enable_pdl: Bool,
        sink: TensorObject, sm_scale: Float,
    ) -> "void";
    struct SinkRaggedRun = "ragged_run"(
        float_workspace: Tensor, int_workspace: Tensor, plan_info: IntArray, q: Tensor, k: Tensor, v: Tensor,
        qo_indptr: Tensor, kv_indptr: Tensor, o: Tensor, maybe_lse: OptTensor,
        mask_mode: Int, layout: Int, window_left: Int, enable_pdl: Bool,
        sink: TensorObject, sm_scale: Float,
    ) -> "void";
}

/// Modules with 16-bit queries; those with 8-bit ones take other arguments.
const FA2_MODULES: &str = "batch_prefill_with_kv_cache_dtype_q_*16_dtype_kv_*_f16qk_False";
const FA3_MODULES: &str = "batch_prefill_with_kv_cache_dtype_q_*16_dtype_kv_*_f16qk_False_sm90";
const FA2_SINK_MODULES: &str = "batch_prefill_with_attention_sink_kv_cache_*_";
const FA3_SINK_MODULES: &str = "batch_prefill_with_attention_sink_kv_cache_*_sm90";

pub(in crate::ops) const SIGNATURES: &[(&str, Signature)] = &[
    (FA2_MODULES, Fa2Plan::SIGNATURE),
    (FA2_MODULES, Fa2PagedRun::SIGNATURE),
    (FA2_MODULES, Fa2RaggedRun::SIGNATURE),
    (FA3_MODULES, Fa3Plan::SIGNATURE),
    (FA3_MODULES, Fa3PagedRun::SIGNATURE),
    (FA3_MODULES, Fa3RaggedRun::SIGNATURE),
    (FA2_SINK_MODULES, Fa2Plan::SIGNATURE),
    (FA2_SINK_MODULES, SinkPagedRun::SIGNATURE),
    (FA2_SINK_MODULES, SinkRaggedRun::SIGNATURE),
    (FA3_SINK_MODULES, Fa3Plan::SIGNATURE),
    (FA3_SINK_MODULES, SinkPagedRun::SIGNATURE),
    (FA3_SINK_MODULES, SinkRaggedRun::SIGNATURE),
];

pub(super) const RUN_OP: &str = "PrefillPlan::run_with";
/// Numbers in a plan.
const FA2_PLAN_LEN: usize = 15;
const FA3_PLAN_LEN: usize = 9;
/// Blocks per multiprocessor that FlashAttention 2 plans for.
const FA2_BLOCKS_PER_SM: usize = 2;

/// The functions of a prefill module.
#[derive(Clone, Copy, Debug)]
pub(super) struct PrefillKernels {
    pub(super) spec: AttentionSpec,
    pub(super) fa3: bool,
    module: &'static Module,
    plan: Function,
    paged_run: Function,
    ragged_run: Function,
}

/// What a plan is made from.
pub(super) struct PrefillBatch<'a> {
    /// Query offsets of `batch + 1` entries.
    pub(super) qo_indptr: &'a [i32],
    /// Offsets of pages, or of tokens with a page size of 1.
    pub(super) kv_indptr: &'a [i32],
    /// Tokens of each request.
    pub(super) kv_lens: &'a [i32],
    pub(super) page_size: usize,
    pub(super) heads: Heads,
    pub(super) causal: bool,
    /// Rows of the tensors: those of the batch, or the fixed maximum of a graph.
    pub(super) rows: usize,
    pub(super) cuda_graph: bool,
    /// Only FlashAttention 2 reads it.
    pub(super) split: Split,
}

/// Everything that a plan depends on, to tell whether another would be equal.
struct PrefillPlanKey {
    spec: AttentionSpec,
    module: &'static Module,
    qo_indptr: Vec<i32>,
    kv_indptr: Vec<i32>,
    kv_lens: Vec<i32>,
    page_size: usize,
    heads: Heads,
    causal: bool,
    rows: usize,
    cuda_graph: bool,
    split: Split,
}

impl PrefillPlanKey {
    fn new(kernels: &PrefillKernels, batch: &PrefillBatch<'_>) -> Self {
        let &PrefillBatch {
            qo_indptr,
            kv_indptr,
            kv_lens,
            page_size,
            heads,
            causal,
            rows,
            cuda_graph,
            split,
        } = batch;
        Self {
            spec: kernels.spec,
            module: kernels.module,
            qo_indptr: qo_indptr.to_vec(),
            kv_indptr: kv_indptr.to_vec(),
            kv_lens: kv_lens.to_vec(),
            page_size,
            heads,
            causal,
            rows,
            cuda_graph,
            split,
        }
    }

    /// Whether these kernels' plan of this batch would be the same.
    fn is_of(&self, kernels: &PrefillKernels, batch: &PrefillBatch<'_>) -> bool {
        let &PrefillBatch {
            qo_indptr,
            kv_indptr,
            kv_lens,
            page_size,
            heads,
            causal,
            rows,
            cuda_graph,
            split,
        } = batch;
        std::ptr::eq(self.module, kernels.module)
            && self.spec == kernels.spec
            && (self.page_size, self.heads, self.causal) == (page_size, heads, causal)
            && (self.rows, self.cuda_graph, self.split) == (rows, cuda_graph, split)
            && self.qo_indptr == qo_indptr
            && self.kv_indptr == kv_indptr
            && self.kv_lens == kv_lens
    }
}

/// What a run works on, besides keys and values.
pub(super) struct RunTensors<'a> {
    pub(super) scratch: &'a Scratch,
    pub(super) info: &'a PlanInfo,
    pub(super) q: RawTensor,
    pub(super) qo_indptr: &'a RawTensor,
    pub(super) out: RawTensor,
    pub(super) lse: Option<&'a RawTensor>,
    pub(super) mask: &'a MaskTensors,
    pub(super) options: &'a RunOptions<'a>,
}

/// Which pages are each request's: the arrays of a page table.
pub(super) struct Pages {
    pub(super) indptr: RawTensor,
    pub(super) indices: RawTensor,
    pub(super) last_page_len: RawTensor,
}

impl Pages {
    pub(super) fn of(table: &PageTable) -> Result<Self> {
        Ok(Self { indptr: table.indptr()?, indices: table.indices()?, last_page_len: table.last_page_len()? })
    }
}

impl PrefillKernels {
    /// The functions of a module that serves the spec.
    pub(super) fn load(module: &'static Module, spec: &AttentionSpec, fa3: bool) -> Result<Self> {
        spec.check_called()?;
        Ok(Self {
            spec: *spec,
            fa3,
            module,
            plan: module.function("plan")?,
            paged_run: module.function("paged_run")?,
            ragged_run: module.function("ragged_run")?,
        })
    }

    pub(super) fn module(&self) -> &'static Module {
        self.module
    }

    pub(super) fn backend(&self) -> Backend {
        if self.fa3 { Backend::Fa3 } else { Backend::Fa2 }
    }

    /// Refuses what cannot be asked of the planner.
    pub(super) fn check_split(
        &self,
        check: &Check<'_>,
        options: &PlanOptions<'_>,
        page_size: usize,
    ) -> Result<()> {
        if self.fa3 {
            return options.split.refuse("FlashAttention 3, which never divides the keys of a request");
        }
        options.split.check(check, page_size, options.graph.is_some())
    }

    /// Plans a batch, and a [checked](Self::check_split) way to divide it.
    pub(super) fn make_plan(
        &self,
        check: &Check<'_>,
        workspace: &mut Workspace,
        batch: &PrefillBatch<'_>,
    ) -> Result<PlanInfo> {
        let last = workspace.planned::<(PrefillPlanKey, PlanInfo)>();
        if let Some((_, info)) = last.filter(|(key, _)| key.is_of(self, batch)) {
            return Ok(info.clone());
        }
        let stream = workspace.stream().clone();
        let cuda = FlashInferRuntime::get()?.cuda();
        OutputScale::prepare(&self.spec)?;
        let multiprocessors = cuda.attribute(stream.ordinal(), DeviceAttribute::MultiprocessorCount)?;
        let multiprocessors = multiprocessors.unsigned_abs() as usize;
        let (qo_indptr, kv_indptr) = (host_indices(batch.qo_indptr)?, host_indices(batch.kv_indptr)?);
        let kv_lens = host_indices(batch.kv_lens)?;
        let whole = must_stay_whole(&self.spec, batch);
        if let Some(pages) = batch.split.fixed_split_size.filter(|_| whole && !self.fa3) {
            return Err(FlashInferError::Unsupported {
                what: format!(
                    "fixed_split_size of {pages} pages for several queries of a request with a sliding window and \
                     no causal mask"
                ),
                available: "keys stay whole there; use Split::disabled(), or a causal mask".into(),
            });
        }
        let no_split = whole || batch.split.disable_split_kv;
        let (need, numbers) = if self.fa3 {
            (fa3_need(&self.spec, batch, multiprocessors), FA3_PLAN_LEN)
        } else {
            let (major, _) = cuda.compute_capability(stream.ordinal())?;
            (fa2_need(&self.spec, batch, no_split, multiprocessors, major), FA2_PLAN_LEN)
        };
        // Kernels number the elements of partial results in 32 bits. Parts of the
        // planner's own choice are not as many.
        if batch.split.fixed_split_size.is_some() && need.float / size_of::<f32>() > u32::MAX as usize {
            return check.fail(
                "split",
                format!(
                    "parts of {:?} pages make {} bytes of partial results, and 2^32 elements are too many; use \
                     larger parts",
                    batch.split.fixed_split_size, need.float
                ),
            );
        }
        // A captured launch has blocks for more work than there may be. With
        // undivided keys nothing tells those beyond it to stop, so that they go
        // by index arrays that the planner did not write: zeros make them
        // repeat the first tile.
        let clear = batch.cuda_graph && no_split;
        let planning = Planning { need, for_graph: batch.cuda_graph, clear, numbers };
        let info = make_plan(check, workspace, planning, |scratch, pinned| {
            // The two planners share their first sixteen arguments.
            macro_rules! plan {
                ($kernel:ident { $($more:ident: $value:expr),* }) => {
                    $kernel {
                        float_workspace: DlTensor::new(&scratch.float),
                        int_workspace: DlTensor::new(&scratch.int),
                        pinned_int_workspace: DlTensor::new(pinned),
                        qo_indptr: DlTensor::new(&qo_indptr),
                        kv_indptr: DlTensor::new(&kv_indptr),
                        kv_len_arr: DlTensor::new(&kv_lens),
                        total_num_rows: batch.rows as i64,
                        batch_size: batch.kv_lens.len() as i64,
                        num_qo_heads: batch.heads.num_qo_heads as i64,
                        num_kv_heads: batch.heads.num_kv_heads as i64,
                        page_size: batch.page_size as i64,
                        enable_cuda_graph: batch.cuda_graph,
                        head_dim_qk: self.spec.head_dim_qk as i64,
                        head_dim_vo: self.spec.head_dim_vo as i64,
                        causal: batch.causal,
                        window_left: self.spec.window_left_code(),
                        $($more: $value,)*
                    }
                };
            }
            // SAFETY: the arrays are checked host arrays of the batch's size;
            // the page-locked buffer is as large as the device one and as what
            // the planner writes, and not written again before the copy out of
            // it is done; partial results have room; head dimensions are the
            // module's.
            unsafe {
                if self.fa3 {
                    plan!(Fa3Plan {}).call(&self.plan, &stream)
                } else {
                    plan!(Fa2Plan {
                        fixed_split_size: batch.split.fixed_split_size.map_or(-1, |pages| pages as i64),
                        disable_split_kv: no_split,
                        num_colocated_ctas: batch.split.num_colocated_ctas as i64
                    })
                    .call(&self.plan, &stream)
                }
            }
        })?;
        workspace.remember_plan((PrefillPlanKey::new(self, batch), info.clone()));
        Ok(info)
    }

    /// Runs over a paged cache that has these pages.
    ///
    /// # Safety
    /// All tensors must have been checked for this spec and plan.
    pub(super) unsafe fn run_paged(
        &self,
        run: &RunTensors<'_>,
        stream: &Stream,
        kv: &PagedKv<'_>,
        pages: &Pages,
    ) -> Result<()> {
        let (paged_k_cache, paged_v_cache) = (DlTensor::new(&kv.k.raw), DlTensor::new(&kv.v.raw));
        let paged_kv_indptr = DlTensor::new(&pages.indptr);
        let paged_kv_indices = DlTensor::new(&pages.indices);
        let paged_kv_last_page_len = DlTensor::new(&pages.last_page_len);
        let layout = kv.layout.code();
        macro_rules! call {
            ($fa:ident, $kernel:ident $(, $sink:ident)?) => {
                $fa!(
                    self,
                    run,
                    stream,
                    $kernel {
                        $(sink: TensorObject::from($sink),)?
                        paged_k_cache,
                        paged_v_cache,
                        paged_kv_indptr,
                        paged_kv_indices,
                        paged_kv_last_page_len,
                        layout,
                    }
                )
                .call(&self.paged_run, stream)
            };
        }
        // SAFETY: promised by the caller.
        unsafe {
            match self.sink(run)? {
                Some(sink) => call!(sink_run, SinkPagedRun, sink),
                None if self.fa3 => call!(fa3_run, Fa3PagedRun),
                None => call!(fa2_run, Fa2PagedRun),
            }?;
            self.scale_output(stream, run)
        }
    }

    /// Runs over ragged keys and values.
    ///
    /// # Safety
    /// All tensors must have been checked for this spec and plan.
    pub(super) unsafe fn run_ragged(
        &self,
        run: &RunTensors<'_>,
        kv: [&RawTensor; 2],
        table: &RaggedTable,
    ) -> Result<()> {
        let (stream, indptr) = (table.stream(), table.indptr()?);
        let [k, v] = kv.map(DlTensor::new);
        let (kv_indptr, layout) = (DlTensor::new(&indptr), KvLayout::Nhd.code());
        macro_rules! call {
            ($fa:ident, $kernel:ident $(, $sink:ident)?) => {
                $fa!(self, run, stream, $kernel { $(sink: TensorObject::from($sink),)? k, v, kv_indptr, layout })
                    .call(&self.ragged_run, stream)
            };
        }
        // SAFETY: promised by the caller.
        unsafe {
            match self.sink(run)? {
                Some(sink) => call!(sink_run, SinkRaggedRun, sink),
                None if self.fa3 => call!(fa3_run, Fa3RaggedRun),
                None => call!(fa2_run, Fa2RaggedRun),
            }?;
            self.scale_output(stream, run)
        }
    }

    /// The sinks that modules for them take. Which kernel is called depends on
    /// the module alone.
    fn sink<'a>(&self, run: &'a RunTensors<'_>) -> Result<Option<&'a TensorRef<'a>>> {
        match (&run.options.sinks, self.spec.attention_sink) {
            (Some(sinks), true) => Ok(Some(sinks)),
            (None, false) => Ok(None),
            _ => Err(FlashInferError::invalid(RUN_OP, "sinks", "they do not fit the spec")),
        }
    }

    /// Whether the kernel multiplies its output by the scale of the values.
    fn scales_values(&self) -> bool {
        self.fa3 && !self.spec.attention_sink
    }

    /// The output can be scaled after a run.
    pub(super) fn check_scale(&self, check: &Check<'_>, options: &RunOptions<'_>) -> Result<()> {
        let scale = options.v_scale.filter(|_| !self.scales_values());
        OutputScale::check_ready(check, self.spec.dtype_o, scale)
    }

    /// Multiplies the output by the scale of the values, where the kernel has
    /// not done it.
    ///
    /// # Safety
    /// The output must have been checked for this spec.
    unsafe fn scale_output(&self, stream: &Stream, run: &RunTensors<'_>) -> Result<()> {
        if self.scales_values() {
            return Ok(());
        }
        // SAFETY: promised by the caller.
        unsafe { OutputScale::apply(stream, &run.out, run.options.v_scale) }
    }
}

/// Whether keys must not be divided. For a window without a causal mask, the
/// planner takes the keys of the last query for those of all, and would leave out
/// keys of the others.
fn must_stay_whole(spec: &AttentionSpec, batch: &PrefillBatch<'_>) -> bool {
    let several = batch.qo_indptr.windows(2).any(|pair| pair[1] - pair[0] > 1);
    let several = several || batch.cuda_graph && batch.rows > batch.kv_lens.len();
    spec.window_left.is_some() && !batch.causal && several
}

/// What the planner of FlashAttention 2 takes for a batch that is not empty, on a
/// GPU of so many multiprocessors and major compute capability.
///
/// Work is a tile of queries (times heads of a group) and a chunk of keys. For a
/// graph there is as much as any batch of its size can have. Each has three indices
/// and, if keys are divided, a flag, and for each head of each row an output and
/// its sum.
fn fa2_need(
    spec: &AttentionSpec,
    batch: &PrefillBatch<'_>,
    no_split: bool,
    multiprocessors: usize,
    major: i32,
) -> Need {
    let Heads { num_qo_heads, num_kv_heads } = batch.heads;
    let (group, requests, rows) = (num_qo_heads / num_kv_heads, batch.kv_lens.len(), batch.rows);
    let blocks = (FA2_BLOCKS_PER_SM * multiprocessors).saturating_sub(batch.split.num_colocated_ctas);
    let most = blocks / num_kv_heads;
    // Of the longest request that there can be, or of the mean one.
    let length = if batch.cuda_graph { (rows - requests + 1) * group } else { rows * group / requests };
    let tile = match length {
        65.. if spec.head_dim_vo < 256 => 128,
        17.. => 64,
        _ if major < 8 => 64,
        _ => 16,
    };
    let (divided, work) = if batch.cuda_graph {
        (!no_split, most.max((rows * group).div_ceil(tile) + requests - 1))
    } else {
        fa2_work(spec, batch, no_split, tile, most)
    };
    let ints = |count: usize| count * size_of::<i32>();
    let indices = [ints(work), ints(work), ints(work), ints(requests + 2)];
    let indices = indices.into_iter().chain(batch.cuda_graph.then_some(ints(1)));
    let to_merge = divided.then_some([ints(rows + 1), work]).into_iter().flatten();
    let sums = num_qo_heads * work * tile * size_of::<f32>();
    Need {
        float: if divided { arrays([sums * spec.head_dim_vo, sums]) } else { 0 }
            .max(stand_in_bytes(spec, batch)),
        int: arrays(indices.chain(to_merge)),
    }
}

/// Whether the planner of FlashAttention 2 divides keys for one launch, and the
/// work that it comes to: in chunks of the size that is asked for, else in the
/// smallest of which there are no more than `most`.
fn fa2_work(
    spec: &AttentionSpec,
    batch: &PrefillBatch<'_>,
    no_split: bool,
    tile: usize,
    most: usize,
) -> (bool, usize) {
    let group = batch.heads.num_qo_heads / batch.heads.num_kv_heads;
    let seen = spec.window_left.map(|window| (window as usize + tile).div_ceil(batch.page_size));
    let requests = batch.qo_indptr.windows(2).zip(batch.kv_indptr.windows(2)).map(|(queries, pages)| {
        let pages = (pages[1] - pages[0]) as usize;
        let tiles = ((queries[1] - queries[0]) as usize * group).div_ceil(tile);
        (tiles, seen.map_or(pages, |seen| seen.min(pages)).max(1))
    });
    let requests: Vec<(usize, usize)> = requests.collect();
    let work = |chunk: usize| requests.iter().map(|(tiles, pages)| tiles * pages.div_ceil(chunk)).sum();
    let longest = requests.iter().map(|&(_, pages)| pages).max().unwrap_or(1);
    if let Some(chunk) = batch.split.fixed_split_size.filter(|_| !no_split) {
        return (chunk < longest, work(chunk));
    }
    let (mut low, mut high) = ((LEAST_CHUNK / batch.page_size).max(1), longest);
    if no_split || low >= high || work(high) > most {
        return (false, work(high));
    }
    while low < high {
        let middle = (low + high) / 2;
        if work(middle) > most {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    (low < longest, work(low))
}

/// What the planner of FlashAttention 3 takes for a batch that is not empty:
/// seven numbers for each tile of each head, and an offset for each
/// multiprocessor. Of many tiles, all heads take the same.
fn fa3_need(spec: &AttentionSpec, batch: &PrefillBatch<'_>, multiprocessors: usize) -> Need {
    let tile = if spec.head_dim_vo == 64 { 192 } else { 128 };
    let most = batch.rows.div_ceil(tile) + batch.kv_lens.len() - 1;
    let heads = if most > 4096 { 1 } else { batch.heads.num_qo_heads };
    let queries = batch.qo_indptr.windows(2).map(|pair| (pair[1] - pair[0]) as usize);
    let tiles =
        if batch.cuda_graph { most } else { queries.map(|queries| queries.div_ceil(tile)).sum::<usize>() };
    let each = tiles * heads * size_of::<i32>();
    let offsets = (multiprocessors + 1) * size_of::<i32>();
    Need {
        float: stand_in_bytes(spec, batch),
        int: arrays([each, each, each, each, each, each, offsets, each]),
    }
}

/// Bytes that stand for the keys of a batch that has none: an empty tensor
/// cannot be described to the hardware that copies tiles.
fn stand_in_bytes(spec: &AttentionSpec, batch: &PrefillBatch<'_>) -> usize {
    let row = stand_in_width(spec) * spec.dtype_kv.size();
    if batch.kv_indptr.last() == Some(&0) { batch.heads.num_kv_heads * row } else { 0 }
}

/// Elements of a head in keys, and in values, that stand for none.
pub(super) fn stand_in_width(spec: &AttentionSpec) -> usize {
    spec.head_dim_qk.max(spec.head_dim_vo).next_multiple_of(8)
}

/// The arguments of a run that all functions share, and those given.
macro_rules! shared_run {
    ($kernels:expr, $run:expr, $stream:expr, $kernel:ident { $($field:ident $(: $value:expr)?),* $(,)? }) => {
        $kernel {
            float_workspace: DlTensor::new(&$run.scratch.float),
            int_workspace: DlTensor::new(&$run.scratch.int),
            plan_info: &$run.info.object,
            q: DlTensor::new(&$run.q),
            qo_indptr: DlTensor::new($run.qo_indptr),
            o: DlTensor::new(&$run.out),
            maybe_lse: $run.lse.map(DlTensor::new),
            mask_mode: $run.mask.mode,
            window_left: $kernels.spec.window_left_code(),
            enable_pdl: enable_pdl(FlashInferRuntime::get()?, $run.options.enable_pdl, $stream.ordinal())?,
            sm_scale: $run.options.logit_scale(&$kernels.spec),
            $($field $(: $value)?,)*
        }
    };
}

/// A run with sinks; its field `sink` is among those given.
macro_rules! sink_run {
    ($($args:tt)*) => { shared_run!($($args)*) };
}

/// What runs without sinks share besides.
macro_rules! masked_run {
    ($kernels:expr, $run:expr, $stream:expr, $kernel:ident { $($field:ident $(: $value:expr)?),* $(,)? }) => {
        shared_run!($kernels, $run, $stream, $kernel {
            $($field $(: $value)?,)*
            maybe_prefix_len_ptr: $run.mask.item_array(0).map(TensorObject::new),
            maybe_token_pos_in_items_ptr: $run.mask.item_array(1).map(TensorObject::new),
            maybe_max_item_len_ptr: $run.mask.item_array(2).map(TensorObject::new),
            token_pos_in_items_len: $run.mask.token_pos_in_items_len,
            logits_soft_cap: $kernels.spec.soft_cap_code(),
        })
    };
}

/// A run of FlashAttention 2, with what only it takes.
macro_rules! fa2_run {
    ($kernels:expr, $run:expr, $stream:expr, $kernel:ident { $($field:ident),* $(,)? }) => {
        masked_run!($kernels, $run, $stream, $kernel {
            $($field,)*
            maybe_custom_mask: $run.mask.custom.as_ref().map(|[bits, _]| TensorObject::new(bits)),
            maybe_mask_indptr: $run.mask.custom.as_ref().map(|[_, indptr]| TensorObject::new(indptr)),
            maybe_alibi_slopes: $run.options.alibi_slopes.as_ref().map(TensorObject::from),
            maybe_k_cache_sf: None,
            maybe_v_cache_sf: None,
            rope_rcp_scale: ROPE_RCP_SCALE,
            rope_rcp_theta: ROPE_RCP_THETA,
        })
    };
}

/// A run of FlashAttention 3, with what only it takes.
macro_rules! fa3_run {
    ($kernels:expr, $run:expr, $stream:expr, $kernel:ident { $($field:ident),* $(,)? }) => {
        masked_run!($kernels, $run, $stream, $kernel {
            $($field,)*
            maybe_scale_v: None,
            scale_v_scalar: $run.options.v_scale.unwrap_or(1.0).into(),
        })
    };
}
use {fa2_run, fa3_run, masked_run, shared_run, sink_run};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    /// An H200's multiprocessors and major compute capability.
    const H200: (usize, i32) = (132, 9);
    const BY_ITSELF: Split = Split::beside(0);
    const HEADS: Heads = Heads::new(32, 8);
    const PAGE_SIZE: usize = 16;

    /// Calls with the batch of requests with these queries and pages.
    fn with_batch<R>(
        requests: &[(i32, i32)],
        graph: Option<usize>,
        split: Split,
        use_batch: impl FnOnce(&PrefillBatch<'_>) -> R,
    ) -> R {
        let (mut queries, mut pages) = (vec![0], vec![0]);
        for (at, request) in requests.iter().enumerate() {
            queries.push(queries[at] + request.0);
            pages.push(pages[at] + request.1);
        }
        let kv_lens: Vec<i32> = requests.iter().map(|request| request.1 * PAGE_SIZE as i32).collect();
        use_batch(&PrefillBatch {
            qo_indptr: &queries,
            kv_indptr: &pages,
            kv_lens: &kv_lens,
            page_size: PAGE_SIZE,
            heads: HEADS,
            causal: false,
            rows: graph.unwrap_or(queries[requests.len()] as usize),
            cuda_graph: graph.is_some(),
            split,
        })
    }

    fn fa2(spec: &AttentionSpec, requests: &[(i32, i32)], graph: Option<usize>) -> Need {
        fa2_split(spec, requests, graph, BY_ITSELF)
    }

    fn fa2_split(spec: &AttentionSpec, requests: &[(i32, i32)], graph: Option<usize>, split: Split) -> Need {
        with_batch(requests, graph, split, |batch| {
            let no_split = must_stay_whole(spec, batch) || split.disable_split_kv;
            fa2_need(spec, batch, no_split, H200.0, H200.1)
        })
    }

    /// By hand, as `PrefillPlan` allocates.
    #[test]
    fn sizes_are_those_of_flash_attention_2() {
        let spec = AttentionSpec::new(DType::BF16, 128);
        // 128 tiles of 16 and 511 of other requests, all for a graph: 639.
        let need = fa2(&spec, &[(1, 1); 512], Some(512));
        assert_eq!(need, Need { float: 167_510_016 + 1_308_672, int: 12_463 });
        // Of the lengths nothing of it depends.
        assert_eq!(fa2(&spec, &[(1, 400); 512], Some(512)), need);
        assert_eq!(fa2(&spec, &[(0, 0); 512], Some(512)), need);
        // A lone request of that graph would fill tiles of 128: 17 of them, but
        // 264 blocks have 8 KV heads each 33 tiles.
        let float = |work: usize, tile: usize| 32 * work * tile * (128 + 1) * 4;
        let one = fa2(&spec, &[(1, 1)], Some(512));
        assert_eq!(one, Need { float: float(33, 128), int: 2528 + 33 });
        // More tiles than blocks at once: nothing is divided.
        let long = fa2(&spec, &[(4096, 256)], None);
        assert_eq!(long, Need { float: 0, int: 3 * 128 * 4 + 4 * 3 });
        // One query, 1000 pages: 33 chunks of 31 pages.
        let decode = fa2(&spec, &[(1, 1000)], None);
        assert_eq!(decode, Need { float: float(33, 16), int: 464 + 33 });
        // No chunks of less than 8 pages.
        assert_eq!(fa2(&spec, &[(1, 20)], None).float, float(3, 16));
        assert_eq!(fa2(&spec, &[(1, 8)], None).float, 0);
        // The mean request decides on the tile, and that is 16 for up to four queries.
        assert_eq!(fa2(&spec, &[(4, 20)], None).float, float(3, 16));
        assert_eq!(fa2(&spec, &[(5, 20)], None).float, float(3, 64));
        assert_eq!(fa2(&spec, &[(16, 20), (0, 0)], None).float, float(3, 64));
        assert_eq!(fa2(&spec, &[(17, 20)], None).float, float(3, 128));
        let wide = AttentionSpec::new(DType::BF16, 256);
        assert_eq!(fa2(&wide, &[(17, 20)], None).float, 32 * 2 * 3 * 64 * (256 + 1) * 4);
        // 100 keys and a tile of 16 are 8 pages.
        assert_eq!(fa2(&spec.with_window_left(100), &[(1, 1000)], None).float, 0);
        assert_eq!(fa2(&spec.with_window_left(200), &[(1, 1000)], None).float, float(2, 16));
        // Windows over several queries are not divided, not for a graph either.
        assert_eq!(fa2(&spec.with_window_left(200), &[(2, 1000)], None).float, 0);
        assert_eq!(fa2(&spec.with_window_left(200), &[(1, 1000)], Some(2)).float, 0);
        // Something to point at where there are no keys.
        assert_eq!(fa2(&spec, &[(3, 0)], None).float, 8 * 128 * 2);
    }

    /// By hand, as `PrefillPlan` allocates with other ways to divide keys.
    #[test]
    fn sizes_follow_the_split() {
        let spec = AttentionSpec::new(DType::BF16, 128);
        let float = |work: usize| 32 * work * 16 * (128 + 1) * 4;
        let need = |requests: &[(i32, i32)], graph, split| fa2_split(&spec, requests, graph, split);
        // 1000 pages in parts of 100, 20 in one; three indices, offsets and a size,
        // offsets to merge by, and flags.
        let fixed = need(&[(1, 1000), (1, 20)], None, Split::fixed(100));
        assert_eq!(fixed, Need { float: float(11), int: 3 * 48 + 16 + 16 + 11 });
        // However many blocks there are, and however small the parts.
        let many = need(&[(1, 1000); 512], None, Split::fixed(100));
        assert_eq!(many.float, float(5120));
        assert_eq!(need(&[(1, 1000)], None, Split::fixed(1)).float, float(1000));
        // As large as the longest request: nothing is divided.
        assert_eq!(need(&[(1, 1000), (1, 20)], None, Split::fixed(1000)).float, 0);
        assert_eq!(need(&[(1, 1000), (1, 20)], None, Split::fixed(999)).float, float(3));
        // Requests without pages count as one page, without queries for nothing,
        // but for whether keys are divided.
        assert_eq!(need(&[(1, 0), (1, 3)], None, Split::fixed(2)).float, float(3));
        assert_eq!(need(&[(2, 1), (0, 9)], None, Split::fixed(2)).float, float(1));
        // A window of 200 keys and a tile are 14 pages.
        let window = spec.with_window_left(200);
        assert_eq!(fa2_split(&window, &[(1, 1000)], None, Split::fixed(5)).float, float(3));
        // Undivided: as much work as tiles, or, for a graph, as blocks.
        assert_eq!(need(&[(1, 1000); 3], None, Split::disabled()), Need { float: 0, int: 3 * 16 + 20 });
        assert_eq!(
            need(&[(1, 1000); 3], Some(3), Split::disabled()),
            Need { float: 0, int: 144 + 144 + 144 + 32 + 4 }
        );
        // 264 blocks less 200 have 8 KV heads each 8 parts; with none left, nothing
        // is divided but for a graph, which has room for its tiles.
        assert_eq!(need(&[(1, 1000)], None, Split::beside(200)).float, float(8));
        for most in [264, 1000] {
            assert_eq!(need(&[(1, 1000)], None, Split::beside(most)).float, 0);
            assert_eq!(need(&[(1, 1000); 3], Some(3), Split::beside(most)).float, float(3));
        }
    }

    /// By hand, as `PrefillSM90Plan` allocates.
    #[test]
    fn sizes_are_those_of_flash_attention_3() {
        let fa3 = |head_dim, requests: &[(i32, i32)], graph| {
            let spec = AttentionSpec::new(DType::BF16, head_dim);
            with_batch(requests, graph, BY_ITSELF, |batch| fa3_need(&spec, batch, H200.0))
        };
        let int = |work: usize| 6 * (4 * work) + 4 * 133 + 12 + 4 * work;
        assert_eq!(fa3(128, &[(1, 1); 512], None), Need { float: 0, int: int(512 * 32) });
        assert_eq!(fa3(128, &[(1, 1); 512], Some(512)), Need { float: 0, int: int((4 + 511) * 32) });
        assert_eq!(fa3(64, &[(192, 1), (193, 1)], None).int, int(3 * 32));
        assert_eq!(fa3(128, &[(192, 1), (193, 1)], None).int, int(4 * 32));
        // Heads take the same work, where there is much.
        assert_eq!(fa3(128, &[(1, 1); 4096], None).int, 6 * 4 * 4096 + 4 * 133 + 12 + 4 * 4096);
        assert_eq!(fa3(128, &[(1, 1); 4065], None).int, int(4065 * 32));
        assert_eq!(fa3(128, &[(1, 0); 2], None).float, 8 * 128 * 2);
    }
}
