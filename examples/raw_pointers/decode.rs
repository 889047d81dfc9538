//! A decode step: one query of each request, through all layers.

use flashinfer_rs::{
    PageIndices, PageTable, Result, Stream,
    attention::{AttentionSpec, BatchDecode, Heads, PlanOptions, Workspace},
};

use crate::views::{LayerCache, Rows};

/// Layers of one head dimension and one window, which share a plan.
///
/// Made once. A kind has scratch memory of its own, because the plans of all kinds are in use at once.
pub struct DecodeKind {
    pub decode: BatchDecode,
    pub workspace: Workspace,
}

impl DecodeKind {
    pub fn new(stream: &Stream, spec: &AttentionSpec, heads: Heads) -> Result<Self> {
        Ok(Self { decode: BatchDecode::new(stream, spec, heads)?, workspace: Workspace::new(stream)? })
    }
}

/// What attention of one layer reads and writes.
#[derive(Clone, Copy)]
pub struct Layer {
    /// Its place among the kinds.
    pub kind: usize,
    pub q: Rows,
    pub cache: LayerCache,
    pub out: Rows,
}

/// Plans on the host once for each kind, and runs each layer by the plan of its kind.
///
/// # Safety
/// All memory is on the table's device, as large as shapes and strides say, and stays until the
/// stream is done. Nobody else uses `out` meanwhile, or writes the rest.
pub unsafe fn decode(kinds: &mut [DecodeKind], table: &PageTable, layers: &[Layer]) -> Result<()> {
    let (options, mut plans) = (PlanOptions::default(), Vec::new());
    for DecodeKind { decode, workspace } in kinds {
        plans.push(decode.plan(workspace, table, &options)?);
    }
    layers.iter().try_for_each(|layer| {
        // SAFETY: promised by the caller.
        let (q, cache, mut out) = unsafe { (layer.q.read()?, layer.cache.read()?, layer.out.write()?) };
        plans[layer.kind].run(&q, &cache, &mut out)
    })
}

/// A block table that the engine keeps on the device: `indptr`, `indices` and `last_page_len`, as
/// FlashInfer has them, `i32` each.
///
/// The host's copy is what plans are made from and what calls are checked against. Where there are no
/// such arrays yet, `PageTable::new(stream, host)` uploads them.
///
/// # Safety
/// As [`PageTable::from_device_unchecked`]: the arrays hold the numbers of `host`.
pub unsafe fn device_table(
    stream: &Stream,
    host: PageIndices,
    [indptr, indices, last_page_len]: [*const i32; 3],
) -> PageTable {
    // SAFETY: promised by the caller.
    unsafe { PageTable::from_device_unchecked(stream, host, indptr, indices, last_page_len) }
}
