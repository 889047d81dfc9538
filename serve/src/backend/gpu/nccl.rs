//! NCCL, loaded when the first group of ranks meets.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    ptr,
};

use flashinfer_rs::{
    CudaLibrary,
    artifacts::{Member, Package, Store},
};

use crate::{Result, hub};

/// What ranks know a communicator by.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId(pub [u8; 128]);

pub type Communicator = *mut c_void;
/// What memory is registered as.
pub type Window = *mut c_void;

/// `ncclSum`.
const SUM: c_int = 0;
/// `NCCL_WIN_COLL_SYMMETRIC`: at the same offset of the memory of all ranks.
const SYMMETRIC: c_int = 1;

/// The functions of NCCL that are called, of its header of version 2.
#[derive(Clone, Copy)]
pub struct Nccl {
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    comm_init_rank: unsafe extern "C" fn(*mut Communicator, c_int, UniqueId, c_int) -> c_int,
    comm_abort: unsafe extern "C" fn(Communicator) -> c_int,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        Communicator,
        *mut c_void,
    ) -> c_int,
    all_gather:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Communicator, *mut c_void) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    memory: Option<MemoryFunctions>,
}

/// Those of memory that the other ranks' kernels reach, which NCCL has since 2.27.
#[derive(Clone, Copy)]
struct MemoryFunctions {
    allocate: unsafe extern "C" fn(*mut *mut c_void, usize) -> c_int,
    free: unsafe extern "C" fn(*mut c_void) -> c_int,
    register: unsafe extern "C" fn(Communicator, *mut c_void, usize, *mut Window, c_int) -> c_int,
    deregister: unsafe extern "C" fn(Communicator, Window) -> c_int,
}

impl Nccl {
    /// From the process, the machine, a Python environment, or the pinned wheel.
    pub fn load() -> Result<Self> {
        let package = Package::Other("nvidia_nccl".into());
        let member = Member::File { package, suffix: "nvidia/nccl/lib/libnccl.so.2".into() };
        let mut config = hub::store_config()?;
        config.progress = Some(flashinfer_rs::progress::terminal());
        let library = CudaLibrary::open(&member, &Store::open(config)?)?;
        // SAFETY: these are the functions' types in NCCL's header.
        let nccl = unsafe {
            Self {
                get_unique_id: library.function("ncclGetUniqueId")?,
                comm_init_rank: library.function("ncclCommInitRank")?,
                comm_abort: library.function("ncclCommAbort")?,
                all_reduce: library.function("ncclAllReduce")?,
                all_gather: library.function("ncclAllGather")?,
                get_error_string: library.function("ncclGetErrorString")?,
                memory: memory_functions(&library),
            }
        };
        tracing::debug!("NCCL: {}", library.source());
        Ok(nccl)
    }

