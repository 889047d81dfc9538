//! What it costs to launch FlashInfer's kernels: bare launches, this crate, and
//! FlashInfer's Python API where it is installed, in turn in one run.
//!
//!     cargo bench --bench kernels -- [--quick] [--json PATH] [NAME]…
//!
//! needs an NVIDIA GPU. NAMEs are parts of the names of cases; without one, all
//! are measured. `--no-python` leaves Python out, `--seconds N` stops after
//! so long. `python3` is taken from the path, with its environment.
//!
//! For each case:
//!
//! - the host's time to enqueue it, as the median over blocks of calls that are
//!   too few to fill the launch queue, of four kinds in turn: as many bare
//!   `cudaLaunchKernel`s of an empty kernel as it has kernels; the module's
//!   function with arguments that are packed already; this crate; Python. The
//!   first to the second is the module's own work, the second to the third
//!   this crate's;
//! - the host's time to plan it, likewise;
//! - the GPU's time, by replays of a CUDA graph that holds it several times, in
//!   turn with a graph that Python captured of the same run on equal numbers;
//! - how many heap allocations a run makes;
//! - its share of the memory's bandwidth: of what clock and bus width allow, and
//!   of what a copy on the device reaches in this run.
//!
//! Absolute times do not carry over to another machine; the ratios are what to
//! quote. `benches/report.py` makes tables and plots of the JSON.

mod attention;
mod cases;
mod cuda;
#[path = "../gpu/mod.rs"]
mod gpu;
mod measure;
mod operand;
mod python;
mod raw;
#[path = "../gpu/replay.rs"]
mod replay;

use std::{
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};

use clap::Parser;
use flashinfer_rs::ModuleName;
use measure::{Bench, PlanTimes, Row};
use serde_json::{Value, json};
use test_support::counting::Counting;

type Error = Box<dyn std::error::Error>;
type Result<T> = std::result::Result<T, Error>;

const QO_HEADS: usize = 32;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const PAGE_SIZE: usize = 16;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Times of FlashInfer's kernels, called bare, through this crate, and from Python.
#[derive(Parser)]
pub struct Options {
    /// Parts of the names of the cases to measure; all without one.
    names: Vec<String>,
    /// Fewer cases and shorter ones.
    #[arg(long)]
    quick: bool,
    /// Writes everything that was measured to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Measures without Python.
    #[arg(long)]
    no_python: bool,
    /// Begins no case after so many seconds.
    #[arg(long, default_value_t = 200.0)]
    seconds: f64,
    /// What Cargo may say to a benchmark.
    #[arg(long, hide = true)]
    bench: bool,
    #[arg(long, hide = true)]
    test: bool,
    #[arg(long, hide = true)]
    list: bool,
}

/// The name of the CPU, where Linux says it.
fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or("unknown".into(), |(_, name)| name.trim().into())
}

/// The version of NVIDIA's kernel module.
fn driver() -> String {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let version = |word: &&str| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.');
    text.split_whitespace().find(version).unwrap_or("unknown").into()
}

fn environment(bench: &Bench) -> Result<Value> {
    let [driver_cuda, cuda_runtime] = cuda::versions()?;
    let (versions, no_python) = match &bench.python {
        Ok(python) => (python.versions.clone(), Value::Null),
        Err(reason) => (Value::Null, reason.clone().into()),
    };
    let modules = bench.runtime.module(&ModuleName::NORM)?.version();
    let modules = modules.map_or("unknown".into(), |version| version.to_string());
    Ok(json!({
        "machine": {
            "gpu": bench.cuda.context().name()?, "driver": driver(), "driver_cuda": driver_cuda,
            "cuda_runtime": cuda_runtime, "cpu": cpu(),
        },
        "versions": {
            "crate": env!("CARGO_PKG_VERSION"), "modules": format!("FlashInfer {modules}"),
            "tvm_ffi": bench.runtime.tvm_ffi_version(), "python": versions,
        },
        "no_python": no_python,
        "seconds_since_1970": SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
        "command": std::env::args().skip(1).filter(|argument| argument != "--bench").collect::<Vec<_>>(),
        "memory": bench.memory,
        "shape": {
            "qo_heads": QO_HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "page_size": PAGE_SIZE,
        },
    }))
}

