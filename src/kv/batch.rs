//! The sequences of a batch, and index arrays that follow them step by step.

use std::iter::repeat_n;

use super::{PageAllocator, PagedKvCache, Sequence};
use crate::{
    error::{FlashInferError, Result},
    indices::{
        AppendIndices, AppendTable, HostSlotMapping, PageIndices, PageTable, RaggedIndices, RaggedTable,
        RequestPages, SlotMapping, check_table_size,
    },
    stream::Stream,
};

const OP: &str = "Batch";

/// Sequences that a step computes together, and their index arrays.
///
/// The arrays are changed in place where the sequences change, and are not
/// checked again, because sequences name pages of their pool only. Appending a
/// token to each of `n` sequences takes time for `n` entries, and for moving
/// the page numbers behind the first sequence that gets a further page.
///
/// A request's number is its place in the batch. Removing one moves those
/// behind it forward.
///
/// A step that is captured into a CUDA graph has a fixed number of requests:
/// [`BatchTables::update_padded`] fills a smaller batch up. One in which requests have several new
/// tokens can use the same graph: [`BatchTables::update_by_row`].
#[derive(Debug)]
pub struct Batch {
    allocator: PageAllocator,
    sequences: Vec<Sequence>,
    pages: PageIndices,
    queries: RaggedIndices,
    append: AppendIndices,
    /// Room for a step's numbers of new tokens, and for the pages that it
    /// writes to.
    new_tokens: Vec<usize>,
    written: Vec<i32>,
}

impl Batch {
    /// A batch of no sequences.
    pub fn new(allocator: &PageAllocator) -> Self {
        let pages = PageIndices::none(allocator.num_pages(), allocator.page_size());
        Self {
            allocator: allocator.clone(),
            sequences: Vec::new(),
            queries: RaggedIndices::none(),
            append: AppendIndices::none(&pages),
            pages,
            new_tokens: Vec::new(),
            written: Vec::new(),
        }
    }

    /// The pool that the sequences are of.
    pub fn allocator(&self) -> &PageAllocator {
        &self.allocator
    }

    /// The sequences, by request.
    pub fn sequences(&self) -> &[Sequence] {
        &self.sequences
    }

    /// The number of requests.
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    /// Whether there are no requests.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// The pages of all tokens, those of the last step included.
    pub fn pages(&self) -> &PageIndices {
        &self.pages
    }

    /// The tokens of the last [`append`](Self::append), by request: the rows of
    /// queries, keys and values. None after any other change.
    pub fn queries(&self) -> &RaggedIndices {
        &self.queries
    }

    /// The request and the position of each token of the last
    /// [`append`](Self::append). None after any other change.
    pub fn append_indices(&self) -> &AppendIndices {
        &self.append
    }

    /// The pages of each token of the last [`append`](Self::append), as if it were a request of its
    /// own: those of its sequence up to itself. No requests after any other change.
    ///
    /// Where keys and values of all new tokens are written before attention, decode over these
    /// pages is what causal prefill is over [`pages`](Self::pages): a token at position `p` sees
    /// positions `0..=p`. It reads the keys of a sequence once for each of its new tokens.
    ///
    /// # Errors
    /// The rows have 2³¹ token slots or more in all.
    ///
    /// ```
    /// # use flashinfer_rs::kv::{Batch, PageAllocator, Sequence};
    /// let pool = PageAllocator::new(8, 4)?;
    /// let mut batch = Batch::new(&pool);
    /// batch.push(Sequence::new(&pool))?;
    /// batch.append([3])?;
    /// // A token and a draft of two.
    /// batch.append([3])?;
    /// let rows = batch.pages_by_row()?;
    /// assert_eq!(rows.seq_lens(), [4, 5, 6]);
    /// assert_eq!([0, 1, 2].map(|row| rows.pages(row).len()), [1, 2, 2]);
    /// # Ok::<(), flashinfer_rs::FlashInferError>(())
    /// ```
    pub fn pages_by_row(&self) -> Result<PageIndices> {
        let page_size = self.allocator.page_size();
        let tokens = self.append.batch_indices().iter().zip(self.append.positions());
        let rows = tokens.map(|(&request, &position)| {
            let (full, last) = (position as usize / page_size, position as usize % page_size);
            let pages = &self.pages.pages(request as usize)[..=full];
            RequestPages { pages, last_page_len: last + 1 }
        });
        let pages = rows.clone().map(|row| row.pages.len()).fold(0, usize::saturating_add);
        check_table_size(OP, rows.len() + 1, pages, page_size)?;
        let mut by_row = PageIndices::none(self.allocator.num_pages(), page_size);
        rows.for_each(|row| by_row.push(row));
        Ok(by_row)
    }

