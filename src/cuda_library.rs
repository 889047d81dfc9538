//! NVIDIA's libraries that modules link against, and where they are found.
//!
//! A library is looked for in the process, on the dynamic loader's path, in
//! CUDA installations, in Python environments, and last in the sources of the
//! store. It is opened globally, and found again by its name when a module that
//! links against it is opened.

use std::{
    ffi::{OsStr, OsString},
    fmt,
    mem::ManuallyDrop,
    path::{Path, PathBuf},
};

use crate::{
    artifacts::{ArtifactError, Fetch, Member, SearchedSource, Source, Store},
    error::{FlashInferError, Result},
    library_file::{loader_reason, open_library},
    loader::{self, Library},
};

/// How a library of the runtime came into the process.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum LibrarySource {
    /// It was there already.
    Process,
    /// The dynamic loader found it by name.
    Loader,
    /// A file of a CUDA installation or a Python environment, or one that
    /// [`Module::open`](crate::Module::open) was given.
    File(PathBuf),
    /// A source of the store.
    Store(Source),
}

impl fmt::Display for LibrarySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process => f.write_str("already in the process"),
            Self::Loader => f.write_str("the dynamic loader's path"),
            Self::File(path) => path.display().fmt(f),
            Self::Store(source) => source.fmt(f),
        }
    }
}

/// A library of NVIDIA's, for calls of one's own. It stays open for the life of the process.
#[derive(Debug)]
pub struct CudaLibrary {
    library: ManuallyDrop<Library>,
    name: String,
    source: LibrarySource,
}

impl CudaLibrary {
    /// Opens it from the first place that has it: the process, the dynamic loader's path, CUDA
    /// installations, Python environments, and the sources of a store, which may fetch it.
    ///
    /// # Errors
    /// [`FlashInferError::Artifact`]: it is nowhere; the error lists
    /// the places. [`FlashInferError::Library`]: it does not open.
    pub fn open(member: &Member, store: &Store) -> Result<Self> {
        let (library, source) = load(member, store, Fetch::Allowed)?;
        Ok(Self { library: ManuallyDrop::new(library), name: member.file_name(), source })
    }

    /// Where it came from.
    pub fn source(&self) -> &LibrarySource {
        &self.source
    }

    /// A function of it.
    ///
    /// # Safety
    /// `F` is the type of a pointer to that function.
    ///
    /// # Errors
    /// [`FlashInferError::MissingSymbol`].
    pub unsafe fn function<F: Copy>(&self, symbol: &str) -> Result<F> {
        // SAFETY: as the caller says; the library is never closed.
        match unsafe { self.library.get::<F>(symbol) } {
            Ok(function) => Ok(*function),
            Err(_) => {
                Err(FlashInferError::MissingSymbol { library: self.name.clone(), symbol: symbol.into() })
            }
        }
    }
}

/// Reads an environment variable.
type ReadEnv<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// A kind of place that libraries are installed in.
struct Place {
    name: &'static str,
    remedy: &'static str,
    /// The folders, in order of preference.
    folders: Vec<PathBuf>,
}

/// Opens a library from the first place that has it.
///
/// # Errors
/// It is nowhere; the error lists the places. Or the store's copy is damaged.
pub(crate) fn load(member: &Member, store: &Store, fetch: Fetch) -> Result<(Library, LibrarySource)> {
    let suffix = member.suffix();
    let in_packages = Path::new(&suffix).parent().unwrap_or(Path::new(""));
    let places = places(&|name| std::env::var_os(name), in_packages);
    let mut searched = match load_installed(&member.file_name(), &places) {
        Ok(found) => return Ok(found),
        Err(searched) => searched,
    };
    let located = store.locate(member, fetch).map_err(|error| match error {
        ArtifactError::NotFound { member, searched: sources } => {
            searched.extend(sources);
            ArtifactError::NotFound { member, searched }
        }
        error => error,
    })?;
    let library = open_library(&located.path, loader::RTLD_NOW | loader::RTLD_GLOBAL)?;
    Ok((library, LibrarySource::Store(located.source)))
}

/// Opens a library that is installed on the machine, or tells where it is not.
fn load_installed(file: &str, places: &[Place]) -> Result<(Library, LibrarySource), Vec<SearchedSource>> {
    let open = |path: &OsStr, extra: i32| {
        // SAFETY: NVIDIA's library; its initializers only set up its state.
        unsafe { Library::open(Some(path), loader::RTLD_NOW | loader::RTLD_GLOBAL | extra) }
    };
    if let Ok(library) = open(file.as_ref(), loader::RTLD_NOLOAD) {
        return Ok((library, LibrarySource::Process));
    }
    let mut searched = Vec::new();
    match open(file.as_ref(), 0) {
        Ok(library) => return Ok((library, LibrarySource::Loader)),
        Err(error) => searched.push(SearchedSource {
            source: "the dynamic loader's path".into(),
            outcome: loader_reason(&error),
            remedy: "put the library's folder on LD_LIBRARY_PATH".into(),
        }),
    }
    for place in places {
        for path in place.folders.iter().map(|folder| folder.join(file)).filter(|path| path.is_file()) {
            match open(path.as_os_str(), 0) {
                Ok(library) => return Ok((library, LibrarySource::File(path))),
                Err(error) => searched.push(SearchedSource {
                    source: path.display().to_string(),
                    outcome: loader_reason(&error),
                    remedy: String::new(),
                }),
            }
        }
        let folders: Vec<_> = place.folders.iter().map(|folder| folder.display().to_string()).collect();
        let folders = if folders.is_empty() { "any folder".to_owned() } else { folders.join(", ") };
        searched.push(SearchedSource {
            source: place.name.into(),
            outcome: format!("no usable {file} in {folders}"),
            remedy: place.remedy.into(),
        });
    }
    Err(searched)
}

