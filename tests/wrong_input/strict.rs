//! The strict mode of the CPU path: for wrong input, an operation and its twin on the CPU are refused
//! in the same words. Nothing is computed, so no GPU is needed, and nobody looks at the addresses.

use std::ffi::c_void;

use flashinfer_rs::{
    DType, Device, FlashInferError, PageIndices, Result, Stream, TensorMut, TensorRef,
    activation::{self, ActivationOptions},
    cascade::{self, State, StateMut},
    indices::{RaggedIndices, SlotMapping},
    kv::{KvLayout, PagedKvMut},
    norm::{self, NormOptions},
    quantization::{self, BitOrder},
    reference,
    rope::{
        self, Positions, RopeOptions, RopeParts, RopePartsMut, RopeQuantizeOptions, RopeTensors, Rotation,
    },
    sampling::{self, Parameter, SampleOptions},
};

/// An address that is a multiple of 16 bytes, and where outputs are.
const ALIGNED: usize = 1 << 20;
const OUTPUT: usize = 1 << 40;

/// Where a call's tensors are.
#[derive(Clone, Copy, PartialEq)]
struct On(Device);

const GPU: On = On(Device::Cuda(0));
const CPU: On = On(Device::Cpu);

impl On {
    fn at(
        self,
        address: usize,
        dtype: DType,
        shape: &[usize],
        strides: Option<&[usize]>,
    ) -> TensorRef<'static> {
        // SAFETY: every call is refused, so the address is compared and never followed.
        unsafe { TensorRef::from_raw_parts(address as *const c_void, self.0, dtype, shape, strides) }.unwrap()
    }

    fn tensor(self, dtype: DType, shape: &[usize]) -> TensorRef<'static> {
        self.at(ALIGNED, dtype, shape, None)
    }

    fn out(self, dtype: DType, shape: &[usize]) -> TensorMut<'static> {
        // SAFETY: as above.
        unsafe { TensorMut::from_raw_parts(OUTPUT as *mut c_void, self.0, dtype, shape, None) }.unwrap()
    }
}

fn stream() -> Stream {
    // SAFETY: the legacy default stream of device 0; nothing is enqueued on it, because every call
    // is refused.
    unsafe { Stream::from_raw(std::ptr::null_mut(), 0) }
}

/// The call is refused for this argument on the GPU, and by the strict CPU path, in the same words.
#[track_caller]
fn refused_alike(argument: &str, call: impl Fn(On) -> Result<()>) {
    let on_gpu = call(GPU).unwrap_err();
    let strict = reference::strict();
    let on_cpu = call(CPU).unwrap_err();
    drop(strict);
    assert_eq!(on_cpu.to_string(), on_gpu.to_string());
    match on_cpu {
        FlashInferError::InvalidArgument { argument: found, .. } => assert_eq!(found, argument, "{on_gpu}"),
        other => panic!("{other}"),
    }
}

/// A shape, its strides, how far it is from a multiple of 16 bytes, and a dtype.
type Wrong = (DType, &'static [usize], Option<&'static [usize]>, usize);

fn wrong(on: On, (dtype, shape, strides, offset): Wrong) -> TensorRef<'static> {
    on.at(ALIGNED + offset, dtype, shape, strides)
}

const NORM_INPUTS: [Wrong; 7] = [
    (DType::F32, &[8, 64], None, 0),
    (DType::E4M3, &[8, 64], None, 0),
    (DType::F16, &[64], None, 0),
    (DType::F16, &[8, 0], None, 0),
    (DType::F16, &[8, 64], Some(&[128, 2]), 0),
    (DType::F16, &[8, 64], Some(&[65, 1]), 0),
    (DType::F16, &[8, 64], None, 2),
];

