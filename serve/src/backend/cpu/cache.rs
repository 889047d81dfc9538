//! Keys and values of all tokens, in pages.

use flashinfer_rs::kv::{Batch, PageAllocator};

use crate::{Result, model::Config};

/// Keys and values of all layers, in the pages of a pool.
pub struct Cache {
    pool: PageAllocator,
    layers: Vec<KeysAndValues>,
    /// Numbers of a token's keys in a layer, and of its values.
    width: usize,
}

/// Those of one layer, `[pages, page_size, num_kv_heads, head_dim]`.
pub struct KeysAndValues {
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

impl Cache {
    /// Memory for the tokens of a pool. What is not written takes none.
    ///
    /// # Errors
    /// There is not enough.
    pub fn new(config: &Config, pool: &PageAllocator) -> Result<Self> {
        let [_, width] = config.widths();
        let len = (pool.num_pages() * pool.page_size()).saturating_mul(width);
        let zeros = || -> Result<Vec<f32>> {
            Vec::<f32>::new().try_reserve_exact(len).map_err(|e| {
                let tokens = pool.num_pages() * pool.page_size();
                format!("there is no memory for the keys and values of {tokens} tokens: {e}")
            })?;
            Ok(vec![0.0; len])
        };
        let layer = |_| Ok(KeysAndValues { k: zeros()?, v: zeros()? });
        let layers = (0..config.num_layers()).map(layer).collect::<Result<_>>()?;
        Ok(Self { pool: pool.clone(), layers, width })
    }

    /// Makes the copies of pages that are due.
    pub fn copy_pages(&mut self) -> Result<()> {
        let len = self.pool.page_size() * self.width;
        let layers = &mut self.layers;
        Ok(self.pool.copy_pages(|from, to| {
            for numbers in layers.iter_mut().flat_map(|layer| [&mut layer.k, &mut layer.v]) {
                numbers.copy_within(from * len..(from + 1) * len, to * len);
            }
        })?)
    }

    /// Writes the keys and values of a batch's new tokens.
    pub fn append(&mut self, layer: usize, batch: &Batch, k: &[f32], v: &[f32]) -> &KeysAndValues {
        let layer = &mut self.layers[layer];
        let indices = batch.append_indices();
        let tokens = indices.batch_indices().iter().zip(indices.positions());
        let new = k.chunks_exact(self.width).zip(v.chunks_exact(self.width));
        for ((&request, &position), (k, v)) in tokens.zip(new) {
            let (request, position) = (request as usize, position as usize);
            let place = slot(batch.pages().pages(request), self.pool.page_size(), position) * self.width;
            layer.k[place..][..self.width].copy_from_slice(k);
            layer.v[place..][..self.width].copy_from_slice(v);
        }
        layer
    }
}

/// Where a token of a sequence is in the pages of all.
pub fn slot(pages: &[i32], page_size: usize, position: usize) -> usize {
    pages[position / page_size] as usize * page_size + position % page_size
}
