//! Tells whether kernels can run on this machine, and what to do where they
//! cannot.
//!
//! | file | its job |
//! |---|---|
//! | `main` | the command line |
//! | `report` | findings, printed as text or JSON |
//! | `examine` | looks at the machine and reports |
//! | `download` | the progress of downloads |
//! | `pin` | rows of the pin table: the digest of a wheel's RECORD, a release |
//! | `footprint` | bytes embedded, downloaded and cached, memory of a first use |

mod examine;
mod footprint;
mod pin;
mod report;

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Args, CommandFactory, Parser, Subcommand, error::ErrorKind};
use flashinfer_rs::{
    FlashInferError, ModuleName,
    artifacts::{
        ArtifactError, CudaArchitecture, Digest, Member, Package, Store, StoreConfig, embed::split_patterns,
    },
};
use indicatif::HumanBytes;

/// Tells whether FlashInfer's kernels can run on this machine.
///
/// Without a command it reports the driver, the CUDA runtime, the GPUs,
/// libtvm_ffi, where kernel modules come from and which of them open, each with
/// a remedy for what is wrong. It downloads nothing; `fetch` does.
#[derive(Parser)]
#[command(name = "flashinfer-doctor", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    sources: Sources,
    #[command(flatten)]
    options: ReportOptions,
}

const EXIT_CODES: &str = "Exit codes:
  0  kernels could run here, or the command did its work
  1  something that is needed is missing, or the command failed
  2  the command line is wrong";

/// Where to look.
#[derive(Args)]
struct Sources {
    /// A wheel, or a folder of wheels, to look into first; may be repeated
    #[arg(long, value_name = "PATH", global = true)]
    wheels: Vec<PathBuf>,
    /// The cache folder, instead of FLASHINFER_RS_CACHE_DIR or the platform's
    #[arg(long, value_name = "PATH", global = true)]
    cache_dir: Option<PathBuf>,
}

/// How to report.
#[derive(Args, Clone, Copy, Default, PartialEq)]
struct ReportOptions {
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// Print long lists in full
    #[arg(long, short)]
    verbose: bool,
    /// Compare what this crate passes to each function with what the modules say they take
    #[arg(long)]
    check: bool,
    /// Open every module of the pinned wheel too, not only those that this crate calls; this
    /// unpacks gigabytes into the cache
    #[arg(long)]
    all_modules: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Download the pinned wheels into the cache (flashinfer_jit_cache has about 1.7 GB)
    Fetch {
        /// The packages to download; if none is named, those that every kernel needs
        #[arg(value_name = "PACKAGE", value_parser = package)]
        packages: Vec<Package>,
        /// Only the modules that fit these patterns, and the libraries, ready to be opened: the cache then
        /// needs neither the wheels nor anything that can be written. Separated by commas or spaces; `*`
        /// stands for any run of characters; may be repeated
        #[arg(long, value_name = "PATTERN")]
        modules: Vec<String>,
    },
    /// Print the digest of a wheel's RECORD, or write it into the pin table, so that its members
    /// can be downloaded alone; or download, verify and pin a release of FlashInfer
    Pin(pin::PinArgs),
    /// Print the bytes that are embedded and cached, and for MODULEs what a first use costs
    Footprint {
        /// Modules to open, which are downloaded if need be; with a new --cache-dir this is a first use
        #[arg(value_name = "MODULE")]
        modules: Vec<String>,
    },
    /// Empty the cache and tell how much that freed
    Clean,
}

/// Reads a package's name, written with `_` or `-`.
fn package(name: &str) -> Result<Package, String> {
    let key = name.replace('-', "_");
    let provider = || {
        let code = key.strip_prefix(Package::JitCache.key())?.strip_prefix('_')?;
        CudaArchitecture::parse(code).map(Package::provider)
    };
    let pinned = Package::PINNED.into_iter().find(|package| package.key() == key);
    pinned.or_else(provider).ok_or_else(|| {
        let names = Package::PINNED.each_ref().map(Package::key).join(", ");
        format!("expected one of {names}, or a provider that is pinned, such as flashinfer_jit_cache_sm90a")
    })
}

