//! Ranks on the CPU against the whole model.

use std::{sync::Mutex, thread};

use flashinfer_rs::kv::{Batch, PageAllocator, Sequence};

use super::*;
use crate::{
    backend::{
        Output, StepToken,
        cpu::Cpu,
        simulated::{Language, Simulated},
    },
    group::tests::with_ranks,
    model::{Model, shard::Rank},
    sampling::SamplingParams,
    scheduler::{
        Limits, Stats,
        testing::{Requests, greedy},
    },
    tests::{Tiny, forward},
};

const PAGE_SIZE: usize = 4;

/// A rank's part of a model.
fn part(file: &std::path::Path, pool: &PageAllocator, group: &Group) -> Cpu {
    let model = Model::open(file).unwrap().divide(group.rank()).unwrap();
    let config = model.shard_config();
    Cpu::of_rank(&config, model.ends().unwrap(), model.layers(), pool, group.take_sums()).unwrap()
}

/// Has so many ranks compute a model, of which rank 0 is given to `work`.
fn led<T: Send>(
    tiny: &Tiny,
    size: usize,
    num_pages: usize,
    work: impl Fn(&mut dyn Backend, &PageAllocator) -> T + Sync,
) -> T {
    let folder = tempfile::tempdir().unwrap();
    let file = tiny.write(&folder);
    let all = with_ranks(size, |group| {
        let pool = PageAllocator::new(num_pages, PAGE_SIZE).unwrap();
        let mut local = part(&file, &pool, &group);
        if group.rank().rank > 0 {
            follow(&mut local, &pool, &group).unwrap();
            return None;
        }
        let mut leader = Leader::new(local, group).unwrap();
        Some(work(&mut leader, &pool))
    });
    all.into_iter().flatten().next().unwrap()
}

/// The logits of a batch of two requests, and of a step after it.
fn logits(backend: &mut dyn Backend, pool: &PageAllocator) -> Vec<f32> {
    let mut batch = Batch::new(pool);
    let mut all = Vec::new();
    for _ in 0..2 {
        batch.push(Sequence::new(pool)).unwrap();
    }
    for lens in [[5, 2], [1, 1], [0, 3]] {
        batch.append(lens).unwrap();
        let count = lens.iter().sum::<usize>();
        let tokens: Vec<_> = (0..count as u32).map(|at| StepToken::Known(at * 37 % 250)).collect();
        let outputs: Vec<_> = (0..count).map(Output::greedy).collect();
        backend.step(&Step { batch: &batch, tokens: &tokens, outputs: &outputs }).unwrap();
        all.extend(backend.logits().unwrap());
    }
    all
}

/// The norm of what differs, relative to that of the numbers.
fn difference(ours: &[f32], theirs: &[f32]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let norm =
        |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|number| number * number).sum::<f64>().sqrt();
    let off = norm(&mut ours.iter().zip(theirs).map(|(a, b)| f64::from(a - b)));
    off / norm(&mut theirs.iter().map(|number| f64::from(*number)))
}

#[test]
fn ranks_make_the_logits_of_one() {
    // Heads, groups and experts that are divided equally, unequally, and shared.
    for (tiny, sizes) in [(forward::BIASES.file(), [2, 3, 4]), (forward::EXPERTS.file(), [2, 3, 4])] {
        let alone = led(&tiny, 1, 16, logits);
        for size in sizes {
            let several = led(&tiny, size, 16, logits);
            let off = difference(&several, &alone);
            assert!(off < 2e-6, "{size} ranks: {off}");
        }
    }
}

