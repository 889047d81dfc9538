//! Files on disk: who may write them, and when they may be trusted.
//!
//! ```text
//! <cache>/<artifact hash>/<name>/<file>       a member, published by rename
//! <cache>/<artifact hash>/<name>/.lock        held by whoever writes in that folder
//! <cache>/<artifact hash>/record/RECORD       the wheel's list, where members come one by one
//! <cache>/wheels/                             pinned wheels; see `files`
//! ```
//!
//! Invariants. A file is returned only after its SHA-256 was found right, in this process or, for
//! a whole wheel, as its stamp tells. A file is written under another name in the same folder,
//! synced, and renamed, so that no reader sees half of it. What a killed process leaves has a
//! name that nobody trusts; the next holder of the lock removes it. Reading needs neither the
//! lock nor the right to write. Symbolic links are neither trusted nor written through. Only what
//! a pin, a stamp or the file of a lock shows to be ours is ever removed.
//!
//! Beside a wheel, or where it was, lies what the digest of its RECORD is, if members are to be found
//! without it: noted by whoever had the verified wheel, as a stamp is.
//!
//! A stamp says that a file is the one that was hashed, as far as the system tells: who writes to
//! the cache without its notice, or writes stamps, is believed. So a cache must belong to whoever
//! uses it, and members of a wheel whose RECORD is pinned are compared with that besides.

mod files;
mod folder;
mod seen;

pub(crate) use files::Files;

