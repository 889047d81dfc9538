//! What a step of a mixed batch asks of its planner, and the limits of that.

use super::{
    mask::{check_causal, requests_of},
    planned::{check_requests, check_rows},
    spec::{AttentionSpec, Heads},
};
use crate::{
    error::Result,
    indices::{PageIndices, RaggedIndices},
    ops::check::Check,
};

/// Rows of a tile: of requests with more rows than the second, and of others.
/// A row is a query's head, among those that share a KV head.
const TILES: [usize; 2] = [128, 16];
/// Work items that the planner has room for, for each kind of tile.
const MAX_WORKS: usize = 65536;
/// Index arrays that describe the work items of one kind of tile.
const WORK_ARRAYS: usize = 10;

/// The blocks of a launch: as many as a GPU runs at once, of which each stays
/// on its multiprocessor.
pub(super) fn blocks(multiprocessors: usize, head_dim_vo: usize) -> usize {
    if head_dim_vo < 256 { 2 * multiprocessors } else { multiprocessors }
}

/// Rows of partial results for which the planner reserves memory.
///
/// It counts the rows that are merged against this, not their parts. There
/// are fewer parts as well: a tile that is divided has less than twice
/// `tokens / part` of them, in up to 128 rows, and `part` is at least the tokens
/// of all tiles divided by `blocks`. So there are at most `256 * blocks`.
const fn partial_rows(blocks: usize) -> usize {
    4 * blocks * (TILES[0] + TILES[1])
}

/// Bytes of partial results: for each row and KV head an output of 16 bits,
/// and its sum.
pub(super) fn float_bytes(blocks: usize, num_kv_heads: usize, head_dim_vo: usize) -> usize {
    partial_rows(blocks) * num_kv_heads * (2 * head_dim_vo + size_of::<f32>())
}

/// Bytes of the planner's index arrays, which are of one size for any batch:
/// those of work items, two lengths, two for each row to merge, and the number
/// of those rows. Each starts at a multiple of 16.
pub(super) const fn int_bytes(blocks: usize) -> usize {
    let works = TILES.len() * WORK_ARRAYS * MAX_WORKS;
    (works + 4 + 2 * partial_rows(blocks) + 1) * size_of::<i32>()
}

/// What is planned.
#[derive(Clone, Copy, Debug)]
pub(super) struct MixedBatch<'a> {
    pub(super) queries: &'a RaggedIndices,
    pub(super) pages: &'a PageIndices,
    pub(super) heads: Heads,
    pub(super) group: usize,
    pub(super) causal: bool,
    pub(super) graph: Option<usize>,
}

/// What the planner is given.
#[derive(Debug)]
pub(super) struct MixedWork<'a> {
    pub(super) queries: &'a RaggedIndices,
    pub(super) table: &'a PageIndices,
    pub(super) kv_lens: Vec<i32>,
    pub(super) heads: Heads,
    pub(super) group: usize,
    pub(super) causal: bool,
    /// Rows of the tensors: those of the batch, or the fixed number of a graph.
    pub(super) rows: usize,
    pub(super) graph: bool,
}

impl<'a> MixedWork<'a> {
    /// Compares queries with a page table.
    pub(super) fn of(check: &Check<'_>, spec: &AttentionSpec, batch: MixedBatch<'a>) -> Result<Self> {
        let MixedBatch { queries, pages: table, heads, group, causal, graph } = batch;
        check_requests(check, queries, table)?;
        let rows = check_rows(check, graph, queries.total(), 0)?;
        spec.check_output_size(check, rows, heads)?;
        let kv_lens = table.seq_lens();
        if causal {
            check_causal(check, requests_of(queries, &kv_lens))?;
        }
        Ok(Self { queries, table, kv_lens, heads, group, causal, rows, graph: graph.is_some() })
    }

