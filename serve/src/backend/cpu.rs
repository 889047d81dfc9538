//! The model on the CPU, in `f32`: candle multiplies by weights in the types in
//! which the file holds them.

mod attention;
mod cache;
mod mlp;
mod network;

use flashinfer_rs::{TensorRef, kv::PageAllocator, reference};

use self::{cache::Cache, network::Network};
use crate::{
    Result,
    backend::{Engine, Step},
    model::{Config, Ends, Layer},
};

/// The CPU's weights and cache.
pub struct Cpu {
    network: Network,
    cache: Cache,
    logits: Vec<f32>,
}

impl Cpu {
    /// Takes the weights and makes the memory of a pool.
    pub fn new(
        config: &Config,
        ends: Ends,
        layers: impl Iterator<Item = Result<Layer>>,
        pool: &PageAllocator,
    ) -> Result<Self> {
        let positions = config.context_length.min(pool.num_pages() * pool.page_size());
        Ok(Self {
            network: Network::new(config, ends, layers.collect::<Result<_>>()?, positions),
            cache: Cache::new(config, pool),
            logits: Vec::new(),
        })
    }
}

impl Engine for Cpu {
    fn step(&mut self, step: &Step<'_>) -> Result<()> {
        self.logits.clear();
        self.cache.copy_pages()?;
        self.logits = self.network.run(step.batch, step.tokens, step.outputs, &mut self.cache)?;
        Ok(())
    }

    fn logits(&self) -> Result<Vec<f32>> {
        Ok(self.logits.clone())
    }

    fn greedy(&self) -> Result<Vec<Option<u32>>> {
        let vocab = self.network.config.vocab_size;
        let rows = TensorRef::from_slice(&self.logits, &[self.logits.len() / vocab, vocab])?;
        let tokens = reference::argmax(&rows)?.into_iter();
        Ok(tokens.map(|token| token.map(|token| token as u32)).collect())
    }
}
