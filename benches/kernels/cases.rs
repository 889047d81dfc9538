//! The cases that need no plan.

use flashinfer_rs::{
    DType, ModuleName, PageIndices, PageTable,
    activation::{self, ActivationOptions},
    indices::{AppendIndices, AppendTable, BoundedIndices, BoundedTable, SlotMapping},
    kv::{KvLayout, PagedKvMut},
    norm, page,
    rope::{self, CosSinCache, RopeFrequencies, RopeOptions, RopeScaling, RopeTensors, Rotation},
    sampling::{self, Samples, SamplingOptions},
};
use serde_json::json;

use crate::{
    HEAD_DIM, KV_HEADS, PAGE_SIZE, QO_HEADS, Result,
    measure::{Bench, Case, Kind, Raw},
    operand::Operand,
    packed,
};

const DTYPE: DType = DType::F16;
const DTYPE_NAME: &str = "f16";
const MAX_POSITION: usize = 8192;
const VOCAB: usize = 128256;
const TOP_K: u32 = 50;
const TOP_P: f64 = 0.9;
/// Rows of a decode step, and enough for more than the L2 cache.
const ROWS: [usize; 2] = [1, 8192];

impl Case<'_> {
    /// A function of one of the modules with fixed names.
    fn function(&self, module: &ModuleName, name: &str) -> Result<flashinfer_rs::ffi::Function> {
        self.bench.runtime.preload([module])?;
        Ok(self.bench.runtime.module(module)?.function(name)?)
    }

    /// What operations choose by default.
    pub fn pdl(&self) -> Result<bool> {
        Ok(self.bench.runtime.compute_capability(self.bench.stream.ordinal())?.0 >= 9)
    }
}

pub fn all(bench: &mut Bench) {
    for rows in ROWS {
        rmsnorm(bench, rows, 4096);
        fused_add_rmsnorm(bench, rows, 4096);
        silu_and_mul(bench, rows, 14336);
    }
    for (rows, table) in [(1, true), (1, false), (8192, true)] {
        rope(bench, rows, table);
    }
    append(bench, 64, 1024);
    for rows in [1, 64] {
        sampling(bench, rows);
    }
}

fn rmsnorm(bench: &mut Bench, rows: usize, d: usize) {
    let order = json!({"op": "rmsnorm", "rows": rows, "d": d, "dtype": DTYPE_NAME});
    bench.case(&format!("rmsnorm {rows}x{d}"), Kind::OneLaunch, order, |case| {
        let (cuda, stream) = (case.bench.cuda.clone(), case.bench.stream.clone());
        let function = case.function(&ModuleName::NORM, "rmsnorm")?;
        let x = Operand::numbers(&cuda, DTYPE, &[rows, d])?;
        let (weight, out) =
            (Operand::numbers(&cuda, DTYPE, &[d])?, Operand::zeros(&cuda, DTYPE, &[rows, d])?);
        let (input, weights, options) = (x.view(), weight.view(), norm::NormOptions::default());
        let (mut output, raw_output) = (out.view_mut(), out.view());
        let held = packed![raw_output, input, weights, options.eps, case.pdl()?];
        let bytes = 2 * x.bytes() + weight.bytes();
        case.run(Some(bytes), Some(&Raw { function, held }), &mut || {
            Ok(norm::rmsnorm(&stream, &mut output, input, weights, &options)?)
        })
    });
}

fn fused_add_rmsnorm(bench: &mut Bench, rows: usize, d: usize) {
    let order = json!({"op": "fused_add_rmsnorm", "rows": rows, "d": d, "dtype": DTYPE_NAME});
    bench.case(&format!("fused_add_rmsnorm {rows}x{d}"), Kind::OneLaunch, order, |case| {
        let (cuda, stream) = (case.bench.cuda.clone(), case.bench.stream.clone());
        let function = case.function(&ModuleName::NORM, "fused_add_rmsnorm")?;
        let x = Operand::numbers(&cuda, DTYPE, &[rows, d])?;
        let residual = Operand::numbers(&cuda, DTYPE, &[rows, d])?;
        let weight = Operand::numbers(&cuda, DTYPE, &[d])?;
        let (weights, options) = (weight.view(), norm::NormOptions::default());
        let (mut input, mut sum) = (x.view_mut(), residual.view_mut());
        let (raw_input, raw_sum) = (x.view(), residual.view());
        let held = packed![raw_input, raw_sum, weights, options.eps, case.pdl()?];
        let bytes = 4 * x.bytes() + weight.bytes();
        case.run(Some(bytes), Some(&Raw { function, held }), &mut || {
            Ok(norm::fused_add_rmsnorm(&stream, &mut input, &mut sum, weights, &options)?)
        })
    });
}

