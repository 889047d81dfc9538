//! A rank's communicators, and the memory that the other ranks reach.

use std::{cell::RefCell, ffi::c_void, rc::Rc, sync::Arc};

use cudarc::driver::{CudaStream, result, sys};
use flashinfer_rs::{DType, Device, TensorMut, TensorRef};

use super::super::nccl::{Communicator, Nccl, UniqueId, Window};
use crate::{Result, model::shard::Rank};

/// All that ends with a rank.
pub struct Communicators {
    pub nccl: Nccl,
    cuda: Arc<CudaStream>,
    /// For work that is captured into graphs, and for what is enqueued as it is. Once they have
    /// connected, each has work on one stream, of one kind, so that NCCL needs not order graphs and other
    /// work (`NCCL_GRAPH_MIXING_SUPPORT=0` of its version 2.28).
    pub captured: Communicator,
    pub direct: Communicator,
    memory: RefCell<Vec<(*mut c_void, Window)>>,
}

impl Communicators {
    /// Meets the other ranks, by an id of each communicator that all of them know.
    pub fn meet(
        nccl: Nccl,
        cuda: &Arc<CudaStream>,
        rank: Rank,
        id: impl Fn() -> Result<UniqueId>,
    ) -> Result<Self> {
        cuda.context().bind_to_thread()?;
        let meet = || nccl.meet(id()?, rank.rank, rank.size);
        let captured = meet()?;
        let direct = meet().inspect_err(|_| {
            // SAFETY: nothing was enqueued.
            unsafe { nccl.abort(captured) }
        })?;
        Ok(Self { nccl, cuda: cuda.clone(), captured, direct, memory: RefCell::default() })
    }

    /// Zeros that kernels of the communicator for graphs reach on all ranks; none if this version of NCCL
    /// has no such memory. That there can be a tensor of this type and shape is known.
    pub fn zeros(this: &Rc<Self>, dtype: DType, shape: &[usize]) -> Result<Option<Registered>> {
        let Self { nccl, cuda, captured, memory, .. } = &**this;
        let bytes = shape.iter().product::<usize>() * dtype.size();
        cuda.context().bind_to_thread()?;
        let Some(address) = nccl.allocate(bytes)? else { return Ok(None) };
        // SAFETY: so much was allocated just now, and `drop` keeps the order.
        let window = unsafe { nccl.register(*captured, address, bytes) }.inspect_err(|_| {
            // SAFETY: nobody knows it.
            unsafe { nccl.free(address) }
        })?;
        memory.borrow_mut().push((address, window));
        // SAFETY: so much memory is there, and nobody else knows it.
        unsafe { result::memset_d8_async(address as u64, 0, bytes, cuda.cu_stream())? };
        let device = Device::Cuda(cuda.context().ordinal() as u32);
        // SAFETY: the same, of zeros, in the order of the stream; it is there as long as the communicators.
        let tensor = unsafe { TensorMut::from_raw_parts(address, device, dtype, shape, None)? };
        Ok(Some(Registered { tensor, _memory: this.clone() }))
    }

    /// Whether the GPU is done with all that was enqueued.
    fn is_done(&self) -> bool {
        self.cuda.context().bind_to_thread().is_ok() && {
            // SAFETY: the stream is alive.
            let status = unsafe { sys::cuStreamQuery(self.cuda.cu_stream()) };
            status == sys::CUresult::CUDA_SUCCESS
        }
    }
}

impl Drop for Communicators {
    /// Waits for nobody. If a rank fails, others may wait for it on their GPUs: their memory is left to the end of
    /// the process then.
    fn drop(&mut self) {
        let done = self.is_done();
        let memory = self.memory.take();
        // SAFETY: nobody has the communicators any more, nor the memory, as tensors in it keep this alive. Where
        // memory is deregistered and given back, what works on it is over: on other ranks, too, which reach it in
        // sums alone, whose part on this stream ends when they are done with it.
        unsafe {
            if done {
                memory.iter().for_each(|&(_, window)| self.nccl.deregister(self.captured, window));
            }
            self.nccl.abort(self.captured);
            self.nccl.abort(self.direct);
            if done {
                memory.into_iter().for_each(|(memory, _)| self.nccl.free(memory));
            }
        }
    }
}

/// A contiguous tensor in memory that NCCL gave, which the kernels of all ranks reach.
pub struct Registered {
    tensor: TensorMut<'static>,
    /// What keeps the memory allocated.
    _memory: Rc<Communicators>,
}

impl Registered {
    /// The tensor, to read.
    pub fn view(&self) -> TensorRef<'_> {
        self.tensor.as_ref()
    }

    /// The tensor, to write.
    pub fn view_mut(&mut self) -> TensorMut<'_> {
        self.tensor.reborrow()
    }
}
