//! A sampling step in one call: the reference against exact distributions, and the kernel against
//! the reference, token by token. The tests of the reference need no GPU.

use crate::common::{Gpu, Mirrored, Rng, assert_same_bits, captured, refused};
use cudarc::driver::CudaSlice;
use flashinfer_rs::{
    TensorMut, TensorRef,
    gpu::{SliceRef, TensorExt, TensorExtMut},
    graph::CapturedStep,
    indices::{LogitEdit, LogitEditTable, LogitEdits},
    reference::{self, Filter},
    sampling::{Parameter, SampleOptions, argmax, edit_logits, sample},
};
use test_support::chi_square::assert_drawn_from;

const INF: f32 = f32::INFINITY;

/// The parameters of each row.
#[derive(Clone, Debug, Default)]
struct Rows {
    uniforms: Vec<f32>,
    temperatures: Vec<f32>,
    top_ks: Vec<i32>,
    top_ps: Vec<f32>,
    min_ps: Vec<f32>,
}

/// Those of one row: temperature, top-k, top-p, min-p.
type Row = (f32, i32, f32, f32);

impl Rows {
    fn push(&mut self, uniform: f32, (temperature, top_k, top_p, min_p): Row) {
        self.uniforms.push(uniform);
        self.temperatures.push(temperature);
        self.top_ks.push(top_k);
        self.top_ps.push(top_p);
        self.min_ps.push(min_p);
    }

    /// Rows of the same parameters.
    fn of(uniforms: Vec<f32>, row: Row) -> Self {
        let mut rows = Self::default();
        uniforms.into_iter().for_each(|uniform| rows.push(uniform, row));
        rows
    }

    /// Requests of all kinds: some greedy, some without this or that filter, few whose numbers
    /// mean nothing.
    fn random(rng: &mut Rng, count: usize, vocab: usize) -> Self {
        let mut rows = Self::default();
        for _ in 0..count {
            let mut of = |usual: &[f32], odd: &[f32]| match rng.below(20) {
                0 => odd[rng.below(odd.len())],
                _ => usual[rng.below(usual.len())],
            };
            let row = (
                of(&[0.0, 0.3, 0.7, 1.0, 1.0, 1.7, 100.0], &[-1.0, f32::NAN, INF, 1e-30, 1e30, 1e-45]),
                of(&[0.0, 1.0, 2.0, 40.0, vocab as f32 / 3.0, vocab as f32, 1e9], &[-1.0, -2e9]) as i32,
                of(&[1.0, 1.0, 0.95, 0.9, 0.5, 0.01, 0.9999], &[0.0, -1.0, 2.0, f32::NAN, 1e-20]),
                of(&[0.0, 0.0, 0.05, 0.3, 1e-6], &[1.0, 2.0, -1.0, f32::NAN, INF]),
            );
            let uniform = of(&[-1.0], &[f32::NAN, 1.0, 2.0, 0.0, 0.99999994]);
            rows.push(if uniform == -1.0 { self::uniform(rng) } else { uniform }, row);
        }
        rows
    }

