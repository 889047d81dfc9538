//! Operations of this crate as candle's custom operations: storage becomes
//! views while candle holds its locks, and the result a tensor of its own.

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor,
    backend::BackendDevice, cpu_backend::CpuDevice,
};

use super::tensor;
use crate::{
    FlashInferError,
    stream::Stream,
    tensor::{TensorMut, TensorRef},
};

/// An operation that computes one tensor from `N`.
pub(super) trait Op<const N: usize> {
    const NAME: &'static str;

    /// The result's shape and dtype. It has at least one element.
    fn output(&self) -> (Shape, DType);

    fn on_cpu(&self, out: &mut TensorMut<'_>, inputs: [TensorRef<'_>; N]) -> crate::Result<()>;

    /// On the stream of the first input's device. What it enqueues writes every
    /// element of `out`.
    fn on_cuda(
        &self,
        stream: &Stream,
        out: &mut TensorMut<'_>,
        inputs: [TensorRef<'_>; N],
    ) -> crate::Result<()>;
}

/// An operation as candle calls it.
pub(super) struct Apply<O>(pub(super) O);

fn cpu<O: Op<N>, const N: usize>(op: &O, inputs: [(&CpuStorage, &Layout); N]) -> Result<(CpuStorage, Shape)> {
    let (shape, dtype) = op.output();
    let mut storage = CpuDevice.zeros_impl(&shape, dtype)?;
    let views = inputs.iter().map(|(storage, layout)| tensor::on_cpu(storage, layout));
    let views = views.collect::<Result<Vec<_>>>()?;
    let mut out = tensor::on_cpu_mut(&mut storage, &Layout::contiguous(&shape))?;
    op.on_cpu(&mut out, std::array::from_fn(|at| views[at])).map_err(tensor::error)?;
    Ok((storage, shape))
}

#[cfg(feature = "candle-cuda")]
fn cuda<O: Op<N>, const N: usize>(
    op: &O,
    inputs: [(&CudaStorage, &Layout); N],
) -> Result<(CudaStorage, Shape)> {
    let (shape, dtype) = op.output();
    let device = &inputs[0].0.device;
    let stream = device.cuda_stream();
    let views = inputs.iter().map(|(storage, layout)| tensor::on_cuda(storage, layout, &stream));
    let views = views.collect::<Result<Vec<_>>>()?;
    // SAFETY: the operation writes all elements before anything reads them; if
    // it fails, they are freed.
    let mut storage = unsafe { device.alloc_uninit(&shape, dtype) }?;
    let mut out = tensor::on_cuda_mut(&mut storage, &Layout::contiguous(&shape), &stream)?;
    op.on_cuda(&Stream::from(&stream), &mut out.view_mut(), std::array::from_fn(|at| views[at].view()))
        .map_err(tensor::error)?;
    drop(out);
    Ok((storage, shape))
}

#[cfg(not(feature = "candle-cuda"))]
fn cuda<O: Op<N>, const N: usize>(_: &O, _: [(&CudaStorage, &Layout); N]) -> Result<(CudaStorage, Shape)> {
    candle_core::bail!("{}: CUDA tensors need the feature `candle-cuda` of flashinfer-rs", O::NAME)
}

macro_rules! custom_op {
    ($custom:ident, $count:literal: $($storage:ident $layout:ident),+) => {
        impl<O: Op<$count>> $custom for Apply<O> {
            fn name(&self) -> &'static str {
                O::NAME
            }

            fn cpu_fwd(&self, $($storage: &CpuStorage, $layout: &Layout),+) -> Result<(CpuStorage, Shape)> {
                cpu(&self.0, [$(($storage, $layout)),+])
            }

            fn cuda_fwd(&self, $($storage: &CudaStorage, $layout: &Layout),+) -> Result<(CudaStorage, Shape)> {
                cuda(&self.0, [$(($storage, $layout)),+])
            }
        }
    };
}
custom_op!(CustomOp1, 1: s1 l1);
custom_op!(CustomOp2, 2: s1 l1, s2 l2);
custom_op!(CustomOp3, 3: s1 l1, s2 l2, s3 l3);

