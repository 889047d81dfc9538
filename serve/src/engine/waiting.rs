//! The way back: one queue of all that comes of the engine's steps, and who waits for what of it.

use std::collections::{BTreeSet, HashMap};

use async_channel::{Receiver, Sender};

use super::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc, thread};
use crate::{Result, request::RequestId, scheduler::Update};

/// The most steps of which nothing was handed out, before the engine waits.
pub const MAX_STEPS: usize = 64;

/// Who waits for updates, by the request that these are tagged with.
#[derive(Debug, Default)]
pub struct Waiting(Mutex<HashMap<RequestId, Waiter>>);

#[derive(Debug)]
struct Waiter {
    updates: Sender<Update>,
    /// Answers that have not ended.
    open: usize,
    /// The answers that were cancelled, or all of them (`None`).
    cancelled: BTreeSet<Option<usize>>,
}

impl Waiting {
    /// Starts a thread that hands out what came of each step. When no more can come, everybody's channel
    /// closes, and the thread ends.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn hand_out(self: &Arc<Self>, steps: mpsc::Receiver<Vec<Update>>) -> Result<thread::JoinHandle<()>> {
        let waiting = self.clone();
        Ok(thread::Builder::new().name("updates".into()).spawn(move || {
            steps.into_iter().for_each(|updates| waiting.tell(updates));
            waiting.waiters().clear();
        })?)
    }

    /// The updates of so many answers to a request, from now on.
    pub fn add(&self, id: RequestId, open: usize) -> Receiver<Update> {
        // No more than an update for each token, so that nobody waits to send one.
        let (updates, receiver) = async_channel::unbounded();
        self.waiters().insert(id, Waiter { updates, open, cancelled: BTreeSet::new() });
        receiver
    }

    /// Notes that an answer to a request is cancelled, or all are, and returns whether there is
    /// something to cancel that was not before.
    pub fn cancel(&self, id: RequestId, choice: Option<usize>) -> bool {
        self.waiters().get_mut(&id).is_some_and(|waiter| waiter.cancelled.insert(choice))
    }

    /// Hands out what came of a step.
    fn tell(&self, updates: Vec<Update>) {
        let mut waiters = self.waiters();
        for update in updates {
            let id = update.request;
            let Some(waiter) = waiters.get_mut(&id) else { continue };
            waiter.open -= usize::from(update.finish.is_some());
            let ended = waiter.open == 0;
            // Who has left has cancelled.
            let _ = waiter.updates.try_send(update);
            if ended {
                waiters.remove(&id);
            }
        }
    }

    /// Nothing panics while this is half changed.
    fn waiters(&self) -> MutexGuard<'_, HashMap<RequestId, Waiter>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
