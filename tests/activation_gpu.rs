//! Gated activations on the GPU against the CPU reference.
#![cfg(feature = "cudarc")]

mod common;

use common::{Gpu, Mirrored, Number, Rng, assert_same_bits, captured, leave_cuda_error, refused, say};
use cudarc::driver::result::ctx;
use flashinfer_rs::{
    Result, Stream, TensorMut, TensorRef,
    activation::{self, ActivationOptions},
    gpu::{TensorExt, TensorExtMut},
    reference,
};
use half::{bf16, f16};

/// An operation and its reference.
#[derive(Clone, Copy)]
struct Activation {
    op: fn(&Stream, &mut TensorMut<'_>, &TensorRef<'_>, &ActivationOptions) -> Result<()>,
    reference: fn(&mut TensorMut<'_>, &TensorRef<'_>, &ActivationOptions) -> Result<()>,
    /// The largest relative error of a number between −√3 and √3, before it is
    /// rounded.
    element_bound: f64,
}

const SILU: Activation =
    Activation { op: activation::silu_and_mul, reference: reference::silu_and_mul, element_bound: 1e-5 };
const GELU: Activation =
    Activation { op: activation::gelu_and_mul, reference: reference::gelu_and_mul, element_bound: 1e-5 };
/// The hardware's `tanh` is off by up to 2⁻¹¹, which counts where `1 + tanh` is
/// small. Rows of more than a few elements are dominated by others.
const GELU_TANH: Activation = Activation {
    op: activation::gelu_tanh_and_mul,
    reference: reference::gelu_tanh_and_mul,
    element_bound: 6e-3,
};
const ALL: [Activation; 3] = [SILU, GELU, GELU_TANH];

fn run<T: Number>(
    gpu: &Gpu,
    activation: Activation,
    out: &mut Mirrored<T>,
    input: &Mirrored<T>,
    options: &ActivationOptions,
) -> Result<()> {
    (activation.op)(&gpu.stream, &mut out.device_view_mut(), &input.device_view(), options)
}

fn want<T: Number>(activation: Activation, out: &Mirrored<T>, input: &Mirrored<T>) -> Vec<f64> {
    let mut want = out.wide();
    (activation.reference)(&mut out.view_of(&mut want), &input.view(), &ActivationOptions::default())
        .unwrap();
    want
}

/// Runs one case and compares it with the reference. Returns what came out.
#[track_caller]
fn check<T: Number>(
    gpu: &Gpu,
    activation: Activation,
    input: &Mirrored<T>,
    options: &ActivationOptions,
) -> Vec<T> {
    let mut shape = input.shape();
    let d = shape.last_mut().unwrap();
    *d /= 2;
    let bound = if *d < 64 { T::BOUND + activation.element_bound } else { T::BOUND };
    let mut out = Mirrored::<T>::poisoned(gpu, &shape);
    run(gpu, activation, &mut out, input, options).unwrap();
    out.assert_close("activation", &want(activation, &out, input), bound);
    input.assert_untouched();
    out.download()
}

fn sizes<T: Number>() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for activation in ALL {
        for d in [8, 16, 24, 64, 1000, 4096, 8192, 8200, 11008, 14336, 28672] {
            for rows in if d > 1000 { [1, 3, 5] } else { [1, 7, 257] } {
                let input = Mirrored::<T>::random(&gpu, rng, &[rows, 2 * d]);
                check(&gpu, activation, &input, &ActivationOptions::default());
            }
        }
        for shape in [&[128][..], &[3, 5, 128], &[2, 1, 3, 256], &[2, 2, 1, 3, 16]] {
            check(&gpu, activation, &Mirrored::<T>::random(&gpu, rng, shape), &ActivationOptions::default());
        }
    }
}

typed_tests! {
    sizes_f16: sizes::<f16>();
    sizes_bf16: sizes::<bf16>();
}

/// Large gates, where the activation is 0 or the gate itself.
#[test]
fn large_numbers() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for activation in ALL {
        let input = Mirrored::<bf16>::random_scaled(&gpu, rng, &[7, 512], 10.0);
        check(&gpu, activation, &input, &ActivationOptions::default());
        let gates = [-65504.0, -100.0, -0.0, 0.0, 10.0, 100.0, 1000.0, 65504.0];
        let row = gates.into_iter().chain([1.0; 8]).map(f16::from_f64).collect();
        let out = check(&gpu, activation, &Mirrored::new(&gpu, &[1, 16], row), &ActivationOptions::default());
        let expected = [0.0, 0.0, 0.0, 0.0, 10.0, 100.0, 1000.0, 65504.0];
        if activation.element_bound < 1e-4 {
            assert_eq!(out, expected.map(f16::from_f64));
        }
    }
}

/// With and without programmatic dependent launch the bits are the same, also
/// where each launch reads what the one before wrote.
#[test]
fn pdl() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let input = Mirrored::<bf16>::random(&gpu, rng, &[64, 4 * 2048]);
    for activation in ALL {
        let chain = |enable_pdl| {
            let mut options = ActivationOptions::default();
            options.enable_pdl = enable_pdl;
            let mut middle = Mirrored::<bf16>::poisoned(&gpu, &[64, 2 * 2048]);
            let mut out = Mirrored::<bf16>::poisoned(&gpu, &[64, 2048]);
            for _ in 0..10 {
                run(&gpu, activation, &mut middle, &input, &options).unwrap();
                run(&gpu, activation, &mut out, &middle, &options).unwrap();
            }
            out.download()
        };
        let default = chain(None);
        assert_same_bits("PDL off", &chain(Some(false)), &default);
        if gpu.compute_capability().0 >= 9 {
            assert_same_bits("PDL on", &chain(Some(true)), &default);
        }
        check(&gpu, activation, &input, &ActivationOptions::default());
    }
}

