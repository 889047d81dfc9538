//! Opening a shared library's file.

use std::path::Path;

use libloading::os::unix::Library;

use crate::error::{FlashInferError, Result};

/// Opens a library, with the remedy for what commonly goes wrong.
pub(crate) fn open_library(path: &Path, flags: i32) -> Result<Library> {
    // SAFETY: the file is a kernel module or NVIDIA's runtime, verified by the
    // store or named by the user; its initializers register GPU code.
    unsafe { Library::open(Some(path), flags) }.map_err(|error| {
        let reason = loader_reason(&error);
        let remedy = if reason.contains("GLIBC_") {
            "this build needs a newer C library than the machine has; use a newer system or a wheel built for an older one"
        } else if reason.contains("cannot open shared object file") {
            "put the folder of the missing library on LD_LIBRARY_PATH"
        } else {
            ""
        };
        FlashInferError::Library { path: path.to_owned(), reason, remedy }
    })
}

/// What the dynamic loader said, which is the error's source.
pub(crate) fn loader_reason(error: &libloading::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => source.to_string(),
        None => error.to_string(),
    }
}
