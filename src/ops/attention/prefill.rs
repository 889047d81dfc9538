//! Batch prefill: any number of queries per request, over paged or ragged
//! keys and values.
//!
//! Two sets of kernels do this, FlashAttention 2 and 3. They take different
//! argument lists, which stand here side by side; everything above them is the
//! same. Decode on tensor cores is prefill with one query per request and uses
//! the same functions.
//!
//! Source of the contract: `csrc/batch_prefill.cu`, `csrc/batch_prefill_sm90.cu`,
//! `include/flashinfer/attention/{prefill,scheduler}.cuh` of FlashInfer 0.6.13.

use super::{
    empty_states,
    mask::{Mask, MaskTensors, requests_of},
    options::{RunOptions, check_sm_scale},
    output_scale::OutputScale,
    plan::{
        Heads, LEAST_CHUNK, PlanInfo, Planned, Planning, ROPE_RCP_SCALE, ROPE_RCP_THETA, ReplayKey,
        ReplayShape, Scratch, check_described, check_keys, check_output, check_rows, check_workspace,
        host_indices, make_plan,
    },
    spec::{AttentionSpec, Backend},
    workspace::{Need, Workspace, arrays},
};
use crate::{
    capture,
    cuda::DeviceAttribute,
    dtype::DType,
    error::{FlashInferError, Result},
    ffi::{DlTensor, Function, Kernel, Signature, TensorObject, kernels},
    indices::{PageTable, RaggedTable},
    kv::{KvLayout, PagedKv},
    module::Module,
    ops::{check::Check, enable_pdl, page::check_cache},
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
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

const PAGED_OP: &str = "BatchPrefill::plan_paged";
const RAGGED_OP: &str = "BatchPrefill::plan_ragged";
const RUN_OP: &str = "PrefillPlan::run";
/// Numbers in a plan.
const FA2_PLAN_LEN: usize = 15;
const FA3_PLAN_LEN: usize = 9;
/// Blocks per multiprocessor that FlashAttention 2 plans for.
const FA2_BLOCKS_PER_SM: usize = 2;

/// The functions of a prefill module.
#[derive(Clone, Copy, Debug)]
pub(super) struct PrefillKernels {
    spec: AttentionSpec,
    fa3: bool,
    module: &'static Module,
    plan: Function,
    paged_run: Function,
    ragged_run: Function,
}

/// What a plan is made from.
pub(super) struct Batch<'a> {
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
}

/// Everything that a plan depends on, to tell whether another would be equal.
pub(super) struct PrefillPlanKey {
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
}

