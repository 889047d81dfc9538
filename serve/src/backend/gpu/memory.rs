//! Page-locked memory of the host, which the GPU reads and writes while the host goes on.

use cudarc::driver::{CudaStream, DeviceRepr, HostSlice, PinnedHostSlice, ValidAsZeroBits, result};
use flashinfer_rs::{Element, gpu::Tensor};

use crate::Result;

/// Memory that is copied to or from a tensor.
pub struct Pinned<T> {
    memory: PinnedHostSlice<T>,
}

impl<T: Element + DeviceRepr + ValidAsZeroBits> Pinned<T> {
    /// Memory of zeros.
    pub fn zeros(cuda: &CudaStream, len: usize) -> Result<Self> {
        // SAFETY: the memory is written before anything reads it, and zeros are
        // numbers of the type. Flags of 0: the host reads it, too.
        unsafe {
            let mut memory = cuda.context().alloc_pinned_with_flags::<T>(len.max(1), 0)?;
            let len = memory.len();
            memory.as_mut_ptr()?.write_bytes(0, len);
            Ok(Self { memory })
        }
    }

    /// How many numbers there are.
    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// The numbers, once copies are over.
    pub fn as_slice(&self) -> Result<&[T]> {
        Ok(self.memory.as_slice()?)
    }

    /// The numbers, to write, once copies are over.
    pub fn as_mut_slice(&mut self) -> Result<&mut [T]> {
        Ok(self.memory.as_mut_slice()?)
    }

    /// Enqueues a copy of the first `len` numbers to the first of a tensor.
    pub fn upload(&self, cuda: &CudaStream, tensor: &mut Tensor<T>, len: usize) -> Result<()> {
        let target = tensor.view_mut();
        check(len, self.len(), target.numel())?;
        // SAFETY: both have as many numbers, and neither is used otherwise before the
        // copy is over: the tensor is used in the order of the stream, and the memory
        // waits for the event that the guard records.
        unsafe {
            let (memory, _recorded) = self.memory.stream_synced_slice(cuda);
            result::memcpy_htod_async(target.data_ptr() as u64, &memory[..len], cuda.cu_stream())?;
        }
        Ok(())
    }

    /// Enqueues a copy of `len` numbers of a tensor, from one on, to the first. On a stream that
    /// is not the tensor's, the caller has each wait for the other.
    pub fn download(&mut self, cuda: &CudaStream, tensor: &Tensor<T>, from: usize, len: usize) -> Result<()> {
        let source = tensor.view();
        check(len, self.len(), source.numel().saturating_sub(from))?;
        // SAFETY: as above; on another stream, the caller keeps the tensor, and orders its uses.
        unsafe {
            let (memory, _recorded) = self.memory.stream_synced_mut_slice(cuda);
            let source = source.data_ptr() as u64 + (from * size_of::<T>()) as u64;
            result::memcpy_dtoh_async(&mut memory[..len], source, cuda.cu_stream())?;
        }
        Ok(())
    }
}

fn check(len: usize, host: usize, device: usize) -> Result<()> {
    match len <= host.min(device) {
        true => Ok(()),
        false => Err(format!("a copy of {len} numbers between {host} and {device}").into()),
    }
}
