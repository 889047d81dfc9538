//! Functions of Rust that modules call: registered in libtvm_ffi's global table.

use std::{
    any::Any as AnyValue,
    ffi::{CStr, CString, c_int, c_void},
    fmt,
    mem::ManuallyDrop,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr::{self, NonNull},
    slice,
};

use super::{
    abi::{Any, ByteArray, type_index},
    args::{Arg, Packed},
    library::TvmFfi,
    object::{self, Object, Value},
};
use crate::{
    error::{FlashInferError, Result},
    tensor::TensorRef,
};

/// An argument that a function of Rust is called with. It lives for the call.
pub struct Given<'a>(&'a Any);

impl<'a> Given<'a> {
    /// The argument, with a reference of its own if it is an object. A C string is text, and so are bytes
    /// of at most seven. [`Value::Other`] are a tensor that is no object (see [`tensor`](Self::tensor)), longer
    /// bytes by address, and a list, which others may change while it is read.
    pub fn value(&self) -> Value {
        let any = *self.0;
        // SAFETY: the payload is what the tag says, for the length of the call; the value gets a
        // reference of its own to an object.
        unsafe {
            match any.type_index {
                type_index::RAW_STR if !any.payload.ptr.is_null() => {
                    let text = CStr::from_ptr(any.payload.ptr.cast());
                    Value::Text(text.to_string_lossy().into_owned())
                }
                type_index::LIST => Value::Other(type_index::LIST),
                index if index >= type_index::OBJECT_BEGIN => match NonNull::new(any.payload.object) {
                    Some(object) => Value::Object(Object::share(object)),
                    None => Value::None,
                },
                _ => Value::from_owned(any),
            }
        }
    }

    /// A view of the tensor, when this is one, by its address or as an object.
    ///
    /// # Errors
    /// As [`Object::tensor`].
    ///
    /// # Safety
    /// As [`Object::tensor`].
    pub unsafe fn tensor(&self) -> Result<TensorRef<'a>> {
        // SAFETY: the payload is what the tag says and lives for the call; the caller promises the rest.
        unsafe { object::tensor_of(self.0) }.unwrap_or_else(|| Err(object::no_tensor(format!("{self:?}"))))
    }
}

impl fmt::Debug for Given<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.value().fmt(f)
    }
}

/// What the table keeps.
type Callback = dyn Fn(&[Given<'_>]) -> Result<Value> + Send + Sync;

/// Puts a function into the global table.
///
/// # Errors
/// The table has one of that name.
pub(crate) fn register(library: &'static TvmFfi, name: &str, callback: Box<Callback>) -> Result<()> {
    let callback = Box::into_raw(Box::new(callback)).cast();
    let mut object = ptr::null_mut();
    // SAFETY: `call` and `delete` take what `callback` is; one owned reference is written.
    let code = unsafe { (library.function_create)(callback, call, Some(delete), &mut object) };
    let refused = || {
        let problem = format!("libtvm_ffi takes no function {name:?}{}", library.reason());
        FlashInferError::invalid("register_function", "name", problem)
    };
    let Some(object) = NonNull::new(object).filter(|_| code == 0) else {
        // SAFETY: nobody else has it.
        unsafe { delete(callback) };
        return Err(refused());
    };
    // SAFETY: the reference is ours. The table takes its own.
    let object = unsafe { Object::from_owned(object) };
    let bytes = ByteArray { data: name.as_ptr().cast(), size: name.len() };
    // SAFETY: name and object are alive.
    match unsafe { (library.function_set_global)(&bytes, object.as_ptr(), 0) } {
        0 => Ok(()),
        _ => Err(refused()),
    }
}

/// Calls a [`Callback`]; what it fails with, or panics with, is raised.
unsafe extern "C" fn call(callback: *mut c_void, args: *const Any, count: i32, result: *mut Any) -> c_int {
    // SAFETY: it is what `register` made, and the table keeps; the caller has so many arguments, which
    // live for the call.
    let (callback, args) = unsafe {
        let args = if count <= 0 { &[] } else { slice::from_raw_parts(args, count as usize) };
        (&*callback.cast::<Box<Callback>>(), args)
    };
    let called = catch_unwind(AssertUnwindSafe(|| {
        let args: Vec<_> = args.iter().map(Given).collect();
        callback(&args).map(into_any)
    }));
    let (kind, message) = match called {
        Ok(Ok(any)) => {
            // SAFETY: the caller has room for a result, which becomes its own.
            unsafe { result.write(any) };
            return 0;
        }
        Ok(Err(FlashInferError::TvmFfiCall { kind, message, .. })) => (kind, message),
        // Of an argument, mostly.
        Ok(Err(FlashInferError::ResultType { expected, found })) => {
            ("TypeError".into(), format!("{found} is not {expected}"))
        }
        Ok(Err(error)) => ("RuntimeError".into(), error.to_string()),
        Err(panic) => ("RustPanic".into(), words(&*panic)),
    };
    if let Some(library) = TvmFfi::get() {
        let [kind, message] =
            [kind, message].map(|text| CString::new(text.replace('\0', " ")).unwrap_or_default());
        // SAFETY: both are C strings, which the library copies.
        unsafe { (library.error_set_raised)(kind.as_ptr(), message.as_ptr()) };
    }
    -1
}

unsafe extern "C" fn delete(callback: *mut c_void) {
    // SAFETY: `register` made it so, and this is called once. A destructor that panics leaks.
    let _ =
        catch_unwind(AssertUnwindSafe(|| drop(unsafe { Box::from_raw(callback.cast::<Box<Callback>>()) })));
}

/// A result, which the caller releases.
pub(super) fn into_any(value: Value) -> Any {
    match value {
        Value::Object(object) => *Arg::from(&*ManuallyDrop::new(object)).as_any(),
        // Long text is an object, whose only reference this is.
        Value::Text(text) => *ManuallyDrop::new(Packed::from(&text)).as_arg().as_any(),
        plain => *Packed::from(&plain).as_arg().as_any(),
    }
}

/// What a panic says.
fn words(panic: &(dyn AnyValue + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a function of Rust panicked").to_owned()
}
