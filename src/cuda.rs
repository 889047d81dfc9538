//! The few calls of the CUDA runtime that the crate makes itself, and the
//! buffers it owns.
//!
//! The kernel modules link against `libcudart.so.13`, so that library is in
//! the process anyway; its functions are looked up once, when the runtime
//! starts. Device buffers are allocated and freed in the order of one stream,
//! so that dropping one never waits for the device, and page-locked buffers
//! are not reused before the copies out of them are done.

use std::{
    any::Any,
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    ptr::{self, NonNull},
    sync::{Arc, Mutex, OnceLock},
};

use crate::{
    capture,
    dtype::DType,
    error::{FlashInferError, Result},
    loader::Library,
    stream::Stream,
    tensor::{Owner, RawTensor},
};

type CudaError = c_int;
type RawEvent = *mut c_void;
type RawGraph = *mut c_void;

/// `cudaErrorNotReady`.
const NOT_READY: CudaError = 600;
/// `cudaMemcpyHostToDevice`.
const HOST_TO_DEVICE: c_int = 1;
/// `cudaMemcpyDeviceToDevice`.
const DEVICE_TO_DEVICE: c_int = 3;
/// The most bytes from row to row of a two-dimensional copy
/// (`cudaDevAttrMaxPitch`, the same on all devices).
const MAX_PITCH: usize = i32::MAX as usize;
/// `cudaEventDisableTiming`.
const EVENT_DISABLE_TIMING: c_uint = 2;
/// `cudaStreamCaptureStatusNone`.
const CAPTURE_NONE: c_int = 0;
/// `cudaStreamCaptureModeThreadLocal`: what would break the capture is refused in this thread only.
const CAPTURE_THREAD_LOCAL: c_int = 1;

/// A property of a device, by its number in `cudaDeviceAttr`.
#[derive(Clone, Copy, Debug)]
#[repr(i32)]
pub(crate) enum DeviceAttribute {
    MultiprocessorCount = 16,
    ComputeCapabilityMajor = 75,
    ComputeCapabilityMinor = 76,
    MaxSharedMemoryPerMultiprocessor = 81,
    MaxSharedMemoryPerBlockOptin = 97,
}

macro_rules! cudart {
    ($($field:ident = $symbol:literal: fn($($arg:ty),*);)*) => {
        /// Function pointers of `libcudart`. Each returns a `cudaError_t`.
        #[derive(Debug)]
        struct Symbols { $($field: unsafe extern "C" fn($($arg),*) -> CudaError,)* }

        impl Symbols {
            fn load(library: &Library, name: &str) -> Result<Self> {
                Ok(Self { $(
                    // SAFETY: the signature is that of the CUDA 13 runtime's
                    // headers; the library is never unloaded.
                    $field: unsafe { *library.get($symbol).map_err(|_| missing(name, $symbol))? },
                )* })
            }
        }
    };
}

