//! Processes that compute one model together, each on a GPU of its own: ranks, of which rank 0
//! decides and the others follow.
//!
//! Each of the others has two connections to rank 0: one for messages, on which both sides say every
//! second that they live, and one for numbers of the CPU. When a rank ends before rank 0 is done, says
//! that it failed, or is silent, the others end within seconds, and say which rank it was.
//!
//! | file | its job |
//! |---|---|
//! | `environment` | which rank this process is, as launchers say it |
//! | `launch` | starting the other ranks of one machine |
//! | `rendezvous` | finding each other |
//! | `peer` | one connection's messages, and whether the other side lives |
//! | `failure` | what ends all |
//! | `sums` | sums and gathered numbers of ranks on the CPU |

mod environment;
mod failure;
mod launch;
mod peer;
mod rendezvous;
mod sums;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    env, fmt,
    net::TcpStream,
    sync::{
        Arc, Mutex,
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    time::Duration,
};

use serde::{Serialize, de::DeserializeOwned};

pub use self::{
    environment::Placement,
    failure::{Failure, OnFailure, end_process, end_soon},
    launch::Launched,
    rendezvous::{Rendezvous, Settings},
    sums::Sums,
};
use self::{
    failure::{Stopper, lock},
    peer::Peer,
};
use crate::{Result, model::shard::Rank};

/// How long ranks wait for each other before the model is loaded, in seconds.
const TIMEOUT: &str = "FLASHINFER_GROUP_TIMEOUT";
const MEETING: u64 = 300;

fn timeout() -> Result<Duration> {
    let seconds = match env::var(TIMEOUT) {
        Err(_) => MEETING,
        Ok(value) => match value.trim().parse() {
            Ok(seconds) if seconds > 0 => seconds,
            _ => return Err(format!("{TIMEOUT} is `{value}`; expected a number of seconds above 0").into()),
        },
    };
    Ok(Duration::from_secs(seconds))
}

/// Which processes compute a model together.
#[derive(Clone, Debug)]
pub enum Parallel {
    /// This one and others that it starts on this machine, so many in all, with its arguments.
    Launch(usize),
    /// Those that a launcher started, of which this is one.
    Rank(Placement),
}

impl Parallel {
    /// Of so many processes, or those that the environment names; `None` for this one alone.
    ///
    /// # Errors
    /// The environment names another number of processes, or makes no sense.
    pub fn of(size: Option<usize>) -> Result<Option<Self>> {
        if size == Some(1) {
            return Ok(None);
        }
        match (size, Placement::from_env()?) {
            (Some(size), Some(Placement { rank, .. })) if size != rank.size => {
                let started = format!("{} processes were started", rank.size);
                Err(format!("--tensor-parallel is {size}, and {started}; expected the same").into())
            }
            (_, Some(placement)) => Ok(Some(Self::Rank(placement))),
            (Some(size), None) => Ok(Some(Self::Launch(size))),
            (None, None) => Ok(None),
        }
    }

    /// Which this process is.
    pub fn rank(&self) -> Rank {
        match self {
            Self::Launch(size) => Rank { rank: 0, size: *size },
            Self::Rank(placement) => placement.rank,
        }
    }

    /// Whether another process is rank 0.
    pub fn follows(&self) -> bool {
        self.rank().rank > 0
    }

    /// Its number among those of its machine.
    pub fn local_rank(&self) -> usize {
        match self {
            Self::Launch(_) => 0,
            Self::Rank(placement) => placement.local_rank,
        }
    }

    /// Waits until all ranks are there, which have to be started with the same settings.
    /// `FLASHINFER_GROUP_TIMEOUT` says for how many seconds: 300, if it does not.
    ///
    /// # Errors
    /// Not all came; one was started with other settings; or one cannot be started.
    pub fn meet(&self, settings: Settings, on_failure: OnFailure) -> Result<(Arc<Group>, Option<Launched>)> {
        match self {
            Self::Launch(size) => {
                let (group, launched) = Launched::start(*size, timeout()?, settings, on_failure)?;
                Ok((Arc::new(group), Some(launched)))
            }
            Self::Rank(placement) => {
                let secret = env::var(launch::SECRET).unwrap_or_default();
                let rendezvous = Rendezvous { placement: placement.clone(), secret, timeout: timeout()? };
                Ok((Arc::new(rendezvous.meet(settings, on_failure)?), None))
            }
        }
    }
}

/// A message, and the rank that it came from.
type Received = (usize, Vec<u8>);

/// The ranks, as one of them sees them. Rank 0 says when they are [done](Self::end); if one is dropped
/// before, all fail.
pub struct Group {
    rank: Rank,
    /// Of rank 0 the others, of the others rank 0.
    peers: Vec<Peer>,
    received: Mutex<Receiver<Received>>,
    sums: Mutex<Option<Sums>>,
    failure: Arc<Failure>,
    /// Ends what says that this rank lives.
    _alive: Stopper,
}

