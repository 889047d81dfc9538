//! The weights of a model, in the types in which its file holds them.

use std::{cell::RefCell, collections::HashSet};

use candle_core::{Device, Tensor, quantized::GgmlDType};

pub use super::matrix::Matrix;
use super::{Config, gguf::Gguf, rope};
use crate::Result;

/// A matrix `[out, in]` in parts that lie one under the other, and what is added
/// to its products, `[out]`.
#[derive(Clone, Debug)]
pub struct Linear<M = Matrix> {
    pub parts: Vec<M>,
    pub bias: Option<Vec<f32>>,
}

/// The weights of one layer.
#[derive(Clone, Debug)]
pub struct Layer<M = Matrix> {
    pub attention_norm: Vec<f32>,
    /// Rows for queries, then keys, then values.
    pub qkv: Linear<M>,
    /// The norms of each head's queries and keys, before they are turned.
    pub qk_norm: Option<QkNorm>,
    pub attention_output: Linear<M>,
    /// The norm of what attention makes, before it is added.
    pub attention_post_norm: Option<Vec<f32>>,
    pub mlp_norm: Vec<f32>,
    pub mlp: LayerMlp<M>,
    /// The norm of what the MLP makes, before it is added.
    pub mlp_post_norm: Option<Vec<f32>>,
}

/// The weights of norms of heads, `[head_dim]`.
#[derive(Clone, Debug)]
pub struct QkNorm {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
}

/// An MLP with a gate.
#[derive(Clone, Debug)]
pub struct Mlp<M = Matrix> {
    /// Rows for the gate, then for up.
    pub gate_up: Linear<M>,
    pub down: Linear<M>,
}

/// What a layer has after attention.
#[derive(Clone, Debug)]
pub enum LayerMlp<M = Matrix> {
    Dense(Mlp<M>),
    Experts(ExpertMlps<M>),
}

/// Experts, and what chooses them.
#[derive(Clone, Debug)]
pub struct ExpertMlps<M = Matrix> {
    /// The scores of experts, `[experts, hidden_size]`.
    pub router: M,
    pub experts: Vec<Mlp<M>>,
    pub shared: Option<SharedExpert<M>>,
}

/// An expert that every token has.
#[derive(Clone, Debug)]
pub struct SharedExpert<M = Matrix> {
    /// `[1, hidden_size]`: its share is the sigmoid of the product.
    pub gate: M,
    pub mlp: Mlp<M>,
}

/// What comes before the first layer and after the last.
#[derive(Clone, Debug)]
pub struct Ends<M = Matrix> {
    /// `[vocab_size, hidden_size]`.
    pub embedding: M,
    pub norm: Vec<f32>,
    /// `[vocab_size, hidden_size]`; `None` if it is the embedding.
    pub head: Option<M>,
}

impl From<Matrix> for Linear {
    fn from(matrix: Matrix) -> Self {
        Self { parts: vec![matrix], bias: None }
    }
}

impl Linear {
    /// Its numbers, `[out, in]`, in `f32`.
    ///
    /// # Errors
    /// Its parts are not equally wide.
    pub fn dequantize(&self) -> Result<Tensor> {
        let columns = self.parts.first().map_or(0, Matrix::columns);
        if let Some(other) = self.parts.iter().find(|part| part.columns() != columns) {
            return Err(format!("{other:?} is below a matrix of {columns} columns").into());
        }
        let rows: usize = self.parts.iter().map(Matrix::rows).sum();
        let mut numbers = vec![0.0; rows * columns];
        let mut left = &mut numbers[..];
        for part in &self.parts {
            let (here, below) = left.split_at_mut(part.rows() * columns);
            part.dequantize_to(here);
            left = below;
        }
        Ok(Tensor::from_vec(numbers, (rows, columns), &Device::Cpu)?)
    }
}

impl<M> Linear<M> {
    fn map<N>(self, pack: &impl Fn(M) -> N) -> Linear<N> {
        Linear { parts: self.parts.into_iter().map(pack).collect(), bias: self.bias }
    }
}

impl<M> Mlp<M> {
    fn map<N>(self, pack: &impl Fn(M) -> N) -> Mlp<N> {
        Mlp { gate_up: self.gate_up.map(pack), down: self.down.map(pack) }
    }
}

impl<M> ExpertMlps<M> {
    fn map<N>(self, pack: &impl Fn(M) -> N) -> ExpertMlps<N> {
        ExpertMlps {
            router: pack(self.router),
            experts: self.experts.into_iter().map(|mlp| mlp.map(pack)).collect(),
            shared: self
                .shared
                .map(|SharedExpert { gate, mlp }| SharedExpert { gate: pack(gate), mlp: mlp.map(pack) }),
        }
    }
}

