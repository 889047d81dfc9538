//! What clean removes, and what it leaves.

use super::*;

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
