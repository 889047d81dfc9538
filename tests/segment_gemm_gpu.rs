//! Segment GEMM on the GPU against the CPU reference.
#![cfg(feature = "cudarc")]

mod common;

use std::thread;

use common::{Gpu, Mirrored, Number, Rng, assert_same_bits, attention::capture, leave_cuda_error, refused};
use flashinfer_rs::{
    FlashInferError, Result,
    gemm::{GemmBackend, SegmentGemm, SegmentGemmInput},
    indices::{SegmentIndices, SegmentTable},
    reference,
};
use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};

/// Segments that a `SegmentGemm` of these tests has room for.
const MAX_SEGMENTS: usize = 100;
/// The bound of products of 8-bit floats, whose sums the hardware keeps with 14
/// bits.
const BYTES_BOUND: f64 = 1e-2;

/// The backends that the GPU has.
fn backends(gpu: &Gpu) -> &'static [GemmBackend] {
    match gpu.compute_capability() {
        (9, 0) => &[GemmBackend::Sm80, GemmBackend::Sm90],
        _ => &[GemmBackend::Sm80],
    }
}

fn gemm(gpu: &Gpu, backend: GemmBackend) -> SegmentGemm {
    let gemm = SegmentGemm::new(&gpu.stream, MAX_SEGMENTS, backend).unwrap();
    assert_eq!(gemm.backend(), backend);
    gemm
}

#[derive(Clone, Debug)]
struct Case {
    lens: Vec<usize>,
    weight_indices: Option<Vec<usize>>,
    k: usize,
    n: usize,
    column_major: bool,
}

impl Case {
    fn new(lens: &[usize], k: usize, n: usize, column_major: bool) -> Self {
        Self { lens: lens.to_vec(), weight_indices: None, k, n, column_major }
    }

    fn rows(&self) -> usize {
        self.lens.iter().sum()
    }

    fn indices(&self) -> SegmentIndices {
        let segments = SegmentIndices::from_lens(self.lens.iter().copied()).unwrap();
        match &self.weight_indices {
            Some(indices) => segments.with_weight_indices(indices).unwrap(),
            None => segments,
        }
    }
}

/// Rows, weights, and the output of one product.
struct Problem<X, Y> {
    case: Case,
    x: Mirrored<X>,
    weights: Mirrored<X>,
    out: Mirrored<Y>,
}

impl<X: Number, Y: Number> Problem<X, Y> {
    fn random(gpu: &Gpu, rng: &mut Rng, case: &Case) -> Self {
        let (rows, k, n) = (case.rows(), case.k, case.n);
        // One weight more than is needed.
        let weights = case.indices().num_weights() + 1;
        let shape = if case.column_major { [weights, n, k] } else { [weights, k, n] };
        Self {
            case: case.clone(),
            x: Mirrored::random(gpu, rng, &[rows, k]),
            weights: Mirrored::random(gpu, rng, &shape),
            out: Mirrored::poisoned(gpu, &[rows, n]),
        }
    }

    fn run_with(&mut self, gemm: &mut SegmentGemm, table: &SegmentTable) -> Result<()> {
        let (x, weights) = (self.x.device_view(), self.weights.device_view());
        let input = SegmentGemmInput { x, weights, weight_column_major: self.case.column_major };
        gemm.run(&mut self.out.device_view_mut(), &input, table)
    }

    fn run(&mut self, gpu: &Gpu, gemm: &mut SegmentGemm) -> Result<()> {
        let table = SegmentTable::new(&gpu.stream, self.case.indices()).unwrap();
        self.run_with(gemm, &table)
    }

    fn expected(&self) -> Vec<f64> {
        let mut want = self.out.wide();
        let input = SegmentGemmInput {
            x: self.x.view(),
            weights: self.weights.view(),
            weight_column_major: self.case.column_major,
        };
        reference::segment_gemm(&mut self.out.view_of(&mut want), &input, &self.case.indices()).unwrap();
        want
    }

    /// The output that is on the device is the reference's.
    #[track_caller]
    fn verify(&self, what: &str, out: &Mirrored<Y>) {
        let bound = if size_of::<X>() == 1 { BYTES_BOUND } else { Y::BOUND };
        out.assert_close(&format!("{what}: {} {:?}", X::DTYPE, self.case), &self.expected(), bound);
    }

