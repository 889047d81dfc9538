//! Models come from a server on this machine that answers as Hugging Face's hub does: it lists a
//! repository, and leads to files on another server.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use test_support::tls::TlsServer;

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// That of the revision `refs/pr/1`.
const OTHER_COMMIT: &str = "89abcdef0123456789abcdef0123456789abcdef";

/// A question to a server.
#[derive(Clone, Debug, Default)]
struct Asked {
    path: String,
    authorization: Option<String>,
    /// The first byte that is wanted.
    from: Option<usize>,
}

/// What a server says.
struct Answer {
    status: &'static str,
    header: String,
    body: Vec<u8>,
    /// How much of the body is sent before the connection ends.
    sent: usize,
}

impl Answer {
    fn new(status: &'static str, header: String, body: impl Into<Vec<u8>>) -> Self {
        Self { status, header, body: body.into(), sent: usize::MAX }
    }

    fn status(status: &'static str) -> Self {
        Self::new(status, String::new(), "no")
    }

    /// A file, or what is wanted of it.
    fn file(asked: &Asked, body: &[u8]) -> Self {
        match asked.from {
            None => Self::new("200 OK", String::new(), body),
            Some(from) => {
                let range = format!("content-range: bytes {from}-{}/{}\r\n", body.len() - 1, body.len());
                Self::new("206 Partial Content", range, &body[from..])
            }
        }
    }
}

struct Server {
    url: String,
    log: Arc<Mutex<Vec<Asked>>>,
}

impl Server {
    fn start(answer: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let (kept, answer) = (Arc::clone(&log), Arc::new(answer));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, answer) = (Arc::clone(&kept), Arc::clone(&answer));
                thread::spawn(move || talk(stream, &log, &*answer));
            }
        });
        Self { url, log }
    }

    fn asked(&self) -> Vec<Asked> {
        self.log.lock().unwrap().clone()
    }
}

fn talk(mut stream: TcpStream, log: &Mutex<Vec<Asked>>, answer: &dyn Fn(&Asked) -> Answer) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(|line| line.ok());
    let Some(first) = lines.next() else { return };
    let mut asked = Asked { path: first.split(' ').nth(1).unwrap().into(), ..Asked::default() };
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ").unwrap();
        match name.to_ascii_lowercase().as_str() {
            "authorization" => asked.authorization = Some(value.into()),
            "range" => asked.from = value["bytes=".len()..].trim_end_matches('-').parse().ok(),
            _ => {}
        }
    }
    log.lock().unwrap().push(asked.clone());
    let Answer { status, header, body, sent } = answer(&asked);
    let head =
        format!("HTTP/1.1 {status}\r\n{header}content-length: {}\r\nconnection: close\r\n\r\n", body.len());
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(&body[..sent.min(body.len())]);
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.set_read_timeout(Some(Duration::from_millis(200)));
    let _ = stream.read_to_end(&mut Vec::new());
}

/// Bytes that differ from place to place.
fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect()
}

/// A repository's listing, of these files.
fn listing(files: &[(&str, &[u8])]) -> String {
    let file = |(path, content): &(&str, &[u8])| {
        let lfs = serde_json::json!({"sha256": Digest::of(content).to_string(), "size": content.len()});
        serde_json::json!({"rfilename": path, "size": content.len(), "lfs": lfs})
    };
    let siblings: Vec<_> = files.iter().map(file).collect();
    serde_json::json!({"sha": COMMIT, "gated": false, "siblings": siblings}).to_string()
}

/// A hub with one repository, `org/repo`, whose files another server sends.
struct FakeHub {
    hub: Server,
    cdn: Server,
}