    /// Where the tokens of the last [`append`](Self::append) go, for the CPU reference.
    pub fn slots(&self) -> HostSlotMapping<'_> {
        SlotMapping::new(&self.append, &self.pages)
    }

    /// Adds a request, which becomes the last one.
    ///
    /// # Errors
    /// The sequence is of another pool, or the batch would have 2³¹ token slots
    /// or more. The sequence is dropped.
    pub fn push(&mut self, sequence: Sequence) -> Result<()> {
        if *sequence.allocator() != self.allocator {
            return Err(FlashInferError::invalid(OP, "sequence", "it is of another pool than the batch"));
        }
        self.check_size(1, sequence.pages().len())?;
        self.pages.push(sequence.request_pages());
        self.sequences.push(sequence);
        self.no_new_tokens();
        Ok(())
    }

    /// Takes a request out.
    ///
    /// # Errors
    /// There is no such request.
    pub fn remove(&mut self, request: usize) -> Result<Sequence> {
        self.check_request(request)?;
        self.pages.remove(request);
        let sequence = self.sequences.remove(request);
        self.no_new_tokens();
        Ok(sequence)
    }

    /// Takes back all tokens of a request but the first `len`. See
    /// [`Sequence::truncate`].
    ///
    /// # Errors
    /// There is no such request.
    pub fn truncate(&mut self, request: usize, len: usize) -> Result<()> {
        self.check_request(request)?;
        self.sequences[request].truncate(len);
        self.pages.shrink(request, self.sequences[request].request_pages());
        self.no_new_tokens();
        Ok(())
    }

    /// Makes room for new tokens, given for each request, in a step whose
    /// arrays are then [`pages`](Self::pages), [`queries`](Self::queries) and
    /// [`append_indices`](Self::append_indices).
    ///
    /// # Errors
    /// There are not as many numbers as requests, the batch would have 2³¹
    /// token slots or more, or
    /// [`OutOfPages`](FlashInferError::OutOfPages). Nothing changed, for no
    /// request.
    pub fn append(&mut self, new_tokens: impl IntoIterator<Item = usize>) -> Result<()> {
        self.new_tokens.clear();
        self.new_tokens.extend(new_tokens);
        let count = self.new_tokens.len();
        if count != self.len() {
            let problem = format!("{count} numbers of tokens for {} requests", self.len());
            return Err(FlashInferError::invalid(OP, "new_tokens", problem));
        }
        let requests = || self.sequences.iter().zip(self.new_tokens.iter().copied());
        let further = requests().map(|(sequence, tokens)| sequence.further_pages(tokens));
        let further = further.fold(0, usize::saturating_add);
        self.check_size(0, further)?;
        self.written.clear();
        self.written.extend(requests().filter_map(|(sequence, tokens)| sequence.written_page(tokens)));
        let copies = self.allocator.copies_needed(&mut self.written);
        let mut reserve = self.allocator.allocate(further + copies)?;
        for (sequence, &tokens) in self.sequences.iter_mut().zip(&self.new_tokens) {
            sequence.append_from(tokens, &mut reserve);
        }
        self.pages.grow(self.sequences.iter().map(Sequence::request_pages));
        self.queries.refill(self.new_tokens.iter().copied());
        self.append.refill(&self.pages, self.queries.indptr());
        Ok(())
    }

    fn no_new_tokens(&mut self) {
        self.set_new_tokens(repeat_n(0, self.len()));
    }

    /// Says how many of each request's tokens are new: no more than it has.
    pub(super) fn set_new_tokens(&mut self, new_tokens: impl Iterator<Item = usize>) {
        self.queries.refill(new_tokens);
        self.append.refill(&self.pages, self.queries.indptr());
    }

    fn check_request(&self, request: usize) -> Result<()> {
        if request < self.len() {
            return Ok(());
        }
        Err(FlashInferError::invalid(OP, "request", format!("{request}; the batch has {}", self.len())))
    }

    /// There may be so many requests and pages more.
    fn check_size(&self, requests: usize, pages: usize) -> Result<()> {
        let offsets = self.pages.indptr().len() + requests;
        let pages = self.pages.indices().len().saturating_add(pages);
        check_table_size(OP, offsets, pages, self.allocator.page_size())
    }
}

