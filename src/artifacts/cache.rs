//! Files on disk: who may write them, and when they may be trusted.
//!
//! ```text
//! <cache>/<artifact hash>/<name>/<file>       a member, published by rename
//! <cache>/<artifact hash>/<name>/.lock        held by whoever writes in that folder
//! <cache>/<artifact hash>/record/RECORD       the wheel's list, where members come one by one
//! <cache>/wheels/<file>.whl                   a pinned wheel, published by rename
//! <cache>/wheels/<file>.whl.verified          its stamp: digest, size, times, device and inode
//! <cache>/wheels/<file>.whl.partial           a download that is not complete
//! <cache>/wheels/<file>.whl.pip/              where pip puts it
//! <cache>/wheels/<file>.whl.lock              held by whoever downloads it
//! ```
//!
//! Invariants. A file is returned only after its SHA-256 was found right, in this process or, for
//! a whole wheel, as its stamp tells. A file is written under another name in the same folder,
//! synced, and renamed, so that no reader sees half of it. What a killed process leaves has a
//! name that nobody trusts; the next holder of the lock removes it. Reading needs neither the
//! lock nor the right to write. Symbolic links are neither trusted nor written through. Only what
//! a pin, a stamp or the file of a lock shows to be ours is ever removed.
//!
//! A stamp says that a file is the one that was hashed, as far as the system tells: who writes to
//! the cache without its notice, or writes stamps, is believed. So a cache must belong to whoever
//! uses it, and members of a wheel whose RECORD is pinned are compared with that besides.

use super::digest::Digest;
use super::lock::{Lock, gone};
use super::pins::Pin;
use super::sink::{self, Sink};
use super::wheel::{ARTIFACT_HASH_LEN, MAX_RECORD, artifact_hash};
use super::{ArtifactError, Member, Progress};
use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const LOCK: &str = ".lock";
const STAMP: &str = ".verified";
const PARTIAL: &str = ".partial";
const PIP: &str = ".pip";
/// Folder and name of a wheel's RECORD.
const RECORD: (&str, &str) = ("record", "RECORD");
/// Where there are no locks, what was not written to for so long has no writer any more.
const ABANDONED: Duration = Duration::from_secs(24 * 60 * 60);

