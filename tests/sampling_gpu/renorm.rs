//! Softmax and the filters that write matrices, against the CPU reference.

use crate::common::{
    Gpu, Mirrored, Number, Rng, assert_same_bits, attention::capture, is_0_7, leave_cuda_error, refused, say,
};
use crate::rows::{half as half_of, peaked, softmax_rows};
use flashinfer_rs::{
    DType, Device, FlashInferError, ModuleName, Result, TensorMut, TensorRef,
    gpu::TensorExt,
    reference::{self, Filter},
    sampling::*,
};
use half::{bf16, f16};

fn workspace(gpu: &Gpu, batch: usize, vocab: usize) -> SamplingWorkspace {
    SamplingWorkspace::new(&gpu.stream, batch, vocab).unwrap()
}

/// A tensor that an operation writes from another one.
fn run<T: Number>(
    gpu: &Gpu,
    input: &Mirrored<T>,
    op: impl FnOnce(&mut TensorMut<'_>, &TensorRef<'_>) -> Result<()>,
) -> Mirrored<T> {
    let mut out = Mirrored::<T>::poisoned(gpu, &input.shape());
    op(&mut out.device_view_mut(), &input.device_view()).unwrap();
    out
}

/// What the reference writes.
fn want<T: Number>(
    input: &Mirrored<T>,
    op: impl FnOnce(&mut TensorMut<'_>, &TensorRef<'_>) -> Result<()>,
) -> Vec<f64> {
    let mut want = input.wide();
    op(&mut input.view_of(&mut want), &input.view()).unwrap();
    want
}

/// Batches and vocabularies on both sides of each strategy: rows in shared
/// memory (up to 16 of 4096, up to 32 of 2048), rows that are divided (up to
/// 128, from 24576 on), and all others.
const SOFTMAX_SHAPES: [[usize; 2]; 18] = [
    [1, 1],
    [3, 7],
    [5, 1000],
    [16, 4096],
    [16, 4097],
    [17, 4096],
    [32, 2048],
    [33, 2046],
    [1024, 1003],
    [1, 24575],
    [1, 24576],
    [128, 24577],
    [129, 24576],
    [7, 50257],
    [2, 32000],
    [4, 128256],
    [3, 128255],
    [2, 256000],
];

#[test]
fn softmax_of_all_sizes() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = workspace(&gpu, 1024, 256_000);
    for shape in SOFTMAX_SHAPES {
        let mut logits = Mirrored::<f32>::random_scaled(&gpu, rng, &shape, 3.0);
        // A few logits that can never be drawn, but not the first of a row.
        let mut host = logits.host.clone();
        (0..host.len() / 9).for_each(|_| {
            let at = rng.below(host.len());
            if !at.is_multiple_of(shape[1]) {
                host[at] = f32::NEG_INFINITY;
            }
        });
        logits = Mirrored::new(&gpu, &shape, host);
        let temperatures: Vec<f32> = (0..shape[0]).map(|row| 0.5 + (row % 7) as f32 / 4.0).collect();
        let on_device = gpu.cuda.clone_htod(&temperatures).unwrap();
        let on_device = on_device.tensor(&gpu.cuda, &[shape[0]]).unwrap();
        let per_row = TensorRef::from_slice(&temperatures, &[shape[0]]).unwrap();
        for (here, there) in [
            (Parameter::Value(1.0), Parameter::Value(1.0)),
            (Parameter::Value(0.7), Parameter::Value(0.7)),
            (Parameter::PerRow(on_device.view()), Parameter::PerRow(per_row)),
        ] {
            let options = SoftmaxOptions::with_temperature(here);
            let out = run(&gpu, &logits, |out, logits| softmax(&mut workspace, out, logits, &options));
            let want = want(&logits, |out, logits| reference::softmax(out, logits, there));
            out.assert_close("softmax", &want, f32::BOUND);
            let out = out.download();
            for (x, logit) in out.iter().zip(&logits.host) {
                assert!(*logit > f32::NEG_INFINITY || *x == 0.0, "probability {x} of a logit of -∞");
            }
        }
        logits.assert_untouched();
    }
}

