//! The answers to a prompt, one after the other, and the log-probabilities of their tokens.

use std::io::Write;

use crate::{
    Result,
    engine::{End, Events},
    scheduler::Token,
    text::Text,
};

/// An answer that is not printed to its end yet.
#[derive(Default)]
struct Answer {
    /// What was not printed.
    text: String,
    tokens: Vec<Token>,
    end: Option<End>,
}

/// Prints the answers to a prompt, each while it comes if those before it have ended. Of several,
/// each begins with its number; below one stand the log-probabilities of its tokens, if they were
/// asked for. Returns how they ended.
pub fn print(text: &Text, events: Events, out: &mut dyn Write) -> Result<Vec<End>> {
    let mut answers: Vec<Answer> = Vec::new();
    answers.resize_with(events.choices(), Answer::default);
    let several = answers.len() > 1;
    let mut ends = Vec::new();
    if several {
        write!(out, "[1] ")?;
    }
    for event in events {
        let answer = &mut answers[event.choice];
        answer.text.push_str(&event.text);
        answer.tokens.extend(event.tokens);
        answer.end = event.end;
        while let Some(answer) = answers.get_mut(ends.len()) {
            out.write_all(std::mem::take(&mut answer.text).as_bytes())?;
            out.flush()?;
            let Some(end) = answer.end.take() else { break };
            print_logprobs(text, &answer.tokens, out)?;
            ends.push(end);
            if several && ends.len() < answers.len() {
                write!(out, "\n[{}] ", ends.len() + 1)?;
            }
        }
    }
    Ok(ends)
}

/// A line for each token: its log-probability, and those of the likeliest in its place.
fn print_logprobs(text: &Text, tokens: &[Token], out: &mut dyn Write) -> Result<()> {
    let shown = |id| String::from_utf8_lossy(text.token_bytes(id)).into_owned();
    for token in tokens {
        let Some(logprobs) = &token.logprobs else { continue };
        write!(out, "\n{:>9.4} {:?}", logprobs.chosen, shown(token.id))?;
        for (index, top) in logprobs.top.iter().enumerate() {
            let between = if index == 0 { "  of" } else { "," };
            write!(out, "{between} {:.4} {:?}", top.logprob, shown(top.token))?;
        }
    }
    Ok(())
}
