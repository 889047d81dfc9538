//! Where a model runs: the GPU or the CPU.

use std::{
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use clap::ValueEnum;
use flashinfer_rs::kv::PageAllocator;
use indicatif::{ProgressBar, ProgressStyle};

use super::{
    Backend, StepCapacity,
    cpu::Cpu,
    gpu::{Gpu, GpuOptions},
    precision::Precision,
    simulated::{Costs, Language, Simulated},
};
use crate::{
    Result,
    model::{Layer, Model},
};

/// What steps of a simulated model take.
const SIMULATED: Costs =
    Costs { step: Duration::from_millis(2), token: Duration::from_micros(10), host: Duration::ZERO };

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
    /// No model: numbers that look random, in about the time that a GPU takes
    #[value(hide = true)]
    Simulated,
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

/// Loads a model, for steps of up to `capacity`, on a GPU with these options. On the CPU it is
/// always deterministic. Graphs are captured before they are needed as far as that is done in
/// `graphs_within`.
///
/// # Errors
/// The GPU is asked for, or a [`Precision`] that only it has, and cannot be used; or a tensor
/// cannot be read.
pub fn load(
    device: Device,
    model: &Model,
    pool: &PageAllocator,
    capacity: StepCapacity,
    options: GpuOptions,
    graphs_within: Option<Duration>,
) -> Result<Loaded> {
    let reduced = [options.weights, options.kv] != [Precision::Auto; 2];
    let reason = match device {
        Device::Cpu if reduced => {
            return Err("weights or a KV cache of e4m3 need a GPU; expected `auto` on the CPU".into());
        }
        Device::Cpu => "as asked".to_owned(),
        Device::Simulated => return Ok(simulated(model, pool, capacity)),
        Device::Auto | Device::Gpu => match load_gpu(model, pool, options) {
            Ok(mut gpu) => {
                if let Some(limit) = graphs_within {
                    capture_graphs(&mut gpu, pool, capacity.requests, limit)?;
                }
                let place = format!("on the GPU, {}", gpu.name()?);
                return Ok(Loaded { backend: Box::new(gpu), on_gpu: true, place });
            }
            Err(error) if device == Device::Gpu || reduced => {
                return Err(format!("no GPU can be used: {error}").into());
            }
            Err(error) => error.to_string().lines().next().unwrap_or_default().to_owned(),
        },
    };
    let cpu = with_progress(model, |layers| Cpu::new(&model.config, model.ends()?, layers, pool))?;
    Ok(Loaded { backend: Box::new(cpu), on_gpu: false, place: format!("on the CPU ({reason})") })
}

/// Captures graphs, and says how many.
fn capture_graphs(gpu: &mut Gpu, pool: &PageAllocator, requests: usize, limit: Duration) -> Result<()> {
    let start = Instant::now();
    let captured = gpu.capture_graphs(pool, requests, limit)?;
    let seconds = start.elapsed().as_secs_f64();
    tracing::info!(requests = captured, of = requests, seconds, "graphs are captured");
    Ok(())
}

/// A stand-in for a model, with its vocabulary.
fn simulated(model: &Model, pool: &PageAllocator, capacity: StepCapacity) -> Loaded {
    let language = Language { vocab_size: model.config.vocab_size, nan: 0 };
    let backend = Simulated::new(pool, capacity, language).with_costs(SIMULATED).in_real_time();
    Loaded { backend: Box::new(backend), on_gpu: false, place: "simulated: no model is computed".into() }
}

/// Loads a model onto the GPU.
///
/// # Errors
/// There is none that can be used, or a tensor cannot be read.
pub fn load_gpu(model: &Model, pool: &PageAllocator, options: GpuOptions) -> Result<Gpu> {
    with_progress(model, |layers| Gpu::new(&model.config, model.ends()?, layers, pool, options))
}

/// Shows how many of a model's bytes were read, while `load` takes its layers. The next one is read
/// meanwhile.
fn with_progress<E>(
    model: &Model,
    load: impl FnOnce(&mut dyn Iterator<Item = Result<Layer>>) -> Result<E>,
) -> Result<E> {
    let style = ProgressStyle::with_template("loading {wide_bar} {bytes}/{total_bytes}")?;
    let bar = ProgressBar::new(model.bytes()).with_style(style);
    // Some were read already, where a GPU could not be used.
    let before = model.bytes_read();
    let engine = thread::scope(|scope| {
        let (sender, layers) = mpsc::sync_channel(0);
        scope.spawn(move || {
            for layer in model.layers() {
                if sender.send(layer).is_err() {
                    break;
                }
            }
        });
        load(&mut layers.into_iter().inspect(|_| bar.set_position(model.bytes_read() - before)))
    });
    bar.finish_and_clear();
    engine
}
