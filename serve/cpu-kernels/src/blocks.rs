//! The numbers of blocks, as GGUF files hold them: plain numbers, and blocks of 32 with a scale.

use std::hint::black_box;

/// A type of blocks: `LEN` numbers in `BYTES` bytes.
pub trait Block<const BYTES: usize, const LEN: usize> {
    /// The numbers of a block.
    fn decode(bytes: &[u8; BYTES], numbers: &mut [f32; LEN]);
}

/// The numbers of a row of blocks. Of plain numbers, the last are no whole block.
#[inline(always)]
pub fn decode<const BYTES: usize, const LEN: usize, B: Block<BYTES, LEN>>(row: &[u8], numbers: &mut [f32]) {
    let (blocks, rest) = row.as_chunks();
    let (whole, last) = numbers.as_chunks_mut();
    for (block, numbers) in blocks.iter().zip(whole) {
        // The compiler would compute several blocks side by side, which takes twice the time.
        B::decode(black_box(block), numbers);
    }
    if !last.is_empty() {
        let (mut block, mut padded) = ([0; BYTES], [0.0; LEN]);
        block[..rest.len()].copy_from_slice(rest);
        B::decode(&block, &mut padded);
        last.copy_from_slice(&padded[..last.len()]);
    }
}

/// The `N` bytes from `start` on.
#[inline(always)]
pub fn bytes<const N: usize>(block: &[u8], start: usize) -> &[u8; N] {
    block[start..].first_chunk().expect("a block of its type's size")
}

/// The number of these bits of an `f16`. Without branches, so that many are converted side by side.
#[inline(always)]
const fn f16(bits: u16) -> f32 {
    let (sign, magnitude) = ((bits as u32 & 0x8000) << 16, bits as u32 & 0x7fff);
    // The exponent's bias is 127 instead of 15. Infinities and NaN have the largest exponent.
    let bias = if magnitude >= 0x7c00 { 224 << 23 } else { 112 << 23 };
    let normal = (magnitude << 13) + bias;
    // 2^-24 is the step between subnormal numbers, and that of `f32` from 0.5 on.
    let subnormal = (f32::from_bits(magnitude + (126 << 23)) - 0.5).to_bits();
    f32::from_bits(sign | if magnitude < 0x400 { subnormal } else { normal })
}

/// The numbers of all bits of an `f16`. Those of a model's scales are few, and stay in the cache.
static HALVES: [f32; 1 << 16] = {
    let mut numbers = [0.0; 1 << 16];
    let mut bits = 0;
    while bits < numbers.len() {
        numbers[bits] = f16(bits as u16);
        bits += 1;
    }
    numbers
};

/// The scale at `start`, an `f16`.
#[inline(always)]
pub fn scale(block: &[u8], start: usize) -> f32 {
    HALVES[usize::from(u16::from_le_bytes(*bytes(block, start)))]
}

/// What can be added to any number and is not: the compiler leaves it out, as it does not 0.
pub const NO_OFFSET: f32 = -0.0;

/// `scale · code + offset` for each code.
#[inline(always)]
pub fn scaled<const N: usize>(codes: [i8; N], scale: f32, offset: f32) -> [f32; N] {
    let mut numbers = [0.0; N];
    for (number, code) in numbers.iter_mut().zip(codes) {
        *number = f32::from(code) * scale + offset;
    }
    numbers
}

/// The low halves of 16 bytes, then the high ones.
#[inline(always)]
fn nibbles(packed: &[u8; 16]) -> [i8; 32] {
    let mut codes = [0; 32];
    for index in 0..16 {
        codes[index] = (packed[index] & 15) as i8;
        codes[index + 16] = (packed[index] >> 4) as i8;
    }
    codes
}

/// [`nibbles`], each with a fifth bit.
#[inline(always)]
fn five_bits(packed: &[u8; 16], fifth: &[u8; 4]) -> [i8; 32] {
    let (mut codes, fifth) = (nibbles(packed), u32::from_le_bytes(*fifth));
    for (index, code) in codes.iter_mut().enumerate() {
        *code |= ((fifth >> index & 1) << 4) as i8;
    }
    codes
}

pub struct F32;
pub struct F16;
pub struct Bf16;
pub struct Q4_0;
pub struct Q4_1;
pub struct Q5_0;
pub struct Q5_1;
pub struct Q8_0;

impl Block<32, 8> for F32 {
    #[inline(always)]
    fn decode(block: &[u8; 32], numbers: &mut [f32; 8]) {
        for (index, number) in numbers.iter_mut().enumerate() {
            *number = f32::from_le_bytes(*bytes(block, 4 * index));
        }
    }
}

impl Block<32, 16> for F16 {
    #[inline(always)]
    fn decode(block: &[u8; 32], numbers: &mut [f32; 16]) {
        for (index, number) in numbers.iter_mut().enumerate() {
            *number = f16(u16::from_le_bytes(*bytes(block, 2 * index)));
        }
    }
}

impl Block<32, 16> for Bf16 {
    #[inline(always)]
    fn decode(block: &[u8; 32], numbers: &mut [f32; 16]) {
        for (index, number) in numbers.iter_mut().enumerate() {
            *number = f32::from_bits(u32::from(u16::from_le_bytes(*bytes(block, 2 * index))) << 16);
        }
    }
}

impl Block<18, 32> for Q4_0 {
    #[inline(always)]
    fn decode(block: &[u8; 18], numbers: &mut [f32; 32]) {
        *numbers = scaled(nibbles(bytes(block, 2)).map(|code| code - 8), scale(block, 0), NO_OFFSET);
    }
}

impl Block<20, 32> for Q4_1 {
    #[inline(always)]
    fn decode(block: &[u8; 20], numbers: &mut [f32; 32]) {
        *numbers = scaled(nibbles(bytes(block, 4)), scale(block, 0), scale(block, 2));
    }
}

impl Block<22, 32> for Q5_0 {
    #[inline(always)]
    fn decode(block: &[u8; 22], numbers: &mut [f32; 32]) {
        let codes = five_bits(bytes(block, 6), bytes(block, 2));
        *numbers = scaled(codes.map(|code| code - 16), scale(block, 0), NO_OFFSET);
    }
}

impl Block<24, 32> for Q5_1 {
    #[inline(always)]
    fn decode(block: &[u8; 24], numbers: &mut [f32; 32]) {
        *numbers = scaled(five_bits(bytes(block, 8), bytes(block, 4)), scale(block, 0), scale(block, 2));
    }
}

impl Block<34, 32> for Q8_0 {
    #[inline(always)]
    fn decode(block: &[u8; 34], numbers: &mut [f32; 32]) {
        *numbers = scaled(bytes::<32>(block, 2).map(|code| code as i8), scale(block, 0), NO_OFFSET);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn halves_are_those_of_half() {
        for bits in 0..=u16::MAX {
            let (number, expected) = (super::f16(bits), half::f16::from_bits(bits).to_f32());
            assert!(
                number.to_bits() == expected.to_bits() || number.is_nan() && expected.is_nan(),
                "{bits:#x}"
            );
        }
    }
}
