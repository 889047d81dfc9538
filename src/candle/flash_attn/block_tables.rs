//! Attention over block tables, as engines of vLLM's kind call it.

use candle_core::{Device, Result, Tensor, bail};

use super::{
    call::{AttentionParams, BatchLayout, Lengths},
    lengths,
    operation::CacheScales,
};
use crate::kv::KvLayout;

/// How [`paged_attention`] computes, and of what.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct PagedAttentionOptions<'a> {
    /// The factor on products of queries and keys.
    pub softmax_scale: f32,
    /// The order of the caches' dimensions; [`KvLayout::Nhd`] by default.
    pub layout: KvLayout,
    /// New tokens of each request, `(requests)`, of `u32`, `i32` or `i64`. `None`, the default, is one of
    /// each: a decode step.
    pub query_lens: Option<&'a Tensor>,
    /// How many keys before its own a query sees; `None`, the default, is all.
    pub window_size_left: Option<usize>,
    /// Logits become `softcap · tanh(logits / softcap)`. `None`, the default, changes nothing.
    pub softcap: Option<f32>,
    /// What 8-bit keys were divided by when they were quantized; 1 by default, and for keys of other types.
    pub k_scale: f64,
    /// What 8-bit values were divided by; 1 by default, and for others.
    pub v_scale: f32,
    /// `f32` `(num_heads_q)`: each head's logit of a key that has no value. `None`, the default, is none.
    pub sinks: Option<&'a Tensor>,
}

impl PagedAttentionOptions<'_> {
    /// A decode step over `NHD` caches, without window, soft cap and sinks.
    pub const fn new(softmax_scale: f32) -> Self {
        Self {
            softmax_scale,
            layout: KvLayout::Nhd,
            query_lens: None,
            window_size_left: None,
            softcap: None,
            k_scale: 1.0,
            v_scale: 1.0,
            sinks: None,
        }
    }
}

/// Causal attention of new tokens to their requests' keys and values in blocks.
///
/// | | |
/// |---|---|
/// | `q` | `(tokens, num_heads_q, head_dim)`: the new tokens, those of a request one after the other. They are the last of its tokens |
/// | `k_cache`, `v_cache` | `(blocks, block_size, num_heads_kv, head_dim)` for [`KvLayout::Nhd`], `(blocks, num_heads_kv, block_size, head_dim)` for [`KvLayout::Hnd`]; parts of one tensor `(blocks, 2, …)`, too |
/// | `block_tables` | `(requests, max_blocks)`: a request's blocks, in order; what is behind those that its tokens need is not read |
/// | `context_lens` | `(requests)`: tokens of each request in the cache, the new ones among them |
///
/// Caches have the dtype of `q`, or are `f8e4m3`, with a scale of keys and one of values. Integers are `u32`,
/// `i32` or `i64`. The result has the shape of `q`. A block holds any number of tokens.
/// Caches are read by their strides and are not copied, if heads lie alike in both and at multiples of 16
/// bytes.
///
/// Tables and lengths are read on the host, where they are checked: of CUDA tensors this waits for the
/// stream, so pass CPU tensors where you have them. The layers of a step plan once. Where no module of
/// prefill can be had for the spec, one of decode serves steps of one query each.
///
/// # Errors
/// Dtypes, devices or shapes do not fit; a block that a request needs does not exist; a request has more new
/// tokens than tokens (but for one without any, which gets zeros); scales for caches of 16 bits; no module serves
/// the call; what the kernels, CUDA or candle said.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use flashinfer_rs::candle::{PagedAttentionOptions, paged_attention};
///
/// // Two requests of 20 and 3 tokens, in blocks of 16; one query of each, with 4 heads over 2.
/// let q = Tensor::randn(0f32, 1., (2, 4, 64), &Device::Cpu)?;
/// let cache = Tensor::randn(0f32, 1., (8, 2, 16, 2, 64), &Device::Cpu)?;
/// let (k, v) = (cache.narrow(1, 0, 1)?.squeeze(1)?, cache.narrow(1, 1, 1)?.squeeze(1)?);
/// let block_tables = Tensor::new(&[[7u32, 2], [5, 0]], &Device::Cpu)?;
/// let context_lens = Tensor::new(&[20u32, 3], &Device::Cpu)?;
/// let out = paged_attention(&q, &k, &v, &block_tables, &context_lens, &PagedAttentionOptions::new(0.125))?;
/// assert_eq!(out.dims(), [2, 4, 64]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn paged_attention(
    q: &Tensor,
    k_cache: &Tensor,
    v_cache: &Tensor,
    block_tables: &Tensor,
    context_lens: &Tensor,
    options: &PagedAttentionOptions<'_>,
) -> Result<Tensor> {
    over_blocks([k_cache, v_cache], block_tables, context_lens, options, |params, [k, v]| params.of(q, k, v))
}

