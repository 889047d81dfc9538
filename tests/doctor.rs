//! `flashinfer-doctor` as a process of its own, always with a cache of its own.
#![cfg(feature = "doctor")]

mod artifact_support;

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};
use test_support::{c_library, required};

use flashinfer_rs::{
    ModuleName,
    artifacts::{CudaKey, Digest, Package, Pins, StoreConfig, Wheel},
    signatures,
};
use serde_json::Value;
use tempfile::TempDir;

/// A machine with nothing on it but what the program embeds.
struct Doctor {
    cache: TempDir,
    offline: bool,
}

impl Doctor {
    fn new() -> Self {
        Self { cache: tempfile::tempdir().unwrap(), offline: true }
    }

    /// A machine that also has what modules need to open. `false`, with the
    /// reason printed, where it cannot be had.
    fn with_libraries() -> (Self, bool) {
        let mut doctor = Doctor::new();
        let libraries = [("libtvm_ffi", "apache_tvm_ffi"), ("libcudart", "nvidia_cuda_runtime")];
        let had = libraries.iter().all(|(what, package)| embeds(what) || doctor.fetches(package));
        (doctor, had)
    }

    /// Fetches a package. `false`, with the reason printed, where it cannot be had.
    fn fetches(&mut self, package: &str) -> bool {
        let offline = std::mem::replace(&mut self.offline, false);
        let output = self.run(&["fetch", package]);
        self.offline = offline;
        if !output.status.success() {
            required::skip(required::LIBTVM_FFI, output_text(&output).1);
        }
        output.status.success()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flashinfer-doctor"));
        command.args(args).stdin(Stdio::null());
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("FLASHINFER_RS_") {
                command.env_remove(name);
            }
        }
        command.env("FLASHINFER_RS_CACHE_DIR", self.cache.path());
        command.env("FLASHINFER_RS_OFFLINE", if self.offline { "1" } else { "0" });
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// The report, after its exit code was compared with its verdict.
    fn report(&self, args: &[&str]) -> Report {
        let output = self.run(&[&["--json"], args].concat());
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        let verdict = json["kernels_can_run"].as_bool().unwrap();
        assert_eq!(output.status.code(), Some(i32::from(!verdict)));
        let report = Report(json);
        assert_eq!(verdict, report.with_status("problem").is_empty());
        for finding in report.findings() {
            assert_eq!(finding["status"] == "ok", finding["remedy"].is_null(), "{finding}");
        }
        report
    }

    /// The cache's copy of a pinned wheel.
    fn pinned(&self, package: Package) -> PathBuf {
        let pins = Pins::built_in().unwrap();
        self.cache.path().join("wheels").join(&pins.get(package).unwrap().file)
    }
}

struct Report(Value);

impl Report {
    fn findings(&self) -> Vec<&Value> {
        let sections = self.0["sections"].as_array().unwrap().iter();
        sections.flat_map(|section| section["findings"].as_array().unwrap()).collect()
    }

    fn section(&self, title: &str) -> &[Value] {
        let mut sections = self.0["sections"].as_array().unwrap().iter();
        let section = sections.find(|section| section["title"].as_str().unwrap().starts_with(title));
        section.unwrap_or_else(|| panic!("no section {title}"))["findings"].as_array().unwrap()
    }

    fn with_status(&self, status: &str) -> Vec<String> {
        let findings = self.findings().into_iter();
        findings.filter(|finding| finding["status"] == status).map(told).collect()
    }
}

