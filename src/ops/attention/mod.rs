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

mod cascade;
mod decode;
mod mask;
mod mla;
mod options;
mod output_scale;
mod persistent;
mod plan;
mod prefill;
mod single;
mod spec;
mod workspace;

pub use cascade::{
    CascadeLevel, CascadeOptions, CascadePlan, CascadeReplayKey, CascadeWorkspace, MultiLevelCascade,
};
pub use decode::{BatchDecode, DecodePlan};
pub use mask::Mask;
pub use mla::{BatchMla, MlaBatch, MlaCache, MlaOptions, MlaPlan, MlaQuery, MlaSpec};
pub use options::RunOptions;
pub use persistent::{BatchAttention, BatchAttentionOptions, BatchAttentionPlan};
pub use plan::{Heads, PlanMode, ReplayKey};
pub use prefill::{BatchPrefill, PrefillOptions, PrefillPlan};
pub use single::{SingleDecode, SinglePrefill};
pub use spec::{AttentionSpec, Backend, PosEncodingMode};
pub use workspace::Workspace;

use crate::ffi::Signature;

/// The functions of all attention modules, each with a pattern of the modules
/// that export it.
pub(super) fn signatures() -> Vec<(&'static str, Signature)> {
    [decode::SIGNATURES, prefill::SIGNATURES, persistent::SIGNATURES, mla::SIGNATURES, single::SIGNATURES]
        .concat()
}
