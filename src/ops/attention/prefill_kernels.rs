//! The kernels of batch prefill: what their planners take, and the calls.
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
    options::{PlanOptions, RunOptions},
    output_scale::OutputScale,
    planned::{PlanInfo, Planning, ROPE_RCP_SCALE, ROPE_RCP_THETA, Scratch, host_indices, make_plan},
    prefill_batch::{Fa2Planner, PrefillBatch, fa2_need, fa3_need, must_stay_whole},
    prefill_functions::{
        Fa2PagedRun, Fa2Plan, Fa2RaggedRun, Fa3PagedRun, Fa3Plan, Fa3RaggedRun, SinkPagedRun, SinkRaggedRun,
    },
    spec::{AttentionSpec, Backend},
    workspace::Workspace,
};
use crate::{
    error::{FlashInferError, Result},
    ffi::{DlTensor, Kernel, KernelFunction, TensorObject},
    indices::{PageTable, RaggedTable},
    kv::{KvLayout, PagedKv},
    module::Module,
    ops::{check::Check, enable_pdl},
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorRef},
};

pub(super) const RUN_OP: &str = "PrefillPlan::run_with";
/// The planner is not told that all requests have as many queries.
const NO_PROMISE: i64 = 0;
/// Numbers in a plan.
const FA2_PLAN_LEN: usize = 15;
const FA3_PLAN_LEN: usize = 9;
/// The place of the size of a tile of queries in a plan of FlashAttention 2, and
/// the size for which [`Module::unbound`] names kernels.
const FA2_TILE: usize = 3;
const UNBOUND_TILE: i64 = 32;

/// The functions of a prefill module.
#[derive(Clone, Copy, Debug)]
pub(super) struct PrefillKernels {
    pub(super) spec: AttentionSpec,
    pub(super) fa3: bool,
    module: &'static Module,
    plan: KernelFunction,
    paged_run: KernelFunction,
    ragged_run: KernelFunction,
}

/// Everything that a plan depends on, to tell whether another would be equal.
struct PrefillPlanKey {
    spec: AttentionSpec,
    module: &'static Module,
    batch: PrefillBatch<'static>,
}

