//! What Rust packs against what modules say of themselves, and the errors
//! that real modules raise. No GPU is needed: a module called with wrong
//! arguments refuses them before it touches one.
//!
//! Every wheel at hand is looked into: two that hold modules of one name are
//! both compared. Every function that a module exports is accounted for, also
//! of modules that do not open here.

mod artifact_support;
mod families;
mod signatures {
    mod module_names;
}

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};
use test_support::{c_library, required};

use families::{families, is_uncalled};
use flashinfer_rs::{
    FlashInferError, FlashInferRuntime, Module, ModuleName, TensorRef, args,
    artifacts::{Fetch, Member, Store, StoreConfig},
    ffi::{Arg, ArgKind, Signature},
    signatures,
};

/// A module of one source.
struct Found {
    source: String,
    name: ModuleName,
    path: PathBuf,
}

/// The modules of every local source of a store, not only those that it would
/// choose.
fn found(config: StoreConfig) -> Vec<Found> {
    let sources = Store::open(config.clone()).unwrap().inventory().into_iter();
    let modules_of = |source: flashinfer_rs::artifacts::SourceReport| {
        // A store of nothing but this source.
        let mut alone = config.clone();
        alone.bundle = if source.path.is_none() { StoreConfig::from_env().unwrap().bundle } else { &[] };
        (alone.wheels, alone.env_wheels) = (source.path.into_iter().collect(), Vec::new());
        let alone = Store::open(alone).unwrap();
        let find = move |name: String| {
            let located = alone.locate(&Member::module(name.as_str()), Fetch::Forbidden).unwrap();
            Found { source: located.source.to_string(), name: ModuleName::new(name), path: located.path }
        };
        source.modules.into_iter().map(find).collect::<Vec<_>>()
    };
    sources.flat_map(modules_of).collect()
}

/// Whether the runtime starts; if not, the reason is printed.
fn starts() -> bool {
    FlashInferRuntime::get().map_err(|error| required::skip(required::LIBTVM_FFI, error)).is_ok()
}

/// The modules of the machine's sources; none, with the reason printed, where
/// there are none or the runtime does not start.
fn at_hand() -> Vec<Found> {
    if !starts() {
        return Vec::new();
    }
    let found = found(StoreConfig::from_env().unwrap());
    if found.is_empty() {
        required::skip(required::MODULES, "no local source holds any; set FLASHINFER_RS_WHEELS to some");
    }
    found
}

/// The module, or what the machine lacks for it. Where modules are required, that
/// is cuBLAS or NVRTC, which are large, and nothing else.
fn open(found: &Found) -> Result<&'static Module, &'static str> {
    // SAFETY: the store's modules are FlashInfer's, or of this file's making.
    match unsafe { Module::open(&found.path) } {
        Ok(module) => Ok(module),
        Err(FlashInferError::Library { reason, .. })
            if reason.contains("GLIBC") && !required::is_required(required::MODULES) =>
        {
            Err("a newer C or C++ library")
        }
        Err(error @ FlashInferError::Artifact(_)) if error.to_string().starts_with("libcublas") => {
            Err("cuBLAS")
        }
        Err(FlashInferError::Library { reason, .. }) if reason.contains("libnvrtc") => Err("NVRTC"),
        Err(error) => panic!("{} is there and cannot be opened: {error}", found.name),
    }
}

fn norm() -> Option<&'static Module> {
    let modules = at_hand();
    let norm = modules.iter().find(|found| found.name == ModuleName::NORM);
    if norm.is_none() && !modules.is_empty() {
        required::skip(required::MODULES, "no local source holds norm");
    }
    Some(open(norm?).expect("norm needs nothing that is new"))
}

