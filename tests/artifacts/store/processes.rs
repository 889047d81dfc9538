//! Threads and processes at once, and those that are killed.

use super::*;

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
