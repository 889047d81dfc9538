//! Functions that this crate does not wrap, called by name.
//!
//! `cargo run --release --example custom_module`
//!
//! Four libraries are opened and asked what they export: one of TVM-FFI's own,
//! one that the machine's C compiler makes of `examples/add_one.c`, and two of
//! FlashInfer's modules, whose kernels run where there is a GPU. Whatever is
//! missing is said. It exits with 0 only if every result that came is right.
//!
//! `cargo run --release --example custom_module -- --library PATH [FUNCTION [ARGUMENT]…]`
//!
//! opens a library of yours, and calls a function with arguments that are
//! `None`, `true` or `false`, numbers, or else strings. The function must be
//! one that can take them: it is called as it is. All that the library exports
//! must refuse a wrong number of arguments, which is how it is asked what it
//! takes.

use std::{
    path::Path,
    process::{Command, ExitCode},
};

use cudarc::driver::CudaContext;
use flashinfer_rs::{
    FlashInferError, FlashInferRuntime, Module, Stream, TensorMut, TensorRef, args,
    artifacts::{Fetch, Member},
    cudarc::{TensorExt, TensorExtMut},
    ffi::{Arg, Packed},
};
use half::f16;
use rand::{RngExt, SeedableRng, rngs::StdRng};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Opens a library and prints what it exports.
fn open(path: &Path) -> Result<&'static Module> {
    // SAFETY: TVM-FFI libraries, of FlashInfer, of TVM-FFI itself, of this
    // folder, or for which whoever named it answers.
    let module = unsafe { Module::open(path)? };
    println!("{} from {}", module.name(), module.source());
    for function in module.exports()? {
        // SAFETY: as above: its functions refuse a wrong number of arguments.
        match unsafe { module.printed_signature(&function)? } {
            Some(signature) => println!("  {signature}"),
            None => println!("  {function}, which does not say what it takes"),
        }
    }
    Ok(module)
}

/// Opens a library of the store by its file, as one opens any other; `None`,
/// and why, where it cannot be had.
fn of_store(runtime: &FlashInferRuntime, member: &Member, fetch: Fetch) -> Result<Option<&'static Module>> {
    match runtime.store().locate(member, fetch) {
        Ok(located) => open(&located.path).map(Some),
        Err(error) => {
            println!("{member} is not tried: {error}");
            Ok(None)
        }
    }
}

/// Prints a result and says whether it is right.
fn report(what: &str, right: bool) -> bool {
    println!("  {what}: {}", if right { "right" } else { "WRONG" });
    right
}

/// Prints an error that had to come, by its kind.
fn refused<T: std::fmt::Debug>(what: &str, result: flashinfer_rs::Result<T>) -> bool {
    match result {
        Err(FlashInferError::TvmFfiCall { kind, message, .. }) => {
            println!("  {what} is refused: {kind}: {message}");
            true
        }
        Err(error @ FlashInferError::MissingFunction { .. }) => {
            println!("  {what} is refused: {error}");
            true
        }
        other => report(&format!("{what}: {other:?}"), false),
    }
}

/// Two functions of the library that TVM-FFI tests itself with.
fn of_tvm_ffi(runtime: &FlashInferRuntime) -> Result<bool> {
    let Some(module) = of_store(runtime, &Member::TvmFfiTesting, Fetch::Allowed)? else { return Ok(true) };
    let add = "testing_dll_test_add_with_docstring";
    // SAFETY: the function checks kinds and number of its arguments, and
    // takes two integers.
    let call = |name: &str, args: &[Arg<'_>]| unsafe { module.call(name, args) };
    let sum: i64 = call(add, args![40, 2u8])?.try_into()?;
    let right = report(&format!("{add}(40, 2) = {sum}"), sum == 42);
    Ok(right
        & refused("\"forty\"", call(add, args!["forty", 2]))
        & refused("no_such", call("no_such", args![])))
}

/// A library of one's own. `Ok(true)`, and why, without a C compiler.
fn of_c() -> Result<bool> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/add_one.c");
    let folder = tempfile::tempdir()?;
    let library = folder.path().join("libadd_one.so");
    match Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&library, &source]).status() {
        Ok(status) if status.success() => {}
        other => {
            println!("{} is not tried: no C compiler makes a library of it: {other:?}", source.display());
            return Ok(true);
        }
    }
    let module = open(&library)?;
    let (x, mut out) = ([1.0f32, 2.5, -7.0], [f32::NAN; 3]);
    let x = TensorRef::from_slice(&x, &[3])?;
    // SAFETY: `add_one` writes the first tensor and reads the second, after it
    // has checked both.
    let call = |args: &[Arg<'_>]| unsafe { module.call("add_one", args) };
    call(args![&mut TensorMut::from_slice(&mut out, &[3])?, &x])?;
    Ok(report(&format!("add_one([1, 2.5, -7]) = {out:?}"), out == [2.0, 3.5, -6.0])
        & refused("a tensor of another length", call(args![&x.narrow(0, 0, 2)?, &x])))
}

