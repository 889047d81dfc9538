//! Multi-head latent attention over a paged cache, in its absorbed form.
//!
//! All heads share one row of the cache per token: 512 elements that serve as
//! key and value (`ckv`), and 64 more of the key that carry the position
//! (`kpe`). Queries come in the same two parts.
//!
//! Source of the contract: `csrc/batch_mla_*.cu`,
//! `include/flashinfer/attention/{mla,mla_hopper}.cuh` and `MLAPlan` of
//! `attention/scheduler.cuh` of FlashInfer 0.6.13.

use super::{
    batch_run::ANY_BACKEND,
    mla_spec::MlaSpec,
    mla_work::{MlaWork, int_bytes},
    options::{PlanOptions, check_sm_scale},
    paged_batch::PagedBatch,
    planned::{PlanInfo, Planned, Planning, check_gpu, check_lse, check_workspace, host_indices, make_plan},
    resolve::flash_attention,
    spec::Backend,
    workspace::{Need, Workspace},
};
use crate::{
    artifacts::FlashInferVersion,
    capture,
    dtype::DType,
    error::{FlashInferError, Result},
    ffi::{DlTensor, Kernel, KernelFunction, Signature, kernels},
    indices::{PageIndices, PageTable, RaggedIndices},
    kv::layout::{MLA_DIMS, MlaCache, split_latent},
    module::Module,
    ops::{check::Check, page::check_mla_cache},
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
    struct Plan = "plan" {
        float_workspace: Tensor, int_workspace: Tensor, pinned_int_workspace: Tensor,
        qo_indptr: Tensor, kv_indptr: Tensor, kv_len: Tensor, num_heads: Int, head_dim_o: Int, causal: Bool,
    } {
        "0.6.13": (
            float_workspace, int_workspace, pinned_int_workspace,
            qo_indptr, kv_indptr, kv_len, num_heads, head_dim_o, causal,
        ) -> "Array<int>";
        "0.7.0": (
            float_workspace, int_workspace, pinned_int_workspace,
            qo_indptr, kv_indptr, kv_len, num_heads, head_dim_o, causal,
        ) -> "Tuple<Array<int>, int>";
    }
    struct Run = "run" {
        float_workspace: Tensor, int_workspace: Tensor, plan_info: IntArray, q_nope: Tensor, q_pe: Tensor,
        ckv_cache: Tensor, kpe_cache: Tensor, kv_indices: Tensor, o: Tensor, maybe_lse: OptTensor,
        mask_mode: Int, num_heads: Int, page_size: Int, sm_scale: Float, return_lse_base_on_e: Bool,
        ckv_scale: Float, kpe_scale: Float, maybe_ckv_scale_arr: OptTensor,
    } {
        "0.6.13": (
            float_workspace, int_workspace, plan_info, q_nope, q_pe,
            ckv_cache, kpe_cache, kv_indices, o, maybe_lse,
            mask_mode, num_heads, page_size, sm_scale, return_lse_base_on_e,
        ) -> "void";
        "0.6.18": (
            float_workspace, int_workspace, plan_info, q_nope, q_pe,
            ckv_cache, kpe_cache, kv_indices, o, maybe_lse,
            mask_mode, num_heads, page_size, sm_scale, return_lse_base_on_e,
            ckv_scale, kpe_scale, maybe_ckv_scale_arr,
        ) -> "void";
    }
}

pub(super) const SIGNATURES: &[(&str, &[Signature])] =
    &[("batch_mla_attention_*", Plan::SIGNATURES), ("batch_mla_attention_*", Run::SIGNATURES)];

const PLAN_OP: &str = "BatchMla::plan";
const RUN_OP: &str = "MlaPlan::run_with";
/// Numbers in a plan.
const PLAN_LEN: usize = 18;

/// Queries in two parts.
#[derive(Clone, Copy, Debug)]
pub struct MlaQuery<'a> {
    /// The part for the compressed keys, `[n, num_heads, 512]`.
    pub nope: TensorRef<'a>,
    /// The part for the positions, `[n, num_heads, 64]`.
    pub pe: TensorRef<'a>,
}

impl<'a> MlaQuery<'a> {
    /// Queries of two tensors. They are checked where they are used.
    pub fn new(nope: TensorRef<'a>, pe: TensorRef<'a>) -> Self {
        Self { nope, pe }
    }

