//! The pump: what is read is hashed and written, and what is published is what was hashed.
//!
//! Every file that this crate puts on disk goes through a [`Sink`], whatever it comes from: a
//! download, a member of a wheel, the bundle, pip, a stamp. A sink writes where its hash ends and
//! nowhere else. After an error of the disk the file is cut back to what was hashed, or removed;
//! nothing goes on as if the error had not been. It is published synced, by rename, and only when
//! it has as many bytes as were hashed.

use super::ArtifactError;
use super::digest::{Digest, Hasher, pump};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// How a name starts that nobody trusts: of a file that may be half written.
const TEMPORARY: &str = ".tmp-flashinfer-rs-";

/// A file on its way to its place.
#[derive(Debug)]
pub(crate) struct Sink {
    file: File,
    path: PathBuf,
    to: PathBuf,
    hasher: Hasher,
    /// It never gets more bytes.
    limit: u64,
    /// Whether a later process may go on with it; if not, dropping the sink removes it.
    kept: bool,
    /// Whether its first bytes were there before.
    #[cfg_attr(not(feature = "fetch"), expect(dead_code, reason = "only downloads go on"))]
    inherited: bool,
}

impl Sink {
    /// A new file beside `to`, of at most `limit` bytes.
    pub(crate) fn new(to: &Path, limit: u64) -> Result<Sink, ArtifactError> {
        let failed = |e| ArtifactError::cache(to, "create", e);
        let path = temporary(to, |path| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create_new(true).open(path)
        });
        let (path, file) = path.map_err(failed)?;
        let (hasher, to) = (Hasher::default(), to.into());
        Ok(Sink { file, path, to, hasher, limit, kept: false, inherited: false })
    }

    /// The file at `path`, with what it holds, for the place `to`. Where it is `kept`, it need not
    /// exist, and stays, unless empty, for the next attempt. `step` is called with the bytes hashed and
    /// of their sum.
    #[cfg(feature = "fetch")]
    pub(crate) fn resume(
        path: PathBuf,
        to: &Path,
        kept: bool,
        step: impl Fn(u64, u64),
    ) -> Result<Sink, ArtifactError> {
        if fs::symlink_metadata(&path).is_ok_and(|metadata| !metadata.is_file()) {
            let removed = fs::remove_file(&path);
            removed.map_err(|e| ArtifactError::cache(&path, "remove", e))?;
        }
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(kept).truncate(false).open(&path);
        let mut file = file.map_err(|e| ArtifactError::cache(&path, "open", e))?;
        let unreadable = |e| ArtifactError::cache(&path, "read", e);
        let total = file.metadata().map_err(unreadable)?.len();
        let mut hasher = Hasher::default();
        pump(&mut file, unreadable, |bytes| {
            hasher.update(bytes);
            step(hasher.len(), total);
            Ok(())
        })?;
        let inherited = hasher.len() > 0;
        Ok(Sink { file, path, to: to.into(), hasher, limit: u64::MAX, kept, inherited })
    }

    /// The bytes that are hashed and written.
    pub(crate) fn len(&self) -> u64 {
        self.hasher.len()
    }

    /// Their digest.
    pub(crate) fn digest(&self) -> Digest {
        self.hasher.digest()
    }

    /// Whether some of them were there before.
    #[cfg(feature = "fetch")]
    pub(crate) fn inherited(&self) -> bool {
        self.inherited
    }

    /// Takes all that `reader` yields.
    pub(crate) fn fill(
        &mut self,
        reader: &mut (impl Read + ?Sized),
        unreadable: impl Fn(io::Error) -> ArtifactError,
    ) -> Result<(), ArtifactError> {
        pump(reader, unreadable, |bytes| self.write(bytes))
    }

    /// Takes the next bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), ArtifactError> {
        let at = self.len();
        if self.limit - at < bytes.len() as u64 {
            let reason = format!("it yields more than the {} bytes it states", self.limit);
            return Err(ArtifactError::wheel(&self.to, reason));
        }
        let place = self.file.seek(SeekFrom::Start(at));
        if let Err(e) = place.and_then(|_| self.file.write_all(bytes)) {
            // Some of them may have come to disk.
            if self.file.set_len(at).is_err() {
                self.kept = false;
            }
            return Err(ArtifactError::cache(&self.to, "write", e));
        }
        self.hasher.update(bytes);
        Ok(())
    }

    /// Forgets what is there.
    #[cfg(feature = "fetch")]
    pub(crate) fn restart(&mut self) -> Result<(), ArtifactError> {
        if self.len() == 0 {
            return Ok(());
        }
        (self.hasher, self.inherited) = (Hasher::default(), false);
        self.file.set_len(0).map_err(|e| {
            self.kept = false;
            ArtifactError::cache(&self.to, "truncate", e)
        })
    }

    /// Puts the file in its place; returns what it looks like there.
    pub(crate) fn publish(mut self) -> Result<Metadata, ArtifactError> {
        let to = self.to.clone();
        let failed = |e| ArtifactError::cache(&to, "publish", e);
        // What a disk keeps after it failed to sync is unknown, also to a later sync.
        let kept = std::mem::take(&mut self.kept);
        match self.file.sync_all() {
            // The file system has no such thing.
            Err(e) if matches!(e.kind(), io::ErrorKind::Unsupported | io::ErrorKind::InvalidInput) => {}
            synced => synced.map_err(failed)?,
        }
        let (found, hashed) = (self.file.metadata().map_err(failed)?.len(), self.len());
        if found != hashed {
            let why = format!("{found} bytes are on disk, and {hashed} were hashed");
            return Err(failed(io::Error::other(why)));
        }
        self.kept = kept;
        fs::rename(&self.path, &to).map_err(failed)?;
        self.kept = true;
        // Without it, a failure of power may take the name; what it names stays what was hashed.
        let _ = to.parent().map(|folder| File::open(folder).and_then(|folder| folder.sync_all()));
        self.file.metadata().map_err(failed)
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        if !self.kept || self.len() == 0 {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// What `make` makes beside `to`, under a name that nobody trusts and nobody has.
pub(crate) fn temporary<T>(to: &Path, make: impl Fn(&Path) -> io::Result<T>) -> io::Result<(PathBuf, T)> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    loop {
        let counter = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = to.with_file_name(format!("{TEMPORARY}{}-{counter}", std::process::id()));
        match make(&path) {
            // Left by a process of the same number, which may be on another machine.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made.map(|made| (path, made)),
        }
    }
}

/// Whether [`temporary`] makes such names.
pub(crate) fn is_temporary(name: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
    let numbers = name.strip_prefix(TEMPORARY).and_then(|numbers| numbers.split_once('-'));
    numbers.is_some_and(|(process, counter)| number(process) && number(counter))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temporaries_are_known_by_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let sink = Sink::new(&folder.path().join("norm.so"), 9).unwrap();
        let name = sink.path.file_name().unwrap().to_str().unwrap();
        assert!(sink.path.is_file() && is_temporary(name), "{name}");
        for name in [".tmp-1-1", ".tmp-flashinfer-rs-", ".tmp-flashinfer-rs-1-", ".tmp-flashinfer-rs-1-1x"] {
            assert!(!is_temporary(name), "{name}");
        }
    }

    #[test]
    fn a_file_that_is_not_what_was_hashed_is_not_published() {
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("norm.so");
        let mut sink = Sink::new(&to, 9).unwrap();
        sink.write(b"hashed").unwrap();
        OpenOptions::new().append(true).open(&sink.path).unwrap().write_all(b"more").unwrap();
        let text = sink.publish().unwrap_err().to_string();
        assert!(text.contains("10 bytes are on disk, and 6 were hashed"), "{text}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