cudart! {
    runtime_get_version = "cudaRuntimeGetVersion": fn(*mut c_int);
    driver_get_version = "cudaDriverGetVersion": fn(*mut c_int);
    get_last_error = "cudaGetLastError": fn();
    get_device_count = "cudaGetDeviceCount": fn(*mut c_int);
    get_device = "cudaGetDevice": fn(*mut c_int);
    set_device = "cudaSetDevice": fn(c_int);
    device_get_attribute = "cudaDeviceGetAttribute": fn(*mut c_int, c_int, c_int);
    malloc_async = "cudaMallocAsync": fn(*mut *mut c_void, usize, *mut c_void);
    free_async = "cudaFreeAsync": fn(*mut c_void, *mut c_void);
    host_alloc = "cudaHostAlloc": fn(*mut *mut c_void, usize, c_uint);
    free_host = "cudaFreeHost": fn(*mut c_void);
    memcpy_async = "cudaMemcpyAsync": fn(*mut c_void, *const c_void, usize, c_int, *mut c_void);
    memcpy_2d_async = "cudaMemcpy2DAsync": fn(
        *mut c_void, usize, *const c_void, usize, usize, usize, c_int, *mut c_void
    );
    memset_async = "cudaMemsetAsync": fn(*mut c_void, c_int, usize, *mut c_void);
    memset_2d_async = "cudaMemset2DAsync": fn(*mut c_void, usize, c_int, usize, usize, *mut c_void);
    stream_begin_capture = "cudaStreamBeginCapture": fn(*mut c_void, c_int);
    stream_end_capture = "cudaStreamEndCapture": fn(*mut c_void, *mut RawGraph);
    stream_get_capture_info = "cudaStreamGetCaptureInfo": fn(
        *mut c_void, *mut c_int, *mut u64, *mut RawGraph, *mut *const c_void, *mut *const c_void, *mut usize
    );
    graph_get_nodes = "cudaGraphGetNodes": fn(RawGraph, *mut *mut c_void, *mut usize);
    graph_instantiate = "cudaGraphInstantiate": fn(*mut RawGraph, RawGraph, u64);
    graph_launch = "cudaGraphLaunch": fn(RawGraph, *mut c_void);
    graph_destroy = "cudaGraphDestroy": fn(RawGraph);
    graph_exec_destroy = "cudaGraphExecDestroy": fn(RawGraph);
    stream_is_capturing = "cudaStreamIsCapturing": fn(*mut c_void, *mut c_int);
    device_synchronize = "cudaDeviceSynchronize": fn();
    event_create = "cudaEventCreateWithFlags": fn(*mut RawEvent, c_uint);
    event_record = "cudaEventRecord": fn(RawEvent, *mut c_void);
    event_query = "cudaEventQuery": fn(RawEvent);
    event_synchronize = "cudaEventSynchronize": fn(RawEvent);
    event_destroy = "cudaEventDestroy": fn(RawEvent);
    library_load_data = "cudaLibraryLoadData": fn(
        *mut *mut c_void, *const c_void, *mut c_int, *mut *mut c_void, c_uint, *mut c_int, *mut *mut c_void, c_uint
    );
    library_get_kernel = "cudaLibraryGetKernel": fn(*mut *const c_void, *mut c_void, *const c_char);
    launch_kernel = "cudaLaunchKernel": fn(*const c_void, Dim3, Dim3, *mut *mut c_void, usize, *mut c_void);
}

/// `dim3`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Dim3 {
    x: c_uint,
    y: c_uint,
    z: c_uint,
}

fn missing(library: &str, symbol: &str) -> FlashInferError {
    FlashInferError::MissingSymbol { library: library.into(), symbol: symbol.into() }
}

/// The process's CUDA runtime library.
#[derive(Debug)]
pub(crate) struct CudaRuntime {
    symbols: Symbols,
    error_string: unsafe extern "C" fn(CudaError) -> *const c_char,
}

static CUDA_RUNTIME: OnceLock<CudaRuntime> = OnceLock::new();