/// The likeliest tokens are the exact distribution's, off by no more than what `f32` rounds a row's largest
/// quotient by: nothing where that is 0.
#[test]
fn softmax_at_low_temperatures() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = workspace(&gpu, 129, 24577);
    // One of each strategy.
    for shape in [[16, 4096], [17, 4096], [8, 24577], [129, 24576]] {
        for (temperature, peak) in
            [1e-3f32, 1e-5].iter().flat_map(|&cold| [0.0f32, 42.0, -42.0, 300.0].map(|peak| (cold, peak)))
        {
            let quotients = (0..shape[0] * shape[1]).map(|_| rng.unit().abs() * 10.0);
            let mut host: Vec<f32> = quotients.map(|down| peak - temperature * down as f32).collect();
            host.chunks_mut(shape[1]).for_each(|row| row[rng.below(shape[1])] = peak);
            let logits = Mirrored::new(&gpu, &shape, host);
            let options = SoftmaxOptions::with_temperature(f64::from(temperature));
            let out = run(&gpu, &logits, |out, logits| softmax(&mut workspace, out, logits, &options));
            let want =
                want(&logits, |out, logits| reference::softmax(out, logits, f64::from(temperature).into()));
            let largest = (peak / temperature).abs();
            let bound = f64::from(largest.next_up() - largest) + 1e-4;
            for (at, (&x, want)) in out.download().iter().zip(&want).enumerate() {
                let off = (f64::from(x) / want).ln().abs();
                assert!(off <= bound, "{shape:?}, {peak}, {temperature}: {x} and not {want} at {at}");
            }
        }
    }
}

/// With and without programmatic dependent launch the bits are the same, also
/// where each launch reads what the one before wrote; a temperature of 0 in a
/// tensor makes a row uniform; a row without a finite logit becomes NaN.
#[test]
fn softmax_options() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = workspace(&gpu, 64, 50257);
    for shape in [[64, 4096], [8, 50257]] {
        let logits = Mirrored::<f32>::random(&gpu, rng, &shape);
        let mut chain = |enable_pdl| {
            let mut options = SoftmaxOptions::with_temperature(0.01);
            options.enable_pdl = enable_pdl;
            let mut buffers = [0, 1].map(|_| Mirrored::<f32>::poisoned(&gpu, &shape));
            {
                let logits = logits.device_view();
                let [first, second] = &mut buffers;
                let (mut first, mut second) = (first.device_view_mut(), second.device_view_mut());
                softmax(&mut workspace, &mut first.reborrow(), &logits, &options).unwrap();
                for _ in 0..4 {
                    softmax(&mut workspace, &mut second.reborrow(), &first.as_ref(), &options).unwrap();
                    softmax(&mut workspace, &mut first.reborrow(), &second.as_ref(), &options).unwrap();
                }
            }
            buffers[0].download()
        };
        let default = chain(None);
        assert!(default.iter().all(|x| x.is_finite()));
        assert_same_bits("PDL off", &chain(Some(false)), &default);
        if gpu.compute_capability().0 >= 9 {
            assert_same_bits("PDL on", &chain(Some(true)), &default);
        }
    }
    let mut host = [1.0f32, 2.0, 3.0, 4.0].repeat(2);
    host.extend([f32::NEG_INFINITY; 4]);
    let logits = Mirrored::new(&gpu, &[3, 4], host);
    let temperatures = gpu.cuda.clone_htod(&[0.0f32, 1.0, 1.0]).unwrap();
    let temperatures = temperatures.tensor(&gpu.cuda, &[3]).unwrap();
    let options = SoftmaxOptions::with_temperature(Parameter::PerRow(temperatures.view()));
    let out = run(&gpu, &logits, |out, logits| softmax(&mut workspace, out, logits, &options)).download();
    assert!(out[..4].iter().all(|x| (x - 0.25).abs() < 1e-6));
    assert!(out[4..8].windows(2).all(|pair| pair[0] < pair[1]));
    assert!(out[8..].iter().all(|x| x.is_nan()));
}

