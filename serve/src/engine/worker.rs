//! The engine's thread.

use std::{
    any::Any,
    collections::HashMap,
    mem,
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError},
    },
    time::{Duration, Instant},
};

use flashinfer_rs::kv::PageAllocator;

use super::{Command, Health, Models, Shared};
use crate::{
    Error, Result,
    backend::Backend,
    request::{Bounds, Request, RequestId},
    scheduler::{Limits, Report, Scheduler, Update},
};

/// How often an engine that is unwell and has nothing to do tries whether it is well.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// How long one that is well waits at a time.
const IDLE: Duration = Duration::from_secs(3600);

/// Runs `work`, and makes an error of a panic.
pub fn catch<T>(work: impl FnOnce() -> T) -> Result<T> {
    let message = |panic: Box<dyn Any + Send>| -> Error {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        format!("the engine's thread panicked: {}", text.unwrap_or_default()).into()
    };
    // Whatever it was working on is dropped, or is of no use afterwards.
    panic::catch_unwind(AssertUnwindSafe(work)).map_err(message)
}

/// A request that has not ended.
struct Live {
    came: Instant,
    /// Whether a token has come.
    answered: bool,
    /// Answers that have not ended.
    open: usize,
    /// Tokens of the prompt.
    tokens: usize,
}

/// What the thread owns.
pub struct Worker {
    scheduler: Scheduler,
    pool: PageAllocator,
    backend: Box<dyn Backend>,
    live: HashMap<RequestId, Live>,
    /// Whether commands were taken since their effects were published.
    commanded: bool,
    updates: SyncSender<Vec<Update>>,
    shared: Arc<Shared>,
}

impl Worker {
    /// No requests yet.
    pub fn new(
        pool: &PageAllocator,
        limits: Limits,
        models: Models,
        updates: SyncSender<Vec<Update>>,
        shared: Arc<Shared>,
    ) -> Self {
        let Models { model: backend, draft } = models;
        let scheduler = Scheduler::new(pool, backend.vocab_size(), limits);
        let scheduler = match draft {
            Some(draft) => scheduler.with_draft_model(draft),
            None => scheduler,
        };
        let (pool, live) = (pool.clone(), HashMap::new());
        Self { scheduler, pool, backend, live, commanded: false, updates, shared }
    }

    /// What every request has to fit.
    pub fn bounds(&self) -> Bounds {
        self.scheduler.bounds()
    }

    /// Takes commands and steps until it is told to stop. When this returns, nothing is
    /// heard of what has not ended, and the health says why.
    pub fn run(mut self, commands: Receiver<Command>) {
        let reason = match catch(|| self.work(&commands)) {
            Ok(Ok(())) => "it was shut down".into(),
            Ok(Err(error)) | Err(error) => error.to_string(),
        };
        // Before the channels close, whose callers look here.
        self.shared.status().health = Health::Dead(reason);
        // Nothing can be asked any more, before those who wait hear that nothing comes.
        drop(commands);
    }

    fn work(&mut self, commands: &Receiver<Command>) -> Result<()> {
        loop {
            while self.scheduler.is_done() {
                let well = self.shared.status().health == Health::Well;
                match commands.recv_timeout(if well { IDLE } else { PROBE_INTERVAL }) {
                    Ok(Command::Shutdown) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
                    Ok(command) => self.take(command)?,
                    Err(RecvTimeoutError::Timeout) if well => {}
                    Err(RecvTimeoutError::Timeout) => self.probe()?,
                }
            }
            loop {
                match commands.try_recv() {
                    Ok(Command::Shutdown) | Err(TryRecvError::Disconnected) => return Ok(()),
                    Ok(command) => self.take(command)?,
                    Err(TryRecvError::Empty) => break,
                }
            }
            // Once for all commands, as it looks at all pages; the last step said the rest.
            if mem::take(&mut self.commanded) {
                self.publish();
            }
            self.step()?;
        }
    }

    fn take(&mut self, command: Command) -> Result<()> {
        self.commanded = true;
        match command {
            Command::Submit(id, request) => self.submit(id, *request),
            Command::Cancel(id, choice) => {
                let updates = self.scheduler.cancel(id, choice)?;
                self.tell(updates);
                Ok(())
            }
            Command::Shutdown => Ok(()),
        }
    }

    fn submit(&mut self, id: RequestId, request: Request) -> Result<()> {
        let (open, tokens) = (request.params.n, request.prompt.len());
        // It was checked when it came.
        self.scheduler.submit(id, request)?;
        self.live.insert(id, Live { came: Instant::now(), answered: false, open, tokens });
        Ok(())
    }

    fn step(&mut self) -> Result<()> {
        let (before, begin) = (self.scheduler.stats(), Instant::now());
        self.shared.status().step_since = Some(begin);
        let Report { updates, failure } = self.scheduler.step(&mut *self.backend)?;
        self.shared.status().step_since = None;
        let (after, took) = (self.scheduler.stats(), begin.elapsed());
        self.scheduler.observe_time(took);
        if after.steps > before.steps {
            let (read, decoded) = (after.read - before.read, after.decoded - before.decoded);
            let reading = took.mul_f64(read as f64 / (read + decoded).max(1) as f64);
            let mut status = self.shared.status();
            status.step_tokens.observe(read + decoded);
            status.reading += reading;
            status.decoding += took.saturating_sub(reading);
            if failure.is_none() {
                status.found(Ok(()));
            }
        }
        if failure.is_some() {
            self.probe()?;
        }
        // Whoever hears of an end finds it counted.
        self.publish();
        self.tell(updates);
        Ok(())
    }

    /// Finds out whether the engine is well after a step that failed.
    fn probe(&mut self) -> Result<()> {
        let outcome = self.scheduler.probe(&mut *self.backend)?;
        self.shared.status().found(outcome);
        Ok(())
    }

    /// Sends updates to those who wait for them.
    fn tell(&mut self, updates: Vec<Update>) {
        for update in &updates {
            let id = update.request;
            let Some(live) = self.live.get_mut(&id) else { continue };
            if update.token.is_some() && !mem::replace(&mut live.answered, true) {
                let mut status = self.shared.status();
                status.answered += 1;
                status.time_to_first_token += live.came.elapsed();
            }
            if update.finish.is_some() {
                live.open -= 1;
                let mut queue = self.shared.queue();
                queue.answers -= 1;
                queue.tokens -= if live.open == 0 { live.tokens } else { 0 };
            }
            if live.open == 0 {
                self.live.remove(&id);
            }
        }
        if !updates.is_empty() {
            // They are handed out as long as this can be sent.
            let _ = self.updates.send(updates);
        }
    }

    /// Says what the scheduler does.
    fn publish(&self) {
        let mut status = self.shared.status();
        status.stats = self.scheduler.stats();
        status.running = self.scheduler.running().len();
        status.waiting = self.scheduler.waiting();
        status.used_pages = self.pool.used_pages();
        status.held_pages = self.scheduler.held_pages();
    }
}
