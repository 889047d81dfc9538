//! The time of a decode step on a GPU, and what of it is the graph's.

use std::{ffi::CStr, num::NonZeroUsize, sync::Arc, time::Instant};

use cudarc::driver::{CudaStream, result};
use flashinfer_rs::{
    Stream,
    kv::{Batch, PageAllocator, Sequence},
};

use super::{super::out::say, kernels, source::Source, table};
use crate::{
    Result,
    backend::{
        Backend, Output, Step, StepToken,
        device::say_failed,
        gpu::{Gpu, GpuOptions},
        graph,
    },
    group::{Group, Parallel, Settings, end_process},
    model::{Config, shard::Rank},
    request::Finish,
    sampling::{Sampler, SamplingParams},
};

/// Tokens of a page of the KV cache.
pub const PAGE_SIZE: usize = 16;
const WARM_UP: usize = 10;
const STEPS: usize = 100;
/// Bytes that an H200 reads from its memory in a second.
const BANDWIDTH: f64 = 4.8e12;

const COLUMNS: [&str; 17] = [
    "batch",
    "step ms",
    "gap µs",
    "drawn gap µs",
    "waiting ms",
    "host ms",
    "graph ms",
    "step / graph",
    "floor ms",
    "tokens/s",
    "kernels",
    "per layer",
    "attention ms",
    "of graph",
    "all-reduce ms",
    "eager ms",
    "eager host ms",
];

/// What is measured of a model.
pub struct Steps<'a> {
    /// How many requests it answers at a time: a row of the table for each.
    pub requests: &'a [NonZeroUsize],
    /// Tokens of each request before the first step.
    pub context: usize,
    /// Whether it is said what the kernels of a step cost.
    pub kernels: bool,
}

impl Steps<'_> {
    /// Prints a table. The most tokens of a step are those that are measured, whatever the options
    /// say. All ranks take the same steps, each by itself, and each prints its table, of which rank 0's
    /// is seen.
    ///
    /// # Errors
    /// There is no GPU that can be used, or the model does not fit it.
    pub fn run(&self, source: Source, parallel: Option<&Parallel>, options: GpuOptions) -> Result<()> {
        let rank = parallel.map_or(Rank::ALONE, Parallel::rank);
        if self.kernels && rank.size > 1 {
            // Ranks would wait for sums that another one leaves out.
            return Err(
                "what kernels cost is measured on one GPU; leave --kernels or --tensor-parallel out".into()
            );
        }
        let Some(parallel) = parallel else { return self.measure(source, rank, None, options) };
        let settings = self.settings(&source, options)?;
        let (group, _launched) = parallel.meet(settings, end_process)?;
        let measured = self.measure(source, rank, Some(&group), options);
        measured.inspect_err(|error| say_failed(Some(&group), error)).and_then(|()| group.end())
    }

    /// What all ranks measure.
    fn settings(&self, source: &Source, options: GpuOptions) -> Result<Settings> {
        Ok(Settings::from([
            ("the model".into(), source.digest()?),
            ("--steps".into(), format!("{:?}", self.requests)),
            ("--context".into(), self.context.to_string()),
            (
                "--weights, --kv, --deterministic".into(),
                format!("{:?}", GpuOptions { ordinal: 0, ..options }),
            ),
        ]))
    }

    fn measure(
        &self,
        source: Source,
        rank: Rank,
        group: Option<&Arc<Group>>,
        options: GpuOptions,
    ) -> Result<()> {
        let (batches, context, part) = (self.requests, self.context, source.divide(rank)?);
        let config = part.config.clone();
        let most = batches.iter().max().map_or(1, |batch| batch.get());
        let pages = (context + WARM_UP + STEPS).div_ceil(PAGE_SIZE);
        // One more for requests that fill up a graph.
        let pool = PageAllocator::new(most * pages + 1, PAGE_SIZE)?;
        let mut gpu = part.load(&pool, GpuOptions { max_tokens: most, ..options }, group)?;
        let floor = gpu.weight_bytes() as f64 / BANDWIDTH * 1e3;
        let ranks = if rank.size > 1 { format!("one of {} times ", rank.size) } else { String::new() };
        say!("{ranks}{}; {context} tokens of context; medians of {STEPS} steps", gpu.name()?);
        say!("reading {} MB of weights takes {floor:.3} ms at 4.8 TB/s", gpu.weight_bytes() / 1_000_000);
        say!("the floor is that, and a graph of as many kernels that do nothing");
        say!("step: each is enqueued while the one before is computed, as in the engine; waiting: when that");
        say!(
            "was collected; gap: how long the GPU idles between two graphs, with greedy steps and with ones that"
        );
        say!("are drawn under penalties, whose last tokens the GPU alone knows");
        say!("host: what of a step the host takes to enqueue it; eager: without graphs");
        table::head(&COLUMNS)?;
        for batch in batches {
            row(&config, &mut gpu, &pool, (batch.get(), context), floor)?;
        }
        if !self.kernels {
            return Ok(());
        }
        batches.iter().try_for_each(|batch| kernels::table(&mut gpu, &pool, batch.get(), context))
    }
}

