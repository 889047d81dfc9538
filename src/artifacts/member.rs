//! Which file of which package is wanted.

use super::{ArtifactError, CudaArchitecture};
use std::borrow::Cow;
use std::fmt;

/// A pinned package: one group of rows in a pin table.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Package {
    /// FlashInfer's compiled modules.
    JitCache,
    /// The TVM-FFI runtime that modules are called through.
    TvmFfi,
    /// NVIDIA's CUDA runtime library.
    CudaRuntime,
    /// NVIDIA's cuBLAS, which only some modules need.
    Cublas,
    /// One that a program pins itself, by its key in the table; see
    /// [`Pins::extend`](super::Pins::extend).
    Other(String),
}

impl Package {
    /// The packages that the crate pins.
    pub const PINNED: [Package; 4] =
        [Package::JitCache, Package::TvmFfi, Package::CudaRuntime, Package::Cublas];
    /// The packages that every kernel needs. The others are fetched only for who asks.
    pub const KERNELS: [Package; 3] = [Package::JitCache, Package::TvmFfi, Package::CudaRuntime];

    /// The package of the provider of kernels for an architecture, as in
    /// `flashinfer_jit_cache_sm90a`.
    pub fn provider(code: CudaArchitecture) -> Package {
        Package::Other(format!("{}_{code}", Package::JitCache.key()))
    }

    /// The package's key in the pin table.
    pub fn key(&self) -> &str {
        match self {
            Package::JitCache => "flashinfer_jit_cache",
            Package::TvmFfi => "apache_tvm_ffi",
            Package::CudaRuntime => "nvidia_cuda_runtime",
            Package::Cublas => "nvidia_cublas",
            Package::Other(key) => key,
        }
    }
}

impl fmt::Display for Package {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.key())
    }
}

/// A file that the crate, or a program that uses it, needs out of some wheel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Member {
    /// A kernel module, by its name.
    Module(String),
    /// `libtvm_ffi.so`.
    TvmFfi,
    /// `libtvm_ffi_testing.so`, which the crate's own tests call.
    TvmFfiTesting,
    /// `libcudart.so.13`.
    CudaRuntime,
    /// `libcublasLt.so.13`.
    CublasLt,
    /// `libcublas.so.13`.
    Cublas,
    /// Any other file.
    File {
        /// The package whose pinned wheel holds it.
        package: Package,
        /// The end of its path in the wheel, from the start of a path component on, as in
        /// `folder/file.gguf`.
        suffix: String,
    },
}

/// What separates the parts of a path where the path is a folder's name in the cache.
const SEPARATOR: char = ',';

impl Member {
    /// The libraries.
    pub(crate) const LIBRARIES: [Member; 5] =
        [Member::TvmFfi, Member::TvmFfiTesting, Member::CudaRuntime, Member::CublasLt, Member::Cublas];

    /// The module called `name`.
    pub fn module(name: impl Into<String>) -> Member {
        Member::Module(name.into())
    }

    /// The module's name, if it is one.
    pub(crate) fn module_name(&self) -> Option<&str> {
        match self {
            Member::Module(name) => Some(name),
            _ => None,
        }
    }

    /// The end of the member's path inside a wheel, matched on a path-component boundary.
    pub fn suffix(&self) -> String {
        match self {
            Member::Module(name) => format!("flashinfer_jit_cache/jit_cache/{name}/{name}.so"),
            Member::TvmFfi | Member::TvmFfiTesting => format!("tvm_ffi/lib/{}", self.file_name()),
            Member::CudaRuntime | Member::CublasLt | Member::Cublas => {
                format!("nvidia/cu13/lib/{}", self.file_name())
            }
            Member::File { suffix, .. } => suffix.clone(),
        }
    }

    /// The member's file name.
    pub fn file_name(&self) -> String {
        match self {
            Member::Module(name) => format!("{name}.so"),
            Member::TvmFfi => "libtvm_ffi.so".into(),
            Member::TvmFfiTesting => "libtvm_ffi_testing.so".into(),
            Member::CudaRuntime => "libcudart.so.13".into(),
            Member::CublasLt => "libcublasLt.so.13".into(),
            Member::Cublas => "libcublas.so.13".into(),
            Member::File { suffix, .. } => suffix.rsplit('/').next().unwrap_or_default().into(),
        }
    }

