//! Log-probabilities, as chats and as completions have them.

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
    pub fn push(&mut self, text: &Text, tokens: &[Token], mut offset: usize) -> usize {
        for (id, logprobs) in known(tokens) {
            let token = token_text(text, id);
            self.text_offset.push(offset);
            offset += token.chars().count();
            self.token_logprobs.push(logprobs.chosen.max(NEVER));
            let mut top: std::collections::BTreeMap<_, _> =
                [(token.clone(), logprobs.chosen.max(NEVER))].into();
            for other in &logprobs.top {
                // Of tokens of the same text the likeliest comes first.
                top.entry(token_text(text, other.token)).or_insert(other.logprob.max(NEVER));
            }
            self.tokens.push(token);
            self.top_logprobs.push(top);
        }
        offset
    }
}
