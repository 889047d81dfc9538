//! What the kernels assume of tensors and options.

use super::{
    DTYPES,
    frequencies::positive,
    options::{RopeOptions, RopeTensors, Rotation},
};
use crate::{error::Result, indices::RaggedIndices, ops::check::Check, tensor::RawTensor};

/// Head dimensions that kernels are compiled for.
const HEAD_DIMS: [i64; 4] = [64, 128, 256, 512];

/// What a grid's second dimension, which counts heads and parts, is limited to.
const MAX_GRID_Y: i64 = 65535;
/// Elements that a thread of these kernels loads at a time.
pub(super) const VECTOR: i64 = 16;
/// The most threads of a block.
const MAX_THREADS: i64 = 1024;

/// All that the kernels of [`apply_rope_pos_ids_cos_sin_cache`] assume but of positions.
pub(crate) fn check_by_table<P>(
    check: &Check<'_>,
    tensors: &RopeTensors<'_>,
    rotation: &Rotation<'_, P>,
) -> Result<Checked> {
    let in_place = matches!(tensors, RopeTensors::InPlace { .. });
    let tensors = Checked::new(check, tensors)?;
    rotation.check_table(check)?;
    let rotary_dim = rotation.cos_sin_cache.raw.shape()[1];
    let fail = |problem| check.fail("cos_sin_cache", problem);
    if rotary_dim > tensors.head_dim {
        return fail(format!("its rows are for {rotary_dim} elements, heads have {}", tensors.head_dim));
    }
    if HEAD_DIMS.contains(&tensors.head_dim) {
        let vector = vector_of(tensors.head_dim);
        check_rotary_dim(check, "cos_sin_cache", rotary_dim, vector, rotation.interleave)?;
        check_grid_y(check, "q", tensors.heads())?;
    } else {
        check_rope_dim(check, "cos_sin_cache", rotary_dim, rotation.interleave)?;
        let threads = rotary_dim / VECTOR;
        if in_place && !rotation.interleave && 32 % threads != 0 {
            return fail(format!(
                "with head_dim {}, halves of {rotary_dim} elements cannot be turned in place; use \
                 RopeTensors::OutOfPlace",
                tensors.head_dim
            ));
        }
        let parts = (tensors.head_dim + rotary_dim - 1) / rotary_dim;
        check_grid_y(check, "q", tensors.heads().saturating_mul(parts))?;
    }
    Ok(tensors)
}

/// Positions on the host have their rows.
pub(crate) fn check_host_positions(check: &Check<'_>, rotation: &Rotation<'_, &[i32]>) -> Result<()> {
    let last = rotation.pos_ids.iter().max().map_or(-1, |&last| i64::from(last));
    rotation.check_positions(check, (last + 1).max(0) as usize).map(drop)
}

/// Checked queries and keys.
pub(crate) struct Checked {
    pub(super) q: RawTensor,
    pub(super) k: RawTensor,
    pub(super) q_rope: RawTensor,
    pub(super) k_rope: RawTensor,
    pub(super) tokens: i64,
    pub(super) head_dim: i64,
    /// Set where options say it.
    pub(super) rotary_dim: i64,
}

impl Checked {
    pub(super) fn new(check: &Check<'_>, tensors: &RopeTensors<'_>) -> Result<Self> {
        let (q, k, q_rope, k_rope) = match tensors {
            RopeTensors::InPlace { q, k } => (q.raw, k.raw, q.raw, k.raw),
            RopeTensors::OutOfPlace { q, k, q_rope, k_rope } => (q.raw, k.raw, q_rope.raw, k_rope.raw),
        };
        check.tensor("q", &q, &DTYPES, &[3])?;
        check.tensor("k", &k, &[q.dtype], &[3])?;
        let (tokens, head_dim) = (q.shape()[0], q.shape()[2]);
        check.shape("k", &k, &[tokens, k.shape()[1], head_dim])?;
        for (name, tensor, shape) in
            [("q", &q, &q), ("k", &k, &k), ("q_rope", &q_rope, &q), ("k_rope", &k_rope, &k)]
        {
            check.tensor(name, tensor, &[q.dtype], &[3])?;
            check.shape(name, tensor, shape.shape())?;
            check.last_dim_contiguous(name, tensor)?;
            check.aligned(name, tensor, 16)?;
        }
        if q.shape().iter().chain(k.shape()).any(|&size| size > i64::from(i32::MAX)) {
            return check.fail(
                "q",
                format!("shapes {:?} and {:?}; sizes are at most 2^31 − 1", q.shape(), k.shape()),
            );
        }
        Ok(Self { q, k, q_rope, k_rope, tokens, head_dim, rotary_dim: head_dim })
    }

