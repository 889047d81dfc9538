//! A conversation's turns, as a model reads them.

use crate::{Result, text::Text};

/// What was said, and what the model is told before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chat {
    /// The system prompt, instead of the model's own.
    pub system: Option<String>,
    /// The questions, each with its answer, if it has one yet.
    turns: Vec<Turn>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Turn {
    question: String,
    answer: Option<String>,
}

impl Chat {
    /// A conversation in which nothing was said.
    pub fn new(system: Option<String>) -> Self {
        Self { system, turns: Vec::new() }
    }

    /// Asks the next question.
    pub fn ask(&mut self, question: &str) {
        self.turns.push(Turn { question: question.into(), answer: None });
    }

    /// Takes the answer to the last question.
    pub fn answer(&mut self, answer: String) {
        if let Some(turn) = self.turns.last_mut() {
            turn.answer = Some(answer);
        }
    }

    /// Takes back the last question.
    pub fn take_back(&mut self) {
        self.turns.pop();
    }

    /// Whether nothing was said.
    pub fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    /// Forgets what was said, but for the system prompt.
    pub fn clear(&mut self) {
        self.turns.clear();
    }

    /// The tokens of all that was said, up to where the model's next answer begins.
    pub fn encode(&self, text: &Text) -> Result<Vec<u32>> {
        let question = self.turns.last().map_or("", |turn| turn.question.as_str());
        text.encode_chat(self.system.as_deref(), question)
    }
}
