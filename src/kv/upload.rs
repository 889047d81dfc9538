//! Index arrays on the device, beside the host arrays they are copies of.

use std::ffi::c_void;

use super::{
    AppendIndices, BoundedIndices, ItemIndices, MaskIndices, PackedIndices, PageIndices, RaggedIndices,
    RowIndices, SegmentIndices, SequenceIndices,
};
use crate::{
    cuda::{DeviceBuffer, StagingBuffer, upload},
    error::{FlashInferError, Result},
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::RawTensor,
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
    use crate::tensor::DType;

    /// One array on the host, of an integer type that kernels read.
    #[derive(Clone, Copy)]
    pub enum Array<'a> {
        I32(&'a [i32]),
        I64(&'a [i64]),
        U32(&'a [u32]),
        U16(&'a [u16]),
    }

    impl Array<'_> {
        pub const EMPTY: Self = Self::I32(&[]);

        pub fn len(&self) -> usize {
            match self {
                Self::I32(array) => array.len(),
                Self::I64(array) => array.len(),
                Self::U32(array) => array.len(),
                Self::U16(array) => array.len(),
            }
        }

        pub fn dtype(&self) -> DType {
            match self {
                Self::I32(_) => DType::I32,
                Self::I64(_) => DType::I64,
                Self::U32(_) => DType::U32,
                Self::U16(_) => DType::U16,
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
            }
        }
    }

    pub trait Arrays {
        const OP: &'static str;
        /// The arrays, small ones first; unused places are empty. Each place
        /// has one type.
        fn arrays(&self) -> [Array<'_>; super::MAX_ARRAYS];
    }
}
use sealed::Array;

impl sealed::Arrays for PageIndices {
    const OP: &'static str = "PageTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        [Array::I32(&self.indptr), Array::I32(&self.last_page_len), Array::I32(&self.indices)]
    }
}

impl sealed::Arrays for AppendIndices {
    const OP: &'static str = "AppendTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        [Array::I32(&self.batch_indices), Array::I32(&self.positions), Array::EMPTY]
    }
}

impl sealed::Arrays for RaggedIndices {
    const OP: &'static str = "RaggedTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        [Array::I32(&self.indptr), Array::EMPTY, Array::EMPTY]
    }
}

impl sealed::Arrays for SegmentIndices {
    const OP: &'static str = "SegmentTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        [Array::I32(&self.starts), Array::I32(&self.lens), Array::I32(&self.weights)]
    }
}

impl sealed::Arrays for SequenceIndices {
    const OP: &'static str = "SequenceTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        [Array::I64(self.cu_seqlens()), Array::EMPTY, Array::EMPTY]
    }
}

impl sealed::Arrays for MaskIndices {
    const OP: &'static str = "MaskTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        [Array::I32(&self.mask_indptr), Array::EMPTY, Array::EMPTY]
    }
}

impl sealed::Arrays for ItemIndices {
    const OP: &'static str = "ItemTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        [Array::U32(&self.prefix_len), Array::U16(&self.max_item_len), Array::U16(&self.token_pos_in_items)]
    }
}

impl sealed::Arrays for RowIndices {
    const OP: &'static str = "RowTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        let given = |array| Array::I32(<Option<&[i32]>>::unwrap_or_default(array));
        [Array::I32(&self.lengths), given(self.row_starts()), given(self.row_to_batch())]
    }
}

impl sealed::Arrays for PackedIndices {
    const OP: &'static str = "PackedTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        [Array::I32(self.input_indptr()), Array::I32(self.output_indptr()), Array::EMPTY]
    }
}

impl sealed::Arrays for BoundedIndices {
    const OP: &'static str = "BoundedTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        [Array::I32(&self.narrow), Array::I64(&self.wide), Array::EMPTY]
    }
}

/// A page table on a device. See [`PageIndices`].
pub type PageTable = OnDevice<PageIndices>;

/// Destinations of appended tokens on a device. See [`AppendIndices`].
pub type AppendTable = OnDevice<AppendIndices>;

/// Offsets of ragged rows on a device. See [`RaggedIndices`].
pub type RaggedTable = OnDevice<RaggedIndices>;

/// The segments of a packed batch on a device. See [`SegmentIndices`].
pub type SegmentTable = OnDevice<SegmentIndices>;

/// The sequences of a packed batch on a device. See [`SequenceIndices`].
pub type SequenceTable = OnDevice<SequenceIndices>;

/// The parts of a packed custom mask on a device. See [`MaskIndices`].
pub type MaskTable = OnDevice<MaskIndices>;

