//! Libraries that the crate knows nothing of: opened by path, called by name.
//! No GPU is needed.

use std::{
    ffi::CStr,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Barrier},
    thread,
};
use test_support::{c_library, required};

use flashinfer_rs::{
    FlashInferError, FlashInferRuntime, LibrarySource, Module, ModuleName, TensorMut, TensorRef, args,
    ffi::{Arg, Given, Object, Packed, TensorObject, Value},
};
use tempfile::TempDir;

const ADD_ONE: &str = include_str!("../examples/add_one.c");

/// A folder with a library in it, made of C. `None`, with the reason printed,
/// where there is no C compiler or the runtime does not start.
fn library(name: &str, code: &str) -> Option<(TempDir, PathBuf)> {
    if let Err(error) = FlashInferRuntime::get() {
        required::skip(required::LIBTVM_FFI, error);
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    c_library::compile(code, &path, &[]).then_some((folder, path))
}

fn open(path: &Path) -> flashinfer_rs::Result<&'static Module> {
    // SAFETY: these libraries have no initializers, and their functions check
    // what they are given.
    unsafe { Module::open(path) }
}

fn call(module: &Module, name: &str, args: &[Arg<'_>]) -> flashinfer_rs::Result<Value> {
    // SAFETY: as above.
    unsafe { module.call(name, args) }
}

#[test]
fn functions_are_called_by_name() {
    let Some((_folder, path)) = library("libadd_one.so", ADD_ONE) else { return };
    let module = open(&path).unwrap();
    assert_eq!(module.name(), &ModuleName::new("libadd_one"));
    assert_eq!(module.path(), path.canonicalize().unwrap());
    assert!(matches!(module.source(), LibrarySource::File(file) if file == module.path()));
    assert_eq!(module.exports().unwrap(), ["add_one", "answer"]);

    let x = [1.0f32, -2.5, 3.25, 9.0];
    let mut out = [f32::NAN; 4];
    // Names come from anywhere, such as from the list of exports.
    let name = module.exports().unwrap().remove(0);
    let x = TensorRef::from_slice(&x, &[4]).unwrap();
    let result = call(module, &name, args![&mut TensorMut::from_slice(&mut out, &[4]).unwrap(), &x]);
    <()>::try_from(result.unwrap()).unwrap();
    assert_eq!(out, [2.0, -1.5, 4.25, 10.0]);

    // Strides arrive, too.
    let mut wide = [0.0f32; 6];
    let mut view = TensorMut::from_slice_strided(&mut wide, &[2], Some(&[3])).unwrap();
    call(module, &name, args![&mut view, &x.narrow(0, 1, 2).unwrap()]).unwrap();
    assert_eq!(wide, [-1.5, 0.0, 0.0, 4.25, 0.0, 0.0]);

    assert_eq!(i64::try_from(call(module, "answer", args![]).unwrap()).unwrap(), 42);
    let resolved = module.function(&name).unwrap();
    assert_eq!(resolved.name(), "add_one");
}

/// Each has its own results, and its own errors.
#[test]
fn sixty_four_threads_open_and_call() {
    const THREADS: usize = 64;
    const LIBRARIES: usize = 4;
    const CALLS: usize = 300;
    // The folders are kept until all is over.
    let libraries: Vec<_> = (0..LIBRARIES)
        .map_while(|at| library(&format!("lib{at}.so"), &ADD_ONE.replace("= 42", &format!("= {at}"))))
        .collect();
    if libraries.len() < LIBRARIES {
        return;
    }
    let begin = Barrier::new(THREADS);
    let work = |thread: usize| {
        begin.wait();
        for round in 0..CALLS {
            let at = (thread + round) % LIBRARIES;
            let module = open(&libraries[at].1).unwrap();
            assert_eq!(i64::try_from(call(module, "answer", args![]).unwrap()).unwrap(), at as i64);
            let x = [thread as f32, round as f32, -1.0];
            let mut out = [f32::NAN; 3];
            let x = TensorRef::from_slice(&x, &[3]).unwrap();
            call(module, "add_one", args![&mut TensorMut::from_slice(&mut out, &[3]).unwrap(), &x]).unwrap();
            assert_eq!(out, [thread as f32 + 1.0, round as f32 + 1.0, 0.0]);
            let (error, words) = match thread % 2 {
                0 => (call(module, "add_one", args![&x]), "Expected 2"),
                _ => (call(module, "add_one", args![&x, None]), "two tensors"),
            };
            let error = error.unwrap_err().to_string();
            assert!(error.contains(words), "{words}: {error}");
        }
    };
    thread::scope(|scope| {
        let work = &work;
        (0..THREADS).for_each(|thread| drop(scope.spawn(move || work(thread))));
    });
}

#[test]
fn what_a_library_raises_is_decoded() {
    let Some((_folder, path)) = library("libraises.so", ADD_ONE) else { return };
    let module = open(&path).unwrap();
    let (halves, floats) = ([half::f16::ONE; 4], [1.0f32; 4]);
    let halves = TensorRef::from_slice(&halves, &[4]).unwrap();
    let floats = TensorRef::from_slice(&floats, &[4]).unwrap();
    let refused = |args: &[Arg<'_>], kind: &str, words: &str| match call(module, "add_one", args) {
        Err(FlashInferError::TvmFfiCall { function, kind: found, message, .. }) => {
            assert_eq!((function.as_str(), found.as_str()), ("add_one", kind));
            assert!(message.contains(words), "{message}");
        }
        other => panic!("refused, not {other:?}"),
    };
    refused(args![], "TypeError", "Expected 2");
    refused(args![&floats, &floats, 1], "TypeError", "Expected 2");
    refused(args![&floats, None], "TypeError", "two tensors");
    refused(args![&halves, &floats], "ValueError", "32-bit floats");
    refused(args![&floats, &floats.narrow(0, 0, 3).unwrap()], "ValueError", "one length");
}

#[test]
fn a_missing_function_is_answered_with_what_there_is() {
    let Some((_folder, path)) = library("libmissing.so", ADD_ONE) else { return };
    let module = open(&path).unwrap();
    for name in ["add_two", "", "_metadata", "add_one\0", "__tvm_ffi_add_one"] {
        let error = module.function(name).unwrap_err();
        let FlashInferError::MissingFunction { function, exports, .. } = &error else { panic!("{error}") };
        assert_eq!((function.as_str(), exports.len()), (name, 2));
        assert!(error.to_string().ends_with("; it exports: add_one, answer"), "{error}");
        assert!(error.to_string().contains("libmissing.so"), "{error}");
    }
    let Some((_folder, path)) = library("libempty.so", "int nothing;") else { return };
    let error = call(open(&path).unwrap(), "anything", args![]).unwrap_err();
    assert!(error.to_string().ends_with("; it exports: nothing"), "{error}");
}

#[test]
fn a_file_is_opened_once() {
    let Some((folder, path)) = library("libonce.so", ADD_ONE) else { return };
    let first = open(&path).unwrap();
    let link = folder.path().join("link.so");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    for again in [&path, &link, &folder.path().join("./libonce.so")] {
        assert!(std::ptr::eq(first, open(again).unwrap()), "{}", again.display());
    }
    let threads: Vec<_> = (0..8)
        .map(|_| {
            let path = path.clone();
            thread::spawn(move || open(&path).unwrap() as *const Module as usize)
        })
        .collect();
    assert!(threads.into_iter().all(|thread| thread.join().unwrap() == first as *const Module as usize));

    // Another file of the same names is another module, and its symbols are its own.
    let other = folder.path().join("other.so");
    assert!(c_library::compile(&ADD_ONE.replace("= 42", "= 43"), &other, &[]));
    let other = open(&other).unwrap();
    let answer = |module| i64::try_from(call(module, "answer", args![]).unwrap()).unwrap();
    assert_eq!((answer(first), answer(other)), (42, 43));

    // Gone or changed, the file stays open as it was.
    fs::remove_file(&path).unwrap();
    assert_eq!(answer(first), 42);
    assert!(matches!(first.exports(), Err(FlashInferError::Library { .. })));
    assert!(matches!(first.function("none"), Err(FlashInferError::MissingFunction { .. })));
}

#[test]
fn what_cannot_be_opened_is_named() {
    let Some((folder, path)) =
        library("libwants.so", "extern int wanted(void);\nint call(void) { return wanted(); }")
    else {
        return;
    };
    let refused = |path: &Path, words: &str| match open(path) {
        Err(error @ FlashInferError::Library { .. }) => {
            let text = error.to_string();
            assert!(text.contains(words) && text.contains(path.to_str().unwrap()), "{text}");
        }
        other => panic!("refused, not {other:?}"),
    };
    refused(&path, "undefined symbol: wanted");
    refused(&folder.path().join("nothing.so"), "No such file or directory");
    // A bare name is a file of this folder, and not searched for on the loader's path.
    refused("libc.so.6".as_ref(), "No such file or directory");
    let text = folder.path().join("text.so");
    fs::write(&text, "not a library, but long enough to be looked at as one".repeat(4)).unwrap();
    refused(&text, "invalid ELF header");
    refused(folder.path(), "");
}

/// A library that links against another one, which is made for it, of no
/// content. Options go to the linker.
fn linked_with(folder: &Path, other: &str, name: &str, options: &[&str]) -> PathBuf {
    let (needed, library) = (folder.join(other), folder.join(name));
    assert!(c_library::compile("int nothing;", &needed, &[&format!("-Wl,-soname,{other}")]));
    let mut all = vec!["-Wl,--no-as-needed", needed.to_str().unwrap()];
    all.extend(options);
    assert!(c_library::compile(ADD_ONE, &library, &all));
    library
}

/// cuBLAS is opened first where a library links against it; but the loader
/// looks where the library says, too, and other versions are its business alone.
#[test]
fn libraries_may_bring_their_cublas() {
    let Some((folder, _)) = library("unused.so", "int nothing;") else { return };
    let folder = folder.path();
    let missing = linked_with(folder, "libcublas.so.13", "missing.so", &[]);
    match open(&missing) {
        // Only where the machine has none.
        Err(error @ FlashInferError::Artifact(_)) => {
            let text = format!("{error:#}");
            assert!(text.contains("libcublasLt.so.13") && text.contains("LD_LIBRARY_PATH"), "{text}");
        }
        other => assert_eq!(other.unwrap().exports().unwrap(), ["add_one", "answer"]),
    }
    let older = linked_with(folder, "libcublas.so.12", "older.so", &[]);
    let error = open(&older).unwrap_err();
    assert!(matches!(&error, FlashInferError::Library { .. }), "{error}");
    assert!(error.to_string().contains("libcublas.so.12: cannot open"), "{error}");
    let here = ["-Wl,-rpath,$ORIGIN"];
    for (needed, name) in [("libcublas.so.12", "own_12.so"), ("libcublas.so.13", "own_13.so")] {
        let module = open(&linked_with(folder, needed, name, &here)).unwrap();
        assert_eq!(i64::try_from(call(module, "answer", args![]).unwrap()).unwrap(), 42);
    }
}

#[test]
fn results_convert_or_say_what_they_are() {
    let text = |error: FlashInferError| error.to_string();
    assert_eq!(f64::try_from(Value::Int(2)).unwrap(), 2.0);
    assert_eq!(f64::try_from(Value::Float(2.5)).unwrap(), 2.5);
    assert!(bool::try_from(Value::Bool(true)).unwrap());
    assert_eq!(String::try_from(Value::Text("short".into())).unwrap(), "short");
    assert_eq!(
        text(i64::try_from(Value::Float(2.5)).unwrap_err()),
        "the function returned Float(2.5), not an integer"
    );
    assert_eq!(
        text(<()>::try_from(Value::Bool(true)).unwrap_err()),
        "the function returned Bool(true), not None"
    );
    assert_eq!(text(Object::try_from(Value::None).unwrap_err()), "the function returned None, not an object");
    for error in [
        String::try_from(Value::Int(1)).unwrap_err(),
        Vec::<i64>::try_from(Value::Int(1)).unwrap_err(),
        bool::try_from(Value::Int(1)).unwrap_err(),
        f64::try_from(Value::Text("1".into())).unwrap_err(),
    ] {
        assert!(matches!(error, FlashInferError::ResultType { .. }), "{error}");
    }
}

#[test]
fn a_changed_module_is_caught_before_it_is_called() {
    // In place of FlashInfer's module: two functions as declared, one that
    // takes its numbers in another order, and one that is gone.
    let rmsnorm = "rmsnorm(0: DLTensor*, 1: DLTensor*, 2: DLTensor*, 3: bool, 4: float) -> void";
    let same =
        |name: &str| format!("{name}(0: DLTensor*, 1: DLTensor*, 2: DLTensor*, 3: float, 4: bool) -> void");
    let code = c_library::module_that_says(&[rmsnorm, &same("gemma_rmsnorm"), &same("fused_add_rmsnorm")]);
    let Some((_folder, path)) = library("norm.so", &code) else { return };
    let module = open(&path).unwrap();
    assert_eq!(module.name(), &ModuleName::NORM);
    let error = module.check().unwrap_err();
    assert!(
        error.to_string().contains("rmsnorm: argument eps: the module takes `bool`, declared is `float`"),
        "{error}"
    );
    let FlashInferError::Signature { module, differences } = error else { panic!("{error}") };
    assert!(module.contains("norm.so"), "{module}");
    let about = |words: &str| differences.iter().filter(|difference| difference.starts_with(words)).count();
    assert_eq!((about("rmsnorm: "), about("gemma_rmsnorm: "), about("fused_add_rmsnorm: ")), (1, 0, 0));
    assert_eq!(about("gemma_fused_add_rmsnorm: the module does not export it"), 1);

    // A function that answers something else, and a module that is not called.
    let code = "int __tvm_ffi_rmsnorm(void) { return 0; }";
    let Some((folder, _)) = library("unused.so", code) else { return };
    let silent = folder.path().join("norm.so");
    assert!(c_library::compile(code, &silent, &[]));
    let error = open(&silent).unwrap().check().unwrap_err().to_string();
    assert!(error.contains("rmsnorm: it does not say what it takes"), "{error}");
    assert_eq!(open(&folder.path().join("unused.so")).unwrap().check().unwrap(), 0);
}

/// A function that nothing defines is found before the library is opened, so that neither its
/// initializer nor a call ends the process.
#[test]
fn functions_that_nothing_defines_are_named_before_anything_runs() {
    let code = r#"
extern int no_such_function(void);
extern int none_like_that_either(void);
extern int puts(const char *);
__attribute__((constructor)) static void start(void) { no_such_function(); }
int __tvm_ffi_answer(void) { return none_like_that_either() + puts("called"); }
"#;
    let Some((_folder, path)) = library("lacking.so", code) else { return };
    let error = open(&path).unwrap_err();
    let FlashInferError::Library { reason, remedy, .. } = &error else { panic!("{error}") };
    assert!(
        reason.contains("no_such_function, none_like_that_either,") && !reason.contains("puts"),
        "{error}"
    );
    assert!(!remedy.is_empty(), "{error}");
}

/// As modules of FlashAttention 2 are since 0.6.14: they name kernels for tiles of 32 queries,
/// which they do not have and never call.
#[test]
fn kernels_that_are_never_called_may_be_missing() {
    let kernel = "_ZN10flashinfer39BatchPrefillWithRaggedKVCacheDispatchedILj32ELj64ELj64E";
    let other = "_ZN10flashinfer39BatchPrefillWithRaggedKVCacheDispatchedILj16ELj32ELj64E";
    let code = |called: &str| {
        format!(
            "extern int {called}(void);\nint __tvm_ffi_run(void **f, void *a, int n) {{ return n ? {called}() : 0; (void)f; (void)a; }}\n"
        )
    };
    let Some((folder, path)) = library("batch_prefill_with_kv_cache_made.so", &code(kernel)) else { return };
    let module = open(&path).unwrap();
    assert_eq!(module.unbound(), [kernel]);
    <()>::try_from(call(module, "run", args![]).unwrap()).unwrap();

    // Not another tile, and not in other modules.
    for (name, called) in [("batch_prefill_with_kv_cache_other.so", other), ("norm_made.so", kernel)] {
        let path = folder.path().join(name);
        assert!(c_library::compile(&code(called), &path, &[]));
        let error = open(&path).unwrap_err().to_string();
        assert!(error.contains(called), "{error}");
    }
}

/// A function with several signatures is called with the arguments of the one that the module
/// says it has; if that is none of them, both are shown.
#[test]
fn an_unknown_signature_is_shown_with_those_that_are_known() {
    let new = "top_k_renorm_probs(0: DLTensor*, 1: DLTensor*, 2: int) -> void";
    let code = c_library::module_that_says(&[new]);
    let Some((_folder, path)) = library("sampling.so", &code) else { return };
    let error = open(&path).unwrap().check().unwrap_err().to_string();
    for part in [new, "since 0.6.13 `top_k_renorm_probs(", "since 0.7.1 `top_k_renorm_probs("] {
        assert!(error.contains(part), "no {part} in: {error}");
    }
}

/// Calls the function of the global table that its first argument names, with the others.
const CALLS_BACK: &str = r#"
#include <stddef.h>
#include <stdint.h>
#include <string.h>
typedef struct { int32_t type_index; uint32_t small_len; union { int64_t i; double f; const char *s; void *p; } value; } Any;
typedef struct { const char *data; size_t size; } Bytes;
extern int TVMFFIFunctionGetGlobal(const Bytes *name, void **out);
extern int TVMFFIFunctionCall(void *function, const Any *args, int32_t count, Any *result);
extern int TVMFFIObjectDecRef(void *object);
extern void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message);
int __tvm_ffi_call_back(void *self, const Any *args, int32_t count, Any *result) {
    (void)self;
    void *function = NULL;
    Bytes name = {args[0].value.s, strlen(args[0].value.s)};
    if (TVMFFIFunctionGetGlobal(&name, &function) != 0 || !function) {
        TVMFFIErrorSetRaisedFromCStr("KeyError", "there is no such function");
        return -1;
    }
    int code = TVMFFIFunctionCall(function, args + 1, count - 1, result);
    TVMFFIObjectDecRef(function);
    return code;
}
"#;

