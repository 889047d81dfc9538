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
        let refused = format!("libtvm_ffi refused it{}", library.reason());
        return Err(FlashInferError::invalid(
            "TVMFFIEnvSetDLPackManagedTensorAllocator",
            "allocator",
            refused,
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
        // Saturates only where another dimension is 0.
        dims[rank + axis - 1] = dims[rank + axis].saturating_mul(shape[axis].max(1));
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

#[cfg(test)]
mod tests {
    use std::ptr::NonNull;

    use libloading::os::unix::Library;

    use super::*;
    use crate::{
        ffi::{
            Function, Object,
            abi::{Any, DlDataType, DlDevice, ObjectHeader, SafeCall, type_index},
        },
        runtime::FlashInferRuntime,
        stream::Stream,
    };
    use test_support::required;

    const SHAPE: [i64; 3] = [2, 3, 5];

    /// An exported function that creates a tensor, as a user's module might:
    /// `(device_type, device_id) -> Tensor`.
    unsafe extern "C" fn create(_: *mut c_void, args: *const Any, count: i32, result: *mut Any) -> c_int {
        type TensorAlloc = unsafe extern "C" fn(*mut RawDlTensor, *mut *mut ObjectHeader) -> c_int;
        assert_eq!(count, 2);
        // SAFETY: two integer arguments; the symbol has this type.
        unsafe {
            let device = DlDevice {
                device_type: (*args).payload.int64 as i32,
                device_id: (*args.add(1)).payload.int64 as i32,
            };
            let mut prototype = RawDlTensor {
                data: ptr::null_mut(),
                device,
                ndim: 3,
                dtype: DlDataType { code: 2, bits: 16, lanes: 1 },
                shape: SHAPE.as_ptr(),
                strides: ptr::null(),
                byte_offset: 0,
            };
            let alloc = *Library::this().get::<TensorAlloc>(b"TVMFFIEnvTensorAlloc\0").unwrap();
            let mut object = ptr::null_mut();
            let code = alloc(&mut prototype, &mut object);
            if code == 0 {
                (*result).type_index = type_index::TENSOR;
                (*result).payload.object = object;
            }
            code
        }
    }

    fn message(error: FlashInferError) -> String {
        match error {
            FlashInferError::TvmFfiCall { message, .. } => message,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn modules_that_ask_get_memory_of_their_stream() {
        let runtime = match FlashInferRuntime::get() {
            Ok(runtime) => runtime,
            Err(error) => return required::skip(required::LIBTVM_FFI, error),
        };
        let library = TvmFfi::get().unwrap();
        let function = Function::from_symbol(library, create as SafeCall, "create");
        // SAFETY: the function takes two integers.
        let create =
            |device_type: i32| unsafe { function.call(&[i64::from(device_type).into(), 0i64.into()]) };
        assert!(message(create(device_type::CPU).unwrap_err()).contains("on CUDA devices only"));
        assert!(message(create(device_type::CUDA).unwrap_err()).contains("no call is running on a stream"));

        // SAFETY: no arguments.
        let ours = unsafe { (library.env_get_allocator)() };
        assert!(ours.is_some());
        register(library).unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { (library.env_get_allocator)() }.map(|f| f as usize), ours.map(|f| f as usize));

        if std::env::var("FLASHINFER_RS_RUN_GPU_TESTS").as_deref() != Ok("1") {
            return eprintln!(
                "skipped the rest: set FLASHINFER_RS_RUN_GPU_TESTS=1 on a machine with an NVIDIA GPU"
            );
        }
        assert!(runtime.device_count().unwrap() > 0);
        let stream = Stream::with_owner(ptr::null_mut(), 0, None);
        for _ in 0..1000 {
            let args = [i64::from(device_type::CUDA).into(), 0i64.into()];
            // SAFETY: the function takes two integers.
            let value = unsafe { function.call_on(&stream, &args) }.unwrap();
            let crate::ffi::Value::Object(object) = value else { panic!("a tensor, not {value:?}") };
            assert_eq!((object.type_index(), object.strong_count()), (type_index::TENSOR, 1));
            // SAFETY: a Tensor object's header is followed by its DLTensor.
            let tensor = unsafe { &*object.as_ptr().add(1).cast::<RawDlTensor>() };
            assert!(NonNull::new(tensor.data).is_some());
            // SAFETY: shape and strides hold three numbers.
            let (shape, strides) = unsafe {
                (std::slice::from_raw_parts(tensor.shape, 3), std::slice::from_raw_parts(tensor.strides, 3))
            };
            assert_eq!((shape, strides), (&SHAPE[..], &[15, 5, 1][..]));
            drop::<Object>(object);
        }
    }
}
