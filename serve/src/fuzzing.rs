//! What `fuzz/` tries with bytes of any kind, and what must hold of whatever is read of them. Each
//! function ends for any bytes, and panics only where the crate has a fault.

use std::{
    collections::HashMap,
    fs,
    sync::{Arc, LazyLock, OnceLock},
};

use candle_core::quantized::gguf_file::{Content, Value, VersionedMagic};

pub use crate::http::fuzzing::http_body;
use crate::{
    Llm, LlmOptions, SamplingParams,
    backend::device::Device,
    model::Model,
    text::{ChatOptions, EncodeOptions, Message, Role, Text, splits::Pre},
};

/// The longest context of a file whose model is computed, too.
const MOST_COMPUTED: usize = 4096;

/// A file of a model: its metadata, its tensors, its tokenizer; a small one says something.
pub fn gguf(bytes: &[u8]) {
    static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));
    let path = FOLDER.path().join("model.gguf");
    fs::write(&path, bytes).expect("a file");
    let Ok(model) = Model::open(&path) else { return };
    assert!(model.bytes() <= bytes.len() as u64);
    let _ = model.ends();
    for layer in model.layers() {
        let _ = layer;
    }
    let Ok(text) = Text::from_gguf(&model.content) else { return };
    let ids = text.encode("a ab <s> b\n");
    assert!(ids.iter().all(|id| (*id as usize) < text.vocab_size()));
    if model.config.context_length > MOST_COMPUTED {
        return;
    }
    let options = LlmOptions { device: Device::Cpu, cache_tokens: 64, ..LlmOptions::default() };
    if let Ok(llm) = Llm::load(&[path], &options) {
        let params = SamplingParams { max_tokens: Some(2), ..SamplingParams::default() };
        let _ = llm.generate("ab", &params);
    }
}

/// Text, to tokens and back: which tokenizer is in the first byte.
pub fn tokenizer(bytes: &[u8]) {
    // Made when they are asked for: with a sanitizer, all of them take longer than an input may.
    static ALL: [OnceLock<Arc<Text>>; 256] = [const { OnceLock::new() }; 256];
    let Some((&which, bytes)) = bytes.split_first() else { return };
    let which = usize::from(which) % (Pre::names().count() + 1);
    let text = ALL[which].get_or_init(|| match Pre::names().nth(which) {
        Some(pre) => byte_level(pre),
        None => Arc::new(Text::from_gguf(&content(pieces())).expect("a tokenizer")),
    });
    // What SentencePiece writes in place of a space is one to it wherever it stands.
    let pieces = which == Pre::names().count();
    let given = String::from_utf8_lossy(bytes);
    let whole = if pieces { given.replace('▁', " ").into() } else { given.clone() };
    for control in [false, true] {
        let options = EncodeOptions { bos: false, eos: false, control };
        let ids = text.encode_with(&given, &options);
        let back: Vec<u8> = ids.iter().flat_map(|id| text.token_bytes(*id)).copied().collect();
        assert_eq!(back, whole.as_bytes(), "{which}, control tokens: {control}");
        assert!(control || ids.iter().all(|id| !text.is_control(*id)), "text became a control token");
    }
    let mut stream = text.stream();
    let ids = text.encode_with(&given, &EncodeOptions { bos: false, ..EncodeOptions::default() });
    let mut back: String = ids.iter().map(|id| stream.push(*id)).collect();
    back += &stream.finish();
    assert_eq!(back, whole, "{which}, token by token");
}

/// A chat template, and behind zero bytes the messages that it writes.
pub fn chat_template(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut parts = text.split('\0');
    let template = parts.next().unwrap_or_default();
    let mut metadata = pieces();
    metadata.insert("tokenizer.chat_template".into(), Value::String(template.into()));
    let Ok(text) = Text::from_gguf(&content(metadata)) else { return };
    let roles = [Role::User, Role::Assistant].into_iter().cycle();
    let messages: Vec<_> = parts.zip(roles).map(|(text, role)| Message::new(role, text)).collect();
    let tool =
        serde_json::json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}});
    for tools in [&[][..], &[tool]] {
        for continue_final_message in [false, true] {
            let options = ChatOptions {
                add_generation_prompt: !continue_final_message,
                continue_final_message,
                ..ChatOptions::default()
            };
            if let Ok(ids) = text.render_chat(&messages, tools, &options) {
                assert!(ids.iter().all(|id| (*id as usize) < text.vocab_size()));
            }
        }
    }
}

