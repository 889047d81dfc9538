//! Small tensors that say how a batch is divided, read on the host.

use candle_core::{DType, Device, Result, Tensor, bail};

/// The integers of a tensor, in its order. Of a tensor on a CUDA device, this
/// waits for the work that makes them.
pub(super) fn integers(name: &str, tensor: &Tensor) -> Result<Vec<i64>> {
    let flat = tensor.to_device(&Device::Cpu)?.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::U32 => flat.to_vec1::<u32>()?.into_iter().map(i64::from).collect(),
        DType::I32 => flat.to_vec1::<i32>()?.into_iter().map(i64::from).collect(),
        DType::I64 => flat.to_vec1::<i64>()?,
        other => bail!("{name} is of dtype {}; expected u32, i32 or i64", other.as_str()),
    })
}

/// The length of each sequence, from cumulative lengths: 0, and where each
/// sequence ends.
pub(super) fn from_cumulative(name: &str, tensor: &Tensor, max: usize) -> Result<Vec<usize>> {
    if tensor.rank() != 1 || tensor.elem_count() == 0 {
        bail!("{name} has shape {:?}; expected one dimension of batch_size + 1 numbers", tensor.shape())
    }
    let ends = integers(name, tensor)?;
    if ends[0] != 0 {
        bail!("{name} begins with {}; cumulative lengths begin with 0", ends[0])
    }
    let lens = ends.windows(2).enumerate().map(|(sequence, pair)| {
        match usize::try_from(pair[1].saturating_sub(pair[0])) {
            Err(_) => bail!("{name} decreases from {} to {}; cumulative lengths do not", pair[0], pair[1]),
            Ok(len) if len > max => {
                bail!("sequence {sequence} has {len} rows by {name}, but the longest was said to have {max}")
            }
            Ok(len) => Ok(len),
        }
    });
    lens.collect()
}

/// The pages of each sequence: the first of its row of a table, as many as its
/// tokens need.
pub(super) fn pages(table: &Tensor, lens: &[usize], page_size: usize) -> Result<Vec<Vec<i32>>> {
    let (batch, columns) = table.dims2()?;
    if batch != lens.len() {
        bail!("block_table has {batch} rows; the cumulative lengths are of {} sequences", lens.len())
    }
    let pages = integers("block_table", table)?;
    let rows = lens.iter().enumerate().map(|(sequence, len)| {
        let needed = len.div_ceil(page_size);
        if needed > columns {
            bail!(
                "sequence {sequence} has {len} keys in {needed} blocks of {page_size}; block_table has \
                 {columns} for each sequence"
            )
        }
        let row = &pages[sequence * columns..][..needed];
        let number = |&page: &i64| match i32::try_from(page) {
            Ok(page) => Ok(page),
            Err(_) => bail!("sequence {sequence}: block_table names block {page}, which cannot exist"),
        };
        row.iter().map(number).collect()
    });
    rows.collect()
}

/// The ranges of each sequence that are not empty.
pub(super) fn ranges(tensor: &Tensor, batch: usize) -> Result<Vec<Vec<[i64; 2]>>> {
    let (sequences, ranges, two) = tensor.dims3()?;
    if sequences != batch || two != 2 {
        bail!("mm_prefix_ranges has shape {:?}; expected ({batch}, max_ranges, 2)", tensor.shape())
    }
    let ends = integers("mm_prefix_ranges", tensor)?;
    let of = |sequence: usize| {
        let pairs = ends[sequence * ranges * 2..][..ranges * 2].chunks_exact(2);
        pairs.map(|pair| [pair[0], pair[1]]).filter(|[start, end]| start < end).collect()
    };
    Ok((0..batch).map(of).collect())
}

/// The slopes of ALiBi, one for each head of the queries.
pub(super) fn slopes(tensor: &Tensor, heads: usize) -> Result<Vec<f32>> {
    if tensor.dtype() != DType::F32 || tensor.dims() != [heads] {
        bail!(
            "alibi_slopes is of dtype {} and shape {:?}; expected f32 and ({heads},), one for each query head",
            tensor.dtype().as_str(),
            tensor.shape()
        )
    }
    tensor.to_vec1()
}
