//! What is measured on a GPU without a server around it.

use flashinfer_rs::kv::PageAllocator;

use crate::{
    Result,
    backend::{
        device::load_gpu,
        gpu::{Gpu, GpuOptions},
    },
    model::{
        Config, Model,
        synthetic::{self, Shape},
    },
};

/// What is measured.
pub enum Source<'a> {
    /// A model.
    Model(&'a Model),
    /// Random weights of a shape.
    Shape(Shape),
}

impl Source<'_> {
    pub fn config(&self) -> Result<Config> {
        match self {
            Self::Model(model) => Ok(model.config.clone()),
            Self::Shape(shape) => shape.config(),
        }
    }

    /// Its engine, for its `config`.
    ///
    /// # Errors
    /// There is no GPU that can be used, or the model does not fit it.
    pub fn load(&self, config: &Config, pool: &PageAllocator, options: GpuOptions) -> Result<Gpu> {
        match self {
            Self::Model(model) => load_gpu(model, pool, options),
            Self::Shape(_) => {
                let (ends, layers) = synthetic::weights(config)?;
                Gpu::new(config, ends, layers, pool, options)
            }
        }
    }
}
