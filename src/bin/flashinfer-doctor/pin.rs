//! Rows of the pin table: the digest of a wheel's RECORD, with which members can be downloaded
//! alone; and a release that nobody has pinned yet.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::Args;
use flashinfer_rs::artifacts::{
    ArtifactError, CudaArchitecture, Digest, FlashInferVersion, Origin, Package, Pins, Release, Store, Wheel,
};
use toml_edit::{DocumentMut, Item, Table, TableLike, TomlError, value};

use crate::{CommandError, Sources, printed};

const KEY: &str = "record_sha256";
/// Where the pin table is in a manifest.
const TABLE: [&str; 4] = ["package", "metadata", "flashinfer_rs", "pinned_wheels"];

/// What is to be pinned.
#[derive(Clone, Debug)]
enum What {
    Package(Package),
    Version(FlashInferVersion),
    Architecture(CudaArchitecture),
}

fn what(text: &str) -> Result<What, String> {
    let release = || {
        let version = FlashInferVersion::parse(text).map(What::Version);
        version.or_else(|| CudaArchitecture::parse(text).map(What::Architecture))
    };
    release().map_or_else(|| crate::package(text).map(What::Package), Ok).map_err(|expected| {
        format!("{expected}; or a version such as 0.7.4, and an architecture such as sm90a")
    })
}

/// Which wheels, and where to write.
#[derive(Args)]
pub struct PinArgs {
    /// The packages whose pinned wheel is looked into, and downloaded whole unless it is in the
    /// cache; if nothing is named, flashinfer_jit_cache. Or VERSION ARCHITECTURE, as in `0.7.4
    /// sm90a`: that release is downloaded and verified, and its row printed or written
    #[arg(value_name = "PACKAGE | VERSION ARCHITECTURE", value_parser = what)]
    what: Vec<What>,
    /// The SHA-256 that the release must have, from a source that you trust
    #[arg(long, value_name = "DIGEST", value_parser = digest)]
    sha256: Option<Digest>,
    /// The address of the folder that holds the release's wheel, instead of upstream's
    #[arg(long, value_name = "URL")]
    from: Option<String>,
    /// A pinned wheel on disk, also one for another machine; may be repeated
    #[arg(long, value_name = "WHEEL")]
    file: Vec<PathBuf>,
    /// The manifest to write into, instead of only printing: each row with the wheel's SHA-256, or
    /// the row of the release
    #[arg(long, value_name = "MANIFEST")]
    write: Option<PathBuf>,
}

fn digest(text: &str) -> Result<Digest, String> {
    Digest::from_hex(text).ok_or_else(|| "expected 64 hexadecimal digits".into())
}

/// Prints or writes a line for each wheel, or the row of a release.
pub fn pin(sources: &Sources, options: &PinArgs) -> Result<bool, CommandError> {
    let mut config = sources.store_config()?;
    config.progress = Some(flashinfer_rs::progress::terminal());
    let store = Store::open(config)?;
    match options.what.as_slice() {
        [What::Version(version)] => pin_release(&store, options, *version, None)?,
        [What::Version(version), What::Architecture(code)] => {
            pin_release(&store, options, *version, Some(*code))?;
        }
        what => {
            let package = |what: &What| match what {
                What::Package(package) => Some(package.clone()),
                _ => None,
            };
            let packages = what.iter().map(package).collect::<Option<Vec<_>>>();
            let alone = options.sha256.is_none() && options.from.is_none();
            let packages = packages.filter(|_| alone).ok_or(CommandError::WhatToPin)?;
            pin_records(&store, options, packages)?;
        }
    }
    Ok(true)
}

/// The row of a release, which is downloaded and verified.
fn pin_release(
    store: &Store,
    options: &PinArgs,
    version: FlashInferVersion,
    architecture: Option<CudaArchitecture>,
) -> Result<(), CommandError> {
    if !options.file.is_empty() {
        return Err(CommandError::WhatToPin);
    }
    let folder = options.from.clone();
    let release = Release { version, architecture, folder, sha256: options.sha256 };
    let (path, pin) = store.obtain(&release)?;
    let Origin::Url(url) = &pin.origin else { return Err(CommandError::WhatToPin) };
    let pins = &store.config().pins;
    let mut row = Table::new();
    let record = pin.record_sha256.map(|record| record.to_string()).unwrap_or_default();
    for (key, text) in
        [("file", &pin.file), ("sha256", &pin.sha256.to_string()), ("url", url), (KEY, &record)]
    {
        row.insert(key, value(text.as_str()));
    }
    let (package, cuda) = (release.package(), pins.cuda().to_string());
    let keys = [package.key(), &cuda, pins.arch()];
    let mut rows = DocumentMut::new();
    insert(&mut rows, &keys, row.clone())?;
    if let Some(manifest) = &options.write {
        write_row(manifest, &keys, row)?;
    }
    let mut out = io::stdout().lock();
    printed(write!(out, "# {}\n{rows}", path.display()))?;
    if options.sha256.is_none() {
        let note = "its members are what its RECORD says, and the digest is that of what the server sent: \
                    compare it with another source before you rely on it";
        printed(writeln!(io::stderr(), "note: {}: {note}", pin.file))?;
    }
    Ok(())
}

