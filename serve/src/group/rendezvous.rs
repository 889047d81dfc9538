//! How ranks find each other: rank 0 listens, the others connect.

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind, Read},
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    process,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

use super::{Connection, Group, MEETING, OnFailure, Placement};
use crate::{
    Result,
    frame::{self, Kind},
    model::shard::Rank,
};

/// How often rank 0 is looked for, or asks whether somebody came.
const INTERVAL: Duration = Duration::from_millis(20);
/// How long somebody who connected may take to say who it is.
const GREETING: Duration = Duration::from_secs(5);
/// The longest message before ranks know each other, in bytes.
const LONGEST: u32 = 1 << 16;

/// What all ranks have to be started with, by name.
pub type Settings = BTreeMap<String, String>;

/// What ranks find each other by. It is not printed, as the secret is in it.
#[derive(Clone)]
pub struct Rendezvous {
    /// Which rank this process is.
    pub placement: Placement,
    /// What all have to know, so that no other process takes the place of one. May be empty.
    pub secret: String,
    /// How long to wait for all.
    pub timeout: Duration,
}

/// What a rank says first.
#[derive(Serialize, Deserialize)]
struct Hello {
    version: String,
    secret: String,
    rank: usize,
    size: usize,
    /// Whether the connection is for numbers.
    for_numbers: bool,
    settings: Settings,
    process: u32,
}

/// What rank 0 answers when all are there.
#[derive(Serialize, Deserialize)]
enum Answer {
    Welcome,
    Refused(String),
}

impl Rendezvous {
    /// Waits until all ranks are there.
    ///
    /// # Errors
    /// Not all came in time; one was started with other settings; or rank 0 cannot listen.
    pub fn meet(&self, settings: Settings, on_failure: OnFailure) -> Result<Group> {
        match self.placement.rank {
            Rank { rank: 0, .. } => self.meet_at(self.listen()?, settings, on_failure, &mut || Ok(())),
            rank => Group::new(rank, vec![self.join(&settings)?], on_failure),
        }
    }

