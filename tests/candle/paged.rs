//! Paged attention for candle's tensors against plain softmax attention: on the
//! CPU always, on a GPU with `FLASHINFER_RS_RUN_GPU_TESTS=1`.
use crate::candle_common::{
    Plain, Rng, assert_close, assert_lse, devices, dtypes, gpus, laid_out, on_host, random, refused,
};
use candle_core::{DType, Device, Tensor};
use flashinfer_rs::{
    attention::{AttentionSpec, Heads},
    candle::{PagedCache, PagedDecode, PagedPrefill, PagedRunOptions, StepTables},
    kv::{Batch, HeadsShape, KvLayout, LatentShape, PageAllocator, PrefixCache, Sequence},
};

mod options;

/// What a test model is.
#[derive(Clone, Copy, Debug)]
struct Case {
    dtype: DType,
    head_dim: usize,
    page_size: usize,
    heads: Heads,
    layout: KvLayout,
    window_left: Option<u32>,
    soft_cap: Option<f32>,
}

impl Case {
    const fn new(dtype: DType, head_dim: usize, page_size: usize, heads: [usize; 2]) -> Self {
        let heads = Heads::new(heads[0], heads[1]);
        Self { dtype, head_dim, page_size, heads, layout: KvLayout::Nhd, window_left: None, soft_cap: None }
    }

    fn shape(&self) -> HeadsShape {
        HeadsShape {
            num_layers: LAYERS,
            num_kv_heads: self.heads.num_kv_heads,
            head_dim: self.head_dim,
            dtype: self.dtype.try_into().unwrap(),
            layout: self.layout,
        }
    }

    fn spec(&self) -> AttentionSpec {
        let mut spec = AttentionSpec::new(self.dtype.try_into().unwrap(), self.head_dim);
        (spec.window_left, spec.logits_soft_cap) = (self.window_left, self.soft_cap);
        spec
    }

    fn plain(&self, causal: bool) -> Plain {
        Plain { causal, window_left: self.window_left, soft_cap: self.soft_cap, scale: None }
    }
}

const LAYERS: usize = 2;
const PAGES: usize = 1024;

/// Keys and values of a sequence in each layer, on the host.
type Tokens = Vec<[Tensor; 2]>;

/// A paged cache with all that computes on it, and what it should hold.
struct Rig {
    case: Case,
    device: Device,
    pool: PageAllocator,
    cache: PagedCache,
    tables: StepTables,
    prefill: PagedPrefill,
    decode: PagedDecode,
    batch: Batch,
    expected: Vec<Tokens>,
    /// A number for each token, the same only where keys and values are.
    ids: Vec<Vec<u32>>,
    next_id: u32,
}

impl Rig {
    fn new(device: &Device, case: Case) -> Self {
        let pool = PageAllocator::new(PAGES, case.page_size).unwrap();
        Self {
            case,
            device: device.clone(),
            cache: PagedCache::new(device, &pool, case.shape()).unwrap(),
            tables: StepTables::new(device),
            prefill: PagedPrefill::new(device, &case.spec(), case.heads).unwrap(),
            decode: PagedDecode::new(device, &case.spec(), case.heads).unwrap(),
            batch: Batch::new(&pool),
            pool,
            expected: Vec::new(),
            ids: Vec::new(),
            next_id: 0,
        }
    }

    fn no_tokens(&self) -> Tokens {
        let shape = (0, self.case.heads.num_kv_heads, self.case.head_dim);
        let empty = Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        vec![[empty.clone(), empty]; LAYERS]
    }

    fn push(&mut self) {
        self.batch.push(Sequence::new(&self.pool)).unwrap();
        self.expected.push(self.no_tokens());
        self.ids.push(Vec::new());
    }

    fn fork(&mut self, request: usize) {
        self.batch.push(self.batch.sequences()[request].fork()).unwrap();
        self.expected.push(self.expected[request].clone());
        self.ids.push(self.ids[request].clone());
    }

    /// A sequence that begins as one that ended.
    fn begin_as(&mut self, ended: &(Vec<u32>, Tokens), prefixes: &mut PrefixCache) {
        let (ids, tokens) = ended;
        let sequence = prefixes.lookup(ids);
        let first = |tensor: &Tensor| tensor.narrow(0, 0, sequence.len()).unwrap();
        self.expected.push(tokens.iter().map(|[k, v]| [first(k), first(v)]).collect());
        self.ids.push(ids[..sequence.len()].to_vec());
        self.batch.push(sequence).unwrap();
    }

