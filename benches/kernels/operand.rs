//! What operations are given: numbers that the Python side computes alike.

use std::{any::Any, ffi::c_void, sync::Arc};

use cudarc::driver::{CudaStream, DeviceRepr};
use flashinfer_rs::{DType, Device, Element, Stream, TensorMut, TensorRef, gpu::Tensor};
use half::{bf16, f16};

use crate::Result;

/// Numbers after which they repeat.
const PERIOD: usize = 1 << 20;

/// A tensor of any element type, which may be viewed for reading and writing at once: everything
/// here runs on one stream, and nobody looks at results.
pub struct Operand {
    /// Of `memory`, and given out for as long as that is there.
    whole: TensorRef<'static>,
    _memory: Box<dyn Any>,
}

/// Number `index` of the sequence, between −1 and 1.
fn number(index: usize) -> f32 {
    let hashed = (index as u32).wrapping_mul(2_654_435_761) >> 16;
    hashed as f32 / 32768.0 - 1.0
}

impl<T: Element + DeviceRepr + 'static> From<Tensor<T>> for Operand {
    fn from(tensor: Tensor<T>) -> Self {
        let view = tensor.view();
        let (data, device, shape) = (view.data_ptr(), view.device(), sizes(&view));
        Self::new(tensor, data, device, T::DTYPE, &shape).expect("a shape that the tensor has")
    }
}

fn sizes(view: &TensorRef<'_>) -> Vec<usize> {
    view.shape().iter().map(|&size| size as usize).collect()
}

impl Operand {
    /// Of memory that does not move when its owner does.
    fn new(
        memory: impl Any,
        data: *const c_void,
        device: Device,
        dtype: DType,
        shape: &[usize],
    ) -> Result<Self> {
        // SAFETY: the memory holds that many elements, and stays until it is
        // dropped, in the order of the one stream on which all work is.
        let whole = unsafe { TensorRef::from_raw_parts(data, device, dtype, shape, None) }?;
        Ok(Self { whole, _memory: Box::new(memory) })
    }

    pub fn zeros(cuda: &Arc<CudaStream>, dtype: DType, shape: &[usize]) -> Result<Self> {
        let stream = &Stream::from(cuda);
        Ok(match dtype {
            DType::BF16 => Tensor::<bf16>::zeros(stream, shape)?.into(),
            DType::F16 => Tensor::<f16>::zeros(stream, shape)?.into(),
            DType::I32 => Tensor::<i32>::zeros(stream, shape)?.into(),
            DType::U8 => Tensor::<u8>::zeros(stream, shape)?.into(),
            other => return Err(format!("no case has outputs of {other}").into()),
        })
    }

    /// Numbers between −1 and 1.
    pub fn numbers(cuda: &Arc<CudaStream>, dtype: DType, shape: &[usize]) -> Result<Self> {
        match dtype {
            DType::BF16 => repeated(cuda, bf16::from_f32, shape),
            DType::F16 => repeated(cuda, f16::from_f32, shape),
            other => Err(format!("no case has inputs of {other}").into()),
        }
    }

    /// Rows of probabilities.
    pub fn probabilities(cuda: &Arc<CudaStream>, rows: usize, vocab: usize) -> Result<Self> {
        let row: Vec<f32> = (0..vocab).map(|index| (number(index) + 1.0).powi(8)).collect();
        let sum: f64 = row.iter().copied().map(f64::from).sum();
        let row: Vec<f32> = row.iter().map(|&p| (f64::from(p) / sum) as f32).collect();
        Ok(Tensor::from_slice(&Stream::from(cuda), &[rows, vocab], &row.repeat(rows))?.into())
    }

    pub fn integers(cuda: &Arc<CudaStream>, values: &[i32]) -> Result<Self> {
        Ok(Tensor::from_slice(&Stream::from(cuda), &[values.len()], values)?.into())
    }

    /// Integers on the host.
    pub fn on_host(values: &[i32]) -> Result<Self> {
        let (values, shape) = (values.to_vec(), [values.len()]);
        let data = values.as_ptr().cast();
        Self::new(values, data, Device::Cpu, DType::I32, &shape)
    }

    /// Page-locked bytes on the host.
    pub fn pinned(cuda: &Arc<CudaStream>, bytes: usize) -> Result<Self> {
        // Not write-combined, as planners may read it.
        // SAFETY: planners write what is read.
        let mut slice = unsafe { cuda.context().alloc_pinned_with_flags::<u8>(bytes, 0) }?;
        let data = slice.as_mut_ptr()?.cast_const().cast();
        Self::new(slice, data, Device::Cpu, DType::U8, &[bytes])
    }

    pub fn bytes(&self) -> usize {
        self.whole.numel() * self.whole.dtype().size()
    }

    pub fn view(&self) -> &TensorRef<'_> {
        &self.whole
    }

    pub fn view_mut(&self) -> TensorMut<'_> {
        let (device, dtype) = (self.whole.device(), self.whole.dtype());
        // SAFETY: as in `new`; nobody looks at what is written.
        unsafe { TensorMut::from_raw_parts(self.whole.data_ptr(), device, dtype, &sizes(&self.whole), None) }
            .expect("a shape that was taken before")
    }
}

/// The sequence of numbers again and again, copied on the device.
fn repeated<T: Element + DeviceRepr + cudarc::driver::ValidAsZeroBits + 'static>(
    cuda: &Arc<CudaStream>,
    of: fn(f32) -> T,
    shape: &[usize],
) -> Result<Operand> {
    let period: Vec<T> = (0..PERIOD).map(|index| of(number(index))).collect();
    let period = cuda.clone_htod(&period)?;
    let len = shape.iter().product::<usize>();
    let mut slice = cuda.alloc_zeros::<T>(len)?;
    for start in (0..len).step_by(PERIOD) {
        let end = len.min(start + PERIOD);
        cuda.memcpy_dtod(&period.slice(..end - start), &mut slice.slice_mut(start..end))?;
    }
    Ok(Tensor::from_cudarc(slice, shape)?.into())
}