#[test]
fn norms() {
    let options = NormOptions::default();
    let run = |on: On, input: TensorRef<'_>, weight: TensorRef<'_>| {
        let mut out = on.out(DType::F16, &[8, 64]);
        match on {
            GPU => norm::rmsnorm(&stream(), &mut out, &input, &weight, &options),
            _ => reference::rmsnorm(&mut out, &input, &weight, &options),
        }
    };
    for input in NORM_INPUTS {
        refused_alike("input", |on| run(on, wrong(on, input), on.tensor(DType::F16, &[64])));
    }
    for weight in
        [(DType::F32, &[64][..], None, 0), (DType::F16, &[65], None, 0), (DType::F16, &[64], None, 8)]
    {
        refused_alike("weight", |on| run(on, on.tensor(DType::F16, &[8, 64]), wrong(on, weight)));
    }
    refused_alike("out", |on| run(on, on.tensor(DType::BF16, &[8, 64]), on.tensor(DType::BF16, &[64])));
    let fused = |on: On, dtype| {
        let (mut input, mut residual) = (on.out(DType::F16, &[8, 64]), on.out(dtype, &[8, 64]));
        let weight = on.tensor(DType::F16, &[64]);
        match on {
            GPU => norm::gemma_fused_add_rmsnorm(&stream(), &mut input, &mut residual, &weight, &options),
            _ => reference::gemma_fused_add_rmsnorm(&mut input, &mut residual, &weight, &options),
        }
    };
    refused_alike("residual", |on| fused(on, DType::F32));
    let layer = |on: On, input: DType, gamma: DType| {
        let (mut out, input) = (on.out(DType::BF16, &[8, 64]), on.tensor(input, &[8, 64]));
        let (gamma, beta) = (on.tensor(gamma, &[64]), on.tensor(DType::F32, &[64]));
        match on {
            GPU => norm::layernorm(&stream(), &mut out, &input, &gamma, &beta, &options),
            _ => reference::layernorm(&mut out, &input, &gamma, &beta, &options),
        }
    };
    refused_alike("input", |on| layer(on, DType::F32, DType::F32));
    refused_alike("gamma", |on| layer(on, DType::BF16, DType::F64));
}

#[test]
fn quantizing_norms() {
    let options = NormOptions::default();
    let run = |on: On, out: DType, input: DType, scale: DType| {
        let (mut out, input) = (on.out(out, &[8, 64]), on.tensor(input, &[8, 64]));
        let (weight, scale) = (on.tensor(DType::F16, &[64]), on.tensor(scale, &[1]));
        let mut residual = on.out(DType::F16, &[8, 64]);
        match on {
            GPU => {
                norm::rmsnorm_quant(&stream(), &mut out, &input, &weight, &scale, &options).and_then(|()| {
                    norm::fused_add_rmsnorm_quant(
                        &stream(),
                        &mut out,
                        &input,
                        &mut residual,
                        &weight,
                        &scale,
                        &options,
                    )
                })
            }
            _ => reference::rmsnorm_quant(&mut out, &input, &weight, &scale, &options).and_then(|()| {
                reference::fused_add_rmsnorm_quant(&mut out, &input, &mut residual, &weight, &scale, &options)
            }),
        }
    };
    refused_alike("out", |on| run(on, DType::F32, DType::F16, DType::F32));
    refused_alike("input", |on| run(on, DType::E4M3, DType::F32, DType::F32));
    refused_alike("scale", |on| run(on, DType::E4M3, DType::F16, DType::F64));
}

#[test]
fn activations() {
    let options = ActivationOptions::default();
    let run = |on: On, out: &[usize], input: TensorRef<'_>| {
        let mut out = on.out(DType::F16, out);
        match on {
            GPU => activation::silu_and_mul(&stream(), &mut out, &input, &options),
            _ => reference::silu_and_mul(&mut out, &input, &options),
        }
    };
    for input in [
        (DType::F32, &[4, 16][..], None, 0),
        (DType::F16, &[4, 16], Some(&[32, 1][..]), 0),
        (DType::F16, &[4, 16], None, 8),
    ] {
        refused_alike("input", |on| run(on, &[4, 8], wrong(on, input)));
    }
    refused_alike("out", |on| run(on, &[4, 12], on.tensor(DType::F16, &[4, 24])));
    refused_alike("out", |on| run(on, &[4, 9], on.tensor(DType::F16, &[4, 16])));
    refused_alike("out", |on| run(on, &[4, 8], on.tensor(DType::BF16, &[4, 16])));
}