    fn options<'a>(
        &self,
        [uniforms, temperatures, top_ks, top_ps, min_ps]: [TensorRef<'a>; 5],
    ) -> SampleOptions<'a> {
        let mut options = SampleOptions::new(uniforms);
        options.temperature = Parameter::PerRow(temperatures);
        options.top_k = Parameter::PerRow(top_ks);
        options.top_p = Parameter::PerRow(top_ps);
        options.min_p = Parameter::PerRow(min_ps);
        options
    }

    fn floats(&self) -> [&[f32]; 4] {
        [&self.uniforms, &self.temperatures, &self.top_ps, &self.min_ps]
    }

    /// The tokens of the reference, −1 where there is none.
    fn reference(&self, logits: &[f32]) -> Vec<i32> {
        let rows = self.uniforms.len();
        let [uniforms, temperatures, top_ps, min_ps] =
            self.floats().map(|numbers| TensorRef::from_slice(numbers, &[rows]).unwrap());
        let top_ks = TensorRef::from_slice(&self.top_ks, &[rows]).unwrap();
        let options = self.options([uniforms, temperatures, top_ks, top_ps, min_ps]);
        let logits = TensorRef::from_slice(logits, &[rows, logits.len() / rows]).unwrap();
        let tokens = reference::sample(&logits, &options).unwrap();
        tokens.into_iter().map(|token| token.unwrap_or(-1)).collect()
    }

    /// These rows in another order, or some of them.
    fn picked(&self, order: &[usize]) -> Self {
        let pick = |numbers: &[f32]| order.iter().map(|&row| numbers[row]).collect();
        let [uniforms, temperatures, top_ps, min_ps] = self.floats().map(pick);
        let top_ks = order.iter().map(|&row| self.top_ks[row]).collect();
        Self { uniforms, temperatures, top_ks, top_ps, min_ps }
    }
}

/// A number in [0, 1) of 24 bits.
fn uniform(rng: &mut Rng) -> f32 {
    (rng.bits() >> 40) as f32 / (1 << 24) as f32
}

fn random_logits(rng: &mut Rng, count: usize, scale: f64) -> Vec<f32> {
    (0..count).map(|_| (rng.unit() * scale) as f32).collect()
}

/// The exact distribution, by the filters of the reference one after the other, in `f64`.
fn distribution(logits: &[f32], (temperature, top_k, top_p, min_p): Row) -> Vec<f64> {
    let shape = [1, logits.len()];
    let mut probs = vec![0.0f64; logits.len()];
    reference::softmax(
        &mut TensorMut::from_slice(&mut probs, &shape).unwrap(),
        &TensorRef::from_slice(logits, &shape).unwrap(),
        f64::from(temperature).into(),
    )
    .unwrap();
    let top_k = if top_k == 0 { u32::MAX } else { top_k as u32 };
    let filters = [
        Filter::MinP(f64::from(min_p).into()),
        Filter::TopK(top_k.into()),
        Filter::TopP(f64::from(top_p).into()),
    ];
    for filter in filters {
        let mut kept = vec![0.0f64; logits.len()];
        reference::filtered_probs(
            &mut TensorMut::from_slice(&mut kept, &shape).unwrap(),
            &TensorRef::from_slice(&probs, &shape).unwrap(),
            &filter,
        )
        .unwrap();
        probs = kept;
    }
    probs
}

const KINDS: [Row; 9] = [
    (1.0, 0, 1.0, 0.0),
    (0.6, 0, 1.0, 0.0),
    (1.5, 7, 1.0, 0.0),
    (1.0, 0, 0.8, 0.0),
    (1.0, 0, 1.0, 0.1),
    (1.0, 20, 0.9, 0.0),
    (1.3, 0, 0.7, 0.05),
    (0.8, 12, 0.85, 0.02),
    (1.0, 1, 0.5, 0.5),
];

#[test]
fn the_reference_draws_from_the_exact_distribution() {
    let rng = &mut Rng::new();
    let (draws, vocab) = (20_000, 50);
    for kind in KINDS {
        let logits = random_logits(rng, vocab, 2.0);
        let rows = Rows::of((0..draws).map(|_| uniform(rng)).collect(), kind);
        let tokens = rows.reference(&logits.repeat(draws));
        let tokens: Vec<_> = tokens.into_iter().map(|token| token as usize).collect();
        assert_drawn_from(&format!("{kind:?}"), &tokens, &distribution(&logits, kind));
    }
}

