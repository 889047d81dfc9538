//! The functions of `candle-flash-attn`, with FlashInfer's kernels. Their rules are
//! documented in [`candle`](super).

mod block_tables;
mod call;
#[cfg(feature = "candle-cuda")]
mod launch;
mod lengths;
mod operation;
mod views;
mod visible;
pub use block_tables::{PagedAttentionOptions, paged_attention, paged_attention_with_lse};
use call::{AttentionParams, BatchLayout, Lengths};
use candle_core::{Result, Tensor};

/// Either side of a causal mask.
fn causal_window(causal: bool) -> [Option<usize>; 2] {
    [None, causal.then_some(0)]
}

/// Frees what the calling thread keeps on devices for these functions: for each
/// stream that it used, 128 MiB and more. The next call takes it anew. Nothing
/// waits for the device. Without the feature `candle-cuda` there is nothing.
pub fn release_workspaces() {
    #[cfg(feature = "candle-cuda")]
    launch::release_workspaces();
}

/// Attention of sequences that are all as long as each other.
///
/// `q` is `(batch, s_q, num_heads_q, head_dim)`, `k` and `v` are
/// `(batch, s_k, num_heads_kv, head_dim)`; the result has the shape of `q`. With
/// `causal`, a query sees the keys up to its position: the mask's last row
/// belongs to the last query and ends at the last key, so with `s_q > s_k` the
/// first queries see nothing and get zeros.
///
/// The [rules](crate::candle#attention) are those that all functions share.
///
/// # Errors
/// Dtypes, devices or shapes do not fit; no module serves the call; what the
/// kernels, CUDA or candle said.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use flashinfer_rs::candle::flash_attn;
///
/// // Two sequences: 3 new queries over a cache of 5 keys, 4 heads over 2.
/// let q = Tensor::randn(0f32, 1., (2, 3, 4, 16), &Device::Cpu)?;
/// let cache = Tensor::randn(0f32, 1., (2, 2, 8, 16), &Device::Cpu)?;
/// let keys = cache.narrow(2, 0, 5)?.transpose(1, 2)?;
/// let out = flash_attn(&q, &keys, &keys, 0.25, true)?;
/// assert_eq!(out.dims(), [2, 3, 4, 16]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn flash_attn(q: &Tensor, k: &Tensor, v: &Tensor, softmax_scale: f32, causal: bool) -> Result<Tensor> {
    let window = causal_window(causal);
    AttentionParams { softmax_scale, window, softcap: None, alibi_slopes: None, batch: BatchLayout::Dense }
        .of(q, k, v)
}

/// [`flash_attn`] with a window; the [rules](crate::candle#attention) have its
/// meaning.
///
/// # Errors
/// As [`flash_attn`].
pub fn flash_attn_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let window = [window_size_left, window_size_right];
    AttentionParams { softmax_scale, window, softcap: None, alibi_slopes: None, batch: BatchLayout::Dense }
        .of(q, k, v)
}

/// [`flash_attn`] with ALiBi; the [rules](crate::candle#attention) have its
/// meaning, and what CUDA needs for it.
///
/// # Errors
/// As [`flash_attn`]; also when `alibi_slopes` is not `f32` `(num_heads_q)`.
pub fn flash_attn_alibi(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    let (window, alibi_slopes) = (causal_window(causal), Some(alibi_slopes));
    AttentionParams { softmax_scale, window, softcap: None, alibi_slopes, batch: BatchLayout::Dense }
        .of(q, k, v)
}

/// [`flash_attn_alibi`] with a window.
///
/// # Errors
/// As [`flash_attn_alibi`].
pub fn flash_attn_alibi_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let (window, alibi_slopes) = ([window_size_left, window_size_right], Some(alibi_slopes));
    AttentionParams { softmax_scale, window, softcap: None, alibi_slopes, batch: BatchLayout::Dense }
        .of(q, k, v)
}

/// [`flash_attn_windowed`] with a soft cap, and with ALiBi if there are slopes.
///
/// # Errors
/// As [`flash_attn_alibi`]; on CUDA also with both a soft cap and slopes.
#[expect(clippy::too_many_arguments, reason = "candle-flash-attn's signature")]
pub fn flash_attn_alibi_windowed_softcap(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: f32,
) -> Result<Tensor> {
    let (window, softcap) = ([window_size_left, window_size_right], Some(softcap));
    AttentionParams { softmax_scale, window, softcap, alibi_slopes, batch: BatchLayout::Dense }.of(q, k, v)
}

