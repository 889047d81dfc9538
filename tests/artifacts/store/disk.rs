//! Disks that are full, read-only, or have something in the way.

use std::{
    thread,
    time::{Duration, Instant},
};

use super::*;

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
    // A process that another test starts holds what was removed open until it runs its program.
    let end = Instant::now() + Duration::from_secs(5);
    while locate(&store, "small").is_err() && Instant::now() < end {
        thread::sleep(Duration::from_millis(10));
    }
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