/// The token is where the sum of probabilities exceeds the random number, in the order of tokens.
#[test]
fn the_reference_inverts_the_sum_of_probabilities() {
    let rng = &mut Rng::new();
    for (kind, vocab) in KINDS.into_iter().zip([1, 2, 31, 33, 200, 1000, 1025, 4099, 20_000]) {
        let logits = random_logits(rng, vocab, 3.0);
        let probs = distribution(&logits, kind);
        let uniforms: Vec<_> = (0..40).map(|_| uniform(rng)).collect();
        let tokens = Rows::of(uniforms.clone(), kind).reference(&logits.repeat(40));
        for (&uniform, token) in uniforms.iter().zip(tokens) {
            let token = token as usize;
            let before: f64 = probs[..token].iter().sum();
            let uniform = f64::from(uniform);
            let near = 1e-5;
            assert!(
                before <= uniform + near && uniform < before + probs[token] + near,
                "{kind:?}: token {token} of {} from {before} at {uniform}",
                probs[token]
            );
        }
    }
}

/// Temperature 0 is the first of the largest logits; a row of NaN, or of nothing that is allowed,
/// has no token; of infinite logits one is drawn; parameters that mean nothing count as the
/// nearest that do.
#[test]
fn odd_rows_of_the_reference() {
    const NAN: f32 = f32::NAN;
    let plain = (1.0, 0, 1.0, 0.0);
    for (logits, uniform, row, want) in [
        ([1.0, 3.0, 3.0], 0.9, (0.0, 1, 0.5, 1.0), 1),
        ([1.0, 3.0, 3.0], 0.9, (-1.0, 0, 1.0, 0.0), 1),
        ([1.0, 3.0, 3.0], 0.9, (NAN, 0, 1.0, 0.0), 1),
        ([-0.0, 0.0, -1.0], 0.0, (0.0, 0, 1.0, 0.0), 0),
        ([NAN, 3.0, 3.0], 0.9, (0.0, 0, 1.0, 0.0), -1),
        ([1.0, -NAN, 3.0], 0.9, plain, -1),
        ([-INF; 3], 0.5, plain, -1),
        ([-INF; 3], 0.5, (0.0, 0, 1.0, 0.0), -1),
        ([-INF, -1e30, -INF], 0.5, plain, 1),
        ([INF, 0.0, INF], 0.49, plain, 0),
        ([INF, 0.0, INF], 0.51, plain, 2),
        ([INF, 0.0, INF], 0.51, (0.0, 0, 1.0, 0.0), 0),
        // An infinite temperature makes all alike that are allowed.
        ([9.0, -INF, 1.0], 0.51, (INF, 0, 1.0, 0.0), 2),
        // Of equal tokens all pass, or none.
        ([2.0, 2.0, 1.0], 0.75, (1.0, 1, 1.0, 0.0), 1),
        ([2.0, 2.0, 1.0], 0.75, (1.0, 0, 0.1, 0.0), 1),
        ([2.0, 2.0, 1.0], 0.999, (1.0, 0, 1.0, 1.0), 1),
        ([2.0, 2.0, 1.0], 0.999, (1.0, 0, 1.0, 7.0), 1),
        ([2.0, 1.0, 1.0], 0.999, (1.0, 0, 0.0, 0.0), 0),
        ([2.0, 1.0, 1.0], 0.999, (1.0, 0, NAN, 0.0), 0),
        ([2.0, 1.0, 1.0], 0.999, (1.0, -5, 3.0, NAN), 2),
        ([0.0; 3], -1.0, plain, 0),
        ([0.0; 3], NAN, plain, 0),
        ([0.0; 3], 1.0, plain, 2),
        ([0.0; 3], INF, plain, 2),
    ] {
        let tokens = Rows::of(vec![uniform], row).reference(&logits);
        assert_eq!(tokens, [want], "{logits:?} at {uniform} with {row:?}");
    }
}

