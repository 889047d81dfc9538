//! Paged batch decode on the CPU.

use super::{
    host::{Check, Rows},
    page::{CacheShape, place},
};
use crate::{
    attention::{AttentionSpec, DecodeOptions},
    error::Result,
    kv::PageIndices,
    page::PagedKv,
    tensor::{TensorMut, TensorRef},
};

/// [`DecodePlan::run`](crate::attention::DecodePlan::run) on the CPU:
/// attention of one query per request to the request's pages.
///
/// `q` and `out` are `[batch, num_qo_heads, head_dim]`, `kv` is the paged cache
/// that `table` was checked for, `lse`, if given, is `[batch, num_qo_heads]`
/// and takes base-2 logarithms. Tensors have the spec's dtypes, or are `f32`
/// or `f64`; `lse` is `f32` or `f64`. Any number of query heads per KV head is
/// fine. A request without tokens gets zeros, and −∞.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device,
/// dtype or shape does not fit, or the spec is impossible. Nothing was written.
pub fn batch_decode(
    spec: &AttentionSpec,
    q: &TensorRef<'_>,
    kv: &PagedKv<'_>,
    table: &PageIndices,
    out: &mut TensorMut<'_>,
    lse: Option<&mut TensorMut<'_>>,
    options: &DecodeOptions,
) -> Result<()> {
    let check = Check { op: "reference::batch_decode" };
    let logits = Logits::new(check, spec, options)?;
    let q = check.rows("q", q, &[spec.dtype_q], &[3])?;
    let mut out = check.rows_mut("out", out, &[spec.dtype_o], &[3])?;
    let k = check.rows("kv.k", &kv.k, &[spec.dtype_kv], &[4])?;
    let v = check.rows("kv.v", &kv.v, &[spec.dtype_kv], &[4])?;
    let mut lse = lse.map(|lse| check.rows_mut("lse", lse, &[], &[2])).transpose()?;

    let (batch, qo_heads, width) = (table.batch_size(), q.shape()[1] as usize, spec.head_dim_qk);
    check.shape("q", &q, &[batch as i64, qo_heads as i64, width as i64])?;
    check.shape("out", &out.rows, q.shape())?;
    check.shape("kv.v", &v, k.shape())?;
    let shape = CacheShape::new(check, &k, kv.layout, table)?;
    if k.width() != width {
        return check.fail("kv.k", format!("its head_dim is {}; the spec's is {width}", k.width()));
    }
    if qo_heads == 0 || !qo_heads.is_multiple_of(shape.heads) {
        return check.fail("q", format!("{qo_heads} query heads over {} KV heads", shape.heads));
    }
    if let Some(lse) = &lse {
        check.shape("lse", &lse.rows, &[batch as i64, qo_heads as i64])?;
    }

    let cache = Cache { k, v, shape };
    let mut sums = vec![0.0; qo_heads];
    for request in 0..batch {
        for kv_head in 0..shape.heads {
            let group = qo_heads / shape.heads;
            let heads = kv_head * group..(kv_head + 1) * group;
            let rows = heads.clone().map(|head| request * qo_heads + head);
            let queries: Vec<_> = rows.clone().map(|row| q.numbers(row)).collect();
            let (outputs, group_sums) = attend(&queries, &cache, kv_head, table, request, &logits);
            rows.zip(&outputs).for_each(|(row, output)| out.write(row, output));
            sums[heads].copy_from_slice(&group_sums);
        }
        if let Some(lse) = &mut lse {
            lse.write(request, &sums);
        }
    }
    Ok(())
}

struct Cache<'a> {
    k: Rows<'a>,
    v: Rows<'a>,
    shape: CacheShape,
}

/// How products of queries and keys become logits, and which keys are seen.
struct Logits {
    sm_scale: f64,
    soft_cap: Option<f64>,
    window: usize,
}

impl Logits {
    fn new(check: Check, spec: &AttentionSpec, options: &DecodeOptions) -> Result<Self> {
        if spec.head_dim_qk == 0 || spec.head_dim_qk != spec.head_dim_vo {
            return check.fail(
                "spec",
                format!(
                    "head dimensions {} and {}; they must be equal and not 0",
                    spec.head_dim_qk, spec.head_dim_vo
                ),
            );
        }
        let soft_cap = spec.logits_soft_cap.map(f64::from);
        if soft_cap.is_some_and(|cap| !(cap > 0.0 && cap.is_finite())) {
            return check
                .fail("spec", format!("logits_soft_cap {soft_cap:?}; it must be positive and finite"));
        }
        let window = spec.window_left.map_or(usize::MAX, |left| (left as usize).saturating_add(1));
        Ok(Self { sm_scale: options.sm_scale.unwrap_or_else(|| spec.default_sm_scale()), soft_cap, window })
    }

