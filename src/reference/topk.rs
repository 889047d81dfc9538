//! Selecting the largest of each row on the CPU.

use std::{cmp::Ordering, ops::Range};

use super::host::{HostCheck, Rows, RowsMut};
use crate::{
    dtype::DType,
    error::Result,
    indices::RowIndices,
    tensor::{TensorMut, TensorRef},
    topk::{self, TieBreak, TopKOptions},
};

/// Element types of scores beside the wide ones.
const DTYPES: [DType; 2] = [DType::F16, DType::BF16];
/// How long a row may be for the blocks of a GPU is not known here.
const MAX_ROW_BYTES: i64 = i64::MAX;

/// [`topk::radix_topk`](crate::topk::radix_topk) on the CPU: `input` is
/// `[rows, d]`, `values` and `indices` are `[rows, k]`.
///
/// Scores and values are `f16`, `bf16`, `f32` or `f64`, indices also `i32`.
/// Every result is what a kernel may give: scores are ordered by IEEE 754's
/// total order, of equal ones those of smaller indices are selected unless
/// [`TieBreak::Large`] is asked for, and the output is in the order of indices,
/// or, if sorted, of values and then of indices. `k` is not limited.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device,
/// dtype or shape does not fit. Nothing was written.
///
/// ```
/// use flashinfer_rs::{TensorMut, TensorRef, reference, topk::TopKOptions};
/// let (input, mut values, mut indices) = ([1.0f32, 4.0, 2.0, 3.0], [0.0f32; 2], [0i32; 2]);
/// let mut options = TopKOptions::default();
/// options.sorted = true;
/// reference::radix_topk(
///     &mut TensorMut::from_slice(&mut values, &[1, 2])?,
///     &mut TensorMut::from_slice(&mut indices, &[1, 2])?,
///     &TensorRef::from_slice(&input, &[1, 4])?,
///     &options,
/// )?;
/// assert_eq!((values, indices), ([4.0, 3.0], [1, 3]));
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
pub fn radix_topk(
    values: &mut TensorMut<'_>,
    indices: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    options: &TopKOptions,
) -> Result<()> {
    let check = HostCheck { op: "reference::radix_topk" };
    check.as_kernel(|check| {
        let tensors = [&values.raw, &indices.raw, &input.raw];
        topk::check_topk(check, tensors, options, MAX_ROW_BYTES)
    })?;
    let input = check.rows("input", input, &DTYPES, &[2])?;
    let mut values = check.rows_mut("values", values, &DTYPES, &[2])?;
    let mut indices = check.rows_mut("indices", indices, &[DType::I32], &[2])?;
    let k = values.rows.width();
    let shape = [input.shape()[0], k as i64];
    check.shape("values", &values.rows, &shape)?;
    check.shape("indices", &indices.rows, &shape)?;
    if k > input.width() {
        return check.fail("values", format!("k is {k}; rows have {} elements", input.width()));
    }
    for row in 0..input.count() {
        let scores = input.numbers(row);
        let mut selected = select(&scores, k, options.tie_break);
        if options.sorted {
            selected.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        }
        values.write(row, &selected.iter().map(|&at| scores[at]).collect::<Vec<_>>());
        indices.write(row, &selected.iter().map(|&at| at as f64).collect::<Vec<_>>());
    }
    Ok(())
}

/// [`topk::radix_topk_page_table_transform`](crate::topk::radix_topk_page_table_transform)
/// on the CPU. `input` is `[rows, max_len]`, `output_page_table` `[rows, k]`,
/// `src_page_table` `[requests, width]`; dtypes and order are as in
/// [`radix_topk`].
///
/// # Errors
/// As [`radix_topk`]; also when `rows` do not fit.
pub fn radix_topk_page_table_transform(
    output_page_table: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    src_page_table: &TensorRef<'_>,
    rows: &RowIndices,
    options: &TopKOptions,
) -> Result<()> {
    let check = HostCheck { op: "reference::radix_topk_page_table_transform" };
    check.as_kernel(|check| {
        let tensors = [&output_page_table.raw, &input.raw, &src_page_table.raw];
        topk::check_page_table_transform(check, tensors, rows, options, MAX_ROW_BYTES)
    })?;
    let input = check.rows("input", input, &DTYPES, &[2])?;
    let mut output = check.rows_mut("output_page_table", output_page_table, &[DType::I32], &[2])?;
    let table = check.rows("src_page_table", src_page_table, &[DType::I32], &[2])?;
    check_rows(check, "output_page_table", &output, &input, rows)?;
    if rows.batch_size() > table.count() || rows.end() > table.width() {
        return check
            .fail("src_page_table", format!("its shape is {:?}, too small for the rows", table.shape()));
    }
    transform(&mut output, &input, rows, options, |row, part| {
        let entries = table.numbers(rows.row(row).1);
        move |at| entries[part.start + at]
    });
    Ok(())
}

