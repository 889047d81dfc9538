//! Files on disk: who may write them, and when they may be trusted.
//!
//! ```text
//! <cache>/<artifact hash>/<name>/<file>.so    a member, published by rename
//! <cache>/<artifact hash>/<name>/.lock        held by whoever writes in that folder
//! <cache>/<artifact hash>/record/RECORD       the wheel's list, where members come one by one
//! <cache>/wheels/<file>.whl                   a pinned wheel, published by rename
//! <cache>/wheels/<file>.whl.verified          its stamp: digest, size and time of change
//! <cache>/wheels/<file>.whl.partial           a download that is not complete
//! <cache>/wheels/<file>.whl.pip/               where pip puts it
//! <cache>/wheels/<file>.whl.lock              held by whoever downloads it
//! ```
//!
//! Invariants. A file is returned only after its SHA-256 was found right, in this process or, for
//! a whole wheel, as its stamp tells. A file is written under another name in the same folder,
//! synced, and renamed, so that no reader sees half of it. What a killed process leaves has a
//! name that nobody trusts; the next holder of the lock removes it. Reading needs neither the
//! lock nor the right to write. Symbolic links are neither trusted nor written through.

use super::digest::{Digest, Hasher};
use super::pins::Pin;
use super::wheel::{ARTIFACT_HASH_LEN, MAX_RECORD, artifact_hash};
use super::{ArtifactError, Progress};
use std::collections::HashMap;
use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, UNIX_EPOCH};

const LOCK: &str = ".lock";
const TEMPORARY: &str = ".tmp-";
/// Folder and name of a wheel's RECORD.
const RECORD: (&str, &str) = ("record", "RECORD");

/// Tells of progress; see [`super::ProgressFn`].
pub(crate) type Tell<'a> = &'a (dyn Fn(&Progress<'_>) + 'a);

/// The folder of the store.
#[derive(Debug)]
pub struct Cache {
    root: PathBuf,
    lock_timeout: Duration,
    verified: Mutex<HashMap<PathBuf, Seen>>,
}

/// What a verified file looked like, so that a change is noticed without hashing it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    sha256: Digest,
    size: u64,
    modified: u128,
}

impl Seen {
    fn new(sha256: Digest, metadata: &Metadata) -> Seen {
        let modified = metadata.modified().ok();
        let modified = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        Seen { sha256, size: metadata.len(), modified: modified.map_or(0, |time| time.as_nanos()) }
    }

    fn stamp(&self) -> String {
        format!("{} {} {}\n", self.sha256, self.size, self.modified)
    }
}

/// A member on its way to disk: counted and hashed, never larger than promised.
pub struct Sink<'a> {
    file: File,
    path: &'a Path,
    hasher: Hasher,
    size: u64,
}

impl Sink<'_> {
    /// Takes the next bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), ArtifactError> {
        self.hasher.update(bytes);
        if self.hasher.len() > self.size {
            let reason = format!("it yields more than the {} bytes it states", self.size);
            return Err(ArtifactError::wheel(self.path, reason));
        }
        let written = self.file.write_all(bytes);
        written.map_err(|e| ArtifactError::cache(self.path, "write", e))
    }
}

/// A lock on a file next to what it protects. Dropping it releases it, as does the death of the
/// process.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    path: PathBuf,
}

