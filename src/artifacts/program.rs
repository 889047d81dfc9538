//! Programs of the machine, never of the caller's working folder.

use std::env;
#[cfg(feature = "fetch")]
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

/// A program of `PATH`. Relative entries, which mean whatever folder the caller works in, are
/// passed over.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let list = env::var_os("PATH")?;
    let places = env::split_paths(&list).filter(|place| place.is_absolute());
    places.map(|place| place.join(name)).find(|path| is_executable(path))
}

/// The absolute entries of a list of folders.
#[cfg(feature = "fetch")]
pub(crate) fn absolute_only(list: &OsStr) -> OsString {
    let absolute = env::split_paths(list).filter(|path| path.is_absolute());
    env::join_paths(absolute).unwrap_or_default()
}

#[cfg(unix)]
fn is_executable(path: &std::path::Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

#[cfg(not(unix))]
fn is_executable(path: &std::path::Path) -> bool {
    path.is_file()
}

#[cfg(all(test, feature = "fetch"))]
mod tests {
    use super::absolute_only;

    #[test]
    fn only_absolute_entries_are_kept() {
        for (list, want) in [("/a:.:b::/c", "/a:/c"), (".", ""), ("", "")] {
            assert_eq!(absolute_only(list.as_ref()), want, "{list}");
        }
    }
}
