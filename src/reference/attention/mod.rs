//! Decode and prefill of batches and of one request on the CPU.
//!
//! Decode is prefill with one query per request, and one request is a batch of
//! one, so all are one function.

mod batch;
mod keys;
mod logits;
#[cfg(test)]
mod tests;

use batch::QueryBatch;
use keys::Keys;
#[cfg(feature = "candle")]
use logits::Alibi;
pub use logits::HostMask;
use logits::Logits;
pub(super) use logits::softmax;

use super::{host::HostCheck, strict};
use crate::{
    attention::{
        AttentionSpec, Backend, BatchRun, Heads, RunOptions, check_single_decode, check_single_decode_spec,
        check_single_prefill,
    },
    error::Result,
    indices::{PageIndices, RaggedIndices},
    kv::{KvLayout, PagedKv},
    tensor::{RawTensor, TensorMut, TensorRef},
};

/// A size of a tensor; 0 where there is no such axis.
fn axis(tensor: &TensorRef<'_>, axis: usize) -> usize {
    tensor.shape().get(axis).map_or(0, |&size| size as usize)
}

fn kv_heads(kv: &PagedKv<'_>) -> usize {
    axis(&kv.k, if kv.layout == KvLayout::Nhd { 2 } else { 1 })
}

/// There may be more rows than queries.
fn padded_rows(q: &TensorRef<'_>, queries: &RaggedIndices) -> usize {
    axis(q, 0).max(queries.total())
}

/// What a plan would be told, for the heads that the tensors have.
fn as_run<'a>(
    spec: &'a AttentionSpec,
    q: &'a TensorRef<'_>,
    out: &'a TensorMut<'_>,
    lse: Option<&'a TensorMut<'_>>,
    num_kv_heads: usize,
    rows: usize,
    options: &'a RunOptions<'_>,
) -> BatchRun<'a> {
    let heads = Heads::new(axis(q, 1), num_kv_heads);
    BatchRun { spec, heads, rows, q: &q.raw, out: &out.raw, lse: lse.map(|lse| &lse.raw), options }
}

