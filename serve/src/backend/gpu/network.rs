//! The network of a model: what a step enqueues.

use flashinfer_rs::{
    Stream, TensorMut, TensorRef,
    gpu::Tensor,
    kv::{BatchTables, PagedKvCache},
    norm::{NormOptions, fused_add_rmsnorm, rmsnorm},
    rope::CosSinCache,
    sampling::argmax,
};

use super::{
    attention::Plans,
    buffers::{Buffers, LargestParts, LogitParts, Outputs},
    half::HalfTensor,
    heads::HeadWidths,
    kernels::Kernels,
    multiplier::{Multiplier, StepProduct},
    products::Products,
    ranks::Ranks,
    rows::Rows,
    sampler::Sampler,
    tokens::Tokens,
    weights::{RESIDUAL_SCALE, Weights},
};
use crate::{Result, model::Config};

/// What steps read and do not change.
pub struct Network {
    pub stream: Stream,
    pub config: Config,
    pub widths: HeadWidths,
    pub weights: Weights,
    /// The rotary embeddings that layers choose from.
    pub ropes: Vec<CosSinCache>,
    /// Whether [one kernel](super::append::appends_at_once) turns and appends.
    pub appends_at_once: bool,
    pub kernels: Kernels,
    /// The other ranks, if this is one of several.
    pub ranks: Option<Ranks>,
}

/// What a step works with.
pub struct Pass<'a> {
    /// The rows that it has.
    pub rows: usize,
    /// The rows that its products have, whose further ones mean nothing.
    pub padded_rows: usize,
    /// The tokens of all rows.
    pub tokens: &'a Tokens,
    /// What the step before chose, row by row.
    pub chosen_before: &'a Tensor<i32>,
    /// What this one chooses.
    pub chosen: &'a mut Tensor<i32>,
    pub tables: &'a BatchTables,
    pub plans: &'a Plans<'a>,
    pub products: &'a Products,
    pub cache: &'a mut PagedKvCache,
    pub buffers: &'a mut Buffers,
    pub multiplier: &'a mut Multiplier,
}

/// Logits that a step is to give.
pub struct Head<'a> {
    /// So many, of which the first are wanted.
    pub rows: usize,
    /// The rows that they are of; `None` if they are those of the step.
    pub selected: Option<&'a Rows>,
    pub product: &'a StepProduct,
    pub outputs: &'a mut Outputs,
    /// What chooses the tokens; `None` takes the largest logits.
    pub sampler: Option<&'a mut Sampler>,
}

impl Network {
    /// Memory for the outputs of so many rows.
    pub fn outputs(&self, rows: usize) -> Result<Outputs> {
        let ranks = self.ranks.as_ref().map_or(1, Ranks::size);
        Outputs::new(&self.stream, &self.config, &self.weights.vocab, ranks, rows)
    }

    /// Adds what all ranks made.
    pub fn sum(&self, x: &mut TensorMut<'_>) -> Result<()> {
        self.ranks.as_ref().map_or(Ok(()), |ranks| ranks.all_reduce(x))
    }

    /// The sums over ranks in a step: one of embeddings, and two in each layer.
    pub fn num_sums(&self) -> usize {
        1 + 2 * self.config.num_layers()
    }

    /// Enqueues a step up to the last norm, whose results are in `x`.
    pub fn run(&self, pass: &mut Pass<'_>) -> Result<()> {
        let Buffers { residual, x, .. } = &mut *pass.buffers;
        let mut embedded = residual.rows_mut(pass.padded_rows)?;
        let scale = self.config.embedding_scale as f32 * RESIDUAL_SCALE;
        let (table, chosen) = (self.weights.embedding.view(), pass.chosen_before.view());
        let first_token = self.weights.vocab.tokens.start;
        self.kernels.embed(&mut embedded, &table, first_token, pass.tokens, &chosen, scale)?;
        self.sum(&mut embedded)?;
        if pass.products.fused {
            return self.fused_layers(pass);
        }
        let first = self.weights.layers.first().map_or(&self.weights.norm, |layer| &layer.attention_norm);
        let (mut x, residual) = (x.rows_mut(pass.rows)?, residual.rows(pass.rows)?);
        rmsnorm(&self.stream, &mut x, &residual, &first.view(), &self.residual_norm())?;
        for (index, layer) in self.weights.layers.iter().enumerate() {
            let Products { qkv, attention_output, gate_up, down, .. } = pass.products;
            self.attention(pass, index, layer)?;
            self.add(pass, [qkv, attention_output], layer.attention_post_norm.as_ref(), &layer.mlp_norm)?;
            self.mlp(pass, layer)?;
            let next = self.weights.layers.get(index + 1);
            let next = next.map_or(&self.weights.norm, |next| &next.attention_norm);
            self.add(pass, [gate_up, down], layer.mlp_post_norm.as_ref(), next)?;
        }
        Ok(())
    }