    fn of(&self, product: f64) -> f64 {
        let logit = product * self.sm_scale;
        self.soft_cap.map_or(logit, |cap| cap * (logit / cap).tanh())
    }
}

/// Attention of the queries that share one KV head: their outputs, and the
/// base-2 logarithms of their sums of exponentials.
fn attend(
    queries: &[Vec<f64>],
    cache: &Cache<'_>,
    kv_head: usize,
    table: &PageIndices,
    request: usize,
    logits: &Logits,
) -> (Vec<Vec<f64>>, Vec<f64>) {
    let width = cache.k.width();
    let len = table.seq_len(request);
    let seen = len.saturating_sub(logits.window)..len;
    let row = |position| {
        let (page, slot) = place(table, request, position);
        cache.shape.row(page, slot, kv_head)
    };
    let mut numbers = vec![0.0; width];

    let mut weights = vec![Vec::with_capacity(seen.len()); queries.len()];
    for position in seen.clone() {
        cache.k.read(row(position), &mut numbers);
        for (query, weights) in queries.iter().zip(&mut weights) {
            let product: f64 = query.iter().zip(&numbers).map(|(q, k)| q * k).sum();
            weights.push(logits.of(product));
        }
    }
    let sums = weights.iter_mut().map(|weights| softmax(weights)).collect();

    let mut outputs = vec![vec![0.0; width]; queries.len()];
    for (at, position) in seen.enumerate() {
        cache.v.read(row(position), &mut numbers);
        for (weights, output) in weights.iter().zip(&mut outputs) {
            let weight = weights[at];
            output.iter_mut().zip(&numbers).for_each(|(o, v)| *o += weight * v);
        }
    }
    (outputs, sums)
}

/// Turns logits into weights; returns the base-2 logarithm of the sum of their
/// exponentials, −∞ for none.
pub(super) fn softmax(logits: &mut [f64]) -> f64 {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if logits.is_empty() {
        return max;
    }
    logits.iter_mut().for_each(|logit| *logit = (*logit - max).exp());
    let sum: f64 = logits.iter().sum();
    logits.iter_mut().for_each(|weight| *weight /= sum);
    max * std::f64::consts::LOG2_E + sum.log2()
}

#[cfg(test)]
mod tests {
    use half::f16;
    use proptest::prelude::*;

    use super::*;
    use crate::{DType, Device, Element, FlashInferError, page::KvLayout};

