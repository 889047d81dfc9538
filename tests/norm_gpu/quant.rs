//! `rmsnorm_quant` and `fused_add_rmsnorm_quant` on the GPU against the CPU
//! reference.

use crate::common::{Gpu, Mirrored, Number, Rng, assert_same_bits, captured, is_0_7, norm::HIDDEN, refused};
use flashinfer_rs::{DType, ModuleName, Result, norm, norm::NormOptions, reference};
use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};

/// The tensors of one call; the residual is that of the fused addition.
struct Case<T, Q> {
    input: Mirrored<T>,
    residual: Option<Mirrored<T>>,
    weight: Mirrored<T>,
    scale: Mirrored<f32>,
    out: Mirrored<Q>,
}

impl<T: Number, Q: Number> Case<T, Q> {
    fn random(gpu: &Gpu, rng: &mut Rng, [rows, d]: [usize; 2], scale: f32, fused: bool) -> Self {
        Self {
            input: Mirrored::random(gpu, rng, &[rows, d]),
            residual: fused.then(|| Mirrored::random_scaled(gpu, rng, &[rows, d], 4.0)),
            weight: Mirrored::random(gpu, rng, &[d]),
            scale: Mirrored::new(gpu, &[1], vec![scale]),
            out: Mirrored::poisoned(gpu, &[rows, d]),
        }
    }

    fn run(&mut self, gpu: &Gpu, options: &NormOptions) -> Result<()> {
        let (input, weight, scale) =
            (self.input.device_view(), self.weight.device_view(), self.scale.device_view());
        let mut out = self.out.device_view_mut();
        let (out, input, weight, scale) = (&mut out.reborrow(), &input, &weight, &scale);
        match &mut self.residual {
            None => norm::rmsnorm_quant(&gpu.stream, out, input, weight, scale, options),
            Some(residual) => {
                let residual = &mut residual.device_view_mut();
                let residual = &mut residual.reborrow();
                norm::fused_add_rmsnorm_quant(&gpu.stream, out, input, residual, weight, scale, options)
            }
        }
    }

    /// Compares what came out with the reference for what was uploaded.
    #[track_caller]
    fn verify(&self, options: &NormOptions) {
        let mut want = self.out.wide();
        let out = &mut self.out.view_of(&mut want);
        let (input, weight, scale) = (&self.input.view(), &self.weight.view(), &self.scale.view());
        match &self.residual {
            None => reference::rmsnorm_quant(out, input, weight, scale, options).unwrap(),
            Some(residual) => {
                // The residual is rounded as the kernel rounds it.
                let mut sum = residual.host.clone();
                let sum_view = &mut residual.view_of(&mut sum);
                reference::fused_add_rmsnorm_quant(out, input, sum_view, weight, scale, options).unwrap();
                assert_same_bits("residual", &residual.download(), &sum);
            }
        }
        self.out.assert_close("quantized norm", &want, Q::BOUND);
        self.input.assert_untouched();
    }

    #[track_caller]
    fn check(&mut self, gpu: &Gpu, options: &NormOptions) {
        self.run(gpu, options).unwrap();
        self.verify(options);
    }
}

fn sizes<T: Number, Q: Number>(fused: bool) {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    // A row of one element may be too small for the precision of a row.
    for d in HIDDEN.into_iter().filter(|&d| d > 1) {
        for (rows, scale) in [(1, 0.5), (7, 0.02), (33, 0.1)] {
            let options = NormOptions::default();
            Case::<T, Q>::random(&gpu, rng, [rows, d], scale, fused).check(&gpu, &options);
        }
    }
}

crate::typed_tests! {
    sizes_f16_e4m3: sizes::<f16, F8E4M3>(false);
    sizes_f16_e5m2: sizes::<f16, F8E5M2>(false);
    sizes_bf16_e4m3: sizes::<bf16, F8E4M3>(false);
    sizes_bf16_e5m2: sizes::<bf16, F8E5M2>(false);
    fused_add_sizes_f16_e4m3: sizes::<f16, F8E4M3>(true);
    fused_add_sizes_f16_e5m2: sizes::<f16, F8E5M2>(true);
    fused_add_sizes_bf16_e4m3: sizes::<bf16, F8E4M3>(true);
    fused_add_sizes_bf16_e5m2: sizes::<bf16, F8E5M2>(true);
}

