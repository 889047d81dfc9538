//! Gemma 2 over a paged cache, against candle-transformers' where that computes the same, and against masks
//! of candle's operations where a window hides tokens: over random weights, on the CPU always, on an NVIDIA
//! GPU with `FLASHINFER_RS_RUN_GPU_TESTS=1`.

mod common;

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::gemma2;
use common::{Case, Forward, Model, Run, STEPS, VOCAB, cuda, error, say};
use flashinfer_rs::kv::{Batch, PageAllocator, Sequence};
use patched_candle_transformers::gemma2::{Config, Gemma2, PagedGemma2};

const POSITIONS: usize = 192;
/// Shorter than the prompts, and no multiple of a page.
const WINDOW: usize = 21;
const CAP: f64 = 4.0;

fn config(window: Option<usize>, cap: Option<f64>) -> Config {
    Config {
        attention_bias: false,
        // The one that the wheels of tests have modules of with window and cap.
        head_dim: 256,
        hidden_activation: Activation::GeluPytorchTanh,
        hidden_size: 192,
        intermediate_size: 160,
        num_attention_heads: 4,
        num_hidden_layers: 3,
        num_key_value_heads: 2,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        vocab_size: VOCAB,
        final_logit_softcapping: Some(30.0),
        attn_logit_softcapping: cap,
        query_pre_attn_scalar: 256,
        sliding_window: window,
        max_position_embeddings: POSITIONS,
    }
}

/// Over a paged cache; pages of 16 tokens. All sequences of the batch are as long as each other.
fn paged(config: &Config, weights: VarBuilder) -> Result<Forward> {
    let pool = PageAllocator::new(64, 16).map_err(candle_core::Error::wrap)?;
    let mut model = PagedGemma2::new(config, weights, &pool)?;
    let mut batch = Batch::new(&pool);
    Ok(Box::new(move |tokens, _| {
        let (requests, len) = tokens.dims2()?;
        while batch.len() < requests {
            batch.push(Sequence::new(&pool)).map_err(candle_core::Error::wrap)?;
        }
        batch.append(vec![len; requests]).map_err(candle_core::Error::wrap)?;
        model.forward(&batch, &tokens.flatten_all()?.to_vec1::<u32>()?)
    }))
}

/// The same model, whose attention is made of candle's operations and a mask. One sequence.
fn eager(config: &Config, weights: VarBuilder) -> Result<Forward> {
    let (device, cap) = (weights.device().clone(), config.attn_logit_softcapping);
    let model = Gemma2::new(config, weights)?;
    let frequencies = flashinfer_rs::rope::RopeFrequencies::new(
        config.head_dim,
        config.rope_theta,
        &flashinfer_rs::rope::RopeScaling::None,
    );
    let rotary = flashinfer_rs::candle::RotaryEmbedding::new(
        &device,
        &frequencies.map_err(candle_core::Error::wrap)?,
        POSITIONS,
    )?;
    let mut kept: Vec<Option<[Tensor; 2]>> = vec![None; config.num_hidden_layers];
    Ok(Box::new(move |tokens, before| {
        let (requests, len) = tokens.dims2()?;
        assert_eq!(requests, 1);
        let positions = rotary.positions((before as i32..(before + len) as i32).collect())?;
        let last = Tensor::new(&[len as u32 - 1], &device)?;
        model.forward(&tokens.flatten_all()?, &positions, &last, |layer, [q, k, v]| {
            let [all_k, all_v] = match &kept[layer] {
                Some([old_k, old_v]) => [Tensor::cat(&[old_k, k], 0)?, Tensor::cat(&[old_v, v], 0)?],
                None => [k.contiguous()?, v.contiguous()?],
            };
            kept[layer] = Some([all_k.clone(), all_v.clone()]);
            let group = model.heads().group_size().unwrap();
            let heads = |all: &Tensor| {
                let (tokens, heads, width) = all.dims3()?;
                let repeated = all.unsqueeze(2)?.broadcast_as((tokens, heads, group, width))?;
                repeated.reshape((tokens, heads * group, width))?.transpose(0, 1)?.contiguous()
            };
            let keys = before + len;
            let hidden = (before..keys).flat_map(|query| {
                let first = model.window_left(layer).map_or(0, |left| query.saturating_sub(left));
                (0..keys)
                    .map(move |key| if (first..=query).contains(&key) { 0f32 } else { f32::NEG_INFINITY })
            });
            let mask = Tensor::from_iter(hidden, &device)?.reshape((1, len, keys))?.to_dtype(q.dtype())?;
            let q = q.transpose(0, 1)?.contiguous()?;
            let logits = (q.matmul(&heads(&all_k)?.transpose(1, 2)?.contiguous()?)? * model.sm_scale())?;
            let logits = match cap {
                Some(cap) => ((logits / cap)?.tanh()? * cap)?,
                None => logits,
            };
            let weights = candle_nn::ops::softmax(&logits.broadcast_add(&mask)?, D::Minus1)?;
            weights.matmul(&heads(&all_v)?)?.transpose(0, 1)?.contiguous()
        })
    }))
}

