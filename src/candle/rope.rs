//! Rotary position embeddings.

use candle_core::{DType, Device, Result, Shape, Tensor};

use super::{
    op::{Apply, Op, check_dtype, check_like, fitting, invalid},
    step::Step,
    tensor,
};
use crate::{
    indices::{BoundedIndices, BoundedTable},
    reference,
    rope::{self, RopeFrequencies, RopeTensors, Rotation},
    stream::Stream,
    tensor::{TensorMut, TensorRef},
};

const ROPE: &str = "rope";
const EMBEDDING: &str = "RotaryEmbedding";

/// The cosines and sines of a model's positions on a device, made once.
///
/// candle's models keep two tensors `cos` and `sin` and narrow them to the
/// positions of one sequence; here the table stays whole, and each token names
/// its row, so that sequences at different positions are turned together.
#[derive(Clone, Debug)]
pub struct RotaryEmbedding {
    /// `f32` `[max_pos + 1, rotary_dim]`; kernels that turn interleaved pairs
    /// read beyond a row.
    cos_sin: Tensor,
    max_pos: usize,
    interleave: bool,
}

impl RotaryEmbedding {
    /// The table of positions `0..max_pos`, in which pairs of two halves are
    /// turned: elements `i` and `i + rotary_dim / 2`, as
    /// `candle_nn::rotary_emb::rope` does (GPT-NeoX, Llama in Hugging Face's
    /// form).
    ///
    /// The first `frequencies.rotary_dim()` elements of each head are turned, the
    /// others copied.
    ///
    /// # Errors
    /// The table would have 2³¹ elements or more, or memory is short.
    pub fn new(device: &Device, frequencies: &RopeFrequencies, max_pos: usize) -> Result<Self> {
        let rotary_dim = frequencies.rotary_dim();
        let rows = max_pos.saturating_add(1);
        if rows.saturating_mul(rotary_dim) > i32::MAX as usize {
            let problem = format!("{max_pos} rows of {rotary_dim} are 2^31 elements or more");
            return invalid(EMBEDDING, "max_pos", problem);
        }
        let cos_sin = Tensor::from_vec(frequencies.cos_sin_rows(rows), (rows, rotary_dim), device)?;
        Ok(Self { cos_sin, max_pos, interleave: false })
    }

    /// The same table for pairs of neighbours: elements `2i` and `2i + 1`, as
    /// `candle_nn::rotary_emb::rope_i` has them (GPT-J, Meta's Llama).
    #[must_use]
    pub fn interleaved(mut self) -> Self {
        self.interleave = true;
        self
    }

    /// What all positions are below.
    pub fn max_pos(&self) -> usize {
        self.max_pos
    }

    /// Elements of a head that are turned.
    pub fn rotary_dim(&self) -> usize {
        self.cos_sin.dims()[1]
    }

    /// The device of the table.
    pub fn device(&self) -> &Device {
        self.cos_sin.device()
    }

    /// Checks the positions of a step's tokens, and uploads them, for steps
    /// without a [`Batch`](crate::kv::Batch).
    ///
    /// # Errors
    /// A position is negative, or `max_pos` or larger; the stream is being
    /// captured; or what CUDA said.
    pub fn positions(&self, positions: Vec<i32>) -> Result<PositionTable> {
        let host = BoundedIndices::new(self.max_pos, positions).map_err(tensor::error)?;
        let upload = |stream| BoundedTable::new(&stream, host.clone()).map_err(tensor::error);
        let on_cuda = tensor::stream(self.device()).map(upload).transpose()?;
        Ok(PositionTable { host, on_cuda })
    }
}

/// The position of each token, where a [`RotaryEmbedding`] is. As
/// [`StepTables`](super::StepTables), those on candle's default CUDA stream
/// are their thread's.
#[derive(Debug)]
pub struct PositionTable {
    host: BoundedIndices,
    on_cuda: Option<BoundedTable>,
}

/// The position of each token: of a [`PositionTable`], or of the new tokens of a
/// [`Step`], which takes no further upload.
#[derive(Clone, Copy, Debug)]
pub struct TokenPositions<'a>(TokenSource<'a>);

#[derive(Clone, Copy, Debug)]
enum TokenSource<'a> {
    Table(&'a PositionTable),
    Step(&'a Step<'a>),
}

impl<'a> From<&'a PositionTable> for TokenPositions<'a> {
    fn from(table: &'a PositionTable) -> Self {
        Self(TokenSource::Table(table))
    }
}

impl<'a> From<&'a Step<'a>> for TokenPositions<'a> {
    fn from(step: &'a Step<'a>) -> Self {
        Self(TokenSource::Step(step))
    }
}

impl TokenPositions<'_> {
    fn host(&self) -> &[i32] {
        match self.0 {
            TokenSource::Table(table) => table.host.values(),
            TokenSource::Step(step) => step.batch.append_indices().positions(),
        }
    }

    /// What all are below.
    fn bound(&self) -> usize {
        match self.0 {
            TokenSource::Table(table) => table.host.bound(),
            TokenSource::Step(step) => step.batch.append_indices().num_positions(),
        }
    }

    fn on_cuda(&self) -> crate::Result<rope::Positions<'_>> {
        match self.0 {
            TokenSource::Step(step) => Ok((&step.on_cuda()?.append).into()),
            TokenSource::Table(table) => match &table.on_cuda {
                Some(table) => Ok(table.into()),
                None => Err(crate::FlashInferError::invalid(ROPE, "positions", "they are not on CUDA")),
            },
        }
    }
}

struct Rope<'a> {
    positions: TokenPositions<'a>,
    interleave: bool,
    output: (Shape, DType),
}

