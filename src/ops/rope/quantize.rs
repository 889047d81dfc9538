//! Rotary embeddings whose results are 8-bit floats.

use super::{
    DTYPES, Rotation,
    checks::{check_grid_y, check_rope_dim},
    function, launch,
};
use crate::{
    device::Device,
    dtype::DType,
    error::Result,
    ffi::{DlTensor, Kernel, kernels},
    indices::{HostSlotMapping, SlotMapping},
    kv::{KvLayout, PagedKvMut},
    ops::{
        FixedFunction,
        check::Check,
        page::{DeviceArrays, check_cache, check_mla_cache, check_rows_in_32_bits, check_slots},
    },
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
    pub(super) struct RopeQuantize = "rope_quantize"(
        q_rope_in: Tensor, k_rope_in: Tensor, q_nope_in: Tensor, k_nope_in: Tensor,
        q_rope_out: Tensor, k_rope_out: Tensor, q_nope_out: Tensor, k_nope_out: Tensor,
        cos_sin_cache: Tensor, pos_ids: Tensor,
        quant_scale_q: Float, quant_scale_kv: Float, interleave: Bool, enable_pdl: Bool,
    ) -> "void";
    pub(super) struct RopeQuantizeAppend = "rope_quantize_append_paged_kv_cache"(
        q_rope_in: Tensor, k_rope_in: Tensor, q_nope_in: Tensor, k_nope_in: Tensor, v_in: Tensor,
        q_rope_out: Tensor, q_nope_out: Tensor, cos_sin_cache: Tensor, pos_ids: Tensor,
        k_cache: Tensor, v_cache: Tensor, ckv_cache: Tensor, kpe_cache: Tensor,
        kv_indices: Tensor, kv_indptr: Tensor, batch_indices: Tensor, positions: Tensor,
        kv_layout_code: Int, page_size: Int, quant_scale_q: Float, quant_scale_kv: Float,
        interleave: Bool, enable_pdl: Bool,
    ) -> "void";
}

static QUANTIZE: FixedFunction = function(RopeQuantize::SIGNATURES);
static QUANTIZE_APPEND: FixedFunction = function(RopeQuantizeAppend::SIGNATURES);

/// Element types of the results.
const OUTPUTS: [DType; 2] = [DType::E4M3, DType::E5M2];

/// Heads as two tensors: elements that are turned, and the others.
///
/// Both are `[tokens, heads, …]`; keys of latent attention, whose only head all
/// queries share, may also be `[tokens, …]`.
#[derive(Clone, Copy, Debug)]
pub struct RopeParts<'a> {
    /// Elements that are turned.
    pub rope: TensorRef<'a>,
    /// The others, if there are any.
    pub nope: Option<TensorRef<'a>>,
}

impl<'a> RopeParts<'a> {
    /// Heads of which the first `rotary_dim` elements are turned.
    ///
    /// # Errors
    /// There are fewer elements.
    pub fn of_heads(heads: TensorRef<'a>, rotary_dim: usize) -> Result<Self> {
        let (last, width) = last_axis(heads.shape());
        let rope = heads.narrow(last, 0, rotary_dim)?;
        let nope = match width - rotary_dim {
            0 => None,
            rest => Some(heads.narrow(last, rotary_dim, rest)?),
        };
        Ok(Self { rope, nope })
    }
}

/// As [`RopeParts`], to write.
#[derive(Debug)]
pub struct RopePartsMut<'a> {
    /// Elements that are turned.
    pub rope: TensorMut<'a>,
    /// The others, if there are any.
    pub nope: Option<TensorMut<'a>>,
}

impl<'a> RopePartsMut<'a> {
    /// Heads of which the first `rotary_dim` elements are turned.
    ///
    /// # Errors
    /// There are fewer elements.
    pub fn of_heads(heads: TensorMut<'a>, rotary_dim: usize) -> Result<Self> {
        let (last, width) = last_axis(heads.shape());
        if width == rotary_dim {
            return Ok(Self { rope: heads, nope: None });
        }
        let (rope, nope) = heads.split_at(last, rotary_dim)?;
        Ok(Self { rope, nope: Some(nope) })
    }
}

