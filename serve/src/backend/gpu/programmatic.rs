//! Launches that may begin before the kernel before them is over: programmatic dependent launch.

use std::{ffi::c_void, mem};

use cudarc::driver::{CudaFunction, CudaStream, LaunchConfig, sys};

use crate::Result;

/// Whether a GPU has such launches: from compute capability 9.0 on.
pub fn is_available(cuda: &CudaStream) -> Result<bool> {
    Ok(cuda.context().compute_capability()?.0 >= 9)
}

/// Launches a kernel, whose blocks may begin when all those of the kernel before it have said that
/// they may, or are over.
///
/// # Safety
/// `arguments` point to what the kernel takes, in its order, and it does with that nothing
/// undefined. It waits for the kernel before it (`griddepcontrol.wait`) before it reads or
/// writes what that, or one before that, may write or read. If it lets the kernel after it begin early
/// (`griddepcontrol.launch_dependents`), none follows that is launched so and does not wait, as
/// NCCL's kernels for memory that several GPUs reach.
pub unsafe fn launch(
    cuda: &CudaStream,
    function: &CudaFunction,
    shape: LaunchConfig,
    arguments: &mut [*mut c_void],
) -> Result<()> {
    cuda.context().bind_to_thread()?;
    // SAFETY: a structure of numbers, whose padding is to be zeros.
    let mut attribute: sys::CUlaunchAttribute = unsafe { mem::zeroed() };
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
    let config = sys::CUlaunchConfig {
        gridDimX: shape.grid_dim.0,
        gridDimY: shape.grid_dim.1,
        gridDimZ: shape.grid_dim.2,
        blockDimX: shape.block_dim.0,
        blockDimY: shape.block_dim.1,
        blockDimZ: shape.block_dim.2,
        sharedMemBytes: shape.shared_mem_bytes,
        hStream: cuda.cu_stream(),
        attrs: &raw mut attribute,
        numAttrs: 1,
    };
    // SAFETY: the configuration and the arguments are read before this returns; the rest is promised
    // by the caller.
    unsafe {
        sys::cuLaunchKernelEx(
            &raw const config,
            function.cu_function(),
            arguments.as_mut_ptr(),
            std::ptr::null_mut(),
        )
        .result()?;
    }
    Ok(())
}
