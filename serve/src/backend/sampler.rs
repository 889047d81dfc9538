//! Tokens from logits on the host: for the CPU, and for what a GPU leaves to it.

use flashinfer_rs::{TensorMut, TensorRef, reference, reference::Filter, sampling::Parameter};

use crate::{
    Result,
    backend::{LogitEdit, Logprobs, Output, Sample, TokenLogprob},
};

/// Samples from rows of logits, `[outputs, vocab]`.
pub fn sample(outputs: &[Output], logits: &[f32], vocab: usize) -> Result<Vec<Sample>> {
    let rows = logits.chunks_exact(vocab).zip(outputs);
    rows.map(|(row, output)| {
        let mut edited = row.to_vec();
        edit(&mut edited, &output.edits);
        let token = match output.temperature {
            0.0 => argmax(&edited)?,
            _ => draw(&edited, output)?,
        };
        let wanted = token.zip(output.logprobs);
        Ok(Sample { token, logprobs: wanted.map(|(token, count)| logprobs(row, token, count)) })
    })
    .collect()
}

/// Applies edits to a row of logits.
fn edit(row: &mut [f32], edits: &[LogitEdit]) {
    for &LogitEdit { token, scale, add } in edits {
        let logit = &mut row[token as usize];
        let scaled = if *logit > 0.0 { *logit / scale } else { *logit * scale };
        *logit = scaled + add;
    }
}

fn argmax(row: &[f32]) -> Result<Option<u32>> {
    let tokens = reference::argmax(&TensorRef::from_slice(row, &[1, row.len()])?)?;
    Ok(tokens[0].map(|token| token as u32))
}

fn draw(row: &[f32], output: &Output) -> Result<Option<u32>> {
    let shape = [1, row.len()];
    let mut probs = vec![0.0f32; row.len()];
    reference::softmax(
        &mut TensorMut::from_slice(&mut probs, &shape)?,
        &TensorRef::from_slice(row, &shape)?,
        Parameter::Value(output.temperature.into()),
    )?;
    if probs.iter().any(|prob| prob.is_nan()) {
        return Ok(None);
    }
    let mut filters = vec![Filter::MinP(Parameter::Value(output.min_p.into()))];
    if output.top_k > 0 {
        filters.push(Filter::TopK(Parameter::Value(output.top_k)));
    }
    filters.push(Filter::TopP(Parameter::Value(output.top_p.into())));
    for filter in filters {
        let input = probs.clone();
        reference::filtered_probs(
            &mut TensorMut::from_slice(&mut probs, &shape)?,
            &TensorRef::from_slice(&input, &shape)?,
            &filter,
        )?;
    }
    let mut sum = 0.0;
    let exceeds = |(_, prob): &(usize, &f32)| {
        sum += f64::from(**prob);
        sum > output.uniform.into()
    };
    // Rounding may leave the sum of all a little below the number.
    let drawn = probs.iter().enumerate().find(exceeds).map(|(token, _)| token);
    Ok(drawn.or_else(|| probs.iter().rposition(|&prob| prob > 0.0)).map(|token| token as u32))
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
