//! Sequences of several lengths, and in pages.

use super::*;

/// Cumulative lengths, on the CPU or the device, of any integer type.
fn cumulative(rng: &mut Rng, lens: &[usize], place: &Place) -> Tensor {
    let mut ends = vec![0i64];
    ends.extend(lens.iter().scan(0, |end, &len| {
        *end += len as i64;
        Some(*end)
    }));
    let device = [&Device::Cpu, &place.device][rng.below(2)];
    let dtype = [DType::U32, DType::I32, DType::I64][rng.below(3)];
    // candle's CUDA casts know no i32, so this is done on the host.
    Tensor::new(ends, &Device::Cpu).unwrap().to_dtype(dtype).unwrap().to_device(device).unwrap()
}

fn random_lens(rng: &mut Rng, place: &Place) -> Vec<(usize, usize)> {
    let mut len = || if rng.below(4) == 0 { 0 } else { rng.below(place.longest) };
    let mut lens: Vec<_> = (0..5).map(|_| (len(), len())).collect();
    // Never nothing at all.
    lens.push((2, 3));
    lens.truncate(6);
    lens.rotate_left(rng.below(6));
    lens
}

/// Sequences one after the other, each by itself.
pub(super) fn plain_varlen(
    q: &Tensor,
    keys: &[[Tensor; 2]],
    lens: &[(usize, usize)],
    asked: &Asked,
    ranges: &[Vec<[i64; 2]>],
) -> Vec<f64> {
    let (mut first, mut expected) = (0, Vec::new());
    let max_keys = lens.iter().map(|lens| lens.1).max().unwrap();
    for (sequence, &(s_q, s_k)) in lens.iter().enumerate() {
        let ranges = ranges.get(sequence).cloned().unwrap_or_default();
        let [k, v] = &keys[sequence];
        assert_eq!(k.dims()[0], s_k);
        let q = q.narrow(0, first, s_q).unwrap();
        expected.extend(plain(&q, k, v, &Asked { ranges, ..asked.clone() }, max_keys).unwrap());
        first += s_q;
    }
    expected
}

#[test]
fn sequences_of_several_lengths() {
    let mut rng = Rng::new();
    for place in places() {
        for _ in 0..place.cases {
            let lens = random_lens(&mut rng, &place);
            let (queries, keys): (Vec<_>, Vec<_>) = lens.iter().copied().unzip();
            let (max_q, max_k) = (*queries.iter().max().unwrap(), *keys.iter().max().unwrap());
            let mut asked = Asked::random(&mut rng, &place, max_k);
            let (dtype, d) = place.types(&mut rng, asked.left.is_some(), asked.softcap.is_some());
            let (heads_k, group) = (1 + rng.below(3), [1, 2, 4][rng.below(3)]);
            if !place.is_cuda() && rng.below(3) == 0 {
                asked.slopes = Some((0..heads_k * group).map(|_| rng.below(100) as f32 / 200.0).collect());
            }
            let way = [0, 1, 4, 5][rng.below(4)];
            let mut rows = |lens: &[usize], heads| {
                let shape = [1, lens.iter().sum(), heads, d];
                laid_out(&mut rng, shape, dtype, &place.device, way).squeeze(0).unwrap()
            };
            let case = [rows(&queries, heads_k * group), rows(&keys, heads_k), rows(&keys, heads_k)];
            let [q, k, v] = &case;
            let (cum_q, cum_k) =
                (cumulative(&mut rng, &queries, &place), cumulative(&mut rng, &keys, &place));
            let Asked { scale, left, right, softcap, .. } = asked;
            let simple = left.is_none() && matches!(right, None | Some(0));
            let slopes = asked.slopes.is_some().then(|| asked.slopes(&place.device));
            let causal = right.is_some();
            let got = match (softcap, &slopes) {
                (Some(cap), slopes) => flash_attn_varlen_alibi_windowed_softcap(
                    q,
                    k,
                    v,
                    slopes.as_ref(),
                    &cum_q,
                    &cum_k,
                    max_q,
                    max_k,
                    scale,
                    left,
                    right,
                    cap,
                ),
                (None, Some(slopes)) if simple => {
                    flash_attn_varlen_alibi(q, k, v, slopes, &cum_q, &cum_k, max_q, max_k, scale, causal)
                }
                (None, Some(slopes)) => flash_attn_varlen_alibi_windowed(
                    q, k, v, slopes, &cum_q, &cum_k, max_q, max_k, scale, left, right,
                ),
                (None, None) if simple => {
                    flash_attn_varlen(q, k, v, &cum_q, &cum_k, max_q, max_k, scale, causal)
                }
                (None, None) => {
                    flash_attn_varlen_windowed(q, k, v, &cum_q, &cum_k, max_q, max_k, scale, left, right)
                }
            };
            let what = format!("{lens:?}, {}", describe(&case, &asked));
            let got = got.unwrap_or_else(|error| panic!("{what}: {error}"));
            let mut first = 0;
            let apart: Vec<[Tensor; 2]> = keys
                .iter()
                .map(|&len| {
                    first += len;
                    [k, v].map(|tensor| tensor.narrow(0, first - len, len).unwrap())
                })
                .collect();
            assert_close(&got, &plain_varlen(q, &apart, &lens, &asked, &[]), &what);
        }
    }
}

