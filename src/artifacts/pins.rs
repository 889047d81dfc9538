//! The pin table: which file of which package serves a CUDA version and an architecture.
//!
//! The table is `[package.metadata.flashinfer_rs.pinned_wheels.<package>.<cuda>.<arch>]` of the
//! crate's `Cargo.toml`, so that one place states it for the build script, the library and
//! whoever packages the crate. A package of data has the one row `any.any`. The table is read
//! once. A program's own manifest may hold one, too.

use super::digest::Digest;
use super::{ArtifactError, CudaArchitecture, Package, kernels, program, redact};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The CUDA key and the architecture of a row that fits every machine.
const ANY: &str = "any";

const MANIFEST: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"));

/// The key that is used when nothing tells the CUDA version.
pub const DEFAULT_CUDA: CudaKey = CudaKey { major: 13, minor: 0 };

/// A CUDA version as the pin table writes it, for example `cu130`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CudaKey {
    major: u32,
    minor: u32,
}

impl CudaKey {
    /// A key from a CUDA version.
    pub const fn new(major: u32, minor: u32) -> CudaKey {
        CudaKey { major, minor }
    }

    /// Reads `cu130`, `cu13.0`, `130`, `13.0` or `13.0.88`.
    pub fn parse(text: &str) -> Option<CudaKey> {
        let text = text.trim();
        let text = text.strip_prefix("cu").unwrap_or(text);
        let (major, minor) = match text.split_once('.') {
            Some((major, rest)) => (major, rest.split('.').next().unwrap_or_default()),
            None if text.len() >= 3 && text.is_ascii() => text.split_at(text.len() - 1),
            None => return None,
        };
        Some(CudaKey::new(major.parse().ok()?, minor.parse().ok()?))
    }

    /// The key of the build machine's toolkit, or of `FLASHINFER_RS_CUDA`.
    ///
    /// A toolkit without a row of its own gets the nearest one: the largest key that is not
    /// newer, else the smallest. Without any toolkit it is `cu130`.
    ///
    /// # Errors
    /// [`ArtifactError::Setting`] when `FLASHINFER_RS_CUDA` names no row, and
    /// [`ArtifactError::Pins`] when the table cannot be read.
    pub fn select(env: &dyn Fn(&str) -> Option<String>) -> Result<CudaKey, ArtifactError> {
        let known = known_cuda()?;
        if let Some(value) = env("FLASHINFER_RS_CUDA").filter(|v| !v.is_empty()) {
            return CudaKey::parse(&value).filter(|key| known.contains(key)).ok_or_else(|| {
                ArtifactError::Setting {
                    variable: "FLASHINFER_RS_CUDA",
                    value,
                    expected: format!("one of {}", join(&known)),
                }
            });
        }
        Ok(toolkit(env).map_or(DEFAULT_CUDA, |key| key.nearest(&known)))
    }

    fn nearest(self, known: &[CudaKey]) -> CudaKey {
        let older = known.iter().filter(|key| **key <= self).max();
        *older.or(known.iter().min()).unwrap_or(&DEFAULT_CUDA)
    }
}

impl fmt::Display for CudaKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cu{}{}", self.major, self.minor)
    }
}

/// The environment variables that [`CudaKey::select`] reads.
pub const CUDA_VARIABLES: [&str; 4] = ["FLASHINFER_RS_CUDA", "CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"];

fn toolkit(env: &dyn Fn(&str) -> Option<String>) -> Option<CudaKey> {
    let roots = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"].into_iter();
    let roots = roots.filter_map(env).filter(|root| !root.is_empty());
    let mut roots = roots.chain(["/usr/local/cuda".into()]).map(PathBuf::from);
    roots
        .find_map(|root| {
            let text = std::fs::read_to_string(root.join("version.json")).ok()?;
            version_json(&text)
        })
        .or_else(nvcc)
}

fn version_json(text: &str) -> Option<CudaKey> {
    let json: serde_json::Value = serde_json::from_str(text).ok()?;
    CudaKey::parse(json.get("cuda")?.get("version")?.as_str()?)
}

fn nvcc() -> Option<CudaKey> {
    let mut command = Command::new(program::find("nvcc")?);
    command.arg("--version").stdin(Stdio::null()).stderr(Stdio::null());
    let output = command.output().ok()?;
    nvcc_release(&String::from_utf8_lossy(&output.stdout))
}