impl Cache {
    /// The cache in the folder `root`, which need not exist yet.
    pub fn new(root: PathBuf, lock_timeout: Duration) -> Cache {
        Cache { root, lock_timeout, verified: Mutex::default() }
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of whole wheels.
    pub fn wheels(&self) -> PathBuf {
        self.root.join("wheels")
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
        fill: &mut dyn FnMut(&mut Sink<'_>) -> Result<(), ArtifactError>,
    ) -> Result<PathBuf, ArtifactError> {
        let (folder, path) = self.place(at)?;
        if self.good(&path, sha256, size) {
            return Ok(path);
        }
        let _lock = self.lock_in(&folder)?;
        if self.good(&path, sha256, size) {
            return Ok(path);
        }
        remove_temporaries(&folder);
        let temporary = Temporary::new(&folder)?;
        let mut sink = Sink { file: temporary.file()?, path: &path, hasher: Hasher::default(), size };
        fill(&mut sink)?;
        let found = sink.hasher.digest();
        if found != sha256 {
            return Err(ArtifactError::DigestMismatch { file: what(), expected: sha256, found });
        }
        temporary.publish(&sink.file, &path)?;
        self.remember(&path, sha256);
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
    #[cfg(feature = "fetch")]
    pub(crate) fn publish_record(&self, sha256: Digest, record: &[u8]) -> Result<PathBuf, ArtifactError> {
        let at = (&*artifact_hash(sha256), RECORD.0, RECORD.1);
        let promised = (sha256, record.len() as u64);
        self.publish(at, promised, &|| RECORD.1.into(), &mut |sink| sink.write(record))
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
        let Ok(metadata) = fs::symlink_metadata(path) else {
            return false;
        };
        if !metadata.is_file() || metadata.len() != size {
            return false;
        }
        let seen = Seen::new(sha256, &metadata);
        if self.seen().get(path) == Some(&seen) {
            return true;
        }
        let found = File::open(path).and_then(|file| Digest::of_file(&file));
        let good = found.is_ok_and(|(found, len)| found == sha256 && len == size);
        if good {
            self.seen().insert(path.into(), seen);
        }
        good
    }

    fn remember(&self, path: &Path, sha256: Digest) {
        if let Ok(metadata) = fs::symlink_metadata(path) {
            self.seen().insert(path.into(), Seen::new(sha256, &metadata));
        }
    }

    fn seen(&self) -> MutexGuard<'_, HashMap<PathBuf, Seen>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lock of a member's folder, which is made if it does not exist.
    fn lock_in(&self, folder: &Path) -> Result<Lock, ArtifactError> {
        let make = || {
            let made = fs::create_dir_all(folder);
            made.map_err(|e| ArtifactError::cache(folder, "create the folder", e))
        };
        make()?;
        Lock::take(&folder.join(LOCK), self.lock_timeout, &make, &|_| ())
    }

    /// The pinned wheel, if it is in the cache: verified by its stamp, else by hashing it.
    ///
    /// # Errors
    /// [`ArtifactError::DigestMismatch`] when something else has its name, and
    /// [`ArtifactError::Cache`] when it cannot be read.
    pub(crate) fn wheel(&self, pin: &Pin, tell: Tell<'_>) -> Result<Option<PathBuf>, ArtifactError> {
        let path = self.wheels().join(&pin.file);
        let failed = |e| ArtifactError::cache(&path, "read", e);
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_file() => metadata,
            Ok(_) => return Err(failed(io::ErrorKind::IsADirectory.into())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) if e.kind() == io::ErrorKind::NotADirectory => return Ok(None),
            Err(e) => return Err(failed(e)),
        };
        let seen = Seen::new(pin.sha256, &metadata);
        let stamp = stamp_path(&path);
        let stamped = || fs::read_to_string(&stamp).is_ok_and(|text| text == seen.stamp());
        if self.seen().get(&path) == Some(&seen) || stamped() {
            return Ok(Some(path));
        }
        let total = metadata.len();
        let mut file = File::open(&path).map_err(failed)?;
        let step = |done| {
            tell(&Progress::Verifying { file: &pin.file, done, total });
        };
        let (found, _) = Digest::of_reader(&mut file, step).map_err(failed)?;
        if found != pin.sha256 {
            return Err(ArtifactError::DigestMismatch {
                file: path.display().to_string(),
                expected: pin.sha256,
                found,
            });
        }
        self.seen().insert(path.clone(), seen);
        // A read-only cache serves too; it is only hashed again by the next process.
        let _ = write_stamp(&path, &seen);
        Ok(Some(path))
    }

    /// The lock of a pinned wheel; waiting for it is told.
    #[cfg(feature = "fetch")]
    pub(crate) fn lock_wheel(&self, pin: &Pin, tell: Tell<'_>) -> Result<Lock, ArtifactError> {
        let folder = self.wheels();
        let make = || {
            let made = fs::create_dir_all(&folder);
            made.map_err(|e| ArtifactError::cache(&folder, "create the folder", e))
        };
        make()?;
        let path = folder.join(format!("{}{LOCK}", pin.file));
        Lock::take(&path, self.lock_timeout, &make, &|waited| {
            tell(&Progress::Waiting { file: &pin.file, waited });
        })
    }

    /// Publishes a complete download that was found to have the pin's digest.
    #[cfg(feature = "fetch")]
    pub(crate) fn adopt_wheel(&self, pin: &Pin, file: &File, from: &Path) -> Result<PathBuf, ArtifactError> {
        let path = self.wheels().join(&pin.file);
        rename_synced(file, from, &path).map_err(|e| ArtifactError::cache(&path, "publish", e))?;
        let metadata = fs::symlink_metadata(&path).map_err(|e| ArtifactError::cache(&path, "read", e))?;
        let seen = Seen::new(pin.sha256, &metadata);
        self.seen().insert(path.clone(), seen);
        let _ = write_stamp(&path, &seen);
        Ok(path)
    }

    /// The bytes of all files in the cache.
    ///
    /// # Errors
    /// Those of reading folders. A folder that does not exist has none.
    pub fn size(&self) -> io::Result<u64> {
        fn walk(folder: &Path) -> io::Result<u64> {
            let mut sum = 0;
            let entries = match fs::read_dir(folder) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
                entries => entries?,
            };
            for entry in entries {
                let entry = entry?;
                let metadata = entry.metadata()?;
                sum += match metadata.is_dir() {
                    true => walk(&entry.path())?,
                    false => metadata.len(),
                };
            }
            Ok(sum)
        }
        walk(&self.root)
    }

    /// Removes every member and wheel that no process is writing, and returns the bytes freed.
    /// Only what this crate wrote is removed, so a cache folder shared with other files is safe.
    ///
    /// # Errors
    /// [`ArtifactError::Cache`] when something cannot be removed.
    pub fn clean(&self) -> Result<u64, ArtifactError> {
        let mut freed = 0;
        for folder in folders(&self.root)? {
            let name = folder.file_name().and_then(|n| n.to_str()).unwrap_or("");
            if name == "wheels" {
                freed += clean_wheels(&folder)?;
            } else if is_artifact_hash(name) {
                for inner in folders(&folder)? {
                    if let Some(lock) = Lock::try_take(&inner.join(LOCK))? {
                        freed += remove_files(&inner, |name| name != LOCK)?;
                        lock.remove();
                    }
                    let _ = fs::remove_dir(&inner);
                }
                let _ = fs::remove_dir(&folder);
            }
        }
        self.seen().clear();
        Ok(freed)
    }
}

impl Lock {
    /// Waits for the lock. `make` restores the lock's folder when a concurrent clean-up removed
    /// it; `waiting` is told about once a second.
    fn take(
        path: &Path,
        timeout: Duration,
        make: &dyn Fn() -> Result<(), ArtifactError>,
        waiting: &dyn Fn(Duration),
    ) -> Result<Lock, ArtifactError> {
        let start = Instant::now();
        let mut pause = Duration::from_millis(1);
        let mut told = Duration::ZERO;
        loop {
            match Lock::try_take(path) {
                Ok(Some(lock)) => return Ok(lock),
                Ok(None) => {}
                Err(ArtifactError::Cache { source, .. })
                    if source.kind() == io::ErrorKind::NotFound
                        && start.elapsed() < Duration::from_secs(10) =>
                {
                    make()?;
                }
                Err(e) => return Err(e),
            }
            let waited = start.elapsed();
            if waited >= timeout {
                return Err(ArtifactError::Locked { path: path.into(), waited });
            }
            if waited >= told {
                waiting(waited);
                told = waited + Duration::from_secs(1);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }

    /// The lock, unless someone holds it.
    fn try_take(path: &Path) -> Result<Option<Lock>, ArtifactError> {
        let failed = |e| ArtifactError::cache(path, "lock", e);
        if fs::symlink_metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
            let why = io::Error::new(io::ErrorKind::AlreadyExists, "it is not a regular file");
            return Err(failed(why));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(e)) => return Err(failed(e)),
        }
        // Its last holder may have removed it: then the name no longer protects anything.
        let same = match fs::symlink_metadata(path) {
            Ok(metadata) => same_file(&metadata, &file.metadata().map_err(failed)?),
            Err(_) => false,
        };
        Ok(same.then(|| Lock { _file: file, path: path.into() }))
    }