    /// Whether no plan is needed. A graph needs one, to do nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.kv_lens.is_empty() || self.queries.total() == 0 && !self.graph
    }

    /// For each request its kind of tile, its tiles, and its tokens.
    fn tiles(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        self.kv_lens.iter().enumerate().map(|(request, &len)| {
            let rows = self.queries.len(request) * self.group;
            let kind = usize::from(rows <= TILES[1]);
            (kind, rows.div_ceil(TILES[kind]), len as usize)
        })
    }

    /// Refuses what the planner has no room for, and what it gets wrong
    /// without a word.
    pub(super) fn check_limits(&self, check: &Check<'_>, blocks: usize) -> Result<()> {
        if blocks == 0 {
            return check.fail("stream", "its GPU has no multiprocessors".into());
        }
        let kv_heads = self.heads.num_kv_heads;
        let mut tiles = [0; TILES.len()];
        for (kind, own, _) in self.tiles() {
            tiles[kind] += own;
        }
        // A tile makes one work item for each KV head, and one more for each
        // further part into which its tokens are cut. A part has at least half
        // of what a block has on average, so there are at most twice as many
        // further parts as blocks.
        for (tiles, tile) in tiles.into_iter().zip(TILES) {
            let works = tiles.saturating_mul(kv_heads).saturating_add(2 * blocks);
            if works > MAX_WORKS {
                return check.fail(
                    "queries",
                    format!(
                        "{tiles} tiles of up to {tile} query heads with {kv_heads} KV heads, in up to {works} \
                         work items; a plan has room for {MAX_WORKS}, so split the step"
                    ),
                );
            }
        }
        // The planner keeps the share of a block in 32 bits, rounded up to a
        // multiple of 256.
        let tokens: usize = self.tiles().map(|(_, tiles, len)| tiles * len).sum();
        if tokens * kv_heads / blocks > i32::MAX as usize - 512 {
            return check.fail(
                "table",
                format!(
                    "{tokens} tokens to read for each of {kv_heads} KV heads; the planner counts up to 2^31 \
                     for each of {blocks} blocks, so split the step"
                ),
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            testing::{on_a_stream, refused},
            workspace::Workspace,
        },
        *,
    };
    use crate::DType;

    /// An H200's, with heads of 128.
    const BLOCKS: usize = 264;
    const HEADS: Heads = Heads::new(32, 8);
    /// A causal mask, or none, not for a graph.
    const CAUSAL: (bool, Option<usize>) = (true, None);
    const UNMASKED: (bool, Option<usize>) = (false, None);

    /// Calls with the work of requests with these queries and tokens, all
    /// tokens in one page.
    fn with_work<R>(
        requests: &[(usize, usize)],
        heads: Heads,
        (causal, graph): (bool, Option<usize>),
        use_work: impl FnOnce(&Check<'_>, &MixedWork<'_>) -> Result<R>,
    ) -> Result<R> {
        let page_size = requests.iter().map(|&(_, tokens)| tokens).max().unwrap_or(1).max(1);
        let pages =
            requests.iter().map(|&(_, tokens)| (if tokens == 0 { &[][..] } else { &[0][..] }, tokens));
        let table = PageIndices::from_requests(1, page_size, pages)?;
        let queries = RaggedIndices::from_lens(requests.iter().map(|&(queries, _)| queries))?;
        let spec = AttentionSpec::new(DType::BF16, 128);
        let group = heads.check("test")?;
        let batch = MixedBatch { queries: &queries, pages: &table, heads, group, causal, graph };
        on_a_stream(|check| use_work(check, &MixedWork::of(check, &spec, batch)?))
    }

    fn limits(requests: &[(usize, usize)], heads: Heads, options: (bool, Option<usize>)) -> Result<()> {
        with_work(requests, heads, options, |check, work| work.check_limits(check, BLOCKS))
    }

    /// What the planner of a real module takes, and not a byte less.
    #[test]
    fn sizes_are_the_planners() {
        assert_eq!((blocks(132, 128), blocks(132, 64), blocks(132, 256)), (264, 264, 132));
        assert_eq!(float_bytes(264, 8, 128), 316_293_120);
        assert_eq!(float_bytes(264, 1, 64), 20_072_448);
        assert_eq!(float_bytes(132, 3, 256), 117_697_536);
        assert_eq!((int_bytes(264), int_bytes(132)), (6_459_412, 5_851_156));
        assert!(int_bytes(2 * 256) <= Workspace::DEFAULT_INT_BYTES);
    }

    #[test]
    fn queries_must_fit_the_page_table() {
        let fits = |requests: &[(usize, usize)], options| {
            with_work(requests, HEADS, options, |_, work| Ok((work.rows, work.is_empty())))
        };
        assert_eq!(fits(&[(3, 3), (0, 0), (1, 9)], CAUSAL).unwrap(), (4, false));
        assert_eq!(fits(&[(0, 3), (0, 0)], CAUSAL).unwrap(), (0, true));
        assert_eq!(fits(&[], UNMASKED).unwrap(), (0, true));
        assert_eq!(fits(&[(3, 1)], UNMASKED).unwrap(), (3, false));
        assert!(fits(&[(3, 0), (1, 1)], CAUSAL).is_ok(), "without tokens there is nothing to see");
        refused(fits(&[(2, 9), (4, 3)], CAUSAL), "queries");
        let rows = |rows| (true, Some(rows));
        assert_eq!(fits(&[(3, 3)], rows(5)).unwrap(), (5, false));
        assert_eq!(fits(&[(0, 3)], rows(5)).unwrap(), (5, false), "a graph is told to do nothing");
        assert_eq!(fits(&[], rows(5)).unwrap(), (5, true));
        refused(fits(&[(3, 3)], rows(2)), "graph");
        refused(fits(&[(3, 3)], rows(usize::MAX)), "graph");
        refused(fits(&[(3, 3)], rows(1 << 30)), "heads");
        refused(fits(&[(1 << 20, 1 << 20)], CAUSAL), "heads");
        for (num_qo_heads, num_kv_heads) in [(7, 2), (0, 2), (8, 0), (65536, 65536)] {
            let heads = Heads { num_qo_heads, num_kv_heads };
            refused(with_work(&[(1, 9)], heads, CAUSAL, |_, _| Ok(())), "heads");
        }
        let table = PageIndices::from_requests(1, 4, [(&[0][..], 1)]).unwrap();
        let queries = RaggedIndices::from_lens([1, 1]).unwrap();
        let other = with_work(&[], HEADS, CAUSAL, |check, _| {
            let batch = MixedBatch {
                queries: &queries,
                pages: &table,
                heads: HEADS,
                group: 4,
                causal: true,
                graph: None,
            };
            MixedWork::of(check, &AttentionSpec::new(DType::BF16, 128), batch).map(drop)
        });
        refused(other, "queries");
    }

    #[test]
    fn too_much_work_is_refused() {
        let room = (MAX_WORKS - 2 * BLOCKS) / HEADS.num_kv_heads;
        // One tile of 16 rows for each request; four queries of four heads fill it.
        for queries in [1, 4] {
            assert!(limits(&vec![(queries, 100); room], HEADS, CAUSAL).is_ok());
            refused(limits(&vec![(queries, 100); room + 1], HEADS, CAUSAL), "queries");
        }
        // One tile of 128, and two.
        assert!(limits(&vec![(5, 100); room], HEADS, CAUSAL).is_ok());
        refused(limits(&vec![(5, 100); room + 1], HEADS, CAUSAL), "queries");
        refused(limits(&vec![(33, 100); room / 2 + 1], HEADS, CAUSAL), "queries");
        // Room for both kinds, and none taken by requests without queries.
        let mut both = vec![(1, 100); room];
        both.extend(vec![(5, 100); room]);
        both.extend(vec![(0, 100); room]);
        assert!(limits(&both, HEADS, UNMASKED).is_ok());
        // Sums of tokens, of requests that name one page again and again.
        let one = Heads::new(1, 1);
        assert!(limits(&[(128, (1 << 31) - 1)], one, UNMASKED).is_ok());
        let long = RaggedIndices::from_lens([128 * 300]).unwrap();
        let tokens = with_work(&[(1, (1 << 31) - 1)], one, UNMASKED, |check, work| {
            MixedWork { queries: &long, kv_lens: work.kv_lens.clone(), ..*work }.check_limits(check, BLOCKS)
        });
        refused(tokens, "table");
    }

    /// Upstream's count of work items and of partial results, for any batch
    /// that is let through, against what there is room for.
    #[test]
    fn what_is_let_through_has_room() {
        let mut state = 7u64;
        let mut below = |bound: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % bound
        };
        let mut planned = 0;
        for _ in 0..2000 {
            let longest = 1 << below(20);
            let most = 1 << below(9);
            let requests: Vec<_> =
                (0..1 + below(200)).map(|_| (below(most) * below(2), below(longest))).collect();
            let num_kv_heads = [1, 2, 3, 8, 40][below(5)];
            let group = [1, 3, 4, 7, 17, 130][below(6)];
            let heads = Heads::new(num_kv_heads * group, num_kv_heads);
            let blocks = 2 * (1 + below(160));
            let made = with_work(&requests, heads, UNMASKED, |check, work| {
                work.check_limits(check, blocks)?;
                let tokens: usize = work.tiles().map(|(_, tiles, len)| tiles * len).sum();
                let share = (tokens * num_kv_heads).div_ceil(blocks).max(1);
                let share = if share <= 128 { 128 } else { share.next_multiple_of(256) };
                let parts = [share / num_kv_heads.min(2), share];
                let (mut works, mut rows) = ([0; 2], 0);
                for (kind, tiles, len) in work.tiles() {
                    let own = len.div_ceil(parts[kind]);
                    works[kind] += tiles * own.max(1) * num_kv_heads;
                    rows += if own > 1 { tiles * TILES[kind] * own } else { 0 };
                }
                Ok((works, rows))
            });
            let Ok((works, rows)) = made else { continue };
            assert!(works.iter().all(|&works| works <= MAX_WORKS), "{works:?}");
            assert!(rows <= partial_rows(blocks), "{rows} rows of partial results with {blocks} blocks");
            // The kernels number their elements in 32 bits.
            assert!(rows * num_kv_heads * 256 < 1 << 32);
            planned += 1;
        }
        assert!(planned > 1000, "{planned}");
    }
}
