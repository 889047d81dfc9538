//! The TVM-FFI layer against the real `libtvm_ffi.so` and its own testing
//! library, both out of the pinned wheel. No GPU is needed.

mod artifact_support;

use std::{
    ffi::CString,
    os::unix::process::ExitStatusExt,
    process::Command,
    ptr::{self, NonNull},
};
use test_support::{
    alone::resident,
    counting::{Counting, allocations},
    required,
};

use flashinfer_rs::{
    DType, Device, FlashInferError, FlashInferRuntime, Module, TensorRef, args,
    artifacts::{Fetch, Member},
    ffi::{
        Arg, DlTensor, Function, Object, TensorObject, Value,
        abi::{ByteArray, ObjectHeader, type_index},
    },
};
use libloading::os::unix::Library;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The runtime with the testing library loaded. `None`, with the reason
/// printed, where the registry cannot be reached and nothing is cached.
fn runtime() -> Option<&'static FlashInferRuntime> {
    static LOADED: std::sync::Once = std::sync::Once::new();
    let load = || -> flashinfer_rs::Result<_> {
        let runtime = FlashInferRuntime::get()?;
        let located = runtime.store().locate(&Member::TvmFfiTesting, Fetch::Allowed)?;
        LOADED.call_once(|| {
            // SAFETY: the testing library only registers functions and types.
            unsafe { Module::open(&located.path) }.unwrap();
        });
        Ok(runtime)
    };
    match load() {
        Ok(runtime) => Some(runtime),
        Err(error) => {
            required::skip(required::LIBTVM_FFI, error);
            None
        }
    }
}

fn function(runtime: &FlashInferRuntime, name: &str) -> Function {
    runtime.global_function(name).unwrap_or_else(|| panic!("the testing library registers {name}"))
}

/// Calls one of the testing library's functions.
fn call(function: &Function, args: &[Arg<'_>]) -> flashinfer_rs::Result<Value> {
    // SAFETY: these functions accept any arguments and check their types.
    unsafe { function.call(args) }
}

/// All tests of this file once more, in a process of its own with a later library.
#[test]
fn a_later_library_serves_as_well() {
    const LATER: &str = artifact_support::LATER_TVM_FFI;
    let Some(runtime) = runtime() else { return };
    if runtime.tvm_ffi_version() == LATER {
        // That process, or one in which all tests run with it.
        return eprintln!("with libtvm_ffi {LATER}: {}", runtime.tvm_ffi_source());
    }
    let Some(wheel) = artifact_support::later_tvm_ffi() else { return };
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg("--nocapture").env("FLASHINFER_RS_WHEELS", artifact_support::wheels_after(&wheel));
    let output = command.output().unwrap();
    let text = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
    assert!(output.status.success() && !text.contains("skipped for want"), "{text}");
    let source = text.lines().find(|line| line.contains(&format!("with libtvm_ffi {LATER}: ")));
    assert!(source.is_some_and(|source| source.contains("0.1.15.post2")), "{text}");
}

#[test]
fn every_kind_of_argument_comes_back() {
    let Some(runtime) = runtime() else { return };
    let echo = function(runtime, "testing.echo");
    assert!(matches!(call(&echo, &[Arg::NONE]).unwrap(), Value::None));
    for int in [0, 1, -1, i64::MIN, i64::MAX] {
        assert!(matches!(call(&echo, &[int.into()]).unwrap(), Value::Int(back) if back == int));
    }
    for float in [0.0, -1.5, f64::MAX, f64::MIN_POSITIVE, f64::INFINITY] {
        assert!(matches!(call(&echo, &[float.into()]).unwrap(), Value::Float(back) if back == float));
    }
    for flag in [false, true] {
        assert!(matches!(call(&echo, &[flag.into()]).unwrap(), Value::Bool(back) if back == flag));
    }
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::E4M3, DType::I64, DType::U8, DType::Bool] {
        assert!(
            matches!(call(&echo, &[dtype.into()]).unwrap(), Value::DType(back) if back == dtype.to_dlpack())
        );
    }
    let device = Device::Cuda(7);
    assert!(
        matches!(call(&echo, &[device.into()]).unwrap(), Value::Device(back) if back == device.to_dlpack())
    );
    for text in ["", "a", "1234567"] {
        let small = Arg::small_str(text).unwrap();
        assert!(matches!(call(&echo, &[small]).unwrap(), Value::Text(back) if back == text));
    }
    assert!(Arg::small_str("12345678").is_none());
    for len in [0usize, 3, 7, 8, 100, 5000] {
        let text = CString::new("x".repeat(len)).unwrap();
        match call(&echo, &[Arg::from(text.as_c_str())]).unwrap() {
            Value::Text(back) => assert_eq!((back.as_bytes(), len <= 7), (text.as_bytes(), true)),
            Value::Object(object) => {
                assert_eq!(object.type_index(), type_index::STR);
                assert_eq!(object.to_text().unwrap().as_bytes(), text.as_bytes());
                // An object goes in and comes out as the same object.
                let Value::Object(same) = call(&echo, &[Arg::from(&object)]).unwrap() else {
                    panic!("an object comes back as an object")
                };
                assert_eq!(same.as_ptr(), object.as_ptr());
                assert_eq!(object.strong_count(), 2);
            }
            other => panic!("a string came back as {other:?}"),
        }
    }
}

