//! The weights of a model, in the types in which its file holds them.

use std::{cell::RefCell, collections::HashSet, ops::Range};

use candle_core::{Device, Tensor, quantized::GgmlDType};

pub use super::matrix::Matrix;
use super::{
    Config,
    gguf::{Gguf, Part},
    rope,
    shard::{Shard, VocabPart},
};
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
    /// The tokens that these matrices have rows for: all, or a rank's.
    pub vocab: VocabPart,
    /// `[tokens, hidden_size]`.
    pub embedding: M,
    pub norm: Vec<f32>,
    /// `[tokens, hidden_size]`; `None` if it is the embedding.
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
        let Self { vocab, embedding, norm, head } = self;
        Ends { vocab, embedding: pack(embedding), norm, head: head.map(pack) }
    }
}

/// Where weights come from: the tensors of a file, by name, of which a rank has parts.
pub struct Tensors<'a> {
    gguf: &'a Gguf,
    config: &'a Config,
    shard: &'a Shard,
    /// What was asked for, while nothing is read.
    asked: Option<RefCell<Asked>>,
}

/// Tensors that were asked for.
#[derive(Default)]
struct Asked {
    names: HashSet<String>,
    /// Of their parts.
    bytes: u64,
}

impl<'a> Tensors<'a> {
    /// `config` is that of the whole model.
    pub fn new(gguf: &'a Gguf, config: &'a Config, shard: &'a Shard) -> Self {
        Self { gguf, config, shard, asked: None }
    }

    /// Refuses a file in which a tensor is missing, has a wrong shape, or is not
    /// used: answers would not be the model's. Reads none of them, and returns how many bytes the
    /// shard has of them.
    pub fn check(gguf: &Gguf, config: &Config, shard: &Shard) -> Result<u64> {
        let tensors = Tensors { gguf, config, shard, asked: Some(RefCell::default()) };
        tensors.ends()?;
        (0..config.layers.len()).try_for_each(|index| tensors.layer(index).map(drop))?;
        let Asked { mut names, bytes } = tensors.asked.unwrap_or_default().into_inner();
        names.extend([rope::FREQS, rope::LONG, rope::SHORT].map(String::from));
        match gguf.tensors.keys().find(|name| !names.contains(*name)) {
            Some(name) => Err(format!("it has a tensor {name}, which this program does not support").into()),
            None => Ok(bytes),
        }
    }

    pub fn ends(&self) -> Result<Ends> {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        let vocab = &self.shard.vocab;
        let rows = Part::Rows(vec![vocab.tokens.clone()]);
        let tied = !self.has("output.weight");
        Ok(Ends {
            vocab: vocab.clone(),
            embedding: self.matrix("token_embd.weight", shape, &rows)?,
            norm: self.vector("output_norm.weight", self.config.hidden_size)?,
            head: (!tied).then(|| self.matrix("output.weight", shape, &rows)).transpose()?,
        })
    }

