//! Whether this machine can run kernels, or builds for those that can.

use super::Env;
use std::path::{Path, PathBuf};

/// Files and folders of NVIDIA's driver, and of CUDA where it is usually installed.
const SIGNS: [&str; 6] = [
    "dev/nvidiactl",
    "dev/nvhost-ctrl-gpu",
    "proc/driver/nvidia",
    "usr/lib/wsl/lib/libcuda.so.1",
    "run/opengl-driver/lib/libcuda.so.1",
    "usr/local/cuda",
];

/// Where the loader finds the driver's library.
const LIBRARIES: [&str; 7] = [
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib/aarch64-linux-gnu/tegra",
    "usr/lib64",
    "usr/lib",
    "usr/local/nvidia/lib64",
    "usr/local/lib",
];

/// A sign of NVIDIA's driver or of a CUDA toolkit: a path that exists. `root` is where the
/// machine's files begin, `/` except in tests.
pub fn sign_of_cuda(root: &Path, env: Env<'_>) -> Option<PathBuf> {
    let set = |name: &str| env(name).filter(|value| !value.is_empty());
    let folders = |name: &str| set(name).map(|list| std::env::split_paths(&list).collect::<Vec<_>>());
    let toolkits = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"].into_iter().filter_map(set).map(PathBuf::from);
    let compilers = folders("PATH").unwrap_or_default().into_iter().map(|folder| folder.join("nvcc"));
    let libraries = folders("LD_LIBRARY_PATH").unwrap_or_default().into_iter();
    let libraries = libraries.chain(LIBRARIES.map(|folder| root.join(folder)));
    let libraries = libraries.map(|folder| folder.join("libcuda.so.1"));
    let signs = SIGNS.into_iter().map(|sign| root.join(sign));
    // A relative path would be looked for in the package's folder.
    let mut all = toolkits.chain(signs).chain(libraries).chain(compilers).filter(|path| path.is_absolute());
    all.find(|path| path.exists())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_driver_or_a_toolkit_is_seen() {
        let bare = tempfile::tempdir().unwrap();
        assert_eq!(sign_of_cuda(bare.path(), &|_| None), None);
        for file in [
            "dev/nvidiactl",
            "proc/driver/nvidia/version",
            "usr/lib/wsl/lib/libcuda.so.1",
            "usr/lib/x86_64-linux-gnu/libcuda.so.1",
            "usr/lib/aarch64-linux-gnu/tegra/libcuda.so.1",
            "usr/lib64/libcuda.so.1",
            "usr/local/cuda/version.json",
        ] {
            let root = tempfile::tempdir().unwrap();
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "").unwrap();
            let sign = sign_of_cuda(root.path(), &|_| None).unwrap_or_else(|| panic!("{file}"));
            assert!(path.starts_with(&sign), "{file}: {}", sign.display());
        }
    }

    #[test]
    fn the_environment_names_a_toolkit_or_the_drivers_folder() {
        let bare = tempfile::tempdir().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let names = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"];
        for (variable, file) in names
            .map(|name| (name, ""))
            .into_iter()
            .chain([("PATH", "nvcc"), ("LD_LIBRARY_PATH", "libcuda.so.1")])
        {
            let other =
                |value: &str| sign_of_cuda(bare.path(), &|name| (name == variable).then(|| value.to_owned()));
            assert_eq!(other(""), None, "{variable}");
            assert_eq!(other("/no/such/folder"), None, "{variable}");
            assert_eq!(other("."), None, "{variable}");
            let path = folder.path().join(file);
            if !file.is_empty() {
                assert_eq!(other(folder.path().to_str().unwrap()), None, "{variable}");
                fs::write(&path, "").unwrap();
            }
            assert_eq!(other(folder.path().to_str().unwrap()), Some(path), "{variable}");
        }
    }
}