/// The items of multi-item prompts on a device. See [`ItemIndices`].
pub type ItemTable = OnDevice<ItemIndices>;

/// The parts of rows of scores on a device. See [`RowIndices`].
pub type RowTable = OnDevice<RowIndices>;

/// Segments of a boolean tensor on a device. See [`PackedIndices`].
pub type PackedTable = OnDevice<PackedIndices>;

/// Numbers below a bound on a device. See [`BoundedIndices`].
pub type BoundedTable = OnDevice<BoundedIndices>;

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
    storage: Option<Storage>,
}

struct Storage {
    buffer: DeviceBuffer,
    staging: StagingBuffer,
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
    fn allocate_for(
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

    fn allocate(stream: &Stream, host: T, capacity: [usize; MAX_ARRAYS]) -> Result<Self> {
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
        let storage = Some(Storage { buffer, staging: StagingBuffer::new(cuda, stream, bytes)? });
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
        let Some(Storage { buffer, staging }) = &mut self.storage else {
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
    fn array(&self, index: usize) -> Result<RawTensor> {
        let (array, data) = (self.host.arrays()[index], self.starts[index]);
        let mut raw = RawTensor::new(data, self.stream.device(), array.dtype(), &[array.len()], None)?;
        raw.stream = Some(self.stream.id());
        Ok(raw)
    }

    /// Where the arrays are on the device; they stay there.
    pub(crate) fn addresses(&self) -> [usize; MAX_ARRAYS] {
        self.starts.map(|start| start as usize)
    }

    /// Arrays that are on the device already, for places that are not empty.
    fn borrowed(stream: &Stream, host: T, pointers: [*const c_void; MAX_ARRAYS]) -> Self {
        let capacity = host.arrays().map(|array| array.len());
        let starts = pointers.map(<*const c_void>::cast_mut);
        Self { host, stream: stream.clone(), capacity, starts, storage: None }
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
        Self::borrowed(stream, host, [indptr.cast(), last_page_len.cast(), indices.cast()])
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
        let room = (host.len(), max_tokens, "tokens");
        Self::allocate_for(stream, host, room, [max_tokens, max_tokens, 0])
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
        let room = (host.batch_size(), max_batch, "requests");
        Self::allocate_for(stream, host, room, [max_batch.saturating_add(1), 0, 0])
    }

    /// The offsets of the first `batch` requests, of which there are as many.
    pub(crate) fn first(&self, batch: usize) -> Result<RawTensor> {
        let indptr = self.indptr()?;
        let mut first = RawTensor::new(indptr.data, indptr.device, indptr.dtype, &[batch + 1], None)?;
        first.stream = indptr.stream;
        Ok(first)
    }

    pub(crate) fn indptr(&self) -> Result<RawTensor> {
        self.array(0)
    }
}

impl SegmentTable {
    /// Uploads segments, with room for up to `max_segments` in later updates.
    ///
    /// # Errors
    /// As [`new`](Self::new); also when there are more segments than that.
    pub fn with_capacity(stream: &Stream, host: SegmentIndices, max_segments: usize) -> Result<Self> {
        let room = (host.batch_size(), max_segments, "segments");
        Self::allocate_for(stream, host, room, [max_segments; MAX_ARRAYS])
    }
}

impl SequenceTable {
    /// Uploads sequences, with room for up to `max_batch` in later updates.
    ///
    /// # Errors
    /// As [`new`](Self::new); also when there are more sequences than that.
    pub fn with_capacity(stream: &Stream, host: SequenceIndices, max_batch: usize) -> Result<Self> {
        let room = (host.batch_size(), max_batch, "sequences");
        Self::allocate_for(stream, host, room, [max_batch.saturating_add(1), 0, 0])
    }

    /// Sequences whose device array, `cu_seqlens`, exists already.
    ///
    /// # Safety
    /// Whenever work that uses the table runs on `stream`, the device array
    /// must hold exactly the values of `host`. It must stay allocated for as
    /// long as the table and that work live.
    pub unsafe fn from_device_unchecked(
        stream: &Stream,
        host: SequenceIndices,
        cu_seqlens: *const i64,
    ) -> Self {
        Self::borrowed(stream, host, [cu_seqlens.cast(), std::ptr::null(), std::ptr::null()])
    }

    pub(crate) fn cu_seqlens(&self) -> Result<RawTensor> {
        self.array(0)
    }
}

impl BoundedTable {
    /// Uploads numbers, with room for up to `max_len` in later updates.
    ///
    /// # Errors
    /// As [`new`](Self::new); also when there are more numbers than that.
    pub fn with_capacity(stream: &Stream, host: BoundedIndices, max_len: usize) -> Result<Self> {
        let room = (host.values().len(), max_len, "numbers");
        Self::allocate_for(stream, host, room, [max_len, max_len, 0])
    }

    /// The numbers as `i32`, or as `i64`.
    pub(crate) fn values(&self, wide: bool) -> Result<RawTensor> {
        self.array(wide.into())
    }
}

impl MaskTable {
    /// Uploads the parts of a mask, with room for up to `max_batch` requests in
    /// later updates.
    ///
    /// # Errors
    /// As [`new`](Self::new); also when there are more requests than that.
    pub fn with_capacity(stream: &Stream, host: MaskIndices, max_batch: usize) -> Result<Self> {
        let room = (host.batch_size(), max_batch, "requests");
        Self::allocate_for(stream, host, room, [max_batch.saturating_add(1), 0, 0])
    }

    pub(crate) fn mask_indptr(&self) -> Result<RawTensor> {
        self.array(0)
    }
}

impl ItemTable {
    pub(crate) fn prefix_len(&self) -> Result<RawTensor> {
        self.array(0)
    }

    /// The longest item of each request; or, for kernels that must not skip
    /// the keys that this makes invisible, the largest number.
    pub(crate) fn max_item_len(&self, skips: bool) -> Result<RawTensor> {
        let (both, batch) = (self.array(1)?, self.host.batch_size());
        let start = if skips { 0 } else { batch };
        let data = both.data.cast::<u16>().wrapping_add(start).cast();
        let mut one = RawTensor::new(data, both.device, both.dtype, &[batch], None)?;
        one.stream = both.stream;
        Ok(one)
    }

    pub(crate) fn token_pos_in_items(&self) -> Result<RawTensor> {
        self.array(2)
    }
}

impl RowTable {
    /// Uploads the parts of rows, with room for up to `max_rows` in later
    /// updates; for `row_starts` and `row_to_batch` only if `host` has them.
    ///
    /// # Errors
    /// As [`new`](Self::new); also when there are more rows than that.
    pub fn with_capacity(stream: &Stream, host: RowIndices, max_rows: usize) -> Result<Self> {
        let room = |given: bool| if given { max_rows } else { 0 };
        let capacity = [max_rows, room(host.row_starts.is_some()), room(host.row_to_batch.is_some())];
        let have = (host.len(), max_rows, "rows");
        Self::allocate_for(stream, host, have, capacity)
    }

    /// Parts of rows whose device arrays exist already, for example because a
    /// kernel counts tokens; `row_starts` and `row_to_batch` are looked at if
    /// `host` has them.
    ///
    /// # Safety
    /// Whenever work that uses the table runs on `stream`, the device arrays
    /// must have as many entries as `host` has rows, and no part may end beyond
    /// [`host.end()`](RowIndices::end), start below 0 or have a length below 0,
    /// and no request may be below 0 or beyond
    /// [`host.batch_size()`](RowIndices::batch_size). They must stay allocated
    /// for as long as the table and that work live.
    pub unsafe fn from_device_unchecked(
        stream: &Stream,
        host: RowIndices,
        lengths: *const i32,
        row_starts: *const i32,
        row_to_batch: *const i32,
    ) -> Self {
        Self::borrowed(stream, host, [lengths.cast(), row_starts.cast(), row_to_batch.cast()])
    }

    pub(crate) fn lengths(&self) -> Result<RawTensor> {
        self.array(0)
    }

    pub(crate) fn row_starts(&self) -> Result<Option<RawTensor>> {
        self.host.row_starts.as_ref().map(|_| self.array(1)).transpose()
    }

    pub(crate) fn row_to_batch(&self) -> Result<Option<RawTensor>> {
        self.host.row_to_batch.as_ref().map(|_| self.array(2)).transpose()
    }
}

impl PackedTable {
    /// Uploads segments, with room for up to `max_segments` in later updates.
    ///
    /// # Errors
    /// As [`new`](Self::new); also when there are more segments than that.
    pub fn with_capacity(stream: &Stream, host: PackedIndices, max_segments: usize) -> Result<Self> {
        let (have, entries) = ((host.batch_size(), max_segments, "segments"), max_segments.saturating_add(1));
        Self::allocate_for(stream, host, have, [entries, entries, 0])
    }

    pub(crate) fn input_indptr(&self) -> Result<RawTensor> {
        self.array(0)
    }

    pub(crate) fn output_indptr(&self) -> Result<RawTensor> {
        self.array(1)
    }
}

#[cfg(test)]
mod tests {
    use sealed::Arrays;

    use super::*;
    use crate::tensor::DType::{self, I32, I64, U16, U32};

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
