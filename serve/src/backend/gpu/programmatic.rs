//! Launches that may begin before the kernel before them is over: programmatic dependent launch.

use std::{ffi::c_void, mem, ptr, sync::Arc};

use cudarc::driver::{CudaFunction, CudaSlice, CudaStream, LaunchConfig, sys};

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

/// Has what is enqueued next begin when all before it is over, even a kernel that is launched so and does
/// not wait: as NCCL's for memory that several GPUs reach. Says how many nodes it put into the graph that is
/// captured, if one is.
///
/// A kernel begins early behind another kernel alone. So something else lies between them: in a graph an empty
/// node, which is no work of its own, and elsewhere the writing of a byte.
///
/// # Errors
/// The capture is broken.
pub fn hold_back(cuda: &Arc<CudaStream>, byte: &mut CudaSlice<u8>) -> Result<Option<usize>> {
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let (mut graph, mut before, mut edges, mut count) = (ptr::null_mut(), ptr::null(), ptr::null(), 0);
    let stream = cuda.cu_stream();
    // SAFETY: the stream is alive. What is asked for is written, and the arrays are the stream's until work
    // is captured again.
    unsafe {
        sys::cuStreamGetCaptureInfo_v3(
            stream,
            &mut status,
            ptr::null_mut(),
            &mut graph,
            &mut before,
            &mut edges,
            &mut count,
        )
        .result()?;
    }
    match status {
        sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE => {
            cuda.memset_zeros(byte)?;
            return Ok(None);
        }
        sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE => {}
        broken => return Err(format!("the capture of the stream is broken: {broken:?}").into()),
    }
    if count == 0 {
        return Ok(Some(0));
    }
    let mut node = ptr::null_mut();
    let replace = sys::CUstreamUpdateCaptureDependencies_flags::CU_STREAM_SET_CAPTURE_DEPENDENCIES as u32;
    // SAFETY: the graph is the one that is captured, and the nodes are its own, as is the one that is added.
    unsafe {
        sys::cuGraphAddEmptyNode(&mut node, graph, before, count).result()?;
        sys::cuStreamUpdateCaptureDependencies_v2(stream, &mut node, ptr::null(), 1, replace).result()?;
    }
    Ok(Some(1))
}
