//! Attention on the CPU, by hand and against simpler code.

mod by_hand;
mod random;
mod wrong_input;

use super::*;
use crate::DType;

#[track_caller]
fn close(got: &[f64], expected: &[f64]) {
    assert_eq!(got.len(), expected.len());
    let near = |(a, b): (&f64, &f64)| a == b || (a - b).abs() < 1e-12;
    assert!(got.iter().zip(expected).all(near), "{got:?} is not {expected:?}");
}

fn spec(head_dim: usize) -> AttentionSpec {
    AttentionSpec::new(DType::F64, head_dim)
}
