//! What the GPU tests share: the gate, random tensors that exist on the host
//! and on the device, and comparison with the CPU reference.

// Each test file uses its own part of this.
#![allow(dead_code)]

pub mod attention;
pub mod cache;
mod compare;
pub mod gdn;
pub mod norm;
pub mod ops;
pub mod prefill;
pub mod prefill_tests;
pub mod single;

/// Tests of one function for several types: a line `name: function::<types>(arguments);` for each.
#[macro_export]
macro_rules! typed_tests {
    ($($(#[$attribute:meta])* $name:ident: $call:expr;)*) => {
        $($(#[$attribute])*
        #[test]
        fn $name() {
            $call;
        })*
    };
}

pub use compare::assert_same_bits;
pub use test_support::{Rng, say};

use std::{
    fmt::Debug,
    process::Command,
    sync::{Arc, LazyLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use cudarc::driver::{CudaContext, CudaGraph, CudaStream, DeviceRepr};
use flashinfer_rs::{
    Element, FlashInferError, FlashInferRuntime, Module, ModuleName, Result, Stream, TensorMut, TensorRef,
    artifacts::FlashInferVersion, gpu::Tensor,
};
use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};

/// Tests that capture a graph run alone: while one is captured, nobody may
/// wait for the whole device, as making a first stream does.
static TURN: RwLock<()> = RwLock::new(());

/// The right to use the GPU, until it is dropped.
enum Turn {
    Shared { _guard: RwLockReadGuard<'static, ()> },
    Alone { _guard: RwLockWriteGuard<'static, ()> },
}

/// The GPU that tests use, and another one that is current whenever an operation is called:
/// `FLASHINFER_RS_TEST_DEVICES=1,0`. Without it, the first and none.
fn devices() -> (usize, Option<usize>) {
    let Ok(text) = std::env::var("FLASHINFER_RS_TEST_DEVICES") else { return (0, None) };
    let ordinals: Option<Vec<usize>> = text.split(',').map(|ordinal| ordinal.parse().ok()).collect();
    match ordinals.as_deref() {
        Some(&[used, current]) if used != current => (used, Some(current)),
        _ => panic!("FLASHINFER_RS_TEST_DEVICES={text}: two numbers are expected, as in 1,0"),
    }
}

/// Makes the other GPU current, if there is to be one.
fn leave_device() {
    static OTHER: LazyLock<Option<Arc<CudaContext>>> =
        LazyLock::new(|| devices().1.map(|other| CudaContext::new(other).expect("another NVIDIA GPU")));
    if let Some(other) = &*OTHER {
        other.bind_to_thread().expect("a current GPU");
    }
}

/// A stream of its own on a GPU, and the runtime.
pub struct Gpu {
    pub cuda: Arc<CudaStream>,
    pub stream: Stream,
    pub runtime: &'static FlashInferRuntime,
    _turn: Option<Turn>,
}

impl Gpu {
    /// `None`, said on stderr, unless `FLASHINFER_RS_RUN_GPU_TESTS=1`. With it,
    /// whatever is missing fails the test.
    pub fn start() -> Option<Self> {
        Self::start_with(|| Turn::Shared { _guard: TURN.read().unwrap_or_else(PoisonError::into_inner) })
    }

    /// As [`start`](Self::start), with no other test on the GPU meanwhile, for
    /// tests that capture graphs.
    pub fn start_alone() -> Option<Self> {
        Self::start_with(|| Turn::Alone { _guard: TURN.write().unwrap_or_else(PoisonError::into_inner) })
    }

    fn start_with(turn: impl FnOnce() -> Turn) -> Option<Self> {
        if std::env::var_os("FLASHINFER_RS_RUN_GPU_TESTS").is_none_or(|value| value != "1") {
            say("skipped: set FLASHINFER_RS_RUN_GPU_TESTS=1 on a machine with an NVIDIA GPU to run it");
            return None;
        }
        let turn = turn();
        let context = CudaContext::new(devices().0).expect("an NVIDIA GPU");
        let runtime = FlashInferRuntime::get().expect("libcudart and libtvm_ffi");
        runtime.preload([&ModuleName::NORM, &ModuleName::PAGE]).expect("the modules norm and page");
        Some(Self::of(context.new_stream().expect("a stream"), runtime, Some(turn)))
    }

    fn of(cuda: Arc<CudaStream>, runtime: &'static FlashInferRuntime, turn: Option<Turn>) -> Self {
        Self { stream: Stream::from(&cuda), cuda, runtime, _turn: turn }
    }

    /// Another stream of the same GPU.
    pub fn fork(&self) -> Self {
        Self::of(self.cuda.context().new_stream().expect("a stream"), self.runtime, None)
    }

    /// A stream of another GPU.
    pub fn on_another(&self) -> Self {
        self.on(usize::from(self.stream.ordinal() == 0))
    }

    fn on(&self, ordinal: usize) -> Self {
        let context = CudaContext::new(ordinal).expect("another NVIDIA GPU");
        Self::of(context.new_stream().expect("a stream"), self.runtime, None)
    }

    /// A stream whose tensors are refused here: of the other GPU if there is to be one.
    pub fn elsewhere(&self) -> Self {
        devices().1.map_or_else(|| self.fork(), |other| self.on(other))
    }

    /// The GPU's.
    pub fn compute_capability(&self) -> (i32, i32) {
        self.runtime.compute_capability(self.stream.ordinal()).expect("the compute capability")
    }

    /// Waits until the stream is idle, and reports what failed on the device.
    #[track_caller]
    pub fn synchronize(&self) {
        self.cuda.synchronize().expect("work on the device");
    }
}

/// Leaves an error in this thread's CUDA runtime, as other code in a process
/// may: there is no such device.
pub fn leave_cuda_error() {
    use libloading::os::unix::{Library, RTLD_NOW};
    // SAFETY: the library is open in this process, by this name.
    let library = unsafe { Library::open(Some("libcudart.so.13"), RTLD_NOW) }.expect("libcudart");
    // SAFETY: the function's signature in CUDA's headers.
    let set_device =
        unsafe { library.get::<unsafe extern "C" fn(i32) -> i32>(b"cudaSetDevice") }.expect("its function");
    // SAFETY: takes a number.
    assert_ne!(unsafe { set_device(9999) }, 0);
}

/// An element type of the tests.
pub trait Number: Element + DeviceRepr + Debug {
    /// The largest error of a row of results that were rounded to this type,
    /// relative to the row's norm.
    const BOUND: f64;
    /// What outputs are filled with beforehand: NaN.
    const POISON: Self;
    fn from_f64(number: f64) -> Self;
    fn to_f64(self) -> f64;
    fn bits(self) -> u32;
}

macro_rules! numbers {
    ($($ty:ty, $bound:expr, $poison:expr, $from:expr, $to:expr;)*) => {$(
        impl Number for $ty {
            const BOUND: f64 = $bound;
            const POISON: Self = $poison;
            fn from_f64(number: f64) -> Self {
                $from(number)
            }
            fn to_f64(self) -> f64 {
                $to(self)
            }
            fn bits(self) -> u32 {
                self.to_bits().into()
            }
        }
    )*};
}
numbers! {
    f16, 1e-3, f16::NAN, f16::from_f64, f16::to_f64;
    bf16, 8e-3, bf16::NAN, bf16::from_f64, bf16::to_f64;
    f32, 1e-5, f32::NAN, |number| number as f32, f64::from;
    F8E4M3, 7e-2, F8E4M3::from_bits(0x7f), F8E4M3::from_f64, |number: F8E4M3| F8E4M3::to_f64(&number);
    F8E5M2, 1.4e-1, F8E5M2::from_bits(0x7f), F8E5M2::from_f64, |number: F8E5M2| F8E5M2::to_f64(&number);
}

/// What of a contiguous tensor a view shows: ranges of axes, then another
/// order of axes.
#[derive(Clone, Debug, Default)]
struct Part {
    ranges: Vec<(usize, usize, usize)>,
    order: Option<Vec<usize>>,
}

impl Part {
    fn of<'a>(&self, mut view: TensorRef<'a>) -> TensorRef<'a> {
        for &(axis, start, len) in &self.ranges {
            view = view.narrow(axis, start, len).unwrap();
        }
        self.order.as_deref().map_or(view, |order| view.permute(order).unwrap())
    }

    fn of_mut<'a>(&self, mut view: TensorMut<'a>) -> TensorMut<'a> {
        for &(axis, start, len) in &self.ranges {
            view = view.narrow(axis, start, len).unwrap();
        }
        match &self.order {
            Some(order) => view.permute(order).unwrap(),
            None => view,
        }
    }
}

/// A tensor on the host and its copy on the device, and the part of both that
/// operations are shown.
pub struct Mirrored<T> {
    /// What was uploaded. The device's content changes, this does not.
    pub host: Vec<T>,
    pub device: Tensor<T>,
    shape: Vec<usize>,
    part: Part,
}

impl<T: Number> Mirrored<T> {
    pub fn new(gpu: &Gpu, shape: &[usize], host: Vec<T>) -> Self {
        let device = Tensor::from_slice(&gpu.stream, shape, &host).expect("device memory");
        Self { host, device, shape: shape.to_vec(), part: Part::default() }
    }

    /// Numbers of mean 0 and variance `scale²`.
    pub fn random_scaled(gpu: &Gpu, rng: &mut Rng, shape: &[usize], scale: f64) -> Self {
        let numbers = (0..shape.iter().product()).map(|_| T::from_f64(rng.unit() * scale)).collect();
        Self::new(gpu, shape, numbers)
    }

    /// Numbers of mean 0 and variance 1.
    pub fn random(gpu: &Gpu, rng: &mut Rng, shape: &[usize]) -> Self {
        Self::random_scaled(gpu, rng, shape, 1.0)
    }

    /// Nothing but NaN.
    pub fn poisoned(gpu: &Gpu, shape: &[usize]) -> Self {
        Self::new(gpu, shape, vec![T::POISON; shape.iter().product()])
    }

    /// The same on another stream, or another device.
    pub fn copied_to(&self, gpu: &Gpu) -> Self {
        let mut copy = Self::new(gpu, &self.shape, self.host.clone());
        copy.part = self.part.clone();
        copy
    }

    /// Shows `start..start + len` of an axis.
    pub fn narrowed(mut self, axis: usize, start: usize, len: usize) -> Self {
        self.part.ranges.push((axis, start, len));
        self
    }

    /// Shows the axes in another order.
    pub fn permuted(mut self, order: &[usize]) -> Self {
        self.part.order = Some(order.to_vec());
        self
    }

    /// The shape that operations are shown.
    pub fn shape(&self) -> Vec<usize> {
        self.view().shape().iter().map(|&size| size as usize).collect()
    }

    /// The host copy, for the reference.
    pub fn view(&self) -> TensorRef<'_> {
        self.part.of(TensorRef::from_slice(&self.host, &self.shape).unwrap())
    }

    /// Storage of the same size, seen in the same way.
    pub fn view_of<'a, U: Element>(&self, storage: &'a mut [U]) -> TensorMut<'a> {
        self.part.of_mut(TensorMut::from_slice(storage, &self.shape).unwrap())
    }

    /// The host copy as `f64`: where the reference's results go.
    pub fn wide(&self) -> Vec<f64> {
        self.host.iter().map(|number| number.to_f64()).collect()
    }

    /// The device copy, for operations.
    pub fn device_view(&self) -> TensorRef<'_> {
        leave_device();
        self.part.of(self.device.view())
    }

    /// The device copy, for operations that write.
    pub fn device_view_mut(&mut self) -> TensorMut<'_> {
        leave_device();
        self.part.of_mut(self.device.view_mut())
    }

    /// The device's content, when the stream's work is done.
    pub fn download(&self) -> Vec<T> {
        self.device.to_vec().expect("a copy to the host")
    }

    /// Writes to the device, at the same address.
    pub fn upload(&mut self, content: &[T]) {
        self.device.write(content).expect("a copy to the device");
    }

    /// The device's content is what was uploaded.
    #[track_caller]
    pub fn assert_untouched(&self) {
        assert_same_bits("untouched", &self.download(), &self.host);
    }

    /// The device's content is the reference's result, `want`, row by row
    /// within `bound`, and what was uploaded outside the shown part.
    #[track_caller]
    pub fn assert_close(&self, what: &str, want: &[f64], bound: f64) {
        self.assert_part_close(what, &self.view(), want, bound);
    }

    /// As [`assert_close`](Self::assert_close), for a part of what is shown.
    #[track_caller]
    pub fn assert_part_close(&self, what: &str, part: &TensorRef<'_>, want: &[f64], bound: f64) {
        let worst = compare::rows(what, part, &self.host, &self.download(), want, bound);
        eprintln!("{what}: {} {:?}: worst row off by {worst:.1e}", T::DTYPE, part.shape());
    }
}

