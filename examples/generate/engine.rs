//! What a backend computes: one step of a batch, in which some requests read
//! their prompts and others decode.

use flashinfer_rs::{AppendIndices, PageIndices, RaggedIndices};

use crate::Result;

/// The size of a paged KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSize {
    pub num_pages: usize,
    /// Tokens in a page.
    pub page_size: usize,
}

impl CacheSize {
    /// The cache that holds this many tokens.
    pub fn for_tokens(tokens: usize, page_size: usize) -> Self {
        Self { num_pages: tokens.div_ceil(page_size), page_size }
    }

    /// The tokens that the cache holds.
    pub fn tokens(self) -> usize {
        self.num_pages * self.page_size
    }
}

/// What one step computes for one request.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// The new tokens: a part of a prompt, the last token, or a draft.
    pub tokens: &'a [u32],
    /// How many tokens of the request are in the cache.
    pub cached: usize,
    /// The pages that hold those and will hold the new ones, in order.
    pub pages: &'a [i32],
    /// Of how many of the new tokens, the last ones, logits are wanted: 0 for
    /// all but the last chunk of a prompt.
    pub outputs: usize,
}

/// The chunks of one step, and the index arrays that go with them.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The new tokens, request after request.
    pub tokens: Vec<u32>,
    /// Which of them belong to which request.
    pub queries: RaggedIndices,
    /// The requests' pages, which count the new tokens.
    pub table: PageIndices,
    /// Where the new tokens go; these are also their positions.
    pub append: AppendIndices,
    /// The rows of `tokens` whose logits are wanted.
    pub outputs: Vec<usize>,
}

impl Batch {
    /// A batch of these chunks.
    pub fn new(size: CacheSize, chunks: &[Chunk<'_>]) -> Result<Self> {
        let requests = chunks.iter().map(|chunk| (chunk.pages, chunk.cached + chunk.tokens.len()));
        let table = PageIndices::from_requests(size.num_pages, size.page_size, requests)?;
        let queries = RaggedIndices::from_lens(chunks.iter().map(|chunk| chunk.tokens.len()))?;
        let (mut tokens, mut outputs) = (Vec::new(), Vec::new());
        for chunk in chunks {
            tokens.extend_from_slice(chunk.tokens);
            outputs.extend(tokens.len().saturating_sub(chunk.outputs)..tokens.len());
        }
        let append = AppendIndices::last_tokens(&table, queries.indptr())?;
        Ok(Self { tokens, queries, table, append, outputs })
    }
}

/// A model on a device, with its paged KV cache.
pub trait Engine {
    /// The size of the cache.
    fn cache(&self) -> CacheSize;

    /// Computes a batch: its keys and values go to the cache, and the logits of
    /// its outputs are kept until the next step.
    fn step(&mut self, batch: &Batch) -> Result<()>;

    /// The logits of the last step, `[outputs, vocab_size]`.
    fn logits(&self) -> Result<Vec<f32>>;

    /// The most likely token after each output of the last step.
    fn greedy(&self) -> Result<Vec<u32>>;
}
