//! A server's life: it starts to answer, its model is loaded, and it ends.

use std::{future::pending, io, net::TcpListener, sync::Arc, thread, time::Duration};

use socket2::SockRef;
#[cfg(unix)]
use tokio::signal::unix;
use tokio::{
    sync::{oneshot, watch},
    time,
};

use super::{Server, connections, router};
use crate::{Llm, Result, exit};

/// What a program's exit code is that a signal ended.
const EXIT_CODE: i32 = 130;

/// The most connections that wait to be accepted.
const BACKLOG: i32 = 4096;

/// What loads a model.
pub type Load = Box<dyn FnOnce() -> Result<Llm> + Send>;

/// Whether a server is about to end, and how many requests it still answers.
pub struct Life {
    draining: watch::Sender<bool>,
    active: watch::Sender<usize>,
}

impl Default for Life {
    fn default() -> Self {
        Self { draining: watch::Sender::new(false), active: watch::Sender::new(0) }
    }
}

/// A request that is answered, until this is dropped.
pub struct Active(watch::Sender<usize>);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.send_modify(|active| *active -= 1);
    }
}

impl Life {
    /// Whether the server takes no more requests.
    pub fn drains(&self) -> bool {
        *self.draining.borrow()
    }

    /// Takes no more requests.
    pub fn drain(&self) {
        self.draining.send_replace(true);
    }

    /// Counts a request.
    pub fn begin(&self) -> Active {
        self.active.send_modify(|active| *active += 1);
        Active(self.active.clone())
    }

    /// Waits until the server is told to end, and all requests are answered or have had
    /// their time.
    pub async fn ended(&self, drain_timeout: Duration) {
        // The senders are here, so both waits end with what they wait for.
        let _ = self.draining.subscribe().wait_for(|draining| *draining).await;
        let mut active = self.active.subscribe();
        tracing::info!(requests = *active.borrow(), "shutting down");
        let done = time::timeout(drain_timeout, active.wait_for(|active| *active == 0)).await.is_ok();
        if !done {
            tracing::warn!(requests = *self.active.borrow(), "requests are given up");
        }
    }
}

/// See [`Server::run`].
pub async fn run(server: &Arc<Server>, listener: TcpListener, load: Load) -> Result<()> {
    // So that many clients may come at once; the system may have a lower limit.
    SockRef::from(&listener).listen(BACKLOG)?;
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let loading = load_model(server, load)?;
    let signals = tokio::spawn(end_on_signals(Signals::new()?, server.clone()));
    let serving = connections::serve(listener, router::router(server), &server.life, &server.options);
    let served = tokio::select! {
        () = serving => Ok(()),
        error = loading => Err(error),
    };
    signals.abort();
    served
}

/// Loads the model on a thread of its own. What is returned ends if that fails.
fn load_model(server: &Arc<Server>, load: Load) -> Result<impl Future<Output = crate::Error> + use<>> {
    let (failed, failure) = oneshot::channel();
    let (server, loaded) = (server.clone(), server.clone());
    thread::Builder::new().name("load".into()).spawn(move || match load() {
        Ok(llm) => {
            tracing::info!(model = server.name, place = llm.place(), "the model is loaded");
            let _ = server.llm.set(llm);
        }
        // The server may have ended.
        Err(error) => drop(failed.send(error)),
    })?;
    Ok(async move {
        match failure.await {
            Ok(error) => error,
            Err(_) if loaded.llm.get().is_some() => pending().await,
            Err(_) => "the thread that loads the model panicked; the reason is above".into(),
        }
    })
}

/// The first signal drains, and the second ends the program.
async fn end_on_signals(mut signals: Signals, server: Arc<Server>) {
    signals.next().await;
    server.drain();
    signals.next().await;
    tracing::warn!("a second signal ends the server at once");
    exit::at_once(EXIT_CODE);
}

/// Ctrl-C, and what a service is ended by.
#[cfg(unix)]
struct Signals {
    interrupt: unix::Signal,
    terminate: unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn new() -> io::Result<Self> {
        let [interrupt, terminate] =
            [unix::SignalKind::interrupt(), unix::SignalKind::terminate()].map(unix::signal);
        Ok(Self { interrupt: interrupt?, terminate: terminate? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Ctrl-C.
#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            pending::<()>().await;
        }
    }
}
