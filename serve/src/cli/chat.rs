//! A conversation, as a model reads it.

use crate::{
    Result,
    text::{ChatOptions, Message, Role, Text},
};

/// What was said, and what the model is told before.
#[derive(Clone, Debug, Default)]
pub struct Chat {
    /// The system prompt, instead of the model's own.
    pub system: Option<String>,
    said: Vec<Message>,
}

impl Chat {
    /// A conversation in which nothing was said.
    pub fn new(system: Option<String>) -> Self {
        Self { system, said: Vec::new() }
    }

    /// Asks the next question.
    pub fn ask(&mut self, question: &str) {
        self.said.push(Message::new(Role::User, question));
    }

    /// Takes the answer to the last question.
    pub fn answer(&mut self, answer: &str) {
        self.said.push(Message::new(Role::Assistant, answer));
    }

    /// Takes back the last question, which has no answer.
    pub fn take_back(&mut self) {
        self.said.pop();
    }

    /// Whether nothing was said.
    pub fn is_empty(&self) -> bool {
        self.said.is_empty()
    }

    /// Forgets what was said, but for the system prompt.
    pub fn clear(&mut self) {
        self.said.clear();
    }

    /// The tokens of all that was said, up to where the model's next answer begins.
    ///
    /// # Errors
    /// What the model's template says of such a conversation.
    pub fn encode(&self, text: &Text) -> Result<Vec<u32>> {
        let system = self.system.iter().map(|system| Message::new(Role::System, system.as_str()));
        let messages: Vec<_> = system.chain(self.said.iter().cloned()).collect();
        text.render_chat(&messages, &[], &ChatOptions::default())
    }
}