/// Of candle-transformers, which has the cap and no window.
fn theirs(config: &Config, weights: VarBuilder) -> Result<Forward> {
    let mut model = gemma2::Model::new(false, config, weights)?;
    Ok(Box::new(move |tokens, before| model.forward(tokens, before)))
}

/// Where nothing is hidden: candle-transformers' model computes the same.
fn without_window(weights: VarBuilder, flash: bool) -> Result<Forward> {
    let config = &config(Some(POSITIONS), Some(CAP));
    if flash { paged(config, weights) } else { theirs(config, weights) }
}

fn with_window(weights: VarBuilder, flash: bool) -> Result<Forward> {
    let config = &config(Some(WINDOW), Some(CAP));
    if flash { paged(config, weights) } else { eager(config, weights) }
}

fn with_window_alone(weights: VarBuilder, flash: bool) -> Result<Forward> {
    let config = &config(Some(WINDOW), None);
    if flash { paged(config, weights) } else { eager(config, weights) }
}

#[test]
fn without_window_it_is_candles_on_the_cpu() {
    for batch in [1, 2] {
        let case = Case::new(without_window, batch, DType::F32);
        let run = Run { device: &Device::Cpu, dtype: DType::F32, flash: true, steps: &STEPS };
        let error = error(&case.logits(run), &case.expected());
        say(&format!("batch {batch}: relative error {error:.1e}"));
        assert!(error < 5e-6);
    }
}

#[test]
fn windows_are_masks_on_the_cpu() {
    for (name, model) in [("window and cap", with_window as Model), ("window", with_window_alone)] {
        let case = Case::new(model, 1, DType::F32);
        let run = Run { device: &Device::Cpu, dtype: DType::F32, flash: true, steps: &STEPS };
        let error = error(&case.logits(run), &case.expected());
        say(&format!("{name}: relative error {error:.1e}"));
        assert!(error < 5e-6);
    }
}

/// Without one of the two, logits are others: both are applied.
#[test]
fn window_and_cap_both_count() {
    let seed = Case::new(with_window, 1, DType::F32).seed;
    let of = |model| {
        let case = Case { model, seed, batch: 1, dtype: DType::F32 };
        case.logits(Run { device: &Device::Cpu, dtype: DType::F32, flash: true, steps: &STEPS })
    };
    let expected = of(with_window);
    for (name, model) in [("the cap", without_window as Model), ("the window", with_window_alone)] {
        let apart = error(&of(model), &expected);
        say(&format!("with {name} alone they are {apart:.1e} apart"));
        assert!(apart > 1e-2);
    }
}

#[test]
fn wrong_batches_are_refused() {
    let pool = PageAllocator::new(8, 16).unwrap();
    let weights = VarBuilder::zeros(DType::F32, &Device::Cpu);
    let mut model = PagedGemma2::new(&config(Some(WINDOW), None), weights, &pool).unwrap();
    let mut batch = Batch::new(&pool);
    let error = model.forward(&batch, &[]).unwrap_err().to_string();
    assert!(error.contains("the batch has no request"), "{error}");
    (0..2).for_each(|_| batch.push(Sequence::new(&pool)).unwrap());
    batch.append([3, 1]).unwrap();
    let error = model.forward(&batch, &[1, 2, 3]).unwrap_err().to_string();
    assert!(error.contains("3 tokens for a batch with 4 new ones"), "{error}");
    assert_eq!(model.forward(&batch, &[1, 2, 3, 4]).unwrap().dims(), [2, VOCAB]);
    batch.append([0, 1]).unwrap();
    let error = model.forward(&batch, &[5]).unwrap_err().to_string();
    assert!(error.contains("request 0 has no new token"), "{error}");
}

#[test]
fn windows_and_caps_on_cuda() {
    let Some(device) = &cuda() else { return };
    // Of bf16 there are modules with window and cap in the wheels of tests.
    let dtype = DType::BF16;
    for (name, model, batches) in
        [("window and cap", with_window as Model, &[1][..]), ("cap", without_window, &[1, 2])]
    {
        for &batch in batches {
            let case = Case::new(model, batch, dtype);
            let expected = case.expected();
            let run = |flash| case.logits(Run { device, dtype, flash, steps: &STEPS });
            let (eager, flash) = (error(&run(false), &expected), error(&run(true), &expected));
            say(&format!("{name}, batch {batch}: relative error {flash:.1e}, of eager {eager:.1e}"));
            assert!(flash < 4e-2 && flash < 2.0 * eager);
        }
    }
}