/// A row alone, and the same row among others, have the same token.
#[test]
fn the_batch_does_not_matter() {
    let rng = &mut Rng::new();
    let (count, vocab) = (40, 321);
    let logits = random_logits(rng, count * vocab, 3.0);
    let rows = Rows::random(rng, count, vocab);
    let tokens = rows.reference(&logits);
    for row in 0..count {
        let alone = rows.picked(&[row]).reference(&logits[row * vocab..][..vocab]);
        assert_eq!(alone, [tokens[row]], "row {row}");
    }
}

#[test]
fn banned_tokens_are_never_drawn() {
    let rng = &mut Rng::new();
    let (count, vocab) = (200, 64);
    let mut logits = random_logits(rng, count * vocab, 4.0);
    let bans: Vec<Vec<_>> = (0..count)
        .map(|_| (0..vocab as u32).filter(|_| rng.below(2) == 0).map(LogitEdit::ban).collect())
        .collect();
    let edits = LogitEdits::new(vocab, bans.clone()).unwrap();
    reference::edit_logits(&mut TensorMut::from_slice(&mut logits, &[count, vocab]).unwrap(), &edits)
        .unwrap();
    let tokens = Rows::random(rng, count, vocab).reference(&logits);
    for (token, bans) in tokens.iter().zip(&bans) {
        assert!(*token >= 0 && bans.iter().all(|ban| ban.token as i32 != *token), "{token} of {bans:?}");
    }
}

#[test]
fn wrong_input_of_the_reference() {
    let logits = [0.5f32; 12];
    let four = TensorRef::from_slice(&logits[..4], &[4]).unwrap();
    let logits = TensorRef::from_slice(&logits, &[4, 3]).unwrap();
    let run = |logits: &TensorRef<'_>, change: &dyn Fn(&mut SampleOptions<'static>), expected: &str| {
        let mut options = SampleOptions::new(TensorRef::from_slice(&[0.5f32; 4], &[4]).unwrap());
        change(&mut options);
        refused(reference::sample(logits, &options), expected);
    };
    run(&four, &|_| (), "logits");
    run(&logits.narrow(1, 0, 0).unwrap(), &|_| (), "logits");
    run(&logits.narrow(0, 0, 3).unwrap(), &|_| (), "uniforms");
    let integers = TensorRef::from_slice(&[1i32; 4], &[4]).unwrap();
    let three = TensorRef::from_slice(&[1f32; 3], &[3]).unwrap();
    run(&logits, &|options| options.uniforms = integers, "uniforms");
    run(&logits, &|options| options.temperature = Parameter::PerRow(integers), "temperature");
    run(&logits, &|options| options.temperature = Parameter::PerRow(three), "temperature");
    run(&logits, &|options| options.top_k = Parameter::PerRow(three), "top_k");
    for temperature in [-1.0, f64::NAN, f64::INFINITY, 1e300] {
        run(&logits, &|options| options.temperature = temperature.into(), "temperature");
    }
    for top_p in [0.0, 1.5, -0.5, f64::NAN] {
        run(&logits, &|options| options.top_p = top_p.into(), "top_p");
    }
    for min_p in [-0.1, 1.1, f64::NAN] {
        run(&logits, &|options| options.min_p = min_p.into(), "min_p");
    }
}

/// The parameters of each row, on a device.
struct OnGpu {
    floats: [CudaSlice<f32>; 4],
    top_ks: CudaSlice<i32>,
}

impl OnGpu {
    fn new(gpu: &Gpu, rows: &Rows) -> Self {
        let upload = |numbers: &[f32]| gpu.cuda.clone_htod(numbers).unwrap();
        Self { floats: rows.floats().map(upload), top_ks: gpu.cuda.clone_htod(&rows.top_ks).unwrap() }
    }

    fn shown<'a>(&'a self, gpu: &'a Gpu) -> ([SliceRef<'a>; 4], SliceRef<'a>) {
        let rows = [self.top_ks.len()];
        let floats = self.floats.each_ref().map(|numbers| numbers.tensor(&gpu.cuda, &rows).unwrap());
        (floats, self.top_ks.tensor(&gpu.cuda, &rows).unwrap())
    }
}

