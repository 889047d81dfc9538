//! `fused_qk_rmsnorm_rope` on the GPU against the CPU reference. Each test is
//! alone on the GPU, because a device has one table of frequencies.
#![cfg(feature = "cudarc")]

mod common;

use common::{
    Gpu, Mirrored, Number, Rng, assert_same_bits, attention::capture, captured, leave_cuda_error, refused,
    say,
};
use flashinfer_rs::{
    DType, FlashInferError, Result,
    norm::{FusedQkOptions, QkvInput, QkvOutput, Rope3d, RopeTable, fused_qk_rmsnorm_rope},
    reference,
};
use float8::F8E4M3;
use half::bf16;

/// Sizes and options of a call.
#[derive(Clone, Copy, Debug)]
struct Case {
    videos: usize,
    patches: [usize; 3],
    heads: [usize; 3],
    rope: Rope3d,
    options: FusedQkOptions,
    /// Whether videos are a dimension of their own.
    batched: bool,
}

impl Case {
    fn new(patches: [usize; 3], heads: [usize; 3], channels: [usize; 3]) -> Self {
        let (rope, options) = (Rope3d::new(channels), FusedQkOptions::default());
        Self { videos: 2, patches, heads, rope, options, batched: false }
    }

    fn with_options(mut self, change: impl FnOnce(&mut FusedQkOptions)) -> Self {
        change(&mut self.options);
        self
    }

    /// The dimensions of tokens, and further ones.
    fn shape(&self, further: &[usize]) -> Vec<usize> {
        let seq_len = self.patches.iter().product();
        let tokens = if self.batched { vec![self.videos, seq_len] } else { vec![self.videos * seq_len] };
        [&tokens, further].concat()
    }
}

/// The tensors of one call.
struct Problem<Q> {
    case: Case,
    qkv: Mirrored<bf16>,
    weights: [Mirrored<bf16>; 2],
    out: [Mirrored<Q>; 3],
}

impl<Q: Number> Problem<Q> {
    fn random(gpu: &Gpu, rng: &mut Rng, mut case: Case) -> Self {
        case.options.output_fp8 = Q::DTYPE == DType::E4M3;
        let d = case.rope.head_dim();
        let joined = case.heads.iter().sum::<usize>() * d;
        Self {
            case,
            qkv: Mirrored::random(gpu, rng, &case.shape(&[joined])),
            weights: [0, 1].map(|kind| Mirrored::random(gpu, rng, &[case.heads[kind] * d])),
            out: case.heads.map(|heads| Mirrored::poisoned(gpu, &case.shape(&[heads, d]))),
        }
    }

    /// Does something with a call that is ready.
    fn with_call<R>(
        &mut self,
        gpu: &Gpu,
        table: &RopeTable,
        with: impl FnOnce(&mut dyn FnMut() -> Result<()>) -> R,
    ) -> R {
        let qkv = self.qkv.device_view();
        let [q_weight, k_weight] = self.weights.each_ref().map(|weight| weight.device_view());
        let [mut q, mut k, mut v] = self.out.each_mut().map(|out| out.device_view_mut());
        let input = QkvInput { qkv, q_weight, k_weight, patches: self.case.patches };
        let mut out = QkvOutput { q: q.reborrow(), k: k.reborrow(), v: v.reborrow() };
        with(&mut || fused_qk_rmsnorm_rope(&gpu.stream, &mut out, &input, table, &self.case.options))
    }

    fn run(&mut self, gpu: &Gpu, table: &RopeTable) -> Result<()> {
        self.with_call(gpu, table, |call| call())
    }