fn nvcc_release(text: &str) -> Option<CudaKey> {
    let (_, rest) = text.split_once("release ")?;
    CudaKey::parse(rest.split([',', ' ', '\n']).next()?)
}

/// How a pinned file is reached.
#[derive(Clone, PartialEq, Eq)]
pub enum Origin {
    /// An address of its own.
    Url(String),
    /// A package of a registry, by name and version; the machine's settings say which registry.
    Registry {
        /// The package.
        package: String,
        /// Its version.
        version: String,
    },
}

impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // The address may hold a password.
            Origin::Url(url) => f.debug_tuple("Url").field(&redact::addresses(url)).finish(),
            Origin::Registry { package, version } => {
                f.debug_struct("Registry").field("package", package).field("version", version).finish()
            }
        }
    }
}

/// One pinned wheel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// The wheel's file name.
    pub file: String,
    /// The digest that the file must have.
    pub sha256: Digest,
    /// The digest of its `RECORD`, if it is pinned: then members can be fetched one by one.
    pub record_sha256: Option<Digest>,
    /// How it is reached.
    pub origin: Origin,
}

/// The pins of one CUDA key and architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pins {
    cuda: CudaKey,
    arch: String,
    pins: BTreeMap<String, Pin>,
}

impl Pins {
    /// The crate's own pins for a CUDA key and an architecture (`x86_64`, `aarch64`).
    ///
    /// An architecture without pins is no error here: such a machine can still use wheels of its
    /// own, and [`Pins::get`] tells what is missing.
    ///
    /// # Errors
    /// [`ArtifactError::Pins`] when the table cannot be read.
    pub fn select(cuda: CudaKey, arch: &str) -> Result<Pins, ArtifactError> {
        Ok(Pins::from_table(table()?, cuda, arch))
    }

    /// The pins for the machine that this program was built for.
    ///
    /// # Errors
    /// [`ArtifactError::Pins`] when the table cannot be read.
    pub fn built_in() -> Result<Pins, ArtifactError> {
        let cuda = option_env!("FLASHINFER_RS_SELECTED_CUDA").and_then(CudaKey::parse);
        let arch = if cfg!(target_os = "linux") { std::env::consts::ARCH } else { "none" };
        Pins::select(cuda.unwrap_or(DEFAULT_CUDA), arch)
    }

    /// Pins from the text of a manifest with a table of the same form as the crate's.
    ///
    /// # Errors
    /// [`ArtifactError::Pins`] when the text is malformed.
    pub fn parse(manifest: &str, cuda: CudaKey, arch: &str) -> Result<Pins, ArtifactError> {
        Ok(Pins::from_table(&read_table(manifest)?, cuda, arch))
    }

    /// Adds the pins of a program's own packages, for the CUDA key and architecture of these: the
    /// text of a manifest with a table of the same form as the crate's. Their files are
    /// [`Member::File`](super::Member::File).
    ///
    /// ```
    /// # use flashinfer_rs::artifacts::{Package, Pins};
    /// let mut pins = Pins::built_in()?;
    /// pins.extend(
    ///     r#"
    ///     [package.metadata.flashinfer_rs.pinned_wheels.my_model.any.any]
    ///     file = "my_model-1.0-py3-none-any.whl"
    ///     sha256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    ///     package = "my-model"
    ///     version = "1.0"
    ///     "#,
    /// )?;
    /// assert!(pins.get(Package::Other("my_model".into())).is_ok());
    /// # Ok::<(), flashinfer_rs::artifacts::ArtifactError>(())
    /// ```
    ///
    /// # Errors
    /// [`ArtifactError::Pins`] when the text is malformed, or pins a package or a file that is
    /// pinned already. Then nothing is added.
    pub fn extend(&mut self, manifest: &str) -> Result<(), ArtifactError> {
        let added = Pins::parse(manifest, self.cuda, &self.arch)?.pins;
        for (package, pin) in &added {
            let taken = self.pins.iter().find(|(key, known)| *key == package || known.file == pin.file);
            if let Some((key, known)) = taken {
                return Err(ArtifactError::Pins {
                    reason: format!("{package} pins {}, but {key} pins {} already", pin.file, known.file),
                });
            }
        }
        self.pins.extend(added);
        Ok(())
    }

