//! Functions of modules, resolved once, and how they are launched.

use std::sync::OnceLock;

use crate::{
    artifacts::FlashInferVersion,
    error::Result,
    ffi::{KernelFunction, Signature},
    module::ModuleName,
    runtime::FlashInferRuntime,
};

/// A function of a module with a fixed name, resolved at its first call.
pub(crate) struct FixedFunction {
    module: ModuleName,
    declared: &'static [Signature],
    resolved: OnceLock<KernelFunction>,
}

impl FixedFunction {
    pub(crate) const fn of(module: ModuleName, declared: &'static [Signature]) -> Self {
        Self { module, declared, resolved: OnceLock::new() }
    }

    /// The function's name, which is also that of the operation.
    pub(crate) fn name(&self) -> &'static str {
        self.declared[0].function
    }

    /// The version of FlashInfer that the module is of, if its source says so.
    pub(crate) fn version(&self, runtime: &FlashInferRuntime) -> Result<Option<FlashInferVersion>> {
        Ok(runtime.module(&self.module)?.version())
    }

    pub(crate) fn get(&self, runtime: &FlashInferRuntime) -> Result<&KernelFunction> {
        if let Some(function) = self.resolved.get() {
            return Ok(function);
        }
        let function = runtime.module(&self.module)?.kernel(self.declared)?;
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
