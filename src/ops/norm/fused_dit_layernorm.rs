//! What stands between two layers of a diffusion transformer, in one kernel.

use super::{NormOptions, check_plain, launch_watched};
use crate::{
    dtype::DType,
    error::{FlashInferError, Result},
    ffi::{DlTensor, Kernel, Signature, kernels},
    module::ModuleName,
    ops::{FixedFunction, check::Check},
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
    struct FusedDitLayernorm = "fused_dit_layernorm"(
        input: Tensor, residual: Tensor, gate: Tensor, gate_bias: Tensor, gamma: Tensor, beta: Tensor,
        scale: Tensor, scale_bias: Tensor, shift: Tensor, shift_bias: Tensor,
        residual_out: Tensor, norm_out: Tensor, sf_out: Tensor, sf_scale: Tensor, input_sf_scale: Tensor,
        epsilon: Float, mode: Int, output_format: Int,
    ) -> "void";
}

pub(super) const SIGNATURES: &[Signature] = FusedDitLayernorm::SIGNATURES;

static FUSED_DIT_LAYERNORM: FixedFunction = FixedFunction::of(ModuleName::NORM, SIGNATURES);

/// The only row length that the kernel is compiled for.
const HIDDEN: i64 = 3072;
/// Parts of the tensor that gates, scales and shifts are cut from.
const PARTS: i64 = 6;
/// The code of `bf16` results.
const BF16_OUTPUT: i64 = 0;

/// A modulation of each row, and a bias that all rows share.
#[derive(Clone, Copy, Debug)]
pub struct Biased<'a> {
    /// `[batch, rows, 3072]`, `bf16`: one of the six parts of a contiguous
    /// tensor `[batch, rows, 6, 3072]`, `.select(2, part)`.
    pub value: TensorRef<'a>,
    /// `[3072]`, `f32`, at a multiple of 32 bytes. Upstream's Python lets it be
    /// absent, but the kernel reads it all the same; give it zeros.
    pub bias: TensorRef<'a>,
}

impl<'a> Biased<'a> {
    /// A modulation and its bias. They are checked where they are used.
    pub fn new(value: TensorRef<'a>, bias: TensorRef<'a>) -> Self {
        Self { value, bias }
    }
}

/// What is computed, with the tensors that it takes. Sums and products are in
/// `f32`; `norm` is the layer norm of the sum before that is rounded.
#[derive(Clone, Copy, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "views lie on the stack; a box would be allocated for each call"
)]
pub enum DitMode<'a> {
    /// `residual = residual + input · (gate + bias)`, then
    /// `norm(residual) · gamma + beta`. Upstream's
    /// `fused_dit_gate_residual_layernorm_gamma_beta`.
    GateResidualGammaBeta {
        /// What multiplies the input.
        gate: Biased<'a>,
        /// `[3072]`, `f32`, at a multiple of 32 bytes.
        gamma: TensorRef<'a>,
        /// As `gamma`.
        beta: TensorRef<'a>,
    },
    /// `residual = residual + input`, then
    /// `norm(residual) · (1 + scale + bias) + (shift + bias)`. Upstream's
    /// `fused_dit_residual_layernorm_scale_shift`.
    ResidualScaleShift {
        /// What multiplies the norm, less 1.
        scale: Biased<'a>,
        /// What is added to the norm.
        shift: Biased<'a>,
    },
    /// `residual = residual + input · (gate + bias)`, then
    /// `norm(residual) · (1 + scale + bias) + (shift + bias)`. Upstream's
    /// `fused_dit_gate_residual_layernorm_scale_shift`.
    GateResidualScaleShift {
        /// What multiplies the input.
        gate: Biased<'a>,
        /// What multiplies the norm, less 1.
        scale: Biased<'a>,
        /// What is added to the norm.
        shift: Biased<'a>,
    },
}

impl<'a> DitMode<'a> {
    /// The code that the kernel takes.
    const fn code(&self) -> i64 {
        match self {
            Self::GateResidualGammaBeta { .. } => 0,
            Self::ResidualScaleShift { .. } => 1,
            Self::GateResidualScaleShift { .. } => 2,
        }
    }

