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

/// Steps that capture the graphs of as many requests: greedy ones, and ones that sample, in each lane.
const STEPS: usize = 2 * LANES;

/// Captures the graphs of up to so many requests of a model of so many positions, those of few first, until so much
/// time has passed or the pool has too few pages for them. What is not captured then is when it is needed. Returns
/// up to how many requests have theirs, but for contexts that do not fit beside so many.
pub fn capture_graphs(
    backend: &mut dyn Backend,
    pool: &PageAllocator,
    positions: usize,
    most: usize,
    limit: Duration,
) -> Result<usize> {
    let (start, mut captured) = (Instant::now(), 0);
    // Of keys that are not divided, and of keys that may be.
    let mut contexts = vec![0, MOST_UNDIVIDED.min(positions.saturating_sub(STEPS))];
    contexts.dedup();
    while captured < most {
        let next = (2 * captured).max(1).min(most);
        for &context in &contexts {
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

/// Takes steps of so many requests, of which the first has said so much before.
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
    for step in 0..STEPS {
        let temperature = if step < LANES { 0.0 } else { 1.0 };
        let output = |row| Output { temperature, ..Output::greedy(row) };
        let outputs: Vec<_> = (0..requests).map(output).collect();
        batch.append(repeat_n(1, requests))?;
        backend.step(&Step { batch: &batch, tokens: &tokens, outputs: &outputs })?;
    }
    Ok(())
}

fn is_out_of_pages(error: &crate::Error) -> bool {
    matches!(error.downcast_ref(), Some(FlashInferError::OutOfPages { .. }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Sample;

    /// Requests and the longest of them of each step, of a model that has so many positions.
    struct Recorder {
        positions: usize,
        steps: Vec<(usize, usize)>,
    }

    impl Backend for Recorder {
        fn vocab_size(&self) -> usize {
            2
        }

        fn enqueue(&mut self, step: &Step<'_>) -> Result<()> {
            let longest = step.batch.sequences().iter().map(Sequence::len).max().unwrap();
            self.steps.push((step.batch.len(), longest));
            let fits = longest <= self.positions;
            fits.then_some(()).ok_or_else(|| format!("position {longest} of {}", self.positions).into())
        }

        fn collect(&mut self) -> Result<Vec<Sample>> {
            Ok(Vec::new())
        }

        fn logits(&self) -> Result<Vec<f32>> {
            Ok(Vec::new())
        }
    }

    #[test]
    fn contexts_are_no_longer_than_the_model_has() {
        let pool = PageAllocator::new(1024, 16).unwrap();
        for positions in [STEPS, 100, 2048, 2052, 8192] {
            let mut model = Recorder { positions, steps: Vec::new() };
            let captured = capture_graphs(&mut model, &pool, positions, 4, Duration::MAX).unwrap();
            let longest =
                |requests| model.steps.iter().filter(|step| step.0 == requests).map(|step| step.1).max();
            let most = Some(positions.min(MOST_UNDIVIDED + STEPS));
            assert_eq!((captured, longest(1), longest(2), longest(4)), (4, most, most, most));
        }
    }

    #[test]
    fn what_does_not_fit_is_left_for_later() {
        let mut model = Recorder { positions: 8192, steps: Vec::new() };
        let pool = PageAllocator::new(32, 16).unwrap();
        assert_eq!(capture_graphs(&mut model, &pool, 8192, 64, Duration::ZERO).unwrap(), 0);
        assert_eq!(capture_graphs(&mut model, &pool, 8192, 64, Duration::MAX).unwrap(), 32);
        assert!(model.steps.iter().all(|&(_, longest)| longest <= STEPS));
    }
}
