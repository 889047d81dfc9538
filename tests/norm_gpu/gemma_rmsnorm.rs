//! Gemma's norms, which multiply by `weight + 1`, on the GPU against the CPU
//! reference.

use crate::common::{Gpu, Mirrored, Rng, norm as cases, refused};
use flashinfer_rs::{norm, norm::NormOptions, reference};
use half::f16;

const GEMMA: cases::Norm = cases::Norm { op: norm::gemma_rmsnorm, reference: reference::gemma_rmsnorm };
const FUSED: cases::FusedAdd =
    cases::FusedAdd { op: norm::gemma_fused_add_rmsnorm, reference: reference::gemma_fused_add_rmsnorm };

#[test]
fn sizes() {
    cases::sizes(GEMMA);
}

#[test]
fn strided_rows() {
    cases::strided_rows(GEMMA);
}

#[test]
fn eps() {
    cases::eps(GEMMA);
}

#[test]
fn no_rows() {
    cases::no_rows(GEMMA);
}

#[test]
fn pdl() {
    cases::pdl(GEMMA);
}

#[test]
fn wrong_input() {
    cases::wrong_input(GEMMA);
}

#[test]
fn heads_have_no_kernel() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let input = Mirrored::<f16>::random(&gpu, rng, &[4, 2, 64]);
    let weight = Mirrored::<f16>::random(&gpu, rng, &[64]);
    let mut out = Mirrored::<f16>::poisoned(&gpu, &[4, 2, 64]);
    let call = norm::gemma_rmsnorm(
        &gpu.stream,
        &mut out.device_view_mut(),
        &input.device_view(),
        &weight.device_view(),
        &NormOptions::default(),
    );
    refused(call, "input");
    out.assert_untouched();
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
    cases::threads_with_different_sizes(GEMMA);
}

#[test]
fn graph_replay() {
    cases::graph_replay(GEMMA);
}

#[test]
fn fused_add_graph_replay() {
    cases::fused_graph_replay(FUSED);
}
