//! Kernel modules: their names, and the loaded libraries.
//!
//! FlashInfer compiles one shared library for each combination of element
//! types, head dimensions and options, and puts the combination into its name.
//! Modules share their exported names (`run`, `plan`), so each is opened
//! `RTLD_LOCAL` and asked for its symbols by its own handle; none is ever
//! unloaded, because plans and errors carry pointers into them.

use std::{
    borrow::Cow,
    fmt,
    path::{Path, PathBuf},
};

use crate::{
    artifacts::FlashInferVersion,
    cuda::CudaRuntime,
    cuda_library::LibrarySource,
    error::{FlashInferError, Result},
    ffi::{Arg, Function, KernelFunction, Signature, Value, abi::SafeCall, library::TvmFfi},
    library_file::{
        check_defined, exported_functions, is_undefined_symbol, open_library, undefined_functions,
    },
    loader::{self, Library},
    stream::Stream,
};

/// The name of a kernel module, which is also its file's name.
///
/// Modules of a fixed name are constants here, each defined by the family of
/// operations that calls it; others follow from what selects them, such as [`AttentionSpec`](crate::attention::AttentionSpec).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModuleName(Cow<'static, str>);

impl ModuleName {
    /// A name that does not change; each family of operations has its own.
    pub(crate) const fn fixed(name: &'static str) -> Self {
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

/// Whether a module names a function that nothing defines and no call reaches.
/// Since FlashInfer 0.6.14, batch prefill of FlashAttention 2 names kernels for
/// tiles of 32 queries in every module, and has them where values are 512 wide;
/// its planner takes such tiles there only (`FA2DetermineCtaTileQ` in `utils.cuh`,
/// `get_batch_prefill_uri` in `jit/attention/modules.py`).
fn is_never_called(module: &ModuleName, symbol: &str) -> bool {
    /// Mangled names, up to the tile, which follows the kernel's name or a flag.
    const TILES_OF_32: [&str; 3] = [
        "_ZN10flashinfer38BatchPrefillWithPagedKVCacheDispatchedILb0ELj32E",
        "_ZN10flashinfer38BatchPrefillWithPagedKVCacheDispatchedILb1ELj32E",
        "_ZN10flashinfer39BatchPrefillWithRaggedKVCacheDispatchedILj32E",
    ];
    module.matches("batch_prefill_with_*") && TILES_OF_32.iter().any(|name| symbol.starts_with(name))
}

/// What the C symbols of exported functions start with.
const PREFIX: &str = "__tvm_ffi_";

/// A loaded module: a shared library that exports functions by the TVM-FFI ABI.
///
/// The crate's operations open FlashInfer's modules themselves. A module that
/// it has no operation for comes from [`FlashInferRuntime::module`](crate::FlashInferRuntime::module) by its
/// name, and any other TVM-FFI library, such as one of your own kernels, from
/// [`Module::open`] by its file. Its functions are called by name, with
/// arguments that [`args!`](crate::args) packs:
///
/// ```no_run
/// # fn example(
/// #     stream: &flashinfer_rs::Stream, x: flashinfer_rs::TensorRef<'_>, mut out: flashinfer_rs::TensorMut<'_>,
/// # ) -> flashinfer_rs::Result<()> {
/// use flashinfer_rs::{Module, args};
///
/// // SAFETY: we built this library, and it is a TVM-FFI library.
/// let module = unsafe { Module::open("kernels/libmine.so")? };
/// println!("{} exports {}", module.name(), module.exports()?.join(", "));
///
/// // SAFETY: `scale` takes a tensor to write, one of the same shape to read,
/// // and a factor, and reads nothing else.
/// unsafe { module.call_on(stream, "scale", args![&mut out, &x, 0.5])? };
///
/// // A result converts into the type that is expected.
/// // SAFETY: `version` takes nothing.
/// let version: i64 = unsafe { module.call("version", args![])? }.try_into()?;
/// # Ok(()) }
/// ```
///
/// What a function raises comes back as [`FlashInferError::TvmFfiCall`], with
/// its kind (such as `TypeError`), message and backtrace.
#[derive(Debug)]
pub struct Module {
    name: ModuleName,
    path: PathBuf,
    source: LibrarySource,
    version: Option<FlashInferVersion>,
    library: Library,
    unbound: Vec<String>,
    tvm_ffi: &'static TvmFfi,
    cuda: &'static CudaRuntime,
}

impl Module {
    /// Opens a module's file, with all that it calls. Where nothing defines some
    /// of that, and no call reaches it, it is left unbound.
    pub(crate) fn load(
        name: ModuleName,
        path: PathBuf,
        source: LibrarySource,
        version: Option<FlashInferVersion>,
        tvm_ffi: &'static TvmFfi,
        cuda: &'static CudaRuntime,
    ) -> Result<&'static Self> {
        let (library, unbound) = match open_library(&path, loader::RTLD_NOW | loader::RTLD_LOCAL) {
            Err(error) if is_undefined_symbol(&error) => {
                // A call of a function that nothing defines ends the process.
                let (unbound, called): (Vec<_>, Vec<_>) = undefined_functions(&path)?
                    .into_iter()
                    .partition(|symbol| is_never_called(&name, symbol));
                check_defined(&path, &called)?;
                (open_library(&path, loader::RTLD_LAZY | loader::RTLD_LOCAL)?, unbound)
            }
            opened => (opened?, Vec::new()),
        };
        Ok(Box::leak(Box::new(Self { name, path, source, version, library, unbound, tvm_ffi, cuda })))
    }

    /// The module's name.
    pub fn name(&self) -> &ModuleName {
        &self.name
    }

    /// The file that is open.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the module came from.
    pub fn source(&self) -> &LibrarySource {
        &self.source
    }

    /// C symbols of functions that the module names, nothing defines, and no call of
    /// this crate reaches. Most modules have none; FlashAttention 2's batch prefill
    /// of FlashInfer 0.6.14 and later has some.
    pub fn unbound(&self) -> &[String] {
        &self.unbound
    }

    /// The version of FlashInfer that the module is of, by the wheel that it came
    /// from; `None` where that does not say, and for a file of your own.
    pub fn version(&self) -> Option<FlashInferVersion> {
        self.version
    }

    /// The names of the functions that the module exports, sorted, without the
    /// prefix `__tvm_ffi_`. They are read from its file.
    ///
    /// # Errors
    /// [`FlashInferError::Library`]: the file is gone, or no ELF file.
    pub fn exports(&self) -> Result<Vec<String>> {
        Self::exports_of(&self.path)
    }

    /// What [`exports`](Self::exports) gives of a module's file, which is not
    /// opened for it.
    ///
    /// # Errors
    /// As [`exports`](Self::exports).
    pub fn exports_of(path: impl AsRef<Path>) -> Result<Vec<String>> {
        let function = |symbol: String| Some(symbol.strip_prefix(PREFIX)?.to_owned());
        let symbols = exported_functions(path.as_ref())?;
        let mut names: Vec<_> = symbols.into_iter().filter_map(function).collect();
        // With a further underscore, it is the ABI's own: descriptions, contexts.
        names.retain(|name| !name.starts_with('_'));
        names.sort();
        Ok(names)
    }

    /// An exported function, by its name without the prefix `__tvm_ffi_`.
    ///
    /// # Errors
    /// [`FlashInferError::MissingFunction`], which lists what there is.
    pub fn function(&self, name: &str) -> Result<Function> {
        // With a further underscore, such symbols may be data. The loader's
        // names end at a NUL.
        let symbol = (!name.starts_with('_') && !name.contains('\0')).then(|| {
            // SAFETY: a symbol of this prefix, and no further underscore, has
            // the one type that the ABI gives to exported functions; the
            // library stays open.
            unsafe { self.library.get::<SafeCall>(format!("{PREFIX}{name}")) }.ok()
        });
        match symbol.flatten() {
            Some(symbol) => Ok(Function::from_symbol(self.tvm_ffi, *symbol, name)),
            None => Err(FlashInferError::MissingFunction {
                module: self.described(),
                function: name.to_owned(),
                exports: self.exports().unwrap_or_default(),
            }),
        }
    }

    /// An exported function that is declared with these signatures, and which of
    /// them it has: what it prints decides, if there are several. One that is
    /// declared with a single signature refuses other arguments when it is called.
    ///
    /// # Errors
    /// As [`function`](Self::function); [`FlashInferError::Signature`]: it has none
    /// of them.
    pub(crate) fn kernel(&self, declared: &'static [Signature]) -> Result<KernelFunction> {
        let function = self.function(declared[0].function)?;
        let variant = match declared {
            [_] => 0,
            _ => self.variant(declared)?.map_err(|difference| FlashInferError::Signature {
                module: self.described(),
                differences: vec![difference],
            })?,
        };
        Ok(KernelFunction::new(function, variant))
    }

    /// The place of the signature that a function prints among those declared of
    /// it, or how it differs.
    pub(crate) fn variant(&self, declared: &[Signature]) -> Result<Result<usize, String>> {
        let name = declared[0].function;
        // SAFETY: the module is FlashInfer's, or whoever opened it promised
        // that its functions of such names refuse this.
        Ok(match unsafe { self.printed_signature(name) }? {
            Some(printed) => Signature::find(declared, &printed),
            None => Err(format!("{name}: it does not say what it takes")),
        })
    }

    /// Calls an exported function, by its name without the prefix
    /// `__tvm_ffi_`. Its kernels, if it launches any, go to the default
    /// stream; see [`call_on`](Self::call_on).
    ///
    /// The function is looked up each time. Where that matters, keep
    /// [`function`](Self::function) and call it.
    ///
    /// # Errors
    /// [`FlashInferError::MissingFunction`]; [`FlashInferError::TvmFfiCall`]
    /// with what the function raised.
    ///
    /// # Safety
    /// The function does with its arguments what its author wrote. It checks
    /// how many there are and of what kinds, if it was made with TVM-FFI's
    /// headers, and more only if its author saw to it. Tensors must be of the
    /// devices, element types, shapes and strides that it assumes, and hold
    /// what it expects, such as indices within bounds. What it writes must be
    /// a [`TensorMut`](crate::TensorMut), or memory that nobody else looks at.
    /// Memory that its kernels use must stay as it is until they are done. Of a
    /// [`TensorObject`](crate::ffi::TensorObject), which is on the stack, nothing
    /// may keep a reference for longer than it is there, be it the library or the
    /// result; other objects live as long as there are references.
    pub unsafe fn call(&self, name: &str, args: &[Arg<'_>]) -> Result<Value> {
        let function = self.function(name)?;
        // SAFETY: promised by the caller.
        unsafe { function.call(args) }
    }

    /// [`call`](Self::call), with the kernels that the function launches on
    /// `stream`. For the call, it is the stream that TVM-FFI names for its
    /// device (`TVMFFIEnvGetStream`), and that device is current.
    ///
    /// # Errors
    /// As [`call`](Self::call); [`FlashInferError::InvalidArgument`]: the
    /// stream cannot be used here.
    ///
    /// # Safety
    /// As [`call`](Self::call).
    pub unsafe fn call_on(&self, stream: &Stream, name: &str, args: &[Arg<'_>]) -> Result<Value> {
        stream.check_usable_here("Module::call_on")?;
        let function = self.function(name)?;
        let _device = self.cuda.on_device_of(stream)?;
        // SAFETY: promised by the caller.
        unsafe { function.call_on(stream, args) }
    }

    /// The signature that an exported function gives of itself, as in
    /// `rmsnorm(0: DLTensor*, 1: DLTensor*, 2: DLTensor*, 3: float, 4: bool) -> void`.
    ///
    /// The function is called with more arguments than any takes, all of them
    /// None. A function made with TVM-FFI's headers compares their number
    /// first, and refuses them with that text. `Ok(None)` if it did something
    /// else.
    ///
    /// # Errors
    /// [`FlashInferError::MissingFunction`].
    ///
    /// # Safety
    /// The function must refuse such a call, or be harmless.
    pub unsafe fn printed_signature(&self, name: &str) -> Result<Option<String>> {
        // SAFETY: promised by the caller; None points to nothing.
        match unsafe { self.call(name, &[Arg::NONE; 128]) } {
            Ok(_) => Ok(None),
            Err(FlashInferError::TvmFfiCall { message, .. }) => {
                Ok(message.split('`').nth(1).map(str::to_owned))
            }
            Err(error) => Err(error),
        }
    }

    pub(crate) fn described(&self) -> String {
        format!("module {} ({})", self.name, self.path.display())
    }
}
