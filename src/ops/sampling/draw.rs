//! Drawing a token for each request.

use super::{
    Parameter, Samples, SamplingOptions, SamplingWorkspace, SoftmaxOptions, check_rows, function,
    options::{KernelRandom, MIN_P as MIN_P_RULE, TOP_P as TOP_P_RULE},
    renorm::{replaces_logits, softmax_of, top_k_renorm_of},
    top_k_mask_logits,
};
use crate::{
    artifacts::FlashInferVersion,
    dtype::DType,
    error::{FlashInferError, Result},
    ffi::{DlTensor, Kernel, Signature, kernels},
    ops::{FixedFunction, check::Check},
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
    pub(super) struct FromLogits = "sampling_from_logits"(
        logits: Tensor, output: Tensor, maybe_indices: OptTensor,
        deterministic: Bool, maybe_seed_arr: OptTensor, seed: Int, maybe_offset_arr: OptTensor, offset: Int,
    ) -> "void";
    pub(super) struct FromProbs = "sampling_from_probs"(
        probs: Tensor, output: Tensor, valid: Tensor, maybe_indices: OptTensor,
        deterministic: Bool, maybe_seed_arr: OptTensor, seed: Int, maybe_offset_arr: OptTensor, offset: Int,
    ) -> "void";
    pub(super) struct TopP = "top_p_sampling_from_probs"(
        probs: Tensor, output: Tensor, valid: Tensor, maybe_indices: OptTensor,
        maybe_p_arr: OptTensor, p: Float,
        deterministic: Bool, maybe_seed_arr: OptTensor, seed: Int, maybe_offset_arr: OptTensor, offset: Int,
    ) -> "void";
    pub(super) struct TopK = "top_k_sampling_from_probs"(
        probs: Tensor, output: Tensor, valid: Tensor, maybe_indices: OptTensor,
        maybe_top_k_arr: OptTensor, top_k: Int,
        deterministic: Bool, maybe_seed_arr: OptTensor, seed: Int, maybe_offset_arr: OptTensor, offset: Int,
    ) -> "void";
    pub(super) struct TopKTopPJoint = "top_k_top_p_sampling_from_probs"(
        probs: Tensor, output: Tensor, valid: Tensor, maybe_indices: OptTensor,
        maybe_top_k_arr: OptTensor, top_k: Float, maybe_top_p_arr: OptTensor, top_p: Float,
        deterministic: Bool, maybe_seed_arr: OptTensor, seed: Int, maybe_offset_arr: OptTensor, offset: Int,
    ) -> "void";
}

/// Min-p takes what top-p takes.
pub(super) const MIN_P: &[Signature] =
    &[Signature { function: "min_p_sampling_from_probs", ..TopP::SIGNATURES[0] }];

static FROM_LOGITS: FixedFunction = function(FromLogits::SIGNATURES);
static FROM_PROBS: FixedFunction = function(FromProbs::SIGNATURES);
static TOP_P: FixedFunction = function(TopP::SIGNATURES);
static TOP_K: FixedFunction = function(TopK::SIGNATURES);
static MIN_P_SAMPLING: FixedFunction = function(MIN_P);
static TOP_K_TOP_P: FixedFunction = function(TopKTopPJoint::SIGNATURES);

/// The checked arguments that all functions which draw have.
struct Drawing {
    /// Rows of the output.
    rows: i64,
    /// Rows to draw from.
    source_rows: i64,
    vocab: i64,
    /// The dtype of tokens.
    id: DType,
    indices: Option<RawTensor>,
    deterministic: bool,
    random: KernelRandom,
}

