//! Norm and rotary embedding of queries and keys from one joined tensor.

use std::sync::{Arc, Mutex, PoisonError};

use super::{
    NormOptions, launch_watched,
    qkv::{FusedQkOptions, HEAD_DIMS, QkvInput, QkvOutput, QkvShape, Rope3d, check_fused_qk_rmsnorm_rope},
    rmsnorm,
};
use crate::{
    capture,
    cuda::DeviceBuffer,
    dtype::DType,
    error::{FlashInferError, Result},
    ffi::{DlTensor, Kernel, Signature, kernels},
    module::ModuleName,
    ops::{FixedFunction, check::Check},
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
    struct FusedQkRmsnormRope = "fused_qk_rmsnorm_rope"(
        qkv_in: Tensor, q_weight: Tensor, k_weight: Tensor, q_out: Tensor, k_out: Tensor, v_out: Tensor,
        num_tokens: Int, seq_len: Int, ppf: Int, pph: Int, ppw: Int,
        num_frame_channels: Int, num_height_channels: Int, num_width_channels: Int,
        num_heads_q: Int, num_heads_k: Int, num_heads_v: Int, head_dim: Int,
        eps: Float, base: Float, interleave: Bool, factor: Float, low: Float, high: Float,
        attention_factor: Float, is_qk_norm: Bool, output_fp8: Bool,
        output_quant_scale: Float, v_quant_scale: Float,
    ) -> "void";
}

pub(super) const SIGNATURES: &[Signature] = FusedQkRmsnormRope::SIGNATURES;

static FUSED_QK_RMSNORM_ROPE: FixedFunction = FixedFunction::of(ModuleName::NORM, SIGNATURES);

/// The frequencies of a [`Rope3d`] on a device, for [`fused_qk_rmsnorm_rope`].
///
/// FlashInfer's module keeps one table of frequencies for each device, and
/// writes it anew, on the stream of the call, when a call has other frequencies
/// than the call before. That would change them under kernels of other streams
/// and under captured graphs. So this value stands for the device's table: as
/// long as one lives, there can be others for the same [`Rope3d`], and those
/// for another are refused. A process that needs several by turns drops one
/// and makes the next.
///
/// A graph that captured a call may be replayed as long as the table lives.
#[derive(Debug)]
pub struct RopeTable {
    held: Arc<Held>,
}

/// What keeps a device's table from being written anew.
#[derive(Debug)]
struct Held {
    rope: Rope3d,
    ordinal: u32,
}

/// What is in a device's table, and how many [`RopeTable`]s count on it.
struct Content {
    ordinal: u32,
    rope: Rope3d,
    tables: usize,
}

/// The tables of all devices.
static CONTENTS: Mutex<Vec<Content>> = Mutex::new(Vec::new());

impl RopeTable {
    /// Writes the frequencies to the table of the stream's device, unless they
    /// are there.
    ///
    /// That waits for all work on the device, twice: for what may still use
    /// the old table, and for the new one, so that calls on any stream find it.
    /// The first time on a device, and for larger heads than before, the module
    /// allocates up to 512 bytes, which stay allocated; it ends the process if it
    /// gets none, so memory is asked for before.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument): the head dimension
    /// is not 64, 128 or 256; a number is not finite, `base` or `factor` not above
    /// 0; `attention_factor` is not 1 without YaRN; a table for another `rope` is
    /// alive on this device; or the stream is being captured and the frequencies
    /// are not there. Else what the module, for example without code for this
    /// GPU, or CUDA said.
    pub fn new(stream: &Stream, rope: &Rope3d) -> Result<Self> {
        const OP: &str = "RopeTable";
        stream.check_usable_here(OP)?;
        rope.check().map_err(|(argument, problem)| FlashInferError::invalid(OP, argument, problem))?;
        if !HEAD_DIMS.contains(&rope.head_dim()) {
            return Err(FlashInferError::invalid(
                OP,
                "rope.channels",
                format!(
                    "{:?}, so head_dim is {}; the kernel has {HEAD_DIMS:?}",
                    rope.channels,
                    rope.head_dim()
                ),
            ));
        }
        let ordinal = stream.ordinal();
        let mut contents = CONTENTS.lock().unwrap_or_else(PoisonError::into_inner);
        match contents.iter_mut().find(|content| content.ordinal == ordinal) {
            Some(content) if content.rope == *rope => content.tables += 1,
            Some(content) if content.tables > 0 => {
                return Err(FlashInferError::invalid(
                    OP,
                    "rope",
                    format!(
                        "the module has one table for each device, and that of device {ordinal} is in use for {:?}; \
                         drop its RopeTables, or use the same numbers",
                        content.rope
                    ),
                ));
            }
            _ => {
                let cuda = FlashInferRuntime::get()?.cuda();
                let scratch = DeviceBuffer::zeroed(cuda, stream, 8 * row_bytes(rope))?;
                // Until this is done, nobody knows what is in the table.
                contents.retain(|content| content.ordinal != ordinal);
                write_table(stream, rope, &scratch)?;
                contents.push(Content { ordinal, rope: *rope, tables: 1 });
            }
        }
        Ok(Self { held: Arc::new(Held { rope: *rope, ordinal }) })
    }

