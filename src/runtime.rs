//! The process's runtime: `libcudart`, `libtvm_ffi` and the loaded modules.
//!
//! There is one per process, because the libraries it loads are. It is started
//! once by [`FlashInferRuntime::initialize`]; starting it touches the network
//! only to get `libtvm_ffi` and `libcudart` where no local source has them.
//! Modules are loaded when they are first needed, each once. An operation in
//! the middle of a decode step never downloads anything:
//! [`preload`](FlashInferRuntime::preload) does.

use std::{
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use crate::{
    artifacts::{
        ArtifactError, CudaArchitecture, Fetch, FlashInferVersion, Member, ProgressFn, Store, StoreConfig,
    },
    cublas::Cublas,
    cuda::CudaRuntime,
    cuda_library::{self, LibrarySource},
    error::{FlashInferError, Result},
    ffi::{self, library::TvmFfi},
    library_file::needed_libraries,
    loader::check_platform,
    module::{Module, ModuleName},
    once_table::OnceTable,
};

/// How to start the runtime. The default takes everything from the
/// environment; see the table of variables in `docs/modules-and-cache.md`.
#[derive(Clone, Default)]
#[non_exhaustive]
pub struct RuntimeConfig {
    /// Wheels, or folders of wheels, that are looked into before any other
    /// source, in this order.
    pub wheels: Vec<PathBuf>,
    /// The cache folder; `None` means `FLASHINFER_RS_CACHE_DIR`, else the
    /// platform's cache folder.
    pub cache_dir: Option<PathBuf>,
    /// `true` forbids the network, as `FLASHINFER_RS_OFFLINE=1` does.
    pub offline: bool,
    /// Called as downloads progress, while the runtime waits for them: it must
    /// not use the runtime itself.
    pub progress: Option<ProgressFn>,
}

impl RuntimeConfig {
    /// The first field in which two configurations differ. Callbacks do not count.
    fn difference(&self, other: &Self) -> Option<String> {
        if self.wheels != other.wheels {
            return Some(format!("wheels: {:?} and {:?}", self.wheels, other.wheels));
        }
        if self.cache_dir != other.cache_dir {
            return Some(format!("cache_dir: {:?} and {:?}", self.cache_dir, other.cache_dir));
        }
        (self.offline != other.offline).then(|| format!("offline: {} and {}", self.offline, other.offline))
    }
}

impl fmt::Debug for RuntimeConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RuntimeConfig")
            .field("wheels", &self.wheels)
            .field("cache_dir", &self.cache_dir)
            .field("offline", &self.offline)
            .field("progress", &self.progress.is_some())
            .finish()
    }
}

/// The process's runtime: `libcudart`, `libtvm_ffi` and the loaded modules.
///
/// There is one per process. Starting it downloads `libtvm_ffi` and
/// `libcudart` where no local source has them and that is allowed; modules are
/// loaded when they are first needed, from local sources only, or by
/// [`preload`](Self::preload).
pub struct FlashInferRuntime {
    config: RuntimeConfig,
    store: Store,
    cuda: &'static CudaRuntime,
    cuda_source: LibrarySource,
    tvm_ffi: &'static TvmFfi,
    tvm_ffi_source: LibrarySource,
    /// By the names that a module has in the versions of FlashInfer.
    wanted: OnceTable<Vec<ModuleName>, &'static Module>,
    /// By the name of the one that was found.
    modules: OnceTable<ModuleName, &'static Module>,
    /// Files that the user opened.
    opened: Mutex<HashMap<PathBuf, &'static Module>>,
    /// Locked while it is being loaded, so that it is loaded once.
    cublas: Mutex<Option<&'static Cublas>>,
}

static RUNTIME: OnceLock<FlashInferRuntime> = OnceLock::new();
/// Held while the runtime starts, so that it starts once.
static STARTING: Mutex<()> = Mutex::new(());

