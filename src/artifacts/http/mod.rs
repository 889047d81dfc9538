//! HTTP as this crate needs it: requests with a bound on every wait, through the machine's
//! proxies, with credentials that go nowhere else and are never shown.

mod address;
mod pace;
mod proxy;

pub use address::Address;
pub(crate) use pace::Patience;

use super::{ArtifactError, FetchOptions};
use pace::Pace;
use proxy::Proxies;
use std::fmt::Display;
use std::io::{self, Read};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use ureq::http::{HeaderName, HeaderValue, Response, StatusCode, header};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, BodyReader, Proxy};

const MAX_REDIRECTS: usize = 10;
const MAX_HEADERS: usize = 64 << 10;

/// Why an attempt ended.
#[derive(Debug)]
pub(crate) enum Broken {
    /// Trying again may help.
    Passing(String),
    /// It may, but the server wants to be left alone for so long.
    Busy(String, Duration),
    /// It will not.
    Lasting(String),
    /// The disk, not the network.
    Disk(ArtifactError),
}

impl Broken {
    /// The reason alone, for who does not try again.
    pub(crate) fn reason(self) -> String {
        match self {
            Broken::Passing(reason) | Broken::Busy(reason, _) | Broken::Lasting(reason) => reason,
            Broken::Disk(e) => e.to_string(),
        }
    }
}

/// An HTTP client, which keeps the connections of its last request.
pub(crate) struct Client {
    options: FetchOptions,
    proxies: Proxies,
    last: Option<Connections>,
}

/// Connections through the same proxy.
#[derive(Clone)]
struct Connections {
    proxy: Option<Proxy>,
    agent: Agent,
    /// Set when they were cut.
    cut: Arc<AtomicBool>,
}

impl Client {
    pub(crate) fn new(options: &FetchOptions) -> Client {
        Client { options: options.clone(), proxies: Proxies::from_env(), last: None }
    }

    /// Asks for a file, or for a range of its bytes. What comes back is the file, the range, or
    /// that there is no such range, or none at all.
    pub(crate) fn ask(&mut self, address: &Address, range: Option<String>) -> Result<Response<Body>, Broken> {
        let mut headers = vec![(header::ACCEPT_ENCODING, "identity")];
        headers.extend(range.as_deref().map(|range| (header::RANGE, range)));
        let (_, response) = self.get(address, &headers, None)?;
        match response.status() {
            StatusCode::OK
            | StatusCode::PARTIAL_CONTENT
            | StatusCode::RANGE_NOT_SATISFIABLE
            | StatusCode::NOT_IMPLEMENTED => Ok(response),
            status => {
                let reason = format!("HTTP status {status}");
                let passing = status.is_server_error()
                    || matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS);
                Err(match retry_after(&response) {
                    Some(pause) if passing => Broken::Busy(reason, pause),
                    _ if passing => Broken::Passing(reason),
                    _ => Broken::Lasting(reason),
                })
            }
        }
    }

    /// Asks for what is at an address, with all of its answer before `until`. Redirects are
    /// followed; returns where they lead to, with the credentials that are good there.
    pub(crate) fn get(
        &mut self,
        address: &Address,
        headers: &[(HeaderName, &str)],
        until: Option<Instant>,
    ) -> Result<(Address, Response<Body>), Broken> {
        let mut address = address.clone();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(&address, headers, until)?;
            let location = match response.status().as_u16() {
                301 | 302 | 303 | 307 | 308 => response.headers().get(header::LOCATION),
                _ => None,
            };
            let Some(location) = location else { return Ok((address, response)) };
            let location = String::from_utf8_lossy(location.as_bytes());
            let moved = address.link(address.url(), &location);
            address = moved.map_err(|e| {
                Broken::Lasting(format!("the server redirects to an address that cannot be used: {e}"))
            })?;
        }
        Err(Broken::Lasting(format!("it redirects more than {MAX_REDIRECTS} times")))
    }

    fn send(
        &mut self,
        address: &Address,
        headers: &[(HeaderName, &str)],
        until: Option<Instant>,
    ) -> Result<Response<Body>, Broken> {
        let (variable, proxy) = self.proxies.of(address.url()).map_err(Broken::Lasting)?.unzip();
        let connections = self.connections(proxy);
        let mut request = connections.agent.get(address.url().as_str());
        for (name, value) in headers {
            request = request.header(name, *value);
        }
        if let Some(authorization) = address.authorization() {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        if let Some(until) = until {
            let left = until.saturating_duration_since(Instant::now());
            request = request.config().timeout_global(Some(left)).build();
        }
        let (parts, body) = request.call().map_err(|e| classify(e, variable))?.into_parts();
        let pace = Pace::watch(&self.options, move || {
            connections.cut.store(true, Ordering::SeqCst);
            connections.agent.shutdown();
        })?;
        let body = Body { length: body.content_length(), reader: body.into_reader(), pace };
        Ok(Response::from_parts(parts, body))
    }

    /// Connections through a proxy: those of the last request, if they fit.
    fn connections(&mut self, proxy: Option<Proxy>) -> Connections {
        let last = self.last.take();
        let last = last.filter(|last| last.proxy == proxy && !last.cut.load(Ordering::SeqCst));
        let connections = last.unwrap_or_else(|| Connections {
            agent: agent(&self.options, proxy.clone()),
            proxy,
            cut: Arc::default(),
        });
        self.last = Some(connections.clone());
        connections
    }
}

