//! What a machine must have for a test. A test that lacks it says so and is skipped, unless
//! `FLASHINFER_RS_REQUIRE` names what is lacking: then it fails.
use std::{fmt::Display, path::PathBuf};

/// What tests may lack, by the words of `FLASHINFER_RS_REQUIRE`.
pub const LIBTVM_FFI: &str = "libtvm_ffi";
pub const MODULES: &str = "modules";
pub const MODEL: &str = "model";
pub const CC: &str = "cc";
/// Of `serve/tests/clients`.
pub const CHROMIUM: &str = "chromium";

const ALL: [&str; 5] = [LIBTVM_FFI, MODULES, MODEL, CC, CHROMIUM];

/// Whether tests must fail for want of `what`.
pub fn is_required(what: &str) -> bool {
    assert!(ALL.contains(&what), "{what} is none of {ALL:?}");
    let required = std::env::var("FLASHINFER_RS_REQUIRE").unwrap_or_default();
    let required: Vec<_> = required.split([',', ' ']).filter(|word| !word.is_empty()).collect();
    for word in &required {
        assert!(ALL.contains(word), "FLASHINFER_RS_REQUIRE names {word}, which is none of {ALL:?}");
    }
    required.contains(&what)
}

/// Says that a test, or the rest of it, is skipped for want of `what`.
///
/// # Panics
/// `FLASHINFER_RS_REQUIRE` names it.
#[track_caller]
pub fn skip(what: &str, why: impl Display) {
    assert!(!is_required(what), "FLASHINFER_RS_REQUIRE names {what}: {why}");
    eprintln!("skipped for want of {what}: {why}");
}

/// The folder of real kernel wheels that `FLASHINFER_RS_TEST_WHEELS` names; `None`, after saying so,
/// where it names none.
#[track_caller]
pub fn test_wheels() -> Option<PathBuf> {
    let folder = std::env::var_os("FLASHINFER_RS_TEST_WHEELS").map(PathBuf::from);
    match &folder {
        Some(folder) => assert!(folder.is_dir(), "FLASHINFER_RS_TEST_WHEELS is no folder: {folder:?}"),
        None => skip(MODULES, "FLASHINFER_RS_TEST_WHEELS names no folder of wheels"),
    }
    folder
}
