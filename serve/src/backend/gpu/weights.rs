//! The weights of a model on the GPU, rounded to the type that it computes in.

use candle_core::{DType as CandleDType, Tensor};
use flashinfer_rs::{DType, Stream};

use super::half::HalfTensor;
use crate::{
    Result,
    backend::matmul::Weight,
    model::{self, Ends},
};

/// What the residual is multiplied by.
///
/// Residuals of some models come close to the largest number of `f16`. A norm does
/// not depend on the scale of its input, so the residual is kept scaled by a power
/// of two, which changes no digit: embeddings and what is added in each layer are
/// scaled by it, and `eps` by its square.
pub const RESIDUAL_SCALE: f32 = 1.0 / 16.0;

/// A matrix and a bias.
pub struct Linear {
    matrix: HalfTensor,
    bias: Option<HalfTensor>,
}

impl Linear {
    pub fn view(&self) -> Weight<'_> {
        Weight { matrix: self.matrix.view(), bias: self.bias.as_ref().map(HalfTensor::view) }
    }
}

/// The weights of one layer.
pub struct Layer {
    pub attention_norm: HalfTensor,
    pub qkv: Linear,
    pub attention_output: Linear,
    pub mlp_norm: HalfTensor,
    pub router: Option<Linear>,
    pub gate_up: Linear,
    pub down: Linear,
}

/// All weights that the device uses.
pub struct Weights {
    pub layers: Vec<Layer>,
    pub norm: HalfTensor,
    pub embedding: HalfTensor,
    /// `None` if it is the embedding.
    head: Option<HalfTensor>,
    /// Of all that a step multiplies.
    pub bytes: usize,
}

impl Weights {
    /// Uploads them, a layer at a time.
    pub fn new(
        stream: &Stream,
        dtype: DType,
        ends: &Ends,
        layers: impl Iterator<Item = Result<model::Layer>>,
    ) -> Result<Self> {
        let mut upload = Upload { stream, dtype, bytes: 0 };
        let layers = layers.map(|layer| upload.layer(&layer?)).collect::<Result<_>>()?;
        let norm = upload.vector(&ends.norm)?;
        // What is not a number there makes only those requests fail that have such a token.
        let embedding = upload.any(&ends.embedding)?;
        let head = match &ends.head {
            Some(head) => Some(upload.matrix(head)?),
            None => {
                upload.bytes += ends.embedding.elem_count() * dtype.size();
                None
            }
        };
        Ok(Self { layers, norm, embedding, head, bytes: upload.bytes })
    }

    /// What logits are made with.
    pub fn head(&self) -> Weight<'_> {
        Weight { matrix: self.head.as_ref().unwrap_or(&self.embedding).view(), bias: None }
    }
}

/// Uploads weights, and counts their bytes.
struct Upload<'a> {
    stream: &'a Stream,
    dtype: DType,
    bytes: usize,
}

impl Upload<'_> {
    fn layer(&mut self, layer: &model::Layer) -> Result<Layer> {
        Ok(Layer {
            attention_norm: self.vector(&layer.attention_norm)?,
            qkv: self.linear(&layer.qkv, 1.0)?,
            attention_output: self.linear(&layer.attention_output, RESIDUAL_SCALE)?,
            mlp_norm: self.vector(&layer.mlp_norm)?,
            router: layer.router.as_ref().map(|router| self.linear(router, 1.0)).transpose()?,
            gate_up: self.linear(&layer.gate_up, 1.0)?,
            down: self.linear(&layer.down, RESIDUAL_SCALE)?,
        })
    }

    /// A matrix, and a bias for products that are multiplied by a factor.
    fn linear(&mut self, linear: &model::Linear, factor: f32) -> Result<Linear> {
        let bias = linear.bias.as_ref().map(|bias| self.matrix(&(bias * f64::from(factor))?));
        Ok(Linear { matrix: self.matrix(&linear.weight)?, bias: bias.transpose()? })
    }

    fn matrix(&mut self, tensor: &Tensor) -> Result<HalfTensor> {
        self.checked(tensor.dims(), &numbers(tensor)?)
    }

    fn vector(&mut self, numbers: &[f32]) -> Result<HalfTensor> {
        self.checked(&[numbers.len()], numbers)
    }

    /// Numbers that are finite when they are rounded.
    fn checked(&mut self, shape: &[usize], numbers: &[f32]) -> Result<HalfTensor> {
        let largest = match self.dtype {
            DType::F16 => half::f16::MAX.to_f32(),
            _ => half::bf16::MAX.to_f32(),
        };
        if let Some(number) = numbers.iter().find(|number| !(number.abs() <= largest)) {
            return Err(format!(
                "a weight is {number}, too large for {}, which the GPU computes in",
                self.dtype
            )
            .into());
        }
        self.bytes += numbers.len() * self.dtype.size();
        Ok(HalfTensor::rounded(self.stream, self.dtype, shape, numbers)?)
    }

    fn any(&self, tensor: &Tensor) -> Result<HalfTensor> {
        Ok(HalfTensor::rounded(self.stream, self.dtype, tensor.dims(), &numbers(tensor)?)?)
    }
}

fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_dtype(CandleDType::F32)?.to_vec1()?)
}
