//! What the build script embeds, and when it may download.
//!
//! | variable | meaning |
//! |---|---|
//! | `FLASHINFER_RS_EMBED` | `auto` (default): embed what can be had; `require`: fail when anything is missing; `off`: embed nothing |
//! | `FLASHINFER_RS_EMBED_MODULES` | patterns of module names, separated by commas or spaces, `*` for any run of characters; [`DEFAULT_MODULES`] otherwise |
//! | `FLASHINFER_RS_WHEELS` | wheels to take modules from, before the pinned ones |
//! | `FLASHINFER_RS_CUDA` | the pin table's row, for example `cu130` |
//!
//! A bundle holds the chosen modules, `libtvm_ffi.so` and `libcudart.so.13`, so that a program
//! needs nothing beside NVIDIA's driver. Nothing is downloaded for `cargo check` and its kin, on
//! docs.rs, or offline. Whatever is missing then is found at run time instead. After a check that
//! left something out, the script runs again with the next command, so that a build which follows
//! embeds it. A file with a wrong digest always fails the build.

use super::digest::Digest;
use super::pins::{self, CudaKey, Pins};
use super::store::{self, flag};
use super::{ArtifactError, Fetch, Member, Package, Store, StoreConfig};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// The modules that are embedded unless `FLASHINFER_RS_EMBED_MODULES` names others: norm, page,
/// and paged batch decode for f16 and bf16 with head dimension 64 and 128, without sliding
/// window and without logits soft cap.
pub const DEFAULT_MODULES: [&str; 6] = [
    "norm",
    "page",
    "batch_decode_with_kv_cache_dtype_q_f16_dtype_kv_f16_dtype_o_f16_dtype_idx_i32_head_dim_qk_64_head_dim_vo_64_posenc_0_use_swa_False_use_logits_cap_False",
    "batch_decode_with_kv_cache_dtype_q_f16_dtype_kv_f16_dtype_o_f16_dtype_idx_i32_head_dim_qk_128_head_dim_vo_128_posenc_0_use_swa_False_use_logits_cap_False",
    "batch_decode_with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_head_dim_qk_64_head_dim_vo_64_posenc_0_use_swa_False_use_logits_cap_False",
    "batch_decode_with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_head_dim_qk_128_head_dim_vo_128_posenc_0_use_swa_False_use_logits_cap_False",
];

/// Every environment variable that decides what a build embeds.
pub const VARIABLES: [&str; 26] = [
    "FLASHINFER_RS_EMBED",
    "FLASHINFER_RS_EMBED_MODULES",
    "FLASHINFER_RS_WHEELS",
    "FLASHINFER_RS_CACHE_DIR",
    "FLASHINFER_RS_OFFLINE",
    "FLASHINFER_RS_INDEX_URL",
    "DOCS_RS",
    "CARGO_NET_OFFLINE",
    "XDG_CACHE_HOME",
    "UV_DEFAULT_INDEX",
    "UV_INDEX_URL",
    "UV_INDEX",
    "UV_EXTRA_INDEX_URL",
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "PIP_NO_INDEX",
    "PIP_CONFIG_FILE",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "NO_PROXY",
    "no_proxy",
    "SSL_CERT_FILE",
];

/// Reads one environment variable.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// How much the build insists on a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Embed what can be had.
    Auto,
    /// Fail when anything is missing.
    Require,
    /// Embed nothing.
    Off,
}

impl Mode {
    /// Reads `FLASHINFER_RS_EMBED`.
    ///
    /// # Errors
    /// [`ArtifactError::Setting`] for any other value.
    pub fn from_env(env: Env<'_>) -> Result<Mode, ArtifactError> {
        let value = env("FLASHINFER_RS_EMBED").unwrap_or_default();
        match value.trim().to_ascii_lowercase().as_str() {
            "" | "auto" => Ok(Mode::Auto),
            "require" => Ok(Mode::Require),
            "off" => Ok(Mode::Off),
            _ => Err(ArtifactError::Setting {
                variable: "FLASHINFER_RS_EMBED",
                value,
                expected: "`auto`, `require` or `off`".into(),
            }),
        }
    }
}