    #[track_caller]
    fn check(&mut self, gpu: &Gpu, gemm: &mut SegmentGemm) {
        self.run(gpu, gemm).unwrap();
        self.verify(&format!("{:?}", gemm.backend()), &self.out);
    }
}

/// One row, a tile, rows that no tile divides, empty segments in front, in
/// between and behind.
const LENS: [&[usize]; 7] =
    [&[1], &[7], &[128], &[1, 2, 3, 4], &[0, 5, 0, 0, 130, 1, 0], &[129, 64, 1], &[0, 0, 3]];

fn sizes<T: Number>() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for &backend in backends(&gpu) {
        let mut gemm = gemm(&gpu, backend);
        for column_major in [false, true] {
            for lens in LENS {
                let case = Case::new(lens, 64, 72, column_major);
                Problem::<T, T>::random(&gpu, rng, &case).check(&gpu, &mut gemm);
            }
            for (k, n) in [(8, 8), (8, 264), (16, 24), (128, 256), (200, 136), (520, 8), (1024, 128)] {
                let case = Case::new(&[5, 0, 33], k, n, column_major);
                Problem::<T, T>::random(&gpu, rng, &case).check(&gpu, &mut gemm);
            }
        }
    }
}

typed_tests! {
    sizes_f16: sizes::<f16>();
    sizes_bf16: sizes::<bf16>();
}

#[test]
fn bytes() {
    fn run<X: Number, Y: Number>(gpu: &Gpu, rng: &mut Rng, gemm: &mut SegmentGemm) {
        for lens in LENS {
            Problem::<X, Y>::random(gpu, rng, &Case::new(lens, 64, 72, true)).check(gpu, gemm);
        }
        for (k, n) in [(16, 8), (32, 264), (208, 136), (528, 8), (512, 256)] {
            Problem::<X, Y>::random(gpu, rng, &Case::new(&[5, 0, 300], k, n, true)).check(gpu, gemm);
        }
    }
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    if !backends(&gpu).contains(&GemmBackend::Sm90) {
        return common::say("no products of 8-bit floats: they need compute capability 9.0");
    }
    let mut gemm = gemm(&gpu, GemmBackend::Sm90);
    run::<F8E4M3, f16>(&gpu, rng, &mut gemm);
    run::<F8E4M3, bf16>(&gpu, rng, &mut gemm);
    run::<F8E5M2, f16>(&gpu, rng, &mut gemm);
    run::<F8E5M2, bf16>(&gpu, rng, &mut gemm);
}

/// Weights that several segments share, that none uses, and in any order.
#[test]
fn weight_indices() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for &backend in backends(&gpu) {
        let mut gemm = gemm(&gpu, backend);
        for column_major in [false, true] {
            for indices in [[0, 0, 0, 0], [3, 2, 1, 0], [5, 0, 5, 9]] {
                let weight_indices = Some(indices.to_vec());
                let case = Case { weight_indices, ..Case::new(&[3, 70, 0, 12], 96, 40, column_major) };
                Problem::<bf16, bf16>::random(&gpu, rng, &case).check(&gpu, &mut gemm);
            }
        }
    }
}

/// More segments than the kernels look at in one step, which is 32.
#[test]
fn many_segments() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let ones = vec![1; MAX_SEGMENTS];
    let mut gaps = vec![0; MAX_SEGMENTS];
    (gaps[40], gaps[41], gaps[99]) = (200, 1, 5);
    let random: Vec<_> = (0..77).map(|_| rng.below(5)).collect();
    for &backend in backends(&gpu) {
        let mut gemm = gemm(&gpu, backend);
        for lens in [&ones, &gaps, &random] {
            let weight_indices = Some(lens.iter().map(|_| rng.below(6)).collect());
            let case = Case { weight_indices, ..Case::new(lens, 64, 136, true) };
            Problem::<f16, f16>::random(&gpu, rng, &case).check(&gpu, &mut gemm);
        }
    }
}

#[test]
fn strided_rows() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for &backend in backends(&gpu) {
        let mut gemm = gemm(&gpu, backend);
        for column_major in [false, true] {
            let case = Case::new(&[4, 0, 150], 64, 48, column_major);
            let mut problem = Problem::<f16, f16>::random(&gpu, rng, &case);
            problem.x = Mirrored::random(&gpu, rng, &[case.rows(), 64 + 24]).narrowed(1, 8, 64);
            problem.check(&gpu, &mut gemm);
        }
    }
}

