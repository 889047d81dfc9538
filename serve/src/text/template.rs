//! The chat template of a model, and where it runs.

use jiff::Zoned;
use serde_json::{Map, Value};

use super::jinja::Jinja;
#[cfg(unix)]
use super::sandbox::Sandbox;
use crate::Result;

/// A template that was found to be one.
pub enum Template {
    /// It runs in this process.
    Here(Jinja),
    /// It runs in a process of its own.
    #[cfg(unix)]
    Apart { sandbox: &'static Sandbox, source: String },
}

impl Template {
    /// # Errors
    /// A template that is no Jinja, with the line.
    pub fn compile(source: String) -> Result<Self> {
        #[cfg(unix)]
        if let Some(sandbox) = Sandbox::of_program() {
            // Where there is no process now, there may be one when it is used.
            if let Ok(compiled) = sandbox.compile(&source) {
                compiled?;
            }
            return Ok(Self::Apart { sandbox, source });
        }
        Jinja::compile(source).map(Self::Here)
    }

    /// What the template writes.
    ///
    /// # Errors
    /// What the template raises, in its words, and what goes wrong in it, with the line; it takes or writes more than it may.
    pub fn render(&self, variables: &Map<String, Value>, now: Option<&Zoned>) -> Result<String> {
        match self {
            Self::Here(jinja) => jinja.render(variables, now),
            #[cfg(unix)]
            Self::Apart { sandbox, source } => Ok(sandbox.render(source, variables, now)??),
        }
    }
}
