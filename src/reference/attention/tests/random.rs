//! Random batches: what must not matter, and what must.

use proptest::prelude::*;

use super::{super::*, close, spec};
use crate::{
    kv::KvLayout,
    reference::{
        page::place,
        testing::{view, view_mut},
    },
};

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
            &RunOptions::default(),
        )
        .unwrap();
        (out, lse)
    }

    fn spec(&self) -> AttentionSpec {
        spec(self.width)
    }

    /// The tokens of a cache, request by request.
    fn gather(&self, cache: &[f64]) -> Vec<f64> {
        let (table, row) = (self.table(), self.kv_heads * self.width);
        (0..self.lens.len())
            .flat_map(|request| (0..self.lens[request]).map(move |at| (request, at)))
            .flat_map(|(request, at)| {
                let (page, slot) = place(&table, request, at);
                let start = (page * self.page_size + slot) * row;
                cache[start..start + row].to_vec()
            })
            .collect()
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

/// A batch with several queries per request, over the pages of a [`Batch`].
#[derive(Clone, Debug)]
struct Prefill {
    batch: Batch,
    queries: Vec<usize>,
    q: Vec<f64>,
    causal: bool,
}

impl Prefill {
    fn indices(&self) -> RaggedIndices {
        RaggedIndices::from_lens(self.queries.iter().copied()).unwrap()
    }

    fn heads(&self) -> usize {
        self.batch.kv_heads * self.batch.group
    }

    fn mask(&self) -> HostMask<'static> {
        if self.causal { HostMask::Causal } else { HostMask::None }
    }

    fn paged(&self, spec: &AttentionSpec) -> (Vec<f64>, Vec<f64>) {
        let (batch, rows, heads) = (&self.batch, self.indices().total(), self.heads());
        let (k, v) = (view(&batch.k, &batch.shape()), view(&batch.v, &batch.shape()));
        let shape = [rows, heads, batch.width];
        let (mut out, mut lse) = (vec![f64::NAN; self.q.len()], vec![f64::NAN; rows * heads]);
        batch_prefill_paged(
            spec,
            &view(&self.q, &shape),
            &PagedKv::new(k, v, KvLayout::Nhd),
            &self.indices(),
            &batch.table(),
            &mut view_mut(&mut out, &shape),
            Some(&mut view_mut(&mut lse, &[rows, heads])),
            self.mask(),
            &RunOptions::default(),
        )
        .unwrap();
        (out, lse)
    }

    /// The same keys and values, one after the other.
    fn ragged(&self, spec: &AttentionSpec) -> (Vec<f64>, Vec<f64>) {
        let (batch, rows, heads) = (&self.batch, self.indices().total(), self.heads());
        let keys = RaggedIndices::from_lens(batch.lens.iter().copied()).unwrap();
        let (k, v) = (batch.gather(&batch.k), batch.gather(&batch.v));
        let (shape, kv_shape) = ([rows, heads, batch.width], [keys.total(), batch.kv_heads, batch.width]);
        let (mut out, mut lse) = (vec![f64::NAN; self.q.len()], vec![f64::NAN; rows * heads]);
        batch_prefill_ragged(
            spec,
            &view(&self.q, &shape),
            [&view(&k, &kv_shape), &view(&v, &kv_shape)],
            &self.indices(),
            &keys,
            &mut view_mut(&mut out, &shape),
            Some(&mut view_mut(&mut lse, &[rows, heads])),
            self.mask(),
            &RunOptions::default(),
        )
        .unwrap();
        (out, lse)
    }
}

