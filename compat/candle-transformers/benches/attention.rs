//! Attention alone: candle's own (`repeat_kv`, products and softmax) against
//! candle-flash-attn's `flash_attn`, on the first NVIDIA GPU.
//!
//! `cargo bench --bench attention` prints microseconds for one call, its host
//! side included: the time of many calls between two synchronizations, divided
//! by their number, and of three such times the least. The calls are alike, as
//! those of a step's layers are; what the first of a step costs more is in the
//! times of the example `candle_llama`.

use std::{
    any::type_name_of_val,
    env,
    time::{Duration, Instant},
};

use candle_core::{DType, Device, Result, Tensor};
use candle_flash_attn::flash_attn;
use candle_nn::ops::softmax_last_dim;
use candle_transformers::utils::{build_additive_causal_mask, repeat_kv};

const DTYPE: DType = DType::F16;
const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const BATCHES: [usize; 2] = [1, 8];
/// Queries and keys of a sequence.
const LENGTHS: [(usize, usize); 6] =
    [(512, 512), (2048, 2048), (8192, 8192), (1, 1024), (1, 8192), (1, 32768)];
/// The most bytes that candle's own attention may take for its weights, of which
/// it holds three at a time.
const WEIGHTS: usize = 16 << 30;
/// How long calls are repeated.
const TIME: Duration = Duration::from_millis(200);

/// The microseconds of one call.
fn measure(device: &Device, call: &dyn Fn() -> Result<Tensor>) -> Result<f64> {
    let time = |count: u32| {
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..count {
            call()?;
        }
        device.synchronize()?;
        Ok::<_, candle_core::Error>(start.elapsed())
    };
    time(3)?; // The first call may open modules, and each of the first allocate.
    let count = TIME.div_duration_f64(time(3)? / 3).ceil() as u32;
    let mut least = Duration::MAX;
    for _ in 0..3 {
        least = least.min(time(count)?);
    }
    Ok(least.as_secs_f64() * 1e6 / f64::from(count))
}

/// What candle-transformers' models compute without flash attention.
fn eager(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, mask: Option<&Tensor>) -> Result<Tensor> {
    let heads = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    let repeated = |x: &Tensor| repeat_kv(heads(x)?, HEADS / KV_HEADS);
    let mut weights = (heads(q)?.matmul(&repeated(k)?.t()?)? * scale)?;
    if let Some(mask) = mask {
        weights = weights.broadcast_add(mask)?;
    }
    softmax_last_dim(&weights)?.matmul(&repeated(v)?)?.transpose(1, 2)?.contiguous()
}

fn main() -> Result<()> {
    // `cargo test --benches` runs this, too.
    if !env::args().any(|argument| argument == "--bench") {
        return Ok(());
    }
    let device = &Device::new_cuda(0)?;
    println!("{DTYPE:?}, {HEADS} query heads, {KV_HEADS} KV heads of {HEAD_DIM}, microseconds");
    println!("flash is {}\n", type_name_of_val(&flash_attn));
    println!("| batch | queries | keys | eager | flash | eager / flash |");
    println!("|---|---|---|---|---|---|");
    let scale = 1.0 / (HEAD_DIM as f64).sqrt();
    for (queries, keys) in LENGTHS {
        for batch in BATCHES {
            let random =
                |len, heads| Tensor::randn(0f32, 1.0, (batch, len, heads, HEAD_DIM), device)?.to_dtype(DTYPE);
            let (q, k, v) = (random(queries, HEADS)?, random(keys, KV_HEADS)?, random(keys, KV_HEADS)?);
            let causal = queries > 1;
            let flash = measure(device, &|| flash_attn(&q, &k, &v, scale as f32, causal))?;
            let fits = batch * HEADS * queries * keys * DTYPE.size_in_bytes() <= WEIGHTS;
            let eager = fits.then(|| {
                let mask = || build_additive_causal_mask(queries, keys - queries, None, device, DTYPE);
                let mask = causal.then(mask).transpose()?;
                measure(device, &|| eager(&q, &k, &v, scale, mask.as_ref()))
            });
            let (eager, ratio) = match eager.transpose()? {
                Some(eager) => (format!("{eager:.1}"), format!("{:.2}", eager / flash)),
                None => ("too large".into(), "–".into()),
            };
            println!("| {batch} | {queries} | {keys} | {eager} | {flash:.1} | {ratio} |");
        }
    }
    Ok(())
}
