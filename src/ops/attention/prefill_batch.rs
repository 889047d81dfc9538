//! What a plan of batch prefill is made from, and what its planners take of a
//! workspace for it.

use std::borrow::Cow;

use super::{
    options::Split,
    planned::LEAST_CHUNK,
    spec::{AttentionSpec, Heads},
    workspace::{Need, arrays},
};

/// Blocks per multiprocessor that FlashAttention 2 plans for.
const FA2_BLOCKS_PER_SM: usize = 2;

/// What a plan is made from. With owned arrays, it is what a workspace keeps
/// of its last plan.
#[derive(Clone, PartialEq)]
pub(super) struct PrefillBatch<'a> {
    /// Query offsets of `batch + 1` entries.
    pub(super) qo_indptr: Cow<'a, [i32]>,
    /// Offsets of pages, or of tokens with a page size of 1.
    pub(super) kv_indptr: Cow<'a, [i32]>,
    /// Tokens of each request.
    pub(super) kv_lens: Cow<'a, [i32]>,
    pub(super) shape: BatchShape,
}

/// What a plan is made from besides index arrays.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct BatchShape {
    pub(super) page_size: usize,
    pub(super) heads: Heads,
    pub(super) causal: bool,
    /// Rows of the tensors: those of the batch, or the fixed maximum of a graph.
    pub(super) rows: usize,
    /// Each request has one query, as in decode.
    pub(super) one_query_each: bool,
    pub(super) cuda_graph: bool,
    /// Only FlashAttention 2 reads it.
    pub(super) split: Split,
}

impl BatchShape {
    /// Whether the planner is to plan a launch for as much work as any batch of this shape
    /// can have. Undivided requests of one query are as much work whatever their lengths:
    /// a graph can do without blocks for more.
    pub(super) fn is_padded(&self) -> bool {
        self.cuda_graph && !(self.one_query_each && self.split.disable_split_kv)
    }
}

impl PrefillBatch<'_> {
    /// The same with arrays of its own.
    pub(super) fn into_owned(self) -> PrefillBatch<'static> {
        let own = |array: Cow<'_, [i32]>| Cow::Owned(array.into_owned());
        PrefillBatch {
            qo_indptr: own(self.qo_indptr),
            kv_indptr: own(self.kv_indptr),
            kv_lens: own(self.kv_lens),
            shape: self.shape,
        }
    }
}

/// Whether keys must not be divided. For a window without a causal mask, the
/// planner takes the keys of the last query for those of all, and would leave out
/// keys of the others.
pub(super) fn must_stay_whole(spec: &AttentionSpec, batch: &PrefillBatch<'_>) -> bool {
    let several = || {
        batch.shape.cuda_graph && batch.shape.rows > batch.kv_lens.len()
            || batch.qo_indptr.windows(2).any(|pair| pair[1] - pair[0] > 1)
    };
    spec.window_left.is_some() && !batch.shape.causal && several()
}

/// How a planner of FlashAttention 2 allocates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fa2Planner {
    /// Partial results of all rows of tiles, times the heads of a group that tiles hold;
    /// flags where keys are divided. FlashInfer 0.6.13.
    WholeTiles,
    /// Partial results of as many rows as tiles hold; flags for graphs. FlashInfer 0.7.4.
    Rows,
}

