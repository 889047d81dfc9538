//! Downloads from a server on loopback that breaks, stalls, lies, and answers ranges or not.
use crate::artifact_support::*;
use flashinfer_rs::artifacts::{
    ArtifactError, Digest, Fetch, Member, Package, Progress, Source, Store, StoreConfig, Wheel,
};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

fn body() -> Vec<u8> {
    module_wheel(&[("norm", &noise(40, 700_000))])
}

fn configured(root: &Path, url: &str, sha256: Digest) -> StoreConfig {
    let mut config = config(root, url_pins(&format!("{url}/wheel.whl"), sha256));
    config.offline = false;
    config
}

fn open(root: &Path, server: &Server, wheel: &[u8]) -> Store {
    Store::open(configured(root, &server.url, Digest::of(wheel))).unwrap()
}

fn partials(store: &Store) -> Vec<std::path::PathBuf> {
    files(store.cache_dir(), &|name| name.ends_with(".partial"))
}

#[test]
fn a_download_serves_a_member_and_is_made_once() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = body();
    let sent = wheel.clone();
    let server = Server::start(move |asked, stream| send(asked, stream, &sent, usize::MAX));
    let told: Arc<Mutex<Vec<String>>> = Arc::default();
    let mut config = configured(dir.path(), &server.url, Digest::of(&wheel));
    let log = Arc::clone(&told);
    config.progress = Some(Arc::new(move |progress: &Progress<'_>| {
        log.lock().unwrap().push(format!("{progress:?}"));
    }));
    let store = Store::open(config).unwrap();
    let forbidden = store.locate(&Member::module("norm"), Fetch::Forbidden);
    assert!(matches!(forbidden, Err(ArtifactError::NotFound { .. })));
    assert_eq!(server.count(), 0);

    let located = store.locate(&Member::module("norm"), Fetch::Allowed).unwrap();
    assert!(matches!(located.source, Source::Fetched(_)), "{}", located.source);
    assert_eq!(fs::read(&located.path).unwrap(), noise(40, 700_000));
    let located = store.locate(&Member::module("norm"), Fetch::Allowed).unwrap();
    assert!(matches!(located.source, Source::CachedWheel(_)), "{}", located.source);
    store.fetch(Package::JitCache).unwrap();
    open(dir.path(), &server, &wheel).fetch(Package::JitCache).unwrap();
    assert_eq!(server.count(), 1);
    assert!(partials(&store).is_empty());
    let told = told.lock().unwrap();
    for want in ["Started", "Bytes", "Done"] {
        assert!(told.iter().any(|line| line.contains(want)), "{want}: {told:?}");
    }
    let total = format!("done: {0}, total: Some({0})", wheel.len());
    assert!(told.iter().any(|line| line.contains(&total)), "{told:?}");
}

#[test]
fn broken_connections_are_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = body();
    let sent = wheel.clone();
    // Each answer ends after 90 000 bytes: more breaks than attempts are allowed in vain.
    let server = Server::start(move |asked, stream| send(asked, stream, &sent, 90_000));
    let store = open(dir.path(), &server, &wheel);
    let path = store.fetch(Package::JitCache).unwrap();
    assert_eq!(fs::read(path).unwrap(), wheel);
    assert_eq!(server.count(), wheel.len().div_ceil(90_000));
    let log = server.log.lock().unwrap();
    assert!(log[1].contains("Some(90000)"), "{log:?}");
}

#[test]
fn a_stalled_body_times_out_and_is_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = body();
    let sent = wheel.clone();
    let server = Server::start(move |asked, stream| {
        if asked.number < 2 {
            send(asked, stream, &sent, 200_000);
            let _ = stream.flush();
            std::thread::sleep(Duration::from_secs(3));
        } else {
            send(asked, stream, &sent, usize::MAX);
        }
    });
    let store = open(dir.path(), &server, &wheel);
    assert_eq!(fs::read(store.fetch(Package::JitCache).unwrap()).unwrap(), wheel);
    assert_eq!(server.count(), 3);
}

#[test]
fn a_server_without_ranges_is_asked_from_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = body();
    let sent = wheel.clone();
    let server = Server::start(move |asked, stream| {
        let limit = if asked.number == 0 { 300_000 } else { usize::MAX };
        send(&Asked::default(), stream, &sent, limit);
    });
    let store = open(dir.path(), &server, &wheel);
    assert_eq!(fs::read(store.fetch(Package::JitCache).unwrap()).unwrap(), wheel);
    assert_eq!(server.count(), 2);
}

