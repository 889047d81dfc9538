//! The wheels that the user named, in the configuration and in `FLASHINFER_RS_WHEELS`.

use super::error::SearchedSource;
use super::source::{Located, Source};
use super::store::{Store, Wanted, lacks};
use super::version::FlashInferVersion;
use super::wheel::{Wheel, check_machine};
use super::{ArtifactError, Member, architecture};
use std::cmp::Reverse;
use std::path::{Path, PathBuf};
use std::sync::Arc;

impl Store {
    /// A member of the first user wheel that holds what is wanted.
    ///
    /// Every wheel must be readable, also one whose turn does not come: a mistyped path is never
    /// passed over.
    pub(super) fn in_user_wheels(
        &self,
        wanted: Wanted<'_>,
        searched: &mut Vec<SearchedSource>,
    ) -> Result<Option<Located>, ArtifactError> {
        let user = self.user_wheels()?;
        // Libraries are for any GPU, and looked for before one can be seen.
        let is_module = |member: &Member| matches!(member, Member::Module(_));
        let wheels = match self.members(None, wanted).iter().any(is_module) {
            true => self.ranked(user.wheels),
            false => user.wheels,
        };
        for (source, wheel) in wheels {
            let members = self.members(wheel.version(), wanted);
            if let Some(module) = members.iter().find(|member| is_module(member))
                && let Some(unfit) = self.unfit(wheel.architectures())
                && wheel.find(module)?.is_some()
            {
                searched.push(SearchedSource::new(source, unfit, OTHER_PROVIDER));
                continue;
            }
            for member in &members {
                if let Some(path) = self.extract(&wheel, member)? {
                    let (version, architectures) = (wheel.version(), wheel.architectures().to_vec());
                    return Ok(Some(Located {
                        path,
                        source,
                        member: member.clone(),
                        version,
                        architectures,
                    }));
                }
            }
            searched.push(self.in_vain(source, &wheel, members.first()));
        }
        searched.extend(user.useless);
        if self.user_paths().next().is_none() {
            let remedy =
                "set FLASHINFER_RS_WHEELS, or RuntimeConfig::wheels, to a wheel or a folder of wheels";
            searched.push(SearchedSource::new("your own wheels", "none are named", remedy));
        }
        Ok(None)
    }

    /// What to say of a wheel that lacks what is wanted of it.
    fn in_vain(&self, source: Source, wheel: &Wheel, member: Option<&Member>) -> SearchedSource {
        match (member, wheel.version()) {
            (Some(Member::Module(_)), Some(version)) if !wheel.shim_of().is_empty() => {
                let (outcome, remedy) = self.explain_shim(version, wheel);
                SearchedSource::new(source, outcome, remedy)
            }
            (Some(member), _) => SearchedSource::new(source, lacks(member), ""),
            (None, version) => {
                let version = version.map_or_else(String::new, |version| format!(" {version}"));
                SearchedSource::new(source, format!("FlashInfer{version} has no such module"), "")
            }
        }
    }

    /// What a shim is, and which wheel to get instead.
    pub(super) fn explain_shim(&self, version: FlashInferVersion, wheel: &Wheel) -> (String, String) {
        let outcome =
            format!("it is the shim of FlashInfer {version}, which holds no module and requires providers");
        let version = if version.is_called() { version } else { FlashInferVersion::NEWEST };
        let fits = wheel.shim_of().iter().filter_map(|code| {
            Some((architecture::fit(&[*code], self.gpus()).filter(|fits| !fits.is_empty())?, *code))
        });
        let remedy = match fits.max() {
            Some((_, code)) => format!(
                "name the provider for the GPU here, flashinfer_jit_cache_{code}-{version}; \
                 `flashinfer-doctor pin {version} {code}` downloads it"
            ),
            None => format!(
                "name the provider for the GPU, one of {}; `flashinfer-doctor pin {version} ARCHITECTURE` \
                 downloads it",
                architecture::listed(wheel.shim_of())
            ),
        };
        (outcome, remedy)
    }

    /// The wheels in order. Providers of one version that are named in one list stand where the first
    /// of them does, the one that suits the GPUs best before the others.
    fn ranked(&self, mut wheels: Vec<(Source, Arc<Wheel>)>) -> Vec<(Source, Arc<Wheel>)> {
        let kind = |(source, wheel): &(Source, Arc<Wheel>)| {
            let provider = !wheel.architectures().is_empty();
            provider.then(|| (matches!(source, Source::Env(_)), wheel.version()))
        };
        let mut ranked = Vec::with_capacity(wheels.len());
        while let Some(first) = wheels.first().map(kind) {
            let same = |named: &(Source, Arc<Wheel>)| first.is_some() && kind(named) == first;
            let (mut group, others): (Vec<_>, Vec<_>) = match first {
                Some(_) => wheels.into_iter().partition(same),
                None => {
                    let others = wheels.split_off(1);
                    (wheels, others)
                }
            };
            if group.len() > 1 && !self.gpus().is_empty() {
                group
                    .sort_by_key(|(_, wheel)| Reverse(architecture::fit(wheel.architectures(), self.gpus())));
            }
            ranked.append(&mut group);
            wheels = others;
        }
        ranked
    }

    /// The paths that were named, and whether the environment did.
    pub(super) fn user_paths(&self) -> impl Iterator<Item = (bool, &PathBuf)> {
        let config = self.config.wheels.iter().map(|path| (false, path));
        config.chain(self.config.env_wheels.iter().map(|path| (true, path)))
    }

    pub(super) fn user_wheels(&self) -> Result<UserWheels, ArtifactError> {
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
                    Err(e) if wheel != *path => {
                        user.useless.push(SearchedSource::new(source(wheel), e, ""));
                    }
                    fits => {
                        let opened = fits.and_then(|()| self.wheel(&wheel, None))?;
                        user.wheels.push((source(wheel), opened));
                    }
                }
            }
        }
        Ok(user)
    }

    /// Refuses a wheel for another architecture than these pins'.
    pub(super) fn check_machine(&self, wheel: &Path) -> Result<(), ArtifactError> {
        match self.config.pins.arch() {
            // No wheel is for such a machine, and its pins say so.
            "none" => Ok(()),
            arch => check_machine(wheel, arch),
        }
    }
}

/// What to do about a provider for other GPUs.
pub(super) const OTHER_PROVIDER: &str =
    "name the provider for the GPUs here, or leave others out by CUDA_VISIBLE_DEVICES";

/// The user's wheels, opened.
#[derive(Default)]
pub(super) struct UserWheels {
    pub(super) wheels: Vec<(Source, Arc<Wheel>)>,
    /// Folders without wheels, and wheels in folders that are for other machines.
    useless: Vec<SearchedSource>,
}

/// What to say of a folder without wheels.
pub(super) fn empty_folder(path: &Path, source: Source) -> SearchedSource {
    let outcome = format!("the folder {} holds no .whl file", path.display());
    SearchedSource::new(source, outcome, "put wheels there, or leave the folder out of the list")
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
