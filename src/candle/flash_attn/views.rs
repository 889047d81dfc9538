//! Tensors of four dimensions as the rows of heads that kernels take, without
//! copies where strides allow.

use candle_core::{Layout, Result, Shape, Tensor};

use super::super::tensor;
use crate::{device::Device, tensor::RawTensor};

/// Queries, `(batch, rows, heads, width)` or `(rows, heads, width)`, as rows
/// that lie one after the other; `None` where their strides do not allow that.
pub(super) fn queries(layout: &Layout, size: usize) -> Option<Layout> {
    let [batch, rows, ..] = four(layout.dims());
    let (view, apart) = keys(layout, size)?;
    (batch == 1 || apart == rows).then_some(view)
}

/// Keys or values of the same shapes as rows, and how many rows one sequence
/// begins after the one before; `None` where their strides do not allow that.
///
/// A transposed view, and part of a longer cache, have whole numbers of rows
/// between their sequences, which no request then reads.
pub(super) fn keys(layout: &Layout, size: usize) -> Option<(Layout, usize)> {
    let [batch, rows, heads, width] = four(layout.dims());
    let [batch_stride, row_stride, head_stride, element_stride] = four_strides(layout.stride());
    let (stride, apart) = match (batch, rows) {
        (1, _) => (row_stride, rows),
        (_, 1) => (batch_stride, 1),
        _ if row_stride == 0 || batch_stride % row_stride != 0 => return None,
        _ => (row_stride, batch_stride / row_stride),
    };
    if apart < rows || element_stride != 1 {
        return None;
    }
    let shape = Shape::from(((batch - 1) * apart + rows, heads, width));
    let view = Layout::new(shape, vec![stride, head_stride, 1], layout.start_offset());
    let last: u128 =
        view.dims().iter().zip(view.stride()).map(|(&dim, &by)| (dim as u128 - 1) * by as u128).sum();
    (tensor::fits(&view, size) && last <= u32::MAX.into()).then_some((view, apart))
}

/// Whether two indices of a view name one element.
pub(super) fn overlaps(view: &Layout, dtype: candle_core::DType) -> Result<bool> {
    let (dtype, dims, strides) = (dtype.try_into()?, view.dims(), Some(view.stride()));
    let raw = RawTensor::new(std::ptr::null_mut(), Device::Cpu, dtype, dims, strides);
    Ok(raw.map_err(tensor::error)?.may_overlap())
}

/// A tensor and its view, or a copy and the copy's.
pub(super) fn viewed<V>(tensor: &Tensor, view: impl Fn(&Layout, usize) -> Option<V>) -> Result<(Tensor, V)> {
    let size = tensor.dtype().size_in_bytes();
    if let Some(view) = view(tensor.layout(), size) {
        return Ok((tensor.clone(), view));
    }
    let copy = tensor.force_contiguous()?;
    match view(copy.layout(), size) {
        Some(view) => Ok((copy, view)),
        None => candle_core::bail!(
            "flash_attn: a tensor of shape {:?} spans 2^32 elements or more, which kernels cannot address; \
             split the batch",
            tensor.shape()
        ),
    }
}

/// Keys and values as rows with the same number from sequence to sequence.
/// Where the two differ, what has others between its sequences is copied.
pub(super) fn keys_and_values(k: &Tensor, v: &Tensor) -> Result<([Tensor; 2], [Layout; 2], usize)> {
    let (mut k, (mut k_view, mut apart)) = viewed(k, keys)?;
    let (mut v, (mut v_view, v_apart)) = viewed(v, keys)?;
    if apart != v_apart {
        let [_, rows, ..] = four(k.dims());
        let close = |layout: &Layout, size: usize| keys(layout, size).filter(|&(_, apart)| apart == rows);
        (k, (k_view, apart)) = viewed(&k, close)?;
        (v, (v_view, _)) = viewed(&v, close)?;
    }
    Ok(([k, v], [k_view, v_view], apart))
}

