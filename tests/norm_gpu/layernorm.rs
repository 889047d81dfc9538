//! `layernorm` on the GPU against the CPU reference.

use crate::common::{Gpu, Mirrored, Number, Rng, captured, leave_cuda_error, refused};
use flashinfer_rs::{Result, norm, norm::NormOptions, reference};
use half::bf16;

/// The tensors of one call.
struct Case {
    input: Mirrored<bf16>,
    gamma: Mirrored<f32>,
    beta: Mirrored<f32>,
    out: Mirrored<bf16>,
}

impl Case {
    fn scaled(gpu: &Gpu, rng: &mut Rng, [rows, d]: [usize; 2], scale: f64) -> Self {
        Self {
            input: Mirrored::random_scaled(gpu, rng, &[rows, d], scale),
            gamma: Mirrored::random(gpu, rng, &[d]),
            beta: Mirrored::random(gpu, rng, &[d]),
            out: Mirrored::poisoned(gpu, &[rows, d]),
        }
    }

    fn random(gpu: &Gpu, rng: &mut Rng, shape: [usize; 2]) -> Self {
        Self::scaled(gpu, rng, shape, 1.0)
    }

    fn run(&mut self, gpu: &Gpu, options: &NormOptions) -> Result<()> {
        norm::layernorm(
            &gpu.stream,
            &mut self.out.device_view_mut(),
            &self.input.device_view(),
            &self.gamma.device_view(),
            &self.beta.device_view(),
            options,
        )
    }

    /// Compares what came out with the reference for what was uploaded.
    #[track_caller]
    fn verify(&self, options: &NormOptions) {
        let mut want = self.out.wide();
        reference::layernorm(
            &mut self.out.view_of(&mut want),
            &self.input.view(),
            &self.gamma.view(),
            &self.beta.view(),
            options,
        )
        .unwrap();
        self.out.assert_close("layer norm", &want, bf16::BOUND);
        self.input.assert_untouched();
    }

    #[track_caller]
    fn check(&mut self, gpu: &Gpu, options: &NormOptions) {
        self.run(gpu, options).unwrap();
        self.verify(options);
    }
}

/// Even and odd lengths, and those at the limits of shared memory: 24064 and
/// 24576 are beside the ones that the launcher has no memory for.
#[test]
fn sizes() {
    let Some(gpu) = Gpu::start() else { return };
    let (rng, options) = (&mut Rng::new(), NormOptions::default());
    for d in [1, 2, 63, 64, 65, 100, 1023, 1024, 3072, 4096, 5120, 16384] {
        for rows in [1, 7, 33] {
            Case::random(&gpu, rng, [rows, d]).check(&gpu, &options);
        }
    }
    for d in [24063, 24064, 24576, 24577, 65536, 100000] {
        Case::random(&gpu, rng, [3, d]).check(&gpu, &options);
    }
    Case::random(&gpu, rng, [5000, 64]).check(&gpu, &options);
}

/// `eps` counts where the input varies little.
#[test]
fn eps() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for eps in [1e-6, 1e-5, 1e-3, 1.0] {
        for scale in [1e-3, 1.0, 100.0] {
            Case::scaled(&gpu, rng, [9, 256], scale).check(&gpu, &NormOptions::with_eps(eps));
        }
    }
}

#[test]
fn no_rows() {
    let Some(gpu) = Gpu::start() else { return };
    let mut case = Case::random(&gpu, &mut Rng::new(), [0, 64]);
    case.out = Mirrored::poisoned(&gpu, &[4, 64]).narrowed(0, 0, 0);
    case.run(&gpu, &NormOptions::default()).unwrap();
    case.out.assert_untouched();
}

#[test]
fn graph_replay() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let (rng, options) = (&mut Rng::new(), NormOptions::default());
    for d in [4096, 32768] {
        Case::random(&gpu, rng, [5, d]).check(&gpu, &options); // loads the kernel
        let mut case = Case::random(&gpu, rng, [5, d]);
        gpu.synchronize();
        let graph = {
            let (input, gamma, beta) =
                (case.input.device_view(), case.gamma.device_view(), case.beta.device_view());
            let mut out = case.out.device_view_mut();
            captured(&gpu, || {
                let (gamma, beta) = (gamma, beta);
                norm::layernorm(&gpu.stream, &mut out.reborrow(), &input, &gamma, &beta, &options)
            })
        };
        case.out.assert_untouched(); // captured is not run
        for _ in 0..3 {
            let next = Case::random(&gpu, rng, [5, d]);
            case.input.upload(&next.input.host);
            case.input.host = next.input.host;
            graph.launch().unwrap();
            case.verify(&options);
        }
    }
}

/// Threads with rows that need different limits of shared memory, which are
/// the process's. The launcher says nothing when it fails.
#[test]
fn threads_with_different_sizes() {
    let Some(gpu) = Gpu::start() else { return };
    std::thread::scope(|scope| {
        for d in [64, 24576, 32768, 65536] {
            let gpu = &gpu;
            scope.spawn(move || {
                let (gpu, rng) = (gpu.fork(), &mut Rng::new());
                let mut case = Case::random(&gpu, rng, [2, d]);
                for _ in 0..2000 {
                    case.run(&gpu, &NormOptions::default()).unwrap();
                }
                case.verify(&NormOptions::default());
            });
        }
    });
}

/// An error that other code left in the thread is not taken for the launch's.
#[test]
fn errors_of_others() {
    let Some(gpu) = Gpu::start() else { return };
    let mut case = Case::random(&gpu, &mut Rng::new(), [3, 64]);
    case.run(&gpu, &NormOptions::default()).unwrap();
    leave_cuda_error();
    case.check(&gpu, &NormOptions::default());
}

#[test]
fn wrong_input() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let options = NormOptions::default();
    let mut refuse = |shape, change: fn(&mut Case, &Gpu, &mut Rng), expected| {
        let mut case = Case::random(&gpu, rng, shape);
        change(&mut case, &gpu, rng);
        refused(case.run(&gpu, &options), expected);
        case.out.assert_untouched();
    };
    let small = [8, 64];
    refuse(
        small,
        |case, gpu, rng| case.input = Mirrored::random(gpu, rng, &[8, 72]).narrowed(1, 0, 64),
        "input",
    );
    refuse(small, |case, gpu, rng| case.input = Mirrored::random(gpu, rng, &[512]), "input");
    refuse(small, |case, gpu, _| case.out = Mirrored::poisoned(gpu, &[8, 72]).narrowed(1, 0, 64), "out");
    refuse(small, |case, gpu, _| case.out = Mirrored::poisoned(gpu, &[7, 64]), "out");
    refuse(small, |case, gpu, rng| case.gamma = Mirrored::random(gpu, rng, &[63]), "gamma");
    refuse(small, |case, gpu, rng| case.beta = Mirrored::random(gpu, rng, &[65]).narrowed(0, 1, 64), "beta");
    // Shared memory that the launcher does not ask for, and more than there is.
    for d in [24065, 24575, 1 << 18] {
        refuse([2, d], |_, _, _| {}, "input");
    }
    let other = gpu.elsewhere();
    let mut case = Case::random(&gpu, rng, small);
    let call = norm::layernorm(
        &gpu.stream,
        &mut case.out.device_view_mut(),
        &case.input.device_view(),
        &case.gamma.device_view(),
        &case.beta.copied_to(&other).device_view(),
        &options,
    );
    refused(call, "beta");
    other.synchronize();
    case.out.assert_untouched();
}
