//! The index arrays of steps, with room for the largest so far.

use flashinfer_rs::{
    FlashInferError, Result, Stream,
    indices::{PageIndices, PageTable},
    kv::{Batch, BatchCapacity, BatchTables, PageAllocator, PagedKvCache},
};

/// Index arrays whose addresses stay until a larger batch comes.
pub struct Tables {
    stream: Stream,
    capacity: BatchCapacity,
    pub tables: BatchTables,
    /// Whether prefill treats each new token as a request of its own.
    by_row: bool,
    /// The pages of each new token of a step of prefill that does.
    pub rows: Option<PageTable>,
}

/// What can compute a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uploaded {
    /// Decode, of as many requests as the graph has, whose index arrays were uploaded.
    Decode,
    /// Prefill.
    Prefill,
}

impl Tables {
    /// With room for steps of so many tokens. `by_row` has prefill treat each new token
    /// as a request of its own.
    pub fn new(stream: &Stream, pool: &PageAllocator, tokens: usize, by_row: bool) -> Result<Self> {
        let capacity = BatchCapacity { requests: tokens, pages: pool.num_pages() + tokens, tokens };
        let tables = BatchTables::new(stream, &Batch::new(pool), capacity)?;
        Ok(Self { stream: stream.clone(), capacity, tables, by_row, rows: None })
    }

    /// Makes room for a batch, filled up to so many requests. Returns whether the
    /// arrays have moved, which no graph follows.
    pub fn reserve(&mut self, batch: &Batch, requests: usize) -> Result<bool> {
        let now = self.capacity;
        let needed = BatchCapacity {
            requests: batch.len().max(requests),
            pages: batch.pages().indices().len() + requests,
            tokens: batch.queries().total().max(requests),
        };
        let grown = |now: usize, needed: usize| if needed > now { needed.max(2 * now) } else { now };
        self.capacity = BatchCapacity {
            requests: grown(now.requests, needed.requests),
            pages: grown(now.pages, needed.pages),
            tokens: grown(now.tokens, needed.tokens),
        };
        if self.capacity == now {
            return Ok(false);
        }
        self.tables = BatchTables::new(&self.stream, &Batch::new(batch.allocator()), self.capacity)?;
        Ok(true)
    }

    /// Whether a step can be decode: each request has one new token.
    pub fn may_decode(batch: &Batch) -> bool {
        batch.queries().indptr().windows(2).all(|pair| pair[1] - pair[0] == 1)
    }

    /// Uploads the index arrays of a step that [may be decode](Self::may_decode), for a graph of
    /// `requests`, unless no page is free for the requests that the graph has beyond the step's.
    pub fn upload_decode(
        &mut self,
        batch: &Batch,
        cache: &mut PagedKvCache,
        requests: usize,
    ) -> Result<Uploaded> {
        match self.tables.update_padded(batch, cache, requests) {
            Err(FlashInferError::OutOfPages { .. }) => Ok(Uploaded::Prefill),
            updated => updated.map(|()| Uploaded::Decode),
        }
    }

    /// Uploads the index arrays of any step.
    pub fn upload_prefill(&mut self, batch: &Batch, cache: &mut PagedKvCache) -> Result<()> {
        self.tables.update(batch, cache)?;
        if self.by_row {
            self.rows = Some(PageTable::new(&self.stream, pages_by_row(batch)?)?);
        }
        Ok(())
    }
}

/// The pages of each new token of a batch: those of its sequence up to itself.
fn pages_by_row(batch: &Batch) -> Result<PageIndices> {
    let (pages, tokens) = (batch.pages(), batch.append_indices());
    let rows = tokens.batch_indices().iter().zip(tokens.positions());
    let rows = rows.map(|(&request, &position)| {
        let len = position as usize + 1;
        (&pages.pages(request as usize)[..len.div_ceil(pages.page_size())], len)
    });
    PageIndices::from_requests(pages.num_pages(), pages.page_size(), rows)
}
