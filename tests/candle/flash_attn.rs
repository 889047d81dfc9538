//! `candle::flash_attn` and the functions beside it, against attention that is
//! written with candle's plain operations: on CPU tensors always, on CUDA
//! tensors where `FLASHINFER_RS_RUN_GPU_TESTS=1` and the feature `candle-cuda`
//! say so.

use std::{sync::mpsc, time::Duration};

use crate::candle_common::{Rng, gpus};
use candle_core::{DType, Device, Result, Tensor, Var};
use flashinfer_rs::candle::{
    flash_attn, flash_attn_alibi, flash_attn_alibi_windowed, flash_attn_alibi_windowed_softcap,
    flash_attn_varlen, flash_attn_varlen_alibi, flash_attn_varlen_alibi_windowed,
    flash_attn_varlen_alibi_windowed_softcap, flash_attn_varlen_paged_windowed, flash_attn_varlen_windowed,
    flash_attn_windowed, release_workspaces,
};

/// A device to test on.
struct Place {
    device: Device,
    /// Random cases of each test.
    cases: usize,
    /// The longest sequence of most of them.
    longest: usize,
}

impl Place {
    fn is_cuda(&self) -> bool {
        self.device.is_cuda()
    }

    /// An element type and head dimension that there are kernels for, with a
    /// window to the left, or a soft cap.
    fn types(&self, rng: &mut Rng, window: bool, cap: bool) -> (DType, usize) {
        if !self.is_cuda() {
            let dtype = [DType::F32, DType::F16, DType::BF16, DType::F64][rng.below(4)];
            return (dtype, [8, 16, 24, 80][rng.below(4)]);
        }
        match (window, cap) {
            (false, false) => ([DType::F16, DType::BF16][rng.below(2)], [64, 128, 256][rng.below(3)]),
            (true, true) => (DType::BF16, 256),
            _ => (DType::BF16, 128),
        }
    }
}

/// The CPU, and a GPU with the streams that candle has: the per-thread default
/// stream, and one of its own.
fn places() -> Vec<Place> {
    let mut places = vec![Place { device: Device::Cpu, cases: 150, longest: 20 }];
    places.extend(gpus().into_iter().map(|device| Place { device, cases: 40, longest: 200 }));
    places
}

/// What a call asks for, besides its tensors.
#[derive(Clone, Debug, Default)]
struct Asked {
    scale: f32,
    left: Option<usize>,
    right: Option<usize>,
    softcap: Option<f32>,
    slopes: Option<Vec<f32>>,
    ranges: Vec<[i64; 2]>,
}

impl Asked {
    /// A random window and cap that the place has kernels for.
    fn random(rng: &mut Rng, place: &Place, longest: usize) -> Self {
        let mut side = || Some(rng.below(longest + longest / 4 + 1));
        let (one, other) = (side(), side());
        let (left, right) = match rng.below(6) {
            0 | 1 => (None, Some(0)),
            2 => (None, None),
            3 => (one, Some(0)),
            4 => (None, other),
            _ => (one, [None, other][rng.below(2)]),
        };
        let capped = rng.below(4) == 0 && (!place.is_cuda() || left.is_none());
        let softcap = capped.then_some(0.5 + rng.below(40) as f32);
        Self { scale: 0.05 + rng.below(100) as f32 / 400.0, left, right, softcap, ..Self::default() }
    }

    fn slopes(&self, device: &Device) -> Tensor {
        Tensor::new(self.slopes.as_deref().unwrap(), device).unwrap()
    }
}

/// A tensor of random numbers, NaN at the places of `axis` beyond `from..to`.
fn random(rng: &mut Rng, shape: &[usize], dtype: DType, device: &Device, part: Part) -> Tensor {
    let (axis, from, to) = part;
    let inner: usize = shape[axis + 1..].iter().product();
    let number = |at: usize, rng: &mut Rng| {
        let place = at / inner % shape[axis];
        if (from..to).contains(&place) { rng.unit() } else { f64::NAN }
    };
    let numbers: Vec<f64> = (0..shape.iter().product()).map(|at| number(at, rng)).collect();
    Tensor::from_vec(numbers, shape, &Device::Cpu)
        .unwrap()
        .to_dtype(dtype)
        .unwrap()
        .to_device(device)
        .unwrap()
}
type Part = (usize, usize, usize);

fn dense(rng: &mut Rng, shape: &[usize], dtype: DType, device: &Device) -> Tensor {
    random(rng, shape, dtype, device, (0, 0, shape[0]))
}

