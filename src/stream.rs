//! A CUDA stream: a handle, its device, and what keeps it alive.
//!
//! Buffers that this crate owns ([`Workspace`](crate::attention::Workspace),
//! [`PageTable`](crate::PageTable)) are allocated and freed in the order of one
//! stream, so they hold a [`Stream`], and a stream made by a safe constructor
//! holds its owner.

use std::{
    any::Any,
    ffi::c_void,
    fmt,
    sync::Arc,
    thread::{self, ThreadId},
};

use crate::{
    device::Device,
    error::{FlashInferError, Result},
};

/// The handle that CUDA reads as "this thread's own default stream".
const PER_THREAD_DEFAULT: usize = 2;

/// What tells two streams apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct StreamId {
    handle: usize,
    ordinal: u32,
    /// Set for the per-thread default stream, whose handle names another
    /// stream in every thread.
    thread: Option<ThreadId>,
}

/// A CUDA stream of one device. Cloning is cheap and names the same stream.
///
/// With the feature `cudarc`, `Stream::from(&Arc<CudaStream>)` makes one; a
/// raw handle goes through [`Stream::from_raw`].
#[derive(Clone)]
pub struct Stream {
    id: StreamId,
    /// Whether it is of its device's primary context, as kernels need.
    primary: bool,
    /// What keeps it alive, if that is known.
    #[cfg_attr(not(feature = "cudarc"), expect(dead_code))]
    owner: Option<Arc<dyn Any + Send + Sync>>,
}

impl Stream {
    /// A stream by its `cudaStream_t`. Null is the legacy default stream, `2`
    /// the calling thread's own default stream, which can then be used in this
    /// thread only.
    ///
    /// # Safety
    /// The handle must be a stream of the primary context of CUDA device
    /// `ordinal` and must live until the last clone of the result, and
    /// everything created on it, is dropped.
    pub unsafe fn from_raw(handle: *mut c_void, ordinal: u32) -> Self {
        Self::with_owner(handle, ordinal, None)
    }

    /// The stream, known not to be of its device's primary context.
    #[cfg(feature = "cudarc")]
    pub(crate) fn of_another_context(mut self) -> Self {
        self.primary = false;
        self
    }

    pub(crate) fn with_owner(
        handle: *mut c_void,
        ordinal: u32,
        owner: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Self {
        let handle = handle as usize;
        let thread = (handle == PER_THREAD_DEFAULT).then(|| thread::current().id());
        Self { id: StreamId { handle, ordinal, thread }, primary: true, owner }
    }

    /// What keeps the stream alive, if it is known.
    #[cfg(feature = "cudarc")]
    pub(crate) fn owner(&self) -> Option<Arc<dyn Any + Send + Sync>> {
        self.owner.clone()
    }

    /// The `cudaStream_t`.
    pub fn as_raw(&self) -> *mut c_void {
        self.id.handle as *mut c_void
    }

    /// The ordinal of the stream's CUDA device.
    pub fn ordinal(&self) -> u32 {
        self.id.ordinal
    }

    /// The stream's device.
    pub fn device(&self) -> Device {
        Device::Cuda(self.id.ordinal)
    }

    pub(crate) fn id(&self) -> StreamId {
        self.id
    }

    /// Whether the handle means this stream in the calling thread.
    pub(crate) fn is_usable_here(&self) -> bool {
        self.id.thread.is_none_or(|thread| thread == thread::current().id())
    }

    /// Refuses the per-thread default stream of another thread, and streams of
    /// contexts that kernels do not run in.
    pub(crate) fn check_usable_here(&self, op: &'static str) -> Result<()> {
        if !self.primary {
            return Err(FlashInferError::invalid(
                op,
                "stream",
                "it is not of its device's primary context, in which kernels run; make it from CudaContext::new",
            ));
        }
        if self.is_usable_here() {
            return Ok(());
        }
        Err(FlashInferError::invalid(
            op,
            "stream",
            "this is another thread's per-thread default stream; make a Stream in the thread that uses it, \
             or use a stream of its own",
        ))
    }
}

impl PartialEq for Stream {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}
impl Eq for Stream {}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({:#x}, cuda:{})", self.id.handle, self.id.ordinal)
    }
}
