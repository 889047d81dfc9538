//! Small wheels, pins and HTTP servers for the tests of the artifacts layer.
#![allow(dead_code, reason = "each test file uses its own part")]

use flashinfer_rs::artifacts::{CudaKey, Digest, Pins, Store, StoreConfig};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use zip::write::SimpleFileOptions;

/// The member path of a module.
pub fn module_path(name: &str) -> String {
    format!("w.data/purelib/flashinfer_jit_cache/jit_cache/{name}/{name}.so")
}

/// Bytes that look like nothing and compress badly.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

pub fn base64url(digest: Digest) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for chunk in digest.as_bytes().chunks(3) {
        let mut bits = 0u32;
        for at in 0..3 {
            bits = bits << 8 | u32::from(*chunk.get(at).unwrap_or(&0));
        }
        for at in 0..=chunk.len() {
            text.push(DIGITS[(bits >> (18 - 6 * at)) as usize & 63] as char);
        }
    }
    text
}

pub fn record_line(name: &str, bytes: &[u8]) -> String {
    let hash = base64url(Digest::of(bytes));
    format!("{name},sha256={hash},{}\n", bytes.len())
}

/// A wheel with these members and this RECORD.
pub fn wheel_bytes(members: &[(&str, &[u8])], record: Option<&str>) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default();
    for (name, bytes) in members {
        zip.start_file(*name, options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    if let Some(record) = record {
        zip.start_file("w-1.dist-info/RECORD", options).unwrap();
        zip.write_all(record.as_bytes()).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// A correct wheel.
pub fn good_wheel(members: &[(&str, &[u8])]) -> Vec<u8> {
    let lines = members.iter().map(|(name, bytes)| record_line(name, bytes));
    let record: String = lines.chain(["w-1.dist-info/RECORD,,\n".into()]).collect();
    wheel_bytes(members, Some(&record))
}

/// A correct wheel that holds modules.
pub fn module_wheel(modules: &[(&str, &[u8])]) -> Vec<u8> {
    let named: Vec<_> = modules.iter().map(|(name, b)| (module_path(name), *b)).collect();
    let members: Vec<_> = named.iter().map(|(name, b)| (name.as_str(), *b)).collect();
    good_wheel(&members)
}

/// Marks a wheel in the cache as one that was found to have a digest.
pub fn stamp(wheel: &Path, sha256: Digest) {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(wheel).unwrap();
    let modified = metadata.mtime() * 1_000_000_000 + metadata.mtime_nsec();
    let changed = metadata.ctime() * 1_000_000_000 + metadata.ctime_nsec();
    let (device, inode) = (metadata.dev(), metadata.ino());
    let text = format!("{sha256} {} {modified} {changed} {device} {inode}\n", metadata.len());
    let name = wheel.file_name().unwrap().to_str().unwrap();
    std::fs::write(wheel.with_file_name(format!("{name}.verified")), text).unwrap();
}

/// Changes the size that the central directory states for a member.
pub fn lie_about_size(wheel: &mut [u8], member: &str, size: u32) {
    let name = member.as_bytes();
    let at = (0..wheel.len() - 46 - name.len())
        .find(|at| wheel[*at..].starts_with(b"PK\x01\x02") && wheel[at + 46..].starts_with(name))
        .expect("the member is in the central directory");
    wheel[at + 24..at + 28].copy_from_slice(&size.to_le_bytes());
}

/// Replaces text of equal length everywhere.
pub fn replace(bytes: &mut [u8], from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    for at in 0..bytes.len() - from.len() + 1 {
        if bytes[at..].starts_with(from.as_bytes()) {
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        }
    }
}

const TABLE: &str = "package.metadata.flashinfer_rs.pinned_wheels";

pub const WHEEL: &str = "flashinfer_jit_cache-0.6.13+test-cp39-abi3-linux_x86_64.whl";
pub const TVM_FFI_WHEEL: &str = "fake_tvm_ffi-1-py3-none-any.whl";

fn parse(manifest: &str) -> Pins {
    Pins::parse(manifest, CudaKey::new(13, 0), "x86_64").unwrap()
}

/// Pins with the module cache at an address.
pub fn url_pins(url: &str, sha256: Digest) -> Pins {
    parse(&format!(
        "[{TABLE}.flashinfer_jit_cache.cu130.x86_64]\nfile='{WHEEL}'\nsha256='{sha256}'\nurl='{url}'"
    ))
}

/// Pins with the module cache at an address, and with the digest of its RECORD.
pub fn member_pins(url: &str, wheel: &[u8], record: Digest) -> Pins {
    parse(&format!(
        "[{TABLE}.flashinfer_jit_cache.cu130.x86_64]\nfile='{WHEEL}'\nsha256='{}'\n\
         record_sha256='{record}'\nurl='{url}'",
        Digest::of(wheel)
    ))
}

/// Pins with a registry package.
pub fn registry_pins(sha256: Digest) -> Pins {
    parse(&format!(
        "[{TABLE}.apache_tvm_ffi.cu130.x86_64]\nfile='{TVM_FFI_WHEEL}'\nsha256='{sha256}'\n\
         package='Fake_TVM.ffi'\nversion='1'"
    ))
}

/// Pins with a registry package, and with the digest of its RECORD.
pub fn registry_member_pins(sha256: Digest, record: Digest) -> Pins {
    parse(&format!(
        "[{TABLE}.apache_tvm_ffi.cu130.x86_64]\nfile='{TVM_FFI_WHEEL}'\nsha256='{sha256}'\n\
         record_sha256='{record}'\npackage='Fake_TVM.ffi'\nversion='1'"
    ))
}

/// A configuration with its cache in `root/cache`, offline.
pub fn config(root: &Path, pins: Pins) -> StoreConfig {
    let mut config = StoreConfig::new(pins);
    config.cache_dir = Some(root.join("cache"));
    let options = &mut config.fetch_options;
    options.connect_timeout = Duration::from_secs(5);
    options.stall_timeout = Duration::from_millis(400);
    options.attempts = 4;
    options.retry_delay = Duration::from_millis(5);
    config
}

/// An offline store that serves one wheel, written to `root/w.whl`.
pub fn store_of(root: &Path, wheel: &[u8]) -> Store {
    let path = root.join("w.whl");
    std::fs::write(&path, wheel).unwrap();
    let mut config = config(root, url_pins("http://127.0.0.1:9/none", Digest::of(b"none")));
    config.wheels = vec![path];
    Store::open(config).unwrap()
}

/// Every file below a folder whose name `which` accepts.
pub fn files(folder: &Path, which: &dyn Fn(&str) -> bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path, which));
        } else if which(&entry.file_name().to_string_lossy()) {
            found.push(path);
        }
    }
    found
}

