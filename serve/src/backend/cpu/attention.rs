//! Attention of new tokens to all tokens of their sequences.

use flashinfer_cpu_kernels::Attention;
use flashinfer_rs::kv::Batch;
use rayon::prelude::*;

use super::cache::{KeysAndValues, slot};
use crate::model::Config;

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
    let Config { head_dim, heads, attention_scale, attention_soft_cap, .. } = *config;
    let ([qo, kv], group) = (config.widths(), heads.num_qo_heads / heads.num_kv_heads);
    let indices = batch.append_indices();
    let (requests, positions) = (indices.batch_indices(), indices.positions());
    let mut out = vec![0.0; q.len()];
    let row = |(row, out): (usize, &mut [f32])| {
        let (pages, position) = (batch.pages().pages(requests[row] as usize), positions[row] as usize);
        let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
        let starts: Vec<_> =
            (first..=position).map(|at| slot(pages, batch.pages().page_size(), at) * kv).collect();
        let head = |(head, (out, q)): (usize, (&mut [f32], &[f32]))| {
            let of_head = head / group * head_dim;
            let (k, v) = (&cache.k[of_head..], &cache.v[of_head..]);
            let (scale, soft_cap) = (attention_scale as f32, attention_soft_cap.map(|cap| cap as f32));
            Attention { q, k, v, starts: &starts, scale, soft_cap }.run(out);
        };
        let heads = out.par_chunks_exact_mut(head_dim).zip(q[row * qo..][..qo].par_chunks_exact(head_dim));
        heads.enumerate().with_min_len(WORTH_A_THREAD / (head_dim * starts.len()) + 1).for_each(head);
    };
    let most = positions.iter().map(|&position| position as usize + 1).max().unwrap_or(1);
    let rows = out.par_chunks_exact_mut(qo).enumerate();
    rows.with_min_len(WORTH_A_THREAD / (qo * most) + 1).for_each(row);
    out
}
