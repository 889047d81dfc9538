//! What the crate passes to modules, held against what they say of themselves.

use super::signatures;
use crate::{
    error::{FlashInferError, Result},
    ffi::Signature,
    module::Module,
};

impl Module {
    /// The functions that this crate declares for modules of this name, each with
    /// the signatures that versions of it have; see [`signatures`](crate::signatures).
    pub fn declared(&self) -> impl Iterator<Item = &'static [Signature]> {
        let fits = |(pattern, declared): (&str, &'static [Signature])| {
            self.name().matches(pattern).then_some(declared)
        };
        signatures().into_iter().filter_map(fits)
    }

    /// Compares what this crate passes to the module's functions, and expects
    /// of them, with what they say of themselves: the number of arguments,
    /// their kinds and order, and the result. Each must have one of the
    /// signatures that are declared of it. No GPU is needed and nothing is launched. Returns the number of functions compared: 0 for a module that
    /// the crate does not call.
    ///
    /// Opening a module does not include it, but where a function has several
    /// signatures, the one that it prints decides when it is first used. A function
    /// prints when it raises an error, of which the process's first takes a fifth
    /// of a second. Check wheels of your own once, here or with `flashinfer-doctor --check`.
    ///
    /// # Errors
    /// [`FlashInferError::Signature`] names each function that differs or is
    /// missing.
    pub fn check(&self) -> Result<usize> {
        let mut compared = 0;
        let mut differences = Vec::new();
        for declared in self.declared() {
            compared += 1;
            match self.variant(declared) {
                Ok(found) => differences.extend(found.err()),
                Err(FlashInferError::MissingFunction { function, .. }) => {
                    differences.push(format!("{function}: the module does not export it"));
                }
                Err(error) => differences.push(error.to_string()),
            }
        }
        if differences.is_empty() {
            Ok(compared)
        } else {
            Err(FlashInferError::Signature { module: self.described(), differences })
        }
    }
}