    /// As [`meet`](Self::meet) of rank 0, with a listener that is bound. `check` says whether there is
    /// still somebody to wait for.
    ///
    /// # Errors
    /// As there, and those of `check`.
    pub fn meet_at(
        &self,
        listener: TcpListener,
        settings: Settings,
        on_failure: OnFailure,
        check: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Group> {
        let connections = self.gather(listener, &settings, check)?;
        Group::new(self.placement.rank, connections, on_failure)
    }

    fn listen(&self) -> Result<TcpListener> {
        let Placement { address, port, .. } = &self.placement;
        Ok(TcpListener::bind((address.as_str(), *port)).map_err(|error| {
            format!(
                "rank 0 cannot listen at {address} port {port}: {error}; MASTER_ADDR is to be an address of its \
                 machine, and MASTER_PORT free there"
            )
        })?)
    }

    /// Takes the connections of all other ranks.
    fn gather(
        &self,
        listener: TcpListener,
        settings: &Settings,
        check: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Vec<Connection>> {
        listener.set_nonblocking(true)?;
        let (greeted, greetings) = mpsc::channel();
        let (begin, size) = (Instant::now(), self.placement.rank.size);
        // By rank: the connections for messages and for numbers, and what the rank said.
        let mut came: BTreeMap<usize, [Option<TcpStream>; 2]> = BTreeMap::new();
        let mut places = BTreeMap::new();
        while came.values().flatten().flatten().count() < 2 * (size - 1) {
            if begin.elapsed() > self.timeout {
                let whole =
                    |rank: &usize| came.get(rank).is_some_and(|both| both.iter().all(Option::is_some));
                let missing: Vec<_> =
                    (1..size).filter(|rank| !whole(rank)).map(|rank| rank.to_string()).collect();
                let seconds = self.timeout.as_secs();
                return Err(
                    format!("of {size} ranks, {} did not come in {seconds} s", missing.join(", ")).into()
                );
            }
            check()?;
            match listener.accept() {
                // Each says who it is on a thread of its own, so that none holds the others.
                Ok((connection, address)) => {
                    let greeted = greeted.clone();
                    thread::Builder::new().name("greeting".into()).spawn(move || {
                        // Who says nothing that can be understood is none of ours.
                        if let Some((hello, connection)) = greeting(connection) {
                            // It may be too late.
                            let _ = greeted.send((hello, connection, address));
                        }
                    })?;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(format!("no rank can connect: {error}").into()),
            }
            let Ok((hello, mut connection, address)) = greetings.recv_timeout(INTERVAL) else { continue };
            if let Err(Refusal { reason, ends }) = self.check(&hello, settings, &came) {
                let _ = send(&mut connection, &Answer::Refused(reason.clone()));
                if ends {
                    return Err(reason.into());
                }
                tracing::warn!("{address} was refused: {reason}");
                continue;
            }
            places.insert(hello.rank, format!("{}, process {}", address.ip(), hello.process));
            came.entry(hello.rank).or_default()[usize::from(hello.for_numbers)] = Some(connection);
        }
        let mut connections = Vec::new();
        for (rank, both) in came {
            let [Some(mut messages), Some(mut numbers)] = both else {
                return Err(format!("rank {rank} has not connected").into());
            };
            for connection in [&mut messages, &mut numbers] {
                send(connection, &Answer::Welcome)
                    .map_err(|error| format!("rank {rank} ended while the ranks were meeting: {error}"))?;
                settle(connection)?;
            }
            let place = places.remove(&rank).unwrap_or_default();
            connections.push(Connection { rank, place, messages, numbers });
        }
        Ok(connections)
    }

    /// Why somebody is no rank of these.
    fn check(
        &self,
        hello: &Hello,
        settings: &Settings,
        came: &BTreeMap<usize, [Option<TcpStream>; 2]>,
    ) -> Result<(), Refusal> {
        let refuse = |ends: bool, reason: String| Err(Refusal { reason, ends });
        if !bool::from(hello.secret.as_bytes().ct_eq(self.secret.as_bytes())) {
            return refuse(false, "it does not know the secret of these ranks".into());
        }
        let (rank, size) = (hello.rank, self.placement.rank.size);
        if hello.version != env!("CARGO_PKG_VERSION") {
            let ours = env!("CARGO_PKG_VERSION");
            return refuse(true, format!("rank {rank} has version {}, and rank 0 {ours}", hello.version));
        }
        if hello.size != size {
            return refuse(true, format!("rank {rank} is one of {}, and rank 0 one of {size}", hello.size));
        }
        if rank == 0 || rank >= size {
            return refuse(true, format!("a process is rank {rank} of {size}; expected 1 to {}", size - 1));
        }
        if came.get(&rank).is_some_and(|both| both[usize::from(hello.for_numbers)].is_some()) {
            return refuse(true, format!("a second process is rank {rank}; expected one of each"));
        }
        let names = settings.keys().chain(hello.settings.keys());
        let differs = |name: &&String| settings.get(*name) != hello.settings.get(*name);
        match names.into_iter().find(differs) {
            None => Ok(()),
            Some(name) => {
                let of = |settings: &Settings| settings.get(name).cloned().unwrap_or_else(|| "none".into());
                let (theirs, ours) = (of(&hello.settings), of(settings));
                refuse(
                    true,
                    format!("{name} of rank {rank} is {theirs}, and of rank 0 {ours}; expected the same"),
                )
            }
        }
    }

    /// Connects to rank 0.
    fn join(&self, settings: &Settings) -> Result<Connection> {
        let Placement { rank, address, port, .. } = &self.placement;
        let begin = Instant::now();
        let connect = |for_numbers: bool| -> Result<TcpStream> {
            let mut connection = loop {
                match first_that_answers(address, *port) {
                    Ok(connection) => break connection,
                    // It may not listen yet; once it did, it does.
                    Err(_) if !for_numbers && begin.elapsed() < self.timeout => thread::sleep(INTERVAL),
                    Err(error) => {
                        let place = format!("{address} port {port} (MASTER_ADDR, MASTER_PORT)");
                        return Err(
                            format!("rank {} cannot reach rank 0 at {place}: {error}", rank.rank).into()
                        );
                    }
                }
            };
            let hello = Hello {
                version: env!("CARGO_PKG_VERSION").into(),
                secret: self.secret.clone(),
                rank: rank.rank,
                size: rank.size,
                for_numbers,
                settings: settings.clone(),
                process: process::id(),
            };
            send(&mut connection, &hello)?;
            Ok(connection)
        };
        let (mut messages, mut numbers) = (connect(false)?, connect(true)?);
        let place = messages.peer_addr()?.ip().to_string();
        for connection in [&mut messages, &mut numbers] {
            // Others may come later, however soon rank 0 was to be found.
            let all = self.timeout.max(Duration::from_secs(MEETING));
            connection.set_read_timeout(Some(all + GREETING))?;
            match receive(connection) {
                Ok(Answer::Welcome) => settle(connection)?,
                Ok(Answer::Refused(reason)) => {
                    return Err(format!("rank 0 refused rank {}: {reason}", rank.rank).into());
                }
                Err(error) => return Err(format!("rank 0 did not answer: {error}").into()),
            }
        }
        Ok(Connection { rank: 0, place, messages, numbers })
    }
}

struct Refusal {
    reason: String,
    /// Whether it is a rank of these, so that they cannot meet.
    ends: bool,
}

/// What somebody who connected says, if it is one of ours.
fn greeting(connection: TcpStream) -> Option<(Hello, TcpStream)> {
    connection.set_nonblocking(false).ok()?;
    connection.set_write_timeout(Some(GREETING)).ok()?;
    let mut until = Until { connection, end: Instant::now() + GREETING };
    let (_, bytes) = frame::read(&mut until, LONGEST).ok()?;
    Some((postcard::from_bytes(&bytes).ok()?, until.connection))
}

/// A connection that is read until a time, however little comes of it at once.
struct Until {
    connection: TcpStream,
    end: Instant,
}

impl Read for Until {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        self.connection.set_read_timeout(Some(left))?;
        self.connection.read(buffer)
    }
}

/// From now on, a connection waits as long as it takes.
fn settle(connection: &TcpStream) -> Result<()> {
    connection.set_read_timeout(None)?;
    connection.set_write_timeout(None)?;
    Ok(connection.set_nodelay(true)?)
}

fn send(connection: &mut TcpStream, message: &impl Serialize) -> Result<()> {
    Ok(frame::write(connection, Kind::Message, &postcard::to_stdvec(message)?)?)
}

fn receive<T: for<'a> Deserialize<'a>>(connection: &mut TcpStream) -> Result<T> {
    let (_, bytes) = frame::read(connection, LONGEST)?;
    Ok(postcard::from_bytes(&bytes)?)
}

fn first_that_answers(address: &str, port: u16) -> Result<TcpStream> {
    let mut failed: crate::Error = "it has no address".into();
    for address in (address, port).to_socket_addrs()? {
        match connect(&address) {
            Ok(connection) => return Ok(connection),
            Err(error) => failed = error.into(),
        }
    }
    Err(failed)
}

fn connect(address: &SocketAddr) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(address, GREETING)
}