    fn truncate(&mut self, request: usize, len: usize) {
        self.batch.truncate(request, len).unwrap();
        for tensor in self.expected[request].iter_mut().flatten() {
            let len = len.min(tensor.dims()[0]);
            *tensor = tensor.narrow(0, 0, len).unwrap();
        }
        self.ids[request].truncate(len);
    }

    /// Ends a sequence, of which its prefix is kept.
    fn end(&mut self, request: usize, prefixes: &mut PrefixCache) -> (Vec<u32>, Tokens) {
        let (sequence, ids) = (self.batch.remove(request).unwrap(), self.ids.remove(request));
        prefixes.insert(&ids, &sequence).unwrap();
        (ids, self.expected.remove(request))
    }

    /// Appends so many random tokens to each request, and compares attention in
    /// each layer. Returns the results.
    fn step(&mut self, rng: &mut Rng, new: &[usize], causal: bool) -> Vec<Tensor> {
        for (ids, &new) in self.ids.iter_mut().zip(new) {
            ids.extend(self.next_id..self.next_id + new as u32);
            self.next_id += new as u32;
        }
        let Self { case, device, cache, tables, prefill, decode, batch, expected, .. } = self;
        let (heads, width, total) = (case.heads, case.head_dim, new.iter().sum::<usize>());
        batch.append(new.iter().copied()).unwrap();
        let step = tables.update(batch, cache).unwrap();
        // Steps of one token each are a decode, too.
        let decodes = new.iter().all(|&new| new == 1);
        let prefill = prefill.plan(&step, causal).unwrap();
        let decode = decodes.then(|| decode.plan(&step).unwrap());
        let mut results = Vec::new();
        (0..LAYERS).for_each(|layer| {
            let (q_heads, kv_heads) = (heads.num_qo_heads, heads.num_kv_heads);
            let joined = random(rng, &[total, q_heads + 2 * kv_heads, width], case.dtype, device);
            let part = |start, len| joined.narrow(1, start, len).unwrap();
            let mut rows = [part(0, q_heads), part(q_heads, kv_heads), part(q_heads + kv_heads, kv_heads)];
            if total > 0 && rng.below(2) == 0 {
                rows = rows.map(|rows| laid_out(rng, &rows.contiguous().unwrap()));
            }
            let [q, k, v] = rows;
            cache.append(&step, layer, &k, &v).unwrap();
            let mut got = vec![prefill.run(&q, cache, layer).unwrap()];
            got.extend(decode.as_ref().map(|plan| plan.run(&q, cache, layer).unwrap()));
            let options = PagedRunOptions::default();
            let mut with_lse = vec![prefill.run_with_lse(&q, cache, layer, &options).unwrap()];
            with_lse
                .extend(decode.as_ref().map(|plan| plan.run_with_lse(&q, cache, layer, &options).unwrap()));
            let [q, k, v] = [q, k, v].map(|rows| on_host(&rows));
            let mut start = 0;
            for (request, &len) in new.iter().enumerate().filter(|(_, len)| **len > 0) {
                let rows = |tensor: &Tensor| tensor.narrow(0, start, len).unwrap();
                for (all, new) in expected[request][layer].iter_mut().zip([&k, &v]) {
                    *all = Tensor::cat(&[&*all, &rows(new)], 0).unwrap();
                }
                let [all_k, all_v] = &expected[request][layer];
                let [plain, lse] = case.plain(causal).attention_and_lse(&rows(&q), all_k, all_v);
                for ((got, with_lse), what) in got.iter().zip(&with_lse).zip(["prefill", "decode"]) {
                    let what = format!("{what}, request {request}, layer {layer}, {case:?} on {device:?}");
                    assert_close(&rows(got), &plain, &what);
                    assert_close(&rows(&with_lse.0), &plain, &what);
                    assert_lse(&rows(&with_lse.1), &lse, &what);
                }
                start += len;
            }
            results.append(&mut got);
        });
        results
    }

    /// A step with one token for each request.
    fn decode(&mut self, rng: &mut Rng) -> Vec<Tensor> {
        self.step(rng, &vec![1; self.batch.len()], true)
    }
}