fn silu_and_mul(bench: &mut Bench, rows: usize, d: usize) {
    let order = json!({"op": "silu_and_mul", "rows": rows, "d": d, "dtype": DTYPE_NAME});
    bench.case(&format!("silu_and_mul {rows}x{d}"), Kind::OneLaunch, order, |case| {
        let (cuda, stream) = (case.bench.cuda.clone(), case.bench.stream.clone());
        let function = case.function(&ModuleName::SILU_AND_MUL, "silu_and_mul")?;
        let x = Operand::numbers(&cuda, DTYPE, &[rows, 2 * d])?;
        let out = Operand::zeros(&cuda, DTYPE, &[rows, d])?;
        let (input, options) = (x.view(), ActivationOptions::default());
        let (mut output, raw_output) = (out.view_mut(), out.view());
        let held = packed![raw_output, input, case.pdl()?];
        let bytes = x.bytes() + out.bytes();
        case.run(Some(bytes), Some(&Raw { function, held }), &mut || {
            Ok(activation::silu_and_mul(&stream, &mut output, input, &options)?)
        })
    });
}

/// In place, with a table of angles or computing them.
fn rope(bench: &mut Bench, rows: usize, table: bool) {
    let order = json!({
        "op": "rope", "rows": rows, "table": table, "max_position": MAX_POSITION, "dtype": DTYPE_NAME,
        "qo_heads": QO_HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM,
    });
    let name = format!("rope {rows} tokens, {}", if table { "table" } else { "computed" });
    bench.case(&name, Kind::OneLaunch, order, |case| {
        let (cuda, stream) = (case.bench.cuda.clone(), case.bench.stream.clone());
        let frequencies = RopeFrequencies::new(HEAD_DIM, 1e4, &RopeScaling::default())?;
        let angles = CosSinCache::new(&stream, &frequencies, MAX_POSITION)?;
        let positions: Vec<i32> = (0..rows as i32).collect();
        let raw_positions = Operand::integers(&cuda, &positions)?;
        let positions = BoundedTable::new(&stream, BoundedIndices::new(MAX_POSITION, positions)?)?;
        let q = Operand::numbers(&cuda, DTYPE, &[rows, QO_HEADS, HEAD_DIM])?;
        let k = Operand::numbers(&cuda, DTYPE, &[rows, KV_HEADS, HEAD_DIM])?;
        let (raw_q, raw_k, raw_positions) = (q.view(), k.view(), raw_positions.view());
        let angles = angles.view()?;
        let rotation = Rotation::new(angles, &positions);
        let options = RopeOptions::default();
        let mut tensors = RopeTensors::InPlace { q: q.view_mut(), k: k.view_mut() };
        let bytes = Some(2 * (q.bytes() + k.bytes()));
        let (name, held) = if table {
            let held = packed![raw_q, raw_k, raw_q, raw_k, &angles, raw_positions, false];
            ("apply_rope_pos_ids_cos_sin_cache", held)
        } else {
            let held = packed![
                raw_q,
                raw_k,
                raw_q,
                raw_k,
                raw_positions,
                HEAD_DIM,
                false,
                options.rope_scale,
                options.rope_theta,
            ];
            ("apply_rope_pos_ids", held)
        };
        let raw = Raw { function: case.function(&ModuleName::ROPE, name)?, held };
        case.run(bytes, Some(&raw), &mut || {
            Ok(if table {
                rope::apply_rope_pos_ids_cos_sin_cache(&stream, &mut tensors, &rotation)
            } else {
                rope::apply_rope_pos_ids(&stream, &mut tensors, &positions, &options)
            }?)
        })
    });
}