impl Rope<'_> {
    /// The tensors, of which the results are parts of one.
    fn tensors<'t>(out: &'t mut TensorMut<'_>, [q, k]: [TensorRef<'t>; 2]) -> crate::Result<RopeTensors<'t>> {
        let (q_rope, k_rope) = out.reborrow().split_at(1, q.shape()[1] as usize)?;
        Ok(RopeTensors::OutOfPlace { q, k, q_rope, k_rope })
    }
}

impl Op<3> for Rope<'_> {
    const NAME: &'static str = ROPE;

    fn output(&self) -> (Shape, DType) {
        self.output.clone()
    }

    fn on_cpu(
        &self,
        out: &mut TensorMut<'_>,
        [q, k, cos_sin_cache]: [TensorRef<'_>; 3],
    ) -> crate::Result<()> {
        let rotation =
            Rotation { cos_sin_cache, pos_ids: self.positions.host(), interleave: self.interleave };
        reference::apply_rope_pos_ids_cos_sin_cache(&mut Self::tensors(out, [q, k])?, &rotation)
    }

    fn on_cuda(
        &self,
        stream: &Stream,
        out: &mut TensorMut<'_>,
        [q, k, cos_sin_cache]: [TensorRef<'_>; 3],
    ) -> crate::Result<()> {
        let pos_ids = self.positions.on_cuda()?;
        let rotation = Rotation { cos_sin_cache, pos_ids, interleave: self.interleave };
        rope::apply_rope_pos_ids_cos_sin_cache(stream, &mut Self::tensors(out, [q, k])?, &rotation)
    }
}

/// Turns queries and keys by the position of each token.
///
/// `q` is `(tokens, num_qo_heads, head_dim)`, `k` `(tokens, num_kv_heads,
/// head_dim)`, both `f16` or `bf16`, on the CPU also `f32` and `f64`; views of one
/// joined tensor are fine. On CUDA, strides that are multiples of 16 bytes are
/// read as they are, others copied, and widths are those of
/// [`rope::apply_rope_pos_ids_cos_sin_cache`](crate::rope::apply_rope_pos_ids_cos_sin_cache).
/// The results are parts of one tensor `(tokens, num_qo_heads + num_kv_heads,
/// head_dim)`: strided views, as attention and
/// [`PagedCache::append`](super::PagedCache::append) take them. Nothing waits.
/// There is no gradient.
///
/// `candle_nn::rotary_emb::rope` turns one tensor `(batch, heads, seq, head_dim)`,
/// `rope_thd` one `(batch, seq, heads, head_dim)`, by rows `cos` and `sin` of
/// which row `i` is for token `i` of each sequence; it takes two calls, and as many
/// rows as tokens. Cosines and sines are of the tensors' dtype there, and `f32`
/// here, so that `f16` and `bf16` results differ by a rounding.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use flashinfer_rs::{candle::{RotaryEmbedding, rope}, rope::{RopeFrequencies, RopeScaling}};
/// // Once for a model:
/// let frequencies = RopeFrequencies::new(64, 1e4, &RopeScaling::None)?;
/// let rotary = RotaryEmbedding::new(&Device::Cpu, &frequencies, 4096)?;
/// // Once for a step: two tokens of one sequence, one of another. Steps of a
/// // `kv::Batch` have their positions already: pass the `Step`.
/// let positions = rotary.positions(vec![7, 8, 4000])?;
/// // In each layer:
/// let qkv = Tensor::randn(0f32, 1.0, (3, 4 + 2 + 2, 64), &Device::Cpu)?;
/// let (q, k) = rope(&qkv.narrow(1, 0, 4)?, &qkv.narrow(1, 4, 2)?, &rotary, &positions)?;
/// assert_eq!((q.dims(), k.dims()), (&[3, 4, 64][..], &[3, 2, 64][..]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Devices, dtypes or shapes do not fit, or a position has no row. Nothing was
/// launched. Else what the module or CUDA said.
pub fn rope<'p>(
    q: &Tensor,
    k: &Tensor,
    rotary: &RotaryEmbedding,
    positions: impl Into<TokenPositions<'p>>,
) -> Result<(Tensor, Tensor)> {
    let positions = positions.into();
    check_dtype(ROPE, "q", q.dtype(), q.device())?;
    let tokens = positions.host().len();
    let (&[_, q_heads, head_dim], &[_, k_heads, _]) = (q.dims(), k.dims()) else {
        let problem = format!(
            "shapes {:?} and {:?} of q and k; both are (tokens, heads, head_dim)",
            q.dims(),
            k.dims()
        );
        return invalid(ROPE, "q", problem);
    };
    check_like(ROPE, "q", q, &[tokens, q_heads, head_dim], q.dtype(), rotary.device())?;
    check_like(ROPE, "k", k, &[tokens, k_heads, head_dim], q.dtype(), rotary.device())?;
    if positions.bound() > rotary.max_pos {
        let problem = format!("they are below {}, the table has {} rows", positions.bound(), rotary.max_pos);
        return invalid(ROPE, "positions", problem);
    }
    if q.elem_count() + k.elem_count() == 0 {
        return Ok((q.clone(), k.clone()));
    }
    let output = (Shape::from((tokens, q_heads + k_heads, head_dim)), q.dtype());
    let op = Rope { positions, interleave: rotary.interleave, output };
    let joined = fitting(q)?.apply_op3_no_bwd(&fitting(k)?, &rotary.cos_sin, &Apply(op))?;
    Ok((joined.narrow(1, 0, q_heads)?, joined.narrow(1, q_heads, k_heads)?))
}
