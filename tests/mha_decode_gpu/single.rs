//! Decode of one request on CUDA cores against the CPU reference. Outputs are
//! NaN beforehand.

use crate::common::{
    Gpu, Mirrored, Number, Rng, assert_same_bits, at_hand,
    cache::LAYOUTS,
    prefill::{Case, Kind, Kv, On, Problem, check_all, check_problem},
    refused,
    single::{self, Single},
};
use flashinfer_rs::{
    DType, FlashInferError, TensorMut, TensorRef,
    artifacts::FlashInferVersion,
    attention::{AttentionSpec, Backend, Heads, RunOptions, SingleDecode, Workspace},
    gpu::TensorExtMut,
    kv::KvLayout,
};
use float8::F8E4M3;
use half::{bf16, f16};

/// Decodes over so many keys each.
fn case(lens: &[usize]) -> Case {
    let on = On { kind: Kind::Single, backend: Backend::CudaCores };
    Case { requests: lens.iter().map(|&len| (1, len)).collect(), causal: false, ..on.case() }
}

/// Lengths around tiles, 256 and 512 keys, and no keys.
const LENS: [usize; 15] = [0, 1, 2, 7, 31, 32, 33, 64, 65, 255, 256, 257, 511, 513, 1000];

fn shapes<T: Number>(head_dim: usize) {
    let groups = [1, 2, 3, 4, 8].map(|group| Case { group, ..case(&LENS) }.head_dim(head_dim));
    let layouts = |case: Case| LAYOUTS.map(|layout| Case { layout, ..case.clone() });
    check_all::<T, T>(groups.into_iter().flat_map(layouts));
}

crate::typed_tests! {
    f16_64: shapes::<f16>(64);
    f16_128: shapes::<f16>(128);
    f16_256: shapes::<f16>(256);
    bf16_64: shapes::<bf16>(64);
    bf16_128: shapes::<bf16>(128);
}

/// So many keys that every block of the GPU has some.
#[test]
fn many_keys() {
    check_all::<f16, f16>([1, 8].map(|group| Case { kv_heads: 1, group, ..case(&[131_072]) }));
    let case = Case { kv_heads: 2, layout: KvLayout::Hnd, ..case(&[131_072, 100_003]) };
    check_all::<bf16, bf16>([case.head_dim(64)]);
}

/// Many heads leave few blocks for parts of keys, or none. With more heads than
/// blocks that the GPU runs at once, the launcher would divide by zero.
#[test]
fn many_heads() {
    let of = |kv_heads, len| Case { kv_heads, group: 1, ..case(&[len]) }.head_dim(64);
    check_all::<f16, f16>([of(32, 9_000), of(131, 600), of(132, 600), of(133, 600), of(2_300, 257)]);
    check_all::<bf16, bf16>([Case { group: 8, ..of(132, 300) }]);
}

#[test]
fn sm_scale() {
    let scales = [0.0, 0.01, 0.5, -0.1];
    check_all::<bf16, bf16>(scales.map(|scale| Case { sm_scale: Some(scale), ..case(&[77, 700]) }));
}

/// Scales of quantized keys and values, which are large and small here.
#[test]
fn v_scale_without_quantization() {
    for kv_scales in [(0.5, 0.125), (2.0, 3.5), (1.0, -1.0)] {
        let case = Case { kv_scales: Some(kv_scales), ..case(&[0, 77, 700]) };
        check_all::<bf16, bf16>([case.clone()]);
        check_all::<f16, f16>([case]);
    }
}

#[test]
fn f16_over_e4m3() {
    let scaled = Case { kv_scales: Some((0.6, 2.7)), ..case(&[0, 77, 700]) };
    check_all::<f16, F8E4M3>([case(&LENS), scaled]);
}

#[test]
fn sliding_window() {
    let windows = [0, 1, 15, 255, 256, 1000];
    check_all::<bf16, bf16>(windows.map(|left| Case { window_left: Some(left), ..case(&LENS) }));
}

#[test]
fn logits_soft_cap() {
    let caps = [1.0, 5.0, 50.0];
    check_all::<bf16, bf16>(caps.map(|cap| Case { soft_cap: Some(cap), ..case(&LENS) }));
}

crate::typed_tests! {
    /// No module of FlashInfer's wheels has ALiBi; one that is at hand is tested.
    alibi: check_all::<f16, f16>([1, 4].map(|group| Case { group, alibi: true, ..case(&LENS) }));
}

#[test]
fn lse_changes_nothing() {
    single::lse_changes_nothing([case(&LENS)]);
}

#[test]
fn scratch_is_asked_for() {
    for (len, divided) in [(20_000, true), (257, true), (256, false), (1, false), (0, false)] {
        single::scratch_is_asked_for(case(&[len]), divided);
    }
    // No part would be left for a second block.
    let heads = Case { kv_heads: 2_300, group: 1, ..case(&[257]) };
    single::scratch_is_asked_for(heads.head_dim(64), false);
}

