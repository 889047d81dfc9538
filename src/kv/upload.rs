//! Index arrays on the device, beside the host arrays they are copies of.

use std::ffi::c_void;

use super::{AppendIndices, PageIndices, RaggedIndices};
use crate::{
    cuda::{DeviceBuffer, StagingBuffer, upload},
    error::{FlashInferError, Result},
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{DType, RawTensor},
};

/// The most arrays that one value has.
const MAX_ARRAYS: usize = 3;
/// Each array starts at a multiple of this many bytes.
const ALIGNMENT: usize = 16;

/// Checked index arrays that can be uploaded. Implemented by this crate's
/// types only, because their checks are what safe operations rely on.
pub trait IndexArrays: sealed::Arrays {}
impl<T: sealed::Arrays> IndexArrays for T {}

mod sealed {
    pub trait Arrays {
        const OP: &'static str;
        /// The arrays, small ones first; unused places are empty.
        fn arrays(&self) -> [&[i32]; super::MAX_ARRAYS];
    }
}

impl sealed::Arrays for PageIndices {
    const OP: &'static str = "PageTable";
    fn arrays(&self) -> [&[i32]; MAX_ARRAYS] {
        [&self.indptr, &self.last_page_len, &self.indices]
    }
}

impl sealed::Arrays for AppendIndices {
    const OP: &'static str = "AppendTable";
    fn arrays(&self) -> [&[i32]; MAX_ARRAYS] {
        [&self.batch_indices, &self.positions, &[]]
    }
}

impl sealed::Arrays for RaggedIndices {
    const OP: &'static str = "RaggedTable";
    fn arrays(&self) -> [&[i32]; MAX_ARRAYS] {
        [&self.indptr, &[], &[]]
    }
}

/// A page table on a device. See [`PageIndices`].
pub type PageTable = OnDevice<PageIndices>;

/// Destinations of appended tokens on a device. See [`AppendIndices`].
pub type AppendTable = OnDevice<AppendIndices>;

/// Offsets of ragged rows on a device. See [`RaggedIndices`].
pub type RaggedTable = OnDevice<RaggedIndices>;

/// Index arrays together with their copy on a device.
///
/// The copy is made in the order of one stream, on which alone it can be used.
/// [`update`](Self::update) keeps the device addresses, so a captured CUDA
/// graph sees the new values.
pub struct OnDevice<T> {
    host: T,
    stream: Stream,
    capacity: [usize; MAX_ARRAYS],
    storage: Storage,
}

enum Storage {
    Owned { buffer: DeviceBuffer, staging: StagingBuffer },
    Borrowed([*mut c_void; MAX_ARRAYS]),
}

// SAFETY: the borrowed addresses are only passed to kernels; whoever gave them
// promised that the memory stays valid, in whatever thread.
unsafe impl<T: Send> Send for OnDevice<T> {}
// SAFETY: as for `Send`; shared access does not write.
unsafe impl<T: Sync> Sync for OnDevice<T> {}

/// Where each array of these capacities starts, and where the last one ends.
fn offsets(capacity: [usize; MAX_ARRAYS]) -> [usize; MAX_ARRAYS + 1] {
    let mut offsets = [0; MAX_ARRAYS + 1];
    for (index, len) in capacity.into_iter().enumerate() {
        offsets[index + 1] = (offsets[index] + len * size_of::<i32>()).next_multiple_of(ALIGNMENT);
    }
    offsets
}

impl<T: IndexArrays> OnDevice<T> {
    /// Uploads the arrays, with room for exactly them.
    ///
    /// # Errors
    /// [`FlashInferError::Cuda`]; the runtime cannot be started; the stream is
    /// being captured into a graph.
    pub fn new(stream: &Stream, host: T) -> Result<Self> {
        let capacity = host.arrays().map(<[i32]>::len);
        Self::allocate(stream, host, capacity)
    }

    fn allocate(stream: &Stream, host: T, capacity: [usize; MAX_ARRAYS]) -> Result<Self> {
        stream.check_usable_here(T::OP)?;
        if let Some(too_large) = capacity.iter().find(|&&len| len > i32::MAX as usize) {
            return Err(FlashInferError::invalid(
                T::OP,
                "capacity",
                format!("{too_large} entries; indices are 32-bit, so at most {} fit", i32::MAX),
            ));
        }
        let cuda = FlashInferRuntime::get()?.cuda();
        let bytes = offsets(capacity)[MAX_ARRAYS];
        let storage = Storage::Owned {
            buffer: DeviceBuffer::new(cuda, stream, bytes)?,
            staging: StagingBuffer::new(cuda, stream, bytes)?,
        };
        let mut table = Self { host, stream: stream.clone(), capacity, storage };
        table.upload()?;
        Ok(table)
    }

    /// Replaces the arrays, on the host and (in stream order) on the device.
    /// The device addresses stay. Waits only if the upload before the last one
    /// has not finished yet.
    ///
    /// # Errors
    /// The new arrays do not fit the capacity, the stream is being captured,
    /// or [`FlashInferError::Cuda`]. The old arrays stay.
    pub fn update(&mut self, host: T) -> Result<()> {
        self.stream.check_usable_here(T::OP)?;
        for (array, capacity) in host.arrays().iter().zip(self.capacity) {
            if array.len() > capacity {
                return Err(FlashInferError::invalid(
                    T::OP,
                    "capacity",
                    format!(
                        "an array of {} entries for a capacity of {capacity}; make the table with_capacity of the largest batch",
                        array.len()
                    ),
                ));
            }
        }
        let old = std::mem::replace(&mut self.host, host);
        self.upload().inspect_err(|_| self.host = old)
    }