/// A finding's text and remedy.
fn told(finding: &Value) -> String {
    format!("{} -> {}", text(&finding["text"]), text(&finding["remedy"]))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn embeds(what: &str) -> bool {
    StoreConfig::from_env().unwrap().bundle.iter().any(|member| member.suffix.contains(what))
}

fn output_text(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (text(&output.stdout), text(&output.stderr))
}

#[test]
fn a_bare_machine_is_told_what_it_lacks() {
    let doctor = Doctor::new();
    let report = doctor.report(&[]);
    let problems = report.with_status("problem").join("\n");
    if !embeds("jit_cache") {
        assert!(problems.contains("no module is at hand"), "{problems}");
        assert!(problems.contains("flashinfer-doctor fetch flashinfer_jit_cache"), "{problems}");
        assert!(problems.contains("FLASHINFER_RS_WHEELS"), "{problems}");
    }
    if !embeds("libtvm_ffi") {
        assert!(problems.contains("libtvm_ffi.so"), "{problems}");
        assert!(problems.contains("flashinfer-doctor fetch apache_tvm_ffi"), "{problems}");
    }
    if !Path::new("/proc/driver/nvidia/version").exists() {
        assert!(problems.contains("no NVIDIA driver") && problems.contains("580"), "{problems}");
    }
    let sources: Vec<_> = report.section("Sources").iter().map(told).collect();
    for package in Package::KERNELS {
        assert!(sources.iter().any(|source| source.contains(package.key())), "{sources:?}");
    }
    assert!(sources.last().unwrap().contains("forbidden"), "{sources:?}");
    assert!(!doctor.cache.path().join("wheels").exists(), "nothing is downloaded");
}

#[test]
fn the_text_ends_in_the_verdict() {
    let doctor = Doctor::new();
    let output = doctor.run(&[]);
    let (out, err) = output_text(&output);
    let verdict = if output.status.success() { "Kernels can run here" } else { "Kernels cannot run here" };
    assert!(out.lines().last().unwrap().starts_with(verdict), "{out}");
    assert!(err.is_empty(), "{err}");
    assert!(embeds("jit_cache") || out.contains("PROBLEM"), "{out}");
}

#[test]
fn what_is_wrong_with_a_source_is_told() {
    let doctor = Doctor::new();
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing.whl");
    let report = doctor.report(&["--wheels", missing.to_str().unwrap()]);
    let problems = report.with_status("problem").join("\n");
    assert!(problems.contains("missing.whl is not a usable wheel"), "{problems}");
    assert!(problems.contains("correct the path"), "{problems}");

    let report = doctor.report(&["--wheels", folder.path().to_str().unwrap()]);
    let warnings = report.with_status("warning").join("\n");
    assert!(warnings.contains("holds no .whl file"), "{warnings}");

    let wheel = doctor.pinned(Package::JitCache);
    fs::create_dir_all(wheel.parent().unwrap()).unwrap();
    fs::write(&wheel, "half a wheel").unwrap();
    let problems = doctor.report(&[]).with_status("problem").join("\n");
    assert!(problems.contains("wrong SHA-256"), "{problems}");
    assert!(problems.contains("run `flashinfer-doctor fetch`"), "{problems}");
}

#[test]
fn settings_that_mean_nothing_are_reported() {
    let doctor = Doctor::new();
    let output = doctor.command(&["--json"]).env("FLASHINFER_RS_OFFLINE", "perhaps").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let report = Report(serde_json::from_slice(&output.stdout).unwrap());
    let finding = &report.section("Settings")[0];
    assert!(text(&finding["text"]).contains("FLASHINFER_RS_OFFLINE=\"perhaps\""), "{finding}");
    assert_eq!(finding["remedy"], "correct or unset FLASHINFER_RS_OFFLINE");
}

#[test]
fn wheels_at_hand_are_listed_opened_and_compared() {
    let Some(wheels) = required::test_wheels("0.6.13") else { return };
    let (doctor, libraries) = Doctor::with_libraries();
    let report = doctor.report(&["--check", "--wheels", wheels.to_str().unwrap()]);
    let listed = report.section("Sources").iter().flat_map(|source| source["details"].as_array().unwrap());
    assert!(listed.clone().any(|name| name == ModuleName::NORM.as_str()));
    assert!(listed.count() >= 20);
    if !libraries {
        return;
    }
    // There or not, it is no problem.
    let cublas = report.section("CUDA runtime").iter().find(|found| text(&found["text"]).contains("cuBLAS"));
    assert_eq!(cublas.unwrap()["status"], "ok");
    let modules: Vec<_> = report.section("Modules").iter().map(told).collect();
    for family in ["norm: 1 of 1 open", "page: 1 of 1 open", "batch_decode_with_kv_cache: "] {
        assert!(modules.iter().any(|module| module.starts_with(family)), "{modules:?}");
    }
    let open = report.section("Modules").iter().filter(|finding| finding["status"] == "ok");
    let open: Vec<_> = open
        .flat_map(|finding| finding["details"].as_array().unwrap())
        .map(|name| ModuleName::new(text(name)))
        .collect();
    let declared = signatures();
    let expected = declared
        .iter()
        .map(|(pattern, _)| open.iter().filter(|module| module.matches(pattern)).count())
        .sum::<usize>();
    assert!(expected >= 10, "{open:?}");
    let compared = report.section("Signatures");
    assert_eq!(text(&compared[0]["text"]), format!("{expected} functions compared, all as declared"));
    let lacking = modules.iter().find(|finding| finding.starts_with("no module opens of"));
    let opens = |pattern: &str| open.iter().any(|module| module.matches(pattern));
    for (pattern, _) in declared {
        // Under the name that another version gives the same modules, they may open.
        let other = match pattern.strip_suffix("_kv_stride_equal") {
            Some(other) => other.to_owned(),
            None => format!("{pattern}_kv_stride_equal"),
        };
        assert_eq!(
            lacking.is_some_and(|lacking| lacking.split([' ', ',', '\n']).any(|word| word == pattern)),
            !opens(pattern) && !opens(&other),
            "{pattern}: {lacking:?}"
        );
    }
    // Long lists are cut in the text, and not with --verbose.
    let plain = output_text(&doctor.run(&["--wheels", wheels.to_str().unwrap()])).0;
    let verbose = output_text(&doctor.run(&["--verbose", "--wheels", wheels.to_str().unwrap()])).0;
    assert!(verbose.lines().count() > plain.lines().count() + 20);
}

#[test]
fn a_changed_module_is_reported() {
    let (doctor, libraries) = Doctor::with_libraries();
    let folder = tempfile::tempdir().unwrap();
    let (library, wheel) = (folder.path().join("page.so"), folder.path().join("own.whl"));
    let append = "append_paged_kv_cache(0: DLTensor*, 1: int) -> void";
    if !libraries || !c_library::compile(&c_library::module_that_says(&[append]), &library, &[]) {
        return;
    }
    let module = fs::read(&library).unwrap();
    fs::write(&wheel, artifact_support::module_wheel(&[("page", &module)])).unwrap();
    let report = doctor.report(&["--check", "--wheels", wheel.to_str().unwrap()]);
    let finding = report
        .section("Signatures")
        .iter()
        .find(|finding| finding["status"] == "problem")
        .expect("a problem");
    assert!(text(&finding["text"]).contains("2 of "), "{finding}");
    assert!(text(&finding["remedy"]).contains("the FlashInfer version that this crate pins"), "{finding}");
    let details: Vec<_> = finding["details"].as_array().unwrap().iter().map(text).collect();
    let [changed, missing] = details.as_slice() else { panic!("{details:?}") };
    assert!(changed.starts_with("module page ") && changed.contains("page.so"), "{changed}");
    assert!(
        changed.ends_with("append_paged_kv_cache: the module takes 2 arguments, declared are 10"),
        "{changed}"
    );
    assert!(missing.ends_with("append_paged_mla_kv_cache: the module does not export it"), "{missing}");
}

#[test]
fn a_cache_that_is_mounted_noexec_is_the_cause() {
    let folder = tempfile::tempdir().unwrap();
    let shim = folder.path().join("libfaults.so");
    if !c_library::compile(include_str!("artifacts/shim.c"), &shim, &[]) {
        return;
    }
    let doctor = Doctor::new();
    let missing = doctor.cache.path().join("not/made/yet");
    for cache in [doctor.cache.path(), &missing] {
        let mut command = doctor.command(&["--json"]);
        command.env("FLASHINFER_RS_CACHE_DIR", cache).env("LD_PRELOAD", &shim).env("FAULT_NOEXEC", "1");
        let report = Report(serde_json::from_slice(&command.output().unwrap().stdout).unwrap());
        let problems = report.with_status("problem").join("\n");
        assert!(problems.contains("mounted `noexec`"), "{problems}");
        assert!(problems.contains("set FLASHINFER_RS_CACHE_DIR"), "{problems}");
        let usual = doctor.report(&[]).with_status("problem").join("\n");
        assert!(!usual.contains("noexec"), "{usual}");
    }
}

/// As in an image whose file system is mounted read-only.
#[test]
fn a_cache_serves_where_nothing_can_be_written() {
    let folder = tempfile::tempdir().unwrap();
    let shim = folder.path().join("libfaults.so");
    let Some(wheels) = required::test_wheels("0.6.13") else { return };
    let (doctor, libraries) = Doctor::with_libraries();
    if !libraries || !c_library::compile(include_str!("artifacts/shim.c"), &shim, &[]) {
        return;
    }
    let first_use = |modules: &[&str], read_only: bool| {
        let arguments = [&["footprint", "--wheels", wheels.to_str().unwrap()], modules].concat();
        let mut command = doctor.command(&arguments);
        if read_only {
            command.env("LD_PRELOAD", &shim).env("FAULT_OPEN", "/:30");
        }
        let output = command.output().unwrap();
        (output.status.success(), output_text(&output).1)
    };
    let (done, error) = first_use(&["norm"], true);
    assert!(!done && error.contains("make it writable"), "{error}");
    assert_eq!(first_use(&["norm", "page"], false), (true, String::new()));
    assert_eq!(first_use(&["norm", "page"], true), (true, String::new()));
    let (done, error) = first_use(&["rope"], true);
    assert!(!done && error.contains("rope") && error.contains("make it writable"), "{error}");
}

/// What the image of a program runs is a command of this program, for modules that there are.
#[test]
fn the_command_of_the_image_is_one() {
    let file = include_str!("../deploy/kernels.Containerfile");
    let modules =
        file.lines().find_map(|line| line.strip_prefix("ARG MODULES=\"")?.strip_suffix('"')).unwrap();
    let known: Vec<_> = include_str!("data/module_names.txt").lines().collect();
    for pattern in modules.split(' ') {
        let fits = |name: &&str| ModuleName::new(*name).matches(pattern);
        assert!(known.iter().any(fits), "no module fits {pattern}");
    }
    let command =
        file.lines().find_map(|line| line.strip_prefix("RUN target/release/flashinfer-doctor ")).unwrap();
    let command = command.replace("\"$MODULES\"", "MODULES").replace("/cache", "CACHE");
    let doctor = Doctor::new();
    let arguments: Vec<_> = command
        .split(' ')
        .map(|word| match word {
            "MODULES" => modules,
            "CACHE" => doctor.cache.path().to_str().unwrap(),
            word => word,
        })
        .collect();
    // There is no network here, and nothing wrong with the command.
    let output = doctor.run(&arguments);
    let (_, err) = output_text(&output);
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("flashinfer_jit_cache: ") && err.contains("is not downloaded"), "{err}");
}

