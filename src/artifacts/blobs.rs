//! Files of a program's own, called by their digests: fetched, verified and shared by processes as
//! wheels are.

use super::cache::Files;
use super::digest::Digest;
use super::download::{self, RemoteFile};
use super::http::{self, Address, Client};
use super::{ArtifactError, Progress, StoreConfig};
use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// How the name of a blob begins; its digest follows.
const PREFIX: &str = "sha256-";
/// No file is larger.
const MAX_SIZE: u64 = 1 << 42;

/// A file that is wanted, by its digest.
#[derive(Clone, Copy, Debug)]
pub struct Blob<'a> {
    /// What progress and errors call it.
    pub name: &'a str,
    /// Its digest.
    pub sha256: Digest,
    /// Its size, where it is known: a server that sends more is broken.
    pub size: Option<u64>,
}

/// How much of a blob is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlobState {
    /// All of it, in so many bytes.
    Complete(u64),
    /// So many bytes, of a download that did not end.
    Partial(u64),
    /// Nothing.
    Missing,
}

/// A folder of files that are called by their digests.
///
/// Processes share it: what is there was verified, one process downloads a file while the others
/// wait for it, and what breaks off goes on later. Downloads, their limits and what is told of
/// them are as the [`StoreConfig`] says.
#[derive(Debug)]
pub struct BlobStore {
    files: Files,
    config: StoreConfig,
}

impl BlobStore {
    /// The blobs in `folder`, which need not exist yet.
    pub fn new(folder: PathBuf, config: StoreConfig) -> BlobStore {
        BlobStore { files: Files::new(folder, config.fetch_options.lock_timeout), config }
    }

    /// The file of a blob, if all of it is here. It is hashed, unless it looks as it did when it
    /// was hashed last.
    ///
    /// # Errors
    /// [`ArtifactError::DigestMismatch`] when the file that has its name is another one,
    /// [`ArtifactError::Cache`] when it cannot be read.
    pub fn find(&self, blob: &Blob<'_>) -> Result<Option<PathBuf>, ArtifactError> {
        self.files.find(&file_name(blob.sha256), blob.sha256, &|progress| self.on_progress(blob, progress))
    }

    /// The file of a blob, downloaded from `address` unless it is here.
    ///
    /// # Errors
    /// [`ArtifactError::Offline`] when downloads are forbidden, [`ArtifactError::Download`],
    /// [`ArtifactError::DigestMismatch`] when the server has another file,
    /// [`ArtifactError::Locked`] and [`ArtifactError::Cache`].
    pub fn fetch(&self, blob: &Blob<'_>, address: &Address) -> Result<PathBuf, ArtifactError> {
        // A file that was damaged is fetched anew.
        if let Ok(Some(path)) = self.find(blob) {
            return Ok(path);
        }
        check_online(&self.config, blob.name)?;
        let file = file_name(blob.sha256);
        let on_progress = |progress: &Progress<'_>| self.on_progress(blob, progress);
        let _lock = self.files.lock(&file, &on_progress)?;
        if let Ok(Some(path)) = self.find(blob) {
            return Ok(path);
        }
        let max_size = blob.size.unwrap_or(MAX_SIZE);
        let sha256 = Some(blob.sha256);
        let wanted = RemoteFile { file: &file, shown: blob.name, sha256, address, max_size };
        let path = download::download(&self.files, wanted, &self.config.fetch_options, &on_progress)?;
        on_progress(&Progress::Done { file: &file, path: &path });
        Ok(path)
    }

    /// How much of a blob is on disk. Nothing is hashed.
    pub fn state(&self, sha256: Digest) -> BlobState {
        let path = self.files.path(&file_name(sha256));
        let size = |path: &Path| {
            fs::symlink_metadata(path).ok().filter(|found| found.is_file()).map(|found| found.len())
        };
        match (size(&path), size(&Files::partial_of(&path))) {
            (Some(size), _) => BlobState::Complete(size),
            (None, Some(size)) => BlobState::Partial(size),
            (None, None) => BlobState::Missing,
        }
    }

    /// Removes all blobs but those in `keep`, and those that another process is fetching; returns
    /// the bytes freed. Only what a `BlobStore` wrote is removed.
    ///
    /// # Errors
    /// [`ArtifactError::Cache`] when something cannot be removed.
    pub fn retain(&self, keep: &BTreeSet<Digest>) -> Result<u64, ArtifactError> {
        let unwanted = |file: &str| {
            let digest = file.strip_prefix(PREFIX).and_then(Digest::from_hex);
            digest.is_some_and(|digest| file == file_name(digest) && !keep.contains(&digest))
        };
        let on_progress = |progress: &Progress<'_>| {
            if let Some(on_progress) = &self.config.progress {
                on_progress(progress);
            }
        };
        self.files.clean(BTreeSet::new(), |file| !unwanted(file), &on_progress)
    }

    /// Tells of progress under the blob's own name.
    fn on_progress(&self, blob: &Blob<'_>, progress: &Progress<'_>) {
        if let Some(on_progress) = &self.config.progress {
            on_progress(&progress.named(blob.name));
        }
    }
}

fn file_name(sha256: Digest) -> String {
    format!("{PREFIX}{sha256}")
}

/// What a server answered to the question for a page.
#[derive(Clone)]
pub struct Page {
    /// The status of HTTP.
    pub status: u16,
    /// The page, or what the server says instead.
    pub body: Vec<u8>,
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Page").field("status", &self.status).field("bytes", &self.body.len()).finish()
    }
}

/// Asks a server for a page of at most `max_size` bytes, whatever its status is. Redirects are
/// followed; credentials go to no other host.
///
/// # Errors
/// [`ArtifactError::Offline`] when downloads are forbidden, [`ArtifactError::Download`] when no
/// answer comes in time, or a larger one.
pub fn read_page(address: &Address, max_size: u64, config: &StoreConfig) -> Result<Page, ArtifactError> {
    let shown = address.shown();
    check_online(config, &shown)?;
    let mut client = Client::new(&config.fetch_options);
    let read = http::read_page(&mut client, address, &[], &config.fetch_options, max_size);
    let (_, status, body) = read.map_err(|reason| ArtifactError::Download { what: shown, reason })?;
    Ok(Page { status: status.as_u16(), body })
}

fn check_online(config: &StoreConfig, what: &str) -> Result<(), ArtifactError> {
    match config.offline {
        false => Ok(()),
        true => Err(ArtifactError::Offline {
            what: what.into(),
            reason: "the configuration or FLASHINFER_RS_OFFLINE forbids downloads".into(),
        }),
    }
}
