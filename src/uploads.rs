//! Uploads on a stream beside the one that computes.
//!
//! What a step reads is uploaded in the order of its stream: the step before it ends, then the
//! copies are made, then the step begins, and the GPU idles meanwhile. With two sets of tables and
//! workspaces, of which steps take one in turn, the copies for a step can be made while the one
//! before is computed.

use crate::{cuda, stream::Stream};

/// Has this thread upload index arrays, and plans, on `beside` instead of the streams that they are
/// for, while `work` runs: updates of tables, and calls of planners. Memory that grows
/// waits for the device.
///
/// # Safety
/// What is replaced on the device is not in use: `beside` waits for all work that reads
/// it. What reads the new arrays and plans waits for `beside`. In `work`, nothing else is enqueued
/// that reads or writes what is uploaded; pages that are to be copied
/// ([`PagedKvCache::copy_pages`](crate::kv::PagedKvCache::copy_pages)) were copied before.
pub unsafe fn upload_beside<R>(beside: &Stream, work: impl FnOnce() -> R) -> R {
    cuda::upload_beside(beside, work)
}