/// Captures a call into a graph.
#[track_caller]
pub fn captured(gpu: &Gpu, call: impl FnOnce() -> Result<()>) -> CudaGraph {
    let (graph, call) = attention::capture(gpu, call);
    call.unwrap();
    graph.expect("a graph")
}

/// No source holds the module that was asked for, be it that FlashInfer does not
/// publish it.
pub fn is_not_at_hand(error: &FlashInferError) -> bool {
    match error {
        FlashInferError::Artifact(_) => true,
        FlashInferError::Unsupported { available, .. } => available.contains("a wheel of yours that holds"),
        _ => false,
    }
}

/// Whether a module is of FlashInfer 0.7 or later.
pub fn is_0_7(module: &Module) -> bool {
    module.version().is_some_and(|version| version >= FlashInferVersion::new(0, 7, 0))
}

/// What was made; `None`, said on stderr, where the modules at hand are those of a
/// later FlashInfer, of which test machines hold some only, and it is none of them.
#[track_caller]
pub fn at_hand<T>(gpu: &Gpu, made: Result<T>) -> Option<T> {
    match made {
        Ok(made) => Some(made),
        Err(reason) if is_not_at_hand(&reason) && is_0_7(gpu.runtime.module(&ModuleName::NORM).unwrap()) => {
            say(&format!("skipped: no source holds the module: {reason}"));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Whether this process has nothing but this test. If not, runs it in one of its own, which must
/// pass and say these words. `test` is its path in the program.
#[track_caller]
pub fn is_own_process(test: &str, words: &str) -> bool {
    const TEST: &str = "FLASHINFER_RS_TEST_PART";
    if std::env::var_os(TEST).is_some_and(|part| part == test) {
        return true;
    }
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    let output = command.args([test, "--exact", "--nocapture"]).env(TEST, test).output().expect("a process");
    let text = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
    assert!(output.status.success() && text.contains(words), "{text}");
    false
}

/// The call was refused because of this argument.
#[track_caller]
pub fn refused<R: Debug>(result: Result<R>, expected: &str) {
    match result {
        Err(FlashInferError::InvalidArgument { argument, .. }) if argument == expected => {}
        other => panic!("expected `{expected}` to be refused, got {other:?}"),
    }
}
