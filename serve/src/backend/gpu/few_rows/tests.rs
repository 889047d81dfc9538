//! What is fused with products of few rows, against sums in `f64`, on the GPU.

use flashinfer_rs::Stream;
use test_support::Rng;

use super::{
    super::{
        half::HalfTensor,
        quantize::{QuantizedRows, Quantizer},
        start,
    },
    *,
};
use crate::{model::synthetic::Shape, tests::gpu::turn};

/// What is computed.
#[derive(Clone, Copy, Debug)]
struct Case {
    product: Product,
    norm: bool,
    activation: Option<Activation>,
    sum: bool,
}

const EPS: f64 = 1e-3;

/// Random numbers of a type, and what they are.
fn random(stream: &Stream, rng: &mut Rng, dtype: DType, shape: &[usize]) -> (HalfTensor, Vec<f64>) {
    let numbers: Vec<_> = (0..shape.iter().product()).map(|_| rng.unit() as f32).collect();
    let tensor = HalfTensor::rounded(stream, dtype, shape, &numbers).unwrap();
    let numbers = tensor.to_f64();
    (tensor, numbers)
}

fn activated(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + (std::f64::consts::FRAC_2_PI.sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
    }
}

/// A row as it is normed.
fn normed(row: &[f64], weight: &[f64]) -> Vec<f64> {
    let root = (row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64 + EPS).sqrt();
    row.iter().zip(weight).map(|(x, weight)| x / root * weight).collect()
}

fn check(cuda: &Arc<CudaStream>, rng: &mut Rng, case: Case) {
    let Case { product, norm, activation, sum } = case;
    let Product { rows, input, output, factor, added, dtype, out_dtype } = product;
    let stream = Stream::from(cuda);
    let Some(few_rows) = FewRows::new(cuda, out_dtype).unwrap() else { return };
    let (x, x_numbers) = random(&stream, rng, out_dtype, &[rows, input]);
    let (weight, mut weight_numbers) = random(&stream, rng, out_dtype, &[output, input]);
    let (norm_weight, norm_numbers) = random(&stream, rng, out_dtype, &[input]);
    let (bias, bias_numbers) = random(&stream, rng, out_dtype, &[output]);
    let outputs = if activation.is_some() { output / 2 } else { output };
    let (_, before) = random(&stream, rng, out_dtype, &[rows, outputs]);
    let mut quantized = QuantizedRows::zeros(&stream, output, output * input).unwrap();
    let mut matrix = weight.view().into();
    if dtype == DType::E4M3 {
        let quantizer = Quantizer::new(cuda, out_dtype).unwrap();
        quantizer.quantize(&mut quantized, &weight.view(), output).unwrap();
        (matrix, weight_numbers) = (quantized.view(), quantized.to_f64(input));
    }
    let weight = Weight { matrix, bias: (added == Added::Bias).then(|| bias.view()) };
    let norm = norm.then(|| RowNorm { weight: norm_weight.view(), eps: EPS });
    let fused = Fused { norm, activation, sum };
    let norm = norm.is_some();
    let mut want = Vec::new();
    let before32: Vec<_> = before.iter().map(|&x| x as f32).collect();
    for (row, x) in x_numbers.chunks_exact(input).enumerate() {
        let x = if norm { normed(x, &norm_numbers) } else { x.to_vec() };
        let made: Vec<f64> = weight_numbers
            .chunks_exact(input)
            .zip(&bias_numbers)
            .map(|(weight, bias)| {
                let sum: f64 = x.iter().zip(weight).map(|(a, b)| a * b).sum();
                sum * f64::from(factor) + if added == Added::Bias { *bias } else { 0.0 }
            })
            .collect();
        want.extend((0..outputs).map(|at| {
            let result = match activation {
                Some(activation) => activated(activation, made[at]) * made[outputs + at],
                None => made[at],
            };
            result + if sum { before[row * outputs + at] } else { 0.0 }
        }));
    }
    let bound = if out_dtype == DType::BF16 { 2e-2 } else { 3e-3 };
    for kernel in 0..few_rows.kernels() {
        let mut out = HalfTensor::rounded(&stream, out_dtype, &[rows, outputs], &before32).unwrap();
        few_rows.run(kernel, &product, &fused, &mut out.view_mut(), &x.view(), &weight).unwrap();
        let norm = |row: &mut dyn Iterator<Item = f64>| row.map(|x| x * x).sum::<f64>().sqrt();
        let got = out.to_f64();
        for (got, want) in got.chunks_exact(outputs).zip(want.chunks_exact(outputs)) {
            let off = norm(&mut got.iter().zip(want).map(|(a, b)| a - b)) / norm(&mut want.iter().copied());
            // What is not a number is not within a bound.
            assert!(off <= bound, "{case:?}, kernel {kernel}: a row is off by {off:.1e}");
        }
    }
}

