//! How a case is measured: blocks of calls in turn, and replays of CUDA graphs.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use cudarc::driver::{
    CudaStream,
    result::{mem_get_info, memcpy_dtod_async},
    sys,
};
use flashinfer_rs::{
    DType, FlashInferRuntime, Stream,
    ffi::{Arg, Function, Packed},
};
use serde::Serialize;
use serde_json::{Value, json};
use test_support::counting::allocations;

use crate::{
    Options, Result,
    cuda::{self, BareLaunch},
    gpu::median,
    operand::Operand,
    python::Python,
    replay::Replay,
};

/// Calls of a block: few enough that the launch queue does not fill, and enough
/// that the first one, for which an idle GPU wakes up, does not decide.
const MOST_CALLS: usize = 64;
const FEWEST_CALLS: usize = 16;
/// Blocks of each kind, however long they take.
const FEWEST_BLOCKS: usize = 7;
/// Calls before the clock starts.
const WARM: usize = 3;
/// A block has work for about this long, and so has a graph.
const BLOCK_US: f64 = 10_000.0;
const GRAPH_US: f64 = 2_000.0;
const MOST_COPIES: f64 = 100.0;
/// Bytes of the copy that gives the bandwidth.
const COPY_BYTES: usize = 1 << 30;
/// The share of free memory that a cache may take: Python has one, too.
const MEMORY_SHARE: f64 = 0.4;

/// What a target is set for.
#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    OneLaunch,
    Decode,
    Other,
}

/// Host microseconds of one call of `run`.
#[derive(Default, Serialize)]
pub struct RunTimes {
    /// As many bare launches as a call has kernels.
    pub bare_us: Option<f64>,
    /// The module's function, with arguments that are packed already.
    pub raw_us: Option<f64>,
    pub rust_us: Option<f64>,
    pub python_us: Option<f64>,
    /// Of how many blocks these are medians, and the calls of a block.
    pub blocks: usize,
    pub calls: usize,
}

/// Host microseconds of one `plan`.
#[derive(Default, Serialize)]
pub struct PlanTimes {
    pub raw_us: Option<f64>,
    /// Of another batch than the last.
    pub rust_us: Option<f64>,
    /// Of the same batch again.
    pub again_us: Option<f64>,
    /// With an update of the page table before it.
    pub with_table_us: Option<f64>,
    /// While the GPU still works on the step before.
    pub busy_us: Option<f64>,
    pub python_us: Option<f64>,
}

/// Microseconds of the GPU for one run, in replays of a graph.
#[derive(Default, Serialize)]
pub struct GpuTimes {
    pub rust_us: Option<f64>,
    pub python_us: Option<f64>,
    pub copies: usize,
}

/// What was found out about one case.
#[derive(Serialize)]
pub struct Row {
    pub name: String,
    pub kind: Kind,
    /// What Python was told.
    pub order: Value,
    pub launches: usize,
    /// Heap allocations of one call of `run`.
    pub allocations: Option<f64>,
    /// What the operation has to read and write.
    pub bytes: Option<usize>,
    pub run: RunTimes,
    pub plan: Option<PlanTimes>,
    pub gpu: GpuTimes,
    pub notes: Vec<String>,
}

/// A function of a module, and its arguments.
pub struct Raw<'a> {
    pub function: Function,
    pub held: Vec<Packed<'a>>,
}

impl Raw<'_> {
    fn args(&self) -> Vec<Arg<'_>> {
        self.held.iter().map(Packed::as_arg).collect()
    }

    pub fn call(&self) -> Result<flashinfer_rs::ffi::Value> {
        // SAFETY: the arguments are those that this crate passes, for equal
        // tensors of the stream that was set.
        Ok(unsafe { self.function.call(&self.args()) }?)
    }
}

/// Arguments of a raw call.
#[macro_export]
macro_rules! packed {
    ($($value:expr),* $(,)?) => { vec![$(flashinfer_rs::ffi::Packed::from($value)),*] };
}

pub type Call<'a> = &'a mut dyn FnMut() -> Result<()>;

