//! The store on disk: order of sources, damage of every kind, many processes, real kills.

use crate::artifact_support::*;
use flashinfer_rs::artifacts::embed::{Build, CargoCommand, build_from};
use flashinfer_rs::artifacts::{
    ArtifactError, BundledMember, Digest, Fetch, Member, Package, Source, Store, Wheel,
};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use test_support::required;

fn locate(store: &Store, name: &str) -> Result<PathBuf, ArtifactError> {
    let located = store.locate(&Member::module(name), Fetch::Forbidden)?;
    Ok(located.path)
}

fn error(store: &Store, name: &str) -> String {
    format!("{:#}", locate(store, name).unwrap_err())
}

/// Writes a file, in folders that need not be there, and gives its path back.
fn write(path: &Path, content: &[u8]) -> PathBuf {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
    path.into()
}

fn nothing() -> flashinfer_rs::artifacts::Pins {
    url_pins("http://127.0.0.1:9/none", Digest::of(b"none"))
}

#[test]
fn a_member_is_extracted_and_verified_on_reuse() {
    let dir = tempfile::tempdir().unwrap();
    let content = noise(1, 300_000);
    let store = store_of(dir.path(), &module_wheel(&[("norm", &content)]));
    let path = locate(&store, "norm").unwrap();
    assert!(path.starts_with(store.cache_dir()) && path.ends_with("norm/norm.so"));
    assert_eq!(fs::read(&path).unwrap(), content);
    assert_eq!(store.modules(), ["norm"]);

    // Same size, other bytes: a new process notices and rewrites.
    let mut damaged = content.clone();
    damaged[7] ^= 1;
    for wrong in [damaged, content[..100].to_vec(), Vec::new()] {
        fs::write(&path, &wrong).unwrap();
        let again = store_of(dir.path(), &module_wheel(&[("norm", &content)]));
        assert_eq!(locate(&again, "norm").unwrap(), path);
        assert_eq!(fs::read(&path).unwrap(), content);
        assert!(files(store.cache_dir(), &|name| name.starts_with(".tmp")).is_empty());
    }
    // The same store notices too, once size or time differ.
    fs::write(&path, b"short").unwrap();
    locate(&store, "norm").unwrap();
    assert_eq!(fs::read(&path).unwrap(), content);
    fs::remove_file(&path).unwrap();
    locate(&store, "norm").unwrap();
    assert_eq!(fs::read(&path).unwrap(), content);
}

#[test]
fn bad_wheels_are_refused_by_name() {
    let norm = module_path("norm");
    let content = noise(2, 5000);
    let line = record_line(&norm, &content);
    let mut member_lies = wheel_bytes(&[(&norm, &content)], Some(&line.replace(",5000", ",4000")));
    lie_about_size(&mut member_lies, &norm, 4000);
    let mut directory_lies = good_wheel(&[(&norm, &content)]);
    lie_about_size(&mut directory_lies, &norm, 9);
    let other = module_path("nprm");
    let mut twice = good_wheel(&[(&norm, &content), (&other, &content)]);
    replace(&mut twice, "nprm", "norm");
    let platlib = norm.replace("purelib", "platlib");
    let ambiguous = good_wheel(&[(&norm, &content), (&platlib, &content)]);
    let mut truncated = good_wheel(&[(&norm, &content)]);
    truncated.truncate(truncated.len() / 2);
    let mut flipped = good_wheel(&[(&norm, &content)]);
    flipped[2000] ^= 0xff;
    let wrong_digest = wheel_bytes(&[(&norm, &content)], Some(&record_line(&norm, &noise(3, 5000))));
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("no zip", b"hello".to_vec(), "cannot be read as a zip"),
        ("empty file", Vec::new(), "cannot be read as a zip"),
        ("truncated", truncated, "cannot be read as a zip"),
        ("no RECORD", wheel_bytes(&[(&norm, &content)], None), "RECORD"),
        ("no line", wheel_bytes(&[(&norm, &content)], Some("a,,\n")), "no SHA-256"),
        ("no digest", wheel_bytes(&[(&norm, &content)], Some(&format!("{norm},,\n"))), "no SHA-256"),
        ("bad line", wheel_bytes(&[(&norm, &content)], Some("nonsense\n")), "nonsense"),
        ("listed twice", wheel_bytes(&[(&norm, &content)], Some(&format!("{line}{line}"))), "twice"),
        ("name twice", twice, "twice"),
        ("ambiguous", ambiguous, "platlib"),
        ("directory lies", directory_lies, "9 bytes by the central directory"),
        ("member lies", member_lies, "w.whl"),
        ("flipped bit", flipped, "w.whl"),
        ("wrong digest", wrong_digest, "expected"),
    ];
    for (case, wheel, want) in cases {
        let dir = tempfile::tempdir().unwrap();
        let store = store_of(dir.path(), &wheel);
        let text = error(&store, "norm");
        assert!(text.contains(want) && text.contains("w.whl"), "{case}: {text}");
        let left = files(store.cache_dir(), &|name| name != ".lock");
        assert!(left.is_empty(), "{case} left {left:?}");
    }
}

