//! Attention of one head of one query.

use pulp::{Arch, Simd, WithSimd};

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
        out.fill(0.0);
        for (&weight, &at) in weights.iter().zip(starts) {
            add_scaled(simd, out, weight, &v[at..][..q.len()]);
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

/// `out + weight · v`.
#[inline(always)]
fn add_scaled<S: Simd>(simd: S, out: &mut [f32], weight: f32, v: &[f32]) {
    let ((out, out_rest), (v, v_rest)) = (S::as_mut_simd_f32s(out), S::as_simd_f32s(v));
    let vector = simd.splat_f32s(weight);
    for (out, v) in out.iter_mut().zip(v) {
        *out = simd.mul_add_e_f32s(vector, *v, *out);
    }
    for (out, v) in out_rest.iter_mut().zip(v_rest) {
        *out += weight * v;
    }
}

fn softmax(logits: &mut [f32]) {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for logit in logits.iter_mut() {
        *logit = (*logit - most).exp();
        sum += *logit;
    }
    logits.iter_mut().for_each(|logit| *logit /= sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attention_is_that_of_its_definition() {
        // Eleven numbers, which are no whole number of vectors; tokens in any order.
        let numbers = |seed: f64| -> Vec<f32> { (0..77).map(|at| (seed * at as f64).sin() as f32).collect() };
        let (q, k, v) = (numbers(0.3), numbers(0.7), numbers(1.1));
        let starts = [44, 0, 66, 11];
        for soft_cap in [None, Some(2.0)] {
            let attention = Attention { q: &q[..11], k: &k, v: &v, starts: &starts, scale: 1.5, soft_cap };
            let mut out = [f32::NAN; 11];
            attention.run(&mut out);
            let product = |&at: &usize| -> f64 {
                let dot: f64 = (0..11).map(|i| f64::from(q[i]) * f64::from(k[at + i])).sum();
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
