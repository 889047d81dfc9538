//! A conversation at a prompt line.

use std::{io::Write, path::PathBuf, sync::Arc};

use super::{
    answers::failure,
    chat::Chat,
    choices,
    commands::{self, Command, HELP},
    interrupt::Interrupt,
    sampling::SamplingArgs,
    show,
};
use crate::{
    Llm, Result,
    hub::ModelName,
    request::{Finish, Request},
};

/// What begins and ends a text of several lines.
const QUOTES: &str = "\"\"\"";

/// What came of asking for a line.
pub enum Input {
    /// The line.
    Line(String),
    /// Ctrl-C.
    Interrupted,
    /// There are no more.
    End,
}

/// A conversation with a model.
pub struct Conversation {
    /// The model.
    pub llm: Arc<Llm>,
    /// Its name, and its files.
    pub name: ModelName,
    /// Where it is.
    pub files: Vec<PathBuf>,
    /// What was said.
    pub chat: Chat,
    /// Lines are continued, one by one, instead of answered.
    pub raw: bool,
    /// How answers are sampled.
    pub sampling: SamplingArgs,
    /// Whether times are shown.
    pub verbose: bool,
    /// What stops an answer.
    pub interrupt: Interrupt,
}

impl Conversation {
    /// Takes lines until there are no more, or `/exit` comes. `read` asks for one, and is told
    /// what to show before it.
    ///
    /// # Errors
    /// Those of writing, and of an engine that is gone. What is wrong with a line is told, and the
    /// conversation goes on.
    pub fn run(&mut self, read: &mut dyn FnMut(&str) -> Result<Input>, out: &mut dyn Write) -> Result<()> {
        while let Some(line) = next(read, out)? {
            match commands::parse(&line) {
                Ok(Command::Exit) => break,
                Ok(Command::Say(line)) if line.trim().is_empty() => {}
                Ok(Command::Say(question)) => self.say(question, out)?,
                Ok(command) => {
                    if let Err(error) = self.command(command, out) {
                        writeln!(out, "error: {error}")?;
                    }
                }
                Err(error) => writeln!(out, "error: {error}")?,
            }
        }
        Ok(())
    }

    fn command(&mut self, command: Command<'_>, out: &mut dyn Write) -> Result<()> {
        match command {
            Command::Help => writeln!(out, "{HELP}")?,
            Command::Clear => self.chat.clear(),
            Command::Show => {
                writeln!(out, "{}", show::describe(&self.name, &self.files)?)?;
                writeln!(out, "running          {}", self.llm.place())?;
                writeln!(out, "KV cache         {} tokens", self.llm.engine().bounds().cache_tokens)?;
            }
            Command::System(None) => {
                writeln!(out, "{}", self.chat.system.as_deref().unwrap_or("the model's own"))?;
            }
            Command::System(Some(text)) => self.chat.system = Some(text.into()).filter(|_| text != "none"),
            Command::Set(None) => {
                for (name, value) in self.sampling.shown() {
                    writeln!(out, "{name:20} {value}")?;
                }
                writeln!(out, "{:20} {}", "verbose", self.verbose)?;
            }
            Command::Set(Some("verbose true")) => self.verbose = true,
            Command::Set(Some("verbose false")) => self.verbose = false,
            Command::Set(Some(assignment)) => self.sampling.set(assignment)?,
            Command::Say(_) | Command::Exit => {}
        }
        Ok(())
    }

    fn take_back(&mut self) {
        if !self.raw {
            self.chat.take_back();
        }
    }

    /// Answers a question. One that cannot be answered is taken back.
    fn say(&mut self, question: &str, out: &mut dyn Write) -> Result<()> {
        let prompt = if self.raw {
            Ok(self.llm.text().encode(question))
        } else {
            self.chat.ask(question);
            self.chat.encode(self.llm.text())
        };
        let params = self.sampling.params(None);
        let submitted =
            prompt.and_then(|prompt| Ok(self.llm.engine().submit(Request::new(prompt, params))?));
        let events = match submitted {
            Ok(events) => events,
            Err(error) => {
                self.take_back();
                let hint = if self.chat.is_empty() { "" } else { "; /clear forgets what was said" };
                return Ok(writeln!(out, "error: {error}{hint}")?);
            }
        };
        let (llm, id) = (self.llm.clone(), events.id());
        let mut answer = Copied { out, text: Vec::new() };
        let stop = move || llm.engine().cancel(id);
        let text = self.llm.text().clone();
        let ends = self.interrupt.during(stop, || choices::print(&text, events, &mut answer))?;
        let Copied { out, text } = answer;
        writeln!(out)?;
        let Some(end) = ends.into_iter().next() else { return Ok(()) };
        if let Some(reason) = failure(&end.finish) {
            self.take_back();
            return Ok(writeln!(out, "error: {reason}")?);
        }
        if !self.raw {
            self.chat.answer(&String::from_utf8_lossy(&text));
        }
        if matches!(end.finish, Finish::Context | Finish::Cache | Finish::MaxTokens) {
            writeln!(out, "(the answer was ended by {})", end.finish)?;
        }
        if self.verbose {
            let usage = end.usage;
            writeln!(
                out,
                "{} tokens of the prompt, {} of them cached; {} of the answer",
                usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens
            )?;
        }
        Ok(writeln!(out)?)
    }
}

