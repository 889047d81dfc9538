//! Families of modules that later releases of FlashInfer do not have.

use crate::{
    artifacts::{ArtifactError, FlashInferVersion, SearchedSource},
    error::{FlashInferError, Result},
    runtime::FlashInferRuntime,
};

/// A family that is gone.
pub(crate) struct Gone {
    /// What the family does, in words.
    pub(crate) what: &'static str,
    /// The first version that lacks it.
    pub(crate) since: FlashInferVersion,
    /// What serves instead: what a caller can do.
    pub(crate) instead: &'static str,
}

impl Gone {
    /// Refuses versions that lack the family.
    pub(crate) fn check(&self, version: FlashInferVersion) -> Result<()> {
        if version < self.since {
            return Ok(());
        }
        Err(FlashInferError::Unsupported {
            what: format!("{} in FlashInfer {version}, which has had none since {}", self.what, self.since),
            available: self.instead.into(),
        })
    }

    /// An error, with what serves instead: where no source holds a module of the
    /// family, and one is of a version that lacks it.
    pub(crate) fn explain(&self, runtime: &FlashInferRuntime, error: FlashInferError) -> FlashInferError {
        let lacking = runtime.store().versions().into_iter().filter(|version| *version >= self.since).max();
        match (error, lacking) {
            (FlashInferError::Artifact(mut error), Some(version)) => {
                if let ArtifactError::NotFound { searched, .. } = &mut *error {
                    searched.push(SearchedSource {
                        source: format!("FlashInfer {version}"),
                        outcome: format!("it has had no {} since {}", self.what, self.since),
                        remedy: self.instead.into(),
                    });
                }
                FlashInferError::Artifact(error)
            }
            (error, _) => error,
        }
    }
}
