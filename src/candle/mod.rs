//! FlashInfer's kernels for candle's tensors.
//!
//! Tensors on a CUDA device go to the kernels, on the device's own stream and
//! without waiting; tensors on the CPU to the [`reference`](mod@crate::reference).
//!
//! # Paged attention
//!
//! A [`PagedCache`] holds keys and values of many sequences, which
//! [`kv`](crate::kv) keeps: forks, prefixes that sequences share, truncation. In
//! each step [`StepTables::update`] uploads the arrays of a
//! [`Batch`](crate::kv::Batch) once; [`PagedPrefill`] and [`PagedDecode`] plan it
//! once, and run it in each layer. Query heads may be a multiple of KV heads, which
//! are not repeated.
//!
//! | | `candle-nn` | here |
//! |---|---|---|
//! | keys and values | a tensor for each sequence, or padded to one length, and copied to grow | pages, of which one layer is one tensor, changed in place |
//! | several sequences | of one length, or masked | of any lengths, in one call |
//! | [`rms_norm`] | `ops::rms_norm` | the same signature |
//! | [`silu_and_mul`] | `silu` of one tensor, times another | one tensor with both, one kernel |
//! | [`rope`] | `rotary_emb::rope` and `rope_i`, for each of `q` and `k` | one kernel for both, each token at its own position |
//!
//! An engine with block tables of its own calls [`paged_attention`] with them.
//! [`PagedMla`] is latent attention over the same kind of cache. Runs give an LSE where
//! it is asked for, and take scales, attention sinks and slopes ([`PagedRunOptions`]).
//! [`capture_step`] captures a decode step, candle's own operations included, into a
//! CUDA graph.
//!
//! # Attention
//!
//! [`flash_attn`] and the functions beside it have the names, parameters and
//! meaning of candle-flash-attn 0.11.1, so that a model changes its `use` line and
//! nothing else. All of them compute
//! `softmax(q · kᵀ · softmax_scale) · v` for each head, with these rules:
//!
//! - **Heads.** `q` has a multiple of the heads of `k` and `v`; each of those
//!   serves as many query heads that follow each other. Nothing is repeated.
//! - **Positions.** The last query of a sequence stands at its last key: query
//!   `r` of `s_q` is at position `p = s_k − s_q + r` of `s_k` keys.
//! - **Windows.** `window_size_left` is how many keys before its position a
//!   query sees, besides the one at it, `window_size_right` how many after it.
//!   `None` is all, and so is a number above the number of keys (for sequences
//!   of several lengths, above `max_seqlen_k`); only that a left window without
//!   a right one stops `s_k` (or `max_seqlen_k`) keys after the position, which
//!   queries far before the first key notice. `causal` is `None` and `Some(0)`.
//! - **Soft cap.** A `softcap` above 0 turns logits into
//!   `softcap · tanh(logits / softcap)`; with 0 or below there is none.
//! - **ALiBi.** `alibi_slopes` is `f32` of shape `(num_heads_q)`; a logit loses
//!   its head's slope times the distance of key and position, after the cap.
//! - A query that sees no key gets zeros.
//!
//! ## Devices and dtypes
//! On the CPU, tensors are `f32`, `f16`, `bf16` or `f64`, and the sums are made
//! in `f64`, by the [`reference`](mod@crate::reference), which is exact and
//! slow. On CUDA, which needs the feature `candle-cuda`, they are `f16` or
//! `bf16`; FlashInfer publishes modules with head dimensions 64, 128 and 256,
//! some of them without window or soft cap, and none with ALiBi. Where there is
//! no module, the error says so, with what there is. A module of one's
//! own (see [`PosEncodingMode::Alibi`]) makes ALiBi work where no query sees a
//! key after its position; with other windows FlashInfer's formula is another
//! one, and that is an error too. So is a `softmax_scale` below 0.001, with which
//! its kernels would not hide keys. On both, head dimensions are multiples of 8
//! and at most 512.
//!
//! ## Copies
//! Strides and offsets are taken as they are: transposed views, parts of longer
//! caches and joined projections of queries, keys and values need no
//! `contiguous()`. What is copied first: tensors whose last dimension is not
//! contiguous, that are not aligned to 16 bytes, or whose sequences repeat or
//! overlap each other; queries of several sequences that do not lie one after the
//! other; and of keys and values whose sequences lie differently far apart, one
//! or both.
//!
//! ## NaN, and very negative scores
//! Keys that are hidden get the weight 0, which leaves nothing of a value that
//! is finite, but makes NaN of one that is not. What lies around a part of a
//! cache, and what other sequences hold, is not read.
//!
//! On CUDA, a query of which every product with a key it sees lies below −50000,
//! before `softmax_scale`, gets zeros; see
//! [`attention`](mod@crate::attention#very-negative-scores).
//!
//! ## What waits, and what is kept
//! Work goes to candle's own stream and nothing waits for it, with one
//! exception: cumulative lengths, block tables, ranges and slopes are read on
//! the host. As CUDA tensors they are copied back first, which waits for the
//! stream; pass them as CPU tensors where you have them.
//!
//! The first call in a thread for a stream takes a workspace of 128 MiB on the
//! device; later calls of the thread for that stream share it. The last
//! four batches are kept with their plans, so that the layers of a model plan once
//! for each step. [`release_workspaces`] gives a thread's memory back; so does
//! the end of the thread.
//!
//! The first call starts the [`FlashInferRuntime`] with the default
//! configuration, unless it is running, and may download the pinned wheel. To
//! have that done earlier, call [`FlashInferRuntime::initialize`] and
//! [`preload`](crate::FlashInferRuntime::preload) with the names of
//! [`AttentionSpec::prefill_module`].
//!
//! A call plans, so that it is refused while the stream is being captured into a
//! CUDA graph; plans of [`PagedDecode::plan_for_graph`] can be captured. There is no gradient: `backward` through
//! the result of `flash_attn` and its kin fails, and ends at those of plans.
//!
//! [`FlashInferRuntime`]: crate::FlashInferRuntime
//! [`FlashInferRuntime::initialize`]: crate::FlashInferRuntime::initialize
//! [`PosEncodingMode::Alibi`]: crate::attention::PosEncodingMode::Alibi
//! [`AttentionSpec::prefill_module`]: crate::attention::AttentionSpec::prefill_module