#[test]
fn pages_in_any_order() {
    let mut rng = Rng::new();
    for place in places() {
        for _ in 0..place.cases {
            let lens = random_lens(&mut rng, &place);
            let (queries, keys): (Vec<_>, Vec<_>) = lens.iter().copied().unzip();
            let (max_q, max_k) = (*queries.iter().max().unwrap(), *keys.iter().max().unwrap());
            let mut asked = Asked::random(&mut rng, &place, max_k);
            // Ranges go with a mask of bits, which needs no module of its own.
            let with_ranges = rng.below(2) == 0;
            let (dtype, d) = place.types(&mut rng, asked.left.is_some(), asked.softcap.is_some());
            let page_size = [1, 3, 16, 32][rng.below(4)];
            let (heads_k, group) = (1 + rng.below(3), [1, 2, 4][rng.below(3)]);
            let needed: Vec<usize> = keys.iter().map(|len| len.div_ceil(page_size)).collect();
            let (blocks, columns) = (needed.iter().sum::<usize>() + 3, needed.iter().max().unwrap() + 2);

            // Blocks in random order; what is behind a sequence's last is senseless.
            let mut order = rng.permutation(blocks).into_iter();
            let mut table = Vec::new();
            for &needed in &needed {
                table.extend(order.by_ref().take(needed).map(i64::from));
                table.extend((needed..columns).map(|_| 77777));
            }
            let pages: Vec<Vec<u32>> = table
                .chunks(columns)
                .zip(&needed)
                .map(|(row, &needed)| row[..needed].iter().map(|&page| page as u32).collect())
                .collect();
            let device = [&Device::Cpu, &place.device][rng.below(2)];
            let integers = [DType::U32, DType::I32, DType::I64][rng.below(3)];
            let table = Tensor::from_vec(table, (lens.len(), columns), &Device::Cpu).unwrap();
            let table = table.to_dtype(integers).unwrap().to_device(device).unwrap();

            // Keys and values in one tensor, in two, or in two that differ.
            let joined = dense(&mut rng, &[blocks, 2, page_size, heads_k, d], dtype, &place.device);
            let [mut k, mut v] = [0, 1].map(|at| joined.narrow(1, at, 1).unwrap().squeeze(1).unwrap());
            let way = rng.below(3);
            k = if way > 0 { k.contiguous().unwrap() } else { k };
            v = if way > 1 { v.contiguous().unwrap() } else { v };
            let q_shape = [1, queries.iter().sum(), heads_k * group, d];
            let q = laid_out(&mut rng, q_shape, dtype, &place.device, 1).squeeze(0).unwrap();

            let ranges: Vec<Vec<[i64; 2]>> = if with_ranges {
                let end = |rng: &mut Rng| rng.below(max_k + 3) as i64 - 1;
                lens.iter().map(|_| (0..2).map(|_| [end(&mut rng), end(&mut rng)]).collect()).collect()
            } else {
                Vec::new()
            };
            let flat: Vec<i64> = ranges.iter().flatten().flatten().copied().collect();
            let range_tensor = with_ranges.then(|| {
                let tensor = Tensor::from_vec(flat, (lens.len(), 2, 2), &Device::Cpu).unwrap();
                tensor.to_dtype(DType::I32).unwrap().to_device(device).unwrap()
            });
            let (cum_q, cum_k) =
                (cumulative(&mut rng, &queries, &place), cumulative(&mut rng, &keys, &place));
            let Asked { scale, left, right, ref mut softcap, .. } = asked;
            if softcap.is_none() && rng.below(2) == 0 {
                *softcap = Some(0.0);
            }
            let got = flash_attn_varlen_paged_windowed(
                &q,
                &k,
                &v,
                &cum_q,
                &cum_k,
                &table,
                range_tensor.as_ref(),
                max_q,
                max_k,
                scale,
                left,
                right,
                page_size,
                *softcap,
            );
            let what = format!(
                "{lens:?} in pages of {page_size}, {ranges:?}, {}",
                describe(&[q.clone(), k.clone(), v.clone()], &asked)
            );
            let got = got.unwrap_or_else(|error| panic!("{what}: {error}"));
            let apart: Vec<[Tensor; 2]> = pages
                .iter()
                .zip(&keys)
                .map(|(pages, &len)| {
                    [&k, &v].map(|cache| {
                        let cache = cache.to_device(&Device::Cpu).unwrap().contiguous().unwrap();
                        if len == 0 {
                            return Tensor::zeros((0, heads_k, d), dtype, &Device::Cpu).unwrap();
                        }
                        let pages = Tensor::new(pages.as_slice(), &Device::Cpu).unwrap();
                        let all = cache.index_select(&pages, 0).unwrap();
                        all.reshape(((), heads_k, d)).unwrap().narrow(0, 0, len).unwrap()
                    })
                })
                .collect();
            assert_close(&got, &plain_varlen(&q, &apart, &lens, &asked, &ranges), &what);
        }
    }
}

