//! Many requests through one engine and one pool of pages.
//!
//! A step computes at most [`Limits::step_tokens`] tokens. Each request that
//! runs gets at least one of them: its last token, if it decodes, or the next
//! part of its prompt. What is left goes to prompts that wait, in the order in
//! which they came, and then to drafts. While no prompt waits or is read, and
//! without drafts, a step is one token of each request.
//!
//! Those that run came before all that wait, and only the last of them may have
//! a part of its prompt unread. When pages run out, cached prefixes that nobody
//! uses go first. Then the last request gives its pages back and waits again,
//! before all others. So the first always goes on, and no request waits for
//! ever.
//!
//! What a request has read is in the prefix cache from the next step on, and
//! what one gives back stays there as long as nobody needs the pages. A request
//! that could share what a step reads waits for the next step. So nobody caches
//! a page under one of another request that holds the same tokens, and what no
//! running request uses can always be evicted.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use flashinfer_rs::kv::{Batch, PageAllocator, PrefixCache, Sequence};

use crate::{
    Result,
    backend::{Backend, Output, Step},
    draft::draft,
    request::{Ended, Limits, Request},
};

/// What was counted so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Steps.
    pub steps: usize,
    /// Requests whose answer has begun.
    pub begun: usize,
    /// Tokens that were computed to read prompts, and what a request had
    /// before it gave its pages back.
    pub read: usize,
    /// Tokens that were computed otherwise: one for each that follows, and drafts.
    pub decoded: usize,
    /// Tokens that were found in the prefix cache and never computed for their
    /// request.
    pub saved: usize,
    /// Tokens that were computed again.
    pub recomputed: usize,
    /// Times that a request gave its pages back.
    pub preemptions: usize,
    /// Tokens of drafts.
    pub drafted: usize,
    /// Tokens of drafts that became part of an answer.
    pub accepted: usize,
    /// Pages in use at most, those of cached prefixes included.
    pub pages: usize,
}

/// What a step computes of one request.
struct Part {
    /// Tokens of the request that follow those in the cache.
    len: usize,
    /// Whether they are all that the cache does not have.
    whole: bool,
    /// Whether they are of a prompt, or computed again.
    reads: bool,
    /// Tokens that may follow.
    draft: Vec<u32>,
}

impl Part {
    /// What comes next of a request, at most `budget` tokens.
    fn next(request: &Request, sequence: &Sequence, budget: usize) -> Self {
        let rest = request.tokens().len() - sequence.len();
        let len = rest.min(budget);
        let reads = rest > 1 || request.answer().is_empty();
        Self { len, whole: len == rest, reads, draft: Vec::new() }
    }

    /// Tokens to compute.
    fn rows(&self) -> usize {
        self.len + self.draft.len()
    }

    /// Rows whose next token is wanted: the last one, and those of the draft.
    fn outputs(&self) -> usize {
        if self.whole { 1 + self.draft.len() } else { 0 }
    }

    /// Pages that a sequence needs for it.
    fn further_pages(&self, sequence: &Sequence) -> usize {
        let page_size = sequence.allocator().page_size();
        (sequence.len() + self.rows()).div_ceil(page_size) - sequence.pages().len()
    }
}

/// Requests, those that run among them, and the order of the others.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    pool: PageAllocator,
    prefixes: PrefixCache,
    requests: Vec<Request>,
    /// In the order in which they came. So are those that run, and these all
    /// came before.
    waiting: VecDeque<usize>,
    running: Vec<usize>,
    /// The sequences of those that run.
    batch: Batch,
    stats: Stats,
}

impl Scheduler {
    /// No requests yet.
    pub fn new(pool: &PageAllocator, limits: Limits) -> Self {
        Self {
            limits,
            pool: pool.clone(),
            prefixes: PrefixCache::new(pool),
            requests: Vec::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            batch: Batch::new(pool),
            stats: Stats::default(),
        }
    }

    /// Adds a request, which becomes the last one.
    ///
    /// # Errors
    /// The prompt is empty, or could never be answered: see [`Request::new`].
    pub fn push(&mut self, prompt: Vec<u32>) -> Result<()> {
        let request = Request::new(prompt, &self.limits, self.cache_tokens())?;
        self.waiting.push_back(self.requests.len());
        self.requests.push(request);
        Ok(())
    }

    /// All requests, in the order in which they came.
    pub fn requests(&self) -> &[Request] {
        &self.requests
    }

