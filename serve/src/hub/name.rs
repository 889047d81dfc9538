//! The names of models, as a person writes them.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use flashinfer_rs::artifacts::{Address, Digest};

use crate::{Error, Result};

/// What a name may be, for messages.
const EXPECTED: &str = "smollm2, hf.co/ORG/REPO[@REVISION][:FILE or QUANTIZATION], ollama/NAME[:TAG], \
                        https://HOST/FILE#sha256=DIGEST, or the path of a GGUF file";
/// What addresses of files of Hugging Face begin with, other than the prefix of names.
const HUGGING_FACE: [&str; 2] = ["https://huggingface.co/", "https://hf.co/"];

/// The name of a model. As text, it is the same for all ways to write it.
#[derive(Clone, Debug)]
pub enum ModelName {
    /// `smollm2`: SmolLM2-135M-Instruct, which this package pins.
    Smollm2,
    /// `hf.co/org/repo[@revision][:file or quantization]`: a repository of Hugging Face's hub.
    HuggingFace(Repository),
    /// `ollama/name[:tag]`: a model in the store of an ollama on this machine.
    Ollama(OllamaName),
    /// `https://host/file#sha256=digest`: any file of a server.
    Url(FileUrl),
    /// A file of this machine.
    Path(PathBuf),
}

/// A repository of Hugging Face's hub, and what is wanted of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repository {
    /// The user or organization.
    pub organization: String,
    /// The repository of theirs.
    pub name: String,
    /// A branch, a tag or a commit of it; `None` for its main branch.
    pub revision: Option<String>,
    /// A file's path in it, or the name of a quantization; `None` for the usual one.
    pub selector: Option<String>,
}

/// A model of ollama's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OllamaName {
    /// The folders below `manifests`: the registry, the namespace, and the model.
    pub folders: [String; 3],
    /// The tag.
    pub tag: String,
}

/// A file of a server.
#[derive(Clone, Debug)]
pub struct FileUrl {
    /// Where it is.
    pub address: Address,
    /// What it must be.
    pub sha256: Digest,
}

impl FromStr for ModelName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "smollm2" {
            return Ok(Self::Smollm2);
        }
        if let Some(page) = HUGGING_FACE.iter().find_map(|prefix| text.strip_prefix(prefix))
            && !text.contains('#')
        {
            let mut parts = page.split('/').take(2);
            let [organization, name] = [parts.next(), parts.next()].map(Option::unwrap_or_default);
            let hint = format!("write hf.co/{organization}/{name}, and behind a colon which file of it");
            return Err(format!("`{text}` has no digest; {hint}").into());
        }
        if let Some(repository) =
            ["hf.co/", "huggingface.co/"].iter().find_map(|host| text.strip_prefix(host))
        {
            return repository.parse().map(Self::HuggingFace).map_err(|error| bad(text, error));
        }
        if let Some(name) = text.strip_prefix("ollama/") {
            return name.parse().map(Self::Ollama).map_err(|error| bad(text, error));
        }
        if text.contains("://") {
            return text.parse().map(Self::Url);
        }
        let path = Path::new(text);
        if path.exists() || path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf")) {
            return Ok(Self::Path(path.into()));
        }
        Err(format!("no model is called `{text}`: expected {EXPECTED}").into())
    }
}

fn bad(text: &str, error: Error) -> Error {
    format!("`{text}` is no name of a model: {error}").into()
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Smollm2 => f.write_str("smollm2"),
            Self::HuggingFace(repository) => repository.fmt(f),
            Self::Ollama(name) => name.fmt(f),
            Self::Url(url) => url.fmt(f),
            Self::Path(path) => path.display().fmt(f),
        }
    }
}

/// Refuses a part of a name that could be more than a part: of a path, or of an address.
fn check_part<'a>(what: &str, part: &'a str) -> Result<&'a str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && part.chars().all(plain)
        && part.len() < 100
    {
        return Ok(part);
    }
    let expected = "expected letters, digits, `.`, `_` and `-`, a letter or digit first, and fewer than 100";
    Err(format!("{what} is `{part}`; {expected}").into())
}

impl FromStr for Repository {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (repository, selector) = match text.split_once(':') {
            Some((repository, selector)) => (repository, Some(selector)),
            None => (text, None),
        };
        let (repository, revision) = match repository.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision)),
            None => (repository, None),
        };
        let Some((organization, name)) = repository.split_once('/').filter(|(_, name)| !name.contains('/'))
        else {
            return Err(
                "expected hf.co/ORG/REPO, behind an @ a revision, and behind a colon a file or a quantization"
                    .into());
        };
        if selector.is_some_and(|selector| selector.is_empty() || selector.contains(char::is_control)) {
            return Err("what follows its colon is no file and no quantization".into());
        }
        // `refs/pr/1` is one, too.
        for part in revision.iter().flat_map(|revision| revision.split('/')) {
            check_part("the revision", part)?;
        }
        Ok(Self {
            organization: check_part("the organization", organization)?.into(),
            name: check_part("the repository", name)?.into(),
            revision: revision.map(String::from),
            selector: selector.map(String::from),
        })
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf.co/{}/{}", self.organization, self.name)?;
        self.revision.iter().try_for_each(|revision| write!(f, "@{revision}"))?;
        self.selector.iter().try_for_each(|selector| write!(f, ":{selector}"))
    }
}

