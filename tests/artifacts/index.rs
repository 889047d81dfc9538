//! Registry packages by name: simple indexes on loopback, and a pip of our own.
use crate::artifact_support::*;
use flashinfer_rs::artifacts::{ArtifactError, CudaKey, Digest, Fetch, Member, Package, Store};
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn wheel() -> Vec<u8> {
    good_wheel(&[("tvm_ffi/lib/libtvm_ffi.so", &noise(60, 5000))])
}

fn store(root: &Path, index_url: &str) -> Store {
    let mut config = config(root, registry_pins(Digest::of(&wheel())));
    config.offline = false;
    config.index_url = Some(index_url.into());
    Store::open(config).unwrap()
}

/// An index with one page, which `{sha256}` and `{file}` complete.
fn index(content_type: &'static str, page: &'static str) -> Server {
    Server::start(move |asked, stream| match asked.path.as_str() {
        "/simple/fake-tvm-ffi/" => {
            assert!(asked.accept.contains("json") && asked.accept.contains("text/html"));
            let digest = Digest::of(&wheel()).to_string();
            let page = page.replace("{sha256}", &digest).replace("{file}", TVM_FFI_WHEEL);
            reply(stream, "200 OK", &format!("content-type: {content_type}\r\n"), page.as_bytes());
        }
        path if path.starts_with(&format!("/files/{TVM_FFI_WHEEL}")) => {
            send(asked, stream, &wheel(), usize::MAX);
        }
        _ => reply(stream, "404 Not Found", "", b""),
    })
}

#[test]
fn html_and_json_indexes_are_read() {
    for (kind, page) in [
        ("text/html", r#"<a href="/files/{file}#sha256={sha256}">{file}</a>"#),
        ("text/html", r#"<a href="other-1.whl">o</a><a href='../../files/{file}?a=1&amp;b=2'>x</a>"#),
        ("text/html", r#"<html><head><base href="/files/"></head><a href="{file}">x</a>"#),
        (
            "application/vnd.pypi.simple.v1+json",
            r#"{"files":[{"filename":"other","url":"other"},
                {"filename":"{file}","url":"../../files/{file}","hashes":{"sha256":"{sha256}"}}]}"#,
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let server = index(kind, page);
        let store = store(dir.path(), &format!("{}/simple/", server.url));
        let located = store.locate(&Member::TvmFfi, Fetch::Allowed).unwrap();
        assert_eq!(fs::read(located.path).unwrap(), noise(60, 5000), "{page}");
        assert_eq!(server.count(), 2);
    }
}

#[test]
fn a_file_of_a_package_that_a_program_pins_is_located() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (noise(61, 5000), noise(62, 5000));
    let wheel = good_wheel(&[("own/a/data.bin", &one), ("own/b/data.bin", &two)]);
    let (sha256, served) = (Digest::of(&wheel), wheel.clone());
    let server = Server::start(move |asked, stream| match asked.path.as_str() {
        "/simple/own-model/" => {
            let page = b"<a href='/files/own_model-1-py3-none-any.whl'>x</a>";
            reply(stream, "200 OK", "content-type: text/html\r\n", page);
        }
        _ => send(asked, stream, &served, usize::MAX),
    });
    let mut config = config(dir.path(), registry_pins(sha256));
    config.offline = false;
    config.index_url = Some(format!("{}/simple/", server.url));
    let row = format!(
        "[package.metadata.flashinfer_rs.pinned_wheels.own_model.any.any]\n\
         file='own_model-1-py3-none-any.whl'\nsha256='{sha256}'\npackage='own-model'\nversion='1'"
    );
    config.pins.extend(&row).unwrap();
    let other = Store::open(config.clone()).unwrap();
    let store = Store::open(config).unwrap();
    let file = |key: &str, suffix: &str| {
        let package = Package::Other(key.into());
        Member::File { package, suffix: suffix.into() }
    };
    let forbidden = store.locate(&file("own_model", "own/a/data.bin"), Fetch::Forbidden).unwrap_err();
    assert!(!format!("{forbidden:#}").contains("flashinfer-doctor"), "{forbidden:#}");
    // Files of one name, twice each, from two stores.
    for store in [&store, &other] {
        for (suffix, content) in [("own/a/data.bin", &one), ("b/data.bin", &two)] {
            let located = store.locate(&file("own_model", suffix), Fetch::Allowed).unwrap();
            assert_eq!(&fs::read(&located.path).unwrap(), content);
            assert!(located.path.ends_with("data.bin"), "{located:?}");
        }
    }
    assert_eq!(server.count(), 2);
    // Two files fit, none does, nobody pins the package.
    for (member, want) in [
        (file("own_model", "data.bin"), "both own/a/data.bin and own/b/data.bin are data.bin"),
        (file("own_model", "own/c/data.bin"), "holds no own/c/data.bin"),
        (file("another", "own/a/data.bin"), "another has no pin"),
        (file("own_model", "own/../data.bin"), "names no module, and no file of a wheel"),
    ] {
        let text = format!("{:#}", store.locate(&member, Fetch::Allowed).unwrap_err());
        assert!(text.contains(want), "{text}");
    }
    assert!(store.clean().unwrap() > 15_000);
    assert!(store.cache_files().unwrap().is_empty(), "{:?}", store.cache_files());
}

#[test]
fn a_redirected_index_is_the_base_of_its_links() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|asked, stream| match asked.path.as_str() {
        "/simple/fake-tvm-ffi/" => {
            reply(stream, "301 Moved", "location: /deep/er/page/\r\n", b"");
        }
        "/deep/er/page/" => {
            let page = format!("<a href='../{TVM_FFI_WHEEL}'>x</a>");
            reply(stream, "200 OK", "content-type: text/html\r\n", page.as_bytes());
        }
        path if path == format!("/deep/er/{TVM_FFI_WHEEL}") => {
            send(asked, stream, &wheel(), usize::MAX);
        }
        _ => reply(stream, "404 Not Found", "", b""),
    });
    let store = store(dir.path(), &format!("{}/simple", server.url));
    store.fetch(Package::TvmFfi).unwrap();
}

