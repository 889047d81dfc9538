//! Drafts by a smaller model of the same vocabulary.

use std::{
    collections::{HashMap, HashSet},
    fmt,
};

use flashinfer_rs::kv::{Batch, PageAllocator, PrefixCache};

use crate::{
    Result,
    backend::{Backend, Output, Step, StepToken},
    request::RequestId,
    scheduler::{Choice, flight::Rows, part},
};

/// A model that drafts, with a KV cache of its own.
///
/// It reads what the answers have that run, and takes a step for each token of the drafts, of all
/// answers at a time. What was wrong is taken back when it drafts next. Where its cache has no
/// page for an answer, that has no draft.
pub struct DraftModel {
    backend: Box<dyn Backend>,
    pool: PageAllocator,
    prefixes: PrefixCache,
    /// In the order of the sequences in `batch`.
    answers: Vec<Answer>,
    batch: Batch,
    /// The most tokens that one of its steps computes.
    step_tokens: usize,
    /// Steps of up to so many take less time if each has an output.
    few_tokens: usize,
    /// The most tokens of a sequence.
    context: usize,
}

/// The tokens of a sequence.
struct Answer {
    id: AnswerId,
    /// Those that were computed.
    tokens: Vec<u32>,
    /// How many of them are no draft.
    known: usize,
}

/// A request, and which of its answers.
type AnswerId = (RequestId, usize);

/// A draft that is made.
struct Turn<'a> {
    choice: &'a Choice,
    /// Where that is among those that run.
    index: usize,
    /// The most tokens.
    most: usize,
    draft: Vec<u32>,
}

impl fmt::Debug for DraftModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DraftModel").field("pool", &self.pool).finish_non_exhaustive()
    }
}

impl DraftModel {
    /// A model with the memory of a pool, which no other model uses. Its steps have at most
    /// `step_tokens` tokens, and its sequences `context`.
    pub fn new(backend: Box<dyn Backend>, pool: &PageAllocator, step_tokens: usize, context: usize) -> Self {
        Self {
            backend,
            pool: pool.clone(),
            prefixes: PrefixCache::new(pool),
            answers: Vec::new(),
            batch: Batch::new(pool),
            step_tokens,
            few_tokens: 0,
            context: context.min(pool.num_pages() * pool.page_size()),
        }
    }

    /// Has each token of steps of up to so many have an output, which takes less time on some backends.
    #[must_use]
    pub fn with_few_tokens(mut self, few_tokens: usize) -> Self {
        self.few_tokens = few_tokens;
        self
    }

    /// How many tokens the model can have after those of a choice.
    pub(super) fn room(&self, choice: &Choice) -> usize {
        self.context.saturating_sub(choice.tokens().len())
    }

    /// Drafts of the choices that run, of at most so many tokens. One whose tokens take more
    /// than a step to be read has none until they are.
    ///
    /// # Errors
    /// The model cannot be computed, and is of no use afterwards.
    pub(super) fn draft(&mut self, running: &[Choice], lens: &[usize]) -> Result<Vec<Vec<u32>>> {
        self.forget_ended(running)?;
        self.begin(running, lens)?;
        let indices: HashMap<_, _> = running.iter().map(id).zip(0..).collect();
        let turn =
            |index: usize| Turn { choice: &running[index], index, most: lens[index], draft: Vec::new() };
        let mut turns: Vec<_> = self.answers.iter().map(|answer| turn(indices[&answer.id])).collect();
        self.read(&mut turns)?;
        while self.continue_drafts(&mut turns)? {}
        let mut drafts = vec![Vec::new(); running.len()];
        turns.into_iter().for_each(|turn| drafts[turn.index] = turn.draft);
        Ok(drafts)
    }

    /// Has those that do not run give their pages back, which stay cached as long as nobody needs
    /// them.
    fn forget_ended(&mut self, running: &[Choice]) -> Result<()> {
        let running: HashSet<_> = running.iter().map(id).collect();
        for index in (0..self.answers.len()).rev() {
            if !running.contains(&self.answers[index].id) {
                let (answer, sequence) = (self.answers.remove(index), self.batch.remove(index)?);
                self.prefixes.insert(&answer.tokens, &sequence)?;
            }
        }
        Ok(())
    }

    /// Has choices that are drafted for the first time begin, with what is cached of them.
    fn begin(&mut self, running: &[Choice], lens: &[usize]) -> Result<()> {
        let known: HashSet<_> = self.answers.iter().map(|answer| answer.id).collect();
        let drafted = running.iter().zip(lens).filter(|(_, len)| **len > 0);
        for (choice, _) in drafted.filter(|(choice, _)| !known.contains(&id(choice))) {
            let tokens = choice.tokens();
            let sequence = self.prefixes.lookup(&tokens[..tokens.len() - 1]);
            let tokens = tokens[..sequence.len()].to_vec();
            self.answers.push(Answer { id: id(choice), known: tokens.len(), tokens });
            self.batch.push(sequence)?;
        }
        Ok(())
    }