#[test]
fn a_wrong_digest_names_file_expected_and_found() {
    let dir = tempfile::tempdir().unwrap();
    let (content, promised) = (noise(4, 999), noise(5, 999));
    let norm = module_path("norm");
    let record = record_line(&norm, &promised);
    let store = store_of(dir.path(), &wheel_bytes(&[(&norm, &content)], Some(&record)));
    match locate(&store, "norm").unwrap_err() {
        ArtifactError::DigestMismatch { file, expected, found } => {
            assert!(file.contains("norm") && file.contains("w.whl"), "{file}");
            assert_eq!((expected, found), (Digest::of(&promised), Digest::of(&content)));
        }
        other => panic!("{other}"),
    }
}

#[test]
fn modules_of_another_flashinfer_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (name, content) = (module_path("norm"), noise(9, 4000));
    let of_version = |version: &str| {
        let record = record_line(&name, &content);
        let place = format!("flashinfer_jit_cache-{version}.dist-info/RECORD");
        wheel_bytes(&[(&name, &content), (&place, record.as_bytes())], None)
    };
    let message = error(&store_of(dir.path(), &of_version("0.6.99+cu130")), "norm");
    assert!(message.contains("FlashInfer 0.6.99; expected 0.6.13 and 0.7.4,"), "{message}");
    // The local label may differ.
    locate(&store_of(dir.path(), &of_version("0.6.13+own")), "norm").unwrap();
}

#[test]
fn unsafe_names_are_refused() {
    for name in ["../evil.so", "a/../../evil.so", "/tmp/evil.so", "a\\evil.so", "a//evil.so"] {
        let dir = tempfile::tempdir().unwrap();
        let placeholder = "x".repeat(name.len());
        let norm = module_path("norm");
        let mut wheel = good_wheel(&[(&norm, b"so"), (&placeholder, b"evil")]);
        replace(&mut wheel, &placeholder, name);
        let store = store_of(dir.path(), &wheel);
        let e = locate(&store, "norm").unwrap_err();
        assert!(matches!(e, ArtifactError::UnsafeMember { .. }), "{name}: {e}");
    }
    let dir = tempfile::tempdir().unwrap();
    let store = store_of(dir.path(), &module_wheel(&[("norm", b"so")]));
    for name in ["", "..", ".", "a/b", "../norm", "a\\b", "a\0b", ".lock", "-a"] {
        let e = locate(&store, name).unwrap_err();
        assert!(matches!(e, ArtifactError::BadName { .. }), "{name}: {e}");
    }
}

#[test]
#[cfg(unix)]
fn symbolic_links_are_neither_trusted_nor_written_through() {
    use std::os::unix::fs::symlink;
    let dir = tempfile::tempdir().unwrap();
    let content = noise(6, 4000);
    let store = store_of(dir.path(), &module_wheel(&[("norm", &content)]));
    let path = locate(&store, "norm").unwrap();

    let outside = dir.path().join("outside");
    for there in [&b"precious"[..], &content] {
        fs::remove_file(&path).unwrap();
        fs::write(&outside, there).unwrap();
        symlink(&outside, &path).unwrap();
        locate(&store, "norm").unwrap();
        assert!(fs::symlink_metadata(&path).unwrap().is_file());
        assert_eq!(fs::read(&path).unwrap(), content);
        assert_eq!(fs::read(&outside).unwrap(), there);
    }

    let folder = path.parent().unwrap();
    fs::remove_dir_all(folder).unwrap();
    let elsewhere = dir.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    symlink(&elsewhere, folder).unwrap();
    let text = error(&store, "norm");
    assert!(text.contains("not a real folder") && text.contains("FLASHINFER_RS_CACHE_DIR"), "{text}");
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
}

