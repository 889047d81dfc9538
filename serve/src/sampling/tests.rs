//! Parameters, what they make of logits, and the statistics of what is drawn.

use std::{collections::BTreeMap, sync::Arc};

use flashinfer_rs::indices::LogitEdit;
use proptest::prelude::*;

use super::*;
use crate::backend::{Output, sampler};

fn refused(change: impl FnOnce(&mut SamplingParams)) -> String {
    let mut params = SamplingParams::default();
    change(&mut params);
    params.check(100).unwrap_err().to_string()
}

#[test]
fn parameters_out_of_range_are_named() {
    SamplingParams::default().check(1).unwrap();
    let widest = SamplingParams {
        temperature: 1e-4,
        top_k: u32::MAX,
        top_p: f32::MIN_POSITIVE,
        min_p: 1.0,
        seed: Some(u64::MAX),
        repetition_penalty: 1e-3,
        presence_penalty: -2.0,
        frequency_penalty: 2.0,
        logit_bias: [(0, -100.0), (99, 100.0)].into(),
        logprobs: Some(20),
        prompt_logprobs: Some(20),
        stop: vec!["x".into(); 1024],
        stop_token_ids: vec![0, 99],
        min_tokens: 7,
        max_tokens: Some(7),
        n: 128,
        ignore_eos: true,
    };
    widest.check(100).unwrap();
    for (text, expected) in [
        (refused(|p| p.temperature = -1.0), "temperature is -1; expected 0, or a number of at least 0.0001"),
        (refused(|p| p.temperature = f32::NAN), "temperature is NaN"),
        (refused(|p| p.temperature = f32::INFINITY), "temperature is inf"),
        (refused(|p| p.temperature = 1e-5), "temperature is 0.00001"),
        (refused(|p| p.top_p = 0.0), "top_p is 0; expected more than 0, and at most 1"),
        (refused(|p| p.top_p = 1.5), "top_p is 1.5"),
        (refused(|p| p.top_p = f32::NAN), "top_p is NaN"),
        (refused(|p| p.min_p = -0.1), "min_p is -0.1; expected a number from 0 to 1"),
        (refused(|p| p.min_p = f32::NAN), "min_p is NaN"),
        (refused(|p| p.repetition_penalty = 0.0), "repetition_penalty is 0; expected more than 0"),
        (refused(|p| p.repetition_penalty = f32::INFINITY), "repetition_penalty is inf"),
        (refused(|p| p.presence_penalty = 2.1), "presence_penalty is 2.1; expected a number from -2 to 2"),
        (refused(|p| p.frequency_penalty = f32::NAN), "frequency_penalty is NaN"),
        (refused(|p| p.logit_bias = [(100, 1.0)].into()), "logit_bias is 100; expected tokens below 100"),
        (refused(|p| p.logit_bias = [(1, f32::NEG_INFINITY)].into()), "logit_bias is -inf"),
        (refused(|p| p.logprobs = Some(21)), "logprobs is 21; expected at most 20"),
        (refused(|p| p.prompt_logprobs = Some(21)), "prompt_logprobs is 21; expected at most 20"),
        (refused(|p| p.stop = vec![String::new()]), "stop is an empty string"),
        (refused(|p| p.stop = vec!["x".into(); 1025]), "stop is a list of 1025; expected at most 1024"),
        (refused(|p| p.stop = vec!["x".repeat(20_000)]), "stop is 20000 bytes"),
        (refused(|p| p.stop_token_ids = vec![5, 100]), "stop_token_ids is 100; expected tokens below 100"),
        (refused(|p| p.max_tokens = Some(0)), "max_tokens is 0; expected at least 1"),
        (refused(|p| (p.min_tokens, p.max_tokens) = (3, Some(2))), "min_tokens is 3; expected at most"),
        (refused(|p| p.n = 0), "n is 0; expected a number from 1 to 128"),
        (refused(|p| p.n = 129), "n is 129"),
    ] {
        assert!(text.starts_with(expected), "{text}");
    }
}

fn sampler(params: SamplingParams, prompt: &[u32], ends: &[u32]) -> Sampler {
    Sampler::new(&Arc::new(params), 1, 0, prompt, ends.iter().copied())
}

