//! Models of several layers, with biases and experts, against the network as its
//! papers have it: token after token in `f64`, straight from the file's elements.

use candle_core::quantized::gguf_file::Value;

use super::{Tiny, engine};
use crate::{
    backend::{Backend, Output, Step, StepToken, cpu::Cpu},
    model::Model,
};
use flashinfer_rs::kv::{Batch, PageAllocator, Sequence};

/// The sizes of a file.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub hidden: usize,
    pub inner: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    /// How many there are, and how many a token has.
    pub experts: Option<(usize, usize)>,
    pub biases: bool,
}

/// Layers of all files.
pub const LAYERS: usize = 2;
const EPS: f32 = 1e-5;

/// Sizes with biases.
pub const BIASES: Sizes = Sizes {
    hidden: 256,
    inner: 192,
    heads: 4,
    kv_heads: 2,
    head_dim: 128,
    vocab: 300,
    experts: None,
    biases: true,
};
/// Sizes with experts.
pub const EXPERTS: Sizes = Sizes {
    hidden: 128,
    inner: 96,
    heads: 4,
    kv_heads: 1,
    head_dim: 64,
    vocab: 256,
    experts: Some((8, 2)),
    biases: false,
};

/// Random numbers between -1 and 1, of a name and a place.
fn random(name: &str, at: usize) -> f32 {
    let mut state = name.bytes().fold(at as u64, |state, byte| {
        (state ^ u64::from(byte)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
    });
    for _ in 0..3 {
        state = (state ^ (state >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    }
    ((state >> 40) as f32 / (1 << 23) as f32) - 1.0
}

/// Norms about 1, biases up to a half, and matrices that keep the size of what
/// they multiply; those of routers make it larger, so that choices are clear.
fn value(name: &str, shape: &[usize], at: usize) -> f32 {
    let random = random(name, at);
    match *shape {
        [_] if name.contains("norm") => 1.0 + random * 0.2,
        [_] => random * 0.5,
        [.., input] => {
            let size = if name.contains("gate_inp") { 8.0 } else { 1.7 };
            random * size / (input as f32).sqrt()
        }
        [] => random,
    }
}

impl Sizes {
    pub fn file(self) -> Tiny {
        let Self { hidden, inner, heads, kv_heads, head_dim, vocab, .. } = self;
        let mut tiny = Tiny { value, tensors: [].into(), ..Tiny::new() };
        tiny.metadata.extend([
            ("llama.block_count", Value::U32(LAYERS as u32)),
            ("llama.embedding_length", Value::U32(hidden as u32)),
            ("llama.feed_forward_length", Value::U32(inner as u32)),
            ("llama.attention.head_count", Value::U32(heads as u32)),
            ("llama.attention.head_count_kv", Value::U32(kv_heads as u32)),
            ("llama.attention.key_length", Value::U32(head_dim as u32)),
        ]);
        let mut add = |name: String, shape: &[usize]| tiny.tensors.insert(name, shape.to_vec());
        add("token_embd.weight".into(), &[vocab, hidden]);
        add("output.weight".into(), &[vocab, hidden]);
        add("output_norm.weight".into(), &[hidden]);
        let (qo, kv) = (heads * head_dim, kv_heads * head_dim);
        let matrices = [
            ("attn_q", [qo, hidden]),
            ("attn_k", [kv, hidden]),
            ("attn_v", [kv, hidden]),
            ("attn_output", [hidden, qo]),
        ];
        let mlp = [("ffn_gate", [inner, hidden]), ("ffn_up", [inner, hidden]), ("ffn_down", [hidden, inner])];
        for layer in 0..LAYERS {
            let name = |name: &str| format!("blk.{layer}.{name}");
            add(name("attn_norm.weight"), &[hidden]);
            add(name("ffn_norm.weight"), &[hidden]);
            let mut with_bias = |matrix: &str, shape: [usize; 2]| {
                add(name(&format!("{matrix}.weight")), &shape);
                // Not in every layer.
                if self.biases && (layer, matrix) != (1, "attn_k") {
                    add(name(&format!("{matrix}.bias")), &shape[..1]);
                }
            };
            matrices.iter().for_each(|(matrix, shape)| with_bias(matrix, *shape));
            match self.experts {
                None => mlp.iter().for_each(|(matrix, shape)| with_bias(matrix, *shape)),
                Some((count, _)) => {
                    add(name("ffn_gate_inp.weight"), &[count, hidden]);
                    for (matrix, [out, input]) in mlp {
                        add(name(&format!("{matrix}_exps.weight")), &[count, out, input]);
                    }
                }
            }
        }
        if let Some((count, used)) = self.experts {
            tiny.metadata.extend([
                ("llama.expert_count", Value::U32(count as u32)),
                ("llama.expert_used_count", Value::U32(used as u32)),
            ]);
        }
        tiny
    }
}

/// `matrix · x + bias`.
fn apply(matrix: &[f64], bias: Option<&[f64]>, x: &[f64]) -> Vec<f64> {
    let product = matrix.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum::<f64>());
    product.enumerate().map(|(at, sum)| sum + bias.map_or(0.0, |bias| bias[at])).collect()
}

fn norm(x: &[f64], weight: &[f64]) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + f64::from(EPS)).sqrt();
    x.iter().zip(weight).map(|(x, weight)| x * scale * weight).collect()
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<_> = scores.iter().map(|score| (score - most).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|power| power / sum).collect()
}

