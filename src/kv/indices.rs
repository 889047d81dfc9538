//! Index arrays on the host, checked once.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Sequence;
use crate::error::{FlashInferError, Result};

/// Tells page tables apart, so that what was checked against one is not used
/// with another. Copies of a table, which never changes, share its stamp.
fn next_stamp() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// The page table of a batch: which pages of the cache hold each request's
/// tokens, in order.
///
/// The arrays are FlashInfer's: `indptr` (`batch + 1` entries) delimits each
/// request's part of `indices` (page numbers), and `last_page_len` (`batch`
/// entries) is the number of tokens in a request's last page. A request
/// without pages has equal `indptr` entries and a `last_page_len` of 0.
///
/// Two requests may name one page (a shared prefix).
#[derive(Clone, Debug)]
pub struct PageIndices {
    pub(crate) stamp: u64,
    num_pages: usize,
    page_size: usize,
    pub(super) indptr: Vec<i32>,
    pub(super) indices: Vec<i32>,
    pub(super) last_page_len: Vec<i32>,
}

impl PageIndices {
    /// Checks a page table against a cache of `num_pages` pages of
    /// `page_size` tokens.
    ///
    /// # Errors
    /// An array has the wrong length, `indptr` does not start at 0 or
    /// decreases, a page lies outside the cache, a `last_page_len` is not in
    /// `1..=page_size` (or not 0 for a request without pages), or the batch
    /// holds 2³¹ token slots or more.
    ///
    /// ```
    /// # use flashinfer_rs::PageIndices;
    /// // Two requests in a cache of 8 pages of 16 tokens: 20 and 16 tokens.
    /// let table = PageIndices::new(8, 16, vec![0, 2, 3], vec![5, 0, 7], vec![4, 16])?;
    /// assert_eq!(table.seq_len(0), 20);
    /// assert!(PageIndices::new(8, 16, vec![0, 1], vec![8], vec![1]).is_err());
    /// # Ok::<(), flashinfer_rs::FlashInferError>(())
    /// ```
    pub fn new(
        num_pages: usize,
        page_size: usize,
        indptr: Vec<i32>,
        indices: Vec<i32>,
        last_page_len: Vec<i32>,
    ) -> Result<Self> {
        let invalid =
            |argument, problem: String| Err(FlashInferError::invalid("PageIndices", argument, problem));
        check_cache_size("PageIndices", num_pages, page_size)?;
        check_table_size("PageIndices", indptr.len(), indices.len(), page_size)?;
        check_indptr("PageIndices", "indptr", &indptr, indices.len())?;
        if last_page_len.len() + 1 != indptr.len() {
            return invalid(
                "last_page_len",
                format!("{} entries; indptr is for {} requests", last_page_len.len(), indptr.len() - 1),
            );
        }
        if let Some(at) =
            indices.iter().position(|&page| usize::try_from(page).map_or(true, |page| page >= num_pages))
        {
            return invalid("indices", format!("entry {at} is page {}, outside 0..{num_pages}", indices[at]));
        }
        for (request, (pages, &len)) in indptr.windows(2).zip(&last_page_len).enumerate() {
            let allowed = if pages[0] == pages[1] { 0..=0 } else { 1..=page_size as i64 };
            if !allowed.contains(&i64::from(len)) {
                return invalid(
                    "last_page_len",
                    format!(
                        "request {request} has {} pages and {len} tokens in the last one; allowed are {allowed:?}",
                        pages[1] - pages[0]
                    ),
                );
            }
        }
        Ok(Self { stamp: next_stamp(), num_pages, page_size, indptr, indices, last_page_len })
    }

    /// A table of no requests, in a cache of a size that was checked.
    pub(super) fn none(num_pages: usize, page_size: usize) -> Self {
        let (indices, last_page_len) = (Vec::new(), Vec::new());
        Self { stamp: next_stamp(), num_pages, page_size, indptr: vec![0], indices, last_page_len }
    }

