//! The small kernels of the network that FlashInfer has none for (`kernels.cu`).

use std::sync::Arc;

use cudarc::{
    driver::{CudaFunction, CudaStream, DriverError, LaunchConfig, PushKernelArg, result},
    nvrtc::Ptx,
};
use flashinfer_rs::{DType, Device, TensorMut, TensorRef};

use super::{last_edits::LastEdits, rows::Rows, tokens::Tokens};
use crate::Result;

#[cfg(test)]
mod tests;

/// Threads of a block.
const THREADS: u32 = 256;
/// Numbers of 16 bits that a thread reads and writes at once.
const VECTOR: usize = 8;

/// The kernels of one element type, on one stream.
pub struct Kernels {
    cuda: Arc<CudaStream>,
    dtype: DType,
    gather_rows: CudaFunction,
    scale_rows: CudaFunction,
    embed: CudaFunction,
    keep_chosen: CudaFunction,
    join_columns: CudaFunction,
    tell_largest: CudaFunction,
    choose_largest: CudaFunction,
    sigmoid: CudaFunction,
    soft_cap: CudaFunction,
    edit_last: CudaFunction,
}

impl Kernels {
    /// Has them compiled for `f16` or `bf16`.
    pub fn new(cuda: &Arc<CudaStream>, dtype: DType) -> Result<Self> {
        let module = cuda.context().load_module(Ptx::from_src(include_str!("kernels.ptx")))?;
        let of_dtype = |name: &str| module.load_function(&format!("{name}_{dtype}"));
        Ok(Self {
            cuda: cuda.clone(),
            dtype,
            gather_rows: of_dtype("gather_rows")?,
            scale_rows: of_dtype("scale_rows")?,
            embed: of_dtype("embed")?,
            keep_chosen: module.load_function("keep_chosen")?,
            join_columns: module.load_function("join_columns")?,
            tell_largest: module.load_function("tell_largest")?,
            choose_largest: module.load_function("choose_largest")?,
            sigmoid: module.load_function("sigmoid")?,
            soft_cap: module.load_function("soft_cap")?,
            edit_last: module.load_function("edit_last")?,
        })
    }

    /// `out[row] = scale · table[rows[row]]`, or zeros. Both are contiguous, of
    /// equally wide rows.
    pub fn gather_rows(
        &self,
        out: &mut TensorMut<'_>,
        table: &TensorRef<'_>,
        rows: &Rows,
        scale: f32,
    ) -> Result<()> {
        let [count, width] = self.rows("out", &out.as_ref())?;
        let [table_rows, table_width] = self.rows("table", table)?;
        let indices = rows.view();
        let fits = table_width == width && rows.bound() <= table_rows as usize;
        if !fits || indices.numel() < count as usize || !self.is_here(&indices) {
            return Err(format!("rows below {} of {table:?} in {out:?}", rows.bound()).into());
        }
        let addresses = [out.data_ptr(), table.data_ptr(), indices.data_ptr()].map(|data| data as u64);
        let mut launch = self.cuda.launch_builder(&self.gather_rows);
        launch.arg(&addresses[0]).arg(&addresses[1]).arg(&addresses[2]).arg(&width).arg(&scale);
        // SAFETY: the kernel takes three addresses, a width in eights and a factor. It writes
        // each row of `out`, and reads as many numbers, and rows that they say: whatever is set
        // is below the bound, or negative for none.
        self.launch(count, |shape| unsafe { launch.launch(shape).map(drop) })
    }