/// Rows whose limits lie far from every sum: exactly the reference's tokens.
#[test]
fn top_p_between_sums() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for (batch, vocab) in [
        (1, 1),
        (3, 2),
        (5, 100),
        (7, 2047),
        (1, 2048),
        (5, 2049),
        (33, 32000),
        (64, 50257),
        (9, 128256),
        (3, 256_000),
    ] {
        let (mut rows, mut top_ps) = (Vec::new(), Vec::new());
        for row in 0..batch {
            let (numbers, peaks) = peaked(rng, vocab);
            top_ps.push(if row % 4 == 3 { 1.0 } else { half_of(&numbers, peaks).1 as f32 });
            rows.extend(numbers);
        }
        let probs = Mirrored::new(&gpu, &[batch, vocab], rows);
        let per_row = TensorRef::from_slice(&top_ps, &[batch]).unwrap();
        let want = want(&probs, |out, probs| {
            reference::filtered_probs(out, probs, &Filter::TopP(Parameter::PerRow(per_row)))
        });
        let on_device = gpu.cuda.clone_htod(&top_ps).unwrap();
        let on_device = on_device.tensor(&gpu.cuda, &[batch]).unwrap();
        let out = run(&gpu, &probs, |out, probs| {
            top_p_renorm_probs(&gpu.stream, out, probs, Parameter::PerRow(on_device.view()))
        });
        out.assert_close("top_p_renorm_probs", &want, f32::BOUND);
        for (at, (x, want)) in out.download().iter().zip(&want).enumerate() {
            assert!((*x > 0.0) == (*want > 0.0), "{at} of {batch} x {vocab}: {x} and not {want}");
        }
        probs.assert_untouched();
    }
}

/// Rows of thousands of similar numbers: what is kept is what is above a
/// threshold, its sum is `top_p` within rounding, and the bits are always the same.
#[test]
fn top_p_among_many() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for (batch, vocab) in [(4, 2000), (16, 4096), (8, 50257), (3, 128256), (2, 256_000)] {
        let probs = softmax_rows(&gpu, rng, [batch, vocab], 1.5);
        for top_p in [0.1, 0.9, 0.999] {
            let renorm = || {
                let op = |out: &mut TensorMut<'_>, probs: &TensorRef<'_>| {
                    top_p_renorm_probs(&gpu.stream, out, probs, top_p.into())
                };
                run(&gpu, &probs, op).download()
            };
            let out = renorm();
            assert_same_bits("again", &renorm(), &out);
            for (out, probs) in out.chunks(vocab).zip(probs.host.chunks(vocab)) {
                let kept = || out.iter().zip(probs).filter(|(x, _)| **x > 0.0).map(|(_, &prob)| prob);
                let threshold = kept().fold(f32::INFINITY, f32::min);
                let sum: f64 = kept().map(f64::from).sum();
                let above: f64 = kept().filter(|&prob| prob > threshold).map(f64::from).sum();
                assert!(sum >= top_p - 1e-6 && above < top_p + 1e-6, "{above} and {sum} for {top_p}");
                for (x, &prob) in out.iter().zip(probs) {
                    let want = if prob >= threshold { f64::from(prob) / sum } else { 0.0 };
                    assert!((f64::from(*x) - want).abs() <= 1e-6 * want, "{x} and not {want}");
                }
            }
        }
    }
}

/// Numbers between whose ends a search by arithmetic on floats does not end.
#[test]
fn top_p_of_neighbouring_numbers() {
    let Some(gpu) = Gpu::start() else { return };
    for vocab in [3, 2047, 2048, 4096] {
        let mut row = vec![0.0; vocab];
        let head = [0x3eae_147b, 0x3eae_147a, 0x3ea3_d70a].map(f32::from_bits);
        row[..3].copy_from_slice(&head);
        let probs = Mirrored::new(&gpu, &[1, vocab], row);
        let out = run(&gpu, &probs, |out, probs| top_p_renorm_probs(&gpu.stream, out, probs, 0.6.into()))
            .download();
        assert!((out[0] - 0.5).abs() < 1e-6 && (out[1] - 0.5).abs() < 1e-6, "{:?}", &out[..3]);
        assert!(out[2..].iter().all(|&x| x == 0.0), "{:?}", &out[..3]);
    }
}

/// A number of each kind that a row may be of.
fn odd_number(rng: &mut Rng, kind: usize, vocab: usize) -> f32 {
    let unit = rng.unit().abs() as f32;
    let bits = rng.below(1 << 32) as u32;
    match kind {
        // Neighbours, equal ones, and some that are none.
        0 => f32::from_bits(0x3eae_147b - rng.below(4) as u32) / vocab as f32,
        1 => 1.0 / vocab as f32,
        2 => [unit, f32::INFINITY, f32::NEG_INFINITY, 0.0][rng.below(64).saturating_sub(60)],
        3 => [f32::NAN, -f32::NAN, -unit, unit / vocab as f32][rng.below(4)],
        // The smallest, the largest, of all magnitudes, any bits.
        4 => f32::from_bits(rng.below(40) as u32),
        5 => [0.0, -0.0, f32::MAX, 3e38][rng.below(4)],
        6 => (unit * 160.0 - 80.0).exp(),
        _ => f32::from_bits(bits),
    }
}

