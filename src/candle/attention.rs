//! Decode and prefill over a paged cache, with plan and run apart.

use candle_core::{DType, Device, Result, Shape, Tensor};

use super::{
    op::{Apply, Op, check_cache_dtype, check_dtype, check_like, fitting, invalid},
    paged::{PagedCache, Step},
    tensor,
};
use crate::{
    attention::{self, AttentionSpec, Heads, PlanOptions, RunOptions, Workspace},
    indices::PageTable,
    kv::{KvLayout, PagedKv},
    reference,
    stream::Stream,
    tensor::{TensorMut, TensorRef},
};

/// What the two operations have in common: an attention on a device.
#[derive(Clone, Debug)]
struct PagedAttention {
    op: &'static str,
    spec: AttentionSpec,
    heads: Heads,
    device: Device,
    /// candle's names of the spec's dtypes.
    dtype_q: DType,
    dtype_o: DType,
}

impl PagedAttention {
    fn new(op: &'static str, device: &Device, spec: &AttentionSpec, heads: Heads) -> Result<Self> {
        let candle_dtype = |name: &'static str, dtype: crate::DType| match tensor::of_ours(dtype) {
            Some(dtype) => Ok(dtype),
            None => invalid(op, name, format!("{dtype}; candle has no such elements")),
        };
        let (dtype_q, dtype_o) =
            (candle_dtype("dtype_q", spec.dtype_q)?, candle_dtype("dtype_o", spec.dtype_o)?);
        check_dtype(op, "dtype_q", dtype_q, device)?;
        check_cache_dtype(op, "dtype_kv", candle_dtype("dtype_kv", spec.dtype_kv)?, device)?;
        check_dtype(op, "dtype_o", dtype_o, device)?;
        if spec.head_dim_qk != spec.head_dim_vo {
            let problem = format!(
                "head dimensions {} and {}; a cache of one tensor has keys and values of one width",
                spec.head_dim_qk, spec.head_dim_vo
            );
            return invalid(op, "spec", problem);
        }
        if heads.group_size().is_none() {
            let Heads { num_qo_heads, num_kv_heads } = heads;
            return invalid(
                op,
                "heads",
                format!("{num_qo_heads} query heads over {num_kv_heads} KV heads; expected a multiple"),
            );
        }
        Ok(Self { op, spec: *spec, heads, device: device.clone(), dtype_q, dtype_o })
    }

    /// The step is on this device.
    fn check_step(&self, step: &Step<'_>) -> Result<()> {
        if self.device.same_device(step.device) {
            return Ok(());
        }
        let (at, expected) = (step.device, &self.device);
        invalid(self.op, "step", format!("it is on {at:?}; expected {expected:?}: make both from one Device"))
    }

    /// Attention of the kernel's queries to a layer.
    fn run(
        &self,
        step: &Step<'_>,
        kernel: &dyn PagedKernel,
        q: &Tensor,
        cache: &PagedCache,
        layer: usize,
        options: &RunOptions<'_>,
    ) -> Result<Tensor> {
        let (op, spec, heads) = (self.op, &self.spec, self.heads);
        step.check_cache(op, cache)?;
        let kv = cache.layer(layer)?;
        let shape = cache.shape();
        if (shape.num_kv_heads, shape.head_dim, shape.dtype)
            != (heads.num_kv_heads, spec.head_dim_qk, spec.dtype_kv)
        {
            let problem = format!(
                "it has {} heads of {} {}; the plan is for {} of {} {}",
                shape.num_kv_heads,
                shape.head_dim,
                shape.dtype,
                heads.num_kv_heads,
                spec.head_dim_qk,
                spec.dtype_kv
            );
            return invalid(op, "cache", problem);
        }
        let rows = kernel.rows();
        let dims = [rows, heads.num_qo_heads, spec.head_dim_qk];
        check_like(op, "q", q, &dims, self.dtype_q, &self.device)?;
        if rows == 0 {
            return q.to_dtype(self.dtype_o);
        }
        let output = (Shape::from(&dims[..]), self.dtype_o);
        let call = PagedCall { kernel, layout: shape.layout, options, output };
        kv.apply_op2_no_bwd(&fitting(q)?, &Apply(call))
    }
}

