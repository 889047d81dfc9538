//! The TVM-FFI C ABI, and nothing of FlashInfer.
//!
//! A TVM-FFI library exports each function as a C symbol `__tvm_ffi_<name>`
//! that takes an array of 16-byte tagged values ([`abi::Any`]) and stores its
//! result in another. Here are those types ([`abi`]), the functions of
//! `libtvm_ffi` itself ([`library`]), arguments packed on the stack
//! ([`Arg`], [`DlTensor`]), owned references to its objects ([`Object`]), and
//! the call with its stream and its errors ([`Function`]). A function's
//! argument lists, one for each version that has another, are declared by the
//! `kernels!` macro, which packs the arguments of the one that a library
//! says it has ([`Signature`]). Functions that this crate does not declare are
//! called by name, with arguments from [`args!`](crate::args), through
//! [`Module`](crate::Module). The other way round, functions call closures of Rust
//! that were registered by name
//! ([`FlashInferRuntime::register_function`](crate::FlashInferRuntime::register_function)).
//!
//! With the feature `tvm-ffi`, values and functions convert from and to those of TVM-FFI's own crate.
//!
//! Source of the contract: `tvm/ffi/c_api.h`, `tvm/ffi/extra/c_env_api.h` and
//! `dlpack/dlpack.h` of apache-tvm-ffi 0.1.12.

pub mod abi;
mod allocator;
mod args;
mod call;
mod callback;
mod kernel;
pub mod library;
mod object;
#[cfg(feature = "tvm-ffi")]
mod official;
mod signature;

pub(crate) use allocator::register as register_allocator;
pub use args::{Arg, DlTensor, Packed, TensorObject};
pub use call::Function;
pub use callback::Given;
pub(crate) use callback::register as register_function;
pub use kernel::{Kernel, KernelFunction};
pub(crate) use kernel::{kernels, kind};
pub use object::{Object, Value};
pub use signature::{ArgKind, Signature};