/// What the planner of FlashAttention 2 takes for a batch that is not empty, on a
/// GPU of so many multiprocessors and major compute capability.
///
/// Work is a tile of queries (times heads of a group) and a chunk of keys. For a
/// graph there is as much as any batch of its size can have. Each has three indices
/// and may have a flag, and, if keys are divided, for each head of each row an output
/// and its sum.
pub(super) fn fa2_need(
    spec: &AttentionSpec,
    batch: &PrefillBatch<'_>,
    no_split: bool,
    multiprocessors: usize,
    major: i32,
    planner: Fa2Planner,
) -> Need {
    let Heads { num_qo_heads, num_kv_heads } = batch.shape.heads;
    let (group, requests, rows) = (num_qo_heads / num_kv_heads, batch.kv_lens.len(), batch.shape.rows);
    let blocks = (FA2_BLOCKS_PER_SM * multiprocessors).saturating_sub(batch.shape.split.num_colocated_ctas);
    let most = blocks / num_kv_heads;
    // Of the longest request that there can be, or of the mean one.
    let padded = batch.shape.is_padded();
    let length = if padded { (rows - requests + 1) * group } else { rows * group / requests };
    let tile = match length {
        65.. if spec.head_dim_vo < 256 => 128,
        17.. => 64,
        _ if major < 8 => 64,
        _ => 16,
    };
    let (divided, work) = if padded {
        (!no_split, most.max((rows * group).div_ceil(tile) + requests - 1))
    } else {
        fa2_work(spec, batch, no_split, tile, most)
    };
    let ints = |count: usize| count * size_of::<i32>();
    let indices = [ints(work), ints(work), ints(work), ints(requests + 2)];
    let indices = indices.into_iter().chain(padded.then_some(ints(1)));
    let offsets_to_merge = divided.then_some(ints(rows + 1));
    let (has_flags, partial_rows) = match planner {
        Fa2Planner::WholeTiles => (divided, work * tile),
        Fa2Planner::Rows => (padded, (work * tile).div_ceil(group)),
    };
    let flags = has_flags.then_some(work);
    let sums = num_qo_heads * partial_rows * size_of::<f32>();
    Need {
        float: if divided { arrays([sums * spec.head_dim_vo, sums]) } else { 0 }
            .max(stand_in_bytes(spec, batch)),
        int: arrays(indices.chain(offsets_to_merge).chain(flags)),
    }
}