/// Rows of numbers that mean nothing or much, and any `top_p`: as the reference,
/// but for rows of which a sum meets `top_p`.
#[test]
fn top_p_of_odd_rows() {
    const KINDS: usize = 8;
    const TOP_PS: [f32; 16] = [
        0.6,
        0.9,
        0.1,
        0.5,
        1.0,
        0.999,
        0.3,
        0.0,
        -1.0,
        f32::NAN,
        2.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        1e-30,
        1e-42,
        -0.0,
    ];
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut close = 0;
    for vocab in [1, 2, 3, 7, 100, 1023, 1024, 2047, 2048, 2049, 4096, 32000, 128_256] {
        let batch = KINDS * TOP_PS.len();
        let host: Vec<f32> =
            (0..batch * vocab).map(|at| odd_number(rng, at / vocab % KINDS, vocab)).collect();
        let probs = Mirrored::new(&gpu, &[batch, vocab], host);
        let top_ps: Vec<f32> = (0..batch).map(|row| TOP_PS[row / KINDS]).collect();
        let on_device = gpu.cuda.clone_htod(&top_ps).unwrap();
        let on_device = on_device.tensor(&gpu.cuda, &[batch]).unwrap();
        let per_row = TensorRef::from_slice(&top_ps, &[batch]).unwrap();
        let want = want(&probs, |out, probs| {
            reference::filtered_probs(out, probs, &Filter::TopP(Parameter::PerRow(per_row)))
        });
        let out = run(&gpu, &probs, |out, probs| {
            top_p_renorm_probs(&gpu.stream, out, probs, Parameter::PerRow(on_device.view()))
        });
        let out = out.download();
        for (row, top_p) in top_ps.iter().enumerate() {
            let cells = row * vocab..(row + 1) * vocab;
            if meets_top_p(&probs.host[cells.clone()], *top_p) {
                close += 1;
                continue;
            }
            for ((x, want), prob) in
                out[cells.clone()].iter().zip(&want[cells.clone()]).zip(&probs.host[cells])
            {
                let same =
                    (f64::from(*x) - want).abs() <= 1e-6 * want + 1e-44 && (*x > 0.0) >= (*want > 1e-44);
                let what = format!("{prob:e} of kind {}, {vocab} tokens, top_p {top_p:e}", row % KINDS);
                assert!(same || x.is_nan() && want.is_nan(), "{what}: {x:e} and not {want:e}");
            }
        }
        probs.assert_untouched();
    }
    eprintln!("{close} rows whose sums meet top_p");
    assert!(close < 200, "{close} rows were not compared");
}

/// Whether `top_p` is, within rounding, the sum of a row's largest numbers.
fn meets_top_p(row: &[f32], top_p: f32) -> bool {
    let mut order: Vec<f64> = row.iter().filter(|x| **x > 0.0).map(|&x| x.into()).collect();
    order.sort_unstable_by(|a, b| b.total_cmp(a));
    let largest = order.first().copied().unwrap_or_default();
    let top_p = f64::from(top_p);
    let mut sum = 0.0;
    let sums = order.iter().map(|x| {
        sum += x;
        sum
    });
    top_p > 0.0
        && top_p < 1.0
        && sums.into_iter().any(|sum| (sum - top_p).abs() <= 1e-8 * largest.max(top_p).min(f64::MAX))
}

/// Vocabularies of one and of several blocks of each dtype, with `k` for all
/// and for each row, 0 and more than there are among them.
/// 66 rows of two blocks run at once on an H200.
const TOP_K_SHAPES: [[usize; 2]; 11] = [
    [1, 1],
    [3, 7],
    [300, 1003],
    [17, 32000],
    [5, 50257],
    [2, 57344],
    [70, 60000],
    [67, 116_000],
    [4, 128256],
    [3, 128257],
    [2, 256_000],
];

fn top_ks(rng: &mut Rng, [batch, vocab]: [usize; 2]) -> Vec<i32> {
    let vocab = vocab as i32;
    let some = [1, 2, 50, vocab / 2, vocab - 1, vocab, vocab + 1, -1, 0];
    (0..batch).map(|row| if row < 4 { 1 + row as i32 } else { some[rng.below(some.len())] }).collect()
}

