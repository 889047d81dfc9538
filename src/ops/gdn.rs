//! Prefill of gated delta networks (GDN), in FlashInfer's module
//! `gdn_prefill_sm90`.
//!
//! A head keeps a state `S`, a matrix of `head_dim` values by `head_dim` keys.
//! A token with query `q`, key `k`, value `v` and gates `alpha`, `beta` does
//!
//! ```text
//! S ← alpha · S                    forget
//! S ← S + beta · (v − S k) kᵀ      move what the state holds for k towards v
//! o = scale · S q                  read
//! ```
//!
//! Tokens are worked off in tiles of 64. The kernel reads queries, keys and
//! values in their 16-bit type, rounds intermediate results to it (the inverse
//! of a tile's key products to `f16`), and keeps states in `f32`.
//!
//! - **Only compute capability 9.0**; [`GdnWorkspace::new`] refuses others.
//! - **Normalize keys** (L2 norm 1, as GDN models do): the kernel does not, and
//!   long keys overflow `f16`. Queries are taken as they are.
//! - **A tile may reach into the next sequence.** What it reads there is
//!   multiplied by zero, so a NaN or an infinity among the first 63 tokens of a
//!   sequence makes NaN of the end of the one before it in the batch, and of its
//!   state. Where sequences are of users who must not disturb each other, let
//!   each have a multiple of 64 tokens, by others behind its last that change
//!   nothing: `k` and `v` of 0 (and any finite `q`), `alpha` of 1, `beta` of 0.
//!   State and output are then those of the sequence alone.
//! - **One GPU for each process.** FlashInfer's launcher prepares a kernel
//!   only on the device that uses it first; on a second one expect the module's
//!   error `run failed`.
//! - Upstream's state checkpoints are not offered: its kernel writes one more
//!   than its documentation counts when a sequence ends inside a tile.
//!
//! Source of the contract: `csrc/gdn_prefill_launcher.cu`,
//! `include/flashinfer/flat/` of FlashInfer 0.6.13.

use std::sync::{Mutex, PoisonError};

use super::{FixedFunction, check::Check, gone::Gone};
use crate::{
    artifacts::FlashInferVersion,
    cuda::DeviceBuffer,
    dtype::DType,
    error::{FlashInferError, Result},
    ffi::{DlTensor, Kernel, Signature, kernels},
    indices::{SequenceIndices, SequenceTable},
    module::ModuleName,
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{TensorMut, TensorRef},
};

kernels! {
    struct GdnPrefill = "gdn_prefill"(
        output: Tensor, output_state: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor,
        input_state: OptTensor, alpha: OptTensor, beta: OptTensor, scale: Float, workspace_buffer: Tensor,
        state_checkpoints: OptTensor, checkpoint_cu_starts: OptTensor, checkpoint_every_n_tokens: Int,
    ) -> "void";
}

impl ModuleName {
    /// Prefill of gated delta networks, for compute capability 9.0.
    pub const GDN_PREFILL_SM90: Self = Self::fixed("gdn_prefill_sm90");
}

pub(super) const SIGNATURES: &[(&str, &[Signature])] = &[("gdn_prefill_sm90", GdnPrefill::SIGNATURES)];

const GONE: Gone = Gone {
    what: "gated delta networks",
    since: FlashInferVersion::new(0, 6, 14),
    instead: "name a wheel of FlashInfer 0.6.13, beside those of later versions; on the CPU, there is \
              reference::gdn_prefill",
};

static GDN_PREFILL: FixedFunction = FixedFunction::of(ModuleName::GDN_PREFILL_SM90, GdnPrefill::SIGNATURES);

const OP: &str = "gdn_prefill";
/// Element types of queries, keys, values and output.
const DTYPES: [DType; 2] = [DType::F16, DType::BF16];
/// The kernel lays states out for this head dimension, whatever the tensors say.
const HEAD_DIM: i64 = 128;
/// Bytes of a tensor map: the kernel keeps one for each multiprocessor.
const TENSOR_MAP_BYTES: usize = 128;
/// The kernel numbers tensor maps by `%smid`, which may exceed the number of
/// multiprocessors that are enabled: a GH100 has 144.
const MIN_TENSOR_MAPS: usize = 144;

