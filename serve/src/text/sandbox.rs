//! A process of its own for chat templates, with bounds of memory and time.
//!
//! A template is a program that comes with a model. Its steps can be counted where it runs, but not what they
//! take: `x ~ x` forty times is all memory that there is, and a list of lists can be deeper than the stack. So
//! it runs in another process, which the system ends when it takes more than 1 GiB or 10 s of computing. That
//! process is this program once more, started when it is needed, and there is one for all templates.
//!
//! For that, a program calls [`init`] first, as `flashinfer` does. In others, templates run in the
//! program itself, where only their steps (20 million) and what they write (64 MiB) are bounded.

use std::{
    env,
    io::{self, ErrorKind},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            net::UnixStream,
            process::{CommandExt, ExitStatusExt},
        },
    },
    process::{self, Child, Command, Stdio},
    sync::{Mutex, OnceLock, PoisonError},
    time::Duration,
};

use jiff::Zoned;
use rustix::{
    process::{Resource, Rlimit, getrlimit, setrlimit},
    time::{ClockId, clock_gettime},
};
use serde_json::{Map, Value};

use super::jinja::Jinja;
use crate::{
    Result,
    frame::{self, Kind},
};

/// What the process is called, by which it knows what it is.
const NAME: &str = "flashinfer-templates";
/// The most memory that it takes, in bytes, beside the program's own.
const MEMORY: u64 = 1 << 30;
/// The most that a template may compute, in seconds.
const SECONDS: u64 = 10;
/// How large its stack may grow, in bytes.
const STACK: u64 = 8 << 20;
/// How long an answer is waited for, whatever the process is doing.
const PATIENCE: Duration = Duration::from_secs(60);
/// How many templates it keeps compiled: those of a model, and where a chat needs other stand-ins.
const KEPT: usize = 4;

static OF_PROGRAM: OnceLock<Sandbox> = OnceLock::new();

/// Has chat templates run in a process of their own from now on, on Unix. To be called first in `main`:
/// that process is this program once more, and there this does not return.
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

/// Whether this is the process that was started for templates.
fn is_asked_for() -> bool {
    env::args_os().next().is_some_and(|name| name == NAME)
}

/// This program, also where its file was replaced.
fn this_program() -> io::Result<Command> {
    Ok(match cfg!(target_os = "linux") {
        true => Command::new("/proc/self/exe"),
        false => Command::new(env::current_exe()?),
    })
}

/// What a template writes, or why it does not.
type Answer = Result<String, String>;

/// Runs templates in another process. One that ended is started again for the next template.
pub struct Sandbox {
    program: fn() -> io::Result<Command>,
    process: Mutex<Option<Process>>,
}

impl Sandbox {
    const fn new(program: fn() -> io::Result<Command>) -> Self {
        Self { program, process: Mutex::new(None) }
    }

    /// That of a program which called [`init`].
    pub fn of_program() -> Option<&'static Self> {
        OF_PROGRAM.get()
    }

    /// Whether a template is one.
    ///
    /// # Errors
    /// There is no process to look at it.
    pub fn compile(&self, source: &str) -> Result<Result<(), String>> {
        Ok(self.ask([source.as_bytes(), &[], &[]])?.map(|_| ()))
    }

    /// What a template writes.
    ///
    /// # Errors
    /// There is no process to run it.
    pub fn render(
        &self,
        source: &str,
        variables: &Map<String, Value>,
        now: Option<&Zoned>,
    ) -> Result<Answer> {
        let variables = serde_json::to_vec(variables)?;
        let now = now.map(Zoned::to_string).unwrap_or_default();
        self.ask([source.as_bytes(), &variables, now.as_bytes()])
    }

    fn ask(&self, request: [&[u8]; 3]) -> Result<Answer> {
        let mut kept = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let mut process = match kept.take().and_then(Process::living) {
            Some(process) => process,
            None => (self.program)()
                .and_then(Process::start)
                .map_err(|error| format!("the process of chat templates cannot be started: {error}"))?,
        };
        Ok(match process.ask(request) {
            Ok(answer) => {
                *kept = Some(process);
                answer
            }
            Err(error) => Err(process.end(&error)),
        })
    }
}

