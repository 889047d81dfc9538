//! A model's weights as the CPU multiplies with them.

use flashinfer_cpu_kernels::{Weights, multiply};

use crate::{
    Result,
    model::{self, weights},
};

pub type Linear = weights::Linear<Weights>;
pub type Mlp = weights::Mlp<Weights>;
pub type LayerMlp = weights::LayerMlp<Weights>;
pub type ExpertMlps = weights::ExpertMlps<Weights>;
pub type Layer = weights::Layer<Weights>;
pub type Ends = weights::Ends<Weights>;

/// The layers of a file, each packed before the next is read.
pub fn pack_layers(layers: impl Iterator<Item = Result<model::Layer>>) -> Result<Vec<Layer>> {
    layers.map(|layer| Ok(layer?.map(&|matrix| matrix.pack()))).collect()
}

/// What comes before and after them.
pub fn pack_ends(ends: model::Ends) -> Ends {
    ends.map(&|matrix| matrix.pack())
}

impl Linear {
    /// Its height, `out`.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(Weights::rows).sum()
    }

    /// `x · matrixᵀ + bias` for rows `x` of `in` numbers: `out` numbers for each.
    pub fn multiply(&self, x: &[f32]) -> Vec<f32> {
        let mut product = multiply(x, &self.parts.iter().collect::<Vec<_>>());
        if let Some(bias) = &self.bias {
            for row in product.chunks_exact_mut(bias.len()) {
                row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
            }
        }
        product
    }
}

impl Ends {
    /// The embeddings of tokens, `[tokens, hidden_size]`; zeros for those of other ranks.
    ///
    /// # Errors
    /// There is no such token.
    pub fn embed(&self, tokens: &[u32], vocab_size: usize) -> Result<Vec<f32>> {
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(format!("there is no token {token}; expected one below {vocab_size}").into());
        }
        let (tokens_here, columns) = (&self.vocab.tokens, self.embedding.columns());
        let mut numbers = vec![0.0; tokens.len() * columns];
        for (&token, numbers) in tokens.iter().zip(numbers.chunks_exact_mut(columns)) {
            if tokens_here.contains(&(token as usize)) {
                self.embedding.dequantize_row(token as usize - tokens_here.start, numbers);
            }
        }
        Ok(numbers)
    }

    /// What gives logits.
    pub fn head(&self) -> &Weights {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}
