//! Tokenizers of bytes: a token for each, and some that merges make.

use std::sync::{Arc, LazyLock};

use candle_core::quantized::gguf_file::Value;
use proptest::{prelude::ProptestConfig, prop_assert_eq, proptest};

use super::Tiny;
use crate::text::{Text, splits::Pre};

/// What merges make, of what is there before.
const MERGES: [(&str, &str); 10] = [
    ("Ġ", "t"),
    ("h", "e"),
    ("Ġt", "he"),
    ("1", "2"),
    ("12", "3"),
    ("Ġ", "Ġ"),
    ("Ã", "©"),
    ("'", "s"),
    ("Ċ", "Ċ"),
    ("o", "k"),
];
const BOS: u32 = 256;

/// Adds a vocabulary of so many tokens to a file: bytes, BOS, EOS, what merges make,
/// and tokens that are never made.
pub fn add_tokenizer(tiny: &mut Tiny, pre: &str, size: usize) {
    // Bytes that can be printed, and the others from 256 on.
    let printed = |byte: u32| (33..127).contains(&byte) || (161..173).contains(&byte) || byte > 173;
    let (mut next, mut tokens) = (256, Vec::new());
    for byte in 0..256 {
        let code = if printed(byte) { byte } else { next };
        next += u32::from(code == next);
        tokens.push(char::from_u32(code).unwrap().to_string());
    }
    tokens.extend(["<s>", "</s>"].map(String::from));
    tokens.extend(MERGES.map(|(left, right)| format!("{left}{right}")));
    tokens.extend((tokens.len()..size).map(|id| format!("<unused {id}>")));
    let kind = |id: usize| if [256, 257].contains(&id) { 3 } else { 1 };
    let strings = |all: &mut dyn Iterator<Item = String>| Value::Array(all.map(Value::String).collect());
    tiny.metadata.extend([
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String(pre.into())),
        (
            "tokenizer.ggml.token_type",
            Value::Array((0..tokens.len()).map(|id| Value::I32(kind(id))).collect()),
        ),
        ("tokenizer.ggml.tokens", strings(&mut tokens.into_iter())),
        ("tokenizer.ggml.merges", strings(&mut MERGES.iter().map(|(left, right)| format!("{left} {right}")))),
        ("tokenizer.ggml.bos_token_id", Value::U32(BOS)),
        ("tokenizer.ggml.eos_token_id", Value::U32(BOS + 1)),
    ]);
}

/// A model of 270 tokens.
fn tiny(pre: &str) -> Tiny {
    let mut tiny = Tiny::new();
    tiny.tensors.insert("token_embd.weight".into(), vec![270, 64]);
    add_tokenizer(&mut tiny, pre, 270);
    tiny
}

pub fn text(pre: &str) -> Arc<Text> {
    tiny(pre).text().unwrap()
}

/// The tokenizer of GPT 2, and a chat template.
pub fn chat_text(template: &str) -> Arc<Text> {
    let mut tiny = tiny("gpt-2");
    tiny.metadata.insert("tokenizer.chat_template", Value::String(template.into()));
    tiny.text().unwrap()
}

#[test]
fn merges_stay_within_parts() {
    let ids = |pre: &str, whole: &str| text(pre).encode(whole);
    let byte = |byte: char| byte as u32;
    let made = |at: u32| BOS + 2 + at;
    // " the" and "123" are whole where a part is.
    assert_eq!(ids("gpt-2", "ok the1234"), [made(9), made(2), made(4), byte('4')]);
    assert_eq!(ids("qwen2", "ok the123"), [made(9), made(2), byte('1'), byte('2'), byte('3')]);
    assert_eq!(ids("tekken", "ok theOK"), [BOS, made(9), made(2), byte('O'), byte('K')]);
    assert_eq!(ids("falcon3", "0123"), [BOS, byte('0'), made(3), byte('3')]);
    assert_eq!(ids("superbpe", "0123"), [byte('0'), made(4)]);
    // An ending is a part of its own in small letters, or not, and spaces may be.
    assert_eq!(ids("default", "é's"), [made(6), byte('\''), byte('s')]);
    assert_eq!(ids("gpt-2", "é's"), [made(6), made(7)]);
    assert_eq!(ids("qwen2", "a   \n\nb"), [byte('a'), made(5), byte(' '), made(8), byte('b')]);
    let last = [byte('a'), made(5), byte(' '), byte('\n'), byte('\n'), byte('b')];
    assert_eq!(ids("starcoder", "a   \n\nb"), last);
    assert_eq!(ids("deepseek-coder", "a\n\nb"), [byte('a'), byte('\n'), byte('\n'), byte('b')]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn all_text_comes_back_from_all_kinds_of_splits(
        whole in "[ -~\n\tà-ü東京です🦀¿²½а-я]{0,40}", spaces in "[ \na1']{0,12}"
    ) {
        static ALL: LazyLock<Vec<(&str, Arc<Text>)>> =
            LazyLock::new(|| Pre::names().map(|pre| (pre, text(pre))).collect());
        for (pre, text) in &*ALL {
            for whole in [&whole, &spaces] {
                let mut stream = text.stream();
                let ids = text.encode(whole);
                let mut back: String = ids.iter().map(|&id| stream.push(id)).collect();
                back += &stream.finish();
                prop_assert_eq!(&back, whole, "{}", pre);
            }
        }
    }
}
