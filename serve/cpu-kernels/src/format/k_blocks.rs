//! Blocks of 256 numbers, in groups with scales of their own.

use super::{Block, bytes, half};

/// Two bits of each of 32 bytes, of four groups of 32 in the same bytes.
#[inline(always)]
fn two_bits(packed: &[u8], group: usize) -> [u8; 32] {
    bytes::<32>(packed, group / 4 * 32).map(|byte| byte >> (2 * (group % 4)) & 3)
}

/// Four bits of each of 32 bytes, of two groups in the same bytes.
#[inline(always)]
fn four_bits(packed: &[u8], group: usize) -> [u8; 32] {
    bytes::<32>(packed, group / 2 * 32).map(|byte| byte >> (4 * (group % 2)) & 15)
}

/// A bit of each of 32 bytes, for each group.
#[inline(always)]
fn bit(packed: &[u8; 32], group: usize) -> [u8; 32] {
    packed.map(|byte| byte >> group & 1)
}

/// Sets the codes of groups of 32: these low bits, and above them these high ones.
#[inline(always)]
fn codes(
    block: &mut Block,
    low: impl Fn(usize) -> [u8; 32],
    high: impl Fn(usize) -> [u8; 32],
    low_bits: usize,
) {
    for (group, codes) in block.codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (low, high) = (low(group), high(group));
        for (index, code) in codes.iter_mut().enumerate() {
            *code = low[index] | high[index] << low_bits;
        }
    }
}

/// Scales and minimums of 6 bits each, of eight groups in 12 bytes.
#[inline(always)]
fn scales_and_minimums(packed: &[u8; 12], block: &mut Block) {
    for group in 0..8 {
        let [scale, minimum] = match group {
            0..4 => [packed[group] & 63, packed[group + 4] & 63],
            _ => {
                let (low, high) = (packed[group + 4], [packed[group - 4], packed[group]]);
                [low & 15 | high[0] >> 6 << 4, low >> 4 | high[1] >> 6 << 4]
            }
        };
        block.group_scales[group] = scale as i8;
        block.group_offsets[group] = minimum;
    }
}

/// The scale at `start`, and after it what minimums are multiplied by. They are taken away.
#[inline(always)]
fn scale_and_minimum(from: &[u8], start: usize, block: &mut Block) {
    [block.scale, block.offset] = [half(from, start), half(from, start + 2) ^ 0x8000];
}

const NONE: [u8; 32] = [0; 32];

#[inline(always)]
pub fn q2_k(from: &[u8], block: &mut Block) {
    scale_and_minimum(from, 80, block);
    for (group, byte) in from[..16].iter().enumerate() {
        block.group_scales[group] = (byte & 15) as i8;
        block.group_offsets[group] = byte >> 4;
    }
    codes(block, |group| two_bits(&from[16..], group), |_| NONE, 2);
}

#[inline(always)]
pub fn q3_k(from: &[u8], block: &mut Block) {
    block.scale = half(from, 108);
    let packed = bytes::<12>(from, 96);
    for group in 0..16 {
        let low = packed[group % 8] >> (group / 8 * 4) & 15;
        let high = packed[8 + group % 4] >> (group / 4 * 2) & 3;
        block.group_scales[group] = (low | high << 4) as i8 - 32;
    }
    codes(block, |group| two_bits(&from[32..], group), |group| bit(bytes(from, 0), group), 2);
}

#[inline(always)]
pub fn q4_k(from: &[u8], block: &mut Block) {
    scale_and_minimum(from, 0, block);
    scales_and_minimums(bytes(from, 4), block);
    codes(block, |group| four_bits(&from[16..], group), |_| NONE, 4);
}

#[inline(always)]
pub fn q5_k(from: &[u8], block: &mut Block) {
    scale_and_minimum(from, 0, block);
    scales_and_minimums(bytes(from, 4), block);
    codes(block, |group| four_bits(&from[48..], group), |group| bit(bytes(from, 16), group), 4);
}

#[inline(always)]
pub fn q6_k(from: &[u8], block: &mut Block) {
    block.scale = half(from, 208);
    block.group_scales = bytes::<16>(from, 192).map(|byte| byte as i8);
    // The low halves of 64 bytes, then the high ones.
    let low = |group: usize| {
        let low = bytes::<32>(from, group / 4 * 64 + group % 2 * 32);
        low.map(|byte| byte >> (group % 4 / 2 * 4) & 15)
    };
    codes(block, low, |group| two_bits(&from[128..], group), 4);
}
