//! Tokens that the GPU samples are those that the CPU samples from the same logits.

use flashinfer_rs::indices::LogitEdit;
use test_support::Rng;
use toktrie::SimpleVob;

use super::*;
use crate::backend::{LastEdit, Sample, sampler::sample};

/// Outputs of many kinds, one after the other.
struct Kinds {
    vocab: u32,
    made: usize,
}

impl Kinds {
    fn next(&mut self, row: usize) -> Output {
        let made = self.made;
        self.made += 1;
        let uniform = (made as f32 * 0.618_034).fract();
        let mut output = Output { temperature: 0.5 + uniform, uniform, ..Output::greedy(row) };
        match made % 8 {
            0 => output.temperature = 0.0,
            1 => output.top_k = 5,
            2 => output.top_p = 0.6,
            3 => output.min_p = 0.1,
            4 => output = Output { top_k: 40, top_p: 0.9, min_p: 0.01, logprobs: Some(3), ..output },
            5 => {
                output.temperature = 0.0;
                output.edits =
                    vec![LogitEdit { token: 3, repetition_penalty: 1.3, bias: -0.5 }, LogitEdit::ban(7)];
            }
            // Every second token is banned.
            6 => output.edits = (0..self.vocab / 2).map(|at| LogitEdit::ban(2 * at)).collect(),
            _ => output.logprobs = Some(0),
        }
        output
    }
}

#[test]
fn tokens_sampled_on_the_gpu_are_those_of_the_cpu() {
    let Some(_turn) = turn() else { return };
    let folder = tempfile::tempdir().unwrap();
    let tiny = forward::BIASES.file();
    let model = Model::open(&tiny.write(&folder)).unwrap();
    let vocab = model.config.vocab_size;
    let pool = PageAllocator::new(400, 4).unwrap();
    let mut gpu =
        Gpu::new(&model.config, model.ends().unwrap(), model.layers(), &pool, GpuOptions::new(64)).unwrap();
    let mut kinds = Kinds { vocab: vocab as u32, made: 0 };
    for requests in [1, 3, 4, 17] {
        let mut batch = Batch::new(&pool);
        for _ in 0..requests {
            batch.push(Sequence::new(&pool)).unwrap();
        }
        // Prompts first; graphs; steps that are greedy alone; one that checks drafts.
        for step in 0..12 {
            let len = if step == 0 || step == 6 { 3 } else { 1 };
            batch.append(vec![len; requests]).unwrap();
            let tokens: Vec<_> = (0..requests * len).map(|at| (at * 37 + step * 11) as u32 % 300).collect();
            let mut outputs: Vec<_> = match step {
                5 => (0..requests).map(|request| Output::greedy(request * len)).collect(),
                6 => (0..requests * len).map(|row| kinds.next(row)).collect(),
                _ => (0..requests).map(|request| kinds.next(request * len + len - 1)).collect(),
            };
            if step == 9 {
                outputs.retain(|output| output.row % 2 == 0);
            }
            let samples = gpu
                .step(&Step { batch: &batch, tokens: &StepToken::known(&tokens), outputs: &outputs })
                .unwrap();
            let expected = sample(&outputs, &gpu.logits().unwrap(), vocab).unwrap();
            assert_eq!(samples, expected, "step {step} of {requests} requests");
            if outputs.iter().any(|output| output.logprobs.is_some()) {
                assert!(samples.iter().any(|sample| sample.logprobs.is_some()));
            }
            // One token for each request is a graph's, and so are drafts.
            assert_eq!(gpu.replay().is_ok(), step > 0, "step {step} of {requests} requests");
        }
    }
}

/// Edits of some tokens, and how the last one is edited: much, so that it matters.
fn edited(row: usize, vocab: usize, rng: &mut Rng) -> Output {
    let mut edit = |token, biases: [f32; 3]| LogitEdit {
        token,
        repetition_penalty: [1.0, 1.3, 0.7][rng.below(3)],
        bias: biases[rng.below(3)],
    };
    let (weak, strong) = ([0.5, -0.5, f32::NEG_INFINITY], [20.0, -0.5, f32::NEG_INFINITY]);
    let tokens = |part: u32| (0..vocab as u32).filter(move |token| token % 8 < part);
    let edits = tokens(3).map(|token| edit(token, weak)).collect();
    let others = if row % 4 == 3 { 0 } else { 5 };
    let others = tokens(others).map(|token| edit(token, strong)).collect();
    let LogitEdit { repetition_penalty, bias, .. } = edit(0, strong);
    let last_edit = (row % 5 < 4).then_some(LastEdit { repetition_penalty, bias, others });
    let (temperature, uniform) = ([0.0, 0.7][rng.below(2)], rng.below(1 << 20) as f32 / (1 << 20) as f32);
    Output { edits, last_edit, temperature, uniform, ..Output::greedy(row) }
}