#[test]
fn the_cache_is_emptied() {
    let doctor = Doctor::new();
    let wheel = doctor.pinned(Package::TvmFfi);
    fs::create_dir_all(wheel.parent().unwrap()).unwrap();
    fs::write(&wheel, [0; 1000]).unwrap();
    let other = doctor.cache.path().join("somebody-else's");
    fs::write(&other, "kept").unwrap();
    let output = doctor.run(&["clean"]);
    let (out, err) = output_text(&output);
    assert!(output.status.success(), "{err}");
    assert!(out.starts_with("1000 bytes") && out.contains(doctor.cache.path().to_str().unwrap()), "{out}");
    assert!(!wheel.exists() && other.exists());
    let again = doctor.run(&["clean"]);
    assert!(output_text(&again).0.starts_with("0 bytes"));
}

#[test]
fn a_download_that_is_not_allowed_says_so() {
    let doctor = Doctor::new();
    for args in [
        &["fetch"][..],
        &["fetch", "apache-tvm-ffi", "nvidia_cuda_runtime"],
        &["fetch", "--modules", "norm,page", "--modules", "batch_decode_*"],
    ] {
        let output = doctor.run(args);
        let (out, err) = output_text(&output);
        assert_eq!(output.status.code(), Some(1));
        assert!(out.is_empty(), "{out}");
        assert!(err.contains("error: apache_tvm_ffi: ") && err.contains("is not downloaded"), "{err}");
        assert!(err.contains("unset FLASHINFER_RS_OFFLINE, or put the file at "), "{err}");
        assert_eq!(err.contains("flashinfer_jit_cache"), args.len() != 3, "{err}");
    }
}