/// What does not fit is cut off at ±448, for both types; with FlashInfer 0.7, `e5m2` at its
/// own largest number.
#[test]
fn cut_off() {
    fn run<Q: Number>(gpu: &Gpu, rng: &mut Rng) {
        for fused in [false, true] {
            let mut case = Case::<bf16, Q>::random(gpu, rng, [5, 512], 1e-4, fused);
            if Q::DTYPE == DType::E5M2 && is_0_7(gpu.runtime.module(&ModuleName::NORM).unwrap()) {
                case.run(gpu, &NormOptions::default()).unwrap();
                let largest =
                    case.out.download().iter().map(|number| number.to_f64().abs()).fold(0.0, f64::max);
                assert!(largest > 448.0 && largest <= 57344.0, "{largest}");
                continue;
            }
            case.check(gpu, &NormOptions::default());
            let content = case.out.download();
            let cut = content.iter().filter(|number| number.to_f64().abs() == 448.0).count();
            assert!(cut > content.len() / 2, "{cut} of {}", content.len());
            assert!(content.iter().all(|number| number.to_f64().abs() <= 448.0));
        }
    }
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    run::<F8E4M3>(&gpu, rng);
    run::<F8E5M2>(&gpu, rng);
}

/// Rows with gaps, which stay as they were; other options.
#[test]
fn strided_rows() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for fused in [false, true] {
        for (rows, d, gap_in, gap_out, gap_residual) in
            [(7, 128, 8, 0, 16), (33, 4096, 64, 8, 0), (5, 100, 4, 12, 4)]
        {
            let mut case = Case::<f16, F8E4M3>::random(&gpu, rng, [rows, d], 0.1, fused);
            case.input = Mirrored::random(&gpu, rng, &[rows, d + gap_in]).narrowed(1, gap_in, d);
            case.out = Mirrored::poisoned(&gpu, &[rows, d + gap_out]).narrowed(1, 0, d);
            if fused {
                let residual = Mirrored::random(&gpu, rng, &[rows, d + gap_residual]);
                case.residual = Some(residual.narrowed(1, gap_residual, d));
            }
            case.check(&gpu, &NormOptions::with_eps(1e-3));
        }
    }
}

#[test]
fn no_rows() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for fused in [false, true] {
        let mut case = Case::<f16, F8E4M3>::random(&gpu, rng, [0, 64], 1.0, fused);
        case.out = Mirrored::poisoned(&gpu, &[4, 64]).narrowed(0, 0, 0);
        case.run(&gpu, &NormOptions::default()).unwrap();
        case.out.assert_untouched();
    }
}

/// With programmatic dependent launch, which must be asked for, the bits are
/// the same. The scale was written long before.
#[test]
fn pdl() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut case = Case::<bf16, F8E4M3>::random(&gpu, rng, [64, 4096], 0.05, false);
    let mut bits = |enable_pdl| {
        let mut options = NormOptions::default();
        options.enable_pdl = enable_pdl;
        for _ in 0..10 {
            case.run(&gpu, &options).unwrap();
        }
        case.verify(&options);
        case.out.download()
    };
    let default = bits(None);
    assert_same_bits("PDL off", &bits(Some(false)), &default);
    if gpu.compute_capability().0 >= 9 {
        assert_same_bits("PDL on", &bits(Some(true)), &default);
    }
}

