//! Programs in Jinja, run as transformers runs chat templates.

use std::{error::Error as _, io};

use jiff::{Zoned, fmt::strtime};
use minijinja::{Environment, Error, ErrorKind, State, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::{error::ChatError, python};
use crate::{Result, shorten::shorten};

/// The most steps of a template, so that each ends.
const STEPS: u64 = 20_000_000;
/// The most bytes that a template hands out.
const BYTES: usize = 64 << 20;
/// The most characters of what goes wrong.
const SAID: usize = 4000;
const NAME: &str = "chat template";

/// A compiled program.
pub struct Jinja(Environment<'static>);

/// What a template itself says about a chat that it does not take.
#[derive(Debug)]
struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// What a template has written.
#[derive(Default)]
struct Written(Vec<u8>);

impl io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > BYTES - self.0.len() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Jinja {
    /// # Errors
    /// A template that is no Jinja, with the line.
    pub fn compile(source: String) -> Result<Self, ChatError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(STEPS));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(methods);
        environment.set_formatter(|out, _, value| Ok(python::write_str(out, value)?));
        environment.add_filter("tojson", python::to_json);
        environment.add_filter("string", |value: &Value| {
            let mut text = String::new();
            python::write_str(&mut text, value).map(|()| text).map_err(Error::from)
        });
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message)))
        });
        environment.add_template_owned(NAME, source).map_err(|error| problem(&error))?;
        Ok(Self(environment))
    }

    /// What the template writes.
    ///
    /// # Errors
    /// What the template raises, in its words, and what goes wrong in it, with the line; it writes more than 64 MiB.
    pub fn render(
        &self,
        variables: &serde_json::Map<String, serde_json::Value>,
        now: Option<&Zoned>,
    ) -> Result<String, ChatError> {
        let now = now.cloned();
        let strftime_now = move |format: &str| {
            let now = now.clone().unwrap_or_else(Zoned::now);
            let problem = |error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}"));
            strtime::format(format, &now).map_err(problem)
        };
        let context = context! {
            strftime_now => Value::from_function(strftime_now),
            ..Value::from_serialize(variables)
        };
        let template = self.0.get_template(NAME).map_err(|error| problem(&error))?;
        let mut written = Written::default();
        template.render_captured_to(context, &mut written).map_err(|error| problem(&error))?;
        String::from_utf8(written.0).map_err(|error| ChatError::Template(error.to_string()))
    }
}

/// What went wrong.
fn problem(error: &Error) -> ChatError {
    ChatError::Template(shorten(&sentence(error), SAID))
}

fn sentence(error: &Error) -> String {
    let mut source = error.source();
    while let Some(inner) = source {
        if let Some(Raised(message)) = inner.downcast_ref() {
            return format!("the model's chat template does not take these messages: {message}");
        }
        if inner.downcast_ref().map(io::Error::kind) == Some(io::ErrorKind::FileTooLarge) {
            return format!("the model's chat template writes more than {} MiB", BYTES >> 20);
        }
        source = inner.source();
    }
    let line = error.line().map_or_else(String::new, |line| format!(" in line {line}"));
    let detail = error
        .detail()
        .map_or_else(|| error.kind().to_string(), |detail| format!("{}: {detail}", error.kind()));
    format!("the model's chat template fails{line}: {detail}")
}

/// Methods of Python's strings that `minijinja_contrib` does not have.
fn methods(state: &State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else { return unknown_method_callback(state, value, method, args) };
    let argument = || match args {
        [argument] => argument.as_str(),
        _ => None,
    };
    let wrong = || Error::new(ErrorKind::InvalidOperation, format!("{method} takes one string"));
    match method {
        "removeprefix" => {
            let prefix = argument().ok_or_else(wrong)?;
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        "removesuffix" => {
            let suffix = argument().ok_or_else(wrong)?;
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        _ => unknown_method_callback(state, value, method, args),
    }
}
