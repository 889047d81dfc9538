//! Functions that write matrices.

use super::{
    DTYPES,
    filter::{Filter, Rules},
    parameters::{counts, floats},
};
use crate::{
    error::Result,
    reference::{
        host::{HostCheck, Rows},
        strict,
    },
    sampling::{Parameter, TEMPERATURE, check_softmax, check_top_k, check_top_p_renorm_probs},
    tensor::{TensorMut, TensorRef},
};

/// Reads, changes and writes each row.
fn map_rows(
    check: HostCheck,
    name: &'static str,
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    change: impl FnOnce(&Rows<'_>) -> Result<Box<dyn Fn(usize, &mut [f64])>>,
) -> Result<()> {
    let input = check.rows(name, input, &DTYPES, &[2])?;
    let mut out = check.rows_mut("out", out, &DTYPES, &[2])?;
    check.shape("out", &out.rows, input.shape())?;
    if input.width() == 0 {
        return check.fail(name, format!("its shape is {:?}; a row has at least 1 element", input.shape()));
    }
    let change = change(&input)?;
    let mut row = vec![0.0; input.width()];
    for at in 0..input.count() {
        input.read(at, &mut row);
        change(at, &mut row);
        out.write(at, &row);
    }
    Ok(())
}

pub(super) fn softmax_row(row: &mut [f64], temperature: f64) {
    let factor = if temperature == 0.0 { 0.0 } else { 1.0 / temperature };
    row.iter_mut().for_each(|x| *x *= factor);
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    row.iter_mut().for_each(|x| *x = (*x - max).exp());
    let sum: f64 = row.iter().sum();
    row.iter_mut().for_each(|x| *x /= sum);
}

/// [`sampling::softmax`](crate::sampling::softmax) on the CPU.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device,
/// dtype or shape does not fit, or a parameter is out of its range. Nothing was
/// written.
pub fn softmax(out: &mut TensorMut<'_>, logits: &TensorRef<'_>, temperature: Parameter<'_>) -> Result<()> {
    let check = HostCheck { op: "reference::softmax" };
    check.as_kernel(|check| check_softmax(check, &out.raw, &logits.raw, temperature))?;
    map_rows(check, "logits", out, logits, |rows| {
        let temperatures = floats(check, "temperature", TEMPERATURE, temperature, rows.count())?;
        Ok(Box::new(move |at, row| softmax_row(row, temperatures[at])))
    })
}

/// The distribution that is drawn from: what the filter leaves, divided by its
/// sum. With [`Filter::TopK`] and [`Filter::TopP`] this is
/// [`sampling::top_k_renorm_probs`](crate::sampling::top_k_renorm_probs) and
/// [`sampling::top_p_renorm_probs`](crate::sampling::top_p_renorm_probs) on the
/// CPU. A row of which nothing is left is 0.
///
/// # Errors
/// As [`softmax`].
pub fn filtered_probs(out: &mut TensorMut<'_>, probs: &TensorRef<'_>, filter: &Filter<'_>) -> Result<()> {
    let check = HostCheck { op: "reference::filtered_probs" };
    match *filter {
        Filter::TopK(top_k) => strict::as_kernel("top_k_renorm_probs", |check| {
            check_top_k(check, "probs", &out.raw, &probs.raw, top_k)
        })?,
        Filter::TopP(top_p) => strict::as_kernel("top_p_renorm_probs", |check| {
            check_top_p_renorm_probs(check, &out.raw, &probs.raw, top_p)
        })?,
        // No kernel writes these.
        Filter::None | Filter::MinP(_) | Filter::TopKTopP(..) => {}
    }
    map_rows(check, "probs", out, probs, |rows| {
        let rules = Rules::of(check, filter, rows.count(), rows.count())?;
        Ok(Box::new(move |at, row| {
            let sum = rules.limits[at].apply(row);
            if sum > 0.0 {
                row.iter_mut().for_each(|x| *x /= sum);
            }
        }))
    })
}

/// [`sampling::top_k_mask_logits`](crate::sampling::top_k_mask_logits) on the
/// CPU, for logits without NaN.
///
/// # Errors
/// As [`softmax`].
pub fn top_k_mask_logits(
    out: &mut TensorMut<'_>,
    logits: &TensorRef<'_>,
    top_k: Parameter<'_, u32>,
) -> Result<()> {
    let check = HostCheck { op: "reference::top_k_mask_logits" };
    check.as_kernel(|check| check_top_k(check, "logits", &out.raw, &logits.raw, top_k))?;
    map_rows(check, "logits", out, logits, |rows| {
        let top_k = counts(check, top_k, rows.count())?;
        Ok(Box::new(move |at, row| {
            let mut order = row.to_vec();
            order.sort_unstable_by(|a, b| b.total_cmp(a));
            let least = match top_k[at] as usize {
                0 => f64::INFINITY,
                k => order[k.min(order.len()) - 1],
            };
            row.iter_mut().filter(|x| **x < least).for_each(|x| *x = f64::NEG_INFINITY);
        }))
    })
}