impl PrefillPlanKey {
    fn new(kernels: &PrefillKernels, batch: &Batch<'_>) -> Self {
        let &Batch { qo_indptr, kv_indptr, kv_lens, page_size, heads, causal, rows, cuda_graph } = batch;
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
        }
    }

    /// Whether these kernels' plan of this batch would be the same.
    pub(super) fn is_of(&self, kernels: &PrefillKernels, batch: &Batch<'_>) -> bool {
        let &Batch { qo_indptr, kv_indptr, kv_lens, page_size, heads, causal, rows, cuda_graph } = batch;
        std::ptr::eq(self.module, kernels.module)
            && self.spec == kernels.spec
            && (self.page_size, self.heads, self.causal) == (page_size, heads, causal)
            && (self.rows, self.cuda_graph) == (rows, cuda_graph)
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
    indptr: RawTensor,
    indices: RawTensor,
    last_page_len: RawTensor,
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

    /// Checks heads and sizes, and plans.
    pub(super) fn make_plan(
        &self,
        check: &Check<'_>,
        workspace: &mut Workspace,
        batch: &Batch<'_>,
    ) -> Result<PlanInfo> {
        if let Some(info) = workspace.planned(self, batch) {
            return Ok(info.clone());
        }
        let stream = workspace.stream().clone();
        let cuda = FlashInferRuntime::get()?.cuda();
        OutputScale::prepare(&self.spec)?;
        let multiprocessors = cuda.attribute(stream.ordinal(), DeviceAttribute::MultiprocessorCount)?;
        let multiprocessors = multiprocessors.unsigned_abs() as usize;
        let (qo_indptr, kv_indptr) = (host_indices(batch.qo_indptr)?, host_indices(batch.kv_indptr)?);
        let kv_lens = host_indices(batch.kv_lens)?;
        let no_split = must_stay_whole(&self.spec, batch);
        let (need, numbers) = if self.fa3 {
            (fa3_need(&self.spec, batch, multiprocessors), FA3_PLAN_LEN)
        } else {
            let (major, _) = cuda.compute_capability(stream.ordinal())?;
            (fa2_need(&self.spec, batch, no_split, (multiprocessors, major)), FA2_PLAN_LEN)
        };
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
                    plan!(Fa2Plan { fixed_split_size: -1, disable_split_kv: no_split, num_colocated_ctas: 0 })
                        .call(&self.plan, &stream)
                }
            }
        })?;
        workspace.remember_plan(PrefillPlanKey::new(self, batch), &info);
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
    unsafe fn run_ragged(
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
fn must_stay_whole(spec: &AttentionSpec, batch: &Batch<'_>) -> bool {
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
    batch: &Batch<'_>,
    no_split: bool,
    (multiprocessors, major): (usize, i32),
) -> Need {
    let Heads { num_qo_heads, num_kv_heads } = batch.heads;
    let (group, requests, rows) = (num_qo_heads / num_kv_heads, batch.kv_lens.len(), batch.rows);
    let most = FA2_BLOCKS_PER_SM * multiprocessors / num_kv_heads;
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
        fa2_work(spec, batch, no_split, (tile, most))
    };
    let ints = |count: usize| count * size_of::<i32>();
    let indices = [ints(work), ints(work), ints(work), ints(requests + 2)];
    let indices = indices.into_iter().chain(batch.cuda_graph.then_some(ints(1)));
    let to_merge = divided.then_some([ints(rows + 1), work]).into_iter().flatten();
    let sums = num_qo_heads * work * tile * size_of::<f32>();
    Need {
        float: if divided { arrays([sums * spec.head_dim_vo, sums]) } else { 0 }
            .max(nothing_to_see(spec, batch)),
        int: arrays(indices.chain(to_merge)),
    }
}