    /// A table from each request's pages and number of tokens.
    ///
    /// # Errors
    /// As [`new`](Self::new); also when a request's pages are not exactly
    /// those that its tokens need.
    pub fn from_requests<'r>(
        num_pages: usize,
        page_size: usize,
        requests: impl IntoIterator<Item = (&'r [i32], usize)>,
    ) -> Result<Self> {
        let (mut indptr, mut indices, mut last_page_len) = (vec![0i32], Vec::new(), Vec::new());
        for (request, (pages, tokens)) in requests.into_iter().enumerate() {
            let needed = tokens.div_ceil(page_size.max(1));
            if needed != pages.len() {
                return Err(FlashInferError::invalid(
                    "PageIndices",
                    "requests",
                    format!(
                        "request {request}: {tokens} tokens need {needed} pages of {page_size}, {} given",
                        pages.len()
                    ),
                ));
            }
            indices.extend_from_slice(pages);
            // A count beyond i32 is refused by `new`, which sees a broken indptr.
            indptr.push(i32::try_from(indices.len()).unwrap_or(-1));
            last_page_len.push((tokens - needed.saturating_sub(1) * page_size) as i32);
        }
        Self::new(num_pages, page_size, indptr, indices, last_page_len)
    }

    /// Adds requests without pages until there are `batch` of them, as a
    /// decode step captured for that batch size needs.
    ///
    /// # Errors
    /// There are more requests already.
    pub fn pad_to(mut self, batch: usize) -> Result<Self> {
        if batch < self.batch_size() {
            return Err(FlashInferError::invalid(
                "PageIndices",
                "batch",
                format!("{} requests cannot be padded to {batch}", self.batch_size()),
            ));
        }
        check_table_size("PageIndices", batch.saturating_add(1), self.indices.len(), self.page_size)?;
        let end = self.indices.len() as i32;
        self.stamp = next_stamp();
        self.indptr.resize(batch + 1, end);
        self.last_page_len.resize(batch, 0);
        Ok(self)
    }

    /// Adds a request.
    pub(super) fn push(&mut self, sequence: &Sequence) {
        self.stamp = next_stamp();
        self.indices.extend_from_slice(sequence.pages());
        self.indptr.push(self.indices.len() as i32);
        self.last_page_len.push(sequence.last_page_len() as i32);
    }

    /// Leaves a request out.
    pub(super) fn remove(&mut self, request: usize) {
        self.cut(request, 0);
        self.indptr.remove(request);
        self.last_page_len.remove(request);
    }

    /// A request has lost its last tokens.
    pub(super) fn shrink(&mut self, request: usize, sequence: &Sequence) {
        self.cut(request, sequence.pages().len());
        self.last_page_len[request] = sequence.last_page_len() as i32;
    }

    /// Leaves a request its first `kept` pages.
    fn cut(&mut self, request: usize, kept: usize) {
        self.stamp = next_stamp();
        let (start, end) = (self.indptr[request] as usize + kept, self.indptr[request + 1] as usize);
        if start < end {
            self.indices.drain(start..end);
            for offset in &mut self.indptr[request + 1..] {
                *offset -= (end - start) as i32;
            }
        }
    }

    /// The requests, which are these sequences, have got more tokens. Of the
    /// pages that they had, only the last of each may be another one now.
    ///
    /// Moves what lies behind the first request with a further page, from the
    /// end, and reads no other page numbers than those that may be new.
    pub(super) fn grow(&mut self, sequences: &[Sequence]) {
        self.stamp = next_stamp();
        let mut end = sequences.iter().map(|sequence| sequence.pages().len()).sum();
        self.indices.resize(end, 0);
        for (request, sequence) in sequences.iter().enumerate().rev() {
            let pages = sequence.pages();
            let (old_start, old_end) = (self.indptr[request] as usize, self.indptr[request + 1] as usize);
            let (start, kept) = (end - pages.len(), (old_end - old_start).saturating_sub(1));
            if start > old_start {
                self.indices.copy_within(old_start..old_start + kept, start);
            }
            self.indices[start + kept..end].copy_from_slice(&pages[kept..]);
            self.indptr[request + 1] = end as i32;
            self.last_page_len[request] = sequence.last_page_len() as i32;
            end = start;
        }
    }

    /// The number of requests.
    pub fn batch_size(&self) -> usize {
        self.last_page_len.len()
    }

    /// Pages of the cache that the table was checked against.
    pub fn num_pages(&self) -> usize {
        self.num_pages
    }