#[test]
fn what_is_fused_is_what_would_be_computed_one_by_one() {
    let Some(_turn) = turn() else { return };
    let cuda = start(&Shape::Llama8b.config().unwrap(), 0).unwrap();
    let mut rng = Rng::new();
    let (silu, gelu) = (Some(Activation::Silu), Some(Activation::GeluTanh));
    for (out_dtype, dtype) in [
        (DType::F16, DType::F16),
        (DType::BF16, DType::BF16),
        (DType::F16, DType::E4M3),
        (DType::BF16, DType::E4M3),
    ] {
        for (norm, activation, sum) in [
            (true, None, false),
            (false, None, true),
            (true, silu, false),
            (false, gelu, true),
            (true, None, true),
        ] {
            for rows in [1, 2, 3, 5, 8] {
                // Widths of less than a read of a warp, and of several groups; halves that end within a
                // tile; more tiles than blocks.
                let many_tiles = (rows == 1 || rows == 8).then_some([1200, 2306]);
                for [input, output] in [[96, 42], [576, 330], [1200, 50]].into_iter().chain(many_tiles) {
                    let added = if rows == 2 { Added::Bias } else { Added::Nothing };
                    let product = Product { rows, input, output, factor: 0.25, added, dtype, out_dtype };
                    check(&cuda, &mut rng, Case { product, norm, activation, sum });
                }
            }
        }
    }
}

#[test]
fn what_cannot_be_fused_is_refused() {
    let Some(_turn) = turn() else { return };
    let cuda = start(&Shape::Llama8b.config().unwrap(), 0).unwrap();
    let stream = Stream::from(&cuda);
    let Some(few_rows) = FewRows::new(&cuda, DType::F16).unwrap() else { return };
    let zeros = |shape: &[usize]| HalfTensor::zeros(&stream, DType::F16, shape).unwrap();
    let run = |product: Product, fused: &Fused<'_>| {
        let Product { rows, input, output, .. } = product;
        let (mut out, x, weight) = (zeros(&[rows, output]), zeros(&[rows, input]), zeros(&[output, input]));
        let weight = Weight { matrix: weight.view().into(), bias: None };
        let ran = few_rows.run(0, &product, fused, &mut out.view_mut(), &x.view(), &weight);
        ran.map_err(|error| error.to_string())
    };
    let product = |rows, input, output| Product {
        rows,
        input,
        output,
        factor: 1.0,
        added: Added::Nothing,
        dtype: DType::F16,
        out_dtype: DType::F16,
    };
    let refused = |product, fused: &Fused<'_>, said: &str| {
        let error = run(product, fused).unwrap_err();
        assert!(error.contains(said), "{error}");
    };
    run(product(8, 64, 64), &Fused::default()).unwrap();
    refused(product(9, 64, 64), &Fused::default(), "not one of few rows");
    let gated = Fused { activation: Some(Activation::Silu), ..Fused::default() };
    // The output is twice as wide as the results.
    refused(product(1, 64, 128), &gated, "out of");
    refused(product(1, 64, 127), &gated, "cannot have");
    // Eight rows that shared memory has no room for, and a weight of another width.
    let weight = zeros(&[65536]);
    let norm = Some(RowNorm { weight: weight.view(), eps: EPS });
    refused(product(8, 65536, 16), &Fused { norm, ..Fused::default() }, "cannot have");
    refused(product(1, 64, 64), &Fused { norm, ..Fused::default() }, "norm of");
}
