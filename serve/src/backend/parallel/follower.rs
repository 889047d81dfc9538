//! The ranks beside the first.

use flashinfer_rs::kv::{BatchMirror, PageAllocator};

use super::message::{Command, Outcome};
use crate::{
    Result,
    backend::{Backend, Step},
    group::Group,
};

/// Computes what rank 0 says, with a part of a model over a pool that nobody else uses, until it says
/// that this is over.
///
/// # Errors
/// The ranks have failed.
pub fn follow(local: &mut dyn Backend, pool: &PageAllocator, group: &Group) -> Result<()> {
    let mut mirror = BatchMirror::new(pool)?;
    while let Some((_, command)) = group.receive()? {
        let outcome = match command {
            Command::Enqueue(mut step) => {
                let (snapshot, outputs) = (step.take_snapshot(), step.outputs());
                let enqueued = mirror.update(&snapshot).map_err(Into::into).and_then(|batch| {
                    local.enqueue(&Step { batch, tokens: step.tokens(), outputs: &outputs })
                });
                Outcome::of(&enqueued, |()| Outcome::Enqueued)
            }
            Command::Collect => Outcome::of(&local.collect(), |samples| Outcome::chosen(samples)),
        };
        group.send(&outcome)?;
    }
    Ok(())
}
