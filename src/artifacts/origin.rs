//! How a pinned wheel is reached, by the first way that works: its own address, or, for a package
//! of a registry, the indexes of the settings and then pip.
//!
//! A pin names a package, never a host. Whatever the way, only a file with the pin's digest is
//! accepted.

use super::cache::Files;
use super::download::{self, MAX_WHEEL, RemoteFile};
use super::http::Address;
use super::pins::{Origin, Pin};
use super::settings::{self, Index};
use super::{ArtifactError, FetchOptions, OnProgress, Progress, pages, pip};
use std::path::PathBuf;

/// Puts the pinned wheel, whose lock is held, into the cache.
pub(crate) fn pinned(
    wheels: &Files,
    pin: &Pin,
    arch: &str,
    index_url: Option<&str>,
    options: &FetchOptions,
    on_progress: OnProgress<'_>,
) -> Result<PathBuf, ArtifactError> {
    let damaged = match wheels.find(&pin.file, pin.sha256, on_progress) {
        Ok(Some(path)) => return Ok(path),
        Ok(None) => None,
        Err(e @ ArtifactError::DigestMismatch { .. }) => Some(e),
        Err(e) => return Err(e),
    };
    let fetched = match &pin.origin {
        Origin::Url(url) => own_address(pin, url).and_then(|at| get(wheels, pin, &at, options, on_progress)),
        Origin::Registry { package, version } => {
            from_registry(wheels, pin, (package, version), arch, index_url, options, on_progress)
        }
    };
    // A damaged wheel stays until a good one replaces it, and is what to tell when none does.
    let path = match (fetched, damaged) {
        (Err(ArtifactError::Download { .. }), Some(mismatch)) => return Err(mismatch),
        (fetched, _) => fetched?,
    };
    on_progress(&Progress::Done { file: &pin.file, path: &path });
    Ok(path)
}

/// Where the pinned wheel is, as far as that is known without asking pip; `None` where the
/// settings name no index.
pub(crate) fn address(
    pin: &Pin,
    index_url: Option<&str>,
    options: &FetchOptions,
) -> Result<Option<Address>, ArtifactError> {
    match &pin.origin {
        Origin::Url(url) => own_address(pin, url).map(Some),
        Origin::Registry { package, .. } => {
            let indexes = settings::indexes(index_url)?;
            if indexes.is_empty() {
                return Ok(None);
            }
            let mut reasons = Vec::new();
            for index in &indexes {
                match listed(index, package, pin, options) {
                    Ok(address) => return Ok(Some(address)),
                    Err(e) => reasons.push(by(index, &e)),
                }
            }
            Err(ArtifactError::Download { what: pin.file.clone(), reason: reasons.join("; ") })
        }
    }
}

/// Downloads a pinned wheel.
fn get(
    wheels: &Files,
    pin: &Pin,
    address: &Address,
    options: &FetchOptions,
    on_progress: OnProgress<'_>,
) -> Result<PathBuf, ArtifactError> {
    let (file, sha256) = (&pin.file, Some(pin.sha256));
    let wanted = RemoteFile { file, shown: file, sha256, address, max_size: MAX_WHEEL };
    download::download(wheels, wanted, options, on_progress)
}

fn own_address(pin: &Pin, url: &str) -> Result<Address, ArtifactError> {
    Address::new(url)
        .map_err(|reason| ArtifactError::Pins { reason: format!("the url of {}: {reason}", pin.file) })
}

/// Where an index has the pinned file.
fn listed(index: &Index, package: &str, pin: &Pin, options: &FetchOptions) -> Result<Address, ArtifactError> {
    match &index.address {
        Ok(address) => pages::find(address, package, pin, options),
        Err(reason) => {
            Err(ArtifactError::Download { what: "from a malformed address".into(), reason: reason.clone() })
        }
    }
}

fn by(index: &Index, e: &ArtifactError) -> String {
    format!("by the index that {} names: {e}", index.told_by)
}

fn from_registry(
    wheels: &Files,
    pin: &Pin,
    (package, version): (&str, &str),
    arch: &str,
    index_url: Option<&str>,
    options: &FetchOptions,
    on_progress: OnProgress<'_>,
) -> Result<PathBuf, ArtifactError> {
    let mut reasons = Vec::new();
    for index in settings::indexes(index_url)? {
        let found = listed(&index, package, pin, options);
        match found.and_then(|address| get(wheels, pin, &address, options, on_progress)) {
            Ok(path) => return Ok(path),
            Err(e @ (ArtifactError::DigestMismatch { .. } | ArtifactError::Cache { .. })) => {
                return Err(e);
            }
            Err(e) => reasons.push(by(&index, &e)),
        }
    }
    match pip::obtain(wheels, pin, &format!("{package}=={version}"), arch, options, on_progress) {
        Ok(path) => return Ok(path),
        Err(pip::Failure::Final(e)) => return Err(e),
        Err(pip::Failure::Failed(reason)) => reasons.push(format!("by pip: {reason}")),
    }
    Err(ArtifactError::Download {
        what: format!("{} (package {package} {version})", pin.file),
        reason: reasons.join("; "),
    })
}
