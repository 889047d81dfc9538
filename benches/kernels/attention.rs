//! The cases that plan first: decode, prefill, latent attention.

use std::{cell::RefCell, time::Instant};

use flashinfer_rs::{
    DType, PageTable, TensorRef,
    attention::{
        AttentionSpec, Backend, BatchDecode, BatchMla, BatchPrefill, Heads, MlaQuery, MlaSpec, PagedBatch,
        PlanOptions, Workspace,
    },
    ffi::{Object, Value},
    indices::{RaggedIndices, RaggedTable},
    kv::{KvLayout, MlaCache, PagedKv},
};
use half::{bf16, f16};
use serde_json::json;

use crate::{
    HEAD_DIM, KV_HEADS, PAGE_SIZE, QO_HEADS, Result,
    cases::page_indices,
    gpu::median,
    measure::{Bench, Kind, PlanCalls, Raw},
    operand::Operand,
    packed,
    raw::{Arrays, Attention, NONE, ROPE, Scratch},
};

const HEADS: Heads = Heads::new(QO_HEADS, KV_HEADS);
const BATCHES: [usize; 3] = [1, 64, 256];
const LENGTHS: [usize; 3] = [1024, 8192, 32768];
/// What `quick` measures of them.
const QUICK: [(usize, usize); 2] = [(1, 1024), (64, 8192)];
const MLA_HEADS: usize = 16;
/// 128 and 64 dimensions before absorption.
const MLA_SM_SCALE: f64 = 0.072_168_783_648_703_22;
/// A step that keeps the GPU busy while the next is planned.
const BUSY_US: f64 = 3_000.0;

pub fn all(bench: &mut Bench) -> Result<()> {
    let scratch = Scratch::new(&bench.cuda)?;
    let shapes = LENGTHS.iter().flat_map(|&tokens| BATCHES.map(|batch| (batch, tokens)));
    let quick = bench.options.quick;
    for shape in shapes.filter(|shape| !quick || QUICK.contains(shape)) {
        for (tensor_cores, dtype) in [(false, DType::F16), (true, DType::F16), (true, DType::BF16)] {
            // One with the other type shows that it makes no difference.
            if dtype == DType::F16 || shape == (64, 8192) {
                decode(bench, &scratch, shape, tensor_cores, dtype);
            }
        }
    }
    for backend in [Backend::Fa2, Backend::Fa3] {
        prefill(bench, &scratch, backend, (8, 512, 4096));
        mla(bench, &scratch, backend, (64, 8192));
    }
    Ok(())
}

fn name_of(backend: Backend) -> &'static str {
    if backend == Backend::Fa3 { "fa3" } else { "fa2" }
}

/// A planner's numbers.
fn plan_info(raw: &Raw<'_>) -> Result<Object> {
    match raw.call()? {
        Value::Object(object) => Ok(object),
        value => Err(format!("the planner returned {value:?}").into()),
    }
}

