//! Releases that nobody has pinned: downloaded from a server, verified, and pinned.

use crate::artifact_support::*;
use flashinfer_rs::artifacts::{
    ArtifactError, CudaArchitecture, Digest, Fetch, FlashInferVersion, Member, Origin, Pin, Release, Store,
    Wheel,
};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn provider() -> Provider {
    Provider::new("sm90a", &[("norm", &noise(41, 200_000)), ("page", b"page")])
}

fn release(version: &str, architecture: Option<&str>) -> Release {
    let architecture = architecture.map(|name| CudaArchitecture::parse(name).unwrap());
    let version = FlashInferVersion::parse(version).unwrap();
    Release { version, architecture, folder: None, sha256: None }
}

/// A store that may download, with the old wheel pinned on this server.
fn store_at(root: &Path, server: &Server) -> Store {
    let url = format!("{}/releases/download/v0.6.13/{}", server.url, WHEEL.replace('+', "%2B"));
    let mut config = config(root, url_pins(&url, Digest::of(b"old")));
    config.offline = false;
    Store::open(config).unwrap()
}

/// A server of one file.
fn serving(wheel: Vec<u8>) -> Server {
    Server::start(move |asked, stream| send(asked, stream, &wheel, usize::MAX))
}

fn obtained(store: &Store, release: &Release) -> (PathBuf, Pin) {
    store.obtain(release).unwrap()
}

#[test]
fn a_release_is_found_beside_the_pinned_one() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = provider().wheel();
    let server = serving(wheel.clone());
    let store = store_at(dir.path(), &server);
    let (path, pin) = obtained(&store, &release("0.7.4", Some("sm90a")));
    let file = "flashinfer_jit_cache_sm90a-0.7.4+test-cp39-abi3-linux_x86_64.whl";
    assert_eq!((path.file_name().unwrap().to_str(), pin.file.as_str()), (Some(file), file));
    assert_eq!(fs::read(&path).unwrap(), wheel);
    assert_eq!(pin.sha256, Digest::of(&wheel));
    assert_eq!(pin.record_sha256, Some(Wheel::open(&path).unwrap().record_sha256()));
    let place = format!("/releases/download/v0.7.4/{}", file.replace('+', "%2B"));
    assert_eq!(pin.origin, Origin::Url(format!("{}{place}", server.url)));
    assert!(server.log.lock().unwrap()[0].starts_with(&place));

    // Not downloaded twice, and looked into each time.
    let asked = server.count();
    assert_eq!(obtained(&store, &release("0.7.4", Some("sm90a"))), (path.clone(), pin.clone()));
    assert_eq!(server.count(), asked);
    let wrong = Release { sha256: Some(Digest::of(b"other")), ..release("0.7.4", Some("sm90a")) };
    let e = store.obtain(&wrong).unwrap_err();
    assert!(matches!(e, ArtifactError::DigestMismatch { .. }) && path.is_file(), "{e}");

    // What was pinned serves, by the row that was written.
    let mut pins = store.config().pins.clone();
    pins.extend(&format!(
        "[package.metadata.flashinfer_rs.pinned_wheels.{}.cu130.x86_64]\nfile = '{file}'\nsha256 = '{}'\n\
         record_sha256 = '{}'\nurl = '{}{place}'\n",
        release("0.7.4", Some("sm90a")).package(),
        pin.sha256,
        pin.record_sha256.unwrap(),
        server.url
    ))
    .unwrap();
    let mut config = config(dir.path(), pins);
    config.gpus = Some(Arc::new(|| vec![CudaArchitecture::of_gpu(9, 0)]));
    let located = Store::open(config).unwrap().locate(&Member::module("page"), Fetch::Forbidden).unwrap();
    assert_eq!(located.version, Some(FlashInferVersion::new(0, 7, 4)));
}

#[test]
fn a_download_that_breaks_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = provider().wheel();
    let body = wheel.clone();
    // Every answer ends early.
    let server = Server::start(move |asked, stream| send(asked, stream, &body, 90_000));
    let mut wanted = release("0.7.4", Some("sm90a"));
    wanted.sha256 = Some(Digest::of(&wheel));
    wanted.folder = Some(format!("{}/mirror/", server.url));
    let store = store_at(dir.path(), &server);
    let (path, _) = obtained(&store, &wanted);
    assert_eq!(fs::read(path).unwrap(), wheel);
    let log = server.log.lock().unwrap();
    assert!(log.len() >= 3 && log[1].contains("Some(90000)"), "{log:?}");
    assert!(
        log.iter().all(|line| line.starts_with("/mirror/flashinfer_jit_cache_sm90a-0.7.4%2Btest")),
        "{log:?}"
    );
}

