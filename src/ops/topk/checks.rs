//! What selections take on trust.

use super::{TopKOptions, row_states::check_row_bytes};
use crate::{dtype::DType, error::Result, indices::RowIndices, ops::check::Check, tensor::RawTensor};

/// Element types of scores.
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
/// The most that *filtered* selects, and that kernels sort.
const MAX_SORTED: i64 = 2048;
/// The kernels count elements of a row in `int`, some steps beyond its end.
const MAX_ROW_LEN: i64 = 1 << 30;

/// Scores that a selection of `k` can read.
fn check_input(
    check: &Check<'_>,
    input: &RawTensor,
    k: i64,
    options: &TopKOptions,
    max_row_bytes: i64,
) -> Result<()> {
    check.tensor("input", input, &DTYPES, &[2])?;
    let (rows, len) = (input.shape()[0], input.shape()[1]);
    if rows > i64::from(i32::MAX) || len >= MAX_ROW_LEN {
        return check.fail(
            "input",
            format!(
                "its shape is {:?}; at most {} rows of fewer than {MAX_ROW_LEN} elements",
                input.shape(),
                i32::MAX
            ),
        );
    }
    check.contiguous("input", input)?;
    // The kernels load vectors of up to 16 bytes, as long as they divide a row.
    let size = input.dtype.size();
    let vector = size << (16 / size as u32).trailing_zeros().min(len.trailing_zeros());
    check.aligned("input", input, vector)?;
    if k > MAX_SORTED && (options.sorted || options.asks_for_filtered()) {
        return check.fail(
            "options",
            format!("k is {k}; `sorted`, `tie_break` and `dsa_graph_safe` are for at most {MAX_SORTED}"),
        );
    }
    if options.asks_for_filtered() {
        return Ok(());
    }
    check_row_bytes(check, "input", input, max_row_bytes)
}

/// A contiguous `i32` tensor of this shape; the kernels address it in 32 bits.
fn check_integers(
    check: &Check<'_>,
    argument: &'static str,
    tensor: &RawTensor,
    shape: &[i64],
) -> Result<()> {
    check.plain(argument, tensor, &[DType::I32], shape, size_of::<i32>())?;
    check.offsets_in_32_bits(argument, tensor)
}

/// Everything about [`radix_topk`](super::radix_topk); gives `k`.
pub(crate) fn check_topk(
    check: &Check<'_>,
    [values, indices, input]: [&RawTensor; 3],
    options: &TopKOptions,
    max_row_bytes: i64,
) -> Result<i64> {
    check.tensor("input", input, &DTYPES, &[2])?;
    check.tensor("values", values, &[input.dtype], &[2])?;
    let shape = [input.shape()[0], values.shape()[1]];
    let k = shape[1];
    check_input(check, input, k, options, max_row_bytes)?;
    check.shape("values", values, &shape)?;
    if k > input.shape()[1] {
        return check.fail("values", format!("k is {k}; rows have {} elements", input.shape()[1]));
    }
    check.contiguous("values", values)?;
    check.aligned("values", values, values.dtype.size())?;
    check_integers(check, "indices", indices, &shape)?;
    Ok(k)
}

/// Everything about [`radix_topk_page_table_transform`](super::radix_topk_page_table_transform); gives `k`.
pub(crate) fn check_page_table_transform(
    check: &Check<'_>,
    [output, input, table]: [&RawTensor; 3],
    rows: &RowIndices,
    options: &TopKOptions,
    max_row_bytes: i64,
) -> Result<i64> {
    let k = check_transform(check, "output_page_table", [output, input], rows, options, max_row_bytes)?;
    check_page_table(check, table, rows)?;
    Ok(k)
}

/// Everything about [`radix_topk_ragged_transform`](super::radix_topk_ragged_transform); gives `k`.
pub(crate) fn check_ragged_transform(
    check: &Check<'_>,
    [output, input, offsets]: [&RawTensor; 3],
    rows: &RowIndices,
    options: &TopKOptions,
    max_row_bytes: i64,
) -> Result<i64> {
    let k = check_transform(check, "output_indices", [output, input], rows, options, max_row_bytes)?;
    check_integers(check, "offsets", offsets, &[input.shape()[0]])?;
    Ok(k)
}

/// What both transforms need of scores, output and rows; gives `k`.
pub(super) fn check_transform(
    check: &Check<'_>,
    name: &'static str,
    [output, input]: [&RawTensor; 2],
    rows: &RowIndices,
    options: &TopKOptions,
    max_row_bytes: i64,
) -> Result<i64> {
    check.tensor("input", input, &DTYPES, &[2])?;
    check.tensor(name, output, &[DType::I32], &[2])?;
    let (k, len) = (output.shape()[1], input.shape()[1]);
    check_input(check, input, k, options, max_row_bytes)?;
    check_integers(check, name, output, &[input.shape()[0], k])?;
    if options.sorted {
        return check.fail("options", "`sorted` is for radix_topk; the transforms give no values".into());
    }
    if len == 0 {
        return check.fail("input", format!("its shape is {:?}; rows must have an element", input.shape()));
    }
    if rows.len() as i64 != input.shape()[0] {
        return check.fail("rows", format!("{} rows; the input has {}", rows.len(), input.shape()[0]));
    }
    if rows.end() as i64 > len {
        return check.fail("rows", format!("a part ends at {}; rows of the input have {len}", rows.end()));
    }
    Ok(k)
}

/// A page table that has an entry for all that rows can select.
pub(super) fn check_page_table(check: &Check<'_>, table: &RawTensor, rows: &RowIndices) -> Result<()> {
    const NAME: &str = "src_page_table";
    check.tensor(NAME, table, &[DType::I32], &[2])?;
    check.contiguous(NAME, table)?;
    check.aligned(NAME, table, size_of::<i32>())?;
    let (requests, width) = (table.shape()[0], table.shape()[1]);
    if (rows.batch_size() as i64) > requests || (rows.end() as i64) > width {
        return check.fail(
            NAME,
            format!(
                "its shape is {:?}; rows are of {} requests, and end at {}",
                table.shape(),
                rows.batch_size(),
                rows.end()
            ),
        );
    }
    Ok(())
}