    /// Adds the pins of the manifest that `FLASHINFER_RS_PINS` names, if it names one.
    pub(crate) fn extend_by_setting(&mut self, named: Option<PathBuf>) -> Result<(), ArtifactError> {
        let Some(manifest) = named else { return Ok(()) };
        let text = std::fs::read_to_string(&manifest).map_err(|e| ArtifactError::Setting {
            variable: "FLASHINFER_RS_PINS",
            value: manifest.display().to_string(),
            expected: format!("a manifest with a pin table: {e}"),
        })?;
        self.extend(&text)
    }

    fn from_table(table: &Table, cuda: CudaKey, arch: &str) -> Pins {
        let mut pins = BTreeMap::new();
        for ((package, key, on), pin) in table {
            let exact = *key == Some(cuda) && on == arch;
            if exact || key.is_none() && !pins.contains_key(package) {
                pins.insert(package.clone(), pin.clone());
            }
        }
        Pins { cuda, arch: arch.into(), pins }
    }

    /// The pin of a package.
    ///
    /// # Errors
    /// [`ArtifactError::Pins`] when the package has none for this CUDA key and architecture.
    pub fn get(&self, package: Package) -> Result<&Pin, ArtifactError> {
        self.pins.get(package.key()).ok_or_else(|| ArtifactError::Pins {
            reason: match package {
                Package::Other(key) => format!(
                    "{key} has no pin for {} on {}; a program adds those of its own with `Pins::extend`",
                    self.cuda, self.arch
                ),
                known => format!(
                    "{known} has no pin for {} on {}; pins exist for linux on x86_64 and aarch64, \
                     and any other machine needs wheels of its own in FLASHINFER_RS_WHEELS",
                    self.cuda, self.arch
                ),
            },
        })
    }

    /// The packages of providers of kernels, each for one architecture.
    pub(crate) fn providers(&self) -> impl Iterator<Item = (Package, CudaArchitecture)> {
        self.pins.keys().filter_map(|key| {
            let code = kernels::provider_of(key)?;
            Some((Package::provider(code), code))
        })
    }

    /// The file names of these pins and of the crate's own, for whatever machine.
    ///
    /// # Errors
    /// [`ArtifactError::Pins`] when the table cannot be read.
    pub(crate) fn files(&self) -> Result<BTreeSet<String>, ArtifactError> {
        Ok(self.pins.values().chain(table()?.values()).map(|pin| pin.file.clone()).collect())
    }

    /// Whether the crate's own table pins a file with this digest, for whatever machine.
    ///
    /// # Errors
    /// [`ArtifactError::Pins`] when the table cannot be read.
    pub fn is_pinned(sha256: Digest) -> Result<bool, ArtifactError> {
        Ok(table()?.values().any(|pin| pin.sha256 == sha256))
    }

    /// The CUDA key of these pins.
    pub fn cuda(&self) -> CudaKey {
        self.cuda
    }

    /// The architecture of these pins.
    pub fn arch(&self) -> &str {
        &self.arch
    }
}

/// Rows by package, CUDA key (`None` stands for any) and architecture.
type Table = BTreeMap<(String, Option<CudaKey>, String), Pin>;

fn table() -> Result<&'static Table, ArtifactError> {
    static TABLE: OnceLock<Result<Table, String>> = OnceLock::new();
    let table = TABLE.get_or_init(|| read_table(MANIFEST).map_err(|e| e.to_string()));
    table.as_ref().map_err(|reason| ArtifactError::Pins { reason: reason.clone() })
}

fn known_cuda() -> Result<Vec<CudaKey>, ArtifactError> {
    let keys = table()?.keys();
    let keys = keys.filter(|(package, ..)| package == Package::JitCache.key());
    let mut keys: Vec<_> = keys.filter_map(|(_, cuda, _)| *cuda).collect();
    keys.dedup();
    Ok(keys)
}

fn join(keys: &[CudaKey]) -> String {
    let names: Vec<_> = keys.iter().map(CudaKey::to_string).collect();
    names.join(", ")
}

