//! Text to token ids and back, by the vocabulary and merges in a GGUF file.

use std::{collections::BTreeSet, mem, sync::Arc};

use candle_core::quantized::{
    gguf_file::{Content, Value},
    tokenizer::TokenizerFromGguf,
};
use tokenizers::{ModelWrapper, Tokenizer, processors::template::TemplateProcessing};

pub mod chat;
mod sentencepiece;
pub mod splits;

use self::{chat::Chat, splits::Pre};
use crate::{Result, model::plain};

/// Tokens that end an answer, in templates for chats.
const ENDS: [&str; 2] = ["<|im_end|>", "<|eot_id|>"];

/// A tokenizer: byte-level BPE, or SentencePiece's.
pub struct Text {
    tokenizer: Tokenizer,
    /// The bytes of each token; special tokens have none.
    pieces: Vec<Vec<u8>>,
    /// Encoding puts a space before the text.
    space_prefix: bool,
    chat: Option<Chat>,
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
        let (mut tokenizer, space_prefix, add_bos, bytes): (_, _, _, fn(&str) -> _) = match model.as_str() {
            "gpt2" => {
                let pre = Pre::of(pre)?;
                (byte_level(content, pre)?, false, pre.add_bos, bytes_of_characters)
            }
            "llama" => {
                let (tokenizer, space_prefix) =
                    sentencepiece::tokenizer(content, &tokens).map_err(|e| format!("its tokenizer: {e}"))?;
                (tokenizer, space_prefix, true, sentencepiece::bytes)
            }
            other => {
                let expected = "expected gpt2 (byte-level BPE) or llama (SentencePiece)";
                return Err(format!("its tokenizer is `{other}`; {expected}").into());
            }
        };
        add_ends(&mut tokenizer, content, &tokens, add_bos).map_err(|e| format!("its tokenizer: {e}"))?;
        let types = metadata("ggml.token_type").and_then(|types| types.to_vec().ok());
        let special = |token: &str| tokenizer.get_added_vocabulary().is_special_token(token);
        let kind = |id: usize| types.and_then(|types| sentencepiece::token_type(types.get(id)?));
        let literal = |id| model == "gpt2" && kind(id) == Some(sentencepiece::USER_DEFINED);
        let piece = |(id, token): (usize, &String)| match special(token) {
            _ if literal(id) => token.clone().into(),
            true => Vec::new(),
            false => bytes(token),
        };
        let ends = ["ggml.eos_token_id", "ggml.eot_token_id"].into_iter();
        let ends = ends.filter_map(metadata).filter_map(|id| id.to_u32().ok());
        let template = string("chat_template").map_or("", String::as_str);
        Ok(Self {
            ends: ends.chain(ENDS.iter().filter_map(|end| tokenizer.token_to_id(end))).collect(),
            chat: Chat::find(template, |token| tokenizer.token_to_id(token).is_some()),
            pieces: tokens.iter().enumerate().map(piece).collect(),
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
        let chat = self.chat.as_ref().ok_or_else(|| {
            let known = Chat::NAMES;
            format!("the model has no chat template of {known}; use --raw to have it continue the text")
        })?;
        self.encode(&chat.question(system, user))
    }

    /// The tokens with which the model ends its answer.
    pub fn ends(&self) -> &BTreeSet<u32> {
        &self.ends
    }

    /// Text that comes token by token.
    pub fn stream(self: &Arc<Self>) -> Stream {
        Stream { text: self.clone(), pending: Vec::new(), strip: self.space_prefix }
    }
}

/// Tokens on their way to text. A token may hold any bytes, so that a character
/// of several bytes may take several tokens.
pub struct Stream {
    text: Arc<Text>,
    /// The start of a character.
    pending: Vec<u8>,
    /// A space that comes first is left out.
    strip: bool,
}

impl Stream {
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
fn byte_level(content: &Content, pre: &Pre) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::from_gguf(content).map_err(|e| format!("its tokenizer: {}", plain(e)))?;
    if pre.ignore_merges
        && let ModelWrapper::BPE(mut model) = tokenizer.get_model().clone()
    {
        model.ignore_merges = true;
        tokenizer.with_model(model);
    }
    tokenizer.with_pre_tokenizer(Some(pre.tokenizer()?));
    Ok(tokenizer)
}

/// Has BOS and EOS added as the file says; unless it does, no EOS.
fn add_ends(tokenizer: &mut Tokenizer, content: &Content, tokens: &[String], add_bos: bool) -> Result<()> {
    let metadata = |key: &str| content.metadata.get(&format!("tokenizer.ggml.{key}"));
    let wanted = |name: &str, default| {
        let flag = metadata(&format!("add_{name}_token")).map_or(Ok(default), Value::to_bool);
        if !flag.map_err(|_| format!("tokenizer.ggml.add_{name}_token is not true or false"))? {
            return Ok(None);
        }
        let id = metadata(&format!("{name}_token_id")).and_then(|id| id.to_u32().ok());
        let token = id.and_then(|id| Some((tokens.get(id as usize)?.clone(), id)));
        token.map(Some).ok_or_else(|| format!("tokenizer.ggml.{name}_token_id is missing, or no token"))
    };
    let (bos, eos) = (wanted("bos", add_bos)?, wanted("eos", false)?);
    let name = |token: &Option<(String, u32)>| token.as_ref().map(|(token, _)| token.clone());
    let parts = name(&bos).into_iter().chain(["$0".into()]).chain(name(&eos));
    let template = TemplateProcessing::builder()
        .try_single(parts.collect::<Vec<_>>())?
        .special_tokens(bos.into_iter().chain(eos).collect::<Vec<_>>())
        .build()?;
    tokenizer.with_post_processor(Some(template));
    Ok(())
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
