//! The layers of a model, one after the other.

use flashinfer_cpu_kernels::multiply;
use flashinfer_rs::kv::Batch;

use super::{
    attention::attend,
    cache::Cache,
    mlp,
    weights::{Ends, Layer},
};
use crate::{
    Result,
    group::Sums,
    model::{Config, config::LayerConfig},
};

/// What steps read and do not change.
pub struct Network {
    pub config: Config,
    ends: Ends,
    layers: Vec<Layer>,
    /// Cosines and sines of all positions, `[positions, rotary_dim]`, of each of
    /// the rotary embeddings.
    cos_sin: Vec<Vec<f32>>,
    /// What adds over ranks, of which this is one.
    sums: Option<Sums>,
}

impl Network {
    /// For sequences of up to so many tokens.
    pub fn new(
        config: &Config,
        ends: Ends,
        layers: Vec<Layer>,
        positions: usize,
        sums: Option<Sums>,
    ) -> Self {
        let rows = config.ropes.iter().map(|rope| rope.for_length(positions).cos_sin_rows(positions));
        Self { cos_sin: rows.collect(), config: config.clone(), ends, layers, sums }
    }

    /// Computes new tokens of a batch, and gives the logits of these rows of them.
    pub fn run(
        &mut self,
        batch: &Batch,
        tokens: &[u32],
        outputs: &[usize],
        cache: &mut Cache,
    ) -> Result<Vec<f32>> {
        let Config { hidden_size, embedding_scale, .. } = self.config;
        if tokens.is_empty() {
            return Ok(Vec::new());
        }
        let mut residual = self.ends.embed(tokens, self.config.vocab_size)?;
        self.sum(&mut residual)?;
        residual.iter_mut().for_each(|x| *x *= embedding_scale as f32);
        for index in 0..self.layers.len() {
            let x = self.norm(&residual, &self.layers[index].attention_norm);
            let mut x = self.attention(index, &x, batch, cache)?;
            self.sum(&mut x)?;
            self.add(&mut residual, x, self.layers[index].attention_post_norm.as_deref());
            let x = self.norm(&residual, &self.layers[index].mlp_norm);
            let mut x = mlp::run(&self.config, &self.layers[index].mlp, &x)?;
            self.sum(&mut x)?;
            self.add(&mut residual, x, self.layers[index].mlp_post_norm.as_deref());
        }
        if outputs.is_empty() {
            return Ok(Vec::new());
        }
        let wanted = outputs.iter().flat_map(|&row| &residual[row * hidden_size..][..hidden_size]);
        let x = self.norm(&wanted.copied().collect::<Vec<_>>(), &self.ends.norm);
        let logits = multiply(&x, &[self.ends.head()]);
        let mut logits = self.of_all_tokens(logits, outputs.len())?;
        if let Some(cap) = self.config.final_soft_cap {
            let cap = cap as f32;
            logits.iter_mut().for_each(|logit| *logit = cap * (*logit / cap).tanh());
        }
        Ok(logits)
    }

    /// Adds what all ranks made.
    fn sum(&mut self, x: &mut [f32]) -> Result<()> {
        self.sums.as_mut().map_or(Ok(()), |sums| sums.all_reduce(x))
    }

    /// The logits of all tokens, of which each rank made some.
    fn of_all_tokens(&mut self, mine: Vec<f32>, rows: usize) -> Result<Vec<f32>> {
        let Some(sums) = &mut self.sums else { return Ok(mine) };
        let parts = sums.all_gather(&mine)?;
        let row = |row: usize| parts.iter().flat_map(move |part| part.chunks(part.len() / rows).nth(row));
        let logits: Vec<_> = (0..rows).flat_map(|at| row(at).flatten().copied()).collect();
        let expected = rows * self.config.vocab_size;
        match logits.len() == expected {
            true => Ok(logits),
            false => Err(format!("the ranks made {} logits; expected {expected}", logits.len()).into()),
        }
    }

    fn attention(&self, index: usize, x: &[f32], batch: &Batch, cache: &mut Cache) -> Result<Vec<f32>> {
        let (layer, LayerConfig { window, rope }) = (&self.layers[index], self.config.layers[index]);
        let [qo, kv] = self.config.widths();
        let qkv = layer.qkv.multiply(x);
        let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
        for row in qkv.chunks_exact(qo + 2 * kv) {
            q.extend_from_slice(&row[..qo]);
            k.extend_from_slice(&row[qo..qo + kv]);
            v.extend_from_slice(&row[qo + kv..]);
        }
        if let Some(norms) = &layer.qk_norm {
            (q, k) = (self.norm(&q, &norms.q), self.norm(&k, &norms.k));
        }
        let positions = batch.append_indices().positions();
        self.turn(rope, positions, &mut q);
        self.turn(rope, positions, &mut k);
        let cache = cache.append(index, batch, &k, &v);
        Ok(layer.attention_output.multiply(&attend(&self.config, window, batch, &q, cache)))
    }

    /// Turns the heads of rows by their positions.
    fn turn(&self, rope: usize, positions: &[i32], x: &mut [f32]) {
        let (head_dim, rotary_dim) = (self.config.head_dim, self.config.ropes[rope].rotary_dim());
        let pairs = rotary_dim / 2;
        let width = x.len() / positions.len();
        for (row, &position) in x.chunks_exact_mut(width).zip(positions) {
            let (cos, sin) =
                self.cos_sin[rope][position as usize * rotary_dim..][..rotary_dim].split_at(pairs);
            for head in row.chunks_exact_mut(head_dim) {
                for (pair, (cos, sin)) in cos.iter().zip(sin).enumerate() {
                    let [a, b] = match self.config.architecture.interleave {
                        true => [2 * pair, 2 * pair + 1],
                        false => [pair, pair + pairs],
                    };
                    let (x, y) = (head[a], head[b]);
                    head[a] = x * cos - y * sin;
                    head[b] = y * cos + x * sin;
                }
            }
        }
    }

    /// Adds to the residual what attention or an MLP made.
    fn add(&self, residual: &mut [f32], x: Vec<f32>, post_norm: Option<&[f32]>) {
        let x = match post_norm {
            Some(weight) => self.norm(&x, weight),
            None => x,
        };
        let scale = self.config.residual_scale as f32;
        residual.iter_mut().zip(x).for_each(|(sum, x)| *sum += scale * x);
    }

    /// The norm of rows of the weight's length.
    fn norm(&self, x: &[f32], weight: &[f32]) -> Vec<f32> {
        let mut out = Vec::with_capacity(x.len());
        for row in x.chunks_exact(weight.len()) {
            let squares: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let scale = (squares / row.len() as f64 + self.config.rms_eps).sqrt().recip() as f32;
            out.extend(row.iter().zip(weight).map(|(x, weight)| x * scale * weight));
        }
        out
    }
}
