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
pub struct SearchedSource {
    /// The source, in human words.
    pub source: String,
    /// What was looked for there, and what was found instead.
    pub outcome: String,
    /// What to do so that this source serves.
    pub remedy: String,
}

impl SearchedSource {
    /// What was found in a source, and what to do; the remedy may be empty.
    pub(crate) fn new(
        source: impl fmt::Display,
        outcome: impl fmt::Display,
        remedy: impl Into<String>,
    ) -> SearchedSource {
        SearchedSource { source: source.to_string(), outcome: outcome.to_string(), remedy: remedy.into() }
    }
}

impl fmt::Display for SearchedSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.source, self.outcome)?;
        if !self.remedy.is_empty() {
            write!(f, " ({})", self.remedy)?;
        }
        Ok(())
    }
}

/// What to do about [`ArtifactError::DigestMismatch`].
const OBTAIN_AGAIN: &str = "remove the file and obtain it again from a source that you trust";
/// What to do about [`ArtifactError::BadWheel`].
const NAME_A_WHEEL: &str = "name a complete `.whl` file, or a folder of them";
/// What to do about [`ArtifactError::UnsafeMember`].
const DO_NOT_USE: &str = "do not use this wheel";
/// What to do about [`ArtifactError::OtherVersion`].
const USE_THAT_VERSION: &str = "use a wheel of that version";
/// What to do about [`ArtifactError::OtherMachine`].
const NAME_THE_OTHER: &str = "name the wheel for this machine";
/// What to do about [`ArtifactError::NoCacheDir`].
const SET_CACHE_DIR: &str = "set FLASHINFER_RS_CACHE_DIR to a folder that can be written, or HOME";
/// What to do about [`ArtifactError::Locked`].
const WAIT: &str = "end it, or wait and try again";

fn not_found(member: &Member, searched: &[SearchedSource], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    if f.alternate() {
        write!(f, "{member} was found in none of its sources:")?;
        return searched.iter().try_for_each(|source| write!(f, "\n  - {source}"));
    }
    write!(f, "{member} was found in none of its {} sources", searched.len())?;
    match searched.last() {
        Some(last) => write!(f, "; the last: {last}"),
        None => Ok(()),
    }
}

/// Why no verified file could be had.
///
/// As text it is one line, which tells of the last source only. In the alternate form (`{:#}`)
/// each source that was searched has a line of its own, with what was found there and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArtifactError {
    /// No source holds the member.
    #[error(fmt = not_found)]
    NotFound {
        /// What was looked for.
        member: Member,
        /// Each source, in order.
        searched: Vec<SearchedSource>,
    },
    /// A file's content is not the one that its pin or its wheel's RECORD promises.
    #[error("wrong SHA-256 of {file}: expected {expected}, found {found}; {OBTAIN_AGAIN}")]
    DigestMismatch {
        /// The file, or a wheel and its member.
        file: String,
        /// The promised digest.
        expected: Digest,
        /// The digest of what is there.
        found: Digest,
    },
    /// A wheel cannot be read.
    #[error("{} is not a usable wheel: {reason}; {NAME_A_WHEEL}", .path.display())]
    BadWheel {
        /// The wheel.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A wheel holds a member whose name could write outside its folder.
    #[error("{} holds the unsafe member name {name:?}: {reason}; {DO_NOT_USE}", .wheel.display())]
    UnsafeMember {
        /// The wheel.
        wheel: PathBuf,
        /// The member's name.
        name: String,
        /// What is unsafe about it.
        reason: &'static str,
    },
    /// A wheel holds modules of another FlashInfer version than this crate calls.
    #[error("{} is of FlashInfer {found}; expected {expected}, whose functions this crate calls; {USE_THAT_VERSION}", .wheel.display())]
    OtherVersion {
        /// The wheel.
        wheel: PathBuf,
        /// The wheel's version.
        found: String,
        /// The pinned version.
        expected: String,
    },
    /// A wheel is for machines of another kind.
    #[error("{} is for {found}, by its name; expected {expected}; {NAME_THE_OTHER}", .wheel.display())]
    OtherMachine {
        /// The wheel.
        wheel: PathBuf,
        /// The platforms in its name.
        found: String,
        /// The platform that kernels are wanted for.
        expected: String,
    },
    /// Something that can name neither a module nor a file of a wheel was asked for.
    #[error(
        "{name:?} names no module, and no file of a wheel: expected at most 250 ASCII letters, digits, \
         `_`, `-`, `.` or `+`, in a file's path with `/` between the components"
    )]
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
    #[error("no cache folder is known on this machine: {SET_CACHE_DIR}")]
    NoCacheDir,
    /// Another process holds a lock for longer than the limit.
    #[error("another process has held {} for {} s; {WAIT}", .path.display(), .waited.as_secs())]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// How long this process has waited.
        waited: Duration,
    },
    /// Something that is no address of a file on a server was given for one.
    #[error("this is no address of a file: {reason}; expected one as https://host/file")]
    BadAddress {
        /// What is wrong with it. The address is not repeated, as it may hold a secret.
        reason: String,
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
        "no module matches {patterns} (`*` stands for any run of characters); {known} modules are at hand{}", .why.as_ref().map(|why| format!(", and {why}")).unwrap_or_default()
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
    /// What to do, where it is known: the end of a sentence, as in "use a wheel of that version".
    pub fn remedy(&self) -> Option<String> {
        let known: &str = match self {
            ArtifactError::NotFound { searched, .. } => {
                let remedies = searched.iter().map(|source| &source.remedy);
                return remedies.rev().find(|remedy| !remedy.is_empty()).cloned();
            }
            ArtifactError::DigestMismatch { .. } => OBTAIN_AGAIN,
            ArtifactError::BadWheel { .. } => NAME_A_WHEEL,
            ArtifactError::UnsafeMember { .. } => DO_NOT_USE,
            ArtifactError::OtherVersion { .. } => USE_THAT_VERSION,
            ArtifactError::OtherMachine { .. } => NAME_THE_OTHER,
            ArtifactError::Cache { remedy, .. } => remedy,
            ArtifactError::NoCacheDir => SET_CACHE_DIR,
            ArtifactError::Locked { .. } => WAIT,
            _ => return None,
        };
        Some(known.to_owned())
    }

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
