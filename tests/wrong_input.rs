//! Wrong input is refused before anything is loaded or launched, so these
//! checks need no GPU: the tensors here are addresses that nobody looks at.

use std::ffi::c_void;

use flashinfer_rs::{
    DType, Device, FlashInferError, Result, Stream, TensorMut, TensorRef,
    activation::{self, ActivationOptions},
    cascade::{self, State, StateMut},
    kv::{KvLayout, PagedKv, PagedKvMut},
    norm::{self, NormOptions},
    quantization::{self, BitOrder},
    rope::{
        self, Llama31RopeOptions, Positions, RopeOptions, RopeParts, RopePartsMut, RopeQuantizeOptions,
        RopeTensors, Rotation,
    },
    sampling::{
        self, ChainInput, ChainSamples, Indices, Parameter, Philox, Random, SampleOptions, Samples,
        SamplingOptions,
    },
};

const GPU: Device = Device::Cuda(0);
/// An address that is a multiple of 16 bytes.
const ALIGNED: usize = 1 << 20;

fn stream() -> Stream {
    // SAFETY: the legacy default stream of device 0; nothing is enqueued on it,
    // because every call here is refused or has nothing to do.
    unsafe { Stream::from_raw(std::ptr::null_mut(), 0) }
}

/// A tensor on a device that is never touched.
fn tensor(
    address: usize,
    device: Device,
    dtype: DType,
    shape: &[usize],
    strides: Option<&[usize]>,
) -> TensorRef<'static> {
    // SAFETY: the address is only compared, never followed: see `stream`.
    unsafe { TensorRef::from_raw_parts(address as *const c_void, device, dtype, shape, strides) }.unwrap()
}

/// The same to write, far from all others.
fn tensor_mut(device: Device, dtype: DType, shape: &[usize]) -> TensorMut<'static> {
    // SAFETY: as in `tensor`.
    unsafe { TensorMut::from_raw_parts((1usize << 40) as *mut c_void, device, dtype, shape, None) }.unwrap()
}

fn half(shape: &[usize]) -> TensorRef<'static> {
    tensor(ALIGNED, GPU, DType::F16, shape, None)
}

#[track_caller]
fn refused(result: Result<()>, op: &str, expected: &str) {
    match result {
        Err(FlashInferError::InvalidArgument { op: found, argument, problem }) => {
            assert_eq!((found, argument), (op, expected), "{problem}");
        }
        other => panic!("expected `{expected}` to be refused, got {other:?}"),
    }
}

type Norm = fn(&Stream, &mut TensorMut<'_>, &TensorRef<'_>, &TensorRef<'_>, &NormOptions) -> Result<()>;
const NORMS: [(&str, Norm); 2] = [("rmsnorm", norm::rmsnorm), ("gemma_rmsnorm", norm::gemma_rmsnorm)];

#[test]
fn norms() {
    let (stream, options) = (stream(), NormOptions::default());
    for (name, op) in NORMS {
        let run = |input: TensorRef<'_>, weight: TensorRef<'_>| {
            op(&stream, &mut tensor_mut(GPU, DType::F16, &[8, 64]), &input, &weight, &options)
        };
        let (good, weight) = (half(&[8, 64]), half(&[64]));
        for dtype in [DType::F32, DType::F64, DType::E4M3, DType::I32, DType::U8] {
            refused(run(tensor(ALIGNED, GPU, dtype, &[8, 64], None), weight), name, "input");
        }
        refused(run(tensor(ALIGNED, GPU, DType::BF16, &[8, 64], None), weight), name, "out");
        refused(run(good, tensor(ALIGNED, GPU, DType::BF16, &[64], None)), name, "weight");
        refused(run(tensor(ALIGNED, Device::Cpu, DType::F16, &[8, 64], None), weight), name, "input");
        refused(run(tensor(ALIGNED, Device::Cuda(1), DType::F16, &[8, 64], None), weight), name, "input");
        refused(run(good, tensor(ALIGNED, Device::Cuda(1), DType::F16, &[64], None)), name, "weight");
        refused(run(half(&[64]), weight), name, "input");
        refused(run(half(&[2, 2, 2, 64]), weight), name, "input");
        refused(run(half(&[8, 0]), half(&[0])), name, "input");
        refused(run(half(&[9, 64]), weight), name, "out");
        refused(run(half(&[8, 128]), weight), name, "out");
        refused(run(good, half(&[65])), name, "weight");
        refused(run(good, half(&[1, 64])), name, "weight");
        let strided = |strides: &[usize]| tensor(ALIGNED, GPU, DType::F16, &[8, 64], Some(strides));
        refused(run(strided(&[128, 2]), weight), name, "input");
        refused(run(strided(&[1, 8]), weight), name, "input");
        refused(run(strided(&[65, 1]), weight), name, "input");
        refused(run(strided(&[1 << 33, 1]), weight), name, "input");
        refused(run(good, tensor(ALIGNED, GPU, DType::F16, &[64], Some(&[2]))), name, "weight");
        for odd in [2, 4, 8] {
            refused(run(tensor(ALIGNED + odd, GPU, DType::F16, &[8, 64], None), weight), name, "input");
            refused(run(good, tensor(ALIGNED + odd, GPU, DType::F16, &[64], None)), name, "weight");
        }
        // The kernels count rows in 32 bits.
        refused(run(half(&[1 << 33, 64]), weight), name, "input");
    }
    let mut heads = tensor_mut(GPU, DType::F16, &[4, 2, 64]);
    let call = norm::gemma_rmsnorm(&stream, &mut heads, &half(&[4, 2, 64]), &half(&[64]), &options);
    refused(call, "gemma_rmsnorm", "input");
}

#[test]
fn fused_norms() {
    type FusedAdd =
        fn(&Stream, &mut TensorMut<'_>, &mut TensorMut<'_>, &TensorRef<'_>, &NormOptions) -> Result<()>;
    let ops: [(&str, FusedAdd); 2] = [
        ("fused_add_rmsnorm", norm::fused_add_rmsnorm),
        ("gemma_fused_add_rmsnorm", norm::gemma_fused_add_rmsnorm),
    ];
    let (stream, options) = (stream(), NormOptions::default());
    for (name, op) in ops {
        let run = |mut input: TensorMut<'_>, mut residual: TensorMut<'_>, weight: TensorRef<'_>| {
            op(&stream, &mut input, &mut residual, &weight, &options)
        };
        let make = |dtype, shape: &[usize]| tensor_mut(GPU, dtype, shape);
        let good = || make(DType::F16, &[8, 64]);
        let weight = half(&[64]);
        refused(run(make(DType::F32, &[8, 64]), good(), weight), name, "input");
        refused(run(good(), make(DType::BF16, &[8, 64]), weight), name, "residual");
        refused(run(make(DType::F16, &[8, 1, 64]), good(), weight), name, "input");
        refused(run(good(), make(DType::F16, &[4, 64]), weight), name, "residual");
        refused(run(good(), tensor_mut(Device::Cpu, DType::F16, &[8, 64]), weight), name, "residual");
        refused(run(good(), good().permute(&[1, 0]).unwrap(), weight), name, "residual");
        refused(run(good(), good(), half(&[32])), name, "weight");
    }
}

#[test]
fn packed_bits() {
    let stream = stream();
    let pack = |y: TensorMut<'_>, x: TensorRef<'_>| {
        let mut y = y;
        quantization::packbits(&stream, &mut y, &x, BitOrder::Little)
    };
    let x = |len: usize| tensor(ALIGNED, GPU, DType::Bool, &[len], None);
    let y = |len: usize| tensor_mut(GPU, DType::U8, &[len]);
    for dtype in [DType::I8, DType::F16, DType::I32] {
        refused(pack(y(3), tensor(ALIGNED, GPU, dtype, &[20], None)), "packbits", "x");
    }
    refused(pack(y(3), tensor(ALIGNED, Device::Cpu, DType::U8, &[20], None)), "packbits", "x");
    refused(pack(y(3), tensor(ALIGNED, Device::Cuda(1), DType::U8, &[20], None)), "packbits", "x");
    refused(pack(y(3), tensor(ALIGNED, GPU, DType::U8, &[4, 5], None)), "packbits", "x");
    refused(pack(y(3), tensor(ALIGNED, GPU, DType::U8, &[20], Some(&[2]))), "packbits", "x");
    for wrong in [y(2), y(4), tensor_mut(GPU, DType::Bool, &[3]), tensor_mut(Device::Cpu, DType::U8, &[3])] {
        refused(pack(wrong, x(20)), "packbits", "y");
    }
    assert!(pack(y(0), x(0)).is_ok());
}

#[test]
fn quantizing_norms() {
    let (stream, options) = (stream(), NormOptions::default());
    let on = |dtype, shape: &[usize]| tensor(ALIGNED, GPU, dtype, shape, None);
    let refuse = |out: DType, input: TensorRef<'_>, weight: TensorRef<'_>, scale: TensorRef<'_>, expected| {
        let make = |dtype| tensor_mut(GPU, dtype, &[8, 64]);
        let call = norm::rmsnorm_quant(&stream, &mut make(out), &input, &weight, &scale, &options);
        refused(call, "rmsnorm_quant", expected);
        let call = norm::fused_add_rmsnorm_quant(
            &stream,
            &mut make(out),
            &input,
            &mut make(DType::F16),
            &weight,
            &scale,
            &options,
        );
        refused(call, "fused_add_rmsnorm_quant", expected);
    };
    let (input, weight, scale) = (half(&[8, 64]), half(&[64]), on(DType::F32, &[1]));
    for out in [DType::F16, DType::U8, DType::I8, DType::F32] {
        refuse(out, input, weight, scale, "out");
    }
    refuse(DType::E4M3, on(DType::F32, &[8, 64]), weight, scale, "input");
    refuse(DType::E4M3, on(DType::E4M3, &[8, 64]), weight, scale, "input");
    refuse(DType::E4M3, half(&[8, 0]), half(&[0]), scale, "input");
    refuse(DType::E5M2, tensor(ALIGNED, GPU, DType::F16, &[8, 64], Some(&[66, 1])), weight, scale, "input");
    refuse(DType::E5M2, input, half(&[32]), scale, "weight");
    refuse(DType::E5M2, input, on(DType::BF16, &[64]), scale, "weight");
    refuse(DType::E5M2, input, tensor(ALIGNED + 8, GPU, DType::F16, &[64], None), scale, "weight");
    for scale in [
        on(DType::F16, &[1]),
        on(DType::F64, &[1]),
        on(DType::F32, &[2]),
        on(DType::F32, &[]),
        on(DType::F32, &[1, 1]),
        tensor(ALIGNED, Device::Cpu, DType::F32, &[1], None),
        tensor(ALIGNED + 2, GPU, DType::F32, &[1], None),
    ] {
        refuse(DType::E4M3, input, weight, scale, "scale");
    }
    let call = norm::rmsnorm_quant(
        &stream,
        &mut tensor_mut(GPU, DType::E4M3, &[8, 2, 64]),
        &half(&[8, 2, 64]),
        &weight,
        &scale,
        &options,
    );
    refused(call, "rmsnorm_quant", "input");
    let mut residual = tensor_mut(GPU, DType::BF16, &[8, 64]);
    let mut out = tensor_mut(GPU, DType::E4M3, &[8, 64]);
    let call =
        norm::fused_add_rmsnorm_quant(&stream, &mut out, &input, &mut residual, &weight, &scale, &options);
    refused(call, "fused_add_rmsnorm_quant", "residual");
}

