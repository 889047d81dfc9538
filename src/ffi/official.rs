//! From and to the types of [`tvm_ffi`], TVM-FFI's own crate. Nothing is copied but references.
//!
//! Both crates work on the one `libtvm_ffi` of the process: that crate links it, and this one uses what
//! is there.

use std::{mem, ptr};

use tvm_ffi::tvm_ffi_sys::{TVMFFIAny, TVMFFISafeCallType};

use super::{
    abi::{Any, SafeCall},
    args::{Arg, DlTensor},
    call::{Function, Target},
    callback::into_any,
    library::TvmFfi,
    object::{Object, Value},
};
use crate::error::{FlashInferError, Result};

// `TVMFFIAny` in both.
const _: () =
    assert!(size_of::<Any>() == size_of::<TVMFFIAny>() && align_of::<Any>() == align_of::<TVMFFIAny>());

impl From<tvm_ffi::Any> for Value {
    fn from(any: tvm_ffi::Any) -> Self {
        // SAFETY: the same C type, whose bytes are all initialized, and with it what it owns.
        unsafe { Self::from_owned(mem::transmute::<TVMFFIAny, Any>(tvm_ffi::Any::into_raw_ffi_any(any))) }
    }
}

/// A value of a kind that this crate does not read becomes None.
impl From<Value> for tvm_ffi::Any {
    fn from(value: Value) -> Self {
        // SAFETY: the same C type, and with it what it owns.
        unsafe { Self::from_raw_ffi_any(mem::transmute::<Any, TVMFFIAny>(into_any(value))) }
    }
}

/// One reference to the function is kept as long as the process lives, however often this is done.
///
/// # Errors
/// [`AbiVersion`](FlashInferError::AbiVersion): the version of libtvm_ffi is one that this crate does not speak.
impl TryFrom<tvm_ffi::Function> for Function {
    type Error = FlashInferError;

    fn try_from(function: tvm_ffi::Function) -> Result<Self> {
        let object = Object::try_from(Value::from(tvm_ffi::Any::from(function)))?;
        // That crate has it in the process.
        let library = TvmFfi::get().map_or_else(TvmFfi::adopt, |library| Ok(Some(library)))?;
        let library = library.ok_or_else(|| FlashInferError::MissingSymbol {
            library: "libtvm_ffi".into(),
            symbol: "TVMFFIGetVersion".into(),
        })?;
        Ok(Self::of_object(library, object, "a function of tvm-ffi"))
    }
}

impl Function {
    /// The function, for that crate, whose calls are safe.
    ///
    /// # Errors
    /// libtvm_ffi does not know it for a function.
    ///
    /// # Safety
    /// As [`call`](Self::call), for each call of it.
    pub unsafe fn to_tvm_ffi(self) -> Result<tvm_ffi::Function> {
        match self.target {
            Target::Symbol(symbol) => {
                // SAFETY: the same type in C.
                let symbol = unsafe { mem::transmute::<SafeCall, TVMFFISafeCallType>(symbol) };
                // SAFETY: libraries stay open, and exported functions look at no handle.
                Ok(unsafe { tvm_ffi::Function::from_extern_c(ptr::null_mut(), symbol, None) })
            }
            Target::Global(object) => {
                let any = tvm_ffi::Any::from(Value::Object(object.clone()));
                any.try_as().ok_or_else(|| FlashInferError::ResultType {
                    expected: "a function",
                    found: format!("{object:?}"),
                })
            }
        }
    }
}

impl DlTensor<'_> {
    /// The tensor, for functions of that crate.
    ///
    /// # Safety
    /// The view is not used any more when this tensor, or what it is of, is gone.
    pub unsafe fn to_tvm_ffi(&self) -> tvm_ffi::TensorView {
        // SAFETY: `Arg` has the address of a `DLTensor`, which the caller keeps.
        unsafe { tvm_ffi::TensorView::from_raw(Arg::from(self).as_any().payload.ptr.cast()) }
    }
}
