//! Options of a run: scales, 8-bit caches, sinks, ALiBi.

use super::*;
use flashinfer_rs::attention::PosEncodingMode;

use crate::candle_common::with_sinks;

#[test]
fn options_are_applied() {
    let mut rng = Rng::new();
    for device in devices() {
        let case = Case::new(dtypes(&device)[0], 64, 16, [2, 1]);
        let mut rig = Rig::new(&device, case);
        rig.push();
        rig.step(&mut rng, &[30], true);
        rig.batch.append([1]).unwrap();
        let step = rig.tables.update(&rig.batch, &mut rig.cache).unwrap();
        let plan = rig.decode.plan(&step).unwrap();
        let rows = |rng: &mut Rng, heads| random(rng, &[1, heads, 64], case.dtype, &device);
        let (q, k, v) = (rows(&mut rng, 2), rows(&mut rng, 1), rows(&mut rng, 1));
        rig.cache.append(&step, 0, &k, &v).unwrap();
        let got = plan.run_with(&q, &rig.cache, 0, &PagedRunOptions::with_sm_scale(0.3)).unwrap();
        let [all_k, all_v] = &rig.expected[0][0];
        let all = |all: &Tensor, new: &Tensor| Tensor::cat(&[all, &on_host(new)], 0).unwrap();
        let plain = Plain { scale: Some(0.3), ..Plain::default() };
        assert_close(&got, &plain.attention(&q, &all(all_k, &k), &all(all_v, &v)), "a scale");
    }
}

/// A cache of `f8e4m3`: what is appended has its dtype, and scales are options of a run.
#[test]
fn a_cache_of_8_bits() {
    let mut rng = Rng::new();
    for device in devices() {
        let (heads, ours) = (Heads::new(4, 2), flashinfer_rs::DType::BF16);
        let kv_dtype = flashinfer_rs::DType::E4M3;
        let pool = PageAllocator::new(8, 4).unwrap();
        let (num_layers, num_kv_heads, head_dim, layout) = (1, 2, 128, KvLayout::Nhd);
        let shape = HeadsShape { num_layers, num_kv_heads, head_dim, dtype: kv_dtype, layout };
        let mut cache = PagedCache::new(&device, &pool, shape).unwrap();
        let spec = AttentionSpec::new(ours, head_dim).with_kv_dtype(kv_dtype);
        let mut prefill = PagedPrefill::new(&device, &spec, heads).unwrap();
        let mut decode = PagedDecode::new(&device, &spec, heads).unwrap();
        let mut batch = Batch::new(&pool);
        batch.push(Sequence::new(&pool)).unwrap();
        batch.append([6]).unwrap();
        let mut tables = StepTables::new(&device);
        let step = tables.update(&batch, &mut cache).unwrap();
        let [k, v] = [(); 2].map(|()| {
            let rows = random(&mut rng, &[6, 2, 128], DType::F32, &Device::Cpu);
            rows.to_dtype(DType::F8E4M3).unwrap()
        });
        let q = random(&mut rng, &[6, 4, 128], DType::BF16, &device);
        let on_device = |rows: &Tensor| rows.to_device(&device).unwrap();
        cache.append(&step, 0, &on_device(&k), &on_device(&v)).unwrap();
        let mut options = PagedRunOptions::default();
        (options.k_scale, options.v_scale) = (Some(0.5), Some(2.0));
        let (got, lse) = prefill.plan(&step, true).unwrap().run_with_lse(&q, &cache, 0, &options).unwrap();
        let whole = |rows: &Tensor, scale: f64| (rows.to_dtype(DType::F32).unwrap() * scale).unwrap();
        let plain = Plain { causal: true, window_left: None, soft_cap: None, scale: None };
        let (whole_k, whole_v) = (whole(&k, 0.5), whole(&v, 2.0));
        let [expected, expected_lse] = plain.attention_and_lse(&q, &whole_k, &whole_v);
        assert_close(&got, &expected, &format!("8 bits on {device:?}"));
        assert_lse(&lse, &expected_lse, &format!("8 bits on {device:?}"));
        // The last token alone, as a decode.
        let q_last = q.narrow(0, 5, 1).unwrap();
        let last = decode.plan(&step).unwrap().run_with(&q_last, &cache, 0, &options).unwrap();
        assert_close(&last, &plain.attention(&q_last, &whole_k, &whole_v), "decode of 8 bits");
        refused(cache.append(&step, 0, &q.narrow(1, 0, 2).unwrap(), &on_device(&v)), &["bf16", "f8e4m3"]);
    }
}

