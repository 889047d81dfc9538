//! Where kernels come from.
//!
//! A kernel module is a shared library inside a *wheel*. The crate *pins* wheels by their
//! SHA-256: FlashInfer's module cache, `libtvm_ffi` and the CUDA runtime; and cuBLAS, which only
//! some modules need. A program pins further ones itself ([`Pins::extend`]). A [`Store`] finds a
//! [`Member`] of them in the first source that holds it and puts a verified copy into the cache,
//! ready to be opened:
//!
//! 1. wheels named in the configuration, 2. wheels named by `FLASHINFER_RS_WHEELS`, 3. the
//!    *bundle* embedded at build time, 4. the pinned wheel in the cache, or members of it, 5. a
//!    download.
//!
//! Nothing is trusted by its name or by its mere presence. A member is compared with the digest
//! in its wheel's `RECORD`, a pinned wheel with its pin, and a file in the cache with the digest
//! of the source it came from. Where a pin also states the digest of its wheel's `RECORD`, the
//! download brings only the members that are needed, if the server answers ranges.
//!
//! | file | its job |
//! |---|---|
//! | `member` | which file of which package is wanted |
//! | `pins` | the pin table and the choice of a row |
//! | `version` | versions of FlashInfer |
//! | `architecture` | architectures of GPUs, and which code runs where |
//! | `kernels` | what a wheel says of its modules: version, architecture, provider or shim |
//! | `wheel`, `record` | members of a wheel, and their digests in its `RECORD` |
//! | `sink` | the pump to disk: hashed, written, published by rename |
//! | `lock` | locks between processes |
//! | `cache` | files on disk: their places, verification, stamps, cleaning |
//! | `blobs` | files of a program's own |
//! | `bundle` | members embedded in the program |
//! | `config` | where a store looks, and what it may do |
//! | `progress` | what a long operation is doing |
//! | `store` | the sources, in order, and the first that holds a member |
//! | `source` | where a member came from |
//! | `user_wheels` | the wheels that the user named |
//! | `pinned` | the pinned wheels: whole or by member, in the cache and from the network |
//! | `release` | wheels of releases that nobody has pinned yet |
//! | `report` | what each source holds |
//! | `origin` | how a pinned wheel is reached: its address, an index, pip |
//! | `settings` | the package indexes that the machine's settings name |
//! | `pages` | pages of an index |
//! | `pip` | pip |
//! | `download` | downloads: streamed, resumed, hashed while they flow |
//! | `remote` | members of a wheel on a server, by HTTP ranges |
//! | `http` | requests: addresses, proxies, bounds in time |
//! | `program` | programs of the machine, never of the working folder |
//! | `redact` | texts without the secrets in them |
//! | `embed` | what the build script embeds, and when it may download |
//! | `fuzzing` | what `fuzz/` tries with bytes of any kind |
//!
//! The build script compiles these same files.

mod architecture;
#[cfg(feature = "fetch")]
mod blobs;
mod bundle;
mod cache;
mod chosen;
mod config;
mod digest;
#[cfg(feature = "fetch")]
mod download;
#[doc(hidden)]
pub mod embed;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
#[cfg(feature = "fetch")]
mod http;
mod kernels;
mod lock;
mod member;
#[cfg(feature = "fetch")]
mod origin;
#[cfg(feature = "fetch")]
mod pages;
mod pinned;
mod pins;
#[cfg(feature = "fetch")]
mod pip;
mod program;
mod progress;
mod record;
mod redact;
#[cfg(feature = "fetch")]
mod release;
#[cfg(feature = "fetch")]
mod remote;
mod report;
#[cfg(feature = "fetch")]
mod settings;
mod sink;
mod source;
mod store;
mod user_wheels;
mod version;
mod wheel;

pub use architecture::CudaArchitecture;
#[cfg(feature = "fetch")]
pub use blobs::{Blob, BlobState, BlobStore, Page, read_page};
pub use bundle::BundledMember;
pub use config::{Fetch, FetchOptions, GpusFn, StoreConfig};
pub use digest::Digest;
pub use error::{ArtifactError, SearchedSource};
#[cfg(feature = "fetch")]
pub use http::Address;
pub use member::{Member, Package};
pub use pins::{CudaKey, Origin, Pin, Pins};
pub(crate) use progress::OnProgress;
pub use progress::{Progress, ProgressFn};
#[cfg(feature = "fetch")]
pub use release::Release;
pub use report::SourceReport;
pub use source::{Located, Source};
pub use store::Store;
pub use version::FlashInferVersion;
pub use wheel::Wheel;