impl OllamaName {
    /// The registry and the namespace of a name that has none.
    const DEFAULT: [&str; 2] = ["registry.ollama.ai", "library"];
}

impl FromStr for OllamaName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, tag) = text.split_once(':').unwrap_or((text, "latest"));
        let [registry, namespace] = Self::DEFAULT;
        let parts: Vec<_> = name.split('/').collect();
        let folders = match parts[..] {
            [name] => [registry, namespace, name],
            [namespace, name] => [registry, namespace, name],
            [registry, namespace, name] => [registry, namespace, name],
            _ => return Err("expected ollama/[[REGISTRY/]NAMESPACE/]NAME[:TAG]".into()),
        };
        for (what, part) in ["the registry", "the namespace", "the model"].into_iter().zip(folders) {
            check_part(what, part)?;
        }
        Ok(Self { folders: folders.map(String::from), tag: check_part("the tag", tag)?.into() })
    }
}

impl fmt::Display for OllamaName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [registry, namespace] = Self::DEFAULT;
        let left_out = match &self.folders {
            [first, second, _] if first == registry && second == namespace => 2,
            [first, ..] if first == registry => 1,
            _ => 0,
        };
        write!(f, "ollama/{}:{}", self.folders[left_out..].join("/"), self.tag)
    }
}

impl FromStr for FileUrl {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        // Not repeated in errors: it may hold a secret.
        let (address, fragment) = text.split_once('#').unwrap_or((text, ""));
        let address: Address = address.parse()?;
        let digest = fragment.strip_prefix("sha256=").and_then(Digest::from_hex);
        let sha256 = digest.ok_or_else(|| {
            format!(
                "the URL {address} has no digest: expected #sha256= behind it, with 64 hexadecimal digits"
            )
        })?;
        Ok(Self { address, sha256 })
    }
}

impl fmt::Display for FileUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#sha256={}", self.address, self.sha256)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_have_one_text() {
        let digest = format!("https://h.example/a/b.gguf#sha256={DIGEST}");
        let secret =
            format!("https://me:secret@h.example/a/b.gguf?t=secret#sha256={}", DIGEST.to_uppercase());
        for (text, want) in [
            ("smollm2", "smollm2"),
            ("hf.co/org/re-po.v1", "hf.co/org/re-po.v1"),
            ("huggingface.co/org/repo:Q4_K_M", "hf.co/org/repo:Q4_K_M"),
            ("hf.co/org/repo:folder/x:y.gguf", "hf.co/org/repo:folder/x:y.gguf"),
            ("hf.co/org/repo@v1.0", "hf.co/org/repo@v1.0"),
            ("hf.co/org/repo@refs/pr/1:x@y.gguf", "hf.co/org/repo@refs/pr/1:x@y.gguf"),
            ("ollama/llama3.2", "ollama/llama3.2:latest"),
            ("ollama/registry.ollama.ai/library/llama3.2:1b", "ollama/llama3.2:1b"),
            ("ollama/me/model", "ollama/me/model:latest"),
            ("ollama/hf.co/me/model:Q4", "ollama/hf.co/me/model:Q4"),
            (&digest, &digest),
            (&secret, &digest),
            ("some/folder/x.GGUF", "some/folder/x.GGUF"),
            (env!("CARGO_MANIFEST_DIR"), env!("CARGO_MANIFEST_DIR")),
        ] {
            assert_eq!(text.parse::<ModelName>().unwrap().to_string(), want);
        }
    }

    #[test]
    fn names_that_could_leave_their_place_are_refused() {
        for (text, want) in [
            ("", "no model is called"),
            ("smollm3", "no model is called"),
            ("../x", "no model is called"),
            ("hf.co/repo", "hf.co/ORG/REPO"),
            ("hf.co/org/repo/file.gguf", "hf.co/ORG/REPO"),
            ("hf.co/org/repo@", "the revision is ``"),
            ("hf.co/org/repo@../main", "the revision is `..`"),
            ("hf.co/org/repo@a b", "the revision is `a b`"),
            ("hf.co/../repo", "the organization is `..`"),
            ("hf.co/org/..", "the repository is `..`"),
            ("hf.co/org/.git", "the repository is `.git`"),
            ("hf.co//repo", "the organization is ``"),
            ("hf.co/org/a?b", "the repository is `a?b`"),
            ("hf.co/org/repo:", "no file and no quantization"),
            ("hf.co/org/repo:a\nb", "no file and no quantization"),
            ("https://huggingface.co/org/repo/resolve/main/x.gguf", "hf.co/org/repo,"),
            ("ollama/..", "the model is `..`"),
            ("ollama//etc/passwd", "the registry is ``"),
            ("ollama/a/b/c/d", "ollama/[["),
            ("ollama/a:../b", "the tag is `../b`"),
            ("ollama/a:", "the tag is ``"),
            ("https://h.example/x.gguf", "has no digest"),
            ("https://h.example/x.gguf#sha256=12", "has no digest"),
            ("ftp://h.example/x.gguf", "https://"),
        ] {
            let error = text.parse::<ModelName>().unwrap_err().to_string();
            assert!(error.contains(want), "{text:?}: {error}");
        }
        let long = format!("hf.co/org/{}", "a".repeat(100));
        assert!(long.parse::<ModelName>().unwrap_err().to_string().contains("fewer than 100"));
        let error = "https://me:secret@h.example/x?secret".parse::<ModelName>().unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
    }
}