#[test]
fn penalties_count_tokens_as_vllm_does() {
    let params = SamplingParams {
        repetition_penalty: 2.0,
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        logit_bias: [(3, 1.0), (9, -7.0)].into(),
        ..SamplingParams::default()
    };
    let mut sampler = sampler(params, &[4, 3, 4], &[]);
    let edit = |token, repetition_penalty, bias| LogitEdit { token, repetition_penalty, bias };
    // The prompt is repeated, and is no part of the answer.
    assert_eq!(sampler.output(0, None).edits, [edit(3, 2.0, 1.0), edit(4, 2.0, 0.0), edit(9, 1.0, -7.0)]);
    for token in [5, 3, 5] {
        sampler.push(token);
    }
    let expected = [edit(3, 2.0, 0.25), edit(4, 2.0, 0.0), edit(5, 2.0, -1.0), edit(9, 1.0, -7.0)];
    assert_eq!(sampler.output(0, None).edits, expected);
}

/// The edits of an output, bit for bit.
fn edits(output: &Output) -> Vec<(u32, u32, u32)> {
    let bits = |edit: &LogitEdit| (edit.token, edit.repetition_penalty.to_bits(), edit.bias.to_bits());
    output.edits.iter().map(bits).collect()
}

proptest! {
    /// What is said before a token is known becomes, once it is, what is said after it, bit for bit.
    #[test]
    fn an_output_ahead_becomes_the_one_after_the_token(
        prompt in prop::collection::vec(0..9u32, 0..9),
        answer in prop::collection::vec(0..9u32, 1..20),
        (repetition_penalty, presence_penalty, frequency_penalty) in (
            prop_oneof![Just(1.0f32), 0.1..3.0f32],
            prop_oneof![Just(0.0f32), -2.0..2.0f32],
            prop_oneof![Just(0.0f32), -2.0..2.0f32],
        ),
        logit_bias in prop::collection::btree_map(0..9u32, prop_oneof![Just(-0.0f32), -3.0..3.0f32], 0..4),
        (min_tokens, temperature) in (0..6usize, prop_oneof![Just(0.0f32), Just(0.7)]),
        ends in prop::collection::vec(0..9u32, 0..3),
    ) {
        let params = SamplingParams {
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            logit_bias,
            min_tokens,
            temperature,
            ..SamplingParams::default()
        };
        let mut sampler = sampler(params, &prompt, &ends);
        for token in answer {
            let ahead = sampler.output_ahead(3).after(token);
            sampler.push(token);
            let known = sampler.output(3, None);
            prop_assert_eq!(edits(&ahead), edits(&known));
            prop_assert_eq!(ahead, known);
        }
    }
}

/// Most tokens of a prompt, and all that are new, have one edit when they come; what is told apart is
/// short.
#[test]
fn the_edits_of_few_tokens_are_told_apart() {
    let params = SamplingParams {
        repetition_penalty: 2.0,
        frequency_penalty: 0.5,
        logit_bias: [(8, 1.0)].into(),
        min_tokens: 3,
        ..SamplingParams::default()
    };
    let mut sampler = sampler(params, &[1, 2, 3, 4], &[9]);
    let edit = |token, bias| LogitEdit { token, repetition_penalty: 2.0, bias };
    let last = |sampler: &Sampler| sampler.output_ahead(0).last_edit.unwrap();
    sampler.push(3);
    assert_eq!((last(&sampler).repetition_penalty, last(&sampler).bias), (2.0, -0.5));
    assert_eq!(last(&sampler).others, [edit(3, -1.0), edit(8, 0.5), LogitEdit::ban(9)]);
    sampler.push(6);
    assert_eq!(last(&sampler).others, [edit(3, -1.0), edit(6, -1.0), edit(8, 0.5)]);
}

#[test]
fn edits_that_depend_on_a_token_are_refused_before_it_is_known() {
    let params = SamplingParams { presence_penalty: 0.5, ..SamplingParams::default() };
    let output = sampler(params, &[], &[]).output_ahead(0);
    let text = sampler::sample(std::slice::from_ref(&output), &[1.0, 0.8], 2).unwrap_err().to_string();
    assert_eq!(text, "the edits of row 0 depend on its token; expected known ones");
    let tokens =
        [0, 1].map(|token| sampler::sample(&[output.after(token)], &[1.0, 0.8], 2).unwrap()[0].token);
    assert_eq!(tokens, [Some(1), Some(0)]);
}