/// A byte-level tokenizer with this rule of splits.
pub fn byte_level(pre: &str) -> Arc<Text> {
    Arc::new(Text::from_gguf(&content(byte_level_metadata(pre))).expect("a tokenizer"))
}

fn content(metadata: HashMap<String, Value>) -> Content {
    let (tensor_infos, magic) = (HashMap::new(), VersionedMagic::GgufV3);
    Content { magic, metadata, tensor_infos, tensor_data_offset: 0 }
}

fn strings(all: &[String]) -> Value {
    Value::Array(all.iter().cloned().map(Value::String).collect())
}

/// All bytes, two control tokens, and what some merges make.
fn byte_level_metadata(pre: &str) -> HashMap<String, Value> {
    let printed = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let others = (0..256u32).filter(|byte| !printed(byte)).zip(256..);
    let mut characters: HashMap<u32, u32> = others.collect();
    characters.extend((0..256).filter(printed).map(|byte| (byte, byte)));
    let mut tokens: Vec<_> =
        (0..256).map(|byte| char::from_u32(characters[&byte]).expect("a character").to_string()).collect();
    let merges = ["Ġ t", "h e", "Ġt he", "1 2", "12 3", "Ġ Ġ", "Ã ©", "' s", "Ċ Ċ", "a a", "aa aa"];
    let merges = merges.map(String::from);
    tokens.extend(["<s>", "</s>"].map(String::from));
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let kind = |id: usize| if [256, 257].contains(&id) { 3 } else { 1 };
    let kinds = (0..tokens.len()).map(|id| Value::I32(kind(id))).collect();
    let all = [
        ("model", Value::String("gpt2".into())),
        ("pre", Value::String(pre.into())),
        ("tokens", strings(&tokens)),
        ("token_type", Value::Array(kinds)),
        ("merges", strings(&merges)),
        ("bos_token_id", Value::U32(256)),
        ("eos_token_id", Value::U32(257)),
    ];
    all.map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).into()
}

/// SentencePiece with all bytes, and no space before a text.
fn pieces() -> HashMap<String, Value> {
    let mut tokens = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(["▁", "▁▁", "▁t", "he", "▁the", "é", "12", "a", "aa"].map(String::from));
    let kind = |id: usize| match id {
        0 => 2,
        1 | 2 => 3,
        3..259 => 6,
        _ => 1,
    };
    let kinds = (0..tokens.len()).map(|id| Value::I32(kind(id))).collect();
    let scores = (0..tokens.len()).map(|id| Value::F32(-(id as f32))).collect();
    let all = [
        ("model", Value::String("llama".into())),
        ("tokens", strings(&tokens)),
        ("token_type", Value::Array(kinds)),
        ("scores", Value::Array(scores)),
        ("add_space_prefix", Value::Bool(false)),
        ("bos_token_id", Value::U32(1)),
        ("eos_token_id", Value::U32(2)),
    ];
    all.map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).into()
}

#[cfg(test)]
mod tests {
    use test_support::replay::replay;

    /// Each seed, and mutations of it.
    #[test]
    fn nothing_that_is_read_panics() {
        for (name, mutations, target) in [
            ("gguf", 1000, super::gguf as fn(&[u8])),
            ("tokenizer", 2000, super::tokenizer),
            ("chat_template", 500, super::chat_template),
            ("http_body", 1000, super::http_body),
        ] {
            replay(format!("{}/../fuzz/seeds/{name}", env!("CARGO_MANIFEST_DIR")), mutations, target);
        }
    }
}