#[test]
fn layer_norms() {
    let (stream, options) = (stream(), NormOptions::default());
    let on = |dtype, shape: &[usize]| tensor(ALIGNED, GPU, dtype, shape, None);
    let run = |out: &[usize], input: TensorRef<'_>, gamma: TensorRef<'_>, beta: TensorRef<'_>, expected| {
        let mut out = tensor_mut(GPU, DType::BF16, out);
        let call = norm::layernorm(&stream, &mut out, &input, &gamma, &beta, &options);
        refused(call, "layernorm", expected);
    };
    let (input, vector) = (on(DType::BF16, &[8, 64]), on(DType::F32, &[64]));
    let refuse = |input, gamma, beta, expected| run(&[8, 64], input, gamma, beta, expected);
    refuse(half(&[8, 64]), vector, vector, "input");
    refuse(on(DType::BF16, &[512]), vector, vector, "input");
    refuse(on(DType::BF16, &[8, 0]), vector, vector, "input");
    refuse(tensor(ALIGNED, GPU, DType::BF16, &[8, 64], Some(&[72, 1])), vector, vector, "input");
    refuse(tensor(ALIGNED + 2, GPU, DType::BF16, &[8, 64], None), vector, vector, "input");
    refuse(on(DType::BF16, &[8, 32]), vector, vector, "out");
    refuse(on(DType::BF16, &[4, 64]), vector, vector, "out");
    refuse(input, on(DType::BF16, &[64]), vector, "gamma");
    refuse(input, vector, on(DType::F32, &[32]), "beta");
    refuse(input, tensor(ALIGNED + 4, GPU, DType::F32, &[64], None), vector, "gamma");
    refuse(input, vector, tensor(ALIGNED, GPU, DType::F32, &[64], Some(&[2])), "beta");
    // The kernel counts elements in 32 bits, and the launcher does not ask for
    // memory just below its limit.
    run(&[1 << 25, 64], on(DType::BF16, &[1 << 25, 64]), vector, vector, "input");
    for d in [24065, 24575] {
        let vector = on(DType::F32, &[d]);
        run(&[8, d], on(DType::BF16, &[8, d]), vector, vector, "input");
    }
    let mut halves = tensor_mut(GPU, DType::F16, &[8, 64]);
    refused(norm::layernorm(&stream, &mut halves, &input, &vector, &vector, &options), "layernorm", "out");
}

