//! The next token of each request.

use std::ffi::c_void;

use flashinfer_rs::{
    DType, Device, Result, Stream, TensorMut, TensorRef,
    sampling::{self, Parameter, SampleOptions},
};

/// A row of numbers, and what is drawn by, for each request.
#[derive(Clone, Copy)]
pub struct Logits {
    /// `f32`, `[rows, vocab]`; of no use afterwards.
    pub logits: *mut c_void,
    /// `f32` of at least 0 and below 1, one for each row.
    pub uniforms: *const c_void,
    /// `f32`; 0 takes the likeliest token.
    pub temperatures: *const c_void,
    /// `i32`; 0 keeps all.
    pub top_ks: *const c_void,
    pub rows: usize,
    pub vocab: usize,
}

impl Logits {
    /// Temperature, top-k of each row, and top-p of all.
    ///
    /// # Safety
    /// As [`TensorRef::from_raw_parts`], for all parameters.
    pub unsafe fn options<'a>(&self, device: Device) -> Result<SampleOptions<'a>> {
        // SAFETY: promised by the caller.
        let of_rows =
            |data, dtype| unsafe { TensorRef::from_raw_parts(data, device, dtype, &[self.rows], None) };
        let mut options = SampleOptions::new(of_rows(self.uniforms, DType::F32)?);
        options.temperature = Parameter::PerRow(of_rows(self.temperatures, DType::F32)?);
        options.top_k = Parameter::PerRow(of_rows(self.top_ks, DType::I32)?);
        options.top_p = 0.9.into();
        Ok(options)
    }
}

/// Writes `i32` tokens, one for each row; −1 where no token is allowed.
///
/// # Safety
/// All memory is on the stream's device, as large as `batch` says, and stays until the stream is
/// done. Nobody else uses the logits and the tokens meanwhile, or writes the rest.
pub unsafe fn sample(stream: &Stream, batch: &Logits, tokens: *mut c_void) -> Result<()> {
    let (device, shape) = (stream.device(), [batch.rows, batch.vocab]);
    // SAFETY: promised by the caller.
    let (mut logits, mut tokens, options) = unsafe {
        (
            TensorMut::from_raw_parts(batch.logits, device, DType::F32, &shape, None)?,
            TensorMut::from_raw_parts(tokens, device, DType::I32, &shape[..1], None)?,
            batch.options(device)?,
        )
    };
    sampling::sample(stream, &mut tokens, &mut logits, &options)
}
