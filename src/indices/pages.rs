//! Page tables: which pages of a cache hold each request's tokens.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{
    check_indptr,
    table::{Array, Arrays, MAX_ARRAYS, OnDevice},
};
use crate::{
    capture::Facts,
    error::{FlashInferError, Result},
    stream::Stream,
    tensor::RawTensor,
};

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

/// The pages of one request, which lie inside the cache, and how many tokens
/// the last of them holds.
#[derive(Clone, Copy)]
pub(crate) struct RequestPages<'a> {
    pub(crate) pages: &'a [i32],
    pub(crate) last_page_len: usize,
}

impl AsRef<Self> for PageIndices {
    fn as_ref(&self) -> &Self {
        self
    }
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
    pub(crate) fn none(num_pages: usize, page_size: usize) -> Self {
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
    /// decode step captured for that batch size needs, if it appends nothing:
    /// a new token has to be written to some page. For steps of a
    /// [`kv::Batch`](crate::kv::Batch) there is
    /// [`BatchTables::update_padded`](crate::kv::BatchTables::update_padded).
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
    pub(crate) fn push(&mut self, request: RequestPages<'_>) {
        self.stamp = next_stamp();
        self.indices.extend_from_slice(request.pages);
        self.indptr.push(self.indices.len() as i32);
        self.last_page_len.push(request.last_page_len as i32);
    }

    /// Leaves a request out.
    pub(crate) fn remove(&mut self, request: usize) {
        self.cut(request, 0);
        self.indptr.remove(request);
        self.last_page_len.remove(request);
    }

    /// A request has lost its last tokens.
    pub(crate) fn shrink(&mut self, request: usize, kept: RequestPages<'_>) {
        self.cut(request, kept.pages.len());
        self.last_page_len[request] = kept.last_page_len as i32;
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

    /// The requests have got more tokens, and lie in these pages. Of those that
    /// they had, only the last of each may be another one now.
    ///
    /// Moves what lies behind the first request with a further page, from the
    /// end, and reads no other page numbers than those that may be new.
    pub(crate) fn grow<'r>(
        &mut self,
        requests: impl DoubleEndedIterator<Item = RequestPages<'r>> + ExactSizeIterator + Clone,
    ) {
        self.stamp = next_stamp();
        let mut end = requests.clone().map(|request| request.pages.len()).sum();
        self.indices.resize(end, 0);
        for (request, RequestPages { pages, last_page_len }) in requests.enumerate().rev() {
            let (old_start, old_end) = (self.indptr[request] as usize, self.indptr[request + 1] as usize);
            let (start, kept) = (end - pages.len(), (old_end - old_start).saturating_sub(1));
            if start > old_start {
                self.indices.copy_within(old_start..old_start + kept, start);
            }
            self.indices[start + kept..end].copy_from_slice(&pages[kept..]);
            self.indptr[request + 1] = end as i32;
            self.last_page_len[request] = last_page_len as i32;
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
        let full_pages = self.indptr.windows(2).map(|pair| (pair[1] - pair[0] - 1).max(0));
        let page_size = self.page_size as i32;
        full_pages.zip(&self.last_page_len).map(|(full, last)| full * page_size + last).collect()
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

impl Arrays for PageIndices {
    fn facts(&self) -> Facts {
        Facts { stamp: self.stamp, ..Facts::of([self.batch_size(), self.num_pages, self.page_size]) }
    }
    const OP: &'static str = "PageTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        [Array::I32(&self.indptr), Array::I32(&self.last_page_len), Array::I32(&self.indices)]
    }
}

/// A page table on a device. See [`PageIndices`].
pub type PageTable = OnDevice<PageIndices>;

impl PageTable {
    /// Uploads a page table, with room for up to `max_batch` requests and
    /// `max_pages` page numbers in later updates.
    ///
    /// # Errors
    /// As [`new`](Self::new); also when the table is larger than its capacity.
    pub fn with_capacity(
        stream: &Stream,
        host: PageIndices,
        max_batch: usize,
        max_pages: usize,
    ) -> Result<Self> {
        let (batch, pages) = (host.batch_size(), host.indices.len());
        if batch > max_batch || pages > max_pages {
            return Err(FlashInferError::invalid(
                "PageTable",
                "capacity",
                format!("{batch} requests with {pages} pages for a capacity of {max_batch} with {max_pages}"),
            ));
        }
        Self::allocate(stream, host, [max_batch.saturating_add(1), max_batch, max_pages])
    }

    /// A page table whose device arrays (`indptr`, `indices`, `last_page_len`,
    /// all `i32`) exist already, for example because a kernel made them.
    ///
    /// # Safety
    /// Whenever work that uses the table runs on `stream`, the device arrays
    /// must hold exactly the values of `host`, and must not have been written
    /// by the kernel directly before it (kernels launched with PDL read them
    /// early). They must stay allocated for as long as the table and that work
    /// live.
    pub unsafe fn from_device_unchecked(
        stream: &Stream,
        host: PageIndices,
        indptr: *const i32,
        indices: *const i32,
        last_page_len: *const i32,
    ) -> Self {
        Self::borrowed(stream, host, [indptr.cast(), last_page_len.cast(), indices.cast()])
    }

    pub(crate) fn indptr(&self) -> Result<RawTensor> {
        self.array(0)
    }

    pub(crate) fn last_page_len(&self) -> Result<RawTensor> {
        self.array(1)
    }

    pub(crate) fn indices(&self) -> Result<RawTensor> {
        self.array(2)
    }
}

/// Page numbers and places in a page fit 31 bits.
pub(crate) fn check_cache_size(op: &'static str, num_pages: usize, page_size: usize) -> Result<()> {
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
pub(crate) fn check_table_size(
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::indices::problem;

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
}
