//! Batched products of 8-bit floats on the GPU against the CPU reference.
#![cfg(feature = "cudarc")]

mod common;

use common::{Gpu, Mirrored, Number, Rng, attention::capture, refused, say};
use flashinfer_rs::{
    FlashInferError, ModuleName, Result,
    gemm::{Algorithm, BmmFp8Input, CublasLt, bmm_fp8, bmm_fp8_get_algos, bmm_fp8_run_with_algo},
    reference,
};
use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};

/// The hardware keeps sums of 8-bit floats with 14 bits.
const BOUND: f64 = 1e-2;

/// A GPU that multiplies 8-bit floats, and the module.
fn start(gpu: Option<Gpu>) -> Option<(Gpu, CublasLt)> {
    let gpu = gpu?;
    gpu.runtime.preload([&ModuleName::GEMM]).expect("the module gemm, and cuBLAS");
    match CublasLt::new(&gpu.stream) {
        Ok(cublas) => Some((gpu, cublas)),
        Err(error @ FlashInferError::Unsupported { .. }) => {
            assert!(gpu.compute_capability() < (8, 9), "{error}");
            say(&format!("skipped: {error}"));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Factors, scales and the output of one product: `[batch, m, n, k]`.
struct Problem<A, B, D> {
    a: Mirrored<A>,
    b: Mirrored<B>,
    scales: [Mirrored<f32>; 2],
    out: Mirrored<D>,
}

impl<A: Number, B: Number, D: Number> Problem<A, B, D> {
    fn random(gpu: &Gpu, rng: &mut Rng, [batch, m, n, k]: [usize; 4]) -> Self {
        let scale = |number: f64| Mirrored::new(gpu, &[1], vec![number as f32]);
        Self {
            a: Mirrored::random(gpu, rng, &[batch, m, k]),
            b: Mirrored::random(gpu, rng, &[batch, n, k]).permuted(&[0, 2, 1]),
            scales: [scale(0.3 + rng.unit().abs()), scale(-0.2 - rng.unit().abs())],
            out: Mirrored::poisoned(gpu, &[batch, m, n]),
        }
    }

    /// Calls something with the tensors on the device.
    fn with<R>(&mut self, call: impl FnOnce(&mut flashinfer_rs::TensorMut<'_>, &BmmFp8Input<'_>) -> R) -> R {
        let (a, b) = (self.a.device_view(), self.b.device_view());
        let [a_scale, b_scale] = self.scales.each_ref().map(|scale| scale.device_view());
        let input = BmmFp8Input { a, b, a_scale, b_scale };
        call(&mut self.out.device_view_mut(), &input)
    }

    fn run(&mut self, cublas: &mut CublasLt) -> Result<()> {
        self.with(|out, input| bmm_fp8(cublas, out, input))
    }

    fn algorithms(&mut self, cublas: &mut CublasLt) -> Result<Vec<Algorithm>> {
        self.with(|out, input| bmm_fp8_get_algos(cublas, out, input))
    }

    fn run_with(&mut self, cublas: &mut CublasLt, algorithm: &Algorithm) -> Result<()> {
        self.with(|out, input| bmm_fp8_run_with_algo(cublas, out, input, algorithm))
    }

    fn expected(&self) -> Vec<f64> {
        let mut want = self.out.wide();
        let input = BmmFp8Input {
            a: self.a.view(),
            b: self.b.view(),
            a_scale: self.scales[0].view(),
            b_scale: self.scales[1].view(),
        };
        reference::bmm_fp8(&mut self.out.view_of(&mut want), &input).unwrap();
        want
    }

    fn poison(&mut self) {
        let poison = self.out.host.clone();
        self.out.upload(&poison);
    }
}

/// The best algorithm, and then all of them.
fn check<A: Number, B: Number, D: Number>(
    gpu: &Gpu,
    rng: &mut Rng,
    cublas: &mut CublasLt,
    sizes: [usize; 4],
) {
    let mut problem = Problem::<A, B, D>::random(gpu, rng, sizes);
    let (want, what) = (problem.expected(), format!("{} {} {sizes:?}", A::DTYPE, B::DTYPE));
    problem.run(cublas).unwrap();
    problem.out.assert_close(&what, &want, BOUND);
    let algorithms = problem.algorithms(cublas).unwrap();
    assert!(!algorithms.is_empty() && algorithms.len() <= 100, "{what}: {} algorithms", algorithms.len());
    eprintln!("{what}: {} algorithms", algorithms.len());
    for (number, algorithm) in algorithms.iter().enumerate() {
        problem.poison();
        problem.run_with(cublas, algorithm).unwrap();
        problem.out.assert_close(&format!("{what}, algorithm {number}"), &want, BOUND);
    }
}

const SIZES: [[usize; 4]; 8] = [
    [1, 48, 80, 64],
    [16, 48, 80, 64],
    [1, 1, 128, 256],
    [3, 17, 32, 48],
    [1, 128, 512, 256],
    [2, 100, 16, 16],
    [1, 5, 64, 1024],
    [4, 130, 64, 272],
];

fn sizes<D: Number>() {
    let Some((gpu, mut cublas)) = start(Gpu::start()) else { return };
    let ((major, minor, patch), source) = gpu.runtime.cublas_version().unwrap();
    say(&format!("cuBLAS {major}.{minor}.{patch}: {source}"));
    let rng = &mut Rng::new();
    for sizes in SIZES {
        check::<F8E4M3, F8E4M3, D>(&gpu, rng, &mut cublas, sizes);
        check::<F8E4M3, F8E5M2, D>(&gpu, rng, &mut cublas, sizes);
        check::<F8E5M2, F8E4M3, D>(&gpu, rng, &mut cublas, sizes);
    }
}

typed_tests! {
    sizes_f16: sizes::<f16>();
    sizes_bf16: sizes::<bf16>();
}

/// Columns that are a multiple of 8 but not of 16: cuBLASLt may have an
/// algorithm or not, and says so.
#[test]
fn columns_that_cublas_may_refuse() {
    let Some((gpu, mut cublas)) = start(Gpu::start()) else { return };
    let rng = &mut Rng::new();
    for n in [8, 24, 72] {
        let mut problem = Problem::<F8E4M3, F8E4M3, bf16>::random(&gpu, rng, [1, 32, n, 64]);
        let algorithms = problem.algorithms(&mut cublas).unwrap();
        match problem.run(&mut cublas) {
            Ok(()) => {
                assert!(!algorithms.is_empty());
                let want = problem.expected();
                problem.out.assert_close(&format!("{n} columns"), &want, BOUND);
            }
            Err(FlashInferError::TvmFfiCall { message, .. }) => {
                assert!(algorithms.is_empty() && message.contains("bmm_fp8_internal_cublaslt"), "{message}");
                say(&format!("{n} columns: {message}"));
                problem.out.assert_untouched();
            }
            Err(other) => panic!("{other}"),
        }
    }
}

/// Two streams, each with scratch memory of its own.
#[test]
fn streams() {
    let Some((gpu, _)) = start(Gpu::start()) else { return };
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let (gpu, rng) = (gpu.fork(), &mut Rng::new());
                let mut cublas = CublasLt::new(&gpu.stream).unwrap();
                check::<F8E4M3, F8E4M3, f16>(&gpu, rng, &mut cublas, [2, 65, 96, 512]);
            });
        }
    });
}