    /// What a status says.
    fn check(&self, what: &str, status: c_int) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: it takes any status, and returns text that lives as long as the library.
        let text = unsafe { CStr::from_ptr((self.get_error_string)(status)) };
        let hint = "NCCL_DEBUG=WARN tells more";
        Err(format!("{what} failed: {} (NCCL status {status}; {hint})", text.to_string_lossy()).into())
    }

    /// What a new communicator is known by.
    pub fn unique_id(&self) -> Result<UniqueId> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: it writes an id.
        self.check("ncclGetUniqueId", unsafe { (self.get_unique_id)(&mut id) })?;
        Ok(id)
    }

    /// Rank `rank`'s communicator of `size` ranks, on the current device. All of them do so at a time.
    pub fn meet(&self, id: UniqueId, rank: usize, size: usize) -> Result<Communicator> {
        let mut communicator = ptr::null_mut();
        let (size, rank) = (c_int::try_from(size)?, c_int::try_from(rank)?);
        // SAFETY: it writes a communicator of the current device.
        let status = unsafe { (self.comm_init_rank)(&mut communicator, size, id, rank) };
        self.check("ncclCommInitRank", status)?;
        Ok(communicator)
    }

    /// Ends a communicator. Other than destroying it, this waits for no other rank.
    ///
    /// # Safety
    /// It is one, and is not used any more; what was enqueued is over, or of no use.
    pub unsafe fn abort(&self, communicator: Communicator) {
        // SAFETY: as the caller says.
        unsafe { (self.comm_abort)(communicator) };
    }

    /// Enqueues on a stream: `count` numbers become their sums over all ranks.
    ///
    /// # Safety
    /// So many numbers of NCCL's type `dtype` are there, on the communicator's device, as are those of
    /// the other ranks, which enqueue the same; the stream is one of that device.
    pub unsafe fn all_reduce(
        &self,
        data: *mut c_void,
        count: usize,
        dtype: c_int,
        communicator: Communicator,
        stream: *mut c_void,
    ) -> Result<()> {
        // SAFETY: as the caller says.
        let status = unsafe { (self.all_reduce)(data, data, count, dtype, SUM, communicator, stream) };
        self.check("ncclAllReduce", status)
    }

    /// Enqueues on a stream: the `count` numbers of each rank are written in the order of ranks.
    ///
    /// # Safety
    /// As of [`all_reduce`](Self::all_reduce), and there is room for the numbers of all ranks.
    pub unsafe fn all_gather(
        &self,
        (from, to): (*const c_void, *mut c_void),
        count: usize,
        dtype: c_int,
        communicator: Communicator,
        stream: *mut c_void,
    ) -> Result<()> {
        // SAFETY: as the caller says.
        let status = unsafe { (self.all_gather)(from, to, count, dtype, communicator, stream) };
        self.check("ncclAllGather", status)
    }

    /// Memory on the current device that can be [registered](Self::register); `None` if this version
    /// has none.
    pub fn allocate(&self, bytes: usize) -> Result<Option<*mut c_void>> {
        let Some(functions) = &self.memory else { return Ok(None) };
        let mut memory = ptr::null_mut();
        // SAFETY: it writes an address.
        let status = unsafe { (functions.allocate)(&mut memory, bytes) };
        self.check("ncclMemAlloc", status)?;
        Ok(Some(memory))
    }

    /// Gives memory back.
    ///
    /// # Safety
    /// It was [allocated](Self::allocate), nobody uses it any more, and what it was registered for has
    /// ended.
    pub unsafe fn free(&self, memory: *mut c_void) {
        if let Some(functions) = &self.memory {
            // SAFETY: as the caller says.
            unsafe { (functions.free)(memory) };
        }
    }

    /// Has kernels of a communicator reach the memory of all ranks, which do so at a time. Where they
    /// cannot, as between machines, nothing changes, and the window is null.
    ///
    /// # Safety
    /// So much memory was [allocated](Self::allocate), and is given back after it was
    /// [deregistered](Self::deregister).
    pub unsafe fn register(
        &self,
        communicator: Communicator,
        memory: *mut c_void,
        bytes: usize,
    ) -> Result<Window> {
        let mut window = ptr::null_mut();
        let Some(functions) = &self.memory else { return Ok(window) };
        // SAFETY: as the caller says; it writes an address.
        let status = unsafe { (functions.register)(communicator, memory, bytes, &mut window, SYMMETRIC) };
        self.check("ncclCommWindowRegister", status)?;
        Ok(window)
    }

    /// Ends what [`register`](Self::register) began. This waits for no other rank.
    ///
    /// # Safety
    /// The window is the communicator's, and none of its kernels runs, or will.
    pub unsafe fn deregister(&self, communicator: Communicator, window: Window) {
        if let Some(functions) = self.memory.filter(|_| !window.is_null()) {
            // SAFETY: as the caller says.
            unsafe { (functions.deregister)(communicator, window) };
        }
    }
}

/// The functions of later versions, if the library has them.
fn memory_functions(library: &CudaLibrary) -> Option<MemoryFunctions> {
    // SAFETY: these are the functions' types in NCCL's header.
    unsafe {
        Some(MemoryFunctions {
            allocate: library.function("ncclMemAlloc").ok()?,
            free: library.function("ncclMemFree").ok()?,
            register: library.function("ncclCommWindowRegister").ok()?,
            deregister: library.function("ncclCommWindowDeregister").ok()?,
        })
    }
}
