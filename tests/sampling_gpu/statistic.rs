//! The statistic itself, with draws of the reference.

use std::panic::catch_unwind;

use flashinfer_rs::{
    TensorRef,
    indices::BoundedIndices,
    reference::{Filter, sampling_from_probs},
    sampling::Philox,
};

use test_support::chi_square::{assert_drawn_from, limit, statistic};

const PROBS: [f32; 8] = [0.3, 0.2, 0.15, 0.125, 0.1, 0.075, 0.04, 0.01];
const DRAWS: usize = 20_000;

fn draws(seed: u64) -> Vec<usize> {
    let indices = BoundedIndices::new(1, vec![0; DRAWS]).unwrap();
    let probs = TensorRef::from_slice(&PROBS, &[1, 8]).unwrap();
    let tokens = sampling_from_probs(&probs, &Filter::None, Some(&indices), Philox::new(seed, 0)).unwrap();
    tokens.into_iter().map(|token| token.unwrap() as usize).collect()
}

#[test]
fn limits_are_exceeded_once_in_a_billion() {
    // The chance of exceeding it, which an even number of degrees has in
    // closed form: exp(-x/2) times the first terms of the series of exp(x/2).
    for degrees in [2, 10, 40, 100] {
        let half = limit(degrees) / 2.0;
        let (mut term, mut sum) = (1.0, 0.0);
        for at in 0..degrees / 2 {
            sum += term;
            term *= half / (at + 1) as f64;
        }
        let chance = sum * (-half).exp();
        assert!((1e-11..2e-9).contains(&chance), "{degrees}: {chance:e}");
    }
}

#[test]
fn right_draws_are_far_from_the_limit() {
    for seed in 0..100 {
        let mut counts = [0; 8];
        draws(seed).into_iter().for_each(|token| counts[token] += 1);
        let (sum, degrees) = statistic(&counts, &PROBS.map(f64::from));
        assert_eq!(degrees, 7);
        assert!(sum < limit(7) / 1.5, "seed {seed}: {sum}");
    }
}

#[test]
fn slightly_wrong_distributions_are_caught() {
    let right = PROBS.map(f64::from);
    let tokens = draws(5);
    assert_drawn_from("right", &tokens, &right);
    let caught = |what: &str, probs: [f64; 8]| {
        assert!(catch_unwind(|| assert_drawn_from(what, &tokens, &probs)).is_err(), "{what}");
    };
    let with = |changes: &[(usize, f64)]| {
        let mut probs = right;
        changes.iter().for_each(|&(token, change)| probs[token] += change);
        probs
    };
    // A token of 0.2 that should have 0.225, a rare one that should have
    // 0.02, and two that are mistaken for each other.
    caught("0.025 moved", with(&[(0, -0.025), (1, 0.025)]));
    caught("0.01 moved", with(&[(0, -0.01), (7, 0.01)]));
    caught("exchanged", with(&[(2, -0.025), (3, 0.025)]));
    caught("impossible", with(&[(7, -0.01), (0, 0.01)]));
}