/// What requests are answered whose pages run out, so that some are preempted, which share prefixes
/// and have drafts.
fn answers(backend: &mut dyn Backend, pool: &PageAllocator) -> (Vec<Vec<u32>>, Stats) {
    let limits =
        Limits { step_tokens: 16, chunk_tokens: 16, max_running: 8, context: 64, draft: 3, ends: [2].into() };
    let mut requests = Requests::new(pool, backend.vocab_size(), limits);
    let mut ids = Vec::new();
    for index in 0..9u32 {
        let prompt: Vec<_> = (0..6 + index % 3 * 4).map(|at| 10 + at + index % 2).collect();
        let mut params = greedy(20);
        if index % 3 == 1 {
            (params.temperature, params.seed, params.n) = (0.8, Some(index.into()), 2);
        }
        ids.push(requests.submit(&prompt, &params).unwrap());
    }
    requests.finish(backend);
    let answers = ids.into_iter().map(|index| requests.answer(index).ids()).collect();
    (answers, requests.scheduler.stats())
}

#[test]
fn answers_are_those_of_one_with_drafts_forks_and_preemption() {
    let tiny = forward::BIASES.file();
    let (alone, stats) = led(&tiny, 1, 24, answers);
    assert!(stats.preemptions > 0 && stats.drafted > 0 && stats.saved > 0, "{stats:?}");
    let (several, theirs) = led(&tiny, 2, 24, answers);
    assert_eq!(several, alone);
    assert_eq!(theirs.steps, stats.steps);
}

/// Keeps what a stand-in chooses.
struct ChoiceLog {
    local: Simulated,
    chosen: Arc<Mutex<Vec<Option<u32>>>>,
}

impl Backend for ChoiceLog {
    fn vocab_size(&self) -> usize {
        self.local.vocab_size()
    }

    fn is_asynchronous(&self) -> bool {
        true
    }

    fn enqueue(&mut self, step: &Step<'_>) -> Result<()> {
        self.local.enqueue(step)
    }

    fn collect(&mut self) -> Result<Vec<Sample>> {
        let samples = self.local.collect()?;
        self.chosen.lock().unwrap().extend(samples.iter().map(|sample| sample.token));
        Ok(samples)
    }

    fn logits(&self) -> Result<Vec<f32>> {
        self.local.logits()
    }
}

/// All ranks choose the same tokens under penalties, after tokens that nobody has told them.
#[test]
fn penalties_of_tokens_that_are_not_known_reach_all_ranks() {
    let limits =
        Limits { step_tokens: 16, chunk_tokens: 16, max_running: 8, context: 64, draft: 0, ends: [].into() };
    let params = SamplingParams { repetition_penalty: 1.3, frequency_penalty: 0.4, ..greedy(40) };
    let local = |pool: &PageAllocator| {
        Simulated::new(pool, limits.step_capacity(), Language { vocab_size: 5, nan: 0 })
    };
    let answer = |backend: &mut dyn Backend, pool: &PageAllocator| {
        let mut requests = Requests::new(pool, 5, limits.clone());
        requests.submit(&[0, 1, 2], &params).unwrap();
        requests.finish(backend);
        requests.answer(0).ids()
    };
    let pool = || PageAllocator::new(40, PAGE_SIZE).unwrap();
    let alone = pool();
    let alone = answer(&mut local(&alone).synchronous(), &alone);
    let chosen = with_ranks(2, |group| {
        let pool = pool();
        let chosen = Arc::<Mutex<Vec<_>>>::default();
        let mut log = ChoiceLog { local: local(&pool), chosen: chosen.clone() };
        match group.rank().rank {
            0 => drop(answer(&mut Leader::new(log, group).unwrap(), &pool)),
            _ => follow(&mut log, &pool, &group).unwrap(),
        }
        let chosen: Option<Vec<_>> = chosen.lock().unwrap().iter().copied().collect();
        chosen.unwrap()
    });
    assert_eq!(chosen, [alone.clone(), alone]);
}