/// [`topk::radix_topk_ragged_transform`](crate::topk::radix_topk_ragged_transform)
/// on the CPU, as [`radix_topk_page_table_transform`] with `offsets`, `[rows]`,
/// in place of a page table.
///
/// # Errors
/// As [`radix_topk_page_table_transform`].
pub fn radix_topk_ragged_transform(
    output_indices: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    offsets: &TensorRef<'_>,
    rows: &RowIndices,
    options: &TopKOptions,
) -> Result<()> {
    let check = HostCheck { op: "reference::radix_topk_ragged_transform" };
    check.as_kernel(|check| {
        let tensors = [&output_indices.raw, &input.raw, &offsets.raw];
        topk::check_ragged_transform(check, tensors, rows, options, MAX_ROW_BYTES)
    })?;
    let input = check.rows("input", input, &DTYPES, &[2])?;
    let mut output = check.rows_mut("output_indices", output_indices, &[DType::I32], &[2])?;
    let offsets = check.rows("offsets", offsets, &[DType::I32], &[1])?;
    check_rows(check, "output_indices", &output, &input, rows)?;
    check.shape("offsets", &offsets, &[input.shape()[0]])?;
    let offsets = offsets.numbers(0);
    transform(&mut output, &input, rows, options, |row, _| {
        let offset = offsets[row];
        move |at| offset + at as f64
    });
    Ok(())
}

fn check_rows(
    check: HostCheck,
    name: &'static str,
    output: &RowsMut<'_>,
    input: &Rows<'_>,
    rows: &RowIndices,
) -> Result<()> {
    check.shape(name, &output.rows, &[input.shape()[0], output.rows.width() as i64])?;
    if rows.len() != input.count() || rows.end() > input.width() {
        return check.fail(
            "rows",
            format!("{} rows that end at {} for an input of {:?}", rows.len(), rows.end(), input.shape()),
        );
    }
    Ok(())
}

/// Writes what each row's function makes of the places that are selected in
/// the row's part, and −1 beyond them.
fn transform<F: Fn(usize) -> f64>(
    output: &mut RowsMut<'_>,
    input: &Rows<'_>,
    rows: &RowIndices,
    options: &TopKOptions,
    of: impl Fn(usize, Range<usize>) -> F,
) {
    for row in 0..input.count() {
        let part = rows.row(row).0;
        let selected = select(&input.numbers(row)[part.clone()], output.rows.width(), options.tie_break);
        let of = of(row, part);
        let mut entries: Vec<_> = selected.into_iter().map(of).collect();
        entries.resize(output.rows.width(), -1.0);
        output.write(row, &entries);
    }
}

