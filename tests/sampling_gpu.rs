//! Drawing tokens, against the exact distributions and the CPU reference.
#![cfg(feature = "cudarc")]

mod common;

#[path = "common/sampling.rs"]
mod rows;

mod sampling_gpu {
    mod argmax;
    mod chains;
    mod edges;
    mod renorm;
    mod sample;
    mod statistic;
}

use common::{Gpu, Mirrored, Rng, attention::capture, refused};
use cudarc::driver::{CudaSlice, DeviceRepr};
use flashinfer_rs::{
    Element, ModuleName, Result, TensorRef,
    gpu::{TensorExt, TensorExtMut},
    indices::{BoundedIndices, BoundedTable},
    reference::{self, Filter},
    sampling::{self, *},
};
use rows::{distribution, half, peaked};
use test_support::chi_square::assert_drawn_from;

/// Integers that tokens are written as.
trait Token: Element + DeviceRepr {
    fn from_i32(number: i32) -> Self;
    fn to_i64(self) -> i64;
}

impl Token for i32 {
    fn from_i32(number: i32) -> Self {
        number
    }
    fn to_i64(self) -> i64 {
        self.into()
    }
}

impl Token for i64 {
    fn from_i32(number: i32) -> Self {
        number.into()
    }
    fn to_i64(self) -> i64 {
        self
    }
}

/// The function of a filter.
fn sample(
    gpu: &Gpu,
    samples: &mut Samples<'_>,
    probs: &TensorRef<'_>,
    filter: &Filter<'_>,
    options: &SamplingOptions<'_>,
) -> Result<()> {
    let stream = &gpu.stream;
    match *filter {
        Filter::None => sampling_from_probs(stream, samples, probs, options),
        Filter::TopK(k) => top_k_sampling_from_probs(stream, samples, probs, k, options),
        Filter::TopP(p) => top_p_sampling_from_probs(stream, samples, probs, p, options),
        Filter::MinP(p) => min_p_sampling_from_probs(stream, samples, probs, p, options),
        Filter::TopKTopP(k, p) => top_k_top_p_sampling_from_probs(stream, samples, probs, k, p, options),
    }
}

/// Outputs on the device, poisoned.
struct Outputs<T> {
    output: CudaSlice<T>,
    valid: CudaSlice<u8>,
    rows: usize,
}

impl<T: Token> Outputs<T> {
    fn new(gpu: &Gpu, rows: usize) -> Self {
        let len = rows.max(1); // there is no empty allocation on a device
        Self {
            output: gpu.cuda.clone_htod(&vec![T::from_i32(-7); len]).unwrap(),
            valid: gpu.cuda.clone_htod(&vec![9u8; len]).unwrap(),
            rows,
        }
    }

    fn with<R>(&mut self, gpu: &Gpu, work: impl FnOnce(&mut Samples<'_>) -> R) -> R {
        let mut output = self.output.tensor_mut(&gpu.cuda, &[self.rows]).unwrap();
        let mut valid = self.valid.tensor_mut(&gpu.cuda, &[self.rows]).unwrap();
        work(&mut Samples::new(output.view_mut(), valid.view_mut()))
    }

    /// The tokens, and -7 where nothing was written.
    fn tokens(&self, gpu: &Gpu) -> Vec<i64> {
        let output = gpu.cuda.clone_dtoh(&self.output).unwrap();
        gpu.synchronize();
        output.into_iter().take(self.rows).map(T::to_i64).collect()
    }

    /// The tokens, or `None` where there is none.
    fn download(&self, gpu: &Gpu) -> Vec<Option<usize>> {
        let valid = gpu.cuda.clone_dtoh(&self.valid).unwrap();
        let tokens = self.tokens(gpu).into_iter().zip(valid).map(|pair| match pair {
            (0, 0) => None,
            (token, 1) => Some(usize::try_from(token).expect("a token")),
            other => panic!("token and validity are {other:?}"),
        });
        tokens.collect()
    }
}

/// Draws into outputs of their own.
fn draw<T: Token>(
    gpu: &Gpu,
    filter: &Filter<'_>,
    probs: &Mirrored<f32>,
    rows: usize,
    options: &SamplingOptions<'_>,
) -> Vec<Option<usize>> {
    let mut outputs = Outputs::<T>::new(gpu, rows);
    let probs = probs.device_view();
    outputs.with(gpu, |samples| sample(gpu, samples, &probs, filter, options)).unwrap();
    outputs.download(gpu)
}

fn table(gpu: &Gpu, bound: usize, values: Vec<i32>) -> BoundedTable {
    BoundedTable::new(&gpu.stream, BoundedIndices::new(bound, values).unwrap()).unwrap()
}

fn options<'a>(random: Philox, indices: Option<&'a BoundedTable>) -> SamplingOptions<'a> {
    let mut options = SamplingOptions::with_random(random);
    options.indices = indices.map(Indices::from);
    options
}