/// Whether the planner of FlashAttention 2 divides keys for one launch, and the
/// work that it comes to: it looks for the smallest chunks, of which there are
/// no more than `most`.
fn fa2_work(
    spec: &AttentionSpec,
    batch: &Batch<'_>,
    no_split: bool,
    (tile, most): (usize, usize),
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
fn fa3_need(spec: &AttentionSpec, batch: &Batch<'_>, multiprocessors: usize) -> Need {
    let tile = if spec.head_dim_vo == 64 { 192 } else { 128 };
    let most = batch.rows.div_ceil(tile) + batch.kv_lens.len() - 1;
    let heads = if most > 4096 { 1 } else { batch.heads.num_qo_heads };
    let queries = batch.qo_indptr.windows(2).map(|pair| (pair[1] - pair[0]) as usize);
    let tiles =
        if batch.cuda_graph { most } else { queries.map(|queries| queries.div_ceil(tile)).sum::<usize>() };
    let each = tiles * heads * size_of::<i32>();
    let offsets = (multiprocessors + 1) * size_of::<i32>();
    Need {
        float: nothing_to_see(spec, batch),
        int: arrays([each, each, each, each, each, each, offsets, each]),
    }
}

/// Bytes that stand for the keys of a batch that has none: an empty tensor
/// cannot be described to the hardware that copies tiles.
fn nothing_to_see(spec: &AttentionSpec, batch: &Batch<'_>) -> usize {
    let row = width_of_nothing(spec) * spec.dtype_kv.size();
    if batch.kv_indptr.last() == Some(&0) { batch.heads.num_kv_heads * row } else { 0 }
}

/// Elements of a head in keys, and in values, that stand for none.
fn width_of_nothing(spec: &AttentionSpec) -> usize {
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

/// How a prefill is planned.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct PrefillOptions<'p> {
    /// Which keys each query sees.
    pub mask: Mask<'p>,
    /// `Some(rows)` plans for a CUDA graph: tensors have this many rows, at
    /// least one for each request, of which each plan uses as many as its batch
    /// has queries; batch size and heads must stay. See [`PlanMode::CudaGraph`](super::PlanMode::CudaGraph).
    pub graph_rows: Option<usize>,
}

impl<'p> PrefillOptions<'p> {
    /// With a mask, not for a graph.
    pub fn masked(mask: Mask<'p>) -> Self {
        Self { mask, ..Self::default() }
    }

    /// Causal, not for a graph.
    pub fn causal() -> Self {
        Self::masked(Mask::Causal)
    }
}

/// Batch prefill over paged or ragged keys and values.
///
/// [`Backend::Auto`] takes FlashAttention 3 on compute capability 9.0 where
/// keys and values have one width and a module exists (head dimensions 64 and
/// 128), else FlashAttention 2.
///
/// Requests do not see each other, also if one is full of NaN, with one
/// exception: [`Backend::Fa3`] over ragged keys of several requests whose values
/// have another width than keys (192/128). Its tiles reach into the keys of the
/// next request, whose values it multiplies by 0: what is not finite there makes
/// NaN here, and beside [very negative scores](super#very-negative-scores) its
/// values show. So for those widths [`Backend::Auto`] takes FlashAttention 2.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{
///     DType, FlashInferRuntime, MaskIndices, MaskTable, RaggedIndices, RaggedTable, Stream,
///     attention::{AttentionSpec, Backend, BatchPrefill, Heads, Mask, PrefillOptions, RunOptions, Workspace},
///     cudarc::{TensorExt, TensorExtMut},
/// };
/// use half::bf16;
/// let cuda = cudarc::driver::CudaContext::new(0)?.new_stream()?;
/// let (stream, runtime) = (Stream::from(&cuda), FlashInferRuntime::get()?);
/// let spec = AttentionSpec::new(DType::BF16, 128);
/// let heads = Heads { num_qo_heads: 32, num_kv_heads: 8 };
/// let prefill = BatchPrefill::new(runtime, &stream, &spec)?;
///
/// // Two requests: a prompt of 5 tokens, and 3 more tokens of one that has 20.
/// let queries = RaggedTable::new(&stream, RaggedIndices::from_lens([5, 3])?)?;
/// let keys = RaggedTable::new(&stream, RaggedIndices::from_lens([5, 20])?)?;
/// let (q, k) = (cuda.alloc_zeros::<bf16>(8 * 32 * 128)?, cuda.alloc_zeros::<bf16>(25 * 8 * 128)?);
/// let (v, mut out) = (cuda.alloc_zeros::<bf16>(25 * 8 * 128)?, cuda.alloc_zeros::<bf16>(8 * 32 * 128)?);
/// let (q, kv_shape) = (q.tensor(&cuda, &[8, 32, 128])?, [25, 8, 128]);
/// let (k, v) = (k.tensor(&cuda, &kv_shape)?, v.tensor(&cuda, &kv_shape)?);
/// let mut out = out.tensor_mut(&cuda, &[8, 32, 128])?;
///
/// let mut workspace = Workspace::new(&stream)?;
/// let plan = prefill.plan_ragged(&mut workspace, &queries, &keys, heads, &PrefillOptions::causal())?;
/// let (kv, options) = ([&k.view(), &v.view()], RunOptions::default());
/// plan.run(&q.view(), kv, &mut out.view_mut(), None, &options)?;
///
/// // With a mask that says for each query and key whether it is seen, as
/// // drafts that form a tree need it.
/// let masked = BatchPrefill::new(runtime, &stream, &spec.with_backend(Backend::Fa2))?;
/// let indices = MaskIndices::new([(5, 5), (3, 20)])?;
/// let bits = cuda.clone_htod(&indices.pack(&[true; 5 * 5 + 3 * 20])?)?;
/// let (indices, bits) = (MaskTable::new(&stream, indices)?, bits.tensor(&cuda, &[bits.len()])?);
/// let options = PrefillOptions::masked(Mask::Custom { indices: &indices, bits: bits.view() });
/// let plan = masked.plan_ragged(&mut workspace, &queries, &keys, heads, &options)?;
/// plan.run(&q.view(), kv, &mut out.view_mut(), None, &RunOptions::default())?;
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
#[derive(Clone, Copy, Debug)]
pub struct BatchPrefill {
    kernels: PrefillKernels,
}

impl BatchPrefill {
    /// Resolves the module of a spec for the stream's device; downloads the
    /// pinned wheel if no local source holds it and that is allowed.
    ///
    /// # Errors
    /// [`FlashInferError::Unsupported`]: no such module can exist, or not for
    /// this GPU. Else the module cannot be had or opened.
    pub fn new(runtime: &FlashInferRuntime, stream: &Stream, spec: &AttentionSpec) -> Result<Self> {
        let (module, fa3) = spec.first_prefill(runtime, stream.ordinal(), AttentionSpec::prefill_module)?;
        Ok(Self { kernels: PrefillKernels::load(module, spec, fa3)? })
    }

    /// The module that serves the spec.
    pub fn module(&self) -> &'static Module {
        self.kernels.module
    }

    /// The spec.
    pub fn spec(&self) -> &AttentionSpec {
        &self.kernels.spec
    }

    /// The kernels that were picked: FlashAttention 2 or 3.
    pub fn backend(&self) -> Backend {
        self.kernels.backend()
    }

    /// Plans attention of `queries` to the pages of `table`.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument): batch sizes,
    /// streams or heads do not fit; with a causal mask, a request has more
    /// queries than keys, and keys; the workspace is too small and does not
    /// [grow](Workspace#growth); the stream is being captured. Else what the
    /// module or CUDA said.
    ///
    /// If the workspace was planned for an equal batch last, nothing is planned
    /// nor uploaded again.
    pub fn plan_paged<'p>(
        &self,
        workspace: &'p mut Workspace,
        queries: &'p RaggedTable,
        table: &'p PageTable,
        heads: Heads,
        options: &PrefillOptions<'p>,
    ) -> Result<PrefillPlan<'p, PageTable>> {
        let spec = &self.kernels.spec;
        if spec.head_dim_qk != spec.head_dim_vo {
            return Err(FlashInferError::Unsupported {
                what: format!(
                    "a paged cache with head dimensions {} and {}",
                    spec.head_dim_qk, spec.head_dim_vo
                ),
                available: "keys and values of different widths can be ragged; see plan_ragged".into(),
            });
        }
        let indices = table.host();
        let lens = indices.seq_lens();
        let (indptr, page_size, extent) = (indices.indptr(), indices.page_size(), indices.num_pages());
        let kv = KvBatch { op: PAGED_OP, indptr, lens: &lens, page_size, extent, paged: true };
        self.plan(workspace, queries, (table, table.indptr()?, table.addresses()), &kv, heads, options)
    }

    /// Plans attention of `queries` to keys and values that lie one after the
    /// other, divided by `keys`.
    ///
    /// # Errors
    /// As [`plan_paged`](Self::plan_paged).
    pub fn plan_ragged<'p>(
        &self,
        workspace: &'p mut Workspace,
        queries: &'p RaggedTable,
        keys: &'p RaggedTable,
        heads: Heads,
        options: &PrefillOptions<'p>,
    ) -> Result<PrefillPlan<'p, RaggedTable>> {
        let indptr = keys.host().indptr();
        let lens: Vec<i32> = indptr.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let kv = KvBatch {
            op: RAGGED_OP,
            indptr,
            lens: &lens,
            page_size: 1,
            extent: keys.host().total(),
            paged: false,
        };
        self.plan(workspace, queries, (keys, keys.indptr()?, keys.addresses()), &kv, heads, options)
    }

    fn plan<'p, K>(
        &self,
        workspace: &'p mut Workspace,
        queries: &'p RaggedTable,
        (keys, keys_indptr, key_addresses): (&'p K, RawTensor, [usize; 3]),
        kv: &KvBatch<'_>,
        heads: Heads,
        options: &PrefillOptions<'p>,
    ) -> Result<PrefillPlan<'p, K>> {
        let check = Check::new(kv.op, queries.stream())?;
        check.tensor("keys", &keys_indptr, &[DType::I32], &[1])?;
        heads.check(kv.op)?;
        let (requests, total) = (queries.host().batch_size(), queries.host().total());
        if requests != kv.lens.len() {
            return check.fail(
                "queries",
                format!("they are of {requests} requests, keys and values of {}", kv.lens.len()),
            );
        }
        let rows = check_rows(&check, options.graph_rows, total, requests)?;
        self.kernels.spec.check_output_size(&check, rows, heads)?;
        let batch = requests_of(queries.host(), kv.lens);
        options.mask.check(&check, (&self.kernels.spec, self.kernels.fa3), batch, kv.paged)?;
        let mask = options.mask.tensors(self.kernels.fa3)?;
        check_workspace(&check, workspace)?;
        let batch = requests_of(queries.host(), kv.lens);
        let graph = options.graph_rows.is_some();
        let empty = empty_states::possible(graph, &mask, batch.clone());
        if empty {
            empty_states::prepare()?;
        }
        let as_pages = if self.kernels.fa3 && kv.reaches_others(&self.kernels.spec, graph, batch) {
            Some(workspace.numbers_to(kv.extent)?)
        } else {
            None
        };
        let info = if total == 0 && options.graph_rows.is_none() || requests == 0 {
            None
        } else {
            let batch = Batch {
                qo_indptr: queries.host().indptr(),
                kv_indptr: kv.indptr,
                kv_lens: kv.lens,
                page_size: kv.page_size,
                heads,
                causal: options.mask.is_causal(),
                rows,
                cuda_graph: options.graph_rows.is_some(),
            };
            Some(self.kernels.make_plan(&check, workspace, &batch)?)
        };
        let (kernels, options) = (self.kernels, *options);
        let keys_extent = kv.extent;
        Ok(PrefillPlan {
            kernels,
            queries,
            keys,
            key_addresses,
            keys_extent,
            heads,
            rows,
            options,
            mask,
            empty,
            as_pages,
            planned: Planned::new(workspace, info)?,
        })
    }
}

