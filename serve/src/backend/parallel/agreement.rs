//! Whether all ranks come to the same.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::message::Outcome;
use crate::{Result, group::Group};

/// How often it is looked whether a rank waits for others that do not come.
const INTERVAL: Duration = Duration::from_millis(500);
/// How long others may take where one has failed.
const PATIENCE: Duration = Duration::from_secs(5);

/// What ranks came to, in the order of commands. Ends the group where they differ.
pub struct Agreement {
    shared: Arc<Shared>,
}

struct Shared {
    outcomes: Mutex<Outcomes>,
    ended: AtomicBool,
}

/// Those that are not compared yet.
struct Outcomes {
    by_rank: Vec<VecDeque<Outcome>>,
    /// Since when one has failed and others have said nothing.
    failed_since: Option<Instant>,
}

impl Agreement {
    /// Listens to the other ranks.
    pub fn new(group: &Arc<Group>) -> Result<Self> {
        let by_rank = vec![VecDeque::new(); group.rank().size];
        let outcomes = Mutex::new(Outcomes { by_rank, failed_since: None });
        let shared = Arc::new(Shared { outcomes, ended: AtomicBool::new(false) });
        let (of_thread, group) = (shared.clone(), Arc::downgrade(group));
        thread::Builder::new().name("agreement".into()).spawn(move || {
            while !of_thread.ended.load(Ordering::Acquire) {
                let Some(group) = group.upgrade() else { return };
                match group.receive_within(INTERVAL) {
                    Ok(None) => {}
                    Ok(Some((rank, outcome))) => of_thread.add(rank, outcome),
                    Err(_) if of_thread.ended.load(Ordering::Acquire) => return,
                    Err(error) => return group.failure().fail(&error.to_string()),
                }
                if let Some(reason) = of_thread.compare() {
                    group.say_failed(&reason);
                    return group.failure().fail(&reason);
                }
            }
        })?;
        Ok(Self { shared })
    }

    /// What a rank came to.
    pub fn add(&self, rank: usize, outcome: Outcome) {
        self.shared.add(rank, outcome);
    }

    /// Nothing is compared any more.
    pub fn end(&self) {
        self.shared.ended.store(true, Ordering::Release);
    }
}

impl Shared {
    fn outcomes(&self) -> std::sync::MutexGuard<'_, Outcomes> {
        // Nothing panics while they are half changed.
        self.outcomes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, rank: usize, outcome: Outcome) {
        self.outcomes().by_rank[rank].push_back(outcome);
    }

    /// Compares what all ranks have come to. Returns why they cannot go on.
    fn compare(&self) -> Option<String> {
        let mut outcomes = self.outcomes();
        while outcomes.by_rank.iter().all(|of_rank| !of_rank.is_empty()) {
            let next: Vec<_> = outcomes.by_rank.iter_mut().filter_map(VecDeque::pop_front).collect();
            outcomes.failed_since = None;
            let other = next.iter().position(|outcome| !outcome.agrees(&next[0]));
            if let Some(rank) = other {
                return Some(difference(rank, &next[0], &next[rank]));
            }
        }
        let failed = outcomes.by_rank.iter().enumerate().find_map(|(rank, of_rank)| match of_rank.front() {
            Some(Outcome::Failed(error)) => Some((rank, error.clone())),
            _ => None,
        });
        let (rank, error) = failed?;
        let since = *outcomes.failed_since.get_or_insert_with(Instant::now);
        (since.elapsed() > PATIENCE).then(|| format!("rank {rank} failed, and others wait for it: {error}"))
    }
}

fn difference(rank: usize, ours: &Outcome, theirs: &Outcome) -> String {
    match (ours, theirs) {
        (Outcome::Failed(error), _) => format!("rank 0 failed where rank {rank} did not: {error}"),
        (_, Outcome::Failed(error)) => format!("rank {rank} failed where rank 0 did not: {error}"),
        (Outcome::Chosen(ours), Outcome::Chosen(theirs)) => {
            let at = ours.iter().zip(theirs).position(|(ours, theirs)| ours != theirs);
            match at {
                Some(at) => format!(
                    "rank {rank} chose token {:?} for output {at} of a step, and rank 0 {:?}; expected the same",
                    theirs[at], ours[at]
                ),
                None => format!(
                    "rank {rank} chose {} tokens in a step, and rank 0 {}; expected as many",
                    theirs.len(),
                    ours.len()
                ),
            }
        }
        _ => format!("rank {rank} is at another step than rank 0"),
    }
}
