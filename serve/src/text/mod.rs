//! Text to token ids and back, and chats, by what a GGUF file says.
//!
//! | module | its job |
//! |---|---|
//! | `metadata`, `vocabulary` | what the file says, and its tokens |
//! | `tokenizer` | text to ids, by `byte_level` (with `splits`) or `sentencepiece`, which share `bpe` |
//! | `message`, `chat`, `error` | messages, and the text that a model reads for them |
//! | `template`, `sandbox` | a model's template, and the processes that it runs in |
//! | `jinja`, `source`, `python` | Jinja, as templates for transformers expect it |
//! | `marks`, `names` | which control tokens a template wrote; names of tokens in text |
//! | `stream`, `stops` | ids to text while they come, and stop strings in it |
//! | `tools` | calls of tools in what a model says |
//!
//! **Text is text.** Names of control tokens in it (`<|im_end|>`, `<s>`) become ordinary tokens.
//! Only a chat's template writes control tokens, and [`EncodeOptions::control`].

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::quantized::gguf_file::Content;

mod bpe;
mod byte_level;
mod chat;
mod error;
mod jinja;
mod marks;
mod message;
mod metadata;
mod names;
mod python;
#[cfg(unix)]
pub mod sandbox;
mod sentencepiece;
mod source;
pub(crate) mod splits;
mod stops;
mod stream;
mod template;
#[cfg(test)]
mod tests;
mod tokenizer;
pub mod tools;
mod vocabulary;

pub use self::message::{Content as MessageContent, FunctionCall, Message, Part, Role, ToolCall};
pub(crate) use self::stops::Stops;
use self::{
    chat::Chat,
    metadata::Metadata,
    names::{Names, Piece},
    tokenizer::Tokenizer,
    vocabulary::Kind,
};
pub use self::{
    chat::ChatOptions,
    error::ChatError,
    stream::Stream,
    tools::{NoToolFormat, ToolFormat},
};
use crate::Result;

/// What becomes of a text, beside its own tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeOptions {
    /// The token that begins a text comes first, if the file says so. True by default.
    pub bos: bool,
    /// The token that ends a text comes last, if the file says so. False by default: what
    /// the model is to continue has not ended.
    pub eos: bool,
    /// Names of control tokens are such tokens. False by default. Never for text that others
    /// than the program's user may have written.
    pub control: bool,
}

impl Default for EncodeOptions {
    fn default() -> Self {
        Self { bos: true, eos: false, control: false }
    }
}

/// The most bytes of a chat, which are some million tokens.
const MAX_CHAT_BYTES: usize = 16 << 20;
/// The most bytes of texts that are tokenized beside others.
const BESIDE_OTHERS: usize = 1 << 20;

/// A tokenizer, byte-level BPE or SentencePiece's, and the chat template beside it.
pub struct Text {
    tokenizer: Tokenizer,
    /// The names of control tokens.
    control: Arc<Names>,
    chat: Option<Chat>,
    /// What encoding adds before and behind a text.
    bos: Option<u32>,
    eos: Option<u32>,
    warnings: Vec<String>,
    /// In bytes, if that says how few tokens a text can be.
    longest_token: Option<usize>,
    /// Held by who tokenizes a long text, which takes some 75 times its memory.
    alone: Mutex<()>,
}

impl Text {
    /// The tokenizer and the chat template that a file describes.
    ///
    /// # Errors
    /// A file without a tokenizer, with one that is not known, or with arrays that do not
    /// belong together; the key is named.
    pub fn from_gguf(content: &Content) -> Result<Self> {
        let metadata = Metadata::new(content);
        let mut warnings = Vec::new();
        let tokenizer = Tokenizer::read(metadata, &mut warnings)?;
        let vocabulary = &tokenizer.vocabulary;
        let added = |name: &str, default, id: Option<u32>| -> Result<Option<u32>> {
            match metadata.flag(&format!("ggml.add_{name}_token"))?.unwrap_or(default) {
                true if id.is_none() => {
                    Err(format!("tokenizer.ggml.{name}_token_id is missing, or no token").into())
                }
                added => Ok(id.filter(|_| added)),
            }
        };
        let bos = added("bos", tokenizer.add_bos, vocabulary.bos)?;
        let eos = added("eos", false, vocabulary.eos)?;
        let control = vocabulary.of_kind(Kind::Control).chain(vocabulary.of_kind(Kind::Unknown));
        let control = Arc::new(Names::new(control));
        let chat = Chat::read(metadata, vocabulary, &control, &mut warnings)?;
        if chat.is_none() {
            warnings
                .push("the model has no chat template: it continues texts, and knows no questions".into());
        }
        if vocabulary.ends.is_empty() {
            warnings.push("the file names no token that ends an answer: answers end by their limits".into());
        }
        let longest_token = tokenizer.longest();
        Ok(Self { control, chat, bos, eos, warnings, longest_token, alone: Mutex::default(), tokenizer })
    }

