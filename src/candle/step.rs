//! The index arrays of a step on a candle device.

use candle_core::{Device, Result};

use super::{op::invalid, paged::PagedCache, tensor};
use crate::{
    kv::{self, Batch, BatchCapacity, PageAllocator},
    stream::Stream,
};

const TABLES: &str = "StepTables";

/// The index arrays of a [`Batch`] on a candle device: nothing on the CPU, where
/// the batch's own are used, else arrays that are uploaded once for a step.
///
/// They belong to the stream of the device. With candle's default, which is each
/// thread's own default stream, they can be used only in the thread that made
/// them; with `Device::new_cuda_with_stream` in any.
#[derive(Debug)]
pub struct StepTables {
    device: Device,
    /// Room that there is, or will be.
    capacity: BatchCapacity,
    /// The pool of the batches, from the first on: a captured step has the memory of its cache in it.
    pool: Option<PageAllocator>,
    on_cuda: Option<kv::BatchTables>,
}

/// A batch, ready to be computed: what [`StepTables::update`] makes.
///
/// It borrows the batch and the arrays, so that neither can change while a plan
/// is made from it and run:
///
/// ```compile_fail,E0502
/// # use flashinfer_rs::{candle::{PagedDecode, StepTables, PagedCache}, kv::Batch};
/// # fn step(mut batch: Batch, mut tables: StepTables, mut cache: PagedCache, mut decode: PagedDecode) -> candle_core::Result<()> {
/// let step = tables.update(&batch, &mut cache)?;
/// batch.append([1]).unwrap(); // the step is of the batch as it was
/// decode.plan(&step)?;
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Step<'s> {
    pub(super) batch: &'s Batch,
    pub(super) device: &'s Device,
    tables: Option<&'s kv::BatchTables>,
}

/// Room that tables have at least.
const MIN_CAPACITY: BatchCapacity = BatchCapacity { requests: 64, pages: 4096, tokens: 1024 };

impl StepTables {
    /// Tables for steps on a device. They grow with the batches they are given.
    pub fn new(device: &Device) -> Self {
        Self::with_capacity(device, MIN_CAPACITY)
    }

    /// Tables with room for batches of a size, which stay where they are until one is larger: a
    /// captured step ([`capture_step`](super::capture_step)) has their addresses in it.
    pub fn with_capacity(device: &Device, capacity: BatchCapacity) -> Self {
        Self { device: device.clone(), capacity, pool: None, on_cuda: None }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Makes everything ready for a step: copies the pages that are to be
    /// copied, then uploads the arrays, all in the order of the device's stream.
    /// To be called after the batch changed.
    ///
    /// Nothing waits, but for an upload if the one before the last has not
    /// finished. When a batch is larger than all before it, arrays are allocated.
    ///
    /// # Errors
    /// Batch, cache and tables are not of one pool and one device; the stream is
    /// being captured, or is another thread's; the device is neither the CPU nor
    /// a CUDA device; or what CUDA said.
    pub fn update<'s>(&'s mut self, batch: &'s Batch, cache: &mut PagedCache) -> Result<Step<'s>> {
        if batch.allocator() != cache.allocator() {
            return invalid(TABLES, "cache", "it is the memory of another pool than the batch's".into());
        }
        if self.pool.as_ref().is_some_and(|pool| pool != batch.allocator()) {
            let problem = "it is of another pool than the batches before; each pool has tables of its own";
            return invalid(TABLES, "batch", problem.into());
        }
        check_device(TABLES, cache, &self.device)?;
        self.pool.get_or_insert_with(|| batch.allocator().clone());
        cache.copy_pages()?;
        if let Some(stream) = tensor::stream(&self.device) {
            self.upload(batch, &stream).map_err(tensor::error)?;
        }
        Ok(Step { batch, device: &self.device, tables: self.on_cuda.as_ref() })
    }

    /// Uploads a batch, to larger tables if it has to be.
    fn upload(&mut self, batch: &Batch, stream: &Stream) -> crate::Result<()> {
        let room = |needed: usize, old: usize| match needed.max(1) {
            needed if needed > old => needed.next_power_of_two(),
            _ => old,
        };
        let capacity = BatchCapacity {
            requests: room(batch.len(), self.capacity.requests),
            pages: room(batch.pages().indices().len(), self.capacity.pages),
            tokens: room(batch.append_indices().len(), self.capacity.tokens),
        };
        match &mut self.on_cuda {
            Some(tables) if capacity == self.capacity => tables.upload(batch),
            _ => {
                self.on_cuda = Some(kv::BatchTables::new(stream, batch, capacity)?);
                self.capacity = capacity;
                Ok(())
            }
        }
    }
}

/// The cache is on this very device: of another one of the same GPU the stream
/// may be another.
fn check_device(op: &'static str, cache: &PagedCache, device: &Device) -> Result<()> {
    if device.same_device(cache.device()) {
        return Ok(());
    }
    let (at, expected) = (cache.device(), device);
    invalid(
        op,
        "cache",
        format!("it is on {at:?}, the tables are on {expected:?}; make both from one Device"),
    )
}

impl Step<'_> {
    /// The batch.
    pub fn batch(&self) -> &Batch {
        self.batch
    }

    /// The step is on the device of what it is planned by.
    pub(super) fn check_on(&self, op: &'static str, device: &Device) -> Result<()> {
        if device.same_device(self.device) {
            return Ok(());
        }
        let (at, expected) = (self.device, device);
        invalid(op, "step", format!("it is on {at:?}; expected {expected:?}: make both from one Device"))
    }

    /// The cache has the memory of the batch's pages, where the arrays are.
    pub(super) fn check_cache(&self, op: &'static str, cache: &PagedCache) -> Result<()> {
        if self.batch.allocator() != cache.allocator() {
            return invalid(op, "cache", "it is the memory of another pool than the step's".into());
        }
        check_device(op, cache, self.device)
    }

    /// The arrays on a CUDA device.
    pub(super) fn on_cuda(&self) -> crate::Result<&kv::BatchTables> {
        let missing = || crate::FlashInferError::invalid(TABLES, "device", "its arrays are not on CUDA");
        self.tables.ok_or_else(missing)
    }
}
