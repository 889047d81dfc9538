//! What ranks compute together on their GPUs: sums, by FlashInfer's kernel or NCCL's, and gathered numbers.

use std::{cell::RefCell, ffi::c_int, rc::Rc, sync::Arc};

use cudarc::driver::{CudaSlice, CudaStream};
use flashinfer_rs::{
    DType, Device, Stream, TensorMut, TensorRef,
    gpu::Tensor,
    norm::{NormOptions, fused_add_rmsnorm},
};

use super::{
    half::HalfTensor,
    nccl::{Communicator, Nccl, UniqueId},
    programmatic,
};
use crate::{Result, group::Group, model::shard::Rank};

mod communicators;
mod fused_sums;
mod neighbours;
#[cfg(test)]
mod tests;

use communicators::Communicators;
pub use communicators::Registered;
use fused_sums::FusedSums;

/// A rank of several, on one stream.
pub struct Ranks {
    communicators: Rc<Communicators>,
    rank: Rank,
    cuda: Arc<CudaStream>,
    /// What is written to [hold back](programmatic::hold_back) sums.
    byte: RefCell<CudaSlice<u8>>,
    fused: Option<FusedSums>,
}

impl Ranks {
    /// Meets the other ranks of a group, each of which does so with a GPU of its own. Rows of `fused`, a type
    /// of 16 bits and a width, are added up by FlashInfer's kernel where it can be had and they are few, and
    /// all else by NCCL.
    ///
    /// # Errors
    /// NCCL is nowhere; it finds no way between the GPUs; or those of [`FusedSums::meet`].
    pub fn meet(group: &Group, cuda: &Arc<CudaStream>, fused: Option<(DType, usize)>) -> Result<Self> {
        let (nccl, rank) = (Nccl::load()?, group.rank());
        let byte = RefCell::new(cuda.alloc_zeros(1)?);
        let communicators = Communicators::meet(nccl, cuda, rank, || common_id(&nccl, group))?;
        let fused = fused.map(|(dtype, hidden)| FusedSums::meet(group, cuda, dtype, hidden)).transpose()?;
        let ranks = Self {
            communicators: Rc::new(communicators),
            rank,
            cuda: cuda.clone(),
            byte,
            fused: fused.flatten(),
        };
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
    ///
    /// # Errors
    /// Its type is none of a [`HalfTensor`]; it is too large; the stream is being captured.
    pub fn zeros(&self, dtype: DType, shape: &[usize]) -> Result<HalfTensor> {
        // What cannot be made at all is refused before other ranks are waited for.
        let plain = HalfTensor::zeros(&Stream::from(&self.cuda), dtype, shape)?;
        Ok(match Communicators::zeros(&self.communicators, dtype, shape)? {
            Some(registered) => HalfTensor::Registered(registered),
            None => plain,
        })
    }

    /// Replaces the numbers of a contiguous tensor by their sums over all ranks.
    pub fn all_reduce(&self, x: &mut TensorMut<'_>) -> Result<()> {
        match &self.fused {
            Some(fused) if fused.takes(&x.as_ref()) => fused.sum(x),
            _ => self.all_reduce_by(self.next()?, x),
        }
    }

    /// Adds the sums of `x` over all ranks to the residual, and writes the residual's norm to `x`.
    ///
    /// # Safety
    /// What [`FusedSums::sum_add_norm`] asks for.
    pub unsafe fn all_reduce_add_norm(
        &self,
        x: &mut TensorMut<'_>,
        residual: &mut TensorMut<'_>,
        weight: &TensorRef<'_>,
        options: &NormOptions,
        early: bool,
    ) -> Result<()> {
        match &self.fused {
            // SAFETY: as the caller says.
            Some(fused) if fused.norms() && fused.takes(&x.as_ref()) => unsafe {
                fused.sum_add_norm(x, residual, weight, options, early)
            },
            _ => {
                self.all_reduce(x)?;
                Ok(fused_add_rmsnorm(&Stream::from(&self.cuda), x, residual, weight, options)?)
            }
        }
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

    /// The communicator of what is enqueued next. NCCL's kernels for memory that all ranks reach do not wait
    /// for what is before them: so they are held back, and those that are in no graph, too, in case that a version
    /// of NCCL, or a variable of its, has them for any memory.
    fn next(&self) -> Result<Communicator> {
        let is_captured = programmatic::hold_back(&self.cuda, &mut self.byte.borrow_mut())?;
        let Communicators { captured, direct, .. } = *self.communicators;
        Ok(if is_captured { captured } else { direct })
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
