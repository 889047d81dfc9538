//! What a layer has after attention: an MLP, or experts.

use flashinfer_cpu_kernels::{Gate, multiply};
use rayon::prelude::*;

use super::weights::{ExpertMlps, LayerMlp, Mlp};
use crate::{
    Result,
    model::{
        architecture::Activation,
        config::{Config, Experts, Gating},
    },
};

/// What a layer's MLP or experts make of rows.
pub fn run(config: &Config, mlp: &LayerMlp, x: &[f32]) -> Result<Vec<f32>> {
    match (mlp, config.experts) {
        (LayerMlp::Dense(mlp), _) => Ok(dense(config, mlp, x)),
        (LayerMlp::Experts(mlps), Some(experts)) => Ok(routed(config, experts, mlps, x)),
        (LayerMlp::Experts(_), None) => Err("a layer has experts, and its model none".into()),
    }
}

fn dense(config: &Config, mlp: &Mlp, x: &[f32]) -> Vec<f32> {
    let gate_up = mlp.gate_up.multiply(x);
    let inner = mlp.gate_up.rows() / 2;
    let gate = match config.activation {
        Activation::Silu => Gate::Silu,
        Activation::GeluTanh => Gate::GeluTanh,
    };
    let mut activated = vec![0.0; gate_up.len() / 2];
    let rows = activated.par_chunks_exact_mut(inner).zip(gate_up.par_chunks_exact(2 * inner));
    rows.for_each(|(out, row)| gate.multiply(&row[..inner], &row[inner..], out));
    mlp.down.multiply(&activated)
}

/// What experts make of the rows that the router gives them, and the one that
/// every row has.
fn routed(config: &Config, experts: Experts, mlps: &ExpertMlps, x: &[f32]) -> Vec<f32> {
    let hidden = config.hidden_size;
    let scores = multiply(x, &[&mlps.router]);
    let mut out = vec![0.0; x.len()];
    let mut add = |row: usize, share: f32, part: &[f32]| {
        let sums = &mut out[row * hidden..][..hidden];
        sums.iter_mut().zip(part).for_each(|(sum, value)| *sum += share * value);
    };
    let routes = route(experts, &scores);
    for (mlp, routes) in mlps.experts.iter().zip(routes).filter(|(_, routes)| !routes.is_empty()) {
        let mine = routes.iter().flat_map(|&(row, _)| &x[row * hidden..][..hidden]);
        let parts = dense(config, mlp, &mine.copied().collect::<Vec<_>>());
        for (&(row, share), part) in routes.iter().zip(parts.chunks_exact(hidden)) {
            add(row, share, part);
        }
    }
    if let Some(shared) = &mlps.shared {
        let shares = multiply(x, &[&shared.gate]);
        let parts = dense(config, &shared.mlp, x);
        for (row, (share, part)) in shares.into_iter().zip(parts.chunks_exact(hidden)).enumerate() {
            add(row, sigmoid(share), part);
        }
    }
    out
}

/// The rows of each expert, and its share of each.
fn route(experts: Experts, scores: &[f32]) -> Vec<Vec<(usize, f32)>> {
    let Experts { count, used, gating, normalize, scale, .. } = experts;
    let mut routes = vec![Vec::new(); count];
    for (row, scores) in scores.chunks_exact(count).enumerate() {
        let mut best: Vec<_> = (0..count).collect();
        best.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        let most = scores[best[0]];
        best.truncate(used);
        // A share before it is divided by the sum of shares.
        let part = |score: f32| match gating {
            Gating::Softmax => (score - most).exp(),
            Gating::Sigmoid => sigmoid(score),
        };
        let shares: Vec<_> = best.iter().map(|&expert| part(scores[expert])).collect();
        let sum: f32 = match (normalize, gating) {
            (true, _) => shares.iter().sum(),
            (false, Gating::Softmax) => scores.iter().map(|&score| part(score)).sum(),
            (false, Gating::Sigmoid) => 1.0,
        };
        for (expert, share) in best.into_iter().zip(shares) {
            routes[expert].push((row, share / sum * scale as f32));
        }
    }
    routes
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