/// Cases for a device, of all its dtypes.
fn cases(device: &Device) -> Vec<Case> {
    let sizes = [(64, 5, [4, 2]), (128, 16, [3, 1]), (64, 1, [2, 2]), (128, 5, [8, 1])];
    let sizes = if device.is_cpu() { &sizes[..3] } else { &sizes[..] };
    let of = |&dtype: &DType| {
        sizes.iter().enumerate().map(move |(at, &(head_dim, page_size, heads))| Case {
            layout: if at == 1 { KvLayout::Hnd } else { KvLayout::Nhd },
            ..Case::new(dtype, head_dim, page_size, heads)
        })
    };
    dtypes(device).iter().flat_map(of).collect()
}

/// Chunks of prompts of different lengths, then single tokens.
#[test]
fn chunks_then_decode_are_full_attention() {
    let mut rng = Rng::new();
    for device in devices() {
        for case in cases(&device) {
            let mut rig = Rig::new(&device, case);
            (0..3).for_each(|_| rig.push());
            rig.step(&mut rng, &[7, 0, 18], true);
            rig.step(&mut rng, &[1, 5, 0], true);
            rig.step(&mut rng, &[3, 2, 9], false);
            rig.decode(&mut rng);
            rig.decode(&mut rng);
        }
    }
}

/// Any sequence of what batches can do.
#[test]
fn random_batches() {
    let mut rng = Rng::new();
    for device in devices() {
        for case in cases(&device) {
            let mut rig = Rig::new(&device, case);
            rig.push();
            let mut prefixes = PrefixCache::new(&rig.pool);
            let mut ended = Vec::new();
            for _ in 0..25 {
                let (requests, request) = (rig.batch.len(), rng.below(rig.batch.len()));
                match rng.below(9) {
                    0 if requests < 5 => rig.push(),
                    1 if requests < 5 => rig.fork(request),
                    2 if requests < 5 && !ended.is_empty() => {
                        rig.begin_as(&ended[rng.below(ended.len())], &mut prefixes);
                    }
                    3 => {
                        let len = rig.batch.sequences()[request].len();
                        rig.truncate(request, rng.below(len + 1));
                    }
                    4 if requests > 1 => ended.push(rig.end(request, &mut prefixes)),
                    5 => drop(prefixes.evict(rng.below(4))),
                    6 | 7 => drop(rig.decode(&mut rng)),
                    _ => {
                        let new: Vec<_> = (0..requests).map(|_| rng.below(8)).collect();
                        let causal = rng.below(3) > 0;
                        rig.step(&mut rng, &new, causal);
                    }
                }
            }
            rig.decode(&mut rng);
            // Steps after each other copy pages at most once.
            assert_eq!(rig.pool.pending_copies(), 0);
        }
    }
}

#[test]
fn windows_and_soft_caps() {
    let mut rng = Rng::new();
    for device in devices() {
        for &dtype in dtypes(&device) {
            for (window_left, soft_cap) in [(Some(4), None), (None, Some(1.5)), (Some(9), Some(8.0))] {
                let head_dim = match (device.is_cpu(), dtype, window_left.is_some() && soft_cap.is_some()) {
                    (true, ..) => 64,
                    // Modules that wheels have at least.
                    (false, DType::BF16, both) => {
                        if both {
                            256
                        } else {
                            128
                        }
                    }
                    (false, ..) => continue,
                };
                let case = Case { window_left, soft_cap, ..Case::new(dtype, head_dim, 5, [4, 2]) };
                let mut rig = Rig::new(&device, case);
                (0..2).for_each(|_| rig.push());
                rig.step(&mut rng, &[13, 3], true);
                rig.step(&mut rng, &[2, 21], true);
                rig.decode(&mut rng);
            }
        }
    }
}

