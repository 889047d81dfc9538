//! Multi-head latent attention on the CPU.

use super::{
    attention::{HostMask, softmax},
    host::HostCheck,
    page::{check_pages, place},
    strict,
};
use crate::{
    attention::{MlaQuery, MlaRun, MlaSpec, check_mla_plan, check_mla_spec},
    dtype::DType,
    error::Result,
    indices::{PageIndices, RaggedIndices},
    kv::MlaCache,
    tensor::{TensorMut, TensorRef},
};

/// Element types beside the wide ones.
const DTYPES: [DType; 2] = [DType::F16, DType::BF16];

/// [`MlaPlan::run_with`](crate::attention::MlaPlan::run_with) on the CPU: latent
/// attention of ragged queries to their requests' pages.
///
/// With `n` queries in all, `q.nope` is `[n, num_heads, ckv]`, `q.pe`
/// `[n, num_heads, kpe]`, the cache's parts are `[pages, page_size, ckv]` and
/// `[pages, page_size, kpe]`, `out` is `[n, num_heads, ckv]`, and `lse`, if
/// given, is `[n, num_heads]` and takes base-2 logarithms. The two widths are
/// free (the kernels' are 512 and 64). Each tensor is `f16`, `bf16`, `f32` or
/// `f64`; the two 16-bit types do not mix; `lse` is `f32` or `f64`. Any number
/// of heads and any `sm_scale` is fine; nothing else of the spec is looked at.
/// With [`HostMask::Causal`], each query sees the tokens up to its own; there is no
/// other mask but [`HostMask::None`]. A query whose request has no tokens
/// gets zeros, and −∞.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device,
/// dtype or shape does not fit, queries and page table differ in their number
/// of requests, or a request has more queries than tokens and the mask is
/// causal. Nothing was written.
#[expect(clippy::too_many_arguments, reason = "those of plan and run together")]
pub fn batch_mla(
    spec: &MlaSpec,
    q: &MlaQuery<'_>,
    cache: &MlaCache<'_>,
    queries: &RaggedIndices,
    table: &PageIndices,
    out: &mut TensorMut<'_>,
    lse: Option<&mut TensorMut<'_>>,
    mask: HostMask<'_>,
) -> Result<()> {
    let check = HostCheck { op: "reference::batch_mla" };
    let causal = match mask {
        HostMask::None => false,
        HostMask::Causal => true,
        HostMask::Custom { .. } | HostMask::MultiItem(_) => {
            return check.fail("mask", "latent attention has HostMask::None and HostMask::Causal".into());
        }
    };
    let num_heads = q.nope.shape().get(1).map_or(0, |&heads| heads as usize);
    strict::as_kernel("BatchMla::new", |check| check_mla_spec(check, spec, num_heads))?;
    strict::as_kernel("BatchMla::plan", |check| check_mla_plan(check, queries, table, num_heads, causal))?;
    strict::as_kernel("MlaPlan::run_with", |check| {
        let (dtype, rows) = (spec.dtype, queries.total());
        MlaRun { dtype, rows, num_heads, q, cache, out, lse: lse.as_deref() }.check(check, table)
    })?;
    let views: [(&str, &TensorRef<'_>); 4] =
        [("q.nope", &q.nope), ("q.pe", &q.pe), ("cache.ckv", &cache.ckv), ("cache.kpe", &cache.kpe)];
    let mut rows = Vec::with_capacity(views.len());
    for (name, view) in views {
        rows.push(check.rows(name, view, &DTYPES, &[3])?);
    }
    let [nope, pe, ckv, kpe] = [rows[0], rows[1], rows[2], rows[3]];
    let mut out = check.rows_mut("out", out, &DTYPES, &[3])?;
    let mut lse = lse.map(|lse| check.rows_mut("lse", lse, &[], &[2])).transpose()?;

    let mut narrow = None;
    for (name, rows) in views.iter().map(|view| view.0).zip(&rows).chain([("out", &out.rows)]) {
        if DTYPES.contains(&rows.dtype()) && *narrow.get_or_insert(rows.dtype()) != rows.dtype() {
            return check
                .fail(name, format!("its dtype is {}; others are of another 16-bit type", rows.dtype()));
        }
    }
    let (n, heads) = (queries.total() as i64, nope.shape()[1]);
    let (pages, page_size) = (ckv.shape()[0], ckv.shape()[1]);
    check.shape("q.nope", &nope, &[n, heads, ckv.width() as i64])?;
    check.shape("q.pe", &pe, &[n, heads, kpe.width() as i64])?;
    check.shape("out", &out.rows, nope.shape())?;
    check.shape("cache.kpe", &kpe, &[pages, page_size, kpe.width() as i64])?;
    check_pages(check, "cache.ckv", pages, page_size, table)?;
    if let Some(lse) = &lse {
        check.shape("lse", &lse.rows, &[n, heads])?;
    }
    if queries.batch_size() != table.batch_size() {
        return check.fail(
            "queries",
            format!(
                "they are of {} requests, the page table is of {}",
                queries.batch_size(),
                table.batch_size()
            ),
        );
    }
    let hidden = |request| queries.len(request).saturating_sub(table.seq_len(request));
    if let Some(request) = (0..queries.batch_size()).find(|&request| causal && hidden(request) > 0) {
        return check.fail(
            "queries",
            format!(
                "request {request} has {} queries and {} tokens",
                queries.len(request),
                table.seq_len(request)
            ),
        );
    }

    let (mut key, mut position_key) = (vec![0.0; ckv.width()], vec![0.0; kpe.width()]);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for request in 0..queries.batch_size() {
        let (qo_len, kv_len) = (queries.len(request), table.seq_len(request));
        let row_of = |position| {
            let (page, slot) = place(table, request, position);
            page * table.page_size() + slot
        };
        for query in 0..qo_len {
            let n = queries.indptr()[request] as usize + query;
            let seen = if causal { kv_len - qo_len + query + 1 } else { kv_len };
            let q: Vec<_> = (n * num_heads..(n + 1) * num_heads)
                .map(|row| (nope.numbers(row), pe.numbers(row)))
                .collect();
            let mut weights = vec![Vec::with_capacity(seen); num_heads];
            for position in 0..seen {
                ckv.read(row_of(position), &mut key);
                kpe.read(row_of(position), &mut position_key);
                for ((nope, pe), weights) in q.iter().zip(&mut weights) {
                    weights.push((dot(nope, &key) + dot(pe, &position_key)) * spec.sm_scale);
                }
            }
            let sums: Vec<_> = weights.iter_mut().map(|weights| softmax(weights)).collect();
            let mut outputs = vec![vec![0.0; ckv.width()]; num_heads];
            for position in 0..seen {
                ckv.read(row_of(position), &mut key);
                for (output, weights) in outputs.iter_mut().zip(&weights) {
                    let weight = weights[position];
                    output.iter_mut().zip(&key).for_each(|(o, v)| *o += weight * v);
                }
            }
            outputs.iter().enumerate().for_each(|(head, output)| out.write(n * num_heads + head, output));
            if let Some(lse) = &mut lse {
                lse.write(n, &sums);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;

    use super::*;
    use crate::{
        attention::{AttentionSpec, RunOptions},
        indices::RaggedIndices,
        kv::{KvLayout, PagedKv},
        reference,
        reference::testing::{refused, view, view_mut},
    };

    fn close(got: &[f64], expected: &[f64]) {
        assert_eq!(got.len(), expected.len());
        let near = |(a, b): (&f64, &f64)| a == b || (a - b).abs() < 1e-9;
        assert!(got.iter().zip(expected).all(near), "{got:?} is not {expected:?}");
    }

    #[test]
    fn by_hand() {
        // Two queries over three tokens in pages of two, one head, widths 1
        // and 1. Keys are ln 1 + 0, 0 + ln 2, ln 3 + 0.
        let table = PageIndices::from_requests(3, 2, [(&[2, 0][..], 3)]).unwrap();
        let queries = RaggedIndices::from_lens([2]).unwrap();
        let ckv = [3f64.ln(), 7.0, 0.0, 0.0, 0.0, 0.0];
        let kpe = [0.0, 7.0, 0.0, 0.0, 0.0, 2f64.ln()];
        let run = |causal, sm_scale| {
            let mask = if causal { HostMask::Causal } else { HostMask::None };
            let (mut out, mut lse) = ([f64::NAN; 2], [f64::NAN; 2]);
            batch_mla(
                &MlaSpec::new(DType::F16, sm_scale),
                &MlaQuery::new(view(&[1.0f64; 2], &[2, 1, 1]), view(&[1.0f64; 2], &[2, 1, 1])),
                &MlaCache::new(view(&ckv, &[3, 2, 1]), view(&kpe, &[3, 2, 1])),
                &queries,
                &table,
                &mut view_mut(&mut out, &[2, 1, 1]),
                Some(&mut view_mut(&mut lse, &[2, 1])),
                mask,
            )
            .unwrap();
            [out, lse]
        };
        let ln3 = 3f64.ln();
        let [out, lse] = run(false, 1.0);
        close(&out, &[ln3 * 3.0 / 6.0; 2]);
        close(&lse, &[6f64.log2(); 2]);
        // The first query sees two tokens: weights 1 and 2, values 0 and 0.
        let [out, lse] = run(true, 1.0);
        close(&out, &[0.0, ln3 * 3.0 / 6.0]);
        close(&lse, &[3f64.log2(), 6f64.log2()]);
        let [out, lse] = run(false, 2.0);
        close(&out, &[ln3 * 9.0 / 14.0; 2]);
        close(&lse, &[14f64.log2(); 2]);
    }

    #[test]
    fn wrong_input_is_refused_and_nothing_written() {
        let table = PageIndices::from_requests(2, 2, [(&[1][..], 2)]).unwrap();
        let [one, two, three, pair] = [&[1][..], &[2], &[3], &[1, 1]]
            .map(|lens| RaggedIndices::from_lens(lens.iter().copied()).unwrap());
        let (numbers, halves, brains) = ([1.0f64; 64], [f16::ONE; 64], [bf16::ONE; 64]);
        let (mut out, mut lse) = ([7.0f64; 16], [7.0f64; 4]);
        let wide = |shape: &[usize]| view(&numbers, shape);
        let spec = MlaSpec::new(DType::F16, 1.0);
        let mut run = |q: [TensorRef<'_>; 2],
                       cache: [TensorRef<'_>; 2],
                       queries: &RaggedIndices,
                       lse_shape: &[usize]| {
            batch_mla(
                &spec,
                &MlaQuery::new(q[0], q[1]),
                &MlaCache::new(cache[0], cache[1]),
                queries,
                &table,
                &mut view_mut(&mut out, &[2, 2, 4]),
                Some(&mut view_mut(&mut lse, lse_shape)),
                HostMask::Causal,
            )
        };
        let q = [wide(&[2, 2, 4]), wide(&[2, 2, 3])];
        let cache = [wide(&[2, 2, 4]), wide(&[2, 2, 3])];
        refused(run([wide(&[2, 8]), q[1]], cache, &two, &[2, 2]), "q.nope");
        refused(run([wide(&[1, 2, 4]), q[1]], cache, &two, &[2, 2]), "q.nope");
        refused(run([q[0], wide(&[2, 2, 4])], cache, &two, &[2, 2]), "q.pe");
        refused(run(q, [wide(&[1, 2, 4]), wide(&[1, 2, 3])], &two, &[2, 2]), "cache.ckv");
        refused(run(q, [wide(&[2, 1, 4]), wide(&[2, 1, 3])], &two, &[2, 2]), "cache.ckv");
        refused(run(q, [cache[0], wide(&[3, 2, 3])], &two, &[2, 2]), "cache.kpe");
        refused(run(q, cache, &two, &[4, 1]), "lse");
        refused(run([wide(&[1, 2, 4]), wide(&[1, 2, 3])], cache, &one, &[2, 2]), "out");
        refused(run(q, cache, &pair, &[2, 2]), "queries");
        refused(run([wide(&[3, 2, 4]), wide(&[3, 2, 3])], cache, &three, &[2, 2]), "out");
        let mixed = [view(&halves, &[2, 2, 4]), view(&brains, &[2, 2, 3])];
        refused(run(mixed, cache, &two, &[2, 2]), "q.pe");
        let hidden = batch_mla(
            &spec,
            &MlaQuery::new(wide(&[3, 2, 4]), wide(&[3, 2, 3])),
            &MlaCache::new(cache[0], cache[1]),
            &three,
            &table,
            &mut view_mut(&mut [7.0f64; 24], &[3, 2, 4]),
            None,
            HostMask::Causal,
        );
        refused(hidden, "queries");
        assert_eq!((out, lse), ([7.0; 16], [7.0; 4]));
    }

    proptest! {
        /// Latent attention is attention with one KV head, whose keys are both
        /// parts and whose values are the first, of a request for each query
        /// that ends where the query's sight does.
        #[test]
        fn is_attention_over_joined_keys(
            page_size in 1usize..5,
            num_heads in 1usize..4,
            lens in prop::collection::vec((0usize..4, 0usize..10), 1..4),
            causal: bool,
            seed: u64,
        ) {
            let lens: Vec<_> = lens.into_iter().map(|(q, kv)| (q, if causal { kv.max(q) } else { kv })).collect();
            let (ckv_width, kpe_width) = (5, 3);
            let width = ckv_width + kpe_width;
            let mut state = seed;
            let mut numbers = |len: usize| -> Vec<f64> {
                (0..len).map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
                }).collect()
            };
            let mut next = 0;
            let pages: Vec<Vec<i32>> = lens.iter().map(|&(_, kv)| {
                (0..kv.div_ceil(page_size)).map(|_| { next += 1; next - 1 }).collect()
            }).collect();
            let count = next as usize + 1;
            let table = PageIndices::from_requests(
                count, page_size, pages.iter().map(Vec::as_slice).zip(lens.iter().map(|len| len.1)),
            ).unwrap();
            let queries = RaggedIndices::from_lens(lens.iter().map(|len| len.0)).unwrap();
            let n = queries.total();
            let (q, cache) = (numbers(n * num_heads * width), numbers(count * page_size * width));

            let (mut out, mut lse) = (vec![f64::NAN; n * num_heads * ckv_width], vec![f64::NAN; n * num_heads]);
            let (joined_q, joined) = (view(&q, &[n, num_heads, width]), view(&cache, &[count, page_size, width]));
            batch_mla(
                &MlaSpec::new(DType::F16, 0.7),
                &MlaQuery::new(
                    joined_q.narrow(2, 0, ckv_width).unwrap(),
                    joined_q.narrow(2, ckv_width, kpe_width).unwrap(),
                ),
                &MlaCache::new(
                    joined.narrow(2, 0, ckv_width).unwrap(),
                    joined.narrow(2, ckv_width, kpe_width).unwrap(),
                ),
                &queries,
                &table,
                &mut view_mut(&mut out, &[n, num_heads, ckv_width]),
                Some(&mut view_mut(&mut lse, &[n, num_heads])),
                if causal { HostMask::Causal } else { HostMask::None },
            ).unwrap();

            let sights: Vec<_> = lens.iter().zip(&pages).flat_map(|(&(q, kv), pages)| {
                (0..q).map(move |at| {
                    let seen = if causal { kv - q + at + 1 } else { kv };
                    (&pages[..seen.div_ceil(page_size)], seen)
                })
            }).collect();
            let table = PageIndices::from_requests(count, page_size, sights).unwrap();
            let shape = [count, page_size, 1, width];
            let kv = PagedKv::new(view(&cache, &shape), view(&cache, &shape), KvLayout::Nhd);
            let (mut wide, mut want_lse) = (vec![f64::NAN; n * num_heads * width], vec![f64::NAN; n * num_heads]);
            reference::batch_decode(
                &AttentionSpec::new(DType::F64, width),
                &view(&q, &[n, num_heads, width]),
                &kv,
                &table,
                &mut view_mut(&mut wide, &[n, num_heads, width]),
                Some(&mut view_mut(&mut want_lse, &[n, num_heads])),
                &RunOptions::with_sm_scale(0.7),
            ).unwrap();
            let want: Vec<f64> = wide.chunks(width).flat_map(|row| row[..ckv_width].to_vec()).collect();
            close(&out, &want);
            close(&lse, &want_lse);
        }
    }
}
