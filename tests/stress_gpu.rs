//! Attention from many threads on a few streams, all at once, every result against the reference.
//! `FLASHINFER_RS_TEST_SECONDS` says for how long, 5 seconds unless it is set.
#![cfg(feature = "cudarc")]

mod common;

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Instant,
};

use common::{
    Gpu, Rng,
    ops::{Batch, Op},
    say,
};

const STREAMS: usize = 4;
/// Those that share a stream.
const THREADS: usize = 8;

/// Queries and keys of requests: short, of one page, of several blocks, divided, and none.
const SHAPES: [&[(usize, usize)]; 4] =
    [&[(1, 1), (1, 200), (2, 16)], &[(5, 37), (7, 61)], &[(1, 3000)], &[(3, 17), (0, 5), (1, 64), (9, 700)]];

/// A batch, and what is expected of it.
struct Problem {
    batch: Batch,
    out: Vec<f64>,
    lse: Vec<f64>,
}

impl Problem {
    fn random(rng: &mut Rng, op: Op, shape: &[(usize, usize)]) -> Self {
        let batch = Batch::random(rng, op, shape);
        let (out, lse) = batch.expected();
        Self { batch, out, lse }
    }

    fn check(&self, gpu: &Gpu) {
        let results = self.batch.run(gpu);
        assert!(
            results.is_close((&self.out, &self.lse)),
            "{:?} of {:?} is wrong",
            self.batch.op,
            self.batch.requests
        );
    }
}

#[test]
fn threads_that_share_streams_get_their_own_results() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let (rng, time) = (&mut Rng::new(), test_support::seconds(5));
    let ops = Op::all(&gpu);
    assert!(ops.len() >= 8, "{ops:?}");
    let shapes = |op: Op| SHAPES.into_iter().map(move |shape| (op, shape));
    let problems: Vec<_> =
        ops.iter().flat_map(|&op| shapes(op)).map(|(op, shape)| Problem::random(rng, op, shape)).collect();
    // Once each, which loads the kernels.
    problems.iter().for_each(|problem| problem.check(&gpu));
    let streams: [_; STREAMS] = std::array::from_fn(|_| gpu.fork());
    let (checked, begin) = (AtomicUsize::new(0), Instant::now());
    thread::scope(|scope| {
        for (at, stream) in streams.iter().cycle().take(STREAMS * THREADS).enumerate() {
            let (problems, checked, mut rng) = (&problems, &checked, Rng::seeded(rng.bits()));
            scope.spawn(move || {
                while begin.elapsed() < time {
                    let problem = &problems[rng.below(problems.len())];
                    // Some threads live for one call.
                    match at % 4 {
                        0 => thread::scope(|scope| scope.spawn(|| problem.check(stream)).join().unwrap()),
                        _ => problem.check(stream),
                    }
                    checked.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    streams.iter().for_each(Gpu::synchronize);
    let checked = checked.into_inner();
    say(&format!("{checked} batches of {} kinds in {:?}, all as on the CPU", ops.len(), begin.elapsed()));
    assert!(checked >= STREAMS * THREADS);
}
