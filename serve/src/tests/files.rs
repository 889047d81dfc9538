//! Files that are refused, or run as they say.

use super::*;

#[test]
fn files_that_cannot_be_run_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |path: &Path, expected: &str| {
        let text = engine(path).err().expect("no engine").to_string();
        assert!(text.contains(expected), "{expected:?} is not in: {text}");
        assert!(text.contains(path.to_str().unwrap()), "{text}");
    };
    for (key, value, expected) in [
        (
            "general.architecture",
            Value::String("gpt2".into()),
            "its architecture is gpt2; expected one of llama, qwen2,",
        ),
        (
            "llama.attention.key_length",
            Value::U32(63),
            "its heads have 63 dimensions; expected an even number",
        ),
        ("llama.attention.head_count_kv", Value::U32(3), "cannot share 3 KV heads"),
        ("llama.attention.head_count", Value::U32(0), "head_count is 0; expected a positive number"),
        ("llama.rope.dimension_count", Value::U32(72), "is 72; expected a multiple of 8 up to 64"),
        ("llama.rope.dimension_count", Value::U32(20), "is 20; expected a multiple of 8 up to 64"),
        ("llama.expert_count", Value::U32(8), "llama.expert_used_count is missing"),
        ("llama.expert_count", Value::String("8".into()), "expert_count is \"8\"; expected a number"),
        ("llama.attention.scale", Value::F32(-0.25), "attention.scale is -0.25; expected a number from 0 on"),
        (
            "llama.rope.scaling.type",
            Value::String("longrope".into()),
            "rope_factors_long.weight: it is missing",
        ),
        ("llama.rope.scaling.type", Value::String("dynamic".into()), "`dynamic`; expected none, linear"),
        ("llama.rope.scaling.type", Value::U32(1), "rope.scaling.type is 1; expected text"),
        ("llama.rope.scaling.factor", Value::F32(-1.0), "scaling.factor is -1; expected a number from 0 on"),
        ("llama.rope.scaling.factor", Value::F32(f32::NAN), "scaling.factor is NaN; expected a number"),
        ("llama.feed_forward_length", Value::U32(97), "blk.0.ffn_gate.weight: its shape is [96, 64]"),
        ("llama.block_count", Value::U32(2), "blk.1.attn_q.weight: it is missing"),
        (
            "llama.block_count",
            Value::U32(u32::MAX),
            "is 4294967295; expected at most one for each of 11 tensors",
        ),
        (
            "llama.attention.key_length",
            Value::U32(1 << 31),
            "2147483648 dimensions; expected an even number up to",
        ),
    ] {
        let mut tiny = Tiny::new();
        tiny.metadata.insert(key, value);
        refused(&tiny.write(&folder), expected);
    }
    for (name, expected) in [
        ("blk.0.attn_norm.bias", "it has a tensor blk.0.attn_norm.bias, which this program does not support"),
        ("output.bias", "it has a tensor output.bias"),
        ("blk.1.attn_q.bias", "it has a tensor blk.1.attn_q.bias"),
        ("blk.0.ffn_gate_inp.weight", "it has a tensor blk.0.ffn_gate_inp.weight"),
        ("blk.0.ffn_gate.0.weight", "it has a tensor blk.0.ffn_gate.0.weight"),
        ("blk.0.ffn_up.bias", "blk.0.ffn_up.bias: its shape is [64]; expected [96]"),
        ("rope_freqs.weight", "rope_freqs.weight: its shape is [64]; expected [32]"),
    ] {
        let mut tiny = Tiny::new();
        tiny.tensors.insert(name.into(), vec![64]);
        refused(&tiny.write(&folder), expected);
    }
    let mut tiny = Tiny::new();
    tiny.metadata.remove("llama.context_length");
    refused(&tiny.write(&folder), "llama.context_length is missing");

    let path = Tiny::new().write(&folder);
    assert!(engine(&path).is_ok());
    let whole = fs::read(&path).unwrap();
    for (len, expected) in [
        (whole.len() - 40, ".weight: it needs"),
        (100, "not a usable GGUF file"),
        (0, "not a usable GGUF file"),
    ] {
        fs::write(&path, &whole[..len]).unwrap();
        refused(&path, expected);
    }
    fs::write(&path, b"no model at all").unwrap();
    refused(&path, "not a usable GGUF file");
    fs::remove_file(&path).unwrap();
    refused(&path, "cannot open the model");
}