#[test]
fn a_server_that_never_gets_further_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = body();
    let sent = wheel.clone();
    let server = Server::start(move |_, stream| {
        send(&Asked::default(), stream, &sent, 300_000);
    });
    let store = open(dir.path(), &server, &wheel);
    let text = store.fetch(Package::JitCache).unwrap_err().to_string();
    assert!(text.contains("4 attempts") && text.contains(WHEEL), "{text}");
    assert_eq!(server.count(), 5);
}

#[test]
fn what_an_earlier_process_left_is_continued_or_thrown_away() {
    let wheel = body();
    let mut damaged = wheel[..400_000].to_vec();
    damaged[1000] ^= 1;
    let too_long = [&wheel[..], b"more"].concat();
    for (case, left, requests) in [
        ("good", wheel[..400_000].to_vec(), 1),
        ("complete", wheel.clone(), 0),
        ("damaged", damaged, 2),
        ("too long", too_long, 2),
        ("empty", Vec::new(), 1),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let sent = wheel.clone();
        let server = Server::start(move |asked, stream| send(asked, stream, &sent, usize::MAX));
        let store = open(dir.path(), &server, &wheel);
        let folder = store.cache_dir().join("wheels");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("{WHEEL}.partial")), left).unwrap();
        let path = store.fetch(Package::JitCache).unwrap();
        assert_eq!(fs::read(path).unwrap(), wheel, "{case}");
        assert_eq!(server.count(), requests, "{case}");
        assert!(partials(&store).is_empty(), "{case}");
    }
}

#[test]
fn wrong_bytes_are_removed_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = body();
    let mut wrong = wheel.clone();
    wrong[5] ^= 1;
    let found = Digest::of(&wrong);
    let server = Server::start(move |asked, stream| send(asked, stream, &wrong, usize::MAX));
    let store = open(dir.path(), &server, &wheel);
    let e = store.locate(&Member::module("norm"), Fetch::Allowed).unwrap_err();
    let text = e.to_string();
    assert!(matches!(e, ArtifactError::DigestMismatch { .. }), "{text}");
    for want in [WHEEL.into(), Digest::of(&wheel).to_string(), found.to_string()] {
        assert!(text.contains(&want), "{want} is not in: {text}");
    }
    let left = files(store.cache_dir(), &|name| !name.ends_with(".lock"));
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_damaged_wheel_in_the_cache_is_fetched_anew() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = body();
    let sent = wheel.clone();
    let server = Server::start(move |asked, stream| send(asked, stream, &sent, usize::MAX));
    let store = open(dir.path(), &server, &wheel);
    let folder = store.cache_dir().join("wheels");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(WHEEL), b"damaged").unwrap();
    let refused = store.locate(&Member::module("norm"), Fetch::Forbidden).unwrap_err();
    assert!(matches!(refused, ArtifactError::DigestMismatch { .. }), "{refused}");
    let located = store.locate(&Member::module("norm"), Fetch::Allowed).unwrap();
    assert!(matches!(located.source, Source::Fetched(_)));
    assert_eq!(fs::read(folder.join(WHEEL)).unwrap(), wheel);
}

#[test]
#[cfg(unix)]
fn a_stamped_wheel_that_cannot_be_read_loses_its_stamp() {
    for wrong in [&b"no wheel at all"[..], &module_wheel(&[("page", b"another")]), &body()[..9000]] {
        let dir = tempfile::tempdir().unwrap();
        let wheel = body();
        let sent = wheel.clone();
        let server = Server::start(move |asked, stream| send(asked, stream, &sent, usize::MAX));
        let record = {
            let path = dir.path().join("w.whl");
            fs::write(&path, &wheel).unwrap();
            Wheel::open(&path).unwrap().record_sha256()
        };
        let open = || {
            let mut config = configured(dir.path(), &server.url, Digest::of(&wheel));
            config.pins = member_pins(&format!("{}/wheel.whl", server.url), &wheel, record);
            Store::open(config).unwrap()
        };
        let path = dir.path().join("cache/wheels").join(WHEEL);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, wrong).unwrap();
        stamp(&path, Digest::of(&wheel));
        assert!(open().modules().is_empty());
        stamp(&path, Digest::of(&wheel));
        let e = open().locate(&Member::module("norm"), Fetch::Forbidden).unwrap_err();
        assert!(matches!(e, ArtifactError::DigestMismatch { .. }), "{e}");
        assert!(files(dir.path(), &|name| name.ends_with(".verified")).is_empty());
        stamp(&path, Digest::of(&wheel));
        let located = open().locate(&Member::module("norm"), Fetch::Allowed).unwrap();
        assert_eq!(fs::read(located.path).unwrap(), noise(40, 700_000));
        assert!(fs::read(&path).unwrap() == wheel);
    }
}

