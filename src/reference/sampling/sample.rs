//! A whole sampling step on the CPU.

use std::f32::consts::{LN_2, LOG2_E};

use super::parameters::floats;
use crate::{
    dtype::DType,
    error::Result,
    indices::LogitEdits,
    reference::host::HostCheck,
    sampling::{MIN_P, Parameter, SampleOptions, TEMPERATURE_OR_0, TOP_P, check_rows, check_sample},
    tensor::{TensorMut, TensorRef},
};

/// [`sampling::sample`](crate::sampling::sample) on the CPU: the token of each row; `None`, for
/// which the GPU has −1, where there is none. The logits stay.
///
/// It computes as the kernel does, in `f32` and in integers, and gives the same tokens.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device, dtype or shape does
/// not fit, or a parameter is out of its range.
///
/// ```
/// use flashinfer_rs::{TensorRef, reference, sampling::SampleOptions};
/// let logits = [0.0f32, 2.0, 1.0, f32::NAN, 1.0, 1.0];
/// let options = SampleOptions::new(TensorRef::from_slice(&[0.5f32, 0.5], &[2])?);
/// let tokens = reference::sample(&TensorRef::from_slice(&logits, &[2, 3])?, &options)?;
/// assert_eq!(tokens, [Some(1), None]);
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
pub fn sample(logits: &TensorRef<'_>, options: &SampleOptions<'_>) -> Result<Vec<Option<i32>>> {
    let check = HostCheck { op: "reference::sample" };
    check.as_kernel(|check| check_sample(check, &logits.raw, options))?;
    let rows = check.rows("logits", logits, &[], &[2])?;
    if rows.width() == 0 {
        let problem = format!("its shape is {:?}; a row has at least 1 element", rows.shape());
        return check.fail("logits", problem);
    }
    let count = rows.count();
    let uniforms = check.rows("uniforms", &options.uniforms, &[], &[1])?;
    check.shape("uniforms", &uniforms, &[count as i64])?;
    let uniforms = uniforms.numbers(0);
    let temperatures = floats(check, "temperature", TEMPERATURE_OR_0, options.temperature, count)?;
    let top_ks = top_ks(check, options.top_k, count)?;
    let top_ps = floats(check, "top_p", TOP_P, options.top_p, count)?;
    let min_ps = floats(check, "min_p", MIN_P, options.min_p, count)?;
    let mut numbers = vec![0.0; rows.width()];
    let mut row = vec![0.0; rows.width()];
    let draws = (0..count).map(|at| {
        rows.read(at, &mut numbers);
        row.iter_mut().zip(&numbers).for_each(|(to, &number)| *to = number as f32);
        let step = RowParams {
            temperature: temperatures[at] as f32,
            top_k: top_ks[at],
            top_p: top_ps[at] as f32,
            min_p: min_ps[at] as f32,
            uniform: uniforms[at] as f32,
        };
        step.draw(&mut row)
    });
    Ok(draws.collect())
}

/// How many tokens each row keeps; 0 and less for all.
fn top_ks(check: HostCheck, parameter: Parameter<'_, u32>, len: usize) -> Result<Vec<i64>> {
    match parameter {
        Parameter::Value(value) => Ok(vec![value.into(); len]),
        Parameter::PerRow(tensor) => {
            let values = check.integers("top_k", &tensor)?;
            if values.len() != len {
                return check.fail("top_k", format!("{} numbers; expected {len}", values.len()));
            }
            Ok(values)
        }
    }
}

/// The parameters of one row.
struct RowParams {
    temperature: f32,
    top_k: i64,
    top_p: f32,
    min_p: f32,
    uniform: f32,
}

impl RowParams {
    /// The token of a row, whose logits become weights.
    fn draw(&self, row: &mut [f32]) -> Option<i32> {
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if largest == f32::NEG_INFINITY || row.iter().any(|logit| logit.is_nan()) {
            return None;
        }
        if self.temperature.is_nan() || self.temperature <= 0.0 {
            return row.iter().position(|&logit| logit == largest).map(|token| token as i32);
        }
        row.iter_mut().for_each(|logit| *logit = weight(*logit, largest, self.temperature));
        let least = self.least(row);
        let units_of = |&weight: &f32| if weight >= least { units(weight) } else { 0 };
        let mut rest = part(row.iter().map(units_of).sum(), self.uniform);
        let exceeds = |weight: &f32| {
            let units = units_of(weight);
            let exceeds = units > rest;
            rest = rest.saturating_sub(units);
            exceeds
        };
        row.iter().position(exceeds).map(|token| token as i32)
    }

