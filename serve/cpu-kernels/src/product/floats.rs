//! Products of plain numbers, in `f32`.

use pulp::{Arch, Simd, WithSimd};

use crate::{Matrix, packed::ROWS};

/// Rows of a matrix that are multiplied side by side.
const SIDE: usize = 4;
/// What rows in `f32` are filled up to, with zeros: a multiple of the numbers of a vector.
const ALIGNMENT: usize = 16;

/// Rows of `columns` numbers, filled up with zeros.
pub fn pad(x: &[f32], columns: usize) -> Vec<f32> {
    let width = columns.next_multiple_of(ALIGNMENT);
    let mut padded = vec![0.0; x.len() / columns * width];
    for (to, from) in padded.chunks_exact_mut(width).zip(x.chunks_exact(columns)) {
        to[..columns].copy_from_slice(from);
    }
    padded
}

/// Panels from `first` on, as many as `tiles` have room for: of each, a tile for each row of `x`,
/// which is padded.
pub struct FloatProduct<'a> {
    pub matrix: Matrix<'a>,
    pub first: usize,
    pub x: &'a [f32],
    pub count: usize,
    pub tiles: &'a mut [[f32; ROWS]],
}

impl FloatProduct<'_> {
    pub fn run(self) {
        Arch::new().dispatch(self);
    }
}

impl WithSimd for FloatProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { matrix, first, x, count, tiles } = self;
        let width = x.len() / count;
        let mut numbers = vec![0.0; SIDE * width];
        for (index, tiles) in tiles.chunks_exact_mut(count).enumerate() {
            for lane in (0..ROWS).step_by(SIDE) {
                let rows = (first + index) * ROWS + lane..matrix.rows();
                for (row, numbers) in rows.zip(numbers.chunks_exact_mut(width)) {
                    matrix.decode(row, &mut numbers[..matrix.columns()]);
                }
                for row in (0..count - count % 2).step_by(2) {
                    let sums = dots::<S, 2>(simd, &x[row * width..], &numbers, width);
                    write(simd, &mut tiles[row..], lane, sums);
                }
                if count % 2 == 1 {
                    let row = count - 1;
                    let sums = dots::<S, 1>(simd, &x[row * width..], &numbers, width);
                    write(simd, &mut tiles[row..], lane, sums);
                }
            }
        }
    }
}

/// The products of the first rows of `x` with each row of a matrix, before the numbers of a vector
/// are added up.
#[inline(always)]
fn dots<S: Simd, const X: usize>(simd: S, x: &[f32], matrix: &[f32], width: usize) -> [[S::f32s; SIDE]; X] {
    let len = width / S::F32_LANES;
    let (mut rows, mut weights) = ([&[][..]; X], [&[][..]; SIDE]);
    for (index, row) in rows.iter_mut().enumerate() {
        *row = &S::as_simd_f32s(&x[index * width..][..width]).0[..len];
    }
    for (index, row) in weights.iter_mut().enumerate() {
        *row = &S::as_simd_f32s(&matrix[index * width..][..width]).0[..len];
    }
    let mut sums = [[simd.splat_f32s(0.0); SIDE]; X];
    for at in 0..len {
        for (sums, row) in sums.iter_mut().zip(rows) {
            for (sum, weights) in sums.iter_mut().zip(weights) {
                *sum = simd.mul_add_e_f32s(row[at], weights[at], *sum);
            }
        }
    }
    sums
}

/// Adds the numbers of vectors up, and writes them to lanes of the first tiles.
#[inline(always)]
fn write<S: Simd, const X: usize>(
    simd: S,
    tiles: &mut [[f32; ROWS]],
    lane: usize,
    sums: [[S::f32s; SIDE]; X],
) {
    for (tile, sums) in tiles.iter_mut().zip(sums) {
        for (number, sum) in tile[lane..].iter_mut().zip(sums) {
            *number = simd.reduce_sum_f32s(sum);
        }
    }
}