#[test]
fn the_digest_of_a_record_is_written_where_its_wheel_is_pinned() {
    let doctor = Doctor::new();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (wheel, other, manifest) = (at("a.whl"), at("b.whl"), at("Cargo.toml"));
    let bytes = artifact_support::module_wheel(&[("norm", b"norm")]);
    fs::write(&wheel, &bytes).unwrap();
    fs::write(&other, artifact_support::module_wheel(&[("norm", b"other")])).unwrap();
    let record = format!("record_sha256 = \"{}\"", Wheel::open(wheel.as_ref()).unwrap().record_sha256());
    let row = |key: &str, sha256: Digest| {
        format!(
            "\n# A row.\n[package.metadata.flashinfer_rs.pinned_wheels.flashinfer_jit_cache.{key}.x86_64]\n\
             file   = 'a.whl' # quoted\nsha256 = \"{sha256}\"\nurl = 'http://127.0.0.1:9/a.whl'\n"
        )
    };
    let rows = [
        row("cu130", Digest::of(&bytes)),
        row("cu131", Digest::of(b"another")),
        row("cu132", Digest::of(&bytes)),
    ];
    let before = format!("[package]\nname = 'own'\n{}", rows.concat());
    fs::write(&manifest, &before).unwrap();

    let run = |args: &[&str]| {
        let output = doctor.run(&[&["pin"], args].concat());
        (output.status.code(), output_text(&output))
    };
    for _ in 0..2 {
        let (code, (out, err)) = run(&["--file", &wheel, "--write", &manifest]);
        assert_eq!(code, Some(0), "{err}");
        assert!(out.contains("2 rows") && out.contains(&record), "{out}");
        // One line more in two rows, and nothing else.
        let [first, second, third] = &rows;
        let written = format!("[package]\nname = 'own'\n{first}{record}\n{second}{third}{record}\n");
        assert_eq!(fs::read_to_string(&manifest).unwrap(), written);
    }
    let pins = Pins::parse(&fs::read_to_string(&manifest).unwrap(), CudaKey::new(13, 0), "x86_64").unwrap();
    assert!(record.contains(&pins.get(Package::JitCache).unwrap().record_sha256.unwrap().to_string()));

    // A file that nobody pins, no file at all, no manifest, no wheel.
    let (missing, text) = (at("missing"), at("Cargo.toml"));
    for (args, want) in [
        (&["--file", &*other, "--write", &manifest][..], "which no row of"),
        (&["--file", &wheel], "which no row of this crate's pin table states"),
        (&["--file", &missing], "missing"),
        (&["--file", &text], "is not a usable wheel"),
        (&["--file", &wheel, "--write", &missing], "missing"),
        (&["--file", &wheel, "--write", &wheel], "a.whl"),
        (&[], "is not downloaded"),
    ] {
        let (code, (out, err)) = run(args);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{args:?}");
        assert!(err.contains(want), "{want} is not in: {err}");
    }
    assert_eq!(fs::read(&wheel).unwrap(), bytes);

    // A wheel in the cache is hashed, whatever its stamp says.
    let pins = Pins::built_in().unwrap();
    let pin = pins.get(Package::JitCache).unwrap();
    let cached = doctor.cache.path().join("wheels").join(&pin.file);
    fs::create_dir_all(cached.parent().unwrap()).unwrap();
    fs::write(&cached, &bytes).unwrap();
    artifact_support::stamp(&cached, pin.sha256);
    let (code, (out, err)) = run(&[]);
    assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
    assert!(err.contains("which no row of this crate's pin table states"), "{err}");
}