#[test]
fn graph_replay() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let (rng, options) = (&mut Rng::new(), NormOptions::default());
    for fused in [false, true] {
        let random = |rng: &mut Rng, scale| Case::<f16, F8E4M3>::random(&gpu, rng, [7, 4096], scale, fused);
        random(rng, 1.0).check(&gpu, &options); // loads the kernel
        let mut case = random(rng, 1.0);
        gpu.synchronize();
        let graph = {
            let (input, weight, scale) =
                (case.input.device_view(), case.weight.device_view(), case.scale.device_view());
            let mut out = case.out.device_view_mut();
            let mut residual = case.residual.as_mut().map(|residual| residual.device_view_mut());
            captured(&gpu, || {
                let (out, input, weight, scale) = (&mut out.reborrow(), &input, &weight, &scale);
                match &mut residual {
                    None => norm::rmsnorm_quant(&gpu.stream, out, input, weight, scale, &options),
                    Some(residual) => {
                        let residual = &mut residual.reborrow();
                        norm::fused_add_rmsnorm_quant(
                            &gpu.stream,
                            out,
                            input,
                            residual,
                            weight,
                            scale,
                            &options,
                        )
                    }
                }
            })
        };
        case.out.assert_untouched(); // captured is not run
        for scale in [0.5, 0.02, 0.1] {
            let next = random(rng, scale);
            case.input.upload(&next.input.host);
            case.input.host = next.input.host;
            case.scale.upload(&next.scale.host);
            case.scale.host = next.scale.host;
            if let (Some(residual), Some(next)) = (&mut case.residual, next.residual) {
                residual.upload(&next.host);
                residual.host = next.host;
            }
            graph.launch().unwrap();
            case.verify(&options);
        }
    }
}

#[test]
fn wrong_input() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let options = NormOptions::default();
    let mut refuse = |fused, change: fn(&mut Case<f16, F8E4M3>, &Gpu, &mut Rng), expected| {
        let mut case = Case::<f16, F8E4M3>::random(&gpu, rng, [8, 64], 1.0, fused);
        change(&mut case, &gpu, rng);
        refused(case.run(&gpu, &options), expected);
        case.out.assert_untouched();
        if let Some(residual) = &case.residual {
            residual.assert_untouched();
        }
    };
    for fused in [false, true] {
        refuse(fused, |case, gpu, _| case.scale = Mirrored::new(gpu, &[2], vec![1.0; 2]), "scale");
        refuse(fused, |case, gpu, _| case.out = Mirrored::poisoned(gpu, &[8, 128]), "out");
        refuse(fused, |case, gpu, _| case.out = Mirrored::poisoned(gpu, &[8, 68]).narrowed(1, 0, 64), "out");
        refuse(fused, |case, gpu, rng| case.weight = Mirrored::random(gpu, rng, &[128]), "weight");
        refuse(
            fused,
            |case, gpu, rng| case.input = Mirrored::random(gpu, rng, &[64, 8]).permuted(&[1, 0]),
            "input",
        );
    }
    refuse(true, |case, gpu, rng| case.residual = Some(Mirrored::random(gpu, rng, &[7, 64])), "residual");
    // A row of 1 MiB in f32 is more shared memory than any GPU has.
    let mut case = Case::<f16, F8E4M3>::random(&gpu, rng, [1, 1 << 18], 1.0, true);
    refused(case.run(&gpu, &options), "input");
    case.out.assert_untouched();
    // Without an addition a row need not fit.
    Case::<f16, F8E4M3>::random(&gpu, rng, [1, 1 << 18], 1.0, false).check(&gpu, &options);

    // A result that is no 8-bit float, and views of another stream.
    let mut case = Case::<f16, f16>::random(&gpu, rng, [8, 64], 1.0, false);
    refused(case.run(&gpu, &options), "out");
    let other = gpu.elsewhere();
    let mut case = Case::<f16, F8E4M3>::random(&gpu, rng, [8, 64], 1.0, false);
    let call = norm::rmsnorm_quant(
        &gpu.stream,
        &mut case.out.device_view_mut(),
        &case.input.device_view(),
        &case.weight.device_view(),
        &case.scale.copied_to(&other).device_view(),
        &options,
    );
    refused(call, "scale");
    other.synchronize();
    case.out.assert_untouched();
}
