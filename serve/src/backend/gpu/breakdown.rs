//! Where the time of a step goes: what each kind of its kernels costs in the graph.

use std::{ffi::CStr, iter, mem, ptr, sync::Arc};

use cudarc::driver::{CudaStream, DriverError, sys};

use crate::{Result, backend::graph::milliseconds};

/// Replays of which the fastest counts.
const REPLAYS: usize = 10;

/// What kernels of one name and one grid cost.
#[derive(Clone, Debug)]
pub struct KernelCost {
    /// The kernel's name, as the driver has it.
    pub name: String,
    pub blocks: u32,
    pub threads: u32,
    /// Launches in the step.
    pub launches: usize,
    /// By how many microseconds the step is shorter without them.
    pub microseconds: f64,
}

/// What the kernels of a step cost.
#[derive(Clone, Debug)]
pub struct Breakdown {
    /// Microseconds of the whole step.
    pub microseconds: f64,
    /// Launches that may begin before the one before them is over.
    pub overlapping: usize,
    /// In the order in which they first occur.
    pub kernels: Vec<KernelCost>,
}

/// A graph that was not made for launches of the engine.
struct Captured {
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
}

impl Drop for Captured {
    fn drop(&mut self) {
        // SAFETY: both are this value's, and no launch is on its way. There is nobody to tell that they
        // could not be freed.
        unsafe {
            let _ = sys::cuGraphExecDestroy(self.exec);
            let _ = sys::cuGraphDestroy(self.graph);
        }
    }
}

impl Captured {
    /// # Safety
    /// Memory that `work` uses stays alive as long as the graph.
    unsafe fn new(cuda: &CudaStream, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let mut captured = Self { graph: ptr::null_mut(), exec: ptr::null_mut() };
        // SAFETY: the stream is alive, and so are the handles that are written. A capture that fails
        // leaves null, which is refused when it is instantiated, and harmless when it is dropped.
        unsafe {
            sys::cuStreamBeginCapture_v2(cuda.cu_stream(), mode).result()?;
            let done = work();
            let ended = sys::cuStreamEndCapture(cuda.cu_stream(), &mut captured.graph).result();
            done?;
            ended?;
            sys::cuGraphInstantiateWithFlags(&mut captured.exec, captured.graph, 0).result()?;
        }
        Ok(captured)
    }

    /// Its kernels, in the order of their capture.
    fn kernels(&self) -> Result<Vec<sys::CUgraphNode>> {
        let mut count = 0;
        // SAFETY: without an array the nodes are only counted.
        unsafe { sys::cuGraphGetNodes(self.graph, ptr::null_mut(), &mut count).result()? };
        let mut nodes = vec![ptr::null_mut(); count];
        // SAFETY: the array has room for so many.
        unsafe { sys::cuGraphGetNodes(self.graph, nodes.as_mut_ptr(), &mut count).result()? };
        nodes.truncate(count);
        let is_kernel = |node: &sys::CUgraphNode| {
            let mut kind = sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
            // SAFETY: the node is of a graph that is alive; its type is written.
            let told = unsafe { sys::cuGraphNodeGetType(*node, &mut kind).result() };
            told.is_ok() && kind == sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL
        };
        nodes.retain(is_kernel);
        Ok(nodes)
    }

    /// Edges along which a launch may begin early.
    fn overlapping(&self) -> Result<usize> {
        let mut count = 0;
        let (none, no_data) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: without arrays the edges are only counted.
        unsafe { sys::cuGraphGetEdges_v2(self.graph, none, none, no_data, &mut count).result()? };
        let [mut from, mut to] = [(); 2].map(|()| vec![ptr::null_mut(); count]);
        // SAFETY: numbers, of which all may be zero.
        let mut data: Vec<sys::CUgraphEdgeData> = vec![unsafe { mem::zeroed() }; count];
        let (from, to, edges) = (from.as_mut_ptr(), to.as_mut_ptr(), data.as_mut_ptr());
        // SAFETY: the arrays have room for so many.
        unsafe { sys::cuGraphGetEdges_v2(self.graph, from, to, edges, &mut count).result()? };
        let programmatic = sys::CUgraphDependencyType::CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC as u8;
        Ok(data.iter().take(count).filter(|data| data.type_ == programmatic).count())
    }