impl CudaRuntime {
    /// Looks up the functions in an open `libcudart` and makes them the
    /// process's. The first library stays.
    pub(crate) fn install(library: Library, name: &str) -> Result<&'static Self> {
        let runtime = Self {
            symbols: Symbols::load(&library, name)?,
            // SAFETY: as in `Symbols::load`.
            error_string: unsafe {
                *library.get("cudaGetErrorString").map_err(|_| missing(name, "cudaGetErrorString"))?
            },
        };
        // Never unloaded: kernel modules and the pointers above depend on it.
        std::mem::forget(library);
        Ok(CUDA_RUNTIME.get_or_init(|| runtime))
    }

    /// The process's CUDA runtime, if [`install`](Self::install) has run.
    pub(crate) fn get() -> Option<&'static Self> {
        CUDA_RUNTIME.get()
    }

    fn check(&self, call: &'static str, code: CudaError) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        self.last_error();
        // SAFETY: the function takes any code and returns a static string.
        let message = unsafe { CStr::from_ptr((self.error_string)(code)) };
        Err(FlashInferError::Cuda { call, code, message: message.to_string_lossy().into_owned() })
    }

    /// The last failure in this thread. The runtime remembers it until it is
    /// asked, and modules that ask after a launch would take one that was
    /// reported already for theirs. That of a kernel it never forgets.
    pub(crate) fn last_error(&self) -> CudaError {
        // SAFETY: no arguments.
        unsafe { (self.symbols.get_last_error)() }
    }

    /// Forgets what an earlier call left in this thread, such as "not ready",
    /// and reports what stays.
    fn check_last_error(&self) -> Result<()> {
        if self.last_error() == 0 {
            return Ok(());
        }
        self.check("an earlier launch", self.last_error())
    }

    fn integer(&self, call: &'static str, get: unsafe extern "C" fn(*mut c_int) -> CudaError) -> Result<i32> {
        let mut value = 0;
        // SAFETY: the function writes one int through the pointer.
        self.check(call, unsafe { get(&mut value) })?;
        Ok(value)
    }

    /// The version of `libcudart`, as 1000 × major + 10 × minor.
    pub(crate) fn runtime_version(&self) -> Result<i32> {
        self.integer("cudaRuntimeGetVersion", self.symbols.runtime_get_version)
    }

    /// The newest CUDA version that the driver serves; 0 without a driver.
    pub(crate) fn driver_version(&self) -> Result<i32> {
        self.integer("cudaDriverGetVersion", self.symbols.driver_get_version)
    }

    /// The number of visible CUDA devices.
    pub(crate) fn device_count(&self) -> Result<i32> {
        self.integer("cudaGetDeviceCount", self.symbols.get_device_count)
    }

    /// A property of a device. Cheap: the runtime answers from memory.
    pub(crate) fn attribute(&self, ordinal: u32, attribute: DeviceAttribute) -> Result<i32> {
        let mut value = 0;
        // SAFETY: writes one int through the pointer.
        let code =
            unsafe { (self.symbols.device_get_attribute)(&mut value, attribute as c_int, ordinal as c_int) };
        self.check("cudaDeviceGetAttribute", code)?;
        Ok(value)
    }

    /// Major and minor compute capability of a device.
    pub(crate) fn compute_capability(&self, ordinal: u32) -> Result<(i32, i32)> {
        Ok((
            self.attribute(ordinal, DeviceAttribute::ComputeCapabilityMajor)?,
            self.attribute(ordinal, DeviceAttribute::ComputeCapabilityMinor)?,
        ))
    }

    /// Whether work enqueued on the stream goes into a CUDA graph.
    pub(crate) fn is_capturing(&'static self, stream: &Stream) -> Result<bool> {
        let _device = self.on_device_of(stream)?;
        let mut status = CAPTURE_NONE;
        // SAFETY: the stream is alive (it is borrowed); one int is written.
        let code = unsafe { (self.symbols.stream_is_capturing)(stream.as_raw(), &mut status) };
        self.check("cudaStreamIsCapturing", code)?;
        Ok(status != CAPTURE_NONE)
    }

    /// Reports a failure of the stream's device, for launchers that end the
    /// process over one, or never return, whoever caused it.
    pub(crate) fn check_healthy(&'static self, stream: &Stream) -> Result<()> {
        // Any call reports a failure of the device.
        self.is_capturing(stream)?;
        self.check_last_error()
    }

    /// Enqueues the writing of zeros.
    ///
    /// # Safety
    /// `data` must point to that many bytes of the stream's device.
    pub(crate) unsafe fn zero(&'static self, stream: &Stream, data: *mut c_void, bytes: usize) -> Result<()> {
        let _device = self.on_device_of(stream)?;
        capture::enqueue(stream, || {
            // SAFETY: promised by the caller; the stream is alive.
            let code = unsafe { (self.symbols.memset_async)(data, 0, bytes, stream.as_raw()) };
            self.check("cudaMemsetAsync", code)
        })
    }

    /// Enqueues the writing of `count` times the same number. The runtime sets
    /// bytes only, so this sets the first byte of each number, then the second,
    /// and so on.
    ///
    /// # Safety
    /// `data` must point to that many numbers of the stream's device.
    pub(crate) unsafe fn fill(
        &'static self,
        stream: &Stream,
        data: *mut c_void,
        number: f32,
        count: usize,
    ) -> Result<()> {
        let _device = self.on_device_of(stream)?;
        for (at, byte) in number.to_le_bytes().into_iter().enumerate() {
            let first = data.cast::<u8>().wrapping_add(at).cast();
            capture::enqueue(stream, || {
                let (pitch, width) = (size_of::<f32>(), 1);
                // SAFETY: promised by the caller; the stream is alive.
                let code = unsafe {
                    (self.symbols.memset_2d_async)(first, pitch, byte.into(), width, count, stream.as_raw())
                };
                self.check("cudaMemset2DAsync", code)
            })?;
        }
        Ok(())
    }

    /// Waits for all work on the stream's device.
    pub(crate) fn wait_for_device_of(&'static self, stream: &Stream) -> Result<()> {
        let _device = self.on_device_of(stream)?;
        // SAFETY: no arguments.
        self.check("cudaDeviceSynchronize", unsafe { (self.symbols.device_synchronize)() })
    }

    /// Runs a launcher that learns of its launch from the last error of this
    /// thread, or that does not look at all.
    ///
    /// It finds no error of an earlier call to take for its own, and leaves
    /// none of its own to a later one. After a kernel failed, nothing is
    /// launched.
    pub(crate) fn watch_launch<T>(&self, launch: impl FnOnce() -> Result<T>) -> Result<T> {
        self.check_last_error()?;
        let (launched, code) = (launch(), self.last_error());
        let launched = launched?;
        self.check("a launch", code)?;
        Ok(launched)
    }

    /// Enqueues the copy of `rows` rows of `bytes` bytes each, `pitch` bytes
    /// from one to the next, to others that are as far apart.
    ///
    /// # Safety
    /// Both pointers must be to such rows of the stream's device, which do not
    /// overlap.
    pub(crate) unsafe fn copy_rows(
        &'static self,
        stream: &Stream,
        [source, target]: [*mut c_void; 2],
        rows: usize,
        bytes: usize,
        pitch: usize,
    ) -> Result<()> {
        let _device = self.on_device_of(stream)?;
        let kind = DEVICE_TO_DEVICE;
        if rows > 1 && pitch <= MAX_PITCH {
            let copy = self.symbols.memcpy_2d_async;
            // SAFETY: promised by the caller; the stream is alive.
            let code = unsafe { copy(target, pitch, source, pitch, bytes, rows, kind, stream.as_raw()) };
            return self.check("cudaMemcpy2DAsync", code);
        }
        for row in 0..rows {
            let at = |data: *mut c_void| data.cast::<u8>().wrapping_add(row * pitch).cast();
            // SAFETY: as above.
            let code = unsafe {
                (self.symbols.memcpy_async)(at(target), at(source).cast_const(), bytes, kind, stream.as_raw())
            };
            self.check("cudaMemcpyAsync", code)?;
        }
        Ok(())
    }

    /// Makes the stream's device current until the guard is dropped.
    pub(crate) fn on_device_of(&'static self, stream: &Stream) -> Result<DeviceGuard> {
        let previous = self.integer("cudaGetDevice", self.symbols.get_device)?;
        let wanted = stream.ordinal() as c_int;
        if previous == wanted {
            return Ok(DeviceGuard { runtime: self, restore: None });
        }
        // SAFETY: takes a number.
        self.check("cudaSetDevice", unsafe { (self.symbols.set_device)(wanted) })?;
        Ok(DeviceGuard { runtime: self, restore: Some(previous) })
    }
}

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

    /// The graph, if it is that of this capture, and the number of its nodes.
    pub(crate) fn end(mut self) -> Result<(Graph, usize)> {
        let (runtime, stream) = (self.runtime, self.stream.clone());
        let info = runtime.capture_info(&stream);
        let ended = self.end_now();
        let ((id, nodes), graph) = (info?, ended?);
        if id != self.id {
            return Err(FlashInferError::invalid(
                capture::OP,
                "body",
                "it ended the capture, and began another",
            ));
        }
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

/// A graph that was not instantiated.
struct Template(RawGraph, &'static CudaRuntime);

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
    /// The number of a stream's capture, and the nodes of its graph so far.
    fn capture_info(&'static self, stream: &Stream) -> Result<(u64, usize)> {
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
                 once before), a view of a cudarc slice (make it before, or use cudarc::Tensor), an allocation, or a \
                 wait",
            ));
        }
        let mut nodes = 0;
        // SAFETY: the graph is alive while the stream is captured; without an
        // array, nodes are counted only.
        let code = unsafe { (self.symbols.graph_get_nodes)(graph, ptr::null_mut(), &mut nodes) };
        self.check("cudaGraphGetNodes", code)?;
        Ok((id, nodes))
    }

    /// The nodes of the graph that a stream is being captured into.
    pub(crate) fn captured_nodes(&'static self, stream: &Stream) -> Result<usize> {
        Ok(self.capture_info(stream)?.1)
    }
}

