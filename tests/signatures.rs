//! What Rust packs against what modules say of themselves, and the errors
//! that real modules raise. No GPU is needed: a module called with wrong
//! arguments refuses them before it touches one.

use flashinfer_rs::{
    FlashInferError, FlashInferRuntime, Module, ModuleName, TensorRef,
    ffi::{Arg, ArgKind, DlTensor, Signature},
    signatures,
};

/// The modules that the machine has and that open here. Prints the others.
fn open_modules() -> Vec<&'static Module> {
    let runtime = match FlashInferRuntime::get() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("skipped: the runtime does not start here: {error}");
            return Vec::new();
        }
    };
    let names = runtime.store().modules();
    if names.is_empty() {
        eprintln!(
            "skipped: no local source holds modules; set FLASHINFER_RS_WHEELS to a wheel or a folder of wheels"
        );
    }
    let open = |name: &String| match runtime.module(&ModuleName::new(name.as_str())) {
        Ok(module) => Some(module),
        Err(FlashInferError::Library { reason, .. }) if reason.contains("GLIBC_") => {
            eprintln!("skipped: {name} needs a newer C library than this machine's");
            None
        }
        Err(FlashInferError::Library { reason, .. }) if reason.contains("libcublas") => {
            eprintln!("skipped: {name} needs cuBLAS, which this machine has not");
            None
        }
        Err(error) => panic!("{name}: {error}"),
    };
    names.iter().filter_map(open).collect()
}

#[test]
fn every_declaration_is_what_the_modules_say() {
    let modules = open_modules();
    let mut compared = 0;
    for module in &modules {
        for (pattern, signature) in signatures() {
            if module.name().matches(pattern) {
                let printed = module.printed_signature(signature.function).unwrap().unwrap();
                signature
                    .compare(&printed)
                    .unwrap_or_else(|difference| panic!("{}: {difference}", module.name()));
                compared += 1;
            }
        }
    }
    eprintln!("compared {compared} functions of {} modules", modules.len());
    if modules.iter().any(|module| module.name() == &ModuleName::NORM) {
        assert!(compared >= 9, "norm alone has nine functions that this crate calls");
    }
}

#[test]
fn a_wrong_declaration_is_caught() {
    let Some(norm) = open_modules().into_iter().find(|module| module.name() == &ModuleName::NORM) else {
        return;
    };
    let printed = norm.printed_signature("rmsnorm").unwrap().unwrap();
    let (_, right) = signatures().into_iter().find(|(_, signature)| signature.function == "rmsnorm").unwrap();
    assert_eq!(right.compare(&printed), Ok(()));
    let swapped = Signature {
        args: &[
            ("out", ArgKind::Tensor),
            ("input", ArgKind::Tensor),
            ("weight", ArgKind::Tensor),
            ("enable_pdl", ArgKind::Bool),
            ("eps", ArgKind::Float),
        ],
        ..right
    };
    let difference = swapped.compare(&printed).unwrap_err();
    assert!(difference.contains("enable_pdl") && difference.contains("`float`"), "{difference}");
    let short = Signature { args: &right.args[..4], ..right };
    assert!(short.compare(&printed).unwrap_err().contains("takes 5 arguments, declared are 4"));
    assert!(norm.printed_signature("no_such_function").is_err());
}

#[test]
fn refusals_of_real_modules_are_decoded() {
    let modules = open_modules();
    let Some(norm) = modules.iter().find(|module| module.name() == &ModuleName::NORM) else { return };
    let rmsnorm = norm.function("rmsnorm").unwrap();
    let data = [0u16; 16];
    let matrix = TensorRef::from_slice(&data, &[2, 8]).unwrap();
    let (matrix, eps, pdl) = (DlTensor::from(&matrix), Arg::from(1e-6), Arg::from(false));
    let refusal = |args: &[Arg<'_>]| {
        // SAFETY: the module checks types and devices of all arguments first,
        // and refuses these.
        match unsafe { rmsnorm.call(args) } {
            Err(FlashInferError::TvmFfiCall { function, kind, message, traceback }) => {
                assert_eq!(function, "rmsnorm");
                assert!(!traceback.is_empty());
                (kind, message)
            }
            other => panic!("refused, not {other:?}"),
        }
    };
    let tensor = Arg::from(&matrix);
    let (kind, message) = refusal(&[tensor, tensor, tensor]);
    assert!(kind == "TypeError" && message.contains("Expected 5 but got 3"), "{kind}: {message}");
    let (kind, message) = refusal(&[tensor, tensor, tensor, Arg::small_str("eps").unwrap(), pdl]);
    assert!(kind == "TypeError" && message.contains("float"), "{kind}: {message}");
    let (kind, message) = refusal(&[tensor, Arg::NONE, tensor, eps, pdl]);
    assert!(kind == "TypeError" && message.contains("DLTensor"), "{kind}: {message}");
    // Tensors of the host where the device's are expected.
    let (kind, message) = refusal(&[tensor, tensor, tensor, eps, pdl]);
    assert!(kind == "InternalError" && message.contains("must be a CUDA tensor"), "{kind}: {message}");
}
