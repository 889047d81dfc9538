//! Matrices of blocks, repacked so that sixteen rows are read side by side.
//!
//! The lanes of a vector are rows, so that nothing is added up across a vector: a row's sum has
//! the same order whatever the vectors' width. Codes keep their bits. A panel of 16 rows has, for
//! each block of columns, scales and offsets of the rows, and the codes of each 32 columns: four
//! neighbours of the first row, the same four of the second, and so on. Codes are split into
//! planes of 4, 2 and 1 bits, of which bytes hold several.

use rayon::prelude::*;

use super::{
    Matrix,
    format::{Block, Format},
    instructions::{Instructions, Plain},
};

/// Rows of a panel.
pub const ROWS: usize = 16;
/// Columns whose codes lie together.
pub const COLUMNS: usize = 32;
/// Codes of four columns of a panel.
pub const VECTOR: usize = 4 * ROWS;
const CODES: usize = ROWS * COLUMNS;

/// A matrix of blocks in panels.
#[derive(Debug)]
pub struct Packed {
    pub format: Format,
    pub rows: usize,
    pub columns: usize,
    bytes: Vec<u8>,
}

/// A panel, read: what sixteen rows have in each group of columns.
#[derive(Debug, Default)]
pub struct Panel {
    /// Of each 32 columns.
    pub codes: Vec<[u8; CODES]>,
    /// Of each group.
    pub factors: Vec<Factors>,
}

/// Of a group of each row.
#[derive(Clone, Copy, Debug)]
pub struct Factors {
    pub scale: [f32; ROWS],
    pub offset: [f32; ROWS],
}

impl Packed {
    /// `None` if the matrix has no blocks.
    pub fn new(matrix: Matrix<'_>) -> Option<Self> {
        let (rows, columns, format) = (matrix.rows(), matrix.columns(), matrix.format()?);
        let mut packed = Self { format, rows, columns, bytes: Vec::new() };
        let panel_bytes = packed.panel_bytes();
        packed.bytes = vec![0; rows.div_ceil(ROWS) * panel_bytes];
        let panels = packed.bytes.par_chunks_exact_mut(panel_bytes);
        panels.enumerate().for_each(|(panel, bytes)| {
            let first = panel * ROWS;
            let rows: Vec<_> = (first..rows.min(first + ROWS)).map(|row| matrix.row(row)).collect();
            for (index, bytes) in bytes.chunks_exact_mut(block_bytes(&format)).enumerate() {
                let mut blocks = [Block::new(); ROWS];
                for (block, row) in blocks.iter_mut().zip(&rows) {
                    let size = format.dtype.type_size();
                    format.read(&row[index * size..][..size], block);
                }
                write(&format, &blocks, bytes);
            }
        });
        Some(packed)
    }

    /// Bytes of a panel.
    fn panel_bytes(&self) -> usize {
        self.columns / self.format.len() * block_bytes(&self.format)
    }

    /// Reads a panel.
    #[inline(always)]
    pub fn read<I: Instructions>(&self, instructions: I, panel: usize, into: &mut Panel) {
        let format = &self.format;
        into.codes.resize(self.columns / COLUMNS, [0; CODES]);
        let none = Factors { scale: [0.0; ROWS], offset: [0.0; ROWS] };
        into.factors.resize(self.columns / format.group, none);
        let bytes = &self.bytes[panel * self.panel_bytes()..][..self.panel_bytes()];
        let codes = into.codes.chunks_exact_mut(format.len() / COLUMNS);
        let factors = into.factors.chunks_exact_mut(format.groups);
        let blocks = bytes.chunks_exact(block_bytes(format));
        for ((bytes, codes), factors) in blocks.zip(codes).zip(factors) {
            let planes = read_factors(instructions, format, bytes, factors);
            for (planes, codes) in planes.chunks_exact(format.bits * VECTOR).zip(codes) {
                read_codes(format.bits, planes, codes);
            }
        }
    }

    /// The numbers of a row.
    pub fn dequantize_row(&self, row: usize, numbers: &mut [f32]) {
        let (mut panel, lane) = (Panel::default(), row % ROWS);
        self.read(Plain, row / ROWS, &mut panel);
        for (column, number) in numbers.iter_mut().enumerate() {
            let code = panel.codes[column / COLUMNS][at(lane, column % COLUMNS)];
            let Factors { scale, offset } = &panel.factors[column / self.format.group];
            *number = (i16::from(code) - i16::from(self.format.zero)) as f32 * scale[lane] + offset[lane];
        }
    }
}

/// Where the code of a row and a column is.
fn at(row: usize, column: usize) -> usize {
    column / 4 * VECTOR + row * 4 + column % 4
}

/// Bytes of a block of all rows of a panel.
#[inline(always)]
fn block_bytes(format: &Format) -> usize {
    let [halves, bytes] = match (format.offset, format.group_scales) {
        (false, false) => [1, 0],
        (true, false) => [2, 0],
        (false, true) => [1, format.groups],
        (true, true) => [2, 2 * format.groups],
    };
    ROWS * (2 * halves + bytes) + format.len() * ROWS * format.bits / 8
}

