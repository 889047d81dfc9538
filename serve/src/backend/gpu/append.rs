//! What attention has of new tokens: queries and keys that are turned, and keys and values in
//! the cache.

use cudarc::driver::CudaStream;
use flashinfer_rs::{
    TensorMut, TensorRef,
    kv::{BatchTables, PagedKvCache},
    page::append_paged_kv_cache,
    rope::{
        RopeAppend, RopeParts, RopePartsMut, RopeQuantizeOptions, RopeTensors, Rotation,
        apply_rope_pos_ids_cos_sin_cache, rope_append_paged_kv_cache, rope_quantize_append_paged_kv_cache,
    },
};

use super::{heads::HeadWidths, network::Network, programmatic};
use crate::{
    Result,
    model::{Config, rope::Rope},
};

/// Queries, keys and values of new tokens, `[rows, heads, head_dim]` each.
pub struct NewTokens<'a> {
    pub q: TensorMut<'a>,
    pub k: TensorMut<'a>,
    pub v: TensorRef<'a>,
    /// Queries of no heads in `e4m3`, if that is the cache's type.
    pub no_queries: Option<TensorMut<'a>>,
}

impl Network {
    /// Turns the queries in place, and writes turned keys, and values, to a layer's cache: in one
    /// kernel where the GPU has it; else keys are turned in place, too. Those of a cache of `e4m3` are
    /// turned, rounded and written by one kernel.
    pub fn append(
        &self,
        index: usize,
        tables: &BatchTables,
        cache: &mut PagedKvCache,
        new: &mut NewTokens<'_>,
    ) -> Result<()> {
        let (stream, slots) = (&self.stream, tables.slots());
        let rope = self.ropes[self.config.layers[index].rope].view()?;
        let mut rotation = Rotation::new(rope, tables);
        rotation.interleave = self.config.architecture.interleave;
        let mut cache = cache.layer_mut(index)?;
        let NewTokens { q, k, v, no_queries } = new;
        let Some(no_queries) = no_queries else {
            if self.appends_at_once {
                return Ok(rope_append_paged_kv_cache(
                    stream,
                    q,
                    [&k.as_ref(), v],
                    &rotation,
                    &slots,
                    &mut cache,
                )?);
            }
            let mut both = RopeTensors::InPlace { q: q.reborrow(), k: k.reborrow() };
            apply_rope_pos_ids_cos_sin_cache(stream, &mut both, &rotation)?;
            return Ok(append_paged_kv_cache(stream, &k.as_ref(), v, &slots, &mut cache)?);
        };
        let no_keys = k.reborrow().narrow(1, 0, 0)?;
        let mut queries = RopeTensors::InPlace { q: q.reborrow(), k: no_keys };
        apply_rope_pos_ids_cos_sin_cache(stream, &mut queries, &rotation)?;
        let rotary_dim = rope.shape()[1] as usize;
        let none = RopeParts::of_heads(q.as_ref().narrow(1, 0, 0)?, rotary_dim)?;
        let keys = RopeParts::of_heads(k.as_ref(), rotary_dim)?;
        Ok(rope_quantize_append_paged_kv_cache(
            stream,
            &mut RopePartsMut::of_heads(no_queries.reborrow(), rotary_dim)?,
            &mut RopeAppend::Kv { cache, value: *v },
            &[none, keys],
            &rotation,
            &slots,
            &RopeQuantizeOptions::default(),
        )?)
    }
}

/// Whether queries can be turned, and keys turned and written, by one kernel.
pub fn appends_at_once(cuda: &CudaStream, config: &Config) -> Result<bool> {
    let fits = |rope: &Rope| rope.rotary_dim().is_multiple_of(16);
    Ok(programmatic::is_available(cuda)? && config.ropes.iter().all(fits))
}

/// Refuses models whose keys the kernel of an `e4m3` cache cannot turn: it does so in parts of a
/// head that are as wide as what is turned.
pub fn check_quantized_keys(config: &Config, widths: HeadWidths) -> Result<()> {
    for rope in &config.ropes {
        let turned = rope.rotary_dim();
        let multiple = if config.architecture.interleave { 16 } else { 32 };
        if !turned.is_multiple_of(multiple) || !widths.padded.is_multiple_of(turned) {
            return Err(format!(
                "its keys cannot be kept in e4m3: {turned} of the {} elements of a head are turned; expected \
                 a multiple of {multiple} that divides them, or a cache of 16 bits",
                widths.padded
            )
            .into());
        }
    }
    Ok(())
}