/// Puts the device back that was current before.
pub(crate) struct DeviceGuard {
    runtime: &'static CudaRuntime,
    restore: Option<c_int>,
}

impl Drop for DeviceGuard {
    fn drop(&mut self) {
        if let Some(device) = self.restore {
            // SAFETY: takes a number; it was current before.
            unsafe { (self.runtime.symbols.set_device)(device) };
        }
    }
}

/// A kernel of this crate: a function of a PTX module, which the driver
/// compiles for whatever device it is launched on.
pub(crate) struct PtxKernel {
    /// Ends in a NUL.
    ptx: &'static str,
    name: &'static CStr,
    /// The `cudaKernel_t`, of the whole process; 0 until it is loaded.
    handle: Mutex<usize>,
}

impl PtxKernel {
    pub(crate) const fn new(ptx: &'static str, name: &'static CStr) -> Self {
        Self { ptx, name, handle: Mutex::new(0) }
    }

    /// Whether it was loaded already.
    pub(crate) fn is_loaded(&self) -> bool {
        *self.handle.lock().unwrap_or_else(std::sync::PoisonError::into_inner) != 0
    }

    /// The kernel's handle, which stays valid for the life of the process.
    pub(crate) fn load(&self, cuda: &CudaRuntime) -> Result<*const c_void> {
        let mut handle = self.handle.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
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

    /// Enqueues the kernel with `[blocks, threads]` in one dimension. `tensors`
    /// are those whose memory it is given.
    ///
    /// # Safety
    /// `args` must point to values of the kernel's parameters, which must be
    /// what it assumes.
    pub(crate) unsafe fn launch(
        &self,
        cuda: &'static CudaRuntime,
        stream: &Stream,
        [blocks, threads]: [u32; 2],
        args: &mut [*mut c_void],
        tensors: &[Option<&RawTensor>],
    ) -> Result<()> {
        let kernel = self.load(cuda)?;
        tensors.iter().flatten().for_each(|tensor| capture::uses(tensor));
        let _device = cuda.on_device_of(stream)?;
        let line = |x| Dim3 { x, y: 1, z: 1 };
        capture::enqueue(stream, || {
            // SAFETY: the runtime takes a `cudaKernel_t` in place of a function;
            // the rest is promised by the caller.
            let code = unsafe {
                (cuda.symbols.launch_kernel)(
                    kernel,
                    line(blocks),
                    line(threads),
                    args.as_mut_ptr(),
                    0,
                    stream.as_raw(),
                )
            };
            cuda.check("cudaLaunchKernel", code)
        })
    }
}

/// Device memory, allocated and freed in the order of one stream. A captured
/// step that uses it has a share of it.
pub(crate) struct DeviceBuffer {
    allocation: Arc<Allocation>,
}

struct Allocation {
    runtime: &'static CudaRuntime,
    data: NonNull<c_void>,
    bytes: usize,
    stream: Stream,
}

// SAFETY: it is an address; work on it is ordered by its stream.
unsafe impl Send for Allocation {}
// SAFETY: as for `Send`; shared access only hands out the address.
unsafe impl Sync for Allocation {}

impl DeviceBuffer {
    /// At least one byte, aligned to 256, usable by later work on `stream`.
    ///
    /// # Errors
    /// Also while the stream is being captured: the memory would be the
    /// graph's, and there only while the graph runs.
    pub(crate) fn new(runtime: &'static CudaRuntime, stream: &Stream, bytes: usize) -> Result<Self> {
        if runtime.is_capturing(stream)? {
            return Err(FlashInferError::invalid(
                "device memory",
                "stream",
                "it is being captured into a CUDA graph; allocate before the capture",
            ));
        }
        let _device = runtime.on_device_of(stream)?;
        let bytes = bytes.max(1);
        let mut data = ptr::null_mut();
        // SAFETY: the stream is alive; one pointer is written.
        let code = unsafe { (runtime.symbols.malloc_async)(&mut data, bytes, stream.as_raw()) };
        runtime
            .check("cudaMallocAsync", code)
            .map_err(|error| error.in_part(&format!("{bytes} bytes of device memory")))?;
        let data = NonNull::new(data).ok_or(FlashInferError::Cuda {
            call: "cudaMallocAsync",
            code: 2,
            message: "a null pointer came back".into(),
        })?;
        let allocation = Allocation { runtime, data, bytes, stream: stream.clone() };
        Ok(Self { allocation: Arc::new(allocation) })
    }