/// Layers with equal shapes and other numbers, step after step, with two kinds
/// of layers in turn: each call finds its own plan.
#[test]
fn layers_of_several_steps() {
    let mut rng = Rng::new();
    for place in places() {
        let (dtype, d) = place.types(&mut rng, true, false);
        let (b, heads, heads_k, max) = (2, 4, 2, 24);
        let mut caches: Vec<[Tensor; 2]> = Vec::new();
        for _ in 0..3 {
            let mut cache = || dense(&mut rng, &[b, heads_k, max, d], dtype, &place.device);
            caches.push([cache(), cache()]);
        }
        for step in 5..12 {
            for (layer, cache) in caches.iter().enumerate() {
                let q = dense(&mut rng, &[b, heads, 1, d], dtype, &place.device).transpose(1, 2).unwrap();
                let [k, v] =
                    cache.each_ref().map(|cache| cache.narrow(2, 0, step).unwrap().transpose(1, 2).unwrap());
                let left = (layer % 2 == 1).then_some(3);
                let asked = Asked { scale: 0.3, left, right: Some(0), ..Asked::default() };
                let got = call_dense(&q, &k, &v, &asked).unwrap();
                assert_close(&got, &plain_dense(&q, &k, &v, &asked), &format!("step {step}, layer {layer}"));
            }
        }
    }
}

/// Batches over rows and over blocks take turns, with one mask and the same
/// queries, until each has the place that another one had.
#[test]
fn rows_and_blocks_in_turn() {
    let mut rng = Rng::new();
    for place in places() {
        let (dtype, d) = place.types(&mut rng, false, false);
        let q = dense(&mut rng, &[3, 4, d], dtype, &place.device);
        let cache = dense(&mut rng, &[2, 16, 2, d], dtype, &place.device);
        let rows = cache.reshape((32, 2, d)).unwrap();
        let new = |end| Tensor::new(&[0u32, end], &Device::Cpu).unwrap();
        let over_rows = |keys: usize| {
            let (k, ends) = (rows.narrow(0, 0, keys).unwrap(), new(keys as u32));
            flash_attn_varlen_windowed(&q, &k, &k, &new(3), &ends, 3, keys, 0.1, Some(2), Some(1)).unwrap()
        };
        let table = Tensor::new(&[[0u32, 1]], &Device::Cpu).unwrap();
        let over_blocks = |keys: usize| {
            let (queries, ends, sides) = (new(3), new(keys as u32), [Some(2), Some(1)]);
            let [left, right] = sides;
            flash_attn_varlen_paged_windowed(
                &q, &cache, &cache, &queries, &ends, &table, None, 3, keys, 0.1, left, right, 16, None,
            )
            .unwrap()
        };
        let asked = Asked { scale: 0.1, left: Some(2), right: Some(1), ..Asked::default() };
        let expected = |keys| {
            let k = rows.narrow(0, 0, keys).unwrap();
            plain_varlen(&q, &[[k.clone(), k]], &[(3, keys)], &asked, &[])
        };
        for round in 0..8 {
            for keys in [8, 9, 10, 11] {
                assert_close(&over_rows(keys), &expected(keys), &format!("{keys} rows, round {round}"));
            }
            for keys in [20 + round, 8] {
                assert_close(
                    &over_blocks(keys),
                    &expected(keys),
                    &format!("{keys} in blocks, round {round}"),
                );
            }
        }
    }
}