#[test]
fn credentials_of_the_index_reach_its_files_only() {
    let dir = tempfile::tempdir().unwrap();
    let other = Server::start(|asked, stream| {
        assert_eq!(asked.authorization, None);
        send(asked, stream, &wheel(), usize::MAX);
    });
    let elsewhere = other.url.clone();
    let server = Server::start(move |asked, stream| {
        assert_eq!(asked.authorization.as_deref(), Some("Basic bWU6c2VjcmV0"));
        let page = format!("<a href='{elsewhere}/{TVM_FFI_WHEEL}'>x</a>");
        reply(stream, "200 OK", "content-type: text/html\r\n", page.as_bytes());
    });
    let url = server.url.replace("http://", "http://me:secret@");
    let store = store(dir.path(), &url);
    store.fetch(Package::TvmFfi).unwrap();
    assert_eq!((server.count(), other.count()), (1, 1));
    assert!(!format!("{store:?}").contains("secret"));
}

#[test]
fn an_index_that_serves_other_bytes_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|asked, stream| {
        if asked.path.ends_with(".whl") {
            return reply(stream, "200 OK", "", b"something else");
        }
        let page = format!("<a href='{TVM_FFI_WHEEL}'>x</a>");
        reply(stream, "200 OK", "content-type: text/html\r\n", page.as_bytes());
    });
    let e = store(dir.path(), &server.url).fetch(Package::TvmFfi).unwrap_err();
    assert!(matches!(e, ArtifactError::DigestMismatch { .. }), "{e}");
}

#[test]
#[ignore = "a process that another test starts"]
fn child_fetches_a_package() {
    let root = variable("INDEX_TEST_ROOT");
    let mut config = config(&root, registry_pins(Digest::of(&wheel())));
    config.offline = false;
    config.fetch_options.page_timeout = Duration::from_secs(2);
    match Store::open(config).unwrap().fetch(Package::TvmFfi) {
        Ok(path) => assert_eq!(fs::read(path).unwrap(), wheel()),
        Err(e) => {
            eprintln!("{e}\n{e:?}");
            std::process::exit(7);
        }
    }
}

#[test]
#[ignore = "a process that another test starts"]
fn child_looks_for_a_toolkit() {
    CudaKey::select(&|_| None).unwrap();
}