#[test]
fn tensors_arrive_as_tensors() {
    let Some(runtime) = runtime() else { return };
    let has_value = function(runtime, "testing.optional_tensor_view_has_value");
    let data = [1.0f32; 6];
    let view = TensorRef::from_slice(&data, &[2, 3]).unwrap();
    let tensor = DlTensor::from(&view);
    assert!(matches!(call(&has_value, &[Arg::from(&tensor)]).unwrap(), Value::Bool(true)));
    assert!(matches!(call(&has_value, &[Arg::NONE]).unwrap(), Value::Bool(false)));
    let error = call(&has_value, &[Arg::from(3i64)]).unwrap_err();
    assert!(matches!(error, FlashInferError::TvmFfiCall { kind, .. } if kind == "TypeError"));
}

#[test]
fn errors_keep_kind_message_and_traceback() {
    let Some(runtime) = runtime() else { return };
    let raise = function(runtime, "testing.test_raise_error");
    let long = "a message that does not fit inline, ".repeat(20);
    for (kind, message) in [("ValueError", "short"), ("InternalError", long.as_str()), ("MyOwnError", "")] {
        let (kind_arg, message_arg) = (CString::new(kind).unwrap(), CString::new(message).unwrap());
        let error = call(&raise, &[kind_arg.as_c_str().into(), message_arg.as_c_str().into()]).unwrap_err();
        let FlashInferError::TvmFfiCall { function, kind: found_kind, message: found, traceback } = &error
        else {
            panic!("{error}")
        };
        assert_eq!(
            (function.as_str(), found_kind.as_str(), found.as_str()),
            ("testing.test_raise_error", kind, message)
        );
        assert!(!traceback.is_empty(), "the library records where it raised");
        assert!(error.to_string().contains(kind));
    }
    // The wrong number of arguments is the library's own error, with its signature.
    let error = call(&raise, &[]).unwrap_err().to_string();
    assert!(error.contains("Expected 2 but got 0 arguments"), "{error}");
    // The slot is empty afterwards: the next call succeeds.
    assert!(matches!(call(&function(runtime, "testing.echo"), &[1i64.into()]).unwrap(), Value::Int(1)));
}

#[test]
fn references_are_counted() {
    let Some(runtime) = runtime() else { return };
    let (echo, count) = (function(runtime, "testing.echo"), function(runtime, "testing.object_use_count"));
    let text = CString::new("a string that is long enough to be an object").unwrap();
    let Value::Object(object) = call(&echo, &[text.as_c_str().into()]).unwrap() else { panic!("an object") };
    let use_count = || match call(&count, &[Arg::from(&object)]).unwrap() {
        Value::Int(count) => count,
        other => panic!("a count, not {other:?}"),
    };
    assert_eq!((use_count(), object.strong_count()), (1, 1));
    let clones: Vec<_> = (0..10).map(|_| object.clone()).collect();
    assert_eq!((use_count(), object.strong_count()), (11, 11));
    drop(clones);
    assert_eq!(use_count(), 1);
    // A call keeps nothing of its arguments, whether it succeeds or fails.
    for _ in 0..100 {
        call(&function(runtime, "testing.nop"), &[Arg::from(&object)]).unwrap();
        call(&function(runtime, "testing.test_raise_error"), &[Arg::from(&object)]).unwrap_err();
    }
    assert_eq!(use_count(), 1);
}

