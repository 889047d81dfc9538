//! Penalties, biases and bans before tokens are drawn, by a kernel of this crate.

use std::ffi::c_void;

use super::check_rows;
use crate::{
    cuda::PtxKernel, dtype::DType, error::Result, indices::LogitEditTable, ops::check::Check,
    runtime::FlashInferRuntime, stream::Stream, tensor::TensorMut,
};

static EDIT_LOGITS: PtxKernel =
    PtxKernel::new(concat!(include_str!("edit_logits.ptx"), "\0"), c"edit_logits");
const THREADS: u32 = 256;

/// Changes some logits of each row, in place: penalties, biases, banned tokens; see
/// [`LogitEdit`](crate::indices::LogitEdit).
///
/// `logits` is `[rows, vocab]`, `f32`, contiguous, with a row for each of the table's, and no
/// fewer tokens than the table's. Logits that are NaN stay so, and −∞ stays −∞. In a captured
/// CUDA graph the edits are those that the table has when the graph is replayed.
///
/// Call once before the first capture into a CUDA graph, because the first call compiles the
/// kernel.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) before anything is launched: a
/// device, stream, dtype, shape, stride or alignment does not fit, there are 2³² elements, the
/// table is of another stream, or of other rows or more tokens, or the stream is being captured
/// and the kernel is not compiled yet. Else what CUDA said.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{Stream, gpu::Tensor, sampling::edit_logits};
/// use flashinfer_rs::indices::{LogitEdit, LogitEditTable, LogitEdits};
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// let (rows, vocab) = (2, 32000);
/// let mut logits = Tensor::<f32>::zeros(&stream, &[rows, vocab])?;
/// // Token 2 must not come in the first row; 17 was there before.
/// let edits = [vec![LogitEdit::ban(2), LogitEdit { token: 17, repetition_penalty: 1.1, bias: -0.5 }], vec![]];
/// let edits = LogitEdits::new(vocab, edits)?;
/// let table = LogitEditTable::new(&stream, edits)?;
/// edit_logits(&stream, &mut logits.view_mut(), &table)?;
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
pub fn edit_logits(stream: &Stream, logits: &mut TensorMut<'_>, edits: &LogitEditTable) -> Result<()> {
    let check = Check::new("edit_logits", stream)?;
    let vocab = check_rows(&check, "logits", &logits.raw, &[DType::F32], 2)?;
    let rows = logits.raw.shape()[0];
    check.on_stream("edits", edits.stream())?;
    edits.host().check_fits([rows, vocab]).or_else(|problem| check.fail("edits", problem))?;
    if rows == 0 {
        return Ok(());
    }
    check.compiled("logits", &EDIT_LOGITS)?;
    let mut data = logits.raw.data;
    let [mut indptr, mut tokens, mut edits] = edits.addresses();
    let mut vocab = vocab as u32;
    let mut args: [*mut c_void; 5] = [
        (&raw mut data).cast(),
        (&raw mut indptr).cast(),
        (&raw mut tokens).cast(),
        (&raw mut edits).cast(),
        (&raw mut vocab).cast(),
    ];
    // SAFETY: the kernel takes four addresses and a 32-bit number. The table has offsets of as
    // many rows, as many tokens and pairs of numbers as they say, and tokens below `vocab`, of
    // which no row has one twice; this is checked on the host, and its updates keep it.
    unsafe {
        EDIT_LOGITS.launch(
            FlashInferRuntime::get()?.cuda(),
            stream,
            [rows as u32, THREADS],
            &mut args,
            &[Some(&logits.raw)],
        )
    }
}
