//! Paged batch decode on CUDA cores: one query per request.
//!
//! Source of the contract: `csrc/batch_decode.cu`,
//! `include/flashinfer/attention/{decode,scheduler}.cuh` of FlashInfer 0.6.13.

use std::{borrow::Cow, cell::Cell, marker::PhantomData};

use super::{
    plan::{PlanInfo, PlanMode, Scratch, check_lse, check_workspace, host_indices, make_plan},
    spec::AttentionSpec,
    workspace::Workspace,
};
use crate::{
    cuda::DeviceAttribute,
    error::Result,
    ffi::{DlTensor, Function, Kernel, Signature, kernels},
    kv::PageTable,
    module::Module,
    ops::{
        check::Check,
        enable_pdl,
        page::{PagedKv, check_cache},
    },
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{Device, RawTensor, TensorMut, TensorRef},
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

pub(super) const SIGNATURES: &[(&str, Signature)] =
    &[("batch_decode_with_kv_cache_", Plan::SIGNATURE), ("batch_decode_with_kv_cache_", Run::SIGNATURE)];

const PLAN_OP: &str = "BatchDecode::plan";
const RUN_OP: &str = "DecodePlan::run";
/// Query heads per KV head that the kernel is compiled for.
const GROUP_SIZES: [usize; 5] = [1, 2, 3, 4, 8];
/// The most blocks that a multiprocessor of any GPU runs at once.
const MAX_BLOCKS_PER_SM: usize = 32;
/// Numbers in a plan.
const PLAN_LEN: usize = 10;

/// Heads of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeHeads {
    /// Query (and output) heads.
    pub num_qo_heads: usize,
    /// Key and value heads; `num_qo_heads / num_kv_heads` is 1, 2, 3, 4 or 8.
    pub num_kv_heads: usize,
}

/// Options of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct DecodeOptions {
    /// The factor on query-key products, `1/√head_dim` if `None`. Scales of
    /// quantized queries and keys are multiplied into it.
    pub sm_scale: Option<f64>,
    /// Programmatic dependent launch; `None` uses it where the GPU has it
    /// (compute capability 9.0 and newer). Pass `Some(false)` when the kernel
    /// just before writes the page table's device arrays.
    pub enable_pdl: Option<bool>,
}

impl DecodeOptions {
    /// The default options with another `sm_scale`.
    pub fn with_sm_scale(sm_scale: f64) -> Self {
        Self { sm_scale: Some(sm_scale), ..Self::default() }
    }
}

/// Paged batch decode: attention of one query per request to the request's
/// pages.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{
///     DType, FlashInferRuntime, PageIndices, PageTable, Stream,
///     attention::{AttentionSpec, BatchDecode, DecodeHeads, DecodeOptions, PlanMode, Workspace},
///     cudarc::{TensorExt, TensorExtMut},
///     page::{KvLayout, PagedKv},
/// };
/// use half::f16;
/// let cuda = cudarc::driver::CudaContext::new(0)?.new_stream()?;
/// let stream = Stream::from(&cuda);
/// let decode = BatchDecode::new(FlashInferRuntime::get()?, &AttentionSpec::new(DType::F16, 128))?;
///
/// // One request of 50 tokens in 4 pages of 16.
/// let table = PageTable::new(&stream, PageIndices::from_requests(4, 16, [(&[0, 1, 2, 3][..], 50)])?)?;
/// let mut workspace = Workspace::new(&stream)?;
/// let (heads, mode) = (DecodeHeads { num_qo_heads: 32, num_kv_heads: 8 }, PlanMode::Eager);
/// let plan = decode.plan(&mut workspace, &table, heads, mode)?;
///
/// let (q, k, v) = (cuda.alloc_zeros::<f16>(32 * 128)?, cuda.alloc_zeros::<f16>(65536)?, cuda.alloc_zeros::<f16>(65536)?);
/// let mut out = cuda.alloc_zeros::<f16>(32 * 128)?;
/// let (k, v) = (k.tensor(&cuda, &[4, 16, 8, 128])?, v.tensor(&cuda, &[4, 16, 8, 128])?);
/// plan.run(
///     &q.tensor(&cuda, &[1, 32, 128])?.view(),
///     &PagedKv::new(k.view(), v.view(), KvLayout::Nhd),
///     &mut out.tensor_mut(&cuda, &[1, 32, 128])?.view_mut(),
///     None,
///     &DecodeOptions::default(),
/// )?;
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
#[derive(Clone, Copy, Debug)]
pub struct BatchDecode {
    spec: AttentionSpec,
    module: &'static Module,
    plan: Function,
    run: Function,
}