#[test]
fn a_damaged_wheel_that_cannot_be_replaced_is_the_error() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|_, stream| reply(stream, "404 Not Found", "", b""));
    let mut config = configured(dir.path(), &server.url, Digest::of(b"good"));
    let folder = dir.path().join("cache/wheels");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(WHEEL), b"damaged").unwrap();
    for requests in [1, 1] {
        let store = Store::open(config.clone()).unwrap();
        let e = store.fetch(Package::JitCache).unwrap_err();
        assert!(matches!(e, ArtifactError::DigestMismatch { .. }), "{e}");
        assert_eq!(server.count(), requests);
        config.offline = true;
    }
}

#[test]
fn refusals_are_told_with_their_status() {
    for (status, requests) in [("404 Not Found", 1), ("403 Forbidden", 1), ("503 Busy", 4)] {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(move |_, stream| reply(stream, status, "", b"no"));
        let store = open(dir.path(), &server, b"x");
        let text = store.fetch(Package::JitCache).unwrap_err().to_string();
        assert!(text.contains(&status[..3]) && text.contains(&server.url), "{text}");
        assert_eq!(server.count(), requests, "{status}");
    }
}

#[test]
fn redirects_are_followed_and_chunks_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = body();
    let sent = wheel.clone();
    let server = Server::start(move |asked, stream| {
        if asked.path == "/wheel.whl" {
            return reply(stream, "302 Found", "location: /moved\r\n", b"");
        }
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n");
        for chunk in sent.chunks(60_000) {
            let _ = write!(stream, "{:x}\r\n", chunk.len());
            let _ = stream.write_all(chunk);
            let _ = stream.write_all(b"\r\n");
        }
        let _ = stream.write_all(b"0\r\n\r\n");
    });
    let store = open(dir.path(), &server, &wheel);
    assert_eq!(fs::read(store.fetch(Package::JitCache).unwrap()).unwrap(), wheel);
}

#[test]
fn credentials_are_sent_and_never_shown() {
    let dir = tempfile::tempdir().unwrap();
    let seen: Arc<Mutex<Option<String>>> = Arc::default();
    let log = Arc::clone(&seen);
    let server = Server::start(move |asked, stream| {
        *log.lock().unwrap() = asked.authorization.clone();
        reply(stream, "401 Unauthorized", "", b"");
    });
    let url = server.url.replace("http://", "http://me:secret@");
    let store = Store::open(configured(dir.path(), &url, Digest::of(b"x"))).unwrap();
    let e = store.fetch(Package::JitCache).unwrap_err();
    assert_eq!(seen.lock().unwrap().as_deref(), Some("Basic bWU6c2VjcmV0"));
    assert!(!format!("{e} {e:?} {store:?} {:?}", store.config()).contains("secret"), "{e:?}");
}

#[test]
fn credentials_go_to_no_other_origin_and_locations_are_not_told() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = body();
    let sent = wheel.clone();
    let other = Server::start(move |asked, stream| {
        assert_eq!(asked.authorization, None);
        send(asked, stream, &sent, usize::MAX);
    });
    let elsewhere = other.url.clone();
    let server = Server::start(move |asked, stream| {
        assert_eq!(asked.authorization.as_deref(), Some("Basic bWU6cEBzcw=="));
        let location = match asked.path.as_str() {
            "/wheel.whl" => "location: /moved?token=x\r\n".to_owned(),
            _ => format!("location: {elsewhere}/wheel.whl\r\n"),
        };
        reply(stream, "302 Found", &location, b"");
    });
    let url = server.url.replace("http://", "http://me:p@ss@");
    let store = Store::open(configured(dir.path(), &url, Digest::of(&wheel))).unwrap();
    store.fetch(Package::JitCache).unwrap();
    assert_eq!((server.count(), other.count()), (2, 1));

    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for location in [
        format!("http://me:secret@{closed}/secret?token=secret"),
        "http://me:secret@host:port/secret".into(),
        "http://me:se/cret@secret:x/".into(),
        "secret://secret/secret".into(),
        "file:///secret".into(),
        "/secret\u{7f}?secret".into(),
        "\\\\se[cret/secret".into(),
    ] {
        let head = format!("location: {location}\r\n");
        let server = Server::start(move |asked, stream| match asked.path.as_str() {
            "/wheel.whl" => reply(stream, "302 Found", &head, b""),
            _ => reply(stream, "404 Not Found", "", b""),
        });
        let dir = tempfile::tempdir().unwrap();
        let e = open(dir.path(), &server, b"x").fetch(Package::JitCache).unwrap_err();
        let text = format!("{e} {e:?}");
        assert!(text.contains(&server.url) && !text.contains("secret"), "{location}: {text}");
    }
}

