//! Text to token ids and back, by the vocabulary and merges in a GGUF file.

use std::collections::BTreeSet;

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

use crate::{Result, model::plain};

/// Where Llama 3's tokenizer splits text: contractions, words, up to three
/// digits, punctuation, line ends, spaces.
const LLAMA3_SPLIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// How a ChatML message of the system starts; a template that uses it may have
/// a system prompt of its own.
const SYSTEM: &str = "<|im_start|>system\n";

/// A byte-level BPE tokenizer.
pub struct Text {
    tokenizer: Tokenizer,
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
        if model != "gpt2" {
            return Err(format!("its tokenizer is `{model}`; expected byte-level BPE, `gpt2`").into());
        }
        let mut tokenizer =
            Tokenizer::from_gguf(content).map_err(|e| format!("its tokenizer: {}", plain(e)))?;
        // The file names how text is split before merges apply.
        let split: [PreTokenizerWrapper; 2] = match string("ggml.pre").map_or("default", String::as_str) {
            "smollm" => [Digits::new(true).into(), ByteLevel::new(false, true, true).into()],
            "llama-bpe" | "llama3" => {
                let pattern = SplitPattern::Regex(LLAMA3_SPLIT.into());
                let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
                [split.into(), ByteLevel::new(false, true, false).into()]
            }
            other => {
                return Err(
                    format!("its tokenizer splits text as `{other}`; expected smollm or llama-bpe").into()
                );
            }
        };
        tokenizer.with_pre_tokenizer(Some(Sequence::new(split.into())));
        tokenizer.with_decoder(Some(ByteLevel::default()));
        let ends = ["ggml.eos_token_id", "ggml.eot_token_id"].into_iter();
        let ends = ends.filter_map(metadata).filter_map(|id| id.to_u32().ok());
        let template = string("chat_template").map_or("", String::as_str);
        let system = template.split_once(SYSTEM).and_then(|(_, rest)| rest.split_once("<|im_end|>"));
        Ok(Self {
            ends: ends.chain(tokenizer.token_to_id("<|im_end|>")).collect(),
            chatml: template.contains("<|im_start|>") && tokenizer.token_to_id("<|im_start|>").is_some(),
            system: system.map(|(system, _)| system.into()),
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
        Stream { text: self, pending: Vec::new() }
    }
}

/// Tokens on their way to text. A token may hold any bytes, so that a character
/// of several bytes may take several tokens.
pub struct Stream<'t> {
    text: &'t Text,
    pending: Vec<u32>,
}

impl Stream<'_> {
    /// The text that a further token completes.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.pending.push(id);
        let text = self.text.tokenizer.decode(&self.pending, true)?;
        // No character has more than four bytes.
        if text.ends_with(char::REPLACEMENT_CHARACTER) && self.pending.len() < 4 {
            return Ok(String::new());
        }
        self.pending.clear();
        Ok(text)
    }

    /// The rest, with a mark for what is no text.
    pub fn finish(self) -> Result<String> {
        self.text.tokenizer.decode(&self.pending, true)
    }
}
