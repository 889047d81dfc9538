//! Latent attention over a paged cache, with plan and run apart.

use std::cell::RefCell;

use candle_core::{DType, Device, Result, Shape, Tensor};

use super::{
    attention::{OnCuda, planned},
    lse::Lse,
    op::{Apply, Op, candle_dtype, check_dtype, check_like, fitting, invalid},
    paged::PagedCache,
    run::finite,
    step::Step,
};
use crate::{
    attention::{self, MlaQuery, MlaSpec, PlanOptions},
    kv::{MLA_DIMS, MlaCache},
    reference,
    stream::Stream,
    tensor::{TensorMut, TensorRef},
};

const OP: &str = "PagedMla";

/// Multi-head latent attention in its absorbed form, as DeepSeek's models have it: of the
/// new tokens of each request to the request's rows, over a [`PagedCache`] of
/// [`KvShape::Latent`](crate::kv::KvShape::Latent).
///
/// On CUDA it is [`attention::BatchMla`](crate::attention::BatchMla), for `f16` and `bf16`; on
/// the CPU [`reference::batch_mla`](crate::reference::batch_mla). It serves decode and prefill
/// alike, and has no plans for CUDA graphs. The rest is as for [`PagedDecode`](super::PagedDecode).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use flashinfer_rs::{
///     DType, attention::MlaSpec, candle::{PagedCache, PagedMla, StepTables},
///     kv::{Batch, LatentShape, PageAllocator, Sequence},
/// };
///
/// let (device, dtype) = (Device::Cpu, DType::F32);
/// let pool = PageAllocator::new(8, 16)?;
/// let mut cache = PagedCache::new(&device, &pool, LatentShape { num_layers: 1, dtype })?;
/// let mut mla = PagedMla::new(&device, &MlaSpec::new(dtype, 1.0 / 192f64.sqrt()), 4)?;
/// let (mut tables, mut batch) = (StepTables::new(&device), Batch::new(&pool));
/// batch.push(Sequence::new(&pool))?;
/// batch.append([20])?;
/// let step = tables.update(&batch, &mut cache)?;
/// let plan = mla.plan(&step, true)?;
/// // Of each layer: queries that went through the absorbed matrix, and rows without heads.
/// let q = Tensor::randn(0f32, 1.0, (20, 4, 576), &device)?;
/// let rows = Tensor::randn(0f32, 1.0, (20, 576), &device)?;
/// cache.append_latent(&step, 0, &rows.narrow(1, 0, 512)?, &rows.narrow(1, 512, 64)?)?;
/// let out = plan.run(&q.narrow(2, 0, 512)?, &q.narrow(2, 512, 64)?, &cache, 0)?;
/// assert_eq!(out.dims(), [20, 4, 512]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct PagedMla {
    spec: MlaSpec,
    num_heads: usize,
    device: Device,
    /// candle's name of the spec's dtype.
    dtype: DType,
    on_cuda: Option<OnCuda<attention::BatchMla>>,
}

impl PagedMla {
    /// Latent attention of a model's layers, with so many query heads.
    ///
    /// Resolves the kernel module on CUDA, and downloads the pinned wheel if no
    /// local source holds it and that is allowed.
    ///
    /// # Errors
    /// The device has no such elements; the spec's widths are not 512 and 64; there are no
    /// heads; `sm_scale` is out of its range; there is no such module, or it cannot be had.
    pub fn new(device: &Device, spec: &MlaSpec, num_heads: usize) -> Result<Self> {
        let dtype = candle_dtype(OP, "dtype", spec.dtype)?;
        check_dtype(OP, "dtype", dtype, device)?;
        let [ckv, kpe] = MLA_DIMS.map(|dim| dim as usize);
        if [spec.head_dim_ckv, spec.head_dim_kpe] != [ckv, kpe] {
            let problem = format!(
                "head dimensions {} and {}; a cache has rows of {ckv} and {kpe}",
                spec.head_dim_ckv, spec.head_dim_kpe
            );
            return invalid(OP, "spec", problem);
        }
        if num_heads == 0 {
            return invalid(OP, "num_heads", "0; there must be a head".into());
        }
        finite(OP, "sm_scale", spec.sm_scale)?;
        let on_cuda = OnCuda::new(device, |stream| attention::BatchMla::new(stream, spec, num_heads))?;
        Ok(Self { spec: *spec, num_heads, device: device.clone(), dtype, on_cuda })
    }

    /// Plans a step, for all layers, on the host, as
    /// [`PagedPrefill::plan`](super::PagedPrefill::plan).
    ///
    /// # Errors
    /// As [`PagedDecode::plan`](super::PagedDecode::plan), and what
    /// [`BatchMla::plan`](crate::attention::BatchMla::plan) refuses.
    pub fn plan<'p>(&'p mut self, step: &'p Step<'_>, causal: bool) -> Result<PagedMlaPlan<'p>> {
        step.check_on(OP, &self.device)?;
        let Self { spec, num_heads, device, dtype, on_cuda } = self;
        let options = if causal { PlanOptions::causal() } else { PlanOptions::default() };
        let on_cuda = OnCuda::plan(on_cuda, step, |kernels, workspace, tables| {
            kernels.plan(workspace, tables, &options)
        })?;
        Ok(PagedMlaPlan { spec, num_heads: *num_heads, device, dtype: *dtype, step, causal, on_cuda })
    }
}

