//! What is refused before a launch.

use std::ffi::c_void;

use super::{
    checks::{check_page_table, check_transform},
    *,
};
use crate::{device::Device, dtype::DType, indices::RowIndices};

const GPU: Device = Device::Cuda(0);
/// As an H200 has it.
const MAX_ROW_BYTES: i64 = 132 * (227 - 16) * 1024;

fn at(address: usize, device: Device, dtype: DType, shape: &[usize], strides: Option<&[usize]>) -> RawTensor {
    RawTensor::new(address as *mut c_void, device, dtype, shape, strides).unwrap()
}

fn new(dtype: DType, shape: &[usize]) -> RawTensor {
    at(4096, GPU, dtype, shape, None)
}

fn options(change: impl FnOnce(&mut TopKOptions)) -> TopKOptions {
    let mut options = TopKOptions::default();
    change(&mut options);
    options
}

/// The argument that is refused, if any.
fn refused(check: impl FnOnce(&Check<'_>) -> Result<()>) -> Option<&'static str> {
    // SAFETY: nothing is enqueued on the stream.
    let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
    match check(&Check::new("test", &stream).unwrap()) {
        Ok(()) => None,
        Err(FlashInferError::InvalidArgument { argument, .. }) => Some(argument),
        Err(other) => panic!("{other}"),
    }
}

fn topk(
    values: &RawTensor,
    indices: &RawTensor,
    input: &RawTensor,
    options: &TopKOptions,
) -> Option<&'static str> {
    refused(|check| check_topk(check, [values, indices, input], options, MAX_ROW_BYTES).map(drop))
}

/// A selection of `k` from rows of `f32`, with these options.
fn sizes(rows: usize, len: usize, k: usize, options: &TopKOptions) -> Option<&'static str> {
    let output = |dtype| new(dtype, &[rows, k]);
    topk(&output(DType::F32), &output(DType::I32), &new(DType::F32, &[rows, len]), options)
}

#[test]
fn sizes_are_checked() {
    let plain = TopKOptions::default();
    for (rows, len, k) in [(0, 10, 3), (1, 1, 1), (4, 10, 10), (4, 10, 0), (0, 0, 0), (3, 100_000, 50_000)] {
        assert_eq!(sizes(rows, len, k, &plain), None, "{rows} {len} {k}");
    }
    assert_eq!(sizes(4, 10, 11, &plain), Some("values"));
    assert_eq!(sizes(1 << 31, 8, 1, &plain), Some("input"));
    assert_eq!(sizes(1 << 22, 2000, 1024, &plain), None);
    assert_eq!(sizes((1 << 22) + 1, 2000, 1024, &plain), Some("indices"));
    for filtered in [
        options(|options| options.tie_break = TieBreak::Large),
        options(|options| options.dsa_graph_safe = true),
    ] {
        assert_eq!(sizes(1, 5000, 2048, &filtered), None);
        assert_eq!(sizes(1, 5000, 2049, &filtered), Some("options"));
        // No block waits for another, whatever a row's length.
        assert_eq!(sizes(1, 1 << 29, 5, &filtered), None);
        assert_eq!(sizes(1, 1 << 30, 5, &filtered), Some("input"));
    }
    assert_eq!(sizes(1, 5000, 2049, &options(|options| options.sorted = true)), Some("options"));
    assert_eq!(sizes(1, 5000, 5000, &options(|options| options.deterministic = true)), None);
    assert_eq!(sizes(1, MAX_ROW_BYTES as usize / 4, 5, &plain), None);
    assert_eq!(sizes(1, MAX_ROW_BYTES as usize / 4 + 1, 5, &plain), Some("input"));
}

