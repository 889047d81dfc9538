//! Proxies of the environment: listeners on loopback that record what they are asked.
use crate::artifact_support::*;
use flashinfer_rs::artifacts::{Digest, Package, Store};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

fn wheel() -> Vec<u8> {
    module_wheel(&[("norm", &noise(70, 5000))])
}

/// A proxy that leads to no other host: it answers in the name of whatever it is asked for.
struct Proxy {
    at: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    fn start(tunnel: impl Fn(&mut TcpStream) -> std::io::Result<String> + Send + 'static) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (at, asked) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(Vec::new())));
        let log = Arc::clone(&asked);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
                let Ok(asked) = tunnel(&mut stream) else { continue };
                log.lock().unwrap().push(asked);
                let lines = BufReader::new(stream.try_clone().unwrap()).lines();
                if lines.map_while(Result::ok).any(|line| line.is_empty()) {
                    reply(&mut stream, "200 OK", "", &wheel());
                }
            }
        });
        Proxy { at, asked }
    }

    /// One that knows CONNECT, and answers it with `status`.
    fn http(status: &'static str) -> Proxy {
        Proxy::start(move |stream| {
            let lines = BufReader::new(stream.try_clone()?).lines().map_while(Result::ok);
            let lines: Vec<_> = lines.take_while(|line| !line.is_empty()).collect();
            write!(stream, "HTTP/1.1 {status}\r\n\r\n")?;
            let secret = lines.iter().find(|line| line.starts_with("Proxy-Authorization"));
            Ok([&lines[..1], secret.cloned().as_slice()].concat().join(" "))
        })
    }

    /// One that speaks SOCKS 5.
    fn socks() -> Proxy {
        Proxy::start(|stream| {
            let mut head = [0; 2];
            stream.read_exact(&mut head)?;
            assert_eq!(head[0], 5);
            stream.read_exact(&mut vec![0; head[1].into()])?;
            stream.write_all(&[5, 0])?;
            let mut head = [0; 4];
            stream.read_exact(&mut head)?;
            let host = match head[3] {
                1 => {
                    let mut ip = [0; 4];
                    stream.read_exact(&mut ip)?;
                    std::net::Ipv4Addr::from(ip).to_string()
                }
                3 => {
                    let mut size = [0];
                    stream.read_exact(&mut size)?;
                    let mut name = vec![0; size[0].into()];
                    stream.read_exact(&mut name)?;
                    String::from_utf8(name).unwrap()
                }
                other => panic!("address of kind {other}"),
            };
            let mut port = [0; 2];
            stream.read_exact(&mut port)?;
            stream.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0])?;
            Ok(format!("{host}:{}", u16::from_be_bytes(port)))
        })
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

#[test]
#[ignore = "a process that another test starts"]
fn child_fetches_a_wheel() {
    let url = variable("PROXY_TEST_URL");
    let mut config =
        config(&variable("PROXY_TEST_ROOT"), url_pins(url.to_str().unwrap(), Digest::of(&wheel())));
    config.offline = false;
    match Store::open(config).unwrap().fetch(Package::JitCache) {
        Ok(path) => assert_eq!(fs::read(path).unwrap(), wheel()),
        Err(e) => {
            eprintln!("{e}\n{e:?}");
            std::process::exit(7);
        }
    }
}

/// A child with these proxies only. Returns its error, if it failed.
fn fetch(url: &str, variables: &[(&str, &str)]) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let mut command = child_command(module_path!(), "child_fetches_a_wheel");
    for (name, _) in std::env::vars() {
        if name.to_ascii_lowercase().ends_with("_proxy") {
            command.env_remove(name);
        }
    }
    command.env_remove("REQUEST_METHOD").env("PROXY_TEST_URL", url).env("PROXY_TEST_ROOT", dir.path());
    let output = command.envs(variables.iter().copied()).stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    match output.status.code() {
        Some(0) => Ok(()),
        Some(7) => Err(text),
        code => panic!("{code:?}: {text}"),
    }
}

/// The file on a host that only a proxy knows.
const FAR: &str = "http://host.invalid/wheel.whl";

#[test]
fn socks_proxies_are_used() {
    for variable in ["ALL_PROXY", "all_proxy", "http_proxy"] {
        let proxy = Proxy::socks();
        fetch(FAR, &[(variable, &format!("socks5h://{}", proxy.at))]).unwrap();
        assert_eq!(proxy.asked(), ["host.invalid:80"], "{variable}");
    }
    // The host's address is looked up here.
    let proxy = Proxy::socks();
    fetch("http://127.0.0.1:9/wheel.whl", &[("ALL_PROXY", &format!("socks5://{}", proxy.at))]).unwrap();
    assert_eq!(proxy.asked(), ["127.0.0.1:9"]);
}

