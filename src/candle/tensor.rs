//! Views of candle's storage: an element type, an offset, a shape and strides.
//!
//! candle hands storage to custom operations with its lock held, so a view
//! lives no longer than that lock.

use candle_core::{CpuStorage, Device, Layout, Result, Storage, Tensor};
#[cfg(feature = "candle-cuda")]
use {
    crate::gpu::{SliceMut, SliceRef, exclusive, shared},
    candle_core::{
        CudaStorage,
        cuda_backend::{
            CudaStorageSlice,
            cudarc::driver::{CudaSlice, CudaStream, DeviceRepr},
        },
    },
    std::sync::Arc,
};

use crate::{
    dtype::{DType, Element},
    error::FlashInferError,
    stream::Stream,
    tensor::{TensorMut, TensorRef},
};

/// The same error for candle's callers.
pub(super) fn error(error: FlashInferError) -> candle_core::Error {
    candle_core::Error::wrap(error)
}

/// The stream of a CUDA device; `None` for other devices.
pub(super) fn stream(device: &Device) -> Option<Stream> {
    match device {
        #[cfg(feature = "candle-cuda")]
        Device::Cuda(device) => Some(Stream::from(&device.cuda_stream())),
        _ => None,
    }
}

/// Fails where kernels have no such element type.
fn unsupported<T>(dtype: candle_core::DType) -> Result<T> {
    let names: Vec<_> = DType::ALL.iter().filter_map(|&dtype| of_ours(dtype)).map(|d| d.as_str()).collect();
    candle_core::bail!("no view of {} elements; expected one of {}", dtype.as_str(), names.join(", "))
}

/// candle's name of an element type.
pub(super) fn of_ours(dtype: DType) -> Option<candle_core::DType> {
    Some(match dtype {
        DType::F16 => candle_core::DType::F16,
        DType::BF16 => candle_core::DType::BF16,
        DType::F32 => candle_core::DType::F32,
        DType::F64 => candle_core::DType::F64,
        DType::E4M3 => candle_core::DType::F8E4M3,
        DType::I16 => candle_core::DType::I16,
        DType::I32 => candle_core::DType::I32,
        DType::I64 => candle_core::DType::I64,
        DType::U8 => candle_core::DType::U8,
        DType::U32 => candle_core::DType::U32,
        _ => return None,
    })
}

impl TryFrom<candle_core::DType> for DType {
    type Error = candle_core::Error;

    /// The element type of a candle tensor; an error where there is no such type here.
    fn try_from(dtype: candle_core::DType) -> Result<Self> {
        let same = Self::ALL.into_iter().find(|&ours| of_ours(ours) == Some(dtype));
        same.map_or_else(|| unsupported(dtype), Ok)
    }
}

/// Calls `$view` with the typed elements of a storage.
macro_rules! with_elements {
    ($kind:ident, $storage:expr, $dtype:expr, $elements:ident => $view:expr) => {
        match $storage {
            $kind::U8($elements) => $view,
            $kind::U32($elements) => $view,
            $kind::I16($elements) => $view,
            $kind::I32($elements) => $view,
            $kind::I64($elements) => $view,
            $kind::BF16($elements) => $view,
            $kind::F16($elements) => $view,
            $kind::F32($elements) => $view,
            $kind::F64($elements) => $view,
            $kind::F8E4M3($elements) => $view,
            $kind::F6E2M3(_) | $kind::F6E3M2(_) | $kind::F4(_) | $kind::F8E8M0(_) => unsupported($dtype),
        }
    };
}

/// Kernels read vectors of this many bytes.
const VECTOR: usize = 16;

/// Whether kernels can read a view: elements of a row are neighbours, vectors
/// are aligned, and strides fit 32 bits.
pub(super) fn fits(view: &Layout, size: usize) -> bool {
    let outer = view.dims().iter().zip(view.stride()).rev().skip(1);
    let mut strides = outer.filter(|&(&dim, _)| dim > 1);
    view.stride().last().is_none_or(|&last| last == 1)
        && (view.start_offset() * size).is_multiple_of(VECTOR)
        && strides.all(|(_, by)| (by * size).is_multiple_of(VECTOR))
        && view.stride().iter().all(|&by| u32::try_from(by).is_ok())
}

/// A view of a tensor on the CPU.
pub(super) fn on_cpu<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<TensorRef<'a>> {
    fn view<'a, T: Element>(elements: &'a [T], layout: &Layout) -> Result<TensorRef<'a>> {
        let elements = elements.get(layout.start_offset()..).unwrap_or_default();
        TensorRef::from_slice_strided(elements, layout.dims(), Some(layout.stride())).map_err(error)
    }
    use candle_core::backend::BackendStorage;
    with_elements!(CpuStorage, storage, storage.dtype(), elements => view(elements, layout))
}

/// A view of a tensor on the CPU, to write.
pub(super) fn on_cpu_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<TensorMut<'a>> {
    fn view<'a, T: Element>(elements: &'a mut [T], layout: &Layout) -> Result<TensorMut<'a>> {
        let elements = elements.get_mut(layout.start_offset()..).unwrap_or_default();
        TensorMut::from_slice_strided(elements, layout.dims(), Some(layout.stride())).map_err(error)
    }
    use candle_core::backend::BackendStorage;
    let dtype = storage.dtype();
    with_elements!(CpuStorage, storage, dtype, elements => view(elements, layout))
}

