//! A decode step that is captured into a CUDA graph, and launched for each token.

use flashinfer_rs::{
    PageTable, Result, Stream,
    attention::{DecodePlan, PlanOptions},
    graph::CapturedStep,
    indices::SlotMapping,
};

use crate::{
    append::append,
    decode::{DecodeKind, Layer},
    views::Rows,
};

/// Plans whose launches stay the same for any lengths of as many requests.
fn plans<'p>(kinds: &'p mut [DecodeKind], table: &'p PageTable) -> Result<Vec<DecodePlan<'p>>> {
    let options = PlanOptions::default().with_graph(table.host().batch_size());
    let plan = |DecodeKind { decode, workspace }: &'p mut DecodeKind| decode.plan(workspace, table, &options);
    kinds.iter_mut().map(plan).collect()
}

/// Computes the step once, and captures it: new keys and values, and attention, of all layers.
///
/// # Safety
/// As [`append`] and [`decode`](crate::decode::decode), and the memory stays as long as the step: no
/// value of this crate owns it, so nothing keeps it alive.
pub unsafe fn capture(
    stream: &Stream,
    kinds: &mut [DecodeKind],
    slots: &SlotMapping<'_>,
    layers: &[(Layer, [Rows; 2])],
) -> Result<CapturedStep> {
    let plans = plans(kinds, slots.pages)?;
    let step = || {
        layers.iter().try_for_each(|(layer, new)| {
            // SAFETY: promised by the caller.
            let (q, cache, mut out) = unsafe {
                append(stream, *new, slots, layer.cache)?;
                (layer.q.read()?, layer.cache.read()?, layer.out.write()?)
            };
            plans[layer.kind].run(&q, &cache, &mut out)
        })
    };
    step()?; // warm-up: loads the kernels, which a capture may not allow
    // SAFETY: all memory that the work uses stays as long as the step.
    unsafe { CapturedStep::capture_unchecked(stream, step) }
}

/// The step of the lengths that the table has now. New rows are in the memory that was captured.
pub fn launch(step: &CapturedStep, kinds: &mut [DecodeKind], table: &PageTable) -> Result<()> {
    step.launch(&plans(kinds, table)?[..])
}
