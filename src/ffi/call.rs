//! A call: its function, its stream, its error.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    ffi::c_void,
    marker::PhantomData,
    ptr,
    ptr::NonNull,
    sync::{Mutex, PoisonError},
};

use super::{
    abi::{Any, SafeCall, device_type},
    args::Arg,
    library::TvmFfi,
    object::{Object, Value},
};
use crate::{
    capture,
    error::{FlashInferError, Result},
    stream::Stream,
};

/// An exported function, resolved once. Libraries are never unloaded, so the
/// pointer stays valid for the life of the process.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    library: &'static TvmFfi,
    pub(super) target: Target,
    name: &'static str,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    /// A C symbol of a module.
    Symbol(SafeCall),
    /// A function object of the global table.
    Global(&'static Object),
}

impl std::fmt::Debug for TvmFfi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TvmFfi({:?})", self.version())
    }
}

/// The name for the life of the process, kept once: a [`Function`] is copied
/// freely. Only names of functions that exist come here.
fn intern(name: &str) -> &'static str {
    static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(name) = names.get(name) {
        return name;
    }
    let name: &'static str = Box::leak(name.into());
    names.insert(name);
    name
}

/// The function object for the life of the process, with one reference kept
/// however often it is looked up.
fn keep(function: Object) -> &'static Object {
    static KEPT: Mutex<BTreeMap<usize, &'static Object>> = Mutex::new(BTreeMap::new());
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    kept.entry(function.as_ptr() as usize).or_insert_with(|| Box::leak(Box::new(function)))
}

impl Function {
    /// A function by its exported C symbol.
    pub(crate) fn from_symbol(library: &'static TvmFfi, symbol: SafeCall, name: &str) -> Self {
        Self { library, target: Target::Symbol(symbol), name: intern(name) }
    }

    /// A function of libtvm_ffi's global table, such as one that another
    /// library registered on load. `None` if there is none of that name.
    pub(crate) fn global(library: &'static TvmFfi, name: &str) -> Option<Self> {
        let bytes = super::abi::ByteArray { data: name.as_ptr().cast(), size: name.len() };
        let mut object = ptr::null_mut();
        // SAFETY: the name is alive; one owned reference or null is written.
        let code = unsafe { (library.function_get_global)(&bytes, &mut object) };
        if code != 0 {
            // The table could not be read; nobody else is to be told of it.
            library.raised();
        }
        // SAFETY: the reference is ours.
        let object = unsafe { Object::from_owned(NonNull::new(object)?) };
        Some(Self::of_object(library, object, name))
    }

    /// A function object, of which one reference is kept as long as the process lives.
    pub(super) fn of_object(library: &'static TvmFfi, object: Object, name: &str) -> Self {
        Self { library, target: Target::Global(keep(object)), name: intern(name) }
    }

    /// The function's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Calls the function. Kernels go to the stream that is set for the
    /// calling thread, so see [`call_on`](Self::call_on) for those.
    ///
    /// # Errors
    /// [`FlashInferError::TvmFfiCall`] with what the function raised.
    ///
    /// # Safety
    /// As [`Module::call`](crate::Module::call): the function does with its arguments
    /// what its author wrote. Tensors must be of the devices, types and sizes it
    /// assumes, index tensors must hold what it expects, and of a
    /// [`TensorObject`](super::TensorObject), which is on the stack, nothing may keep a
    /// reference for longer than it is there: no closure, either.
    pub unsafe fn call(&self, args: &[Arg<'_>]) -> Result<Value> {
        let mut result = Any::NONE;
        let (args, count) = (args.as_ptr().cast::<Any>(), args.len() as i32);
        // SAFETY: `Arg` is transparent over `Any`; `count` of them are alive
        // for the call; the result starts as None.
        let code = unsafe {
            match self.target {
                Target::Symbol(function) => function(ptr::null_mut(), args, count, &mut result),
                Target::Global(function) => {
                    (self.library.function_call)(function.as_ptr(), args, count, &mut result)
                }
            }
        };
        // SAFETY: the result is ours, also what a function wrote that failed
        // after all: so have it TVM-FFI's own callers.
        let value = unsafe { Value::from_owned(result) };
        match code {
            0 => Ok(value),
            _ => Err(self.raised()),
        }
    }

    /// Calls the function with `stream` as the stream of its kernels. The
    /// current device stays as it is, unlike in
    /// [`Module::call_on`](crate::Module::call_on).
    ///
    /// # Errors
    /// As [`call`](Self::call).
    ///
    /// # Safety
    /// As [`call`](Self::call).
    pub unsafe fn call_on(&self, stream: &Stream, args: &[Arg<'_>]) -> Result<Value> {
        let _context = StreamContext::enter(self.library, stream)?;
        // SAFETY: promised by the caller.
        capture::enqueue(stream, || unsafe { self.call(args) })
    }

    /// The error that the last call left behind in this thread.
    #[cold]
    fn raised(&self) -> FlashInferError {
        let (kind, message, traceback) = self.library.raised().unwrap_or_else(|| {
            ("UnknownError".into(), "the function failed without saying why".into(), String::new())
        });
        FlashInferError::TvmFfiCall { function: self.name.into(), kind, message, traceback }
    }
}

thread_local! {
    /// The stream of the innermost [`StreamContext`] of this thread.
    static CURRENT: Cell<*const Stream> = const { Cell::new(ptr::null()) };
}

/// Makes a stream the one of this thread's calls, until dropped: then the
/// stream that was set before is set again, whatever happened in between.
pub(crate) struct StreamContext<'s> {
    library: &'static TvmFfi,
    ordinal: i32,
    previous: *mut c_void,
    previous_owner: *const Stream,
    stream: PhantomData<&'s Stream>,
}

impl<'s> StreamContext<'s> {
    pub(crate) fn enter(library: &'static TvmFfi, stream: &'s Stream) -> Result<Self> {
        let ordinal = stream.ordinal() as i32;
        let mut previous = ptr::null_mut();
        // SAFETY: only stores the handle, and writes the old one.
        let code =
            unsafe { (library.env_set_stream)(device_type::CUDA, ordinal, stream.as_raw(), &mut previous) };
        if code != 0 {
            let refused = format!("libtvm_ffi refused {stream:?}{}", library.reason());
            return Err(FlashInferError::invalid("TVMFFIEnvSetStream", "stream", refused));
        }
        let previous_owner = CURRENT.replace(stream);
        Ok(Self { library, ordinal, previous, previous_owner, stream: PhantomData })
    }

