//! Scratch memory of attention, and the rule by which it grows.

use std::{
    any::Any,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    cuda::{DeviceBuffer, StagingBuffer},
    error::Result,
    indices::{RaggedIndices, RaggedTable},
    ops::check::Check,
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
/// # Growth
/// Before a planner or a launcher is called, the crate computes how many bytes it
/// takes. A workspace with fewer grows, by half of its size at least. Its old memory
/// is freed in stream order.
///
/// Memory that a CUDA graph may hold stays where it is. So a workspace stops
/// growing with the first plan for a graph ([`PlanOptions::graph`](super::PlanOptions::graph)),
/// which may still let it grow, and with the first run of
/// [`SinglePrefill`](super::SinglePrefill) or [`SingleDecode`](super::SingleDecode)
/// that is captured with scratch memory. From then on, whatever takes more is
/// refused with [`InvalidArgument`](crate::FlashInferError::InvalidArgument), which
/// states the bytes and the constructor that gives them. To avoid that, plan for
/// the largest batch first, or make the workspace [`with_sizes`](Self::with_sizes).
/// A graph that captured runs of any other plan is not to be replayed after the next
/// plan, which may move the memory.
///
/// A workspace knows the batch that [`BatchPrefill`](super::BatchPrefill) was
/// planned for last, and so planning for an equal one again costs a comparison.
///
/// Dropping a workspace frees it in stream order, without waiting for the
/// device. During a graph capture it is leaked instead, which is safe.
pub struct Workspace {
    pub(super) float: Arc<DeviceBuffer>,
    /// The largest of those that this workspace and others beside it have made.
    largest: Arc<Mutex<Arc<DeviceBuffer>>>,
    pub(super) int: DeviceBuffer,
    pub(super) staging: StagingBuffer,
    /// Whether a CUDA graph may hold the memory.
    held: bool,
    /// How one of other sizes is made, up to the sizes.
    constructor: &'static str,
    /// Numbers from 0 on, made when first needed: offsets of batches with one
    /// query per request, and pages of one key. A graph may hold any of them, so
    /// none goes before the workspace.
    numbers: Vec<RaggedTable>,
    /// What tells of which plan the index arrays are; who planned knows its type.
    planned: Option<Box<dyn Any + Send + Sync>>,
    plans_made: u64,
}

/// The bytes of a workspace that a planner or a launcher takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Need {
    /// For partial results.
    pub(super) float: usize,
    /// For index arrays.
    pub(super) int: usize,
}

/// Bytes of arrays that stand one after the other, each from a multiple of 16
/// on, as planners allocate them.
pub(super) fn arrays(sizes: impl IntoIterator<Item = usize>) -> usize {
    sizes.into_iter().fold(0, |end: usize, bytes| end.next_multiple_of(16) + bytes)
}

