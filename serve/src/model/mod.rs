//! A model: what its network computes, and its weights, one layer at a time.
//!
//! | module | its job |
//! |---|---|
//! | [`gguf`] | reads files: metadata, and where tensors are |
//! | [`architecture`] | what the files of an architecture have in common, a file for each |
//! | [`config`], [`rope`], [`keys`] | what one file's network computes |
//! | [`weights`], [`matrix`] | the tensors of a layer, and one of them |
//! | [`shard`] | the part of them that one rank of several has |
//! | [`synthetic`] | random weights, to measure |

use std::{
    collections::HashMap,
    mem,
    path::{Path, PathBuf},
};

use candle_core::quantized::gguf_file::{Content, VersionedMagic};
use flashinfer_rs::artifacts::Digest;

pub mod architecture;
pub mod config;
pub mod gguf;
mod keys;
mod matrix;
pub mod rope;
pub mod shard;
pub mod synthetic;
pub mod weights;

pub use self::{
    config::Config,
    weights::{Ends, Layer},
};
use self::{
    gguf::Gguf,
    shard::{Rank, Shard},
    weights::Tensors,
};
use crate::Result;

/// An open model, whose tensors are all there, in the shapes that its network
/// needs.
#[derive(Debug)]
pub struct Model {
    /// The metadata, without tensors.
    pub content: Content,
    /// Of the whole model.
    pub config: Config,
    gguf: Gguf,
    shard: Shard,
    bytes: u64,
}

impl Model {
    /// Opens a file, with the other parts of the model if it is one of several,
    /// and reads everything but the tensors.
    ///
    /// # Errors
    /// It cannot be read, is broken, or would be computed wrongly.
    pub fn open(path: &Path) -> Result<Self> {
        Self::of(Gguf::open(path)?)
    }

    /// The same of the files of a model: one, or all parts in order, whatever their names are.
    pub fn open_files(files: &[PathBuf]) -> Result<Self> {
        Self::of(Gguf::open_files(files)?)
    }

    fn of(mut gguf: Gguf) -> Result<Self> {
        let config = Config::read(&gguf);
        let checked = config.and_then(|config| {
            let shard = Shard::whole(&config);
            Tensors::check(&gguf, &config, &shard).map(|bytes| (config, shard, bytes))
        });
        let refused = |e| format!("{} is not a model that this program runs: {e}", gguf.path().display());
        let (config, shard, bytes) = checked.map_err(refused)?;
        let content = Content {
            magic: VersionedMagic::GgufV3,
            metadata: mem::take(&mut gguf.metadata),
            tensor_infos: HashMap::new(),
            tensor_data_offset: 0,
        };
        Ok(Self { content, config, gguf, shard, bytes })
    }

    /// Leaves the part of a rank: what is read from now on.
    ///
    /// # Errors
    /// The model cannot be divided among so many ranks.
    pub fn divide(self, rank: Rank) -> Result<Self> {
        let shard = Shard::of(&self.config, rank).map_err(|e| self.named(e))?;
        let bytes = Tensors::check(&self.gguf, &self.config, &shard).map_err(|e| self.named(e))?;
        Ok(Self { shard, bytes, ..self })
    }

    /// Whether it is the whole model, or the part of rank 0.
    pub fn is_first_rank(&self) -> bool {
        self.shard.adds_biases
    }

    /// What the network of the part that is read computes.
    pub fn shard_config(&self) -> Config {
        self.shard.config(&self.config)
    }

    /// The embedding, the last norm and the output head.
    pub fn ends(&self) -> Result<Ends> {
        self.tensors().ends().map_err(|e| self.named(e))
    }

    /// The layers, each read when its turn comes.
    pub fn layers(&self) -> impl ExactSizeIterator<Item = Result<Layer>> {
        let layers = 0..self.config.layers.len();
        layers.map(|index| self.tensors().layer(index).map_err(|e| self.named(e)))
    }

    /// Bytes of all tensors, or of a rank's parts of them.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What tells models apart: a digest of what it computes, and of its tensors' names, types and
    /// shapes, but not of their numbers.
    pub fn digest(&self) -> String {
        let tensors: Vec<_> =
            self.gguf.tensors.iter().map(|(name, info)| (name, info.dtype, &info.shape)).collect();
        Digest::of(format!("{:?} {tensors:?}", self.config).as_bytes()).to_string()
    }

    /// Bytes of tensors that were read so far.
    pub fn bytes_read(&self) -> u64 {
        self.gguf.bytes_read()
    }

    fn tensors(&self) -> Tensors<'_> {
        Tensors::new(&self.gguf, &self.config, &self.shard)
    }

    fn named(&self, error: crate::Error) -> crate::Error {
        format!("{}: {error}", self.gguf.path().display()).into()
    }
}
