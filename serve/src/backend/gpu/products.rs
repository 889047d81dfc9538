//! The products of activations and weights that a step has, and the fastest kernels for
//! them.

use std::{iter, rc::Rc, sync::Arc};

use cudarc::driver::CudaStream;
use flashinfer_rs::{DType, Stream, TensorMut, TensorRef, gpu::Tensor};

use super::{
    buffers::{Buffers, Outputs, SharedBuffers},
    few_rows::FewRows,
    heads::HeadWidths,
    quantize::{QuantizedRows, Quantizer},
    weights::{SharedExpert, Weights, added_factor},
};
use crate::{
    Result,
    backend::matmul::{Added, Choice, CublasLt, Matmul, Product, Weight},
    model::Config,
};

/// Scratch memory of products: what cuBLASLt is recommended to have on Hopper.
const SCRATCH_BYTES: usize = 32 << 20;

/// What computes the products of steps, and the memory for it.
pub struct Multiplier {
    scratch: Tensor<u8>,
    /// If weights are of `e4m3`.
    e4m3: Option<E4m3Multiplier>,
}

/// What weights of `e4m3` are multiplied by.
struct E4m3Multiplier {
    quantizer: Quantizer,
    /// The rows of a product, rounded.
    quantized: QuantizedRows,
    /// Computes few rows as they are, unless each is to be as it is among many.
    few_rows: Option<FewRows>,
}

/// A product of steps, and which kernels compute it.
pub struct StepProduct {
    matmul: Matmul,
    /// Those of [`FewRows`], which are faster.
    few_rows: bool,
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
                few_rows: (choice == Choice::Fastest)
                    .then(|| FewRows::new(cuda, config.dtype))
                    .transpose()?,
            })
        };
        Ok(Self {
            scratch: Tensor::zeros(&stream, &[SCRATCH_BYTES])?,
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
        StepProduct { matmul, few_rows }: &StepProduct,
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
        match &mut self.e4m3 {
            Some(E4m3Multiplier { few_rows: Some(kernels), .. }) if few_rows => {
                kernels.run(product, out, x, weight)
            }
            Some(e4m3) if product.dtype == DType::E4M3 => {
                let x = e4m3.quantizer.quantize(&mut e4m3.quantized, x, product.rows)?;
                matmul.run(out, &x, weight, scratch)
            }
            _ => matmul.run(out, &(*x).into(), weight, scratch),
        }
    }

    /// Whether [`FewRows`] can compute a product.
    fn has_few_rows(&self, product: &Product) -> bool {
        let few_rows = self.e4m3.as_ref().and_then(|e4m3| e4m3.few_rows.as_ref());
        few_rows.is_some_and(|few_rows| few_rows.serves(product))
    }
}

/// The products of all layers, for one number of rows.
pub struct Products {
    rows: usize,
    pub qkv: StepProduct,
    pub attention_output: StepProduct,
    pub router: Option<StepProduct>,
    pub gate_up: StepProduct,
    pub down: StepProduct,
    pub shared: Option<SharedProducts>,
}

/// Those of an expert that every token has.
pub struct SharedProducts {
    pub gate: StepProduct,
    pub gate_up: StepProduct,
    /// Added to what other experts make.
    pub down: StepProduct,
}

impl Products {
    /// With matrices of `weights`, but for those that score experts.
    pub fn new(
        cublas: &Rc<CublasLt>,
        config: &Config,
        widths: HeadWidths,
        weights: DType,
        rows: usize,
        choice: Choice,
    ) -> Result<Self> {
        let (hidden, out_dtype, biases) = (config.hidden_size, config.dtype, config.biases);
        let inner = config.num_experts() * config.intermediate_size;
        let [qo, kv] =
            [config.heads.num_qo_heads, config.heads.num_kv_heads].map(|heads| heads * widths.padded);
        let matmul = |product| Matmul::new(cublas, product, choice, SCRATCH_BYTES).map(StepProduct::from);
        let product = |input, output, factor, added| {
            matmul(Product { rows, input, output, factor, added, dtype: weights, out_dtype })
        };
        let bias = |biased: bool| if biased { Added::Bias } else { Added::Nothing };
        let factor = added_factor(config);
        let down_factor = factor * config.experts.map_or(1.0, |experts| experts.scale as f32);
        let scores = |output| {
            let (dtype, out_dtype) = (config.dtype, DType::F32);
            let (factor, added) = (1.0, Added::Nothing);
            matmul(Product { rows, input: hidden, output, factor, added, dtype, out_dtype })
        };
        let shared = config.experts.and_then(|experts| experts.shared).map(|inner| -> Result<_> {
            Ok(SharedProducts {
                gate: scores(1)?,
                gate_up: product(hidden, 2 * inner, 1.0, Added::Nothing)?,
                down: product(inner, hidden, factor, Added::Output)?,
            })
        });
        Ok(Self {
            rows,
            qkv: product(hidden, qo + 2 * kv, 1.0, bias(biases.qkv))?,
            attention_output: product(qo, hidden, factor, bias(biases.attention_output))?,
            router: config.experts.map(|experts| scores(experts.count)).transpose()?,
            gate_up: product(hidden, 2 * inner, 1.0, bias(biases.gate_up))?,
            down: product(inner, hidden, down_factor, bias(biases.down))?,
            shared: shared.transpose()?,
        })
    }

