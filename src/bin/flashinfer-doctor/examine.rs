//! Looks at the machine. Nothing is downloaded; modules are unpacked into the
//! cache to be opened.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::CString,
    mem::MaybeUninit,
    os::unix::ffi::OsStrExt,
    path::Path,
    sync::Arc,
};

use flashinfer_rs::{
    FlashInferError, FlashInferRuntime, LibrarySource, Module, ModuleName, RuntimeConfig,
    artifacts::{ArtifactError, CudaArchitecture, Member, Package, Source, SourceReport, Store, Wheel},
    signatures,
};
use indicatif::HumanBytes;

use crate::{
    ReportOptions, Sources,
    report::{Finding, Report, counted},
};

/// The oldest driver branch that serves CUDA 13.
const MIN_DRIVER: u32 = 580;
/// The CUDA version that the modules are built for.
const MIN_CUDA: (i32, i32) = (13, 0);

const NO_DRIVER: &str = "there is no NVIDIA driver";
const INSTALL_DRIVER: &str = "install NVIDIA's driver, version 580 or newer; in a container, pass the GPU through \
                              (with Docker: --gpus all)";

/// Looks at everything.
pub fn examine(sources: &Sources, options: ReportOptions) -> Report {
    let mut report = Report::default();
    report.add("Platform", platform());
    let mut config = RuntimeConfig::default();
    config.wheels = sources.wheels.clone();
    config.cache_dir = sources.cache_dir.clone();
    config.offline = true;
    let runtime = FlashInferRuntime::initialize(config);
    let seen = runtime.as_ref().map_or_else(|_| Vec::new(), |runtime| seen_gpus(runtime));
    let store = sources.store_config().and_then(|mut config| {
        config.gpus = Some(Arc::new(move || seen.clone()));
        Store::open(config)
    });
    let store = match store {
        Ok(store) => store,
        Err(error) => {
            let explained = Explained::new(&error.into());
            report.add("NVIDIA driver", vec![driver_without_runtime()]);
            report.add("Settings", vec![explained.problem("the settings cannot be used")]);
            return report;
        }
    };
    let inventory = store.inventory();
    let modules = match &runtime {
        Ok(runtime) => Modules::open(runtime, &store, &inventory, options.all_modules),
        Err(_) => Modules::unopened(&inventory),
    };

    match &runtime {
        Ok(runtime) => {
            report.add("NVIDIA driver", vec![driver(runtime)]);
            report.add("GPUs", gpus(runtime, &inventory));
            report.add("CUDA runtime and libtvm_ffi", libraries(runtime));
        }
        Err(error) => {
            report.add("NVIDIA driver", vec![driver_without_runtime()]);
            let remedy = "mend what keeps the runtime from starting";
            report.add(
                "GPUs",
                vec![Finding::warning("they can be asked only once the runtime starts", remedy)],
            );
            report.add("CUDA runtime and libtvm_ffi", no_libraries(error, &inventory));
        }
    }
    report.add("Sources of modules, in order", held(&store, &inventory));
    report.add("Cache", vec![cache(&store)]);
    report.add("Modules", modules.findings());
    if options.check {
        report.add("Signatures", check_signatures(&modules.open));
    }
    report
}

fn platform() -> Vec<Finding> {
    let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
    let machine = format!("{os} on {arch}");
    match (os, arch) {
        ("linux", "x86_64" | "aarch64") => vec![Finding::ok(machine)],
        _ => vec![Finding::warning(
            format!("{machine}, for which no wheels are pinned"),
            "use Linux on x86_64 or aarch64, or name wheels of your own in FLASHINFER_RS_WHEELS",
        )],
    }
}

/// The version of the driver's kernel module.
fn driver_version() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let mut words = text.lines().next()?.split_whitespace();
    words.find(|word| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.')).map(str::to_owned)
}

fn driver(runtime: &FlashInferRuntime) -> Finding {
    let name =
        driver_version().map_or_else(|| "the driver".to_owned(), |version| format!("driver {version}"));
    match runtime.driver_version() {
        Ok(Some(cuda)) if cuda >= MIN_CUDA => Finding::ok(format!(
            "{name} serves CUDA {} (needed: 13.0, driver {MIN_DRIVER} or newer)",
            dotted(cuda)
        )),
        Ok(Some(cuda)) => Finding::problem(
            format!("{name} serves CUDA {} only, and the kernels need 13.0", dotted(cuda)),
            format!("update NVIDIA's driver to version {MIN_DRIVER} or newer"),
        ),
        Ok(None) => Finding::problem(NO_DRIVER, INSTALL_DRIVER),
        Err(error) => Explained::new(&error).problem("the driver does not answer"),
    }
}

