//! Attention alone: candle's own (`repeat_kv`, products and softmax) against
//! candle-flash-attn's `flash_attn`, on the first NVIDIA GPU.
//!
//! `cargo bench --bench attention` prints microseconds for one call, its host
//! side included: the time of many calls between two synchronizations, divided
//! by their number, and of three such times the least. The calls are alike, as
//! those of a step's layers are; what the first of a step costs more is in the
//! times of the example `candle_llama`.
//!
//! A second table has one token for each of several sequences of different
//! lengths: sequence by sequence, and all in one call over a paged cache.

use std::{
    any::type_name_of_val,
    env,
    time::{Duration, Instant},
};

use candle_core::{DType, Device, Result, Tensor};
use candle_flash_attn::flash_attn;
use candle_nn::ops::softmax_last_dim;
use candle_transformers::utils::{build_additive_causal_mask, repeat_kv};
use flashinfer_rs::{
    attention::{AttentionSpec, Heads},
    candle::{PagedCache, PagedDecode, StepTables},
    kv::{Batch, HeadsShape, KvLayout, PageAllocator, Sequence},
};

const DTYPE: DType = DType::F16;
const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const BATCHES: [usize; 2] = [1, 8];
/// Queries and keys of a sequence.
const LENGTHS: [(usize, usize); 6] =
    [(512, 512), (2048, 2048), (8192, 8192), (1, 1024), (1, 8192), (1, 32768)];
/// Sequences of the second table, and the tokens of each.
const SEQUENCES: [usize; 2] = [8, 64];
fn tokens(sequence: usize) -> usize {
    256 + 64 * (sequence * 37 % 61)
}
const PAGE_SIZE: usize = 16;
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

/// Random numbers of a shape `[…, head_dim]`.
fn random(shape: (usize, usize, usize), device: &Device) -> Result<Tensor> {
    let (batch, len, heads) = shape;
    Tensor::randn(0f32, 1.0, (batch, len, heads, HEAD_DIM), device)?.to_dtype(DTYPE)
}

/// One token for each of some sequences: candle's own attention, `flash_attn` and
/// a paged cache.
fn several(sequences: usize, device: &Device) -> Result<[f64; 3]> {
    let scale = 1.0 / (HEAD_DIM as f64).sqrt();
    let each = (0..sequences).map(|sequence| {
        let len = tokens(sequence);
        let [q, k, v] = [(1, HEADS), (len, KV_HEADS), (len, KV_HEADS)];
        let random = |(len, heads)| random((1, len, heads), device);
        Ok([random(q)?, random(k)?, random(v)?])
    });
    let each = each.collect::<Result<Vec<_>>>()?;
    let one_by_one = |attention: &dyn Fn(&[Tensor; 3]) -> Result<Tensor>| {
        let all = || Tensor::cat(&each.iter().map(attention).collect::<Result<Vec<_>>>()?, 0);
        measure(device, &all)
    };
    let eager = one_by_one(&|[q, k, v]| eager(q, k, v, scale, None))?;
    let flash = one_by_one(&|[q, k, v]| flash_attn(q, k, v, scale as f32, false))?;

    let joined = |which: usize| {
        let all: Vec<_> = each.iter().map(|tensors| &tensors[which]).collect();
        Tensor::cat(&all, 1)?.squeeze(0)
    };
    let lens = (0..sequences).map(tokens);
    let wrap = candle_core::Error::wrap;
    let pages = lens.clone().map(|len| (len + 1).div_ceil(PAGE_SIZE)).sum();
    let pool = PageAllocator::new(pages, PAGE_SIZE).map_err(wrap)?;
    let shape = HeadsShape {
        num_layers: 1,
        num_kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        dtype: flashinfer_rs::DType::F16,
        layout: KvLayout::Nhd,
    };
    let mut cache = PagedCache::new(device, &pool, shape)?;
    let mut batch = Batch::new(&pool);
    for _ in 0..sequences {
        batch.push(Sequence::new(&pool)).map_err(wrap)?;
    }
    let mut tables = StepTables::new(device);
    batch.append(lens).map_err(wrap)?;
    let step = tables.update(&batch, &mut cache)?;
    cache.append(&step, 0, &joined(1)?, &joined(2)?)?;
    // The last token of each again, with a query.
    for sequence in 0..sequences {
        batch.truncate(sequence, tokens(sequence) - 1).map_err(wrap)?;
    }
    batch.append(vec![1; sequences]).map_err(wrap)?;
    let heads = Heads::new(HEADS, KV_HEADS);
    let spec = AttentionSpec::new(flashinfer_rs::DType::F16, HEAD_DIM);
    let mut decode = PagedDecode::new(device, &spec, heads)?;
    let step = tables.update(&batch, &mut cache)?;
    let plan = decode.plan(&step)?;
    let q = joined(0)?;
    let paged = measure(device, &|| plan.run(&q, &cache, 0))?;
    let one = flash_attn(&each[0][0], &each[0][1], &each[0][2], scale as f32, false)?.flatten_all()?;
    let same = plan.run(&q, &cache, 0)?.get(0)?.flatten_all()?;
    let error = (one - same)?.to_dtype(DType::F32)?.abs()?.max(0)?.to_scalar::<f32>()?;
    assert!(error < 1e-2, "paged attention and flash_attn differ by {error}");
    Ok([eager, flash, paged])
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
            let random = |len, heads| random((batch, len, heads), device);
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
    println!("\none token for each of several sequences of 256 to 4096 tokens\n");
    println!(
        "| sequences | eager, one by one | flash, one by one | paged, at once | eager / paged | flash / paged |"
    );
    println!("|---|---|---|---|---|---|");
    for sequences in SEQUENCES {
        let [eager, flash, paged] = several(sequences, device)?;
        println!(
            "| {sequences} | {eager:.1} | {flash:.1} | {paged:.1} | {:.1} | {:.1} |",
            eager / paged,
            flash / paged
        );
    }
    Ok(())
}
