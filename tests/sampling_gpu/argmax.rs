//! The largest logit, against the CPU reference.

use crate::common::{Gpu, Mirrored, Number, Rng, attention::capture, refused};
use cudarc::driver::{CudaSlice, DeviceRepr};
use flashinfer_rs::{Element, Result, gpu::TensorExtMut, reference, sampling::argmax};
use half::{bf16, f16};

/// Integers that tokens are written as.
trait Token: Element + DeviceRepr + Copy + Into<i64> + From<i8> {}
impl Token for i32 {}
impl Token for i64 {}

fn run<I: Token, T: Number>(gpu: &Gpu, output: &mut CudaSlice<I>, logits: &Mirrored<T>) -> Result<()> {
    let rows = logits.shape()[0];
    let mut output = output.tensor_mut(&gpu.cuda, &[rows]).unwrap();
    argmax(&gpu.stream, &mut output.view_mut(), &logits.device_view())
}

fn poisoned<I: Token>(gpu: &Gpu, rows: usize) -> CudaSlice<I> {
    gpu.cuda.clone_htod(&vec![I::from(-7); rows.max(1)]).unwrap()
}

fn tokens<I: Token>(gpu: &Gpu, output: &CudaSlice<I>) -> Vec<i64> {
    let tokens = gpu.cuda.clone_dtoh(output).unwrap();
    gpu.synchronize();
    tokens.into_iter().map(Into::into).collect()
}

#[track_caller]
fn check<T: Number>(gpu: &Gpu, logits: &Mirrored<T>) {
    let want: Vec<i64> = reference::argmax(&logits.view())
        .unwrap()
        .into_iter()
        .map(|token| token.map_or(-1, i64::from))
        .collect();
    let mut narrow = poisoned::<i32>(gpu, want.len());
    run(gpu, &mut narrow, logits).unwrap();
    assert_eq!(tokens(gpu, &narrow), want, "{:?}", logits.shape());
    let mut wide = poisoned::<i64>(gpu, want.len());
    run(gpu, &mut wide, logits).unwrap();
    assert_eq!(tokens(gpu, &wide), want, "{:?}", logits.shape());
    logits.assert_untouched();
}

const SHAPES: [[usize; 2]; 12] = [
    [1, 1],
    [3, 2],
    [40, 31],
    [7, 33],
    [300, 1000],
    [5, 1023],
    [5, 1025],
    [64, 4096],
    [9, 32000],
    [3, 50257],
    [17, 128_256],
    [1, 256_000],
];

/// Random rows, rows of few different numbers, and rows with some that are none.
#[test]
fn all_sizes() {
    fn all<T: Number>(gpu: &Gpu, rng: &mut Rng) {
        for shape in SHAPES {
            check(gpu, &Mirrored::<T>::random_scaled(gpu, rng, &shape, 8.0));
            for (numbers, rare) in [
                (&[0.0, -0.0, -1.0, 0.5, 0.5][..], 1),
                (&[-0.0, 0.0, -1e-30], 1),
                (&[f64::NEG_INFINITY], 1),
                (&[1.0, f64::INFINITY, f64::NEG_INFINITY], 1),
                // One in about as many as there are in a row.
                (&[1.0, 2.0, f64::NAN, -f64::NAN], shape[1]),
            ] {
                let mut number = || {
                    let place = if rng.below(rare) == 0 { rng.below(numbers.len()) } else { 0 };
                    T::from_f64(numbers[place])
                };
                let host = (0..shape[0] * shape[1]).map(|_| number()).collect();
                check(gpu, &Mirrored::new(gpu, &shape, host));
            }
        }
    }
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    all::<f32>(&gpu, rng);
    all::<f16>(&gpu, rng);
    all::<bf16>(&gpu, rng);
}