/// A network that takes one token after the other.
struct Forward {
    sizes: Sizes,
    tensors: std::collections::BTreeMap<String, Vec<f64>>,
    /// Keys and values of each layer, one token after the other.
    cache: [Vec<[Vec<f64>; 2]>; LAYERS],
}

impl Forward {
    fn new(tiny: &Tiny, sizes: Sizes) -> Self {
        let elements = |(name, shape): (&String, &Vec<usize>)| {
            let all = 0..shape.iter().product();
            (name.clone(), all.map(|at| f64::from((tiny.value)(name, shape, at))).collect())
        };
        let tensors = tiny.tensors.iter().map(elements).collect();
        Self { sizes, tensors, cache: Default::default() }
    }

    fn get(&self, layer: usize, name: &str) -> &[f64] {
        &self.tensors[&format!("blk.{layer}.{name}")]
    }

    fn linear(&self, layer: usize, name: &str, x: &[f64]) -> Vec<f64> {
        let bias = self.tensors.get(&format!("blk.{layer}.{name}.bias")).map(Vec::as_slice);
        apply(self.get(layer, &format!("{name}.weight")), bias, x)
    }

    /// Turns pairs of neighbours in each head.
    fn turn(&self, x: &mut [f64], position: usize) {
        let dim = self.sizes.head_dim;
        for head in x.chunks_exact_mut(dim) {
            for (pair, values) in head.chunks_exact_mut(2).enumerate() {
                let angle = position as f64 * 1e4f64.powf(-2.0 * pair as f64 / dim as f64);
                let (a, b) = (values[0], values[1]);
                values[0] = a * angle.cos() - b * angle.sin();
                values[1] = a * angle.sin() + b * angle.cos();
            }
        }
    }

    fn swiglu(gate: &[f64], up: &[f64]) -> Vec<f64> {
        gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
    }