/// Two sequences with pages of one prefix get what two get that have their own.
#[test]
fn shared_prefixes_change_nothing() {
    let seed = Rng::new().bits();
    for device in devices() {
        for case in cases(&device) {
            const PROMPT: usize = 23;
            let run = |shared: bool| {
                // The same numbers for both, whoever computes the prefix.
                let mut rng = Rng::seeded(seed);
                let mut rig = Rig::new(&device, case);
                let mut prefixes = PrefixCache::new(&rig.pool);
                rig.push();
                rig.step(&mut rng, &[PROMPT], true);
                let prompt = rig.end(0, &mut prefixes);
                for _ in 0..2 {
                    rig.begin_as(&prompt, &mut prefixes);
                }
                let kept = PROMPT / case.page_size * case.page_size;
                let pages = |rig: &Rig, request: usize| rig.batch.sequences()[request].pages().to_vec();
                assert!(kept > 0 && pages(&rig, 0).len() == kept / case.page_size);
                assert_eq!((prefixes.stats().hits, pages(&rig, 0)), (2, pages(&rig, 1)));
                if !shared {
                    // The same tokens, in pages of each sequence's own.
                    let prefix: Tokens = rig.expected[0].clone();
                    (0..2).for_each(|request| rig.truncate(request, 0));
                    rig.batch.append([kept, kept]).unwrap();
                    assert_ne!(pages(&rig, 0), pages(&rig, 1));
                    let step = rig.tables.update(&rig.batch, &mut rig.cache).unwrap();
                    for (layer, rows) in prefix.iter().enumerate() {
                        let [k, v] = rows.each_ref().map(|rows| {
                            let twice = Tensor::cat(&[rows, rows], 0).unwrap();
                            twice.to_dtype(case.dtype).unwrap().to_device(&device).unwrap()
                        });
                        rig.cache.append(&step, layer, &k, &v).unwrap();
                    }
                    rig.expected = vec![prefix; 2];
                }
                let mut results = rig.step(&mut rng, &[3, 1], true);
                results.append(&mut rig.decode(&mut rng));
                results
            };
            for (shared, own) in run(true).iter().zip(&run(false)) {
                assert_close(shared, &on_host(own), &format!("{case:?} on {device:?}"));
            }
        }
    }
}

/// A copy of a page comes before the append that needs it, and only once.
#[test]
fn pages_are_copied_on_write() {
    let mut rng = Rng::new();
    for device in devices() {
        for case in cases(&device) {
            let mut rig = Rig::new(&device, case);
            rig.push();
            rig.step(&mut rng, &[case.page_size + case.page_size / 2], true);
            (0..3).for_each(|_| rig.fork(0));
            let before = rig.pool.used_pages();
            rig.decode(&mut rng);
            let copies = if case.page_size > 1 { 3 } else { 0 };
            let further = if case.page_size > 1 { 0 } else { 4 };
            assert_eq!(rig.pool.used_pages(), before + copies + further);
            // Drafts that were not accepted.
            rig.truncate(1, case.page_size);
            rig.step(&mut rng, &[2, 2, 2, 2], true);
            rig.decode(&mut rng);
        }
    }
}

/// Larger batches than tables have room for at first.
#[test]
fn tables_grow() {
    let mut rng = Rng::new();
    for device in devices() {
        let mut rig = Rig::new(&device, Case::new(dtypes(&device)[0], 64, 5, [2, 1]));
        rig.push();
        rig.step(&mut rng, &[3], true);
        (1..70).for_each(|_| rig.push());
        rig.step(&mut rng, &[16; 70], true);
        rig.decode(&mut rng);
        let mut prefixes = PrefixCache::new(&rig.pool);
        (0..67).for_each(|_| drop(rig.end(0, &mut prefixes)));
        rig.decode(&mut rng);
    }
}