    /// Queries that hold both parts in one tensor `[n, num_heads, 576]`.
    ///
    /// # Errors
    /// The tensor has not three dimensions of which the last is 576.
    pub fn joined(q: TensorRef<'a>) -> Result<Self> {
        let [nope, pe] = split_latent("MlaQuery", "q", q)?;
        Ok(Self { nope, pe })
    }
}

/// Latent attention of ragged queries to their requests' pages.
///
/// The cache is a [`PagedKvCache`](crate::kv::PagedKvCache) of
/// [`KvShape::Latent`](crate::kv::KvShape::Latent), or tensors of yours. There are
/// no plans for CUDA graphs: a run in the capture of a
/// [`CapturedStep`](crate::graph::CapturedStep) is refused; make it between two of them.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{
///     DType, PageIndices, PageTable, Stream, attention::{BatchMla, MlaQuery, MlaSpec, PagedBatch,
///     PlanOptions, Workspace}, gpu::Tensor, kv::MlaCache, indices::{RaggedIndices, RaggedTable},
/// };
/// use half::bf16;
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// let spec = MlaSpec::new(DType::BF16, 1.0 / 192f64.sqrt());
/// let mla = BatchMla::new(&stream, &spec, 16)?;
///
/// // One request decodes its 50th token; one has prefilled 20, of which the last 8 now.
/// let requests = [(&[0, 1, 2, 3][..], 50), (&[5, 4][..], 20)];
/// let table = PageTable::new(&stream, PageIndices::from_requests(8, 16, requests)?)?;
/// let queries = RaggedTable::new(&stream, RaggedIndices::from_lens([1, 8])?)?;
/// let mut workspace = Workspace::new(&stream)?;
/// let plan = mla.plan(&mut workspace, PagedBatch::new(&queries, &table), &PlanOptions::causal())?;
///
/// let q = Tensor::<bf16>::zeros(&stream, &[9, 16, 576])?;
/// let cache = Tensor::<bf16>::zeros(&stream, &[8, 16, 576])?;
/// let mut out = Tensor::<bf16>::zeros(&stream, &[9, 16, 512])?;
/// plan.run(&MlaQuery::joined(q.view())?, &MlaCache::joined(cache.view())?, &mut out.view_mut())?;
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
#[derive(Clone, Copy, Debug)]
pub struct BatchMla {
    spec: MlaSpec,
    num_heads: usize,
    backend: Backend,
    ordinal: u32,
    module: &'static Module,
    plan: KernelFunction,
    run: KernelFunction,
}

impl BatchMla {
    /// Resolves the module of a spec for the stream's GPU and so many query
    /// heads; downloads the pinned wheel if no local source holds it and that is
    /// allowed.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument): there are no heads,
    /// or `sm_scale` is below 0.001 or not a number.
    /// [`Unsupported`](FlashInferError::Unsupported): there is no such module, or
    /// not for this GPU. Else the module cannot be had or opened.
    pub fn new(stream: &Stream, spec: &MlaSpec, num_heads: usize) -> Result<Self> {
        check_new(&Check::new("BatchMla::new", stream)?, spec, num_heads)?;
        let runtime = FlashInferRuntime::get()?;
        let backend = flash_attention(spec.backend, runtime.compute_capability(stream.ordinal())?)?[0];
        // What the oldest version refuses, no later one has.
        spec.module(FlashInferVersion::OLDEST, backend)?;
        let (_, module) = runtime.first_of(&[|version| spec.module(version, backend).ok()])?;
        let plan = module.kernel(Plan::SIGNATURES)?;
        let run = module.kernel(Run::SIGNATURES)?;
        Ok(Self { spec: *spec, num_heads, backend, ordinal: stream.ordinal(), module, plan, run })
    }