/// Held during each launch: the launcher notes in a plain variable whether a
/// kernel was prepared, which two threads must not touch at once.
static LAUNCH: Mutex<()> = Mutex::new(());

/// What [`gdn_prefill`] reads.
#[derive(Clone, Copy, Debug)]
pub struct GdnInput<'a> {
    /// Queries, `[tokens, q_heads, 128]`, `f16` or `bf16`.
    pub q: TensorRef<'a>,
    /// Keys, `[tokens, k_heads, 128]`, of the same dtype. Their L2 norm should be 1.
    pub k: TensorRef<'a>,
    /// Values, `[tokens, v_heads, 128]`, of the same dtype.
    pub v: TensorRef<'a>,
    /// Forget gates, `[tokens, state_heads]`, `f32` in `[0, 1]`, to which the
    /// kernel adds 1e-10; `None` is 1.
    pub alpha: Option<TensorRef<'a>>,
    /// Update gates, `[tokens, state_heads]`, `f32` in `[0, 1]`; `None` is 1.
    pub beta: Option<TensorRef<'a>>,
    /// The states before the first tokens.
    pub state: InitialState<'a>,
}

impl<'a> GdnInput<'a> {
    /// Input without gates, from states of zeros.
    pub fn new(q: TensorRef<'a>, k: TensorRef<'a>, v: TensorRef<'a>) -> Self {
        Self { q, k, v, alpha: None, beta: None, state: InitialState::Zeros }
    }
}

/// The states that sequences start from.
#[derive(Clone, Copy, Debug, Default)]
pub enum InitialState<'a> {
    /// All zero: new sequences.
    #[default]
    Zeros,
    /// A tensor of the shape and dtype of [`GdnOutput::state`].
    From(TensorRef<'a>),
    /// What [`GdnOutput::state`] holds, which is replaced.
    InPlace,
}

/// What [`gdn_prefill`] writes.
#[derive(Debug)]
pub struct GdnOutput<'a> {
    /// `[tokens, state_heads, 128]`, of the dtype of the queries.
    pub output: TensorMut<'a>,
    /// The states after the last tokens, `[sequences, state_heads, 128, 128]`,
    /// `f32`. The last two dimensions are those of values and of keys.
    pub state: TensorMut<'a>,
}

/// Options of [`gdn_prefill`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct GdnOptions {
    /// Factor of the output; `None` is `1 / √head_dim`. Not 0, which the
    /// kernel takes for `None`.
    pub scale: Option<f64>,
}

impl GdnOptions {
    /// The default options with an explicit `scale`.
    pub fn with_scale(scale: f64) -> Self {
        Self { scale: Some(scale) }
    }

    /// The factor for this head dimension.
    pub(crate) fn scale_for(&self, head_dim: i64) -> f64 {
        self.scale.unwrap_or_else(|| 1.0 / (head_dim as f64).sqrt())
    }
}

/// The number of heads that have a state, an output and gates: the larger of
/// `q_heads` and `v_heads`. `None` where the heads do not fit together.
pub(crate) fn state_heads(q: i64, k: i64, v: i64) -> Option<i64> {
    let fits = q > 0 && v > 0 && if q >= v { k == v && q % v == 0 } else { k == q && v % q == 0 };
    fits.then_some(q.max(v))
}

/// The sentence that goes with a refusal of [`state_heads`].
pub(crate) fn heads_problem(q: i64, k: i64, v: i64) -> String {
    format!(
        "{q} query, {k} key and {v} value heads; either query heads are a multiple of value heads, which key \
         heads equal in number, or value heads are a multiple of query heads, which key heads equal in number"
    )
}

/// Scratch memory of [`gdn_prefill`] on one stream: 128 bytes for each
/// multiprocessor of a GPU of compute capability 9.0.
///
/// Calls on one stream share it, because they run one after the other. Another
/// stream needs another workspace. Dropping it frees it in stream order.
pub struct GdnWorkspace {
    tensor_maps: DeviceBuffer,
}

