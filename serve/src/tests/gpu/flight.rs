//! Steps that follow each other on the GPU, before the host knows their tokens.

use std::collections::BTreeSet;

use test_support::Rng;

use super::*;

/// What comes of some steps of a batch, of which each is enqueued while the one before is computed,
/// or when it was collected: the tokens, step by step.
fn decode(gpu: &mut Gpu, pool: &PageAllocator, outputs: &[Vec<Output>], ahead: bool) -> Vec<Vec<u32>> {
    let requests = outputs[0].len();
    let mut batch = Batch::new(pool);
    (0..requests).for_each(|_| batch.push(Sequence::new(pool)).unwrap());
    let mut tokens: Vec<u32> = (0..requests as u32).map(|at| 100 + 7 * at).collect();
    let chosen: Vec<_> = (0..requests).map(StepToken::Chosen).collect();
    let take = |gpu: &mut Gpu| -> Vec<u32> {
        gpu.collect().unwrap().into_iter().map(|sample| sample.token.unwrap()).collect()
    };
    let mut all = Vec::new();
    for (index, outputs) in outputs.iter().enumerate() {
        batch.append(vec![1; requests]).unwrap();
        let tokens_of_step = match ahead && index > 0 {
            true => chosen.clone(),
            false => StepToken::known(&tokens),
        };
        gpu.enqueue(&Step { batch: &batch, tokens: &tokens_of_step, outputs }).unwrap();
        if !ahead || index > 0 {
            tokens = take(gpu);
            all.push(tokens.clone());
        }
    }
    if ahead {
        all.push(take(gpu));
    }
    all
}

#[test]
fn steps_ahead_choose_the_same_tokens() {
    const STEPS: usize = 40;
    let Some(_turn) = turn() else { return };
    let loaded = loaded().expect("the pinned model");
    let pool = PageAllocator::new(600, 16).unwrap();
    let mut gpu = loaded.gpu(&pool, 128);
    let mut rng = Rng::new();
    for requests in [1, 3, 64, 100] {
        for drawn in [false, true] {
            let mut output = |row: usize| match drawn {
                true => Output {
                    temperature: 0.8,
                    top_p: 0.9,
                    uniform: rng.below(1 << 20) as f32 / (1 << 20) as f32,
                    ..Output::greedy(row)
                },
                false => Output::greedy(row),
            };
            let outputs: Vec<Vec<_>> = (0..STEPS).map(|_| (0..requests).map(&mut output).collect()).collect();
            let one_by_one = decode(&mut gpu, &pool, &outputs, false);
            assert_eq!(decode(&mut gpu, &pool, &outputs, true), one_by_one, "{requests} {drawn}");
        }
    }
}

/// Two steps are in flight at most, and what is no token of the step before is refused.
#[test]
fn what_cannot_follow_is_refused() {
    let Some(_turn) = turn() else { return };
    let loaded = loaded().expect("the pinned model");
    let pool = PageAllocator::new(40, 16).unwrap();
    let mut gpu = loaded.gpu(&pool, 8);
    let mut batch = Batch::new(&pool);
    batch.push(Sequence::new(&pool)).unwrap();
    let mut enqueue = |gpu: &mut Gpu, token: StepToken, output: Output| -> Result<()> {
        batch.append([1])?;
        gpu.enqueue(&Step { batch: &batch, tokens: &[token], outputs: &[output] })
    };
    let greedy = || Output::greedy(0);
    assert!(gpu.collect().unwrap_err().to_string().contains("no step is in flight"));
    let text = enqueue(&mut gpu, StepToken::Chosen(0), greedy()).unwrap_err().to_string();
    assert!(text.contains("no output 0"), "{text}");
    enqueue(&mut gpu, StepToken::Known(5), greedy()).unwrap();
    assert!(enqueue(&mut gpu, StepToken::Chosen(1), greedy()).is_err());
    enqueue(&mut gpu, StepToken::Chosen(0), greedy()).unwrap();
    let text = enqueue(&mut gpu, StepToken::Chosen(0), greedy()).unwrap_err().to_string();
    assert!(text.contains("collected"), "{text}");
    assert!(gpu.logits().unwrap().is_empty());
    gpu.collect().unwrap();
    gpu.collect().unwrap();
    assert_eq!(gpu.logits().unwrap().len(), gpu.vocab_size());
    // The host looks at the logits of this one, which the next would overwrite.
    enqueue(&mut gpu, StepToken::Known(5), Output { logprobs: Some(1), ..greedy() }).unwrap();
    assert!(enqueue(&mut gpu, StepToken::Chosen(0), greedy()).is_err());
    assert!(gpu.collect().unwrap()[0].logprobs.is_some());
    // It goes while a step is computed.
    enqueue(&mut gpu, StepToken::Known(5), greedy()).unwrap();
    drop(gpu);
}

