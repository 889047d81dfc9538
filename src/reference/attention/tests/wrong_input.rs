//! Wrong input is refused, and nothing is written.

use half::f16;

use super::{super::*, spec};
use crate::{
    DType, Device, FlashInferError,
    attention::PosEncodingMode,
    indices::{ItemIndices, MaskIndices},
    kv::KvLayout,
    reference::testing::{refused, view, view_mut},
};

#[test]
fn wrong_masks_slopes_and_sinks_are_refused() {
    let q = [0.0f64; 3];
    let run = |spec: &AttentionSpec, mask: HostMask<'_>, options: &RunOptions<'_>| {
        let queries = RaggedIndices::from_lens([2, 1]).unwrap();
        let (k, mut out) = (view(&q, &[3, 1, 1]), [7.0f64; 3]);
        let result = batch_prefill_ragged(
            spec,
            &view(&q, &[3, 1, 1]),
            [&k, &k],
            &queries,
            &queries,
            &mut view_mut(&mut out, &[3, 1, 1]),
            None,
            mask,
            options,
        );
        assert_eq!(out, [7.0; 3]);
        result
    };
    let (spec, plain) = (spec(1), RunOptions::default());
    let indices = MaskIndices::new([(2, 2), (1, 1)]).unwrap();
    refused(run(&spec, HostMask::Custom(&indices, &[0]), &plain), "mask");
    let other = MaskIndices::new([(2, 2), (1, 2)]).unwrap();
    refused(run(&spec, HostMask::Custom(&other, &[0; 9]), &plain), "mask");
    let items = ItemIndices::new([(1, &[][..]), (1, &[][..]), (1, &[][..])]).unwrap();
    refused(run(&spec, HostMask::MultiItem(&items), &plain), "items");
    let two = [1f32; 2];
    let mut options = plain;
    options.sinks = Some(view(&two, &[2]));
    refused(run(&spec, HostMask::None, &options), "sinks");
    refused(run(&spec.with_attention_sink(), HostMask::None, &options), "sinks");
    refused(run(&spec.with_attention_sink(), HostMask::None, &plain), "sinks");
    refused(
        run(&spec.with_pos_encoding_mode(PosEncodingMode::Alibi), HostMask::None, &plain),
        "alibi_slopes",
    );
}

#[test]
fn wrong_input_of_one_request_is_refused_and_nothing_written() {
    let (q, k, bits) = ([1.0f64; 16], [1.0f64; 16], [0xff; 2]);
    let (mut out, mut lse) = ([7.0f64; 16], [7.0f64; 8]);
    let (spec, plain) = (spec(2), RunOptions::default());
    let mut prefill = |shapes: [&[usize]; 5], mask, expected: &str| {
        let result = single_prefill(
            &spec,
            &view(&q, shapes[0]),
            [&view(&k, shapes[1]), &view(&k, shapes[2])],
            &mut view_mut(&mut out, shapes[3]),
            Some(&mut view_mut(&mut lse, shapes[4])),
            mask,
            &plain,
        );
        refused(result, expected);
    };
    let (x, y, z): (&[usize], &[usize], &[usize]) = (&[2, 4, 2], &[3, 2, 2], &[2, 4]);
    let masks: [&[(usize, usize)]; 3] = [&[(2, 2)], &[(2, 3), (0, 0)], &[(2, 3)]];
    let [other, two, right] = masks.map(|shapes| MaskIndices::new(shapes.iter().copied()).unwrap());
    prefill([&[16], y, y, x, z], HostMask::None, "q");
    prefill([&[2, 4, 1], y, y, x, z], HostMask::None, "q");
    prefill([&[1, 4, 2], y, y, x, z], HostMask::None, "out");
    prefill([&[2, 3, 2], y, y, &[2, 3, 2], &[2, 3]], HostMask::None, "q");
    prefill([x, &[6, 2], y, x, z], HostMask::None, "k");
    prefill([x, y, &[2, 2, 2], x, z], HostMask::None, "v");
    prefill([x, y, y, x, &[8]], HostMask::None, "lse");
    prefill([x, y, y, x, z], HostMask::Custom(&other, &bits), "mask");
    prefill([x, y, y, x, z], HostMask::Custom(&two, &bits), "mask");
    prefill([x, y, y, x, z], HostMask::Custom(&right, &[]), "mask");
    let mut decode = |shapes: [&[usize]; 5], expected: &str| {
        let result = single_decode(
            &spec,
            &view(&q, shapes[0]),
            [&view(&k, shapes[1]), &view(&k, shapes[2])],
            &mut view_mut(&mut out, shapes[3]),
            Some(&mut view_mut(&mut lse, shapes[4])),
            &plain,
        );
        refused(result, expected);
    };
    let (x, z): (&[usize], &[usize]) = (&[4, 2], &[4]);
    decode([&[1, 4, 2], y, y, x, z], "q");
    decode([&[4, 1], y, y, x, z], "q");
    decode([x, y, y, &[8], z], "out");
    decode([x, y, y, &[4, 1], z], "out");
    decode([x, y, y, x, &[1, 4]], "lse");
    decode([x, y, y, x, &[3]], "lse");
    decode([x, &[6, 2], y, x, z], "k");
    decode([x, y, &[3, 1, 2], x, z], "v");
    assert_eq!((out, lse), ([7.0; 16], [7.0; 8]));
}

