//! Kernels of this crate.

use std::{
    ffi::{CStr, c_int, c_void},
    ptr,
    sync::{Mutex, PoisonError},
};

use super::{
    runtime::CudaRuntime,
    symbols::{Dim3, LaunchAttribute, LaunchConfig},
};
use crate::{capture, error::Result, stream::Stream, tensor::RawTensor};

/// A kernel of this crate: a function of a PTX module, which the driver
/// compiles for whatever device it is launched on.
pub(crate) struct PtxKernel {
    /// Ends in a NUL.
    ptx: &'static str,
    name: &'static CStr,
    /// The `cudaKernel_t`, of the whole process; 0 until it is loaded.
    handle: Mutex<usize>,
}

/// How a kernel is launched, in one dimension.
#[derive(Clone, Copy)]
pub(crate) struct Launch {
    pub(crate) blocks: u32,
    pub(crate) threads: u32,
    /// Whether it may begin before the kernel before it is over (programmatic dependent launch).
    pub(crate) overlaps: bool,
}

/// Blocks and threads of a launch that overlaps none.
impl From<[u32; 2]> for Launch {
    fn from([blocks, threads]: [u32; 2]) -> Self {
        Self { blocks, threads, overlaps: false }
    }
}

impl PtxKernel {
    pub(crate) const fn new(ptx: &'static str, name: &'static CStr) -> Self {
        Self { ptx, name, handle: Mutex::new(0) }
    }

    /// Whether it was loaded already.
    pub(crate) fn is_loaded(&self) -> bool {
        *self.handle.lock().unwrap_or_else(PoisonError::into_inner) != 0
    }

    /// The kernel's handle, which stays valid for the life of the process.
    pub(crate) fn load(&self, cuda: &CudaRuntime) -> Result<*const c_void> {
        let mut handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        if *handle == 0 {
            let (mut library, mut kernel) = (ptr::null_mut(), ptr::null());
            let none = ptr::null_mut::<c_int>;
            let nothing = ptr::null_mut::<*mut c_void>;
            // SAFETY: the text ends in a NUL and is never freed; there are no
            // options; one pointer is written.
            let code = unsafe {
                (cuda.symbols.library_load_data)(
                    &mut library,
                    self.ptx.as_ptr().cast(),
                    none(),
                    nothing(),
                    0,
                    none(),
                    nothing(),
                    0,
                )
            };
            cuda.check("cudaLibraryLoadData", code)?;
            // SAFETY: the library was just loaded, and is never unloaded.
            let code = unsafe { (cuda.symbols.library_get_kernel)(&mut kernel, library, self.name.as_ptr()) };
            cuda.check("cudaLibraryGetKernel", code)?;
            *handle = kernel as usize;
        }
        Ok(*handle as *const c_void)
    }

    /// Enqueues the kernel. `tensors` are those whose memory it is given.
    ///
    /// # Safety
    /// `args` must point to values of the kernel's parameters, which must be
    /// what it assumes. If the launch overlaps the one before it, the kernel waits for that
    /// (`griddepcontrol.wait`) before it touches memory that any other kernel may write.
    pub(crate) unsafe fn launch(
        &self,
        cuda: &'static CudaRuntime,
        stream: &Stream,
        launch: impl Into<Launch>,
        args: &mut [*mut c_void],
        tensors: &[Option<&RawTensor>],
    ) -> Result<()> {
        let (kernel, Launch { blocks, threads, overlaps }) = (self.load(cuda)?, launch.into());
        tensors.iter().flatten().for_each(|tensor| capture::uses(tensor));
        let _device = cuda.on_device_of(stream)?;
        let line = |x| Dim3 { x, y: 1, z: 1 };
        let config = LaunchConfig {
            grid: line(blocks),
            block: line(threads),
            dynamic_shared_bytes: 0,
            stream: stream.as_raw(),
            attributes: &LaunchAttribute::OVERLAPS,
            num_attributes: overlaps.into(),
        };
        capture::enqueue(stream, || {
            // SAFETY: the runtime takes a `cudaKernel_t` in place of a function; the configuration
            // is read before it returns; the rest is promised by the caller.
            let code = unsafe { (cuda.symbols.launch_kernel)(&raw const config, kernel, args.as_mut_ptr()) };
            cuda.check("cudaLaunchKernelExC", code)
        })
    }
}
