//! What a step of multi-head latent attention asks of its planner, and the
//! limits of that.

use super::{planned::check_requests, workspace::arrays};
use crate::{
    error::Result,
    indices::{PageIndices, RaggedIndices},
    kv::layout::MLA_DIMS,
    ops::check::Check,
};

/// Work items that the planner has room for.
const MAX_WORKS: usize = 16384;
/// Rows of queries (a row is a query's head) that one block works on. With
/// many rows, two blocks work together on twice as many.
const BLOCK_TILE: usize = 64;

/// What the planner is given: the requests of a batch that have queries.
///
/// Requests without queries make no work. Left in, they would lower the
/// average from which the planner picks its tile.
#[derive(Debug)]
pub(super) struct MlaWork {
    pub(super) qo_indptr: Vec<i32>,
    /// Where each request's pages start, and where the last one's end.
    pub(super) kv_indptr: Vec<i32>,
    pub(super) kv_lens: Vec<i32>,
    pub(super) num_heads: usize,
    /// Blocks that work together.
    cluster: usize,
    /// Whether a mask is needed: a single query sees all tokens anyway.
    pub(super) causal: bool,
}

impl MlaWork {
    /// Compares queries with a page table.
    pub(super) fn of(
        check: &Check<'_>,
        queries: &RaggedIndices,
        table: &PageIndices,
        num_heads: usize,
        causal: bool,
    ) -> Result<Self> {
        check_requests(check, queries, table)?;
        // Both are numbered in 32 bits together.
        if queries.total().checked_mul(num_heads).is_none_or(|rows| rows > i32::MAX as usize) {
            return check.fail(
                "num_heads",
                format!(
                    "{num_heads} heads of {} queries; there must be less than 2^31 in all",
                    queries.total()
                ),
            );
        }
        let room = queries.batch_size();
        let [mut qo_indptr, mut kv_indptr] = [(); 2].map(|()| Vec::with_capacity(room + 1));
        qo_indptr.push(0);
        kv_indptr.push(0);
        let kv_lens = Vec::with_capacity(room);
        let mut work = Self { qo_indptr, kv_indptr, kv_lens, num_heads, cluster: 1, causal: false };
        for request in 0..queries.batch_size() {
            let (qo_len, kv_len) = (queries.len(request), table.seq_len(request));
            if causal && qo_len > kv_len {
                return check.fail(
                    "queries",
                    format!(
                        "request {request} has {qo_len} queries and {kv_len} tokens; with a causal mask \
                         the queries are the last of the tokens, which the page table must already count"
                    ),
                );
            }
            if qo_len > 0 {
                work.causal |= causal && qo_len > 1;
                work.kv_indptr[work.kv_lens.len()] = table.indptr()[request];
                work.kv_indptr.push(table.indptr()[request + 1]);
                work.qo_indptr.push(queries.indptr()[request + 1]);
                work.kv_lens.push(kv_len as i32);
            }
        }
        let rows = queries.total() * num_heads;
        if rows.checked_div(work.kv_lens.len()).is_some_and(|mean| mean > BLOCK_TILE) {
            work.cluster = 2;
        }
        Ok(work)
    }

    /// Rows of each request.
    fn rows(&self) -> impl Iterator<Item = usize> {
        self.qo_indptr.windows(2).map(|queries| (queries[1] - queries[0]) as usize * self.num_heads)
    }

    /// Refuses what the planner or the kernels get wrong without a word.
    pub(super) fn check_limits(&self, check: &Check<'_>, multiprocessors: usize) -> Result<()> {
        let tile = self.cluster * BLOCK_TILE;
        let clusters = multiprocessors / self.cluster;
        if clusters == 0 {
            return check.fail("stream", format!("the GPU has {multiprocessors} multiprocessors"));
        }
        // A tile makes one work item, and one more for each further part into
        // which its tokens are cut. A part has at least the tokens of all
        // tiles divided by the number of clusters, so there are at most as
        // many further parts as clusters.
        let of_request =
            self.rows().zip(&self.kv_lens).map(|(rows, &len)| (rows.div_ceil(tile), len as usize));
        let (tiles, tokens, longest) = of_request.fold((0, 0, 0), |(sum, tokens, longest), (tiles, len)| {
            (sum + tiles, tokens + tiles * len, len.max(longest))
        });
        if tiles + clusters > MAX_WORKS {
            return check.fail(
                "queries",
                format!(
                    "{tiles} tiles of up to {tile} query heads, in up to {} work items; a plan has room for \
                     {MAX_WORKS}, so split the step",
                    tiles + clusters
                ),
            );
        }
        // The planner keeps these in 32 bits: the tokens of a request, twice,
        // and the share of a cluster, rounded up to a multiple of 256.
        if longest * 2 > i32::MAX as usize || tokens / clusters > i32::MAX as usize - 512 {
            return check.fail(
                "table",
                format!(
                    "a request of {longest} tokens, and {tokens} tokens to read in all; the planner counts \
                     up to 2^30 and 2^31 for each of {clusters} groups of blocks"
                ),
            );
        }
        self.check_tiles(check)
    }

