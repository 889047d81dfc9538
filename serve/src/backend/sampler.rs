//! Tokens from logits on the host: for the CPU, and for rows of a GPU under a constraint; and
//! log-probabilities for both.

use flashinfer_rs::{
    TensorMut, TensorRef,
    indices::LogitEdits,
    reference,
    sampling::{Parameter, SampleOptions},
};
use toktrie::SimpleVob;

use crate::{
    Result,
    backend::{Logprobs, Output, Sample, TokenLogprob},
};

/// Samples from rows of logits, `[outputs, vocab]`.
///
/// # Errors
/// The logits are not as many; or an output's edits are not what it says of them, or depend on its
/// row's token (see [`Output::after`]).
pub fn sample(outputs: &[Output], logits: &[f32], vocab: usize) -> Result<Vec<Sample>> {
    if outputs.is_empty() {
        return Ok(Vec::new());
    }
    if let Some(output) = outputs.iter().find(|output| output.last_edit.is_some()) {
        return Err(
            format!("the edits of row {} depend on its token; expected known ones", output.row).into()
        );
    }
    let (rows, shape) = ([outputs.len()], [outputs.len(), vocab]);
    let mut edited = logits.to_vec();
    let edits = LogitEdits::new(vocab, outputs.iter().map(|output| output.edits.iter().copied()))?;
    reference::edit_logits(&mut TensorMut::from_slice(&mut edited, &shape)?, &edits)?;
    for (output, row) in outputs.iter().zip(edited.chunks_exact_mut(vocab)) {
        output.allowed.iter().for_each(|allowed| keep_allowed(row, allowed));
    }
    let numbers = |of: fn(&Output) -> f32| outputs.iter().map(of).collect::<Vec<_>>();
    let (uniforms, temperatures) = (numbers(|output| output.uniform), numbers(|output| output.temperature));
    let (top_ps, min_ps) = (numbers(|output| output.top_p), numbers(|output| output.min_p));
    let top_ks: Vec<_> = outputs.iter().map(|output| i32::try_from(output.top_k).unwrap_or(0)).collect();
    let mut options = SampleOptions::new(TensorRef::from_slice(&uniforms, &rows)?);
    options.temperature = Parameter::PerRow(TensorRef::from_slice(&temperatures, &rows)?);
    options.top_k = Parameter::PerRow(TensorRef::from_slice(&top_ks, &rows)?);
    options.top_p = Parameter::PerRow(TensorRef::from_slice(&top_ps, &rows)?);
    options.min_p = Parameter::PerRow(TensorRef::from_slice(&min_ps, &rows)?);
    let tokens = reference::sample(&TensorRef::from_slice(&edited, &shape)?, &options)?;
    let samples = tokens.into_iter().zip(outputs).zip(logits.chunks_exact(vocab));
    Ok(samples
        .map(|((token, output), row)| {
            let token = token.map(|token| token as u32);
            let wanted = token.zip(output.logprobs);
            Sample { token, logprobs: wanted.map(|(token, count)| logprobs(row, token, count)) }
        })
        .collect())
}

/// Has none but the allowed tokens be drawn from a row. NaN stays.
fn keep_allowed(row: &mut [f32], allowed: &SimpleVob) {
    for (token, logit) in row.iter_mut().enumerate() {
        let is_allowed = token < allowed.len() && allowed.get(token);
        if !is_allowed && !logit.is_nan() {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// The log-probabilities of a token and of the `count` likeliest ones.
pub fn logprobs(row: &[f32], token: u32, count: usize) -> Logprobs {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    let of = |token: u32| (f64::from(row[token as usize] - largest) - sum.ln()) as f32;
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    let descending = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
    let count = count.min(order.len());
    if 0 < count && count < order.len() {
        order.select_nth_unstable_by(count - 1, descending);
    }
    order.truncate(count);
    order.sort_unstable_by(descending);
    let top = order.into_iter().map(|token| TokenLogprob { token, logprob: of(token) });
    Logprobs { chosen: of(token), top: top.collect() }
}
