//! GDN prefill on the GPU against the CPU reference.
#![cfg(feature = "cudarc")]

mod common;
mod gdn_prefill_gpu {
    mod stress;
}

use std::thread;

use common::{
    Gpu, Mirrored, Number, Rng, assert_same_bits,
    gdn::{Case, D, Problem, Results, Start, is_at_hand, watched},
    refused, say,
};
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use flashinfer_rs::{
    FlashInferError, ModuleName, Stream,
    ffi::{Arg, DlTensor},
    gdn::{GdnInput, GdnOptions, GdnOutput, GdnWorkspace, gdn_prefill},
    indices::{SequenceIndices, SequenceTable},
};
use half::{bf16, f16};

fn check<T: Number>(gpu: &Gpu, rng: &mut Rng, case: &Case) -> Results<T> {
    let workspace = GdnWorkspace::new(&gpu.stream).unwrap();
    Problem::<T>::random(gpu, rng, case).check(gpu, &workspace, &format!("{case:?}"))
}

#[test]
fn sizes() {
    fn run<T: Number>(gpu: &Gpu, rng: &mut Rng) {
        // One or two rows alone may cancel, and then say nothing of the error.
        for lens in [&[1][..], &[2]] {
            check::<T>(gpu, rng, &Case::new(lens, [32, 1, 1]));
            check::<T>(gpu, rng, &Case::new(lens, [1, 1, 32]));
        }
        for lens in [&[63][..], &[64], &[65], &[128], &[200], &[31, 64, 5]] {
            check::<T>(gpu, rng, &Case::new(lens, [1, 1, 1]));
            check::<T>(gpu, rng, &Case::new(lens, [2, 1, 1]));
            check::<T>(gpu, rng, &Case::new(lens, [1, 1, 2]));
        }
    }
    watched(|gpu, rng| {
        run::<f16>(gpu, rng);
        run::<bf16>(gpu, rng);
    });
}

/// Each combination of what may be left out has a kernel of its own.
#[test]
fn options() {
    fn run<T: Number>(gpu: &Gpu, rng: &mut Rng) {
        for bits in 0..16 {
            let [alpha, beta, state, grouped_values] = [1, 2, 4, 8].map(|bit| bits & bit != 0);
            let heads = if grouped_values { [1, 1, 2] } else { [2, 1, 1] };
            check::<T>(gpu, rng, &Case { alpha, beta, state, ..Case::new(&[20, 100], heads) });
        }
    }
    watched(|gpu, rng| {
        run::<f16>(gpu, rng);
        run::<bf16>(gpu, rng);
    });
}

#[test]
fn scales() {
    watched(|gpu, rng| {
        for scale in [None, Some(1.0), Some(0.01), Some(-2.0)] {
            check::<f16>(gpu, rng, &Case { scale, ..Case::new(&[70, 9], [2, 2, 2]) });
            check::<f16>(gpu, rng, &Case { scale, alpha: false, ..Case::new(&[70, 9], [2, 2, 2]) });
        }
    });
}

/// Gates at the ends of their ranges: forget all, forget nothing, keep the
/// state, replace it.
#[test]
fn gates_at_their_ends() {
    watched(|gpu, rng| {
        let case = Case { state: true, ..Case::new(&[100, 3, 64], [2, 2, 4]) };
        let workspace = GdnWorkspace::new(&gpu.stream).unwrap();
        let mut problem = Problem::<f16>::random(gpu, rng, &case);
        let shape = [case.tokens(), case.state_heads()];
        let mut gate = || {
            let numbers = (0..shape[0] * shape[1]).map(|_| [0.0f32, 1.0, 1.0, 0.9][rng.below(4)]);
            Some(Mirrored::new(gpu, &shape, numbers.collect()))
        };
        (problem.alpha, problem.beta) = (gate(), gate());
        problem.check(gpu, &workspace, "gates at their ends");
    });
}

/// Replacing states in place gives the same bits as reading them elsewhere,
/// and so does doing it again.
#[test]
fn in_place() {
    watched(|gpu, rng| {
        let case = Case::all_options(&[130, 1, 64, 77], [2, 2, 4]);
        let workspace = GdnWorkspace::new(&gpu.stream).unwrap();
        let problem = Problem::<bf16>::random(gpu, rng, &case);
        let apart = problem.check(gpu, &workspace, "apart");
        for _ in 0..3 {
            let mut results = Results::poisoned(gpu, &case);
            let initial = problem.state.as_ref().unwrap();
            results.state.upload(&initial.host);
            problem.run(&workspace, &case.table(gpu), Start::InPlace, &mut results).unwrap();
            assert_same_bits("output", &results.output.download(), &apart.output.download());
            assert_same_bits("state", &results.state.download(), &apart.state.download());
            initial.assert_untouched();
        }
    });
}

