//! The types of blocks that GGUF files hold, read as codes with scales.

mod k_blocks;
mod simple;

use candle_core::quantized::GgmlDType;

use super::half::f16;

/// What the blocks of a type have in common.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    pub dtype: GgmlDType,
    /// Bits of a code.
    pub bits: usize,
    /// The code of 0, where there is no offset.
    pub zero: u8,
    /// Numbers of a group: 16 or 32.
    pub group: usize,
    /// Groups of a block.
    pub groups: usize,
    /// Whether groups have scales of their own.
    pub group_scales: bool,
    pub offset: bool,
}

/// A block. Its numbers are `scale · group_scale · (code − zero) + offset · group_offset`.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    pub codes: [u8; 256],
    /// Bits of an `f16`, as are those of `offset`.
    pub scale: u16,
    pub offset: u16,
    pub group_scales: [i8; 16],
    pub group_offsets: [u8; 16],
}

impl Format {
    /// `None` for plain numbers, and for types that matrices do not have.
    pub fn of(dtype: GgmlDType) -> Option<Self> {
        let simple = |bits, zero, offset| {
            let (group, groups, group_scales) = (32, 1, false);
            Self { dtype, bits, zero, group, groups, group_scales, offset }
        };
        let k = |bits, zero, group, offset| {
            let (groups, group_scales) = (256 / group, true);
            Self { dtype, bits, zero, group, groups, group_scales, offset }
        };
        Some(match dtype {
            GgmlDType::Q4_0 => simple(4, 8, false),
            GgmlDType::Q4_1 => simple(4, 0, true),
            GgmlDType::Q5_0 => simple(5, 16, false),
            GgmlDType::Q5_1 => simple(5, 0, true),
            GgmlDType::Q8_0 => simple(8, 128, false),
            GgmlDType::Q2K => k(2, 0, 16, true),
            GgmlDType::Q3K => k(3, 4, 16, false),
            GgmlDType::Q4K => k(4, 0, 32, true),
            GgmlDType::Q5K => k(5, 0, 32, true),
            GgmlDType::Q6K => k(6, 32, 16, false),
            GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 | GgmlDType::Q8_1 | GgmlDType::Q8K => {
                return None;
            }
        })
    }

    /// Numbers of a block.
    pub fn len(&self) -> usize {
        self.group * self.groups
    }

    /// Reads a block from the bytes of a file.
    #[inline(always)]
    pub fn read(&self, bytes: &[u8], block: &mut Block) {
        match self.dtype {
            GgmlDType::Q4_0 => simple::q4_0(bytes, block),
            GgmlDType::Q4_1 => simple::q4_1(bytes, block),
            GgmlDType::Q5_0 => simple::q5_0(bytes, block),
            GgmlDType::Q5_1 => simple::q5_1(bytes, block),
            GgmlDType::Q8_0 => simple::q8_0(bytes, block),
            GgmlDType::Q2K => k_blocks::q2_k(bytes, block),
            GgmlDType::Q3K => k_blocks::q3_k(bytes, block),
            GgmlDType::Q4K => k_blocks::q4_k(bytes, block),
            GgmlDType::Q5K => k_blocks::q5_k(bytes, block),
            GgmlDType::Q6K => k_blocks::q6_k(bytes, block),
            // `of` gives no format for these.
            GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 | GgmlDType::Q8_1 | GgmlDType::Q8K => {
                unreachable!("no type of blocks")
            }
        }
    }
}

impl Block {
    /// One group, whose scale is the block's, until it is read.
    pub fn new() -> Self {
        Self { codes: [0; 256], scale: 0, offset: 0, group_scales: [1; 16], group_offsets: [1; 16] }
    }

    /// Its numbers.
    #[inline(always)]
    pub fn dequantize(&self, format: &Format, numbers: &mut [f32]) {
        let groups = numbers.chunks_exact_mut(format.group).zip(self.codes.chunks_exact(format.group));
        for (group, (numbers, codes)) in groups.enumerate() {
            let scale = f16(self.scale) * f32::from(self.group_scales[group]);
            let offset = match format.offset {
                true => f16(self.offset) * f32::from(self.group_offsets[group]),
                false => 0.0,
            };
            for (number, code) in numbers.iter_mut().zip(codes) {
                *number = (i16::from(*code) - i16::from(format.zero)) as f32 * scale + offset;
            }
        }
    }
}

/// The `N` bytes from `start` on.
#[inline(always)]
fn bytes<const N: usize>(block: &[u8], start: usize) -> &[u8; N] {
    block[start..].first_chunk().expect("a block of its type's size")
}

/// The bits of the `f16` at `start`.
#[inline(always)]
fn half(block: &[u8], start: usize) -> u16 {
    u16::from_le_bytes(*bytes(block, start))
}