/// Where libraries are installed, in order of preference; `in_packages` is the folder among Python's
/// packages.
fn places(env: ReadEnv<'_>, in_packages: &Path) -> [Place; 2] {
    [
        Place {
            name: "CUDA installations",
            remedy: "install CUDA 13, or set CUDA_HOME to where it is",
            folders: toolkit_folders(env),
        },
        Place {
            name: "Python environments",
            remedy: "activate the one that has NVIDIA's package, or set VIRTUAL_ENV to its folder",
            folders: python_folders(env, in_packages),
        },
    ]
}

fn toolkit_folders(env: ReadEnv<'_>) -> Vec<PathBuf> {
    let target = if cfg!(target_arch = "aarch64") { "sbsa-linux" } else { "x86_64-linux" };
    let targets = format!("targets/{target}/lib");
    ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"]
        .into_iter()
        .filter_map(env)
        .chain(["/usr/local/cuda".into()])
        .filter(|root| !root.is_empty())
        .flat_map(|root| ["lib64", "lib", &targets].map(|folder| Path::new(&root).join(folder)))
        .collect()
}

/// Where pip puts NVIDIA's libraries, of those environments that have any:
/// `<environment>/lib/python3.*/site-packages/nvidia/cu13/lib` for those of CUDA 13. The
/// environments are the active one, those whose programs are on the path, and
/// the user's own.
fn python_folders(env: ReadEnv<'_>, in_packages: &Path) -> Vec<PathBuf> {
    let active = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(env).map(PathBuf::from);
    let path = env("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path)
        .filter(|folder| folder.ends_with("bin"))
        .filter_map(|folder| folder.parent().map(Path::to_owned));
    let own = env("HOME").map(|home| Path::new(&home).join(".local"));
    let mut folders = Vec::new();
    for root in active.chain(on_path).chain(own) {
        let Ok(entries) = std::fs::read_dir(root.join("lib")) else { continue };
        let mut pythons: Vec<_> = entries
            .flatten()
            .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"python3"))
            .map(|entry| entry.path())
            .collect();
        pythons.sort();
        for packages in ["site-packages", "dist-packages"] {
            let libraries = pythons.iter().map(|python| python.join(packages).join(in_packages));
            folders.extend(libraries.filter(|folder| folder.is_dir()));
        }
    }
    // A folder may be on the path twice.
    let mut seen = std::collections::HashSet::new();
    folders.retain(|folder| seen.insert(folder.clone()));
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_in_order() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let packages = |environment: &str, python: &str, packages: &str| {
            let folder =
                root.join(environment).join("lib").join(python).join(packages).join("nvidia/cu13/lib");
            std::fs::create_dir_all(&folder).unwrap();
            folder
        };
        let expected = [
            packages("venv", "python3.12", "site-packages"),
            packages("conda", "python3.11", "site-packages"),
            packages("usr", "python3.11", "dist-packages"),
            packages("usr", "python3.13", "dist-packages"),
            packages("home/.local", "python3.12", "site-packages"),
        ];
        // Neither another language's folder nor an environment without NVIDIA's libraries.
        packages("venv", "perl5", "site-packages");
        std::fs::create_dir_all(root.join("empty/lib/python3.12/site-packages")).unwrap();
        let env = |name: &str| {
            let path = ["venv/bin", "empty/bin", "usr/bin", "usr/bin", "no/such/bin", "usr/sbin"];
            let path = path.map(|folder| root.join(folder));
            let folder = match name {
                "VIRTUAL_ENV" => "venv",
                "CONDA_PREFIX" => "conda",
                "HOME" => "home",
                "CUDA_PATH" => "toolkit",
                "CUDA_ROOT" => return Some(OsString::new()),
                "PATH" => return std::env::join_paths(path).ok(),
                _ => return None,
            };
            Some(root.join(folder).into_os_string())
        };
        let [toolkits, environments] = places(&env, Path::new("nvidia/cu13/lib"));
        assert_eq!(environments.folders, expected);
        assert_eq!(toolkits.folders.len(), 6);
        assert_eq!(toolkits.folders[0], root.join("toolkit/lib64"));
        assert_eq!(toolkits.folders[3], Path::new("/usr/local/cuda/lib64"));
    }

    /// The C library is in every process, and stands for any other.
    #[test]
    fn the_process_comes_first() {
        let (_, source) = load_installed("libc.so.6", &[]).unwrap();
        assert!(matches!(source, LibrarySource::Process), "{source}");
    }

    #[test]
    fn a_library_that_is_nowhere_names_every_place() {
        let file = "libno-such-library.so.13";
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(file), "no library").unwrap();
        let places = [
            Place { name: "here", remedy: "look again", folders: vec![folder.path().into()] },
            Place { name: "there", remedy: "go there", folders: Vec::new() },
        ];
        let searched: Vec<_> =
            load_installed(file, &places).unwrap_err().iter().map(ToString::to_string).collect();
        let [loader, broken, here, there] = &searched[..] else { panic!("{searched:?}") };
        assert!(loader.contains("loader's path") && loader.contains("LD_LIBRARY_PATH"), "{loader}");
        assert!(broken.starts_with(folder.path().to_str().unwrap()), "{broken}");
        assert!(broken.contains("file too short") || broken.contains("invalid ELF"), "{broken}");
        assert!(here.contains(folder.path().to_str().unwrap()) && here.contains("(look again)"), "{here}");
        assert!(there.contains("any folder") && there.contains("(go there)"), "{there}");
    }
}