/// A random tensor `(b, s, h, d)` that lies in one of many ways.
fn laid_out(rng: &mut Rng, [b, s, h, d]: [usize; 4], dtype: DType, device: &Device, way: usize) -> Tensor {
    let (before, after) = (rng.below(5), rng.below(9));
    let max = before + s + after;
    let part = |axis| (axis, before, before + s);
    match way {
        0 => dense(rng, &[b, s, h, d], dtype, device),
        1 => dense(rng, &[b, h, s, d], dtype, device).transpose(1, 2).unwrap(),
        // Part of a cache; what lies around it is NaN.
        2 => random(rng, &[b, h, max, d], dtype, device, part(2))
            .narrow(2, before, s)
            .unwrap()
            .transpose(1, 2)
            .unwrap(),
        3 => random(rng, &[b, max, h, d], dtype, device, part(1)).narrow(1, before, s).unwrap(),
        // Among other heads, in the middle of a longer batch.
        4 => {
            let all = dense(rng, &[b + 2, s, h + 3, d], dtype, device);
            all.narrow(0, 1, b).unwrap().narrow(2, 2, h).unwrap()
        }
        // Not aligned; and with elements that are not adjacent.
        5 => dense(rng, &[b, s, h, d + 12], dtype, device).narrow(3, 4, d).unwrap(),
        6 => dense(rng, &[b, s, d, h], dtype, device).transpose(2, 3).unwrap(),
        // One head, or one sequence, for all.
        7 => dense(rng, &[b, s, 1, d], dtype, device).expand((b, s, h, d)).unwrap(),
        _ => dense(rng, &[1, s, h, d], dtype, device).expand((b, s, h, d)).unwrap(),
    }
}
const WAYS: usize = 9;

/// Attention of one sequence, `(s_q, heads, d)` to `(s_k, heads_k, d)`, in f64
/// on the CPU. `max_keys` is what windows are compared with.
fn plain(q: &Tensor, k: &Tensor, v: &Tensor, asked: &Asked, max_keys: usize) -> Result<Vec<f64>> {
    let on_host = |tensor: &Tensor| {
        let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        tensor.transpose(0, 1)?.contiguous()
    };
    let (q, k, v) = (on_host(q)?, on_host(k)?, on_host(v)?);
    let (heads, s_q, d) = q.dims3()?;
    let (heads_k, s_k, _) = k.dims3()?;
    if s_q == 0 || s_k == 0 {
        return Ok(vec![0.0; heads * s_q * d]);
    }
    let repeat = |tensor: &Tensor| {
        let repeated = tensor.unsqueeze(1)?.expand((heads_k, heads / heads_k, s_k, d))?;
        repeated.contiguous()?.reshape((heads, s_k, d))
    };
    let mut logits = (q.matmul(&repeat(&k)?.t()?.contiguous()?)? * f64::from(asked.scale))?;
    if let Some(cap) = asked.softcap.filter(|&cap| cap > 0.0).map(f64::from) {
        logits = ((logits / cap)?.tanh()? * cap)?;
    }
    // The windows as FlashAttention's launcher turns them, with −1 for none.
    let side = |side: Option<usize>| side.filter(|&side| side <= max_keys).map_or(-1, |side| side as i64);
    let (mut left, mut right) = (side(asked.left), side(asked.right));
    if left < 0 && right >= 0 {
        left = max_keys as i64;
    }
    if left >= 0 && right < 0 {
        right = max_keys as i64;
    }
    let hides = left >= 0 || right >= 0;
    let (mut hidden, mut distance, mut sees) = (Vec::new(), Vec::new(), Vec::new());
    for row in 0..s_q as i64 {
        let position = row + s_k as i64 - s_q as i64;
        let seen = |key: &i64| {
            let within = (position - left..=position + right).contains(key);
            let both =
                |[start, end]: &[i64; 2]| (*start..*end).contains(&position) && (*start..*end).contains(key);
            !hides || within || asked.ranges.iter().any(both)
        };
        let keys = 0..s_k as i64;
        sees.push(f64::from(u8::from(keys.clone().any(|key| seen(&key)))));
        hidden.extend(keys.clone().map(|key| if seen(&key) { 0.0 } else { f64::NEG_INFINITY }));
        distance.extend(keys.map(|key| (position - key).abs() as f64));
    }
    let table = |numbers| Tensor::from_vec(numbers, (1, s_q, s_k), &Device::Cpu);
    if let Some(slopes) = &asked.slopes {
        let slopes = Tensor::new(slopes.as_slice(), &Device::Cpu)?.to_dtype(DType::F64)?;
        logits = (logits - slopes.reshape((heads, 1, 1))?.broadcast_mul(&table(distance)?)?)?;
    }
    logits = logits.broadcast_add(&table(hidden)?)?;
    // A row that sees nothing is all −∞; any finite number in place of its
    // maximum leaves no NaN.
    let max = logits.max_keepdim(2)?.maximum(-1e30)?;
    let weights = logits.broadcast_sub(&max)?.exp()?;
    let sums = weights.sum_keepdim(2)?.maximum(1e-300)?;
    let out = weights.broadcast_div(&sums)?.matmul(&repeat(&v)?)?;
    let sees = Tensor::from_vec(sees, (1, s_q, 1), &Device::Cpu)?;
    out.broadcast_mul(&sees)?.transpose(0, 1)?.flatten_all()?.to_vec1()
}

#[track_caller]
fn assert_close(got: &Tensor, expected: &[f64], what: &str) {
    let width = *got.dims().last().unwrap();
    let bound = match got.dtype() {
        DType::F16 => 1e-3,
        DType::BF16 => 8e-3,
        DType::F32 => 1e-5,
        _ => 1e-12,
    };
    let numbers = got.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
    let numbers: Vec<f64> = numbers.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(numbers.len(), expected.len(), "{what}");
    for (row, (got, expected)) in numbers.chunks(width).zip(expected.chunks(width)).enumerate() {
        let norm = |numbers: &mut dyn Iterator<Item = f64>| {
            numbers.map(|number| number * number).sum::<f64>().sqrt()
        };
        let error = norm(&mut got.iter().zip(expected).map(|(a, b)| a - b));
        let size = norm(&mut expected.iter().copied());
        assert!(error <= bound * size, "{what}: row {row} is off by {error:e} of {size:e}");
    }
}