/// The size of a buffer that grows. By less than half, slowly growing batches
/// would be moved again and again.
pub(super) fn grown(from: usize, needed: usize) -> usize {
    needed.max(from + from / 2)
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

    /// A workspace of other sizes, in bytes, which may be zero: it grows.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_sizes(stream: &Stream, float_bytes: usize, int_bytes: usize) -> Result<Self> {
        Self::made_by("Workspace::with_sizes(&stream", stream, [float_bytes, int_bytes])
    }

    /// A workspace that somebody makes with `constructor`, which is the text of
    /// its call up to the sizes.
    pub(super) fn made_by(
        constructor: &'static str,
        stream: &Stream,
        [float_bytes, int_bytes]: [usize; 2],
    ) -> Result<Self> {
        stream.check_usable_here("Workspace")?;
        let float = Arc::new(DeviceBuffer::new(FlashInferRuntime::get()?.cuda(), stream, float_bytes)?);
        let largest = Arc::new(Mutex::new(float.clone()));
        Self::around(constructor, float, largest, int_bytes)
    }

    /// Another workspace with the same memory for partial results, which are
    /// there only while a run is. Runs with the two must not be enqueued by two
    /// threads at once, or they overwrite each other's.
    #[cfg(feature = "candle-cuda")]
    pub(crate) fn beside(&self) -> Result<Self> {
        self.stream().check_usable_here("Workspace")?;
        Self::around(self.constructor, self.float.clone(), self.largest.clone(), self.int.len())
    }

    fn around(
        constructor: &'static str,
        float: Arc<DeviceBuffer>,
        largest: Arc<Mutex<Arc<DeviceBuffer>>>,
        int_bytes: usize,
    ) -> Result<Self> {
        let (int, staging) = index_memory(float.stream(), int_bytes)?;
        Ok(Self {
            float,
            largest,
            int,
            staging,
            held: false,
            constructor,
            numbers: Vec::new(),
            planned: None,
            plans_made: 0,
        })
    }

    /// Bytes for partial results that there are now; at least one.
    pub fn float_bytes(&self) -> usize {
        self.float.len()
    }

    /// Bytes for index arrays that there are now; at least one.
    pub fn int_bytes(&self) -> usize {
        self.int.len()
    }

    /// Makes room for what a planner or a launcher takes, or refuses it.
    pub(super) fn reserve(&mut self, check: &Check<'_>, need: Need) -> Result<()> {
        let [float, int] = [self.float.len(), self.int.len()];
        let fits = need.float <= float && need.int <= int;
        if self.held {
            if fits {
                return Ok(());
            }
            return check.fail(
                "workspace",
                format!(
                    "{} bytes are needed for partial results and {} for index arrays; it has {float} and {int}, \
                     and does not grow, because a CUDA graph may hold its memory: make another by \
                     {}, {}, {}), or begin with the largest batch",
                    need.float,
                    need.int,
                    self.constructor,
                    need.float.max(float),
                    need.int.max(int)
                ),
            );
        }
        if need.float > float {
            let mut largest = self.largest.lock().unwrap_or_else(PoisonError::into_inner);
            if need.float > largest.len() {
                let cuda = FlashInferRuntime::get()?.cuda();
                let bytes = grown(largest.len(), need.float);
                *largest = Arc::new(DeviceBuffer::new(cuda, self.float.stream(), bytes)?);
            }
            self.float = largest.clone();
        }
        if need.int > int {
            let (int, staging) = index_memory(self.float.stream(), grown(int, need.int))?;
            (self.int, self.staging, self.planned) = (int, staging, None);
        }
        Ok(())
    }

    /// From now on, a CUDA graph may hold the memory.
    pub(super) fn hold(&mut self) {
        self.held = true;
    }

    pub(super) fn is_held(&self) -> bool {
        self.held
    }

    /// How often a planner has filled this workspace.
    pub fn plans_made(&self) -> u64 {
        self.plans_made
    }

    /// What was said of the plan that is in the workspace, if it is of this kind.
    pub(super) fn planned<T: Any>(&self) -> Option<&T> {
        self.planned.as_ref()?.downcast_ref()
    }

    /// A planner is about to write.
    pub(super) fn forget_plan(&mut self) {
        self.planned = None;
        self.plans_made += 1;
    }

    /// A planner has succeeded; `plan` tells the plan from others.
    pub(super) fn remember_plan<T: Any + Send + Sync>(&mut self, plan: T) {
        self.planned = Some(Box::new(plan));
    }

    /// Offsets `0..=batch`, on the host and on the device.
    pub(super) fn one_query_each(&mut self, batch: usize) -> Result<(Vec<i32>, RawTensor)> {
        let on_device = self.numbers_to(batch)?;
        Ok(((0..=batch as i32).collect(), on_device))
    }

    /// The numbers `0..=last` on the device. As many of them stay where they are.
    pub(super) fn numbers_to(&mut self, last: usize) -> Result<RawTensor> {
        const FIRST: usize = 1024;
        let enough = |table: &RaggedTable| table.host().batch_size() >= last;
        let at = match self.numbers.iter().position(enough) {
            Some(at) => at,
            None => {
                let requests = last.max(FIRST).next_power_of_two().min(i32::MAX as usize);
                let numbers = RaggedIndices::from_lens(std::iter::repeat_n(1, requests))?;
                self.numbers.push(RaggedTable::new(self.stream(), numbers)?);
                self.numbers.len() - 1
            }
        };
        self.numbers[at].first(last)
    }

    /// The stream that the workspace belongs to.
    pub fn stream(&self) -> &Stream {
        self.float.stream()
    }
}

/// Device memory for index arrays, and page-locked memory of the same size.
fn index_memory(stream: &Stream, bytes: usize) -> Result<(DeviceBuffer, StagingBuffer)> {
    let cuda = FlashInferRuntime::get()?.cuda();
    Ok((DeviceBuffer::new(cuda, stream, bytes)?, StagingBuffer::new(cuda, stream, bytes)?))
}

impl std::fmt::Debug for Workspace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Workspace({} + {} bytes, {:?})", self.float.len(), self.int.len(), self.stream())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_start_at_multiples_of_16() {
        assert_eq!(arrays([]), 0);
        assert_eq!(arrays([5]), 5);
        assert_eq!(arrays([5, 1]), 17);
        assert_eq!(arrays([16, 1, 0]), 32);
    }

    #[test]
    fn a_buffer_grows_by_half_at_least() {
        assert_eq!((grown(1, 1000), grown(1000, 1001), grown(1000, 1501)), (1000, 1500, 1501));
    }
}
