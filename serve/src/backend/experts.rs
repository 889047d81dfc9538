//! The choice of experts on the GPU.
//!
//! The host does not know which experts a token has, and a captured graph could
//! not depend on it, so all of them compute every token. Experts that a token does
//! not have are left out by a share of 0: FlashInfer's `softmax` of the scores,
//! of which `top_k_renorm_probs` keeps the highest, is the share of each. What an
//! expert makes of a token between its two products is multiplied by that, with a
//! kernel of this example's own; the second product, whose weights are those of
//! all experts side by side, adds up what is left.

use std::sync::Arc;

use cudarc::{
    driver::{CudaFunction, CudaSlice, CudaStream, LaunchConfig, PushKernelArg},
    nvrtc::Ptx,
};
use flashinfer_rs::{
    DType, Stream, TensorMut,
    cudarc::{SliceMut, TensorExtMut},
    sampling::{SamplingWorkspace, SoftmaxOptions, softmax, top_k_renorm_probs},
};

use crate::{Result, model::config::Experts};

/// Of a block, which multiplies a row.
const THREADS: u32 = 256;

/// Memory for the choice, for as many rows as there may be.
pub struct Routing {
    experts: Experts,
    /// The router's scores, and then the shares.
    scores: CudaSlice<f32>,
    probs: CudaSlice<f32>,
    workspace: SamplingWorkspace,
    scale_rows: CudaFunction,
}

/// That memory while it is borrowed for a number of rows.
pub struct RoutingSlices<'t> {
    cuda: &'t Arc<CudaStream>,
    experts: Experts,
    scores: SliceMut<'t>,
    probs: SliceMut<'t>,
    workspace: &'t mut SamplingWorkspace,
    scale_rows: &'t CudaFunction,
}

/// Views of it.
pub struct RoutingTensors<'t> {
    cuda: &'t Arc<CudaStream>,
    experts: Experts,
    /// What the router says of rows and experts, and after a choice the experts'
    /// shares.
    pub scores: TensorMut<'t>,
    probs: TensorMut<'t>,
    workspace: &'t mut SamplingWorkspace,
    scale_rows: &'t CudaFunction,
}

impl Routing {
    /// Has the kernel compiled.
    pub fn new(cuda: &Arc<CudaStream>, experts: Experts, rows: usize) -> Result<Self> {
        let module = cuda.context().load_module(Ptx::from_src(include_str!("experts.ptx")))?;
        Ok(Self {
            experts,
            scores: cuda.alloc_zeros(rows * experts.count)?,
            probs: cuda.alloc_zeros(rows * experts.count)?,
            workspace: SamplingWorkspace::new(&Stream::from(cuda), rows, experts.count)?,
            scale_rows: module.load_function("scale_rows")?,
        })
    }

    /// Borrows it for work on the stream.
    pub fn slices<'t>(&'t mut self, cuda: &'t Arc<CudaStream>, rows: usize) -> Result<RoutingSlices<'t>> {
        let shape = [rows, self.experts.count];
        Ok(RoutingSlices {
            cuda,
            experts: self.experts,
            scores: self.scores.tensor_mut(cuda, &shape)?,
            probs: self.probs.tensor_mut(cuda, &shape)?,
            workspace: &mut self.workspace,
            scale_rows: &self.scale_rows,
        })
    }
}

impl RoutingSlices<'_> {
    pub fn tensors(&mut self) -> RoutingTensors<'_> {
        RoutingTensors {
            cuda: self.cuda,
            experts: self.experts,
            scores: self.scores.view_mut(),
            probs: self.probs.view_mut(),
            workspace: self.workspace,
            scale_rows: self.scale_rows,
        }
    }
}

impl RoutingTensors<'_> {
    /// Replaces scores by shares, in so many rows.
    pub fn choose(&mut self, rows: usize) -> Result<()> {
        let mut probs = self.probs.reborrow().narrow(0, 0, rows)?;
        let scores = self.scores.as_ref().narrow(0, 0, rows)?;
        softmax(self.workspace, &mut probs, &scores, &SoftmaxOptions::default())?;
        let mut shares = self.scores.reborrow().narrow(0, 0, rows)?;
        let used = self.experts.used as u32;
        Ok(top_k_renorm_probs(self.workspace, &mut shares, &probs.as_ref(), used.into())?)
    }

    /// Multiplies what experts made of rows, `f16`, by their shares: the experts of
    /// a row stand together.
    pub fn share(&self, inner: &mut TensorMut<'_>) -> Result<()> {
        let shares = self.scores.as_ref();
        let [rows, width] = *inner.shape() else {
            return Err(format!("what experts made is {inner:?}").into());
        };
        let fits = inner.dtype() == DType::F16
            && inner.is_contiguous()
            && inner.device() == shares.device()
            && (0..=shares.numel() as i64).contains(&rows)
            && width % 2 == 0
            && inner.data_ptr().addr().is_multiple_of(size_of::<u32>());
        if !fits {
            return Err(format!("what experts made is {inner:?}, and their shares are {shares:?}").into());
        }
        let (Ok(blocks), Ok(pairs)) = (u32::try_from(rows), u32::try_from(width / 2)) else {
            return Err(format!("what experts made is too large: {inner:?}").into());
        };
        if blocks == 0 {
            return Ok(());
        }
        let (data, factors) = (inner.data_ptr() as u64, shares.data_ptr() as u64);
        let shape =
            LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the kernel takes two addresses and a 32-bit number. It reads a
        // share for each row, and writes the pairs of as many rows, which there
        // are: both were checked. They are used on this stream.
        unsafe {
            self.cuda.launch_builder(self.scale_rows).arg(&data).arg(&factors).arg(&pairs).launch(shape)?
        };
        Ok(())
    }
}