// Without CUDA, what launches kernels is not called.
#![cfg_attr(not(feature = "candle-cuda"), allow(dead_code))]

mod append;
mod attention;
mod capture;
mod decode;
mod flash_attn;
mod layers;
mod lse;
mod mla;
mod op;
mod paged;
mod prefill;
mod rope;
mod run;
mod step;
mod tensor;

pub use capture::capture_step;
pub use decode::{PagedDecode, PagedDecodePlan};
pub use flash_attn::{
    PagedAttentionOptions, flash_attn, flash_attn_alibi, flash_attn_alibi_windowed,
    flash_attn_alibi_windowed_softcap, flash_attn_varlen, flash_attn_varlen_alibi,
    flash_attn_varlen_alibi_windowed, flash_attn_varlen_alibi_windowed_softcap,
    flash_attn_varlen_paged_windowed, flash_attn_varlen_windowed, flash_attn_windowed, paged_attention,
    paged_attention_with_lse, release_workspaces,
};
pub use layers::{rms_norm, silu_and_mul};
pub use mla::{PagedMla, PagedMlaPlan};
pub use paged::PagedCache;
pub use prefill::{PagedPrefill, PagedPrefillPlan};
pub use rope::{PositionTable, RotaryEmbedding, TokenPositions, rope};
pub use run::PagedRunOptions;
pub use step::{Step, StepTables};

/// The examples of `docs/candle.md` compile.
#[cfg(doctest)]
#[doc = include_str!("../../docs/candle.md")]
mod documented {}