impl FakeHub {
    fn start(
        files: &'static [(&'static str, &'static [u8])],
        send: impl Fn(&Asked, &[u8]) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let cdn = Server::start(move |asked| {
            let path = asked.path.trim_start_matches("/blobs/").trim_start_matches("other/");
            let content = files.iter().find(|(of, _)| *of == path);
            content.map_or_else(|| Answer::status("404 Not Found"), |(_, content)| send(asked, content))
        });
        let moved = cdn.url.clone();
        let hub = Server::start(move |asked| match asked.path.as_str() {
            "/api/models/org/repo?blobs=true" => Answer::new("200 OK", String::new(), listing(files)),
            "/api/models/org/repo/revision/refs%2Fpr%2F1?blobs=true" => {
                Answer::new("200 OK", String::new(), listing(files).replace(COMMIT, OTHER_COMMIT))
            }
            path => {
                let of = |commit| path.strip_prefix(&format!("/org/repo/resolve/{commit}/"));
                match of(COMMIT).map(String::from).or(of(OTHER_COMMIT).map(|file| format!("other/{file}"))) {
                    Some(file) => Answer::new("302 Found", format!("location: {moved}/blobs/{file}\r\n"), ""),
                    None => Answer::status("404 Not Found"),
                }
            }
        });
        Self { hub, cdn }
    }
}

fn config(folder: &Path) -> StoreConfig {
    let mut config = store_config().unwrap();
    config.cache_dir = Some(folder.into());
    (config.env_wheels, config.offline, config.progress) = (Vec::new(), false, None);
    config.fetch_options.attempts = 2;
    config.fetch_options.retry_delay = Duration::from_millis(1);
    config.fetch_options.stall_timeout = Duration::from_secs(5);
    config
}

fn open_with(folder: &Path, endpoint: &str, token: Option<&str>) -> Hub {
    let huggingface = HuggingFace { endpoint: endpoint.into(), token: token.map(String::from) };
    Hub::new(config(folder), huggingface, None).unwrap()
}

fn open(folder: &Path, fake: &FakeHub) -> Hub {
    open_with(folder, &fake.hub.url, Some("hf_secret"))
}

fn name(text: &str) -> ModelName {
    text.parse().unwrap()
}

fn names(hub: &Hub) -> Vec<(String, u64, bool)> {
    hub.list().unwrap().into_iter().map(|entry| (entry.name, entry.size, entry.complete)).collect()
}

/// Every file below a folder but locks.
fn files(folder: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.path() {
            path if path.is_dir() => found.extend(files(&path)),
            path if !path.to_str().unwrap().ends_with(".lock") => drop(found.insert(path)),
            _ => {}
        }
    }
    found
}

static REPOSITORY: &[(&str, &[u8])] = &[
    ("folder/x-Q4_K_M.gguf", b"four bits"),
    ("x-Q8_0-00001-of-00002.gguf", b"eight"),
    ("README.md", b"read"),
    ("x-Q8_0-00002-of-00002.gguf", b"bits"),
    ("copy.gguf", b"four bits"),
];