    /// Compares what came out with the reference for what was uploaded.
    #[track_caller]
    fn verify(&self) {
        let [mut q, mut k, mut v] = self.out.each_ref().map(|out| out.wide());
        reference::fused_qk_rmsnorm_rope(
            &mut QkvOutput {
                q: self.out[0].view_of(&mut q),
                k: self.out[1].view_of(&mut k),
                v: self.out[2].view_of(&mut v),
            },
            &QkvInput {
                qkv: self.qkv.view(),
                q_weight: self.weights[0].view(),
                k_weight: self.weights[1].view(),
                patches: self.case.patches,
            },
            &self.case.rope,
            &self.case.options,
        )
        .unwrap();
        for (name, (out, want)) in ["q", "k", "v"].into_iter().zip(self.out.iter().zip([q, k, v])) {
            out.assert_close(&format!("{name} of {:?}", self.case), &want, Q::BOUND);
        }
        self.qkv.assert_untouched();
    }

    #[track_caller]
    fn check(&mut self, gpu: &Gpu, table: &RopeTable) {
        self.run(gpu, table).unwrap();
        self.verify();
    }
}

/// Runs a case with a table of its own.
#[track_caller]
fn check<Q: Number>(gpu: &Gpu, rng: &mut Rng, case: Case) {
    let table = RopeTable::new(&gpu.stream, &case.rope).unwrap();
    assert_eq!(table.rope(), &case.rope);
    Problem::<Q>::random(gpu, rng, case).check(gpu, &table);
}

fn cases() -> Vec<Case> {
    let yarn = |mut case: Case| {
        let rope = &mut case.rope;
        (rope.factor, rope.low, rope.high, rope.attention_factor) = (4.0, 2.0, 10.0, 1.2);
        case
    };
    let mut cases = Vec::new();
    for (heads, channels) in [
        ([24, 24, 24], [44, 42, 42]),
        ([1, 1, 1], [20, 22, 22]),
        ([8, 2, 1], [64, 0, 0]),
        ([5, 7, 3], [2, 60, 66]),
        ([32, 32, 32], [88, 84, 84]),
        ([3, 32, 8], [100, 56, 100]),
    ] {
        let case = Case::new([2, 3, 5], heads, channels);
        cases.push(case);
        cases.push(Case { batched: true, ..case }.with_options(|options| options.interleave = false));
        cases.push(yarn(Case { videos: 1, ..case }).with_options(|options| options.is_qk_norm = false));
        cases.push(yarn(case).with_options(|options| options.interleave = false));
    }
    // One token; and many, of a real video.
    cases.push(Case { videos: 1, ..Case::new([1, 1, 1], [24, 24, 24], [44, 42, 42]) });
    cases.push(Case { videos: 1, ..Case::new([9, 30, 52], [1, 1, 1], [20, 22, 22]) });
    let mut other_base = Case::new([7, 2, 2], [2, 2, 2], [44, 42, 42]);
    other_base.rope.base = 500.0;
    cases.push(other_base.with_options(|options| options.eps = 0.5));
    cases
}

#[test]
fn bf16_results() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    for case in cases() {
        check::<bf16>(&gpu, rng, case);
    }
}

#[test]
fn e4m3_results() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    for (at, case) in cases().into_iter().enumerate() {
        let case = case.with_options(|options| {
            (options.output_quant_scale, options.v_quant_scale) =
                if at % 2 == 0 { (1.0, 1.0) } else { (20.0, 0.5) };
        });
        check::<F8E4M3>(&gpu, rng, case);
    }
    // What does not fit is cut off.
    let large =
        |options: &mut FusedQkOptions| (options.output_quant_scale, options.v_quant_scale) = (1e6, 1e6);
    check::<F8E4M3>(&gpu, rng, Case::new([1, 2, 2], [2, 2, 2], [44, 42, 42]).with_options(large));
}

#[test]
fn no_tokens() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let case = Case { videos: 0, ..Case::new([1, 3, 4], [2, 2, 2], [20, 22, 22]) };
    let table = RopeTable::new(&gpu.stream, &case.rope).unwrap();
    for batched in [false, true] {
        let mut problem = Problem::<bf16>::random(&gpu, &mut Rng::new(), Case { batched, ..case });
        problem.run(&gpu, &table).unwrap();
        gpu.synchronize();
        problem.out.iter().for_each(|out| out.assert_untouched());
    }
}