    /// The module that serves the spec.
    pub fn module(&self) -> &'static Module {
        self.module
    }

    /// The kernels that were picked: FlashAttention 2 or 3.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// The spec.
    pub fn spec(&self) -> &MlaSpec {
        &self.spec
    }

    /// Query heads.
    pub fn num_heads(&self) -> usize {
        self.num_heads
    }

    /// Divides the work of one step among the GPU's multiprocessors, from the
    /// host copies of the index arrays, and enqueues the upload of the result
    /// to the workspace.
    ///
    /// The plan serves every layer of the step. `queries` says how many there are
    /// of each request: one for decode, several for prefill, also none. It can
    /// change once it is planned. A step without queries gives a plan whose runs
    /// do nothing.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument):
    /// - queries and page table differ in their number of requests;
    /// - the mask is causal, and a request has more queries than tokens;
    /// - it is causal, a request has several queries, and the kernels' tiles end
    ///   inside a query, where they would lose keys: 1, 2, 4, 8, 16, 32, 64 and
    ///   128 heads are always fine;
    /// - the step has too much work for one plan, which has room for 16384
    ///   items (a tile of 64 or 128 query heads, times the parts into which
    ///   its tokens are divided): split the step;
    /// - the workspace is too small and does not [grow](Workspace#growth), or it,
    ///   the page table and this value belong to different streams or GPUs;
    /// - the stream is being captured.
    ///
    /// [`Unsupported`](FlashInferError::Unsupported): another mask than none and
    /// the causal one, a [`graph`](PlanOptions::graph), whose launch would change
    /// from plan to plan, or a [`split`](PlanOptions::split). Else what the module or CUDA said. The workspace can be used again.
    pub fn plan<'p>(
        &self,
        workspace: &'p mut Workspace,
        batch: impl Into<PagedBatch<'p>>,
        options: &PlanOptions<'_>,
    ) -> Result<MlaPlan<'p>> {
        let PagedBatch { queries, table } = batch.into();
        let stream = table.stream();
        let check = Check::new(PLAN_OP, stream)?;
        check_gpu(&check, "table", self.ordinal)?;
        check.on_stream("queries", queries.stream())?;
        let queries = queries.host();
        let causal = options.is_causal("latent attention")?;
        options.split.refuse("latent attention")?;
        if options.graph.is_some() {
            return Err(FlashInferError::Unsupported {
                what: "a plan of latent attention for a CUDA graph".into(),
                available:
                    "its launch depends on the lengths of the requests; plan without PlanOptions::graph, and \
                            capture anew after each plan"
                        .into(),
            });
        }
        let work = MlaWork::of(&check, queries, table.host(), self.num_heads, causal)?;
        check_workspace(&check, workspace)?;
        let info = match work.kv_lens.len() {
            0 => None,
            _ => Some(self.plan_work(&check, workspace, &work, stream)?),
        };
        Ok(MlaPlan {
            mla: *self,
            table,
            rows: queries.total(),
            causal: work.causal,
            planned: Planned::new(workspace, info)?,
        })
    }

    fn plan_work(
        &self,
        check: &Check<'_>,
        workspace: &mut Workspace,
        work: &MlaWork,
        stream: &Stream,
    ) -> Result<PlanInfo> {
        let cuda = FlashInferRuntime::get()?.cuda();
        let multiprocessors = cuda.multiprocessors(stream.ordinal())?;
        work.check_limits(check, multiprocessors)?;
        let need = Need { float: work.float_bytes(multiprocessors), int: int_bytes(multiprocessors) };
        let planning = Planning { need, for_graph: false, clear: false, numbers: PLAN_LEN };
        let (qo_indptr, kv_indptr) = (host_indices(&work.qo_indptr)?, host_indices(&work.kv_indptr)?);
        let kv_len = host_indices(&work.kv_lens)?;
        make_plan(check, workspace, planning, |scratch, pinned, stream| {
            let kernel = Plan {
                float_workspace: DlTensor::new(&scratch.float),
                int_workspace: DlTensor::new(&scratch.int),
                pinned_int_workspace: DlTensor::new(pinned),
                qo_indptr: DlTensor::new(&qo_indptr),
                kv_indptr: DlTensor::new(&kv_indptr),
                kv_len: DlTensor::new(&kv_len),
                num_heads: work.num_heads as i64,
                head_dim_o: self.spec.head_dim_ckv as i64,
                causal: work.causal,
            };
            // SAFETY: the arrays are checked host arrays of one batch, which
            // is not empty; its work items fit the planner's arrays and its
            // sums fit 32 bits; the host buffer is page-locked, as large as
            // the device one and as what the planner writes, and not written
            // again before the copy out of it is done.
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
/// from the process, CUDA refuses it.
#[derive(Debug)]
pub struct MlaPlan<'p> {
    mla: BatchMla,
    table: &'p PageTable,
    /// Queries of all requests.
    rows: usize,
    causal: bool,
    planned: Planned<'p>,
}

impl MlaPlan<'_> {
    /// `out = softmax((q.nope · ckvᵀ + q.pe · kpeᵀ) · sm_scale) · ckv` for each
    /// query and head, over the tokens that the query sees.
    ///
    /// # Errors
    /// As [`run_with`](Self::run_with).
    pub fn run(&self, q: &MlaQuery<'_>, cache: &MlaCache<'_>, out: &mut TensorMut<'_>) -> Result<()> {
        self.run_with(q, cache, out, None)
    }

    /// As [`run`](Self::run), with an LSE. There are no other options of a run.
    ///
    /// With `n` queries in all, `q.nope` is `[n, num_heads, 512]`, `q.pe`
    /// `[n, num_heads, 64]`, `out` `[n, num_heads, 512]`; the last dimension is
    /// contiguous, the others may be strided. `cache` is the paged cache that
    /// the page table was checked for. `lse`, if given, is a contiguous `f32`
    /// `[n, num_heads]` and takes the base-2 logarithm of each sum of
    /// exponentials. A query whose request has no tokens gets zeros, and −∞.
    ///
    /// Of scores below −50000 see [`attention`](super#very-negative-scores).
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) before anything
    /// is launched: a device, stream, dtype, shape, stride or alignment does
    /// not fit the plan, or a tensor spans 2³² elements. Else what the module or
    /// CUDA said.
    pub fn run_with(
        &self,
        q: &MlaQuery<'_>,
        cache: &MlaCache<'_>,
        out: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
    ) -> Result<()> {
        let (spec, table, stream) = (&self.mla.spec, self.table, self.stream());
        let check = Check::new(RUN_OP, stream)?;
        let (rows, num_heads) = (self.rows, self.mla.num_heads);
        let run = MlaRun { dtype: spec.dtype, rows, num_heads, q, cache, out, lse: lse.as_deref() };
        run.check(&check, table)?;
        let Some(info) = &self.planned.info else { return Ok(()) };
        if capture::is_active() {
            return check.fail(
                "plan",
                "latent attention has no plans for CUDA graphs; run it between captured steps".into(),
            );
        }

        let indices = table.indices()?;
        let plain = [&q.nope.raw, &q.pe.raw, &cache.ckv.raw, &cache.kpe.raw, &out.raw];
        let [q_nope, q_pe, ckv_cache, kpe_cache, o] = plain.map(|tensor| tensor.with_plain_unit_strides());
        let kernel = Run {
            float_workspace: DlTensor::new(&self.planned.scratch.float),
            int_workspace: DlTensor::new(&self.planned.scratch.int),
            plan_info: &info.object,
            q_nope: DlTensor::new(&q_nope),
            q_pe: DlTensor::new(&q_pe),
            ckv_cache: DlTensor::new(&ckv_cache),
            kpe_cache: DlTensor::new(&kpe_cache),
            kv_indices: DlTensor::new(&indices),
            o: DlTensor::new(&o),
            maybe_lse: lse.as_ref().map(|lse| DlTensor::new(&lse.raw)),
            mask_mode: self.causal.into(),
            num_heads: num_heads as i64,
            page_size: table.host().page_size() as i64,
            sm_scale: spec.sm_scale,
            return_lse_base_on_e: false,
            ckv_scale: 1.0,
            kpe_scale: 1.0,
            maybe_ckv_scale_arr: None,
        };
        // SAFETY: all tensors have the dtypes, shapes, strides and alignment
        // of this module and plan; the page numbers are the device copy of
        // those that the plan was made from, checked against a cache of at
        // most this many pages; mask, heads and page size are the plan's; the
        // workspace is the plan's, on its stream.
        unsafe { kernel.call(&self.mla.run, stream) }.map(drop)
    }

    /// The stream that runs go to.
    pub fn stream(&self) -> &Stream {
        self.table.stream()
    }

    /// The kernels that run: FlashAttention 2 or 3.
    pub fn backend(&self) -> Backend {
        self.mla.backend
    }

    /// The plan's numbers, as the module gave them: launch sizes and offsets
    /// into the workspace.
    pub fn numbers(&self) -> &[i64] {
        self.planned.numbers()
    }
}