/// Writes a block of each row.
fn write(format: &Format, blocks: &[Block; ROWS], bytes: &mut [u8]) {
    let mut rest = &mut bytes[..];
    put_halves(&mut rest, blocks.iter().map(|block| block.scale));
    if format.offset {
        put_halves(&mut rest, blocks.iter().map(|block| block.offset));
    }
    let mut put = |value: &dyn Fn(&Block) -> u8| {
        for (byte, block) in
            rest.split_off_mut(..ROWS).expect("room for a row of bytes").iter_mut().zip(blocks)
        {
            *byte = value(block);
        }
    };
    let groups = if format.group_scales { format.groups } else { 0 };
    for group in 0..groups {
        put(&|block| block.group_scales[group] as u8);
    }
    for group in 0..if format.offset { groups } else { 0 } {
        put(&|block| block.group_offsets[group]);
    }
    for (index, planes) in rest.chunks_exact_mut(format.bits * VECTOR).enumerate() {
        let mut codes = [0; CODES];
        for (row, block) in blocks.iter().enumerate() {
            for (column, code) in block.codes[index * COLUMNS..][..COLUMNS].iter().enumerate() {
                codes[at(row, column)] = *code;
            }
        }
        write_codes(format.bits, &codes, planes);
    }
}

/// Writes an `f16` of each row.
fn put_halves(to: &mut &mut [u8], halves: impl Iterator<Item = u16>) {
    let to = to.split_off_mut(..2 * ROWS).expect("room for a half of each row");
    for (to, half) in to.as_chunks_mut().0.iter_mut().zip(halves) {
        *to = half.to_le_bytes();
    }
}

/// The planes of codes: their bits, and how many are below them.
fn planes(bits: usize) -> impl Iterator<Item = [usize; 2]> {
    let sizes = [8, 4, 2, 1].into_iter().filter(move |size| bits & size != 0);
    sizes.scan(0, |low, size| Some([size, std::mem::replace(low, *low + size)]))
}

fn write_codes(bits: usize, codes: &[u8; CODES], mut to: &mut [u8]) {
    for [size, low] in planes(bits) {
        let plane = to.split_off_mut(..size * VECTOR).expect("room for a plane");
        for (part, codes) in codes.chunks_exact(plane.len()).enumerate() {
            for (byte, code) in plane.iter_mut().zip(codes) {
                let bits = u32::from(*code) >> low & ((1 << size) - 1);
                *byte |= (bits << (part * size)) as u8;
            }
        }
    }
}

#[inline(always)]
fn read_codes(bits: usize, from: &[u8], codes: &mut [u8; CODES]) {
    match bits {
        2 => read_plane::<2>(from, 0, codes),
        3 => {
            read_plane::<2>(from, 0, codes);
            read_plane::<1>(&from[2 * VECTOR..], 2, codes);
        }
        4 => read_plane::<4>(from, 0, codes),
        5 => {
            read_plane::<4>(from, 0, codes);
            read_plane::<1>(&from[4 * VECTOR..], 4, codes);
        }
        6 => {
            read_plane::<4>(from, 0, codes);
            read_plane::<2>(&from[4 * VECTOR..], 4, codes);
        }
        _ => codes.copy_from_slice(&from[..CODES]),
    }
}

/// Adds a plane of bits to codes, or begins them. Vectors are copied before they are computed
/// with: of references the compiler would check each time whether they overlap.
#[inline(always)]
fn read_plane<const BITS: usize>(from: &[u8], low: usize, codes: &mut [u8; CODES]) {
    let codes = codes.as_chunks_mut::<VECTOR>().0;
    for (index, bytes) in from[..BITS * VECTOR].as_chunks::<VECTOR>().0.iter().enumerate() {
        let bytes = *bytes;
        for part in 0..8 / BITS {
            let codes = &mut codes[part * BITS + index];
            let mut sums = if low == 0 { [0; VECTOR] } else { *codes };
            for (sum, byte) in sums.iter_mut().zip(bytes) {
                *sum |= (byte >> (part * BITS) & ((1 << BITS) - 1)) << low;
            }
            *codes = sums;
        }
    }
}

/// The scales and offsets of a block's groups, and what comes after them.
#[inline(always)]
fn read_factors<'a, I: Instructions>(
    instructions: I,
    format: &Format,
    bytes: &'a [u8],
    factors: &mut [Factors],
) -> &'a [u8] {
    let (scale, mut rest) = read_halves(instructions, bytes);
    let mut offset = [0.0; ROWS];
    if format.offset {
        (offset, rest) = read_halves(instructions, rest);
    }
    for factors in &mut *factors {
        *factors = Factors { scale, offset };
    }
    if format.group_scales {
        for factors in &mut *factors {
            let (bytes, after) = rest.split_first_chunk().expect("a scale of each row");
            factors.scale = scaled(scale, bytes.map(|byte: u8| f32::from(byte as i8)));
            rest = after;
        }
        let with_offset = if format.offset { factors } else { &mut [] };
        for factors in with_offset {
            let (bytes, after) = rest.split_first_chunk().expect("an offset of each row");
            factors.offset = scaled(offset, bytes.map(|byte: u8| f32::from(byte)));
            rest = after;
        }
    }
    rest
}

#[inline(always)]
fn scaled(mut numbers: [f32; ROWS], factors: [f32; ROWS]) -> [f32; ROWS] {
    for (number, factor) in numbers.iter_mut().zip(factors) {
        *number *= factor;
    }
    numbers
}

/// An `f16` of each row.
#[inline(always)]
fn read_halves<I: Instructions>(instructions: I, bytes: &[u8]) -> ([f32; ROWS], &[u8]) {
    let (halves, rest) = bytes.split_first_chunk().expect("a scale of each row");
    (instructions.halves(halves), rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_any_bits_come_back() {
        for bits in [2, 3, 4, 5, 6, 8] {
            let mut codes = [0; CODES];
            for (index, code) in codes.iter_mut().enumerate() {
                *code = (index * 37 % (1 << bits)) as u8;
            }
            let (mut planes, mut read) = (vec![0; bits * VECTOR], [0xaa; CODES]);
            write_codes(bits, &codes, &mut planes);
            read_codes(bits, &planes, &mut read);
            assert_eq!(read, codes, "{bits} bits");
        }
    }
}
