//! Accepting or replacing a chain of drafted tokens.

use super::{DTYPES, draw::pick, philox::PhiloxSequence};
use crate::{
    error::Result,
    indices::BoundedIndices,
    reference::host::HostCheck,
    sampling::{Philox, check_chain},
    tensor::TensorRef,
};

/// What [`chain_speculative_sampling`] draws, as
/// [`sampling::ChainSamples`](crate::sampling::ChainSamples) has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainDraws {
    /// `drafts + 1` for each request.
    pub output_token_ids: Vec<i32>,
    /// One for each request.
    pub output_accepted_token_num: Vec<i32>,
    /// One for each request.
    pub output_emitted_draft_token_num: Vec<i32>,
}

/// [`sampling::chain_speculative_sampling`](crate::sampling::chain_speculative_sampling)
/// on the CPU: `draft_probs` is `[batch, drafts, vocab]`, `target_probs`
/// `[batch, drafts + 1, vocab]`, and `draft_token_ids` holds `batch * drafts`
/// numbers below `vocab`.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device,
/// dtype or shape does not fit.
pub fn chain_speculative_sampling(
    draft_probs: &TensorRef<'_>,
    draft_token_ids: &BoundedIndices,
    target_probs: &TensorRef<'_>,
    random: Philox,
) -> Result<ChainDraws> {
    let check = HostCheck { op: "reference::chain_speculative_sampling" };
    check.as_kernel(|check| check_chain(check, &draft_probs.raw, &target_probs.raw))?;
    let draft = check.rows("draft_probs", draft_probs, &DTYPES, &[3])?;
    let target = check.rows("target_probs", target_probs, &DTYPES, &[3])?;
    let (batch, drafts, vocab) = (draft.shape()[0], draft.shape()[1], draft.shape()[2]);
    check.shape("target_probs", &target, &[batch, drafts + 1, vocab])?;
    let (batch, drafts, vocab) = (batch as usize, drafts as usize, vocab as usize);
    let ids = draft_token_ids.values();
    if draft_token_ids.bound() > vocab || ids.len() != batch * drafts {
        let problem = format!(
            "{} numbers below {}; expected {} below {vocab}",
            ids.len(),
            draft_token_ids.bound(),
            batch * drafts
        );
        return check.fail("draft_token_ids", problem);
    }
    let mut draws = ChainDraws {
        output_token_ids: vec![-1; batch * (drafts + 1)],
        output_accepted_token_num: vec![0; batch],
        output_emitted_draft_token_num: vec![0; batch],
    };
    let (mut p, mut q) = (vec![0.0; vocab], vec![0.0; vocab]);
    for request in 0..batch {
        let mut numbers = PhiloxSequence::new(random, request as u64);
        let mut accepts = |place: usize, p: &mut [f64], q: &mut [f64]| {
            draft.read(request * drafts + place, p);
            target.read(request * (drafts + 1) + place, q);
            let id = ids[request * drafts + place] as usize;
            numbers.uniform() * p[id] < q[id]
        };
        let output = &mut draws.output_token_ids[request * (drafts + 1)..][..drafts + 1];
        let mut emitted = 0;
        while emitted < drafts && accepts(emitted, &mut p, &mut q) {
            output[emitted] = ids[request * drafts + emitted];
            emitted += 1;
        }
        let more = (emitted..drafts).filter(|&place| accepts(place, &mut p, &mut q)).count();
        target.read(request * (drafts + 1) + emitted, &mut q);
        if emitted < drafts {
            draft.read(request * drafts + emitted, &mut p);
            q.iter_mut().zip(&p).for_each(|(q, p)| *q = (*q - p).max(0.0));
        }
        output[emitted] = pick(&q, numbers.uniform() * q.iter().sum::<f64>()).unwrap_or(-1);
        draws.output_accepted_token_num[request] = (emitted + more) as i32;
        draws.output_emitted_draft_token_num[request] = emitted as i32;
    }
    Ok(draws)
}
