//! The model on the GPU says what it says on the CPU.

use std::{
    io::Write,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::*;
use crate::{Device as Place, gpu::Gpu, load};

/// The largest difference of a row of logits to the CPU's, relative to its norm.
/// Weights, activations and the cache are `f16`, through 30 layers: rounding
/// these on the CPU makes a difference of up to 1.3e-2.
const LOGITS_BOUND: f32 = 3e-2;

/// One test at a time: nobody may wait for the GPU while another captures.
static TURN: Mutex<()> = Mutex::new(());

/// The GPU's turn; `None`, said on stderr, unless `FLASHINFER_RS_RUN_GPU_TESTS=1`.
/// With it, whatever is missing fails the test.
fn turn() -> Option<MutexGuard<'static, ()>> {
    if std::env::var_os("FLASHINFER_RS_RUN_GPU_TESTS").is_none_or(|value| value != "1") {
        let name = std::thread::current().name().unwrap_or("test").to_owned();
        let hint = "skipped: set FLASHINFER_RS_RUN_GPU_TESTS=1 on a machine with an NVIDIA GPU to run it";
        let _ = writeln!(std::io::stderr(), "{hint} ({name})");
        return None;
    }
    Some(TURN.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Loaded {
    fn gpu(&self, pool: &PageAllocator, max_tokens: usize) -> Gpu {
        let layers = self.layers.iter().cloned().map(Ok);
        Gpu::new(&self.model.config, self.ends.clone(), layers, pool, max_tokens).unwrap()
    }
}

#[test]
fn the_gpu_gives_the_known_ids() {
    let Some(_turn) = turn() else { return };
    let loaded = loaded().expect("the pinned model");
    let pool = PageAllocator::new(8, 16).unwrap();
    check_known_ids(&mut loaded.gpu(&pool, 64), &pool);
}

#[test]
fn the_gpu_gives_the_known_ids_in_a_mixed_batch() {
    let Some(_turn) = turn() else { return };
    let loaded = loaded().expect("the pinned model");
    let pool = PageAllocator::new(26, 5).unwrap();
    check_mixed_batch(&mut loaded.gpu(&pool, 7), &pool);
}

#[test]
fn the_gpu_gives_the_same_ids_with_few_pages_and_a_shared_prefix() {
    let Some(_turn) = turn() else { return };
    let loaded = loaded().expect("the pinned model");
    let pool = PageAllocator::new(17, 3).unwrap();
    check_few_pages(&mut loaded.gpu(&pool, 24), &pool, &loaded.text);
}

#[test]
fn drafts_on_the_gpu_save_steps_and_change_no_id() {
    let Some(_turn) = turn() else { return };
    let loaded = loaded().expect("the pinned model");
    let pool = PageAllocator::new(16, 5).unwrap();
    check_drafts(&mut loaded.gpu(&pool, 64), &pool, &loaded.text);
}

/// What greedy decoding adds to prompts that take every step together: the
/// first reads all of them, the others are graphs.
fn decode(engine: &mut dyn Engine, pool: &PageAllocator, prompts: &[&[u32]], steps: usize) -> Vec<Vec<u32>> {
    let mut batch = Batch::new(pool);
    for _ in prompts {
        batch.push(Sequence::new(pool)).unwrap();
    }
    let mut answers = vec![Vec::new(); prompts.len()];
    let mut tokens = prompts.concat();
    for step in 0..steps {
        let lens: Vec<_> = prompts.iter().map(|prompt| if step == 0 { prompt.len() } else { 1 }).collect();
        batch.append(lens).unwrap();
        let outputs: Vec<_> = batch.queries().indptr()[1..].iter().map(|&end| end as usize - 1).collect();
        engine.step(&Step { batch: &batch, tokens: &tokens, outputs: &outputs }).unwrap();
        tokens = engine.greedy().unwrap();
        assert_eq!(tokens.len(), prompts.len());
        for (answer, &token) in answers.iter_mut().zip(&tokens) {
            answer.push(token);
        }
    }
    answers
}

#[test]
fn graphs_of_all_sizes_give_the_known_ids() {
    const STEPS: usize = STORY.1.len();
    let Some(_turn) = turn() else { return };
    let loaded = loaded().expect("the pinned model");
    let page_size = 5;
    for requests in [1, 2, 3, 5, 8, 17] {
        let cases: Vec<_> = [STORY, CHAT, CAPITAL].into_iter().cycle().take(requests).collect();
        let prompts: Vec<_> = cases.iter().map(|case| case.0).collect();
        // No page is left in the last steps, which then cannot be filled up.
        let pages = prompts.iter().map(|prompt| (prompt.len() + STEPS - 1).div_ceil(page_size)).sum();
        let pool = PageAllocator::new(pages, page_size).unwrap();
        let mut gpu = loaded.gpu(&pool, prompts.concat().len());
        // The second round replays the graphs of the first.
        for round in 0..2 {
            let answers = decode(&mut gpu, &pool, &prompts, STEPS);
            for (request, (answer, (_, expected))) in answers.iter().zip(&cases).enumerate() {
                let answer = &answer[..expected.len()];
                assert_eq!(answer, *expected, "request {request} of {requests}, round {round}");
            }
            assert_eq!(pool.used_pages(), 0);
        }
        // The last step found no page, and was not a graph's; unless there was
        // nothing to fill up.
        assert_eq!(gpu.replay().is_err(), !requests.is_power_of_two());
        decode(&mut gpu, &pool, &prompts, 3);
        let (milliseconds, kernels) = gpu.replay().unwrap();
        assert!(milliseconds > 0.0 && kernels >= 10 * loaded.model.config.num_layers, "{kernels}");
    }
}

#[test]
fn logits_on_the_gpu_are_those_of_the_cpu() {
    let Some(_turn) = turn() else { return };
    let loaded = loaded().expect("the pinned model");
    let vocab = loaded.model.config.vocab_size;
    let logits = |engine: &mut dyn Engine, pool: &PageAllocator| {
        let mut batch = Batch::new(pool);
        for _ in 0..3 {
            batch.push(Sequence::new(pool)).unwrap();
        }
        let mut all = Vec::new();
        let mut step = |lens: [usize; 3], tokens: &[u32], outputs: &[usize]| {
            batch.append(lens).unwrap();
            engine.step(&Step { batch: &batch, tokens, outputs }).unwrap();
            let logits = engine.logits().unwrap();
            assert_eq!(logits.len(), outputs.len() * vocab);
            all.extend(logits);
        };
        // Whole prompts, a part of one, none; drafts; then single tokens.
        let (chat, story) = (CHAT.0, STORY.0);
        step([20, 4, 0], &[&chat[..20], story].concat(), &[0, 7, 19, 23]);
        step([3, 1, 2], &[&chat[20..23], &STORY.1[..1], &[0, 49151]].concat(), &[2, 3, 4, 5]);
        step([1, 0, 0], &chat[23..24], &[]);
        for at in 0..4 {
            step([1, 1, 1], &[chat[24 + at], STORY.1[1 + at], CAPITAL.1[at]], &[0, 1, 2]);
        }
        all
    };
    let pool = PageAllocator::new(20, 4).unwrap();
    let want = logits(&mut loaded.cpu(&pool), &pool);
    // Another pool: each has the memory of one engine.
    let pool = PageAllocator::new(20, 4).unwrap();
    let got = logits(&mut loaded.gpu(&pool, 32), &pool);
    let norm = |row: &mut dyn Iterator<Item = f32>| row.map(|value| value * value).sum::<f32>().sqrt();
    let rows = got.chunks_exact(vocab).zip(want.chunks_exact(vocab));
    let mut worst = 0f32;
    for (row, (got, want)) in rows.enumerate() {
        let off = norm(&mut got.iter().zip(want).map(|(a, b)| a - b)) / norm(&mut want.iter().copied());
        assert!(off <= LOGITS_BOUND, "row {row} is off by {off:.1e}");
        worst = worst.max(off);
    }
    assert_eq!(got.len(), want.len());
    eprintln!("worst row off by {worst:.1e}");
}

#[test]
fn steps_that_the_gpu_cannot_compute_are_refused() {
    let Some(_turn) = turn() else { return };
    let loaded = loaded().expect("the pinned model");
    let pool = PageAllocator::new(8, 4).unwrap();
    let mut gpu = loaded.gpu(&pool, 4);
    let mut batch = Batch::new(&pool);
    batch.push(Sequence::new(&pool)).unwrap();
    let mut refused = |tokens: &[u32], outputs: &[usize], expected: &str| {
        batch.append([5]).unwrap();
        let text = gpu.step(&Step { batch: &batch, tokens, outputs }).unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
        assert!(gpu.logits().unwrap().is_empty() && gpu.greedy().unwrap().is_empty());
        batch.truncate(0, 0).unwrap();
    };
    refused(&[1; 4], &[], "not those of its batch");
    refused(&[1; 5], &[5], "not those of its batch");
    refused(&[1; 5], &[4], "a step of 5 tokens; the engine was made for 4");
    batch.append([2]).unwrap();
    let text = gpu.step(&Step { batch: &batch, tokens: &[1, 1 << 20], outputs: &[] }).unwrap_err();
    assert!(text.to_string().contains("there is no token 1048576"), "{text}");
}

/// Where there is no GPU, the CPU is used, and says why; unless a GPU was asked for.
#[test]
fn a_missing_gpu_is_told() {
    if is_present!(cudarc::driver::sys) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let model = Model::open(&Tiny::new().write(&folder)).unwrap();
    let pool = PageAllocator::new(4, 4).unwrap();
    let place = |device| load(device, &model, &pool).map(|(_, place)| place).map_err(|e| e.to_string());
    assert_eq!(place(Place::Auto).unwrap(), "on the CPU (there is no NVIDIA driver)");
    assert_eq!(place(Place::Cpu).unwrap(), "on the CPU (as asked)");
    assert_eq!(place(Place::Gpu).unwrap_err(), "no GPU can be used: there is no NVIDIA driver");
}