/// Keys and values of a batch, as planners see them.
struct KvBatch<'a> {
    op: &'static str,
    indptr: &'a [i32],
    lens: &'a [i32],
    page_size: usize,
    extent: usize,
    paged: bool,
}

impl KvBatch<'_> {
    /// Whether the tiles in which FlashAttention 3 copies ragged keys reach
    /// into those of another request. The copy stops at the tensors' end, not
    /// at the request's: values behind it get the weight 0, which makes NaN of
    /// another's NaN. A batch that does not hold its requests apart is read as
    /// pages of one key, which are copied one by one. There is no kernel for
    /// pages of keys and values that differ in width.
    fn reaches_others(
        &self,
        spec: &AttentionSpec,
        graph: bool,
        mut requests: impl Iterator<Item = (usize, usize)>,
    ) -> bool {
        if self.paged || spec.head_dim_qk != spec.head_dim_vo {
            return false;
        }
        if graph {
            return self.lens.len() > 1;
        }
        let mut ends = self.indptr[1..].iter();
        requests.any(|(queries, keys)| {
            let end = ends.next().is_some_and(|&end| end as usize == self.extent);
            queries > 0 && keys > 0 && !end
        })
    }
}

/// One step's prefill plan, ready to run for each layer. `K` is the kind of
/// keys and values: [`PageTable`] or [`RaggedTable`].
///
/// It borrows its workspace and tables, as
/// [`DecodePlan`](super::DecodePlan) does.
#[derive(Debug)]
pub struct PrefillPlan<'p, K> {
    kernels: PrefillKernels,
    queries: &'p RaggedTable,
    keys: &'p K,
    /// Where the index arrays of the keys are.
    key_addresses: [usize; 3],
    /// Pages of the cache, or rows of keys.
    keys_extent: usize,
    heads: Heads,
    rows: usize,
    options: PrefillOptions<'p>,
    mask: MaskTensors,
    /// Whether queries may see no key.
    empty: bool,
    /// The numbers of ragged keys, where they are read as pages of one key.
    as_pages: Option<RawTensor>,
    planned: Planned<'p>,
}

