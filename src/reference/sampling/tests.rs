use proptest::prelude::*;

use super::{
    philox::{PhiloxSequence, philox},
    *,
};
use crate::{
    indices::BoundedIndices,
    reference::testing::{refused, view, view_mut},
    sampling::{Parameter, Philox},
};

/// The known answers that the authors of Philox published.
#[test]
fn philox_is_philox() {
    assert_eq!(philox(0, [0, 0]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    assert_eq!(philox(u64::MAX, [u64::MAX, u64::MAX]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    let mut numbers = PhiloxSequence::new(Philox::new(0, 0), 0);
    assert_eq!(numbers.uniform(), f64::from(0x6627_e8d5u32 as f32 / 2f32.powi(32) + 2f32.powi(-33)));
    let mut later = PhiloxSequence::new(Philox::new(0, 5), 0);
    for _ in 0..4 {
        numbers.uniform();
    }
    assert_eq!(numbers.uniform(), later.uniform());
}

fn filtered(probs: &[f64], filter: Filter<'_>) -> Vec<f64> {
    let mut out = vec![f64::NAN; probs.len()];
    let shape = [1, probs.len()];
    filtered_probs(&mut view_mut(&mut out, &shape), &view(probs, &shape), &filter).unwrap();
    out
}

#[test]
fn filters_by_hand() {
    let probs = [0.125, 0.5, 0.125, 0.25];
    assert_eq!(filtered(&probs, Filter::None), probs);
    assert_eq!(filtered(&probs, Filter::TopK(1.into())), [0.0, 1.0, 0.0, 0.0]);
    let two = [0.0, 2.0 / 3.0, 0.0, 1.0 / 3.0];
    assert_eq!(filtered(&probs, Filter::TopK(2.into())), two);
    // Ties pass together.
    assert_eq!(filtered(&probs, Filter::TopK(3.into())), probs);
    assert_eq!(filtered(&probs, Filter::TopK(9.into())), probs);
    assert_eq!(filtered(&probs, Filter::TopP(0.5.into())), [0.0, 1.0, 0.0, 0.0]);
    assert_eq!(filtered(&probs, Filter::TopP(0.51.into())), two);
    assert_eq!(filtered(&probs, Filter::TopP(0.75.into())), two);
    assert_eq!(filtered(&probs, Filter::TopP(0.8.into())), probs);
    assert_eq!(filtered(&probs, Filter::TopP(1.0.into())), probs);
    assert_eq!(filtered(&probs, Filter::MinP(0.5.into())), two);
    assert_eq!(filtered(&probs, Filter::MinP(0.0.into())), probs);
    assert_eq!(filtered(&probs, Filter::TopKTopP(3.into(), 0.6.into())), two);
    assert_eq!(filtered(&probs, Filter::TopKTopP(1.into(), 0.9.into())), [0.0, 1.0, 0.0, 0.0]);
    // NaN is no probability.
    assert_eq!(filtered(&[f64::NAN, 0.5, 0.5], Filter::TopK(1.into())), [0.0, 0.5, 0.5]);
    assert_eq!(filtered(&[0.0, f64::NAN], Filter::TopP(0.5.into())), [0.0, 0.0]);
}

#[test]
fn parameters_of_each_row() {
    let probs = [0.125, 0.5, 0.125, 0.25].repeat(3);
    let mut out = [f64::NAN; 12];
    let (top_k, top_p) = ([1i32, 0, -1], [0.5f32, 0.7, 2.0]);
    let filter = Filter::TopK(Parameter::PerRow(view(&top_k, &[3])));
    filtered_probs(&mut view_mut(&mut out, &[3, 4]), &view(&probs, &[3, 4]), &filter).unwrap();
    assert_eq!(out, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.125, 0.5, 0.125, 0.25]);
    let filter = Filter::TopP(Parameter::PerRow(view(&top_p, &[3])));
    filtered_probs(&mut view_mut(&mut out, &[3, 4]), &view(&probs, &[3, 4]), &filter).unwrap();
    assert_eq!(out[..4], [0.0, 1.0, 0.0, 0.0]);
    assert_eq!(out[8..], probs[..4]);
    // By the row of the output: the same row with two numbers.
    let indices = BoundedIndices::new(3, vec![2, 2]).unwrap();
    let filter = Filter::TopK(Parameter::PerRow(view(&[1i64, 0], &[2])));
    let draws =
        sampling_from_probs(&view(&probs, &[3, 4]), &filter, Some(&indices), Philox::default()).unwrap();
    assert_eq!(draws, [Some(1), None]);
}

#[test]
fn masks_and_softmax_by_hand() {
    let logits = [1.0, -3.0, 1.0, 2.0];
    let mut out = [f64::NAN; 4];
    let mut mask = |k: u32| {
        top_k_mask_logits(&mut view_mut(&mut out, &[1, 4]), &view(&logits, &[1, 4]), k.into()).unwrap();
        out
    };
    let hidden = f64::NEG_INFINITY;
    assert_eq!(mask(1), [hidden, hidden, hidden, 2.0]);
    assert_eq!(mask(2), [1.0, hidden, 1.0, 2.0]);
    assert_eq!(mask(4), logits);
    assert_eq!(mask(u32::MAX), logits);
    let logits = [0.0, 2f64.ln(), hidden];
    let mut soft = [f64::NAN; 3];
    softmax(&mut view_mut(&mut soft, &[1, 3]), &view(&logits, &[1, 3]), 1.0.into()).unwrap();
    assert!((soft[0] - 1.0 / 3.0).abs() < 1e-15 && soft[2] == 0.0, "{soft:?}");
    softmax(&mut view_mut(&mut soft, &[1, 3]), &view(&logits, &[1, 3]), 0.5.into()).unwrap();
    assert!((soft[0] - 0.2).abs() < 1e-15 && (soft[1] - 0.8).abs() < 1e-15, "{soft:?}");
}

/// What the kernels do with rows and parameters that mean nothing.
#[test]
fn senseless_numbers_are_no_probabilities() {
    const INF: f64 = f64::INFINITY;
    assert_eq!(filtered(&[f64::NAN, -3.0, 0.5, 0.25], Filter::TopP(0.5.into())), [0.0, 0.0, 1.0, 0.0]);
    let infinite = [0.5, INF, 0.25, -INF];
    for filter in [Filter::TopP(0.5.into()), Filter::TopP(1.0.into())] {
        let got = filtered(&infinite, filter);
        assert!(got[1].is_nan() && [got[0], got[2], got[3]] == [0.0; 3], "{got:?}");
    }
    for nothing in [0.0f32, -1.0, f32::NAN, f32::NEG_INFINITY] {
        let nothing = [nothing];
        let top_p = Filter::TopP(Parameter::PerRow(view(&nothing, &[1])));
        assert_eq!(filtered(&infinite, top_p), [0.0; 4], "{nothing:?}");
    }
    for everything in [1.0f32, 2.0, f32::INFINITY] {
        let everything = [everything];
        let top_p = Filter::TopP(Parameter::PerRow(view(&everything, &[1])));
        assert_eq!(filtered(&[0.25, 0.25, 0.5, 0.0], top_p), [0.25, 0.25, 0.5, 0.0]);
    }
    assert_eq!(filtered(&[0.25], Filter::MinP(Parameter::PerRow(view(&[f32::NAN], &[1])))), [0.0]);
}

/// Among neighbouring numbers, upstream's search for the threshold does not end.
#[test]
fn neighbouring_numbers_have_a_threshold() {
    let row = [0x3eae_147b, 0x3eae_147a, 0x3ea3_d70a].map(|bits| f64::from(f32::from_bits(bits)));
    let got = filtered(&row, Filter::TopP(0.6.into()));
    assert!((got[0] - 0.5).abs() < 1e-6 && (got[1] - 0.5).abs() < 1e-6 && got[2] == 0.0, "{got:?}");
}

#[test]
fn the_first_of_the_largest() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let rows = [
        ([1.0, 3.0, 3.0], Some(1)),
        ([0.0; 3], Some(0)),
        ([-1.0, -0.0, 0.0], Some(1)),
        ([9.999999e-7, 1e-6, 0.0], Some(1)),
        ([-inf; 3], Some(0)),
        ([1.0, inf, inf], Some(1)),
        ([nan, 1.0, 2.0], None),
        ([inf, 1.0, -nan], None),
    ];
    let (logits, want): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
    let logits = logits.concat();
    assert_eq!(argmax(&view(&logits, &[want.len(), 3])).unwrap(), want);
    refused(argmax(&view(&logits[..0], &[2, 0])).map(drop), "logits");
    refused(argmax(&view(&logits, &[24])).map(drop), "logits");
}

/// `top_k` 1 keeps all tokens that are the likeliest, and draws any of them.
#[test]
fn ties_are_all_likeliest() {
    let row = [0.4f32, 0.4, 0.2];
    let all = BoundedIndices::new(1, vec![0; 100]).unwrap();
    let tokens =
        sampling_from_probs(&view(&row, &[1, 3]), &Filter::TopK(1.into()), Some(&all), Philox::new(7, 0))
            .unwrap();
    for token in 0..3 {
        assert_eq!(tokens.contains(&Some(token)), token < 2, "{token}");
    }
}

#[test]
fn what_is_certain_is_drawn() {
    let mut probs = [0.0f32; 5 * 7];
    let hot = [3, 0, 6, 6, 2];
    hot.iter().enumerate().for_each(|(row, &token)| probs[row * 7 + token as usize] = 1.0);
    let (probs, random) = (view(&probs, &[5, 7]), Philox::new(3, 4));
    let want: Vec<_> = hot.iter().map(|&token| Some(token)).collect();
    for filter in [
        Filter::None,
        Filter::TopK(1.into()),
        Filter::TopP(0.1.into()),
        Filter::MinP(1.0.into()),
        Filter::TopKTopP(3.into(), 1.0.into()),
    ] {
        assert_eq!(sampling_from_probs(&probs, &filter, None, random).unwrap(), want);
    }
    let zeros = [0.0f32; 7];
    assert_eq!(sampling_from_probs(&view(&zeros, &[1, 7]), &Filter::None, None, random).unwrap(), [None]);
}

#[test]
fn draws_follow_probabilities() {
    let probs = [0.125f32, 0.5, 0.0, 0.125, 0.25];
    let indices = BoundedIndices::new(1, vec![0; 1 << 14]).unwrap();
    let count = |filter| {
        let mut counts = [0.0; 5];
        for token in
            sampling_from_probs(&view(&probs, &[1, 5]), &filter, Some(&indices), Philox::new(9, 8)).unwrap()
        {
            counts[token.unwrap() as usize] += 1.0 / f64::from(1 << 14);
        }
        counts
    };
    for filter in [Filter::None, Filter::TopP(0.7.into()), Filter::MinP(0.25.into())] {
        let want = filtered(&probs.map(f64::from), filter);
        let got = count(filter);
        assert!(got.iter().zip(&want).all(|(got, want)| (got - want).abs() < 0.02), "{got:?} {want:?}");
    }
}

#[test]
fn chains_by_hand() {
    // Upstream's own example: the first draft is accepted, as the target has
    // as much, the second is refused, as the target has nothing.
    let draft = [0.0f32, 0.2, 0.6, 0.2, 0.0, 1.0, 0.0, 0.0];
    let target = [0.0f32, 0.1, 0.6, 0.3, 1.0, 0.0, 0.0, 0.0, 0.7, 0.1, 0.1, 0.1];
    let ids = BoundedIndices::new(4, vec![2, 1]).unwrap();
    for seed in 0..20 {
        let draws = chain_speculative_sampling(
            &view(&draft, &[1, 2, 4]),
            &ids,
            &view(&target, &[1, 3, 4]),
            Philox::new(seed, 0),
        )
        .unwrap();
        // `u` may be 1, which does not accept; these seeds have none.
        assert_eq!(draws.output_token_ids, [2, 0, -1]);
        assert_eq!(
            (draws.output_accepted_token_num, draws.output_emitted_draft_token_num),
            (vec![1], vec![1])
        );
    }
}

/// Whatever the draft, the first token is distributed as the target's.
#[test]
fn chains_are_distributed_as_the_target() {
    let (batch, vocab) = (1 << 14, 3);
    let (draft, target) = ([0.5f32, 0.25, 0.25], [0.25f32, 0.5, 0.25, 0.125, 0.125, 0.75]);
    let draws_of_draft = sampling_from_probs(
        &view(&draft, &[1, vocab]),
        &Filter::None,
        Some(&BoundedIndices::new(1, vec![0; batch]).unwrap()),
        Philox::new(1, 0),
    )
    .unwrap();
    let ids = BoundedIndices::new(vocab, draws_of_draft.into_iter().flatten().collect()).unwrap();
    let draws = chain_speculative_sampling(
        &view(&draft.repeat(batch), &[batch, 1, vocab]),
        &ids,
        &view(&target.repeat(batch), &[batch, 2, vocab]),
        Philox::new(2, 0),
    )
    .unwrap();
    let part = |place: usize, token: i32| {
        let of = |pair: &&[i32]| pair[place] >= 0;
        let pairs = || draws.output_token_ids.chunks(2).filter(of);
        pairs().filter(|pair| pair[place] == token).count() as f64 / pairs().count() as f64
    };
    for (place, want) in target.chunks(vocab).enumerate() {
        for (token, &want) in want.iter().enumerate() {
            let got = part(place, token as i32);
            assert!((got - f64::from(want)).abs() < 0.02, "token {token} at {place}: {got}");
        }
    }
    // A draft is accepted with the probability that both have in common.
    let emitted = draws.output_emitted_draft_token_num.iter().sum::<i32>();
    assert!((f64::from(emitted) / batch as f64 - 0.75).abs() < 0.02);
}

#[test]
fn wrong_input_is_refused() {
    let probs = [0.25f32; 4];
    let mut out = [7.0f32; 4];
    let one = view(&probs, &[1, 4]);
    let mut run = |filter| filtered_probs(&mut view_mut(&mut out, &[1, 4]), &one, &filter);
    refused(run(Filter::TopK(0.into())), "top_k");
    for top_p in [0.0, -1.0, 1.5, f64::NAN, 1e-60] {
        refused(run(Filter::TopP(top_p.into())), "top_p");
    }
    refused(run(Filter::MinP(1.5.into())), "min_p");
    refused(run(Filter::TopP(Parameter::PerRow(view(&probs, &[4])))), "top_p");
    refused(run(Filter::TopK(Parameter::PerRow(view(&[1i32; 4], &[4])))), "top_k");
    refused(run(Filter::TopK(Parameter::PerRow(view(&probs, &[4])))), "top_k");
    for temperature in [0.0, -1.0, f64::INFINITY, f64::NAN] {
        refused(softmax(&mut view_mut(&mut out, &[1, 4]), &one, temperature.into()), "temperature");
    }
    refused(softmax(&mut view_mut(&mut out, &[2, 2]), &one, 1.0.into()), "out");
    let indices = BoundedIndices::new(2, vec![0]).unwrap();
    let call = sampling_from_probs(&one, &Filter::None, Some(&indices), Philox::default());
    refused(call.map(drop), "indices");
    let ids = BoundedIndices::new(2, vec![0, 1]).unwrap();
    let cube = view(&probs, &[1, 1, 4]);
    refused(chain_speculative_sampling(&cube, &ids, &cube, Philox::default()).map(drop), "target_probs");
    let wide = [0.25f32; 8];
    let call = chain_speculative_sampling(&cube, &ids, &view(&wide, &[1, 2, 4]), Philox::default());
    refused(call.map(drop), "draft_token_ids");
    assert_eq!(out, [7.0; 4]);
}

proptest! {
    /// What passes is what has few enough likelier ones, by counting.
    #[test]
    fn filters_are_their_definition(
        raw in prop::collection::vec(0u8..20, 1..40),
        top_k in 1u32..45,
        top_p in 0.01f64..1.0,
    ) {
        let sum: f64 = raw.iter().map(|&x| f64::from(x)).sum();
        prop_assume!(sum > 0.0);
        let probs: Vec<f64> = raw.iter().map(|&x| f64::from(x) / sum).collect();
        let got = filtered(&probs, Filter::TopKTopP(top_k.into(), top_p.into()));
        let top_p = f64::from(top_p as f32);
        for (token, &x) in probs.iter().enumerate() {
            let likelier = probs.iter().filter(|&&other| other > x);
            let (count, mass) = (likelier.clone().count() as u32, likelier.sum::<f64>());
            // Where a sum meets the limit, its order decides.
            if (mass - top_p).abs() > 1e-9 {
                prop_assert_eq!(got[token] > 0.0, x > 0.0 && count < top_k && mass < top_p);
            }
        }
        prop_assert!((got.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    }
}