    /// Takes the fastest kernels, once. What is in the buffers is lost.
    pub fn tune(
        &mut self,
        weights: &Weights,
        buffers: &mut Buffers,
        multiplier: &mut Multiplier,
    ) -> Result<()> {
        let Buffers { x, qkv, attention, gate_up, inner, routing, shared, .. } = buffers;
        let (rows, layers) = (self.rows, weights.layers.iter());
        let of_experts = rows * (gate_up.view().shape()[0] / x.view().shape()[0]) as usize;
        let of = layers.clone().map(|layer| layer.qkv.view());
        tune(&mut self.qkv, qkv.rows_mut(rows)?, &x.rows(rows)?, of, multiplier)?;
        let of = layers.clone().map(|layer| layer.attention_output.view());
        tune(&mut self.attention_output, x.rows_mut(rows)?, &attention.rows(rows)?, of, multiplier)?;
        let of = layers.clone().map(|layer| layer.gate_up.view());
        tune(&mut self.gate_up, gate_up.rows_mut(of_experts)?, &x.rows(rows)?, of, multiplier)?;
        let of = layers.clone().map(|layer| layer.down.view());
        tune(&mut self.down, x.rows_mut(rows)?, &inner.rows(of_experts)?, of, multiplier)?;
        if let (Some(product), Some(routing)) = (&mut self.router, routing) {
            let of = layers.clone().filter_map(|layer| layer.router.as_ref()).map(|router| router.view());
            tune(product, routing.scores_mut(rows)?, &x.rows(rows)?, of, multiplier)?;
        }
        if let (Some(products), Some(SharedBuffers { gate_up, inner, .. })) = (&mut self.shared, shared) {
            let all = layers.filter_map(|layer| layer.shared.as_ref());
            let of = all.clone().map(|shared: &SharedExpert| shared.gate_up.view());
            tune(&mut products.gate_up, gate_up.rows_mut(rows)?, &x.rows(rows)?, of, multiplier)?;
            let of = all.map(|shared| shared.down.view());
            tune(&mut products.down, x.rows_mut(rows)?, &inner.rows(rows)?, of, multiplier)?;
        }
        Ok(())
    }
}

/// The product that makes logits.
pub struct HeadProduct {
    rows: usize,
    pub product: StepProduct,
}

impl HeadProduct {
    pub fn new(cublas: &Rc<CublasLt>, config: &Config, rows: usize, choice: Choice) -> Result<Self> {
        let product = Product {
            rows,
            input: config.hidden_size,
            output: config.vocab_size,
            factor: 1.0,
            added: Added::Nothing,
            dtype: config.dtype,
            out_dtype: DType::F32,
        };
        Ok(Self { rows, product: Matmul::new(cublas, product, choice, SCRATCH_BYTES)?.into() })
    }

    /// Takes the fastest kernel, once. What is in the buffers is lost.
    pub fn tune(
        &mut self,
        weights: &Weights,
        buffers: &Buffers,
        outputs: &mut Outputs,
        multiplier: &mut Multiplier,
    ) -> Result<()> {
        let logits = outputs.logits.view_mut().narrow(0, 0, self.rows)?;
        let x = buffers.x.rows(self.rows)?;
        tune(&mut self.product, logits, &x, iter::once(weights.head()), multiplier)
    }
}

impl From<Matmul> for StepProduct {
    fn from(matmul: Matmul) -> Self {
        Self { matmul, few_rows: false }
    }
}

/// Takes the fastest kernels for a product with each of these weights.
fn tune<'w>(
    product: &mut StepProduct,
    mut out: TensorMut<'_>,
    x: &TensorRef<'_>,
    weights: impl Iterator<Item = Weight<'w>> + Clone,
    multiplier: &mut Multiplier,
) -> Result<()> {
    let has_few_rows = multiplier.has_few_rows(product.matmul.product());
    let mut run = |matmul: &Matmul, few_rows: bool| {
        let mut weights = weights.clone();
        weights.try_for_each(|weight| multiplier.run_with(matmul, few_rows, &mut out, x, &weight))
    };
    let Some(time) = product.matmul.tune(|matmul| run(matmul, false))? else { return Ok(()) };
    if has_few_rows {
        product.few_rows = product.matmul.time(&mut |matmul| run(matmul, true))? < time;
    }
    Ok(())
}