impl BatchDecode {
    /// Resolves the module of a spec; downloads the pinned wheel if no local
    /// source holds it and that is allowed.
    ///
    /// # Errors
    /// [`FlashInferError::Unsupported`]: no such module can exist. Else the
    /// module cannot be had or opened.
    pub fn new(runtime: &FlashInferRuntime, spec: &AttentionSpec) -> Result<Self> {
        let name = spec.decode_module()?;
        runtime.preload([&name])?;
        let module = runtime.module(&name)?;
        let plan = module.function(Plan::SIGNATURE.function)?;
        let run = module.function(Run::SIGNATURE.function)?;
        Ok(Self { spec: *spec, module, plan, run })
    }

    /// The module that serves the spec.
    pub fn module(&self) -> &'static Module {
        self.module
    }

    /// The spec.
    pub fn spec(&self) -> &AttentionSpec {
        &self.spec
    }

    /// Divides the work of one decode step among the GPU's multiprocessors,
    /// from the page table's host copy, and enqueues the upload of the result
    /// to the workspace.
    ///
    /// The plan serves every layer of the step. A batch without requests gives
    /// a plan whose runs do nothing.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument): the group size
    /// has no kernel; workspace and page table belong to different streams;
    /// the workspace is too small; the stream is being captured. Else what
    /// the module or CUDA said. The workspace can be used again.
    pub fn plan<'p>(
        &self,
        workspace: &'p mut Workspace,
        table: &'p PageTable,
        heads: DecodeHeads,
        mode: PlanMode,
    ) -> Result<DecodePlan<'p>> {
        let stream = table.stream();
        let check = Check::new(PLAN_OP, stream)?;
        check_heads(&check, heads)?;
        check_workspace(&check, workspace)?;
        let scratch = Scratch::of(workspace)?;
        let info = match table.host().batch_size() {
            0 => None,
            _ => Some(self.plan_batch(&check, workspace, &scratch, table, heads, mode)?),
        };
        Ok(DecodePlan { decode: *self, table, heads, scratch, info, one_thread: PhantomData })
    }

    fn plan_batch(
        &self,
        check: &Check<'_>,
        workspace: &mut Workspace,
        scratch: &Scratch,
        table: &PageTable,
        heads: DecodeHeads,
        mode: PlanMode,
    ) -> Result<PlanInfo> {
        let (stream, indices) = (table.stream(), table.host());
        let batch = indices.batch_size();
        let cuda = FlashInferRuntime::get()?.cuda();
        let multiprocessors = cuda.attribute(stream.ordinal(), DeviceAttribute::MultiprocessorCount)?;
        let needed = int_bytes(batch, multiprocessors.unsigned_abs() as usize);
        let planned = planned_indptr(indices.indptr());
        let indptr = host_indices(&planned)?;
        let empty = |dtype| RawTensor::new(std::ptr::null_mut(), Device::Cpu, dtype, &[0], None);
        let (empty_q, empty_kv) = (empty(self.spec.dtype_q)?, empty(self.spec.dtype_kv)?);
        make_plan(check, workspace, needed, PLAN_LEN, |pinned| {
            let kernel = Plan {
                float_workspace: DlTensor::new(&scratch.float),
                int_workspace: DlTensor::new(&scratch.int),
                pinned_int_workspace: DlTensor::new(pinned),
                indptr: DlTensor::new(&indptr),
                batch_size: batch as i64,
                num_qo_heads: heads.num_qo_heads as i64,
                num_kv_heads: heads.num_kv_heads as i64,
                page_size: indices.page_size() as i64,
                enable_cuda_graph: mode == PlanMode::CudaGraph,
                window_left: self.window_left(),
                logits_soft_cap: self.logits_soft_cap(),
                head_dim_qk: self.spec.head_dim_qk as i64,
                head_dim_vo: self.spec.head_dim_vo as i64,
                empty_q_data: DlTensor::new(&empty_q),
                empty_kv_data: DlTensor::new(&empty_kv),
            };
            // SAFETY: indptr is a checked host array of batch + 1 entries; the
            // host buffer is page-locked, as large as the device one and as
            // what the planner can write, and not written again before the
            // copy out of it is done; head dimensions are the module's.
            unsafe { kernel.call(&self.plan, stream) }
        })
    }

    fn window_left(&self) -> i64 {
        self.spec.window_left.map_or(-1, i64::from)
    }

    fn logits_soft_cap(&self) -> f64 {
        self.spec.logits_soft_cap.map_or(0.0, f64::from)
    }
}

