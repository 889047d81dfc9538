//! Decode over a paged cache, with plan and run apart.

use candle_core::{Device, Result, Tensor};

use super::{
    attention::{OnCuda, PagedAttention, PagedKernel, PagedOperands, planned, runs_of_layer},
    paged::PagedCache,
    run::PagedRunOptions,
    step::Step,
};
use crate::{
    attention::{self, AttentionSpec, Heads, PlanOptions, ReplayKey},
    graph::sealed::Keyed,
    reference,
    stream::Stream,
};

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
    /// window, soft cap and sinks are the spec's.
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
        let on_cuda = OnCuda::new(device, kernels)?;
        Ok(Self { attention, on_cuda })
    }

    /// Plans a step, for all layers, on the host. The plan borrows this value,
    /// whose workspace it fills, and the step.
    ///
    /// # Errors
    /// The step is on another device; the stream is being captured, or is another
    /// thread's; or what the module or CUDA said.
    pub fn plan<'p>(&'p mut self, step: &'p Step<'_>) -> Result<PagedDecodePlan<'p>> {
        self.plan_as(step, &PlanOptions::default())
    }

    /// As [`plan`](Self::plan), for a step that is captured by
    /// [`capture_step`](super::capture_step), and for each launch of it.
    ///
    /// # Errors
    /// As [`plan`](Self::plan).
    pub fn plan_for_graph<'p>(&'p mut self, step: &'p Step<'_>) -> Result<PagedDecodePlan<'p>> {
        self.plan_as(step, &PlanOptions::default().with_graph(step.batch.len()))
    }

    fn plan_as<'p>(
        &'p mut self,
        step: &'p Step<'_>,
        options: &PlanOptions<'_>,
    ) -> Result<PagedDecodePlan<'p>> {
        self.attention.check_step(step)?;
        let on_cuda = OnCuda::plan(&mut self.on_cuda, step, |kernels, workspace, tables| {
            kernels.plan(workspace, tables, options)
        })?;
        Ok(PagedDecodePlan { attention: &self.attention, step, on_cuda })
    }
}

/// One step's plan of a [`PagedDecode`], to be run for each layer.
#[derive(Debug)]
pub struct PagedDecodePlan<'p> {
    attention: &'p PagedAttention,
    step: &'p Step<'p>,
    on_cuda: Option<attention::DecodePlan<'p>>,
}

impl PagedDecodePlan<'_> {
    runs_of_layer!();

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
        options: &PagedRunOptions<'_>,
    ) -> Result<Tensor> {
        self.attention.run(self.step, self, q, (cache, layer), options, None)
    }
}

impl Keyed for PagedDecodePlan<'_> {
    fn keys(&self, put: &mut dyn FnMut(ReplayKey)) {
        self.on_cuda.iter().for_each(|plan| plan.keys(put));
    }
}

impl PagedKernel for PagedDecodePlan<'_> {
    fn rows(&self) -> usize {
        self.step.batch.len()
    }

    fn on_cpu(
        &self,
        PagedOperands { q, kv, out, lse, options }: PagedOperands<'_, '_, '_>,
    ) -> crate::Result<()> {
        let pages = self.step.batch.pages();
        reference::batch_decode(&self.attention.spec, q, kv, pages, out, lse, options)
    }

    fn on_cuda(
        &self,
        PagedOperands { q, kv, out, lse, options }: PagedOperands<'_, '_, '_>,
    ) -> crate::Result<()> {
        planned(&self.on_cuda)?.run_with(q, kv, out, lse, options)
    }
}
