//! Rotary position embeddings on the CPU.

mod heads;
#[cfg(test)]
mod tests;
mod turns;

use self::{
    heads::{RotaryHeads, RotaryHeadsMut},
    turns::{Turns, check_rotary_dim, linear},
};
use super::{
    host::HostCheck,
    page::{HostCacheShape, check_dtype, check_pages, places},
};
use crate::{
    dtype::DType,
    error::Result,
    indices::{HostSlotMapping, RaggedIndices},
    kv::PagedKvMut,
    rope::{
        self, Llama31RopeOptions, RopeAppend, RopeOptions, RopeParts, RopePartsMut, RopeQuantizeOptions,
        RopeScaling, RopeTensors, Rotation,
    },
    tensor::{TensorMut, TensorRef},
};

/// Element types beside the wide ones.
const DTYPES: [DType; 2] = [DType::F16, DType::BF16];
const QUANTIZED: [DType; 2] = [DType::E4M3, DType::E5M2];

/// [`rope::apply_rope`](crate::rope::apply_rope) on the CPU, with an offset for
/// each request. Any even `rotary_dim` is fine.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device,
/// dtype, shape or option does not fit. Nothing was written.
pub fn apply_rope(
    tensors: &mut RopeTensors<'_>,
    indptr: &RaggedIndices,
    offsets: &[i32],
    options: &RopeOptions,
) -> Result<()> {
    let check = HostCheck { op: "reference::apply_rope" };
    check.as_kernel(|check| rope::check_ragged(check, tensors, indptr, options))?;
    let turns = Turns::computed(check, tensors, options, &linear(options))?;
    ragged(check, tensors, indptr, offsets, &turns)
}

/// [`rope::apply_llama31_rope`](crate::rope::apply_llama31_rope) on the CPU.
///
/// # Errors
/// As [`apply_rope`].
pub fn apply_llama31_rope(
    tensors: &mut RopeTensors<'_>,
    indptr: &RaggedIndices,
    offsets: &[i32],
    options: &Llama31RopeOptions,
) -> Result<()> {
    let check = HostCheck { op: "reference::apply_llama31_rope" };
    check.as_kernel(|check| {
        rope::check_ragged(check, tensors, indptr, &options.rope)?;
        options.scaling().check(check.op())
    })?;
    let turns = Turns::computed(check, tensors, &options.rope, &RopeScaling::Llama31(options.scaling()))?;
    ragged(check, tensors, indptr, offsets, &turns)
}

/// [`rope::apply_rope_pos_ids`](crate::rope::apply_rope_pos_ids) on the CPU.
///
/// # Errors
/// As [`apply_rope`].
pub fn apply_rope_pos_ids(
    tensors: &mut RopeTensors<'_>,
    pos_ids: &[i32],
    options: &RopeOptions,
) -> Result<()> {
    let check = HostCheck { op: "reference::apply_rope_pos_ids" };
    check.as_kernel(|check| rope::check_by_position(check, tensors, options))?;
    let turns = Turns::computed(check, tensors, options, &linear(options))?;
    by_position(check, tensors, pos_ids, &turns)
}

/// [`rope::apply_llama31_rope_pos_ids`](crate::rope::apply_llama31_rope_pos_ids)
/// on the CPU.
///
/// # Errors
/// As [`apply_rope`].
pub fn apply_llama31_rope_pos_ids(
    tensors: &mut RopeTensors<'_>,
    pos_ids: &[i32],
    options: &Llama31RopeOptions,
) -> Result<()> {
    let check = HostCheck { op: "reference::apply_llama31_rope_pos_ids" };
    check.as_kernel(|check| {
        rope::check_by_position(check, tensors, &options.rope)?;
        options.scaling().check(check.op())
    })?;
    let turns = Turns::computed(check, tensors, &options.rope, &RopeScaling::Llama31(options.scaling()))?;
    by_position(check, tensors, pos_ids, &turns)
}

