//! Downloads: streamed to disk, hashed while they flow, resumed after a break.
//!
//! A download lives in `<wheel>.partial`, under a lock, until it is complete and has the pin's
//! digest. Whatever broke it (a connection, a stall, a killed process), the next attempt hashes
//! what is there and asks the server for the rest. Attempts that bring enough that is new are not
//! counted; the others are, with a growing pause between them. A host that cannot be reached at
//! all is given up at once, because waiting seldom cures it and a build should not hang.

use super::cache::{Cache, Tell};
use super::digest::Hasher;
use super::http::{Address, Broken, Client, Patience, content_range};
use super::pins::Pin;
use super::{ArtifactError, Digest, FetchOptions, Progress};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use ureq::http::StatusCode;

/// No wheel is larger; a server that sends more is broken.
pub(crate) const MAX_SIZE: u64 = 16 << 30;

/// Downloads one file and publishes it once it has the pin's digest.
pub(crate) fn download(
    cache: &Cache,
    pin: &Pin,
    address: &Address,
    options: &FetchOptions,
    tell: Tell<'_>,
) -> Result<PathBuf, ArtifactError> {
    let mut client = Client::new(options);
    let mut patience = Patience::new(options);
    let mut partial = Partial::open(cache, pin, tell)?;
    let mut fresh = partial.hasher.len() == 0;
    let mut best = partial.hasher.len();
    loop {
        if partial.hasher.len() > 0 && partial.hasher.digest() == pin.sha256 {
            return partial.publish(cache, pin);
        }
        let broken = match attempt(&mut client, &mut partial, pin, address, tell) {
            Ok(Complete::Yes) => {
                let found = partial.hasher.digest();
                if found == pin.sha256 {
                    return partial.publish(cache, pin);
                }
                partial.discard();
                if fresh {
                    return Err(ArtifactError::DigestMismatch {
                        file: format!("{} from {}", pin.file, address.shown()),
                        expected: pin.sha256,
                        found,
                    });
                }
                // What an earlier process left was damaged: once more, from the first byte.
                partial = Partial::open(cache, pin, tell)?;
                (fresh, best) = (true, 0);
                continue;
            }
            Ok(Complete::Restarted) => {
                fresh = true;
                Broken::Passing("the server cannot resume there".into())
            }
            Err(broken) => broken,
        };
        fresh |= partial.restarted;
        if partial.hasher.len() > best {
            let gained = partial.hasher.len() - best;
            best = partial.hasher.len();
            if patience.gain(gained) {
                continue;
            }
        }
        let paused = patience.pause(broken, |reason| failed(pin, address, reason));
        paused.inspect_err(|_| partial.discard_if_empty())?;
    }
}

/// The error of a download.
pub(crate) fn failed(pin: &Pin, address: &Address, reason: String) -> ArtifactError {
    ArtifactError::Download { what: format!("{} from {}", pin.file, address.shown()), reason }
}

enum Complete {
    Yes,
    Restarted,
}

/// One request, appended to what is there.
fn attempt(
    client: &mut Client,
    partial: &mut Partial,
    pin: &Pin,
    address: &Address,
    tell: Tell<'_>,
) -> Result<Complete, Broken> {
    let from = partial.hasher.len();
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
    if let Some(total) = total.filter(|total| *total > MAX_SIZE) {
        return Err(Broken::Lasting(format!("the server announces {total} bytes")));
    }
    let file = pin.file.as_str();
    let done = partial.hasher.len();
    tell(&Progress::Started { file, done, total });
    let mut body = response.into_body();
    let mut buffer = vec![0; 1 << 17];
    loop {
        let n = match body.read(&mut buffer) {
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Broken::Passing(e.to_string())),
        };
        if n == 0 {
            break;
        }
        partial.write(&buffer[..n]).map_err(Broken::Disk)?;
        let done = partial.hasher.len();
        if done > total.unwrap_or(MAX_SIZE) {
            partial.restart().map_err(Broken::Disk)?;
            return Err(Broken::Passing(format!("more than {total:?} bytes came")));
        }
        tell(&Progress::Bytes { file, done, total });
    }
    let done = partial.hasher.len();
    match total {
        Some(total) if done < total => {
            Err(Broken::Passing(format!("the connection ended after {done} of {total} bytes")))
        }
        _ => Ok(Complete::Yes),
    }
}

/// A download on disk that is not complete, and the hash of what is there.
struct Partial {
    path: PathBuf,
    file: File,
    hasher: Hasher,
    restarted: bool,
}

impl Partial {
    fn open(cache: &Cache, pin: &Pin, tell: Tell<'_>) -> Result<Partial, ArtifactError> {
        let path = cache.wheels().join(format!("{}.partial", pin.file));
        if fs::symlink_metadata(&path).is_ok_and(|metadata| !metadata.is_file()) {
            let removed = fs::remove_file(&path);
            removed.map_err(|e| ArtifactError::cache(&path, "remove", e))?;
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(&path).map_err(|e| ArtifactError::cache(&path, "open", e))?;
        let hasher =
            hash_existing(&mut file, pin, tell).map_err(|e| ArtifactError::cache(&path, "read", e))?;
        Ok(Partial { path, file, hasher, restarted: false })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), ArtifactError> {
        let written = self.file.write_all(bytes);
        written.map_err(|e| ArtifactError::cache(&self.path, "write", e))?;
        self.hasher.update(bytes);
        Ok(())
    }

    /// Forgets what is there.
    fn restart(&mut self) -> Result<(), ArtifactError> {
        let cut = self.file.set_len(0);
        let cut = cut.and_then(|()| self.file.seek(SeekFrom::Start(0)));
        cut.map_err(|e| ArtifactError::cache(&self.path, "truncate", e))?;
        self.hasher = Hasher::default();
        self.restarted = true;
        Ok(())
    }

    fn publish(self, cache: &Cache, pin: &Pin) -> Result<PathBuf, ArtifactError> {
        cache.adopt_wheel(pin, &self.file, &self.path)
    }

    fn discard(&self) {
        let _ = fs::remove_file(&self.path);
    }

    fn discard_if_empty(&self) {
        if self.hasher.len() == 0 {
            self.discard();
        }
    }
}

fn hash_existing(file: &mut File, pin: &Pin, tell: Tell<'_>) -> io::Result<Hasher> {
    let total = file.metadata()?.len();
    let mut hasher = Hasher::default();
    let mut buffer = vec![0; 1 << 17];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(hasher);
        }
        hasher.update(&buffer[..n]);
        tell(&Progress::Verifying { file: &pin.file, done: hasher.len(), total });
    }
}

/// Publishes a file that something else downloaded, if it has the pin's digest.
pub(crate) fn adopt(cache: &Cache, pin: &Pin, from: &Path) -> Result<PathBuf, ArtifactError> {
    let file = File::open(from).map_err(|e| ArtifactError::cache(from, "open", e))?;
    let hashed = Digest::of_file(&file);
    let (found, _) = hashed.map_err(|e| ArtifactError::cache(from, "read", e))?;
    if found != pin.sha256 {
        let _ = fs::remove_file(from);
        return Err(ArtifactError::DigestMismatch {
            file: from.display().to_string(),
            expected: pin.sha256,
            found,
        });
    }
    cache.adopt_wheel(pin, &file, from)
}
