//! Tokenizers of SentencePiece: pieces and their scores in a small file.

use std::sync::Arc;

use candle_core::quantized::gguf_file::Value;
use proptest::{prop_assert_eq, proptest};

use super::Tiny;
use crate::{
    Result,
    text::{ChatOptions, EncodeOptions, Message, Role, Text},
};

/// Where pieces begin, behind the unknown token, BOS, EOS and the bytes.
const FIRST: u32 = 259;

/// A vocabulary of these pieces, their scores and types, behind those that all
/// vocabularies have.
fn file(pieces: &[(&str, f32, i32)]) -> Tiny {
    let bytes: Vec<_> = (0..=255).map(|byte| format!("<0x{byte:02X}>")).collect();
    let mut all = vec![("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)];
    all.extend(bytes.iter().map(|byte| (byte.as_str(), 0.0, 6)));
    all.extend(pieces);
    let array = |value: &dyn Fn(&(&str, f32, i32)) -> Value| Value::Array(all.iter().map(value).collect());
    let mut tiny = Tiny::new();
    tiny.metadata.extend([
        ("tokenizer.ggml.model", Value::String("llama".into())),
        ("tokenizer.ggml.tokens", array(&|piece| Value::String(piece.0.into()))),
        ("tokenizer.ggml.scores", array(&|piece| Value::F32(piece.1))),
        ("tokenizer.ggml.token_type", array(&|piece| Value::I32(piece.2))),
        ("tokenizer.ggml.bos_token_id", Value::U32(1)),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
        ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
    ]);
    tiny.tensors.insert("token_embd.weight".into(), vec![all.len(), 64]);
    tiny
}

fn text(tiny: &Tiny) -> Result<Arc<Text>> {
    tiny.text()
}

/// Single characters, and what to add to them: `▁`, `a`, `b`, `c` from [`FIRST`] on.
pub fn with(pieces: &[(&'static str, f32, i32)]) -> Tiny {
    let single = [("▁", -90.0, 1), ("a", -91.0, 1), ("b", -92.0, 1), ("c", -93.0, 1)];
    file(&[&single, pieces].concat())
}

/// Ids, counted from [`FIRST`].
fn ids(tiny: &Tiny, whole: &str) -> Vec<u32> {
    text(tiny).unwrap().encode(whole).iter().map(|id| id - FIRST).collect()
}

#[test]
fn the_piece_of_the_highest_score_is_made_first() {
    let two = |ab, bc| with(&[("ab", ab, 1), ("bc", bc, 1)]);
    assert_eq!(ids(&two(-1.0, -2.0), "abc"), [0, 4, 3]);
    assert_eq!(ids(&two(-2.0, -1.0), "abc"), [0, 1, 5]);
    // Wherever it is.
    assert_eq!(ids(&two(-2.0, -1.0), "abcab"), [0, 1, 5, 4]);
    // A whole is made of its parts, however good it is.
    let parts = |bca| with(&[("ab", -1.0, 1), ("bc", -2.0, 1), ("bca", bca, 1), ("abc", -4.0, 1)]);
    assert_eq!(ids(&parts(-0.5), "abc"), [0, 7]);
    assert_eq!(ids(&parts(-0.5), "bca"), [0, 6]);
    assert_eq!(ids(&parts(-0.5), "abca"), [0, 7, 1]);
    // No pair of pieces makes this one, and pieces of these types are not made.
    assert_eq!(ids(&with(&[("cab", -1.0, 1)]), "cab"), [0, 3, 1, 2]);
    for unused in [5, 6] {
        assert_eq!(ids(&with(&[("ab", -1.0, unused), ("abc", -2.0, 1)]), "abc"), [0, 1, 2, 3]);
    }
    // The user's own pieces are found before all others, each with a space
    // before the text behind it.
    assert_eq!(ids(&with(&[("bc", -200.0, 4), ("ab", 0.0, 1)]), "abcb"), [0, 1, 4, 0, 2]);
}

#[test]
fn spaces_bytes_and_bos_are_as_the_file_says() {
    let mut tiny = with(&[("▁a", -1.0, 1), ("▁▁", -2.0, 1)]);
    assert_eq!(ids(&tiny, ""), [0; 0]);
    assert_eq!(ids(&tiny, "a a"), [4, 4]);
    assert_eq!(ids(&tiny, " a"), [0, 4]);
    assert_eq!(ids(&tiny, "  b"), [5, 0, 2]);
    let encode = |tiny: &Tiny, whole: &str| text(tiny).unwrap().encode(whole);
    assert_eq!(encode(&tiny, "aé\n"), [FIRST + 4, 3 + 0xc3, 3 + 0xa9, 3 + 0x0a]);
    // Names of control tokens are text, unless they are asked for.
    let spelled: Vec<_> = "</s>".bytes().map(|byte| 3 + u32::from(byte)).collect();
    assert_eq!(encode(&tiny, "a</s>b"), [&[FIRST + 4], &*spelled, &[FIRST + 2]].concat());
    let control = EncodeOptions { control: true, ..EncodeOptions::default() };
    assert_eq!(text(&tiny).unwrap().encode_with("a</s>b", &control), [FIRST + 4, 2, FIRST, FIRST + 2]);

    tiny.metadata.insert("tokenizer.ggml.add_space_prefix", Value::Bool(false));
    assert_eq!(ids(&tiny, "a a"), [1, 4]);
    let stream = |tiny: &Tiny, ids: &[u32]| {
        let text = text(tiny).unwrap();
        let mut stream = text.stream();
        ids.iter().map(|&id| stream.push(id)).collect::<Vec<_>>()
    };
    assert_eq!(stream(&tiny, &[1, FIRST + 4, FIRST + 4, 2]), ["", " a", " a", ""]);
    tiny.metadata.remove("tokenizer.ggml.add_space_prefix");
    assert_eq!(stream(&tiny, &[1, FIRST + 4, FIRST + 4, 2]), ["", "a", " a", ""]);
    assert_eq!(stream(&tiny, &[FIRST + 5, FIRST]), [" ", " "]);
    assert_eq!(stream(&tiny, &[3 + 0x20, FIRST + 4, 9999]), ["", " a", ""]);

    tiny.metadata.insert("tokenizer.ggml.add_bos_token", Value::Bool(true));
    assert_eq!(encode(&tiny, "a"), [1, FIRST + 4]);
    assert_eq!(encode(&tiny, ""), [1]);
    tiny.metadata.remove("tokenizer.ggml.add_bos_token");
    assert_eq!(encode(&tiny, "a"), [1, FIRST + 4]);
    let text = text(&tiny).unwrap();
    assert!(text.ends().contains(&2) && !text.ends().contains(&1));
    // Without a template, text is continued, and the file is said to have none.
    let ids = text.render_chat(&[Message::new(Role::User, "a")], &[], &ChatOptions::default());
    assert_eq!(ids.unwrap(), [1, FIRST + 4]);
    assert!(
        !text.has_chat_template()
            && text.warnings().iter().any(|warning| warning.contains("no chat template"))
    );
}

#[test]
fn bytes_come_as_whole_characters() {
    let tiny = with(&[]);
    let text = text(&tiny).unwrap();
    let stream = |bytes: &[u8]| {
        let mut stream = text.stream();
        let mut parts: Vec<_> = bytes.iter().map(|&byte| stream.push(3 + u32::from(byte))).collect();
        parts.push(stream.finish());
        parts
    };
    assert_eq!(stream("🦀é".as_bytes()), ["", "", "", "🦀", "", "é", ""]);
    let mark = "\u{fffd}";
    assert_eq!(stream(&[0xf0, 0x9f]), ["", "", mark]);
    // Bytes that are no character do not take the next one with them.
    assert_eq!(stream(b"\x80\x80\xe6\x9d\xb1"), [mark, mark, "", "", "東", ""]);
    assert_eq!(stream(b"\xe6\xe6\x9d\xb1a\xff"), ["", mark, "", "東", "a", mark, ""]);
    // A piece ends what was begun.
    let mut stream = text.stream();
    assert_eq!((stream.push(3 + 0xe6), stream.push(FIRST + 1)), (String::new(), format!("{mark}a")));
}

proptest! {
    #[test]
    fn all_text_comes_back(whole in "[ abc\n]{0,40}|[^▁<]{0,20}") {
        let pieces = [("▁a", -1.0, 1), ("bc", -2.0, 1), ("▁▁", -3.0, 1), ("▁abc", -4.0, 1), ("é", -5.0, 1)];
        let text = text(&with(&pieces)).unwrap();
        let mut stream = text.stream();
        let ids = text.encode(&whole);
        let mut back: String = ids.iter().map(|&id| stream.push(id)).collect();
        back += &stream.finish();
        prop_assert_eq!(back, whole);
    }
}

#[test]
fn files_without_what_it_takes_are_refused() {
    let good = || with(&[("ab", -1.0, 1)]);
    assert!(text(&good()).is_ok());
    for key in ["tokens", "scores", "token_type", "bos_token_id"] {
        let key = format!("tokenizer.ggml.{key}");
        let mut tiny = good();
        tiny.metadata.remove(key.as_str());
        tiny.metadata.remove("tokenizer.ggml.add_bos_token");
        let problem = text(&tiny).err().expect("no tokenizer").to_string();
        assert!(problem.contains(&key) && problem.contains("missing"), "{problem}");
    }
    for (key, value, expected) in [
        ("tokenizer.ggml.scores", Value::Array(vec![Value::F32(0.0)]), "not an array of 264 numbers"),
        ("tokenizer.ggml.scores", Value::Array(vec![Value::I32(0); 264]), "scores are not all f32"),
        ("tokenizer.ggml.token_type", Value::Array(vec![Value::F32(1.0); 264]), "token_type are not all"),
        ("tokenizer.ggml.tokens", Value::U32(1), "tokens is missing, or no array of strings"),
        ("tokenizer.ggml.add_space_prefix", Value::U32(1), "add_space_prefix is not true or false"),
        ("tokenizer.ggml.model", Value::String("bert".into()), "`bert`; expected gpt2 (byte-level BPE) or"),
    ] {
        let mut tiny = good();
        tiny.metadata.insert(key, value);
        let problem = text(&tiny).err().expect("no tokenizer").to_string();
        assert!(problem.contains(expected), "{expected:?} is not in: {problem}");
    }
}
