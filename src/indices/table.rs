//! Checked index arrays together with their copy on a device.

use std::{
    ffi::c_void,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    capture::{self, Current},
    cuda::{DeviceBuffer, StagingBuffer, upload},
    error::{FlashInferError, Result},
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::RawTensor,
};

/// The most arrays that one value has.
pub(super) const MAX_ARRAYS: usize = 3;
/// Each array starts at a multiple of this many bytes.
const ALIGNMENT: usize = 16;

/// Checked index arrays that can be uploaded. Implemented by this crate's
/// types only, because their checks are what safe operations rely on.
pub trait IndexArrays: sealed::Arrays {}
impl<T: sealed::Arrays> IndexArrays for T {}

mod sealed {
    use crate::dtype::DType;

    /// One array on the host, of a type that kernels read.
    #[derive(Clone, Copy)]
    pub enum Array<'a> {
        I32(&'a [i32]),
        I64(&'a [i64]),
        U32(&'a [u32]),
        U16(&'a [u16]),
        F32(&'a [f32]),
    }

    impl Array<'_> {
        pub const EMPTY: Self = Self::I32(&[]);

        pub fn len(&self) -> usize {
            match self {
                Self::I32(array) => array.len(),
                Self::I64(array) => array.len(),
                Self::U32(array) => array.len(),
                Self::U16(array) => array.len(),
                Self::F32(array) => array.len(),
            }
        }

        pub fn dtype(&self) -> DType {
            match self {
                Self::I32(_) => DType::I32,
                Self::I64(_) => DType::I64,
                Self::U32(_) => DType::U32,
                Self::U16(_) => DType::U16,
                Self::F32(_) => DType::F32,
            }
        }

        /// Writes the numbers one after the other; `to` has room for them.
        pub fn put(&self, to: &mut [u8]) {
            macro_rules! put {
                ($array:expr) => {
                    for (chunk, value) in to.chunks_exact_mut(size_of_val(&$array[..1])).zip($array) {
                        chunk.copy_from_slice(&value.to_ne_bytes());
                    }
                };
            }
            match self {
                _ if self.len() == 0 => {}
                Self::I32(array) => put!(*array),
                Self::I64(array) => put!(*array),
                Self::U32(array) => put!(*array),
                Self::U16(array) => put!(*array),
                Self::F32(array) => put!(*array),
            }
        }
    }

    pub trait Arrays {
        /// What operations rely on, and a captured step looks at before each launch.
        fn facts(&self) -> crate::capture::Facts;
        const OP: &'static str;
        /// The arrays, small ones first; unused places are empty. Each place
        /// has one type.
        fn arrays(&self) -> [Array<'_>; super::MAX_ARRAYS];
    }
}
pub(super) use sealed::{Array, Arrays};

/// Index arrays together with their copy on a device.
///
/// The copy is made in the order of one stream, on which alone it can be used.
/// [`update`](Self::update) keeps the device addresses, so a captured CUDA
/// graph sees the new values.
pub struct OnDevice<T> {
    host: T,
    stream: Stream,
    capacity: [usize; MAX_ARRAYS],
    /// Where each array is on the device, and stays.
    starts: [*mut c_void; MAX_ARRAYS],
    /// `None` if the device arrays belong to somebody else.
    storage: Option<TableStorage>,
}

struct TableStorage {
    buffer: DeviceBuffer,
    staging: StagingBuffer,
    /// Of what the device has, or will have.
    facts: Current,
}

// SAFETY: the addresses are only passed to kernels; whoever gave borrowed ones
// promised that the memory stays valid, in whatever thread.
unsafe impl<T: Send> Send for OnDevice<T> {}
// SAFETY: as for `Send`; shared access does not write.
unsafe impl<T: Sync> Sync for OnDevice<T> {}

/// Where each array starts, if they have these capacities, and where the last
/// one ends.
fn offsets(arrays: &[Array<'_>; MAX_ARRAYS], capacity: [usize; MAX_ARRAYS]) -> [usize; MAX_ARRAYS + 1] {
    let mut offsets = [0; MAX_ARRAYS + 1];
    for (index, (array, len)) in arrays.iter().zip(capacity).enumerate() {
        offsets[index + 1] = (offsets[index] + len * array.dtype().size()).next_multiple_of(ALIGNMENT);
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
        let capacity = host.arrays().map(|array| array.len());
        Self::allocate(stream, host, capacity)
    }

    /// With room for as many of something as there may be.
    pub(super) fn allocate_for(
        stream: &Stream,
        host: T,
        (have, room, what): (usize, usize, &str),
        capacity: [usize; MAX_ARRAYS],
    ) -> Result<Self> {
        if have > room {
            let problem = format!("{have} {what} for a capacity of {room}");
            return Err(FlashInferError::invalid(T::OP, "capacity", problem));
        }
        Self::allocate(stream, host, capacity)
    }

    pub(super) fn allocate(stream: &Stream, host: T, capacity: [usize; MAX_ARRAYS]) -> Result<Self> {
        stream.check_usable_here(T::OP)?;
        if let Some(too_large) = capacity.iter().find(|&&len| len > i32::MAX as usize) {
            return Err(FlashInferError::invalid(
                T::OP,
                "capacity",
                format!("{too_large} entries; at most {} fit", i32::MAX),
            ));
        }
        let cuda = FlashInferRuntime::get()?.cuda();
        let [starts @ .., bytes] = offsets(&host.arrays(), capacity);
        let buffer = DeviceBuffer::new(cuda, stream, bytes)?;
        let starts = starts.map(|start| buffer.as_ptr().cast::<u8>().wrapping_add(start).cast());
        let facts = Arc::new(Mutex::new(host.facts()));
        let storage = Some(TableStorage { buffer, staging: StagingBuffer::new(cuda, stream, bytes)?, facts });
        let mut table = Self { host, stream: stream.clone(), capacity, starts, storage };
        table.upload(&mut false)?;
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
        let mut enqueued = false;
        self.upload(&mut enqueued).inspect_err(|_| {
            // Once the copy is on its way, the device has the new arrays.
            if !enqueued {
                self.host = old;
            }
        })
    }

    /// Enqueues the copy of the host arrays, and says so as soon as it is.
    fn upload(&mut self, enqueued: &mut bool) -> Result<()> {
        let Some(TableStorage { buffer, staging, facts }) = &mut self.storage else {
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
        let arrays = self.host.arrays();
        let starts = offsets(&arrays, self.capacity);
        staging.stage(&self.stream, |bytes| {
            let mut used = 0;
            for (array, start) in arrays.iter().zip(starts) {
                array.put(&mut bytes[start..]);
                if array.len() > 0 {
                    used = start + array.len() * array.dtype().size();
                }
            }
            // SAFETY: the staging buffer is page-locked and is not written
            // again before the event that `stage` records has passed.
            unsafe { upload(&bytes[..used], buffer, 0)? };
            *enqueued = true;
            *facts.lock().unwrap_or_else(PoisonError::into_inner) = self.host.facts();
            Ok(())
        })
    }

    /// Whether the arrays fit, so that [`update`](Self::update) takes them.
    #[cfg(feature = "candle-cuda")]
    pub(crate) fn has_room_for(&self, host: &T) -> bool {
        host.arrays().iter().zip(self.capacity).all(|(array, capacity)| array.len() <= capacity)
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
    pub(super) fn array(&self, index: usize) -> Result<RawTensor> {
        let (array, data) = (self.host.arrays()[index], self.starts[index]);
        let mut raw = RawTensor::new(data, self.stream.device(), array.dtype(), &[array.len()], None)?;
        raw.stream = Some(self.stream.id());
        raw.owner = self.storage.as_ref().map(|storage| storage.buffer.owner());
        self.is_read();
        Ok(raw)
    }

    /// A step that is being captured looks at the arrays before each launch.
    fn is_read(&self) {
        match &self.storage {
            _ if !capture::is_active() => {}
            Some(storage) => {
                capture::keep(storage.buffer.share());
                capture::reads(T::OP, &storage.facts);
            }
            None => capture::uses_foreign(),
        }
    }

    /// Captured work reads positions that have to stay below a number.
    pub(crate) fn limit(&self, below: usize) {
        if let Some(storage) = &self.storage {
            capture::limit(T::OP, &storage.facts, below);
        }
    }

    /// Where the arrays are on the device; they stay there.
    pub(crate) fn addresses(&self) -> [usize; MAX_ARRAYS] {
        self.is_read();
        self.starts.map(|start| start as usize)
    }

    /// Arrays that are on the device already, for places that are not empty.
    pub(super) fn borrowed(stream: &Stream, host: T, pointers: [*const c_void; MAX_ARRAYS]) -> Self {
        let capacity = host.arrays().map(|array| array.len());
        let starts = pointers.map(<*const c_void>::cast_mut);
        Self { host, stream: stream.clone(), capacity, starts, storage: None }
    }
}

/// The arrays on the host.
impl<T> AsRef<T> for OnDevice<T> {
    fn as_ref(&self) -> &T {
        &self.host
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dtype::DType::{self, I32, I64, U16, U32},
        indices::{
            AppendIndices, BoundedIndices, ItemIndices, MaskIndices, PackedIndices, PageIndices,
            RaggedIndices, RowIndices, SegmentIndices, SequenceIndices,
        },
    };

    #[test]
    fn arrays_have_the_types_that_kernels_read() {
        fn types<'a>(arrays: [Array<'a>; MAX_ARRAYS]) -> Vec<DType> {
            arrays.iter().filter(|array| array.len() > 0).map(Array::dtype).collect()
        }
        let pages = PageIndices::from_requests(8, 16, [(&[7, 0][..], 20)]).unwrap();
        let append = AppendIndices::new(&pages, vec![0], vec![19]).unwrap();
        assert_eq!(types(pages.arrays()), [I32; 3]);
        assert_eq!(types(append.arrays()), [I32; 2]);
        assert_eq!(types(RaggedIndices::from_lens([3]).unwrap().arrays()), [I32]);
        assert_eq!(types(SegmentIndices::from_lens([3]).unwrap().arrays()), [I32; 3]);
        assert_eq!(types(SequenceIndices::from_lens([3]).unwrap().arrays()), [I64]);
        assert_eq!(types(MaskIndices::new([(2, 3)]).unwrap().arrays()), [I32]);
        assert_eq!(types(ItemIndices::new([(3, &[2][..])]).unwrap().arrays()), [U32, U16, U16]);
        let rows =
            RowIndices::new([3]).unwrap().with_row_starts([1]).unwrap().with_row_to_batch([0]).unwrap();
        assert_eq!(types(rows.arrays()), [I32; 3]);
        assert_eq!(types(PackedIndices::from_lens([3]).unwrap().arrays()), [I32; 2]);
        assert_eq!(types(BoundedIndices::new(8, vec![7]).unwrap().arrays()), [I32, I64]);
    }
}
