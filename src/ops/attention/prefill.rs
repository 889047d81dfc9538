//! Batch prefill: any number of queries per request, over paged or ragged
//! keys and values.

use super::{
    batch_run::BatchRun,
    empty_states,
    keys_apart::{KvBatch, as_pages, check_widths_of_pages},
    mask::{MaskTensors, requests_of},
    modules::Family,
    options::{PlanOptions, RunOptions},
    paged_batch::PagedBatch,
    planned::{
        PlanInfo, Planned, ReplayKey, ReplayShape, check_described, check_rows, check_workspace,
        run_over_pages,
    },
    prefill_batch::{BatchShape, PrefillBatch, stand_in_width},
    prefill_kernels::{PageArrays, PrefillKernels, RUN_OP, RunTensors},
    spec::{AttentionSpec, Backend, Heads},
    workspace::Workspace,
};
use crate::{
    capture,
    dtype::DType,
    error::Result,
    indices::{PageTable, RaggedTable},
    kv::{KvLayout, PagedKv},
    module::Module,
    ops::check::Check,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

const PAGED_OP: &str = "BatchPrefill::plan_paged";
const RAGGED_OP: &str = "BatchPrefill::plan_ragged";

/// Batch prefill over paged or ragged keys and values.
///
/// What [`Backend::Auto`] picks, FlashAttention 2 or 3, [`backend`](Self::backend)
/// says.
///
/// Requests do not see each other, also if one is full of NaN. FlashAttention 3
/// cannot keep them apart where values have another width than keys (192/128), so
/// there it takes [one request a plan](Self::plan_ragged).
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{
///     DType, Stream, attention::{AttentionSpec, Backend, BatchPrefill, Heads, Mask, PlanOptions,
///     Workspace}, gpu::Tensor, indices::{MaskIndices, MaskTable, RaggedIndices, RaggedTable},
/// };
/// use half::bf16;
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// let (spec, heads) = (AttentionSpec::new(DType::BF16, 128), Heads::new(32, 8));
/// let prefill = BatchPrefill::new(&stream, &spec, heads)?;
///
/// // Two requests: a prompt of 5 tokens, and 3 more tokens of one that has 20.
/// let queries = RaggedTable::new(&stream, RaggedIndices::from_lens([5, 3])?)?;
/// let keys = RaggedTable::new(&stream, RaggedIndices::from_lens([5, 20])?)?;
/// let q = Tensor::<bf16>::zeros(&stream, &[8, 32, 128])?;
/// let k = Tensor::<bf16>::zeros(&stream, &[25, 8, 128])?;
/// let v = Tensor::<bf16>::zeros(&stream, &[25, 8, 128])?;
/// let mut out = Tensor::<bf16>::zeros(&stream, &[8, 32, 128])?;
///
/// let mut workspace = Workspace::new(&stream)?;
/// let plan = prefill.plan_ragged(&mut workspace, &queries, &keys, &PlanOptions::causal())?;
/// plan.run(&q.view(), [&k.view(), &v.view()], &mut out.view_mut())?;
///
/// // With a mask that says for each query and key whether it is seen, as
/// // drafts that form a tree need it.
/// let masked = BatchPrefill::new(&stream, &spec.with_backend(Backend::Fa2), heads)?;
/// let indices = MaskIndices::new([(5, 5), (3, 20)])?;
/// let bits = indices.pack(&[true; 5 * 5 + 3 * 20])?;
/// let bits = Tensor::from_slice(&stream, &[bits.len()], &bits)?;
/// let indices = MaskTable::new(&stream, indices)?;
/// let options = PlanOptions::default().with_mask(Mask::Custom { indices: &indices, bits: bits.view() });
/// let plan = masked.plan_ragged(&mut workspace, &queries, &keys, &options)?;
/// plan.run(&q.view(), [&k.view(), &v.view()], &mut out.view_mut())?;
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
#[derive(Clone, Copy, Debug)]
pub struct BatchPrefill {
    kernels: PrefillKernels,
    heads: Heads,
}

impl BatchPrefill {
    /// Resolves the module of a spec for the stream's device; downloads the
    /// pinned wheel if no local source holds it and that is allowed.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): no kernel can work
    /// on such heads. [`Unsupported`](crate::FlashInferError::Unsupported): no such
    /// module can exist, or not for this GPU; or it is in no local source, and
    /// FlashInfer publishes none. Else the module cannot be had or opened.
    pub fn new(stream: &Stream, spec: &AttentionSpec, heads: Heads) -> Result<Self> {
        heads.check("BatchPrefill::new")?;
        let (module, fa3) = spec.first_prefill(stream, Family::Batch)?;
        Ok(Self { kernels: PrefillKernels::load(module, spec, fa3)?, heads })
    }

    /// The module that serves the spec.
    pub fn module(&self) -> &'static Module {
        self.kernels.module()
    }

    /// The spec.
    pub fn spec(&self) -> &AttentionSpec {
        &self.kernels.spec
    }

    /// The heads.
    pub fn heads(&self) -> Heads {
        self.heads
    }

    /// The kernels that were picked: FlashAttention 2 or 3.
    pub fn backend(&self) -> Backend {
        self.kernels.backend()
    }

    /// Plans attention of the queries of a batch to its pages.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): batch sizes or
    /// streams do not fit; with a causal mask, a request has more queries than
    /// keys, and keys; the workspace is too small and does not
    /// [grow](Workspace#growth); the stream is being captured;
    /// [`graph`](PlanOptions::graph) has fewer rows than queries or requests;
    /// [`split`](PlanOptions::split) is out of range.
    /// [`Unsupported`](crate::FlashInferError::Unsupported): the kernels do not have the
    /// mask or the `split`. Else what the module or CUDA said.
    ///
    /// If the workspace was planned for an equal batch last, nothing is planned
    /// nor uploaded again.
    pub fn plan_paged<'p>(
        &self,
        workspace: &'p mut Workspace,
        batch: impl Into<PagedBatch<'p>>,
        options: &PlanOptions<'p>,
    ) -> Result<PrefillPlan<'p, PageTable>> {
        let PagedBatch { queries, table } = batch.into();
        self.kernels.spec.check_paged()?;
        let indices = table.host();
        let lens = indices.seq_lens();
        let (indptr, page_size, extent) = (indices.indptr(), indices.page_size(), indices.num_pages());
        let kv = KvBatch { op: PAGED_OP, indptr, lens: &lens, page_size, extent, paged: true };
        let keys = KvTable { table, indptr: table.indptr()?, addresses: table.addresses() };
        self.plan(workspace, queries, keys, &kv, options)
    }

    /// Plans attention of `queries` to keys and values that lie one after the
    /// other, divided by `keys`.
    ///
    /// # Errors
    /// As [`plan_paged`](Self::plan_paged); also
    /// [`Unsupported`](crate::FlashInferError::Unsupported): FlashAttention 3 for several
    /// requests, if values have another width than keys. Its tiles reach into the
    /// next request, which only keys and values of one width can be kept from.
    pub fn plan_ragged<'p>(
        &self,
        workspace: &'p mut Workspace,
        queries: &'p RaggedTable,
        keys: &'p RaggedTable,
        options: &PlanOptions<'p>,
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
        let keys = KvTable { table: keys, indptr: keys.indptr()?, addresses: keys.addresses() };
        self.plan(workspace, queries, keys, &kv, options)
    }

    fn plan<'p, K>(
        &self,
        workspace: &'p mut Workspace,
        queries: &'p RaggedTable,
        keys: KvTable<'p, K>,
        kv: &KvBatch<'_>,
        options: &PlanOptions<'p>,
    ) -> Result<PrefillPlan<'p, K>> {
        let check = Check::new(kv.op, queries.stream())?;
        check.tensor("keys", &keys.indptr, &[DType::I32], &[1])?;
        let heads = self.heads;
        let (requests, total) = (queries.host().batch_size(), queries.host().total());
        if requests != kv.lens.len() {
            return check.fail(
                "queries",
                format!("they are of {requests} requests, keys and values of {}", kv.lens.len()),
            );
        }
        let rows = check_rows(&check, options.graph, total, requests)?;
        self.kernels.spec.check_output_size(&check, rows, heads)?;
        let batch = requests_of(queries.host(), kv.lens);
        options.mask.check(&check, &self.kernels.spec, self.kernels.fa3, batch, kv.paged)?;
        self.kernels.check_split(&check, options, kv.page_size)?;
        let batch = requests_of(queries.host(), kv.lens);
        let graph = options.graph.is_some();
        let as_pages = self.kernels.fa3 && kv.reaches_others(graph, batch.clone());
        if as_pages {
            check_widths_of_pages(&self.kernels.spec)?;
        }
        let mask = options.mask.tensors(self.kernels.fa3)?;
        check_workspace(&check, workspace)?;
        let empty = empty_states::possible(graph, &mask, batch.clone());
        if empty {
            empty_states::prepare()?;
        }
        let as_pages = as_pages.then(|| workspace.numbers_to(kv.extent)).transpose()?;
        let info = if total == 0 && !graph || requests == 0 {
            None
        } else {
            let batch = PrefillBatch {
                qo_indptr: queries.host().indptr().into(),
                kv_indptr: kv.indptr.into(),
                kv_lens: kv.lens.into(),
                shape: BatchShape {
                    page_size: kv.page_size,
                    heads,
                    causal: options.mask.is_causal(),
                    rows,
                    one_query_each: false,
                    cuda_graph: graph,
                    split: options.split,
                },
            };
            Some(self.kernels.make_plan(&check, workspace, batch)?)
        };
        Ok(PrefillPlan {
            kernels: self.kernels,
            queries,
            keys: keys.table,
            key_addresses: keys.addresses,
            keys_extent: kv.extent,
            heads,
            rows,
            graph,
            mask,
            empty,
            as_pages,
            planned: Planned::new(workspace, info)?,
        })
    }
}

