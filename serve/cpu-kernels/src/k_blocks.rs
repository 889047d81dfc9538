//! Blocks of 256 numbers, in groups with scales of their own.

use std::array;

use super::blocks::{Block, NO_OFFSET, bytes, scale, scaled};

pub struct Q2K;
pub struct Q3K;
pub struct Q4K;
pub struct Q5K;
pub struct Q6K;

/// The groups of 32 numbers of a block, each in two halves with scales of their own.
#[inline(always)]
fn by_halves(
    numbers: &mut [f32; 256],
    codes: impl Fn(usize) -> [i8; 32],
    scale_and_offset: impl Fn(usize) -> [f32; 2],
) {
    for (group, numbers) in numbers.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let codes = codes(group);
        for (half, numbers) in numbers.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let [scale, offset] = scale_and_offset(2 * group + half);
            *numbers = scaled(*codes[16 * half..].first_chunk().expect("a half"), scale, offset);
        }
    }
}

/// Two bits of each of 32 bytes, of four groups in the same bytes.
#[inline(always)]
fn two_bits(packed: &[u8], group: usize) -> [i8; 32] {
    bytes::<32>(packed, group / 4 * 32).map(|byte| (byte >> (2 * (group % 4)) & 3) as i8)
}

/// Four bits of each of 32 bytes, of two groups in the same bytes.
#[inline(always)]
fn four_bits(packed: &[u8], group: usize) -> [i8; 32] {
    bytes::<32>(packed, group / 2 * 32).map(|byte| (byte >> (4 * (group % 2)) & 15) as i8)
}

/// A bit of each of 32 bytes.
#[inline(always)]
fn bit(packed: &[u8; 32], bit: usize) -> [i8; 32] {
    packed.map(|byte| (byte >> bit & 1) as i8)
}

/// The scale and the minimum of a group, 6 bits each, of eight groups in 12 bytes.
#[inline(always)]
fn scale_and_minimum(packed: &[u8; 12], group: usize) -> [u8; 2] {
    match group {
        0..4 => [packed[group] & 63, packed[group + 4] & 63],
        _ => {
            let (low, high) = (packed[group + 4], [packed[group - 4], packed[group]]);
            [low & 15 | high[0] >> 6 << 4, low >> 4 | high[1] >> 6 << 4]
        }
    }
}

impl Block<84, 256> for Q2K {
    #[inline(always)]
    fn decode(block: &[u8; 84], numbers: &mut [f32; 256]) {
        let (d, minimum) = (scale(block, 80), scale(block, 82));
        by_halves(
            numbers,
            |group| two_bits(&block[16..], group),
            |half| [d * f32::from(block[half] & 15), -(minimum * f32::from(block[half] >> 4))],
        );
    }
}

impl Block<110, 256> for Q3K {
    #[inline(always)]
    fn decode(block: &[u8; 110], numbers: &mut [f32; 256]) {
        let (high, packed, d) = (bytes::<32>(block, 0), bytes::<12>(block, 96), scale(block, 108));
        by_halves(
            numbers,
            |group| {
                let (low, high) = (two_bits(&block[32..], group), bit(high, group));
                array::from_fn(|index| low[index] + (high[index] << 2) - 4)
            },
            |half| {
                let low = packed[half % 8] >> (half / 8 * 4) & 15;
                let high = packed[8 + half % 4] >> (half / 4 * 2) & 3;
                [d * (f32::from(low | high << 4) - 32.0), NO_OFFSET]
            },
        );
    }
}

impl Block<144, 256> for Q4K {
    #[inline(always)]
    fn decode(block: &[u8; 144], numbers: &mut [f32; 256]) {
        let (all, minimum, packed) = (scale(block, 0), scale(block, 2), bytes(block, 4));
        for (group, numbers) in numbers.as_chunks_mut().0.iter_mut().enumerate() {
            let [d, m] = scale_and_minimum(packed, group).map(f32::from);
            *numbers = scaled(four_bits(&block[16..], group), all * d, -(minimum * m));
        }
    }
}

impl Block<176, 256> for Q5K {
    #[inline(always)]
    fn decode(block: &[u8; 176], numbers: &mut [f32; 256]) {
        let (all, minimum, packed) = (scale(block, 0), scale(block, 2), bytes(block, 4));
        let fifth = bytes::<32>(block, 16);
        for (group, numbers) in numbers.as_chunks_mut().0.iter_mut().enumerate() {
            let [d, m] = scale_and_minimum(packed, group).map(f32::from);
            let (low, high) = (four_bits(&block[48..], group), bit(fifth, group));
            let codes: [_; 32] = array::from_fn(|index| low[index] | high[index] << 4);
            *numbers = scaled(codes, all * d, -(minimum * m));
        }
    }
}

impl Block<210, 256> for Q6K {
    #[inline(always)]
    fn decode(block: &[u8; 210], numbers: &mut [f32; 256]) {
        let d = scale(block, 208);
        by_halves(
            numbers,
            |group| {
                // The low halves of 64 bytes, then the high ones.
                let low = bytes::<32>(block, group / 4 * 64 + group % 2 * 32);
                let low = low.map(|byte| (byte >> (group % 4 / 2 * 4) & 15) as i8);
                let high = two_bits(&block[128..], group);
                array::from_fn(|index| (low[index] | high[index] << 4) - 32)
            },
            |half| [d * f32::from(block[192 + half] as i8), NO_OFFSET],
        );
    }
}
