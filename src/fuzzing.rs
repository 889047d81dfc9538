//! What `fuzz/` tries with bytes of any kind, and what must hold of whatever is read of them. Each
//! function ends for any bytes, and panics only where the crate has a fault.

#[cfg(feature = "fetch")]
pub use crate::artifacts::fuzzing::index_page;
pub use crate::artifacts::fuzzing::{manifest, pins, record, wheel};
use crate::{artifacts::fuzzing::text_of, ffi::Signature, module::ModuleName, ops::signatures};

/// What a module prints of one of its functions: which of them is in the first byte.
pub fn printed_signature(bytes: &[u8]) {
    let Some((&which, printed)) = bytes.split_first() else { return };
    let known = signatures();
    let (_, declared) = known[usize::from(which) % known.len()];
    let printed = text_of(printed);
    match Signature::find(declared, &printed) {
        Ok(found) => assert!(printed.contains(&declared[found].to_string()), "{printed} is another"),
        Err(difference) => assert!(!difference.is_empty()),
    }
}

/// A module's name, and a pattern of names behind the first line feed.
pub fn module_name(bytes: &[u8]) {
    let text = text_of(bytes);
    let (name, pattern) = text.split_once('\n').unwrap_or((&text, "*"));
    let module = ModuleName::new(name);
    if module.matches(pattern) {
        let parts = pattern.split('*').map(str::len).sum::<usize>();
        assert!(parts <= name.len(), "{pattern} is longer than {name}");
    }
    assert!(name.contains('*') || module.matches(name));
    crate::artifacts::fuzzing::member(name);
    let signatures = signatures();
    let _ = signatures.iter().filter(|(pattern, _)| module.matches(pattern)).count();
}

#[cfg(test)]
mod tests {
    use test_support::replay::replay;

    /// Each seed, and mutations of it.
    #[test]
    fn nothing_that_is_read_panics() {
        for (name, target) in [
            ("wheel", super::wheel as fn(&[u8])),
            ("record", super::record),
            ("manifest", super::manifest),
            #[cfg(feature = "fetch")]
            ("index_page", super::index_page),
            ("pins", super::pins),
            ("printed_signature", super::printed_signature),
            ("module_name", super::module_name),
        ] {
            replay(format!("{}/fuzz/seeds/{name}", env!("CARGO_MANIFEST_DIR")), 2000, target);
        }
    }
}
