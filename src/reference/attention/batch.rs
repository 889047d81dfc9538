//! Attention of the queries of a batch.

use super::{
    super::host::{HostCheck, Rows, RowsMut},
    keys::Keys,
    logits::{Logits, position, softmax},
};
use crate::{
    attention::AttentionSpec,
    error::Result,
    indices::RaggedIndices,
    tensor::{TensorMut, TensorRef},
};

/// The queries of a batch, and where results go.
pub(super) struct QueryBatch<'a> {
    check: HostCheck,
    queries: &'a RaggedIndices,
    heads: usize,
    q: Rows<'a>,
    out: RowsMut<'a>,
    lse: Option<RowsMut<'a>>,
}

impl<'a> QueryBatch<'a> {
    /// `padded` tensors may have more rows than there are queries.
    pub(super) fn new(
        check: HostCheck,
        spec: &AttentionSpec,
        q: &'a TensorRef<'_>,
        (queries, padded): (&'a RaggedIndices, bool),
        out: &'a mut TensorMut<'_>,
        lse: Option<&'a mut TensorMut<'_>>,
    ) -> Result<Self> {
        let q = check.rows("q", q, &[spec.dtype_q], &[3])?;
        let out = check.rows_mut("out", out, &[spec.dtype_o], &[3])?;
        let lse = lse.map(|lse| check.rows_mut("lse", lse, &[], &[2])).transpose()?;
        let more = if padded { q.shape()[0] } else { 0 };
        let (rows, heads) = (more.max(queries.total() as i64), q.shape()[1]);
        check.shape("q", &q, &[rows, heads, spec.head_dim_qk as i64])?;
        check.shape("out", &out.rows, &[rows, heads, spec.head_dim_vo as i64])?;
        if let Some(lse) = &lse {
            check.shape("lse", &lse.rows, &[rows, heads])?;
        }
        Ok(Self { check, queries, heads: heads as usize, q, out, lse })
    }

    pub(super) fn over(&mut self, keys: &Keys<'_>, logits: &Logits) -> Result<()> {
        let (queries, heads) = (self.queries, self.heads);
        if keys.batch_size() != queries.batch_size() {
            return self.check.fail(
                "queries",
                format!(
                    "they are of {} requests, keys and values of {}",
                    queries.batch_size(),
                    keys.batch_size()
                ),
            );
        }
        if heads == 0 || !heads.is_multiple_of(keys.heads) {
            return self.check.fail("q", format!("{heads} query heads over {} KV heads", keys.heads));
        }
        logits.check(self.check, queries, |request| keys.len(request), heads)?;
        let group = heads / keys.heads;
        let mut output = vec![0.0; keys.v.width()];
        for request in 0..queries.batch_size() {
            let (first, count) = (queries.indptr()[request] as usize, queries.len(request));
            let mut sums = vec![0.0; count * heads];
            for kv_head in (0..keys.heads).filter(|_| count > 0) {
                let (k, v) = (keys.head(&keys.k, request, kv_head), keys.head(&keys.v, request, kv_head));
                for query in 0..count {
                    let seen = logits.seen(request, query, count, keys.len(request));
                    let place = [query as i64, position(query, count, keys.len(request))];
                    for head in kv_head * group..(kv_head + 1) * group {
                        let row = (first + query) * heads + head;
                        sums[query * heads + head] =
                            attend(&self.q.numbers(row), (place, head), [&k, &v], &seen, logits, &mut output);
                        self.out.write(row, &output);
                    }
                }
            }
            if let Some(lse) = &mut self.lse {
                let rows = sums.chunks_exact(heads).enumerate();
                rows.for_each(|(query, sums)| lse.write(first + query, sums));
            }
        }
        Ok(())
    }
}

/// Attention of one query, by index and position, and head to the keys that it
/// sees; returns the base-2 logarithm of the sum of exponentials.
fn attend(
    numbers: &[f64],
    (place, head): ([i64; 2], usize),
    [k, v]: [&[f64]; 2],
    seen: &[usize],
    logits: &Logits<'_>,
    output: &mut [f64],
) -> f64 {
    let (width, value_width) = (numbers.len(), output.len());
    let logit = |&key: &usize| {
        let product: f64 = numbers.iter().zip(&k[key * width..]).map(|(q, k)| q * k).sum();
        logits.of(product, head, key, place)
    };
    let sink = logits.sinks.get(head);
    let mut weights: Vec<f64> = seen.iter().map(logit).chain(sink.copied()).collect();
    let sum = softmax(&mut weights);
    output.fill(0.0);
    for (weight, key) in weights.iter().zip(seen) {
        let value = &v[key * value_width..];
        output.iter_mut().zip(value).for_each(|(o, v)| *o += weight * v * logits.v_scale);
    }
    sum
}