impl FlashInferRuntime {
    /// Starts the process's runtime, or returns the running one if it was
    /// started with an equal configuration. A failed start can be repeated.
    ///
    /// # Errors
    /// - [`FlashInferError::ConfigurationMismatch`]: it runs with another
    ///   configuration.
    /// - [`FlashInferError::Artifact`], [`FlashInferError::Library`]:
    ///   `libcudart` or `libtvm_ffi` cannot be had or opened. No GPU and no
    ///   driver are needed to start.
    /// - [`FlashInferError::AbiVersion`]: another `libtvm_ffi` is in the process.
    /// - [`FlashInferError::Unsupported`]: FlashInfer has no kernels for the platform.
    ///
    /// ```no_run
    /// use flashinfer_rs::{FlashInferRuntime, RuntimeConfig};
    /// let runtime = FlashInferRuntime::initialize(RuntimeConfig::default())?;
    /// println!("libtvm_ffi {}", runtime.tvm_ffi_version());
    /// # Ok::<(), flashinfer_rs::FlashInferError>(())
    /// ```
    pub fn initialize(config: RuntimeConfig) -> Result<&'static Self> {
        let _starting = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = RUNTIME.get() {
            return match running.config.difference(&config) {
                None => Ok(running),
                Some(difference) => Err(FlashInferError::ConfigurationMismatch { difference }),
            };
        }
        let runtime = Self::start(config)?;
        Ok(RUNTIME.get_or_init(|| runtime))
    }

    /// The running runtime; started with the default configuration if none is.
    ///
    /// # Errors
    /// As [`initialize`](Self::initialize).
    pub fn get() -> Result<&'static Self> {
        match RUNTIME.get() {
            Some(running) => Ok(running),
            None => match Self::initialize(RuntimeConfig::default()) {
                // Another thread was faster, with a configuration of its own.
                Err(FlashInferError::ConfigurationMismatch { .. }) if RUNTIME.get().is_some() => Self::get(),
                other => other,
            },
        }
    }

    fn start(config: RuntimeConfig) -> Result<Self> {
        check_platform(std::env::consts::OS, std::env::consts::ARCH)?;
        let mut store_config = StoreConfig::from_env()?;
        store_config.wheels = config.wheels.clone();
        if config.cache_dir.is_some() {
            store_config.cache_dir = config.cache_dir.clone();
        }
        store_config.offline |= config.offline;
        store_config.progress = config.progress.clone();
        // Asked when a module is looked for, which is after the CUDA runtime was opened.
        let opened: Arc<OnceLock<&'static CudaRuntime>> = Arc::default();
        let asked = Arc::clone(&opened);
        store_config.gpus = Some(Arc::new(move || asked.get().map_or_else(Vec::new, |cuda| gpus(cuda))));
        let store = Store::open(store_config)?;
        let (cudart, cuda_source) = cuda_library::load(&Member::CudaRuntime, &store, Fetch::Allowed)?;
        let cuda = CudaRuntime::install(cudart, &Member::CudaRuntime.file_name())?;
        let cuda = *opened.get_or_init(|| cuda);
        let (tvm_ffi, tvm_ffi_source) = match TvmFfi::adopt()? {
            Some(library) => (library, LibrarySource::Process),
            None => {
                let located = store.locate(&Member::TvmFfi, Fetch::Allowed)?;
                (TvmFfi::open(&located.path)?, LibrarySource::Store(located.source))
            }
        };
        ffi::register_allocator(tvm_ffi)?;
        Ok(Self {
            config,
            store,
            cuda,
            cuda_source,
            tvm_ffi,
            tvm_ffi_source,
            wanted: OnceTable::default(),
            modules: OnceTable::default(),
            opened: Mutex::default(),
            cublas: Mutex::default(),
        })
    }

    /// The configuration that the runtime was started with.
    pub fn config(&self) -> &RuntimeConfig {
        &self.config
    }

    /// Where modules come from.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The version of `libtvm_ffi`.
    pub fn tvm_ffi_version(&self) -> String {
        let ffi::abi::Version { major, minor, patch } = self.tvm_ffi.version();
        format!("{major}.{minor}.{patch}")
    }

    /// Where `libtvm_ffi` came from.
    pub fn tvm_ffi_source(&self) -> &LibrarySource {
        &self.tvm_ffi_source
    }

    /// Where `libcudart` came from.
    pub fn cuda_runtime_source(&self) -> &LibrarySource {
        &self.cuda_source
    }

    /// The version of `libcudart`, as (major, minor).
    ///
    /// # Errors
    /// [`FlashInferError::Cuda`].
    pub fn cuda_runtime_version(&self) -> Result<(i32, i32)> {
        self.cuda.runtime_version().map(split_version)
    }

    /// The newest CUDA version that the NVIDIA driver serves, as (major,
    /// minor); `None` without a driver.
    ///
    /// # Errors
    /// [`FlashInferError::Cuda`].
    pub fn driver_version(&self) -> Result<Option<(i32, i32)>> {
        let version = self.cuda.driver_version()?;
        Ok((version > 0).then(|| split_version(version)))
    }

    /// The number of visible CUDA devices.
    ///
    /// # Errors
    /// [`FlashInferError::Cuda`]: among others, there is no driver or no device.
    pub fn device_count(&self) -> Result<u32> {
        Ok(self.cuda.device_count()?.unsigned_abs())
    }

    /// Major and minor compute capability of a device.
    ///
    /// # Errors
    /// [`FlashInferError::Cuda`]: there is no such device.
    pub fn compute_capability(&self, ordinal: u32) -> Result<(i32, i32)> {
        self.cuda.compute_capability(ordinal)
    }

    /// The version of cuBLASLt and where it came from. It is opened if it was
    /// not, from local places only: only modules that link against cuBLAS need
    /// it.
    ///
    /// # Errors
    /// [`FlashInferError::Artifact`]: it is in no local place, which are listed.
    /// [`FlashInferError::Library`], [`FlashInferError::MissingSymbol`]: what is
    /// there is not it.
    pub fn cublas_version(&self) -> Result<((usize, usize, usize), &LibrarySource)> {
        let cublas = self.cublas(Fetch::Forbidden)?;
        Ok((cublas.version(), cublas.source()))
    }

    /// Opens cuBLAS ahead of its use, and downloads the pinned wheel (about 500
    /// MB) if the machine has none. [`preload`](Self::preload) does so for
    /// modules that link against it; this is for calls of one's own, which find
    /// it in the process by its name.
    ///
    /// # Errors
    /// It cannot be had or opened.
    pub fn preload_cublas(&self) -> Result<()> {
        self.cublas(Fetch::Allowed).map(drop)
    }

    /// Opens a module's file, and before it what it links against and the
    /// loader may not find.
    pub(crate) fn open_module(
        &self,
        name: ModuleName,
        path: PathBuf,
        source: LibrarySource,
        version: Option<FlashInferVersion>,
        fetch: Fetch,
    ) -> Result<&'static Module> {
        let needed = self.open_needed(&path, fetch);
        // The loader also looks where the file itself says, so it has the last
        // word; but where it fails, the list of places tells more.
        Module::load(name, path, source, version, self.tvm_ffi, self.cuda)
            .map_err(|error| needed.err().unwrap_or(error))
    }

    fn open_needed(&self, module: &Path, fetch: Fetch) -> Result<()> {
        let cublas = [Member::CublasLt, Member::Cublas].map(|member| member.file_name());
        // A file that cannot be read is for the loader to refuse.
        if needed_libraries(module).is_ok_and(|needed| needed.iter().any(|name| cublas.contains(name))) {
            self.cublas(fetch)?;
        }
        Ok(())
    }

    pub(crate) fn cublas(&self, fetch: Fetch) -> Result<&'static Cublas> {
        let mut cublas = self.cublas.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cublas) = *cublas {
            return Ok(cublas);
        }
        let loaded = Box::leak(Box::new(Cublas::load(&self.store, fetch)?));
        *cublas = Some(loaded);
        Ok(loaded)
    }

    pub(crate) fn cuda(&self) -> &'static CudaRuntime {
        self.cuda
    }

    /// A function of libtvm_ffi's global table, by name; `None` if nobody
    /// registered it. Libraries may register functions there when
    /// [`Module::open`] loads them.
    pub fn global_function(&self, name: &str) -> Option<ffi::Function> {
        ffi::Function::global(self.tvm_ffi, name)
    }

    /// Makes a closure a function of libtvm_ffi's global table, which modules and Python call by its name,
    /// from any thread. It stays there until somebody takes it out.
    ///
    /// What it returns, or fails with, is the call's result, or error: of
    /// [`TvmFfiCall`](FlashInferError::TvmFfiCall) kind and message, of
    /// [`ResultType`](FlashInferError::ResultType) a `TypeError`, of others their words as a
    /// `RuntimeError`. If it panics, the call has a `RustPanic` with the panic's words. A returned
    /// [`Value::Other`](ffi::Value::Other) is None.
    ///
    /// ```no_run
    /// # use flashinfer_rs::{FlashInferRuntime, ffi::Value};
    /// let runtime = FlashInferRuntime::get()?;
    /// runtime.register_function("my_engine.double", |args| match args {
    ///     [number] => Ok(Value::Int(2 * i64::try_from(number.value())?)),
    ///     _ => Ok(Value::None),
    /// })?;
    /// # Ok::<(), flashinfer_rs::FlashInferError>(())
    /// ```
    ///
    /// # Errors
    /// The table has a function of that name.
    pub fn register_function(
        &self,
        name: &str,
        function: impl Fn(&[ffi::Given<'_>]) -> Result<ffi::Value> + Send + Sync + 'static,
    ) -> Result<()> {
        ffi::register_function(self.tvm_ffi, name, Box::new(function))
    }

    /// A module, loaded at the first request. Local sources only: nothing is
    /// downloaded.
    ///
    /// # Errors
    /// No local source holds the module, or cuBLAS if it links against that; or
    /// it cannot be opened.
    pub fn module(&self, name: &ModuleName) -> Result<&'static Module> {
        self.load(&|_| Some(name.clone()), Fetch::Forbidden)
    }

    /// Loads modules ahead of their use, and downloads the pinned wheel if no
    /// local source holds one of them; also that of cuBLAS (about 500 MB), if
    /// one links against it and the machine has none.
    ///
    /// Constructors of attention do so for theirs; [`ModuleName::LAYERS`] are those of the
    /// functions beside it.
    ///
    /// # Errors
    /// A module cannot be had or opened; the ones before it stay loaded.
    pub fn preload<'n>(&self, names: impl IntoIterator<Item = &'n ModuleName>) -> Result<()> {
        names.into_iter().try_for_each(|name| self.load(&|_| Some(name.clone()), Fetch::Allowed).map(drop))
    }

    /// The modules of FlashInfer that this process has opened so far, sorted: what operations needed, and
    /// what was preloaded.
    ///
    /// Run a program once with all that it does, and have these embedded or fetched ahead:
    ///
    /// ```no_run
    /// # use flashinfer_rs::FlashInferRuntime;
    /// let names = FlashInferRuntime::get()?.used_modules();
    /// let list: Vec<_> = names.iter().map(|name| name.as_str()).collect();
    /// // As FLASHINFER_RS_EMBED_MODULES takes it, and `flashinfer-doctor fetch --modules`.
    /// println!("{}", list.join(","));
    /// # Ok::<(), flashinfer_rs::FlashInferError>(())
    /// ```
    pub fn used_modules(&self) -> Vec<ModuleName> {
        let mut names = self.modules.keys();
        names.sort_unstable();
        names
    }

    /// The first of several modules, in order of preference, that a local source
    /// holds; if none does, the first that can be downloaded. Returns its
    /// place in the list, too. Each is given as its name by version of
    /// FlashInfer, `None` where a version has none.
    pub(crate) fn first_of(
        &self,
        wanted: &[impl Fn(FlashInferVersion) -> Option<ModuleName>],
    ) -> Result<(usize, &'static Module)> {
        if let Some(found) = self.first_local(wanted)? {
            return Ok(found);
        }
        let mut first_error = None;
        for (place, named) in wanted.iter().enumerate() {
            match self.load(named, Fetch::Allowed) {
                Ok(module) => return Ok((place, module)),
                Err(error) if is_missing(&error) => {
                    first_error.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(first_error.unwrap_or_else(|| FlashInferError::Unsupported {
            what: "a choice among no modules".into(),
            available: "name at least one".into(),
        }))
    }

    /// The first of several modules, in order of preference, that a local source
    /// holds, and its place in the list.
    pub(crate) fn first_local(
        &self,
        wanted: &[impl Fn(FlashInferVersion) -> Option<ModuleName>],
    ) -> Result<Option<(usize, &'static Module)>> {
        for (place, named) in wanted.iter().enumerate() {
            match self.load(named, Fetch::Forbidden) {
                Ok(module) => return Ok(Some((place, module))),
                Err(error) if is_missing(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// A module out of the first source that holds it, by the name that it has
    /// in the source's version of FlashInfer.
    fn load(
        &self,
        named: &dyn Fn(FlashInferVersion) -> Option<ModuleName>,
        fetch: Fetch,
    ) -> Result<&'static Module> {
        let names: Vec<_> = FlashInferVersion::CALLED.into_iter().filter_map(named).collect();
        self.wanted.get_or_try_make(names, || {
            let wanted = |version| named(version).map(|name| Member::module(name.as_str()));
            let located = self.store.locate_of_version(&wanted, fetch)?;
            let name = ModuleName::new(located.member.module_name().unwrap_or_default());
            // Several lists of names may lead to one module.
            self.modules.get_or_try_make(name.clone(), || {
                let source = LibrarySource::Store(located.source);
                self.open_module(name, located.path, source, located.version, fetch)
            })
        })
    }
}

/// The GPUs of the process. Without a driver there are none.
fn gpus(cuda: &CudaRuntime) -> Vec<CudaArchitecture> {
    let count = cuda.device_count().map_or(0, i32::unsigned_abs);
    let capabilities = (0..count).filter_map(|ordinal| cuda.compute_capability(ordinal).ok());
    capabilities
        .map(|(major, minor)| CudaArchitecture::of_gpu(major.unsigned_abs(), minor.unsigned_abs()))
        .collect()
}

/// Whether no source holds what was asked for.
fn is_missing(error: &FlashInferError) -> bool {
    matches!(error, FlashInferError::Artifact(error) if matches!(**error, ArtifactError::NotFound { .. }))
}

impl Module {
    /// Opens a TVM-FFI library's file; starts the runtime, if it is not
    /// running. The module's name is the file's, without its ending.
    ///
    /// The library stays open for the life of the process. A file that is open
    /// already is not opened again, even if its content has changed since: the
    /// same module is returned. Its symbols are its own (`RTLD_LOCAL`), so any
    /// number of libraries may export the same names.
    ///
    /// # Errors
    /// - [`FlashInferError::Library`]: there is no such file, or the dynamic
    ///   loader refuses it, for example because a library that it needs is
    ///   missing.
    /// - [`FlashInferError::Artifact`]: it links against cuBLAS, which is in none
    ///   of the places that are listed. Nothing is downloaded.
    /// - What [`FlashInferRuntime::get`] says, if the runtime cannot be started.
    ///
    /// # Safety
    /// The library's initializers run, with all that they do. Each symbol
    /// `__tvm_ffi_<name>` whose name does not start with an underscore must be
    /// a function of TVM-FFI's one type. In a library that has the name of one
    /// of FlashInfer's modules, those that FlashInfer's module exports, too,
    /// must refuse a wrong number of arguments, as all do that are made with
    /// TVM-FFI's headers: [`check`](Self::check) relies on it.
    pub unsafe fn open(path: impl AsRef<Path>) -> Result<&'static Self> {
        let path = path.as_ref();
        // Also keeps the loader from searching its own path for a bare name.
        let path = path.canonicalize().map_err(|error| FlashInferError::Library {
            path: path.to_owned(),
            reason: error.to_string(),
            remedy: "correct the path",
        })?;
        let runtime = FlashInferRuntime::get()?;
        let opened = || runtime.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = opened().get(&path) {
            return Ok(module);
        }
        let name = ModuleName::new(path.file_stem().unwrap_or_default().to_string_lossy());
        let source = LibrarySource::File(path.clone());
        // Not locked: initializers run, which may do anything. A thread that
        // opened the file meanwhile has the same library.
        let module = runtime.open_module(name, path.clone(), source, None, Fetch::Forbidden)?;
        Ok(opened().entry(path).or_insert(module))
    }
}

impl fmt::Debug for FlashInferRuntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlashInferRuntime")
            .field("config", &self.config)
            .field("tvm_ffi", &self.tvm_ffi_version())
            .field("cuda_runtime", &self.cuda_source)
            .finish_non_exhaustive()
    }
}

/// CUDA packs a version as 1000 × major + 10 × minor.
fn split_version(version: i32) -> (i32, i32) {
    (version / 1000, version % 1000 / 10)
}