/// The last token of each request.
fn append(bench: &mut Bench, batch: usize, tokens: usize) {
    let order = json!({
        "op": "append", "batch": batch, "tokens": tokens, "page_size": PAGE_SIZE, "dtype": DTYPE_NAME,
        "kv_heads": KV_HEADS, "head_dim": HEAD_DIM,
    });
    bench.case(&format!("append_paged_kv_cache {batch} tokens"), Kind::OneLaunch, order, |case| {
        let (cuda, stream) = (case.bench.cuda.clone(), case.bench.stream.clone());
        let function = case.function(&ModuleName::PAGE, "append_paged_kv_cache")?;
        let indices = page_indices(batch, tokens)?;
        let ends: Vec<i32> = (0..=batch as i32).collect();
        let last = AppendIndices::last_tokens(&indices, &ends)?;
        let arrays = [
            last.batch_indices(),
            last.positions(),
            indices.indices(),
            indices.indptr(),
            indices.last_page_len(),
        ];
        let arrays = arrays.map(|array| Operand::integers(&cuda, array));
        let [requests, positions, pages, indptr, last_page_len] = arrays;
        let (requests, positions, pages) = (requests?, positions?, pages?);
        let (indptr, last_page_len) = (indptr?, last_page_len?);
        let append = AppendTable::new(&stream, last)?;
        let shape = [indices.num_pages(), PAGE_SIZE, KV_HEADS, HEAD_DIM];
        let table = PageTable::new(&stream, indices)?;
        let (k, v) = (Operand::numbers(&cuda, DTYPE, &shape)?, Operand::numbers(&cuda, DTYPE, &shape)?);
        let new = Operand::numbers(&cuda, DTYPE, &[batch, KV_HEADS, HEAD_DIM])?;
        let mut cache = PagedKvMut::new(k.view_mut(), v.view_mut(), KvLayout::Nhd);
        let views = [&requests, &positions, &k, &v, &pages, &indptr, &last_page_len].map(Operand::view);
        let new_view = new.view();
        let mut held = packed![new_view, new_view];
        held.extend(views.map(flashinfer_rs::ffi::Packed::from));
        held.extend(packed![0]);
        case.run(Some(4 * new.bytes()), Some(&Raw { function, held }), &mut || {
            Ok(page::append_paged_kv_cache(
                &stream,
                new_view,
                new_view,
                &SlotMapping::new(&append, &table),
                &mut cache,
            )?)
        })
    });
}

/// Requests of one length, in pages one after the other.
pub fn page_indices(batch: usize, tokens: usize) -> Result<PageIndices> {
    let pages = tokens.div_ceil(PAGE_SIZE);
    let numbers: Vec<i32> = (0..(batch * pages) as i32).collect();
    let requests = numbers.chunks(pages).map(|pages| (pages, tokens));
    Ok(PageIndices::from_requests(batch * pages, PAGE_SIZE, requests)?)
}

fn sampling(bench: &mut Bench, rows: usize) {
    let order = json!({"op": "sampling", "rows": rows, "vocab": VOCAB, "top_k": TOP_K, "top_p": TOP_P});
    bench.case(&format!("top_k_top_p_sampling {rows}x{VOCAB}"), Kind::OneLaunch, order, |case| {
        let (cuda, stream) = (case.bench.cuda.clone(), case.bench.stream.clone());
        let function = case.function(&ModuleName::SAMPLING, "top_k_top_p_sampling_from_probs")?;
        let probs = Operand::probabilities(&cuda, rows, VOCAB)?;
        let output = Operand::zeros(&cuda, DType::I32, &[rows])?;
        let valid = Operand::zeros(&cuda, DType::U8, &[rows])?;
        let mut samples = Samples::new(output.view_mut(), valid.view_mut());
        let (view, raw_output, raw_valid) = (probs.view(), output.view(), valid.view());
        let options = SamplingOptions::default();
        let none = flashinfer_rs::ffi::Arg::NONE;
        let held = packed![
            view,
            raw_output,
            raw_valid,
            none,
            none,
            f64::from(TOP_K),
            none,
            TOP_P,
            true,
            none,
            0,
            none,
            0,
        ];
        case.run(Some(probs.bytes()), Some(&Raw { function, held }), &mut || {
            Ok(sampling::top_k_top_p_sampling_from_probs(
                &stream,
                &mut samples,
                view,
                TOP_K.into(),
                TOP_P.into(),
                &options,
            )?)
        })
    });
}
