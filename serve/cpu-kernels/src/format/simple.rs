//! Blocks of 32 numbers with a scale, and an offset or a code for 0.

use super::{Block, bytes, half};

/// The low halves of 16 bytes, then the high ones.
#[inline(always)]
fn nibbles(packed: &[u8; 16], block: &mut Block) {
    for (index, byte) in packed.iter().enumerate() {
        block.codes[index] = byte & 15;
        block.codes[index + 16] = byte >> 4;
    }
}

/// Adds a fifth bit to codes.
#[inline(always)]
fn fifth_bits(packed: &[u8; 4], block: &mut Block) {
    let bits = u32::from_le_bytes(*packed);
    for (index, code) in block.codes[..32].iter_mut().enumerate() {
        *code |= ((bits >> index & 1) << 4) as u8;
    }
}

#[inline(always)]
pub fn q4_0(from: &[u8], block: &mut Block) {
    block.scale = half(from, 0);
    nibbles(bytes(from, 2), block);
}

#[inline(always)]
pub fn q4_1(from: &[u8], block: &mut Block) {
    [block.scale, block.offset] = [half(from, 0), half(from, 2)];
    nibbles(bytes(from, 4), block);
}

#[inline(always)]
pub fn q5_0(from: &[u8], block: &mut Block) {
    block.scale = half(from, 0);
    nibbles(bytes(from, 6), block);
    fifth_bits(bytes(from, 2), block);
}

#[inline(always)]
pub fn q5_1(from: &[u8], block: &mut Block) {
    [block.scale, block.offset] = [half(from, 0), half(from, 2)];
    nibbles(bytes(from, 8), block);
    fifth_bits(bytes(from, 4), block);
}

#[inline(always)]
pub fn q8_0(from: &[u8], block: &mut Block) {
    block.scale = half(from, 0);
    for (code, byte) in block.codes.iter_mut().zip(bytes::<32>(from, 2)) {
        // Signed, and now counted from -128 on.
        *code = byte ^ 0x80;
    }
}