/// Counts the steps that are enqueued before their tokens are known, of which there are none unless it
/// `overlaps`.
struct Counting<'a> {
    gpu: &'a mut Gpu,
    overlaps: bool,
    ahead: usize,
}

impl Backend for Counting<'_> {
    fn vocab_size(&self) -> usize {
        self.gpu.vocab_size()
    }

    fn is_asynchronous(&self) -> bool {
        self.overlaps
    }

    fn enqueue(&mut self, step: &Step<'_>) -> Result<()> {
        self.ahead += usize::from(step.tokens.iter().any(|token| matches!(token, StepToken::Chosen(_))));
        self.gpu.enqueue(step)
    }

    fn collect(&mut self) -> Result<Vec<Sample>> {
        self.gpu.collect()
    }

    fn logits(&self) -> Result<Vec<f32>> {
        self.gpu.logits()
    }
}

/// Under penalties, answers of the loop that overlaps are those of the one that waits for each token.
#[test]
fn penalties_need_no_waiting_and_change_no_answer() {
    const TOKENS: usize = 200;
    let Some(_turn) = turn() else { return };
    let loaded = loaded().expect("the pinned model");
    let pool = PageAllocator::new(600, 16).unwrap();
    let none = || SamplingParams { ignore_eos: true, ..greedy(TOKENS) };
    let all = SamplingParams {
        repetition_penalty: 1.1,
        presence_penalty: 0.3,
        frequency_penalty: 0.2,
        logit_bias: [(28, 1.5), (30, -2.0), (198, 0.5)].into(),
        ..none()
    };
    let penalties = [
        none(),
        SamplingParams { repetition_penalty: 1.3, ..none() },
        SamplingParams { presence_penalty: 1.0, ..none() },
        SamplingParams { frequency_penalty: 0.6, ..none() },
        SamplingParams { frequency_penalty: -0.2, logit_bias: [(28, -1.0)].into(), ..none() },
        SamplingParams { stop_token_ids: vec![30], min_tokens: 40, ..all.clone() },
        SamplingParams { temperature: 0.9, top_p: 0.95, seed: Some(3), ..all },
    ];
    // Rows are the same bits in steps of any size.
    let options = GpuOptions { deterministic: true, ..GpuOptions::new(128) };
    let mut gpu = loaded.gpu_with(&pool, options);
    for prompts in [&[STORY.0][..], &[STORY.0, CHAT.0, CAPITAL.0]] {
        let mut answers = |overlaps| {
            let mut backend = Counting { gpu: &mut gpu, overlaps, ahead: 0 };
            let mut requests = Requests::new(&pool, backend.vocab_size(), limits(128, 0));
            for (prompt, params) in
                prompts.iter().flat_map(|prompt| penalties.iter().map(move |it| (prompt, it)))
            {
                requests.submit(prompt, params).unwrap();
            }
            requests.finish(&mut backend);
            let (all, steps) = (penalties.len() * prompts.len(), requests.scheduler.stats().steps);
            (backend.ahead, steps, (0..all).map(|request| requests.answer(request).ids()).collect::<Vec<_>>())
        };
        // First, so that memory for edits grows while a step is in flight.
        let (ahead, steps, overlapping) = answers(true);
        let (none_ahead, _, waiting) = answers(false);
        assert_eq!(none_ahead, 0);
        // But for those that read prompts.
        assert!(ahead + 10 >= steps && steps >= TOKENS, "{ahead} of {steps} steps");
        let mut edits = 0;
        for (request, (got, want)) in overlapping.iter().zip(&waiting).enumerate() {
            let (prompt, kind) = (request / penalties.len(), request % penalties.len());
            assert_eq!(got, want, "prompt {prompt}, {:?}", penalties[kind]);
            let is_plain = *got == waiting[prompt * penalties.len()];
            assert_eq!(is_plain, kind == 0, "prompt {prompt}, {:?}: nothing was penalized", penalties[kind]);
            edits += if is_plain { 0 } else { got.iter().collect::<BTreeSet<_>>().len() };
        }
        // What there is room for at first.
        assert!(prompts.len() == 1 || edits > 1024, "{edits}");
    }
}
