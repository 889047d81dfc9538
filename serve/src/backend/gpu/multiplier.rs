//! What multiplies rows by weights: cuBLASLt, and kernels of our own for few rows.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use flashinfer_rs::{DType, Stream, TensorMut, TensorRef, gpu::Tensor};

use super::{
    few_rows::{FewRows, Fused},
    heads::HeadWidths,
    quantize::{QuantizedRows, Quantizer},
};
use crate::{
    Result,
    backend::matmul::{Choice, Matmul, Product, Weight},
    model::Config,
};

/// Scratch memory of products: what cuBLASLt is recommended to have on Hopper.
pub const SCRATCH_BYTES: usize = 32 << 20;

/// What computes the products of steps, and the memory for it.
pub struct Multiplier {
    scratch: Tensor<u8>,
    /// Computes few rows as they are, unless each is to be as it is among many.
    few_rows: Option<FewRows>,
    /// If weights are of `e4m3`.
    e4m3: Option<E4m3Multiplier>,
}

/// What weights of `e4m3` are multiplied by.
struct E4m3Multiplier {
    quantizer: Quantizer,
    /// The rows of a product, rounded.
    quantized: QuantizedRows,
}

impl Multiplier {
    /// For products of up to so many rows, with matrices of `weights`.
    pub fn new(
        cuda: &Arc<CudaStream>,
        config: &Config,
        widths: HeadWidths,
        weights: DType,
        rows: usize,
        choice: Choice,
    ) -> Result<Self> {
        let stream = Stream::from(cuda);
        let e4m3 = || -> Result<_> {
            let inner = config.num_experts() * config.intermediate_size;
            let shared = config.experts.and_then(|experts| experts.shared).unwrap_or(0);
            let qo = config.heads.num_qo_heads * widths.padded;
            let width = config.hidden_size.max(qo).max(inner).max(shared);
            Ok(E4m3Multiplier {
                quantizer: Quantizer::new(cuda, config.dtype)?,
                quantized: QuantizedRows::zeros(&stream, rows, rows * width)?,
            })
        };
        let few_rows = match choice {
            Choice::Fastest => FewRows::new(cuda, config.dtype)?,
            Choice::AnyRows(_) => None,
        };
        Ok(Self {
            scratch: Tensor::zeros(&stream, &[SCRATCH_BYTES])?,
            few_rows,
            e4m3: (weights == DType::E4M3).then(e4m3).transpose()?,
        })
    }

    /// What rounds to `e4m3`, if weights are of it.
    pub fn quantizer(&self) -> Option<&Quantizer> {
        self.e4m3.as_ref().map(|e4m3| &e4m3.quantizer)
    }

    /// [`Matmul::run`] of 16-bit rows. If the product is of `e4m3`, they are rounded to it first,
    /// unless they are few.
    pub fn run(
        &mut self,
        StepProduct { matmul, few_rows, .. }: &StepProduct,
        out: &mut TensorMut<'_>,
        x: &TensorRef<'_>,
        weight: &Weight<'_>,
    ) -> Result<()> {
        self.run_with(matmul, *few_rows, out, x, weight)
    }

    fn run_with(
        &mut self,
        matmul: &Matmul,
        few_rows: bool,
        out: &mut TensorMut<'_>,
        x: &TensorRef<'_>,
        weight: &Weight<'_>,
    ) -> Result<()> {
        let (product, scratch) = (matmul.product(), &mut self.scratch.view_mut());
        match (&self.few_rows, &mut self.e4m3) {
            (Some(kernels), _) if few_rows => kernels.run(product, &Fused::default(), out, x, weight),
            (_, Some(e4m3)) if product.dtype == DType::E4M3 => {
                let x = e4m3.quantizer.quantize(&mut e4m3.quantized, x, product.rows)?;
                matmul.run(out, &x, weight, scratch)
            }
            _ => matmul.run(out, &(*x).into(), weight, scratch),
        }
    }

    /// A product of few rows, and what is fused with it.
    ///
    /// # Errors
    /// Those of [`FewRows::run`]; there are no kernels for the product.
    pub fn run_fused(
        &self,
        product: &StepProduct,
        fused: &Fused<'_>,
        out: &mut TensorMut<'_>,
        x: &TensorRef<'_>,
        weight: &Weight<'_>,
    ) -> Result<()> {
        let product = product.product();
        let few_rows = self.few_rows(product).ok_or_else(|| format!("{product:?} cannot be fused"))?;
        few_rows.run(product, fused, out, x, weight)
    }

    /// What computes few rows as they are, if it serves a product.
    pub fn few_rows(&self, product: &Product) -> Option<&FewRows> {
        self.few_rows.as_ref().filter(|few_rows| few_rows.serves(product))
    }
}

/// A product of steps, and which kernels compute it.
pub struct StepProduct {
    matmul: Matmul,
    /// Those of [`FewRows`], which are faster.
    few_rows: bool,
    /// The milliseconds that those of [`FewRows`] take less for all layers, once that was measured.
    gain: Option<f32>,
}

impl From<Matmul> for StepProduct {
    fn from(matmul: Matmul) -> Self {
        Self { matmul, few_rows: false, gain: None }
    }
}

impl StepProduct {
    /// Takes the fastest kernels for a product of `x` with each of these weights, once. What is in
    /// `out` is lost.
    pub fn tune<'w>(
        &mut self,
        multiplier: &mut Multiplier,
        mut out: TensorMut<'_>,
        x: &TensorRef<'_>,
        weights: impl Iterator<Item = Weight<'w>> + Clone,
    ) -> Result<()> {
        let has_few_rows = multiplier.few_rows(self.product()).is_some();
        let mut run = |matmul: &Matmul, few_rows: bool| {
            let mut weights = weights.clone();
            weights.try_for_each(|weight| multiplier.run_with(matmul, few_rows, &mut out, x, &weight))
        };
        let Some(time) = self.matmul.tune(|matmul| run(matmul, false))? else { return Ok(()) };
        if has_few_rows {
            let gain = time - self.matmul.time(&mut |matmul| run(matmul, true))?;
            (self.few_rows, self.gain) = (gain > 0.0, Some(gain));
        }
        Ok(())
    }

    /// What is multiplied.
    pub fn product(&self) -> &Product {
        self.matmul.product()
    }

    /// The milliseconds that kernels for few rows take less for all layers; `None` if there are
    /// none for it, or that was not measured.
    pub fn gain(&self) -> Option<f32> {
        self.gain
    }
}