/// Equal logits, logits of 0, and logits that differ in their last bit: the first
/// of the largest, in every row.
#[test]
fn greedy_is_the_largest() {
    let Some(gpu) = Gpu::start() else { return };
    let (rows, vocab) = (32, 1000);
    for (first, second, rest) in
        [(1.0, 1.0, -1.0), (0.0, 0.0, -1.0), (1e-6, 9.999999e-7, -1.0), (0.0, 0.0, 0.0)]
    {
        let mut host = vec![rest; rows * vocab];
        for row in host.chunks_mut(vocab) {
            (row[100], row[700]) = (first, second);
        }
        let logits = Mirrored::<f32>::new(&gpu, &[rows, vocab], host);
        let mut output = poisoned::<i32>(&gpu, rows);
        run(&gpu, &mut output, &logits).unwrap();
        let want = if first == rest { 0 } else { 100 };
        assert_eq!(tokens(&gpu, &output), vec![want; rows], "{first} and {second}");
    }
}

/// A row of NaN is told, and the rows beside it have their tokens.
#[test]
fn rows_that_are_no_numbers() {
    let Some(gpu) = Gpu::start() else { return };
    let (rows, vocab) = (3, 49152);
    let mut host: Vec<f32> = (0..rows * vocab).map(|at| (at % vocab) as f32).collect();
    host[vocab..2 * vocab].fill(f32::NAN);
    let mut output = poisoned::<i32>(&gpu, rows);
    run(&gpu, &mut output, &Mirrored::new(&gpu, &[rows, vocab], host)).unwrap();
    assert_eq!(tokens(&gpu, &output), [vocab as i64 - 1, -1, vocab as i64 - 1]);
}

/// Captured, it takes what the logits are in each replay.
#[test]
fn graph_replay() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    let shape = [6, 32000];
    let mut logits = Mirrored::<bf16>::random(&gpu, rng, &shape);
    let mut output = poisoned::<i32>(&gpu, 6);
    run(&gpu, &mut output, &logits).unwrap(); // compiles the kernel
    let mut output = poisoned::<i32>(&gpu, 6);
    let (graph, result) = {
        let logits = logits.device_view();
        let mut output = output.tensor_mut(&gpu.cuda, &[6]).unwrap();
        let (mut output, logits) = (output.view_mut(), logits);
        capture(&gpu, || argmax(&gpu.stream, &mut output, &logits))
    };
    result.unwrap();
    let graph = graph.expect("a graph");
    assert_eq!(tokens(&gpu, &output), [-7; 6], "captured is not run");
    for _ in 0..3 {
        let next = Mirrored::<bf16>::random(&gpu, rng, &shape);
        logits.upload(&next.host);
        graph.launch().unwrap();
        let want = reference::argmax(&next.view()).unwrap();
        let want: Vec<_> = want.into_iter().map(|token| i64::from(token.unwrap())).collect();
        assert_eq!(tokens(&gpu, &output), want);
    }
}

/// Without rows nothing is written; tensors of another stream are refused.
#[test]
fn no_rows_and_other_streams() {
    let Some(gpu) = Gpu::start() else { return };
    let other = gpu.elsewhere();
    let logits = Mirrored::<f32>::new(&gpu, &[2, 64], vec![0.5; 128]);
    let mut output = poisoned::<i32>(&gpu, 2);
    {
        let mut output = output.tensor_mut(&gpu.cuda, &[2]).unwrap();
        let (here, elsewhere) = (logits.device_view(), logits.copied_to(&other));
        let none = here.narrow(0, 0, 0).unwrap();
        argmax(&gpu.stream, &mut output.view_mut().narrow(0, 0, 0).unwrap(), &none).unwrap();
        refused(argmax(&gpu.stream, &mut output.view_mut(), &elsewhere.device_view()), "logits");
        refused(argmax(&other.stream, &mut output.view_mut(), &elsewhere.device_view()), "output");
    }
    other.synchronize();
    assert_eq!(tokens(&gpu, &output), [-7; 2]);
}
