//! An engine with an allocator of its own: append, prefill, decode, a captured step and sampling from
//! raw pointers. docs/engines.md goes through it.
//!
//! `cargo run --release --example raw_pointers`
//!
//! The steps go through the CPU reference, with the kernels' own checks of shapes, strides and addresses,
//! and, where there is a GPU, through the kernels.

mod append;
mod captured;
mod decode;
mod memory;
mod model;
mod on_cpu;
mod on_gpu;
mod prefill;
mod sample;
mod views;

use cudarc::driver::CudaContext;
use flashinfer_rs::FlashInferRuntime;
use half::bf16;
use memory::Memory;
use model::{REQUESTS, Step};
use rand::RngExt;
use sample::Logits;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const VOCAB: usize = 1000;
/// The relative error up to which two results in `bf16` agree.
const BOUND: f64 = 1e-2;

/// Random logits; the last request takes the likeliest token.
fn random_logits(memory: &mut Memory) -> Result<Logits> {
    let mut rng = rand::rng();
    let logits: Vec<f32> = (0..REQUESTS * VOCAB).map(|_| rng.random_range(-4.0..4.0)).collect();
    let uniforms: Vec<f32> = (0..REQUESTS).map(|_| rng.random_range(0.0..1.0)).collect();
    let mut place = |bytes: usize| memory.take(bytes);
    let batch = Logits {
        logits: place(4 * REQUESTS * VOCAB)?,
        uniforms: place(4 * REQUESTS)?,
        temperatures: place(4 * REQUESTS)?,
        top_ks: place(4 * REQUESTS)?,
        rows: REQUESTS,
        vocab: VOCAB,
    };
    // SAFETY: the parts were made for so many numbers, and are this function's.
    unsafe {
        memory.write(batch.logits, &logits)?;
        memory.write(batch.uniforms.cast_mut(), &uniforms)?;
        memory.write(batch.temperatures.cast_mut(), &[0.7f32, 1.0, 0.0])?;
        memory.write(batch.top_ks.cast_mut(), &[0i32, 40, 0])?;
    }
    Ok(batch)
}

/// The norm of the difference, by the norm of what was expected. NaN where a number is.
fn relative_error(found: &[bf16], expected: &[bf16]) -> f64 {
    let squares = found.iter().zip(expected).map(|(found, expected)| {
        let (found, expected) = (f64::from(*found), f64::from(*expected));
        [(found - expected).powi(2), expected.powi(2)]
    });
    let [difference, whole] = squares.fold([0.0; 2], |[a, b], [d, e]| [a + d, b + e]);
    (difference / whole).sqrt()
}

fn main() -> Result<()> {
    let steps = Step::all();
    let expected = on_cpu::steps(&steps)?;
    let mut host = Memory::host();
    let logits = random_logits(&mut host)?;
    let expected_tokens = on_cpu::sample(&logits)?;
    println!("CPU: {} steps, and the tokens {expected_tokens:?}", expected.len());
    let gpus = FlashInferRuntime::get().and_then(|runtime| runtime.device_count());
    if !matches!(gpus, Ok(1..)) {
        let why = gpus.map_or_else(|error| error.to_string(), |_| "There is none.".into());
        println!("GPU: not run. {why}");
        return Ok(());
    }
    let cuda = CudaContext::new(0)?.new_stream()?;
    let mut agree = true;
    for (step, (found, expected)) in steps.iter().zip(on_gpu::steps(&cuda, &steps)?.iter().zip(&expected)) {
        let errors: Vec<f64> = found.iter().zip(expected).map(|(a, b)| relative_error(a, b)).collect();
        let printed: Vec<_> = errors.iter().map(|error| format!("{error:.1e}")).collect();
        println!("GPU: {:?} of {:?} tokens: relative errors {}", step.mode, step.new, printed.join(", "));
        agree &= errors.iter().all(|&error| error <= BOUND);
    }
    let tokens = on_gpu::sample(&cuda, &host, &logits)?;
    println!("GPU: the tokens {tokens:?}; expected the same, and errors of at most {BOUND:.0e}");
    let modules: Vec<_> = FlashInferRuntime::get()?.used_modules().iter().map(ToString::to_string).collect();
    println!("It used the modules {}", modules.join(","));
    if agree && tokens == expected_tokens { Ok(()) } else { Err("the GPU and the CPU disagree".into()) }
}
