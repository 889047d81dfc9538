//! Numbers of rows that a kernel gathers, on the GPU.

use cudarc::driver::CudaStream;
use flashinfer_rs::{Stream, TensorRef, gpu::Tensor};

use super::memory::Pinned;
use crate::Result;

/// Numbers below a bound, at an address that stays, so that a captured graph reads
/// those that were set last.
pub struct Rows {
    bound: usize,
    device: Tensor<i32>,
    host: Pinned<i32>,
}

impl Rows {
    /// No rows, with room for so many; of a matrix of `bound` rows.
    pub fn new(cuda: &CudaStream, stream: &Stream, capacity: usize, bound: usize) -> Result<Self> {
        i32::try_from(bound).map_err(|_| format!("a matrix of {bound} rows; expected less than 2^31"))?;
        Ok(Self { bound, device: Tensor::zeros(stream, &[capacity])?, host: Pinned::zeros(cuda, capacity)? })
    }

    /// What all are below.
    pub fn bound(&self) -> usize {
        self.bound
    }

    /// Uploads numbers, and then as many that stand for a row of zeros as make
    /// `len` of them.
    ///
    /// # Errors
    /// One is not below the bound; there are more than `len`, or than there is
    /// room for. Then nothing was uploaded.
    pub fn set(&mut self, cuda: &CudaStream, rows: &[usize], len: usize) -> Result<()> {
        if let Some(row) = rows.iter().find(|&&row| row >= self.bound) {
            return Err(format!("row {row} of a matrix of {}", self.bound).into());
        }
        let host = self.host.as_mut_slice()?;
        if rows.len() > len || len > host.len() {
            return Err(format!("{} rows of {len}; there is room for {}", rows.len(), host.len()).into());
        }
        host[..len].fill(-1);
        host.iter_mut().zip(rows).for_each(|(to, &row)| *to = row as i32);
        self.host.upload(cuda, &mut self.device, len)
    }

    /// The numbers, of as many rows as there is room for.
    pub fn view(&self) -> TensorRef<'_> {
        self.device.view()
    }
}
