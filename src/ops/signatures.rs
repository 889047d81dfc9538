//! What the crate passes to modules, held against what they say of themselves.

use super::signatures;
use crate::{
    error::{FlashInferError, Result},
    ffi::Signature,
    module::Module,
};

impl Module {
    /// The functions that this crate declares for modules of this name; see
    /// [`signatures`](crate::signatures).
    pub fn declared(&self) -> impl Iterator<Item = Signature> {
        let fits =
            |(pattern, signature): (&str, Signature)| self.name().matches(pattern).then_some(signature);
        signatures().into_iter().filter_map(fits)
    }

    /// Compares what this crate passes to the module's functions, and expects
    /// of them, with what they say of themselves: the number of arguments,
    /// their kinds and order, and the result. No GPU is needed and nothing is
    /// launched. Returns the number of functions compared: 0 for a module that
    /// the crate does not call.
    ///
    /// Opening a module does not include it: each function is made to raise an
    /// error, of which the process's first takes a fifth of a second. Check
    /// wheels of your own once, here or with `flashinfer-doctor --check`.
    ///
    /// # Errors
    /// [`FlashInferError::Signature`] names each function that differs or is
    /// missing.
    pub fn check(&self) -> Result<usize> {
        let mut compared = 0;
        let mut differences = Vec::new();
        for signature in self.declared() {
            compared += 1;
            // SAFETY: the module is FlashInfer's, or whoever opened it promised
            // that its functions of such names refuse this.
            let difference = match unsafe { self.printed_signature(signature.function) } {
                Ok(Some(printed)) => signature.compare(&printed).err(),
                Ok(None) => Some(format!("{}: it does not say what it takes", signature.function)),
                Err(FlashInferError::MissingFunction { function, .. }) => {
                    Some(format!("{function}: the module does not export it"))
                }
                Err(error) => Some(error.to_string()),
            };
            differences.extend(difference);
        }
        if differences.is_empty() {
            Ok(compared)
        } else {
            Err(FlashInferError::Signature { module: self.described(), differences })
        }
    }
}
