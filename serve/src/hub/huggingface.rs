//! Hugging Face's hub: which files of a repository are the model that is wanted.
//!
//! The hub lists a repository's files with the SHA-256 of each that Git LFS keeps. What is
//! downloaded must have the digest that was listed, and is of the commit that was listed.

use std::collections::BTreeMap;

use flashinfer_rs::artifacts::{Address, Digest, StoreConfig, read_page};
use serde::Deserialize;
use url::Url;

use super::{
    manifests::{Manifest, ModelFile},
    name::Repository,
};
use crate::{Error, Result};

/// No listing of a repository is larger.
const MAX_LISTING: u64 = 32 << 20;
/// What is taken of a repository of several models where nothing else is asked for.
const USUAL: &str = "Q4_K_M";

/// The hub, as one user sees it.
#[derive(Clone)]
pub struct HuggingFace {
    /// The hub's address.
    pub endpoint: String,
    /// The user's token.
    pub token: Option<String>,
}

/// What the hub says of a repository.
#[derive(Debug, Deserialize)]
struct Listing {
    sha: String,
    #[serde(default)]
    gated: serde_json::Value,
    siblings: Vec<Listed>,
}

/// A file of a repository.
#[derive(Clone, Debug, Deserialize)]
struct Listed {
    #[serde(rename = "rfilename")]
    path: String,
    lfs: Option<Lfs>,
}

#[derive(Clone, Debug, Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

impl HuggingFace {
    /// The hub that the environment names: `HF_ENDPOINT` and `HF_TOKEN`.
    pub fn from_env() -> Self {
        let set = |name| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        Self {
            endpoint: set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into()),
            token: set("HF_TOKEN").map(|token| token.trim().into()),
        }
    }

    /// Asks which files the model has now.
    pub fn resolve(&self, repository: &Repository, config: &StoreConfig) -> Result<Manifest> {
        let Repository { organization, name, revision, .. } = repository;
        let revision = revision.iter().flat_map(|revision| ["revision", revision.as_str()]);
        let mut url = self.url(["api", "models", organization, name].into_iter().chain(revision))?;
        url.set_query(Some("blobs=true"));
        let page = read_page(&self.address(url)?, MAX_LISTING, config)?;
        if page.status != 200 {
            return Err(self.refused(repository, page.status));
        }
        let listing: Listing = serde_json::from_slice(&page.body)
            .map_err(|error| format!("what {} says of {repository} cannot be read: {error}", self.shown()))?;
        let hexadecimal = listing.sha.bytes().all(|c| c.is_ascii_hexdigit());
        if !hexadecimal || listing.sha.len() != 40 {
            return Err(format!("{} names no commit of {repository}", self.shown()).into());
        }
        let chosen = choose(&listing.siblings, repository)?;
        let file = |listed: &Listed| -> Result<ModelFile> {
            let digest = listed.lfs.as_ref().and_then(|lfs| Some((Digest::from_hex(&lfs.sha256)?, lfs.size)));
            let (sha256, size) = digest.ok_or_else(|| {
                format!("the hub lists no SHA-256 of {} in {repository}, so it is not used", listed.path)
            })?;
            Ok(ModelFile { path: listed.path.clone(), sha256, size: Some(size) })
        };
        Ok(Manifest {
            name: repository.to_string(),
            commit: Some(listing.sha),
            gated: !matches!(listing.gated, serde_json::Value::Bool(false) | serde_json::Value::Null),
            files: chosen.into_iter().map(file).collect::<Result<_>>()?,
        })
    }

    /// Where a file of a commit is.
    pub fn file(&self, repository: &Repository, commit: &str, path: &str) -> Result<Address> {
        let Repository { organization, name, .. } = repository;
        let folders = [organization, name, "resolve", commit];
        self.address(self.url(folders.into_iter().chain(path.split('/')))?)
    }

    /// What to do where a file of a repository is refused whose terms must be accepted.
    pub fn gate(&self, repository: &Repository) -> String {
        let Repository { organization, name, .. } = repository;
        let page =
            self.url([organization.as_str(), name]).map_or_else(|_| String::new(), |url| url.to_string());
        format!(
            "its owner wants terms to be accepted: do so at {page}, and set HF_TOKEN to a token of the account"
        )
    }

    fn url<'a>(&self, path: impl IntoIterator<Item = &'a str>) -> Result<Url> {
        let bad = |reason: &str| {
            format!("HF_ENDPOINT is no address of a hub: {reason}; expected one as https://host")
        };
        let mut url = Url::parse(&self.endpoint).map_err(|error| bad(&error.to_string()))?;
        url.path_segments_mut().map_err(|()| bad("it has no path"))?.pop_if_empty().extend(path);
        Ok(url)
    }

    fn address(&self, url: Url) -> Result<Address> {
        let address: Address = url.as_str().parse()?;
        match &self.token {
            None => Ok(address),
            Some(token) => address
                .with_bearer_token(token)
                .ok_or_else(|| "HF_TOKEN has characters that no token has".into()),
        }
    }

    fn shown(&self) -> String {
        self.endpoint.parse().map_or_else(|_| "HF_ENDPOINT".into(), |address: Address| address.to_string())
    }

    /// Why the hub lists no repository.
    fn refused(&self, repository: &Repository, status: u16) -> Error {
        let hub = self.shown();
        let remedy = match (status, &self.token) {
            (401 | 404, None) => {
                "there is none of this name, or no such revision, or it is private: check the name, or set \
                 HF_TOKEN to a token that may read it"
            }
            (401, Some(_)) => "it does not accept HF_TOKEN, or there is no such repository: check both",
            (404, Some(_)) => "there is none of this name and revision that HF_TOKEN may read: check both",
            (403, _) => "HF_TOKEN may not read it: use the token of an account that may",
            (429, _) => "too many questions were asked: wait, or set HF_TOKEN",
            _ => "try again later",
        };
        format!("{hub} does not list {repository} (HTTP status {status}): {remedy}").into()
    }
}

