//! The model on the CPU, in `f32` but for products with quantized weights, which keep the bits of
//! their file.

mod attention;
mod cache;
mod mlp;
mod network;
mod weights;

use flashinfer_rs::kv::PageAllocator;

use self::{cache::Cache, network::Network};
use crate::{
    Result,
    backend::{Backend, Output, Sample, Step, sampler},
    group::Sums,
    model::{Config, Ends, Layer},
};

/// The CPU's weights and cache.
pub struct Cpu {
    network: Network,
    cache: Cache,
    logits: Vec<f32>,
    /// What came of the step that was not collected.
    samples: Option<Vec<Sample>>,
}

impl Cpu {
    /// Takes the weights and makes the memory of a pool.
    pub fn new(
        config: &Config,
        ends: Ends,
        layers: impl Iterator<Item = Result<Layer>>,
        pool: &PageAllocator,
    ) -> Result<Self> {
        Self::of_rank(config, ends, layers, pool, None)
    }

    /// The same of a rank's part of a model, with what adds over ranks.
    pub fn of_rank(
        config: &Config,
        ends: Ends,
        layers: impl Iterator<Item = Result<Layer>>,
        pool: &PageAllocator,
        sums: Option<Sums>,
    ) -> Result<Self> {
        let positions = config.context_length.min(pool.num_pages() * pool.page_size());
        Ok(Self {
            network: Network::new(
                config,
                weights::pack_ends(ends),
                weights::pack_layers(layers)?,
                positions,
                sums,
            ),
            cache: Cache::new(config, pool)?,
            logits: Vec::new(),
            samples: None,
        })
    }
}

impl Backend for Cpu {
    fn vocab_size(&self) -> usize {
        self.network.config.vocab_size
    }

    fn enqueue(&mut self, step: &Step<'_>) -> Result<()> {
        if self.samples.is_some() {
            return Err("a step was enqueued before the one before it was collected".into());
        }
        let tokens = step.known_tokens()?;
        self.logits.clear();
        self.cache.copy_pages()?;
        let outputs: Vec<_> = step.outputs.iter().map(|output| output.row).collect();
        let Self { network, cache, .. } = self;
        // On a thread of the pool, which takes part in what it starts there.
        self.logits = rayon::scope(|_| network.run(step.batch, &tokens, &outputs, cache))?;
        let outputs = Output::after_tokens(step.outputs, &tokens)?;
        self.samples = Some(sampler::sample(&outputs, &self.logits, self.vocab_size())?);
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<Sample>> {
        Ok(self.samples.take().ok_or("no step was enqueued")?)
    }

    fn logits(&self) -> Result<Vec<f32>> {
        Ok(self.logits.clone())
    }
}