/// What can be said of the driver when the CUDA runtime cannot be asked.
fn driver_without_runtime() -> Finding {
    let Some(version) = driver_version() else {
        return Finding::problem(NO_DRIVER, INSTALL_DRIVER);
    };
    match version.split('.').next().and_then(|major| major.parse::<u32>().ok()) {
        Some(..MIN_DRIVER) => Finding::problem(
            format!("driver {version} is too old for CUDA 13"),
            format!("update NVIDIA's driver to version {MIN_DRIVER} or newer"),
        ),
        _ => Finding::ok(format!("driver {version} (needed: {MIN_DRIVER} or newer)")),
    }
}

/// The GPUs that modules are for; none without a driver.
fn seen_gpus(runtime: &FlashInferRuntime) -> Vec<CudaArchitecture> {
    let capabilities = (0..runtime.device_count().unwrap_or(0))
        .filter_map(|ordinal| runtime.compute_capability(ordinal).ok());
    capabilities
        .map(|(major, minor)| CudaArchitecture::of_gpu(major.unsigned_abs(), minor.unsigned_abs()))
        .collect()
}

fn gpus(runtime: &FlashInferRuntime, inventory: &[SourceReport]) -> Vec<Finding> {
    let provided = inventory.iter().any(|source| !source.architectures.is_empty());
    if matches!(runtime.driver_version(), Ok(None)) {
        let mut findings =
            vec![Finding::problem("none can be seen without the driver", "install the driver first")];
        if provided {
            findings.push(Finding::ok(
                "so nothing tells which provider suits: the first in order stands for all in this report",
            ));
        }
        return findings;
    }
    let count = match runtime.device_count() {
        Ok(0) => {
            let remedy = "check `nvidia-smi` and CUDA_VISIBLE_DEVICES";
            return vec![Finding::problem("there is none", remedy)];
        }
        Ok(count) => count,
        Err(error) => return vec![Explained::new(&error).problem("they cannot be counted")],
    };
    let device = |ordinal| match runtime.compute_capability(ordinal) {
        Ok(capability) => Finding::ok(format!("cuda:{ordinal}: compute capability {}", dotted(capability))),
        Err(error) => Explained::new(&error).problem(&format!("cuda:{ordinal} does not answer")),
    };
    let mut findings: Vec<_> = (0..count).map(device).collect();
    let note = match provided {
        true => {
            "of providers, the one that suits these best is taken; whether another wheel's module holds code \
                 for them is known only when it runs"
        }
        false => "whether a module holds code for these is known only when it runs",
    };
    findings.push(Finding::ok(note));
    findings
}

fn libraries(runtime: &FlashInferRuntime) -> Vec<Finding> {
    let cuda = match runtime.cuda_runtime_version() {
        Ok(version) => {
            Finding::ok(format!("CUDA runtime {}: {}", dotted(version), runtime.cuda_runtime_source()))
        }
        Err(error) => Explained::new(&error).problem("the CUDA runtime does not answer"),
    };
    let (version, source) = (runtime.tvm_ffi_version(), runtime.tvm_ffi_source());
    let package = package_version(source).filter(|package| *package != version);
    let package =
        package.map_or_else(String::new, |package| format!(" (of the package's version {package})"));
    vec![cuda, Finding::ok(format!("libtvm_ffi {version}{package}: {source}")), cublas(runtime)]
}

/// The version of the package that a library came in, by its wheel's name. A library may say another
/// one of itself.
fn package_version(source: &LibrarySource) -> Option<String> {
    let LibrarySource::Store(source) = source else { return None };
    let file = match source {
        Source::CachedMember(file) => file.clone(),
        Source::Config(path) | Source::Env(path) | Source::CachedWheel(path) | Source::Fetched(path) => {
            path.file_name()?.to_str()?.to_owned()
        }
        Source::Embedded => return None,
    };
    let version = file.strip_suffix(".whl")?.split('-').nth(1)?;
    version.starts_with(|c: char| c.is_ascii_digit()).then(|| version.to_owned())
}

/// Whether there is a cuBLAS, which most of the crate does without.
fn cublas(runtime: &FlashInferRuntime) -> Finding {
    match runtime.cublas_version() {
        Ok(((major, minor, patch), source)) => {
            Finding::ok(format!("cuBLAS {major}.{minor}.{patch}: {source}"))
        }
        Err(error) => {
            let Explained { reason, details, .. } = Explained::new(&error);
            let what = format!(
                "no cuBLAS: {reason}. Only matrix products need it (`flashinfer-doctor fetch {}`)",
                Package::Cublas
            );
            Finding::ok(what).with_details(details)
        }
    }
}

