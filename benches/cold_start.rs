//! How long a program takes from its start to the first result of decode: with
//! modules in the cache, with an empty cache, and through FlashInfer's Python
//! API where it is installed.
//!
//! `cargo bench --bench cold_start` needs an NVIDIA GPU. Each figure is the
//! median over processes that are started one after the other, of all kinds in
//! turn. The CUDA context is what any program pays; the rest is this crate's
//! (or Python's): opening libraries, loading modules and kernels, allocating,
//! planning, running, and copying the result back.

mod gpu;

use std::{
    env, fs,
    process::Command,
    time::{Duration, SystemTime},
};

use cudarc::driver::CudaContext;
use flashinfer_rs::{
    DType, FlashInferRuntime, PageIndices, PageTable, RuntimeConfig, Stream,
    attention::{AttentionSpec, Backend, BatchDecode, Heads, PlanOptions, Workspace},
    gpu::{TensorExt, TensorExtMut},
    kv::{KvLayout, PagedKv},
};
use half::bf16;

use gpu::Result;

/// Set for the processes that are measured: when they were started.
const STARTED: &str = "STARTED";
const PROCESSES: usize = 10;
const HEADS: Heads = Heads::new(32, 8);
const HEAD_DIM: usize = 128;
const PAGE_SIZE: usize = 16;
const PAGES: usize = 64;

fn now() -> Result<Duration> {
    Ok(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?)
}

/// The process that is measured. Prints seconds: until `main`, the CUDA
/// context, the runtime, the first result, all; then bytes: read, and the most
/// memory held.
fn measured(started: Duration) -> Result<()> {
    let main = now()?;
    let cuda = CudaContext::new(0)?.new_stream()?;
    let context = now()?;
    FlashInferRuntime::initialize(RuntimeConfig::default())?;
    let initialized = now()?;

    let stream = Stream::from(&cuda);
    let spec = AttentionSpec::new(DType::BF16, HEAD_DIM).with_backend(Backend::CudaCores);
    let decode = BatchDecode::new(&stream, &spec, HEADS)?;
    let cache = cuda.alloc_zeros::<bf16>(PAGES * PAGE_SIZE * HEADS.num_kv_heads * HEAD_DIM)?;
    let q = cuda.alloc_zeros::<bf16>(HEADS.num_qo_heads * HEAD_DIM)?;
    let mut out = cuda.alloc_zeros::<bf16>(HEADS.num_qo_heads * HEAD_DIM)?;
    let pages: Vec<i32> = (0..PAGES as i32).collect();
    let indices = PageIndices::from_requests(PAGES, PAGE_SIZE, [(&pages[..], PAGES * PAGE_SIZE)])?;
    let table = PageTable::new(&stream, indices)?;
    let mut workspace = Workspace::new(&stream)?;
    let plan = decode.plan(&mut workspace, &table, &PlanOptions::default())?;
    {
        let cache = cache.tensor(&cuda, &[PAGES, PAGE_SIZE, HEADS.num_kv_heads, HEAD_DIM])?;
        let shape = [1, HEADS.num_qo_heads, HEAD_DIM];
        plan.run(
            &q.tensor(&cuda, &shape)?.view(),
            &PagedKv::new(cache.view(), cache.view(), KvLayout::Nhd),
            &mut out.tensor_mut(&cuda, &shape)?.view_mut(),
        )?;
    }
    let result = cuda.clone_dtoh(&out)?;
    let done = now()?;
    if result.iter().any(|value| *value != bf16::ZERO) {
        return Err("attention to values of zero is not zero".into());
    }
    let times = [main - started, context - main, initialized - context, done - initialized, done - started];
    let times: Vec<_> = times.iter().map(|time| time.as_secs_f64().to_string()).collect();
    println!("{} {} {}", times.join(" "), number("/proc/self/io", "rchar:")?, peak()?);
    Ok(())
}

/// The number behind a name in a file of the kernel's.
fn number(file: &str, name: &str) -> Result<u64> {
    let text = fs::read_to_string(file)?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.ok_or_else(|| format!("{file} has no {name}"))?.parse()?)
}

/// The most bytes of memory that this process has held.
fn peak() -> Result<u64> {
    Ok(number("/proc/self/status", "VmHWM:")? * 1024)
}

/// Starts a process, and returns the numbers that it prints last.
fn start(command: &mut Command) -> Result<Vec<f64>> {
    let output = command.env(STARTED, now()?.as_nanos().to_string()).output()?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(stderr.lines().last().unwrap_or("it failed").to_owned().into());
    }
    let last = stdout.lines().last().unwrap_or_default();
    Ok(last.split_whitespace().map(str::parse).collect::<std::result::Result<_, _>>()?)
}

/// The median of each column.
fn medians(rows: &[Vec<f64>]) -> Vec<f64> {
    let columns = rows.first().map_or(0, Vec::len);
    (0..columns).map(|column| gpu::median(rows.iter().map(|row| row[column]).collect())).collect()
}

fn main() -> Result<()> {
    if let Ok(started) = env::var(STARTED) {
        return measured(Duration::from_nanos(started.parse()?));
    }
    if gpu::start()?.is_none() {
        return Ok(());
    }
    let program = env::current_exe()?;
    let folder = env::temp_dir().join(format!("flashinfer-rs-cold-start-{}", std::process::id()));
    let warm = || Command::new(&program);
    let remove = || if folder.exists() { fs::remove_dir_all(&folder) } else { Ok(()) };
    let cold = || -> Result<Command> {
        remove()?;
        let mut command = Command::new(&program);
        command.env("FLASHINFER_RS_CACHE_DIR", &folder);
        Ok(command)
    };
    let python = || {
        let mut command = Command::new("python3");
        command.args(["-c", include_str!("cold_start.py")]).env("FLASHINFER_DISABLE_JIT", "1");
        command
    };
    // The first of each fills caches of files.
    start(&mut warm())?;
    start(&mut cold()?)?;
    let with_python = start(&mut python());
    if let Err(reason) = &with_python {
        println!("FlashInfer's Python API is not measured: {reason}");
    }
    let [mut warms, mut colds, mut pythons] = [const { Vec::new() }; 3];
    for _ in 0..PROCESSES {
        warms.push(start(&mut warm())?);
        colds.push(start(&mut cold()?)?);
        if with_python.is_ok() {
            pythons.push(start(&mut python())?);
        }
    }
    remove()?;

    println!("milliseconds, medians of {PROCESSES} processes each");
    println!(
        "| | until main | CUDA context | runtime | first result | all | all but the context | MB read | peak MB |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for (name, rows) in [("warm cache", warms), ("empty cache", colds)] {
        let row = medians(&rows);
        let times: Vec<_> = row[..5].iter().map(|time| format!("{:.1}", time * 1e3)).collect();
        println!(
            "| {name} | {} | {:.1} | {:.1} | {:.0} |",
            times.join(" | "),
            (row[4] - row[1]) * 1e3,
            row[5] / 1e6,
            row[6] / 1e6
        );
    }
    if !pythons.is_empty() {
        let row = medians(&pythons);
        println!(
            "| Python (import until main) | {:.1} | {:.1} | – | {:.1} | {:.1} | {:.1} | – | – |",
            row[0] * 1e3,
            row[1] * 1e3,
            row[2] * 1e3,
            row[3] * 1e3,
            (row[3] - row[1]) * 1e3
        );
    }
    Ok(())
}
