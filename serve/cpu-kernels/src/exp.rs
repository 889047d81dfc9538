//! The exponential function, in a form that compilers compute for many numbers side by side.

use std::f32::consts::{LN_2, LOG2_E};

/// What makes an `f32` an integer, when it is added and taken away: 1.5 · 2^23.
pub const ROUND: f32 = 12_582_912.0;
/// The first bits of the logarithm of 2, of which products with integers are exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = (std::f64::consts::LN_2 - LN_2_HIGH as f64) as f32;
/// Where powers of 2 are normal numbers.
const RANGE: [f32; 2] = [-126.0 * LN_2, 127.0 * LN_2];

/// `e^x`, to about the last bit. Beyond the normal numbers it stays at the last of them.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Comparisons keep what is no number.
    let x = if x < RANGE[0] { RANGE[0] } else { x };
    let x = if x > RANGE[1] { RANGE[1] } else { x };
    let shifted = x * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let rest = x - n * LN_2_HIGH - n * LN_2_LOW;
    let mut sum = 1.0 / 5040.0;
    for factorial in [720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0] {
        sum = sum * rest + 1.0 / factorial;
    }
    let power = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    sum * f32::from_bits(power)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_that_of_its_definition() {
        for step in -87_000..=88_000 {
            let x = step as f32 / 1000.0;
            let (number, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((number / expected - 1.0).abs() < 3e-7, "e^{x} is {expected}, not {number}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) < 1.2e-38 && exp(f32::INFINITY) > 1e38 && exp(f32::NAN).is_nan());
    }
}
