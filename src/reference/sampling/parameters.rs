//! Parameters of sampling, for each row.

use crate::{
    error::Result,
    reference::host::HostCheck,
    sampling::{Parameter, Rule},
};

/// A parameter's number for each of `len` rows, as the `f32` that kernels take.
pub(super) fn floats(
    check: HostCheck,
    name: &'static str,
    (allowed, rule): Rule,
    parameter: Parameter<'_>,
    len: usize,
) -> Result<Vec<f64>> {
    match parameter {
        Parameter::Value(value) if !allowed(value as f32) => {
            check.fail(name, format!("{value}; it must be {rule}"))
        }
        Parameter::Value(value) => Ok(vec![f64::from(value as f32); len]),
        Parameter::PerRow(tensor) => {
            let rows = check.rows(name, &tensor, &[], &[1])?;
            check.shape(name, &rows, &[len as i64])?;
            Ok(rows.numbers(0))
        }
    }
}

/// As [`floats`], for a `top_k` of at least 1. Kernels take the lower 32 bits without a sign.
pub(super) fn counts(check: HostCheck, parameter: Parameter<'_, u32>, len: usize) -> Result<Vec<u32>> {
    match parameter {
        Parameter::Value(0) => check.fail("top_k", "0; it must be at least 1".into()),
        Parameter::Value(value) => Ok(vec![value; len]),
        Parameter::PerRow(tensor) => {
            let values = check.integers("top_k", &tensor)?;
            if values.len() != len {
                return check.fail("top_k", format!("{} numbers; expected {len}", values.len()));
            }
            Ok(values.into_iter().map(|value| value as u32).collect())
        }
    }
}
