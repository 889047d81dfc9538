//! What an MLP does between its products.

use pulp::{Arch, Simd, WithSimd};

use crate::exp::exp;

/// What a gate makes of its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `x · sigmoid(x)`.
    Silu,
    /// GELU by its approximation with `tanh`.
    GeluTanh,
}

impl Gate {
    /// Writes `gate(a) · b` to `out`.
    ///
    /// # Panics
    /// They are not equally long.
    pub fn multiply(self, a: &[f32], b: &[f32], out: &mut [f32]) {
        assert!(a.len() == out.len() && b.len() == out.len());
        Arch::new().dispatch(Multiply { gate: self, a, b, out });
    }
}

struct Multiply<'a> {
    gate: Gate,
    a: &'a [f32],
    b: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { gate, a, b, out } = self;
        let numbers = out.iter_mut().zip(a.iter().zip(b));
        match gate {
            Gate::Silu => {
                for (out, (a, b)) in numbers {
                    *out = a / (1.0 + exp(-a)) * b;
                }
            }
            Gate::GeluTanh => {
                for (out, (a, b)) in numbers {
                    *out = gelu_tanh(*a) * b;
                }
            }
        }
    }
}

#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    // The root of 2/π.
    let inner = 0.797_884_6 * (x + 0.044715 * x * x * x);
    // Half of 1 + tanh is a sigmoid.
    x / (1.0 + exp(-2.0 * inner))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_are_those_of_their_definitions() {
        let numbers: Vec<_> = (-2500..=2500).map(|step| step as f32 / 100.0).collect();
        let ones = vec![1.0; numbers.len()];
        for gate in [Gate::Silu, Gate::GeluTanh] {
            let mut out = vec![f32::NAN; numbers.len()];
            gate.multiply(&numbers, &ones, &mut out);
            for (x, number) in numbers.iter().map(|&x| f64::from(x)).zip(out) {
                let expected = match gate {
                    Gate::Silu => x / (1.0 + (-x).exp()),
                    Gate::GeluTanh => {
                        0.5 * x
                            * (1.0 + (std::f64::consts::FRAC_2_PI.sqrt() * (x + 0.044715 * x.powi(3))).tanh())
                    }
                };
                let off = (f64::from(number) - expected).abs();
                assert!(off < 1e-6 * x.abs().max(0.01), "{gate:?} of {x} is {expected}, not {number}");
            }
            let mut out = [0.0; 2];
            gate.multiply(&[f32::NAN, 1.0], &[1.0, f32::NAN], &mut out);
            assert!(out.iter().all(|number| number.is_nan()));
        }
    }
}