#[test]
fn top_k_renorm() {
    fn check<T: Number>(gpu: &Gpu, rng: &mut Rng, workspace: &mut SamplingWorkspace) {
        for shape in TOP_K_SHAPES {
            let [batch, vocab] = shape;
            let rows: Vec<T> =
                (0..batch).flat_map(|_| peaked(rng, vocab).0).map(|x| T::from_f64(x.into())).collect();
            let probs = Mirrored::new(gpu, &shape, rows);
            let numbers = top_ks(rng, shape);
            let on_device = gpu.cuda.clone_htod(&numbers).unwrap();
            let on_device = on_device.tensor(&gpu.cuda, &[batch]).unwrap();
            let per_row = TensorRef::from_slice(&numbers, &[batch]).unwrap();
            for (here, there) in [
                (Parameter::Value(20), Parameter::Value(20)),
                (Parameter::Value(u32::MAX), Parameter::Value(u32::MAX)),
                (Parameter::PerRow(on_device.view()), Parameter::PerRow(per_row)),
            ] {
                let out =
                    run(gpu, &probs, |out, probs| top_k_renorm_probs(&mut *workspace, out, probs, here));
                let want =
                    want(&probs, |out, probs| reference::filtered_probs(out, probs, &Filter::TopK(there)));
                out.assert_close("top_k_renorm_probs", &want, T::BOUND);
                for (at, (x, want)) in out.download().iter().zip(&want).enumerate() {
                    // 16-bit numbers have a smallest one.
                    let same = (x.to_f64() > 0.0) == (*want > 0.0) || *want < 1e-6;
                    assert!(same, "{at} of {shape:?}: {x:?} and not {want}");
                }
            }
            probs.assert_untouched();
        }
    }
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = workspace(&gpu, 1, 1); // top-k does not ask for more
    check::<f32>(&gpu, rng, &mut workspace);
    check::<f16>(&gpu, rng, &mut workspace);
    check::<bf16>(&gpu, rng, &mut workspace);
}

/// Rows that many blocks share have the same results each time, with kernels of 0.7; those of 0.6 add up in any order.
#[test]
fn top_k_renorms_repeat() {
    let Some(gpu) = Gpu::start() else { return };
    if !is_0_7(gpu.runtime.module(&ModuleName::SAMPLING).unwrap()) {
        return say("skipped: kernels of 0.6 add up what blocks share in any order");
    }
    let rng = &mut Rng::new();
    let mut workspace = workspace(&gpu, 1, 1);
    for shape in [[40, 128256], [9, 256_000]] {
        let probs = softmax_rows(&gpu, rng, shape, 1.5);
        for top_k in [200, shape[1] as u32 - 1, shape[1] as u32] {
            let mut renorm = || {
                let op = |out: &mut TensorMut<'_>, probs: &TensorRef<'_>| {
                    top_k_renorm_probs(&mut workspace, out, probs, top_k.into())
                };
                run(&gpu, &probs, op).download()
            };
            let first = renorm();
            (0..30).for_each(|_| assert_same_bits("again", &renorm(), &first));
        }
    }
}

/// Logits are kept bit by bit, ties all or none.
#[test]
fn top_k_mask() {
    fn check<T: Number>(gpu: &Gpu, rng: &mut Rng, workspace: &mut SamplingWorkspace) {
        for shape in TOP_K_SHAPES {
            let logits = Mirrored::<T>::random_scaled(gpu, rng, &shape, 4.0);
            let numbers = top_ks(rng, shape);
            let on_device = gpu.cuda.clone_htod(&numbers).unwrap();
            let on_device = on_device.tensor(&gpu.cuda, &[shape[0]]).unwrap();
            let per_row = TensorRef::from_slice(&numbers, &[shape[0]]).unwrap();
            for (here, there) in [
                (Parameter::Value(50), Parameter::Value(50)),
                (Parameter::PerRow(on_device.view()), Parameter::PerRow(per_row)),
            ] {
                let out =
                    run(gpu, &logits, |out, logits| top_k_mask_logits(&mut *workspace, out, logits, here));
                let want = want(&logits, |out, logits| reference::top_k_mask_logits(out, logits, there));
                let want: Vec<T> = want.into_iter().map(T::from_f64).collect();
                assert_same_bits(&format!("top_k_mask_logits {shape:?}"), &out.download(), &want);
            }
            logits.assert_untouched();
        }
    }
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = workspace(&gpu, 1, 1);
    check::<f32>(&gpu, rng, &mut workspace);
    check::<f16>(&gpu, rng, &mut workspace);
    check::<bf16>(&gpu, rng, &mut workspace);
}