    /// What the frequencies are of.
    pub fn rope(&self) -> &Rope3d {
        &self.held.rope
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut contents = CONTENTS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(content) = contents.iter_mut().find(|content| content.ordinal == self.ordinal) {
            content.tables -= 1;
        }
    }
}

/// Bytes of a row of one head.
fn row_bytes(rope: &Rope3d) -> usize {
    rope.head_dim() * DType::BF16.size()
}

/// Has the module write its table, by a call for one token of zeros. The
/// scratch memory has eight rows of them.
fn write_table(stream: &Stream, rope: &Rope3d, scratch: &DeviceBuffer) -> Result<()> {
    let cuda = FlashInferRuntime::get()?.cuda();
    let (d, row) = (rope.head_dim(), row_bytes(rope));
    let part = |first: usize, shape: &[usize]| {
        let data = scratch.as_ptr().wrapping_byte_add(first * row);
        RawTensor::new(data, stream.device(), DType::BF16, shape, None)
    };
    // A function that reports errors: it tells whether the module has code for
    // this GPU, before one is called that would end the process.
    let input = TensorRef::new(part(0, &[1, d])?);
    let mut out = TensorMut::new(part(1, &[1, d])?);
    rmsnorm(stream, &mut out, &input, &TensorRef::new(part(2, &[d])?), &NormOptions::default())?;
    // Likewise, that there is memory: more than the module will allocate.
    drop(DeviceBuffer::new(cuda, stream, 8 << 20)?);
    cuda.wait_for_device_of(stream)?;
    let outputs = [part(5, &[1, 1, d])?, part(6, &[1, 1, d])?, part(7, &[1, 1, d])?];
    let shape = QkvShape { tokens: 1, heads: [1; 3], head_dim: d as i64 };
    let input = [part(0, &[1, 3 * d])?, part(3, &[d])?, part(4, &[d])?];
    // SAFETY: the parts of the scratch memory have these shapes, are on the
    // stream's device, contiguous and aligned to their size, and do not overlap.
    unsafe { call(stream, &outputs, &input, shape, [1; 3], rope, &FusedQkOptions::default()) }?;
    cuda.wait_for_device_of(stream)
}

