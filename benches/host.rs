//! What this crate's own work on the host costs, where no GPU takes part:
//! packing and checking arguments, index arrays, the prefix cache.
//!
//! `cargo bench --bench host` runs on any machine.

use std::{hint::black_box, ptr};

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use flashinfer_rs::{
    DType, Device, PageIndices, Stream, TensorMut, TensorRef, args,
    indices::{AppendIndices, BoundedIndices, MaskIndices},
    kv::{Batch, PageAllocator, PrefixCache, Sequence},
    norm,
};

const PAGE_SIZE: usize = 16;
const BATCH: usize = 64;
const TOKENS: usize = 1024;
const HEADS: usize = 32;
const HEAD_DIM: usize = 128;

/// As aligned as device memory.
#[repr(align(256))]
struct Aligned;

/// A view of no memory, for functions that only look at shapes.
fn view(shape: &[usize]) -> TensorRef<'static> {
    // SAFETY: nobody reads it: there are no elements, or no kernel is launched.
    unsafe {
        TensorRef::from_raw_parts(ptr::dangling::<Aligned>().cast(), Device::Cuda(0), DType::F16, shape, None)
    }
    .expect("a small shape")
}

fn arguments(criterion: &mut Criterion) {
    let (q, k) =
        (view(&[BATCH, HEADS, HEAD_DIM]), view(&[BATCH * TOKENS / PAGE_SIZE, PAGE_SIZE, 8, HEAD_DIM]));
    criterion.bench_function("view of a tensor", |bencher| {
        bencher.iter(|| view(black_box(&[BATCH, HEADS, HEAD_DIM])));
    });
    criterion.bench_function("pack 19 arguments, 8 of them tensors", |bencher| {
        bencher.iter(|| {
            black_box(args![
                &q, &q, 7, &q, &k, &k, &q, &q, &q, &q, None, 0, -1, true, None, 0.0, 0.088, 1.0, 1e-4
            ])
            .len()
        });
    });

    // No rows: everything is checked, and nothing launched.
    let input = view(&[0, 4096]);
    let weight = view(&[4096]);
    // SAFETY: as in `view`.
    let mut out = unsafe {
        TensorMut::from_raw_parts(
            ptr::dangling_mut::<Aligned>().cast(),
            Device::Cuda(0),
            DType::F16,
            &[0, 4096],
            None,
        )
    }
    .expect("a small shape");
    // SAFETY: nothing is enqueued.
    let stream = unsafe { Stream::from_raw(ptr::null_mut(), 0) };
    let options = norm::NormOptions::default();
    criterion.bench_function("check the arguments of rmsnorm", |bencher| {
        bencher.iter(|| {
            norm::rmsnorm(&stream, black_box(&mut out), &input, &weight, &options).expect("valid arguments");
        });
    });
}

/// Sequences of `TOKENS` tokens.
fn batch(allocator: &PageAllocator) -> Batch {
    let mut batch = Batch::new(allocator);
    for _ in 0..BATCH {
        let mut sequence = Sequence::new(allocator);
        sequence.append(TOKENS).expect("the pool is large");
        batch.push(sequence).expect("of the same pool");
    }
    batch
}

fn page_tables(criterion: &mut Criterion) {
    let pages = TOKENS / PAGE_SIZE;
    let numbers: Vec<i32> = (0..(BATCH * pages) as i32).collect();
    let requests = || numbers.chunks(pages).map(|pages| (pages, TOKENS));
    let indices = PageIndices::from_requests(BATCH * pages, PAGE_SIZE, requests()).expect("a valid table");
    let ends: Vec<i32> = (0..=BATCH as i32).collect();
    criterion.bench_function("page table of 64 requests, 1024 tokens each", |bencher| {
        bencher.iter(|| PageIndices::from_requests(BATCH * pages, PAGE_SIZE, requests()));
    });
    criterion.bench_function("places of 64 new tokens", |bencher| {
        bencher.iter(|| AppendIndices::last_tokens(black_box(&indices), &ends));
    });
    criterion.bench_function("lengths of 64 requests, for a plan", |bencher| {
        bencher.iter(|| black_box(&indices).seq_lens());
    });
    criterion.bench_function("check 64 positions", |bencher| {
        bencher.iter_batched(
            || vec![7; BATCH],
            |positions| BoundedIndices::new(8192, positions),
            BatchSize::SmallInput,
        );
    });
    let mask = MaskIndices::new([(8, TOKENS)]).expect("a small mask");
    let bits = vec![true; 8 * TOKENS];
    criterion.bench_function("pack a mask of 8 queries, 1024 keys", |bencher| {
        bencher.iter(|| mask.pack(black_box(&bits)));
    });
}

fn batches(criterion: &mut Criterion) {
    let allocator = PageAllocator::new(2 * BATCH * TOKENS / PAGE_SIZE, PAGE_SIZE).expect("a small pool");
    // Appending a page's worth and taking it back leaves the batch as it was.
    let mut batch = batch(&allocator);
    criterion.bench_function("append a token to each of 64 requests, and take it back", |bencher| {
        bencher.iter(|| {
            batch.append(std::iter::repeat_n(1, BATCH)).expect("the pool is large");
            (0..BATCH).try_for_each(|request| batch.truncate(request, TOKENS))
        });
    });
    drop(batch);

    let tokens: Vec<u32> = (0..TOKENS as u32).collect();
    let mut sequence = Sequence::new(&allocator);
    sequence.append(TOKENS).expect("the pool is large");
    let mut cache = PrefixCache::new(&allocator);
    cache.insert(&tokens, &sequence).expect("of the same pool");
    criterion.bench_function("prefix cache: 1024 tokens that are there", |bencher| {
        bencher.iter(|| cache.lookup(black_box(&tokens)).len());
    });
    let others: Vec<u32> = tokens.iter().map(|token| token + 1).collect();
    criterion.bench_function("prefix cache: 1024 tokens that are not", |bencher| {
        bencher.iter(|| cache.lookup(black_box(&others)).len());
    });
}

criterion_group!(benches, arguments, page_tables, batches);
criterion_main!(benches);
