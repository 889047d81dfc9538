//! Accepting or replacing a chain of drafted tokens.

use std::ffi::c_void;

use super::{Indices, SamplingOptions, check_rows, function};
use crate::{
    cuda::PtxKernel,
    dtype::DType,
    error::Result,
    ffi::{DlTensor, Kernel, kernels},
    ops::{FixedFunction, check::Check},
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
    pub(super) struct Chain = "chain_speculative_sampling"(
        draft_probs: Tensor, draft_token_ids: Tensor, target_probs: Tensor, output_token_ids: Tensor,
        output_accepted_token_num: Tensor, output_emitted_draft_token_num: Tensor,
        deterministic: Bool, maybe_seed_arr: OptTensor, seed: Int, maybe_offset_arr: OptTensor, offset: Int,
    ) -> "void";
}

static CHAIN: FixedFunction = function(Chain::SIGNATURES);

/// Makes a token that the kernel did not draw −1.
static CHECK_LAST_TOKENS: PtxKernel =
    PtxKernel::new(concat!(include_str!("chain.ptx"), "\0"), c"check_last_tokens");
const THREADS: u32 = 128;

/// What [`chain_speculative_sampling`] reads.
#[derive(Clone, Copy, Debug)]
pub struct ChainInput<'a> {
    /// The draft model's probabilities, `[batch, drafts, vocab]`, `f32`.
    pub draft_probs: TensorRef<'a>,
    /// The tokens drawn from them, `[batch, drafts]`, `i32`.
    pub draft_token_ids: Indices<'a>,
    /// The target model's probabilities, `[batch, drafts + 1, vocab]`, `f32`:
    /// at the same places, and behind the last draft.
    pub target_probs: TensorRef<'a>,
}

impl<'a> ChainInput<'a> {
    /// A chain. It is checked where it is used.
    pub fn new(
        draft_probs: TensorRef<'a>,
        draft_token_ids: impl Into<Indices<'a>>,
        target_probs: TensorRef<'a>,
    ) -> Self {
        Self { draft_probs, draft_token_ids: draft_token_ids.into(), target_probs }
    }
}

/// What [`chain_speculative_sampling`] writes. All are `i32` and contiguous.
#[derive(Debug)]
pub struct ChainSamples<'a> {
    /// `[batch, drafts + 1]`: the drafts up to the first that is refused, a
    /// token of the target, and -1.
    pub output_token_ids: TensorMut<'a>,
    /// `[batch]`: how many drafts were accepted, counting those behind the
    /// first refused one (which is asked again) too, is **added** to it. For
    /// statistics only.
    pub output_accepted_token_num: TensorMut<'a>,
    /// `[batch]`: how many drafts are among the tokens is **added** to it.
    pub output_emitted_draft_token_num: TensorMut<'a>,
}

impl<'a> ChainSamples<'a> {
    /// Outputs. They are checked where they are used.
    pub fn new(
        output_token_ids: TensorMut<'a>,
        output_accepted_token_num: TensorMut<'a>,
        output_emitted_draft_token_num: TensorMut<'a>,
    ) -> Self {
        Self { output_token_ids, output_accepted_token_num, output_emitted_draft_token_num }
    }
}