/// One step's plan of a [`PagedMla`], to be run for each layer.
#[derive(Debug)]
pub struct PagedMlaPlan<'p> {
    spec: &'p MlaSpec,
    num_heads: usize,
    device: &'p Device,
    dtype: DType,
    step: &'p Step<'p>,
    causal: bool,
    on_cuda: Option<attention::MlaPlan<'p>>,
}

impl PagedMlaPlan<'_> {
    /// Attention of each new token to its request's rows.
    ///
    /// `q_nope` is `(tokens, num_heads, 512)` and `q_pe` `(tokens, num_heads, 64)`, of the
    /// spec's dtype; they may be the parts of one tensor. The result is `(tokens, num_heads,
    /// 512)`. On CUDA, strides that are multiples of 16 bytes are read as they are, others
    /// copied. Nothing waits. There is no gradient. Of
    /// scores below −50000, on CUDA, see
    /// [`attention`](mod@crate::attention#very-negative-scores).
    ///
    /// # Errors
    /// Cache, layer or queries do not fit the plan, by pool, kind, device, dtype or shape; the
    /// plan's stream is another thread's, or is being captured. Nothing was launched. Else what
    /// the module or CUDA said.
    pub fn run(&self, q_nope: &Tensor, q_pe: &Tensor, cache: &PagedCache, layer: usize) -> Result<Tensor> {
        self.run_keeping(q_nope, q_pe, (cache, layer), None)
    }

    /// As [`run`](Self::run); beside the result, the LSE: `f32` `(tokens, num_heads)`, base-2
    /// logarithms. A query without keys has −∞.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_with_lse(
        &self,
        q_nope: &Tensor,
        q_pe: &Tensor,
        cache: &PagedCache,
        layer: usize,
    ) -> Result<(Tensor, Tensor)> {
        let kept = Lse::default();
        let out = self.run_keeping(q_nope, q_pe, (cache, layer), Some(&kept))?;
        Ok((out, kept.of(&q_nope.detach(), [self.rows(), self.num_heads], None)?))
    }

    fn rows(&self) -> usize {
        self.step.batch.queries().total()
    }

    fn run_keeping(
        &self,
        q_nope: &Tensor,
        q_pe: &Tensor,
        (cache, layer): (&PagedCache, usize),
        lse: Option<&Lse>,
    ) -> Result<Tensor> {
        self.step.check_cache(OP, cache)?;
        cache.check_latent(OP)?;
        let rows = cache.layer(layer)?;
        if cache.shape().dtype() != self.spec.dtype {
            let problem = format!("it has {}; the plan is for {}", cache.shape().dtype(), self.spec.dtype);
            return invalid(OP, "cache", problem);
        }
        let [ckv, kpe] = MLA_DIMS.map(|dim| [self.rows(), self.num_heads, dim as usize]);
        check_like(OP, "q_nope", q_nope, &ckv, self.dtype, self.device)?;
        check_like(OP, "q_pe", q_pe, &kpe, self.dtype, self.device)?;
        if ckv[0] == 0 {
            return Ok(q_nope.clone());
        }
        Lse::with_view(lse, [ckv[0], ckv[1]], self.device, |lse| {
            let call =
                MlaCall { plan: self, lse: RefCell::new(lse), output: (Shape::from(&ckv[..]), self.dtype) };
            rows.apply_op3_no_bwd(&fitting(q_nope)?, &fitting(q_pe)?, &Apply(call))
        })
    }
}

struct MlaCall<'a, 'p, 'v> {
    plan: &'a PagedMlaPlan<'p>,
    lse: RefCell<Option<&'a mut TensorMut<'v>>>,
    output: (Shape, DType),
}

impl Op<3> for MlaCall<'_, '_, '_> {
    const NAME: &'static str = "latent attention";

    fn output(&self) -> (Shape, DType) {
        self.output.clone()
    }

    fn on_cpu(&self, out: &mut TensorMut<'_>, [rows, nope, pe]: [TensorRef<'_>; 3]) -> crate::Result<()> {
        let (batch, lse) = (self.plan.step.batch, self.lse.take());
        let mask = if self.plan.causal { reference::HostMask::Causal } else { reference::HostMask::None };
        let (q, cache) = (MlaQuery::new(nope, pe), MlaCache::joined(rows)?);
        reference::batch_mla(self.plan.spec, &q, &cache, batch.queries(), batch.pages(), out, lse, mask)
    }

    fn on_cuda(
        &self,
        _: &Stream,
        out: &mut TensorMut<'_>,
        [rows, nope, pe]: [TensorRef<'_>; 3],
    ) -> crate::Result<()> {
        // The plan knows its stream, and refuses views for another.
        let (q, cache) = (MlaQuery::new(nope, pe), MlaCache::joined(rows)?);
        planned(&self.plan.on_cuda)?.run_with(&q, &cache, out, self.lse.take())
    }
}