fn last_axis(shape: &[i64]) -> (usize, usize) {
    // Without dimensions, the view refuses the axis.
    (shape.len().saturating_sub(1), shape.last().map_or(0, |&width| width as usize))
}

/// Options of operations that quantize.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct RopeQuantizeOptions {
    /// What queries are multiplied by before they are rounded. Default 1.
    pub quant_scale_q: f64,
    /// What keys and values are multiplied by before they are rounded; by
    /// default 1. Attention over them takes the inverse; see
    /// [`rope_quantize_append_paged_kv_cache`].
    pub quant_scale_kv: f64,
    /// Programmatic dependent launch, which compute capability 9.0 and newer
    /// have. Default `false`, as upstream's.
    pub enable_pdl: bool,
}

impl Default for RopeQuantizeOptions {
    fn default() -> Self {
        Self { quant_scale_q: 1.0, quant_scale_kv: 1.0, enable_pdl: false }
    }
}

impl RopeQuantizeOptions {
    /// With scales for queries, and for keys and values.
    pub fn with_scales(quant_scale_q: f64, quant_scale_kv: f64) -> Self {
        Self { quant_scale_q, quant_scale_kv, ..Self::default() }
    }

    fn check(&self, check: &Check<'_>) -> Result<()> {
        for (name, scale) in [("quant_scale_q", self.quant_scale_q), ("quant_scale_kv", self.quant_scale_kv)]
        {
            if !scale.is_finite() {
                return check.fail(name, format!("{scale}; it must be finite"));
            }
        }
        Ok(())
    }
}