    /// Tokens in a page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Where each request's pages start and end in [`indices`](Self::indices).
    pub fn indptr(&self) -> &[i32] {
        &self.indptr
    }

    /// Page numbers of all requests.
    pub fn indices(&self) -> &[i32] {
        &self.indices
    }

    /// Tokens in each request's last page.
    pub fn last_page_len(&self) -> &[i32] {
        &self.last_page_len
    }

    /// The pages of one request.
    ///
    /// # Panics
    /// If there is no such request.
    pub fn pages(&self, request: usize) -> &[i32] {
        &self.indices[self.indptr[request] as usize..self.indptr[request + 1] as usize]
    }

    /// The number of tokens of each request.
    pub fn seq_lens(&self) -> Vec<i32> {
        (0..self.batch_size()).map(|request| self.seq_len(request) as i32).collect()
    }

    /// The number of tokens of one request.
    ///
    /// # Panics
    /// If there is no such request.
    pub fn seq_len(&self, request: usize) -> usize {
        let full = self.pages(request).len().saturating_sub(1);
        full * self.page_size + self.last_page_len[request] as usize
    }
}

/// Where appended tokens go: for each, its request and its position there.
#[derive(Clone, Debug)]
pub struct AppendIndices {
    pub(super) batch_indices: Vec<i32>,
    pub(super) positions: Vec<i32>,
    /// All positions are below this.
    num_positions: usize,
    /// The page table that the entries were checked against.
    pub(crate) table_stamp: u64,
}

impl AppendIndices {
    /// Checks explicit requests and positions against a page table, which
    /// must already count the new tokens.
    ///
    /// # Errors
    /// The arrays differ in length, or an entry names a request that is not
    /// in the table or a position at or beyond its length.
    pub fn new(table: &PageIndices, batch_indices: Vec<i32>, positions: Vec<i32>) -> Result<Self> {
        const OP: &str = "AppendIndices";
        if batch_indices.len() != positions.len() {
            return Err(FlashInferError::invalid(
                OP,
                "positions",
                format!("{} entries for {} tokens", positions.len(), batch_indices.len()),
            ));
        }
        for (token, (&request, &position)) in batch_indices.iter().zip(&positions).enumerate() {
            let request_len = usize::try_from(request)
                .ok()
                .filter(|&request| request < table.batch_size())
                .map(|request| table.seq_len(request));
            let Some(len) = request_len else {
                return Err(FlashInferError::invalid(
                    OP,
                    "batch_indices",
                    format!(
                        "token {token} belongs to request {request}, but there are {}",
                        table.batch_size()
                    ),
                ));
            };
            if usize::try_from(position).map_or(true, |position| position >= len) {
                return Err(FlashInferError::invalid(
                    OP,
                    "positions",
                    format!(
                        "token {token} goes to position {position} of request {request}, which has {len} tokens; \
                         the page table must already count the tokens that are appended"
                    ),
                ));
            }
        }
        let num_positions = one_more_than_largest(&positions);
        Ok(Self { batch_indices, positions, num_positions, table_stamp: table.stamp })
    }

    /// No tokens.
    pub(super) fn none(table: &PageIndices) -> Self {
        Self { batch_indices: Vec::new(), positions: Vec::new(), num_positions: 0, table_stamp: table.stamp }
    }

    /// The last tokens of each request: request `i` gets
    /// `append_indptr[i + 1] - append_indptr[i]` of them. This is upstream's
    /// `get_batch_indices_positions`.
    ///
    /// # Errors
    /// `append_indptr` is not for the table's batch, does not start at 0,
    /// decreases, or gives a request more tokens than it has.
    pub fn last_tokens(table: &PageIndices, append_indptr: &[i32]) -> Result<Self> {
        const OP: &str = "AppendIndices";
        let nnz = append_indptr.last().copied().unwrap_or_default();
        check_indptr(OP, "append_indptr", append_indptr, usize::try_from(nnz).unwrap_or_default())?;
        if append_indptr.len() != table.batch_size() + 1 {
            return Err(FlashInferError::invalid(
                OP,
                "append_indptr",
                format!("{} entries for a table of {} requests", append_indptr.len(), table.batch_size()),
            ));
        }
        for (request, tokens) in append_indptr.windows(2).enumerate() {
            let (new, len) = ((tokens[1] - tokens[0]) as usize, table.seq_len(request));
            if new > len {
                return Err(FlashInferError::invalid(
                    OP,
                    "append_indptr",
                    format!(
                        "request {request} gets {new} new tokens but has {len} in the page table, \
                         which must already count them"
                    ),
                ));
            }
        }
        let mut append = Self::none(table);
        append.refill(table, append_indptr);
        Ok(append)
    }

