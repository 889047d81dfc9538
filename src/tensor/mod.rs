//! One tensor type for everything the crate is given.
//!
//! [`TensorRef`] and [`TensorMut`] are views: a pointer, a device, an element
//! type, a shape and strides (in elements), held inline for up to
//! [`MAX_RANK`] dimensions, so that making one allocates nothing. The lifetime
//! is that of the storage they look into. Safe constructors exist for host
//! slices (here) and for cudarc slices (`flashinfer_rs::gpu`); a raw pointer
//! takes `unsafe`.

mod raw;

pub(crate) use raw::{Owner, RawTensor};

use std::{ffi::c_void, fmt, marker::PhantomData};

use crate::{
    device::Device,
    dtype::{DType, Element},
    error::{FlashInferError, Result},
};

/// The most dimensions a view can have.
pub const MAX_RANK: usize = 5;

macro_rules! view_methods {
    () => {
        /// Sizes of the dimensions.
        pub fn shape(&self) -> &[i64] {
            self.raw.shape()
        }

        /// Strides in elements, one for each dimension; never negative.
        pub fn strides(&self) -> &[i64] {
            self.raw.strides()
        }

        /// The element type.
        pub fn dtype(&self) -> DType {
            self.raw.dtype
        }

        /// Where the storage lives.
        pub fn device(&self) -> Device {
            self.raw.device
        }

        /// The number of dimensions.
        pub fn rank(&self) -> usize {
            self.raw.shape().len()
        }

        /// The number of elements.
        pub fn numel(&self) -> usize {
            self.raw.numel() as usize
        }

        /// Whether the elements lie in row-major order without gaps.
        /// Dimensions of size 1 do not matter, and a tensor without elements is.
        pub fn is_contiguous(&self) -> bool {
            self.raw.is_contiguous()
        }

        /// The address of the first element, on the view's device.
        pub fn data_ptr(&self) -> *mut c_void {
            self.raw.data
        }
    };
}

/// A shared view of a tensor whose storage lives for `'a`.
#[derive(Clone, Copy)]
pub struct TensorRef<'a> {
    pub(crate) raw: RawTensor,
    storage: PhantomData<&'a [u8]>,
}

/// An exclusive view of a tensor whose storage lives for `'a`.
pub struct TensorMut<'a> {
    pub(crate) raw: RawTensor,
    storage: PhantomData<&'a mut [u8]>,
}

impl<'a> TensorRef<'a> {
    /// A contiguous view of a host slice.
    ///
    /// # Errors
    /// The shape needs more elements than the slice has.
    ///
    /// ```
    /// # use flashinfer_rs::TensorRef;
    /// let x = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0];
    /// let view = TensorRef::from_slice(&x, &[2, 3])?;
    /// assert_eq!(view.strides(), [3, 1]);
    /// # Ok::<(), flashinfer_rs::FlashInferError>(())
    /// ```
    pub fn from_slice<T: Element>(slice: &'a [T], shape: &[usize]) -> Result<Self> {
        Self::from_slice_strided(slice, shape, None)
    }

    /// A view of a host slice with explicit strides, in elements.
    ///
    /// # Errors
    /// Shape and strides reach beyond the slice.
    pub fn from_slice_strided<T: Element>(
        slice: &'a [T],
        shape: &[usize],
        strides: Option<&[usize]>,
    ) -> Result<Self> {
        let raw = RawTensor::new(slice.as_ptr().cast_mut().cast(), Device::Cpu, T::DTYPE, shape, strides)?;
        raw.check_fits(slice.len())?;
        Ok(Self::new(raw))
    }

    pub(crate) fn new(raw: RawTensor) -> Self {
        Self { raw, storage: PhantomData }
    }