    /// Removes the lock's file while it is held.
    fn remove(self) {
        let _ = fs::remove_file(&self.path);
    }
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

/// A file under a name that nobody trusts, removed unless it is published.
struct Temporary {
    path: PathBuf,
}

impl Temporary {
    fn new(folder: &Path) -> Result<Temporary, ArtifactError> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let counter = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{TEMPORARY}{}-{counter}", std::process::id());
        let path = folder.join(name);
        Ok(Temporary { path })
    }

    fn file(&self) -> Result<File, ArtifactError> {
        File::create_new(&self.path).map_err(|e| ArtifactError::cache(&self.path, "create", e))
    }

    fn publish(self, file: &File, path: &Path) -> Result<(), ArtifactError> {
        let published = rename_synced(file, &self.path, path);
        published.map_err(|e| ArtifactError::cache(path, "publish", e))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After a publication there is nothing under this name.
        let _ = fs::remove_file(&self.path);
    }
}

fn rename_synced(file: &File, from: &Path, to: &Path) -> io::Result<()> {
    file.sync_all()?;
    fs::rename(from, to)?;
    match to.parent() {
        Some(folder) if cfg!(unix) => File::open(folder)?.sync_all(),
        _ => Ok(()),
    }
}

fn stamp_path(wheel: &Path) -> PathBuf {
    let mut name = wheel.as_os_str().to_owned();
    name.push(".verified");
    name.into()
}

fn write_stamp(wheel: &Path, seen: &Seen) -> Result<(), ArtifactError> {
    let folder = wheel.parent().unwrap_or(Path::new("."));
    let temporary = Temporary::new(folder)?;
    let mut file = temporary.file()?;
    let stamp = stamp_path(wheel);
    let written = file.write_all(seen.stamp().as_bytes());
    written.map_err(|e| ArtifactError::cache(&stamp, "write", e))?;
    temporary.publish(&file, &stamp)
}

/// Refuses a folder of ours that is a symbolic link or no folder at all.
fn real_folder(path: &Path) -> Result<(), ArtifactError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.is_dir() => {
            let why = io::Error::new(io::ErrorKind::NotADirectory, "it is not a real folder");
            Err(ArtifactError::cache(path, "use the folder", why))
        }
        _ => Ok(()),
    }
}