#[test]
fn without_penalties_nothing_is_edited() {
    let mut sampler = sampler(SamplingParams::default(), &[1, 2], &[0]);
    sampler.push(3);
    assert_eq!(sampler.output(7, None), Output::greedy(7));
    assert_eq!(sampler.output_ahead(7), Output::greedy(7));
    assert!(sampler.output(7, None).is_greedy());
}

#[test]
fn end_tokens_are_banned_until_there_are_enough_tokens() {
    let params = SamplingParams { min_tokens: 2, logit_bias: [(8, 1.0)].into(), ..SamplingParams::default() };
    let mut sampler = sampler(params, &[], &[7, 8]);
    for _ in 0..2 {
        assert_eq!(sampler.output(0, None).edits, [LogitEdit::ban(7), LogitEdit::ban(8)]);
        sampler.push(5);
    }
    assert_eq!(sampler.output(0, None).edits, [LogitEdit::bias(8, 1.0)]);
}

/// The random numbers of the positions of some answers.
fn uniforms(seed: u64, choice: usize, len: usize) -> Vec<f32> {
    let params = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
    let mut sampler = Sampler::new(&Arc::new(params), seed, choice, &[], [].into_iter());
    (0..len)
        .map(|_| {
            let uniform = sampler.output(0, None).uniform;
            sampler.push(0);
            uniform
        })
        .collect()
}

#[test]
fn random_numbers_are_those_of_seed_choice_and_position() {
    assert_eq!(uniforms(5, 0, 50), uniforms(5, 0, 60)[..50]);
    assert_ne!(uniforms(5, 0, 50), uniforms(6, 0, 50));
    assert_ne!(uniforms(5, 0, 50), uniforms(5, 1, 50));
    let all: Vec<_> = (0..200).flat_map(|seed| uniforms(seed, seed as usize % 3, 100)).collect();
    assert!(all.iter().all(|uniform| (0.0..1.0).contains(uniform)));
    let mut counts = [0usize; 16];
    all.iter().for_each(|uniform| counts[(uniform * 16.0) as usize] += 1);
    check_counts(&counts, &[1.0 / 16.0; 16], "uniforms");
}

/// Compares counts with probabilities by their chi-square, which is below this but for
/// one in a million draws of numbers: those here are always the same.
fn check_counts(counts: &[usize], probs: &[f64], what: &str) {
    let total: usize = counts.iter().sum();
    let possible = probs.iter().filter(|&&prob| prob > 0.0).count();
    let chi_square: f64 = counts
        .iter()
        .zip(probs)
        .map(|(&count, &prob)| {
            let expected = prob * total as f64;
            assert!(prob > 0.0 || count == 0, "{what}: drew what cannot be: {counts:?}");
            if prob > 0.0 { (count as f64 - expected).powi(2) / expected } else { 0.0 }
        })
        .sum();
    // The mean of the distribution and five of its standard deviations, and a little for few degrees.
    let degrees = (possible - 1) as f64;
    assert!(chi_square < degrees + 5.0 * (2.0 * degrees).sqrt() + 15.0, "{what}: {chi_square}, {counts:?}");
}

/// The distribution that parameters make of logits, from their definition: in `f64`, over
/// all tokens in order of probability.
fn exact(logits: &[f64], params: &SamplingParams) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights = logits.iter().map(|logit| ((logit - largest) / f64::from(params.temperature)).exp());
    let mut weights: Vec<_> =
        weights.map(|weight| if weight >= params.min_p.into() { weight } else { 0.0 }).collect();
    let mut order: Vec<_> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
    if params.top_k > 0 {
        order.iter().skip(params.top_k as usize).for_each(|&token| weights[token] = 0.0);
    }
    let sum: f64 = weights.iter().sum();
    let mut before = 0.0;
    for &token in &order {
        let kept = before < f64::from(params.top_p) * sum;
        before += weights[token];
        weights[token] = if kept { weights[token] } else { 0.0 };
    }
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / sum).collect()
}