#[test]
fn activations() {
    type Activation = fn(&Stream, &mut TensorMut<'_>, &TensorRef<'_>, &ActivationOptions) -> Result<()>;
    let ops: [(&str, Activation); 3] = [
        ("silu_and_mul", activation::silu_and_mul),
        ("gelu_and_mul", activation::gelu_and_mul),
        ("gelu_tanh_and_mul", activation::gelu_tanh_and_mul),
    ];
    let (stream, options) = (stream(), ActivationOptions::default());
    for (name, op) in ops {
        let refuse = |out: &[usize], input: TensorRef<'_>, expected| {
            let mut out = tensor_mut(GPU, DType::F16, out);
            refused(op(&stream, &mut out, &input, &options), name, expected);
        };
        for dtype in [DType::F32, DType::E4M3, DType::U16] {
            refuse(&[8, 64], tensor(ALIGNED, GPU, dtype, &[8, 128], None), "input");
        }
        refuse(&[8, 64], tensor(ALIGNED, GPU, DType::BF16, &[8, 128], None), "out");
        refuse(&[8, 64], tensor(ALIGNED, Device::Cpu, DType::F16, &[8, 128], None), "input");
        refuse(&[], half(&[]), "input");
        for (out, input) in [
            (&[8, 64][..], &[8, 64][..]),
            (&[8, 64], &[8, 129]),
            (&[8, 64], &[9, 128]),
            (&[8, 64], &[2, 4, 128]),
            // No rows, or rows whose vectors are not aligned.
            (&[8, 0], &[8, 0]),
            (&[8, 4], &[8, 8]),
            (&[8, 12], &[8, 24]),
            (&[1, 1 << 30], &[1, 1 << 31]),
        ] {
            refuse(out, half(input), "out");
        }
        refuse(&[8, 64], tensor(ALIGNED, GPU, DType::F16, &[8, 128], Some(&[136, 1])), "input");
        refuse(&[8, 64], tensor(ALIGNED + 8, GPU, DType::F16, &[8, 128], None), "input");
        refuse(&[1 << 31, 8], half(&[1 << 31, 16]), "input");
        let transposed = tensor_mut(GPU, DType::F16, &[64, 8]).permute(&[1, 0]);
        refused(op(&stream, &mut transposed.unwrap(), &half(&[8, 128]), &options), name, "out");
        // No rows, and no runtime.
        op(&stream, &mut tensor_mut(GPU, DType::F16, &[0, 64]), &half(&[0, 128]), &options).unwrap();
    }
}

/// Without rows there is nothing to do, not even a runtime to start.
#[test]
fn no_rows_need_nothing() {
    let options = NormOptions::default();
    for (name, op) in NORMS {
        let mut out = tensor_mut(GPU, DType::F16, &[0, 64]);
        let call = op(&stream(), &mut out, &half(&[0, 64]), &half(&[64]), &options);
        assert!(call.is_ok(), "{name}: {call:?}");
    }
}

#[test]
fn another_threads_default_stream() {
    // SAFETY: the per-thread default stream; nothing is enqueued on it.
    let stream = unsafe { Stream::from_raw(2 as *mut c_void, 0) };
    let run = || {
        let mut out = tensor_mut(GPU, DType::F16, &[0, 64]);
        norm::rmsnorm(&stream, &mut out, &half(&[0, 64]), &half(&[64]), &NormOptions::default())
    };
    run().unwrap();
    let elsewhere = std::thread::scope(|scope| scope.spawn(run).join().unwrap());
    refused(elsewhere, "rmsnorm", "stream");
    run().unwrap();
}

#[test]
fn joined_caches() {
    let shape_of =
        |kv: PagedKv<'_>| (kv.k.shape().to_vec(), kv.v.data_ptr() as usize - kv.k.data_ptr() as usize);
    let kv = PagedKv::joined(half(&[3, 2, 16, 8, 64]), KvLayout::Nhd).unwrap();
    assert_eq!(shape_of(kv), (vec![3, 16, 8, 64], 16 * 8 * 64 * 2));
    for shape in [&[3, 16, 8, 64][..], &[3, 16, 2, 8, 64], &[3, 1, 16, 8, 64], &[2]] {
        let call = PagedKv::joined(half(shape), KvLayout::Hnd).map(drop);
        refused(call, "PagedKv", "kv");
        let call = PagedKvMut::joined(tensor_mut(GPU, DType::F16, shape), KvLayout::Nhd).map(drop);
        refused(call, "PagedKv", "kv");
    }
}

#[test]
fn cascades() {
    let stream = stream();
    let f32s = |shape: &[usize]| tensor(ALIGNED, GPU, DType::F32, shape, None);
    let state = |v: &[usize], s: &[usize]| State::new(half(v), f32s(s));
    let target = |v: &[usize], s: &[usize]| {
        StateMut::new(tensor_mut(GPU, DType::F16, v), tensor_mut(GPU, DType::F32, s))
    };
    let good = state(&[3, 8, 128], &[3, 8]);
    let good_target = || target(&[3, 8, 128], &[3, 8]);

    let merge = |mut merged: StateMut<'_>, a: State<'_>, b: State<'_>, argument: &str| {
        refused(cascade::merge_state(&stream, &mut merged, &a, &b), "merge_state", argument);
    };
    let on = |device, dtype, shape: &[usize]| tensor(ALIGNED, device, dtype, shape, None);
    for dtype in [DType::F32, DType::E4M3, DType::U8] {
        merge(good_target(), State::new(on(GPU, dtype, &[3, 8, 128]), good.s), good, "a.v");
    }
    merge(good_target(), State::new(on(Device::Cuda(1), DType::F16, &[3, 8, 128]), good.s), good, "a.v");
    merge(good_target(), State::new(half(&[24, 128]), good.s), good, "a.v");
    for head_dim in [0, 4, 100, 1032] {
        merge(good_target(), state(&[3, 8, head_dim], &[3, 8]), good, "a.v");
    }
    merge(good_target(), State::new(good.v, half(&[3, 8])), good, "a.s");
    merge(good_target(), state(&[3, 8, 128], &[8, 3]), good, "a.s");
    merge(good_target(), good, State::new(on(GPU, DType::BF16, &[3, 8, 128]), good.s), "b.v");
    merge(good_target(), good, state(&[3, 4, 128], &[3, 4]), "b.v");
    merge(good_target(), good, state(&[3, 8, 128], &[2, 8]), "b.s");
    merge(good_target(), good, State::new(good.v, on(Device::Cpu, DType::F32, &[3, 8])), "b.s");
    merge(target(&[4, 8, 128], &[4, 8]), good, good, "merged.v");
    merge(target(&[3, 8, 128], &[3, 9]), good, good, "merged.s");
    let strided = |strides: &[usize]| tensor(ALIGNED, GPU, DType::F16, &[3, 8, 128], Some(strides));
    merge(good_target(), State::new(strided(&[2048, 128, 1]), good.s), good, "a.v");
    merge(good_target(), State::new(strided(&[128, 384, 1]), good.s), good, "a.v");
    let sums = tensor(ALIGNED, GPU, DType::F32, &[3, 8], Some(&[16, 1]));
    merge(good_target(), good, State::new(good.v, sums), "b.s");
    for odd in [2, 4, 8] {
        let v = tensor(ALIGNED + odd, GPU, DType::F16, &[3, 8, 128], None);
        merge(good_target(), good, State::new(v, good.s), "b.v");
    }
    let s = tensor(ALIGNED + 2, GPU, DType::F32, &[3, 8], None);
    merge(good_target(), good, State::new(good.v, s), "b.s");
    let large = state(&[1 << 25, 8, 128], &[1 << 25, 8]);
    merge(good_target(), large, good, "a.v");

    let in_place =
        |mut state: StateMut<'_>, other: State<'_>, mask: Option<TensorRef<'_>>, argument: &str| {
            let call = cascade::merge_state_in_place(&stream, &mut state, &other, mask.as_ref());
            refused(call, "merge_state_in_place", argument);
        };
    in_place(good_target(), state(&[4, 8, 128], &[4, 8]), None, "other.v");
    in_place(target(&[3, 8, 128], &[3, 4]), good, None, "state.s");
    let mask = |dtype, shape: &[usize]| Some(on(GPU, dtype, shape));
    in_place(good_target(), good, mask(DType::U8, &[4]), "mask");
    in_place(good_target(), good, mask(DType::U8, &[3, 1]), "mask");
    in_place(good_target(), good, mask(DType::I32, &[3]), "mask");
    in_place(good_target(), good, Some(on(Device::Cpu, DType::U8, &[3])), "mask");
    in_place(good_target(), good, Some(tensor(ALIGNED, GPU, DType::U8, &[3], Some(&[2]))), "mask");

    let several = |mut merged: StateMut<'_>, states: State<'_>, argument: &str| {
        refused(cascade::merge_states(&stream, &mut merged, &states), "merge_states", argument);
    };
    several(good_target(), good, "states.v");
    several(good_target(), state(&[3, 0, 8, 128], &[3, 0, 8]), "states.v");
    several(good_target(), state(&[4, 2, 8, 128], &[4, 2, 8]), "states.v");
    several(good_target(), state(&[3, 2, 8, 64], &[3, 2, 8]), "states.v");
    several(good_target(), state(&[3, 2, 8, 128], &[3, 1, 8]), "states.s");
    several(good_target(), State::new(half(&[3, 2, 8, 128]), half(&[3, 2, 8])), "states.s");
    several(target(&[3, 8, 128], &[3]), state(&[3, 2, 8, 128], &[3, 2, 8]), "merged.s");
}

