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
//! | `mode` | how much the build insists on a bundle |
//! | `network` | whether it may download |
//! | `modules` | which modules it embeds |
//! | `selection` | the members, out of the sources that it may use |
//! | `output` | the generated files |
//! | `terminal` | progress, past cargo's capture |

mod command;
mod machine;
mod mode;
mod modules;
mod network;
mod output;
mod selection;
mod terminal;

pub use command::CargoCommand;
pub use mode::Mode;
pub(super) use modules::shown;
pub use modules::{DEFAULT_MODULES, matches, split_patterns};

use output::Bundle;
use selection::Selection;

use super::pins::{self, CudaKey, Pins};
use super::{ArtifactError, ProgressFn};
use std::path::{Path, PathBuf};

/// Every environment variable that decides what a build embeds.
pub const VARIABLES: [&str; 27] = [
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
    "SSL_CERT_DIR",
];

/// The operating systems and architectures that FlashInfer has kernels for.
pub const PLATFORMS: [(&str, &str); 2] = [("linux", "x86_64"), ("linux", "aarch64")];

/// Whether FlashInfer has kernels for a platform.
pub fn has_kernels(os: &str, arch: &str) -> bool {
    PLATFORMS.contains(&(os, arch))
}

/// Reads one environment variable.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// A build: where it happens and what it knows.
pub struct Build<'a> {
    /// Reads the environment.
    pub env: Env<'a>,
    /// The command that runs the build.
    pub command: CargoCommand,
    /// Where the files of the machine begin: `/`.
    pub root: &'a Path,
    /// Called with the progress of downloads.
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
            let warning = format!(
                "FlashInfer has no kernels for {arch}-{os}: nothing is embedded, and at run time there \
                 are none"
            );
            outcome.warnings.push(warning);
        } else {
            return Selection::new(build, mode, pins, outcome)?.embed(bundle);
        }
    }
    bundle.finish()?;
    Ok(outcome)
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
    use std::fs;

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
