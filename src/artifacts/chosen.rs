//! Members of a pinned wheel that are put into the cache ahead of their use, as for an image of a container.

use super::embed::{matches, shown};
use super::store::Store;
use super::{ArtifactError, Member, Package, Progress};

impl Store {
    /// Puts members of a package's pinned wheel into the cache, ready to be opened: the modules whose
    /// names fit one of `patterns`, in which `*` stands for any run of characters, or a package's
    /// libraries. The cache then serves them without the wheel, with nothing that can be written and
    /// without a network. Returns what is there now.
    ///
    /// A wheel that has to be downloaded whole for it is removed again.
    ///
    /// # Errors
    /// As [`Store::fetch`]; [`ArtifactError::NoSuchModule`] when a pattern fits no module.
    pub fn fetch_members(
        &self,
        package: &Package,
        patterns: &[String],
    ) -> Result<Vec<Member>, ArtifactError> {
        let on_progress = |progress: &Progress<'_>| self.on_progress(progress);
        let pin = self.config.pins.get(package.clone())?;
        let was_there = self.cache.wheels().find(&pin.file, pin.sha256, &on_progress)?.is_some();
        let listed = if was_there { None } else { self.list(pin)? };
        let members = match package {
            Package::TvmFfi => vec![Member::TvmFfi],
            Package::CudaRuntime => vec![Member::CudaRuntime],
            Package::Cublas => vec![Member::CublasLt, Member::Cublas],
            Package::JitCache | Package::Other(_) => {
                let modules = match &listed {
                    Some(listed) => listed.modules(),
                    None => self.fetched(pin, |wheel| Ok(wheel.modules()))?.1,
                };
                chosen(modules, patterns)?
            }
        };
        for member in &members {
            if self.cached_member(pin, member)?.is_none() {
                self.download(pin, member, listed.is_none())?;
            }
        }
        // Where the wheel is there, it is what said which files it has.
        self.cached(pin, |wheel| {
            self.cache.publish_record(wheel.record_sha256(), &wheel.record()?, &on_progress)?;
            self.cache.wheels().note_record(&pin.file, pin.sha256, wheel.record_sha256())
        })?;
        if !was_there {
            self.cache.wheels().clean([pin.file.clone()].into(), |file| file != pin.file, &on_progress)?;
        }
        Ok(members)
    }
}

/// The modules that fit a pattern.
fn chosen(mut modules: Vec<String>, patterns: &[String]) -> Result<Vec<Member>, ArtifactError> {
    let served = |pattern: &String| modules.iter().any(|name| matches(pattern, name));
    let missing: Vec<_> = patterns.iter().filter(|pattern| !served(pattern)).cloned().collect();
    if !missing.is_empty() {
        let patterns = shown(&missing);
        return Err(ArtifactError::NoSuchModule { patterns, known: modules.len(), why: None });
    }
    modules.retain(|name| patterns.iter().any(|pattern| matches(pattern, name)));
    Ok(modules.into_iter().map(Member::Module).collect())
}