    /// A view of memory that the caller answers for. `strides` are in
    /// elements; `None` means row-major.
    ///
    /// # Errors
    /// More than [`MAX_RANK`] dimensions, or sizes beyond the address space.
    ///
    /// # Safety
    /// For all of `'a`, `data` must point to memory on `device` that holds
    /// elements of `dtype` at every place that shape and strides reach, that
    /// nobody writes, and that may be read by work on any stream the view is
    /// used with (the caller orders it after the work that wrote it). The
    /// memory must stay allocated until that work has finished, which may be
    /// after `'a`.
    pub unsafe fn from_raw_parts(
        data: *const c_void,
        device: Device,
        dtype: DType,
        shape: &[usize],
        strides: Option<&[usize]>,
    ) -> Result<Self> {
        Ok(Self::new(RawTensor::new(data.cast_mut(), device, dtype, shape, strides)?))
    }

    view_methods!();

    /// The view with its axes in another order.
    ///
    /// # Errors
    /// `axes` is not a permutation of the view's axes.
    pub fn permute(self, axes: &[usize]) -> Result<Self> {
        self.raw.permute(axes).map(Self::new)
    }

    /// Entries `start..start + len` of `axis`.
    ///
    /// # Errors
    /// The range lies outside the axis.
    pub fn narrow(self, axis: usize, start: usize, len: usize) -> Result<Self> {
        self.raw.narrow(axis, start, len).map(Self::new)
    }

    /// Entry `index` of `axis`, which disappears.
    ///
    /// # Errors
    /// There is no such axis or entry.
    pub fn select(self, axis: usize, index: usize) -> Result<Self> {
        self.raw.select(axis, index).map(Self::new)
    }
}

impl<'a> TensorMut<'a> {
    /// A contiguous view of a host slice.
    ///
    /// # Errors
    /// The shape needs more elements than the slice has.
    pub fn from_slice<T: Element>(slice: &'a mut [T], shape: &[usize]) -> Result<Self> {
        Self::from_slice_strided(slice, shape, None)
    }

    /// A view of a host slice with explicit strides, in elements.
    ///
    /// # Errors
    /// Shape and strides reach beyond the slice, or let two indices name one
    /// element.
    pub fn from_slice_strided<T: Element>(
        slice: &'a mut [T],
        shape: &[usize],
        strides: Option<&[usize]>,
    ) -> Result<Self> {
        let raw = RawTensor::new(slice.as_mut_ptr().cast(), Device::Cpu, T::DTYPE, shape, strides)?;
        Self::checked(raw, slice.len())
    }

    pub(crate) fn checked(raw: RawTensor, len: usize) -> Result<Self> {
        raw.check_fits(len)?;
        if raw.may_overlap() {
            return Err(FlashInferError::invalid(
                "tensor view",
                "strides",
                format!(
                    "shape {:?} with strides {:?} may name one element twice, which a writable view must not",
                    raw.shape(),
                    raw.strides()
                ),
            ));
        }
        Ok(Self::new(raw))
    }

    pub(crate) fn new(raw: RawTensor) -> Self {
        Self { raw, storage: PhantomData }
    }

    /// A writable view of memory that the caller answers for. `strides` are in
    /// elements; `None` means row-major.
    ///
    /// # Errors
    /// More than [`MAX_RANK`] dimensions, or sizes beyond the address space.
    ///
    /// # Safety
    /// As [`TensorRef::from_raw_parts`], and for all of `'a` nobody else reads
    /// or writes the memory, and no two indices name the same element.
    pub unsafe fn from_raw_parts(
        data: *mut c_void,
        device: Device,
        dtype: DType,
        shape: &[usize],
        strides: Option<&[usize]>,
    ) -> Result<Self> {
        Ok(Self::new(RawTensor::new(data, device, dtype, shape, strides)?))
    }

    view_methods!();