    /// Enqueues the logits of rows, and the choice of tokens.
    pub fn head(&self, pass: &mut Pass<'_>, head: &mut Head<'_>) -> Result<()> {
        let Buffers { x, .. } = &mut *pass.buffers;
        let (hidden, of_product) = head.outputs.product_mut();
        let hidden: TensorRef<'_> = match head.selected {
            Some(rows) => {
                let table = x.rows(rows.bound())?;
                self.kernels.gather_rows(&mut hidden.rows_mut(head.rows)?, &table, rows, 1.0)?;
                hidden.rows(head.rows)?
            }
            None => x.rows(head.rows)?,
        };
        let mut of_product = of_product.view_mut().narrow(0, 0, head.rows)?;
        pass.multiplier.run(head.product, &mut of_product, &hidden, &self.weights.head())?;
        if let Some(cap) = self.config.final_soft_cap {
            self.kernels.soft_cap(&mut of_product, cap as f32)?;
        }
        let Outputs { logits, parts, .. } = &mut *head.outputs;
        let mut logits = logits.view_mut().narrow(0, 0, head.rows)?;
        let mut tokens = pass.chosen.view_mut().narrow(0, 0, head.rows)?;
        if let (Some(ranks), Some(LogitParts { mine, all, largest })) = (&self.ranks, parts) {
            let mine = mine.view().narrow(0, 0, head.rows)?;
            if let (Some(largest), None) = (largest, &head.sampler) {
                return self.choose_of_ranks(ranks, &mut tokens, &mine, largest);
            }
            let mut all = all.view_mut().narrow(0, 0, ranks.size() * head.rows)?;
            ranks.all_gather(&mut all, &mine)?;
            self.kernels.join_columns(&mut logits, &all.as_ref())?;
        }
        match &mut head.sampler {
            Some(sampler) => {
                let before = pass.chosen_before.view();
                sampler.enqueue(&self.kernels, &self.stream, &mut tokens, &logits.as_ref(), &before)
            }
            None => Ok(argmax(&self.stream, &mut tokens, &logits.as_ref())?),
        }
    }

    /// Enqueues the choice of the largest logits, of which each rank has some: ranks tell each other theirs.
    fn choose_of_ranks(
        &self,
        ranks: &Ranks,
        tokens: &mut TensorMut<'_>,
        logits: &TensorRef<'_>,
        largest: &mut LargestParts,
    ) -> Result<()> {
        let (rows, LargestParts { places, mine, all }) = (tokens.numel(), largest);
        let mut places = places.view_mut().narrow(0, 0, rows)?;
        let mut mine = mine.view_mut().narrow(0, 0, rows)?;
        let mut all = all.view_mut().narrow(0, 0, ranks.size() * rows)?;
        argmax(&self.stream, &mut places, logits)?;
        let first = self.weights.vocab.tokens.start;
        self.kernels.tell_largest(&mut mine, logits, &places.as_ref(), first)?;
        ranks.all_gather(&mut all, &mine.as_ref())?;
        self.kernels.choose_largest(tokens, &all.as_ref(), ranks.size())
    }

    /// Of norms of the residual.
    pub fn residual_norm(&self) -> NormOptions {
        let scale = f64::from(RESIDUAL_SCALE);
        NormOptions::with_eps(self.config.rms_eps * scale * scale)
    }

    /// Adds what attention or the MLP made, on all ranks, to the residual, normed if it is, and norms
    /// the sum. `products` are among the kernels since the residual was written.
    fn add(
        &self,
        pass: &mut Pass<'_>,
        products: [&StepProduct; 2],
        post_norm: Option<&HalfTensor>,
        norm: &HalfTensor,
    ) -> Result<()> {
        let Buffers { residual, x, made, .. } = &mut *pass.buffers;
        let (mut x, mut residual) = (x.rows_mut(pass.rows)?, residual.rows_mut(pass.rows)?);
        let options = self.residual_norm();
        if let (Some(made), Some(weight)) = (made, post_norm) {
            let mut made = made.rows_mut(pass.rows)?;
            self.sum(&mut made)?;
            let options = NormOptions::with_eps(self.config.rms_eps);
            rmsnorm(&self.stream, &mut x, &made.as_ref(), &weight.view(), &options)?;
        } else if let Some(ranks) = &self.ranks {
            let early = products.into_iter().any(StepProduct::is_cublaslt);
            // SAFETY: the first kernel of a product of cuBLASLt's begins when all before it is over.
            return unsafe {
                ranks.all_reduce_add_norm(&mut x, &mut residual, &norm.view(), &options, early)
            };
        }
        Ok(fused_add_rmsnorm(&self.stream, &mut x, &mut residual, &norm.view(), &options)?)
    }
}
