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
    /// What its network computes, with as many heads as the rank that has most.
    pub config: Config,
    weights: Weights,
}

enum Weights {
    Model(Box<Model>),
    /// Of what the rank itself has.
    Random(Box<Config>, VocabPart),
}

impl Source {
    /// What tells it from others.
    ///
    /// # Errors
    /// It is a shape that makes no sense.
    pub fn digest(&self) -> Result<String> {
        match self {
            Self::Model(model) => Ok(model.digest()),
            Self::Shape(shape) => Ok(format!("{:?}", shape.config()?)),
        }
    }

    /// The part of a rank.
    ///
    /// # Errors
    /// It cannot be divided among so many.
    pub fn divide(self, rank: Rank) -> Result<Part> {
        match self {
            Self::Model(model) => {
                let model = Box::new(model.divide(rank)?);
                Ok(Part { config: model.even_config(), weights: Weights::Model(model) })
            }
            Self::Shape(shape) => {
                let whole = shape.config()?;
                let shard = Shard::of(&whole, rank)?;
                let (config, own) = (shard.even_config(&whole), Box::new(shard.config(&whole)));
                Ok(Part { config, weights: Weights::Random(own, shard.vocab) })
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
            Weights::Random(own, vocab) => {
                let (ends, layers) = synthetic::weights(&own, vocab)?;
                Gpu::of_rank(&self.config, ends, layers, pool, options, group.map(|group| &**group))
            }
        }
    }
}