    pub(crate) fn gate(&self) -> Option<Biased<'a>> {
        match *self {
            Self::GateResidualGammaBeta { gate, .. } | Self::GateResidualScaleShift { gate, .. } => {
                Some(gate)
            }
            Self::ResidualScaleShift { .. } => None,
        }
    }

    pub(crate) fn gamma_beta(&self) -> Option<[TensorRef<'a>; 2]> {
        match *self {
            Self::GateResidualGammaBeta { gamma, beta, .. } => Some([gamma, beta]),
            _ => None,
        }
    }

    pub(crate) fn scale_shift(&self) -> Option<[Biased<'a>; 2]> {
        match *self {
            Self::ResidualScaleShift { scale, shift } | Self::GateResidualScaleShift { scale, shift, .. } => {
                Some([scale, shift])
            }
            Self::GateResidualGammaBeta { .. } => None,
        }
    }
}

/// What [`fused_dit_layernorm`] reads.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct DitInput<'a> {
    /// `[batch, rows, 3072]`, `bf16`, contiguous.
    pub input: TensorRef<'a>,
    /// As `input`; `None` counts as zeros.
    pub residual: Option<TensorRef<'a>>,
    /// What is computed.
    pub mode: DitMode<'a>,
    /// `[1]`, `f32`: multiplies the input, for one that is still to be scaled
    /// after a product of quantized matrices. Upstream's
    /// `input_global_scaling_factor`; `None` is 1.
    pub input_sf_scale: Option<TensorRef<'a>>,
}

impl<'a> DitInput<'a> {
    /// Input and residual, without `input_sf_scale`. They are checked where
    /// they are used.
    pub fn new(input: TensorRef<'a>, residual: Option<TensorRef<'a>>, mode: DitMode<'a>) -> Self {
        Self { input, residual, mode, input_sf_scale: None }
    }
}

/// What [`fused_dit_layernorm`] writes: two tensors of the input's shape,
/// `bf16`, contiguous.
#[derive(Debug)]
pub struct DitOutput<'a> {
    /// The sum of residual and input.
    pub residual: TensorMut<'a>,
    /// Its norm.
    pub norm: TensorMut<'a>,
}

/// Adds to a residual, norms it and modulates the norm, as [`DitMode`] says,
/// between the layers of a diffusion transformer (WAN 2.2 with 5 billion
/// parameters, whose rows have 3072 elements).
///
/// Results are `bf16`. The module also has `nvfp4` and `mxfp8` results, whose
/// kernels are for compute capability 10.0 and newer and do nothing on others;
/// this crate does not call them. Nothing to do without rows. Of the options,
/// `eps` counts.
///
/// # Errors
/// [`InvalidArgument`](FlashInferError::InvalidArgument) before anything is
/// launched: a device, stream, dtype, shape, stride or alignment (16 bytes; 32
/// for what is `f32`) does not fit, or the input has 2³² elements or more.
/// [`Unsupported`](FlashInferError::Unsupported): packed results are asked for,
/// by a `norm` of `i32`. Else what the module or CUDA said.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{gpu::Tensor, norm::*, Stream};
/// use half::bf16;
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// let rows = || Tensor::<bf16>::zeros(&stream, &[1, 10, 3072]);
/// let (input, mut residual, mut norm) = (rows()?, rows()?, rows()?);
/// let modulation = Tensor::<bf16>::zeros(&stream, &[1, 10, 6, 3072])?;
/// let bias = Tensor::<f32>::zeros(&stream, &[3072])?;
/// let part = |part| Ok::<_, flashinfer_rs::FlashInferError>(Biased::new(modulation.view().select(2, part)?, bias.view()));
/// let mode = DitMode::ResidualScaleShift { scale: part(1)?, shift: part(0)? };
/// fused_dit_layernorm(
///     &stream,
///     &mut DitOutput { residual: residual.view_mut(), norm: norm.view_mut() },
///     &DitInput::new(input.view(), None, mode),
///     &NormOptions::default(),
/// )?;
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
pub fn fused_dit_layernorm(
    stream: &Stream,
    out: &mut DitOutput<'_>,
    input: &DitInput<'_>,
    options: &NormOptions,
) -> Result<()> {
    let check = Check::new(FUSED_DIT_LAYERNORM.name(), stream)?;
    check_fused_dit_layernorm(&check, out, input)?;
    if input.input.numel() == 0 {
        return Ok(());
    }
    let device = stream.device();
    let absent = |dtype| RawTensor::new(std::ptr::null_mut(), device, dtype, &[0], None);
    let (no_bf16, no_f32, no_bytes) = (absent(DType::BF16)?, absent(DType::F32)?, absent(DType::U8)?);
    let bf16 = |tensor: Option<TensorRef<'_>>| tensor.map_or(no_bf16, |tensor| tensor.raw);
    let f32 = |tensor: Option<TensorRef<'_>>| tensor.map_or(no_f32, |tensor| tensor.raw);
    let biased =
        |pair: Option<Biased<'_>>| [bf16(pair.map(|pair| pair.value)), f32(pair.map(|pair| pair.bias))];
    let scale_shift = input.mode.scale_shift();
    let [gate, gate_bias] = biased(input.mode.gate());
    let [gamma, beta] = [0, 1].map(|at| f32(input.mode.gamma_beta().map(|pair| pair[at])));
    let [[scale, scale_bias], [shift, shift_bias]] =
        [0, 1].map(|at| biased(scale_shift.map(|pair| pair[at])));
    let (residual, input_sf_scale) = (bf16(input.residual), f32(input.input_sf_scale));
    let kernel = FusedDitLayernorm {
        input: (&input.input).into(),
        residual: DlTensor::new(&residual),
        gate: DlTensor::new(&gate),
        gate_bias: DlTensor::new(&gate_bias),
        gamma: DlTensor::new(&gamma),
        beta: DlTensor::new(&beta),
        scale: DlTensor::new(&scale),
        scale_bias: DlTensor::new(&scale_bias),
        shift: DlTensor::new(&shift),
        shift_bias: DlTensor::new(&shift_bias),
        residual_out: DlTensor::new(&out.residual.raw),
        norm_out: DlTensor::new(&out.norm.raw),
        sf_out: DlTensor::new(&no_bytes),
        sf_scale: DlTensor::new(&no_f32),
        input_sf_scale: DlTensor::new(&input_sf_scale),
        epsilon: options.eps,
        mode: input.mode.code(),
        output_format: BF16_OUTPUT,
    };
    // SAFETY: the function has this signature; every tensor that the mode reads
    // is there, and was checked for device, dtype, shape, the strides that the
    // kernel has fixed, alignment and 32-bit offsets. Mode and format have
    // kernels, and rows have the length, over which the launcher would end the
    // process.
    unsafe { launch_watched(&FUSED_DIT_LAYERNORM, stream, &kernel) }
}