impl<K> PrefillPlan<'_, K> {
    /// What a graph that captures runs of this plan bakes in: replay it only
    /// after a plan with an equal key.
    ///
    /// # Errors
    /// It was not planned for a graph, or there is nothing to do.
    pub fn replay_key(&self) -> Result<ReplayKey> {
        let for_graph = self.options.graph_rows.is_some();
        let Some(info) = self.planned.info.as_ref().filter(|_| for_graph) else {
            return Err(ReplayKey::missing(for_graph));
        };
        let (kernels, batch) = (&self.kernels, self.queries.host().batch_size());
        let numbers = self.as_pages.iter().map(|numbers| numbers.data as usize);
        let indices = self.key_addresses.into_iter().chain(self.queries.addresses()).chain(numbers);
        let shape = ReplayShape { heads: self.heads, batch, rows: self.rows, keys: self.keys_extent };
        Ok(ReplayKey::new(info, &kernels.spec, shape, &self.planned.scratch, indices, &self.mask))
    }

    /// The plan's numbers, as the module gave them; see
    /// [`DecodePlan::numbers`](super::DecodePlan::numbers).
    pub fn numbers(&self) -> &[i64] {
        self.planned.numbers()
    }

    fn check_queries(
        &self,
        check: &Check<'_>,
        q: &TensorRef<'_>,
        out: &TensorMut<'_>,
        lse: Option<&TensorMut<'_>>,
        options: &RunOptions<'_>,
    ) -> Result<()> {
        let (spec, lse) = (&self.kernels.spec, lse.map(|lse| &lse.raw));
        check_output(check, spec, self.heads, self.rows, &q.raw, &out.raw, lse)?;
        check_described(check, self.kernels.fa3, &[("q", &q.raw)])?;
        options.check(check, spec, self.heads)?;
        check_sm_scale(check, options.logit_scale(spec))?;
        self.kernels.check_scale(check, options)
    }

    /// Enqueues what is to be said of queries that see no key.
    ///
    /// # Safety
    /// The sums must have been checked for this plan, whose keys these are.
    unsafe fn mark_empty(
        &self,
        keys: empty_states::Keys<'_>,
        lse: Option<&TensorMut<'_>>,
        options: &RunOptions<'_>,
    ) -> Result<()> {
        let Some(lse) = lse.filter(|_| self.empty) else { return Ok(()) };
        let rows = empty_states::Rows {
            keys,
            qo_indptr: Some(&self.queries.indptr()?),
            batch: self.queries.host().batch_size(),
            mask: &self.mask,
            window_left: self.kernels.spec.window_left_code(),
            sinks: options.sinks.as_ref(),
        };
        // SAFETY: promised by the caller.
        unsafe { rows.mark(self.queries.stream(), &lse.raw) }
    }

    fn tensors<'a>(
        &'a self,
        info: &'a PlanInfo,
        qo_indptr: &'a RawTensor,
        q: &'a TensorRef<'_>,
        out: &'a TensorMut<'_>,
        lse: Option<&'a TensorMut<'_>>,
        options: &'a RunOptions<'a>,
    ) -> RunTensors<'a> {
        RunTensors {
            scratch: &self.planned.scratch,
            info,
            q: q.raw.with_plain_unit_strides(),
            qo_indptr,
            out: out.raw.with_plain_unit_strides(),
            lse: lse.map(|lse| &lse.raw),
            mask: &self.mask,
            options,
        }
    }
}