impl<M> Layer<M> {
    /// The same layer, with matrices that `pack` makes of these.
    pub fn map<N>(self, pack: &impl Fn(M) -> N) -> Layer<N> {
        Layer {
            attention_norm: self.attention_norm,
            qkv: self.qkv.map(pack),
            qk_norm: self.qk_norm,
            attention_output: self.attention_output.map(pack),
            attention_post_norm: self.attention_post_norm,
            mlp_norm: self.mlp_norm,
            mlp: match self.mlp {
                LayerMlp::Dense(mlp) => LayerMlp::Dense(mlp.map(pack)),
                LayerMlp::Experts(mlps) => LayerMlp::Experts(mlps.map(pack)),
            },
            mlp_post_norm: self.mlp_post_norm,
        }
    }
}

impl<M> Ends<M> {
    /// As [`Layer::map`].
    pub fn map<N>(self, pack: &impl Fn(M) -> N) -> Ends<N> {
        Ends { embedding: pack(self.embedding), norm: self.norm, head: self.head.map(pack) }
    }
}

/// Where weights come from: the tensors of a file, by name.
pub struct Tensors<'a> {
    gguf: &'a Gguf,
    config: &'a Config,
    /// What was asked for, while nothing is read.
    asked: Option<RefCell<HashSet<String>>>,
}

impl<'a> Tensors<'a> {
    pub fn new(gguf: &'a Gguf, config: &'a Config) -> Self {
        Self { gguf, config, asked: None }
    }

    /// Refuses a file in which a tensor is missing, has a wrong shape, or is not
    /// used: answers would not be the model's. Reads none of them.
    pub fn check(gguf: &Gguf, config: &Config) -> Result<()> {
        let asked = [rope::FREQS, rope::LONG, rope::SHORT].map(String::from);
        let tensors = Tensors { gguf, config, asked: Some(RefCell::new(asked.into())) };
        tensors.ends()?;
        (0..config.layers.len()).try_for_each(|index| tensors.layer(index).map(drop))?;
        let asked = tensors.asked.unwrap_or_default().into_inner();
        match gguf.tensors.keys().find(|name| !asked.contains(*name)) {
            Some(name) => Err(format!("it has a tensor {name}, which this program does not support").into()),
            None => Ok(()),
        }
    }

    pub fn ends(&self) -> Result<Ends> {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        let tied = !self.has("output.weight");
        Ok(Ends {
            embedding: self.matrix("token_embd.weight", shape)?,
            norm: self.vector("output_norm.weight", self.config.hidden_size)?,
            head: (!tied).then(|| self.matrix("output.weight", shape)).transpose()?,
        })
    }

    pub fn layer(&self, index: usize) -> Result<Layer> {
        let Config { hidden_size: hidden, head_dim, architecture, biases, .. } = *self.config;
        let [qo, kv] = self.config.widths();
        let name = |name: &str| format!("blk.{index}.{name}");
        let norm = |norm: &str, len| self.vector(&name(&format!("{norm}.weight")), len);
        let post_norm = |name: &str| architecture.post_norms.then(|| norm(name, hidden)).transpose();
        let qk_norm = || -> Result<_> {
            Ok(QkNorm { q: norm("attn_q_norm", head_dim)?, k: norm("attn_k_norm", head_dim)? })
        };
        let parts = [("attn_q", qo), ("attn_k", kv), ("attn_v", kv)];
        let qkv = match self.has(&name("attn_qkv.weight")) {
            true => self.linear(index, &[("attn_qkv", qo + 2 * kv)], hidden, biases.qkv)?,
            false => self.linear(index, &parts, hidden, biases.qkv)?,
        };
        Ok(Layer {
            attention_norm: norm("attn_norm", hidden)?,
            qkv,
            qk_norm: architecture.qk_norm.then(qk_norm).transpose()?,
            attention_output: self.linear(index, &[("attn_output", hidden)], qo, biases.attention_output)?,
            attention_post_norm: post_norm("post_attention_norm")?,
            mlp_norm: norm("ffn_norm", hidden)?,
            mlp: match self.config.experts {
                None => LayerMlp::Dense(self.mlp(index)?),
                Some(_) => LayerMlp::Experts(self.experts(index)?),
            },
            mlp_post_norm: post_norm("post_ffw_norm")?,
        })
    }

