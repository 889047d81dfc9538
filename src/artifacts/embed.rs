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
//! needs nothing beside NVIDIA's driver. What local sources hold is always embedded. Nothing is
//! downloaded for `cargo check` and its kin, on docs.rs, or offline; nor, by `auto`, on a machine
//! that has neither NVIDIA's driver nor a CUDA toolkit. Whatever is missing then is found at run
//! time instead. A file with a wrong digest always fails the build.
//!
//! Cargo shares one run of the script between `check` and `build`. By `auto`, what a check leaves
//! out stays out until one of the script's inputs changes: the folder of downloaded wheels is one.
//! By `require`, the next command runs the script again, so that a build embeds it or fails.
//!
//! | file | its job |
//! |---|---|
//! | `command` | the cargo command that runs the build |
//! | `machine` | signs of NVIDIA's driver and of CUDA |
//! | `terminal` | progress, past cargo's capture |

mod command;
mod machine;
mod terminal;

pub use command::CargoCommand;
use command::Purpose;
use machine::sign_of_cuda;

use super::config::{flag, named_cache_dir};
use super::digest::Digest;
use super::pins::{self, CudaKey, Pins};
use super::store::expand;
use super::{ArtifactError, Fetch, Member, Package, Progress, ProgressFn, Store, StoreConfig};
use std::fmt::{self, Write as _};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

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

/// The operating systems and architectures that FlashInfer has kernels for.
pub const PLATFORMS: [(&str, &str); 2] = [("linux", "x86_64"), ("linux", "aarch64")];

/// Whether FlashInfer has kernels for a platform.
pub fn has_kernels(os: &str, arch: &str) -> bool {
    PLATFORMS.contains(&(os, arch))
}

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

/// Why a build script does not download.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NoNetwork {
    /// A setting of the environment or an option of cargo.
    Offline(&'static str),
    /// By [`Mode::Auto`]: no kernel runs on this machine.
    NoCuda,
    /// The command needs no linked program, so it does not wait for one.
    OnlyChecks,
    /// The cache folder cannot be written.
    NoCache,
}

impl fmt::Display for NoNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NoNetwork::Offline(why) => why,
            NoNetwork::NoCuda => "this machine has neither NVIDIA's driver nor a CUDA toolkit",
            NoNetwork::OnlyChecks => {
                "checks and editors do not wait for downloads; FLASHINFER_RS_EMBED=require makes a \
                 build fetch it"
            }
            NoNetwork::NoCache => "the cache folder cannot be written",
        })
    }
}