fn fetching(root: &Path) -> Command {
    child_of_none("child_fetches_a_package", root)
}

/// A child without settings of this machine.
fn child_of_none(test: &str, root: &Path) -> Command {
    let mut command = child_command(module_path!(), test);
    let settings = ["PIP_", "UV_", "PYTHON", "XDG_", "FLASHINFER_RS_INDEX_URL", "VIRTUAL_ENV"];
    for (name, _) in std::env::vars() {
        let lower = name.to_ascii_lowercase();
        if settings.iter().any(|start| name.starts_with(start)) || lower.ends_with("_proxy") {
            command.env_remove(name);
        }
    }
    command.env("HOME", root).env("INDEX_TEST_ROOT", root).env("PIP_CONFIG_FILE", "/dev/null");
    command.current_dir(root).stdin(Stdio::null());
    command
}

fn ended(command: &mut Command) -> (Option<i32>, String) {
    let output = command.output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn executable(path: &Path, script: &str) {
    fs::write(path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A child whose only python3 and pip are shell scripts of ours.
fn with_pip(root: &Path, script: &str, variables: &[(&str, &str)]) -> (Option<i32>, String) {
    let bin = root.join("bin");
    fs::create_dir_all(&bin).unwrap();
    fs::write(root.join("wheel"), wheel()).unwrap();
    for name in ["python3", "pip"] {
        executable(&bin.join(name), &format!("echo \"$0 $*\" >> {}/log\n{script}", root.display()));
    }
    let mut command = fetching(root);
    command.env("PATH", format!("{}:/usr/bin:/bin", bin.display()));
    ended(command.envs(variables.iter().copied()))
}

/// Copies the wheel to the folder after `-d`.
fn copying() -> String {
    format!("while [ \"$1\" != -d ]; do shift; done; cp \"$INDEX_TEST_ROOT/wheel\" \"$2/{TVM_FFI_WHEEL}\"")
}

#[test]
fn pip_is_asked_by_name_version_and_platform() {
    let dir = tempfile::tempdir().unwrap();
    let (code, text) = with_pip(dir.path(), &copying(), &[]);
    assert_eq!(code, Some(0), "{text}");
    let log = fs::read_to_string(dir.path().join("log")).unwrap();
    for want in ["-m pip download", "--no-deps", "Fake_TVM.ffi==1", "manylinux2014_x86_64", "abi3"] {
        assert!(log.contains(want), "{want} is not in: {log}");
    }
    assert!(files(&dir.path().join("cache"), &|name| name.contains("pip")).is_empty());
}

#[test]
fn both_failures_are_told_without_credentials() {
    let dir = tempfile::tempdir().unwrap();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("http://me:secret@{closed}/simple");
    let script = "echo 'ERROR: no such thing at http://me:secret@host.example/x' >&2; exit 3";
    let (code, text) = with_pip(dir.path(), script, &[("PIP_INDEX_URL", &url)]);
    assert_eq!(code, Some(7), "{text}");
    for want in ["PIP_INDEX_URL", "127.0.0.1", "python3 -m pip", "no such thing", "host.example"] {
        assert!(text.contains(want), "{want} is not in: {text}");
    }
    assert!(!text.contains("secret"), "{text}");
}

#[test]
fn an_index_that_fails_leaves_it_to_pip() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|_, stream| reply(stream, "404 Not Found", "", b""));
    let (code, text) = with_pip(dir.path(), &copying(), &[("UV_DEFAULT_INDEX", &server.url)]);
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(server.count(), 1);
}

#[test]
fn the_configuration_of_pip_names_the_index() {
    let dir = tempfile::tempdir().unwrap();
    let server = index("text/html", r#"<a href="/files/{file}">{file}</a>"#);
    let file = dir.path().join("pip.conf");
    fs::write(&file, format!("[global]\nindex-url = {}/simple\n", server.url)).unwrap();
    let variables = [("PIP_CONFIG_FILE", file.to_str().unwrap())];
    let (code, text) = with_pip(dir.path(), "exit 1", &variables);
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(server.count(), 2);
}

#[test]
fn pip_that_brings_other_bytes_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let script = format!("while [ \"$1\" != -d ]; do shift; done; echo x > \"$2/{TVM_FFI_WHEEL}\"");
    let (code, text) = with_pip(dir.path(), &script, &[]);
    assert_eq!(code, Some(7), "{text}");
    assert!(text.contains("wrong SHA-256") && text.contains(TVM_FFI_WHEEL), "{text}");
    assert!(!dir.path().join("cache/wheels").join(TVM_FFI_WHEEL).exists());
}

/// What is in the working folder, and what `PATH` and `PYTHONPATH` find there, is not executed.
#[test]
fn nothing_of_the_working_folder_is_executed() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let executed = root.join("executed");
    let touch = format!("open({executed:?}, 'w')\n");
    for name in ["pip.py", "sitecustomize.py", "encodings.py"] {
        fs::write(root.join(name), &touch).unwrap();
    }
    // The machine's own Python. Without an index it asks nobody.
    for list in ["", ".", ":"] {
        let mut command = fetching(root);
        let (code, text) = ended(command.env("PIP_NO_INDEX", "1").env("PYTHONPATH", list));
        assert_eq!(code, Some(7), "{text}");
        assert!(!executed.exists(), "PYTHONPATH={list:?}: {text}");
    }
    // Programs of relative places.
    fs::create_dir(root.join("bin")).unwrap();
    for name in ["bin/python3", "bin/pip", "bin/nvcc", "python3", "pip", "nvcc"] {
        executable(&root.join(name), &format!("touch {}", executed.display()));
    }
    for list in ["bin:.", "bin:/none", ".", ""] {
        let (code, text) = ended(fetching(root).env("PATH", list));
        assert_eq!(code, Some(7), "{text}");
        assert!(!executed.exists(), "PATH={list:?}: {text}");
        let (code, text) = ended(child_of_none("child_looks_for_a_toolkit", root).env("PATH", list));
        assert_eq!(code, Some(0), "{text}");
        assert!(!executed.exists(), "nvcc, PATH={list:?}: {text}");
    }
}