/// Splits a joined tensor of queries, keys and values of a video into three:
/// queries and keys normed over all their heads together and turned by their
/// position ([`Rope3d`]), values as they are.
///
/// There are 1 to 32 heads of each kind, of 64, 128 or 256 elements. A norm is
/// rounded to `bf16` before it is turned, unless results are `e4m3`; these are
/// cut off at ±448. No tokens are nothing to do.
///
/// # Errors
/// [`InvalidArgument`](FlashInferError::InvalidArgument) before anything is
/// launched: a device, stream, dtype, shape, stride or alignment (16 bytes) does
/// not fit, tokens are no whole videos, there are 2³¹ or more of them, or `table`
/// is another device's. Else what CUDA said. Where an earlier kernel fails on the
/// device at the very moment of the launch, the module ends the process.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{gpu::Tensor, norm::*, Stream};
/// use half::bf16;
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// let table = RopeTable::new(&stream, &Rope3d::new([44, 42, 42]))?;
/// // 2 frames of 3 × 4 patches; 24 heads of 128 elements.
/// let (tokens, heads) = (24, 24);
/// let qkv = Tensor::<bf16>::zeros(&stream, &[tokens, 3 * heads * 128])?;
/// let weight = Tensor::from_slice(&stream, &[heads * 128], &[bf16::ONE; 24 * 128])?;
/// let output = || Tensor::<bf16>::zeros(&stream, &[tokens, heads, 128]);
/// let (mut q, mut k, mut v) = (output()?, output()?, output()?);
/// fused_qk_rmsnorm_rope(
///     &stream,
///     &mut QkvOutput { q: q.view_mut(), k: k.view_mut(), v: v.view_mut() },
///     &QkvInput {
///         qkv: qkv.view(),
///         q_weight: weight.view(),
///         k_weight: weight.view(),
///         patches: [2, 3, 4],
///     },
///     &table,
///     &FusedQkOptions::default(),
/// )?;
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
pub fn fused_qk_rmsnorm_rope(
    stream: &Stream,
    out: &mut QkvOutput<'_>,
    input: &QkvInput<'_>,
    table: &RopeTable,
    options: &FusedQkOptions,
) -> Result<()> {
    let check = Check::new(FUSED_QK_RMSNORM_ROPE.name(), stream)?;
    if table.held.ordinal != stream.ordinal() {
        return check.fail(
            "table",
            format!("it is of device {}, the stream of device {}", table.held.ordinal, stream.ordinal()),
        );
    }
    let shape = check_fused_qk_rmsnorm_rope(&check, out, input, &table.held.rope, options)?;
    if shape.tokens == 0 {
        return Ok(());
    }
    let outputs = [out.q.raw, out.k.raw, out.v.raw];
    let inputs = [input.qkv.raw, input.q_weight.raw, input.k_weight.raw];
    if capture::is_active() {
        capture::keep(table.held.clone());
    }
    // SAFETY: tensors were checked for all that the kernel assumes; the table
    // is alive, so the module has it on this device and writes none.
    unsafe { call(stream, &outputs, &inputs, shape, input.patches, &table.held.rope, options) }
}