/// The index arrays of keys and values on the device.
struct KvTable<'p, K> {
    table: &'p K,
    indptr: RawTensor,
    addresses: [usize; 3],
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
    /// Whether it is for a CUDA graph.
    graph: bool,
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
        let Some(info) = self.planned.info.as_ref().filter(|_| self.graph) else {
            return Err(ReplayKey::missing(self.graph));
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

    fn check_queries<'r>(
        &'r self,
        check: &Check<'_>,
        q: &'r TensorRef<'_>,
        out: &'r TensorMut<'_>,
        lse: Option<&'r TensorMut<'_>>,
        options: &'r RunOptions<'_>,
    ) -> Result<BatchRun<'r>> {
        let (spec, lse) = (&self.kernels.spec, lse.map(|lse| &lse.raw));
        let (heads, rows) = (self.heads, self.rows);
        let run = BatchRun { spec, heads, rows, q: &q.raw, out: &out.raw, lse, options };
        run.check_on_tensor_cores(check)?;
        check_described(check, self.kernels.fa3, &[("q", &q.raw)])?;
        self.kernels.check_scale(check, options)?;
        Ok(run)
    }

    /// Enqueues what is to be said of queries that see no key.
    ///
    /// # Safety
    /// The sums must have been checked for this plan, whose keys these are.
    unsafe fn mark_empty(
        &self,
        keys: empty_states::KeyLengths<'_>,
        lse: Option<&TensorMut<'_>>,
        options: &RunOptions<'_>,
    ) -> Result<()> {
        let Some(lse) = lse.filter(|_| self.empty) else { return Ok(()) };
        let rows = empty_states::EmptyRows {
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
    run_over_pages!();

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
    /// As [`DecodePlan::run_with`](super::DecodePlan::run_with).
    pub fn run_with(
        &self,
        q: &TensorRef<'_>,
        kv: &PagedKv<'_>,
        out: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        options: &RunOptions<'_>,
    ) -> Result<()> {
        let stream = self.keys.stream();
        let (check, lse) = (Check::new(RUN_OP, stream)?, lse.as_deref());
        self.check_queries(&check, q, out, lse, options)?.check_pages(&check, kv, self.keys)?;
        let Some(info) = &self.planned.info else { return Ok(()) };
        let _covered = capture::runs(|| self.replay_key())?;
        let qo_indptr = self.queries.indptr()?;
        // SAFETY: all tensors have the dtypes, shapes, strides and alignment
        // of this module and plan; the index arrays are the device copies of
        // those that the plan was made from, checked against a cache of at
        // most this many pages; the workspace is the plan's, on its stream.
        unsafe {
            let (run, pages) =
                (self.tensors(info, &qo_indptr, q, out, lse, options), PageArrays::of(self.keys)?);
            self.kernels.run_paged(&run, stream, kv, &pages)?;
            let (indptr, last_page_len) = (&pages.indptr, &pages.last_page_len);
            let page_size = self.keys.host().page_size();
            self.mark_empty(
                empty_states::KeyLengths::Paged { indptr, last_page_len, page_size },
                lse,
                options,
            )
        }
    }
}

impl PrefillPlan<'_, RaggedTable> {
    /// Attention of each query to its request's keys, with the default options.
    ///
    /// # Errors
    /// As [`run_with`](PrefillPlan::<RaggedTable>::run_with).
    pub fn run(&self, q: &TensorRef<'_>, kv: [&TensorRef<'_>; 2], out: &mut TensorMut<'_>) -> Result<()> {
        self.run_with(q, kv, out, None, &RunOptions::default())
    }

    /// As [`run`](PrefillPlan::<RaggedTable>::run), with an LSE and options.
    ///
    /// `k` is `[keys, num_kv_heads, head_dim_qk]`, `v`
    /// `[keys, num_kv_heads, head_dim_vo]`; the rest is as in
    /// [`run_with`](PrefillPlan::<PageTable>::run_with) over pages.
    ///
    /// # Errors
    /// As [`DecodePlan::run_with`](super::DecodePlan::run_with); with FlashAttention 3 also
    /// when there are several requests and the rows of `v` are not as far apart
    /// as those of `k`.
    pub fn run_with(
        &self,
        q: &TensorRef<'_>,
        [k, v]: [&TensorRef<'_>; 2],
        out: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        options: &RunOptions<'_>,
    ) -> Result<()> {
        let (spec, stream) = (&self.kernels.spec, self.keys.stream());
        let (check, lse) = (Check::new(RUN_OP, stream)?, lse.as_deref());
        let run = self.check_queries(&check, q, out, lse, options)?;
        run.check_rows(&check, [&k.raw, &v.raw], self.keys.host().total())?;
        check_described(&check, self.kernels.fa3, &[("k", &k.raw), ("v", &v.raw)])?;
        let Some(info) = &self.planned.info else { return Ok(()) };
        let _covered = capture::runs(|| self.replay_key())?;
        let qo_indptr = self.queries.indptr()?;
        let run = self.tensors(info, &qo_indptr, q, out, lse, options);
        let [k, v] = if self.keys_extent == 0 {
            // No request has a key, so nothing of what stands in counts. The
            // plan has made room for it.
            [spec.head_dim_qk, spec.head_dim_vo].map(|width| {
                let (heads, row) = (self.heads.num_kv_heads, stand_in_width(spec));
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
                    let pages = PageArrays { indptr, indices: *numbers, last_page_len: *numbers };
                    self.kernels.run_paged(&run, stream, &kv, &pages)?;
                }
                None => self.kernels.run_ragged(&run, [&k, &v], self.keys)?,
            }
            self.mark_empty(empty_states::KeyLengths::Ragged { indptr: &indptr }, lse, options)
        }
    }
}
