//! Speculative sampling of chains of drafts.

use crate::*;

/// A chain's tensors on the device, and the drafts' tokens.
struct ChainCase {
    draft: Mirrored<f32>,
    target: Mirrored<f32>,
    ids: BoundedTable,
    shape: [usize; 3],
}

impl ChainCase {
    /// Of rows that hold for every request, with tokens drawn by the reference.
    fn new(gpu: &Gpu, rng: &mut Rng, batch: usize, draft: &[Vec<f32>], target: &[Vec<f32>]) -> Self {
        let (drafts, vocab) = (draft.len(), draft[0].len());
        let all = BoundedIndices::new(1, vec![0; batch]).unwrap();
        let mut ids = vec![0; batch * drafts];
        for (place, row) in draft.iter().enumerate() {
            let row = TensorRef::from_slice(row, &[1, vocab]).unwrap();
            let random = Philox::new(rng.bits(), 0);
            let tokens = reference::sampling_from_probs(&row, &Filter::None, Some(&all), random).unwrap();
            for (request, token) in tokens.into_iter().enumerate() {
                ids[request * drafts + place] = token.unwrap();
            }
        }
        Self {
            draft: Mirrored::new(gpu, &[batch, drafts, vocab], draft.concat().repeat(batch)),
            target: Mirrored::new(gpu, &[batch, drafts + 1, vocab], target.concat().repeat(batch)),
            ids: table(gpu, vocab, ids),
            shape: [batch, drafts, vocab],
        }
    }

    /// Poisoned tokens, and these accepted and emitted numbers.
    fn outputs(&self, gpu: &Gpu, before: i32) -> [CudaSlice<i32>; 3] {
        let [batch, drafts, _] = self.shape;
        [(batch * (drafts + 1), -7), (batch, before), (batch, before)]
            .map(|(len, number)| gpu.cuda.clone_htod(&vec![number; len]).unwrap())
    }

    fn with<R>(
        &self,
        gpu: &Gpu,
        outputs: &mut [CudaSlice<i32>; 3],
        work: impl FnOnce(&mut ChainSamples<'_>, &ChainInput<'_>) -> R,
    ) -> R {
        let [batch, drafts, _] = self.shape;
        let (draft, target) = (self.draft.device_view(), self.target.device_view());
        let [tokens, accepted, emitted] = outputs;
        let mut tokens = tokens.tensor_mut(&gpu.cuda, &[batch, drafts + 1]).unwrap();
        let mut accepted = accepted.tensor_mut(&gpu.cuda, &[batch]).unwrap();
        let mut emitted = emitted.tensor_mut(&gpu.cuda, &[batch]).unwrap();
        work(
            &mut ChainSamples::new(tokens.view_mut(), accepted.view_mut(), emitted.view_mut()),
            &ChainInput::new(draft, &self.ids, target),
        )
    }

    fn download(gpu: &Gpu, outputs: &[CudaSlice<i32>; 3]) -> [Vec<i32>; 3] {
        let outputs = outputs.each_ref().map(|output| gpu.cuda.clone_dtoh(output).unwrap());
        gpu.synchronize();
        outputs
    }

    /// Tokens, accepted and emitted numbers; the numbers are added to these.
    fn run(&self, gpu: &Gpu, random: Philox, before: i32) -> [Vec<i32>; 3] {
        let mut outputs = self.outputs(gpu, before);
        let options = SamplingOptions::with_random(random);
        let call = self.with(gpu, &mut outputs, |samples, input| {
            chain_speculative_sampling(&gpu.stream, samples, input, &options)
        });
        call.unwrap();
        Self::download(gpu, &outputs)
    }
}

/// Whatever the draft, tokens are distributed as the target's.
#[test]
fn chain_distributions() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for (drafts, vocab, batch) in [(1, 7, 20_000), (2, 64, 20_000), (3, 33, 20_000)] {
        let mut rows = |count| (0..count).map(|_| peaked(rng, vocab).0).collect::<Vec<_>>();
        let (mut draft, target) = (rows(drafts), rows(drafts + 1));
        // Drafts that resemble the target, so that later places are reached.
        for (draft, target) in draft.iter_mut().zip(&target) {
            draft.iter_mut().zip(target).for_each(|(p, q)| *p = 0.2 * *p + 0.8 * q);
        }
        let case = ChainCase::new(&gpu, rng, batch, &draft, &target);
        let [tokens, accepted, emitted] = case.run(&gpu, Philox::new(0xc4a1, 0), 0);
        for (place, row) in target.iter().enumerate() {
            let tokens: Vec<usize> = tokens
                .chunks(drafts + 1)
                .zip(&emitted)
                .filter(|(_, emitted)| **emitted >= place as i32)
                .map(|(tokens, _)| tokens[place] as usize)
                .collect();
            let probs: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
            assert_drawn_from(&format!("place {place} of {drafts} drafts"), &tokens, &probs);
        }
        for ((tokens, emitted), accepted) in tokens.chunks(drafts + 1).zip(&emitted).zip(&accepted) {
            assert!(
                (0..=drafts as i32).contains(emitted) && (emitted..=&(drafts as i32)).contains(&accepted)
            );
            let (drawn, padding) = tokens.split_at(*emitted as usize + 1);
            assert!(drawn.iter().all(|&token| token >= 0) && padding.iter().all(|&token| token == -1));
        }
    }
}

