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
    options::{PlanOptions, check_sm_scale},
    planned::{PlanInfo, Planned, Planning, check_lse, check_workspace, host_indices, make_plan},
    spec::{Backend, flash_attention},
    workspace::{Need, Workspace, arrays},
};
use crate::{
    capture,
    cuda::DeviceAttribute,
    dtype::DType,
    error::{FlashInferError, Result},
    ffi::{DlTensor, Function, Kernel, Signature, kernels},
    indices::{PageIndices, PageTable, RaggedIndices},
    kv::layout::{MLA_DIMS, MlaCache, split_latent},
    module::{Module, ModuleName},
    ops::{check::Check, page::check_mla_cache},
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
    struct Plan = "plan"(
        float_workspace: Tensor, int_workspace: Tensor, pinned_int_workspace: Tensor,
        qo_indptr: Tensor, kv_indptr: Tensor, kv_len: Tensor, num_heads: Int, head_dim_o: Int, causal: Bool,
    ) -> "Array<int>";
    struct Run = "run"(
        float_workspace: Tensor, int_workspace: Tensor, plan_info: IntArray, q_nope: Tensor, q_pe: Tensor,
        ckv_cache: Tensor, kpe_cache: Tensor, kv_indices: Tensor, o: Tensor, maybe_lse: OptTensor,
        mask_mode: Int, num_heads: Int, page_size: Int, sm_scale: Float, return_lse_base_on_e: Bool,
    ) -> "void";
}

pub(super) const SIGNATURES: &[(&str, Signature)] =
    &[("batch_mla_attention_*", Plan::SIGNATURE), ("batch_mla_attention_*", Run::SIGNATURE)];

const PLAN_OP: &str = "BatchMla::plan";
const RUN_OP: &str = "MlaPlan::run_with";
/// Numbers in a plan.
const PLAN_LEN: usize = 18;
/// Work items that the planner has room for.
const MAX_WORKS: usize = 16384;
/// Rows of queries (a row is a query's head) that one block works on. With
/// many rows, two blocks work together on twice as many.
const BLOCK_TILE: usize = 64;

/// The properties of a latent attention.
///
/// ```
/// # use flashinfer_rs::{DType, attention::{Backend, MlaSpec}};
/// let module = MlaSpec::new(DType::BF16, 0.07).module(Backend::Fa3)?;
/// assert!(module.as_str().starts_with("batch_mla_attention_") && module.as_str().ends_with("_sm90"));
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct MlaSpec {
    /// Element type of queries, cache and output: `f16` or `bf16`.
    pub dtype: DType,
    /// Width of the compressed part, and of the output: 512.
    pub head_dim_ckv: usize,
    /// Width of the position part: 64.
    pub head_dim_kpe: usize,
    /// The factor on query-key products, at least 0.001.
    ///
    /// It is that of the model before absorption: with 128 and 64 dimensions
    /// without and with position, `1/√192`, times what the model's scaling of
    /// positions asks for. The dimensions here do not tell, so there is no
    /// default.
    pub sm_scale: f64,
    /// Which kernels serve it. [`Backend::Auto`] takes FlashAttention 3 on
    /// compute capability 9.x, else 2, as upstream does.
    pub backend: Backend,
}

impl MlaSpec {
    /// DeepSeek's dimensions, 512 and 64.
    pub const fn new(dtype: DType, sm_scale: f64) -> Self {
        let [ckv, kpe] = MLA_DIMS;
        Self {
            dtype,
            head_dim_ckv: ckv as usize,
            head_dim_kpe: kpe as usize,
            sm_scale,
            backend: Backend::Auto,
        }
    }