/// The tokens of the kernel, of which there may be `i32` or `i64`.
fn on_gpu(gpu: &Gpu, rows: &Rows, logits: &[f32], wide: bool) -> Vec<i32> {
    let count = rows.uniforms.len();
    let mut logits = Mirrored::<f32>::new(gpu, &[count, logits.len() / count], logits.to_vec());
    let parameters = OnGpu::new(gpu, rows);
    let (floats, top_ks) = parameters.shown(gpu);
    let [uniforms, temperatures, top_ps, min_ps] = floats.each_ref().map(SliceRef::view);
    let options = rows.options([uniforms, temperatures, top_ks.view(), top_ps, min_ps]);
    if wide {
        let mut tokens = gpu.cuda.clone_htod(&vec![-7i64; count]).unwrap();
        let mut shown = tokens.tensor_mut(&gpu.cuda, &[count]).unwrap();
        sample(&gpu.stream, &mut shown.view_mut(), &mut logits.device_view_mut(), &options).unwrap();
        drop(shown);
        return gpu.cuda.clone_dtoh(&tokens).unwrap().into_iter().map(|token| token as i32).collect();
    }
    let mut tokens = gpu.cuda.clone_htod(&vec![-7i32; count]).unwrap();
    let mut shown = tokens.tensor_mut(&gpu.cuda, &[count]).unwrap();
    sample(&gpu.stream, &mut shown.view_mut(), &mut logits.device_view_mut(), &options).unwrap();
    drop(shown);
    gpu.cuda.clone_dtoh(&tokens).unwrap()
}

/// Every row's token is the reference's.
#[test]
fn tokens_are_the_references() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for [count, vocab] in [
        [1, 1],
        [40, 2],
        [40, 31],
        [40, 32],
        [40, 33],
        [300, 1000],
        [40, 1023],
        [40, 1024],
        [40, 1025],
        [40, 8191],
        [100, 32_000],
        [60, 49_152],
        [20, 50_257],
        [20, 128_256],
        [2, 1_000_003],
    ] {
        for scale in [0.01, 2.0, 30.0] {
            let logits = random_logits(rng, count * vocab, scale);
            let rows = Rows::random(rng, count, vocab);
            let want = rows.reference(&logits);
            assert_eq!(on_gpu(&gpu, &rows, &logits, false), want, "{count} rows of {vocab}, scale {scale}");
            assert_eq!(on_gpu(&gpu, &rows, &logits, true), want, "{count} rows of {vocab}, scale {scale}");
        }
    }
}

/// Rows of few numbers, of infinities, and of any bits at all: every call ends, and rows with a
/// NaN disturb no other.
#[test]
fn odd_rows() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for vocab in [1, 7, 1000, 9001] {
        let count = 100;
        let mut logits = Vec::with_capacity(count * vocab);
        for row in 0..count {
            let few = [0.0, -0.0, 1.0, -INF, 1.0 + f32::EPSILON];
            for at in 0..vocab {
                logits.push(match row % 8 {
                    0 => few[rng.below(5)],
                    1 => -INF,
                    2 if at == vocab / 2 => f32::NAN,
                    3 if rng.below(vocab) == 0 => INF,
                    4 if at > 0 => -INF,
                    5 => f32::MAX * (rng.unit() / 2.0) as f32,
                    6 => f32::from_bits(rng.bits() as u32),
                    7 => f32::from_bits(0x4100_0000 + rng.below(3) as u32),
                    _ => (rng.unit() * 2.0) as f32,
                });
            }
        }
        // Half of the rows of any bits have none that is NaN.
        for row in logits.chunks_mut(vocab).skip(6).step_by(16) {
            row.iter_mut().filter(|logit| logit.is_nan()).for_each(|logit| *logit = 0.5);
        }
        let rows = Rows::random(rng, count, vocab);
        assert_eq!(on_gpu(&gpu, &rows, &logits, false), rows.reference(&logits), "{vocab}");
    }
}