/// Who makes the calls of a block.
enum Lane<'a> {
    Here(Call<'a>),
    There(&'static str),
}

pub struct Bench {
    pub cuda: Arc<CudaStream>,
    pub stream: Stream,
    pub runtime: &'static FlashInferRuntime,
    pub options: Options,
    pub memory: Memory,
    pub python: std::result::Result<Python, String>,
    pub rows: Vec<Row>,
    /// Cases that were not measured, and why.
    pub left_out: Vec<[String; 2]>,
    bare: BareLaunch,
    started: Instant,
}

impl Bench {
    pub fn new(cuda: Arc<CudaStream>, options: Options) -> Result<Self> {
        /// How long the host and the GPU work before anything is measured.
        const WARM_UP: Duration = Duration::from_secs(1);
        let started = Instant::now();
        let stream = Stream::from(&cuda);
        cuda::set_stream(&stream)?;
        let python = if options.no_python { Err("it was not asked for".to_owned()) } else { Python::start() };
        let bare = BareLaunch::new(&stream)?;
        let warm = Instant::now();
        while warm.elapsed() < WARM_UP {
            bare.launch(MOST_CALLS)?;
            cuda.synchronize()?;
        }
        Ok(Self {
            memory: Memory::of(&cuda)?,
            bare,
            runtime: FlashInferRuntime::get()?,
            stream,
            cuda,
            options,
            python,
            rows: Vec::new(),
            left_out: Vec::new(),
            started,
        })
    }

    /// Whether any of these cases is asked for.
    pub fn wants(&self, name: &str) -> bool {
        self.options.names.is_empty() || self.options.names.iter().any(|part| name.contains(part))
    }

    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Measures a case, unless it is not asked for, or there is no time left.
    /// One that fails does not stop the others.
    pub fn case(
        &mut self,
        name: &str,
        kind: Kind,
        mut order: Value,
        body: impl FnOnce(&mut Case<'_>) -> Result<()>,
    ) {
        if !self.wants(name) {
            return;
        }
        if self.seconds() > self.options.seconds {
            return self.left_out.push([name.into(), "no time was left".into()]);
        }
        order["do"] = "setup".into();
        let row = Row {
            name: name.into(),
            kind,
            order,
            launches: 0,
            allocations: None,
            bytes: None,
            run: RunTimes::default(),
            plan: None,
            gpu: GpuTimes::default(),
            notes: Vec::new(),
        };
        let mut case = Case { bench: self, row, with_python: false };
        case.set_python_up();
        let result = body(&mut case);
        let row = case.row;
        match result {
            Ok(()) => self.rows.push(row),
            Err(error) => self.left_out.push([name.into(), error.to_string()]),
        }
    }

    /// Whether a cache of so many bytes fits, beside that of Python.
    pub fn has_room(&self, bytes: usize) -> Result<bool> {
        Ok(bytes as f64 <= mem_get_info()?.0 as f64 * MEMORY_SHARE)
    }

    fn rounds(&self) -> (usize, Duration) {
        if self.options.quick { (20, Duration::from_millis(300)) } else { (60, Duration::from_millis(900)) }
    }
}

/// What the device's memory can do.
#[derive(Serialize)]
pub struct Memory {
    /// What a copy on the device reads and writes.
    pub copy_bytes_per_second: f64,
    /// What clock and bus width allow, where the driver says them.
    pub peak_bytes_per_second: Option<f64>,
    pub l2_bytes: usize,
}

impl Memory {
    fn of(cuda: &Arc<CudaStream>) -> Result<Self> {
        use sys::CUdevice_attribute as Attribute;
        let number = |attribute| Ok::<_, crate::Error>(cuda.context().attribute(attribute)? as usize);
        let kilohertz = number(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
        let bits = number(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?;
        // Two transfers in each cycle of the clock.
        let peak = 2.0 * kilohertz as f64 * 1e3 * bits as f64 / 8.0;
        Ok(Self {
            copy_bytes_per_second: copy_bandwidth(cuda)?,
            peak_bytes_per_second: (peak > 0.0).then_some(peak),
            l2_bytes: number(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
        })
    }
}

/// Bytes per second that a copy reads and writes.
fn copy_bandwidth(cuda: &Arc<CudaStream>) -> Result<f64> {
    let memory = || Operand::zeros(cuda, DType::U8, &[COPY_BYTES]);
    let (source, target) = (memory()?, memory()?);
    let [from, to] = [&source, &target].map(|tensor| tensor.view().data_ptr() as u64);
    // SAFETY: both have so many bytes, and stay until the last replay is done.
    let copy =
        Replay::capture(cuda, 4, || unsafe { memcpy_dtod_async(to, from, COPY_BYTES, cuda.cu_stream()) })?;
    let times = (0..12).map(|_| copy.time(cuda)).skip(2).collect::<Result<_>>()?;
    Ok(2.0 * COPY_BYTES as f64 / (median(times) * 1e-6))
}

/// How this crate plans.
pub struct PlanCalls<'c> {
    /// Another batch than the last.
    pub plan: Call<'c>,
    /// The same with an update of the page table before it.
    pub with_table: Option<Call<'c>>,
    /// The last batch again.
    pub again: Option<Call<'c>>,
}

/// One case, as it is measured.
pub struct Case<'b> {
    pub bench: &'b mut Bench,
    pub row: Row,
    with_python: bool,
}

impl Case<'_> {
    fn set_python_up(&mut self) {
        let Ok(python) = &mut self.bench.python else { return };
        match python.ask(&self.row.order) {
            Ok(_) => self.with_python = true,
            Err(error) => self.row.notes.push(error),
        }
    }

    /// Asks Python for a number; without one, it is left out of this case.
    fn ask_python(&mut self, order: Value) -> Option<f64> {
        let Ok(python) = &mut self.bench.python else { return None };
        let answer = if self.with_python { python.number(&order, "us") } else { return None };
        answer.map_err(|error| self.drop_python(error)).ok()
    }

    fn drop_python(&mut self, error: String) {
        self.row.notes.push(error);
        self.with_python = false;
    }

    /// The median microseconds per call of each lane, which take turns, and the
    /// number of turns.
    fn times(&mut self, lanes: &mut [Lane<'_>], calls: usize) -> Result<(Vec<Option<f64>>, usize)> {
        let cuda = self.bench.cuda.clone();
        let (most, budget) = self.bench.rounds();
        let mut times = vec![Vec::with_capacity(most); lanes.len()];
        let (start, mut blocks) = (Instant::now(), 0);
        while blocks < most && (blocks < FEWEST_BLOCKS || start.elapsed() <= budget) {
            blocks += 1;
            for (lane, times) in lanes.iter_mut().zip(&mut times) {
                match lane {
                    Lane::Here(call) => {
                        (0..WARM).try_for_each(|_| call())?;
                        cuda.synchronize()?;
                        let start = Instant::now();
                        for _ in 0..calls {
                            call()?;
                        }
                        let elapsed = start.elapsed();
                        cuda.synchronize()?;
                        times.push(elapsed.as_secs_f64() * 1e6 / calls as f64);
                    }
                    Lane::There(what) => {
                        let order = json!({"do": "block", "what": what, "warm": WARM, "calls": calls});
                        times.extend(self.ask_python(order));
                    }
                }
            }
        }
        let medians = times.into_iter().map(|times| (!times.is_empty()).then(|| median(times)));
        Ok((medians.collect(), blocks))
    }

    /// Host times of planning: the module's planner alone, this crate, this
    /// crate with an update of the page table, and Python.
    pub fn plan(&mut self, raw: Option<&Raw<'_>>, calls: PlanCalls<'_>) -> Result<()> {
        const CALLS: usize = 16;
        let mut raw_call = || raw.map_or(Ok(()), |raw| raw.call().map(drop));
        let (mut no_table, mut not_again) = (|| Ok(()), || Ok(()));
        let (has_table, has_again) = (calls.with_table.is_some(), calls.again.is_some());
        let mut lanes = [
            Lane::Here(&mut raw_call),
            Lane::Here(calls.plan),
            Lane::Here(calls.with_table.unwrap_or(&mut no_table)),
            Lane::Here(calls.again.unwrap_or(&mut not_again)),
            Lane::There("plan"),
        ];
        let (times, _) = self.times(&mut lanes, CALLS)?;
        self.row.plan = Some(PlanTimes {
            raw_us: times[0].filter(|_| raw.is_some()),
            rust_us: times[1],
            with_table_us: times[2].filter(|_| has_table),
            again_us: times[3].filter(|_| has_again),
            busy_us: None,
            python_us: times[4],
        });
        Ok(())
    }

    /// Everything about `run`. `bytes` are those that it has to move.
    pub fn run(&mut self, bytes: Option<usize>, raw: Option<&Raw<'_>>, run: Call<'_>) -> Result<()> {
        let cuda = self.bench.cuda.clone();
        let mut estimate = f64::INFINITY;
        for _ in 0..4 {
            cuda.synchronize()?;
            let start = Instant::now();
            run()?;
            cuda.synchronize()?;
            estimate = estimate.min(start.elapsed().as_secs_f64() * 1e6);
        }
        let copies = (GRAPH_US / estimate).clamp(1.0, MOST_COPIES) as usize;
        let replay = Replay::capture(&cuda, copies, &mut *run)?;
        self.row.bytes = bytes;
        self.row.launches = kernels_of(&replay)? / copies;
        self.row.gpu = self.replays(&replay, copies)?;
        drop(replay);

        const COUNTED: usize = 10;
        let before = allocations();
        for _ in 0..COUNTED {
            run()?;
        }
        self.row.allocations = Some((allocations() - before) as f64 / COUNTED as f64);
        cuda.synchronize()?;

        let gpu_us = self.row.gpu.rust_us.unwrap_or(estimate);
        let calls = ((BLOCK_US / gpu_us) as usize).clamp(FEWEST_CALLS, MOST_CALLS);
        let raw = raw.filter(|raw| match raw.call() {
            Ok(_) => true,
            Err(error) => {
                self.row.notes.push(format!("raw call: {error}"));
                false
            }
        });
        let (bare, launches) = (self.bench.bare, self.row.launches);
        let mut bare = || bare.launch(launches);
        let args = raw.map(|raw| (raw.function, raw.args()));
        let mut raw_call = || {
            if let Some((function, args)) = &args {
                // SAFETY: as in `Raw::call`.
                unsafe { function.call(args) }?;
            }
            Ok(())
        };
        let mut lanes =
            [Lane::Here(&mut bare), Lane::Here(&mut raw_call), Lane::Here(run), Lane::There("run")];
        let (times, blocks) = self.times(&mut lanes, calls)?;
        self.row.run = RunTimes {
            bare_us: times[0].filter(|_| launches > 0),
            raw_us: times[1].filter(|_| raw.is_some()),
            rust_us: times[2],
            python_us: times[3],
            blocks,
            calls,
        };
        Ok(())
    }

    /// Replays in turn with those of Python's graph of the same run.
    fn replays(&mut self, replay: &Replay, copies: usize) -> Result<GpuTimes> {
        const ROUNDS: usize = 30;
        if self.with_python
            && let Ok(python) = &mut self.bench.python
            && let Err(error) = python.ask(&json!({"do": "capture", "copies": copies}))
        {
            self.drop_python(error);
        }
        let cuda = self.bench.cuda.clone();
        let (_, budget) = self.bench.rounds();
        let (mut rust, mut python) = (Vec::new(), Vec::new());
        let start = Instant::now();
        for round in 0..ROUNDS {
            if round >= 7 && start.elapsed() > budget {
                break;
            }
            // The first replay after the other's turn finds cold caches.
            replay.graph.launch()?;
            rust.push(replay.time(&cuda)?);
            python.extend(self.ask_python(json!({"do": "replay"})));
        }
        let median_of = |times: Vec<f64>| (!times.is_empty()).then(|| median(times));
        Ok(GpuTimes { rust_us: median_of(rust), python_us: median_of(python), copies })
    }
}

/// Kernels of a graph.
fn kernels_of(replay: &Replay) -> Result<usize> {
    let graph = replay.graph.cu_graph();
    let mut count = 0;
    // SAFETY: the graph is alive; without an array, the number of nodes is written.
    unsafe { sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &mut count) }.result()?;
    let mut nodes = vec![std::ptr::null_mut(); count];
    // SAFETY: there is room for so many nodes.
    unsafe { sys::cuGraphGetNodes(graph, nodes.as_mut_ptr(), &mut count) }.result()?;
    let mut kernels = 0;
    for node in nodes {
        let mut kind = sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
        // SAFETY: the node is of that graph; one number is written.
        unsafe { sys::cuGraphNodeGetType(node, &mut kind) }.result()?;
        kernels += usize::from(kind == sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL);
    }
    Ok(kernels)
}
