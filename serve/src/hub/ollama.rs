//! The store of an ollama on this machine, which is only read.

use std::{
    env,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use flashinfer_rs::artifacts::Digest;
use serde::Deserialize;

use super::name::OllamaName;
use crate::{Error, Result};

/// The layers that are weights of a language model, and those that change them.
const MODEL: &str = "application/vnd.ollama.image.model";
const ADAPTER: &str = "application/vnd.ollama.image.adapter";
/// No manifest is larger.
const MAX_MANIFEST: u64 = 4 << 20;

/// The store.
#[derive(Debug)]
pub struct Ollama {
    folder: PathBuf,
}

#[derive(Deserialize)]
struct Manifest {
    layers: Vec<Layer>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Layer {
    media_type: String,
    digest: String,
    size: u64,
}

impl Ollama {
    /// The store in `folder`.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// The store of `OLLAMA_MODELS`, or else where ollama has it by default.
    pub fn from_env() -> Option<Self> {
        let named = env::var_os("OLLAMA_MODELS").filter(|value| !value.is_empty()).map(PathBuf::from);
        named.or_else(|| Some(env::home_dir()?.join(".ollama/models"))).map(Self::new)
    }

    /// The files of a model.
    pub fn locate(&self, name: &OllamaName) -> Result<Vec<PathBuf>> {
        let path = self.manifest(name);
        let unusable = |reason: String| -> Error { format!("{name} cannot be used: {reason}").into() };
        let size = match fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                let at = self.folder.display();
                return Err(format!(
                    "ollama's store in {at} has no {name}; fetch it with ollama, or name the store's folder in \
                     OLLAMA_MODELS"
                )
                .into());
            }
            Err(error) => return Err(unusable(format!("{}: {error}", path.display()))),
        };
        if size > MAX_MANIFEST {
            return Err(unusable(format!("its manifest {} has {size} bytes", path.display())));
        }
        let bytes = fs::read(&path).map_err(|error| unusable(format!("{}: {error}", path.display())))?;
        let manifest: Manifest = serde_json::from_slice(&bytes)
            .map_err(|error| unusable(format!("its manifest {}: {error}", path.display())))?;
        if manifest.layers.iter().any(|layer| layer.media_type == ADAPTER) {
            return Err(unusable("it has an adapter, which this program does not apply".into()));
        }
        let models = manifest.layers.iter().filter(|layer| layer.media_type == MODEL);
        let files: Vec<_> = models.map(|layer| self.blob(layer).map_err(&unusable)).collect::<Result<_>>()?;
        match files.is_empty() {
            true => Err(unusable("its manifest names no model".into())),
            false => Ok(files),
        }
    }

    /// Reads files of the store whole, once, and refuses those whose SHA-256 is not what they are
    /// called by. `records` is a folder of the program's own, which remembers those that were
    /// read, by their sizes and when they were changed.
    pub fn verify(&self, files: &[PathBuf], records: &Path) -> Result<()> {
        files.iter().try_for_each(|file| verify(file, records))
    }

    /// The names of all models.
    pub fn list(&self) -> Vec<OllamaName> {
        let mut names = vec![Vec::new()];
        // The registry, the namespace, the model and the tag.
        for _ in 0..4 {
            names = names.iter().flat_map(|parts| self.below(parts)).collect();
        }
        let name = |parts: Vec<String>| {
            let [registry, namespace, name, tag] = <[String; 4]>::try_from(parts).ok()?;
            let name: OllamaName = format!("{registry}/{namespace}/{name}:{tag}").parse().ok()?;
            fs::metadata(self.manifest(&name)).is_ok_and(|found| found.is_file()).then_some(name)
        };
        let mut names: Vec<_> = names.into_iter().filter_map(name).collect();
        names.sort_by_key(ToString::to_string);
        names
    }

    /// The entries of a folder of manifests, each with the folders that lead to it.
    fn below(&self, parts: &[String]) -> Vec<Vec<String>> {
        let folder = parts.iter().fold(self.folder.join("manifests"), |folder, part| folder.join(part));
        let names = fs::read_dir(folder).into_iter().flatten().flatten();
        let names = names.filter_map(|entry| entry.file_name().into_string().ok());
        names.map(|name| [parts, &[name]].concat()).collect()
    }

    fn manifest(&self, name: &OllamaName) -> PathBuf {
        let OllamaName { folders, tag } = name;
        let folder = folders.iter().fold(self.folder.join("manifests"), |folder, part| folder.join(part));
        folder.join(tag)
    }

    /// The file of a layer, which must have the size that the manifest states.
    fn blob(&self, layer: &Layer) -> std::result::Result<PathBuf, String> {
        let digest = layer.digest.strip_prefix("sha256:").and_then(Digest::from_hex);
        let digest = digest.ok_or_else(|| format!("its manifest has the digest `{}`", layer.digest))?;
        let path = self.folder.join(Path::new("blobs")).join(format!("sha256-{digest}"));
        let found = fs::metadata(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        match found.len() == layer.size {
            true => Ok(path),
            false => Err(format!(
                "{} has {} bytes, and its manifest states {}; fetch it again with ollama",
                path.display(),
                found.len(),
                layer.size
            )),
        }
    }
}

/// See [`Ollama::verify`].
fn verify(path: &Path, records: &Path) -> Result<()> {
    let unread = |error: io::Error| -> Error { format!("{} cannot be read: {error}", path.display()).into() };
    let name = path.file_name().unwrap_or_default();
    let file = File::open(path).map_err(unread)?;
    let metadata = file.metadata().map_err(unread)?;
    let state = format!("{} {:?}", metadata.len(), metadata.modified().map_err(unread)?);
    let record = records.join(name);
    if fs::read_to_string(&record).is_ok_and(|known| known == state) {
        return Ok(());
    }
    let (found, _) = Digest::of_file(&file).map_err(unread)?;
    if name.to_str() != Some(&format!("sha256-{found}")) {
        let path = path.display();
        return Err(format!("{path} is damaged: its SHA-256 is {found}; fetch it again with ollama").into());
    }
    // What cannot be remembered is read again the next time.
    let _ = fs::create_dir_all(records).and_then(|()| fs::write(record, state));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(layers: &str) -> (tempfile::TempDir, Ollama) {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("manifests/registry.ollama.ai/library/llama3.2");
        fs::create_dir_all(&model).unwrap();
        fs::write(model.join("latest"), format!(r#"{{"schemaVersion":2,"layers":[{layers}]}}"#)).unwrap();
        let blobs = folder.path().join("blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(format!("sha256-{}", Digest::of(b"weights"))), b"weights").unwrap();
        let ollama = Ollama::new(folder.path().into());
        (folder, ollama)
    }

    fn layer(kind: &str, digest: &str, size: usize) -> String {
        format!(r#"{{"mediaType":"application/vnd.ollama.image.{kind}","digest":"{digest}","size":{size}}}"#)
    }

    #[test]
    fn models_of_ollama_are_found_and_listed() {
        let digest = format!("sha256:{}", Digest::of(b"weights"));
        let layers = [layer("template", "sha256:none", 9), layer("model", &digest, 7)].join(",");
        let (folder, ollama) = store(&layers);
        let name: OllamaName = "llama3.2".parse().unwrap();
        let blob = folder.path().join(format!("blobs/sha256-{}", Digest::of(b"weights")));
        assert_eq!(ollama.locate(&name).unwrap(), [blob]);
        assert_eq!(ollama.list(), [name]);
        let error = ollama.locate(&"llama3.2:1b".parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains("has no ollama/llama3.2:1b") && error.contains("OLLAMA_MODELS"), "{error}");
        assert_eq!(Ollama::new(folder.path().join("none")).list(), []);
    }

    #[test]
    fn weights_are_verified_once() {
        let digest = format!("sha256:{}", Digest::of(b"weights"));
        let (folder, ollama) = store(&layer("model", &digest, 7));
        let files = ollama.locate(&"llama3.2".parse().unwrap()).unwrap();
        let records = folder.path().join("records");
        ollama.verify(&files, &records).unwrap();
        let record = records.join(files[0].file_name().unwrap());
        assert!(record.exists());
        // What was changed is read again, and a record of another state counts for nothing.
        let verified = File::open(&files[0]).unwrap().metadata().unwrap().modified().unwrap();
        fs::write(&files[0], "Weights").unwrap();
        let error = ollama.verify(&files, &records).unwrap_err().to_string();
        assert!(error.contains("is damaged") && error.contains("fetch it again"), "{error}");
        // It is not read while it is as it was.
        File::options().write(true).open(&files[0]).unwrap().set_modified(verified).unwrap();
        ollama.verify(&files, &records).unwrap();
        fs::remove_dir_all(&records).unwrap();
        ollama.verify(&files, &records).unwrap_err();
        assert!(!record.exists());
    }

    #[test]
    fn what_cannot_be_computed_rightly_is_refused() {
        let digest = format!("sha256:{}", Digest::of(b"weights"));
        let missing = format!("sha256:{}", Digest::of(b"missing"));
        let good = layer("model", &digest, 7);
        for (layers, want) in [
            (String::new(), "names no model"),
            (format!("{good},{}", layer("adapter", &digest, 7)), "an adapter"),
            (layer("model", &digest, 8), "has 7 bytes, and its manifest states 8"),
            (layer("model", &missing, 7), "No such file"),
            (layer("model", "sha256:../../../etc/passwd", 7), "has the digest `sha256:../"),
            ("{".into(), "its manifest"),
        ] {
            let (_folder, ollama) = store(&layers);
            let error = ollama.locate(&"llama3.2".parse().unwrap()).unwrap_err().to_string();
            assert!(error.contains(want), "{layers}: {error}");
        }
    }
}
