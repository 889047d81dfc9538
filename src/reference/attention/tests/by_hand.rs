//! Numbers that were computed by hand.

use super::{super::*, close, spec};
use crate::{
    attention::PosEncodingMode,
    indices::{ItemIndices, MaskIndices},
    kv::KvLayout,
    reference::testing::{view, view_mut},
};

/// One request, one head, head_dim 1, keys in one page.
fn one_head(spec: &AttentionSpec, q: f64, k: &[f64], v: &[f64], options: &RunOptions) -> (f64, f64) {
    let n = k.len();
    let table = PageIndices::from_requests(1, n, [(&[0][..], n)]).unwrap();
    let shape = [1, n, 1, 1];
    let kv = PagedKv::new(view(k, &shape), view(v, &shape), KvLayout::Nhd);
    let (mut out, mut lse) = ([f64::NAN], [f64::NAN]);
    batch_decode(
        spec,
        &view(&[q], &[1, 1, 1]),
        &kv,
        &table,
        &mut view_mut(&mut out, &[1, 1, 1]),
        Some(&mut view_mut(&mut lse, &[1, 1])),
        options,
    )
    .unwrap();
    (out[0], lse[0])
}

#[test]
fn decode_by_hand() {
    let (ln2, ln3) = (2f64.ln(), 3f64.ln());
    // Exponentials 1, 2 and 3 of a sum of 6, over values 6, 12 and 18.
    let (k, v) = ([0.0, ln2, ln3], [6.0, 12.0, 18.0]);
    let options = RunOptions::default();
    let (out, lse) = one_head(&spec(1), 1.0, &k, &v, &options);
    close(&[out, lse], &[(6.0 + 24.0 + 54.0) / 6.0, 6f64.log2()]);
    // Twice the scale squares the exponentials: 1, 4 and 9 of 14.
    let (out, lse) = one_head(&spec(1), 1.0, &k, &v, &RunOptions::with_sm_scale(2.0));
    close(&[out, lse], &[(6.0 + 48.0 + 162.0) / 14.0, 14f64.log2()]);
    // A window of one key to the left: 2 and 3 of 5; of none: the last key.
    let (out, lse) = one_head(&spec(1).with_window_left(1), 1.0, &k, &v, &options);
    close(&[out, lse], &[(24.0 + 54.0) / 5.0, 5f64.log2()]);
    let (out, lse) = one_head(&spec(1).with_window_left(0), 1.0, &k, &v, &options);
    close(&[out, lse], &[18.0, 3f64.log2()]);
    // A cap of 1: logits 0, tanh(ln 2) = 0.6 and tanh(ln 3) = 0.8.
    let (out, lse) = one_head(&spec(1).with_logits_soft_cap(1.0), 1.0, &k, &v, &options);
    let (a, b) = (0.6f64.exp(), 0.8f64.exp());
    close(&[out, lse], &[(6.0 + 12.0 * a + 18.0 * b) / (1.0 + a + b), (1.0 + a + b).log2()]);
}

#[test]
fn default_scale_is_one_over_the_root_of_head_dim() {
    let table = PageIndices::from_requests(1, 2, [(&[0][..], 2)]).unwrap();
    // Products 0 and 2·ln 2, over √4: exponentials 1 and 2.
    let mut k = [0.0f64; 8];
    k[4] = 2.0 * 2f64.ln();
    let v = [3.0f64, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0];
    let shape = [1, 2, 1, 4];
    let kv = PagedKv::new(view(&k, &shape), view(&v, &shape), KvLayout::Nhd);
    let q = [1.0f64, 0.0, 0.0, 0.0];
    let mut out = [f64::NAN; 4];
    let options = RunOptions::default();
    let (q, mut o) = (view(&q, &[1, 1, 4]), view_mut(&mut out, &[1, 1, 4]));
    batch_decode(&spec(4), &q, &kv, &table, &mut o, None, &options).unwrap();
    close(&out, &[1.0, 2.0, 0.0, 0.0]);
}

