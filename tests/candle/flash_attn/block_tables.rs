//! `paged_attention`: block tables as engines of vLLM's kind have them.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use super::{varlen::plain_varlen, *};
use flashinfer_rs::{
    candle::{PagedAttentionOptions, paged_attention, paged_attention_with_lse},
    kv::KvLayout,
};

use crate::candle_common::{Plain, assert_close as assert_rows_close, assert_lse, with_sinks};

/// Integers of any type, on the CPU or the device.
fn integers(rng: &mut Rng, numbers: Vec<i64>, shape: &[usize], place: &Place) -> Tensor {
    let device = [&Device::Cpu, &place.device][rng.below(2)];
    let dtype = [DType::U32, DType::I32, DType::I64][rng.below(3)];
    let tensor = Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap();
    tensor.to_dtype(dtype).unwrap().to_device(device).unwrap()
}

/// Decode and prefill, in both layouts, against keys that are gathered block by block.
#[test]
fn any_requests() {
    let mut rng = Rng::new();
    for place in places() {
        for _ in 0..place.cases {
            let (hnd, decode, block) = (rng.below(2) == 0, rng.below(2) == 0, [16, 32][rng.below(2)]);
            let requests = 1 + rng.below(5);
            let lens: Vec<(usize, usize)> = (0..requests)
                .map(|_| {
                    let keys = 1 + rng.below(place.longest);
                    (if decode { 1 } else { rng.below(keys + 1).max(usize::from(requests == 1)) }, keys)
                })
                .collect();
            let longest = lens.iter().map(|&(_, keys)| keys).max().unwrap();
            let left = (rng.below(3) == 0).then(|| rng.below(longest));
            let softcap = (left.is_none() && rng.below(3) == 0).then_some(3.0);
            let asked = Asked { scale: 0.2, left, right: Some(0), softcap, ..Asked::default() };
            let (dtype, d) = place.types(&mut rng, left.is_some(), softcap.is_some());
            let (heads_k, group) = (1 + rng.below(3), [1, 2, 4][rng.below(3)]);

            // Blocks in random order; what is behind a request's last does not exist.
            let needed: Vec<_> = lens.iter().map(|&(_, keys)| keys.div_ceil(block)).collect();
            let (blocks, columns) = (needed.iter().sum::<usize>() + 2, needed.iter().max().unwrap() + 1);
            let mut order = rng.permutation(blocks).into_iter();
            let pages: Vec<Vec<u32>> = needed
                .iter()
                .map(|&needed| order.by_ref().take(needed).map(|page| page as u32).collect())
                .collect();
            let table = pages.iter().flat_map(|row| {
                let row = row.iter().map(|&page| i64::from(page));
                row.chain(std::iter::repeat(99999)).take(columns)
            });
            let table = integers(&mut rng, table.collect(), &[requests, columns], &place);
            let context =
                integers(&mut rng, lens.iter().map(|len| len.1 as i64).collect(), &[requests], &place);
            let new = integers(&mut rng, lens.iter().map(|len| len.0 as i64).collect(), &[requests], &place);

            let tokens: usize = lens.iter().map(|len| len.0).sum();
            if tokens == 0 {
                continue;
            }
            let q = dense(&mut rng, &[tokens, heads_k * group, d], dtype, &place.device);
            let shape = if hnd { [blocks, 2, heads_k, block, d] } else { [blocks, 2, block, heads_k, d] };
            let joined = dense(&mut rng, &shape, dtype, &place.device);
            let [mut k, mut v] = [0, 1].map(|at| joined.narrow(1, at, 1).unwrap().squeeze(1).unwrap());
            if rng.below(2) == 0 {
                (k, v) = (k.contiguous().unwrap(), v.contiguous().unwrap());
            }
            let mut options = PagedAttentionOptions::new(asked.scale);
            options.layout = if hnd { KvLayout::Hnd } else { KvLayout::Nhd };
            (options.window_size_left, options.softcap) = (left, softcap);
            options.query_lens = (!decode).then_some(&new);
            let what = format!(
                "{lens:?} in blocks of {block}, hnd {hnd}, {}",
                describe(&[q.clone(), k.clone(), v.clone()], &asked)
            );
            let got = paged_attention(&q, &k, &v, &table, &context, &options);
            let got = got.unwrap_or_else(|error| panic!("{what}: {error}"));

            let gathered = |cache: &Tensor, pages: &[u32], keys: usize| {
                let cache = cache.to_device(&Device::Cpu).unwrap();
                let cache = if hnd { cache.transpose(1, 2).unwrap() } else { cache };
                let pages = Tensor::new(pages, &Device::Cpu).unwrap();
                let all = cache.contiguous().unwrap().index_select(&pages, 0).unwrap();
                all.reshape(((), heads_k, d)).unwrap().narrow(0, 0, keys).unwrap()
            };
            let apart: Vec<[Tensor; 2]> = pages
                .iter()
                .zip(&lens)
                .map(|(pages, &(_, keys))| [&k, &v].map(|cache| gathered(cache, pages, keys)))
                .collect();
            assert_close(&got, &plain_varlen(&q, &apart, &lens, &asked, &[]), &what);
        }
    }
}

