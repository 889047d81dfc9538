//! A shared library's file: opening it, and reading what it exports and what it calls.

use std::{fs::File, path::Path};

use object::{Object, ObjectSymbol, ReadCache, SymbolKind};

use crate::{
    error::{FlashInferError, Result},
    loader::{self, Library},
};

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
        } else if reason.contains(UNDEFINED_SYMBOL) {
            "obtain the file again, or open the library that defines it beforehand; unset LD_BIND_NOW if it is set"
        } else if reason.contains("failed to map segment") {
            "its file system may be mounted `noexec`; set FLASHINFER_RS_CACHE_DIR to a folder on one that is not"
        } else {
            ""
        };
        FlashInferError::Library { path: path.to_owned(), reason, remedy }
    })
}

/// What the dynamic loader says of a symbol that nothing defines.
const UNDEFINED_SYMBOL: &str = "undefined symbol";

/// Whether a library did not open because nothing defines a symbol of it.
pub(crate) fn is_undefined_symbol(error: &FlashInferError) -> bool {
    matches!(error, FlashInferError::Library { reason, .. } if reason.contains(UNDEFINED_SYMBOL))
}

/// The names of the functions that a library calls and does not define.
pub(crate) fn undefined_functions(path: &Path) -> Result<Vec<String>> {
    read(path, |file| {
        let undefined = file.dynamic_symbols().filter(|symbol| symbol.is_undefined() && !symbol.is_weak());
        let names = undefined.filter_map(|symbol| symbol.name().ok().map(str::to_owned));
        Ok(names.filter(|name| !name.is_empty()).collect())
    })
}

/// Sees to it that each symbol is defined, in the process or in a library that
/// this one links against.
///
/// # Errors
/// [`FlashInferError::Library`] names those that are not.
pub(crate) fn check_defined(path: &Path, symbols: &[String]) -> Result<()> {
    // SAFETY: the loader opens these itself when it opens the library.
    let needed = needed_libraries(path)?
        .into_iter()
        .filter_map(|name| unsafe { Library::open(Some(name), loader::RTLD_LAZY | loader::RTLD_LOCAL) }.ok());
    let places: Vec<Library> = loader::process().into_iter().chain(needed).collect();
    // SAFETY: the symbol's address is not used.
    let defines = |place: &Library, symbol: &str| unsafe { place.get::<*const ()>(symbol) }.is_ok();
    let mut missing: Vec<&str> = symbols
        .iter()
        .map(String::as_str)
        .filter(|symbol| !places.iter().any(|place| defines(place, symbol)))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    missing.sort_unstable();
    Err(FlashInferError::Library {
        path: path.to_owned(),
        reason: format!("{UNDEFINED_SYMBOL}: nothing defines {}, which it calls", missing.join(", ")),
        remedy: "obtain the file again, or open the library that defines it beforehand",
    })
}

/// The names of the functions that a library exports.
pub(crate) fn exported_functions(path: &Path) -> Result<Vec<String>> {
    read(path, |file| {
        let exported =
            |symbol: &object::Symbol<'_, '_, _>| symbol.is_definition() && symbol.kind() == SymbolKind::Text;
        let functions = file.dynamic_symbols().filter(exported);
        Ok(functions.filter_map(|symbol| symbol.name().ok().map(str::to_owned)).collect())
    })
}

/// The names of the libraries that a library links against.
pub(crate) fn needed_libraries(path: &Path) -> Result<Vec<String>> {
    read(path, |file| {
        let name = |library: object::Result<object::read::ImportLibrary<'_>>| {
            Ok(String::from_utf8_lossy(library?.name()).into_owned())
        };
        file.import_libraries()?.map(name).collect()
    })
}

fn read<T>(
    path: &Path,
    look: impl FnOnce(&object::File<'_, &ReadCache<File>>) -> object::Result<T>,
) -> Result<T> {
    let unreadable = |reason: String| FlashInferError::Library {
        path: path.to_owned(),
        reason: format!("it cannot be read: {reason}"),
        remedy: "obtain the file again",
    };
    let file = ReadCache::new(File::open(path).map_err(|error| unreadable(error.to_string()))?);
    object::File::parse(&file).and_then(|file| look(&file)).map_err(|error| unreadable(error.to_string()))
}

/// What the dynamic loader said, which is the error's source.
pub(crate) fn loader_reason(error: &libloading::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => source.to_string(),
        None => error.to_string(),
    }
}
