//! Processes of their own for chat templates, with bounds of memory and time.
//!
//! A template is a program that comes with a model. Its steps can be counted where it runs, but not what they
//! take: `x ~ x` forty times is all memory that there is, and a list of lists can be deeper than the stack. So
//! it runs in another process, which the system ends when it takes more than 1 GiB or 10 s of computing. That
//! process is this program once more, started when it is needed, and kept for the next template.
//!
//! For that, a program calls [`init`] first, as `flashinfer` does. In others, templates run in the
//! program itself, where only their steps (20 million) and what they write (64 MiB) are bounded. The system's
//! bound of memory is Linux's; elsewhere it may not hold.

use std::{
    convert::Infallible,
    env, fs,
    io::{self, ErrorKind},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            net::UnixStream,
            process::{CommandExt, ExitStatusExt},
        },
    },
    panic::{self, AssertUnwindSafe},
    process::{self, Child, Command, Stdio},
    sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use jiff::Zoned;
use rustix::{
    process::{Resource, Rlimit, getrlimit, setrlimit},
    time::{ClockId, clock_gettime},
};
use serde::Deserialize;
use serde_json::{Deserializer, Map, Value};

use super::{error::ChatError, jinja::Jinja};
use crate::{
    Result,
    frame::{self, Kind},
};

/// The variable that says what the process is for.
const ASKED_FOR: &str = "FLASHINFER_RUN_TEMPLATES";
/// What it is called in lists of processes.
const NAME: &str = "flashinfer-templates";
/// The most memory that it takes, in bytes.
const MEMORY: u64 = 1 << 30;
/// The most that a template may compute, in seconds.
const SECONDS: u64 = 10;
/// How large its stack may grow, in bytes.
const STACK: u64 = 8 << 20;
/// How long an answer is waited for, whatever the process is doing.
const PATIENCE: Duration = Duration::from_secs(60);
/// The most processes at a time.
const PROCESSES: usize = 8;
/// The most bytes of variables after which a process is kept, as it may keep the memory that they took.
const KEPT_BYTES: usize = 1 << 20;
/// How many templates each keeps compiled: those of a model, and where a chat needs other stand-ins.
const KEPT: usize = 4;

static OF_PROGRAM: OnceLock<Sandbox> = OnceLock::new();

/// Has chat templates run in processes of their own from now on. To be called first in `main`:
/// these are this program once more, and there this does not return.
///
/// ```no_run
/// fn main() -> flashinfer_serve::Result<()> {
///     flashinfer_serve::text::sandbox::init();
///     let llm = flashinfer_serve::Llm::open("somebodys-model.gguf")?;
///     // …
/// #   drop(llm);
///     Ok(())
/// }
/// ```
pub fn init() {
    if is_asked_for() {
        answer();
    }
    OF_PROGRAM.get_or_init(|| Sandbox::new(this_program));
}

/// Whether this process was started for templates.
fn is_asked_for() -> bool {
    env::var_os(ASKED_FOR).is_some()
}

/// This program, also where its file was replaced.
fn this_program() -> io::Result<Command> {
    Ok(match cfg!(target_os = "linux") {
        true => Command::new("/proc/self/exe"),
        false => Command::new(env::current_exe()?),
    })
}

/// Runs templates in other processes.
pub(super) struct Sandbox {
    program: fn() -> io::Result<Command>,
    patience: Duration,
    pool: Mutex<Pool>,
    /// Told when a process has nothing to do, or another may be started.
    free: Condvar,
}

/// The processes of a sandbox.
#[derive(Default)]
struct Pool {
    /// Those that wait, the last used last.
    idle: Vec<Process>,
    /// How many run a template, or are started for one.
    busy: usize,
}

impl Sandbox {
    const fn new(program: fn() -> io::Result<Command>) -> Self {
        let pool = Mutex::new(Pool { idle: Vec::new(), busy: 0 });
        Self { program, patience: PATIENCE, pool, free: Condvar::new() }
    }