#[test]
fn sources_are_asked_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, wheel: &[u8]| write(&dir.path().join(name), wheel);
    let a = write("a.whl", &module_wheel(&[("one", b"config one")]));
    let b = write("env/b.whl", &module_wheel(&[("one", b"env one"), ("two", b"env two")]));
    let c = write("env/c.whl", &module_wheel(&[("three", b"env three")]));
    write("env/not-a-wheel.txt", b"ignored");
    let embed = |name: &str, content: &'static [u8]| BundledMember {
        suffix: Member::module(name).suffix().leak(),
        artifact_hash: "0123456789abcdef01234567",
        version: None,
        architectures: &[],
        sha256: Digest::of(content),
        size: content.len() as u64,
        zstd: zstd::encode_all(content, 3).unwrap().leak(),
    };
    let pinned = module_wheel(&[("two", b"pin two"), ("four", b"pin four"), ("five", b"pin five")]);
    let cached = write(&format!("cache/wheels/{WHEEL}"), &pinned);
    let pins = url_pins("http://127.0.0.1:9/none", Digest::of(&pinned));
    let mut config = config(dir.path(), pins);
    config.wheels = vec![a.clone()];
    config.env_wheels = vec![dir.path().join("env")];
    config.bundle = vec![embed("two", b"bundle two"), embed("four", b"bundle four")].leak();
    let store = Store::open(config.clone()).unwrap();
    for (name, content, source) in [
        ("one", "config one", Source::Config(a)),
        ("two", "env two", Source::Env(b.clone())),
        ("three", "env three", Source::Env(c)),
        ("four", "bundle four", Source::Embedded),
        ("five", "pin five", Source::CachedWheel(cached)),
    ] {
        let located = store.locate(&Member::module(name), Fetch::Allowed).unwrap();
        assert_eq!(located.source, source, "{name}");
        assert_eq!(fs::read_to_string(&located.path).unwrap(), content);
    }
    assert_eq!(store.modules(), ["five", "four", "one", "three", "two"]);

    let text = format!("{:#}", store.locate(&Member::module("six"), Fetch::Allowed).unwrap_err());
    for want in ["a.whl", "b.whl", "c.whl", "embedded bundle", WHEEL, "jit_cache/six/six.so"] {
        assert!(text.contains(want), "{want} is not in: {text}");
    }

    // A path that is wrong is told even where its turn does not come.
    config.env_wheels.push(dir.path().join("missing.whl"));
    let store = Store::open(config).unwrap();
    assert!(error(&store, "one").contains("missing.whl"));
    let reports = store.inventory();
    let broken: Vec<_> = reports.iter().filter(|r| r.problem.is_some()).collect();
    assert!(broken.iter().any(|r| r.source.contains("missing.whl") && r.remedy.is_some()));
    assert!(reports.iter().any(|r| r.usable && r.path.as_ref() == Some(&b)));
}

#[test]
fn a_lying_bundle_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let content: &[u8] = b"what is embedded";
    let entry = |sha256, size, zstd: &[u8]| BundledMember {
        suffix: Member::module("norm").suffix().leak(),
        artifact_hash: "0123456789abcdef01234567",
        version: None,
        architectures: &[],
        sha256,
        size,
        zstd: zstd.to_vec().leak(),
    };
    let packed = zstd::encode_all(content, 3).unwrap();
    let size = content.len() as u64;
    for (case, bad) in [
        ("digest", entry(Digest::of(b"other"), size, &packed)),
        ("size", entry(Digest::of(content), 3, &packed)),
        ("frame", entry(Digest::of(content), size, b"no zstd frame")),
        ("cut", entry(Digest::of(content), size, &packed[..packed.len() - 3])),
    ] {
        let mut config = config(dir.path(), nothing());
        config.bundle = vec![bad].leak();
        let store = Store::open(config).unwrap();
        assert!(locate(&store, "norm").is_err(), "{case}");
    }
}

#[test]
fn without_any_source_the_error_tells_each_and_its_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let mut config = config(dir.path(), nothing());
    config.env_wheels = vec![empty];
    let store = Store::open(config).unwrap();
    let allowed = format!("{:#}", store.locate(&Member::module("norm"), Fetch::Allowed).unwrap_err());
    for want in ["empty", "holds no .whl", "embedded", WHEEL, "forbid", "FLASHINFER_RS_WHEELS"] {
        assert!(allowed.contains(want), "{want} is not in: {allowed}");
    }
    assert!(error(&store, "norm").contains("flashinfer-doctor fetch"));
    assert!(!store.cache_dir().exists(), "a look-up in vain wrote something");
}

