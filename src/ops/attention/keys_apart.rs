//! How the keys of a batch lie, and how FlashAttention 3, whose tiles would reach
//! into the next request, is kept from those of others.

use super::spec::AttentionSpec;
use crate::{
    error::{FlashInferError, Result},
    ops::check::Check,
    tensor::RawTensor,
};

/// Keys and values of a batch, as planners see them.
pub(super) struct KvBatch<'a> {
    pub(super) op: &'static str,
    pub(super) indptr: &'a [i32],
    pub(super) lens: &'a [i32],
    pub(super) page_size: usize,
    pub(super) extent: usize,
    pub(super) paged: bool,
}

impl KvBatch<'_> {
    /// Whether the tiles in which FlashAttention 3 copies ragged keys reach
    /// into those of another request. The copy stops at the tensors' end, not
    /// at the request's: values behind it get the weight 0, which makes NaN of
    /// another's NaN. A batch that does not hold its requests apart is read as
    /// pages of one key, which are copied one by one.
    pub(super) fn reaches_others(
        &self,
        graph: bool,
        mut requests: impl Iterator<Item = (usize, usize)>,
    ) -> bool {
        if self.paged {
            return false;
        }
        if graph {
            return self.lens.len() > 1;
        }
        let mut ends = self.indptr[1..].iter();
        requests.any(|(queries, keys)| {
            let end = ends.next().is_some_and(|&end| end as usize == self.extent);
            queries > 0 && keys > 0 && !end
        })
    }
}

/// Refuses several requests to FlashAttention 3 where it has no kernel that
/// keeps them apart.
pub(super) fn check_widths_of_pages(spec: &AttentionSpec) -> Result<()> {
    if spec.head_dim_qk == spec.head_dim_vo {
        return Ok(());
    }
    Err(FlashInferError::Unsupported {
        what: format!(
            "a plan of FlashAttention 3 for several requests with head dimensions {} and {}, among which it would \
             let one see the next",
            spec.head_dim_qk, spec.head_dim_vo
        ),
        available: "plan each request on its own, or use Backend::Fa2, if a wheel of yours has its module"
            .into(),
    })
}

/// Ragged keys and values as a cache of pages of one key.
pub(super) fn as_pages(check: &Check<'_>, kv: [&RawTensor; 2]) -> Result<[RawTensor; 2]> {
    let [k_stride, v_stride] = kv.map(|tensor| tensor.strides()[0]);
    if k_stride != v_stride && kv[0].shape()[0] > 1 {
        return check.fail(
            "v",
            format!(
                "its rows are {v_stride} elements apart, those of k {k_stride}; for several requests, whose keys \
                 it reads as pages, FlashAttention 3 takes one number for both, so copy one of them, or use \
                 Backend::Fa2"
            ),
        );
    }
    let [k, v] = kv.map(|tensor| {
        let (&[rows, heads, width], &[row, head, _]) = (tensor.shape(), tensor.strides()) else {
            return check.fail("k", format!("its shape is {:?}; expected 3 dimensions", tensor.shape()));
        };
        let [shape, strides] = [[rows, 1, heads, width], [row, row, head, 1]]
            .map(|numbers| numbers.map(|number| number as usize));
        let mut pages = RawTensor::new(tensor.data, tensor.device, tensor.dtype, &shape, Some(&strides))?;
        pages.owner = tensor.owner;
        Ok(pages)
    });
    Ok([k?, v?])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    #[test]
    fn only_the_last_keys_end_with_the_tensor() {
        let reaches = |requests: &[(usize, i32)], graph: bool, paged: bool| {
            let lens: Vec<i32> = requests.iter().map(|request| request.1).collect();
            let ends = lens.iter().scan(0, |end, len| {
                *end += len;
                Some(*end)
            });
            let indptr: Vec<i32> = std::iter::once(0).chain(ends).collect();
            let extent = indptr[lens.len()] as usize;
            let kv = KvBatch { op: "test", indptr: &indptr, lens: &lens, page_size: 1, extent, paged };
            kv.reaches_others(graph, requests.iter().map(|&(queries, keys)| (queries, keys as usize)))
        };
        let eager = |requests: &[(usize, i32)]| reaches(requests, false, false);
        assert!(!eager(&[]) && !eager(&[(5, 9)]) && !eager(&[(3, 0), (5, 9), (2, 0)]));
        assert!(!eager(&[(0, 7), (5, 9)]));
        assert!(eager(&[(5, 9), (0, 7)]) && eager(&[(1, 1), (1, 1)]));
        assert!(reaches(&[(5, 9), (0, 0)], true, false) && !reaches(&[(5, 9)], true, false));
        assert!(!reaches(&[(1, 1), (1, 1)], false, true));
    }

    #[test]
    fn requests_that_would_see_each_other_are_refused() {
        let spec = AttentionSpec::new(DType::BF16, 128);
        check_widths_of_pages(&spec).unwrap();
        let error = check_widths_of_pages(&AttentionSpec { head_dim_qk: 192, ..spec }).unwrap_err();
        let said = format!("{error}; {}", error.remedy().unwrap());
        for part in ["several requests", "192 and 128", "each request on its own", "Backend::Fa2"] {
            assert!(said.contains(part), "{said}");
        }
    }
}
