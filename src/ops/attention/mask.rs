//! Which keys each query sees.

use super::spec::AttentionSpec;
use crate::{
    dtype::DType,
    error::{FlashInferError, Result},
    indices::{ItemTable, MaskTable, RaggedIndices, check_shapes},
    ops::check::Check,
    tensor::{RawTensor, TensorRef},
};

/// Which keys of its request a query sees, besides what a sliding window hides.
///
/// The last query of a request is at the position of its last key.
#[derive(Clone, Copy, Debug, Default)]
pub enum Mask<'p> {
    /// All keys.
    #[default]
    None,
    /// Those up to its position: query `r` of a request with `q` queries and
    /// `k` keys sees the first `k − q + r + 1` keys. The one query of a request in
    /// decode sees all, as with no mask.
    Causal,
    /// Those whose bit is set in a packed mask; see
    /// [`MaskIndices`](crate::indices::MaskIndices). A query that sees no key gets
    /// zeros, and −∞. FlashAttention 2 only. Values of hidden keys are multiplied by 0,
    /// so they must be finite.
    Custom {
        /// Where each request's part lies.
        indices: &'p MaskTable,
        /// The bits: a contiguous `u8` tensor of one dimension, with at least
        /// [`num_bytes`](crate::indices::MaskIndices::num_bytes) elements.
        bits: TensorRef<'p>,
    },
    /// The prefix, and the tokens of its own item up to its position, for
    /// multi-item scoring; see [`ItemIndices`](crate::indices::ItemIndices). Over paged
    /// keys, without a sliding window; with FlashAttention 2 over at most 65535
    /// keys of a request.
    MultiItem(&'p ItemTable),
}

/// Which mask it is, wherever its arrays are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MaskKind {
    None,
    Causal,
    Custom,
    MultiItem,
}

/// The largest number of a `u16`, which stands for "skip nothing".
const FA2_MAX_ITEM_KEYS: usize = u16::MAX as usize;

/// What a run passes of a mask.
#[derive(Debug)]
pub(super) struct MaskTensors {
    pub(super) mode: i64,
    /// Bits, and where each request's begin.
    pub(super) custom: Option<[RawTensor; 2]>,
    /// Lengths of prefixes, places in items, and the longest items.
    pub(super) items: Option<[RawTensor; 3]>,
    pub(super) token_pos_in_items_len: i64,
}

impl MaskTensors {
    /// No mask.
    pub(super) const NONE: Self = Self { mode: 0, custom: None, items: None, token_pos_in_items_len: 0 };

    /// The array of items at a place, as the kernels take it.
    pub(super) fn item_array(&self, index: usize) -> Option<&RawTensor> {
        self.items.as_ref().map(|arrays| &arrays[index])
    }

    /// The addresses that a run passes.
    pub(super) fn addresses(&self) -> impl Iterator<Item = usize> {
        let arrays = self.custom.iter().flatten().chain(self.items.iter().flatten());
        arrays.map(|array| array.data as usize)
    }
}

/// Queries and keys of each request of a batch.
pub(super) fn requests_of(
    queries: &RaggedIndices,
    kv_lens: &[i32],
) -> impl ExactSizeIterator<Item = (usize, usize)> + Clone {
    kv_lens.iter().enumerate().map(|(request, &keys)| (queries.len(request), keys as usize))
}

/// With a causal mask, no request with keys has more queries than keys: the
/// kernels subtract one from the other without a sign, or count wrongly.
pub(super) fn check_causal(
    check: &Check<'_>,
    requests: impl IntoIterator<Item = (usize, usize)>,
) -> Result<()> {
    for (request, (queries, keys)) in requests.into_iter().enumerate() {
        if keys > 0 && queries > keys {
            return check.fail(
                "queries",
                format!(
                    "request {request} has {queries} queries over {keys} keys; with a causal mask \
                     the keys of the queries must already be there (or use another mask)"
                ),
            );
        }
    }
    Ok(())
}

impl MaskKind {
    /// Whether no query sees a key after its position.
    fn is_causal(self) -> bool {
        matches!(self, Self::Causal | Self::MultiItem)
    }

