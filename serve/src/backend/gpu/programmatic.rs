//! Launches that may begin before the kernel before them is over: programmatic dependent launch.

use std::{ffi::c_void, mem, ptr};

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
/// (`griddepcontrol.launch_dependents`), none follows that is launched so and does not wait, unless
/// [`hold_back`] lies between.
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
            ptr::null_mut(),
        )
        .result()?;
    }
    Ok(())
}

/// Has what is captured next begin when all before it is over, even a kernel that is launched so and does
/// not wait: as NCCL's for memory that several GPUs reach. Does nothing where nothing is captured.
///
/// An edge of a graph along which a kernel may begin early leads from one kernel to the next. So an empty
/// node between them takes that away, and it is no work of its own.
pub fn hold_back(cuda: &CudaStream) -> Result<()> {
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let (mut graph, mut before, mut count) = (ptr::null_mut(), ptr::null(), 0);
    let (stream, nothing) = (cuda.cu_stream(), ptr::null_mut());
    // SAFETY: the stream is alive. What is asked for is written, and the array is the stream's until work
    // is captured again; of the edges nothing is told, as the last node's are full ones.
    unsafe {
        sys::cuStreamGetCaptureInfo_v3(
            stream,
            &mut status,
            nothing,
            &mut graph,
            &mut before,
            ptr::null_mut(),
            &mut count,
        )
        .result()?;
    }
    if status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE || count == 0 {
        return Ok(());
    }
    let mut node = ptr::null_mut();
    let replace = sys::CUstreamUpdateCaptureDependencies_flags::CU_STREAM_SET_CAPTURE_DEPENDENCIES as u32;
    // SAFETY: the graph is the one that is captured, and the nodes are its own, as is the one that is added.
    unsafe {
        sys::cuGraphAddEmptyNode(&mut node, graph, before, count).result()?;
        sys::cuStreamUpdateCaptureDependencies_v2(stream, &mut node, ptr::null(), 1, replace).result()?;
    }
    Ok(())
}
