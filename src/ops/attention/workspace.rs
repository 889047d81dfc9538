//! Scratch memory of attention plans.

use std::sync::Arc;

use super::{
    plan::PlanInfo,
    prefill::{Batch, PrefillKernels, PrefillPlanKey},
};
use crate::{
    cuda::{DeviceBuffer, StagingBuffer},
    error::Result,
    kv::{RaggedIndices, RaggedTable},
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::RawTensor,
};

/// The buffers that a plan fills and its runs use: device memory for partial
/// results, device memory for the plan's index arrays, and page-locked host
/// memory in which they are prepared.
///
/// A workspace belongs to one stream. One plan at a time borrows it; layers
/// that run one after the other share the plan. Two streams, or two plans
/// alive at once, need two workspaces.
///
/// A workspace knows the batch that [`BatchPrefill`](super::BatchPrefill) was
/// planned for last, and so planning for an equal one again costs a comparison.
///
/// Dropping a workspace frees it in stream order, without waiting for the
/// device. During a graph capture it is leaked instead, which is safe.
pub struct Workspace {
    pub(super) float: Arc<DeviceBuffer>,
    pub(super) int: DeviceBuffer,
    pub(super) staging: StagingBuffer,
    /// Numbers from 0 on, made when first needed: offsets of batches with one
    /// query per request, and pages of one key.
    numbers: Option<RaggedTable>,
    /// What the index arrays are of, and the numbers that belong to them.
    planned: Option<(PrefillPlanKey, PlanInfo)>,
    plans_made: u64,
}

impl Workspace {
    /// Bytes for partial results that upstream recommends: 128 MiB.
    pub const DEFAULT_FLOAT_BYTES: usize = 128 << 20;
    /// Bytes for index arrays that upstream uses: 8 MiB.
    pub const DEFAULT_INT_BYTES: usize = 8 << 20;

    /// A workspace of the default sizes.
    ///
    /// # Errors
    /// [`FlashInferError::Cuda`](crate::FlashInferError::Cuda): out of memory,
    /// no device, no driver; or the runtime cannot be started.
    pub fn new(stream: &Stream) -> Result<Self> {
        Self::with_sizes(stream, Self::DEFAULT_FLOAT_BYTES, Self::DEFAULT_INT_BYTES)
    }

    /// A workspace of other sizes, in bytes. Plans say when one is too small.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_sizes(stream: &Stream, float_bytes: usize, int_bytes: usize) -> Result<Self> {
        stream.check_usable_here("Workspace")?;
        let cuda = FlashInferRuntime::get()?.cuda();
        Self::around(Arc::new(DeviceBuffer::new(cuda, stream, float_bytes)?), int_bytes)
    }

    /// Another workspace with the same memory for partial results, which are
    /// there only while a run is. Runs with the two must not be enqueued by two
    /// threads at once, or they overwrite each other's.
    #[cfg(feature = "candle-cuda")]
    pub(crate) fn beside(&self) -> Result<Self> {
        self.stream().check_usable_here("Workspace")?;
        Self::around(self.float.clone(), self.int.len())
    }

    fn around(float: Arc<DeviceBuffer>, int_bytes: usize) -> Result<Self> {
        let (cuda, stream) = (FlashInferRuntime::get()?.cuda(), float.stream());
        let (int, staging) =
            (DeviceBuffer::new(cuda, stream, int_bytes)?, StagingBuffer::new(cuda, stream, int_bytes)?);
        Ok(Self { float, int, staging, numbers: None, planned: None, plans_made: 0 })
    }

    /// How often a planner has filled this workspace.
    pub fn plans_made(&self) -> u64 {
        self.plans_made
    }

    /// The plan that is in the workspace, if it is of this batch.
    pub(super) fn planned(&self, kernels: &PrefillKernels, batch: &Batch<'_>) -> Option<&PlanInfo> {
        self.planned.as_ref().filter(|(key, _)| key.is_of(kernels, batch)).map(|(_, info)| info)
    }

    /// A planner is about to write.
    pub(super) fn forget_plan(&mut self) {
        self.planned = None;
        self.plans_made += 1;
    }

    /// A planner has succeeded.
    pub(super) fn remember_plan(&mut self, key: PrefillPlanKey, info: &PlanInfo) {
        self.planned = Some((key, info.clone()));
    }

    /// Offsets `0..=batch`, on the host and on the device.
    pub(super) fn one_query_each(&mut self, batch: usize) -> Result<(Vec<i32>, RawTensor)> {
        let on_device = self.numbers_to(batch)?;
        Ok(((0..=batch as i32).collect(), on_device))
    }

    /// The numbers `0..=last` on the device. They stay where they are until
    /// there are to be more.
    pub(super) fn numbers_to(&mut self, last: usize) -> Result<RawTensor> {
        const FIRST: usize = 1024;
        let table = match self.numbers.take() {
            Some(table) if table.host().batch_size() >= last => table,
            _ => {
                let requests = last.max(FIRST).next_power_of_two().min(i32::MAX as usize);
                RaggedTable::new(self.stream(), RaggedIndices::from_lens(std::iter::repeat_n(1, requests))?)?
            }
        };
        self.numbers.insert(table).first(last)
    }

    /// The stream that the workspace belongs to.
    pub fn stream(&self) -> &Stream {
        self.float.stream()
    }
}

impl std::fmt::Debug for Workspace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Workspace({} + {} bytes, {:?})", self.float.len(), self.int.len(), self.stream())
    }
}