/// What forbids the build script to download.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoNetwork {
    /// A setting of the environment or an option of cargo.
    Offline(&'static str),
    /// The command needs no linked program, so it must not wait for one.
    OnlyChecks(&'static str),
}

/// Whether and why the build script must not download; `command` is the command line that
/// started it, as far as it is known.
///
/// # Errors
/// [`ArtifactError::Setting`] when a switch is neither on nor off.
pub fn no_network(env: Env<'_>, command: &[String]) -> Result<Option<NoNetwork>, ArtifactError> {
    if env("DOCS_RS").is_some() {
        return Ok(Some(NoNetwork::Offline("docs.rs has no network (DOCS_RS)")));
    }
    let cargo = command.first().is_some_and(|program| {
        Path::new(program).file_stem().is_some_and(|stem| stem.to_string_lossy().starts_with("cargo"))
    });
    if cargo
        && let Some("check" | "c" | "clippy" | "doc" | "d" | "rustdoc" | "fix" | "metadata") =
            subcommand(command)
    {
        let why = "this cargo command links no program";
        return Ok(Some(NoNetwork::OnlyChecks(why)));
    }
    for variable in ["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER"] {
        let set = env(variable).unwrap_or_default();
        if set.contains("rust-analyzer") || set.contains("clippy") {
            let why = "an editor or clippy runs this build";
            return Ok(Some(NoNetwork::OnlyChecks(why)));
        }
    }
    for (variable, why) in [
        ("FLASHINFER_RS_OFFLINE", "FLASHINFER_RS_OFFLINE forbids it"),
        ("CARGO_NET_OFFLINE", "CARGO_NET_OFFLINE forbids it"),
    ] {
        if flag(variable, env(variable).as_deref())? {
            return Ok(Some(NoNetwork::Offline(why)));
        }
    }
    let mut own = command.iter().take_while(|arg| *arg != "--");
    if cargo && own.any(|arg| arg == "--offline" || arg == "--frozen") {
        let why = "cargo was run with --offline or --frozen";
        return Ok(Some(NoNetwork::Offline(why)));
    }
    Ok(None)
}

/// The subcommand of a cargo command line.
fn subcommand(command: &[String]) -> Option<&str> {
    let mut arguments = command.iter().skip(1).map(String::as_str);
    while let Some(argument) = arguments.next() {
        match argument {
            "--config" | "-C" | "-Z" | "--color" | "--manifest-path" => {
                arguments.next();
            }
            argument if argument.starts_with(['-', '+']) => {}
            argument => return Some(argument),
        }
    }
    None
}

/// The command line of the process that started this one, where the system tells it.
pub fn parent_command() -> Vec<String> {
    #[cfg(target_os = "linux")]
    {
        let parent = std::os::unix::process::parent_id();
        let bytes = fs::read(format!("/proc/{parent}/cmdline")).unwrap_or_default();
        let words = bytes.split(|byte| *byte == 0).filter(|word| !word.is_empty());
        words.map(|word| String::from_utf8_lossy(word).into_owned()).collect()
    }
    #[cfg(not(target_os = "linux"))]
    Vec::new()
}

/// Whether `name` fits `pattern`, in which `*` stands for any run of characters.
pub fn matches(pattern: &str, name: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else {
        return pattern == name;
    };
    let Some(name) = name.strip_prefix(start) else {
        return false;
    };
    let ends = name.char_indices().map(|(at, _)| at).chain([name.len()]);
    ends.into_iter().any(|at| matches(rest, &name[at..]))
}

/// The first patterns of a list, and how many more there are.
fn shown(patterns: &[String]) -> String {
    match patterns {
        [a, b, rest @ ..] if rest.len() > 1 => format!("{a}, {b} or {} more patterns", rest.len()),
        all => all.join(", "),
    }
}

fn patterns(env: Env<'_>) -> Vec<String> {
    let set = env("FLASHINFER_RS_EMBED_MODULES").unwrap_or_default();
    let split = set.split(|c: char| c == ',' || c.is_whitespace());
    let given: Vec<_> = split.filter(|p| !p.is_empty()).map(str::to_owned).collect();
    match given.is_empty() {
        true => DEFAULT_MODULES.map(str::to_owned).to_vec(),
        false => given,
    }
}

/// A build: where it happens and what it knows.
pub struct Build<'a> {
    /// Reads the environment.
    pub env: Env<'a>,
    /// The command line that started the build script.
    pub command: Vec<String>,
    /// The folder for generated files.
    pub out_dir: &'a Path,
    /// The operating system and the architecture that the program is built for.
    pub target: (&'a str, &'a str),
    /// Whether the feature `embed` is on.
    pub embed: bool,
}

