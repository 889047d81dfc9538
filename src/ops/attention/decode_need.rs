//! What the planner of decode on CUDA cores is given, and what it takes of a
//! workspace.

use std::borrow::Cow;

use super::{
    planned::{LEAST_CHUNK, MAX_BLOCKS_PER_SM},
    spec::Heads,
    workspace::{Need, arrays},
};

impl Need {
    /// The most that the planner of decode on CUDA cores takes for requests with
    /// these offsets of pages.
    ///
    /// How many blocks of its kernel a multiprocessor runs at once only the
    /// module knows; this takes as many as there can be. Where they are not more
    /// than the requests times the KV heads, nothing is divided. Else there are
    /// chunks of pages, of which each takes two indices, an offset, a flag, and
    /// for each head an output and its sum: for a graph as many as blocks, for one
    /// launch no more than chunks of the least size.
    pub(super) fn of_decode(
        indptr: &[i32],
        page_size: usize,
        heads: Heads,
        head_dim: usize,
        for_graph: bool,
        multiprocessors: usize,
    ) -> Self {
        let requests = indptr.len() - 1;
        let most = MAX_BLOCKS_PER_SM * multiprocessors / heads.num_kv_heads;
        let least = (LEAST_CHUNK / page_size).max(1);
        let mut pages = indptr.windows(2).map(|pair| (pair[1] - pair[0]) as usize);
        let chunks = if requests >= most {
            requests
        } else if for_graph {
            most
        } else {
            // As soon as there are as many, more do not matter.
            let add = |chunks: usize, pages: usize| {
                Some(chunks + pages.div_ceil(least)).filter(|&chunks| chunks < most)
            };
            pages.try_fold(0, add).unwrap_or(most)
        };
        let divided = requests < most && (for_graph || chunks > requests);
        let each = chunks * size_of::<i32>();
        let indices = [each, each, each + 2 * size_of::<i32>()];
        let sums = heads.num_qo_heads * chunks * size_of::<f32>();
        Self {
            float: if divided { arrays([sums * head_dim, sums]) } else { 0 },
            int: arrays(indices.into_iter().chain(divided.then_some(chunks))),
        }
    }
}

/// The page offsets that the planner is given: `indptr`, with every request
/// counted as having at least one page.
///
/// The planner gives an empty request one chunk, but leaves it out when it
/// looks for a chunk size at which all chunks fit the launch. With padding in
/// the batch it could then plan more chunks than the buffers and the captured
/// grid hold. Counting one page for an empty request makes both agree, and
/// changes nothing else: the kernel takes lengths from the device arrays.
pub(super) fn planned_indptr(indptr: &[i32]) -> Cow<'_, [i32]> {
    if indptr.windows(2).all(|pair| pair[0] < pair[1]) {
        return indptr.into();
    }
    let mut end = 0;
    let ends = indptr.windows(2).map(|pair| {
        end += (pair[1] - pair[0]).max(1);
        end
    });
    std::iter::once(0).chain(ends).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand, as `DecodePlan` allocates with 16 blocks on each of 132
    /// multiprocessors.
    #[test]
    fn sizes_are_the_planners() {
        let need = |pages: &[i32], for_graph, [num_qo_heads, num_kv_heads]: [usize; 2]| {
            let mut indptr = vec![0];
            for pages in pages {
                indptr.push(indptr[indptr.len() - 1] + pages);
            }
            Need::of_decode(&indptr, 16, Heads { num_qo_heads, num_kv_heads }, 128, for_graph, 132)
        };
        let float = |heads: usize, chunks: usize| heads * chunks * (128 + 1) * 4;
        // 264 chunks for each KV head.
        let graph = Need { float: float(8, 264), int: 3 * 1056 + 8 + 8 + 264 };
        assert_eq!(need(&[1; 5], true, [8, 8]), graph);
        assert_eq!(need(&[1000; 5], true, [8, 8]), graph);
        assert_eq!(need(&[1000; 5], true, [16, 8]).float, float(16, 264));
        // At once, no more than there are 8 pages each; none below that.
        assert_eq!(need(&[8; 5], false, [8, 8]), Need { float: 0, int: 64 + 28 });
        assert_eq!(need(&[8, 8, 8, 9, 8], false, [8, 8]), Need { float: float(8, 6), int: 64 + 32 + 6 });
        assert_eq!(need(&[9000; 5], false, [8, 8]), graph);
        // As many requests as blocks.
        for pages in [1, 1000] {
            let whole = Need { float: 0, int: 1056 * 3 + 8 };
            assert_eq!(need(&vec![pages; 264], true, [8, 8]), whole);
            assert_eq!(need(&vec![pages; 264], false, [8, 8]), whole);
            assert_eq!(need(&[pages; 1], true, [4000, 4000]), Need { float: 0, int: 16 + 16 + 12 });
        }
    }

    #[test]
    fn empty_requests_are_planned_as_one_page() {
        assert!(matches!(planned_indptr(&[0, 2, 3]), Cow::Borrowed([0, 2, 3])));
        assert_eq!(*planned_indptr(&[0, 0, 5, 5, 5]), [0, 1, 6, 7, 8]);
        assert_eq!(*planned_indptr(&[0, 0]), [0, 1]);
    }
}