#[test]
fn models_of_a_hub_are_fetched_once_listed_and_removed() {
    let (folder, fake) = (tempfile::tempdir().unwrap(), FakeHub::start(REPOSITORY, Answer::file));
    let hub = open(folder.path(), &fake);
    assert_eq!(names(&hub), []);
    let four = name("hf.co/org/repo");
    let paths = hub.locate(&four).unwrap();
    assert_eq!(paths.iter().map(|path| fs::read(path).unwrap()).collect::<Vec<_>>(), [b"four bits"]);
    let eight = hub.locate(&name("hf.co/org/repo:q8_0")).unwrap();
    assert_eq!(eight.iter().flat_map(|path| fs::read(path).unwrap()).collect::<Vec<_>>(), b"eightbits");
    let asked = fake.cdn.asked();
    assert_eq!(asked[0].path, "/blobs/folder/x-Q4_K_M.gguf");
    assert_eq!((asked.len(), fake.hub.asked().len()), (3, 5));
    // The token goes to the hub and nowhere else.
    assert!(asked.iter().all(|asked| asked.authorization.is_none()), "{asked:?}");
    let token = Some("Bearer hf_secret".to_owned());
    assert!(fake.hub.asked().iter().all(|asked| asked.authorization == token));
    // What is here is asked for only by `pull`, and then only listed.
    let hub = open(folder.path(), &fake);
    assert_eq!(hub.locate(&four).unwrap(), paths);
    assert_eq!((fake.cdn.asked().len(), fake.hub.asked().len()), (3, 5));
    assert_eq!(hub.pull(&four).unwrap(), paths);
    assert_eq!((fake.cdn.asked().len(), fake.hub.asked().len()), (3, 6));
    // The same content under another name.
    assert_eq!(hub.locate(&name("hf.co/org/repo:copy.gguf")).unwrap(), paths);
    assert_eq!(fake.cdn.asked().len(), 3);
    let listed = ["hf.co/org/repo", "hf.co/org/repo:copy.gguf", "hf.co/org/repo:q8_0"]
        .map(|name| (name.to_owned(), 9, true));
    assert_eq!(names(&hub), listed);
    assert_eq!(hub.remove(&four).unwrap(), 0);
    assert!(paths[0].exists());
    assert!(hub.remove(&name("hf.co/org/repo:copy.gguf")).unwrap() >= 9);
    assert!(!paths[0].exists() && eight[0].exists());
    let error = hub.remove(&four).unwrap_err().to_string();
    assert!(error.contains("hf.co/org/repo is not on this machine"), "{error}");
    hub.remove(&name("hf.co/org/repo:q8_0")).unwrap();
    assert_eq!(files(folder.path()), BTreeSet::new());
}

#[test]
fn a_revision_is_a_model_of_its_own() {
    let (folder, fake) = (tempfile::tempdir().unwrap(), FakeHub::start(REPOSITORY, Answer::file));
    let hub = open(folder.path(), &fake);
    let revision = name("hf.co/org/repo@refs/pr/1:Q4_K_M");
    let path = hub.locate(&revision).unwrap().remove(0);
    assert_eq!(fs::read(&path).unwrap(), b"four bits");
    // What is fetched is of the commit that was listed.
    assert_eq!(fake.cdn.asked()[0].path, "/blobs/other/folder/x-Q4_K_M.gguf");
    assert_eq!(names(&hub), [("hf.co/org/repo@refs/pr/1:Q4_K_M".into(), 9, true)]);
    let error = hub.locate(&name("hf.co/org/repo@v9")).unwrap_err().to_string();
    assert!(error.contains("does not list hf.co/org/repo@v9") && error.contains("revision"), "{error}");
    hub.remove(&revision).unwrap();
    assert!(!path.exists());
}

#[test]
fn only_what_the_program_wrote_is_removed() {
    let (folder, fake) = (tempfile::tempdir().unwrap(), FakeHub::start(REPOSITORY, Answer::file));
    let hub = open(folder.path(), &fake);
    let path = hub.locate(&name("hf.co/org/repo")).unwrap().remove(0);
    let blobs = path.parent().unwrap();
    let foreign = format!("sha256-{}", Digest::of(b"foreign"));
    let kept: Vec<_> = ["notes.txt", foreign.as_str(), "sha256-12", "sha256-12.lock"]
        .iter()
        .map(|name| blobs.join(name))
        .chain([folder.path().join("models/manifests/mine.json")])
        .collect();
    kept.iter().for_each(|path| fs::write(path, "mine").unwrap());
    hub.remove(&name("hf.co/org/repo")).unwrap();
    assert!(!path.exists());
    assert!(kept.iter().all(|path| path.exists()), "{:?}", files(folder.path()));
}

#[test]
fn a_download_that_breaks_off_goes_on() {
    let content: &'static [u8] = bytes(500_000).leak();
    let files: &'static [_] = vec![("x.gguf", content)].leak();
    let folder = tempfile::tempdir().unwrap();
    let cut = |asked: &Asked, content: &[u8]| Answer { sent: 200_000, ..Answer::file(asked, content) };
    let fake = FakeHub::start(files, cut);
    let path = open(folder.path(), &fake).locate(&name("hf.co/org/repo")).unwrap().remove(0);
    assert_eq!(fs::read(path).unwrap(), content);
    let from: Vec<_> = fake.cdn.asked().iter().map(|asked| asked.from).collect();
    assert_eq!(from, [None, Some(200_000), Some(400_000)]);
}

