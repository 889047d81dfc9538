//! What tests with candle's tensors share: devices, random tensors, and
//! comparison with plain candle operations on the CPU.

// Each test file uses its own part of this.
#![allow(dead_code)]

use candle_core::{D, DType, Device, Result, Tensor};
pub use test_support::{Rng, say};

/// The CPU; and a GPU with candle's default stream, and with one of its own, if
/// there is one to be used.
pub fn devices() -> Vec<Device> {
    let mut devices = vec![Device::Cpu];
    devices.extend(gpus());
    devices
}

#[cfg(not(feature = "candle-cuda"))]
pub fn gpus() -> Vec<Device> {
    say("skipped on CUDA: the feature `candle-cuda` is off");
    Vec::new()
}

#[cfg(feature = "candle-cuda")]
pub fn gpus() -> Vec<Device> {
    if std::env::var_os("FLASHINFER_RS_RUN_GPU_TESTS").is_none_or(|value| value != "1") {
        say(
            "skipped on CUDA: set FLASHINFER_RS_RUN_GPU_TESTS=1 on a machine with an NVIDIA GPU to run it there",
        );
        return Vec::new();
    }
    vec![Device::new_cuda(0).expect("an NVIDIA GPU"), Device::new_cuda_with_stream(0).expect("a stream")]
}

/// The element types that a device has.
pub fn dtypes(device: &Device) -> &'static [DType] {
    if device.is_cpu() { &[DType::F32, DType::F16, DType::BF16] } else { &[DType::F16, DType::BF16] }
}

/// Random numbers of variance 1, rounded to a dtype.
pub fn random(rng: &mut Rng, shape: &[usize], dtype: DType, device: &Device) -> Tensor {
    // An empty tensor is part of another: CUDA allocates no empty ones.
    let allocated: Vec<_> = shape.iter().map(|&size| size.max(1)).collect();
    let numbers: Vec<f32> = (0..allocated.iter().product()).map(|_| rng.unit() as f32).collect();
    let tensor = Tensor::from_vec(numbers, allocated, &Device::Cpu).unwrap();
    let tensor = tensor.to_dtype(dtype).unwrap().to_device(device).unwrap();
    let narrowed = |tensor: Tensor, (axis, &size): (usize, &usize)| tensor.narrow(axis, 0, size).unwrap();
    shape.iter().enumerate().fold(tensor, narrowed)
}

/// One of the ways in which `(rows, heads, width)` can lie in memory: as it is,
/// in the middle of a wider tensor, transposed, or at odd addresses.
pub fn laid_out(rng: &mut Rng, tensor: &Tensor) -> Tensor {
    let (rows, heads, width) = tensor.dims3().unwrap();
    let noise = |rng: &mut Rng, shape: &[usize]| random(rng, shape, tensor.dtype(), tensor.device());
    match rng.below(4) {
        0 => tensor.clone(),
        1 => {
            let (before, after) = (noise(rng, &[rows, 2, width]), noise(rng, &[rows, 3, width]));
            Tensor::cat(&[&before, tensor, &after], 1).unwrap().narrow(1, 2, heads).unwrap()
        }
        2 => tensor.transpose(0, 1).unwrap().contiguous().unwrap().transpose(0, 1).unwrap(),
        _ => {
            let (before, after) = (noise(rng, &[rows, heads, 1]), noise(rng, &[rows, heads, 2]));
            Tensor::cat(&[&before, tensor, &after], 2).unwrap().narrow(2, 1, width).unwrap()
        }
    }
}

/// The same numbers as `f32` on the CPU.
pub fn on_host(tensor: &Tensor) -> Tensor {
    tensor.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap()
}

/// Each row of a result is near the expected one, as near as rounding to the
/// result's dtype allows.
#[track_caller]
pub fn assert_close(got: &Tensor, expected: &Tensor, what: &str) {
    let bound = match got.dtype() {
        DType::F32 => 1e-5,
        DType::F16 => 1e-3,
        DType::BF16 => 8e-3,
        other => panic!("no bound for {other:?}"),
    };
    assert_eq!(got.dims(), expected.dims(), "{what}");
    let rows = |tensor: &Tensor| {
        let width = tensor.dims().last().copied().unwrap_or(1);
        on_host(tensor).reshape(((), width)).unwrap().to_vec2::<f32>().unwrap()
    };
    if got.elem_count() == 0 {
        return;
    }
    for (row, (got, expected)) in rows(got).iter().zip(&rows(expected)).enumerate() {
        let square = |numbers: &mut dyn Iterator<Item = f32>| -> f32 { numbers.map(|x| x * x).sum() };
        let error = square(&mut got.iter().zip(expected).map(|(a, b)| a - b)).sqrt();
        let norm = square(&mut expected.iter().copied()).sqrt();
        assert!(error <= bound * norm, "{what}: row {row} is off by {error}, its norm is {norm}");
    }
}