/// The logits of last tokens are edited as the host does once it knows them, in graphs and in steps that
/// read, where the step before chooses them and where they are known.
#[test]
fn logits_of_tokens_that_are_chosen_before_are_edited() {
    let Some(_turn) = turn() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = Model::open(&forward::BIASES.file().write(&folder)).unwrap();
    let vocab = model.config.vocab_size;
    let pool = PageAllocator::new(400, 4).unwrap();
    let mut gpu =
        Gpu::new(&model.config, model.ends().unwrap(), model.layers(), &pool, GpuOptions::new(64)).unwrap();
    let (mut rng, mut changed) = (Rng::new(), 0);
    // What comes of edits that were said before their tokens were known.
    let mut check = |gpu: &Gpu, outputs: &[Output], tokens: &[u32], samples: &[Sample]| {
        let logits = gpu.logits().unwrap();
        let expected = sample(&Output::after_tokens(outputs, tokens).unwrap(), &logits, vocab).unwrap();
        assert_eq!(samples, expected, "{tokens:?}");
        let without = |output: &Output| Output { last_edit: None, ..output.clone() };
        let without: Vec<_> = outputs.iter().map(without).collect();
        let without = sample(&without, &logits, vocab).unwrap();
        changed += without.iter().zip(samples).filter(|(without, with)| without != with).count();
    };
    for requests in [1, 3, 17] {
        let mut batch = Batch::new(&pool);
        (0..requests).for_each(|_| batch.push(Sequence::new(&pool)).unwrap());
        for step in 0..14 {
            // A graph, or one of rows of their own, in which the last request has three tokens, of which the
            // first may be chosen; or prefill, as nothing is asked of a row.
            let mut lens = vec![1; requests];
            lens[requests - 1] = if step % 4 == 3 { 3 } else { 1 };
            batch.append(lens.iter().copied()).unwrap();
            let mut tokens: Vec<_> =
                (0..requests + lens[requests - 1] - 1).map(|at| (at * 37 + step * 11) as u32 % 300).collect();
            let is_prefill = step % 8 == 7;
            let outputs: Vec<_> = (0..tokens.len())
                .filter(|&row| !is_prefill || row != requests)
                .map(|row| edited(row, vocab, &mut rng))
                .collect();
            let known = StepToken::known(&tokens);
            if step % 2 == 0 {
                let samples = gpu.step(&Step { batch: &batch, tokens: &known, outputs: &outputs }).unwrap();
                check(&gpu, &outputs, &tokens, &samples);
                continue;
            }
            let before: Vec<_> = (0..requests).map(Output::greedy).collect();
            let first = Step { batch: &batch, tokens: &known[..], outputs: &before };
            gpu.enqueue(&first).unwrap();
            batch.append(lens.iter().copied()).unwrap();
            let mut ahead = known.clone();
            (0..requests).for_each(|row| ahead[row] = StepToken::Chosen(requests - 1 - row));
            gpu.enqueue(&Step { batch: &batch, tokens: &ahead, outputs: &outputs }).unwrap();
            let chosen = self::tokens(&gpu.collect().unwrap());
            (0..requests).for_each(|row| tokens[row] = chosen[requests - 1 - row]);
            let samples = gpu.collect().unwrap();
            check(&gpu, &outputs, &tokens, &samples);
            assert_eq!(gpu.replay().is_err(), is_prefill, "step {step} of {requests}");
        }
    }
    assert!(changed > 50, "{changed} tokens were changed by it");
}

/// A row's token is the same wherever it stands, and whatever is beside it.
#[test]
fn a_seed_gives_the_same_token_in_any_batch() {
    let Some(_turn) = turn() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = Model::open(&forward::BIASES.file().write(&folder)).unwrap();
    let pool = PageAllocator::new(64, 4).unwrap();
    let mut gpu =
        Gpu::new(&model.config, model.ends().unwrap(), model.layers(), &pool, GpuOptions::new(8)).unwrap();
    let mut batch = Batch::new(&pool);
    for _ in 0..4 {
        batch.push(Sequence::new(&pool)).unwrap();
    }
    // All say the same, so that their logits are equal, bit for bit.
    for step in 0..20 {
        batch.append([1; 4]).unwrap();
        let uniform = step as f32 / 20.0;
        let outputs: Vec<_> = (0..4)
            .map(|row| match (step + row) % 4 {
                0 => Output::greedy(row),
                _ => Output { temperature: 1.2, top_p: 0.95, uniform, ..Output::greedy(row) },
            })
            .collect();
        let samples = gpu
            .step(&Step { batch: &batch, tokens: &StepToken::known(&[step as u32; 4]), outputs: &outputs })
            .unwrap();
        let logits = gpu.logits().unwrap();
        let rows: Vec<_> = logits.chunks_exact(model.config.vocab_size).collect();
        assert!(rows.iter().all(|row| row == &rows[0]), "step {step}");
        let drawn = samples.iter().zip(&outputs).filter(|(_, output)| output.temperature > 0.0);
        let drawn: Vec<_> = drawn.map(|(sample, _)| sample.token.unwrap()).collect();
        assert!(drawn.len() == 3 && drawn.iter().all(|token| *token == drawn[0]), "step {step}: {drawn:?}");
    }
}