/// Attention of queries to a layer's pages.
trait PagedKernel {
    /// Queries of the step.
    fn rows(&self) -> usize;

    fn on_cpu(
        &self,
        q: &TensorRef<'_>,
        kv: &PagedKv<'_>,
        out: &mut TensorMut<'_>,
        options: &RunOptions<'_>,
    ) -> crate::Result<()>;

    fn on_cuda(
        &self,
        q: &TensorRef<'_>,
        kv: &PagedKv<'_>,
        out: &mut TensorMut<'_>,
        options: &RunOptions<'_>,
    ) -> crate::Result<()>;
}

struct PagedCall<'a> {
    kernel: &'a dyn PagedKernel,
    layout: KvLayout,
    options: &'a RunOptions<'a>,
    output: (Shape, DType),
}

impl Op<2> for PagedCall<'_> {
    const NAME: &'static str = "paged attention";

    fn output(&self) -> (Shape, DType) {
        self.output.clone()
    }

    fn on_cpu(&self, out: &mut TensorMut<'_>, [kv, q]: [TensorRef<'_>; 2]) -> crate::Result<()> {
        self.kernel.on_cpu(&q, &PagedKv::joined(kv, self.layout)?, out, self.options)
    }

    fn on_cuda(&self, _: &Stream, out: &mut TensorMut<'_>, [kv, q]: [TensorRef<'_>; 2]) -> crate::Result<()> {
        // The plan knows its stream, and refuses views for another.
        self.kernel.on_cuda(&q, &PagedKv::joined(kv, self.layout)?, out, self.options)
    }
}

/// Kernels, and what plans need, on CUDA.
#[derive(Debug)]
struct OnCuda<K> {
    kernels: K,
    workspace: Workspace,
}

impl<K> OnCuda<K> {
    /// `None` on the CPU.
    fn new(
        attention: &PagedAttention,
        kernels: impl FnOnce(&Stream) -> crate::Result<K>,
    ) -> Result<Option<Self>> {
        let Some(stream) = tensor::stream(&attention.device) else { return Ok(None) };
        let kernels = kernels(&stream).map_err(tensor::error)?;
        Ok(Some(Self { kernels, workspace: Workspace::new(&stream).map_err(tensor::error)? }))
    }
}

/// Attention of one query per request to the request's pages, over a
/// [`PagedCache`].
///
/// On CUDA it is [`attention::BatchDecode`](crate::attention::BatchDecode) with a
/// [`Workspace`](crate::attention::Workspace) of its own (128 MiB, which grow where
/// a step takes more), on the stream of the device; with candle's default stream it is then its thread's. On the CPU it
/// is [`reference::batch_decode`](crate::reference::batch_decode), in `f64`.
#[derive(Debug)]
pub struct PagedDecode {
    attention: PagedAttention,
    on_cuda: Option<OnCuda<attention::BatchDecode>>,
}

impl PagedDecode {
    /// Decode of a model's layers of one kind: element types, head dimension,
    /// window and soft cap are the spec's.
    ///
    /// Resolves the kernel module on CUDA, and downloads the pinned wheel if no
    /// local source holds it and that is allowed.
    ///
    /// # Errors
    /// The device has no such elements (on CUDA there are `f16` and `bf16`, on the
    /// CPU also `f32` and `f64`); heads of queries are no multiple of those of keys;
    /// there is no such module, or it cannot be had.
    pub fn new(device: &Device, spec: &AttentionSpec, heads: Heads) -> Result<Self> {
        let attention = PagedAttention::new("PagedDecode", device, spec, heads)?;
        let kernels = |stream: &Stream| attention::BatchDecode::new(stream, spec, heads);
        let on_cuda = OnCuda::new(&attention, kernels)?;
        Ok(Self { attention, on_cuda })
    }

