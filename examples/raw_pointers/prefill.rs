//! Prefill: prompts, or parts of them, through all layers.

use flashinfer_rs::{
    Result, Stream,
    attention::{AttentionSpec, BatchPrefill, Heads, PagedBatch, PlanOptions, Workspace},
};

use crate::decode::Layer;

/// As a `DecodeKind`.
pub struct PrefillKind {
    pub prefill: BatchPrefill,
    pub workspace: Workspace,
}

impl PrefillKind {
    pub fn new(stream: &Stream, spec: &AttentionSpec, heads: Heads) -> Result<Self> {
        Ok(Self { prefill: BatchPrefill::new(stream, spec, heads)?, workspace: Workspace::new(stream)? })
    }
}

/// Causal attention of new tokens, the last of each request, to all tokens of their requests: of
/// whole prompts, of parts of prompts, and of requests without new tokens in between.
///
/// # Safety
/// As [`decode`](crate::decode::decode).
pub unsafe fn prefill(kinds: &mut [PrefillKind], batch: PagedBatch<'_>, layers: &[Layer]) -> Result<()> {
    let (options, mut plans) = (PlanOptions::causal(), Vec::new());
    for PrefillKind { prefill, workspace } in kinds {
        plans.push(prefill.plan_paged(workspace, batch, &options)?);
    }
    layers.iter().try_for_each(|layer| {
        // SAFETY: promised by the caller.
        let (q, cache, mut out) = unsafe { (layer.q.read()?, layer.cache.read()?, layer.out.write()?) };
        plans[layer.kind].run(&q, &cache, &mut out)
    })
}