/// One table at a time, for as many users as there are; another may follow.
#[test]
fn tables() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    let other = gpu.fork();
    let first = Case::new([3, 4, 5], [4, 2, 2], [44, 42, 42]);
    let same_dim = Case { rope: Rope3d::new([42, 44, 42]), ..first };
    let mut another_base = first;
    another_base.rope.base = 100.0;
    let wider = Case { rope: Rope3d::new([88, 84, 84]), ..first };
    for round in 0..2 {
        for case in [first, same_dim, another_base, wider] {
            let table = RopeTable::new(&gpu.stream, &case.rope).unwrap();
            let again = RopeTable::new(&other.stream, &case.rope).unwrap();
            for wrong in [first, same_dim, another_base, wider] {
                if wrong.rope != case.rope {
                    refused(RopeTable::new(&gpu.stream, &wrong.rope), "rope");
                }
            }
            drop(table);
            refused(RopeTable::new(&gpu.stream, &Rope3d::new([20, 22, 22])), "rope");
            // Made on one stream, used on two.
            Problem::<bf16>::random(&gpu, rng, case).check(&gpu, &again);
            Problem::<bf16>::random(&other, rng, case).check(&other, &again);
            say(&format!("round {round}: {:?}", case.rope.channels));
        }
    }
}

/// Calls of several threads at once, which make the table at once, too.
#[test]
fn threads() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let case = Case::new([2, 3, 4], [6, 6, 6], [20, 22, 22]);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let gpu = &gpu;
            scope.spawn(move || {
                let gpu = gpu.fork();
                let table = RopeTable::new(&gpu.stream, &case.rope).unwrap();
                let mut problem = Problem::<bf16>::random(&gpu, &mut Rng::new(), case);
                for _ in 0..500 {
                    problem.run(&gpu, &table).unwrap();
                }
                problem.verify();
            });
        }
    });
}

#[test]
fn graph_replay() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    let case = Case::new([2, 3, 4], [24, 24, 24], [44, 42, 42]);
    let table = RopeTable::new(&gpu.stream, &case.rope).unwrap();
    Problem::<bf16>::random(&gpu, rng, case).check(&gpu, &table); // loads the kernel
    let mut problem = Problem::<bf16>::random(&gpu, rng, case);
    gpu.synchronize();
    let graph = problem.with_call(&gpu, &table, |call| captured(&gpu, call));
    problem.out.iter().for_each(|out| out.assert_untouched()); // captured is not run
    for _ in 0..3 {
        let next = Problem::<bf16>::random(&gpu, rng, case);
        problem.qkv.upload(&next.qkv.host);
        problem.qkv.host = next.qkv.host;
        graph.launch().unwrap();
        problem.verify();
        let replayed = problem.out.each_ref().map(|out| out.download());
        problem.run(&gpu, &table).unwrap();
        for (out, replayed) in problem.out.iter().zip(&replayed) {
            assert_same_bits("replay and run", &out.download(), replayed);
        }
    }
    // While a stream is captured, no other table is written; the same is there.
    drop(table);
    let (_, [other, same]) = capture(&gpu, || {
        [Rope3d::new([42, 44, 42]), case.rope].map(|rope| RopeTable::new(&gpu.stream, &rope))
    });
    refused(other, "stream");
    assert_eq!(same.unwrap().rope(), &case.rope);
}

/// The module ends the process if it gets no memory for its table. Here that is
/// an error, and afterwards a table can be made.
#[test]
fn tables_without_memory() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let mut case = Case::new([2, 3, 4], [2, 2, 2], [88, 84, 84]);
    case.rope.base = 77.0;
    let (mut taken, mut bytes) = (Vec::new(), 1usize << 36);
    while bytes >= 1 << 20 {
        // SAFETY: nobody reads it.
        match unsafe { gpu.cuda.alloc::<u8>(bytes) } {
            Ok(memory) => taken.push(memory),
            Err(_) => bytes /= 2,
        }
    }
    match RopeTable::new(&gpu.stream, &case.rope) {
        Err(FlashInferError::Cuda { code: 2, .. }) => {}
        other => panic!("no memory, but {other:?}"),
    }
    drop(taken);
    gpu.synchronize();
    let table = RopeTable::new(&gpu.stream, &case.rope).unwrap();
    Problem::<bf16>::random(&gpu, &mut Rng::new(), case).check(&gpu, &table);
}

