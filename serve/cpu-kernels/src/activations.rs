//! Rows of activations in 16 bits.

use rayon::prelude::*;

use super::{exp::ROUND, packed::COLUMNS};

/// The largest code: of what is above, the high byte would be none. Sums of 32 products with codes
/// of weights fit an `i32`.
const MOST: f32 = 32639.0;

/// Rows, in blocks of 32 columns with a scale each.
#[derive(Debug)]
pub struct Activations {
    blocks: Vec<ActivationBlock>,
    /// Blocks of a row.
    width: usize,
}

/// 32 numbers: `scale · code` each.
#[derive(Clone, Copy, Debug)]
pub struct ActivationBlock {
    pub codes: [Four; COLUMNS / 4],
    pub scale: f32,
    /// The sums of the codes of each half.
    pub sums: [i32; 2],
}

/// Four codes, in the forms that instructions take. The first is in the lowest bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Four {
    /// 16 bits each.
    pub codes: i64,
    /// 8 bits each, with a sign: codes are `256 · high + low`.
    pub low: i32,
    pub high: i32,
}

impl Activations {
    /// Of rows of so many columns, a multiple of 32.
    pub fn new(x: &[f32], columns: usize) -> Self {
        let quantize = |numbers: &[f32; COLUMNS]| ActivationBlock::new(numbers);
        let blocks = x.as_chunks().0.par_iter().with_min_len(64).map(quantize).collect();
        Self { blocks, width: columns / COLUMNS }
    }

    /// The blocks of a row.
    pub fn row(&self, row: usize) -> &[ActivationBlock] {
        &self.blocks[row * self.width..][..self.width]
    }
}

impl ActivationBlock {
    fn new(numbers: &[f32; COLUMNS]) -> Self {
        // Numbers without sign are in the order of their bits, and NaN is the largest of all.
        let mut most = 0;
        for number in numbers {
            most = most.max(number.abs().to_bits());
        }
        let most = f32::from_bits(most);
        // What is too small for its inverse counts as 0. What is no number stays none.
        let (scale, inverse) =
            if most < MOST * f32::MIN_POSITIVE { (0.0, 0.0) } else { (most / MOST, MOST / most) };
        let mut codes = [0; COLUMNS];
        for (code, number) in codes.iter_mut().zip(numbers) {
            *code = (number * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i16;
        }
        let mut block = Self { codes: [Four::default(); COLUMNS / 4], scale, sums: [0; 2] };
        for (four, codes) in block.codes.iter_mut().zip(codes.as_chunks::<4>().0) {
            for code in codes.iter().rev() {
                let low = *code as i8;
                let high = (code - i16::from(low)) >> 8;
                four.codes = four.codes << 16 | i64::from(*code as u16);
                four.low = four.low << 8 | i32::from(low as u8);
                four.high = four.high << 8 | i32::from(high as u8);
            }
        }
        for (sum, codes) in block.sums.iter_mut().zip(codes.as_chunks::<{ COLUMNS / 2 }>().0) {
            *sum = codes.iter().map(|&code| i32::from(code)).sum();
        }
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(numbers: impl Fn(usize) -> f32) -> ActivationBlock {
        ActivationBlock::new(&std::array::from_fn(numbers))
    }

    #[test]
    fn numbers_are_off_by_half_a_step_at_most() {
        let number = |at: usize| (at as f32 * 0.7).sin() * 3.0;
        let ActivationBlock { codes, scale, sums } = block(number);
        let byte = |bytes: i32, at: u32| i16::from((bytes >> (8 * at)) as i8);
        let four = |four: &Four| [0, 1, 2, 3].map(|at| 256 * byte(four.high, at) + byte(four.low, at));
        let of_bytes: Vec<_> = codes.iter().flat_map(four).collect();
        let four = |four: &Four| [0, 16, 32, 48].map(|bit| (four.codes >> bit) as i16);
        let codes: Vec<_> = codes.iter().flat_map(four).collect();
        assert_eq!(of_bytes, codes);
        assert_eq!(codes.iter().map(|code| code.unsigned_abs()).max(), Some(32639));
        for (at, &code) in codes.iter().enumerate() {
            assert!((f32::from(code) * scale - number(at)).abs() <= scale * 0.51, "number {at}");
        }
        let sum = |codes: &[i16]| codes.iter().map(|&code| i32::from(code)).sum::<i32>();
        assert_eq!(sums, [sum(&codes[..16]), sum(&codes[16..])]);
    }

    #[test]
    fn what_is_no_number_is_not_lost_and_what_is_next_to_nothing_is_0() {
        for odd in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(!block(|at| if at == 7 { odd } else { 1.0 }).scale.is_finite());
        }
        for small in [0.0, -0.0, 1e-45, -1e-37] {
            let ActivationBlock { codes, scale, sums } = block(|_| small);
            assert_eq!((codes, scale, sums), ([Four::default(); 8], 0.0, [0; 2]));
        }
        assert!(block(|_| f32::MAX).scale.is_finite());
    }
}
