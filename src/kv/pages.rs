//! The pool of pages: which are free, who else uses one, what is to be copied.

use std::{
    collections::VecDeque,
    fmt,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    error::{FlashInferError, Result},
    indices::check_cache_size,
};

/// A pool of pages of a KV cache, by their numbers.
///
/// It counts; the memory is a [`PagedKvCache`](super::PagedKvCache)'s, so a
/// pool works without a GPU. A page holds `page_size` tokens of one sequence,
/// of all layers. [`Sequence`](super::Sequence)s of any number of models draw
/// from one pool, and what one gives back another may get.
///
/// Every page has a number of owners: the sequences that it is part of, the
/// [`PrefixCache`](super::PrefixCache)s that hold it, and the copies yet to be
/// made from it. A page without owners is free. Owners give their pages back
/// when they are dropped, from whatever thread.
///
/// Clones are the same pool.
#[derive(Clone)]
pub struct PageAllocator {
    pool: Arc<Pool>,
}

struct Pool {
    num_pages: usize,
    page_size: usize,
    state: Mutex<PoolState>,
}

struct PoolState {
    /// How many own each page.
    owners: Vec<usize>,
    /// The pages without owners; the last is taken first.
    free: Vec<i32>,
    /// To be made in this order, before anybody writes to a page.
    copies: VecDeque<PageCopy>,
    has_storage: bool,
}

/// A page whose content another is to get. It owns the source until then, and
/// is dropped with the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCopy {
    /// Copied from.
    pub source: i32,
    /// Copied to.
    pub target: i32,
}

impl PoolState {
    /// Owners of a page that may look at it after all copies are made.
    fn users(&self, page: i32) -> usize {
        self.owners[page as usize] - self.copies.iter().filter(|copy| copy.source == page).count()
    }

    /// Takes one owner away. A page that becomes free needs no content, so a
    /// copy to it is dropped, which takes an owner from the copy's source.
    fn release(&mut self, page: i32) {
        let mut next = Some(page);
        while let Some(page) = next.take() {
            self.owners[page as usize] -= 1;
            if self.owners[page as usize] == 0 {
                self.free.push(page);
                let copy = self.copies.iter().position(|copy| copy.target == page);
                next = copy.and_then(|at| self.copies.remove(at)).map(|copy| copy.source);
            }
        }
    }
}

impl PageAllocator {
    /// A pool of `num_pages` free pages of `page_size` tokens.
    ///
    /// # Errors
    /// A page holds no token, or one of the numbers does not fit 31 bits.
    pub fn new(num_pages: usize, page_size: usize) -> Result<Self> {
        check_cache_size("PageAllocator", num_pages, page_size)?;
        let state = PoolState {
            owners: vec![0; num_pages],
            free: (0..num_pages as i32).rev().collect(),
            copies: VecDeque::new(),
            has_storage: false,
        };
        Ok(Self { pool: Arc::new(Pool { num_pages, page_size, state: Mutex::new(state) }) })
    }

    /// Pages in the pool.
    pub fn num_pages(&self) -> usize {
        self.pool.num_pages
    }

    /// Tokens in a page.
    pub fn page_size(&self) -> usize {
        self.pool.page_size
    }

    /// Pages that nobody owns.
    pub fn free_pages(&self) -> usize {
        self.lock().free.len()
    }

    /// Pages that somebody owns. With the free ones that is all of them.
    pub fn used_pages(&self) -> usize {
        self.num_pages() - self.free_pages()
    }

    /// How many own a page; 0 for a free one, and for one that is not in the
    /// pool.
    pub fn owners(&self, page: i32) -> usize {
        let state = self.lock();
        usize::try_from(page).ok().and_then(|page| state.owners.get(page).copied()).unwrap_or(0)
    }

    /// Copies of pages that were decided on and are not made yet. See
    /// [`PagedKvCache::copy_pages`](super::PagedKvCache::copy_pages).
    pub fn pending_copies(&self) -> usize {
        self.lock().copies.len()
    }

    /// Makes the pending copies in memory that is not a
    /// [`PagedKvCache`](super::PagedKvCache): gives `copy` the page to copy from and
    /// the one to copy to, one pair after the other. To be called after sequences
    /// were appended to, and before anything is written to their pages.
    ///
    /// # Errors
    /// The pool has a `PagedKvCache`, which makes copies itself. Nothing was copied.
    pub fn copy_pages(&self, mut copy: impl FnMut(usize, usize)) -> Result<()> {
        if self.lock().has_storage {
            let problem = "its pages are a PagedKvCache's; have that copy them";
            return Err(FlashInferError::invalid("PageAllocator", "self", problem));
        }
        loop {
            let Some(PageCopy { source, target }) = self.lock().copies.pop_front() else { return Ok(()) };
            copy(source as usize, target as usize);
            self.lock().release(source);
        }
    }

    /// New pages: as many as asked for, or none.
    pub(super) fn allocate(&self, count: usize) -> Result<Pages> {
        let mut state = self.lock();
        let free = state.free.len();
        if count > free {
            return Err(FlashInferError::OutOfPages { needed: count, free });
        }
        let numbers = state.free.split_off(free - count);
        for &page in &numbers {
            state.owners[page as usize] = 1;
        }
        Ok(Pages { allocator: self.clone(), numbers })
    }

    /// How many copies it takes until each of these users of pages, which
    /// names a page once for each that will write to it, has one of its own.
    pub(super) fn copies_needed(&self, written: &mut [i32]) -> usize {
        written.sort_unstable();
        let state = self.lock();
        let writers = written.chunk_by(|a, b| a == b);
        writers.map(|writers| writers.len().min(state.users(writers[0]) - 1)).sum()
    }

