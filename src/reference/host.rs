//! Element access to tensors in host memory.
//!
//! A tensor is seen as rows: the elements of its last dimension, numbered in
//! row-major order of the other dimensions. Every access goes through a row
//! number that is compared with the number of rows, so this file alone has to
//! be right about memory.

use std::marker::PhantomData;

use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};

use super::strict;
use crate::{
    device::Device,
    dtype::DType,
    error::{FlashInferError, Result},
    ops::check::Check,
    tensor::{RawTensor, TensorMut, TensorRef},
};

/// Element types of floats.
pub(super) const FLOATS: [DType; 6] =
    [DType::F16, DType::BF16, DType::F32, DType::F64, DType::E4M3, DType::E5M2];
/// Element types that can be read and written as numbers: floats, and the
/// integers of indices and of packed bits.
const NUMBERS: [DType; 8] =
    [DType::F16, DType::BF16, DType::F32, DType::F64, DType::E4M3, DType::E5M2, DType::I32, DType::U8];
/// Element types that every tensor of every operation may have here.
const WIDE: [DType; 2] = [DType::F32, DType::F64];

/// Checks the arguments of one operation.
#[derive(Clone, Copy)]
pub(super) struct HostCheck {
    pub(super) op: &'static str,
}

impl HostCheck {
    pub(super) fn fail<T>(self, argument: &'static str, problem: String) -> Result<T> {
        Err(FlashInferError::invalid(self.op, argument, problem))
    }

    /// Runs the checks of the operation's kernel where the thread is strict.
    pub(super) fn as_kernel<T>(self, checks: impl FnOnce(&Check<'_>) -> Result<T>) -> Result<()> {
        strict::as_kernel(self.op.trim_start_matches("reference::"), checks)
    }

    /// The rows of a host tensor of one of these dtypes, or of a wide one.
    pub(super) fn rows<'a>(
        self,
        argument: &'static str,
        tensor: &'a TensorRef<'_>,
        dtypes: &[DType],
        ranks: &[usize],
    ) -> Result<Rows<'a>> {
        self.raw_rows(argument, tensor.raw, dtypes, ranks)
    }

    /// As [`rows`](Self::rows), to write.
    pub(super) fn rows_mut<'a>(
        self,
        argument: &'static str,
        tensor: &'a mut TensorMut<'_>,
        dtypes: &[DType],
        ranks: &[usize],
    ) -> Result<RowsMut<'a>> {
        let rows = self.raw_rows(argument, tensor.raw, dtypes, ranks)?;
        Ok(RowsMut { rows, exclusive: PhantomData })
    }

    fn raw_rows<'a>(
        self,
        argument: &'static str,
        raw: RawTensor,
        dtypes: &[DType],
        ranks: &[usize],
    ) -> Result<Rows<'a>> {
        if raw.device != Device::Cpu {
            return self.fail(argument, format!("it is on {}; expected cpu", raw.device));
        }
        let allowed = || NUMBERS.into_iter().filter(|dtype| dtypes.contains(dtype) || WIDE.contains(dtype));
        if !allowed().any(|dtype| dtype == raw.dtype) {
            let names: Vec<_> = allowed().map(DType::name).collect();
            return self
                .fail(argument, format!("its dtype is {}; expected {}", raw.dtype, names.join(" or ")));
        }
        let Some((&width, outer)) = raw.shape().split_last().filter(|_| ranks.contains(&raw.shape().len()))
        else {
            return self
                .fail(argument, format!("its shape is {:?}; expected {ranks:?} dimensions", raw.shape()));
        };
        let (count, width) = (outer.iter().product::<i64>() as usize, width as usize);
        Ok(Rows { raw, count, width, storage: PhantomData })
    }

    /// The bytes of a one-dimensional host tensor of `u8` or bool that are not 0.
    pub(super) fn flags(self, argument: &'static str, tensor: &TensorRef<'_>) -> Result<Vec<bool>> {
        let raw = tensor.raw;
        if raw.device != Device::Cpu {
            return self.fail(argument, format!("it is on {}; expected cpu", raw.device));
        }
        if !matches!(raw.dtype, DType::U8 | DType::Bool) {
            return self.fail(argument, format!("its dtype is {}; expected u8 or bool", raw.dtype));
        }
        let (&[len], &[stride]) = (raw.shape(), raw.strides()) else {
            return self.fail(argument, format!("its shape is {:?}; expected one dimension", raw.shape()));
        };
        let start = raw.data.cast::<u8>();
        // SAFETY: the view is of host memory that holds a byte wherever its
        // shape and stride reach, and the place is inside the shape.
        Ok((0..len).map(|at| unsafe { start.add((at * stride) as usize).read() } != 0).collect())
    }

    /// The numbers of a one-dimensional host tensor of `i32` or `i64`.
    pub(super) fn integers(self, argument: &'static str, tensor: &TensorRef<'_>) -> Result<Vec<i64>> {
        let raw = tensor.raw;
        if raw.device != Device::Cpu {
            return self.fail(argument, format!("it is on {}; expected cpu", raw.device));
        }
        let (&[len], &[stride]) = (raw.shape(), raw.strides()) else {
            return self.fail(argument, format!("its shape is {:?}; expected one dimension", raw.shape()));
        };
        macro_rules! read {
            ($ty:ty) => {
                // SAFETY: the view is of host memory that holds a number of this
                // type wherever its shape and stride reach, and the place is
                // inside the shape.
                |at| unsafe { raw.data.cast::<$ty>().add((at * stride) as usize).read_unaligned().into() }
            };
        }
        match raw.dtype {
            DType::I32 => Ok((0..len).map(read!(i32)).collect()),
            DType::I64 => Ok((0..len).map(read!(i64)).collect()),
            other => self.fail(argument, format!("its dtype is {other}; expected i32 or i64")),
        }
    }

    pub(super) fn shape(self, argument: &'static str, rows: &Rows<'_>, expected: &[i64]) -> Result<()> {
        if rows.shape() == expected {
            return Ok(());
        }
        self.fail(argument, format!("its shape is {:?}; expected {expected:?}", rows.shape()))
    }
}

