//! The cases that all norms have in common.

use flashinfer_rs::{Result, Stream, TensorMut, TensorRef, norm::NormOptions};
use half::{bf16, f16};

use super::{Gpu, Mirrored, Number, Rng, assert_same_bits, captured, refused};

/// An operation with an output of its own, and its reference.
#[derive(Clone, Copy)]
pub struct Norm {
    pub op: fn(&Stream, &mut TensorMut<'_>, &TensorRef<'_>, &TensorRef<'_>, &NormOptions) -> Result<()>,
    pub reference: fn(&mut TensorMut<'_>, &TensorRef<'_>, &TensorRef<'_>, &NormOptions) -> Result<()>,
}

/// An operation on input and residual in place, and its reference.
#[derive(Clone, Copy)]
pub struct FusedAdd {
    pub op: fn(&Stream, &mut TensorMut<'_>, &mut TensorMut<'_>, &TensorRef<'_>, &NormOptions) -> Result<()>,
    pub reference: fn(&mut TensorMut<'_>, &mut TensorMut<'_>, &TensorRef<'_>, &NormOptions) -> Result<()>,
}

/// Row lengths: every vector width of the kernels (8, 4, 2, 1), lengths that
/// are no multiple of a warp's reach, and those of real models.
pub const HIDDEN: [usize; 12] = [1, 64, 65, 66, 72, 100, 128, 576, 4096, 5120, 8192, 16384];

/// Runs one case and compares it with the reference.
#[track_caller]
pub fn check<T: Number>(
    gpu: &Gpu,
    norm: Norm,
    input: &Mirrored<T>,
    out: &mut Mirrored<T>,
    weight: &Mirrored<T>,
    options: &NormOptions,
) {
    let mut want = out.wide();
    (norm.reference)(&mut out.view_of(&mut want), &input.view(), &weight.view(), options).unwrap();
    let call = (norm.op)(
        &gpu.stream,
        &mut out.device_view_mut(),
        &input.device_view(),
        &weight.device_view(),
        options,
    );
    call.unwrap();
    out.assert_close("norm", &want, T::BOUND);
    input.assert_untouched();
}

/// Runs one case in place and compares input and residual with the reference.
#[track_caller]
pub fn check_fused<T: Number>(
    gpu: &Gpu,
    norm: FusedAdd,
    input: &mut Mirrored<T>,
    residual: &mut Mirrored<T>,
    weight: &Mirrored<T>,
    options: &NormOptions,
) {
    // The residual is rounded as the kernel rounds it, the norm stays exact.
    let (mut want, mut want_residual) = (input.wide(), residual.host.clone());
    (norm.reference)(
        &mut input.view_of(&mut want),
        &mut residual.view_of(&mut want_residual),
        &weight.view(),
        options,
    )
    .unwrap();
    let call = (norm.op)(
        &gpu.stream,
        &mut input.device_view_mut(),
        &mut residual.device_view_mut(),
        &weight.device_view(),
        options,
    );
    call.unwrap();
    input.assert_close("fused norm", &want, T::BOUND);
    assert_same_bits("residual", &residual.download(), &want_residual);
}

/// Numbers of rows and row lengths, for `f16` and `bf16`.
pub fn sizes(norm: Norm) {
    fn run<T: Number>(gpu: &Gpu, rng: &mut Rng, norm: Norm) {
        let cases = HIDDEN.iter().flat_map(|&d| [1, 7, 64].map(|rows| (rows, d)));
        for (rows, d) in cases.chain([(4096, 128), (4096, 576)]) {
            let input = Mirrored::<T>::random(gpu, rng, &[rows, d]);
            let weight = Mirrored::random(gpu, rng, &[d]);
            let mut out = Mirrored::poisoned(gpu, &[rows, d]);
            check(gpu, norm, &input, &mut out, &weight, &NormOptions::default());
        }
    }
    let Some(gpu) = Gpu::start() else { return };
    let mut rng = Rng::new();
    run::<f16>(&gpu, &mut rng, norm);
    run::<bf16>(&gpu, &mut rng, norm);
}

/// Rows with gaps, which stay as they were.
pub fn strided_rows(norm: Norm) {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for (rows, d, gap_in, gap_out) in [(7, 128, 8, 0), (7, 576, 0, 64), (33, 4096, 4096, 8), (5, 100, 4, 12)]
    {
        let input = Mirrored::<bf16>::random(&gpu, rng, &[rows, d + gap_in]).narrowed(1, gap_in, d);
        let mut out = Mirrored::poisoned(&gpu, &[rows, d + gap_out]).narrowed(1, 0, d);
        let weight = Mirrored::random(&gpu, rng, &[d]);
        check(&gpu, norm, &input, &mut out, &weight, &NormOptions::default());
    }
}

/// `eps` counts where the input is small.
pub fn eps(norm: Norm) {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for eps in [1e-6, 1e-5, 1e-3, 1.0] {
        for scale in [1e-3, 1.0, 100.0] {
            let input = Mirrored::<f16>::random_scaled(&gpu, rng, &[9, 256], scale);
            let weight = Mirrored::random(&gpu, rng, &[256]);
            let mut out = Mirrored::poisoned(&gpu, &[9, 256]);
            check(&gpu, norm, &input, &mut out, &weight, &NormOptions::with_eps(eps));
        }
    }
}

/// A batch without rows writes nothing.
pub fn no_rows(norm: Norm) {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let input = Mirrored::<f16>::random(&gpu, rng, &[4, 64]).narrowed(0, 0, 0);
    let weight = Mirrored::random(&gpu, rng, &[64]);
    let mut out = Mirrored::poisoned(&gpu, &[4, 64]).narrowed(0, 0, 0);
    check(&gpu, norm, &input, &mut out, &weight, &NormOptions::default());
    out.assert_untouched();
}

/// With and without programmatic dependent launch the bits are the same, also
/// in a chain where each launch reads what the one before wrote.
pub fn pdl(norm: Norm) {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let input = Mirrored::<f16>::random(&gpu, rng, &[64, 4096]);
    let weight = Mirrored::random(&gpu, rng, &[4096]);
    let chain = |enable_pdl| {
        let mut options = NormOptions::default();
        options.enable_pdl = enable_pdl;
        let mut buffers = [0, 1].map(|_| Mirrored::<f16>::poisoned(&gpu, &[64, 4096]));
        check(&gpu, norm, &input, &mut buffers[0], &weight, &options);
        let [first, second] = &mut buffers;
        {
            let (mut first, mut second) = (first.device_view_mut(), second.device_view_mut());
            let weight = weight.device_view();
            for _ in 0..4 {
                (norm.op)(&gpu.stream, &mut second.reborrow(), &first.as_ref(), &weight, &options).unwrap();
                (norm.op)(&gpu.stream, &mut first.reborrow(), &second.as_ref(), &weight, &options).unwrap();
            }
        }
        buffers[0].download()
    };
    let default = chain(None);
    assert_same_bits("PDL off", &chain(Some(false)), &default);
    if gpu.compute_capability().0 >= 9 {
        assert_same_bits("PDL on", &chain(Some(true)), &default);
    }
}

/// Everything that a norm with an output must refuse.
pub fn wrong_input(norm: Norm) {
    let Some(gpu) = Gpu::start() else { return };
    let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
    let options = NormOptions::default();
    let input = Mirrored::<f16>::random(&gpu, rng, &[8, 64]);
    let weight = Mirrored::<f16>::random(&gpu, rng, &[64]);
    let mut out = Mirrored::<f16>::poisoned(&gpu, &[8, 64]);
    {
        let (input, weight) = (input.device_view(), weight.device_view());
        let mut out = out.device_view_mut();
        let mut run = |input: TensorRef<'_>, weight: TensorRef<'_>| {
            (norm.op)(&gpu.stream, &mut out.reborrow(), &input, &weight, &options)
        };
        let (good, good_weight) = (input, weight);

        let brains = Mirrored::<bf16>::random(&gpu, rng, &[8, 64]);
        let brains = brains.device_view();
        let singles = Mirrored::<f32>::random(&gpu, rng, &[8, 64]);
        let singles = singles.device_view();
        refused(run(singles, good_weight), "input");
        refused(run(brains, good_weight), "out");
        refused(run(good, brains.select(0, 0).unwrap()), "weight");

        refused(run(good.select(0, 0).unwrap(), good_weight), "input");
        refused(run(good, good), "weight");
        refused(run(good.narrow(0, 0, 7).unwrap(), good_weight), "out");
        refused(run(good.narrow(1, 0, 56).unwrap(), good_weight), "out");
        refused(run(good, good_weight.narrow(0, 0, 56).unwrap()), "weight");
        refused(run(good.narrow(1, 0, 0).unwrap(), good_weight.narrow(0, 0, 0).unwrap()), "input");

        let wide = Mirrored::<f16>::random(&gpu, rng, &[64, 66]);
        let wide = wide.device_view();
        let column = wide.select(1, 3).unwrap();
        let columns = wide.narrow(1, 0, 8).unwrap().permute(&[1, 0]).unwrap();
        refused(run(columns, good_weight), "input"); // last stride
        refused(run(good, column), "weight");
        let uneven_rows = wide.narrow(0, 0, 8).unwrap().narrow(1, 0, 64).unwrap();
        refused(run(uneven_rows, good_weight), "input"); // row stride of 132 bytes
        let row = wide.select(0, 0).unwrap();
        refused(run(good, row.narrow(0, 1, 64).unwrap()), "weight"); // address

        let host = vec![f16::ONE; 8 * 64];
        refused(run(TensorRef::from_slice(&host, &[8, 64]).unwrap(), good_weight), "input");
        refused(run(good, TensorRef::from_slice(&host, &[64]).unwrap()), "weight");
    }
    {
        // Views of another stream than the call's.
        let (elsewhere, weight) = (input.copied_to(&other), weight.device_view());
        let mut shown = out.device_view_mut();
        refused((norm.op)(&gpu.stream, &mut shown, &elsewhere.device_view(), &weight, &options), "input");
        refused(misaligned_out(&gpu, norm, &input.device_view(), &weight), "out");
    }
    {
        let (input, weight) = (input.device_view(), weight.device_view());
        let mut elsewhere = out.copied_to(&other);
        let call = (norm.op)(&gpu.stream, &mut elsewhere.device_view_mut(), &input, &weight, &options);
        refused(call, "out");
        elsewhere.assert_untouched();
    }
    other.synchronize();
    out.assert_untouched();
    // The refused calls left everything usable.
    check(&gpu, norm, &input, &mut out, &weight, &options);
}

/// An output that starts at an odd element, which must stay as it is.
fn misaligned_out(gpu: &Gpu, norm: Norm, input: &TensorRef<'_>, weight: &TensorRef<'_>) -> Result<()> {
    use flashinfer_rs::gpu::TensorExtMut;
    let poison = [f16::NAN; 8 * 64 + 1];
    let mut storage = gpu.cuda.clone_htod(&poison).unwrap();
    let result = {
        let mut odd = storage.slice_mut(1..);
        let mut out = odd.tensor_mut(&gpu.cuda, &[8, 64]).unwrap();
        (norm.op)(&gpu.stream, &mut out.view_mut(), input, weight, &NormOptions::default())
    };
    assert_same_bits("untouched", &gpu.cuda.clone_dtoh(&storage).unwrap(), &poison);
    result
}

/// Numbers of rows and row lengths of a fused addition.
pub fn fused_sizes(norm: FusedAdd) {
    fn run<T: Number>(gpu: &Gpu, rng: &mut Rng, norm: FusedAdd) {
        let cases = HIDDEN.iter().flat_map(|&d| [1, 7, 64].map(|rows| (rows, d)));
        for (rows, d) in cases.chain([(4096, 128)]) {
            let mut input = Mirrored::<T>::random(gpu, rng, &[rows, d]);
            let mut residual = Mirrored::random_scaled(gpu, rng, &[rows, d], 4.0);
            let weight = Mirrored::random(gpu, rng, &[d]);
            check_fused(gpu, norm, &mut input, &mut residual, &weight, &NormOptions::default());
        }
    }
    let Some(gpu) = Gpu::start() else { return };
    let mut rng = Rng::new();
    run::<f16>(&gpu, &mut rng, norm);
    run::<bf16>(&gpu, &mut rng, norm);
}

/// Rows with gaps of different widths in input and residual; other options.
pub fn fused_strided_rows(norm: FusedAdd) {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for (rows, d, gap_in, gap_residual) in [(7, 128, 8, 0), (33, 4096, 0, 64), (5, 100, 4, 12)] {
        for enable_pdl in [None, Some(false)] {
            let mut options = NormOptions::with_eps(1e-5);
            options.enable_pdl = enable_pdl;
            let mut input = Mirrored::<f16>::random(&gpu, rng, &[rows, d + gap_in]).narrowed(1, gap_in, d);
            let mut residual = Mirrored::random(&gpu, rng, &[rows, d + gap_residual]).narrowed(1, 0, d);
            let weight = Mirrored::random(&gpu, rng, &[d]);
            check_fused(&gpu, norm, &mut input, &mut residual, &weight, &options);
        }
    }
    let mut input = Mirrored::<f16>::random(&gpu, rng, &[4, 64]).narrowed(0, 0, 0);
    let mut residual = Mirrored::random(&gpu, rng, &[4, 64]).narrowed(0, 0, 0);
    let weight = Mirrored::random(&gpu, rng, &[64]);
    check_fused(&gpu, norm, &mut input, &mut residual, &weight, &NormOptions::default());
    input.assert_untouched();
    residual.assert_untouched();
}

/// Everything that a fused addition must refuse.
pub fn fused_wrong_input(norm: FusedAdd) {
    let Some(gpu) = Gpu::start() else { return };
    let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
    let weight = Mirrored::<f16>::random(&gpu, rng, &[64]);

    #[track_caller]
    fn refuse<T: Number, U: Number, W: Number>(
        gpus: [&Gpu; 3],
        norm: FusedAdd,
        input: Mirrored<T>,
        residual: Mirrored<U>,
        weight: &Mirrored<W>,
        expected: &str,
    ) {
        let gpu = gpus[0];
        let (mut input, mut residual) = (input.copied_to(gpus[1]), residual.copied_to(gpus[2]));
        let call = (norm.op)(
            &gpu.stream,
            &mut input.device_view_mut(),
            &mut residual.device_view_mut(),
            &weight.device_view(),
            &NormOptions::default(),
        );
        refused(call, expected);
        gpus[1].synchronize();
        gpus[2].synchronize();
        input.assert_untouched();
        residual.assert_untouched();
    }

    let here = [&gpu; 3];
    macro_rules! half {
        ($($shape:expr),*) => {
            Mirrored::<f16>::random(&gpu, rng, &[$($shape),*])
        };
    }
    refuse(here, norm, Mirrored::<f32>::random(&gpu, rng, &[8, 64]), half!(8, 64), &weight, "input");
    refuse(here, norm, half!(8, 64), Mirrored::<bf16>::random(&gpu, rng, &[8, 64]), &weight, "residual");
    let brain_weight = Mirrored::<bf16>::random(&gpu, rng, &[64]);
    refuse(here, norm, half!(8, 64), half!(8, 64), &brain_weight, "weight");
    refuse(here, norm, half!(8, 1, 64), half!(8, 1, 64), &weight, "input");
    refuse(here, norm, half!(8, 64), half!(7, 64), &weight, "residual");
    refuse(here, norm, half!(8, 72), half!(8, 72), &weight, "weight");
    let columns = half!(64, 8).permuted(&[1, 0]);
    refuse(here, norm, columns, half!(8, 64), &weight, "input");
    let uneven = half!(8, 66).narrowed(1, 0, 64);
    refuse(here, norm, half!(8, 64), uneven, &weight, "residual");
    let misaligned = half!(8, 72).narrowed(1, 1, 64);
    refuse(here, norm, misaligned, half!(8, 64), &weight, "input");
    refuse([&gpu, &other, &gpu], norm, half!(8, 64), half!(8, 64), &weight, "input");
    refuse([&gpu, &gpu, &other], norm, half!(8, 64), half!(8, 64), &weight, "residual");
    // A row of 1 MiB in f32 is more shared memory than any GPU has.
    let (wide, wide_weight) = (half!(1, 1 << 18), half!(1 << 18));
    refuse(here, norm, wide, half!(1, 1 << 18), &wide_weight, "input");

    let mut host = vec![f16::ONE; 8 * 64];
    let mut residual = half!(8, 64);
    let call = (norm.op)(
        &gpu.stream,
        &mut TensorMut::from_slice(&mut host, &[8, 64]).unwrap(),
        &mut residual.device_view_mut(),
        &weight.device_view(),
        &NormOptions::default(),
    );
    refused(call, "input");
    residual.assert_untouched();
    assert_eq!(host, vec![f16::ONE; 8 * 64]);
}

/// A captured launch, replayed for other input.
pub fn graph_replay(norm: Norm) {
    let Some(gpu) = Gpu::start_alone() else { return };
    let (rng, options) = (&mut Rng::new(), NormOptions::default());
    let shape = [7, 4096];
    let mut input = Mirrored::<bf16>::random(&gpu, rng, &shape);
    let weight = Mirrored::random(&gpu, rng, &shape[1..]);
    // The first call loads the kernel.
    check(&gpu, norm, &input, &mut Mirrored::poisoned(&gpu, &shape), &weight, &options);
    let mut out = Mirrored::<bf16>::poisoned(&gpu, &shape);
    gpu.synchronize();
    let graph = {
        let (input, weight, mut out) = (input.device_view(), weight.device_view(), out.device_view_mut());
        captured(&gpu, || (norm.op)(&gpu.stream, &mut out.reborrow(), &input, &weight, &options))
    };
    out.assert_untouched(); // captured is not run
    for _ in 0..3 {
        let next = Mirrored::<bf16>::random(&gpu, rng, &shape);
        input.upload(&next.host);
        graph.launch().unwrap();
        let mut want = out.wide();
        (norm.reference)(&mut out.view_of(&mut want), &next.view(), &weight.view(), &options).unwrap();
        out.assert_close("replay", &want, bf16::BOUND);
    }
}

/// The same for a fused addition.
pub fn fused_graph_replay(norm: FusedAdd) {
    let Some(gpu) = Gpu::start_alone() else { return };
    let (rng, options) = (&mut Rng::new(), NormOptions::default());
    let shape = [7, 4096];
    let random = |rng: &mut Rng| Mirrored::<f16>::random(&gpu, rng, &shape);
    let weight = Mirrored::random(&gpu, rng, &shape[1..]);
    check_fused(&gpu, norm, &mut random(rng), &mut random(rng), &weight, &options);
    let (mut input, mut residual) = (random(rng), random(rng));
    gpu.synchronize();
    let graph = {
        let (weight, mut input, mut residual) =
            (weight.device_view(), input.device_view_mut(), residual.device_view_mut());
        captured(&gpu, || {
            (norm.op)(&gpu.stream, &mut input.reborrow(), &mut residual.reborrow(), &weight, &options)
        })
    };
    input.assert_untouched();
    residual.assert_untouched();
    for _ in 0..3 {
        let (next, next_residual) = (random(rng), random(rng));
        input.upload(&next.host);
        residual.upload(&next_residual.host);
        graph.launch().unwrap();
        let (mut want, mut want_residual) = (next.wide(), next_residual.host.clone());
        (norm.reference)(
            &mut next.view_of(&mut want),
            &mut next_residual.view_of(&mut want_residual),
            &weight.view(),
            &options,
        )
        .unwrap();
        input.assert_close("replay", &want, f16::BOUND);
        assert_same_bits("residual", &residual.download(), &want_residual);
    }
}

/// Threads that norm rows of different lengths at once do not disturb each
/// other: a kernel's limit of shared memory is the process's.
pub fn threads_with_different_sizes(norm: Norm) {
    let Some(gpu) = Gpu::start() else { return };
    std::thread::scope(|scope| {
        for d in [64, 1024, 4096, 16384] {
            let gpu = &gpu;
            scope.spawn(move || {
                let (gpu, rng) = (gpu.fork(), &mut Rng::new());
                let input = Mirrored::<f16>::random(&gpu, rng, &[2, d]);
                let weight = Mirrored::random(&gpu, rng, &[d]);
                let mut out = Mirrored::poisoned(&gpu, &[2, d]);
                for _ in 0..2000 {
                    let call = (norm.op)(
                        &gpu.stream,
                        &mut out.device_view_mut(),
                        &input.device_view(),
                        &weight.device_view(),
                        &NormOptions::default(),
                    );
                    call.unwrap();
                }
                check(&gpu, norm, &input, &mut out, &weight, &NormOptions::default());
            });
        }
    });
}