/// Tokens and numbers of the reference, but for a few rows that rounding decides.
#[test]
fn chains_of_the_reference() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for (drafts, vocab, batch) in [(1, 5, 500), (4, 1023, 300), (3, 32000, 50)] {
        let draft: Vec<_> = (0..drafts).map(|_| peaked(rng, vocab).0).collect();
        let mut target = draft.clone();
        target.push(peaked(rng, vocab).0);
        let other = peaked(rng, vocab).0;
        target[drafts - 1].iter_mut().zip(&other).for_each(|(q, x)| *q = 0.5 * *q + 0.5 * x);
        let case = ChainCase::new(&gpu, rng, batch, &draft, &target);
        let random = Philox::new(rng.bits(), 4);
        let [tokens, accepted, emitted] = case.run(&gpu, random, 100);
        let want = reference::chain_speculative_sampling(
            &case.draft.view(),
            case.ids.host(),
            &case.target.view(),
            random,
        )
        .unwrap();
        // The reference is of 0.6, whose kernels ask the first refused draft again.
        let asks_again = !common::is_0_7(gpu.runtime.module(&ModuleName::SAMPLING).unwrap());
        let same = (0..batch).filter(|&request| {
            let places = request * (drafts + 1)..(request + 1) * (drafts + 1);
            let more = 100 + want.output_accepted_token_num[request] - accepted[request];
            tokens[places.clone()] == want.output_token_ids[places]
                && (more == 0 || !asks_again && more == 1)
                && emitted[request] == 100 + want.output_emitted_draft_token_num[request]
        });
        let same = same.count();
        eprintln!("{drafts} drafts of {vocab}: {same} of {batch} chains are the reference's");
        assert!(same >= batch - batch / 20 - 2, "{same} of {batch} chains are the reference's");
    }
}

/// A captured chain takes other random numbers in each replay, and adds to the
/// numbers of the replay before.
#[test]
fn graph_replay_of_chains() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    let (drafts, vocab, batch) = (3, 1023, 64);
    let mut rows = |count| (0..count).map(|_| peaked(rng, vocab).0).collect::<Vec<_>>();
    let (draft, mut target) = (rows(drafts), rows(drafts + 1));
    for (target, draft) in target.iter_mut().zip(&draft) {
        target.iter_mut().zip(draft).for_each(|(q, p)| *q = 0.3 * *q + 0.7 * p);
    }
    let case = ChainCase::new(&gpu, rng, batch, &draft, &target);
    case.run(&gpu, Philox::default(), 0); // loads the kernel
    let mut random = Philox::new(rng.bits(), 0);
    let mut pair = gpu.cuda.clone_htod(&[random.seed, u64::MAX]).unwrap();
    let mut outputs = case.outputs(&gpu, 0);
    let (graph, result) = {
        let pair = pair.tensor(&gpu.cuda, &[2]).unwrap();
        let options = SamplingOptions::with_random(Random::Device(pair.view()));
        case.with(&gpu, &mut outputs, |samples, input| {
            capture(&gpu, || chain_speculative_sampling(&gpu.stream, samples, input, &options))
        })
    };
    result.unwrap();
    let graph = graph.expect("a graph");
    let mut last = ChainCase::download(&gpu, &outputs);
    assert!(last.concat().iter().all(|number| [-7, 0].contains(number)), "captured is not run");
    for _ in 0..3 {
        let here = random.take(Draws::Chain { rows: batch, drafts });
        gpu.cuda.memcpy_htod(&[here.seed, here.offset], &mut pair).unwrap();
        graph.launch().unwrap();
        let [tokens, accepted, emitted] = ChainCase::download(&gpu, &outputs);
        let [want, more_accepted, more_emitted] = case.run(&gpu, here, 0);
        assert_eq!(tokens, want);
        assert_ne!(tokens, last[0]);
        let sum = |a: &[i32], b: &[i32]| a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<_>>();
        assert_eq!(accepted, sum(&last[1], &more_accepted));
        assert_eq!(emitted, sum(&last[2], &more_emitted));
        last = [tokens, accepted, emitted];
    }
}