/// Turns queries and keys, multiplies them by scales and rounds them to
/// `e4m3` or `e5m2`; what is beyond these types becomes their largest number.
/// This is upstream's `rope_quantize_fp8`.
///
/// Input is `f16` or `bf16`, all of one call the same, and so is the output. A
/// multiple of 32 elements of each head is turned, with interleaved pairs of 16;
/// any number of others is only scaled. Addresses and strides are multiples of
/// 16 bytes.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) before
/// anything is launched: a device, stream, dtype, shape, stride or alignment
/// does not fit, a position may have no row, or a scale is not finite. Else what
/// the module or CUDA said.
///
/// ```no_run
/// use flashinfer_rs::{Result, Stream, TensorMut, TensorRef, rope::*};
/// /// Heads of 128 elements, of which as many are turned as the table has.
/// fn quantize(
///     stream: &Stream, rotation: &Rotation<'_>, q: TensorRef<'_>, k: TensorRef<'_>,
///     q_out: TensorMut<'_>, k_out: TensorMut<'_>,
/// ) -> Result<()> {
///     let rotary_dim = rotation.cos_sin_cache.shape()[1] as usize;
///     let mut out = [RopePartsMut::of_heads(q_out, rotary_dim)?, RopePartsMut::of_heads(k_out, rotary_dim)?];
///     let input = [RopeParts::of_heads(q, rotary_dim)?, RopeParts::of_heads(k, rotary_dim)?];
///     rope_quantize(stream, &mut out, &input, rotation, &RopeQuantizeOptions::default())
/// }
/// ```
pub fn rope_quantize(
    stream: &Stream,
    [q_out, k_out]: &mut [RopePartsMut<'_>; 2],
    [q, k]: &[RopeParts<'_>; 2],
    rotation: &Rotation<'_>,
    options: &RopeQuantizeOptions,
) -> Result<()> {
    let check = Check::new(QUANTIZE.name(), stream)?;
    let [q_out, k_out, q, k] = check_quantize(&check, [q_out, k_out], [q, k], rotation, options)?;
    let pos_ids = rotation.positions(&check, q.tokens())?;
    if q.tokens() == 0 || (q.heads() == 0 && k.heads() == 0) {
        return Ok(());
    }
    // SAFETY: tensors, positions and caches were checked above.
    unsafe {
        launch(stream, &QUANTIZE, || RopeQuantize {
            q_rope_in: DlTensor::new(&q.rope),
            k_rope_in: DlTensor::new(&k.rope),
            q_nope_in: DlTensor::new(&q.nope),
            k_nope_in: DlTensor::new(&k.nope),
            q_rope_out: DlTensor::new(&q_out.rope),
            k_rope_out: DlTensor::new(&k_out.rope),
            q_nope_out: DlTensor::new(&q_out.nope),
            k_nope_out: DlTensor::new(&k_out.nope),
            cos_sin_cache: (&rotation.cos_sin_cache).into(),
            pos_ids: DlTensor::new(&pos_ids),
            quant_scale_q: options.quant_scale_q,
            quant_scale_kv: options.quant_scale_kv,
            interleave: rotation.interleave,
            enable_pdl: options.enable_pdl,
        })
    }
}

/// All that the kernels of [`rope_quantize`] assume but of positions. Outputs come first.
pub(crate) fn check_quantize<P>(
    check: &Check<'_>,
    [q_out, k_out]: [&RopePartsMut<'_>; 2],
    [q, k]: [&RopeParts<'_>; 2],
    rotation: &Rotation<'_, P>,
    options: &RopeQuantizeOptions,
) -> Result<[Parts; 4]> {
    options.check(check)?;
    let device = check.device();
    let (q, q_out) = (Parts::input(q, device)?, Parts::output(q_out, device)?);
    let (k, k_out) = (Parts::input(k, device)?, Parts::output(k_out, device)?);
    let dtype = q_out.rope.dtype;
    q.check(check, ["q.rope", "q.nope"], &DTYPES, &[3], &q)?;
    k.check(check, ["k.rope", "k.nope"], &[q.rope.dtype], &[2, 3], &q)?;
    q_out.check(check, ["q_out.rope", "q_out.nope"], &OUTPUTS, &[3], &q)?;
    k_out.check(check, ["k_out.rope", "k_out.nope"], &[dtype], &[k.rope.shape().len()], &k)?;
    for (name, out, like) in [("q_out.rope", &q_out, &q), ("k_out.rope", &k_out, &k)] {
        if out.heads() != like.heads() {
            return check.fail(name, format!("it has {} heads; expected {}", out.heads(), like.heads()));
        }
    }
    check_rotation(check, rotation, &q)?;
    check_grid_y(check, "q.rope", (q.heads() + k.heads()).saturating_mul(1 + q.nope_chunks()))?;
    Ok([q_out, k_out, q, k])
}

/// The cache that quantized keys are written to, and with grouped or multi-head
/// attention the values that go with them.
#[derive(Debug)]
pub enum RopeAppend<'a> {
    /// Keys and values of heads of their own.
    Kv {
        /// The cache, `e4m3` or `e5m2`.
        cache: PagedKvMut<'a>,
        /// Values, `[tokens, heads, head_dim]` of the type of keys. They are
        /// scaled as keys are, and rounded.
        value: TensorRef<'a>,
    },
    /// Latent attention: what is turned goes to `kpe_cache`, the rest to
    /// `ckv_cache`.
    Mla {
        /// `[pages, page_size, 512]`.
        ckv_cache: TensorMut<'a>,
        /// `[pages, page_size, 64]`.
        kpe_cache: TensorMut<'a>,
    },
}

/// [`rope_quantize`] whose keys go to their places in a paged cache, with
/// values, in one kernel. This is upstream's
/// `rope_quantize_fp8_append_paged_kv_cache`.
///
/// `slots` says where each token goes; the positions of `rotation` may be `slots.append`'s. What is not turned of a head is a
/// multiple of what is. Queries may have no heads (a size of 0), where only keys
/// and values are wanted: their output is not read by attention over 16-bit
/// queries.
///
/// # Scales
/// Elements of the cache are `quant_scale_kv` times the numbers they stand for.
/// Attention is told the inverse, as [`k_scale`](crate::attention::RunOptions::k_scale)
/// and [`v_scale`](crate::attention::RunOptions::v_scale). Upstream has no
/// kernel that quantizes without turning: what
/// [`page::append_paged_kv_cache`](crate::page::append_paged_kv_cache) is to
/// write must already be of the cache's type. Kernels on tensor cores take no
/// `sm_scale` times `k_scale` below 1e-3, so that with heads of 128 elements and
/// the default `sm_scale` the scale of keys is at most 88.
///
/// ```
/// use flashinfer_rs::{attention::RunOptions, rope::RopeQuantizeOptions};
/// // Keys and values are within ±24; e4m3 reaches to 448.
/// let quant_scale = 448.0 / 24.0;
/// let append = RopeQuantizeOptions::with_scales(1.0, quant_scale);
/// let mut run = RunOptions::default();
/// run.k_scale = Some(1.0 / append.quant_scale_kv);
/// run.v_scale = Some((1.0 / append.quant_scale_kv) as f32);
/// ```
///
/// # Errors
/// As [`rope_quantize`], and as
/// [`page::append_paged_kv_cache`](crate::page::append_paged_kv_cache).
pub fn rope_quantize_append_paged_kv_cache(
    stream: &Stream,
    q_out: &mut RopePartsMut<'_>,
    cache: &mut RopeAppend<'_>,
    [q, k]: &[RopeParts<'_>; 2],
    rotation: &Rotation<'_>,
    slots: &SlotMapping<'_>,
    options: &RopeQuantizeOptions,
) -> Result<()> {
    let check = Check::new(QUANTIZE_APPEND.name(), stream)?;
    let host = check_slots(&check, slots)?;
    let [q_out, q, k] = check_quantize_append(&check, q_out, cache, [q, k], rotation, &host, options)?;
    let pos_ids = rotation.positions(&check, q.tokens())?;
    if q.tokens() == 0 || (q.heads() == 0 && k.heads() == 0) {
        return Ok(());
    }
    let absent = absent(q_out.rope.dtype, stream.device())?;
    let (mut caches, mut value, mut layout) = ([absent; 4], absent, KvLayout::Nhd);
    match cache {
        RopeAppend::Kv { cache, value: v } => {
            (caches[0], caches[1], value, layout) = (cache.k.raw, cache.v.raw, v.raw, cache.layout);
        }
        RopeAppend::Mla { ckv_cache, kpe_cache } => {
            (caches[2], caches[3]) = (ckv_cache.raw, kpe_cache.raw);
        }
    }
    let arrays = DeviceArrays::of(slots)?;
    // SAFETY: tensors, positions and caches were checked above.
    unsafe {
        launch(stream, &QUANTIZE_APPEND, || RopeQuantizeAppend {
            q_rope_in: DlTensor::new(&q.rope),
            k_rope_in: DlTensor::new(&k.rope),
            q_nope_in: DlTensor::new(&q.nope),
            k_nope_in: DlTensor::new(&k.nope),
            v_in: DlTensor::new(&value),
            q_rope_out: DlTensor::new(&q_out.rope),
            q_nope_out: DlTensor::new(&q_out.nope),
            cos_sin_cache: (&rotation.cos_sin_cache).into(),
            pos_ids: DlTensor::new(&pos_ids),
            k_cache: DlTensor::new(&caches[0]),
            v_cache: DlTensor::new(&caches[1]),
            ckv_cache: DlTensor::new(&caches[2]),
            kpe_cache: DlTensor::new(&caches[3]),
            kv_indices: DlTensor::new(&arrays.indices),
            kv_indptr: DlTensor::new(&arrays.indptr),
            batch_indices: DlTensor::new(&arrays.batch_indices),
            positions: DlTensor::new(&arrays.positions),
            kv_layout_code: layout.code(),
            page_size: host.pages.page_size() as i64,
            quant_scale_q: options.quant_scale_q,
            quant_scale_kv: options.quant_scale_kv,
            interleave: rotation.interleave,
            enable_pdl: options.enable_pdl,
        })
    }
}

/// All that the kernels of [`rope_quantize_append_paged_kv_cache`] assume of tensors. The output
/// comes first.
pub(crate) fn check_quantize_append<P>(
    check: &Check<'_>,
    q_out: &RopePartsMut<'_>,
    cache: &RopeAppend<'_>,
    [q, k]: [&RopeParts<'_>; 2],
    rotation: &Rotation<'_, P>,
    slots: &HostSlotMapping<'_>,
    options: &RopeQuantizeOptions,
) -> Result<[Parts; 3]> {
    options.check(check)?;
    let device = check.device();
    let (q, q_out) = (Parts::input(q, device)?, Parts::output(q_out, device)?);
    let k = Parts::input(k, device)?;
    q.check(check, ["q.rope", "q.nope"], &DTYPES, &[3], &q)?;
    k.check(check, ["k.rope", "k.nope"], &[q.rope.dtype], &[2, 3], &q)?;
    q_out.check(check, ["q_out.rope", "q_out.nope"], &OUTPUTS, &[3], &q)?;
    let (heads, quantized) = (q.heads(), q_out.rope.dtype);
    if q_out.heads() != heads {
        return check.fail("q_out.rope", format!("it has {} heads; expected {heads}", q_out.heads()));
    }
    let (k, tokens) = (k.with_heads()?, slots.append.len());
    if q.tokens() != tokens as i64 {
        return check.fail("append", format!("it is for {tokens} tokens, queries have {}", q.tokens()));
    }
    let tokens = q.tokens();
    check_rotation(check, rotation, &q)?;
    // Whole vectors of what is not turned are read and written, for as many
    // chunks as are counted.
    let [rope_dim, nope_dim] = q.dims();
    if nope_dim % rope_dim != 0 {
        return check.fail(
            "q.nope",
            format!("{nope_dim} elements are not turned; that must be a multiple of the {rope_dim} that are"),
        );
    }
    match cache {
        RopeAppend::Kv { cache, value: v } => {
            let shape =
                check_cache(check, [&cache.k.raw, &cache.v.raw], cache.layout, slots.pages, &[quantized])?;
            let kv_heads = k.heads();
            if (shape.heads, shape.head_dim) != (kv_heads, rope_dim + nope_dim) {
                return check.fail(
                    "kv.k",
                    format!(
                        "it has {} heads of {} elements; keys have {kv_heads} of {}",
                        shape.heads,
                        shape.head_dim,
                        rope_dim + nope_dim
                    ),
                );
            }
            check.tensor("value", &v.raw, &[q.rope.dtype], &[3])?;
            check.shape("value", &v.raw, &[tokens, kv_heads, rope_dim + nope_dim])?;
            check_rows_in_32_bits(check, "value", &v.raw)?;
        }
        RopeAppend::Mla { ckv_cache, kpe_cache } => {
            let parts = [&ckv_cache.raw, &kpe_cache.raw];
            check_mla_cache(check, ["ckv_cache", "kpe_cache"], parts, slots.pages, &[quantized])?;
            let [ckv, kpe] = parts.map(|part| part.shape()[2]);
            if ([rope_dim, nope_dim], k.heads()) != ([kpe, ckv], 1) {
                return check.fail(
                    "k.rope",
                    format!(
                        "keys have {} heads, of which {rope_dim} elements are turned and {nope_dim} are not; \
                         the caches are for one of {kpe} and {ckv}",
                        k.heads()
                    ),
                );
            }
        }
    }
    let blocks = (heads + k.heads()).saturating_mul(1 + q.nope_chunks()).saturating_add(k.heads());
    check_grid_y(check, "q.rope", blocks)?;
    Ok([q_out, q, k])
}

/// A tensor that a kernel tells from others by its null address.
fn absent(dtype: DType, device: Device) -> Result<RawTensor> {
    RawTensor::new(std::ptr::null_mut(), device, dtype, &[0, 0, 0], None)
}

/// The parts of heads, both there: no others are a tensor of width 0.
#[derive(Clone, Copy)]
pub(crate) struct Parts {
    rope: RawTensor,
    nope: RawTensor,
}

impl Parts {
    fn input(parts: &RopeParts<'_>, device: Device) -> Result<Self> {
        Self::new(parts.rope.raw, parts.nope.map(|nope| nope.raw), device)
    }

    fn output(parts: &RopePartsMut<'_>, device: Device) -> Result<Self> {
        Self::new(parts.rope.raw, parts.nope.as_ref().map(|nope| nope.raw), device)
    }

    fn new(rope: RawTensor, nope: Option<RawTensor>, device: Device) -> Result<Self> {
        if let Some(nope) = nope {
            return Ok(Self { rope, nope });
        }
        let mut shape = [0; crate::tensor::MAX_RANK];
        for (to, &size) in shape.iter_mut().zip(rope.shape()) {
            *to = size as usize;
        }
        let rank = rope.shape().len();
        shape[rank.saturating_sub(1)] = 0;
        Ok(Self {
            rope,
            nope: RawTensor::new(std::ptr::null_mut(), device, rope.dtype, &shape[..rank], None)?,
        })
    }

    /// Dtypes, strides and alignment of both parts; tokens and widths are those
    /// of `like`, and both parts have the same heads.
    fn check(
        &self,
        check: &Check<'_>,
        names: [&'static str; 2],
        dtypes: &[DType],
        ranks: &[usize],
        like: &Self,
    ) -> Result<()> {
        check.tensor(names[0], &self.rope, dtypes, ranks)?;
        check.tensor(names[1], &self.nope, &[self.rope.dtype], &[self.rope.shape().len()])?;
        let mut expected = [0; crate::tensor::MAX_RANK];
        let rank = self.rope.shape().len();
        let expected = &mut expected[..rank];
        expected.copy_from_slice(self.rope.shape());
        expected[0] = like.tokens();
        for ((name, part), width) in names.into_iter().zip([&self.rope, &self.nope]).zip(like.dims()) {
            expected[rank - 1] = width;
            check.shape(name, part, expected)?;
            check_rows_in_32_bits(check, name, part)?;
            if part.shape().iter().any(|&size| size > i64::from(i32::MAX)) {
                return check
                    .fail(name, format!("its shape is {:?}; sizes are at most 2^31 − 1", part.shape()));
            }
        }
        Ok(())
    }

    /// A single head where there is no dimension of heads.
    fn with_heads(&self) -> Result<Self> {
        let one = |part: RawTensor| match part.shape().len() {
            2 => TensorRef::new(part.as_one_row()?).permute(&[1, 0, 2]).map(|view| view.raw),
            _ => Ok(part),
        };
        Ok(Self { rope: one(self.rope)?, nope: one(self.nope)? })
    }

    fn tokens(&self) -> i64 {
        self.rope.shape().first().copied().unwrap_or(0)
    }

    fn heads(&self) -> i64 {
        if self.rope.shape().len() == 3 { self.rope.shape()[1] } else { 1 }
    }

    /// Elements that are turned, and others.
    fn dims(&self) -> [i64; 2] {
        [&self.rope, &self.nope].map(|part| part.shape().last().copied().unwrap_or(0))
    }

    /// Blocks for what is not turned of a head.
    fn nope_chunks(&self) -> i64 {
        let [rope_dim, nope_dim] = self.dims();
        (nope_dim + rope_dim - 1) / rope_dim.max(1)
    }
}

/// The table has rows for each position, of the width of what is turned.
fn check_rotation<P>(check: &Check<'_>, rotation: &Rotation<'_, P>, q: &Parts) -> Result<()> {
    rotation.check_table(check)?;
    let ([rope_dim, _], row) = (q.dims(), rotation.cos_sin_cache.raw.shape()[1]);
    if rope_dim != row {
        return check.fail(
            "cos_sin_cache",
            format!("its rows are for {row} elements, but {rope_dim} of each head are turned"),
        );
    }
    check_rope_dim(check, "cos_sin_cache", rope_dim, rotation.interleave)
}