#[test]
fn no_rows() {
    let Some(gpu) = Gpu::start() else { return };
    for activation in ALL {
        let input = Mirrored::<f16>::poisoned(&gpu, &[4, 128]).narrowed(0, 0, 0);
        let mut out = Mirrored::<f16>::poisoned(&gpu, &[4, 64]).narrowed(0, 0, 0);
        run(&gpu, activation, &mut out, &input, &ActivationOptions::default()).unwrap();
        out.assert_untouched();
    }
}

#[test]
fn graph_replay() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let (rng, options) = (&mut Rng::new(), ActivationOptions::default());
    for activation in ALL {
        let mut input = Mirrored::<bf16>::random(&gpu, rng, &[5, 2048]);
        check(&gpu, activation, &input, &options); // loads the kernel
        let mut out = Mirrored::<bf16>::poisoned(&gpu, &[5, 1024]);
        gpu.synchronize();
        let graph = {
            let (input, mut out) = (input.device_view(), out.device_view_mut());
            captured(&gpu, || (activation.op)(&gpu.stream, &mut out.reborrow(), &input, &options))
        };
        out.assert_untouched(); // captured is not run
        for _ in 0..3 {
            let next = Mirrored::<bf16>::random(&gpu, rng, &[5, 2048]);
            input.upload(&next.host);
            graph.launch().unwrap();
            out.assert_close("replay", &want(activation, &out, &next), bf16::BOUND);
        }
    }
}

#[test]
fn wrong_input() {
    let Some(gpu) = Gpu::start() else { return };
    let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
    let options = ActivationOptions::default();
    let input = Mirrored::<f16>::random(&gpu, rng, &[8, 128]);
    let mut out = Mirrored::<f16>::poisoned(&gpu, &[8, 64]);
    for activation in ALL {
        let op = activation.op;
        {
            let wide = Mirrored::<f16>::random(&gpu, rng, &[8, 136]);
            let brains = Mirrored::<bf16>::random(&gpu, rng, &[8, 128]);
            let singles = Mirrored::<f32>::random(&gpu, rng, &[8, 128]);
            let (input, wide, mut out) = (input.device_view(), wide.device_view(), out.device_view_mut());
            let mut run = |input: TensorRef<'_>| op(&gpu.stream, &mut out.reborrow(), &input, &options);
            refused(run(wide.narrow(1, 0, 128).unwrap()), "input"); // rows apart
            refused(run(wide), "out");
            refused(run(input.narrow(0, 0, 7).unwrap()), "out");
            refused(run(brains.device_view()), "out");
            refused(run(singles.device_view()), "input");
        }
        let numbers: Vec<_> = (0..8 * 128 + 1).map(|_| f16::from_f64(rng.unit())).collect();
        let mut storage = gpu.cuda.clone_htod(&numbers).unwrap();
        {
            let odd = storage.slice(1..);
            let odd = odd.tensor(&gpu.cuda, &[8, 128]).unwrap();
            let call = op(&gpu.stream, &mut out.device_view_mut(), &odd.view(), &options);
            refused(call, "input");
        }
        {
            let mut odd = storage.slice_mut(1..8 * 64 + 1);
            let mut odd = odd.tensor_mut(&gpu.cuda, &[8, 64]).unwrap();
            refused(op(&gpu.stream, &mut odd.view_mut(), &input.device_view(), &options), "out");
        }
        assert_same_bits("untouched", &gpu.cuda.clone_dtoh(&storage).unwrap(), &numbers);
        let call =
            op(&gpu.stream, &mut out.device_view_mut(), &input.copied_to(&other).device_view(), &options);
        refused(call, "input");
        let mut elsewhere = out.copied_to(&other);
        let call = op(&gpu.stream, &mut elsewhere.device_view_mut(), &input.device_view(), &options);
        refused(call, "out");
        elsewhere.assert_untouched();
        other.synchronize();
        out.assert_untouched();
    }
}

/// An error that other code left in the thread is not taken for the launch's.
#[test]
fn errors_of_others() {
    let Some(gpu) = Gpu::start() else { return };
    let input = Mirrored::<f16>::random(&gpu, &mut Rng::new(), &[3, 128]);
    for activation in ALL {
        check(&gpu, activation, &input, &ActivationOptions::default());
        leave_cuda_error();
        check(&gpu, activation, &input, &ActivationOptions::default());
    }
}

/// On the second of two GPUs, while the first is current, which it is
/// afterwards, too.
#[test]
fn the_current_device_is_put_back() {
    let Some(gpu) = Gpu::start() else { return };
    if gpu.runtime.device_count().unwrap() < 2 {
        return say("skipped: there is one GPU only");
    }
    let (rng, second) = (&mut Rng::new(), gpu.on_another());
    for activation in ALL {
        let input = Mirrored::<f16>::random(&second, rng, &[5, 512]);
        let mut out = Mirrored::<f16>::poisoned(&second, &[5, 256]);
        {
            let (input, mut out) = (input.device_view(), out.device_view_mut());
            gpu.cuda.context().bind_to_thread().unwrap();
            let options = ActivationOptions::default();
            (activation.op)(&second.stream, &mut out.reborrow(), &input, &options).unwrap();
            assert_eq!(ctx::get_current().unwrap(), Some(gpu.cuda.context().cu_ctx()));
        }
        out.assert_close("the second GPU", &want(activation, &out, &input), f16::BOUND);
    }
}
