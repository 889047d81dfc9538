//! Where a model runs: the GPU or the CPU.

use clap::ValueEnum;
use flashinfer_rs::kv::PageAllocator;
use indicatif::{ProgressBar, ProgressStyle};

use super::{Backend, StepCapacity, cpu::Cpu, gpu::Gpu};
use crate::{
    Result,
    model::{Layer, Model},
};

/// Where a model is to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// The GPU if there is one that can be used, else the CPU
    #[default]
    Auto,
    /// The CPU
    Cpu,
    /// The first NVIDIA GPU
    Gpu,
}

/// A model that runs somewhere.
pub struct Loaded {
    /// The model.
    pub backend: Box<dyn Backend>,
    /// Whether it runs on a GPU.
    pub on_gpu: bool,
    /// Where it runs, and why.
    pub place: String,
}

/// Loads a model, for steps of up to `capacity`.
///
/// # Errors
/// The GPU is asked for and cannot be used, or a tensor cannot be read.
pub fn load(device: Device, model: &Model, pool: &PageAllocator, capacity: StepCapacity) -> Result<Loaded> {
    let reason = match device {
        Device::Cpu => "as asked".to_owned(),
        Device::Auto | Device::Gpu => match load_gpu(model, pool, capacity.tokens) {
            Ok(gpu) => {
                let place = format!("on the GPU, {}", gpu.name()?);
                return Ok(Loaded { backend: Box::new(gpu), on_gpu: true, place });
            }
            Err(error) if device == Device::Gpu => {
                return Err(format!("no GPU can be used: {error}").into());
            }
            Err(error) => error.to_string().lines().next().unwrap_or_default().to_owned(),
        },
    };
    let cpu = with_progress(model, |layers| Cpu::new(&model.config, model.ends()?, layers, pool))?;
    Ok(Loaded { backend: Box::new(cpu), on_gpu: false, place: format!("on the CPU ({reason})") })
}

/// Loads a model onto the GPU, for steps of so many tokens.
///
/// # Errors
/// There is none that can be used, or a tensor cannot be read.
pub fn load_gpu(model: &Model, pool: &PageAllocator, max_tokens: usize) -> Result<Gpu> {
    with_progress(model, |layers| Gpu::new(&model.config, model.ends()?, layers, pool, max_tokens))
}

/// Shows how many of a model's bytes were read, while `load` takes its layers.
fn with_progress<E>(
    model: &Model,
    load: impl FnOnce(&mut dyn Iterator<Item = Result<Layer>>) -> Result<E>,
) -> Result<E> {
    let style = ProgressStyle::with_template("loading {wide_bar} {bytes}/{total_bytes}")?;
    let bar = ProgressBar::new(model.bytes()).with_style(style);
    let engine = load(&mut model.layers().inspect(|_| bar.set_position(model.bytes_read())));
    bar.finish_and_clear();
    engine
}
