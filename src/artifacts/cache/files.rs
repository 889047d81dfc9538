//! A folder of whole files, each known by its name and its digest: pinned wheels, and the files of a
//! program's own.
//!
//! ```text
//! <folder>/<file>             the file, published by rename
//! <folder>/<file>.verified    its stamp: digest, size, times, device and inode
//! <folder>/<file>.record      the digests of a wheel and of its RECORD; stays when the wheel goes
//! <folder>/<file>.partial     a download that is not complete
//! <folder>/<file>.pip/        where pip puts it
//! <folder>/<file>.lock        held by whoever downloads or removes it
//! ```

use super::super::digest::Digest;
use super::super::lock::{Lock, Locks, gone};
use super::super::sink::Sink;
use super::super::{ArtifactError, OnProgress, Progress};
use super::folder::{abandoned, listed, open_regular, real_folder, remove_abandoned, remove_files};
use super::seen::{Seen, Verified, is_stamp};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

const LOCK: &str = ".lock";
const STAMP: &str = ".verified";
const RECORD: &str = ".record";
const PARTIAL: &str = ".partial";
const PIP: &str = ".pip";

/// The folder.
#[derive(Debug)]
pub(crate) struct Files {
    folder: PathBuf,
    locks: Locks,
    verified: Verified,
}

impl Files {
    /// The files in `folder`, which need not exist yet.
    pub(crate) fn new(folder: PathBuf, lock_timeout: Duration) -> Files {
        let locks = Locks::new(folder.clone(), lock_timeout);
        Files { folder, locks, verified: Verified::default() }
    }

    /// The place of a file.
    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    /// Where the download of the file at `path` is while it is not complete.
    #[cfg(feature = "fetch")]
    pub(crate) fn partial_of(path: &Path) -> PathBuf {
        beside(path, PARTIAL)
    }

    /// The file of this name, if it is there: verified by its stamp, else by hashing it.
    ///
    /// # Errors
    /// [`ArtifactError::DigestMismatch`] when something else has its name, and
    /// [`ArtifactError::Cache`] when it cannot be read.
    pub(crate) fn find(
        &self,
        file: &str,
        sha256: Digest,
        on_progress: OnProgress<'_>,
    ) -> Result<Option<PathBuf>, ArtifactError> {
        real_folder(&self.folder)?;
        let path = self.path(file);
        let failed = |e| ArtifactError::cache(&path, "read", e);
        let (mut opened, metadata) = match open_regular(&path) {
            Err(e) if gone(&e) || e.kind() == io::ErrorKind::NotADirectory => return Ok(None),
            opened => opened.map_err(failed)?,
        };
        let seen = Seen::new(sha256, &metadata);
        let stamped = || fs::read_to_string(beside(&path, STAMP)).is_ok_and(|text| text == seen.stamp());
        if self.verified.contains(&path, &seen) || stamped() {
            return Ok(Some(path));
        }
        let total = metadata.len();
        let step = |done| on_progress(&Progress::Verifying { file, done, total });
        let (found, _) = Digest::of_reader(&mut opened, step).map_err(failed)?;
        if found != sha256 {
            let file = path.display().to_string();
            return Err(ArtifactError::DigestMismatch { file, expected: sha256, found });
        }
        // Whatever has changed meanwhile is hashed again the next time.
        if opened.metadata().is_ok_and(|metadata| Seen::new(sha256, &metadata) == seen) {
            self.trust(&path, seen);
        }
        Ok(Some(path))
    }

    /// Remembers a file that was hashed, here and for other processes.
    fn trust(&self, path: &Path, seen: Seen) {
        self.verified.insert(path.into(), seen);
        let write = || {
            let mut stamp = Sink::new(&beside(path, STAMP), u64::MAX)?;
            stamp.write(seen.stamp().as_bytes())?;
            stamp.publish()
        };
        // A folder that is full or read-only serves too; it is only hashed again by the next process.
        let _: Result<_, ArtifactError> = write();
    }

    /// Forgets that a file was verified: the next look-up hashes it.
    pub(crate) fn distrust(&self, path: &Path) {
        self.verified.remove(path);
        let _ = fs::remove_file(beside(path, STAMP));
    }

    /// Notes the digest of a verified wheel's RECORD, by which members are found without the wheel.
    pub(crate) fn note_record(
        &self,
        file: &str,
        sha256: Digest,
        record: Digest,
    ) -> Result<(), ArtifactError> {
        if self.noted_record(file, sha256) == Some(record) {
            return Ok(());
        }
        let mut note = Sink::new(&beside(&self.path(file), RECORD), u64::MAX)?;
        note.write(format!("{sha256} {record}\n").as_bytes())?;
        note.publish().map(drop)
    }

    /// The digest of the RECORD of the wheel with this name and digest, if it was noted.
    pub(crate) fn noted_record(&self, file: &str, sha256: Digest) -> Option<Digest> {
        let (wheel, record) = noted(&beside(&self.path(file), RECORD))?;
        (wheel == sha256).then_some(record)
    }

