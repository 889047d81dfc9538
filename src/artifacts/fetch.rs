//! Downloads: streamed to disk, hashed while they flow, resumed after a break.
//!
//! A download lives in `<wheel>.partial`, under a lock, until it is complete and has the pin's
//! digest. Whatever broke it (a connection, a stall, a killed process), the next attempt hashes
//! what is there and asks the server for the rest. Attempts that bring enough that is new are not
//! counted; the others are, with a growing pause between them. A host that cannot be reached at
//! all is given up at once, because waiting seldom cures it and a build should not hang.

use super::cache::{Cache, Tell};
use super::digest::pump;
use super::http::{Address, Broken, Client, Patience, content_range};
use super::pins::Pin;
use super::sink::Sink;
use super::{ArtifactError, FetchOptions, Progress};
use std::io;
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
    let mut wheel = cache.partial(pin, tell)?;
    let mut best = wheel.len();
    loop {
        if wheel.len() > 0 && wheel.digest() == pin.sha256 {
            return cache.adopt(pin, wheel);
        }
        let broken = match attempt(&mut client, &mut wheel, pin, address, tell) {
            Ok(Complete::Yes) => {
                let (found, inherited) = (wheel.digest(), wheel.inherited());
                if found == pin.sha256 {
                    return cache.adopt(pin, wheel);
                }
                wheel.restart()?;
                if !inherited {
                    return Err(ArtifactError::DigestMismatch {
                        file: format!("{} from {}", pin.file, address.shown()),
                        expected: pin.sha256,
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
        if wheel.len() > best {
            let gained = wheel.len() - best;
            best = wheel.len();
            if patience.gain(gained) {
                continue;
            }
        }
        patience.pause(broken, |reason| failed(pin, address, reason))?;
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
    wheel: &mut Sink,
    pin: &Pin,
    address: &Address,
    tell: Tell<'_>,
) -> Result<Complete, Broken> {
    let from = wheel.len();
    let response = client.ask(address, (from > 0).then(|| format!("bytes={from}-")))?;
    let total = match response.status() {
        StatusCode::PARTIAL_CONTENT => match content_range(&response) {
            Some((range, total)) if *range.start() == from => total,
            _ => {
                wheel.restart().map_err(Broken::Disk)?;
                return Ok(Complete::Restarted);
            }
        },
        StatusCode::OK => {
            wheel.restart().map_err(Broken::Disk)?;
            response.body().content_length()
        }
        _ if from > 0 => {
            wheel.restart().map_err(Broken::Disk)?;
            return Ok(Complete::Restarted);
        }
        status => return Err(Broken::Lasting(format!("HTTP status {status}"))),
    };
    if let Some(total) = total.filter(|total| *total > MAX_SIZE) {
        return Err(Broken::Lasting(format!("the server announces {total} bytes")));
    }
    let file = pin.file.as_str();
    let done = wheel.len();
    tell(&Progress::Started { file, done, total });
    let interrupted = |e: io::Error| Broken::Passing(e.to_string());
    pump(&mut response.into_body(), interrupted, |bytes| {
        wheel.write(bytes).map_err(Broken::Disk)?;
        let done = wheel.len();
        if done > total.unwrap_or(MAX_SIZE) {
            wheel.restart().map_err(Broken::Disk)?;
            return Err(Broken::Passing(format!("more than {total:?} bytes came")));
        }
        tell(&Progress::Bytes { file, done, total });
        Ok(())
    })?;
    let done = wheel.len();
    match total {
        Some(total) if done < total => {
            Err(Broken::Passing(format!("the connection ended after {done} of {total} bytes")))
        }
        _ => Ok(Complete::Yes),
    }
}

/// Publishes a file that something else downloaded, if it has the pin's digest.
pub(crate) fn adopt(cache: &Cache, pin: &Pin, from: &Path) -> Result<PathBuf, ArtifactError> {
    let wheel = Sink::resume(from.into(), &cache.wheels().join(&pin.file), false, |_, _| ())?;
    let found = wheel.digest();
    if found == pin.sha256 {
        return cache.adopt(pin, wheel);
    }
    let file = from.display().to_string();
    Err(ArtifactError::DigestMismatch { file, expected: pin.sha256, found })
}
