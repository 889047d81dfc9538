//! Attention of new tokens to all tokens of their sequences.

use flashinfer_rs::kv::Batch;
use rayon::prelude::*;

use super::cache::{KeysAndValues, slot};
use crate::model::Config;

/// Numbers that are added up side by side.
const LANES: usize = 8;
/// Products of two numbers that are worth a thread.
const WORTH_A_THREAD: usize = 1 << 16;

/// Attention of queries `[rows, num_qo_heads, head_dim]`, of a layer with this
/// window, to the keys and values of their sequences, those of the rows among
/// them.
pub fn attend(
    config: &Config,
    window: Option<usize>,
    batch: &Batch,
    q: &[f32],
    cache: &KeysAndValues,
) -> Vec<f32> {
    let [qo, _] = config.widths();
    let mut out = vec![0.0; q.len()];
    let indices = batch.append_indices();
    let (requests, positions) = (indices.batch_indices(), indices.positions());
    let row = |(row, out): (usize, &mut [f32])| {
        let (pages, position) = (batch.pages().pages(requests[row] as usize), positions[row] as usize);
        let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
        let slots = (first..=position).map(|at| slot(pages, batch.pages().page_size(), at));
        attend_row(config, &slots.collect::<Vec<_>>(), &q[row * qo..][..qo], cache, out);
    };
    let most = positions.iter().map(|&position| position as usize + 1).max().unwrap_or(0);
    if q.len() * most < WORTH_A_THREAD || positions.len() == 1 {
        out.chunks_exact_mut(qo).enumerate().for_each(row);
    } else {
        out.par_chunks_exact_mut(qo).enumerate().for_each(row);
    }
    out
}

/// Attention of one token's heads to the tokens in these slots of the cache.
fn attend_row(config: &Config, slots: &[usize], q: &[f32], cache: &KeysAndValues, out: &mut [f32]) {
    let Config { head_dim, heads, attention_scale, attention_soft_cap, .. } = *config;
    let group = heads.num_qo_heads / heads.num_kv_heads;
    let mut weights = vec![0.0; slots.len()];
    for (head, (q, out)) in q.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)).enumerate() {
        let place = |slot: usize| (slot * heads.num_kv_heads + head / group) * head_dim;
        for (weight, &slot) in weights.iter_mut().zip(slots) {
            *weight = dot(q, &cache.k[place(slot)..][..head_dim]) * attention_scale as f32;
        }
        if let Some(cap) = attention_soft_cap {
            let cap = cap as f32;
            weights.iter_mut().for_each(|weight| *weight = cap * (*weight / cap).tanh());
        }
        softmax(&mut weights);
        for (&weight, &slot) in weights.iter().zip(slots) {
            let v = &cache.v[place(slot)..][..head_dim];
            out.iter_mut().zip(v).for_each(|(out, v)| *out += weight * v);
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a.zip(b) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f32>() + rest
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
