//! `rmsnorm` and `fused_add_rmsnorm` on the GPU against the CPU reference.

use crate::common::{Gpu, Mirrored, Number, Rng, leave_cuda_error, norm as cases, refused};
use flashinfer_rs::{norm, norm::NormOptions, reference};
use half::{bf16, f16};

const PLAIN: cases::Norm = cases::Norm { op: norm::rmsnorm, reference: reference::rmsnorm };
const FUSED: cases::FusedAdd =
    cases::FusedAdd { op: norm::fused_add_rmsnorm, reference: reference::fused_add_rmsnorm };

#[test]
fn sizes() {
    cases::sizes(PLAIN);
}

#[test]
fn strided_rows() {
    cases::strided_rows(PLAIN);
}

#[test]
fn eps() {
    cases::eps(PLAIN);
}

#[test]
fn no_rows() {
    cases::no_rows(PLAIN);
}

#[test]
fn pdl() {
    cases::pdl(PLAIN);
}

#[test]
fn wrong_input() {
    cases::wrong_input(PLAIN);
}

/// The norm of query and key heads: `[rows, heads, head_dim]`.
#[test]
fn heads() {
    fn run<T: Number>(gpu: &Gpu, rng: &mut Rng) {
        for (rows, heads, d) in
            [(1, 1, 64), (1, 32, 128), (7, 8, 128), (64, 5, 256), (3, 4, 100), (2, 3, 72), (257, 40, 128)]
        {
            let weight = Mirrored::random(gpu, rng, &[d]);
            let options = NormOptions::default();
            let input = Mirrored::<T>::random(gpu, rng, &[rows, heads, d]);
            let mut out = Mirrored::poisoned(gpu, &[rows, heads, d]);
            cases::check(gpu, PLAIN, &input, &mut out, &weight, &options);
            // The heads between others, as in a joined query-key-value tensor.
            let input = Mirrored::<T>::random(gpu, rng, &[rows, heads + 3, d]).narrowed(1, 2, heads);
            let mut out = Mirrored::poisoned(gpu, &[rows, heads + 1, d]).narrowed(1, 0, heads);
            cases::check(gpu, PLAIN, &input, &mut out, &weight, &options);
            // Heads outermost, and a gap behind each.
            let storage = [heads, rows, d + 8];
            let input = Mirrored::<T>::random(gpu, rng, &storage).narrowed(2, 0, d).permuted(&[1, 0, 2]);
            let mut out = Mirrored::poisoned(gpu, &storage).narrowed(2, 8, d).permuted(&[1, 0, 2]);
            cases::check(gpu, PLAIN, &input, &mut out, &weight, &options);
        }
    }
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    run::<f16>(&gpu, rng);
    run::<bf16>(&gpu, rng);
}

#[test]
fn heads_wrong_input() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let input = Mirrored::<f16>::random(&gpu, rng, &[4, 2, 64]);
    let weight = Mirrored::<f16>::random(&gpu, rng, &[64]);
    let flat = Mirrored::<f16>::random(&gpu, rng, &[8, 64]);
    let rank_4 = Mirrored::<f16>::random(&gpu, rng, &[4, 2, 1, 64]);
    let mut out = Mirrored::<f16>::poisoned(&gpu, &[4, 2, 64]);
    let options = NormOptions::default();
    for (input, argument) in [(&flat, "out"), (&rank_4, "input")] {
        let call = norm::rmsnorm(
            &gpu.stream,
            &mut out.device_view_mut(),
            &input.device_view(),
            &weight.device_view(),
            &options,
        );
        refused(call, argument);
        out.assert_untouched();
    }
    // No heads are nothing to do.
    let input = input.narrowed(1, 0, 0);
    let mut out = out.narrowed(1, 0, 0);
    cases::check(&gpu, PLAIN, &input, &mut out, &weight, &options);
}

#[test]
fn fused_add_sizes() {
    cases::fused_sizes(FUSED);
}

#[test]
fn fused_add_strided_rows() {
    cases::fused_strided_rows(FUSED);
}

#[test]
fn fused_add_wrong_input() {
    cases::fused_wrong_input(FUSED);
}

#[test]
fn threads_with_different_sizes() {
    cases::threads_with_different_sizes(PLAIN);
}

/// An error that other code left in the thread is not taken for the launch's:
/// the launcher looks at what its own calls return.
#[test]
fn errors_of_others() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let (weight, options) = (Mirrored::random(&gpu, rng, &[128]), NormOptions::default());
    for shape in [&[3, 128][..], &[3, 2, 128]] {
        let input = Mirrored::<f16>::random(&gpu, rng, shape);
        leave_cuda_error();
        cases::check(&gpu, PLAIN, &input, &mut Mirrored::poisoned(&gpu, shape), &weight, &options);
    }
}

#[test]
fn graph_replay() {
    cases::graph_replay(PLAIN);
}

#[test]
fn fused_add_graph_replay() {
    cases::fused_graph_replay(FUSED);
}