fn cell(value: Option<f64>, decimals: usize) -> String {
    value.map_or("–".into(), |value| format!("{value:.decimals$}"))
}

fn ratio(above: Option<f64>, below: Option<f64>) -> Option<f64> {
    above.zip(below).map(|(above, below)| above / below)
}

fn print(bench: &Bench) {
    println!(
        "\nHost µs to enqueue and to plan, GPU µs in a graph. n: kernels, bare: as many launches, raw: the\n\
         module's function alone, bw: share of the memory's bandwidth, al: heap allocations of a run, R/: Rust over"
    );
    println!(
        "{:<32}{:>2}{:>6}{:>6}{:>6}{:>7}{:>7}{:>6}{:>9}{:>6}{:>5}{:>3}{:>9}{:>7}{:>6}",
        "case",
        "n",
        "bare",
        "raw",
        "Rust",
        "Python",
        "R/bare",
        "R/Py",
        "GPU",
        "R/Py",
        "bw%",
        "al",
        "plan raw",
        "Rust",
        "R/Py"
    );
    let peak = bench.memory.peak_bytes_per_second;
    for Row { name, launches, allocations, bytes, run, plan, gpu, .. } in &bench.rows {
        let moved = bytes.zip(gpu.rust_us).map(|(bytes, us)| bytes as f64 / (us * 1e-6));
        let plan = |of: fn(&PlanTimes) -> Option<f64>| plan.as_ref().and_then(of);
        println!(
            "{:<32}{:>2}{:>6}{:>6}{:>6}{:>7}{:>7}{:>6}{:>9}{:>6}{:>5}{:>3}{:>9}{:>7}{:>6}",
            name,
            launches,
            cell(run.bare_us, 2),
            cell(run.raw_us, 2),
            cell(run.rust_us, 2),
            cell(run.python_us, 2),
            cell(ratio(run.rust_us, run.bare_us), 2),
            cell(ratio(run.rust_us, run.python_us), 2),
            cell(gpu.rust_us, 2),
            cell(ratio(gpu.rust_us, gpu.python_us), 3),
            cell(ratio(moved, peak).map(|share| share * 100.0), 0),
            cell(*allocations, 0),
            cell(plan(|plan| plan.raw_us), 1),
            cell(plan(|plan| plan.rust_us), 1),
            cell(plan(|plan| ratio(plan.rust_us, plan.python_us)), 2),
        );
    }
    let notes =
        bench.rows.iter().flat_map(|row| row.notes.iter().map(|note| [row.name.clone(), note.clone()]));
    for [name, reason] in notes.chain(bench.left_out.iter().cloned()).take(8) {
        println!("{name}: {}", reason.chars().take(160).collect::<String>());
    }
    if let Err(reason) = &bench.python {
        println!("Without Python: {reason}");
    }
    println!(
        "memory: {} GB/s, a copy: {:.0} GB/s; {:.0} s",
        cell(peak.map(|peak| peak / 1e9), 0),
        bench.memory.copy_bytes_per_second / 1e9,
        bench.seconds()
    );
}

fn main() -> Result<()> {
    let options = Options::parse();
    let Some(cuda) = gpu::start()? else { return Ok(()) };
    let mut bench = Bench::new(cuda, options)?;
    cases::all(&mut bench);
    attention::all(&mut bench)?;
    if let Some(path) = &bench.options.json {
        let mut result = environment(&bench)?;
        result["cases"] = serde_json::to_value(&bench.rows)?;
        result["left_out"] = serde_json::to_value(&bench.left_out)?;
        std::fs::write(path, serde_json::to_string_pretty(&result)?)?;
        println!("written: {}", path.display());
    }
    print(&bench);
    Ok(())
}