impl GdnWorkspace {
    /// Allocates the memory, in the order of the stream.
    ///
    /// # Errors
    /// [`FlashInferError::Unsupported`]: the stream's GPU is not of compute
    /// capability 9.0. [`FlashInferError::Cuda`]; the runtime cannot be started.
    pub fn new(stream: &Stream) -> Result<Self> {
        stream.check_usable_here("GdnWorkspace")?;
        let runtime = FlashInferRuntime::get()?;
        let (major, minor) = runtime.compute_capability(stream.ordinal())?;
        if (major, minor) != (9, 0) {
            return Err(FlashInferError::Unsupported {
                what: format!("gdn_prefill on {}, of compute capability {major}.{minor}", stream.device()),
                available: "the kernel exists for compute capability 9.0 only (H100, H200, GH200)".into(),
            });
        }
        let cuda = runtime.cuda();
        let maps = MIN_TENSOR_MAPS.max(cuda.multiprocessors(stream.ordinal())?);
        Ok(Self { tensor_maps: DeviceBuffer::new(cuda, stream, maps * TENSOR_MAP_BYTES)? })
    }

    /// The stream that the workspace belongs to.
    pub fn stream(&self) -> &Stream {
        self.tensor_maps.stream()
    }
}

impl std::fmt::Debug for GdnWorkspace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GdnWorkspace({} bytes, {:?})", self.tensor_maps.len(), self.stream())
    }
}

/// Prefill of a batch of sequences with the gated delta rule, on the
/// workspace's stream. See the [module](self) for what is computed.
///
/// `sequences` says which of the tokens belong together; each sequence has a
/// state of its own. Heads share: with `q_heads` a multiple of `v_heads`, each
/// key and value head serves `q_heads / v_heads` neighbouring query heads
/// (grouped queries, `k_heads == v_heads`); with `v_heads` a multiple of
/// `q_heads`, each query and key head serves `v_heads / q_heads` neighbouring
/// value heads (grouped values, `k_heads == q_heads`). `state_heads` is the
/// larger of the two. All tensors are contiguous and, but for the gates,
/// aligned to 16 bytes. No sequences are nothing to do.
///
/// A capture into a CUDA graph bakes in the number of sequences and of tokens:
/// a table that is updated before a replay must keep both. Call once before
/// the first capture, because the first call loads the kernel.
///
/// # Errors
/// [`InvalidArgument`](FlashInferError::InvalidArgument) before anything is
/// launched: a device, stream, dtype, shape, stride or alignment does not fit,
/// the heads do not fit together, `sequences` is for another number of tokens,
/// `scale` is 0, or the states have more than 2³¹ elements. Else what the
/// module or CUDA said.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{
///     Stream, gpu::Tensor, gdn::*, indices::{SequenceIndices, SequenceTable},
/// };
/// use half::bf16;
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// // Two sequences of 100 and 28 tokens; 2 query and key heads, 4 value heads.
/// let qk = Tensor::<bf16>::zeros(&stream, &[128, 2, 128])?;
/// let v = Tensor::from_slice(&stream, &[128, 4, 128], &[bf16::ONE; 128 * 4 * 128])?;
/// let mut output = Tensor::<bf16>::zeros(&stream, &[128, 4, 128])?;
/// let mut state = Tensor::<f32>::zeros(&stream, &[2, 4, 128, 128])?;
/// gdn_prefill(
///     &GdnWorkspace::new(&stream)?,
///     &mut GdnOutput { output: output.view_mut(), state: state.view_mut() },
///     &GdnInput::new(qk.view(), qk.view(), v.view()),
///     &SequenceTable::new(&stream, SequenceIndices::from_lens([100, 28])?)?,
///     &GdnOptions::default(),
/// )?;
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
pub fn gdn_prefill(
    workspace: &GdnWorkspace,
    out: &mut GdnOutput<'_>,
    input: &GdnInput<'_>,
    sequences: &SequenceTable,
    options: &GdnOptions,
) -> Result<()> {
    let stream = workspace.stream();
    let check = Check::new(OP, stream)?;
    check.on_stream("sequences", sequences.stream())?;
    check_gdn_prefill(&check, out, input, sequences.host(), options)?;
    if sequences.host().batch_size() == 0 {
        return Ok(());
    }
    let (output, output_state) = (&out.output.raw, &out.state.raw);
    let input_state = match &input.state {
        InitialState::Zeros => None,
        InitialState::From(state) => Some(&state.raw),
        InitialState::InPlace => Some(output_state),
    };
    let cu_seqlens = sequences.cu_seqlens()?;
    let scratch = workspace.tensor_maps.as_bytes()?;
    let kernel = GdnPrefill {
        output: DlTensor::new(output),
        output_state: DlTensor::new(output_state),
        q: (&input.q).into(),
        k: (&input.k).into(),
        v: (&input.v).into(),
        cu_seqlens: DlTensor::new(&cu_seqlens),
        input_state: input_state.map(DlTensor::new),
        alpha: input.alpha.as_ref().map(DlTensor::from),
        beta: input.beta.as_ref().map(DlTensor::from),
        scale: options.scale_for(HEAD_DIM),
        workspace_buffer: DlTensor::new(&scratch),
        state_checkpoints: None,
        checkpoint_cu_starts: None,
        checkpoint_every_n_tokens: 0,
    };
    let runtime = FlashInferRuntime::get()?;
    let function = GDN_PREFILL.get(runtime).map_err(|error| GONE.explain(runtime, error))?;
    // The launcher asks the current device for its properties and launches there.
    let _device = runtime.cuda().on_device_of(stream)?;
    let _launch = LAUNCH.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: tensors were checked for all that the kernel assumes: device,
    // dtype, shape, contiguity, alignment, 32-bit state offsets. `cu_seqlens`
    // is the device copy of checked values: no sequence is empty, and they end
    // with the tensors. A state is read and written by one block only, so it
    // may be replaced in place. The workspace has a tensor map for each
    // multiprocessor, its GPU has the right compute capability (checked when
    // it was made), and only this stream uses it.
    unsafe { kernel.call(function, stream) }.map(drop)
}