    /// Other kernels than [`Backend::Auto`] picks.
    #[must_use]
    pub const fn with_backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// The module of this spec with the kernels of `backend`;
    /// [`Backend::Auto`] is decided by the GPU, so it has no module.
    ///
    /// # Errors
    /// [`FlashInferError::Unsupported`]: there is no such module.
    pub fn module(&self, backend: Backend) -> Result<ModuleName> {
        let unsupported = |what: String, available: &str| {
            Err(FlashInferError::Unsupported { what, available: available.into() })
        };
        if !matches!(self.dtype, DType::F16 | DType::BF16) {
            return unsupported(
                format!("latent attention of dtype {}", self.dtype),
                "there are f16 and bf16",
            );
        }
        if [self.head_dim_ckv, self.head_dim_kpe] != MLA_DIMS.map(|dim| dim as usize) {
            return unsupported(
                format!(
                    "latent attention of head dimensions {} and {}",
                    self.head_dim_ckv, self.head_dim_kpe
                ),
                "there is 512 and 64",
            );
        }
        let suffix = match backend {
            Backend::Fa2 => "",
            Backend::Fa3 => "_sm90",
            Backend::Auto | Backend::CudaCores => {
                return unsupported(
                    format!("a module of latent attention for Backend::{backend:?}"),
                    "there are Backend::Fa2 and Backend::Fa3",
                );
            }
        };
        Ok(ModuleName::new(format!(
            "batch_mla_attention_dtype_q_{0}_dtype_kv_{0}_dtype_o_{0}_dtype_idx_i32_head_dim_ckv_{1}_head_dim_kpe_{2}_\
             profiler_False{suffix}",
            self.dtype, self.head_dim_ckv, self.head_dim_kpe
        )))
    }
}

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
///     DType, PageIndices, PageTable, RaggedIndices, Stream,
///     attention::{BatchMla, MlaQuery, MlaSpec, PlanOptions, Workspace},
///     cudarc::Tensor,
///     kv::MlaCache,
/// };
/// use half::bf16;
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// let spec = MlaSpec::new(DType::BF16, 1.0 / 192f64.sqrt());
/// let mla = BatchMla::new(&stream, &spec, 16)?;
///
/// // One request decodes its 50th token; one has prefilled 20, of which the last 8 now.
/// let requests = [(&[0, 1, 2, 3][..], 50), (&[5, 4][..], 20)];
/// let table = PageTable::new(&stream, PageIndices::from_requests(8, 16, requests)?)?;
/// let queries = RaggedIndices::from_lens([1, 8])?;
/// let mut workspace = Workspace::new(&stream)?;
/// let plan = mla.plan(&mut workspace, &queries, &table, &PlanOptions::causal())?;
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
    plan: Function,
    run: Function,
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
        let check = Check::new("BatchMla::new", stream)?;
        check_sm_scale(&check, spec.sm_scale)?;
        if num_heads == 0 {
            return check.fail("num_heads", "there must be a head".into());
        }
        let runtime = FlashInferRuntime::get()?;
        let backend = flash_attention(spec.backend, runtime.compute_capability(stream.ordinal())?)?[0];
        let name = spec.module(backend)?;
        runtime.preload([&name])?;
        let module = runtime.module(&name)?;
        let plan = module.function(Plan::SIGNATURE.function)?;
        let run = module.function(Run::SIGNATURE.function)?;
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
        queries: &RaggedIndices,
        table: &'p PageTable,
        options: &PlanOptions<'_>,
    ) -> Result<MlaPlan<'p>> {
        let stream = table.stream();
        let check = Check::new(PLAN_OP, stream)?;
        if stream.ordinal() != self.ordinal {
            return check.fail(
                "table",
                format!("it is on {}; the module is for cuda:{}", stream.device(), self.ordinal),
            );
        }
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
        let work = Work::of(&check, queries, table.host(), self.num_heads, causal)?;
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
        work: &Work,
        stream: &Stream,
    ) -> Result<PlanInfo> {
        let cuda = FlashInferRuntime::get()?.cuda();
        let multiprocessors = cuda.attribute(stream.ordinal(), DeviceAttribute::MultiprocessorCount)?;
        let multiprocessors = multiprocessors.unsigned_abs() as usize;
        work.check_limits(check, multiprocessors)?;
        let need = Need { float: work.float_bytes(multiprocessors), int: int_bytes(multiprocessors) };
        let planning = Planning { need, for_graph: false, clear: false, numbers: PLAN_LEN };
        let (qo_indptr, kv_indptr) = (host_indices(&work.qo_indptr)?, host_indices(&work.kv_indptr)?);
        let kv_len = host_indices(&work.kv_lens)?;
        make_plan(check, workspace, planning, |scratch, pinned| {
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

/// What the planner is given: the requests of a batch that have queries.
///
/// Requests without queries make no work. Left in, they would lower the
/// average from which the planner picks its tile.
#[derive(Debug)]
struct Work {
    qo_indptr: Vec<i32>,
    /// Where each request's pages start, and where the last one's end.
    kv_indptr: Vec<i32>,
    kv_lens: Vec<i32>,
    num_heads: usize,
    /// Whether a mask is needed: a single query sees all tokens anyway.
    causal: bool,
}

impl Work {
    /// Compares queries with a page table.
    fn of(
        check: &Check<'_>,
        queries: &RaggedIndices,
        table: &PageIndices,
        num_heads: usize,
        causal: bool,
    ) -> Result<Self> {
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
        // Both are numbered in 32 bits together.
        if queries.total().checked_mul(num_heads).is_none_or(|rows| rows > i32::MAX as usize) {
            return check.fail(
                "num_heads",
                format!(
                    "{num_heads} heads of {} queries; there must be less than 2^31 in all",
                    queries.total()
                ),
            );
        }
        let mut work =
            Self { qo_indptr: vec![0], kv_indptr: vec![0], kv_lens: Vec::new(), num_heads, causal: false };
        for request in 0..queries.batch_size() {
            let (qo_len, kv_len) = (queries.len(request), table.seq_len(request));
            if causal && qo_len > kv_len {
                return check.fail(
                    "queries",
                    format!(
                        "request {request} has {qo_len} queries and {kv_len} tokens; with a causal mask \
                         the queries are the last of the tokens, which the page table must already count"
                    ),
                );
            }
            if qo_len > 0 {
                work.causal |= causal && qo_len > 1;
                work.kv_indptr[work.kv_lens.len()] = table.indptr()[request];
                work.kv_indptr.push(table.indptr()[request + 1]);
                work.qo_indptr.push(queries.indptr()[request + 1]);
                work.kv_lens.push(kv_len as i32);
            }
        }
        Ok(work)
    }

    /// Rows of each request.
    fn rows(&self) -> impl Iterator<Item = usize> {
        self.qo_indptr.windows(2).map(|queries| (queries[1] - queries[0]) as usize * self.num_heads)
    }

    /// Blocks that work together.
    fn cluster(&self) -> usize {
        let rows: usize = self.rows().sum();
        if rows / self.kv_lens.len() > BLOCK_TILE { 2 } else { 1 }
    }

    /// Refuses what the planner or the kernels get wrong without a word.
    fn check_limits(&self, check: &Check<'_>, multiprocessors: usize) -> Result<()> {
        let tile = self.cluster() * BLOCK_TILE;
        let clusters = multiprocessors / self.cluster();
        if clusters == 0 {
            return check.fail("stream", format!("the GPU has {multiprocessors} multiprocessors"));
        }
        // A tile makes one work item, and one more for each further part into
        // which its tokens are cut. A part has at least the tokens of all
        // tiles divided by the number of clusters, so there are at most as
        // many further parts as clusters.
        let tiles: usize = self.rows().map(|rows| rows.div_ceil(tile)).sum();
        if tiles + clusters > MAX_WORKS {
            return check.fail(
                "queries",
                format!(
                    "{tiles} tiles of up to {tile} query heads, in up to {} work items; a plan has room for \
                     {MAX_WORKS}, so split the step",
                    tiles + clusters
                ),
            );
        }
        // The planner keeps these in 32 bits: the tokens of a request, twice,
        // and the share of a cluster, rounded up to a multiple of 256.
        let tokens: usize =
            self.rows().zip(&self.kv_lens).map(|(rows, &len)| rows.div_ceil(tile) * len as usize).sum();
        let longest = self.kv_lens.iter().copied().max().unwrap_or_default() as usize;
        if longest * 2 > i32::MAX as usize || tokens / clusters > i32::MAX as usize - 512 {
            return check.fail(
                "table",
                format!(
                    "a request of {longest} tokens, and {tokens} tokens to read in all; the planner counts \
                     up to 2^30 and 2^31 for each of {clusters} groups of blocks"
                ),
            );
        }
        // The kernels round down where a tile ends inside a query, and then
        // may leave out the last key that this query sees. The last tile of a
        // request ends after all of its queries.
        if self.causal && !tile.is_multiple_of(self.num_heads) && self.rows().any(|rows| rows > tile) {
            return check.fail(
                "num_heads",
                format!(
                    "{} heads do not divide the kernels' tile of {tile}; with a causal mask and {} they would \
                     lose keys, so pad the heads to a power of two up to 128",
                    self.num_heads,
                    if self.num_heads > tile { "several queries" } else { "queries of more than one tile" },
                ),
            );
        }
        Ok(())
    }

    /// Bytes of partial results: for two tiles of each cluster, outputs of 16
    /// bits and their sums.
    fn float_bytes(&self, multiprocessors: usize) -> usize {
        let cluster = self.cluster();
        let rows = 2 * (multiprocessors / cluster) * cluster * BLOCK_TILE;
        arrays([rows * MLA_DIMS[0] as usize * 2, rows * size_of::<f32>()])
    }
}

/// Bytes of the planner's index arrays: nine of all work items, between which
/// are five of all multiprocessors.
fn int_bytes(multiprocessors: usize) -> usize {
    let (works, merges) = (MAX_WORKS * size_of::<i32>(), multiprocessors * size_of::<i32>());
    arrays([[works; 3].as_slice(), &[merges; 5], &[works; 6]].concat())
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
        let (rows, heads) = (self.rows as i64, self.mla.num_heads as i64);
        let [ckv, kpe] = MLA_DIMS;
        for (name, tensor, dim) in
            [("q.nope", &q.nope.raw, ckv), ("q.pe", &q.pe.raw, kpe), ("out", &out.raw, ckv)]
        {
            check.tensor(name, tensor, &[spec.dtype], &[3])?;
            check.shape(name, tensor, &[rows, heads, dim])?;
            check.last_dim_contiguous(name, tensor)?;
            check.aligned(name, tensor, 16)?;
            check.offsets_in_32_bits(name, tensor)?;
        }
        let parts = [("cache.ckv", &cache.ckv.raw), ("cache.kpe", &cache.kpe.raw)];
        check_mla_cache(&check, parts.map(|part| part.0), parts.map(|part| part.1), table, &[spec.dtype])?;
        for (name, part) in parts {
            check_page_span(&check, name, part)?;
        }
        check_lse(&check, lse.as_ref().map(|lse| &lse.raw), rows, heads)?;
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
            num_heads: heads,
            page_size: table.host().page_size() as i64,
            sm_scale: spec.sm_scale,
            return_lse_base_on_e: false,
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
    use super::*;

    /// An H200's.
    const MULTIPROCESSORS: usize = 132;

    fn on_a_stream<R>(use_check: impl FnOnce(&Check<'_>) -> R) -> R {
        // SAFETY: the legacy default stream; nothing is enqueued on it.
        let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
        use_check(&Check::new("test", &stream).unwrap())
    }

    /// The work of requests with these queries and tokens, all tokens in one page.
    fn work(requests: &[(usize, usize)], num_heads: usize, causal: bool) -> Result<Work> {
        let page_size = requests.iter().map(|&(_, tokens)| tokens).max().unwrap_or(1).max(1);
        let pages =
            requests.iter().map(|&(_, tokens)| (if tokens == 0 { &[][..] } else { &[0][..] }, tokens));
        let table = PageIndices::from_requests(1, page_size, pages)?;
        let queries = RaggedIndices::from_lens(requests.iter().map(|&(queries, _)| queries))?;
        on_a_stream(|check| Work::of(check, &queries, &table, num_heads, causal))
    }

    #[track_caller]
    fn refused<T: std::fmt::Debug>(result: Result<T>, expected: &str) {
        match result {
            Err(FlashInferError::InvalidArgument { argument, .. }) => assert_eq!(argument, expected),
            other => panic!("expected {expected} to be refused, got {other:?}"),
        }
    }

    fn limits(requests: &[(usize, usize)], num_heads: usize, causal: bool) -> Result<()> {
        let work = work(requests, num_heads, causal)?;
        on_a_stream(|check| work.check_limits(check, MULTIPROCESSORS))
    }

    #[test]
    fn names_are_upstreams() {
        let spec = MlaSpec::new(DType::F16, 1.0);
        let name = "batch_mla_attention_dtype_q_f16_dtype_kv_f16_dtype_o_f16_dtype_idx_i32_head_dim_ckv_512_\
                    head_dim_kpe_64_profiler_False";
        assert_eq!(spec.module(Backend::Fa2).unwrap().as_str(), name);
        assert_eq!(spec.module(Backend::Fa3).unwrap().as_str(), format!("{name}_sm90"));
        assert!(spec.module(Backend::Auto).is_err());
        for dtype in [DType::F32, DType::E4M3, DType::E5M2, DType::I8] {
            assert!(MlaSpec::new(dtype, 1.0).module(Backend::Fa2).is_err());
        }
        assert!(MlaSpec { head_dim_ckv: 256, ..spec }.module(Backend::Fa2).is_err());
        assert!(MlaSpec { head_dim_kpe: 0, ..spec }.module(Backend::Fa2).is_err());
    }

    /// By hand, as `MLAPlan` allocates.
    #[test]
    fn sizes_are_the_planners() {
        // One block for each tile of 64, or two for one of 128.
        assert_eq!(work(&[(1, 9)], 16, false).unwrap().float_bytes(132), 2 * 132 * 64 * (1024 + 4));
        assert_eq!(work(&[(1, 9)], 128, false).unwrap().float_bytes(133), 2 * 132 * 64 * (1024 + 4));
        assert_eq!(int_bytes(132), 9 * 65_536 + 5 * 528);
        assert_eq!(int_bytes(133), 9 * 65_536 + 5 * 544);
    }

    #[test]
    fn requests_without_queries_are_not_planned() {
        let table =
            PageIndices::from_requests(9, 4, [(&[8, 1][..], 5), (&[3][..], 1), (&[][..], 0), (&[2][..], 4)])
                .unwrap();
        let queries = RaggedIndices::from_lens([2, 0, 3, 1]).unwrap();
        let work = on_a_stream(|check| Work::of(check, &queries, &table, 16, false)).unwrap();
        assert_eq!(work.qo_indptr, [0, 2, 5, 6]);
        assert_eq!(work.kv_indptr, [0, 3, 3, 4]);
        assert_eq!(work.kv_lens, [5, 0, 4]);
        let none = RaggedIndices::from_lens([0; 4]).unwrap();
        let work = on_a_stream(|check| Work::of(check, &none, &table, 16, false)).unwrap();
        assert!(work.kv_lens.is_empty());
    }

    #[test]
    fn queries_must_fit_the_page_table() {
        assert!(work(&[(3, 3), (0, 0), (1, 9)], 16, true).unwrap().causal);
        assert!(!work(&[(1, 3), (0, 0), (1, 9)], 16, true).unwrap().causal, "one query needs no mask");
        assert!(!work(&[(3, 1)], 16, false).unwrap().causal);
        refused(work(&[(2, 9), (4, 3)], 16, true), "queries");
        refused(work(&[(1, 0)], 16, true), "queries");
        // SAFETY: the legacy default stream; nothing is enqueued on it.
        let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
        refused(BatchMla::new(&stream, &MlaSpec::new(DType::F16, 1.0), 0), "num_heads");
        for sm_scale in [0.0, 9e-4, -1.0, f64::NAN, f64::INFINITY] {
            refused(BatchMla::new(&stream, &MlaSpec::new(DType::F16, sm_scale), 16), "sm_scale");
        }
        refused(work(&[(1 << 20, 9)], 1 << 11, false), "num_heads");
        refused(work(&[(2, 9)], usize::MAX, false), "num_heads");
        let table = PageIndices::from_requests(1, 4, [(&[0][..], 1)]).unwrap();
        let queries = RaggedIndices::from_lens([1, 1]).unwrap();
        refused(on_a_stream(|check| Work::of(check, &queries, &table, 16, false)), "queries");
    }

    #[test]
    fn too_much_work_is_refused() {
        // 16 heads fill a quarter of a tile, 128 heads one of two blocks.
        let room = MAX_WORKS - MULTIPROCESSORS;
        assert!(limits(&vec![(1, 100); room], 16, false).is_ok());
        refused(limits(&vec![(1, 100); room + 1], 16, false), "queries");
        let room = MAX_WORKS - MULTIPROCESSORS / 2;
        assert!(limits(&vec![(1, 100); room], 128, true).is_ok());
        refused(limits(&vec![(1, 100); room + 1], 128, true), "queries");
        assert!(limits(&[(room, room)], 128, true).is_ok());
        refused(limits(&[(room + 1, room + 1)], 128, true), "queries");
        // Sums of tokens.
        assert!(limits(&[(1, (1 << 30) - 1)], 16, false).is_ok());
        refused(limits(&[(1, 1 << 30)], 16, false), "table");
        refused(limits(&[(1000, 1 << 29)], 128, false), "table");
    }

    /// Upstream's count of work items and of merges, for any batch that is
    /// let through, against what the planner has room for.
    #[test]
    fn what_is_let_through_has_room() {
        let mut state = 7u64;
        let mut below = |bound: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % bound
        };
        for _ in 0..2000 {
            let longest = 1 << below(20);
            let requests: Vec<_> =
                (0..1 + below(300)).map(|_| (below(40) * below(2), below(longest))).collect();
            let heads = [1, 5, 16, 64, 128, 200][below(6)];
            let (Ok(work), multiprocessors) = (work(&requests, heads, false), 1 + below(160)) else {
                continue;
            };
            if work.kv_lens.is_empty()
                || on_a_stream(|check| work.check_limits(check, multiprocessors)).is_err()
            {
                continue;
            }
            let (cluster, tile) = (work.cluster(), work.cluster() * BLOCK_TILE);
            let clusters = multiprocessors / cluster;
            let tiles = || {
                work.rows().zip(&work.kv_lens).flat_map(|(rows, &len)| {
                    (0..rows.div_ceil(tile)).map(move |at| (tile.min(rows - at * tile), len as usize))
                })
            };
            let share = tiles().map(|(_, len)| len).sum::<usize>().div_ceil(clusters).max(1);
            let part = match share {
                0..=8 => 32,
                9..=16 => 64,
                17..=32 => 128,
                33..=64 => 192,
                _ => share.next_multiple_of(256),
            };
            let items: usize = tiles().map(|(_, len)| len.div_ceil(part).max(1)).sum();
            let split = || tiles().filter(|&(_, len)| len > part);
            let merges: usize =
                split().map(|(rows, len)| rows.div_ceil(rows.div_ceil((len * cluster / part).max(1)))).sum();
            let partial_rows: usize = split().map(|(rows, len)| rows * len.div_ceil(part)).sum();
            assert!(items <= MAX_WORKS && merges <= multiprocessors, "{items} items, {merges} merges");
            assert!(partial_rows * (512 * 2 + 4) <= work.float_bytes(multiprocessors), "{partial_rows} rows");
        }
    }

    #[test]
    fn causal_tiles_must_end_between_queries() {
        for heads in [1, 2, 4, 8, 16, 32, 64, 128] {
            assert!(limits(&[(200, 300), (1, 5)], heads, true).is_ok(), "{heads} heads");
        }
        // Also where most requests have no queries, which are left out.
        assert!(limits(&[(2, 300), (0, 5), (0, 5), (0, 5), (0, 5)], 128, true).is_ok());
        for heads in [3, 12, 20, 40, 48, 96, 129, 192, 256] {
            refused(limits(&[(200, 300), (1, 5)], heads, true), "num_heads");
            assert!(limits(&[(200, 300), (1, 5)], heads, false).is_ok(), "{heads} heads");
            assert!(limits(&[(1, 300), (1, 5)], heads, true).is_ok(), "{heads} heads of single queries");
        }
        // One tile holds all queries.
        assert!(limits(&[(3, 300)], 20, true).is_ok());
        refused(limits(&[(7, 300)], 20, true), "num_heads");
    }

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