#[test]
fn what_an_earlier_run_left_is_shown_and_gone_on_with_or_removed() {
    let content: &'static [u8] = bytes(300_000).leak();
    let listed: &'static [_] = vec![("x.gguf", content)].leak();
    let folder = tempfile::tempdir().unwrap();
    // The first answer ends early, and then the server fails.
    let failing = FakeHub::start(listed, |asked, content| match asked.from {
        None => Answer { sent: 100_000, ..Answer::file(asked, content) },
        Some(_) => Answer::status("500 Internal Server Error"),
    });
    let model = name("hf.co/org/repo:x.gguf");
    let hub = open(folder.path(), &failing);
    let error = hub.locate(&model).unwrap_err().to_string();
    assert!(error.contains("x.gguf from") && error.contains("500"), "{error}");
    assert_eq!(names(&hub), [("hf.co/org/repo:x.gguf".into(), 100_000, false)]);
    let fake = FakeHub::start(listed, Answer::file);
    let path = open(folder.path(), &fake).locate(&model).unwrap().remove(0);
    assert_eq!(fs::read(path).unwrap(), content);
    assert_eq!(fake.cdn.asked().iter().map(|asked| asked.from).collect::<Vec<_>>(), [Some(100_000)]);
    // No listing was needed.
    assert_eq!(fake.hub.asked().len(), 1);

    let other = tempfile::tempdir().unwrap();
    let hub = open(other.path(), &failing);
    hub.locate(&model).unwrap_err();
    assert_eq!(hub.remove(&model).unwrap(), 100_000);
    assert_eq!((names(&hub), files(other.path())), (vec![], BTreeSet::new()));
}

#[test]
fn a_file_with_another_digest_is_never_a_model() {
    let folder = tempfile::tempdir().unwrap();
    let fake = FakeHub::start(REPOSITORY, |asked, _| Answer::file(asked, b"evil bits"));
    let hub = open(folder.path(), &fake);
    let error = hub.locate(&name("hf.co/org/repo")).unwrap_err().to_string();
    for part in ["wrong SHA-256 of x-Q4_K_M.gguf", &Digest::of(b"four bits").to_string()] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(names(&hub), [("hf.co/org/repo".into(), 0, false)]);
    // More than the hub listed is not even kept.
    let fake = FakeHub::start(REPOSITORY, |asked, _| Answer::file(asked, &bytes(100_000)));
    let error = open(folder.path(), &fake).locate(&name("hf.co/org/repo")).unwrap_err().to_string();
    assert!(error.contains("100000 bytes"), "{error}");
    // A file that was changed here is fetched anew.
    let good = FakeHub::start(REPOSITORY, Answer::file);
    let hub = open(folder.path(), &good);
    let path = hub.locate(&name("hf.co/org/repo")).unwrap().remove(0);
    fs::write(&path, "evil bits").unwrap();
    let hub = open(folder.path(), &good);
    assert_eq!(hub.locate(&name("hf.co/org/repo")).unwrap(), [path.as_path()]);
    assert_eq!(fs::read(path).unwrap(), b"four bits");
}

