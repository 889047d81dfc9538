//! `libtvm_ffi` itself: one per process, with its symbols looked up once.

use std::{
    ffi::{c_char, c_int, c_void},
    path::Path,
    ptr::{self, NonNull},
    sync::OnceLock,
};

use super::{
    abi::{Any, ByteArray, ObjectHeader, SafeCall, TensorAllocator, Version},
    object::Object,
};
use crate::{
    error::{FlashInferError, Result},
    library_file::open_library,
    loader::{self, Library, SignalHandler},
};

macro_rules! tvm_ffi {
    ($($(#[$doc:meta])* $field:ident = $symbol:literal: fn($($arg:ty),*) $(-> $ret:ty)?;)*) => {
        /// Function pointers of `libtvm_ffi`, with the signatures of
        /// `c_api.h` and `c_env_api.h`.
        pub(crate) struct TvmFfi {
            version: Version,
            $($(#[$doc])* pub(crate) $field: unsafe extern "C" fn($($arg),*) $(-> $ret)?,)*
        }

        impl TvmFfi {
            fn load(library: &Library) -> Result<Self> {
                $(
                    // SAFETY: the signature is that of the C headers of 0.1;
                    // the library is never unloaded.
                    let $field: unsafe extern "C" fn($($arg),*) $(-> $ret)? = unsafe {
                        *library.get($symbol).map_err(|_| missing($symbol))?
                    };
                )*
                Ok(Self { version: Self::version_of(library)?, $($field),* })
            }
        }
    };
}

tvm_ffi! {
    object_dec_ref = "TVMFFIObjectDecRef": fn(*mut ObjectHeader) -> c_int;
    error_move_from_raised = "TVMFFIErrorMoveFromRaised": fn(*mut *mut ObjectHeader);
    error_set_raised = "TVMFFIErrorSetRaisedFromCStr": fn(*const c_char, *const c_char);
    function_create = "TVMFFIFunctionCreate":
        fn(*mut c_void, SafeCall, Option<unsafe extern "C" fn(*mut c_void)>, *mut *mut ObjectHeader) -> c_int;
    function_set_global = "TVMFFIFunctionSetGlobal": fn(*const ByteArray, *mut ObjectHeader, c_int) -> c_int;
    function_get_global = "TVMFFIFunctionGetGlobal": fn(*const ByteArray, *mut *mut ObjectHeader) -> c_int;
    function_call = "TVMFFIFunctionCall": fn(*mut ObjectHeader, *const Any, i32, *mut Any) -> c_int;
    env_set_stream = "TVMFFIEnvSetStream": fn(i32, i32, *mut c_void, *mut *mut c_void) -> c_int;
    env_set_allocator = "TVMFFIEnvSetDLPackManagedTensorAllocator":
        fn(Option<TensorAllocator>, c_int, *mut Option<TensorAllocator>) -> c_int;
    env_get_allocator = "TVMFFIEnvGetDLPackManagedTensorAllocator": fn() -> Option<TensorAllocator>;
}

pub(super) fn missing(symbol: &str) -> FlashInferError {
    FlashInferError::MissingSymbol { library: "libtvm_ffi".into(), symbol: symbol.into() }
}

/// The versions that this crate speaks, for messages.
pub(crate) const FITTING_VERSIONS: &str = "0.1.x, x at least 6 and not 8";

static LIBRARY: OnceLock<TvmFfi> = OnceLock::new();

impl TvmFfi {
    /// The process's library, once [`install`](Self::install) has run.
    pub(crate) fn get() -> Option<&'static Self> {
        LIBRARY.get()
    }

    /// The library's version.
    pub(crate) fn version(&self) -> Version {
        self.version
    }

    /// Takes the error that a call which failed left behind in this thread: its
    /// kind, message and backtrace. Whatever is left there would be taken for
    /// the next call's.
    pub(crate) fn raised(&self) -> Option<(String, String, String)> {
        let mut error = ptr::null_mut();
        // SAFETY: moves one owned reference, or null, out of the slot.
        unsafe { (self.error_move_from_raised)(&mut error) };
        // SAFETY: the reference is ours.
        unsafe { Object::from_owned(NonNull::new(error)?) }.to_error()
    }

    /// The same, to be put behind a message: a colon and the library's words.
    pub(crate) fn reason(&self) -> String {
        self.raised().map_or_else(String::new, |(kind, message, _)| format!(": {kind}: {message}"))
    }

    /// Whether the version is one that FlashInfer 0.6.13 works with.
    fn fits(version: Version) -> bool {
        version.major == 0 && version.minor == 1 && version.patch >= 6 && version.patch != 8
    }

    /// The library's version; the function that tells it is the same in all.
    fn version_of(library: &Library) -> Result<Version> {
        let symbol = "TVMFFIGetVersion";
        // SAFETY: the signature is stable across all versions; it fills in the
        // struct that it is given.
        unsafe {
            let get =
                library.get::<unsafe extern "C" fn(*mut Version)>(symbol).map_err(|_| missing(symbol))?;
            let mut version = Version::default();
            get(&mut version);
            Ok(version)
        }
    }

    /// Uses a library that is already in the process, under its usual name.
    /// `Ok(None)` when there is none.
    ///
    /// # Errors
    /// One is there, but its version does not fit: a second copy cannot be
    /// loaded beside it, because modules find its symbols by name.
    pub(crate) fn adopt() -> Result<Option<&'static Self>> {
        // With RTLD_GLOBAL this also promotes a copy that was opened locally,
        // so that modules can find its symbols.
        // SAFETY: RTLD_NOLOAD runs no initializer.
        let found = unsafe {
            Library::open(Some("libtvm_ffi.so"), loader::RTLD_NOW | loader::RTLD_GLOBAL | loader::RTLD_NOLOAD)
        };
        let library = match found {
            Ok(library) => library,
            Err(_) => {
                let Some(this) = loader::process() else { return Ok(None) };
                // SAFETY: only asks whether the symbol exists (the library may
                // be linked into the program).
                if unsafe { this.get::<unsafe extern "C" fn()>("TVMFFIGetVersion") }.is_err() {
                    return Ok(None);
                }
                this
            }
        };
        Self::install(library).map(Some)
    }

    /// Opens a library file globally and makes it the process's.
    pub(crate) fn open(path: &Path) -> Result<&'static Self> {
        let handler = SignalHandler::save();
        // Its initializers replace the SIGSEGV handler, which is put back.
        let library = open_library(path, loader::RTLD_NOW | loader::RTLD_GLOBAL);
        drop(handler);
        let library = library?;
        Self::install(library)
    }

    fn install(library: Library) -> Result<&'static Self> {
        let version = Self::version_of(&library)?;
        if !Self::fits(version) {
            let Version { major, minor, patch } = version;
            return Err(FlashInferError::AbiVersion {
                found: format!("{major}.{minor}.{patch}"),
                expected: FITTING_VERSIONS,
            });
        }
        let loaded = Self::load(&library)?;
        // Never unloaded: modules and objects refer to its code.
        std::mem::forget(library);
        Ok(LIBRARY.get_or_init(|| loaded))
    }
}