/// A model of a repository: one file, or the parts of a split one.
#[derive(Debug, Default)]
struct Candidate<'a> {
    parts: BTreeMap<usize, &'a Listed>,
    /// How many parts there should be.
    count: usize,
}

/// The name of a GGUF file without its end, and which part of how many it is.
fn split(path: &str) -> Option<(&str, usize, usize)> {
    let stem = path.strip_suffix(".gguf")?;
    let number = |digits: &str| (digits.len() == 5).then(|| digits.parse().ok()).flatten();
    let parts = stem.rsplit_once("-of-").and_then(|(rest, count)| {
        let (stem, part) = rest.rsplit_once('-')?;
        Some((stem, number(part)?, number(count)?))
    });
    Some(parts.unwrap_or((stem, 1, 1)))
}

/// Whether a model's name says that it has this quantization.
fn is_of(stem: &str, quantization: &str) -> bool {
    let (folders, name) = stem.rsplit_once('/').unwrap_or(("", stem));
    let at_end = name.len().checked_sub(quantization.len()).and_then(|at| name.split_at_checked(at));
    let named = at_end.is_some_and(|(before, end)| {
        end.eq_ignore_ascii_case(quantization) && (before.is_empty() || before.ends_with(['-', '.', '_']))
    });
    named || folders.split('/').any(|folder| folder.eq_ignore_ascii_case(quantization))
}

