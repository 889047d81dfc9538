//! What attention of one request writes besides its output.
//!
//! There is nothing to plan: the launchers look at the sizes of the tensors
//! and decide on their own whether several blocks divide the keys. Then each
//! block writes its part of the result to scratch memory that nobody tells
//! them the size of, and a second kernel merges the parts. So what they can
//! write at most is computed here, before each launch. Where the merge could
//! not be launched, or the launcher would fail while it decides, it is given
//! no scratch memory, which makes it leave the keys undivided.
//!
//! Source of the contract: `csrc/single_prefill.cu`, `csrc/single_decode.cu`,
//! `include/flashinfer/attention/{prefill,decode,cascade}.cuh` of FlashInfer
//! 0.6.13.

use std::ffi::c_void;

use super::{
    planned::MAX_BLOCKS_PER_SM,
    spec::{AttentionSpec, Heads},
    workspace::{Need, Workspace},
};
use crate::{
    capture, cuda::DeviceAttribute, dtype::DType, error::Result, ops::check::Check,
    runtime::FlashInferRuntime, stream::Stream, tensor::RawTensor,
};

/// The fewest keys that a launcher gives to a block.
const MIN_CHUNK: usize = 256;
/// Queries (times heads of a group) that a block of FlashAttention 2 can work on.
const FA2_TILES: [usize; 3] = [16, 64, 128];
/// With more keys, sums of positions and windows could reach 2³².
pub(super) const MAX_KEYS: usize = 1 << 30;
/// Head dimensions that the launchers' merge of parts is compiled for.
const MERGED_HEAD_DIMS: [usize; 4] = [64, 128, 256, 512];
/// The most threads of one of its blocks.
const MAX_MERGE_THREADS: usize = 1024;
/// The most blocks in the second dimension of a launch.
const MAX_GRID_Y: usize = 65535;

/// Writes what attention to no keys is.
///
/// # Safety
/// Both must be contiguous tensors on the stream's device.
pub(super) unsafe fn write_empty_states(
    stream: &Stream,
    out: &RawTensor,
    lse: Option<&RawTensor>,
) -> Result<()> {
    let cuda = FlashInferRuntime::get()?.cuda();
    [Some(out), lse].into_iter().flatten().for_each(capture::uses);
    // SAFETY: promised by the caller.
    unsafe {
        cuda.zero(stream, out.data, out.numel() as usize * out.dtype.size())?;
        lse.map_or(Ok(()), |lse| cuda.fill(stream, lse.data, f32::NEG_INFINITY, lse.numel() as usize))
    }
}

/// The scratch memory that a launcher is given: the workspace's, which has what
/// is needed, or none if nothing is. If the run is captured, a graph holds it.
pub(super) fn scratch(check: &Check<'_>, workspace: &mut Workspace, needed: usize) -> Result<RawTensor> {
    if needed == 0 {
        let device = workspace.stream().device();
        return RawTensor::new(std::ptr::null_mut::<c_void>(), device, DType::U8, &[0], None);
    }
    if !workspace.is_held() && FlashInferRuntime::get()?.cuda().is_capturing(workspace.stream())? {
        workspace.hold();
    }
    workspace.reserve(check, Need { float: needed, int: 0 })?;
    workspace.float.as_bytes()
}

/// One run, as launchers see it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SingleWork<'a> {
    pub(super) spec: &'a AttentionSpec,
    pub(super) heads: Heads,
    pub(super) rows: usize,
    pub(super) keys: usize,
}

/// What a launcher asks a GPU for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Capacity {
    multiprocessors: usize,
    /// Bytes of shared memory of each.
    shared_memory: usize,
}