#[test]
fn nothing_to_do() {
    for device in devices() {
        let case = Case::new(dtypes(&device)[0], 64, 16, [2, 1]);
        let mut rig = Rig::new(&device, case);
        let mut rng = Rng::new();
        assert!(rig.step(&mut rng, &[], true).iter().all(|result| result.dims() == [0, 2, 64]));
        rig.push();
        assert!(rig.step(&mut rng, &[0], true).iter().all(|result| result.dims() == [0, 2, 64]));
        // A decode of a request without tokens.
        let step = rig.tables.update(&rig.batch, &mut rig.cache).unwrap();
        let plan = rig.decode.plan(&step).unwrap();
        let q = random(&mut rng, &[1, 2, 64], case.dtype, &device);
        let got = plan.run(&q, &rig.cache, 0).unwrap();
        assert_eq!(on_host(&got).abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
        let (_, lse) = plan.run_with_lse(&q, &rig.cache, 0, &PagedRunOptions::default()).unwrap();
        assert_eq!(lse.to_vec2::<f32>().unwrap(), [[f32::NEG_INFINITY; 2]]);
        // Nor queries.
        let none = Rig::new(&device, case);
        let (mut tables, mut cache, mut decode) = (none.tables, none.cache, none.decode);
        let step = tables.update(&none.batch, &mut cache).unwrap();
        let q = q.narrow(0, 0, 0).unwrap();
        let plan = decode.plan(&step).unwrap();
        let (out, lse) = plan.run_with_lse(&q, &cache, 0, &PagedRunOptions::default()).unwrap();
        assert_eq!((out.dims(), lse.dims()), (&[0, 2, 64][..], &[0, 2][..]));
    }
}

#[test]
fn wrong_input_is_refused_and_nothing_written() {
    let mut rng = Rng::new();
    let options = PagedRunOptions::default();
    for device in devices() {
        let dtype = dtypes(&device)[0];
        let other_dtype = if dtype == DType::F16 { DType::BF16 } else { DType::F16 };
        let case = Case::new(dtype, 64, 16, [4, 2]);
        let mut rig = Rig::new(&device, case);
        rig.push();
        rig.batch.append([3]).unwrap();
        // Another pool, and what is made for it.
        let mut other = Rig::new(&device, case);
        refused(other.tables.update(&rig.batch, &mut other.cache), &["cache", "another pool"]);
        let mut batch = Batch::new(&other.pool);
        batch.push(Sequence::new(&other.pool)).unwrap();
        batch.append([3]).unwrap();
        rig.tables.update(&rig.batch, &mut rig.cache).unwrap();
        refused(rig.tables.update(&batch, &mut other.cache), &["batch", "another pool"]);
        let elsewhere = Device::Cpu;
        let mut on_cpu = StepTables::new(&elsewhere);
        if !device.is_cpu() {
            refused(on_cpu.update(&rig.batch, &mut rig.cache), &["cache", "one Device"]);
        }
        let step = rig.tables.update(&rig.batch, &mut rig.cache).unwrap();
        let mut rows = |shape: &[usize], dtype| random(&mut rng, shape, dtype, &device);
        let (q, k) = (rows(&[3, 4, 64], dtype), rows(&[3, 2, 64], dtype));
        let plan = rig.prefill.plan(&step, true).unwrap();
        refused(plan.run_with(&q, &other.cache, 0, &options), &["cache", "another pool"]);
        refused(plan.run_with(&q, &rig.cache, LAYERS, &options), &["layer", "2; the model has 2"]);
        refused(plan.run_with(&rows(&[3, 4, 64], other_dtype), &rig.cache, 0, &options), &["q", "dtype"]);
        for shape in [&[2, 4, 64][..], &[3, 2, 64], &[3, 4, 32], &[12, 64]] {
            refused(plan.run_with(&rows(shape, dtype), &rig.cache, 0, &options), &["q", "shape"]);
        }
        refused(other.cache.append(&step, 0, &k, &k), &["cache", "another pool"]);
        refused(rig.cache.append(&step, LAYERS, &k, &k), &["layer"]);
        refused(rig.cache.append(&step, 0, &rows(&[3, 2, 64], other_dtype), &k), &["k", "dtype"]);
        for shape in [&[2, 2, 64][..], &[3, 1, 64], &[3, 2, 32], &[6, 64]] {
            refused(rig.cache.append(&step, 0, &k, &rows(shape, dtype)), &["v", "shape"]);
        }
        if !device.is_cpu() {
            let on_cpu = k.to_device(&Device::Cpu).unwrap();
            refused(rig.cache.append(&step, 0, &on_cpu, &k), &["k", "Cpu", "expected Cuda"]);
            refused(
                plan.run_with(&q.to_device(&Device::Cpu).unwrap(), &rig.cache, 0, &options),
                &["q", "Cpu"],
            );
        }
        // A view of the layer itself.
        let own = rig.cache.layer(0).unwrap().narrow(0, 0, 3).unwrap();
        let own =
            own.narrow(1, 0, 1).unwrap().squeeze(1).unwrap().narrow(1, 0, 1).unwrap().squeeze(1).unwrap();
        assert_eq!(own.dims(), [3, 2, 64]);
        refused(rig.cache.append(&step, 0, &own, &k), &["shares storage"]);
        for layer in 0..LAYERS {
            let all = on_host(rig.cache.layer(layer).unwrap());
            assert_eq!(all.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
        }
        // A cache of other heads.
        let wide = Case::new(dtype, 128, 16, [4, 2]);
        let mut wide = PagedDecode::new(&device, &wide.spec(), wide.heads).unwrap();
        let plan = wide.plan(&step).unwrap();
        refused(
            plan.run_with(&rows(&[1, 4, 128], dtype), &rig.cache, 0, &options),
            &["cache", "2 heads of 64"],
        );
        refused(PagedCache::new(&device, &rig.pool, case.shape()), &["the pool has a cache already"]);
        // One of latent attention.
        let latent = LatentShape { num_layers: 1, dtype: dtype.try_into().unwrap() };
        let pool = PageAllocator::new(4, 16).unwrap();
        let mut latent = PagedCache::new(&device, &pool, latent).unwrap();
        let mut batch = Batch::new(&pool);
        batch.push(Sequence::new(&pool)).unwrap();
        batch.append([3]).unwrap();
        let mut tables = StepTables::new(&device);
        let step = tables.update(&batch, &mut latent).unwrap();
        let plan = rig.prefill.plan(&step, true).unwrap();
        refused(plan.run(&q, &latent, 0), &["cache", "rows of latent attention"]);
        refused(latent.append(&step, 0, &k, &k), &["cache", "rows of latent attention"]);
    }
}

#[test]
fn what_no_device_has_is_refused() {
    for device in devices() {
        let case = Case::new(dtypes(&device)[0], 64, 16, [4, 2]);
        let pool = PageAllocator::new(4, 16).unwrap();
        let shape = case.shape();
        let no_layers = HeadsShape { num_layers: 0, ..shape };
        refused(PagedCache::new(&device, &pool, no_layers), &["num_layers"]);
        let integers = HeadsShape { dtype: flashinfer_rs::DType::I64, ..shape };
        refused(PagedCache::new(&device, &pool, integers), &["dtype"]);
        let heads = Heads::new(3, 2);
        refused(PagedDecode::new(&device, &case.spec(), heads), &["heads"]);
        refused(PagedPrefill::new(&device, &case.spec(), heads), &["heads"]);
        let uneven = case.spec().with_head_dim_vo(32);
        refused(PagedPrefill::new(&device, &uneven, case.heads), &["spec", "one width"]);
        if !device.is_cpu() {
            let wide = HeadsShape { dtype: flashinfer_rs::DType::F32, ..shape };
            refused(PagedCache::new(&device, &pool, wide), &["f32", "f16 and bf16"]);
            let spec = AttentionSpec::new(flashinfer_rs::DType::F32, 64);
            refused(PagedDecode::new(&device, &spec, case.heads), &["f32", "f16 and bf16"]);
            // No published module has this width, so nothing is downloaded.
            let spec = AttentionSpec::new(flashinfer_rs::DType::F16, 80);
            for error in [
                PagedDecode::new(&device, &spec, case.heads).map(drop),
                PagedPrefill::new(&device, &spec, case.heads).map(drop),
            ] {
                refused(error, &["head dimension 80", "64, 128 and 256"]);
            }
        }
    }
}

/// Keys and values that are one tensor, and queries that are, too.
#[test]
fn inputs_may_be_one_tensor() {
    let mut rng = Rng::new();
    for device in devices() {
        let dtype = dtypes(&device)[0];
        let case = Case::new(dtype, 64, 5, [2, 2]);
        let mut rig = Rig::new(&device, case);
        rig.push();
        rig.batch.append([6]).unwrap();
        let step = rig.tables.update(&rig.batch, &mut rig.cache).unwrap();
        let x = random(&mut rng, &[6, 2, 64], dtype, &device);
        rig.cache.append(&step, 0, &x, &x).unwrap();
        let plan = rig.prefill.plan(&step, true).unwrap();
        let got = plan.run(&x, &rig.cache, 0).unwrap();
        assert_close(&got, &case.plain(true).attention(&x, &x, &x), "one tensor");
    }
}

/// candle's default stream is each thread's own: arrays and plans of one thread
/// are refused in another. Those of a stream of its own are not.
#[test]
fn streams_of_other_threads() {
    for (device, own_stream) in gpus().into_iter().zip([false, true]) {
        let mut rng = Rng::new();
        let case = Case::new(DType::F16, 64, 16, [4, 2]);
        let mut rig = Rig::new(&device, case);
        rig.push();
        rig.step(&mut rng, &[9], true);
        device.synchronize().unwrap();
        let result = std::thread::scope(|scope| {
            let there = scope.spawn(|| {
                rig.batch.append([1]).unwrap();
                rig.tables.update(&rig.batch, &mut rig.cache).map(drop)
            });
            there.join().unwrap()
        });
        if own_stream {
            result.unwrap();
            rig.truncate(0, 9);
            rig.decode(&mut rng);
        } else {
            refused(result, &["another thread's"]);
        }
    }
}