/// Writes a row into a manifest, which need not be there, in the place of the one that has its keys.
fn write_row(manifest: &Path, keys: &[&str], row: Table) -> Result<(), CommandError> {
    let failed = |error| CommandError::File(manifest.into(), error);
    let text = match fs::read_to_string(manifest) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        text => text.map_err(failed)?,
    };
    let mut document = parse(manifest, &text)?;
    insert(&mut document, keys, row)?;
    fs::write(manifest, document.to_string()).map_err(failed)
}

fn insert(document: &mut DocumentMut, keys: &[&str], row: Table) -> Result<(), CommandError> {
    let Some((last, above)) = keys.split_last() else { return Ok(()) };
    let mut at = document.as_table_mut();
    for key in TABLE.iter().chain(above) {
        let inner = at.entry(key).or_insert_with(|| {
            let mut table = Table::new();
            // It has no header of its own.
            table.set_implicit(true);
            Item::Table(table)
        });
        let reason = format!("`{key}` is no table with a header of its own");
        at = inner.as_table_mut().ok_or(CommandError::Artifact(ArtifactError::Pins { reason }))?;
    }
    at.insert(last, Item::Table(row));
    Ok(())
}

fn parse(manifest: &Path, text: &str) -> Result<DocumentMut, CommandError> {
    text.parse().map_err(|error: TomlError| {
        // Its message alone: the line that it shows may be an address with a password.
        let reason = format!("{} cannot be parsed: {}", manifest.display(), error.message());
        CommandError::Artifact(ArtifactError::Pins { reason })
    })
}

/// A line for each wheel.
fn pin_records(store: &Store, options: &PinArgs, packages: Vec<Package>) -> Result<(), CommandError> {
    let packages = match (packages.as_slice(), options.file.as_slice()) {
        ([], []) => &[Package::JitCache][..],
        (packages, _) => packages,
    };
    let fetched = packages.iter().map(|package| store.fetch(package.clone()));
    let fetched = fetched.collect::<Result<Vec<_>, _>>()?;
    for path in fetched.iter().chain(&options.file) {
        // A wheel in the cache, too: its stamp is no ground for a new pin.
        let digest = fs::File::open(path).and_then(|file| Digest::of_file(&file));
        let (sha256, _) = digest.map_err(|error| CommandError::File(path.clone(), error))?;
        let record = Wheel::open(path)?.record_sha256();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let place = match &options.write {
            Some(manifest) => match write(manifest, sha256, record)? {
                0 => return Err(CommandError::NotPinned(name, sha256, manifest.display().to_string())),
                rows => format!("{} rows of {} pin it", rows, manifest.display()),
            },
            None if Pins::is_pinned(sha256)? => format!("add this to the rows with sha256 = \"{sha256}\""),
            None => return Err(CommandError::NotPinned(name, sha256, "this crate's pin table".into())),
        };
        printed(writeln!(io::stdout(), "# {name}: {place}\n{KEY} = \"{record}\""))?;
    }
    Ok(())
}

/// Adds the digest to each row of a manifest's pin table that has this SHA-256, and returns how
/// many there are. Nothing else in the manifest changes.
fn write(manifest: &Path, sha256: Digest, record: Digest) -> Result<usize, CommandError> {
    let failed = |error| CommandError::File(manifest.into(), error);
    let text = fs::read_to_string(manifest).map_err(failed)?;
    let bad = |reason: String| CommandError::Artifact(ArtifactError::Pins { reason });
    let mut document = parse(manifest, &text)?;
    let mut at: &mut dyn TableLike = document.as_table_mut();
    for key in TABLE {
        let table = at.get_mut(key).and_then(|item| item.as_table_like_mut());
        at = table.ok_or_else(|| bad(format!("{} has no table `{key}`", manifest.display())))?;
    }
    let hex = sha256.to_string();
    let rows = add(at, 3, &hex, &record.to_string());
    let pinned = document.to_string();
    if pinned != text {
        fs::write(manifest, pinned).map_err(failed)?;
    }
    Ok(rows)
}

/// Rows lie `depth` tables below: by package, CUDA key and architecture.
fn add(table: &mut dyn TableLike, depth: usize, sha256: &str, record: &str) -> usize {
    if depth == 0 {
        let fits = table.get("sha256").and_then(|item| item.as_str()) == Some(sha256);
        if fits {
            table.insert(KEY, value(record));
        }
        return usize::from(fits);
    }
    let mut rows = 0;
    for (_, item) in table.iter_mut() {
        rows += item.as_table_like_mut().map_or(0, |table| add(table, depth - 1, sha256, record));
    }
    rows
}
