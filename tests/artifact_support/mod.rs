//! Small wheels, pins and HTTP servers for the tests of the artifacts layer.
#![allow(dead_code, reason = "each test file uses its own part")]

use flashinfer_rs::artifacts::{CudaKey, Digest, Package, Pins, Store, StoreConfig};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use test_support::required;
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

/// A provider's wheel, as upstream lays it out.
pub struct Provider {
    pub id: &'static str,
    pub version: &'static str,
    pub modules: Vec<(&'static str, Vec<u8>)>,
    /// Text of the manifest, and what stands there instead.
    pub changed: Option<(&'static str, &'static str)>,
}

impl Provider {
    pub fn new(id: &'static str, modules: &[(&'static str, &[u8])]) -> Provider {
        let modules = modules.iter().map(|(name, content)| (*name, content.to_vec())).collect();
        Provider { id, version: "0.7.4+cu130", modules, changed: None }
    }

    /// Its file name, as upstream has it.
    pub fn file(&self) -> String {
        format!("flashinfer_jit_cache_{}-{}-cp39-abi3-manylinux_2_28_x86_64.whl", self.id, self.version)
    }

    pub fn members(&self) -> Vec<(String, Vec<u8>)> {
        let Provider { id, version, modules, .. } = self;
        let folder =
            format!("flashinfer_jit_cache_{id}-{version}.data/purelib/flashinfer_jit_cache/providers/{id}");
        let names: Vec<_> = modules.iter().map(|(name, _)| format!("{name:?}")).collect();
        let manifest = format!(
            "{{\"schema_version\": 1, \"provider_id\": \"{id}\", \
             \"distribution\": \"flashinfer-jit-cache-{id}\", \"version\": \"{version}\", \
             \"cuda_architectures\": [\"{id}\"], \"modules\": [{}]}}",
            names.join(", ")
        );
        let manifest = match self.changed {
            Some((from, to)) => {
                assert!(manifest.contains(from), "{from} is not in {manifest}");
                manifest.replace(from, to)
            }
            None => manifest,
        };
        let modules = modules.iter();
        let modules =
            modules.map(|(name, content)| (format!("{folder}/jit_cache/{name}/{name}.so"), content.clone()));
        modules.chain([(format!("{folder}/manifest.json"), manifest.into_bytes())]).collect()
    }

    pub fn wheel(&self) -> Vec<u8> {
        let members = self.members();
        let members: Vec<_> = members.iter().map(|(name, bytes)| (name.as_str(), &bytes[..])).collect();
        flashinfer_wheel(&format!("flashinfer_jit_cache_{}-{}", self.id, self.version), &members)
    }
}

/// A correct wheel of a package, by its name and version.
pub fn flashinfer_wheel(distribution: &str, members: &[(&str, &[u8])]) -> Vec<u8> {
    let lines = members.iter().map(|(name, bytes)| record_line(name, bytes));
    let record: String = lines.chain([format!("{distribution}.dist-info/RECORD,,\n")]).collect();
    let place = format!("{distribution}.dist-info/RECORD");
    wheel_bytes(&[members, &[(place.as_str(), record.as_bytes())]].concat(), None)
}

/// What the later libtvm_ffi says of itself: not the package's version, which is 0.1.15.post2.
pub const LATER_TVM_FFI: &str = "0.1.16";

/// The wheel of a later libtvm_ffi than the pinned one, which serves as well; `None`, with the reason
/// printed, where it cannot be had.
pub fn later_tvm_ffi() -> Option<PathBuf> {
    let fetched = || {
        let mut config = StoreConfig::from_env()?;
        let (cuda, arch) = (config.pins.cuda(), std::env::consts::ARCH);
        let sha256 = match arch {
            "aarch64" => "5c807217f134272d6e08ffdeeb9f1b2c1f366e096712b4e47b88ee9103f80113",
            _ => "059eed9bfc94bcd41650fb8eefde74040a1bc7e7b1a6f0a8ff897b02b118875b",
        };
        config.pins.extend(&format!(
            "[{TABLE}.later_tvm_ffi.{cuda}.{arch}]\n\
             file = 'apache_tvm_ffi-0.1.15.post2-cp312-cp312-manylinux_2_24_{arch}.manylinux_2_28_{arch}.whl'\n\
             sha256 = '{sha256}'\npackage = 'apache-tvm-ffi'\nversion = '0.1.15.post2'\n"
        ))?;
        Store::open(config)?.fetch(Package::Other("later_tvm_ffi".into()))
    };
    fetched().map_err(|e| required::skip(required::LIBTVM_FFI, e)).ok()
}

/// `FLASHINFER_RS_WHEELS` with a wheel before the others.
pub fn wheels_after(wheel: &Path) -> std::ffi::OsString {
    let others = std::env::var_os("FLASHINFER_RS_WHEELS").unwrap_or_default();
    std::env::join_paths([wheel.to_owned()].into_iter().chain(std::env::split_paths(&others))).unwrap()
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
