//! The course of a step: it is planned, enqueued, followed by the next, and collected.

use std::mem;

use flashinfer_rs::kv::{Batch, Sequence};
use rayon::prelude::*;

use super::{
    Choice, Report, Scheduler, Token,
    drafts::{DraftedBy, Drafts, Right, Timed},
    flight::{Flight, Rows},
    part::Part,
};
use crate::{
    Result,
    backend::{Backend, Output, Sample, Step, StepToken},
    request::Finish,
};

impl Scheduler {
    /// Has a step computed, and reports it. Each choice whose last token was computed gets its
    /// next one, and those that follow as far as its draft was right. One for which the model
    /// computed NaN ends, and the others go on. The step after it may be in flight then.
    ///
    /// # Errors
    /// A fault of this scheduler, which is of no use afterwards. What the backend
    /// fails at is in the report.
    pub fn step(&mut self, backend: &mut dyn Backend) -> Result<Report> {
        let mut report = Report::default();
        self.timed = None;
        if self.in_flight.front().is_some_and(Flight::is_dropped) {
            self.collect(backend, &mut report)?;
        }
        if self.in_flight.is_empty() {
            self.advance_grammars(&mut report)?;
            let flight = Flight::new(self.plan()?);
            if flight.parts.is_empty() {
                return Ok(report);
            }
            let rows = flight.rows(&self.running);
            if let Err(failed) = self.enqueue(backend, flight, &rows)? {
                self.stats.steps += 1;
                self.fail(backend, failed, &mut report)?;
                self.remove_ended()?;
                return Ok(report);
            }
        }
        let next = self.enqueue_next(backend)?;
        let (timed, accepted) = (self.timed(next), self.stats.accepted);
        self.collect(backend, &mut report)?;
        if report.failure.is_none() {
            self.timed = timed;
        }
        if let Some(Timed { drafts: Drafts::Some(right), .. }) = &mut self.timed {
            right.counted = (self.stats.accepted - accepted) as f64;
        }
        self.remove_ended()?;
        Ok(report)
    }

    /// What the time of the step in flight will tell, once it is known what of its drafts is
    /// right.
    fn timed(&mut self, next: Next) -> Option<Timed> {
        let flight = self.in_flight.front()?;
        let (is_drafted, waits) = (flight.is_drafted(), next == Next::WaitsForDrafts);
        let waited = mem::replace(&mut self.waits, is_drafted || waits);
        let drafts = match is_drafted {
            true => Drafts::Some(Right { expected: self.expected, counted: 0.0 }),
            false if waited => Drafts::WaitedFor,
            false => Drafts::None,
        };
        flight.decodes().then_some(Timed { answers: flight.parts.len(), drafts })
    }

    /// Finds the tokens that constraints allow next, of all choices that run at once, and ends
    /// those for which there are none.
    fn advance_grammars(&mut self, report: &mut Report) -> Result<()> {
        if self.running.iter().any(Choice::is_constrained) {
            report.updates.par_extend(self.running.par_iter_mut().filter_map(Choice::advance_grammar));
            self.remove_ended()?;
        }
        Ok(())
    }

    /// Computes one token that is of no request, if nothing is in flight: whether the backend
    /// computes anything.
    ///
    /// # Errors
    /// A fault of this scheduler. Inside is what the backend fails at, or that no page is
    /// free.
    pub fn probe(&mut self, backend: &mut dyn Backend) -> Result<Result<(), String>> {
        if !self.in_flight.is_empty() {
            return Ok(Ok(()));
        }
        if !self.make_free(1) {
            return Ok(Err("no page is free to try whether anything can be computed".into()));
        }
        let mut batch = Batch::new(&self.pool);
        batch.push(Sequence::new(&self.pool))?;
        batch.append([1])?;
        let step = Step { batch: &batch, tokens: &[StepToken::Known(0)], outputs: &[Output::greedy(0)] };
        Ok(backend.step(&step).map(drop).map_err(|error| error.to_string()))
    }

