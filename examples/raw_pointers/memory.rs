//! The allocator of an engine: memory of its own, known by its address alone.

use std::{ffi::c_void, sync::Arc};

use cudarc::driver::{CudaStream, result, sys::CUdeviceptr};
use flashinfer_rs::Device;

use crate::Result;

/// Every part starts at a multiple of this many bytes; kernels want 16.
const ALIGNMENT: usize = 256;

/// Memory that is given out in parts, all of which live as long as it does.
pub enum Memory {
    /// Of the process, for the reference.
    Host(Vec<Vec<u128>>),
    /// One allocation on a GPU.
    Gpu(GpuMemory),
}

pub struct GpuMemory {
    stream: Arc<CudaStream>,
    base: CUdeviceptr,
    bytes: usize,
    used: usize,
}

impl Memory {
    pub fn host() -> Self {
        Self::Host(Vec::new())
    }

    pub fn gpu(stream: Arc<CudaStream>, bytes: usize) -> Result<Self> {
        stream.context().bind_to_thread()?;
        // SAFETY: parts are written before anything reads them.
        let base = unsafe { result::malloc_sync(bytes)? };
        Ok(Self::Gpu(GpuMemory { stream, base, bytes, used: 0 }))
    }

    pub fn device(&self) -> Device {
        match self {
            Self::Host(_) => Device::Cpu,
            Self::Gpu(gpu) => Device::Cuda(gpu.stream.context().ordinal() as u32),
        }
    }

    /// The next part.
    pub fn take(&mut self, bytes: usize) -> Result<*mut c_void> {
        match self {
            Self::Host(parts) => {
                parts.push(vec![0; bytes.div_ceil(size_of::<u128>())]);
                Ok(parts.last_mut().map_or(std::ptr::null_mut(), |part| part.as_mut_ptr().cast()))
            }
            Self::Gpu(gpu) if gpu.used + bytes <= gpu.bytes => {
                let part = gpu.base + gpu.used as CUdeviceptr;
                gpu.used = (gpu.used + bytes).next_multiple_of(ALIGNMENT);
                Ok(part as *mut c_void)
            }
            Self::Gpu(gpu) => Err(format!("{bytes} bytes, after {} of {}", gpu.used, gpu.bytes).into()),
        }
    }

    /// Copies elements into a part, after what the stream has to do.
    ///
    /// # Safety
    /// The part has room for them, and nobody else uses it meanwhile.
    pub unsafe fn write<T: Copy>(&self, part: *mut c_void, elements: &[T]) -> Result<()> {
        match self {
            // SAFETY: promised by the caller; parts are aligned for any number.
            Self::Host(_) => unsafe { part.cast::<T>().copy_from(elements.as_ptr(), elements.len()) },
            Self::Gpu(gpu) => {
                // SAFETY: promised by the caller; the elements stay until the copy is done.
                unsafe { result::memcpy_htod_async(part as CUdeviceptr, elements, gpu.stream.cu_stream())? };
                gpu.stream.synchronize()?;
            }
        }
        Ok(())
    }

    /// The first elements of a part, after what the stream has to do.
    ///
    /// # Safety
    /// The part has as many, and nobody writes it meanwhile.
    pub unsafe fn read<T: Copy + Default>(&self, part: *const c_void, len: usize) -> Result<Vec<T>> {
        let mut elements = vec![T::default(); len];
        match self {
            // SAFETY: promised by the caller.
            Self::Host(_) => unsafe { part.cast::<T>().copy_to(elements.as_mut_ptr(), len) },
            Self::Gpu(gpu) => {
                let from = part as CUdeviceptr;
                // SAFETY: promised by the caller; the elements stay until the copy is done.
                unsafe { result::memcpy_dtoh_async(&mut elements, from, gpu.stream.cu_stream())? };
                gpu.stream.synchronize()?;
            }
        }
        Ok(elements)
    }
}

impl Drop for GpuMemory {
    fn drop(&mut self) {
        // What still runs may use the memory. There is nothing to be done about an error.
        let _ = self.stream.synchronize();
        // SAFETY: it was allocated, and is freed once.
        let _ = unsafe { result::free_sync(self.base) };
    }
}
