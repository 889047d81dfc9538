//! From and to the types of [`tvm_ffi`], TVM-FFI's own crate. References move; text of more than seven
//! bytes becomes an object.
//!
//! Both crates work on the one `libtvm_ffi` of the process: that crate links it, and this one uses what
//! is there. What is safe differs: there, functions are called by safe code, and closures need not be
//! `Send`; so conversions are `unsafe`.

use std::{mem, ptr};

use tvm_ffi::tvm_ffi_sys::{TVMFFIAny, TVMFFISafeCallType};

use super::{
    abi::{Any, SafeCall},
    args::{Arg, DlTensor},
    call::{Function, Target},
    callback::into_any,
    library::{TvmFfi, missing},
    object::{Object, Value},
};
use crate::error::{FlashInferError, Result};

// `TVMFFIAny` in both.
const _: () =
    assert!(size_of::<Any>() == size_of::<TVMFFIAny>() && align_of::<Any>() == align_of::<TVMFFIAny>());

/// The library, which that crate has in the process.
fn library() -> Result<&'static TvmFfi> {
    let library = TvmFfi::get().map_or_else(TvmFfi::adopt, |library| Ok(Some(library)))?;
    library.ok_or_else(|| missing("TVMFFIGetVersion"))
}

impl Value {
    /// A value of that crate. Bytes of at most seven become text.
    ///
    /// # Errors
    /// [`AbiVersion`](FlashInferError::AbiVersion), [`MissingSymbol`](FlashInferError::MissingSymbol):
    /// libtvm_ffi is of a version that this crate does not speak.
    ///
    /// # Safety
    /// A value may go to any thread, and be dropped there. An object that is not made for that, such as a
    /// closure that is not `Send` and `Sync`, stays in this one; and nobody changes a list while it is read.
    pub unsafe fn from_tvm_ffi(any: tvm_ffi::Any) -> Result<Self> {
        library()?;
        // SAFETY: the same C type, whose bytes are all initialized, and with it what it owns.
        Ok(unsafe { Self::from_owned(mem::transmute::<TVMFFIAny, Any>(tvm_ffi::Any::into_raw_ffi_any(any))) })
    }

    /// The value for that crate. One of a kind that this crate does not read becomes None.
    ///
    /// # Safety
    /// Calls there are safe: whoever calls a function object gives it what it takes, and nobody changes
    /// a list while others read it.
    pub unsafe fn to_tvm_ffi(self) -> tvm_ffi::Any {
        // SAFETY: the same C type, and with it what it owns.
        unsafe { tvm_ffi::Any::from_raw_ffi_any(mem::transmute::<Any, TVMFFIAny>(into_any(self))) }
    }
}

impl Function {
    /// A function of that crate. One reference to it is kept as long as the process lives, however often
    /// this is done.
    ///
    /// # Errors
    /// As [`Value::from_tvm_ffi`].
    ///
    /// # Safety
    /// Functions may be called from any thread: so may this one.
    pub unsafe fn from_tvm_ffi(function: tvm_ffi::Function) -> Result<Self> {
        // SAFETY: as the caller says.
        let object = Object::try_from(unsafe { Value::from_tvm_ffi(function.into()) }?)?;
        Ok(Self::of_object(library()?, object, "a function of tvm-ffi"))
    }

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
                // SAFETY: promised by the caller.
                let any = unsafe { Value::Object(object.clone()).to_tvm_ffi() };
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
    /// The view is not used any more when this tensor, or what it is of, is gone. Nothing writes through
    /// it, unless it is of a [`TensorMut`](crate::TensorMut). Work that uses it comes after the work that
    /// wrote the tensor, and memory stays until kernels are done.
    pub unsafe fn to_tvm_ffi(&self) -> tvm_ffi::TensorView {
        // SAFETY: `Arg` has the address of a `DLTensor`, which the caller keeps.
        unsafe { tvm_ffi::TensorView::from_raw(Arg::from(self).as_any().payload.ptr.cast()) }
    }
}