#[test]
fn a_stamp_saves_hashing_and_never_lies() {
    let dir = tempfile::tempdir().unwrap();
    let pinned = module_wheel(&[("norm", &noise(7, 9000))]);
    let path = dir.path().join("cache/wheels").join(WHEEL);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, &pinned).unwrap();
    let pins = url_pins("http://127.0.0.1:9/none", Digest::of(&pinned));
    let hashed = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let open = || {
        let mut config = config(dir.path(), pins.clone());
        let hashed = std::sync::Arc::clone(&hashed);
        config.progress = Some(std::sync::Arc::new(move |_| {
            hashed.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }));
        Store::open(config).unwrap()
    };
    let count = || hashed.swap(0, std::sync::atomic::Ordering::SeqCst);
    locate(&open(), "norm").unwrap();
    assert!(count() > 0, "a wheel without a stamp is hashed");
    locate(&open(), "norm").unwrap();
    assert_eq!(count(), 0, "a wheel with a stamp is not");

    // Touched: hashed again, and found good.
    let later = std::time::SystemTime::now() + Duration::from_secs(60);
    fs::File::options().write(true).open(&path).unwrap().set_modified(later).unwrap();
    locate(&open(), "norm").unwrap();
    assert!(count() > 0);

    // Damaged: the stamp no longer fits.
    let mut damaged = pinned.clone();
    damaged[100] ^= 1;
    fs::write(&path, &damaged).unwrap();
    let e = locate(&open(), "norm").unwrap_err();
    let text = e.to_string();
    assert!(matches!(e, ArtifactError::DigestMismatch { .. }), "{text}");
    for want in [WHEEL.into(), Digest::of(&pinned).to_string(), Digest::of(&damaged).to_string()] {
        assert!(text.contains(&want), "{want} is not in: {text}");
    }
}

#[test]
fn clean_frees_what_is_ours_and_respects_locks() {
    let dir = tempfile::tempdir().unwrap();
    let content = noise(8, 10_000);
    let store = store_of(dir.path(), &module_wheel(&[("norm", &content), ("page", &content)]));
    let norm = locate(&store, "norm").unwrap();
    let page = locate(&store, "page").unwrap();
    let foreign = store.cache_dir().join("notes.txt");
    fs::write(&foreign, b"mine").unwrap();
    assert_eq!(store.cache_size().unwrap(), 20_004);

    let lock = fs::File::open(page.with_file_name(".lock")).unwrap();
    lock.lock().unwrap();
    assert_eq!(store.clean().unwrap(), 10_000);
    assert!(!norm.exists() && page.exists() && foreign.exists());
    lock.unlock().unwrap();
    assert_eq!(store.clean().unwrap(), 10_000);
    assert!(!page.exists() && foreign.exists());
    assert_eq!(fs::read(locate(&store, "norm").unwrap()).unwrap(), content);
}

/// Rewrites a wheel in place with one of its size, and puts its time of change back.
fn forge(wheel: &Path, with: &[u8]) {
    // Longer than the step of the file system's clock.
    std::thread::sleep(Duration::from_millis(30));
    let before = fs::metadata(wheel).unwrap();
    assert_eq!(before.len(), with.len() as u64);
    fs::write(wheel, with).unwrap();
    let file = fs::File::options().write(true).open(wheel).unwrap();
    file.set_modified(before.modified().unwrap()).unwrap();
    assert_eq!(fs::metadata(wheel).unwrap().modified().unwrap(), before.modified().unwrap());
}

#[test]
#[cfg(unix)]
fn a_forged_wheel_with_its_time_put_back_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let (pinned, forged) = (module_wheel(&[("norm", b"good")]), module_wheel(&[("norm", b"evil")]));
    let path = dir.path().join("cache/wheels").join(WHEEL);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, &pinned).unwrap();
    let open = || {
        let pins = url_pins("http://127.0.0.1:9/none", Digest::of(&pinned));
        Store::open(config(dir.path(), pins)).unwrap()
    };
    let first = open();
    locate(&first, "norm").unwrap();
    forge(&path, &forged);
    // By this process and by others; and once more, after the first has looked.
    for store in [&first, &open(), &open()] {
        let e = locate(store, "norm").unwrap_err();
        assert!(matches!(e, ArtifactError::DigestMismatch { .. }), "{e}");
        assert!(store.modules().is_empty());
    }
    forge(&path, &pinned);
    locate(&open(), "norm").unwrap();
}

