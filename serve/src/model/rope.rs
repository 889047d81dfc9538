//! The rotary embedding of a model, as its file says.

use flashinfer_rs::rope::{RopeFrequencies, RopeScaling, YarnScaling};

use super::{gguf::Gguf, keys::Keys};
use crate::Result;

/// How many of a head's elements FlashInfer's kernels turn at a time.
const ROTARY_MULTIPLE: usize = 8;
/// What divides the frequencies, where a file has it.
pub const FREQS: &str = "rope_freqs.weight";
/// The same for sequences that are longer than those of the first training, and
/// for the others (LongRoPE).
pub const LONG: &str = "rope_factors_long.weight";
pub const SHORT: &str = "rope_factors_short.weight";

/// The rotary embedding of some layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    short: RopeFrequencies,
    long: Option<Long>,
}

/// What holds for long sequences.
#[derive(Clone, Debug, PartialEq)]
struct Long {
    /// The most tokens of a sequence that is not long.
    beyond: usize,
    frequencies: RopeFrequencies,
}

impl Rope {
    /// The same for sequences of any length.
    pub fn new(frequencies: RopeFrequencies) -> Self {
        Self { short: frequencies, long: None }
    }

    /// The frequencies where sequences have up to so many tokens. As keys stay
    /// in the cache, a sequence has those of one length from its start on.
    pub fn for_length(&self, tokens: usize) -> &RopeFrequencies {
        match &self.long {
            Some(long) if tokens > long.beyond => &long.frequencies,
            _ => &self.short,
        }
    }

    /// How many elements of a head are turned: the first.
    pub fn rotary_dim(&self) -> usize {
        self.short.rotary_dim()
    }

    /// Reads that of layers without windows.
    pub(super) fn read(keys: &Keys<'_>, gguf: &Gguf, head_dim: usize, context_length: usize) -> Result<Self> {
        let rotary_dim = rotary_dim(keys, head_dim)?;
        let original = keys.count("rope.scaling.original_context_length")?;
        let theta = keys.real("rope.freq_base")?.unwrap_or(1e4);
        // A factor without a type means linear scaling, and 0 none.
        let factor = keys.real_or_zero("rope.scaling.factor")?;
        let factor = factor.or(keys.real_or_zero("rope.scale_linear")?).filter(|factor| *factor > 0.0);
        let factor = factor.unwrap_or(1.0);
        let beta = [keys.real("rope.scaling.yarn_beta_fast")?, keys.real("rope.scaling.yarn_beta_slow")?];
        let yarn_factor = keys.real("rope.scaling.yarn_attn_factor")?;
        let kind = keys.text("rope.scaling.type")?;
        let scaling = match kind {
            None | Some("linear") => RopeScaling::Linear { factor },
            Some("none" | "longrope") => RopeScaling::None,
            Some("yarn") => {
                let mut yarn = YarnScaling::new(factor, original.unwrap_or(context_length) as f64);
                yarn.beta_fast = beta[0].unwrap_or(yarn.beta_fast);
                yarn.beta_slow = beta[1].unwrap_or(yarn.beta_slow);
                yarn.attention_factor = yarn_factor;
                RopeScaling::Yarn(yarn)
            }
            Some(name) => {
                let expected = "expected none, linear, yarn or longrope";
                return Err(format!("{} is `{name}`; {expected}", keys.name("rope.scaling.type")).into());
            }
        };
        if let (Some(factor), false) = (yarn_factor, matches!(scaling, RopeScaling::Yarn(_))) {
            let name = keys.name("rope.scaling.yarn_attn_factor");
            return Err(format!("{name} is {factor}; expected none where scaling is not yarn").into());
        }
        let plain = RopeFrequencies::new(rotary_dim, theta, &scaling)?;
        let attention = plain.attention_factor() * keys.real("rope.scaling.attn_factor")?.unwrap_or(1.0);
        let divided = |tensor: &str| -> Result<Option<RopeFrequencies>> {
            let Some(factors) = factors(gguf, tensor, rotary_dim / 2)? else { return Ok(None) };
            let scaled = plain.inv_freq().iter().zip(factors).map(|(freq, factor)| freq / f64::from(factor));
            let divided = RopeFrequencies::from_inv_freq(scaled.collect(), attention);
            Ok(Some(divided.map_err(|e| format!("tensor {tensor}: {e}"))?))
        };
        let whole = match divided(FREQS)? {
            Some(divided) => divided,
            None => RopeFrequencies::from_inv_freq(plain.inv_freq().into(), attention)?,
        };
        match (divided(SHORT)?, divided(LONG)?) {
            (None, None) if kind == Some("longrope") => Err(format!("tensor {LONG}: it is missing").into()),
            (None, None) => Ok(Self::new(whole)),
            (Some(short), Some(frequencies)) => {
                let beyond = original.unwrap_or(context_length);
                Ok(Self { short, long: Some(Long { beyond, frequencies }) })
            }
            (None, Some(_)) => Err(format!("tensor {SHORT}: it is missing, and {LONG} is there").into()),
            (Some(_), None) => Err(format!("tensor {LONG}: it is missing, and {SHORT} is there").into()),
        }
    }

    /// Reads that of layers with windows, if it is another: it has a base of its
    /// own, and is not scaled.
    pub(super) fn of_windows(keys: &Keys<'_>, head_dim: usize, base: Option<f64>) -> Result<Option<Self>> {
        let Some(theta) = keys.real("rope.freq_base_swa")?.or(base) else { return Ok(None) };
        let frequencies = RopeFrequencies::new(rotary_dim(keys, head_dim)?, theta, &RopeScaling::None)?;
        Ok(Some(Self::new(frequencies)))
    }
}

fn rotary_dim(keys: &Keys<'_>, head_dim: usize) -> Result<usize> {
    let rotary_dim = keys.count("rope.dimension_count")?.unwrap_or(head_dim);
    if rotary_dim > head_dim || !rotary_dim.is_multiple_of(ROTARY_MULTIPLE) {
        let name = keys.name("rope.dimension_count");
        let expected = format!("a multiple of {ROTARY_MULTIPLE} up to {head_dim}");
        return Err(format!("{name} is {rotary_dim}; expected {expected}").into());
    }
    Ok(rotary_dim)
}

/// What a tensor divides frequencies by.
fn factors(gguf: &Gguf, name: &str, pairs: usize) -> Result<Option<Vec<f32>>> {
    if !gguf.tensors.contains_key(name) {
        return Ok(None);
    }
    let factors = gguf.vector(name, pairs)?;
    match factors.iter().position(|factor| !(factor.is_finite() && *factor > 0.0)) {
        None => Ok(Some(factors)),
        Some(at) => {
            let problem = format!("element {at} is {}; expected a positive number", factors[at]);
            Err(format!("tensor {name}: {problem}").into())
        }
    }
}
