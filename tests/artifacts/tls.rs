//! Downloads over TLS that fails: what is told, and how soon.
use crate::artifact_support::*;
use flashinfer_rs::artifacts::{ArtifactError, Digest, Package, Store};
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};
use test_support::tls::TlsServer;

/// The address that a process of its own asks, and the folder of its cache.
const URL: &str = "TEST_URL";
const ROOT: &str = "TEST_ROOT";

fn body() -> Vec<u8> {
    module_wheel(&[("norm", &noise(3, 5_000))])
}

/// Fetches the wheel of a server, and says how it fails.
fn fetch(root: &Path, url: &str) -> Result<Vec<u8>, String> {
    let mut config = config(root, url_pins(&format!("{url}/wheel.whl"), Digest::of(&body())));
    config.offline = false;
    config.fetch_options.connect_timeout = Duration::from_secs(2);
    let begin = Instant::now();
    let fetched = Store::open(config).unwrap().fetch(Package::JitCache);
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
    match fetched {
        Ok(path) => Ok(fs::read(path).unwrap()),
        Err(error @ ArtifactError::Download { .. }) => Err(error.to_string()),
        Err(error) => panic!("{error}"),
    }
}

/// A server whose every connection does this.
fn server(each: impl Fn(TcpStream) + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || listener.incoming().flatten().for_each(each));
    url
}

/// Nothing is kept of what came, and the error says what failed, where, and what to do.
fn assert_refused(url: &str, reason: &str) {
    let dir = tempfile::tempdir().unwrap();
    let error = fetch(dir.path(), url).unwrap_err();
    for part in [reason, url, "TLS", "SSL_CERT_FILE"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(!error.contains('\n'), "{error}");
    assert!(files(dir.path(), &|name| name.ends_with(".whl")).is_empty());
}

#[test]
fn a_certificate_that_nobody_signed_is_refused() {
    assert_refused(&TlsServer::start("127.0.0.1", false, body()).url, "UnknownIssuer");
}

#[test]
fn a_server_that_speaks_no_tls_is_told() {
    let url = server(|mut stream| {
        let _ = stream.read(&mut [0; 4096]);
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n");
    });
    assert_refused(&url, "InvalidContentType");
}

#[test]
fn a_server_that_refuses_the_handshake_is_told() {
    // The alert `handshake_failure`.
    let url = server(|mut stream| {
        let _ = stream.read(&mut [0; 4096]);
        let _ = stream.write_all(&[21, 3, 3, 0, 2, 2, 40]);
    });
    assert_refused(&url, "HandshakeFailure");
}

#[test]
fn a_connection_that_ends_in_the_handshake_is_told() {
    for bytes in [0, 3] {
        let url = server(move |mut stream| {
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(&[22, 3, 3, 0, 100][..bytes]);
        });
        let dir = tempfile::tempdir().unwrap();
        let error = fetch(dir.path(), &url).unwrap_err();
        assert!(error.contains(&url) && error.contains("the server ended the connection"), "{error}");
    }
}

#[test]
fn a_handshake_that_stalls_times_out() {
    let url = server(|stream| {
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(60));
            drop(stream);
        });
    });
    let dir = tempfile::tempdir().unwrap();
    let error = fetch(dir.path(), &url).unwrap_err();
    assert!(error.contains("timeout"), "{error}");
}

/// Certificates that are named in `SSL_CERT_FILE`, which a process reads for itself.
#[test]
#[cfg(target_os = "linux")]
fn certificates_that_the_environment_names_are_trusted_as_far_as_they_go() {
    let dir = tempfile::tempdir().unwrap();
    for (case, host, expired, want) in [
        ("good", "127.0.0.1", false, "fetched"),
        ("other-host", "other.example", false, "not valid for name"),
        ("expired", "127.0.0.1", true, "expired"),
    ] {
        let server = TlsServer::start(host, expired, body());
        let root = dir.path().join(case);
        fs::create_dir(&root).unwrap();
        fs::write(root.join("pem"), &server.pem).unwrap();
        let mut child = child_command(module_path!(), "fetch_in_a_process");
        child.env(URL, &server.url).env(ROOT, &root).env("SSL_CERT_FILE", root.join("pem"));
        let output = child.stderr(Stdio::piped()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains(want), "{case}: {said}");
        assert_eq!(said.contains("SSL_CERT_FILE"), want != "fetched", "{case}: {said}");
    }
    // A file that is not there.
    let server = TlsServer::start("127.0.0.1", false, body());
    let mut child = child_command(module_path!(), "fetch_in_a_process");
    child.env(URL, &server.url).env(ROOT, dir.path()).env("SSL_CERT_FILE", dir.path().join("none"));
    let output = child.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("SSL_CERT_FILE"), "{said}");
}

#[test]
#[ignore = "run by certificates_that_the_environment_names_are_trusted_as_far_as_they_go"]
fn fetch_in_a_process() {
    match fetch(&variable(ROOT), variable(URL).to_str().unwrap()) {
        Ok(bytes) => println!("fetched {}", bytes == body()),
        Err(error) => println!("{error}"),
    }
}
