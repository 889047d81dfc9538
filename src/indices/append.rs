//! Destinations of appended tokens.

use super::{
    PageIndices, PageTable, check_indptr,
    table::{Array, Arrays, MAX_ARRAYS, OnDevice},
};
use crate::{
    capture::Facts,
    error::{FlashInferError, Result},
    stream::Stream,
    tensor::RawTensor,
};

/// Where appended tokens go: for each, its request and its position there.
#[derive(Clone, Debug)]
pub struct AppendIndices {
    pub(super) batch_indices: Vec<i32>,
    pub(super) positions: Vec<i32>,
    /// All positions are below this.
    num_positions: usize,
    /// The page table that the entries were checked against.
    table_stamp: u64,
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
    pub(crate) fn none(table: &PageIndices) -> Self {
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
    pub(crate) fn refill(&mut self, table: &PageIndices, append_indptr: &[i32]) {
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

impl Arrays for AppendIndices {
    fn facts(&self) -> Facts {
        Facts { below: self.num_positions, stamp: self.table_stamp, ..Facts::of([self.positions.len()]) }
    }
    const OP: &'static str = "AppendTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        [Array::I32(&self.batch_indices), Array::I32(&self.positions), Array::EMPTY]
    }
}

/// Where new tokens go in a paged cache: the pages of all requests, and the request and the
/// position of each token that is new.
///
/// A step's tables are one: [`BatchTables::slots`](crate::kv::BatchTables::slots). The CPU
/// reference takes it of values on the host: [`Batch::slots`](crate::kv::Batch::slots).
#[derive(Debug)]
pub struct SlotMapping<'a, A = AppendTable, P = PageTable> {
    /// Each new token's request and position.
    pub append: &'a A,
    /// The pages, which already count the new tokens.
    pub pages: &'a P,
}

/// A [`SlotMapping`] on the host.
pub type HostSlotMapping<'a> = SlotMapping<'a, AppendIndices, PageIndices>;

impl<'a, A, P> SlotMapping<'a, A, P> {
    /// Of arrays of one's own. Operations refuse an `append` that was checked against other pages.
    pub fn new(append: &'a A, pages: &'a P) -> Self {
        Self { append, pages }
    }
}

impl HostSlotMapping<'_> {
    /// Refuses arrays of different states of a batch.
    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        if self.append.table_stamp == self.pages.stamp {
            return Ok(());
        }
        Err(FlashInferError::invalid(
            op,
            "append",
            "it was checked against another page table; make AppendIndices from the current PageIndices",
        ))
    }
}

/// Destinations of appended tokens on a device. See [`AppendIndices`].
pub type AppendTable = OnDevice<AppendIndices>;

impl AppendTable {
    /// Uploads destinations, with room for up to `max_tokens` in later updates.
    ///
    /// # Errors
    /// As [`new`](Self::new); also when there are more tokens than that.
    pub fn with_capacity(stream: &Stream, host: AppendIndices, max_tokens: usize) -> Result<Self> {
        let room = (host.len(), max_tokens, "tokens");
        Self::allocate_for(stream, host, room, [max_tokens, max_tokens, 0])
    }

    pub(crate) fn batch_indices(&self) -> Result<RawTensor> {
        self.array(0)
    }

    pub(crate) fn positions(&self) -> Result<RawTensor> {
        self.array(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::indices::problem;

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