    /// As [`new`](Self::new), filled with zeros in the order of the stream.
    pub(crate) fn zeroed(runtime: &'static CudaRuntime, stream: &Stream, bytes: usize) -> Result<Self> {
        let buffer = Self::new(runtime, stream, bytes)?;
        // SAFETY: the buffer has that many bytes, on the stream's device.
        unsafe { runtime.zero(stream, buffer.as_ptr(), buffer.len()) }?;
        Ok(buffer)
    }

    pub(crate) fn as_ptr(&self) -> *mut c_void {
        self.allocation.data.as_ptr()
    }

    /// What keeps the memory alive.
    pub(crate) fn share(&self) -> Arc<dyn Any + Send + Sync> {
        self.allocation.clone()
    }

    /// The same, for views.
    pub(crate) fn owner(&self) -> Owner {
        Owner::of(&self.allocation)
    }

    /// The buffer as a tensor of bytes.
    pub(crate) fn as_bytes(&self) -> Result<RawTensor> {
        let mut raw = RawTensor::new(self.as_ptr(), self.stream().device(), DType::U8, &[self.len()], None)?;
        raw.owner = Some(self.owner());
        Ok(raw)
    }

    pub(crate) fn len(&self) -> usize {
        self.allocation.bytes
    }

    pub(crate) fn stream(&self) -> &Stream {
        &self.allocation.stream
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // All work on the buffer was enqueued on its stream. Where that stream
        // cannot be named from here (another thread's default stream), wait for
        // the device. A failure, for example during graph capture, leaks the
        // memory: drop has no way to report it, and leaking is safe.
        let Ok(_device) = self.runtime.on_device_of(&self.stream) else { return };
        let stream = if self.stream.is_usable_here() {
            self.stream.as_raw()
        } else {
            // SAFETY: no arguments.
            if unsafe { (self.runtime.symbols.device_synchronize)() } != 0 {
                return;
            }
            ptr::null_mut()
        };
        // SAFETY: the pointer came from `cudaMallocAsync` and is freed once,
        // after all work that uses it in stream order; the stream is alive,
        // because `self.stream` is.
        unsafe { (self.runtime.symbols.free_async)(self.data.as_ptr(), stream) };
    }
}

/// A CUDA event without timing.
struct Event {
    runtime: &'static CudaRuntime,
    raw: RawEvent,
}

impl Event {
    fn new(runtime: &'static CudaRuntime) -> Result<Self> {
        let mut raw = ptr::null_mut();
        // SAFETY: one handle is written.
        let code = unsafe { (runtime.symbols.event_create)(&mut raw, EVENT_DISABLE_TIMING) };
        runtime.check("cudaEventCreateWithFlags", code)?;
        Ok(Self { runtime, raw })
    }