/// The function object that the library's table holds under a name, asked of the
/// library itself. What it points to lives as long as the table's entry.
fn global_object(name: &str) -> NonNull<ObjectHeader> {
    type GetGlobal = unsafe extern "C" fn(*const ByteArray, *mut *mut ObjectHeader) -> i32;
    type DecRef = unsafe extern "C" fn(*mut ObjectHeader) -> i32;
    let library = Library::this();
    let name = ByteArray { data: name.as_ptr().cast(), size: name.len() };
    let mut object = ptr::null_mut();
    // SAFETY: the symbols have these types, and the library is loaded globally.
    // The reference that the first gives is given back by the second.
    unsafe {
        assert_eq!(library.get::<GetGlobal>("TVMFFIFunctionGetGlobal").unwrap()(&name, &mut object), 0);
        let object = NonNull::new(object).unwrap();
        assert_eq!(library.get::<DecRef>("TVMFFIObjectDecRef").unwrap()(object.as_ptr()), 0);
        object
    }
}

/// The strong references that an object's header counts.
fn strong(object: NonNull<ObjectHeader>) -> u32 {
    // SAFETY: the object is alive, and no other thread uses it.
    unsafe { (*object.as_ptr()).combined_ref_count as u32 }
}

/// Each function that takes or returns an object, a thousand times: the counter in
/// the object's header is then what it was.
#[test]
fn every_reference_is_given_back() {
    let Some(runtime) = runtime() else { return };
    const CALLS: usize = 1000;
    let unchanged = |what: &str, object: NonNull<ObjectHeader>, call: &dyn Fn()| {
        let before = strong(object);
        (0..CALLS).for_each(|_| call());
        assert_eq!(strong(object), before, "{what}");
    };

    // Names of this test alone. The first look-up keeps a reference, for good.
    for name in ["testing.add_one", "testing.get_add_one_c_symbol"] {
        runtime.global_function(name);
        unchanged("global_function", global_object(name), &|| {
            assert_eq!(runtime.global_function(name).unwrap().name(), name);
        });
    }
    assert!(runtime.global_function("testing.no_such_function").is_none());

    let (echo, make) = (function(runtime, "testing.echo"), function(runtime, "ffi.Array"));
    let item = function(runtime, "ffi.ArrayGetItem");
    let text = echoed::<Object>(runtime, args!["a string that is long enough to be an object"]).unwrap();
    let array = call(&make, args![&text, 2, &text]).unwrap();
    let Value::Object(array) = array else { panic!("an array, not {array:?}") };
    let held = strong(NonNull::new(text.as_ptr()).unwrap());
    assert_eq!(held, 3, "the text's own reference, and two of the array");

    for object in [&text, &array] {
        let header = NonNull::new(object.as_ptr()).unwrap();
        unchanged("Object::clone", header, &|| drop(object.clone()));
        unchanged("a result", header, &|| drop(call(&echo, args![object]).unwrap()));
        unchanged("Value::clone", header, &|| {
            let value = call(&echo, args![object]).unwrap();
            drop((value.clone(), value));
        });
        unchanged("a Value as argument", header, &|| {
            let value = call(&echo, args![object]).unwrap();
            call(&echo, args![&value]).unwrap();
        });
        unchanged("into Object", header, &|| drop(echoed::<Object>(runtime, args![object]).unwrap()));
        // Of these, one fits and the others are errors.
        unchanged("into String", header, &|| drop(echoed::<String>(runtime, args![object])));
        unchanged("into Vec<i64>", header, &|| drop(echoed::<Vec<i64>>(runtime, args![object])));
        unchanged("into i64", header, &|| drop(echoed::<i64>(runtime, args![object]).unwrap_err()));
        unchanged("a call that fails", header, &|| {
            call(&function(runtime, "testing.test_raise_error"), args![object]).unwrap_err();
        });
        unchanged("an array of objects", header, &|| {
            let array = call(&echo, args![&[object.clone(), object.clone()][..]]).unwrap();
            assert!(matches!(array, Value::Object(array) if array.strong_count() == 1));
        });
        unchanged("an array that the library makes", header, &|| {
            drop(call(&make, args![object, 1, object]).unwrap());
        });
        unchanged("an argument that is refused", header, &|| {
            call(&function(runtime, "testing.schema_id_int"), args![object]).unwrap_err();
        });
    }
    unchanged("an item of an array", NonNull::new(text.as_ptr()).unwrap(), &|| {
        let first: String = call(&item, args![&array, 0]).unwrap().try_into().unwrap();
        assert!(first.starts_with("a string"));
    });
    drop(array);
    assert_eq!(text.strong_count(), 1);

    let data = [0.0f32; 4];
    let view = TensorRef::from_slice(&data, &[2, 2]).unwrap();
    let tensor = TensorObject::from(&view);
    // SAFETY: the payload of a tensor object is its address.
    let header = NonNull::new(unsafe { Arg::from(&tensor).as_any().payload.object }).unwrap();
    unchanged("a tensor object on the stack", header, &|| drop(call(&echo, args![&tensor]).unwrap()));
    assert_eq!(strong(header), 1);
}

