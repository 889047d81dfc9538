//! Attention over paged KV caches, with plan and run apart.
//!
//! [`AttentionSpec`] selects a module; [`BatchDecode::new`] resolves it once.
//! [`BatchDecode::plan`] looks at a step's page table on the host and prepares
//! the [`Workspace`]; [`DecodePlan::run`] is then called for each layer. A
//! plan borrows its workspace and its page table, so that neither can change
//! or go away under it.
//!
//! [`BatchAttention`] does the same for batches of prefill and decode together,
//! [`BatchMla`] for multi-head latent attention, selected by [`MlaSpec`].
//!
//! [`MultiLevelCascade`] attends once to pages that requests share.
//! [`SinglePrefill`] and [`SingleDecode`] attend to the keys of one request,
//! which are plain tensors. They need no plan.
//!
//! A query that sees no key gets an output of zeros and an LSE of −∞, the state
//! that is neutral in every [merge](mod@crate::cascade).
//!
//! # Very negative scores
//!
//! Kernels of FlashInfer 0.6.13 have −50000 in place of −∞. Scores are right if
//! for each query one of them lies above it, both as the product of query and
//! key, before `sm_scale`, and as it counts, times `sm_scale` and log₂e. Where
//! all scores of a query lie below, it is as if it saw no key:
//!
//! - The product decides on tensor cores: [`BatchPrefill`], [`SinglePrefill`],
//!   [`BatchAttention`], [`BatchMla`], [`MultiLevelCascade`], and
//!   [`BatchDecode`] with [`Backend::Fa2`] or [`Backend::Fa3`]. The output is
//!   zeros, and the LSE says nothing: about −50000, with FlashAttention 3 that
//!   times `sm_scale` and log₂e, in latent attention −50000 or −∞. FlashAttention
//!   3, but for latent attention, is right nevertheless where the keys that a
//!   query sees fill whole tiles. With a soft cap, products are capped first, so
//!   that none is as low. With ALiBi the product counts times `sm_scale`, and with
//!   the slope's part.
//! - What counts decides on CUDA cores ([`SingleDecode`], and [`BatchDecode`]
//!   with [`Backend::CudaCores`]), and everywhere where a request's keys are
//!   divided among blocks, whose results then are merged. The output is zeros,
//!   or, within 24 of −50000, nearer to zero than it should be.
//!
//! The numbers lie on the device, so nothing is refused. Kernels of FlashInfer
//! 0.7 have −∞.

mod batch_attention;
mod batch_attention_work;
mod batch_run;
mod cascade;
mod decode;
mod decode_need;
mod empty_states;
mod keys_apart;
mod mask;
mod mla;
mod mla_spec;
mod mla_work;
mod modules;
mod options;
mod output_scale;
mod paged_batch;
mod planned;
mod prefill;
mod prefill_batch;
mod prefill_functions;
mod prefill_kernels;
mod published;
mod resolve;
mod single_decode;
mod single_prefill;
mod single_scratch;
mod spec;
#[cfg(test)]
mod testing;
mod workspace;

pub use batch_attention::{BatchAttention, BatchAttentionPlan};
pub use cascade::{CascadePlan, CascadeReplayKey, CascadeWorkspace, MultiLevelCascade};
pub use decode::{BatchDecode, DecodePlan};
pub use mask::Mask;
pub use mla::{BatchMla, MlaPlan, MlaQuery};
pub use mla_spec::MlaSpec;
pub use options::{PlanOptions, PrefillRunOptions, RunOptions, Split};
pub use paged_batch::PagedBatch;
pub use planned::ReplayKey;
pub use prefill::{BatchPrefill, PrefillPlan};
pub use single_decode::SingleDecode;
pub use single_prefill::SinglePrefill;
pub use spec::{AttentionSpec, Backend, Heads, PosEncodingMode};
pub use workspace::Workspace;
pub(crate) use {
    batch_run::BatchRun,
    mask::MaskKind,
    mla::{MlaRun, check_mla_plan, check_mla_spec},
    single_decode::{check_single_decode, check_single_decode_spec},
    single_prefill::check_single_prefill,
};

use crate::ffi::Signature;

/// The functions of all attention modules, each with a pattern of the modules
/// that export it.
pub(super) fn signatures() -> Vec<(&'static str, &'static [Signature])> {
    [
        decode::SIGNATURES,
        prefill_functions::SIGNATURES,
        batch_attention::SIGNATURES,
        mla::SIGNATURES,
        single_prefill::SIGNATURES,
        single_decode::SIGNATURES,
    ]
    .concat()
}
