//! Log-probabilities, as chats and as completions have them.

use std::{collections::BTreeMap, iter};

use super::types::{
    chat::{ChatLogprobs, ChatTokenLogprob, TokenLogprob},
    completions::CompletionLogprobs,
};
use crate::{backend::Logprobs, scheduler::Token, text::Text};

/// What stands for the logarithm of 0, as JSON has no infinity.
const NEVER: f32 = -9999.0;

/// The text of a token, with marks for what is no whole character.
pub fn token_text(text: &Text, id: u32) -> String {
    String::from_utf8_lossy(text.token_bytes(id)).into_owned()
}

fn known(tokens: &[Token]) -> impl Iterator<Item = (u32, &Logprobs)> {
    tokens.iter().filter_map(|token| Some((token.id, token.logprobs.as_ref()?)))
}

/// Those of tokens of a chat.
pub fn of_chat(text: &Text, tokens: &[Token]) -> ChatLogprobs {
    let entry = |id, logprob: f32| TokenLogprob {
        token: token_text(text, id),
        logprob: logprob.max(NEVER),
        bytes: text.token_bytes(id).into(),
    };
    let content = known(tokens).map(|(id, logprobs)| ChatTokenLogprob {
        token: entry(id, logprobs.chosen),
        top_logprobs: logprobs.top.iter().map(|top| entry(top.token, top.logprob)).collect(),
    });
    ChatLogprobs { content: content.collect() }
}

impl CompletionLogprobs {
    /// Adds those of tokens, the first of which begins after so many characters. Returns where
    /// the next one begins.
    pub fn push(&mut self, text: &Text, tokens: &[Token], offset: usize) -> usize {
        known(tokens).fold(offset, |offset, (id, logprobs)| self.push_one(text, id, Some(logprobs), offset))
    }

    /// Adds those of a prompt, which begins here; there are none of its first token. Returns where
    /// the next token begins.
    pub fn push_prompt(&mut self, text: &Text, prompt: &[u32], logprobs: &[Logprobs]) -> usize {
        let logprobs = iter::once(None).chain(logprobs.iter().map(Some));
        prompt
            .iter()
            .zip(logprobs)
            .fold(0, |offset, (&id, logprobs)| self.push_one(text, id, logprobs, offset))
    }

    fn push_one(&mut self, text: &Text, id: u32, logprobs: Option<&Logprobs>, offset: usize) -> usize {
        let token = token_text(text, id);
        self.text_offset.push(offset);
        self.token_logprobs.push(logprobs.map(|logprobs| logprobs.chosen.max(NEVER)));
        self.top_logprobs.push(logprobs.map(|logprobs| {
            let mut top: BTreeMap<_, _> = [(token.clone(), logprobs.chosen.max(NEVER))].into();
            for other in &logprobs.top {
                // Of tokens of the same text the likeliest comes first.
                top.entry(token_text(text, other.token)).or_insert(other.logprob.max(NEVER));
            }
            top
        }));
        let end = offset + token.chars().count();
        self.tokens.push(token);
        end
    }
}
