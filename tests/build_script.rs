//! The build script as cargo runs it, for a small program that depends on this crate.
//!
//! Everything is in one test, because all cases share one target folder: what is told apart is
//! when the script runs again, and what it embeds then.
#![cfg(all(feature = "embed", target_os = "linux"))]

mod artifact_support;

use artifact_support::*;
use flashinfer_rs::artifacts::{CudaKey, Package, Pins};
use std::fs;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const HOUR: Duration = Duration::from_secs(3600);

const PROGRAM: &str = r#"
use flashinfer_rs::artifacts::{Fetch, Member, Store, StoreConfig};
fn main() {
    let mut config = StoreConfig::from_env().unwrap();
    config.offline = true;
    println!("embedded {}", config.bundle.len());
    let store = Store::open(config).unwrap();
    for member in [Member::module("norm"), Member::TvmFfi, Member::CudaRuntime] {
        if let Ok(located) = store.locate(&member, Fetch::Forbidden) {
            let text = std::fs::read_to_string(located.path).unwrap();
            println!("{member} from {}: {text}", located.source);
        }
    }
}
"#;

struct Project {
    folder: tempfile::TempDir,
}

struct Ran {
    good: bool,
    text: String,
}

impl Ran {
    /// Whether the crate was compiled again.
    fn compiled(&self) -> bool {
        self.text.contains("Compiling flashinfer-rs") || self.text.contains("Dirty flashinfer-rs")
    }

    fn expect(&self, good: bool, wants: &[&str]) {
        assert_eq!(self.good, good, "{}", self.text);
        for want in wants {
            assert!(self.text.contains(want), "{want} is not in: {}", self.text);
        }
    }
}

