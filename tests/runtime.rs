//! Starting the process's runtime. There is one per process, so each test
//! runs a part of this binary in a process of its own.

mod artifact_support;

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};
use test_support::{c_library, required};

use flashinfer_rs::{
    DType, FlashInferError, FlashInferRuntime, LibrarySource, Module, ModuleName, RuntimeConfig, Stream,
    artifacts::{ArtifactError, Fetch, FlashInferVersion, Member, Store, StoreConfig},
    attention::{AttentionSpec, Backend, BatchAttention, BatchDecode, Heads, MlaSpec, SingleDecode},
};

/// Names the part that a child process is to run.
const PART: &str = "FLASHINFER_RS_TEST_PART";

/// Runs `test` in a process of its own with these variables. There, this
/// returns `None` and the test goes on.
fn in_child(test: &str, variables: &[(&str, &Path)]) -> Option<Output> {
    if std::env::var(PART).is_ok_and(|part| part == test) {
        return None;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture"]).env(PART, test);
    for (name, value) in variables {
        command.env(name, value);
    }
    Some(command.output().unwrap())
}

#[track_caller]
fn assert_passed(output: &Output) {
    let text = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
    assert!(output.status.success(), "{text}");
    for line in text.lines().filter(|line| line.starts_with("skipped ")) {
        eprintln!("{line}");
    }
}

/// The file of `libtvm_ffi.so`, or the reason why there is none, printed.
fn tvm_ffi() -> Option<PathBuf> {
    let located = StoreConfig::from_env()
        .and_then(Store::open)
        .and_then(|store| store.locate(&Member::TvmFfi, Fetch::Allowed));
    match located {
        Ok(located) => Some(located.path),
        Err(error) => {
            required::skip(required::LIBTVM_FFI, error);
            None
        }
    }
}

/// The runtime, or the reason why it does not start here, printed.
fn runtime() -> Option<&'static FlashInferRuntime> {
    FlashInferRuntime::get().map_err(|error| required::skip(required::LIBTVM_FFI, error)).ok()
}