    /// Computes what the model has not seen yet of the choices' tokens, which gives the first
    /// token of drafts.
    fn read(&mut self, turns: &mut [Turn<'_>]) -> Result<()> {
        let mut rows = Rows { lens: vec![0; turns.len()], ..Rows::default() };
        let (mut places, mut pages) = (Vec::new(), 0);
        for (place, turn) in turns.iter().enumerate().filter(|(_, turn)| turn.most > 0) {
            let tokens = turn.choice.tokens();
            let from = self.answers[place].agree_with(tokens);
            self.batch.truncate(place, from)?;
            let len = (tokens.len() - from).min(self.step_tokens - rows.tokens.len());
            let further = part::further_pages(&self.batch.sequences()[place], len + turn.most - 1);
            if len == 0 || !self.make_free(pages + further) {
                continue;
            }
            pages += further;
            rows.lens[place] = len;
            rows.tokens.extend(StepToken::known(&tokens[from..from + len]));
            let answer = &mut self.answers[place];
            answer.tokens.extend(&tokens[from..from + len]);
            answer.known = answer.tokens.len();
            if answer.known == tokens.len() {
                rows.outputs.push(turn.choice.draft_output(rows.tokens.len() - 1, &[]));
                places.push(Some(place));
            }
        }
        if rows.tokens.len() <= self.few_tokens {
            (rows.outputs, places) = with_all_rows(rows.outputs, &places, rows.tokens.len());
        }
        self.step(&rows, &places, turns)
    }

    /// Computes the last token of each draft that may be longer, which gives the next one. Says
    /// whether there was any.
    fn continue_drafts(&mut self, turns: &mut [Turn<'_>]) -> Result<bool> {
        let mut rows = Rows { lens: vec![0; turns.len()], ..Rows::default() };
        let mut places = Vec::new();
        for (place, turn) in turns.iter().enumerate().filter(|(_, turn)| turn.draft.len() < turn.most) {
            let Some(&last) = turn.draft.last() else { continue };
            rows.outputs.push(turn.choice.draft_output(rows.tokens.len(), &turn.draft));
            rows.tokens.push(StepToken::Known(last));
            rows.lens[place] = 1;
            self.answers[place].tokens.push(last);
            places.push(Some(place));
        }
        self.step(&rows, &places, turns)?;
        Ok(!places.is_empty())
    }

    /// Takes a step, whose outputs are tokens of the drafts at these places, or of none. A draft ends where
    /// the model computed NaN.
    fn step(&mut self, rows: &Rows, places: &[Option<usize>], turns: &mut [Turn<'_>]) -> Result<()> {
        if rows.tokens.is_empty() {
            return Ok(());
        }
        self.batch.append(rows.lens.iter().copied())?;
        let step = Step { batch: &self.batch, tokens: &rows.tokens, outputs: &rows.outputs };
        let samples = self.backend.step(&step)?;
        if samples.len() != places.len() {
            return Err(format!("it gave {} samples for {}", samples.len(), places.len()).into());
        }
        for (place, sample) in places.iter().zip(samples) {
            let Some(place) = *place else { continue };
            let turn = &mut turns[place];
            match sample.token {
                Some(token) => turn.draft.push(token),
                None => turn.most = turn.draft.len(),
            }
        }
        Ok(())
    }

    /// Has so many pages free, if cached prefixes that nobody uses suffice.
    fn make_free(&mut self, pages: usize) -> bool {
        let missing = pages.saturating_sub(self.pool.free_pages());
        self.prefixes.evict(missing) == missing
    }
}

impl Answer {
    /// Keeps what was computed of these tokens, but for the last one, and says how many that are.
    fn agree_with(&mut self, tokens: &[u32]) -> usize {
        let drafted = self.tokens[self.known..].iter().zip(&tokens[self.known..]);
        let right = drafted.take_while(|(a, b)| a == b).count();
        self.known = (self.known + right).min(tokens.len() - 1);
        self.tokens.truncate(self.known);
        self.known
    }
}

/// An output for each of so many rows, and their places: none of those that are new.
fn with_all_rows(
    outputs: Vec<Output>,
    places: &[Option<usize>],
    rows: usize,
) -> (Vec<Output>, Vec<Option<usize>>) {
    let mut all: Vec<_> = (0..rows).map(|row| (Output::greedy(row), None)).collect();
    for (output, &place) in outputs.into_iter().zip(places) {
        let row = output.row;
        all[row] = (output, place);
    }
    all.into_iter().unzip()
}

/// Which answer a choice is.
fn id(choice: &Choice) -> AnswerId {
    (choice.request, choice.index)
}