/// The places of the `k` largest scores, or of all, in ascending order.
fn select(scores: &[f64], k: usize, tie_break: TieBreak) -> Vec<usize> {
    let mut places: Vec<_> = (0..scores.len()).collect();
    if (1..scores.len()).contains(&k) {
        let before = |&a: &usize, &b: &usize| -> Ordering {
            let tie = if tie_break == TieBreak::Large { b.cmp(&a) } else { a.cmp(&b) };
            scores[b].total_cmp(&scores[a]).then(tie)
        };
        places.select_nth_unstable_by(k - 1, before);
    }
    places.truncate(k);
    places.sort_unstable();
    places
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::testing::{refused, view, view_mut};

    const NAN: f32 = f32::NAN;

    fn topk(row: &[f32], k: usize, change: impl FnOnce(&mut TopKOptions)) -> Vec<i32> {
        let mut options = TopKOptions::default();
        change(&mut options);
        let (mut values, mut indices) = (vec![0f32; k], vec![0i32; k]);
        radix_topk(
            &mut view_mut(&mut values, &[1, k]),
            &mut view_mut(&mut indices, &[1, k]),
            &view(row, &[1, row.len()]),
            &options,
        )
        .unwrap();
        let of_row: Vec<_> = indices.iter().map(|&at| row[at as usize].to_bits()).collect();
        assert_eq!(values.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), of_row);
        indices
    }

    #[test]
    fn the_largest_are_selected() {
        let row = [3.0, -1.0, 7.0, 0.0, 5.0];
        assert_eq!(topk(&row, 3, |_| ()), [0, 2, 4]);
        assert_eq!(topk(&row, 3, |options| options.sorted = true), [2, 4, 0]);
        assert_eq!(topk(&row, 5, |options| options.sorted = true), [2, 4, 0, 3, 1]);
        assert_eq!(topk(&row, 0, |_| ()), [0; 0]);
        assert_eq!(topk(&[], 0, |_| ()), [0; 0]);
    }

    #[test]
    fn ties_are_broken_by_index() {
        let row = [1.0, 2.0, 1.0, 2.0, 1.0];
        let with = |tie_break: TieBreak, sorted: bool| {
            topk(&row, 3, |options| (options.tie_break, options.sorted) = (tie_break, sorted))
        };
        assert_eq!(with(TieBreak::Small, false), [0, 1, 3]);
        assert_eq!(with(TieBreak::Large, false), [1, 3, 4]);
        assert_eq!(with(TieBreak::Small, true), [1, 3, 0]);
        assert_eq!(with(TieBreak::Large, true), [1, 3, 4]);
    }

    #[test]
    fn scores_are_ordered_by_their_bits() {
        let row = [-0.0, 0.0, f32::NEG_INFINITY, NAN, f32::INFINITY, -NAN];
        assert_eq!(topk(&row, 6, |options| options.sorted = true), [3, 4, 1, 0, 2, 5]);
    }

    #[test]
    fn parts_of_rows_are_transformed() {
        let input = [9.0f32, 1.0, 3.0, 2.0, 4.0, 8.0, 0.0, 5.0, 6.0, 7.0, 5.0, 5.0];
        let rows = RowIndices::new([3, 2, 4]).unwrap();
        let rows = rows.with_row_starts([1, 0, 0]).unwrap().with_row_to_batch([1, 0, 1]).unwrap();
        let table = [10, 11, 12, 13, 20, 21, 22, 23];
        let mut options = TopKOptions { tie_break: TieBreak::Large, ..TopKOptions::default() };
        let mut output = [0i32; 9];
        let mut page_table = |options: &TopKOptions| {
            radix_topk_page_table_transform(
                &mut view_mut(&mut output, &[3, 3]),
                &view(&input, &[3, 4]),
                &view(&table, &[2, 4]),
                &rows,
                options,
            )
            .unwrap();
            output
        };
        assert_eq!(page_table(&options), [21, 22, 23, 10, 11, -1, 20, 21, 23]);
        options.tie_break = TieBreak::Small;
        assert_eq!(page_table(&options), [21, 22, 23, 10, 11, -1, 20, 21, 22]);

        let mut output = [0i32; 6];
        radix_topk_ragged_transform(
            &mut view_mut(&mut output, &[3, 2]),
            &view(&input, &[3, 4]),
            &view(&[100, 200, -5], &[3]),
            &rows,
            &options,
        )
        .unwrap();
        assert_eq!(output, [101, 102, 200, 201, -5, -4]);
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let options = TopKOptions::default();
        let input = [1.0f32; 12];
        let run = |values: [usize; 2], indices: [usize; 2]| {
            let (mut v, mut i) = ([0f32; 15], [0i32; 15]);
            radix_topk(
                &mut view_mut(&mut v[..values[0] * values[1]], &values),
                &mut view_mut(&mut i[..indices[0] * indices[1]], &indices),
                &view(&input, &[3, 4]),
                &options,
            )
        };
        refused(run([2, 2], [2, 2]), "values");
        refused(run([3, 5], [3, 5]), "values");
        refused(run([3, 2], [3, 1]), "indices");
        let (mut output, offsets, table) = ([0i32; 6], [0i32; 3], [0i32; 8]);
        let mut transforms = |rows: &RowIndices, offsets: &[i32], width: usize| {
            let mut output = view_mut(&mut output, &[3, 2]);
            let input = view(&input, &[3, 4]);
            let ragged = view(offsets, &[offsets.len()]);
            let table = view(&table[..2 * width], &[2, width]);
            [
                radix_topk_ragged_transform(&mut output, &input, &ragged, rows, &options),
                radix_topk_page_table_transform(&mut output, &input, &table, rows, &options),
            ]
        };
        let both = |[ragged, paged]: [Result<()>; 2], expected: [&str; 2]| {
            refused(ragged, expected[0]);
            refused(paged, expected[1]);
        };
        let rows = RowIndices::new([4, 4, 4]).unwrap().with_row_to_batch([0, 1, 0]).unwrap();
        both(transforms(&RowIndices::new([4, 4]).unwrap(), &offsets, 4), ["rows"; 2]);
        both(transforms(&RowIndices::new([4, 5, 0]).unwrap(), &offsets, 4), ["rows"; 2]);
        both(transforms(&rows, &offsets[..2], 3), ["offsets", "src_page_table"]);
        let requests = rows.with_row_to_batch([0, 2, 0]).unwrap();
        both(transforms(&requests, &offsets[..2], 4), ["offsets", "src_page_table"]);
    }
}
