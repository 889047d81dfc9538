//! Whether drawn tokens follow a distribution.

/// Pearson's statistic: how far counts are from what probabilities let expect,
/// and in how many independent numbers. Tokens that are expected fewer than 10
/// times are counted together.
pub fn statistic(counts: &[u64], probs: &[f64]) -> (f64, usize) {
    assert_eq!(counts.len(), probs.len());
    let draws = counts.iter().sum::<u64>() as f64;
    let (mut sum, mut bins) = (0.0, 0usize);
    let (mut rare, mut rare_count) = (0.0, 0.0);
    let mut bin = |expected: f64, count: f64| {
        sum += (count - expected).powi(2) / expected;
        bins += 1;
    };
    for (&count, &prob) in counts.iter().zip(probs) {
        let (expected, count) = (prob * draws, count as f64);
        if expected < 10.0 {
            rare += expected;
            rare_count += count;
        } else {
            bin(expected, count);
        }
    }
    if rare > 1.0 {
        bin(rare, rare_count);
    }
    (sum, bins.saturating_sub(1))
}

/// What a right distribution exceeds about once in 10⁹ tests (Wilson and
/// Hilferty's approximation: the cube root is nearly normal; 6 deviations).
pub fn limit(degrees: usize) -> f64 {
    let spread = 2.0 / (9.0 * degrees as f64);
    degrees as f64 * (1.0 - spread + 6.0 * spread.sqrt()).powi(3)
}

/// Panics unless the tokens may have been drawn with these probabilities.
#[track_caller]
pub fn assert_drawn_from(what: &str, tokens: &[usize], probs: &[f64]) {
    let mut counts = vec![0; probs.len()];
    for &token in tokens {
        assert!(probs[token] > 0.0, "{what}: token {token} cannot be drawn");
        counts[token] += 1;
    }
    let (statistic, degrees) = statistic(&counts, probs);
    if degrees > 0 {
        let limit = limit(degrees);
        eprintln!("{what}: {} draws, chi-square {statistic:.1} of {degrees} ({limit:.1})", tokens.len());
        assert!(statistic < limit, "{what}: chi-square {statistic} with {degrees} degrees, limit {limit}");
    }
}
