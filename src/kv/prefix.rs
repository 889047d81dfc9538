//! Pages of earlier sequences, found by the tokens they begin with.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use super::{
    Sequence,
    pages::{PageAllocator, Pages},
};
use crate::error::{FlashInferError, Result};

/// The node that stands for no tokens, and has no page.
const ROOT: usize = 0;

/// Pages whose keys and values later sequences may share, by the tokens of
/// their whole prefix.
///
/// A radix tree over token ids, whose every edge is one full page of them: the
/// path to a node is a prefix, the node holds the page of its last
/// `page_size` tokens. The tree is one more owner of each of its pages, so
/// they outlive the sequence that they came from until they are
/// [evicted](Self::evict).
///
/// Keys and values depend on the model: have one `PrefixCache` for each, all
/// of which may share a pool.
#[derive(Debug)]
pub struct PrefixCache {
    allocator: PageAllocator,
    /// By number; the places in `vacant` hold nothing.
    nodes: Vec<Node>,
    vacant: Vec<usize>,
    /// Nodes without children, by the time of their last use.
    leaves: BTreeSet<(u64, usize)>,
    /// Counts look-ups and inserts.
    time: u64,
    stats: PrefixStats,
}

#[derive(Debug)]
struct Node {
    tokens: Arc<[u32]>,
    /// One page; none in the root and in vacant places.
    page: Pages,
    parent: usize,
    children: HashMap<Arc<[u32]>, usize>,
    /// Never before a child's.
    last_used: u64,
}

/// What a [`PrefixCache`] has counted since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PrefixStats {
    /// Look-ups.
    pub lookups: u64,
    /// Look-ups that found at least one page.
    pub hits: u64,
    /// Tokens that were looked up.
    pub tokens: u64,
    /// Tokens that were found, whose keys and values need not be computed.
    pub tokens_saved: u64,
    /// Pages that were inserted.
    pub inserted: u64,
    /// Pages that were evicted.
    pub evicted: u64,
}

impl PrefixCache {
    /// A cache of no pages.
    pub fn new(allocator: &PageAllocator) -> Self {
        let root = Node {
            tokens: [].into(),
            page: Pages::none(allocator),
            parent: ROOT,
            children: HashMap::new(),
            last_used: 0,
        };
        Self {
            allocator: allocator.clone(),
            nodes: vec![root],
            vacant: Vec::new(),
            leaves: BTreeSet::new(),
            time: 0,
            stats: PrefixStats::default(),
        }
    }

    /// The pool that the pages are of.
    pub fn allocator(&self) -> &PageAllocator {
        &self.allocator
    }

    /// Pages in the cache.
    pub fn num_pages(&self) -> usize {
        self.nodes.len() - self.vacant.len() - 1
    }

    /// What was counted so far.
    pub fn stats(&self) -> PrefixStats {
        self.stats
    }

    /// A sequence of the longest cached prefix of `tokens`, whose pages it
    /// shares. It has a multiple of `page_size` tokens, possibly none, possibly
    /// all: then [`truncate`](Sequence::truncate) it by one, since computing
    /// the next token takes at least one query.
    pub fn lookup(&mut self, tokens: &[u32]) -> Sequence {
        self.time += 1;
        let mut pages = Pages::none(&self.allocator);
        let mut at = ROOT;
        for page in tokens.chunks_exact(self.allocator.page_size()) {
            let Some(&child) = self.nodes[at].children.get(page) else { break };
            self.touch(child);
            pages.share(&self.nodes[child].page, 0..1);
            at = child;
        }
        let sequence = Sequence::of_full_pages(pages);
        self.stats.lookups += 1;
        self.stats.hits += u64::from(!sequence.is_empty());
        self.stats.tokens += tokens.len() as u64;
        self.stats.tokens_saved += sequence.len() as u64;
        sequence
    }

    /// Caches the full pages of a sequence that begins with `tokens`. Of a
    /// prefix that is cached already the cached pages stay. Returns the number
    /// of pages that the cache did not have.
    ///
    /// Their keys and values must have been written, or at least enqueued.
    ///
    /// # Errors
    /// The sequence is of another pool, or has fewer tokens.
    pub fn insert(&mut self, tokens: &[u32], sequence: &Sequence) -> Result<usize> {
        let invalid =
            |argument, problem: String| Err(FlashInferError::invalid("PrefixCache", argument, problem));
        if *sequence.allocator() != self.allocator {
            return invalid("sequence", "it is of another pool than the cache".into());
        }
        if tokens.len() > sequence.len() {
            let problem = format!("{} tokens of a sequence that has {}", tokens.len(), sequence.len());
            return invalid("tokens", problem);
        }
        self.time += 1;
        let (mut at, mut inserted) = (ROOT, 0);
        for (index, page) in tokens.chunks_exact(self.allocator.page_size()).enumerate() {
            at = match self.nodes[at].children.get(page) {
                Some(&child) => {
                    self.touch(child);
                    child
                }
                None => {
                    inserted += 1;
                    self.add(at, page, sequence.owned(), index)
                }
            };
        }
        self.stats.inserted += inserted as u64;
        Ok(inserted)
    }

    /// Gives up to `pages` pages back to the pool, those first that were not
    /// used for the longest time, and of a prefix its end first. Pages that a
    /// sequence uses stay. Returns how many there were.
    pub fn evict(&mut self, pages: usize) -> usize {
        let mut evicted = 0;
        let mut from = (0, 0);
        while evicted < pages {
            // A page that becomes a leaf was used no earlier than its child.
            let unused = |&&(_, node): &&(u64, usize)| {
                self.nodes[node].page.numbers().iter().all(|&page| self.allocator.owners(page) == 1)
            };
            let Some(&(last_used, node)) = self.leaves.range(from..).find(unused) else { break };
            from = (last_used, 0);
            self.remove_leaf(node);
            evicted += 1;
        }
        self.stats.evicted += evicted as u64;
        evicted
    }

    /// A node is used now, after its parents were.
    fn touch(&mut self, node: usize) {
        let before = std::mem::replace(&mut self.nodes[node].last_used, self.time);
        if self.leaves.remove(&(before, node)) {
            self.leaves.insert((self.time, node));
        }
    }

    /// Adds a leaf, which is used now.
    fn add(&mut self, parent: usize, tokens: &[u32], pages: &Pages, index: usize) -> usize {
        let tokens: Arc<[u32]> = tokens.into();
        let mut page = Pages::none(&self.allocator);
        page.share(pages, index..index + 1);
        let node =
            Node { tokens: tokens.clone(), page, parent, children: HashMap::new(), last_used: self.time };
        let number = match self.vacant.pop() {
            Some(number) => {
                self.nodes[number] = node;
                number
            }
            None => {
                self.nodes.push(node);
                self.nodes.len() - 1
            }
        };
        self.leaves.remove(&(self.nodes[parent].last_used, parent));
        self.leaves.insert((self.time, number));
        self.nodes[parent].children.insert(tokens, number);
        number
    }

    /// Gives a leaf's page back; its parent may become a leaf.
    fn remove_leaf(&mut self, number: usize) {
        let node = &mut self.nodes[number];
        let (parent, last_used) = (node.parent, node.last_used);
        let tokens = std::mem::take(&mut node.tokens);
        node.page.truncate(0);
        self.leaves.remove(&(last_used, number));
        self.vacant.push(number);
        let above = &mut self.nodes[parent];
        above.children.remove(&tokens);
        if above.children.is_empty() && parent != ROOT {
            self.leaves.insert((above.last_used, parent));
        }
    }
}