/// What a build came to.
#[derive(Debug)]
pub struct Outcome {
    /// The chosen row of the pin table.
    pub cuda: CudaKey,
    /// What to tell the person who builds.
    pub warnings: Vec<String>,
    /// Local files that decided the result.
    pub inputs: Vec<PathBuf>,
    /// Whether the next command should look again, because this one only checks and so did not
    /// download what a build would embed.
    pub pending: bool,
    /// How many members were embedded.
    pub embedded: usize,
}

/// Writes `bundle.rs` and the files it includes, from the crate's own pins.
///
/// # Errors
/// As [`build_from`]; and [`ArtifactError::Pins`] when the pin table cannot be read.
pub fn build(build: &Build<'_>) -> Result<Outcome, ArtifactError> {
    build_from(build, Pins::select(CudaKey::select(build.env)?, build.target.1)?)
}

/// As [`build`], from any pins.
///
/// # Errors
/// [`ArtifactError::DigestMismatch`], an unreadable wheel that the user named, and settings that
/// mean nothing, always; whatever else keeps a member away in [`Mode::Require`]; and
/// [`ArtifactError::Cache`] when the output folder cannot be written.
pub fn build_from(build: &Build<'_>, pins: Pins) -> Result<Outcome, ArtifactError> {
    let cuda = pins.cuda();
    let mut outcome = Outcome { cuda, warnings: Vec::new(), inputs: Vec::new(), pending: false, embedded: 0 };
    let bundle = Bundle::start(build.out_dir)?;
    let mode = Mode::from_env(build.env)?;
    let (os, arch) = build.target;
    if build.embed && mode != Mode::Off {
        if os != "linux" || pins.get(Package::JitCache).is_err() {
            let told = format!(
                "FlashInfer has no kernels for {arch}-{os}: nothing is embedded, and the crate \
                 needs wheels of its own at run time"
            );
            outcome.warnings.push(told);
        } else {
            return Chosen::new(build, mode, pins, outcome)?.embed(bundle);
        }
    }
    bundle.finish()?;
    Ok(outcome)
}

/// The members of a build and the store that serves them.
struct Chosen {
    store: Store,
    mode: Mode,
    fetch: Fetch,
    no_network: Option<NoNetwork>,
    patterns: Vec<String>,
    outcome: Outcome,
}