#[test]
fn samplers() {
    let logits = [
        (DType::F16, &[4, 64][..], None, 0),
        (DType::F64, &[4, 64], None, 0),
        (DType::F32, &[256], None, 0),
        (DType::F32, &[4, 64], Some(&[128, 1][..]), 0),
        (DType::F32, &[4, 64], None, 4),
    ];
    let step = |on: On, logits: TensorRef<'static>, change: &dyn Fn(On, &mut SampleOptions<'static>)| {
        let mut options = SampleOptions::new(on.tensor(DType::F32, &[4]));
        change(on, &mut options);
        if on == CPU {
            return reference::sample(&logits, &options).map(drop);
        }
        let (shape, strides) = (logits.shape().to_vec(), logits.strides().to_vec());
        let [shape, strides] =
            [shape, strides].map(|sizes| sizes.iter().map(|&x| x as usize).collect::<Vec<_>>());
        let data = logits.data_ptr();
        // SAFETY: as in `On::at`.
        let mut logits =
            unsafe { TensorMut::from_raw_parts(data, on.0, logits.dtype(), &shape, Some(&strides)) }.unwrap();
        sampling::sample(&stream(), &mut on.out(DType::I32, &[4]), &mut logits, &options)
    };
    let good = |on: On| on.tensor(DType::F32, &[4, 64]);
    for logits in logits {
        refused_alike("logits", |on| step(on, wrong(on, logits), &|_, _| ()));
    }
    for (dtype, rows) in [(DType::F64, 4), (DType::F32, 3)] {
        let of = |on: On| on.tensor(dtype, &[rows]);
        refused_alike("uniforms", |on| step(on, good(on), &|on, options| options.uniforms = of(on)));
        refused_alike("temperature", |on| {
            step(on, good(on), &|on, options| options.temperature = Parameter::PerRow(of(on)))
        });
        refused_alike("top_k", |on| {
            step(on, good(on), &|on, options| options.top_k = Parameter::PerRow(of(on)))
        });
    }
    refused_alike("top_p", |on| step(on, good(on), &|_, options| options.top_p = 1.5.into()));
    refused_alike("min_p", |on| step(on, good(on), &|_, options| options.min_p = (-0.5).into()));

    let argmax = |on: On, logits: TensorRef<'_>| match on {
        GPU => sampling::argmax(&stream(), &mut on.out(DType::I32, &[4]), &logits),
        _ => reference::argmax(&logits).map(drop),
    };
    refused_alike("logits", |on| argmax(on, on.tensor(DType::F64, &[4, 64])));
    refused_alike("logits", |on| argmax(on, on.at(ALIGNED + 2, DType::F16, &[4, 64], None)));
    let top_p = |on: On, probs: DType, out: &[usize], top_p: f64| {
        let (mut out, probs) = (on.out(DType::F32, out), on.tensor(probs, &[4, 64]));
        match on {
            GPU => sampling::top_p_renorm_probs(&stream(), &mut out, &probs, top_p.into()),
            _ => reference::filtered_probs(&mut out, &probs, &reference::Filter::TopP(top_p.into())),
        }
    };
    refused_alike("probs", |on| top_p(on, DType::BF16, &[4, 64], 0.5));
    refused_alike("out", |on| top_p(on, DType::F32, &[4, 63], 0.5));
    refused_alike("top_p", |on| top_p(on, DType::F32, &[4, 64], 0.0));
}

