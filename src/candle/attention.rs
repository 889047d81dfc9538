//! What decode and prefill over a paged cache have in common.

use std::cell::RefCell;

use candle_core::{DType, Device, Result, Shape, Tensor};

use super::{
    lse::Lse,
    op::{Apply, Op, candle_dtype, check_cache_dtype, check_dtype, check_like, fitting, invalid},
    paged::PagedCache,
    run::PagedRunOptions,
    step::Step,
    tensor,
};
use crate::{
    attention::{self, AttentionSpec, Heads, Workspace},
    kv::{BatchTables, HeadsShape, KvLayout, PagedKv},
    stream::Stream,
    tensor::{TensorMut, TensorRef},
};

/// An attention on a device.
#[derive(Clone, Debug)]
pub(super) struct PagedAttention {
    op: &'static str,
    pub(super) spec: AttentionSpec,
    heads: Heads,
    pub(super) device: Device,
    /// candle's names of the spec's dtypes.
    dtype_q: DType,
    dtype_o: DType,
}

impl PagedAttention {
    pub(super) fn new(op: &'static str, device: &Device, spec: &AttentionSpec, heads: Heads) -> Result<Self> {
        let dtype_q = candle_dtype(op, "dtype_q", spec.dtype_q)?;
        let dtype_o = candle_dtype(op, "dtype_o", spec.dtype_o)?;
        check_dtype(op, "dtype_q", dtype_q, device)?;
        check_cache_dtype(op, "dtype_kv", candle_dtype(op, "dtype_kv", spec.dtype_kv)?, device)?;
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
    pub(super) fn check_step(&self, step: &Step<'_>) -> Result<()> {
        step.check_on(self.op, &self.device)
    }

    /// Attention of the kernel's queries to a layer.
    pub(super) fn run(
        &self,
        step: &Step<'_>,
        kernel: &dyn PagedKernel,
        q: &Tensor,
        (cache, layer): (&PagedCache, usize),
        options: &PagedRunOptions<'_>,
        lse: Option<&Lse>,
    ) -> Result<Tensor> {
        let (op, spec, heads) = (self.op, &self.spec, self.heads);
        step.check_cache(op, cache)?;
        let kv = cache.layer(layer)?;
        let &HeadsShape { num_kv_heads, head_dim, dtype, layout, .. } = cache.heads(op)?;
        if (num_kv_heads, head_dim, dtype) != (heads.num_kv_heads, spec.head_dim_qk, spec.dtype_kv) {
            let problem = format!(
                "it has {num_kv_heads} heads of {head_dim} {dtype}; the plan is for {} of {} {}",
                heads.num_kv_heads, spec.head_dim_qk, spec.dtype_kv
            );
            return invalid(op, "cache", problem);
        }
        let dims = [kernel.rows(), heads.num_qo_heads, head_dim];
        check_like(op, "q", q, &dims, self.dtype_q, &self.device)?;
        let output = (Shape::from(&dims[..]), self.dtype_o);
        options.with_views(op, heads.num_qo_heads, &self.device, |options| {
            if dims[0] == 0 {
                return q.to_dtype(self.dtype_o);
            }
            Lse::with_view(lse, [dims[0], dims[1]], &self.device, |lse| {
                let call = PagedCall { kernel, layout, options, lse: RefCell::new(lse), output };
                kv.apply_op2_no_bwd(&fitting(q)?, &Apply(call))
            })
        })
    }

    /// As [`run`](Self::run), with an LSE.
    pub(super) fn run_with_lse(
        &self,
        step: &Step<'_>,
        kernel: &dyn PagedKernel,
        q: &Tensor,
        (cache, layer): (&PagedCache, usize),
        options: &PagedRunOptions<'_>,
    ) -> Result<(Tensor, Tensor)> {
        let kept = Lse::default();
        let out = self.run(step, kernel, q, (cache, layer), options, Some(&kept))?;
        Ok((out, kept.of(&q.detach(), [kernel.rows(), self.heads.num_qo_heads], None)?))
    }
}

/// Attention of queries to a layer's pages.
pub(super) trait PagedKernel {
    /// Queries of the step.
    fn rows(&self) -> usize;

