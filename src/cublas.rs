//! cuBLAS, which the module `gemm` links against, and handles of cuBLASLt,
//! which its functions take.

use std::{
    collections::HashMap,
    ffi::{c_int, c_void},
    sync::{Mutex, PoisonError},
};

use crate::{
    artifacts::{Fetch, Member, Store},
    cuda::CudaRuntime,
    cuda_library::{self, LibrarySource},
    error::{FlashInferError, Result},
    stream::Stream,
};

/// The process's cuBLAS: `libcublasLt`, and `libcublas`, which needs it.
pub(crate) struct Cublas {
    create: unsafe extern "C" fn(*mut *mut c_void) -> c_int,
    version: usize,
    source: LibrarySource,
    /// The handle of each device, as an address. They live as long as the
    /// process: work in a graph may outlive whoever asked for one.
    handles: Mutex<HashMap<u32, usize>>,
}

impl Cublas {
    /// Opens the two libraries, which stay open.
    pub(crate) fn load(store: &Store, fetch: Fetch) -> Result<Self> {
        // This order: the second finds the first by its name.
        let (lt, source) = cuda_library::load(&Member::CublasLt, store, fetch)?;
        let (cublas, _) = cuda_library::load(&Member::Cublas, store, fetch)?;
        let missing = |symbol: &str| FlashInferError::MissingSymbol {
            library: Member::CublasLt.file_name(),
            symbol: symbol.into(),
        };
        // SAFETY: the signatures are those of the headers of cuBLAS 13; the
        // library is never unloaded.
        let (create, version) = unsafe {
            let create = lt.get("cublasLtCreate").map_err(|_| missing("cublasLtCreate"))?;
            let version = lt.get::<unsafe extern "C" fn() -> usize>("cublasLtGetVersion");
            (*create, version.map_err(|_| missing("cublasLtGetVersion"))?())
        };
        std::mem::forget((lt, cublas));
        Ok(Self { create, version, source, handles: Mutex::default() })
    }

    /// Where `libcublasLt` came from.
    pub(crate) fn source(&self) -> &LibrarySource {
        &self.source
    }

    /// The version of `libcublasLt`, which packs it as 10000 × major + 100 ×
    /// minor + patch.
    pub(crate) fn version(&self) -> (usize, usize, usize) {
        (self.version / 10_000, self.version / 100 % 100, self.version % 100)
    }

    /// The cuBLASLt handle of the stream's device, as an address. It may be
    /// used from any thread.
    ///
    /// # Errors
    /// [`FlashInferError::Unsupported`]: cuBLASLt did not make one.
    pub(crate) fn handle(&self, cuda: &'static CudaRuntime, stream: &Stream) -> Result<usize> {
        let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&handle) = handles.get(&stream.ordinal()) {
            return Ok(handle);
        }
        // A handle is the current device's.
        let _device = cuda.on_device_of(stream)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: one pointer is written.
        let status = unsafe { (self.create)(&mut handle) };
        if status != 0 || handle.is_null() {
            return Err(FlashInferError::Unsupported {
                what: format!("cublasLtCreate on {} failed with cublasStatus {status}", stream.device()),
                available: "it needs an NVIDIA GPU with free memory, and a driver for CUDA 13".into(),
            });
        }
        handles.insert(stream.ordinal(), handle as usize);
        Ok(handle as usize)
    }
}
