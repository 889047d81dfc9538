//! How fast the GPU decodes: the time of a step, and what of it is the graph's.

use std::{ffi::CStr, num::NonZeroUsize, sync::Arc, time::Instant};

use cudarc::driver::{CudaStream, result};
use flashinfer_rs::kv::{Batch, PageAllocator, Sequence};

use crate::{
    PAGE_SIZE, Result,
    engine::{Engine, Step},
    gpu::Gpu,
    graph, load_gpu,
    model::Model,
};

/// Tokens of each request before the first step.
const CONTEXT: usize = 128;
const WARM_UP: usize = 10;
const STEPS: usize = 100;
/// Bytes that an H200 reads from its memory in a second.
const BANDWIDTH: f64 = 4.8e12;

/// Prints a table with a row for each number of requests.
pub fn run(model: &Model, batches: &[NonZeroUsize]) -> Result<()> {
    let most = batches.iter().max().map_or(1, |batch| batch.get());
    let pages = (CONTEXT + 2 * (WARM_UP + STEPS)).div_ceil(PAGE_SIZE);
    // One more for requests that fill up a graph.
    let pool = PageAllocator::new(most * pages + 1, PAGE_SIZE)?;
    let mut gpu = load_gpu(model, &pool, most)?;
    let floor = gpu.weight_bytes() as f64 / BANDWIDTH * 1e3;
    println!("{}; {CONTEXT} tokens of context; medians of {STEPS} steps", gpu.name()?);
    println!("reading {} MB of weights takes {floor:.3} ms at 4.8 TB/s", gpu.weight_bytes() / 1_000_000);
    println!("the floor is that, and a graph of as many kernels that do nothing");
    println!("| batch | step ms | graph ms | step / graph | floor ms | tokens/s | kernels | per layer |");
    println!("|---|---|---|---|---|---|---|---|");
    for batch in batches {
        row(model, &mut gpu, &pool, batch.get(), floor)?;
    }
    Ok(())
}

fn row(model: &Model, gpu: &mut Gpu, pool: &PageAllocator, requests: usize, reading: f64) -> Result<()> {
    let mut batch = Batch::new(pool);
    for _ in 0..requests {
        batch.push(Sequence::new(pool))?;
    }
    // Nobody looks at what is said, so the context is not computed.
    batch.append(vec![CONTEXT; requests])?;
    let mut tokens = vec![0; requests];
    let outputs: Vec<_> = (0..requests).collect();
    let mut step = |gpu: &mut Gpu| -> Result<f64> {
        let start = Instant::now();
        batch.append(vec![1; requests])?;
        gpu.step(&Step { batch: &batch, tokens: &tokens, outputs: &outputs })?;
        tokens = gpu.greedy()?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    };
    for _ in 0..WARM_UP {
        step(gpu)?;
    }
    let steps = (0..STEPS).map(|_| step(gpu)).collect::<Result<_>>()?;
    let (mut graphs, mut kernels) = (Vec::new(), 0);
    for _ in 0..WARM_UP + STEPS {
        step(gpu)?;
        let (time, nodes) = gpu.replay()?;
        graphs.push(f64::from(time));
        kernels = nodes;
    }
    let (step, graph) = (median(steps), median(graphs));
    println!(
        "| {requests} | {step:.3} | {graph:.3} | {:.2} | {:.3} | {:.0} | {kernels} | {:.1} |",
        step / graph,
        reading + idle(gpu.cuda(), kernels)?,
        requests as f64 / step * 1e3,
        kernels as f64 / model.config.num_layers as f64,
    );
    Ok(())
}

/// The milliseconds that a graph of so many kernels takes if they do nothing.
fn idle(cuda: &Arc<CudaStream>, kernels: usize) -> Result<f64> {
    const PTX: &CStr = c".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry empty() { ret; }\n";
    // SAFETY: the image is PTX of a kernel without parameters, and ends in a NUL.
    let (module, function) = unsafe {
        let module = result::module::load_data(PTX.as_ptr().cast())?;
        (module, result::module::get_function(module, c"empty".into())?)
    };
    let graph = graph::capture(cuda, || {
        for _ in 0..kernels {
            // SAFETY: the kernel takes no parameters and touches nothing.
            unsafe { result::launch_kernel(function, (1, 1, 1), (32, 1, 1), 0, cuda.cu_stream(), &mut [])? };
        }
        Ok(())
    })?;
    let times = (0..WARM_UP + STEPS).map(|_| Ok(f64::from(graph::milliseconds(cuda, &graph)?)));
    let time = median(times.collect::<Result<_>>()?);
    drop(graph);
    // SAFETY: every launch was waited for, and the graph is gone.
    unsafe { result::module::unload(module)? };
    Ok(time)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