/// A view of a tensor on a CUDA device, for work on `stream`.
#[cfg(feature = "candle-cuda")]
pub(super) fn on_cuda<'a>(
    storage: &'a CudaStorage,
    layout: &Layout,
    stream: &'a Arc<CudaStream>,
) -> Result<SliceRef<'a>> {
    use candle_core::backend::BackendStorage;
    with_elements!(CudaStorageSlice, &storage.slice, storage.dtype(), elements => {
        shared(elements, stream, layout.start_offset(), layout.dims(), Some(layout.stride())).map_err(error)
    })
}

/// A view of a tensor on a CUDA device, for work on `stream`, to write.
#[cfg(feature = "candle-cuda")]
pub(super) fn on_cuda_mut<'a>(
    storage: &'a mut CudaStorage,
    layout: &Layout,
    stream: &'a Arc<CudaStream>,
) -> Result<SliceMut<'a>> {
    use candle_core::backend::BackendStorage;
    let dtype = storage.dtype();
    with_elements!(CudaStorageSlice, &mut storage.slice, dtype, elements => {
        exclusive(elements, stream, layout.start_offset(), layout.dims(), Some(layout.stride())).map_err(error)
    })
}

/// Calls `run` with a view of a tensor, if there is one, for work on the stream of `device`. The
/// tensor's storage is locked meanwhile.
pub(super) fn with_view<R>(
    tensor: Option<&Tensor>,
    device: &Device,
    run: impl FnOnce(Option<TensorRef<'_>>) -> Result<R>,
) -> Result<R> {
    let Some(tensor) = tensor else { return run(None) };
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, device) {
        (Storage::Cpu(storage), Device::Cpu) => run(Some(on_cpu(storage, layout)?)),
        #[cfg(feature = "candle-cuda")]
        (Storage::Cuda(storage), Device::Cuda(device)) => {
            let stream = device.cuda_stream();
            run(Some(on_cuda(storage, layout, &stream)?.view()))
        }
        _ => candle_core::bail!("a tensor on {:?} for work on {:?}", tensor.device(), device.location()),
    }
}

/// Calls `run` with a view of a storage, to write, for work on the stream of `device`.
pub(super) fn with_view_mut<R>(
    storage: &mut Storage,
    layout: &Layout,
    device: &Device,
    run: impl FnOnce(&mut TensorMut<'_>) -> Result<R>,
) -> Result<R> {
    match (storage, device) {
        (Storage::Cpu(storage), Device::Cpu) => run(&mut on_cpu_mut(storage, layout)?),
        #[cfg(feature = "candle-cuda")]
        (Storage::Cuda(storage), Device::Cuda(device)) => {
            let stream = device.cuda_stream();
            let mut view = on_cuda_mut(storage, layout, &stream)?;
            run(&mut view.view_mut())
        }
        _ => candle_core::bail!("a storage for work on {:?}, which is elsewhere", device.location()),
    }
}

/// Copies `len` elements to another place of a storage, which they do not
/// overlap.
pub(super) fn copy_on_cpu(storage: &mut CpuStorage, [from, to]: [usize; 2], len: usize) -> Result<()> {
    fn copy<T: Copy>(elements: &mut [T], [from, to]: [usize; 2], len: usize) -> Result<()> {
        if from.max(to).checked_add(len).is_none_or(|end| end > elements.len()) {
            candle_core::bail!("{len} elements at {from} and {to} of {}", elements.len())
        }
        elements.copy_within(from..from + len, to);
        Ok(())
    }
    use candle_core::backend::BackendStorage;
    let dtype = storage.dtype();
    with_elements!(CpuStorage, storage, dtype, elements => copy(elements, [from, to], len))
}

/// As [`copy_on_cpu`], in the order of `stream`.
#[cfg(feature = "candle-cuda")]
pub(super) fn copy_on_cuda(
    storage: &mut CudaStorage,
    [from, to]: [usize; 2],
    len: usize,
    stream: &Arc<CudaStream>,
) -> Result<()> {
    fn copy<T: DeviceRepr>(
        elements: &mut CudaSlice<T>,
        [from, to]: [usize; 2],
        len: usize,
        stream: &Arc<CudaStream>,
    ) -> Result<()> {
        let (low, high) = (from.min(to), from.max(to));
        if high.checked_add(len).is_none_or(|end| end > elements.len()) || high - low < len {
            candle_core::bail!("{len} elements at {from} and {to} of {}", elements.len())
        }
        let (mut head, mut tail) = elements.split_at_mut(high);
        let (mut low, mut high) = (head.slice_mut(low..low + len), tail.slice_mut(..len));
        let copied =
            if from < to { stream.memcpy_dtod(&low, &mut high) } else { stream.memcpy_dtod(&high, &mut low) };
        copied.map_err(candle_core::Error::wrap)
    }
    use candle_core::backend::BackendStorage;
    let dtype = storage.dtype();
    with_elements!(CudaStorageSlice, &mut storage.slice, dtype, elements => copy(elements, [from, to], len, stream))
}