    /// That of a program which called [`init`].
    pub fn of_program() -> Option<&'static Self> {
        OF_PROGRAM.get()
    }

    /// Whether a template is one. No process is kept for that.
    pub fn compile(&self, source: &str) -> Result<(), ChatError> {
        let mut turn = self.turn();
        let compiled = self.ask(&mut turn.process, [source.as_bytes(), &[], &[]]);
        turn.process = None;
        compiled.map(drop)
    }

    /// What a template writes.
    pub fn render(
        &self,
        source: &str,
        variables: &Map<String, Value>,
        now: Option<&Zoned>,
    ) -> Result<String, ChatError> {
        let variables = serde_json::to_vec(variables).map_err(not_run)?;
        let now = now.map(Zoned::to_string).unwrap_or_default();
        let mut turn = self.turn();
        let answer = self.ask(&mut turn.process, [source.as_bytes(), &variables, now.as_bytes()]);
        if variables.len() > KEPT_BYTES {
            turn.process = None;
        }
        answer
    }

    /// What a process answers, which is started if there is none, and taken away if it fails.
    fn ask(&self, place: &mut Option<Process>, request: [&[u8]; 3]) -> Result<String, ChatError> {
        let mut process = match place.take().and_then(Process::living) {
            Some(process) => process,
            None => (self.program)()
                .and_then(|command| Process::start(command, self.patience))
                .map_err(|error| not_run(format!("its process cannot be started: {error}")))?,
        };
        let answer = process.ask(request).map_err(|error| process.end(&error))?;
        *place = Some(process);
        answer
    }

    /// Waits for one of the processes.
    fn turn(&self) -> Turn<'_> {
        let mut pool = self.pool();
        while pool.busy == PROCESSES {
            pool = self.free.wait(pool).unwrap_or_else(PoisonError::into_inner);
        }
        pool.busy += 1;
        Turn { sandbox: self, process: pool.idle.pop() }
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of the processes, or that another may be started. It is given back when this is dropped.
struct Turn<'a> {
    sandbox: &'a Sandbox,
    process: Option<Process>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut pool = self.sandbox.pool();
        pool.busy -= 1;
        pool.idle.extend(self.process.take());
        self.sandbox.free.notify_one();
    }
}

fn not_run(why: impl std::fmt::Display) -> ChatError {
    ChatError::NotRun(format!("the model's chat template cannot be run: {why}"))
}

/// A process that was started. It is killed when this is dropped.
struct Process {
    child: Child,
    stream: UnixStream,
}