/// The sequences of a dense batch, each by itself.
fn plain_dense(q: &Tensor, k: &Tensor, v: &Tensor, asked: &Asked) -> Vec<f64> {
    let one = |sequence| {
        let [q, k, v] = [q, k, v].map(|tensor| tensor.get(sequence).unwrap());
        plain(&q, &k, &v, asked, k.dims()[0]).unwrap()
    };
    (0..q.dims()[0]).flat_map(one).collect()
}

/// The dense function that takes what is asked for.
fn call_dense(q: &Tensor, k: &Tensor, v: &Tensor, asked: &Asked) -> Result<Tensor> {
    let Asked { scale, left, right, softcap, .. } = *asked;
    let slopes = asked.slopes.is_some().then(|| asked.slopes(q.device()));
    let causal = right.is_some();
    match (softcap, &slopes) {
        (Some(cap), slopes) => {
            flash_attn_alibi_windowed_softcap(q, k, v, slopes.as_ref(), scale, left, right, cap)
        }
        (None, Some(slopes)) if left.is_none() && matches!(right, None | Some(0)) => {
            flash_attn_alibi(q, k, v, slopes, scale, causal)
        }
        (None, Some(slopes)) => flash_attn_alibi_windowed(q, k, v, slopes, scale, left, right),
        (None, None) if left.is_none() && matches!(right, None | Some(0)) => {
            flash_attn(q, k, v, scale, causal)
        }
        (None, None) => flash_attn_windowed(q, k, v, scale, left, right),
    }
}

/// Shapes of one case, and its tensors in random layouts.
fn dense_case(rng: &mut Rng, place: &Place, (window, cap): (bool, bool)) -> [Tensor; 3] {
    let (dtype, d) = place.types(rng, window, cap);
    let (b, heads_k, group) = (1 + rng.below(3), 1 + rng.below(3), [1, 2, 3, 8][rng.below(4)]);
    let mut len = || 1 + [rng.below(place.longest), 0][usize::from(rng.below(4) == 0)];
    let (s_q, s_k) = (len(), len());
    let (q_way, k_way) = (rng.below(WAYS), rng.below(WAYS));
    // Keys and values in one way, mostly.
    let v_way = if rng.below(4) == 0 { rng.below(WAYS) } else { k_way };
    let q = laid_out(rng, [b, s_q, heads_k * group, d], dtype, &place.device, q_way);
    let mut keys = |way| laid_out(rng, [b, s_k, heads_k, d], dtype, &place.device, way);
    [q, keys(k_way), keys(v_way)]
}

fn describe(tensors: &[Tensor; 3], asked: &Asked) -> String {
    let [q, k, v] = tensors.each_ref().map(Tensor::layout);
    format!("{} of {:?}: q {q:?}, k {k:?}, v {v:?}, {asked:?}", "attention", tensors[0].dtype())
}

#[test]
fn dense_batches() {
    let mut rng = Rng::new();
    for place in places() {
        for _ in 0..place.cases {
            let mut asked = Asked::random(&mut rng, &place, place.longest);
            if !place.is_cuda() && rng.below(3) == 0 {
                asked.slopes = Some(Vec::new());
            }
            let case = dense_case(&mut rng, &place, (asked.left.is_some(), asked.softcap.is_some()));
            let [q, k, v] = &case;
            if asked.slopes.is_some() {
                asked.slopes = Some((0..q.dims()[2]).map(|_| rng.below(100) as f32 / 200.0).collect());
            }
            let what = describe(&case, &asked);
            let got = call_dense(q, k, v, &asked).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!((got.dims(), got.dtype()), (q.dims(), q.dtype()));
            assert_close(&got, &plain_dense(q, k, v, &asked), &what);
        }
    }
}

/// Long enough for FlashAttention 3, and for keys to be divided.
#[test]
fn long_sequences() {
    let mut rng = Rng::new();
    for place in places().iter().filter(|place| place.is_cuda()) {
        for (s_q, s_k, b) in
            [(128, 128, 2), (200, 700, 1), (700, 200, 2), (1, 4000, 1), (3, 3000, 2), (257, 257, 3)]
        {
            for way in 0..5 {
                for right in [None, Some(0)] {
                    for left in [None, Some(50)] {
                        let (dtype, d) = place.types(&mut rng, left.is_some(), false);
                        let shape = |s, h| [b, s, h, d];
                        let q = laid_out(&mut rng, shape(s_q, 4), dtype, &place.device, way % 2);
                        let k = laid_out(&mut rng, shape(s_k, 2), dtype, &place.device, way);
                        let v = laid_out(&mut rng, shape(s_k, 2), dtype, &place.device, way);
                        let asked = Asked { scale: 0.1, left, right, ..Asked::default() };
                        let case = [q, k, v];
                        let got = call_dense(&case[0], &case[1], &case[2], &asked).unwrap();
                        let expected = plain_dense(&case[0], &case[1], &case[2], &asked);
                        assert_close(&got, &expected, &describe(&case, &asked));
                    }
                }
            }
        }
    }
}