/// An ignored test of a module of this program, to be run as a process of its own.
pub fn child_command(module: &str, test: &str) -> Command {
    let (_program, module) = module.split_once("::").unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", &format!("{module}::{test}"), "--nocapture"]);
    command
}

/// Runs it, quietly.
pub fn child(module: &str, test: &str, variables: &[(&str, &Path)]) -> Child {
    let mut command = child_command(module, test);
    command.envs(variables.iter().copied()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap()
}

pub fn variable(name: &str) -> PathBuf {
    PathBuf::from(std::env::var_os(name).expect(name))
}

/// A request as a test server sees it.
#[derive(Default)]
pub struct Asked {
    pub number: usize,
    pub path: String,
    /// The first byte that is asked for.
    pub range: Option<usize>,
    /// The last one, if it is named.
    pub end: Option<usize>,
    /// Where the bytes that are sent are counted.
    pub sent: Arc<AtomicUsize>,
    pub authorization: Option<String>,
    pub accept: String,
}

/// A loopback HTTP server whose every answer is written by the test.
pub struct Server {
    pub url: String,
    pub asked: Arc<AtomicUsize>,
    /// The bytes of the bodies that [`send`] has sent.
    pub sent: Arc<AtomicUsize>,
    pub log: Arc<Mutex<Vec<String>>>,
}

impl Server {
    pub fn start(answer: impl Fn(&Asked, &mut TcpStream) + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (asked, sent): (Arc<AtomicUsize>, Arc<AtomicUsize>) = Default::default();
        let log = Arc::new(Mutex::default());
        let server =
            Server { url, asked: Arc::clone(&asked), sent: Arc::clone(&sent), log: Arc::clone(&log) };
        let answer = Arc::new(answer);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (answer, log) = (Arc::clone(&answer), Arc::clone(&log));
                let (asked, sent) = (Arc::clone(&asked), Arc::clone(&sent));
                std::thread::spawn(move || serve(stream, &*answer, (&asked, &sent), &log));
            }
        });
        server
    }

    pub fn count(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

fn serve(
    mut stream: TcpStream,
    answer: &dyn Fn(&Asked, &mut TcpStream),
    (count, sent): (&AtomicUsize, &Arc<AtomicUsize>),
    log: &Mutex<Vec<String>>,
) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let first = match lines.next() {
        Some(Ok(line)) => line,
        _ => return,
    };
    let mut asked = Asked {
        number: count.fetch_add(1, Ordering::SeqCst),
        path: first.split(' ').nth(1).unwrap_or_default().into(),
        sent: Arc::clone(sent),
        ..Asked::default()
    };
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').unwrap();
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                let (start, end) = value.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
                asked.range = Some(start.parse().unwrap());
                asked.end = end.parse().ok();
            }
            "authorization" => asked.authorization = Some(value.into()),
            "accept" => asked.accept = value.into(),
            _ => {}
        }
    }
    log.lock().unwrap().push(format!("{} {:?}", asked.path, asked.range));
    answer(&asked, &mut stream);
    let _ = stream.flush();
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut rest = Vec::new();
    let _ = stream.set_read_timeout(Some(Duration::from_millis(200)));
    let _ = stream.read_to_end(&mut rest);
}

/// A whole answer, or the asked range of it, of which only `limit` bytes are sent.
pub fn send(asked: &Asked, stream: &mut TcpStream, body: &[u8], limit: usize) {
    let start = asked.range.unwrap_or(0);
    let end = asked.end.map_or(body.len(), |end| body.len().min(end + 1));
    let head = match asked.range {
        Some(start) if start >= body.len() => {
            let head = "HTTP/1.1 416 Range Not Satisfiable\r\ncontent-length: 0\r\n\r\n";
            let _ = stream.write_all(head.as_bytes());
            return;
        }
        Some(start) => format!(
            "HTTP/1.1 206 Partial Content\r\ncontent-range: bytes {start}-{}/{}\r\n",
            end - 1,
            body.len()
        ),
        None => "HTTP/1.1 200 OK\r\n".into(),
    };
    let part = &body[start..end];
    let head = format!("{head}content-length: {}\r\nconnection: close\r\n\r\n", part.len());
    let _ = stream.write_all(head.as_bytes());
    let part = &part[..limit.min(part.len())];
    asked.sent.fetch_add(part.len(), Ordering::SeqCst);
    let _ = stream.write_all(part);
}

/// A page or an error, whole.
pub fn reply(stream: &mut TcpStream, status: &str, headers: &str, body: &[u8]) {
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\n{headers}content-length: {length}\r\nconnection: close\r\n\r\n");
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(body);
}