#[test]
fn a_release_is_downloaded_verified_and_pinned() {
    let provider = artifact_support::Provider::new("sm90a", &[("norm", b"norm"), ("page", b"page")]);
    let (wheel, body) = (provider.wheel(), provider.wheel());
    let server = artifact_support::Server::start(move |asked, stream| {
        artifact_support::send(asked, stream, &body, usize::MAX);
    });
    let doctor = Doctor { offline: false, ..Doctor::new() };
    let folder = tempfile::tempdir().unwrap();
    let manifest = folder.path().join("pins.toml");
    let run = |args: &[&str]| {
        let output = doctor.run(&[&["pin"], args].concat());
        (output.status.code(), output_text(&output))
    };
    let from = format!("{}/mirror", server.url);
    let release = ["0.7.4", "sm90a", "--from", &from];
    let (code, (out, err)) = run(&release);
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("compare it with another source"), "{err}");
    let sha256 = Digest::of(&wheel).to_string();
    assert!(out.contains(&format!("sha256 = \"{sha256}\"")), "{out}");

    // Written beside other rows, twice with the same result, and with a digest without the note.
    fs::write(&manifest, "[package]\nname = 'own' # mine\n").unwrap();
    let written = [&release[..], &["--sha256", &sha256, "--write", manifest.to_str().unwrap()]].concat();
    for _ in 0..2 {
        let (code, (out, err)) = run(&written);
        assert_eq!((code, err.contains("compare it")), (Some(0), false), "{err}");
        let text = fs::read_to_string(&manifest).unwrap();
        let (before, row) = text.split_once("\n\n").unwrap_or_else(|| panic!("{text}"));
        assert_eq!(before, "[package]\nname = 'own' # mine");
        assert!(out.ends_with(row), "{row} is not the end of {out}");
        assert_eq!(text.matches("flashinfer_jit_cache_sm90a.cu130").count(), 1, "{text}");
    }
    let mut pins = Pins::built_in().unwrap();
    pins.extend(&fs::read_to_string(&manifest).unwrap()).unwrap();
    let package = Package::Other("flashinfer_jit_cache_sm90a".into());
    assert_eq!(pins.get(package).unwrap().sha256, Digest::of(&wheel));

    // A program, and this one, takes it by a setting.
    let mut command = doctor.command(&["--json"]);
    let output = command.env("FLASHINFER_RS_PINS", &manifest).output().unwrap();
    let report = Report(serde_json::from_slice(&output.stdout).unwrap());
    let sources: Vec<_> = report.section("Sources").iter().map(told).collect();
    let pinned = sources.iter().find(|source| source.contains("flashinfer_jit_cache_sm90a-0.7.4"));
    assert!(
        pinned.is_some_and(|source| source.contains("FlashInfer 0.7.4, for sm90a, 2 modules")),
        "{sources:?}"
    );
    let output = doctor.command(&[]).env("FLASHINFER_RS_PINS", "/no/such/file").output().unwrap();
    assert!(output_text(&output).0.contains("FLASHINFER_RS_PINS=\"/no/such/file\""));

    let other = Digest::of(b"other").to_string();
    for (args, code, want) in [
        (&["0.7.4", "sm90a", "--from", &*from, "--sha256", &*other][..], 1, "wrong SHA-256"),
        (&["0.7.4"], 1, "name that of the GPU, such as sm90a"),
        (&["0.7.2", "sm90a"], 1, "those are 0.6.13 and 0.7.4"),
        (&["sm90a"], 1, "expected packages, or a version and an architecture"),
        (&["0.7.4", "sm90a", "--file", "x.whl"], 1, "--file goes with packages"),
        (&["apache_tvm_ffi", "--from", &*from], 1, "--sha256 and --from belong to"),
        (&["flashinfer_jit_cache_sm89"], 1, "flashinfer_jit_cache_sm89 has no pin"),
        (&["0.7"], 2, "or a version such as 0.7.4"),
        (&["0.7.4", "sm90a", "--sha256", "12"], 2, "64 hexadecimal digits"),
    ] {
        let (found, (out, err)) = run(args);
        assert_eq!((found, out.as_str()), (Some(code), ""), "{args:?}: {err}");
        assert!(err.replace('\n', " ").contains(want), "{want} is not in: {err}");
    }
}

