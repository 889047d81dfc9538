//! Tokens on their way to text.

use std::{mem, sync::Arc};

use super::Text;

/// Tokens on their way to text. A token may hold any bytes, so that a character
/// of several bytes may take several tokens.
pub struct Stream {
    text: Arc<Text>,
    /// The start of a character.
    pending: Vec<u8>,
    /// A space that comes first is left out.
    strip: bool,
    /// Control tokens that are shown.
    shown: Vec<u32>,
}

impl Stream {
    pub(super) fn new(text: Arc<Text>) -> Self {
        Self { strip: text.space_prefix(), text, pending: Vec::new(), shown: Vec::new() }
    }

    /// Shows these control tokens by their names, for those who look for calls of tools.
    pub fn showing(self, tokens: Vec<u32>) -> Self {
        Self { shown: tokens, ..self }
    }

    /// Keeps a space that comes first, which is text and not how a text begins.
    pub fn with_first_space(self) -> Self {
        Self { strip: false, ..self }
    }

    /// The text that a further token completes, with marks for what is no text.
    pub fn push(&mut self, id: u32) -> String {
        let shown = !self.text.is_control(id) || self.shown.contains(&id);
        let mut bytes = if shown { self.text.token_bytes(id) } else { &[] };
        if self.strip && !bytes.is_empty() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            self.strip = false;
        }
        self.pending.extend(bytes);
        let len = self.pending.len();
        let starts_character = |rest: &[u8]| {
            str::from_utf8(rest).is_err_and(|e| e.valid_up_to() == 0 && e.error_len().is_none())
        };
        let rest = (1..=len.min(3)).find(|count| starts_character(&self.pending[len - count..]));
        let rest = self.pending.split_off(len - rest.unwrap_or(0));
        String::from_utf8_lossy(&mem::replace(&mut self.pending, rest)).into_owned()
    }

    /// The rest, with a mark for what is no text.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
}
