//! Downloads: streamed to disk, hashed while they flow, resumed after a break.
//!
//! A download lives in `<file>.partial`, under a lock, until it is complete and has the digest
//! that was promised. Whatever broke it (a connection, a stall, a killed process), the next attempt hashes
//! what is there and asks the server for the rest. Attempts that bring enough that is new are not
//! counted; the others are, with a growing pause between them. A host that cannot be reached at
//! all is given up at once, because waiting seldom cures it and a build should not hang.

use super::cache::Files;
use super::digest::{Digest, pump};
use super::http::{Address, Broken, Client, Patience, content_range};
use super::sink::Sink;
use super::{ArtifactError, FetchOptions, OnProgress, Progress};
use std::io;
use std::path::{Path, PathBuf};
use ureq::http::StatusCode;

/// No wheel is larger.
pub(crate) const MAX_WHEEL: u64 = 16 << 30;

/// A file of a server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RemoteFile<'a> {
    /// What it is called on disk.
    pub(crate) file: &'a str,
    /// What it is called in errors.
    pub(crate) shown: &'a str,
    /// `None` where nobody knows it yet: then any complete file will do, and whoever asks verifies it.
    pub(crate) sha256: Option<Digest>,
    pub(crate) address: &'a Address,
    /// A server that sends more is broken.
    pub(crate) max_size: u64,
}

impl RemoteFile<'_> {
    /// The error of a download.
    fn failed(&self, reason: String) -> ArtifactError {
        failed(self.shown, self.address, reason)
    }
}

/// The error of a download.
pub(crate) fn failed(shown: &str, address: &Address, reason: String) -> ArtifactError {
    ArtifactError::Download { what: format!("{shown} from {}", address.shown()), reason }
}

/// Downloads a file, whose lock is held, and publishes it once it has its digest, or is complete
/// where that is not known.
pub(crate) fn download(
    files: &Files,
    wanted: RemoteFile<'_>,
    options: &FetchOptions,
    on_progress: OnProgress<'_>,
) -> Result<PathBuf, ArtifactError> {
    let RemoteFile { file, shown, sha256, address, .. } = wanted;
    let mut client = Client::new(options);
    let mut patience = Patience::new(options);
    let mut partial = files.partial(file, on_progress)?;
    let mut best = partial.len();
    loop {
        if partial.len() > 0 && sha256 == Some(partial.digest()) {
            let found = partial.digest();
            return files.adopt(file, found, partial);
        }
        let broken = match attempt(&mut client, &mut partial, wanted, on_progress) {
            Ok(Complete::Yes) => {
                let (found, inherited) = (partial.digest(), partial.inherited());
                let Some(sha256) = sha256.filter(|expected| *expected != found) else {
                    return files.adopt(file, found, partial);
                };
                partial.restart()?;
                if !inherited {
                    return Err(ArtifactError::DigestMismatch {
                        file: format!("{shown} from {}", address.shown()),
                        expected: sha256,
                        found,
                    });
                }
                // What an earlier process left was damaged: once more, from the first byte.
                best = 0;
                continue;
            }
            Ok(Complete::Restarted) => Broken::Passing("the server cannot resume there".into()),
            // Whatever the disk kept of the last bytes, it is not asked to go on.
            Err(Broken::Disk(e)) => return Err(e),
            Err(broken) => broken,
        };
        if partial.len() > best {
            let gained = partial.len() - best;
            best = partial.len();
            if patience.gain(gained) {
                continue;
            }
        }
        patience.pause(broken, |reason| wanted.failed(reason))?;
    }
}

enum Complete {
    Yes,
    Restarted,
}

/// One request, appended to what is there.
fn attempt(
    client: &mut Client,
    partial: &mut Sink,
    wanted: RemoteFile<'_>,
    on_progress: OnProgress<'_>,
) -> Result<Complete, Broken> {
    let RemoteFile { file, address, max_size, .. } = wanted;
    let from = partial.len();
    let response = client.ask(address, (from > 0).then(|| format!("bytes={from}-")))?;
    let total = match response.status() {
        StatusCode::PARTIAL_CONTENT => match content_range(&response) {
            Some((range, total)) if *range.start() == from => total,
            _ => {
                partial.restart().map_err(Broken::Disk)?;
                return Ok(Complete::Restarted);
            }
        },
        StatusCode::OK => {
            partial.restart().map_err(Broken::Disk)?;
            response.body().content_length()
        }
        _ if from > 0 => {
            partial.restart().map_err(Broken::Disk)?;
            return Ok(Complete::Restarted);
        }
        status => return Err(Broken::Lasting(format!("HTTP status {status}"))),
    };
    if let Some(total) = total.filter(|total| *total > max_size) {
        return Err(Broken::Lasting(format!("the server announces {total} bytes")));
    }
    let done = partial.len();
    on_progress(&Progress::Started { file, done, total });
    let interrupted = |e: io::Error| Broken::Passing(e.to_string());
    pump(&mut response.into_body(), interrupted, |bytes| {
        partial.write(bytes).map_err(Broken::Disk)?;
        let done = partial.len();
        if done > total.unwrap_or(max_size) {
            partial.restart().map_err(Broken::Disk)?;
            return Err(Broken::Passing(format!("more than {total:?} bytes came")));
        }
        on_progress(&Progress::Bytes { file, done, total });
        Ok(())
    })?;
    let done = partial.len();
    match total {
        Some(total) if done < total => {
            Err(Broken::Passing(format!("the connection ended after {done} of {total} bytes")))
        }
        _ => Ok(Complete::Yes),
    }
}

/// Publishes a file that something else downloaded, if it has its digest.
pub(crate) fn adopt(
    files: &Files,
    file: &str,
    sha256: Digest,
    from: &Path,
) -> Result<PathBuf, ArtifactError> {
    let complete = Sink::resume(from.into(), &files.path(file), false, |_, _| ())?;
    let found = complete.digest();
    if found == sha256 {
        return files.adopt(file, sha256, complete);
    }
    let file = from.display().to_string();
    Err(ArtifactError::DigestMismatch { file, expected: sha256, found })
}
