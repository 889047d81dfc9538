//! The model on the GPU says what it says on the CPU.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use test_support::say;

mod architectures;
mod deterministic;
mod drafts;
mod faults;
mod flight;
mod long_run;
mod precision;
pub mod ranks;
mod sampling;

use super::*;
use crate::backend::{
    device::{Device as Place, load},
    gpu::{Gpu, GpuOptions, capture_graphs},
};

/// The largest difference of a row of logits to the CPU's, relative to its norm.
/// Weights, activations and the cache are `f16`, through 30 layers: rounding
/// these on the CPU makes a difference of up to 1.3e-2.
const LOGITS_BOUND: f32 = 3e-2;

/// One test at a time: nobody may wait for the GPU while another captures.
static TURN: Mutex<()> = Mutex::new(());

/// The GPU's turn; `None`, said on stderr, unless `FLASHINFER_RS_RUN_GPU_TESTS=1`.
/// With it, whatever is missing fails the test.
pub fn turn() -> Option<MutexGuard<'static, ()>> {
    if std::env::var_os("FLASHINFER_RS_RUN_GPU_TESTS").is_none_or(|value| value != "1") {
        say("skipped: set FLASHINFER_RS_RUN_GPU_TESTS=1 on a machine with an NVIDIA GPU to run it");
        return None;
    }
    Some(TURN.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Loaded {
    fn gpu(&self, pool: &PageAllocator, max_tokens: usize) -> Gpu {
        self.gpu_with(pool, GpuOptions::new(max_tokens))
    }

    fn gpu_with(&self, pool: &PageAllocator, options: GpuOptions) -> Gpu {
        let layers = self.layers.iter().cloned().map(Ok);
        Gpu::new(&self.model.config, self.ends.clone(), layers, pool, options).unwrap()
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
fn graphs_that_are_captured_early_change_no_id() {
    let Some(_turn) = turn() else { return };
    let loaded = loaded().expect("the pinned model");
    let pool = PageAllocator::new(32, 16).unwrap();
    let (mut gpu, positions) = (loaded.gpu(&pool, 64), loaded.model.config.context_length);
    assert_eq!(capture_graphs(&mut gpu, &pool, positions, 6, Duration::ZERO).unwrap(), 0, "without time");
    assert_eq!(capture_graphs(&mut gpu, &pool, positions, 6, Duration::from_secs(600)).unwrap(), 6);
    assert_eq!(
        capture_graphs(&mut gpu, &pool, positions, 64, Duration::from_secs(600)).unwrap(),
        32,
        "until pages are used up"
    );
    check_known_ids(&mut gpu, &pool);
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

#[test]
fn prompts_are_read_in_parts_of_2048_on_a_gpu() {
    let Some(_turn) = turn() else { return };
    crate::llm::tests::check_parts(Place::Gpu, 2048);
}

/// What greedy decoding adds to prompts that take every step together: the
/// first reads all of them, the others are graphs.
fn decode(engine: &mut dyn Backend, pool: &PageAllocator, prompts: &[&[u32]], steps: usize) -> Vec<Vec<u32>> {
    let mut batch = Batch::new(pool);
    for _ in prompts {
        batch.push(Sequence::new(pool)).unwrap();
    }
    let mut answers = vec![Vec::new(); prompts.len()];
    let mut tokens = prompts.concat();
    for step in 0..steps {
        let lens: Vec<_> = prompts.iter().map(|prompt| if step == 0 { prompt.len() } else { 1 }).collect();
        batch.append(lens).unwrap();
        let ends = batch.queries().indptr()[1..].iter();
        let outputs: Vec<_> = ends.map(|&end| Output::greedy(end as usize - 1)).collect();
        let samples = engine
            .step(&Step { batch: &batch, tokens: &StepToken::known(&tokens), outputs: &outputs })
            .unwrap();
        tokens = self::tokens(&samples);
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
        // Six of a layer of few rows, and of others more.
        assert!(milliseconds > 0.0 && kernels >= 6 * loaded.model.config.num_layers(), "{kernels}");
    }
}

#[test]
fn logits_on_the_gpu_are_those_of_the_cpu() {
    let Some(_turn) = turn() else { return };
    let loaded = loaded().expect("the pinned model");
    let pool = mixed_pool();
    check_mixed_logits(&mut loaded.gpu(&pool, MIXED_STEP), &pool);
}

/// Room for what [`check_mixed_logits`] computes, and the most tokens of its steps.
fn mixed_pool() -> PageAllocator {
    PageAllocator::new(20, 4).unwrap()
}
const MIXED_STEP: usize = 32;

/// Logits of the pinned model in steps of all kinds, against those on the CPU.
fn check_mixed_logits(engine: &mut dyn Backend, pool: &PageAllocator) {
    let loaded = loaded().expect("the pinned model");
    let vocab = loaded.model.config.vocab_size;
    // Another pool: each has the memory of one engine.
    let cpu_pool = mixed_pool();
    let want = mixed_logits(&mut loaded.cpu(&cpu_pool), &cpu_pool);
    check_rows("logits", &mixed_logits(engine, pool), &want, vocab, LOGITS_BOUND);
}

fn mixed_logits(engine: &mut dyn Backend, pool: &PageAllocator) -> Vec<f32> {
    let mut batch = Batch::new(pool);
    for _ in 0..3 {
        batch.push(Sequence::new(pool)).unwrap();
    }
    let mut all = Vec::new();
    let mut step = |lens: [usize; 3], tokens: &[u32], outputs: &[usize]| {
        batch.append(lens).unwrap();
        let outputs: Vec<_> = outputs.iter().copied().map(Output::greedy).collect();
        engine.step(&Step { batch: &batch, tokens: &StepToken::known(tokens), outputs: &outputs }).unwrap();
        let logits = engine.logits().unwrap();
        assert_eq!(logits.len(), outputs.len() * engine.vocab_size());
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
}

fn norm(row: impl Iterator<Item = f32>) -> f32 {
    row.map(|value| value * value).sum::<f32>().sqrt()
}

/// Rows of logits against those of the CPU.
fn check_rows(name: &str, got: &[f32], want: &[f32], vocab: usize, bound: f32) {
    assert_eq!(got.len(), want.len());
    let rows = got.chunks_exact(vocab).zip(want.chunks_exact(vocab));
    let mut worst = 0f32;
    for (row, (got, want)) in rows.enumerate() {
        let off = norm(got.iter().zip(want).map(|(a, b)| a - b)) / norm(want.iter().copied());
        assert!(off <= bound, "{name}: row {row} is off by {off:.1e}");
        worst = worst.max(off);
    }
    eprintln!("{name}: worst row off by {worst:.1e}");
}

/// What three requests for the same tokens are told step by step: parts of prompts, drafts that are
/// checked, and single tokens; the last two are graphs on the GPU. Logits and the greedy choice.
fn force(engine: &mut dyn Backend, pool: &PageAllocator, tokens: &[u32]) -> (Vec<f32>, Vec<u32>) {
    const STEPS: [[usize; 3]; 9] =
        [[7, 3, 0], [2, 1, 4], [1, 1, 1], [1, 1, 1], [1, 1, 1], [3, 0, 1], [1, 1, 1], [1, 1, 1], [0, 5, 2]];
    let mut batch = Batch::new(pool);
    for _ in 0..3 {
        batch.push(Sequence::new(pool)).unwrap();
    }
    let (mut logits, mut best, mut at) = (Vec::new(), Vec::new(), [0; 3]);
    for lens in STEPS {
        batch.append(lens).unwrap();
        let parts: Vec<_> = at.iter().zip(lens).map(|(&at, len)| &tokens[at..at + len]).collect();
        let rows = parts.concat();
        // A part of a prompt, of which not every row has an output, is prefill.
        let first = usize::from(lens.iter().any(|&len| len > 4));
        let outputs: Vec<_> = (first..rows.len()).map(Output::greedy).collect();
        let samples = engine
            .step(&Step { batch: &batch, tokens: &StepToken::known(&rows), outputs: &outputs })
            .unwrap();
        logits.extend(engine.logits().unwrap());
        best.extend(self::tokens(&samples));
        at.iter_mut().zip(lens).for_each(|(at, len)| *at += len);
    }
    (logits, best)
}

/// The longest that a request of [`force`] becomes.
const FORCED: usize = 17;
/// The most tokens of its steps, and enough pages of 4 for its requests.
const FORCED_STEP: usize = 10;
const FORCED_PAGES: usize = 16;

/// Logits and greedy choices of a file on the GPU, for given tokens, against those
/// on the CPU. Choices are compared where the CPU's is clear.
fn check_forced(name: &str, model: &Model, tokens: &[u32]) {
    let config = &model.config;
    let vocab = config.vocab_size;
    let pool = || PageAllocator::new(FORCED_PAGES, 4).unwrap();
    let (cpu_pool, gpu_pool) = (pool(), pool());
    let mut cpu = Cpu::new(config, model.ends().unwrap(), model.layers(), &cpu_pool).unwrap();
    let mut gpu =
        Gpu::new(config, model.ends().unwrap(), model.layers(), &gpu_pool, GpuOptions::new(FORCED_STEP))
            .unwrap();
    let (want, best) = force(&mut cpu, &cpu_pool, tokens);
    // The second round replays the graphs of the first.
    for round in 0..2 {
        let (got, greedy) = force(&mut gpu, &gpu_pool, tokens);
        check_rows(&format!("{name}, round {round}"), &got, &want, vocab, LOGITS_BOUND);
        let mut clear = 0;
        for (row, (&greedy, &best)) in greedy.iter().zip(&best).enumerate() {
            let [got, want] = [&got, &want].map(|all| &all[row * vocab..][..vocab]);
            let most = got.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(got[greedy as usize], most, "{name}: row {row} chose {greedy}");
            let off = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let others = want.iter().enumerate().filter(|(token, _)| *token != best as usize);
            let second = others.map(|(_, logit)| *logit).fold(f32::NEG_INFINITY, f32::max);
            if want[best as usize] - second > 2.0 * off {
                assert_eq!(greedy, best, "{name}: row {row}");
                clear += 1;
            }
        }
        assert!(clear * 2 > best.len(), "{name}: {clear} of {} choices are clear", best.len());
    }
}

/// What the GPU answers a text, against the CPU's logits for that answer: each token
/// is the best there, or as good as that.
fn check_answer(name: &str, model: &Model, prompt: &str) {
    let text = Text::from_gguf(&model.content).unwrap();
    let (config, prompt) = (&model.config, text.encode(prompt));
    let pool = PageAllocator::new(16, 4).unwrap();
    let mut gpu =
        Gpu::new(config, model.ends().unwrap(), model.layers(), &pool, GpuOptions::new(16)).unwrap();
    let limits = Limits { context: 64, ends: [].into(), ..limits(16, 0) };
    let (answer, _) = solo(&mut gpu, &pool, &prompt, 12, limits);
    assert_eq!(answer.len(), 12);
    let pool = PageAllocator::new(16, 4).unwrap();
    let mut cpu = Cpu::new(config, model.ends().unwrap(), model.layers(), &pool).unwrap();
    let mut batch = Batch::new(&pool);
    batch.push(Sequence::new(&pool)).unwrap();
    let tokens = [prompt.as_slice(), &answer].concat();
    batch.append([tokens.len()]).unwrap();
    let outputs: Vec<_> = (prompt.len() - 1..tokens.len() - 1).map(Output::greedy).collect();
    cpu.step(&Step { batch: &batch, tokens: &StepToken::known(&tokens), outputs: &outputs }).unwrap();
    let logits = cpu.logits().unwrap();
    for (at, (row, &token)) in logits.chunks_exact(config.vocab_size).zip(&answer).enumerate() {
        let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        // Four times the largest mean difference of a logit, on both sides.
        let near = 8.0 * LOGITS_BOUND * norm(row.iter().copied()) / (row.len() as f32).sqrt();
        assert!(row[token as usize] >= most - near, "{name}: token {at} of {answer:?}");
    }
}

#[test]
fn biases_on_the_gpu_are_those_of_the_cpu() {
    let Some(_turn) = turn() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut tiny = forward::BIASES.file();
    bytes::add_tokenizer(&mut tiny, "tekken", forward::BIASES.vocab);
    let model = Model::open(&tiny.write(&folder)).unwrap();
    let (tokens, _) = forward::clear_tokens(&tiny, forward::BIASES, FORCED);
    check_forced("biases", &model, &tokens);
    check_answer("biases", &model, "The HTMLParser's 12 é");
}

#[test]
fn experts_on_the_gpu_are_those_of_the_cpu() {
    let Some(_turn) = turn() else { return };
    let folder = tempfile::tempdir().unwrap();
    let several = forward::Sizes { experts: Some((5, 3)), ..forward::EXPERTS };
    let one = forward::Sizes { experts: Some((4, 1)), ..forward::EXPERTS };
    for (name, tiny, sizes) in [
        ("2 of 8 experts", forward::EXPERTS.file(), forward::EXPERTS),
        ("3 of 5 experts", several.file(), several),
        ("1 of 4 experts", one.file(), one),
        ("an unused expert", forward::with_an_unused_expert(), forward::EXPERTS),
    ] {
        let model = Model::open(&tiny.write(&folder)).unwrap();
        let (tokens, _) = forward::clear_tokens(&tiny, sizes, FORCED);
        check_forced(name, &model, &tokens);
    }
}

#[test]
fn a_scaled_rotary_embedding_on_the_gpu_is_that_of_the_cpu() {
    let Some(_turn) = turn() else { return };
    let folder = tempfile::tempdir().unwrap();
    let sizes = forward::Sizes {
        hidden: 256,
        heads: 2,
        kv_heads: 1,
        head_dim: 256,
        vocab: 265,
        experts: None,
        ..forward::EXPERTS
    };
    let mut tiny = sizes.file();
    let vocabulary = sentencepiece::with(&[("▁a", -1.0, 1), ("bc", -2.0, 1)]);
    tiny.metadata.extend(vocabulary.metadata.into_iter().filter(|(key, _)| key.starts_with("tokenizer.")));
    tiny.metadata.extend([
        ("llama.rope.scaling.type", Value::String("yarn".into())),
        ("llama.rope.scaling.factor", Value::F32(4.0)),
        ("llama.rope.scaling.original_context_length", Value::U32(16)),
    ]);
    let model = Model::open(&tiny.write(&folder)).unwrap();
    assert!(model.config.ropes[0].for_length(1).attention_factor() > 1.0);
    let tokens: Vec<_> = (0..FORCED as u32).map(|at| at * 31 % 265).collect();
    check_forced("scaled", &model, &tokens);
    check_answer("scaled", &model, "a bc a\nabc");
}

/// The same checks, of a second engine on the CPU: what is compared can be.
#[test]
fn forced_tokens_are_the_same_in_other_steps() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = forward::EXPERTS.file();
    let model = Model::open(&tiny.write(&folder)).unwrap();
    let (tokens, want) = forward::clear_tokens(&tiny, forward::EXPERTS, FORCED);
    let pool = PageAllocator::new(FORCED_PAGES, 4).unwrap();
    let mut cpu = Cpu::new(&model.config, model.ends().unwrap(), model.layers(), &pool).unwrap();
    let (got, greedy) = force(&mut cpu, &pool, &tokens);
    assert_eq!(got.len(), greedy.len() * 256);
    // The first request's first part, but for its first row.
    let want: Vec<_> = want[1..7].iter().flatten().map(|&logit| logit as f32).collect();
    check_rows("forced", &got[..6 * 256], &want, 256, LOGITS_BOUND);
    assert_eq!(pool.used_pages(), 0);
}

/// Steps whose attention needs more memory than the graphs before them left it.
#[test]
fn the_memory_of_attention_grows_with_batches() {
    const REQUESTS: usize = 1024;
    // Keys that are divided among blocks, whose results take memory.
    const LONG: usize = 2048;
    let Some(_turn) = turn() else { return };
    let folder = tempfile::tempdir().unwrap();
    let sizes = forward::Sizes { heads: 16, kv_heads: 1, ..forward::EXPERTS };
    let mut tiny = sizes.file();
    tiny.metadata.insert("llama.context_length", Value::U32(2 * LONG as u32));
    let model = Model::open(&tiny.write(&folder)).unwrap();
    let vocab = model.config.vocab_size;
    let pool = PageAllocator::new(2 * REQUESTS, 4).unwrap();
    let mut gpu =
        Gpu::new(&model.config, model.ends().unwrap(), model.layers(), &pool, GpuOptions::new(REQUESTS))
            .unwrap();
    let before = gpu.shrink_workspaces().unwrap();
    let mut alone = Vec::new();
    for (requests, cached) in [(1, 0), (REQUESTS, 0), (1, LONG), (1, 0), (REQUESTS, 0)] {
        let mut batch = Batch::new(&pool);
        for _ in 0..requests {
            batch.push(Sequence::new(&pool)).unwrap();
        }
        if cached > 0 {
            // Of nobody's tokens: what comes of them is not looked at.
            batch.append([cached]).unwrap();
            batch.append([1]).unwrap();
            let (token, output) = (StepToken::Known(3), Output::greedy(0));
            gpu.step(&Step { batch: &batch, tokens: &[token], outputs: &[output] }).unwrap();
            assert!(gpu.workspace_bytes() > before, "{before}");
            continue;
        }
        let mut all = Vec::new();
        for token in [3, 5, 7] {
            batch.append(vec![1; requests]).unwrap();
            let (tokens, outputs) =
                (vec![token; requests], (0..requests).map(Output::greedy).collect::<Vec<_>>());
            gpu.step(&Step { batch: &batch, tokens: &StepToken::known(&tokens), outputs: &outputs }).unwrap();
            let logits = gpu.logits().unwrap();
            all.extend_from_slice(&logits[..vocab]);
            all.extend_from_slice(&logits[logits.len() - vocab..]);
        }
        if alone.is_empty() {
            alone.clone_from(&all);
        }
        check_rows(&format!("{requests} requests"), &all, &alone, vocab, LOGITS_BOUND);
        gpu.replay().unwrap();
    }
}

#[test]
fn requests_of_nan_end_and_the_others_go_on_on_the_gpu() {
    let Some(_turn) = turn() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = Model::open(&forward::with_an_infinite_token().write(&folder)).unwrap();
    let pool = PageAllocator::new(32, 4).unwrap();
    let mut gpu =
        Gpu::new(&model.config, model.ends().unwrap(), model.layers(), &pool, GpuOptions::new(16)).unwrap();
    // The second round replays the graphs of the first.
    for _ in 0..2 {
        check_no_numbers(&mut gpu, &pool);
    }
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
        let outputs: Vec<_> = outputs.iter().copied().map(Output::greedy).collect();
        let step = Step { batch: &batch, tokens: &StepToken::known(tokens), outputs: &outputs };
        let text = gpu.step(&step).unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
        assert!(gpu.logits().unwrap().is_empty());
        batch.truncate(0, 0).unwrap();
    };
    refused(&[1; 4], &[], "not those of its batch");
    refused(&[1; 5], &[5], "not those of its batch");
    refused(&[1; 5], &[3, 3], "not in ascending order");
    refused(&[1; 5], &[4], "a step of 5 tokens; the engine was made for 4");
    batch.append([2]).unwrap();
    let text = gpu
        .step(&Step { batch: &batch, tokens: &StepToken::known(&[1, 1 << 20]), outputs: &[] })
        .unwrap_err();
    assert!(text.to_string().contains("there is no token 1048576"), "{text}");
}

/// Where there is no GPU, the CPU is used, and says why; unless a GPU was asked for.
#[test]
fn a_missing_gpu_is_told() {
    // SAFETY: opening a library of NVIDIA's runs nothing but its initializers.
    if unsafe { cudarc::driver::sys::is_culib_present() } {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let model = Model::open(&Tiny::new().write(&folder)).unwrap();
    let pool = PageAllocator::new(4, 4).unwrap();
    let place = |device| {
        let capacity = limits(16, 0).step_capacity();
        load(device, &model, &pool, capacity, GpuOptions::new(capacity.tokens), None, None)
            .map(|loaded| loaded.place)
            .map_err(|e| e.to_string())
    };
    assert_eq!(place(Place::Auto).unwrap(), "on the CPU (there is no NVIDIA driver)");
    assert_eq!(place(Place::Cpu).unwrap(), "on the CPU (as asked)");
    assert_eq!(place(Place::Gpu).unwrap_err(), "no GPU can be used: there is no NVIDIA driver");
}
