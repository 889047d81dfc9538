//! A deterministic engine says the same whatever else it computes.

use test_support::Rng;

use super::*;
use crate::backend::gpu::MOST_ROWS;

/// Answers that are compared.
const ANSWERS: usize = 2000;
/// Tokens of each.
const LENGTH: usize = 20;

fn options(max_tokens: usize) -> GpuOptions {
    GpuOptions { deterministic: true, ..GpuOptions::new(max_tokens) }
}

/// What the others of a step are asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Others {
    /// All logits, so that small steps are graphs.
    All,
    /// Nothing, so that a step of several tokens of a request is prefill.
    Nothing,
}

/// The logits of a request's tokens, which come in parts of these lengths, beside
/// requests that have so many new tokens in each step.
fn logits(
    gpu: &mut Gpu,
    pool: &PageAllocator,
    tokens: &[u32],
    (parts, beside): (&[usize], &[usize]),
    others: Others,
) -> Vec<f32> {
    let vocab = gpu.vocab_size();
    let mut batch = Batch::new(pool);
    for _ in 0..=beside.len() {
        batch.push(Sequence::new(pool)).unwrap();
    }
    let (mut all, mut at) = (Vec::new(), 0);
    for &part in parts {
        // The request is the last one: its rows are not where they are alone.
        batch.append(beside.iter().copied().chain([part])).unwrap();
        let first: usize = beside.iter().sum();
        let before = (0..first).map(|at| (at as u32 * 29 + 7) % vocab as u32);
        let rows: Vec<_> = before.chain(tokens[at..at + part].iter().copied()).collect();
        let from = if others == Others::All { 0 } else { first };
        let outputs: Vec<_> = (from..rows.len()).map(Output::greedy).collect();
        gpu.step(&Step { batch: &batch, tokens: &StepToken::known(&rows), outputs: &outputs }).unwrap();
        all.extend_from_slice(&gpu.logits().unwrap()[(first - from) * vocab..]);
        let alike = beside.iter().chain([&part]).all(|&len| len == 1);
        let is_graph = alike || outputs.len() == rows.len() && rows.len() <= MOST_ROWS;
        assert_eq!(
            gpu.replay().is_ok(),
            is_graph,
            "{parts:?} beside {beside:?}, of which {others:?} is asked"
        );
        at += part;
    }
    all
}

/// The logits of a model's rows are equal in every bit, however its steps are made.
pub fn check_rows_are_equal(name: &str, gpu: &mut Gpu, pool: &PageAllocator, tokens: &[u32]) {
    let alone = logits(gpu, pool, tokens, (&vec![1; tokens.len()], &[]), Others::All);
    let steps: &[(&[usize], &[usize])] = &[
        (&[17], &[]),
        (&[9, 8], &[]),
        (&[17], &[1]),
        (&[9, 8], &[1]),
        (&[1; 17], &[1]),
        (&[1; 17], &[1; 6]),
        (&[5, 1, 4, 1, 1, 5], &[1, 3]),
        (&[17], &[40, 1, 2]),
        // More rows than a graph has.
        (&[17], &[60, 1, 2]),
    ];
    for (step, others) in steps.iter().flat_map(|step| [(step, Others::All), (step, Others::Nothing)]) {
        let got = logits(gpu, pool, tokens, *step, others);
        let differing = got.iter().zip(&alone).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        let of = got.len();
        assert_eq!(
            differing, 0,
            "{name}: {differing} of {of} logits, {step:?}, of which {others:?} is asked"
        );
    }
}

#[test]
fn rows_do_not_depend_on_their_step() {
    let Some(_turn) = turn() else { return };
    let folder = tempfile::tempdir().unwrap();
    for (name, tiny) in [("biases", forward::BIASES.file()), ("experts", forward::EXPERTS.file())] {
        let model = Model::open(&tiny.write(&folder)).unwrap();
        let pool = PageAllocator::new(400, 4).unwrap();
        let (ends, layers) = (model.ends().unwrap(), model.layers());
        let mut gpu = Gpu::new(&model.config, ends, layers, &pool, options(128)).unwrap();
        let tokens: Vec<_> = (0..17).map(|at| at * 13 % model.config.vocab_size as u32).collect();
        check_rows_are_equal(name, &mut gpu, &pool, &tokens);
    }
    let loaded = loaded().expect("the pinned model");
    let pool = PageAllocator::new(400, 4).unwrap();
    check_rows_are_equal("smollm2", &mut loaded.gpu_with(&pool, options(128)), &pool, &CHAT.0[..17]);
}

/// Greedy answers of random batches, with drafts, cached prefixes, and pages that are too
/// few, against those of each prompt alone.
#[test]
fn answers_do_not_depend_on_company() {
    const PROMPTS: usize = 60;
    let Some(_turn) = turn() else { return };
    let loaded = loaded().expect("the pinned model");
    let mut rng = Rng::new();
    let subjects = ["rivers", "a small village", "prime numbers", "the history of glass", "cats", "rain"];
    let openings = [
        "Tell me about",
        "Once upon a time there were",
        "List five facts on",
        "Why do we need",
        "A poem about",
        "The best thing about",
        "def",
        "Dear friend, on the topic of",
        "In 1813,",
        "What about",
    ];
    let prompts: Vec<_> = (0..PROMPTS)
        .map(|at| {
            let question = format!("{} {}", openings[at / subjects.len()], subjects[at % subjects.len()]);
            if at % 3 == 0 { loaded.text.encode(&question) } else { ask(&loaded.text, None, &question) }
        })
        .collect();
    let alone: Vec<_> = {
        let pool = PageAllocator::new(64, 16).unwrap();
        let mut gpu = loaded.gpu_with(&pool, options(64));
        let solo = |prompt: &Vec<u32>| solo(&mut gpu, &pool, prompt, LENGTH, limits(64, 0)).0;
        prompts.iter().map(solo).collect()
    };
    let (mut compared, mut differing, mut preemptions, mut accepted, mut saved) = (0, 0, 0, 0, 0);
    while compared < ANSWERS {
        let (pages, draft) = (24 + rng.below(200), rng.below(4));
        let pool = PageAllocator::new(pages, 5).unwrap();
        let mut gpu = loaded.gpu_with(&pool, options(128));
        for _ in 0..4 {
            let step_tokens = 16 + rng.below(112);
            let mut requests = Requests::new(&pool, gpu.vocab_size(), limits(step_tokens, draft));
            let chosen: Vec<_> = (0..1 + rng.below(60)).map(|_| rng.below(PROMPTS)).collect();
            for &prompt in &chosen {
                requests.submit(&prompts[prompt], &greedy(LENGTH)).unwrap();
                (0..rng.below(3)).for_each(|_| drop(requests.step(&mut gpu)));
            }
            requests.finish(&mut gpu);
            for (request, &prompt) in chosen.iter().enumerate() {
                compared += 1;
                differing += usize::from(requests.answer(request).ids() != alone[prompt]);
            }
            let stats = requests.scheduler.stats();
            preemptions += stats.preemptions;
            accepted += stats.accepted;
            saved += stats.saved;
        }
    }
    eprintln!(
        "{compared} answers, {preemptions} preemptions, {accepted} draft tokens, {saved} cached tokens"
    );
    assert!(preemptions > 0 && accepted > 0 && saved > 0);
    assert_eq!(differing, 0, "of {compared} answers");
}