/// A window and a soft cap at once, as Gemma 2 has them, with its head dimension.
#[test]
fn window_and_soft_cap() {
    let mut rng = Rng::new();
    for place in places() {
        let (dtype, d) = place.types(&mut rng, true, true);
        for (s_q, s_k) in [(1, 30), (20, 30), (30, 30)] {
            let mut tensor = |s, h| laid_out(&mut rng, [2, s, h, d], dtype, &place.device, 1);
            let case = [tensor(s_q, 4), tensor(s_k, 2), tensor(s_k, 2)];
            let (left, right) = (Some(5), Some(0));
            let asked = Asked { scale: 0.2, left, right, softcap: Some(3.0), ..Asked::default() };
            let got = call_dense(&case[0], &case[1], &case[2], &asked).unwrap();
            assert_close(&got, &plain_dense(&case[0], &case[1], &case[2], &asked), &describe(&case, &asked));
        }
    }
}

/// Cumulative lengths, on the CPU or the device, of any integer type.
fn cumulative(rng: &mut Rng, lens: &[usize], place: &Place) -> Tensor {
    let mut ends = vec![0i64];
    ends.extend(lens.iter().scan(0, |end, &len| {
        *end += len as i64;
        Some(*end)
    }));
    let device = [&Device::Cpu, &place.device][rng.below(2)];
    let dtype = [DType::U32, DType::I32, DType::I64][rng.below(3)];
    // candle's CUDA casts know no i32, so this is done on the host.
    Tensor::new(ends, &Device::Cpu).unwrap().to_dtype(dtype).unwrap().to_device(device).unwrap()
}

fn random_lens(rng: &mut Rng, place: &Place) -> Vec<(usize, usize)> {
    let mut len = || if rng.below(4) == 0 { 0 } else { rng.below(place.longest) };
    let mut lens: Vec<_> = (0..5).map(|_| (len(), len())).collect();
    // Never nothing at all.
    lens.push((2, 3));
    lens.truncate(6);
    lens.rotate_left(rng.below(6));
    lens
}

/// Sequences one after the other, each by itself.
fn plain_varlen(
    q: &Tensor,
    keys: &[[Tensor; 2]],
    lens: &[(usize, usize)],
    asked: &Asked,
    ranges: &[Vec<[i64; 2]>],
) -> Vec<f64> {
    let (mut first, mut expected) = (0, Vec::new());
    let max_keys = lens.iter().map(|lens| lens.1).max().unwrap();
    for (sequence, &(s_q, s_k)) in lens.iter().enumerate() {
        let ranges = ranges.get(sequence).cloned().unwrap_or_default();
        let [k, v] = &keys[sequence];
        assert_eq!(k.dims()[0], s_k);
        let q = q.narrow(0, first, s_q).unwrap();
        expected.extend(plain(&q, k, v, &Asked { ranges, ..asked.clone() }, max_keys).unwrap());
        first += s_q;
    }
    expected
}

#[test]
fn sequences_of_several_lengths() {
    let mut rng = Rng::new();
    for place in places() {
        for _ in 0..place.cases {
            let lens = random_lens(&mut rng, &place);
            let (queries, keys): (Vec<_>, Vec<_>) = lens.iter().copied().unzip();
            let (max_q, max_k) = (*queries.iter().max().unwrap(), *keys.iter().max().unwrap());
            let mut asked = Asked::random(&mut rng, &place, max_k);
            let (dtype, d) = place.types(&mut rng, asked.left.is_some(), asked.softcap.is_some());
            let (heads_k, group) = (1 + rng.below(3), [1, 2, 4][rng.below(3)]);
            if !place.is_cuda() && rng.below(3) == 0 {
                asked.slopes = Some((0..heads_k * group).map(|_| rng.below(100) as f32 / 200.0).collect());
            }
            let way = [0, 1, 4, 5][rng.below(4)];
            let mut rows = |lens: &[usize], heads| {
                let shape = [1, lens.iter().sum(), heads, d];
                laid_out(&mut rng, shape, dtype, &place.device, way).squeeze(0).unwrap()
            };
            let case = [rows(&queries, heads_k * group), rows(&keys, heads_k), rows(&keys, heads_k)];
            let [q, k, v] = &case;
            let (cum_q, cum_k) =
                (cumulative(&mut rng, &queries, &place), cumulative(&mut rng, &keys, &place));
            let Asked { scale, left, right, softcap, .. } = asked;
            let simple = left.is_none() && matches!(right, None | Some(0));
            let slopes = asked.slopes.is_some().then(|| asked.slopes(&place.device));
            let causal = right.is_some();
            let got = match (softcap, &slopes) {
                (Some(cap), slopes) => flash_attn_varlen_alibi_windowed_softcap(
                    q,
                    k,
                    v,
                    slopes.as_ref(),
                    &cum_q,
                    &cum_k,
                    max_q,
                    max_k,
                    scale,
                    left,
                    right,
                    cap,
                ),
                (None, Some(slopes)) if simple => {
                    flash_attn_varlen_alibi(q, k, v, slopes, &cum_q, &cum_k, max_q, max_k, scale, causal)
                }
                (None, Some(slopes)) => flash_attn_varlen_alibi_windowed(
                    q, k, v, slopes, &cum_q, &cum_k, max_q, max_k, scale, left, right,
                ),
                (None, None) if simple => {
                    flash_attn_varlen(q, k, v, &cum_q, &cum_k, max_q, max_k, scale, causal)
                }
                (None, None) => {
                    flash_attn_varlen_windowed(q, k, v, &cum_q, &cum_k, max_q, max_k, scale, left, right)
                }
            };
            let what = format!("{lens:?}, {}", describe(&case, &asked));
            let got = got.unwrap_or_else(|error| panic!("{what}: {error}"));
            let mut first = 0;
            let apart: Vec<[Tensor; 2]> = keys
                .iter()
                .map(|&len| {
                    first += len;
                    [k, v].map(|tensor| tensor.narrow(0, first - len, len).unwrap())
                })
                .collect();
            assert_close(&got, &plain_varlen(q, &apart, &lens, &asked, &[]), &what);
        }
    }
}