impl Project {
    fn new() -> Project {
        let folder = tempfile::tempdir().unwrap();
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let manifest = format!(
            "[package]\nname = 'embeds'\nversion = '0.0.0'\nedition = '2024'\n\n[workspace]\n\n\
             [dependencies.flashinfer-rs]\npath = {root:?}\ndefault-features = false\n\
             features = ['embed']\n\n[profile.dev]\ndebug = false\n"
        );
        fs::create_dir(folder.path().join("src")).unwrap();
        fs::write(folder.path().join("Cargo.toml"), manifest).unwrap();
        fs::write(folder.path().join("src/main.rs"), PROGRAM).unwrap();
        fs::copy(root.join("Cargo.lock"), folder.path().join("Cargo.lock")).unwrap();
        Project { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn target(&self) -> PathBuf {
        // Kept between runs of this test, so that dependencies are compiled once.
        Path::new(env!("CARGO_TARGET_TMPDIR")).join("build_script")
    }

    fn cargo(&self, command: &str, variables: &[(&str, &str)]) -> Ran {
        let output = self.command(&[command, "--offline", "-v"], variables).output().unwrap();
        Ran { good: output.status.success(), text: String::from_utf8_lossy(&output.stderr).into_owned() }
    }

    /// A cargo that may use the network, on a terminal.
    fn cargo_on_a_terminal(&self, command: &str, variables: &[(&str, &str)]) -> Ran {
        let (good, text) = on_a_terminal(&mut self.command(&[command, "-v"], variables));
        Ran { good, text }
    }

    fn command(&self, arguments: &[&str], variables: &[(&str, &str)]) -> Command {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(arguments).current_dir(self.folder.path());
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            let ours = name.starts_with("FLASHINFER_RS_") || name.starts_with("CARGO_PKG_");
            if ours || name.starts_with("CARGO_BIN_") || name == "DOCS_RS" {
                cargo.env_remove(name);
            }
        }
        cargo.env("CARGO_TARGET_DIR", self.target()).env("CARGO_TERM_COLOR", "never");
        cargo.env("FLASHINFER_RS_CACHE_DIR", self.path("cache"));
        cargo.envs(variables.iter().copied());
        cargo
    }

    /// Runs the built program with every source but the bundle switched off.
    fn program(&self) -> String {
        let mut program = Command::new(self.target().join("debug/embeds"));
        program.env("FLASHINFER_RS_CACHE_DIR", self.path("cache-of-the-program"));
        program.env_remove("FLASHINFER_RS_WHEELS");
        let output = program.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

/// Runs a command that has a terminal, and gives what it shows there.
fn on_a_terminal(command: &mut Command) -> (bool, String) {
    let (mut controller, mut terminal) = (0, 0);
    let (name, settings, size) = (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: two descriptors are written, and owned from here on.
    let (controller, terminal) = unsafe {
        assert_eq!(libc::openpty(&mut controller, &mut terminal, name, settings, size), 0);
        (fs::File::from_raw_fd(controller), fs::File::from_raw_fd(terminal))
    };
    command.stdin(terminal.try_clone().unwrap());
    command.stdout(terminal.try_clone().unwrap()).stderr(terminal);
    // SAFETY: two system calls, of the new process alone.
    unsafe {
        command.pre_exec(|| match libc::setsid() >= 0 && libc::ioctl(0, libc::TIOCSCTTY, 0) == 0 {
            true => Ok(()),
            false => Err(std::io::Error::last_os_error()),
        })
    };
    let mut child = command.spawn().unwrap();
    // The command holds the other end, which must close with the process.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut shown = Vec::new();
    // At the end, reading fails.
    let _ = (&controller).read_to_end(&mut shown);
    (child.wait().unwrap().success(), String::from_utf8_lossy(&shown).into_owned())
}

#[test]
fn the_build_script_embeds_warns_and_fails_as_told() {
    let project = Project::new();
    let wheels = project.path("wheels");
    fs::create_dir(&wheels).unwrap();
    let norm = wheels.join("norm.whl");
    fs::write(&norm, module_wheel(&[("norm", b"first norm"), ("page", b"page")])).unwrap();
    let tvm_ffi: (&str, &[u8]) = ("tvm_ffi/lib/libtvm_ffi.so", b"a tvm_ffi");
    let cudart: (&str, &[u8]) = ("nvidia/cu13/lib/libcudart.so.13", b"a cudart");
    fs::write(wheels.join("libraries.whl"), good_wheel(&[tvm_ffi, cudart])).unwrap();
    let wheels = wheels.to_str().unwrap();

    // Off: nothing is looked at, not even a wheel path that is wrong.
    let off = [("FLASHINFER_RS_EMBED", "off"), ("FLASHINFER_RS_WHEELS", "/no/such.whl")];
    project.cargo("build", &off).expect(true, &[]);
    assert_eq!(project.program(), "embedded 0\n");
    let again = project.cargo("build", &off);
    again.expect(true, &["Fresh flashinfer-rs"]);
    assert!(!again.compiled(), "{}", again.text);

    // A mode that does not exist.
    let bad = [("FLASHINFER_RS_EMBED", "sometimes")];
    let wants = ["FLASHINFER_RS_EMBED", "sometimes", "`auto`", "`require`", "`off`"];
    project.cargo("build", &bad).expect(false, &wants);

    // Auto, nothing at hand, no network: one line, and nothing written, not even a folder. The
    // second time, there is nothing to do; nor for a build, which has the same run of the script.
    let wants = ["warning: ", "not embedded: kernel modules", "libcudart.so.13", "At run time"];
    for offline in [&[][..], &[("FLASHINFER_RS_OFFLINE", "1")]] {
        for command in ["check", "build"] {
            project.cargo(command, offline).expect(true, &wants);
        }
        for command in ["check", "check", "build", "check"] {
            let again = project.cargo(command, offline);
            again.expect(true, &wants);
            assert!(!again.text.contains("Dirty flashinfer-rs"), "{command}: {}", again.text);
            assert_eq!(again.text.matches("not embedded").count(), 1, "{}", again.text);
        }
        assert!(!project.path("cache").exists());
    }
    assert_eq!(project.program(), "embedded 0\n");

    // Require: a check passes and is not held up, the build that follows tells what is missing.
    let require = [("FLASHINFER_RS_EMBED", "require")];
    project.cargo("check", &require).expect(true, &[]);
    project.cargo("build", &require).expect(false, &["no module matches", "norm", "--offline"]);
    // An alias of a check is a check, and one of a build is a build.
    fs::create_dir(project.path(".cargo")).unwrap();
    fs::write(project.path(".cargo/config.toml"), "[alias]\nck = 'check'\nxb = 'build'\n").unwrap();
    project.cargo("ck", &require).expect(true, &[]);
    project.cargo("xb", &require).expect(false, &["no module matches", "norm", "--offline"]);
    project.cargo("b", &require).expect(false, &["no module matches", "norm", "--offline"]);
    fs::remove_dir_all(project.path(".cargo")).unwrap();
    assert!(!project.path("cache").exists());

    // A bundle made of local wheels.
    let local = [
        ("FLASHINFER_RS_EMBED", "require"),
        ("FLASHINFER_RS_EMBED_MODULES", "nor*"),
        ("FLASHINFER_RS_WHEELS", wheels),
    ];
    project.cargo("build", &local).expect(true, &[]);
    let program = project.program();
    for want in [
        "embedded 3",
        "`norm` from embedded bundle: first norm",
        "libtvm_ffi.so from embedded bundle: a tvm_ffi",
        "libcudart.so.13 from embedded bundle: a cudart",
    ] {
        assert!(program.contains(want), "{want} is not in: {program}");
    }
    assert!(!project.cargo("build", &local).compiled());
    let whole = files(&project.target(), &|name| name.ends_with(".whl"));
    assert!(whole.is_empty(), "whole wheels in target: {whole:?}");

    // A path that starts where cargo runs.
    let mut relative = local;
    relative[2].1 = "wheels";
    project.cargo("build", &relative).expect(true, &[]);
    assert!(project.program().starts_with("embedded 3\n"));

    // Another content of the same wheel, and another wheel in the folder.
    fs::write(&norm, module_wheel(&[("norm", b"second norm"), ("page", b"page")])).unwrap();
    assert!(project.cargo("build", &local).compiled());
    assert!(project.program().contains("second norm"));
    fs::write(project.path("wheels/rope.whl"), module_wheel(&[("normal", b"normal")])).unwrap();
    assert!(project.cargo("build", &local).compiled());
    assert!(project.program().starts_with("embedded 4\n"));
    fs::remove_file(project.path("wheels/rope.whl")).unwrap();

    // A pattern that fits nothing: a warning in auto, an error in require.
    let mut odd = local;
    odd[1].1 = "norm, nothing_like_*";
    project.cargo("build", &odd).expect(false, &["nothing_like_*"]);
    odd[0].1 = "auto";
    project.cargo("build", &odd).expect(true, &["warning: ", "nothing_like_*"]);
    assert!(project.program().starts_with("embedded 3\n"));

    // docs.rs builds whatever is missing.
    let docs = [("FLASHINFER_RS_EMBED", "require"), ("DOCS_RS", "1")];
    project.cargo("build", &docs).expect(true, &["docs.rs"]);

    // A wheel path that is wrong.
    let missing = [("FLASHINFER_RS_WHEELS", "/no/such.whl")];
    project.cargo("build", &missing).expect(false, &["/no/such.whl"]);

    // A machine with CUDA, and a proxy that lets nothing through.
    let toolkit = project.path("cuda");
    fs::create_dir(&toolkit).unwrap();
    let proxy = Server::start(|_, stream| stream.write_all(b"HTTP/1.1 403 No\r\n\r\n").unwrap());
    let able = [
        ("CUDA_HOME", toolkit.to_str().unwrap()),
        ("HTTPS_PROXY", &proxy.url),
        ("FLASHINFER_RS_INDEX_URL", &proxy.url),
        ("FLASHINFER_RS_CUDA", "cu130"),
    ];
    // A check does not wait.
    let wants = ["warning: ", "not embedded: kernel modules", "checks and editors do not wait"];
    project.cargo_on_a_terminal("check", &able).expect(true, &wants);
    let again = project.cargo_on_a_terminal("check", &able);
    again.expect(true, &wants);
    assert!(!again.text.contains("Dirty flashinfer-rs"), "{}", again.text);
    assert_eq!(proxy.count(), 0);
    // Somebody changes the folder of downloads: a build looks again, and shows what it is at.
    fs::write(project.path("cache/wheels/new"), "").unwrap();
    let build = project.cargo_on_a_terminal("build", &able);
    build.expect(true, &["Downloading flashinfer_jit_cache 0.6.13 to embed", "cannot download"]);
    assert!(proxy.count() > 0);
    let asked = proxy.count();
    // It has tried. Nobody tries again, and a check is fresh once it has read what the build left.
    for (command, fresh) in [("build", true), ("check", false), ("check", true)] {
        let again = project.cargo_on_a_terminal(command, &able);
        again.expect(true, &["cannot download"]);
        assert!(!again.text.contains("Downloading flashinfer"), "{}", again.text);
        assert!(!fresh || !again.text.contains("Dirty flashinfer-rs"), "{}", again.text);
    }
    assert_eq!(proxy.count(), asked);
    // Nobody waits for what no machine here can run.
    let bare = &able[1..];
    project.cargo_on_a_terminal("build", bare).expect(true, &["neither NVIDIA's driver nor a CUDA toolkit"]);
    assert_eq!(proxy.count(), asked);
    // No network is used by a build that is told to use none, whatever the machine can run.
    let other = [&able[..], &[("PIP_INDEX_URL", proxy.url.as_str())]].concat();
    project.cargo("build", &other).expect(true, &["not embedded: kernel modules", "cargo is offline"]);
    assert_eq!(proxy.count(), asked);

    // A pinned wheel in the cache, with the stamp of a verified download. It is not what its pin
    // says, so whoever hashes it refuses it.
    let pins = Pins::select(CudaKey::new(13, 0), std::env::consts::ARCH).unwrap();
    let pin = pins.get(Package::JitCache).unwrap();
    let cached = project.path("cache/wheels").join(&pin.file);
    fs::create_dir_all(cached.parent().unwrap()).unwrap();
    fs::write(&cached, module_wheel(&[("norm", b"pinned norm")])).unwrap();
    stamp(&cached, pin.sha256);
    let modified = fs::metadata(&cached).unwrap().modified().unwrap();
    let libraries = format!("{wheels}/libraries.whl");
    let stamped = [
        ("FLASHINFER_RS_EMBED", "require"),
        ("FLASHINFER_RS_EMBED_MODULES", "norm"),
        ("FLASHINFER_RS_WHEELS", &libraries),
        ("FLASHINFER_RS_CUDA", "cu130"),
    ];
    project.cargo("build", &stamped).expect(true, &[]);
    assert!(project.program().contains("`norm` from embedded bundle: pinned norm"));
    // Nothing has changed: the script does not run, and would not notice other bytes of the same
    // size and time.
    let mut bytes = fs::read(&cached).unwrap();
    bytes[60] ^= 1;
    fs::write(&cached, &bytes).unwrap();
    fs::File::options().write(true).open(&cached).unwrap().set_modified(modified).unwrap();
    let again = project.cargo("build", &stamped);
    again.expect(true, &["Fresh flashinfer-rs"]);
    assert!(!again.compiled(), "{}", again.text);
    bytes[60] ^= 1;
    fs::write(&cached, &bytes).unwrap();
    fs::File::options().write(true).open(&cached).unwrap().set_modified(modified).unwrap();
    // The old stamp would no longer do: whoever asks the system sees that the file was written to.
    stamp(&cached, pin.sha256);
    // A variable has changed: the script runs, and trusts the stamp.
    let more = [&stamped[..], &[("PIP_INDEX_URL", "http://127.0.0.1:9/simple")]].concat();
    let other = project.cargo("build", &more);
    other.expect(true, &[]);
    assert!(other.compiled(), "{}", other.text);
    // The wheel has changed: it is hashed.
    fs::File::options().write(true).open(&cached).unwrap().set_modified(modified + HOUR).unwrap();
    project.cargo("build", &stamped).expect(false, &[pin.file.as_str(), &pin.sha256.to_string()]);

    // A pinned wheel with a wrong digest fails every mode but off.
    fs::write(&cached, b"damaged").unwrap();
    let found = flashinfer_rs::artifacts::Digest::of(b"damaged").to_string();
    let expected = pin.sha256.to_string();
    let wants = [pin.file.as_str(), &expected, &found];
    for mode in ["auto", "require"] {
        let key = [("FLASHINFER_RS_EMBED", mode), ("FLASHINFER_RS_CUDA", "cu130")];
        project.cargo("build", &key).expect(false, &wants);
    }
    let key = [("FLASHINFER_RS_CUDA", "cu999")];
    project.cargo("build", &key).expect(false, &["cu999", "cu130, cu131"]);
}