impl Chosen {
    fn new(build: &Build<'_>, mode: Mode, pins: Pins, mut outcome: Outcome) -> Result<Chosen, ArtifactError> {
        let env = |name: &str| (build.env)(name).filter(|value| !value.is_empty());
        let mut config = StoreConfig::new(pins);
        if let Some(list) = env("FLASHINFER_RS_WHEELS") {
            let paths = std::env::split_paths(&list).filter(|p| !p.as_os_str().is_empty());
            config.env_wheels = paths.collect();
        }
        for path in &config.env_wheels {
            outcome.inputs.extend(store::expand(path)?);
        }
        config.index_url = env("FLASHINFER_RS_INDEX_URL");
        let mut no_network = no_network(build.env, &build.command)?;
        config.offline = no_network.is_some();
        let named = env("FLASHINFER_RS_CACHE_DIR");
        config.cache_dir = named.map(|named| store::named_cache_dir(named.into())).transpose()?;
        let usual = config.cache_dir.clone();
        let usual = usual.or_else(|| Some(dirs::cache_dir()?.join("flashinfer-rs")));
        if usual.is_none_or(|folder| fs::create_dir_all(folder).is_err()) {
            // A sandbox: work beside the output, where no whole wheel belongs.
            config.cache_dir = Some(build.out_dir.join("cache"));
            config.offline = true;
            no_network.get_or_insert(NoNetwork::Offline("the cache folder cannot be written"));
        }
        let fetch = match config.offline {
            true => Fetch::Forbidden,
            false => Fetch::Allowed,
        };
        let store = Store::open(config)?;
        let pins = &store.config().pins;
        let pinned = Package::KERNELS.into_iter().filter_map(|p| pins.get(p).ok());
        let pinned = pinned.map(|pin| store.cache_dir().join("wheels").join(&pin.file));
        outcome.inputs.extend(pinned.filter(|wheel| wheel.is_file()));
        Ok(Chosen {
            mode: match no_network {
                // docs.rs must build whatever the settings.
                Some(NoNetwork::Offline(_)) if env("DOCS_RS").is_some() => Mode::Auto,
                _ => mode,
            },
            no_network,
            patterns: patterns(build.env),
            store,
            fetch,
            outcome,
        })
    }

    fn embed(mut self, mut bundle: Bundle) -> Result<Outcome, ArtifactError> {
        let modules = self.modules()?;
        let members = modules.into_iter().map(Member::Module);
        for member in members.chain([Member::TvmFfi, Member::CudaRuntime]) {
            match self.store.locate(&member, self.fetch) {
                Ok(located) => bundle.add(&member, &located.path)?,
                Err(e) => self.missing(&member.to_string(), e)?,
            }
        }
        self.outcome.embedded = bundle.count;
        bundle.finish()?;
        Ok(self.outcome)
    }

    /// The modules that the patterns choose, each once. The pinned wheel, or its list of modules
    /// where members can be fetched alone, is fetched only for patterns that no local source
    /// serves.
    fn modules(&mut self) -> Result<Vec<String>, ArtifactError> {
        let mut known = self.store.modules();
        let unserved = |known: &[String], patterns: &[String]| {
            let served = |p: &String| known.iter().any(|name| matches(p, name));
            let unserved = patterns.iter().filter(|p| !served(p));
            unserved.cloned().collect::<Vec<_>>()
        };
        let mut missing = unserved(&known, &self.patterns);
        if !missing.is_empty() {
            let why = match self.store.pinned_modules() {
                Ok(pinned) => {
                    known.extend(pinned);
                    known.sort();
                    known.dedup();
                    missing = unserved(&known, &self.patterns);
                    None
                }
                Err(ArtifactError::Offline { what, reason }) => match self.no_network {
                    Some(NoNetwork::Offline(why) | NoNetwork::OnlyChecks(why)) => {
                        Some(format!("{what} is not downloaded: {why}"))
                    }
                    None => Some(format!("{what} is not downloaded: {reason}")),
                },
                Err(e @ ArtifactError::Download { .. }) => Some(e.to_string()),
                Err(e) => return self.missing("kernel modules", e).map(|()| Vec::new()),
            };
            if !missing.is_empty() {
                let e = ArtifactError::NoSuchModule { patterns: shown(&missing), known: known.len(), why };
                self.missing("kernel modules", e)?;
            }
        }
        let chosen = |name: &String| self.patterns.iter().any(|p| matches(p, name));
        Ok(known.into_iter().filter(chosen).collect())
    }

    /// Something cannot be embedded: an error, or a warning that tells what happens at run time.
    fn missing(&mut self, what: &str, error: ArtifactError) -> Result<(), ArtifactError> {
        use ArtifactError as E;
        match error {
            E::DigestMismatch { .. } | E::BadWheel { .. } | E::UnsafeMember { .. } => Err(error),
            _ if matches!(self.no_network, Some(NoNetwork::OnlyChecks(_))) => {
                self.outcome.pending = true;
                Ok(())
            }
            error if self.mode == Mode::Require => Err(error),
            error => {
                let why = match (self.no_network, error) {
                    (Some(NoNetwork::Offline(why)), E::NotFound { .. } | E::Offline { .. }) => {
                        format!("no local source holds it; not downloaded: {why}")
                    }
                    (_, E::NotFound { mut tried, .. }) => {
                        tried.pop().map_or_else(String::new, |last| last.outcome)
                    }
                    (_, error) => error.to_string(),
                };
                let told = format!(
                    "not embedded: {what} ({}). At run time it is taken from \
                     FLASHINFER_RS_WHEELS or the cache, or downloaded at first use.",
                    why.replace('\n', " ")
                );
                self.outcome.warnings.push(told);
                Ok(())
            }
        }
    }
}