/// A device's handle outlives whoever asked for it first.
#[test]
fn handles_stay() {
    let Some((gpu, first)) = start(Gpu::start()) else { return };
    let rng = &mut Rng::new();
    let mut second = CublasLt::new(&gpu.stream).unwrap();
    drop(first);
    check::<F8E4M3, F8E4M3, f16>(&gpu, rng, &mut second, [1, 33, 64, 128]);
    drop(second);
    let mut third = CublasLt::new(&gpu.stream).unwrap();
    check::<F8E4M3, F8E4M3, f16>(&gpu, rng, &mut third, [1, 33, 64, 128]);
}

/// Captured products, replayed for other numbers and scales.
#[test]
fn graph_replay() {
    let Some((gpu, mut cublas)) = start(Gpu::start_alone()) else { return };
    let rng = &mut Rng::new();
    let sizes = [2, 33, 64, 128];
    let mut resident = Problem::<F8E4M3, F8E5M2, bf16>::random(&gpu, rng, sizes);
    let algorithms = resident.algorithms(&mut cublas).unwrap();
    for algorithm in [None, algorithms.first(), algorithms.last()] {
        let call =
            |cublas: &mut CublasLt, out: &mut flashinfer_rs::TensorMut<'_>, input: &BmmFp8Input<'_>| {
                match algorithm {
                    None => bmm_fp8(cublas, out, input),
                    Some(algorithm) => bmm_fp8_run_with_algo(cublas, out, input, algorithm),
                }
            };
        resident.with(|out, input| call(&mut cublas, out, input)).unwrap(); // loads the kernel
        resident.poison();
        let (graph, (run, new)) = resident.with(|out, input| {
            capture(&gpu, || (call(&mut cublas, out, input), CublasLt::new(&gpu.stream).map(drop)))
        });
        run.unwrap();
        refused(new, "stream");
        let graph = graph.expect("a graph");
        resident.out.assert_untouched(); // captured is not run
        for _ in 0..3 {
            let step = Problem::<F8E4M3, F8E5M2, bf16>::random(&gpu, rng, sizes);
            resident.a.upload(&step.a.host);
            resident.b.upload(&step.b.host);
            for (to, from) in resident.scales.iter_mut().zip(&step.scales) {
                to.upload(&from.host);
            }
            resident.poison();
            graph.launch().unwrap();
            resident.out.assert_close("replay", &step.expected(), BOUND);
        }
    }
}

