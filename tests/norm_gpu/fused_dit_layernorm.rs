//! `fused_dit_layernorm` on the GPU against the CPU reference.

use crate::common::{Gpu, Mirrored, Number, Rng, captured, leave_cuda_error, refused};
use flashinfer_rs::{
    Result, TensorRef,
    norm::{Biased, DitInput, DitMode, DitOutput, NormOptions, fused_dit_layernorm},
    reference,
};
use half::bf16;

const HIDDEN: usize = 3072;

/// Which tensors a call gets.
#[derive(Clone, Copy, Debug)]
struct Case {
    shape: [usize; 3],
    mode: usize,
    residual: bool,
    scaled: bool,
}

impl Case {
    fn new(batch: usize, rows: usize, mode: usize) -> Self {
        Self { shape: [batch, rows, HIDDEN], mode, residual: true, scaled: false }
    }
}

/// The tensors of one call. Gate, scale and shift are three of the six parts
/// of the modulation.
struct Problem {
    case: Case,
    input: Mirrored<bf16>,
    residual: Mirrored<bf16>,
    modulation: Mirrored<bf16>,
    /// Of gate, scale and shift; gamma and beta.
    vectors: [Mirrored<f32>; 5],
    factor: Mirrored<f32>,
    residual_out: Mirrored<bf16>,
    norm_out: Mirrored<bf16>,
}

/// What a call reads, of host or of device tensors.
fn dit_input<'a>(
    case: Case,
    [input, residual, modulation]: [TensorRef<'a>; 3],
    vectors: [TensorRef<'a>; 5],
    factor: TensorRef<'a>,
) -> DitInput<'a> {
    let part = |part, vector: usize| Biased::new(modulation.select(2, part).unwrap(), vectors[vector]);
    let (gate, scale, shift) = (part(2, 0), part(4, 1), part(5, 2));
    let mode = match case.mode {
        0 => DitMode::GateResidualGammaBeta { gate, gamma: vectors[3], beta: vectors[4] },
        1 => DitMode::ResidualScaleShift { scale, shift },
        _ => DitMode::GateResidualScaleShift { gate, scale, shift },
    };
    let mut input = DitInput::new(input, case.residual.then_some(residual), mode);
    input.input_sf_scale = case.scaled.then_some(factor);
    input
}

impl Problem {
    fn random(gpu: &Gpu, rng: &mut Rng, case: Case) -> Self {
        let [batch, rows, _] = case.shape;
        Self {
            case,
            input: Mirrored::random(gpu, rng, &case.shape),
            residual: Mirrored::random_scaled(gpu, rng, &case.shape, 3.0),
            modulation: Mirrored::random_scaled(gpu, rng, &[batch, rows, 6, HIDDEN], 0.5),
            vectors: [0; 5].map(|_| Mirrored::random(gpu, rng, &[HIDDEN])),
            factor: Mirrored::new(gpu, &[1], vec![0.3]),
            residual_out: Mirrored::poisoned(gpu, &case.shape),
            norm_out: Mirrored::poisoned(gpu, &case.shape),
        }
    }

    /// Does something with a call that is ready, on the caller's stream.
    fn with_call<R>(
        &mut self,
        caller: &Gpu,
        options: &NormOptions,
        with: impl FnOnce(&mut dyn FnMut() -> Result<()>) -> R,
    ) -> R {
        let tensors = [&self.input, &self.residual, &self.modulation].map(|tensor| tensor.device_view());
        let vectors = self.vectors.each_ref().map(|vector| vector.device_view());
        let factor = self.factor.device_view();
        let (mut residual, mut norm) = (self.residual_out.device_view_mut(), self.norm_out.device_view_mut());
        let input = dit_input(self.case, tensors, vectors, factor);
        let mut out = DitOutput { residual: residual.reborrow(), norm: norm.reborrow() };
        with(&mut || fused_dit_layernorm(&caller.stream, &mut out, &input, options))
    }

    fn run(&mut self, gpu: &Gpu, options: &NormOptions) -> Result<()> {
        self.with_call(gpu, options, |call| call())
    }

    /// Compares what came out with the reference for what was uploaded.
    #[track_caller]
    fn verify(&self, options: &NormOptions) {
        let (mut want_residual, mut want_norm) = (self.residual_out.wide(), self.norm_out.wide());
        let input = dit_input(
            self.case,
            [&self.input, &self.residual, &self.modulation].map(|tensor| tensor.view()),
            self.vectors.each_ref().map(|vector| vector.view()),
            self.factor.view(),
        );
        reference::fused_dit_layernorm(
            &mut DitOutput {
                residual: self.residual_out.view_of(&mut want_residual),
                norm: self.norm_out.view_of(&mut want_norm),
            },
            &input,
            options,
        )
        .unwrap();
        let case = self.case;
        self.residual_out.assert_close(&format!("residual of {case:?}"), &want_residual, bf16::BOUND);
        self.norm_out.assert_close(&format!("norm of {case:?}"), &want_norm, bf16::BOUND);
        for tensor in [&self.input, &self.residual, &self.modulation] {
            tensor.assert_untouched();
        }
    }

    #[track_caller]
    fn check(&mut self, gpu: &Gpu, options: &NormOptions) {
        self.run(gpu, options).unwrap();
        self.verify(options);
    }
}