/// The generated files. What an earlier build left is removed first.
struct Bundle {
    out_dir: PathBuf,
    code: String,
    count: usize,
}

impl Bundle {
    fn start(out_dir: &Path) -> Result<Bundle, ArtifactError> {
        let folder = out_dir.join("bundle");
        let failed = |e| ArtifactError::cache(&folder, "prepare the folder", e);
        match fs::remove_dir_all(&folder) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
            _ => fs::create_dir_all(&folder).map_err(failed)?,
        }
        Ok(Bundle { out_dir: out_dir.into(), code: String::new(), count: 0 })
    }

    fn add(&mut self, member: &Member, path: &Path) -> Result<(), ArtifactError> {
        let output = self.out_dir.join(format!("bundle/{}.zst", self.count));
        let (sha256, size) =
            compress(path, &output).map_err(|e| ArtifactError::cache(&output, "write", e))?;
        // <cache>/<artifact hash>/<name>/<file>
        let folder = path.ancestors().nth(2).and_then(Path::file_name);
        let artifact_hash = folder.unwrap_or_default().to_string_lossy();
        let _ = writeln!(
            self.code,
            "    BundledMember {{ suffix: {:?}, artifact_hash: {artifact_hash:?}, \
             sha256: Digest::new({:?}), size: {size}, \
             zstd: include_bytes!(concat!(env!(\"OUT_DIR\"), \"/bundle/{}.zst\")) }},",
            member.suffix(),
            sha256.as_bytes(),
            self.count
        );
        self.count += 1;
        Ok(())
    }

    fn finish(self) -> Result<(), ArtifactError> {
        let path = self.out_dir.join("bundle.rs");
        let code = format!("pub(super) static BUNDLE: &[BundledMember] = &[\n{}];\n", self.code);
        fs::write(&path, code).map_err(|e| ArtifactError::cache(&path, "write", e))
    }
}

fn compress(from: &Path, to: &Path) -> io::Result<(Digest, u64)> {
    const LEVEL: i32 = 6;
    struct Tee<'a> {
        encoder: zstd::stream::write::Encoder<'a, File>,
        input: File,
    }
    impl io::Read for Tee<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let n = self.input.read(buffer)?;
            io::Write::write_all(&mut self.encoder, &buffer[..n])?;
            Ok(n)
        }
    }
    let encoder = zstd::stream::write::Encoder::new(File::create(to)?, LEVEL)?;
    let input = File::open(from)?;
    let mut tee = Tee { encoder, input };
    let hashed = Digest::of_reader(&mut tee, |_| ())?;
    tee.encoder.finish()?;
    Ok(hashed)
}