fn remove_temporaries(folder: &Path) {
    let _ = remove_files(folder, |name| name.starts_with(TEMPORARY));
}

/// Removes the files of a folder whose name `which` accepts; returns their bytes.
fn remove_files(folder: &Path, which: impl Fn(&str) -> bool) -> Result<u64, ArtifactError> {
    let failed = |e| ArtifactError::cache(folder, "clean", e);
    let mut freed = 0;
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let metadata = entry.metadata().map_err(failed)?;
        if which(&entry.file_name().to_string_lossy()) && !metadata.is_dir() {
            fs::remove_file(entry.path()).map_err(failed)?;
            freed += metadata.len();
        }
    }
    Ok(freed)
}

fn clean_wheels(folder: &Path) -> Result<u64, ArtifactError> {
    let failed = |e| ArtifactError::cache(folder, "clean", e);
    let mut wheels = std::collections::BTreeSet::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if let Some((wheel, _)) = name.to_string_lossy().split_once(".whl") {
            wheels.insert(format!("{wheel}.whl"));
        }
    }
    let mut freed = 0;
    for wheel in wheels {
        let Some(lock) = Lock::try_take(&folder.join(format!("{wheel}{LOCK}")))? else {
            continue;
        };
        let ours = ["", ".verified", ".partial"].map(|end| format!("{wheel}{end}"));
        freed += remove_files(folder, |name| ours.iter().any(|own| own == name))?;
        let _ = fs::remove_dir_all(folder.join(format!("{wheel}.pip")));
        lock.remove();
    }
    remove_temporaries(folder);
    let _ = fs::remove_dir(folder);
    Ok(freed)
}

fn folders(folder: &Path) -> Result<Vec<PathBuf>, ArtifactError> {
    let failed = |e| ArtifactError::cache(folder, "list", e);
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        if entry.file_type().map_err(failed)?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn is_artifact_hash(name: &str) -> bool {
    name.len() == ARTIFACT_HASH_LEN && name.bytes().all(|c| c.is_ascii_hexdigit())
}
