//! Pages, sequences, cached prefixes and batches against a naive model, over
//! long random schedules.
//!
//! The model numbers every page that was ever taken and never uses a number
//! twice, so pages of the pool that are shared, leaked or given away wrongly
//! cannot hide. What is stored for a token depends on all tokens before it, as
//! keys and values do, so a page that is read by the wrong sequence, or copied
//! too late, shows.

use std::collections::{BTreeMap, HashMap};

use flashinfer_rs::{
    DType, FlashInferError, PageIndices, Result, TensorMut, TensorRef,
    attention::{AttentionSpec, RunOptions},
    indices::{AppendIndices, RaggedIndices, SlotMapping},
    kv::{
        Batch, BatchTables, HeadsShape, KvLayer, KvLayout, KvShape, LatentShape, PageAllocator, PagedKvCache,
        PrefixCache, Sequence,
    },
    reference,
};
use proptest::prelude::*;

/// Requests of one model.
const MAX_BATCH: usize = 5;

#[derive(Clone, Debug)]
enum Op {
    Push,
    /// Tokens of a request, then others.
    Lookup(usize, Vec<u32>),
    Fork(usize),
    /// Numbers of new tokens, repeated for the whole batch, and what decides on
    /// them.
    Append(Vec<usize>, u64),
    /// The same for one sequence outside its batch.
    Alone(usize, usize, u64),
    Truncate(usize, usize),
    Remove(usize),
    /// Without that many of the request's last tokens.
    Insert(usize, usize),
    Evict(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let request = 0..MAX_BATCH;
    prop_oneof![
        1 => Just(Op::Push),
        2 => (request.clone(), prop::collection::vec(0..2u32, 0..6)).prop_map(|(r, t)| Op::Lookup(r, t)),
        3 => request.clone().prop_map(Op::Fork),
        6 => (prop::collection::vec(prop_oneof![3 => Just(1), 2 => 0..7usize], 1..MAX_BATCH), any::<u64>())
            .prop_map(|(counts, seed)| Op::Append(counts, seed)),
        2 => (request.clone(), 0..9usize, any::<u64>()).prop_map(|(r, n, seed)| Op::Alone(r, n, seed)),
        3 => (request.clone(), 0..20usize).prop_map(|(r, len)| Op::Truncate(r, len)),
        2 => request.clone().prop_map(Op::Remove),
        3 => (request, 0..3usize).prop_map(|(r, less)| Op::Insert(r, less)),
        1 => (0..6usize).prop_map(Op::Evict),
    ]
}

/// Numbers that look random (splitmix64).
fn mix(bits: u64) -> u64 {
    let bits = bits.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// For each token, what it and all before it are.
fn contexts(tokens: &[u32]) -> Vec<u64> {
    let mut context = 0;
    let next = |token: &u32| {
        context = mix(context ^ (u64::from(*token) + 1));
        context
    };
    tokens.iter().map(next).collect()
}

/// An element of what is stored for a token; a whole number, so `f32` has it.
fn element(context: u64, layer: usize, value: bool, at: usize) -> f32 {
    (mix(context ^ mix((layer * 2 + usize::from(value)) as u64 * 1000 + at as u64)) >> 40) as f32
}

/// A sequence as the model sees it.
#[derive(Clone, Debug, Default)]
struct Naive {
    tokens: Vec<u32>,
    pages: Vec<u64>,
}

/// The page of a cached prefix's last tokens.
struct CachedPage {
    number: u64,
    last_used: usize,
    /// Its number in the pool.
    page: i32,
}

/// One language model of those that share the pool.
struct Model {
    batch: Batch,
    prefixes: PrefixCache,
    naive: Vec<Naive>,
    naive_prefixes: BTreeMap<Vec<u32>, CachedPage>,
    naive_stats: [u64; 6],
    /// What the last append gave each request.
    new_tokens: Vec<usize>,
}

struct World {
    pool: PageAllocator,
    cache: PagedKvCache,
    models: Vec<Model>,
    next_page: u64,
    time: usize,
}

impl World {
    fn new(num_pages: usize, page_size: usize, shapes: &[KvShape]) -> Self {
        let pool = PageAllocator::new(num_pages, page_size).unwrap();
        let cache = PagedKvCache::on_host(&pool, shapes).unwrap();
        let model = |_: &KvShape| Model {
            batch: Batch::new(&pool),
            prefixes: PrefixCache::new(&pool),
            naive: Vec::new(),
            naive_prefixes: BTreeMap::new(),
            naive_stats: [0; 6],
            new_tokens: Vec::new(),
        };
        Self { models: shapes.iter().map(model).collect(), cache, pool, next_page: 0, time: 0 }
    }

    /// Owners of each page of the model.
    fn naive_owners(&self) -> HashMap<u64, usize> {
        let mut owners = HashMap::new();
        for model in &self.models {
            let cached = model.naive_prefixes.values().map(|cached| &cached.number);
            for page in model.naive.iter().flat_map(|naive| &naive.pages).chain(cached) {
                *owners.entry(*page).or_default() += 1;
            }
        }
        owners
    }

    /// Appends in the model: for each of these requests, in order, so many
    /// tokens. Returns the pages and the copies that it took; takes nothing if
    /// these are more than there are free.
    fn naive_append(&mut self, model: usize, new: &[(usize, Vec<u32>)]) -> std::result::Result<usize, usize> {
        let page_size = self.pool.page_size();
        let mut owners = self.naive_owners();
        let free = self.pool.num_pages() - owners.len();
        let (mut next, mut copies) = (self.next_page, 0);
        let mut naive = self.models[model].naive.clone();
        for (request, tokens) in new {
            let Naive { tokens: old, pages } = &mut naive[*request];
            if !tokens.is_empty() && old.len() % page_size != 0 {
                let last = pages.last_mut().unwrap();
                if owners[last] > 1 {
                    *owners.get_mut(last).unwrap() -= 1;
                    *last = next;
                    next += 1;
                    copies += 1;
                }
            }
            old.extend(tokens);
            while pages.len() * page_size < old.len() {
                pages.push(next);
                next += 1;
            }
        }
        let needed = (next - self.next_page) as usize;
        if needed > free {
            return Err(needed);
        }
        self.models[model].naive = naive;
        self.next_page = next;
        Ok(copies)
    }

    /// Writes keys and values of the last tokens of requests, in all layers.
    fn write(&mut self, model: usize, table: &PageIndices, append: &AppendIndices, tokens: &[&[u32]]) {
        let shape = self.cache.shapes()[model];
        let contexts: Vec<_> = tokens.iter().map(|tokens| contexts(tokens)).collect();
        let new = || append.batch_indices().iter().zip(append.positions());
        for layer in 0..shape.num_layers() {
            let [k, v] = [false, true].map(|value| -> Vec<f32> {
                let width = width(shape, value);
                let rows = new().flat_map(|(&request, &position)| {
                    let context = contexts[request as usize][position as usize];
                    (0..width).map(move |at| element(context, layer, value, at))
                });
                rows.collect()
            });
            match shape {
                KvShape::Heads(shape) => {
                    let size = [append.len(), shape.num_kv_heads, shape.head_dim];
                    let [k, v] = [&k, &v].map(|rows| TensorRef::from_slice(rows, &size).unwrap());
                    let kv = &mut self.cache.layer_mut(KvLayer::of_model(model, layer)).unwrap();
                    reference::append_paged_kv_cache(&k, &v, &SlotMapping::new(append, table), kv).unwrap();
                }
                KvShape::Latent(_) => {
                    let ckv = TensorRef::from_slice(&k, &[append.len(), 512]).unwrap();
                    let kpe = TensorRef::from_slice(&v, &[append.len(), 64]).unwrap();
                    let rows = &mut self.cache.latent_mut(KvLayer::of_model(model, layer)).unwrap();
                    let parts = [&mut rows.ckv, &mut rows.kpe];
                    reference::append_paged_mla_kv_cache(&ckv, &kpe, &SlotMapping::new(append, table), parts)
                        .unwrap();
                }
            }
        }
    }

    fn run(&mut self, model: usize, op: Op) {
        let request_of = |request: usize, model: &Model| request % model.batch.len();
        let this = &mut self.models[model];
        let (len, page_size) = (this.batch.len(), self.pool.page_size());
        let leaves_tokens = matches!(op, Op::Append(..) | Op::Insert(..) | Op::Evict(_));
        match op {
            Op::Push if len < MAX_BATCH => {
                this.batch.push(Sequence::new(&self.pool)).unwrap();
                this.naive.push(Naive::default());
            }
            Op::Lookup(request, more) if len < MAX_BATCH => {
                self.time += 1;
                let mut tokens = match len {
                    0 => vec![],
                    _ => this.naive[request_of(request, this)].tokens.clone(),
                };
                tokens.extend(more);
                let found = this.prefixes.lookup(&tokens);
                let mut naive = Naive::default();
                for page in 1..=tokens.len() / page_size {
                    let prefix = &tokens[..page * page_size];
                    let Some(cached) = this.naive_prefixes.get_mut(prefix) else { break };
                    cached.last_used = self.time;
                    naive.pages.push(cached.number);
                    naive.tokens = prefix.to_vec();
                }
                assert_eq!(found.len(), naive.tokens.len());
                let hit = u64::from(!naive.tokens.is_empty());
                let counts = [1, hit, tokens.len() as u64, naive.tokens.len() as u64];
                this.naive_stats.iter_mut().zip(counts).for_each(|(stat, count)| *stat += count);
                this.batch.push(found).unwrap();
                this.naive.push(naive);
            }
            Op::Fork(request) if (1..MAX_BATCH).contains(&len) => {
                let request = request_of(request, this);
                let free = self.pool.free_pages();
                this.batch.push(this.batch.sequences()[request].fork()).unwrap();
                this.naive.push(this.naive[request].clone());
                assert_eq!(self.pool.free_pages(), free);
            }
            Op::Append(counts, seed) => {
                let counts: Vec<usize> = counts.into_iter().cycle().take(len).collect();
                let token =
                    |request: usize, at: usize| (mix(seed ^ mix((request * 100 + at) as u64)) & 1) as u32;
                let new: Vec<(usize, Vec<u32>)> = counts
                    .iter()
                    .enumerate()
                    .map(|(request, &count)| (request, (0..count).map(|at| token(request, at)).collect()))
                    .collect();
                let (expected, free) = (self.naive_append(model, &new), self.pool.free_pages());
                let this = &mut self.models[model];
                match (this.batch.append(counts.iter().copied()), expected) {
                    (Ok(()), Ok(copies)) => {
                        assert_eq!(self.pool.pending_copies(), copies);
                        this.new_tokens = counts;
                        let (table, append) =
                            (this.batch.pages().clone(), this.batch.append_indices().clone());
                        let naive = this.naive.clone();
                        let tokens: Vec<&[u32]> = naive.iter().map(|naive| &naive.tokens[..]).collect();
                        self.write(model, &table, &append, &tokens);
                    }
                    (Err(FlashInferError::OutOfPages { needed, free: found }), Err(expected)) => {
                        assert_eq!((needed, found), (expected, free));
                    }
                    other => panic!("{other:?}"),
                }
            }
            Op::Alone(request, count, seed) if len > 0 => {
                let request = request_of(request, this);
                let mut sequence = this.batch.remove(request).unwrap();
                let naive = this.naive.remove(request);
                this.naive.push(naive);
                let new: Vec<u32> = (0..count).map(|at| (mix(seed ^ at as u64) & 1) as u32).collect();
                let needed = sequence.pages_needed(count);
                match (sequence.append(count), self.naive_append(model, &[(len - 1, new)])) {
                    (Ok(()), Ok(copies)) => {
                        assert_eq!(self.pool.pending_copies(), copies);
                        let table = PageIndices::from_requests(
                            self.pool.num_pages(),
                            page_size,
                            [(sequence.pages(), sequence.len())],
                        );
                        let table = table.unwrap();
                        let append = AppendIndices::last_tokens(&table, &[0, count as i32]).unwrap();
                        let tokens = self.models[model].naive[len - 1].tokens.clone();
                        self.write(model, &table, &append, &[&tokens]);
                    }
                    (Err(FlashInferError::OutOfPages { needed: found, .. }), Err(expected)) => {
                        assert_eq!((found, needed), (expected, expected));
                    }
                    other => panic!("{other:?}"),
                }
                self.models[model].batch.push(sequence).unwrap();
            }
            Op::Truncate(request, to) if len > 0 => {
                let request = request_of(request, this);
                this.batch.truncate(request, to).unwrap();
                let naive = &mut this.naive[request];
                naive.tokens.truncate(to);
                naive.pages.truncate(naive.tokens.len().div_ceil(page_size));
            }
            Op::Remove(request) if len > 0 => {
                let request = request_of(request, this);
                drop(this.batch.remove(request).unwrap());
                this.naive.remove(request);
            }
            Op::Insert(request, less) if len > 0 => {
                self.time += 1;
                let request = request_of(request, this);
                let naive = &this.naive[request];
                let tokens = &naive.tokens[..naive.tokens.len().saturating_sub(less)];
                let sequence = &this.batch.sequences()[request];
                let inserted = this.prefixes.insert(tokens, sequence).unwrap();
                let before = this.naive_prefixes.len();
                for page in 1..=tokens.len() / page_size {
                    let entry = this.naive_prefixes.entry(tokens[..page * page_size].to_vec());
                    let (number, page) = (naive.pages[page - 1], sequence.pages()[page - 1]);
                    entry.or_insert(CachedPage { number, last_used: 0, page }).last_used = self.time;
                }
                assert_eq!(inserted, this.naive_prefixes.len() - before);
                this.naive_stats[4] += inserted as u64;
            }
            Op::Evict(pages) => {
                let free = self.pool.free_pages();
                let evicted = this.prefixes.evict(pages);
                assert_eq!(self.pool.free_pages(), free + evicted);
                let mut expected = 0;
                while expected < pages && self.naive_evict(model) {
                    expected += 1;
                }
                assert_eq!(evicted, expected);
                self.models[model].naive_stats[5] += evicted as u64;
            }
            // The batch is full, or there is no request. Nothing changes.
            _ => return,
        }
        if !leaves_tokens {
            let this = &mut self.models[model];
            this.new_tokens = vec![0; this.batch.len()];
        }
    }

    /// Evicts the prefix that is unused for longest, is no other's beginning,
    /// and whose page no sequence has.
    fn naive_evict(&mut self, model: usize) -> bool {
        let (owners, page_size) = (self.naive_owners(), self.pool.page_size());
        let prefixes = &mut self.models[model].naive_prefixes;
        let is_leaf = |prefix: &[u32]| {
            !prefixes.keys().any(|other| other.len() == prefix.len() + page_size && other.starts_with(prefix))
        };
        let mut unused: Vec<_> = prefixes.iter().collect();
        unused.retain(|(prefix, cached)| is_leaf(prefix) && owners[&cached.number] == 1);
        let oldest = unused.into_iter().min_by_key(|(_, cached)| cached.last_used);
        let Some(oldest) = oldest.map(|(prefix, _)| prefix.clone()) else { return false };
        prefixes.remove(&oldest).is_some()
    }

    /// All that can be compared.
    fn check(&self) {
        // Which page of the pool a page of the model is, both ways.
        let (mut real, mut back) = (HashMap::new(), HashMap::new());
        let mut same = |number: u64, page: i32| {
            assert_eq!(*real.entry(number).or_insert(page), page, "one page, two numbers");
            assert_eq!(*back.entry(page).or_insert(number), number, "two pages, one number");
        };
        for model in &self.models {
            assert_eq!(model.batch.len(), model.naive.len());
            for (sequence, naive) in model.batch.sequences().iter().zip(&model.naive) {
                assert_eq!(sequence.len(), naive.tokens.len());
                assert_eq!(sequence.pages().len(), naive.pages.len());
                naive.pages.iter().zip(sequence.pages()).for_each(|(&number, &page)| same(number, page));
            }
            model.naive_prefixes.values().for_each(|cached| same(cached.number, cached.page));
        }
        let owners = self.naive_owners();
        for page in 0..self.pool.num_pages() as i32 {
            let expected = back.get(&page).map_or(0, |number| owners[number]);
            assert_eq!(self.pool.owners(page), expected, "page {page}");
        }
        assert_eq!(self.pool.used_pages(), owners.len());
        assert_eq!(self.pool.free_pages(), self.pool.num_pages() - owners.len());
        assert_eq!(self.pool.pending_copies(), 0);
        for (index, model) in self.models.iter().enumerate() {
            self.check_contents(index, model);
            check_arrays(&self.pool, model);
            let stats = model.prefixes.stats();
            let counted =
                [stats.lookups, stats.hits, stats.tokens, stats.tokens_saved, stats.inserted, stats.evicted];
            assert_eq!(counted, model.naive_stats);
            assert_eq!(model.prefixes.num_pages(), model.naive_prefixes.len());
        }
    }

    /// Each sequence reads what its tokens alone decide.
    fn check_contents(&self, index: usize, model: &Model) {
        let (shape, page_size) = (self.cache.shapes()[index], self.pool.page_size());
        for layer in 0..shape.num_layers() {
            let views = match shape {
                KvShape::Heads(_) => {
                    let kv = self.cache.layer(KvLayer::of_model(index, layer)).unwrap();
                    [(kv.k, false), (kv.v, true)]
                }
                KvShape::Latent(_) => {
                    let rows = self.cache.latent(KvLayer::of_model(index, layer)).unwrap();
                    [(rows.ckv, false), (rows.kpe, true)]
                }
            };
            for (view, value) in views {
                let (page_step, token_step, head_step, head_dim) = match (shape, view.strides()) {
                    (KvShape::Heads(shape), &[page, rows, inner, 1]) => match shape.layout {
                        KvLayout::Nhd => (page, rows, inner, shape.head_dim),
                        KvLayout::Hnd => (page, inner, rows, shape.head_dim),
                    },
                    (KvShape::Latent(_), &[page, row, 1]) => (page, row, 0, 512),
                    _ => panic!("rows"),
                };
                for (sequence, naive) in model.batch.sequences().iter().zip(&model.naive) {
                    for (position, context) in contexts(&naive.tokens).into_iter().enumerate() {
                        let page = i64::from(sequence.pages()[position / page_size]);
                        assert!(page < view.shape()[0]);
                        let start = page * page_step + (position % page_size) as i64 * token_step;
                        for at in 0..width(shape, value) {
                            let (head, feature) = (at / head_dim, at % head_dim);
                            let offset = start as usize + head * head_step as usize + feature;
                            // SAFETY: page, slot, head and feature are inside
                            // the shape of a view of host memory.
                            let found = unsafe { view.data_ptr().cast::<f32>().add(offset).read() };
                            assert_eq!(found, element(context, layer, value, at));
                        }
                    }
                }
            }
        }
    }
}

/// The index arrays are those made from scratch.
fn check_arrays(pool: &PageAllocator, model: &Model) {
    let requests = model.batch.sequences().iter().map(|sequence| (sequence.pages(), sequence.len()));
    let pages = PageIndices::from_requests(pool.num_pages(), pool.page_size(), requests).unwrap();
    assert_same_pages(model.batch.pages(), &pages);
    let queries = RaggedIndices::from_lens(model.new_tokens.iter().copied()).unwrap();
    assert_eq!(model.batch.queries().indptr(), queries.indptr());
    let append = AppendIndices::last_tokens(&pages, queries.indptr()).unwrap();
    let found = model.batch.append_indices();
    assert_eq!(found.batch_indices(), append.batch_indices());
    assert_eq!(found.positions(), append.positions());
    let checked = AppendIndices::new(&pages, found.batch_indices().to_vec(), found.positions().to_vec());
    assert_eq!(found.num_positions(), checked.unwrap().num_positions());
    let rows = found.batch_indices().iter().zip(found.positions()).map(|(&request, &position)| {
        let (pages, len) = (pages.pages(request as usize), position as usize + 1);
        (&pages[..len.div_ceil(pool.page_size())], len)
    });
    let rows = PageIndices::from_requests(pool.num_pages(), pool.page_size(), rows).unwrap();
    assert_same_pages(&model.batch.pages_by_row().unwrap(), &rows);
}

fn assert_same_pages(found: &PageIndices, pages: &PageIndices) {
    assert_eq!(found.indptr(), pages.indptr());
    assert_eq!(found.indices(), pages.indices());
    assert_eq!(found.last_page_len(), pages.last_page_len());
    assert_eq!((found.num_pages(), found.page_size()), (pages.num_pages(), pages.page_size()));
}

const SHAPE: HeadsShape =
    HeadsShape { num_layers: 2, num_kv_heads: 2, head_dim: 1, dtype: DType::F32, layout: KvLayout::Hnd };

/// What each part of a layer has for a token.
fn width(shape: KvShape, value: bool) -> usize {
    match shape {
        KvShape::Heads(shape) => shape.num_kv_heads * shape.head_dim,
        KvShape::Latent(_) => [512, 64][usize::from(value)],
    }
}

/// Two models: pages of different shapes, or of layers of one size.
fn shapes(differ: bool) -> [KvShape; 2] {
    let other = if differ {
        HeadsShape { num_layers: 1, num_kv_heads: 1, head_dim: 3, layout: KvLayout::Nhd, ..SHAPE }
    } else {
        HeadsShape { num_layers: 3, layout: KvLayout::Nhd, ..SHAPE }
    };
    [SHAPE.into(), other.into()]
}

fn run_schedule(num_pages: usize, page_size: usize, differ: bool, schedule: Vec<(usize, Op)>) {
    run_schedule_of(num_pages, page_size, &shapes(differ), schedule);
}

fn run_schedule_of(num_pages: usize, page_size: usize, shapes: &[KvShape], schedule: Vec<(usize, Op)>) {
    let mut world = World::new(num_pages, page_size, shapes);
    for (model, op) in schedule {
        world.run(model, op);
        world.check();
    }
    // Whatever is left goes back, once.
    let World { pool, models, .. } = world;
    drop(models);
    assert_eq!((pool.free_pages(), pool.pending_copies()), (num_pages, 0));
    assert!((0..num_pages as i32).all(|page| pool.owners(page) == 0));
    let all = Sequence::new(&pool);
    assert_eq!(all.pages_needed(num_pages * page_size), num_pages);
}

fn schedule(len: std::ops::Range<usize>) -> impl Strategy<Value = Vec<(usize, Op)>> {
    prop::collection::vec((0..2usize, op()), len)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn short_schedules(
        num_pages in 1..24usize, page_size in 1..5usize, differ: bool, schedule in schedule(1..60),
    ) {
        run_schedule(num_pages, page_size, differ, schedule);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn long_schedules(
        num_pages in 8..40usize, page_size in 1..5usize, differ: bool, schedule in schedule(900..1000),
    ) {
        run_schedule(num_pages, page_size, differ, schedule);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Rows of latent attention, alone and beside heads.
    #[test]
    fn latent_schedules(
        num_pages in 1..16usize, page_size in 1..5usize, beside: bool, schedule in schedule(1..40),
    ) {
        let latent = KvShape::Latent(LatentShape { num_layers: 2, dtype: DType::F32 });
        let other = if beside { SHAPE.into() } else { latent };
        run_schedule_of(num_pages, page_size, &[latent, other], schedule);
    }
}

/// An engine may keep all of it in another thread.
const _: fn() = || {
    fn moves_between_threads<T: Send + Sync>() {}
    moves_between_threads::<(PageAllocator, Sequence, PrefixCache, Batch, BatchTables, PagedKvCache)>();
};

/// Sequences of one pool in several threads, which fork each other's.
#[test]
fn threads() {
    let pool = PageAllocator::new(64, 4).unwrap();
    let mut base = Sequence::new(&pool);
    base.append(10).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (base, pool) = (&base, &pool);
            scope.spawn(move || {
                let mut own = vec![base.fork()];
                for step in 0..3000u64 {
                    let random = mix(thread << 32 | step);
                    let at = (random >> 8) as usize % own.len();
                    let amount = (random >> 16) as usize % 12;
                    match random % 5 {
                        0 if own.len() < 6 => own.push(own[at].fork()),
                        1 if own.len() > 1 => drop(own.swap_remove(at)),
                        2 => own[at].truncate(amount),
                        3 if own.len() < 6 => own.push(base.fork()),
                        _ => {
                            let before = (own[at].pages().to_vec(), own[at].len());
                            match own[at].append(amount) {
                                Ok(()) => assert_eq!(own[at].len(), before.1 + amount),
                                Err(FlashInferError::OutOfPages { needed, free }) => {
                                    assert!(needed > free);
                                    assert_eq!((own[at].pages(), own[at].len()), (&before.0[..], before.1));
                                }
                                Err(error) => panic!("{error}"),
                            }
                        }
                    }
                    let pages = own[at % own.len()].pages();
                    assert!(pages.iter().all(|&page| pool.owners(page) > 0));
                }
            });
        }
    });
    // Copies that were due went with the sequences that they were for.
    assert_eq!((pool.used_pages(), pool.pending_copies()), (3, 0));
    assert!(base.pages().iter().all(|&page| pool.owners(page) == 1));
    drop(base);
    assert_eq!(pool.free_pages(), 64);
}

/// A page whose copies are due stays until they are made, also if nobody else
/// has it any more; a copy for nobody is not made.
#[test]
fn copies_that_are_due() {
    let pool = PageAllocator::new(4, 4).unwrap();
    let mut cache = PagedKvCache::on_host(&pool, &[SHAPE]).unwrap();
    let mut parent = Sequence::new(&pool);
    parent.append(2).unwrap();
    let mut child = parent.fork();
    assert_eq!(child.pages_needed(1), 1);
    child.append(1).unwrap();
    // The parent is the only one to see its page from now on.
    assert_eq!((parent.pages_needed(1), pool.owners(parent.pages()[0])), (0, 2));
    let page = parent.pages()[0];
    drop(parent);
    assert_eq!((pool.owners(page), pool.used_pages(), pool.pending_copies()), (1, 2, 1));
    // A grandchild's copy is of the child's page, which is a copy itself.
    let mut grandchild = child.fork();
    grandchild.append(1).unwrap();
    assert_eq!((pool.used_pages(), pool.pending_copies()), (3, 2));
    drop(child);
    assert_eq!((pool.used_pages(), pool.pending_copies()), (3, 2));
    let other = grandchild.fork();
    drop(grandchild);
    assert_eq!(pool.pending_copies(), 2);
    drop(other);
    assert_eq!((pool.used_pages(), pool.pending_copies()), (0, 0));
    cache.copy_pages().unwrap();
    // Reading makes no copies, writing does.
    let mut parent = Sequence::new(&pool);
    parent.append(1).unwrap();
    let mut child = parent.fork();
    child.append(1).unwrap();
    cache.layer(0).unwrap();
    assert_eq!((pool.pending_copies(), pool.owners(parent.pages()[0])), (1, 2));
    cache.layer_mut(0).unwrap();
    assert_eq!((pool.pending_copies(), pool.owners(parent.pages()[0])), (0, 1));
}

/// Memory that is not a `PagedKvCache` is told of the same copies, in their order.
#[test]
fn copies_in_memory_of_ones_own() {
    let pool = PageAllocator::new(4, 4).unwrap();
    let mut parent = Sequence::new(&pool);
    parent.append(2).unwrap();
    let mut child = parent.fork();
    child.append(1).unwrap();
    let mut grandchild = child.fork();
    grandchild.append(1).unwrap();
    let mut copies = Vec::new();
    pool.copy_pages(|from, to| copies.push([from as i32, to as i32])).unwrap();
    let [parent, child, grandchild] = [&parent, &child, &grandchild].map(|sequence| sequence.pages()[0]);
    assert_eq!(copies, [[parent, child], [child, grandchild]]);
    assert_eq!((pool.pending_copies(), pool.owners(parent), pool.owners(child)), (0, 1, 1));
    pool.copy_pages(|_, _| unreachable!()).unwrap();
    // A cache of the pool makes them itself.
    let _cache = PagedKvCache::on_host(&pool, &[SHAPE]).unwrap();
    let error = pool.copy_pages(|_, _| unreachable!()).unwrap_err().to_string();
    assert!(error.contains("PagedKvCache"), "{error}");
}

/// A copy of a copy, both due at once, has what the first page had.
#[test]
fn copies_are_made_in_order() {
    let mut world = World::new(8, 4, &[SHAPE.into()]);
    world.run(0, Op::Push);
    world.run(0, Op::Append(vec![2], 1));
    for (request, new_tokens) in [(1, vec![0, 1]), (2, vec![0, 0, 1])] {
        world.run(0, Op::Fork(request - 1));
        // A draft that is given up before anything is written.
        let batch = &mut world.models[0].batch;
        batch.append(new_tokens).unwrap();
        batch.truncate(request, 2).unwrap();
        assert_eq!(world.pool.pending_copies(), request);
    }
    world.cache.copy_pages().unwrap();
    assert_eq!((world.pool.pending_copies(), world.pool.used_pages()), (0, 3));
    world.check_contents(0, &world.models[0]);
}

/// Two requests that share their last page with nobody else need one copy, not
/// two; with somebody else they need two.
#[test]
fn a_batch_copies_no_more_than_it_must() {
    for (others, needed) in [(false, 1), (true, 2)] {
        let pool = PageAllocator::new(1 + needed, 8).unwrap();
        let mut first = Sequence::new(&pool);
        first.append(3).unwrap();
        let kept = others.then(|| first.fork());
        let mut batch = Batch::new(&pool);
        batch.push(first.fork()).unwrap();
        batch.push(first).unwrap();
        batch.append([1, 1]).unwrap();
        assert_eq!((pool.free_pages(), pool.pending_copies()), (0, needed));
        let [a, b] = [0, 1].map(|request| batch.sequences()[request].pages()[0]);
        assert!(a != b && kept.iter().all(|kept| !batch.pages().indices().contains(&kept.pages()[0])));
    }
}

/// Decode of each new token over its own pages is causal attention of all.
#[test]
fn decode_by_row_is_causal_prefill() {
    let pool = PageAllocator::new(16, 4).unwrap();
    let shape = HeadsShape { num_kv_heads: 2, head_dim: 64, ..SHAPE };
    let mut cache = PagedKvCache::on_host(&pool, &[shape]).unwrap();
    let mut batch = Batch::new(&pool);
    (0..3).for_each(|_| batch.push(Sequence::new(&pool)).unwrap());
    let mut seed = 0;
    let mut numbers = |count: usize| -> Vec<f32> {
        seed += 1;
        (0..count as u64).map(|at| (mix(mix(seed) ^ at) >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
    };
    for new in [[9, 4, 0], [3, 1, 5]] {
        batch.append(new).unwrap();
        let (tokens, by_row) = (new.iter().sum(), batch.pages_by_row().unwrap());
        let one_each: Vec<_> = (0..=tokens as i32).collect();
        // They are written by rows, too.
        let append = AppendIndices::last_tokens(&by_row, &one_each).unwrap();
        let [k, v] = [(); 2].map(|()| numbers(tokens * 2 * 64));
        let [k, v] = [&k, &v].map(|rows| TensorRef::from_slice(rows, &[tokens, 2, 64]).unwrap());
        let kv = &mut cache.layer_mut(0).unwrap();
        reference::append_paged_kv_cache(&k, &v, &SlotMapping::new(&append, &by_row), kv).unwrap();

        let (spec, options, size) =
            (AttentionSpec::new(DType::F16, 64), RunOptions::default(), [tokens, 4, 64]);
        let q = numbers(tokens * 4 * 64);
        let q = TensorRef::from_slice(&q, &size).unwrap();
        let [mut rows, mut causal] = [(); 2].map(|()| vec![f64::NAN; tokens * 4 * 64]);
        let out = &mut TensorMut::from_slice(&mut rows, &size).unwrap();
        reference::batch_decode(&spec, &q, &kv.as_ref(), &by_row, out, None, &options).unwrap();
        let out = &mut TensorMut::from_slice(&mut causal, &size).unwrap();
        let (queries, pages) = (batch.queries(), batch.pages());
        let mask = reference::HostMask::Causal;
        reference::batch_prefill_paged(&spec, &q, &kv.as_ref(), queries, pages, out, None, mask, &options)
            .unwrap();
        assert!(causal.iter().all(|number| number.is_finite()));
        assert_eq!(rows, causal);
    }
}

#[track_caller]
fn refused<R: std::fmt::Debug>(result: Result<R>, expected: &str) {
    match result {
        Err(FlashInferError::InvalidArgument { argument, .. }) if argument == expected => {}
        other => panic!("expected `{expected}` to be refused, got {other:?}"),
    }
}

#[test]
fn wrong_input() {
    refused(PageAllocator::new(4, 0), "page_size");
    refused(PageAllocator::new(4, 1 << 31), "page_size");
    refused(PageAllocator::new(1 << 31, 1), "num_pages");
    let (pool, other) = (PageAllocator::new(4, 4).unwrap(), PageAllocator::new(4, 4).unwrap());
    assert_eq!([-1, 4, i32::MAX].map(|page| pool.owners(page)), [0; 3]);
    let mut batch = Batch::new(&pool);
    refused(batch.push(Sequence::new(&other)), "sequence");
    refused(batch.remove(0), "request");
    refused(batch.truncate(0, 0), "request");
    refused(batch.append([1]), "new_tokens");
    batch.append([]).unwrap();
    batch.push(Sequence::new(&pool)).unwrap();
    refused(batch.append([]), "new_tokens");
    refused(batch.append([1 << 31]), "indices");
    refused(batch.append([usize::MAX]), "indptr");
    assert_eq!((batch.sequences()[0].len(), pool.free_pages()), (0, 4));
    batch.append([5]).unwrap();
    let out_of_pages = |result: Result<()>| match result {
        Err(FlashInferError::OutOfPages { needed, free }) => (needed, free),
        other => panic!("{other:?}"),
    };
    assert_eq!(out_of_pages(batch.append([12])), (3, 2));
    let mut sequence = batch.remove(0).unwrap();
    assert_eq!(out_of_pages(sequence.append(usize::MAX)).1, 2);
    sequence.truncate(usize::MAX);
    assert_eq!((sequence.len(), sequence.pages().len()), (5, 2));
    let mut prefixes = PrefixCache::new(&pool);
    refused(prefixes.insert(&[0; 6], &sequence), "tokens");
    refused(prefixes.insert(&[], &Sequence::new(&other)), "sequence");
    assert_eq!((prefixes.insert(&[0; 5], &sequence).unwrap(), prefixes.evict(9)), (1, 0));
    // Requests that share pages may count more tokens than the pool has.
    let pool = PageAllocator::new(1, 1 << 30).unwrap();
    let mut batch = Batch::new(&pool);
    let mut sequence = Sequence::new(&pool);
    sequence.append(1 << 30).unwrap();
    batch.push(sequence.fork()).unwrap();
    refused(batch.push(sequence), "indices");
    assert_eq!((batch.len(), pool.owners(0)), (1, 1));
}

/// All of a cached prompt is found; what its last token needs is computed
/// again, in a page of its own.
#[test]
fn a_prompt_that_is_cached_as_a_whole() {
    let pool = PageAllocator::new(4, 2).unwrap();
    let mut prefixes = PrefixCache::new(&pool);
    let mut first = Sequence::new(&pool);
    first.append(4).unwrap();
    prefixes.insert(&[7, 8, 9, 7], &first).unwrap();
    drop(first);
    let mut again = prefixes.lookup(&[7, 8, 9, 7]);
    let cached = again.pages().to_vec();
    again.truncate(3);
    again.append(1).unwrap();
    assert_eq!(again.pages()[0], cached[0]);
    assert_ne!(again.pages()[1], cached[1]);
    assert_eq!((pool.owners(cached[0]), pool.owners(cached[1]), pool.pending_copies()), (2, 2, 1));
    let stats = prefixes.stats();
    assert_eq!((stats.lookups, stats.hits, stats.tokens, stats.tokens_saved), (1, 1, 4, 4));
    // The page of the other end of the copy is in use until the copy is made.
    assert_eq!(prefixes.evict(2), 0);
    PagedKvCache::on_host(&pool, &[SHAPE]).unwrap().copy_pages().unwrap();
    assert_eq!((prefixes.evict(2), prefixes.num_pages()), (1, 1));
}