use super::digest::Digest;
use super::lock::{Lock, Locks};
use super::record::{ARTIFACT_HASH_LEN, MAX_RECORD, artifact_hash};
use super::sink::{self, Sink};
use super::{ArtifactError, Member, OnProgress};
use folder::{abandoned, entries, listed, open_regular, real_folder, remove_files};
use seen::{Seen, Verified};
use std::collections::BTreeSet;
use std::fs::{self, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

const LOCK: &str = ".lock";
const WHEELS: &str = "wheels";
/// Folder and name of a wheel's RECORD.
const RECORD: (&str, &str) = ("record", "RECORD");
/// The folder of the store.
#[derive(Debug)]
pub(crate) struct Cache {
    root: PathBuf,
    locks: Locks,
    verified: Verified,
    wheels: Files,
}

impl Cache {
    /// The cache in the folder `root`, which need not exist yet.
    pub(crate) fn new(root: PathBuf, lock_timeout: Duration) -> Cache {
        let wheels = Files::new(root.join(WHEELS), lock_timeout);
        Cache { locks: Locks::new(root.clone(), lock_timeout), verified: Verified::default(), wheels, root }
    }

    /// The folder.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The whole wheels.
    pub(crate) fn wheels(&self) -> &Files {
        &self.wheels
    }

    /// A verified copy of a member: the one that exists, or a new one from `fill`.
    ///
    /// # Errors
    /// [`ArtifactError::DigestMismatch`] and [`ArtifactError::BadWheel`] when `fill` yields
    /// something else than `sha256` promises (named `what`), and [`ArtifactError::Cache`].
    pub(crate) fn publish(
        &self,
        at: (&str, &str, &str),
        (sha256, size): (Digest, u64),
        what: &dyn Fn() -> String,
        fill: &mut dyn FnMut(&mut Sink) -> Result<(), ArtifactError>,
        on_progress: OnProgress<'_>,
    ) -> Result<PathBuf, ArtifactError> {
        let (folder, path) = self.place(at)?;
        if self.good(&path, sha256, size) {
            return Ok(path);
        }
        let lock = self.locks.take(&folder.join(LOCK), at.2, on_progress)?;
        if self.good(&path, sha256, size) {
            return Ok(path);
        }
        let _ = remove_files(&folder, |name, metadata| {
            sink::is_temporary(name) && (lock.refused().is_none() || abandoned(metadata))
        });
        let mut sink = Sink::new(&path, size)?;
        fill(&mut sink)?;
        let found = sink.digest();
        if found != sha256 {
            return Err(ArtifactError::DigestMismatch { file: what(), expected: sha256, found });
        }
        let metadata = sink.publish()?;
        self.verified.insert(path.clone(), Seen::new(sha256, &metadata));
        Ok(path)
    }

    /// The verified copy of a member that exists, if one does.
    pub(crate) fn held(
        &self,
        at: (&str, &str, &str),
        (sha256, size): (Digest, u64),
    ) -> Result<Option<PathBuf>, ArtifactError> {
        let (_, path) = self.place(at)?;
        Ok(self.good(&path, sha256, size).then_some(path))
    }

    /// Whether a file of this size has a member's place. Its content is not looked at.
    pub(crate) fn seems_held(&self, (artifact_hash, name, file): (&str, &str, &str), size: u64) -> bool {
        let path = self.root.join(artifact_hash).join(name).join(file);
        fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.len() == size)
    }

    /// A pinned RECORD, if it is in the cache and has its digest.
    pub(crate) fn record(&self, sha256: Digest) -> Result<Option<(PathBuf, Vec<u8>)>, ArtifactError> {
        let (_, path) = self.place((&artifact_hash(sha256), RECORD.0, RECORD.1))?;
        let small = |metadata: &Metadata| metadata.is_file() && metadata.len() <= MAX_RECORD;
        if !fs::symlink_metadata(&path).is_ok_and(|metadata| small(&metadata)) {
            return Ok(None);
        }
        let bytes = fs::read(&path).ok().filter(|bytes| Digest::of(bytes) == sha256);
        Ok(bytes.map(|bytes| (path, bytes)))
    }

    /// Puts a RECORD that has its digest into the cache.
    pub(crate) fn publish_record(
        &self,
        sha256: Digest,
        record: &[u8],
        on_progress: OnProgress<'_>,
    ) -> Result<PathBuf, ArtifactError> {
        let at = (&*artifact_hash(sha256), RECORD.0, RECORD.1);
        let promised = (sha256, record.len() as u64);
        self.publish(at, promised, &|| RECORD.1.into(), &mut |sink| sink.write(record), on_progress)
    }

    /// A member's folder and path. Symbolic links are refused.
    fn place(
        &self,
        (artifact_hash, name, file): (&str, &str, &str),
    ) -> Result<(PathBuf, PathBuf), ArtifactError> {
        let outer = self.root.join(artifact_hash);
        let folder = outer.join(name);
        real_folder(&outer)?;
        real_folder(&folder)?;
        let path = folder.join(file);
        Ok((folder, path))
    }

    /// Whether a regular file with this content is there. It is hashed once per process, and
    /// again after a change.
    fn good(&self, path: &Path, sha256: Digest, size: u64) -> bool {
        let Ok((file, metadata)) = open_regular(path) else {
            return false;
        };
        if metadata.len() != size {
            return false;
        }
        let seen = Seen::new(sha256, &metadata);
        if self.verified.contains(path, &seen) {
            return true;
        }
        let good = Digest::of_file(&file).is_ok_and(|found| found == (sha256, size));
        if good {
            self.verified.insert(path.into(), seen);
        }
        good
    }

    /// The files in the cache and their bytes; those of locks hold nothing.
    ///
    /// # Errors
    /// Those of reading folders. A folder that does not exist has none, and neither has one that
    /// is removed meanwhile.
    pub(crate) fn files(&self) -> io::Result<Vec<(PathBuf, u64)>> {
        let (mut found, mut folders) = (Vec::new(), vec![self.root.clone()]);
        while let Some(folder) = folders.pop() {
            for (name, metadata) in entries(&folder)? {
                let path = folder.join(&name);
                if metadata.is_dir() {
                    folders.push(path);
                } else if !(name.to_string_lossy().ends_with(LOCK) && Lock::is_ours(&path)) {
                    found.push((path, metadata.len()));
                }
            }
        }
        found.sort();
        Ok(found)
    }

    /// Removes the members and wheels that no process is writing, and returns the bytes freed.
    /// Only what this crate wrote is removed: what has the place of a member in a folder with a
    /// lock of ours, and wheels that `pinned`, a lock or a stamp names. So a folder that is shared
    /// with other files is safe.
    ///
    /// # Errors
    /// [`ArtifactError::Cache`] when something cannot be removed.
    pub(crate) fn clean(
        &self,
        pinned: BTreeSet<String>,
        on_progress: OnProgress<'_>,
    ) -> Result<u64, ArtifactError> {
        let mut freed = 0;
        for (name, metadata) in listed(&self.root)? {
            let folder = self.root.join(&name);
            if metadata.is_dir() && is_artifact_hash(&name) {
                for (member, metadata) in listed(&folder)? {
                    if metadata.is_dir() {
                        freed += self.clean_members(&folder, &member, on_progress)?;
                    }
                }
            } else if metadata.is_dir() && name == WHEELS {
                freed += self.wheels.clean(pinned.clone(), |_| false, on_progress)?;
            }
        }
        self.verified.clear();
        Ok(freed)
    }

    /// Removes what [`Cache::clean`] would remove of one folder of members and of one wheel.
    pub(crate) fn remove(
        &self,
        member: &str,
        wheel: &str,
        on_progress: OnProgress<'_>,
    ) -> Result<u64, ArtifactError> {
        let mut freed = 0;
        for (name, metadata) in listed(&self.root)? {
            let folder = self.root.join(&name);
            if metadata.is_dir() && is_artifact_hash(&name) && folder.join(member).is_dir() {
                freed += self.clean_members(&folder, member, on_progress)?;
            }
        }
        freed += self.wheels.clean([wheel.into()].into(), |file| file != wheel, on_progress)?;
        self.verified.clear();
        Ok(freed)
    }

    fn clean_members(
        &self,
        outer: &Path,
        name: &str,
        on_progress: OnProgress<'_>,
    ) -> Result<u64, ArtifactError> {
        let folder = outer.join(name);
        if !Lock::is_ours(&folder.join(LOCK)) {
            return Ok(0);
        }
        let Some(lock) = self.locks.try_take(&folder.join(LOCK), on_progress)? else { return Ok(0) };
        let freed = remove_files(&folder, |file, metadata| {
            Member::may_be_at(name, file)
                || (name, file) == RECORD
                || sink::is_temporary(file) && (lock.refused().is_none() || abandoned(metadata))
        })?;
        lock.remove();
        let _ = fs::remove_dir(outer);
        Ok(freed)
    }
}

fn is_artifact_hash(name: &str) -> bool {
    name.len() == ARTIFACT_HASH_LEN && name.bytes().all(|c| c.is_ascii_hexdigit())
}
