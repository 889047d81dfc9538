//! The weights of a model on the GPU: rounded to the type that it computes in, or its matrices
//! to `e4m3`.

use candle_core::{Device, Storage, Tensor};
use flashinfer_rs::{DType, Stream, TensorRef};
use rayon::prelude::*;

use super::{
    half::{HalfTensor, overflow},
    heads::HeadWidths,
    quantize::{QuantizedRows, Quantizer},
};
use crate::{
    Result,
    backend::matmul::{Factor, Weight},
    model::{
        self, Config, Ends,
        shard::VocabPart,
        weights::{self, ExpertMlps, LayerMlp, Mlp},
    },
};

/// What the residual is multiplied by.
///
/// Residuals of some models come close to the largest number of `f16`. A norm does
/// not depend on the scale of its input, so the residual is kept scaled by a power
/// of two, which changes no digit: embeddings and what is added in each layer are
/// scaled by it, and `eps` by its square.
pub const RESIDUAL_SCALE: f32 = 1.0 / 16.0;

/// A matrix that rows are multiplied by.
enum StoredMatrix {
    Half(HalfTensor),
    E4m3(QuantizedRows),
}

/// A matrix and a bias.
pub struct Linear {
    matrix: StoredMatrix,
    bias: Option<HalfTensor>,
}

impl Linear {
    pub fn view(&self) -> Weight<'_> {
        let matrix = match &self.matrix {
            StoredMatrix::Half(matrix) => matrix.view().into(),
            StoredMatrix::E4m3(matrix) => matrix.view(),
        };
        Weight { matrix, bias: self.bias.as_ref().map(HalfTensor::view) }
    }
}

/// The weights of one layer.
pub struct Layer {
    pub attention_norm: HalfTensor,
    pub qkv: Linear,
    /// The norms of heads of queries, and of keys.
    pub qk_norm: Option<[HalfTensor; 2]>,
    pub attention_output: Linear,
    pub attention_post_norm: Option<HalfTensor>,
    pub mlp_norm: HalfTensor,
    /// The scores of experts.
    pub router: Option<Linear>,
    /// For each expert, rows for the gate, then for up.
    pub gate_up: Linear,
    /// Columns for each expert.
    pub down: Linear,
    pub shared: Option<SharedExpert>,
    pub mlp_post_norm: Option<HalfTensor>,
}

/// An expert that every token has, whose share is the sigmoid of a product.
pub struct SharedExpert {
    pub gate: Linear,
    pub gate_up: Linear,
    pub down: Linear,
}

/// All weights that the device uses.
pub struct Weights {
    /// The type of the matrices of layers, but for those that score experts.
    pub dtype: DType,
    pub layers: Vec<Layer>,
    pub norm: HalfTensor,
    /// The tokens that the embedding and the head have rows for.
    pub vocab: VocabPart,
    pub embedding: HalfTensor,
    /// `None` if it is the embedding.
    head: Option<HalfTensor>,
    /// Of all that a step multiplies.
    pub bytes: usize,
}

impl Weights {
    /// Uploads them, a layer at a time. With a quantizer, matrices of layers are quantized one by
    /// one, so that there are never more 16-bit ones than one.
    pub fn new(
        stream: &Stream,
        config: &Config,
        heads: HeadWidths,
        quantizer: Option<&Quantizer>,
        ends: &Ends,
        layers: impl Iterator<Item = Result<model::Layer>>,
    ) -> Result<Self> {
        let dtype = config.dtype;
        let residual_scale = config.residual_scale as f32 * RESIDUAL_SCALE;
        let mut upload = Upload { stream, dtype, heads, quantizer, residual_scale, bytes: 0 };
        let layers = layers.map(|layer| upload.layer(&layer?)).collect::<Result<_>>()?;
        let norm = upload.vector(&ends.norm)?;
        // What is not a number there makes only those requests fail that have such a token.
        let vocab = ends.vocab.clone();
        // Ranks gather as many logits from each.
        let padded = |matrix: &weights::Matrix| -> Result<Tensor> {
            Ok(matrix.dequantize()?.pad_with_zeros(0, 0, vocab.rows - vocab.tokens.len())?)
        };
        let embedding = padded(&ends.embedding)?;
        let embedding = with_numbers(&embedding, |numbers| {
            Ok(HalfTensor::rounded(stream, dtype, embedding.dims(), numbers)?)
        })?;
        let head = ends.head.as_ref().map(|head| upload.half(&padded(head)?)).transpose()?;
        if head.is_none() {
            upload.count(&embedding.view());
        }
        let dtype = if quantizer.is_some() { DType::E4M3 } else { dtype };
        let bytes = upload.bytes;
        Ok(Self { dtype, layers, norm, vocab, embedding, head, bytes })
    }

