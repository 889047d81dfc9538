//! The sequences of a batch, and index arrays that follow them step by step.

use std::iter::repeat_n;

use super::{PageAllocator, PagedKvCache, Sequence};
use crate::{
    error::{FlashInferError, Result},
    indices::{
        AppendIndices, AppendTable, HostSlotMapping, PageIndices, PageTable, RaggedIndices, RaggedTable,
        SlotMapping, check_table_size,
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
/// [`BatchTables::update_padded`] fills a smaller batch up.
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
        let Some(further) = requests.checked_sub(batch.len()) else {
            let problem = format!("{requests}; the batch has {} already", batch.len());
            return Err(FlashInferError::invalid("BatchTables", "requests", problem));
        };
        if further == 0 {
            return self.update(batch, cache);
        }
        self.check(batch, cache)?;
        check_table_size(
            "BatchTables",
            requests.saturating_add(1),
            batch.pages().indices().len().saturating_add(further),
            batch.allocator.page_size(),
        )?;
        let padding = match self.padding.take() {
            Some(padding) => padding,
            None => {
                let mut padding = Sequence::new(&batch.allocator);
                padding.append(1)?;
                padding
            }
        };
        let padding = self.padding.insert(padding);
        let mut pages = batch.pages().clone();
        repeat_n(padding.request_pages(), further).for_each(|request| pages.push(request));
        let tokens = batch.queries().indptr().windows(2).map(|pair| (pair[1] - pair[0]) as usize);
        let queries = RaggedIndices::from_lens(tokens.chain(repeat_n(1, further)))?;
        let append = AppendIndices::last_tokens(&pages, queries.indptr())?;
        cache.copy_pages()?;
        self.upload_arrays(pages, &queries, append)
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

/// The pages of a batch, for plans of one query for each request.
impl<'t> From<&'t BatchTables> for &'t PageTable {
    fn from(tables: &'t BatchTables) -> Self {
        &tables.pages
    }
}