fn row(
    config: &Config,
    gpu: &mut Gpu,
    pool: &PageAllocator,
    (requests, context): (usize, usize),
    reading: f64,
) -> Result<()> {
    let mut batch = Batch::new(pool);
    for _ in 0..requests {
        batch.push(Sequence::new(pool))?;
    }
    // Nobody looks at what is said, so the context is not computed. All that is
    // compared starts from the same.
    batch.append(vec![context; requests])?;
    let start_again =
        |batch: &mut Batch| (0..requests).try_for_each(|request| batch.truncate(request, context));
    let mut tokens = vec![0; requests];
    let outputs: Vec<_> = (0..requests).map(Output::greedy).collect();
    // The milliseconds of a step, and those until it was enqueued.
    let mut step = |gpu: &mut Gpu, batch: &mut Batch| -> Result<[f64; 2]> {
        let start = Instant::now();
        batch.append(vec![1; requests])?;
        let appended = start.elapsed();
        let samples =
            gpu.step(&Step { batch, tokens: &StepToken::known(&tokens), outputs: &outputs })?.into_iter();
        let next: Option<_> = samples.map(|sample| sample.token).collect();
        tokens = next.ok_or(Finish::NoNumbers.to_string())?;
        Ok([start.elapsed(), appended + gpu.enqueued()].map(|time| time.as_secs_f64() * 1e3))
    };
    let mut steps = |gpu: &mut Gpu, batch: &mut Batch| -> Result<[f64; 2]> {
        start_again(batch)?;
        for _ in 0..WARM_UP {
            step(gpu, batch)?;
        }
        let times = (0..STEPS).map(|_| step(gpu, batch)).collect::<Result<Vec<_>>>()?;
        Ok([0, 1].map(|which| median(times.iter().map(|times| times[which]).collect())))
    };
    let [waiting, host] = steps(gpu, &mut batch)?;
    start_again(&mut batch)?;
    let Loop { time, gap } = endless(gpu, &mut batch, SamplingParams::default())?;
    start_again(&mut batch)?;
    let drawn = endless(gpu, &mut batch, penalized())?;
    // Products were tuned for the graph.
    gpu.set_graphs(false);
    let [eager, eager_host] = steps(gpu, &mut batch)?;
    gpu.set_graphs(true);
    let (mut graphs, mut attention, mut sums, mut kernels) = (Vec::new(), Vec::new(), Vec::new(), 0);
    start_again(&mut batch)?;
    for index in 0..WARM_UP + STEPS {
        step(gpu, &mut batch)?;
        if index < WARM_UP {
            continue;
        }
        let (replay, nodes) = gpu.replay()?;
        graphs.push(f64::from(replay));
        attention.push(f64::from(gpu.attention()?));
        sums.extend(gpu.sums(requests)?.map(f64::from));
        kernels = nodes;
    }
    let (graph, attention) = (median(graphs), median(attention));
    let sums = if sums.is_empty() { "".into() } else { format!("{:.3}", median(sums)) };
    say!(
        "| {requests} | {time:.3} | {gap:.1} | {:.1} | {waiting:.3} | {host:.3} | {graph:.3} | {:.2} | {:.3} | {:.0} | {kernels} | {:.1} \
         | {attention:.3} | {:.0} % | {sums} | {eager:.3} | {eager_host:.3} |",
        drawn.gap,
        time / graph,
        reading + idle(gpu.cuda(), kernels)?,
        requests as f64 / time * 1e3,
        kernels as f64 / config.num_layers() as f64,
        attention / graph * 1e2,
    );
    Ok(())
}