/// One table, updated in place between runs.
#[test]
fn updated_tables() {
    watched(|gpu, rng| {
        let workspace = GdnWorkspace::new(&gpu.stream).unwrap();
        let mut table =
            SequenceTable::with_capacity(&gpu.stream, SequenceIndices::from_lens([]).unwrap(), 4).unwrap();
        for lens in [&[3, 70][..], &[1, 1, 1, 1], &[90]] {
            let problem = Problem::<f16>::random(gpu, rng, &Case::new(lens, [1, 1, 2]));
            table.update(problem.case.indices()).unwrap();
            let mut results = Results::poisoned(gpu, &problem.case);
            problem.run(&workspace, &table, Start::Zeros, &mut results).unwrap();
            problem.verify(&format!("{lens:?}"), &results, &problem.expected());
        }
        refused(table.update(SequenceIndices::from_lens([1; 5]).unwrap()), "capacity");
        let large = SequenceTable::with_capacity(&gpu.stream, SequenceIndices::from_lens([1; 5]).unwrap(), 4);
        refused(large, "capacity");
    });
}

/// A captured run, replayed for other numbers and other lengths of as many
/// sequences and tokens.
#[test]
fn graph_replay() {
    let Some(gpu) = Gpu::start_alone().filter(is_at_hand) else { return };
    let rng = &mut Rng::new();
    let case = Case::all_options(&[70, 20, 10], [2, 2, 4]);
    let workspace = GdnWorkspace::new(&gpu.stream).unwrap();
    let mut problem = Problem::<bf16>::random(&gpu, rng, &case);
    problem.check(&gpu, &workspace, "eager");
    let mut table = case.table(&gpu);
    let mut results = Results::poisoned(&gpu, &case);
    gpu.synchronize();
    let start = problem.start();
    let graph = problem.run_within(&workspace, &table, start, &mut results, |run| {
        gpu.cuda.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
        let run = run();
        let new_workspace = GdnWorkspace::new(&gpu.stream).map(drop);
        let new_table = SequenceTable::new(&gpu.stream, case.indices()).map(drop);
        let graph = gpu.cuda.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("a graph");
        run.unwrap();
        refused(new_workspace, "stream");
        refused(new_table, "stream");
        graph
    });
    results.output.assert_untouched(); // captured is not run
    for lens in [&[70, 20, 10], &[1, 98, 1], &[33, 33, 34]] {
        let other = Problem::<bf16>::random(&gpu, rng, &Case { lens: lens.to_vec(), ..case.clone() });
        table.update(other.case.indices()).unwrap();
        problem.q.upload(&other.q.host);
        problem.k.upload(&other.k.host);
        problem.v.upload(&other.v.host);
        problem.alpha.as_mut().unwrap().upload(&other.alpha.as_ref().unwrap().host);
        problem.beta.as_mut().unwrap().upload(&other.beta.as_ref().unwrap().host);
        problem.state.as_mut().unwrap().upload(&other.state.as_ref().unwrap().host);
        graph.launch().unwrap();
        other.verify(&format!("replay {lens:?}"), &results, &other.expected());
    }
}

/// Threads that launch at the same time, each on its own stream.
#[test]
fn threads() {
    watched(|gpu, _| {
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let gpu = gpu.fork();
                    for _ in 0..5 {
                        check::<f16>(&gpu, &mut Rng::new(), &Case::all_options(&[30, 66], [1, 1, 2]));
                    }
                });
            }
        });
    });
}

/// What a tile reads of the next sequence must not matter. A NaN there does:
/// this prints how far it reaches, and fails if it is further than documented.
#[test]
fn a_nan_reaches_the_sequence_before_at_most() {
    watched(|gpu, rng| {
        let case = Case::new(&[64, 70, 40, 30], [1, 1, 2]);
        let workspace = GdnWorkspace::new(&gpu.stream).unwrap();
        let mut problem = Problem::<f16>::random(gpu, rng, &case);
        let clean = problem.check(gpu, &workspace, "clean");
        let poisoned = 134..174; // the third sequence
        let mut keys = problem.k.host.clone();
        keys[poisoned.start * D..poisoned.end * D].fill(f16::NAN);
        problem.k.upload(&keys);
        let mut results = Results::poisoned(gpu, &case);
        problem.run(&workspace, &case.table(gpu), Start::Zeros, &mut results).unwrap();
        let (clean, dirty) = (clean.output.download(), results.output.download());
        let row = 2 * D;
        let tiles_before = 128 * row; // whole tiles before the one that reaches over
        assert_same_bits("before", &dirty[..tiles_before], &clean[..tiles_before]);
        assert_same_bits("behind", &dirty[174 * row..], &clean[174 * row..]);
        let reached = dirty[tiles_before..134 * row].iter().filter(|number| number.is_nan()).count();
        say(&format!("{reached} of {} numbers of the sequence before are NaN", 6 * row));
    });
}

#[test]
fn no_sequences() {
    watched(|gpu, rng| {
        let case = Case::new(&[], [2, 2, 4]);
        let workspace = GdnWorkspace::new(&gpu.stream).unwrap();
        let problem = Problem::<f16>::random(gpu, rng, &case);
        let mut results = Results::poisoned(gpu, &case);
        problem.run(&workspace, &case.table(gpu), Start::Zeros, &mut results).unwrap();
        results.output.assert_untouched();
        results.state.assert_untouched();
    });
}