/// The same rows in another order, in parts, and alone, have the same tokens.
#[test]
fn batches_and_places_do_not_matter() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let (count, vocab) = (64, 32_003);
    let logits = random_logits(rng, count * vocab, 3.0);
    let rows = Rows::random(rng, count, vocab);
    let tokens = on_gpu(&gpu, &rows, &logits, false);
    let order: Vec<usize> = rng.permutation(count).into_iter().map(|row| row as usize).collect();
    for order in [&order[..], &order[..13], &order[5..6]] {
        let moved: Vec<f32> = order.iter().flat_map(|&row| logits[row * vocab..][..vocab].to_vec()).collect();
        let want: Vec<i32> = order.iter().map(|&row| tokens[row]).collect();
        assert_eq!(on_gpu(&gpu, &rows.picked(order), &moved, false), want);
    }
}

#[test]
fn draws_follow_the_exact_distribution() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let (draws, vocab) = (20_000, 300);
    for kind in KINDS {
        let logits = random_logits(rng, vocab, 2.0);
        let rows = Rows::of((0..draws).map(|_| uniform(rng)).collect(), kind);
        let tokens = on_gpu(&gpu, &rows, &logits.repeat(draws), false);
        let tokens: Vec<_> = tokens.into_iter().map(|token| token as usize).collect();
        assert_drawn_from(&format!("{kind:?}"), &tokens, &distribution(&logits, kind));
    }
}

/// With a temperature of 0, it is `argmax`, and the logits stay.
#[test]
fn greedy_is_argmax() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let (count, vocab) = (33, 32_000);
    let mut logits = Mirrored::<f32>::random_scaled(&gpu, rng, &[count, vocab], 4.0);
    let [mut greedy, mut largest] = [(); 2].map(|()| gpu.cuda.clone_htod(&vec![-7i32; count]).unwrap());
    let uniforms = Mirrored::<f32>::new(&gpu, &[count], vec![0.5; count]);
    {
        let uniforms = uniforms.device_view();
        let mut options = SampleOptions::new(uniforms);
        options.temperature = 0.0.into();
        options.top_k = 3.into();
        let mut greedy = greedy.tensor_mut(&gpu.cuda, &[count]).unwrap();
        let mut largest = largest.tensor_mut(&gpu.cuda, &[count]).unwrap();
        sample(&gpu.stream, &mut greedy.view_mut(), &mut logits.device_view_mut(), &options).unwrap();
        argmax(&gpu.stream, &mut largest.view_mut(), &logits.device_view()).unwrap();
    }
    logits.assert_untouched();
    assert_eq!(gpu.cuda.clone_dtoh(&greedy).unwrap(), gpu.cuda.clone_dtoh(&largest).unwrap());
}

fn random_edits(rng: &mut Rng, rows: usize, vocab: usize) -> LogitEdits {
    let rows = (0..rows).map(|row| {
        let often = [1, 2, 30, vocab + 1][row % 4];
        let tokens = (0..vocab as u32).filter(|_| rng.below(often) == 0).collect::<Vec<_>>();
        let edit = |token| LogitEdit {
            token,
            repetition_penalty: [1.0, 1.3, 0.7][rng.below(3)],
            bias: [0.0, -1.5, 0.25, f32::NEG_INFINITY][rng.below(4)],
        };
        tokens.into_iter().map(edit).collect::<Vec<_>>()
    });
    LogitEdits::new(vocab, rows.collect::<Vec<_>>()).unwrap()
}

fn edited(logits: &[f32], edits: &LogitEdits) -> Vec<f32> {
    let mut logits = logits.to_vec();
    let shape = [edits.rows(), logits.len() / edits.rows()];
    reference::edit_logits(&mut TensorMut::from_slice(&mut logits, &shape).unwrap(), edits).unwrap();
    logits
}