    /// The package whose pinned wheel holds the member.
    pub fn package(&self) -> Package {
        match self {
            Member::Module(_) => Package::JitCache,
            Member::TvmFfi | Member::TvmFfiTesting => Package::TvmFfi,
            Member::CudaRuntime => Package::CudaRuntime,
            Member::CublasLt | Member::Cublas => Package::Cublas,
            Member::File { package, .. } => package.clone(),
        }
    }

    /// The name of the folder that holds the member in the cache. Each member of a wheel has one
    /// of its own, or shares it with files of other names.
    pub(crate) fn folder(&self) -> Cow<'_, str> {
        match self {
            Member::Module(name) => name.into(),
            Member::TvmFfi | Member::TvmFfiTesting => "tvm_ffi".into(),
            Member::CudaRuntime => "cuda_runtime".into(),
            Member::CublasLt | Member::Cublas => "cublas".into(),
            Member::File { suffix, .. } => suffix.replace('/', &SEPARATOR.to_string()).into(),
        }
    }

    /// Whether some member is called `file` and lies in the folder `folder` of the cache.
    pub(crate) fn may_be_at(folder: &str, file: &str) -> bool {
        let library = |member: &Member| member.folder() == folder && member.file_name() == file;
        file.strip_suffix(".so") == Some(folder)
            || folder.rsplit(SEPARATOR).next() == Some(file)
            || Member::LIBRARIES.iter().any(library)
    }

    /// Refuses a name that could leave its folder in the cache.
    ///
    /// # Errors
    /// [`ArtifactError::BadName`] unless the module's name, or each component of the file's path,
    /// consists of ASCII letters, digits, `_`, `-`, `.`, `+`, and starts with none of the
    /// punctuation but `_`, and the whole fits a file name.
    pub(crate) fn check(&self) -> Result<(), ArtifactError> {
        let name = match self {
            Member::Module(name) => name,
            Member::File { suffix, .. } => suffix,
            _ => return Ok(()),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-.+".contains(c);
        let first = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let component = |name: &str| name.starts_with(first) && name.chars().all(plain);
        let good = match self {
            Member::File { .. } => name.split('/').all(component),
            _ => component(name),
        };
        match good && name.len() <= 250 {
            true => Ok(()),
            false => Err(ArtifactError::BadName { name: name.clone() }),
        }
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Member::Module(name) => write!(f, "module `{name}`"),
            Member::File { suffix, .. } => f.write_str(suffix),
            other => f.write_str(&other.file_name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(suffix: &str) -> Member {
        Member::File { package: Package::Other("model".into()), suffix: suffix.into() }
    }

    #[test]
    fn files_of_one_name_have_folders_of_their_own() {
        let (a, b) = (file("a/b/config.json"), file("a.b/config.json"));
        assert_eq!((a.file_name(), b.file_name()), ("config.json".into(), "config.json".into()));
        assert_ne!(a.folder(), b.folder());
        for member in [a, b, file("config.json"), Member::module("norm"), Member::TvmFfi, Member::Cublas] {
            assert!(Member::may_be_at(&member.folder(), &member.file_name()), "{member}");
            assert!(!Member::may_be_at(&member.folder(), "other.json"), "{member}");
        }
        assert!(!Member::may_be_at("aconfig.json", "config.json"));
    }

    #[test]
    fn paths_that_could_leave_the_cache_are_refused() {
        for suffix in
            ["", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", "a\\b", "a,b/c", "a\nb", "é", "x/.lock", "-a"]
        {
            let e = file(suffix).check().unwrap_err();
            assert!(matches!(e, ArtifactError::BadName { .. }), "{suffix}: {e}");
        }
        assert!(file(&format!("{}/b", "a".repeat(249))).check().is_err());
        for suffix in ["a", "a/b.gguf", "a-1.0+cu13.data/purelib/x_y.so.13"] {
            file(suffix).check().unwrap();
        }
    }
}