#[test]
fn nothing_to_do() {
    let Some((gpu, mut cublas)) = start(Gpu::start()) else { return };
    let rng = &mut Rng::new();
    for sizes in [[0, 4, 16, 16], [2, 0, 16, 16], [2, 4, 0, 16]] {
        let mut problem = Problem::<F8E4M3, F8E4M3, f16>::random(&gpu, rng, sizes);
        problem.run(&mut cublas).unwrap();
        assert!(problem.algorithms(&mut cublas).unwrap().is_empty());
        problem.out.assert_untouched();
    }
}

/// What concerns streams, algorithms and real tensors; shapes, types and layouts
/// are tested where no GPU is needed, in `src/ops/gemm/bmm_fp8.rs`.
#[test]
fn wrong_input() {
    let Some((gpu, mut cublas)) = start(Gpu::start()) else { return };
    let rng = &mut Rng::new();
    let mut problem = Problem::<F8E4M3, F8E4M3, f16>::random(&gpu, rng, [2, 16, 32, 64]);
    let algorithm = problem.algorithms(&mut cublas).unwrap()[0];
    let mut elsewhere = Problem::<F8E4M3, F8E4M3, f16>::random(&gpu.elsewhere(), rng, [2, 16, 32, 64]);
    refused(elsewhere.run(&mut cublas), "a");

    // Algorithms of other sizes and types.
    for sizes in [[1, 16, 32, 64], [2, 17, 32, 64], [2, 16, 48, 64], [2, 16, 32, 80]] {
        let mut unlike = Problem::<F8E4M3, F8E4M3, f16>::random(&gpu, rng, sizes);
        refused(unlike.run_with(&mut cublas, &algorithm), "algorithm");
        unlike.out.assert_untouched();
    }
    let mut unlike = Problem::<F8E4M3, F8E4M3, bf16>::random(&gpu, rng, [2, 16, 32, 64]);
    refused(unlike.run_with(&mut cublas, &algorithm), "algorithm");
    let mut unlike = Problem::<F8E4M3, F8E5M2, f16>::random(&gpu, rng, [2, 16, 32, 64]);
    refused(unlike.run_with(&mut cublas, &algorithm), "algorithm");

    // Rows that start where cuBLASLt does not expect them.
    let mut shifted = Problem::<F8E4M3, F8E4M3, f16>::random(&gpu, rng, [1, 16, 32, 64]);
    shifted.a = Mirrored::random(&gpu, rng, &[1, 17, 64]).narrowed(1, 1, 16);
    refused(shifted.run(&mut cublas), "a");
    // Both e5m2, and a row-major factor.
    let mut e5m2 = Problem::<F8E5M2, F8E5M2, f16>::random(&gpu, rng, [1, 16, 32, 64]);
    refused(e5m2.run(&mut cublas), "b");
    let mut row_major = Problem::<F8E4M3, F8E4M3, f16>::random(&gpu, rng, [1, 16, 32, 64]);
    row_major.b = Mirrored::random(&gpu, rng, &[1, 64, 32]);
    refused(row_major.run(&mut cublas), "b");

    problem.out.assert_untouched();
    problem.run_with(&mut cublas, &algorithm).unwrap();
    let want = problem.expected();
    problem.out.assert_close("after the refusals", &want, BOUND);
}
