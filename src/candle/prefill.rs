//! Prefill over a paged cache, with plan and run apart.

use candle_core::{Device, Result, Tensor};

use super::{
    attention::{OnCuda, PagedAttention, PagedKernel, PagedOperands, planned, runs_of_layer},
    paged::PagedCache,
    run::PagedRunOptions,
    step::Step,
};
use crate::{
    attention::{self, AttentionSpec, Heads, PlanOptions},
    indices::PageTable,
    reference,
    stream::Stream,
};

/// Attention of the new tokens of each request to the request's pages, over a
/// [`PagedCache`]: prompts, parts of prompts, and single tokens, of different
/// lengths in one call.
///
/// On CUDA it is [`attention::BatchPrefill`](crate::attention::BatchPrefill); the
/// rest is as for [`PagedDecode`](super::PagedDecode).
#[derive(Debug)]
pub struct PagedPrefill {
    attention: PagedAttention,
    on_cuda: Option<OnCuda<attention::BatchPrefill>>,
}

impl PagedPrefill {
    /// Prefill of a model's layers of one kind. See
    /// [`PagedDecode::new`](super::PagedDecode::new).
    ///
    /// # Errors
    /// As [`PagedDecode::new`](super::PagedDecode::new).
    pub fn new(device: &Device, spec: &AttentionSpec, heads: Heads) -> Result<Self> {
        let attention = PagedAttention::new("PagedPrefill", device, spec, heads)?;
        let kernels = |stream: &Stream| attention::BatchPrefill::new(stream, spec, heads);
        let on_cuda = OnCuda::new(device, kernels)?;
        Ok(Self { attention, on_cuda })
    }

    /// Plans a step, for all layers, on the host: attention of the tokens that
    /// [`Batch::queries`](crate::kv::Batch::queries) counts, the last ones of each
    /// request. With `causal`, each sees the tokens up to its own, else all tokens
    /// of its request.
    ///
    /// # Errors
    /// As [`PagedDecode::plan`](super::PagedDecode::plan).
    pub fn plan<'p>(&'p mut self, step: &'p Step<'_>, causal: bool) -> Result<PagedPrefillPlan<'p>> {
        self.attention.check_step(step)?;
        let options = if causal { PlanOptions::causal() } else { PlanOptions::default() };
        let on_cuda = OnCuda::plan(&mut self.on_cuda, step, |kernels, workspace, tables| {
            kernels.plan_paged(workspace, tables, &options)
        })?;
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
    runs_of_layer!();

    /// Attention of each new token to its request's pages.
    ///
    /// `q` is `(tokens, num_qo_heads, head_dim)`, the requests' tokens one after
    /// the other, as the rows of [`PagedCache::append`]; the rest is as in
    /// [`PagedDecodePlan::run_with`](super::PagedDecodePlan::run_with).
    ///
    /// # Errors
    /// As [`PagedDecodePlan::run_with`](super::PagedDecodePlan::run_with).
    pub fn run_with(
        &self,
        q: &Tensor,
        cache: &PagedCache,
        layer: usize,
        options: &PagedRunOptions<'_>,
    ) -> Result<Tensor> {
        self.attention.run(self.step, self, q, (cache, layer), options, None)
    }
}

impl PagedKernel for PagedPrefillPlan<'_> {
    fn rows(&self) -> usize {
        self.step.batch.queries().total()
    }

    fn on_cpu(
        &self,
        PagedOperands { q, kv, out, lse, options }: PagedOperands<'_, '_, '_>,
    ) -> crate::Result<()> {
        let (batch, spec) = (self.step.batch, &self.attention.spec);
        let mask = if self.causal { reference::HostMask::Causal } else { reference::HostMask::None };
        let (queries, pages) = (batch.queries(), batch.pages());
        reference::batch_prefill_paged(spec, q, kv, queries, pages, out, lse, mask, options)
    }

    fn on_cuda(
        &self,
        PagedOperands { q, kv, out, lse, options }: PagedOperands<'_, '_, '_>,
    ) -> crate::Result<()> {
        planned(&self.on_cuda)?.run_with(q, kv, out, lse, options)
    }
}
