//! Steps in flight: those that the backend has, and that were not collected.

use super::{Choice, Part};
use crate::backend::{Output, StepToken};

/// A step that the backend computes.
#[derive(Debug)]
pub struct Flight {
    pub parts: Vec<Part>,
    /// Where the choices of the parts are among those that run; `None` for one that has ended.
    pub places: Vec<Option<usize>>,
}

/// What a step computes, row by row.
#[derive(Default)]
pub struct Rows {
    pub tokens: Vec<StepToken>,
    pub outputs: Vec<Output>,
    /// New tokens of each choice that runs.
    pub lens: Vec<usize>,
}

impl Flight {
    /// The parts of all choices that run.
    pub fn new(parts: Vec<Part>) -> Self {
        let places = (0..parts.len()).map(Some).collect();
        Self { parts, places }
    }

    /// The part of one choice.
    pub fn alone(place: usize, part: Part) -> Self {
        Self { parts: vec![part], places: vec![Some(place)] }
    }

    /// The parts of choices that have not ended, and where these are.
    pub fn running(&self) -> impl Iterator<Item = (usize, &Part)> {
        self.places.iter().zip(&self.parts).filter_map(|(place, part)| Some(((*place)?, part)))
    }

    /// Whether all choices of it have ended.
    pub fn is_dropped(&self) -> bool {
        self.places.iter().all(Option::is_none)
    }

    /// Forgets a choice that has ended; those behind it move forward.
    pub fn remove(&mut self, ended: usize) {
        for place in &mut self.places {
            *place = place.filter(|place| *place != ended).map(|place| place - usize::from(place > ended));
        }
    }

    /// Whether it has drafts.
    pub fn is_drafted(&self) -> bool {
        self.parts.iter().any(|part| !part.draft.is_empty())
    }

    /// Whether all of its answers decode.
    pub fn decodes(&self) -> bool {
        self.parts.iter().all(|part| !part.reads)
    }

    /// How many outputs it has.
    pub fn outputs(&self) -> usize {
        self.parts.iter().map(Part::outputs).sum()
    }

    /// What is computed of choices whose tokens are known.
    pub fn rows(&self, choices: &[Choice]) -> Rows {
        let mut rows = Rows { lens: vec![0; choices.len()], ..Rows::default() };
        let known = |token: &u32| StepToken::Known(*token);
        for (place, part) in self.running() {
            let choice = &choices[place];
            rows.outputs.extend(choice.scores(rows.tokens.len(), part.from, part.scores.clone()));
            rows.tokens.extend(choice.tokens()[part.from..][..part.len].iter().map(known));
            if part.whole {
                rows.outputs.extend(choice.outputs(rows.tokens.len() - 1, &part.draft));
            }
            rows.tokens.extend(part.draft.iter().map(known));
            rows.lens[place] = part.rows();
        }
        rows
    }

    /// What follows this step while it is computed: the token after the one that it chooses, of
    /// each choice that runs, which may have `drafts` or not. `None` if the host has to know more before.
    pub fn next(&self, choices: &[Choice], drafts: bool) -> Option<(Self, Rows)> {
        let mut next = Self { parts: Vec::new(), places: Vec::new() };
        let mut rows = Rows { lens: vec![1; choices.len()], ..Rows::default() };
        let mut outputs = 0;
        for (place, part) in self.places.iter().zip(&self.parts) {
            let chosen = outputs;
            outputs += part.outputs();
            let Some(place) = *place else { continue };
            let choice = &choices[place];
            if !part.whole || part.outputs() > 1 || !choice.runs_ahead(drafts) {
                return None;
            }
            rows.outputs.push(choice.output_ahead(rows.tokens.len()));
            rows.tokens.push(StepToken::Chosen(chosen));
            next.parts.push(Part::after(part));
            next.places.push(Some(place));
        }
        (next.parts.len() == choices.len()).then_some((next, rows))
    }
}
