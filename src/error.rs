//! The crate's one error type: a variant for each cause that a caller can act on.

use std::path::PathBuf;

use crate::artifacts::ArtifactError;

/// Shorthand for results of this crate.
pub type Result<T, E = FlashInferError> = std::result::Result<T, E>;

/// What to do about [`FlashInferError::AbiVersion`].
const LOAD_ANOTHER: &str = "let this crate load its own copy first, or load a version that fits";
/// What to do about [`FlashInferError::ConfigurationMismatch`].
const INITIALIZE_ONCE: &str = "initialize it once, with the same RuntimeConfig everywhere";
/// What to do about [`FlashInferError::OutOfPages`].
const FREE_PAGES: &str =
    "evict cached prefixes, let sequences finish, or drop one and compute it again later";

/// Everything that can go wrong in this crate.
///
/// As text, each is one line that says what was wrong, what was expected and what to do. Where
/// no source holds a module, the alternate form (`{:#}`) lists the sources, too.
///
/// Errors are raised before anything is launched or written, except where a
/// variant says otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FlashInferError {
    /// A wheel, a member of it, or the cache could not be had.
    #[error(transparent)]
    Artifact(#[from] Box<ArtifactError>),

    /// A shared library is there but cannot be opened.
    #[error("cannot open {}: {reason}{}", path.display(), remedy_suffix(remedy))]
    Library {
        /// The library's file, or its name where the dynamic loader searches.
        path: PathBuf,
        /// What the dynamic loader said.
        reason: String,
        /// What to do about it; empty where nothing is known.
        remedy: &'static str,
    },

    /// A library lacks a function that this crate needs.
    #[error("{library} exports no `{symbol}`; it is another version than this crate was made for")]
    MissingSymbol {
        /// The library that was searched.
        library: String,
        /// The missing symbol.
        symbol: String,
    },

    /// A module exports no function of that name.
    #[error("{module} exports no function `{function}`; it exports: {}", listed(exports))]
    MissingFunction {
        /// The module, and its file.
        module: String,
        /// The name that was asked for, without the prefix `__tvm_ffi_`.
        function: String,
        /// What the module does export, by name; see
        /// [`Module::exports`](crate::Module::exports).
        exports: Vec<String>,
    },

    /// Functions of a module take or return something else than this crate
    /// passes and expects. They were not run.
    #[error(
        "{module} is not what this crate declares; use a module of the FlashInfer version that this \
         crate pins: {}", differences.join("; ")
    )]
    Signature {
        /// The module, and its file.
        module: String,
        /// For each function that differs, its name and the first difference.
        differences: Vec<String>,
    },

    /// A function returned another type than was asked for.
    #[error("the function returned {found}, not {expected}")]
    ResultType {
        /// What was asked for.
        expected: &'static str,
        /// What was returned.
        found: String,
    },

    /// `libtvm_ffi` has an ABI that this crate does not speak.
    #[error("libtvm_ffi {found} is loaded in this process, but this crate needs {expected}; {LOAD_ANOTHER}")]
    AbiVersion {
        /// The version of the library.
        found: String,
        /// The versions that fit.
        expected: &'static str,
    },

    /// The process's runtime was already started with another configuration.
    #[error(
        "the FlashInfer runtime is already running with another configuration; {INITIALIZE_ONCE} ({difference})"
    )]
    ConfigurationMismatch {
        /// Which field differs.
        difference: String,
    },

    /// A call into a kernel module failed. Checks inside the module come before
    /// its launches, so as a rule nothing ran; a CUDA error reported here may
    /// stem from earlier work on the device.
    #[error("{function} failed: {kind}: {message}")]
    TvmFfiCall {
        /// The export that was called.
        function: String,
        /// The error's kind, such as `TypeError` or `InternalError`.
        kind: String,
        /// What the module said.
        message: String,
        /// The module's own backtrace, most recent call first.
        traceback: String,
    },

    /// A call of the CUDA runtime failed.
    #[error("{call} failed: {message} (cudaError {code}){}", remedy_suffix(cuda_remedy(*code)))]
    Cuda {
        /// The function that failed.
        call: &'static str,
        /// The `cudaError_t` it returned.
        code: i32,
        /// The runtime's text for that code.
        message: String,
    },

    /// An argument of an operation is not acceptable. Nothing was launched.
    #[error("{op}: {argument}: {problem}")]
    InvalidArgument {
        /// The operation.
        op: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// What was found, what was expected, and what to do.
        problem: String,
    },

    /// A pool of KV cache pages has fewer free pages than are needed. Nothing
    /// was taken and nothing changed.
    #[error("{needed} pages of the KV cache are needed, {free} are free; {FREE_PAGES}")]
    OutOfPages {
        /// Pages that the operation would take.
        needed: usize,
        /// Pages that are free.
        free: usize,
    },

    /// No kernel exists for what was asked.
    #[error("{what}; {available}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What there is instead.
        available: String,
    },
}