fn decode(
    bench: &mut Bench,
    scratch: &Scratch,
    (batch, tokens): (usize, usize),
    tensor_cores: bool,
    dtype: DType,
) {
    let order = json!({
        "op": "decode", "batch": batch, "tokens": tokens, "page_size": PAGE_SIZE, "dtype": dtype.name(),
        "qo_heads": QO_HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "tensor_cores": tensor_cores,
    });
    let cores = if tensor_cores { "tensor" } else { "CUDA" };
    let name = format!("decode b{batch} L{tokens} {} {cores}", dtype.name());
    if !bench.wants(&name) {
        return;
    }
    let cache_bytes = 2 * batch * tokens * KV_HEADS * HEAD_DIM * dtype.size();
    if !bench.has_room(cache_bytes).unwrap_or(false) {
        return bench.left_out.push([name, "its cache does not fit, twice, beside what is there".into()]);
    }
    bench.case(&name, Kind::Decode, order, |case| {
        let (cuda, stream) = (case.bench.cuda.clone(), case.bench.stream.clone());
        let backend = if tensor_cores { Backend::Fa2 } else { Backend::CudaCores };
        let spec = AttentionSpec::new(dtype, HEAD_DIM).with_backend(backend);
        let decode = BatchDecode::new(&stream, &spec, HEADS)?;
        let indices = page_indices(batch, tokens)?;
        let shape = [indices.num_pages(), PAGE_SIZE, KV_HEADS, HEAD_DIM];
        let (k, v) = (Operand::numbers(&cuda, dtype, &shape)?, Operand::numbers(&cuda, dtype, &shape)?);
        let q = Operand::numbers(&cuda, dtype, &[batch, QO_HEADS, HEAD_DIM])?;
        let out = Operand::zeros(&cuda, dtype, &[batch, QO_HEADS, HEAD_DIM])?;

        // The same calls without this crate.
        let arrays = Arrays::new(&cuda, &indices, 1)?;
        let empty = match dtype {
            DType::BF16 => TensorRef::from_slice::<bf16>(&[], &[0])?,
            _ => TensorRef::from_slice::<f16>(&[], &[0])?,
        };
        let (causal, fa3, pdl) = (false, false, case.pdl()?);
        let attention = Attention { scratch, arrays: &arrays, heads: HEADS, causal, fa3, pdl };
        let tensors = [&q, &k, &v, &out].map(Operand::view);
        let planner = if tensor_cores {
            attention.plan(decode.module())?
        } else {
            let held = packed![
                scratch.float.view(),
                scratch.int.view(),
                scratch.pinned.view(),
                arrays.kv_indptr.view(),
                batch,
                QO_HEADS,
                KV_HEADS,
                PAGE_SIZE,
                false,
                -1,
                0.0,
                HEAD_DIM,
                HEAD_DIM,
                &empty,
                &empty,
            ];
            Raw { function: decode.module().function("plan")?, held }
        };
        let info = plan_info(&planner)?;
        let raw = if tensor_cores {
            attention.run(decode.module(), &info, tensors)?
        } else {
            let ([q, k, v, out], [indptr, pages, last_page_len]) =
                (tensors, arrays.pages.each_ref().map(Operand::view));
            let held = packed![
                scratch.float.view(),
                scratch.int.view(),
                &info,
                q,
                k,
                v,
                indptr,
                pages,
                last_page_len,
                out,
                NONE,
                0,
                -1,
                attention.pdl,
                NONE,
                0.0,
                attention.sm_scale(),
                ROPE.0,
                ROPE.1,
            ];
            Raw { function: decode.module().function("run")?, held }
        };

        // Batches that differ, as those of two steps do: a workspace remembers its last plan.
        let batches = [indices.clone(), page_indices(batch, tokens - 1)?];
        let tables = batches.clone().map(|batch| PageTable::new(&stream, batch));
        let [one, other] = tables;
        let parts = RefCell::new((Workspace::new(&stream)?, [one?, other?], 0));
        let plan = |changed: bool, upload: bool| -> Result<()> {
            let (workspace, tables, last) = &mut *parts.borrow_mut();
            *last ^= usize::from(changed);
            if upload {
                tables[*last].update(batches[*last].clone())?;
            }
            decode.plan(workspace, &tables[*last], &PlanOptions::default())?;
            Ok(())
        };
        let calls = PlanCalls {
            plan: &mut || plan(true, false),
            with_table: Some(&mut || plan(true, true)),
            again: Some(&mut || plan(false, false)),
        };
        case.plan(Some(&planner), calls)?;

        let (mut workspace, [table, other], _) = parts.into_inner();
        let [q_view, k_view, v_view, _] = tensors;
        let kv = PagedKv::new(*k_view, *v_view, KvLayout::Nhd);
        let mut output = out.view_mut();
        {
            let plan = decode.plan(&mut workspace, &table, &PlanOptions::default())?;
            let bytes = cache_bytes + q.bytes() + out.bytes();
            case.run(Some(bytes), Some(&raw), &mut || Ok(plan.run(q_view, &kv, &mut output)?))?;
        }

        // A step is planned while the one before is still at work.
        let steps = (BUSY_US / case.row.gpu.rust_us.unwrap_or(BUSY_US)).clamp(1.0, 200.0) as usize;
        let mut busy = Vec::new();
        for _ in 0..15 {
            let plan = decode.plan(&mut workspace, &table, &PlanOptions::default())?;
            (0..steps).try_for_each(|_| plan.run(q_view, &kv, &mut output))?;
            drop(plan);
            let start = Instant::now();
            decode.plan(&mut workspace, &other, &PlanOptions::default())?;
            busy.push(start.elapsed().as_secs_f64() * 1e6);
            cuda.synchronize()?;
        }
        if let Some(plan) = &mut case.row.plan {
            plan.busy_us = Some(median(busy));
        }
        Ok(())
    });
}