    /// A shared view of the same tensor.
    pub fn as_ref(&self) -> TensorRef<'_> {
        TensorRef::new(self.raw)
    }

    /// The same exclusive view for a shorter time.
    pub fn reborrow(&mut self) -> TensorMut<'_> {
        TensorMut::new(self.raw)
    }

    /// The view with its axes in another order.
    ///
    /// # Errors
    /// `axes` is not a permutation of the view's axes.
    pub fn permute(self, axes: &[usize]) -> Result<Self> {
        self.raw.permute(axes).map(Self::new)
    }

    /// Entries `start..start + len` of `axis`.
    ///
    /// # Errors
    /// The range lies outside the axis.
    pub fn narrow(self, axis: usize, start: usize, len: usize) -> Result<Self> {
        self.raw.narrow(axis, start, len).map(Self::new)
    }

    /// Entry `index` of `axis`, which disappears.
    ///
    /// # Errors
    /// There is no such axis or entry.
    pub fn select(self, axis: usize, index: usize) -> Result<Self> {
        self.raw.select(axis, index).map(Self::new)
    }

    /// Entries before `middle` of an axis, and the others, as for the two
    /// caches of latent attention that are parts of one `[pages, page_size, 576]`.
    ///
    /// # Errors
    /// The axis does not exist or has fewer entries.
    pub fn split_at(self, axis: usize, middle: usize) -> Result<(Self, Self)> {
        let head = self.raw.narrow(axis, 0, middle)?;
        let rest = self.raw.shape()[axis] as usize - middle;
        Ok((Self::new(head), Self::new(self.raw.narrow(axis, middle, rest)?)))
    }

    /// The two entries of an axis of size 2, as for K and V that are stored
    /// together in `[pages, 2, …]`.
    ///
    /// # Errors
    /// The axis does not exist or has another size.
    pub fn unbind_pair(self, axis: usize) -> Result<(Self, Self)> {
        self.raw.check_axis(axis)?;
        if self.raw.shape()[axis] != 2 {
            return Err(FlashInferError::invalid(
                "tensor view",
                "axis",
                format!("axis {axis} has {} entries; a pair needs 2", self.raw.shape()[axis]),
            ));
        }
        Ok((Self::new(self.raw.select(axis, 0)?), Self::new(self.raw.select(axis, 1)?)))
    }
}

