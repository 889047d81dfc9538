//! Attention of new tokens row by row, each over pages of its own, against causal prefill.

use flashinfer_rs::{
    DType, FlashInferError, TensorMut,
    attention::{AttentionSpec, Backend, BatchDecode, Heads, PlanOptions, RunOptions, Workspace},
    kv::{Batch, BatchCapacity, BatchTables, HeadsShape, KvLayout, PageAllocator, PagedKvCache, Sequence},
    reference::{self, HostMask},
};
use half::{bf16, f16};

use crate::{
    Pair,
    common::{Gpu, Mirrored, Number, Rng, at_hand, cache::LAYOUTS, refused},
};

const HEADS: Heads = Heads::new(8, 4);
const ROOM: BatchCapacity = BatchCapacity { requests: 32, pages: 400, tokens: 64 };

/// Drafts, one token, a whole prompt, and drafts of a sequence and its fork, in rows that are as many as
/// these, and filled up.
fn rows_are_causal<T: Number>() {
    const NEW: [usize; 5] = [3, 1, 18, 5, 4];
    let Some(gpu) = Gpu::start() else { return };
    let (rng, tokens) = (&mut Rng::new(), NEW.iter().sum());
    for layout in LAYOUTS {
        let shape = HeadsShape { num_layers: 1, num_kv_heads: 4, head_dim: 128, dtype: T::DTYPE, layout };
        let mut pair = Pair::new(&gpu, 40, 16, &[shape]);
        pair.tables[0] = BatchTables::new(&gpu.stream, &pair.device.batches[0], ROOM).unwrap();
        (0..4).for_each(|_| pair.push(0));
        assert!(pair.append::<T>(rng, 0, &[50, 1, 0, 13]));
        pair.fork(0, 3);
        pair.change(0, |_, batch| batch.append(NEW).unwrap());
        for rows in [tokens, ROOM.requests] {
            let batch = &pair.device.batches[0];
            pair.tables[0].update_by_row(batch, &mut pair.device.cache, rows).unwrap();
            assert_eq!(pair.device.pool.pending_copies(), 0);
            let kv = [(); 2].map(|()| Mirrored::<T>::random(&gpu, rng, &[rows, 4, 128]));
            pair.write_device(0, 0, &kv);
            pair.write_host(0, 0, &kv.map(|kv| kv.narrowed(0, 0, tokens)));
            if rows == tokens {
                pair.assert_same::<T>(0);
            }
            let q = Mirrored::<T>::random(&gpu, rng, &[rows, 8, 128]);
            for backend in [Backend::CudaCores, Backend::Fa2, Backend::Fa3, Backend::Auto] {
                let spec = AttentionSpec::new(T::DTYPE, 128).with_backend(backend);
                let decode = BatchDecode::new(&gpu.stream, &spec, HEADS);
                let Some(decode) = at_hand(&gpu, decode) else { continue };
                check(&gpu, &pair, (&spec, &decode), &q, tokens);
            }
        }
    }
}

/// Decode of all rows, of which the first are the batch's new tokens.
fn check<T: Number>(
    gpu: &Gpu,
    pair: &Pair<'_>,
    (spec, decode): (&AttentionSpec, &BatchDecode),
    q: &Mirrored<T>,
    tokens: usize,
) {
    let (options, host, size) = (RunOptions::default(), &pair.host, [tokens, 8, 128]);
    let mut out = Mirrored::<T>::poisoned(gpu, &q.shape());
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let plan = decode.plan(&mut workspace, &pair.tables[0], &PlanOptions::default()).unwrap();
    let kv = pair.device.cache.layer(0).unwrap();
    plan.run_with(&q.device_view(), &kv, &mut out.device_view_mut(), None, &options).unwrap();
    let mut want = vec![f64::NAN; size.iter().product()];
    reference::batch_prefill_paged(
        spec,
        &q.view().narrow(0, 0, tokens).unwrap(),
        &host.cache.layer(0).unwrap(),
        host.batches[0].queries(),
        host.batches[0].pages(),
        &mut TensorMut::from_slice(&mut want, &size).unwrap(),
        None,
        HostMask::Causal,
        &options,
    )
    .unwrap();
    let got = out.download()[..want.len()].to_vec();
    let what = format!("{:?}, {tokens} of {} rows", spec.backend, q.shape()[0]);
    Mirrored::new(gpu, &size, got).assert_close(&what, &want, T::BOUND);
}

crate::typed_tests! {
    f16_rows: rows_are_causal::<f16>();
    bf16_rows: rows_are_causal::<bf16>();
}

#[test]
fn rows_that_do_not_fit_are_refused() {
    let Some(gpu) = Gpu::start() else { return };
    let shape =
        HeadsShape { num_layers: 1, num_kv_heads: 2, head_dim: 64, dtype: DType::F16, layout: KvLayout::Nhd };
    let mut pair = Pair::new(&gpu, 4, 4, &[shape]);
    pair.push(0);
    assert!(pair.append::<f16>(&mut Rng::new(), 0, &[10]));
    pair.change(0, |_, batch| batch.append([6]).unwrap());
    let (batch, cache, tables) = (&pair.device.batches[0], &mut pair.device.cache, &mut pair.tables[0]);
    refused(tables.update_by_row(batch, cache, 5), "rows");
    refused(tables.update_by_row(batch, cache, usize::MAX), "indptr");
    // There is no page that rows beyond these could share.
    let before = tables.pages.host().indices().to_vec();
    match tables.update_by_row(batch, cache, 8) {
        Err(FlashInferError::OutOfPages { needed: 1, free: 0 }) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(tables.pages.host().indices(), before);
    tables.update_by_row(batch, cache, 6).unwrap();
    assert_eq!(tables.pages.host().seq_lens(), [11, 12, 13, 14, 15, 16]);
    assert_eq!(tables.queries.host().indptr(), [0, 1, 2, 3, 4, 5, 6]);
    // Of another pool.
    let pool = PageAllocator::new(4, 4).unwrap();
    let mut other = PagedKvCache::new(&gpu.stream, &pool, &[shape]).unwrap();
    let mut batch = Batch::new(&pool);
    refused(tables.update_by_row(&pair.device.batches[0], &mut other, 6), "cache");
    batch.push(Sequence::new(&pool)).unwrap();
    batch.append([2]).unwrap();
    refused(tables.update_by_row(&batch, &mut other, 4), "batch");
    assert_eq!(pool.free_pages(), 3);
}