    /// The logits after a further token, and by how much the choice of experts was
    /// clear where it was least so.
    fn token(&mut self, token: usize) -> (Vec<f64>, f64) {
        let Sizes { hidden, inner, heads, kv_heads, head_dim, experts, .. } = self.sizes;
        let mut clear = f64::INFINITY;
        let mut residual = self.tensors["token_embd.weight"][token * hidden..][..hidden].to_vec();
        let add = |residual: &mut Vec<f64>, x: &[f64]| residual.iter_mut().zip(x).for_each(|(r, x)| *r += x);
        for layer in 0..LAYERS {
            let x = norm(&residual, self.get(layer, "attn_norm.weight"));
            let [mut q, mut k, v] = ["attn_q", "attn_k", "attn_v"].map(|name| self.linear(layer, name, &x));
            let position = self.cache[layer].len();
            self.turn(&mut q, position);
            self.turn(&mut k, position);
            self.cache[layer].push([k, v]);
            let mut attention = Vec::new();
            for (head, q) in q.chunks_exact(head_dim).enumerate() {
                let at = head / (heads / kv_heads) * head_dim;
                let scores = self.cache[layer].iter().map(|[k, _]| {
                    let product: f64 = k[at..][..head_dim].iter().zip(q).map(|(k, q)| k * q).sum();
                    product / (head_dim as f64).sqrt()
                });
                let shares = softmax(&scores.collect::<Vec<_>>());
                let values = self.cache[layer].iter().zip(&shares);
                attention.extend(
                    (at..at + head_dim)
                        .map(|at| values.clone().map(|([_, v], share)| v[at] * share).sum::<f64>()),
                );
            }
            add(&mut residual, &self.linear(layer, "attn_output", &attention));
            let x = norm(&residual, self.get(layer, "ffn_norm.weight"));
            let Some((count, used)) = experts else {
                let [gate, up] = ["ffn_gate", "ffn_up"].map(|name| self.linear(layer, name, &x));
                add(&mut residual, &self.linear(layer, "ffn_down", &Self::swiglu(&gate, &up)));
                continue;
            };
            // Mixtral's rule: the softmax of all scores, and the largest of it
            // divided by their sum.
            let scores = self.linear(layer, "ffn_gate_inp", &x);
            let probs = softmax(&scores);
            let mut order: Vec<_> = (0..count).collect();
            order.sort_by(|&a, &b| probs[b].total_cmp(&probs[a]));
            clear = clear.min(scores[order[used - 1]] - scores[order[used]]);
            let sum: f64 = order[..used].iter().map(|&expert| probs[expert]).sum();
            for &expert in &order[..used] {
                let matrix = |name: &str| {
                    let all = self.get(layer, &format!("{name}_exps.weight"));
                    &all[expert * hidden * inner..][..hidden * inner]
                };
                let [gate, up] = ["ffn_gate", "ffn_up"].map(|name| apply(matrix(name), None, &x));
                let mut out = apply(matrix("ffn_down"), None, &Self::swiglu(&gate, &up));
                out.iter_mut().for_each(|value| *value *= probs[expert] / sum);
                add(&mut residual, &out);
            }
        }
        let x = norm(&residual, &self.tensors["output_norm.weight"]);
        (apply(&self.tensors["output.weight"], None, &x), clear)
    }
}

/// Tokens whose experts are chosen clearly, and the logits after each, in a file of
/// these sizes.
pub fn clear_tokens(tiny: &Tiny, sizes: Sizes, count: usize) -> (Vec<u32>, Vec<Vec<f64>>) {
    const CLEAR: f64 = 0.1;
    let mut forward = Forward::new(tiny, sizes);
    let (mut tokens, mut logits) = (Vec::new(), Vec::new());
    let mut candidates = (0..).map(|at| (random("tokens", at).abs() * sizes.vocab as f32) as u32);
    while tokens.len() < count {
        let token = candidates.next().unwrap().min(sizes.vocab as u32 - 1);
        let (row, clear) = forward.token(token as usize);
        if clear > CLEAR {
            tokens.push(token);
            logits.push(row);
        } else {
            forward.cache.iter_mut().for_each(|layer| drop(layer.pop()));
        }
    }
    (tokens, logits)
}

/// The largest difference of a row, relative to the norm of what is right.
fn worst(got: &[f32], want: &[Vec<f64>]) -> f64 {
    let vocab = want[0].len();
    assert_eq!(got.len(), want.len() * vocab);
    let off = got.chunks_exact(vocab).zip(want).map(|(got, want)| {
        let off: f64 = got.iter().zip(want).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
        (off / want.iter().map(|value| value * value).sum::<f64>()).sqrt()
    });
    off.fold(0.0, f64::max)
}

