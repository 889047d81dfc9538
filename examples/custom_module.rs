//! Functions that this crate does not wrap, called by name: of a library of one's own, and of one
//! of FlashInfer's modules.
//!
//! `cargo run --release --example custom_module`

use std::{path::Path, process::Command};

use cudarc::driver::CudaContext;
use flashinfer_rs::{
    FlashInferRuntime, Module, ModuleName, Stream, TensorMut, TensorRef, args, gpu::Tensor,
};
use rand::RngExt;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Prints what a module exports, and what its functions say that they take.
fn describe(module: &Module) -> Result<()> {
    println!("{} from {}", module.name(), module.source());
    for function in module.exports()? {
        // SAFETY: the functions of this example refuse a wrong number of arguments, which is how
        // they are asked.
        match unsafe { module.printed_signature(&function)? } {
            Some(signature) => println!("  {signature}"),
            None => println!("  {function}, which does not say what it takes"),
        }
    }
    Ok(())
}

/// `add_one` of a library that the machine's C compiler makes of `examples/add_one.c`.
fn own_library() -> Result<()> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/add_one.c");
    let folder = tempfile::tempdir()?;
    let library = folder.path().join("libadd_one.so");
    let compiled = Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&library, &source]).status();
    if !compiled.map_err(|error| format!("cannot run `cc`: {error}"))?.success() {
        return Err("the C compiler failed".into());
    }
    // SAFETY: loading it runs nothing, and its functions check what they are given.
    let module = unsafe { Module::open(&library)? };
    describe(module)?;
    let (x, mut out) = ([1.0f32, 2.5, -7.0], [f32::NAN; 3]);
    let x = TensorRef::from_slice(&x, &[3])?;
    let mut view = TensorMut::from_slice(&mut out, &[3])?;
    // SAFETY: the function writes the first tensor and reads the second, after it checked both.
    unsafe { module.call("add_one", args![&mut view, &x])? };
    // What the function refuses is an error with its message.
    // SAFETY: as above.
    let refused = unsafe { module.call("add_one", args![&mut view, &x.narrow(0, 0, 2)?]) };
    println!("  add_one([1, 2.5, -7]) = {out:?}; of two elements: {}", refused.unwrap_err());
    if out == [2.0, 3.5, -6.0] { Ok(()) } else { Err("the sum is wrong".into()) }
}

/// `packbits` of FlashInfer's module `quantization`, which puts eight flags into a byte.
fn flashinfer_module(module: &Module, gpu: bool) -> Result<()> {
    const LEN: usize = 1000;
    describe(module)?;
    if !gpu {
        println!("  not called: there is no GPU with NVIDIA's driver 580 or newer");
        return Ok(());
    }
    let stream = Stream::from(&CudaContext::new(0)?.new_stream()?);
    let flags: Vec<u8> = (0..LEN).map(|_| rand::rng().random_range(0..2)).collect();
    let x = Tensor::from_slice(&stream, &[LEN], &flags)?;
    let mut y = Tensor::<u8>::zeros(&stream, &[LEN / 8])?;
    // Looked up once: what is called often should not be looked up each time.
    let function = module.function("packbits")?;
    // SAFETY: the first tensor has a byte for each flag and the second a bit; both are on the
    // stream's device.
    unsafe { function.call_on(&stream, args![&x.view(), "little", &mut y.view_mut()])? };
    let bits = y.to_vec()?;
    let right = flags.iter().enumerate().all(|(at, flag)| bits[at / 8] >> (at % 8) & 1 == *flag);
    println!("  packbits of {LEN} flags begins with {:?}", &bits[..4]);
    if right { Ok(()) } else { Err("the bits are wrong".into()) }
}

fn main() -> Result<()> {
    let runtime = FlashInferRuntime::get()?;
    own_library()?;
    match runtime.module(&ModuleName::new("quantization")) {
        Ok(module) => flashinfer_module(module, matches!(runtime.device_count(), Ok(1..))),
        Err(error) => {
            println!("packbits is not called: {error}");
            Ok(())
        }
    }
}
