//! The engine: one thread owns the scheduler, the pool and the backend, and answers
//! requests that come, are cancelled and leave at any time.
//!
//! Callers meet the thread in two bounded queues, as in a ring. One leads to it: requests, as
//! many as [`EngineConfig::max_queued`] and [`EngineConfig::max_queued_tokens`] allow, and
//! cancellations of these. The other leads back: what came of each step, in one piece,
//! tagged with requests and their answers. A thread hands it out to those who wait, so that
//! the engine sends once for each step, however many requests run. Text is made of tokens
//! where the [`Events`] are taken.
//!
//! A caller that leaves has its request cancelled before the next step. A step that
//! fails ends the requests that cannot be computed alone either. If nothing can be
//! computed any more, the engine is [`Unwell`](Health::Unwell) until a step succeeds. If the thread ends, all requests do,
//! with an error.

mod events;
mod models;
mod step_tokens;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod waiting;
mod worker;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use flashinfer_rs::kv::PageAllocator;

/// What threads meet in. `tests/schedules.rs` puts others in its place, which try schedules.
mod sync {
    pub use std::{
        sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
        thread,
    };
}

/// The most commands that have room in the queue to the thread, so that a large
/// [`EngineConfig::max_queued`] takes no memory by itself.
const MAX_COMMANDS: usize = 1 << 14;
/// How long a drop waits for the step that is being computed, unless it is said.
pub const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);

pub use self::{
    events::{End, Event, Events},
    models::Models,
    step_tokens::StepTokens,
};
use self::{
    waiting::{MAX_STEPS, Waiting},
    worker::Worker,
};
use crate::{
    Result,
    constraint::{Compiler, Constraint, Grammar, InvalidConstraint},
    request::{Bounds, Request, RequestId, SubmitError},
    sampling::InvalidParameter,
    scheduler::{Limits, Stats},
    text::Text,
};

/// What an engine may use.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// What bounds its steps and every request.
    pub limits: Limits,
    /// Tokens of a page of the KV cache.
    pub page_size: usize,
    /// Pages of the KV cache.
    pub num_pages: usize,
    /// The most answers that run or wait at a time.
    pub max_queued: usize,
    /// The most tokens of their prompts together. A request is taken when there is no
    /// other, however long it is.
    pub max_queued_tokens: usize,
    /// How long a drop waits for the step that is being computed. After that the thread is left
    /// behind, and ends with its step.
    pub shutdown_timeout: Duration,
}

impl EngineConfig {
    /// Room for 8192 tokens in pages of 16, and for 1024 answers to prompts of four
    /// million tokens.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            page_size: 16,
            num_pages: 512,
            max_queued: 1024,
            max_queued_tokens: 1 << 22,
            shutdown_timeout: SHUTDOWN_TIMEOUT,
        }
    }
}

/// How an engine is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Health {
    /// It computes, or waits for requests.
    #[default]
    Well,
    /// A step failed, and after it one of a single token, too, for this reason. It goes
    /// on with what comes, and while nothing does, tries again each second.
    Unwell(String),
    /// Its thread has ended, for this reason. Everything is refused.
    Dead(String),
}

/// What an engine does, for health checks and metrics.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// How it is.
    pub health: Health,
    /// Since when it is [`Unwell`](Health::Unwell), if it is.
    pub unwell_since: Option<Instant>,
    /// What was counted so far.
    pub stats: Stats,
    /// Since when the current step is computed, if one is. One that takes much longer
    /// than others may never end.
    pub step_since: Option<Instant>,
    /// Answers that run.
    pub running: usize,
    /// Answers that wait.
    pub waiting: usize,
    /// Pages in use, those of cached prefixes included.
    pub used_pages: usize,
    /// Those of them that answers hold that run.
    pub held_pages: usize,
    /// How many tokens steps computed.
    pub step_tokens: StepTokens,
    /// Time of all steps, for the share of their tokens that read prompts.
    pub reading: Duration,
    /// The rest of the time of all steps.
    pub decoding: Duration,
    /// Requests of which a token has come.
    pub answered: usize,
    /// The time that this took, of all of them together.
    pub time_to_first_token: Duration,
}