impl Sources {
    /// The environment's settings, changed by the options.
    fn store_config(&self) -> Result<StoreConfig, ArtifactError> {
        let mut config = StoreConfig::from_env()?;
        config.wheels = self.wheels.clone();
        if self.cache_dir.is_some() {
            config.cache_dir = self.cache_dir.clone();
        }
        Ok(config)
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.command.is_some() && cli.options != ReportOptions::default() {
        let what = "--json, --verbose, --check and --all-modules belong to the report, not to a command";
        Cli::command().error(ErrorKind::ArgumentConflict, what).exit();
    }
    let done = match &cli.command {
        None => report(&cli.sources, cli.options),
        Some(Command::Fetch { packages, modules }) => fetch(&cli.sources, packages, modules),
        Some(Command::Pin(options)) => pin::pin(&cli.sources, options),
        Some(Command::Footprint { modules }) => {
            let modules: Vec<_> = modules.iter().map(|name| ModuleName::new(name.as_str())).collect();
            footprint::footprint(&cli.sources, &modules)
        }
        Some(Command::Clean) => clean(&cli.sources),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(failure) => {
            let _ = writeln!(io::stderr(), "error: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// Why a command could not do its work.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    #[error(transparent)]
    Runtime(#[from] FlashInferError),
    #[error("cannot use {}: {}; check the path", .0.display(), .1)]
    File(PathBuf, io::Error),
    #[error(
        "expected packages, or a version and an architecture, as in `pin 0.7.4 sm90a`, which alone --sha256 \
         and --from belong to; --file goes with packages"
    )]
    WhatToPin,
    #[error("{0} has the SHA-256 {1}, which no row of {2} states; name the file that is pinned")]
    NotPinned(String, Digest, String),
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// Whoever closes our output has read enough, which is no failure.
fn printed(result: io::Result<()>) -> Result<(), CommandError> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

/// Whether kernels could run.
fn report(sources: &Sources, options: ReportOptions) -> Result<bool, CommandError> {
    let report = examine::examine(sources, options);
    let mut out = io::stdout().lock();
    printed(match options.json {
        true => report.write_json(&mut out),
        false => report.write_text(&mut out, options.verbose),
    })?;
    Ok(report.kernels_can_run())
}

/// Whether every package is in the cache now, or of each what was chosen.
fn fetch(sources: &Sources, packages: &[Package], modules: &[String]) -> Result<bool, CommandError> {
    let mut config = sources.store_config()?;
    config.progress = Some(flashinfer_rs::progress::terminal());
    let store = Store::open(config)?;
    let patterns: Vec<_> = modules.iter().flat_map(|list| split_patterns(list)).collect();
    if patterns.is_empty() && !modules.is_empty() {
        let what = "--modules names no pattern; `*` stands for all modules";
        Cli::command().error(ErrorKind::InvalidValue, what).exit();
    }
    let mut complete = true;
    for package in if packages.is_empty() { &Package::KERNELS[..] } else { packages } {
        let fetched = match patterns.is_empty() {
            true => store.fetch(package.clone()).map(|path| path.display().to_string()),
            false => store.fetch_members(package, &patterns).map(|members| {
                let names: Vec<_> = members.iter().map(Member::file_name).collect();
                names.join(", ")
            }),
        };
        match fetched {
            Ok(what) => printed(writeln!(io::stdout(), "{package}: {what}"))?,
            Err(error) => {
                complete = false;
                let remedy = fetch_remedy(&store, package, &error);
                printed(writeln!(io::stderr(), "error: {package}: {error}{remedy}"))?;
            }
        }
    }
    Ok(complete)
}

/// What else to do about a wheel that cannot be downloaded.
fn fetch_remedy(store: &Store, package: &Package, error: &ArtifactError) -> String {
    let first = match error {
        ArtifactError::Offline { .. } => "unset FLASHINFER_RS_OFFLINE",
        ArtifactError::Download { .. } => "check the network and its proxy settings",
        _ => return String::new(),
    };
    match store.config().pins.get(package.clone()) {
        Ok(pin) => {
            let at = store.cache_dir().join("wheels").join(&pin.file);
            format!("\n  -> {first}, or put the file at {}", at.display())
        }
        Err(_) => String::new(),
    }
}

fn clean(sources: &Sources) -> Result<bool, CommandError> {
    let store = Store::open(sources.store_config()?)?;
    let freed = store.clean()?;
    let folder = store.cache_dir().display();
    printed(writeln!(io::stdout(), "{freed} bytes ({}) freed in {folder}", HumanBytes(freed)))?;
    Ok(true)
}
