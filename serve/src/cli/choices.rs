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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        SamplingParams,
        backend::simulated::Simulated,
        engine::{Engine, EngineConfig, testing::ASCII},
        llm::complete,
        request::Request,
        scheduler::Limits,
        tests::bytes,
    };

    #[test]
    fn answers_stand_one_after_the_other_with_their_log_probabilities() {
        let limits = Limits {
            step_tokens: 32,
            chunk_tokens: 32,
            max_running: 16,
            context: 400,
            draft: 0,
            ends: [0].into(),
        };
        let engine = Engine::start(EngineConfig::new(limits), bytes::text("gpt-2"), |pool, limits| {
            Ok(Simulated::new(pool, limits.step_capacity(), ASCII))
        });
        let engine = engine.unwrap();
        let shown = |n, logprobs| {
            let params = SamplingParams {
                temperature: 1.0,
                seed: Some(1),
                max_tokens: Some(6),
                ignore_eos: true,
                n,
                logprobs,
                ..SamplingParams::default()
            };
            let submit = || engine.submit(Request::new(vec![104, 105], params.clone())).unwrap();
            let mut out = Vec::new();
            let ends = print(engine.text(), submit(), &mut out).unwrap();
            let answers = complete(submit()).unwrap();
            let usages: Vec<_> = ends.iter().map(|end| &end.usage).collect();
            assert_eq!(usages, answers.iter().map(|answer| &answer.end.usage).collect::<Vec<_>>());
            (String::from_utf8(out).unwrap(), answers)
        };
        let (alone, answers) = shown(1, None);
        assert_eq!(alone, answers[0].text);
        let (three, answers) = shown(3, None);
        let texts: Vec<_> =
            (1..).zip(&answers).map(|(number, answer)| format!("[{number}] {}", answer.text)).collect();
        assert_eq!(three, texts.join("\n"));
        let (two, answers) = shown(2, Some(2));
        let mut lines = two.strip_prefix(&format!("[1] {}\n", answers[0].text)).unwrap().split('\n');
        for token in &answers[0].tokens {
            let (line, logprobs) = (lines.next().unwrap(), token.logprobs.as_ref().unwrap());
            assert!(line.trim_start().starts_with(&format!("{:.4} \"", logprobs.chosen)), "{line}");
            let likeliest = line.split_once("  of ").unwrap().1;
            assert!(likeliest.starts_with(&format!("{:.4} \"", logprobs.top[0].logprob)), "{line}");
            assert!(likeliest.contains(&format!("\", {:.4} \"", logprobs.top[1].logprob)), "{line}");
        }
        assert!(lines.next().unwrap().starts_with("[2] "));
    }
}