fn certain(tokens: Vec<Option<usize>>) -> Vec<usize> {
    tokens.into_iter().map(|token| token.expect("a token of every row")).collect()
}

const VOCABS: [usize; 10] = [1, 2, 7, 100, 1023, 4096, 32000, 50257, 128256, 256000];

/// Every filter draws what it leaves, in proportion.
#[test]
fn distributions() {
    const DRAWS: usize = 30_000;
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let all = table(&gpu, 1, vec![0; DRAWS]);
    let mut random = Philox::new(0x5eed, 0);
    for vocab in VOCABS {
        let (row, peaks) = peaked(rng, vocab);
        let (top_k, top_p, min_p) = half(&row, peaks);
        let probs = Mirrored::new(&gpu, &[1, vocab], row.clone());
        for (at, filter) in [
            Filter::None,
            Filter::TopK(top_k.into()),
            Filter::TopK(u32::MAX.into()),
            Filter::TopP(top_p.into()),
            Filter::MinP(min_p.into()),
            Filter::TopKTopP((top_k + 3).into(), top_p.into()),
            Filter::TopKTopP(top_k.into(), 1.0.into()),
        ]
        .iter()
        .enumerate()
        {
            for deterministic in [true, false] {
                if !deterministic && vocab % 1000 == 0 {
                    continue;
                }
                let mut options = options(random.take(Draws::Filtered { rows: DRAWS }), Some(&all));
                options.deterministic = deterministic;
                let tokens = certain(draw::<i32>(&gpu, filter, &probs, DRAWS, &options));
                let what = format!("vocabulary {vocab}, filter {at}, deterministic {deterministic}");
                assert_drawn_from(&what, &tokens, &distribution(&row, filter));
            }
        }
        probs.assert_untouched();
    }
}

/// Logits are drawn from their softmax, those of -∞ never.
#[test]
fn distributions_of_logits() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut random = Philox::new(0x1091, 0);
    for vocab in VOCABS {
        let draws = 30_000.min((u32::MAX as usize / vocab).min(1 << 20));
        let (mut row, _) = peaked(rng, vocab);
        if vocab > 1023 {
            // The kernel's numbers have 24 bits: it draws tokens of less than
            // about 10^-5 too rarely, and so together too few of the rest.
            row.iter_mut().filter(|x| **x < 1e-4).for_each(|x| *x = 0.0);
        }
        let logits = Mirrored::new(&gpu, &[1, vocab], row.iter().map(|x| x.ln() + 3.0).collect());
        let all = table(&gpu, 1, vec![0; draws]);
        let mut outputs = Outputs::<i64>::new(&gpu, draws);
        let options = options(random.take(Draws::Logits { rows: draws, vocab }), Some(&all));
        {
            let logits = logits.device_view();
            let call = outputs.with(&gpu, |samples| {
                sampling_from_logits(&gpu.stream, &mut samples.output, &logits, &options)
            });
            call.unwrap();
        }
        let tokens: Vec<usize> = outputs.tokens(&gpu).into_iter().map(|token| token as usize).collect();
        let sum: f64 = row.iter().map(|&x| f64::from(x)).sum();
        let probs: Vec<f64> = row.iter().map(|&x| f64::from(x) / sum).collect();
        assert_drawn_from(&format!("logits of {vocab}"), &tokens, &probs);
    }
}