/// What [`BatchMla::new`] refuses whatever the GPU is.
fn check_new(check: &Check<'_>, spec: &MlaSpec, num_heads: usize) -> Result<()> {
    check_sm_scale(check, spec.sm_scale)?;
    if num_heads == 0 {
        return check.fail("num_heads", "there must be a head".into());
    }
    Ok(())
}

/// As [`BatchMla::new`], where no GPU is known.
pub(crate) fn check_mla_spec(check: &Check<'_>, spec: &MlaSpec, num_heads: usize) -> Result<()> {
    check_new(check, spec, num_heads)?;
    spec.module(FlashInferVersion::OLDEST, flash_attention(spec.backend, ANY_BACKEND)?[0]).map(drop)
}

/// As [`BatchMla::plan`], where no GPU is known.
pub(crate) fn check_mla_plan(
    check: &Check<'_>,
    queries: &RaggedIndices,
    table: &PageIndices,
    num_heads: usize,
    causal: bool,
) -> Result<()> {
    let work = MlaWork::of(check, queries, table, num_heads, causal)?;
    if work.kv_lens.is_empty() { Ok(()) } else { work.check_tiles(check) }
}

/// The arguments of a run, and what its plan is for.
pub(crate) struct MlaRun<'a> {
    pub(crate) dtype: DType,
    /// Rows of queries.
    pub(crate) rows: usize,
    pub(crate) num_heads: usize,
    pub(crate) q: &'a MlaQuery<'a>,
    pub(crate) cache: &'a MlaCache<'a>,
    pub(crate) out: &'a TensorMut<'a>,
    pub(crate) lse: Option<&'a TensorMut<'a>>,
}

