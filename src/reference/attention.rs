//! Decode and prefill of batches and of one request on the CPU.
//!
//! Decode is prefill with one query per request, and one request is a batch of
//! one, so all are one function.

use super::{
    host::{Check, Rows, RowsMut},
    page::{CacheShape, place},
};
use crate::{
    attention::{AttentionSpec, PosEncodingMode, RunOptions},
    error::Result,
    indices::{ItemIndices, MaskIndices, PageIndices, RaggedIndices, check_shapes},
    kv::PagedKv,
    tensor::{RawTensor, TensorMut, TensorRef},
};

/// [`attention::Mask`](crate::attention::Mask) on the CPU: which keys each
/// query sees, besides what a sliding window hides.
#[derive(Clone, Copy, Debug, Default)]
pub enum Mask<'a> {
    /// All keys.
    #[default]
    None,
    /// Those up to its position.
    Causal,
    /// Those whose bit is set.
    Custom(&'a MaskIndices, &'a [u8]),
    /// The prefix, and its own item up to its position.
    MultiItem(&'a ItemIndices),
}

/// [`DecodePlan::run_with`](crate::attention::DecodePlan::run_with) on the CPU:
/// attention of one query per request to the request's pages.
///
/// `q` is `[batch, num_qo_heads, head_dim_qk]`, `out`
/// `[batch, num_qo_heads, head_dim_vo]`, `kv` is the paged cache that `table`
/// was checked for, `lse`, if given, is `[batch, num_qo_heads]` and takes
/// base-2 logarithms. Tensors have the spec's dtypes, or are `f32` or `f64`;
/// `lse` is `f32` or `f64`. Any number of query heads per KV head is fine. A
/// request without tokens gets zeros, and −∞.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device,
/// dtype or shape does not fit, or the spec is impossible. Nothing was written.
pub fn batch_decode(
    spec: &AttentionSpec,
    q: &TensorRef<'_>,
    kv: &PagedKv<'_>,
    table: &PageIndices,
    out: &mut TensorMut<'_>,
    lse: Option<&mut TensorMut<'_>>,
    options: &RunOptions<'_>,
) -> Result<()> {
    let check = Check { op: "reference::batch_decode" };
    let queries = RaggedIndices::from_lens(std::iter::repeat_n(1, table.batch_size()))?;
    // The only query of a request is its last token, so it sees all keys.
    let logits = Logits::new(check, spec, Mask::Causal, options)?;
    let mut attention = Attention::new(check, spec, q, (&queries, false), out, lse)?;
    attention.over(&Keys::paged(check, spec, kv, table)?, &logits)
}

/// [`PrefillPlan::run_with`](crate::attention::PrefillPlan) over pages on the CPU:
/// attention of each query to its request's pages.
///
/// Query `r` of a request with `q` queries and `k` keys is at position
/// `k − q + r`. It sees the keys that the mask shows, and with a window only
/// those from `window_left` before its position on. A query that sees no key
/// gets zeros, and −∞.
///
/// `q` and `out` are `[queries, num_qo_heads, …]`, or have more rows, which are
/// left alone. Everything else is as in [`batch_decode`].
///
/// # Errors
/// As [`batch_decode`]; also when the batch sizes of the two index values and
/// of the mask differ.
#[expect(clippy::too_many_arguments, reason = "those of plan and run together")]
pub fn batch_prefill_paged(
    spec: &AttentionSpec,
    q: &TensorRef<'_>,
    kv: &PagedKv<'_>,
    queries: &RaggedIndices,
    table: &PageIndices,
    out: &mut TensorMut<'_>,
    lse: Option<&mut TensorMut<'_>>,
    mask: Mask<'_>,
    options: &RunOptions<'_>,
) -> Result<()> {
    let check = Check { op: "reference::batch_prefill_paged" };
    let logits = Logits::new(check, spec, mask, options)?;
    let mut attention = Attention::new(check, spec, q, (queries, true), out, lse)?;
    attention.over(&Keys::paged(check, spec, kv, table)?, &logits)
}

