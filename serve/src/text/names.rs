//! Tokens that are found in text by their names.

use std::{collections::HashMap, ops::Range};

/// A part of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'t> {
    pub text: &'t str,
    /// The token whose name it is.
    pub token: Option<u32>,
}

/// Names of tokens.
#[derive(Default)]
pub struct Names {
    /// By their first characters, the longest first.
    by_first: HashMap<char, Vec<(Box<str>, u32)>>,
}

impl Names {
    /// Names that are empty are left out.
    pub fn new<'a>(tokens: impl Iterator<Item = (&'a str, u32)>) -> Self {
        let mut by_first = HashMap::<_, Vec<(Box<str>, u32)>>::new();
        for (name, id) in tokens {
            if let Some(first) = name.chars().next() {
                by_first.entry(first).or_default().push((name.into(), id));
            }
        }
        for names in by_first.values_mut() {
            names.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
        }
        Self { by_first }
    }

    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.by_first.values().flatten().map(|(name, _)| &**name)
    }

    /// The names that a text starts with, the longest first, and their tokens.
    fn at(&self, text: &str) -> impl Iterator<Item = (&str, u32)> {
        let names = text.chars().next().and_then(|first| self.by_first.get(&first));
        let names = names.map_or(&[][..], Vec::as_slice).iter();
        names.filter(move |(name, _)| text.starts_with(&**name)).map(|(name, id)| (&**name, *id))
    }

    /// Finds names in a text, the leftmost first and the longest there, of those places that
    /// are accepted. No piece of text is empty.
    pub fn split<'t>(&self, text: &'t str, accept: impl Fn(Range<usize>) -> bool) -> Vec<Piece<'t>> {
        let (mut pieces, mut last, mut at) = (Vec::new(), 0, 0);
        while let Some(first) = text[at..].chars().next() {
            let found = self.at(&text[at..]).find(|(name, _)| accept(at..at + name.len()));
            let Some((name, id)) = found else {
                at += first.len_utf8();
                continue;
            };
            if last < at {
                pieces.push(Piece { text: &text[last..at], token: None });
            }
            last = at + name.len();
            pieces.push(Piece { text: &text[at..last], token: Some(id) });
            at = last;
        }
        if last < text.len() {
            pieces.push(Piece { text: &text[last..], token: None });
        }
        pieces
    }
}
