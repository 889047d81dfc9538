//! The model on the CPU, in `f32`: candle multiplies by weights as the file holds
//! them, and everything else is FlashInfer's operations as this crate's
//! `reference` has them.

mod mlp;
mod network;
mod product;

use flashinfer_rs::{
    DType,
    kv::{KvLayout, PageAllocator, PagedKvCache},
};

use self::network::Network;
use crate::{
    Result,
    backend::{Backend, Sample, Step, sampler},
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

impl Backend for Cpu {
    fn vocab_size(&self) -> usize {
        self.network.config.vocab_size
    }

    fn step(&mut self, step: &Step<'_>) -> Result<Vec<Sample>> {
        self.logits.clear();
        self.cache.copy_pages()?;
        self.logits = self.network.run(step, &mut self.cache)?;
        sampler::sample(step.outputs, &self.logits, self.vocab_size())
    }

    fn logits(&self) -> Result<Vec<f32>> {
        Ok(self.logits.clone())
    }
}
