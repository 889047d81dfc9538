//! Batches that another process has: what a step is, in plain numbers, and a batch made of that.
//!
//! Ranks that compute one model together have the same pages. One of them decides what is in which,
//! and the others follow it step by step.

use super::{
    Batch, PageAllocator, Sequence,
    pages::{PageCopy, Pages},
};
use crate::error::{FlashInferError, Result};

const OP: &str = "BatchMirror";

/// A batch in plain numbers, with what is to be done before its step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchSnapshot {
    /// By request.
    pub requests: Vec<RequestSnapshot>,
    /// The copies of pages that are to be made, in order.
    pub copies: Vec<PageCopy>,
    /// A page that nobody owns, to which requests that fill up a graph are written; `None` if
    /// there is none.
    pub free_page: Option<i32>,
}

/// A request in plain numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestSnapshot {
    /// The pages of all its tokens.
    pub pages: Vec<i32>,
    /// Its tokens, the new ones included.
    pub len: usize,
    /// Those of the last [`Batch::append`].
    pub new_tokens: usize,
}

impl Batch {
    /// What this batch is, for a [`BatchMirror`] of a pool of as many pages. To be taken before the
    /// copies of pages are made that the step needs.
    pub fn snapshot(&self) -> BatchSnapshot {
        let new_tokens = self.queries().indptr().windows(2).map(|pair| (pair[1] - pair[0]) as usize);
        let requests = self.sequences().iter().zip(new_tokens).map(|(sequence, new_tokens)| {
            RequestSnapshot { pages: sequence.pages().to_vec(), len: sequence.len(), new_tokens }
        });
        BatchSnapshot {
            requests: requests.collect(),
            copies: self.allocator().copies(),
            free_page: self.allocator().next_free_page(),
        }
    }
}

/// A batch that follows another process's, step by step, over a pool of its own of as many pages.
#[derive(Debug)]
pub struct BatchMirror {
    batch: Batch,
    /// All pages but the free one.
    held: Pages,
}

impl BatchMirror {
    /// Takes all pages of a pool.
    ///
    /// # Errors
    /// Somebody owns one: expected a pool that is used for this only.
    pub fn new(allocator: &PageAllocator) -> Result<Self> {
        let used = allocator.used_pages();
        if used > 0 {
            let problem = format!("{used} of its pages are in use; expected none");
            return Err(FlashInferError::invalid(OP, "allocator", problem));
        }
        let mut held = Pages::none(allocator);
        held.hold_all_but(None);
        Ok(Self { batch: Batch::new(allocator), held })
    }

    /// Becomes the batch that a snapshot is of.
    ///
    /// # Errors
    /// A page is not in the pool, or the free one is in use; a request has not as many pages as its
    /// tokens need, or fewer tokens than new ones; or the batch would have 2³¹ token slots or more.
    /// There are no requests then.
    pub fn update(&mut self, snapshot: &BatchSnapshot) -> Result<&Batch> {
        let allocator = self.batch.allocator().clone();
        self.batch = Batch::new(&allocator);
        check(&allocator, snapshot)?;
        allocator.set_copies(&[]);
        self.held.hold_all_but(snapshot.free_page);
        allocator.set_copies(&snapshot.copies);
        for RequestSnapshot { pages, len, .. } in &snapshot.requests {
            self.batch.push(Sequence::of_pages(Pages::shared(&allocator, pages), *len))?;
        }
        self.batch.set_new_tokens(snapshot.requests.iter().map(|request| request.new_tokens));
        Ok(&self.batch)
    }
}

