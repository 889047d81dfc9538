//! Wrong input is refused before anything is loaded or launched, so these
//! checks need no GPU: the tensors here are addresses that nobody looks at.

mod wrong_input {
    mod norms;
    mod rotary_embeddings;
    mod samplers;
    mod strict;
    mod strides;
}

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
use std::ffi::c_void;

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

type Norm = fn(&Stream, &mut TensorMut<'_>, &TensorRef<'_>, &TensorRef<'_>, &NormOptions) -> Result<()>;

const NORMS: [(&str, Norm); 2] = [("rmsnorm", norm::rmsnorm), ("gemma_rmsnorm", norm::gemma_rmsnorm)];