#[test]
fn the_scheme_of_the_request_decides() {
    let (own, other) = (Proxy::http("200 OK"), Proxy::http("200 OK"));
    let (own_url, other_url) = (format!("http://{}", own.at), other.at.to_string());
    fetch(FAR, &[("HTTP_PROXY", &own_url), ("ALL_PROXY", &other_url), ("https_proxy", &other_url)]).unwrap();
    fetch(FAR, &[("http_proxy", &own_url), ("HTTP_PROXY", &other_url)]).unwrap();
    assert_eq!(own.asked(), ["CONNECT host.invalid:80 HTTP/1.1"; 2]);

    let own = Proxy::http("403 Forbidden");
    let own_url = format!("http://{}", own.at);
    let text = fetch(
        "https://host.invalid/wheel.whl",
        &[("HTTPS_PROXY", &own_url), ("ALL_PROXY", &other_url), ("HTTP_PROXY", &other_url)],
    );
    let text = text.unwrap_err();
    assert!(text.contains("HTTPS_PROXY") && text.contains("403"), "{text}");
    assert_eq!(own.asked(), ["CONNECT host.invalid:443 HTTP/1.1"]);
    assert!(other.asked().is_empty(), "{:?}", other.asked());
}

#[test]
fn exceptions_are_asked_directly() {
    let server = Server::start(|asked, stream| send(asked, stream, &wheel(), usize::MAX));
    let url = format!("{}/wheel.whl", server.url);
    let port = server.url.rsplit_once(':').unwrap().1;
    let with_port = format!("127.0.0.1:{port}");
    let proxy = Proxy::http("200 OK");
    let proxy_url = format!("http://{}", proxy.at);
    for list in
        ["a.example, 127.0.0.1", "a.example 127.0.0.1", "127.0.0.1 ,b", "127.0.0.0/8", "*", &with_port]
    {
        for variable in ["NO_PROXY", "no_proxy"] {
            fetch(&url, &[("ALL_PROXY", &proxy_url), (variable, list)]).unwrap();
            assert!(proxy.asked().is_empty(), "{variable}={list}");
        }
    }
    assert_eq!(server.count(), 12);
    for list in ["a.example, 127.0.0.2", "128.0.0.0/8", "127.0.0.1:1", "", "27.0.0.1"] {
        fetch(&url, &[("ALL_PROXY", &proxy_url), ("NO_PROXY", list)]).unwrap();
    }
    assert_eq!((server.count(), proxy.asked().len()), (12, 5));
}

/// A setting that cannot be followed is an error, which names it, and never a direct connection.
#[test]
fn a_proxy_that_is_none_is_an_error() {
    let server = Server::start(|asked, stream| send(asked, stream, &wheel(), usize::MAX));
    let url = format!("{}/wheel.whl", server.url);
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for value in [
        "socks://me:secret@127.0.0.1:1080".to_owned(),
        "ftp://me:secret@127.0.0.1:1080".into(),
        "me:secret@127.0.0.1:port".into(),
        "http://me:se/cret@127.0.0.1:1".into(),
        "http://me:12/secret@127.0.0.1:1".into(),
        "http://me:12?secret@127.0.0.1:1".into(),
        "http://me:secret@".into(),
        "::secret::".into(),
        format!("http://me:secret@{closed}"),
        format!("socks5h://me:secret@{closed}"),
        format!("socks4://secret@{closed}"),
    ] {
        for variable in ["ALL_PROXY", "http_proxy"] {
            let text = fetch(&url, &[(variable, &value)]).unwrap_err();
            assert!(text.contains(variable) && !text.contains("secret"), "{value}: {text}");
        }
    }
    assert_eq!(server.count(), 0);
}

#[test]
fn credentials_of_a_proxy_reach_it_and_no_error() {
    let proxy = Proxy::http("407 Who");
    let text = fetch(FAR, &[("all_proxy", &format!("me:p%40ss@{}", proxy.at))]).unwrap_err();
    assert_eq!(proxy.asked(), ["CONNECT host.invalid:80 HTTP/1.1 Proxy-Authorization: Basic bWU6cEBzcw=="]);
    assert!(text.contains("407") && text.contains("all_proxy"), "{text}");
    for secret in ["p%40ss", "p@ss", "bWU6"] {
        assert!(!text.contains(secret), "{text}");
    }
}