/// A case that there are kernels with sinks for.
fn sink_case(device: &Device, dtype: DType, window_left: Option<u32>) -> Option<Case> {
    let served = device.is_cpu() || dtype == DType::BF16;
    served.then_some(Case { window_left, ..Case::new(dtype, 64, 16, [8, 2]) })
}

/// Sinks are a key of each head without a value: for prefill and decode, with windows and without.
#[test]
fn sinks_take_their_share() {
    let mut rng = Rng::new();
    for device in devices() {
        for &dtype in dtypes(&device) {
            for window_left in [None, Some(7)] {
                let Some(case) = sink_case(&device, dtype, window_left) else { continue };
                let spec = case.spec().with_attention_sink();
                // Without window, of which the wheels of tests have no modules that wide.
                let mut rig = Rig::new(&device, Case { window_left: None, ..case });
                (0..2).for_each(|_| rig.push());
                rig.step(&mut rng, &[19, 4], true);
                let mut prefill = PagedPrefill::new(&device, &spec, case.heads).unwrap();
                let mut decode = PagedDecode::new(&device, &spec, case.heads).unwrap();
                rig.batch.append([1, 1]).unwrap();
                let step = rig.tables.update(&rig.batch, &mut rig.cache).unwrap();
                let rows = |rng: &mut Rng, heads| random(rng, &[2, heads, 64], dtype, &device);
                let [q, k, v] = [8, 2, 2].map(|heads| rows(&mut rng, heads));
                rig.cache.append(&step, 0, &k, &v).unwrap();
                let numbers: Vec<f32> = (0..8).map(|_| 2.0 * rng.unit() as f32).collect();
                let sinks = Tensor::new(&numbers[..], &device).unwrap();
                // A column, of which kernels read a copy.
                let column = Tensor::stack(&[&sinks, &sinks], 1).unwrap().narrow(1, 1, 1).unwrap();
                for sinks in [sinks, column.squeeze(1).unwrap()] {
                    let mut options = PagedRunOptions::default();
                    options.sinks = Some(&sinks);
                    let plan = prefill.plan(&step, true).unwrap();
                    let by_prefill = plan.run_with_lse(&q, &rig.cache, 0, &options).unwrap();
                    let plan = decode.plan(&step).unwrap();
                    let by_decode = plan.run_with_lse(&q, &rig.cache, 0, &options).unwrap();
                    for request in 0..2 {
                        let row = |all: &Tensor| all.narrow(0, request, 1).unwrap();
                        let [all_k, all_v] = &rig.expected[request][0];
                        let all =
                            |all: &Tensor, new: &Tensor| Tensor::cat(&[all, &on_host(&row(new))], 0).unwrap();
                        let plain =
                            case.plain(true).attention_and_lse(&row(&q), &all(all_k, &k), &all(all_v, &v));
                        let [expected, expected_lse] = with_sinks(plain, &numbers);
                        for (out, lse) in [&by_prefill, &by_decode] {
                            let what = format!("request {request}, {case:?} on {device:?}");
                            assert_close(&row(out), &expected, &what);
                            assert_lse(&row(lse), &expected_lse, &what);
                        }
                    }
                }
            }
        }
    }
}

/// What each head adds is there exactly if the spec says so, and has a number for each query head.
#[test]
fn wrong_sinks_and_slopes_are_refused() {
    for device in devices() {
        let dtype = if device.is_cpu() { DType::F32 } else { DType::BF16 };
        let case = sink_case(&device, dtype, None).unwrap();
        let mut rig = Rig::new(&device, case);
        rig.push();
        rig.batch.append([3]).unwrap();
        let step = rig.tables.update(&rig.batch, &mut rig.cache).unwrap();
        let spec = case.spec().with_attention_sink();
        let mut with = PagedPrefill::new(&device, &spec, case.heads).unwrap();
        let (with, without) = (with.plan(&step, true).unwrap(), rig.prefill.plan(&step, true).unwrap());
        let q = Tensor::ones((3, 8, 64), dtype, &device).unwrap();
        let zeros = |len: usize, dtype| Tensor::zeros(len, dtype, &device).unwrap();
        let sinks = zeros(8, DType::F32);
        let mut options = PagedRunOptions::default();
        refused(with.run_with(&q, &rig.cache, 0, &options), &["sinks", "missing"]);
        options.sinks = Some(&sinks);
        assert!(with.run_with(&q, &rig.cache, 0, &options).is_ok());
        refused(without.run_with(&q, &rig.cache, 0, &options), &["sinks"]);
        let (short, narrow) = (zeros(2, DType::F32), zeros(8, DType::BF16));
        for (wrong, words) in [(&short, ["sinks", "shape"]), (&narrow, ["sinks", "dtype"])] {
            options.sinks = Some(wrong);
            refused(with.run_with(&q, &rig.cache, 0, &options), &words);
        }
        let elsewhere = sinks.to_device(&Device::Cpu).unwrap();
        if !device.is_cpu() {
            options.sinks = Some(&elsewhere);
            refused(with.run_with(&q, &rig.cache, 0, &options), &["sinks", "Cpu"]);
        }
        (options.sinks, options.alibi_slopes) = (Some(&sinks), Some(&sinks));
        refused(with.run_with(&q, &rig.cache, 0, &options), &["no spec reads both"]);
        options.sinks = None;
        refused(without.run_with(&q, &rig.cache, 0, &options), &["alibi_slopes"]);
    }
}