    /// Whether all requests have ended.
    pub fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// What was counted so far.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Tokens for which the pool has pages.
    fn cache_tokens(&self) -> usize {
        self.pool.num_pages() * self.pool.page_size()
    }

    /// Computes a step. Each request whose last token was computed gets the
    /// most likely next one, and those that follow as far as its draft was right.
    /// One for which the model computed NaN ends, and the others go on.
    ///
    /// # Errors
    /// Those of the engine. The scheduler is of no use afterwards.
    pub fn step(&mut self, backend: &mut dyn Backend) -> Result<()> {
        let parts = self.plan()?;
        if parts.is_empty() {
            return Ok(());
        }
        let (mut tokens, mut outputs) = (Vec::new(), Vec::new());
        for ((&number, sequence), part) in self.running.iter().zip(self.batch.sequences()).zip(&parts) {
            tokens.extend_from_slice(&self.requests[number].tokens()[sequence.len()..][..part.len]);
            outputs.extend((0..part.outputs()).map(|row| Output::greedy(tokens.len() - 1 + row)));
            tokens.extend_from_slice(&part.draft);
        }
        self.batch.append(parts.iter().map(Part::rows))?;
        self.stats.steps += 1;
        self.stats.pages = self.stats.pages.max(self.pool.used_pages());
        let samples = backend.step(&Step { batch: &self.batch, tokens: &tokens, outputs: &outputs })?;
        if samples.len() != outputs.len() {
            return Err(
                format!("the backend gave {} tokens for {} rows", samples.len(), outputs.len()).into()
            );
        }
        let next: Vec<_> = samples.iter().map(|sample| sample.token).collect();
        let mut rest = next.as_slice();
        for (index, part) in parts.iter().enumerate() {
            let next;
            (next, rest) = rest.split_at(part.outputs());
            self.finish(index, part, next)?;
        }
        for index in (0..self.running.len()).rev() {
            if self.requests[self.running[index]].ended().is_some() {
                self.batch.remove(index)?;
                self.running.remove(index);
            }
        }
        Ok(())
    }

    /// What the next step computes of each request that runs, for all of which
    /// there are pages then. Requests stop and start running here.
    fn plan(&mut self) -> Result<Vec<Part>> {
        let mut parts = self.going_on();
        let mut pages = self.further_pages(&parts);
        while !self.make_free(pages) && self.running.len() > 1 {
            self.preempt()?;
            parts = self.going_on();
            pages = self.further_pages(&parts);
        }
        let mut budget = self.limits.step_tokens - parts.iter().map(Part::rows).sum::<usize>();
        while budget > 0
            && let Some(sequence) = self.admissible(&parts, pages)
            && let Some(number) = self.waiting.pop_front()
        {
            let request = &mut self.requests[number];
            let part = Part::next(request, &sequence, budget);
            self.stats.saved += sequence.len().saturating_sub(request.reached);
            request.reached = request.reached.max(sequence.len());
            pages += part.further_pages(&sequence);
            budget -= part.len;
            self.batch.push(sequence)?;
            self.running.push(number);
            parts.push(part);
        }
        self.make_free(pages);
        self.add_drafts(&mut parts, budget, self.pool.free_pages().saturating_sub(pages));
        Ok(parts)
    }

    /// What comes next of the requests that run.
    fn going_on(&self) -> Vec<Part> {
        let mut budget = self.limits.step_tokens;
        let running = self.running.iter().zip(self.batch.sequences());
        let next = running.map(|(&number, sequence)| {
            let part = Part::next(&self.requests[number], sequence, budget);
            budget -= part.len;
            part
        });
        next.collect()
    }

    /// The pages that the pool has to have for a step.
    fn further_pages(&self, parts: &[Part]) -> usize {
        let sequences = parts.iter().zip(self.batch.sequences());
        sequences.map(|(part, sequence)| part.further_pages(sequence)).sum()
    }

    /// Has so many pages free, if cached prefixes that nobody uses suffice.
    fn make_free(&mut self, pages: usize) -> bool {
        let missing = pages.saturating_sub(self.pool.free_pages());
        self.prefixes.evict(missing) == missing
    }