#[test]
fn rotary_embeddings() {
    let run = |on: On, q: TensorRef<'static>, k: TensorRef<'static>, options: &RopeOptions| {
        let out = |like: &TensorRef<'_>| {
            let shape: Vec<usize> = like.shape().iter().map(|&size| size as usize).collect();
            on.out(DType::F16, &shape)
        };
        let mut tensors = RopeTensors::OutOfPlace { q_rope: out(&q), k_rope: out(&k), q, k };
        match on {
            GPU => {
                let pos_ids = Positions::from(on.tensor(DType::I32, &[8]));
                rope::apply_rope_pos_ids(&stream(), &mut tensors, pos_ids, options)
            }
            _ => reference::apply_rope_pos_ids(&mut tensors, &[0; 8], options),
        }
    };
    let plain = RopeOptions::default();
    let k = |on: On| on.tensor(DType::F16, &[8, 2, 128]);
    for q in [
        (DType::F32, &[8, 4, 128][..], None, 0),
        (DType::F16, &[8, 512], None, 0),
        (DType::F16, &[8, 4, 128], Some(&[1024, 132, 1][..]), 0),
        (DType::F16, &[8, 4, 128], None, 8),
    ] {
        refused_alike("q", |on| run(on, wrong(on, q), k(on), &plain));
    }
    // Head dimensions without a kernel.
    for d in [32, 96] {
        refused_alike("q", |on| {
            run(on, on.tensor(DType::F16, &[8, 4, d]), on.tensor(DType::F16, &[8, 2, d]), &plain)
        });
    }
    let q = |on: On| on.tensor(DType::F16, &[8, 4, 128]);
    refused_alike("k", |on| run(on, q(on), on.tensor(DType::BF16, &[8, 2, 128]), &plain));
    let mut odd = plain;
    odd.rotary_dim = Some(40);
    refused_alike("rotary_dim", |on| run(on, q(on), k(on), &odd));
    odd.rotary_dim = None;
    odd.rope_theta = f64::NAN;
    refused_alike("rope_theta", |on| run(on, q(on), k(on), &odd));
}

#[test]
fn rotary_embeddings_from_a_table() {
    let run = |on: On, table: TensorRef<'static>, positions: usize, interleave: bool| {
        let (q, k) = (on.out(DType::F16, &[8, 4, 128]), on.out(DType::F16, &[8, 2, 128]));
        let mut tensors = RopeTensors::InPlace { q, k };
        if on == CPU {
            let pos_ids = [positions as i32 - 1; 8];
            let rotation = Rotation { cos_sin_cache: table, pos_ids: &pos_ids[..], interleave };
            return reference::apply_rope_pos_ids_cos_sin_cache(&mut tensors, &rotation);
        }
        // SAFETY: never used: every call is refused.
        let pos_ids = unsafe { Positions::from_device_unchecked(on.tensor(DType::I32, &[8]), positions) };
        let rotation = Rotation { cos_sin_cache: table, pos_ids, interleave };
        rope::apply_rope_pos_ids_cos_sin_cache(&stream(), &mut tensors, &rotation)
    };
    for table in [
        (DType::F16, &[100, 64][..], None, 0),
        (DType::F64, &[100, 64], None, 0),
        (DType::F32, &[100, 40], None, 0),
        (DType::F32, &[100, 256], None, 0),
        (DType::F32, &[100, 64], Some(&[80, 1][..]), 0),
        (DType::F32, &[100, 64], None, 4),
    ] {
        refused_alike("cos_sin_cache", |on| run(on, wrong(on, table), 100, false));
    }
    let table = |on: On| on.tensor(DType::F32, &[100, 64]);
    refused_alike("pos_ids", |on| run(on, table(on), 101, false));
    refused_alike("pos_ids", |on| run(on, table(on), 100, true));
}