/// A draft that is the target is accepted, one that the target never draws is not.
#[test]
fn chains_that_are_certain() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for vocab in [6, 1000, 50257] {
        let (drafts, batch) = (3, 7);
        let row = |from: usize| -> Vec<f32> {
            (0..vocab).map(|token| if token % 2 == from { 2.0 / vocab as f32 } else { 0.0 }).collect()
        };
        let case = ChainCase::new(&gpu, rng, batch, &vec![row(0); drafts], &vec![row(0); drafts + 1]);
        let [tokens, accepted, emitted] = case.run(&gpu, Philox::new(2, 0), 5);
        assert_eq!((accepted, emitted), (vec![5 + 3; batch], vec![5 + 3; batch]));
        for (tokens, ids) in tokens.chunks(drafts + 1).zip(case.ids.host().values().chunks(drafts)) {
            assert_eq!(&tokens[..drafts], ids);
            assert!(tokens[drafts] >= 0 && tokens[drafts] % 2 == 0);
        }
        let case = ChainCase::new(&gpu, rng, batch, &vec![row(0); drafts], &vec![row(1); drafts + 1]);
        let [tokens, accepted, emitted] = case.run(&gpu, Philox::new(2, 0), -1);
        assert_eq!((accepted, emitted), (vec![-1; batch], vec![-1; batch]));
        for tokens in tokens.chunks(drafts + 1) {
            assert_eq!(tokens[0] % 2, 1, "{tokens:?}");
            assert_eq!(tokens[1..], vec![-1; drafts]);
        }
    }
}

/// A target without any probability leaves no token to take in place of a
/// refused draft. That request gets none; the others get theirs.
#[test]
fn refused_drafts_without_a_token() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for vocab in [6, 1000, 50257] {
        let (drafts, batch) = (3, 8);
        let mut rows = |count| (0..count).map(|_| peaked(rng, vocab).0).collect::<Vec<_>>();
        let (draft, target) = (rows(drafts), rows(drafts + 1));
        let mut case = ChainCase::new(&gpu, rng, batch, &draft, &target);
        let random = Philox::new(3, 0);
        let [want, want_accepted, want_emitted] = case.run(&gpu, random, 0);
        let mut host = case.target.host.clone();
        for request in host.chunks_mut((drafts + 1) * vocab).skip(1).step_by(2) {
            request.fill(0.0);
        }
        case.target.upload(&host);
        let [tokens, accepted, emitted] = case.run(&gpu, random, 0);
        for request in 0..batch {
            let row = request * (drafts + 1)..(request + 1) * (drafts + 1);
            if request % 2 == 0 {
                assert_eq!(tokens[row.clone()], want[row], "request {request} of {vocab}");
                let numbers = (accepted[request], emitted[request]);
                assert_eq!(numbers, (want_accepted[request], want_emitted[request]));
            } else {
                assert_eq!((accepted[request], emitted[request]), (0, 0));
                assert_eq!(tokens[row], vec![-1; drafts + 1]);
            }
        }
    }
}

/// Where the target has nowhere more than the draft there is no token, and not
/// what another kernel left in shared memory.
#[test]
fn chains_without_a_token() {
    let Some(gpu) = Gpu::start() else { return };
    let (batch, vocab, drafts) = (300, 100, 2);
    let even = vec![0.01f32; vocab];
    let other = Mirrored::new(&gpu, &[batch, 4000], vec![1.0 / 4000.0; batch * 4000]);
    for target in [f32::NAN, 0.0, -1.0] {
        let target = vec![vec![target; vocab]; drafts + 1];
        let case = ChainCase::new(&gpu, &mut Rng::new(), batch, &vec![even.clone(); drafts], &target);
        draw::<i32>(&gpu, &Filter::None, &other, batch, &options(Philox::new(1, 0), None));
        let random = Philox::new(3, 0);
        let [tokens, accepted, emitted] = case.run(&gpu, random, 0);
        let want = reference::chain_speculative_sampling(
            &case.draft.view(),
            case.ids.host(),
            &case.target.view(),
            random,
        )
        .unwrap();
        assert_eq!(tokens, vec![-1; batch * (drafts + 1)]);
        assert_eq!(tokens, want.output_token_ids);
        assert_eq!((accepted, emitted), (vec![0; batch], vec![0; batch]));
    }
}
