//! Text to ids, and ids to bytes.

use super::{
    byte_level::{self, ByteLevel},
    metadata::Metadata,
    names::{Names, Piece},
    sentencepiece::{self, SentencePiece},
    splits::Pre,
    vocabulary::{Kind, Vocabulary},
};
use crate::Result;

/// How text without marks becomes tokens.
enum Model {
    ByteLevel(ByteLevel),
    SentencePiece(SentencePiece),
}

/// A tokenizer. Text gives no control tokens, whatever it says.
pub struct Tokenizer {
    pub vocabulary: Vocabulary,
    model: Model,
    user_defined: Names,
    /// The bytes of each token.
    bytes: Vec<Vec<u8>>,
    /// What the kind of tokenizer says of BOS, if the file says nothing.
    pub add_bos: bool,
    /// Control tokens swallow blanks behind them, as the tokenizers of Phi-3 have it.
    swallows_blanks: bool,
}

impl Tokenizer {
    /// The tokenizer that a file describes. What is odd and does no harm is added to `warnings`.
    pub fn read(metadata: Metadata<'_>, warnings: &mut Vec<String>) -> Result<Self> {
        let name = metadata.string("ggml.model")?.ok_or("the file has no tokenizer")?;
        let vocabulary = Vocabulary::read(metadata, warnings)?;
        let (model, add_bos) = match name {
            "gpt2" => {
                let pre = metadata.string("ggml.pre")?;
                if pre.is_none() {
                    warnings.push(
                        "tokenizer.ggml.pre is missing: text is split as `default`, which may not be how the \
                         model learned it"
                            .into(),
                    );
                }
                let pre = Pre::of(pre.unwrap_or("default"))?;
                (Model::ByteLevel(ByteLevel::read(metadata, &vocabulary, pre)?), pre.add_bos)
            }
            "llama" => (Model::SentencePiece(SentencePiece::read(metadata, &vocabulary)?), true),
            other => {
                let expected = "expected gpt2 (byte-level BPE) or llama (SentencePiece)";
                return Err(format!("its tokenizer is `{other}`; {expected}").into());
            }
        };
        let bytes = (0..).zip(&vocabulary.tokens).map(|(id, token)| match (&model, vocabulary.kinds[id]) {
            (_, Kind::Control | Kind::Unknown) | (Model::ByteLevel(_), Kind::UserDefined) => {
                token.clone().into()
            }
            (Model::ByteLevel(_), _) => byte_level::bytes(token),
            (Model::SentencePiece(_), _) => sentencepiece::bytes(token),
        });
        let bytes = bytes.collect();
        let user_defined = Names::new(vocabulary.of_kind(Kind::UserDefined));
        let swallows_blanks =
            metadata.architecture() == Some("phi3") && matches!(model, Model::SentencePiece(_));
        Ok(Self { vocabulary, model, user_defined, bytes, add_bos, swallows_blanks })
    }

    /// The ids of text and control tokens.
    pub fn encode_pieces(&self, pieces: &[Piece<'_>]) -> Vec<u32> {
        let (mut ids, mut swallow) = (Vec::new(), false);
        for piece in pieces {
            match piece.token {
                Some(id) => ids.push(id),
                None if swallow => self.encode(piece.text.trim_start(), &mut ids),
                None => self.encode(piece.text, &mut ids),
            }
            swallow = piece.token.is_some_and(|id| {
                let name = self.vocabulary.tokens[id as usize].as_str();
                self.swallows_blanks && !["<unk>", "<s>", "<|endoftext|>"].contains(&name)
            });
        }
        ids
    }

    /// The ids of a text in which nothing is a mark. The user's own tokens are found first.
    fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        for piece in self.user_defined.split(text, |_| true) {
            match (piece.token, &self.model) {
                (Some(id), _) => ids.push(id),
                (None, Model::ByteLevel(model)) => model.encode(piece.text, ids),
                (None, Model::SentencePiece(model)) => model.encode(piece.text, ids),
            }
        }
    }

    /// The bytes of a token: of a control token its name, of none that is not there.
    pub fn bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], Vec::as_slice)
    }

    /// The most bytes of a text that a token may stand for; `None` where text may be in no token of its own.
    pub fn longest(&self) -> Option<usize> {
        let (bytes, longest) = match &self.model {
            Model::ByteLevel(model) => (&model.bytes, self.bytes.iter().map(Vec::len).max()),
            // The mark of a space may be in a text itself, where it is longer than a space.
            Model::SentencePiece(model) => {
                (&model.bytes, self.vocabulary.tokens.iter().map(String::len).max())
            }
        };
        longest.filter(|_| bytes.iter().all(Option::is_some) && !self.swallows_blanks)
    }

    /// Whether the first token of a text may have a space that is not in the text.
    pub fn space_prefix(&self) -> bool {
        matches!(&self.model, Model::SentencePiece(model) if model.space_prefix)
    }
}
