//! The functions that select by clusters of blocks. They are declared so that a change of the
//! wheel is seen, and not called.

use crate::ffi::{ArgKind, Signature};

pub(super) const CLUSTERS: &[Signature] = &[Signature {
    function: "fast_topk_clusters_exact",
    since: "0.6.13",
    args: &[
        ("logits", ArgKind::Tensor),
        ("indices", ArgKind::Tensor),
        ("output_values", ArgKind::OptTensor),
        ("histogram", ArgKind::OptTensor),
        ("cached_overflow", ArgKind::Tensor),
        ("top_k", ArgKind::Int),
        ("num_cached", ArgKind::Int),
        ("num_clusters", ArgKind::Int),
        ("pdl_enabled", ArgKind::Bool),
    ],
    result: "void",
}];

pub(super) const CLUSTERS_PAGE_TABLE_TRANSFORM: &[Signature] = &[Signature {
    function: "fast_topk_clusters_exact_page_table_transform",
    since: "0.6.13",
    args: &[
        ("logits", ArgKind::Tensor),
        ("indices", ArgKind::Tensor),
        ("seq_lens", ArgKind::Tensor),
        ("page_table", ArgKind::Tensor),
        ("histogram", ArgKind::OptTensor),
        ("cached_overflow", ArgKind::Tensor),
        ("top_k", ArgKind::Int),
        ("num_cached", ArgKind::Int),
        ("num_clusters", ArgKind::Int),
        ("pdl_enabled", ArgKind::Bool),
    ],
    result: "void",
}];

/// It takes offsets where the other takes a page table.
pub(super) const CLUSTERS_RAGGED_TRANSFORM: &[Signature] = &[Signature {
    function: "fast_topk_clusters_exact_ragged_transform",
    ..CLUSTERS_PAGE_TABLE_TRANSFORM[0]
}];