    fn on_cpu(&self, operands: PagedOperands<'_, '_, '_>) -> crate::Result<()>;

    fn on_cuda(&self, operands: PagedOperands<'_, '_, '_>) -> crate::Result<()>;
}

/// What attention reads and writes.
pub(super) struct PagedOperands<'a, 'o, 'l> {
    pub(super) q: &'a TensorRef<'a>,
    pub(super) kv: &'a PagedKv<'a>,
    pub(super) out: &'a mut TensorMut<'o>,
    pub(super) lse: Option<&'a mut TensorMut<'l>>,
    pub(super) options: &'a attention::RunOptions<'a>,
}

struct PagedCall<'a, 'v> {
    kernel: &'a dyn PagedKernel,
    layout: KvLayout,
    options: &'a attention::RunOptions<'a>,
    lse: RefCell<Option<&'a mut TensorMut<'v>>>,
    output: (Shape, DType),
}

impl PagedCall<'_, '_> {
    fn with_operands(
        &self,
        out: &mut TensorMut<'_>,
        [kv, q]: [TensorRef<'_>; 2],
        run: impl FnOnce(PagedOperands<'_, '_, '_>) -> crate::Result<()>,
    ) -> crate::Result<()> {
        let (kv, lse) = (PagedKv::joined(kv, self.layout)?, self.lse.take());
        run(PagedOperands { q: &q, kv: &kv, out, lse, options: self.options })
    }
}

impl Op<2> for PagedCall<'_, '_> {
    const NAME: &'static str = "paged attention";

    fn output(&self) -> (Shape, DType) {
        self.output.clone()
    }

    fn on_cpu(&self, out: &mut TensorMut<'_>, inputs: [TensorRef<'_>; 2]) -> crate::Result<()> {
        self.with_operands(out, inputs, |operands| self.kernel.on_cpu(operands))
    }

    fn on_cuda(&self, _: &Stream, out: &mut TensorMut<'_>, inputs: [TensorRef<'_>; 2]) -> crate::Result<()> {
        // The plan knows its stream, and refuses views for another.
        self.with_operands(out, inputs, |operands| self.kernel.on_cuda(operands))
    }
}

/// Kernels, and what plans need, on CUDA.
#[derive(Debug)]
pub(super) struct OnCuda<K> {
    pub(super) kernels: K,
    pub(super) workspace: Workspace,
}

impl<K> OnCuda<K> {
    /// `None` on the CPU.
    pub(super) fn new(
        device: &Device,
        kernels: impl FnOnce(&Stream) -> crate::Result<K>,
    ) -> Result<Option<Self>> {
        let Some(stream) = tensor::stream(device) else { return Ok(None) };
        let kernels = kernels(&stream).map_err(tensor::error)?;
        Ok(Some(Self { kernels, workspace: Workspace::new(&stream).map_err(tensor::error)? }))
    }

    /// The plan of a step, where there are kernels.
    pub(super) fn plan<'p, P>(
        on_cuda: &'p mut Option<Self>,
        step: &'p Step<'_>,
        plan: impl FnOnce(&K, &'p mut Workspace, &'p BatchTables) -> crate::Result<P>,
    ) -> Result<Option<P>> {
        let Some(Self { kernels, workspace }) = on_cuda else { return Ok(None) };
        step.on_cuda().and_then(|tables| plan(kernels, workspace, tables)).map(Some).map_err(tensor::error)
    }
}

/// A plan for CUDA.
pub(super) fn planned<P>(plan: &Option<P>) -> crate::Result<&P> {
    let missing = || crate::FlashInferError::invalid("plan", "device", "it is not on CUDA");
    plan.as_ref().ok_or_else(missing)
}

/// `run` and `run_with_lse` of a plan, beside its `run_with`.
macro_rules! runs_of_layer {
    () => {
        /// Runs as `run_with`, with the default options.
        ///
        /// # Errors
        /// Those of `run_with`.
        pub fn run(&self, q: &Tensor, cache: &PagedCache, layer: usize) -> Result<Tensor> {
            self.run_with(q, cache, layer, &PagedRunOptions::default())
        }

        /// Runs as `run_with`; beside the result, the LSE: `f32` `(rows, num_qo_heads)`, for each
        /// query and head the base-2 logarithm of the sum of `exp` of its scores. With it, results
        /// over parts of the keys can be merged, of which one has the sinks. A query without keys has
        /// −∞, or its sink times log2 e.
        ///
        /// # Errors
        /// Those of `run_with`.
        pub fn run_with_lse(
            &self,
            q: &Tensor,
            cache: &PagedCache,
            layer: usize,
            options: &PagedRunOptions<'_>,
        ) -> Result<(Tensor, Tensor)> {
            self.attention.run_with_lse(self.step, self, q, (cache, layer), options)
        }
    };
}
pub(super) use runs_of_layer;
