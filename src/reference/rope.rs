//! Rotary position embeddings on the CPU.

use super::{
    host::{Check, Rows, RowsMut},
    page::{CacheShape, check_dtype, check_pages, check_stamp, places},
};
use crate::{
    dtype::DType,
    error::Result,
    indices::{AppendIndices, PageIndices, RaggedIndices},
    rope::{
        self, Llama31RopeOptions, RopeAppend, RopeFrequencies, RopeOptions, RopeParts, RopePartsMut,
        RopeQuantizeOptions, RopeScaling, RopeTensors, Rotation,
    },
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
    let check = Check { op: "reference::apply_rope" };
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
    let check = Check { op: "reference::apply_llama31_rope" };
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
    let check = Check { op: "reference::apply_rope_pos_ids" };
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
    let check = Check { op: "reference::apply_llama31_rope_pos_ids" };
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
    let check = Check { op: "reference::apply_rope_pos_ids_cos_sin_cache" };
    check.as_kernel(|check| {
        rope::check_by_table(check, tensors, rotation)?;
        rope::check_host_positions(check, rotation)
    })?;
    let turns = Turns::table(check, rotation)?;
    by_position(check, tensors, rotation.pos_ids, &turns)
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
    let check = Check { op: "reference::rope_quantize" };
    check.as_kernel(|check| {
        rope::check_quantize(check, [q_out, k_out], [q, k], rotation, options)?;
        rope::check_host_positions(check, rotation)
    })?;
    let turns = Turns::table(check, rotation)?;
    let tokens = rotation.pos_ids.len();
    let q = Heads::new(check, ["q.rope", "q.nope"], q, tokens, &turns)?;
    let k = Heads::new(check, ["k.rope", "k.nope"], k, tokens, &turns)?;
    let mut q_out = HeadsMut::new(check, ["q_out.rope", "q_out.nope"], q_out, &q)?;
    let mut k_out = HeadsMut::new(check, ["k_out.rope", "k_out.nope"], k_out, &k)?;
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
    append: &AppendIndices,
    table: &PageIndices,
    options: &RopeQuantizeOptions,
) -> Result<()> {
    let check = Check { op: "reference::rope_quantize_append_paged_kv_cache" };
    check_stamp(check, append, table)?;
    check.as_kernel(|check| {
        let (parts, tokens) = ([q, k], append.len());
        rope::check_quantize_append(check, q_out, cache, parts, rotation, tokens, table, options)?;
        rope::check_host_positions(check, rotation)
    })?;
    let turns = Turns::table(check, rotation)?;
    let tokens = rotation.pos_ids.len();
    if tokens != append.len() {
        return check.fail("append", format!("it is for {} tokens, not {tokens}", append.len()));
    }
    let q = Heads::new(check, ["q.rope", "q.nope"], q, tokens, &turns)?;
    let k = Heads::new(check, ["k.rope", "k.nope"], k, tokens, &turns)?;
    let mut q_out = HeadsMut::new(check, ["q_out.rope", "q_out.nope"], q_out, &q)?;
    let kv_scale = options.quant_scale_kv;
    let key = |row| k.turned(row, rotation.pos_ids, &turns, kv_scale);
    match cache {
        RopeAppend::Kv { cache, value } => {
            let layout = cache.layout;
            let mut keys = check.rows_mut("kv.k", &mut cache.k, &QUANTIZED, &[4])?;
            let mut values = check.rows_mut("kv.v", &mut cache.v, &QUANTIZED, &[4])?;
            check_dtype(check, "kv.v", &values.rows, &keys.rows)?;
            check.shape("kv.v", &values.rows, keys.rows.shape())?;
            let shape = CacheShape::new(check, &keys.rows, layout, table)?;
            let width = k.widths().iter().sum::<usize>();
            if (shape.heads, keys.rows.width()) != (k.heads, width) {
                return check.fail(
                    "kv.k",
                    format!("its shape is {:?}; keys have {} heads", keys.rows.shape(), k.heads),
                );
            }
            let value = check.rows("value", value, &DTYPES, &[3])?;
            check.shape("value", &value, &[tokens as i64, k.heads as i64, width as i64])?;
            for (token, (page, slot)) in places(append, table).enumerate() {
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
            check_pages(check, "ckv_cache", pages, page_size, table)?;
            let widths = [k.widths()[1], k.widths()[0]];
            for ((name, part), width) in [("ckv_cache", &ckv), ("kpe_cache", &kpe)].into_iter().zip(widths) {
                check.shape(name, &part.rows, &[pages, page_size, width as i64])?;
            }
            if k.heads != 1 {
                return check.fail("k.rope", format!("it has {} heads; latent attention has one", k.heads));
            }
            for (token, (page, slot)) in places(append, table).enumerate() {
                let (to, key) = (page * table.page_size() + slot, key(token));
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

/// How heads are turned.
struct Turns<'a> {
    angles: Angles<'a>,
    rotary_dim: usize,
    interleave: bool,
}

/// Where a position's cosines and sines come from.
enum Angles<'a> {
    Frequencies(RopeFrequencies),
    Table(Rows<'a>),
}

impl<'a> Turns<'a> {
    /// By frequencies, for the `rotary_dim` of the options or all of a head.
    fn computed(
        check: Check,
        tensors: &RopeTensors<'_>,
        options: &RopeOptions,
        scaling: &RopeScaling,
    ) -> Result<Self> {
        let q = match tensors {
            RopeTensors::InPlace { q, .. } => q.shape(),
            RopeTensors::OutOfPlace { q, .. } => q.shape(),
        };
        let head_dim = q.last().map_or(0, |&width| width as usize);
        let rotary_dim = options.rotary_dim.unwrap_or(head_dim);
        check_rotary_dim(check, "rotary_dim", rotary_dim, head_dim)?;
        let frequencies = RopeFrequencies::new(rotary_dim, options.rope_theta, scaling)?;
        Ok(Self { angles: Angles::Frequencies(frequencies), rotary_dim, interleave: options.interleave })
    }

    /// By a table, which has a row for each position.
    fn table(check: Check, rotation: &'a Rotation<'_, &[i32]>) -> Result<Self> {
        let rows = check.rows("cos_sin_cache", &rotation.cos_sin_cache, &[], &[2])?;
        let outside = |&at: &i32| usize::try_from(at).map_or(true, |at| at >= rows.count());
        if let Some(token) = rotation.pos_ids.iter().position(outside) {
            return check.fail(
                "pos_ids",
                format!("token {token} is at {}, outside 0..{}", rotation.pos_ids[token], rows.count()),
            );
        }
        let rotary_dim = rows.width();
        check_rotary_dim(check, "cos_sin_cache", rotary_dim, rotary_dim)?;
        Ok(Self { angles: Angles::Table(rows), rotary_dim, interleave: rotation.interleave })
    }

    /// Turns the first elements of a head.
    fn turn(&self, head: &mut [f64], position: i32) {
        let cos_sin: Vec<f64> = match &self.angles {
            Angles::Frequencies(frequencies) => frequencies.cos_sin(f64::from(position)).collect(),
            Angles::Table(rows) => rows.numbers(position as usize),
        };
        let pairs = self.rotary_dim / 2;
        let (cos, sin) = cos_sin.split_at(pairs);
        for pair in 0..pairs {
            let (a, b) = if self.interleave { (2 * pair, 2 * pair + 1) } else { (pair, pair + pairs) };
            let (x, y) = (head[a], head[b]);
            head[a] = x * cos[pair] - y * sin[pair];
            head[b] = y * cos[pair] + x * sin[pair];
        }
    }
}

fn linear(options: &RopeOptions) -> RopeScaling {
    RopeScaling::Linear { factor: options.rope_scale }
}

fn check_rotary_dim(check: Check, argument: &'static str, rotary_dim: usize, head_dim: usize) -> Result<()> {
    if rotary_dim > 0 && rotary_dim.is_multiple_of(2) && rotary_dim <= head_dim {
        return Ok(());
    }
    check.fail(
        argument,
        format!("{rotary_dim} of {head_dim} elements are turned; that must be even, and not 0"),
    )
}

fn ragged(
    check: Check,
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
    check: Check,
    tensors: &mut RopeTensors<'_>,
    pos_ids: &[i32],
    turns: &Turns<'_>,
) -> Result<()> {
    apply(check, tensors, ("pos_ids", pos_ids), |rows| pos_ids.len() == rows, turns)
}

/// Turns the rows of the first tokens, each of which has a position.
fn apply(
    check: Check,
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

/// Heads in two parts.
struct Heads<'a> {
    rope: Rows<'a>,
    nope: Option<Rows<'a>>,
    heads: usize,
}

impl<'a> Heads<'a> {
    fn new(
        check: Check,
        names: [&'static str; 2],
        parts: &'a RopeParts<'_>,
        tokens: usize,
        turns: &Turns<'_>,
    ) -> Result<Self> {
        let rope = check.rows(names[0], &parts.rope, &DTYPES, &[2, 3])?;
        let nope =
            parts.nope.as_ref().map(|nope| check.rows(names[1], nope, &DTYPES, &[2, 3])).transpose()?;
        let outer = &rope.shape()[..rope.shape().len() - 1];
        if outer[0] != tokens as i64 || rope.width() != turns.rotary_dim {
            return check.fail(
                names[0],
                format!(
                    "its shape is {:?}; expected {tokens} tokens and {} elements that are turned",
                    rope.shape(),
                    turns.rotary_dim
                ),
            );
        }
        if let Some(nope) = &nope {
            check.shape(names[1], nope, &[outer, &[nope.width() as i64]].concat())?;
        }
        Ok(Self { heads: outer.get(1).map_or(1, |&heads| heads as usize), rope, nope })
    }

    fn widths(&self) -> [usize; 2] {
        [self.rope.width(), self.nope.as_ref().map_or(0, Rows::width)]
    }

    /// One head: what is turned, then the others, scaled.
    fn turned(&self, row: usize, positions: &[i32], turns: &Turns<'_>, scale: f64) -> Vec<f64> {
        let mut head = self.rope.numbers(row);
        turns.turn(&mut head, positions[row / self.heads]);
        head.extend(self.nope.iter().flat_map(|nope| nope.numbers(row)));
        head.iter().map(|number| number * scale).collect()
    }
}

/// Heads in two parts, to write.
struct HeadsMut<'a> {
    rope: RowsMut<'a>,
    nope: Option<RowsMut<'a>>,
}

impl<'a> HeadsMut<'a> {
    /// Of the shapes of the input.
    fn new(
        check: Check,
        names: [&'static str; 2],
        parts: &'a mut RopePartsMut<'_>,
        like: &Heads<'_>,
    ) -> Result<Self> {
        let rope = check.rows_mut(names[0], &mut parts.rope, &QUANTIZED, &[2, 3])?;
        check.shape(names[0], &rope.rows, like.rope.shape())?;
        let nope = match (&mut parts.nope, &like.nope) {
            (None, None) => None,
            (Some(nope), Some(like)) => {
                let nope = check.rows_mut(names[1], nope, &QUANTIZED, &[2, 3])?;
                check.shape(names[1], &nope.rows, like.shape())?;
                check_dtype(check, names[1], &nope.rows, &rope.rows)?;
                Some(nope)
            }
            _ => return check.fail(names[1], "there is one exactly if the input has one".into()),
        };
        Ok(Self { rope, nope })
    }

    fn write(&mut self, row: usize, head: &[f64]) {
        let (turned, others) = head.split_at(self.rope.rows.width());
        self.rope.write(row, turned);
        if let Some(nope) = &mut self.nope {
            nope.write(row, others);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        kv::{KvLayout, PagedKvMut},
        reference::testing::{refused, view, view_mut},
        rope::Llama31Scaling,
    };

    /// The quarter turns of positions 0 to 3, for one pair, then two.
    fn quarters(pairs: usize) -> Vec<f64> {
        let turns = [(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)];
        turns.iter().flat_map(|&(cos, sin)| [vec![cos; pairs], vec![sin; pairs]].concat()).collect()
    }

    fn rotation<'a>(
        table: &'a [f64],
        pairs: usize,
        pos_ids: &'a [i32],
        interleave: bool,
    ) -> Rotation<'a, &'a [i32]> {
        let cos_sin_cache = view(table, &[table.len() / (2 * pairs), 2 * pairs]);
        Rotation { cos_sin_cache, pos_ids, interleave }
    }

    #[test]
    fn pairs_are_halves_or_neighbours() {
        let table = quarters(2);
        for (interleave, want) in [
            // Pairs (1, 3) and (2, 4), or (1, 2) and (3, 4); a quarter turns
            // (x, y) to (−y, x). The fifth element is none of them.
            (false, [-3.0, -4.0, 1.0, 2.0, 5.0]),
            (true, [-2.0, 1.0, -4.0, 3.0, 5.0]),
        ] {
            let (mut q, mut k) = ([1.0, 2.0, 3.0, 4.0, 5.0], [1.0f32, 2.0, 3.0, 4.0, 5.0]);
            let mut tensors =
                RopeTensors::InPlace { q: view_mut(&mut q, &[1, 1, 5]), k: view_mut(&mut k, &[1, 1, 5]) };
            apply_rope_pos_ids_cos_sin_cache(&mut tensors, &rotation(&table, 2, &[1], interleave)).unwrap();
            assert_eq!(q, want);
            assert_eq!(k.map(f64::from), want);
        }
    }

    #[test]
    fn each_token_has_its_position_and_heads_share_it() {
        let table = quarters(1);
        let (q, k) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], [1.0, 0.0, 0.0, 1.0]);
        let (mut q_rope, mut k_rope) = ([0.0; 8], [0.0; 4]);
        let mut tensors = RopeTensors::OutOfPlace {
            q: view(&q, &[2, 2, 2]),
            k: view(&k, &[2, 1, 2]),
            q_rope: view_mut(&mut q_rope, &[2, 2, 2]),
            k_rope: view_mut(&mut k_rope, &[2, 1, 2]),
        };
        apply_rope_pos_ids_cos_sin_cache(&mut tensors, &rotation(&table, 1, &[2, 1], false)).unwrap();
        assert_eq!(q_rope, [-1.0, -2.0, -3.0, -4.0, -6.0, 5.0, -8.0, 7.0]);
        assert_eq!(k_rope, [-1.0, 0.0, -1.0, 0.0]);
    }

    #[test]
    fn angles_are_computed() {
        // Two pairs at position 3: angles 3 and 3 / 100, at half the scale 1.5
        // and 0.015.
        for scale in [1.0, 2.0] {
            let options = RopeOptions { rope_scale: scale, ..RopeOptions::default() };
            let (mut q, mut k) = ([1.0, 1.0, 0.0, 0.0], [0.0; 4]);
            let mut tensors =
                RopeTensors::InPlace { q: view_mut(&mut q, &[1, 1, 4]), k: view_mut(&mut k, &[1, 1, 4]) };
            apply_rope_pos_ids(&mut tensors, &[3], &options).unwrap();
            let angles = [3.0 / scale, 0.03 / scale];
            let want = [angles[0].cos(), angles[1].cos(), angles[0].sin(), angles[1].sin()];
            for (got, want) in q.iter().zip(want) {
                assert!((got - want).abs() < 1e-15, "{got} {want}");
            }
        }
    }

    #[test]
    fn rows_of_requests_count_from_their_offsets() {
        let numbers: Vec<f64> = (0..5 * 8).map(|at| f64::from(at % 7) - 3.0).collect();
        let run = |ragged: bool, llama: bool| {
            let (mut q, mut k) = (numbers.clone(), numbers.clone());
            let mut tensors =
                RopeTensors::InPlace { q: view_mut(&mut q, &[5, 2, 4]), k: view_mut(&mut k, &[5, 2, 4]) };
            let tensors = &mut tensors;
            // Two rows at 10, none, two rows at −1; the last row is nobody's.
            let indptr = RaggedIndices::new(vec![0, 2, 2, 4]).unwrap();
            let (offsets, positions) = ([10, 99, -1], [10, 11, -1, 0, 0]);
            let options = RopeOptions::default();
            let llama_options = Llama31RopeOptions::default();
            match (ragged, llama) {
                (true, false) => apply_rope(tensors, &indptr, &offsets, &options),
                (false, false) => apply_rope_pos_ids(tensors, &positions, &options),
                (true, true) => apply_llama31_rope(tensors, &indptr, &offsets, &llama_options),
                (false, true) => apply_llama31_rope_pos_ids(tensors, &positions, &llama_options),
            }
            .unwrap();
            [q, k]
        };
        // Position 0 of the last row turns nothing.
        assert_eq!(run(true, false), run(false, false));
        assert_eq!(run(true, true), run(false, true));
        assert_ne!(run(true, false), run(true, true));
        assert_eq!(run(true, false)[0][32..], numbers[32..]);
        assert_eq!(Llama31RopeOptions::default().scaling(), Llama31Scaling::default());
    }

    #[test]
    fn quantized_heads_are_scaled_and_land_in_pages() {
        let table = quarters(1);
        let pages = PageIndices::from_requests(2, 2, [(&[1, 0][..], 3)]).unwrap();
        let append = AppendIndices::last_tokens(&pages, &[0, 2]).unwrap();
        // Two tokens at positions 1 and 2, in slots (1, 1) and (0, 0).
        let pos_ids = append.positions().to_vec();
        let rotation = rotation(&table, 1, &pos_ids, false);
        let (q, k) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let options = RopeQuantizeOptions::with_scales(2.0, 10.0);
        let parts = |heads| RopeParts::of_heads(heads, 2).unwrap();
        let input = [parts(view(&q, &[2, 1, 3])), parts(view(&k, &[2, 1, 3]))];
        let want_q = [-4.0, 2.0, 6.0, -8.0, -10.0, 12.0];
        let want_k = [-20.0, 10.0, 30.0, -40.0, -50.0, 60.0];

        let (mut q_out, mut k_out) = ([0.0; 6], [0.0; 6]);
        fn out(heads: &mut [f64; 6]) -> RopePartsMut<'_> {
            RopePartsMut::of_heads(view_mut(heads, &[2, 1, 3]), 2).unwrap()
        }
        let mut outs = [out(&mut q_out), out(&mut k_out)];
        rope_quantize(&mut outs, &input, &rotation, &options).unwrap();
        assert_eq!((q_out, k_out), (want_q, want_k));

        let (mut q_out, mut keys, mut values) = ([0.0; 6], [0.0; 12], [0.0; 12]);
        let cache = PagedKvMut::new(
            view_mut(&mut keys, &[2, 2, 1, 3]),
            view_mut(&mut values, &[2, 2, 1, 3]),
            KvLayout::Nhd,
        );
        let mut target = RopeAppend::Kv { cache, value: view(&k, &[2, 1, 3]) };
        let mut heads = out(&mut q_out);
        rope_quantize_append_paged_kv_cache(
            &mut heads,
            &mut target,
            &input,
            &rotation,
            &append,
            &pages,
            &options,
        )
        .unwrap();
        assert_eq!(q_out, want_q);
        let zeros = [0.0; 6];
        assert_eq!(keys[..], [&want_k[3..], &zeros, &want_k[..3]].concat());
        assert_eq!(values, [40.0, 50.0, 60.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 10.0, 20.0, 30.0]);

        let (mut q_out, mut ckv, mut kpe) = ([0.0; 6], [0.0; 4], [0.0; 8]);
        let mut target = RopeAppend::Mla {
            ckv_cache: view_mut(&mut ckv, &[2, 2, 1]),
            kpe_cache: view_mut(&mut kpe, &[2, 2, 2]),
        };
        let flat = [input[0], parts(view(&k, &[2, 3]))];
        let mut heads = out(&mut q_out);
        rope_quantize_append_paged_kv_cache(
            &mut heads,
            &mut target,
            &flat,
            &rotation,
            &append,
            &pages,
            &options,
        )
        .unwrap();
        assert_eq!((ckv, kpe), ([60.0, 0.0, 0.0, 30.0], [-40.0, -50.0, 0.0, 0.0, 0.0, 0.0, -20.0, 10.0]));
    }

    #[test]
    fn wrong_input_is_refused_and_nothing_written() {
        let table = quarters(1);
        let (mut q, mut k) = ([7.0; 8], [7.0; 8]);
        let mut run = |shapes: [&[usize]; 2], pos_ids: &[i32], pairs: usize| {
            let mut tensors =
                RopeTensors::InPlace { q: view_mut(&mut q, shapes[0]), k: view_mut(&mut k, shapes[1]) };
            apply_rope_pos_ids_cos_sin_cache(&mut tensors, &rotation(&table, pairs, pos_ids, false))
        };
        let good: [&[usize]; 2] = [&[2, 1, 2]; 2];
        refused(run(good, &[0, 4], 1), "pos_ids");
        refused(run(good, &[0, -1], 1), "pos_ids");
        refused(run(good, &[0], 1), "pos_ids");
        refused(run(good, &[0, 1], 2), "cos_sin_cache");
        refused(run([&[2, 2], &[2, 1, 2]], &[0, 1], 1), "q");
        refused(run([&[2, 1, 2], &[1, 1, 2]], &[0, 1], 1), "k");
        refused(run([&[2, 1, 2], &[2, 1, 4]], &[0, 1], 1), "k");

        let mut computed = |options: &RopeOptions, offsets: &[i32], indptr: Vec<i32>| {
            let mut tensors =
                RopeTensors::InPlace { q: view_mut(&mut q, &[2, 1, 4]), k: view_mut(&mut k, &[2, 1, 4]) };
            apply_rope(&mut tensors, &RaggedIndices::new(indptr).unwrap(), offsets, options)
        };
        let mut options = RopeOptions::default();
        refused(computed(&options, &[0, 0], vec![0, 2]), "offsets");
        refused(computed(&options, &[0], vec![0, 3]), "indptr");
        for rotary_dim in [0, 3, 6] {
            options.rotary_dim = Some(rotary_dim);
            refused(computed(&options, &[0], vec![0, 2]), "rotary_dim");
        }
        refused(computed(&RopeOptions::with_theta(0.0), &[0], vec![0, 2]), "rope_theta");
        options = RopeOptions::default();
        options.rope_scale = f64::NAN;
        refused(computed(&options, &[0], vec![0, 2]), "factor");
        assert_eq!((q, k), ([7.0; 8], [7.0; 8]));
    }
}