    fn mlp(&self, index: usize) -> Result<Mlp> {
        let Config { hidden_size: hidden, intermediate_size: inner, biases, .. } = *self.config;
        // Where there is no gate, its rows come before those of up.
        let gate_up = match self.has(&format!("blk.{index}.ffn_gate.weight")) {
            true => self.linear(index, &[("ffn_gate", inner), ("ffn_up", inner)], hidden, biases.gate_up)?,
            false => self.linear(index, &[("ffn_up", 2 * inner)], hidden, biases.gate_up)?,
        };
        Ok(Mlp { gate_up, down: self.linear(index, &[("ffn_down", hidden)], inner, biases.down)? })
    }

    fn experts(&self, index: usize) -> Result<ExpertMlps> {
        let Config { hidden_size: hidden, intermediate_size: inner, experts, .. } = *self.config;
        let experts = experts.ok_or("the model has no experts")?;
        let count = experts.count;
        let of_each = |name, shape| self.each(index, name, count, shape);
        let gate_up: Vec<_> = match self.has(&format!("blk.{index}.ffn_gate_up_exps.weight")) {
            true => of_each("ffn_gate_up", [2 * inner, hidden])?.into_iter().map(|both| vec![both]).collect(),
            false => {
                let up = of_each("ffn_up", [inner, hidden])?;
                let both = of_each("ffn_gate", [inner, hidden])?.into_iter().zip(up);
                both.map(|(gate, up)| vec![gate, up]).collect()
            }
        };
        let down = of_each("ffn_down", [hidden, inner])?;
        let mlp =
            |(parts, down): (_, Matrix)| Mlp { gate_up: Linear { parts, bias: None }, down: down.into() };
        let name = |name: &str| format!("blk.{index}.{name}.weight");
        let shared = |width: usize| -> Result<SharedExpert> {
            let matrix = |of: &str, shape| self.matrix(&name(of), shape);
            let parts = ["ffn_gate_shexp", "ffn_up_shexp"].map(|of| matrix(of, [width, hidden]));
            let parts = parts.into_iter().collect::<Result<_>>()?;
            let down = matrix("ffn_down_shexp", [hidden, width])?;
            Ok(SharedExpert { gate: self.row(&name("ffn_gate_inp_shexp"), hidden)?, mlp: mlp((parts, down)) })
        };
        Ok(ExpertMlps {
            router: self.matrix(&name("ffn_gate_inp"), [count, hidden])?,
            shared: experts.shared.map(shared).transpose()?,
            experts: gate_up.into_iter().zip(down).map(mlp).collect(),
        })
    }

    /// The matrices of all experts, in one tensor or, in files that were made
    /// early, in one each.
    fn each(&self, index: usize, name: &str, count: usize, [out, input]: [usize; 2]) -> Result<Vec<Matrix>> {
        let each = |expert: usize| format!("blk.{index}.{name}.{expert}.weight");
        if self.has(&each(0)) {
            return (0..count).map(|expert| self.matrix(&each(expert), [out, input])).collect();
        }
        let name = format!("blk.{index}.{name}_exps.weight");
        self.tensor(&name, &[count, out, input])
    }

    /// Matrices of these names and heights in one, with zeros for a bias that is
    /// missing, if there are any.
    fn linear(&self, index: usize, parts: &[(&str, usize)], input: usize, biased: bool) -> Result<Linear> {
        let (mut matrices, mut biases) = (Vec::new(), Vec::new());
        for &(name, out) in parts {
            matrices.push(self.matrix(&format!("blk.{index}.{name}.weight"), [out, input])?);
            let bias = format!("blk.{index}.{name}.bias");
            biases.extend(match self.has(&bias) {
                true => self.vector(&bias, out)?,
                false => vec![0.0; out],
            });
        }
        Ok(Linear { parts: matrices, bias: biased.then_some(biases) })
    }

    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Matrix> {
        Ok(self.tensor(name, &shape)?.swap_remove(0))
    }

    /// A matrix of one row, which files have as a vector.
    fn row(&self, name: &str, len: usize) -> Result<Matrix> {
        Ok(self.tensor(name, &[len])?.swap_remove(0))
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let vector = self.row(name, len)?;
        Ok(vector.dequantize()?.flatten_all()?.to_vec1()?)
    }

    fn has(&self, name: &str) -> bool {
        self.gguf.tensors.contains_key(name)
    }

    /// The matrices of a tensor; while nothing is read, one that is empty.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Vec<Matrix>> {
        let info = self.gguf.find(name, shape)?;
        let Some(asked) = &self.asked else { return self.gguf.read(name, info) };
        asked.borrow_mut().insert(name.into());
        Ok(vec![Matrix::from_bytes(Vec::new(), GgmlDType::F32, [0, 1])?])
    }
}