#[test]
fn samplers() {
    let stream = stream();
    let on = |device, dtype, shape: &[usize]| tensor(ALIGNED, device, dtype, shape, None);
    let f32s = |shape: &[usize]| on(GPU, DType::F32, shape);
    let samples = |output: DType, valid: DType, rows: usize| {
        Samples::new(tensor_mut(GPU, output, &[rows]), tensor_mut(GPU, valid, &[rows]))
    };
    let good = || samples(DType::I32, DType::U8, 4);
    let (probs, options) = (f32s(&[4, 64]), SamplingOptions::default());
    let names = ["sampling", "top_p_sampling", "top_k_sampling", "min_p_sampling", "top_k_top_p_sampling"]
        .map(|name| format!("{name}_from_probs"));
    // The same arguments to all functions that draw from probabilities.
    let all =
        |mut samples: Samples<'_>, probs: TensorRef<'_>, options: &SamplingOptions<'_>, argument: &str| {
            let calls = [
                sampling::sampling_from_probs(&stream, &mut samples, &probs, options),
                sampling::top_p_sampling_from_probs(&stream, &mut samples, &probs, 0.5.into(), options),
                sampling::top_k_sampling_from_probs(&stream, &mut samples, &probs, 5.into(), options),
                sampling::min_p_sampling_from_probs(&stream, &mut samples, &probs, 0.5.into(), options),
                sampling::top_k_top_p_sampling_from_probs(
                    &stream,
                    &mut samples,
                    &probs,
                    5.into(),
                    0.5.into(),
                    options,
                ),
            ];
            for (call, name) in calls.into_iter().zip(&names) {
                refused(call, name, argument);
            }
        };
    for dtype in [DType::F16, DType::BF16, DType::F64, DType::I32] {
        all(good(), on(GPU, dtype, &[4, 64]), &options, "probs");
    }
    for shape in [&[4][..], &[4, 1, 64], &[4, 0], &[1, (1 << 23) + 1], &[1 << 20, 4097], &[1 << 31, 1]] {
        all(good(), f32s(shape), &options, "probs");
    }
    all(good(), on(Device::Cpu, DType::F32, &[4, 64]), &options, "probs");
    all(good(), on(Device::Cuda(1), DType::F32, &[4, 64]), &options, "probs");
    all(good(), tensor(ALIGNED, GPU, DType::F32, &[4, 64], Some(&[128, 1])), &options, "probs");
    all(good(), tensor(ALIGNED + 8, GPU, DType::F32, &[4, 64], None), &options, "probs");
    all(good(), tensor(ALIGNED + 4, GPU, DType::F32, &[4, 66], None), &options, "probs");
    for dtype in [DType::U32, DType::I16, DType::F32] {
        all(samples(dtype, DType::U8, 4), probs, &options, "output");
    }
    all(samples(DType::I64, DType::U8, 3), probs, &options, "output");
    all(samples(DType::I64, DType::I32, 4), probs, &options, "valid");
    let short = Samples::new(tensor_mut(GPU, DType::I32, &[4]), tensor_mut(GPU, DType::U8, &[3]));
    all(short, probs, &options, "valid");

    // SAFETY: never used: every call is refused.
    let indices = |dtype, shape: &[usize], bound| unsafe {
        Indices::from_device_unchecked(on(GPU, dtype, shape), bound)
    };
    for (dtype, shape, bound) in [
        (DType::I32, &[4][..], 5),
        (DType::I64, &[4], 4),
        (DType::I32, &[5], 4),
        (DType::I32, &[4, 1], 4),
        (DType::I32, &[4], usize::MAX),
    ] {
        let mut options = options;
        options.indices = Some(indices(dtype, shape, bound));
        all(good(), probs, &options, "indices");
    }
    for pair in [
        on(GPU, DType::I32, &[2]),
        on(GPU, DType::U64, &[1]),
        on(GPU, DType::U64, &[2, 1]),
        on(Device::Cpu, DType::U64, &[2]),
        tensor(ALIGNED + 4, GPU, DType::I64, &[2], None),
        tensor(ALIGNED, GPU, DType::I64, &[2], Some(&[2])),
    ] {
        all(good(), probs, &SamplingOptions::with_random(Random::Device(pair)), "random");
    }

    // Parameters.
    let (top_p, top_k, min_p) = (&names[1], &names[2], &names[3]);
    let both = &names[4];
    for value in [0.0, -0.1, 1.1, f64::NAN, f64::INFINITY, 1e-60] {
        let p = Parameter::Value(value);
        refused(
            sampling::top_p_sampling_from_probs(&stream, &mut good(), &probs, p, &options),
            top_p,
            "top_p",
        );
        let call =
            sampling::top_k_top_p_sampling_from_probs(&stream, &mut good(), &probs, 1.into(), p, &options);
        refused(call, both, "top_p");
    }
    for value in [-0.1, 1.1, f64::NAN] {
        let p = Parameter::Value(value);
        refused(
            sampling::min_p_sampling_from_probs(&stream, &mut good(), &probs, p, &options),
            min_p,
            "min_p",
        );
    }
    let call = sampling::top_k_sampling_from_probs(&stream, &mut good(), &probs, 0.into(), &options);
    refused(call, top_k, "top_k");
    for wrong in [
        f32s(&[5]),
        f32s(&[4, 1]),
        on(GPU, DType::F16, &[4]),
        on(Device::Cpu, DType::F32, &[4]),
        tensor(ALIGNED, GPU, DType::F32, &[4], Some(&[2])),
        tensor(ALIGNED + 2, GPU, DType::F32, &[4], None),
    ] {
        let p = Parameter::PerRow(wrong);
        refused(
            sampling::top_p_sampling_from_probs(&stream, &mut good(), &probs, p, &options),
            top_p,
            "top_p",
        );
        refused(
            sampling::min_p_sampling_from_probs(&stream, &mut good(), &probs, p, &options),
            min_p,
            "min_p",
        );
    }
    // As many as the kernel looks up: of outputs, or of rows.
    let mut mapped = options;
    mapped.indices = Some(indices(DType::I64, &[9], 4));
    let nine = || samples(DType::I64, DType::U8, 9);
    let k = |dtype, len: usize| Parameter::PerRow(on(GPU, dtype, &[len]));
    for wrong in [k(DType::I64, 4), k(DType::I32, 9)] {
        let call = sampling::top_k_sampling_from_probs(&stream, &mut nine(), &probs, wrong, &mapped);
        refused(call, top_k, "top_k");
    }
    let call = sampling::min_p_sampling_from_probs(
        &stream,
        &mut nine(),
        &probs,
        Parameter::PerRow(f32s(&[4])),
        &mapped,
    );
    refused(call, min_p, "min_p");
    let nine_ps = Parameter::PerRow(f32s(&[9]));
    refused(
        sampling::top_p_sampling_from_probs(&stream, &mut nine(), &probs, nine_ps, &mapped),
        top_p,
        "top_p",
    );
    let call = sampling::top_k_top_p_sampling_from_probs(
        &stream,
        &mut nine(),
        &probs,
        k(DType::I64, 9),
        0.5.into(),
        &mapped,
    );
    refused(call, both, "top_k");

    // Logits: more random numbers than there are.
    let from_logits = |rows: usize, logits: TensorRef<'_>, options: &SamplingOptions<'_>, argument: &str| {
        let mut output = tensor_mut(GPU, DType::I32, &[rows]);
        let call = sampling::sampling_from_logits(&stream, &mut output, &logits, options);
        refused(call, "sampling_from_logits", argument);
    };
    from_logits(4, on(GPU, DType::F16, &[4, 64]), &options, "logits");
    from_logits(5, probs, &options, "output");
    let mut many = options;
    many.indices = Some(indices(DType::I32, &[1 << 26], 4));
    from_logits(1 << 26, probs, &many, "output");
}