/// Both orders of both filters, from logits.
#[test]
fn filters_of_logits() {
    const DRAWS: usize = 30_000;
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let all = table(&gpu, 1, vec![0; DRAWS]);
    let mut random = Philox::new(0xf117, 0);
    for vocab in [7, 1023, 32000, 128256] {
        let mut workspace = SamplingWorkspace::new(&gpu.stream, 1, vocab).unwrap();
        let (row, peaks) = peaked(rng, vocab);
        let (top_k, top_p, _) = half(&row, peaks);
        let logits = Mirrored::new(&gpu, &[1, vocab], row.iter().map(|x| x.ln() - 1.0).collect());
        for order in [FilterOrder::TopKFirst, FilterOrder::Joint] {
            let mut filter = TopKTopP::new(top_k + 2, top_p);
            filter.order = order;
            let mut probs = Mirrored::<f32>::poisoned(&gpu, &[1, vocab]);
            let mut outputs = Outputs::<i32>::new(&gpu, DRAWS);
            {
                let (logits, mut probs) = (logits.device_view(), probs.device_view_mut());
                let options = options(random.take(Draws::Filtered { rows: DRAWS }), Some(&all));
                let call = outputs.with(&gpu, |samples| {
                    let probs = &mut probs.reborrow();
                    top_k_top_p_sampling_from_logits(
                        &mut workspace,
                        samples,
                        probs,
                        &logits,
                        &filter,
                        &options,
                    )
                });
                call.unwrap();
            }
            let want = match order {
                FilterOrder::Joint => distribution(&row, &Filter::TopKTopP(filter.top_k, filter.top_p)),
                FilterOrder::TopKFirst => {
                    let first = distribution(&row, &Filter::TopK(filter.top_k));
                    let first: Vec<f32> = first.into_iter().map(|x| x as f32).collect();
                    // A place where no sum of the renormalized row is near.
                    let kept: f64 = first.iter().map(|&x| f64::from(x)).filter(|&x| x > 0.0).sum();
                    assert!((kept - 1.0).abs() < 1e-5);
                    distribution(&first, &Filter::TopP(filter.top_p))
                }
            };
            let tokens = certain(outputs.download(&gpu));
            assert_drawn_from(&format!("logits of {vocab}, {order:?}"), &tokens, &want);
        }
    }
}

/// Where one number decides, it is the reference's number and so its token,
/// but for rows where a sum in `f32` falls on the other side of it.
#[test]
fn tokens_of_the_reference() {
    const DRAWS: usize = 4096;
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for vocab in [7, 1023, 32000] {
        let rows: Vec<f32> = (0..16).flat_map(|_| peaked(rng, vocab).0).collect();
        let probs = Mirrored::new(&gpu, &[16, vocab], rows);
        let rows: Vec<i32> = (0..DRAWS).map(|_| rng.below(16) as i32).collect();
        let indices = table(&gpu, 16, rows);
        for offset in [0, 4, 6, u64::from(u32::MAX) * 4 + 3] {
            let random = Philox::new(rng.bits(), offset);
            for filter in [Filter::None, Filter::MinP(0.05.into())] {
                let got = draw::<i32>(&gpu, &filter, &probs, DRAWS, &options(random, Some(&indices)));
                let want =
                    reference::sampling_from_probs(&probs.view(), &filter, Some(indices.host()), random)
                        .unwrap();
                let other = got
                    .iter()
                    .zip(&want)
                    .filter(|(got, want)| got.map(|token| token as i32) != **want)
                    .count();
                eprintln!("vocabulary {vocab}, {random:?}: {other} of {DRAWS} tokens differ");
                assert!(other <= DRAWS / 20, "{other} of {DRAWS} tokens are not the reference's");
            }
        }
    }
}

