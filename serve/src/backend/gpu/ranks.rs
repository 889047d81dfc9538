//! What ranks compute together on their GPUs: NCCL's sums and gathered numbers.

use std::{
    cell::RefCell,
    ffi::{c_int, c_void},
    rc::Rc,
    sync::Arc,
};

use cudarc::driver::{CudaStream, result, sys::CUstreamCaptureStatus};
use flashinfer_rs::{DType, Device, Stream, TensorMut, TensorRef, gpu::Tensor};

use super::{
    half::HalfTensor,
    nccl::{Communicator, Nccl, UniqueId},
    programmatic,
    registered::Registered,
};
use crate::{Result, group::Group, model::shard::Rank};

#[cfg(test)]
mod tests;

/// A rank's communicators, and the memory that the other ranks reach.
struct Communicators {
    nccl: Nccl,
    /// For work that is captured into graphs, and for what is enqueued as it is. Once they have
    /// connected, each has work on one stream, of one kind, so that NCCL needs not order graphs and other
    /// work (`NCCL_GRAPH_MIXING_SUPPORT=0` of its version 2.28).
    captured: Communicator,
    direct: Communicator,
    memory: RefCell<Vec<*mut c_void>>,
}

impl Drop for Communicators {
    fn drop(&mut self) {
        // SAFETY: nobody has them any more, nor the memory: tensors in it keep this alive.
        unsafe {
            self.nccl.abort(self.captured);
            self.nccl.abort(self.direct);
            self.memory.get_mut().drain(..).for_each(|memory| self.nccl.free(memory));
        }
    }
}

/// A rank of several, on one stream.
pub struct Ranks {
    communicators: Rc<Communicators>,
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
        cuda.context().bind_to_thread()?;
        let meet = || -> Result<_> { nccl.meet(common_id(&nccl, group)?, rank.rank, rank.size) };
        let captured = meet()?;
        let direct = meet().inspect_err(|_| {
            // SAFETY: nothing was enqueued.
            unsafe { nccl.abort(captured) }
        })?;
        let communicators = Communicators { nccl, captured, direct, memory: RefCell::default() };
        let ranks = Self { communicators: Rc::new(communicators), rank, cuda: cuda.clone() };
        ranks.connect()?;
        Ok(ranks)
    }

    /// Has NCCL find its ways between GPUs, which it does at the first sum: not while a graph is captured.
    fn connect(&self) -> Result<()> {
        let stream = Stream::from(&self.cuda);
        let mut all = Tensor::<f32>::zeros(&stream, &[self.rank.size])?;
        let one = Tensor::<f32>::zeros(&stream, &[1])?;
        for communicator in [self.communicators.captured, self.communicators.direct] {
            self.all_reduce_by(communicator, &mut all.view_mut())?;
            self.all_gather_by(communicator, &mut all.view_mut(), &one.view())?;
        }
        Ok(self.cuda.synchronize()?)
    }

    /// How many there are.
    pub fn size(&self) -> usize {
        self.rank.size
    }

    /// Whether this is rank 0.
    pub fn is_first(&self) -> bool {
        self.rank.rank == 0
    }

    /// A tensor of zeros that is added up with fewer copies, as the kernels of all ranks reach it, if
    /// NCCL is of version 2.27 or later. All ranks make the same at a time. Its memory is given back
    /// when this, and all that it made, are dropped.
    pub fn zeros(&self, dtype: DType, shape: &[usize]) -> Result<HalfTensor> {
        let Communicators { nccl, captured, memory, .. } = &*self.communicators;
        let bytes = shape.iter().product::<usize>() * dtype.size();
        self.cuda.context().bind_to_thread()?;
        let Some(address) = nccl.allocate(bytes)? else {
            return Ok(HalfTensor::zeros(&Stream::from(&self.cuda), dtype, shape)?);
        };
        memory.borrow_mut().push(address);
        // SAFETY: so much was allocated just now, and goes after the communicator.
        unsafe { nccl.register(*captured, address, bytes)? };
        // SAFETY: so much memory is there, and nobody else knows it.
        unsafe { result::memset_d8_async(address as u64, 0, bytes, self.cuda.cu_stream())? };
        let device = Device::Cuda(self.cuda.context().ordinal() as u32);
        // SAFETY: the same, of zeros, in the order of the stream; `Registered` keeps it allocated.
        let registered = unsafe {
            let tensor = TensorMut::from_raw_parts(address, device, dtype, shape, None)?;
            Registered::new(tensor, self.communicators.clone())
        };
        Ok(HalfTensor::Registered(registered))
    }

    /// Replaces the numbers of a contiguous tensor by their sums over all ranks.
    pub fn all_reduce(&self, x: &mut TensorMut<'_>) -> Result<()> {
        self.all_reduce_by(self.next()?, x)
    }

    fn all_reduce_by(&self, communicator: Communicator, x: &mut TensorMut<'_>) -> Result<()> {
        let (dtype, count) = (self.check(&x.as_ref())?, x.numel());
        let (data, stream) = (x.data_ptr(), self.cuda.cu_stream().cast());
        // SAFETY: so many numbers are there, of the stream's device, as are those of the other ranks,
        // which enqueue the same.
        unsafe { self.communicators.nccl.all_reduce(data, count, dtype, communicator, stream) }
    }

    /// Writes the numbers of all ranks, in their order. Both tensors are contiguous.
    pub fn all_gather(&self, out: &mut TensorMut<'_>, mine: &TensorRef<'_>) -> Result<()> {
        self.all_gather_by(self.next()?, out, mine)
    }

    fn all_gather_by(
        &self,
        communicator: Communicator,
        out: &mut TensorMut<'_>,
        mine: &TensorRef<'_>,
    ) -> Result<()> {
        let (dtype, count) = (self.check(mine)?, mine.numel());
        if self.check(&out.as_ref())? != dtype || out.numel() != self.rank.size * count {
            return Err(format!("{} times {mine:?} in {out:?}", self.rank.size).into());
        }
        let between = (mine.data_ptr().cast_const(), out.data_ptr());
        let stream = self.cuda.cu_stream().cast();
        // SAFETY: as above, and there is room for the numbers of all.
        unsafe { self.communicators.nccl.all_gather(between, count, dtype, communicator, stream) }
    }

    /// The sum of a number over all ranks, which is the same for each, bit by bit. Waits for it.
    pub fn total(&self, number: f32) -> Result<f32> {
        let mut total = Tensor::from_slice(&Stream::from(&self.cuda), &[1], &[number])?;
        self.all_reduce(&mut total.view_mut())?;
        Ok(total.to_vec()?[0])
    }

    /// The communicator of what is enqueued next. NCCL's kernels for memory that all ranks reach, which are
    /// those of graphs, do not wait for what is before them: so they are held back.
    fn next(&self) -> Result<Communicator> {
        if self.cuda.capture_status()? == CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
            return Ok(self.communicators.direct);
        }
        programmatic::hold_back(&self.cuda)?;
        Ok(self.communicators.captured)
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

/// What all ranks know a further communicator by: rank 0 says it.
fn common_id(nccl: &Nccl, group: &Group) -> Result<UniqueId> {
    if group.rank().rank == 0 {
        let id = nccl.unique_id()?;
        group.send(&id.0.to_vec())?;
        return Ok(id);
    }
    let (_, sent) = group.receive::<Vec<u8>>()?.ok_or("rank 0 is done")?;
    Ok(UniqueId(sent.try_into().map_err(|_| "rank 0 sent no id of NCCL's")?))
}