#[test]
fn what_is_drawn_has_the_exact_distribution() {
    const LOGITS: [f32; 8] = [1.0, -0.5, 2.5, 0.0, 2.0, -3.0, 1.5, 0.7];
    let with = |temperature| SamplingParams { temperature, ..SamplingParams::default() };
    let penalties = SamplingParams {
        repetition_penalty: 1.5,
        presence_penalty: 0.4,
        frequency_penalty: 0.3,
        logit_bias: [(5, 3.0)].into(),
        ..with(1.0)
    };
    // The prompt is 2 and 1, the answer so far 4 and 4.
    let penalized = [1.0, -0.75, 2.5 / 1.5, 0.0, 2.0 / 1.5 - 1.0, 0.0, 1.5, 0.7].map(f64::from);
    let plain = LOGITS.map(f64::from);
    for (name, params, logits) in [
        ("temperature 1", with(1.0), plain),
        ("temperature 0.5", with(0.5), plain),
        ("temperature 3", with(3.0), plain),
        ("top-k", SamplingParams { top_k: 3, ..with(1.0) }, plain),
        ("top-p", SamplingParams { top_p: 0.7, ..with(1.0) }, plain),
        ("min-p", SamplingParams { min_p: 0.25, ..with(1.0) }, plain),
        ("all filters", SamplingParams { min_p: 0.05, top_k: 5, top_p: 0.9, ..with(1.3) }, plain),
        ("penalties", penalties.clone(), penalized),
        ("penalties and filters", SamplingParams { top_k: 6, top_p: 0.8, ..penalties }, penalized),
    ] {
        let (expected, params) = (exact(&logits, &params), Arc::new(params));
        let outputs: Vec<_> = (0..20_000)
            .map(|seed| {
                let mut sampler = Sampler::new(&params, seed, 0, &[2, 1], [].into_iter());
                sampler.push(4);
                sampler.push(4);
                sampler.output(seed as usize, None)
            })
            .collect();
        let samples = sampler::sample(&outputs, &LOGITS.repeat(outputs.len()), LOGITS.len()).unwrap();
        let mut counts = [0; LOGITS.len()];
        samples.iter().for_each(|sample| counts[sample.token.unwrap() as usize] += 1);
        check_counts(&counts, &expected, name);
    }
}

#[test]
fn greedy_rows_take_the_first_of_the_largest_and_share_a_step_with_others() {
    let logits = [1.0f32, 3.0, 3.0, f32::NAN, 0.0, 1.0, 5.0, -1.0, 2.0];
    let drawn = Output { temperature: 1.0, uniform: 0.999, ..Output::greedy(2) };
    let outputs = [Output::greedy(0), Output::greedy(1), drawn];
    let tokens: Vec<_> =
        sampler::sample(&outputs, &logits, 3).unwrap().into_iter().map(|sample| sample.token).collect();
    assert_eq!(tokens, [Some(1), None, Some(2)]);
}

#[test]
fn log_probabilities_are_natural_and_of_the_model() {
    // Probabilities of 1/2, 1/4, 1/8, 1/8.
    let logits = [8.0f32, 4.0, 2.0, 2.0].map(f32::ln);
    let edits = vec![LogitEdit::ban(0), LogitEdit::bias(3, 5.0)];
    let output = Output { edits, logprobs: Some(3), ..Output::greedy(0) };
    let samples = sampler::sample(&[output], &logits, 4).unwrap();
    let (token, logprobs) = (samples[0].token, samples[0].logprobs.clone().unwrap());
    assert_eq!(token, Some(3));
    let near = |got: f32, prob: f32| assert!((got - prob.ln()).abs() < 1e-6, "{got}, {prob}");
    near(logprobs.chosen, 0.125);
    // Of equal ones the first.
    let top: BTreeMap<_, _> = logprobs.top.iter().map(|top| (top.token, top.logprob)).collect();
    assert_eq!(logprobs.top.iter().map(|top| top.token).collect::<Vec<_>>(), [0, 1, 2]);
    [(0, 0.5), (1, 0.25), (2, 0.125)].into_iter().for_each(|(token, prob)| near(top[&token], prob));
    for count in [0, 9] {
        assert_eq!(sampler::logprobs(&logits, 1, count).top.len(), count.min(4));
    }
}
