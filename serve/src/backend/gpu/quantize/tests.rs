//! The kernel and cuBLASLt's products of what it makes, on the GPU.

use test_support::Rng;

use super::{
    super::{
        few_rows::{FewRows, Fused},
        half::HalfTensor,
        start,
    },
    *,
};
use crate::{
    backend::matmul::{Added, Choice, CublasLt, Matmul, Product, Weight},
    model::synthetic::Shape,
    tests::gpu::turn,
};

impl QuantizedRows {
    /// The numbers of rows, each times its scale.
    pub fn to_f64(&self, width: usize) -> Vec<f64> {
        let (numbers, scales) = (self.numbers.to_vec().unwrap(), self.scales.to_vec().unwrap());
        let scaled = numbers.chunks_exact(width).zip(scales);
        scaled.flat_map(|(row, scale)| row.iter().map(move |x| x.to_f64() * f64::from(scale))).collect()
    }
}

#[test]
fn rows_are_rounded_to_their_scale() {
    const WIDTH: usize = 1040;
    let Some(_turn) = turn() else { return };
    let cuda = start(&Shape::Llama8b.config().unwrap(), 0).unwrap();
    let (stream, mut rng) = (Stream::from(&cuda), Rng::new());
    for dtype in [DType::F16, DType::BF16] {
        let quantizer = Quantizer::new(&cuda, dtype).unwrap();
        // Rows of other sizes, of zeros, with NaN, with infinity.
        let sizes = [1.0, 3e4, 6e-5, 0.0, 1.0, 1.0];
        let mut rows: Vec<f32> = sizes
            .iter()
            .flat_map(|size| (0..WIDTH).map(|_| rng.unit() as f32 * size).collect::<Vec<_>>())
            .collect();
        rows[4 * WIDTH + 7] = f32::NAN;
        rows[5 * WIDTH + 1039] = f32::INFINITY;
        let x = HalfTensor::rounded(&stream, dtype, &[sizes.len(), WIDTH], &rows).unwrap();
        let mut out = QuantizedRows::zeros(&stream, sizes.len(), rows.len()).unwrap();
        quantizer.quantize(&mut out, &x.view(), sizes.len()).unwrap();
        let (got, want) = (out.to_f64(WIDTH), x.to_f64());
        for (row, (got, want)) in got.chunks_exact(WIDTH).zip(want.chunks_exact(WIDTH)).enumerate() {
            if row == 5 {
                assert!(got.iter().all(|x| x.is_nan()), "{dtype}: an infinite row");
                continue;
            }
            let largest = want.iter().fold(0f64, |most, x| most.max(x.abs()));
            for (at, (&got, &want)) in got.iter().zip(want).enumerate() {
                // Half of the last of three bits of mantissa, or of the smallest number.
                let bound = (want.abs() / 16.0).max(largest / 448.0 / 1024.0) * 1.001;
                let near = (got - want).abs() <= bound || (got.is_nan() && want.is_nan());
                assert!(near, "{dtype}, row {row}, {at}: {got}, not {want}");
            }
        }
    }
}

/// What computes a product.
#[derive(Clone, Copy, Debug)]
enum With {
    CublasLt(Choice),
    FewRows,
}