fn prefill(
    bench: &mut Bench,
    scratch: &Scratch,
    backend: Backend,
    (batch, queries, tokens): (usize, usize, usize),
) {
    let (fa3, dtype) = (backend == Backend::Fa3, DType::F16);
    let order = json!({
        "op": "prefill", "batch": batch, "queries": queries, "tokens": tokens, "page_size": PAGE_SIZE,
        "dtype": dtype.name(), "qo_heads": QO_HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "backend": name_of(backend),
    });
    let name = format!("prefill b{batch} q{queries} L{tokens} f16 {}", name_of(backend));
    bench.case(&name, Kind::Other, order, |case| {
        let (cuda, stream) = (case.bench.cuda.clone(), case.bench.stream.clone());
        let spec = AttentionSpec::new(dtype, HEAD_DIM).with_backend(backend);
        let prefill = BatchPrefill::new(&stream, &spec, HEADS)?;
        let indices = page_indices(batch, tokens)?;
        let shape = [indices.num_pages(), PAGE_SIZE, KV_HEADS, HEAD_DIM];
        let (k, v) = (Operand::numbers(&cuda, dtype, &shape)?, Operand::numbers(&cuda, dtype, &shape)?);
        let rows = batch * queries;
        let q = Operand::numbers(&cuda, dtype, &[rows, QO_HEADS, HEAD_DIM])?;
        let out = Operand::zeros(&cuda, dtype, &[rows, QO_HEADS, HEAD_DIM])?;

        let arrays = Arrays::new(&cuda, &indices, queries)?;
        let (causal, pdl) = (true, case.pdl()?);
        let attention = Attention { scratch, arrays: &arrays, heads: HEADS, causal, fa3, pdl };
        let tensors = [&q, &k, &v, &out].map(Operand::view);
        let planner = attention.plan(prefill.module())?;
        let info = plan_info(&planner)?;
        let raw = attention.run(prefill.module(), &info, tensors)?;

        let table = PageTable::new(&stream, indices.clone())?;
        let ragged =
            RaggedTable::new(&stream, RaggedIndices::from_lens(std::iter::repeat_n(queries, batch))?)?;
        let (mut workspace, options) = (Workspace::new(&stream)?, PlanOptions::causal());
        let other = PageTable::new(&stream, page_indices(batch, tokens - 1)?)?;
        let parts = RefCell::new((&mut workspace, [&table, &other], 0));
        let plan = |changed: bool| -> Result<()> {
            let (workspace, tables, last) = &mut *parts.borrow_mut();
            *last ^= usize::from(changed);
            prefill.plan_paged(workspace, PagedBatch::new(&ragged, tables[*last]), &options)?;
            Ok(())
        };
        let calls =
            PlanCalls { plan: &mut || plan(true), with_table: None, again: Some(&mut || plan(false)) };
        case.plan(Some(&planner), calls)?;
        let plan = prefill.plan_paged(&mut workspace, PagedBatch::new(&ragged, &table), &options)?;
        let [q_view, k_view, v_view, _] = tensors;
        let kv = PagedKv::new(*k_view, *v_view, KvLayout::Nhd);
        let mut output = out.view_mut();
        // The work is arithmetic: bytes say nothing.
        case.run(None, Some(&raw), &mut || Ok(plan.run(q_view, &kv, &mut output)?))
    });
}