    /// The rows of tokens in a table, which begins with token `first`, times `scale`; zeros where there
    /// is no token, or none of the table's. `chosen` is what the step before chose, row by row, `i32`.
    /// Both matrices are contiguous, of equally wide rows.
    pub fn embed(
        &self,
        out: &mut TensorMut<'_>,
        table: &TensorRef<'_>,
        first: usize,
        tokens: &Tokens,
        chosen: &TensorRef<'_>,
        scale: f32,
    ) -> Result<()> {
        let [count, width] = self.rows("out", &out.as_ref())?;
        let [vocab, table_width] = self.rows("table", table)?;
        let (sources, rows, first) =
            (tokens.sources(), u32::try_from(chosen.numel())?, u32::try_from(first)?);
        let enough = table_width == width && sources.numel() >= count as usize;
        if !(enough && self.are_indices(&sources) && self.are_indices(chosen)) {
            return Err(format!("tokens {sources:?} and {chosen:?} of {table:?} in {out:?}").into());
        }
        let addresses = [out.data_ptr(), table.data_ptr(), sources.data_ptr(), chosen.data_ptr()];
        let [out, table, sources, chosen] = addresses.map(|data| data as u64);
        let mut launch = self.cuda.launch_builder(&self.embed);
        launch
            .arg(&out)
            .arg(&table)
            .arg(&vocab)
            .arg(&first)
            .arg(&sources)
            .arg(&chosen)
            .arg(&rows)
            .arg(&width)
            .arg(&scale);
        // SAFETY: the kernel takes these in this order, the width in eights. It writes each row of
        // `out`, reads as many sources, of `chosen` none but its rows, and rows of the table
        // below `vocab`.
        self.launch(count, |shape| unsafe { launch.launch(shape).map(drop) })
    }

    /// Multiplies each row of a contiguous tensor by a factor, `f32`. A row whose
    /// factor is 0 becomes zeros, whatever is in it.
    pub fn scale_rows(&self, data: &mut TensorMut<'_>, factors: &TensorRef<'_>) -> Result<()> {
        let [rows, width] = self.rows("data", &data.as_ref())?;
        let factors = self.numbers("factors", factors, rows as usize)?;
        let data = data.data_ptr() as u64;
        let mut launch = self.cuda.launch_builder(&self.scale_rows);
        launch.arg(&data).arg(&factors).arg(&width);
        // SAFETY: the kernel takes two addresses and a width in eights; rows and factors are there.
        self.launch(rows, |shape| unsafe { launch.launch(shape).map(drop) })
    }

    /// Where `shares` are not 0, they become `probs`. Both are `f32` and contiguous.
    pub fn keep_chosen(&self, shares: &mut TensorMut<'_>, probs: &TensorRef<'_>) -> Result<()> {
        let count = shares.numel();
        let probs = self.numbers("probs", probs, count)?;
        let shares = self.numbers("shares", &shares.as_ref(), count)?;
        let mut launch = self.cuda.launch_builder(&self.keep_chosen);
        let numbers = count as u64;
        launch.arg(&shares).arg(&probs).arg(&numbers);
        // SAFETY: the kernel takes two addresses and a count; so many numbers are at both.
        self.launch(blocks(count)?, |shape| unsafe { launch.launch(shape).map(drop) })
    }

    /// Rows of a matrix, out of parts of its columns that lie one behind the other, `[parts * rows,
    /// columns]`, of which the last has columns too many if need be. Both are `f32` and contiguous.
    pub fn join_columns(&self, out: &mut TensorMut<'_>, parts: &TensorRef<'_>) -> Result<()> {
        let ([rows, width], [all, part]) = (matrix(&out.as_ref())?, matrix(parts)?);
        let fits = rows > 0 && all % rows == 0 && u64::from(all / rows) * u64::from(part) >= u64::from(width);
        if !fits {
            return Err(format!("columns of {out:?} out of {parts:?}").into());
        }
        let count = out.numel();
        let to = self.numbers("out", &out.as_ref(), count)?;
        let from = self.numbers("parts", parts, parts.numel())?;
        let mut launch = self.cuda.launch_builder(&self.join_columns);
        launch.arg(&to).arg(&from).arg(&rows).arg(&width).arg(&part);
        // SAFETY: the kernel takes two addresses, rows and widths; it writes each number of `out`, and
        // reads of each part the columns that this has, which are there as all parts together are as
        // wide at least.
        self.launch(blocks(count)?, |shape| unsafe { launch.launch(shape).map(drop) })
    }