/// A product of random rows against sums in `f64` of what its factors are.
fn check_product(cuda: &Arc<CudaStream>, rng: &mut Rng, product: Product, with: With) {
    let Product { rows, input, output, factor, added, out_dtype, .. } = product;
    let stream = Stream::from(cuda);
    let half = if out_dtype == DType::F32 { DType::F16 } else { out_dtype };
    let quantizer = Quantizer::new(cuda, half).unwrap();
    let mut quantized = |rows: usize| {
        let random: Vec<_> = (0..rows * input).map(|_| rng.unit() as f32).collect();
        let tensor = HalfTensor::rounded(&stream, half, &[rows, input], &random).unwrap();
        let mut out = QuantizedRows::zeros(&stream, rows, rows * input).unwrap();
        quantizer.quantize(&mut out, &tensor.view(), rows).unwrap();
        let numbers = out.to_f64(input);
        (out, numbers)
    };
    let ((x, x_numbers), (weight, weight_numbers)) = (quantized(rows), quantized(output));
    // Rows of 16 bits, which are multiplied as they are.
    let few: Vec<_> = (0..rows * input).map(|_| rng.unit() as f32).collect();
    let few = HalfTensor::rounded(&stream, half, &[rows, input], &few).unwrap();
    let bias = HalfTensor::rounded(&stream, half, &[output], &vec![3.0; output]).unwrap();
    let before = vec![3.0; rows * output];
    let mut out = HalfTensor::rounded(&stream, half, &[rows, output], &before).unwrap();
    let mut wide = Tensor::<f32>::from_slice(&stream, &[rows, output], &before).unwrap();
    let mut out_view = if out_dtype == DType::F32 { wide.view_mut() } else { out.view_mut() };
    let mut scratch = Tensor::<u8>::zeros(&stream, &[32 << 20]).unwrap();
    let half_weight: Vec<_> = (0..output * input).map(|_| rng.unit() as f32).collect();
    let half_weight = HalfTensor::rounded(&stream, half, &[output, input], &half_weight).unwrap();
    let (matrix, weight_numbers) = match product.dtype {
        DType::E4M3 => (weight.view(), weight_numbers),
        _ => (half_weight.view().into(), half_weight.to_f64()),
    };
    let weight = Weight { matrix, bias: (added == Added::Bias).then(|| bias.view()) };
    let x_numbers = match with {
        With::CublasLt(choice) => {
            let cublas = CublasLt::new(cuda).unwrap();
            let matmul = Matmul::new(&cublas, product, choice, 32 << 20).unwrap();
            matmul.run(&mut out_view, &x.view(), &weight, &mut scratch.view_mut()).unwrap();
            x_numbers
        }
        With::FewRows => {
            let Some(few_rows) = FewRows::new(cuda, half).unwrap() else { return };
            few_rows.run(0, &product, &Fused::default(), &mut out_view, &few.view(), &weight).unwrap();
            few.to_f64()
        }
    };
    let got: Vec<f64> = match out_dtype {
        DType::F32 => wide.to_vec().unwrap().into_iter().map(f64::from).collect(),
        _ => out.to_f64(),
    };
    let constant = if added == Added::Nothing { 0.0 } else { 3.0 };
    let mut worst = 0f64;
    for (row, got) in x_numbers.chunks_exact(input).zip(got.chunks_exact(output)) {
        let want: Vec<f64> = weight_numbers
            .chunks_exact(input)
            .map(|weight| {
                row.iter().zip(weight).map(|(a, b)| a * b).sum::<f64>() * f64::from(factor) + constant
            })
            .collect();
        let norm = |row: &mut dyn Iterator<Item = f64>| row.map(|x| x * x).sum::<f64>().sqrt();
        let off = norm(&mut got.iter().zip(&want).map(|(a, b)| a - b)) / norm(&mut want.iter().copied());
        worst = worst.max(off);
    }
    eprintln!("{product:?}, {with:?}: worst row off by {worst:.1e}");
    let bound = if half == DType::BF16 { 8e-3 } else { 2e-3 };
    assert!(worst <= bound, "{product:?}, {with:?}: a row is off by {worst:.1e}");
}

#[test]
fn products_of_8_bits_are_those_of_their_factors() {
    let Some(_turn) = turn() else { return };
    let cuda = start(&Shape::Llama8b.config().unwrap(), 0).unwrap();
    let mut rng = Rng::new();
    for (added, out_dtype) in [
        (Added::Nothing, DType::F16),
        (Added::Nothing, DType::BF16),
        (Added::Nothing, DType::F32),
        (Added::Bias, DType::F16),
        (Added::Bias, DType::BF16),
        (Added::Output, DType::F16),
        (Added::Output, DType::BF16),
    ] {
        for (rows, with) in [
            (1, With::CublasLt(Choice::Fastest)),
            (8, With::CublasLt(Choice::Fastest)),
            (64, With::CublasLt(Choice::Fastest)),
            (4, With::CublasLt(Choice::AnyRows(256))),
            (1, With::FewRows),
            (2, With::FewRows),
            (4, With::FewRows),
            (8, With::FewRows),
        ] {
            for [input, output] in [[576, 960], [1536, 576], [96, 272], [5120, 48]] {
                let (dtype, factor) = (DType::E4M3, 0.25);
                let product = Product { rows, input, output, factor, added, dtype, out_dtype };
                check_product(&cuda, &mut rng, product, with);
            }
        }
    }
}

#[test]
fn products_of_few_rows_by_16_bits_are_those_of_their_factors() {
    let Some(_turn) = turn() else { return };
    let cuda = start(&Shape::Llama8b.config().unwrap(), 0).unwrap();
    let mut rng = Rng::new();
    for dtype in [DType::F16, DType::BF16] {
        for added in [Added::Nothing, Added::Bias, Added::Output] {
            for rows in [1, 2, 4, 8] {
                // Widths of less than a read of a warp, of several of its turns, and odd rows.
                for [input, output] in [[576, 960], [1536, 576], [88, 273], [5120, 49], [4096, 6144]] {
                    let product =
                        Product { rows, input, output, factor: 0.25, added, dtype, out_dtype: dtype };
                    check_product(&cuda, &mut rng, product, With::FewRows);
                }
            }
        }
    }
}

#[test]
fn products_of_8_bits_that_there_are_none_of_are_refused() {
    let Some(_turn) = turn() else { return };
    let cuda = start(&Shape::Llama8b.config().unwrap(), 0).unwrap();
    let cublas = CublasLt::new(&cuda).unwrap();
    for [input, output] in [[24, 64], [64, 24]] {
        let product = Product {
            rows: 4,
            input,
            output,
            factor: 1.0,
            added: Added::Nothing,
            dtype: DType::E4M3,
            out_dtype: DType::F16,
        };
        let error = Matmul::new(&cublas, product, Choice::Fastest, 1 << 20).err().unwrap().to_string();
        assert!(error.contains("multiples of 16"), "{error}");
    }
}