#[test]
#[cfg(unix)]
fn members_are_compared_with_a_pinned_record_whatever_a_stamp_says() {
    let dir = tempfile::tempdir().unwrap();
    let (pinned, forged) = (module_wheel(&[("norm", b"good")]), module_wheel(&[("norm", b"evil")]));
    let path = dir.path().join("cache/wheels").join(WHEEL);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let other = dir.path().join("other.whl");
    fs::write(&other, &pinned).unwrap();
    let record = Wheel::open(&other).unwrap().record_sha256();
    let open = || {
        let pins = member_pins("http://127.0.0.1:9/none", &pinned, record);
        Store::open(config(dir.path(), pins)).unwrap()
    };
    fs::write(&path, &forged).unwrap();
    stamp(&path, Digest::of(&pinned));
    let e = locate(&open(), "norm").unwrap_err();
    assert!(matches!(e, ArtifactError::DigestMismatch { .. }), "{e}");
    let left = files(dir.path(), &|name| name.ends_with(".so") || name.ends_with(".verified"));
    assert!(left.is_empty(), "{left:?}");
    // Without a pinned RECORD a stamp is believed, which is why it must not be written by others.
    stamp(&path, Digest::of(&pinned));
    let pins = url_pins("http://127.0.0.1:9/none", Digest::of(&pinned));
    let path = locate(&Store::open(config(dir.path(), pins)).unwrap(), "norm").unwrap();
    assert_eq!(fs::read(path).unwrap(), b"evil");
}

#[test]
fn clean_leaves_what_others_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let content = noise(11, 3000);
    let pinned = module_wheel(&[("norm", &content)]);
    let pins = url_pins("http://127.0.0.1:9/none", Digest::of(&pinned));
    let store = Store::open(config(dir.path(), pins)).unwrap();
    let wheel = store.cache_dir().join("wheels").join(WHEEL);
    fs::create_dir_all(wheel.parent().unwrap()).unwrap();
    fs::write(&wheel, &pinned).unwrap();
    let norm = locate(&store, "norm").unwrap();
    let theirs = [
        "notes.txt",
        "wheels/mine.whl",
        "wheels/mine.whl.partial",
        "wheels/mine.whl.lock",
        "wheels/mine.whl.pip/mine.whl",
        "wheels/other.whl.verified",
        "wheels/other.whl",
        "wheels/.tmp-notes",
        "wheels/.tmp-1-1",
        "0123456789abcdef01234567/stuff/data.bin",
        "0123456789abcdef01234567/stuff/stuff.so",
        "0123456789abcdef01234567/stuff/.lock",
        "0123456789abcdef01234567/.tmp-1-1",
        "0123456789abcdef01234567.txt",
        "norm/norm.so",
    ];
    let mut kept: Vec<_> = theirs.iter().map(|file| store.cache_dir().join(file)).collect();
    for name in ["notes.txt", ".tmp-mine", ".tmp-1-1", "page.so", "norm.so.orig", "norm/norm.so"] {
        kept.push(norm.with_file_name("").join(name));
    }
    for file in &kept {
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, b"theirs").unwrap();
    }
    let empty = store.cache_dir().join("89abcdef0123456789abcdef");
    fs::create_dir(&empty).unwrap();
    let size = store.cache_size().unwrap();
    let freed = store.clean().unwrap();
    assert!(freed >= (pinned.len() + content.len()) as u64, "{freed}");
    assert_eq!(store.cache_size().unwrap(), size - freed);
    kept.sort();
    let mut left = files(store.cache_dir(), &|_| true);
    left.sort();
    assert_eq!(left, kept);
    assert!(kept.iter().all(|file| fs::read(file).unwrap() == b"theirs"));
    assert!(empty.is_dir());
    assert_eq!(store.clean().unwrap(), 0);
}

#[test]
fn clean_removes_what_another_program_pinned() {
    let dir = tempfile::tempdir().unwrap();
    let pinned = module_wheel(&[("norm", &noise(12, 3000))]);
    let pins = url_pins("http://127.0.0.1:9/none", Digest::of(&pinned));
    let program = Store::open(config(dir.path(), pins)).unwrap();
    let wheel = program.cache_dir().join("wheels").join(WHEEL);
    fs::create_dir_all(wheel.parent().unwrap()).unwrap();
    fs::write(&wheel, &pinned).unwrap();
    locate(&program, "norm").unwrap();
    let built_in = flashinfer_rs::artifacts::Pins::built_in().unwrap();
    Store::open(config(dir.path(), built_in)).unwrap().clean().unwrap();
    assert!(files(program.cache_dir(), &|_| true).is_empty());
}

