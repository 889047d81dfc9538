//! Attention of a small model with layers of three kinds, what it is given, and where that lies.

use std::ffi::c_void;

use flashinfer_rs::{
    DType, Device, PageIndices,
    attention::{AttentionSpec, Heads},
    indices::AppendIndices,
};
use half::bf16;
use rand::RngExt;

use crate::{
    Result,
    decode::Layer,
    memory::Memory,
    views::{CacheShape, LayerCache, Rows},
};

pub const LAYERS: usize = 3;
pub const REQUESTS: usize = 3;
pub const HEADS: Heads = Heads::new(8, 2);
pub const PAGES: usize = 32;
pub const PAGE_SIZE: usize = 16;
const HEAD_DIMS: [usize; LAYERS] = [128, 128, 64];
/// Each request's pages lie anywhere.
const REQUEST_PAGES: [&[i32]; REQUESTS] = [&[3, 0, 5, 1], &[7, 2], &[20, 8, 30, 10, 4, 12, 13, 31, 15]];
/// The most rows of a step.
const ROWS: usize = 128;

/// What the layers compute with: the second sees the last 41 tokens, the third has narrower heads.
pub fn specs() -> [AttentionSpec; LAYERS] {
    let spec = |layer: usize| AttentionSpec::new(DType::BF16, HEAD_DIMS[layer]);
    [spec(0), spec(1).with_window_left(40), spec(2)]
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    Prefill,
    Decode,
    Captured,
}

/// One step: how many new tokens each request has, and random numbers for all layers.
pub struct Step {
    pub mode: Mode,
    pub new: [usize; REQUESTS],
    /// Tokens of each request, with the new ones.
    pub lens: [usize; REQUESTS],
    q: [Vec<bf16>; LAYERS],
    kv: [[Vec<bf16>; 2]; LAYERS],
}

impl Step {
    /// Prompts of 50, 17 and 130 tokens in two parts, and three tokens more of each.
    pub fn all() -> Vec<Self> {
        let mut lens = [0; REQUESTS];
        let steps = [
            (Mode::Prefill, [32, 17, 64]),
            (Mode::Prefill, [18, 0, 66]),
            (Mode::Decode, [1; REQUESTS]),
            (Mode::Captured, [1; REQUESTS]),
            (Mode::Captured, [1; REQUESTS]),
        ];
        let step = |(mode, new): (Mode, [usize; REQUESTS])| {
            lens.iter_mut().zip(new).for_each(|(len, new)| *len += new);
            let rows: usize = new.iter().sum();
            let row = |layer: usize, heads: usize| random(rows * heads * HEAD_DIMS[layer]);
            let kv = |layer| [(); 2].map(|()| row(layer, HEADS.num_kv_heads));
            let q = [0, 1, 2].map(|layer| row(layer, HEADS.num_qo_heads));
            Self { mode, new, lens, q, kv: [0, 1, 2].map(kv) }
        };
        steps.into_iter().map(step).collect()
    }

    pub fn rows(&self) -> usize {
        self.new.iter().sum()
    }

    /// The block table as the engine has it: of each request so many pages as its tokens need.
    pub fn pages(&self) -> flashinfer_rs::Result<PageIndices> {
        let pages = REQUEST_PAGES.iter().zip(self.lens);
        let requests = pages.map(|(pages, len)| (&pages[..len.div_ceil(PAGE_SIZE)], len));
        PageIndices::from_requests(PAGES, PAGE_SIZE, requests)
    }

    /// The new tokens are each request's last.
    pub fn append(&self, pages: &PageIndices) -> flashinfer_rs::Result<AppendIndices> {
        let mut indptr = vec![0i32];
        self.new.iter().for_each(|&new| indptr.push(indptr[indptr.len() - 1] + new as i32));
        AppendIndices::last_tokens(pages, &indptr)
    }
}

fn random(len: usize) -> Vec<bf16> {
    let mut rng = rand::rng();
    (0..len).map(|_| bf16::from_f32(rng.random_range(-1.0..1.0))).collect()
}