#[test]
fn pip_runs_in_an_empty_folder() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    fs::write(root.join("own.conf"), "[global]\n").unwrap();
    let script = format!(
        "(pwd; ls -A | wc -l; echo safe $PYTHONSAFEPATH; echo path $PATH; echo python $PYTHONPATH; \
         echo conf $PIP_CONFIG_FILE; echo links $PIP_FIND_LINKS) >> {}/log\n{}",
        root.display(),
        copying()
    );
    let variables =
        [("PYTHONPATH", "own::/absolute"), ("PIP_CONFIG_FILE", "own.conf"), ("PIP_FIND_LINKS", "http://x/")];
    let (code, text) = with_pip(root, &script, &variables);
    assert_eq!(code, Some(0), "{text}");
    let log = fs::read_to_string(root.join("log")).unwrap();
    let root = root.canonicalize().unwrap();
    let lines: Vec<_> = log.lines().skip(1).collect();
    assert!(Path::new(lines[0]).starts_with(root.join("cache")), "{log}");
    let conf = format!("conf {}", dir.path().join("own.conf").display());
    let path = format!("path {}/bin:/usr/bin:/bin", dir.path().display());
    assert_eq!(lines[1..], ["0", "safe 1", &path, "python /absolute", &conf, "links http://x/"], "{log}");
}

/// A program that pip started, and that outlives it, keeps nobody waiting.
#[test]
fn a_pipe_that_stays_open_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let start = Instant::now();
    let (code, text) =
        with_pip(dir.path(), "echo 'ERROR: no' >&2\nsleep 60 > /dev/null < /dev/null &\nexit 3", &[]);
    assert_eq!(code, Some(7), "{text}");
    assert!(text.contains("ERROR: no"), "{text}");
    assert!(start.elapsed() < Duration::from_secs(40), "{:?}", start.elapsed());
}

