//! `rms_norm`, `silu_and_mul` and `rope` of candle's tensors against plain
//! candle operations: on the CPU always, on a GPU with
//! `FLASHINFER_RS_RUN_GPU_TESTS=1`.
use crate::candle_common::{Rng, assert_close, devices, dtypes, gpus, laid_out, on_host, random, refused};
use candle_core::{D, DType, Device, Tensor};
use flashinfer_rs::{
    candle::{PagedCache, RotaryEmbedding, StepTables, rms_norm, rope, silu_and_mul},
    kv::{Batch, HeadsShape, KvLayout, PageAllocator, Sequence},
    rope::{RopeFrequencies, RopeScaling},
};

/// RMS norm by candle operations in `f32`.
fn plain_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let (x, weight) = (on_host(x), on_host(weight));
    let mean = x.sqr().unwrap().mean_keepdim(D::Minus1).unwrap();
    let normed = x.broadcast_div(&(mean + eps).unwrap().sqrt().unwrap()).unwrap();
    normed.broadcast_mul(&weight).unwrap()
}

#[test]
fn norms_of_all_shapes() {
    let mut rng = Rng::new();
    for device in devices() {
        for &dtype in dtypes(&device) {
            for shape in
                [&[64][..], &[1, 8], &[3, 64], &[7, 1000], &[2, 5, 128], &[2, 3, 4, 72], &[1, 1, 1, 1, 6]]
            {
                let x = random(&mut rng, shape, dtype, &device);
                let weight = random(&mut rng, &shape[shape.len() - 1..], dtype, &device);
                let got = rms_norm(&x, &weight, 1e-5).unwrap();
                assert!(got.is_contiguous());
                assert_close(&got, &plain_norm(&x, &weight, 1e-5), &format!("{shape:?} on {device:?}"));
            }
            // An `eps` that counts.
            let (x, weight) =
                (random(&mut rng, &[3, 64], dtype, &device), random(&mut rng, &[64], dtype, &device));
            assert_close(
                &rms_norm(&x, &weight, 0.7).unwrap(),
                &plain_norm(&x, &weight, 0.7f32.into()),
                "eps",
            );
        }
    }
}

#[test]
fn norms_of_strided_tensors() {
    let mut rng = Rng::new();
    for device in devices() {
        for &dtype in dtypes(&device) {
            let weight = random(&mut rng, &[64], dtype, &device);
            let check = |x: &Tensor, what: &str| {
                let got = rms_norm(x, &weight, 1e-6).unwrap();
                assert_close(
                    &got,
                    &plain_norm(x, &weight, 1e-6),
                    &format!("{what} of {dtype:?} on {device:?}"),
                );
            };
            for _ in 0..8 {
                let heads = random(&mut rng, &[5, 3, 64], dtype, &device);
                check(&laid_out(&mut rng, &heads), "heads");
            }
            let wide = random(&mut rng, &[6, 200], dtype, &device);
            check(&wide.narrow(1, 8, 64).unwrap(), "a part of rows");
            check(&wide.narrow(1, 3, 64).unwrap(), "a part of rows at odd addresses");
            check(&wide.narrow(1, 0, 64).unwrap().narrow(0, 2, 3).unwrap(), "rows and a part of them");
            check(&random(&mut rng, &[64, 6], dtype, &device).t().unwrap(), "columns");
            check(
                &random(&mut rng, &[1, 64], dtype, &device).broadcast_as((4, 64)).unwrap(),
                "one row, repeated",
            );
            let four = random(&mut rng, &[2, 3, 5, 64], dtype, &device);
            check(&four.transpose(1, 2).unwrap(), "four dimensions");
            let all = random(&mut rng, &[3 * 64 + 1], dtype, &device);
            check(
                &all.narrow(0, 1, 3 * 64).unwrap().reshape((3, 64)).unwrap(),
                "contiguous at an odd address",
            );
        }
    }
}

#[test]
fn weights_may_be_strided_and_inputs_one_tensor() {
    let mut rng = Rng::new();
    for device in devices() {
        let dtype = dtypes(&device)[0];
        let x = random(&mut rng, &[4, 64], dtype, &device);
        for weight in [
            x.narrow(0, 2, 1).unwrap().squeeze(0).unwrap(),
            x.t().unwrap().narrow(1, 1, 1).unwrap().squeeze(1).unwrap(),
        ] {
            assert_close(
                &rms_norm(&x, &weight, 1e-6).unwrap(),
                &plain_norm(&x, &weight, 1e-6),
                "a row as weight",
            );
        }
    }
}

