//! What is measured on GPUs without a server around it.

use std::sync::Arc;

use flashinfer_rs::kv::PageAllocator;

use crate::{
    Result,
    backend::{
        device::load_gpu,
        gpu::{Gpu, GpuOptions},
    },
    group::Group,
    model::{
        Config, Model,
        shard::{Rank, Shard, VocabPart},
        synthetic::{self, Shape},
    },
};

/// What is measured.
pub enum Source {
    /// A model.
    Model(Box<Model>),
    /// Random weights of a shape.
    Shape(Shape),
}

/// What a rank has of it.
pub struct Part {
    /// What its network computes.
    pub config: Config,
    weights: Weights,
}

enum Weights {
    Model(Box<Model>),
    Random(VocabPart),
}

impl Source {
    /// The part of a rank.
    ///
    /// # Errors
    /// It cannot be divided among so many.
    pub fn divide(self, rank: Rank) -> Result<Part> {
        match self {
            Self::Model(model) => {
                let model = Box::new(model.divide(rank)?);
                Ok(Part { config: model.shard_config(), weights: Weights::Model(model) })
            }
            Self::Shape(shape) => {
                let whole = shape.config()?;
                let shard = Shard::of(&whole, rank)?;
                Ok(Part { config: shard.config(&whole), weights: Weights::Random(shard.vocab) })
            }
        }
    }
}

impl Part {
    /// Its engine.
    ///
    /// # Errors
    /// There is no GPU that can be used, or the model does not fit it.
    pub fn load(self, pool: &PageAllocator, options: GpuOptions, group: Option<&Arc<Group>>) -> Result<Gpu> {
        match self.weights {
            Weights::Model(model) => load_gpu(&model, pool, options, group),
            Weights::Random(vocab) => {
                let (ends, layers) = synthetic::weights(&self.config, vocab)?;
                Gpu::of_rank(&self.config, ends, layers, pool, options, group.map(|group| &**group))
            }
        }
    }
}