#[test]
fn pages_in_any_order() {
    let mut rng = Rng::new();
    for place in places() {
        for _ in 0..place.cases {
            let lens = random_lens(&mut rng, &place);
            let (queries, keys): (Vec<_>, Vec<_>) = lens.iter().copied().unzip();
            let (max_q, max_k) = (*queries.iter().max().unwrap(), *keys.iter().max().unwrap());
            let mut asked = Asked::random(&mut rng, &place, max_k);
            // Ranges go with a mask of bits, which needs no module of its own.
            let with_ranges = rng.below(2) == 0;
            let (dtype, d) = place.types(&mut rng, asked.left.is_some(), asked.softcap.is_some());
            let page_size = [1, 3, 16, 32][rng.below(4)];
            let (heads_k, group) = (1 + rng.below(3), [1, 2, 4][rng.below(3)]);
            let needed: Vec<usize> = keys.iter().map(|len| len.div_ceil(page_size)).collect();
            let (blocks, columns) = (needed.iter().sum::<usize>() + 3, needed.iter().max().unwrap() + 2);

            // Blocks in random order; what is behind a sequence's last is senseless.
            let mut order = rng.permutation(blocks).into_iter();
            let mut table = Vec::new();
            for &needed in &needed {
                table.extend(order.by_ref().take(needed).map(i64::from));
                table.extend((needed..columns).map(|_| 77777));
            }
            let pages: Vec<Vec<u32>> = table
                .chunks(columns)
                .zip(&needed)
                .map(|(row, &needed)| row[..needed].iter().map(|&page| page as u32).collect())
                .collect();
            let device = [&Device::Cpu, &place.device][rng.below(2)];
            let integers = [DType::U32, DType::I32, DType::I64][rng.below(3)];
            let table = Tensor::from_vec(table, (lens.len(), columns), &Device::Cpu).unwrap();
            let table = table.to_dtype(integers).unwrap().to_device(device).unwrap();

            // Keys and values in one tensor, in two, or in two that differ.
            let joined = dense(&mut rng, &[blocks, 2, page_size, heads_k, d], dtype, &place.device);
            let [mut k, mut v] = [0, 1].map(|at| joined.narrow(1, at, 1).unwrap().squeeze(1).unwrap());
            let way = rng.below(3);
            k = if way > 0 { k.contiguous().unwrap() } else { k };
            v = if way > 1 { v.contiguous().unwrap() } else { v };
            let q_shape = [1, queries.iter().sum(), heads_k * group, d];
            let q = laid_out(&mut rng, q_shape, dtype, &place.device, 1).squeeze(0).unwrap();

            let ranges: Vec<Vec<[i64; 2]>> = if with_ranges {
                let end = |rng: &mut Rng| rng.below(max_k + 3) as i64 - 1;
                lens.iter().map(|_| (0..2).map(|_| [end(&mut rng), end(&mut rng)]).collect()).collect()
            } else {
                Vec::new()
            };
            let flat: Vec<i64> = ranges.iter().flatten().flatten().copied().collect();
            let range_tensor = with_ranges.then(|| {
                let tensor = Tensor::from_vec(flat, (lens.len(), 2, 2), &Device::Cpu).unwrap();
                tensor.to_dtype(DType::I32).unwrap().to_device(device).unwrap()
            });
            let (cum_q, cum_k) =
                (cumulative(&mut rng, &queries, &place), cumulative(&mut rng, &keys, &place));
            let Asked { scale, left, right, ref mut softcap, .. } = asked;
            if softcap.is_none() && rng.below(2) == 0 {
                *softcap = Some(0.0);
            }
            let got = flash_attn_varlen_paged_windowed(
                &q,
                &k,
                &v,
                &cum_q,
                &cum_k,
                &table,
                range_tensor.as_ref(),
                max_q,
                max_k,
                scale,
                left,
                right,
                page_size,
                *softcap,
            );
            let what = format!(
                "{lens:?} in pages of {page_size}, {ranges:?}, {}",
                describe(&[q.clone(), k.clone(), v.clone()], &asked)
            );
            let got = got.unwrap_or_else(|error| panic!("{what}: {error}"));
            let apart: Vec<[Tensor; 2]> = pages
                .iter()
                .zip(&keys)
                .map(|(pages, &len)| {
                    [&k, &v].map(|cache| {
                        let cache = cache.to_device(&Device::Cpu).unwrap().contiguous().unwrap();
                        if len == 0 {
                            return Tensor::zeros((0, heads_k, d), dtype, &Device::Cpu).unwrap();
                        }
                        let pages = Tensor::new(pages.as_slice(), &Device::Cpu).unwrap();
                        let all = cache.index_select(&pages, 0).unwrap();
                        all.reshape(((), heads_k, d)).unwrap().narrow(0, 0, len).unwrap()
                    })
                })
                .collect();
            assert_close(&got, &plain_varlen(&q, &apart, &lens, &asked, &ranges), &what);
        }
    }
}