    /// What is odd about the file, and what is done about it, in sentences.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The ids of a text that the model is to continue.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        self.encode_with(text, &EncodeOptions::default())
    }

    /// The ids of a text.
    pub fn encode_with(&self, text: &str, options: &EncodeOptions) -> Vec<u32> {
        let pieces = match options.control {
            true => self.control.split(text, |_| true),
            false => vec![Piece { text, token: None }],
        };
        let mut ids = self.encode_pieces(&pieces);
        if options.bos {
            ids.splice(0..0, self.bos);
        }
        if options.eos {
            ids.extend(self.eos);
        }
        ids
    }

    fn encode_pieces(&self, pieces: &[Piece<'_>]) -> Vec<u32> {
        let bytes: usize = pieces.iter().map(|piece| piece.text.len()).sum();
        let _alone =
            (bytes > BESIDE_OTHERS).then(|| self.alone.lock().unwrap_or_else(PoisonError::into_inner));
        self.tokenizer.encode_pieces(pieces)
    }

    /// The fewest tokens that a text of so many bytes can be, as none stands for more bytes than the longest; 0
    /// where text may be left out.
    pub fn fewest_tokens(&self, bytes: usize) -> usize {
        self.longest_token.map_or(0, |longest| bytes.div_ceil(longest))
    }

    /// Refuses a chat of so many bytes that is too long, or sure to have too many tokens.
    fn check_length(&self, bytes: usize, options: &ChatOptions) -> Result<(), ChatError> {
        if bytes > MAX_CHAT_BYTES {
            return Err(ChatError::TooLong { most: MAX_CHAT_BYTES });
        }
        let fewest = self.fewest_tokens(bytes);
        match options.max_tokens.filter(|most| *most < fewest) {
            Some(most) => Err(ChatError::TooManyTokens { fewest, most }),
            None => Ok(()),
        }
    }

    /// Whether the model has a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.chat.is_some()
    }

    /// The ids of a chat, up to where the model's answer begins. `tools` are those of OpenAI's
    /// API: `{"type": "function", "function": {"name": …}}`. Only the template writes control
    /// tokens; a token that begins texts is there once. Without a template, the model continues
    /// the messages' texts, between which are blank lines.
    ///
    /// # Errors
    /// What the template raises about the messages, in its words; what goes wrong in it;
    /// arguments of calls that are no object; tools for a model without a template; a chat of more than
    /// 16 MiB, or of more tokens than it may have. Those of the template and of length are a [`ChatError`].
    pub fn render_chat(
        &self,
        messages: &[Message],
        tools: &[serde_json::Value],
        options: &ChatOptions,
    ) -> Result<Vec<u32>> {
        let Some(chat) = &self.chat else {
            if !tools.is_empty() {
                return Err(
                    "the model has no chat template, so it cannot be told of tools; expected none".into()
                );
            }
            let texts: Vec<_> = messages.iter().map(Message::text).collect();
            let text = texts.join("\n\n");
            self.check_length(text.len(), options)?;
            return Ok(self.encode(&text));
        };
        let rendered = chat.render(messages, tools, options)?;
        self.check_length(rendered.text.len(), options)?;
        let mut ids = self.encode_pieces(&rendered.pieces(&self.control));
        if ids.first().copied() != self.bos {
            ids.splice(0..0, self.bos);
        }
        Ok(ids)
    }

    /// How the model calls tools, as its template says.
    ///
    /// # Errors
    /// The template does not tell the model of tools, or has them called in a form that is not known.
    pub fn tool_format(&self) -> std::result::Result<ToolFormat, NoToolFormat> {
        ToolFormat::of(self.chat.as_ref().ok_or(NoToolFormat::NotTold)?.tool_template())
    }

    /// The control token of this name.
    pub fn control_id(&self, name: &str) -> Option<u32> {
        self.tokenizer.vocabulary.id(name).filter(|id| self.is_control(*id))
    }

    /// The tokens with which the model ends its answer.
    pub fn ends(&self) -> &BTreeSet<u32> {
        &self.tokenizer.vocabulary.ends
    }

    /// How many tokens there are.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.vocabulary.tokens.len()
    }

    /// How another model's tokens differ, if they do.
    pub(crate) fn difference(&self, other: &Self) -> Option<String> {
        self.tokenizer.vocabulary.difference(&other.tokenizer.vocabulary)
    }

    /// The bytes that a token stands for, which may be a part of a character; of a control
    /// token its name. Empty if there is no such token.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.tokenizer.bytes(id)
    }

    /// Whether a token is no text: a control token, or that for what is unknown.
    pub fn is_control(&self, id: u32) -> bool {
        matches!(self.tokenizer.vocabulary.kind(id), Some(Kind::Control | Kind::Unknown))
    }

    /// Text that comes token by token.
    pub fn stream(self: &Arc<Self>) -> Stream {
        Stream::new(Arc::clone(self))
    }

    /// Whether encoding puts a space before a text.
    fn space_prefix(&self) -> bool {
        self.tokenizer.space_prefix()
    }
}
