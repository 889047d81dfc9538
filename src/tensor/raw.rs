//! What a view is made of: no lifetime, and no promise about the memory.

use std::{
    any::Any,
    ffi::c_void,
    panic::{RefUnwindSafe, UnwindSafe},
    sync::Arc,
};

use super::MAX_RANK;
use crate::{
    device::Device,
    dtype::DType,
    error::{FlashInferError, Result},
    stream::StreamId,
};

/// What owns a view's memory: the content of an `Arc` that is alive as long as
/// the view may be used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner(*const (dyn Any + Send + Sync));

// A pointer; nothing is reached through it but the count of references.
impl UnwindSafe for Owner {}

impl RefUnwindSafe for Owner {}

impl Owner {
    pub(crate) fn of<T: Any + Send + Sync>(memory: &Arc<T>) -> Self {
        let content: *const T = Arc::as_ptr(memory);
        Self(content)
    }

    /// A share of it.
    ///
    /// # Safety
    /// The view must be alive.
    pub(crate) unsafe fn share(self) -> Arc<dyn Any + Send + Sync> {
        // SAFETY: the pointer came from an `Arc`, which is alive (the caller's
        // promise), so that there is a count to raise; the new share is ours.
        unsafe {
            Arc::increment_strong_count(self.0);
            Arc::from_raw(self.0)
        }
    }
}

/// The untyped, lifetime-free content of a view.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawTensor {
    pub(crate) data: *mut c_void,
    pub(crate) device: Device,
    pub(crate) dtype: DType,
    /// The stream that the constructor ordered the storage for, if it did.
    pub(crate) stream: Option<StreamId>,
    /// What owns the memory, if that is known.
    pub(crate) owner: Option<Owner>,
    rank: u8,
    shape: [i64; MAX_RANK],
    strides: [i64; MAX_RANK],
}

// SAFETY: an address plus numbers. What reads or writes there is bound by the
// lifetimes of views to storage whose elements are plain data (`Element: Send +
// Sync`); on a device, access is ordered by streams, not by threads.
unsafe impl Send for RawTensor {}

// SAFETY: as for `Send`; nothing writes through a shared one but kernels that
// were given exclusive views.
unsafe impl Sync for RawTensor {}

impl RawTensor {
    /// Checks shape and strides and builds the view. The pointer is not looked at.
    pub(crate) fn new(
        data: *mut c_void,
        device: Device,
        dtype: DType,
        shape: &[usize],
        strides: Option<&[usize]>,
    ) -> Result<Self> {
        const OP: &str = "tensor view";
        let invalid = |problem: String| FlashInferError::invalid(OP, "shape", problem);
        if shape.len() > MAX_RANK {
            return Err(invalid(format!("{} dimensions; at most {MAX_RANK} are supported", shape.len())));
        }
        if strides.is_some_and(|strides| strides.len() != shape.len()) {
            return Err(invalid("shape and strides differ in their number of dimensions".into()));
        }
        let mut raw = Self {
            data,
            device,
            dtype,
            stream: None,
            owner: None,
            rank: shape.len() as u8,
            shape: [1; MAX_RANK],
            strides: [1; MAX_RANK],
        };
        let mut packed: i64 = 1;
        for axis in (0..shape.len()).rev() {
            let too_large = || invalid(format!("{shape:?} does not fit the address space"));
            raw.shape[axis] = i64::try_from(shape[axis]).map_err(|_| too_large())?;
            raw.strides[axis] = match strides {
                // Without elements, strides mean nothing, and are kept small.
                Some(strides) if !shape.contains(&0) => {
                    i64::try_from(strides[axis]).map_err(|_| too_large())?
                }
                _ => packed,
            };
            packed = packed.checked_mul(raw.shape[axis].max(1)).ok_or_else(too_large)?;
        }
        let bytes = raw.extent().and_then(|extent| extent.checked_mul(dtype.size() as i64));
        if packed.checked_mul(dtype.size() as i64).is_none() || bytes.is_none() {
            return Err(invalid(format!("{shape:?} with these strides does not fit the address space")));
        }
        Ok(raw)
    }

    pub(crate) fn shape(&self) -> &[i64] {
        &self.shape[..self.rank as usize]
    }

    pub(crate) fn strides(&self) -> &[i64] {
        &self.strides[..self.rank as usize]
    }

    pub(crate) fn numel(&self) -> i64 {
        self.shape().iter().product()
    }

    /// Elements from the first to one past the last that the view can reach.
    fn extent(&self) -> Option<i64> {
        if self.shape().contains(&0) {
            return Some(0);
        }
        let mut last: i64 = 0;
        for (&size, &stride) in self.shape().iter().zip(self.strides()) {
            last = last.checked_add((size - 1).checked_mul(stride)?)?;
        }
        last.checked_add(1)
    }