impl PrefillPlan<'_, PageTable> {
    /// Attention of each query to its request's pages.
    ///
    /// `q` is `[queries, num_qo_heads, head_dim_qk]`, `out`
    /// `[queries, num_qo_heads, head_dim_vo]` and contiguous, `lse`, if given,
    /// a contiguous `f32` `[queries, num_qo_heads]` of base-2 logarithms. A
    /// query that sees no key gets zeros, and −∞; with attention sinks, the
    /// sink.
    ///
    /// Of scores below −50000 see [`attention`](super#very-negative-scores).
    ///
    /// # Errors
    /// As [`DecodePlan::run`](super::DecodePlan::run).
    pub fn run(
        &self,
        q: &TensorRef<'_>,
        kv: &PagedKv<'_>,
        out: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        options: &RunOptions<'_>,
    ) -> Result<()> {
        let (spec, stream) = (&self.kernels.spec, self.keys.stream());
        let (check, lse) = (Check::new(RUN_OP, stream)?, lse.as_deref());
        self.check_queries(&check, q, out, lse, options)?;
        let cache = check_cache(&check, [&kv.k.raw, &kv.v.raw], kv.layout, self.keys, &[spec.dtype_kv])?;
        self.heads.check_cache(&check, cache, spec.head_dim_qk)?;
        let Some(info) = &self.planned.info else { return Ok(()) };
        let _covered = capture::runs(|| self.replay_key())?;
        let qo_indptr = self.queries.indptr()?;
        // SAFETY: all tensors have the dtypes, shapes, strides and alignment
        // of this module and plan; the index arrays are the device copies of
        // those that the plan was made from, checked against a cache of at
        // most this many pages; the workspace is the plan's, on its stream.
        unsafe {
            let (run, pages) = (self.tensors(info, &qo_indptr, q, out, lse, options), Pages::of(self.keys)?);
            self.kernels.run_paged(&run, stream, kv, &pages)?;
            let (indptr, last_page_len) = (&pages.indptr, &pages.last_page_len);
            let page_size = self.keys.host().page_size();
            self.mark_empty(empty_states::Keys::Paged { indptr, last_page_len, page_size }, lse, options)
        }
    }
}