    /// Enqueues a step, for which there are pages. If the backend refuses it, no sequence has
    /// changed.
    fn enqueue(
        &mut self,
        backend: &mut dyn Backend,
        flight: Flight,
        rows: &Rows,
    ) -> Result<Result<(), Failed>> {
        self.batch.append(rows.lens.iter().copied())?;
        self.stats.pages = self.stats.pages.max(self.pool.used_pages());
        let step = Step { batch: &self.batch, tokens: &rows.tokens, outputs: &rows.outputs };
        match backend.enqueue(&step) {
            Ok(()) => {
                self.in_flight.push_back(flight);
                Ok(Ok(()))
            }
            Err(error) => {
                self.take_back(&flight)?;
                Ok(Err(Failed { flight, problem: error.to_string() }))
            }
        }
    }

    /// Enqueues what follows the step in flight, if it is known, is to have no drafts, and there
    /// are pages for it.
    fn enqueue_next(&mut self, backend: &mut dyn Backend) -> Result<Next> {
        let Some(flight) = self.in_flight.front().filter(|_| backend.is_asynchronous()) else {
            return Ok(Next::IsPlanned);
        };
        // Who waits is not held up by a step, unless nobody leaves.
        let most = self.limits.max_running.min(self.limits.step_tokens);
        let ending = self.running.iter().filter(|choice| choice.room() == 1).count();
        let all_run = self.waiting.is_empty() || (self.running.len() == most && ending == 0);
        let context = self.limits.context.min(self.bounds.cache_tokens);
        let fits = self.running.iter().all(|choice| choice.tokens().len() < context);
        if !all_run || ending == self.running.len() || !fits {
            return Ok(Next::IsPlanned);
        }
        let drafts = !matches!(self.drafted_by, DraftedBy::Nothing);
        let Some((next, rows)) = flight.next(&self.running, drafts) else { return Ok(Next::IsPlanned) };
        if self.draft_lens(|_| true).is_some() {
            return Ok(Next::WaitsForDrafts);
        }
        let pages = self.further_pages(&next.parts);
        if !self.make_free(pages) {
            return Ok(Next::IsPlanned);
        }
        // One that is refused is planned again when this one is collected.
        let enqueued = self.enqueue(backend, next, &rows)?;
        Ok(if enqueued.is_ok() { Next::IsInFlight } else { Next::IsPlanned })
    }

    /// Collects the oldest step in flight, and takes in what came of it.
    fn collect(&mut self, backend: &mut dyn Backend, report: &mut Report) -> Result<()> {
        let Some(flight) = self.in_flight.pop_front() else { return Ok(()) };
        self.stats.steps += 1;
        match samples(backend, &flight) {
            Ok(samples) => self.take(&flight, samples, report),
            Err(problem) => self.fail(backend, Failed { flight, problem }, report),
        }
    }

    /// After a step that failed: computes each part alone, and ends the choices for
    /// which that fails, too. Those that followed it do not count.
    fn fail(&mut self, backend: &mut dyn Backend, failed: Failed, report: &mut Report) -> Result<()> {
        for _ in self.in_flight.drain(..) {
            // Nobody wants to know.
            let _ = backend.collect();
        }
        let Failed { flight, problem } = failed;
        self.stats.failed_steps += 1;
        report.failure = Some(problem);
        self.take_back(&flight)?;
        for (place, part) in flight.places.into_iter().zip(flight.parts) {
            let Some(place) = place else { continue };
            let alone = Flight::alone(place, part);
            let rows = alone.rows(&self.running);
            let computed = match self.enqueue(backend, alone, &rows)? {
                Ok(()) => self.in_flight.pop_front().map(|alone| (samples(backend, &alone), alone)),
                Err(Failed { flight, problem }) => Some((Err(problem), flight)),
            };
            match computed {
                Some((Ok(samples), alone)) => self.take(&alone, samples, report)?,
                Some((Err(problem), alone)) => {
                    self.take_back(&alone)?;
                    report.updates.push(self.running[place].end(Finish::Failed(problem)));
                }
                None => {}
            }
        }
        Ok(())
    }