/// An error that other code left in the thread does not end the process.
#[test]
fn errors_of_others() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let case = Case::new([2, 3, 4], [2, 2, 2], [44, 42, 42]);
    leave_cuda_error();
    let table = RopeTable::new(&gpu.stream, &case.rope).unwrap();
    let mut problem = Problem::<bf16>::random(&gpu, &mut Rng::new(), case);
    problem.run(&gpu, &table).unwrap();
    leave_cuda_error();
    problem.check(&gpu, &table);
}

/// Sizes over which the module ends the process are refused, and so are views
/// of another stream and tables of another device.
#[test]
fn wrong_input() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    let case = Case::new([2, 3, 4], [2, 2, 2], [44, 42, 42]);
    let table = RopeTable::new(&gpu.stream, &case.rope).unwrap();
    let mut refuse = |change: fn(&mut Problem<bf16>, &Gpu, &mut Rng), expected| {
        let mut problem = Problem::<bf16>::random(&gpu, rng, case);
        change(&mut problem, &gpu, rng);
        refused(problem.run(&gpu, &table), expected);
        problem.out.iter().for_each(|out| out.assert_untouched());
    };
    refuse(|problem, _, _| problem.case.patches = [2, 3, 5], "patches");
    refuse(|problem, _, _| problem.case.patches = [0, 3, 4], "patches");
    refuse(|problem, _, _| problem.case.options.output_fp8 = true, "out.q");
    refuse(
        |problem, gpu, rng| {
            problem.case.heads = [33, 1, 1];
            problem.case.rope = Rope3d::new([44, 42, 42]);
            *problem = Problem::random(gpu, rng, problem.case);
        },
        "out.q",
    );
    refuse(
        |problem, gpu, rng| {
            problem.case.rope = Rope3d::new([20, 22, 22]);
            *problem = Problem::random(gpu, rng, problem.case);
        },
        "out.q",
    );
    refuse(
        |problem, gpu, _| problem.out[1] = Mirrored::poisoned(gpu, &[48, 3, 128]).narrowed(1, 0, 2),
        "out.k",
    );
    refuse(|problem, gpu, rng| problem.weights[0] = Mirrored::random(gpu, rng, &[128]), "q_weight");
    refuse(
        |problem, gpu, rng| problem.weights[1] = Mirrored::random(gpu, rng, &[257]).narrowed(0, 1, 256),
        "k_weight",
    );
    refuse(
        |problem, gpu, rng| problem.qkv = Mirrored::random(gpu, rng, &[48, 800]).narrowed(1, 0, 768),
        "qkv",
    );
    let other = gpu.elsewhere();
    let mut problem = Problem::<bf16>::random(&gpu, rng, case);
    {
        let weight = problem.weights[0].device_view();
        let (qkv, k_weight) = (problem.qkv.copied_to(&other), problem.weights[1].device_view());
        let [mut q, mut k, mut v] = problem.out.each_mut().map(|out| out.device_view_mut());
        let call = fused_qk_rmsnorm_rope(
            &gpu.stream,
            &mut QkvOutput { q: q.reborrow(), k: k.reborrow(), v: v.reborrow() },
            &QkvInput { qkv: qkv.device_view(), q_weight: weight, k_weight, patches: case.patches },
            &table,
            &case.options,
        );
        refused(call, "qkv");
    }
    other.synchronize();
    problem.check(&gpu, &table);

    if gpu.runtime.device_count().unwrap() < 2 {
        return say("skipped in part: there is one GPU only");
    }
    let second = gpu.on_another();
    let mut there = Problem::<bf16>::random(&second, rng, case);
    refused(there.run(&second, &table), "table");
    there.check(&second, &RopeTable::new(&second.stream, &case.rope).unwrap());
}