/// What planning a batch of requests with so many queries and keys refuses, where the thread is strict.
fn check_plan(
    op: &'static str,
    spec: &AttentionSpec,
    mask: HostMask<'_>,
    requests: impl Iterator<Item = (usize, usize)> + Clone,
    paged: bool,
) -> Result<()> {
    strict::as_kernel(op, |check| {
        spec.check_prefill()?;
        mask.kind().check(check, spec, spec.backend == Backend::Fa3, requests, paged)
    })
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
    let check = HostCheck { op: "reference::batch_decode" };
    strict::as_kernel("DecodePlan::run_with", |check| {
        spec.check_decode()?;
        let run = as_run(spec, q, out, lse.as_deref(), kv_heads(kv), table.batch_size(), options);
        run.check(check)?;
        run.check_pages(check, kv, table)
    })?;
    let queries = RaggedIndices::from_lens(std::iter::repeat_n(1, table.batch_size()))?;
    // The only query of a request is its last token, so it sees all keys.
    let logits = Logits::new(check, spec, HostMask::Causal, options)?;
    let mut attention = QueryBatch::new(check, spec, q, (&queries, false), out, lse)?;
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
    mask: HostMask<'_>,
    options: &RunOptions<'_>,
) -> Result<()> {
    let check = HostCheck { op: "reference::batch_prefill_paged" };
    let requests =
        (0..table.batch_size().min(queries.batch_size())).map(|at| (queries.len(at), table.seq_len(at)));
    check_plan("BatchPrefill::plan_paged", spec, mask, requests, true)?;
    strict::as_kernel("PrefillPlan::run_with", |check| {
        let rows = padded_rows(q, queries);
        let run = as_run(spec, q, out, lse.as_deref(), kv_heads(kv), rows, options);
        run.check_on_tensor_cores(check)?;
        run.check_pages(check, kv, table)
    })?;
    let logits = Logits::new(check, spec, mask, options)?;
    let mut attention = QueryBatch::new(check, spec, q, (queries, true), out, lse)?;
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
    mask: HostMask<'_>,
    options: &RunOptions<'_>,
) -> Result<()> {
    let check = HostCheck { op: "reference::batch_prefill_ragged" };
    let requests = (0..keys.batch_size().min(queries.batch_size())).map(|at| (queries.len(at), keys.len(at)));
    check_plan("BatchPrefill::plan_ragged", spec, mask, requests, false)?;
    strict::as_kernel("PrefillPlan::run_with", |check| {
        let rows = padded_rows(q, queries);
        let run = as_run(spec, q, out, lse.as_deref(), axis(kv[0], 1), rows, options);
        run.check_on_tensor_cores(check)?;
        run.check_rows(check, kv.map(|tensor| &tensor.raw), keys.total())
    })?;
    let logits = Logits::new(check, spec, mask, options)?;
    let mut attention = QueryBatch::new(check, spec, q, (queries, true), out, lse)?;
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
    mask: HostMask<'_>,
    options: &RunOptions<'_>,
) -> Result<()> {
    let check = HostCheck { op: "reference::single_prefill" };
    strict::as_kernel("SinglePrefill::run_with", |check| {
        spec.check_single_prefill()?;
        let fa3 = spec.backend == Backend::Fa3;
        let tensors = [&q.raw, &kv[0].raw, &kv[1].raw, &out.raw];
        let lse = lse.as_ref().map(|lse| &lse.raw);
        check_single_prefill(check, spec, fa3, tensors, lse, options)?;
        mask.kind().check(check, spec, fa3, [(axis(q, 0), axis(kv[0], 0))], false)
    })?;
    let [queries, keys] = [rows_of(q)?, rows_of(kv[0])?];
    let logits = Logits::new(check, spec, mask, options)?;
    let mut attention = QueryBatch::new(check, spec, q, (&queries, false), out, lse)?;
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
    let check = HostCheck { op: "reference::single_decode" };
    strict::as_kernel("SingleDecode::run_with", |check| {
        let heads = Heads::new(axis(q, 0), axis(kv[0], 1));
        check_single_decode_spec(spec, heads)?;
        spec.check_single_decode()?;
        let lse = lse.as_ref().map(|lse| &lse.raw);
        let run = BatchRun { spec, heads, rows: 1, q: &q.raw, out: &out.raw, lse, options };
        check_single_decode(check, &run, kv)
    })?;
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
    let logits = Logits::new(check, spec, HostMask::Causal, options)?;
    let mut attention = QueryBatch::new(check, spec, &q, (&query, false), &mut out, lse.as_mut())?;
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
#[expect(clippy::too_many_arguments, reason = "those of plan and run together")]
pub(crate) fn flash_attention(
    spec: &AttentionSpec,
    q: &TensorRef<'_>,
    kv: &KeysAndValues<'_>,
    queries: &RaggedIndices,
    out: &mut TensorMut<'_>,
    lse: Option<&mut TensorMut<'_>>,
    mask: HostMask<'_>,
    options: &RunOptions<'_>,
) -> Result<()> {
    let check = HostCheck { op: "flash_attn" };
    let mut logits = Logits::new(check, spec, mask, options)?;
    logits.alibi = Alibi::FlashAttention;
    let mut attention = QueryBatch::new(check, spec, q, (queries, true), out, lse)?;
    let keys = match *kv {
        KeysAndValues::Paged(kv, table) => Keys::paged(check, spec, kv, table)?,
        KeysAndValues::Ragged(kv, keys) => Keys::ragged(check, spec, kv, keys)?,
    };
    attention.over(&keys, &logits)
}

/// All rows of a tensor, as those of one request.
fn rows_of(tensor: &TensorRef<'_>) -> Result<RaggedIndices> {
    RaggedIndices::from_lens(tensor.shape().first().map(|&rows| rows as usize))
}