/// Attention of sequences of several lengths, which lie one after the other.
///
/// `q` is `(total_q, num_heads_q, head_dim)`, `k` and `v` are
/// `(total_k, num_heads_kv, head_dim)`; the result has the shape of `q`.
/// `seqlens_q` and `seqlens_k` hold the cumulative lengths of the `batch`
/// sequences, `batch + 1` numbers from 0 to the number of rows, as `u32`, `i32`
/// or `i64`; they are read on the host, so CPU tensors save a wait. Sequences
/// may be empty. `max_seqlen_q` and `max_seqlen_k` are the longest, or more.
///
/// With `causal` or a window, positions are those of each sequence; see the
/// [rules](crate::candle#attention).
///
/// # Errors
/// As [`flash_attn`]; also when cumulative lengths do not begin with 0,
/// decrease, end elsewhere than at the last row, or have a sequence that is
/// longer than its maximum.
#[expect(clippy::too_many_arguments, reason = "candle-flash-attn's signature")]
pub fn flash_attn_varlen(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    let (max_q, max_k, [left, right]) = (max_seqlen_q, max_seqlen_k, causal_window(causal));
    flash_attn_varlen_windowed(q, k, v, seqlens_q, seqlens_k, max_q, max_k, softmax_scale, left, right)
}

/// [`flash_attn_varlen`] with a window.
///
/// # Errors
/// As [`flash_attn_varlen`].
#[expect(clippy::too_many_arguments, reason = "candle-flash-attn's signature")]
pub fn flash_attn_varlen_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let lengths = Lengths { queries: seqlens_q, keys: seqlens_k, max: [max_seqlen_q, max_seqlen_k] };
    let (window, batch) = ([window_size_left, window_size_right], BatchLayout::Ragged(lengths));
    AttentionParams { softmax_scale, window, softcap: None, alibi_slopes: None, batch }.of(q, k, v)
}

/// [`flash_attn_varlen_windowed`] over keys and values in pages, called blocks
/// here.
///
/// `k` and `v` are `(num_blocks, page_block_size, num_heads_kv, head_dim)`, of
/// any block size. Row `i` of `block_table`, `(batch, max_blocks)` of `u32`,
/// `i32` or `i64`, names the blocks of sequence `i` in order; of those, as many
/// are looked at as its keys need, and the rest may be anything. `softcap` of
/// `None` or 0 is none. It is best to keep `k` and `v` in one layout: with other
/// strides than each other, the whole cache is copied at each call.
///
/// `mm_prefix_ranges`, `(batch, max_ranges, 2)` of integers, are ranges of
/// positions, from the first to before the last, within which queries see all
/// keys, whatever the window says; a range that does not begin before its end
/// is none.
///
/// All of these are read on the host; CPU tensors save a wait.
///
/// # Errors
/// As [`flash_attn_varlen`]; also when `page_block_size` is not that of `k`, or
/// a block that a sequence needs does not exist.
#[expect(clippy::too_many_arguments, reason = "candle-flash-attn's signature")]
pub fn flash_attn_varlen_paged_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    block_table: &Tensor,
    mm_prefix_ranges: Option<&Tensor>,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    page_block_size: usize,
    softcap: Option<f32>,
) -> Result<Tensor> {
    let lengths = Lengths { queries: seqlens_q, keys: seqlens_k, max: [max_seqlen_q, max_seqlen_k] };
    let (page_size, ranges) = (page_block_size, mm_prefix_ranges);
    let batch = BatchLayout::Paged { lengths, block_table, page_size, ranges, scales: None, sinks: None };
    let window = [window_size_left, window_size_right];
    AttentionParams { softmax_scale, window, softcap, alibi_slopes: None, batch }.of(q, k, v)
}

/// [`flash_attn_varlen`] with ALiBi; see [`flash_attn_alibi`].
///
/// # Errors
/// As [`flash_attn_varlen`] and [`flash_attn_alibi`].
#[expect(clippy::too_many_arguments, reason = "candle-flash-attn's signature")]
pub fn flash_attn_varlen_alibi(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    let [left, right] = causal_window(causal);
    flash_attn_varlen_alibi_windowed(
        q,
        k,
        v,
        alibi_slopes,
        seqlens_q,
        seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        left,
        right,
    )
}

/// [`flash_attn_varlen_alibi`] with a window.
///
/// # Errors
/// As [`flash_attn_varlen_alibi`].
#[expect(clippy::too_many_arguments, reason = "candle-flash-attn's signature")]
pub fn flash_attn_varlen_alibi_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let (window, alibi_slopes) = ([window_size_left, window_size_right], Some(alibi_slopes));
    let lengths = Lengths { queries: seqlens_q, keys: seqlens_k, max: [max_seqlen_q, max_seqlen_k] };
    let batch = BatchLayout::Ragged(lengths);
    AttentionParams { softmax_scale, window, softcap: None, alibi_slopes, batch }.of(q, k, v)
}

/// [`flash_attn_varlen_windowed`] with a soft cap, and with ALiBi if there are
/// slopes.
///
/// # Errors
/// As [`flash_attn_varlen_alibi`]; on CUDA also with both a soft cap and slopes.
#[expect(clippy::too_many_arguments, reason = "candle-flash-attn's signature")]
pub fn flash_attn_varlen_alibi_windowed_softcap(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: f32,
) -> Result<Tensor> {
    let lengths = Lengths { queries: seqlens_q, keys: seqlens_k, max: [max_seqlen_q, max_seqlen_k] };
    let (window, batch) = ([window_size_left, window_size_right], BatchLayout::Ragged(lengths));
    AttentionParams { softmax_scale, window, softcap: Some(softcap), alibi_slopes, batch }.of(q, k, v)
}
