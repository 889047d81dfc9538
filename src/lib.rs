//! FlashInfer's prebuilt GPU kernels for Rust: no Python, no C++ shim, no nvcc.
//!
//! FlashInfer publishes its kernels compiled, as shared libraries in a wheel,
//! one library (a *module*) for each combination of element types, head
//! dimensions and options. This crate calls them directly, in four steps, each
//! of which knows only the ones before it:
//!
//! 1. **Wheels.** `Cargo.toml` pins the wheels by SHA-256. They come from your
//!    disk, from the program itself (embedded at build time), from the cache,
//!    or from the network.
//! 2. **Store.** A module is taken out of its wheel once, verified, and kept in
//!    the cache; see [`artifacts`].
//! 3. **Runtime.** `libcudart`, `libtvm_ffi` and the modules are opened with
//!    `dlopen`, each once per process; see [`FlashInferRuntime`]. [`ffi`] speaks
//!    the TVM-FFI ABI of their functions.
//! 4. **Operations.** Those of a transformer layer ([`norm`], [`rope`], [`page`], [`attention`],
//!    [`activation`], [`gemm`]) and of choosing the next token ([`sampling`]) take borrowed views
//!    of tensors ([`TensorRef`], [`TensorMut`]) on a [`Stream`], check what the
//!    kernels do not, and enqueue. [`reference`](mod@reference) does the same on
//!    the CPU. [`kv`] keeps the pages that attention reads, and explains the index
//!    arrays ([`PageTable`] and its like). What has no operation
//!    here, in FlashInfer's modules or in a library of your own, a [`Module`]
//!    calls by name. [`graph`] captures a step of operations, to be launched again and again.
//!
//! # Paged batch decode
//!
//! Planning and running are separate: a plan is made once for a batch, on the
//! host, and run once for each layer. A run allocates nothing and waits for
//! nothing.
//!
//! ```no_run
//! # #[cfg(feature = "cudarc")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use flashinfer_rs::{
//!     DType, PageIndices, PageTable, Stream,
//!     attention::{AttentionSpec, BatchDecode, Heads, PlanOptions, Workspace},
//!     gpu::Tensor,
//!     kv::{KvLayout, PagedKv},
//! };
//! use half::f16;
//!
//! let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
//! let decode = BatchDecode::new(&stream, &AttentionSpec::new(DType::F16, 128), Heads::new(32, 8))?;
//!
//! // A KV cache of 8 pages of 16 tokens; a query and an output for each of two requests.
//! let k = Tensor::<f16>::zeros(&stream, &[8, 16, 8, 128])?;
//! let v = Tensor::<f16>::zeros(&stream, &[8, 16, 8, 128])?;
//! let q = Tensor::<f16>::zeros(&stream, &[2, 32, 128])?;
//! let mut out = Tensor::<f16>::zeros(&stream, &[2, 32, 128])?;
//!
//! // The requests have 50 and 17 tokens, in these pages.
//! let requests = [(&[3, 0, 5, 1][..], 50), (&[7, 2][..], 17)];
//! let table = PageTable::new(&stream, PageIndices::from_requests(8, 16, requests)?)?;
//! let mut workspace = Workspace::new(&stream)?;
//! let plan = decode.plan(&mut workspace, &table, &PlanOptions::default())?;
//!
//! // For each layer:
//! plan.run(&q.view(), &PagedKv::new(k.view(), v.view(), KvLayout::Nhd), &mut out.view_mut())?;
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "cudarc"))]
//! # fn main() {}
//! ```
//!
//! # Features
//!
//! | feature | default | what it adds |
//! |---|---|---|
//! | `embed` | yes | modules embedded at build time; implies `fetch` |
//! | `fetch` | yes | downloads of the pinned wheels |
//! | `cudarc` | yes | [tensors of a GPU](gpu), views of cudarc's slices, and its streams |
//! | `candle` | no | [the same for candle's tensors](candle), on the CPU through the reference |
//! | `candle-cuda` | no | `candle` for CUDA tensors; candle's own kernels need nvcc to build |
//! | `tvm-ffi` | no | values and functions from and to those of the crate `tvm-ffi`, whose build needs `tvm-ffi-config` of the Python package `apache-tvm-ffi`, and which links `libtvm_ffi` |
//! | `progress` | no | [the progress of downloads](progress) on a terminal |
//! | `doctor` | no | the program `flashinfer-doctor`, which tells what a machine lacks |
//!
//! # Platforms
//!
//! Kernels exist for Linux on x86_64 and aarch64. Elsewhere the crate builds, what runs on the CPU
//! works ([`reference`](mod@reference), [`kv`]), and starting the runtime is an error that says so.
//!
//! # Safety
//!
//! The kernels check little, so a safe function here checks whatever it must,
//! or its types rule the mistake out. `docs/soundness.md` in the repository
//! goes through what each kernel takes on trust, `docs/modules-and-cache.md` has the order of
//! sources and every environment variable, the README the requirements.

pub mod artifacts;
#[cfg(feature = "candle")]
pub mod candle;
mod capture;
mod cublas;
mod cuda;
mod cuda_library;
mod device;
mod dtype;
mod error;
pub mod ffi;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(feature = "cudarc")]
pub mod gpu;
pub mod graph;
pub mod indices;
pub mod kv;
mod library_file;
mod loader;
mod module;
mod once_table;
mod ops;
#[cfg(feature = "progress")]
pub mod progress;
pub mod reference;
mod runtime;
mod stream;
mod sync;
mod tensor;
pub mod uploads;

pub use cuda_library::{CudaLibrary, LibrarySource};
pub use device::Device;
pub use dtype::{DType, Element};
pub use error::{FlashInferError, Result};
pub use indices::{PageIndices, PageTable};
pub use module::{Module, ModuleName};
pub use ops::*;
pub use runtime::{FlashInferRuntime, RuntimeConfig};
pub use stream::Stream;
pub use tensor::{MAX_RANK, TensorMut, TensorRef};

/// The example of `docs/attention.md`.
#[cfg(doctest)]
#[doc = include_str!("../docs/attention.md")]
struct AttentionExamples;

/// The compile-fail examples of `docs/soundness.md`.
#[cfg(doctest)]
#[doc = include_str!("../docs/soundness.md")]
struct SoundnessExamples;