#[test]
fn largest_logits_and_top_p() {
    let stream = stream();
    let on = |device, dtype, shape: &[usize]| tensor(ALIGNED, device, dtype, shape, None);
    let argmax = |output: (DType, &[usize]), logits: TensorRef<'_>, argument: &str| {
        let mut output = tensor_mut(GPU, output.0, output.1);
        refused(sampling::argmax(&stream, &mut output, &logits), "argmax", argument);
    };
    let good = on(GPU, DType::F16, &[4, 64]);
    let inputs = [
        on(Device::Cpu, DType::F16, &[4, 64]),
        on(Device::Cuda(1), DType::F16, &[4, 64]),
        on(GPU, DType::F64, &[4, 64]),
        on(GPU, DType::E4M3, &[4, 64]),
        on(GPU, DType::F16, &[256]),
        on(GPU, DType::F16, &[4, 0]),
        on(GPU, DType::F16, &[1, (1 << 23) + 1]),
        tensor(ALIGNED, GPU, DType::F16, &[4, 64], Some(&[128, 1])),
        tensor(ALIGNED + 2, GPU, DType::F16, &[4, 64], None),
    ];
    for logits in inputs {
        argmax((DType::I32, &[4]), logits, "logits");
    }
    for output in [(DType::F32, &[4][..]), (DType::U8, &[4]), (DType::I64, &[3]), (DType::I32, &[4, 1])] {
        argmax(output, good, "output");
    }

    let top_p = |out: TensorMut<'_>, probs: TensorRef<'_>, top_p: Parameter<'_>, argument: &str| {
        let mut out = out;
        let call = sampling::top_p_renorm_probs(&stream, &mut out, &probs, top_p);
        refused(call, "top_p_renorm_probs", argument);
    };
    let good = on(GPU, DType::F32, &[4, 64]);
    let out = || tensor_mut(GPU, DType::F32, &[4, 64]);
    for probs in inputs {
        top_p(out(), probs, 0.5.into(), "probs");
    }
    top_p(tensor_mut(GPU, DType::F32, &[4, 63]), good, 0.5.into(), "out");
    top_p(tensor_mut(GPU, DType::F16, &[4, 64]), good, 0.5.into(), "out");
    for number in [0.0, -0.5, 1.1, f64::NAN, 1e-60] {
        top_p(out(), good, number.into(), "top_p");
    }
    for rows in [on(GPU, DType::F32, &[5]), on(GPU, DType::F64, &[4]), on(Device::Cpu, DType::F32, &[4])] {
        top_p(out(), good, Parameter::PerRow(rows), "top_p");
    }
}

#[test]
fn sampling_steps() {
    let stream = stream();
    let on = |device, dtype, shape: &[usize]| tensor(ALIGNED, device, dtype, shape, None);
    let run = |output: (DType, &[usize]),
               logits: (Device, DType, &[usize]),
               options: &SampleOptions<'_>,
               argument| {
        let mut logits = tensor_mut(logits.0, logits.1, logits.2);
        let call = sampling::sample(&stream, &mut tensor_mut(GPU, output.0, output.1), &mut logits, options);
        refused(call, "sample", argument);
    };
    let good = SampleOptions::new(on(GPU, DType::F32, &[4]));
    let (tokens, f32s): ((_, &[usize]), (_, _, &[usize])) = ((DType::I32, &[4]), (GPU, DType::F32, &[4, 64]));
    for logits in [
        (Device::Cpu, DType::F32, &[4, 64][..]),
        (Device::Cuda(1), DType::F32, &[4, 64]),
        (GPU, DType::F16, &[4, 64]),
        (GPU, DType::F32, &[256]),
        (GPU, DType::F32, &[4, 0]),
        (GPU, DType::F32, &[1, (1 << 23) + 1]),
    ] {
        run(tokens, logits, &good, "logits");
    }
    for output in [(DType::F32, &[4][..]), (DType::U8, &[4]), (DType::I64, &[3]), (DType::I32, &[4, 1])] {
        run(output, f32s, &good, "output");
    }
    for uniforms in [on(GPU, DType::F64, &[4]), on(GPU, DType::F32, &[5]), on(Device::Cpu, DType::F32, &[4])]
    {
        run(tokens, f32s, &SampleOptions::new(uniforms), "uniforms");
    }
    let with = |change: &dyn Fn(&mut SampleOptions<'static>), argument| {
        let mut options = good;
        change(&mut options);
        run(tokens, f32s, &options, argument);
    };
    for temperature in [-1.0, f64::NAN, f64::INFINITY, 1e300] {
        with(&|options| options.temperature = temperature.into(), "temperature");
    }
    for top_p in [0.0, -0.5, 1.1, f64::NAN, 1e-60] {
        with(&|options| options.top_p = top_p.into(), "top_p");
    }
    for min_p in [-0.5, 1.1, f64::NAN] {
        with(&|options| options.min_p = min_p.into(), "min_p");
    }
    for rows in [on(GPU, DType::F32, &[5]), on(GPU, DType::F64, &[4]), on(Device::Cpu, DType::F32, &[4])] {
        with(&|options| options.temperature = Parameter::PerRow(rows), "temperature");
        with(&|options| options.top_p = Parameter::PerRow(rows), "top_p");
        with(&|options| options.min_p = Parameter::PerRow(rows), "min_p");
        with(&|options| options.top_k = Parameter::PerRow(rows), "top_k");
    }
    with(&|options| options.top_k = Parameter::PerRow(on(GPU, DType::I64, &[4])), "top_k");
}

