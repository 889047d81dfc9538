//! A server on loopback that speaks TLS, with a certificate that nobody signed but itself.

use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::Arc,
    thread,
    time::Duration,
};

use rcgen::{CertificateParams, CertifiedKey, KeyPair};
use rustls::{ServerConfig, ServerConnection, StreamOwned, crypto::ring, pki_types::PrivatePkcs8KeyDer};

/// How long the server waits for a client that says nothing.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server that gives the same file to each who asks.
pub struct TlsServer {
    /// Where it is, as `https://127.0.0.1:PORT`.
    pub url: String,
    /// Its certificate, for those who are to trust it.
    pub pem: String,
}

impl TlsServer {
    /// Serves `body` with a certificate of this host that is still good, or not any more.
    pub fn start(host: &str, expired: bool, body: Vec<u8>) -> Self {
        let CertifiedKey { cert, signing_key } = certificate(host, expired);
        let key = PrivatePkcs8KeyDer::from(signing_key.serialize_der());
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key.into())
            .unwrap();
        let (config, body) = (Arc::new(config), Arc::new(body));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (config, body) = (config.clone(), body.clone());
                // A client that breaks off is what tests are about.
                thread::spawn(move || serve(stream, config, &body));
            }
        });
        Self { url, pem: cert.pem() }
    }
}

fn certificate(host: &str, expired: bool) -> CertifiedKey<KeyPair> {
    let mut params = CertificateParams::new([host.to_owned()]).unwrap();
    if expired {
        params.not_after = rcgen::date_time_ymd(2001, 1, 1);
        params.not_before = rcgen::date_time_ymd(2000, 1, 1);
    }
    let signing_key = KeyPair::generate().unwrap();
    CertifiedKey { cert: params.self_signed(&signing_key).unwrap(), signing_key }
}

/// Answers one request.
fn serve(stream: TcpStream, config: Arc<ServerConfig>, body: &[u8]) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let connection = ServerConnection::new(config).map_err(std::io::Error::other)?;
    let mut reader = BufReader::new(StreamOwned::new(connection, stream));
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let stream = reader.get_mut();
    let length = body.len();
    write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n")?;
    stream.write_all(body)?;
    stream.conn.send_close_notify();
    stream.flush()
}