/// Layers with equal shapes and other numbers, step after step, with two kinds
/// of layers in turn: each call finds its own plan.
#[test]
fn layers_of_several_steps() {
    let mut rng = Rng::new();
    for place in places() {
        let (dtype, d) = place.types(&mut rng, true, false);
        let (b, heads, heads_k, max) = (2, 4, 2, 24);
        let mut caches: Vec<[Tensor; 2]> = Vec::new();
        for _ in 0..3 {
            let mut cache = || dense(&mut rng, &[b, heads_k, max, d], dtype, &place.device);
            caches.push([cache(), cache()]);
        }
        for step in 5..12 {
            for (layer, cache) in caches.iter().enumerate() {
                let q = dense(&mut rng, &[b, heads, 1, d], dtype, &place.device).transpose(1, 2).unwrap();
                let [k, v] =
                    cache.each_ref().map(|cache| cache.narrow(2, 0, step).unwrap().transpose(1, 2).unwrap());
                let left = (layer % 2 == 1).then_some(3);
                let asked = Asked { scale: 0.3, left, right: Some(0), ..Asked::default() };
                let got = call_dense(&q, &k, &v, &asked).unwrap();
                assert_close(&got, &plain_dense(&q, &k, &v, &asked), &format!("step {step}, layer {layer}"));
            }
        }
    }
}

/// Batches over rows and over blocks take turns, with one mask and the same
/// queries, until each has the place that another one had.
#[test]
fn rows_and_blocks_in_turn() {
    let mut rng = Rng::new();
    for place in places() {
        let (dtype, d) = place.types(&mut rng, false, false);
        let q = dense(&mut rng, &[3, 4, d], dtype, &place.device);
        let cache = dense(&mut rng, &[2, 16, 2, d], dtype, &place.device);
        let rows = cache.reshape((32, 2, d)).unwrap();
        let new = |end| Tensor::new(&[0u32, end], &Device::Cpu).unwrap();
        let over_rows = |keys: usize| {
            let (k, ends) = (rows.narrow(0, 0, keys).unwrap(), new(keys as u32));
            flash_attn_varlen_windowed(&q, &k, &k, &new(3), &ends, 3, keys, 0.1, Some(2), Some(1)).unwrap()
        };
        let table = Tensor::new(&[[0u32, 1]], &Device::Cpu).unwrap();
        let over_blocks = |keys: usize| {
            let (queries, ends, sides) = (new(3), new(keys as u32), [Some(2), Some(1)]);
            let [left, right] = sides;
            flash_attn_varlen_paged_windowed(
                &q, &cache, &cache, &queries, &ends, &table, None, 3, keys, 0.1, left, right, 16, None,
            )
            .unwrap()
        };
        let asked = Asked { scale: 0.1, left: Some(2), right: Some(1), ..Asked::default() };
        let expected = |keys| {
            let k = rows.narrow(0, 0, keys).unwrap();
            plain_varlen(&q, &[[k.clone(), k]], &[(3, keys)], &asked, &[])
        };
        for round in 0..8 {
            for keys in [8, 9, 10, 11] {
                assert_close(&over_rows(keys), &expected(keys), &format!("{keys} rows, round {round}"));
            }
            for keys in [20 + round, 8] {
                assert_close(
                    &over_blocks(keys),
                    &expected(keys),
                    &format!("{keys} in blocks, round {round}"),
                );
            }
        }
    }
}

#[test]
fn threads_have_their_own_workspaces() {
    for place in places() {
        let run = |device: Device| {
            let (place, mut rng) = (Place { device, cases: 0, longest: 40 }, Rng::new());
            for _ in 0..4 {
                let asked = Asked { scale: 0.1, right: Some(0), ..Asked::default() };
                let case = dense_case(&mut rng, &place, (false, false));
                let got = call_dense(&case[0], &case[1], &case[2], &asked).unwrap();
                assert_close(
                    &got,
                    &plain_dense(&case[0], &case[1], &case[2], &asked),
                    &describe(&case, &asked),
                );
            }
            // Some give back what they keep, others end with it.
            if rng.below(2) == 0 {
                release_workspaces();
                release_workspaces();
            }
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| run(place.device.clone()))).collect();
            run(place.device.clone());
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
    }
}

#[test]
fn inputs_that_are_one_tensor() {
    let mut rng = Rng::new();
    for place in places() {
        let (dtype, d) = place.types(&mut rng, false, false);
        let asked = Asked { scale: 0.1, right: Some(0), ..Asked::default() };
        let x = dense(&mut rng, &[2, 9, 3, d], dtype, &place.device);
        assert_close(&call_dense(&x, &x, &x, &asked).unwrap(), &plain_dense(&x, &x, &x, &asked), "q = k = v");
        let qkv = dense(&mut rng, &[2, 9, 8, d], dtype, &place.device);
        let [q, k, v] = [(0, 4), (4, 2), (6, 2)].map(|(at, heads)| qkv.narrow(2, at, heads).unwrap());
        assert_close(
            &call_dense(&q, &k, &v, &asked).unwrap(),
            &plain_dense(&q, &k, &v, &asked),
            "one projection",
        );
    }
}