/// The logits after each token, of an engine that reads them in two steps.
fn logits(mut cpu: Cpu, tokens: &[u32]) -> Vec<f32> {
    let pool = PageAllocator::new(4, 4).unwrap();
    let mut batch = Batch::new(&pool);
    batch.push(Sequence::new(&pool)).unwrap();
    let (first, rest) = tokens.split_at(tokens.len() * 2 / 3);
    let mut all = Vec::new();
    for tokens in [first, rest] {
        batch.append([tokens.len()]).unwrap();
        let outputs: Vec<_> = (0..tokens.len()).map(Output::greedy).collect();
        cpu.step(&Step { batch: &batch, tokens: &StepToken::known(tokens), outputs: &outputs }).unwrap();
        all.extend(cpu.logits().unwrap());
    }
    all
}

/// A file with experts, of which the last is never chosen. What it makes of a token
/// is too large for `f16`.
pub fn with_an_unused_expert() -> Tiny {
    let mut tiny = EXPERTS.file();
    tiny.value = |name, shape, at| {
        let (count, hidden) = (EXPERTS.experts.unwrap().0, EXPERTS.hidden);
        let last = at >= shape.iter().product::<usize>() / count * (count - 1);
        let value = value(name, shape, at);
        match name.rsplit('.').nth(1) {
            // The first element is positive in every row, which the last expert's
            // score is of.
            Some("token_embd") if at % hidden == 0 => 6.0,
            Some("ffn_gate_inp") if last => {
                if at % hidden == 0 {
                    -60.0
                } else {
                    0.0
                }
            }
            Some("ffn_gate_exps" | "ffn_up_exps") if last => value * 3e5,
            _ => value,
        }
    };
    tiny
}

/// A token whose embedding is infinite, in a file that has such a token.
pub const INFINITE: u32 = 7;

pub fn with_an_infinite_token() -> Tiny {
    let mut tiny = EXPERTS.file();
    tiny.value = |name, shape, at| match name {
        "token_embd.weight" if at / EXPERTS.hidden == INFINITE as usize => f32::INFINITY,
        _ => value(name, shape, at),
    };
    tiny
}

#[test]
fn an_expert_that_is_not_chosen_does_not_matter() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = with_an_unused_expert();
    let (tokens, want) = clear_tokens(&tiny, EXPERTS, 12);
    let off = worst(&logits(engine(&tiny.write(&folder)).unwrap(), &tokens), &want);
    assert!(off < 2e-5, "off by {off:.1e}");
    let mut other = with_an_unused_expert();
    other.value = |name, shape, at| match name.rsplit('.').nth(1) {
        Some("ffn_gate_exps" | "ffn_up_exps") => value(name, shape, at),
        _ => (with_an_unused_expert().value)(name, shape, at),
    };
    let off = worst(&logits(engine(&other.write(&folder)).unwrap(), &tokens), &want);
    assert!(off < 2e-5, "off by {off:.1e}");
}

#[test]
fn biases_and_experts_are_computed_as_they_should_be() {
    let folder = tempfile::tempdir().unwrap();
    let plain = Sizes { biases: false, ..BIASES };
    let one = Sizes { experts: Some((3, 1)), ..EXPERTS };
    let all = Sizes { experts: Some((4, 3)), head_dim: 128, ..EXPERTS };
    for (at, sizes) in [plain, BIASES, EXPERTS, one, all].into_iter().enumerate() {
        let (tokens, want) = clear_tokens(&sizes.file(), sizes, 12);
        let got = logits(engine(&sizes.file().write(&folder)).unwrap(), &tokens);
        let off = worst(&got, &want);
        assert!(off < 2e-5, "file {at} is off by {off:.1e}");
        // Without what is tested, logits are others.
        if at == 1 {
            assert!(worst(&logits(engine(&plain.file().write(&folder)).unwrap(), &tokens), &want) > 0.1);
        }
    }
}