impl MlaRun<'_> {
    /// All that the kernels assume of tensors.
    pub(crate) fn check(&self, check: &Check<'_>, table: &impl AsRef<PageIndices>) -> Result<()> {
        let Self { dtype, q, cache, out, .. } = *self;
        let (rows, heads, [ckv, kpe]) = (self.rows as i64, self.num_heads as i64, MLA_DIMS);
        for (name, tensor, dim) in
            [("q.nope", &q.nope.raw, ckv), ("q.pe", &q.pe.raw, kpe), ("out", &out.raw, ckv)]
        {
            check.tensor(name, tensor, &[dtype], &[3])?;
            check.shape(name, tensor, &[rows, heads, dim])?;
            check.last_dim_contiguous(name, tensor)?;
            check.aligned(name, tensor, 16)?;
            check.offsets_in_32_bits(name, tensor)?;
        }
        let parts = [("cache.ckv", &cache.ckv.raw), ("cache.kpe", &cache.kpe.raw)];
        check_mla_cache(check, parts.map(|part| part.0), parts.map(|part| part.1), table, &[dtype])?;
        for (name, part) in parts {
            check_page_span(check, name, part)?;
        }
        check_lse(check, self.lse.map(|lse| &lse.raw), rows, heads)
    }
}

/// The kernels compute a token's offset inside its page in 32 bits.
fn check_page_span(check: &Check<'_>, argument: &'static str, part: &RawTensor) -> Result<()> {
    let (page_size, stride) = (part.shape()[1], part.strides()[1]);
    let last = i128::from(page_size - 1).max(0) * i128::from(stride);
    if last <= i128::from(u32::MAX) {
        return Ok(());
    }
    check.fail(
        argument,
        format!("a page of {page_size} tokens with a stride of {stride} spans 2^32 elements or more"),
    )
}

#[cfg(test)]
mod tests {
    use super::{
        super::testing::{on_a_stream, refused},
        *,
    };

    #[test]
    fn pages_span_less_than_32_bits() {
        let part = |page_size, stride| {
            let data = 16 as *mut _;
            RawTensor::new(
                data,
                crate::Device::Cuda(0),
                DType::F16,
                &[2, page_size, 512],
                Some(&[1 << 40, stride, 1]),
            )
            .unwrap()
        };
        on_a_stream(|check| {
            assert!(check_page_span(check, "cache.ckv", &part(1 << 16, 65536)).is_ok());
            refused(check_page_span(check, "cache.ckv", &part((1 << 16) + 1, 65536)), "cache.ckv");
            assert!(check_page_span(check, "cache.ckv", &part(1, 1 << 40)).is_ok());
        });
    }

    #[test]
    fn parts_of_joined_tensors() {
        let storage = [0u16; 4 * 576];
        let joined = TensorRef::from_slice(&storage, &[2, 2, 576]).unwrap();
        let cache = MlaCache::joined(joined).unwrap();
        assert_eq!((cache.ckv.shape(), cache.kpe.shape()), (&[2, 2, 512][..], &[2, 2, 64][..]));
        assert_eq!(cache.kpe.data_ptr() as usize - cache.ckv.data_ptr() as usize, 1024);
        assert_eq!(MlaQuery::joined(joined).unwrap().pe.strides(), [1152, 576, 1]);
        for shape in [&[4, 576][..], &[4, 2, 288]] {
            refused(MlaCache::joined(TensorRef::from_slice(&storage, shape).unwrap()), "cache");
            refused(MlaQuery::joined(TensorRef::from_slice(&storage, shape).unwrap()), "q");
        }
    }
}
