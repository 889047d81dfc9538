//! What an answer has to be: JSON, of a schema, or what a regular expression or a grammar
//! accepts.
//!
//! A [`Constraint`] is compiled into a [`Grammar`] by [`Engine::compile`](crate::engine::Engine::compile),
//! on the thread that asks for it. A request takes the grammar along. Each of its answers has a
//! state of its own, which advances with its tokens and says which tokens may come next; so
//! whatever the model computes, what comes is what the constraint accepts, or its beginning where
//! a limit ends the answer.

mod compiler;
mod grammar;
mod schema;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;

use serde_json::Value;

pub use self::grammar::Grammar;
pub(crate) use self::{compiler::Compiler, schema::check as check_schema};

/// What an answer has to be.
#[derive(Clone, Debug, PartialEq)]
pub enum Constraint {
    /// A JSON object.
    JsonObject,
    /// JSON of this schema. Keywords that are not checked are refused, and `x-guidance`.
    JsonSchema(Value),
    /// All of it is accepted by this regular expression, in the syntax of the crate `regex`.
    Regex(String),
    /// A grammar in Lark's syntax, as `llguidance` extends it: `<[5]>` is the token 5, and `@name`
    /// is JSON of a schema.
    Lark {
        /// The rules, which begin with `start`.
        rules: String,
        /// The schemas, by the names that rules have for them.
        schemas: BTreeMap<String, Value>,
    },
}

impl Constraint {
    /// A grammar in Lark's syntax, without schemas.
    pub fn lark(rules: impl Into<String>) -> Self {
        Self::Lark { rules: rules.into(), schemas: BTreeMap::new() }
    }

    /// What it is, in a word or two.
    fn kind(&self) -> &'static str {
        match self {
            Self::JsonObject => "JSON object",
            Self::JsonSchema(_) => "JSON schema",
            Self::Regex(_) => "regular expression",
            Self::Lark { .. } => "grammar",
        }
    }
}

/// A constraint that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the {kind} cannot be used: {problem}")]
pub struct InvalidConstraint {
    /// What it is, in a word or two.
    pub kind: &'static str,
    /// What is wrong with it, and where.
    pub problem: String,
}
