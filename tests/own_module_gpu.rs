//! Kernels called by name, through modules that are opened by their files,
//! against the CPU.
#![cfg(feature = "cudarc")]

mod common;

use std::time::{Duration, Instant};

use common::{Gpu, Mirrored, Number, Rng, attention::capture, is_own_process, say};
use cudarc::{driver::LaunchConfig, nvrtc::Ptx};
use flashinfer_rs::{
    FlashInferError, Module, ModuleName, Result, TensorMut, TensorRef, args,
    artifacts::{Fetch, Member},
    gpu::{TensorExt, TensorExtMut},
    indices::{PackedIndices, PackedTable},
    norm::{self, NormOptions},
    quantization::{self, BitOrder},
};
use half::{bf16, f16};

/// A module of FlashInfer, opened as a library of one's own would be.
fn open(gpu: &Gpu, name: &ModuleName) -> &'static Module {
    let located = gpu.runtime.store().locate(&Member::module(name.as_str()), Fetch::Forbidden).unwrap();
    // SAFETY: a module of FlashInfer.
    unsafe { Module::open(&located.path) }.unwrap()
}

/// Rows of `silu_and_mul`: random input, poisoned output, and the result.
struct Rows<T> {
    input: Mirrored<T>,
    out: Mirrored<T>,
    expected: Vec<f64>,
}

impl<T: Number> Rows<T> {
    fn new(gpu: &Gpu, rng: &mut Rng, rows: usize, dim: usize) -> Self {
        let input = Mirrored::<T>::random(gpu, rng, &[rows, 2 * dim]);
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let row = |row: &[f64]| (0..dim).map(|at| silu(row[at]) * row[dim + at]).collect::<Vec<_>>();
        let expected = input.wide().chunks(2 * dim).flat_map(row).collect();
        Self { input, out: Mirrored::poisoned(gpu, &[rows, dim]), expected }
    }

    fn check(&self) {
        self.out.assert_close("silu_and_mul", &self.expected, T::BOUND);
    }
}

fn launch(
    gpu: &Gpu,
    module: &Module,
    input: &TensorRef<'_>,
    out: &mut TensorMut<'_>,
    enable_pdl: bool,
) -> Result<()> {
    // SAFETY: contiguous tensors of one type on the stream's device, the
    // second with rows twice as long, all of whole vectors.
    unsafe { module.call_on(&gpu.stream, "silu_and_mul", args![out, input, enable_pdl])? }.try_into()
}

fn silu_and_mul<T: Number>(gpu: &Gpu, rng: &mut Rng) {
    let module = open(gpu, &ModuleName::SILU_AND_MUL);
    for (rows, dim, enable_pdl) in [(1, 64, false), (7, 128, true), (33, 4096, false), (3, 11008, true)] {
        let mut rows = Rows::<T>::new(gpu, rng, rows, dim);
        let (input, mut out) = (rows.input.device_view(), rows.out.device_view_mut());
        launch(gpu, module, &input, &mut out.reborrow(), enable_pdl).unwrap();
        rows.check();
    }
}

#[test]
fn a_kernel_by_name() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    silu_and_mul::<f16>(&gpu, rng);
    silu_and_mul::<bf16>(&gpu, rng);
}

/// What is called by name goes to the stream that is named, and nowhere else:
/// otherwise the graph would be empty.
#[test]
fn a_kernel_by_name_is_captured() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    let module = open(&gpu, &ModuleName::SILU_AND_MUL);
    // A first call loads the kernel, which cannot be captured.
    silu_and_mul::<f16>(&gpu, rng);
    let mut rows = Rows::<f16>::new(&gpu, rng, 9, 512);
    let graph = {
        let (input, mut out) = (rows.input.device_view(), rows.out.device_view_mut());
        let (graph, launched) = capture(&gpu, || launch(&gpu, module, &input, &mut out.reborrow(), false));
        launched.unwrap();
        graph.expect("a graph")
    };
    rows.out.assert_untouched(); // captured is not run
    graph.launch().unwrap();
    gpu.synchronize();
    rows.check();
}

/// Strings reach a kernel's host code, and its refusals come back.
#[test]
fn strings_and_refusals() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let module = open(&gpu, &ModuleName::QUANTIZATION);
    for len in [1usize, 8, 77, 4096] {
        let flags: Vec<u8> = (0..len).map(|_| rng.below(2) as u8).collect();
        let bytes = len.div_ceil(8);
        let x = gpu.cuda.clone_htod(&flags).unwrap();
        for order in ["little", "big", "neither big nor little"] {
            let mut y = gpu.cuda.clone_htod(&vec![0xa5u8; bytes]).unwrap();
            let result = {
                let (x, mut y) =
                    (x.tensor(&gpu.cuda, &[len]).unwrap(), y.tensor_mut(&gpu.cuda, &[bytes]).unwrap());
                // SAFETY: a byte for each flag, and a byte for each eight.
                unsafe { module.call_on(&gpu.stream, "packbits", args![&x.view(), order, &mut y.view_mut()]) }
            };
            let packed = gpu.cuda.clone_dtoh(&y).unwrap();
            gpu.synchronize();
            let expected: Vec<u8> = match order {
                "little" => flags.chunks(8).map(|bits| place(bits, |at| at)).collect(),
                "big" => flags.chunks(8).map(|bits| place(bits, |at| 7 - at)).collect(),
                _ => {
                    let Err(FlashInferError::TvmFfiCall { message, .. }) = result else {
                        panic!("refused, not {result:?}")
                    };
                    assert!(message.contains("bitorder must be"), "{message}");
                    assert_eq!(packed, vec![0xa5; bytes]);
                    continue;
                }
            };
            <()>::try_from(result.unwrap()).unwrap();
            assert_eq!(packed, expected, "{len} flags, {order}");
        }
    }
    say("packbits: all as on the CPU");
}