impl FlashInferError {
    /// What to do, where there is an answer that does not depend on the call: the end of a
    /// sentence, as in "free device memory or use smaller workspaces". That of a wrong argument is
    /// in its `problem`.
    pub fn remedy(&self) -> Option<String> {
        let known: &str = match self {
            Self::Artifact(error) => return error.remedy(),
            Self::Library { remedy, .. } => remedy,
            Self::AbiVersion { .. } => LOAD_ANOTHER,
            Self::ConfigurationMismatch { .. } => INITIALIZE_ONCE,
            Self::Cuda { code, .. } => cuda_remedy(*code),
            Self::OutOfPages { .. } => FREE_PAGES,
            Self::Unsupported { available, .. } => available,
            _ => "",
        };
        Some(known.to_owned()).filter(|remedy| !remedy.is_empty())
    }

    pub(crate) fn invalid(op: &'static str, argument: &'static str, problem: impl Into<String>) -> Self {
        Self::InvalidArgument { op, argument, problem: problem.into() }
    }

    /// The same error, where an operation works on several parts and this one
    /// failed.
    pub(crate) fn in_part(mut self, part: &str) -> Self {
        if let Self::InvalidArgument { problem: text, .. }
        | Self::TvmFfiCall { message: text, .. }
        | Self::Cuda { message: text, .. } = &mut self
        {
            *text = format!("{part}: {text}");
        }
        self
    }
}

impl From<ArtifactError> for FlashInferError {
    fn from(error: ArtifactError) -> Self {
        Self::Artifact(Box::new(error))
    }
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { "nothing".into() } else { names.join(", ") }
}

fn remedy_suffix(remedy: &str) -> String {
    if remedy.is_empty() { String::new() } else { format!("; {remedy}") }
}

/// What to do about a CUDA error, where a general answer exists.
fn cuda_remedy(code: i32) -> &'static str {
    match code {
        2 => "free device memory or use smaller workspaces",
        35 => "the NVIDIA driver is missing or older than CUDA 13 needs (580 or newer); install or update it",
        100 => "no NVIDIA GPU is visible; check `nvidia-smi` and CUDA_VISIBLE_DEVICES",
        700 | 702 | 709 | 710 | 714..=719 => {
            "a kernel failed that was launched before, perhaps by other code in the process, and no call that \
             needs the GPU succeeds in this process any more: start another; `compute-sanitizer` finds the kernel"
        }
        209 => "the module holds no code for this GPU; use a wheel built for its architecture",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_cuda_say_what_to_do() {
        let text = |code| {
            let message = "CUDA's words".into();
            FlashInferError::Cuda { call: "cudaLaunchKernel", code, message }.to_string()
        };
        for (code, remedy) in [
            (2, "free device memory"),
            (35, "update it"),
            (209, "no code for this GPU"),
            (700, "launched before"),
            (719, "start another"),
        ] {
            let text = text(code);
            assert!(text.contains("CUDA's words") && text.contains(remedy), "{text}");
        }
        assert_eq!(text(1), "cudaLaunchKernel failed: CUDA's words (cudaError 1)");
    }
}