/// Whether and why a build script must not download.
///
/// # Errors
/// [`ArtifactError::Setting`] when a switch is neither on nor off.
fn no_network(build: &Build<'_>, mode: Mode) -> Result<Option<NoNetwork>, ArtifactError> {
    let env = build.env;
    if env("DOCS_RS").is_some() {
        return Ok(Some(NoNetwork::Offline("docs.rs has no network (DOCS_RS)")));
    }
    let by_editor = ["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER"].into_iter().filter_map(env);
    let by_editor = by_editor.into_iter().any(|set| set.contains("rust-analyzer") || set.contains("clippy"));
    let only_checks = match build.command.purpose() {
        Purpose::Checks => true,
        Purpose::Builds => by_editor,
        // Waiting for what nobody asked for is worse than leaving it out.
        Purpose::Unknown => by_editor || mode == Mode::Auto,
    };
    if only_checks && mode == Mode::Require {
        return Ok(Some(NoNetwork::OnlyChecks));
    }
    for (variable, why) in [
        ("FLASHINFER_RS_OFFLINE", "FLASHINFER_RS_OFFLINE forbids it"),
        ("CARGO_NET_OFFLINE", "CARGO_NET_OFFLINE forbids it"),
    ] {
        if flag(variable, env(variable).as_deref())? {
            return Ok(Some(NoNetwork::Offline(why)));
        }
    }
    if build.command.offline() {
        return Ok(Some(NoNetwork::Offline("cargo is offline (--offline, --frozen or net.offline)")));
    }
    if mode == Mode::Auto && sign_of_cuda(build.root, env).is_none() {
        return Ok(Some(NoNetwork::NoCuda));
    }
    Ok(only_checks.then_some(NoNetwork::OnlyChecks))
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
    /// The command that runs the build.
    pub command: CargoCommand,
    /// Where the files of the machine begin: `/`.
    pub root: &'a Path,
    /// Told of downloads.
    pub progress: Option<ProgressFn>,
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
    /// Whether the next command must look again, because this one only checks and so did not
    /// download what a build is required to embed.
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
        if !has_kernels(os, arch) {
            let told = format!(
                "FlashInfer has no kernels for {arch}-{os}: nothing is embedded, and at run time there \
                 are none"
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
    no_network: Option<NoNetwork>,
    patterns: Vec<String>,
    /// The folder for files that the cache cannot take.
    aside: PathBuf,
    outcome: Outcome,
    /// What is not embedded, and why.
    missing: Vec<(String, String)>,
}

impl Chosen {
    fn new(build: &Build<'_>, mode: Mode, pins: Pins, outcome: Outcome) -> Result<Chosen, ArtifactError> {
        let env = |name: &str| (build.env)(name).filter(|value| !value.is_empty());
        let mut config = StoreConfig::new(pins);
        if let Some(list) = env("FLASHINFER_RS_WHEELS") {
            let paths = std::env::split_paths(&list).filter(|p| !p.as_os_str().is_empty());
            // A build script runs in its package's folder, which nobody means.
            config.env_wheels = paths.map(|path| build.command.folder().join(path)).collect();
        }
        for path in &config.env_wheels {
            expand(path)?;
        }
        config.index_url = env("FLASHINFER_RS_INDEX_URL");
        // docs.rs must build whatever the settings.
        let mode = if env("DOCS_RS").is_some() { Mode::Auto } else { mode };
        let mut no_network = no_network(build, mode)?;
        let named = env("FLASHINFER_RS_CACHE_DIR");
        config.cache_dir = named.map(|named| named_cache_dir(named.into())).transpose()?;
        let aside = build.out_dir.join("cache");
        if config.cache_dir.is_none() && dirs::cache_dir().is_none() {
            no_network.get_or_insert(NoNetwork::NoCache);
            config.cache_dir = Some(aside.clone());
        }
        config.offline = no_network.is_some();
        config.progress = build.progress.clone();
        let mut chosen = Chosen {
            store: Store::open(config)?,
            mode,
            no_network,
            patterns: patterns(build.env),
            aside,
            outcome,
            missing: Vec::new(),
        };
        let config = chosen.store.config();
        let pins = Package::KERNELS.into_iter().filter_map(|package| config.pins.get(package).ok());
        let pinned = pins.map(|pin| chosen.wheels().join(&pin.file)).filter(|wheel| wheel.is_file());
        chosen.outcome.inputs = config.env_wheels.iter().cloned().chain(pinned).collect();
        Ok(chosen)
    }

    /// Where downloaded wheels are.
    fn wheels(&self) -> PathBuf {
        self.store.cache_dir().join("wheels")
    }

    fn fetch(&self) -> Fetch {
        if self.no_network.is_some() { Fetch::Forbidden } else { Fetch::Allowed }
    }

    /// Asks the store; where the cache cannot be written, as in a sandbox, a store that works
    /// beside the output, where no whole wheel belongs.
    fn ask<T>(&mut self, ask: impl Fn(&Self) -> Result<T, ArtifactError>) -> Result<T, ArtifactError> {
        match ask(self) {
            Err(ArtifactError::Cache { .. }) if self.store.cache_dir() != self.aside => {
                let mut config = self.store.config().clone();
                (config.cache_dir, config.offline) = (Some(self.aside.clone()), true);
                self.store = Store::open(config)?;
                self.no_network.get_or_insert(NoNetwork::NoCache);
                ask(self)
            }
            done => done,
        }
    }

    fn embed(mut self, mut bundle: Bundle) -> Result<Outcome, ArtifactError> {
        let modules = self.modules()?;
        let members = modules.into_iter().map(Member::Module);
        for member in members.chain([Member::TvmFfi, Member::CudaRuntime]) {
            match self.ask(|chosen| chosen.store.locate(&member, chosen.fetch())) {
                Ok(located) => bundle.add(&member, &located.path)?,
                Err(e) => self.missing(member.to_string(), e)?,
            }
        }
        self.outcome.embedded = bundle.count;
        bundle.finish()?;
        self.look_again();
        self.on_progress();
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
            self.announce();
            let why = match self.ask(|chosen| chosen.store.pinned_modules()) {
                Ok(pinned) => {
                    known.extend(pinned);
                    known.sort();
                    known.dedup();
                    missing = unserved(&known, &self.patterns);
                    None
                }
                Err(ArtifactError::Offline { what, reason }) => Some(match self.no_network {
                    Some(why) => format!("{what} is not downloaded: {why}"),
                    None => format!("{what} is not downloaded: {reason}"),
                }),
                Err(e @ ArtifactError::Download { .. }) => Some(e.to_string()),
                Err(e) => return self.missing("kernel modules".into(), e).map(|()| Vec::new()),
            };
            if !missing.is_empty() {
                let patterns = shown(&missing);
                let what = format!("kernel modules ({patterns})");
                self.missing(what, ArtifactError::NoSuchModule { patterns, known: known.len(), why })?;
            }
        }
        let chosen = |name: &String| self.patterns.iter().any(|p| matches(p, name));
        Ok(known.into_iter().filter(chosen).collect())
    }

    /// Says that a large download begins, before the server answers.
    fn announce(&self) {
        let config = self.store.config();
        if let (None, Some(on_progress)) = (self.no_network, &config.progress)
            && let Ok(pin) = config.pins.get(Package::JitCache)
            && !self.wheels().join(&pin.file).is_file()
        {
            on_progress(&Progress::Started { file: &pin.file, done: 0, total: None });
        }
    }

    /// Something cannot be embedded: an error, or something to tell.
    fn missing(&mut self, what: String, error: ArtifactError) -> Result<(), ArtifactError> {
        use ArtifactError as E;
        match error {
            E::DigestMismatch { .. } | E::BadWheel { .. } | E::UnsafeMember { .. } => Err(error),
            _ if self.mode == Mode::Require && self.no_network == Some(NoNetwork::OnlyChecks) => {
                self.outcome.pending = true;
                Ok(())
            }
            error if self.mode == Mode::Require => Err(error),
            error => {
                let why = match (self.no_network, error) {
                    (
                        Some(why),
                        E::NotFound { .. } | E::Offline { .. } | E::NoSuchModule { why: Some(_), .. },
                    ) => {
                        format!("no local source holds it; not downloaded: {why}")
                    }
                    (None, E::NoSuchModule { why: Some(why), .. }) => why,
                    (_, E::NotFound { mut searched, .. }) => {
                        searched.pop().map_or_else(String::new, |last| last.outcome)
                    }
                    (_, error) => error.to_string(),
                };
                self.missing.push((what, why.replace('\n', " ")));
                Ok(())
            }
        }
    }

    /// Names the folder that a download of somebody else changes, so that a later command embeds
    /// what it brings.
    fn look_again(&mut self) {
        let wheels = self.wheels();
        let make = || -> io::Result<()> {
            fs::create_dir_all(&wheels)?;
            // What is newer than this run's start would make cargo run the script once more.
            File::open(&wheels)?.set_modified(SystemTime::UNIX_EPOCH)
        };
        let there = match self.no_network {
            _ if self.missing.is_empty() || wheels.starts_with(&self.aside) => false,
            // This run itself may have written there.
            None => false,
            // A path that is not there would make cargo run the script for ever.
            Some(NoNetwork::OnlyChecks) => wheels.is_dir() || make().is_ok(),
            Some(_) => wheels.is_dir(),
        };
        self.outcome.inputs.extend(there.then_some(wheels));
    }

    /// One line for each reason why something is missing, with what happens at run time.
    fn on_progress(&mut self) {
        while let Some((_, why)) = self.missing.first().cloned() {
            let (same, others) = self.missing.drain(..).partition(|(_, other)| *other == why);
            self.missing = others;
            let same: Vec<(String, String)> = same;
            let what: Vec<_> = same.into_iter().map(|(what, _)| what).collect();
            self.outcome.warnings.push(format!(
                "not embedded: {} ({why}). At run time it is taken from FLASHINFER_RS_WHEELS or the \
                 cache, or downloaded at first use",
                what.join(", ")
            ));
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
    // For tests: a build as on a platform without kernels.
    println!("cargo::rustc-check-cfg=cfg(flashinfer_rs_no_kernels)");
    for path in ["Cargo.toml", "build.rs", "src/artifacts"] {
        println!("cargo::rerun-if-changed={path}");
    }
    for variable in VARIABLES.iter().chain(&pins::CUDA_VARIABLES) {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let outcome = build(&Build {
        env: &env,
        command: CargoCommand::of_parent(&env),
        root: Path::new("/"),
        progress: Some(terminal::progress()),
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
        // A file that is not there makes cargo run the script again, until a build has had its turn.
        println!("cargo::rerun-if-changed={}", out_dir.join("pending").display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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

    /// Why a build by `line` does not download.
    fn reason(env: Env<'_>, line: &str, root: &Path, mode: Mode) -> Result<Option<NoNetwork>, ArtifactError> {
        let words = line.split(' ').map(str::to_owned).collect();
        let command = CargoCommand::new(words, Path::new("/no/such/folder"), env);
        let target = ("linux", "x86_64");
        let build = Build { env, command, root, progress: None, out_dir: root, target, embed: true };
        no_network(&build, mode)
    }

    /// A machine with NVIDIA's driver.
    fn able() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("proc/driver/nvidia")).unwrap();
        root
    }

    #[test]
    fn only_builds_on_machines_with_cuda_download() {
        let (able, bare) = (able(), tempfile::tempdir().unwrap());
        let (env, only_checks) = (|_: &str| None, Some(NoNetwork::OnlyChecks));
        for (line, auto, require) in [
            ("cargo build", None, None),
            ("cargo r --release", None, None),
            ("cargo check", only_checks, only_checks),
            ("cargo clippy", only_checks, only_checks),
            // Nobody knows what these are for.
            ("cargo xb", only_checks, None),
            ("bazel", only_checks, None),
        ] {
            assert_eq!(reason(&env, line, able.path(), Mode::Auto).unwrap(), auto, "{line}");
            assert_eq!(reason(&env, line, able.path(), Mode::Require).unwrap(), require, "{line}");
            let without = reason(&env, line, bare.path(), Mode::Auto).unwrap();
            assert_eq!(without, Some(NoNetwork::NoCuda), "{line}");
            assert_eq!(reason(&env, line, bare.path(), Mode::Require).unwrap(), require, "{line}");
        }
        for line in ["cargo build --offline", "cargo run --frozen"] {
            let found = reason(&env, line, able.path(), Mode::Auto).unwrap();
            assert!(matches!(found, Some(NoNetwork::Offline(_))), "{line}");
        }
    }

    #[test]
    fn the_environment_forbids_downloads() {
        let able = able();
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
            let found = reason(&env, "cargo build", able.path(), Mode::Auto).unwrap();
            assert_eq!(found.is_some(), offline, "{name}={value}");
        }
        let env = |asked: &str| (asked == "FLASHINFER_RS_OFFLINE").then(|| "maybe".to_owned());
        assert!(reason(&env, "cargo build", able.path(), Mode::Auto).is_err());
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
                command: CargoCommand::default(),
                root: out.path(),
                progress: None,
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
