//! A choice: one of the answers to a request, and when it ends.

use std::{collections::BTreeSet, mem, ops::Range, sync::Arc, time::Instant};

use flashinfer_rs::indices::LogitEdit;

use super::{Limits, Token, Update, drafts::AnswerDrafts};
use crate::{
    backend::{Logprobs, Output, Sample},
    constraint::Grammar,
    request::{Finish, Request, RequestId},
    sampling::{Sampler, SamplingParams},
};

/// What is added to a logit for its token to be the likeliest, whatever the others are.
const CERTAIN: f32 = 1e30;

/// A prompt, and what the model has added to it.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The request that this is an answer to.
    pub request: RequestId,
    /// Which of its answers.
    pub index: usize,
    params: Arc<SamplingParams>,
    sampler: Sampler,
    /// What the answer has to be, and how far it has come.
    grammar: Option<Grammar>,
    tokens: Vec<u32>,
    prompt: usize,
    /// Tokens that the cache held at some time.
    pub reached: usize,
    /// Tokens of the prompt that were cached when it was first read.
    pub cached: Option<usize>,
    /// When it first ran.
    pub started: Option<Instant>,
    /// Rows of the prompt of which it is known how likely the token was that follows.
    scored: usize,
    /// How likely these were, as far as nobody was told.
    prompt_logprobs: Vec<Logprobs>,
    finish: Option<Finish>,
    /// Its drafts.
    pub drafts: AnswerDrafts,
}

impl Choice {
    /// The answers to a request, all of which are still empty.
    pub fn of(id: RequestId, request: Request, limits: &Limits) -> impl Iterator<Item = Self> {
        let Request { prompt, params, grammar, .. } = request;
        let (params, ends) = (Arc::new(params), limits.ends.clone());
        let seed = params.seed.unwrap_or_else(rand::random);
        (0..params.n).map(move |index| Self {
            request: id,
            index,
            sampler: Sampler::new(&params, seed, index, &prompt, ends_of(&params, &ends)),
            grammar: grammar.clone(),
            params: params.clone(),
            prompt: prompt.len(),
            tokens: prompt.clone(),
            reached: 0,
            cached: None,
            started: None,
            scored: 0,
            prompt_logprobs: Vec::new(),
            finish: None,
            drafts: AnswerDrafts::default(),
        })
    }

