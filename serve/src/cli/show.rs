//! `flashinfer show MODEL`: what a model is.

use std::{cmp::Reverse, collections::BTreeMap, fmt::Write, fs, path::PathBuf};

use candle_core::quantized::gguf_file::Value;
use indicatif::DecimalBytes;

use super::out::say;
use crate::{
    Result,
    hub::{Hub, ModelName},
    model::{
        Model,
        gguf::{Gguf, integer},
    },
};

/// Show what a model is, and where its files are
#[derive(clap::Args)]
pub struct Args {
    /// As for `run`; it is fetched if it is not here
    model: ModelName,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let files = Hub::from_env()?.locate(&args.model)?;
    say!("{}", describe(&args.model, &files)?);
    Ok(())
}

/// What the files of a model say of it.
pub fn describe(name: &ModelName, files: &[PathBuf]) -> Result<String> {
    let mut lines = vec![("model", name.to_string())];
    for path in files {
        let size = fs::metadata(path).map_or(0, |found| found.len());
        lines.push(("file", format!("{} ({})", path.display(), DecimalBytes(size))));
    }
    let gguf = Gguf::open_files(files)?;
    let (mut parameters, mut types) = (0, BTreeMap::new());
    for tensor in gguf.tensors.values() {
        let elements: usize = tensor.shape.iter().product();
        parameters += elements;
        *types.entry(format!("{:?}", tensor.dtype)).or_insert(0) += elements;
    }
    let value = |key: &str| gguf.metadata.get(key).and_then(plain);
    let architecture = value("general.architecture").unwrap_or_default();
    let of_it = |key: &str| value(&format!("{architecture}.{key}"));
    let mut types: Vec<_> = types.into_iter().collect();
    types.sort_by_key(|(_, elements)| Reverse(*elements));
    let types: Vec<_> = types.into_iter().map(|(name, _)| name).collect();
    let template = match gguf.metadata.contains_key("tokenizer.chat_template") {
        true => "yes",
        false => "none: it continues text",
    };
    let runs = Model::open_files(files).map_or_else(|error| error.to_string(), |_| "yes".into());
    for (label, found) in [
        ("name", value("general.name")),
        ("license", value("general.license")),
        ("architecture", Some(architecture.clone()).filter(|name| !name.is_empty())),
        ("parameters", Some(format!("{:.1} M", parameters as f64 / 1e6))),
        ("tensors", Some(types.join(", "))),
        ("layers", of_it("block_count")),
        ("hidden size", of_it("embedding_length")),
        ("heads", of_it("attention.head_count")),
        ("KV heads", of_it("attention.head_count_kv")),
        ("experts", of_it("expert_count")),
        ("context", of_it("context_length").map(|tokens| format!("{tokens} tokens"))),
        ("chat template", Some(template.into())),
        ("can be run", Some(runs)),
    ] {
        lines.extend(found.map(|found| (label, found)));
    }
    let mut text = String::new();
    for (label, value) in lines {
        writeln!(text, "{label:16} {value}")?;
    }
    Ok(text.trim_end().into())
}

/// A value of one line.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.replace(char::is_control, " ")),
        value => integer(value).map(|value| value.to_string()),
    }
}