#[test]
fn a_cache_of_an_earlier_build_serves() {
    let dir = tempfile::tempdir().unwrap();
    let content = noise(13, 3000);
    let store = store_of(dir.path(), &module_wheel(&[("norm", &content)]));
    let path = locate(&store, "norm").unwrap();
    fs::write(path.with_file_name(".lock"), b"").unwrap();
    fs::write(path.with_file_name(".tmp-1-1"), b"half").unwrap();
    let store = store_of(dir.path(), &module_wheel(&[("norm", &content)]));
    assert_eq!(locate(&store, "norm").unwrap(), path);
    // What is written to it is ours from then on.
    fs::write(&path, b"damaged").unwrap();
    assert_eq!(fs::read(locate(&store, "norm").unwrap()).unwrap(), content);
    assert_eq!(store.clean().unwrap(), 3000);
}

#[test]
#[cfg(unix)]
fn a_linked_folder_of_wheels_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let pinned = module_wheel(&[("norm", b"norm")]);
    let elsewhere = dir.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::write(elsewhere.join(WHEEL), &pinned).unwrap();
    fs::create_dir(dir.path().join("cache")).unwrap();
    std::os::unix::fs::symlink(&elsewhere, dir.path().join("cache/wheels")).unwrap();
    let pins = url_pins("http://127.0.0.1:9/none", Digest::of(&pinned));
    for offline in [true, false] {
        let mut config = config(dir.path(), pins.clone());
        config.offline = offline;
        let store = Store::open(config).unwrap();
        let errors = [
            store.locate(&Member::module("norm"), Fetch::Allowed).unwrap_err(),
            store.fetch(Package::JitCache).unwrap_err(),
        ];
        for e in errors {
            let text = e.to_string();
            assert!(text.contains("wheels: it is not a real folder"), "{text}");
            assert!(text.contains("FLASHINFER_RS_CACHE_DIR"), "{text}");
        }
        assert_eq!(store.clean().unwrap(), 0);
        assert!(store.inventory().iter().all(|source| source.modules.is_empty()));
    }
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 1);
}

#[test]
fn a_wheel_for_another_machine_is_refused_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, wheel: &[u8]| write(&dir.path().join(name), wheel);
    let arm = "flashinfer_jit_cache-0.6.13+a-cp39-abi3-manylinux_2_28_aarch64.whl";
    let ours = "flashinfer_jit_cache-0.6.13+x-cp39-abi3-manylinux_2_28_x86_64.whl";
    let path = write(arm, &module_wheel(&[("norm", b"arm")]));
    write(&format!("both/{arm}"), &module_wheel(&[("norm", b"arm"), ("page", b"arm")]));
    write(&format!("both/{ours}"), &module_wheel(&[("norm", b"x86")]));
    let mut config = config(dir.path(), nothing());
    config.env_wheels = vec![path];
    let store = Store::open(config.clone()).unwrap();
    let text = error(&store, "norm");
    for want in [arm, "is for manylinux_2_28_aarch64, by its name", "linux_x86_64"] {
        assert!(text.contains(want), "{want} is not in: {text}");
    }
    assert!(store.modules().is_empty());
    // A folder may hold wheels for several machines.
    config.env_wheels = vec![dir.path().join("both")];
    let store = Store::open(config).unwrap();
    assert_eq!(fs::read(locate(&store, "norm").unwrap()).unwrap(), b"x86");
    assert_eq!(store.modules(), ["norm"]);
    let text = error(&store, "page");
    assert!(text.contains("is for manylinux_2_28_aarch64, by its name"), "{text}");
}

#[test]
#[ignore = "a process that another test starts"]
fn child_uses_a_relative_cache() {
    let root = variable("STORE_TEST_ROOT");
    let env = |name: &str| std::env::var(name).ok();
    let out_dir = root.join("out");
    fs::create_dir_all(&out_dir).unwrap();
    let command = ["cargo", "build"].map(str::to_owned).to_vec();
    let command = CargoCommand::new(command, &root, &env);
    let (root, target) = (&*root, ("linux", "x86_64"));
    let build = Build { env: &env, command, root, progress: None, out_dir: &out_dir, target, embed: true };
    assert_eq!(build_from(&build, nothing()).unwrap().embedded, 3);
    let store = Store::open(flashinfer_rs::artifacts::StoreConfig::from_env().unwrap()).unwrap();
    let path = locate(&store, "norm").unwrap();
    assert!(path.starts_with(root.join("home/in/a/relative/cache")), "{}", path.display());
    println!("{} files", files(store.cache_dir(), &|name| name != ".lock").len());
}