#[test]
fn a_rank_that_chooses_another_token_ends_all() {
    let reasons = with_ranks(2, |group| {
        let pool = PageAllocator::new(4, PAGE_SIZE).unwrap();
        let capacity = crate::backend::StepCapacity { tokens: 8, requests: 4, outputs: 4 };
        // Another vocabulary makes other numbers.
        let language = Language { vocab_size: 50 + 30 * group.rank().rank, nan: 0 };
        let mut local = Simulated::new(&pool, capacity, language);
        if group.rank().rank > 0 {
            return follow(&mut local, &pool, &group).unwrap_err().to_string();
        }
        let mut leader = Leader::new(local, group.clone()).unwrap();
        let mut batch = Batch::new(&pool);
        batch.push(Sequence::new(&pool)).unwrap();
        let failed = (0..60).find_map(|at| {
            if batch.append([1]).is_err() {
                batch.truncate(0, 0).unwrap();
                batch.append([1]).unwrap();
            }
            thread::sleep(std::time::Duration::from_millis(20));
            let step =
                Step { batch: &batch, tokens: &[StepToken::Known(at % 40)], outputs: &[Output::greedy(0)] };
            leader.step(&step).err()
        });
        failed.expect("they differ").to_string()
    });
    assert!(
        reasons[0].contains("rank 1 chose token") && reasons[0].contains("expected the same"),
        "{reasons:?}"
    );
    assert!(reasons[1].contains("rank 0"), "{reasons:?}");
}

#[test]
fn an_engine_that_panics_within_a_step_ends_the_others() {
    /// Panics when a step is enqueued.
    struct Panics;

    impl Backend for Panics {
        fn vocab_size(&self) -> usize {
            1
        }

        fn enqueue(&mut self, _: &Step<'_>) -> Result<()> {
            panic!("as it is asked")
        }

        fn collect(&mut self) -> Result<Vec<Sample>> {
            Ok(Vec::new())
        }

        fn logits(&self) -> Result<Vec<f32>> {
            Ok(Vec::new())
        }
    }

    let reasons = with_ranks(2, |group| {
        let pool = PageAllocator::new(4, PAGE_SIZE).unwrap();
        let capacity = crate::backend::StepCapacity { tokens: 8, requests: 4, outputs: 4 };
        if group.rank().rank > 0 {
            let mut local = Simulated::new(&pool, capacity, Language { vocab_size: 50, nan: 0 });
            return follow(&mut local, &pool, &group).unwrap_err().to_string();
        }
        let failure = group.failure().clone();
        let stepped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut leader = Leader::new(Panics, group).unwrap();
            leader.step(&Step { batch: &Batch::new(&pool), tokens: &[], outputs: &[] })
        }));
        assert!(stepped.is_err());
        failure.reason()
    });
    assert_eq!(reasons[0], "rank 0 ended in the midst of a step");
    assert!(reasons[1].ends_with("failed: rank 0 ended in the midst of a step"), "{reasons:?}");
}

#[test]
fn an_error_of_all_ranks_ends_none() {
    let tiny = forward::BIASES.file();
    led(&tiny, 2, 16, |backend, pool| {
        let mut batch = Batch::new(pool);
        batch.push(Sequence::new(pool)).unwrap();
        batch.append([1]).unwrap();
        let unknown =
            Step { batch: &batch, tokens: &[StepToken::Known(9999)], outputs: &[Output::greedy(0)] };
        let problem = backend.step(&unknown).unwrap_err().to_string();
        assert!(problem.contains("no token 9999"), "{problem}");
        drop(batch);
        assert_eq!(logits(backend, pool).len(), 12 * forward::BIASES.vocab);
    });
}

/// Ranks read their parts of the file's tensors, and no more.
#[test]
fn a_rank_reads_its_part() {
    let folder = tempfile::tempdir().unwrap();
    let file = forward::BIASES.file().write(&folder);
    let bytes = |size: usize| {
        let read = |rank| {
            let model = Model::open(&file).unwrap().divide(Rank { rank, size }).unwrap();
            let before = model.bytes_read();
            model.ends().unwrap();
            model.layers().for_each(|layer| drop(layer.unwrap()));
            (model.bytes_read() - before, model.bytes())
        };
        (0..size).map(read).collect::<Vec<_>>()
    };
    let [(whole, expected)] = bytes(1)[..] else { panic!() };
    assert_eq!(whole, expected);
    for (read, expected) in bytes(2) {
        assert_eq!(read, expected);
        // Biases and norms are there whole.
        assert!(read > whole * 48 / 100 && read < whole * 53 / 100, "{read} of {whole}");
    }
}