fn check(allocator: &PageAllocator, snapshot: &BatchSnapshot) -> Result<()> {
    let (num_pages, page_size) = (allocator.num_pages(), allocator.page_size());
    let exists = |page: i32| usize::try_from(page).is_ok_and(|page| page < num_pages);
    let invalid = |problem: String| Err(FlashInferError::invalid(OP, "snapshot", problem));
    if let Some(page) = snapshot.free_page.filter(|&page| !exists(page)) {
        return invalid(format!("its free page is {page}; the pool has {num_pages}"));
    }
    let usable = |page: i32| exists(page) && snapshot.free_page != Some(page);
    for PageCopy { source, target } in &snapshot.copies {
        if !usable(*source) || !usable(*target) || source == target {
            return invalid(format!(
                "a copy of page {source} to {target}; expected two of {num_pages} in use"
            ));
        }
    }
    for (request, RequestSnapshot { pages, len, new_tokens }) in snapshot.requests.iter().enumerate() {
        if let Some(page) = pages.iter().find(|&&page| !usable(page)) {
            return invalid(format!("request {request} has page {page}; expected one of {num_pages} in use"));
        }
        let needed = len.div_ceil(page_size);
        if pages.len() != needed || new_tokens > len {
            let got = format!("{} pages for {len} tokens, {new_tokens} of them new", pages.len());
            return invalid(format!("request {request} has {got}; expected {needed} pages"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A batch, and one that follows it.
    fn pair(num_pages: usize) -> (Batch, BatchMirror) {
        let pools = [(); 2].map(|()| PageAllocator::new(num_pages, 4).unwrap());
        (Batch::new(&pools[0]), BatchMirror::new(&pools[1]).unwrap())
    }

    fn check_equal(batch: &Batch, mirror: &mut BatchMirror) {
        let mirrored = mirror.update(&batch.snapshot()).unwrap();
        let arrays = |batch: &Batch| {
            let pages = batch.pages();
            let lens = (0..batch.len()).map(|request| pages.seq_len(request)).collect::<Vec<_>>();
            let tokens = batch.append_indices();
            let all = [pages.indptr(), pages.indices(), batch.queries().indptr()];
            let tokens = [tokens.batch_indices(), tokens.positions()];
            (lens, all.map(<[i32]>::to_vec), tokens.map(<[i32]>::to_vec))
        };
        assert_eq!(arrays(mirrored), arrays(batch));
        let (ours, theirs) = (batch.allocator(), mirrored.allocator());
        // What fills up a graph gets the same page.
        assert_eq!(ours.next_free_page(), theirs.next_free_page());
        let copies = |allocator: &PageAllocator| {
            let mut copies = Vec::new();
            allocator.copy_pages(|source, target| copies.push((source, target))).unwrap();
            copies
        };
        assert_eq!(copies(ours), copies(theirs));
        let padding = |allocator: &PageAllocator| {
            let mut padding = Sequence::new(allocator);
            padding.append(1).map(|()| padding.pages().to_vec()).ok()
        };
        assert_eq!(padding(ours), padding(theirs));
    }

    proptest! {
        /// Whatever happens to a batch: forks, drafts that are taken back, requests that end.
        #[test]
        fn a_mirror_is_the_batch_at_every_step(
            actions in prop::collection::vec((0..6u8, 0..8usize, 0..9usize), 1..60),
        ) {
            let (mut batch, mut mirror) = pair(24);
            for (action, request, tokens) in actions {
                match (action, request < batch.len()) {
                    (0, _) => batch.push(Sequence::new(&batch.allocator().clone())).unwrap(),
                    (1, true) => {
                        let fork = batch.sequences()[request].fork();
                        batch.push(fork).unwrap();
                    }
                    (2, true) => drop(batch.remove(request).unwrap()),
                    (3, true) => {
                        let len = batch.sequences()[request].len();
                        batch.truncate(request, len.saturating_sub(tokens)).unwrap();
                    }
                    _ => {
                        let new: Vec<_> = (0..batch.len()).map(|of| (of + tokens) % 5).collect();
                        // There may be no pages left.
                        let _ = batch.append(new);
                    }
                }
                check_equal(&batch, &mut mirror);
            }
        }
    }

    #[test]
    fn copies_that_were_not_made_are_not_made_twice() {
        let (mut batch, mut mirror) = pair(8);
        batch.push(Sequence::new(&batch.allocator().clone())).unwrap();
        batch.append([3]).unwrap();
        let fork = batch.sequences()[0].fork();
        batch.push(fork).unwrap();
        batch.append([1, 1]).unwrap();
        let snapshot = batch.snapshot();
        assert_eq!(snapshot.copies.len(), 1);
        // As after a step that failed before its copies were made.
        mirror.update(&snapshot).unwrap();
        assert_eq!(mirror.update(&snapshot).unwrap().allocator().pending_copies(), 1);
        check_equal(&batch, &mut mirror);
        assert_eq!(mirror.update(&batch.snapshot()).unwrap().allocator().pending_copies(), 0);
    }

    #[test]
    fn what_is_no_batch_is_refused() {
        let (_, mut mirror) = pair(4);
        let request =
            |pages: &[i32], len, new_tokens| RequestSnapshot { pages: pages.to_vec(), len, new_tokens };
        let snapshot =
            |request| BatchSnapshot { requests: vec![request], free_page: Some(3), copies: Vec::new() };
        mirror.update(&snapshot(request(&[0, 2], 5, 1))).unwrap();
        let copy = |source, target| {
            let copies = vec![PageCopy { source, target }];
            BatchSnapshot { copies, ..snapshot(request(&[0], 1, 1)) }
        };
        let wrong = [
            (snapshot(request(&[4], 1, 1)), "request 0 has page 4"),
            (snapshot(request(&[-1], 1, 1)), "request 0 has page -1"),
            (snapshot(request(&[3], 1, 1)), "request 0 has page 3"),
            (snapshot(request(&[0], 5, 1)), "1 pages for 5 tokens, 1 of them new; expected 2 pages"),
            (snapshot(request(&[0], 1, 2)), "1 tokens, 2 of them new"),
            (snapshot(request(&[0], usize::MAX, 1)), "expected"),
            (copy(0, 4), "a copy of page 0 to 4"),
            (copy(3, 1), "a copy of page 3 to 1"),
            (copy(1, 1), "a copy of page 1 to 1"),
            (BatchSnapshot { free_page: Some(9), ..BatchSnapshot::default() }, "its free page is 9"),
        ];
        for (snapshot, problem) in wrong {
            let error = mirror.update(&snapshot).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
        mirror.update(&snapshot(request(&[0, 1, 2], 12, 12))).unwrap();
        let used = PageAllocator::new(2, 4).unwrap();
        let mut sequence = Sequence::new(&used);
        sequence.append(1).unwrap();
        assert!(BatchMirror::new(&used).unwrap_err().to_string().contains("1 of its pages are in use"));
    }
}
