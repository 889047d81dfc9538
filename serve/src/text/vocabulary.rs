//! The tokens of a file: their names, what kind each is, and which begin and end a text.

use std::collections::{BTreeSet, HashMap};

use super::metadata::Metadata;
use crate::Result;

/// What kind a token is, as GGUF counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Normal,
    Unknown,
    /// Written by templates, never found in text.
    Control,
    /// Found in text before all others.
    UserDefined,
    Unused,
    Byte,
}

/// Names of tokens that end an answer, of all models that have them. Most are llama.cpp's.
const ENDS: [&str; 25] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|tool_response>",
    "<end_of_turn>",
    "<turn|>",
    "<end_of_utterance>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "[e~[",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<｜end▁of▁sentence｜>",
];

/// Other marks of templates that some files call user-defined.
const MARKS: [&str; 5] = ["<bos>", "<s>", "<start_of_turn>", "[INST]", "[/INST]"];

/// The tokens of a file.
pub struct Vocabulary {
    pub tokens: Vec<String>,
    pub kinds: Vec<Kind>,
    /// The token that begins a text, and whether it does so unless the template says otherwise.
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    /// Tokens that end an answer.
    pub ends: BTreeSet<u32>,
    ids: HashMap<String, u32>,
}

impl Vocabulary {
    /// Reads the tokens. What is odd and does no harm is added to `warnings`.
    ///
    /// # Errors
    /// Arrays that are missing, of other elements or of other lengths.
    pub fn read(metadata: Metadata<'_>, warnings: &mut Vec<String>) -> Result<Self> {
        let tokens: Vec<_> = metadata.strings("ggml.tokens")?.into_iter().map(String::from).collect();
        if u32::try_from(tokens.len()).is_err() {
            return Err(format!(
                "tokenizer.ggml.tokens has {} tokens; expected fewer than 2^32",
                tokens.len()
            )
            .into());
        }
        let kinds = match metadata.integers("ggml.token_type")? {
            None => vec![Kind::Normal; tokens.len()],
            Some(all) if all.len() == tokens.len() => all.into_iter().map(kind).collect::<Result<_>>()?,
            Some(all) => return Err(other_length("token_type", all.len(), tokens.len())),
        };
        let ids = tokens.iter().cloned().zip(0..).collect();
        let mut vocabulary = Self { tokens, kinds, bos: None, eos: None, ends: BTreeSet::new(), ids };
        vocabulary.bos = vocabulary.named(metadata, "bos_token_id", warnings)?.first().copied();
        let eos = vocabulary.named(metadata, "eos_token_id", warnings)?;
        vocabulary.eos = eos.first().copied();
        vocabulary.ends.extend(eos);
        for key in ["eot_token_id", "eom_token_id", "eos_token_ids"] {
            let ids = vocabulary.named(metadata, key, warnings)?;
            vocabulary.ends.extend(ids);
        }
        vocabulary.mark_control();
        Ok(vocabulary)
    }

    /// The tokens that a key names.
    fn named(&self, metadata: Metadata<'_>, key: &str, warnings: &mut Vec<String>) -> Result<Vec<u32>> {
        let mut ids = metadata.integers(&format!("ggml.{key}"))?.unwrap_or_default();
        // Such files have none.
        ids.retain(|id| ![-1, i64::from(u32::MAX)].contains(id));
        let known = |id: &i64| usize::try_from(*id).is_ok_and(|id| id < self.tokens.len());
        if let Some(id) = ids.iter().find(|id| !known(id)) {
            let count = self.tokens.len();
            warnings.push(format!("tokenizer.ggml.{key} {id} is left out: there are {count} tokens"));
        }
        Ok(ids.into_iter().filter(known).map(|id| id as u32).collect())
    }

    /// Adds tokens that end answers by their names, and makes all marks control tokens, which
    /// some files call user-defined or normal.
    fn mark_control(&mut self) {
        let named = ENDS.iter().filter_map(|name| self.id(name));
        let named: Vec<_> = named.filter(|id| self.is_mark(*id)).collect();
        self.ends.extend(named);
        // These models end messages within an answer with `<|end|>`, and answers with others.
        for others in [["<|return|>", "<|call|>"], ["<|calls|>", "<|flush|>"]] {
            if others.iter().all(|name| self.id(name).is_some())
                && let Some(end) = self.id("<|end|>")
            {
                self.ends.remove(&end);
            }
        }
        let marks: Vec<_> = (0..self.tokens.len() as u32).filter(|id| self.is_mark(*id)).collect();
        for id in marks.into_iter().chain(self.bos).chain(self.ends.iter().copied()) {
            if self.kinds[id as usize] != Kind::Unknown {
                self.kinds[id as usize] = Kind::Control;
            }
        }
    }

    /// Whether a token is a control token, or no text by its name.
    fn is_mark(&self, id: u32) -> bool {
        let token = self.tokens[id as usize].as_str();
        let around = |start: &str, end: &str| {
            token.len() > start.len() + end.len() && token.starts_with(start) && token.ends_with(end)
        };
        let by_form = around("<|", "|>") || around("<｜", "｜>");
        match self.kinds[id as usize] {
            Kind::Control => true,
            Kind::UserDefined => by_form || MARKS.contains(&token) || ENDS.contains(&token),
            Kind::Normal => by_form,
            Kind::Unknown | Kind::Unused | Kind::Byte => false,
        }
    }

    /// How another model's tokens differ, if they do: in their number, or the first one.
    pub fn difference(&self, other: &Self) -> Option<String> {
        let (ours, theirs) = (self.tokens.len(), other.tokens.len());
        if ours != theirs {
            return Some(format!("it has {theirs} tokens, and the model {ours}"));
        }
        let id = (0..ours).find(|&id| self.tokens[id] != other.tokens[id])?;
        Some(format!("its token {id} is {:?}, and the model's {:?}", other.tokens[id], self.tokens[id]))
    }

    /// The token of this name; the last of several.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    pub fn kind(&self, id: u32) -> Option<Kind> {
        self.kinds.get(id as usize).copied()
    }

    /// Tokens of a kind, with their ids, without those that have no name.
    pub fn of_kind(&self, kind: Kind) -> impl Iterator<Item = (&str, u32)> {
        let all = self.tokens.iter().zip(&self.kinds).zip(0..);
        all.filter(move |((token, of), _)| **of == kind && !token.is_empty())
            .map(|((token, _), id)| (token.as_str(), id))
    }

    /// Whether a token may come from text: normal and user-defined ones do.
    pub fn is_text(&self, id: u32) -> bool {
        matches!(self.kinds[id as usize], Kind::Normal | Kind::UserDefined)
    }
}

fn kind(number: i64) -> Result<Kind> {
    Ok(match number {
        1 => Kind::Normal,
        2 => Kind::Unknown,
        3 => Kind::Control,
        4 => Kind::UserDefined,
        5 => Kind::Unused,
        6 => Kind::Byte,
        other => return Err(format!("tokenizer.ggml.token_type has a {other}; expected 1 to 6").into()),
    })
}

/// The error of an array that has not one element for each token.
pub fn other_length(key: &str, length: usize, tokens: usize) -> crate::Error {
    format!("tokenizer.ggml.{key} is not an array of {tokens} numbers, one for each token, but of {length}")
        .into()
}
