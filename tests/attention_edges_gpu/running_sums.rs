//! Sums over many keys: each tile of keys multiplies what was added up before, by 1 if its scores are no larger.

use flashinfer_rs::{
    DType, PageIndices, PageTable,
    attention::{AttentionSpec, Backend, BatchDecode, Heads, PlanOptions, RunOptions, Split, Workspace},
    gpu::Tensor,
    kv::{KvLayout, PagedKv},
};
use half::f16;

use crate::common::{Gpu, Rng, at_hand, is_0_7};

const KEYS: usize = 1 << 17;
const PAGE: usize = 16;
const HEAD_DIM: usize = 128;
/// An element of each key. The scale of scores does not multiply it exactly, as it would a power of 2.
const KEY: f32 = 4.40625;
/// The product of a query and each key.
const PRODUCT: f64 = 128.0 * 2.0 * KEY as f64;
/// Keys of the smallest tile.
const TILE: usize = 32;
/// Roundings of outputs and of factors that are 1.
const ROUNDING: f64 = 1e-3;

/// Keys of one score, of which the first half has values of 1, the second of 0: their mean is 1/2. FlashAttention 2
/// of 0.6 makes of the factor 1 what rounding leaves of the largest score in base 2, minus itself.
#[test]
fn equal_keys_count_the_same() {
    let Some(gpu) = Gpu::start() else { return };
    let (rng, stream, heads) = (&mut Rng::new(), &gpu.stream, Heads::new(4, 1));
    let cache = [KEYS / PAGE, PAGE, 1, HEAD_DIM];
    let q = Tensor::from_slice(stream, &[1, 4, HEAD_DIM], &[f16::from_f32(2.0); 4 * HEAD_DIM]).unwrap();
    let k = Tensor::from_slice(stream, &cache, &vec![f16::from_f32(KEY); KEYS * HEAD_DIM]).unwrap();
    let mut values = vec![f16::ZERO; KEYS * HEAD_DIM];
    values[..KEYS / 2 * HEAD_DIM].fill(f16::ONE);
    let v = Tensor::from_slice(stream, &cache, &values).unwrap();
    let all: Vec<i32> = (0..(KEYS / PAGE) as i32).collect();
    let pages = PageIndices::from_requests(all.len(), PAGE, [(&all[..], KEYS)]).unwrap();
    let table = PageTable::new(stream, pages).unwrap();
    let mut workspace = Workspace::new(stream).unwrap();
    for backend in [Backend::CudaCores, Backend::Fa2, Backend::Fa3] {
        if backend == Backend::Fa3 && gpu.compute_capability() != (9, 0) {
            continue;
        }
        let spec = AttentionSpec::new(DType::F16, HEAD_DIM).with_backend(backend);
        let Some(decode) = at_hand(&gpu, BatchDecode::new(stream, &spec, heads)) else { continue };
        let drifts = backend == Backend::Fa2 && !is_0_7(decode.module());
        let mut plan = PlanOptions::default();
        if backend == Backend::Fa2 {
            plan.split = Split::disabled();
        }
        let plan = decode.plan(&mut workspace, &table, &plan).unwrap();
        for largest in [200.0, 1500.0] {
            let mut worst = 0.0f64;
            for _ in 0..16 {
                let sm_scale = largest / PRODUCT * (1.0 - rng.unit().abs() / 8.0);
                let scaled = (PRODUCT * sm_scale * std::f64::consts::LOG2_E) as f32;
                let mut out =
                    Tensor::from_slice(stream, &[1, 4, HEAD_DIM], &[f16::NAN; 4 * HEAD_DIM]).unwrap();
                let kv = PagedKv::new(k.view(), v.view(), KvLayout::Nhd);
                let options = RunOptions::with_sm_scale(sm_scale);
                plan.run_with(&q.view(), &kv, &mut out.view_mut(), None, &options).unwrap();
                let half_a_unit = f64::from(scaled.next_up() - scaled) / 2.0;
                let most = half_a_unit * std::f64::consts::LN_2 * (KEYS / TILE) as f64 / 8.0;
                for number in out.to_vec().unwrap() {
                    let off = (number.to_f64() - 0.5).abs();
                    let bound = if drifts { most + ROUNDING } else { ROUNDING };
                    assert!(off <= bound, "{backend:?}, scores of {}: {number}", PRODUCT * sm_scale);
                    worst = worst.max(off);
                }
            }
            eprintln!("{backend:?}, scores up to {largest}: off by {worst:.1e}");
            assert!(
                !drifts || largest < 1e3 || worst > ROUNDING,
                "{backend:?} no longer drifts: {worst:.1e}"
            );
        }
    }
}