macro_rules! view_debug {
    ($name:ident) => {
        impl fmt::Debug for $name<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(
                    f,
                    concat!(stringify!($name), "({} {:?}, strides {:?}, {})"),
                    self.dtype(),
                    self.shape(),
                    self.strides(),
                    self.device()
                )
            }
        }
    };
}
view_debug!(TensorRef);
view_debug!(TensorMut);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_stay_inside_their_slice() {
        let x = [0f32; 12];
        assert!(TensorRef::from_slice(&x, &[3, 4]).is_ok());
        assert!(TensorRef::from_slice(&x, &[3, 5]).is_err());
        assert!(TensorRef::from_slice_strided(&x, &[3, 2], Some(&[5, 1])).is_ok());
        assert!(TensorRef::from_slice_strided(&x, &[3, 3], Some(&[5, 1])).is_err());
        assert!(TensorRef::from_slice(&x, &[usize::MAX, usize::MAX]).is_err());
        assert!(TensorRef::from_slice(&x, &[1, 1, 1, 1, 1, 1]).is_err());
        assert!(TensorRef::from_slice_strided(&x, &[2, 2], Some(&[usize::MAX / 2, 1])).is_err());
        let empty = TensorRef::from_slice(&x, &[0, 4]).unwrap();
        assert_eq!(empty.numel(), 0);
        // Strides that nothing reaches overflow nowhere.
        let far =
            TensorRef::from_slice_strided(&x, &[0, 5, 5], Some(&[1, i64::MAX as usize, i64::MAX as usize]));
        assert_eq!(far.unwrap().narrow(1, 3, 1).unwrap().numel(), 0);
        let mut y = [0f32; 1];
        let far =
            TensorMut::from_slice_strided(&mut y, &[5, 0], Some(&[i64::MAX as usize, i64::MAX as usize]));
        assert_eq!(far.unwrap().numel(), 0);
    }

    #[test]
    fn strides_of_single_entries_become_plain() {
        let x = [0f32; 64];
        let odd = TensorRef::from_slice_strided(&x, &[1, 1, 4], Some(&[3, 7, 1])).unwrap();
        assert_eq!(odd.raw.with_plain_unit_strides().strides(), [4, 4, 1]);
        let odd = TensorRef::from_slice_strided(&x, &[2, 1, 4], Some(&[20, 7, 1])).unwrap();
        assert_eq!(odd.raw.with_plain_unit_strides().strides(), [20, 4, 1]);
        let odd = TensorRef::from_slice_strided(&x, &[1, 2, 4], Some(&[1, 20, 1])).unwrap();
        assert_eq!(odd.raw.with_plain_unit_strides().strides(), [40, 20, 1]);
    }

    #[test]
    fn a_tensor_is_one_row() {
        let x = [0f32; 64];
        let view = TensorRef::from_slice_strided(&x, &[2, 4], Some(&[20, 1])).unwrap();
        let row = view.raw.as_one_row().unwrap();
        assert_eq!((row.shape(), row.strides()), (&[1, 2, 4][..], &[40, 20, 1][..]));
        assert_eq!(row.as_one_row().unwrap().shape(), [1, 1, 2, 4]);
        let full = TensorRef::from_slice(&x, &[1, 1, 1, 1, 64]).unwrap();
        assert!(full.raw.as_one_row().unwrap_err().to_string().contains("at most 4"));
        let number = TensorRef::from_slice(&x, &[]).unwrap();
        assert_eq!(number.raw.as_one_row().unwrap().shape(), [1]);
    }

    #[test]
    fn writable_views_name_each_element_once() {
        let mut x = [0f32; 12];
        assert!(TensorMut::from_slice_strided(&mut x, &[3, 4], Some(&[0, 1])).is_err());
        assert!(TensorMut::from_slice_strided(&mut x, &[3, 4], Some(&[2, 1])).is_err());
        assert!(TensorMut::from_slice_strided(&mut x, &[3, 4], Some(&[1, 3])).is_ok());
        assert!(TensorRef::from_slice_strided(&x, &[3, 4], Some(&[0, 1])).is_ok());
    }

    #[test]
    fn permute_narrow_select_and_unbind() {
        let mut x: Vec<i32> = (0..24).collect();
        let base = x.as_ptr();
        let view = TensorRef::from_slice(&x, &[2, 3, 4]).unwrap();
        let moved = view.permute(&[1, 0, 2]).unwrap();
        assert_eq!((moved.shape(), moved.strides()), (&[3, 2, 4][..], &[4, 12, 1][..]));
        assert!(!moved.is_contiguous() && view.is_contiguous());
        assert!(view.permute(&[0, 0, 1]).is_err() && view.permute(&[0, 1]).is_err());
        let part = view.narrow(1, 1, 2).unwrap();
        assert_eq!(part.data_ptr().cast_const().cast(), base.wrapping_add(4));
        assert!(view.narrow(1, 2, 2).is_err() && view.narrow(3, 0, 1).is_err());
        assert!(view.narrow(1, usize::MAX, 2).is_err());
        let row = view.select(0, 1).unwrap();
        assert_eq!((row.shape(), row.strides()), (&[3, 4][..], &[4, 1][..]));
        assert_eq!(row.data_ptr().cast_const().cast(), base.wrapping_add(12));
        assert!(view.select(0, 2).is_err());
        let (a, b) = TensorMut::from_slice(&mut x, &[2, 3, 4]).unwrap().unbind_pair(0).unwrap();
        assert_eq!((a.shape(), b.shape()), (&[3, 4][..], &[3, 4][..]));
        assert!(a.unbind_pair(0).is_err());
        let (a, b) = TensorMut::from_slice(&mut x, &[2, 3, 4]).unwrap().split_at(2, 3).unwrap();
        assert_eq!((a.shape(), a.strides()), (&[2, 3, 3][..], &[12, 4, 1][..]));
        assert_eq!((b.shape(), b.data_ptr().cast_const().cast()), (&[2, 3, 1][..], base.wrapping_add(3)));
        let all = a.split_at(2, 3).unwrap();
        assert_eq!((all.0.numel(), all.1.numel()), (18, 0));
        assert!(all.0.split_at(2, 4).is_err());
    }
}