/// Where all of it lies; the same addresses in every step.
pub struct Buffers {
    device: Device,
    /// The first two layers, page first.
    pages: *mut c_void,
    /// The third, keys and values apart.
    split: [*mut c_void; 2],
    q: [*mut c_void; LAYERS],
    kv: [[*mut c_void; 2]; LAYERS],
    out: [*mut c_void; LAYERS],
}

fn cache_shape(layer: usize) -> CacheShape {
    CacheShape { pages: PAGES, page_size: PAGE_SIZE, heads: HEADS.num_kv_heads, head_dim: HEAD_DIMS[layer] }
}

impl Buffers {
    pub fn new(memory: &mut Memory) -> Result<Self> {
        let tokens = PAGES * PAGE_SIZE;
        let mut rows = |rows, heads, layer: usize| memory.take(rows * heads * HEAD_DIMS[layer] * 2);
        let (qo, kv) = (HEADS.num_qo_heads, HEADS.num_kv_heads);
        Ok(Self {
            pages: rows(2 * 2 * tokens, kv, 0)?,
            split: [rows(tokens, kv, 2)?, rows(tokens, kv, 2)?],
            q: [rows(ROWS, qo, 0)?, rows(ROWS, qo, 1)?, rows(ROWS, qo, 2)?],
            kv: [
                [rows(ROWS, kv, 0)?, rows(ROWS, kv, 0)?],
                [rows(ROWS, kv, 1)?, rows(ROWS, kv, 1)?],
                [rows(ROWS, kv, 2)?, rows(ROWS, kv, 2)?],
            ],
            out: [rows(ROWS, qo, 0)?, rows(ROWS, qo, 1)?, rows(ROWS, qo, 2)?],
            device: memory.device(),
        })
    }

    /// Puts a step's numbers in their places, and NaN where outputs go.
    pub fn write(&self, memory: &Memory, step: &Step) -> Result<()> {
        for layer in 0..LAYERS {
            let nan = vec![bf16::NAN; step.q[layer].len()];
            // SAFETY: there is room for `ROWS` rows, which no step exceeds, and nothing else runs.
            unsafe {
                memory.write(self.q[layer], &step.q[layer])?;
                memory.write(self.kv[layer][0], &step.kv[layer][0])?;
                memory.write(self.kv[layer][1], &step.kv[layer][1])?;
                memory.write(self.out[layer], &nan)?;
            }
        }
        Ok(())
    }

    /// The outputs of all layers.
    pub fn outputs(&self, memory: &Memory, rows: usize) -> Result<Vec<Vec<bf16>>> {
        let len = |layer: usize| rows * HEADS.num_qo_heads * HEAD_DIMS[layer];
        // SAFETY: the buffer has as many, and whoever writes it goes before.
        (0..LAYERS).map(|layer| unsafe { memory.read(self.out[layer], len(layer)) }).collect()
    }

    /// Each layer's attention, and its new keys and values. Queries of the first are heads first.
    pub fn layers(&self, rows: usize) -> [(Layer, [Rows; 2]); LAYERS] {
        [0, 1, 2].map(|at| {
            let (device, shape) = (self.device, |heads| [rows, heads, HEAD_DIMS[at]]);
            let of_queries = shape(HEADS.num_qo_heads);
            let q = match at {
                0 => Rows::heads_first(self.q[at], device, of_queries),
                _ => Rows::rows_first(self.q[at], device, of_queries),
            };
            let cache = match at {
                2 => LayerCache::split(self.split, device, cache_shape(at)),
                _ => LayerCache::page_first(self.pages, device, cache_shape(at), at, 2),
            };
            let out = Rows::rows_first(self.out[at], device, of_queries);
            let new = self.kv[at].map(|data| Rows::rows_first(data, device, shape(HEADS.num_kv_heads)));
            (Layer { kind: at, q, cache, out }, new)
        })
    }
}