#[test]
fn chains() {
    let stream = stream();
    let on = |device, dtype, shape: &[usize]| tensor(ALIGNED, device, dtype, shape, None);
    let f32s = |shape: &[usize]| on(GPU, DType::F32, shape);
    // SAFETY: never used: every call is refused.
    let ids = |tensor, bound| unsafe { Indices::from_device_unchecked(tensor, bound) };
    let good_ids = ids(on(GPU, DType::I32, &[3, 2]), 64);
    let (draft, target) = (f32s(&[3, 2, 64]), f32s(&[3, 3, 64]));
    let run = |tokens: &[usize], counts: [&[usize]; 2], input: ChainInput<'_>, argument: &str| {
        let make = |shape: &[usize]| tensor_mut(GPU, DType::I32, shape);
        let mut samples = ChainSamples::new(make(tokens), make(counts[0]), make(counts[1]));
        let options = SamplingOptions::with_random(Philox::new(1, 2));
        let call = sampling::chain_speculative_sampling(&stream, &mut samples, &input, &options);
        refused(call, "chain_speculative_sampling", argument);
    };
    let input = |input: ChainInput<'_>, argument: &str| run(&[3, 3], [&[3], &[3]], input, argument);
    input(ChainInput::new(f32s(&[6, 64]), good_ids, target), "draft_probs");
    input(ChainInput::new(f32s(&[3, 0, 64]), good_ids, target), "draft_probs");
    input(ChainInput::new(on(GPU, DType::F16, &[3, 2, 64]), good_ids, target), "draft_probs");
    input(ChainInput::new(on(Device::Cpu, DType::F32, &[3, 2, 64]), good_ids, target), "draft_probs");
    for shape in [[3, 2, 64], [2, 3, 64], [3, 3, 63], [3, 4, 64]] {
        input(ChainInput::new(draft, good_ids, f32s(&shape)), "target_probs");
    }
    let odd = tensor(ALIGNED + 8, GPU, DType::F32, &[3, 3, 64], None);
    input(ChainInput::new(draft, good_ids, odd), "target_probs");
    for wrong in [
        ids(on(GPU, DType::I32, &[3, 2]), 65),
        ids(on(GPU, DType::I32, &[2, 3]), 64),
        ids(on(GPU, DType::I32, &[6]), 64),
        ids(on(GPU, DType::I64, &[3, 2]), 64),
        ids(tensor(ALIGNED, GPU, DType::I32, &[3, 2], Some(&[4, 1])), 64),
        ids(on(Device::Cuda(1), DType::I32, &[3, 2]), 64),
    ] {
        input(ChainInput::new(draft, wrong, target), "draft_token_ids");
    }
    let good = ChainInput::new(draft, good_ids, target);
    run(&[3, 2], [&[3], &[3]], good, "output_token_ids");
    run(&[9], [&[3], &[3]], good, "output_token_ids");
    run(&[3, 3], [&[2], &[3]], good, "output_accepted_token_num");
    run(&[3, 3], [&[3], &[3, 1]], good, "output_emitted_draft_token_num");
    // The kernel counts elements in 32 bits.
    let large_ids = ids(on(GPU, DType::I32, &[1 << 22, 2]), 64);
    let large = ChainInput::new(f32s(&[1 << 22, 2, 512]), large_ids, f32s(&[1 << 22, 3, 512]));
    input(large, "target_probs");

    let mut mapped = SamplingOptions::default();
    mapped.indices = Some(good_ids);
    let make = |shape: &[usize]| tensor_mut(GPU, DType::I32, shape);
    let mut samples = ChainSamples::new(make(&[3, 3]), make(&[3]), make(&[3]));
    let call = sampling::chain_speculative_sampling(&stream, &mut samples, &good, &mapped);
    refused(call, "chain_speculative_sampling", "indices");
}

/// Queries and keys to turn, from one address.
fn rope_tensors(q: TensorRef<'static>, k: TensorRef<'static>) -> RopeTensors<'static> {
    let out = |like: &TensorRef<'_>| {
        let shape: Vec<usize> = like.shape().iter().map(|&size| size as usize).collect();
        tensor_mut(GPU, DType::F16, &shape)
    };
    let (q_rope, k_rope) = (out(&q), out(&k));
    RopeTensors::OutOfPlace { q, k, q_rope, k_rope }
}

