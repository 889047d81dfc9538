//! Locks between processes, which are also what says that a place in the cache is ours.
//!
//! A lock is an economy: with it, one process downloads and the others wait. Safety does not rest
//! on it, because everything is published by rename. So where the file system has no locks, work
//! goes on without; then no process can tell what another one is writing, and each writes under
//! names of its own.

use super::{ArtifactError, OnProgress, Progress};
use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What a lock's file holds.
const MARK: &[u8] = b"flashinfer-rs\n";

/// A lock on a file next to what it protects. Dropping it releases it, as does the death of the
/// process.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
    path: PathBuf,
    refused: Option<io::Error>,
}

impl Lock {
    /// Waits for the lock, whose folder is made if it does not exist; `waiting` is called about once
    /// a second.
    pub(crate) fn take(
        path: &Path,
        timeout: Duration,
        waiting: &dyn Fn(Duration),
    ) -> Result<Lock, ArtifactError> {
        let start = Instant::now();
        let mut pause = Duration::from_millis(1);
        let mut next_report = Duration::ZERO;
        loop {
            let waited = start.elapsed();
            match make_folder(path).and_then(|()| Lock::try_take(path)) {
                Ok(Some(lock)) => return Ok(lock),
                Ok(None) => {}
                // A clean-up removed the folder in between.
                Err(ArtifactError::Cache { source, .. })
                    if gone(&source) && waited < Duration::from_secs(2) => {}
                Err(e) => return Err(e),
            }
            if waited >= timeout {
                return Err(ArtifactError::Locked { path: path.into(), waited });
            }
            if waited >= next_report {
                waiting(waited);
                next_report = waited + Duration::from_secs(1);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }

    /// The lock, unless someone holds it.
    pub(crate) fn try_take(path: &Path) -> Result<Option<Lock>, ArtifactError> {
        let failed = |e| ArtifactError::cache(path, "lock", e);
        if fs::symlink_metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
            let why = io::Error::new(io::ErrorKind::AlreadyExists, "it is not a regular file");
            return Err(failed(why));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(path).map_err(failed)?;
        let refused = match file.try_lock() {
            Ok(()) => None,
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Interrupted => return Ok(None),
            Err(TryLockError::Error(e)) => Some(e),
        };
        // Its last holder may have removed it: then the name no longer protects anything.
        let held = file.metadata().map_err(failed)?;
        if !fs::symlink_metadata(path).is_ok_and(|named| same_file(&named, &held)) {
            return Ok(None);
        }
        if held.len() == 0 && (&file).write_all(MARK).is_err() {
            // The disk is full. Without a mark, cleaning leaves alone what is here.
            let _ = file.set_len(0);
        }
        Ok(Some(Lock { file, path: path.into(), refused }))
    }

    /// Whether there is a lock's file that this crate wrote.
    pub(crate) fn is_ours(path: &Path) -> bool {
        let size = MARK.len() as u64;
        let may_be = fs::symlink_metadata(path).is_ok_and(|found| found.is_file() && found.len() == size);
        may_be && fs::read(path).is_ok_and(|found| found == MARK)
    }

    /// Why the file system gives no locks, if so: then others may be writing here, too.
    pub(crate) fn refused(&self) -> Option<&io::Error> {
        self.refused.as_ref()
    }

    /// Removes the lock's file, which nobody else holds, and its folder, if it is empty then.
    pub(crate) fn remove(self) {
        if self.refused.is_none() {
            let _ = fs::remove_file(&self.path);
            let _ = self.path.parent().map(fs::remove_dir);
        }
        drop(self.file);
    }
}

/// The locks in a folder and in those below it.
#[derive(Debug)]
pub(crate) struct Locks {
    folder: PathBuf,
    timeout: Duration,
    /// Whether the file system was found to have none.
    lockless: AtomicBool,
}

impl Locks {
    /// Those in `folder`, each waited for no longer than `timeout`.
    pub(crate) fn new(folder: PathBuf, timeout: Duration) -> Locks {
        Locks { folder, timeout, lockless: AtomicBool::new(false) }
    }

    /// Whether a lock was taken of which the file system knows nothing.
    #[cfg(feature = "fetch")]
    pub(crate) fn lockless(&self) -> bool {
        self.lockless.load(Ordering::Relaxed)
    }

    /// Waits for the lock of what is called `file`; waiting for it is reported.
    pub(crate) fn take(
        &self,
        path: &Path,
        file: &str,
        on_progress: OnProgress<'_>,
    ) -> Result<Lock, ArtifactError> {
        let waiting = |waited| on_progress(&Progress::Waiting { file, waited });
        let lock = Lock::take(path, self.timeout, &waiting)?;
        self.note(&lock, on_progress);
        Ok(lock)
    }

    /// The lock for a clean-up, unless it is held or its folder is gone.
    pub(crate) fn try_take(
        &self,
        path: &Path,
        on_progress: OnProgress<'_>,
    ) -> Result<Option<Lock>, ArtifactError> {
        match Lock::try_take(path) {
            Err(ArtifactError::Cache { source, .. }) if gone(&source) => Ok(None),
            taken => Ok(taken?.inspect(|lock| self.note(lock, on_progress))),
        }
    }

    /// Tells, once in a process, that the file system has no locks.
    fn note(&self, lock: &Lock, on_progress: OnProgress<'_>) {
        static REPORTED: AtomicBool = AtomicBool::new(false);
        let Some(reason) = lock.refused() else { return };
        self.lockless.store(true, Ordering::Relaxed);
        if !REPORTED.swap(true, Ordering::Relaxed) {
            on_progress(&Progress::Lockless { folder: &self.folder, reason: &reason.to_string() });
        }
    }
}

/// Whether something was removed meanwhile, on this machine or by another one.
pub(crate) fn gone(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::StaleNetworkFileHandle)
}

fn make_folder(path: &Path) -> Result<(), ArtifactError> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder).map_err(|e| ArtifactError::cache(folder, "create the folder", e))
}

#[cfg(unix)]
fn same_file(a: &Metadata, b: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

#[cfg(not(unix))]
fn same_file(_: &Metadata, _: &Metadata) -> bool {
    true
}
