//! Graphs that are captured before they are needed.

use std::{
    iter::{once, repeat_n},
    time::{Duration, Instant},
};

use flashinfer_rs::{
    FlashInferError,
    kv::{Batch, PageAllocator, Sequence},
};

use super::{lanes::LANES, split::MOST_UNDIVIDED};
use crate::{
    Result,
    backend::{Backend, Output, Step, StepToken},
};

/// Captures the graphs of up to so many requests, those of few first, until so much time has
/// passed or the pool has too few pages for them. What is not captured then is when it is needed. Returns
/// up to how many requests have theirs, but for contexts that do not fit beside so many.
pub fn capture_graphs(
    backend: &mut dyn Backend,
    pool: &PageAllocator,
    most: usize,
    limit: Duration,
) -> Result<usize> {
    let (start, mut captured) = (Instant::now(), 0);
    while captured < most {
        let next = (2 * captured).max(1).min(most);
        // Keys that are not divided, and keys that may be.
        for context in [0, MOST_UNDIVIDED] {
            if start.elapsed() >= limit {
                return Ok(captured);
            }
            match capture_bucket(backend, pool, next, context) {
                // So long a context does not fit beside so many requests, and more of them still may.
                Err(error) if is_out_of_pages(&error) && context > 0 => {}
                Err(error) if is_out_of_pages(&error) => return Ok(captured),
                done => done?,
            }
        }
        captured = next;
    }
    Ok(captured)
}

/// Takes steps of so many requests, of which the first has said so much before: greedy ones, and
/// ones that sample, with each lane.
fn capture_bucket(
    backend: &mut dyn Backend,
    pool: &PageAllocator,
    requests: usize,
    context: usize,
) -> Result<()> {
    let mut batch = Batch::new(pool);
    for _ in 0..requests {
        batch.push(Sequence::new(pool))?;
    }
    // That is not computed, as nobody looks at what is chosen.
    batch.append(once(context).chain(repeat_n(0, requests - 1)))?;
    let tokens = vec![StepToken::Known(0); requests];
    for temperature in [0.0, 1.0] {
        let output = |row| Output { temperature, ..Output::greedy(row) };
        let outputs: Vec<_> = (0..requests).map(output).collect();
        for _ in 0..LANES {
            batch.append(repeat_n(1, requests))?;
            backend.step(&Step { batch: &batch, tokens: &tokens, outputs: &outputs })?;
        }
    }
    Ok(())
}

fn is_out_of_pages(error: &crate::Error) -> bool {
    matches!(error.downcast_ref(), Some(FlashInferError::OutOfPages { .. }))
}