#[test]
fn wrong_norms_are_refused() {
    for device in devices() {
        let dtype = dtypes(&device)[0];
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &device).unwrap();
        let (x, weight) = (zeros(&[3, 64], dtype), zeros(&[64], dtype));
        refused(rms_norm(&x, &zeros(&[32], dtype), 1e-6), &["weight", "shape", "[64]"]);
        refused(rms_norm(&x, &zeros(&[1, 64], dtype), 1e-6), &["weight", "shape"]);
        refused(rms_norm(&x, &zeros(&[64], DType::BF16), 1e-6), &["weight", "dtype", "bf16"]);
        refused(rms_norm(&zeros(&[3, 64], DType::U32), &weight, 1e-6), &["x", "u32", "f16 and bf16"]);
        refused(rms_norm(&zeros(&[], dtype), &weight, 1e-6), &["x", "shape"]);
        if !device.is_cpu() {
            let weight = weight.to_device(&Device::Cpu).unwrap();
            refused(rms_norm(&x, &weight, 1e-6), &["weight", "Cpu", "expected Cuda"]);
            let x = x.to_dtype(DType::F32).unwrap();
            refused(rms_norm(&x, &weight, 1e-6), &["x", "f32", "on CUDA there are f16 and bf16"]);
        }
    }
}

fn plain_silu_and_mul(x: &Tensor) -> Tensor {
    let halves = on_host(x).chunk(2, D::Minus1).unwrap();
    (halves[0].silu().unwrap() * &halves[1]).unwrap()
}

#[test]
fn activations() {
    let mut rng = Rng::new();
    for device in devices() {
        for &dtype in dtypes(&device) {
            let check = |x: &Tensor| {
                let got = silu_and_mul(x).unwrap();
                assert_close(
                    &got,
                    &plain_silu_and_mul(x),
                    &format!("{:?} of {dtype:?} on {device:?}", x.layout()),
                );
            };
            for shape in [&[16][..], &[1, 32], &[5, 2048], &[2, 3, 48], &[2, 2, 2, 64], &[1, 2, 1, 2, 32]] {
                check(&random(&mut rng, shape, dtype, &device));
            }
            let wide = random(&mut rng, &[6, 200], dtype, &device);
            check(&wide.narrow(1, 8, 64).unwrap());
            check(&random(&mut rng, &[64, 6], dtype, &device).t().unwrap());
            let all = random(&mut rng, &[3 * 64 + 1], dtype, &device);
            check(&all.narrow(0, 1, 3 * 64).unwrap().reshape((3, 64)).unwrap());
        }
        let dtype = dtypes(&device)[0];
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &device).unwrap();
        refused(silu_and_mul(&zeros(&[3, 5], dtype)), &["x", "two halves"]);
        refused(silu_and_mul(&zeros(&[], dtype)), &["x", "two halves"]);
        refused(silu_and_mul(&zeros(&[3, 16], DType::I64)), &["x", "i64"]);
        if !device.is_cpu() {
            refused(silu_and_mul(&zeros(&[3, 16], DType::F32)), &["x", "f32", "f16 and bf16"]);
            refused(silu_and_mul(&zeros(&[3, 20], dtype)), &["multiples of 8"]);
        }
    }
}