/// The next line, or several between quotes; `None` where there are no more.
fn next(read: &mut dyn FnMut(&str) -> Result<Input>, out: &mut dyn Write) -> Result<Option<String>> {
    let mut text: Option<String> = None;
    loop {
        let shown = if text.is_none() { ">>> " } else { "... " };
        let line = match read(shown)? {
            Input::Line(line) => line,
            Input::Interrupted => {
                text = None;
                writeln!(out, "/exit or Ctrl-D ends the program")?;
                continue;
            }
            Input::End => return Ok(None),
        };
        let (rest, begun) = match (&text, line.strip_prefix(QUOTES)) {
            (None, None) => return Ok(Some(line)),
            (None, Some(rest)) => (rest, String::new()),
            (Some(text), _) => (line.as_str(), format!("{text}\n")),
        };
        if let Some(last) = rest.strip_suffix(QUOTES) {
            return Ok(Some(begun + last));
        }
        text = Some(begun + rest);
    }
}

/// What is written, and a copy of it.
struct Copied<'a> {
    out: &'a mut dyn Write,
    text: Vec<u8>,
}

impl Write for Copied<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = self.out.write(bytes)?;
        self.text.extend(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use flashinfer_rs::artifacts::{ArtifactError, Fetch, Store};
    use test_support::required;

    use super::*;
    use crate::{LlmOptions, backend::device::Device, hub};

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        sampling: SamplingArgs,
    }

    /// Answers lines as a terminal would give them.
    fn script<'a>(lines: &'a [&'a str]) -> impl FnMut(&str) -> Result<Input> + 'a {
        let mut lines = lines.iter();
        move |_| {
            Ok(match lines.next() {
                None => Input::End,
                Some(&"^C") => Input::Interrupted,
                Some(line) => Input::Line(line.to_string()),
            })
        }
    }

    #[test]
    fn texts_of_several_lines_are_between_quotes() {
        let mut out = Vec::new();
        let lines =
            ["one", "\"\"\"two", "three\"\"\"", "\"\"\"four\"\"\"", "\"\"\"lost", "^C", "five", "\"\"\"open"];
        let mut read = script(&lines);
        for want in ["one", "two\nthree", "four", "five"] {
            assert_eq!(next(&mut read, &mut out).unwrap().as_deref(), Some(want));
        }
        assert_eq!(next(&mut read, &mut out).unwrap(), None);
        assert!(String::from_utf8(out).unwrap().contains("/exit"));
    }

    #[test]
    fn a_conversation_goes_on_after_what_is_wrong() {
        let store = Store::open(hub::store_config().unwrap()).unwrap();
        let files = match store.locate(&hub::smollm2(), Fetch::Allowed) {
            Ok(located) => vec![located.path],
            Err(error @ ArtifactError::NotFound { .. }) => return required::skip(required::MODEL, error),
            Err(error) => panic!("{error}"),
        };
        let options = LlmOptions { device: Device::Cpu, cache_tokens: 64, ..LlmOptions::default() };
        let mut conversation = Conversation {
            llm: Arc::new(Llm::load(&files, &options).unwrap()),
            name: ModelName::Smollm2,
            files,
            chat: Chat::default(),
            raw: false,
            sampling: Program::parse_from(["program"]).sampling,
            verbose: false,
            interrupt: Interrupt::default(),
        };
        let long = "word ".repeat(80);
        let lines = [
            "/nonsense",
            "/set heat 1",
            "/set top_p 7",
            "Hi",
            "/set top_p 1",
            long.as_str(),
            "What is the capital of France?",
            "/set verbose true",
            "",
            "/system Be brief.",
            "/system",
            "/clear",
            "/exit",
            "never read",
        ];
        let mut out = Vec::new();
        conversation.run(&mut script(&lines), &mut out).unwrap();
        let out = String::from_utf8(out).unwrap();
        let mut rest = out.as_str();
        for part in [
            "error: there is no command /nonsense",
            "error: there is no option `heat`",
            "error: top_p is 7; expected more than 0",
            "error: the prompt has",
            "The capital of France is Paris.\n",
            "Be brief.\n",
        ] {
            let at = rest.find(part).unwrap_or_else(|| panic!("{part:?} is not in what is left: {rest:?}"));
            rest = &rest[at + part.len()..];
        }
        assert!(conversation.verbose && conversation.chat.is_empty() && !out.contains("never"), "{out}");
    }
}