/// Products that follow each other without a pause: each has its own tensors,
/// types and segments, and all use the same scratch memory.
#[test]
fn runs_in_a_row() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for &backend in backends(&gpu) {
        let mut gemm = gemm(&gpu, backend);
        let case = |lens: &[usize], n| Case::new(lens, 256, n, true);
        let mut first = Problem::<f16, f16>::random(&gpu, rng, &case(&[200, 31, 1], 512));
        let mut second = Problem::<bf16, bf16>::random(&gpu, rng, &case(&[1, 1], 64));
        let mut third = Problem::<f16, f16>::random(&gpu, rng, &case(&[60, 0, 2, 9], 128));
        first.run(&gpu, &mut gemm).unwrap();
        second.run(&gpu, &mut gemm).unwrap();
        third.run(&gpu, &mut gemm).unwrap();
        first.verify("first", &first.out);
        second.verify("second", &second.out);
        third.verify("third", &third.out);
        // The same again, over what the output holds now.
        let before = first.out.download();
        first.run(&gpu, &mut gemm).unwrap();
        assert_same_bits("again", &first.out.download(), &before);
    }
}

/// A captured product, replayed for other numbers and other segments.
#[test]
fn graph_replay() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    for &backend in backends(&gpu) {
        let mut gemm = gemm(&gpu, backend);
        let weight_indices = Some(vec![0, 1, 2, 3]);
        let case = Case { weight_indices, ..Case::new(&[70, 20, 10, 0], 128, 72, true) };
        let mut resident = Problem::<bf16, bf16>::random(&gpu, rng, &case);
        resident.check(&gpu, &mut gemm); // loads the kernel
        let mut table = SegmentTable::new(&gpu.stream, case.indices()).unwrap();
        let poison = vec![bf16::NAN; resident.out.host.len()];
        resident.out.upload(&poison);
        let (graph, captured) = {
            let (x, weights) = (resident.x.device_view(), resident.weights.device_view());
            let mut out = resident.out.device_view_mut();
            let mut out = out.reborrow();
            let input = SegmentGemmInput::column_major(x, weights);
            capture(&gpu, || {
                let run = gemm.run(&mut out, &input, &table);
                (run, SegmentGemm::new(&gpu.stream, 4, backend).map(drop))
            })
        };
        let (run, new) = captured;
        run.unwrap();
        refused(new, "stream");
        let graph = graph.expect("a graph");
        resident.out.assert_untouched(); // captured is not run
        // Something else uses the scratch memory in between.
        Problem::<f16, f16>::random(&gpu, rng, &Case::new(&[3, 3], 64, 64, false)).check(&gpu, &mut gemm);
        for (lens, indices) in [
            ([70, 20, 10, 0], [0, 1, 2, 3]),
            ([1, 0, 0, 99], [3, 0, 0, 1]),
            ([0, 100, 0, 0], [0, 2, 1, 3]),
            ([25, 25, 25, 25], [1, 1, 1, 1]),
        ] {
            let case = Case { lens: lens.to_vec(), weight_indices: Some(indices.to_vec()), ..case.clone() };
            let mut step = Problem::<bf16, bf16>::random(&gpu, rng, &case);
            // As many weights as the resident tensor has.
            step.weights = Mirrored::random(&gpu, rng, &[5, case.n, case.k]);
            table.update(case.indices()).unwrap();
            resident.x.upload(&step.x.host);
            resident.weights.upload(&step.weights.host);
            resident.out.upload(&poison);
            graph.launch().unwrap();
            step.verify("replay", &resident.out);
        }
    }
}

/// Streams that work at the same time, each with scratch memory of its own.
#[test]
fn threads() {
    let Some(gpu) = Gpu::start() else { return };
    for &backend in backends(&gpu) {
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let (gpu, rng) = (gpu.fork(), &mut Rng::new());
                    let mut gemm = gemm(&gpu, backend);
                    for n in [64, 200] {
                        let case = Case::new(&[50, 3, 140], 128, n, true);
                        Problem::<f16, f16>::random(&gpu, rng, &case).check(&gpu, &mut gemm);
                    }
                });
            }
        });
    }
}