/// The files that a name asks for.
fn choose<'a>(files: &'a [Listed], repository: &Repository) -> Result<Vec<&'a Listed>> {
    let mut models: BTreeMap<(&str, usize), Candidate<'a>> = BTreeMap::new();
    for file in files {
        let Some((stem, part, count)) = split(&file.path) else { continue };
        let name = stem.rsplit('/').next().unwrap_or_default().to_ascii_lowercase();
        // Encoders of pictures, and what quantization was tuned by, are no language models.
        if name.contains("mmproj") || name.contains("imatrix") {
            continue;
        }
        let model = models.entry((stem, count)).or_default();
        model.count = count;
        model.parts.insert(part, file);
    }
    let wanted = |selector: &str| -> Vec<_> {
        let same_file = |model: &Candidate<'_>| model.parts.values().any(|file| file.path == selector);
        let by_file: Vec<_> = models.iter().filter(|(_, model)| same_file(model)).collect();
        match by_file.is_empty() {
            false => by_file,
            true => models.iter().filter(|((stem, _), _)| is_of(stem, selector)).collect(),
        }
    };
    let found = match &repository.selector {
        Some(selector) => wanted(selector),
        None if models.len() == 1 => models.iter().collect(),
        None => wanted(USUAL),
    };
    let [(_, model)] = found[..] else {
        let names = |models: &mut dyn Iterator<Item = &Candidate<'_>>| -> String {
            let names = models.filter_map(|model| model.parts.values().next().map(|file| file.path.as_str()));
            names.collect::<Vec<_>>().join(", ")
        };
        let reason = match (models.is_empty(), found.is_empty()) {
            (true, _) => "it has no GGUF files; expected a repository that has".to_owned(),
            (_, true) => format!("it has {}; name one behind a colon", names(&mut models.values())),
            _ => {
                let several = names(&mut found.iter().map(|(_, model)| *model));
                format!("several of its files fit: {several}; name one behind a colon")
            }
        };
        return Err(format!("which file of {repository}? {reason}").into());
    };
    let complete = model.parts.len() == model.count && model.parts.keys().copied().eq(1..=model.count);
    match complete {
        true => Ok(model.parts.values().copied().collect()),
        false => {
            let (there, count) = (model.parts.len(), model.count);
            Err(format!("{repository} has {there} of the {count} parts of the model, and cannot be used")
                .into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(files: &[&str], name: &str) -> std::result::Result<Vec<String>, String> {
        let files: Vec<_> = files.iter().map(|path| Listed { path: path.to_string(), lfs: None }).collect();
        let chosen = choose(&files, &name.parse().unwrap()).map_err(|error| error.to_string())?;
        Ok(chosen.into_iter().map(|file| file.path.clone()).collect())
    }

    #[test]
    fn files_are_chosen_by_name_and_quantization() {
        let files = [
            "README.md",
            "model-Q4_K_M.gguf",
            "model-Q8_0.gguf",
            "model.q6_k.gguf",
            "mmproj-model-f16.gguf",
            "BF16/model-BF16-00002-of-00002.gguf",
            "BF16/model-BF16-00001-of-00002.gguf",
            "IQ4/a.gguf",
            "x-Q5-00001-of-00003.gguf",
        ];
        for (name, want) in [
            ("o/r", &["model-Q4_K_M.gguf"][..]),
            ("o/r:Q8_0", &["model-Q8_0.gguf"]),
            ("o/r:q8_0", &["model-Q8_0.gguf"]),
            ("o/r:model-Q8_0.gguf", &["model-Q8_0.gguf"]),
            ("o/r:Q6_K", &["model.q6_k.gguf"]),
            ("o/r:iq4", &["IQ4/a.gguf"]),
            ("o/r:bf16", &["BF16/model-BF16-00001-of-00002.gguf", "BF16/model-BF16-00002-of-00002.gguf"]),
            (
                "o/r:BF16/model-BF16-00002-of-00002.gguf",
                &["BF16/model-BF16-00001-of-00002.gguf", "BF16/model-BF16-00002-of-00002.gguf"],
            ),
        ] {
            assert_eq!(chosen(&files, name).unwrap(), want, "{name}");
        }
        for (name, want) in [
            ("o/r:Q4", "it has BF16/model-BF16-00001-of-00002.gguf, IQ4/a.gguf, model-Q4_K_M.gguf"),
            ("o/r:é", "name one behind a colon"),
            ("o/r:Q5", "1 of the 3 parts"),
            ("o/r:mmproj-model-f16.gguf", "it has"),
        ] {
            let error = chosen(&files, name).unwrap_err();
            assert!(error.contains(want), "{name}: {error}");
        }
        assert_eq!(chosen(&["x.gguf", "README.md"], "o/r").unwrap(), ["x.gguf"]);
        assert!(chosen(&["model.safetensors"], "o/r").unwrap_err().contains("no GGUF files"));
        let error = chosen(&["a-Q8_0.gguf", "b-Q8_0.gguf"], "o/r:Q8_0").unwrap_err();
        assert!(error.contains("several of its files fit: a-Q8_0.gguf, b-Q8_0.gguf"), "{error}");
    }
}
