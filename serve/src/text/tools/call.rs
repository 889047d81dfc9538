//! A call in any form, while its characters come.

use super::{
    object::{CallObject, Step},
    parameters::CallParameters,
};

/// A call that comes in characters.
#[derive(Clone, Debug)]
pub enum Call {
    /// An object.
    Object(CallObject),
    /// Arguments each for itself.
    Parameters(CallParameters),
}

impl Default for Call {
    fn default() -> Self {
        Self::Object(CallObject::default())
    }
}

impl Call {
    /// The tool's name, once it is there.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Object(object) => object.name(),
            Self::Parameters(parameters) => Some(parameters.name()),
        }
    }

    /// Whether the arguments have begun.
    pub fn has_arguments(&self) -> bool {
        match self {
            Self::Object(object) => object.has_arguments(),
            Self::Parameters(parameters) => parameters.has_arguments(),
        }
    }

    /// The JSON text of the arguments that came since this was last called.
    pub fn take_arguments(&mut self) -> String {
        match self {
            Self::Object(object) => object.take_arguments(),
            Self::Parameters(parameters) => parameters.take_arguments(),
        }
    }

    /// Takes a character.
    pub fn push(&mut self, c: char) -> Step {
        match self {
            Self::Object(object) => object.push(c),
            Self::Parameters(parameters) => parameters.push(c),
        }
    }

    /// Ends the arguments before a character that is wrong, and gives those that were held back.
    pub fn break_off(&mut self) -> String {
        match self {
            Self::Object(_) => String::new(),
            Self::Parameters(parameters) => parameters.break_off(),
        }
    }
}