    /// The largest logit of each row and its token, `[rows, 2]`, out of the places of the largest, `i32`, or
    /// negative ones where a logit is NaN. The first column is of token `first`; tokens are bits of
    /// `i32`, as numbers are `f32`. All are contiguous.
    pub fn tell_largest(
        &self,
        told: &mut TensorMut<'_>,
        logits: &TensorRef<'_>,
        places: &TensorRef<'_>,
        first: usize,
    ) -> Result<()> {
        let ([rows, part], first) = (matrix(logits)?, u32::try_from(first)?);
        if places.numel() != rows as usize || !self.are_indices(places) {
            return Err(format!("places {places:?} of rows of {logits:?}").into());
        }
        let to = self.numbers("told", &told.as_ref(), 2 * rows as usize)?;
        let from = self.numbers("logits", logits, logits.numel())?;
        let places = places.data_ptr() as u64;
        let mut launch = self.cuda.launch_builder(&self.tell_largest);
        launch.arg(&to).arg(&from).arg(&places).arg(&rows).arg(&part).arg(&first);
        // SAFETY: the kernel takes these in this order. It writes two numbers for each row, and reads a place
        // for each, and what lies there if that is within its row.
        self.launch(blocks(rows as usize)?, |shape| unsafe { launch.launch(shape).map(drop) })
    }

    /// The token of the largest logit of each row, `i32`, out of what each rank [told](Self::tell_largest), one
    /// behind the other; −1 where one is NaN. Both are contiguous.
    pub fn choose_largest(
        &self,
        tokens: &mut TensorMut<'_>,
        told: &TensorRef<'_>,
        ranks: usize,
    ) -> Result<()> {
        let rows = tokens.numel();
        if told.numel() != 2 * rows * ranks || ranks == 0 || !self.are_indices(&tokens.as_ref()) {
            return Err(format!("tokens {tokens:?} out of {told:?} of {ranks} ranks").into());
        }
        let from = self.numbers("told", told, told.numel())?;
        let (to, count, ranks) = (tokens.data_ptr() as u64, u32::try_from(rows)?, u32::try_from(ranks)?);
        let mut launch = self.cuda.launch_builder(&self.choose_largest);
        launch.arg(&to).arg(&from).arg(&count).arg(&ranks);
        // SAFETY: the kernel takes these in this order; it writes a token for each row, and reads two numbers of
        // each rank for it.
        self.launch(blocks(rows)?, |shape| unsafe { launch.launch(shape).map(drop) })
    }

    /// `1 / (1 + exp(-x))` in place of each number of a contiguous `f32` tensor.
    pub fn sigmoid(&self, numbers: &mut TensorMut<'_>) -> Result<()> {
        let count = numbers.numel();
        let data = self.numbers("numbers", &numbers.as_ref(), count)?;
        let mut launch = self.cuda.launch_builder(&self.sigmoid);
        let numbers = count as u64;
        launch.arg(&data).arg(&numbers);
        // SAFETY: the kernel takes an address and a count; so many numbers are there.
        self.launch(blocks(count)?, |shape| unsafe { launch.launch(shape).map(drop) })
    }

    /// `cap · tanh(x / cap)` in place of each number of a contiguous `f32` tensor.
    pub fn soft_cap(&self, numbers: &mut TensorMut<'_>, cap: f32) -> Result<()> {
        let count = numbers.numel();
        let data = self.numbers("numbers", &numbers.as_ref(), count)?;
        let mut launch = self.cuda.launch_builder(&self.soft_cap);
        let numbers = count as u64;
        launch.arg(&data).arg(&numbers).arg(&cap);
        // SAFETY: the kernel takes an address, a count and the cap; so many numbers are there.
        self.launch(blocks(count)?, |shape| unsafe { launch.launch(shape).map(drop) })
    }

    /// Edits the logit of one token of each row anew. `logits` are those of the model, and `edited` what
    /// became of them, of the same shape, both `f32` and contiguous. `chosen` is what the step before
    /// chose, row by row, `i32`. Rows whose token was not chosen, as there were no numbers, stay.
    pub fn edit_last(
        &self,
        edited: &mut TensorMut<'_>,
        logits: &TensorRef<'_>,
        edits: &LastEdits,
        chosen: &TensorRef<'_>,
    ) -> Result<()> {
        let ([count, vocab], count_of_logits) = (matrix(logits)?, logits.numel());
        let fits = edited.shape() == logits.shape() && edits.rows() >= count as usize;
        let (indices, room, rows) =
            (edits.indices(), u32::try_from(edits.rows())?, u32::try_from(chosen.numel())?);
        if !(fits && self.are_indices(&indices) && self.are_indices(chosen)) {
            return Err(
                format!("last edits of {room} rows, by {chosen:?}, of {logits:?} in {edited:?}").into()
            );
        }
        let to = self.numbers("edited", &edited.as_ref(), count_of_logits)?;
        let from = self.numbers("logits", logits, count_of_logits)?;
        let numbers = self.numbers("edits", &edits.numbers(), 2 * edits.rows())?;
        let [indices, chosen] = [&indices, chosen].map(|tensor| tensor.data_ptr() as u64);
        let mut launch = self.cuda.launch_builder(&self.edit_last);
        launch.arg(&to).arg(&from).arg(&vocab).arg(&indices).arg(&numbers).arg(&room).arg(&chosen).arg(&rows);
        // SAFETY: the kernel takes these in this order. It reads and writes a logit of each row, of a
        // token below `vocab`; of `chosen` none but its rows; and of the edits those of rows that there
        // is room for, and of the others those that are set, which is all that the places of rows name.
        self.launch(count, |shape| unsafe { launch.launch(shape).map(drop) })
    }