/// An error that other code left in the thread neither fails a run nor ends the
/// process.
#[test]
fn errors_of_others() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for &backend in backends(&gpu) {
        let mut gemm = gemm(&gpu, backend);
        let mut problem = Problem::<f16, f16>::random(&gpu, rng, &Case::new(&[5, 30], 64, 48, true));
        problem.check(&gpu, &mut gemm);
        leave_cuda_error();
        problem.check(&gpu, &mut gemm);
    }
}

#[test]
fn nothing_to_do() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for &backend in backends(&gpu) {
        let mut gemm = gemm(&gpu, backend);
        for case in
            [Case::new(&[], 64, 48, true), Case::new(&[0, 0], 64, 48, false), Case::new(&[3, 4], 64, 0, true)]
        {
            let mut problem = Problem::<f16, f16>::random(&gpu, rng, &case);
            problem.run(&gpu, &mut gemm).unwrap();
            problem.out.assert_untouched();
        }
    }
}

/// What concerns streams and real tensors; shapes, types and layouts are tested
/// where no GPU is needed, in `src/ops/gemm/sizes.rs`.
#[test]
fn wrong_input() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let other = gpu.elsewhere();
    for &backend in backends(&gpu) {
        let mut gemm = gemm(&gpu, backend);
        let case = Case::new(&[3, 4], 64, 48, true);
        let mut problem = Problem::<f16, f16>::random(&gpu, rng, &case);
        let table = |gpu: &Gpu, lens: &[usize]| {
            let segments = SegmentIndices::from_lens(lens.iter().copied()).unwrap();
            SegmentTable::new(&gpu.stream, segments).unwrap()
        };
        refused(problem.run_with(&mut gemm, &table(&other, &[3, 4])), "segments");
        let mut elsewhere = Problem::<f16, f16>::random(&other, rng, &case);
        refused(elsewhere.run_with(&mut gemm, &table(&gpu, &[3, 4])), "x");
        refused(problem.run_with(&mut gemm, &table(&gpu, &[3, 5])), "segments");
        refused(problem.run_with(&mut gemm, &table(&gpu, &[3, 3])), "segments");
        let mut lens = vec![0; MAX_SEGMENTS + 1];
        lens[0] = 7;
        refused(problem.run_with(&mut gemm, &table(&gpu, &lens)), "segments");
        // Three weights are there.
        refused(problem.run_with(&mut gemm, &table(&gpu, &[3, 2, 1, 1])), "segments");
        // Every second row of a matrix whose rows are no whole vectors apart.
        let x = problem.x;
        problem.x = Mirrored::random(&gpu, rng, &[7, 68]).narrowed(1, 0, 64);
        refused(problem.run(&gpu, &mut gemm), "x");
        problem.x = x;
        problem.out.assert_untouched();
        problem.check(&gpu, &mut gemm);

        let mut table = SegmentTable::with_capacity(&gpu.stream, case.indices(), 3).unwrap();
        refused(table.update(SegmentIndices::from_lens([1; 4]).unwrap()), "capacity");
        let large = SegmentTable::with_capacity(&gpu.stream, case.indices(), 1);
        refused(large, "capacity");
        // The refused update changed nothing.
        problem.run_with(&mut gemm, &table).unwrap();
        problem.verify("after a refused update", &problem.out);
    }
    refused(SegmentGemm::new(&gpu.stream, usize::MAX, GemmBackend::Auto), "max_segments");
}

#[test]
fn backends_are_chosen() {
    let Some(gpu) = Gpu::start() else { return };
    let auto = SegmentGemm::new(&gpu.stream, 4, GemmBackend::Auto).unwrap();
    assert_eq!(Some(&auto.backend()), backends(&gpu).last());
    assert_eq!((auto.max_segments(), auto.stream()), (4, &gpu.stream));
    match (backends(&gpu).len(), SegmentGemm::new(&gpu.stream, 4, GemmBackend::Sm90)) {
        (2, Ok(gemm)) => assert_eq!(gemm.backend(), GemmBackend::Sm90),
        (1, Err(error @ FlashInferError::Unsupported { .. })) => {
            assert!(error.to_string().contains("9.0 exactly"), "{error}");
        }
        (_, other) => panic!("{other:?}"),
    }
}
