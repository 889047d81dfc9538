//! Products of rows of activations and the transpose of matrices.
//!
//! A thread takes panels of 16 rows of a matrix, reads each once, and multiplies all rows of
//! activations by it. Whatever is computed beside it, a number of the product is the sum of the
//! same products in the same order: a request's answer does not depend on the batch that it is in.

mod floats;
mod integers;

use rayon::prelude::*;

use self::{floats::FloatProduct, integers::IntegerProduct};
use super::{
    activations::Activations,
    instructions::Available,
    packed::ROWS,
    weights::{Storage, Weights},
};

/// Numbers of a matrix that are worth a task of its own.
const TASK: usize = 1 << 17;

/// `x · matrixᵀ` for rows `x`, `[count, columns]`, and several matrices, one beside the other:
/// `[count, rows of all]`.
///
/// # Panics
/// A matrix is not as wide as the others, or `x` is no whole number of rows.
pub fn multiply(x: &[f32], matrices: &[&Weights]) -> Vec<f32> {
    multiply_with(Available::best(), x, matrices)
}

fn multiply_with(instructions: Available, x: &[f32], matrices: &[&Weights]) -> Vec<f32> {
    let Some(columns) = matrices.first().map(|matrix| matrix.columns()) else { return Vec::new() };
    assert!(matrices.iter().all(|matrix| matrix.columns() == columns) && x.len().is_multiple_of(columns));
    let (count, rows) = (x.len() / columns, matrices.iter().map(|matrix| matrix.rows()).sum::<usize>());
    let mut product = vec![0.0; count * rows];
    if product.is_empty() {
        return product;
    }
    let is_packed = |matrix: &&Weights| matches!(matrix.0, Storage::Packed(_));
    let codes = matrices.iter().any(is_packed).then(|| Activations::new(x, columns));
    let floats = (!matrices.iter().all(is_packed)).then(|| floats::pad(x, columns));

    // Of each panel, what it gives for each row of `x`.
    let panels = |matrix: &Weights| matrix.rows().div_ceil(ROWS);
    let mut tiles = vec![[0.0; ROWS]; count * matrices.iter().map(|matrix| panels(matrix)).sum::<usize>()];
    let panels_of_task = (TASK / columns / ROWS).max(1);
    let (mut tasks, mut rest) = (Vec::new(), &mut tiles[..]);
    for matrix in matrices {
        for first in (0..panels(matrix)).step_by(panels_of_task) {
            let len = panels_of_task.min(panels(matrix) - first);
            tasks.push((matrix, first, rest.split_off_mut(..len * count).expect("a tile for each panel")));
        }
    }
    tasks.into_par_iter().for_each(|(matrix, first, tiles)| match (&matrix.0, &codes, &floats) {
        (Storage::Packed(weights), Some(x), _) => {
            instructions.run(IntegerProduct { weights, first, x, count, tiles });
        }
        (Storage::Plain(weights), _, Some(x)) => {
            FloatProduct { matrix: weights.matrix(), first, x, count, tiles }.run();
        }
        _ => unreachable!("activations are there in the form of each matrix"),
    });

    let write = |(row, out): (usize, &mut [f32])| {
        let (mut out, mut tiles) = (out, &tiles[..]);
        for matrix in matrices {
            let (these, others) = tiles.split_at(panels(matrix) * count);
            let (to, rest) = out.split_at_mut(matrix.rows());
            (out, tiles) = (rest, others);
            for (to, tile) in to.chunks_mut(ROWS).zip(these.iter().skip(row).step_by(count)) {
                to.copy_from_slice(&tile[..to.len()]);
            }
        }
    };
    product.par_chunks_exact_mut(rows).enumerate().for_each(write);
    product
}

#[cfg(test)]
mod tests;