    /// Copies the numbers of a contiguous tensor to one of the same shape and type.
    pub fn copy(&self, from: &TensorRef<'_>, to: &mut TensorMut<'_>) -> Result<()> {
        let fits = from.shape() == to.shape()
            && from.dtype() == to.dtype()
            && from.is_contiguous()
            && to.is_contiguous()
            && self.is_here(from)
            && self.is_here(&to.as_ref());
        if !fits {
            return Err(format!("a copy of {from:?} to {to:?}").into());
        }
        let bytes = from.numel() * from.dtype().size();
        let (from, to) = (from.data_ptr() as u64, to.data_ptr() as u64);
        // SAFETY: both have so many bytes, on the stream's device.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.cuda.cu_stream())? };
        Ok(())
    }

    /// Rows of a contiguous matrix of the kernels' type, and their width in eights.
    fn rows(&self, name: &str, tensor: &TensorRef<'_>) -> Result<[u32; 2]> {
        let width = tensor.shape().last().map_or(0, |&width| width as usize);
        let fits = tensor.dtype() == self.dtype
            && tensor.is_contiguous()
            && width.is_multiple_of(VECTOR)
            && tensor.data_ptr().addr().is_multiple_of(2 * VECTOR)
            && self.is_here(tensor);
        let rows = tensor.numel().checked_div(width).map(u32::try_from);
        match (rows, u32::try_from(width / VECTOR)) {
            (Some(Ok(rows)), Ok(width)) if fits => Ok([rows, width]),
            _ => Err(format!("{name} is {tensor:?}; expected rows of {VECTOR}s of {}", self.dtype).into()),
        }
    }

    /// The address of at least so many `f32` numbers.
    fn numbers(&self, name: &str, tensor: &TensorRef<'_>, count: usize) -> Result<u64> {
        let fits = tensor.dtype() == DType::F32 && tensor.is_contiguous() && tensor.numel() >= count;
        match fits && self.is_here(tensor) {
            true => Ok(tensor.data_ptr() as u64),
            false => Err(format!("{name} is {tensor:?}; expected {count} numbers of f32").into()),
        }
    }

    /// Whether these are contiguous numbers of `i32` that kernels can read.
    fn are_indices(&self, tensor: &TensorRef<'_>) -> bool {
        tensor.dtype() == DType::I32 && tensor.is_contiguous() && self.is_here(tensor)
    }

    fn is_here(&self, tensor: &TensorRef<'_>) -> bool {
        tensor.device() == Device::Cuda(self.cuda.context().ordinal() as u32)
    }

    fn launch(
        &self,
        blocks: u32,
        launch: impl FnOnce(LaunchConfig) -> std::result::Result<(), DriverError>,
    ) -> Result<()> {
        if blocks == 0 {
            return Ok(());
        }
        let shape =
            LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        Ok(launch(shape)?)
    }
}

/// Rows and columns of a matrix.
fn matrix(tensor: &TensorRef<'_>) -> Result<[u32; 2]> {
    match *tensor.shape() {
        [rows, columns] if columns > 0 => Ok([u32::try_from(rows)?, u32::try_from(columns)?]),
        _ => Err(format!("{tensor:?} is no matrix").into()),
    }
}

/// Blocks of a thread for each number.
fn blocks(count: usize) -> Result<u32> {
    Ok(u32::try_from(count.div_ceil(THREADS as usize))?)
}