    /// Plans a step, for all layers, on the host. The plan borrows this value,
    /// whose workspace it fills, and the step.
    ///
    /// # Errors
    /// The step is on another device; the stream is being captured, or is another
    /// thread's; or what the module or CUDA said.
    pub fn plan<'p>(&'p mut self, step: &'p Step<'_>) -> Result<PagedDecodePlan<'p>> {
        self.attention.check_step(step)?;
        let on_cuda = match &mut self.on_cuda {
            Some(OnCuda { kernels, workspace }) => {
                let tables = step.on_cuda();
                let options = PlanOptions::default();
                let plan = tables.and_then(|tables| kernels.plan(workspace, tables, &options));
                Some(plan.map_err(tensor::error)?)
            }
            None => None,
        };
        Ok(PagedDecodePlan { attention: &self.attention, step, on_cuda })
    }
}

/// `run` of a plan, beside its `run_with`.
macro_rules! run_of_layer {
    () => {
        /// Runs as `run_with`, with the default options.
        ///
        /// # Errors
        /// Those of `run_with`.
        pub fn run(&self, q: &Tensor, cache: &PagedCache, layer: usize) -> Result<Tensor> {
            self.run_with(q, cache, layer, &RunOptions::default())
        }
    };
}

/// One step's plan of a [`PagedDecode`], to be run for each layer.
#[derive(Debug)]
pub struct PagedDecodePlan<'p> {
    attention: &'p PagedAttention,
    step: &'p Step<'p>,
    on_cuda: Option<attention::DecodePlan<'p>>,
}

impl PagedDecodePlan<'_> {
    run_of_layer!();

    /// Attention of each request's query to all of its tokens.
    ///
    /// `q` is `(batch, num_qo_heads, head_dim)` of the spec's dtype; the result
    /// has its shape. On CUDA, strides of `q` that are multiples of 16 bytes are
    /// read as they are, others copied. A request without tokens gets zeros.
    /// Nothing waits. There is no gradient. Of scores below −50000, on CUDA, see
    /// [`attention`](mod@crate::attention#very-negative-scores).
    ///
    /// # Errors
    /// Cache, layer or `q` do not fit the plan, by pool, device, dtype or shape;
    /// an option is out of its range; the plan's stream is another thread's.
    /// Nothing was launched. Else what the module or CUDA said.
    pub fn run_with(
        &self,
        q: &Tensor,
        cache: &PagedCache,
        layer: usize,
        options: &RunOptions<'_>,
    ) -> Result<Tensor> {
        self.attention.run(self.step, self, q, cache, layer, options)
    }
}

impl PagedKernel for PagedDecodePlan<'_> {
    fn rows(&self) -> usize {
        self.step.batch.len()
    }

    fn on_cpu(
        &self,
        q: &TensorRef<'_>,
        kv: &PagedKv<'_>,
        out: &mut TensorMut<'_>,
        options: &RunOptions<'_>,
    ) -> crate::Result<()> {
        let pages = self.step.batch.pages();
        reference::batch_decode(&self.attention.spec, q, kv, pages, out, None, options)
    }

    fn on_cuda(
        &self,
        q: &TensorRef<'_>,
        kv: &PagedKv<'_>,
        out: &mut TensorMut<'_>,
        options: &RunOptions<'_>,
    ) -> crate::Result<()> {
        planned(&self.on_cuda)?.run_with(q, kv, out, None, options)
    }
}

/// Attention of the new tokens of each request to the request's pages, over a
/// [`PagedCache`]: prompts, parts of prompts, and single tokens, of different
/// lengths in one call.
///
/// On CUDA it is [`attention::BatchPrefill`](crate::attention::BatchPrefill); the
/// rest is as for [`PagedDecode`].
#[derive(Debug)]
pub struct PagedPrefill {
    attention: PagedAttention,
    on_cuda: Option<OnCuda<attention::BatchPrefill>>,
}