#[test]
fn quantizing_rotary_embeddings() {
    let run = |on: On, out: DType, input: DType, table: &[usize], scale: f64| {
        let part = |heads| RopeParts::of_heads(on.tensor(input, &[8, heads, 128]), 64).unwrap();
        let mut outs = [4, 2].map(|heads| RopePartsMut::of_heads(on.out(out, &[8, heads, 128]), 64).unwrap());
        let (input, options) = ([part(4), part(2)], RopeQuantizeOptions::with_scales(1.0, scale));
        let cos_sin_cache = on.tensor(DType::F32, table);
        if on == CPU {
            let rotation = Rotation { cos_sin_cache, pos_ids: &[9; 8][..], interleave: false };
            return reference::rope_quantize(&mut outs, &input, &rotation, &options);
        }
        // SAFETY: never used: every call is refused.
        let pos_ids = unsafe { Positions::from_device_unchecked(on.tensor(DType::I32, &[8]), 10) };
        rope::rope_quantize(&stream(), &mut outs, &input, &Rotation::new(cos_sin_cache, pos_ids), &options)
    };
    refused_alike("q_out.rope", |on| run(on, DType::F32, DType::F16, &[100, 64], 1.0));
    refused_alike("q.rope", |on| run(on, DType::E4M3, DType::F32, &[100, 64], 1.0));
    refused_alike("cos_sin_cache", |on| run(on, DType::E4M3, DType::F16, &[100, 32], 1.0));
    refused_alike("quant_scale_kv", |on| run(on, DType::E4M3, DType::F16, &[100, 64], f64::NAN));
}

#[test]
fn merges() {
    let run = |on: On, [a, b, merged]: [DType; 3], heads: usize, sums: DType| {
        let shape = [3, heads, 64];
        let state = |v: DType, s: DType| State::new(on.tensor(v, &shape), on.tensor(s, &shape[..2]));
        let mut merged = StateMut::new(on.out(merged, &shape), on.out(DType::F32, &shape[..2]));
        let (a, b) = (state(a, DType::F32), state(b, sums));
        match on {
            GPU => cascade::merge_state(&stream(), &mut merged, &a, &b),
            _ => reference::merge_state(&mut merged, &a, &b),
        }
    };
    let half = [DType::F16; 3];
    refused_alike("a.v", |on| run(on, [DType::F32, DType::F16, DType::F16], 4, DType::F32));
    refused_alike("b.v", |on| run(on, [DType::F16, DType::BF16, DType::F16], 4, DType::F32));
    refused_alike("b.s", |on| run(on, half, 4, DType::F64));
    refused_alike("merged.v", |on| run(on, [DType::F16, DType::F16, DType::F64], 4, DType::F32));
    let in_place = |on: On, head_dim: usize, mask: DType| {
        let shape = [3, 4, head_dim];
        let mut state = StateMut::new(on.out(DType::F16, &shape), on.out(DType::F32, &[3, 4]));
        let other = State::new(on.tensor(DType::F16, &shape), on.tensor(DType::F32, &[3, 4]));
        let mask = on.tensor(mask, &[3]);
        match on {
            GPU => cascade::merge_state_in_place(&stream(), &mut state, &other, Some(&mask)),
            _ => reference::merge_state_in_place(&mut state, &other, Some(&mask)),
        }
    };
    refused_alike("state.v", |on| in_place(on, 100, DType::U8));
    refused_alike("mask", |on| in_place(on, 64, DType::I32));
    let all = |on: On, count: usize, dtype: DType| {
        let mut merged = StateMut::new(on.out(DType::F16, &[3, 4, 64]), on.out(DType::F32, &[3, 4]));
        let states = State::new(on.tensor(dtype, &[3, count, 4, 64]), on.tensor(DType::F32, &[3, count, 4]));
        match on {
            GPU => cascade::merge_states(&stream(), &mut merged, &states),
            _ => reference::merge_states(&mut merged, &states),
        }
    };
    refused_alike("states.v", |on| all(on, 0, DType::F16));
    refused_alike("states.v", |on| all(on, 2, DType::F32));
}

#[test]
fn packing_of_bits() {
    let run = |on: On, y: &[usize], x: TensorRef<'_>| {
        let mut y = on.out(DType::U8, y);
        match on {
            GPU => quantization::packbits(&stream(), &mut y, &x, BitOrder::Big),
            _ => reference::packbits(&mut y, &x, BitOrder::Big),
        }
    };
    refused_alike("x", |on| run(on, &[2], on.tensor(DType::I32, &[9])));
    refused_alike("x", |on| run(on, &[2], on.at(ALIGNED, DType::U8, &[9], Some(&[2]))));
    refused_alike("y", |on| run(on, &[3], on.tensor(DType::Bool, &[9])));
}