    /// As [`last_tokens`](Self::last_tokens), in place, for an `append_indptr`
    /// that is known to fit the table.
    pub(super) fn refill(&mut self, table: &PageIndices, append_indptr: &[i32]) {
        self.table_stamp = table.stamp;
        self.batch_indices.clear();
        self.positions.clear();
        for (request, tokens) in append_indptr.windows(2).enumerate() {
            let (new, len) = ((tokens[1] - tokens[0]) as usize, table.seq_len(request));
            self.batch_indices.extend(std::iter::repeat_n(request as i32, new));
            self.positions.extend((len - new..len).map(|position| position as i32));
        }
        self.num_positions = one_more_than_largest(&self.positions);
    }

    /// The number of tokens.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// Each token's request.
    pub fn batch_indices(&self) -> &[i32] {
        &self.batch_indices
    }

    /// The number that all positions are below: 1 more than the largest.
    pub fn num_positions(&self) -> usize {
        self.num_positions
    }

    /// Each token's position in its request.
    pub fn positions(&self) -> &[i32] {
        &self.positions
    }
}

/// What all of these numbers, none of them negative, are below.
fn one_more_than_largest(numbers: &[i32]) -> usize {
    numbers.iter().max().map_or(0, |&largest| largest as usize + 1)
}

/// Offsets that divide the rows of a ragged tensor among the requests of a
/// batch: request `i` has rows `indptr[i]..indptr[i + 1]`.
#[derive(Clone, Debug)]
pub struct RaggedIndices {
    pub(super) indptr: Vec<i32>,
}

impl RaggedIndices {
    /// Checks offsets.
    ///
    /// # Errors
    /// `indptr` is empty, does not start at 0, or decreases.
    ///
    /// ```
    /// # use flashinfer_rs::RaggedIndices;
    /// let queries = RaggedIndices::new(vec![0, 5, 5, 6])?;
    /// assert_eq!([queries.len(0), queries.len(1), queries.len(2)], [5, 0, 1]);
    /// assert!(RaggedIndices::new(vec![0, 3, 2]).is_err());
    /// # Ok::<(), flashinfer_rs::FlashInferError>(())
    /// ```
    pub fn new(indptr: Vec<i32>) -> Result<Self> {
        let end = indptr.last().and_then(|&last| usize::try_from(last).ok()).unwrap_or_default();
        check_indptr("RaggedIndices", "indptr", &indptr, end)?;
        Ok(Self { indptr })
    }

    /// Offsets from each request's number of rows.
    ///
    /// # Errors
    /// There are 2³¹ rows or more.
    pub fn from_lens(lens: impl IntoIterator<Item = usize>) -> Result<Self> {
        let mut indptr = vec![0i32];
        let mut end = 0usize;
        for len in lens {
            end = end.saturating_add(len);
            let Ok(end) = i32::try_from(end) else {
                return Err(FlashInferError::invalid(
                    "RaggedIndices",
                    "lens",
                    format!("{end} rows; offsets are 32-bit, so at most {}", i32::MAX),
                ));
            };
            indptr.push(end);
        }
        Ok(Self { indptr })
    }

    /// As [`from_lens`](Self::from_lens), in place, for fewer than 2³¹ rows.
    pub(super) fn refill(&mut self, lens: impl Iterator<Item = usize>) {
        self.indptr.truncate(1);
        let mut end = 0;
        self.indptr.extend(lens.map(|len| {
            end += len as i32;
            end
        }));
    }

    /// The number of requests.
    pub fn batch_size(&self) -> usize {
        self.indptr.len() - 1
    }

    /// The offsets.
    pub fn indptr(&self) -> &[i32] {
        &self.indptr
    }