#[test]
fn rotary_embeddings() {
    let stream = stream();
    let pos = |len: usize| Positions::from(tensor(ALIGNED, GPU, DType::I32, &[len], None));
    let (good, good_k) = (half(&[8, 4, 128]), half(&[8, 2, 128]));

    let run =
        |mut tensors: RopeTensors<'_>, pos_ids: Positions<'_>, options: &RopeOptions, argument: &str| {
            let call = rope::apply_rope_pos_ids(&stream, &mut tensors, pos_ids, options);
            refused(call, "apply_rope_pos_ids", argument);
            let mut llama = Llama31RopeOptions::default();
            llama.rope = *options;
            let call = rope::apply_llama31_rope_pos_ids(&stream, &mut tensors, pos_ids, &llama);
            refused(call, "apply_llama31_rope_pos_ids", argument);
        };
    let plain = RopeOptions::default();
    let on = |device, dtype, shape: &[usize]| tensor(ALIGNED, device, dtype, shape, None);
    for dtype in [DType::F32, DType::E4M3, DType::I16] {
        run(rope_tensors(on(GPU, dtype, &[8, 4, 128]), good_k), pos(8), &plain, "q");
    }
    run(rope_tensors(on(Device::Cpu, DType::F16, &[8, 4, 128]), good_k), pos(8), &plain, "q");
    run(rope_tensors(half(&[8, 512]), good_k), pos(8), &plain, "q");
    for head_dim in [32, 96, 192, 1024] {
        run(rope_tensors(half(&[8, 4, head_dim]), half(&[8, 2, head_dim])), pos(8), &plain, "q");
    }
    run(rope_tensors(good, on(GPU, DType::BF16, &[8, 2, 128])), pos(8), &plain, "k");
    run(rope_tensors(good, on(Device::Cuda(1), DType::F16, &[8, 2, 128])), pos(8), &plain, "k");
    run(rope_tensors(good, half(&[7, 2, 128])), pos(8), &plain, "k");
    run(rope_tensors(good, half(&[8, 2, 64])), pos(8), &plain, "k");
    let strided = |strides: &[usize]| tensor(ALIGNED, GPU, DType::F16, &[8, 4, 128], Some(strides));
    run(rope_tensors(strided(&[1024, 256, 2]), good_k), pos(8), &plain, "q");
    run(rope_tensors(strided(&[1024, 132, 1]), good_k), pos(8), &plain, "q");
    run(rope_tensors(tensor(ALIGNED + 8, GPU, DType::F16, &[8, 4, 128], None), good_k), pos(8), &plain, "q");
    run(rope_tensors(half(&[1 << 31, 1, 64]), half(&[1 << 31, 1, 64])), pos(1 << 31), &plain, "q");
    run(rope_tensors(half(&[8, 65535, 64]), half(&[8, 1, 64])), pos(8), &plain, "q");
    let with = |q_rope, k_rope| RopeTensors::OutOfPlace { q: good, k: good_k, q_rope, k_rope };
    let out = |dtype, shape: &[usize]| tensor_mut(GPU, dtype, shape);
    let out_k = || out(DType::F16, &[8, 2, 128]);
    run(with(out(DType::BF16, &[8, 4, 128]), out_k()), pos(8), &plain, "q_rope");
    run(with(out(DType::F16, &[8, 3, 128]), out_k()), pos(8), &plain, "q_rope");
    run(with(out(DType::F16, &[8, 4, 128]), out(DType::F16, &[8, 2, 64])), pos(8), &plain, "k_rope");
    run(rope_tensors(good, good_k), pos(7), &plain, "pos_ids");
    for dtype in [DType::U32, DType::F32, DType::I16] {
        run(rope_tensors(good, good_k), on(GPU, dtype, &[8]).into(), &plain, "pos_ids");
    }
    run(rope_tensors(good, good_k), on(Device::Cpu, DType::I32, &[8]).into(), &plain, "pos_ids");
    let gaps = tensor(ALIGNED, GPU, DType::I32, &[8], Some(&[2]));
    run(rope_tensors(good, good_k), gaps.into(), &plain, "pos_ids");
    let odd = tensor(ALIGNED + 4, GPU, DType::I64, &[8], None);
    run(rope_tensors(good, good_k), odd.into(), &plain, "pos_ids");

    let mut options = plain;
    // Halves are whole vectors of 8 elements, neighbours end with one.
    for (rotary_dim, interleave) in
        [(0, false), (8, false), (24, false), (120, false), (144, false), (0, true), (4, true), (136, true)]
    {
        (options.rotary_dim, options.interleave) = (Some(rotary_dim), interleave);
        run(rope_tensors(good, good_k), pos(8), &options, "rotary_dim");
    }
    options.rotary_dim = Some(usize::MAX);
    run(rope_tensors(good, good_k), pos(8), &options, "rotary_dim");
    // Of 16 where heads have 512.
    for (rotary_dim, interleave) in [(16, false), (48, false), (8, true), (24, true)] {
        (options.rotary_dim, options.interleave) = (Some(rotary_dim), interleave);
        run(rope_tensors(half(&[8, 1, 512]), half(&[8, 1, 512])), pos(8), &options, "rotary_dim");
    }
    for number in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        run(rope_tensors(good, good_k), pos(8), &RopeOptions::with_theta(number), "rope_theta");
        let mut options = plain;
        options.rope_scale = number;
        run(rope_tensors(good, good_k), pos(8), &options, "rope_scale");
    }
    for (low, high, old, argument) in [
        (4.0, 4.0, 8192.0, "low_freq_factor"),
        (5.0, 4.0, 8192.0, "low_freq_factor"),
        (0.0, 4.0, 8192.0, "low_freq_factor"),
        (1.0, f64::NAN, 8192.0, "high_freq_factor"),
        (1.0, 4.0, 0.0, "old_context_len"),
    ] {
        let mut llama = Llama31RopeOptions::default();
        (llama.low_freq_factor, llama.high_freq_factor, llama.old_context_len) = (low, high, old);
        let call = rope::apply_llama31_rope_pos_ids(&stream, &mut rope_tensors(good, good_k), pos(8), &llama);
        refused(call, "apply_llama31_rope_pos_ids", argument);
    }
}

#[test]
fn rotary_embeddings_from_a_table() {
    let stream = stream();
    // SAFETY: nothing is launched, so nothing reads the positions.
    let pos = |len: usize, num_positions| unsafe {
        Positions::from_device_unchecked(tensor(ALIGNED, GPU, DType::I32, &[len], None), num_positions)
    };
    let table = |rows: usize, rotary_dim: usize| tensor(ALIGNED, GPU, DType::F32, &[rows, rotary_dim], None);
    let run = |mut tensors: RopeTensors<'_>, rotation: Rotation<'_>, argument: &str| {
        let call = rope::apply_rope_pos_ids_cos_sin_cache(&stream, &mut tensors, &rotation);
        refused(call, "apply_rope_pos_ids_cos_sin_cache", argument);
    };
    let of = |head_dim| rope_tensors(half(&[8, 4, head_dim]), half(&[8, 2, head_dim]));
    // Positions without rows.
    run(of(128), Rotation::new(table(100, 128), pos(8, 101)), "pos_ids");
    run(of(128), Rotation::interleaved(table(100, 128), pos(8, 100)), "pos_ids");
    run(of(128), Rotation::interleaved(table(0, 128), pos(8, 1)), "pos_ids");
    // A bound above every i64.
    run(of(128), Rotation::new(table(100, 128), pos(8, usize::MAX)), "pos_ids");
    run(of(128), Rotation::new(table(100, 128), tensor(ALIGNED, GPU, DType::I32, &[8], None)), "pos_ids");
    run(of(128), Rotation::new(table(100, 128), pos(7, 100)), "pos_ids");
    run(of(128), Rotation::new(table(1 << 26, 128), pos(8, 1 << 26)), "cos_sin_cache");

    let wrong = |table| Rotation::new(table, pos(8, 1));
    let on = |device, dtype, shape: &[usize]| tensor(ALIGNED, device, dtype, shape, None);
    run(of(128), wrong(on(GPU, DType::F16, &[100, 128])), "cos_sin_cache");
    run(of(128), wrong(on(Device::Cpu, DType::F32, &[100, 128])), "cos_sin_cache");
    run(of(128), wrong(on(GPU, DType::F32, &[100 * 128])), "cos_sin_cache");
    run(of(128), wrong(tensor(ALIGNED, GPU, DType::F32, &[100, 128], Some(&[256, 1]))), "cos_sin_cache");
    run(of(128), wrong(tensor(ALIGNED + 8, GPU, DType::F32, &[100, 128], None)), "cos_sin_cache");
    for (head_dim, rotary_dim) in [
        (128, 0),
        (128, 24),
        (128, 144),
        (512, 48),
        (192, 0),
        (192, 16),
        (192, 48),
        (192, 224),
        (32768, 16416),
    ] {
        run(of(head_dim), wrong(table(100, rotary_dim)), "cos_sin_cache");
    }
    for (head_dim, rotary_dim) in [(128, 4), (512, 24), (192, 24)] {
        let rotation = Rotation::interleaved(table(100, rotary_dim), pos(8, 1));
        run(of(head_dim), rotation, "cos_sin_cache");
    }
    // Halves of these widths belong to two warps.
    for (head_dim, rotary_dim) in [(96, 96), (192, 192), (1024, 1024), (1024, 160)] {
        let in_place = |heads| tensor_mut(GPU, DType::F16, &[8, heads, head_dim]);
        let tensors = RopeTensors::InPlace { q: in_place(4), k: in_place(2) };
        run(tensors, wrong(table(100, rotary_dim)), "cos_sin_cache");
    }
    // More blocks side by side than a grid has, one for each head and part.
    let many = |heads, head_dim| rope_tensors(half(&[8, heads, head_dim]), half(&[8, 1, head_dim]));
    run(many(65535, 128), wrong(table(100, 128)), "q");
    run(many(32767, 192), wrong(table(100, 128)), "q");
}

