//! SentencePiece's BPE: pieces with scores, the best made first, and bytes for what is
//! in no piece.

use std::collections::HashMap;

use super::{
    bpe::{Join, Symbol, merge},
    metadata::Metadata,
    vocabulary::{Kind, Vocabulary, other_length},
};
use crate::Result;

/// What stands for a space in pieces.
const SPACE: char = '▁';

/// Pieces and what they are worth.
pub struct SentencePiece {
    /// Pieces that text is made of, as their bytes.
    pieces: HashMap<Box<str>, Join>,
    /// The tokens of bytes.
    pub bytes: [Option<u32>; 256],
    unknown: Option<u32>,
    /// A space is put before text.
    pub space_prefix: bool,
}

impl SentencePiece {
    /// # Errors
    /// Arrays that are missing, of other elements or of other lengths.
    pub fn read(metadata: Metadata<'_>, vocabulary: &Vocabulary) -> Result<Self> {
        let count = vocabulary.tokens.len();
        for (key, length) in [
            ("scores", metadata.floats("ggml.scores")?.map(|all| all.len())),
            ("token_type", metadata.integers("ggml.token_type")?.map(|all| all.len())),
        ] {
            match length {
                None => return Err(format!("tokenizer.ggml.{key} is missing").into()),
                Some(length) if length != count => return Err(other_length(key, length, count)),
                Some(_) => {}
            }
        }
        let scores = metadata.floats("ggml.scores")?.unwrap_or_default();
        let text = (0..count as u32).filter(|&id| vocabulary.is_text(id));
        let mut by_score: Vec<u32> = text.filter(|&id| !vocabulary.tokens[id as usize].is_empty()).collect();
        by_score.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
        let mut pieces = HashMap::with_capacity(by_score.len());
        let (mut rank, mut last) = (0, None);
        for id in by_score {
            let (piece, score) = (vocabulary.tokens[id as usize].as_str(), scores[id as usize]);
            rank += u32::from(last.is_some_and(|last| last != score));
            last = Some(score);
            pieces.entry(piece.into()).or_insert(Join { rank, id });
        }
        let mut bytes = [None; 256];
        for (token, id) in vocabulary.of_kind(Kind::Byte).chain(vocabulary.of_kind(Kind::Normal)) {
            if let Some(byte) = byte_of(token) {
                bytes[usize::from(byte)].get_or_insert(id);
            }
        }
        let unknown = vocabulary.of_kind(Kind::Unknown).next().map(|(_, id)| id);
        let space_prefix = metadata.flag("ggml.add_space_prefix")?.unwrap_or(true);
        Ok(Self { pieces, bytes, unknown, space_prefix })
    }

    /// The ids of a text, with a space before it if the file says so.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        let space = |c: char| if c == ' ' { SPACE } else { c };
        let prefix = self.space_prefix.then_some(SPACE);
        let text: String = prefix.into_iter().chain(text.chars().map(space)).collect();
        let symbol = |(at, c): (usize, char)| {
            let bytes = at..at + c.len_utf8();
            Symbol { id: self.pieces.get(&text[bytes.clone()]).map(|piece| piece.id), bytes }
        };
        let join = |left: &Symbol, right: &Symbol| {
            self.pieces.get(&text[left.bytes.start..right.bytes.end]).copied()
        };
        let mut after_unknown = false;
        for symbol in merge(text.char_indices().map(symbol).collect(), join) {
            let by_bytes = || text[symbol.bytes.clone()].bytes().map(|byte| self.bytes[usize::from(byte)]);
            let unknown = symbol.id.is_none() && by_bytes().any(|id| id.is_none());
            match symbol.id {
                Some(id) => ids.push(id),
                None if !unknown => ids.extend(by_bytes().flatten()),
                // One for all that is unknown in a row.
                None => ids.extend(self.unknown.filter(|_| !after_unknown)),
            }
            after_unknown = unknown;
        }
    }
}

/// The bytes that a piece stands for.
pub fn bytes(piece: &str) -> Vec<u8> {
    match byte_of(piece) {
        Some(byte) => vec![byte],
        None => piece.replace(SPACE, " ").into_bytes(),
    }
}

/// The byte of a piece like `<0x0A>`.
fn byte_of(piece: &str) -> Option<u8> {
    let hex = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}