    /// Takes back the tokens of a step that does not count, and of those that follow it.
    fn take_back(&mut self, flight: &Flight) -> Result<()> {
        for (place, part) in flight.running() {
            self.batch.truncate(place, part.from)?;
        }
        Ok(())
    }

    /// Takes in the samples of all parts of a step.
    fn take(&mut self, flight: &Flight, samples: Vec<Sample>, report: &mut Report) -> Result<()> {
        let mut samples = samples.into_iter();
        for (place, part) in flight.places.iter().zip(&flight.parts) {
            let next = samples.by_ref().take(part.outputs()).collect();
            match *place {
                Some(place) => self.finish(place, part, next, report)?,
                None => self.stats.surplus += part.rows(),
            }
        }
        Ok(())
    }

    /// Takes in what the backend computed of a choice: how likely tokens of the prompt were, and
    /// the token after its last one and after each of the draft.
    fn finish(
        &mut self,
        index: usize,
        part: &Part,
        mut samples: Vec<Sample>,
        report: &mut Report,
    ) -> Result<()> {
        let (choice, sequence) = (&mut self.running[index], &self.batch.sequences()[index]);
        let computed = part.from + part.len;
        if part.reads {
            // Nobody is to read NaN.
            if choice.is_cached() && samples.iter().all(|sample| sample.token.is_some()) {
                self.prefixes.insert(&choice.tokens()[..computed], sequence)?;
            }
            self.stats.read += part.len;
        } else {
            self.stats.decoded += part.len;
        }
        self.stats.decoded += part.draft.len();
        self.stats.drafts += usize::from(!part.draft.is_empty());
        self.stats.drafted += part.draft.len();
        self.stats.recomputed += choice.reached.min(computed).saturating_sub(computed - part.len);
        let begins = choice.answer().is_empty();
        let next = samples.split_off(part.scores.len());
        let wrong = choice.score(samples);
        let samples = if wrong.is_some() { Vec::new() } else { next };
        report.updates.extend(wrong);
        let agrees = |(draft, sample): &(&u32, &Sample)| Some(**draft) == sample.token;
        let right = part.draft.iter().zip(&samples).take_while(agrees).count();
        if part.whole {
            self.drafted_by.learn(choice, part.draft.len(), right, samples.first());
        }
        for Sample { token, logprobs } in samples.into_iter().take(right + 1) {
            let Some(id) = token else {
                report.updates.push(choice.end(Finish::NoNumbers));
                break;
            };
            choice.push(id, &self.limits, self.bounds.cache_tokens);
            report.updates.push(choice.update(Some(Token { id, logprobs })));
            if choice.finish().is_some() {
                break;
            }
        }
        self.stats.begun += usize::from(begins && !choice.answer().is_empty());
        if part.whole {
            // The last token is not computed yet, unless none came; what was wrong goes.
            let len = choice.tokens().len() - usize::from(choice.finish() != Some(&Finish::NoNumbers));
            self.stats.accepted += len - computed;
            if len < computed + part.draft.len() {
                self.batch.truncate(index, len)?;
            }
            choice.reached = choice.reached.max(len);
        } else {
            choice.reached = choice.reached.max(computed);
        }
        Ok(())
    }
}

/// What becomes of the step after the one in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// It was enqueued.
    IsInFlight,
    /// It is planned when the other was collected.
    IsPlanned,
    /// The same, only because it may have drafts.
    WaitsForDrafts,
}

/// A step that failed.
struct Failed {
    flight: Flight,
    problem: String,
}

/// What came of the outputs of the oldest step in flight, or why it failed.
fn samples(backend: &mut dyn Backend, flight: &Flight) -> Result<Vec<Sample>, String> {
    let samples = backend.collect().map_err(|error| error.to_string())?;
    match flight.outputs() {
        outputs if outputs == samples.len() => Ok(samples),
        outputs => Err(format!("the backend gave {} samples for {outputs}", samples.len())),
    }
}