impl Group {
    /// Of connections for messages and for numbers, in the order of ranks.
    fn new(rank: Rank, connections: Vec<Connection>, on_failure: OnFailure) -> Result<Self> {
        let failure = Arc::new(Failure::new(on_failure));
        let (sender, received) = mpsc::channel();
        let (mut peers, mut numbers) = (Vec::new(), Vec::new());
        for Connection { rank, place, messages, numbers: of_peer } in connections {
            failure.closes(&messages)?;
            failure.closes(&of_peer)?;
            peers.push(Peer::new(rank, place, messages, sender.clone(), failure.clone())?);
            numbers.push(of_peer);
        }
        let alive = peer::say_alive(&peers)?;
        Ok(Self {
            rank,
            peers,
            received: Mutex::new(received),
            sums: Mutex::new(Some(Sums::new(rank, numbers))),
            failure,
            _alive: alive,
        })
    }

    /// Which of how many this process is.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// What ends all ranks.
    pub fn failure(&self) -> &Arc<Failure> {
        &self.failure
    }

    /// Sends a message: rank 0 to all others, the others to rank 0.
    ///
    /// # Errors
    /// A rank cannot be reached, which ends all.
    pub fn send(&self, message: &impl Serialize) -> Result<()> {
        let bytes = postcard::to_stdvec(message)?;
        self.peers.iter().try_for_each(|peer| peer.send(&bytes))
    }

    /// Waits for the next message, and says from which rank it is; `None` when rank 0 is done.
    ///
    /// # Errors
    /// The ranks have failed, or it is another message.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<Option<(usize, T)>> {
        let received = lock(&self.received);
        match received.recv() {
            Ok(received) => self.parse(received).map(Some),
            Err(_) => self.ended(),
        }
    }

    /// As [`receive`](Self::receive), for a while; `None`, too, if there is none.
    ///
    /// # Errors
    /// As there.
    pub fn receive_within<T: DeserializeOwned>(&self, limit: Duration) -> Result<Option<(usize, T)>> {
        let received = lock(&self.received);
        match received.recv_timeout(limit) {
            Ok(received) => self.parse(received).map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => self.ended(),
        }
    }

    /// What all ranks say, in their order. All of them call it at a time, while no other messages are sent.
    ///
    /// # Errors
    /// The ranks have failed, or say something else.
    pub fn gather<T: Clone + Serialize + DeserializeOwned>(&self, mine: T) -> Result<Vec<T>> {
        let over = "rank 0 is done while ranks gather what they say";
        if self.rank.rank > 0 {
            self.send(&mine)?;
            let (_, all) = self.receive()?.ok_or(over)?;
            return Ok(all);
        }
        let mut all = vec![None; self.rank.size];
        all[0] = Some(mine);
        while all.iter().any(Option::is_none) {
            let (from, said) = self.receive()?.ok_or(over)?;
            all[from] = Some(said);
        }
        let all: Vec<T> = all.into_iter().flatten().collect();
        self.send(&all)?;
        Ok(all)
    }

    /// Why nothing comes any more.
    fn ended<T>(&self) -> Result<Option<T>> {
        match self.failure.is_ending() {
            true => Ok(None),
            false => Err(self.failure.reason().into()),
        }
    }

    /// As rank 0, tells the others that this is over; as another one, waits until it is.
    ///
    /// # Errors
    /// The ranks have failed.
    pub fn end(&self) -> Result<()> {
        if self.rank.rank == 0 {
            self.failure.set_ending();
            self.peers.iter().for_each(Peer::say_done);
            return Ok(());
        }
        while self.receive::<()>()?.is_some() {}
        Ok(())
    }

    fn parse<T: DeserializeOwned>(&self, (rank, bytes): Received) -> Result<(usize, T)> {
        let message = postcard::from_bytes(&bytes);
        Ok((rank, message.map_err(|error| format!("rank {rank} sent what is no message: {error}"))?))
    }

    /// The connections for numbers, which one has at a time.
    pub fn take_sums(&self) -> Option<Sums> {
        lock(&self.sums).take()
    }

    /// Ends all ranks, which hear why.
    pub fn fail(&self, reason: &str) {
        self.failure.fail_after(reason, || self.peers.iter().for_each(|peer| peer.say_failed(reason)));
    }

    /// Tells the others that this rank cannot go on, unless they are done.
    pub fn say_failed(&self, reason: &str) {
        if !self.failure.is_ending() {
            self.peers.iter().for_each(|peer| peer.say_failed(reason));
        }
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group").field("rank", &self.rank).finish_non_exhaustive()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.say_failed("it ended before rank 0 was done");
        self.failure.set_ending();
    }
}

/// A rank that was found.
struct Connection {
    rank: usize,
    /// Where it is.
    place: String,
    messages: TcpStream,
    numbers: TcpStream,
}