#[test]
fn redirects_end() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|asked, stream| {
        reply(stream, "307 Again", &format!("location: {}x\r\n", asked.path), b"");
    });
    let text = open(dir.path(), &server, b"x").fetch(Package::JitCache).unwrap_err().to_string();
    assert!(text.contains("more than 10 times") && text.contains(&server.url), "{text}");
    assert_eq!(server.count(), 11);
}

/// Heads that never end, by size or by time.
#[test]
fn heads_are_bounded() {
    for (pause, count) in [(Duration::ZERO, 100_000), (Duration::from_millis(50), 400)] {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(move |_, stream| {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n");
            for _ in 0..count {
                std::thread::sleep(pause);
                if stream.write_all(b"x: y\r\n").is_err() {
                    return;
                }
            }
        });
        let start = Instant::now();
        assert!(open(dir.path(), &server, b"x").fetch(Package::JitCache).is_err());
        assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
        assert!(server.count() <= 4, "{}", server.count());
    }
}

/// A server that sends next to nothing at each request: not asked for ever.
#[test]
fn requests_that_bring_next_to_nothing_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = body();
    let sent = wheel.clone();
    let server = Server::start(move |asked, stream| match asked.number {
        // A bound for whoever would go on.
        300.. => reply(stream, "404 Not Found", "", b""),
        _ => send(asked, stream, &sent, 1),
    });
    let store = open(dir.path(), &server, &wheel);
    let text = store.fetch(Package::JitCache).unwrap_err().to_string();
    assert!(text.contains("4 attempts in a row brought 4 bytes together"), "{text}");
    assert_eq!(server.count(), 4);
}

/// Sends at a pace of its own, for half a minute at most.
fn dripping(wheel: Vec<u8>, bytes: usize, every: Duration) -> Server {
    Server::start(move |asked, stream| {
        send(asked, stream, &wheel, 0);
        let rounds = 30_000 / every.as_millis() as usize;
        for chunk in wheel[asked.range.unwrap_or(0)..].chunks(bytes).take(rounds) {
            if stream.write_all(chunk).and_then(|()| stream.flush()).is_err() {
                return;
            }
            std::thread::sleep(every);
        }
    })
}

#[test]
fn a_drip_does_not_hold_a_download() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = body();
    let server = dripping(wheel.clone(), 1, Duration::from_millis(20));
    let mut config = configured(dir.path(), &server.url, Digest::of(&wheel));
    config.fetch_options.stall_timeout = Duration::from_secs(60);
    config.fetch_options.rate_window = Duration::from_millis(500);
    let start = Instant::now();
    let text = Store::open(config).unwrap().fetch(Package::JitCache).unwrap_err().to_string();
    assert!(text.contains("fewer than 512 bytes came in 0.5 s") && text.contains("4 attempts"), "{text}");
    assert_eq!(server.count(), 4);
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
}

#[test]
fn a_slow_line_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = module_wheel(&[("norm", &noise(41, 20_000))]);
    let server = dripping(wheel.clone(), 500, Duration::from_millis(50));
    let mut config = configured(dir.path(), &server.url, Digest::of(&wheel));
    config.fetch_options.rate_window = Duration::from_secs(2);
    let path = Store::open(config).unwrap().fetch(Package::JitCache).unwrap();
    assert_eq!(fs::read(path).unwrap(), wheel);
    assert_eq!(server.count(), 1);
}

#[test]
fn a_server_says_how_long_to_wait() {
    for (after, least) in
        [("1", 1000), ("0", 0), ("soon", 0), ("-1", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)]
    {
        let dir = tempfile::tempdir().unwrap();
        let wheel = body();
        let sent = wheel.clone();
        let server = Server::start(move |asked, stream| match asked.number {
            0 => reply(stream, "429 Too Many Requests", &format!("retry-after: {after}\r\n"), b""),
            _ => send(asked, stream, &sent, usize::MAX),
        });
        let store = open(dir.path(), &server, &wheel);
        let start = Instant::now();
        store.fetch(Package::JitCache).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(least), "{after}: {:?}", start.elapsed());
        assert_eq!(server.count(), 2);
    }
}

#[test]
fn an_unreachable_host_fails_without_retries() {
    let dir = tempfile::tempdir().unwrap();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for url in [format!("http://{closed}"), "http://no-such-host.invalid".into()] {
        let mut config = configured(dir.path(), &url, Digest::of(b"x"));
        // A retry would hang this test for good.
        config.fetch_options.retry_delay = Duration::from_secs(1_000_000);
        let store = Store::open(config).unwrap();
        let text = store.fetch(Package::JitCache).unwrap_err().to_string();
        assert!(text.contains(&url), "{text}");
        assert!(partials(&store).is_empty());
    }
}

