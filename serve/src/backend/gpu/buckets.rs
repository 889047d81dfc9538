//! What is kept for steps of up to so many rows, a power of two: graphs, products, and
//! the memory that has to be there for them.

use flashinfer_rs::{attention::ReplayKey, graph::CapturedStep};

use super::{
    Gpu,
    lanes::{LANES, Lane},
    network::Network,
    products::{HeadProduct, Products},
    sampler::Sampler,
};
use crate::{Result, backend::Output};

/// Edits of logits that there is room for at first.
const FIRST_EDITS: usize = 1024;

/// What is kept for steps of up to so many rows, a power of two.
#[derive(Default)]
pub struct Bucket {
    /// Take the largest logits; for each lane.
    pub greedy: [Graphs; LANES],
    /// Sample.
    pub sampled: [Graphs; LANES],
    pub products: Option<Products>,
    pub head: Option<HeadProduct>,
}

/// Graphs of the same kernels but those of attention, which differ where keys are divided.
#[derive(Default)]
pub struct Graphs(Vec<Graph>);

/// Graphs that are kept of each.
const MAX_GRAPHS: usize = 4;

impl Graphs {
    /// The place of the one that fits plans with these keys.
    pub fn position(&self, keys: &[ReplayKey]) -> Option<usize> {
        self.0.iter().position(|graph| graph.keys == keys)
    }

    /// The one at a place.
    pub fn get(&self, place: usize) -> Option<&Graph> {
        self.0.get(place)
    }

    /// Keeps a further one, instead of the oldest if there are many, and returns its place.
    pub fn push(&mut self, graph: Graph) -> usize {
        if self.0.len() >= MAX_GRAPHS {
            self.0.remove(0);
        }
        self.0.push(graph);
        self.0.len() - 1
    }
}

/// A captured step, and what tells the plans that it fits.
pub struct Graph {
    pub keys: Vec<ReplayKey>,
    pub step: CapturedStep,
}

/// Which graph was launched.
#[derive(Clone, Copy)]
pub struct Launched {
    pub bucket: usize,
    pub sampled: bool,
    /// Its place among those.
    pub place: usize,
}

impl Gpu {
    /// Makes the products of so many rows, and has the fastest kernels for those of
    /// graphs.
    pub(super) fn prepare_products(&mut self, bucket: usize, graph: bool) -> Result<()> {
        let Self { buckets, network, buffers, multiplier, choice, .. } = self;
        let products = match &mut buckets[bucket].products {
            Some(products) => products,
            empty => {
                let Network { config, widths, weights, .. } = &*network;
                let rows = 1 << bucket;
                empty.insert(Products::new(&self.cublas, config, *widths, weights.dtype, rows, *choice)?)
            }
        };
        match graph {
            true => products.tune(&network.weights, buffers, multiplier, network.ranks.as_ref()),
            false => Ok(()),
        }
    }

    /// Makes room for logits of so many rows, their product, and what is needed to
    /// choose tokens. Returns whether tokens are sampled.
    pub(super) fn prepare_outputs(&mut self, bucket: usize, graph: bool, outputs: &[Output]) -> Result<bool> {
        let rows = 1 << bucket;
        if rows > self.outputs.capacity() {
            self.forget_graphs();
            self.outputs = self.network.outputs(rows)?;
        }
        let Self { buckets, network, buffers, multiplier, choice, outputs: memory, .. } = self;
        let head = match &mut buckets[bucket].head {
            Some(head) => head,
            empty => {
                let Network { config, weights, .. } = &*network;
                empty.insert(HeadProduct::new(&self.cublas, config, weights.vocab.rows, rows, *choice)?)
            }
        };
        if graph {
            head.tune(&network.weights, buffers, memory, multiplier)?;
        }
        // Under a constraint the host chooses.
        let chosen_here = |output: &Output| !output.is_greedy() && output.allowed.is_none();
        // Ranks that compare their largest logits have no others.
        let compares = memory.can_compare();
        let sampled = outputs.iter().any(|output| chosen_here(output) || compares && output.needs_logits());
        self.has_logits = sampled || !compares;
        if sampled {
            let others = |output: &Output| output.last_edit.as_ref().map_or(0, |last| last.others.len());
            let edits = outputs.iter().map(|output| output.edits.len().max(others(output))).sum();
            self.reserve_samplers(rows, edits)?;
        }
        Ok(sampled)
    }

    /// Has a sampler in each lane, with room for so many rows and edits.
    fn reserve_samplers(&mut self, rows: usize, edits: usize) -> Result<()> {
        let samplers = || self.lanes.iter().map(|lane| lane.sampler.as_ref());
        let max_edits = samplers().flatten().map(Sampler::max_edits).max().unwrap_or(FIRST_EDITS);
        if samplers().any(|sampler| sampler.is_none_or(|sampler| !sampler.fits(rows, edits))) {
            self.forget_graphs();
            let rows = rows.max(self.outputs.capacity());
            let max_edits = max_edits.max(edits.next_power_of_two());
            let Network { stream, config, .. } = &self.network;
            for Lane { sampler, .. } in &mut self.lanes {
                *sampler = Some(Sampler::new(&self.cuda, stream, rows, max_edits, config.vocab_size)?);
            }
        }
        Ok(())
    }

    /// To be called before memory is replaced that graphs work on.
    pub(super) fn forget_graphs(&mut self) {
        self.launched = None;
        self.uploads.set_moved();
        for bucket in &mut self.buckets {
            (bucket.greedy, bucket.sampled) = Default::default();
        }
    }
}