    /// The pending copies, in order.
    pub(super) fn copies(&self) -> Vec<PageCopy> {
        self.lock().copies.iter().copied().collect()
    }

    /// Replaces the pending copies. All pages of the new ones have owners.
    pub(super) fn set_copies(&self, copies: &[PageCopy]) {
        let mut state = self.lock();
        while let Some(PageCopy { source, .. }) = state.copies.pop_front() {
            state.release(source);
        }
        for copy in copies {
            state.owners[copy.source as usize] += 1;
            state.copies.push_back(*copy);
        }
    }

    /// The page that is taken next.
    pub(super) fn next_free_page(&self) -> Option<i32> {
        self.lock().free.last().copied()
    }

    /// Makes the pending copies, in order, up to the first that fails.
    pub(crate) fn make_copies<E>(
        &self,
        mut copy: impl FnMut(usize, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut state = self.lock();
        while let Some(&PageCopy { source, target }) = state.copies.front() {
            copy(source as usize, target as usize)?;
            state.copies.pop_front();
            state.release(source);
        }
        Ok(())
    }

    /// The right to be the memory of the pool's pages, which one has at a time.
    pub(crate) fn claim_storage(&self) -> Result<StorageClaim> {
        let taken = std::mem::replace(&mut self.lock().has_storage, true);
        if taken {
            return Err(FlashInferError::invalid(
                "PagedKvCache",
                "allocator",
                "the pool has a cache already; give that one the shapes of all models that share the pool",
            ));
        }
        Ok(StorageClaim(self.clone()))
    }

    fn lock(&self) -> MutexGuard<'_, PoolState> {
        // Nothing panics while the state is half changed.
        self.pool.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether both are the same pool.
impl PartialEq for PageAllocator {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.pool, &other.pool)
    }
}
impl Eq for PageAllocator {}

impl fmt::Debug for PageAllocator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageAllocator")
            .field("num_pages", &self.num_pages())
            .field("page_size", &self.page_size())
            .field("free_pages", &self.free_pages())
            .field("pending_copies", &self.pending_copies())
            .finish()
    }
}

/// See [`PageAllocator::claim_storage`].
pub(crate) struct StorageClaim(PageAllocator);

impl StorageClaim {
    pub(crate) fn allocator(&self) -> &PageAllocator {
        &self.0
    }
}

impl Drop for StorageClaim {
    fn drop(&mut self) {
        self.0.lock().has_storage = false;
    }
}

/// Pages in order, owned once for each place in the list.
pub(super) struct Pages {
    allocator: PageAllocator,
    numbers: Vec<i32>,
}

impl Pages {
    pub(super) fn none(allocator: &PageAllocator) -> Self {
        Self { allocator: allocator.clone(), numbers: Vec::new() }
    }

    pub(super) fn allocator(&self) -> &PageAllocator {
        &self.allocator
    }

    pub(super) fn numbers(&self) -> &[i32] {
        &self.numbers
    }

    /// Adds some of another list's pages, which get one owner more.
    pub(super) fn share(&mut self, other: &Self, range: Range<usize>) {
        debug_assert_eq!(self.allocator, other.allocator);
        let shared = &other.numbers[range];
        let mut state = self.allocator.lock();
        for &page in shared {
            state.owners[page as usize] += 1;
        }
        self.numbers.extend_from_slice(shared);
    }

    /// Pages by their numbers, all of which have an owner, and get one more.
    pub(super) fn shared(allocator: &PageAllocator, numbers: &[i32]) -> Self {
        let mut state = allocator.lock();
        for &page in numbers {
            state.owners[page as usize] += 1;
        }
        drop(state);
        Self { allocator: allocator.clone(), numbers: numbers.to_vec() }
    }

    /// Takes all pages that are free, and then gives this one back, if it is here.
    pub(super) fn hold_all_but(&mut self, page: Option<i32>) {
        let mut state = self.allocator.lock();
        while let Some(free) = state.free.pop() {
            state.owners[free as usize] = 1;
            self.numbers.push(free);
        }
        let at = page.and_then(|page| self.numbers.iter().position(|&held| held == page));
        if let Some(at) = at {
            let page = self.numbers.swap_remove(at);
            state.release(page);
        }
    }

    /// Takes the last page out of the list, with its ownership.
    ///
    /// # Panics
    /// If there is none.
    fn pop(&mut self) -> i32 {
        self.numbers.pop().expect("as many pages were reserved as are needed")
    }

    /// Moves a page here.
    ///
    /// # Panics
    /// If there is none.
    pub(super) fn take(&mut self, reserve: &mut Self) {
        debug_assert_eq!(self.allocator, reserve.allocator);
        self.numbers.push(reserve.pop());
    }

    /// If others use the last page, too, replaces it by one that will get its
    /// content.
    ///
    /// # Panics
    /// If there is no last page, or a page is needed and there is none.
    pub(super) fn own_last(&mut self, reserve: &mut Self) {
        let last = self.numbers.last_mut().expect("a list with a last page");
        let mut state = self.allocator.lock();
        if state.users(*last) > 1 {
            // From here the copy owns the source in place of this list.
            let target = reserve.pop();
            let source = std::mem::replace(last, target);
            state.copies.push_back(PageCopy { source, target });
        }
    }

    /// Gives pages back until `count` are left.
    pub(super) fn truncate(&mut self, count: usize) {
        let mut state = self.allocator.lock();
        for page in self.numbers.drain(count..).rev() {
            state.release(page);
        }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        self.truncate(0);
    }
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.numbers.fmt(f)
    }
}
