//! The sources of a member, in order, and the first that holds it.

use super::architecture::{self, CudaArchitecture};
use super::bundle::BundledMember;
use super::cache::Cache;
use super::config::StoreConfig;
use super::digest::Digest;
use super::error::SearchedSource;
#[cfg(feature = "fetch")]
use super::remote::RemoteWheel;
use super::source::{Located, Source};
use super::version::{self, FlashInferVersion};
use super::wheel::Wheel;
use super::{ArtifactError, Fetch, Member, Package, Progress, kernels};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// What is wanted, by the version of the wheel that may hold it; `None` where that version has
/// nothing of the kind.
pub(crate) type Wanted<'a> = &'a dyn Fn(FlashInferVersion) -> Option<Member>;

/// Finds members in their sources and keeps verified copies in the cache. Share it by reference
/// or in an `Arc`; every method may run in many threads and processes at once.
#[derive(Debug)]
pub struct Store {
    pub(super) config: StoreConfig,
    pub(super) cache: Cache,
    opened: Mutex<HashMap<PathBuf, Arc<Wheel>>>,
    gpus: OnceLock<Vec<CudaArchitecture>>,
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
            gpus: OnceLock::new(),
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
        self.locate_of_version(&|_| Some(member.clone()), fetch)
    }

    /// As [`Store::locate`], of a member whose name depends on the version of the wheel that holds
    /// it: `wanted` gives the name, or `None` where a version has no such member. Only the version of
    /// the source that holds it is used.
    ///
    /// # Errors
    /// As [`Store::locate`].
    pub fn locate_of_version(
        &self,
        wanted: &dyn Fn(FlashInferVersion) -> Option<Member>,
        fetch: Fetch,
    ) -> Result<Located, ArtifactError> {
        let members = self.members(None, wanted);
        members.iter().try_for_each(Member::check)?;
        let Some(first) = members.first() else {
            return Err(ArtifactError::BadName { name: String::new() });
        };
        let mut searched = Vec::new();
        if let Some(located) = self.in_user_wheels(wanted, &mut searched)? {
            return Ok(located);
        }
        if let Some(located) = self.in_bundle(wanted, &mut searched)? {
            return Ok(located);
        }
        if let Some(located) = self.in_pinned_wheels(wanted, fetch, &mut searched)? {
            return Ok(located);
        }
        Err(ArtifactError::NotFound { member: first.clone(), searched })
    }

    /// What is wanted of a source of this version: each name that it can have, where the version is
    /// not known.
    pub(super) fn members(&self, version: Option<FlashInferVersion>, wanted: Wanted<'_>) -> Vec<Member> {
        let Some(version) = version else {
            let mut members: Vec<_> = FlashInferVersion::CALLED.into_iter().filter_map(wanted).collect();
            members.dedup();
            return members;
        };
        wanted(version).into_iter().collect()
    }

    /// A member of the embedded bundle.
    fn in_bundle(
        &self,
        wanted: Wanted<'_>,
        searched: &mut Vec<SearchedSource>,
    ) -> Result<Option<Located>, ArtifactError> {
        let mut push = |outcome: String, remedy| {
            searched.push(SearchedSource::new(Source::Embedded, outcome, remedy));
        };
        let held = |entry: &&BundledMember| {
            self.members(entry.version, wanted).into_iter().find(|member| entry.is(member))
        };
        let found = self.config.bundle.iter().find_map(|entry| Some((entry, held(&entry)?)));
        if let Some((entry, member)) = found {
            match self.unfit(entry.architectures) {
                None => {
                    let (path, source) = (self.unpack(entry, &member)?, Source::Embedded);
                    let (version, architectures) = (entry.version, entry.architectures.to_vec());
                    return Ok(Some(Located { path, source, member, version, architectures }));
                }
                Some(unfit) => push(unfit, "build for this GPU, or name its wheel in FLASHINFER_RS_WHEELS"),
            }
            return Ok(None);
        }
        // Nothing else is ever embedded.
        let Some(member) = self.members(None, wanted).into_iter().next() else { return Ok(None) };
        if Package::KERNELS.contains(&member.package()) {
            match self.config.bundle {
                [] => push("nothing was embedded at build time".into(), NOTHING_EMBEDDED),
                _ => push(lacks(&member), "build with a pattern for it in FLASHINFER_RS_EMBED_MODULES"),
            }
        }
        Ok(None)
    }

    /// The architectures of the GPUs that kernels are for, each once; none where no GPU is seen.
    pub(super) fn gpus(&self) -> &[CudaArchitecture] {
        self.gpus.get_or_init(|| {
            let mut gpus = self.config.gpus.as_ref().map_or_else(Vec::new, |gpus| gpus());
            gpus.sort_unstable();
            gpus.dedup();
            gpus
        })
    }

    /// Why code for these architectures does not run on the GPUs, if it does not. Code for all, and
    /// code for GPUs that nobody has seen, is not refused.
    pub(super) fn unfit(&self, code: &[CudaArchitecture]) -> Option<String> {
        if code.is_empty() || self.gpus().is_empty() || architecture::fit(code, self.gpus()).is_some() {
            return None;
        }
        let (code, gpus) = (architecture::listed(code), architecture::listed(self.gpus()));
        Some(format!("its code is for {code}, and the GPUs here are {gpus}"))
    }

    /// The versions of FlashInfer whose modules local sources hold: the wheels that the user named,
    /// and the bundle.
    pub fn versions(&self) -> Vec<FlashInferVersion> {
        let wheels = self.user_wheels().map(|user| user.wheels).unwrap_or_default();
        let wheels = wheels.iter().filter_map(|(_, wheel)| wheel.version());
        let mut versions: Vec<_> =
            wheels.chain(self.config.bundle.iter().filter_map(|entry| entry.version)).collect();
        versions.sort_unstable();
        versions.dedup();
        versions
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

    /// Refuses modules of a FlashInfer that this crate does not call: their functions may have the
    /// same names and kinds of arguments, and mean something else by them.
    pub(super) fn check_version(&self, wheel: &Wheel, member: &Member) -> Result<(), ArtifactError> {
        let distribution = wheel.distribution();
        if !matches!(member, Member::Module(_))
            || !kernels::is_flashinfers(distribution)
            || wheel.version().is_some_and(FlashInferVersion::is_called)
        {
            return Ok(());
        }
        let found = distribution.split('-').nth(1).and_then(|version| version.split('+').next());
        Err(ArtifactError::OtherVersion {
            wheel: wheel.path().into(),
            found: found.unwrap_or("unknown").into(),
            expected: version::called(),
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