    /// The lock of a file; waiting for it is reported.
    #[cfg(feature = "fetch")]
    pub(crate) fn lock(&self, file: &str, on_progress: OnProgress<'_>) -> Result<Lock, ArtifactError> {
        real_folder(&self.folder)?;
        let lock = self.locks.take(&self.path(&format!("{file}{LOCK}")), file, on_progress)?;
        remove_abandoned(&self.folder);
        Ok(lock)
    }

    /// The download of a file, begun or gone on with. The file's lock is held.
    #[cfg(feature = "fetch")]
    pub(crate) fn partial(&self, file: &str, on_progress: OnProgress<'_>) -> Result<Sink, ArtifactError> {
        let to = self.path(file);
        if self.locks.lockless() {
            return Sink::new(&to, u64::MAX);
        }
        Sink::resume(Files::partial_of(&to), &to, true, |done, total| {
            on_progress(&Progress::Verifying { file, done, total });
        })
    }

    /// An empty folder for pip to bring a file to. The file's lock is held.
    #[cfg(feature = "fetch")]
    pub(crate) fn scratch(&self, file: &str) -> Result<ScratchFolder, ArtifactError> {
        let to = self.path(file);
        let path = beside(&to, PIP);
        let made = if self.locks.lockless() {
            super::super::sink::temporary(&to, |path| fs::create_dir(path)).map(|(path, ())| path)
        } else {
            // What is there was left by a process that died.
            let _ = fs::remove_dir_all(&path);
            fs::create_dir(&path).map(|()| path.clone())
        };
        made.map(ScratchFolder).map_err(|e| ArtifactError::cache(&path, "create the folder", e))
    }

    /// Publishes what is complete, if it has the file's digest; anything else is removed.
    #[cfg(feature = "fetch")]
    pub(crate) fn adopt(&self, file: &str, sha256: Digest, complete: Sink) -> Result<PathBuf, ArtifactError> {
        let path = self.path(file);
        let metadata = complete.publish()?;
        self.trust(&path, Seen::new(sha256, &metadata));
        Ok(path)
    }

    /// Removes the files that no process is writing and `keep` does not want, with all that belongs
    /// to them, and returns the bytes freed. Only what is known to be ours is removed: what `known`,
    /// a lock or a stamp names.
    ///
    /// # Errors
    /// [`ArtifactError::Cache`] when something cannot be removed.
    pub(crate) fn clean(
        &self,
        known: BTreeSet<String>,
        keep: impl Fn(&str) -> bool,
        on_progress: OnProgress<'_>,
    ) -> Result<u64, ArtifactError> {
        real_folder(&self.folder)?;
        let (mut names, mut found) = (known, BTreeSet::new());
        for (name, _) in listed(&self.folder)? {
            let path = self.path(&name);
            if let Some(file) = name.strip_suffix(LOCK).filter(|_| Lock::is_ours(&path)) {
                names.insert(file.into());
            }
            if let Some(file) = name.strip_suffix(STAMP).filter(|_| is_stamp(&path)) {
                names.insert(file.into());
            }
            if name.ends_with(RECORD) && noted(&path).is_some() {
                names.insert(name.clone());
            }
            found.insert(name);
        }
        let mut freed = 0;
        for file in names.into_iter().filter(|file| !keep(file)) {
            let place = |end: &str| self.path(&format!("{file}{end}"));
            if ["", STAMP, PARTIAL, PIP, LOCK].iter().all(|end| !found.contains(&format!("{file}{end}"))) {
                continue;
            }
            let Some(lock) = self.locks.try_take(&place(LOCK), on_progress)? else { continue };
            freed += remove_files(&self.folder, |name, metadata| {
                let unfinished = lock.refused().is_none() || abandoned(metadata);
                name.strip_prefix(&file).is_some_and(|end| match end {
                    "" | STAMP => true,
                    PARTIAL => unfinished,
                    _ => false,
                })
            })?;
            if lock.refused().is_none() {
                let _ = fs::remove_dir_all(place(PIP));
            }
            lock.remove();
        }
        remove_abandoned(&self.folder);
        let _ = fs::remove_dir(&self.folder);
        self.verified.clear();
        Ok(freed)
    }
}

/// A folder that is removed with its content.
#[cfg(feature = "fetch")]
pub(crate) struct ScratchFolder(PathBuf);

#[cfg(feature = "fetch")]
impl ScratchFolder {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

#[cfg(feature = "fetch")]
impl Drop for ScratchFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The digests of a wheel and of its RECORD in a note of ours.
fn noted(path: &Path) -> Option<(Digest, Digest)> {
    let small = fs::symlink_metadata(path).is_ok_and(|found| found.is_file() && found.len() < 500);
    let text = small.then(|| fs::read_to_string(path).ok())??;
    let (wheel, record) = text.trim_end().split_once(' ')?;
    Some((Digest::from_hex(wheel)?, Digest::from_hex(record)?))
}

/// A path with `end` behind its name.
fn beside(wheel: &Path, end: &str) -> PathBuf {
    let mut name = wheel.as_os_str().to_owned();
    name.push(end);
    name.into()
}