/// The rows of a host tensor, to read.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    raw: RawTensor,
    count: usize,
    width: usize,
    storage: PhantomData<&'a [u8]>,
}

impl Rows<'_> {
    pub(super) fn dtype(&self) -> DType {
        self.raw.dtype
    }

    pub(super) fn shape(&self) -> &[i64] {
        self.raw.shape()
    }

    /// The number of rows.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Elements of a row.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Where a row starts.
    fn start(&self, row: usize) -> *mut u8 {
        assert!(row < self.count, "row {row} of {}", self.count);
        let outer = self.raw.shape().len() - 1;
        let (mut rest, mut offset) = (row, 0);
        for (&size, &stride) in self.raw.shape()[..outer].iter().zip(self.raw.strides()).rev() {
            offset += rest % size as usize * stride as usize;
            rest /= size as usize;
        }
        self.raw.data.cast::<u8>().wrapping_add(offset * self.raw.dtype.size())
    }

    /// Elements between neighbours of a row.
    fn step(&self) -> usize {
        self.raw.strides().last().map_or(1, |&stride| stride as usize)
    }

    /// Reads a row as numbers; `into` has its width.
    pub(super) fn read(&self, row: usize, into: &mut [f64]) {
        assert_eq!(into.len(), self.width);
        let (start, step) = (self.start(row), self.step());
        macro_rules! read {
            ($ty:ty, $to:expr) => {
                for (at, number) in into.iter_mut().enumerate() {
                    // SAFETY: the view is of host memory that holds elements of
                    // this type wherever its shape and strides reach, and the
                    // row and the place in it are inside the shape.
                    let element = unsafe { start.cast::<$ty>().add(at * step).read_unaligned() };
                    *number = $to(element);
                }
            };
        }
        match self.raw.dtype {
            DType::F16 => read!(f16, f16::to_f64),
            DType::BF16 => read!(bf16, bf16::to_f64),
            DType::F32 => read!(f32, f64::from),
            DType::F64 => read!(f64, f64::from),
            DType::E4M3 => read!(F8E4M3, |element: F8E4M3| element.to_f64()),
            DType::E5M2 => read!(F8E5M2, |element: F8E5M2| element.to_f64()),
            DType::I32 => read!(i32, f64::from),
            DType::U8 => read!(u8, f64::from),
            other => unreachable!("{other} is not one of the dtypes that `HostCheck::rows` lets through"),
        }
    }

    /// A row as new numbers.
    pub(super) fn numbers(&self, row: usize) -> Vec<f64> {
        let mut numbers = vec![0.0; self.width];
        self.read(row, &mut numbers);
        numbers
    }
}