impl PrefillPlan<'_, RaggedTable> {
    /// Attention of each query to its request's keys.
    ///
    /// `k` is `[keys, num_kv_heads, head_dim_qk]`, `v`
    /// `[keys, num_kv_heads, head_dim_vo]`; the rest is as in
    /// [`run`](PrefillPlan::<PageTable>::run) over pages.
    ///
    /// # Errors
    /// As [`DecodePlan::run`](super::DecodePlan::run); with FlashAttention 3 also
    /// when there are several requests and the rows of `v` are not as far apart
    /// as those of `k`.
    pub fn run(
        &self,
        q: &TensorRef<'_>,
        [k, v]: [&TensorRef<'_>; 2],
        out: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        options: &RunOptions<'_>,
    ) -> Result<()> {
        let (spec, stream) = (&self.kernels.spec, self.keys.stream());
        let (check, lse) = (Check::new(RUN_OP, stream)?, lse.as_deref());
        self.check_queries(&check, q, out, lse, options)?;
        check_keys(&check, spec, self.heads, self.keys.host().total(), [&k.raw, &v.raw])?;
        check_described(&check, self.kernels.fa3, &[("k", &k.raw), ("v", &v.raw)])?;
        let Some(info) = &self.planned.info else { return Ok(()) };
        let _covered = capture::runs(|| self.replay_key())?;
        let qo_indptr = self.queries.indptr()?;
        let run = self.tensors(info, &qo_indptr, q, out, lse, options);
        let [k, v] = if self.keys_extent == 0 {
            // No request has a key, so nothing of what stands in counts. The
            // plan has made room for it.
            [spec.head_dim_qk, spec.head_dim_vo].map(|width| {
                let (heads, row) = (self.heads.num_kv_heads, width_of_nothing(spec));
                let shape = [1, heads, width];
                let strides = [heads * row, row, 1];
                RawTensor::new(
                    self.planned.scratch.float.data,
                    k.raw.device,
                    spec.dtype_kv,
                    &shape,
                    Some(&strides),
                )
            })
        } else {
            [k, v].map(|tensor| Ok(tensor.raw.with_plain_unit_strides()))
        };
        let (k, v) = (k?, v?);
        let indptr = self.keys.indptr()?;
        // SAFETY: as for pages; the offsets of keys and values are the device
        // copies of those that the plan was made from, and end at their rows.
        // Of the rows' numbers there are as many.
        unsafe {
            match &self.as_pages {
                Some(numbers) => {
                    let [k, v] = as_pages(&check, [&k, &v])?;
                    let kv = PagedKv::new(TensorRef::new(k), TensorRef::new(v), KvLayout::Nhd);
                    // FlashAttention 3 does not look at lengths of last pages.
                    let pages = Pages { indptr, indices: *numbers, last_page_len: *numbers };
                    self.kernels.run_paged(&run, stream, &kv, &pages)?;
                }
                None => self.kernels.run_ragged(&run, [&k, &v], self.keys)?,
            }
            self.mark_empty(empty_states::Keys::Ragged { indptr: &indptr }, lse, options)
        }
    }
}