#[test]
fn versions_and_architectures_of_wheels_are_reported() {
    let doctor = Doctor::new();
    let folder = tempfile::tempdir().unwrap();
    let provider = artifact_support::Provider::new("sm90a", &[("norm", b"norm")]);
    let metadata = b"Name: flashinfer-jit-cache\nRequires-Dist: flashinfer-jit-cache-sm90a==0.7.4+cu130\n";
    let shim = artifact_support::flashinfer_wheel(
        "flashinfer_jit_cache-0.7.4+cu130",
        &[("flashinfer_jit_cache-0.7.4+cu130.dist-info/METADATA", metadata)],
    );
    let mut of_later = artifact_support::Provider::new("sm90a", &[("norm", b"norm")]);
    of_later.version = "0.7.5+cu130";
    for (name, wheel) in [("a.whl", provider.wheel()), ("b.whl", shim), ("c.whl", of_later.wheel())] {
        fs::write(folder.path().join(name), wheel).unwrap();
    }
    let report = doctor.report(&["--wheels", folder.path().to_str().unwrap()]);
    let sources: Vec<_> = report.section("Sources").iter().map(told).collect();
    for (at, want) in [
        (0, "FlashInfer 0.7.4, for sm90a, 1 module"),
        (1, "it is the shim of FlashInfer 0.7.4, which holds no module"),
        (2, "it is of FlashInfer 0.7.5, and this crate calls 0.6.13 and 0.7.4"),
    ] {
        assert!(sources[at].contains(want), "{want} is not in: {}", sources[at]);
    }
    // Of a GPU, the first may be for another one, which is told too.
    let statuses: Vec<_> =
        report.section("Sources")[1..3].iter().map(|found| text(&found["status"])).collect();
    assert_eq!(statuses, ["warning", "warning"]);
}

