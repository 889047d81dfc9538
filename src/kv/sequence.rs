//! A sequence: its length and its pages.

use super::pages::{PageAllocator, Pages};
use crate::{error::Result, indices::RequestPages};

/// The pages of one sequence of tokens of one model, in order.
///
/// It counts tokens and owns pages; token ids are the caller's, keys and values
/// the [`PagedKvCache`](super::PagedKvCache)'s. Pages may be shared: with forks,
/// and with a [`PrefixCache`](super::PrefixCache). Full pages are never written
/// again, so they stay shared. Before tokens go to a last page that others
/// use, too, that page is replaced by a copy (see
/// [`PagedKvCache::copy_pages`](super::PagedKvCache::copy_pages)), so no
/// sequence ever sees another one's tokens.
///
/// Dropping a sequence gives its pages back. Work on them that is already in
/// the order of the cache's stream comes before whatever the next owner
/// enqueues there.
#[derive(Debug)]
pub struct Sequence {
    pages: Pages,
    len: usize,
}

impl Sequence {
    /// A sequence without tokens and pages.
    pub fn new(allocator: &PageAllocator) -> Self {
        Self { pages: Pages::none(allocator), len: 0 }
    }

    /// A sequence of full pages.
    pub(super) fn of_full_pages(pages: Pages) -> Self {
        let len = pages.numbers().len() * pages.allocator().page_size();
        Self::of_pages(pages, len)
    }

    /// A sequence of so many tokens in pages, of which there are as many as these need.
    pub(super) fn of_pages(pages: Pages, len: usize) -> Self {
        Self { pages, len }
    }

    /// The pool that the pages are of.
    pub fn allocator(&self) -> &PageAllocator {
        self.pages.allocator()
    }

    /// The number of tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The numbers of the pages that hold the tokens.
    pub fn pages(&self) -> &[i32] {
        self.pages.numbers()
    }

    /// Tokens in the last page; 0 if there is none.
    pub fn last_page_len(&self) -> usize {
        self.len - self.pages().len().saturating_sub(1) * self.page_size()
    }

    /// The pages as index arrays take them.
    pub(super) fn request_pages(&self) -> RequestPages<'_> {
        RequestPages { pages: self.pages(), last_page_len: self.last_page_len() }
    }

    fn page_size(&self) -> usize {
        self.allocator().page_size()
    }

    /// Makes room for further tokens, whose keys and values are to be written
    /// next.
    ///
    /// # Errors
    /// [`OutOfPages`](crate::FlashInferError::OutOfPages). Nothing changed.
    pub fn append(&mut self, tokens: usize) -> Result<()> {
        let mut reserve = self.allocator().allocate(self.pages_needed(tokens))?;
        self.append_from(tokens, &mut reserve);
        Ok(())
    }

    /// The pages that appending so many tokens takes from the pool now, the one
    /// for a copy of the last page included.
    pub fn pages_needed(&self, tokens: usize) -> usize {
        let mut written: Vec<i32> = self.written_page(tokens).into_iter().collect();
        self.allocator().copies_needed(&mut written) + self.further_pages(tokens)
    }

    /// The page that an append writes to and that is part of the sequence now.
    pub(super) fn written_page(&self, tokens: usize) -> Option<i32> {
        let partial = tokens > 0 && !self.len.is_multiple_of(self.page_size());
        self.pages().last().copied().filter(|_| partial)
    }

    /// The pages that an append adds to the sequence.
    pub(super) fn further_pages(&self, tokens: usize) -> usize {
        self.len.saturating_add(tokens).div_ceil(self.page_size()) - self.pages().len()
    }

    /// Appends with pages that were reserved.
    pub(super) fn append_from(&mut self, tokens: usize, reserve: &mut Pages) {
        if self.written_page(tokens).is_some() {
            self.pages.own_last(reserve);
        }
        for _ in 0..self.further_pages(tokens) {
            self.pages.take(reserve);
        }
        self.len += tokens;
    }

    /// Another sequence of the same tokens, which shares all pages. It takes no
    /// page from the pool until one of the two appends to a last page that is
    /// not full.
    ///
    /// What that append copies is what is in the page when the copy is made, so
    /// keys and values of the common tokens have to be written, or enqueued,
    /// before it.
    pub fn fork(&self) -> Self {
        let mut pages = Pages::none(self.allocator());
        pages.share(&self.pages, 0..self.pages().len());
        Self { pages, len: self.len }
    }

    /// Takes back all tokens but the first `len`, such as drafts that were not
    /// accepted, and gives back the pages that then hold none. Nothing happens
    /// if there are no more than `len`.
    pub fn truncate(&mut self, len: usize) {
        if len < self.len {
            self.len = len;
            self.pages.truncate(len.div_ceil(self.page_size()));
        }
    }

    pub(super) fn owned(&self) -> &Pages {
        &self.pages
    }
}
