//! What ranks compute together on their GPUs: NCCL's sums and gathered numbers.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    ptr,
    sync::Arc,
};

use cudarc::driver::CudaStream;
use flashinfer_rs::{
    CudaLibrary, DType, Device, TensorMut, TensorRef,
    artifacts::{Member, Package, Store},
};

use crate::{Result, group::Group, hub, model::shard::Rank};

/// What ranks know a communicator by.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; 128]);

type Communicator = *mut c_void;

/// `ncclSum`.
const SUM: c_int = 0;

/// The functions of NCCL that are called, of its header of version 2.
#[derive(Clone, Copy)]
struct Nccl {
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
}

impl Nccl {
    /// From the process, the machine, a Python environment, or the pinned wheel.
    fn load() -> Result<Self> {
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
}

/// A rank's communicator, on one stream.
pub struct Ranks {
    nccl: Nccl,
    communicator: Communicator,
    rank: Rank,
    cuda: Arc<CudaStream>,
}

impl Ranks {
    /// Meets the other ranks of a group, each of which does so with a GPU of its own.
    ///
    /// # Errors
    /// NCCL is nowhere; or it finds no way between the GPUs.
    pub fn meet(group: &Group, cuda: &Arc<CudaStream>) -> Result<Self> {
        let (nccl, rank) = (Nccl::load()?, group.rank());
        let mut id = UniqueId([0; 128]);
        if rank.rank == 0 {
            // SAFETY: it writes an id.
            nccl.check("ncclGetUniqueId", unsafe { (nccl.get_unique_id)(&mut id) })?;
            group.send(&id.0.to_vec())?;
        } else {
            let (_, sent) = group.receive::<Vec<u8>>()?.ok_or("rank 0 is done")?;
            id.0 = sent.try_into().map_err(|_| "rank 0 sent no id of NCCL's")?;
        }
        cuda.context().bind_to_thread()?;
        let mut communicator = ptr::null_mut();
        let (size, number) = (c_int::try_from(rank.size)?, c_int::try_from(rank.rank)?);
        // SAFETY: it writes a communicator of the current device.
        let status = unsafe { (nccl.comm_init_rank)(&mut communicator, size, id, number) };
        nccl.check("ncclCommInitRank", status)?;
        Ok(Self { nccl, communicator, rank, cuda: cuda.clone() })
    }

    /// How many there are.
    pub fn size(&self) -> usize {
        self.rank.size
    }

    /// Replaces the numbers of a contiguous tensor by their sums over all ranks.
    pub fn all_reduce(&self, x: &mut TensorMut<'_>) -> Result<()> {
        let (dtype, count) = (self.check(&x.as_ref())?, x.numel());
        let (data, stream) = (x.data_ptr().cast(), self.cuda.cu_stream().cast());
        // SAFETY: so many numbers are there, of the stream's device, as are those of the other ranks,
        // which enqueue the same.
        let status =
            unsafe { (self.nccl.all_reduce)(data, data, count, dtype, SUM, self.communicator, stream) };
        self.nccl.check("ncclAllReduce", status)
    }

    /// Writes the numbers of all ranks, in their order. Both tensors are contiguous.
    pub fn all_gather(&self, out: &mut TensorMut<'_>, mine: &TensorRef<'_>) -> Result<()> {
        let (dtype, count) = (self.check(mine)?, mine.numel());
        if self.check(&out.as_ref())? != dtype || out.numel() != self.rank.size * count {
            return Err(format!("{} times {mine:?} in {out:?}", self.rank.size).into());
        }
        let (from, to, stream) =
            (mine.data_ptr().cast(), out.data_ptr().cast(), self.cuda.cu_stream().cast());
        // SAFETY: as above, and there is room for the numbers of all.
        let status = unsafe { (self.nccl.all_gather)(from, to, count, dtype, self.communicator, stream) };
        self.nccl.check("ncclAllGather", status)
    }

    /// NCCL's number of a tensor's type.
    fn check(&self, tensor: &TensorRef<'_>) -> Result<c_int> {
        let is_here = tensor.device() == Device::Cuda(self.cuda.context().ordinal() as u32);
        match tensor.dtype() {
            _ if !is_here || !tensor.is_contiguous() => {
                Err(format!("{tensor:?} is not contiguous on the GPU of rank {}", self.rank.rank).into())
            }
            DType::F16 => Ok(6),
            DType::F32 => Ok(7),
            DType::BF16 => Ok(9),
            other => Err(format!("ranks do not add numbers of {other}").into()),
        }
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        // Other than destroying it, this waits for no other rank.
        // SAFETY: it is not used any more; what was enqueued is over, or of no use.
        unsafe { (self.nccl.comm_abort)(self.communicator) };
    }
}