/// Rows whose parts fill the shared memory of blocks are masked; they are
/// renormalized or refused, where sums would not fit beside, but the module
/// does not fail. (On an H200 a part of a row has 57592 numbers at most.)
#[test]
fn rows_that_fill_shared_memory() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = workspace(&gpu, 1, 1);
    let parts = [57200, 57463, 57464, 57468, 57512, 57548, 57556, 57560, 57588, 57592];
    for vocab in parts.into_iter().chain([57593, 2 * 57464, 2 * 57580, 3 * 57592]) {
        let probs = Mirrored::new(&gpu, &[1, vocab], peaked(rng, vocab).0);
        let masked = run(&gpu, &probs, |out, probs| top_k_mask_logits(&mut workspace, out, probs, 20.into()));
        let expected = want(&probs, |out, probs| reference::top_k_mask_logits(out, probs, 20.into()));
        let expected: Vec<f32> = expected.into_iter().map(|x| x as f32).collect();
        assert_same_bits(&format!("mask of {vocab}"), &masked.download(), &expected);
        let mut out = Mirrored::<f32>::poisoned(&gpu, &[1, vocab]);
        let call = {
            let (mut out, probs) = (out.device_view_mut(), probs.device_view());
            top_k_renorm_probs(&mut workspace, &mut out.reborrow(), &probs, 20.into())
        };
        if call.is_ok() {
            let filter = Filter::TopK(20.into());
            let expected = want(&probs, |out, probs| reference::filtered_probs(out, probs, &filter));
            out.assert_close(&format!("probabilities of {vocab}"), &expected, f32::BOUND);
        } else {
            refused(call, "probs");
            out.assert_untouched();
        }
    }
}

/// An error that other code left in the thread is not taken for the launches'.
#[test]
fn errors_of_others() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for vocab in [1000, 4096] {
        let probs = softmax_rows(&gpu, rng, [3, vocab], 1.0);
        let renorm = || {
            let out = run(&gpu, &probs, |out, probs| top_p_renorm_probs(&gpu.stream, out, probs, 0.9.into()));
            out.download()
        };
        let first = renorm();
        leave_cuda_error();
        assert_same_bits("top_p_renorm_probs", &renorm(), &first);
    }
}

/// Two threads with vocabularies that need other amounts of shared memory.
#[test]
fn threads_with_different_vocabularies() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let cases = [1000, 50000].map(|vocab| {
        let gpu = gpu.fork();
        let logits = Mirrored::<f32>::random(&gpu, rng, &[4, vocab]);
        (gpu, logits)
    });
    std::thread::scope(|scope| {
        for (gpu, logits) in &cases {
            scope.spawn(move || {
                let mut workspace = workspace(gpu, 4, 50000);
                let want = want(logits, |out, logits| reference::top_k_mask_logits(out, logits, 9.into()));
                let want: Vec<f32> = want.into_iter().map(|x| x as f32).collect();
                let mut out = Mirrored::<f32>::poisoned(gpu, &logits.shape());
                {
                    let (logits, mut out) = (logits.device_view(), out.device_view_mut());
                    for _ in 0..300 {
                        top_k_mask_logits(&mut workspace, &mut out.reborrow(), &logits, 9.into()).unwrap();
                    }
                }
                assert_same_bits("masked", &out.download(), &want);
            });
        }
    });
}