#[test]
fn tensors_are_checked() {
    let plain = TopKOptions::default();
    let (values, indices) = (new(DType::F16, &[3, 8]), new(DType::I32, &[3, 8]));
    let input = new(DType::F16, &[3, 64]);
    assert_eq!(topk(&values, &indices, &input, &plain), None);
    let strided = |dtype, shape: &[usize], strides: &[usize]| at(4096, GPU, dtype, shape, Some(strides));
    for wrong in [
        new(DType::F64, &[3, 64]),
        new(DType::E4M3, &[3, 64]),
        new(DType::F16, &[192]),
        at(4096, Device::Cpu, DType::F16, &[3, 64], None),
        at(4096, Device::Cuda(1), DType::F16, &[3, 64], None),
        at(4096 + 8, GPU, DType::F16, &[3, 64], None),
        strided(DType::F16, &[3, 64], &[72, 1]),
        strided(DType::F16, &[3, 64], &[1, 3]),
    ] {
        assert_eq!(topk(&values, &indices, &wrong, &plain), Some("input"), "{wrong:?}");
    }
    for wrong in [
        new(DType::F32, &[3, 8]),
        new(DType::F16, &[2, 8]),
        new(DType::F16, &[24]),
        at(4096, Device::Cuda(1), DType::F16, &[3, 8], None),
        at(4096 + 1, GPU, DType::F16, &[3, 8], None),
        strided(DType::F16, &[3, 8], &[16, 1]),
    ] {
        assert_eq!(topk(&wrong, &indices, &input, &plain), Some("values"), "{wrong:?}");
    }
    for wrong in [
        new(DType::I64, &[3, 8]),
        new(DType::I32, &[3, 9]),
        new(DType::I32, &[8, 3]),
        at(4096, Device::Cpu, DType::I32, &[3, 8], None),
        at(4096 + 2, GPU, DType::I32, &[3, 8], None),
        strided(DType::I32, &[3, 8], &[1, 3]),
    ] {
        assert_eq!(topk(&values, &wrong, &input, &plain), Some("indices"), "{wrong:?}");
    }
    // Vectors are as wide as a row's length allows.
    for (len, alignment) in [(64, 16), (68, 8), (66, 4), (65, 2)] {
        let input = |address| at(address, GPU, DType::F16, &[1, len], None);
        let row = |dtype| new(dtype, &[1, 8]);
        let check = |address| topk(&row(DType::F16), &row(DType::I32), &input(address), &plain);
        assert_eq!(check(4096 + alignment), None, "{len}");
        assert_eq!(check(4096 + alignment / 2), Some("input"), "{len}");
    }
}

#[test]
fn parts_of_rows_stay_inside() {
    let rows = |lengths: &[usize]| RowIndices::new(lengths.iter().copied()).unwrap();
    let transform = |rows: &RowIndices, options: &TopKOptions, len, k| {
        let (output, input) = (new(DType::I32, &[2, k]), new(DType::BF16, &[2, len]));
        refused(|check| {
            check_transform(check, "output", [&output, &input], rows, options, MAX_ROW_BYTES).map(drop)
        })
    };
    let plain = TopKOptions::default();
    assert_eq!(transform(&rows(&[0, 40]), &plain, 40, 8), None);
    assert_eq!(transform(&rows(&[0, 40]), &plain, 40, 100), None);
    assert_eq!(transform(&rows(&[0, 41]), &plain, 40, 8), Some("rows"));
    assert_eq!(transform(&rows(&[0, 20]).with_row_starts([0, 21]).unwrap(), &plain, 40, 8), Some("rows"));
    assert_eq!(transform(&rows(&[0, 20]).with_row_starts([40, 20]).unwrap(), &plain, 40, 8), None);
    assert_eq!(transform(&rows(&[1, 1, 1]), &plain, 40, 8), Some("rows"));
    assert_eq!(transform(&rows(&[0, 0]), &plain, 0, 8), Some("input"));
    let sorted = options(|options| options.sorted = true);
    assert_eq!(transform(&rows(&[0, 40]), &sorted, 40, 8), Some("options"));
    let safe = options(|options| options.dsa_graph_safe = true);
    assert_eq!(transform(&rows(&[0, 40]), &safe, 40, 4000), Some("options"));

    let table = |rows: &RowIndices, table: &RawTensor| refused(|check| check_page_table(check, table, rows));
    let good = new(DType::I32, &[2, 40]);
    assert_eq!(table(&rows(&[0, 40]), &good), None);
    assert_eq!(table(&rows(&[0, 41]), &good), Some("src_page_table"));
    assert_eq!(table(&rows(&[1, 1, 1]), &good), Some("src_page_table"));
    assert_eq!(table(&rows(&[1, 1, 1]).with_row_to_batch([1, 0, 1]).unwrap(), &good), None);
    assert_eq!(table(&rows(&[1]).with_row_to_batch([2]).unwrap(), &good), Some("src_page_table"));
    for wrong in [
        new(DType::I64, &[2, 40]),
        new(DType::I32, &[80]),
        at(4096, GPU, DType::I32, &[2, 40], Some(&[64, 1])),
        at(4096, Device::Cpu, DType::I32, &[2, 40], None),
    ] {
        assert_eq!(table(&rows(&[0, 40]), &wrong), Some("src_page_table"), "{wrong:?}");
    }
}
