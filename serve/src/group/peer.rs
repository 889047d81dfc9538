//! Another rank: its messages, and whether it lives.

use std::{
    io::{self, ErrorKind},
    net::TcpStream,
    sync::{
        Arc, Mutex,
        mpsc::{self, RecvTimeoutError, Sender},
    },
    thread,
    time::Duration,
};

use super::{
    Received,
    failure::{Failure, Stopper, lock},
};
use crate::{
    Result,
    frame::{self, Kind},
};

/// How often each side says that it lives.
const ALIVE_INTERVAL: Duration = Duration::from_secs(1);
/// How long a rank may be silent, or take nothing in.
const SILENCE: Duration = Duration::from_secs(10);

/// Another rank.
pub struct Peer {
    name: String,
    writer: Arc<Mutex<TcpStream>>,
    failure: Arc<Failure>,
}

impl Peer {
    /// Starts to listen to it. Its messages go to `messages`.
    pub fn new(
        rank: usize,
        place: String,
        connection: TcpStream,
        messages: Sender<Received>,
        failure: Arc<Failure>,
    ) -> Result<Self> {
        connection.set_nodelay(true)?;
        connection.set_read_timeout(Some(SILENCE))?;
        connection.set_write_timeout(Some(SILENCE))?;
        let name = format!("rank {rank} ({place})");
        let reader = connection.try_clone()?;
        let of_thread = (name.clone(), failure.clone());
        thread::Builder::new().name(format!("rank-{rank}")).spawn(move || {
            let (name, failure) = of_thread;
            match listen(reader, rank, &messages) {
                // The others go on until rank 0 says that this is over.
                Ok(()) if rank == 0 || failure.is_ending() => failure.set_ending(),
                Ok(()) => failure.fail(&format!("{name} ended before rank 0 was done")),
                Err(reason) => failure.fail(&format!("{name} {reason}")),
            }
        })?;
        Ok(Self { name, writer: Arc::new(Mutex::new(connection)), failure })
    }

    /// Sends a message.
    ///
    /// # Errors
    /// It cannot be reached, which ends all ranks.
    pub fn send(&self, bytes: &[u8]) -> Result<()> {
        frame::write(&mut *lock(&self.writer), Kind::Message, bytes).map_err(|error| {
            self.failure.fail(&format!("{} cannot be reached: {error}", self.name));
            self.failure.reason().into()
        })
    }

    /// Tells it that this rank cannot go on.
    pub fn say_failed(&self, reason: &str) {
        // It may be gone.
        let _ = frame::write(&mut *lock(&self.writer), Kind::Failed, reason.as_bytes());
    }

    /// Tells it that nothing comes any more.
    pub fn say_done(&self) {
        let _ = frame::write(&mut *lock(&self.writer), Kind::Done, &[]);
    }
}

/// Hands on what a rank says until it is done, or says why it is heard no more.
fn listen(mut reader: TcpStream, rank: usize, messages: &Sender<Received>) -> Result<(), String> {
    loop {
        match frame::read_any(&mut reader) {
            Ok((Kind::Alive, _)) => {}
            Ok((Kind::Message, bytes)) => {
                // Nobody may wait for messages any more.
                let _ = messages.send((rank, bytes));
            }
            Ok((Kind::Failed, reason)) => {
                return Err(format!("failed: {}", String::from_utf8_lossy(&reason)));
            }
            Ok((Kind::Done, _)) => return Ok(()),
            Err(error) => return Err(heard_no_more(&error)),
        }
    }
}

fn heard_no_more(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            format!("was silent for {} seconds", SILENCE.as_secs())
        }
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => "has ended".into(),
        _ => format!("cannot be heard: {error}"),
    }
}

/// Tells ranks that this one lives, until what is returned is dropped.
pub fn say_alive(peers: &[Peer]) -> Result<Stopper> {
    let writers: Vec<_> = peers.iter().map(|peer| peer.writer.clone()).collect();
    let (stop, stopped) = mpsc::channel();
    thread::Builder::new().name("alive".into()).spawn(move || {
        while stopped.recv_timeout(ALIVE_INTERVAL) == Err(RecvTimeoutError::Timeout) {
            for writer in &writers {
                // Who listens to it finds out that it is gone.
                let _ = frame::write(&mut *lock(writer), Kind::Alive, &[]);
            }
        }
    })?;
    Ok(Stopper(stop))
}
