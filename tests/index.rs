//! Registry packages by name: simple indexes on loopback, and a pip of our own.
#![cfg(feature = "fetch")]

mod artifact_support;

use artifact_support::*;
use flashinfer_rs::artifacts::{ArtifactError, Digest, Fetch, Member, Package, Store};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

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
    match Store::open(config).unwrap().fetch(Package::TvmFfi) {
        Ok(path) => assert_eq!(fs::read(path).unwrap(), wheel()),
        Err(e) => {
            eprintln!("{e}");
            std::process::exit(7);
        }
    }
}

/// A child whose only python3 and pip are shell scripts of ours.
fn with_pip(root: &Path, script: &str, variables: &[(&str, &str)]) -> (Option<i32>, String) {
    use std::os::unix::fs::PermissionsExt;
    let bin = root.join("bin");
    fs::create_dir_all(&bin).unwrap();
    fs::write(root.join("wheel"), wheel()).unwrap();
    for name in ["python3", "pip"] {
        let path = bin.join(name);
        fs::write(&path, format!("#!/bin/sh\necho \"$0 $*\" >> {}/log\n{script}\n", root.display())).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "child_fetches_a_package", "--nocapture"]);
    for name in
        ["UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL", "FLASHINFER_RS_INDEX_URL", "VIRTUAL_ENV"]
    {
        command.env_remove(name);
    }
    command.env("PATH", format!("{}:/usr/bin:/bin", bin.display()));
    command.env("HOME", root).env("INDEX_TEST_ROOT", root).env("PIP_CONFIG_FILE", "/dev/null");
    command.envs(variables.iter().copied());
    let output = command.stdin(Stdio::null()).output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
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

#[test]
fn the_pinned_registry_packages_are_what_their_pins_say() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), flashinfer_rs::artifacts::Pins::built_in().unwrap());
    config.offline = false;
    config.fetch_options = Default::default();
    let store = Store::open(config).unwrap();
    for (member, magic) in [
        (Member::TvmFfi, b"\x7fELF"),
        (Member::TvmFfiTesting, b"\x7fELF"),
        (Member::CudaRuntime, b"\x7fELF"),
        (Member::SmolLm2, b"GGUF"),
    ] {
        match store.locate(&member, Fetch::Allowed) {
            Ok(located) => {
                println!("{member}: {}", located.source);
                assert!(fs::read(&located.path).unwrap().starts_with(magic));
                assert!(located.path.ends_with(member.file_name()));
            }
            Err(ArtifactError::NotFound { tried, .. }) => {
                let last = tried.last().unwrap();
                assert!(last.source.contains("download"), "{last}");
                println!("skipped: no registry can be reached from here: {last}");
            }
            Err(e) => panic!("{e}"),
        }
    }
}
