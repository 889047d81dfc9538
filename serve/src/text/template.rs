//! The chat template of a model, and where it runs.

use jiff::Zoned;
use serde_json::{Map, Value};

#[cfg(unix)]
use super::sandbox::Sandbox;
use super::{error::ChatError, jinja::Jinja};

/// A template.
pub enum Template {
    /// It runs in this process.
    Here(Jinja),
    /// It runs in a process of its own, which compiles it.
    #[cfg(unix)]
    Apart { sandbox: &'static Sandbox, source: String },
}

impl Template {
    /// # Errors
    /// A template that is no Jinja, with the line, unless [`check`](Self::check) finds that.
    pub fn new(source: String) -> Result<Self, ChatError> {
        #[cfg(unix)]
        if let Some(sandbox) = Sandbox::of_program() {
            return Ok(Self::Apart { sandbox, source });
        }
        Jinja::compile(source).map(Self::Here)
    }

    /// Whether it is one, and can be run.
    ///
    /// # Errors
    /// It is no Jinja, with the line; it cannot be run.
    pub fn check(&self) -> Result<(), ChatError> {
        match self {
            Self::Here(_) => Ok(()),
            #[cfg(unix)]
            Self::Apart { sandbox, source } => sandbox.compile(source),
        }
    }

    /// What the template writes.
    ///
    /// # Errors
    /// What the template raises, in its words, and what goes wrong in it, with the line; it takes or writes more
    /// than it may; it cannot be run.
    pub fn render(&self, variables: &Map<String, Value>, now: Option<&Zoned>) -> Result<String, ChatError> {
        match self {
            Self::Here(jinja) => jinja.render(variables, now),
            #[cfg(unix)]
            Self::Apart { sandbox, source } => sandbox.render(source, variables, now),
        }
    }
}