/// With one NaN for all: which of them −∞ plus ∞ is depends on the processor.
fn one_nan(logits: Vec<f32>) -> Vec<f32> {
    logits.into_iter().map(|logit| if logit.is_nan() { f32::NAN } else { logit }).collect()
}

/// Every bit is the reference's, and of logits without edits; NaN is NaN, whichever.
#[test]
fn edits_are_the_references() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for [count, vocab] in [[1, 1], [4, 2], [9, 255], [9, 256], [9, 257], [13, 4099]] {
        let mut logits = random_logits(rng, count * vocab, 4.0);
        logits.iter_mut().step_by(17).for_each(|logit| *logit = [-INF, INF, 0.0, -0.0][rng.below(4)]);
        let edits = random_edits(rng, count, vocab);
        let table = LogitEditTable::new(&gpu.stream, edits.clone()).unwrap();
        let mut device = Mirrored::<f32>::new(&gpu, &[count, vocab], logits.clone());
        edit_logits(&gpu.stream, &mut device.device_view_mut(), &table).unwrap();
        assert_same_bits("edited", &one_nan(device.download()), &one_nan(edited(&logits, &edits)));
        // A table of fewer tokens.
        let mut wider = Mirrored::<f32>::new(&gpu, &[count, vocab + 3], vec![0.5; count * (vocab + 3)]);
        edit_logits(&gpu.stream, &mut wider.device_view_mut(), &table).unwrap();
        assert_same_bits("wider", &wider.download(), &edited(&wider.host, &edits));
    }
}

/// A captured step of edits and a draw takes what parameters, edits and logits are in each replay.
#[test]
fn graph_replay() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    let (count, vocab) = (6, 32_000);
    let rows = Rows::random(rng, count, vocab);
    let mut table =
        LogitEditTable::with_capacity(&gpu.stream, random_edits(rng, count, vocab), count, count * vocab)
            .unwrap();
    let mut parameters = OnGpu::new(&gpu, &rows);
    let mut logits = Mirrored::<f32>::new(&gpu, &[count, vocab], random_logits(rng, count * vocab, 2.0));
    let mut tokens = gpu.cuda.clone_htod(&[-7i32; 6]).unwrap();
    let graph = {
        let (floats, top_ks) = parameters.shown(&gpu);
        let [uniforms, temperatures, top_ps, min_ps] = floats.each_ref().map(SliceRef::view);
        let options = rows.options([uniforms, temperatures, top_ks.view(), top_ps, min_ps]);
        let (mut logits, mut tokens) =
            (logits.device_view_mut(), tokens.tensor_mut(&gpu.cuda, &[count]).unwrap());
        let (mut logits, mut tokens) = (logits.reborrow(), tokens.view_mut());
        let mut step = || {
            edit_logits(&gpu.stream, &mut logits, &table)?;
            sample(&gpu.stream, &mut tokens, &mut logits, &options)
        };
        step().unwrap(); // compiles the kernels
        captured(&gpu, step)
    };
    for _ in 0..4 {
        let rows = Rows::random(rng, count, vocab);
        let edits = random_edits(rng, count, vocab);
        table.update(edits.clone()).unwrap();
        for (to, from) in parameters.floats.iter_mut().zip(rows.floats()) {
            gpu.cuda.memcpy_htod(from, to).unwrap();
        }
        gpu.cuda.memcpy_htod(&rows.top_ks, &mut parameters.top_ks).unwrap();
        let next = random_logits(rng, count * vocab, 2.0);
        logits.upload(&next);
        graph.launch().unwrap();
        assert_eq!(gpu.cuda.clone_dtoh(&tokens).unwrap(), rows.reference(&edited(&next, &edits)));
    }
}