impl Drawing {
    fn of(
        check: &Check<'_>,
        output: &RawTensor,
        (name, source): (&'static str, &RawTensor),
        options: &SamplingOptions<'_>,
    ) -> Result<Self> {
        let vocab = check_rows(check, name, source, &[DType::F32], 2)?;
        let source_rows = source.shape()[0];
        let rows = match options.indices {
            None => source_rows,
            Some(_) => output.shape().first().copied().unwrap_or(0),
        };
        check.plain("output", output, &[DType::I32, DType::I64], &[rows], output.dtype.size())?;
        if rows > i64::from(i32::MAX) {
            return check.fail("output", format!("{rows} rows; at most 2^31 - 1"));
        }
        let indices = match &options.indices {
            None => None,
            Some(indices) => Some(indices.check(check, "indices", output.dtype, &[rows], source_rows)?),
        };
        Ok(Self {
            rows,
            source_rows,
            vocab,
            id: output.dtype,
            indices,
            deterministic: options.deterministic,
            random: options.random.check(check)?,
        })
    }

    /// As [`of`](Self::of), for the functions that say whether tokens are any.
    fn from_probs(
        check: &Check<'_>,
        samples: &Samples<'_>,
        probs: &TensorRef<'_>,
        options: &SamplingOptions<'_>,
    ) -> Result<Self> {
        let drawing = Self::of(check, &samples.output.raw, ("probs", &probs.raw), options)?;
        check.plain("valid", &samples.valid.raw, &[DType::U8, DType::Bool], &[drawing.rows], 1)?;
        Ok(drawing)
    }
}

impl Drawing {
    /// How many numbers a tensor of `top_k` or `min_p` holds, and how many the module
    /// wants to see. With indices, kernels of 0.6 take one for each row of the output,
    /// and those of 0.7 one for each row of probabilities.
    fn parameter_lens<T>(&self, function: &FixedFunction, parameter: &Parameter<'_, T>) -> Result<[i64; 2]> {
        if self.indices.is_none() || matches!(parameter, Parameter::Value(_)) {
            return Ok([self.rows, self.source_rows]);
        }
        match function.version(FlashInferRuntime::get()?)? {
            Some(version) if version < FlashInferVersion::new(0, 7, 0) => Ok([self.rows, self.source_rows]),
            Some(_) => Ok([self.source_rows; 2]),
            None => Err(FlashInferError::Unsupported {
                what: format!("{} with indices and a parameter for each row", function.name()),
                available:
                    "its module comes from a wheel that does not say of which version it is; give the \
                            wheel's file the name that it was published with"
                        .into(),
            }),
        }
    }
}

/// A kernel's arguments: its own, and those of a [`Drawing`].
macro_rules! kernel {
    ($kernel:ident, $drawing:ident, $($field:ident $(: $value:expr)?),* $(,)?) => {
        $kernel {
            $($field $(: $value)?,)*
            maybe_indices: $drawing.indices.as_ref().map(DlTensor::new),
            deterministic: $drawing.deterministic,
            maybe_seed_arr: $drawing.random.seed_arr.as_ref().map(DlTensor::new),
            seed: $drawing.random.seed,
            maybe_offset_arr: $drawing.random.offset_arr.as_ref().map(DlTensor::new),
            offset: $drawing.random.offset,
        }
    };
}

/// The same of a kernel that draws from probabilities, and says whether tokens are any.
macro_rules! kernel_of_probs {
    ($kernel:ident, $drawing:ident, $samples:ident, $probs:ident $(, $field:ident $(: $value:expr)?)* $(,)?) => {
        kernel!(
            $kernel,
            $drawing,
            probs: $probs.into(),
            output: DlTensor::new(&$samples.output.raw),
            valid: DlTensor::new(&$samples.valid.raw),
            $($field $(: $value)?,)*
        )
    };
}

/// Calls a kernel unless there is nothing to draw.
macro_rules! launch {
    ($function:expr, $stream:ident, $drawing:ident, $kernel:expr) => {{
        if $drawing.rows == 0 {
            return Ok(());
        }
        let function = $function.get(FlashInferRuntime::get()?)?;
        // SAFETY: tensors were checked for all that the kernels assume: device,
        // dtype, shape, contiguity, vector alignment, 32-bit offsets, a number
        // for each row that the kernel looks up. Indices are below the rows
        // that there are. No other number decides an address, or that a loop
        // goes on: each round of a filter halves the range that it draws from.
        unsafe { $kernel.call(function, $stream) }.map(drop)
    }};
}

/// Draws a token from the softmax of each row, as the place of the largest sum
/// of a logit and a random number (Gumbel's). There is no softmax to compute. For
/// the largest logit itself, see [`argmax`](super::argmax).
///
/// The random numbers come from 24 bits, so tokens of a probability below
/// about 10⁻⁵ are drawn too rarely: those of 10⁻⁶ by a tenth. Where a row has
/// much of its probability in such tokens, use [`softmax`](super::softmax) and
/// [`sampling_from_probs`].
///
/// `logits` is `[rows, vocab]`, `f32`, contiguous; `output` `[rows]`, `i32` or
/// `i64`. Where all logits are -∞, or one is NaN, the token is some token.
/// Advances by [`Draws::Logits`](super::Draws::Logits). No rows are nothing to
/// do.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) before
/// anything is launched: a device, stream, dtype, shape, stride or alignment
/// does not fit, there are 2³² elements, or rows of output times `vocab` are
/// (rows would repeat each other's random numbers). Else what the module or
/// CUDA said.
pub fn sampling_from_logits(
    stream: &Stream,
    output: &mut TensorMut<'_>,
    logits: &TensorRef<'_>,
    options: &SamplingOptions<'_>,
) -> Result<()> {
    let check = Check::new("sampling_from_logits", stream)?;
    let drawing = Drawing::of(&check, &output.raw, ("logits", &logits.raw), options)?;
    if drawing.rows * drawing.vocab > i64::from(u32::MAX) {
        return check.fail(
            "output",
            format!(
                "{} rows of {} random numbers; above 2^32 they repeat, so draw fewer rows at once",
                drawing.rows, drawing.vocab
            ),
        );
    }
    let kernel = kernel!(FromLogits, drawing, logits: logits.into(), output: DlTensor::new(&output.raw));
    launch!(FROM_LOGITS, stream, drawing, kernel)
}

/// Draws a token from each row of probabilities.
///
/// `probs` is `[rows, vocab]`, `f32`, contiguous. Advances by
/// [`Draws::Probs`](super::Draws::Probs). No rows are nothing to do.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) before
/// anything is launched: a device, stream, dtype, shape, stride or alignment
/// does not fit, there are 2³² elements, or a parameter is out of its range.
/// Else what the module or CUDA said.
pub fn sampling_from_probs(
    stream: &Stream,
    samples: &mut Samples<'_>,
    probs: &TensorRef<'_>,
    options: &SamplingOptions<'_>,
) -> Result<()> {
    let check = Check::new("sampling_from_probs", stream)?;
    let drawing = Drawing::from_probs(&check, samples, probs, options)?;
    let kernel = kernel_of_probs!(FromProbs, drawing, samples, probs);
    launch!(FROM_PROBS, stream, drawing, kernel)
}

/// Draws a token from those of each row that less than `top_p` of the
/// probability is likelier than.
///
/// `top_p` is in `(0, 1]`; a tensor has one for each row of `probs`, also with
/// [`indices`](SamplingOptions::indices). Advances by
/// [`Draws::Filtered`](super::Draws::Filtered).
///
/// # Errors
/// As [`sampling_from_probs`].
pub fn top_p_sampling_from_probs(
    stream: &Stream,
    samples: &mut Samples<'_>,
    probs: &TensorRef<'_>,
    top_p: Parameter<'_>,
    options: &SamplingOptions<'_>,
) -> Result<()> {
    let check = Check::new("top_p_sampling_from_probs", stream)?;
    let drawing = Drawing::from_probs(&check, samples, probs, options)?;
    let (top_ps, top_p) = top_p.float(&check, "top_p", TOP_P_RULE, [drawing.source_rows; 2])?;
    let kernel = kernel_of_probs!(
        TopP,
        drawing,
        samples,
        probs,
        maybe_p_arr: top_ps.as_ref().map(DlTensor::new),
        p: top_p,
    );
    launch!(TOP_P, stream, drawing, kernel)
}

/// Draws a token from those of each row that fewer than `top_k` tokens are
/// likelier than. Of several that are likeliest, a `top_k` of 1 draws any;
/// [`argmax`](super::argmax) takes the first.
///
/// `top_k` is at least 1; a tensor has the dtype of the output, and one for
/// each row **of the output**; with [`indices`](SamplingOptions::indices) and a
/// module of FlashInfer 0.7, for each row of `probs`. Advances by
/// [`Draws::Filtered`](super::Draws::Filtered).
///
/// # Errors
/// As [`sampling_from_probs`].
pub fn top_k_sampling_from_probs(
    stream: &Stream,
    samples: &mut Samples<'_>,
    probs: &TensorRef<'_>,
    top_k: Parameter<'_, u32>,
    options: &SamplingOptions<'_>,
) -> Result<()> {
    let check = Check::new("top_k_sampling_from_probs", stream)?;
    let drawing = Drawing::from_probs(&check, samples, probs, options)?;
    let lens = drawing.parameter_lens(&TOP_K, &top_k)?;
    let (top_ks, top_k) = top_k.count(&check, "top_k", drawing.id, lens, drawing.vocab)?;
    let kernel = kernel_of_probs!(
        TopK,
        drawing,
        samples,
        probs,
        maybe_top_k_arr: top_ks.as_ref().map(DlTensor::new),
        top_k,
    );
    launch!(TOP_K, stream, drawing, kernel)
}

/// Draws a token from those of each row whose probability is at least `min_p`
/// times the largest.
///
/// `min_p` is in `[0, 1]`; a tensor has one for each row **of the output**; with
/// [`indices`](SamplingOptions::indices) and a module of FlashInfer 0.7, for each
/// row of `probs`. Advances by [`Draws::Probs`](super::Draws::Probs).
///
/// # Errors
/// As [`sampling_from_probs`].
pub fn min_p_sampling_from_probs(
    stream: &Stream,
    samples: &mut Samples<'_>,
    probs: &TensorRef<'_>,
    min_p: Parameter<'_>,
    options: &SamplingOptions<'_>,
) -> Result<()> {
    let check = Check::new("min_p_sampling_from_probs", stream)?;
    let drawing = Drawing::from_probs(&check, samples, probs, options)?;
    let lens = drawing.parameter_lens(&MIN_P_SAMPLING, &min_p)?;
    let (min_ps, min_p) = min_p.float(&check, "min_p", MIN_P_RULE, lens)?;
    let kernel = kernel_of_probs!(
        TopP,
        drawing,
        samples,
        probs,
        maybe_p_arr: min_ps.as_ref().map(DlTensor::new),
        p: min_p,
    );
    launch!(MIN_P_SAMPLING, stream, drawing, kernel)
}

/// Draws a token from those of each row that pass both `top_k` and `top_p`,
/// each of the whole row (upstream's `filter_apply_order="joint"`).
///
/// To filter by `top_p` what `top_k` left, which is upstream's default, call
/// [`top_k_renorm_probs`](super::top_k_renorm_probs), then
/// [`top_p_sampling_from_probs`]. Tensors of parameters have one for each row
/// of `probs`, also with [`indices`](SamplingOptions::indices); `top_k`'s has
/// the dtype of the output. Advances by
/// [`Draws::Filtered`](super::Draws::Filtered).
///
/// # Errors
/// As [`sampling_from_probs`].
pub fn top_k_top_p_sampling_from_probs(
    stream: &Stream,
    samples: &mut Samples<'_>,
    probs: &TensorRef<'_>,
    top_k: Parameter<'_, u32>,
    top_p: Parameter<'_>,
    options: &SamplingOptions<'_>,
) -> Result<()> {
    let check = Check::new("top_k_top_p_sampling_from_probs", stream)?;
    let drawing = Drawing::from_probs(&check, samples, probs, options)?;
    let lens = [drawing.source_rows; 2];
    let (top_ks, top_k) = top_k.count(&check, "top_k", drawing.id, lens, drawing.vocab)?;
    let (top_ps, top_p) = top_p.float(&check, "top_p", TOP_P_RULE, lens)?;
    let kernel = kernel_of_probs!(
        TopKTopPJoint,
        drawing,
        samples,
        probs,
        maybe_top_k_arr: top_ks.as_ref().map(DlTensor::new),
        top_k: top_k as f64,
        maybe_top_p_arr: top_ps.as_ref().map(DlTensor::new),
        top_p,
    );
    launch!(TOP_K_TOP_P, stream, drawing, kernel)
}

/// Which of two filters comes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FilterOrder {
    /// `top_p` is of what `top_k` leaves. Upstream's default.
    #[default]
    TopKFirst,
    /// Both are of the whole row.
    Joint,
}

