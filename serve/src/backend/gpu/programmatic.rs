//! Launches that may begin before the kernel before them is over: programmatic dependent launch.

use std::{ffi::c_void, mem, ptr, slice, sync::Arc};

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
/// not wait: as NCCL's for memory that several GPUs reach. Says whether the stream is being captured.
///
/// A kernel begins early behind another kernel alone. So something else lies between them: in a graph an empty
/// node, which is no work of its own, and elsewhere the writing of a byte.
///
/// # Errors
/// The capture is broken.
pub fn hold_back(cuda: &Arc<CudaStream>, byte: &mut CudaSlice<u8>) -> Result<bool> {
    let Some((graph, before)) = captured(cuda)? else {
        cuda.memset_zeros(byte)?;
        return Ok(false);
    };
    if before.is_empty() {
        return Ok(true);
    }
    let mut node = ptr::null_mut();
    let replace = sys::CUstreamUpdateCaptureDependencies_flags::CU_STREAM_SET_CAPTURE_DEPENDENCIES as u32;
    // SAFETY: the graph is the one that is captured, and the nodes are its own, as is the one that is added.
    unsafe {
        sys::cuGraphAddEmptyNode(&mut node, graph, before.as_ptr(), before.len()).result()?;
        sys::cuStreamUpdateCaptureDependencies_v2(cuda.cu_stream(), &mut node, ptr::null(), 1, replace)
            .result()?;
    }
    Ok(true)
}

/// The graph that a stream is captured into, if it is, and the nodes that what is enqueued next comes behind.
fn captured(cuda: &CudaStream) -> Result<Option<(sys::CUgraph, Vec<sys::CUgraphNode>)>> {
    use sys::CUstreamCaptureStatus as Status;
    let mut status = Status::CU_STREAM_CAPTURE_STATUS_NONE;
    let (mut graph, mut before, mut edges, mut count) = (ptr::null_mut(), ptr::null(), ptr::null(), 0);
    // SAFETY: the stream is alive, and what is asked for is written.
    unsafe {
        sys::cuStreamGetCaptureInfo_v3(
            cuda.cu_stream(),
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
        Status::CU_STREAM_CAPTURE_STATUS_NONE => Ok(None),
        Status::CU_STREAM_CAPTURE_STATUS_ACTIVE if count == 0 => Ok(Some((graph, Vec::new()))),
        // SAFETY: so many nodes are there, until work is captured again.
        Status::CU_STREAM_CAPTURE_STATUS_ACTIVE => unsafe {
            Ok(Some((graph, slice::from_raw_parts(before, count).to_vec())))
        },
        broken => Err(format!("the capture of the stream is broken: {broken:?}").into()),
    }
}

#[cfg(test)]
mod tests {
    use cudarc::driver::result;
    use flashinfer_rs::{Stream, gpu::Tensor};

    use super::*;
    use crate::{
        backend::{gpu::start, graph},
        model::synthetic::Shape,
        tests::gpu::turn,
    };

    /// Kernels of a graph are held back by an empty node, which is not counted among its work.
    #[test]
    fn an_empty_node_holds_back() {
        let Some(_turn) = turn() else { return };
        let cuda = start(&Shape::SmolLm2.config().unwrap(), 0).unwrap();
        let mut byte = cuda.alloc_zeros(1).unwrap();
        let numbers = Tensor::<u8>::zeros(&Stream::from(&cuda), &[16]).unwrap();
        // SAFETY: so many bytes are there.
        let fill =
            || unsafe { result::memset_d8_async(numbers.view().data_ptr() as u64, 0, 16, cuda.cu_stream()) };
        assert!(!hold_back(&cuda, &mut byte).unwrap());
        let body = || {
            assert!(hold_back(&cuda, &mut byte)?);
            assert_eq!(captured(&cuda)?.unwrap().1, [], "there is nothing to wait for");
            fill()?;
            assert!(hold_back(&cuda, &mut byte)?);
            let (_, before) = captured(&cuda)?.unwrap();
            let [node] = before[..] else { panic!("{before:?}") };
            let mut kind = sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL;
            // SAFETY: the node is alive.
            unsafe { sys::cuGraphNodeGetType(node, &mut kind).result()? };
            assert_eq!(kind, sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY);
            Ok(fill()?)
        };
        // SAFETY: the memory outlives the graph.
        let step = unsafe { graph::capture(&Stream::from(&cuda), body) }.unwrap();
        assert_eq!(step.nodes(), 2);
        step.launch(&()).unwrap();
        cuda.synchronize().unwrap();
    }
}