/// As the bar shows it that loading has.
#[test]
fn bytes_are_counted_as_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let model = Model::open(&Tiny::new().write(&folder)).unwrap();
    let numbers: usize = Tiny::new().tensors.values().map(|shape| shape.iter().product::<usize>()).sum();
    assert_eq!((model.bytes(), model.bytes_read()), (4 * numbers as u64, 0));
    let _ends = model.ends().unwrap();
    let ends = model.bytes_read();
    assert_eq!(ends, 4 * (32 * 64 + 64));
    assert!(model.layers().all(|layer| layer.is_ok() && model.bytes_read() > ends));
    assert_eq!(model.bytes_read(), model.bytes());
}

#[test]
fn a_head_of_its_own_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let mut tiny = Tiny::new();
    let tied = tiny.logits(&folder);
    assert!(tied.len() == 64 && tied.iter().any(|logit| logit.abs() > 1e-3));
    tiny.tensors.insert("output.weight".into(), vec![32, 64]);
    let doubled: Vec<_> = tied.iter().map(|logit| logit * 2.0).collect();
    assert_eq!(tiny.logits(&folder), doubled);
}

#[test]
fn rotary_embeddings_are_scaled_as_the_file_says() {
    let folder = tempfile::tempdir().unwrap();
    let with = |metadata: &[(&'static str, Value)]| {
        let mut tiny = Tiny::new();
        tiny.metadata.extend(metadata.iter().cloned());
        tiny
    };
    let rope = |tiny: &Tiny| {
        let config = Model::open(&tiny.write(&folder)).unwrap().config;
        config.ropes[0].for_length(config.context_length).clone()
    };
    let name = |name: &str| ("llama.rope.scaling.type", Value::String(name.into()));
    let factor = ("llama.rope.scaling.factor", Value::F32(4.0));
    let check = |tiny: &Tiny, attention_factor: f64, expected: &dyn Fn(usize) -> f64| {
        let rope = rope(tiny);
        assert!((rope.attention_factor() - attention_factor).abs() < 1e-9, "{}", rope.attention_factor());
        for (pair, freq) in rope.inv_freq().iter().enumerate() {
            let expected = expected(pair);
            assert!((freq / expected - 1.0).abs() < 1e-9, "pair {pair}: {freq}, expected {expected}");
        }
        rope.inv_freq().len()
    };
    let plain = |pair: usize| 1e4f64.powf(-(pair as f64) / 32.0);

    let none = with(&[]);
    assert_eq!(check(&none, 1.0, &plain), 32);
    check(&with(&[name("none"), factor.clone()]), 1.0, &plain);
    check(&with(&[name("linear")]), 1.0, &plain);
    let base = with(&[("llama.rope.freq_base", Value::F32(5e5))]);
    check(&base, 1.0, &|pair| 5e5f64.powf(-(pair as f64) / 32.0));
    let linear = with(&[name("linear"), factor.clone()]);
    for tiny in [&linear, &with(slice::from_ref(&factor))] {
        check(tiny, 1.0, &|pair| plain(pair) / 4.0);
    }
    check(&with(&[("llama.rope.scale_linear", Value::F32(2.0))]), 1.0, &|pair| plain(pair) / 2.0);
    let partial = with(&[("llama.rope.dimension_count", Value::U32(32))]);
    assert_eq!(check(&partial, 1.0, &|pair| plain(2 * pair)), 16);

    // Within 64 positions, the context, pair 0 turns 10.2 times, pair 8 once,
    // and pairs from 9 on less: that is the ramp from pair 0 to pair 9.
    let yarn = |pair: usize| {
        let ramp = (pair as f64 / 9.0).min(1.0);
        plain(pair) * (1.0 - ramp) + plain(pair) / 4.0 * ramp
    };
    let attention = 0.1 * 4f64.ln() + 1.0;
    check(&with(&[name("yarn"), factor.clone()]), attention, &yarn);
    let longer = [
        name("yarn"),
        factor.clone(),
        ("llama.context_length", Value::U32(256)),
        ("llama.rope.scaling.original_context_length", Value::U32(64)),
        ("llama.rope.scaling.attn_factor", Value::F32(0.5)),
    ];
    check(&with(&longer), attention / 2.0, &yarn);

    // What a tensor says divides, after scaling by metadata.
    let mut tensor = with(slice::from_ref(&factor));
    tensor.tensors.insert("rope_freqs.weight".into(), vec![32]);
    check(&tensor, 1.0, &|pair| plain(pair) / 4.0 / (1.0 + pair as f64));

    // The first token is at position 0, which turns nothing.
    let logits = none.logits(&folder);
    for tiny in [linear, partial, tensor] {
        let other = tiny.logits(&folder);
        assert_eq!(other[..32], logits[..32]);
        assert_ne!(other[32..], logits[32..]);
    }
}
