//! Where a member came from.

use super::{CudaArchitecture, FlashInferVersion, Member};
use std::fmt;
use std::path::{Path, PathBuf};

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
    CachedMember(String),
}

impl Source {
    /// The wheel's path, if there is a wheel.
    pub(super) fn path(&self) -> Option<&Path> {
        match self {
            Source::Config(path) | Source::Env(path) | Source::CachedWheel(path) | Source::Fetched(path) => {
                Some(path)
            }
            Source::Embedded | Source::CachedMember(_) => None,
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
            Source::CachedMember(file) => write!(f, "pinned wheel {file}, by member"),
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
    /// What it is.
    pub member: Member,
    /// The version of FlashInfer that the source is of, where it says so.
    pub version: Option<FlashInferVersion>,
    /// What its code was compiled for, where the source is a provider's wheel.
    pub architectures: Vec<CudaArchitecture>,
}