/// All that the kernel assumes.
pub(crate) fn check_fused_dit_layernorm(
    check: &Check<'_>,
    out: &DitOutput<'_>,
    input: &DitInput<'_>,
) -> Result<()> {
    check.tensor("input", &input.input.raw, &[DType::BF16], &[3])?;
    let &[batch, rows, hidden] = input.input.shape() else {
        return check.fail("input", "expected three dimensions".into());
    };
    let shape = [batch, rows, hidden];
    if hidden != HIDDEN {
        return check.fail("input", format!("its rows have {hidden} elements; the kernel has {HIDDEN} only"));
    }
    // The launcher takes 32-bit sizes, and the kernel computes where an entry
    // of the batch starts, in pairs of elements, in 32 bits.
    let most = i64::from(i32::MAX);
    if batch > most || rows > most || input.input.raw.numel() / 2 > most {
        return check
            .fail("input", format!("its shape is {shape:?}; the kernel addresses fewer than 2^32 elements"));
    }
    let plain = |name, tensor: &TensorRef<'_>| check_plain(check, name, &tensor.raw, DType::BF16, &shape, 16);
    let vector =
        |name, tensor: &TensorRef<'_>| check_plain(check, name, &tensor.raw, DType::F32, &[HIDDEN], 32);
    let biased = |name, bias_name, pair: &Biased<'_>| {
        check_part(check, name, &pair.value.raw, [batch, rows])?;
        vector(bias_name, &pair.bias)
    };
    plain("input", &input.input)?;
    if let Some(residual) = &input.residual {
        plain("residual", residual)?;
    }
    if let Some(gate) = &input.mode.gate() {
        biased("gate", "gate.bias", gate)?;
    }
    if let Some([gamma, beta]) = &input.mode.gamma_beta() {
        vector("gamma", gamma)?;
        vector("beta", beta)?;
    }
    if let Some([scale, shift]) = &input.mode.scale_shift() {
        biased("scale", "scale.bias", scale)?;
        biased("shift", "shift.bias", shift)?;
    }
    if let Some(scale) = &input.input_sf_scale {
        check_plain(check, "input_sf_scale", &scale.raw, DType::F32, &[1], 4)?;
    }
    if out.norm.dtype() == DType::I32 {
        return Err(FlashInferError::Unsupported {
            what: "fused_dit_layernorm with packed results (nvfp4, mxfp8)".into(),
            available:
                "this crate calls the kernels with bf16 results; the others need compute capability 10.0"
                    .into(),
        });
    }
    plain("out.residual", &out.residual.as_ref())?;
    plain("out.norm", &out.norm.as_ref())
}