#[test]
fn modules_call_functions_of_rust() {
    let Some((_folder, path)) = library("libcalls_back.so", CALLS_BACK) else { return };
    let (module, runtime) = (open(&path).unwrap(), FlashInferRuntime::get().unwrap());
    let kept = Arc::new(());
    let held = kept.clone();
    runtime
        .register_function("own_module.echo", move |args| {
            let _held = &held;
            Ok(args.first().map_or(Value::None, Given::value))
        })
        .unwrap();
    let sum = |args: &[Given<'_>]| {
        // SAFETY: the caller's tensor lives for the call, and nobody writes to it.
        let x = unsafe { args[0].tensor()? };
        // SAFETY: a contiguous tensor of the host, of so many `f32`.
        let x = unsafe { std::slice::from_raw_parts(x.data_ptr().cast::<f32>(), x.numel()) };
        Ok(Value::Float(x.iter().copied().map(f64::from).sum()))
    };
    runtime.register_function("own_module.sum", sum).unwrap();
    runtime.register_function("own_module.fails", |args| args[0].value().try_into().map(Value::Int)).unwrap();
    runtime.register_function("own_module.panics", |_| panic!("in a function of Rust")).unwrap();
    let call = |name: &CStr, arg: Packed<'_>| call(module, "call_back", &[Arg::from(name), arg.as_arg()]);

    // What comes is what went, and its references are given back.
    let echo = c"own_module.echo";
    assert_eq!(i64::try_from(call(echo, 7.into()).unwrap()).unwrap(), 7);
    assert_eq!(f64::try_from(call(echo, 0.5.into()).unwrap()).unwrap(), 0.5);
    assert!(bool::try_from(call(echo, true.into()).unwrap()).unwrap());
    <()>::try_from(call(echo, Arg::NONE.into()).unwrap()).unwrap();
    for text in ["short", "a text of more than seven bytes"] {
        assert_eq!(String::try_from(call(echo, text.into()).unwrap()).unwrap(), text);
    }
    assert_eq!(
        String::try_from(call(echo, c"of C, and rather long".into()).unwrap()).unwrap(),
        "of C, and rather long"
    );
    let array = Object::try_from(call(echo, (&[1i64, 2, 3]).into()).unwrap()).unwrap();
    assert_eq!((array.strong_count(), array.to_ints()), (1, Some(vec![1, 2, 3])));

    // Tensors by address, and as objects.
    let x = [1.0f32, -2.5, 3.25];
    let x = TensorRef::from_slice(&x, &[3]).unwrap();
    assert_eq!(f64::try_from(call(c"own_module.sum", (&x).into()).unwrap()).unwrap(), 1.75);
    let object = TensorObject::from(&x);
    assert_eq!(f64::try_from(call(c"own_module.sum", (&object).into()).unwrap()).unwrap(), 1.75);

    // Errors have their words.
    for (name, kind, message) in [
        (c"own_module.sum", "TypeError", "Int(3) is not a tensor"),
        (c"own_module.fails", "TypeError", "Bool(true) is not an integer"),
        (c"own_module.panics", "RustPanic", "in a function of Rust"),
        (c"own_module.unknown", "KeyError", "there is no such function"),
    ] {
        let arg = if message.contains("Bool") { true.into() } else { Packed::from(3) };
        match call(name, arg).unwrap_err() {
            FlashInferError::TvmFfiCall { kind: found, message: words, .. } => {
                assert_eq!((found.as_str(), words.as_str()), (kind, message), "{name:?}");
            }
            other => panic!("{name:?}: {other}"),
        }
    }
    // An error that comes back from another function stays as it is.
    runtime
        .register_function("own_module.nested", {
            move |_| {
                let nested = FlashInferRuntime::get()?.global_function("own_module.panics");
                // SAFETY: it takes any arguments.
                unsafe { nested.expect("it was registered").call(&[]) }
            }
        })
        .unwrap();
    let nested = call(c"own_module.nested", Arg::NONE.into()).unwrap_err();
    assert!(matches!(nested, FlashInferError::TvmFfiCall { kind, .. } if kind == "RustPanic"));

    // A name is taken once, and what is refused is dropped.
    let refused = Arc::new(());
    let held = refused.clone();
    let again = runtime.register_function("own_module.echo", move |_| {
        let _held = &held;
        Ok(Value::None)
    });
    assert!(again.unwrap_err().to_string().contains("own_module.echo"));
    assert_eq!((Arc::strong_count(&refused), Arc::strong_count(&kept)), (1, 2));
    assert_eq!(i64::try_from(call(echo, 8.into()).unwrap()).unwrap(), 8);
}