    /// Gives `f` the stream of the innermost context, if there is one.
    pub(crate) fn with_current<R>(f: impl FnOnce(Option<&Stream>) -> R) -> R {
        let current = CURRENT.get();
        // SAFETY: the pointer is set only while a context borrows the stream,
        // and contexts of a thread nest.
        f(unsafe { current.as_ref() })
    }
}

impl Drop for StreamContext<'_> {
    fn drop(&mut self) {
        CURRENT.set(self.previous_owner);
        // SAFETY: stores a handle that was set before.
        unsafe {
            (self.library.env_set_stream)(device_type::CUDA, self.ordinal, self.previous, ptr::null_mut())
        };
    }
}

#[cfg(test)]
mod tests {
    use std::{
        ffi::c_int,
        panic::{AssertUnwindSafe, catch_unwind},
        sync::atomic::{AtomicI64, Ordering},
    };

    use libloading::os::unix::Library;

    use super::*;
    use crate::{
        ffi::abi::{ByteArray, ObjectHeader, type_index},
        runtime::FlashInferRuntime,
    };
    use test_support::required;

    /// The library, or the reason why this machine has none, printed.
    fn library() -> Option<&'static TvmFfi> {
        match FlashInferRuntime::get() {
            Ok(_) => TvmFfi::get(),
            Err(error) => {
                required::skip(required::LIBTVM_FFI, error);
                None
            }
        }
    }

    /// The stream that is set in this thread, asked of the library itself.
    fn current_stream(ordinal: i32) -> usize {
        type GetStream = unsafe extern "C" fn(i32, i32) -> *mut c_void;
        // SAFETY: the symbol has this type; the library is loaded globally.
        unsafe {
            let get = Library::this().get::<GetStream>(b"TVMFFIEnvGetStream\0").unwrap();
            get(device_type::CUDA, ordinal) as usize
        }
    }

    fn stream(handle: usize, ordinal: u32) -> Stream {
        Stream::with_owner(handle as *mut c_void, ordinal, None)
    }

    /// What the last call of `probe` saw.
    static SEEN: AtomicI64 = AtomicI64::new(0);

    /// An exported function as a module would have it: notes the stream of
    /// device 1 and returns its first argument, or fails without one.
    unsafe extern "C" fn probe(_: *mut c_void, args: *const Any, count: i32, result: *mut Any) -> c_int {
        SEEN.store(current_stream(1) as i64, Ordering::SeqCst);
        if count == 0 {
            return -1;
        }
        // SAFETY: the caller passes `count` arguments and a result.
        unsafe { *result = *args };
        0
    }

    #[test]
    fn streams_are_set_for_a_call_and_put_back() {
        let Some(library) = library() else { return };
        let function = Function::from_symbol(library, probe, "probe");
        assert_eq!(current_stream(1), 0);
        let outer = stream(0x5000, 1);
        let context = StreamContext::enter(library, &outer).unwrap();
        assert_eq!(current_stream(1), 0x5000);

        // SAFETY: the function takes any arguments.
        let value = unsafe { function.call_on(&stream(0x6000, 1), &[7i64.into()]) }.unwrap();
        assert!(matches!(value, Value::Int(7)));
        assert_eq!((SEEN.load(Ordering::SeqCst), current_stream(1)), (0x6000, 0x5000));

        // SAFETY: as above.
        let error = unsafe { function.call_on(&stream(0x7000, 1), &[]) }.unwrap_err();
        assert!(matches!(error, FlashInferError::TvmFfiCall { kind, .. } if kind == "UnknownError"));
        assert_eq!((SEEN.load(Ordering::SeqCst), current_stream(1)), (0x7000, 0x5000));

        let panicked = catch_unwind(AssertUnwindSafe(|| {
            let inner = stream(0x8000, 1);
            let _context = StreamContext::enter(library, &inner).unwrap();
            assert_eq!(current_stream(1), 0x8000);
            StreamContext::with_current(|stream| assert_eq!(stream.unwrap().as_raw() as usize, 0x8000));
            panic!("in the middle of a call");
        }));
        assert!(panicked.is_err());
        assert_eq!(current_stream(1), 0x5000);
        StreamContext::with_current(|stream| assert_eq!(stream.unwrap().as_raw() as usize, 0x5000));
        // Other threads and devices are not concerned.
        assert_eq!(std::thread::spawn(|| current_stream(1)).join().unwrap(), 0);
        assert_eq!(current_stream(0), 0);
        drop(context);
        assert_eq!(current_stream(1), 0);
        StreamContext::with_current(|stream| assert!(stream.is_none()));
    }

    #[test]
    fn results_are_tagged() {
        let Some(library) = library() else { return };
        let function = Function::from_symbol(library, probe, "probe");
        let back = |arg: Arg<'_>| {
            // SAFETY: the function takes any arguments.
            unsafe { function.call(&[arg]) }.unwrap()
        };
        assert!(matches!(back(true.into()), Value::Bool(true)));
        assert!(matches!(back(Arg::NONE), Value::None));
        let pointer = Any { type_index: type_index::OPAQUE_PTR, ..Any::NONE };
        // SAFETY: a plain value needs no release.
        assert!(matches!(unsafe { Value::from_owned(pointer) }, Value::Other(type_index::OPAQUE_PTR)));
    }
    /// Writes a result, its own reference to the first argument, and then fails.
    unsafe extern "C" fn fails_late(_: *mut c_void, args: *const Any, _: i32, result: *mut Any) -> c_int {
        // SAFETY: the first argument is an object, to which this makes one more reference.
        unsafe {
            let object = Object::from_owned(NonNull::new((*args).payload.object).unwrap());
            std::mem::forget((object.clone(), object));
            *result = *args;
        }
        -1
    }

    /// Raises its first argument, an error.
    unsafe extern "C" fn raises_its_argument(_: *mut c_void, args: *const Any, _: i32, _: *mut Any) -> c_int {
        type SetRaised = unsafe extern "C" fn(*mut ObjectHeader);
        // SAFETY: the symbol has this type; the library takes its own reference.
        unsafe { Library::this().get::<SetRaised>("TVMFFIErrorSetRaised").unwrap()((*args).payload.object) };
        -1
    }

    #[test]
    fn what_a_failing_function_leaves_is_released() {
        let Some(library) = library() else { return };
        type CreateError = unsafe extern "C" fn(
            *const ByteArray,
            *const ByteArray,
            *const ByteArray,
            *mut *mut ObjectHeader,
        ) -> c_int;
        let text = |text: &'static str| ByteArray { data: text.as_ptr().cast(), size: text.len() };
        let mut error = ptr::null_mut();
        // SAFETY: the symbol has this type; one owned reference is written.
        let error = unsafe {
            let create = Library::this().get::<CreateError>("TVMFFIErrorCreate").unwrap();
            assert_eq!(create(&text("ValueError"), &text("of the test"), &text("here"), &mut error), 0);
            Object::from_owned(NonNull::new(error).unwrap())
        };
        let object = Object::text("a result that comes with an error");
        for (function, argument) in [(fails_late as SafeCall, &object), (raises_its_argument, &error)] {
            let function = Function::from_symbol(library, function, "fails");
            for _ in 0..1000 {
                // SAFETY: the function takes one object.
                let failed = unsafe { function.call(&[argument.into()]) }.unwrap_err();
                let FlashInferError::TvmFfiCall { kind, .. } = failed else { panic!("{failed}") };
                assert_eq!(kind == "ValueError", std::ptr::eq(argument, &error), "{kind}");
            }
            assert_eq!(argument.strong_count(), 1);
        }
        assert!(library.raised().is_none());
    }
}