/// What a module's list of exports and the declarations do not agree in.
fn unaccounted(module: &ModuleName, exports: &[String]) -> Vec<String> {
    let signatures = signatures();
    let declared: BTreeSet<_> = signatures
        .iter()
        .filter(|(pattern, _)| module.matches(pattern))
        .map(|(_, declared)| declared[0].function)
        .collect();
    let exports: BTreeSet<_> = exports.iter().map(String::as_str).collect();
    let mut wrong = Vec::new();
    if declared.is_empty() {
        if !families().iter().any(|family| family.holds(module) && !family.is_declared()) {
            wrong.push(format!("{module}: docs/modules.md does not say why it is not called"));
        }
        return wrong;
    }
    let undeclared = exports.difference(&declared).filter(|function| !is_uncalled(module, function));
    wrong.extend(undeclared.map(|function| format!("{module} exports {function}, which is not declared")));
    let missing = declared.difference(&exports);
    wrong.extend(missing.map(|function| format!("{module} does not export {function}, which is declared")));
    wrong
}

#[test]
fn every_export_is_declared() {
    let mut wrong: Vec<String> = Vec::new();
    let found = at_hand();
    for found in &found {
        let exports = Module::exports_of(&found.path).unwrap();
        wrong.extend(
            unaccounted(&found.name, &exports).into_iter().map(|what| format!("{}: {what}", found.source)),
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    eprintln!("{} modules looked into", found.len());
}

#[test]
fn every_declaration_is_what_the_modules_say() {
    let found = at_hand();
    let (mut modules, mut compared, mut exported, mut wrong) = (0, 0, 0, Vec::new());
    let mut closed: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for found in &found {
        match open(found).map(Module::check) {
            Ok(Ok(0)) => {}
            Ok(Ok(functions)) => {
                (modules, compared) = (modules + 1, compared + functions);
                let exports = Module::exports_of(&found.path).unwrap();
                exported += exports.iter().filter(|name| !is_uncalled(&found.name, name)).count();
            }
            Ok(Err(error)) => wrong.push(format!("{}: {error}", found.source)),
            Err(lacking) => closed.entry(lacking).or_default().push(found.name.as_str()),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    eprintln!("compared {compared} functions of {modules} modules");
    for (lacking, names) in closed {
        eprintln!("skipped for want of {lacking}:\n  {}", names.join("\n  "));
    }
    assert_eq!(compared, exported, "functions compared, and functions of these modules that are called");
    assert!(!required::is_required(required::MODULES) || compared > 0, "nothing was compared");
}

/// The comparison once more, in a process of its own with a later libtvm_ffi.
#[test]
fn a_later_library_compares_as_well() {
    let Some(wheel) = artifact_support::later_tvm_ffi() else { return };
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["every_declaration_is_what_the_modules_say", "--exact", "--nocapture"]);
    command.env("FLASHINFER_RS_WHEELS", artifact_support::wheels_after(&wheel));
    let output = command.output().unwrap();
    let text = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
    assert!(output.status.success(), "{text}");
    assert!(at_hand().is_empty() || text.contains("compared ") && !text.contains("compared 0 "), "{text}");
}

#[test]
fn wrong_declarations_are_caught() {
    let Some(norm) = norm() else { return };
    // SAFETY: FlashInfer's functions refuse a wrong number of arguments.
    let printed = unsafe { norm.printed_signature("rmsnorm") }.unwrap().unwrap();
    let declared = norm.declared().find(|declared| declared[0].function == "rmsnorm").unwrap();
    let [right] = *declared else { panic!("{declared:?}") };
    assert_eq!(right.compare(&printed), Ok(()));
    let [out, input, weight, eps, pdl] = *right.args else { panic!("{right}") };
    let wrong = |args: &'static [(&'static str, ArgKind)], words: &str| {
        let difference = Signature { args, ..right }.compare(&printed).unwrap_err();
        assert!(difference.starts_with("rmsnorm: ") && difference.contains(words), "{difference}");
    };
    let args = |args: &[(&'static str, ArgKind)]| -> &'static [_] { args.to_vec().leak() };
    wrong(
        args(&[out, input, weight, pdl, eps]),
        "argument enable_pdl: the module takes `float`, declared is `bool`",
    );
    wrong(args(&[eps, out, input, weight, pdl]), "argument eps: the module takes `DLTensor*`");
    wrong(
        args(&[out, input, ("weight", ArgKind::OptTensor), eps, pdl]),
        "argument weight: the module takes `DLTensor*`, declared is `Optional<DLTensor*>`",
    );
    wrong(args(&[out, input, ("weight", ArgKind::TensorObject), eps, pdl]), "declared is `ffi.Tensor`");
    wrong(args(&[out, input, weight, ("eps", ArgKind::Int), pdl]), "argument eps");
    wrong(args(&[out, input, weight, eps]), "takes 5 arguments, declared are 4");
    wrong(args(&[]), "takes 5 arguments, declared are 0");
    wrong(args(&[out, input, weight, eps, pdl, pdl]), "takes 5 arguments, declared are 6");
    let difference = Signature { result: "Array<int>", ..right }.compare(&printed).unwrap_err();
    assert!(difference.contains("returns `void`, declared is `Array<int>`"), "{difference}");
    let difference = Signature { function: "rmsnorn", ..right }.compare(&printed).unwrap_err();
    assert!(difference.contains("its name is rmsnorm, declared is rmsnorn"), "{difference}");
    // SAFETY: there is no such function.
    let missing = unsafe { norm.printed_signature("no_such_function") }.unwrap_err();
    assert!(missing.to_string().contains("it exports: fused_add_rmsnorm, "), "{missing}");
}

/// Of two wheels that hold a module, the first is right and the second has a change in one
/// function: of a module with one list of arguments for each function, and of one with several.
#[test]
fn a_changed_module_is_caught_in_whichever_wheel_it_is() {
    if !starts() {
        return;
    }
    let said = |module: &str, version: usize| -> Vec<String> {
        let declared = signatures().into_iter().filter(|(pattern, _)| *pattern == module);
        declared.map(|(_, declared)| declared[version.min(declared.len() - 1)].to_string()).collect()
    };
    for (module, version, from, to, difference) in [
        ("norm", 0, "rmsnorm(0: DLTensor*, 1: DLTensor*, 2: DLTensor*, 3: float", "3: int", "argument eps"),
        (
            "topk",
            0,
            "radix_topk(0: DLTensor*, 1: DLTensor*, 2: DLTensor*",
            "2: ffi.Tensor",
            "since 0.6.13 `radix_topk(",
        ),
        (
            "topk",
            1,
            "radix_topk(0: DLTensor*, 1: DLTensor*, 2: Optional<DLTensor*>",
            "2: int",
            "since 0.6.18 `radix_topk(",
        ),
    ] {
        let right = said(module, version);
        let changed = right.iter().position(|says| says.starts_with(from)).expect(from);
        let kept = &from[..from.rfind(", ").unwrap() + 2];
        let mut wrong = right.clone();
        wrong[changed] = wrong[changed].replacen(from, &format!("{kept}{to}"), 1);
        let new = format!("{module}_of_tomorrow(0: DLTensor*) -> void");
        wrong.push(new);
        let folder = tempfile::tempdir().unwrap();
        let mut config = StoreConfig::new(StoreConfig::from_env().unwrap().pins);
        config.cache_dir = Some(folder.path().join("cache"));
        for (wheel, says) in [("1.whl", &right), ("2.whl", &wrong)] {
            let library = folder.path().join("made.so");
            let says: Vec<_> = says.iter().map(String::as_str).collect();
            if !c_library::compile(&c_library::module_that_says(&says), &library, &[]) {
                return;
            }
            let bytes = artifact_support::module_wheel(&[(module, &std::fs::read(library).unwrap())]);
            config.wheels.push(folder.path().join(wheel));
            std::fs::write(&config.wheels[config.wheels.len() - 1], bytes).unwrap();
        }
        let found = found(config);
        let [first, second] = found.as_slice() else { panic!("two modules, not {}", found.len()) };
        assert_eq!((first.name.as_str(), second.name.as_str()), (module, module));
        assert!(second.source.contains("2.whl"), "{}", second.source);
        assert_eq!(open(first).unwrap().check().unwrap(), right.len());
        let error = open(second).unwrap().check().unwrap_err();
        let FlashInferError::Signature { differences, .. } = &error else { panic!("{error}") };
        let [only] = differences.as_slice() else { panic!("{error}") };
        assert!(only.contains(difference) && only.contains(&to[3..]), "no word of {difference} in: {only}");
        let new = unaccounted(&second.name, &open(second).unwrap().exports().unwrap());
        let says = format!("{module} exports {module}_of_tomorrow, ");
        assert!(new.iter().any(|what| what.starts_with(&says)), "{new:?}");
    }
}

/// Modules that name functions which nothing defines are those of FlashAttention 2 of later
/// versions, and the functions are kernels for tiles that they do not have.
#[test]
fn nothing_but_kernels_of_missing_tiles_is_unbound() {
    let (mut modules, mut functions) = (0, 0);
    for found in at_hand() {
        let Ok(module) = open(&found) else { continue };
        for symbol in module.unbound() {
            assert!(symbol.contains("KVCacheDispatchedI") && symbol.contains("Lj32E"), "{symbol}");
            assert!(
                found.name.matches("batch_prefill_with_*") && !found.name.matches("*_sm90"),
                "{}",
                found.name
            );
        }
        modules += usize::from(!module.unbound().is_empty());
        functions += module.unbound().len();
    }
    eprintln!("{modules} modules name {functions} kernels that they do not have");
}

/// Every change of one function of a real module, in the order of its arguments and in what it
/// returns, is told from all that is declared of it.
#[test]
fn a_change_in_any_function_of_any_module_is_caught() {
    let (mut changes, mut seen) = (0, BTreeSet::new());
    for found in at_hand() {
        let Ok(module) = open(&found) else { continue };
        for declared in module.declared() {
            // SAFETY: FlashInfer's functions refuse a wrong number of arguments.
            let printed = unsafe { module.printed_signature(declared[0].function) }.unwrap().unwrap();
            if !seen.insert((declared.as_ptr(), printed.clone())) {
                continue;
            }
            assert!(Signature::find(declared, &printed).is_ok(), "{}: {printed}", found.name);
            let (list, result) = printed.rsplit_once(") -> ").unwrap();
            let more = if list.ends_with('(') { "0: int" } else { ", 99: int" };
            for changed in [
                format!("{list}{more}) -> {result}"),
                format!("{list}) -> changed"),
                format!("changed_{printed}"),
                printed.replacen("DLTensor*", "ffi.Tensor", 1),
                printed.replacen(": int", ": float", 1),
            ] {
                if changed != printed {
                    let error = Signature::find(declared, &changed).unwrap_err();
                    assert!(!error.is_empty(), "{changed}");
                    changes += 1;
                }
            }
        }
    }
    eprintln!("{changes} changes told from what is declared");
}

#[test]
fn refusals_of_real_modules_are_decoded() {
    let Some(norm) = norm() else { return };
    let data = [0u16; 16];
    let matrix = &TensorRef::from_slice(&data, &[2, 8]).unwrap();
    let refusal = |args: &[Arg<'_>]| {
        // SAFETY: the module checks types and devices of all arguments first,
        // and refuses these.
        match unsafe { norm.call("rmsnorm", args) } {
            Err(FlashInferError::TvmFfiCall { function, kind, message, traceback }) => {
                assert_eq!(function, "rmsnorm");
                assert!(!traceback.is_empty());
                (kind, message)
            }
            other => panic!("refused, not {other:?}"),
        }
    };
    let (kind, message) = refusal(args![matrix, matrix, matrix]);
    assert!(kind == "TypeError" && message.contains("Expected 5 but got 3"), "{kind}: {message}");
    let (kind, message) = refusal(args![matrix, matrix, matrix, "eps", false]);
    assert!(kind == "TypeError" && message.contains("float"), "{kind}: {message}");
    let (kind, message) = refusal(args![matrix, None, matrix, 1e-6, false]);
    assert!(kind == "TypeError" && message.contains("DLTensor"), "{kind}: {message}");
    // Tensors of the host where the device's are expected.
    let (kind, message) = refusal(args![matrix, matrix, matrix, 1e-6, false]);
    assert!(kind == "InternalError" && message.contains("must be a CUDA tensor"), "{kind}: {message}");
}