fn prefills() -> impl Strategy<Value = Prefill> {
    batches().prop_flat_map(|batch| {
        let requests = batch.lens.len();
        (Just(batch), prop::collection::vec(0usize..6, requests), any::<bool>()).prop_flat_map(
            |(batch, queries, causal)| {
                let rows: usize = queries.iter().sum();
                let row = batch.kv_heads * batch.group * batch.width;
                let q = prop::collection::vec(-3.0f64..3.0, rows * row);
                (Just(batch), Just(queries), q, Just(causal))
                    .prop_map(|(batch, queries, q, causal)| Prefill { batch, queries, q, causal })
            },
        )
    })
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
            let append = crate::indices::AppendIndices::last_tokens(&table, &append_indptr).unwrap();
            let (key, value) = (batch.gather(&batch.k), batch.gather(&batch.v));
            let shape = [append.len(), batch.kv_heads, batch.width];
            let (mut k, mut v) = (vec![f64::NAN; batch.k.len()], vec![f64::NAN; batch.v.len()]);
            let mut cache = crate::kv::PagedKvMut::new(
                view_mut(&mut k, &batch.shape()),
                view_mut(&mut v, &batch.shape()),
                KvLayout::Nhd,
            );
            crate::reference::append_paged_kv_cache(&view(&key, &shape), &view(&value, &shape), &crate::indices::SlotMapping::new(&append, &table), &mut cache)
            .unwrap();
            same(&batch.decode_from(&batch.spec(), &cache.as_ref()), &batch.decode(&batch.spec()));
        }

        /// With one query per request, prefill is decode, causal or not.
        #[test]
        fn prefill_of_one_query_is_decode(batch in batches(), causal: bool, window in 0u32..9) {
            let queries = vec![1; batch.lens.len()];
            let prefill = Prefill { q: batch.q.clone(), queries, causal, batch: batch.clone() };
            for spec in [batch.spec(), batch.spec().with_window_left(window)] {
                let expected = batch.decode(&spec);
                same(&prefill.paged(&spec), &expected);
                same(&prefill.ragged(&spec), &expected);
            }
        }

        /// Where keys and values lie does not matter.
        #[test]
        fn ragged_prefill_is_paged_prefill(prefill in prefills(), window in 0u32..9) {
            for spec in [prefill.batch.spec(), prefill.batch.spec().with_window_left(window)] {
                same(&prefill.ragged(&spec), &prefill.paged(&spec));
            }
        }

        /// One request is a batch of one, and one query its last token, also
        /// where keys are stored head by head.
        #[test]
        fn one_request_is_a_batch_of_one(mut prefill in prefills(), window in 0u32..9) {
            prefill.batch.lens.truncate(1);
            prefill.queries.truncate(1);
            let (batch, heads, width) = (&prefill.batch, prefill.heads(), prefill.batch.width);
            let (rows, keys) = (prefill.queries[0], batch.lens[0]);
            let row = heads * width;
            prefill.q.truncate(rows * row);
            let (k, v) = (batch.gather(&batch.k), batch.gather(&batch.v));
            let shape = [keys, batch.kv_heads, width];
            let by_head = |nhd: &[f64]| -> Vec<f64> {
                let of_head = |head: usize| nhd.chunks(width).skip(head).step_by(batch.kv_heads).flatten();
                (0..batch.kv_heads).flat_map(of_head).copied().collect()
            };
            let (k_hnd, v_hnd) = (by_head(&k), by_head(&v));
            let hnd = |x| view(x, &[batch.kv_heads, keys, width]).permute(&[1, 0, 2]).unwrap();
            for spec in [batch.spec(), batch.spec().with_window_left(window)] {
                let expected = prefill.ragged(&spec);
                for (k, v) in [(view(&k, &shape), view(&v, &shape)), (hnd(&k_hnd), hnd(&v_hnd))] {
                    let (mut out, mut lse) = (vec![f64::NAN; rows * row], vec![f64::NAN; rows * heads]);
                    single_prefill(
                        &spec,
                        &view(&prefill.q, &[rows, heads, width]),
                        [&k, &v],
                        &mut view_mut(&mut out, &[rows, heads, width]),
                        Some(&mut view_mut(&mut lse, &[rows, heads])),
                        prefill.mask(),
&RunOptions::default(),
                    )
                    .unwrap();
                    same(&(out, lse), &expected);
                    let Some(last) = rows.checked_sub(1) else { continue };
                    let (mut out, mut lse) = (vec![f64::NAN; row], vec![f64::NAN; heads]);
                    single_decode(
                        &spec,
                        &view(&prefill.q[last * row..], &[heads, width]),
                        [&k, &v],
                        &mut view_mut(&mut out, &[heads, width]),
                        Some(&mut view_mut(&mut lse, &[heads])),
                        &RunOptions::default(),
                    )
                    .unwrap();
                    close(&out, &expected.0[last * row..]);
                    close(&lse, &expected.1[last * heads..]);
                }
            }
        }

        /// Row by row, causal prefill is decode of a growing request.
        #[test]
        fn causal_prefill_is_decode_step_by_step(mut prefill in prefills(), window in 0u32..9) {
            prefill.causal = true;
            let heads = prefill.heads();
            let (row, first) = (heads * prefill.batch.width, prefill.indices());
            for spec in [prefill.batch.spec(), prefill.batch.spec().with_window_left(window)] {
                let (out, lse) = prefill.paged(&spec);
                for request in 0..prefill.queries.len() {
                    for query in 0..prefill.queries[request] {
                        let after = prefill.queries[request] - 1 - query;
                        let mut step = prefill.batch.clone();
                        let used = step.lens[..request].iter().map(|len| len.div_ceil(step.page_size)).sum();
                        step.pages.rotate_left(used);
                        step.lens = vec![step.lens[request].saturating_sub(after)];
                        let at = first.indptr()[request] as usize + query;
                        step.q = prefill.q[at * row..(at + 1) * row].to_vec();
                        let (want, want_lse) = step.decode(&spec);
                        close(&out[at * row..(at + 1) * row], &want);
                        close(&lse[at * heads..(at + 1) * heads], &want_lse);
                    }
                }
            }
        }

        /// A window that reaches before the first key changes nothing.
        #[test]
        fn wide_windows_of_prefill_are_none(prefill in prefills()) {
            let spec = prefill.batch.spec();
            same(&prefill.paged(&spec.with_window_left(20)), &prefill.paged(&spec));
        }
    }