/// The answer to the question for a page, of at most `max_size` bytes and within the time for
/// pages: the address that redirects led to, its status, and what came.
pub(crate) fn read_page(
    client: &mut Client,
    address: &Address,
    headers: &[(HeaderName, &str)],
    options: &FetchOptions,
    max_size: u64,
) -> Result<(Address, StatusCode, Vec<u8>), String> {
    let until = Instant::now().checked_add(options.page_timeout);
    let (at, response) = client.get(address, headers, until).map_err(Broken::reason)?;
    let status = response.status();
    let mut bytes = Vec::new();
    let mut body = response.into_body().take(max_size.saturating_add(1));
    body.read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    match bytes.len() as u64 > max_size {
        true => Err(format!("the page has more than {max_size} bytes")),
        false => Ok((at, status, bytes)),
    }
}

/// The machine's certificates, and a limit on every wait.
fn agent(options: &FetchOptions, proxy: Option<Proxy>) -> Agent {
    Agent::config_builder()
        .http_status_as_error(false)
        .user_agent(concat!("flashinfer-rs/", env!("CARGO_PKG_VERSION")))
        .proxy(proxy)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .max_response_header_size(MAX_HEADERS)
        .timeout_resolve(Some(options.connect_timeout))
        .timeout_connect(Some(options.connect_timeout))
        .timeout_send_request(Some(options.stall_timeout))
        .timeout_recv_response(Some(options.stall_timeout))
        .timeout_per_read(Some(options.stall_timeout))
        .timeout_per_write(Some(options.stall_timeout))
        .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
        .build()
        .new_agent()
}

/// A request's error, by whether the host was reached at all.
fn classify(error: ureq::Error, proxy: Option<&str>) -> Broken {
    use ureq::{Error, Timeout};
    let mut text = describe(&error);
    if let Some(variable) = proxy {
        text += &format!(" (through the proxy that {variable} names)");
    }
    match error {
        Error::HostNotFound
        | Error::ConnectionFailed
        | Error::ConnectProxyFailed(_)
        | Error::Timeout(Timeout::Resolve | Timeout::Connect)
        | Error::Http(_)
        | Error::BadUri(_)
        | Error::InvalidProxyUrl
        | Error::LargeResponseHeader(..)
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

/// The text of an error, without those parts that repeat an address or a header.
fn describe(error: &ureq::Error) -> String {
    match error {
        ureq::Error::BadUri(_) | ureq::Error::Http(_) => "the address cannot be asked for".into(),
        ureq::Error::Protocol(_) => "the answer is no proper HTTP".into(),
        ureq::Error::Io(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            "the server ended the connection".into()
        }
        // What goes wrong in TLS comes as data that is not as it should be.
        ureq::Error::Io(e) if e.kind() == io::ErrorKind::InvalidData => tls_fails(e),
        ureq::Error::Rustls(e) => tls_fails(e),
        ureq::Error::Tls(e) => tls_fails(e),
        error => error.to_string(),
    }
}

/// That the server cannot be trusted, or understood, and what to do.
fn tls_fails(reason: impl Display) -> String {
    format!(
        "TLS fails: {reason}; check the address and the machine's clock, and where the certificate is of an \
         authority of your own, or of a proxy's, name a file of trusted certificates in SSL_CERT_FILE"
    )
}

/// What a server sends, at the pace that [`FetchOptions`] asks for.
pub(crate) struct Body {
    length: Option<u64>,
    reader: BodyReader<'static>,
    pace: Pace,
}

impl Body {
    /// Its size, if the server has told it.
    pub(crate) fn content_length(&self) -> Option<u64> {
        self.length
    }
}

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.pace.begin();
        let read = self.reader.read(buffer);
        match self.pace.end(*read.as_ref().unwrap_or(&0)) {
            Some(slow) => Err(io::Error::other(slow)),
            None => read.map_err(|e| match e.kind() {
                io::ErrorKind::Interrupted => e,
                _ => io::Error::other(describe(&e.into())),
            }),
        }
    }
}

/// `Content-Range: bytes 5-9/10` as the range and the total.
pub(crate) fn content_range(response: &Response<Body>) -> Option<(RangeInclusive<u64>, Option<u64>)> {
    let value = response.headers().get(header::CONTENT_RANGE)?;
    let (range, total) = value.to_str().ok()?.strip_prefix("bytes ")?.split_once('/')?;
    let (start, end) = range.split_once('-')?;
    Some((start.trim().parse().ok()?..=end.trim().parse().ok()?, total.trim().parse().ok()))
}

/// `Retry-After`, in seconds. A date there is left to the pauses between attempts.
fn retry_after(response: &Response<Body>) -> Option<Duration> {
    let seconds = response.headers().get(header::RETRY_AFTER).map(HeaderValue::as_bytes)?;
    let seconds = std::str::from_utf8(seconds).ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}
