//! The digest of a wheel's RECORD, for the pin table: with it, members can be downloaded alone.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::Args;
use flashinfer_rs::artifacts::{ArtifactError, Digest, Package, Pins, Store, Wheel};
use toml_edit::{DocumentMut, TableLike, TomlError, value};

use crate::{Failure, Sources, printed};

const KEY: &str = "record_sha256";

/// Which wheels, and where to write.
#[derive(Args)]
pub struct Pin {
    /// The packages whose pinned wheel is looked into, and downloaded whole unless it is in the
    /// cache; if nothing is named, flashinfer_jit_cache
    #[arg(value_name = "PACKAGE", value_parser = crate::package)]
    packages: Vec<Package>,
    /// A pinned wheel on disk, also one for another machine; may be repeated
    #[arg(long, value_name = "WHEEL")]
    file: Vec<PathBuf>,
    /// The Cargo.toml to write into, instead of only printing: each row with the wheel's SHA-256
    #[arg(long, value_name = "MANIFEST")]
    write: Option<PathBuf>,
}

/// Prints or writes a line for each wheel.
pub fn pin(sources: &Sources, options: &Pin) -> Result<bool, Failure> {
    let mut config = sources.store_config()?;
    config.progress = Some(flashinfer_rs::progress::terminal());
    let store = Store::open(config)?;
    let packages = match (options.packages.as_slice(), options.file.as_slice()) {
        ([], []) => &[Package::JitCache][..],
        (packages, _) => packages,
    };
    let fetched = packages.iter().map(|package| store.fetch(package.clone()));
    let fetched = fetched.collect::<Result<Vec<_>, _>>()?;
    for path in fetched.iter().chain(&options.file) {
        // A wheel in the cache, too: its stamp is no ground for a new pin.
        let digest = fs::File::open(path).and_then(|file| Digest::of_file(&file));
        let (sha256, _) = digest.map_err(|error| Failure::File(path.clone(), error))?;
        let record = Wheel::open(path)?.record_sha256();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let place = match &options.write {
            Some(manifest) => match write(manifest, sha256, record)? {
                0 => return Err(Failure::NotPinned(name, sha256, manifest.display().to_string())),
                rows => format!("{} rows of {} pin it", rows, manifest.display()),
            },
            None if Pins::is_pinned(sha256)? => format!("add this to the rows with sha256 = \"{sha256}\""),
            None => return Err(Failure::NotPinned(name, sha256, "this crate's pin table".into())),
        };
        printed(writeln!(io::stdout(), "# {name}: {place}\n{KEY} = \"{record}\""))?;
    }
    Ok(true)
}

/// Adds the digest to each row of a manifest's pin table that has this SHA-256, and returns how
/// many there are. Nothing else in the manifest changes.
fn write(manifest: &Path, sha256: Digest, record: Digest) -> Result<usize, Failure> {
    let failed = |error| Failure::File(manifest.into(), error);
    let text = fs::read_to_string(manifest).map_err(failed)?;
    let bad = |reason: String| Failure::Artifact(ArtifactError::Pins { reason });
    let mut document: DocumentMut = text.parse().map_err(|error: TomlError| {
        // Its message alone: the line that it shows may be an address with a password.
        bad(format!("{} cannot be parsed: {}", manifest.display(), error.message()))
    })?;
    let mut at: &mut dyn TableLike = document.as_table_mut();
    for key in ["package", "metadata", "flashinfer_rs", "pinned_wheels"] {
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