/// A captured step, replayed, does what a direct one does.
#[test]
fn graph_replay() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    let shape = [6, 128256];
    let mut workspace = workspace(&gpu, 6, 128256);
    let mut logits = Mirrored::<f32>::random_scaled(&gpu, rng, &shape, 2.0);
    let mut tensors = [0; 4].map(|_| Mirrored::<f32>::poisoned(&gpu, &shape));
    let step = |workspace: &mut SamplingWorkspace, logits: &TensorRef<'_>, outs: &mut [TensorMut<'_>; 4]| {
        let [masked, probs, top_k, top_p] = outs;
        top_k_mask_logits(workspace, masked, logits, 5000.into())?;
        softmax(workspace, probs, &masked.as_ref(), &SoftmaxOptions::default())?;
        top_k_renorm_probs(workspace, top_k, &probs.as_ref(), 1000.into())?;
        top_p_renorm_probs(&gpu.stream, top_p, &probs.as_ref(), 0.9.into())
    };
    let direct = |workspace: &mut SamplingWorkspace, logits: &Mirrored<f32>| {
        let mut outs = [0; 4].map(|_| Mirrored::<f32>::poisoned(&gpu, &shape));
        {
            let logits = logits.device_view();
            let mut guards = outs.each_mut().map(|out| out.device_view_mut());
            let mut views = guards.each_mut().map(|guard| guard.reborrow());
            step(workspace, &logits, &mut views).unwrap();
        }
        outs.map(|out| out.download())
    };
    direct(&mut workspace, &logits); // loads the kernels
    let (graph, call) = {
        let logits = logits.device_view();
        let mut guards = tensors.each_mut().map(|out| out.device_view_mut());
        let mut views = guards.each_mut().map(|guard| guard.reborrow());
        capture(&gpu, || step(&mut workspace, &logits, &mut views))
    };
    call.unwrap();
    let graph = graph.expect("a graph");
    tensors.iter().for_each(|tensor| tensor.assert_untouched()); // captured is not run
    for _ in 0..3 {
        let next = Mirrored::<f32>::random_scaled(&gpu, rng, &shape, 2.0);
        logits.upload(&next.host);
        graph.launch().unwrap();
        let got = tensors.each_ref().map(|tensor| tensor.download());
        let want = direct(&mut workspace, &next);
        for ((what, got), want) in ["masked", "probs", "top-k", "top-p"].iter().zip(&got).zip(&want) {
            // Blocks add their parts of a row's sum in any order.
            if *what == "top-k" {
                let off = got.iter().zip(want).map(|(a, b)| (a - b).abs() / b.max(1e-9)).fold(0.0, f32::max);
                assert!(off < 1e-5, "{what}: off by {off}");
            } else {
                assert_same_bits(what, got, want);
            }
        }
    }
}

#[test]
fn no_rows() {
    let Some(gpu) = Gpu::start() else { return };
    let mut workspace = workspace(&gpu, 1, 64);
    let input = Mirrored::new(&gpu, &[2, 64], vec![0.5f32; 128]).narrowed(0, 0, 0);
    let mut out = Mirrored::<f32>::poisoned(&gpu, &[2, 64]).narrowed(0, 0, 0);
    {
        let (input, mut out) = (input.device_view(), out.device_view_mut());
        let (input, mut out) = (input, out.reborrow());
        softmax(&mut workspace, &mut out, &input, &SoftmaxOptions::default()).unwrap();
        top_p_renorm_probs(&gpu.stream, &mut out, &input, 0.5.into()).unwrap();
        top_k_renorm_probs(&mut workspace, &mut out, &input, 5.into()).unwrap();
        top_k_mask_logits(&mut workspace, &mut out, &input, 5.into()).unwrap();
    }
    out.assert_untouched();
}