#[test]
fn groups_of_query_heads_share_a_kv_head_and_empty_requests_are_zero() {
    // Requests of 1, 0 and 2 tokens; 2 KV heads, 6 query heads; all keys
    // zero, so each output is the mean of its head's values.
    let table = PageIndices::from_requests(3, 1, [(&[2][..], 1), (&[][..], 0), (&[0, 1][..], 2)]).unwrap();
    let k = [0.0f64; 6];
    let v = [1.0f64, 10.0, 3.0, 30.0, 5.0, 50.0]; // [page, slot, head, 1]
    let shape = [3, 1, 2, 1];
    let kv = PagedKv::new(view(&k, &shape), view(&v, &shape), KvLayout::Nhd);
    let q = [1.0f64; 18];
    let (mut out, mut lse) = ([f64::NAN; 18], [f64::NAN; 18]);
    batch_decode(
        &spec(1),
        &view(&q, &[3, 6, 1]),
        &kv,
        &table,
        &mut view_mut(&mut out, &[3, 6, 1]),
        Some(&mut view_mut(&mut lse, &[3, 6])),
        &RunOptions::default(),
    )
    .unwrap();
    close(&out[..6], &[5.0, 5.0, 5.0, 50.0, 50.0, 50.0]);
    assert_eq!(out[6..12], [0.0; 6]);
    close(&out[12..], &[2.0, 2.0, 2.0, 20.0, 20.0, 20.0]);
    assert_eq!(lse[..6], [0.0; 6]);
    assert_eq!(lse[6..12], [f64::NEG_INFINITY; 6]);
    close(&lse[12..], &[1.0; 6]);
}

/// Five queries of two requests, and a row beyond them.
#[test]
fn prefill_by_hand() {
    // All keys are zero, so each output is the mean of the values seen.
    let keys = RaggedIndices::from_lens([4, 2]).unwrap();
    let queries = RaggedIndices::from_lens([2, 3]).unwrap();
    let k = [0.0f64; 6 * 2];
    let v = [1.0f64, 3.0, 5.0, 11.0, 20.0, 40.0];
    let run = |spec: &AttentionSpec, mask| {
        let spec = spec.with_head_dim_vo(1);
        let (q, mut out, mut lse) = ([1.0f64; 12], [f64::NAN; 6], [f64::NAN; 6]);
        batch_prefill_ragged(
            &spec,
            &view(&q, &[6, 1, 2]),
            [&view(&k, &[6, 1, 2]), &view(&v, &[6, 1, 1])],
            &queries,
            &keys,
            &mut view_mut(&mut out, &[6, 1, 1]),
            Some(&mut view_mut(&mut lse, &[6, 1])),
            mask,
            &RunOptions::default(),
        )
        .unwrap();
        // The sixth row is of no request.
        assert!(out[5].is_nan() && lse[5].is_nan());
        ([out[0], out[1], out[2], out[3], out[4]], [lse[0], lse[1], lse[2], lse[3], lse[4]])
    };
    let spec = spec(2);
    let nothing = f64::NEG_INFINITY;
    let (out, lse) = run(&spec, HostMask::None);
    close(&out, &[5.0, 5.0, 30.0, 30.0, 30.0]);
    close(&lse, &[2.0, 2.0, 1.0, 1.0, 1.0]);
    // Positions are 2 and 3 of four, and −1, 0 and 1 of two.
    let (out, lse) = run(&spec, HostMask::Causal);
    close(&out, &[3.0, 5.0, 0.0, 20.0, 30.0]);
    close(&lse, &[3f64.log2(), 2.0, nothing, 0.0, 1.0]);
    // One key before the position.
    let (out, lse) = run(&spec.with_window_left(1), HostMask::Causal);
    close(&out, &[4.0, 8.0, 0.0, 20.0, 30.0]);
    close(&lse, &[1.0, 1.0, nothing, 0.0, 1.0]);
    // Without a mask also all keys after it.
    let (out, lse) = run(&spec.with_window_left(0), HostMask::None);
    close(&out, &[8.0, 11.0, 30.0, 30.0, 40.0]);
    close(&lse, &[1.0, 0.0, 1.0, 1.0, 0.0]);
}