/// Speculative sampling: accepts each drafted token with probability
/// `min(1, target / draft)`, up to the first that is refused, and draws one
/// more token, in place of that one from what the target has more than the
/// draft, or behind the last from the target. The tokens are distributed as if
/// drawn from the target.
///
/// Where the target has nowhere more than the draft, as when it is NaN, there is
/// no such token, and **−1** in its place; the last draft may be lost with it. With
/// `draft_token_ids` made on the device, see
/// [`Indices::from_device_unchecked`]. Advances by
/// [`Draws::Chain`](super::Draws::Chain);
/// [`indices`](SamplingOptions::indices) are not taken. An empty batch is
/// nothing to do.
///
/// Call once before the first capture into a CUDA graph, because the first call
/// loads the kernels.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) before
/// anything is launched: a device, stream, dtype, shape, stride or alignment
/// does not fit, drafts are not known to be below `vocab`, there are no
/// drafts, 2³² elements, or the stream is being captured and a kernel is not
/// compiled yet. Else what the module or CUDA said.
pub fn chain_speculative_sampling(
    stream: &Stream,
    samples: &mut ChainSamples<'_>,
    input: &ChainInput<'_>,
    options: &SamplingOptions<'_>,
) -> Result<()> {
    let check = Check::new("chain_speculative_sampling", stream)?;
    let [batch, drafts, vocab] = check_chain(&check, &input.draft_probs.raw, &input.target_probs.raw)?;
    let ids = &input.draft_token_ids;
    let draft_token_ids = ids.check(&check, "draft_token_ids", DType::I32, &[batch, drafts], vocab)?;
    let outputs = [
        ("output_token_ids", &samples.output_token_ids.raw, &[batch, drafts + 1][..]),
        ("output_accepted_token_num", &samples.output_accepted_token_num.raw, &[batch]),
        ("output_emitted_draft_token_num", &samples.output_emitted_draft_token_num.raw, &[batch]),
    ];
    for (name, tensor, shape) in outputs {
        check.plain(name, tensor, &[DType::I32], shape, 4)?;
    }
    let random = options.random.check(&check)?;
    if options.indices.is_some() {
        return check.fail("indices", "each request has its own chain; leave them out".into());
    }
    if batch == 0 {
        return Ok(());
    }
    check.compiled("output_token_ids", &CHECK_LAST_TOKENS)?;
    let kernel = Chain {
        draft_probs: (&input.draft_probs).into(),
        draft_token_ids: DlTensor::new(&draft_token_ids),
        target_probs: (&input.target_probs).into(),
        output_token_ids: (&samples.output_token_ids).into(),
        output_accepted_token_num: (&samples.output_accepted_token_num).into(),
        output_emitted_draft_token_num: (&samples.output_emitted_draft_token_num).into(),
        deterministic: options.deterministic,
        maybe_seed_arr: random.seed_arr.as_ref().map(DlTensor::new),
        seed: random.seed,
        maybe_offset_arr: random.offset_arr.as_ref().map(DlTensor::new),
        offset: random.offset,
    };
    let runtime = FlashInferRuntime::get()?;
    // SAFETY: tensors were checked for all that the kernel assumes: device,
    // dtype, shape, contiguity, vector alignment, 32-bit offsets. Drafts are
    // below the vocabulary; no other number decides an address.
    unsafe { kernel.call(CHAIN.get(runtime)?, stream) }?;
    let tensors = [&samples.output_token_ids.raw, &input.draft_probs.raw, &input.target_probs.raw].map(Some);
    let (mut tokens, mut draft) = (samples.output_token_ids.raw.data, input.draft_probs.raw.data);
    let mut target = input.target_probs.raw.data;
    let [mut batch, mut drafts, mut vocab] = [batch, drafts, vocab].map(|size| size as u32);
    let mut args: [*mut c_void; 6] = [
        (&raw mut tokens).cast(),
        (&raw mut draft).cast(),
        (&raw mut target).cast(),
        (&raw mut batch).cast(),
        (&raw mut drafts).cast(),
        (&raw mut vocab).cast(),
    ];
    // SAFETY: the kernel takes three addresses and three 32-bit numbers, the
    // sizes of these tensors. It looks up tokens that are below `vocab` only.
    unsafe {
        CHECK_LAST_TOKENS.launch(
            runtime.cuda(),
            stream,
            [batch.div_ceil(THREADS), THREADS],
            &mut args,
            &tensors,
        )
    }
}

/// What the kernel assumes of probabilities. Returns the shape of the draft's.
pub(crate) fn check_chain(
    check: &Check<'_>,
    draft_probs: &RawTensor,
    target_probs: &RawTensor,
) -> Result<[i64; 3]> {
    let vocab = check_rows(check, "draft_probs", draft_probs, &[DType::F32], 3)?;
    let (batch, drafts) = (draft_probs.shape()[0], draft_probs.shape()[1]);
    if drafts == 0 {
        return check.fail("draft_probs", "there is no draft; draw with sampling_from_probs".into());
    }
    check_rows(check, "target_probs", target_probs, &[DType::F32], 3)?;
    check.shape("target_probs", target_probs, &[batch, drafts + 1, vocab])?;
    Ok([batch, drafts, vocab])
}
