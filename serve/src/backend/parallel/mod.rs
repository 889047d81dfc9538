//! A model that several ranks compute: rank 0 says what each step is, and all compute it.
//!
//! Rank 0 has the scheduler. Its [`Leader`] sends each step to the others before it computes its own
//! part, and they [`follow`]. All choose the same tokens out of the same logits; they tell rank 0
//! which, which compares them while the next steps are computed.

mod agreement;
mod follower;
mod message;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use self::follower::follow;
use self::{
    agreement::Agreement,
    message::{Command, Outcome, StepMessage},
};
use super::{Backend, Sample, Step};
use crate::{Result, group::Group};

/// Rank 0's part of a model, and what tells the other ranks of its steps.
pub struct Leader<B> {
    local: B,
    group: Arc<Group>,
    agreement: Agreement,
}

impl<B: Backend> Leader<B> {
    /// # Errors
    /// No thread can be started.
    pub fn new(local: B, group: Arc<Group>) -> Result<Self> {
        Ok(Self { local, agreement: Agreement::new(&group)?, group })
    }

    /// Has all ranks do something, and remembers what came of it here.
    fn all<T>(
        &mut self,
        command: &Command,
        work: impl FnOnce(&mut B) -> Result<T>,
        outcome: impl FnOnce(&T) -> Outcome,
    ) -> Result<T> {
        self.group.send(command)?;
        let done = work(&mut self.local);
        self.agreement.add(0, Outcome::of(&done, outcome));
        done
    }
}

impl<B: Backend> Backend for Leader<B> {
    fn vocab_size(&self) -> usize {
        self.local.vocab_size()
    }

    fn is_asynchronous(&self) -> bool {
        self.local.is_asynchronous()
    }

    fn enqueue(&mut self, step: &Step<'_>) -> Result<()> {
        let command = Command::Enqueue(StepMessage::new(step));
        self.all(&command, |local| local.enqueue(step), |()| Outcome::Enqueued)
    }

    fn collect(&mut self) -> Result<Vec<Sample>> {
        self.all(&Command::Collect, B::collect, |samples| Outcome::chosen(samples))
    }

    fn logits(&self) -> Result<Vec<f32>> {
        self.local.logits()
    }
}

impl<B> Drop for Leader<B> {
    fn drop(&mut self) {
        self.agreement.end();
        // Others hear of a rank that is gone anyway.
        let _ = self.group.send(&Command::End);
    }
}
