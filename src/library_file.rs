//! A shared library's file: opening it, and reading what it exports.

use std::{fs::File, path::Path};

use libloading::os::unix::Library;
use object::{Object, ObjectSymbol, ReadCache, SymbolKind};

use crate::error::{FlashInferError, Result};

/// Opens a library, with the remedy for what commonly goes wrong.
pub(crate) fn open_library(path: &Path, flags: i32) -> Result<Library> {
    // SAFETY: the file is a kernel module or NVIDIA's runtime, verified by the
    // store or named by the user; its initializers register GPU code.
    unsafe { Library::open(Some(path), flags) }.map_err(|error| {
        let reason = loader_reason(&error);
        let remedy = if reason.contains("GLIBC_") {
            "this build needs a newer C library than the machine has; use a newer system or a wheel built for an older one"
        } else if reason.contains("libcublas") {
            "install NVIDIA's cuBLAS for CUDA 13, or put its folder on LD_LIBRARY_PATH"
        } else if reason.contains("cannot open shared object file") {
            "put the folder of the missing library on LD_LIBRARY_PATH"
        } else {
            ""
        };
        FlashInferError::Library { path: path.to_owned(), reason, remedy }
    })
}

/// The names of the functions that a library exports.
pub(crate) fn exported_functions(path: &Path) -> Result<Vec<String>> {
    let unreadable = |reason: String| FlashInferError::Library {
        path: path.to_owned(),
        reason: format!("its symbols cannot be read: {reason}"),
        remedy: "obtain the file again",
    };
    let file = ReadCache::new(File::open(path).map_err(|error| unreadable(error.to_string()))?);
    let file = object::File::parse(&file).map_err(|error| unreadable(error.to_string()))?;
    let functions =
        file.dynamic_symbols().filter(|symbol| symbol.is_definition() && symbol.kind() == SymbolKind::Text);
    Ok(functions.filter_map(|symbol| symbol.name().ok().map(str::to_owned)).collect())
}

/// What the dynamic loader said, which is the error's source.
fn loader_reason(error: &libloading::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => source.to_string(),
        None => error.to_string(),
    }
}
