//! Where a model runs: the GPU or the CPU.

use clap::ValueEnum;
use flashinfer_rs::kv::PageAllocator;
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    Result,
    backend::{Engine, cpu::Cpu, gpu::Gpu},
    model::{Layer, Model},
};

/// The most tokens that one step computes.
pub const STEP_TOKENS: usize = 256;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// The GPU if there is one that can be used, else the CPU
    Auto,
    /// The CPU reference
    Cpu,
    /// The first NVIDIA GPU
    Gpu,
}

/// The model where it is to run, and where that is.
pub fn load(device: Device, model: &Model, pool: &PageAllocator) -> Result<(Box<dyn Engine>, String)> {
    let reason = match device {
        Device::Cpu => "as asked".to_owned(),
        Device::Auto | Device::Gpu => match load_gpu(model, pool, STEP_TOKENS) {
            Ok(gpu) => {
                let place = format!("on the GPU, {}", gpu.name()?);
                return Ok((Box::new(gpu), place));
            }
            Err(error) if device == Device::Gpu => {
                return Err(format!("no GPU can be used: {error}").into());
            }
            Err(error) => error.to_string().lines().next().unwrap_or_default().to_owned(),
        },
    };
    let cpu = with_progress(model.layers(), |layers| Cpu::new(&model.config, model.ends()?, layers, pool))?;
    Ok((Box::new(cpu), format!("on the CPU ({reason})")))
}

/// The model on the GPU.
pub fn load_gpu(model: &Model, pool: &PageAllocator, max_tokens: usize) -> Result<Gpu> {
    with_progress(model.layers(), |layers| Gpu::new(&model.config, model.ends()?, layers, pool, max_tokens))
}

/// Shows how many of a model's layers were taken.
pub fn with_progress<E>(
    layers: impl ExactSizeIterator<Item = Result<Layer>>,
    load: impl FnOnce(&mut dyn Iterator<Item = Result<Layer>>) -> Result<E>,
) -> Result<E> {
    let style = ProgressStyle::with_template("loading {wide_bar} {pos}/{len} layers")?;
    let bar = ProgressBar::new(layers.len() as u64).with_style(style);
    let engine = load(&mut bar.wrap_iter(layers));
    bar.finish_and_clear();
    engine
}