/// One of six parts of a contiguous `[batch, rows, 6, 3072]`: the kernel has
/// the strides fixed.
fn check_part(
    check: &Check<'_>,
    name: &'static str,
    part: &RawTensor,
    [batch, rows]: [i64; 2],
) -> Result<()> {
    let shape = [batch, rows, HIDDEN];
    check.tensor(name, part, &[DType::BF16], &[3])?;
    check.shape(name, part, &shape)?;
    let expected = [rows * PARTS * HIDDEN, PARTS * HIDDEN, 1];
    let mut dims = shape.iter().zip(part.strides()).zip(&expected);
    if part.numel() != 0 && dims.any(|((&size, stride), expected)| size > 1 && stride != expected) {
        return check.fail(
            name,
            format!(
                "its strides are {:?}; expected {expected:?}, those of `select(2, _)` of a contiguous tensor \
                 [batch, rows, 6, 3072], which the kernel has fixed",
                part.strides()
            ),
        );
    }
    check.aligned(name, part, 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    const GPU: Device = Device::Cuda(0);

    /// A tensor that is never looked at.
    fn at(address: usize, dtype: DType, shape: &[usize], strides: Option<&[usize]>) -> TensorRef<'static> {
        // SAFETY: the address is only compared.
        unsafe { TensorRef::from_raw_parts(address as *const _, GPU, dtype, shape, strides) }.unwrap()
    }

    fn bf16(shape: &[usize]) -> TensorRef<'static> {
        at(4096, DType::BF16, shape, None)
    }

    fn f32(len: usize) -> TensorRef<'static> {
        at(4096, DType::F32, &[len], None)
    }

    fn part(batch: usize, rows: usize) -> Biased<'static> {
        Biased::new(bf16(&[batch, rows, 6, 3072]).select(2, 1).unwrap(), f32(3072))
    }

    fn output(address: usize, dtype: DType, shape: &[usize]) -> TensorMut<'static> {
        // SAFETY: the address is only compared.
        unsafe { TensorMut::from_raw_parts(address as *mut _, GPU, dtype, shape, None) }.unwrap()
    }

    /// The argument that is refused, if any.
    fn refused_with(
        residual: TensorMut<'_>,
        norm: TensorMut<'_>,
        input: &DitInput<'_>,
    ) -> Option<&'static str> {
        // SAFETY: nothing is enqueued on the stream.
        let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
        let check = Check::new("fused_dit_layernorm", &stream).unwrap();
        match check_fused_dit_layernorm(&check, &DitOutput { residual, norm }, input) {
            Ok(()) => None,
            Err(FlashInferError::InvalidArgument { argument, .. }) => Some(argument),
            Err(FlashInferError::Unsupported { .. }) => Some("unsupported"),
            Err(other) => panic!("{other}"),
        }
    }

    fn refused(input: &DitInput<'_>) -> Option<&'static str> {
        let shape: Vec<usize> = input.input.shape().iter().map(|&size| size as usize).collect();
        let out = || output(1 << 40, DType::BF16, &shape);
        refused_with(out(), out(), input)
    }

    fn modes(batch: usize, rows: usize) -> [DitMode<'static>; 3] {
        let (gate, scale, shift) = (part(batch, rows), part(batch, rows), part(batch, rows));
        [
            DitMode::GateResidualGammaBeta { gate, gamma: f32(3072), beta: f32(3072) },
            DitMode::ResidualScaleShift { scale, shift },
            DitMode::GateResidualScaleShift { gate, scale, shift },
        ]
    }

    #[test]
    fn wrong_input_is_refused() {
        let shape = [2, 5, 3072];
        for mode in modes(2, 5) {
            let good = DitInput::new(bf16(&shape), Some(bf16(&shape)), mode);
            assert_eq!(refused(&good), None);
            assert_eq!(refused(&DitInput { residual: None, ..good }), None);
            assert_eq!(refused(&DitInput { input_sf_scale: Some(f32(1)), ..good }), None);
            assert_eq!(refused(&DitInput { input_sf_scale: Some(f32(2)), ..good }), Some("input_sf_scale"));
            for input in [
                at(4096, DType::F16, &shape, None),
                at(4104, DType::BF16, &shape, None),
                bf16(&[10, 3072]),
                bf16(&[2, 5, 4096]),
                bf16(&[2, 6, 3072]).narrow(1, 0, 5).unwrap(),
            ] {
                assert_eq!(refused(&DitInput { input, ..good }), Some("input"), "{input:?}");
            }
            for residual in [bf16(&[2, 4, 3072]), at(4096, DType::F32, &shape, None)] {
                assert_eq!(refused(&DitInput { residual: Some(residual), ..good }), Some("residual"));
            }
            let out = || output(1 << 40, DType::BF16, &shape);
            assert_eq!(refused_with(output(8, DType::BF16, &shape), out(), &good), Some("out.residual"));
            assert_eq!(refused_with(out(), output(1 << 40, DType::F16, &shape), &good), Some("out.norm"));
            assert_eq!(
                refused_with(out(), output(1 << 40, DType::BF16, &[2, 5, 64]), &good),
                Some("out.norm")
            );
            assert_eq!(
                refused_with(out(), output(1 << 40, DType::I32, &[2, 5, 384]), &good),
                Some("unsupported")
            );
        }
    }

    #[test]
    fn modulations_have_the_fixed_strides() {
        let scale_shift = |scale, shift| {
            DitInput::new(bf16(&[2, 5, 3072]), None, DitMode::ResidualScaleShift { scale, shift })
        };
        let good = part(2, 5);
        let value = |value| Biased { value, ..good };
        for wrong in [
            bf16(&[2, 5, 3072]),
            bf16(&[2, 5, 4, 3072]).select(2, 0).unwrap(),
            bf16(&[2, 6, 6, 3072]).narrow(1, 0, 5).unwrap().select(2, 0).unwrap(),
            bf16(&[2, 4, 6, 3072]).select(2, 0).unwrap(),
            at(4100, DType::BF16, &[2, 5, 6, 3072], None).select(2, 0).unwrap(),
            at(4096, DType::F16, &[2, 5, 6, 3072], None).select(2, 0).unwrap(),
        ] {
            assert_eq!(refused(&scale_shift(value(wrong), good)), Some("scale"), "{wrong:?}");
            assert_eq!(refused(&scale_shift(good, value(wrong))), Some("shift"), "{wrong:?}");
        }
        for bias in [f32(1), bf16(&[3072]), at(4096 + 16, DType::F32, &[3072], None)] {
            assert_eq!(refused(&scale_shift(Biased { bias, ..good }, good)), Some("scale.bias"));
            assert_eq!(refused(&scale_shift(good, Biased { bias, ..good })), Some("shift.bias"));
            let mode = DitMode::GateResidualGammaBeta { gate: good, gamma: bias, beta: f32(3072) };
            assert_eq!(refused(&DitInput::new(bf16(&[2, 5, 3072]), None, mode)), Some("gamma"));
        }
        // Strides of single entries mean nothing.
        let one_row = DitMode::ResidualScaleShift { scale: part(3, 1), shift: part(3, 1) };
        assert_eq!(refused(&DitInput::new(bf16(&[3, 1, 3072]), None, one_row)), None);
        let single = value(bf16(&[1, 1, 3072]));
        let mode = DitMode::ResidualScaleShift { scale: single, shift: single };
        assert_eq!(refused(&DitInput::new(bf16(&[1, 1, 3072]), None, mode)), None);
    }

    #[test]
    fn entries_of_the_batch_are_addressed_in_32_bits() {
        // 2³² elements are 1398101 rows and a third.
        for (rows, expected) in [(1398101, None), (1398102, Some("input"))] {
            for (batch, rows) in [(1, rows), (rows, 1)] {
                let [_, mode, _] = modes(batch, rows);
                assert_eq!(refused(&DitInput::new(bf16(&[batch, rows, 3072]), None, mode)), expected);
            }
        }
    }
}
