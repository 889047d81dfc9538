//! Turns: what is computed at a time for requests that the engine does not have yet. Bodies are read, chats are written,
//! texts become tokens and schemas grammars: on threads of their own, as it would hold up connections.
//!
//! A request waits for its turns in its own task, so that one whose client has left waits no longer. What has begun
//! goes on, and keeps its turns until it is done.

use std::{sync::Arc, thread};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::spawn_blocking,
};

use super::error::ApiError;

/// The fewest and the most threads that compute; between them, as many as there are cores.
const THREADS: [usize; 2] = [4, 32];
/// The most chats at a time: no more than there are processes for their templates, so that no thread waits for one.
const CHATS: usize = 8;

/// A turn, until its last clone is dropped.
pub type Turn = Arc<OwnedSemaphorePermit>;

/// Who may compute.
pub struct Turns {
    threads: Arc<Semaphore>,
    /// Of the threads at most half, so that others need not wait for templates.
    pub chats: Arc<Semaphore>,
    /// Of the chats at most half, so that small ones need not wait for large ones, nor memory be there for many of
    /// these.
    pub large: Arc<Semaphore>,
}

impl Default for Turns {
    fn default() -> Self {
        let [fewest, most] = THREADS;
        let threads = thread::available_parallelism().map_or(1, usize::from).clamp(fewest, most);
        let chats = CHATS.min(threads / 2);
        let [threads, chats, large] = [threads, chats, chats / 2].map(Semaphore::new).map(Arc::new);
        Self { threads, chats, large }
    }
}

impl Turns {
    /// Waits until one of these has a turn for this request.
    pub async fn of(turns: &Arc<Semaphore>) -> Result<Turn, ApiError> {
        turns.clone().acquire_owned().await.map(Arc::new).map_err(|_| ApiError::internal())
    }

    /// Computes something on a thread; `held` are the turns that it is part of, which end with it.
    pub async fn compute<T: Send + 'static>(
        &self,
        held: impl Send + 'static,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let thread = Self::of(&self.threads).await?;
        let work = move || {
            let result = work();
            drop((thread, held));
            result
        };
        spawn_blocking(work).await.map_err(|error| {
            tracing::error!(%error, "a request was not worked out");
            ApiError::internal()
        })
    }
}