impl PrefillPlanKey {
    /// Whether these kernels' plan of this batch would be the same.
    fn is_of(&self, kernels: &PrefillKernels, batch: &PrefillBatch<'_>) -> bool {
        std::ptr::eq(self.module, kernels.module) && self.spec == kernels.spec && self.batch == *batch
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
pub(super) struct PageArrays {
    pub(super) indptr: RawTensor,
    pub(super) indices: RawTensor,
    pub(super) last_page_len: RawTensor,
}

impl PageArrays {
    pub(super) fn of(table: &PageTable) -> Result<Self> {
        Ok(Self { indptr: table.indptr()?, indices: table.indices()?, last_page_len: table.last_page_len()? })
    }
}

impl PrefillKernels {
    /// The functions of a module that serves the spec.
    pub(super) fn load(module: &'static Module, spec: &AttentionSpec, fa3: bool) -> Result<Self> {
        let plan = if fa3 { Fa3Plan::SIGNATURES } else { Fa2Plan::SIGNATURES };
        let [paged_run, ragged_run] = match (spec.attention_sink, fa3) {
            (true, _) => [SinkPagedRun::SIGNATURES, SinkRaggedRun::SIGNATURES],
            (false, true) => [Fa3PagedRun::SIGNATURES, Fa3RaggedRun::SIGNATURES],
            (false, false) => [Fa2PagedRun::SIGNATURES, Fa2RaggedRun::SIGNATURES],
        };
        Ok(Self {
            spec: *spec,
            fa3,
            module,
            plan: module.kernel(plan)?,
            paged_run: module.kernel(paged_run)?,
            ragged_run: module.kernel(ragged_run)?,
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
        batch: PrefillBatch<'_>,
    ) -> Result<PlanInfo> {
        let last = workspace.planned::<(PrefillPlanKey, PlanInfo)>();
        if let Some((_, info)) = last.filter(|(key, _)| key.is_of(self, &batch)) {
            return Ok(info.clone());
        }
        let stream = workspace.stream().clone();
        let cuda = FlashInferRuntime::get()?.cuda();
        OutputScale::prepare(&self.spec)?;
        let multiprocessors = cuda.multiprocessors(stream.ordinal())?;
        let (qo_indptr, kv_indptr) = (host_indices(&batch.qo_indptr)?, host_indices(&batch.kv_indptr)?);
        let kv_lens = host_indices(&batch.kv_lens)?;
        let whole = must_stay_whole(&self.spec, &batch);
        if let Some(pages) = batch.shape.split.fixed_split_size.filter(|_| whole && !self.fa3) {
            return Err(FlashInferError::Unsupported {
                what: format!(
                    "fixed_split_size of {pages} pages for several queries of a request with a sliding window and \
                     no causal mask"
                ),
                available: "keys stay whole there; use Split::disabled(), or a causal mask".into(),
            });
        }
        let no_split = whole || batch.shape.split.disable_split_kv;
        let (need, numbers) = if self.fa3 {
            (fa3_need(&self.spec, &batch, multiprocessors), FA3_PLAN_LEN)
        } else {
            let (major, _) = cuda.compute_capability(stream.ordinal())?;
            let planner = if self.plan.variant() == 0 { Fa2Planner::WholeTiles } else { Fa2Planner::Rows };
            (fa2_need(&self.spec, &batch, no_split, multiprocessors, major, planner), FA2_PLAN_LEN)
        };
        // Kernels number the elements of partial results in 32 bits. Parts of the
        // planner's own choice are not as many.
        if batch.shape.split.fixed_split_size.is_some() && need.float / size_of::<f32>() > u32::MAX as usize {
            return check.fail(
                "split",
                format!(
                    "parts of {:?} pages make {} bytes of partial results, and 2^32 elements are too many; use \
                     larger parts",
                    batch.shape.split.fixed_split_size, need.float
                ),
            );
        }
        // A captured launch has blocks for more work than there may be. With
        // undivided keys nothing tells those beyond it to stop, so that they go
        // by index arrays that the planner did not write: zeros make them
        // repeat the first tile.
        let padded = batch.shape.is_padded();
        let clear = padded && no_split;
        let planning = Planning { need, for_graph: batch.shape.cuda_graph, clear, numbers };
        let info = make_plan(check, workspace, planning, |scratch, pinned, stream| {
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
                        total_num_rows: batch.shape.rows as i64,
                        batch_size: batch.kv_lens.len() as i64,
                        num_qo_heads: batch.shape.heads.num_qo_heads as i64,
                        num_kv_heads: batch.shape.heads.num_kv_heads as i64,
                        page_size: batch.shape.page_size as i64,
                        enable_cuda_graph: padded,
                        head_dim_qk: self.spec.head_dim_qk as i64,
                        head_dim_vo: self.spec.head_dim_vo as i64,
                        causal: batch.shape.causal,
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
                    plan!(Fa3Plan {}).call(&self.plan, stream)
                } else {
                    plan!(Fa2Plan {
                        fixed_split_size: batch.shape.split.fixed_split_size.map_or(-1, |pages| pages as i64),
                        disable_split_kv: no_split,
                        num_colocated_ctas: batch.shape.split.num_colocated_ctas as i64,
                        uniform_q_len: NO_PROMISE,
                        fixed_uniform_q_len: false
                    })
                    .call(&self.plan, stream)
                }
            }
        })?;
        self.check_tile(&info)?;
        let key = PrefillPlanKey { spec: self.spec, module: self.module, batch: batch.into_owned() };
        workspace.remember_plan((key, info.clone()));
        Ok(info)
    }

    /// The module has the kernel of the plan's tile. One that names kernels it does
    /// not have would end the process when it calls them.
    fn check_tile(&self, info: &PlanInfo) -> Result<()> {
        if self.fa3 || self.module.unbound().is_empty() || info.numbers[FA2_TILE] != UNBOUND_TILE {
            return Ok(());
        }
        Err(FlashInferError::Unsupported {
            what: format!("a plan of {} for tiles of {UNBOUND_TILE} queries", self.module.described()),
            available: "the module has no kernel for them; obtain another build of it".into(),
        })
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
        pages: &PageArrays,
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
