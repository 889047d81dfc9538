//! Numbers of 16 bits.

/// The number of these bits of an `f16`. Without branches, so that many are converted side by side.
#[inline(always)]
pub const fn f16(bits: u16) -> f32 {
    let (sign, magnitude) = ((bits as u32 & 0x8000) << 16, bits as u32 & 0x7fff);
    // The exponent's bias is 127 instead of 15. Infinities and NaN have the largest exponent.
    let bias = if magnitude >= 0x7c00 { 224 << 23 } else { 112 << 23 };
    let normal = (magnitude << 13) + bias;
    // 2^-24 is the step between subnormal numbers, and that of `f32` from 0.5 on.
    let subnormal = (f32::from_bits(magnitude + (126 << 23)) - 0.5).to_bits();
    f32::from_bits(sign | if magnitude < 0x400 { subnormal } else { normal })
}

/// The number of these bits of a `bf16`.
#[inline(always)]
pub const fn bf16(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

#[cfg(test)]
mod tests {
    #[test]
    fn numbers_are_those_of_half() {
        for bits in 0..=u16::MAX {
            let of_half = [half::f16::from_bits(bits).to_f32(), half::bf16::from_bits(bits).to_f32()];
            for (number, expected) in [super::f16(bits), super::bf16(bits)].into_iter().zip(of_half) {
                let same = number.to_bits() == expected.to_bits() || number.is_nan() && expected.is_nan();
                assert!(same, "{bits:#x}: {number}, {expected}");
            }
        }
    }
}
