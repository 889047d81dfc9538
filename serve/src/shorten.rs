//! Texts of others in messages.

/// The beginning of a text, of so many characters at most; a sign says where it is not all.
pub fn shorten(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.into(),
    }
}
