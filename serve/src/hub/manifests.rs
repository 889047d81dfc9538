//! Manifests: which files a model has, by their digests.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Write},
    ops::Not,
    path::{Path, PathBuf},
};

use flashinfer_rs::artifacts::{Blob, Digest};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{Error, Result};

/// The files of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The model's name.
    pub name: String,
    /// The commit of the repository that they are of, if they are of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// Whether terms must be accepted before the files can be had.
    #[serde(default, skip_serializing_if = "Not::not")]
    pub gated: bool,
    /// The files, in order.
    pub files: Vec<ModelFile>,
}

/// A file of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelFile {
    /// Its path where it comes from. It names no file of this machine.
    pub path: String,
    /// Its digest.
    #[serde(serialize_with = "to_hex", deserialize_with = "from_hex")]
    pub sha256: Digest,
    /// Its bytes, where they are known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

impl ModelFile {
    /// The file as a blob.
    pub fn blob(&self) -> Blob<'_> {
        let name = self.path.rsplit('/').next().unwrap_or_default();
        Blob { name, sha256: self.sha256, size: self.size }
    }
}

fn to_hex<S: Serializer>(digest: &Digest, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(digest)
}

fn from_hex<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Digest, D::Error> {
    let text = String::deserialize(deserializer)?;
    Digest::from_hex(&text).ok_or_else(|| de::Error::custom("sha256 is not 64 hexadecimal digits"))
}

/// A folder of manifests, shared by processes. A manifest's file is called by the digest of the
/// model's name, so that no name leads out of the folder.
#[derive(Debug)]
pub struct Manifests {
    folder: PathBuf,
}

/// What ends the names of manifests.
const END: &str = ".json";

impl Manifests {
    /// Those in `folder`, which need not exist yet.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Waits until no other process changes manifests; none does until the lock is dropped. Where
    /// the file system has no locks, nobody waits.
    pub fn lock(&self) -> Result<File> {
        fs::create_dir_all(&self.folder).map_err(|error| self.failed("create", &self.folder, error))?;
        let path = self.folder.join(".lock");
        let file = File::options().create(true).append(true).open(&path);
        let file = file.map_err(|error| self.failed("open", &path, error))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                file.lock().map_err(|error| self.failed("lock", &path, error))?
            }
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        Ok(file)
    }

    /// The manifest of a model, if there is one.
    pub fn get(&self, name: &str) -> Result<Option<Manifest>> {
        let path = self.path(name);
        match fs::read(&path) {
            Ok(bytes) => self.read(&path, &bytes).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.failed("read", &path, error)),
        }
    }

    /// Keeps a manifest, instead of an earlier one of the model.
    pub fn put(&self, manifest: &Manifest) -> Result<()> {
        let path = self.path(&manifest.name);
        let write = || {
            let mut file = tempfile::Builder::new().prefix(".tmp-").tempfile_in(&self.folder)?;
            file.write_all(&serde_json::to_vec_pretty(manifest)?)?;
            file.as_file().sync_all()?;
            file.persist(&path).map_err(|error| error.error)
        };
        write().map(|_| ()).map_err(|error| self.failed("write", &path, error))
    }

    /// Removes the manifest of a model; returns whether there was one.
    pub fn remove(&self, name: &str) -> Result<bool> {
        let path = self.path(name);
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(self.failed("remove", &path, error)),
        }
    }

    /// All manifests, in the order of their names.
    pub fn all(&self) -> Result<Vec<Manifest>> {
        let listing = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            listing => listing.map_err(|error| self.failed("list", &self.folder, error))?,
        };
        let mut all = Vec::new();
        for entry in listing {
            let path = entry.map_err(|error| self.failed("list", &self.folder, error))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let digest = name.and_then(|name| name.strip_suffix(END)).and_then(Digest::from_hex);
            if digest.is_none() {
                continue;
            }
            match fs::read(&path) {
                Ok(bytes) => all.push(self.read(&path, &bytes)?),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(self.failed("read", &path, error)),
            }
        }
        all.sort_by(|a: &Manifest, b| a.name.cmp(&b.name));
        Ok(all)
    }

    fn read(&self, path: &Path, bytes: &[u8]) -> Result<Manifest> {
        let broken = |reason: &str| -> Error {
            let path = path.display();
            format!("{path} is no manifest of a model: {reason}; remove it, and pull the model again").into()
        };
        let manifest: Manifest = serde_json::from_slice(bytes).map_err(|error| broken(&error.to_string()))?;
        match path == self.path(&manifest.name) && !manifest.files.is_empty() {
            true => Ok(manifest),
            false => Err(broken("its name is that of another model, or it has no files")),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{}{END}", Digest::of(name.as_bytes())))
    }

    fn failed(&self, action: &str, path: &Path, error: io::Error) -> Error {
        let remedy = "check the path, or set FLASHINFER_RS_CACHE_DIR to another folder";
        format!("cannot {action} {}: {error}; {remedy}", path.display()).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(name: &str) -> Manifest {
        let file = ModelFile { path: "folder/x.gguf".into(), sha256: Digest::of(b"x"), size: Some(1) };
        Manifest { name: name.into(), commit: None, gated: false, files: vec![file] }
    }

    #[test]
    fn manifests_are_kept_by_any_name() {
        let folder = tempfile::tempdir().unwrap();
        let manifests = Manifests::new(folder.path().join("models/manifests"));
        assert_eq!((manifests.get("a").unwrap(), manifests.all().unwrap()), (None, vec![]));
        let _lock = manifests.lock().unwrap();
        for name in ["b", "../../a", "/etc/passwd", "", "é:\n"] {
            manifests.put(&manifest(name)).unwrap();
            assert_eq!(manifests.get(name).unwrap(), Some(manifest(name)));
        }
        let names: Vec<_> = manifests.all().unwrap().into_iter().map(|manifest| manifest.name).collect();
        assert_eq!(names, ["", "../../a", "/etc/passwd", "b", "é:\n"]);
        assert!(manifests.remove("b").unwrap() && !manifests.remove("b").unwrap());
        assert_eq!(manifests.all().unwrap().len(), 4);
        // Nothing is beside the folder.
        assert_eq!(fs::read_dir(folder.path().join("models")).unwrap().count(), 1);
        assert_eq!(manifest("a").files[0].blob().name, "x.gguf");
    }

    #[test]
    fn broken_manifests_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let manifests = Manifests::new(folder.path().into());
        manifests.put(&manifest("a")).unwrap();
        let path = manifests.path("a");
        for wrong in [
            "",
            "[]",
            r#"{"name":"a","files":[]}"#,
            r#"{"name":"b","files":[{"path":"x","sha256":"12"}]}"#,
            &serde_json::to_string(&manifest("b")).unwrap(),
        ] {
            fs::write(&path, wrong).unwrap();
            for error in [manifests.get("a").unwrap_err(), manifests.all().unwrap_err()] {
                let error = error.to_string();
                assert!(
                    error.contains("is no manifest") && error.contains(path.to_str().unwrap()),
                    "{error}"
                );
            }
        }
    }
}
