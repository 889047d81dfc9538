//! The few calls of the CUDA runtime that the crate makes itself, and what it owns of CUDA's.
//!
//! The kernel modules link against `libcudart.so.13`, so that library is in the process anyway; its
//! functions are looked up once, when the runtime starts.
//!
//! | file | its job |
//! |---|---|
//! | `symbols` | the functions of the library, their types and constants |
//! | `runtime` | devices, errors, work that is enqueued |
//! | `graph` | a stream's capture, and the graph that it gives |
//! | `ptx` | kernels of this crate |
//! | `buffer` | device memory |
//! | `beside` | on which stream a thread's uploads are made |
//! | `staging` | page-locked memory, and uploads out of it |

mod beside;
mod buffer;
mod graph;
mod ptx;
mod runtime;
mod staging;
mod symbols;

pub(crate) use beside::{upload_beside, upload_stream};
pub(crate) use buffer::DeviceBuffer;
pub(crate) use graph::{Capture, Graph};
pub(crate) use ptx::{Launch, PtxKernel};
pub(crate) use runtime::{CudaRuntime, DeviceAttribute};
pub(crate) use staging::{StagingBuffer, upload};