#[test]
#[cfg(target_os = "linux")]
fn a_relative_cache_is_the_same_folder_wherever_a_process_runs() {
    let dir = tempfile::tempdir().unwrap();
    let libraries: [(&str, &[u8]); 2] =
        [("tvm_ffi/lib/libtvm_ffi.so", b"a tvm_ffi"), ("nvidia/cu13/lib/libcudart.so.13", b"a cudart")];
    let norm = module_path("norm");
    let wheel = dir.path().join("w.whl");
    fs::write(&wheel, good_wheel(&[libraries[0], libraries[1], (&norm, b"norm")])).unwrap();
    for place in ["here", "there"] {
        let place = dir.path().join(place);
        fs::create_dir(&place).unwrap();
        let mut command = child_command(module_path!(), "child_uses_a_relative_cache");
        command.current_dir(&place).env("STORE_TEST_ROOT", dir.path());
        command.env("XDG_CACHE_HOME", dir.path().join("home"));
        command.env("FLASHINFER_RS_CACHE_DIR", "in/a/relative/cache").env("FLASHINFER_RS_WHEELS", &wheel);
        command.env("FLASHINFER_RS_EMBED", "require").env("FLASHINFER_RS_EMBED_MODULES", "norm");
        let output = command.env("FLASHINFER_RS_OFFLINE", "1").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("3 files"), "{output:?}");
        assert_eq!(fs::read_dir(&place).unwrap().count(), 0);
    }
}

#[test]
fn many_threads_extract_once() {
    let dir = tempfile::tempdir().unwrap();
    let content = noise(9, 400_000);
    let names = ["a", "b", "c"];
    let members: Vec<_> = names.iter().map(|name| (*name, &content[..])).collect();
    let store = store_of(dir.path(), &module_wheel(&members));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for name in names {
                    assert_eq!(fs::read(locate(&store, name).unwrap()).unwrap(), content);
                }
            });
        }
    });
    let left = files(store.cache_dir(), &|name| name != ".lock");
    assert_eq!(left.len(), 3, "{left:?}");
}

const NAMES: [&str; 4] = ["m0", "m1", "m2", "m3"];

fn big_wheel() -> Vec<u8> {
    let content: Vec<_> = (0..4).map(|seed| noise(20 + seed, 2_000_000)).collect();
    let members: Vec<_> = NAMES.iter().zip(&content).map(|(n, c)| (*n, &c[..])).collect();
    module_wheel(&members)
}

#[test]
#[ignore = "a process that another test starts"]
fn child_extracts() {
    let root = variable("STORE_TEST_ROOT");
    let mut config = config(&root, nothing());
    config.wheels = vec![root.join("w.whl")];
    let store = Store::open(config).unwrap();
    for (seed, name) in NAMES.iter().enumerate() {
        let path = locate(&store, name).unwrap();
        assert_eq!(fs::read(path).unwrap(), noise(20 + seed as u64, 2_000_000));
    }
}

#[test]
#[ignore = "a process that another test starts"]
fn child_counts_what_it_reads() {
    let root = variable("STORE_TEST_ROOT");
    let mut config = config(&root, nothing());
    config.wheels = vec![root.join("w.whl")];
    // Bytes that this process has read, from files or otherwise.
    let read = || {
        let text = fs::read_to_string("/proc/self/io").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("rchar:")).unwrap();
        line.trim().parse::<u64>().unwrap()
    };
    let before = read();
    let store = Store::open(config).unwrap();
    locate(&store, "m1").unwrap();
    let first = read() - before;
    locate(&store, "m1").unwrap();
    let again = read() - before - first;
    println!("{first} bytes read to extract one member of 2000000, {again} to find it again");
    assert!((2_000_000..2_100_000).contains(&first) && again < 10_000, "{first} {again}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_first_use_reads_the_member_once_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    store_of(dir.path(), &big_wheel());
    let mut child = child(module_path!(), "child_counts_what_it_reads", &[("STORE_TEST_ROOT", dir.path())]);
    assert!(child.wait().unwrap().success());
}

#[test]
fn many_processes_extract_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_of(dir.path(), &big_wheel());
    let children: Vec<_> =
        (0..6).map(|_| child(module_path!(), "child_extracts", &[("STORE_TEST_ROOT", dir.path())])).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let left = files(store.cache_dir(), &|name| name != ".lock");
    assert_eq!(left.len(), NAMES.len(), "{left:?}");
}