/// Calls the function, which ends the process if it does not like an argument.
///
/// # Safety
/// Outputs and inputs, with the names of [`QkvOutput`] and [`QkvInput`] in
/// order, must be all that the kernel assumes. The device's table must hold
/// the frequencies of `rope`, or nobody may use it.
unsafe fn call(
    stream: &Stream,
    [q_out, k_out, v_out]: &[RawTensor; 3],
    [qkv, q_weight, k_weight]: &[RawTensor; 3],
    shape: QkvShape,
    patches: [usize; 3],
    rope: &Rope3d,
    options: &FusedQkOptions,
) -> Result<()> {
    let [ppf, pph, ppw] = patches.map(|patches| patches as i64);
    let [num_frame_channels, num_height_channels, num_width_channels] =
        rope.channels.map(|channels| channels as i64);
    let [num_heads_q, num_heads_k, num_heads_v] = shape.heads;
    let kernel = FusedQkRmsnormRope {
        qkv_in: DlTensor::new(qkv),
        q_weight: DlTensor::new(q_weight),
        k_weight: DlTensor::new(k_weight),
        q_out: DlTensor::new(q_out),
        k_out: DlTensor::new(k_out),
        v_out: DlTensor::new(v_out),
        num_tokens: shape.tokens,
        seq_len: ppf * pph * ppw,
        ppf,
        pph,
        ppw,
        num_frame_channels,
        num_height_channels,
        num_width_channels,
        num_heads_q,
        num_heads_k,
        num_heads_v,
        head_dim: shape.head_dim,
        eps: options.eps,
        base: rope.base.into(),
        interleave: options.interleave,
        factor: rope.factor.into(),
        low: rope.low.into(),
        high: rope.high.into(),
        attention_factor: rope.attention_factor.into(),
        is_qk_norm: options.is_qk_norm,
        output_fp8: options.output_fp8,
        output_quant_scale: options.output_quant_scale,
        v_quant_scale: options.v_quant_scale,
    };
    // SAFETY: the function has this signature; the rest is promised by the caller.
    unsafe { launch_watched(&FUSED_QK_RMSNORM_ROPE, stream, &kernel) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    const GPU: Device = Device::Cuda(0);

    fn stream() -> Stream {
        // SAFETY: nothing is enqueued on the stream.
        unsafe { Stream::from_raw(std::ptr::null_mut(), 0) }
    }

    /// A tensor that is never looked at.
    fn at(address: usize, dtype: DType, shape: &[usize]) -> TensorRef<'static> {
        // SAFETY: the address is only compared.
        unsafe { TensorRef::from_raw_parts(address as *const _, GPU, dtype, shape, None) }.unwrap()
    }

    fn bf16(shape: &[usize]) -> TensorRef<'static> {
        at(4096, DType::BF16, shape)
    }

    fn outputs(dtype: DType, rows: &[usize], heads: [usize; 3], d: usize) -> QkvOutput<'static> {
        let [q, k, v] = heads.map(|heads| {
            let shape = [rows, &[heads, d]].concat();
            // SAFETY: the address is only compared.
            unsafe { TensorMut::from_raw_parts((1usize << 40) as *mut _, GPU, dtype, &shape, None) }.unwrap()
        });
        QkvOutput { q, k, v }
    }

    /// The argument that is refused, if any.
    fn refused(
        out: &QkvOutput<'_>,
        input: &QkvInput<'_>,
        rope: &Rope3d,
        options: &FusedQkOptions,
    ) -> Option<&'static str> {
        let stream = stream();
        let check = Check::new("fused_qk_rmsnorm_rope", &stream).unwrap();
        match check_fused_qk_rmsnorm_rope(&check, out, input, rope, options) {
            Ok(_) => None,
            Err(FlashInferError::InvalidArgument { argument, .. }) => Some(argument),
            Err(other) => panic!("{other}"),
        }
    }

    const ROPE: [usize; 3] = [20, 22, 22];

    fn input(rows: &[usize], patches: [usize; 3]) -> QkvInput<'static> {
        QkvInput {
            qkv: bf16(&[rows, &[6 * 64]].concat()),
            q_weight: bf16(&[3 * 64]),
            k_weight: bf16(&[2 * 64]),
            patches,
        }
    }

    #[test]
    fn wrong_input_is_refused() {
        let (rope, options) = (Rope3d::new(ROPE), FusedQkOptions::default());
        let fp8 = FusedQkOptions { output_fp8: true, ..options };
        for rows in [&[24][..], &[2, 12]] {
            let good = input(rows, [1, 3, 4]);
            let out = |dtype, heads, d| outputs(dtype, rows, heads, d);
            let heads = [3, 2, 1];
            assert_eq!(refused(&out(DType::BF16, heads, 64), &good, &rope, &options), None);
            assert_eq!(refused(&out(DType::E4M3, heads, 64), &good, &rope, &fp8), None);
            for (out, options, argument) in [
                (out(DType::E4M3, heads, 64), options, "out.q"),
                (out(DType::BF16, heads, 64), fp8, "out.q"),
                (out(DType::F16, heads, 64), options, "out.q"),
                (out(DType::BF16, heads, 128), options, "out.q"),
                (out(DType::BF16, [0, 2, 4], 64), options, "out.q"),
                (out(DType::BF16, [4, 2, 0], 64), options, "out.v"),
                (out(DType::BF16, [3, 2, 2], 64), options, "qkv"),
                (out(DType::BF16, [2, 3, 1], 64), options, "q_weight"),
                (outputs(DType::BF16, &[23], heads, 64), options, "out.q"),
                (outputs(DType::BF16, &[4, 6], heads, 64), options, "out.q"),
            ] {
                assert_eq!(refused(&out, &good, &rope, &options), Some(argument));
            }
            let out = out(DType::BF16, heads, 64);
            let width = 6 * 64;
            for (wrong, argument) in [
                (QkvInput { qkv: at(4096, DType::F16, &[rows, &[width]].concat()), ..good }, "qkv"),
                (QkvInput { qkv: at(4098, DType::BF16, &[rows, &[width]].concat()), ..good }, "qkv"),
                (QkvInput { qkv: bf16(&[width]), ..good }, "qkv"),
                (QkvInput { qkv: bf16(&[1, 2, 12, width]), ..good }, "qkv"),
                (QkvInput { q_weight: bf16(&[64]), ..good }, "q_weight"),
                (QkvInput { q_weight: bf16(&[3, 64]), ..good }, "q_weight"),
                (QkvInput { k_weight: at(4096, DType::F32, &[128]), ..good }, "k_weight"),
                (QkvInput { k_weight: at(4100, DType::BF16, &[128]), ..good }, "k_weight"),
                (QkvInput { patches: [1, 0, 4], ..good }, "patches"),
                (QkvInput { patches: [5, 1, 1], ..good }, "patches"),
                (QkvInput { patches: [1 << 11, 1 << 11, 1 << 11], ..good }, "patches"),
                (QkvInput { patches: [usize::MAX, 1, 1], ..good }, "patches"),
            ] {
                assert_eq!(refused(&out, &wrong, &rope, &options), Some(argument), "{wrong:?}");
            }
        }
        // Whole videos, but of another length than the tensor says.
        let halves = input(&[2, 12], [1, 3, 2]);
        assert_eq!(
            refused(&outputs(DType::BF16, &[2, 12], [3, 2, 1], 64), &halves, &rope, &options),
            Some("patches")
        );
        let strided =
            QkvInput { qkv: bf16(&[24, 512]).narrow(1, 0, 384).unwrap(), ..input(&[24], [1, 3, 4]) };
        assert_eq!(
            refused(&outputs(DType::BF16, &[24], [3, 2, 1], 64), &strided, &rope, &options),
            Some("qkv")
        );
    }

    #[test]
    fn heads_and_tokens_fit_a_launch() {
        let (rope, options) = (Rope3d::new(ROPE), FusedQkOptions::default());
        for (heads, argument) in [
            ([32, 32, 32], None),
            ([33, 1, 1], Some("out.q")),
            ([1, 33, 1], Some("out.k")),
            ([1, 1, 40], Some("out.v")),
        ] {
            let input = QkvInput {
                qkv: bf16(&[6, heads.iter().sum::<usize>() * 64]),
                q_weight: bf16(&[heads[0] * 64]),
                k_weight: bf16(&[heads[1] * 64]),
                patches: [6, 1, 1],
            };
            let out = outputs(DType::BF16, &[6], heads, 64);
            assert_eq!(refused(&out, &input, &rope, &options), argument, "{heads:?}");
        }
        for (tokens, argument) in [((1 << 31) - 1, None), (1 << 31, Some("qkv"))] {
            let out = outputs(DType::BF16, &[tokens], [3, 2, 1], 64);
            assert_eq!(refused(&out, &input(&[tokens], [1; 3]), &rope, &options), argument);
        }
        assert_eq!(
            refused(&outputs(DType::BF16, &[0], [3, 2, 1], 64), &input(&[0], [7, 1, 1]), &rope, &options),
            None
        );
    }

    #[test]
    fn impossible_frequencies_are_refused() {
        let good = Rope3d::new([44, 42, 42]);
        let yarn = Rope3d { factor: 4.0, attention_factor: 1.2, low: 3.0, high: 9.0, ..good };
        assert!(good.check().is_ok() && yarn.check().is_ok());
        for (wrong, argument) in [
            (Rope3d { channels: [43, 43, 42], ..good }, "rope.channels"),
            (Rope3d { channels: [0; 3], ..good }, "rope.channels"),
            (Rope3d { channels: [32, 32, 32], ..good }, "rope.channels"),
            (Rope3d { channels: [usize::MAX - 1, 64, 66], ..good }, "rope.channels"),
            (Rope3d { base: 0.0, ..good }, "rope"),
            (Rope3d { base: f32::NAN, ..good }, "rope"),
            (Rope3d { base: f32::INFINITY, ..good }, "rope"),
            (Rope3d { factor: 0.0, ..yarn }, "rope"),
            (Rope3d { factor: -1.0, ..yarn }, "rope"),
            (Rope3d { low: f32::NAN, ..yarn }, "rope"),
            (Rope3d { high: f32::INFINITY, ..good }, "rope"),
            (Rope3d { attention_factor: f32::NAN, ..yarn }, "rope"),
            (Rope3d { attention_factor: 1.5, ..good }, "rope.attention_factor"),
        ] {
            match RopeTable::new(&stream(), &wrong) {
                Err(FlashInferError::InvalidArgument { argument: found, .. }) => assert_eq!(found, argument),
                other => panic!("{wrong:?}: {other:?}"),
            }
        }
    }
}