    /// Refuses tiles with which the kernels would leave keys out.
    pub(super) fn check_tiles(&self, check: &Check<'_>) -> Result<()> {
        let tile = self.cluster * BLOCK_TILE;
        // The kernels round down where a tile ends inside a query, and then
        // may leave out the last key that this query sees. The last tile of a
        // request ends after all of its queries.
        if self.causal && !tile.is_multiple_of(self.num_heads) && self.rows().any(|rows| rows > tile) {
            return check.fail(
                "num_heads",
                format!(
                    "{} heads do not divide the kernels' tile of {tile}; with a causal mask and {} they would \
                     lose keys, so pad the heads to a power of two up to 128",
                    self.num_heads,
                    if self.num_heads > tile { "several queries" } else { "queries of more than one tile" },
                ),
            );
        }
        Ok(())
    }

    /// Bytes of partial results: for two tiles of each cluster, outputs of 16
    /// bits and their sums.
    pub(super) fn float_bytes(&self, multiprocessors: usize) -> usize {
        let cluster = self.cluster;
        let rows = 2 * (multiprocessors / cluster) * cluster * BLOCK_TILE;
        arrays([rows * MLA_DIMS[0] as usize * 2, rows * size_of::<f32>()])
    }
}

/// Bytes of the planner's index arrays: nine of all work items, between which
/// are five of all multiprocessors.
pub(super) fn int_bytes(multiprocessors: usize) -> usize {
    let (works, merges) = (MAX_WORKS * size_of::<i32>(), multiprocessors * size_of::<i32>());
    arrays([works; 3].into_iter().chain([merges; 5]).chain([works; 6]))
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            mla::BatchMla,
            mla_spec::MlaSpec,
            testing::{on_a_stream, refused},
        },
        *,
    };
    use crate::{dtype::DType, stream::Stream};

    /// An H200's.
    const MULTIPROCESSORS: usize = 132;

    /// The work of requests with these queries and tokens, all tokens in one page.
    fn work(requests: &[(usize, usize)], num_heads: usize, causal: bool) -> Result<MlaWork> {
        let page_size = requests.iter().map(|&(_, tokens)| tokens).max().unwrap_or(1).max(1);
        let pages =
            requests.iter().map(|&(_, tokens)| (if tokens == 0 { &[][..] } else { &[0][..] }, tokens));
        let table = PageIndices::from_requests(1, page_size, pages)?;
        let queries = RaggedIndices::from_lens(requests.iter().map(|&(queries, _)| queries))?;
        on_a_stream(|check| MlaWork::of(check, &queries, &table, num_heads, causal))
    }

    fn limits(requests: &[(usize, usize)], num_heads: usize, causal: bool) -> Result<()> {
        let work = work(requests, num_heads, causal)?;
        on_a_stream(|check| work.check_limits(check, MULTIPROCESSORS))
    }

    /// By hand, as `MLAPlan` allocates.
    #[test]
    fn sizes_are_the_planners() {
        // One block for each tile of 64, or two for one of 128.
        assert_eq!(work(&[(1, 9)], 16, false).unwrap().float_bytes(132), 2 * 132 * 64 * (1024 + 4));
        assert_eq!(work(&[(1, 9)], 128, false).unwrap().float_bytes(133), 2 * 132 * 64 * (1024 + 4));
        assert_eq!(int_bytes(132), 9 * 65_536 + 5 * 528);
        assert_eq!(int_bytes(133), 9 * 65_536 + 5 * 544);
    }

    #[test]
    fn requests_without_queries_are_not_planned() {
        let table =
            PageIndices::from_requests(9, 4, [(&[8, 1][..], 5), (&[3][..], 1), (&[][..], 0), (&[2][..], 4)])
                .unwrap();
        let queries = RaggedIndices::from_lens([2, 0, 3, 1]).unwrap();
        let work = on_a_stream(|check| MlaWork::of(check, &queries, &table, 16, false)).unwrap();
        assert_eq!(work.qo_indptr, [0, 2, 5, 6]);
        assert_eq!(work.kv_indptr, [0, 3, 3, 4]);
        assert_eq!(work.kv_lens, [5, 0, 4]);
        let none = RaggedIndices::from_lens([0; 4]).unwrap();
        let work = on_a_stream(|check| MlaWork::of(check, &none, &table, 16, false)).unwrap();
        assert!(work.kv_lens.is_empty());
    }

    #[test]
    fn queries_must_fit_the_page_table() {
        assert!(work(&[(3, 3), (0, 0), (1, 9)], 16, true).unwrap().causal);
        assert!(!work(&[(1, 3), (0, 0), (1, 9)], 16, true).unwrap().causal, "one query needs no mask");
        assert!(!work(&[(3, 1)], 16, false).unwrap().causal);
        refused(work(&[(2, 9), (4, 3)], 16, true), "queries");
        refused(work(&[(1, 0)], 16, true), "queries");
        // SAFETY: the legacy default stream; nothing is enqueued on it.
        let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
        refused(BatchMla::new(&stream, &MlaSpec::new(DType::F16, 1.0), 0), "num_heads");
        for sm_scale in [0.0, 9e-4, -1.0, f64::NAN, f64::INFINITY] {
            refused(BatchMla::new(&stream, &MlaSpec::new(DType::F16, sm_scale), 16), "sm_scale");
        }
        refused(work(&[(1 << 20, 9)], 1 << 11, false), "num_heads");
        refused(work(&[(2, 9)], usize::MAX, false), "num_heads");
        let table = PageIndices::from_requests(1, 4, [(&[0][..], 1)]).unwrap();
        let queries = RaggedIndices::from_lens([1, 1]).unwrap();
        refused(on_a_stream(|check| MlaWork::of(check, &queries, &table, 16, false)), "queries");
    }

    #[test]
    fn too_much_work_is_refused() {
        // 16 heads fill a quarter of a tile, 128 heads one of two blocks.
        let room = MAX_WORKS - MULTIPROCESSORS;
        assert!(limits(&vec![(1, 100); room], 16, false).is_ok());
        refused(limits(&vec![(1, 100); room + 1], 16, false), "queries");
        let room = MAX_WORKS - MULTIPROCESSORS / 2;
        assert!(limits(&vec![(1, 100); room], 128, true).is_ok());
        refused(limits(&vec![(1, 100); room + 1], 128, true), "queries");
        assert!(limits(&[(room, room)], 128, true).is_ok());
        refused(limits(&[(room + 1, room + 1)], 128, true), "queries");
        // Sums of tokens.
        assert!(limits(&[(1, (1 << 30) - 1)], 16, false).is_ok());
        refused(limits(&[(1, 1 << 30)], 16, false), "table");
        refused(limits(&[(1000, 1 << 29)], 128, false), "table");
    }

    /// Upstream's count of work items and of merges, for any batch that is
    /// let through, against what the planner has room for.
    #[test]
    fn what_is_let_through_has_room() {
        let mut state = 7u64;
        let mut below = |bound: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % bound
        };
        for _ in 0..2000 {
            let longest = 1 << below(20);
            let requests: Vec<_> =
                (0..1 + below(300)).map(|_| (below(40) * below(2), below(longest))).collect();
            let heads = [1, 5, 16, 64, 128, 200][below(6)];
            let (Ok(work), multiprocessors) = (work(&requests, heads, false), 1 + below(160)) else {
                continue;
            };
            if work.kv_lens.is_empty()
                || on_a_stream(|check| work.check_limits(check, multiprocessors)).is_err()
            {
                continue;
            }
            let (cluster, tile) = (work.cluster, work.cluster * BLOCK_TILE);
            let clusters = multiprocessors / cluster;
            let tiles = || {
                work.rows().zip(&work.kv_lens).flat_map(|(rows, &len)| {
                    (0..rows.div_ceil(tile)).map(move |at| (tile.min(rows - at * tile), len as usize))
                })
            };
            let share = tiles().map(|(_, len)| len).sum::<usize>().div_ceil(clusters).max(1);
            let part = match share {
                0..=8 => 32,
                9..=16 => 64,
                17..=32 => 128,
                33..=64 => 192,
                _ => share.next_multiple_of(256),
            };
            let items: usize = tiles().map(|(_, len)| len.div_ceil(part).max(1)).sum();
            let split = || tiles().filter(|&(_, len)| len > part);
            let merges: usize =
                split().map(|(rows, len)| rows.div_ceil(rows.div_ceil((len * cluster / part).max(1)))).sum();
            let partial_rows: usize = split().map(|(rows, len)| rows * len.div_ceil(part)).sum();
            assert!(items <= MAX_WORKS && merges <= multiprocessors, "{items} items, {merges} merges");
            assert!(partial_rows * (512 * 2 + 4) <= work.float_bytes(multiprocessors), "{partial_rows} rows");
        }
    }

    #[test]
    fn causal_tiles_must_end_between_queries() {
        for heads in [1, 2, 4, 8, 16, 32, 64, 128] {
            assert!(limits(&[(200, 300), (1, 5)], heads, true).is_ok(), "{heads} heads");
        }
        // Also where most requests have no queries, which are left out.
        assert!(limits(&[(2, 300), (0, 5), (0, 5), (0, 5), (0, 5)], 128, true).is_ok());
        for heads in [3, 12, 20, 40, 48, 96, 129, 192, 256] {
            refused(limits(&[(200, 300), (1, 5)], heads, true), "num_heads");
            assert!(limits(&[(200, 300), (1, 5)], heads, false).is_ok(), "{heads} heads");
            assert!(limits(&[(1, 300), (1, 5)], heads, true).is_ok(), "{heads} heads of single queries");
        }
        // One tile holds all queries.
        assert!(limits(&[(3, 300)], 20, true).is_ok());
        refused(limits(&[(7, 300)], 20, true), "num_heads");
    }
}