/// Whatever form an address has, its secrets are in no error.
#[test]
fn secrets_of_settings_are_never_told() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let failing = Server::start(|_, stream| reply(stream, "403 Forbidden", "", b"no"));
    let failing = failing.url.trim_start_matches("http://");
    let script =
        "printf 'ERROR: %s and (%s): %s\\n' \"$PIP_INDEX_URL\" \"$UV_INDEX\" \"$ALL_PROXY\" >&2\nexit 3";
    for url in [
        format!("http://me:secret@{closed}/simple"),
        format!("http://secret@{closed}/simple"),
        format!("http://me:s%65cret%2Fsecret@{failing}/simple"),
        format!("http://me:<secret>^|\"@{failing}/simple"),
        format!("http://me:secret@secret@{failing}/simple"),
        format!("http://me:12/secret@{failing}/simple"),
        format!("http://me:secret/x@{failing}/simple"),
        format!("http://me:1?secret#secret@{failing}/simple"),
        format!("http://me:se cret@{failing}/simple?secret"),
        format!("me:secret@{failing}/simple"),
        format!("http://{failing}/secret/simple?token=secret"),
        format!("http://{failing}/simple/?token=s%65cret#secret"),
        format!("file://me:secret@{failing}/secret/simple"),
        "ssh://me:secret@host/simple".into(),
        "http://me:secret@host:port/simple".into(),
        "http://me:secret@[host/simple".into(),
    ] {
        for variable in ["FLASHINFER_RS_INDEX_URL", "UV_DEFAULT_INDEX", "PIP_INDEX_URL", "UV_INDEX"] {
            let dir = tempfile::tempdir().unwrap();
            let (code, text) = with_pip(dir.path(), script, &[(variable, &url)]);
            assert_eq!(code, Some(7), "{variable}={url}: {text}");
            let told =
                variable == "FLASHINFER_RS_INDEX_URL" && text.contains("by the index that the configuration");
            assert!(text.contains(variable) || told, "{variable}={url}: {text}");
            for secret in ["secret", "cret", "s%65", "me:"] {
                assert!(!text.contains(secret), "{variable}={url}: {text}");
            }
        }
        // In a file of pip's, and as a proxy.
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pip.conf");
        fs::write(&file, format!("[global]\nindex-url =\n    {url}\n")).unwrap();
        let variables = [("PIP_CONFIG_FILE", file.to_str().unwrap()), ("ALL_PROXY", &url)];
        let (code, text) = with_pip(dir.path(), script, &variables);
        assert_eq!(code, Some(7), "{url}: {text}");
        assert!(text.contains("pip.conf") && !text.contains("cret"), "{url}: {text}");
    }
}

#[test]
fn an_index_of_our_own_that_is_none_is_the_error() {
    for (url, want) in [
        ("file:///wheels", "FLASHINFER_RS_WHEELS"),
        ("host/simple", "relative URL"),
        ("ftp://host/", "https://"),
        ("http://host:port/", "port"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (code, text) = with_pip(dir.path(), &copying(), &[("FLASHINFER_RS_INDEX_URL", url)]);
        assert_eq!(code, Some(7), "{text}");
        assert!(text.contains("FLASHINFER_RS_INDEX_URL") && text.contains(want), "{url}: {text}");
        assert!(!dir.path().join("log").exists(), "pip is not asked for what somebody else should give");
    }
}

#[test]
fn the_indexes_beside_the_default_one_are_asked_too() {
    let server = index("text/html", r#"<a href="/files/{file}">{file}</a>"#);
    let none = Server::start(|_, stream| reply(stream, "404 Not Found", "", b""));
    let extra = format!("x={0}/no y={1}/simple", none.url, server.url);
    for variable in ["UV_INDEX", "PIP_EXTRA_INDEX_URL"] {
        let dir = tempfile::tempdir().unwrap();
        let variables = [("PIP_INDEX_URL", none.url.as_str()), (variable, &extra)];
        let (code, text) = with_pip(dir.path(), "exit 1", &variables);
        assert_eq!(code, Some(0), "{text}");
    }
    assert_eq!((server.count(), none.count()), (4, 4));
}

/// An index that answers every page with `page`; pip is none.
fn told_of(page: Vec<u8>, kind: &'static str) -> (String, Duration) {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(move |_, stream| {
        reply(stream, "200 OK", &format!("content-type: {kind}\r\n"), &page);
    });
    let start = Instant::now();
    let (code, text) = with_pip(dir.path(), "exit 1", &[("UV_DEFAULT_INDEX", &server.url)]);
    assert_eq!(code, Some(7), "{text}");
    (text, start.elapsed())
}

