//! Members that are put into the cache ahead, as for an image, and served without their wheel.

use crate::artifact_support::*;
use flashinfer_rs::artifacts::{ArtifactError, Digest, Fetch, Member, Package, Source, Store, Wheel};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

const NAMES: [&str; 3] = ["norm", "page", "rope"];

fn wheel() -> Vec<u8> {
    let content = NAMES.map(|name| noise(name.len() as u64, 60_000));
    let modules: Vec<_> = NAMES.iter().zip(&content).map(|(name, bytes)| (*name, &bytes[..])).collect();
    module_wheel(&modules)
}

/// A server of the wheel, with ranges or without, and whether the digest of its RECORD is pinned.
struct Machine {
    root: TempDir,
    server: Server,
    pinned: Option<Digest>,
}

impl Machine {
    fn new(record_is_pinned: bool) -> Machine {
        let server = Server::start(|asked, stream| send(asked, stream, &wheel(), usize::MAX));
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("w.whl");
        fs::write(&file, wheel()).unwrap();
        let pinned = record_is_pinned.then(|| Wheel::open(&file).unwrap().record_sha256());
        Machine { root, server, pinned }
    }

    fn store(&self, offline: bool) -> Store {
        self.store_in(self.root.path(), offline)
    }

    fn store_in(&self, root: &Path, offline: bool) -> Store {
        let url = format!("{}/wheel.whl", self.server.url);
        let pins = match self.pinned {
            Some(record) => member_pins(&url, &wheel(), record),
            None => url_pins(&url, Digest::of(&wheel())),
        };
        let mut config = config(root, pins);
        config.offline = offline;
        Store::open(config).unwrap()
    }

    fn fetches(&self, patterns: &[&str]) -> Result<Vec<Member>, ArtifactError> {
        let patterns: Vec<_> = patterns.iter().map(|&pattern| pattern.to_owned()).collect();
        self.store(false).fetch_members(&Package::JitCache, &patterns)
    }

    fn has_wheel(&self) -> bool {
        self.root.path().join("cache/wheels").join(WHEEL).exists()
    }
}

fn assert_served(store: &Store, name: &str) {
    let located = store.locate(&Member::module(name), Fetch::Forbidden).unwrap();
    assert_eq!(located.source, Source::CachedMember(WHEEL.into()));
    assert_eq!(fs::read(&located.path).unwrap(), noise(name.len() as u64, 60_000));
}

#[test]
fn chosen_modules_are_served_without_their_wheel() {
    for record_is_pinned in [false, true] {
        let machine = Machine::new(record_is_pinned);
        let members = machine.fetches(&["n*", "page"]).unwrap();
        assert_eq!(members, [Member::module("norm"), Member::module("page")]);
        assert!(!machine.has_wheel());
        let store = machine.store(true);
        assert_served(&store, "norm");
        assert_served(&store, "page");
        let missing = store.locate(&Member::module("rope"), Fetch::Allowed);
        assert!(matches!(missing, Err(ArtifactError::NotFound { .. })), "{missing:?}");
        // A copy of the folder, as in an image, has other times and inodes.
        let copy = tempfile::tempdir().unwrap();
        let copied = std::process::Command::new("cp")
            .args(["-r".as_ref(), store.cache_dir().as_os_str(), copy.path().join("cache").as_os_str()])
            .status();
        assert!(copied.unwrap().success());
        assert_served(&machine.store_in(copy.path(), true), "page");
        // What is there is not fetched again, and what is not is.
        let asked = machine.server.count();
        machine.fetches(&["norm"]).unwrap();
        assert_eq!(machine.server.count(), asked);
        machine.fetches(&["rope"]).unwrap();
        assert!(machine.server.count() > asked);
        assert_served(&machine.store(true), "rope");
        // All of it can be removed.
        machine.store(true).clean().unwrap();
        assert!(files(&machine.root.path().join("cache"), &|_| true).is_empty());
    }
}

#[test]
fn a_wheel_that_was_there_stays() {
    let machine = Machine::new(false);
    machine.store(false).fetch(Package::JitCache).unwrap();
    machine.fetches(&["norm"]).unwrap();
    assert!(machine.has_wheel());
    let store = machine.store(true);
    let located = store.locate(&Member::module("rope"), Fetch::Forbidden).unwrap();
    assert!(matches!(located.source, Source::CachedWheel(_)), "{}", located.source);
    // Without it, the chosen one is served.
    fs::remove_file(machine.root.path().join("cache/wheels").join(WHEEL)).unwrap();
    assert_served(&machine.store(true), "norm");
}

#[test]
fn a_pattern_that_fits_nothing_is_an_error() {
    let machine = Machine::new(true);
    let error = machine.fetches(&["norm", "batch_*"]).unwrap_err().to_string();
    assert!(error.contains("no module matches batch_*") && error.contains("3 modules"), "{error}");
    assert!(machine.store(true).locate(&Member::module("norm"), Fetch::Forbidden).is_err());
}

/// A note of another wheel, or one that was tampered with, serves nothing that its RECORD does not name.
#[test]
fn a_note_counts_for_its_wheel_only() {
    let machine = Machine::new(false);
    machine.fetches(&["norm"]).unwrap();
    let note = machine.root.path().join("cache/wheels").join(format!("{WHEEL}.record"));
    let text = fs::read_to_string(&note).unwrap();
    let (wheel, record) = text.trim_end().split_once(' ').unwrap();
    for wrong in
        [format!("{record} {record}\n"), format!("{wheel} {wheel}\n"), "nonsense".into(), String::new()]
    {
        fs::write(&note, wrong).unwrap();
        assert!(machine.store(true).locate(&Member::module("norm"), Fetch::Forbidden).is_err());
    }
    fs::write(&note, text).unwrap();
    assert_served(&machine.store(true), "norm");
}