/// A process that was started. It is killed when this is dropped.
struct Process {
    child: Child,
    stream: UnixStream,
}

impl Process {
    /// Starts one. It gets no signals of the terminal, and ends with this process.
    fn start(mut command: Command) -> io::Result<Self> {
        let (stream, other) = UnixStream::pair()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        command.arg0(NAME).process_group(0).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.stdin(OwnedFd::from(other)).spawn()?;
        Ok(Self { child, stream })
    }

    /// The same, unless it has ended meanwhile.
    fn living(mut self) -> Option<Self> {
        matches!(self.child.try_wait(), Ok(None)).then_some(self)
    }

    fn ask(&mut self, request: [&[u8]; 3]) -> io::Result<Answer> {
        for bytes in request {
            frame::write(&mut self.stream, Kind::Message, bytes)?;
        }
        let (kind, bytes) = frame::read_any(&mut self.stream)?;
        let text = String::from_utf8(bytes).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        Ok(if kind == Kind::Message { Ok(text) } else { Err(text) })
    }

    /// Why there is no answer.
    fn end(mut self, error: &io::Error) -> String {
        let template = "the model's chat template";
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                return format!("{template} has written nothing after {} s", PATIENCE.as_secs());
            }
            // It has ended.
            ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => (),
            _ => return format!("{template} cannot be run: {error}"),
        }
        match self.child.wait() {
            Ok(status) => match status.signal() {
                Some(libc::SIGXCPU) => format!("{template} computes for more than {SECONDS} s"),
                Some(libc::SIGABRT | libc::SIGBUS | libc::SIGSEGV) => {
                    format!("{template} takes more than {} GiB of memory, or nests too deep", MEMORY >> 30)
                }
                _ => format!("{template} cannot be run: its process ended with {status}"),
            },
            Err(error) => format!("{template} cannot be run: {error}"),
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
    let stdin = io::stdin().as_fd().try_clone_to_owned();
    let Ok(mut stream) = stdin.map(UnixStream::from) else { process::exit(1) };
    if let Err(error) = limit().and_then(|()| run(&mut stream)) {
        // Nobody may be there any more.
        let _ = frame::write(&mut stream, Kind::Failed, error.to_string().as_bytes());
    }
    process::exit(0)
}

fn run(stream: &mut UnixStream) -> Result<()> {
    let mut compiled = Vec::new();
    loop {
        let mut message = || frame::read_any(stream).map(|(_, bytes)| bytes);
        let (source, variables, now) = (String::from_utf8(message()?)?, message()?, message()?);
        limit_computing()?;
        match render(&mut compiled, source, &variables, &now) {
            Ok(text) => frame::write(stream, Kind::Message, text.as_bytes())?,
            Err(error) => frame::write(stream, Kind::Failed, error.to_string().as_bytes())?,
        }
    }
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
    compiled[0].1.render(&serde_json::from_slice(variables)?, now.as_ref())
}

/// Bounds what this process takes. What it computes is bounded for each template.
fn limit() -> Result<()> {
    for (resource, most) in [(Resource::Data, MEMORY), (Resource::Stack, STACK), (Resource::Core, 0)] {
        lower(resource, most, false)?;
    }
    Ok(())
}

fn limit_computing() -> Result<()> {
    let used = clock_gettime(ClockId::ProcessCPUTime).tv_sec.unsigned_abs();
    // The seconds that were begun.
    lower(Resource::Cpu, used + 1 + SECONDS, true)
}

/// Sets a limit, which can be raised again or not; it stays below what it may be.
fn lower(resource: Resource, most: u64, again: bool) -> Result<()> {
    let maximum = getrlimit(resource).maximum;
    let most = maximum.map_or(most, |maximum| most.min(maximum));
    let maximum = if again { maximum } else { Some(most) };
    Ok(setrlimit(resource, Rlimit { current: Some(most), maximum })?)
}

#[cfg(test)]
mod tests;
