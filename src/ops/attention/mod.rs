//! Attention over paged KV caches, with plan and run apart.
//!
//! [`AttentionSpec`] selects a module; [`BatchDecode::new`] resolves it once.
//! [`BatchDecode::plan`] looks at a step's page table on the host and prepares
//! the [`Workspace`]; [`DecodePlan::run`] is then called for each layer. A
//! plan borrows its workspace and its page table, so that neither can change
//! or go away under it.

mod decode;
mod plan;
mod spec;
mod workspace;

pub use decode::{BatchDecode, DecodeOptions, DecodePlan, Heads};
pub use plan::{PlanMode, ReplayKey};
pub use spec::AttentionSpec;
pub use workspace::Workspace;

pub(super) use decode::SIGNATURES;
