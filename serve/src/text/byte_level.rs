//! Byte-level BPE: text is split, and merges join bytes within the parts.

use std::{collections::HashMap, sync::LazyLock};

use super::{
    bpe::{Join, Symbol, merge},
    metadata::Metadata,
    splits::{Pre, Splits},
    vocabulary::Vocabulary,
};
use crate::Result;

/// Merges of bytes.
pub struct ByteLevel {
    /// The tokens of single bytes.
    pub bytes: [Option<u32>; 256],
    /// What two tokens become.
    merges: HashMap<[u32; 2], Join>,
    /// Tokens by their bytes, where a part that is a token is taken whole.
    whole: HashMap<Vec<u8>, u32>,
    splits: Splits,
}

impl ByteLevel {
    /// # Errors
    /// Merges that are missing, or of what are no tokens.
    pub fn read(metadata: Metadata<'_>, vocabulary: &Vocabulary, pre: &Pre) -> Result<Self> {
        let text = (0..vocabulary.tokens.len() as u32).filter(|&id| vocabulary.is_text(id));
        let mut bytes = [None; 256];
        let mut whole = HashMap::new();
        for id in text {
            let of = self::bytes(&vocabulary.tokens[id as usize]);
            if let [byte] = of[..] {
                bytes[usize::from(byte)].get_or_insert(id);
            }
            if pre.ignore_merges {
                whole.insert(of, id);
            }
        }
        let mut merges = HashMap::new();
        for (rank, merge) in (0..).zip(metadata.strings("ggml.merges")?) {
            // The first character is never the one between.
            let between = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
            let ids = between.and_then(|at| {
                let (left, right) = (&merge[..at], &merge[at + 1..]);
                Some([vocabulary.id(left)?, vocabulary.id(right)?, vocabulary.id(&[left, right].concat())?])
            });
            let [left, right, id] = ids.ok_or_else(|| {
                format!(
                    "tokenizer.ggml.merges has `{merge}` at {rank}; expected two tokens that are one together"
                )
            })?;
            if [left, right, id].into_iter().all(|id| vocabulary.is_text(id)) {
                merges.entry([left, right]).or_insert(Join { rank, id });
            }
        }
        Ok(Self { bytes, merges, whole, splits: pre.splits()? })
    }

    /// The ids of a text. Bytes that are no tokens are left out.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        let join = |left: &Symbol, right: &Symbol| self.merges.get(&[left.id?, right.id?]).copied();
        self.splits.each(text, |part| {
            if let Some(id) = self.whole.get(part.as_bytes()) {
                return ids.push(*id);
            }
            let symbol =
                |(at, byte): (usize, u8)| Symbol { bytes: at..at + 1, id: self.bytes[usize::from(byte)] };
            let symbols = merge(part.bytes().enumerate().map(symbol).collect(), join);
            ids.extend(symbols.into_iter().filter_map(|symbol| symbol.id));
        });
    }
}

/// The bytes that a token stands for. Its characters are bytes: those that can be printed
/// are themselves, and the others are counted from 256 on.
pub fn bytes(token: &str) -> Vec<u8> {
    static OTHERS: LazyLock<Vec<u8>> =
        LazyLock::new(|| (0..=255).filter(|byte| !is_printed(*byte)).collect());
    let byte = |character: char| match u8::try_from(u32::from(character)) {
        Ok(byte) => is_printed(byte).then_some(byte),
        Err(_) => OTHERS.get(character as usize - 256).copied(),
    };
    token.chars().map(byte).collect::<Option<_>>().unwrap_or_else(|| token.into())
}

const fn is_printed(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff)
}
