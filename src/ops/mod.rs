//! FlashInfer's operations, one file per module family.

pub mod activation;
pub mod attention;
pub mod cascade;
mod check;
pub mod gdn;
pub mod gemm;
pub mod norm;
pub mod page;
pub mod quantization;
pub mod rope;
pub mod sampling;
pub mod topk;

use std::sync::OnceLock;

use crate::{
    error::Result,
    ffi::{Function, Signature},
    module::ModuleName,
    runtime::FlashInferRuntime,
};

/// A function of a module with a fixed name, resolved at its first call.
pub(crate) struct FixedFunction {
    module: ModuleName,
    name: &'static str,
    resolved: OnceLock<Function>,
}

impl FixedFunction {
    pub(crate) const fn of(module: ModuleName, signature: &Signature) -> Self {
        Self { module, name: signature.function, resolved: OnceLock::new() }
    }

    /// The function's name, which is also that of the operation.
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    pub(crate) fn get(&self, runtime: &FlashInferRuntime) -> Result<&Function> {
        if let Some(function) = self.resolved.get() {
            return Ok(function);
        }
        let function = runtime.module(&self.module)?.function(self.name)?;
        Ok(self.resolved.get_or_init(|| function))
    }
}

/// Whether a launch uses programmatic dependent launch: what the caller asked
/// for, else on compute capability 9.0 and newer, as upstream does.
pub(crate) fn enable_pdl(runtime: &FlashInferRuntime, asked: Option<bool>, ordinal: u32) -> Result<bool> {
    match asked {
        Some(asked) => Ok(asked),
        None => Ok(runtime.compute_capability(ordinal)?.0 >= 9),
    }
}

/// The argument list of every function that this crate calls, with a pattern
/// of the modules that export it; see [`ModuleName::matches`].
///
/// [`Signature::compare`] holds a declaration against what a module prints of
/// itself.
pub fn signatures() -> Vec<(&'static str, Signature)> {
    [
        &norm::signatures(),
        page::SIGNATURES,
        gdn::SIGNATURES,
        activation::SIGNATURES,
        &gemm::signatures(),
        quantization::SIGNATURES,
        topk::SIGNATURES,
        sampling::SIGNATURES,
        rope::SIGNATURES,
        &attention::signatures(),
    ]
    .concat()
}
