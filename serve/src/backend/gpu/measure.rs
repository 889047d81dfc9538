//! How long the last step's graph takes, and attention in it; and how long the GPU idles between
//! graphs.

use std::{sync::Arc, time::Duration};

use cudarc::driver::{CudaEvent, CudaStream, sys::CUevent_flags};

use super::{
    Breakdown, Gpu,
    buckets::{Bucket, Launched},
};
use crate::{
    Result,
    backend::{Backend, Step, graph},
};

/// When a graph began and ended.
pub struct GraphTime {
    began: CudaEvent,
    ended: CudaEvent,
}

impl GraphTime {
    /// Takes the time of what `launch` enqueues.
    pub fn of(cuda: &CudaStream, launch: impl FnOnce() -> Result<()>) -> Result<Self> {
        let timed = Some(CUevent_flags::CU_EVENT_DEFAULT);
        let began = cuda.record_event(timed)?;
        launch()?;
        Ok(Self { began, ended: cuda.record_event(timed)? })
    }
}

impl Gpu {
    /// Has the times of graphs be taken from now on.
    pub fn time_graphs(&mut self) {
        self.graph_times = Some(Vec::new());
    }

    /// The microseconds between each graph and the next, on the device, since
    /// [`time_graphs`](Self::time_graphs). Times are not taken any more.
    pub fn gaps(&mut self) -> Result<Vec<f64>> {
        let times = self.graph_times.take().unwrap_or_default();
        let gap = |pair: &[GraphTime]| Ok(f64::from(pair[0].ended.elapsed_ms(&pair[1].began)?) * 1e3);
        times.windows(2).map(gap).collect()
    }

    /// Takes a step of one token for each request, whose graph is captured anew, and says what its
    /// kernels cost.
    pub fn break_down(&mut self, step: &Step<'_>) -> Result<Breakdown> {
        self.forget_graphs();
        self.breaks_down = true;
        let taken = self.step(step);
        self.breaks_down = false;
        taken?;
        self.breakdown
            .take()
            .ok_or_else(|| "the step was prefill; expected one token for each request".into())
    }

    /// The stream that everything is enqueued on.
    pub fn cuda(&self) -> &Arc<CudaStream> {
        &self.cuda
    }

    /// What the host took to enqueue the last step.
    pub fn enqueued(&self) -> Duration {
        self.enqueued
    }

    /// Leaves attention hardly any memory for partial results: how many bytes.
    #[cfg(test)]
    pub fn shrink_workspaces(&mut self) -> Result<usize> {
        self.forget_graphs();
        self.attention.shrink(&self.network.stream)?;
        Ok(self.workspace_bytes())
    }

    /// Bytes of the memory for attention's partial results.
    pub fn workspace_bytes(&self) -> usize {
        self.attention.workspace_bytes()
    }

    /// Replays the graph of the last step: the milliseconds that it takes, and
    /// its kernels. Its index arrays are those of that step, and only of that.
    ///
    /// # Errors
    /// The last step was not a graph's.
    pub fn replay(&mut self) -> Result<(f32, usize)> {
        let Self { buckets, attention, lanes, lane, cuda, launched, .. } = self;
        let graph = launched.and_then(|Launched { bucket, sampled, place }| {
            let Bucket { greedy, sampled: sampling, .. } = &buckets[bucket];
            Some((bucket, if sampled { sampling } else { greedy }[*lane].get(place)?))
        });
        let Some((bucket, graph)) = graph else {
            return Err("the last step was not a graph's".into());
        };
        let plans = attention.plan_decode(*lane, &lanes[*lane].tables.tables.pages, Some(1 << bucket))?;
        let time = graph::milliseconds(cuda, || Ok(graph.step.launch(plans.decode())?))?;
        Ok((time, graph.step.nodes()))
    }

    /// The milliseconds that the sums over ranks take in a step of so many rows, in a graph of nothing
    /// else; none if this is no rank of several.
    pub fn sums(&mut self, rows: usize) -> Result<Option<f32>> {
        let Self { network, buffers, cuda, .. } = self;
        if network.ranks.is_none() {
            return Ok(None);
        }
        let mut x = buffers.x.rows_mut(rows)?;
        let mut run = || (0..network.num_sums()).try_for_each(|_| network.sum(&mut x));
        run()?;
        // SAFETY: NCCL's work on the buffer and on its own, which outlive the graph.
        let step = unsafe { graph::capture(&network.stream, &mut run)? };
        graph::milliseconds(cuda, || Ok(step.launch(&())?)).map(Some)
    }

    /// The milliseconds that attention to the pages of the last step takes in
    /// all layers, in a graph of nothing else.
    pub fn attention(&mut self) -> Result<f32> {
        let Self { network, attention, buffers, cache, lanes, lane, cuda, .. } = self;
        let pages = &lanes[*lane].tables.tables.pages;
        let heads = network.config.heads;
        let rows = pages.host().batch_size();
        let plans = attention.plan_decode(*lane, pages, Some(rows))?;
        let q = buffers.qkv.rows(rows)?.narrow(1, 0, heads.num_qo_heads)?;
        let mut out = buffers.attention.rows_mut(rows)?;
        let mut run = || -> Result<()> {
            let layers = 0..network.config.num_layers();
            Ok(layers
                .into_iter()
                .try_for_each(|layer| plans.run(layer, &q, &cache.layer(layer)?, &mut out))?)
        };
        // SAFETY: everything is the crate's, and outlives the graph.
        let step = unsafe { graph::capture(&network.stream, &mut run)? };
        graph::milliseconds(cuda, || Ok(step.launch(plans.decode())?))
    }
}