/// Ragged keys and values as a cache of pages of one key.
fn as_pages(check: &Check<'_>, kv: [&RawTensor; 2]) -> Result<[RawTensor; 2]> {
    let [k_stride, v_stride] = kv.map(|tensor| tensor.strides()[0]);
    if k_stride != v_stride && kv[0].shape()[0] > 1 {
        return check.fail(
            "v",
            format!(
                "its rows are {v_stride} elements apart, those of k {k_stride}; for several requests, whose keys \
                 it reads as pages, FlashAttention 3 takes one number for both, so copy one of them, or use \
                 Backend::Fa2"
            ),
        );
    }
    let [k, v] = kv.map(|tensor| {
        let (&[rows, heads, width], &[row, head, _]) = (tensor.shape(), tensor.strides()) else {
            return check.fail("k", format!("its shape is {:?}; expected 3 dimensions", tensor.shape()));
        };
        let [shape, strides] = [[rows, 1, heads, width], [row, row, head, 1]]
            .map(|numbers| numbers.map(|number| number as usize));
        let mut pages = RawTensor::new(tensor.data, tensor.device, tensor.dtype, &shape, Some(&strides))?;
        pages.owner = tensor.owner;
        Ok(pages)
    });
    Ok([k?, v?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_keys_end_with_the_tensor() {
        let spec = AttentionSpec::new(DType::F16, 128);
        let reaches = |requests: &[(usize, i32)], graph: bool, paged: bool, spec: &AttentionSpec| {
            let lens: Vec<i32> = requests.iter().map(|request| request.1).collect();
            let ends = lens.iter().scan(0, |end, len| {
                *end += len;
                Some(*end)
            });
            let indptr: Vec<i32> = std::iter::once(0).chain(ends).collect();
            let extent = indptr[lens.len()] as usize;
            let kv = KvBatch { op: "test", indptr: &indptr, lens: &lens, page_size: 1, extent, paged };
            let requests = requests.iter().map(|&(queries, keys)| (queries, keys as usize));
            kv.reaches_others(spec, graph, requests)
        };
        let eager = |requests: &[(usize, i32)]| reaches(requests, false, false, &spec);
        assert!(!eager(&[]) && !eager(&[(5, 9)]) && !eager(&[(3, 0), (5, 9), (2, 0)]));
        assert!(!eager(&[(0, 7), (5, 9)]));
        assert!(eager(&[(5, 9), (0, 7)]) && eager(&[(1, 1), (1, 1)]));
        assert!(reaches(&[(5, 9), (0, 0)], true, false, &spec) && !reaches(&[(5, 9)], true, false, &spec));
        let two = [(1, 1), (1, 1)];
        assert!(!reaches(&two, false, true, &spec));
        assert!(!reaches(&two, true, false, &spec.with_head_dim_vo(64)));
    }

    /// An H200's multiprocessors and major compute capability.
    const H200: (usize, i32) = (132, 9);
    const HEADS: Heads = Heads { num_qo_heads: 32, num_kv_heads: 8 };
    const PAGE_SIZE: usize = 16;

    /// Calls with the batch of requests with these queries and pages.
    fn with_batch<R>(
        requests: &[(i32, i32)],
        graph_rows: Option<usize>,
        use_batch: impl FnOnce(&Batch<'_>) -> R,
    ) -> R {
        let (mut queries, mut pages) = (vec![0], vec![0]);
        for (at, request) in requests.iter().enumerate() {
            queries.push(queries[at] + request.0);
            pages.push(pages[at] + request.1);
        }
        let kv_lens: Vec<i32> = requests.iter().map(|request| request.1 * PAGE_SIZE as i32).collect();
        use_batch(&Batch {
            qo_indptr: &queries,
            kv_indptr: &pages,
            kv_lens: &kv_lens,
            page_size: PAGE_SIZE,
            heads: HEADS,
            causal: false,
            rows: graph_rows.unwrap_or(queries[requests.len()] as usize),
            cuda_graph: graph_rows.is_some(),
        })
    }

    fn fa2(spec: &AttentionSpec, requests: &[(i32, i32)], graph_rows: Option<usize>) -> Need {
        with_batch(requests, graph_rows, |batch| fa2_need(spec, batch, must_stay_whole(spec, batch), H200))
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

    /// By hand, as `PrefillSM90Plan` allocates.
    #[test]
    fn sizes_are_those_of_flash_attention_3() {
        let fa3 = |head_dim, requests: &[(i32, i32)], graph_rows| {
            let spec = AttentionSpec::new(DType::BF16, head_dim);
            with_batch(requests, graph_rows, |batch| fa3_need(&spec, batch, H200.0))
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