/// Tells of progress; see [`super::ProgressFn`].
pub(crate) type Tell<'a> = &'a (dyn Fn(&Progress<'_>) + 'a);

/// The folder of the store.
#[derive(Debug)]
pub(crate) struct Cache {
    root: PathBuf,
    lock_timeout: Duration,
    verified: Mutex<HashMap<PathBuf, Seen>>,
    /// Whether the file system was found to have no locks.
    lockless: AtomicBool,
}

/// What a verified file looked like, so that a change is noticed without hashing it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
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
    fn new(sha256: Digest, metadata: &Metadata) -> Seen {
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
    fn new(sha256: Digest, metadata: &Metadata) -> Seen {
        let modified = metadata.modified().ok();
        let modified = modified.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
        let modified = modified.map_or(0, |time| time.as_nanos() as i128);
        Seen { sha256, size: metadata.len(), modified, changed: 0, device: 0, inode: 0 }
    }

    fn stamp(&self) -> String {
        let Seen { sha256, size, modified, changed, device, inode } = self;
        format!("{sha256} {size} {modified} {changed} {device} {inode}\n")
    }
}

impl Cache {
    /// The cache in the folder `root`, which need not exist yet.
    pub(crate) fn new(root: PathBuf, lock_timeout: Duration) -> Cache {
        Cache { root, lock_timeout, verified: Mutex::default(), lockless: AtomicBool::new(false) }
    }

    /// The folder.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of whole wheels.
    pub(crate) fn wheels(&self) -> PathBuf {
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
        fill: &mut dyn FnMut(&mut Sink) -> Result<(), ArtifactError>,
        tell: Tell<'_>,
    ) -> Result<PathBuf, ArtifactError> {
        let (folder, path) = self.place(at)?;
        if self.good(&path, sha256, size) {
            return Ok(path);
        }
        let lock = self.lock(&folder.join(LOCK), at.2, tell)?;
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
        self.seen().insert(path.clone(), Seen::new(sha256, &metadata));
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
    pub(crate) fn publish_record(
        &self,
        sha256: Digest,
        record: &[u8],
        tell: Tell<'_>,
    ) -> Result<PathBuf, ArtifactError> {
        let at = (&*artifact_hash(sha256), RECORD.0, RECORD.1);
        let promised = (sha256, record.len() as u64);
        self.publish(at, promised, &|| RECORD.1.into(), &mut |sink| sink.write(record), tell)
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
        if self.remembers(path, &seen) {
            return true;
        }
        let good = Digest::of_file(&file).is_ok_and(|found| found == (sha256, size));
        if good {
            self.seen().insert(path.into(), seen);
        }
        good
    }

    fn remembers(&self, path: &Path, seen: &Seen) -> bool {
        self.seen().get(path) == Some(seen)
    }

    fn seen(&self) -> MutexGuard<'_, HashMap<PathBuf, Seen>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the lock of what is called `file`, which is told.
    fn lock(&self, path: &Path, file: &str, tell: Tell<'_>) -> Result<Lock, ArtifactError> {
        let waiting = |waited| tell(&Progress::Waiting { file, waited });
        let lock = Lock::take(path, self.lock_timeout, &waiting)?;
        self.note(&lock, tell);
        Ok(lock)
    }

    /// The lock for a clean-up, unless it is held or its folder is gone.
    fn try_lock(&self, path: &Path, tell: Tell<'_>) -> Result<Option<Lock>, ArtifactError> {
        match Lock::try_take(path) {
            Err(ArtifactError::Cache { source, .. }) if gone(&source) => Ok(None),
            taken => Ok(taken?.inspect(|lock| self.note(lock, tell))),
        }
    }

    /// Tells, once in a process, that the file system has no locks.
    fn note(&self, lock: &Lock, tell: Tell<'_>) {
        static TOLD: AtomicBool = AtomicBool::new(false);
        let Some(reason) = lock.refused() else { return };
        self.lockless.store(true, Ordering::Relaxed);
        if !TOLD.swap(true, Ordering::Relaxed) {
            tell(&Progress::Lockless { folder: &self.root, reason: &reason.to_string() });
        }
    }

    /// The pinned wheel, if it is in the cache: verified by its stamp, else by hashing it.
    ///
    /// # Errors
    /// [`ArtifactError::DigestMismatch`] when something else has its name, and
    /// [`ArtifactError::Cache`] when it cannot be read.
    pub(crate) fn wheel(&self, pin: &Pin, tell: Tell<'_>) -> Result<Option<PathBuf>, ArtifactError> {
        real_folder(&self.wheels())?;
        let path = self.wheels().join(&pin.file);
        let failed = |e| ArtifactError::cache(&path, "read", e);
        let (mut file, metadata) = match open_regular(&path) {
            Err(e) if gone(&e) || e.kind() == io::ErrorKind::NotADirectory => return Ok(None),
            opened => opened.map_err(failed)?,
        };
        let seen = Seen::new(pin.sha256, &metadata);
        let stamped = || fs::read_to_string(beside(&path, STAMP)).is_ok_and(|text| text == seen.stamp());
        if self.remembers(&path, &seen) || stamped() {
            return Ok(Some(path));
        }
        let total = metadata.len();
        let step = |done| tell(&Progress::Verifying { file: &pin.file, done, total });
        let (found, _) = Digest::of_reader(&mut file, step).map_err(failed)?;
        if found != pin.sha256 {
            return Err(ArtifactError::DigestMismatch {
                file: path.display().to_string(),
                expected: pin.sha256,
                found,
            });
        }
        // Whatever has changed meanwhile is hashed again the next time.
        if file.metadata().is_ok_and(|metadata| Seen::new(pin.sha256, &metadata) == seen) {
            self.trust(&path, seen);
        }
        Ok(Some(path))
    }

    /// Remembers a wheel that was hashed, here and for other processes.
    fn trust(&self, wheel: &Path, seen: Seen) {
        self.seen().insert(wheel.into(), seen);
        let write = || {
            let mut stamp = Sink::new(&beside(wheel, STAMP), u64::MAX)?;
            stamp.write(seen.stamp().as_bytes())?;
            stamp.publish()
        };
        // A cache that is full or read-only serves too; it is only hashed again by the next process.
        let _: Result<_, ArtifactError> = write();
    }

    /// Forgets that a wheel was verified: the next look-up hashes it.
    pub(crate) fn distrust(&self, wheel: &Path) {
        self.seen().remove(wheel);
        let _ = fs::remove_file(beside(wheel, STAMP));
    }

    /// The lock of a pinned wheel; waiting for it is told.
    #[cfg(feature = "fetch")]
    pub(crate) fn lock_wheel(&self, pin: &Pin, tell: Tell<'_>) -> Result<Lock, ArtifactError> {
        let folder = self.wheels();
        real_folder(&folder)?;
        let lock = self.lock(&folder.join(format!("{}{LOCK}", pin.file)), &pin.file, tell)?;
        remove_abandoned(&folder);
        Ok(lock)
    }

    /// The download of a pinned wheel, begun or gone on with. The wheel's lock is held.
    #[cfg(feature = "fetch")]
    pub(crate) fn partial(&self, pin: &Pin, tell: Tell<'_>) -> Result<Sink, ArtifactError> {
        let to = self.wheels().join(&pin.file);
        if self.lockless.load(Ordering::Relaxed) {
            return Sink::new(&to, u64::MAX);
        }
        Sink::resume(beside(&to, PARTIAL), &to, true, |done, total| {
            tell(&Progress::Verifying { file: &pin.file, done, total });
        })
    }

    /// An empty folder for pip to bring a pinned wheel to. The wheel's lock is held.
    #[cfg(feature = "fetch")]
    pub(crate) fn scratch(&self, pin: &Pin) -> Result<Scratch, ArtifactError> {
        let to = self.wheels().join(&pin.file);
        let path = beside(&to, PIP);
        let made = if self.lockless.load(Ordering::Relaxed) {
            sink::temporary(&to, |path| fs::create_dir(path)).map(|(path, ())| path)
        } else {
            // What is there was left by a process that died.
            let _ = fs::remove_dir_all(&path);
            fs::create_dir(&path).map(|()| path.clone())
        };
        made.map(Scratch).map_err(|e| ArtifactError::cache(&path, "create the folder", e))
    }

    /// Publishes what is complete and has the pin's digest; anything else is removed.
    #[cfg(feature = "fetch")]
    pub(crate) fn adopt(&self, pin: &Pin, wheel: Sink) -> Result<PathBuf, ArtifactError> {
        let path = self.wheels().join(&pin.file);
        let metadata = wheel.publish()?;
        self.trust(&path, Seen::new(pin.sha256, &metadata));
        Ok(path)
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
    pub(crate) fn clean(&self, pinned: BTreeSet<String>, tell: Tell<'_>) -> Result<u64, ArtifactError> {
        let mut freed = 0;
        for (name, metadata) in listed(&self.root)? {
            let folder = self.root.join(&name);
            if metadata.is_dir() && is_artifact_hash(&name) {
                for (member, metadata) in listed(&folder)? {
                    if metadata.is_dir() {
                        freed += self.clean_members(&folder, &member, tell)?;
                    }
                }
            } else if metadata.is_dir() && name == "wheels" {
                freed += self.clean_wheels(&folder, pinned.clone(), tell)?;
            }
        }
        self.seen().clear();
        Ok(freed)
    }

    fn clean_members(&self, outer: &Path, name: &str, tell: Tell<'_>) -> Result<u64, ArtifactError> {
        let folder = outer.join(name);
        if !Lock::is_ours(&folder.join(LOCK)) {
            return Ok(0);
        }
        let Some(lock) = self.try_lock(&folder.join(LOCK), tell)? else { return Ok(0) };
        let freed = remove_files(&folder, |file, metadata| {
            Member::may_be_at(name, file)
                || (name, file) == RECORD
                || sink::is_temporary(file) && (lock.refused().is_none() || abandoned(metadata))
        })?;
        lock.remove();
        let _ = fs::remove_dir(outer);
        Ok(freed)
    }

    fn clean_wheels(
        &self,
        folder: &Path,
        mut names: BTreeSet<String>,
        tell: Tell<'_>,
    ) -> Result<u64, ArtifactError> {
        let mut found = BTreeSet::new();
        for (name, _) in listed(folder)? {
            let path = folder.join(&name);
            if let Some(wheel) = name.strip_suffix(LOCK).filter(|_| Lock::is_ours(&path)) {
                names.insert(wheel.into());
            }
            if let Some(wheel) = name.strip_suffix(STAMP).filter(|_| is_stamp(&path)) {
                names.insert(wheel.into());
            }
            found.insert(name);
        }
        let mut freed = 0;
        for wheel in names {
            let place = |end: &str| folder.join(format!("{wheel}{end}"));
            if ["", STAMP, PARTIAL, PIP, LOCK].iter().all(|end| !found.contains(&format!("{wheel}{end}"))) {
                continue;
            }
            let Some(lock) = self.try_lock(&place(LOCK), tell)? else { continue };
            freed += remove_files(folder, |name, metadata| {
                let unfinished = lock.refused().is_none() || abandoned(metadata);
                name.strip_prefix(&wheel).is_some_and(|end| match end {
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
        remove_abandoned(folder);
        let _ = fs::remove_dir(folder);
        Ok(freed)
    }
}

/// A folder that is removed with its content.
#[cfg(feature = "fetch")]
pub(crate) struct Scratch(PathBuf);

#[cfg(feature = "fetch")]
impl Scratch {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

#[cfg(feature = "fetch")]
impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A path with `end` behind its name.
fn beside(wheel: &Path, end: &str) -> PathBuf {
    let mut name = wheel.as_os_str().to_owned();
    name.push(end);
    name.into()
}

/// Whether a file is a stamp of ours.
fn is_stamp(path: &Path) -> bool {
    let small = fs::symlink_metadata(path).is_ok_and(|found| found.is_file() && found.len() < 500);
    let text = small.then(|| fs::read_to_string(path).ok()).flatten().unwrap_or_default();
    let (digest, numbers) = text.trim_end().split_once(' ').unwrap_or_default();
    Digest::from_hex(digest).is_some() && numbers.split(' ').all(|number| number.parse::<i128>().is_ok())
}

/// Opens a file that is no symbolic link, folder or pipe.
fn open_regular(path: &Path) -> io::Result<(File, Metadata)> {
    if !fs::symlink_metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "it is not a regular file"));
    }
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    Ok((file, metadata))
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

/// Whether nobody has written to it for long.
fn abandoned(metadata: &Metadata) -> bool {
    metadata.modified().is_ok_and(|time| time.elapsed().is_ok_and(|age| age > ABANDONED))
}

/// Removes unfinished files and folders that no process can be working on any more.
fn remove_abandoned(folder: &Path) {
    for (name, metadata) in listed(folder).unwrap_or_default() {
        if sink::is_temporary(&name) && abandoned(&metadata) {
            let path = folder.join(name);
            let _ = if metadata.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
    }
}

/// Removes the files of a folder that `which` accepts; returns their bytes.
fn remove_files(folder: &Path, which: impl Fn(&str, &Metadata) -> bool) -> Result<u64, ArtifactError> {
    let mut freed = 0;
    for (name, metadata) in listed(folder)? {
        if metadata.is_dir() || !which(&name, &metadata) {
            continue;
        }
        match fs::remove_file(folder.join(&name)) {
            Ok(()) => freed += metadata.len(),
            Err(e) if gone(&e) => {}
            Err(e) => return Err(ArtifactError::cache(&folder.join(name), "remove", e)),
        }
    }
    Ok(freed)
}

/// What is in a folder and may be ours: all our names are plain text.
fn listed(folder: &Path) -> Result<Vec<(String, Metadata)>, ArtifactError> {
    let found = entries(folder).map_err(|e| ArtifactError::cache(folder, "list", e))?;
    Ok(found.into_iter().filter_map(|(name, metadata)| Some((name.into_string().ok()?, metadata))).collect())
}

/// What is in a folder, links not followed; less what is removed meanwhile.
fn entries(folder: &Path) -> io::Result<Vec<(OsString, Metadata)>> {
    let listing = match fs::read_dir(folder) {
        Err(e) if gone(&e) => return Ok(Vec::new()),
        listing => listing?,
    };
    let mut found = Vec::new();
    for entry in listing {
        match entry.and_then(|entry| Ok((entry.file_name(), entry.metadata()?))) {
            Ok(named) => found.push(named),
            Err(e) if gone(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}

fn is_artifact_hash(name: &str) -> bool {
    name.len() == ARTIFACT_HASH_LEN && name.bytes().all(|c| c.is_ascii_hexdigit())
}
