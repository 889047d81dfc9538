//! The keys of an architecture, `ARCH.*`: each is used, or known not to matter,
//! or its file is refused.

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
};

use candle_core::quantized::gguf_file::Value;

use super::gguf::integer;
use crate::Result;

/// Keys that change nothing that is computed here.
const HARMLESS: [&str; 6] = [
    "vocab_size",
    "tensor_data_layout",
    "use_parallel_residual",
    "attention.layer_norm_epsilon",
    "rope.scaling.finetuned",
    "decoder_start_token_id",
];

/// Keys of what this program does not compute, and the numbers at which they ask
/// for nothing.
const NEUTRAL: [(&str, &[f64]); 21] = [
    ("attention.causal", &[1.0]),
    ("attention.clamp_kqv", &[0.0]),
    ("attention.max_alibi_bias", &[0.0]),
    ("attention.output_scale", &[0.0, 1.0]),
    ("attention.value_scale", &[0.0, 1.0]),
    ("attention.temperature_scale", &[0.0]),
    ("attention.shared_kv_layers", &[0.0]),
    ("router_logit_softcapping", &[0.0]),
    ("logit_scale", &[0.0, 1.0]),
    ("pooling_type", &[0.0]),
    ("swin_norm", &[0.0]),
    ("leading_dense_block_count", &[0.0]),
    ("moe_every_n_layers", &[0.0, 1.0]),
    ("interleave_moe_layer_step", &[1.0]),
    ("expert_group_count", &[0.0, 1.0]),
    ("expert_group_used_count", &[0.0, 1.0]),
    ("nextn_predict_layers", &[0.0]),
    ("n_deepstack_layers", &[0.0]),
    ("rope.scaling.alpha", &[0.0, 1.0]),
    ("rope.scaling.yarn_ext_factor", &[1.0]),
    ("rope.scaling.yarn_log_multiplier", &[0.0]),
];

/// The keys of an architecture, and which of them were asked for.
pub struct Keys<'a> {
    architecture: &'a str,
    metadata: &'a HashMap<String, Value>,
    asked: RefCell<HashSet<&'static str>>,
}

impl<'a> Keys<'a> {
    pub fn new(architecture: &'a str, metadata: &'a HashMap<String, Value>) -> Self {
        Self { architecture, metadata, asked: RefCell::default() }
    }

    /// The value of a key, which counts as used from now on.
    pub fn value(&self, key: &'static str) -> Option<&'a Value> {
        self.asked.borrow_mut().insert(key);
        self.metadata.get(&self.name(key))
    }

    /// The key as files have it.
    pub fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    /// A number of things, 0 among them. An array of equal numbers, one for each
    /// layer, is that number.
    pub fn count_or_zero(&self, key: &'static str) -> Result<Option<usize>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let number = |value| integer(value).filter(|value| (0..=0xffff_ffff).contains(value));
        let wrong =
            |expected: &str| Err(format!("{} is {}; expected {expected}", self.name(key), brief(value)));
        match value {
            Value::Array(values) => match values.split_first() {
                Some((first, rest)) if rest.iter().all(|value| number(value) == number(first)) => {
                    number(first).map_or_else(|| wrong("numbers"), |number| Ok(Some(number as usize)))
                }
                _ => wrong("the same number for all layers"),
            },
            value => number(value).map_or_else(|| wrong("a number"), |number| Ok(Some(number as usize))),
        }
        .map_err(Into::into)
    }

    /// A number of things, at least one.
    pub fn count(&self, key: &'static str) -> Result<Option<usize>> {
        match self.count_or_zero(key)? {
            Some(0) => Err(format!("{} is 0; expected a positive number", self.name(key)).into()),
            count => Ok(count),
        }
    }

    pub fn need(&self, key: &'static str) -> Result<usize> {
        self.count(key)?.ok_or_else(|| format!("{} is missing", self.name(key)).into())
    }

    /// A number that is not negative.
    pub fn real_or_zero(&self, key: &'static str) -> Result<Option<f64>> {
        match self.value(key).map(|value| (value, real(value))) {
            None => Ok(None),
            Some((_, Some(number))) if number.is_finite() && number >= 0.0 => Ok(Some(number)),
            Some((value, _)) => {
                Err(format!("{} is {}; expected a number from 0 on", self.name(key), brief(value)).into())
            }
        }
    }

    /// A positive number.
    pub fn real(&self, key: &'static str) -> Result<Option<f64>> {
        match self.real_or_zero(key)? {
            Some(0.0) => Err(format!("{} is 0; expected a positive number", self.name(key)).into()),
            number => Ok(number),
        }
    }

    pub fn flag(&self, key: &'static str) -> Result<Option<bool>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(value) => {
                Err(format!("{} is {}; expected true or false", self.name(key), brief(value)).into())
            }
        }
    }

    pub fn text(&self, key: &'static str) -> Result<Option<&'a str>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(value) => Err(format!("{} is {}; expected text", self.name(key), brief(value)).into()),
        }
    }

    /// Refuses a file with a key that was not asked for, and that may matter.
    pub fn check(&self) -> Result<()> {
        let asked = self.asked.borrow();
        let mut names: Vec<_> = self.metadata.keys().collect();
        names.sort();
        for name in names {
            let key = name.strip_prefix(self.architecture).and_then(|key| key.strip_prefix('.'));
            let Some(key) = key.filter(|key| !asked.contains(key) && !HARMLESS.contains(key)) else {
                continue;
            };
            let value = &self.metadata[name];
            let neutral = NEUTRAL.iter().find(|(known, _)| *known == key).map(|(_, neutral)| *neutral);
            match neutral {
                None => {
                    let problem = format!("it has the key {name}, which this program does not know");
                    return Err(format!("{problem}; its value is {}", brief(value)).into());
                }
                Some(neutral) if !real(value).is_some_and(|value| neutral.contains(&value)) => {
                    let problem = format!("{name} is {}, which this program does not compute", brief(value));
                    return Err(format!("{problem}; expected {}", neutral[neutral.len() - 1]).into());
                }
                Some(_) => {}
            }
        }
        Ok(())
    }
}

/// A number of any type, or 1 for true and 0 for false.
fn real(value: &Value) -> Option<f64> {
    match *value {
        Value::F32(value) => Some(value.into()),
        Value::F64(value) => Some(value),
        Value::Bool(value) => Some(f64::from(u8::from(value))),
        ref value => integer(value).map(|value| value as f64),
    }
}

/// A value as an error shows it.
pub fn brief(value: &Value) -> String {
    match value {
        Value::Array(values) => format!("an array of {}", values.len()),
        Value::String(text) => format!("{:?}", text.chars().take(40).collect::<String>()),
        Value::F32(value) => value.to_string(),
        Value::F64(value) => value.to_string(),
        Value::Bool(value) => value.to_string(),
        value => integer(value).map_or_else(String::new, |value| value.to_string()),
    }
}