#[test]
fn graph_replay() {
    single::graph_replay::<f16>([0, 200, 257, 5_000].map(|len| case(&[len])));
    single::graph_replay::<bf16>([Case { kv_scales: Some((2.0, 3.5)), ..case(&[700]) }]);
}

#[test]
fn two_streams_at_once() {
    single::two_streams_at_once([
        case(&[1, 200, 4_000, 0]),
        Case { group: 1, layout: KvLayout::Hnd, ..case(&[300, 9_000]) },
    ]);
}

/// The first tokens of a cache with room for more. Those of each head lie apart
/// in HND order, which is refused.
#[test]
fn part_of_a_cache() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for (len, layout) in [100, 600].into_iter().flat_map(|len| LAYOUTS.map(|layout| (len, layout))) {
        let case = Case { layout, ..case(&[len]) };
        let q = Mirrored::random(&gpu, rng, &case.q_shape(1));
        let kv = single::cached(&gpu, rng, &case, 77);
        let problem = Problem::<f16, f16>::solve(case, q, kv);
        let Some(single) = Single::of::<f16, f16>(&gpu, &problem.case) else { return };
        if layout == KvLayout::Nhd {
            assert!(check_problem(&gpu, &problem, &mut workspace));
            continue;
        }
        let (mut out, mut lse) = problem.outputs(&gpu);
        let plain = crate::common::prefill::DeviceMask::Plain;
        let call = single.run_problem(&gpu, &problem, &mut workspace, &plain, &mut out, Some(&mut lse));
        refused(call, "k");
        out.assert_untouched();
        lse.assert_untouched();
    }
}

/// What there is not, and what is said instead.
#[test]
fn backends() {
    let Some(gpu) = Gpu::start() else { return };
    let spec = AttentionSpec::new(DType::F16, 128);
    let new = |spec, num_qo_heads, num_kv_heads| {
        SingleDecode::new(&gpu.stream, &spec, Heads { num_qo_heads, num_kv_heads })
    };
    let Some(decode) = at_hand(&gpu, new(spec, 32, 8)) else { return };
    assert_eq!(decode.module().name(), &spec.single_decode_module(FlashInferVersion::OLDEST).unwrap());
    assert_eq!((decode.spec(), decode.heads().num_kv_heads), (&spec, 8));
    for (spec, num_qo_heads) in [
        (spec.with_backend(Backend::Fa2), 32),
        (spec.with_backend(Backend::Fa3), 32),
        (spec.with_head_dim_vo(64), 32),
        (spec.with_attention_sink(), 32),
        (spec.with_kv_dtype(DType::BF16), 32),
        (spec, 40),
        (spec, 8 * 16),
    ] {
        match new(spec, num_qo_heads, 8) {
            Err(FlashInferError::Unsupported { .. }) => {}
            other => panic!("{spec:?} with {num_qo_heads} heads: {other:?}"),
        }
    }
    for (num_qo_heads, num_kv_heads) in [(7, 2), (0, 2), (8, 0), (65536, 65536)] {
        refused(new(spec, num_qo_heads, num_kv_heads), "heads");
    }
}

