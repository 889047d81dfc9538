//! What multiplies rows by weights: cuBLASLt, and kernels of our own for few rows.

use std::sync::Arc;

use cudarc::{
    cublaslt,
    driver::{CudaStream, sys},
};
use flashinfer_rs::{DType, FlashInferRuntime, Stream, TensorMut, TensorRef, artifacts::Digest, gpu::Tensor};

use super::{
    choices::{Choices, Gain, ProductChoice},
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
    /// What was the fastest before.
    choices: Choices,
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
            choices: Choices::open(
                &FlashInferRuntime::get()?.store().cache_dir().join("products"),
                measured_on(cuda)?,
            ),
        })
    }

    /// Keeps what was measured for later starts.
    pub fn save_choices(&mut self) {
        self.choices.save();
    }

    /// What rounds to `e4m3`, if weights are of it.
    pub fn quantizer(&self) -> Option<&Quantizer> {
        self.e4m3.as_ref().map(|e4m3| &e4m3.quantizer)
    }

    /// [`Matmul::run`] of 16-bit rows. If the product is of `e4m3`, they are rounded to it first,
    /// unless they are few.
    pub fn run(
        &mut self,
        product: &StepProduct,
        out: &mut TensorMut<'_>,
        x: &TensorRef<'_>,
        weight: &Weight<'_>,
    ) -> Result<()> {
        self.run_with(&product.matmul, product.few_rows(), out, x, weight)
    }

    fn run_with(
        &mut self,
        matmul: &Matmul,
        few_rows: Option<usize>,
        out: &mut TensorMut<'_>,
        x: &TensorRef<'_>,
        weight: &Weight<'_>,
    ) -> Result<()> {
        let (product, scratch) = (matmul.product(), &mut self.scratch.view_mut());
        match (&self.few_rows, few_rows, &mut self.e4m3) {
            (Some(kernels), Some(kernel), _) => {
                kernels.run(kernel, product, &Fused::default(), out, x, weight)
            }
            (_, _, Some(e4m3)) if product.dtype == DType::E4M3 => {
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
        let (matrices, kernel) = (product.product(), product.gain.map_or(0, |gain| gain.kernel));
        let few_rows = self.few_rows(matrices).ok_or_else(|| format!("{matrices:?} cannot be fused"))?;
        few_rows.run(kernel, matrices, fused, out, x, weight)
    }

    /// Whether the rows of a product can be normed in its kernel, and that pays.
    pub fn norms(&self, product: &StepProduct) -> bool {
        self.few_rows(product.product()).is_some_and(|few_rows| few_rows.norms(product.product()))
    }

    /// What computes few rows as they are, if it serves a product.
    pub fn few_rows(&self, product: &Product) -> Option<&FewRows> {
        self.few_rows.as_ref().filter(|few_rows| few_rows.serves(product))
    }
}

/// A product of steps, and which kernels compute it.
pub struct StepProduct {
    matmul: Matmul,
    /// What the fastest of [`FewRows`] gains, once that was measured.
    gain: Option<Gain>,
}

impl From<Matmul> for StepProduct {
    fn from(matmul: Matmul) -> Self {
        Self { matmul, gain: None }
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
        if self.matmul.is_tuned() {
            return Ok(());
        }
        let kernels = multiplier.few_rows(self.product()).map_or(0, FewRows::kernels);
        let key = key(self.product());
        let known = multiplier.choices.get(&key).filter(|known| known.is_among(kernels));
        if let Some(ProductChoice { algorithm, gain }) = known
            && self.matmul.choose(algorithm)
        {
            self.gain = gain;
            return Ok(());
        }
        let mut run = |matmul: &Matmul, few_rows: Option<usize>| {
            let mut weights = weights.clone();
            weights.try_for_each(|weight| multiplier.run_with(matmul, few_rows, &mut out, x, &weight))
        };
        let time = self.matmul.tune(|matmul| run(matmul, None))?;
        let (mut gain, mut best) = (None, time);
        for kernel in 0..kernels {
            let taken = self.matmul.time(best, &mut |matmul| run(matmul, Some(kernel)))?;
            if gain.is_none_or(|gain: Gain| time - taken > gain.milliseconds) {
                gain = Some(Gain { kernel, milliseconds: time - taken });
            }
            best = best.min(taken);
        }
        self.gain = gain;
        let choice = ProductChoice { algorithm: self.matmul.algorithm(), gain };
        multiplier.choices.insert(key, choice);
        Ok(())
    }

    /// The kernel for few rows, if it is faster than cuBLASLt's.
    fn few_rows(&self) -> Option<usize> {
        self.gain.filter(|gain| gain.milliseconds > 0.0).map(|gain| gain.kernel)
    }

    /// Whether cuBLASLt computes it.
    pub fn is_cublaslt(&self) -> bool {
        self.few_rows().is_none()
    }

    /// What is multiplied.
    pub fn product(&self) -> &Product {
        self.matmul.product()
    }

    /// The milliseconds that kernels for few rows take less for all layers; `None` if there are
    /// none for it, or that was not measured.
    pub fn gain(&self) -> Option<f32> {
        self.gain.map(|gain| gain.milliseconds)
    }
}

/// What tells products apart whose kernels may differ.
fn key(product: &Product) -> String {
    let Product { rows, input, output, added, dtype, out_dtype, factor: _ } = product;
    format!("{rows} rows of {input} {dtype}, {output} {out_dtype}, added: {added:?}")
}

/// What the times of kernels depend on.
fn measured_on(cuda: &CudaStream) -> Result<String> {
    let mut driver = 0;
    // SAFETY: one number is written.
    unsafe { sys::cuDriverGetVersion(&mut driver).result()? };
    // SAFETY: the library is open, and the function only returns a number.
    let cublas = unsafe { cublaslt::sys::cublasLtGetVersion() };
    let (name, version) = (cuda.context().name()?, env!("CARGO_PKG_VERSION"));
    let kernels = Digest::of(FewRows::PTX.as_bytes()).to_string();
    let kernels = &kernels[..12];
    Ok(format!("{name}, driver {driver}, cuBLASLt {cublas}, flashinfer {version}, kernels {kernels}"))
}