/// Slopes of ALiBi: what a key loses for each position that it lies before the query.
#[test]
fn slopes_are_applied() {
    let device = Device::Cpu;
    let case = Case::new(DType::F32, 64, 4, [2, 1]);
    let spec = case.spec().with_pos_encoding_mode(PosEncodingMode::Alibi);
    let mut rig = Rig::new(&device, case);
    rig.push();
    rig.batch.append([3]).unwrap();
    let step = rig.tables.update(&rig.batch, &mut rig.cache).unwrap();
    // Keys that are all alike, so that the slopes alone decide; values tell positions apart.
    let k = Tensor::zeros((3, 1, 64), DType::F32, &device).unwrap();
    let v = Tensor::arange(0f32, 3.0, &device).unwrap().reshape((3, 1, 1)).unwrap();
    let v = v.broadcast_as((3, 1, 64)).unwrap();
    rig.cache.append(&step, 0, &k, &v).unwrap();
    let slopes = Tensor::new(&[0f32, std::f32::consts::LN_2], &device).unwrap();
    let mut options = PagedRunOptions::default();
    options.alibi_slopes = Some(&slopes);
    let mut prefill = PagedPrefill::new(&device, &spec, case.heads).unwrap();
    let q = Tensor::ones((3, 2, 64), DType::F32, &device).unwrap();
    let out = prefill.plan(&step, true).unwrap().run_with(&q, &rig.cache, 0, &options).unwrap();
    // The last query: weights 1, 1, 1 of the first head, ¼, ½, 1 of the second.
    let numbers = out.narrow(0, 2, 1).unwrap().narrow(2, 0, 1).unwrap().flatten_all().unwrap();
    let numbers = numbers.to_vec1::<f32>().unwrap();
    assert!((numbers[0] - 1.0).abs() < 1e-6 && (numbers[1] - 2.5 / 1.75).abs() < 1e-6, "{numbers:?}");
}

/// Results over two parts of the keys, merged by their LSE, are those over all keys.
#[test]
fn parts_are_merged_by_their_lse() {
    let mut rng = Rng::new();
    for device in devices() {
        let case = Case::new(dtypes(&device)[0], 64, 16, [4, 2]);
        let mut rig = Rig::new(&device, case);
        let [q, k, v] = [4, 2, 2].map(|heads| random(&mut rng, &[48, heads, 64], case.dtype, &device));
        let part = |all: &Tensor, (from, to): (usize, usize)| all.narrow(0, from, to - from).unwrap();
        let spans = [(0, 48), (0, 32), (32, 48)];
        (0..3).for_each(|_| rig.push());
        rig.batch.append(spans.map(|(from, to)| to - from)).unwrap();
        let step = rig.tables.update(&rig.batch, &mut rig.cache).unwrap();
        let rows = |all: &Tensor| Tensor::cat(&spans.map(|span| part(all, span)), 0).unwrap();
        rig.cache.append(&step, 0, &rows(&k), &rows(&v)).unwrap();
        // The same query for all three.
        let query = part(&q, (47, 48));
        let queries = Tensor::cat(&[&query, &query, &query], 0).unwrap();
        let plan = rig.decode.plan(&step).unwrap();
        let (out, lse) = plan.run_with_lse(&queries, &rig.cache, 0, &PagedRunOptions::default()).unwrap();
        let [out, weights] =
            [out, (lse * std::f64::consts::LN_2).unwrap().exp().unwrap()].map(|all| on_host(&all));
        let of = |all: &Tensor, request| all.narrow(0, request, 1).unwrap();
        let weighted = |request| {
            let weight = of(&weights, request).unsqueeze(2).unwrap();
            of(&out, request).broadcast_mul(&weight).unwrap()
        };
        let sum = (of(&weights, 1) + of(&weights, 2)).unwrap().unsqueeze(2).unwrap();
        let merged = (weighted(1) + weighted(2)).unwrap().broadcast_div(&sum).unwrap();
        assert_close(&merged.to_dtype(case.dtype).unwrap(), &of(&out, 0), "merged");
    }
}
