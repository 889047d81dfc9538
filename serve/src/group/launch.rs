//! The other ranks of this machine, started by rank 0.

use std::{
    env,
    net::TcpListener,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rand::RngExt;

use super::{Group, OnFailure, Placement, Rendezvous, Settings};
use crate::{Result, model::shard::Rank};

/// What ranks that are started here know each other by.
pub const SECRET: &str = "FLASHINFER_GROUP_SECRET";
/// How long they may take to end.
const ENDING: Duration = Duration::from_secs(5);

/// Processes that were started. They end with the group, and are waited for when this is dropped.
pub struct Launched(Vec<Child>);

impl Launched {
    /// Starts this program once more for each rank but the first, with the arguments of this process,
    /// and waits until they are there. They get no signals of the terminal, as rank 0 tells them what
    /// to do.
    ///
    /// # Errors
    /// One cannot be started, or does not come.
    pub fn start(
        size: usize,
        timeout: Duration,
        settings: Settings,
        on_failure: OnFailure,
    ) -> Result<(Group, Self)> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let port = listener.local_addr()?.port();
        let secret = format!("{:032x}", rand::rng().random::<u128>());
        let mut started = Self(Vec::new());
        for rank in 1..size {
            let mut command = Command::new(env::current_exe()?);
            command
                .args(env::args_os().skip(1))
                .env("RANK", rank.to_string())
                .env("WORLD_SIZE", size.to_string())
                .env("LOCAL_RANK", rank.to_string())
                .env("MASTER_ADDR", "127.0.0.1")
                .env("MASTER_PORT", port.to_string())
                .env_remove("TORCHELASTIC_USE_AGENT_STORE")
                .env(SECRET, &secret)
                .stdin(Stdio::null())
                .stdout(Stdio::null());
            #[cfg(unix)]
            std::os::unix::process::CommandExt::process_group(&mut command, 0);
            let child = command.spawn().map_err(|error| format!("rank {rank} cannot be started: {error}"))?;
            started.0.push(child);
        }
        let placement =
            Placement { rank: Rank { rank: 0, size }, local_rank: 0, address: "127.0.0.1".into(), port };
        let rendezvous = Rendezvous { placement, secret, timeout };
        Ok((rendezvous.meet_at(listener, settings, on_failure)?, started))
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        let begin = Instant::now();
        for child in &mut self.0 {
            while begin.elapsed() < ENDING && matches!(child.try_wait(), Ok(None)) {
                thread::sleep(Duration::from_millis(10));
            }
            // It may have ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
