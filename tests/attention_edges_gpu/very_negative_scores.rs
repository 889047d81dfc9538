//! Scores far below zero, in every attention: what is promised is right, and
//! beyond it the limit is where the documentation of `attention` says.

use crate::common::{
    Gpu, Rng,
    ops::{Batch, Op},
};
use flashinfer_rs::attention::Backend;
use half::bf16;

/// What kernels of 0.6 have in place of −∞. Those of 0.7 have −∞, and so no limit.
const LIMIT_OF_0_6: f64 = -50000.0;

const SM_SCALE: f64 = 0.08838834764831845;

/// One request whose products of queries and keys are all −128 · 64 · `step`,
/// and whose values are all 3.
fn batch(rng: &mut Rng, op: Op, keys: usize, step: f64) -> Batch {
    let mut batch = Batch::random(rng, op, &[(3, keys)]);
    batch.sm_scale = SM_SCALE;
    batch.fill(0, [64.0, -step, 3.0]);
    // Keys are wider than 128 elements in latent attention only.
    let width = op.widths()[0];
    for row in batch.q.chunks_exact_mut(width) {
        row[128..].fill(bf16::ZERO);
    }
    batch
}

/// Whether an operation is right for products of this size; `None` where that
/// depends on how keys fill tiles.
fn is_right(op: Op, keys: usize, product: f64, limit: Option<f64>) -> Option<bool> {
    let Some(limit) = limit else { return Some(true) };
    let counts = product * SM_SCALE * std::f64::consts::LOG2_E;
    match op {
        _ if counts < limit - 24.0 && op.is_on_cuda_cores() => Some(false),
        _ if op.is_on_cuda_cores() || product > limit => Some(true),
        // Whole tiles of FlashAttention 3 have no hidden key to compare with. One
        // request may be on it, too.
        Op::Paged(Backend::Fa3) | Op::Ragged(Backend::Fa3) | Op::Decode(Backend::Fa3)
            if keys.is_multiple_of(384) =>
        {
            None
        }
        Op::SinglePrefill if keys.is_multiple_of(384) => None,
        Op::Cascade(Backend::Fa3) => None,
        _ => Some(false),
    }
}

#[test]
fn scores_down_to_the_limit_and_below() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut wrong = Vec::new();
    for op in Op::all(&gpu) {
        let limit = (!crate::common::is_0_7(op.module(&gpu).unwrap())).then_some(LIMIT_OF_0_6);
        for keys in [1, 40, 384, 9000] {
            // Products of −38400, −59904 and −524288, as all others exact in
            // bf16 and f32.
            for step in [4.6875, 7.3125, 64.0] {
                let product = -128.0 * 64.0 * step;
                let batch = batch(rng, op, keys, step);
                let (results, (out, lse)) = (batch.run(&gpu), batch.expected());
                let what = format!("{op:?}: {keys} keys, products of {product}");
                let nothing = results.out.iter().all(|&o| o == bf16::ZERO);
                let right = results.is_close((&out, &lse));
                let (first, sum) = (results.out[0], results.lse[0]);
                eprintln!("{what}: {first}, LSE {sum}, right {right}");
                match is_right(op, keys, product, limit) {
                    Some(true) if !right => wrong.push(format!("{what} should be right")),
                    Some(false) if !nothing => wrong.push(format!("{what} should be zeros")),
                    None if !right && !nothing => wrong.push(format!("{what} is neither right nor zeros")),
                    _ => {}
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Beyond the limit, what is left of a query is nothing of another's; where there is no
/// limit, it is right.
#[test]
fn values_of_neighbours_do_not_show() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for op in Op::all(&gpu) {
        let mut two = Batch::random(rng, op, &[(3, 40), (3, 400)]);
        two.sm_scale = SM_SCALE;
        two.fill(0, [64.0, -64.0, 0.0]);
        two.fill(1, [1.0, 1.0, 100.0]);
        let results = two.part(&two.run(&gpu), 0);
        // In latent attention values are keys.
        let own = if op.is_mla() { -64.0 } else { 0.0 };
        assert!(
            results.out.iter().all(|o| [0.0, own].contains(&o.to_f64())),
            "{op:?}: {:?}",
            results.out[0].to_f64()
        );
    }
}