    /// What logits are made with.
    pub fn head(&self) -> Weight<'_> {
        Weight { matrix: self.head.as_ref().unwrap_or(&self.embedding).view().into(), bias: None }
    }
}

/// What products are multiplied by that are added to the residual; those that are
/// normed before have it in the norm.
pub fn added_factor(config: &Config) -> f32 {
    match config.architecture.post_norms {
        true => 1.0,
        false => config.residual_scale as f32 * RESIDUAL_SCALE,
    }
}

/// Uploads weights, and counts their bytes.
struct Upload<'a> {
    stream: &'a Stream,
    dtype: DType,
    heads: HeadWidths,
    quantizer: Option<&'a Quantizer>,
    /// What is added to the residual is multiplied by it.
    residual_scale: f32,
    bytes: usize,
}

impl Upload<'_> {
    fn layer(&mut self, layer: &model::Layer) -> Result<Layer> {
        let heads = self.heads;
        let post_norm = |upload: &mut Self, norm: &Option<Vec<f32>>| {
            let scaled = |norm: &Vec<f32>| norm.iter().map(|weight| weight * upload.residual_scale).collect();
            let scaled: Option<Vec<_>> = norm.as_ref().map(scaled);
            scaled.map(|norm| upload.vector(&norm)).transpose()
        };
        let attention_post_norm = post_norm(self, &layer.attention_post_norm)?;
        let mlp_post_norm = post_norm(self, &layer.mlp_post_norm)?;
        let factor = |norm: &Option<_>, scale: f32| if norm.is_some() { 1.0 } else { scale };
        let attention_factor = factor(&attention_post_norm, self.residual_scale);
        let output = &layer.attention_output;
        let attention_output = Linear {
            matrix: self.matrix(&heads.pad_columns(&output.dequantize()?)?)?,
            bias: self.bias(output, attention_factor)?,
        };
        let qk_norm = layer.qk_norm.as_ref().map(|norm| -> Result<_> {
            Ok([self.vector(&heads.pad_norm(&norm.q))?, self.vector(&heads.pad_norm(&norm.k))?])
        });
        let qk_norm = qk_norm.transpose()?;
        let (router, gate_up, down, shared) = match &layer.mlp {
            LayerMlp::Dense(mlp) => {
                let factor = factor(&mlp_post_norm, self.residual_scale);
                (None, self.linear(&mlp.gate_up, 1.0)?, self.linear(&mlp.down, factor)?, None)
            }
            LayerMlp::Experts(experts) => {
                let [gate_up, down] = self.experts(&experts.experts)?;
                (Some(self.scores(&experts.router)?), gate_up, down, self.shared(experts)?)
            }
        };
        Ok(Layer {
            attention_norm: self.vector(&layer.attention_norm)?,
            qkv: self.qkv(&layer.qkv)?,
            qk_norm,
            attention_output,
            attention_post_norm,
            mlp_norm: self.vector(&layer.mlp_norm)?,
            router,
            gate_up,
            down,
            shared,
            mlp_post_norm,
        })
    }

    fn qkv(&mut self, qkv: &weights::Linear) -> Result<Linear> {
        let matrix = self.matrix(&self.heads.pad_rows(&qkv.dequantize()?)?)?;
        let bias = match &qkv.bias {
            Some(bias) => {
                let padded = self.heads.pad_rows(&Tensor::new(bias.as_slice(), &Device::Cpu)?)?;
                Some(self.half(&padded.flatten_all()?)?)
            }
            None => None,
        };
        Ok(Linear { matrix, bias })
    }

    /// The matrices of all experts side by side.
    fn experts(&mut self, experts: &[Mlp]) -> Result<[Linear; 2]> {
        if experts.iter().any(|mlp| mlp.gate_up.bias.is_some() || mlp.down.bias.is_some()) {
            return Err("its experts have biases, which the GPU does not compute".into());
        }
        let all = |of: fn(&Mlp) -> &weights::Linear| {
            experts.iter().map(|mlp| of(mlp).dequantize()).collect::<Result<Vec<_>>>()
        };
        let gate_up = Tensor::cat(&all(|mlp| &mlp.gate_up)?, 0)?;
        let down = Tensor::cat(&all(|mlp| &mlp.down)?, 1)?;
        let mut linear =
            |matrix: &Tensor| -> Result<_> { Ok(Linear { matrix: self.matrix(matrix)?, bias: None }) };
        Ok([linear(&gate_up)?, linear(&down)?])
    }

    fn shared(&mut self, experts: &ExpertMlps) -> Result<Option<SharedExpert>> {
        let Some(shared) = &experts.shared else { return Ok(None) };
        Ok(Some(SharedExpert {
            gate: self.scores(&shared.gate)?,
            gate_up: self.linear(&shared.mlp.gate_up, 1.0)?,
            down: self.linear(&shared.mlp.down, 1.0)?,
        }))
    }

    /// A matrix, and a bias for products that are multiplied by a factor.
    fn linear(&mut self, linear: &weights::Linear, factor: f32) -> Result<Linear> {
        Ok(Linear { matrix: self.matrix(&linear.dequantize()?)?, bias: self.bias(linear, factor)? })
    }

    fn bias(&mut self, linear: &weights::Linear, factor: f32) -> Result<Option<HalfTensor>> {
        let scaled = |bias: &Vec<f32>| bias.iter().map(|number| number * factor).collect();
        let scaled: Option<Vec<_>> = linear.bias.as_ref().map(scaled);
        scaled.map(|bias| self.vector(&bias)).transpose()
    }

    /// A matrix that makes scores, which is small, and decides.
    fn scores(&mut self, matrix: &weights::Matrix) -> Result<Linear> {
        Ok(Linear { matrix: StoredMatrix::Half(self.half(&matrix.dequantize()?)?), bias: None })
    }

    /// A matrix as it is kept.
    fn matrix(&mut self, tensor: &Tensor) -> Result<StoredMatrix> {
        let Some(quantizer) = self.quantizer else { return Ok(StoredMatrix::Half(self.half(tensor)?)) };
        let rows = tensor.dim(0)?;
        let rounded = with_numbers(tensor, |numbers| self.checked(tensor.dims(), numbers))?;
        let mut quantized = QuantizedRows::zeros(self.stream, rows, tensor.elem_count())?;
        let Factor { numbers, scales } = quantizer.quantize(&mut quantized, &rounded.view(), rows)?;
        self.count(&numbers);
        scales.iter().for_each(|scales| self.count(scales));
        Ok(StoredMatrix::E4m3(quantized))
    }

    fn half(&mut self, tensor: &Tensor) -> Result<HalfTensor> {
        let rounded = with_numbers(tensor, |numbers| self.checked(tensor.dims(), numbers))?;
        self.count(&rounded.view());
        Ok(rounded)
    }

    fn vector(&mut self, numbers: &[f32]) -> Result<HalfTensor> {
        let rounded = self.checked(&[numbers.len()], numbers)?;
        self.count(&rounded.view());
        Ok(rounded)
    }

    /// Counts what a step reads.
    fn count(&mut self, tensor: &TensorRef<'_>) {
        self.bytes += tensor.numel() * tensor.dtype().size();
    }

    /// Numbers that are finite when they are rounded.
    fn checked(&self, shape: &[usize], numbers: &[f32]) -> Result<HalfTensor> {
        let limit = overflow(self.dtype);
        let is_bad = |number: &&f32| number.is_nan() || number.abs() >= limit;
        if let Some(number) = numbers.par_iter().find_first(is_bad) {
            let problem = format!("a weight is {number}, which is no number of {}", self.dtype);
            return Err(format!("{problem}, which the GPU computes in").into());
        }
        Ok(HalfTensor::rounded(self.stream, self.dtype, shape, numbers)?)
    }
}

/// What `work` makes of a tensor's numbers, in row-major order.
fn with_numbers<T>(tensor: &Tensor, work: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((start, end))) => work(&storage.as_slice()?[start..end]),
        _ => Err(format!("{tensor:?} is no tensor of the CPU").into()),
    }
}
