//! The LSE of an attention: a second result, which candle's operations do not have.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Device, Layout, Result, Shape, Storage, Tensor,
    backend::BackendDevice, bail, cpu_backend::CpuDevice,
};

use super::tensor;
use crate::tensor::TensorMut;

/// Where an operation leaves its LSE: `f32` `(rows, num_qo_heads)`, base-2 logarithms.
#[derive(Clone, Default)]
pub(super) struct Lse(Arc<Mutex<Option<Storage>>>);

impl Lse {
    /// Calls `run` with room for an LSE, where it is asked for, and keeps what it writes.
    pub(super) fn with_view<R>(
        lse: Option<&Self>,
        shape: [usize; 2],
        device: &Device,
        run: impl FnOnce(Option<&mut TensorMut<'_>>) -> Result<R>,
    ) -> Result<R> {
        let Some(lse) = lse else { return run(None) };
        let shape = Shape::from(&shape[..]);
        let mut storage = match device {
            Device::Cpu => Storage::Cpu(CpuDevice.zeros_impl(&shape, DType::F32)?),
            Device::Cuda(device) => Storage::Cuda(device.zeros_impl(&shape, DType::F32)?),
            other => bail!("no attention on {:?}", other.location()),
        };
        let layout = Layout::contiguous(shape);
        let result = tensor::with_view_mut(&mut storage, &layout, device, |view| run(Some(view)))?;
        *lse.storage() = Some(storage);
        Ok(result)
    }

    /// The LSE of queries, whose gradient, as theirs, there is none of; if nothing was computed, that of
    /// queries without keys.
    pub(super) fn of(self, q: &Tensor, shape: [usize; 2], sinks: Option<&Tensor>) -> Result<Tensor> {
        if self.storage().is_none() {
            return without_keys(shape, q.device(), sinks);
        }
        q.apply_op1(Kept { lse: self, shape: Shape::from(&shape[..]) })
    }

    fn storage(&self) -> MutexGuard<'_, Option<Storage>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The LSE of queries that see no keys: −∞, or each head's sink.
fn without_keys(shape: [usize; 2], device: &Device, sinks: Option<&Tensor>) -> Result<Tensor> {
    let [rows, heads] = shape;
    // CUDA allocates no empty tensors.
    let allocated = (rows.max(1), heads);
    let all = match sinks {
        None => Tensor::full(f32::NEG_INFINITY, allocated, device)?,
        Some(sinks) => (sinks * std::f64::consts::LOG2_E)?.broadcast_as(allocated)?.contiguous()?,
    };
    all.narrow(0, 0, rows)
}

/// What an operation on queries left, as an operation on them.
struct Kept {
    lse: Lse,
    shape: Shape,
}

impl Kept {
    fn taken<S>(&self, of: impl FnOnce(Storage) -> Option<S>) -> Result<(S, Shape)> {
        match self.lse.storage().take().and_then(of) {
            Some(storage) => Ok((storage, self.shape.clone())),
            None => bail!("lse: it is not where the queries are"),
        }
    }
}

impl CustomOp1 for Kept {
    fn name(&self) -> &'static str {
        "lse"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.taken(|storage| if let Storage::Cpu(storage) = storage { Some(storage) } else { None })
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.taken(|storage| if let Storage::Cuda(storage) = storage { Some(storage) } else { None })
    }
}