/// Rows of which one token has everything, in batches of all sizes, with
/// parameters for all and for each.
#[test]
fn one_hot_rows() {
    fn run<T: Token>(gpu: &Gpu, rng: &mut Rng, batch: usize, vocab: usize) {
        let hot: Vec<usize> = (0..batch).map(|_| rng.below(vocab)).collect();
        let mut rows = vec![0.0f32; batch * vocab];
        hot.iter().enumerate().for_each(|(row, &token)| rows[row * vocab + token] = 1.0);
        let probs = Mirrored::new(gpu, &[batch, vocab], rows);
        let random = Philox::new(rng.bits(), 8);
        let want: Vec<_> = hot.iter().map(|&token| Some(token)).collect();
        for filter in [
            Filter::None,
            Filter::TopK(1.into()),
            Filter::TopK(50.into()),
            Filter::TopP(0.3.into()),
            Filter::TopP(1.0.into()),
            Filter::MinP(0.5.into()),
            Filter::TopKTopP(2.into(), 0.5.into()),
        ] {
            assert_eq!(draw::<T>(gpu, &filter, &probs, batch, &options(random, None)), want, "{filter:?}");
        }
    }
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for (batch, vocab) in
        [(1, 1), (1, 32000), (2, 3), (17, 1001), (64, 50257), (33, 128256), (3, 256000), (1024, 999)]
    {
        run::<i32>(&gpu, rng, batch, vocab);
        run::<i64>(&gpu, rng, batch, vocab);
    }
}

/// `top_k` 1 takes the likeliest token, and any of several that are as likely.
#[test]
fn likeliest_tokens() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for (batch, vocab) in [(1, 32000), (40, 1013), (9, 128256)] {
        let mut rows = Vec::new();
        let mut likeliest = Vec::new();
        for row in 0..batch {
            let (mut numbers, _) = peaked(rng, vocab);
            let order = rng.permutation(vocab);
            let max = numbers.iter().copied().fold(0.0, f32::max);
            let mut best: Vec<usize> = (0..vocab).filter(|&token| numbers[token] == max).collect();
            if row % 2 == 1 {
                // A second one; the sum is a little above 1 then.
                let other = order[0] as usize;
                numbers[other] = max;
                best.push(other);
            }
            likeliest.push(best);
            rows.extend(numbers);
        }
        let probs = Mirrored::new(&gpu, &[batch, vocab], rows);
        for filter in
            [Filter::TopK(1.into()), Filter::MinP(1.0.into()), Filter::TopKTopP(1.into(), 1.0.into())]
        {
            let tokens =
                certain(draw::<i32>(&gpu, &filter, &probs, batch, &options(Philox::new(1, 2), None)));
            for (token, best) in tokens.iter().zip(&likeliest) {
                assert!(best.contains(token), "{token} is not in {best:?}");
            }
        }
    }
}

/// Of two likeliest tokens, `top_k` 1 draws both.
#[test]
fn ties_are_all_likeliest() {
    let Some(gpu) = Gpu::start() else { return };
    let all = table(&gpu, 1, vec![0; 1000]);
    let probs = Mirrored::new(&gpu, &[1, 3], vec![0.4, 0.4, 0.2]);
    for filter in [Filter::TopK(1.into()), Filter::TopKTopP(1.into(), 1.0.into())] {
        let tokens =
            certain(draw::<i32>(&gpu, &filter, &probs, 1000, &options(Philox::new(1, 2), Some(&all))));
        for token in 0..3 {
            assert_eq!(tokens.contains(&token), token < 2, "{filter:?}: {token}");
        }
    }
}

