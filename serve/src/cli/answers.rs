//! The answers to prompts, as they are printed, and what they took.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    io::Write,
    time::Duration,
};

use super::choices;
use crate::{
    Result,
    engine::{End, Engine, Events, Status},
    request::Finish,
};

/// How many prompts wait for their answers at a time.
const AHEAD: usize = 512;

/// A prompt that was given to the engine.
pub struct Asked {
    /// What it is called where it is not answered, as in `line 3`.
    pub name: String,
    /// What is printed above its answer, if anything.
    pub heading: Option<String>,
    /// Its answer, or why there is none.
    pub events: Result<Events>,
}

/// Prints the answers to prompts while they come, in the order of the prompts. These are asked as
/// many at a time as an engine may take; one that cannot be answered is passed over, and noted.
pub fn answer(
    engine: &Engine,
    mut asked: impl Iterator<Item = Asked>,
    out: &mut dyn Write,
) -> Result<Summary> {
    let mut summary = Summary { page_size: engine.config().page_size, ..Summary::default() };
    let mut waiting: VecDeque<_> = asked.by_ref().take(AHEAD).collect();
    while let Some(Asked { name, heading, events }) = waiting.pop_front() {
        if let Some(heading) = &heading {
            writeln!(out, "> {heading}")?;
        }
        match events {
            Ok(events) => {
                for end in choices::print(engine.text(), events, out)? {
                    summary.count(name.clone(), end);
                }
                writeln!(out)?;
            }
            Err(error) => summary.failed.push((name, error.to_string())),
        }
        if heading.is_some() {
            writeln!(out)?;
        }
        out.flush()?;
        waiting.extend(asked.next());
    }
    summary.status = engine.status();
    Ok(summary)
}

/// Why an answer is none, if it is none.
pub fn failure(finish: &Finish) -> Option<String> {
    match finish {
        Finish::NoNumbers => Some(
            "the model's logits are no numbers; its file may be damaged, or its numbers too large for f16, which \
             a GPU computes in (try --device cpu)"
                .into(),
        ),
        Finish::Failed(_) => Some(format!("the answer was ended by {finish}")),
        _ => None,
    }
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
    /// The prompts that were not answered, and why.
    failed: Vec<(String, String)>,
}

impl Summary {
    /// Whether all prompts were answered.
    ///
    /// # Errors
    /// Those that were not, by their names if there are several, below each reason.
    pub fn check(&self) -> Result<()> {
        let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
        for (name, reason) in &self.failed {
            match reasons.iter_mut().find(|(known, _)| known == reason) {
                Some((_, names)) => names.push(name),
                None => reasons.push((reason, vec![name])),
            }
        }
        let line = |(reason, names): &(&str, Vec<&str>)| match names.join(", ") {
            names if names.is_empty() => reason.to_string(),
            names => format!("{names}: {reason}"),
        };
        match reasons.is_empty() {
            true => Ok(()),
            false => Err(reasons.iter().map(line).collect::<Vec<_>>().join("\n").into()),
        }
    }

    fn count(&mut self, name: String, end: End) {
        self.decoded += end.usage.completion_tokens.saturating_sub(1);
        self.failed.extend(failure(&end.finish).map(|reason| (name, reason)));
        *self.ended.entry(end.finish.to_string()).or_default() += 1;
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
        write!(f, "; {} steps; at most {} pages of {} tokens", stats.steps, stats.pages, self.page_size)?;
        for (index, (ended, count)) in self.ended.iter().enumerate() {
            f.write_str(if index == 0 { "; ended by " } else { ", " })?;
            match many {
                true => write!(f, "{ended} ({count})")?,
                false => write!(f, "{ended}")?,
            }
        }
        Ok(())
    }
}