    /// The number of rows of one request.
    ///
    /// # Panics
    /// If there is no such request.
    pub fn len(&self, request: usize) -> usize {
        (self.indptr[request + 1] - self.indptr[request]) as usize
    }

    /// The number of rows of all requests.
    pub fn total(&self) -> usize {
        self.indptr[self.indptr.len() - 1] as usize
    }
}

/// Page numbers and places in a page fit 31 bits.
pub(super) fn check_cache_size(op: &'static str, num_pages: usize, page_size: usize) -> Result<()> {
    if num_pages > i32::MAX as usize {
        let problem = format!("{num_pages}; page numbers are 32-bit, so at most {}", i32::MAX);
        return Err(FlashInferError::invalid(op, "num_pages", problem));
    }
    if page_size == 0 || page_size > i32::MAX as usize {
        let problem = format!("{page_size}; a page holds at least one token, and at most {}", i32::MAX);
        return Err(FlashInferError::invalid(op, "page_size", problem));
    }
    Ok(())
}

/// A table with so many entries in `indptr` and in `indices` can be counted in
/// 31 bits.
pub(super) fn check_table_size(
    op: &'static str,
    offsets: usize,
    pages: usize,
    page_size: usize,
) -> Result<()> {
    if pages.saturating_add(offsets) > i32::MAX as usize {
        let problem = "pages and requests together must be fewer than 2^31";
        return Err(FlashInferError::invalid(op, "indptr", problem));
    }
    if pages.checked_mul(page_size).is_none_or(|slots| slots > i32::MAX as usize) {
        let problem = format!(
            "{pages} pages of {page_size} tokens; the kernels count at most {} token slots",
            i32::MAX
        );
        return Err(FlashInferError::invalid(op, "indices", problem));
    }
    Ok(())
}