    fn record(&self, stream: &Stream) -> Result<()> {
        // SAFETY: event and stream are alive and of one device.
        let code = unsafe { (self.runtime.symbols.event_record)(self.raw, stream.as_raw()) };
        self.runtime.check("cudaEventRecord", code)
    }

    /// Returns when the work recorded last is done; at once if none was.
    fn wait(&self) -> Result<()> {
        // SAFETY: the event is alive.
        let code = unsafe { (self.runtime.symbols.event_query)(self.raw) };
        if code != NOT_READY {
            return self.runtime.check("cudaEventQuery", code);
        }
        self.runtime.last_error();
        // SAFETY: the event is alive.
        let code = unsafe { (self.runtime.symbols.event_synchronize)(self.raw) };
        self.runtime.check("cudaEventSynchronize", code)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event is destroyed once.
        unsafe { (self.runtime.symbols.event_destroy)(self.raw) };
    }
}

/// A page-locked host buffer and the event of the last copy out of it.
struct Slot {
    data: NonNull<u8>,
    copied: Event,
}

impl Drop for Slot {
    fn drop(&mut self) {
        // Without knowing that the copy is done (during a graph capture, say)
        // the memory is leaked: that is safe, and drop cannot report it.
        if self.copied.wait().is_err() {
            return;
        }
        // SAFETY: the pointer came from `cudaHostAlloc` and is freed once; no
        // copy reads it any more.
        unsafe { (self.copied.runtime.symbols.free_host)(self.data.as_ptr().cast()) };
    }
}

/// Two page-locked host buffers used in turn, so that the host can prepare
/// the next upload while the last one is still being copied.
pub(crate) struct StagingBuffer {
    slots: [Slot; 2],
    next: usize,
    bytes: usize,
}

// SAFETY: the buffers are plain host memory that only `&mut self` writes; CUDA
// events may be used from any thread.
unsafe impl Send for StagingBuffer {}
// SAFETY: nothing can be done through a shared reference.
unsafe impl Sync for StagingBuffer {}

impl StagingBuffer {
    pub(crate) fn new(runtime: &'static CudaRuntime, stream: &Stream, bytes: usize) -> Result<Self> {
        let _device = runtime.on_device_of(stream)?;
        let bytes = bytes.max(1);
        let slot = || -> Result<Slot> {
            let copied = Event::new(runtime)?;
            let mut data = ptr::null_mut();
            // SAFETY: one pointer is written; flags 0 is the default.
            let code = unsafe { (runtime.symbols.host_alloc)(&mut data, bytes, 0) };
            runtime.check("cudaHostAlloc", code)?;
            let data = NonNull::new(data.cast::<u8>()).ok_or(FlashInferError::Cuda {
                call: "cudaHostAlloc",
                code: 2,
                message: "a null pointer came back".into(),
            })?;
            // SAFETY: `bytes` bytes were just allocated; zeroing makes them
            // initialized, so that they may be seen as a slice.
            unsafe { data.write_bytes(0, bytes) };
            Ok(Slot { data, copied })
        };
        Ok(Self { slots: [slot()?, slot()?], next: 0, bytes })
    }