#[test]
fn offline_asks_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|_, stream| reply(stream, "200 OK", "", b"x"));
    let mut config = configured(dir.path(), &server.url, Digest::of(b"x"));
    config.offline = true;
    let store = Store::open(config).unwrap();
    let e = store.fetch(Package::JitCache).unwrap_err();
    assert!(matches!(e, ArtifactError::Offline { .. }), "{e}");
    let e = store.locate(&Member::module("norm"), Fetch::Allowed).unwrap_err();
    assert!(e.to_string().contains("FLASHINFER_RS_OFFLINE"), "{e}");
    assert_eq!(server.count(), 0);
}

#[test]
fn a_lock_that_is_never_released_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|_, stream| reply(stream, "200 OK", "", b"x"));
    let folder = dir.path().join("cache/wheels");
    fs::create_dir_all(&folder).unwrap();
    let lock = fs::File::create(folder.join(format!("{WHEEL}.lock"))).unwrap();
    lock.lock().unwrap();
    let mut config = configured(dir.path(), &server.url, Digest::of(b"x"));
    config.fetch_options.lock_timeout = Duration::from_millis(300);
    let waited = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&waited);
    config.progress = Some(Arc::new(move |progress: &Progress<'_>| {
        if matches!(progress, Progress::Waiting { .. }) {
            count.fetch_add(1, Ordering::SeqCst);
        }
    }));
    let e = Store::open(config).unwrap().fetch(Package::JitCache).unwrap_err();
    assert!(matches!(e, ArtifactError::Locked { .. }), "{e}");
    assert!(e.to_string().contains(WHEEL), "{e}");
    assert!(waited.load(Ordering::SeqCst) > 0);
    assert_eq!(server.count(), 0);
}

#[test]
#[ignore = "a process that another test starts"]
fn child_fetches() {
    let root = variable("FETCH_TEST_ROOT");
    let url = variable("FETCH_TEST_URL");
    let mut config = configured(&root, url.to_str().unwrap(), Digest::of(&body()));
    config.fetch_options.stall_timeout = Duration::from_secs(20);
    let store = Store::open(config).unwrap();
    assert_eq!(fs::read(store.fetch(Package::JitCache).unwrap()).unwrap(), body());
}

#[test]
fn many_processes_download_once() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = body();
    let sent = wheel.clone();
    let server = Server::start(move |asked, stream| {
        std::thread::sleep(Duration::from_millis(200));
        send(asked, stream, &sent, usize::MAX);
    });
    let url = Path::new(&server.url);
    let children: Vec<_> = (0..5)
        .map(|_| {
            child(
                module_path!(),
                "child_fetches",
                &[("FETCH_TEST_ROOT", dir.path()), ("FETCH_TEST_URL", url)],
            )
        })
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(server.count(), 1);
}

#[test]
fn a_killed_download_is_continued() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = body();
    let sent = wheel.clone();
    // Slow enough to be killed in the midst: 20 000 bytes every few milliseconds.
    let server = Server::start(move |asked, stream| {
        let start = asked.range.unwrap_or(0);
        send(asked, stream, &sent, 0);
        for chunk in sent[start..].chunks(20_000) {
            if stream.write_all(chunk).and_then(|()| stream.flush()).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(15));
        }
    });
    let url = Path::new(&server.url);
    let partial = dir.path().join("cache/wheels").join(format!("{WHEEL}.partial"));
    let len = || fs::metadata(&partial).map_or(0, |metadata| metadata.len());
    for kill in 0..4u64 {
        let before = len();
        let mut child = child(
            module_path!(),
            "child_fetches",
            &[("FETCH_TEST_ROOT", dir.path()), ("FETCH_TEST_URL", url)],
        );
        for _ in 0..2000 {
            if len() > before {
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(kill * 7));
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success(), "it was faster than the kill");
        let kept = len();
        assert!(kept > before, "nothing was kept: {before} {kept}");
        assert!(wheel.starts_with(&fs::read(&partial).unwrap()));
    }
    let before = len();
    let store = open(dir.path(), &server, &wheel);
    assert_eq!(fs::read(store.fetch(Package::JitCache).unwrap()).unwrap(), wheel);
    let log = server.log.lock().unwrap();
    let last = log.last().unwrap();
    assert!(last.contains(&format!("Some({before})")), "{before}: {log:?}");
}