/// A `CapturedStep` refuses a table of other rows before it is launched.
#[test]
fn captured_steps_look_at_the_edits() {
    let Some(gpu) = Gpu::start_alone() else { return };
    use flashinfer_rs::gpu::Tensor;
    let stream = &gpu.stream;
    let mut logits = Tensor::from_slice(stream, &[2, 4], &[1.0f32; 8]).unwrap();
    let mut table = LogitEditTable::with_capacity(
        stream,
        LogitEdits::new(4, [[LogitEdit::bias(1, 2.0)], [LogitEdit::ban(3)]]).unwrap(),
        3,
        8,
    )
    .unwrap();
    edit_logits(stream, &mut logits.view_mut(), &table).unwrap();
    let step = CapturedStep::capture(stream, || edit_logits(stream, &mut logits.view_mut(), &table)).unwrap();
    step.launch(&()).unwrap();
    table.update(LogitEdits::new(4, [vec![LogitEdit::bias(0, 1.0)], vec![]]).unwrap()).unwrap();
    step.launch(&()).unwrap();
    let want = [2.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0, -INF];
    assert_eq!(logits.to_vec().unwrap(), want);
    table.update(LogitEdits::none(4, 3)).unwrap();
    assert!(step.launch(&()).is_err(), "the graph has two rows");
    assert_eq!(logits.to_vec().unwrap(), want);
}

/// What only a device can make wrong; the rest is in `wrong_input.rs`. Without rows nothing is
/// written.
#[test]
fn wrong_input_and_no_rows() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let other = gpu.elsewhere();
    let mut logits = Mirrored::<f32>::new(&gpu, &[2, 64], vec![0.5; 128]);
    let uniforms = Mirrored::<f32>::new(&gpu, &[2], vec![0.5; 2]);
    let mut tokens = gpu.cuda.clone_htod(&[-7i32; 2]).unwrap();
    {
        let uniforms = uniforms.device_view();
        let options = SampleOptions::new(uniforms);
        let mut tokens = tokens.tensor_mut(&gpu.cuda, &[2]).unwrap();
        let mut tokens = tokens.view_mut();
        {
            let mut logits = logits.device_view_mut();
            let mut logits = logits.reborrow();
            let none = SampleOptions::new(uniforms.narrow(0, 0, 0).unwrap());
            let mut no_tokens = tokens.reborrow().narrow(0, 0, 0).unwrap();
            sample(&gpu.stream, &mut no_tokens, &mut logits.reborrow().narrow(0, 0, 0).unwrap(), &none)
                .unwrap();
            refused(sample(&gpu.stream, &mut no_tokens, &mut logits, &options), "output");
            refused(sample(&gpu.stream, &mut tokens, &mut logits, &none), "uniforms");
            let table = |gpu: &Gpu, vocab, rows| {
                LogitEditTable::new(&gpu.stream, LogitEdits::none(vocab, rows)).unwrap()
            };
            for table in [table(&gpu, 65, 2), table(&gpu, 64, 1), table(&gpu, 64, 3), table(&other, 64, 2)] {
                refused(edit_logits(&gpu.stream, &mut logits, &table), "edits");
            }
            let no_edits = table(&gpu, 64, 0);
            edit_logits(&gpu.stream, &mut logits.reborrow().narrow(0, 0, 0).unwrap(), &no_edits).unwrap();
            refused(LogitEditTable::with_capacity(&gpu.stream, LogitEdits::none(4, 3), 2, 1), "capacity");
        }
        let mut elsewhere = logits.copied_to(&other);
        refused(sample(&gpu.stream, &mut tokens, &mut elsewhere.device_view_mut(), &options), "logits");
        let table = LogitEditTable::new(&gpu.stream, LogitEdits::none(64, 2)).unwrap();
        refused(edit_logits(&gpu.stream, &mut elsewhere.device_view_mut(), &table), "logits");
    }
    assert_eq!(gpu.cuda.clone_dtoh(&tokens).unwrap(), [-7; 2]);
    logits.assert_untouched();
}