    fn view<'a, T: Element>(slice: &'a [T], shape: &[usize]) -> TensorRef<'a> {
        TensorRef::from_slice(slice, shape).unwrap()
    }

    fn view_mut<'a, T: Element>(slice: &'a mut [T], shape: &[usize]) -> TensorMut<'a> {
        TensorMut::from_slice(slice, shape).unwrap()
    }

    #[track_caller]
    fn close(got: &[f64], expected: &[f64]) {
        assert_eq!(got.len(), expected.len());
        let near = |(a, b): (&f64, &f64)| a == b || (a - b).abs() < 1e-12;
        assert!(got.iter().zip(expected).all(near), "{got:?} is not {expected:?}");
    }

    fn spec(head_dim: usize) -> AttentionSpec {
        AttentionSpec::new(DType::F64, head_dim)
    }

    /// One request, one head, head_dim 1, keys in one page.
    fn one_head(spec: &AttentionSpec, q: f64, k: &[f64], v: &[f64], options: &DecodeOptions) -> (f64, f64) {
        let n = k.len();
        let table = PageIndices::from_requests(1, n, [(&[0][..], n)]).unwrap();
        let shape = [1, n, 1, 1];
        let kv = PagedKv::new(view(k, &shape), view(v, &shape), KvLayout::Nhd);
        let (mut out, mut lse) = ([f64::NAN], [f64::NAN]);
        batch_decode(
            spec,
            &view(&[q], &[1, 1, 1]),
            &kv,
            &table,
            &mut view_mut(&mut out, &[1, 1, 1]),
            Some(&mut view_mut(&mut lse, &[1, 1])),
            options,
        )
        .unwrap();
        (out[0], lse[0])
    }

    #[test]
    fn decode_by_hand() {
        let (ln2, ln3) = (2f64.ln(), 3f64.ln());
        // Exponentials 1, 2 and 3 of a sum of 6, over values 6, 12 and 18.
        let (k, v) = ([0.0, ln2, ln3], [6.0, 12.0, 18.0]);
        let options = DecodeOptions::default();
        let (out, lse) = one_head(&spec(1), 1.0, &k, &v, &options);
        close(&[out, lse], &[(6.0 + 24.0 + 54.0) / 6.0, 6f64.log2()]);
        // Twice the scale squares the exponentials: 1, 4 and 9 of 14.
        let (out, lse) = one_head(&spec(1), 1.0, &k, &v, &DecodeOptions::with_sm_scale(2.0));
        close(&[out, lse], &[(6.0 + 48.0 + 162.0) / 14.0, 14f64.log2()]);
        // A window of one key to the left: 2 and 3 of 5; of none: the last key.
        let (out, lse) = one_head(&spec(1).with_window_left(1), 1.0, &k, &v, &options);
        close(&[out, lse], &[(24.0 + 54.0) / 5.0, 5f64.log2()]);
        let (out, lse) = one_head(&spec(1).with_window_left(0), 1.0, &k, &v, &options);
        close(&[out, lse], &[18.0, 3f64.log2()]);
        // A cap of 1: logits 0, tanh(ln 2) = 0.6 and tanh(ln 3) = 0.8.
        let (out, lse) = one_head(&spec(1).with_logits_soft_cap(1.0), 1.0, &k, &v, &options);
        let (a, b) = (0.6f64.exp(), 0.8f64.exp());
        close(&[out, lse], &[(6.0 + 12.0 * a + 18.0 * b) / (1.0 + a + b), (1.0 + a + b).log2()]);
    }

    #[test]
    fn default_scale_is_one_over_the_root_of_head_dim() {
        let table = PageIndices::from_requests(1, 2, [(&[0][..], 2)]).unwrap();
        // Products 0 and 2·ln 2, over √4: exponentials 1 and 2.
        let mut k = [0.0f64; 8];
        k[4] = 2.0 * 2f64.ln();
        let v = [3.0f64, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0];
        let shape = [1, 2, 1, 4];
        let kv = PagedKv::new(view(&k, &shape), view(&v, &shape), KvLayout::Nhd);
        let q = [1.0f64, 0.0, 0.0, 0.0];
        let mut out = [f64::NAN; 4];
        let options = DecodeOptions::default();
        let (q, mut o) = (view(&q, &[1, 1, 4]), view_mut(&mut out, &[1, 1, 4]));
        batch_decode(&spec(4), &q, &kv, &table, &mut o, None, &options).unwrap();
        close(&out, &[1.0, 2.0, 0.0, 0.0]);
    }

    #[test]
    fn groups_of_query_heads_share_a_kv_head_and_empty_requests_are_zero() {
        // Requests of 1, 0 and 2 tokens; 2 KV heads, 6 query heads; all keys
        // zero, so each output is the mean of its head's values.
        let table =
            PageIndices::from_requests(3, 1, [(&[2][..], 1), (&[][..], 0), (&[0, 1][..], 2)]).unwrap();
        let k = [0.0f64; 6];
        let v = [1.0f64, 10.0, 3.0, 30.0, 5.0, 50.0]; // [page, slot, head, 1]
        let shape = [3, 1, 2, 1];
        let kv = PagedKv::new(view(&k, &shape), view(&v, &shape), KvLayout::Nhd);
        let q = [1.0f64; 18];
        let (mut out, mut lse) = ([f64::NAN; 18], [f64::NAN; 18]);
        batch_decode(
            &spec(1),
            &view(&q, &[3, 6, 1]),
            &kv,
            &table,
            &mut view_mut(&mut out, &[3, 6, 1]),
            Some(&mut view_mut(&mut lse, &[3, 6])),
            &DecodeOptions::default(),
        )
        .unwrap();
        close(&out[..6], &[5.0, 5.0, 5.0, 50.0, 50.0, 50.0]);
        assert_eq!(out[6..12], [0.0; 6]);
        close(&out[12..], &[2.0, 2.0, 2.0, 20.0, 20.0, 20.0]);
        assert_eq!(lse[..6], [0.0; 6]);
        assert_eq!(lse[6..12], [f64::NEG_INFINITY; 6]);
        close(&lse[12..], &[1.0; 6]);
    }

    #[test]
    fn wrong_input_is_refused_and_nothing_written() {
        #[track_caller]
        fn refused(result: Result<()>, expected: &str) {
            match result {
                Err(FlashInferError::InvalidArgument { argument, .. }) => assert_eq!(argument, expected),
                other => panic!("expected {expected} to be refused, got {other:?}"),
            }
        }
        let table = PageIndices::from_requests(2, 2, [(&[1][..], 2)]).unwrap();
        let (q, cache, halves) = ([1.0f64; 8], [1.0f64; 24], [f16::ONE; 8]);
        let (mut out, mut lse) = ([7.0f64; 8], [7.0f64; 4]);
        let options = DecodeOptions::default();
        let spec = spec(2);
        let mut run =
            |spec: &AttentionSpec, q: &TensorRef<'_>, cache_shape: [&[usize]; 2], lse_shape: &[usize]| {
                let kv =
                    PagedKv::new(view(&cache, cache_shape[0]), view(&cache, cache_shape[1]), KvLayout::Nhd);
                batch_decode(
                    spec,
                    q,
                    &kv,
                    &table,
                    &mut view_mut(&mut out, &[1, 4, 2]),
                    Some(&mut view_mut(&mut lse, lse_shape)),
                    &options,
                )
            };
        let good_q = view(&q, &[1, 4, 2]);
        let shape: [&[usize]; 2] = [&[2, 2, 2, 2]; 2];
        refused(run(&spec, &view(&q, &[1, 8]), shape, &[1, 4]), "q");
        refused(run(&spec, &view(&q, &[2, 2, 2]), shape, &[1, 4]), "q");
        refused(run(&spec, &view(&q, &[1, 2, 4]), shape, &[1, 4]), "q");
        refused(run(&spec, &view(&halves, &[1, 4, 2]), shape, &[1, 4]), "q");
        refused(run(&spec, &view(&q, &[1, 2, 2]), shape, &[1, 4]), "out");
        refused(run(&spec, &good_q, [&[1, 2, 2, 2]; 2], &[1, 4]), "kv.k");
        refused(run(&spec, &good_q, [&[2, 1, 2, 2]; 2], &[1, 4]), "kv.k");
        refused(run(&spec, &good_q, [&[2, 2, 2, 1]; 2], &[1, 4]), "kv.k");
        refused(run(&spec, &good_q, [&[2, 2, 4]; 2], &[1, 4]), "kv.k");
        refused(run(&spec, &good_q, [&[2, 2, 2, 2], &[2, 2, 1, 2]], &[1, 4]), "kv.v");
        refused(run(&spec, &good_q, [&[2, 2, 0, 2]; 2], &[1, 4]), "q");
        refused(run(&spec, &good_q, [&[2, 2, 3, 2]; 2], &[1, 4]), "q");
        refused(run(&spec, &good_q, shape, &[4, 1]), "lse");
        refused(run(&AttentionSpec { head_dim_vo: 1, ..spec }, &good_q, shape, &[1, 4]), "spec");
        for cap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            refused(run(&spec.with_logits_soft_cap(cap), &good_q, shape, &[1, 4]), "spec");
        }
        // SAFETY: the tensor is refused, so nothing looks at the address.
        let device = unsafe {
            TensorRef::from_raw_parts(256 as *const _, Device::Cuda(0), DType::F64, &[1, 4, 2], None).unwrap()
        };
        refused(run(&spec, &device, shape, &[1, 4]), "q");
        assert_eq!((out, lse), ([7.0; 8], [7.0; 4]));
    }

    /// A batch with random numbers, stored page by page in NHD order.
    #[derive(Clone, Debug)]
    struct Batch {
        page_size: usize,
        kv_heads: usize,
        group: usize,
        width: usize,
        lens: Vec<usize>,
        /// The page of the cache that serves as the n-th of the batch.
        pages: Vec<i32>,
        q: Vec<f64>,
        k: Vec<f64>,
        v: Vec<f64>,
    }

    impl Batch {
        fn table(&self) -> PageIndices {
            let mut pages = &self.pages[..];
            let requests = self.lens.iter().map(|&len| {
                let (own, rest) = pages.split_at(len.div_ceil(self.page_size));
                pages = rest;
                (own, len)
            });
            PageIndices::from_requests(self.pages.len(), self.page_size, requests).unwrap()
        }

        fn shape(&self) -> [usize; 4] {
            [self.pages.len(), self.page_size, self.kv_heads, self.width]
        }

        fn decode(&self, spec: &AttentionSpec) -> (Vec<f64>, Vec<f64>) {
            let kv = PagedKv::new(view(&self.k, &self.shape()), view(&self.v, &self.shape()), KvLayout::Nhd);
            self.decode_from(spec, &kv)
        }

        fn decode_from(&self, spec: &AttentionSpec, kv: &PagedKv<'_>) -> (Vec<f64>, Vec<f64>) {
            let (batch, heads) = (self.lens.len(), self.kv_heads * self.group);
            let mut out = vec![f64::NAN; batch * heads * self.width];
            let mut lse = vec![f64::NAN; batch * heads];
            let shape = [batch, heads, self.width];
            batch_decode(
                spec,
                &view(&self.q, &shape),
                kv,
                &self.table(),
                &mut view_mut(&mut out, &shape),
                Some(&mut view_mut(&mut lse, &[batch, heads])),
                &DecodeOptions::default(),
            )
            .unwrap();
            (out, lse)
        }

        fn spec(&self) -> AttentionSpec {
            spec(self.width)
        }
    }

    fn batches() -> impl Strategy<Value = Batch> {
        let sizes = (1usize..5, 1usize..4, 1usize..4, 1usize..9, prop::collection::vec(0usize..12, 1..5));
        sizes.prop_flat_map(|(page_size, kv_heads, group, width, lens)| {
            let used: usize = lens.iter().map(|len: &usize| len.div_ceil(page_size)).sum();
            let pages: Vec<i32> = (0..used as i32 + 2).collect();
            let elements = pages.len() * page_size * kv_heads * width;
            let numbers = |len| prop::collection::vec(-3.0f64..3.0, len);
            let q = numbers(lens.len() * kv_heads * group * width);
            (Just(pages).prop_shuffle(), q, numbers(elements), numbers(elements)).prop_map(
                move |(pages, q, k, v)| Batch {
                    page_size,
                    kv_heads,
                    group,
                    width,
                    lens: lens.clone(),
                    pages,
                    q,
                    k,
                    v,
                },
            )
        })
    }

    #[track_caller]
    fn same(got: &(Vec<f64>, Vec<f64>), expected: &(Vec<f64>, Vec<f64>)) {
        close(&got.0, &expected.0);
        close(&got.1, &expected.1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// With one key, the output is its value.
        #[test]
        fn one_key_returns_its_value(mut batch in batches()) {
            batch.lens.fill(1);
            batch.pages.extend(batch.pages.len() as i32..(batch.lens.len() + 2) as i32);
            let page = batch.page_size * batch.kv_heads * batch.width;
            batch.k.resize(batch.pages.len() * page, 1.0);
            batch.v.resize(batch.pages.len() * page, 2.0);
            let (out, _) = batch.decode(&batch.spec());
            for (at, output) in out.chunks(batch.width).enumerate() {
                let heads = batch.kv_heads * batch.group;
                let (request, kv_head) = (at / heads, at % heads / batch.group);
                let start = batch.pages[request] as usize * page + kv_head * batch.width;
                close(output, &batch.v[start..start + batch.width]);
            }
        }

        /// Where pages lie in the cache does not matter.
        #[test]
        fn moving_pages_with_the_table_changes_nothing(batch in batches(), turn in 1usize..7) {
            let page = batch.page_size * batch.kv_heads * batch.width;
            let mut moved = batch.clone();
            let turn = turn % batch.pages.len();
            moved.k.rotate_right(turn * page);
            moved.v.rotate_right(turn * page);
            for page in &mut moved.pages {
                *page = (*page + turn as i32) % batch.pages.len() as i32;
            }
            same(&moved.decode(&batch.spec()), &batch.decode(&batch.spec()));
        }

        /// The order of dimensions, joined storage and strides do not matter.
        #[test]
        fn layouts_agree(batch in batches()) {
            let expected = batch.decode(&batch.spec());
            let [pages, page_size, heads, width] = batch.shape();
            // HND storage is NHD storage with two dimensions swapped.
            let swap = |nhd: &[f64]| -> Vec<f64> {
                let mut hnd = vec![f64::NAN; nhd.len()];
                for (at, &x) in nhd.iter().enumerate() {
                    let (d, rest) = (at % width, at / width);
                    let (head, rest) = (rest % heads, rest / heads);
                    let (slot, page) = (rest % page_size, rest / page_size);
                    hnd[((page * heads + head) * page_size + slot) * width + d] = x;
                }
                hnd
            };
            let (k, v) = (swap(&batch.k), swap(&batch.v));
            let shape = [pages, heads, page_size, width];
            let kv = PagedKv::new(view(&k, &shape), view(&v, &shape), KvLayout::Hnd);
            same(&batch.decode_from(&batch.spec(), &kv), &expected);
            // The same storage, seen as NHD through strides.
            let permute = |x| view(x, &shape).permute(&[0, 2, 1, 3]).unwrap();
            let kv = PagedKv::new(permute(&k), permute(&v), KvLayout::Nhd);
            same(&batch.decode_from(&batch.spec(), &kv), &expected);
            // Keys and values page by page in one tensor.
            let page = page_size * heads * width;
            let joined: Vec<f64> =
                batch.k.chunks(page).zip(batch.v.chunks(page)).flat_map(|(k, v)| [k, v].concat()).collect();
            let kv =
                PagedKv::joined(view(&joined, &[pages, 2, page_size, heads, width]), KvLayout::Nhd).unwrap();
            same(&batch.decode_from(&batch.spec(), &kv), &expected);
        }

        /// A window that covers every key, and a cap that no logit comes near,
        /// change nothing.
        #[test]
        fn wide_windows_and_caps_are_none(batch in batches()) {
            let expected = batch.decode(&batch.spec());
            let longest = batch.lens.iter().max().copied().unwrap_or(0) as u32;
            let window = batch.spec().with_window_left(longest.saturating_sub(1));
            same(&batch.decode(&window), &expected);
            let (out, lse) = batch.decode(&batch.spec().with_logits_soft_cap(1e9));
            for (a, b) in out.iter().zip(&expected.0).chain(lse.iter().zip(&expected.1)) {
                prop_assert!(a == b || (a - b).abs() < 1e-9);
            }
        }

        /// A window is the same as a request that holds only its keys.
        #[test]
        fn a_window_forgets_older_pages(mut batch in batches(), pages in 1usize..3) {
            batch.lens.truncate(1);
            batch.lens[0] = batch.lens[0].max(1);
            let kept = (pages - 1) * batch.page_size + (batch.lens[0] - 1) % batch.page_size + 1;
            prop_assume!(kept < batch.lens[0]);
            let window = batch.decode(&batch.spec().with_window_left(kept as u32 - 1));
            let used = batch.lens[0].div_ceil(batch.page_size);
            let mut short = batch.clone();
            short.pages.rotate_left(used - pages);
            short.lens[0] = kept;
            same(&window, &short.decode(&batch.spec()));
        }

        /// What was appended is what decode reads.
        #[test]
        fn appended_tokens_are_attended_to(batch in batches()) {
            let table = batch.table();
            let append_indptr: Vec<i32> = std::iter::once(0)
                .chain(batch.lens.iter().scan(0, |end, &len| { *end += len as i32; Some(*end) }))
                .collect();
            let append = crate::AppendIndices::last_tokens(&table, &append_indptr).unwrap();
            let row = batch.kv_heads * batch.width;
            let gather = |cache: &[f64]| -> Vec<f64> {
                (0..batch.lens.len())
                    .flat_map(|request| (0..table.seq_len(request)).map(move |at| (request, at)))
                    .flat_map(|(request, at)| {
                        let (page, slot) = place(&table, request, at);
                        let start = (page * batch.page_size + slot) * row;
                        cache[start..start + row].to_vec()
                    })
                    .collect()
            };
            let (key, value) = (gather(&batch.k), gather(&batch.v));
            let shape = [append.len(), batch.kv_heads, batch.width];
            let (mut k, mut v) = (vec![f64::NAN; batch.k.len()], vec![f64::NAN; batch.v.len()]);
            let mut cache = crate::page::PagedKvMut::new(
                view_mut(&mut k, &batch.shape()),
                view_mut(&mut v, &batch.shape()),
                KvLayout::Nhd,
            );
            crate::reference::append_paged_kv_cache(
                &view(&key, &shape),
                &view(&value, &shape),
                &append,
                &mut cache,
                &table,
            )
            .unwrap();
            same(&batch.decode_from(&batch.spec(), &cache.as_ref()), &batch.decode(&batch.spec()));
        }
    }
}