impl Status {
    /// Notes whether anything can be computed, or why not.
    fn found(&mut self, outcome: std::result::Result<(), String>) {
        (self.health, self.unwell_since) = match outcome {
            Ok(()) => (Health::Well, None),
            Err(reason) => (Health::Unwell(reason), self.unwell_since.or_else(|| Some(Instant::now()))),
        };
    }
}

/// What is sent to the thread.
enum Command {
    Submit(RequestId, Box<Request>),
    Cancel(RequestId, Option<usize>),
    Shutdown,
}

/// Ends requests.
struct Cancel {
    commands: mpsc::SyncSender<Command>,
    waiting: Arc<Waiting>,
}

impl Cancel {
    /// Ends a request, or one of its answers, unless it has ended. It is sent once, so that
    /// there is room for it.
    fn send(&self, id: RequestId, choice: Option<usize>) {
        if self.waiting.cancel(id, choice) {
            // An engine that is gone has nothing to cancel.
            let _ = self.commands.send(Command::Cancel(id, choice));
        }
    }
}

/// What the thread and its callers share.
#[derive(Debug, Default)]
struct Shared {
    status: Mutex<Status>,
    queue: Mutex<Queue>,
}

/// Requests that have not ended.
#[derive(Clone, Copy, Debug, Default)]
struct Queue {
    answers: usize,
    tokens: usize,
}

impl Shared {
    /// Nothing panics while the status is half changed.
    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`status`](Self::status).
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the engine is gone.
    fn reason(&self) -> String {
        match &self.status().health {
            Health::Dead(reason) => reason.clone(),
            _ => "its thread has ended".into(),
        }
    }
}

/// An engine, which ends when this is dropped: after the step that is being computed,
/// unless that takes longer than [`EngineConfig::shutdown_timeout`]. It can be shared by threads.
pub struct Engine {
    config: EngineConfig,
    bounds: Bounds,
    text: Arc<Text>,
    compiler: Compiler,
    commands: mpsc::SyncSender<Command>,
    waiting: Arc<Waiting>,
    shared: Arc<Shared>,
    next_id: AtomicU64,
    /// The one that computes, and the one that hands out what it says, which ends after it.
    threads: Vec<JoinHandle<()>>,
    /// Closes when the thread has ended.
    ended: Mutex<mpsc::Receiver<()>>,
}

impl Engine {
    /// Starts an engine, and waits until `load` has made its backend, or [`Models`], on the
    /// engine's thread: for steps of [`Limits::step_capacity`], of limits that it may change
    /// before.
    ///
    /// # Errors
    /// A limit is 0, there are no pages, no thread can be started, or those of `load`.
    pub fn start<M: Into<Models>>(
        config: EngineConfig,
        text: Arc<Text>,
        load: impl FnOnce(&PageAllocator, &mut Limits) -> Result<M> + Send + 'static,
    ) -> Result<Self> {
        let EngineConfig { page_size, num_pages, .. } = config;
        for (name, value) in [
            ("step_tokens", config.limits.step_tokens),
            ("max_running", config.limits.max_running),
            ("context", config.limits.context),
            ("max_queued", config.max_queued),
        ] {
            if value == 0 {
                return Err(format!("{name} is 0; expected at least 1").into());
            }
        }
        let pool = PageAllocator::new(num_pages, page_size)?;
        // For each answer a request and two cancellations: where it is told to stop, and where its
        // caller leaves.
        let room = config.max_queued.saturating_mul(3).min(MAX_COMMANDS);
        let (commands, receiver) = mpsc::sync_channel(room);
        let waiting = Arc::<Waiting>::default();
        let (updates, steps) = mpsc::sync_channel(MAX_STEPS);
        let hands_out = waiting.hand_out(steps)?;
        let (ready, started) = mpsc::sync_channel(1);
        let (running, ended) = mpsc::sync_channel(0);
        let shared = Arc::<Shared>::default();
        let (mut limits, of_thread) = (config.limits.clone(), shared.clone());
        let thread = thread::Builder::new().name("engine".into()).spawn(move || {
            let _running = running;
            let load = move || -> Result<_> {
                let models = load(&pool, &mut limits)?.into();
                Ok(Worker::new(&pool, limits, models, updates, of_thread))
            };
            match worker::catch(load) {
                Ok(Ok(worker)) => {
                    let _ = ready.send(Ok(worker.bounds()));
                    worker.run(receiver);
                }
                Ok(Err(error)) | Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        })?;
        let threads = vec![thread, hands_out];
        let ended_early = |_| Err("the engine's thread ended while it was loading".into());
        let bounds = match started.recv().unwrap_or_else(ended_early) {
            Ok(bounds) => bounds,
            Err(error) => {
                threads.into_iter().for_each(|thread| drop(thread.join()));
                return Err(error);
            }
        };
        let (next_id, ended) = (AtomicU64::new(0), Mutex::new(ended));
        let compiler = Compiler::new(&text);
        Ok(Self { config, bounds, text, compiler, commands, waiting, shared, next_id, threads, ended })
    }

    /// What every request has to fit.
    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// What it was started with.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// The model's tokenizer.
    pub fn text(&self) -> &Arc<Text> {
        &self.text
    }

    /// What it does.
    pub fn status(&self) -> Status {
        self.shared.status().clone()
    }

    /// Compiles what answers have to be, for [`Request::grammar`]. This takes milliseconds, and
    /// the first time longer, on the caller's thread.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn compile(&self, constraint: &Constraint) -> Result<Grammar, InvalidConstraint> {
        self.compiler.compile(constraint)
    }