#[test]
fn nothing_works_after_a_failed_kernel() {
    nothing_works_after("nothing_works_after_a_failed_kernel", "trap;", "launch failure");
}

#[test]
fn nothing_works_after_an_illegal_address() {
    let writes = ".reg .u64 %a; .reg .u32 %b; mov.u64 %a, 16; mov.u32 %b, 1; st.global.u32 [%a], %b; ret;";
    nothing_works_after("nothing_works_after_an_illegal_address", writes, "illegal memory access");
}

/// After a kernel of other code that failed, in a process of its own, every call is an error,
/// be its launcher one that asks CUDA or not, which comes at once and says what happened.
fn nothing_works_after(test: &str, kernel: &str, reason: &str) {
    // It waits until no other test is on the GPU.
    let Some(gpu) = Gpu::start_alone() else { return };
    if !is_own_process(test, "4 calls failed") {
        return;
    }
    let kernel =
        format!(".version 7.0\n.target sm_70\n.address_size 64\n.visible .entry fails() {{ {kernel} }}");
    let context = gpu.cuda.context();
    let kernel = context.load_module(Ptx::from_src(kernel)).unwrap().load_function("fails").unwrap();
    let (row, weight) = (gpu.cuda.alloc_zeros::<bf16>(64).unwrap(), gpu.cuda.alloc_zeros::<f32>(64).unwrap());
    let mut out = gpu.cuda.alloc_zeros::<bf16>(64).unwrap();
    let (bits, mut bytes) = (gpu.cuda.alloc_zeros::<u8>(64).unwrap(), gpu.cuda.alloc_zeros::<u8>(8).unwrap());
    let segments = PackedIndices::from_lens([40, 24]).unwrap();
    let segments = PackedTable::new(&gpu.stream, segments).unwrap();
    // The views are made before: cudarc itself fails afterwards.
    let (row, weight) = (row.tensor(&gpu.cuda, &[1, 64]).unwrap(), weight.tensor(&gpu.cuda, &[64]).unwrap());
    let mut out = out.tensor_mut(&gpu.cuda, &[1, 64]).unwrap();
    let (bits, mut bytes) =
        (bits.tensor(&gpu.cuda, &[64]).unwrap(), bytes.tensor_mut(&gpu.cuda, &[8]).unwrap());
    let (row, weight, mut out) = (row.view(), weight.view(), out.view_mut());
    let norm_weight = row.select(0, 0).unwrap();
    let (bits, mut bytes) = (bits.view(), bytes.view_mut());
    let mut calls = || {
        let (stream, norm) = (&gpu.stream, NormOptions::default());
        [
            norm::rmsnorm(stream, &mut out, &row, &norm_weight, &norm),
            norm::layernorm(stream, &mut out, &row, &weight, &weight, &norm),
            quantization::packbits(stream, &mut bytes, &bits, BitOrder::Big),
            quantization::segment_packbits(stream, &mut bytes, &bits, &segments, BitOrder::Big),
        ]
    };
    calls().into_iter().for_each(|call| call.unwrap());
    gpu.cuda.synchronize().unwrap();
    // SAFETY: it takes no arguments.
    unsafe { gpu.cuda.launch_builder(&kernel).launch(LaunchConfig::for_num_elems(1)) }.unwrap();
    gpu.cuda.synchronize().unwrap_err();
    let begin = Instant::now();
    for call in calls() {
        match call {
            Err(error @ (FlashInferError::TvmFfiCall { .. } | FlashInferError::Cuda { .. })) => {
                let text = error.to_string();
                assert!(text.contains(reason), "{text}");
                let cuda = matches!(error, FlashInferError::Cuda { .. });
                assert!(!cuda || text.contains("launched before"), "{text}");
            }
            other => panic!("after a kernel that failed: {other:?}"),
        }
    }
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    say("4 calls failed, as they must");
    // What is still there cannot be freed.
    std::process::exit(0);
}

/// A byte with each bit at its place.
fn place(bits: &[u8], place: impl Fn(usize) -> usize) -> u8 {
    bits.iter().enumerate().map(|(at, bit)| bit << place(at)).sum()
}