impl PagedPrefill {
    /// Prefill of a model's layers of one kind. See [`PagedDecode::new`].
    ///
    /// # Errors
    /// As [`PagedDecode::new`].
    pub fn new(device: &Device, spec: &AttentionSpec, heads: Heads) -> Result<Self> {
        let attention = PagedAttention::new("PagedPrefill", device, spec, heads)?;
        let kernels = |stream: &Stream| attention::BatchPrefill::new(stream, spec, heads);
        let on_cuda = OnCuda::new(&attention, kernels)?;
        Ok(Self { attention, on_cuda })
    }

    /// Plans a step, for all layers, on the host: attention of the tokens that
    /// [`Batch::queries`](crate::kv::Batch::queries) counts, the last ones of each
    /// request. With `causal`, each sees the tokens up to its own, else all tokens
    /// of its request.
    ///
    /// # Errors
    /// As [`PagedDecode::plan`].
    pub fn plan<'p>(&'p mut self, step: &'p Step<'_>, causal: bool) -> Result<PagedPrefillPlan<'p>> {
        self.attention.check_step(step)?;
        let on_cuda = match &mut self.on_cuda {
            Some(OnCuda { kernels, workspace }) => {
                let options = if causal { PlanOptions::causal() } else { PlanOptions::default() };
                let plan = step.on_cuda().and_then(|tables| kernels.plan_paged(workspace, tables, &options));
                Some(plan.map_err(tensor::error)?)
            }
            None => None,
        };
        Ok(PagedPrefillPlan { attention: &self.attention, step, causal, on_cuda })
    }
}

/// One step's plan of a [`PagedPrefill`], to be run for each layer.
#[derive(Debug)]
pub struct PagedPrefillPlan<'p> {
    attention: &'p PagedAttention,
    step: &'p Step<'p>,
    causal: bool,
    on_cuda: Option<attention::PrefillPlan<'p, PageTable>>,
}

impl PagedPrefillPlan<'_> {
    run_of_layer!();

    /// Attention of each new token to its request's pages.
    ///
    /// `q` is `(tokens, num_qo_heads, head_dim)`, the requests' tokens one after
    /// the other, as the rows of [`PagedCache::append`]; the rest is as in
    /// [`PagedDecodePlan::run_with`].
    ///
    /// # Errors
    /// As [`PagedDecodePlan::run_with`].
    pub fn run_with(
        &self,
        q: &Tensor,
        cache: &PagedCache,
        layer: usize,
        options: &RunOptions<'_>,
    ) -> Result<Tensor> {
        self.attention.run(self.step, self, q, cache, layer, options)
    }
}

impl PagedKernel for PagedPrefillPlan<'_> {
    fn rows(&self) -> usize {
        self.step.batch.queries().total()
    }

    fn on_cpu(
        &self,
        q: &TensorRef<'_>,
        kv: &PagedKv<'_>,
        out: &mut TensorMut<'_>,
        options: &RunOptions<'_>,
    ) -> crate::Result<()> {
        let (batch, spec) = (self.step.batch, &self.attention.spec);
        let mask = if self.causal { reference::HostMask::Causal } else { reference::HostMask::None };
        let (queries, pages) = (batch.queries(), batch.pages());
        reference::batch_prefill_paged(spec, q, kv, queries, pages, out, None, mask, options)
    }

    fn on_cuda(
        &self,
        q: &TensorRef<'_>,
        kv: &PagedKv<'_>,
        out: &mut TensorMut<'_>,
        options: &RunOptions<'_>,
    ) -> crate::Result<()> {
        planned(&self.on_cuda)?.run_with(q, kv, out, None, options)
    }
}

/// A plan for CUDA.
fn planned<P>(plan: &Option<P>) -> crate::Result<&P> {
    let missing = || crate::FlashInferError::invalid("plan", "device", "it is not on CUDA");
    plan.as_ref().ok_or_else(missing)
}
