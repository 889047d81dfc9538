//! Tensors, with numbers that the Python side computes alike.

use std::{any::Any, ffi::c_void, sync::Arc};

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use flashinfer_rs::{DType, Device, TensorMut, TensorRef};
use half::{bf16, f16};

use crate::Result;

/// Numbers after which they repeat.
const PERIOD: usize = 1 << 20;

/// A tensor, which may be viewed for reading and writing at once: everything
/// here runs on one stream, and nobody looks at results.
pub struct Tensor {
    /// Of `memory`, and given out for as long as that is there.
    whole: TensorRef<'static>,
    _memory: Box<dyn Any>,
}

/// Number `index` of the sequence, between −1 and 1.
fn number(index: usize) -> f32 {
    let hashed = (index as u32).wrapping_mul(2_654_435_761) >> 16;
    hashed as f32 / 32768.0 - 1.0
}

impl Tensor {
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

    fn on_device(
        cuda: &Arc<CudaStream>,
        slice: CudaSlice<u8>,
        dtype: DType,
        shape: &[usize],
    ) -> Result<Self> {
        let (data, device) = (slice.device_ptr(cuda).0, Device::Cuda(slice.ordinal() as u32));
        Self::new(slice, data as *const _, device, dtype, shape)
    }

    pub fn zeros(cuda: &Arc<CudaStream>, dtype: DType, shape: &[usize]) -> Result<Self> {
        let bytes = shape.iter().product::<usize>() * dtype.size();
        Self::on_device(cuda, cuda.alloc_zeros(bytes)?, dtype, shape)
    }

    /// Numbers between −1 and 1.
    pub fn numbers(cuda: &Arc<CudaStream>, dtype: DType, shape: &[usize]) -> Result<Self> {
        let bytes: Vec<u8> = (0..PERIOD)
            .map(number)
            .flat_map(|x| match dtype {
                DType::BF16 => bf16::from_f32(x).to_le_bytes(),
                _ => f16::from_f32(x).to_le_bytes(),
            })
            .collect();
        let period = cuda.clone_htod(&bytes)?;
        let len = shape.iter().product::<usize>() * dtype.size();
        let mut slice = cuda.alloc_zeros::<u8>(len)?;
        for start in (0..len).step_by(bytes.len()) {
            let end = len.min(start + bytes.len());
            cuda.memcpy_dtod(&period.slice(..end - start), &mut slice.slice_mut(start..end))?;
        }
        Self::on_device(cuda, slice, dtype, shape)
    }

    /// Rows of probabilities.
    pub fn probabilities(cuda: &Arc<CudaStream>, rows: usize, vocab: usize) -> Result<Self> {
        let row: Vec<f32> = (0..vocab).map(|index| (number(index) + 1.0).powi(8)).collect();
        let sum: f64 = row.iter().copied().map(f64::from).sum();
        let row: Vec<u8> = row.iter().flat_map(|&p| ((f64::from(p) / sum) as f32).to_le_bytes()).collect();
        Self::on_device(cuda, cuda.clone_htod(&row.repeat(rows))?, DType::F32, &[rows, vocab])
    }

    pub fn integers(cuda: &Arc<CudaStream>, values: &[i32]) -> Result<Self> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::on_device(cuda, cuda.clone_htod(&bytes)?, DType::I32, &[values.len()])
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
        let shape: Vec<usize> = self.whole.shape().iter().map(|&size| size as usize).collect();
        let (device, dtype) = (self.whole.device(), self.whole.dtype());
        // SAFETY: as in `new`; nobody looks at what is written.
        unsafe { TensorMut::from_raw_parts(self.whole.data_ptr(), device, dtype, &shape, None) }
            .expect("a shape that was taken before")
    }
}