/// Why the runtime does not start, and what else it would lack.
fn no_libraries(error: &FlashInferError, inventory: &[SourceReport]) -> Vec<Finding> {
    let mut findings = vec![Explained::new(error).problem("the runtime does not start")];
    let named = missing_member(error);
    // The CUDA runtime is looked for first, in more places than the sources.
    if named == Some(&Member::CudaRuntime) && !holds(inventory, &Member::TvmFfi) {
        let text = format!("{} is in no source either", Member::TvmFfi);
        findings.push(Finding::problem(text, fetch_remedy(Package::TvmFfi)));
    }
    findings
}

fn missing_member(error: &FlashInferError) -> Option<&Member> {
    match error {
        FlashInferError::Artifact(error) => match &**error {
            ArtifactError::NotFound { member, .. } => Some(member),
            _ => None,
        },
        _ => None,
    }
}

fn holds(inventory: &[SourceReport], library: &Member) -> bool {
    inventory.iter().any(|source| source.libraries.contains(&library.file_name()))
}

fn fetch_remedy(package: Package) -> String {
    let size = if package == Package::JitCache { " (about 1.7 GB)" } else { "" };
    format!(
        "run `flashinfer-doctor fetch {package}`{size}, or name a wheel that holds it in FLASHINFER_RS_WHEELS"
    )
}

/// Each source and what it holds. A source that holds nothing is no problem by
/// itself; a broken one is, because look-ups stop there.
fn held(store: &Store, inventory: &[SourceReport]) -> Vec<Finding> {
    let finding = |source: &SourceReport| {
        let name = &source.source;
        if source.usable {
            let mut parts: Vec<String> =
                source.version.iter().map(|version| format!("FlashInfer {version}")).collect();
            if !source.architectures.is_empty() {
                parts.push(format!("for {}", source.architectures.join(" and ")));
            }
            if !source.modules.is_empty() {
                parts.push(counted(source.modules.len(), "module"));
            }
            parts.extend(source.libraries.iter().cloned());
            let what = if parts.is_empty() { "allowed".to_owned() } else { parts.join(", ") };
            return Finding::ok(format!("{name}: {what}")).with_details(source.modules.clone());
        }
        let problem = source.problem.as_deref().unwrap_or("it holds nothing");
        let remedy = source.remedy.as_deref().unwrap_or("leave it out of the list");
        match &source.path {
            None => Finding::ok(format!("{name}: {problem} ({remedy})")),
            Some(path) if is_pinned(store, source) && !path.exists() => {
                let file = path.file_name().unwrap_or_default().to_string_lossy();
                Finding::ok(format!("{name}: not in the cache; `flashinfer-doctor fetch` downloads {file}"))
            }
            // An empty folder, or a wheel of something else.
            Some(path) if !is_pinned(store, source) && (path.is_dir() || Wheel::open(path).is_ok()) => {
                Finding::warning(format!("{name}: {problem}"), remedy)
            }
            Some(_) => {
                // The problem is an error's text, which ends in a remedy of its own.
                let problem = problem.rsplit_once("; ").map_or(problem, |(problem, _)| problem);
                Finding::problem(format!("{name}: {problem}"), remedy)
            }
        }
    };
    inventory.iter().map(finding).collect()
}

/// Whether a source is a pinned wheel in the cache.
fn is_pinned(store: &Store, source: &SourceReport) -> bool {
    let wheels = store.cache_dir().join("wheels");
    source.path.as_deref().and_then(Path::parent) == Some(&wheels)
}

fn cache(store: &Store) -> Finding {
    let folder = store.cache_dir().display();
    if mounted_noexec(store.cache_dir()) {
        return Finding::problem(
            format!("{folder} is on a file system that is mounted `noexec`, so no library in it opens"),
            "set FLASHINFER_RS_CACHE_DIR to a folder on another file system, or mount this one with `exec`",
        );
    }
    if !store.cache_dir().exists() {
        return Finding::ok(format!("{folder} does not exist; it is made when it is needed"));
    }
    match store.cache_size() {
        Ok(size) => Finding::ok(format!("{folder}: {}", HumanBytes(size))),
        Err(error) => Finding::problem(
            format!("{folder} cannot be read: {error}"),
            "make it readable, or set FLASHINFER_RS_CACHE_DIR to another folder",
        ),
    }
}