/// The whole of the build script: embeds, and tells cargo what it needs to know.
///
/// # Errors
/// The text of what [`build`] refuses.
pub fn main() -> Result<(), String> {
    let env = |name: &str| std::env::var(name).ok();
    let need = |name: &str| env(name).ok_or(format!("{name} is not set: run this by cargo"));
    let out_dir = PathBuf::from(need("OUT_DIR")?);
    let (os, arch) = (need("CARGO_CFG_TARGET_OS")?, need("CARGO_CFG_TARGET_ARCH")?);
    println!("cargo::rustc-cfg=flashinfer_rs_bundle");
    for path in ["Cargo.toml", "build.rs", "src/artifacts"] {
        println!("cargo::rerun-if-changed={path}");
    }
    for variable in VARIABLES.iter().chain(&pins::CUDA_VARIABLES) {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let outcome = build(&Build {
        env: &env,
        command: parent_command(),
        out_dir: &out_dir,
        target: (&os, &arch),
        embed: cfg!(feature = "embed"),
    });
    let outcome = outcome.map_err(|e| e.to_string())?;
    println!("cargo::rustc-env=FLASHINFER_RS_SELECTED_CUDA={}", outcome.cuda);
    for warning in &outcome.warnings {
        println!("cargo::warning={warning}");
    }
    for input in &outcome.inputs {
        println!("cargo::rerun-if-changed={}", input.display());
    }
    if outcome.pending {
        // Cargo shares this run between `check` and `build`. A file that is not there makes it run
        // the script again, until a build has had its turn.
        println!("cargo::rerun-if-changed={}", out_dir.join("pending").display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn patterns_match_runs_of_characters() {
        for (pattern, name, want) in [
            ("norm", "norm", true),
            ("norm", "norms", false),
            ("*", "anything", true),
            ("batch_*_f16", "batch_decode_f16", true),
            ("batch_*_f16", "batch_decode_bf16", false),
            ("*decode*128*", "batch_decode_hd_128_x", true),
            ("a**b", "ab", true),
            ("a*b*c", "a_b_b", false),
        ] {
            assert_eq!(matches(pattern, name), want, "{pattern} {name}");
        }
    }

    #[test]
    fn checking_commands_do_not_download() {
        let env = |_: &str| None;
        for line in [
            "cargo check",
            "/x/bin/cargo --color always c --all",
            "cargo +nightly -q clippy",
            "cargo doc",
            "cargo --config a=b fix",
        ] {
            let found = no_network(&env, &words(line)).unwrap();
            assert!(matches!(found, Some(NoNetwork::OnlyChecks(_))), "{line}");
        }
        for line in ["cargo build", "cargo test check", "make check", "cargo run -- --offline"] {
            assert_eq!(no_network(&env, &words(line)).unwrap(), None, "{line}");
        }
        for line in ["cargo build --offline", "cargo run --frozen"] {
            let found = no_network(&env, &words(line)).unwrap();
            assert!(matches!(found, Some(NoNetwork::Offline(_))), "{line}");
        }
    }

    #[test]
    fn the_environment_forbids_downloads() {
        for (name, value, offline) in [
            ("DOCS_RS", "1", true),
            ("CARGO_NET_OFFLINE", "true", true),
            ("CARGO_NET_OFFLINE", "false", false),
            ("FLASHINFER_RS_OFFLINE", "1", true),
            ("FLASHINFER_RS_OFFLINE", "0", false),
            ("RUSTC_WRAPPER", "/x/rust-analyzer", true),
            ("RUSTC_WRAPPER", "sccache", false),
        ] {
            let env = |asked: &str| (asked == name).then(|| value.to_owned());
            let found = no_network(&env, &[]).unwrap();
            assert_eq!(found.is_some(), offline, "{name}={value}");
        }
        let env = |asked: &str| (asked == "FLASHINFER_RS_OFFLINE").then(|| "maybe".to_owned());
        assert!(no_network(&env, &[]).is_err());
    }

    #[test]
    fn modes_are_listed_when_one_is_unknown() {
        let env = |_: &str| Some("sometimes".to_owned());
        let text = Mode::from_env(&env).unwrap_err().to_string();
        for want in ["sometimes", "auto", "require", "off"] {
            assert!(text.contains(want), "{text}");
        }
    }

    #[test]
    fn an_unsupported_target_builds_and_warns() {
        let out = tempfile::tempdir().unwrap();
        for target in [("windows", "x86_64"), ("linux", "riscv64")] {
            let built = build(&Build {
                env: &|_| None,
                command: Vec::new(),
                out_dir: out.path(),
                target,
                embed: true,
            })
            .unwrap();
            assert_eq!((built.embedded, built.warnings.len()), (0, 1));
            assert!(built.warnings[0].contains(target.1), "{built:?}");
        }
        let code = fs::read_to_string(out.path().join("bundle.rs")).unwrap();
        assert!(code.contains("&[\n];"), "{code}");
    }
}