/// As [`paged_attention`]; beside the result, the LSE: `f32` `(tokens, num_heads_q)`, for each token and
/// head the base-2 logarithm of the sum of `exp` of its scores, with which results over parts of the keys
/// can be merged, of which one has the sinks. A token that sees no key has −∞, or its sink times log2 e.
///
/// # Errors
/// As [`paged_attention`].
pub fn paged_attention_with_lse(
    q: &Tensor,
    k_cache: &Tensor,
    v_cache: &Tensor,
    block_tables: &Tensor,
    context_lens: &Tensor,
    options: &PagedAttentionOptions<'_>,
) -> Result<(Tensor, Tensor)> {
    over_blocks([k_cache, v_cache], block_tables, context_lens, options, |params, [k, v]| {
        params.with_lse(q, k, v)
    })
}

/// Calls `run` with what block tables say, and the caches in the order that it takes.
fn over_blocks<R>(
    [k_cache, v_cache]: [&Tensor; 2],
    block_tables: &Tensor,
    context_lens: &Tensor,
    options: &PagedAttentionOptions<'_>,
    run: impl FnOnce(&AttentionParams<'_>, [&Tensor; 2]) -> Result<R>,
) -> Result<R> {
    for (name, cache) in [("k_cache", k_cache), ("v_cache", v_cache)] {
        if cache.rank() != 4 {
            bail!("paged_attention: {name} has shape {:?}; expected 4 dimensions", cache.shape())
        }
    }
    let (keys, max_keys) = cumulative("context_lens", context_lens)?;
    let requests = keys.dims1()? - 1;
    let (queries, max_queries) = match options.query_lens {
        Some(lens) => cumulative("query_lens", lens)?,
        None => (Tensor::arange(0, requests as i64 + 1, &Device::Cpu)?, 1),
    };
    if queries.dims1()? != requests + 1 {
        bail!(
            "paged_attention: query_lens is of {} requests, context_lens of {requests}",
            queries.dims1()? - 1
        )
    }
    let (new, all) = (queries.to_vec1::<i64>()?, keys.to_vec1::<i64>()?);
    for (request, (new, all)) in new.windows(2).zip(all.windows(2)).enumerate() {
        let (new, all) = (new[1] - new[0], all[1] - all[0]);
        if new > all && all > 0 {
            bail!(
                "paged_attention: request {request} has {new} new tokens by query_lens, and {all} in all by \
                 context_lens, which the new ones are among"
            )
        }
    }
    // A view by strides, which kernels take.
    let blocks = |cache: &Tensor| match options.layout {
        KvLayout::Nhd => Ok(cache.clone()),
        KvLayout::Hnd => cache.transpose(1, 2),
    };
    let (k, v) = (blocks(k_cache)?, blocks(v_cache)?);
    let batch = BatchLayout::Paged {
        lengths: Lengths { queries: &queries, keys: &keys, max: [max_queries, max_keys] },
        block_table: block_tables,
        page_size: k.dims()[1],
        ranges: None,
        scales: Some(CacheScales { k: options.k_scale, v: options.v_scale }),
        sinks: options.sinks,
    };
    let (softmax_scale, softcap) = (options.softmax_scale, options.softcap);
    let window = [options.window_size_left, Some(0)];
    run(&AttentionParams { softmax_scale, window, softcap, alibi_slopes: None, batch }, [&k, &v])
}

/// Lengths, one for each request, as cumulative ones on the host, and the longest.
fn cumulative(name: &str, lens: &Tensor) -> Result<(Tensor, usize)> {
    if lens.rank() != 1 {
        bail!(
            "paged_attention: {name} has shape {:?}; expected one dimension, a number for each request",
            lens.shape()
        )
    }
    let (mut ends, mut longest) = (vec![0i64], 0);
    for (request, len) in lengths::integers(name, lens)?.into_iter().enumerate() {
        let end = usize::try_from(len).ok().and_then(|_| ends[request].checked_add(len));
        let Some(end) = end else {
            bail!("paged_attention: {name} says that request {request} has {len} tokens; expected 0 or more")
        };
        longest = longest.max(len as usize);
        ends.push(end);
    }
    let count = ends.len();
    Ok((Tensor::from_vec(ends, count, &Device::Cpu)?, longest))
}