#[test]
fn rows_without_numbers_do_not_disturb_others_that_sample() {
    let Some(_turn) = turn() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = Model::open(&forward::with_an_infinite_token().write(&folder)).unwrap();
    let pool = PageAllocator::new(32, 4).unwrap();
    let mut gpu =
        Gpu::new(&model.config, model.ends().unwrap(), model.layers(), &pool, GpuOptions::new(16)).unwrap();
    let mut batch = Batch::new(&pool);
    for _ in 0..3 {
        batch.push(Sequence::new(&pool)).unwrap();
    }
    for step in 0..3 {
        batch.append([1; 3]).unwrap();
        let sampled =
            |row| Output { temperature: 1.0, uniform: 0.3, logprobs: Some(2), ..Output::greedy(row) };
        let outputs = [sampled(0), sampled(1), Output::greedy(2)];
        let tokens = [5, forward::INFINITE, 6];
        let samples =
            gpu.step(&Step { batch: &batch, tokens: &StepToken::known(&tokens), outputs: &outputs }).unwrap();
        assert_eq!(samples[1], Sample { token: None, logprobs: None }, "step {step}");
        let expected = sample(&outputs, &gpu.logits().unwrap(), model.config.vocab_size).unwrap();
        assert_eq!((&samples[0], &samples[2]), (&expected[0], &expected[2]), "step {step}");
    }
}

#[test]
fn edits_of_tokens_that_are_not_there_are_refused() {
    let Some(_turn) = turn() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = Model::open(&forward::BIASES.file().write(&folder)).unwrap();
    let pool = PageAllocator::new(8, 4).unwrap();
    let mut gpu =
        Gpu::new(&model.config, model.ends().unwrap(), model.layers(), &pool, GpuOptions::new(4)).unwrap();
    let mut batch = Batch::new(&pool);
    batch.push(Sequence::new(&pool)).unwrap();
    batch.append([1]).unwrap();
    let edits = vec![LogitEdit::bias(300, 1.0)];
    let outputs = [Output { edits, ..Output::greedy(0) }];
    let text = gpu
        .step(&Step { batch: &batch, tokens: &StepToken::known(&[1]), outputs: &outputs })
        .unwrap_err()
        .to_string();
    assert!(text.contains("token 300: the vocabulary has 300 tokens"), "{text}");
    assert!(gpu.logits().unwrap().is_empty());
}

#[test]
fn rows_under_a_constraint_are_chosen_from_what_is_allowed() {
    let Some(_turn) = turn() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = Model::open(&forward::BIASES.file().write(&folder)).unwrap();
    let vocab = model.config.vocab_size;
    let pool = PageAllocator::new(32, 4).unwrap();
    let mut gpu =
        Gpu::new(&model.config, model.ends().unwrap(), model.layers(), &pool, GpuOptions::new(8)).unwrap();
    let mut batch = Batch::new(&pool);
    for _ in 0..4 {
        batch.push(Sequence::new(&pool)).unwrap();
    }
    // The first step reads, and the others are graphs.
    for step in 0..6 {
        batch.append(if step == 0 { [2; 4] } else { [1; 4] }).unwrap();
        let mut allowed = SimpleVob::alloc(vocab);
        [7, 8, 40 + step, 299].iter().for_each(|token| allowed.allow_token(*token));
        let last = |request: usize| if step == 0 { 2 * request + 1 } else { request };
        let under = |request| Output {
            allowed: Some(Arc::new(allowed.clone())),
            logprobs: Some(2),
            ..Output::greedy(last(request))
        };
        let outputs = [
            under(0),
            Output::greedy(last(1)),
            Output { temperature: 2.0, uniform: 0.7, ..under(2) },
            Output { temperature: 1.0, uniform: 0.3, ..Output::greedy(last(3)) },
        ];
        let tokens: Vec<u32> = (0..batch.queries().total() as u32).map(|row| 20 + row + step).collect();
        let samples =
            gpu.step(&Step { batch: &batch, tokens: &StepToken::known(&tokens), outputs: &outputs }).unwrap();
        let expected = sample(&outputs, &gpu.logits().unwrap(), vocab).unwrap();
        for row in [0, 1, 2] {
            assert_eq!(samples[row], expected[row], "step {step}, row {row}");
        }
        assert!([0, 2].iter().all(|row| allowed.is_allowed(samples[*row].token.unwrap())));
        assert!(samples[3].token.is_some());
    }
}