#[test]
fn refusals_say_what_to_do() {
    for (status, token, parts) in [
        ("401 Unauthorized", None, &["HTTP status 401", "set HF_TOKEN"][..]),
        ("404 Not Found", None, &["HTTP status 404", "check the name", "set HF_TOKEN"]),
        ("401 Unauthorized", Some("hf_secret"), &["it does not accept HF_TOKEN"]),
        ("404 Not Found", Some("hf_secret"), &["none of this name and revision that HF_TOKEN may read"]),
        ("403 Forbidden", Some("hf_secret"), &["HF_TOKEN may not read it"]),
        ("429 Too Many", None, &["HTTP status 429", "wait"]),
        ("503 Busy", None, &["HTTP status 503", "try again later"]),
    ] {
        let server = Server::start(move |_| Answer::status(status));
        let folder = tempfile::tempdir().unwrap();
        let hub = open_with(folder.path(), &server.url, token);
        let error = hub.pull(&name("hf.co/org/repo")).unwrap_err().to_string();
        assert!(error.contains("does not list hf.co/org/repo") && !error.contains("hf_secret"), "{error}");
        parts.iter().for_each(|part| assert!(error.contains(part), "{part}: {error}"));
        assert_eq!(files(folder.path()), BTreeSet::new());
    }
    // A repository whose terms must be accepted is listed, and its files are refused.
    let gated = listing(REPOSITORY).replace("false", "\"manual\"");
    let server = Server::start(move |asked| match asked.path.starts_with("/api/") {
        true => Answer::new("200 OK", String::new(), gated.clone()),
        false => Answer::status("403 Forbidden"),
    });
    let folder = tempfile::tempdir().unwrap();
    let error =
        open_with(folder.path(), &server.url, None).pull(&name("hf.co/org/repo")).unwrap_err().to_string();
    let page = format!("{}/org/repo", server.url);
    assert!(error.contains("403") && error.contains(&page) && error.contains("HF_TOKEN"), "{error}");
}