/// The rows of a host tensor, to write.
pub(super) struct RowsMut<'a> {
    pub(super) rows: Rows<'a>,
    exclusive: PhantomData<&'a mut [u8]>,
}

impl RowsMut<'_> {
    /// Writes a row, rounded to the tensor's dtype; `from` has its width.
    pub(super) fn write(&mut self, row: usize, from: &[f64]) {
        assert_eq!(from.len(), self.rows.width);
        let (start, step) = (self.rows.start(row), self.rows.step());
        macro_rules! write {
            ($ty:ty, $from:expr) => {
                for (at, &number) in from.iter().enumerate() {
                    let element: $ty = $from(number);
                    // SAFETY: as in `Rows::read`; the view is exclusive.
                    unsafe { start.cast::<$ty>().add(at * step).write_unaligned(element) };
                }
            };
        }
        match self.rows.raw.dtype {
            DType::F16 => write!(f16, |number| f16::from_f32(to_odd(number))),
            DType::BF16 => write!(bf16, |number| bf16::from_f32(to_odd(number))),
            DType::F32 => write!(f32, |number| number as f32),
            DType::F64 => write!(f64, |number| number),
            DType::E4M3 => write!(F8E4M3, F8E4M3::from_f64),
            DType::E5M2 => write!(F8E5M2, F8E5M2::from_f64),
            DType::I32 => write!(i32, |number| number as i32),
            DType::U8 => write!(u8, |number| number as u8),
            other => unreachable!("{other} is not one of the dtypes that `HostCheck::rows` lets through"),
        }
    }

    /// Copies a row of a tensor of the same dtype and width, bit by bit.
    pub(super) fn copy(&mut self, row: usize, source: &Rows<'_>, source_row: usize) {
        assert_eq!((source.dtype(), source.width), (self.rows.dtype(), self.rows.width));
        let size = self.rows.raw.dtype.size();
        let (from, to) = (source.start(source_row), self.rows.start(row));
        let (from_step, to_step) = (source.step() * size, self.rows.step() * size);
        for at in 0..self.rows.width {
            // SAFETY: both views are of host memory with elements of this size,
            // and row and place are inside their shapes; the target is
            // exclusive, so the two do not overlap.
            unsafe { from.add(at * from_step).copy_to_nonoverlapping(to.add(at * to_step), size) };
        }
    }
}