/// Rotary embedding by candle operations in `f32`, from the frequencies.
fn plain_rope(x: &Tensor, positions: &[i32], frequencies: &RopeFrequencies, interleave: bool) -> Tensor {
    let x = on_host(x);
    let (tokens, heads, width) = x.dims3().unwrap();
    let (rotary_dim, pairs) = (frequencies.rotary_dim(), frequencies.inv_freq().len());
    let angles = |f: fn(f64) -> f64| {
        let rows = positions
            .iter()
            .flat_map(|&at| frequencies.inv_freq().iter().map(move |by| f(f64::from(at) * by)));
        let rows: Vec<f32> = rows.map(|number| number as f32).collect();
        Tensor::from_vec(rows, (tokens, 1, pairs), &Device::Cpu).unwrap()
    };
    let (cos, sin) = (angles(f64::cos), angles(f64::sin));
    let turned = x.narrow(2, 0, rotary_dim).unwrap();
    // In the last two dimensions, pairs and what belongs to each.
    let split = if interleave {
        turned.reshape((tokens, heads, pairs, 2)).unwrap()
    } else {
        turned.reshape((tokens, heads, 2, pairs)).unwrap().transpose(2, 3).unwrap()
    };
    let part = |at| split.narrow(3, at, 1).unwrap().squeeze(3).unwrap();
    let times = |a: &Tensor, b: &Tensor| a.broadcast_mul(b).unwrap();
    let (a, b) = (part(0), part(1));
    let first = (times(&a, &cos) - times(&b, &sin)).unwrap();
    let second = (times(&b, &cos) + times(&a, &sin)).unwrap();
    let joined = Tensor::stack(&[first, second], 3).unwrap();
    let joined = if interleave { joined } else { joined.transpose(2, 3).unwrap().contiguous().unwrap() };
    let turned = joined.reshape((tokens, heads, rotary_dim)).unwrap();
    if rotary_dim == width {
        return turned;
    }
    Tensor::cat(&[&turned, &x.narrow(2, rotary_dim, width - rotary_dim).unwrap()], 2).unwrap()
}

#[test]
fn embeddings() {
    let mut rng = Rng::new();
    const MAX_POS: usize = 300;
    for device in devices() {
        for (head_dim, rotary_dim) in [(64, 64), (128, 128), (128, 64)] {
            let frequencies = RopeFrequencies::new(rotary_dim, 1e4, &RopeScaling::None).unwrap();
            let halves = RotaryEmbedding::new(&device, &frequencies, MAX_POS).unwrap();
            assert_eq!((halves.max_pos(), halves.rotary_dim()), (MAX_POS, rotary_dim));
            for (rotary, interleave) in [(halves.clone(), false), (halves.interleaved(), true)] {
                for &dtype in dtypes(&device) {
                    let tokens = 1 + rng.below(6);
                    let at: Vec<i32> = (0..tokens).map(|_| rng.below(MAX_POS) as i32).chain([299]).collect();
                    let positions = rotary.positions(at.clone()).unwrap();
                    let mut heads = |heads| {
                        let heads = random(&mut rng, &[tokens + 1, heads, head_dim], dtype, &device);
                        laid_out(&mut rng, &heads)
                    };
                    let (q, k) = (heads(4), heads(2));
                    let (q_rope, k_rope) = rope(&q, &k, &rotary, &positions).unwrap();
                    let what = format!("{rotary_dim} of {head_dim}, {interleave}, {dtype:?} on {device:?}");
                    assert_close(&q_rope, &plain_rope(&q, &at, &frequencies, interleave), &what);
                    assert_close(&k_rope, &plain_rope(&k, &at, &frequencies, interleave), &what);
                    // Parts of one tensor, and one tensor for both.
                    let (same, again) = rope(&q, &q, &rotary, &positions).unwrap();
                    for got in [same, again] {
                        assert_close(&got, &plain_rope(&q, &at, &frequencies, interleave), &what);
                    }
                }
            }
        }
    }
}

#[test]
fn embeddings_by_the_positions_of_a_step() {
    let mut rng = Rng::new();
    for device in devices() {
        let dtype = dtypes(&device)[0];
        let pool = PageAllocator::new(16, 4).unwrap();
        let ours = dtype.try_into().unwrap();
        let shape =
            HeadsShape { num_layers: 1, num_kv_heads: 2, head_dim: 64, dtype: ours, layout: KvLayout::Nhd };
        let mut cache = PagedCache::new(&device, &pool, shape).unwrap();
        let (mut tables, mut batch) = (StepTables::new(&device), Batch::new(&pool));
        (0..2).for_each(|_| batch.push(Sequence::new(&pool)).unwrap());
        batch.append([5, 9]).unwrap();
        batch.append([2, 1]).unwrap();
        let step = tables.update(&batch, &mut cache).unwrap();
        let frequencies = RopeFrequencies::new(64, 1e4, &RopeScaling::None).unwrap();
        let rotary = RotaryEmbedding::new(&device, &frequencies, 10).unwrap();
        let (q, k) =
            (random(&mut rng, &[3, 4, 64], dtype, &device), random(&mut rng, &[3, 2, 64], dtype, &device));
        let (q_rope, k_rope) = rope(&q, &k, &rotary, &step).unwrap();
        assert_close(&q_rope, &plain_rope(&q, &[5, 6, 9], &frequencies, false), "q");
        assert_close(&k_rope, &plain_rope(&k, &[5, 6, 9], &frequencies, false), "k");
        // What comes out is what an append takes.
        cache.append(&step, 0, &k_rope, &k_rope).unwrap();
        let short = RotaryEmbedding::new(&device, &frequencies, 9).unwrap();
        refused(rope(&q, &k, &short, &step), &["positions", "below 10", "9 rows"]);
    }
}

