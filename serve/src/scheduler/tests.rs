//! Schedules on an engine that is made for it: what it says of a row depends on
//! every token that the page table names, so that a page that is read by the
//! wrong request, or before it is written, changes an answer.

use std::{cell::Cell, collections::BTreeSet};

use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};

use super::*;
use crate::{backend::Sample, request::Ended};

/// Numbers that look random (splitmix64).
fn mix(bits: u64) -> u64 {
    let bits = bits.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// What is said of some tokens.
#[derive(Clone, Copy, Debug)]
struct Says {
    /// What follows is below this.
    vocab: u32,
    /// One in so many times, no token follows; 0 for never.
    fails: u64,
}

impl Says {
    fn next(self, tokens: impl IntoIterator<Item = u32>) -> Option<u32> {
        let bits = tokens.into_iter().fold(0, |all, token| mix(all ^ u64::from(token)));
        let fails = self.fails > 0 && mix(bits).is_multiple_of(self.fails);
        (!fails).then_some((bits % u64::from(self.vocab)) as u32)
    }
}

/// Tokens below this, always.
fn vocab(vocab: u32) -> Says {
    Says { vocab, fails: 0 }
}

/// Keeps tokens in place of keys and values.
struct Fake {
    pool: PageAllocator,
    says: Says,
    step_tokens: usize,
    slots: Vec<u32>,
    /// Rows of all steps.
    rows: usize,
}

impl Fake {
    fn new(pool: &PageAllocator, says: Says, step_tokens: usize) -> Self {
        let slots = vec![u32::MAX; pool.num_pages() * pool.page_size()];
        Self { pool: pool.clone(), says, step_tokens, slots, rows: 0 }
    }
}

impl Backend for Fake {
    fn vocab_size(&self) -> usize {
        self.says.vocab as usize
    }

    fn step(&mut self, step: &Step<'_>) -> Result<Vec<Sample>> {
        let (pages, queries) = (step.batch.pages(), step.batch.queries());
        assert_eq!(step.tokens.len(), queries.total());
        assert!((1..=self.step_tokens).contains(&step.tokens.len()), "{} tokens", step.tokens.len());
        assert!(step.outputs.is_sorted_by(|a, b| a.row < b.row));
        assert!(step.outputs.iter().all(|output| output.row < step.tokens.len()));
        // Nobody shares a page that is not full, so there is nothing to copy.
        assert_eq!(self.pool.pending_copies(), 0);
        let size = self.pool.page_size();
        let slot =
            |request, position| pages.pages(request)[position / size] as usize * size + position % size;
        for request in 0..step.batch.len() {
            assert!(queries.len(request) > 0, "request {request} computes nothing");
        }
        let append = step.batch.append_indices();
        let rows: Vec<_> = append.batch_indices().iter().zip(append.positions()).collect();
        for (&(&request, &position), &token) in rows.iter().zip(step.tokens) {
            self.slots[slot(request as usize, position as usize)] = token;
        }
        let outputs = step.outputs.iter().map(|output| {
            let (&request, &position) = rows[output.row];
            let before = (0..=position as usize).map(|position| self.slots[slot(request as usize, position)]);
            Sample { token: self.says.next(before), logprobs: None }
        });
        self.rows += step.tokens.len();
        Ok(outputs.collect())
    }

    fn logits(&self) -> Result<Vec<f32>> {
        unreachable!("the scheduler asks for tokens")
    }
}

/// What a prompt is answered: no pages, no other requests.
fn solo(prompt: &[u32], limits: &Limits, cache: usize, says: Says) -> Request {
    let mut request = Request::new(prompt.into(), limits, cache).unwrap();
    while request.ended().is_none() {
        match says.next(request.tokens().iter().copied()) {
            Some(token) => request.push(token, limits, cache),
            None => request.fail(),
        }
    }
    request
}

fn limits(step_tokens: usize, max_tokens: usize, draft: usize) -> Limits {
    Limits { step_tokens, max_tokens, context: 1000, draft, ends: [].into() }
}

/// Tokens that differ from those of another seed.
fn tokens(seed: u64, len: usize) -> Vec<u32> {
    (0..len as u64).map(|at| mix(seed << 32 | at) as u32 % 1000).collect()
}

/// Requests that come while others run.
#[derive(Clone, Debug)]
struct Schedule {
    page_size: usize,
    num_pages: usize,
    says: Says,
    limits: Limits,
    /// Whether what nobody uses is evicted after every step.
    evicts: bool,
    /// Steps before each, and the prompt.
    arrivals: Vec<(usize, Vec<u32>)>,
}

fn schedule() -> impl Strategy<Value = Schedule> {
    let limits = (1..14usize, 1..24usize, 6..60usize, 0..5usize, any::<bool>()).prop_map(
        |(step_tokens, max_tokens, context, draft, ends)| {
            let ends = if ends { [0].into() } else { [].into() };
            Limits { step_tokens, max_tokens, context, draft, ends }
        },
    );
    // Prompts that begin alike, or are the beginnings of each other.
    let prompt = (0..3u32, 0..20usize, prop::collection::vec(0..2u32, 1..12));
    let arrival = (prop_oneof![2 => Just(0), 1 => 0..6usize], prompt);
    let arrivals = prop::collection::vec(arrival, 1..16);
    let evicts = prop::bool::weighted(0.3);
    let says = (1..4u32, prop_oneof![Just(0), Just(20)]).prop_map(|(vocab, fails)| Says { vocab, fails });
    (1..6usize, 1..24usize, says, limits, evicts, arrivals).prop_map(
        |(page_size, num_pages, says, limits, evicts, arrivals)| {
            let prompt = |(family, shared, own): (u32, usize, Vec<u32>)| {
                let shared = (0..shared as u32).map(|at| (at * family) % 3);
                shared.chain(own).collect()
            };
            let arrivals = arrivals.into_iter().map(|(steps, parts)| (steps, prompt(parts))).collect();
            Schedule { page_size, num_pages, says, limits, evicts, arrivals }
        },
    )
}

/// Runs a schedule to its end, and compares every answer. Gives what was counted,
/// and the requests that failed.
fn run(schedule: &Schedule) -> (Stats, usize) {
    let Schedule { page_size, num_pages, says, ref limits, evicts, ref arrivals } = *schedule;
    let pool = PageAllocator::new(num_pages, page_size).unwrap();
    let (cache, most) = (num_pages * page_size, (num_pages * page_size).min(limits.context));
    let mut engine = Fake::new(&pool, says, limits.step_tokens);
    let mut scheduler = Scheduler::new(&pool, limits.clone());
    let mut step = |scheduler: &mut Scheduler| {
        scheduler.step(&mut engine).unwrap();
        if evicts {
            // All that no running request uses can go.
            scheduler.make_free(num_pages);
            let used: BTreeSet<_> = scheduler.batch.sequences().iter().flat_map(Sequence::pages).collect();
            assert_eq!(pool.used_pages(), used.len());
        }
    };
    let mut prompts: Vec<&[u32]> = Vec::new();
    for (steps, prompt) in arrivals {
        for _ in 0..*steps {
            step(&mut scheduler);
        }
        // What can never fit is refused, and nothing else.
        let pushed = scheduler.push(prompt.clone());
        assert_eq!(pushed.is_ok(), prompt.len() < most, "{pushed:?}");
        if pushed.is_ok() {
            prompts.push(prompt);
        }
    }
    // The first request that has not ended gets further in every step.
    let alone: Vec<_> = prompts.iter().map(|prompt| solo(prompt, limits, cache, says)).collect();
    let enough: usize = alone.iter().map(|request| request.tokens().len()).sum();
    for _ in 0..enough {
        step(&mut scheduler);
    }
    assert!(scheduler.is_done(), "{enough} steps are not enough");
    for (request, alone) in scheduler.requests().iter().zip(&alone) {
        assert_eq!((request.tokens(), request.ended()), (alone.tokens(), alone.ended()));
    }
    // Every token was computed as often as was counted.
    let stats = scheduler.stats();
    let failed = alone.iter().filter(|request| request.ended() == Some(Ended::NoNumbers)).count();
    let once = alone.iter().map(|request| request.tokens().len() - 1).sum::<usize>() + failed;
    assert_eq!(engine.rows, stats.read + stats.decoded);
    assert_eq!(
        engine.rows + stats.saved + stats.accepted,
        once + stats.recomputed + stats.drafted,
        "{stats:?}"
    );
    assert_eq!(stats.begun, alone.iter().filter(|request| !request.answer().is_empty()).count());
    // Only cached prefixes are left, and all of them can go.
    assert_eq!(pool.used_pages(), scheduler.prefixes.num_pages());
    assert!(scheduler.make_free(num_pages));
    drop(scheduler);
    assert_eq!(pool.free_pages(), num_pages);
    (stats, failed)
}

#[test]
fn random_schedules_answer_as_if_each_request_were_alone() {
    let (preemptions, recomputed, saved, accepted, failures) = Default::default();
    let add = |sum: &Cell<usize>, more: usize| sum.set(sum.get() + more);
    let mut runner = TestRunner::new(Config { cases: 1500, failure_persistence: None, ..Config::default() });
    runner
        .run(&schedule(), |schedule| {
            let (stats, failed) = run(&schedule);
            add(&failures, failed);
            add(&preemptions, stats.preemptions);
            add(&recomputed, stats.recomputed);
            add(&saved, stats.saved);
            add(&accepted, stats.accepted);
            Ok(())
        })
        .unwrap();
    for (what, count) in [
        ("preemptions", preemptions),
        ("tokens computed again", recomputed),
        ("tokens saved", saved),
        ("drafts accepted", accepted),
        ("requests failed", failures),
    ] {
        assert!(count.get() > 300, "{} {what}", count.get());
    }
}

#[test]
fn a_long_schedule_ends_with_no_page_lost() {
    // 300 requests that share 24 pages and three system prompts.
    let arrivals = (0..300).map(|request| {
        let mut prompt = tokens(request % 3, 12);
        prompt.extend(tokens(100 + request, 1 + request as usize % 7));
        (request as usize % 5, prompt)
    });
    let limits = Limits { context: 80, ..limits(16, 30, 3) };
    let (stats, _) = run(&Schedule {
        page_size: 4,
        num_pages: 24,
        says: vocab(3),
        limits,
        evicts: false,
        arrivals: arrivals.collect(),
    });
    assert!(stats.preemptions > 20 && stats.saved > 1000 && stats.accepted > 100, "{stats:?}");
}

#[test]
fn a_shared_prompt_is_computed_once() {
    // Five pages of 4 tokens and 3 tokens more are the same for all.
    for len in [20, 23] {
        let pool = PageAllocator::new(200, 4).unwrap();
        let mut engine = Fake::new(&pool, vocab(7), 64);
        let mut scheduler = Scheduler::new(&pool, limits(64, 6, 0));
        for question in 1..=10 {
            scheduler.push([tokens(0, len), tokens(question, 5)].concat()).unwrap();
        }
        while !scheduler.is_done() {
            scheduler.step(&mut engine).unwrap();
        }
        let stats = scheduler.stats();
        assert_eq!((stats.saved, stats.read), (9 * 20, 10 * (len + 5) - 9 * 20));
        assert_eq!((stats.decoded, stats.recomputed, stats.preemptions), (10 * 5, 0, 0));
        assert!(stats.pages <= 5 + 10 * (len + 5 + 5 - 20).div_ceil(4), "{stats:?}");
    }
}

#[test]
fn the_last_request_gives_its_pages_back_and_resumes() {
    // Each fits alone, but both do not.
    let pool = PageAllocator::new(8, 4).unwrap();
    let mut engine = Fake::new(&pool, vocab(1000), 16);
    let mut scheduler = Scheduler::new(&pool, limits(16, 20, 0));
    let prompts = [tokens(1, 8), tokens(2, 8)];
    for prompt in &prompts {
        scheduler.push(prompt.clone()).unwrap();
    }
    let mut steps = Vec::new();
    while !scheduler.is_done() {
        scheduler.step(&mut engine).unwrap();
        steps.push((scheduler.running.clone(), scheduler.stats().preemptions));
    }
    assert_eq!(steps[0], (vec![0, 1], 0));
    let stopped = steps.iter().position(|(_, preemptions)| *preemptions == 1).unwrap();
    assert!(steps[stopped..].iter().any(|(running, _)| *running == [0]));
    assert!(steps[stopped..].iter().any(|(running, _)| *running == [1]));
    // The first was never held up.
    assert_eq!(steps.iter().filter(|(running, _)| running.contains(&0)).count(), 19);
    let stats = scheduler.stats();
    assert!(stats.preemptions == 1 && stats.recomputed > 0, "{stats:?}");
    for (request, prompt) in scheduler.requests().iter().zip(&prompts) {
        assert_eq!(request.answer(), solo(prompt, &limits(16, 20, 0), 32, vocab(1000)).answer());
    }
}

#[test]
fn prompts_are_read_in_parts_while_others_decode() {
    let pool = PageAllocator::new(100, 4).unwrap();
    let mut engine = Fake::new(&pool, vocab(1000), 8);
    let mut scheduler = Scheduler::new(&pool, limits(8, 12, 0));
    let mut work = |scheduler: &mut Scheduler| {
        let before = scheduler.stats();
        scheduler.step(&mut engine).unwrap();
        let after = scheduler.stats();
        (after.read - before.read, after.decoded - before.decoded)
    };
    scheduler.push(tokens(1, 3)).unwrap();
    assert_eq!(work(&mut scheduler), (3, 0));
    scheduler.push(tokens(2, 16)).unwrap();
    scheduler.push(tokens(3, 2)).unwrap();
    assert_eq!(work(&mut scheduler), (7, 1));
    assert_eq!(work(&mut scheduler), (7, 1));
    // The third gets what the second leaves.
    assert_eq!(work(&mut scheduler), (4, 1));
    assert_eq!(work(&mut scheduler), (0, 3));
    // Nobody waits: one token of each.
    while !scheduler.is_done() {
        assert_eq!(work(&mut scheduler).0, 0);
    }
    assert_eq!(work(&mut scheduler), (0, 0));
}

#[test]
fn drafts_save_steps_and_change_nothing() {
    // One token follows all others, so that every draft is right.
    let steps = |draft: usize| {
        let pool = PageAllocator::new(20, 4).unwrap();
        let mut engine = Fake::new(&pool, vocab(1), 64);
        let mut scheduler = Scheduler::new(&pool, limits(64, 31, draft));
        scheduler.push(vec![5, 0, 0, 0]).unwrap();
        while !scheduler.is_done() {
            scheduler.step(&mut engine).unwrap();
        }
        let stats = scheduler.stats();
        assert_eq!(scheduler.requests()[0].answer(), [0; 31]);
        assert_eq!(stats.accepted, stats.drafted);
        stats.steps
    };
    assert_eq!((steps(0), steps(1), steps(4)), (31, 16, 7));
}

#[test]
fn drafts_are_what_followed_the_longest_run() {
    assert_eq!(draft(&[1, 2, 3, 9, 1, 2], 2), [3, 9]);
    // The latest of several, and of a longer run rather than a later one.
    assert_eq!(draft(&[1, 2, 3, 1, 2, 4, 1, 2], 1), [4]);
    assert_eq!(draft(&[7, 1, 2, 3, 1, 2, 4, 7, 1, 2], 1), [3]);
    // What repeats goes on.
    assert_eq!(draft(&[8, 1, 2, 1, 2], 5), [1, 2, 1, 2, 1]);
    assert_eq!(draft(&[6, 6, 6], 3), [6, 6, 6]);
    for none in [&[1, 2, 3, 2][..], &[5], &[]] {
        assert_eq!(draft(none, 4), [0u32; 0]);
    }
    assert_eq!(draft(&[6, 6, 6], 0), [0u32; 0]);
}

#[test]
fn prompts_that_never_fit_are_refused() {
    let pool = PageAllocator::new(2, 4).unwrap();
    let mut scheduler = Scheduler::new(&pool, limits(16, 20, 0));
    let mut refused = |len: usize| scheduler.push(vec![0; len]).unwrap_err().to_string();
    let text = refused(8);
    assert!(text.contains("8 tokens") && text.contains("--cache-tokens"), "{text}");
    let text = refused(1000);
    assert!(text.contains("the model's context 1000"), "{text}");
    assert!(refused(0).contains("empty"));
    // The largest that fits gets as many tokens as there is room for, and one.
    scheduler.push(vec![0; 7]).unwrap();
    let mut engine = Fake::new(&pool, vocab(1000), 16);
    while !scheduler.is_done() {
        scheduler.step(&mut engine).unwrap();
    }
    let request = &scheduler.requests()[0];
    assert_eq!((request.answer().len(), request.ended()), (2, Some(Ended::Cache)));
}
