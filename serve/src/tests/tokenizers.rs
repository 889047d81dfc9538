//! Tokenizers that are refused, or split text as they say.

use super::*;

#[test]
fn other_tokenizers_are_refused_or_split_as_they_say() {
    let strings = |all: &[&str]| Value::Array(all.iter().map(|s| Value::String((*s).into())).collect());
    let mut tiny = Tiny::new();
    let mut read = |key: &'static str, value: Value| {
        tiny.metadata.insert(key, value);
        tiny.text().map_err(|e| e.to_string())
    };
    let refused = |text: Result<Arc<Text>, String>, expected: &str| {
        let problem = text.err().expect("no tokenizer");
        assert!(problem.contains(expected), "{expected:?} is not in: {problem}");
    };
    refused(read("tokenizer.ggml.pre", Value::String("chaotic".into())), "has no tokenizer");
    refused(read("tokenizer.ggml.model", Value::String("bert".into())), "tokenizer.ggml.tokens");
    refused(read("tokenizer.ggml.model", Value::String("gpt2".into())), "tokenizer.ggml.tokens");
    let tokens = ["1", "2", "3", "4", "12", "123", "a", "Ġ", "Ġa", "Ã", "©", "Ġab", "<s>", "</s>", "  é"];
    refused(
        read("tokenizer.ggml.tokens", strings(&tokens)),
        "splits text as `chaotic`; expected one of default",
    );
    refused(read("tokenizer.ggml.pre", Value::String("smollm".into())), "tokenizer.ggml.merges");
    assert!(read("tokenizer.ggml.merges", strings(&["1 2", "12 3", "Ġ a"])).is_ok());
    // Tokens of the control, and one of the user, which is text as it is.
    let types = (0..15).map(|id| Value::I32([1, 3, 3, 4][usize::saturating_sub(id, 11)]));
    assert!(read("tokenizer.ggml.token_type", Value::Array(types.collect())).is_ok());
    refused(read("tokenizer.ggml.add_eos_token", Value::Bool(true)), "eos_token_id is missing, or no token");
    read("tokenizer.ggml.eos_token_id", Value::U32(13)).unwrap();
    refused(read("tokenizer.ggml.add_bos_token", Value::U32(1)), "add_bos_token is not true or false");
    read("tokenizer.ggml.bos_token_id", Value::U32(12)).err().expect("no tokenizer");
    let text = read("tokenizer.ggml.add_bos_token", Value::Bool(true)).unwrap();
    let eos = EncodeOptions { eos: true, ..EncodeOptions::default() };
    assert_eq!(text.encode_with("a1", &eos), [12, 6, 0, 13]);
    // What is to be continued has not ended.
    assert_eq!(text.encode("a1"), [12, 6, 0]);
    assert!(text.ends().contains(&13));
    let text = read("tokenizer.ggml.add_eos_token", Value::Bool(false)).unwrap();
    let control = EncodeOptions { control: true, ..EncodeOptions::default() };
    assert_eq!(text.encode_with("</s>a   éé", &control), [12, 13, 6, 7, 14, 9, 10]);
    let mut stream = text.stream();
    assert_eq!(
        text.encode_with("</s>a   éé", &control).into_iter().map(|id| stream.push(id)).collect::<String>(),
        "a   éé"
    );
    read("tokenizer.ggml.add_bos_token", Value::Bool(false)).unwrap();
    // The one joins up to three digits, the other none.
    for (pre, expected) in [("llama-bpe", [5, 3, 8].as_slice()), ("smollm", [0, 1, 2, 3, 8].as_slice())] {
        let text = read("tokenizer.ggml.pre", Value::String(pre.into())).unwrap();
        assert_eq!(text.encode("1234 a"), expected, "{pre}");
        assert!(!text.has_chat_template());
    }
    // Without a name, text is split as always was; some names imply BOS, and that
    // a part is taken whole, which no merge makes here.
    tiny.metadata.remove("tokenizer.ggml.add_bos_token");
    for (pre, expected) in [
        (None, [5, 3, 8, 8].as_slice()),
        (Some("default"), &[5, 3, 8, 8]),
        (Some("gpt-2"), &[5, 3, 8, 8]),
        (Some("tekken"), &[12, 0, 1, 2, 3, 8, 11]),
        (Some("pixtral"), &[12, 5, 3, 8, 11]),
    ] {
        tiny.metadata.remove("tokenizer.ggml.pre");
        tiny.metadata.extend(pre.map(|pre| ("tokenizer.ggml.pre", Value::String(pre.into()))));
        let text = tiny.text().unwrap();
        // There is no token `b`.
        let ids = text.encode("1234 a ab");
        assert_eq!(ids, expected, "{pre:?}");
    }
}