impl SingleWork<'_> {
    /// The scratch memory that is needed on the stream's GPU.
    pub(super) fn on_gpu(&self, stream: &Stream, bytes: fn(&Self, Capacity) -> usize) -> Result<usize> {
        if self.keys <= MIN_CHUNK {
            return Ok(0);
        }
        let cuda = FlashInferRuntime::get()?.cuda();
        let ask = |attribute| {
            cuda.attribute(stream.ordinal(), attribute).map(|number| number.unsigned_abs() as usize)
        };
        let capacity = Capacity {
            multiprocessors: ask(DeviceAttribute::MultiprocessorCount)?,
            shared_memory: ask(DeviceAttribute::MaxSharedMemoryPerMultiprocessor)?,
        };
        Ok(bytes(self, capacity))
    }

    /// Bytes of the partial outputs of so many chunks of keys, and their LSE.
    fn bytes(&self, chunks: usize) -> usize {
        let Self { spec, heads, rows, .. } = *self;
        let row = spec.head_dim_vo * spec.dtype_o.size() + size_of::<f32>();
        chunks * rows * heads.num_qo_heads * row
    }

    /// Whether the launcher can merge chunks: a block has threads for all heads
    /// of a row, or for one head of the only row.
    fn can_merge(&self) -> bool {
        let Self { spec, heads: Heads { num_qo_heads, .. }, rows, .. } = *self;
        let width = spec.head_dim_vo;
        let vector = (16 / spec.dtype_o.size()).max(width / 32);
        MERGED_HEAD_DIMS.contains(&width)
            && num_qo_heads <= MAX_GRID_Y
            && (rows == 1 || num_qo_heads <= MAX_MERGE_THREADS / (width / vector))
    }

    /// The most bytes that FlashAttention 2 writes, 0 if it must not divide keys.
    ///
    /// It makes as many chunks as there are more blocks on the GPU at once than
    /// tiles of queries, of at least [`MIN_CHUNK`] keys. A block holds its
    /// queries in shared memory. Which tile it picks does not matter here.
    pub(super) fn fa2_scratch(&self, gpu: Capacity) -> usize {
        if !self.can_merge() {
            return 0;
        }
        let Heads { num_qo_heads, num_kv_heads } = self.heads;
        let packed = self.rows * (num_qo_heads / num_kv_heads);
        let chunks = FA2_TILES.map(|tile| {
            let queries = tile * self.spec.head_dim_qk * self.spec.dtype_q.size();
            let blocks = (gpu.shared_memory / queries).min(MAX_BLOCKS_PER_SM) * gpu.multiprocessors;
            blocks / (num_kv_heads * packed.div_ceil(tile))
        });
        match chunks.into_iter().max().unwrap_or(0).min(self.keys.div_ceil(MIN_CHUNK)) {
            // One chunk is written to the output itself.
            0 | 1 => 0,
            chunks => self.bytes(chunks),
        }
    }

    /// The most bytes that decode writes, 0 if it must not divide keys.
    ///
    /// The launcher divides the keys by the blocks that are on the GPU at once,
    /// divided by the KV heads. If that is zero, the division ends the process.
    pub(super) fn decode_scratch(&self, gpu: Capacity) -> usize {
        let num_kv_heads = self.heads.num_kv_heads;
        if num_kv_heads > gpu.multiprocessors || !self.can_merge() {
            return 0;
        }
        let blocks = MAX_BLOCKS_PER_SM * gpu.multiprocessors;
        self.bytes((blocks / num_kv_heads).min(self.keys.div_ceil(MIN_CHUNK)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: Capacity = Capacity { multiprocessors: 132, shared_memory: 228 << 10 };
    const SMALL: Capacity = Capacity { multiprocessors: 16, shared_memory: 100 << 10 };

    fn works(spec: &AttentionSpec) -> impl Iterator<Item = SingleWork<'_>> {
        let heads = [(1, 1), (8, 1), (8, 8), (32, 8), (35, 7), (128, 128), (140, 140), (65535, 65535)];
        let rows = [1, 2, 3, 15, 16, 17, 64, 65, 127, 129, 1000, 8192];
        let keys = [1, 255, 256, 257, 511, 513, 5_000, 131_072, MAX_KEYS];
        let all = heads.into_iter().flat_map(move |heads| rows.map(|rows| (heads, rows)));
        all.flat_map(move |((num_qo_heads, num_kv_heads), rows)| {
            keys.map(|keys| SingleWork { spec, heads: Heads { num_qo_heads, num_kv_heads }, rows, keys })
        })
    }

    /// Chunks of keys, as both launchers count them.
    fn chunks(keys: usize, most: usize) -> usize {
        keys.div_ceil(keys.div_ceil(most).max(256))
    }

    /// Whatever tile and occupancy the launcher of prefill comes to, what it
    /// writes fits. Workspaces of upstream's size, 32 MiB, fit an H200.
    #[test]
    fn prefill_writes_no_more_than_is_computed() {
        let mut divided = 0;
        for head_dim in [64, 128, 256] {
            let spec = AttentionSpec::new(DType::F16, head_dim);
            for (work, gpu) in works(&spec).flat_map(|work| [(work, H200), (work, SMALL)]) {
                let Heads { num_qo_heads, num_kv_heads } = work.heads;
                let bound = work.fa2_scratch(gpu);
                assert!(bound <= 32 << 20, "{work:?}: {bound}");
                // The launcher multiplies in 32 bits.
                assert!(bound == 0 || bound / 2 <= u32::MAX as usize);
                if bound == 0 && !work.can_merge() {
                    continue;
                }
                for (tile, per_sm) in
                    [16, 64, 128].into_iter().flat_map(|tile| (0..=16).map(move |n| (tile, n)))
                {
                    if per_sm * tile * head_dim * 2 > gpu.shared_memory {
                        continue;
                    }
                    let packed = work.rows * num_qo_heads / num_kv_heads;
                    let most = per_sm * gpu.multiprocessors / (num_kv_heads * packed.div_ceil(tile));
                    let count = if most > 0 { chunks(work.keys, most) } else { 0 };
                    let written =
                        if count > 1 { count * work.rows * num_qo_heads * (2 * head_dim + 4) } else { 0 };
                    assert!(written <= bound, "{work:?} on {gpu:?}: {written} of {bound}");
                    divided += usize::from(count > 1);
                }
            }
        }
        assert!(divided > 1000);
    }

    #[test]
    fn decode_writes_no_more_than_is_computed() {
        for head_dim in [64, 128, 256] {
            let spec = AttentionSpec::new(DType::BF16, head_dim);
            let decodes = works(&spec).filter(|work| work.rows == 1 && work.keys > MIN_CHUNK);
            for (work, gpu) in decodes.flat_map(|work| [(work, H200), (work, SMALL)]) {
                let Heads { num_qo_heads, num_kv_heads } = work.heads;
                let bound = work.decode_scratch(gpu);
                // With no scratch memory, nothing is divided. Else the launcher
                // must not divide by zero, with even one block on each.
                assert_eq!(bound == 0, gpu.multiprocessors / num_kv_heads == 0, "{work:?}");
                for per_sm in (1..=MAX_BLOCKS_PER_SM).filter(|_| bound > 0) {
                    let count = chunks(work.keys, per_sm * gpu.multiprocessors / num_kv_heads);
                    let written = count * num_qo_heads * (2 * head_dim + 4);
                    assert!(written <= bound, "{work:?} on {gpu:?}: {written} of {bound}");
                }
            }
        }
    }

    /// Several rows are merged by blocks with a thread for each part of a row's
    /// heads, of which there may be too many.
    #[test]
    fn keys_stay_together_where_parts_cannot_be_merged() {
        let needs = |head_dim, heads, rows| {
            let spec = AttentionSpec::new(DType::F16, head_dim);
            let heads = Heads::new(heads, 1);
            SingleWork { spec: &spec, heads, rows, keys: 100_000 }.fa2_scratch(H200)
        };
        for (head_dim, most) in [(64, 128), (128, 64), (256, 32)] {
            assert!(needs(head_dim, most, 2) > 0 && needs(head_dim, most + 1, 1) > 0);
            assert_eq!(needs(head_dim, most + 1, 2), 0);
        }
        // There is no such merge.
        assert_eq!(needs(96, 8, 1), 0);
    }
}
