//! Drawing tokens, against the exact distributions and the CPU reference.
#![cfg(feature = "cudarc")]

mod common;
#[path = "common/sampling.rs"]
mod rows;

use common::{Gpu, Mirrored, Rng, attention::capture, refused};
use cudarc::driver::{CudaSlice, DeviceRepr};
use flashinfer_rs::{
    Element, ModuleName, Result, TensorRef,
    cudarc::{TensorExt, TensorExtMut},
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

/// Rows and parameters that mean nothing end all the same, and tokens lie in
/// the vocabulary.
#[test]
fn senseless_rows_and_parameters() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for vocab in [5, 1001, 32000] {
        let (row, _) = peaked(rng, vocab);
        let mut rows = Vec::new();
        let of = |change: &dyn Fn(usize, f32) -> f32| {
            row.iter().enumerate().map(|(token, &x)| change(token, x)).collect::<Vec<f32>>()
        };
        rows.extend(of(&|_, _| 0.0));
        rows.extend(of(&|_, _| f32::NAN));
        rows.extend(of(&|token, x| if token % 3 == 0 { f32::NAN } else { x }));
        rows.extend(of(&|token, x| if token % 4 == 1 { f32::INFINITY } else { x }));
        rows.extend(of(&|_, x| -x));
        rows.extend(of(&|_, x| x * 1e30));
        rows.extend(of(&|_, x| x * 1e-40));
        rows.extend(of(&|_, x| if x > 0.01 { f32::MAX } else { x }));
        let batch = rows.len() / vocab;
        let probs = Mirrored::new(&gpu, &[batch, vocab], rows);
        let options = options(Philox::new(rng.bits(), 0), None);
        let check = |filter: &Filter<'_>| {
            let tokens = draw::<i32>(&gpu, filter, &probs, batch, &options);
            assert!(tokens.iter().flatten().all(|&token| token < vocab), "{filter:?}: {tokens:?}");
            tokens
        };
        for filter in [
            Filter::None,
            Filter::TopK(2.into()),
            Filter::TopP(0.5.into()),
            Filter::MinP(0.5.into()),
            Filter::TopKTopP(2.into(), 0.5.into()),
        ] {
            let tokens = check(&filter);
            // Of zeros there is nothing to draw, of NaN neither; the finite
            // part of a row with NaN is drawn from.
            assert_eq!(tokens[1], None, "{filter:?}");
            if !matches!(filter, Filter::MinP(_)) {
                assert_eq!(tokens[0], None, "{filter:?}");
            }
            assert!(tokens[2].is_some_and(|token| token % 3 != 0), "{filter:?}: {:?}", tokens[2]);
        }
        for number in [0, -1, i32::MIN, i32::MAX] {
            let top_ks = gpu.cuda.clone_htod(&vec![number; batch]).unwrap();
            let top_ks = top_ks.tensor(&gpu.cuda, &[batch]).unwrap();
            check(&Filter::TopK(Parameter::PerRow(top_ks.view())));
            check(&Filter::TopKTopP(Parameter::PerRow(top_ks.view()), 0.5.into()));
        }
        for number in [0.0, -1.0, 2.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-40] {
            let ps = gpu.cuda.clone_htod(&vec![number; batch]).unwrap();
            let ps = ps.tensor(&gpu.cuda, &[batch]).unwrap();
            check(&Filter::TopP(Parameter::PerRow(ps.view())));
            check(&Filter::MinP(Parameter::PerRow(ps.view())));
            check(&Filter::TopKTopP(2.into(), Parameter::PerRow(ps.view())));
        }
        // Logits of these numbers, too.
        let mut outputs = Outputs::<i32>::new(&gpu, batch);
        {
            let logits = probs.device_view();
            let call = outputs.with(&gpu, |samples| {
                sampling_from_logits(&gpu.stream, &mut samples.output, &logits, &options)
            });
            call.unwrap();
        }
        assert!(outputs.tokens(&gpu).iter().all(|token| (0..vocab as i64).contains(token)));
    }
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
        let same = (0..batch).filter(|&request| {
            let places = request * (drafts + 1)..(request + 1) * (drafts + 1);
            tokens[places.clone()] == want.output_token_ids[places]
                && accepted[request] == 100 + want.output_accepted_token_num[request]
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

/// A kernel of this crate is not compiled within a capture. No other test here
/// calls this one.
#[test]
fn first_calls_are_not_captured() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let logits = Mirrored::new(&gpu, &[1, 3], vec![0.5, 2.0, 1.0]);
    let mut tokens = gpu.cuda.clone_htod(&[-7]).unwrap();
    {
        let (logits, mut tokens) = (logits.device_view(), tokens.tensor_mut(&gpu.cuda, &[1]).unwrap());
        let (logits, mut tokens) = (logits, tokens.view_mut());
        let (_, call) = capture(&gpu, || argmax(&gpu.stream, &mut tokens, &logits));
        refused(call, "logits");
        argmax(&gpu.stream, &mut tokens, &logits).unwrap();
        let (graph, call) = capture(&gpu, || argmax(&gpu.stream, &mut tokens, &logits));
        call.unwrap();
        graph.expect("a graph").launch().unwrap();
    }
    assert_eq!(gpu.cuda.clone_dtoh(&tokens).unwrap(), [1]);
}

/// Without rows nothing is written.
#[test]
fn no_rows() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let probs = Mirrored::new(&gpu, &[4, 64], [peaked(rng, 64).0, peaked(rng, 64).0].concat().repeat(2));
    let none = table(&gpu, 4, Vec::new());
    let mut outputs = Outputs::<i32>::new(&gpu, 0);
    let probs = probs.device_view();
    for filter in [Filter::None, Filter::TopK(1.into()), Filter::TopP(0.5.into()), Filter::MinP(0.5.into())] {
        for (probs, options) in [
            (probs.narrow(0, 0, 0).unwrap(), options(Philox::default(), None)),
            (probs, options(Philox::default(), Some(&none))),
        ] {
            outputs.with(&gpu, |samples| sample(&gpu, samples, &probs, &filter, &options)).unwrap();
        }
    }
    outputs.rows = 1;
    assert_eq!(outputs.tokens(&gpu), [-7]);
}