/// Appending and attention need tables on a device, and others a workspace, so their words are
/// compared in `src/ops/page.rs`, `src/ops/attention/batch_run.rs` and `src/reference/strict`.
#[test]
fn pages() {
    let table = PageIndices::from_requests(8, 16, [(&[7, 0][..], 20)]).unwrap();
    let append = flashinfer_rs::indices::AppendIndices::new(&table, vec![0], vec![19]).unwrap();
    let run = |dtype, head_dim| {
        let cache = |address: usize| {
            // SAFETY: every call is refused.
            unsafe {
                TensorMut::from_raw_parts(
                    address as *mut c_void,
                    Device::Cpu,
                    dtype,
                    &[8, 16, 2, head_dim],
                    None,
                )
            }
            .unwrap()
        };
        let mut cache = PagedKvMut { k: cache(OUTPUT), v: cache(OUTPUT * 2), layout: KvLayout::Nhd };
        let new = CPU.tensor(dtype, &[1, 2, head_dim]);
        reference::append_paged_kv_cache(&new, &new, &SlotMapping::new(&append, &table), &mut cache)
            .unwrap_err()
            .to_string()
    };
    let _strict = reference::strict();
    assert_eq!(
        run(DType::F32, 64),
        "append_paged_kv_cache: kv.k: its dtype is f32; expected f16 or bf16 or e4m3 or e5m2"
    );
    assert!(run(DType::F16, 80).contains("head_dim 80; the kernel has [64, 128, 256, 512]"));
}

/// A thread is strict as long as its guards live, and no other is.
#[test]
fn guards() {
    let norm = || {
        let (input, weight, mut out) = ([3.0f32, 4.0], [1.0f32, 2.0], [0.0f32; 2]);
        reference::rmsnorm(
            &mut TensorMut::from_slice(&mut out, &[1, 2]).unwrap(),
            &TensorRef::from_slice(&input, &[1, 2]).unwrap(),
            &TensorRef::from_slice(&weight, &[2]).unwrap(),
            &NormOptions::default(),
        )
    };
    norm().unwrap();
    let outer = reference::strict();
    let inner = reference::strict();
    norm().unwrap_err();
    drop(inner);
    norm().unwrap_err();
    std::thread::spawn(move || norm().unwrap()).join().unwrap();
    drop(outer);
    norm().unwrap();
}

/// What the kernels take, the strict path computes.
#[test]
fn good_input_passes() {
    use half::f16;
    let _strict = reference::strict();
    let (mut heads, mut keys) = (vec![f16::ONE; 8 * 4 * 128], vec![f16::ONE; 8 * 2 * 128]);
    let mut tensors = RopeTensors::InPlace {
        q: TensorMut::from_slice(&mut heads, &[8, 4, 128]).unwrap(),
        k: TensorMut::from_slice(&mut keys, &[8, 2, 128]).unwrap(),
    };
    let indptr = RaggedIndices::from_lens([5, 3]).unwrap();
    reference::apply_rope(&mut tensors, &indptr, &[0, 7], &RopeOptions::default()).unwrap();
    let (input, mut out) = (vec![f16::ONE; 4 * 16], vec![f16::ZERO; 4 * 8]);
    reference::silu_and_mul(
        &mut TensorMut::from_slice(&mut out, &[4, 8]).unwrap(),
        &TensorRef::from_slice(&input, &[4, 16]).unwrap(),
        &ActivationOptions::default(),
    )
    .unwrap();
    let (logits, uniforms) = (vec![0.5f32; 4 * 64], vec![0.5f32; 4]);
    let options = SampleOptions::new(TensorRef::from_slice(&uniforms, &[4]).unwrap());
    let tokens = reference::sample(&TensorRef::from_slice(&logits, &[4, 64]).unwrap(), &options).unwrap();
    assert_eq!(tokens, [Some(32); 4]);
}