/// Whether nothing may be executed in a folder, or in the one that it will be made in.
fn mounted_noexec(folder: &Path) -> bool {
    let Some(existing) = folder.ancestors().find(|folder| folder.exists()) else { return false };
    let Ok(path) = CString::new(existing.as_os_str().as_bytes()) else { return false };
    let mut stats = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path ends in a zero, and the system writes to `stats` only.
    if unsafe { libc::statvfs(path.as_ptr(), stats.as_mut_ptr()) } != 0 {
        return false;
    }
    // SAFETY: a call that succeeds has filled it in.
    unsafe { stats.assume_init() }.f_flag & libc::ST_NOEXEC != 0
}

/// The modules at hand.
#[derive(Default)]
struct Modules {
    open: Vec<&'static Module>,
    failed: Vec<(String, Explained)>,
    /// Those of the pinned wheel that this crate does not call.
    left_out: Vec<String>,
    /// Those that wait for the runtime.
    unopened: Vec<String>,
}

impl Modules {
    fn open(runtime: &FlashInferRuntime, store: &Store, inventory: &[SourceReport], all: bool) -> Self {
        let (pinned, own): (Vec<_>, Vec<_>) = inventory.iter().partition(|source| is_pinned(store, source));
        let names = |sources: &[&SourceReport]| -> BTreeSet<String> {
            sources.iter().flat_map(|source| &source.modules).cloned().collect()
        };
        let (pinned, own) = (names(&pinned), names(&own));
        let mut modules = Self::default();
        for name in own.union(&pinned) {
            let module = ModuleName::new(name.as_str());
            if !all
                && !own.contains(name)
                && !called_modules().iter().flatten().any(|pattern| module.matches(pattern))
            {
                modules.left_out.push(name.clone());
                continue;
            }
            match runtime.module(&module) {
                Ok(module) => modules.open.push(module),
                Err(error) => modules.failed.push((name.clone(), Explained::new(&error))),
            }
        }
        modules
    }

    fn unopened(inventory: &[SourceReport]) -> Self {
        let names: BTreeSet<_> = inventory.iter().flat_map(|source| &source.modules).cloned().collect();
        Self { unopened: names.into_iter().collect(), ..Self::default() }
    }

    fn findings(&self) -> Vec<Finding> {
        if !self.unopened.is_empty() {
            let text = format!("{} at hand, not opened", counted(self.unopened.len(), "module"));
            let remedy = "mend what keeps the runtime from starting";
            return vec![Finding::warning(text, remedy).with_details(self.unopened.clone())];
        }
        if self.open.is_empty() && self.failed.is_empty() {
            return vec![Finding::problem("no module is at hand", fetch_remedy(Package::JitCache))];
        }
        let mut families: BTreeMap<&str, (Vec<String>, usize)> = BTreeMap::new();
        for module in &self.open {
            let (open, total) = families.entry(family(module.name().as_str())).or_default();
            open.push(module.name().to_string());
            *total += 1;
        }
        for (name, _) in &self.failed {
            families.entry(family(name)).or_default().1 += 1;
        }
        let some = families.into_iter().filter(|(_, (open, _))| !open.is_empty());
        let mut findings: Vec<_> = some
            .map(|(family, (open, total))| {
                Finding::ok(format!("{family}: {} of {total} open", open.len())).with_details(open)
            })
            .collect();
        findings.extend(self.failures());
        findings.extend(self.lacking());
        if !self.left_out.is_empty() {
            let text = format!(
                "{} of the pinned wheel not opened, because this crate does not call them (--all-modules opens them)",
                counted(self.left_out.len(), "module")
            );
            findings.push(Finding::ok(text).with_details(self.left_out.clone()));
        }
        findings
    }

    /// The modules that do not open, those with the same reason together.
    fn failures(&self) -> impl Iterator<Item = Finding> {
        let mut by_reason: BTreeMap<(&str, &str), Vec<String>> = BTreeMap::new();
        for (name, why) in &self.failed {
            by_reason.entry((&why.reason, &why.remedy)).or_default().push(name.clone());
        }
        by_reason.into_iter().map(|((reason, remedy), names)| {
            let verb = if names.len() == 1 { "does" } else { "do" };
            let text = format!("{} {verb} not open: {reason}", counted(names.len(), "module"));
            Finding::warning(text, remedy).with_details(names)
        })
    }