#[test]
fn hostile_pages_are_refused_at_once() {
    let mebibyte = |text: &str| text.repeat((1 << 20) / text.len()).into_bytes();
    let html = [
        b"<base href='x:?y://z'><a href='y'>".to_vec(),
        format!("<base href='x:?y://z'><a href='{TVM_FFI_WHEEL}'>").into_bytes(),
        format!("<base href='data:,'><a href='x:{TVM_FFI_WHEEL}'>").into_bytes(),
        format!("<a href='file:///{TVM_FFI_WHEEL}'><a href='//[/{TVM_FFI_WHEEL}'>").into_bytes(),
        format!("<a href='http://127.0.0.1:1/{TVM_FFI_WHEEL}'>").into_bytes(),
        mebibyte("&"),
        [b"<a href='".to_vec(), mebibyte("&")].concat(),
        [b"<a href='".to_vec(), mebibyte("../")].concat(),
        mebibyte("<a href='&#"),
        mebibyte("<base href=//x>"),
        vec![0xff; 1 << 20],
        vec![b'<'; 5 << 20],
    ];
    for page in html {
        let (text, took) = told_of(page, "text/html");
        assert!(text.contains("127.0.0.1") && !text.contains("panicked"), "{text}");
        assert!(took < Duration::from_secs(20), "{took:?}: {text}");
    }
    let (text, _) = told_of(vec![b' '; 5 << 20], "text/html");
    assert!(text.contains("more than 4194304 bytes"), "{text}");
    for page in [
        b"{".to_vec(),
        b"{\"files\":[{\"filename\":1}]}".to_vec(),
        [b"{\"files\":".to_vec(), mebibyte("[")].concat(),
        format!("{{\"files\":[{{\"filename\":\"{TVM_FFI_WHEEL}\",\"url\":\"x:?y://z\"}}]}}").into_bytes(),
    ] {
        let (text, took) = told_of(page, "application/vnd.pypi.simple.v1+json");
        assert!(text.contains("127.0.0.1") && !text.contains("panicked"), "{text}");
        assert!(took < Duration::from_secs(20), "{took:?}: {text}");
    }
}

/// A page that drips, in its head or in its body, for as long as somebody listens.
#[test]
fn a_page_has_a_bound_in_time() {
    for head in [
        "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\n\r\n",
        "HTTP/1.1 200 OK\r\nx: ",
        "HTTP/1.1 100 Continue\r\n\r\n",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(move |_, stream| {
            let _ = stream.write_all(head.as_bytes());
            // No more than half a minute, so that this ends whatever happens.
            for _ in 0..300 {
                std::thread::sleep(Duration::from_millis(100));
                if stream.write_all(b"x").and_then(|()| stream.flush()).is_err() {
                    return;
                }
            }
        });
        let start = Instant::now();
        let (code, text) = with_pip(dir.path(), "exit 1", &[("UV_DEFAULT_INDEX", &server.url)]);
        assert_eq!(code, Some(7), "{text}");
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}: {text}", start.elapsed());
        assert_eq!(server.count(), 1);
    }
}

#[test]
fn the_pinned_registry_packages_are_what_their_pins_say() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), flashinfer_rs::artifacts::Pins::built_in().unwrap());
    config.offline = false;
    config.fetch_options = Default::default();
    let store = Store::open(config).unwrap();
    let file = |suffix: &str| Member::File { package: Package::TvmFfi, suffix: suffix.into() };
    for (member, magic) in [
        (Member::TvmFfi, b"\x7fELF"),
        (Member::TvmFfiTesting, b"\x7fELF"),
        (Member::CudaRuntime, b"\x7fELF"),
        (file("tvm_ffi/include/tvm/ffi/c_api.h"), b"/*\n "),
    ] {
        match store.locate(&member, Fetch::Allowed) {
            Ok(located) => {
                println!("{member}: {}", located.source);
                assert!(fs::read(&located.path).unwrap().starts_with(magic));
                assert!(located.path.ends_with(member.file_name()));
            }
            Err(ArtifactError::NotFound { searched, .. }) => {
                let last = searched.last().unwrap();
                assert!(last.source.contains("download"), "{last}");
                println!("skipped: no registry can be reached from here: {last}");
            }
            Err(e) => panic!("{e}"),
        }
    }
}