    pub fn layer(&self, index: usize) -> Result<Layer> {
        let Config { hidden_size: hidden, head_dim, architecture, biases, .. } = *self.config;
        let Shard { queries, keys, .. } = self.shard;
        let [qo, kv] = self.config.widths();
        let name = |name: &str| format!("blk.{index}.{name}");
        let norm = |norm: &str, len| self.vector(&name(&format!("{norm}.weight")), len);
        let post_norm = |name: &str| architecture.post_norms.then(|| norm(name, hidden)).transpose();
        let qk_norm = || -> Result<_> {
            Ok(QkNorm { q: norm("attn_q_norm", head_dim)?, k: norm("attn_k_norm", head_dim)? })
        };
        let below = |rows: &Range<usize>, above: usize| rows.start + above..rows.end + above;
        let qkv = match self.has(&name("attn_qkv.weight")) {
            true => {
                let rows = vec![queries.clone(), below(keys, qo), below(keys, qo + kv)];
                self.stacked(index, &[("attn_qkv", qo + 2 * kv, rows)], hidden, biases.qkv)?
            }
            false => {
                let [queries, keys] = [queries, keys].map(|rows| vec![rows.clone()]);
                let parts = [("attn_q", qo, queries), ("attn_k", kv, keys.clone()), ("attn_v", kv, keys)];
                self.stacked(index, &parts, hidden, biases.qkv)?
            }
        };
        Ok(Layer {
            attention_norm: norm("attn_norm", hidden)?,
            qkv,
            qk_norm: architecture.qk_norm.then(qk_norm).transpose()?,
            attention_output: self.summed(
                index,
                "attn_output",
                [hidden, qo],
                queries,
                biases.attention_output,
            )?,
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
        let rows = vec![self.shard.inner.clone()];
        // Where there is no gate, its rows come before those of up.
        let gate_up = match self.has(&format!("blk.{index}.ffn_gate.weight")) {
            true => {
                let parts = [("ffn_gate", inner, rows.clone()), ("ffn_up", inner, rows)];
                self.stacked(index, &parts, hidden, biases.gate_up)?
            }
            false => {
                let parts = [("ffn_up", 2 * inner, gate_and_up(&self.shard.inner, inner))];
                self.stacked(index, &parts, hidden, biases.gate_up)?
            }
        };
        let down = self.summed(index, "ffn_down", [hidden, inner], &self.shard.inner, biases.down)?;
        Ok(Mlp { gate_up, down })
    }

    fn experts(&self, index: usize) -> Result<ExpertMlps> {
        let Config { hidden_size: hidden, intermediate_size: inner, experts, .. } = *self.config;
        let experts = experts.ok_or("the model has no experts")?;
        let count = experts.count;
        let mine = &self.shard.inner;
        let of_each = |name, shape, part: &Part| self.each(index, name, count, shape, part);
        let rows = Part::Rows(vec![mine.clone()]);
        let gate_up: Vec<_> = match self.has(&format!("blk.{index}.ffn_gate_up_exps.weight")) {
            true => {
                let rows = Part::Rows(gate_and_up(mine, inner));
                let both = of_each("ffn_gate_up", [2 * inner, hidden], &rows)?;
                both.into_iter().map(|both| vec![both]).collect()
            }
            false => {
                let up = of_each("ffn_up", [inner, hidden], &rows)?;
                let both = of_each("ffn_gate", [inner, hidden], &rows)?.into_iter().zip(up);
                both.map(|(gate, up)| vec![gate, up]).collect()
            }
        };
        let down = of_each("ffn_down", [hidden, inner], &Part::Columns(mine.clone()))?;
        let mlp =
            |(parts, down): (_, Matrix)| Mlp { gate_up: Linear { parts, bias: None }, down: down.into() };
        let name = |name: &str| format!("blk.{index}.{name}.weight");
        let shared = |width: usize| -> Result<SharedExpert> {
            let mine = self.shard.shared.clone().unwrap_or(0..width);
            let rows = Part::Rows(vec![mine.clone()]);
            let parts =
                ["ffn_gate_shexp", "ffn_up_shexp"].map(|of| self.matrix(&name(of), [width, hidden], &rows));
            let parts = parts.into_iter().collect::<Result<_>>()?;
            let down = self.matrix(&name("ffn_down_shexp"), [hidden, width], &Part::Columns(mine))?;
            Ok(SharedExpert { gate: self.row(&name("ffn_gate_inp_shexp"), hidden)?, mlp: mlp((parts, down)) })
        };
        Ok(ExpertMlps {
            router: self.matrix(&name("ffn_gate_inp"), [count, hidden], &Part::All)?,
            shared: experts.shared.map(shared).transpose()?,
            experts: gate_up.into_iter().zip(down).map(mlp).collect(),
        })
    }

    /// Parts of the matrices of all experts, in one tensor or, in files that were made
    /// early, in one each.
    fn each(
        &self,
        index: usize,
        name: &str,
        count: usize,
        [out, input]: [usize; 2],
        part: &Part,
    ) -> Result<Vec<Matrix>> {
        let each = |expert: usize| format!("blk.{index}.{name}.{expert}.weight");
        if self.has(&each(0)) {
            return (0..count).map(|expert| self.matrix(&each(expert), [out, input], part)).collect();
        }
        let name = format!("blk.{index}.{name}_exps.weight");
        self.tensor(&name, &[count, out, input], part)
    }

    /// Rows of matrices of these names and heights in one, with zeros for a bias that is
    /// missing, if there are any.
    fn stacked(
        &self,
        index: usize,
        parts: &[(&str, usize, Vec<Range<usize>>)],
        input: usize,
        biased: bool,
    ) -> Result<Linear> {
        let (mut matrices, mut biases) = (Vec::new(), Vec::new());
        for (name, out, rows) in parts {
            let part = Part::Rows(rows.clone());
            matrices.push(self.matrix(&format!("blk.{index}.{name}.weight"), [*out, input], &part)?);
            let bias = self.bias(index, name, *out)?;
            rows.iter().for_each(|range| biases.extend(bias.iter().skip(range.start).take(range.len())));
        }
        Ok(Linear { parts: matrices, bias: biased.then_some(biases) })
    }

    /// Columns of a matrix whose products are summed over ranks, one of which adds the bias.
    fn summed(
        &self,
        index: usize,
        name: &str,
        [out, input]: [usize; 2],
        columns: &Range<usize>,
        biased: bool,
    ) -> Result<Linear> {
        let part = Part::Columns(columns.clone());
        let matrix = self.matrix(&format!("blk.{index}.{name}.weight"), [out, input], &part)?;
        let bias = self.bias(index, name, out)?;
        Ok(Linear { parts: vec![matrix], bias: (biased && self.shard.adds_biases).then_some(bias) })
    }

    /// A bias, or zeros.
    fn bias(&self, index: usize, name: &str, len: usize) -> Result<Vec<f32>> {
        let name = format!("blk.{index}.{name}.bias");
        match self.has(&name) {
            true => self.vector(&name, len),
            false => Ok(vec![0.0; len]),
        }
    }

    fn matrix(&self, name: &str, shape: [usize; 2], part: &Part) -> Result<Matrix> {
        Ok(self.tensor(name, &shape, part)?.swap_remove(0))
    }

    /// A matrix of one row, which files have as a vector.
    fn row(&self, name: &str, len: usize) -> Result<Matrix> {
        Ok(self.tensor(name, &[len], &Part::All)?.swap_remove(0))
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let vector = self.row(name, len)?;
        Ok(vector.dequantize()?.flatten_all()?.to_vec1()?)
    }

    fn has(&self, name: &str) -> bool {
        self.gguf.tensors.contains_key(name)
    }

    /// Parts of the matrices of a tensor; while nothing is read, one that is empty.
    fn tensor(&self, name: &str, shape: &[usize], part: &Part) -> Result<Vec<Matrix>> {
        let info = self.gguf.find(name, shape)?;
        let Some(asked) = &self.asked else { return self.gguf.read(name, info, part) };
        let mut asked = asked.borrow_mut();
        asked.names.insert(name.into());
        asked.bytes += part.bytes(name, info)?;
        Ok(vec![Matrix::from_bytes(Vec::new(), GgmlDType::F32, [0, 1])?])
    }
}

/// Rows of a matrix that has the gate's above those of up, both `width` high.
fn gate_and_up(rows: &Range<usize>, width: usize) -> Vec<Range<usize>> {
    vec![rows.clone(), rows.start + width..rows.end + width]
}