/// Whether the planner of FlashAttention 2 divides keys for one launch, and the
/// work that it comes to: in chunks of the size that is asked for, else in the
/// smallest of which there are no more than `most`.
fn fa2_work(
    spec: &AttentionSpec,
    batch: &PrefillBatch<'_>,
    no_split: bool,
    tile: usize,
    most: usize,
) -> (bool, usize) {
    let group = batch.shape.heads.num_qo_heads / batch.shape.heads.num_kv_heads;
    let seen = spec.window_left.map(|window| (window as usize + tile).div_ceil(batch.shape.page_size));
    // Divisions are what this costs: by the size of a tile, a power of two, there is none.
    let tiles_of = |queries: usize| (queries * group + tile - 1) >> tile.trailing_zeros();
    let requests = || {
        batch.qo_indptr.windows(2).zip(batch.kv_indptr.windows(2)).map(|(queries, pages)| {
            let pages = (pages[1] - pages[0]) as usize;
            let tiles = tiles_of((queries[1] - queries[0]) as usize);
            (tiles, seen.map_or(pages, |seen| seen.min(pages)).max(1))
        })
    };
    let work = |chunk: usize| requests().map(|(tiles, pages)| tiles * pages.div_ceil(chunk)).sum();
    let (undivided, longest) =
        requests().fold((0, 1), |(sum, longest), (tiles, pages)| (sum + tiles, pages.max(longest)));
    if let Some(chunk) = batch.shape.split.fixed_split_size.filter(|_| !no_split) {
        return (chunk < longest, work(chunk));
    }
    let (mut low, mut high) = ((LEAST_CHUNK / batch.shape.page_size).max(1), longest);
    if no_split || low >= high || undivided > most {
        return (false, undivided);
    }
    while low < high {
        let middle = (low + high) / 2;
        if work(middle) > most {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    (low < longest, work(low))
}

/// What the planner of FlashAttention 3 takes for a batch that is not empty:
/// seven numbers for each tile of each head, and an offset for each
/// multiprocessor. Of many tiles, all heads take the same.
pub(super) fn fa3_need(spec: &AttentionSpec, batch: &PrefillBatch<'_>, multiprocessors: usize) -> Need {
    let tile = if spec.head_dim_vo == 64 { 192 } else { 128 };
    let most = batch.shape.rows.div_ceil(tile) + batch.kv_lens.len() - 1;
    let heads = if most > 4096 { 1 } else { batch.shape.heads.num_qo_heads };
    let queries = batch.qo_indptr.windows(2).map(|pair| (pair[1] - pair[0]) as usize);
    let tiles = if batch.shape.cuda_graph {
        most
    } else {
        queries.map(|queries| queries.div_ceil(tile)).sum::<usize>()
    };
    let each = tiles * heads * size_of::<i32>();
    let offsets = (multiprocessors + 1) * size_of::<i32>();
    Need {
        float: stand_in_bytes(spec, batch),
        int: arrays([each, each, each, each, each, each, offsets, each]),
    }
}

/// Bytes that stand for the keys of a batch that has none: an empty tensor
/// cannot be described to the hardware that copies tiles.
fn stand_in_bytes(spec: &AttentionSpec, batch: &PrefillBatch<'_>) -> usize {
    let row = stand_in_width(spec) * spec.dtype_kv.size();
    if batch.kv_indptr.last() == Some(&0) { batch.shape.heads.num_kv_heads * row } else { 0 }
}

/// Elements of a head in keys, and in values, that stand for none.
pub(super) fn stand_in_width(spec: &AttentionSpec) -> usize {
    spec.head_dim_qk.max(spec.head_dim_vo).next_multiple_of(8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    /// An H200's multiprocessors and major compute capability.
    const H200: (usize, i32) = (132, 9);
    const BY_ITSELF: Split = Split::beside(0);
    const HEADS: Heads = Heads::new(32, 8);
    const PAGE_SIZE: usize = 16;

    /// Calls with the batch of requests with these queries and pages.
    fn with_batch<R>(
        requests: &[(i32, i32)],
        graph: Option<usize>,
        split: Split,
        use_batch: impl FnOnce(&PrefillBatch<'_>) -> R,
    ) -> R {
        let (mut queries, mut pages) = (vec![0], vec![0]);
        for (at, request) in requests.iter().enumerate() {
            queries.push(queries[at] + request.0);
            pages.push(pages[at] + request.1);
        }
        let kv_lens: Vec<i32> = requests.iter().map(|request| request.1 * PAGE_SIZE as i32).collect();
        use_batch(&PrefillBatch {
            qo_indptr: (&queries).into(),
            kv_indptr: (&pages).into(),
            kv_lens: (&kv_lens).into(),
            shape: BatchShape {
                page_size: PAGE_SIZE,
                heads: HEADS,
                causal: false,
                rows: graph.unwrap_or(queries[requests.len()] as usize),
                one_query_each: false,
                cuda_graph: graph.is_some(),
                split,
            },
        })
    }

    fn fa2(spec: &AttentionSpec, requests: &[(i32, i32)], graph: Option<usize>) -> Need {
        fa2_split(spec, requests, graph, BY_ITSELF)
    }

    fn fa2_split(spec: &AttentionSpec, requests: &[(i32, i32)], graph: Option<usize>, split: Split) -> Need {
        with_batch(requests, graph, split, |batch| {
            let no_split = must_stay_whole(spec, batch) || split.disable_split_kv;
            fa2_need(spec, batch, no_split, H200.0, H200.1, Fa2Planner::WholeTiles)
        })
    }

    /// By hand, as `PrefillPlanImpl` of 0.7.4 allocates.
    #[test]
    fn sizes_are_those_of_later_planners() {
        let spec = AttentionSpec::new(DType::BF16, 128);
        let need = |requests: &[(i32, i32)], graph, split: Split| {
            with_batch(requests, graph, split, |batch| {
                fa2_need(&spec, batch, split.disable_split_kv, H200.0, H200.1, Fa2Planner::Rows)
            })
        };
        // 639 tiles of 16, for groups of four heads; outputs, then sums.
        let float = |work: usize| 32 * (work * 16).div_ceil(4) * (128 + 1) * 4;
        let graph = need(&[(1, 1); 512], Some(512), BY_ITSELF);
        assert_eq!(graph, Need { float: float(639), int: 12_463 });
        // Without a graph there are no flags behind the offsets to merge by.
        let fixed = need(&[(1, 1000), (1, 20)], None, Split::fixed(100));
        assert_eq!(fixed, Need { float: float(11), int: 3 * 48 + 16 + 16 - 4 });
        // With one there are, also where nothing is divided.
        let whole = need(&[(1, 1000); 3], Some(3), Split::disabled());
        assert_eq!(whole, Need { float: 0, int: 144 + 144 + 144 + 32 + 16 + 33 });
    }

    /// By hand, as `PrefillPlan` allocates.
    #[test]
    fn sizes_are_those_of_flash_attention_2() {
        let spec = AttentionSpec::new(DType::BF16, 128);
        // 128 tiles of 16 and 511 of other requests, all for a graph: 639.
        let need = fa2(&spec, &[(1, 1); 512], Some(512));
        assert_eq!(need, Need { float: 167_510_016 + 1_308_672, int: 12_463 });
        // Of the lengths nothing of it depends.
        assert_eq!(fa2(&spec, &[(1, 400); 512], Some(512)), need);
        assert_eq!(fa2(&spec, &[(0, 0); 512], Some(512)), need);
        // A lone request of that graph would fill tiles of 128: 17 of them, but
        // 264 blocks have 8 KV heads each 33 tiles.
        let float = |work: usize, tile: usize| 32 * work * tile * (128 + 1) * 4;
        let one = fa2(&spec, &[(1, 1)], Some(512));
        assert_eq!(one, Need { float: float(33, 128), int: 2528 + 33 });
        // More tiles than blocks at once: nothing is divided.
        let long = fa2(&spec, &[(4096, 256)], None);
        assert_eq!(long, Need { float: 0, int: 3 * 128 * 4 + 4 * 3 });
        // One query, 1000 pages: 33 chunks of 31 pages.
        let decode = fa2(&spec, &[(1, 1000)], None);
        assert_eq!(decode, Need { float: float(33, 16), int: 464 + 33 });
        // No chunks of less than 8 pages.
        assert_eq!(fa2(&spec, &[(1, 20)], None).float, float(3, 16));
        assert_eq!(fa2(&spec, &[(1, 8)], None).float, 0);
        // The mean request decides on the tile, and that is 16 for up to four queries.
        assert_eq!(fa2(&spec, &[(4, 20)], None).float, float(3, 16));
        assert_eq!(fa2(&spec, &[(5, 20)], None).float, float(3, 64));
        assert_eq!(fa2(&spec, &[(16, 20), (0, 0)], None).float, float(3, 64));
        assert_eq!(fa2(&spec, &[(17, 20)], None).float, float(3, 128));
        let wide = AttentionSpec::new(DType::BF16, 256);
        assert_eq!(fa2(&wide, &[(17, 20)], None).float, 32 * 2 * 3 * 64 * (256 + 1) * 4);
        // 100 keys and a tile of 16 are 8 pages.
        assert_eq!(fa2(&spec.with_window_left(100), &[(1, 1000)], None).float, 0);
        assert_eq!(fa2(&spec.with_window_left(200), &[(1, 1000)], None).float, float(2, 16));
        // Windows over several queries are not divided, not for a graph either.
        assert_eq!(fa2(&spec.with_window_left(200), &[(2, 1000)], None).float, 0);
        assert_eq!(fa2(&spec.with_window_left(200), &[(1, 1000)], Some(2)).float, 0);
        // Something to point at where there are no keys.
        assert_eq!(fa2(&spec, &[(3, 0)], None).float, 8 * 128 * 2);
    }

    /// By hand, as `PrefillPlan` allocates with other ways to divide keys.
    #[test]
    fn sizes_follow_the_split() {
        let spec = AttentionSpec::new(DType::BF16, 128);
        let float = |work: usize| 32 * work * 16 * (128 + 1) * 4;
        let need = |requests: &[(i32, i32)], graph, split| fa2_split(&spec, requests, graph, split);
        // 1000 pages in parts of 100, 20 in one; three indices, offsets and a size,
        // offsets to merge by, and flags.
        let fixed = need(&[(1, 1000), (1, 20)], None, Split::fixed(100));
        assert_eq!(fixed, Need { float: float(11), int: 3 * 48 + 16 + 16 + 11 });
        // However many blocks there are, and however small the parts.
        let many = need(&[(1, 1000); 512], None, Split::fixed(100));
        assert_eq!(many.float, float(5120));
        assert_eq!(need(&[(1, 1000)], None, Split::fixed(1)).float, float(1000));
        // As large as the longest request: nothing is divided.
        assert_eq!(need(&[(1, 1000), (1, 20)], None, Split::fixed(1000)).float, 0);
        assert_eq!(need(&[(1, 1000), (1, 20)], None, Split::fixed(999)).float, float(3));
        // Requests without pages count as one page, without queries for nothing,
        // but for whether keys are divided.
        assert_eq!(need(&[(1, 0), (1, 3)], None, Split::fixed(2)).float, float(3));
        assert_eq!(need(&[(2, 1), (0, 9)], None, Split::fixed(2)).float, float(1));
        // A window of 200 keys and a tile are 14 pages.
        let window = spec.with_window_left(200);
        assert_eq!(fa2_split(&window, &[(1, 1000)], None, Split::fixed(5)).float, float(3));
        // Undivided: as much work as tiles, or, for a graph, as blocks.
        assert_eq!(need(&[(1, 1000); 3], None, Split::disabled()), Need { float: 0, int: 3 * 16 + 20 });
        assert_eq!(
            need(&[(1, 1000); 3], Some(3), Split::disabled()),
            Need { float: 0, int: 144 + 144 + 144 + 32 + 4 }
        );
        // Of decode, a graph has no more of it.
        let decode = with_batch(&[(1, 1000), (1, 0), (1, 3)], Some(3), Split::disabled(), |batch| {
            let shape = BatchShape { one_query_each: true, ..batch.shape };
            let batch = PrefillBatch { shape, ..batch.clone() };
            fa2_need(&spec, &batch, true, H200.0, H200.1, Fa2Planner::WholeTiles)
        });
        assert_eq!(decode, Need { float: 0, int: 3 * 16 + 20 });
        // 264 blocks less 200 have 8 KV heads each 8 parts; with none left, nothing
        // is divided but for a graph, which has room for its tiles.
        assert_eq!(need(&[(1, 1000)], None, Split::beside(200)).float, float(8));
        for most in [264, 1000] {
            assert_eq!(need(&[(1, 1000)], None, Split::beside(most)).float, 0);
            assert_eq!(need(&[(1, 1000); 3], Some(3), Split::beside(most)).float, float(3));
        }
    }

    /// By hand, as `PrefillSM90Plan` allocates.
    #[test]
    fn sizes_are_those_of_flash_attention_3() {
        let fa3 = |head_dim, requests: &[(i32, i32)], graph| {
            let spec = AttentionSpec::new(DType::BF16, head_dim);
            with_batch(requests, graph, BY_ITSELF, |batch| fa3_need(&spec, batch, H200.0))
        };
        let int = |work: usize| 6 * (4 * work) + 4 * 133 + 12 + 4 * work;
        assert_eq!(fa3(128, &[(1, 1); 512], None), Need { float: 0, int: int(512 * 32) });
        assert_eq!(fa3(128, &[(1, 1); 512], Some(512)), Need { float: 0, int: int((4 + 511) * 32) });
        assert_eq!(fa3(64, &[(192, 1), (193, 1)], None).int, int(3 * 32));
        assert_eq!(fa3(128, &[(192, 1), (193, 1)], None).int, int(4 * 32));
        // Heads take the same work, where there is much.
        assert_eq!(fa3(128, &[(1, 1); 4096], None).int, 6 * 4 * 4096 + 4 * 133 + 12 + 4 * 4096);
        assert_eq!(fa3(128, &[(1, 1); 4065], None).int, int(4065 * 32));
        assert_eq!(fa3(128, &[(1, 0); 2], None).float, 8 * 128 * 2);
    }
}
