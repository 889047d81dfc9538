//! Where a model runs: the GPU or the CPU.

use std::{
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use clap::ValueEnum;
use flashinfer_rs::kv::PageAllocator;
use indicatif::{ProgressBar, ProgressStyle};

use super::{
    Backend, StepCapacity,
    cpu::Cpu,
    gpu::{self, Gpu, GpuOptions},
    parallel::Leader,
    precision::Precision,
    simulated::{Costs, Language, Simulated},
};
use crate::{
    Result,
    group::{Group, Parallel},
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
/// `graphs_within`. Of a group, this loads the part that the model was divided into; rank 0's tells
/// the others of its steps, of which those that capture graphs are the first.
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
    group: Option<&Arc<Group>>,
) -> Result<Loaded> {
    let reduced = [options.weights, options.kv] != [Precision::Auto; 2];
    let reason = match device {
        Device::Cpu if reduced => {
            return Err("weights or a KV cache of e4m3 need a GPU; expected `auto` on the CPU".into());
        }
        Device::Cpu => "as asked".to_owned(),
        Device::Simulated if group.is_some() => {
            return Err("no ranks simulate a model; expected --device auto, cpu or gpu".into());
        }
        Device::Simulated => return Ok(simulated(model, pool, capacity)),
        Device::Auto | Device::Gpu => match load_gpu(model, pool, options, group) {
            Ok(gpu) => {
                let place = format!("on the GPU, {}", gpu.name()?);
                let mut backend = led(gpu, group)?;
                let follows = group.is_some_and(|group| group.rank().rank > 0);
                if let Some(limit) = graphs_within.filter(|_| !follows) {
                    let positions = model.config.context_length;
                    let captured = capture_graphs(&mut *backend, pool, positions, capacity, limit);
                    captured.inspect_err(|error| say_failed(group, error))?;
                }
                return Ok(Loaded { backend, on_gpu: true, place });
            }
            Err(error) if device == Device::Gpu || reduced || group.is_some() => {
                return Err(format!("no GPU can be used: {error}").into());
            }
            Err(error) => error.to_string().lines().next().unwrap_or_default().to_owned(),
        },
    };
    let sums = group.and_then(|group| group.take_sums());
    let config = model.shard_config();
    let cpu = with_progress(model, |layers| Cpu::of_rank(&config, model.ends()?, layers, pool, sums))?;
    Ok(Loaded { backend: led(cpu, group)?, on_gpu: false, place: format!("on the CPU ({reason})") })
}

/// Where ranks compute, which all decide for themselves before they meet: [`Device::Auto`] is the
/// GPU if there is one, else the CPU.
///
/// # Errors
/// There is no GPU for this rank, or for those that it starts.
pub fn of_ranks(device: Device, parallel: &Parallel) -> Result<Device> {
    let last = match parallel {
        Parallel::Launch(size) => size - 1,
        Parallel::Rank(placement) => placement.local_rank,
    };
    match device {
        Device::Auto if !gpu::is_there(0) => Ok(Device::Cpu),
        Device::Auto | Device::Gpu if gpu::is_there(last) => Ok(Device::Gpu),
        Device::Auto | Device::Gpu => Err(format!(
            "there is no GPU {last} on this machine; expected one for each rank on it, or --device cpu"
        )
        .into()),
        asked => Ok(asked),
    }
}

/// Tells the other ranks, if there are any, that this one cannot go on.
pub fn say_failed(group: Option<&Arc<Group>>, error: &crate::Error) {
    if let Some(group) = group {
        group.say_failed(&error.to_string());
    }
}

/// The backend of a rank, if it is one; rank 0's leads the others.
fn led<B: Backend + 'static>(backend: B, group: Option<&Arc<Group>>) -> Result<Box<dyn Backend>> {
    match group {
        Some(group) if group.rank().rank == 0 => Ok(Box::new(Leader::new(backend, group.clone())?)),
        _ => Ok(Box::new(backend)),
    }
}

/// Captures graphs, and says how many.
fn capture_graphs(
    backend: &mut dyn Backend,
    pool: &PageAllocator,
    positions: usize,
    capacity: StepCapacity,
    limit: Duration,
) -> Result<()> {
    // Steps that check drafts use the graphs of as many requests as they have rows.
    let requests = capacity.requests.max(capacity.outputs.min(gpu::MOST_ROWS));
    let start = Instant::now();
    let captured = gpu::capture_graphs(backend, pool, positions, requests.min(capacity.tokens), limit)?;
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

/// Loads a model, or a rank's part of it, onto the GPU.
///
/// # Errors
/// There is none that can be used, or a tensor cannot be read.
pub fn load_gpu(
    model: &Model,
    pool: &PageAllocator,
    options: GpuOptions,
    group: Option<&Arc<Group>>,
) -> Result<Gpu> {
    let config = model.even_config();
    let group = group.map(|group| &**group);
    with_progress(model, |layers| Gpu::of_rank(&config, model.ends()?, layers, pool, options, group))
}

/// Shows how many of a model's bytes were read, while `load` takes its layers. The next one is read
/// meanwhile.
fn with_progress<E>(
    model: &Model,
    load: impl FnOnce(&mut dyn Iterator<Item = Result<Layer>>) -> Result<E>,
) -> Result<E> {
    let style = ProgressStyle::with_template("loading {wide_bar} {bytes}/{total_bytes}")?;
    // Of several ranks the first shows its own.
    let bar = if model.is_first_rank() { ProgressBar::new(model.bytes()) } else { ProgressBar::hidden() };
    let bar = bar.with_style(style);
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
