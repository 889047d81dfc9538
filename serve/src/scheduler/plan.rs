//! What the next step computes: who goes on, who stops, who starts, and drafts.

use std::time::Instant;

use flashinfer_rs::kv::Sequence;

use super::{
    Choice, Scheduler,
    part::{self, Part},
};
use crate::Result;

/// What a step has room for.
struct Budget {
    tokens: usize,
    /// Of them, those of prompts.
    prompts: usize,
    /// Rows of which something is wanted.
    outputs: usize,
}

impl Budget {
    /// What comes next of a choice, for which there is room.
    fn next(&mut self, choice: &Choice, sequence: &Sequence) -> Part {
        let reads = Part::reads(choice, sequence);
        let tokens = if reads { self.tokens.min(self.prompts) } else { self.tokens };
        let part = Part::next(choice, sequence, tokens, self.outputs);
        self.tokens -= part.len;
        self.prompts -= if reads { part.len } else { 0 };
        self.outputs -= part.outputs();
        part
    }

    /// Whether there is room for a part of another prompt.
    fn reads_more(&self) -> bool {
        self.tokens > 0 && self.prompts > 0 && self.outputs > 0
    }

    /// The tokens of drafts that there is room for.
    fn drafts(&self) -> usize {
        self.tokens.min(self.outputs)
    }
}

impl Scheduler {
    /// What the next step computes of each choice that runs, for all of which
    /// there are pages then. Choices stop and start running here.
    pub(super) fn plan(&mut self) -> Result<Vec<Part>> {
        let (mut parts, mut budget) = self.going_on();
        let mut pages = self.further_pages(&parts);
        while !self.make_free(pages) && self.running.len() > 1 {
            self.preempt()?;
            (parts, budget) = self.going_on();
            pages = self.further_pages(&parts);
        }
        while budget.reads_more()
            && self.running.len() < self.limits.max_running
            && let Some(sequence) = self.admissible(&parts, pages)
            && let Some(mut choice) = self.waiting.pop_front()
        {
            let part = budget.next(&choice, &sequence);
            self.stats.saved += sequence.len().saturating_sub(choice.reached);
            choice.reached = choice.reached.max(sequence.len());
            choice.cached.get_or_insert(sequence.len());
            choice.started.get_or_insert_with(Instant::now);
            pages += part.further_pages(&sequence);
            self.batch.push(sequence)?;
            self.running.push(choice);
            parts.push(part);
        }
        self.make_free(pages);
        self.add_drafts(&mut parts, budget.drafts(), self.pool.free_pages().saturating_sub(pages));
        Ok(parts)
    }

    /// What comes next of the choices that run, and what the step has room for beside.
    fn going_on(&self) -> (Vec<Part>, Budget) {
        let running = || self.running.iter().zip(self.batch.sequences());
        let answers = running().filter(|(choice, sequence)| !Part::reads(choice, sequence)).count();
        let mut budget = Budget {
            tokens: self.limits.step_tokens,
            prompts: self.limits.prompt_tokens(answers),
            outputs: self.limits.step_capacity().outputs,
        };
        let parts = running().map(|(choice, sequence)| budget.next(choice, sequence)).collect();
        (parts, budget)
    }

    /// The pages that the pool has to have for a step.
    pub(super) fn further_pages(&self, parts: &[Part]) -> usize {
        let sequences = parts.iter().zip(self.batch.sequences());
        sequences.map(|(part, sequence)| part.further_pages(sequence)).sum()
    }

    /// Has so many pages free, if cached prefixes that nobody uses suffice.
    pub(super) fn make_free(&mut self, pages: usize) -> bool {
        let missing = pages.saturating_sub(self.pool.free_pages());
        self.prefixes.evict(missing) == missing
    }

    /// Has the last choice that runs give its pages back.
    fn preempt(&mut self) -> Result<()> {
        let index = self.running.len() - 1;
        let (choice, sequence) = (self.running.remove(index), self.batch.remove(index)?);
        if choice.is_cached() {
            self.prefixes.insert(&choice.tokens()[..sequence.len()], &sequence)?;
        }
        self.waiting.push_front(choice);
        self.stats.preemptions += 1;
        Ok(())
    }

    /// What the cache has of the first choice that waits, if that may run now, when
    /// the others' parts take so many pages.
    fn admissible(&mut self, parts: &[Part], pages: usize) -> Option<Sequence> {
        let choice = self.waiting.front()?;
        let tokens = choice.tokens();
        let most = choice.most_cached();
        let mut sequence = self.prefixes.lookup(&tokens[..most]);
        if let Some(forked) = self.fork(choice).filter(|forked| forked.len() > sequence.len()) {
            sequence = forked;
        }
        // More of it may be there after this step.
        let page_size = self.pool.page_size();
        let reads_more = |(index, part): (usize, &Part)| {
            let (end, other) = (self.batch.sequences()[index].len() + part.len, &self.running[index]);
            if !part.reads || !(other.is_cached() || other.request == choice.request) {
                return false;
            }
            let shared =
                tokens.iter().zip(&other.tokens()[..end]).take_while(|(a, b)| a == b).count().min(most);
            // Full pages, or all of its own request's prompt.
            match other.request == choice.request {
                true => shared > sequence.len(),
                false => shared / page_size * page_size > sequence.len(),
            }
        };
        if parts.iter().enumerate().any(reads_more) {
            return None;
        }
        // It needs room for all its tokens, and leaves a page for each of the
        // others, which would soon have it stop again.
        let held = self.held(std::slice::from_ref(&sequence));
        let unused = held.iter().filter(|held| !**held).count();
        let own = part::further_pages(&sequence, tokens.len() - sequence.len());
        (own + pages + self.running.len() <= unused).then_some(sequence)
    }

    /// The prompt of another answer to the same request, if that was read, but for the
    /// last token.
    fn fork(&self, choice: &Choice) -> Option<Sequence> {
        let prompt = choice.prompt().len();
        let mut running = self.running.iter().zip(self.batch.sequences());
        let has_read = |(other, sequence): &(&Choice, &Sequence)| {
            other.request == choice.request && sequence.len() >= prompt
        };
        let mut forked = running.find(has_read)?.1.fork();
        forked.truncate(prompt.min(choice.most_cached()));
        Some(forked)
    }
}