/// Keys and values of 8 bits, in both layouts, against what they stand for.
#[test]
fn caches_of_8_bits() {
    let mut rng = Rng::new();
    for place in places() {
        for hnd in [false, true] {
            let shape = if hnd { [4, 2, 16, 128] } else { [4, 16, 2, 128] };
            let [k, v] = [(); 2].map(|()| {
                let cache = random(&mut rng, &shape, DType::F32, &Device::Cpu, (0, 0, shape[0]));
                cache.to_dtype(DType::F8E4M3).unwrap()
            });
            let q = dense(&mut rng, &[2, 8, 128], DType::BF16, &Device::Cpu);
            let table = Tensor::new(&[[3u32, 1], [2, 0]], &Device::Cpu).unwrap();
            let lens = Tensor::new(&[20u32, 7], &Device::Cpu).unwrap();
            let mut options = PagedAttentionOptions::new(0.3);
            options.layout = if hnd { KvLayout::Hnd } else { KvLayout::Nhd };

            // By way of f32: candle's conversion straight to f64 did not end here.
            let f64s = |cache: &Tensor| cache.to_dtype(DType::F32).unwrap().to_dtype(DType::F64).unwrap();
            let whole = |cache: &Tensor, scale: f64| (f64s(cache) * scale).unwrap();
            let (whole_k, whole_v, whole_q) = (whole(&k, 0.5), whole(&v, 2.0), whole(&q, 1.0));
            let expected = paged_attention(&whole_q, &whole_k, &whole_v, &table, &lens, &options).unwrap();
            let expected: Vec<f64> = expected.flatten_all().unwrap().to_vec1().unwrap();

            let [q, k, v] = [q, k, v].map(|tensor| tensor.to_device(&place.device).unwrap());
            (options.k_scale, options.v_scale) = (0.5, 2.0);
            let got = paged_attention(&q, &k, &v, &table, &lens, &options).unwrap();
            assert_close(&got, &expected, &format!("hnd {hnd} on {:?}", place.device));
            // Both have 8 bits, or neither.
            let error = paged_attention(&q, &k, &q, &table, &lens, &options);
            assert!(error.is_err());
            let mixed = v.to_device(&Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
            let mixed = mixed.to_device(&place.device).unwrap();
            let error = paged_attention(&q, &k, &mixed, &table, &lens, &options).unwrap_err().to_string();
            assert!(error.contains("v is bf16, k is f8e4m3"), "{error}");
        }
    }
}

#[test]
fn wrong_tables() {
    for place in places() {
        let (device, dtype) = (&place.device, DType::F16);
        let q = Tensor::ones((2, 4, 64), dtype, device).unwrap();
        let cache = Tensor::ones((8, 16, 2, 64), dtype, device).unwrap();
        let call = |cache: &Tensor, table: &[[u32; 2]], lens: &[i64], new: Option<&[i64]>| {
            let table = Tensor::from_slice(table.as_flattened(), (table.len(), 2), device).unwrap();
            let [lens, new] =
                [Some(lens), new].map(|lens| lens.map(|lens| Tensor::new(lens, &Device::Cpu).unwrap()));
            let mut options = PagedAttentionOptions::new(0.125);
            options.query_lens = new.as_ref();
            paged_attention(&q, cache, cache, &table, &lens.unwrap(), &options)
        };
        let refused = |call: Result<Tensor>, words: &str| {
            let error = call.unwrap_err().to_string();
            assert!(error.contains(words), "{words} is not in: {error}");
        };
        assert!(call(&cache, &[[7, 2], [5, 99]], &[20, 3], None).is_ok());
        refused(call(&cache, &[[7, 8], [5, 0]], &[20, 3], None), "page 8");
        refused(call(&cache, &[[7, 2], [5, 0]], &[33, 3], None), "33 keys in 3 blocks of 16");
        refused(call(&cache, &[[7, 2]], &[20, 3], None), "block_table has 1 rows");
        refused(call(&cache, &[[7, 2], [5, 0]], &[20, -3], None), "request 1 has -3 tokens");
        refused(call(&cache, &[[7, 2], [5, 0]], &[20, 3], Some(&[2])), "query_lens is of 1 requests");
        refused(call(&cache, &[[7, 2], [5, 0]], &[20, 3], Some(&[2, 1])), "ends with 3");
        refused(
            call(&cache.flatten(0, 1).unwrap(), &[[7, 2], [5, 0]], &[20, 3], None),
            "expected 4 dimensions",
        );
        refused(call(&cache, &[[7, 2], [5, 0]], &[1, 3], Some(&[2, 0])), "request 0 has 2 new tokens");
        let (table, lens) = (Tensor::new(&[[7u32, 2], [5, 0]], device), Tensor::new(&[20u32, 3], device));
        let (table, lens) = (table.unwrap(), lens.unwrap());
        for (k_scale, v_scale, words) in
            [(0.5, 1.0, "k_scale is 0.5"), (1.0, 0.5, "v_scale is 0.5"), (1.0, f32::NAN, "v_scale")]
        {
            let mut options = PagedAttentionOptions::new(0.125);
            (options.k_scale, options.v_scale) = (k_scale, v_scale);
            refused(paged_attention(&q, &cache, &cache, &table, &lens, &options), words);
        }
    }
}

/// LSE and sinks, of decode and prefill, with a request that has no tokens.
#[test]
fn lse_and_sinks() {
    let mut rng = Rng::new();
    for place in places() {
        let dtype = if place.is_cuda() { DType::BF16 } else { DType::F32 };
        for (new, window_left, with) in [
            (Some([1u32, 0, 5]), None, true),
            (Some([4, 0, 21]), Some(6), true),
            (None, None, true),
            (Some([3, 0, 2]), None, false),
            (None, None, false),
        ] {
            let keys = if new.is_some() { [20u32, 0, 33] } else { [20, 1, 33] };
            let device = &place.device;
            let [k, v] = [(); 2].map(|()| dense(&mut rng, &[8, 16, 2, 64], dtype, device));
            let table = Tensor::new(&[[3u32, 1, 0], [6, 0, 0], [2, 7, 5]], &Device::Cpu).unwrap();
            let lens = Tensor::new(&keys, &Device::Cpu).unwrap();
            let query_lens = new.map(|new| Tensor::new(&new, &Device::Cpu).unwrap());
            let counts = new.unwrap_or([1; 3]).map(|count| count as usize);
            let q = dense(&mut rng, &[counts.iter().sum(), 8, 64], dtype, device);
            let numbers: Vec<f32> = (0..8).map(|_| 2.0 * rng.unit() as f32).collect();
            let sinks = Tensor::new(&numbers[..], device).unwrap();
            let mut options = PagedAttentionOptions::new(0.2);
            options.query_lens = query_lens.as_ref();
            options.window_size_left = window_left;
            options.sinks = with.then_some(&sinks);
            let (out, lse) = paged_attention_with_lse(&q, &k, &v, &table, &lens, &options).unwrap();
            let alone = paged_attention(&q, &k, &v, &table, &lens, &options).unwrap();
            let mut start = 0;
            for (request, &count) in counts.iter().enumerate() {
                let part = |all: &Tensor| all.narrow(0, start, count).unwrap();
                let pages = table.narrow(0, request, 1).unwrap().flatten_all().unwrap();
                let gathered = |cache: &Tensor| {
                    let cache = cache.to_device(&Device::Cpu).unwrap();
                    let rows = cache.index_select(&pages, 0).unwrap().reshape((48, 2, 64)).unwrap();
                    rows.narrow(0, 0, keys[request] as usize).unwrap()
                };
                let (causal, window_left) = (true, window_left.map(|left| left as u32));
                let plain = Plain { causal, window_left, scale: Some(f64::from(0.2f32)), ..Plain::default() };
                if count > 0 {
                    let plain = plain.attention_and_lse(&part(&q), &gathered(&k), &gathered(&v));
                    let [expected, expected_lse] = if with { with_sinks(plain, &numbers) } else { plain };
                    let what = format!("request {request} of {counts:?}, sinks {with} on {device:?}");
                    assert_rows_close(&part(&out), &expected, &what);
                    assert_rows_close(&part(&alone), &expected, &what);
                    assert_lse(&part(&lse), &expected_lse, &what);
                }
                start += count;
            }
        }
    }
}

/// Queries of requests without tokens: zeros, and an LSE of −∞ or of the sinks alone.
#[test]
fn lse_without_keys() {
    for place in places() {
        let (device, dtype) = (&place.device, DType::BF16);
        let cache = Tensor::ones((4, 16, 2, 64), dtype, device).unwrap();
        let table = Tensor::new(&[[0u32]], &Device::Cpu).unwrap();
        let [none, two] = [0u32, 2].map(|len| Tensor::new(&[len], &Device::Cpu).unwrap());
        let sinks = Tensor::new(&[0f32, 1.0], device).unwrap();
        let mut options = PagedAttentionOptions::new(0.2);
        for (tokens, query_lens) in [(2, &two), (0, &none)] {
            let q = Tensor::ones((2, 2, 64), dtype, device).unwrap().narrow(0, 0, tokens).unwrap();
            options.query_lens = Some(query_lens);
            for (sinks, expected) in
                [(None, [f32::NEG_INFINITY; 2]), (Some(&sinks), [0.0, std::f32::consts::LOG2_E])]
            {
                options.sinks = sinks;
                let (out, lse) =
                    paged_attention_with_lse(&q, &cache, &cache, &table, &none, &options).unwrap();
                assert_eq!((out.dims(), lse.dims()), (&[tokens, 2, 64][..], &[tokens, 2][..]));
                if tokens > 0 {
                    let sum = out.to_dtype(DType::F32).unwrap().abs().unwrap().sum_all().unwrap();
                    assert_eq!(sum.to_scalar::<f32>().unwrap(), 0.0);
                    assert_eq!(lse.to_vec2::<f32>().unwrap(), vec![expected; tokens]);
                }
            }
        }
    }
}

/// There is no gradient of the LSE, as there is none of the result: `backward` says so.
#[test]
fn lse_has_no_gradient() {
    let q = candle_core::Var::ones((1, 2, 64), DType::F32, &Device::Cpu).unwrap();
    let cache = Tensor::ones((4, 16, 2, 64), DType::F32, &Device::Cpu).unwrap();
    let (table, lens) = (Tensor::new(&[[0u32]], &Device::Cpu), Tensor::new(&[3u32], &Device::Cpu));
    let (table, lens, options) = (table.unwrap(), lens.unwrap(), PagedAttentionOptions::new(0.2));
    let (out, lse) = paged_attention_with_lse(&q, &cache, &cache, &table, &lens, &options).unwrap();
    assert!(out.sum_all().unwrap().backward().is_err() && lse.sum_all().unwrap().backward().is_err());
}

#[test]
fn wrong_sinks() {
    for place in places() {
        let (device, dtype) = (&place.device, DType::BF16);
        let q = Tensor::ones((1, 2, 64), dtype, device).unwrap();
        let cache = Tensor::ones((4, 16, 2, 64), dtype, device).unwrap();
        let table = Tensor::new(&[[0u32]], &Device::Cpu).unwrap();
        let lens = Tensor::new(&[3u32], &Device::Cpu).unwrap();
        let wrong = |sinks: Tensor, words: [&str; 2]| {
            let mut options = PagedAttentionOptions::new(0.2);
            options.sinks = Some(&sinks);
            let error = paged_attention(&q, &cache, &cache, &table, &lens, &options).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        };
        wrong(Tensor::zeros(3, DType::F32, device).unwrap(), ["sinks", "shape"]);
        wrong(Tensor::zeros(2, dtype, device).unwrap(), ["sinks", "dtype"]);
        if place.is_cuda() {
            wrong(Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap(), ["sinks", "Cpu"]);
        }
    }
}

/// Sinks may be a part of the cache, which another thread writes: nobody waits for ever.
#[test]
fn sinks_that_lie_in_the_cache() {
    let cache = Tensor::ones((4, 16, 2, 64), DType::F32, &Device::Cpu).unwrap();
    let row = Tensor::zeros((1, 16, 2, 64), DType::F32, &Device::Cpu).unwrap();
    let (done, finished) = mpsc::channel();
    let (writer, stop) = (cache.clone(), Arc::new(AtomicBool::new(false)));
    let stops = stop.clone();
    let writing = std::thread::spawn(move || {
        while !stops.load(Ordering::Relaxed) {
            writer.slice_set(&row, 0, 0).unwrap();
        }
    });
    std::thread::spawn(move || {
        let q = Tensor::ones((1, 2, 64), DType::F32, &Device::Cpu).unwrap();
        let (table, lens) = (Tensor::new(&[[0u32]], &Device::Cpu), Tensor::new(&[3u32], &Device::Cpu));
        let (table, lens) = (table.unwrap(), lens.unwrap());
        let sinks = cache.flatten_all().unwrap().narrow(0, 0, 2).unwrap();
        let mut options = PagedAttentionOptions::new(0.2);
        options.sinks = Some(&sinks);
        for _ in 0..5000 {
            paged_attention(&q, &cache, &cache, &table, &lens, &options).unwrap();
        }
        done.send(()).unwrap();
    });
    finished.recv_timeout(Duration::from_secs(60)).expect("a deadlock, or a thread that failed");
    stop.store(true, Ordering::Relaxed);
    writing.join().unwrap();
}