/// Set in the process that is to end.
const WRAP: &str = "FLASHINFER_RS_TEST_PART";

/// Half of what the 32 bits can count is more than any program has references,
/// unless it leaks them.
#[test]
fn a_count_of_references_never_wraps() {
    let Some(runtime) = runtime() else { return };
    let (echo, name) = (function(runtime, "testing.echo"), "testing.nop");
    let object = echoed::<Object>(runtime, args!["a string that is long enough to be an object"]).unwrap();
    let lots = |object: *mut ObjectHeader| {
        // SAFETY: the object is alive, and no other thread uses it.
        unsafe { (*object).combined_ref_count |= 1 << 31 };
    };
    match std::env::var(WRAP).as_deref() {
        Err(_) => {}
        Ok(way) => {
            lots(object.as_ptr());
            lots(global_object(name).as_ptr());
            eprintln!("now");
            match way {
                "a clone" => std::mem::forget(object.clone()),
                "a result" => std::mem::forget(call(&echo, args![&object])),
                "a global function" => _ = runtime.global_function(name),
                way => unreachable!("{way}"),
            }
            eprintln!("still there");
            std::process::exit(0);
        }
    }
    for way in ["a clone", "a result", "a global function"] {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["a_count_of_references_never_wraps", "--exact", "--nocapture"]).env(WRAP, way);
        let output = child.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("now") && !said.contains("still there"), "{way}: {said}");
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{way}: {said}");
    }
}

#[test]
fn arrays_of_integers_are_read() {
    let Some(runtime) = runtime() else { return };
    // An array argument that is not one is refused by the library.
    let identity = function(runtime, "testing.schema_id_arr_int");
    let error = call(&identity, &[Arg::from(1i64)]).unwrap_err();
    assert!(matches!(error, FlashInferError::TvmFfiCall { kind, .. } if kind == "TypeError"));
    let make = function(runtime, "ffi.Array");
    let values: Vec<Arg<'_>> = (0..10i64).map(|value| (value * value - 5).into()).collect();
    let Value::Object(array) = call(&make, &values).unwrap() else { panic!("an array") };
    let expected: Vec<i64> = (0..10).map(|value| value * value - 5).collect();
    assert_eq!(array.to_ints().unwrap(), expected);
    let Value::Object(same) = call(&identity, &[Arg::from(&array)]).unwrap() else { panic!("an array") };
    assert_eq!(same.to_ints().unwrap(), expected);
    let Value::Object(mixed) = call(&make, &[Arg::from(1i64), Arg::from(2.5f64)]).unwrap() else {
        panic!("an array")
    };
    assert_eq!(mixed.to_ints(), None);
    let Value::Object(empty) = call(&make, &[]).unwrap() else { panic!("an array") };
    assert_eq!(empty.to_ints().unwrap(), Vec::<i64>::new());
}