fn read_table(manifest: &str) -> Result<Table, ArtifactError> {
    let bad = |reason: String| ArtifactError::Pins { reason };
    let root: toml::Table = manifest.parse().map_err(|e: toml::de::Error| {
        // It shows the line, which may be an address.
        bad(format!("the manifest cannot be parsed: {}", redact::addresses(&e.to_string())))
    })?;
    let mut at = &root;
    for key in ["package", "metadata", "flashinfer_rs", "pinned_wheels"] {
        at = at
            .get(key)
            .and_then(toml::Value::as_table)
            .ok_or_else(|| bad(format!("the manifest has no table `{key}`")))?;
    }
    let mut rows = Table::new();
    for (package, by_cuda) in at {
        for (cuda, by_arch) in by_cuda.as_table().into_iter().flatten() {
            for (arch, row) in by_arch.as_table().into_iter().flatten() {
                let name = format!("{package}.{cuda}.{arch}");
                let key = CudaKey::parse(cuda);
                if key.is_none() && [cuda, arch] != [ANY, ANY] {
                    return Err(bad(format!("`{name}`: {cuda} is no CUDA key")));
                }
                let pin = read_pin(row).map_err(|reason| bad(format!("`{name}`: {reason}")))?;
                rows.insert((package.clone(), key, arch.clone()), pin);
            }
        }
    }
    Ok(rows)
}

