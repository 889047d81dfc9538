//! The answers to prompts, as they are printed, and what they took.

use std::{
    collections::BTreeMap,
    fmt,
    io::{self, Write},
    time::Duration,
};

use crate::{
    Result,
    engine::{Engine, Events, Status},
    request::Finish,
};

/// Prints answers while they come, in the order of their requests; each below its
/// heading, if there are any.
pub fn answer(engine: &Engine, requests: Vec<Events>, headings: Option<&[String]>) -> Result<Summary> {
    let mut summary = Summary { page_size: engine.config().page_size, ..Summary::default() };
    let mut out = io::stdout().lock();
    for (index, events) in requests.into_iter().enumerate() {
        if let Some(headings) = headings {
            writeln!(out, "> {}", headings[index])?;
        }
        for event in events {
            out.write_all(event.text.as_bytes())?;
            if let Some(end) = event.end {
                summary.decoded += end.usage.completion_tokens.saturating_sub(1);
                if let Finish::NoNumbers | Finish::Failed(_) = end.finish {
                    summary.failed.push((index + 1, end.finish.to_string()));
                }
                *summary.ended.entry(end.finish.to_string()).or_default() += 1;
            }
            out.flush()?;
        }
        writeln!(out)?;
        if headings.is_some() {
            writeln!(out)?;
        }
    }
    summary.status = engine.status();
    Ok(summary)
}

/// How all answers came about.
#[derive(Debug, Default)]
pub struct Summary {
    status: Status,
    page_size: usize,
    /// Tokens of answers after the first.
    decoded: usize,
    /// How many answers ended in each way.
    ended: BTreeMap<String, usize>,
    /// The requests, from 1 on, that were not answered, and why.
    failed: Vec<(usize, String)>,
}

impl Summary {
    /// Whether all requests were answered.
    ///
    /// # Errors
    /// Those that were not, if there are several by their numbers.
    pub fn check(&self) -> Result<()> {
        let Some((_, reason)) = self.failed.first() else { return Ok(()) };
        let numbers: Vec<_> = self.failed.iter().map(|(number, _)| number.to_string()).collect();
        let of = match self.ended.values().sum() {
            1 => String::new(),
            _ => format!("prompt {}: ", numbers.join(", ")),
        };
        if *reason != Finish::NoNumbers.to_string() {
            return Err(format!("{of}the answer was ended by {reason}").into());
        }
        Err(format!(
            "{of}the model's logits are no numbers; its file may be damaged, or its numbers too large for f16, \
             which a GPU computes in (try --device cpu)"
        )
        .into())
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Status { stats, .. }, requests) = (&self.status, self.ended.values().sum::<usize>());
        let many = requests > 1;
        let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
        if many {
            write!(f, "{requests} prompts; ")?;
        }
        let (reading, decoding) = (self.status.reading, self.status.decoding);
        write!(f, "prefill {} tokens, {:.1} tokens/s; ", stats.read, rate(stats.read, reading))?;
        if many {
            write!(f, "{} prefill tokens saved by shared prefixes; ", stats.saved)?;
        }
        write!(f, "decode {} tokens, {:.1} tokens/s; ", self.decoded, rate(self.decoded, decoding))?;
        if stats.drafted > 0 {
            write!(f, "{} tokens drafted, {} accepted; ", stats.drafted, stats.accepted)?;
        }
        let first = self.status.time_to_first_token.as_secs_f64() * 1e3;
        write!(f, "time to first token {:.0} ms", first / self.status.answered.max(1) as f64)?;
        if many {
            write!(f, " in the mean; preemptions: {}", stats.preemptions)?;
            if stats.recomputed > 0 {
                write!(f, ", {} tokens computed again", stats.recomputed)?;
            }
        }
        write!(f, "; {} steps; at most {} pages of {} tokens; ", stats.steps, stats.pages, self.page_size)?;
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