/// All that the kernel assumes of tensors, sequences and options.
pub(crate) fn check_gdn_prefill(
    check: &Check<'_>,
    out: &GdnOutput<'_>,
    input: &GdnInput<'_>,
    sequences: &SequenceIndices,
    options: &GdnOptions,
) -> Result<()> {
    let (q, k, v) = (&input.q.raw, &input.k.raw, &input.v.raw);
    check.tensor("q", q, &DTYPES, &[3])?;
    let (dtype, tokens, q_heads) = ([q.dtype], q.shape()[0], q.shape()[1]);
    for (name, qkv) in [("k", k), ("v", v)] {
        check.tensor(name, qkv, &dtype, &[3])?;
    }
    if q.shape()[2] != HEAD_DIM {
        return check.fail("q", format!("head_dim {}; the kernel has {HEAD_DIM} only", q.shape()[2]));
    }
    let (k_heads, v_heads) = (k.shape()[1], v.shape()[1]);
    let Some(heads) = state_heads(q_heads, k_heads, v_heads) else {
        return check.fail("k", heads_problem(q_heads, k_heads, v_heads));
    };
    check.plain("q", q, &dtype, &[tokens, q_heads, HEAD_DIM], 16)?;
    check.plain("k", k, &dtype, &[tokens, k_heads, HEAD_DIM], 16)?;
    check.plain("v", v, &dtype, &[tokens, v_heads, HEAD_DIM], 16)?;
    if sequences.num_tokens() as i64 != tokens {
        return check.fail(
            "sequences",
            format!("it has {} tokens, the tensors have {tokens}", sequences.num_tokens()),
        );
    }
    let state = [sequences.batch_size() as i64, heads, HEAD_DIM, HEAD_DIM];
    check.plain("output", &out.output.raw, &dtype, &[tokens, heads, HEAD_DIM], 16)?;
    check.plain("output_state", &out.state.raw, &[DType::F32], &state, 16)?;
    if out.state.raw.numel() > 1 << 31 {
        return check.fail(
            "output_state",
            format!("its shape is {state:?}; the kernel addresses at most 2^31 elements; split the batch"),
        );
    }
    if let InitialState::From(from) = &input.state {
        check.plain("input_state", &from.raw, &[DType::F32], &state, 16)?;
    }
    for (name, gate) in [("alpha", &input.alpha), ("beta", &input.beta)] {
        if let Some(gate) = gate {
            check.plain(name, &gate.raw, &[DType::F32], &[tokens, heads], 4)?;
        }
    }
    if options.scale == Some(0.0) {
        return check.fail("scale", "0, which the kernel takes for its default; use None for that".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;

    use super::*;
    use crate::device::Device;

    const GPU: Device = Device::Cuda(0);

    fn view(address: usize, device: Device, dtype: DType, shape: &[usize]) -> TensorRef<'static> {
        // SAFETY: the address is compared, never followed.
        unsafe { TensorRef::from_raw_parts(address as *const c_void, device, dtype, shape, None) }.unwrap()
    }

    fn view_mut(address: usize, dtype: DType, shape: &[usize]) -> TensorMut<'static> {
        // SAFETY: as in `view`.
        unsafe { TensorMut::from_raw_parts(address as *mut c_void, GPU, dtype, shape, None) }.unwrap()
    }

    fn half(shape: &[usize]) -> TensorRef<'static> {
        view(4096, GPU, DType::F16, shape)
    }

    fn float(shape: &[usize]) -> TensorRef<'static> {
        view(4096, GPU, DType::F32, shape)
    }

    /// The argument that is refused, if any.
    fn refused(
        out: GdnOutput<'_>,
        input: GdnInput<'_>,
        lens: &[usize],
        options: GdnOptions,
    ) -> Option<&'static str> {
        // SAFETY: nothing is enqueued on the stream.
        let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
        let sequences = SequenceIndices::from_lens(lens.iter().copied()).unwrap();
        match check_gdn_prefill(&Check::new(OP, &stream).unwrap(), &out, &input, &sequences, &options) {
            Ok(()) => None,
            Err(FlashInferError::InvalidArgument { argument, .. }) => Some(argument),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn heads_fit_together() {
        for (q, k, v) in [(4, 1, 1), (6, 2, 2), (8, 8, 8), (1, 1, 2), (16, 16, 32)] {
            assert_eq!(state_heads(q, k, v), Some(q.max(v)), "{q} {k} {v}");
        }
        for (q, k, v) in
            [(0, 0, 0), (4, 0, 0), (0, 0, 4), (5, 2, 2), (4, 4, 2), (4, 2, 1), (2, 4, 4), (2, 2, 5)]
        {
            assert_eq!(state_heads(q, k, v), None, "{q} {k} {v}");
        }
    }

    #[test]
    fn the_largest_state_is_addressed_in_32_bits() {
        // 2³¹ elements are 131072 states of 128 × 128.
        let check = |sequences: usize| {
            refused(
                GdnOutput {
                    output: view_mut(4096, DType::F16, &[sequences, 32, 128]),
                    state: view_mut(4096, DType::F32, &[sequences, 32, 128, 128]),
                },
                GdnInput::new(
                    half(&[sequences, 16, 128]),
                    half(&[sequences, 16, 128]),
                    half(&[sequences, 32, 128]),
                ),
                &vec![1; sequences],
                GdnOptions::default(),
            )
        };
        assert_eq!(check(4096), None);
        assert_eq!(check(4097), Some("output_state"));
    }

    #[test]
    fn wrong_input_is_refused() {
        let lens = [3, 2];
        let output = || GdnOutput {
            output: view_mut(4096, DType::F16, &[5, 4, 128]),
            state: view_mut(4096, DType::F32, &[2, 4, 128, 128]),
        };
        let (q, v) = (half(&[5, 2, 128]), half(&[5, 4, 128]));
        let good = GdnInput {
            alpha: Some(float(&[5, 4])),
            beta: Some(float(&[5, 4])),
            state: InitialState::From(float(&[2, 4, 128, 128])),
            ..GdnInput::new(q, q, v)
        };
        let options = GdnOptions::default();
        assert_eq!(refused(output(), good, &lens, options), None);
        assert_eq!(refused(output(), good, &lens, GdnOptions::with_scale(0.5)), None);
        assert_eq!(refused(output(), good, &lens, GdnOptions::with_scale(0.0)), Some("scale"));
        for lens in [&[3, 1][..], &[6], &[]] {
            assert_eq!(refused(output(), good, lens, options), Some("sequences"));
        }
        assert_eq!(refused(output(), good, &[5], options), Some("output_state"));

        // Head dimensions other than 128, which the kernel's own check lets through.
        for d in [8, 64, 256] {
            let (q, v) = (half(&[5, 2, d]), half(&[5, 4, d]));
            let out = GdnOutput {
                output: view_mut(4096, DType::F16, &[5, 4, d]),
                state: view_mut(4096, DType::F32, &[2, 4, d, d]),
            };
            assert_eq!(refused(out, GdnInput::new(q, q, v), &lens, options), Some("q"), "{d}");
        }
        for (q, k, v, argument) in [
            (view(4096, GPU, DType::F32, &[5, 2, 128]), q, v, "q"),
            (view(4096, GPU, DType::E4M3, &[5, 2, 128]), q, v, "q"),
            (view(4096, Device::Cuda(1), DType::F16, &[5, 2, 128]), q, v, "q"),
            (view(4096, Device::Cpu, DType::F16, &[5, 2, 128]), q, v, "q"),
            (view(4104, GPU, DType::F16, &[5, 2, 128]), q, v, "q"),
            (half(&[5, 256]), q, v, "q"),
            (half(&[5, 4, 128]).narrow(1, 0, 2).unwrap(), q, v, "q"),
            (q, view(4096, GPU, DType::BF16, &[5, 2, 128]), v, "k"),
            (q, half(&[6, 2, 128]), v, "k"),
            (q, half(&[5, 2, 64]), v, "k"),
            (q, half(&[5, 3, 128]), v, "k"),
            (q, half(&[5, 4, 128]).narrow(1, 2, 2).unwrap(), v, "k"),
            (q, q, view(4096, GPU, DType::BF16, &[5, 4, 128]), "v"),
            (q, q, half(&[4, 4, 128]), "v"),
            (q, q, half(&[5, 3, 128]), "k"),
            (q, q, half(&[5, 0, 128]), "k"),
        ] {
            assert_eq!(refused(output(), GdnInput { q, k, v, ..good }, &lens, options), Some(argument));
        }
        let strided = float(&[5, 8]).narrow(1, 0, 4).unwrap();
        for gate in [half(&[5, 4]), float(&[5, 2]), float(&[4, 4]), float(&[20]), strided] {
            let alpha = GdnInput { alpha: Some(gate), ..good };
            assert_eq!(refused(output(), alpha, &lens, options), Some("alpha"));
            let beta = GdnInput { beta: Some(gate), ..good };
            assert_eq!(refused(output(), beta, &lens, options), Some("beta"));
        }
        let strided = float(&[2, 5, 128, 128]).narrow(1, 0, 4).unwrap();
        for state in [half(&[2, 4, 128, 128]), float(&[2, 2, 128, 128]), float(&[1, 4, 128, 128]), strided] {
            let input = GdnInput { state: InitialState::From(state), ..good };
            assert_eq!(refused(output(), input, &lens, options), Some("input_state"));
        }
        for (dtype, shape) in [(DType::F16, [2, 4, 128, 128]), (DType::F32, [2, 2, 128, 128])] {
            let out = GdnOutput { state: view_mut(4096, dtype, &shape), ..output() };
            assert_eq!(refused(out, good, &lens, options), Some("output_state"));
        }
        for (address, dtype, shape) in [
            (4096, DType::BF16, [5, 4, 128]),
            (4096, DType::F16, [5, 2, 128]),
            (4100, DType::F16, [5, 4, 128]),
        ] {
            let out = GdnOutput { output: view_mut(address, dtype, &shape), ..output() };
            assert_eq!(refused(out, good, &lens, options), Some("output"));
        }
    }

    #[test]
    fn no_sequences_are_accepted() {
        let out = GdnOutput {
            output: view_mut(4096, DType::F16, &[0, 4, 128]),
            state: view_mut(4096, DType::F32, &[0, 4, 128, 128]),
        };
        let input = GdnInput::new(half(&[0, 2, 128]), half(&[0, 2, 128]), half(&[0, 4, 128]));
        assert_eq!(refused(out, input, &[], GdnOptions::default()), None);
    }
}
