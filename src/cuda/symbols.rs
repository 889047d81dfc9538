//! The functions of `libcudart` that the crate calls, their types and constants.

use std::ffi::{c_char, c_int, c_uint, c_void};

use crate::{
    error::{FlashInferError, Result},
    loader::Library,
};

pub(super) type CudaError = c_int;
pub(super) type RawEvent = *mut c_void;
pub(super) type RawGraph = *mut c_void;
pub(super) type RawNode = *mut c_void;

/// `cudaErrorNotReady`.
pub(super) const NOT_READY: CudaError = 600;
/// `cudaMemcpyHostToDevice`.
pub(super) const HOST_TO_DEVICE: c_int = 1;
/// `cudaMemcpyDeviceToDevice`.
pub(super) const DEVICE_TO_DEVICE: c_int = 3;
/// The most bytes from row to row of a two-dimensional copy
/// (`cudaDevAttrMaxPitch`, the same on all devices).
pub(super) const MAX_PITCH: usize = i32::MAX as usize;
/// `cudaEventDisableTiming`.
pub(super) const EVENT_DISABLE_TIMING: c_uint = 2;
/// `cudaStreamCaptureStatusNone`.
pub(super) const CAPTURE_NONE: c_int = 0;
/// `cudaGraphNodeTypeEmpty`.
pub(super) const EMPTY_NODE: c_int = 5;
/// `cudaStreamCaptureModeThreadLocal`: what would break the capture is refused in this thread only.
pub(super) const CAPTURE_THREAD_LOCAL: c_int = 1;

macro_rules! cudart {
    ($($field:ident = $symbol:literal: fn($($arg:ty),*);)*) => {
        /// Function pointers of `libcudart`. Each returns a `cudaError_t`.
        #[derive(Debug)]
        pub(super) struct Symbols { $(pub(super) $field: unsafe extern "C" fn($($arg),*) -> CudaError,)* }

        impl Symbols {
            pub(super) fn load(library: &Library, name: &str) -> Result<Self> {
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
    graph_get_nodes = "cudaGraphGetNodes": fn(RawGraph, *mut RawNode, *mut usize);
    graph_node_get_type = "cudaGraphNodeGetType": fn(RawNode, *mut c_int);
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
    launch_kernel = "cudaLaunchKernelExC": fn(*const LaunchConfig, *const c_void, *mut *mut c_void);
}

/// `dim3`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Dim3 {
    pub(super) x: c_uint,
    pub(super) y: c_uint,
    pub(super) z: c_uint,
}

pub(super) fn missing(library: &str, symbol: &str) -> FlashInferError {
    FlashInferError::MissingSymbol { library: library.into(), symbol: symbol.into() }
}

/// `cudaLaunchConfig_t`.
#[repr(C)]
pub(super) struct LaunchConfig {
    pub(super) grid: Dim3,
    pub(super) block: Dim3,
    pub(super) dynamic_shared_bytes: usize,
    pub(super) stream: *mut c_void,
    pub(super) attributes: *const LaunchAttribute,
    pub(super) num_attributes: c_uint,
}

/// `cudaLaunchAttribute`, whose value is a union of 64 bytes.
#[repr(C)]
pub(super) struct LaunchAttribute {
    id: c_uint,
    padding: c_uint,
    value: [u64; 8],
}

impl LaunchAttribute {
    /// `cudaLaunchAttributeProgrammaticStreamSerialization`, allowed: the launch may begin before the one
    /// before it is over.
    pub(super) const OVERLAPS: Self = Self { id: 6, padding: 0, value: [1, 0, 0, 0, 0, 0, 0, 0] };
}
