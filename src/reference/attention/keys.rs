//! Keys and values of a batch, by how they lie.

use super::super::{
    host::{HostCheck, Rows},
    page::{HostCacheShape, place},
};
use crate::{
    attention::AttentionSpec,
    error::Result,
    indices::{PageIndices, RaggedIndices},
    kv::PagedKv,
    tensor::TensorRef,
};

/// Keys and values of a batch.
pub(super) struct Keys<'a> {
    pub(super) k: Rows<'a>,
    pub(super) v: Rows<'a>,
    pub(super) heads: usize,
    places: Places<'a>,
}

/// Where the keys of each request lie.
enum Places<'a> {
    Paged(HostCacheShape, &'a PageIndices),
    Ragged(&'a RaggedIndices),
}

impl<'a> Keys<'a> {
    pub(super) fn paged(
        check: HostCheck,
        spec: &AttentionSpec,
        kv: &'a PagedKv<'_>,
        table: &'a PageIndices,
    ) -> Result<Self> {
        let k = check.rows("kv.k", &kv.k, &[spec.dtype_kv], &[4])?;
        let v = check.rows("kv.v", &kv.v, &[spec.dtype_kv], &[4])?;
        let mut v_shape = k.shape().to_vec();
        v_shape[3] += spec.head_dim_vo as i64 - spec.head_dim_qk as i64;
        check.shape("kv.v", &v, &v_shape)?;
        let shape = HostCacheShape::new(check, &k, kv.layout, table)?;
        if k.width() != spec.head_dim_qk {
            return check
                .fail("kv.k", format!("its head_dim is {}; the spec's is {}", k.width(), spec.head_dim_qk));
        }
        Ok(Self { k, v, heads: shape.heads, places: Places::Paged(shape, table) })
    }

    pub(super) fn ragged(
        check: HostCheck,
        spec: &AttentionSpec,
        [k, v]: [&'a TensorRef<'_>; 2],
        keys: &'a RaggedIndices,
    ) -> Result<Self> {
        let k = check.rows("k", k, &[spec.dtype_kv], &[3])?;
        let v = check.rows("v", v, &[spec.dtype_kv], &[3])?;
        let (total, heads) = (keys.total() as i64, k.shape()[1]);
        check.shape("k", &k, &[total, heads, spec.head_dim_qk as i64])?;
        check.shape("v", &v, &[total, heads, spec.head_dim_vo as i64])?;
        Ok(Self { k, v, heads: heads as usize, places: Places::Ragged(keys) })
    }

    pub(super) fn batch_size(&self) -> usize {
        match self.places {
            Places::Paged(_, table) => table.batch_size(),
            Places::Ragged(keys) => keys.batch_size(),
        }
    }

    /// Keys of a request.
    pub(super) fn len(&self, request: usize) -> usize {
        match self.places {
            Places::Paged(_, table) => table.seq_len(request),
            Places::Ragged(keys) => keys.len(request),
        }
    }

    /// The row of one head of one key.
    fn row(&self, request: usize, position: usize, head: usize) -> usize {
        match self.places {
            Places::Paged(shape, table) => {
                let (page, slot) = place(table, request, position);
                shape.row(page, slot, head)
            }
            Places::Ragged(keys) => (keys.indptr()[request] as usize + position) * self.heads + head,
        }
    }

    /// One head of a request's keys or values, one after the other.
    pub(super) fn head(&self, rows: &Rows<'_>, request: usize, head: usize) -> Vec<f64> {
        let mut numbers = vec![0.0; self.len(request) * rows.width()];
        for (position, numbers) in numbers.chunks_exact_mut(rows.width()).enumerate() {
            rows.read(self.row(request, position, head), numbers);
        }
        numbers
    }
}