/// Both filters of [`top_k_top_p_sampling_from_logits`].
#[derive(Clone, Copy, Debug)]
pub struct TopKTopP<'a> {
    /// At least 1. A tensor of them is `i32` if `top_k` comes first, and else
    /// of the dtype of the output.
    pub top_k: Parameter<'a, u32>,
    /// In `(0, 1]`.
    pub top_p: Parameter<'a>,
    /// Which comes first.
    pub order: FilterOrder,
}

impl<'a> TopKTopP<'a> {
    /// Both filters, `top_k` first.
    pub fn new(top_k: impl Into<Parameter<'a, u32>>, top_p: impl Into<Parameter<'a>>) -> Self {
        Self { top_k: top_k.into(), top_p: top_p.into(), order: FilterOrder::default() }
    }
}

/// Softmax, `top_k`, `top_p` and a draw, in the workspace's stream: what
/// upstream's function of this name does.
///
/// `logits` and `probs` are `[rows, vocab]`, `f32`, contiguous; `probs` is
/// written, with the probabilities that tokens are drawn from by `top_p` or by
/// both. With a module of FlashInfer 0.7, whose softmax does not replace logits,
/// `top_k` is of probabilities, so that logits whose probabilities round to the
/// same are kept together. Advances by [`Draws::Filtered`](super::Draws::Filtered).
///
/// # Errors
/// As [`softmax`](super::softmax), [`top_k_mask_logits`] and
/// [`sampling_from_probs`]; `probs` may have been written then.
pub fn top_k_top_p_sampling_from_logits(
    workspace: &mut SamplingWorkspace,
    samples: &mut Samples<'_>,
    probs: &mut TensorMut<'_>,
    logits: &TensorRef<'_>,
    filter: &TopKTopP<'_>,
    options: &SamplingOptions<'_>,
) -> Result<()> {
    let (stream, plain) = (workspace.stream().clone(), SoftmaxOptions::default());
    match filter.order {
        FilterOrder::TopKFirst => {
            if replaces_logits(FlashInferRuntime::get()?)? {
                top_k_mask_logits(workspace, probs, logits, filter.top_k)?;
                softmax_of(workspace, &probs.raw, &probs.raw, &plain)?;
            } else {
                softmax_of(workspace, &probs.raw, &logits.raw, &plain)?;
                top_k_renorm_of(workspace, &probs.raw, &probs.raw, filter.top_k)?;
            }
            top_p_sampling_from_probs(&stream, samples, &probs.as_ref(), filter.top_p, options)
        }
        FilterOrder::Joint => {
            softmax_of(workspace, &probs.raw, &logits.raw, &plain)?;
            let (top_k, top_p) = (filter.top_k, filter.top_p);
            top_k_top_p_sampling_from_probs(&stream, samples, &probs.as_ref(), top_k, top_p, options)
        }
    }
}
