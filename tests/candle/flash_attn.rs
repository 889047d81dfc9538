//! `candle::flash_attn` and the functions beside it, against attention that is
//! written with candle's plain operations: on CPU tensors always, on CUDA
//! tensors where `FLASHINFER_RS_RUN_GPU_TESTS=1` and the feature `candle-cuda`
//! say so.

mod block_tables;
mod dense;
mod edges;
mod varlen;

use crate::candle_common::{Rng, gpus};
use candle_core::{DType, Device, Result, Tensor, Var};
use flashinfer_rs::candle::{
    flash_attn, flash_attn_alibi, flash_attn_alibi_windowed, flash_attn_alibi_windowed_softcap,
    flash_attn_varlen, flash_attn_varlen_alibi, flash_attn_varlen_alibi_windowed,
    flash_attn_varlen_alibi_windowed_softcap, flash_attn_varlen_paged_windowed, flash_attn_varlen_windowed,
    flash_attn_windowed, release_workspaces,
};
use std::{sync::mpsc, time::Duration};

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
