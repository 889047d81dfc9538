//! Steps that follow each other on the GPU, before the host knows their tokens.

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