/// Each bias, one at a time: none is left out or added elsewhere.
#[test]
fn every_bias_counts() {
    let folder = tempfile::tempdir().unwrap();
    let (tokens, want) = clear_tokens(&BIASES.file(), BIASES, 6);
    for name in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"] {
        let mut tiny = BIASES.file();
        assert!(tiny.tensors.remove(&format!("blk.0.{name}.bias")).is_some());
        let off = worst(&logits(engine(&tiny.write(&folder)).unwrap(), &tokens), &want);
        assert!(off > 1e-3, "without {name} of one layer they are off by {off:.1e}");
    }
}

#[test]
fn a_tensor_for_each_expert_is_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let mut tiny = EXPERTS.file();
    let tokens = [3, 1, 4, 1, 5, 9];
    let want = logits(engine(&tiny.write(&folder)).unwrap(), &tokens);
    let names = ["ffn_gate", "ffn_up", "ffn_down"];
    for layer in 0..LAYERS {
        for name in names {
            let shape = tiny.tensors.remove(&format!("blk.{layer}.{name}_exps.weight")).unwrap();
            for expert in 0..shape[0] {
                tiny.tensors.insert(format!("blk.{layer}.{name}.{expert}.weight"), shape[1..].to_vec());
            }
        }
    }
    // Elements of an expert's tensor are those of its part of the whole.
    tiny.value = |name, shape, at| {
        let parts: Vec<_> = name.split('.').collect();
        match parts[..] {
            ["blk", layer, name, expert, "weight"] => {
                let expert: usize = expert.parse().unwrap();
                let name = format!("blk.{layer}.{name}_exps.weight");
                value(&name, shape, expert * shape[0] * shape[1] + at)
            }
            _ => value(name, shape, at),
        }
    };
    assert_eq!(logits(engine(&tiny.write(&folder)).unwrap(), &tokens), want);
    tiny.tensors.remove("blk.1.ffn_up.7.weight");
    let problem = engine(&tiny.write(&folder)).err().expect("no engine").to_string();
    assert!(problem.contains("blk.1.ffn_up.7.weight: it is missing"), "{problem}");
}

#[test]
fn files_with_odd_experts_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |tiny: &Tiny, expected: &str| {
        let problem =
            Model::open(&tiny.write(&folder)).and_then(|model| model.layers().collect::<Result<Vec<_>, _>>());
        let problem = problem.expect_err("no layers").to_string();
        assert!(problem.contains(expected), "{expected:?} is not in: {problem}");
    };
    let mut tiny = EXPERTS.file();
    tiny.metadata.insert("llama.expert_used_count", Value::U32(9));
    refused(&tiny, "it uses 9 experts of 8");
    for (name, expected) in [
        ("blk.0.ffn_gate.weight", "it has a tensor blk.0.ffn_gate.weight"),
        ("blk.0.ffn_gate_shexp.weight", "it has a tensor blk.0.ffn_gate_shexp.weight"),
        ("blk.0.ffn_gate_inp.bias", "it has a tensor blk.0.ffn_gate_inp.bias"),
        ("blk.0.ffn_up_exps.weight", "blk.0.ffn_up_exps.weight: its shape is [8]; expected [8, 96, 128]"),
    ] {
        let mut tiny = EXPERTS.file();
        tiny.tensors.insert(name.into(), vec![8]);
        refused(&tiny, expected);
    }
    let mut tiny = EXPERTS.file();
    tiny.tensors.remove("blk.1.ffn_gate_inp.weight");
    refused(&tiny, "blk.1.ffn_gate_inp.weight: it is missing");
    // As many as a file without experts has.
    let mut tiny = BIASES.file();
    tiny.metadata.insert("llama.expert_count", Value::U32(0));
    assert!(Model::open(&tiny.write(&folder)).is_ok());
}