/// Somebody writes to the cache while calls read it, and waits for its lock:
/// neither waits for ever.
#[test]
fn a_writer_meanwhile() {
    let mut rng = Rng::new();
    for place in places() {
        let (dtype, d) = place.types(&mut rng, false, false);
        let cache = dense(&mut rng, &[1, 16, 2, d], dtype, &place.device);
        let row = dense(&mut rng, &[1, 1, 2, d], dtype, &place.device);
        let (done, finished) = mpsc::channel();
        let (writer, written) = (cache.clone(), done.clone());
        // Each thread has a default stream of its own.
        place.device.synchronize().unwrap();
        let writing = std::thread::spawn(move || {
            for at in 0..300 {
                writer.slice_set(&row, 1, at % 16).unwrap();
            }
            writer.device().synchronize().unwrap();
            written.send(()).unwrap();
        });
        let reading = std::thread::spawn(move || {
            for _ in 0..300 {
                let q = cache.narrow(1, 3, 2).unwrap();
                assert_eq!(flash_attn(&q, &cache, &cache, 0.1, true).unwrap().dims(), q.dims());
            }
            cache.device().synchronize().unwrap();
            done.send(()).unwrap();
        });
        for _ in 0..2 {
            finished.recv_timeout(Duration::from_secs(60)).expect("a deadlock, or a thread that failed");
        }
        writing.join().unwrap();
        reading.join().unwrap();
    }
}

#[test]
fn nothing_to_do() {
    for place in places() {
        let (dtype, d, device) = (DType::BF16, 64, &place.device);
        // Parts of other tensors, because CUDA allocates nothing of no bytes.
        let empty = |shape: &[usize]| {
            let all: Vec<usize> = shape.iter().map(|&size| size.max(1)).collect();
            let all = Tensor::ones(all, dtype, device).unwrap();
            let axes = shape.iter().enumerate();
            axes.fold(all, |tensor, (axis, &size)| tensor.narrow(axis, 0, size).unwrap())
        };
        for (b, s_q, s_k) in [(0, 3, 3), (2, 0, 3), (2, 3, 0)] {
            let (q, k) = (empty(&[b, s_q, 4, d]), empty(&[b, s_k, 2, d]));
            let out = flash_attn(&q, &k, &k, 0.1, true).unwrap();
            assert_eq!((out.dims(), out.dtype()), (q.dims(), dtype));
            if out.elem_count() == 0 {
                continue;
            }
            let out = out.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
            assert!(out.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|&number| number == 0.0));
        }
        let (q, k) = (empty(&[0, 4, d]), empty(&[0, 2, d]));
        for ends in [&[0u32][..], &[0, 0, 0]] {
            let ends = Tensor::new(ends, &Device::Cpu).unwrap();
            let out = flash_attn_varlen(&q, &k, &k, &ends, &ends, 0, 0, 0.1, false).unwrap();
            assert_eq!(out.dims(), q.dims());
        }
    }
}

#[track_caller]
fn refused(result: Result<Tensor>, problem: &str) {
    let error = result.expect_err(problem).to_string();
    assert!(error.contains(problem), "{error:?} does not say {problem:?}");
}

