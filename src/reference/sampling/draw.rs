//! Drawing a token from each row.

use super::{
    DTYPES,
    filter::{Filter, Limits, Rules},
    philox::PhiloxSequence,
    renorm::softmax_row,
};
use crate::{
    dtype::DType,
    error::Result,
    indices::BoundedIndices,
    reference::{host::HostCheck, strict},
    sampling::{KERNEL_DTYPES, Philox, check_rows},
    tensor::TensorRef,
};

/// [`sampling::argmax`](crate::sampling::argmax) on the CPU: the token of the
/// largest logit of each row, the first of those that are equal; `None`, for
/// which the GPU has −1, where a logit is NaN.
///
/// # Errors
/// As [`softmax`](super::softmax).
///
/// ```
/// use flashinfer_rs::{TensorRef, reference};
/// let logits = [0.5f32, 2.0, 2.0, 1.0, f32::NAN, 1.0];
/// let tokens = reference::argmax(&TensorRef::from_slice(&logits, &[2, 3])?)?;
/// assert_eq!(tokens, [Some(1), None]);
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
pub fn argmax(logits: &TensorRef<'_>) -> Result<Vec<Option<i32>>> {
    let check = HostCheck { op: "reference::argmax" };
    check.as_kernel(|check| check_rows(check, "logits", &logits.raw, &KERNEL_DTYPES, 2))?;
    let rows = check.rows("logits", logits, &DTYPES, &[2])?;
    if rows.width() == 0 {
        let problem = format!("its shape is {:?}; a row has at least 1 element", rows.shape());
        return check.fail("logits", problem);
    }
    let of_row = |row: Vec<f64>| {
        let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let place = row.iter().position(|&logit| logit == largest)?;
        (!row.iter().any(|logit| logit.is_nan())).then_some(place as i32)
    };
    Ok((0..rows.count()).map(|row| of_row(rows.numbers(row))).collect())
}

/// [`sampling::sampling_from_logits`](crate::sampling::sampling_from_logits)
/// on the CPU: a token for each row, or for each of `indices`.
///
/// # Errors
/// As [`softmax`](super::softmax); also when `indices` may be beyond the rows.
pub fn sampling_from_logits(
    logits: &TensorRef<'_>,
    indices: Option<&BoundedIndices>,
    random: Philox,
) -> Result<Vec<Option<i32>>> {
    let check = HostCheck { op: "reference::sampling_from_logits" };
    check.as_kernel(|check| check_rows(check, "logits", &logits.raw, &[DType::F32], 2))?;
    draw_rows(check, "logits", logits, &Filter::None, indices, random, |row| softmax_row(row, 1.0))
}

/// The functions of [`sampling`](crate::sampling) that draw from probabilities,
/// on the CPU: a token for each row, or for each of `indices`; `None` where
/// nothing passes the filter.
///
/// A tensor of parameters has a number for each row of `probs`, but for
/// [`Filter::TopK`] and [`Filter::MinP`] for each token, as the kernels' have.
///
/// # Errors
/// As [`softmax`](super::softmax); also when `indices` may be beyond the rows.
pub fn sampling_from_probs(
    probs: &TensorRef<'_>,
    filter: &Filter<'_>,
    indices: Option<&BoundedIndices>,
    random: Philox,
) -> Result<Vec<Option<i32>>> {
    let check = HostCheck { op: "reference::sampling_from_probs" };
    let rows_of_output = indices.map(|indices| indices.values().len() as i64);
    strict::as_kernel(filter.kernel(), |check| filter.check_as_kernel(check, &probs.raw, rows_of_output))?;
    draw_rows(check, "probs", probs, filter, indices, random, |_| ())
}

fn draw_rows(
    check: HostCheck,
    name: &'static str,
    source: &TensorRef<'_>,
    filter: &Filter<'_>,
    indices: Option<&BoundedIndices>,
    random: Philox,
    to_probs: impl Fn(&mut [f64]),
) -> Result<Vec<Option<i32>>> {
    let rows = check.rows(name, source, &DTYPES, &[2])?;
    if let Some(indices) = indices.filter(|indices| indices.bound() > rows.count()) {
        let problem = format!("they are below {}; there are {} rows", indices.bound(), rows.count());
        return check.fail("indices", problem);
    }
    let count = indices.map_or(rows.count(), |indices| indices.values().len());
    let rules = Rules::of(check, filter, rows.count(), count)?;
    let mut row = vec![0.0; rows.width()];
    // What was read and filtered last, which many tokens may be drawn from.
    let mut last = None;
    let mut sum = 0.0;
    let draws = (0..count).map(|at| {
        let from = indices.map_or(at, |indices| indices.values()[at] as usize);
        let limits = rules.limits[if rules.by_output { at } else { from }];
        if last != Some((from, limits)) {
            rows.read(from, &mut row);
            to_probs(&mut row);
            sum = limits.apply(&mut row);
            last = Some((from, limits));
        }
        // Without a filter, kernels take a row for a distribution.
        let scale = if limits == Limits::NONE { 1.0 } else { sum };
        pick(&row, PhiloxSequence::new(random, at as u64).uniform() * scale)
    });
    Ok(draws.collect())
}

/// The first token up to which the sum exceeds a number; the last token if none.
pub(super) fn pick(row: &[f64], number: f64) -> Option<i32> {
    let (mut sum, mut last) = (0.0, None);
    for (token, &x) in row.iter().enumerate().filter(|(_, x)| **x > 0.0) {
        sum += x;
        last = Some(token as i32);
        if sum > number {
            break;
        }
    }
    last
}