#[test]
fn wrong_input() {
    let Some(gpu) = Gpu::start() else { return };
    let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
    let problem = Problem::<f16, f16>::new(&gpu, rng, case(&[300]));
    let Some(single) = Single::of::<f16, f16>(&gpu, &problem.case) else { return };
    let Single::Decode(decode) = single else { unreachable!("a decode") };
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let mut elsewhere = Workspace::new(&other.stream).unwrap();
    let Kv::Ragged { k, v, .. } = &problem.kv else { unreachable!("keys of one request") };
    let half = |rng: &mut Rng, shape: &[usize]| Mirrored::<f16>::random(&gpu, rng, shape);
    let mut out = Mirrored::<f16>::poisoned(&gpu, &[8, 128]);
    let mut lse = Mirrored::<f32>::poisoned(&gpu, &[8]);
    let (k, v, plain) = (k.device_view(), v.device_view(), RunOptions::default());
    let (k, v) = (k, v);
    let q = half(rng, &[8, 128]);
    let q_guard = q.device_view();
    let q_view = q_guard;
    {
        let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
        let mut call = |q: TensorRef<'_>, kv: [&TensorRef<'_>; 2], options: &RunOptions<'_>, expected| {
            let (mut out, mut lse) = (out.reborrow(), lse.reborrow());
            refused(decode.run_with(&mut workspace, &q, kv, &mut out, Some(&mut lse), options), expected);
        };
        let mut refuse = |q: TensorRef<'_>| call(q, [&k, &v], &plain, "q");
        refuse(Mirrored::<bf16>::random(&gpu, rng, &[8, 128]).device_view());
        refuse(half(rng, &[1, 8, 128]).device_view());
        refuse(half(rng, &[7, 128]).device_view());
        refuse(half(rng, &[8, 64]).device_view());
        refuse(half(rng, &[8, 136]).narrowed(1, 0, 128).device_view());
        refuse(half(rng, &[128, 8]).permuted(&[1, 0]).device_view());
        refuse(q.view()); // on the host
        refuse(q.copied_to(&other).device_view());
        let mut refuse = |k_bad: TensorRef<'_>, k_expected, v_bad: TensorRef<'_>| {
            call(q_view, [&k_bad, &v], &plain, k_expected);
            call(q_view, [&k, &v_bad], &plain, "v");
        };
        let brains = Mirrored::<bf16>::random(&gpu, rng, &[300, 2, 128]);
        refuse(brains.device_view(), "k", brains.device_view());
        let wide = half(rng, &[300, 3, 128]);
        refuse(wide.device_view(), "k", wide.device_view());
        let spread = half(rng, &[300, 3, 128]).narrowed(1, 0, 2);
        refuse(spread.device_view(), "k", spread.device_view());
        let by_head = half(rng, &[2, 300, 128]).permuted(&[1, 0, 2]);
        refuse(by_head.device_view(), "v", by_head.device_view());
        refuse(k.narrow(0, 0, 299).unwrap(), "v", v.narrow(0, 0, 299).unwrap());
        refuse(k.select(0, 0).unwrap(), "k", v.select(0, 0).unwrap());
        refuse(k.narrow(2, 0, 64).unwrap(), "k", v.narrow(2, 0, 64).unwrap());
        let host = half(rng, &[300, 2, 128]);
        refuse(host.view(), "k", host.view());
        refuse(host.copied_to(&other).device_view(), "k", host.copied_to(&other).device_view());
        let numbers = Mirrored::<f32>::random(&gpu, rng, &[8]);
        let numbers = numbers.device_view();
        let mut options = plain;
        options.sinks = Some(numbers);
        call(q_view, [&k, &v], &options, "sinks");
        (options.sinks, options.alibi_slopes) = (None, Some(numbers));
        call(q_view, [&k, &v], &options, "alibi_slopes");
        (options.alibi_slopes, options.v_scale) = (None, Some(f32::NAN));
        call(q_view, [&k, &v], &options, "v_scale");
        // Runs go to the workspace's stream, for which these views are not.
        let mut out = out.reborrow();
        refused(decode.run_with(&mut elsewhere, &q_view, [&k, &v], &mut out, None, &plain), "q");
    }
    other.synchronize();
    out.assert_untouched();
    lse.assert_untouched();
    macro_rules! refuse {
        ($out:expr, $lse:expr, $expected:expr) => {{
            let (mut out, mut lse) = ($out, $lse);
            {
                let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
                let (mut out, mut lse) = (out.reborrow(), lse.reborrow());
                let call =
                    decode.run_with(&mut workspace, &q_view, [&k, &v], &mut out, Some(&mut lse), &plain);
                refused(call, $expected);
            }
            out.assert_untouched();
            lse.assert_untouched();
        }};
    }
    let (out, lse) = (Mirrored::<f16>::poisoned, Mirrored::<f32>::poisoned);
    refuse!(Mirrored::<bf16>::poisoned(&gpu, &[8, 128]), lse(&gpu, &[8]), "out");
    refuse!(lse(&gpu, &[8, 128]), lse(&gpu, &[8]), "out");
    refuse!(out(&gpu, &[1, 8, 128]), lse(&gpu, &[8]), "out");
    refuse!(out(&gpu, &[7, 128]), lse(&gpu, &[8]), "out");
    refuse!(out(&gpu, &[8, 64]), lse(&gpu, &[8]), "out");
    refuse!(out(&gpu, &[8, 136]).narrowed(1, 0, 128), lse(&gpu, &[8]), "out");
    refuse!(out(&gpu, &[8, 128]), out(&gpu, &[8]), "lse");
    refuse!(out(&gpu, &[8, 128]), lse(&gpu, &[1, 8]), "lse");
    refuse!(out(&gpu, &[8, 128]), lse(&gpu, &[9]), "lse");
    refuse!(out(&gpu, &[8, 128]), lse(&gpu, &[8, 2]).narrowed(1, 0, 1), "lse");
    // An output at an odd element, and on the host.
    let poison = [f16::NAN; 8 * 128 + 1];
    let mut odd = gpu.cuda.clone_htod(&poison).unwrap();
    {
        let mut part = odd.slice_mut(1..);
        let mut out = part.tensor_mut(&gpu.cuda, &[8, 128]).unwrap();
        let mut out = out.view_mut();
        refused(decode.run_with(&mut workspace, &q_view, [&k, &v], &mut out, None, &plain), "out");
    }
    assert_same_bits("untouched", &gpu.cuda.clone_dtoh(&odd).unwrap(), &poison);
    let mut host = vec![f16::NAN; 8 * 128];
    let mut view = TensorMut::from_slice(&mut host, &[8, 128]).unwrap();
    refused(decode.run_with(&mut workspace, &q_view, [&k, &v], &mut view, None, &plain), "out");
    // The refused calls left everything usable.
    single.check(&gpu, &problem, &mut workspace);
}
