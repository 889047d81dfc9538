//! Requests that share an engine: every step computes what is next for as many
//! as fit.

use flashinfer_rs::kv::{Batch, PageAllocator, Sequence};

use crate::{
    Result,
    engine::{Engine, Step},
};

/// A prompt, and what the model has added to it.
#[derive(Clone, Debug)]
pub struct Request {
    tokens: Vec<u32>,
    prompt: usize,
}

impl Request {
    /// The tokens of the prompt.
    pub fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt]
    }

    /// The tokens that the model has added.
    pub fn answer(&self) -> &[u32] {
        &self.tokens[self.prompt..]
    }
}

/// Requests that are computed together.
#[derive(Debug)]
pub struct Requests {
    pool: PageAllocator,
    batch: Batch,
    /// In the order of the batch's sequences.
    requests: Vec<Request>,
}

impl Requests {
    /// No requests yet.
    pub fn new(pool: &PageAllocator) -> Self {
        Self { pool: pool.clone(), batch: Batch::new(pool), requests: Vec::new() }
    }

    /// Adds a request, which becomes the last one.
    ///
    /// # Errors
    /// The prompt is empty, or the whole cache has no room for it and an answer.
    pub fn push(&mut self, prompt: Vec<u32>) -> Result<()> {
        if prompt.is_empty() {
            return Err("the prompt is empty".into());
        }
        let room = self.pool.num_pages() * self.pool.page_size();
        if prompt.len() >= room {
            return Err(format!(
                "the prompt has {} tokens, and the cache holds {room}, those of the answer included; \
                 shorten it, or give more --cache-tokens if the model's context allows",
                prompt.len(),
            )
            .into());
        }
        self.batch.push(Sequence::new(&self.pool))?;
        self.requests.push(Request { prompt: prompt.len(), tokens: prompt });
        Ok(())
    }

    /// Ends a request and frees its pages. Those behind it move forward.
    pub fn remove(&mut self, index: usize) -> Result<Request> {
        self.batch.remove(index)?;
        Ok(self.requests.remove(index))
    }

    /// The requests.
    pub fn all(&self) -> &[Request] {
        &self.requests
    }

    /// Whether the pool has a page for a request's next token, if it needs one.
    pub fn has_room(&self, index: usize) -> bool {
        self.batch.sequences()[index].pages_needed(1) <= self.pool.free_pages()
    }

    /// Tokens of a request that are not in the cache.
    fn uncached(&self, index: usize) -> usize {
        self.requests[index].tokens.len() - self.batch.sequences()[index].len()
    }

    /// Computes at most `budget` tokens: first of those requests that decode,
    /// then of prompts, of which a part may be read. Each request whose last
    /// token was computed gets the most likely next one.
    pub fn step(&mut self, engine: &mut dyn Engine, mut budget: usize) -> Result<()> {
        let mut order: Vec<_> = (0..self.requests.len()).collect();
        order.sort_by_key(|&index| self.uncached(index));
        let mut lens = vec![0; order.len()];
        for index in order {
            lens[index] = self.uncached(index).min(budget);
            budget -= lens[index];
        }
        let (mut tokens, mut outputs, mut done) = (Vec::new(), Vec::new(), Vec::new());
        for (index, (request, &len)) in self.requests.iter().zip(&lens).enumerate() {
            let cached = self.batch.sequences()[index].len();
            tokens.extend_from_slice(&request.tokens[cached..cached + len]);
            if len > 0 && len == self.uncached(index) {
                outputs.push(tokens.len() - 1);
                done.push(index);
            }
        }
        self.batch.append(lens)?;
        engine.step(&Step { batch: &self.batch, tokens: &tokens, outputs: &outputs })?;
        for (index, token) in done.into_iter().zip(engine.greedy()?) {
            self.requests[index].tokens.push(token);
        }
        Ok(())
    }
}