    /// The least weight that passes all filters.
    fn least(&self, weights: &[f32]) -> f32 {
        let mut least = if self.min_p > 0.0 { self.min_p.min(1.0) } else { f32::MIN_POSITIVE };
        let by_top_k = self.top_k > 0 && self.top_k < weights.len() as i64;
        let by_top_p = self.top_p.is_nan() || self.top_p < 1.0;
        if !by_top_k && !by_top_p {
            return least;
        }
        let mut passing: Vec<f32> = weights.iter().copied().filter(|&weight| weight >= least).collect();
        if by_top_k && self.top_k < passing.len() as i64 {
            let last = self.top_k as usize - 1;
            least = *passing.select_nth_unstable_by(last, |a, b| b.total_cmp(a)).1;
            passing.retain(|&weight| weight >= least);
        }
        if by_top_p {
            passing.sort_unstable_by(|a, b| b.total_cmp(a));
            let limit = part(passing.iter().map(|&weight| units(weight)).sum(), self.top_p).max(1);
            let mut sum = 0;
            let reaches = |weight: &&f32| {
                sum += units(**weight);
                sum >= limit
            };
            least = passing.iter().find(reaches).copied().unwrap_or(least);
        }
        least
    }
}

/// The weight of a logit that is not above the largest: 2 to the power of the distance. Every
/// step is rounded as the kernel rounds it.
fn weight(logit: f32, largest: f32, temperature: f32) -> f32 {
    if logit == largest {
        return 1.0;
    }
    let power = (logit - largest) / temperature * LOG2_E;
    if power.is_nan() || power <= -41.0 {
        return 0.0;
    }
    let whole = power.round_ties_even();
    let part = power - whole;
    let series = [1.540353e-4f32, 1.3333558e-3, 9.618129e-3, 5.550411e-2, 2.402265e-1, LN_2, 1.0];
    let sum = series.into_iter().reduce(|sum, term| sum * part + term).unwrap_or(1.0);
    f32::from_bits(sum.to_bits().wrapping_add((whole as i32 as u32) << 23))
}

/// A weight in multiples of 2⁻⁴⁰, rounded down.
fn units(weight: f32) -> u64 {
    (f64::from(weight) * 2f64.powi(40)) as u64
}

/// A fraction of a sum, below the sum. NaN is 0.
fn part(sum: u64, fraction: f32) -> u64 {
    let of_2_64 = (f64::from(fraction.min(1.0f32.next_down())) * 2f64.powi(64)) as u64;
    let fraction = if fraction.is_nan() { 0 } else { of_2_64 };
    ((u128::from(sum) * u128::from(fraction)) >> 64) as u64
}

/// [`sampling::edit_logits`](crate::sampling::edit_logits) on the CPU, with the same results.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device, dtype or shape does
/// not fit, or the edits are of other rows or more tokens. Nothing was written.
///
/// ```
/// use flashinfer_rs::{TensorMut, indices::{LogitEdit, LogitEdits}, reference};
/// let mut logits = [0.0f32, 2.0, 1.0];
/// let edits = LogitEdits::new(3, [[LogitEdit::bias(0, 0.5), LogitEdit::ban(1)]])?;
/// reference::edit_logits(&mut TensorMut::from_slice(&mut logits, &[1, 3])?, &edits)?;
/// assert_eq!(logits, [0.5, f32::NEG_INFINITY, 1.0]);
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
pub fn edit_logits(logits: &mut TensorMut<'_>, edits: &LogitEdits) -> Result<()> {
    let check = HostCheck { op: "reference::edit_logits" };
    check.as_kernel(|check| check_rows(check, "logits", &logits.raw, &[DType::F32], 2))?;
    let mut logits = check.rows_mut("logits", logits, &[], &[2])?;
    let shape = [logits.rows.count() as i64, logits.rows.width() as i64];
    edits.check_fits(shape).or_else(|problem| check.fail("edits", problem))?;
    let mut row = vec![0.0; logits.rows.width()];
    for at in (0..edits.rows()).filter(|&at| edits.row(at).next().is_some()) {
        logits.rows.read(at, &mut row);
        for edit in edits.row(at) {
            let logit = &mut row[edit.token as usize];
            *logit = edit.apply(*logit as f32).into();
        }
        logits.write(at, &row);
    }
    Ok(())
}