/// The tensor as kernels take it: as [`tensor::fits`] says, and no element twice.
/// A copy where it is not so.
pub(super) fn fitting(tensor: &Tensor) -> Result<Tensor> {
    let layout = tensor.layout();
    let repeats = layout.dims().iter().zip(layout.stride()).any(|(&dim, &stride)| dim > 1 && stride == 0);
    let fits = !repeats && tensor::fits(layout, tensor.dtype().size_in_bytes());
    if fits || tensor.device().is_cpu() { Ok(tensor.clone()) } else { tensor.force_contiguous() }
}

/// The rows of a tensor, `(rows, width)`, one after the other.
pub(super) fn rows(tensor: &Tensor) -> Result<Tensor> {
    let width = tensor.dims().last().copied().unwrap_or(1);
    fitting(&tensor.contiguous()?.reshape((tensor.elem_count() / width.max(1), width))?)
}

/// What an argument of an operation must not be.
pub(super) fn invalid<T>(op: &'static str, argument: &'static str, problem: String) -> Result<T> {
    Err(tensor::error(FlashInferError::invalid(op, argument, problem)))
}

/// candle's name of an element type.
pub(super) fn candle_dtype(op: &'static str, argument: &'static str, dtype: crate::DType) -> Result<DType> {
    match tensor::of_ours(dtype) {
        Some(dtype) => Ok(dtype),
        None => invalid(op, argument, format!("{dtype}; candle has no such elements")),
    }
}

/// Refuses element types that the operations do not have on a device.
pub(super) fn check_dtype(
    op: &'static str,
    argument: &'static str,
    dtype: DType,
    device: &candle_core::Device,
) -> Result<()> {
    use candle_core::Device::{Cpu, Cuda};
    match (device, dtype) {
        (Cpu | Cuda(_), DType::F16 | DType::BF16) | (Cpu, DType::F32 | DType::F64) => Ok(()),
        (Cpu, other) => invalid(
            op,
            argument,
            format!("its dtype is {}; on the CPU there are f32, f64, f16 and bf16", other.as_str()),
        ),
        (Cuda(_), other) => invalid(
            op,
            argument,
            format!("its dtype is {}; on CUDA there are f16 and bf16: convert with to_dtype", other.as_str()),
        ),
        (other, _) => {
            invalid(op, argument, format!("it is on {:?}; there are the CPU and CUDA", other.location()))
        }
    }
}

/// As [`check_dtype`] for keys and values of a cache, which may have 8 bits.
pub(super) fn check_cache_dtype(
    op: &'static str,
    argument: &'static str,
    dtype: DType,
    device: &candle_core::Device,
) -> Result<()> {
    match (device, dtype) {
        (candle_core::Device::Cpu | candle_core::Device::Cuda(_), DType::F8E4M3) => Ok(()),
        _ => check_dtype(op, argument, dtype, device),
    }
}

/// A tensor has this dtype and shape, and is where another is.
pub(super) fn check_like(
    op: &'static str,
    argument: &'static str,
    tensor: &Tensor,
    shape: &[usize],
    dtype: DType,
    device: &candle_core::Device,
) -> Result<()> {
    if tensor.device().location() != device.location() {
        let (at, expected) = (tensor.device().location(), device.location());
        return invalid(op, argument, format!("it is on {at:?}; expected {expected:?}"));
    }
    if tensor.dtype() != dtype {
        let problem = format!("its dtype is {}; expected {}", tensor.dtype().as_str(), dtype.as_str());
        return invalid(op, argument, problem);
    }
    if tensor.dims() != shape {
        return invalid(op, argument, format!("its shape is {:?}; expected {shape:?}", tensor.dims()));
    }
    Ok(())
}
