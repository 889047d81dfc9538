//! Device memory for modules that ask for it.
//!
//! A TVM-FFI function may create tensors through the process's tensor
//! allocator. None of FlashInfer's modules does, but a user's own may: for
//! them, an allocator is registered that takes memory from the CUDA device in
//! the order of the call's stream. An allocator that somebody else registered
//! stays.

use std::{
    ffi::{c_char, c_int, c_void},
    mem, ptr,
};

use super::{
    abi::{DlManagedTensorVersioned, DlPackVersion, RawDlTensor, SetError, device_type},
    call::StreamContext,
    library::TvmFfi,
};
use crate::{
    cuda::{CudaRuntime, DeviceBuffer},
    error::{FlashInferError, Result},
};

/// Registers [`allocate`] unless the process already has an allocator.
pub(crate) fn register(library: &'static TvmFfi) -> Result<()> {
    // SAFETY: no arguments.
    if unsafe { (library.env_get_allocator)() }.is_some() {
        return Ok(());
    }
    let mut previous = None;
    // SAFETY: the callback lives as long as the process; the old one is written.
    let code = unsafe { (library.env_set_allocator)(Some(allocate), 1, &mut previous) };
    if code != 0 {
        return Err(FlashInferError::invalid(
            "TVMFFIEnvSetDLPackManagedTensorAllocator",
            "allocator",
            "libtvm_ffi refused it",
        ));
    }
    if previous.is_some() {
        // Somebody was faster: theirs stays.
        // SAFETY: puts back what was registered.
        unsafe { (library.env_set_allocator)(previous, 1, ptr::null_mut()) };
    }
    Ok(())
}

/// A tensor's memory and its shape; freed together.
struct Allocation {
    tensor: DlManagedTensorVersioned,
    _buffer: DeviceBuffer,
    /// Shape, then strides.
    _dims: Box<[i64]>,
}

/// `DLPackManagedTensorAllocator`: row-major memory of the prototype's shape
/// and type on its CUDA device, on the stream of the current call.
unsafe extern "C" fn allocate(
    prototype: *mut RawDlTensor,
    out: *mut *mut DlManagedTensorVersioned,
    error_context: *mut c_void,
    set_error: Option<SetError>,
) -> c_int {
    // SAFETY: the library passes a prototype whose ndim, shape, dtype and
    // device are valid.
    match unsafe { try_allocate(&*prototype) } {
        Ok(allocation) => {
            let allocation = Box::into_raw(allocation);
            // SAFETY: `out` takes the address of the tensor, which its deleter
            // turns back into the box.
            unsafe { *out = &raw mut (*allocation).tensor };
            0
        }
        Err(message) => {
            if let Some(set_error) = set_error {
                let message = std::ffi::CString::new(message).unwrap_or_default();
                let kind: *const c_char = c"RuntimeError".as_ptr();
                // SAFETY: both strings live during the call.
                unsafe { set_error(error_context, kind, message.as_ptr()) };
            }
            -1
        }
    }
}

/// # Safety
/// The prototype's shape must hold `ndim` numbers.
unsafe fn try_allocate(prototype: &RawDlTensor) -> Result<Box<Allocation>, String> {
    if prototype.device.device_type != device_type::CUDA {
        return Err(format!(
            "flashinfer-rs allocates on CUDA devices only, not on device type {}; register an allocator of your own",
            prototype.device.device_type
        ));
    }
    let rank = usize::try_from(prototype.ndim).map_err(|_| format!("a tensor of rank {}", prototype.ndim))?;
    let shape = match rank {
        0 => &[],
        // SAFETY: promised by the caller.
        _ => unsafe { std::slice::from_raw_parts(prototype.shape, rank) },
    };
    let bits = i64::from(prototype.dtype.bits) * i64::from(prototype.dtype.lanes);
    let bytes = shape
        .iter()
        .try_fold(1i64, |numel, &size| numel.checked_mul(size).filter(|&numel| numel >= 0))
        .and_then(|numel| numel.checked_mul(bits))
        .and_then(|bits| usize::try_from(bits).ok())
        .map(|bits| bits.div_ceil(8))
        .ok_or_else(|| format!("a tensor of shape {shape:?} does not fit the address space"))?;
    let runtime = CudaRuntime::get().ok_or("the CUDA runtime is not loaded")?;
    let buffer = StreamContext::with_current(|stream| match stream {
        Some(stream) if stream.ordinal() as i32 == prototype.device.device_id => {
            DeviceBuffer::new(runtime, stream, bytes).map_err(|error| error.to_string())
        }
        _ => Err(format!(
            "no call is running on a stream of cuda:{}; call the function through Function::call_on",
            prototype.device.device_id
        )),
    })?;
    let mut dims = vec![1i64; 2 * rank].into_boxed_slice();
    dims[..rank].copy_from_slice(shape);
    for axis in (1..rank).rev() {
        dims[rank + axis - 1] = dims[rank + axis] * shape[axis].max(1);
    }
    let tensor = RawDlTensor {
        data: buffer.as_ptr(),
        shape: dims.as_ptr(),
        strides: dims[rank..].as_ptr(),
        byte_offset: 0,
        ..*prototype
    };
    let mut allocation = Box::new(Allocation {
        tensor: DlManagedTensorVersioned {
            version: DlPackVersion { major: 1, minor: 1 },
            manager_ctx: ptr::null_mut(),
            deleter: Some(delete),
            flags: 0,
            dl_tensor: tensor,
        },
        _buffer: buffer,
        _dims: dims,
    });
    allocation.tensor.manager_ctx = (&raw mut *allocation).cast();
    Ok(allocation)
}

unsafe extern "C" fn delete(tensor: *mut DlManagedTensorVersioned) {
    // SAFETY: the tensor came from `allocate`, which stored its box here; the
    // library deletes it once.
    let allocation = unsafe { Box::from_raw((*tensor).manager_ctx.cast::<Allocation>()) };
    mem::drop(allocation);
}