/// An error that names all of these.
#[track_caller]
pub fn refused<T>(result: Result<T>, names: &[&str]) {
    let Err(error) = result else { panic!("it was not refused; expected an error about {names:?}") };
    let error = error.to_string();
    assert!(names.iter().all(|name| error.contains(name)), "{error} does not name {names:?}");
}

/// Which keys queries see, and what becomes of their logits.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain {
    pub causal: bool,
    pub window_left: Option<u32>,
    pub soft_cap: Option<f32>,
    pub scale: Option<f64>,
}

impl Plain {
    /// Softmax attention of one sequence, by candle operations in `f32`: `q` is
    /// `(queries, heads, width)`, the last tokens of the sequence, and `k` and
    /// `v` are `(keys, kv_heads, width)`.
    pub fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        self.attention_and_lse(q, k, v)[0].clone()
    }

    /// Beside it, its LSE in base 2, `(queries, heads)`.
    pub fn attention_and_lse(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> [Tensor; 2] {
        self.try_attention(&on_host(q), &on_host(k), &on_host(v)).unwrap()
    }

    fn try_attention(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<[Tensor; 2]> {
        let ((queries, heads, width), (keys, kv_heads, _)) = (q.dims3()?, k.dims3()?);
        if queries == 0 || keys == 0 {
            return Ok([q.zeros_like()?, Tensor::full(f32::NEG_INFINITY, (queries, heads), &Device::Cpu)?]);
        }
        let group = heads / kv_heads;
        let per_head = |x: &Tensor| {
            let width = x.dim(2)?;
            let repeated = x.unsqueeze(2)?.broadcast_as((keys, kv_heads, group, width))?;
            repeated.reshape((keys, heads, width))?.transpose(0, 1)?.contiguous()
        };
        let (k, v) = (per_head(k)?, per_head(v)?);
        let q = q.transpose(0, 1)?.contiguous()?;
        let scale = self.scale.unwrap_or(1.0 / (width as f64).sqrt());
        let mut logits = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? * scale)?;
        if let Some(cap) = self.soft_cap {
            logits = ((logits / f64::from(cap))?.tanh()? * f64::from(cap))?;
        }
        let hidden = (0..queries).flat_map(|query| {
            let position = keys + query - queries;
            (0..keys).map(move |key| {
                let after = self.causal && key > position;
                let before = self.window_left.is_some_and(|left| key + (left as usize) < position);
                if after || before { f32::NEG_INFINITY } else { 0.0 }
            })
        });
        let mask = Tensor::from_iter(hidden, &Device::Cpu)?.reshape((1, queries, keys))?;
        let logits = logits.broadcast_add(&mask)?;
        let max = logits.max_keepdim(D::Minus1)?;
        let weights = logits.broadcast_sub(&max)?.exp()?;
        let sums = weights.sum_keepdim(D::Minus1)?;
        let lse = ((max + sums.log()?)? * std::f64::consts::LOG2_E)?;
        let out = weights.broadcast_div(&sums)?.matmul(&v)?.transpose(0, 1)?.contiguous()?;
        Ok([out, lse.squeeze(D::Minus1)?.t()?.contiguous()?])
    }
}

/// Attention and LSE with a sink for each head: a key whose logit is the sink, and which has no value.
pub fn with_sinks([out, lse]: [Tensor; 2], sinks: &[f32]) -> [Tensor; 2] {
    let heads = sinks.len();
    let [mut outs, mut lses] = [&out, &lse].map(|all| all.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    let width = out.dims()[2];
    for (row, lse) in lses.iter_mut().enumerate() {
        let with_sink = (lse.exp2() + sinks[row % heads].exp()).log2();
        let share = (*lse - with_sink).exp2();
        outs[row * width..][..width].iter_mut().for_each(|number| *number *= share);
        *lse = with_sink;
    }
    let of = |numbers, like: &Tensor| Tensor::from_vec(numbers, like.shape(), &Device::Cpu).unwrap();
    [of(outs, &out), of(lses, &lse)]
}

/// An LSE is as near the expected one as kernels' approximations of `exp` and `tanh` allow.
#[track_caller]
pub fn assert_lse(got: &Tensor, expected: &Tensor, what: &str) {
    let bound = if got.device().is_cpu() { 1e-4 } else { 1e-2 };
    assert_eq!((got.dims(), got.dtype()), (expected.dims(), DType::F32), "{what}");
    let [got, expected] =
        [got, expected].map(|all| on_host(all).flatten_all().unwrap().to_vec1::<f32>().unwrap());
    for (at, (got, expected)) in got.iter().zip(&expected).enumerate() {
        let near = got == expected || (got - expected).abs() <= bound;
        assert!(near, "{what}: the LSE at {at} is {got}; expected {expected}");
    }
}