/// One head of two requests: two queries over four keys, one over two. All
/// products are zero.
fn masked(spec: &AttentionSpec, mask: HostMask<'_>, options: &RunOptions<'_>) -> ([f64; 3], [f64; 3]) {
    let queries = RaggedIndices::from_lens([2, 1]).unwrap();
    let keys = RaggedIndices::from_lens([4, 2]).unwrap();
    let (q, k, v) = ([0.0f64; 3], [1.0f64; 6], [1.0f64, 3.0, 5.0, 11.0, 20.0, 40.0]);
    let (mut out, mut lse) = ([f64::NAN; 3], [f64::NAN; 3]);
    batch_prefill_ragged(
        spec,
        &view(&q, &[3, 1, 1]),
        [&view(&k, &[6, 1, 1]), &view(&v, &[6, 1, 1])],
        &queries,
        &keys,
        &mut view_mut(&mut out, &[3, 1, 1]),
        Some(&mut view_mut(&mut lse, &[3, 1])),
        mask,
        options,
    )
    .unwrap();
    (out, lse)
}

#[test]
fn masks_by_hand() {
    let (spec, options) = (spec(1), RunOptions::default());
    let indices = MaskIndices::new([(2, 4), (1, 2)]).unwrap();
    let bits = indices.pack(&[true, false, false, true, false, false, false, false, false, true]).unwrap();
    let custom = HostMask::Custom(&indices, &bits);
    let nothing = f64::NEG_INFINITY;
    let (out, lse) = masked(&spec, custom, &options);
    close(&out, &[6.0, 0.0, 40.0]);
    close(&lse, &[1.0, nothing, 0.0]);
    // A window of one key before the position hides the first key.
    let (out, _) = masked(&spec.with_window_left(1), custom, &options);
    close(&out, &[11.0, 0.0, 40.0]);
    // A prefix of one token, a delimiter, an item of one token, a delimiter;
    // queries are the item and the last delimiter, and the delimiter of the
    // other request.
    let items = ItemIndices::new([(1, &[1][..]), (1, &[][..])]).unwrap();
    let (out, lse) = masked(&spec, HostMask::MultiItem(&items), &options);
    close(&out, &[3.0, 1.0, 20.0]);
    close(&lse, &[1.0, 0.0, 0.0]);
}

#[test]
fn slopes_sinks_and_scales_by_hand() {
    let (slopes, sinks) = ([2f32.ln()], [4f32.ln()]);
    let near = |got: ([f64; 3], [f64; 3]), want: ([f64; 3], [f64; 3])| {
        let pairs = got.0.iter().zip(&want.0).chain(got.1.iter().zip(&want.1));
        assert!(pairs.clone().all(|(a, b)| (a - b).abs() < 1e-6), "{got:?} is not {want:?}");
    };
    // Exponentials 1, 2, 4 and 8 for query 0, half of them for query 1.
    let options = RunOptions { alibi_slopes: Some(view(&slopes, &[1])), ..RunOptions::default() };
    let mean = (1.0 + 6.0 + 20.0 + 88.0) / 15.0;
    let got = masked(&spec(1).with_pos_encoding_mode(PosEncodingMode::Alibi), HostMask::None, &options);
    near(got, ([mean, mean, 100.0 / 3.0], [15f64.log2(), 7.5f64.log2(), 3f64.log2()]));
    // A sink of exponential 4 beside four and two keys of exponential 1.
    let sinks = Some(view(&sinks, &[1]));
    let options = RunOptions { sinks, v_scale: Some(0.5), ..RunOptions::default() };
    let got = masked(&spec(1).with_attention_sink(), HostMask::None, &options);
    near(got, ([20.0 / 8.0 / 2.0, 20.0 / 8.0 / 2.0, 60.0 / 6.0 / 2.0], [3.0, 3.0, 6f64.log2()]));
    // The scale of keys multiplies the scale of products.
    let options = RunOptions { k_scale: Some(3.0), sm_scale: Some(0.5), ..RunOptions::default() };
    assert_eq!(options.logit_scale(&spec(1)), 1.5);
}