/// Rounds to `f32` so that rounding once more, to 16 bits, gives the nearest
/// number: a result that is not exact gets an odd last bit, and so is never
/// taken for a tie. (`half`'s own conversion from `f64` ignores the lower half
/// of the number.)
fn to_odd(number: f64) -> f32 {
    let nearest = number as f32;
    if f64::from(nearest) == number || number.is_nan() {
        return nearest;
    }
    let beyond = f64::from(nearest).abs() > number.abs();
    f32::from_bits((nearest.to_bits() - u32::from(beyond)) | 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_follow_shape_and_strides() {
        let numbers: Vec<f32> = (0..24u8).map(f32::from).collect();
        let view = TensorRef::from_slice(&numbers, &[2, 3, 4]).unwrap().permute(&[1, 0, 2]).unwrap();
        let check = HostCheck { op: "test" };
        let rows = check.rows("x", &view, &[], &[3]).unwrap();
        assert_eq!((rows.count(), rows.width()), (6, 4));
        // Row 3 is [1, 1], which is [1, 1] of the storage.
        assert_eq!(rows.numbers(3), [16.0, 17.0, 18.0, 19.0]);
        let columns = TensorRef::from_slice(&numbers, &[6, 4]).unwrap().permute(&[1, 0]).unwrap();
        let rows = check.rows("x", &columns, &[], &[2]).unwrap();
        assert_eq!(rows.numbers(1), [1.0, 5.0, 9.0, 13.0, 17.0, 21.0]);
    }

    #[test]
    fn numbers_are_rounded_to_each_dtype() {
        fn through<T: crate::Element + Default>(number: f64) -> f64 {
            let mut storage = [T::default(); 1];
            let mut view = TensorMut::from_slice(&mut storage, &[1]).unwrap();
            let mut rows = HostCheck { op: "test" }.rows_mut("x", &mut view, &FLOATS, &[1]).unwrap();
            rows.write(0, &[number]);
            rows.rows.numbers(0)[0]
        }
        // 1.2 to 10, 7, 23, 52, 3 and 2 bits of mantissa.
        assert_eq!(through::<f16>(1.2), 1.2001953125);
        assert_eq!(through::<bf16>(1.2), 1.203125);
        assert_eq!(through::<f32>(1.2), f64::from(1.2f32));
        assert_eq!(through::<f64>(1.2), 1.2);
        assert_eq!(through::<F8E4M3>(1.2), 1.25);
        assert_eq!(through::<F8E5M2>(1.2), 1.25);
        assert_eq!(through::<F8E4M3>(-9.0), -9.0);
        assert_eq!(through::<F8E5M2>(-9.0), -8.0);
    }

    #[test]
    fn rounding_to_16_bits_sees_every_bit() {
        let little = 2f64.powi(-40);
        // Ties between neighbours, and what lies just beside them.
        let (step, half) = (2f64.powi(-10), 2f64.powi(-11));
        for (number, nearest) in [
            (1.0 + half, 1.0),
            (1.0 + half + little, 1.0 + step),
            (1.0 + half - little, 1.0),
            (1.0 + 3.0 * half, 1.0 + 2.0 * step),
            (1.0 + 3.0 * half - little, 1.0 + step),
            (65519.9, 65504.0),
            (65520.0, f64::INFINITY),
            (1e300, f64::INFINITY),
            (2f64.powi(-25), 0.0),
            (2f64.powi(-25) + 2f64.powi(-70), 2f64.powi(-24)),
            (1e-300, 0.0),
        ] {
            assert_eq!(f16::from_f32(to_odd(number)).to_f64(), nearest, "{number:e}");
            assert_eq!(f16::from_f32(to_odd(-number)).to_f64(), -nearest, "-{number:e}");
        }
        let (step, half) = (2f64.powi(-7), 2f64.powi(-8));
        assert_eq!(bf16::from_f32(to_odd(1.0 + half)).to_f64(), 1.0);
        assert_eq!(bf16::from_f32(to_odd(1.0 + half + little)).to_f64(), 1.0 + step);
        assert_eq!(bf16::from_f32(to_odd(1.0 + 3.0 * half - little)).to_f64(), 1.0 + step);
        assert!(f16::from_f32(to_odd(f64::NAN)).is_nan());
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        let check = HostCheck { op: "test" };
        let integers = [1i32; 4];
        let view = TensorRef::from_slice(&integers, &[4]).unwrap();
        assert!(check.rows("x", &view, &FLOATS, &[1]).is_err());
        let halves = [f16::ONE; 4];
        let view = TensorRef::from_slice(&halves, &[4]).unwrap();
        assert!(check.rows("x", &view, &[DType::BF16], &[1]).is_err());
        assert!(check.rows("x", &view, &FLOATS, &[2, 3]).is_err());
        let scalar = TensorRef::from_slice(&halves, &[]).unwrap();
        assert!(check.rows("x", &scalar, &FLOATS, &[0, 1]).is_err());
        // SAFETY: the tensor is refused, so nothing looks at the address.
        let device =
            unsafe { TensorRef::from_raw_parts(256 as *const _, Device::Cuda(0), DType::F16, &[4], None) };
        assert!(check.rows("x", &device.unwrap(), &FLOATS, &[1]).is_err());
    }
}
