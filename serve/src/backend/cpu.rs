//! The model on the CPU, in `f32`: candle multiplies by weights as the file holds
//! them, and everything else is FlashInfer's operations as this crate's
//! `reference` has them.

mod mlp;
mod network;
mod product;

use flashinfer_rs::{
    DType, TensorRef,
    kv::{KvLayout, PageAllocator, PagedKvCache},
    reference,
};

use self::network::Network;
use crate::{
    Result,
    backend::{Engine, Step},
    model::{Config, Ends, Layer},
};

/// The CPU's weights and cache.
pub struct Cpu {
    network: Network,
    cache: PagedKvCache,
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
            cache: PagedKvCache::on_host(pool, &[config.kv_shape(DType::F32, KvLayout::Nhd)])?,
            logits: Vec::new(),
        })
    }
}

impl Engine for Cpu {
    fn step(&mut self, step: &Step<'_>) -> Result<()> {
        self.logits = self.network.run(step, &mut self.cache)?;
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