/// [`batch_prefill_paged`] over keys and values that lie one after the other:
/// `[keys, num_kv_heads, head_dim_qk]` and `[keys, num_kv_heads, head_dim_vo]`,
/// divided among the requests by the second index value.
///
/// # Errors
/// As [`batch_prefill_paged`].
#[expect(clippy::too_many_arguments, reason = "those of plan and run together")]
pub fn batch_prefill_ragged(
    spec: &AttentionSpec,
    q: &TensorRef<'_>,
    kv: [&TensorRef<'_>; 2],
    queries: &RaggedIndices,
    keys: &RaggedIndices,
    out: &mut TensorMut<'_>,
    lse: Option<&mut TensorMut<'_>>,
    mask: Mask<'_>,
    options: &RunOptions<'_>,
) -> Result<()> {
    let check = Check { op: "reference::batch_prefill_ragged" };
    let logits = Logits::new(check, spec, mask, options)?;
    let mut attention = Attention::new(check, spec, q, (queries, true), out, lse)?;
    attention.over(&Keys::ragged(check, spec, kv, keys)?, &logits)
}

/// [`SinglePrefill::run_with`](crate::attention::SinglePrefill::run_with) on the CPU:
/// [`batch_prefill_ragged`] of a batch of one request.
///
/// `q` is `[queries, num_qo_heads, head_dim_qk]`, `k` and `v` are
/// `[keys, num_kv_heads, …]`, `out` is `[queries, num_qo_heads, head_dim_vo]`,
/// `lse`, if given, `[queries, num_qo_heads]`. A custom mask has one request.
///
/// # Errors
/// As [`batch_decode`]; also when the mask is of another request.
pub fn single_prefill(
    spec: &AttentionSpec,
    q: &TensorRef<'_>,
    kv: [&TensorRef<'_>; 2],
    out: &mut TensorMut<'_>,
    lse: Option<&mut TensorMut<'_>>,
    mask: Mask<'_>,
    options: &RunOptions<'_>,
) -> Result<()> {
    let check = Check { op: "reference::single_prefill" };
    let [queries, keys] = [rows_of(q)?, rows_of(kv[0])?];
    let logits = Logits::new(check, spec, mask, options)?;
    let mut attention = Attention::new(check, spec, q, (&queries, false), out, lse)?;
    attention.over(&Keys::ragged(check, spec, kv, &keys)?, &logits)
}

/// [`SingleDecode::run_with`](crate::attention::SingleDecode::run_with) on the CPU:
/// attention of one query to all keys.
///
/// `q` is `[num_qo_heads, head_dim_qk]`, `k` and `v` are
/// `[keys, num_kv_heads, …]`, `out` is `[num_qo_heads, head_dim_vo]`, `lse`, if
/// given, `[num_qo_heads]`. Everything else is as in [`batch_decode`].
///
/// # Errors
/// As [`batch_decode`].
pub fn single_decode(
    spec: &AttentionSpec,
    q: &TensorRef<'_>,
    kv: [&TensorRef<'_>; 2],
    out: &mut TensorMut<'_>,
    lse: Option<&mut TensorMut<'_>>,
    options: &RunOptions<'_>,
) -> Result<()> {
    let check = Check { op: "reference::single_decode" };
    let row = |name, tensor: &RawTensor, rank| {
        if tensor.shape().len() == rank {
            return tensor.as_one_row();
        }
        check.fail(name, format!("its shape is {:?}; expected {rank} dimensions", tensor.shape()))
    };
    let (q, mut out) = (TensorRef::new(row("q", &q.raw, 2)?), TensorMut::new(row("out", &out.raw, 2)?));
    let mut lse = lse.map(|lse| row("lse", &lse.raw, 1).map(TensorMut::new)).transpose()?;
    let (query, keys) = (RaggedIndices::from_lens([1])?, rows_of(kv[0])?);
    // The query is the last token, so it sees all keys.
    let logits = Logits::new(check, spec, Mask::Causal, options)?;
    let mut attention = Attention::new(check, spec, &q, (&query, false), &mut out, lse.as_mut())?;
    attention.over(&Keys::ragged(check, spec, kv, &keys)?, &logits)
}

/// Keys and values of a batch, by how they lie.
#[cfg(feature = "candle")]
pub(crate) enum KeysAndValues<'a> {
    Paged(&'a PagedKv<'a>, &'a PageIndices),
    Ragged([&'a TensorRef<'a>; 2], &'a RaggedIndices),
}

/// [`batch_prefill_paged`] or [`batch_prefill_ragged`] with FlashAttention's
/// ALiBi, which takes the same options.
#[cfg(feature = "candle")]
pub(crate) fn flash_attention(
    spec: &AttentionSpec,
    q: &TensorRef<'_>,
    kv: &KeysAndValues<'_>,
    queries: &RaggedIndices,
    out: &mut TensorMut<'_>,
    mask: Mask<'_>,
    options: &RunOptions<'_>,
) -> Result<()> {
    let check = Check { op: "flash_attn" };
    let logits = Logits { alibi: Alibi::FlashAttention, ..Logits::new(check, spec, mask, options)? };
    let mut attention = Attention::new(check, spec, q, (queries, true), out, None)?;
    let keys = match *kv {
        KeysAndValues::Paged(kv, table) => Keys::paged(check, spec, kv, table)?,
        KeysAndValues::Ragged(kv, keys) => Keys::ragged(check, spec, kv, keys)?,
    };
    attention.over(&keys, &logits)
}

/// What ALiBi adds to a logit for each unit of a head's slope.
#[derive(Clone, Copy)]
enum Alibi {
    /// The key's position less the query's index, before the soft cap.
    FlashInfer,
    /// Minus the distance of the key from the query's position, after the cap.
    #[cfg(feature = "candle")]
    FlashAttention,
}

/// All rows of a tensor, as those of one request.
fn rows_of(tensor: &TensorRef<'_>) -> Result<RaggedIndices> {
    RaggedIndices::from_lens(tensor.shape().first().map(|&rows| rows as usize))
}

/// How products of queries and keys become logits, and which keys are seen.
struct Logits<'a> {
    sm_scale: f64,
    soft_cap: Option<f64>,
    window_left: Option<usize>,
    mask: Mask<'a>,
    /// For each head, or empty.
    slopes: Vec<f64>,
    alibi: Alibi,
    sinks: Vec<f64>,
    v_scale: f64,
}

impl<'a> Logits<'a> {
    fn new(check: Check, spec: &AttentionSpec, mask: Mask<'a>, options: &RunOptions<'_>) -> Result<Self> {
        if spec.head_dim_qk == 0 || spec.head_dim_vo == 0 {
            return check.fail(
                "spec",
                format!("head dimensions {} and {}; neither may be 0", spec.head_dim_qk, spec.head_dim_vo),
            );
        }
        let soft_cap = spec.logits_soft_cap.map(f64::from);
        if soft_cap.is_some_and(|cap| !(cap > 0.0 && cap.is_finite())) {
            return check
                .fail("spec", format!("logits_soft_cap {soft_cap:?}; it must be positive and finite"));
        }
        let per_head = |name, given: &Option<TensorRef<'_>>, read: bool| match given {
            Some(tensor) if read => Ok(check.rows(name, tensor, &[], &[1])?.numbers(0)),
            None if !read => Ok(Vec::new()),
            Some(_) => check.fail(name, "given, but the spec does not read it".into()),
            None => check.fail(name, "missing; the spec reads one number for each head".into()),
        };
        let alibi = spec.pos_encoding_mode == PosEncodingMode::Alibi;
        Ok(Self {
            sm_scale: options.logit_scale(spec),
            soft_cap,
            window_left: spec.window_left.map(|left| left as usize),
            mask,
            slopes: per_head("alibi_slopes", &options.alibi_slopes, alibi)?,
            alibi: Alibi::FlashInfer,
            sinks: per_head("sinks", &options.sinks, spec.attention_sink)?,
            v_scale: options.v_scale.unwrap_or(1.0).into(),
        })
    }

    /// Mask, slopes and sinks are those of a batch.
    fn check(
        &self,
        check: Check,
        queries: &RaggedIndices,
        kv_len: impl Fn(usize) -> usize,
        heads: usize,
    ) -> Result<()> {
        for (name, numbers) in [("alibi_slopes", &self.slopes), ("sinks", &self.sinks)] {
            if !numbers.is_empty() && numbers.len() != heads {
                return check.fail(name, format!("{} numbers for {heads} heads", numbers.len()));
            }
        }
        match self.mask {
            Mask::None | Mask::Causal => Ok(()),
            Mask::Custom(indices, bits) => {
                let batch = (0..queries.batch_size()).map(|request| (queries.len(request), kv_len(request)));
                match check_shapes(indices.shapes(), batch) {
                    Err(problem) => check.fail("mask", problem),
                    Ok(()) if bits.len() < indices.num_bytes() => check.fail(
                        "mask",
                        format!("{} bytes; the batch needs {}", bits.len(), indices.num_bytes()),
                    ),
                    Ok(()) => Ok(()),
                }
            }
            Mask::MultiItem(items) => {
                let batch = queries.batch_size();
                if items.batch_size() != batch || (0..batch).any(|at| kv_len(at) > items.seq_len(at)) {
                    return check.fail("items", "they are of other requests than the batch".into());
                }
                Ok(())
            }
        }
    }

    /// The logit of a key for a query with this index and this position.
    fn of(&self, product: f64, head: usize, key: usize, place: [i64; 2]) -> f64 {
        let slope = self.slopes.get(head).copied().unwrap_or_default();
        let capped = |logit: f64| self.soft_cap.map_or(logit, |cap| cap * (logit / cap).tanh());
        let logit = product * self.sm_scale;
        match self.alibi {
            Alibi::FlashInfer => capped(logit + slope * (key as i64 - place[0]) as f64),
            #[cfg(feature = "candle")]
            Alibi::FlashAttention => capped(logit) - slope * (place[1] - key as i64).abs() as f64,
        }
    }

    /// The keys that a query sees: one of `count` in a request of `len` keys.
    fn seen(&self, request: usize, query: usize, count: usize, len: usize) -> Vec<usize> {
        let position = position(query, count, len);
        let start = self.window_left.map_or(0, |left| position - left as i64);
        let end = if let Mask::Causal | Mask::MultiItem(_) = self.mask { position + 1 } else { len as i64 };
        let place = |position: i64| position.clamp(0, len as i64) as usize;
        let keys = place(start)..place(end);
        match self.mask {
            Mask::None | Mask::Causal => keys.collect(),
            Mask::Custom(indices, bits) => {
                keys.filter(|&key| indices.sees(bits, request, query, key)).collect()
            }
            Mask::MultiItem(items) => {
                keys.filter(|&key| items.sees(request, position as usize, key)).collect()
            }
        }
    }
}

/// Where a query stands among the keys of its request: one of `count`, the last
/// of which is at the last key. It may lie before all keys.
fn position(query: usize, count: usize, len: usize) -> i64 {
    len as i64 - count as i64 + query as i64
}

/// Keys and values of a batch.
struct Keys<'a> {
    k: Rows<'a>,
    v: Rows<'a>,
    heads: usize,
    places: Places<'a>,
}

/// Where the keys of each request lie.
enum Places<'a> {
    Paged(CacheShape, &'a PageIndices),
    Ragged(&'a RaggedIndices),
}

impl<'a> Keys<'a> {
    fn paged(
        check: Check,
        spec: &AttentionSpec,
        kv: &'a PagedKv<'_>,
        table: &'a PageIndices,
    ) -> Result<Self> {
        let k = check.rows("kv.k", &kv.k, &[spec.dtype_kv], &[4])?;
        let v = check.rows("kv.v", &kv.v, &[spec.dtype_kv], &[4])?;
        let mut v_shape = k.shape().to_vec();
        v_shape[3] += spec.head_dim_vo as i64 - spec.head_dim_qk as i64;
        check.shape("kv.v", &v, &v_shape)?;
        let shape = CacheShape::new(check, &k, kv.layout, table)?;
        if k.width() != spec.head_dim_qk {
            return check
                .fail("kv.k", format!("its head_dim is {}; the spec's is {}", k.width(), spec.head_dim_qk));
        }
        Ok(Self { k, v, heads: shape.heads, places: Places::Paged(shape, table) })
    }

    fn ragged(
        check: Check,
        spec: &AttentionSpec,
        [k, v]: [&'a TensorRef<'_>; 2],
        keys: &'a RaggedIndices,
    ) -> Result<Self> {
        let k = check.rows("k", k, &[spec.dtype_kv], &[3])?;
        let v = check.rows("v", v, &[spec.dtype_kv], &[3])?;
        let (total, heads) = (keys.total() as i64, k.shape()[1]);
        check.shape("k", &k, &[total, heads, spec.head_dim_qk as i64])?;
        check.shape("v", &v, &[total, heads, spec.head_dim_vo as i64])?;
        Ok(Self { k, v, heads: heads as usize, places: Places::Ragged(keys) })
    }

    fn batch_size(&self) -> usize {
        match self.places {
            Places::Paged(_, table) => table.batch_size(),
            Places::Ragged(keys) => keys.batch_size(),
        }
    }

    /// Keys of a request.
    fn len(&self, request: usize) -> usize {
        match self.places {
            Places::Paged(_, table) => table.seq_len(request),
            Places::Ragged(keys) => keys.len(request),
        }
    }

    /// The row of one head of one key.
    fn row(&self, request: usize, position: usize, head: usize) -> usize {
        match self.places {
            Places::Paged(shape, table) => {
                let (page, slot) = place(table, request, position);
                shape.row(page, slot, head)
            }
            Places::Ragged(keys) => (keys.indptr()[request] as usize + position) * self.heads + head,
        }
    }

    /// One head of a request's keys or values, one after the other.
    fn head(&self, rows: &Rows<'_>, request: usize, head: usize) -> Vec<f64> {
        let mut numbers = vec![0.0; self.len(request) * rows.width()];
        for (position, numbers) in numbers.chunks_exact_mut(rows.width()).enumerate() {
            rows.read(self.row(request, position, head), numbers);
        }
        numbers
    }
}

/// The queries of a batch, and where results go.
struct Attention<'a> {
    check: Check,
    queries: &'a RaggedIndices,
    heads: usize,
    q: Rows<'a>,
    out: RowsMut<'a>,
    lse: Option<RowsMut<'a>>,
}

impl<'a> Attention<'a> {
    /// `padded` tensors may have more rows than there are queries.
    fn new(
        check: Check,
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

    fn over(&mut self, keys: &Keys<'_>, logits: &Logits) -> Result<()> {
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

/// Turns logits into weights; returns the base-2 logarithm of the sum of their
/// exponentials, −∞ for none.
pub(super) fn softmax(logits: &mut [f64]) -> f64 {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if logits.is_empty() {
        return max;
    }
    logits.iter_mut().for_each(|logit| *logit = (*logit - max).exp());
    let sum: f64 = logits.iter().sum();
    logits.iter_mut().for_each(|weight| *weight /= sum);
    max * std::f64::consts::LOG2_E + sum.log2()
}

#[cfg(test)]
mod tests {
    use half::f16;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        DType, Device, FlashInferError,
        kv::KvLayout,
        reference::testing::{refused, view, view_mut},
    };

    #[track_caller]
    fn close(got: &[f64], expected: &[f64]) {
        assert_eq!(got.len(), expected.len());
        let near = |(a, b): (&f64, &f64)| a == b || (a - b).abs() < 1e-12;
        assert!(got.iter().zip(expected).all(near), "{got:?} is not {expected:?}");
    }

    fn spec(head_dim: usize) -> AttentionSpec {
        AttentionSpec::new(DType::F64, head_dim)
    }

    /// One request, one head, head_dim 1, keys in one page.
    fn one_head(spec: &AttentionSpec, q: f64, k: &[f64], v: &[f64], options: &RunOptions) -> (f64, f64) {
        let n = k.len();
        let table = PageIndices::from_requests(1, n, [(&[0][..], n)]).unwrap();
        let shape = [1, n, 1, 1];
        let kv = PagedKv::new(view(k, &shape), view(v, &shape), KvLayout::Nhd);
        let (mut out, mut lse) = ([f64::NAN], [f64::NAN]);
        batch_decode(
            spec,
            &view(&[q], &[1, 1, 1]),
            &kv,
            &table,
            &mut view_mut(&mut out, &[1, 1, 1]),
            Some(&mut view_mut(&mut lse, &[1, 1])),
            options,
        )
        .unwrap();
        (out[0], lse[0])
    }

    #[test]
    fn decode_by_hand() {
        let (ln2, ln3) = (2f64.ln(), 3f64.ln());
        // Exponentials 1, 2 and 3 of a sum of 6, over values 6, 12 and 18.
        let (k, v) = ([0.0, ln2, ln3], [6.0, 12.0, 18.0]);
        let options = RunOptions::default();
        let (out, lse) = one_head(&spec(1), 1.0, &k, &v, &options);
        close(&[out, lse], &[(6.0 + 24.0 + 54.0) / 6.0, 6f64.log2()]);
        // Twice the scale squares the exponentials: 1, 4 and 9 of 14.
        let (out, lse) = one_head(&spec(1), 1.0, &k, &v, &RunOptions::with_sm_scale(2.0));
        close(&[out, lse], &[(6.0 + 48.0 + 162.0) / 14.0, 14f64.log2()]);
        // A window of one key to the left: 2 and 3 of 5; of none: the last key.
        let (out, lse) = one_head(&spec(1).with_window_left(1), 1.0, &k, &v, &options);
        close(&[out, lse], &[(24.0 + 54.0) / 5.0, 5f64.log2()]);
        let (out, lse) = one_head(&spec(1).with_window_left(0), 1.0, &k, &v, &options);
        close(&[out, lse], &[18.0, 3f64.log2()]);
        // A cap of 1: logits 0, tanh(ln 2) = 0.6 and tanh(ln 3) = 0.8.
        let (out, lse) = one_head(&spec(1).with_logits_soft_cap(1.0), 1.0, &k, &v, &options);
        let (a, b) = (0.6f64.exp(), 0.8f64.exp());
        close(&[out, lse], &[(6.0 + 12.0 * a + 18.0 * b) / (1.0 + a + b), (1.0 + a + b).log2()]);
    }

    #[test]
    fn default_scale_is_one_over_the_root_of_head_dim() {
        let table = PageIndices::from_requests(1, 2, [(&[0][..], 2)]).unwrap();
        // Products 0 and 2·ln 2, over √4: exponentials 1 and 2.
        let mut k = [0.0f64; 8];
        k[4] = 2.0 * 2f64.ln();
        let v = [3.0f64, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0];
        let shape = [1, 2, 1, 4];
        let kv = PagedKv::new(view(&k, &shape), view(&v, &shape), KvLayout::Nhd);
        let q = [1.0f64, 0.0, 0.0, 0.0];
        let mut out = [f64::NAN; 4];
        let options = RunOptions::default();
        let (q, mut o) = (view(&q, &[1, 1, 4]), view_mut(&mut out, &[1, 1, 4]));
        batch_decode(&spec(4), &q, &kv, &table, &mut o, None, &options).unwrap();
        close(&out, &[1.0, 2.0, 0.0, 0.0]);
    }

    #[test]
    fn groups_of_query_heads_share_a_kv_head_and_empty_requests_are_zero() {
        // Requests of 1, 0 and 2 tokens; 2 KV heads, 6 query heads; all keys
        // zero, so each output is the mean of its head's values.
        let table =
            PageIndices::from_requests(3, 1, [(&[2][..], 1), (&[][..], 0), (&[0, 1][..], 2)]).unwrap();
        let k = [0.0f64; 6];
        let v = [1.0f64, 10.0, 3.0, 30.0, 5.0, 50.0]; // [page, slot, head, 1]
        let shape = [3, 1, 2, 1];
        let kv = PagedKv::new(view(&k, &shape), view(&v, &shape), KvLayout::Nhd);
        let q = [1.0f64; 18];
        let (mut out, mut lse) = ([f64::NAN; 18], [f64::NAN; 18]);
        batch_decode(
            &spec(1),
            &view(&q, &[3, 6, 1]),
            &kv,
            &table,
            &mut view_mut(&mut out, &[3, 6, 1]),
            Some(&mut view_mut(&mut lse, &[3, 6])),
            &RunOptions::default(),
        )
        .unwrap();
        close(&out[..6], &[5.0, 5.0, 5.0, 50.0, 50.0, 50.0]);
        assert_eq!(out[6..12], [0.0; 6]);
        close(&out[12..], &[2.0, 2.0, 2.0, 20.0, 20.0, 20.0]);
        assert_eq!(lse[..6], [0.0; 6]);
        assert_eq!(lse[6..12], [f64::NEG_INFINITY; 6]);
        close(&lse[12..], &[1.0; 6]);
    }

    /// Five queries of two requests, and a row beyond them.
    #[test]
    fn prefill_by_hand() {
        // All keys are zero, so each output is the mean of the values seen.
        let keys = RaggedIndices::from_lens([4, 2]).unwrap();
        let queries = RaggedIndices::from_lens([2, 3]).unwrap();
        let k = [0.0f64; 6 * 2];
        let v = [1.0f64, 3.0, 5.0, 11.0, 20.0, 40.0];
        let run = |spec: &AttentionSpec, mask| {
            let spec = spec.with_head_dim_vo(1);
            let (q, mut out, mut lse) = ([1.0f64; 12], [f64::NAN; 6], [f64::NAN; 6]);
            batch_prefill_ragged(
                &spec,
                &view(&q, &[6, 1, 2]),
                [&view(&k, &[6, 1, 2]), &view(&v, &[6, 1, 1])],
                &queries,
                &keys,
                &mut view_mut(&mut out, &[6, 1, 1]),
                Some(&mut view_mut(&mut lse, &[6, 1])),
                mask,
                &RunOptions::default(),
            )
            .unwrap();
            // The sixth row is of no request.
            assert!(out[5].is_nan() && lse[5].is_nan());
            ([out[0], out[1], out[2], out[3], out[4]], [lse[0], lse[1], lse[2], lse[3], lse[4]])
        };
        let spec = spec(2);
        let nothing = f64::NEG_INFINITY;
        let (out, lse) = run(&spec, Mask::None);
        close(&out, &[5.0, 5.0, 30.0, 30.0, 30.0]);
        close(&lse, &[2.0, 2.0, 1.0, 1.0, 1.0]);
        // Positions are 2 and 3 of four, and −1, 0 and 1 of two.
        let (out, lse) = run(&spec, Mask::Causal);
        close(&out, &[3.0, 5.0, 0.0, 20.0, 30.0]);
        close(&lse, &[3f64.log2(), 2.0, nothing, 0.0, 1.0]);
        // One key before the position.
        let (out, lse) = run(&spec.with_window_left(1), Mask::Causal);
        close(&out, &[4.0, 8.0, 0.0, 20.0, 30.0]);
        close(&lse, &[1.0, 1.0, nothing, 0.0, 1.0]);
        // Without a mask also all keys after it.
        let (out, lse) = run(&spec.with_window_left(0), Mask::None);
        close(&out, &[8.0, 11.0, 30.0, 30.0, 40.0]);
        close(&lse, &[1.0, 0.0, 1.0, 1.0, 0.0]);
    }

    /// One head of two requests: two queries over four keys, one over two. All
    /// products are zero.
    fn masked(spec: &AttentionSpec, mask: Mask<'_>, options: &RunOptions<'_>) -> ([f64; 3], [f64; 3]) {
        let queries = RaggedIndices::from_lens([2, 1]).unwrap();
        let keys = RaggedIndices::from_lens([4, 2]).unwrap();
        let (q, k, v) = ([0.0f64; 3], [1.0f64; 6], [1.0f64, 3.0, 5.0, 11.0, 20.0, 40.0]);
        let (mut out, mut lse) = ([f64::NAN; 3], [f64::NAN; 3]);
        batch_prefill_ragged(
            spec,
            &view(&q, &[3, 1, 1]),
            [&view(&k, &[6, 1, 1]), &view(&v, &[6, 1, 1])],
            &queries,
            &keys,
            &mut view_mut(&mut out, &[3, 1, 1]),
            Some(&mut view_mut(&mut lse, &[3, 1])),
            mask,
            options,
        )
        .unwrap();
        (out, lse)
    }

    #[test]
    fn masks_by_hand() {
        let (spec, options) = (spec(1), RunOptions::default());
        let indices = MaskIndices::new([(2, 4), (1, 2)]).unwrap();
        let bits =
            indices.pack(&[true, false, false, true, false, false, false, false, false, true]).unwrap();
        let custom = Mask::Custom(&indices, &bits);
        let nothing = f64::NEG_INFINITY;
        let (out, lse) = masked(&spec, custom, &options);
        close(&out, &[6.0, 0.0, 40.0]);
        close(&lse, &[1.0, nothing, 0.0]);
        // A window of one key before the position hides the first key.
        let (out, _) = masked(&spec.with_window_left(1), custom, &options);
        close(&out, &[11.0, 0.0, 40.0]);
        // A prefix of one token, a delimiter, an item of one token, a delimiter;
        // queries are the item and the last delimiter, and the delimiter of the
        // other request.
        let items = ItemIndices::new([(1, &[1][..]), (1, &[][..])]).unwrap();
        let (out, lse) = masked(&spec, Mask::MultiItem(&items), &options);
        close(&out, &[3.0, 1.0, 20.0]);
        close(&lse, &[1.0, 0.0, 0.0]);
    }

    #[test]
    fn slopes_sinks_and_scales_by_hand() {
        let (slopes, sinks) = ([2f32.ln()], [4f32.ln()]);
        let near = |got: ([f64; 3], [f64; 3]), want: ([f64; 3], [f64; 3])| {
            let pairs = got.0.iter().zip(&want.0).chain(got.1.iter().zip(&want.1));
            assert!(pairs.clone().all(|(a, b)| (a - b).abs() < 1e-6), "{got:?} is not {want:?}");
        };
        // Exponentials 1, 2, 4 and 8 for query 0, half of them for query 1.
        let options = RunOptions { alibi_slopes: Some(view(&slopes, &[1])), ..RunOptions::default() };
        let mean = (1.0 + 6.0 + 20.0 + 88.0) / 15.0;
        let got = masked(&spec(1).with_pos_encoding_mode(PosEncodingMode::Alibi), Mask::None, &options);
        near(got, ([mean, mean, 100.0 / 3.0], [15f64.log2(), 7.5f64.log2(), 3f64.log2()]));
        // A sink of exponential 4 beside four and two keys of exponential 1.
        let sinks = Some(view(&sinks, &[1]));
        let options = RunOptions { sinks, v_scale: Some(0.5), ..RunOptions::default() };
        let got = masked(&spec(1).with_attention_sink(), Mask::None, &options);
        near(got, ([20.0 / 8.0 / 2.0, 20.0 / 8.0 / 2.0, 60.0 / 6.0 / 2.0], [3.0, 3.0, 6f64.log2()]));
        // The scale of keys multiplies the scale of products.
        let options = RunOptions { k_scale: Some(3.0), sm_scale: Some(0.5), ..RunOptions::default() };
        assert_eq!(options.logit_scale(&spec(1)), 1.5);
    }

    #[test]
    fn wrong_masks_slopes_and_sinks_are_refused() {
        let q = [0.0f64; 3];
        let run = |spec: &AttentionSpec, mask: Mask<'_>, options: &RunOptions<'_>| {
            let queries = RaggedIndices::from_lens([2, 1]).unwrap();
            let (k, mut out) = (view(&q, &[3, 1, 1]), [7.0f64; 3]);
            let result = batch_prefill_ragged(
                spec,
                &view(&q, &[3, 1, 1]),
                [&k, &k],
                &queries,
                &queries,
                &mut view_mut(&mut out, &[3, 1, 1]),
                None,
                mask,
                options,
            );
            assert_eq!(out, [7.0; 3]);
            result
        };
        let (spec, plain) = (spec(1), RunOptions::default());
        let indices = MaskIndices::new([(2, 2), (1, 1)]).unwrap();
        refused(run(&spec, Mask::Custom(&indices, &[0]), &plain), "mask");
        let other = MaskIndices::new([(2, 2), (1, 2)]).unwrap();
        refused(run(&spec, Mask::Custom(&other, &[0; 9]), &plain), "mask");
        let items = ItemIndices::new([(1, &[][..]), (1, &[][..]), (1, &[][..])]).unwrap();
        refused(run(&spec, Mask::MultiItem(&items), &plain), "items");
        let two = [1f32; 2];
        let mut options = plain;
        options.sinks = Some(view(&two, &[2]));
        refused(run(&spec, Mask::None, &options), "sinks");
        refused(run(&spec.with_attention_sink(), Mask::None, &options), "sinks");
        refused(run(&spec.with_attention_sink(), Mask::None, &plain), "sinks");
        refused(
            run(&spec.with_pos_encoding_mode(PosEncodingMode::Alibi), Mask::None, &plain),
            "alibi_slopes",
        );
    }

    #[test]
    fn wrong_input_of_one_request_is_refused_and_nothing_written() {
        let (q, k, bits) = ([1.0f64; 16], [1.0f64; 16], [0xff; 2]);
        let (mut out, mut lse) = ([7.0f64; 16], [7.0f64; 8]);
        let (spec, plain) = (spec(2), RunOptions::default());
        let mut prefill = |shapes: [&[usize]; 5], mask, expected: &str| {
            let result = single_prefill(
                &spec,
                &view(&q, shapes[0]),
                [&view(&k, shapes[1]), &view(&k, shapes[2])],
                &mut view_mut(&mut out, shapes[3]),
                Some(&mut view_mut(&mut lse, shapes[4])),
                mask,
                &plain,
            );
            refused(result, expected);
        };
        let (x, y, z): (&[usize], &[usize], &[usize]) = (&[2, 4, 2], &[3, 2, 2], &[2, 4]);
        let masks: [&[(usize, usize)]; 3] = [&[(2, 2)], &[(2, 3), (0, 0)], &[(2, 3)]];
        let [other, two, right] = masks.map(|shapes| MaskIndices::new(shapes.iter().copied()).unwrap());
        prefill([&[16], y, y, x, z], Mask::None, "q");
        prefill([&[2, 4, 1], y, y, x, z], Mask::None, "q");
        prefill([&[1, 4, 2], y, y, x, z], Mask::None, "out");
        prefill([&[2, 3, 2], y, y, &[2, 3, 2], &[2, 3]], Mask::None, "q");
        prefill([x, &[6, 2], y, x, z], Mask::None, "k");
        prefill([x, y, &[2, 2, 2], x, z], Mask::None, "v");
        prefill([x, y, y, x, &[8]], Mask::None, "lse");
        prefill([x, y, y, x, z], Mask::Custom(&other, &bits), "mask");
        prefill([x, y, y, x, z], Mask::Custom(&two, &bits), "mask");
        prefill([x, y, y, x, z], Mask::Custom(&right, &[]), "mask");
        let mut decode = |shapes: [&[usize]; 5], expected: &str| {
            let result = single_decode(
                &spec,
                &view(&q, shapes[0]),
                [&view(&k, shapes[1]), &view(&k, shapes[2])],
                &mut view_mut(&mut out, shapes[3]),
                Some(&mut view_mut(&mut lse, shapes[4])),
                &plain,
            );
            refused(result, expected);
        };
        let (x, z): (&[usize], &[usize]) = (&[4, 2], &[4]);
        decode([&[1, 4, 2], y, y, x, z], "q");
        decode([&[4, 1], y, y, x, z], "q");
        decode([x, y, y, &[8], z], "out");
        decode([x, y, y, &[4, 1], z], "out");
        decode([x, y, y, x, &[1, 4]], "lse");
        decode([x, y, y, x, &[3]], "lse");
        decode([x, &[6, 2], y, x, z], "k");
        decode([x, y, &[3, 1, 2], x, z], "v");
        assert_eq!((out, lse), ([7.0; 16], [7.0; 8]));
    }

    #[test]
    fn wrong_prefills_are_refused_and_nothing_written() {
        let (q, k) = ([1.0f64; 12], [1.0f64; 12]);
        let (mut out, mut lse) = ([7.0f64; 12], [7.0f64; 6]);
        let lens = |lens: &[usize]| RaggedIndices::from_lens(lens.iter().copied()).unwrap();
        let mut refused = |queries: &[usize], keys: &[usize], shapes: [&[usize]; 5], expected: &str| {
            let result = batch_prefill_ragged(
                &spec(2),
                &view(&q, shapes[0]),
                [&view(&k, shapes[1]), &view(&k, shapes[2])],
                &lens(queries),
                &lens(keys),
                &mut view_mut(&mut out, shapes[3]),
                Some(&mut view_mut(&mut lse, shapes[4])),
                Mask::Causal,
                &RunOptions::default(),
            );
            match result {
                Err(FlashInferError::InvalidArgument { argument, .. }) => assert_eq!(argument, expected),
                other => panic!("expected {expected} to be refused, got {other:?}"),
            }
        };
        let (x, y): (&[usize], &[usize]) = (&[3, 2, 2], &[3, 2]);
        refused(&[1, 2], &[1, 1, 1], [x, x, x, x, y], "queries");
        refused(&[2, 2], &[1, 2], [x, x, x, x, y], "q");
        refused(&[1, 2], &[1, 2], [&[3, 4], x, x, x, y], "q");
        refused(&[1, 2], &[1, 2], [&[3, 1, 2], &[3, 2, 2], x, &[3, 1, 2], &[3, 1]], "q");
        refused(&[1, 2], &[1, 1], [x, x, x, x, y], "k");
        refused(&[1, 2], &[1, 2], [x, &[3, 1, 4], x, x, y], "k");
        refused(&[1, 2], &[1, 2], [x, x, &[3, 1, 2], x, y], "v");
        refused(&[1, 2], &[1, 2], [x, x, x, &[3, 1, 2], y], "out");
        refused(&[1, 2], &[1, 2], [x, x, x, x, &[2, 3]], "lse");
        assert_eq!((out, lse), ([7.0; 12], [7.0; 6]));
    }

    #[test]
    fn wrong_input_is_refused_and_nothing_written() {
        let table = PageIndices::from_requests(2, 2, [(&[1][..], 2)]).unwrap();
        let (q, cache, halves) = ([1.0f64; 8], [1.0f64; 24], [f16::ONE; 8]);
        let (mut out, mut lse) = ([7.0f64; 8], [7.0f64; 4]);
        let options = RunOptions::default();
        let spec = spec(2);
        let mut run =
            |spec: &AttentionSpec, q: &TensorRef<'_>, cache_shape: [&[usize]; 2], lse_shape: &[usize]| {
                let kv =
                    PagedKv::new(view(&cache, cache_shape[0]), view(&cache, cache_shape[1]), KvLayout::Nhd);
                batch_decode(
                    spec,
                    q,
                    &kv,
                    &table,
                    &mut view_mut(&mut out, &[1, 4, 2]),
                    Some(&mut view_mut(&mut lse, lse_shape)),
                    &options,
                )
            };
        let good_q = view(&q, &[1, 4, 2]);
        let shape: [&[usize]; 2] = [&[2, 2, 2, 2]; 2];
        refused(run(&spec, &view(&q, &[1, 8]), shape, &[1, 4]), "q");
        refused(run(&spec, &view(&q, &[2, 2, 2]), shape, &[1, 4]), "q");
        refused(run(&spec, &view(&q, &[1, 2, 4]), shape, &[1, 4]), "q");
        refused(run(&spec, &view(&halves, &[1, 4, 2]), shape, &[1, 4]), "q");
        refused(run(&spec, &view(&q, &[1, 2, 2]), shape, &[1, 4]), "out");
        refused(run(&spec, &good_q, [&[1, 2, 2, 2]; 2], &[1, 4]), "kv.k");
        refused(run(&spec, &good_q, [&[2, 1, 2, 2]; 2], &[1, 4]), "kv.k");
        refused(run(&spec, &good_q, [&[2, 2, 2, 1]; 2], &[1, 4]), "kv.k");
        refused(run(&spec, &good_q, [&[2, 2, 4]; 2], &[1, 4]), "kv.k");
        refused(run(&spec, &good_q, [&[2, 2, 2, 2], &[2, 2, 1, 2]], &[1, 4]), "kv.v");
        refused(run(&spec, &good_q, [&[2, 2, 0, 2]; 2], &[1, 4]), "q");
        refused(run(&spec, &good_q, [&[2, 2, 3, 2]; 2], &[1, 4]), "q");
        refused(run(&spec, &good_q, shape, &[4, 1]), "lse");
        refused(run(&AttentionSpec { head_dim_vo: 1, ..spec }, &good_q, shape, &[1, 4]), "out");
        refused(run(&AttentionSpec { head_dim_vo: 0, ..spec }, &good_q, shape, &[1, 4]), "spec");
        for cap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            refused(run(&spec.with_logits_soft_cap(cap), &good_q, shape, &[1, 4]), "spec");
        }
        // SAFETY: the tensor is refused, so nothing looks at the address.
        let device = unsafe {
            TensorRef::from_raw_parts(256 as *const _, Device::Cuda(0), DType::F64, &[1, 4, 2], None).unwrap()
        };
        refused(run(&spec, &device, shape, &[1, 4]), "q");
        assert_eq!((out, lse), ([7.0; 8], [7.0; 4]));
    }

    /// A batch with random numbers, stored page by page in NHD order.
    #[derive(Clone, Debug)]
    struct Batch {
        page_size: usize,
        kv_heads: usize,
        group: usize,
        width: usize,
        lens: Vec<usize>,
        /// The page of the cache that serves as the n-th of the batch.
        pages: Vec<i32>,
        q: Vec<f64>,
        k: Vec<f64>,
        v: Vec<f64>,
    }

    impl Batch {
        fn table(&self) -> PageIndices {
            let mut pages = &self.pages[..];
            let requests = self.lens.iter().map(|&len| {
                let (own, rest) = pages.split_at(len.div_ceil(self.page_size));
                pages = rest;
                (own, len)
            });
            PageIndices::from_requests(self.pages.len(), self.page_size, requests).unwrap()
        }

        fn shape(&self) -> [usize; 4] {
            [self.pages.len(), self.page_size, self.kv_heads, self.width]
        }

        fn decode(&self, spec: &AttentionSpec) -> (Vec<f64>, Vec<f64>) {
            let kv = PagedKv::new(view(&self.k, &self.shape()), view(&self.v, &self.shape()), KvLayout::Nhd);
            self.decode_from(spec, &kv)
        }

        fn decode_from(&self, spec: &AttentionSpec, kv: &PagedKv<'_>) -> (Vec<f64>, Vec<f64>) {
            let (batch, heads) = (self.lens.len(), self.kv_heads * self.group);
            let mut out = vec![f64::NAN; batch * heads * self.width];
            let mut lse = vec![f64::NAN; batch * heads];
            let shape = [batch, heads, self.width];
            batch_decode(
                spec,
                &view(&self.q, &shape),
                kv,
                &self.table(),
                &mut view_mut(&mut out, &shape),
                Some(&mut view_mut(&mut lse, &[batch, heads])),
                &RunOptions::default(),
            )
            .unwrap();
            (out, lse)
        }

        fn spec(&self) -> AttentionSpec {
            spec(self.width)
        }

        /// The tokens of a cache, request by request.
        fn gather(&self, cache: &[f64]) -> Vec<f64> {
            let (table, row) = (self.table(), self.kv_heads * self.width);
            (0..self.lens.len())
                .flat_map(|request| (0..self.lens[request]).map(move |at| (request, at)))
                .flat_map(|(request, at)| {
                    let (page, slot) = place(&table, request, at);
                    let start = (page * self.page_size + slot) * row;
                    cache[start..start + row].to_vec()
                })
                .collect()
        }
    }

    fn batches() -> impl Strategy<Value = Batch> {
        let sizes = (1usize..5, 1usize..4, 1usize..4, 1usize..9, prop::collection::vec(0usize..12, 1..5));
        sizes.prop_flat_map(|(page_size, kv_heads, group, width, lens)| {
            let used: usize = lens.iter().map(|len: &usize| len.div_ceil(page_size)).sum();
            let pages: Vec<i32> = (0..used as i32 + 2).collect();
            let elements = pages.len() * page_size * kv_heads * width;
            let numbers = |len| prop::collection::vec(-3.0f64..3.0, len);
            let q = numbers(lens.len() * kv_heads * group * width);
            (Just(pages).prop_shuffle(), q, numbers(elements), numbers(elements)).prop_map(
                move |(pages, q, k, v)| Batch {
                    page_size,
                    kv_heads,
                    group,
                    width,
                    lens: lens.clone(),
                    pages,
                    q,
                    k,
                    v,
                },
            )
        })
    }

    #[track_caller]
    fn same(got: &(Vec<f64>, Vec<f64>), expected: &(Vec<f64>, Vec<f64>)) {
        close(&got.0, &expected.0);
        close(&got.1, &expected.1);
    }

    /// A batch with several queries per request, over the pages of a [`Batch`].
    #[derive(Clone, Debug)]
    struct Prefill {
        batch: Batch,
        queries: Vec<usize>,
        q: Vec<f64>,
        causal: bool,
    }

    impl Prefill {
        fn indices(&self) -> RaggedIndices {
            RaggedIndices::from_lens(self.queries.iter().copied()).unwrap()
        }

        fn heads(&self) -> usize {
            self.batch.kv_heads * self.batch.group
        }

        fn mask(&self) -> Mask<'static> {
            if self.causal { Mask::Causal } else { Mask::None }
        }

        fn paged(&self, spec: &AttentionSpec) -> (Vec<f64>, Vec<f64>) {
            let (batch, rows, heads) = (&self.batch, self.indices().total(), self.heads());
            let (k, v) = (view(&batch.k, &batch.shape()), view(&batch.v, &batch.shape()));
            let shape = [rows, heads, batch.width];
            let (mut out, mut lse) = (vec![f64::NAN; self.q.len()], vec![f64::NAN; rows * heads]);
            batch_prefill_paged(
                spec,
                &view(&self.q, &shape),
                &PagedKv::new(k, v, KvLayout::Nhd),
                &self.indices(),
                &batch.table(),
                &mut view_mut(&mut out, &shape),
                Some(&mut view_mut(&mut lse, &[rows, heads])),
                self.mask(),
                &RunOptions::default(),
            )
            .unwrap();
            (out, lse)
        }

        /// The same keys and values, one after the other.
        fn ragged(&self, spec: &AttentionSpec) -> (Vec<f64>, Vec<f64>) {
            let (batch, rows, heads) = (&self.batch, self.indices().total(), self.heads());
            let keys = RaggedIndices::from_lens(batch.lens.iter().copied()).unwrap();
            let (k, v) = (batch.gather(&batch.k), batch.gather(&batch.v));
            let (shape, kv_shape) = ([rows, heads, batch.width], [keys.total(), batch.kv_heads, batch.width]);
            let (mut out, mut lse) = (vec![f64::NAN; self.q.len()], vec![f64::NAN; rows * heads]);
            batch_prefill_ragged(
                spec,
                &view(&self.q, &shape),
                [&view(&k, &kv_shape), &view(&v, &kv_shape)],
                &self.indices(),
                &keys,
                &mut view_mut(&mut out, &shape),
                Some(&mut view_mut(&mut lse, &[rows, heads])),
                self.mask(),
                &RunOptions::default(),
            )
            .unwrap();
            (out, lse)
        }
    }

    fn prefills() -> impl Strategy<Value = Prefill> {
        batches().prop_flat_map(|batch| {
            let requests = batch.lens.len();
            (Just(batch), prop::collection::vec(0usize..6, requests), any::<bool>()).prop_flat_map(
                |(batch, queries, causal)| {
                    let rows: usize = queries.iter().sum();
                    let row = batch.kv_heads * batch.group * batch.width;
                    let q = prop::collection::vec(-3.0f64..3.0, rows * row);
                    (Just(batch), Just(queries), q, Just(causal))
                        .prop_map(|(batch, queries, q, causal)| Prefill { batch, queries, q, causal })
                },
            )
        })
    }

    proptest! {
            #![proptest_config(ProptestConfig::with_cases(64))]

            /// With one key, the output is its value.
            #[test]
            fn one_key_returns_its_value(mut batch in batches()) {
                batch.lens.fill(1);
                batch.pages.extend(batch.pages.len() as i32..(batch.lens.len() + 2) as i32);
                let page = batch.page_size * batch.kv_heads * batch.width;
                batch.k.resize(batch.pages.len() * page, 1.0);
                batch.v.resize(batch.pages.len() * page, 2.0);
                let (out, _) = batch.decode(&batch.spec());
                for (at, output) in out.chunks(batch.width).enumerate() {
                    let heads = batch.kv_heads * batch.group;
                    let (request, kv_head) = (at / heads, at % heads / batch.group);
                    let start = batch.pages[request] as usize * page + kv_head * batch.width;
                    close(output, &batch.v[start..start + batch.width]);
                }
            }

            /// Where pages lie in the cache does not matter.
            #[test]
            fn moving_pages_with_the_table_changes_nothing(batch in batches(), turn in 1usize..7) {
                let page = batch.page_size * batch.kv_heads * batch.width;
                let mut moved = batch.clone();
                let turn = turn % batch.pages.len();
                moved.k.rotate_right(turn * page);
                moved.v.rotate_right(turn * page);
                for page in &mut moved.pages {
                    *page = (*page + turn as i32) % batch.pages.len() as i32;
                }
                same(&moved.decode(&batch.spec()), &batch.decode(&batch.spec()));
            }

            /// The order of dimensions, joined storage and strides do not matter.
            #[test]
            fn layouts_agree(batch in batches()) {
                let expected = batch.decode(&batch.spec());
                let [pages, page_size, heads, width] = batch.shape();
                // HND storage is NHD storage with two dimensions swapped.
                let swap = |nhd: &[f64]| -> Vec<f64> {
                    let mut hnd = vec![f64::NAN; nhd.len()];
                    for (at, &x) in nhd.iter().enumerate() {
                        let (d, rest) = (at % width, at / width);
                        let (head, rest) = (rest % heads, rest / heads);
                        let (slot, page) = (rest % page_size, rest / page_size);
                        hnd[((page * heads + head) * page_size + slot) * width + d] = x;
                    }
                    hnd
                };
                let (k, v) = (swap(&batch.k), swap(&batch.v));
                let shape = [pages, heads, page_size, width];
                let kv = PagedKv::new(view(&k, &shape), view(&v, &shape), KvLayout::Hnd);
                same(&batch.decode_from(&batch.spec(), &kv), &expected);
                // The same storage, seen as NHD through strides.
                let permute = |x| view(x, &shape).permute(&[0, 2, 1, 3]).unwrap();
                let kv = PagedKv::new(permute(&k), permute(&v), KvLayout::Nhd);
                same(&batch.decode_from(&batch.spec(), &kv), &expected);
                // Keys and values page by page in one tensor.
                let page = page_size * heads * width;
                let joined: Vec<f64> =
                    batch.k.chunks(page).zip(batch.v.chunks(page)).flat_map(|(k, v)| [k, v].concat()).collect();
                let kv =
                    PagedKv::joined(view(&joined, &[pages, 2, page_size, heads, width]), KvLayout::Nhd).unwrap();
                same(&batch.decode_from(&batch.spec(), &kv), &expected);
            }

            /// A window that covers every key, and a cap that no logit comes near,
            /// change nothing.
            #[test]
            fn wide_windows_and_caps_are_none(batch in batches()) {
                let expected = batch.decode(&batch.spec());
                let longest = batch.lens.iter().max().copied().unwrap_or(0) as u32;
                let window = batch.spec().with_window_left(longest.saturating_sub(1));
                same(&batch.decode(&window), &expected);
                let (out, lse) = batch.decode(&batch.spec().with_logits_soft_cap(1e9));
                for (a, b) in out.iter().zip(&expected.0).chain(lse.iter().zip(&expected.1)) {
                    prop_assert!(a == b || (a - b).abs() < 1e-9);
                }
            }

            /// A window is the same as a request that holds only its keys.
            #[test]
            fn a_window_forgets_older_pages(mut batch in batches(), pages in 1usize..3) {
                batch.lens.truncate(1);
                batch.lens[0] = batch.lens[0].max(1);
                let kept = (pages - 1) * batch.page_size + (batch.lens[0] - 1) % batch.page_size + 1;
                prop_assume!(kept < batch.lens[0]);
                let window = batch.decode(&batch.spec().with_window_left(kept as u32 - 1));
                let used = batch.lens[0].div_ceil(batch.page_size);
                let mut short = batch.clone();
                short.pages.rotate_left(used - pages);
                short.lens[0] = kept;
                same(&window, &short.decode(&batch.spec()));
            }

            /// What was appended is what decode reads.
            #[test]
            fn appended_tokens_are_attended_to(batch in batches()) {
                let table = batch.table();
                let append_indptr: Vec<i32> = std::iter::once(0)
                    .chain(batch.lens.iter().scan(0, |end, &len| { *end += len as i32; Some(*end) }))
                    .collect();
                let append = crate::AppendIndices::last_tokens(&table, &append_indptr).unwrap();
                let (key, value) = (batch.gather(&batch.k), batch.gather(&batch.v));
                let shape = [append.len(), batch.kv_heads, batch.width];
                let (mut k, mut v) = (vec![f64::NAN; batch.k.len()], vec![f64::NAN; batch.v.len()]);
                let mut cache = crate::kv::PagedKvMut::new(
                    view_mut(&mut k, &batch.shape()),
                    view_mut(&mut v, &batch.shape()),
                    KvLayout::Nhd,
                );
                crate::reference::append_paged_kv_cache(
                    &view(&key, &shape),
                    &view(&value, &shape),
                    &append,
                    &mut cache,
                    &table,
                )
                .unwrap();
                same(&batch.decode_from(&batch.spec(), &cache.as_ref()), &batch.decode(&batch.spec()));
            }

            /// With one query per request, prefill is decode, causal or not.
            #[test]
            fn prefill_of_one_query_is_decode(batch in batches(), causal: bool, window in 0u32..9) {
                let queries = vec![1; batch.lens.len()];
                let prefill = Prefill { q: batch.q.clone(), queries, causal, batch: batch.clone() };
                for spec in [batch.spec(), batch.spec().with_window_left(window)] {
                    let expected = batch.decode(&spec);
                    same(&prefill.paged(&spec), &expected);
                    same(&prefill.ragged(&spec), &expected);
                }
            }

            /// Where keys and values lie does not matter.
            #[test]
            fn ragged_prefill_is_paged_prefill(prefill in prefills(), window in 0u32..9) {
                for spec in [prefill.batch.spec(), prefill.batch.spec().with_window_left(window)] {
                    same(&prefill.ragged(&spec), &prefill.paged(&spec));
                }
            }

            /// One request is a batch of one, and one query its last token, also
            /// where keys are stored head by head.
            #[test]
            fn one_request_is_a_batch_of_one(mut prefill in prefills(), window in 0u32..9) {
                prefill.batch.lens.truncate(1);
                prefill.queries.truncate(1);
                let (batch, heads, width) = (&prefill.batch, prefill.heads(), prefill.batch.width);
                let (rows, keys) = (prefill.queries[0], batch.lens[0]);
                let row = heads * width;
                prefill.q.truncate(rows * row);
                let (k, v) = (batch.gather(&batch.k), batch.gather(&batch.v));
                let shape = [keys, batch.kv_heads, width];
                let by_head = |nhd: &[f64]| -> Vec<f64> {
                    let of_head = |head: usize| nhd.chunks(width).skip(head).step_by(batch.kv_heads).flatten();
                    (0..batch.kv_heads).flat_map(of_head).copied().collect()
                };
                let (k_hnd, v_hnd) = (by_head(&k), by_head(&v));
                let hnd = |x| view(x, &[batch.kv_heads, keys, width]).permute(&[1, 0, 2]).unwrap();
                for spec in [batch.spec(), batch.spec().with_window_left(window)] {
                    let expected = prefill.ragged(&spec);
                    for (k, v) in [(view(&k, &shape), view(&v, &shape)), (hnd(&k_hnd), hnd(&v_hnd))] {
                        let (mut out, mut lse) = (vec![f64::NAN; rows * row], vec![f64::NAN; rows * heads]);
                        single_prefill(
                            &spec,
                            &view(&prefill.q, &[rows, heads, width]),
                            [&k, &v],
                            &mut view_mut(&mut out, &[rows, heads, width]),
                            Some(&mut view_mut(&mut lse, &[rows, heads])),
                            prefill.mask(),
    &RunOptions::default(),
                        )
                        .unwrap();
                        same(&(out, lse), &expected);
                        let Some(last) = rows.checked_sub(1) else { continue };
                        let (mut out, mut lse) = (vec![f64::NAN; row], vec![f64::NAN; heads]);
                        single_decode(
                            &spec,
                            &view(&prefill.q[last * row..], &[heads, width]),
                            [&k, &v],
                            &mut view_mut(&mut out, &[heads, width]),
                            Some(&mut view_mut(&mut lse, &[heads])),
                            &RunOptions::default(),
                        )
                        .unwrap();
                        close(&out, &expected.0[last * row..]);
                        close(&lse, &expected.1[last * heads..]);
                    }
                }
            }

            /// Row by row, causal prefill is decode of a growing request.
            #[test]
            fn causal_prefill_is_decode_step_by_step(mut prefill in prefills(), window in 0u32..9) {
                prefill.causal = true;
                let heads = prefill.heads();
                let (row, first) = (heads * prefill.batch.width, prefill.indices());
                for spec in [prefill.batch.spec(), prefill.batch.spec().with_window_left(window)] {
                    let (out, lse) = prefill.paged(&spec);
                    for request in 0..prefill.queries.len() {
                        for query in 0..prefill.queries[request] {
                            let after = prefill.queries[request] - 1 - query;
                            let mut step = prefill.batch.clone();
                            let used = step.lens[..request].iter().map(|len| len.div_ceil(step.page_size)).sum();
                            step.pages.rotate_left(used);
                            step.lens = vec![step.lens[request].saturating_sub(after)];
                            let at = first.indptr()[request] as usize + query;
                            step.q = prefill.q[at * row..(at + 1) * row].to_vec();
                            let (want, want_lse) = step.decode(&spec);
                            close(&out[at * row..(at + 1) * row], &want);
                            close(&lse[at * heads..(at + 1) * heads], &want_lse);
                        }
                    }
                }
            }

            /// A window that reaches before the first key changes nothing.
            #[test]
            fn wide_windows_of_prefill_are_none(prefill in prefills()) {
                let spec = prefill.batch.spec();
                same(&prefill.paged(&spec.with_window_left(20)), &prefill.paged(&spec));
            }
        }
}
