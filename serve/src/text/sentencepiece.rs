//! SentencePiece's BPE tokenizers, which GGUF files describe by pieces and
//! their scores, without merges.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::{Content, Value};
use tokenizers::{
    AddedToken, Tokenizer,
    models::bpe::{BPE, Vocab},
    normalizers::{NormalizerWrapper, Prepend, Replace, Sequence},
};

use crate::Result;

/// What stands for a space in pieces.
pub const SPACE: &str = "▁";

/// Types of pieces, beside those that are never found in text.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
/// Found in text before all others, and text as they are.
pub const USER_DEFINED: i64 = 4;

/// The tokenizer of these pieces, and whether it puts a space before text.
pub fn tokenizer(content: &Content, pieces: &[String]) -> Result<(Tokenizer, bool)> {
    let metadata = |key: &str| content.metadata.get(&format!("tokenizer.ggml.{key}"));
    let numbers = |key: &str| match metadata(key) {
        Some(Value::Array(all)) if all.len() == pieces.len() => Ok(all),
        Some(_) => Err(format!("tokenizer.ggml.{key} is not an array of {} numbers", pieces.len())),
        None => Err(format!("tokenizer.ggml.{key} is missing")),
    };
    let scores = numbers("scores")?.iter().map(Value::to_f32).collect::<std::result::Result<Vec<_>, _>>();
    let scores = scores.map_err(|_| "tokenizer.ggml.scores are not all f32")?;
    let types = numbers("token_type")?.iter().map(token_type).collect::<Option<Vec<_>>>();
    let types = types.ok_or("tokenizer.ggml.token_type are not all 32-bit integers")?;
    let of_type = |wanted: i64| pieces.iter().zip(&types).filter(move |(_, kind)| **kind == wanted);

    let vocab: HashMap<&str, usize> = pieces.iter().map(String::as_str).zip(0..).collect();
    let usable = |piece: &str| {
        let id = *vocab.get(piece)?;
        [NORMAL, USER_DEFINED].contains(&types[id]).then_some(id)
    };
    // All pairs that make a piece. The piece with the highest score is made first.
    let mut merges = Vec::new();
    for (whole, piece) in pieces.iter().enumerate().filter(|(_, piece)| usable(piece).is_some()) {
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if let (Some(left), Some(right)) = (usable(left), usable(right)) {
                merges.push((whole, left, right));
            }
        }
    }
    merges.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]).then(a.cmp(b)));
    let merges = merges.into_iter().map(|(_, left, right)| (pieces[left].clone(), pieces[right].clone()));
    let vocab = pieces.iter().cloned().zip(0u32..);
    let mut model = BPE::builder()
        .vocab_and_merges(vocab.collect::<Vocab>(), merges.collect())
        .byte_fallback(true)
        .fuse_unk(true);
    if let Some((unknown, _)) = of_type(UNKNOWN).next() {
        model = model.unk_token(unknown.clone());
    }
    let mut tokenizer = Tokenizer::new(model.build()?);

    let prefix = metadata("add_space_prefix").map_or(Ok(true), Value::to_bool);
    let prefix = prefix.map_err(|_| "tokenizer.ggml.add_space_prefix is not true or false")?;
    let prepend = prefix.then(|| NormalizerWrapper::from(Prepend::new(SPACE.into())));
    let steps = prepend.into_iter().chain([Replace::new(" ", SPACE)?.into()]);
    tokenizer.with_normalizer(Some(Sequence::new(steps.collect())))?;
    let whole = |kind, special| {
        of_type(kind).map(move |(piece, _)| AddedToken::from(piece.clone(), special).normalized(false))
    };
    tokenizer.add_special_tokens(whole(UNKNOWN, true).chain(whole(CONTROL, true)))?;
    tokenizer.add_tokens(whole(USER_DEFINED, false))?;
    Ok((tokenizer, prefix))
}

/// The type of a token.
pub fn token_type(value: &Value) -> Option<i64> {
    match value {
        Value::I32(kind) => Some(i64::from(*kind)),
        Value::U32(kind) => Some(i64::from(*kind)),
        _ => None,
    }
}

/// The bytes that a piece stands for.
pub fn bytes(piece: &str) -> Vec<u8> {
    let byte = piece.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    match byte.filter(|hex| hex.len() == 2).and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        Some(byte) => vec![byte],
        None => piece.replace(SPACE, " ").into_bytes(),
    }
}