/// `indptr` starts at 0, does not decrease and ends at `end`.
fn check_indptr(op: &'static str, argument: &'static str, indptr: &[i32], end: usize) -> Result<()> {
    let invalid = |problem: String| Err(FlashInferError::invalid(op, argument, problem));
    let (Some(&first), Some(&last)) = (indptr.first(), indptr.last()) else {
        return invalid("empty; it has one entry more than there are requests".into());
    };
    if first != 0 {
        return invalid(format!("starts at {first}; it must start at 0"));
    }
    if let Some(at) = indptr.windows(2).position(|pair| pair[0] > pair[1]) {
        return invalid(format!("decreases from {} to {} at entry {}", indptr[at], indptr[at + 1], at + 1));
    }
    if usize::try_from(last) != Ok(end) {
        return invalid(format!("ends at {last}, but there are {end} entries to delimit"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem<T: std::fmt::Debug>(result: Result<T>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn page_tables_are_checked() {
        let new = |indptr: &[i32], indices: &[i32], last: &[i32]| {
            PageIndices::new(4, 16, indptr.to_vec(), indices.to_vec(), last.to_vec())
        };
        let table = new(&[0, 2, 2, 3], &[3, 0, 1], &[1, 0, 16]).unwrap();
        assert_eq!([table.seq_len(0), table.seq_len(1), table.seq_len(2)], [17, 0, 16]);
        assert_eq!(table.pages(0), [3, 0]);
        assert!(problem(new(&[], &[], &[])).contains("empty"));
        assert!(problem(new(&[1, 2], &[0, 1], &[1])).contains("must start at 0"));
        assert!(problem(new(&[0, 2, 1], &[0], &[1, 1])).contains("decreases"));
        assert!(problem(new(&[0, 1], &[0, 1], &[1])).contains("ends at 1"));
        assert!(problem(new(&[0, 1], &[0], &[1, 1])).contains("last_page_len"));
        assert!(problem(new(&[0, 1], &[4], &[1])).contains("page 4, outside 0..4"));
        assert!(problem(new(&[0, 1], &[-1], &[1])).contains("page -1"));
        for bad in [0, 17, -1] {
            assert!(problem(new(&[0, 1], &[0], &[bad])).contains("1..=16"));
        }
        assert!(problem(new(&[0, 0], &[], &[1])).contains("0..=0"));
        assert!(problem(PageIndices::new(4, 0, vec![0], vec![], vec![])).contains("page_size"));
        let many = PageIndices::new(4, i32::MAX as usize, vec![0, 2], vec![0, 0], vec![1]);
        assert!(problem(many).contains("token slots"));
        // Also where no request has a page.
        for page_size in [0, 1 << 31, 1 << 32, usize::MAX] {
            assert!(
                problem(PageIndices::new(4, page_size, vec![0, 0], vec![], vec![0])).contains("page_size")
            );
        }
    }

    #[test]
    fn requests_and_padding() {
        let table =
            PageIndices::from_requests(9, 4, [(&[8, 1][..], 5), (&[][..], 0), (&[2][..], 4)]).unwrap();
        assert_eq!(table.indptr(), [0, 2, 2, 3]);
        assert_eq!(table.last_page_len(), [1, 0, 4]);
        assert!(problem(PageIndices::from_requests(9, 4, [(&[8][..], 5)])).contains("need 2 pages"));
        let padded = table.pad_to(5).unwrap();
        assert_eq!(
            (padded.indptr(), padded.last_page_len()),
            (&[0, 2, 2, 3, 3, 3][..], &[1, 0, 4, 0, 0][..])
        );
        assert!(problem(padded.clone().pad_to(4)).contains("cannot be padded"));
        assert!(problem(padded.pad_to(usize::MAX)).contains("fewer than 2^31"));
    }

    #[test]
    fn ragged_offsets_are_checked() {
        let ragged = RaggedIndices::new(vec![0, 3, 3, 4]).unwrap();
        assert_eq!((ragged.batch_size(), ragged.total()), (3, 4));
        assert_eq!([ragged.len(0), ragged.len(1), ragged.len(2)], [3, 0, 1]);
        let from_lens = RaggedIndices::from_lens([3, 0, 1]).unwrap();
        assert_eq!(from_lens.indptr(), ragged.indptr());
        assert_eq!(RaggedIndices::new(vec![0]).unwrap().total(), 0);
        assert_eq!(RaggedIndices::from_lens([]).unwrap().batch_size(), 0);
        assert!(problem(RaggedIndices::new(vec![])).contains("empty"));
        assert!(problem(RaggedIndices::new(vec![1, 2])).contains("must start at 0"));
        assert!(problem(RaggedIndices::new(vec![-1, 2])).contains("must start at 0"));
        assert!(problem(RaggedIndices::new(vec![0, 2, 1])).contains("decreases"));
        assert!(problem(RaggedIndices::new(vec![0, -1])).contains("decreases"));
        assert!(problem(RaggedIndices::from_lens([1 << 30, 1 << 30])).contains("32-bit"));
        assert!(problem(RaggedIndices::from_lens([usize::MAX, 1])).contains("32-bit"));
    }

    #[test]
    fn appended_tokens_are_checked() {
        let table =
            PageIndices::from_requests(9, 4, [(&[8, 1][..], 5), (&[][..], 0), (&[2][..], 4)]).unwrap();
        let last = AppendIndices::last_tokens(&table, &[0, 2, 2, 3]).unwrap();
        assert_eq!((last.batch_indices(), last.positions()), (&[0, 0, 2][..], &[3, 4, 3][..]));
        assert_eq!(last.num_positions(), 5);
        assert!(problem(AppendIndices::last_tokens(&table, &[0, 6, 6, 6])).contains("must already count"));
        assert!(
            problem(AppendIndices::last_tokens(&table, &[0, i32::MAX, i32::MAX, i32::MAX]))
                .contains("already")
        );
        assert!(problem(AppendIndices::last_tokens(&table, &[0, 1])).contains("table of 3 requests"));
        assert!(problem(AppendIndices::last_tokens(&table, &[0, 1, 0, 0])).contains("decreases"));
        assert!(problem(AppendIndices::new(&table, vec![3], vec![0])).contains("there are 3"));
        assert!(problem(AppendIndices::new(&table, vec![-1], vec![0])).contains("request -1"));
        assert!(problem(AppendIndices::new(&table, vec![0], vec![5])).contains("has 5 tokens"));
        assert!(problem(AppendIndices::new(&table, vec![1], vec![0])).contains("has 0 tokens"));
        assert!(problem(AppendIndices::new(&table, vec![0], vec![])).contains("0 entries for 1"));
    }
}