#[test]
fn wrong_embeddings_are_refused() {
    for device in devices() {
        let dtype = dtypes(&device)[0];
        let frequencies = RopeFrequencies::new(64, 1e4, &RopeScaling::None).unwrap();
        let rotary = RotaryEmbedding::new(&device, &frequencies, 100).unwrap();
        refused(rotary.positions(vec![3, 100]), &["entry 1 is 100", "0..100"]);
        refused(rotary.positions(vec![-1]), &["entry 0 is -1"]);
        refused(RotaryEmbedding::new(&device, &frequencies, 1 << 40), &["max_pos", "2^31"]);
        let positions = rotary.positions(vec![3, 99]).unwrap();
        let short = RotaryEmbedding::new(&device, &frequencies, 50).unwrap();
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &device).unwrap();
        let (q, k) = (zeros(&[2, 4, 64], dtype), zeros(&[2, 2, 64], dtype));
        refused(rope(&q, &k, &short, &positions), &["positions", "100", "50 rows"]);
        refused(rope(&zeros(&[3, 4, 64], dtype), &k, &rotary, &positions), &["q", "shape"]);
        refused(rope(&q, &zeros(&[1, 2, 64], dtype), &rotary, &positions), &["k", "shape"]);
        refused(rope(&q, &zeros(&[2, 2, 128], dtype), &rotary, &positions), &["k", "shape"]);
        refused(rope(&q, &zeros(&[2, 128], dtype), &rotary, &positions), &["(tokens, heads, head_dim)"]);
        refused(rope(&q, &zeros(&[2, 2, 64], DType::BF16), &rotary, &positions), &["k", "dtype"]);
        refused(rope(&zeros(&[2, 4, 64], DType::U8), &k, &rotary, &positions), &["q", "u8"]);
        // Fewer elements than are turned.
        assert!(rope(&zeros(&[2, 4, 32], dtype), &zeros(&[2, 2, 32], dtype), &rotary, &positions).is_err());
        let none = rotary.positions(Vec::new()).unwrap();
        let (q, _) = rope(&q.narrow(0, 0, 0).unwrap(), &k.narrow(0, 0, 0).unwrap(), &rotary, &none).unwrap();
        assert_eq!(q.dims(), [0, 4, 64]);
    }
    for device in gpus() {
        let frequencies = RopeFrequencies::new(64, 1e4, &RopeScaling::None).unwrap();
        let rotary = RotaryEmbedding::new(&device, &frequencies, 100).unwrap();
        let positions = rotary.positions(vec![3]).unwrap();
        let wide = Tensor::zeros((1, 2, 64), DType::F32, &device).unwrap();
        refused(rope(&wide, &wide, &rotary, &positions), &["q", "f32", "on CUDA there are f16 and bf16"]);
        let here = wide.to_dtype(DType::F16).unwrap();
        let there = here.to_device(&Device::Cpu).unwrap();
        refused(rope(&here, &there, &rotary, &positions), &["k", "Cpu"]);
    }
}

#[test]
fn no_rows() {
    for device in devices() {
        let dtype = dtypes(&device)[0];
        let none = random(&mut Rng::new(), &[0, 3, 64], dtype, &device);
        let weight = Tensor::zeros(64, dtype, &device).unwrap();
        assert_eq!(rms_norm(&none, &weight, 1e-6).unwrap().dims(), [0, 3, 64]);
        assert_eq!(silu_and_mul(&none).unwrap().dims(), [0, 3, 32]);
    }
}