/// `packbits` puts eight flags into a byte. Without a GPU it is seen to refuse
/// tensors of the host.
fn pack_bits(runtime: &FlashInferRuntime, gpu: bool, rng: &mut StdRng) -> Result<bool> {
    const LEN: usize = 1000;
    let Some(module) = of_store(runtime, &Member::module("quantization"), Fetch::Forbidden)? else {
        return Ok(true);
    };
    let flags: Vec<u8> = (0..LEN).map(|_| rng.random_range(0..2)).collect();
    let mut packed = [0u8; LEN / 8];
    if !gpu {
        let x = TensorRef::from_slice(&flags, &[LEN])?;
        let mut y = TensorMut::from_slice(&mut packed, &[LEN / 8])?;
        // SAFETY: the function refuses tensors of the host.
        let result = unsafe { module.call("packbits", args![&x, "little", &mut y]) };
        return Ok(refused("a tensor of the host", result));
    }
    let cuda = CudaContext::new(0)?.new_stream()?;
    let (x, mut y) = (cuda.clone_htod(&flags)?, cuda.alloc_zeros::<u8>(LEN / 8)?);
    {
        let (x, mut y) = (x.tensor(&cuda, &[LEN])?, y.tensor_mut(&cuda, &[LEN / 8])?);
        let stream = Stream::from(&cuda);
        // SAFETY: the first tensor has a byte for each flag, and the second a bit.
        unsafe { module.call_on(&stream, "packbits", args![&x.view(), "little", &mut y.view_mut()])? };
    }
    cuda.memcpy_dtoh(&y, &mut packed)?;
    cuda.synchronize()?;
    let right = flags.iter().enumerate().all(|(at, flag)| packed[at / 8] >> (at % 8) & 1 == *flag);
    Ok(report(&format!("packbits of {LEN} flags against the CPU"), right))
}

/// `silu_and_mul` multiplies the second half of each row by `x / (1 + e⁻ˣ)` of
/// the first.
fn silu_and_mul(runtime: &FlashInferRuntime, gpu: bool, rng: &mut StdRng) -> Result<bool> {
    const ROWS: usize = 5;
    const DIM: usize = 256;
    let Some(module) = of_store(runtime, &Member::module("silu_and_mul"), Fetch::Forbidden)? else {
        return Ok(true);
    };
    if !gpu {
        println!("  It is not run: there is no GPU.");
        return Ok(true);
    }
    let input: Vec<f16> =
        (0..ROWS * 2 * DIM).map(|_| f16::from_f32(rng.random_range(-3.0..3.0f32))).collect();
    let cuda = CudaContext::new(0)?.new_stream()?;
    let (device_input, mut out) = (cuda.clone_htod(&input)?, cuda.clone_htod(&[f16::NAN; ROWS * DIM])?);
    {
        let x = device_input.tensor(&cuda, &[ROWS, 2 * DIM])?;
        let mut out = out.tensor_mut(&cuda, &[ROWS, DIM])?;
        // Looked up once: what is called often should not be by its name.
        let function = module.function("silu_and_mul")?;
        // SAFETY: contiguous tensors of one type, the second with rows twice
        // as long, all of whole vectors; the flag says whether to launch early.
        unsafe { function.call_on(&Stream::from(&cuda), args![&mut out.view_mut(), &x.view(), false])? };
    }
    let out = cuda.clone_dtoh(&out)?;
    cuda.synchronize()?;
    let (mut difference, mut norm) = (0.0, 0.0);
    for (at, &out) in out.iter().enumerate() {
        let row = &input[at / DIM * 2 * DIM..];
        let (gate, up) = (row[at % DIM].to_f64(), row[DIM + at % DIM].to_f64());
        let expected = gate / (1.0 + (-gate).exp()) * up;
        difference += (out.to_f64() - expected).powi(2);
        norm += expected * expected;
    }
    let error = (difference / norm).sqrt();
    Ok(report(&format!("silu_and_mul against the CPU, relative error {error:.1e}"), error <= 1e-3))
}

/// An argument of the command line as one of a call.
fn argument(text: &str) -> Packed<'_> {
    if let Ok(number) = text.parse::<i64>() {
        return number.into();
    }
    if let Ok(number) = text.parse::<f64>() {
        return number.into();
    }
    match text {
        "None" => None::<i64>.into(),
        "true" | "false" => (text == "true").into(),
        text => text.into(),
    }
}

/// Opens a library that the command line names.
fn of_ones_own(path: &Path, mut rest: impl Iterator<Item = String>) -> Result<()> {
    let module = open(path)?;
    let Some(function) = rest.next() else { return Ok(()) };
    let texts: Vec<_> = rest.collect();
    let packed: Vec<_> = texts.iter().map(|text| argument(text)).collect();
    let args: Vec<_> = packed.iter().map(Packed::as_arg).collect();
    // SAFETY: whoever names the function and its arguments answers for them.
    let result = unsafe { module.call(&function, &args)? };
    println!("{function}({}) = {result:?}", texts.join(", "));
    Ok(())
}

fn main() -> Result<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (Some("--library"), Some(path)) => {
            if let Err(error) = of_ones_own(path.as_ref(), arguments) {
                eprintln!("error: {error}");
                return Ok(ExitCode::FAILURE);
            }
            return Ok(ExitCode::SUCCESS);
        }
        (None, _) => {}
        _ => {
            eprintln!("usage: custom_module [--library PATH [FUNCTION [ARGUMENT]...]]");
            return Ok(ExitCode::from(2));
        }
    }
    let runtime = match FlashInferRuntime::get() {
        Ok(runtime) => runtime,
        Err(error) => {
            println!("Nothing can be called here: the runtime does not start. {error:#}");
            return Ok(ExitCode::SUCCESS);
        }
    };
    let gpu = runtime.device_count().is_ok_and(|count| count > 0);
    let seed = rand::random();
    println!("seed {seed}");
    let rng = &mut StdRng::seed_from_u64(seed);
    let right =
        of_tvm_ffi(runtime)? & of_c()? & pack_bits(runtime, gpu, rng)? & silu_and_mul(runtime, gpu, rng)?;
    if !gpu {
        println!(
            "There is no GPU: no kernel ran. They need an NVIDIA GPU and NVIDIA's driver 580 or newer; \
             `cargo run --features doctor --bin flashinfer-doctor` tells what this machine lacks."
        );
    }
    Ok(if right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