/// What concerns streams and real tensors; shapes and dtypes are tested where
/// no GPU is needed, in `src/ops/gdn.rs`.
#[test]
fn wrong_input() {
    watched(|gpu, rng| {
        let case = Case::all_options(&[5, 6], [2, 2, 4]);
        let workspace = GdnWorkspace::new(&gpu.stream).unwrap();
        let problem = Problem::<f16>::random(gpu, rng, &case);
        let mut results = Results::poisoned(gpu, &case);
        let mut run = |workspace: &GdnWorkspace, table: &SequenceTable| {
            problem.run(workspace, table, problem.start(), &mut results)
        };
        let other = gpu.elsewhere();
        let elsewhere = GdnWorkspace::new(&other.stream).unwrap();
        refused(run(&elsewhere, &case.table(gpu)), "sequences");
        refused(run(&workspace, &case.table(&other)), "sequences");
        refused(run(&elsewhere, &case.table(&other)), "q");
        refused(run(&workspace, &Case::new(&[5, 5], case.heads).table(gpu)), "sequences");
        refused(run(&workspace, &Case::new(&[11], case.heads).table(gpu)), "output_state");

        let (q, v) = (problem.q.device_view(), problem.v.device_view());
        let (mut output, mut state) = (results.output.device_view_mut(), results.state.device_view_mut());
        let mut out = GdnOutput { output: output.reborrow(), state: state.reborrow() };
        let table = case.table(gpu);
        let input = GdnInput::new(q, v, v);
        refused(gdn_prefill(&workspace, &mut out, &input, &table, &GdnOptions::default()), "k");
        let input = GdnInput::new(q, q, v);
        refused(gdn_prefill(&workspace, &mut out, &input, &table, &GdnOptions::with_scale(0.0)), "scale");
        results.output.assert_untouched();
        results.state.assert_untouched();
    });
}

/// The check of the compute capability, on every GPU that there is.
#[test]
fn only_compute_capability_9_0() {
    let Some(gpu) = Gpu::start() else { return };
    for ordinal in 0..gpu.runtime.device_count().unwrap() {
        let context = cudarc::driver::CudaContext::new(ordinal as usize).unwrap();
        let workspace = GdnWorkspace::new(&Stream::from(&context.new_stream().unwrap()));
        match (gpu.runtime.compute_capability(ordinal).unwrap(), workspace) {
            ((9, 0), Ok(_)) => {}
            ((9, 0), Err(error)) => panic!("{error}"),
            ((major, minor), Err(error @ FlashInferError::Unsupported { .. })) => {
                let text = error.to_string();
                assert!(text.contains(&format!("{major}.{minor}")) && text.contains("9.0"), "{text}");
            }
            (capability, other) => panic!("{capability:?}: {other:?}"),
        }
    }
}

/// What the module itself refuses comes back as its own words.
#[test]
fn errors_of_the_module_are_decoded() {
    let Some(gpu) = Gpu::start().filter(is_at_hand) else { return };
    let function =
        gpu.runtime.module(&ModuleName::GDN_PREFILL_SM90).unwrap().function("gdn_prefill").unwrap();
    let qkv = Mirrored::<f16>::poisoned(&gpu, &[1, 1, 256]);
    let state = Mirrored::<f32>::poisoned(&gpu, &[1, 1, 256, 256]);
    let cu_seqlens = gpu.cuda.clone_htod(&[0i64, 1]).unwrap();
    let scratch = gpu.cuda.alloc_zeros::<u8>(144 * 128).unwrap();
    gpu.synchronize();
    use flashinfer_rs::gpu::TensorExt;
    let (qkv, state) = (qkv.device_view(), state.device_view());
    let cu_seqlens = cu_seqlens.tensor(&gpu.cuda, &[2]).unwrap();
    let scratch = scratch.tensor(&gpu.cuda, &[144 * 128]).unwrap();
    let views = [qkv, state, cu_seqlens.view(), scratch.view()];
    let [qkv, state, cu_seqlens, scratch] = views.each_ref().map(DlTensor::from);
    let [qkv, state, cu_seqlens, scratch] = [&qkv, &state, &cu_seqlens, &scratch].map(Arg::from);
    let (none, scale, every) = (Arg::NONE, Arg::from(1.0), Arg::from(0i64));
    let args = [qkv, state, qkv, qkv, qkv, cu_seqlens, none, none, none, scale, scratch, none, none, every];
    // SAFETY: a head dimension of 256 is refused before anything is launched.
    match unsafe { function.call(&args) } {
        Err(FlashInferError::TvmFfiCall { function, message, .. }) => {
            assert!(function == "gdn_prefill" && message.contains("can_implement failed"), "{message}");
        }
        other => panic!("refused, not {other:?}"),
    }
}