    fn set_enabled(&self, nodes: &[sys::CUgraphNode], enabled: bool) -> Result<()> {
        for &node in nodes {
            // SAFETY: the node is a kernel's of the graph that was instantiated.
            unsafe { sys::cuGraphNodeSetEnabled(self.exec, node, enabled.into()).result()? };
        }
        Ok(())
    }

    /// The microseconds of a replay.
    fn time(&self, cuda: &Arc<CudaStream>) -> Result<f64> {
        let launch = || -> Result<()> {
            // SAFETY: graph and stream are alive, and so is the memory that the kernels use.
            unsafe { sys::cuGraphLaunch(self.exec, cuda.cu_stream()).result()? };
            Ok(())
        };
        let times = iter::repeat_with(|| milliseconds(cuda, launch)).take(REPLAYS);
        let times = times.collect::<Result<Vec<_>>>()?;
        Ok(f64::from(times.into_iter().fold(f32::INFINITY, f32::min)) * 1e3)
    }
}

impl Breakdown {
    /// Of what `work` enqueues, which ran before. Each kind of kernels is left out in turn, so that
    /// later ones compute with what was there before.
    ///
    /// # Safety
    /// Memory that `work` uses stays alive as long as this runs, and its kernels do nothing undefined
    /// whatever the numbers are that they work on.
    pub unsafe fn of(cuda: &Arc<CudaStream>, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        // SAFETY: as the caller says.
        let captured = unsafe { Captured::new(cuda, work)? };
        let mut kinds: Vec<(KernelCost, Vec<sys::CUgraphNode>)> = Vec::new();
        for node in captured.kernels()? {
            let kind = describe(node)?;
            let same = |(known, _): &&mut (KernelCost, _)| {
                let of = |cost: &KernelCost| (cost.name.clone(), cost.blocks, cost.threads);
                of(known) == of(&kind)
            };
            match kinds.iter_mut().find(same) {
                Some((known, nodes)) => {
                    known.launches += 1;
                    nodes.push(node);
                }
                None => kinds.push((kind, vec![node])),
            }
        }
        let microseconds = captured.time(cuda)?;
        let without = |(mut kind, nodes): (KernelCost, Vec<_>)| {
            // The GPU's clock may be another one by now.
            let whole = captured.time(cuda)?;
            captured.set_enabled(&nodes, false)?;
            kind.microseconds = whole - captured.time(cuda)?;
            captured.set_enabled(&nodes, true)?;
            Ok(kind)
        };
        let kernels = kinds.into_iter().map(without).collect::<Result<_>>()?;
        let overlapping = captured.overlapping()?;
        cuda.synchronize()?;
        Ok(Self { microseconds, overlapping, kernels })
    }
}

/// What a node launches.
fn describe(node: sys::CUgraphNode) -> Result<KernelCost> {
    // SAFETY: a structure of numbers and pointers, which may be zero.
    let mut params: sys::CUDA_KERNEL_NODE_PARAMS = unsafe { mem::zeroed() };
    let mut name = ptr::null();
    // SAFETY: the node is a kernel's; the structure and the name are written. The name is a string of
    // the driver's that lives as long as the kernel.
    let name = unsafe {
        sys::cuGraphKernelNodeGetParams_v2(node, &mut params).result()?;
        let told: std::result::Result<(), DriverError> = match params.func.is_null() {
            true => sys::cuKernelGetName(&mut name, params.kern).result(),
            false => sys::cuFuncGetName(&mut name, params.func).result(),
        };
        told?;
        CStr::from_ptr(name).to_string_lossy().into_owned()
    };
    let blocks = params.gridDimX * params.gridDimY * params.gridDimZ;
    let threads = params.blockDimX * params.blockDimY * params.blockDimZ;
    Ok(KernelCost { name, blocks, threads, launches: 1, microseconds: 0.0 })
}
