//! Attention of one head of one query.

use pulp::{Arch, Simd, WithSimd};

use crate::exp::exp;

/// A query's head, and the keys and values that it attends to.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// `[head_dim]`.
    pub q: &'a [f32],
    /// Where keys are.
    pub k: &'a [f32],
    /// Where values are.
    pub v: &'a [f32],
    /// Where the keys and values of tokens start in `k` and `v`.
    pub starts: &'a [usize],
    /// What products of queries and keys are multiplied by.
    pub scale: f32,
    /// What bounds them, by `tanh`.
    pub soft_cap: Option<f32>,
}

impl Attention<'_> {
    /// Writes the sum of values, weighted by the softmax of products, to `out`, `[head_dim]`.
    ///
    /// # Panics
    /// A key or value is not in `k` or `v`, or `out` is not as long as `q`.
    pub fn run(&self, out: &mut [f32]) {
        assert_eq!(self.q.len(), out.len());
        Arch::new().dispatch(Run { attention: *self, out });
    }
}

struct Run<'a> {
    attention: Attention<'a>,
    out: &'a mut [f32],
}

impl WithSimd for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { attention: Attention { q, k, v, starts, scale, soft_cap }, out } = self;
        let mut weights = vec![0.0; starts.len()];
        for (weight, &at) in weights.iter_mut().zip(starts) {
            *weight = dot(simd, q, &k[at..][..q.len()]) * scale;
            if let Some(cap) = soft_cap {
                *weight = cap * (*weight / cap).tanh();
            }
        }
        softmax(&mut weights);
        let mut first = 0;
        // Sums stay in registers, for as many numbers as there is room there.
        while let Some(out) = out[first..].first_chunk_mut::<64>() {
            add_values::<S, 64>(simd, out, &weights, starts, &v[first..]);
            first += 64;
        }
        while let Some(out) = out[first..].first_chunk_mut::<16>() {
            add_values::<S, 16>(simd, out, &weights, starts, &v[first..]);
            first += 16;
        }
        for (index, out) in out.iter_mut().enumerate().skip(first) {
            *out = 0.0;
            for (&weight, &at) in weights.iter().zip(starts) {
                *out += weight * v[at + index];
            }
        }
    }
}

#[inline(always)]
fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (S::as_simd_f32s(a), S::as_simd_f32s(b));
    let (mut sums, mut rest) = (simd.splat_f32s(0.0), 0.0);
    for (a, b) in a.iter().zip(b) {
        sums = simd.mul_add_e_f32s(*a, *b, sums);
    }
    for (a, b) in a_rest.iter().zip(b_rest) {
        rest += a * b;
    }
    simd.reduce_sum_f32s(sums) + rest
}

/// The sum of `N` numbers of each value, a whole number of vectors, times its weight.
#[inline(always)]
fn add_values<S: Simd, const N: usize>(
    simd: S,
    out: &mut [f32; N],
    weights: &[f32],
    starts: &[usize],
    v: &[f32],
) {
    // As many as there are in the narrowest vectors; the rest is left out.
    let (len, mut sums) = (N / S::F32_LANES, [simd.splat_f32s(0.0); 64]);
    for (&weight, &at) in weights.iter().zip(starts) {
        let (v, weight) = (S::as_simd_f32s(&v[at..][..N]).0, simd.splat_f32s(weight));
        for (sum, v) in sums[..len].iter_mut().zip(v) {
            *sum = simd.mul_add_e_f32s(weight, *v, *sum);
        }
    }
    S::as_mut_simd_f32s(out).0.copy_from_slice(&sums[..len]);
}

/// Numbers that are added up, or compared, side by side.
const SIDE: usize = 16;

#[inline(always)]
fn softmax(logits: &mut [f32]) {
    let (mut most, mut sums) = ([f32::NEG_INFINITY; SIDE], [0.0; SIDE]);
    for logits in logits.chunks(SIDE) {
        for (most, &logit) in most.iter_mut().zip(logits) {
            *most = if logit > *most { logit } else { *most };
        }
    }
    let most = most.into_iter().fold(f32::NEG_INFINITY, f32::max);
    for logit in &mut *logits {
        *logit = exp(*logit - most);
    }
    for logits in logits.chunks(SIDE) {
        for (sum, logit) in sums.iter_mut().zip(logits) {
            *sum += logit;
        }
    }
    let scale = 1.0 / sums.iter().sum::<f32>();
    for logit in logits {
        *logit *= scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attention_is_that_of_its_definition() {
        // Numbers that are no whole number of vectors; tokens in any order.
        for dim in [11, 64, 93] {
            check(dim);
        }
    }

    fn check(dim: usize) {
        let numbers =
            |seed: f64| -> Vec<f32> { (0..7 * dim).map(|at| (seed * at as f64).sin() as f32).collect() };
        let (q, k, v) = (numbers(0.3), numbers(0.7), numbers(1.1));
        let starts = [4 * dim, 0, 6 * dim, dim];
        for soft_cap in [None, Some(2.0)] {
            let attention = Attention { q: &q[..dim], k: &k, v: &v, starts: &starts, scale: 1.5, soft_cap };
            let mut out = vec![f32::NAN; dim];
            attention.run(&mut out);
            let product = |&at: &usize| -> f64 {
                let dot: f64 = (0..dim).map(|i| f64::from(q[i]) * f64::from(k[at + i])).sum();
                soft_cap.map_or(1.5 * dot, |cap| f64::from(cap) * (1.5 * dot / f64::from(cap)).tanh())
            };
            let weights: Vec<f64> = starts.iter().map(|at| product(at).exp()).collect();
            for (index, out) in out.iter().enumerate() {
                let values = starts.iter().map(|at| f64::from(v[at + index]));
                let sum: f64 = values.zip(&weights).map(|(value, weight)| value * weight).sum();
                let expected = sum / weights.iter().sum::<f64>();
                assert!((f64::from(*out) - expected).abs() < 1e-6, "{out}, {expected}");
            }
        }
    }
}
