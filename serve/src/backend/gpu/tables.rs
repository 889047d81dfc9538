//! The index arrays of steps, with room for the largest so far.

use flashinfer_rs::{
    FlashInferError, Result, Stream,
    indices::PageTable,
    kv::{Batch, BatchCapacity, BatchTables, PageAllocator, PagedKvCache},
};

/// The most rows of a step that is decode row by row.
pub const MOST_ROWS: usize = 64;
/// The most keys that its rows read in all: each reads those of its sequence by itself, which costs
/// little where they are few.
const MOST_KEYS: usize = 16384;

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

/// How a step can be decode, whose requests have one new token each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decode {
    /// They are the batch's.
    ByRequest,
    /// Each new token is one, as where drafts are checked.
    ByRow,
}

impl Decode {
    /// How a step of so many outputs can be decode; `None` if it is to be prefill. Steps in which
    /// requests have several new tokens can, if they are small and each row has an output: those
    /// that check drafts.
    pub fn of(batch: &Batch, outputs: usize) -> Option<Self> {
        if batch.queries().indptr().windows(2).all(|pair| pair[1] - pair[0] == 1) {
            return Some(Self::ByRequest);
        }
        let positions = batch.append_indices().positions();
        if positions.len() != outputs || outputs > MOST_ROWS {
            return None;
        }
        let keys = positions.iter().map(|&position| position as usize + 1).sum::<usize>();
        (keys <= MOST_KEYS).then_some(Self::ByRow)
    }
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
    /// With room for steps of so many tokens, and for all that are decode by row. `by_row` has
    /// prefill treat each new token as a request of its own, too.
    pub fn new(stream: &Stream, pool: &PageAllocator, tokens: usize, by_row: bool) -> Result<Self> {
        let pages = (pool.num_pages() + tokens).max(most_pages_by_row(pool.page_size()));
        let capacity = BatchCapacity { requests: tokens, pages, tokens };
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

    /// Uploads the index arrays of a step that [can be](Decode::of) this, for a graph of `requests`,
    /// unless no page is free for the requests that the graph has beyond the step's.
    pub fn upload_decode(
        &mut self,
        decode: Decode,
        batch: &Batch,
        cache: &mut PagedKvCache,
        requests: usize,
    ) -> Result<Uploaded> {
        let uploaded = match decode {
            Decode::ByRequest => self.tables.update_padded(batch, cache, requests),
            Decode::ByRow => self.tables.update_by_row(batch, cache, requests),
        };
        match uploaded {
            Err(FlashInferError::OutOfPages { .. }) => Ok(Uploaded::Prefill),
            updated => updated.map(|()| Uploaded::Decode),
        }
    }

    /// Uploads the index arrays of any step.
    pub fn upload_prefill(&mut self, batch: &Batch, cache: &mut PagedKvCache) -> Result<()> {
        self.tables.update(batch, cache)?;
        if self.by_row {
            self.rows = Some(PageTable::new(&self.stream, batch.pages_by_row()?)?);
        }
        Ok(())
    }
}

/// Pages, each once for each row that reads it, of a step that is decode by row and filled up: a row
/// of `n` keys has fewer than `n / page_size + 1`, and one that fills up has 1.
fn most_pages_by_row(page_size: usize) -> usize {
    MOST_KEYS / page_size + MOST_ROWS
}

#[cfg(test)]
mod tests {
    use flashinfer_rs::kv::Sequence;

    use super::*;

    /// A batch of requests that have some tokens, and then get others.
    fn batch(pool: &PageAllocator, requests: &[(usize, usize)]) -> Batch {
        let mut batch = Batch::new(pool);
        requests.iter().for_each(|_| batch.push(Sequence::new(pool)).unwrap());
        batch.append(requests.iter().map(|&(cached, _)| cached)).unwrap();
        batch.append(requests.iter().map(|&(_, new)| new)).unwrap();
        batch
    }

    #[test]
    fn small_steps_of_drafts_are_decode_by_row() {
        let pool = PageAllocator::new(4000, 16).unwrap();
        let of = |requests: &[(usize, usize)], outputs| Decode::of(&batch(&pool, requests), outputs);
        assert_eq!(of(&[(9, 1), (0, 1), (300, 1)], 3), Some(Decode::ByRequest));
        // Whatever is wanted of them, and however long they are.
        assert_eq!(of(&[(20_000, 1), (5, 1)], 1), Some(Decode::ByRequest));
        assert_eq!(of(&[(9, 4), (20, 1), (7, 0)], 5), Some(Decode::ByRow));
        assert_eq!(of(&[(9, 1), (7, 0)], 1), Some(Decode::ByRow));
        // A prompt, of which the last row alone has an output.
        assert_eq!(of(&[(9, 4), (0, 3)], 5), None);
        assert_eq!(of(&[(0, MOST_ROWS)], MOST_ROWS), Some(Decode::ByRow));
        assert_eq!(of(&[(0, MOST_ROWS), (5, 1)], MOST_ROWS + 1), None);
        // Keys: 8190 and 8191 and 3, or one more.
        assert_eq!(of(&[(8189, 2), (2, 1)], 3), Some(Decode::ByRow));
        assert_eq!(of(&[(8189, 2), (3, 1)], 3), None);
    }

    #[test]
    fn there_is_room_for_the_pages_of_all_rows() {
        for page_size in [1, 3, 16, 1000] {
            let pool = PageAllocator::new(20_000, page_size).unwrap();
            for requests in [
                vec![(8190, 2)],
                vec![(0, MOST_ROWS)],
                // As many rows as there may be, whose last pages have one token each.
                (0..MOST_ROWS / 2).map(|_| (240 / page_size * page_size, 2)).collect(),
            ] {
                let batch = batch(&pool, &requests);
                let rows = batch.queries().total();
                assert_eq!(Decode::of(&batch, rows), Some(Decode::ByRow));
                let filled_up = rows.next_power_of_two() - rows;
                let pages = batch.pages_by_row().unwrap().indices().len() + filled_up;
                assert!(pages <= most_pages_by_row(page_size), "{pages} of {page_size}");
            }
        }
    }
}