/// Keys and values in blocks, with the same strides, as kernels read them.
/// Where the two differ, what is not contiguous is copied.
pub(super) fn blocks(k: &Tensor, v: &Tensor) -> Result<([Tensor; 2], [Layout; 2])> {
    let same = k.stride() == v.stride();
    let view = |layout: &Layout, size: usize| {
        let view = match layout.is_contiguous() {
            // Strides of dimensions of size 1 may be anything.
            true => Layout::contiguous_with_offset(layout.shape(), layout.start_offset()),
            false if same => layout.clone(),
            false => return None,
        };
        tensor::fits(&view, size).then_some(view)
    };
    let [(k, k_view), (v, v_view)] = [viewed(k, view)?, viewed(v, view)?];
    Ok(([k, v], [k_view, v_view]))
}

/// The dimensions, with one sequence if they name none.
fn four(dims: &[usize]) -> [usize; 4] {
    match *dims {
        [rows, heads, width] => [1, rows, heads, width],
        [batch, rows, heads, width] => [batch, rows, heads, width],
        _ => unreachable!("tensors of {dims:?} were refused"),
    }
}

fn four_strides(strides: &[usize]) -> [usize; 4] {
    match *strides {
        [rows, heads, width] => [0, rows, heads, width],
        _ => four(strides),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device::Cpu};

    use super::*;

    fn zeros(shape: &[usize]) -> Tensor {
        Tensor::zeros(shape, DType::F16, &Cpu).unwrap()
    }

    #[track_caller]
    fn assert_view(tensor: &Tensor, apart: usize, strides: [usize; 3]) {
        let (same, (view, found)) = viewed(tensor, keys).unwrap();
        assert_eq!(same.id(), tensor.id(), "it was copied");
        assert_eq!((found, view.stride()), (apart, &strides[..]), "{:?}", tensor.layout());
        assert_eq!(view.start_offset(), tensor.layout().start_offset());
        // Every place of the tensor is where the view has it.
        let (dims, by) = (tensor.dims(), tensor.stride());
        for (sequence, row) in (0..dims[0]).flat_map(|sequence| (0..dims[1]).map(move |row| (sequence, row)))
        {
            let expected =
                if dims[0] > 1 { sequence * by[0] } else { 0 } + if dims[1] > 1 { row * by[1] } else { 0 };
            assert_eq!((sequence * apart + row) * view.stride()[0], expected);
        }
        assert_eq!(view.dims()[0], (dims[0] - 1) * apart + dims[1]);
    }

    #[test]
    fn keys_are_viewed_where_they_lie() {
        let (b, s, h, d) = (3, 5, 2, 16);
        assert_view(&zeros(&[b, s, h, d]), s, [h * d, d, 1]);
        let transposed = zeros(&[b, h, s, d]).transpose(1, 2).unwrap();
        assert_view(&transposed, h * s, [d, s * d, 1]);
        // Part of a cache, in both orders, from its middle on.
        let max = 11;
        let part = zeros(&[b, h, max, d]).narrow(2, 3, s).unwrap().transpose(1, 2).unwrap();
        assert_view(&part, h * max, [d, max * d, 1]);
        assert_view(&zeros(&[b, max, h, d]).narrow(1, 3, s).unwrap(), max, [h * d, d, 1]);
        // Keys and values in one tensor.
        let joined = zeros(&[b, s, 3, h, d]);
        let keys = joined.narrow(2, 1, 1).unwrap().squeeze(2).unwrap();
        assert_view(&keys, s, [3 * h * d, d, 1]);
        // One row of each sequence, and one sequence.
        assert_view(&zeros(&[b, h, 1, d]).transpose(1, 2).unwrap(), 1, [h * d, d, 1]);
        let one = zeros(&[1, h, max, d]).narrow(2, 0, s).unwrap().transpose(1, 2).unwrap();
        assert_view(&one, s, [d, max * d, 1]);
        // Heads that are one repeated.
        assert_view(&zeros(&[b, s, 1, d]).expand((b, s, h, d)).unwrap(), s, [d, 0, 1]);
    }

    #[test]
    fn queries_are_copied_only_where_sequences_lie_apart() {
        let copied = |tensor: &Tensor| viewed(tensor, queries).unwrap().0.id() != tensor.id();
        let transposed = |b, h, s| zeros(&[b, h, s, 16]).transpose(1, 2).unwrap();
        assert!(!copied(&zeros(&[2, 3, 4, 16])));
        assert!(!copied(&transposed(1, 4, 3)));
        assert!(!copied(&transposed(2, 4, 1)));
        assert!(copied(&transposed(2, 4, 3)));
        assert!(!copied(&zeros(&[7, 4, 16])));
        assert!(!copied(&zeros(&[9, 4, 16]).narrow(0, 2, 7).unwrap()));
    }

    #[test]
    fn what_kernels_cannot_read_is_copied() {
        let copied = |tensor: &Tensor| viewed(tensor, keys).unwrap().0.id() != tensor.id();
        // Elements that are not adjacent.
        assert!(copied(&zeros(&[2, 5, 16, 4]).transpose(2, 3).unwrap()));
        // Vectors that are not aligned, by their strides or by where they begin.
        assert!(copied(&zeros(&[1, 5, 2, 20]).narrow(3, 0, 16).unwrap()));
        assert!(copied(&zeros(&[1, 5, 2, 32]).narrow(3, 4, 16).unwrap()));
        assert!(copied(&zeros(&[40 * 16 + 4]).narrow(0, 4, 640).unwrap().reshape((2, 10, 2, 16)).unwrap()));
        // Sequences, or rows, that are one repeated.
        assert!(copied(&zeros(&[1, 5, 2, 16]).expand((3, 5, 2, 16)).unwrap()));
        assert!(copied(&zeros(&[3, 1, 2, 16]).expand((3, 5, 2, 16)).unwrap()));
    }

    #[test]
    fn keys_and_values_are_as_far_apart() {
        let (near, far) = (zeros(&[2, 5, 2, 16]), zeros(&[2, 9, 2, 16]).narrow(1, 0, 5).unwrap());
        let further = zeros(&[2, 12, 2, 16]).narrow(1, 0, 5).unwrap();
        let copied = |k: &Tensor, v: &Tensor| {
            let (tensors, views, apart) = keys_and_values(k, v).unwrap();
            assert!(views.iter().all(|view| view.dims()[0] == apart + 5));
            [tensors[0].id() != k.id(), tensors[1].id() != v.id()]
        };
        assert_eq!(copied(&near, &near), [false, false]);
        assert_eq!(copied(&far, &far), [false, false]);
        assert_eq!(copied(&near, &far), [false, true]);
        assert_eq!(copied(&far, &near), [true, false]);
        assert_eq!(copied(&further, &far), [true, true]);
        // Other strides are fine, as long as sequences are as far apart.
        let wide = zeros(&[2, 5, 3, 16]).narrow(2, 1, 2).unwrap();
        assert_eq!(copied(&near, &wide), [false, false]);
    }

    #[test]
    fn blocks_have_the_same_strides() {
        let copied = |k: &Tensor, v: &Tensor| {
            let (tensors, views) = blocks(k, v).unwrap();
            assert_eq!(views[0].stride(), views[1].stride());
            [tensors[0].id() != k.id(), tensors[1].id() != v.id()]
        };
        let near = zeros(&[4, 32, 2, 16]);
        let joined = zeros(&[4, 2, 32, 2, 16]);
        let [k, v] = [0, 1].map(|at| joined.narrow(1, at, 1).unwrap().squeeze(1).unwrap());
        assert_eq!(copied(&near, &near), [false, false]);
        assert_eq!(copied(&k, &v), [false, false]);
        assert_eq!(copied(&near, &v), [false, true]);
        // One head, which has a stride of its own.
        let (one, turned) = (zeros(&[4, 32, 1, 16]), zeros(&[4, 1, 32, 16]).transpose(1, 2).unwrap());
        assert_ne!(one.stride(), turned.stride());
        assert_eq!(copied(&one, &turned), [false, false]);
    }
}