/// The same numbers give the same tokens, others give others, whether they
/// come from the host or from the device.
#[test]
fn random_numbers() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let (batch, vocab) = (256, 32000);
    let probs = rows::softmax_rows(&gpu, rng, [batch, vocab], 1.0);
    for filter in [
        Filter::None,
        Filter::TopK(1000.into()),
        Filter::TopP(0.9.into()),
        Filter::MinP(0.01.into()),
        Filter::TopKTopP(1000.into(), 0.9.into()),
    ] {
        let run = |random: Random<'_>| {
            draw::<i32>(&gpu, &filter, &probs, batch, &SamplingOptions::with_random(random))
        };
        let seed = rng.bits() | 1 << 63; // all bits count
        let first = run(Philox::new(seed, 12).into());
        for _ in 0..4 {
            assert_eq!(run(Philox::new(seed, 12).into()), first);
        }
        let differ = |other: Vec<Option<usize>>| {
            let others = first.iter().zip(&other).filter(|(a, b)| a != b).count();
            assert!(others > batch / 2, "{filter:?}: only {others} of {batch} tokens are others");
        };
        differ(run(Philox::new(seed, 16).into()));
        differ(run(Philox::new(seed ^ (1 << 63), 12).into()));
        differ(run(Philox::new(seed ^ 1, 12).into()));
        let pair = gpu.cuda.clone_htod(&[seed, 12u64]).unwrap();
        let pair = pair.tensor(&gpu.cuda, &[2]).unwrap();
        assert_eq!(run(Random::Device(pair.view())), first);
        let pair = gpu.cuda.clone_htod(&[seed.cast_signed(), 16]).unwrap();
        let pair = pair.tensor(&gpu.cuda, &[2]).unwrap();
        assert_eq!(run(Random::Device(pair.view())), run(Philox::new(seed, 16).into()));
    }
}

/// A parameter of `top_k` or `min_p` for the first `each` rows of the output, which are of row
/// 1, and one for as many of row 0. With kernels of 0.7, a number is for a row of probabilities.
fn by_row<P: Copy>(gpu: &Gpu, [first, second]: [P; 2], each: usize) -> Vec<P> {
    if common::is_0_7(gpu.runtime.module(&ModuleName::SAMPLING).unwrap()) {
        return vec![second, first];
    }
    let mut numbers = vec![first; each];
    numbers.resize(2 * each, second);
    numbers
}

/// A number for each row: by rows of probabilities for `top_p` and both, by
/// rows of the output for `top_k` and `min_p`, see [`by_row`].
#[test]
fn parameters_of_each_row() {
    const EACH: usize = 10_000;
    fn run<T: Token>(gpu: &Gpu, rng: &mut Rng) {
        let vocab = 1023;
        let (row, peaks) = peaked(rng, vocab);
        let (top_k, top_p, min_p) = half(&row, peaks);
        let probs = Mirrored::new(gpu, &[2, vocab], row.repeat(2));
        let upload = |numbers: Vec<f32>| gpu.cuda.clone_htod(&numbers).unwrap();
        // The first half of the tokens is of row 1, the second of row 0.
        let mut rows = vec![1; EACH];
        rows.resize(2 * EACH, 0);
        let indices = table(gpu, 2, rows);
        let options = options(Philox::new(rng.bits(), 0), Some(&indices));
        let check = |filter: Filter<'_>, parts: [Filter<'_>; 2]| {
            let tokens = certain(draw::<T>(gpu, &filter, &probs, 2 * EACH, &options));
            for (tokens, part) in tokens.chunks(EACH).zip(parts) {
                assert_drawn_from(&format!("{part:?}"), tokens, &distribution(&row, &part));
            }
        };
        let top_ps = upload(vec![1.0, top_p as f32]);
        let top_ps = top_ps.tensor(&gpu.cuda, &[2]).unwrap();
        let top_ps = Parameter::PerRow(top_ps.view());
        check(Filter::TopP(top_ps), [Filter::TopP(top_p.into()), Filter::None]);
        let both = gpu.cuda.clone_htod(&[T::from_i32(top_k as i32), T::from_i32(-1)]).unwrap();
        let both = both.tensor(&gpu.cuda, &[2]).unwrap();
        let both = Filter::TopKTopP(Parameter::PerRow(both.view()), top_ps);
        check(both, [Filter::TopP(top_p.into()), Filter::TopK(top_k.into())]);

        let top_ks = by_row(gpu, [T::from_i32(top_k as i32), T::from_i32(2)], EACH);
        let len = top_ks.len();
        let top_ks = gpu.cuda.clone_htod(&top_ks).unwrap();
        let top_ks = top_ks.tensor(&gpu.cuda, &[len]).unwrap();
        let parts = [Filter::TopK(top_k.into()), Filter::TopK(2.into())];
        check(Filter::TopK(Parameter::PerRow(top_ks.view())), parts);
        let min_ps = upload(by_row(gpu, [min_p as f32, 0.95], EACH));
        let min_ps = min_ps.tensor(&gpu.cuda, &[len]).unwrap();
        let parts = [Filter::MinP(min_p.into()), Filter::MinP(0.95.into())];
        check(Filter::MinP(Parameter::PerRow(min_ps.view())), parts);
    }
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    run::<i32>(&gpu, rng);
    run::<i64>(&gpu, rng);
}