impl Process {
    /// Starts one. It gets no signals of the terminal, and ends when this process has, once it is done.
    fn start(mut command: Command, patience: Duration) -> io::Result<Self> {
        let (stream, other) = UnixStream::pair()?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        command.env(ASKED_FOR, "1").arg0(NAME).process_group(0);
        command.stdin(OwnedFd::from(other)).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self { child: command.spawn()?, stream })
    }

    /// The same, unless it has ended meanwhile.
    fn living(mut self) -> Option<Self> {
        matches!(self.child.try_wait(), Ok(None)).then_some(self)
    }

    /// What a template writes, or why it does not; an error if the process does not say.
    fn ask(&mut self, request: [&[u8]; 3]) -> io::Result<Result<String, ChatError>> {
        for bytes in request {
            frame::write(&mut self.stream, Kind::Message, bytes)?;
        }
        let mut message = || match frame::read_any(&mut self.stream)? {
            (Kind::Message, bytes) => String::from_utf8(bytes).map_err(io::Error::other),
            (_, why) => Err(io::Error::other(String::from_utf8_lossy(&why))),
        };
        // What is wrong, or nothing and the text.
        match message()? {
            wrong if wrong.is_empty() => message().map(Ok),
            wrong => Ok(Err(ChatError::Template(wrong))),
        }
    }

    /// Why there is no answer.
    fn end(&mut self, error: &io::Error) -> ChatError {
        match error.kind() {
            // It has ended.
            ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => (),
            ErrorKind::WouldBlock | ErrorKind::TimedOut => return not_run("it does not answer in time"),
            _ => return not_run(error),
        }
        // If it only closed the connection.
        let _ = self.child.kill();
        let template = "the model's chat template";
        match self.child.wait().map(|status| (status, status.signal())) {
            Ok((_, Some(libc::SIGXCPU))) => {
                ChatError::TakesTooMuch(format!("{template} computes for more than {SECONDS} s"))
            }
            Ok((_, Some(libc::SIGABRT | libc::SIGBUS | libc::SIGSEGV))) => ChatError::TakesTooMuch(format!(
                "{template} takes more than {} GiB of memory, or nests too deep",
                MEMORY >> 30
            )),
            Ok((status, _)) => not_run(format!("its process ended with {status}")),
            Err(error) => not_run(error),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Answers as the process that was started, until the other one closes the connection or ends.
fn answer() -> ! {
    // For `top`, where it is `exe` otherwise, after the link that was started. It may fail.
    let _ = fs::write("/proc/self/comm", NAME);
    let stdin = io::stdin().as_fd().try_clone_to_owned();
    let Ok(mut stream) = stdin.map(UnixStream::from) else { process::exit(1) };
    let Err(error) = limit().and_then(|()| run(&mut stream));
    // Nobody may be there any more.
    let _ = frame::write(&mut stream, Kind::Failed, error.to_string().as_bytes());
    process::exit(1)
}

fn run(stream: &mut UnixStream) -> Result<Infallible> {
    let mut compiled = Vec::new();
    loop {
        limit_computing()?;
        let mut message = || frame::read_any(stream).map(|(_, bytes)| bytes);
        let (source, variables, now) = (String::from_utf8(message()?)?, message()?, message()?);
        let rendered = first_to_go(|| {
            panic::catch_unwind(AssertUnwindSafe(|| render(&mut compiled, source, &variables, &now)))
        });
        let rendered = rendered.map_err(|_| "the template engine panicked")?;
        let (wrong, text) = match rendered {
            Ok(text) => (String::new(), Some(text)),
            Err(error) => (error.to_string(), None),
        };
        for text in [Some(wrong), text].into_iter().flatten() {
            frame::write(stream, Kind::Message, text.as_bytes())?;
        }
    }
}

/// Does something, and meanwhile has the system end this process first where memory runs out.
fn first_to_go<T>(work: impl FnOnce() -> T) -> T {
    const SCORE: &str = "/proc/self/oom_score_adj";
    let usual = fs::read_to_string(SCORE);
    // Where there is no such file, systems choose by other rules.
    let _ = fs::write(SCORE, "1000");
    let result = work();
    let _ = usual.and_then(|usual| fs::write(SCORE, usual));
    result
}

/// What a template writes, or nothing if there are no variables; `compiled` are the last ones.
fn render(
    compiled: &mut Vec<(String, Jinja)>,
    source: String,
    variables: &[u8],
    now: &[u8],
) -> Result<String> {
    let place = compiled.iter().position(|(known, _)| *known == source);
    let (source, jinja) = match place {
        Some(place) => compiled.remove(place),
        None => (source.clone(), Jinja::compile(source)?),
    };
    compiled.truncate(KEPT - 1);
    compiled.insert(0, (source, jinja));
    if variables.is_empty() {
        return Ok(String::new());
    }
    let now = str::from_utf8(now)?;
    let now: Option<Zoned> = if now.is_empty() { None } else { Some(now.parse()?) };
    // They may be as deep as they were, as the stack is this process's own.
    let mut variables = Deserializer::from_slice(variables);
    variables.disable_recursion_limit();
    Ok(compiled[0].1.render(&Map::deserialize(&mut variables)?, now.as_ref())?)
}

/// Bounds what this process takes. What it computes is bounded for each template.
fn limit() -> Result<()> {
    for (resource, most) in [(Resource::Data, MEMORY), (Resource::Stack, STACK), (Resource::Core, 0)] {
        set_limit(resource, most, Some(most))?;
    }
    Ok(())
}

fn limit_computing() -> Result<()> {
    let used = clock_gettime(ClockId::ProcessCPUTime).tv_sec.unsigned_abs();
    // The second that has begun, too.
    set_limit(Resource::Cpu, used + 1 + SECONDS, None)
}

/// Sets a limit, and the most that it can be set to later, as far as they may be.
fn set_limit(resource: Resource, most: u64, later: Option<u64>) -> Result<()> {
    let maximum = getrlimit(resource).maximum;
    let within = |limit: u64| maximum.map_or(limit, |maximum| limit.min(maximum));
    Ok(setrlimit(resource, Rlimit { current: Some(within(most)), maximum: later.map(within).or(maximum) })?)
}

#[cfg(test)]
mod tests;
