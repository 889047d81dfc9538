//! Requests that share an engine: each has its pages, and every step computes
//! what is next for as many as fit.

use crate::{
    Result,
    engine::{Batch, CacheSize, Chunk, Engine},
};

/// A prompt and what the model has added to it.
#[derive(Debug)]
pub struct Request {
    /// The prompt and the answer so far.
    pub tokens: Vec<u32>,
    prompt: usize,
    /// Tokens that are in the cache.
    cached: usize,
    pages: Vec<i32>,
}

impl Request {
    /// A request whose prompt has not been read.
    ///
    /// # Errors
    /// The prompt is empty, or the cache has no room for it and one token more.
    pub fn new(prompt: Vec<u32>, size: CacheSize) -> Result<Self> {
        if prompt.is_empty() {
            return Err("the prompt is empty".into());
        }
        if prompt.len() >= size.tokens() {
            return Err(format!(
                "the prompt has {} tokens, and the cache holds {}, the answer's included; \
                 shorten it, or use a larger --cache-tokens where the model's context allows",
                prompt.len(),
                size.tokens()
            )
            .into());
        }
        Ok(Self { prompt: prompt.len(), tokens: prompt, cached: 0, pages: Vec::new() })
    }

    /// What the model has added.
    pub fn answer(&self) -> &[u32] {
        &self.tokens[self.prompt..]
    }

    fn uncached(&self) -> usize {
        self.tokens.len() - self.cached
    }
}

/// The pages of a cache that no request has.
#[derive(Debug)]
pub struct Pages {
    size: CacheSize,
    free: Vec<i32>,
}

impl Pages {
    /// All pages of a cache.
    pub fn new(size: CacheSize) -> Self {
        Self { size, free: (0..size.num_pages as i32).rev().collect() }
    }

    /// Pages that requests have.
    pub fn used(&self) -> usize {
        self.size.num_pages - self.free.len()
    }

    /// Whether one more token of a request has a place.
    pub fn has_room(&self, request: &Request) -> bool {
        request.tokens.len() <= request.pages.len() * self.size.page_size || !self.free.is_empty()
    }

    /// Takes back a request's pages.
    pub fn release(&mut self, request: &mut Request) {
        self.free.append(&mut request.pages);
        request.cached = 0;
    }

    fn grow(&mut self, pages: &mut Vec<i32>, tokens: usize) -> Result<()> {
        while pages.len() * self.size.page_size < tokens {
            let all = self.size.num_pages;
            pages.push(self.free.pop().ok_or_else(|| format!("all {all} pages of the cache are in use"))?);
        }
        Ok(())
    }
}

/// Computes one step of at most `budget` tokens: those that decode come first,
/// then prompts, of which a part may be read. Each request whose last token was
/// computed gets the most likely next one. Tells how many tokens were computed.
pub fn step(
    engine: &mut dyn Engine,
    pages: &mut Pages,
    requests: &mut [&mut Request],
    budget: usize,
) -> Result<usize> {
    requests.sort_by_key(|request| request.uncached());
    let mut left = budget;
    let mut lens = Vec::new();
    for request in &mut *requests {
        let len = request.uncached().min(left);
        if len == 0 {
            break;
        }
        pages.grow(&mut request.pages, request.cached + len)?;
        left -= len;
        lens.push(len);
    }
    let chunks: Vec<_> = requests
        .iter()
        .zip(&lens)
        .map(|(request, &len)| Chunk {
            tokens: &request.tokens[request.cached..][..len],
            cached: request.cached,
            pages: &request.pages,
            outputs: usize::from(len == request.uncached()),
        })
        .collect();
    engine.step(&Batch::new(engine.cache(), &chunks)?)?;
    let mut next = engine.greedy()?.into_iter();
    for (request, &len) in requests.iter_mut().zip(&lens) {
        request.cached += len;
        if request.uncached() == 0 {
            request.tokens.extend(next.next());
        }
    }
    Ok(budget - left)
}
