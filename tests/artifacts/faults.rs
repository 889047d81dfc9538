//! Disks that fail, fill up, refuse to sync, have no locks or cannot be written. A library that is
//! preloaded stands between the system and a process of its own, in which the store works.
mod kills;

use crate::artifact_support::*;
use flashinfer_rs::artifacts::{ArtifactError, BundledMember, Digest, Fetch, Member, Package, Store, Wheel};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime};
use tempfile::TempDir;
use test_support::c_library;

const ENOSPC: i32 = 28;
const EIO: i32 = 5;
const EROFS: i32 = 30;
const ENOLCK: i32 = 37;
const ENOSYS: i32 = 38;
const EINVAL: i32 = 22;
const EOPNOTSUPP: i32 = 95;
const EDQUOT: i32 = 122;

fn content() -> Vec<u8> {
    noise(50, 700_000)
}

fn wheel() -> Vec<u8> {
    module_wheel(&[("norm", &content())])
}

/// The library that makes disks fail; `None` where there is no C compiler.
fn shim() -> Option<&'static Path> {
    static SHIM: OnceLock<Option<(TempDir, PathBuf)>> = OnceLock::new();
    let shim = SHIM.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let library = folder.path().join("libfaults.so");
        c_library::compile(include_str!("shim.c"), &library, &[]).then_some((folder, library))
    });
    shim.as_ref().map(|(_, library)| library.as_path())
}

/// A machine: a cache that is empty at first, and a server that has the wheel.
struct Machine {
    root: TempDir,
    server: Server,
}

impl Machine {
    /// `None`, with the reason printed, where faults cannot be made.
    fn new() -> Option<Machine> {
        Machine::with_pause(Duration::ZERO)
    }