/// The largest batch that [`BatchTables`] have room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchCapacity {
    /// Requests.
    pub requests: usize,
    /// Page numbers of all requests.
    pub pages: usize,
    /// New tokens of all requests in a step.
    pub tokens: usize,
}

/// The index arrays of a [`Batch`] on the device, at addresses that stay, as
/// captured graphs need.
///
/// Plans over pages take them as they are, as do rotary embeddings, which turn
/// the new tokens by their positions.
#[derive(Debug)]
#[non_exhaustive]
pub struct BatchTables {
    /// [`Batch::pages`].
    pub pages: PageTable,
    /// [`Batch::queries`].
    pub queries: RaggedTable,
    /// [`Batch::append_indices`].
    pub append: AppendTable,
    /// The pool of the batches: a captured step has the memory of its cache in it.
    pool: PageAllocator,
    /// What requests beyond the batch's are of.
    padding: Option<Sequence>,
}

impl BatchTables {
    /// Uploads a batch, which may be empty.
    ///
    /// # Errors
    /// The batch is larger than the capacity; the runtime cannot be started;
    /// the stream is being captured; or [`Cuda`](FlashInferError::Cuda).
    pub fn new(stream: &Stream, batch: &Batch, capacity: BatchCapacity) -> Result<Self> {
        let BatchCapacity { requests, pages, tokens } = capacity;
        Ok(Self {
            pages: PageTable::with_capacity(stream, batch.pages().clone(), requests, pages)?,
            queries: RaggedTable::with_capacity(stream, batch.queries().clone(), requests)?,
            append: AppendTable::with_capacity(stream, batch.append_indices().clone(), tokens)?,
            pool: batch.allocator.clone(),
            padding: None,
        })
    }

