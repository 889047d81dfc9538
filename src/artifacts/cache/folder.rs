//! Folders that other programs may share: nothing is followed, and nothing removed unasked.

use super::super::ArtifactError;
use super::super::lock::gone;
use super::super::sink;
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io;
use std::path::Path;
use std::time::Duration;

/// Where there are no locks, what was not written to for so long has no writer any more.
const ABANDONED: Duration = Duration::from_secs(24 * 60 * 60);

/// Opens a file that is no symbolic link, folder or pipe.
pub(crate) fn open_regular(path: &Path) -> io::Result<(File, Metadata)> {
    if !fs::symlink_metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "it is not a regular file"));
    }
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    Ok((file, metadata))
}

/// Refuses a folder of ours that is a symbolic link or no folder at all.
pub(crate) fn real_folder(path: &Path) -> Result<(), ArtifactError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.is_dir() => {
            let why = io::Error::new(io::ErrorKind::NotADirectory, "it is not a real folder");
            Err(ArtifactError::cache(path, "use the folder", why))
        }
        _ => Ok(()),
    }
}

/// Whether nobody has written to it for long, or the clock was set back by as much.
pub(crate) fn abandoned(metadata: &Metadata) -> bool {
    metadata.modified().is_ok_and(|time| time.elapsed().unwrap_or_else(|ahead| ahead.duration()) > ABANDONED)
}

/// Removes unfinished files and folders that no process can be working on any more.
pub(crate) fn remove_abandoned(folder: &Path) {
    for (name, metadata) in listed(folder).unwrap_or_default() {
        if sink::is_temporary(&name) && abandoned(&metadata) {
            let path = folder.join(name);
            let _ = if metadata.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
    }
}

/// Removes the files of a folder that `which` accepts; returns their bytes.
pub(crate) fn remove_files(
    folder: &Path,
    which: impl Fn(&str, &Metadata) -> bool,
) -> Result<u64, ArtifactError> {
    let mut freed = 0;
    for (name, metadata) in listed(folder)? {
        if metadata.is_dir() || !which(&name, &metadata) {
            continue;
        }
        match fs::remove_file(folder.join(&name)) {
            Ok(()) => freed += metadata.len(),
            Err(e) if gone(&e) => {}
            Err(e) => return Err(ArtifactError::cache(&folder.join(name), "remove", e)),
        }
    }
    Ok(freed)
}

/// What is in a folder and may be ours: all our names are plain text.
pub(crate) fn listed(folder: &Path) -> Result<Vec<(String, Metadata)>, ArtifactError> {
    let found = entries(folder).map_err(|e| ArtifactError::cache(folder, "list", e))?;
    Ok(found.into_iter().filter_map(|(name, metadata)| Some((name.into_string().ok()?, metadata))).collect())
}

/// What is in a folder, links not followed; less what is removed meanwhile.
pub(crate) fn entries(folder: &Path) -> io::Result<Vec<(OsString, Metadata)>> {
    let listing = match fs::read_dir(folder) {
        Err(e) if gone(&e) => return Ok(Vec::new()),
        listing => listing?,
    };
    let mut found = Vec::new();
    for entry in listing {
        match entry.and_then(|entry| Ok((entry.file_name(), entry.metadata()?))) {
            Ok(named) => found.push(named),
            Err(e) if gone(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}