    pub(crate) fn is_contiguous(&self) -> bool {
        let mut packed = 1;
        self.shape().contains(&0)
            || self.shape().iter().zip(self.strides()).rev().all(|(&size, &stride)| {
                let fits = size == 1 || stride == packed;
                packed *= size;
                fits
            })
    }

    /// The same tensor with row-major strides for dimensions of size 1, whose
    /// strides mean nothing but may be looked at.
    pub(crate) fn with_plain_unit_strides(mut self) -> Self {
        let mut packed = 1;
        for axis in (0..self.rank as usize).rev() {
            if self.shape[axis] == 1 {
                self.strides[axis] = packed;
            }
            packed = packed.max(self.shape[axis].saturating_mul(self.strides[axis]));
        }
        self
    }

    /// The same tensor as the only entry of a further, first dimension.
    pub(crate) fn as_one_row(mut self) -> Result<Self> {
        let rank = self.rank as usize;
        if rank == MAX_RANK {
            return Err(FlashInferError::invalid(
                "tensor view",
                "shape",
                format!("{rank} dimensions; at most {} can be the row of another view", MAX_RANK - 1),
            ));
        }
        let stride = if rank == 0 { 1 } else { self.shape[0].saturating_mul(self.strides[0]) };
        for (array, first) in [(&mut self.shape, 1), (&mut self.strides, stride)] {
            array.copy_within(..rank, 1);
            array[0] = first;
        }
        self.rank += 1;
        Ok(self)
    }

    /// Whether two different indices can name the same element. Conservative:
    /// `true` for some exotic but disjoint stride patterns.
    pub(crate) fn may_overlap(&self) -> bool {
        let mut axes: [(i64, i64); MAX_RANK] = [(0, 1); MAX_RANK];
        for (axis, (&size, &stride)) in axes.iter_mut().zip(self.shape().iter().zip(self.strides())) {
            *axis = (stride, size);
        }
        axes.sort_unstable();
        let mut reach = 0;
        axes.iter().filter(|(_, size)| *size > 1).any(|&(stride, size)| {
            let overlaps = stride <= reach;
            reach += stride * (size - 1);
            overlaps
        })
    }

    pub(crate) fn check_fits(&self, len: usize) -> Result<()> {
        match self.extent() {
            Some(extent) if extent as u64 <= len as u64 => Ok(()),
            extent => Err(FlashInferError::invalid(
                "tensor view",
                "shape",
                format!(
                    "shape {:?} with strides {:?} reaches {} elements, but the slice holds {len}",
                    self.shape(),
                    self.strides(),
                    extent.unwrap_or(i64::MAX),
                ),
            )),
        }
    }

    pub(super) fn check_axis(&self, axis: usize) -> Result<()> {
        if axis < self.rank as usize {
            return Ok(());
        }
        Err(FlashInferError::invalid(
            "tensor view",
            "axis",
            format!("axis {axis} of a tensor with {} dimensions", self.rank),
        ))
    }

    fn offset(&self, elements: i64) -> *mut c_void {
        self.data.cast::<u8>().wrapping_add(elements as usize * self.dtype.size()).cast()
    }

    pub(super) fn permute(&self, axes: &[usize]) -> Result<Self> {
        let mut out = *self;
        let mut seen = [false; MAX_RANK];
        if axes.len() != self.rank as usize {
            return Err(FlashInferError::invalid(
                "tensor view",
                "axes",
                format!("{axes:?} for a tensor with {} dimensions", self.rank),
            ));
        }
        for (to, &from) in axes.iter().enumerate() {
            self.check_axis(from)?;
            if std::mem::replace(&mut seen[from], true) {
                return Err(FlashInferError::invalid(
                    "tensor view",
                    "axes",
                    format!("{axes:?} names an axis twice"),
                ));
            }
            (out.shape[to], out.strides[to]) = (self.shape[from], self.strides[from]);
        }
        Ok(out)
    }

    pub(super) fn narrow(&self, axis: usize, start: usize, len: usize) -> Result<Self> {
        self.check_axis(axis)?;
        if start.checked_add(len).is_none_or(|end| end as u64 > self.shape[axis] as u64) {
            return Err(FlashInferError::invalid(
                "tensor view",
                "range",
                format!("{start}..{start}+{len} of axis {axis}, which has {} entries", self.shape[axis]),
            ));
        }
        let mut out = *self;
        // An empty range may start one past the end: keep the pointer inside.
        let start = if len == 0 { 0 } else { start as i64 };
        out.data = self.offset(start * self.strides[axis]);
        out.shape[axis] = len as i64;
        Ok(out)
    }

    pub(super) fn select(&self, axis: usize, index: usize) -> Result<Self> {
        let narrowed = self.narrow(axis, index, 1)?;
        let mut out = narrowed;
        let rank = self.rank as usize;
        out.shape.copy_within(axis + 1..rank, axis);
        out.strides.copy_within(axis + 1..rank, axis);
        (out.shape[rank - 1], out.strides[rank - 1]) = (1, 1);
        out.rank -= 1;
        Ok(out)
    }
}
