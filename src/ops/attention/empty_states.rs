//! The LSE of queries that see no key.
//!
//! Kernels of 0.6.13 begin with −50000 as the largest logit, and leave about
//! that as the LSE of such a query, beside its output of zeros. A number is not
//! neutral in a merge: a state with a smaller LSE vanishes beside it. So where
//! an LSE is asked for and such queries are possible, a kernel of this crate
//! writes −∞ afterwards. It goes by the index arrays on the device, and so is
//! right for whatever a captured graph finds there.

use std::ffi::c_void;

use super::{mask::MaskTensors, planned::PlanInfo};
use crate::{
    cuda::PtxKernel,
    error::Result,
    ops::check::Check,
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorRef},
};

const PTX: &str = concat!(include_str!("empty_states.ptx"), "\0");
static BY_ROWS: PtxKernel = PtxKernel::new(PTX, c"empty_states");
static BY_WORKS: PtxKernel = PtxKernel::new(PTX, c"empty_works");

const THREADS: u32 = 256;
/// Threads for each row.
const WARP: u32 = 32;
/// Blocks that go through the work items of a mixed batch.
const WORK_BLOCKS: u32 = 264;

/// Whether a run may meet queries that see no key, for all that its plan
/// knows: whatever the tables hold when a graph is replayed, and whatever the
/// bits of a mask are.
pub(super) fn possible(
    for_graph: bool,
    mask: &MaskTensors,
    requests: impl IntoIterator<Item = (usize, usize)>,
) -> bool {
    for_graph || mask.custom.is_some() || requests.into_iter().any(|(queries, keys)| queries > 0 && keys == 0)
}

/// Has the kernels compiled, which a capture does not allow.
pub(super) fn prepare() -> Result<()> {
    let cuda = FlashInferRuntime::get()?.cuda();
    BY_ROWS.load(cuda)?;
    BY_WORKS.load(cuda).map(drop)
}

/// As [`prepare`], for a run that has no plan.
pub(super) fn check_ready(check: &Check<'_>, stream: &Stream) -> Result<()> {
    if !BY_ROWS.is_loaded() && FlashInferRuntime::get()?.cuda().is_capturing(stream)? {
        return check.fail(
            "lse",
            "the kernel that marks queries which see no key has to be compiled first; run once with a custom \
             mask and an LSE before the capture"
                .into(),
        );
    }
    prepare()
}

/// The keys of each request, as index arrays on the device say.
pub(super) enum KeyLengths<'a> {
    Paged {
        indptr: &'a RawTensor,
        last_page_len: &'a RawTensor,
        page_size: usize,
    },
    Ragged {
        indptr: &'a RawTensor,
    },
    /// Those of the only request.
    One(usize),
}

/// The queries of a run, and what they see.
pub(super) struct EmptyRows<'a> {
    pub(super) keys: KeyLengths<'a>,
    /// Offsets of queries; without them, each request has one, or the only
    /// request has all.
    pub(super) qo_indptr: Option<&'a RawTensor>,
    pub(super) batch: usize,
    pub(super) mask: &'a MaskTensors,
    pub(super) window_left: i64,
    pub(super) sinks: Option<&'a TensorRef<'a>>,
}

impl EmptyRows<'_> {
    /// Enqueues the writing of −∞, or of the sink, as the LSE of each row that
    /// sees no key.
    ///
    /// # Safety
    /// All tensors must have been checked for this batch, and the kernels be
    /// prepared.
    pub(super) unsafe fn mark(&self, stream: &Stream, lse: &RawTensor) -> Result<()> {
        let (rows, heads) = (lse.shape()[0] as u32, lse.shape()[1] as u32);
        if rows == 0 {
            return Ok(());
        }
        let address = |tensor: Option<&RawTensor>| tensor.map_or(0, |tensor| tensor.data as u64);
        let (indptr, last_page_len, page_size, keys) = match self.keys {
            KeyLengths::Paged { indptr, last_page_len, page_size } => {
                (Some(indptr), Some(last_page_len), page_size as u32, 0)
            }
            KeyLengths::Ragged { indptr } => (Some(indptr), None, 1, 0),
            KeyLengths::One(keys) => (None, None, 1, keys as u32),
        };
        let [bits, mask_indptr] = [0, 1].map(|at| self.mask.custom.as_ref().map(|mask| &mask[at]));
        let sinks = self.sinks.map(|sinks| &sinks.raw);
        let tensors = [Some(lse), self.qo_indptr, indptr, last_page_len, bits, mask_indptr, sinks];
        let wide = tensors.map(address);
        let narrow = [rows, self.batch as u32, heads, page_size, keys, self.window_left as i32 as u32];
        let blocks = rows.div_ceil(THREADS / WARP);
        // SAFETY: promised by the caller; the kernel takes 7 addresses and 6
        // numbers of 32 bits, and writes to rows of the LSE only.
        unsafe { launch(&BY_ROWS, stream, blocks, &tensors, wide, narrow) }
    }
}

/// As [`EmptyRows::mark`], for a mixed batch, by the planner's arrays of work items.
///
/// # Safety
/// `info` must be of a plan of `BatchAttention` that is in `int`, the LSE have
/// been checked for it, and the kernels be prepared.
pub(super) unsafe fn mark_works(
    stream: &Stream,
    lse: &RawTensor,
    int: &RawTensor,
    info: &PlanInfo,
) -> Result<()> {
    // The numbers of blocks, then for each of two kinds of tile where its
    // arrays are: q_indptr, kv_indptr, partial_indptr, q_len, kv_len, q_start,
    // kv_start, kv_end, kv_head, and where each block's items start, which ends
    // with their number.
    for tile in 0..2 {
        let array = |at: usize| (int.data as u64).wrapping_add(info.numbers[2 + 10 * tile + at] as u64);
        let count = array(9).wrapping_add(4 * info.numbers[1] as u64);
        let wide = [lse.data as u64, array(0), array(3), array(4), array(5), array(8), count];
        // SAFETY: promised by the caller; the kernel takes 7 addresses and a
        // number of 32 bits, and writes to rows of the batch's queries only.
        unsafe {
            launch(&BY_WORKS, stream, WORK_BLOCKS, &[Some(lse), Some(int)], wide, [lse.shape()[1] as u32])?
        };
    }
    Ok(())
}

/// # Safety
/// The kernel takes these addresses, then these numbers, and what it assumes
/// of them holds.
unsafe fn launch<const NUMBERS: usize>(
    kernel: &PtxKernel,
    stream: &Stream,
    blocks: u32,
    tensors: &[Option<&RawTensor>],
    mut wide: [u64; 7],
    mut narrow: [u32; NUMBERS],
) -> Result<()> {
    let mut args = [std::ptr::null_mut::<c_void>(); 13];
    let sources = wide.iter_mut().map(|number| (&raw mut *number).cast());
    let sources = sources.chain(narrow.iter_mut().map(|number| (&raw mut *number).cast()));
    args.iter_mut().zip(sources).for_each(|(arg, source)| *arg = source);
    let cuda = FlashInferRuntime::get()?.cuda();
    // SAFETY: promised by the caller.
    unsafe { kernel.launch(cuda, stream, [blocks, THREADS], &mut args, tensors) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launch_more_only_where_queries_may_see_nothing() {
        let none = &MaskTensors::NONE;
        assert!(!possible(false, none, []));
        assert!(!possible(false, none, [(1, 1), (0, 0), (7, 3)]));
        assert!(possible(false, none, [(1, 1), (1, 0)]));
        assert!(possible(true, none, [(1, 1)]));
    }
}
