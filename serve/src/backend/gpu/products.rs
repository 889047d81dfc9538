//! The products of activations and weights that a step has, and the fastest kernels for
//! them.

use std::{iter, rc::Rc};

use flashinfer_rs::DType;

use super::{
    buffers::{Buffers, Outputs, SharedBuffers},
    heads::HeadWidths,
    multiplier::{Multiplier, SCRATCH_BYTES, StepProduct},
    ranks::Ranks,
    weights::{SharedExpert, Weights, added_factor},
};
use crate::{
    Result,
    backend::matmul::{Added, Choice, CublasLt, Matmul, Product},
    model::Config,
};

/// The products of all layers, for one number of rows.
pub struct Products {
    rows: usize,
    pub qkv: StepProduct,
    pub attention_output: StepProduct,
    pub router: Option<StepProduct>,
    pub gate_up: StepProduct,
    pub down: StepProduct,
    pub shared: Option<SharedProducts>,
    /// Whether norms, activations and sums of layers are parts of their products.
    pub fused: bool,
    tuned: bool,
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
            fused: false,
            tuned: false,
        })
    }

    /// Takes the fastest kernels, once. What is in the buffers is lost. One of several ranks, which all do
    /// so at a time, leaves the router as it is: all are to choose the same experts, out of scores that are
    /// equal bit by bit.
    pub fn tune(
        &mut self,
        weights: &Weights,
        buffers: &mut Buffers,
        multiplier: &mut Multiplier,
        ranks: Option<&Ranks>,
    ) -> Result<()> {
        if self.tuned {
            return Ok(());
        }
        let Buffers { x, qkv, attention, gate_up, inner, routing, shared, .. } = buffers;
        let (rows, layers) = (self.rows, weights.layers.iter());
        let of_experts = rows * (gate_up.view().shape()[0] / x.view().shape()[0]) as usize;
        let of = layers.clone().map(|layer| layer.qkv.view());
        self.qkv.tune(multiplier, qkv.rows_mut(rows)?, &x.rows(rows)?, of)?;
        let of = layers.clone().map(|layer| layer.attention_output.view());
        self.attention_output.tune(multiplier, x.rows_mut(rows)?, &attention.rows(rows)?, of)?;
        let of = layers.clone().map(|layer| layer.gate_up.view());
        self.gate_up.tune(multiplier, gate_up.rows_mut(of_experts)?, &x.rows(rows)?, of)?;
        let of = layers.clone().map(|layer| layer.down.view());
        self.down.tune(multiplier, x.rows_mut(rows)?, &inner.rows(of_experts)?, of)?;
        if let (Some(product), Some(routing), None) = (&mut self.router, routing, ranks) {
            let of = layers.clone().filter_map(|layer| layer.router.as_ref()).map(|router| router.view());
            product.tune(multiplier, routing.scores_mut(rows)?, &x.rows(rows)?, of)?;
        }
        if let (Some(products), Some(SharedBuffers { gate_up, inner, .. })) = (&mut self.shared, shared) {
            let all = layers.filter_map(|layer| layer.shared.as_ref());
            let of = all.clone().map(|shared: &SharedExpert| shared.gate_up.view());
            products.gate_up.tune(multiplier, gate_up.rows_mut(rows)?, &x.rows(rows)?, of)?;
            let of = all.map(|shared| shared.down.view());
            products.down.tune(multiplier, x.rows_mut(rows)?, &inner.rows(rows)?, of)?;
        }
        multiplier.save_choices();
        self.tuned = true;
        let gain = if weights.have_plain_layers() { self.gain() } else { None };
        let gain = gain.unwrap_or(f32::NEG_INFINITY);
        // Ranks add up other things where they are fused, so that all have to do the same.
        self.fused = ranks.map_or(Ok(gain), |ranks| ranks.total(gain))? >= 0.0;
        Ok(())
    }

    /// The milliseconds that the kernels that products can be fused with others by take less in all;
    /// `None` if there are none for some.
    fn gain(&self) -> Option<f32> {
        let products = [&self.qkv, &self.attention_output, &self.gate_up, &self.down];
        products.into_iter().map(StepProduct::gain).sum()
    }
}

/// The product that makes logits.
pub struct HeadProduct {
    rows: usize,
    pub product: StepProduct,
}

impl HeadProduct {
    /// For the logits of so many tokens.
    pub fn new(
        cublas: &Rc<CublasLt>,
        config: &Config,
        tokens: usize,
        rows: usize,
        choice: Choice,
    ) -> Result<Self> {
        let product = Product {
            rows,
            input: config.hidden_size,
            output: tokens,
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
        let (_, logits) = outputs.product_mut();
        let logits = logits.view_mut().narrow(0, 0, self.rows)?;
        let x = buffers.x.rows(self.rows)?;
        self.product.tune(multiplier, logits, &x, iter::once(weights.head()))?;
        multiplier.save_choices();
        Ok(())
    }
}
