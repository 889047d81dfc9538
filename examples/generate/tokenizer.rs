//! Text to token ids and back, by the vocabulary and merges in a GGUF file.

use std::{collections::BTreeSet, mem};

use candle_core::quantized::{gguf_file::Content, tokenizer::TokenizerFromGguf};
use tokenizers::{
    SplitDelimiterBehavior, Tokenizer,
    pre_tokenizers::{
        PreTokenizerWrapper,
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use crate::{Result, model::plain, sentencepiece};

/// Where Llama 3's tokenizer splits text: contractions, words, up to three
/// digits, punctuation, line ends, spaces.
const LLAMA3_SPLIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// How a ChatML message of the system starts; a template that uses it may have
/// a system prompt of its own.
const SYSTEM: &str = "<|im_start|>system\n";

/// A tokenizer: byte-level BPE, or SentencePiece's.
pub struct Text {
    tokenizer: Tokenizer,
    /// The bytes of each token; special tokens have none.
    pieces: Vec<Vec<u8>>,
    /// Encoding puts a space before the text.
    space_prefix: bool,
    chatml: bool,
    system: Option<String>,
    ends: BTreeSet<u32>,
}

impl Text {
    /// The tokenizer that a file describes.
    pub fn from_gguf(content: &Content) -> Result<Self> {
        let metadata = |key: &str| content.metadata.get(&format!("tokenizer.{key}"));
        let string = |key: &str| metadata(key).and_then(|value| value.to_string().ok());
        let model = string("ggml.model").ok_or("the file has no tokenizer")?;
        let tokens = metadata("ggml.tokens").and_then(|tokens| tokens.to_vec().ok());
        let tokens: Option<Vec<String>> =
            tokens.and_then(|tokens| tokens.iter().map(|token| token.to_string().ok().cloned()).collect());
        let tokens = tokens.ok_or("tokenizer.ggml.tokens is missing, or no array of strings")?;
        let pre = string("ggml.pre").map_or("default", String::as_str);
        let (tokenizer, space_prefix, bytes): (_, _, fn(&str) -> _) = match model.as_str() {
            "gpt2" => (byte_level(content, pre)?, false, bytes_of_characters),
            "llama" => {
                let (tokenizer, space_prefix) =
                    sentencepiece::tokenizer(content, &tokens).map_err(|e| format!("its tokenizer: {e}"))?;
                (tokenizer, space_prefix, sentencepiece::bytes)
            }
            other => {
                let expected = "expected gpt2 (byte-level BPE) or llama (SentencePiece)";
                return Err(format!("its tokenizer is `{other}`; {expected}").into());
            }
        };
        let special = |token: &str| tokenizer.get_added_vocabulary().is_special_token(token);
        let piece = |token: &String| if special(token) { Vec::new() } else { bytes(token) };
        let ends = ["ggml.eos_token_id", "ggml.eot_token_id"].into_iter();
        let ends = ends.filter_map(metadata).filter_map(|id| id.to_u32().ok());
        let template = string("chat_template").map_or("", String::as_str);
        let system = template.split_once(SYSTEM).and_then(|(_, rest)| rest.split_once("<|im_end|>"));
        Ok(Self {
            ends: ends.chain(tokenizer.token_to_id("<|im_end|>")).collect(),
            chatml: template.contains("<|im_start|>") && tokenizer.token_to_id("<|im_start|>").is_some(),
            system: system.map(|(system, _)| system.into()),
            pieces: tokens.iter().map(piece).collect(),
            space_prefix,
            tokenizer,
        })
    }

    /// The ids of plain text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode(text, true)?.get_ids().into())
    }

    /// The ids of a question to the model, up to where its answer begins. The
    /// system prompt is the file's own if none is given.
    pub fn encode_chat(&self, system: Option<&str>, user: &str) -> Result<Vec<u32>> {
        if !self.chatml {
            return Err("the model has no ChatML template; use --raw to have it continue the text".into());
        }
        let system = system.or(self.system.as_deref());
        let system = system.map_or(String::new(), |text| format!("{SYSTEM}{text}<|im_end|>\n"));
        self.encode(&format!("{system}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"))
    }

    /// The tokens with which the model ends its answer.
    pub fn ends(&self) -> &BTreeSet<u32> {
        &self.ends
    }

    /// Text that comes token by token.
    pub fn stream(&self) -> Stream<'_> {
        Stream { text: self, pending: Vec::new(), strip: self.space_prefix }
    }
}

/// Tokens on their way to text. A token may hold any bytes, so that a character
/// of several bytes may take several tokens.
pub struct Stream<'t> {
    text: &'t Text,
    /// The start of a character.
    pending: Vec<u8>,
    /// A space that comes first is left out.
    strip: bool,
}

impl Stream<'_> {
    /// The text that a further token completes, with marks for what is no text.
    pub fn push(&mut self, id: u32) -> String {
        let mut bytes = self.text.pieces.get(id as usize).map_or(&[][..], Vec::as_slice);
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

/// A byte-level BPE tokenizer, which splits text as `pre` says before merges apply.
fn byte_level(content: &Content, pre: &str) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::from_gguf(content).map_err(|e| format!("its tokenizer: {}", plain(e)))?;
    let split: [PreTokenizerWrapper; 2] = match pre {
        "smollm" => [Digits::new(true).into(), ByteLevel::new(false, true, true).into()],
        "llama-bpe" | "llama3" => {
            let pattern = SplitPattern::Regex(LLAMA3_SPLIT.into());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
            [split.into(), ByteLevel::new(false, true, false).into()]
        }
        other => {
            let expected = "expected smollm or llama-bpe";
            return Err(format!("its tokenizer splits text as `{other}`; {expected}").into());
        }
    };
    tokenizer.with_pre_tokenizer(Some(Sequence::new(split.into())));
    Ok(tokenizer)
}

/// The bytes that a token of byte-level BPE stands for. Its characters are
/// bytes: those that can be printed are themselves, and the others are counted
/// from 256 on.
fn bytes_of_characters(token: &str) -> Vec<u8> {
    let printed = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let byte = |character: char| {
        let code = u32::from(character);
        match u8::try_from(code) {
            Ok(byte) => printed(&byte).then_some(byte),
            Err(_) => (0..=255).filter(|byte| !printed(byte)).nth(code as usize - 256),
        }
    };
    token.chars().map(byte).collect::<Option<_>>().unwrap_or_else(|| token.into())
}