fn check_heads(check: &Check<'_>, heads: DecodeHeads) -> Result<()> {
    let DecodeHeads { num_qo_heads, num_kv_heads } = heads;
    // KV heads are a dimension of the launch grid, which has 65535 places.
    if num_kv_heads == 0 || num_kv_heads > 65535 {
        return check.fail("heads", format!("{num_kv_heads} KV heads; there must be 1 to 65535"));
    }
    let groups = num_qo_heads.checked_div(num_kv_heads).filter(|group| group * num_kv_heads == num_qo_heads);
    if groups.is_none_or(|group| !GROUP_SIZES.contains(&group)) {
        return check.fail(
            "heads",
            format!("{num_qo_heads} query heads over {num_kv_heads} KV heads; the kernel has {GROUP_SIZES:?} query heads per KV head"),
        );
    }
    Ok(())
}

/// The most bytes of index arrays that the planner writes for a batch: for
/// each planned chunk two indices, an output offset and a flag, each array
/// aligned to 16. There are at most as many chunks as blocks that the GPU
/// holds, or one for each request.
fn int_bytes(batch: usize, multiprocessors: usize) -> usize {
    let chunks = (MAX_BLOCKS_PER_SM * multiprocessors).max(batch);
    13 * chunks + 2 * size_of::<i32>() + 5 * 16
}

/// The page offsets that the planner is given: `indptr`, with every request
/// counted as having at least one page.
///
/// The planner gives an empty request one chunk, but leaves it out when it
/// looks for a chunk size at which all chunks fit the launch. With padding in
/// the batch it could then plan more chunks than the buffers and the captured
/// grid hold. Counting one page for an empty request makes both agree, and
/// changes nothing else: the kernel takes lengths from the device arrays.
fn planned_indptr(indptr: &[i32]) -> Cow<'_, [i32]> {
    if indptr.windows(2).all(|pair| pair[0] < pair[1]) {
        return indptr.into();
    }
    let mut end = 0;
    let ends = indptr.windows(2).map(|pair| {
        end += (pair[1] - pair[0]).max(1);
        end
    });
    std::iter::once(0).chain(ends).collect()
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
    heads: DecodeHeads,
    scratch: Scratch,
    /// `None` for a batch without requests.
    info: Option<PlanInfo>,
    one_thread: PhantomData<Cell<&'p mut Workspace>>,
}

// SAFETY: everything in it may move between threads (the raw tensors are
// addresses of the borrowed workspace's device memory); it is not `Sync`.
unsafe impl Send for DecodePlan<'_> {}