    fn upload(&mut self) -> Result<()> {
        let Storage::Owned { buffer, staging } = &mut self.storage else {
            return Err(FlashInferError::invalid(
                T::OP,
                "update",
                "the device arrays belong to somebody else",
            ));
        };
        let cuda = FlashInferRuntime::get()?.cuda();
        if cuda.is_capturing(&self.stream)? {
            return Err(FlashInferError::invalid(
                T::OP,
                "stream",
                "it is being captured into a CUDA graph; update index arrays before the capture, or before a replay",
            ));
        }
        let (arrays, starts) = (self.host.arrays(), offsets(self.capacity));
        staging.stage(&self.stream, |bytes| {
            let mut used = 0;
            for (array, start) in arrays.iter().zip(starts) {
                for (chunk, value) in bytes[start..].chunks_exact_mut(size_of::<i32>()).zip(*array) {
                    chunk.copy_from_slice(&value.to_ne_bytes());
                }
                if !array.is_empty() {
                    used = start + size_of_val(*array);
                }
            }
            // SAFETY: the staging buffer is page-locked and is not written
            // again before the event that `stage` records has passed.
            unsafe { upload(&bytes[..used], buffer) }
        })
    }

    /// The arrays on the host.
    pub fn host(&self) -> &T {
        &self.host
    }

    /// The stream on which the table is used.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Array `index` on the device.
    fn array(&self, index: usize) -> Result<RawTensor> {
        let data = match &self.storage {
            Storage::Owned { buffer, .. } => {
                buffer.as_ptr().cast::<u8>().wrapping_add(offsets(self.capacity)[index]).cast()
            }
            Storage::Borrowed(pointers) => pointers[index],
        };
        let len = self.host.arrays()[index].len();
        let mut raw = RawTensor::new(data, self.stream.device(), DType::I32, &[len], None)?;
        raw.stream = Some(self.stream.id());
        Ok(raw)
    }

    fn borrowed(stream: &Stream, host: T, pointers: [*const i32; MAX_ARRAYS]) -> Self {
        let capacity = host.arrays().map(<[i32]>::len);
        let storage = Storage::Borrowed(pointers.map(|pointer| pointer.cast_mut().cast()));
        Self { host, stream: stream.clone(), capacity, storage }
    }
}

impl<T: std::fmt::Debug> std::fmt::Debug for OnDevice<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OnDevice")
            .field("host", &self.host)
            .field("stream", &self.stream)
            .finish_non_exhaustive()
    }
}

impl PageTable {
    /// Uploads a page table, with room for up to `max_batch` requests and
    /// `max_pages` page numbers in later updates.
    ///
    /// # Errors
    /// As [`new`](Self::new); also when the table is larger than its capacity.
    pub fn with_capacity(
        stream: &Stream,
        host: PageIndices,
        max_batch: usize,
        max_pages: usize,
    ) -> Result<Self> {
        let (batch, pages) = (host.batch_size(), host.indices.len());
        if batch > max_batch || pages > max_pages {
            return Err(FlashInferError::invalid(
                "PageTable",
                "capacity",
                format!("{batch} requests with {pages} pages for a capacity of {max_batch} with {max_pages}"),
            ));
        }
        Self::allocate(stream, host, [max_batch.saturating_add(1), max_batch, max_pages])
    }

    /// A page table whose device arrays (`indptr`, `indices`, `last_page_len`,
    /// all `i32`) exist already, for example because a kernel made them.
    ///
    /// # Safety
    /// Whenever work that uses the table runs on `stream`, the device arrays
    /// must hold exactly the values of `host`, and must not have been written
    /// by the kernel directly before it (kernels launched with PDL read them
    /// early). They must stay allocated for as long as the table and that work
    /// live.
    pub unsafe fn from_device_unchecked(
        stream: &Stream,
        host: PageIndices,
        indptr: *const i32,
        indices: *const i32,
        last_page_len: *const i32,
    ) -> Self {
        Self::borrowed(stream, host, [indptr, last_page_len, indices])
    }

    pub(crate) fn indptr(&self) -> Result<RawTensor> {
        self.array(0)
    }

    pub(crate) fn last_page_len(&self) -> Result<RawTensor> {
        self.array(1)
    }

    pub(crate) fn indices(&self) -> Result<RawTensor> {
        self.array(2)
    }
}

impl AppendTable {
    /// Uploads destinations, with room for up to `max_tokens` in later updates.
    ///
    /// # Errors
    /// As [`new`](Self::new); also when there are more tokens than that.
    pub fn with_capacity(stream: &Stream, host: AppendIndices, max_tokens: usize) -> Result<Self> {
        if host.len() > max_tokens {
            return Err(FlashInferError::invalid(
                "AppendTable",
                "capacity",
                format!("{} tokens for a capacity of {max_tokens}", host.len()),
            ));
        }
        Self::allocate(stream, host, [max_tokens, max_tokens, 0])
    }

    pub(crate) fn batch_indices(&self) -> Result<RawTensor> {
        self.array(0)
    }

    pub(crate) fn positions(&self) -> Result<RawTensor> {
        self.array(1)
    }
}

impl RaggedTable {
    /// Uploads offsets, with room for up to `max_batch` requests in later
    /// updates.
    ///
    /// # Errors
    /// As [`new`](Self::new); also when there are more requests than that.
    pub fn with_capacity(stream: &Stream, host: RaggedIndices, max_batch: usize) -> Result<Self> {
        if host.batch_size() > max_batch {
            return Err(FlashInferError::invalid(
                "RaggedTable",
                "capacity",
                format!("{} requests for a capacity of {max_batch}", host.batch_size()),
            ));
        }
        Self::allocate(stream, host, [max_batch.saturating_add(1), 0, 0])
    }
}