    /// The modules that this crate calls and of which none opens.
    fn lacking(&self) -> Option<Finding> {
        let opens = |pattern: &str| self.open.iter().any(|module| module.name().matches(pattern));
        let called = called_modules();
        let lacking = called.iter().filter(|names| !names.iter().any(|pattern| opens(pattern)));
        let lacking: Vec<_> = lacking.map(|names| names.join(" or ")).collect();
        let text = format!("no module opens of: {}", lacking.join(", "));
        let remedy = "mend the reasons above, or name a wheel that holds it in FLASHINFER_RS_WHEELS";
        if lacking.is_empty() {
            None
        } else if lacking.len() == called.len() {
            Some(Finding::problem(text, remedy))
        } else {
            Some(Finding::warning(text, remedy))
        }
    }
}

/// Patterns of the modules that this crate calls: together those of one kind of
/// module, which has the same functions by whichever name a version gives it.
fn called_modules() -> Vec<Vec<&'static str>> {
    let mut functions: BTreeMap<&str, Vec<_>> = BTreeMap::new();
    for (pattern, declared) in signatures() {
        functions.entry(pattern).or_default().push(declared);
    }
    let mut kinds: Vec<(Vec<_>, Vec<&str>)> = Vec::new();
    for (pattern, functions) in functions {
        match kinds.iter_mut().find(|(others, _)| *others == functions) {
            Some((_, patterns)) => patterns.push(pattern),
            None => kinds.push((functions, vec![pattern])),
        }
    }
    kinds.into_iter().map(|(_, patterns)| patterns).collect()
}

/// What a module does, without what it was compiled for.
fn family(name: &str) -> &str {
    name.split_once("_dtype_").map_or(name, |(family, _)| family)
}

fn check_signatures(modules: &[&'static Module]) -> Vec<Finding> {
    let remedy = "use a wheel of the FlashInfer version that this crate pins";
    let (mut compared, mut differences) = (0, Vec::new());
    for module in modules {
        compared += module.declared().count();
        match module.check() {
            Ok(_) => {}
            Err(FlashInferError::Signature { module, differences: found }) => {
                differences.extend(found.into_iter().map(|difference| format!("{module}: {difference}")));
            }
            Err(error) => differences.push(error.to_string()),
        }
    }
    if compared == 0 {
        return vec![Finding::warning(
            "nothing to compare: no module that this crate calls opens",
            "see above",
        )];
    }
    let total = counted(compared, "function");
    if differences.is_empty() {
        return vec![Finding::ok(format!("{total} compared, all as declared"))];
    }
    let text = format!("{} of {total} differ from what this crate declares", differences.len());
    vec![Finding::problem(text, remedy).with_details(differences)]
}

/// An error, taken apart for a finding.
struct Explained {
    reason: String,
    remedy: String,
    details: Vec<String>,
}

impl Explained {
    fn new(error: &FlashInferError) -> Self {
        let explained =
            |reason: String, remedy: &str| Self { reason, remedy: remedy.into(), details: Vec::new() };
        match error {
            FlashInferError::Library { path, reason, remedy } => {
                // The loader names the library that it was asked for, which is known.
                let reason = reason.split(" (required by ").next().unwrap_or_default();
                let reason = reason.strip_prefix(&format!("{}: ", path.display())).unwrap_or(reason);
                let usual = "obtain the file again, or use another wheel";
                explained(reason.to_owned(), if remedy.is_empty() { usual } else { remedy })
            }
            FlashInferError::Artifact(artifact) => match &**artifact {
                ArtifactError::NotFound { member, searched } => Self {
                    // The report itself forbids downloads; the remedy names the one that helps.
                    details: searched
                        .iter()
                        .filter(|searched| !searched.source.starts_with("download of"))
                        .map(ToString::to_string)
                        .collect(),
                    ..explained(
                        format!("{member} is in none of its sources"),
                        &fetch_remedy(member.package()),
                    )
                },
                ArtifactError::Setting { variable, .. } => {
                    explained(artifact.to_string(), &format!("correct or unset {variable}"))
                }
                ArtifactError::NoCacheDir => explained(artifact.to_string(), "set FLASHINFER_RS_CACHE_DIR"),
                other => Self::split(&other.to_string()),
            },
            other => Self::split(&other.to_string()),
        }
    }

    /// Most of the crate's errors end in `; ` and the remedy.
    fn split(whole: &str) -> Self {
        let (reason, remedy) = whole.rsplit_once("; ").unwrap_or((whole, "correct what the message names"));
        Self { reason: reason.into(), remedy: remedy.into(), details: Vec::new() }
    }

    fn problem(self, what: &str) -> Finding {
        Finding::problem(format!("{what}: {}", self.reason), self.remedy).with_details(self.details)
    }
}

fn dotted((major, minor): (i32, i32)) -> String {
    format!("{major}.{minor}")
}
