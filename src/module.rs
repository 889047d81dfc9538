//! Kernel modules: their names, and the loaded libraries.
//!
//! FlashInfer compiles one shared library for each combination of element
//! types, head dimensions and options, and puts the combination into its name.
//! Modules share their exported names (`run`, `plan`), so each is opened
//! `RTLD_LOCAL` and asked for its symbols by its own handle; none is ever
//! unloaded, because plans and errors carry pointers into them.

use std::{borrow::Cow, fmt, path::Path};

use libloading::os::unix::Library;

use crate::{
    artifacts::{Located, Source},
    error::{FlashInferError, Result},
    ffi::{Arg, Function, Signature, abi::SafeCall, library::TvmFfi},
    library_file::open_library,
};

/// The name of a kernel module, which is also its file's name.
///
/// Modules of a fixed name are constants here; others follow from what selects
/// them, such as [`AttentionSpec`](crate::attention::AttentionSpec).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModuleName(Cow<'static, str>);

impl ModuleName {
    /// RMS and layer norms.
    pub const NORM: Self = Self::fixed("norm");
    /// Appending to a paged KV cache.
    pub const PAGE: Self = Self::fixed("page");
    /// Merging partial attention results.
    pub const CASCADE: Self = Self::fixed("cascade");
    /// Rotary position embeddings.
    pub const ROPE: Self = Self::fixed("rope");
    /// `silu(a) · b`.
    pub const SILU_AND_MUL: Self = Self::fixed("silu_and_mul");
    /// `gelu(a) · b`.
    pub const GELU_AND_MUL: Self = Self::fixed("gelu_and_mul");
    /// `gelu(a) · b`, by the approximation with `tanh`.
    pub const GELU_TANH_AND_MUL: Self = Self::fixed("gelu_tanh_and_mul");
    /// Softmax, sampling and renormalization.
    pub const SAMPLING: Self = Self::fixed("sampling");
    /// Selecting the largest.
    pub const TOPK: Self = Self::fixed("topk");
    /// Packing of bits.
    pub const QUANTIZATION: Self = Self::fixed("quantization");
    /// Segment GEMM for compute capability 8.0 and newer, and GEMM of 8-bit floats.
    pub const GEMM: Self = Self::fixed("gemm");
    /// Segment GEMM for compute capability 9.0.
    pub const GEMM_SM90: Self = Self::fixed("gemm_sm90");
    /// Prefill of gated delta networks, for compute capability 9.0.
    pub const GDN_PREFILL_SM90: Self = Self::fixed("gdn_prefill_sm90");

    const fn fixed(name: &'static str) -> Self {
        Self(Cow::Borrowed(name))
    }

    /// A module by name, such as one that this crate does not wrap.
    pub fn new(name: impl Into<String>) -> Self {
        Self(Cow::Owned(name.into()))
    }

    /// Whether the name fits a pattern, in which `*` stands for any text.
    pub fn matches(&self, pattern: &str) -> bool {
        crate::artifacts::embed::matches(pattern, &self.0)
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ModuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A loaded module.
#[derive(Debug)]
pub struct Module {
    name: ModuleName,
    located: Located,
    library: Library,
    tvm_ffi: &'static TvmFfi,
}

impl Module {
    /// Opens a module's file. It stays open for the life of the process.
    pub(crate) fn open(
        name: ModuleName,
        located: Located,
        tvm_ffi: &'static TvmFfi,
    ) -> Result<&'static Self> {
        let library = open_library(&located.path, libc::RTLD_NOW | libc::RTLD_LOCAL)?;
        Ok(Box::leak(Box::new(Self { name, located, library, tvm_ffi })))
    }

    /// The module's name.
    pub fn name(&self) -> &ModuleName {
        &self.name
    }

    /// The file that is open.
    pub fn path(&self) -> &Path {
        &self.located.path
    }

    /// Where the module came from.
    pub fn source(&self) -> &Source {
        &self.located.source
    }

    /// An exported function, by its name without the prefix `__tvm_ffi_`.
    ///
    /// # Errors
    /// [`FlashInferError::MissingSymbol`].
    pub fn function(&'static self, name: &'static str) -> Result<Function> {
        let missing = || FlashInferError::MissingSymbol {
            library: format!("module {}", self.name),
            symbol: format!("__tvm_ffi_{name}"),
        };
        // With a further underscore, such symbols may be data.
        if name.starts_with('_') {
            return Err(missing());
        }
        let symbol = format!("__tvm_ffi_{name}");
        // SAFETY: a symbol of this prefix, and no further underscore, has the
        // one type that the ABI gives to exported functions; the library stays
        // open.
        let function = unsafe { self.library.get::<SafeCall>(&symbol) }.map_err(|_| missing())?;
        Ok(Function::from_symbol(self.tvm_ffi, *function, name))
    }

    /// The signature that an exported function gives of itself, as in
    /// `rmsnorm(0: DLTensor*, 1: DLTensor*, 2: DLTensor*, 3: float, 4: bool) -> void`.
    ///
    /// The function is called with no arguments, or with one if it takes none,
    /// which it refuses with that text. So it must be one that this crate
    /// declares for the module; see [`signatures`](crate::signatures).
    /// `Ok(None)` if it accepted the call all the same.
    ///
    /// # Errors
    /// [`FlashInferError::Unsupported`]: the crate declares no such function.
    /// [`FlashInferError::MissingSymbol`]: the module has none.
    pub fn printed_signature(&'static self, name: &'static str) -> Result<Option<String>> {
        let declared = |(pattern, signature): &(&str, Signature)| {
            signature.function == name && self.name.matches(pattern)
        };
        let Some((_, signature)) = crate::ops::signatures().into_iter().find(declared) else {
            return Err(FlashInferError::Unsupported {
                what: format!("the signature of `{name}` of module {}", self.name),
                available: "only functions that this crate declares are asked for theirs".into(),
            });
        };
        let function = self.function(name)?;
        let too_many_or_few = if signature.args.is_empty() { &[Arg::NONE][..] } else { &[] };
        // SAFETY: there is nothing in the arguments that the function could misuse.
        match unsafe { function.call(too_many_or_few) } {
            Ok(_) => Ok(None),
            Err(FlashInferError::TvmFfiCall { message, .. }) => {
                Ok(message.split('`').nth(1).map(str::to_owned))
            }
            Err(error) => Err(error),
        }
    }
}