/// Everything that operations with a workspace must refuse.
#[test]
fn wrong_input() {
    let Some(gpu) = Gpu::start() else { return };
    let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
    let mut space = workspace(&gpu, 4, 4096);
    let input = softmax_rows(&gpu, rng, [4, 4096], 1.0);
    let mut out = Mirrored::<f32>::poisoned(&gpu, &[4, 4096]);
    // SAFETY: the tensors are refused before anything looks at the addresses.
    let fake = |address: usize, device, dtype, shape: &[usize]| unsafe {
        TensorRef::from_raw_parts(address as *const _, device, dtype, shape, None).unwrap()
    };
    let device = gpu.stream.device();
    let names = ["logits", "probs", "probs", "logits"];
    {
        let (good, mut target) = (input.device_view(), out.device_view_mut());
        let ops = |space: &mut SamplingWorkspace, out: &mut TensorMut<'_>, input: &TensorRef<'_>| {
            [
                softmax(space, out, input, &SoftmaxOptions::default()),
                top_p_renorm_probs(&space.stream().clone(), out, input, 0.5.into()),
                top_k_renorm_probs(space, out, input, 5.into()),
                top_k_mask_logits(space, out, input, 5.into()),
            ]
        };
        let mut refuse_input = |input: TensorRef<'_>| {
            for (call, name) in ops(&mut space, &mut target.reborrow(), &input).into_iter().zip(names) {
                refused(call, name);
            }
        };
        refuse_input(good.narrow(1, 0, 2048).unwrap());
        refuse_input(good.permute(&[1, 0]).unwrap());
        refuse_input(good.select(0, 0).unwrap());
        refuse_input(good.narrow(1, 0, 0).unwrap());
        refuse_input(fake(1 << 20, device, DType::F64, &[4, 4096]));
        refuse_input(fake(1 << 20, device, DType::I32, &[4, 4096]));
        refuse_input(fake(1 << 20, Device::Cpu, DType::F32, &[4, 4096]));
        refuse_input(fake(1 << 20, Device::Cuda(9), DType::F32, &[4, 4096]));
        refuse_input(fake((1 << 20) + 8, device, DType::F32, &[4, 4096]));
        refuse_input(fake(1 << 20, device, DType::F32, &[1, (1 << 23) + 1]));
        refuse_input(fake(1 << 20, device, DType::F32, &[1 << 20, 4097]));
        refuse_input(input.copied_to(&other).device_view());
        for wrong in [
            fake(1 << 20, device, DType::F32, &[4, 4095]),
            fake(1 << 20, device, DType::F32, &[3, 4096]),
            fake(1 << 20, device, DType::F16, &[4, 4096]),
            fake((1 << 20) + 4, device, DType::F32, &[4, 4096]),
        ] {
            // SAFETY: as above.
            let mut wrong = unsafe {
                let shape: Vec<usize> = wrong.shape().iter().map(|&size| size as usize).collect();
                TensorMut::from_raw_parts(wrong.data_ptr(), device, wrong.dtype(), &shape, None).unwrap()
            };
            ops(&mut space, &mut wrong, &good).into_iter().for_each(|call| refused(call, "out"));
        }
        // Top-k takes 16-bit numbers, the others do not.
        let halves = fake(1 << 20, device, DType::F16, &[4, 4096]);
        let [soft, top_p, ..] = ops(&mut space, &mut target.reborrow(), &halves);
        refused(soft, "logits");
        refused(top_p, "probs");

        // A workspace that is too small, in either direction.
        for (batch, vocab) in [(3, 4096), (4, 4095)] {
            let mut small = workspace(&gpu, batch, vocab);
            let target = &mut target.reborrow();
            refused(softmax(&mut small, target, &good, &SoftmaxOptions::default()), "workspace");
        }
        let mut elsewhere = workspace(&other, 4, 4096);
        ops(&mut elsewhere, &mut target.reborrow(), &good)
            .into_iter()
            .zip(names)
            .for_each(|(call, name)| refused(call, name));

        // Parameters.
        let mut target = target.reborrow();
        for temperature in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-60] {
            let options = SoftmaxOptions::with_temperature(temperature);
            refused(softmax(&mut space, &mut target, &good, &options), "temperature");
        }
        for top_p in [0.0, -0.5, 1.1, f64::NAN, 1e-60] {
            refused(top_p_renorm_probs(&gpu.stream, &mut target, &good, top_p.into()), "top_p");
        }
        refused(top_k_renorm_probs(&mut space, &mut target, &good, 0.into()), "top_k");
        refused(top_k_mask_logits(&mut space, &mut target, &good, 0.into()), "top_k");
        let five = fake(1 << 20, device, DType::F32, &[5]);
        let call = top_p_renorm_probs(&gpu.stream, &mut target, &good, Parameter::PerRow(five));
        refused(call, "top_p");
        for wrong in [
            five,
            fake(1 << 20, device, DType::F32, &[4]),
            fake(1 << 20, device, DType::I64, &[4]),
            fake(1 << 20, device, DType::I32, &[4, 1]),
            fake((1 << 20) + 2, device, DType::I32, &[4]),
        ] {
            let call = top_k_mask_logits(&mut space, &mut target, &good, Parameter::PerRow(wrong));
            refused(call, "top_k");
        }
    }
    other.synchronize();
    out.assert_untouched();
    assert!(matches!(
        SamplingWorkspace::new(&gpu.stream, 1, (1 << 23) + 1),
        Err(FlashInferError::InvalidArgument { argument: "max_vocab", .. })
    ));
    // The refused calls left everything usable.
    let good = run(&gpu, &input, |out, probs| top_k_renorm_probs(&mut space, out, probs, 5000.into()));
    assert!(good.download().iter().all(|x| x.is_finite()));
}