/// What `testing.echo` makes of one argument.
fn echoed<T: TryFrom<Value, Error = FlashInferError>>(
    runtime: &FlashInferRuntime,
    args: &[Arg<'_>],
) -> flashinfer_rs::Result<T> {
    call(&function(runtime, "testing.echo"), args)?.try_into()
}

#[test]
fn rust_values_are_packed() {
    let Some(runtime) = runtime() else { return };
    let int = |args: &[Arg<'_>]| echoed::<i64>(runtime, args).unwrap();
    assert_eq!(
        [int(args![-1i8]), int(args![-2i16]), int(args![-3]), int(args![i64::MIN]), int(args![-5isize])],
        [-1, -2, -3, i64::MIN, -5]
    );
    assert_eq!(
        [int(args![1u8]), int(args![2u16]), int(args![u32::MAX]), int(args![u64::MAX]), int(args![5usize])],
        [1, 2, u32::MAX.into(), -1, 5]
    );
    assert_eq!(echoed::<f64>(runtime, args![0.5f32]).unwrap(), 0.5);
    assert_eq!(echoed::<f64>(runtime, args![1e300]).unwrap(), 1e300);
    assert!(echoed::<bool>(runtime, args![true]).unwrap());
    for args in [args![None], args![None::<i64>], args![None::<&str>,], args![&Value::None]] {
        echoed::<()>(runtime, args).unwrap();
    }
    assert_eq!(int(args![Some(7u8)]), 7);
    let dtype = call(&function(runtime, "testing.echo"), args![DType::E4M3]).unwrap();
    assert!(matches!(dtype, Value::DType(dtype) if dtype == DType::E4M3.to_dlpack()));
    let device = call(&function(runtime, "testing.echo"), args![&Value::Device(Device::Cuda(3).to_dlpack())]);
    assert!(matches!(device, Ok(Value::Device(device)) if device == Device::Cuda(3).to_dlpack()));

    // Strings of any length and content, also where nothing but a string is taken.
    for text in
        ["", "1234567", "12345678", "ein Wort mit Umlaut: größer", "a\0b", "twelve\0bytes", &"x".repeat(9999)]
    {
        assert_eq!(echoed::<String>(runtime, args![text]).unwrap(), text);
        let string = function(runtime, "testing.schema_id_string");
        assert_eq!(String::try_from(call(&string, args![&text.to_owned()]).unwrap()).unwrap(), text);
    }

    // Arrays, also where nothing but integers is taken.
    let identity = function(runtime, "testing.schema_id_arr_int");
    for numbers in [vec![], vec![7], (0..1000).collect()] {
        let array = call(&identity, args![&numbers]).unwrap();
        assert_eq!(Vec::<i64>::try_from(array.clone()).unwrap(), numbers);
        // What a function returned goes into the next.
        assert_eq!(echoed::<Vec<i64>>(runtime, args![&array]).unwrap(), numbers);
    }
    assert_eq!(echoed::<Vec<i64>>(runtime, args![&[3, 2, 1]]).unwrap(), [3, 2, 1]);
    assert!(echoed::<Vec<i64>>(runtime, args![&[3, 2, 1], None]).is_ok());
}

#[test]
fn arrays_of_objects_count_references() {
    let Some(runtime) = runtime() else { return };
    let object = |text: &str| echoed::<Object>(runtime, args![text]).unwrap();
    let texts = [object("a string that is an object"), object("another such string")];
    let array = echoed::<Object>(runtime, args![&texts[..]]).unwrap();
    assert_eq!(array.type_index(), type_index::ARRAY);
    assert_eq!((array.strong_count(), texts[0].strong_count(), texts[1].strong_count()), (1, 2, 2));
    assert_eq!(array.to_ints(), None);
    let item = function(runtime, "ffi.ArrayGetItem");
    let second: String = call(&item, args![&array, 1]).unwrap().try_into().unwrap();
    assert_eq!(second, "another such string");
    drop(array);
    assert_eq!((texts[0].strong_count(), texts[1].strong_count()), (1, 1));
}

#[test]
fn tensors_come_back() {
    let Some(runtime) = runtime() else { return };
    let data: Vec<f32> = (0..24).map(|number| number as f32).collect();
    let view = TensorRef::from_slice(&data, &[2, 3, 4]).unwrap().permute(&[1, 0, 2]).unwrap();
    let tensor = TensorObject::from(&view);
    let back = echoed::<Object>(runtime, args![&tensor]).unwrap();
    // SAFETY: nobody writes to the data.
    let back = unsafe { back.tensor() }.unwrap();
    assert_eq!((back.shape(), back.strides(), back.dtype()), (&[3, 2, 4][..], &[4, 12, 1][..], DType::F32));
    assert_eq!((back.device(), back.data_ptr().cast_const()), (Device::Cpu, data.as_ptr().cast()));
    let text = echoed::<Object>(runtime, args!["a string, and no tensor"]).unwrap();
    // SAFETY: as above.
    let error = unsafe { text.tensor() }.unwrap_err();
    assert!(error.to_string().contains("not a tensor"), "{error}");
}

#[test]
fn libraries_register_functions_and_export_others() {
    let Some(_) = runtime() else { return };
    let located = FlashInferRuntime::get().unwrap().store().locate(&Member::TvmFfiTesting, Fetch::Forbidden);
    // SAFETY: it is open already.
    let module = unsafe { Module::open(located.unwrap().path) }.unwrap();
    let exports = module.exports().unwrap();
    assert_eq!(exports, ["testing_dll_schema_id_int", "testing_dll_test_add_with_docstring"]);
    let signature = |name: &str| {
        // SAFETY: the exports are made with TVM-FFI's headers.
        unsafe { module.printed_signature(name) }.unwrap().unwrap()
    };
    assert_eq!(signature(&exports[0]), "testing_dll_schema_id_int(0: int) -> int");
    assert_eq!(signature(&exports[1]), "testing_dll_test_add_with_docstring(0: int, 1: int) -> int");
    // SAFETY: it takes two integers.
    let sum: i64 = unsafe { module.call(&exports[1], args![40, 2u8]) }.unwrap().try_into().unwrap();
    assert_eq!(sum, 42);
    // Without arguments there is nothing to leave out, but something to add.
    let nothing = function(FlashInferRuntime::get().unwrap(), "testing.schema_no_args_no_return");
    let error = call(&nothing, &[Arg::NONE; 128]).unwrap_err();
    assert!(error.to_string().contains("`testing.schema_no_args_no_return() -> void`"), "{error}");
}

#[test]
fn a_successful_call_allocates_nothing() {
    let Some(runtime) = runtime() else { return };
    let echo = function(runtime, "testing.echo");
    let data = [0u8; 64];
    let view = TensorRef::from_slice(&data, &[4, 16]).unwrap();
    call(&echo, &[1i64.into()]).unwrap();
    let before = allocations();
    for round in 0..1000i64 {
        let tensor = DlTensor::from(&view);
        let args =
            [round.into(), Arg::from(&tensor), 2.5f64.into(), true.into(), Arg::small_str("little").unwrap()];
        assert!(matches!(call(&echo, &args).unwrap(), Value::Int(back) if back == round));
    }
    assert_eq!(allocations() - before, 0);
}

#[test]
fn a_million_calls_leak_nothing() {
    let Some(runtime) = runtime() else { return };
    let (echo, make) = (function(runtime, "testing.echo"), function(runtime, "ffi.Array"));
    let text = CString::new("y".repeat(200)).unwrap();
    let raise = function(runtime, "testing.test_raise_error");
    // Four calls a round.
    let run = |rounds: i64| {
        for round in 0..rounds {
            assert!(matches!(call(&echo, &[text.as_c_str().into()]).unwrap(), Value::Object(_)));
            if let Value::Object(array) = call(&make, &[round.into(), 2i64.into()]).unwrap() {
                call(&echo, &[Arg::from(&array)]).unwrap();
            }
            let array = call(&echo, args![&[round, 2], "a string of its own, not a small one"]).unwrap();
            assert!(matches!(array, Value::Object(_)));
        }
        // Errors are slower, because the library looks up where they came from.
        for _ in 0..rounds / 50 {
            call(&raise, &[c"ValueError".into(), text.as_c_str().into()]).unwrap_err();
        }
    };
    // The first error makes the library read its debug information, once.
    run(5_000);
    let before = resident();
    run(250_000);
    // A leak of one 200-byte string a round would be 50 MB.
    let grown = resident().saturating_sub(before);
    assert!(grown < 8 << 20, "the process grew by {grown} bytes");
}

#[test]
fn stack_overflows_are_still_rusts_to_report() {
    let Some(_) = runtime() else { return };
    // SAFETY: a null action only reads the current one.
    let handler = unsafe {
        let mut action = std::mem::zeroed::<libc::sigaction>();
        assert_eq!(libc::sigaction(libc::SIGSEGV, std::ptr::null(), &mut action), 0);
        action.sa_sigaction
    };
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let owner = maps.lines().find(|line| {
        let (start, rest) = line.split_once('-').unwrap();
        let end = rest.split(' ').next().unwrap();
        (usize::from_str_radix(start, 16).unwrap()..usize::from_str_radix(end, 16).unwrap())
            .contains(&handler)
    });
    let owner = owner.expect("Rust's handler is installed");
    assert!(!owner.contains("libtvm_ffi"), "libtvm_ffi took the SIGSEGV handler: {owner}");
}