/// A module, or the sources that do not hold it, printed. One that is there and does
/// not open is an error.
fn module(runtime: &'static FlashInferRuntime, name: &ModuleName) -> Option<&'static Module> {
    match runtime.module(name) {
        Ok(module) => Some(module),
        Err(FlashInferError::Artifact(error)) if matches!(*error, ArtifactError::NotFound { .. }) => {
            required::skip(required::MODULES, error);
            None
        }
        Err(error) => panic!("{name} is there and cannot be opened: {error}"),
    }
}

#[test]
fn the_runtime_starts_once_with_one_configuration() {
    let test = "the_runtime_starts_once_with_one_configuration";
    if let Some(output) = in_child(test, &[]) {
        return assert_passed(&output);
    }
    if tvm_ffi().is_none() {
        return;
    }
    // A start that fails leaves nothing behind.
    let mut broken = RuntimeConfig::default();
    broken.wheels = vec!["/no/such/wheel.whl".into()];
    let error = FlashInferRuntime::initialize(broken.clone()).unwrap_err().to_string();
    assert!(error.contains("/no/such/wheel.whl"), "{error}");

    let runtime = FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap();
    let addresses: Vec<usize> = std::thread::scope(|scope| {
        let start =
            || std::ptr::from_ref(FlashInferRuntime::initialize(RuntimeConfig::default()).unwrap()) as usize;
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(addresses.iter().all(|&address| address == std::ptr::from_ref(runtime) as usize));
    assert!(std::ptr::eq(FlashInferRuntime::get().unwrap(), runtime));
    assert!(runtime.tvm_ffi_version().starts_with("0.1."));
    assert!(runtime.cuda_runtime_version().unwrap() >= (13, 0));

    let error = FlashInferRuntime::initialize(broken).unwrap_err();
    let FlashInferError::ConfigurationMismatch { difference } = &error else { panic!("{error}") };
    assert!(difference.contains("wheels") && difference.contains("/no/such/wheel.whl"), "{difference}");
    let mut offline = RuntimeConfig::default();
    offline.offline = true;
    assert!(FlashInferRuntime::initialize(offline).unwrap_err().to_string().contains("offline"));
}

#[test]
fn the_modules_that_a_program_uses_are_told() {
    let test = "the_modules_that_a_program_uses_are_told";
    if let Some(output) = in_child(test, &[]) {
        return assert_passed(&output);
    }
    let Some(runtime) = runtime() else { return };
    assert!(runtime.used_modules().is_empty());
    let names = [ModuleName::PAGE, ModuleName::NORM];
    if names.iter().any(|name| module(runtime, name).is_none()) {
        return;
    }
    assert!(runtime.module(&ModuleName::new("no_such_module")).is_err());
    runtime.preload(&names).unwrap();
    assert_eq!(runtime.used_modules(), [ModuleName::NORM, ModuleName::PAGE]);
    // As a build and `flashinfer-doctor fetch --modules` read them.
    let list: Vec<_> = runtime.used_modules().iter().map(ToString::to_string).collect();
    assert_eq!(flashinfer_rs::artifacts::embed::split_patterns(&list.join(",")), ["norm", "page"]);
}

/// A cache with the wheels of the libraries that this machine's has, and no modules.
fn cache_with_libraries() -> tempfile::TempDir {
    let cache = tempfile::tempdir().unwrap();
    let wheels = cache.path().join("wheels");
    std::fs::create_dir(&wheels).unwrap();
    let store = Store::open(StoreConfig::from_env().unwrap()).unwrap();
    let here = std::fs::read_dir(store.cache_dir().join("wheels"));
    for file in here.into_iter().flatten().map(|file| file.unwrap()) {
        let name = file.file_name().into_string().unwrap();
        let library = ["apache_tvm_ffi", "nvidia_cuda_runtime"].iter().any(|start| name.starts_with(start));
        if library && name.ends_with(".whl") {
            std::fs::copy(file.path(), wheels.join(name)).unwrap();
        }
    }
    cache
}

#[test]
fn many_threads_load_a_module_once() {
    let test = "many_threads_load_a_module_once";
    let cache = cache_with_libraries();
    if let Some(output) = in_child(test, &[("FLASHINFER_RS_CACHE_DIR", cache.path())]) {
        return assert_passed(&output);
    }
    let Some(runtime) = runtime() else { return };
    if module(runtime, &ModuleName::PAGE).is_none() {
        return;
    }
    let barrier = std::sync::Barrier::new(16);
    let addresses: Vec<usize> = std::thread::scope(|scope| {
        let load = || {
            barrier.wait();
            std::ptr::from_ref(runtime.module(&ModuleName::NORM).unwrap()) as usize
        };
        let threads: Vec<_> = (0..16).map(|_| scope.spawn(load)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(addresses.iter().all(|&address| address == addresses[0]));
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut files: Vec<&str> = maps.lines().filter(|line| line.ends_with("/norm.so")).collect();
    files.iter_mut().for_each(|line| *line = line.rsplit(' ').next().unwrap());
    files.dedup();
    assert_eq!(files.len(), 1, "{files:?}");
    assert!(Path::new(files[0]).starts_with(runtime.store().cache_dir()));
}

#[test]
fn a_missing_module_names_each_source_and_its_remedy() {
    let test = "a_missing_module_names_each_source_and_its_remedy";
    if let Some(output) = in_child(test, &[]) {
        return assert_passed(&output);
    }
    let Some(runtime) = runtime() else { return };
    let error = runtime.module(&ModuleName::new("no_such_module")).unwrap_err();
    assert_eq!(error.to_string().lines().count(), 1, "{error}");
    assert!(error.remedy().is_some(), "{error}");
    let error = format!("{error:#}");
    for words in
        ["no_such_module", "FLASHINFER_RS_WHEELS", "pinned wheel", "download", "flashinfer-doctor fetch"]
    {
        assert!(error.contains(words), "no word of {words} in: {error}");
    }
}

#[test]
fn cublas_is_found_or_every_place_is_named() {
    let test = "cublas_is_found_or_every_place_is_named";
    if let Some(output) = in_child(test, &[]) {
        return assert_passed(&output);
    }
    let Some(runtime) = runtime() else { return };
    match runtime.cublas_version() {
        Ok(((major, minor, patch), source)) => {
            assert_eq!(major, 13, "13.{minor}.{patch}");
            eprintln!("cuBLAS {major}.{minor}.{patch}: {source}");
        }
        Err(error) => {
            let error = format!("{error:#}");
            for words in [
                "libcublasLt.so.13",
                "LD_LIBRARY_PATH",
                "/usr/local/cuda/lib64",
                "CUDA_HOME",
                "VIRTUAL_ENV",
                "FLASHINFER_RS_WHEELS",
                "flashinfer-doctor fetch nvidia_cublas",
            ] {
                assert!(error.contains(words), "no word of {words} in: {error}");
            }
        }
    }
}

#[test]
fn a_library_that_is_there_already_is_used() {
    let test = "a_library_that_is_there_already_is_used";
    if let Some(output) = in_child(test, &[]) {
        return assert_passed(&output);
    }
    let Some(path) = tvm_ffi() else { return };
    // As another framework would: with local visibility.
    // SAFETY: the verified library of the pinned wheel.
    let library =
        unsafe { libloading::os::unix::Library::open(Some(&path), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    let _library = library.unwrap();
    let runtime = FlashInferRuntime::get().unwrap();
    assert!(matches!(runtime.tvm_ffi_source(), LibrarySource::Process), "{}", runtime.tvm_ffi_source());
    // Modules find its symbols all the same.
    if let Some(norm) = module(runtime, &ModuleName::NORM) {
        assert!(norm.check().unwrap() >= 4);
    }
}

#[test]
fn a_library_of_another_version_is_refused() {
    let test = "a_library_of_another_version_is_refused";
    if let Some(output) = in_child(test, &[]) {
        return assert_passed(&output);
    }
    let folder = tempfile::tempdir().unwrap();
    let library = folder.path().join("libtvm_ffi.so");
    let code = "void TVMFFIGetVersion(unsigned *v) { v[0] = 0; v[1] = 2; v[2] = 5; }";
    if !c_library::compile(code, &library, &["-Wl,-soname,libtvm_ffi.so"]) {
        return;
    }
    // SAFETY: the library above has no initializer.
    let library = unsafe { libloading::os::unix::Library::open(Some(&library), libc::RTLD_NOW) };
    let _library = library.unwrap();
    let error = match FlashInferRuntime::get() {
        // libcudart comes first, of which there may be none.
        Err(FlashInferError::Artifact(error)) => return required::skip(required::LIBTVM_FFI, error),
        other => other.unwrap_err(),
    };
    assert!(matches!(&error, FlashInferError::AbiVersion { found, .. } if found == "0.2.5"), "{error}");
}

/// What `.ci/run` relies on: a test that lacks what is required fails.
#[test]
fn what_is_required_is_not_skipped() {
    let test = "what_is_required_is_not_skipped";
    for (required, passes) in [("", true), ("cc, model", true), ("cc,modules", false), ("module", false)] {
        match in_child(test, &[("FLASHINFER_RS_REQUIRE", Path::new(required))]) {
            Some(output) => assert_eq!(output.status.success(), passes, "{required}: {output:?}"),
            None => return required::skip(required::MODULES, "this test says so"),
        }
    }
}

/// With the wheels of one version, and with those of both, in whose order the first wins.
#[test]
fn the_first_source_of_a_module_decides_its_version() {
    let test = "the_first_source_of_a_module_decides_its_version";
    let folders = ["0.6.13", "0.7.4"].map(required::test_wheels);
    let [Some(old), Some(new)] = &folders else { return };
    if std::env::var(PART).is_err() {
        for folders in [vec![new], vec![old], vec![new, old], vec![old, new]] {
            let wheels = std::env::join_paths(folders).unwrap();
            let variables =
                [("FLASHINFER_RS_WHEELS", Path::new(&wheels)), ("FLASHINFER_RS_OFFLINE", Path::new("1"))];
            assert_passed(&in_child(test, &variables).expect("a child"));
        }
        return;
    }
    if runtime().is_none() {
        return;
    }
    let named = std::env::var_os("FLASHINFER_RS_WHEELS").unwrap();
    let named: Vec<_> = std::env::split_paths(&named).collect();
    let (only_new, new_first) = (named == [new.clone()], named[0] == *new);
    let (old, new) = (FlashInferVersion::new(0, 6, 13), FlashInferVersion::new(0, 7, 4));
    // SAFETY: the legacy default stream; nothing is enqueued on it.
    let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
    let decode = |head_dim| {
        let spec = AttentionSpec::new(DType::BF16, head_dim).with_backend(Backend::CudaCores);
        BatchDecode::new(&stream, &spec, Heads::new(8, 8)).map(|decode| decode.module())
    };
    let first = if new_first { new } else { old };
    assert_eq!(decode(128).unwrap().version(), Some(first), "{named:?}");
    assert_eq!(FlashInferRuntime::get().unwrap().module(&ModuleName::NORM).unwrap().version(), Some(first));
    // The wheels of 0.7.4 at hand have no such module; the cache may hold the pinned one.
    match decode(256) {
        Ok(module) => assert_eq!(module.version(), Some(old), "{named:?}"),
        Err(error) => assert!(only_new && error.to_string().contains("none of its"), "{named:?}: {error}"),
    }
    // Tensor cores have another name in each version.
    let spec = AttentionSpec::new(DType::BF16, 128).with_backend(Backend::Fa2);
    let prefill = BatchDecode::new(&stream, &spec, Heads::new(8, 8)).unwrap();
    assert_eq!(prefill.module().version(), Some(first), "{named:?}");
    assert_eq!(prefill.module().name(), &spec.prefill_module(first, false).unwrap());
    // Attention of one request is gone.
    let single = SingleDecode::new(&stream, &AttentionSpec::new(DType::BF16, 128), Heads::new(8, 8));
    match single {
        Ok(single) => assert_eq!(single.module().version(), Some(old), "{named:?}"),
        Err(error) => {
            assert!(only_new, "{named:?}: {error}");
            let text = error.to_string();
            for part in [
                "FlashInfer 0.7.4: it has had no attention of one request since 0.6.18",
                "use BatchDecode or BatchPrefill with a batch of one",
                "a wheel of FlashInfer 0.6.13",
            ] {
                assert!(text.contains(part), "{part} is not in: {text}");
            }
        }
    }
}

/// What no wheel of FlashInfer can hold is not looked for in one; that of the user may.
#[test]
fn head_dimensions_of_no_published_module() {
    let test = "head_dimensions_of_no_published_module";
    let folder = tempfile::tempdir().unwrap();
    let wheel = folder.path().join("flashinfer_jit_cache-0.6.13+cu130.own-cp39-abi3-linux_x86_64.whl");
    let spec = AttentionSpec::new(DType::F16, 512).with_backend(Backend::CudaCores);
    let name = spec.decode_module().unwrap();
    if std::env::var(PART).is_err() {
        let library = folder.path().join("own.so");
        let function = |name| format!("int __tvm_ffi_{name}(void) {{ return -1; }}\n");
        if !c_library::compile(&["plan", "run"].map(function).concat(), &library, &[]) {
            return;
        }
        let library = std::fs::read(library).unwrap();
        std::fs::write(&wheel, artifact_support::module_wheel(&[(name.as_str(), &library)])).unwrap();
    }
    if let Some(output) = in_child(test, &[("FLASHINFER_RS_WHEELS", &wheel)]) {
        return assert_passed(&output);
    }
    if runtime().is_none() {
        return;
    }
    // SAFETY: the legacy default stream; nothing is enqueued on it.
    let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
    let heads = Heads::new(8, 8);
    let decode = BatchDecode::new(&stream, &spec, heads).unwrap();
    assert_eq!((decode.module().name(), decode.backend()), (&name, Backend::CudaCores));
    let other = |head_dim| AttentionSpec::new(DType::F16, head_dim);
    for result in [
        BatchDecode::new(&stream, &other(512).with_backend(Backend::Fa2), heads).map(drop),
        BatchDecode::new(&stream, &spec.with_window_left(7), heads).map(drop),
        BatchAttention::new(&stream, &other(512), heads).map(drop),
    ] {
        let error = result.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, FlashInferError::Unsupported { .. }), "{text}");
        let there_is = "there are head dimensions 64, 128 and 256, of which 256 is nearest";
        assert!(text.contains(there_is) && text.contains("FLASHINFER_RS_WHEELS"), "{text}");
    }
    // No wheel can have these.
    for result in [
        BatchDecode::new(&stream, &other(80).with_backend(Backend::Fa2), heads).map(drop),
        BatchDecode::new(&stream, &other(112), heads).map(drop),
        BatchDecode::new(&stream, &other(96).with_backend(Backend::CudaCores), heads).map(drop),
        BatchAttention::new(&stream, &other(96), heads).map(drop),
    ] {
        let error = result.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, FlashInferError::Unsupported { .. }), "{text}");
        for part in [
            "with head dimension ",
            "wheels have head dimensions 64, 128 and 256",
            "compute other heads as wider ones",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
    // Only Mla's own dimensions have kernels at all.
    let mut latent = MlaSpec::new(DType::F16, 1.0);
    latent.head_dim_ckv = 256;
    let error = latent.module(FlashInferVersion::OLDEST, Backend::Fa2).unwrap_err().to_string();
    assert!(error.contains("there is 512 and 64"), "{error}");
}
