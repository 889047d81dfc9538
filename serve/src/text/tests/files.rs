//! Files that say odd things about their tokenizers.

use candle_core::quantized::gguf_file::Value;
use proptest::prelude::*;

use super::{File, integers, strings};

fn ends(file: &File) -> Vec<u32> {
    file.text().unwrap().ends().iter().copied().collect()
}

#[test]
fn ends_are_found_in_integers_of_any_width_and_in_lists() {
    let file = File::byte_level(&["A", "B", "C"]);
    for id in
        [Value::U16(258), Value::I16(258), Value::U32(258), Value::I32(258), Value::U64(258), Value::I64(258)]
    {
        for key in ["eos", "eot", "eom"] {
            let file = file.clone().with(&format!("ggml.{key}_token_id"), id.clone());
            assert_eq!(ends(&file), [258], "{key} {id:?}");
        }
    }
    let file =
        file.with("ggml.eos_token_id", integers(&[258, 260])).with("ggml.eot_token_id", Value::U32(259));
    assert_eq!(ends(&file), [258, 259, 260]);
    // There are none, and there is none such.
    assert_eq!(ends(&file.clone().with("ggml.eos_token_id", Value::I32(-1))), [259]);
    let file = file.with("ggml.eos_token_id", Value::U32(999));
    assert_eq!(ends(&file), [259]);
    let text = file.text().unwrap();
    assert!(
        text.warnings().iter().any(|warning| warning.contains("eos_token_id 999")),
        "{:?}",
        text.warnings()
    );
}

#[test]
fn ends_are_found_by_their_names() {
    for name in
        ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "</s>", "<|endoftext|>", "<|end|>"]
    {
        for kind in [3, 4] {
            let file = File::byte_level(&[name]);
            let types = [&[1; 258][..], &[kind]].concat();
            let file = file.with("ggml.token_type", integers(&types));
            assert_eq!(ends(&file), [258], "{name} {kind}");
            let text = file.text().unwrap();
            assert!(text.is_control(258) && !text.encode(name).contains(&258), "{name} {kind}");
        }
    }
    assert_eq!(ends(&File::byte_level(&["<|end|>", "<|return|>", "<|call|>"])), [259, 260]);
    assert_eq!(ends(&File::byte_level(&["<|im_start|>", "<tool_call>"])), [0u32; 0]);
    let text = File::byte_level(&[]).text().unwrap();
    assert!(text.warnings().iter().any(|warning| warning.contains("no token that ends an answer")));
}

#[test]
fn a_rule_that_a_file_does_not_name_is_a_warning() {
    let mut file = File::byte_level(&["</s>"]);
    assert!(!file.text().unwrap().warnings().iter().any(|warning| warning.contains("ggml.pre")));
    file.0.remove("tokenizer.ggml.pre");
    let text = file.text().unwrap();
    assert!(text.warnings()[0].contains("tokenizer.ggml.pre is missing"), "{:?}", text.warnings());
    let error = file.with("ggml.pre", Value::String("chaotic".into())).text().err().unwrap();
    assert!(error.to_string().contains("`chaotic`; expected one of default"), "{error}");
}

#[test]
fn arrays_that_do_not_belong_together_are_refused() {
    for (file, key, value, expected) in [
        (File::byte_level(&[]), "ggml.token_type", integers(&[1]), "not an array of 258 numbers"),
        (File::byte_level(&[]), "ggml.token_type", integers(&[9; 258]), "token_type has a 9"),
        (File::byte_level(&[]), "ggml.merges", strings(&["ĠĠ"]), "merges has `ĠĠ` at 0"),
        (File::byte_level(&[]), "ggml.merges", strings(&["Ġ Ġ", "Ġ xyz"]), "merges has `Ġ xyz` at 1"),
        (File::byte_level(&[]), "ggml.tokens", integers(&[1]), "no array of strings"),
        (File::byte_level(&[]), "ggml.eos_token_id", Value::F32(1.0), "eos_token_id are not all integers"),
        (File::byte_level(&[]), "ggml.pre", Value::U32(1), "ggml.pre is no string"),
        (File::sentencepiece(&[]), "ggml.scores", integers(&[1; 259]), "scores are not all f32"),
    ] {
        let error = file.with(key, value).text().err().unwrap().to_string();
        assert!(error.contains(expected), "{expected:?} is not in: {error}");
    }
}

#[test]
fn of_tokens_of_the_same_name_one_is_taken() {
    let file = File::sentencepiece(&[("a", -1.0, 1), ("a", -2.0, 1), ("", 0.0, 1), ("", 0.0, 3)]);
    assert_eq!(file.text().unwrap().encode("aa"), [1, 259, 259]);
}

fn value() -> impl Strategy<Value = Value> {
    let array = prop::collection::vec(any::<i16>(), 0..300);
    let name = "[ĠaÃ<|>▁x ]{0,3}";
    prop_oneof![
        any::<i64>().prop_map(Value::I64),
        any::<f32>().prop_map(Value::F32),
        any::<bool>().prop_map(Value::Bool),
        name.prop_map(Value::String),
        array.clone().prop_map(|all| Value::Array(all.into_iter().map(Value::I16).collect())),
        array.prop_map(|all| Value::Array(
            all.into_iter().map(|n| Value::F32(f32::from_bits(n as u32))).collect()
        )),
        prop::collection::vec(name, 0..300).prop_map(|all| strings(&all)),
        prop::collection::vec(1..7, 258..262).prop_map(|all: Vec<i32>| integers(&all)),
    ]
}

const KEYS: [&str; 12] = [
    "ggml.tokens",
    "ggml.token_type",
    "ggml.scores",
    "ggml.merges",
    "ggml.bos_token_id",
    "ggml.eos_token_id",
    "ggml.eot_token_id",
    "ggml.unknown_token_id",
    "ggml.add_bos_token",
    "ggml.add_space_prefix",
    "ggml.pre",
    "chat_template",
];

proptest! {
    #[test]
    fn no_file_makes_it_panic(
        changes in prop::collection::vec((prop::sample::select(&KEYS[..]), value()), 1..4),
        bytes: bool,
        text in "[ a<|>éx\n]{0,12}",
    ) {
        let pieces = [("▁", -1.0, 1), ("a", -2.0, 1), ("▁a", f32::NAN, 4)];
        let mut file = if bytes { File::byte_level(&["<|x|>", "<s>"]) } else { File::sentencepiece(&pieces) };
        for (key, value) in changes {
            file = file.with(key, value);
        }
        if let Ok(loaded) = file.text() {
            let ids = loaded.encode(&text);
            prop_assert!(ids.iter().all(|id| (*id as usize) < loaded.vocab_size()));
            let mut stream = loaded.stream();
            for id in ids.into_iter().chain([u32::MAX]) {
                stream.push(id);
            }
            stream.finish();
            let messages = [super::Message::new(super::Role::User, text)];
            let _ = loaded.render_chat(&messages, &[], &super::ChatOptions::default());
        }
    }
}