fn read_pin(row: &toml::Value) -> Result<Pin, String> {
    let text = |key: &str| row.get(key).and_then(toml::Value::as_str);
    let need = |key: &str| text(key).ok_or_else(|| format!("`{key}` is missing"));
    let file = need("file")?;
    if file.contains(['/', '\\', '\0']) || file.starts_with('.') {
        return Err(format!("`file` is no plain file name: {file:?}"));
    }
    let digest = |key: &str, hex: &str| {
        Digest::from_hex(hex).ok_or_else(|| format!("`{key}` is not 64 hexadecimal digits"))
    };
    let sha256 = digest("sha256", need("sha256")?)?;
    let record_sha256 = match row.get("record_sha256") {
        None => None,
        Some(value) => Some(digest("record_sha256", value.as_str().unwrap_or_default())?),
    };
    let origin = match text("url") {
        Some(url) => Origin::Url(url.into()),
        None => Origin::Registry { package: need("package")?.into(), version: need("version")?.into() },
    };
    Ok(Pin { file: file.into(), sha256, record_sha256, origin })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crates_table_is_complete() {
        for cuda in known_cuda().unwrap() {
            for arch in ["x86_64", "aarch64"] {
                let pins = Pins::select(cuda, arch).unwrap();
                for package in Package::PINNED {
                    let pin = pins.get(package.clone()).unwrap();
                    assert!(pin.file.ends_with(&format!("{arch}.whl")), "{cuda} {arch} {pin:?}");
                    let by_url = matches!(pin.origin, Origin::Url(_));
                    assert_eq!(by_url, package == Package::JitCache);
                }
            }
        }
    }

    #[test]
    fn keys_are_read_in_every_spelling() {
        for text in ["cu130", "cu13.0", "130", "13.0", "13.0.88", " 13.0\n"] {
            assert_eq!(CudaKey::parse(text), Some(DEFAULT_CUDA), "{text}");
        }
        for text in ["", "cu", "13", "x", "cu13x", "thirteen"] {
            assert_eq!(CudaKey::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_toolkit_without_a_row_gets_the_nearest() {
        let known = [CudaKey::new(13, 0), CudaKey::new(13, 1)];
        for (have, want) in [
            ((12, 8), (13, 0)),
            ((13, 0), (13, 0)),
            ((13, 1), (13, 1)),
            ((13, 2), (13, 1)),
            ((14, 0), (13, 1)),
        ] {
            let key = CudaKey::new(have.0, have.1).nearest(&known);
            assert_eq!(key, CudaKey::new(want.0, want.1), "{have:?}");
        }
    }

    #[test]
    fn the_toolkit_is_told_by_its_own_files() {
        let json = r#"{"cuda": {"name": "CUDA SDK", "version": "13.1.0"}}"#;
        assert_eq!(version_json(json), Some(CudaKey::new(13, 1)));
        let text = "Cuda compilation tools, release 12.8, V12.8.93\n";
        assert_eq!(nvcc_release(text), Some(CudaKey::new(12, 8)));
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("version.json"), json).unwrap();
        let root = dir.path().to_str().unwrap().to_owned();
        let env = |name: &str| (name == "CUDA_PATH").then(|| root.clone());
        assert_eq!(CudaKey::select(&env).unwrap(), CudaKey::new(13, 1));
    }

    #[test]
    fn an_unknown_override_lists_the_known_keys() {
        let env = |name: &str| (name == "FLASHINFER_RS_CUDA").then(|| "cu999".to_owned());
        let text = CudaKey::select(&env).unwrap_err().to_string();
        assert!(text.contains("cu999") && text.contains("cu130, cu131"), "{text}");
        let env = |name: &str| (name == "FLASHINFER_RS_CUDA").then(|| "13.1".to_owned());
        assert_eq!(CudaKey::select(&env).unwrap(), CudaKey::new(13, 1));
    }

    #[test]
    fn malformed_tables_name_the_row() {
        let row = "[package.metadata.flashinfer_rs.pinned_wheels.apache_tvm_ffi.cu130.x86_64]\nfile='";
        let digest = Digest::of(b"");
        for (rest, want) in [
            ("a.whl'", "sha256"),
            ("a.whl'\nsha256='12'", "64 hexadecimal"),
            ("../a.whl'\nsha256='12'", "plain file name"),
            (&format!("a.whl'\nsha256='{digest}'\nrecord_sha256='12'"), "`record_sha256` is not 64"),
            (&format!("a.whl'\nsha256='{digest}'\nrecord_sha256=12"), "`record_sha256` is not 64"),
        ] {
            let text = Pins::parse(&format!("{row}{rest}"), DEFAULT_CUDA, "x86_64").unwrap_err().to_string();
            assert!(text.contains("apache_tvm_ffi.cu130.x86_64") && text.contains(want), "{text}");
        }
    }

    fn row(name: &str, file: &str) -> String {
        let digest = Digest::of(file.as_bytes());
        format!(
            "[package.metadata.flashinfer_rs.pinned_wheels.{name}]\nfile='{file}'\nsha256='{digest}'\n\
             url='http://127.0.0.1:9/{file}'\n"
        )
    }

    #[test]
    fn a_program_brings_pins_of_its_own() {
        let own = |key: &str| Package::Other(key.into());
        for arch in ["x86_64", "riscv64"] {
            let mut pins = Pins::select(DEFAULT_CUDA, arch).unwrap();
            let text = pins.get(own("model")).unwrap_err().to_string();
            assert!(text.contains("model has no pin") && text.contains("Pins::extend"), "{text}");
            let rows = [
                row("model.any.any", "any.whl"),
                row("tuned.any.any", "slow.whl"),
                row("tuned.cu130.x86_64", "fast.whl"),
                row("tuned.cu131.x86_64", "other.whl"),
            ];
            pins.extend(&rows.concat()).unwrap();
            assert_eq!(pins.get(own("model")).unwrap().file, "any.whl");
            let tuned = if arch == "x86_64" { "fast.whl" } else { "slow.whl" };
            assert_eq!(pins.get(own("tuned")).unwrap().file, tuned);
            assert!(pins.files().unwrap().contains("any.whl"));
        }
        let text = Pins::parse(&row("model.any.x86_64", "a.whl"), DEFAULT_CUDA, "x86_64").unwrap_err();
        assert!(text.to_string().contains("any is no CUDA key"), "{text}");
    }

    #[test]
    fn no_pin_takes_the_place_of_another() {
        let mut pins = Pins::select(DEFAULT_CUDA, "x86_64").unwrap();
        let before = pins.clone();
        let cublas = pins.get(Package::Cublas).unwrap().file.clone();
        for (second, want) in [
            (row("nvidia_cublas.any.any", "mine.whl"), "nvidia_cublas pins mine.whl, but nvidia_cublas pins"),
            (row("mine.any.any", &cublas), "but nvidia_cublas pins"),
            ("[package]\nname = 'x'".into(), "has no table `metadata`"),
        ] {
            let rows =
                if second.starts_with("[package]") { second } else { row("a.any.any", "a.whl") + &second };
            let text = pins.extend(&rows).unwrap_err().to_string();
            assert!(text.contains(want), "{text}");
            assert_eq!(pins, before);
        }
    }

    #[test]
    fn an_architecture_without_pins_is_named() {
        let pins = Pins::select(DEFAULT_CUDA, "riscv64").unwrap();
        let text = pins.get(Package::JitCache).unwrap_err().to_string();
        assert!(text.contains("riscv64") && text.contains("FLASHINFER_RS_WHEELS"), "{text}");
    }
}