/// A captured draw takes other random numbers in each replay, from the device.
#[test]
fn graph_replay() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    let (batch, vocab) = (64, 32000);
    let probs = rows::softmax_rows(&gpu, rng, [batch, vocab], 1.0);
    for filter in [
        Some(Filter::None),
        Some(Filter::TopK(1000.into())),
        Some(Filter::TopP(0.9.into())),
        Some(Filter::MinP(0.01.into())),
        Some(Filter::TopKTopP(1000.into(), 0.9.into())),
        None, // as logits
    ] {
        let call =
            |samples: &mut Samples<'_>, rows: &TensorRef<'_>, options: &SamplingOptions<'_>| match &filter {
                Some(filter) => sample(&gpu, samples, rows, filter, options),
                None => sampling_from_logits(&gpu.stream, &mut samples.output, rows, options),
            };
        let eager = |random| {
            let mut outputs = Outputs::<i32>::new(&gpu, batch);
            let rows = probs.device_view();
            outputs.with(&gpu, |samples| call(samples, &rows, &options(random, None))).unwrap();
            outputs.tokens(&gpu)
        };
        eager(Philox::default()); // loads the kernel
        let mut random = Philox::new(rng.bits(), 0);
        let mut pair = gpu.cuda.clone_htod(&[random.seed, u64::MAX]).unwrap();
        let mut outputs = Outputs::<i32>::new(&gpu, batch);
        let (graph, result) = {
            let (pair, probs) = (pair.tensor(&gpu.cuda, &[2]).unwrap(), probs.device_view());
            let (pair, probs) = (pair.view(), probs);
            outputs.with(&gpu, |samples| {
                let options = SamplingOptions::with_random(Random::Device(pair));
                capture(&gpu, || call(samples, &probs, &options))
            })
        };
        result.unwrap();
        let graph = graph.expect("a graph");
        assert_eq!(outputs.tokens(&gpu), vec![-7; batch], "captured is not run");
        let mut last = Vec::new();
        for _ in 0..3 {
            let here = random.take(match filter {
                Some(_) => Draws::Filtered { rows: batch },
                None => Draws::Logits { rows: batch, vocab },
            });
            gpu.cuda.memcpy_htod(&[here.seed, here.offset], &mut pair).unwrap();
            graph.launch().unwrap();
            let tokens = outputs.tokens(&gpu);
            assert_eq!(tokens, eager(here), "{filter:?}");
            assert_ne!(tokens, last);
            last = tokens;
        }
    }
}
