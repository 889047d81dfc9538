//! Rows to draw from.

// Each test file uses its own part of this.
#![allow(dead_code)]

use flashinfer_rs::{TensorRef, reference::Filter};

use super::{Gpu, Mirrored, Rng};

/// A row of which few tokens have nine tenths, at random places, each 0.9
/// times the one before, and the others the rest; and how many those few are.
pub fn peaked(rng: &mut Rng, vocab: usize) -> (Vec<f32>, usize) {
    let peaks = vocab.min(40);
    let mut row = vec![0.0; vocab];
    let places = rng.permutation(vocab);
    for (rank, &place) in places.iter().take(peaks).enumerate() {
        row[place as usize] = 0.9f64.powi(rank as i32);
    }
    let least = 0.9f64.powi(peaks as i32) / 2.0;
    let rest = row.iter().sum::<f64>() / 9.0 / (vocab - peaks).max(1) as f64;
    row.iter_mut().filter(|x| **x == 0.0).for_each(|x| *x = rest.min(least));
    let sum: f64 = row.iter().sum();
    (row.into_iter().map(|x| (x / sum) as f32).collect(), peaks)
}

/// Filters that keep half of a row's peaks, with room for rounding: `[top_k,
/// top_p, min_p]`.
pub fn half(row: &[f32], peaks: usize) -> (u32, f64, f64) {
    let mut order: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
    order.sort_unstable_by(|a, b| b.total_cmp(a));
    let keep = peaks / 2;
    if keep == 0 {
        return (1, 1.0, 0.5);
    }
    let before: f64 = order[..keep - 1].iter().sum();
    (keep as u32, before + order[keep - 1] / 2.0, (order[keep - 1] * order[keep]).sqrt() / order[0])
}

/// Rows of random numbers through a softmax.
pub fn softmax_rows(gpu: &Gpu, rng: &mut Rng, shape: [usize; 2], scale: f64) -> Mirrored<f32> {
    let mut rows = Vec::with_capacity(shape[0] * shape[1]);
    for _ in 0..shape[0] {
        let row: Vec<f64> = (0..shape[1]).map(|_| (rng.unit() * scale).exp()).collect();
        let sum: f64 = row.iter().sum();
        rows.extend(row.into_iter().map(|x| (x / sum) as f32));
    }
    Mirrored::new(gpu, &shape, rows)
}

/// The exact distribution of one row behind a filter.
pub fn distribution(row: &[f32], filter: &Filter<'_>) -> Vec<f64> {
    let mut out = vec![f64::NAN; row.len()];
    let shape = [1, row.len()];
    flashinfer_rs::reference::filtered_probs(
        &mut flashinfer_rs::TensorMut::from_slice(&mut out, &shape).unwrap(),
        &TensorRef::from_slice(row, &shape).unwrap(),
        filter,
    )
    .unwrap();
    out
}
