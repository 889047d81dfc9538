//! New keys and values to their pages.

use flashinfer_rs::{Result, Stream, indices::SlotMapping, page::append_paged_kv_cache};

use crate::views::{LayerCache, Rows};

/// Writes the new keys and values of one layer, `[tokens, heads, head_dim]` each.
///
/// # Safety
/// All memory is on the stream's device, as large as shapes and strides say, and stays until the
/// stream is done. The cache is no one else's meanwhile.
pub unsafe fn append(
    stream: &Stream,
    [key, value]: [Rows; 2],
    slots: &SlotMapping<'_>,
    cache: LayerCache,
) -> Result<()> {
    // SAFETY: promised by the caller.
    let (key, value, mut cache) = unsafe { (key.read()?, value.read()?, cache.write()?) };
    append_paged_kv_cache(stream, &key, &value, slots, &mut cache)
}
