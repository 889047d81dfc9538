//! Sums of two GPUs.

use std::iter;

use cudarc::driver::result;

use super::{
    super::{
        few_rows::{FewRows, Fused},
        start,
    },
    *,
};
use crate::{
    backend::{
        graph,
        matmul::{Added, Product, Weight},
    },
    group::tests::with_ranks,
    model::synthetic::Shape,
    tests::gpu::{ranks::has_two, turn},
};

/// A product that takes long enough to be read before it is written.
const ROWS: usize = 8;
const INPUT: usize = 8192;
const OUTPUT: usize = 4096;
const REPLAYS: usize = 50;

/// A rank's part of a product, and the sum of both, as they lie in a graph. Numbers are powers of two, whose sums
/// are exact, and what is added up is no number until the product is done.
#[test]
fn sums_wait_for_what_they_add_up() {
    let Some(_turn) = turn() else { return };
    if !has_two() {
        return;
    }
    // How many were wrong: a rank that panics leaves the other one waiting on its GPU.
    let wrong = with_ranks(2, |group| {
        let rank = group.rank();
        let cuda = start(&Shape::Llama8b.config().unwrap(), rank.rank).unwrap();
        let (stream, dtype) = (Stream::from(&cuda), DType::F16);
        let ranks = Ranks::meet(&group, &cuda).unwrap();
        let filled = |shape: &[usize], number: f32| {
            let numbers: Vec<_> = iter::repeat_n(number, shape.iter().product()).collect();
            HalfTensor::rounded(&stream, dtype, shape, &numbers).unwrap()
        };
        let x = filled(&[ROWS, INPUT], 0.5);
        let matrix = filled(&[OUTPUT, INPUT], if rank.rank == 0 { 1.0 } else { 2.0 } / INPUT as f32);
        let weight = Weight { matrix: matrix.view().into(), bias: None };
        let product = Product {
            rows: ROWS,
            input: INPUT,
            output: OUTPUT,
            factor: 1.0,
            added: Added::Nothing,
            dtype,
            out_dtype: dtype,
        };
        let few_rows = FewRows::new(&cuda, dtype).unwrap().expect("kernels of few rows");
        let mut out = ranks.zeros(dtype, &[ROWS, OUTPUT]).unwrap();
        assert!(matches!(out, HalfTensor::Registered(_)), "ranks do not reach each other's memory");
        let mut wrong = vec![0; few_rows.kernels()];
        for (kernel, wrong) in wrong.iter_mut().enumerate() {
            let mut run = || -> Result<()> {
                let mut out = out.view_mut();
                // SAFETY: so many bytes are there.
                unsafe {
                    let bytes = ROWS * OUTPUT * dtype.size();
                    result::memset_d8_async(out.data_ptr() as u64, 0xff, bytes, cuda.cu_stream())?;
                }
                few_rows.run(kernel, &product, &Fused::default(), &mut out, &x.view(), &weight)?;
                ranks.all_reduce(&mut out)
            };
            run().unwrap();
            // SAFETY: all that it works on outlives it.
            let step = unsafe { graph::capture(&stream, &mut run) }.unwrap();
            for _ in 0..REPLAYS {
                step.launch(&()).unwrap();
                cuda.synchronize().unwrap();
                *wrong += out.to_f64().into_iter().filter(|&sum| sum != 1.5).count();
            }
        }
        wrong
    });
    assert!(
        wrong.iter().flatten().all(|&wrong| wrong == 0),
        "sums that are not 1.5, by rank and kernel: {wrong:?}"
    );
}
