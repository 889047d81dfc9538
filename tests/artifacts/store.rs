//! The store on disk: order of sources, damage of every kind, many processes, real kills.

mod clean;
mod disk;
mod processes;

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
