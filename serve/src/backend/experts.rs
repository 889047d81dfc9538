//! The choice of experts on the GPU.
//!
//! The host does not know which experts a token has, and a captured graph could
//! not depend on it, so all of them compute every token. Experts that a token does
//! not have are left out by a share of 0: `top_k_renorm_probs` keeps the highest of
//! what FlashInfer's `softmax`, or a sigmoid, makes of the scores. What an expert makes of a token between its two products is multiplied by that; the
//! second product, whose weights are those of all experts side by side, adds up
//! what is left.

use flashinfer_rs::{
    Stream, TensorMut, TensorRef,
    gpu::Tensor,
    sampling::{SamplingWorkspace, SoftmaxOptions, softmax, top_k_renorm_probs},
};

use crate::{
    Result,
    backend::gpu::kernels::Kernels,
    model::config::{Experts, Gating},
};

/// Memory for the choice, for as many rows as there may be.
pub struct Routing {
    experts: Experts,
    /// The router's scores, and then the shares.
    scores: Tensor<f32>,
    probs: Tensor<f32>,
    workspace: SamplingWorkspace,
}

impl Routing {
    pub fn new(stream: &Stream, experts: Experts, rows: usize) -> Result<Self> {
        let shape = [rows, experts.count];
        Ok(Self {
            experts,
            scores: Tensor::zeros(stream, &shape)?,
            probs: Tensor::zeros(stream, &shape)?,
            workspace: SamplingWorkspace::new(stream, rows, experts.count)?,
        })
    }

    /// Where a router's scores of so many rows go.
    pub fn scores_mut(&mut self, rows: usize) -> Result<TensorMut<'_>> {
        Ok(self.scores.view_mut().narrow(0, 0, rows)?)
    }

    /// Replaces scores by shares, in so many rows.
    pub fn choose(&mut self, kernels: &Kernels, rows: usize) -> Result<()> {
        let Self { experts, scores, probs, workspace } = self;
        let mut scores = scores.view_mut().narrow(0, 0, rows)?;
        let mut probs = probs.view_mut().narrow(0, 0, rows)?;
        match experts.gating {
            Gating::Softmax => {
                softmax(workspace, &mut probs, &scores.as_ref(), &SoftmaxOptions::default())?;
            }
            Gating::Sigmoid => {
                kernels.sigmoid(&mut scores)?;
                kernels.copy(&scores.as_ref(), &mut probs)?;
            }
        }
        let used = experts.used as u32;
        top_k_renorm_probs(workspace, &mut scores, &probs.as_ref(), used.into())?;
        match experts.normalize {
            true => Ok(()),
            false => kernels.keep_chosen(&mut scores, &probs.as_ref()),
        }
    }

    /// The shares that were chosen: one for each row and expert.
    pub fn shares(&self) -> TensorRef<'_> {
        self.scores.view()
    }
}
