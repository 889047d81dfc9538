//! Kernels' own checks on the CPU path.

use std::{cell::Cell, marker::PhantomData};

use crate::{error::Result, ops::check::Check};

thread_local! {
    static STRICT: Cell<bool> = const { Cell::new(false) };
}

/// Makes the operations of [`reference`](super) refuse what their kernels refuse, in this thread,
/// until the guard is dropped: dtypes, shapes, strides, alignment, head dimensions and options, by
/// the same checks and in the same words.
///
/// A program that has a CPU path and a GPU path is tested with it where there is no GPU: what
/// passes does not fail on the GPU for its tensors. What only a GPU can tell is not known here: its
/// compute capability, how much shared memory a row may take, whether it has a module, and how
/// large a workspace must be.
///
/// It holds for every operation here.
///
/// ```
/// use flashinfer_rs::{TensorMut, TensorRef, norm::NormOptions, reference};
/// let norm = |out: &mut [f32]| {
///     let (input, weight) = ([3.0f32, 4.0], [1.0f32, 2.0]);
///     reference::rmsnorm(
///         &mut TensorMut::from_slice(out, &[1, 2])?,
///         &TensorRef::from_slice(&input, &[1, 2])?,
///         &TensorRef::from_slice(&weight, &[2])?,
///         &NormOptions::default(),
///     )
/// };
/// norm(&mut [0.0; 2])?;
/// let strict = reference::strict();
/// let error = norm(&mut [0.0; 2]).unwrap_err();
/// assert_eq!(error.to_string(), "rmsnorm: input: its dtype is f32; expected f16 or bf16");
/// drop(strict);
/// norm(&mut [0.0; 2])?;
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
pub fn strict() -> Strict {
    Strict { before: STRICT.replace(true), of_this_thread: PhantomData }
}

/// Keeps a thread strict; see [`strict`].
#[derive(Debug)]
#[must_use = "the thread is strict until this is dropped"]
pub struct Strict {
    before: bool,
    of_this_thread: PhantomData<*const ()>,
}

impl Drop for Strict {
    fn drop(&mut self) {
        STRICT.set(self.before);
    }
}

/// Runs a kernel's checks where the thread is strict.
pub(super) fn as_kernel<T>(op: &'static str, checks: impl FnOnce(&Check<'_>) -> Result<T>) -> Result<()> {
    if STRICT.get() { checks(&Check::on_host(op)).map(drop) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
