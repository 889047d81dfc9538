//! Values and functions of TVM-FFI's own crate. Needs `tvm-ffi-config` to build, and no GPU.
#![cfg(feature = "tvm-ffi")]

use std::path::PathBuf;

use flashinfer_rs::{
    DType, Device, FlashInferRuntime, Module, TensorRef, args,
    ffi::{DlTensor, Function, Object, Value},
};
use tempfile::TempDir;
use test_support::c_library;
use tvm_ffi::{Any, Tensor, TensorView};

/// A folder with a library in it, made of C; `None`, with the reason printed, without a C compiler.
fn library() -> Option<(TempDir, PathBuf)> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("libadd_one.so");
    c_library::compile(include_str!("../examples/add_one.c"), &path, &[]).then_some((folder, path))
}

/// A value of there, here.
fn here(any: impl Into<Any>) -> Value {
    // SAFETY: numbers, text and tensors may go to any thread.
    unsafe { Value::from_tvm_ffi(any.into()) }.unwrap()
}

/// A value of here, there.
fn there(value: Value) -> Any {
    // SAFETY: it is no function, and no list.
    unsafe { value.to_tvm_ffi() }
}

fn sum(numbers: &[f32]) -> f64 {
    numbers.iter().copied().map(f64::from).sum()
}

#[test]
fn values_are_the_same_in_both() {
    assert_eq!(i64::try_from(here(7i64)).unwrap(), 7);
    assert!(bool::try_from(here(true)).unwrap());
    assert_eq!(f64::try_from(here(0.5f64)).unwrap(), 0.5);
    for text in ["short", "a text of more than seven bytes"] {
        assert_eq!(String::try_from(here(tvm_ffi::String::from(text))).unwrap(), text);
        let back = there(Value::Text(text.into()));
        assert_eq!(back.try_as::<tvm_ffi::String>().unwrap().as_str(), text);
    }
    assert_eq!(there(Value::Int(-3)).try_as::<i64>(), Some(-3));
    assert_eq!(there(Value::None).type_index(), Any::new().type_index());
}

#[test]
fn tensors_are_seen_by_both() {
    let numbers = [1.0f32, 2.0, 3.5, -4.0, 0.25, 8.0];
    let tensor = Tensor::from_slice(&numbers, &[2, 3]).unwrap();
    let object = Object::try_from(here(tensor.clone())).unwrap();
    // Of `tensor`, and of the object.
    assert_eq!(object.strong_count(), 2);
    // SAFETY: nobody writes to it.
    let view = unsafe { object.tensor() }.unwrap();
    assert_eq!((view.shape(), view.dtype(), view.device()), (&[2, 3][..], DType::F32, Device::Cpu));
    assert_eq!(view.data_ptr().cast_const(), tensor.data_ptr());
    drop(object);

    let view = TensorRef::from_slice(&numbers, &[3, 2]).unwrap();
    let tensor = DlTensor::from(&view);
    // SAFETY: it is used here only, and read.
    let tensor = unsafe { tensor.to_tvm_ffi() };
    assert_eq!((tensor.shape(), tensor.numel(), tensor.is_contiguous()), (&[3, 2][..], 6, true));
    assert_eq!(tensor.data_ptr().cast_const().cast(), numbers.as_ptr());
}

#[test]
fn functions_are_called_from_both() {
    let runtime = FlashInferRuntime::get().expect("libtvm_ffi, which this program links");
    // A closure there, called from here.
    let doubled = tvm_ffi::Function::from_typed(|x: i64| -> tvm_ffi::Result<i64> { Ok(2 * x) });
    // SAFETY: it holds nothing.
    let function = unsafe { Function::from_tvm_ffi(doubled) }.unwrap();
    // SAFETY: it takes an integer.
    assert_eq!(i64::try_from(unsafe { function.call(args![21]) }.unwrap()).unwrap(), 42);
    let adds = tvm_ffi::Function::from_typed(|x: TensorView| -> tvm_ffi::Result<f64> {
        // SAFETY: a contiguous tensor of the host, of so many `f32`.
        Ok(sum(unsafe { std::slice::from_raw_parts(x.data_ptr().cast::<f32>(), x.numel()) }))
    });
    tvm_ffi::Function::register_global("tests.adds", adds).unwrap();
    let numbers = [0.5f32, 1.5, -4.0];
    let x = TensorRef::from_slice(&numbers, &[3]).unwrap();
    // SAFETY: it takes a tensor of the host.
    let added = unsafe { runtime.global_function("tests.adds").unwrap().call(args![&x]) };
    assert_eq!(f64::try_from(added.unwrap()).unwrap(), -2.0);

    // A closure here, called from there, with its words when it fails.
    runtime
        .register_function("tests.negated", |args| Ok(Value::Int(-i64::try_from(args[0].value())?)))
        .unwrap();
    let negated = runtime.global_function("tests.negated").unwrap();
    // SAFETY: it takes any arguments, if there is one.
    let negated = unsafe { negated.to_tvm_ffi() }.unwrap();
    assert_eq!(negated.call_tuple((5i64,)).unwrap().try_as::<i64>(), Some(-5));
    let error = negated.call_tuple((true,)).map(drop).unwrap_err().to_string();
    assert!(error.contains("not an integer"), "{error}");
    // And back again: the same function.
    // SAFETY: it is a function of here.
    let back = unsafe { Function::from_tvm_ffi(negated) }.unwrap();
    // SAFETY: it takes an integer.
    assert_eq!(i64::try_from(unsafe { back.call(args![9]) }.unwrap()).unwrap(), -9);
}

/// An exported function of a module is one there, too, and says there what it takes.
#[test]
fn functions_of_modules_are_functions_there() {
    let Some((_folder, path)) = library() else { return };
    // SAFETY: it has no initializers, and its functions check what they are given.
    let module = unsafe { Module::open(&path) }.unwrap();
    // SAFETY: as above.
    let answer = unsafe { module.function("answer").unwrap().to_tvm_ffi() }.unwrap();
    assert_eq!(answer.call_tuple(()).unwrap().try_as::<i64>(), Some(42));
    let error = answer.call_tuple((1i64,)).map(drop).unwrap_err().to_string();
    assert!(error.contains("Expected 0"), "{error}");
}