/// Latent attention with one query per request.
fn mla(bench: &mut Bench, scratch: &Scratch, backend: Backend, (batch, tokens): (usize, usize)) {
    let dtype = DType::F16;
    let order = json!({
        "op": "mla", "batch": batch, "tokens": tokens, "page_size": PAGE_SIZE, "dtype": dtype.name(),
        "heads": MLA_HEADS, "sm_scale": MLA_SM_SCALE, "backend": name_of(backend),
    });
    let name = format!("MLA decode b{batch} L{tokens} f16 {}", name_of(backend));
    bench.case(&name, Kind::Other, order, |case| {
        let (cuda, stream) = (case.bench.cuda.clone(), case.bench.stream.clone());
        let mla =
            BatchMla::new(&stream, &MlaSpec::new(dtype, MLA_SM_SCALE).with_backend(backend), MLA_HEADS)?;
        let indices = page_indices(batch, tokens)?;
        let cache = |width| Operand::numbers(&cuda, dtype, &[indices.num_pages(), PAGE_SIZE, width]);
        let (ckv, kpe) = (cache(512)?, cache(64)?);
        let query = |width| Operand::numbers(&cuda, dtype, &[batch, MLA_HEADS, width]);
        let (nope, pe) = (query(512)?, query(64)?);
        let out = Operand::zeros(&cuda, dtype, &[batch, MLA_HEADS, 512])?;

        let arrays = Arrays::new(&cuda, &indices, 1)?;
        let planner = Raw {
            function: mla.module().function("plan")?,
            held: packed![
                scratch.float.view(),
                scratch.int.view(),
                scratch.pinned.view(),
                arrays.qo_indptr.view(),
                arrays.kv_indptr.view(),
                arrays.kv_lens.view(),
                MLA_HEADS,
                512,
                false,
            ],
        };
        let info = plan_info(&planner)?;
        let [nope_view, pe_view, ckv_view, kpe_view, pages_view, out_view] =
            [&nope, &pe, &ckv, &kpe, &arrays.pages[1], &out].map(Operand::view);
        let raw = Raw {
            function: mla.module().function("run")?,
            held: packed![
                scratch.float.view(),
                scratch.int.view(),
                &info,
                nope_view,
                pe_view,
                ckv_view,
                kpe_view,
                pages_view,
                out_view,
                NONE,
                0,
                MLA_HEADS,
                PAGE_SIZE,
                MLA_SM_SCALE,
                false,
            ],
        };

        let queries = RaggedTable::new(&stream, RaggedIndices::from_lens(std::iter::repeat_n(1, batch))?)?;
        let options = PlanOptions::default();
        let table = PageTable::new(&stream, indices.clone())?;
        let mut workspace = Workspace::new(&stream)?;
        let mut plan = || {
            mla.plan(&mut workspace, PagedBatch::new(&queries, &table), &options)?;
            Ok(())
        };
        case.plan(Some(&planner), PlanCalls { plan: &mut plan, with_table: None, again: None })?;
        let plan = mla.plan(&mut workspace, PagedBatch::new(&queries, &table), &options)?;
        let (q, kv) = (MlaQuery::new(*nope_view, *pe_view), MlaCache::new(*ckv_view, *kpe_view));
        let mut output = out.view_mut();
        let bytes = [&nope, &pe, &ckv, &kpe, &out].map(Operand::bytes).iter().sum();
        case.run(Some(bytes), Some(&raw), &mut || Ok(plan.run(&q, &kv, &mut output)?))
    });
}
