//! Which characters of a rendered chat its template wrote.
//!
//! A control token counts only where the template writes it. So before it is compiled,
//! what may become a name of such a token is written in the template with characters
//! that nobody else uses: stand-ins out of Unicode's private planes, of which none is in the
//! messages. One character stands for one, so that all that a template does with its
//! strings goes on as it was. What users say is left as it is, and templates can trim,
//! split, compare and search it. Strings that a template looks for are left, too; a name that
//! it keeps in a variable to look for it later is not found in what users say.

use std::collections::{HashMap, HashSet};

use super::{
    message::Role,
    names::{Names, Piece},
};
use crate::Result;

/// Characters that only a template writes, for those of control tokens' names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StandIns {
    /// By the characters of names, and by themselves.
    to: HashMap<char, char>,
    from: HashMap<char, char>,
}

impl StandIns {
    /// # Errors
    /// If the messages have more kinds of private characters than any text should.
    pub fn new(names: &Names, used: &HashSet<char>) -> Result<Self> {
        let mut characters: Vec<char> = names.iter().flat_map(str::chars).collect();
        characters.sort_unstable();
        characters.dedup();
        let free =
            ('\u{f0000}'..='\u{ffffd}').chain('\u{100000}'..='\u{10fffd}').filter(|c| !used.contains(c));
        let to: HashMap<_, _> = characters.iter().copied().zip(free).collect();
        if to.len() < characters.len() {
            return Err(
                "the messages use up Unicode's private characters; expected some that they do not have"
                    .into(),
            );
        }
        let from = to.iter().map(|(from, to)| (*to, *from)).collect();
        Ok(Self { to, from })
    }

    /// Whether none of these characters is one of the stand-ins.
    pub fn are_free_of(&self, used: &HashSet<char>) -> bool {
        used.iter().all(|c| !self.from.contains_key(c))
    }

    fn stand_in(&self, text: &str) -> String {
        text.chars().map(|c| *self.to.get(&c).unwrap_or(&c)).collect()
    }

    /// A text of a template, with stand-ins for the names of control tokens, and for what
    /// at its ends may be part of one.
    pub fn mark(&self, text: &str, names: &Names) -> String {
        let pieces = names.split(text, |_| true);
        let mut marked = String::with_capacity(text.len());
        for (index, piece) in pieces.iter().enumerate() {
            let text = piece.text;
            let [head, tail] = match piece.token {
                Some(_) => [text.len(), text.len()],
                None => {
                    let head = if index == 0 { end_of_name(text, names) } else { 0 };
                    let last = index + 1 == pieces.len();
                    [head, text.len() - if last { start_of_name(&text[head..], names) } else { 0 }]
                }
            };
            marked += &self.stand_in(&text[..head]);
            marked += &text[head..tail];
            marked += &self.stand_in(&text[tail..]);
        }
        marked
    }

    /// A rendered text without stand-ins, unless it has more bytes than `most`.
    pub fn unmark(&self, text: &str, most: usize) -> Option<Rendered> {
        let mut rendered = Rendered::default();
        for c in text.chars() {
            let real = self.from.get(&c);
            rendered.text.push(*real.unwrap_or(&c));
            if rendered.text.len() > most {
                return None;
            }
            rendered.written.resize(rendered.text.len(), real.is_some());
        }
        Some(rendered)
    }
}

/// The length of what a text ends with and a name starts with.
fn start_of_name(text: &str, names: &Names) -> usize {
    let parts = names.iter().flat_map(|name| name.char_indices().skip(1).map(|(at, _)| &name[..at]));
    let found = parts.filter(|part| is_mark(part) && text.ends_with(part)).map(str::len);
    found.max().unwrap_or(0)
}

/// The length of what a text starts with and a name ends with.
fn end_of_name(text: &str, names: &Names) -> usize {
    let parts = names.iter().flat_map(|name| name.char_indices().skip(1).map(|(at, _)| &name[at..]));
    let found = parts.filter(|part| is_mark(part) && text.starts_with(part)).map(str::len);
    found.max().unwrap_or(0)
}

/// Whether a part of a name is more than letters, digits and blanks.
fn is_mark(part: &str) -> bool {
    part.contains(|c: char| !c.is_alphanumeric() && !c.is_whitespace())
}

/// A rendered chat.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    /// For each byte whether the template wrote it as part of a control token's name.
    written: Vec<bool>,
}

impl Rendered {
    /// The text, and the control tokens that the template wrote. It may have taken a role
    /// from a message to write one: `<|user|>`.
    pub fn pieces(&self, names: &Names) -> Vec<Piece<'_>> {
        names.split(&self.text, |range| {
            let written = &self.written[range.clone()];
            let Some(from) = written.iter().position(|by_template| !by_template) else { return true };
            let to = written.iter().rposition(|by_template| !by_template).map_or(from, |last| last + 1);
            let inner = &self.text[range.start + from..range.start + to];
            from > 0 && to < written.len() && Role::ALL.iter().any(|role| role.name() == inner)
        })
    }
}