    /// Lets `fill` write the buffer whose last copy is oldest, and enqueue
    /// copies out of it on `stream`; then marks it busy until they are done.
    ///
    /// Waits for that oldest copy, which is two uses back.
    pub(crate) fn stage<R>(
        &mut self,
        stream: &Stream,
        fill: impl FnOnce(&mut [u8]) -> Result<R>,
    ) -> Result<R> {
        let slot = &self.slots[self.next];
        // The handles of default streams mean those of the current device.
        let _device = slot.copied.runtime.on_device_of(stream)?;
        slot.copied.wait()?;
        self.next = 1 - self.next;
        // SAFETY: the slot holds `bytes` initialized bytes; `&mut self` and the
        // wait above make this the only access.
        let bytes = unsafe { std::slice::from_raw_parts_mut(slot.data.as_ptr(), self.bytes) };
        let result = fill(bytes);
        // Recorded also when `fill` failed: it may have enqueued a copy.
        if let Err(error) = slot.copied.record(stream) {
            // Without the event, only waiting tells that the copy is done.
            // SAFETY: no arguments.
            unsafe { (slot.copied.runtime.symbols.device_synchronize)() };
            return Err(error);
        }
        result
    }
}

/// Enqueues a copy of `source` to `target`, from its byte `offset` on, on the
/// target's stream.
///
/// To be called within [`StagingBuffer::stage`], which sets the device.
///
/// # Safety
/// `source` must stay unchanged and page-locked until the copy is done.
pub(crate) unsafe fn upload(source: &[u8], target: &DeviceBuffer, offset: usize) -> Result<()> {
    if offset.checked_add(source.len()).is_none_or(|end| end > target.len()) {
        return Err(FlashInferError::invalid(
            "upload",
            "source",
            format!("{} bytes at {offset} of a buffer of {}", source.len(), target.len()),
        ));
    }
    // SAFETY: the target has room for the bytes; both pointers are alive until
    // the copy is done (the caller's promise and the target's stream order).
    let code = unsafe {
        (target.allocation.runtime.symbols.memcpy_async)(
            target.as_ptr().cast::<u8>().wrapping_add(offset).cast(),
            source.as_ptr().cast(),
            source.len(),
            HOST_TO_DEVICE,
            target.stream().as_raw(),
        )
    };
    target.allocation.runtime.check("cudaMemcpyAsync", code)
}
