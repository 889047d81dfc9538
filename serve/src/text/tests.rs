//! Tokenizers and templates as small files describe them.

mod control;
mod files;
mod reference;
pub mod templates;

use std::{collections::HashMap, sync::Arc};

use candle_core::quantized::gguf_file::{Content, Value, VersionedMagic};

use super::{ChatOptions, EncodeOptions, Message, Role, Text};
use crate::Result;

/// What a file says.
#[derive(Clone)]
pub struct File(HashMap<String, Value>);

fn strings<T: AsRef<str>>(all: &[T]) -> Value {
    Value::Array(all.iter().map(|text| Value::String(text.as_ref().into())).collect())
}

fn integers(all: &[i32]) -> Value {
    Value::Array(all.iter().map(|number| Value::I32(*number)).collect())
}

impl File {
    /// Tokens of single bytes, those of which the characters are themselves, two merges, and
    /// control tokens.
    fn byte_level(control: &[&str]) -> Self {
        let mut tokens: Vec<String> = (0..=255).map(|byte| character(byte).to_string()).collect();
        tokens.extend(["ĠĠ", "ĠĠĠĠ"].map(String::from));
        let mut types = vec![1; tokens.len()];
        tokens.extend(control.iter().map(|name| name.to_string()));
        types.resize(tokens.len(), 3);
        let file = Self(HashMap::new());
        file.with("ggml.model", Value::String("gpt2".into()))
            .with("ggml.pre", Value::String("gpt-2".into()))
            .with("ggml.tokens", strings(&tokens))
            .with("ggml.token_type", integers(&types))
            .with("ggml.merges", strings(&["Ġ Ġ", "ĠĠ ĠĠ"]))
    }

    /// Pieces with scores and types, behind one for what is unknown, two of control and bytes.
    fn sentencepiece(pieces: &[(&str, f32, i32)]) -> Self {
        let bytes: Vec<_> = (0..=255).map(|byte| format!("<0x{byte:02X}>")).collect();
        let mut all = vec![("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)];
        all.extend(bytes.iter().map(|byte| (byte.as_str(), 0.0, 6)));
        all.extend(pieces);
        let scores = all.iter().map(|(_, score, _)| Value::F32(*score)).collect();
        Self(HashMap::new())
            .with("ggml.model", Value::String("llama".into()))
            .with("ggml.tokens", strings(&all.iter().map(|(piece, ..)| *piece).collect::<Vec<_>>()))
            .with("ggml.scores", Value::Array(scores))
            .with("ggml.token_type", integers(&all.iter().map(|(.., kind)| *kind).collect::<Vec<_>>()))
            .with("ggml.bos_token_id", Value::U32(1))
            .with("ggml.eos_token_id", Value::U32(2))
            .with("ggml.add_space_prefix", Value::Bool(false))
    }

    fn with(mut self, key: &str, value: Value) -> Self {
        self.0.insert(format!("tokenizer.{key}"), value);
        self
    }

    pub fn text(&self) -> Result<Arc<Text>> {
        let content = Content {
            magic: VersionedMagic::GgufV3,
            metadata: self.0.clone(),
            tensor_infos: HashMap::new(),
            tensor_data_offset: 0,
        };
        Text::from_gguf(&content).map(Arc::new)
    }
}

/// The character that stands for a byte.
fn character(byte: u8) -> char {
    let printed = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match printed(byte) {
        true => byte.into(),
        false => {
            let before = (0..byte).filter(|byte| !printed(*byte)).count();
            char::from_u32(256 + before as u32).expect("a character")
        }
    }
}

/// The text of ids, with the names of control tokens.
fn decode(text: &Text, ids: &[u32]) -> String {
    String::from_utf8(ids.iter().flat_map(|id| text.token_bytes(*id)).copied().collect()).expect("text")
}

/// The names of the control tokens among ids.
fn control_of(text: &Text, ids: &[u32]) -> Vec<String> {
    ids.iter().filter(|id| text.is_control(**id)).map(|id| decode(text, &[*id])).collect()
}

#[test]
fn a_million_blanks_give_the_ids_of_the_rule_and_take_no_square_of_time() {
    let blanks = " ".repeat(1_000_000);
    let text = File::byte_level(&[]).text().unwrap();
    assert_eq!(text.encode(&blanks), vec![257; 250_000]);
    // The last of them goes with a word.
    let expected = [&vec![257; 249_999][..], &[256, 32, 32, u32::from(b'x')]].concat();
    assert_eq!(text.encode(&(blanks.clone() + "x")), expected);

    let pieces = [("▁", -9.0, 1), ("▁▁", -1.0, 1), ("▁▁▁▁", -2.0, 1)];
    let text = File::sentencepiece(&pieces).with("ggml.add_bos_token", Value::Bool(false)).text().unwrap();
    assert_eq!(text.encode(&blanks), vec![261; 250_000]);
}

#[test]
fn of_pieces_of_the_same_score_the_leftmost_is_made_first() {
    let pieces = [("▁", -9.0, 1), ("▁▁", -1.0, 1), ("▁▁▁", -1.0, 1)];
    let text = File::sentencepiece(&pieces).with("ggml.add_bos_token", Value::Bool(false)).text().unwrap();
    assert_eq!(text.encode("     "), [261, 260]);
    // Characters that are no pieces may make one.
    let text = File::sentencepiece(&[("né", -1.0, 1), ("n", -2.0, 1)]).text().unwrap();
    assert_eq!(text.encode("né"), [1, 259]);
}

#[test]
fn control_tokens_of_phi3_swallow_blanks() {
    let pieces = [("<|user|>", 0.0, 3), ("a", -1.0, 1), ("▁", -2.0, 1)];
    let control = EncodeOptions { control: true, ..EncodeOptions::default() };
    let mut file = File::sentencepiece(&pieces);
    assert_eq!(
        file.text().unwrap().encode_with("<|user|>\n a<s> a", &control),
        [1, 259, 13, 261, 260, 1, 261, 260]
    );
    file.0.insert("general.architecture".into(), Value::String("phi3".into()));
    assert_eq!(file.text().unwrap().encode_with("<|user|>\n a<s> a", &control), [1, 259, 260, 1, 261, 260]);
}

#[test]
fn tokens_have_bytes() {
    let text = File::byte_level(&["<|im_end|>"]).text().unwrap();
    assert_eq!(text.token_bytes(0xe6), [0xe6]);
    assert_eq!(text.token_bytes(257), b"    ");
    assert_eq!(text.token_bytes(258), b"<|im_end|>");
    assert_eq!(text.token_bytes(259), b"");
    assert!(text.is_control(258) && !text.is_control(257) && !text.is_control(259));
    let mut stream = text.stream();
    assert_eq!([stream.push(0xe6), stream.push(258)], ["", ""]);
    let mut stream = text.stream().showing(vec![258]);
    assert_eq!([stream.push(u32::from(b'a')), stream.push(258)], ["a", "<|im_end|>"]);
}