    /// Has the last request that runs give its pages back.
    fn preempt(&mut self) -> Result<()> {
        let index = self.running.len() - 1;
        let (number, sequence) = (self.running.remove(index), self.batch.remove(index)?);
        self.prefixes.insert(&self.requests[number].tokens()[..sequence.len()], &sequence)?;
        self.waiting.push_front(number);
        self.stats.preemptions += 1;
        Ok(())
    }

    /// What is cached of the first request that waits, if it may run now, when
    /// the others' parts take so many pages.
    fn admissible(&mut self, parts: &[Part], pages: usize) -> Option<Sequence> {
        let tokens = self.requests[*self.waiting.front()?].tokens();
        // The last token is computed in any case.
        let sequence = self.prefixes.lookup(&tokens[..tokens.len() - 1]);
        // More of it may be there after this step.
        let page_size = self.pool.page_size();
        let reads_more = |(index, part): (usize, &Part)| {
            if !part.reads {
                return false;
            }
            let end = self.batch.sequences()[index].len() + part.len;
            let other = &self.requests[self.running[index]].tokens()[..end];
            let common = tokens.iter().zip(other).take_while(|(a, b)| a == b).count();
            common.min(tokens.len() - 1) / page_size * page_size > sequence.len()
        };
        if parts.iter().enumerate().any(reads_more) {
            return None;
        }
        // It needs room for all its tokens, and leaves a page for each of the
        // others, which would soon have it stop again.
        let mut used = vec![false; self.pool.num_pages()];
        for &page in self.batch.sequences().iter().chain([&sequence]).flat_map(Sequence::pages) {
            used[page as usize] = true;
        }
        let unused = used.iter().filter(|used| !**used).count();
        let own = tokens.len().div_ceil(page_size) - sequence.pages().len();
        (own + pages + self.running.len() <= unused).then_some(sequence)
    }

    /// Has requests that get a next token guess more, within the tokens and the
    /// pages that are left.
    fn add_drafts(&self, parts: &mut [Part], mut budget: usize, mut pages: usize) {
        if self.limits.draft == 0 {
            return;
        }
        let (page_size, most) = (self.pool.page_size(), self.limits.context.min(self.cache_tokens()));
        for (index, part) in parts.iter_mut().enumerate().filter(|(_, part)| part.whole) {
            let (request, sequence) = (&self.requests[self.running[index]], &self.batch.sequences()[index]);
            let len = request.tokens().len();
            let before = part.further_pages(sequence);
            let slots = len.next_multiple_of(page_size) - len + pages * page_size;
            let answer = self.limits.max_tokens - request.answer().len() - 1;
            let most = self.limits.draft.min(budget).min(slots).min(most - len).min(answer);
            part.draft = draft(request.tokens(), most);
            budget -= part.draft.len();
            pages -= part.further_pages(sequence) - before;
        }
    }

    /// Takes in what the engine computed of a request: the most likely token
    /// after its last one and after each of the draft.
    fn finish(&mut self, index: usize, part: &Part, next: &[Option<u32>]) -> Result<()> {
        let cache = self.cache_tokens();
        let (request, sequence) = (&mut self.requests[self.running[index]], &self.batch.sequences()[index]);
        let computed = sequence.len() - part.draft.len();
        if part.reads {
            // Nobody is to read NaN.
            if next.first() != Some(&None) {
                self.prefixes.insert(&request.tokens()[..computed], sequence)?;
            }
            self.stats.read += part.len;
        } else {
            self.stats.decoded += part.len;
        }
        self.stats.decoded += part.draft.len();
        self.stats.drafted += part.draft.len();
        self.stats.recomputed += request.reached.min(computed).saturating_sub(computed - part.len);
        let begins = request.answer().is_empty();
        let right = part.draft.iter().zip(next).take_while(|(draft, token)| Some(**draft) == **token).count();
        for token in next.iter().take(right + 1) {
            match token {
                _ if request.ended().is_some() => break,
                Some(token) => request.push(*token, &self.limits, cache),
                None => request.fail(),
            }
        }
        self.stats.begun += usize::from(begins && !request.answer().is_empty());
        if part.whole {
            // The last token is not computed yet, unless none came; what was wrong goes.
            let len = request.tokens().len() - usize::from(request.ended() != Some(Ended::NoNumbers));
            self.stats.accepted += len - computed;
            if len < sequence.len() {
                self.batch.truncate(index, len)?;
            }
            request.reached = request.reached.max(len);
        } else {
            request.reached = request.reached.max(computed);
        }
        Ok(())
    }
}