#[test]
fn quantizing_rotary_embeddings() {
    let stream = stream();
    // SAFETY: nothing is launched, so nothing reads the positions.
    let pos_ids =
        unsafe { Positions::from_device_unchecked(tensor(ALIGNED, GPU, DType::I32, &[8], None), 100) };
    let table = |rotary_dim: usize| tensor(ALIGNED, GPU, DType::F32, &[100, rotary_dim], None);
    let on = |dtype, shape: &[usize]| tensor(ALIGNED, GPU, dtype, shape, None);
    let parts = |rope, nope| RopeParts { rope, nope: Some(nope) };
    let out = |dtype, shape: &[usize], nope: &[usize]| RopePartsMut {
        rope: tensor_mut(GPU, dtype, shape),
        nope: Some(tensor_mut(GPU, dtype, nope)),
    };
    let (q, k) = (parts(half(&[8, 4, 64]), half(&[8, 4, 128])), parts(half(&[8, 2, 64]), half(&[8, 2, 128])));
    let e4m3 = DType::E4M3;
    let outs = || [out(e4m3, &[8, 4, 64], &[8, 4, 128]), out(e4m3, &[8, 2, 64], &[8, 2, 128])];
    let run = |mut out: [RopePartsMut<'_>; 2], input: [RopeParts<'_>; 2], table, argument: &str| {
        let options = RopeQuantizeOptions::default();
        let call = rope::rope_quantize(&stream, &mut out, &input, &Rotation::new(table, pos_ids), &options);
        refused(call, "rope_quantize", argument);
    };
    let brain = |shape: &[usize]| on(DType::BF16, shape);
    run(outs(), [parts(on(DType::F32, &[8, 4, 64]), q.nope.unwrap()), k], table(64), "q.rope");
    run(outs(), [parts(q.rope, brain(&[8, 4, 128])), k], table(64), "q.nope");
    run(outs(), [q, parts(brain(&[8, 2, 64]), brain(&[8, 2, 128]))], table(64), "k.rope");
    run(outs(), [RopeParts { rope: q.rope, nope: None }, k], table(64), "k.nope");
    run(outs(), [q, RopeParts { rope: k.rope, nope: None }], table(64), "k.nope");
    run(outs(), [parts(half(&[8, 64]), half(&[8, 128])), k], table(64), "q.rope");
    run(outs(), [parts(q.rope, half(&[8, 3, 128])), k], table(64), "q.nope");
    run(outs(), [q, parts(half(&[7, 2, 64]), half(&[7, 2, 128]))], table(64), "k.rope");
    run(outs(), [q, parts(half(&[8, 2, 32]), half(&[8, 2, 128]))], table(64), "k.rope");
    run(outs(), [q, parts(half(&[8, 1, 64]), half(&[8, 1, 128]))], table(64), "k_out.rope");
    run(outs(), [q, parts(half(&[8, 64]), half(&[8, 128]))], table(64), "k_out.rope");
    run(outs(), [q, k], table(128), "cos_sin_cache");
    let half_out = [out(DType::F16, &[8, 4, 64], &[8, 4, 128]), out(e4m3, &[8, 2, 64], &[8, 2, 128])];
    run(half_out, [q, k], table(64), "q_out.rope");
    let mixed = [out(e4m3, &[8, 4, 64], &[8, 4, 128]), out(DType::E5M2, &[8, 2, 64], &[8, 2, 128])];
    run(mixed, [q, k], table(64), "k_out.rope");
    let few = [out(e4m3, &[8, 3, 64], &[8, 3, 128]), out(e4m3, &[8, 2, 64], &[8, 2, 128])];
    run(few, [q, k], table(64), "q_out.rope");
    let short = [out(e4m3, &[8, 4, 64], &[8, 4, 64]), out(e4m3, &[8, 2, 64], &[8, 2, 128])];
    run(short, [q, k], table(64), "q_out.nope");
    // 48 elements are no two halves of vectors of 16.
    let all = |rotary_dim: usize, heads: usize| {
        let rope = |heads| RopeParts { rope: half(&[8, heads, rotary_dim]), nope: None };
        let out = |heads| RopePartsMut { rope: tensor_mut(GPU, e4m3, &[8, heads, rotary_dim]), nope: None };
        ([out(heads), out(1)], [rope(heads), rope(1)])
    };
    for rotary_dim in [0, 16, 48, 16416] {
        let (out, input) = all(rotary_dim, 4);
        run(out, input, table(rotary_dim), "cos_sin_cache");
    }
    let (out, input) = all(64, 65535);
    run(out, input, table(64), "q.rope");
    let strided = |strides: &[usize]| tensor(ALIGNED, GPU, DType::F16, &[8, 4, 64], Some(strides));
    for strides in [&[512, 128, 2][..], &[512, 68, 1], &[1 << 33, 64, 1]] {
        run(outs(), [parts(strided(strides), q.nope.unwrap()), k], table(64), "q.rope");
    }
    for (scale, argument) in [(f64::NAN, "quant_scale_q"), (f64::INFINITY, "quant_scale_kv")] {
        let options = match argument {
            "quant_scale_q" => RopeQuantizeOptions::with_scales(scale, 1.0),
            _ => RopeQuantizeOptions::with_scales(1.0, scale),
        };
        let rotation = Rotation::new(table(64), pos_ids);
        let call = rope::rope_quantize(&stream, &mut outs(), &[q, k], &rotation, &options);
        refused(call, "rope_quantize", argument);
    }
    // Heads without so many elements.
    assert!(RopeParts::of_heads(half(&[8, 4, 64]), 65).is_err());
    assert!(RopePartsMut::of_heads(tensor_mut(GPU, e4m3, &[8, 4, 64]), 65).is_err());
    assert!(RopeParts::of_heads(half(&[]), 0).is_err());
}