/// Steps of which each is enqueued while the one before is computed.
struct Loop {
    /// The milliseconds of a step.
    time: f64,
    /// The microseconds from one graph to the next.
    gap: f64,
}

/// Tokens that are drawn, under all penalties.
fn penalized() -> SamplingParams {
    SamplingParams {
        temperature: 1.0,
        top_p: 0.9,
        repetition_penalty: 1.1,
        presence_penalty: 0.2,
        frequency_penalty: 0.1,
        ..SamplingParams::default()
    }
}

/// Takes such steps, whose tokens are chosen with these parameters.
fn endless(gpu: &mut Gpu, batch: &mut Batch, params: SamplingParams) -> Result<Loop> {
    let params = Arc::new(params);
    let sampler = |request| Sampler::new(&params, request as u64, 0, &[], [].into_iter());
    let mut samplers: Vec<_> = (0..batch.len()).map(sampler).collect();
    let ones = vec![1; batch.len()];
    batch.append(ones.iter().copied())?;
    let first = vec![StepToken::Known(0); batch.len()];
    let outputs: Vec<_> = samplers.iter().enumerate().map(|(row, it)| it.output(row, None)).collect();
    gpu.enqueue(&Step { batch, tokens: &first, outputs: &outputs })?;
    let chosen: Vec<_> = (0..batch.len()).map(StepToken::Chosen).collect();
    let mut times = Vec::new();
    for index in 1..WARM_UP + STEPS {
        if index == WARM_UP {
            gpu.time_graphs();
        }
        let start = Instant::now();
        batch.append(ones.iter().copied())?;
        let outputs: Vec<_> = samplers.iter().enumerate().map(|(row, it)| it.output_ahead(row)).collect();
        gpu.enqueue(&Step { batch, tokens: &chosen, outputs: &outputs })?;
        for (sampler, sample) in samplers.iter_mut().zip(gpu.collect()?) {
            sampler.push(sample.token.ok_or(Finish::NoNumbers.to_string())?);
        }
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    gpu.collect()?;
    Ok(Loop { time: median(times.split_off(WARM_UP)), gap: median(gpu.gaps()?) })
}

/// The milliseconds that a graph of so many kernels takes if they do nothing.
fn idle(cuda: &Arc<CudaStream>, kernels: usize) -> Result<f64> {
    const PTX: &CStr = c".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry empty() { ret; }\n";
    // SAFETY: the image is PTX of a kernel without parameters, and ends in a NUL.
    let (module, function) = unsafe {
        let module = result::module::load_data(PTX.as_ptr().cast())?;
        (module, result::module::get_function(module, c"empty".into())?)
    };
    let launches = || {
        for _ in 0..kernels {
            // SAFETY: the kernel takes no parameters and touches nothing.
            unsafe { result::launch_kernel(function, (1, 1, 1), (32, 1, 1), 0, cuda.cu_stream(), &mut [])? };
        }
        Ok(())
    };
    // SAFETY: the kernel touches nothing, and the module goes after the graph.
    let step = unsafe { graph::capture(&Stream::from(cuda), launches)? };
    let launch = || Ok(step.launch(&())?);
    let times = (0..WARM_UP + STEPS).map(|_| Ok(f64::from(graph::milliseconds(cuda, launch)?)));
    let time = median(times.collect::<Result<_>>()?);
    drop(step);
    // SAFETY: every launch was waited for, and the graph is gone.
    unsafe { result::module::unload(module)? };
    Ok(time)
}

pub fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