    /// With what options say about angles that are computed.
    pub(super) fn with_options(
        check: &Check<'_>,
        tensors: &RopeTensors<'_>,
        options: &RopeOptions,
    ) -> Result<Self> {
        let mut checked = Self::new(check, tensors)?;
        if !HEAD_DIMS.contains(&checked.head_dim) {
            return check.fail("q", format!("head_dim {}; the kernels have {HEAD_DIMS:?}", checked.head_dim));
        }
        if let Some(rotary_dim) = options.rotary_dim {
            checked.rotary_dim = i64::try_from(rotary_dim).unwrap_or(i64::MAX);
        }
        let (rotary_dim, head_dim) = (checked.rotary_dim, checked.head_dim);
        if rotary_dim > head_dim {
            return check.fail("rotary_dim", format!("{rotary_dim} of heads of {head_dim} elements"));
        }
        check_rotary_dim(check, "rotary_dim", rotary_dim, vector_of(head_dim), options.interleave)?;
        positive(check.op(), "rope_scale", options.rope_scale)?;
        positive(check.op(), "rope_theta", options.rope_theta)?;
        Ok(checked)
    }

    /// Of queries and keys.
    pub(super) fn heads(&self) -> i64 {
        self.q.shape()[1] + self.k.shape()[1]
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tokens == 0 || self.heads() == 0
    }
}

/// Elements that a thread loads at a time.
pub(super) fn vector_of(head_dim: i64) -> i64 {
    (head_dim / 32).max(8)
}

/// Vectors end where what is turned ends, and with halves in the middle, too.
pub(super) fn check_rotary_dim(
    check: &Check<'_>,
    argument: &'static str,
    rotary_dim: i64,
    vector: i64,
    interleave: bool,
) -> Result<()> {
    let multiple = if interleave { vector } else { 2 * vector };
    if rotary_dim > 0 && rotary_dim % multiple == 0 {
        return Ok(());
    }
    check.fail(
        argument,
        format!(
            "{rotary_dim} elements are turned; {} that must be a multiple of {multiple}, and not 0",
            if interleave { "with interleaved pairs" } else { "with pairs of two halves" }
        ),
    )
}

pub(super) fn check_grid_y(check: &Check<'_>, argument: &'static str, blocks: i64) -> Result<()> {
    if blocks <= MAX_GRID_Y {
        return Ok(());
    }
    check.fail(
        argument,
        format!("the heads need {blocks} blocks side by side; the GPU has {MAX_GRID_Y}; split them"),
    )
}

/// All that the kernels of [`apply_rope`] and [`apply_llama31_rope`] assume but of offsets.
pub(crate) fn check_ragged(
    check: &Check<'_>,
    tensors: &RopeTensors<'_>,
    indptr: &RaggedIndices,
    options: &RopeOptions,
) -> Result<Checked> {
    let tensors = Checked::with_options(check, tensors, options)?;
    let (rows, batch) = (indptr.total(), indptr.batch_size());
    if rows as i64 > tensors.tokens {
        return check
            .fail("indptr", format!("it ends at {rows}, but there are {} rows of queries", tensors.tokens));
    }
    if (batch as i64).saturating_mul(tensors.heads()) > i64::from(i32::MAX) {
        return check.fail(
            "indptr",
            format!("{batch} requests of {} heads; a launch has fewer than 2^31 blocks", tensors.heads()),
        );
    }
    Ok(tensors)
}

/// All that the kernels of [`apply_rope_pos_ids`] and [`apply_llama31_rope_pos_ids`] assume but of
/// positions.
pub(crate) fn check_by_position(
    check: &Check<'_>,
    tensors: &RopeTensors<'_>,
    options: &RopeOptions,
) -> Result<Checked> {
    let tensors = Checked::with_options(check, tensors, options)?;
    check_grid_y(check, "q", tensors.heads())?;
    Ok(tensors)
}

/// What the kernels here need of the number of elements that are turned.
pub(super) fn check_rope_dim(
    check: &Check<'_>,
    argument: &'static str,
    rope_dim: i64,
    interleave: bool,
) -> Result<()> {
    check_rotary_dim(check, argument, rope_dim, VECTOR, interleave)?;
    if rope_dim > VECTOR * MAX_THREADS {
        return check.fail(argument, format!("{rope_dim} elements; a block turns {}", VECTOR * MAX_THREADS));
    }
    Ok(())
}