#[test]
fn what_is_not_the_release_is_refused_and_removed() {
    let mut of_another_version = provider();
    of_another_version.version = "0.7.3+cu130";
    let mut members = provider().members();
    let record: String = members.iter().map(|(name, bytes)| record_line(name, bytes)).collect();
    members[0].1[1000] ^= 1;
    let place = "flashinfer_jit_cache_sm90a-0.7.4+cu130.dist-info/RECORD".to_owned();
    members.push((place, record.into_bytes()));
    let members: Vec<_> = members.iter().map(|(name, bytes)| (name.as_str(), &bytes[..])).collect();
    let damaged = wheel_bytes(&members, None);
    let unlisted = {
        let mut members = provider().members();
        let record: String = members.iter().map(|(name, bytes)| record_line(name, bytes)).collect();
        members.push(("extra.py".into(), b"not in RECORD".to_vec()));
        members.push(("flashinfer_jit_cache_sm90a-0.7.4+cu130.dist-info/RECORD".into(), record.into_bytes()));
        let members: Vec<_> = members.iter().map(|(name, bytes)| (name.as_str(), &bytes[..])).collect();
        wheel_bytes(&members, None)
    };
    let shim = flashinfer_wheel("flashinfer_jit_cache-0.7.4+cu130", &[("a.py", b"")]);
    for (wheel, want) in [
        (of_another_version.wheel(), "expected FlashInfer 0.7.4"),
        (Provider::new("sm80", &[("norm", b"norm")]).wheel(), "it is no provider for sm90a"),
        (damaged, "wrong SHA-256 of flashinfer_jit_cache_sm90a-0.7.4"),
        (unlisted, "RECORD has no SHA-256 of extra.py"),
        (shim, "it is no provider for sm90a"),
        (b"a page that says no".to_vec(), "cannot be read as a zip"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let server = serving(wheel);
        let store = store_at(dir.path(), &server);
        let text = store.obtain(&release("0.7.4", Some("sm90a"))).unwrap_err().to_string();
        assert!(text.contains(want), "{want} is not in: {text}");
        assert!(
            files(store.cache_dir(), &|name| name.contains(".whl") && !name.ends_with(".lock")).is_empty()
        );
    }
    // The digest that is known.
    let dir = tempfile::tempdir().unwrap();
    let server = serving(provider().wheel());
    let wanted = Release { sha256: Some(Digest::of(b"other")), ..release("0.7.4", Some("sm90a")) };
    let e = store_at(dir.path(), &server).obtain(&wanted).unwrap_err();
    assert!(matches!(e, ArtifactError::DigestMismatch { .. }), "{e}");
}

#[test]
fn what_no_release_has_is_not_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|_, stream| reply(stream, "404 Not Found", "", b""));
    let store = store_at(dir.path(), &server);
    for (release, want) in [
        (release("0.7.4", None), "has a wheel for each architecture: name that of the GPU"),
        (release("0.6.13", Some("sm90a")), "one wheel for all architectures: leave sm90a out"),
        (
            release("0.7.3", Some("sm90a")),
            "FlashInfer 0.7.3 is none that this crate calls; those are 0.6.13 and 0.7.4",
        ),
    ] {
        let text = store.obtain(&release).unwrap_err().to_string();
        assert!(text.contains(want), "{want} is not in: {text}");
    }
    assert_eq!(server.count(), 0);
    let text = store.obtain(&release("0.7.4", Some("sm75"))).unwrap_err().to_string();
    assert!(text.contains("sm75-0.7.4") && text.contains("HTTP status 404"), "{text}");
    // An address that does not tell the version, and no downloads at all.
    let pins = url_pins(&format!("{}/none", server.url), Digest::of(b"old"));
    let mut config = config(dir.path(), pins);
    let e = Store::open(config.clone()).unwrap().obtain(&release("0.7.4", Some("sm90a"))).unwrap_err();
    assert!(e.to_string().contains("in no folder of its version"), "{e}");
    config.pins = store.config().pins.clone();
    let e = Store::open(config).unwrap().obtain(&release("0.7.4", Some("sm90a"))).unwrap_err();
    assert!(matches!(e, ArtifactError::Offline { .. }), "{e}");
}