#[test]
fn wrong_prefills_are_refused_and_nothing_written() {
    let (q, k) = ([1.0f64; 12], [1.0f64; 12]);
    let (mut out, mut lse) = ([7.0f64; 12], [7.0f64; 6]);
    let lens = |lens: &[usize]| RaggedIndices::from_lens(lens.iter().copied()).unwrap();
    let mut refused = |queries: &[usize], keys: &[usize], shapes: [&[usize]; 5], expected: &str| {
        let result = batch_prefill_ragged(
            &spec(2),
            &view(&q, shapes[0]),
            [&view(&k, shapes[1]), &view(&k, shapes[2])],
            &lens(queries),
            &lens(keys),
            &mut view_mut(&mut out, shapes[3]),
            Some(&mut view_mut(&mut lse, shapes[4])),
            HostMask::Causal,
            &RunOptions::default(),
        );
        match result {
            Err(FlashInferError::InvalidArgument { argument, .. }) => assert_eq!(argument, expected),
            other => panic!("expected {expected} to be refused, got {other:?}"),
        }
    };
    let (x, y): (&[usize], &[usize]) = (&[3, 2, 2], &[3, 2]);
    refused(&[1, 2], &[1, 1, 1], [x, x, x, x, y], "queries");
    refused(&[2, 2], &[1, 2], [x, x, x, x, y], "q");
    refused(&[1, 2], &[1, 2], [&[3, 4], x, x, x, y], "q");
    refused(&[1, 2], &[1, 2], [&[3, 1, 2], &[3, 2, 2], x, &[3, 1, 2], &[3, 1]], "q");
    refused(&[1, 2], &[1, 1], [x, x, x, x, y], "k");
    refused(&[1, 2], &[1, 2], [x, &[3, 1, 4], x, x, y], "k");
    refused(&[1, 2], &[1, 2], [x, x, &[3, 1, 2], x, y], "v");
    refused(&[1, 2], &[1, 2], [x, x, x, &[3, 1, 2], y], "out");
    refused(&[1, 2], &[1, 2], [x, x, x, x, &[2, 3]], "lse");
    assert_eq!((out, lse), ([7.0; 12], [7.0; 6]));
}

#[test]
fn wrong_input_is_refused_and_nothing_written() {
    let table = PageIndices::from_requests(2, 2, [(&[1][..], 2)]).unwrap();
    let (q, cache, halves) = ([1.0f64; 8], [1.0f64; 24], [f16::ONE; 8]);
    let (mut out, mut lse) = ([7.0f64; 8], [7.0f64; 4]);
    let options = RunOptions::default();
    let spec = spec(2);
    let mut run =
        |spec: &AttentionSpec, q: &TensorRef<'_>, cache_shape: [&[usize]; 2], lse_shape: &[usize]| {
            let kv = PagedKv::new(view(&cache, cache_shape[0]), view(&cache, cache_shape[1]), KvLayout::Nhd);
            batch_decode(
                spec,
                q,
                &kv,
                &table,
                &mut view_mut(&mut out, &[1, 4, 2]),
                Some(&mut view_mut(&mut lse, lse_shape)),
                &options,
            )
        };
    let good_q = view(&q, &[1, 4, 2]);
    let shape: [&[usize]; 2] = [&[2, 2, 2, 2]; 2];
    refused(run(&spec, &view(&q, &[1, 8]), shape, &[1, 4]), "q");
    refused(run(&spec, &view(&q, &[2, 2, 2]), shape, &[1, 4]), "q");
    refused(run(&spec, &view(&q, &[1, 2, 4]), shape, &[1, 4]), "q");
    refused(run(&spec, &view(&halves, &[1, 4, 2]), shape, &[1, 4]), "q");
    refused(run(&spec, &view(&q, &[1, 2, 2]), shape, &[1, 4]), "out");
    refused(run(&spec, &good_q, [&[1, 2, 2, 2]; 2], &[1, 4]), "kv.k");
    refused(run(&spec, &good_q, [&[2, 1, 2, 2]; 2], &[1, 4]), "kv.k");
    refused(run(&spec, &good_q, [&[2, 2, 2, 1]; 2], &[1, 4]), "kv.k");
    refused(run(&spec, &good_q, [&[2, 2, 4]; 2], &[1, 4]), "kv.k");
    refused(run(&spec, &good_q, [&[2, 2, 2, 2], &[2, 2, 1, 2]], &[1, 4]), "kv.v");
    refused(run(&spec, &good_q, [&[2, 2, 0, 2]; 2], &[1, 4]), "q");
    refused(run(&spec, &good_q, [&[2, 2, 3, 2]; 2], &[1, 4]), "q");
    refused(run(&spec, &good_q, shape, &[4, 1]), "lse");
    refused(run(&AttentionSpec { head_dim_vo: 1, ..spec }, &good_q, shape, &[1, 4]), "out");
    refused(run(&AttentionSpec { head_dim_vo: 0, ..spec }, &good_q, shape, &[1, 4]), "spec");
    for cap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        refused(run(&spec.with_logits_soft_cap(cap), &good_q, shape, &[1, 4]), "spec");
    }
    // SAFETY: the tensor is refused, so nothing looks at the address.
    let device = unsafe {
        TensorRef::from_raw_parts(256 as *const _, Device::Cuda(0), DType::F64, &[1, 4, 2], None).unwrap()
    };
    refused(run(&spec, &device, shape, &[1, 4]), "q");
    assert_eq!((out, lse), ([7.0; 8], [7.0; 4]));
}
