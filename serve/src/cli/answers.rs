//! The scheduler's steps until all is answered, what they print, and how long
//! they took.

use std::{
    collections::BTreeMap,
    fmt,
    io::{self, Write},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    Result,
    backend::Engine,
    cli::PAGE_SIZE,
    request::Ended,
    scheduler::{Scheduler, Stats},
    text::{Stream, Text},
};

/// Answers all requests, and prints the answers while they come, in the order
/// of the requests; each below its heading, if there are any.
pub fn answer(
    engine: &mut dyn Engine,
    scheduler: &mut Scheduler,
    text: &Arc<Text>,
    headings: Option<&[String]>,
) -> Result<Summary> {
    let mut printer = Printer { text, headings, request: 0, printed: 0, stream: None };
    let mut summary = Summary::default();
    let start = Instant::now();
    while !scheduler.is_done() {
        let (before, begin) = (scheduler.stats(), Instant::now());
        scheduler.step(engine)?;
        summary.count(before, scheduler.stats(), begin.elapsed(), start.elapsed());
        printer.print(scheduler)?;
    }
    for (number, request) in (1..).zip(scheduler.requests()) {
        summary.decoded += request.answer().len().saturating_sub(1);
        if let Some(ended) = request.ended() {
            *summary.ended.entry(ended).or_default() += 1;
        }
        if request.ended() == Some(Ended::NoNumbers) {
            summary.failed.push(number);
        }
    }
    summary.stats = scheduler.stats();
    Ok(summary)
}

/// Prints one answer at a time.
struct Printer<'a> {
    text: &'a Arc<Text>,
    headings: Option<&'a [String]>,
    /// The request whose answer is being printed, and how much of it was.
    request: usize,
    printed: usize,
    stream: Option<Stream>,
}

impl Printer<'_> {
    /// Prints what has come since the last time.
    fn print(&mut self, scheduler: &Scheduler) -> Result<()> {
        let mut out = io::stdout().lock();
        while let Some(request) = scheduler.requests().get(self.request) {
            if request.answer().is_empty() && request.ended().is_none() {
                break;
            }
            let stream = match &mut self.stream {
                Some(stream) => stream,
                None => {
                    if let Some(headings) = self.headings {
                        writeln!(out, "> {}", headings[self.request])?;
                    }
                    self.stream.insert(self.text.stream())
                }
            };
            let spoken = request.spoken();
            for &token in &spoken[self.printed..] {
                out.write_all(stream.push(token).as_bytes())?;
            }
            self.printed = spoken.len();
            if request.ended().is_none() {
                break;
            }
            if let Some(stream) = self.stream.take() {
                writeln!(out, "{}", stream.finish())?;
            }
            if self.headings.is_some() {
                writeln!(out)?;
            }
            (self.request, self.printed) = (self.request + 1, 0);
        }
        Ok(out.flush()?)
    }
}

/// How all answers came about.
#[derive(Debug, Default)]
pub struct Summary {
    stats: Stats,
    /// Time of steps, divided by the tokens that they computed of prompts and of
    /// answers.
    reading: Duration,
    decoding: Duration,
    /// From the start to each first token, together.
    first: Duration,
    /// Tokens of answers after the first.
    decoded: usize,
    ended: BTreeMap<Ended, usize>,
    /// The requests, from 1 on, for which the model computed NaN.
    failed: Vec<usize>,
}

impl Summary {
    /// Whether all requests were answered.
    ///
    /// # Errors
    /// Those that were not, if there are several by their numbers.
    pub fn check(&self) -> Result<()> {
        if self.failed.is_empty() {
            return Ok(());
        }
        let numbers: Vec<_> = self.failed.iter().map(usize::to_string).collect();
        let of = match self.ended.values().sum() {
            1 => String::new(),
            _ => format!("prompt {}: ", numbers.join(", ")),
        };
        Err(format!(
            "{of}the model's logits are no numbers; its file may be damaged, or its numbers too large for f16, \
             which a GPU computes in (try --device cpu)"
        )
        .into())
    }

    /// Counts a step.
    fn count(&mut self, before: Stats, after: Stats, took: Duration, since_start: Duration) {
        let (read, decoded) = (after.read - before.read, after.decoded - before.decoded);
        let reading = took.mul_f64(read as f64 / (read + decoded).max(1) as f64);
        self.reading += reading;
        self.decoding += took.saturating_sub(reading);
        self.first += since_start * (after.begun - before.begun) as u32;
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (stats, requests) = (&self.stats, self.ended.values().sum::<usize>());
        let many = requests > 1;
        let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
        if many {
            write!(f, "{requests} prompts; ")?;
        }
        write!(f, "prefill {} tokens, {:.1} tokens/s; ", stats.read, rate(stats.read, self.reading))?;
        if many {
            write!(f, "{} prefill tokens saved by shared prefixes; ", stats.saved)?;
        }
        write!(f, "decode {} tokens, {:.1} tokens/s; ", self.decoded, rate(self.decoded, self.decoding))?;
        if stats.drafted > 0 {
            write!(f, "{} tokens drafted, {} accepted; ", stats.drafted, stats.accepted)?;
        }
        let first = self.first.as_secs_f64() * 1e3 / stats.begun.max(1) as f64;
        write!(f, "time to first token {first:.0} ms")?;
        if many {
            write!(f, " in the mean; preemptions: {}", stats.preemptions)?;
            if stats.recomputed > 0 {
                write!(f, ", {} tokens computed again", stats.recomputed)?;
            }
        }
        write!(f, "; {} steps; at most {} pages of {PAGE_SIZE} tokens; ", stats.steps, stats.pages)?;
        for (index, (ended, count)) in self.ended.iter().enumerate() {
            f.write_str(if index == 0 { "ended by " } else { ", " })?;
            match many {
                true => write!(f, "{ended} ({count})")?,
                false => write!(f, "{ended}")?,
            }
        }
        Ok(())
    }
}