#[test]
fn killed_processes_leave_nothing_that_is_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_of(dir.path(), &big_wheel());
    let (mut unfinished, mut temporaries) = (0, 0);
    for round in 0..40u64 {
        let mut child = child(module_path!(), "child_extracts", &[("STORE_TEST_ROOT", dir.path())]);
        // Wait until it writes, then kill it somewhere in the midst.
        for _ in 0..400 {
            if !files(store.cache_dir(), &|name| name.starts_with(".tmp")).is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        std::thread::sleep(Duration::from_micros(round * 977 % 9000));
        child.kill().unwrap();
        unfinished += usize::from(!child.wait().unwrap().success());
        temporaries += files(store.cache_dir(), &|name| name.starts_with(".tmp")).len();
        for (seed, name) in NAMES.iter().enumerate() {
            for file in files(store.cache_dir(), &|f| f == format!("{name}.so")) {
                let expected = noise(20 + seed as u64, 2_000_000);
                assert!(fs::read(&file).unwrap() == expected, "half a file was published");
            }
        }
        if round % 4 == 3 {
            for (seed, name) in NAMES.iter().enumerate() {
                let path = locate(&store, name).unwrap();
                assert!(fs::read(path).unwrap() == noise(20 + seed as u64, 2_000_000));
            }
            let left = files(store.cache_dir(), &|name| name.starts_with(".tmp"));
            assert!(left.is_empty(), "{left:?}");
            store.clean().unwrap();
        }
    }
    println!("{unfinished} of 40 processes were killed before their end, {temporaries} in a write");
    assert!(temporaries > 0, "no kill came in the midst of a write");
}

/// A file system of its own, or nothing where mounting is not allowed.
struct Mount(PathBuf);

impl Mount {
    fn tmpfs(at: &Path, options: &str) -> Option<Mount> {
        fs::create_dir_all(at).unwrap();
        let mut command = std::process::Command::new("mount");
        command.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(at);
        let done = command.stderr(std::process::Stdio::null()).status();
        if done.is_ok_and(|status| status.success()) {
            return Some(Mount(at.into()));
        }
        println!("skipped: this machine does not allow mounting a tmpfs");
        None
    }

    fn read_only(&self) {
        let mut command = std::process::Command::new("mount");
        command.args(["-o", "remount,ro"]).arg(&self.0);
        assert!(command.status().unwrap().success());
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_is_told_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let content = noise(10, 400_000);
    let store = store_of(dir.path(), &module_wheel(&[("big", &content), ("small", b"small")]));
    let Some(_mount) = Mount::tmpfs(store.cache_dir(), "size=64k") else {
        return;
    };
    let text = error(&store, "big");
    assert!(text.contains("big.so") && text.contains("free space"), "{text}");
    assert!(files(store.cache_dir(), &|name| name != ".lock").is_empty());
    assert_eq!(fs::read(locate(&store, "small").unwrap()).unwrap(), b"small");
}

#[test]
fn a_read_only_cache_serves_what_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = module_wheel(&[("norm", b"norm"), ("page", b"page")]);
    let store = store_of(dir.path(), &wheel);
    let Some(mount) = Mount::tmpfs(store.cache_dir(), "size=4m") else {
        return;
    };
    locate(&store, "norm").unwrap();
    mount.read_only();
    let store = store_of(dir.path(), &wheel);
    assert_eq!(fs::read(locate(&store, "norm").unwrap()).unwrap(), b"norm");
    let text = error(&store, "page");
    assert!(text.contains("FLASHINFER_RS_CACHE_DIR") && text.contains("page"), "{text}");
}

#[test]
fn a_file_in_the_way_of_the_cache_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_of(dir.path(), &module_wheel(&[("norm", b"norm")]));
    fs::write(store.cache_dir(), b"a file").unwrap();
    let text = error(&store, "norm");
    assert!(text.contains("cache") && text.contains("FLASHINFER_RS_CACHE_DIR"), "{text}");
}

#[test]
fn the_development_wheels_serve_their_modules() {
    let Some(folder) = required::test_wheels("0.6.13") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), nothing());
    config.wheels = vec![folder];
    let store = Store::open(config).unwrap();
    let modules = store.modules();
    assert!(modules.len() > 40, "{modules:?}");
    for (name, wheel) in [("norm", "core"), ("topk", "hopper"), ("gemm_sm90", "variants")] {
        let located = store.locate(&Member::module(name), Fetch::Forbidden).unwrap();
        assert!(located.source.to_string().contains(wheel), "{}", located.source);
        let opened = match &located.source {
            Source::Config(path) => Wheel::open(path).unwrap(),
            other => panic!("{other}"),
        };
        let recorded = opened.find(&Member::module(name)).unwrap().unwrap();
        let bytes = fs::read(&located.path).unwrap();
        assert_eq!(Digest::of(&bytes), recorded.sha256);
        assert!(bytes.starts_with(b"\x7fELF"));
    }
}