    /// The tokens of the prompt and of the answer.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The tokens of the prompt.
    pub fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt]
    }

    /// The tokens that the model has added.
    pub fn answer(&self) -> &[u32] {
        &self.tokens[self.prompt..]
    }

    /// Why the answer ended, if it did.
    pub fn finish(&self) -> Option<&Finish> {
        self.finish.as_ref()
    }

    /// Ends the answer, and says so.
    pub fn end(&mut self, finish: Finish) -> Update {
        self.finish = Some(finish);
        self.update(None)
    }

    /// What is said of the last token, if there is one, and of the end.
    pub fn update(&mut self, token: Option<Token>) -> Update {
        Update {
            request: self.request,
            choice: self.index,
            token,
            finish: self.finish.clone(),
            cached_tokens: self.cached.unwrap_or(0),
            started: self.started,
            prompt_logprobs: mem::take(&mut self.prompt_logprobs),
        }
    }

    /// The most tokens that may still come.
    pub fn room(&self) -> usize {
        self.params.max_tokens.unwrap_or(usize::MAX) - self.answer().len()
    }

    /// Rows of the prompt of which it is still to be found how likely the next token was: of the
    /// first answer only.
    pub fn unscored(&self) -> Range<usize> {
        let scores = self.params.prompt_logprobs.is_some() && self.index == 0;
        self.scored..if scores { self.prompt - 1 } else { self.scored }
    }

    /// The most of its tokens that need not be computed: all but the last, and what is scored.
    pub fn most_cached(&self) -> usize {
        let unscored = self.unscored();
        if unscored.is_empty() { self.tokens.len() - 1 } else { unscored.start }
    }

    /// Whether others may use what it has read. Not where it has read again what was cached, as then
    /// the cache would need its pages and those of others for the same tokens.
    pub fn is_cached(&self) -> bool {
        self.params.prompt_logprobs.is_none()
    }

    /// What is asked of rows of the prompt, the first of which is `row`, after so many tokens: how
    /// likely the tokens are that follow.
    pub fn scores(&self, row: usize, from: usize, scores: Range<usize>) -> impl Iterator<Item = Output> {
        scores.map(move |at| Output {
            edits: vec![LogitEdit::bias(self.tokens[from + at + 1], CERTAIN)],
            logprobs: self.params.prompt_logprobs,
            ..Output::greedy(row + at)
        })
    }

    /// Takes in what came of rows of the prompt. If the model computed NaN, the answer ends, which
    /// is said.
    pub fn score(&mut self, samples: Vec<Sample>) -> Option<Update> {
        for sample in samples {
            let Some(mut logprobs) = sample.logprobs else { return Some(self.end(Finish::NoNumbers)) };
            self.scored += 1;
            if sample.token != Some(self.tokens[self.scored]) {
                // Not even with all that was added.
                logprobs.chosen = f32::NEG_INFINITY;
            }
            self.prompt_logprobs.push(logprobs);
        }
        None
    }

    /// Whether the answer has to be what a constraint asks for. Then it has no drafts.
    pub fn is_constrained(&self) -> bool {
        self.grammar.is_some()
    }

    /// Whether it can be said how the token after the next one is chosen, whatever the next one is.
    /// Under penalties, a step that may have drafts is planned when the last token is known.
    pub fn runs_ahead(&self, drafts: bool) -> bool {
        let waits_for_drafts = drafts && self.sampler.has_penalties();
        !self.is_constrained() && !waits_for_drafts && self.params.logprobs.is_none()
    }

    /// How the token after the next one is chosen, where [`runs_ahead`](Self::runs_ahead).
    pub fn output_ahead(&self, row: usize) -> Output {
        self.sampler.output_ahead(row)
    }

    /// How the token is drafted that comes after these, which come next: as the model is to choose
    /// it, with the same random number.
    pub fn draft_output(&self, row: usize, draft: &[u32]) -> Output {
        let mut sampler = self.sampler.clone();
        draft.iter().for_each(|&token| sampler.push(token));
        Output { logprobs: None, ..sampler.output(row, None) }
    }

    /// What n-grams say comes next, at most `most` tokens.
    pub fn ngram_draft(&mut self, most: usize) -> Vec<u32> {
        self.drafts.ngrams(&self.tokens, most)
    }

    /// Whether n-grams say what comes next.
    pub fn has_ngram(&mut self) -> bool {
        self.drafts.guess(&self.tokens).is_some()
    }

    /// Takes in that nothing was drafted by n-grams, and that this token comes next.
    pub fn compare_ngram(&mut self, next: u32) {
        self.drafts.compare(&self.tokens, next);
    }

    /// Finds the tokens that the constraint allows next, if there is one. If none can be found,
    /// the answer ends, which is said.
    pub fn advance_grammar(&mut self) -> Option<Update> {
        let problem = self.grammar.as_mut()?.advance().err()?;
        Some(self.end(Finish::Failed(format!("its constraint cannot be followed: {problem}"))))
    }

    /// How the next token, and those after each token of a draft, are chosen: from a
    /// row of logits and those that follow it.
    pub fn outputs(&self, row: usize, draft: &[u32]) -> Vec<Output> {
        let allowed = self.grammar.as_ref().and_then(Grammar::allowed).cloned();
        let mut outputs = vec![self.sampler.output(row, allowed)];
        if !draft.is_empty() {
            let mut sampler = self.sampler.clone();
            outputs.extend((row + 1..).zip(draft).map(|(row, &token)| {
                sampler.push(token);
                sampler.output(row, None)
            }));
        }
        outputs
    }

    /// Adds a token to the answer, which may end it. The cache holds so many tokens.
    pub fn push(&mut self, token: u32, limits: &Limits, cache: usize) {
        self.tokens.push(token);
        self.sampler.push(token);
        let of_constraint = self.push_to_grammar(token);
        // What follows a token takes that token's place in the cache.
        self.finish = match self.tokens.len() {
            _ if !self.params.ignore_eos && limits.ends.contains(&token) => Some(Finish::EndToken(token)),
            _ if self.params.stop_token_ids.contains(&token) => Some(Finish::StopToken(token)),
            _ if of_constraint.is_some() => of_constraint,
            _ if self.room() == 0 => Some(Finish::MaxTokens),
            len if len > limits.context => Some(Finish::Context),
            len if len > cache => Some(Finish::Cache),
            _ => None,
        };
    }

    /// Tells the constraint of a token, and gives the end if it asks for no more.
    fn push_to_grammar(&mut self, token: u32) -> Option<Finish> {
        let grammar = self.grammar.as_mut()?;
        match grammar.push(token) {
            Ok(()) => grammar.is_complete().then_some(Finish::Complete),
            Err(problem) => Some(Finish::Failed(format!("its constraint cannot be followed: {problem}"))),
        }
    }
}

/// The tokens that end an answer.
fn ends_of<'a>(params: &'a SamplingParams, ends: &'a BTreeSet<u32>) -> impl Iterator<Item = u32> {
    let ends = ends.iter().filter(|_| !params.ignore_eos);
    ends.chain(&params.stop_token_ids).copied()
}