#[test]
fn the_package_of_a_library_is_told_beside_its_own_version() {
    let Some(wheel) = artifact_support::later_tvm_ffi() else { return };
    let (doctor, libraries) = Doctor::with_libraries();
    if !libraries {
        return;
    }
    let report = doctor.report(&["--wheels", wheel.to_str().unwrap()]);
    let found: Vec<_> = report.section("CUDA runtime").iter().map(told).collect();
    let want =
        format!("libtvm_ffi {} (of the package's version 0.1.15.post2): ", artifact_support::LATER_TVM_FFI);
    assert!(found.iter().any(|found| found.starts_with(&want)), "{found:?}");
}

#[test]
fn the_pinned_digests_are_those_of_the_wheels() {
    let mut doctor = Doctor::new();
    let packages = ["apache_tvm_ffi", "nvidia_cuda_runtime"];
    if !packages.iter().all(|package| doctor.fetches(package)) {
        return;
    }
    let (out, err) = output_text(&doctor.run(&["pin", packages[0], packages[1]]));
    for package in [Package::TvmFfi, Package::CudaRuntime] {
        let pins = Pins::built_in().unwrap();
        let digest = pins.get(package).unwrap().record_sha256.expect("it is pinned");
        assert!(out.contains(&format!("record_sha256 = \"{digest}\"")), "{digest}: {out} {err}");
    }
}

