use std::sync::Arc;

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor},
};

use super::*;
use crate::Matrix;

const PLAIN: [GgmlDType; 3] = [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16];
const BLOCKS: [GgmlDType; 10] = [
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

fn random(rows: usize, columns: usize) -> Tensor {
    Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// A random matrix, and its numbers.
fn weights(rows: usize, columns: usize, dtype: GgmlDType) -> (Weights, Vec<f32>) {
    let quantized = QTensor::quantize(&random(rows, columns), dtype).unwrap();
    let bytes = Arc::new(quantized.data().unwrap().into_owned());
    (Weights::new(bytes, dtype, columns).unwrap(), numbers(&quantized.dequantize(&Device::Cpu).unwrap()))
}

/// Plain numbers.
fn plain(numbers: &[f32], columns: usize) -> Weights {
    let bytes = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    Weights::new(Arc::new(bytes), GgmlDType::F32, columns).unwrap()
}

/// `x · matrixᵀ`.
fn expected(x: &[f32], matrix: &[f32], columns: usize) -> Vec<f64> {
    let dot = |x: &[f32], row: &[f32]| row.iter().zip(x).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
    let rows = x.chunks_exact(columns);
    rows.flat_map(|x| matrix.chunks_exact(columns).map(move |row| dot(x, row))).collect()
}

#[test]
fn numbers_are_those_of_candle() {
    for dtype in PLAIN.into_iter().chain(BLOCKS) {
        let quantized = QTensor::quantize(&random(21, 768), dtype).unwrap();
        let bytes = Arc::new(quantized.data().unwrap().into_owned());
        let matrix = Matrix::new(&bytes, dtype, 768).unwrap();
        let weights = Weights::new(bytes.clone(), dtype, 768).unwrap();
        let expected = numbers(&quantized.dequantize(&Device::Cpu).unwrap());
        let mut row = vec![f32::NAN; 768];
        for (index, expected) in expected.chunks_exact(768).enumerate() {
            matrix.dequantize_row(index, &mut row);
            assert_eq!(row, expected, "{dtype:?}");
            row.fill(f32::NAN);
            weights.dequantize_row(index, &mut row);
            assert_eq!(row, expected, "{dtype:?}");
        }
    }
}

/// How far a product may be off: half a step of the codes of activations, for each number.
fn tolerance(x: &[f32], row: &[f32]) -> f64 {
    let step = |x: &[f32]| x.iter().fold(0f32, |most, x| most.max(x.abs())) / 32767.0;
    let blocks = x.chunks(32).zip(row.chunks(32));
    blocks.map(|(x, row)| f64::from(step(x) / 2.0 * row.iter().map(|w| w.abs()).sum::<f32>())).sum::<f64>()
        + 1e-4
}

#[test]
fn a_product_is_that_of_its_definition() {
    for dtype in PLAIN.into_iter().chain(BLOCKS) {
        let columns = if dtype.block_size() == 1 { 523 } else { 512 };
        let (matrix, weights) = weights(37, columns, dtype);
        let x = numbers(&random(6, columns));
        let product = multiply(&x, &[&matrix]);
        for (x, product) in x.chunks_exact(columns).zip(product.chunks_exact(37)) {
            let rows = weights.chunks_exact(columns);
            for ((number, row), expected) in product.iter().zip(rows).zip(expected(x, &weights, columns)) {
                let off = (f64::from(*number) - expected).abs();
                assert!(off < tolerance(x, row), "{dtype:?}: {number}, {expected}");
            }
        }
    }
}

/// Of three matrices, whose heights are no multiples of anything.
#[test]
fn a_row_has_the_same_product_alone_and_among_others() {
    for dtype in PLAIN.into_iter().chain(BLOCKS) {
        let (first, second) = (weights(203, 512, dtype).0, weights(6, 512, dtype).0);
        let third = plain(&numbers(&random(5, 512)), 512);
        let matrices = [&first, &second, &third];
        let x = numbers(&random(19, 512));
        let together = multiply(&x, &matrices);
        for (x, row) in x.chunks_exact(512).zip(together.chunks_exact(214)) {
            assert_eq!(multiply(x, &matrices), row, "{dtype:?}");
        }
        let five = multiply(&x[3 * 512..8 * 512], &matrices[1..2]);
        for (row, five) in together[3 * 214..].chunks_exact(214).zip(five.chunks_exact(6)) {
            assert_eq!(&row[203..209], five, "{dtype:?}");
        }
    }
}

#[test]
fn all_instructions_give_the_same_bits() {
    println!("{:?}", Available::all().collect::<Vec<_>>());
    for dtype in BLOCKS {
        let (matrix, _) = weights(40, 768, dtype);
        let x = numbers(&random(7, 768));
        let bits = |instructions| -> Vec<u32> {
            multiply_with(instructions, &x, &[&matrix]).into_iter().map(f32::to_bits).collect()
        };
        let best = bits(Available::best());
        assert!(Available::all().all(|instructions| bits(instructions) == best), "{dtype:?}");
    }
}

/// The largest codes and activations.
#[test]
fn nothing_is_too_large_for_its_integer() {
    let block = |code: u8| [&[0x00, 0x3c][..], &[code; 32]].concat().repeat(8);
    for (code, weight) in [(0x80, -128.0), (0x7f, 127.0)] {
        let matrix = Weights::new(Arc::new(block(code)), GgmlDType::Q8_0, 256).unwrap();
        for instructions in Available::all() {
            for sign in [1.0, -1.0] {
                let product = multiply_with(instructions, &[127.0 * sign; 256], &[&matrix]);
                assert_eq!(product, [256.0 * 127.0 * sign * weight], "{instructions:?}");
            }
        }
    }
}

#[test]
fn what_is_no_number_is_not_lost() {
    for dtype in [GgmlDType::F16, GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q6K] {
        let (matrix, _) = weights(3, 256, dtype);
        for odd in [f32::NAN, f32::INFINITY] {
            let mut x = vec![1.0; 2 * 256];
            x[256 + 17] = odd;
            let product = multiply(&x, &[&matrix]);
            let finite: Vec<_> = product.iter().map(|number| number.is_finite()).collect();
            assert_eq!(finite, [true, true, true, false, false, false], "{dtype:?}");
        }
    }
}

#[test]
fn a_matrix_has_whole_rows_of_whole_blocks() {
    assert!(Matrix::new(&[0; 36], GgmlDType::Q4_0, 64).is_some());
    assert!(Matrix::new(&[0; 36], GgmlDType::Q4_0, 48).is_none());
    assert!(Matrix::new(&[0; 37], GgmlDType::Q4_0, 64).is_none());
    assert!(Matrix::new(&[0; 36], GgmlDType::Q8_1, 32).is_none());
    assert!(Matrix::new(&[], GgmlDType::F32, 0).is_none());
    let empty = plain(&[], 3);
    assert!(multiply(&[1.0; 6], &[&empty]).is_empty() && multiply(&[], &[]).is_empty());
    let one = plain(&[1.0; 3], 3);
    assert_eq!(multiply(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[&one, &empty]), [6.0, 15.0]);
    // Rows of more numbers than a task has.
    let long = plain(&vec![1.0; 5 * 2 * TASK], 2 * TASK);
    assert_eq!(multiply(&vec![1.0; 2 * 2 * TASK], &[&long]), [2.0 * TASK as f32; 10]);
    assert!(multiply(&[], &[&one]).is_empty());
}