#[test]
fn shapes_and_modes() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for mode in 0..3 {
        for (batch, rows) in [(1, 1), (1, 7), (2, 5), (5, 1), (3, 32), (1, 200)] {
            Problem::random(&gpu, rng, Case::new(batch, rows, mode)).check(&gpu, &NormOptions::default());
        }
        for (residual, scaled) in [(false, false), (true, true), (false, true)] {
            let case = Case { residual, scaled, ..Case::new(2, 6, mode) };
            Problem::random(&gpu, rng, case).check(&gpu, &NormOptions::default());
        }
    }
}

/// `eps` counts where the sum varies little.
#[test]
fn eps() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for mode in 0..3 {
        for eps in [1e-6, 1e-3, 1.0] {
            let mut problem = Problem::random(&gpu, rng, Case { residual: false, ..Case::new(1, 4, mode) });
            problem.input = Mirrored::random_scaled(&gpu, rng, &problem.case.shape, 0.01);
            problem.check(&gpu, &NormOptions::with_eps(eps));
        }
    }
}

#[test]
fn no_rows() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for (batch, rows) in [(0, 3), (3, 0)] {
        for mode in 0..3 {
            let mut problem = Problem::random(&gpu, rng, Case::new(batch, rows, mode));
            problem.run(&gpu, &NormOptions::default()).unwrap();
            problem.residual_out.assert_untouched();
            problem.norm_out.assert_untouched();
        }
    }
}

#[test]
fn graph_replay() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let (rng, options) = (&mut Rng::new(), NormOptions::default());
    for mode in 0..3 {
        let case = Case { scaled: true, ..Case::new(2, 5, mode) };
        Problem::random(&gpu, rng, case).check(&gpu, &options); // loads the kernel
        let mut problem = Problem::random(&gpu, rng, case);
        gpu.synchronize();
        let graph = problem.with_call(&gpu, &options, |call| captured(&gpu, call));
        problem.residual_out.assert_untouched(); // captured is not run
        problem.norm_out.assert_untouched();
        for _ in 0..2 {
            let next = Problem::random(&gpu, rng, case);
            for (tensor, next) in [
                (&mut problem.input, next.input),
                (&mut problem.residual, next.residual),
                (&mut problem.modulation, next.modulation),
            ] {
                tensor.upload(&next.host);
                tensor.host = next.host;
            }
            graph.launch().unwrap();
            problem.verify(&options);
        }
    }
}

/// An error that other code left in the thread is not taken for the launch's.
#[test]
fn errors_of_others() {
    let Some(gpu) = Gpu::start() else { return };
    let mut problem = Problem::random(&gpu, &mut Rng::new(), Case::new(1, 3, 2));
    problem.run(&gpu, &NormOptions::default()).unwrap();
    leave_cuda_error();
    problem.check(&gpu, &NormOptions::default());
}

/// What the unit tests cannot see: strides of real tensors, and streams. The
/// process goes on, although the module ends it over a wrong row length.
#[test]
fn wrong_input() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let options = NormOptions::default();
    let mut refuse = |change: fn(&mut Problem, &Gpu), expected| {
        let mut problem = Problem::random(&gpu, rng, Case::new(2, 5, 2));
        change(&mut problem, &gpu);
        refused(problem.run(&gpu, &options), expected);
        problem.residual_out.assert_untouched();
        problem.norm_out.assert_untouched();
    };
    refuse(|problem, gpu| problem.input = Mirrored::poisoned(gpu, &[2, 5, 4096]), "input");
    refuse(|problem, gpu| problem.input = Mirrored::poisoned(gpu, &[2, 5, 64]), "input");
    refuse(|problem, gpu| problem.residual = Mirrored::poisoned(gpu, &[5, 2, HIDDEN]), "residual");
    refuse(|problem, gpu| problem.modulation = Mirrored::poisoned(gpu, &[2, 5, 7, HIDDEN]), "gate");
    refuse(
        |problem, gpu| problem.modulation = Mirrored::poisoned(gpu, &[2, 6, 6, HIDDEN]).narrowed(1, 0, 5),
        "gate",
    );
    refuse(|problem, gpu| problem.vectors[1] = Mirrored::poisoned(gpu, &[1]), "scale.bias");
    refuse(
        |problem, gpu| problem.vectors[2] = Mirrored::poisoned(gpu, &[HIDDEN + 4]).narrowed(0, 4, HIDDEN),
        "shift.bias",
    );
    refuse(
        |problem, gpu| {
            problem.case.scaled = true;
            problem.factor = Mirrored::poisoned(gpu, &[2]);
        },
        "input_sf_scale",
    );
    refuse(|problem, gpu| problem.residual_out = Mirrored::poisoned(gpu, &[2, 4, HIDDEN]), "out.residual");
    refuse(|problem, gpu| problem.norm_out = Mirrored::poisoned(gpu, &[2, 5, 384]), "out.norm");

    // All views of another stream than the call's. Packed results, which have
    // no kernel here, are refused in the unit tests.
    let other = gpu.elsewhere();
    let mut problem = Problem::random(&gpu, rng, Case::new(2, 5, 1));
    refused(problem.with_call(&other, &options, |call| call()), "input");
    other.synchronize();
    problem.norm_out.assert_untouched();
}