    /// The same with a server that pauses every 50 000 bytes.
    fn with_pause(pause: Duration) -> Option<Machine> {
        shim()?;
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("w.whl"), wheel()).unwrap();
        let server = Server::start(move |asked, stream| {
            let body = wheel();
            if pause.is_zero() {
                return send(asked, stream, &body, usize::MAX);
            }
            send(asked, stream, &body, 0);
            for chunk in body[asked.range.unwrap_or(0)..].chunks(50_000) {
                std::thread::sleep(pause);
                if std::io::Write::write_all(stream, chunk).is_err() {
                    return;
                }
            }
        });
        Some(Machine { root, server })
    }

    fn cache(&self) -> PathBuf {
        self.root.path().join("cache")
    }

    fn command(&self, what: &str, faults: &[(&str, String)]) -> Command {
        let mut command = child_command(module_path!(), "child_acts");
        command.env("FAULT_TEST_ROOT", self.root.path()).env("FAULT_TEST_URL", &self.server.url);
        command.env("FAULT_TEST_DO", what);
        command.env("LD_PRELOAD", shim().unwrap()).envs(faults.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// What a process of its own says that does `what` while the disk has these faults: the path,
    /// or the error; and what it says besides.
    fn act(&self, what: &str, faults: &[(&str, String)]) -> (Result<String, String>, String) {
        outcome(self.command(what, faults).spawn().unwrap())
    }

    fn named(&self, which: &dyn Fn(&str) -> bool) -> Vec<PathBuf> {
        files(&self.cache(), which)
    }

    fn temporaries(&self) -> Vec<PathBuf> {
        self.named(&|name| name.starts_with(".tmp"))
    }
}

fn outcome(child: std::process::Child) -> (Result<String, String>, String) {
    let output = child.wait_with_output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    let told = |start: &str| out.lines().find_map(|line| Some(line.split_once(start)?.1.to_owned()));
    match (told("DONE "), told("FAILED ")) {
        (Some(done), None) => (Ok(done), err),
        (None, Some(failed)) => (Err(failed), err),
        _ => panic!("{out}\n{err}"),
    }
}

/// How a fault is written for the library.
fn fault(part: &str, numbers: &[i32]) -> String {
    numbers.iter().fold(part.to_owned(), |text, number| format!("{text}:{number}"))
}

#[test]
#[ignore = "a process that another test starts"]
fn child_acts() {
    let (root, url) = (variable("FAULT_TEST_ROOT"), variable("FAULT_TEST_URL"));
    let url = format!("{}/wheel.whl", url.display());
    let what = std::env::var("FAULT_TEST_DO").unwrap();
    match act(&root, &url, &what) {
        Ok(done) => println!("\nDONE {done}"),
        Err(e) => println!("\nFAILED {}", e.to_string().replace('\n', " ")),
    }
}

fn act(root: &Path, url: &str, what: &str) -> Result<String, ArtifactError> {
    let mut config = config(root, url_pins(url, Digest::of(&wheel())));
    config.fetch_options.stall_timeout = Duration::from_secs(30);
    config.offline = false;
    let norm = Member::module("norm");
    let shown = |path: PathBuf| path.display().to_string();
    let locate = |config, fetch| Ok(shown(Store::open(config)?.locate(&norm, fetch)?.path));
    match what {
        "fetch" => Ok(shown(Store::open(config)?.fetch(Package::JitCache)?)),
        "locate" => locate(config, Fetch::Allowed),
        "locate cached" => locate(config, Fetch::Forbidden),
        "extract" => {
            config.wheels = vec![root.join("w.whl")];
            locate(config, Fetch::Forbidden)
        }
        "by ranges" => {
            let record = Wheel::open(&root.join("w.whl"))?.record_sha256();
            config.pins = member_pins(url, &wheel(), record);
            locate(config, Fetch::Allowed)
        }
        "unpack" => {
            config.bundle = vec![BundledMember {
                suffix: norm.suffix().leak(),
                artifact_hash: "0123456789abcdef01234567",
                version: None,
                architectures: &[],
                sha256: Digest::of(&content()),
                size: content().len() as u64,
                zstd: zstd::encode_all(&content()[..], 1).unwrap().leak(),
            }]
            .leak();
            locate(config, Fetch::Forbidden)
        }
        "pip" => {
            config.pins = registry_pins(Digest::of(&wheel()));
            Ok(shown(Store::open(config)?.fetch(Package::TvmFfi)?))
        }
        "clean" => Ok(Store::open(config)?.clean()?.to_string()),
        // For a while, every time anew.
        "fetch again and again" => again_and_again(1, || {
            let store = Store::open(config.clone())?;
            store.fetch(Package::JitCache)?;
            store.locate(&norm, Fetch::Allowed).map(drop)
        }),
        "clean again and again" => again_and_again(2, || Store::open(config.clone())?.clean().map(drop)),
        "clean now and then" => again_and_again(150, || Store::open(config.clone())?.clean().map(drop)),
        "measure again and again" => again_and_again(2, || {
            let measured = Store::open(config.clone())?.cache_size();
            measured.map(drop).map_err(|source| ArtifactError::Cache {
                path: root.into(),
                action: "measure",
                source,
                remedy: String::new(),
            })
        }),
        other => panic!("{other}"),
    }
}

fn again_and_again(
    pause: u64,
    mut work: impl FnMut() -> Result<(), ArtifactError>,
) -> Result<String, ArtifactError> {
    let (start, mut times) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_secs(2) {
        work()?;
        times += 1;
        std::thread::sleep(Duration::from_millis(pause));
    }
    Ok(times.to_string())
}

#[test]
fn a_passing_error_of_the_disk_publishes_no_other_file() {
    for (errno, remedy) in [(ENOSPC, "free space"), (EDQUOT, "free space"), (EIO, "check the path")] {
        for (after, cut_fails) in [(0, false), (300_000, false), (300_000, true), (699_999, false)] {
            let Some(machine) = Machine::new() else { return };
            let mut faults = vec![("FAULT_WRITE", fault(".partial", &[after, errno, 1]))];
            if cut_fails {
                faults.push(("FAULT_CUT", fault(".partial", &[EIO])));
            }
            let case = format!("{errno} after {after}, cut fails: {cut_fails}");
            let (done, _) = machine.act("fetch", &faults);
            for file in machine.named(&|name| name == WHEEL) {
                assert!(fs::read(file).unwrap() == wheel(), "{case}: another file was published");
            }
            let text = done.expect_err(&case);
            assert!(text.contains(WHEEL) && text.contains(remedy), "{case}: {text}");
            // What is left serves the next process.
            let left = machine.named(&|name| name.ends_with(".partial"));
            assert_eq!(left.is_empty(), cut_fails || after == 0, "{case}");
            for file in left {
                assert!(wheel().starts_with(&fs::read(file).unwrap()), "{case}");
            }
            let path = machine.act("fetch", &[]).0.unwrap();
            assert!(fs::read(path).unwrap() == wheel(), "{case}");
            let path = machine.act("locate", &[]).0.unwrap();
            assert!(fs::read(path).unwrap() == content(), "{case}");
            assert_eq!(machine.server.count(), 2, "{case}");
        }
    }
}

#[test]
fn short_writes_are_no_errors() {
    let Some(machine) = Machine::new() else { return };
    let path = machine.act("fetch", &[("FAULT_WRITE", fault(".partial", &[300_001, 0, 0]))]).0.unwrap();
    assert!(fs::read(path).unwrap() == wheel());
}

#[test]
fn a_member_meets_an_error_of_the_disk() {
    for what in ["extract", "unpack", "by ranges", "locate"] {
        for errno in [ENOSPC, EIO] {
            let Some(machine) = Machine::new() else { return };
            let write = ("FAULT_WRITE", fault("norm/.tmp-", &[200_000, errno, 1]));
            let sync = ("FAULT_FSYNC", fault("norm/.tmp-", &[errno, 1]));
            for fault in [write, sync] {
                let text = machine.act(what, &[fault]).0.expect_err(what);
                assert!(text.contains("norm.so"), "{what}: {text}");
                assert!(machine.named(&|name| name == "norm.so").is_empty(), "{what}");
                assert!(machine.temporaries().is_empty(), "{what}");
            }
            let path = machine.act(what, &[]).0.unwrap();
            assert!(fs::read(path).unwrap() == content(), "{what}");
        }
    }
}

#[test]
fn a_stamp_that_cannot_be_written_costs_hashing_only() {
    for faults in [
        [("FAULT_WRITE", fault("wheels/.tmp-", &[20, ENOSPC, 1]))],
        [("FAULT_FSYNC", fault("wheels/.tmp-", &[EDQUOT, 1]))],
        [("FAULT_OPEN", fault("wheels/.tmp-", &[EROFS]))],
    ] {
        let Some(machine) = Machine::new() else { return };
        let path = machine.act("fetch", &faults).0.unwrap();
        assert!(fs::read(path).unwrap() == wheel());
        assert!(machine.named(&|name| name.ends_with(".verified")).is_empty());
        assert!(machine.temporaries().is_empty());
        machine.act("locate cached", &[]).0.unwrap();
        assert_eq!(machine.named(&|name| name.ends_with(".verified")).len(), 1);
    }
}

#[test]
fn a_download_that_cannot_be_synced_is_not_trusted_later() {
    let Some(machine) = Machine::new() else { return };
    let text = machine.act("fetch", &[("FAULT_FSYNC", fault(".partial", &[EIO, 1]))]).0.unwrap_err();
    assert!(text.contains("publish") && text.contains(WHEEL), "{text}");
    let left = machine.named(&|name| name.contains(WHEEL) && !name.ends_with(".lock"));
    assert!(left.is_empty(), "a disk that failed may have kept something else: {left:?}");
    let path = machine.act("fetch", &[]).0.unwrap();
    assert!(fs::read(path).unwrap() == wheel());
}

#[test]
fn a_file_system_that_cannot_sync_serves() {
    for errno in [EINVAL, ENOSYS, EOPNOTSUPP] {
        let Some(machine) = Machine::new() else { return };
        for folder in ["wheels$", "norm$", "cache"] {
            let path = machine.act("locate", &[("FAULT_FSYNC", fault(folder, &[errno, 99]))]).0.unwrap();
            assert!(fs::read(path).unwrap() == content());
            let freed: usize = machine.act("clean", &[]).0.unwrap().parse().unwrap();
            assert!(freed > wheel().len() + content().len(), "{freed}");
        }
    }
    // The folder's own errors say nothing about what is in the files.
    let Some(machine) = Machine::new() else { return };
    machine.act("locate", &[("FAULT_FSYNC", fault("wheels$", &[EIO, 99]))]).0.unwrap();
}

#[test]
fn what_pip_brought_meets_an_error_of_the_disk() {
    use std::os::unix::fs::PermissionsExt;
    let Some(machine) = Machine::new() else { return };
    let bin = machine.root.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let script = "#!/bin/sh\nwhile [ $# -gt 1 ]; do [ \"$1\" = -d ] && to=\"$2\"; shift; done\ncat \"$FAULT_TEST_ROOT/w.whl\" > \
                  \"$to/fake_tvm_ffi-1-py3-none-any.whl\"\n";
    let python = bin.join("python3");
    fs::write(&python, script).unwrap();
    fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();
    let path = std::env::join_paths([bin, "/usr/bin".into(), "/bin".into()]).unwrap();
    let mut with = vec![("PATH", path.into_string().unwrap()), ("PIP_CONFIG_FILE", "/dev/null".into())];
    let sync = ("FAULT_FSYNC", fault(".pip/", &[EIO, 1]));
    let text = machine.act("pip", &[&with[..], &[sync]].concat()).0.unwrap_err();
    assert!(text.contains("publish") && text.contains(TVM_FFI_WHEEL), "{text}");
    assert!(machine.named(&|name| !name.ends_with(".lock")).is_empty());
    for flock in [None, Some(ENOSYS)] {
        with.extend(flock.map(|errno| ("FAULT_FLOCK", errno.to_string())));
        let path = machine.act("pip", &with).0.unwrap();
        assert!(fs::read(&path).unwrap() == wheel());
        fs::remove_file(path).unwrap();
        let left = machine.named(&|name| !name.ends_with(".lock") && !name.ends_with(".verified"));
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn a_cache_that_cannot_be_written_serves_what_it_holds() {
    let Some(machine) = Machine::new() else { return };
    let read_only = [("FAULT_OPEN", fault("/cache", &[EROFS]))];
    let text = machine.act("locate", &read_only).0.unwrap_err();
    assert!(text.contains("FLASHINFER_RS_CACHE_DIR"), "{text}");
    machine.act("fetch", &[]).0.unwrap();
    let text = machine.act("locate", &read_only).0.unwrap_err();
    assert!(text.contains("make it writable") && text.contains("norm"), "{text}");
    machine.act("locate", &[]).0.unwrap();
    machine.act("extract", &[]).0.unwrap();
    for what in ["fetch", "locate", "locate cached", "extract"] {
        machine.act(what, &read_only).0.unwrap();
    }
    let stamp = machine.named(&|name| name.ends_with(".verified")).remove(0);
    fs::remove_file(stamp).unwrap();
    machine.act("locate", &read_only).0.unwrap();
    let text = machine.act("clean", &read_only).0.unwrap_err();
    assert!(text.contains("FLASHINFER_RS_CACHE_DIR"), "{text}");
}

#[test]
fn without_locks_work_goes_on_with_one_warning() {
    for errno in [ENOSYS, EOPNOTSUPP, ENOLCK] {
        for what in ["locate", "by ranges", "extract", "unpack"] {
            let Some(machine) = Machine::new() else { return };
            let (done, said) = machine.act(what, &[("FAULT_FLOCK", errno.to_string())]);
            assert!(fs::read(done.unwrap()).unwrap() == content(), "{what}");
            assert_eq!(said.matches("has no locks").count(), 1, "{what}: {said}");
            assert!(said.contains(machine.cache().to_str().unwrap()), "{what}: {said}");
            let (done, said) = machine.act(what, &[]);
            done.unwrap();
            assert!(!said.contains("has no locks"), "{what}: {said}");
            let cleaned = machine.act("clean", &[("FAULT_FLOCK", errno.to_string())]).0.unwrap();
            assert!(cleaned.parse::<usize>().unwrap() >= content().len(), "{what}: {cleaned}");
            assert!(machine.named(&|name| !name.ends_with(".lock")).is_empty(), "{what}");
        }
    }
}

#[test]
fn without_locks_processes_do_not_disturb_each_other() {
    let Some(machine) = Machine::with_pause(Duration::from_millis(10)) else { return };
    let lockless = [("FAULT_FLOCK", ENOSYS.to_string())];
    let children: Vec<_> = (0..4).map(|_| machine.command("locate", &lockless).spawn().unwrap()).collect();
    // What they are writing is not cleaned away.
    for _ in 0..5 {
        machine.act("clean", &lockless).0.unwrap();
    }
    for child in children {
        outcome(child).0.unwrap();
    }
    assert!(machine.temporaries().is_empty());
    let path = machine.act("locate", &lockless).0.unwrap();
    assert!(fs::read(path).unwrap() == content());
    assert!(machine.named(&|name| name.ends_with(".partial")).is_empty());
}

#[test]
fn without_locks_what_a_killed_process_left_goes_with_time() {
    let Some(machine) = Machine::with_pause(Duration::from_millis(30)) else { return };
    let lockless = [("FAULT_FLOCK", ENOLCK.to_string())];
    let mut child = machine.command("fetch", &lockless).spawn().unwrap();
    let start = Instant::now();
    while machine.temporaries().is_empty() && start.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let [left] = &machine.temporaries()[..] else { panic!("it wrote nothing") };
    machine.act("locate", &lockless).0.unwrap();
    machine.act("clean", &lockless).0.unwrap();
    assert!(left.exists(), "nobody knows that its process is dead");
    let long_ago = SystemTime::now() - Duration::from_secs(48 * 60 * 60);
    fs::File::options().write(true).open(left).unwrap().set_modified(long_ago).unwrap();
    machine.act("fetch", &lockless).0.unwrap();
    assert!(!left.exists());
}

#[test]
fn cleaning_fails_neither_downloads_nor_measuring() {
    let lockless = vec![("FAULT_FLOCK", EOPNOTSUPP.to_string())];
    // Without locks a wheel may be cleaned away between two looks at it, so not at every moment.
    for (faults, clean) in [(vec![], "clean again and again"), (lockless, "clean now and then")] {
        let Some(machine) = Machine::new() else { return };
        let tasks = ["fetch again and again", "fetch again and again", clean, "measure again and again"];
        let children = tasks.map(|what| (what, machine.command(what, &faults).spawn().unwrap()));
        for (what, child) in children {
            let times = outcome(child).0.unwrap_or_else(|e| panic!("{what}, {faults:?}: {e}"));
            println!("{what}: {times} times");
        }
        machine.act("clean", &[]).0.unwrap();
        let left = machine.named(&|_| true);
        assert!(left.is_empty(), "{left:?}");
    }
}
