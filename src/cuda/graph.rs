//! A stream's capture, and the graph that it gives.

use std::ptr;

use super::{
    runtime::CudaRuntime,
    symbols::{CAPTURE_NONE, CAPTURE_THREAD_LOCAL, EMPTY_NODE, RawGraph},
};
use crate::{
    capture,
    error::{FlashInferError, Result},
    stream::Stream,
};

/// A stream's capture into a graph, which ends when this is dropped.
pub(crate) struct Capture {
    runtime: &'static CudaRuntime,
    stream: Stream,
    id: u64,
    ended: bool,
}

impl Capture {
    pub(crate) fn begin(runtime: &'static CudaRuntime, stream: &Stream) -> Result<Self> {
        let _device = runtime.on_device_of(stream)?;
        // SAFETY: the stream is alive; the mode is one of the runtime's.
        let code = unsafe { (runtime.symbols.stream_begin_capture)(stream.as_raw(), CAPTURE_THREAD_LOCAL) };
        runtime.check("cudaStreamBeginCapture", code)?;
        let mut capture = Self { runtime, stream: stream.clone(), id: 0, ended: false };
        capture.id = runtime.capture_info(stream)?.0;
        Ok(capture)
    }

    /// The graph, if it is that of this capture, and how many nodes it has.
    pub(crate) fn end(mut self) -> Result<(Graph, Nodes)> {
        let (runtime, stream) = (self.runtime, self.stream.clone());
        let _device = runtime.on_device_of(&stream)?;
        let info = runtime.capture_info(&stream);
        let ended = self.end_now();
        let ((id, _), graph) = (info?, ended?);
        if id != self.id {
            return Err(FlashInferError::invalid(
                capture::OP,
                "body",
                "it ended the capture, and began another",
            ));
        }
        let nodes = graph.count()?;
        let mut exec = ptr::null_mut();
        // SAFETY: the graph was just captured; one handle is written.
        let code = unsafe { (runtime.symbols.graph_instantiate)(&mut exec, graph.0, 0) };
        runtime.check("cudaGraphInstantiate", code)?;
        Ok((Graph { runtime, exec, stream }, nodes))
    }

    fn end_now(&mut self) -> Result<Template> {
        self.ended = true;
        let _device = self.runtime.on_device_of(&self.stream)?;
        let mut graph = ptr::null_mut();
        // SAFETY: the stream is alive; one handle is written.
        let code = unsafe { (self.runtime.symbols.stream_end_capture)(self.stream.as_raw(), &mut graph) };
        let graph = Template(graph, self.runtime);
        self.runtime.check("cudaStreamEndCapture", code).map(|()| graph)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if !self.ended {
            // Drop has no way to report a failure.
            self.end_now().ok();
        }
    }
}

/// How many nodes a graph has.
pub(crate) struct Nodes {
    pub(crate) all: usize,
    /// All but empty ones.
    pub(crate) work: usize,
}

/// A graph that was not instantiated.
struct Template(RawGraph, &'static CudaRuntime);

impl Template {
    fn count(&self) -> Result<Nodes> {
        let Self(graph, runtime) = *self;
        // SAFETY: the graph is alive.
        let all = unsafe { runtime.count_nodes(graph)? };
        let (mut nodes, mut written) = (vec![ptr::null_mut(); all], all);
        // SAFETY: the graph is alive, and so many nodes are written.
        let code = unsafe { (runtime.symbols.graph_get_nodes)(graph, nodes.as_mut_ptr(), &mut written) };
        runtime.check("cudaGraphGetNodes", code)?;
        let kinds = nodes.into_iter().map(|node| {
            let mut kind = EMPTY_NODE;
            // SAFETY: the node is the graph's; a number is written.
            let code = unsafe { (runtime.symbols.graph_node_get_type)(node, &mut kind) };
            runtime.check("cudaGraphNodeGetType", code).map(|()| kind)
        });
        let kinds = kinds.collect::<Result<Vec<_>>>()?;
        Ok(Nodes { all, work: kinds.into_iter().filter(|&kind| kind != EMPTY_NODE).count() })
    }
}

impl Drop for Template {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: the graph is destroyed once.
            unsafe { (self.1.symbols.graph_destroy)(self.0) };
        }
    }
}

/// A graph that can be launched on the stream that it was captured on.
pub(crate) struct Graph {
    runtime: &'static CudaRuntime,
    exec: RawGraph,
    stream: Stream,
}

// SAFETY: a handle; nothing but `&self` and `Drop` use it, and it is not `Sync`.
unsafe impl Send for Graph {}

impl Graph {
    pub(crate) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Enqueues the graph.
    ///
    /// # Safety
    /// All memory that it works on must be alive, and hold what it expects.
    pub(crate) unsafe fn launch(&self) -> Result<()> {
        let _device = self.runtime.on_device_of(&self.stream)?;
        // SAFETY: graph and stream are alive; the rest is promised by the caller.
        let code = unsafe { (self.runtime.symbols.graph_launch)(self.exec, self.stream.as_raw()) };
        self.runtime.check("cudaGraphLaunch", code)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: the graph is destroyed once. Launches that are on their way
        // are not affected.
        unsafe { (self.runtime.symbols.graph_exec_destroy)(self.exec) };
    }
}

impl CudaRuntime {
    /// The number of a stream's capture, and its graph, which is alive until the capture ends or breaks.
    fn capture_info(&'static self, stream: &Stream) -> Result<(u64, RawGraph)> {
        let _device = self.on_device_of(stream)?;
        let (mut status, mut id, mut graph) = (CAPTURE_NONE, 0, ptr::null_mut());
        let nothing = ptr::null_mut;
        // SAFETY: the stream is alive; what is asked for is written, the rest is
        // optional.
        let code = unsafe {
            (self.symbols.stream_get_capture_info)(
                stream.as_raw(),
                &mut status,
                &mut id,
                &mut graph,
                nothing(),
                nothing(),
                ptr::null_mut(),
            )
        };
        self.check("cudaStreamGetCaptureInfo", code)?;
        if graph.is_null() {
            return Err(FlashInferError::invalid(
                capture::OP,
                "body",
                "something in it broke the capture or ended it: a first call, which loads a kernel (run the same work \
                 once before), a view of a cudarc slice (make it before, or use gpu::Tensor), an allocation, or a \
                 wait",
            ));
        }
        Ok((id, graph))
    }

    /// # Safety
    /// The graph must be alive.
    unsafe fn count_nodes(&self, graph: RawGraph) -> Result<usize> {
        let mut nodes = 0;
        // SAFETY: the graph is alive; without an array, nodes are counted only.
        let code = unsafe { (self.symbols.graph_get_nodes)(graph, ptr::null_mut(), &mut nodes) };
        self.check("cudaGraphGetNodes", code).map(|()| nodes)
    }

    /// The nodes of the graph that a stream is being captured into.
    pub(crate) fn captured_nodes(&'static self, stream: &Stream) -> Result<usize> {
        let _device = self.on_device_of(stream)?;
        let (_, graph) = self.capture_info(stream)?;
        // SAFETY: the capture was unbroken just now, and no other thread ends it.
        unsafe { self.count_nodes(graph) }
    }
}