/// What only a device can make wrong; the rest is in `wrong_input.rs`.
#[test]
fn wrong_input() {
    let Some(gpu) = Gpu::start() else { return };
    let (rng, other) = (&mut Rng::new(), gpu.fork());
    let probs = Mirrored::new(&gpu, &[4, 64], peaked(rng, 64).0.repeat(4));
    let mut outputs = Outputs::<i32>::new(&gpu, 4);
    let good = options(Philox::default(), None);
    {
        let elsewhere = probs.copied_to(&other);
        let call = outputs
            .with(&gpu, |samples| sample(&gpu, samples, &elsewhere.device_view(), &Filter::None, &good));
        refused(call, "probs");
        let probs = probs.device_view();
        let call = outputs.with(&other, |samples| sample(&gpu, samples, &probs, &Filter::None, &good));
        refused(call, "output");
        let mut run = |table: &BoundedTable| {
            let options = options(Philox::default(), Some(table));
            outputs.with(&gpu, |samples| sample(&gpu, samples, &probs, &Filter::None, &options))
        };
        refused(run(&table(&gpu, 5, vec![0; 4])), "indices");
        refused(run(&table(&gpu, 4, vec![0; 3])), "indices");
        refused(run(&table(&other, 4, vec![0; 4])), "indices");
        let pair = gpu.cuda.clone_htod(&[1u64, 2]).unwrap();
        let pair = pair.tensor(&other.cuda, &[2]).unwrap();
        let call = outputs.with(&gpu, |samples| {
            let options = SamplingOptions::with_random(Random::Device(pair.view()));
            sample(&gpu, samples, &probs, &Filter::None, &options)
        });
        refused(call, "random");
    }
    other.synchronize();
    assert_eq!(outputs.tokens(&gpu), vec![-7; 4]);
    let call = outputs.with(&gpu, |samples| {
        sampling::sampling_from_probs(&gpu.stream, samples, &probs.device_view(), &good)
    });
    call.unwrap();
    assert!(outputs.download(&gpu).iter().all(Option::is_some));
}

/// The statistic itself, with draws of the reference.
mod statistic {
    use std::panic::catch_unwind;

    use flashinfer_rs::{
        TensorRef,
        indices::BoundedIndices,
        reference::{Filter, sampling_from_probs},
        sampling::Philox,
    };

    use test_support::chi_square::{assert_drawn_from, limit, statistic};

    const PROBS: [f32; 8] = [0.3, 0.2, 0.15, 0.125, 0.1, 0.075, 0.04, 0.01];
    const DRAWS: usize = 20_000;

    fn draws(seed: u64) -> Vec<usize> {
        let indices = BoundedIndices::new(1, vec![0; DRAWS]).unwrap();
        let probs = TensorRef::from_slice(&PROBS, &[1, 8]).unwrap();
        let tokens =
            sampling_from_probs(&probs, &Filter::None, Some(&indices), Philox::new(seed, 0)).unwrap();
        tokens.into_iter().map(|token| token.unwrap() as usize).collect()
    }

    #[test]
    fn limits_are_exceeded_once_in_a_billion() {
        // The chance of exceeding it, which an even number of degrees has in
        // closed form: exp(-x/2) times the first terms of the series of exp(x/2).
        for degrees in [2, 10, 40, 100] {
            let half = limit(degrees) / 2.0;
            let (mut term, mut sum) = (1.0, 0.0);
            for at in 0..degrees / 2 {
                sum += term;
                term *= half / (at + 1) as f64;
            }
            let chance = sum * (-half).exp();
            assert!((1e-11..2e-9).contains(&chance), "{degrees}: {chance:e}");
        }
    }

    #[test]
    fn right_draws_are_far_from_the_limit() {
        for seed in 0..100 {
            let mut counts = [0; 8];
            draws(seed).into_iter().for_each(|token| counts[token] += 1);
            let (sum, degrees) = statistic(&counts, &PROBS.map(f64::from));
            assert_eq!(degrees, 7);
            assert!(sum < limit(7) / 1.5, "seed {seed}: {sum}");
        }
    }

    #[test]
    fn slightly_wrong_distributions_are_caught() {
        let right = PROBS.map(f64::from);
        let tokens = draws(5);
        assert_drawn_from("right", &tokens, &right);
        let caught = |what: &str, probs: [f64; 8]| {
            assert!(catch_unwind(|| assert_drawn_from(what, &tokens, &probs)).is_err(), "{what}");
        };
        let with = |changes: &[(usize, f64)]| {
            let mut probs = right;
            changes.iter().for_each(|&(token, change)| probs[token] += change);
            probs
        };
        // A token of 0.2 that should have 0.225, a rare one that should have
        // 0.02, and two that are mistaken for each other.
        caught("0.025 moved", with(&[(0, -0.025), (1, 0.025)]));
        caught("0.01 moved", with(&[(0, -0.01), (7, 0.01)]));
        caught("exchanged", with(&[(2, -0.025), (3, 0.025)]));
        caught("impossible", with(&[(7, -0.01), (0, 0.01)]));
    }
}