impl DecodePlan<'_> {
    /// `out = softmax(q · kᵀ · sm_scale) · v` for each request and head, over
    /// the request's tokens.
    ///
    /// `q` and `out` are `[batch, num_qo_heads, head_dim]` of the spec's
    /// dtypes, `out` contiguous; `kv` is the paged cache that the page table
    /// was checked for; `lse`, if given, is a contiguous `f32`
    /// `[batch, num_qo_heads]` and takes the base-2 logarithm of each sum of
    /// exponentials. A request without tokens gets zeros, and −∞.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) before anything
    /// is launched: a device, stream, dtype, shape, stride or alignment does
    /// not fit the plan. Else what the module or CUDA said.
    pub fn run(
        &self,
        q: &TensorRef<'_>,
        kv: &PagedKv<'_>,
        out: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        options: &DecodeOptions,
    ) -> Result<()> {
        let (spec, table, stream) = (&self.decode.spec, self.table, self.stream());
        let check = Check::new(RUN_OP, stream)?;
        let batch = table.host().batch_size() as i64;
        let (qo_heads, head_dim) = (self.heads.num_qo_heads as i64, spec.head_dim_qk as i64);

        check.tensor("q", &q.raw, &[spec.dtype_q], &[3])?;
        check.shape("q", &q.raw, &[batch, qo_heads, head_dim])?;
        check.last_dim_contiguous("q", &q.raw)?;
        check.aligned("q", &q.raw, 16)?;
        check.offsets_in_32_bits("q", &q.raw)?;
        check.tensor("out", &out.raw, &[spec.dtype_o], &[3])?;
        check.shape("out", &out.raw, &[batch, qo_heads, head_dim])?;
        check.contiguous("out", &out.raw)?;
        check.aligned("out", &out.raw, 16)?;
        check.offsets_in_32_bits("out", &out.raw)?;
        let cache = check_cache(&check, [&kv.k.raw, &kv.v.raw], kv.layout, table, &[spec.dtype_kv])?;
        if (cache.heads, cache.head_dim) != (self.heads.num_kv_heads as i64, head_dim) {
            return check.fail(
                "kv.k",
                format!(
                    "it has {} heads of {} elements; the plan is for {} of {head_dim}",
                    cache.heads, cache.head_dim, self.heads.num_kv_heads
                ),
            );
        }
        check_lse(&check, lse.as_ref().map(|lse| &lse.raw), batch, qo_heads)?;
        let Some(info) = &self.info else { return Ok(()) };

        let runtime = FlashInferRuntime::get()?;
        let (indptr, indices, last_page_len) = (table.indptr()?, table.indices()?, table.last_page_len()?);
        let kernel = Run {
            float_workspace: DlTensor::new(&self.scratch.float),
            int_workspace: DlTensor::new(&self.scratch.int),
            plan_info: &info.object,
            q: q.into(),
            paged_k_cache: DlTensor::new(&kv.k.raw),
            paged_v_cache: DlTensor::new(&kv.v.raw),
            paged_kv_indptr: DlTensor::new(&indptr),
            paged_kv_indices: DlTensor::new(&indices),
            paged_kv_last_page_len: DlTensor::new(&last_page_len),
            o: DlTensor::new(&out.raw),
            maybe_lse: lse.as_ref().map(|lse| DlTensor::new(&lse.raw)),
            kv_layout: kv.layout.code(),
            window_left: self.decode.window_left(),
            enable_pdl: enable_pdl(runtime, options.enable_pdl, stream.ordinal())?,
            maybe_alibi_slopes: None,
            logits_soft_cap: self.decode.logits_soft_cap(),
            sm_scale: options.sm_scale.unwrap_or_else(|| spec.default_sm_scale()),
            rope_rcp_scale: 1.0,
            rope_rcp_theta: 1e-4,
        };
        // SAFETY: all tensors have the dtypes, shapes, strides and alignment
        // of this module and plan; the index arrays are the device copies of
        // those that the plan was made from, checked against a cache of at
        // most this many pages; the workspace is the plan's, on its stream.
        unsafe { kernel.call(&self.decode.run, stream) }.map(drop)
    }

    /// The stream that runs go to.
    pub fn stream(&self) -> &Stream {
        self.table.stream()
    }

    /// Whether long requests are divided among several blocks, whose partial
    /// results a second kernel merges.
    pub fn splits_kv(&self) -> bool {
        self.info.as_ref().is_some_and(|info| info.numbers[9] != 0)
    }

    /// Whether a CUDA graph that captured runs of `captured` may be replayed
    /// after this plan: both were made in [`PlanMode::CudaGraph`] and divide
    /// the work in the same way. `captured` are the [`numbers`](Self::numbers)
    /// of the plan that was captured.
    pub fn can_replay(&self, captured: &[i64]) -> bool {
        self.numbers() == captured && self.info.as_ref().is_none_or(|info| info.numbers[8] != 0)
    }

    /// The plan's numbers, as the module gave them: launch sizes and offsets
    /// into the workspace.
    pub fn numbers(&self) -> &[i64] {
        self.info.as_ref().map_or(&[], |info| &info.numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_requests_are_planned_as_one_page() {
        assert!(matches!(planned_indptr(&[0, 2, 3]), Cow::Borrowed([0, 2, 3])));
        assert_eq!(*planned_indptr(&[0, 0, 5, 5, 5]), [0, 1, 6, 7, 8]);
        assert_eq!(*planned_indptr(&[0, 0]), [0, 1]);
    }
}