#[test]
fn a_hub_whose_certificate_nobody_signed_is_not_asked() {
    let (folder, server) = (tempfile::tempdir().unwrap(), TlsServer::start("127.0.0.1", false, Vec::new()));
    let hub = open_with(folder.path(), &server.url, Some("hf_secret"));
    let error = hub.pull(&name("hf.co/org/repo")).unwrap_err().to_string();
    for part in [server.url.as_str(), "TLS fails", "UnknownIssuer", "SSL_CERT_FILE"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(!error.contains("hf_secret"), "{error}");
}

#[test]
fn what_a_hub_says_is_not_trusted() {
    for (said, want) in [
        ("<html>".to_owned(), "cannot be read"),
        (r#"{"sha":"main","siblings":[]}"#.into(), "names no commit"),
        (r#"{"sha":"../../../../../../../../etc/passwd0000000","siblings":[]}"#.into(), "names no commit"),
        (listing(&[]), "no GGUF files"),
        (listing(REPOSITORY).replace("sha256", "sha1"), "cannot be read"),
        (
            format!(r#"{{"sha":"{COMMIT}","siblings":[{{"rfilename":"x.gguf"}}]}}"#),
            "lists no SHA-256 of x.gguf",
        ),
    ] {
        let server = Server::start(move |_| Answer::new("200 OK", String::new(), said.clone()));
        let folder = tempfile::tempdir().unwrap();
        let hub = open_with(folder.path(), &server.url, None);
        let error = hub.pull(&name("hf.co/org/repo")).unwrap_err().to_string();
        assert!(error.contains(want), "{want}: {error}");
        assert_eq!(files(folder.path()), BTreeSet::new());
    }
    // A path that leads elsewhere is only asked for.
    let said = listing(&[("../../../../evil.gguf", b"evil")]);
    let server = Server::start(move |asked| match asked.path.starts_with("/api/") {
        true => Answer::new("200 OK", String::new(), said.clone()),
        false => Answer::file(asked, b"evil"),
    });
    let folder = tempfile::tempdir().unwrap();
    let path = open_with(folder.path(), &server.url, None).pull(&name("hf.co/org/repo")).unwrap().remove(0);
    assert_eq!(path, folder.path().join(format!("models/blobs/sha256-{}", Digest::of(b"evil"))));
}

#[test]
fn files_of_any_server_are_known_by_their_digest() {
    let server = Server::start(|asked| match asked.path.as_str() {
        "/x.gguf?key=secret" => Answer::file(asked, b"weights"),
        _ => Answer::status("404 Not Found"),
    });
    let folder = tempfile::tempdir().unwrap();
    let hub = open_with(folder.path(), "http://127.0.0.1:9", Some("hf_secret"));
    let host = server.url.strip_prefix("http://").unwrap();
    let digest = Digest::of(b"weights");
    let model = name(&format!("http://me:secret@{host}/x.gguf?key=secret#sha256={digest}"));
    let path = hub.pull(&model).unwrap().remove(0);
    assert_eq!(fs::read(path).unwrap(), b"weights");
    assert_eq!(server.asked()[0].authorization.as_deref(), Some("Basic bWU6c2VjcmV0"));
    assert_eq!(names(&hub), [(format!("http://{host}/x.gguf#sha256={digest}"), 7, true)]);
    for path in files(folder.path()) {
        let text = fs::read_to_string(&path).unwrap();
        assert!(!text.contains("secret"), "{}: {text}", path.display());
    }
    let missing = name(&format!("http://{host}/y.gguf#sha256={}", Digest::of(b"y")));
    let error = hub.pull(&missing).unwrap_err().to_string();
    assert!(error.contains("404") && error.contains("y.gguf"), "{error}");
}

#[test]
fn offline_uses_what_is_here() {
    let (folder, fake) = (tempfile::tempdir().unwrap(), FakeHub::start(REPOSITORY, Answer::file));
    let paths = open(folder.path(), &fake).locate(&name("hf.co/org/repo")).unwrap();
    let mut offline = config(folder.path());
    offline.offline = true;
    let huggingface = HuggingFace { endpoint: fake.hub.url.clone(), token: None };
    let hub = Hub::new(offline, huggingface, None).unwrap();
    let count = fake.hub.asked().len();
    assert_eq!(hub.locate(&name("hf.co/org/repo")).unwrap(), paths);
    for error in [hub.pull(&name("hf.co/org/repo")), hub.locate(&name("hf.co/org/repo:q8_0"))] {
        let error = error.unwrap_err().to_string();
        assert!(error.contains("FLASHINFER_RS_OFFLINE"), "{error}");
    }
    assert_eq!(fake.hub.asked().len(), count);
}

#[test]
fn what_belongs_to_others_is_not_removed() {
    let folder = tempfile::tempdir().unwrap();
    let hub = open_with(folder.path(), "http://127.0.0.1:9", None);
    for (model, want) in [("ollama/llama3.2", "belongs to ollama"), ("x.gguf", "a file of your own")] {
        let error = hub.remove(&name(model)).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
    assert_eq!(hub.remove(&ModelName::Smollm2).unwrap(), 0);
    let error = hub.locate(&name("ollama/llama3.2")).unwrap_err().to_string();
    assert!(error.contains("OLLAMA_MODELS"), "{error}");
}

/// What [`processes_share_a_download`] starts, with the folder and the hub's address.
const VARIABLES: [&str; 2] = ["FLASHINFER_TEST_FOLDER", "FLASHINFER_TEST_HUB"];

#[test]
#[ignore = "started by processes_share_a_download"]
fn child_that_fetches() {
    let [folder, endpoint] = VARIABLES.map(|name| std::env::var(name).unwrap());
    let path =
        open_with(Path::new(&folder), &endpoint, None).pull(&name("hf.co/org/repo")).unwrap().remove(0);
    assert_eq!(fs::read(path).unwrap(), bytes(400_000));
}

#[test]
fn processes_share_a_download() {
    let content: &'static [u8] = bytes(400_000).leak();
    let files: &'static [_] = vec![("x.gguf", content)].leak();
    let fake = FakeHub::start(files, |asked, content| {
        thread::sleep(Duration::from_millis(300));
        Answer::file(asked, content)
    });
    let folder = tempfile::tempdir().unwrap();
    let start = || {
        Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "hub::tests::child_that_fetches"])
            .env(VARIABLES[0], folder.path())
            .env(VARIABLES[1], &fake.hub.url)
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    };
    for mut child in [start(), start(), start()] {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(fake.cdn.asked().len(), 1);
    assert_eq!(names(&open(folder.path(), &fake)), [("hf.co/org/repo".into(), 400_000, true)]);
}