    /// Has a request answered. This does not wait for the engine's step.
    ///
    /// # Errors
    /// The request could never be answered; the queue is full; or the engine is gone.
    pub fn submit(&self, request: Request) -> Result<Events, SubmitError> {
        self.bounds.check(&request)?;
        if request.grammar.as_ref().is_some_and(|grammar| !self.compiler.is_of(grammar)) {
            let problem = "it was compiled by another engine; expected one of this".into();
            return Err(InvalidConstraint { kind: "constraint", problem }.into());
        }
        if let Health::Dead(reason) = &self.shared.status().health {
            return Err(SubmitError::Dead(reason.clone()));
        }
        self.enqueue(&request)?;
        let id = RequestId(self.next_id.fetch_add(1, Ordering::Relaxed));
        // Before the thread knows of it. Should that have ended meanwhile, nothing can be sent.
        let updates = self.waiting.add(id, request.params.n);
        let cancel = Cancel { commands: self.commands.clone(), waiting: self.waiting.clone() };
        let events = Events::new(id, &request, &self.text, updates, cancel, self.shared.clone());
        let command = Command::Submit(id, Box::new(request));
        self.commands.send(command).map_err(|_| SubmitError::Dead(self.shared.reason()))?;
        Ok(events)
    }

    /// Ends a request, whose answers then have [`Cancelled`](crate::request::Finish::Cancelled)
    /// events, unless they have ended.
    pub fn cancel(&self, id: RequestId) {
        Cancel { commands: self.commands.clone(), waiting: self.waiting.clone() }.send(id, None);
    }

    /// Takes a place in the queue.
    fn enqueue(&self, request: &Request) -> Result<(), SubmitError> {
        let EngineConfig { max_queued, max_queued_tokens: max_tokens, .. } = self.config;
        let (answers, tokens) = (request.params.n, request.prompt.len());
        if answers > max_queued {
            let expected = format!("at most {max_queued}, which is all that may wait");
            return Err(InvalidParameter { name: "n", given: answers.to_string(), expected }.into());
        }
        let mut queue = self.shared.queue();
        let full = queue.answers + answers > max_queued || queue.tokens + tokens > max_tokens;
        if full && queue.answers > 0 {
            let Queue { answers, tokens } = *queue;
            return Err(SubmitError::QueueFull { answers, tokens, max_answers: max_queued, max_tokens });
        }
        queue.answers += answers;
        queue.tokens += tokens;
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Shutdown);
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        let hangs = ended.recv_timeout(self.config.shutdown_timeout) == Err(mpsc::RecvTimeoutError::Timeout);
        for thread in self.threads.drain(..).filter(|_| !hangs) {
            // What it panicked with is its health.
            let _ = thread.join();
        }
    }
}