#[test]
fn wrong_input() {
    for place in places() {
        let (dtype, device) = (DType::BF16, &place.device);
        let ones = |shape: &[usize]| Tensor::ones(shape, dtype, device).unwrap();
        let (q, k) = (ones(&[2, 3, 4, 64]), ones(&[2, 5, 2, 64]));
        let call = |q: &Tensor, k: &Tensor, v: &Tensor| flash_attn(q, k, v, 0.1, true);
        refused(call(&q, &k, &ones(&[2, 6, 2, 64])), "must be alike");
        refused(call(&q, &ones(&[1, 5, 2, 64]), &ones(&[1, 5, 2, 64])), "with the batch");
        refused(call(&q, &ones(&[2, 5, 2, 32]), &ones(&[2, 5, 2, 32])), "head dimension of q");
        refused(call(&q, &ones(&[2, 5, 3, 64]), &ones(&[2, 5, 3, 64])), "4 heads of q over 3");
        let none = k.narrow(2, 0, 0).unwrap();
        refused(call(&q, &none, &none), "4 heads of q over 0");
        refused(call(&ones(&[3, 4, 64]), &k, &k), "expected 4 dimensions");
        let zeros = |tensor: &Tensor, dtype| Tensor::zeros(tensor.shape(), dtype, device).unwrap();
        refused(call(&q, &zeros(&k, DType::F16), &k), "k is f16, q is bf16");
        let odd = |width| [ones(&[1, 3, 2, width]), ones(&[1, 3, 2, width])];
        let [q_odd, k_odd] = odd(60);
        refused(call(&q_odd, &k_odd, &k_odd), "a head dimension of 60");
        let [q_odd, k_odd] = odd(520);
        refused(call(&q_odd, &k_odd, &k_odd), "a head dimension of 520");
        let keys = zeros(&k, DType::U8);
        refused(call(&zeros(&q, DType::U8), &keys, &keys), "tensors of u8");

        let (q, k) = (ones(&[6, 4, 64]), ones(&[8, 2, 64]));
        let new =
            |ends: &[u32]| Tensor::new(ends, if ends.is_empty() { &Device::Cpu } else { device }).unwrap();
        let varlen = |queries: &[u32], keys: &[u32], max: usize| {
            flash_attn_varlen(&q, &k, &k, &new(queries), &new(keys), max, max, 0.1, false)
        };
        assert!(varlen(&[0, 4, 6], &[0, 0, 8], 8).is_ok());
        refused(varlen(&[1, 4, 6], &[0, 0, 8], 8), "begins with 1");
        refused(varlen(&[0, 4, 3], &[0, 0, 8], 8), "decreases from 4 to 3");
        refused(varlen(&[0, 4, 5], &[0, 0, 8], 8), "seqlens_q ends with 5");
        refused(varlen(&[0, 4, 6], &[0, 0, 9], 9), "seqlens_k ends with 9");
        refused(varlen(&[0, 4, 6], &[0, 8], 8), "of 2 sequences, seqlens_k of 1");
        refused(varlen(&[0, 4, 6], &[0, 0, 8], 7), "sequence 1 has 8 rows");
        refused(varlen(&[], &[], 7), "expected one dimension");
        let (far, ends) = (Tensor::new(&[0, 6, i64::MIN], device).unwrap(), new(&[0, 0, 8]));
        let max = usize::MAX;
        refused(flash_attn_varlen(&q, &k, &k, &far, &ends, max, max, 0.1, false), "decreases from 6");
        let floats = Tensor::new(&[0f32, 6.0], device).unwrap();
        refused(
            flash_attn_varlen(&q, &k, &k, &floats, &floats, 8, 8, 0.1, false),
            "expected u32, i32 or i64",
        );

        let cache = ones(&[4, 16, 2, 64]);
        let paged = |table: &[[u32; 2]], page_size, ranges: Option<&Tensor>| {
            let table = Tensor::from_slice(table.as_flattened(), (table.len(), 2), device).unwrap();
            let (cum_q, cum_k) = (new(&[0, 4, 6]), new(&[0, 17, 20]));
            flash_attn_varlen_paged_windowed(
                &q,
                &cache,
                &cache,
                &cum_q,
                &cum_k,
                &table,
                ranges,
                8,
                32,
                0.1,
                None,
                Some(0),
                page_size,
                None,
            )
        };
        assert!(paged(&[[3, 1], [0, 9]], 16, None).is_ok());
        refused(paged(&[[3, 4], [0, 9]], 16, None), "4");
        refused(paged(&[[3, 1], [0, 9]], 32, None), "page_block_size is 32");
        refused(paged(&[[3, 1]], 16, None), "block_table has 1 rows");
        refused(paged(&[[3, u32::MAX], [0, 0]], 16, None), "names block 4294967295");
        let ranges = Tensor::zeros((3, 1, 2), DType::U32, device).unwrap();
        refused(paged(&[[3, 1], [0, 9]], 16, Some(&ranges)), "expected (2, max_ranges, 2)");

        let (q, k) = (ones(&[1, 3, 4, 64]), ones(&[1, 5, 2, 64]));
        for slopes in [Tensor::zeros(3, DType::F32, device), Tensor::zeros(4, DType::F16, device)] {
            refused(flash_attn_alibi(&q, &k, &k, &slopes.unwrap(), 0.1, true), "expected f32 and (4,)");
        }
    }
}

/// What there are no kernels for on CUDA is an error that names what there is.
#[test]
fn no_kernel_on_cuda() {
    for place in places().iter().filter(|place| place.is_cuda()) {
        let device = &place.device;
        let ones = |dtype, width| Tensor::ones((1, 3, 2, width), dtype, device).unwrap();
        let call = |x: &Tensor| flash_attn(x, x, x, 0.1, true);
        refused(call(&ones(DType::F32, 64)), "on CUDA there are f16 and bf16");
        refused(call(&ones(DType::F16, 96)), "head dimensions 64, 128 and 256");
        let (x, slopes) = (ones(DType::F16, 64), Tensor::ones(2, DType::F32, device).unwrap());
        refused(flash_attn_alibi(&x, &x, &x, &slopes, 0.1, true), "none with ALiBi");
        refused(flash_attn_alibi(&x, &x, &x, &slopes, 0.1, false), "ALiBi needs window_size_right = Some(0)");
        refused(
            flash_attn_alibi_windowed_softcap(&x, &x, &x, Some(&slopes), 0.1, None, Some(0), 2.0),
            "soft cap",
        );
        let on_host = x.to_device(&Device::Cpu).unwrap();
        refused(flash_attn(&x, &on_host, &x, 0.1, true), "k is on Cpu");
        refused(flash_attn(&on_host, &x, &x, 0.1, true), "k is on Cuda");
        // And afterwards all is well.
        assert!(call(&x).is_ok());
    }
}

#[test]
fn there_is_no_gradient() {
    let x = Var::ones((1, 3, 2, 16), DType::F32, &Device::Cpu).unwrap();
    let out = flash_attn(&x, &x, &x, 0.1, true).unwrap();
    assert!(out.sum_all().unwrap().backward().is_err());
}