    /// Refuses masks without a kernel, and those that do not fit the queries and keys of the
    /// requests.
    pub(crate) fn check(
        self,
        check: &Check<'_>,
        spec: &AttentionSpec,
        fa3: bool,
        requests: impl IntoIterator<Item = (usize, usize)> + Clone,
        paged: bool,
    ) -> Result<()> {
        let unsupported = |what: &str, available: &str| {
            Err(FlashInferError::Unsupported { what: what.into(), available: available.into() })
        };
        if self.is_causal() {
            check_causal(check, requests.clone())?;
        }
        match self {
            Self::None | Self::Causal => Ok(()),
            _ if spec.attention_sink => unsupported(
                "custom and multi-item masks with attention sinks",
                "there are Mask::None and Mask::Causal",
            ),
            Self::Custom if fa3 => {
                unsupported("custom masks with FlashAttention 3", "use a spec with Backend::Fa2")
            }
            Self::Custom => Ok(()),
            Self::MultiItem if !paged => unsupported(
                "multi-item scoring over keys that are not paged",
                "it reads paged keys; see BatchPrefill::plan_paged",
            ),
            Self::MultiItem if spec.window_left.is_some() => {
                unsupported("multi-item scoring with a sliding window", "use a spec without a window")
            }
            Self::MultiItem
                if !fa3 && requests.clone().into_iter().any(|(_, keys)| keys > FA2_MAX_ITEM_KEYS) =>
            {
                unsupported(
                    "multi-item scoring over more than 65535 keys with FlashAttention 2",
                    "use Backend::Fa3 on compute capability 9.0, or split the items among requests",
                )
            }
            Self::MultiItem => Ok(()),
        }
    }
}

impl Mask<'_> {
    fn kind(&self) -> MaskKind {
        match self {
            Self::None => MaskKind::None,
            Self::Causal => MaskKind::Causal,
            Self::Custom { .. } => MaskKind::Custom,
            Self::MultiItem(_) => MaskKind::MultiItem,
        }
    }

    /// Whether no query sees a key after its position.
    pub(super) fn is_causal(&self) -> bool {
        self.kind().is_causal()
    }

    /// Whether bits on the device decide what is seen.
    pub(super) fn is_custom(&self) -> bool {
        matches!(self, Self::Custom { .. })
    }

    /// Checks the mask against the queries and keys of the requests that it is
    /// for.
    pub(super) fn check(
        &self,
        check: &Check<'_>,
        spec: &AttentionSpec,
        fa3: bool,
        requests: impl ExactSizeIterator<Item = (usize, usize)> + Clone,
        paged: bool,
    ) -> Result<()> {
        self.kind().check(check, spec, fa3, requests.clone(), paged)?;
        match self {
            Self::None | Self::Causal => Ok(()),
            Self::Custom { indices, bits } => {
                check.on_stream("mask", indices.stream())?;
                if let Err(problem) = check_shapes(indices.host().shapes(), requests) {
                    return check.fail("mask", problem);
                }
                check.tensor("mask", &bits.raw, &[DType::U8], &[1])?;
                check.contiguous("mask", &bits.raw)?;
                let (has, needed) = (bits.raw.numel(), indices.host().num_bytes());
                if has < needed as i64 {
                    return check.fail("mask", format!("it has {has} bytes; the batch needs {needed}"));
                }
                Ok(())
            }
            Self::MultiItem(items) => {
                check.on_stream("items", items.stream())?;
                let host = items.host();
                let (items, batch) = (host.batch_size(), requests.len());
                if items != batch {
                    return check
                        .fail("items", format!("they are of {items} requests, the batch has {batch}"));
                }
                let beyond = requests.enumerate().find(|&(request, (_, keys))| keys > host.seq_len(request));
                match beyond {
                    None => Ok(()),
                    Some((request, (_, keys))) => check.fail(
                        "items",
                        format!(
                            "request {request} has {keys} keys, but its prefix and items are {} tokens",
                            host.seq_len(request)
                        ),
                    ),
                }
            }
        }
    }

    /// What a run passes. The mask was checked.
    ///
    /// Where FlashAttention 2 skips keys that lie before all items it works on,
    /// it then also loads the unused slots behind the last key. Their weight is
    /// zero, but if they hold NaN, so does the output. It skips nothing when
    /// items may be as long as the request.
    pub(super) fn tensors(&self, fa3: bool) -> Result<MaskTensors> {
        Ok(match self {
            Self::None => MaskTensors::NONE,
            Self::Causal => MaskTensors { mode: 1, ..MaskTensors::NONE },
            Self::Custom { indices, bits } => {
                MaskTensors { mode: 2, custom: Some([bits.raw, indices.mask_indptr()?]), ..MaskTensors::NONE }
            }
            Self::MultiItem(items) => MaskTensors {
                mode: 3,
                items: Some([items.prefix_len()?, items.token_pos_in_items()?, items.max_item_len(fa3)?]),
                token_pos_in_items_len: items.host().token_pos_in_items_len() as i64,
                ..MaskTensors::NONE
            },
        })
    }
}