    /// Where a step's new tokens go.
    pub fn slots(&self) -> SlotMapping<'_> {
        SlotMapping::new(&self.append, &self.pages)
    }

    /// Makes everything on the device ready for a step: copies the pages that
    /// are to be copied ([`PagedKvCache::copy_pages`]), then uploads the arrays,
    /// all in the order of the stream. To be called after the batch changed,
    /// and before the step is planned and enqueued or its graph replayed.
    ///
    /// # Errors
    /// Batch, cache and tables are not of one pool and one stream; the batch is
    /// larger than the capacity; the stream is being captured; or
    /// [`Cuda`](FlashInferError::Cuda). Arrays that belong to different states
    /// of the batch are not used together: operations refuse them.
    pub fn update(&mut self, batch: &Batch, cache: &mut PagedKvCache) -> Result<()> {
        self.check(batch, cache)?;
        cache.copy_pages()?;
        self.upload(batch)?;
        self.release_padding();
        Ok(())
    }

    /// As [`update`](Self::update), with further requests until there are
    /// `requests` of them, for a step that was captured for so many. Each of
    /// them has one token, which is new. What attention gives for them means
    /// nothing; leave their rows out.
    ///
    /// Their tokens have to be written somewhere: to a page that they share, and
    /// that these tables take from the pool. They keep it until the next
    /// `update`, or until [`release_padding`](Self::release_padding).
    ///
    /// # Errors
    /// As [`update`](Self::update); also when the batch has more requests, and
    /// [`OutOfPages`](FlashInferError::OutOfPages) when no page is free. Then
    /// nothing was uploaded.
    pub fn update_padded(&mut self, batch: &Batch, cache: &mut PagedKvCache, requests: usize) -> Result<()> {
        let further = further_requests("requests", batch.len(), requests)?;
        if further == 0 {
            return self.update(batch, cache);
        }
        self.check(batch, cache)?;
        let tokens = batch.queries().indptr().windows(2).map(|pair| (pair[1] - pair[0]) as usize);
        self.update_filled_up(batch.pages().clone(), tokens, further, cache)
    }

    /// As [`update_padded`](Self::update_padded), with each new token as a request of its own, which
    /// has the [pages of its row](Batch::pages_by_row), filled up to `rows` of them. So a step in
    /// which requests have several new tokens, such as drafts that are checked, is one of decode,
    /// and can use what was captured for `rows` requests of one token.
    ///
    /// [`pages`](Self::pages), [`queries`](Self::queries) and [`append`](Self::append) number rows
    /// then, in place of the batch's requests; each new token goes where it goes with `update`. The
    /// capacity has to be enough for so many requests, and for the pages of all rows.
    ///
    /// # Errors
    /// As [`update_padded`](Self::update_padded), of rows; also when these have 2³¹ token slots or
    /// more in all.
    pub fn update_by_row(&mut self, batch: &Batch, cache: &mut PagedKvCache, rows: usize) -> Result<()> {
        let tokens = batch.queries().total();
        let further = further_requests("rows", tokens, rows)?;
        self.check(batch, cache)?;
        self.update_filled_up(batch.pages_by_row()?, repeat_n(1, tokens), further, cache)
    }

    /// Uploads requests with these pages and so many new tokens each, and further ones, all after
    /// copying pages.
    fn update_filled_up(
        &mut self,
        pages: PageIndices,
        tokens: impl Iterator<Item = usize>,
        further: usize,
        cache: &mut PagedKvCache,
    ) -> Result<()> {
        check_table_size(
            "BatchTables",
            pages.indptr().len().saturating_add(further),
            pages.indices().len().saturating_add(further),
            pages.page_size(),
        )?;
        let padding = if further > 0 { Some(self.padding()?.request_pages()) } else { None };
        let (pages, queries, append) = filled_up(pages, tokens, repeat_n(padding, further).flatten())?;
        cache.copy_pages()?;
        self.upload_arrays(pages, &queries, append)?;
        if further == 0 {
            self.release_padding();
        }
        Ok(())
    }

    /// What further requests are of, taken from the pool if there is none.
    fn padding(&mut self) -> Result<&Sequence> {
        let padding = match self.padding.take() {
            Some(padding) => padding,
            None => {
                let mut padding = Sequence::new(&self.pool);
                padding.append(1)?;
                padding
            }
        };
        Ok(self.padding.insert(padding))
    }

    /// Gives the page of further requests back to the pool. To be called once
    /// the step is enqueued, which still writes to it: what comes later in the
    /// order of the stream can use it.
    pub fn release_padding(&mut self) {
        self.padding = None;
    }

    /// Refuses what belongs to other tables.
    fn check(&self, batch: &Batch, cache: &PagedKvCache) -> Result<()> {
        let invalid = |argument, problem| Err(FlashInferError::invalid("BatchTables", argument, problem));
        if *cache.allocator() != batch.allocator {
            return invalid("cache", "it is the memory of another pool than the batch's");
        }
        if cache.stream() != Some(self.pages.stream()) {
            return invalid("cache", "it is not on the stream of the tables");
        }
        if batch.allocator != self.pool {
            return invalid(
                "batch",
                "it is of another pool than the batches before; each pool has tables of its own",
            );
        }
        Ok(())
    }

    /// Replaces the arrays by those of a batch.
    pub(crate) fn upload(&mut self, batch: &Batch) -> Result<()> {
        self.upload_arrays(batch.pages().clone(), batch.queries(), batch.append_indices().clone())
    }

    fn upload_arrays(
        &mut self,
        pages: PageIndices,
        queries: &RaggedIndices,
        append: AppendIndices,
    ) -> Result<()> {
        self.pages.update(pages)?;
        // Steps that give each request one token have the same offsets.
        if self.queries.host().indptr() != queries.indptr() {
            self.queries.update(queries.clone())?;
        }
        self.append.update(append)
    }
}

/// How many requests are missing until there are `wanted`.
fn further_requests(argument: &'static str, has: usize, wanted: usize) -> Result<usize> {
    wanted.checked_sub(has).ok_or_else(|| {
        let problem = format!("{wanted}; the batch has {has} already");
        FlashInferError::invalid("BatchTables", argument, problem)
    })
}

