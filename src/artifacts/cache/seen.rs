//! Which files were verified, and how a change of one is noticed.

use super::super::digest::Digest;
use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a verified file looked like, so that a change is noticed without hashing it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    sha256: Digest,
    size: u64,
    /// Times in nanoseconds: of the content, and of anything, which no program can set.
    modified: i128,
    changed: i128,
    device: u64,
    inode: u64,
}

impl Seen {
    #[cfg(unix)]
    pub(crate) fn new(sha256: Digest, metadata: &Metadata) -> Seen {
        use std::os::unix::fs::MetadataExt;
        let time = |seconds: i64, nanos: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
        Seen {
            sha256,
            size: metadata.len(),
            modified: time(metadata.mtime(), metadata.mtime_nsec()),
            changed: time(metadata.ctime(), metadata.ctime_nsec()),
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }

    #[cfg(not(unix))]
    pub(crate) fn new(sha256: Digest, metadata: &Metadata) -> Seen {
        let modified = metadata.modified().ok();
        let modified = modified.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
        let modified = modified.map_or(0, |time| time.as_nanos() as i128);
        Seen { sha256, size: metadata.len(), modified, changed: 0, device: 0, inode: 0 }
    }

    /// The text of its stamp.
    pub(crate) fn stamp(&self) -> String {
        let Seen { sha256, size, modified, changed, device, inode } = self;
        format!("{sha256} {size} {modified} {changed} {device} {inode}\n")
    }
}

/// Whether a file is a stamp of ours.
pub(crate) fn is_stamp(path: &Path) -> bool {
    let small = fs::symlink_metadata(path).is_ok_and(|found| found.is_file() && found.len() < 500);
    let text = small.then(|| fs::read_to_string(path).ok()).flatten().unwrap_or_default();
    let (digest, numbers) = text.trim_end().split_once(' ').unwrap_or_default();
    Digest::from_hex(digest).is_some() && numbers.split(' ').all(|number| number.parse::<i128>().is_ok())
}

/// The files that this process has verified.
#[derive(Debug, Default)]
pub(crate) struct Verified(Mutex<HashMap<PathBuf, Seen>>);

impl Verified {
    /// Whether a file still looks as it did then.
    pub(crate) fn contains(&self, path: &Path, seen: &Seen) -> bool {
        self.files().get(path) == Some(seen)
    }

    pub(crate) fn insert(&self, path: PathBuf, seen: Seen) {
        self.files().insert(path, seen);
    }

    pub(crate) fn remove(&self, path: &Path) {
        self.files().remove(path);
    }

    pub(crate) fn clear(&self) {
        self.files().clear();
    }

    fn files(&self) -> MutexGuard<'_, HashMap<PathBuf, Seen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