/// [`rope::apply_rope_pos_ids_cos_sin_cache`](crate::rope::apply_rope_pos_ids_cos_sin_cache)
/// on the CPU. All rows of the table may be used.
///
/// # Errors
/// As [`apply_rope`].
pub fn apply_rope_pos_ids_cos_sin_cache(
    tensors: &mut RopeTensors<'_>,
    rotation: &Rotation<'_, &[i32]>,
) -> Result<()> {
    let check = HostCheck { op: "reference::apply_rope_pos_ids_cos_sin_cache" };
    check.as_kernel(|check| {
        rope::check_by_table(check, tensors, rotation)?;
        rope::check_host_positions(check, rotation)
    })?;
    let turns = Turns::table(check, rotation)?;
    by_position(check, tensors, rotation.pos_ids, &turns)
}

/// [`rope::rope_append_paged_kv_cache`](crate::rope::rope_append_paged_kv_cache) on the CPU. All rows of the
/// table may be used; the tensors may also be `f32` or `f64`.
///
/// # Errors
/// As [`apply_rope`].
pub fn rope_append_paged_kv_cache(
    q: &mut TensorMut<'_>,
    [key, value]: [&TensorRef<'_>; 2],
    rotation: &Rotation<'_, &[i32]>,
    slots: &HostSlotMapping<'_>,
    cache: &mut PagedKvMut<'_>,
) -> Result<()> {
    let check = HostCheck { op: "reference::rope_append_paged_kv_cache" };
    slots.check(check.op)?;
    check.as_kernel(|check| {
        rope::check_rope_append(check, [&q.raw, &key.raw, &value.raw], rotation, slots, cache)?;
        rope::check_host_positions(check, rotation)
    })?;
    let (turns, tokens) = (Turns::table(check, rotation)?, rotation.pos_ids.len());
    if tokens != slots.append.len() {
        return check.fail("append", format!("it is for {} tokens, not {tokens}", slots.append.len()));
    }
    let rotary_dim = rotation.cos_sin_cache.shape()[1] as usize;
    let turned = |name: &'static str, heads: TensorRef<'_>| -> Result<Vec<Vec<f64>>> {
        let heads = RopeParts::of_heads(heads, rotary_dim)?;
        let heads = RotaryHeads::new(check, [name; 2], &heads, tokens, &turns)?;
        let rows = 0..heads.rope.count();
        Ok(rows.map(|row| heads.turned(row, rotation.pos_ids, &turns, 1.0)).collect())
    };
    let [queries, new_keys] = [turned("q", q.as_ref())?, turned("key", *key)?];
    let layout = cache.layout;
    let mut keys = check.rows_mut("kv.k", &mut cache.k, &DTYPES, &[4])?;
    let mut values = check.rows_mut("kv.v", &mut cache.v, &DTYPES, &[4])?;
    check_dtype(check, "kv.v", &values.rows, &keys.rows)?;
    check.shape("kv.v", &values.rows, keys.rows.shape())?;
    let shape = HostCacheShape::new(check, &keys.rows, layout, slots.pages)?;
    let mut q = check.rows_mut("q", q, &DTYPES, &[3])?;
    let (key, value) = (check.rows("key", key, &DTYPES, &[3])?, check.rows("value", value, &DTYPES, &[3])?);
    for (name, new) in [("key", &key), ("value", &value)] {
        check_dtype(check, name, new, &keys.rows)?;
        check.shape(name, new, &[tokens as i64, shape.heads as i64, keys.rows.width() as i64])?;
    }
    check_dtype(check, "q", &q.rows, &keys.rows)?;
    queries.iter().enumerate().for_each(|(row, query)| q.write(row, query));
    for (token, (page, slot)) in places(slots).enumerate() {
        for head in 0..shape.heads {
            let (to, from) = (shape.row(page, slot, head), token * shape.heads + head);
            keys.write(to, &new_keys[from]);
            values.copy(to, &value, from);
        }
    }
    Ok(())
}

/// [`rope::rope_quantize`](crate::rope::rope_quantize) on the CPU. Outputs may
/// also be `f32` or `f64`, which are not rounded to 8 bits.
///
/// # Errors
/// As [`apply_rope`].
pub fn rope_quantize(
    [q_out, k_out]: &mut [RopePartsMut<'_>; 2],
    [q, k]: &[RopeParts<'_>; 2],
    rotation: &Rotation<'_, &[i32]>,
    options: &RopeQuantizeOptions,
) -> Result<()> {
    let check = HostCheck { op: "reference::rope_quantize" };
    check.as_kernel(|check| {
        rope::check_quantize(check, [q_out, k_out], [q, k], rotation, options)?;
        rope::check_host_positions(check, rotation)
    })?;
    let turns = Turns::table(check, rotation)?;
    let tokens = rotation.pos_ids.len();
    let q = RotaryHeads::new(check, ["q.rope", "q.nope"], q, tokens, &turns)?;
    let k = RotaryHeads::new(check, ["k.rope", "k.nope"], k, tokens, &turns)?;
    let mut q_out = RotaryHeadsMut::new(check, ["q_out.rope", "q_out.nope"], q_out, &q)?;
    let mut k_out = RotaryHeadsMut::new(check, ["k_out.rope", "k_out.nope"], k_out, &k)?;
    for (out, heads, scale) in
        [(&mut q_out, &q, options.quant_scale_q), (&mut k_out, &k, options.quant_scale_kv)]
    {
        for row in 0..heads.rope.count() {
            out.write(row, &heads.turned(row, rotation.pos_ids, &turns, scale));
        }
    }
    Ok(())
}

/// [`rope::rope_quantize_append_paged_kv_cache`](crate::rope::rope_quantize_append_paged_kv_cache)
/// on the CPU. Caches and the output may also be `f32` or `f64`.
///
/// # Errors
/// As [`apply_rope`].
pub fn rope_quantize_append_paged_kv_cache(
    q_out: &mut RopePartsMut<'_>,
    cache: &mut RopeAppend<'_>,
    [q, k]: &[RopeParts<'_>; 2],
    rotation: &Rotation<'_, &[i32]>,
    slots: &HostSlotMapping<'_>,
    options: &RopeQuantizeOptions,
) -> Result<()> {
    let check = HostCheck { op: "reference::rope_quantize_append_paged_kv_cache" };
    slots.check(check.op)?;
    check.as_kernel(|check| {
        rope::check_quantize_append(check, q_out, cache, [q, k], rotation, slots, options)?;
        rope::check_host_positions(check, rotation)
    })?;
    let turns = Turns::table(check, rotation)?;
    let tokens = rotation.pos_ids.len();
    if tokens != slots.append.len() {
        return check.fail("append", format!("it is for {} tokens, not {tokens}", slots.append.len()));
    }
    let q = RotaryHeads::new(check, ["q.rope", "q.nope"], q, tokens, &turns)?;
    let k = RotaryHeads::new(check, ["k.rope", "k.nope"], k, tokens, &turns)?;
    let mut q_out = RotaryHeadsMut::new(check, ["q_out.rope", "q_out.nope"], q_out, &q)?;
    let kv_scale = options.quant_scale_kv;
    let key = |row| k.turned(row, rotation.pos_ids, &turns, kv_scale);
    match cache {
        RopeAppend::Kv { cache, value } => {
            let layout = cache.layout;
            let mut keys = check.rows_mut("kv.k", &mut cache.k, &QUANTIZED, &[4])?;
            let mut values = check.rows_mut("kv.v", &mut cache.v, &QUANTIZED, &[4])?;
            check_dtype(check, "kv.v", &values.rows, &keys.rows)?;
            check.shape("kv.v", &values.rows, keys.rows.shape())?;
            let shape = HostCacheShape::new(check, &keys.rows, layout, slots.pages)?;
            let width = k.widths().iter().sum::<usize>();
            if (shape.heads, keys.rows.width()) != (k.heads, width) {
                return check.fail(
                    "kv.k",
                    format!("its shape is {:?}; keys have {} heads", keys.rows.shape(), k.heads),
                );
            }
            let value = check.rows("value", value, &DTYPES, &[3])?;
            check.shape("value", &value, &[tokens as i64, k.heads as i64, width as i64])?;
            for (token, (page, slot)) in places(slots).enumerate() {
                for head in 0..k.heads {
                    let (to, from) = (shape.row(page, slot, head), token * k.heads + head);
                    keys.write(to, &key(from));
                    let scaled: Vec<f64> = value.numbers(from).iter().map(|x| x * kv_scale).collect();
                    values.write(to, &scaled);
                }
            }
        }
        RopeAppend::Mla { ckv_cache, kpe_cache } => {
            let mut ckv = check.rows_mut("ckv_cache", ckv_cache, &QUANTIZED, &[3])?;
            let mut kpe = check.rows_mut("kpe_cache", kpe_cache, &QUANTIZED, &[3])?;
            check_dtype(check, "kpe_cache", &kpe.rows, &ckv.rows)?;
            let (pages, page_size) = (ckv.rows.shape()[0], ckv.rows.shape()[1]);
            check_pages(check, "ckv_cache", pages, page_size, slots.pages)?;
            let widths = [k.widths()[1], k.widths()[0]];
            for ((name, part), width) in [("ckv_cache", &ckv), ("kpe_cache", &kpe)].into_iter().zip(widths) {
                check.shape(name, &part.rows, &[pages, page_size, width as i64])?;
            }
            if k.heads != 1 {
                return check.fail("k.rope", format!("it has {} heads; latent attention has one", k.heads));
            }
            for (token, (page, slot)) in places(slots).enumerate() {
                let (to, key) = (page * slots.pages.page_size() + slot, key(token));
                let (turned, others) = key.split_at(k.rope.width());
                kpe.write(to, turned);
                ckv.write(to, others);
            }
        }
    }
    for row in 0..q.rope.count() {
        q_out.write(row, &q.turned(row, rotation.pos_ids, &turns, options.quant_scale_q));
    }
    Ok(())
}

fn ragged(
    check: HostCheck,
    tensors: &mut RopeTensors<'_>,
    indptr: &RaggedIndices,
    offsets: &[i32],
    turns: &Turns<'_>,
) -> Result<()> {
    if offsets.len() != indptr.batch_size() {
        return check
            .fail("offsets", format!("{} of them for {} requests", offsets.len(), indptr.batch_size()));
    }
    let positions: Vec<i32> = (0..offsets.len())
        .flat_map(|request| (0..indptr.len(request) as i32).map(move |at| offsets[request].wrapping_add(at)))
        .collect();
    apply(check, tensors, ("indptr", &positions), |rows| positions.len() <= rows, turns)
}

fn by_position(
    check: HostCheck,
    tensors: &mut RopeTensors<'_>,
    pos_ids: &[i32],
    turns: &Turns<'_>,
) -> Result<()> {
    apply(check, tensors, ("pos_ids", pos_ids), |rows| pos_ids.len() == rows, turns)
}

/// Turns the rows of the first tokens, each of which has a position.
fn apply(
    check: HostCheck,
    tensors: &mut RopeTensors<'_>,
    (argument, positions): (&'static str, &[i32]),
    fits: impl Fn(usize) -> bool,
    turns: &Turns<'_>,
) -> Result<()> {
    let (sources, targets) = match tensors {
        RopeTensors::InPlace { q, k } => (None, [("q", q), ("k", k)]),
        RopeTensors::OutOfPlace { q, k, q_rope, k_rope } => {
            let sources = [check.rows("q", q, &DTYPES, &[3])?, check.rows("k", k, &DTYPES, &[3])?];
            (Some(sources), [("q_rope", q_rope), ("k_rope", k_rope)])
        }
    };
    let [(q_name, q), (k_name, k)] = targets;
    let mut targets = [check.rows_mut(q_name, q, &DTYPES, &[3])?, check.rows_mut(k_name, k, &DTYPES, &[3])?];
    if let Some([q, k]) = &sources {
        check.shape(q_name, &targets[0].rows, q.shape())?;
        check.shape(k_name, &targets[1].rows, k.shape())?;
    }
    let [tokens, _, head_dim] = targets[0].rows.shape()[..] else { unreachable!("three dimensions") };
    let k = &targets[1].rows;
    check.shape(k_name, k, &[tokens, k.shape()[1], head_dim])?;
    check_rotary_dim(check, "cos_sin_cache", turns.rotary_dim, head_dim as usize)?;
    if !fits(tokens as usize) {
        return check.fail(argument, format!("it is for {} tokens, there are {tokens}", positions.len()));
    }
    for (at, target) in targets.iter_mut().enumerate() {
        let heads = target.rows.shape()[1] as usize;
        for row in 0..positions.len() * heads {
            let source = sources.as_ref().map_or(&target.rows, |sources| &sources[at]);
            let mut head = source.numbers(row);
            turns.turn(&mut head, positions[row / heads]);
            target.write(row, &head);
        }
    }
    Ok(())
}