#[test]
fn the_footprint_is_printed() {
    let doctor = Doctor::new();
    let (out, err) = output_text(&doctor.run(&["footprint"]));
    let files = StoreConfig::from_env().unwrap().bundle.len();
    assert!(out.contains(&format!("{files} file")) && out.contains("0 files (0 B)"), "{out} {err}");
    let output = doctor.run(&["footprint", "no_such_module"]);
    assert_eq!(output.status.code(), Some(1));

    let Some(wheels) = required::test_wheels("0.6.13") else { return };
    let (doctor, libraries) = Doctor::with_libraries();
    if !libraries {
        return;
    }
    let output = doctor.run(&["footprint", "norm", "page", "--wheels", wheels.to_str().unwrap()]);
    let (out, err) = output_text(&output);
    assert!(output.status.success(), "{err}");
    for want in ["norm: configured wheel", "bytes downloaded", "norm/norm.so", "page/page.so"] {
        assert!(out.contains(want), "{want} is not in: {out}");
    }
    let memory = out.lines().find(|line| line.contains("bytes of memory")).expect("Linux tells it");
    let memory: u64 = memory.split_whitespace().next().unwrap().parse().unwrap();
    assert!((1 << 20..1 << 30).contains(&memory), "{memory}");
}

#[test]
fn a_host_that_does_not_answer_is_an_error() {
    let mut doctor = Doctor::new();
    doctor.offline = false;
    // Nobody listens there, and no pip is found to ask instead.
    let output = doctor
        .command(&["fetch", "apache_tvm_ffi"])
        .env("FLASHINFER_RS_INDEX_URL", "http://127.0.0.1:9/simple")
        .env("PATH", "")
        .output()
        .unwrap();
    let (_, err) = output_text(&output);
    assert_eq!(output.status.code(), Some(1));
    assert!(err.contains("cannot download") && err.contains("127.0.0.1:9"), "{err}");
    assert!(err.contains("check the network"), "{err}");
}

#[test]
fn a_wrong_command_line_is_refused() {
    let doctor = Doctor::new();
    for args in [
        &["--no-such-option"][..],
        &["fetch", "no_such_package"],
        &["fetch", "--modules", " ,"],
        &["clean", "--json"],
        &["--json", "clean"],
        &["--wheels"],
        &["no-such-command"],
    ] {
        let output = doctor.run(args);
        let (out, err) = output_text(&output);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {err}");
        assert!(out.is_empty() && err.starts_with("error: "), "{args:?}: {err}");
    }
    let help = doctor.run(&["--help"]);
    assert!(help.status.success() && output_text(&help).0.contains("Exit codes"));
}

#[test]
fn closed_output_does_not_change_the_verdict() {
    let doctor = Doctor::new();
    let expected = doctor.run(&[]).status;
    let mut child = doctor.command(&[]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap(), expected);
}

#[test]
fn downloads_go_through_the_machines_proxy() {
    let proxy = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = proxy.local_addr().unwrap();
    let address = format!("http://{place}");
    let asked = std::thread::spawn(move || {
        let (stream, _) = proxy.accept().unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        // Refused, so that nothing more is asked.
        (&stream).write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n").unwrap();
        line
    });
    let doctor = Doctor { offline: false, ..Doctor::new() };
    let mut command = doctor.command(&["fetch", "apache_tvm_ffi"]);
    for name in ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"] {
        command.env(name, &address);
    }
    command.env_remove("NO_PROXY").env_remove("no_proxy");
    // No pip on the path: only the index is left.
    command.env("PATH", "").env("FLASHINFER_RS_INDEX_URL", "http://index.invalid/simple");
    let output = command.output().unwrap();
    assert!(!output.status.success());
    // Ends the wait if nobody came.
    let _ = TcpStream::connect(place);
    assert_eq!(asked.join().unwrap().trim_end(), "CONNECT index.invalid:80 HTTP/1.1");
}