/// The index arrays of requests with these pages and so many new tokens each, and then of further
/// ones of one token.
fn filled_up<'p>(
    mut pages: PageIndices,
    tokens: impl Iterator<Item = usize>,
    further: impl Iterator<Item = RequestPages<'p>>,
) -> Result<(PageIndices, RaggedIndices, AppendIndices)> {
    let requests = pages.batch_size();
    further.for_each(|request| pages.push(request));
    let queries = RaggedIndices::from_lens(tokens.chain(repeat_n(1, pages.batch_size() - requests)))?;
    let append = AppendIndices::last_tokens(&pages, queries.indptr())?;
    Ok((pages, queries, append))
}

/// The pages of a batch, for plans of one query for each request.
impl<'t> From<&'t BatchTables> for &'t PageTable {
    fn from(tables: &'t BatchTables) -> Self {
        &tables.pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where each new token is written: its page, and its place there.
    fn places(pages: &PageIndices, append: &AppendIndices) -> Vec<(i32, i32)> {
        let page_size = pages.page_size() as i32;
        let tokens = append.batch_indices().iter().zip(append.positions());
        let place = |(&request, &position): (&i32, &i32)| {
            (pages.pages(request as usize)[(position / page_size) as usize], position % page_size)
        };
        tokens.map(place).collect()
    }

    #[test]
    fn rows_are_written_where_their_requests_are() {
        let pool = PageAllocator::new(16, 4).unwrap();
        let mut batch = Batch::new(&pool);
        for _ in 0..4 {
            batch.push(Sequence::new(&pool)).unwrap();
        }
        batch.append([6, 3, 0, 8]).unwrap();
        let fork = batch.sequences()[0].fork();
        batch.push(fork).unwrap();
        // Drafts, one of them into a further page; nothing; a whole prompt; a fork's copied page.
        let new = [3, 1, 5, 0, 2];
        batch.append(new).unwrap();
        let mut padding = Sequence::new(&pool);
        padding.append(1).unwrap();
        let rows = new.iter().sum::<usize>();
        let by_row = batch.pages_by_row().unwrap();
        assert_eq!(by_row.seq_lens(), [7, 8, 9, 4, 1, 2, 3, 4, 5, 7, 8]);
        for further in [0, 5] {
            let of_padding = repeat_n(padding.request_pages(), further);
            let (pages, queries, append) = filled_up(by_row.clone(), repeat_n(1, rows), of_padding).unwrap();
            let offsets: Vec<_> = (0..=(rows + further) as i32).collect();
            assert_eq!(queries.indptr(), offsets);
            assert_eq!(pages.indices()[..by_row.indices().len()], *by_row.indices());
            assert!(SlotMapping::new(&append, &pages).check(OP).is_ok());
            let (places, own) = (places(&pages, &append), places(batch.pages(), batch.append_indices()));
            assert_eq!(places[..rows], own);
            assert_eq!(places[rows..], vec![(padding.pages()[0], 0); further]);
            assert!(!own.iter().any(|(page, _)| *page == padding.pages()[0]));
        }
        batch.truncate(0, 7).unwrap();
        assert_eq!(batch.pages_by_row().unwrap().batch_size(), 0);
    }

    #[test]
    fn fewer_requests_than_there_are_is_refused() {
        assert_eq!(further_requests("rows", 3, 8).unwrap(), 5);
        assert_eq!(further_requests("rows", 3, 3).unwrap(), 0);
        let problem = further_requests("rows", 3, 2).unwrap_err().to_string();
        assert!(problem.contains("rows") && problem.contains("2; the batch has 3 already"), "{problem}");
    }

    #[test]
    fn rows_that_are_too_many_to_count_are_refused() {
        // Sequences fit 31 bits, and what all their rows read does not.
        let pool = PageAllocator::new(1 << 16, 1).unwrap();
        let mut batch = Batch::new(&pool);
        batch.push(Sequence::new(&pool)).unwrap();
        batch.append([1 << 16]).unwrap();
        let problem = batch.pages_by_row().unwrap_err().to_string();
        assert!(problem.contains("2^31"), "{problem}");
    }
}
