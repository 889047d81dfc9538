//! Every attention of this crate over one batch, behind one function: for what
//! has to hold of all of them.

use flashinfer_rs::{
    DType, Module, PageIndices, PageTable, Result,
    attention::{
        AttentionSpec, Backend, BatchAttention, BatchDecode, BatchMla, BatchPrefill, CascadeWorkspace, Heads,
        Mask, MlaQuery, MlaSpec, MultiLevelCascade, PagedBatch, PlanOptions, PrefillRunOptions, RunOptions,
        SingleDecode, SinglePrefill, Workspace,
    },
    indices::{RaggedIndices, RaggedTable},
    kv::{KvLayout, MlaCache, PagedKv},
};
use half::bf16;

use super::{Gpu, Mirrored, Rng, at_hand};

/// An operation, and its kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Decode(Backend),
    Paged(Backend),
    Ragged(Backend),
    SinglePrefill,
    SingleDecode,
    Mixed,
    Mla(Backend),
    Cascade(Backend),
}

/// Those of a GPU of compute capability 9.0.
pub const ALL: [Op; 14] = [
    Op::Decode(Backend::CudaCores),
    Op::Decode(Backend::Fa2),
    Op::Decode(Backend::Fa3),
    Op::Paged(Backend::Fa2),
    Op::Paged(Backend::Fa3),
    Op::Ragged(Backend::Fa2),
    Op::Ragged(Backend::Fa3),
    Op::SinglePrefill,
    Op::SingleDecode,
    Op::Mixed,
    Op::Mla(Backend::Fa2),
    Op::Mla(Backend::Fa3),
    Op::Cascade(Backend::Fa2),
    Op::Cascade(Backend::Fa3),
];

const PAGE: usize = 16;

impl Op {
    /// Those that the GPU has.
    pub fn all(gpu: &Gpu) -> Vec<Self> {
        let hopper = gpu.compute_capability() == (9, 0);
        if !hopper {
            super::say("FlashAttention 3 skipped: the GPU is not of compute capability 9.0");
        }
        let fa3 = |op: &Op| {
            matches!(
                op,
                Op::Decode(Backend::Fa3)
                    | Op::Paged(Backend::Fa3)
                    | Op::Ragged(Backend::Fa3)
                    | Op::Mla(Backend::Fa3)
                    | Op::Cascade(Backend::Fa3)
            )
        };
        let has = |op: &Op| hopper || !fa3(op);
        ALL.into_iter().filter(|op| has(op) && at_hand(gpu, op.module(gpu)).is_some()).collect()
    }

    /// The module that serves its batches.
    pub fn module(self, gpu: &Gpu) -> Result<&'static Module> {
        let stream = &gpu.stream;
        let spec = |backend| AttentionSpec::new(DType::BF16, 128).with_backend(backend);
        let heads = self.heads();
        Ok(match self {
            Self::Decode(backend) => BatchDecode::new(stream, &spec(backend), heads)?.module(),
            Self::Paged(backend) | Self::Ragged(backend) => {
                BatchPrefill::new(stream, &spec(backend), heads)?.module()
            }
            Self::SinglePrefill => SinglePrefill::new(stream, &spec(Backend::Auto))?.module(),
            Self::SingleDecode => SingleDecode::new(stream, &spec(Backend::Auto), heads)?.module(),
            Self::Mixed => BatchAttention::new(stream, &spec(Backend::Auto), heads)?.module(),
            Self::Mla(backend) => {
                let spec = MlaSpec::new(DType::BF16, 1.0).with_backend(backend);
                BatchMla::new(stream, &spec, heads.num_qo_heads)?.module()
            }
            Self::Cascade(backend) => MultiLevelCascade::new(stream, &spec(backend), heads)?.module(),
        })
    }

    /// Whether each request has one query.
    pub fn is_decode(self) -> bool {
        matches!(self, Self::Decode(_) | Self::SingleDecode)
    }

    pub fn is_on_cuda_cores(self) -> bool {
        matches!(self, Self::Decode(Backend::CudaCores) | Self::SingleDecode)
    }

    pub fn is_mla(self) -> bool {
        matches!(self, Self::Mla(_))
    }

    fn heads(self) -> Heads {
        if self.is_mla() { Heads::new(16, 1) } else { Heads::new(4, 2) }
    }

    /// Widths of keys and of values. Latent values are the first part of keys.
    pub fn widths(self) -> [usize; 2] {
        if self.is_mla() { [576, 512] } else { [128, 128] }
    }
}

/// A batch. Rows are those of its requests, one after the other.
#[derive(Clone)]
pub struct Batch {
    pub op: Op,
    /// Queries and keys of each request.
    pub requests: Vec<(usize, usize)>,
    pub sm_scale: f64,
    pub q: Vec<bf16>,
    pub k: Vec<bf16>,
    pub v: Vec<bf16>,
}

/// What an operation wrote.
pub struct Results {
    pub out: Vec<bf16>,
    pub lse: Vec<f32>,
}

impl Batch {
    /// Random numbers. Decode takes one query of each request.
    pub fn random(rng: &mut Rng, op: Op, requests: &[(usize, usize)]) -> Self {
        let one =
            |&(queries, keys): &(usize, usize)| if op.is_decode() { (1, keys) } else { (queries, keys) };
        let requests: Vec<_> = requests.iter().map(one).collect();
        let (heads, [qk, vo]) = (op.heads(), op.widths());
        let mut numbers = |count: usize| (0..count).map(|_| bf16::from_f64(rng.unit())).collect();
        let (queries, keys): (usize, usize) =
            requests.iter().fold((0, 0), |sum, at| (sum.0 + at.0, sum.1 + at.1));
        Self {
            op,
            q: numbers(queries * heads.num_qo_heads * qk),
            k: numbers(keys * heads.num_kv_heads * qk),
            v: numbers(keys * heads.num_kv_heads * vo),
            sm_scale: 1.0 / 128f64.sqrt(),
            requests,
        }
    }

    fn spans(&self, request: usize) -> [std::ops::Range<usize>; 2] {
        let before = self.requests[..request].iter().fold((0, 0), |sum, at| (sum.0 + at.0, sum.1 + at.1));
        let (queries, keys) = self.requests[request];
        [before.0..before.0 + queries, before.1..before.1 + keys]
    }

    /// Replaces the numbers of a request.
    pub fn fill(&mut self, request: usize, [q, k, v]: [f64; 3]) {
        let (heads, [qk, vo], [queries, keys]) = (self.op.heads(), self.op.widths(), self.spans(request));
        let fill = |numbers: &mut [bf16], rows: &std::ops::Range<usize>, width: usize, number: f64| {
            numbers[rows.start * width..rows.end * width].fill(bf16::from_f64(number));
        };
        fill(&mut self.q, &queries, heads.num_qo_heads * qk, q);
        fill(&mut self.k, &keys, heads.num_kv_heads * qk, k);
        fill(&mut self.v, &keys, heads.num_kv_heads * vo, v);
    }

    /// A request's rows of what was written.
    pub fn part(&self, results: &Results, request: usize) -> Results {
        let (heads, vo, [queries, _]) =
            (self.op.heads().num_qo_heads, self.op.widths()[1], self.spans(request));
        Results {
            out: results.out[queries.start * heads * vo..queries.end * heads * vo].to_vec(),
            lse: results.lse[queries.start * heads..queries.end * heads].to_vec(),
        }
    }

    fn spec(&self, backend: Backend) -> AttentionSpec {
        AttentionSpec::new(DType::BF16, 128).with_backend(backend)
    }

    /// The pages of keys `part(len)` of each request; the same cache for all.
    fn table(&self, part: impl Fn(usize) -> std::ops::Range<usize>) -> (PageIndices, usize) {
        let mut next = 0;
        let mut requests = Vec::new();
        for &(_, len) in &self.requests {
            // Level boundaries lie between pages.
            let range = part(len);
            let (first, last) = (range.start.div_ceil(PAGE), range.end.div_ceil(PAGE));
            requests
                .push(((next + first..next + last).map(|page| page as i32).collect::<Vec<_>>(), range.len()));
            next += len.div_ceil(PAGE);
        }
        let pages = next + 1;
        let requests = requests.iter().map(|(pages, len)| (&pages[..], *len));
        (PageIndices::from_requests(pages, PAGE, requests).unwrap(), pages)
    }

    /// Keys or values in pages; slots of nobody are NaN.
    fn paged(&self, rows: &[bf16], row: usize, pages: usize) -> Vec<bf16> {
        let mut cache = vec![bf16::NAN; pages * PAGE * row];
        let (mut from, mut page) = (0, 0);
        for &(_, len) in &self.requests {
            let at = page * PAGE * row;
            cache[at..at + len * row].copy_from_slice(&rows[from..from + len * row]);
            (from, page) = (from + len * row, page + len.div_ceil(PAGE));
        }
        cache
    }

    fn options(&self) -> RunOptions<'static> {
        RunOptions::with_sm_scale(self.sm_scale)
    }

    pub fn run(&self, gpu: &Gpu) -> Results {
        let (heads, [qk, vo]) = (self.op.heads(), self.op.widths());
        let Heads { num_qo_heads, num_kv_heads } = heads;
        let queries: usize = self.requests.iter().map(|request| request.0).sum();
        let keys: usize = self.requests.iter().map(|request| request.1).sum();
        let q = Mirrored::new(gpu, &[queries, num_qo_heads, qk], self.q.clone());
        let mut out = Mirrored::<bf16>::poisoned(gpu, &[queries, num_qo_heads, vo]);
        let mut lse = Mirrored::<f32>::poisoned(gpu, &[queries, num_qo_heads]);
        let stream = &gpu.stream;
        let rows = RaggedIndices::from_lens(self.requests.iter().map(|request| request.0)).unwrap();
        let rows_table = RaggedTable::new(stream, rows.clone()).unwrap();
        let (indices, pages) = self.table(|len| 0..len);
        let cache_shape = [pages, PAGE, num_kv_heads, qk];
        let cache = |rows: &[bf16], width: usize| {
            let mut shape = cache_shape;
            shape[3] = width;
            Mirrored::new(gpu, &shape, self.paged(rows, num_kv_heads * width, pages))
        };
        let (k_cache, v_cache) = (cache(&self.k, qk), cache(&self.v, vo));
        let ragged = |rows: &[bf16], width| Mirrored::new(gpu, &[keys, num_kv_heads, width], rows.to_vec());
        let (k, v) = (ragged(&self.k, qk), ragged(&self.v, vo));
        {
            let (q, k_cache, v_cache) = (q.device_view(), k_cache.device_view(), v_cache.device_view());
            let (k, v) = (k.device_view(), v.device_view());
            let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
            let (mut out, mut lse) = (out.reborrow(), lse.reborrow());
            let kv = PagedKv::new(k_cache, v_cache, KvLayout::Nhd);
            let table = PageTable::new(stream, indices.clone()).unwrap();
            let options = self.options();
            let mut workspace =
                Workspace::with_sizes(stream, 320 << 20, Workspace::DEFAULT_INT_BYTES).unwrap();
            match self.op {
                Op::Decode(backend) => {
                    let decode = BatchDecode::new(stream, &self.spec(backend), heads).unwrap();
                    assert_eq!(decode.backend(), backend);
                    let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
                    plan.run_with(&q, &kv, &mut out, Some(&mut lse), &options).unwrap();
                }
                Op::Paged(backend) => {
                    let prefill = BatchPrefill::new(stream, &self.spec(backend), heads).unwrap();
                    let plan = PlanOptions::default();
                    let plan = prefill
                        .plan_paged(&mut workspace, PagedBatch::new(&rows_table, &table), &plan)
                        .unwrap();
                    plan.run_with(&q, &kv, &mut out, Some(&mut lse), &options).unwrap();
                }
                Op::Ragged(backend) => {
                    let prefill = BatchPrefill::new(stream, &self.spec(backend), heads).unwrap();
                    let lens =
                        RaggedIndices::from_lens(self.requests.iter().map(|request| request.1)).unwrap();
                    let keys = RaggedTable::new(stream, lens).unwrap();
                    let plan = PlanOptions::default();
                    let plan = prefill.plan_ragged(&mut workspace, &rows_table, &keys, &plan).unwrap();
                    plan.run_with(&q, [&k, &v], &mut out, Some(&mut lse), &options).unwrap();
                }
                Op::SinglePrefill => {
                    let prefill = SinglePrefill::new(stream, &self.spec(Backend::Auto)).unwrap();
                    for request in 0..self.requests.len() {
                        let [rows, keys] = self.spans(request);
                        let (k, v) = (k, v);
                        let k = k.narrow(0, keys.start, keys.len()).unwrap();
                        let v = v.narrow(0, keys.start, keys.len()).unwrap();
                        prefill
                            .run_with(
                                &mut workspace,
                                &q.narrow(0, rows.start, rows.len()).unwrap(),
                                [&k, &v],
                                &mut out.reborrow().narrow(0, rows.start, rows.len()).unwrap(),
                                Some(&mut lse.reborrow().narrow(0, rows.start, rows.len()).unwrap()),
                                &PrefillRunOptions::new(Mask::None, options),
                            )
                            .unwrap();
                    }
                }
                Op::SingleDecode => {
                    let decode = SingleDecode::new(stream, &self.spec(Backend::Auto), heads).unwrap();
                    for request in 0..self.requests.len() {
                        let [_, keys] = self.spans(request);
                        let (k, v) = (k, v);
                        let k = k.narrow(0, keys.start, keys.len()).unwrap();
                        let v = v.narrow(0, keys.start, keys.len()).unwrap();
                        decode
                            .run_with(
                                &mut workspace,
                                &q.select(0, request).unwrap(),
                                [&k, &v],
                                &mut out.reborrow().select(0, request).unwrap(),
                                Some(&mut lse.reborrow().select(0, request).unwrap()),
                                &options,
                            )
                            .unwrap();
                    }
                }
                Op::Mixed => {
                    let mixed = BatchAttention::new(stream, &self.spec(Backend::Auto), heads).unwrap();
                    let plan = PlanOptions::default();
                    let plan =
                        mixed.plan(&mut workspace, PagedBatch::new(&rows_table, &table), &plan).unwrap();
                    plan.run_with(&q, &kv, &mut out, Some(&mut lse), &options).unwrap();
                }
                Op::Mla(backend) => {
                    let spec = MlaSpec::new(DType::BF16, self.sm_scale).with_backend(backend);
                    let mla = BatchMla::new(stream, &spec, num_qo_heads).unwrap();
                    let plan = PlanOptions::default();
                    let plan = mla.plan(&mut workspace, PagedBatch::new(&rows_table, &table), &plan).unwrap();
                    let query = MlaQuery::joined(q).unwrap();
                    let cache = MlaCache::joined(k_cache.select(2, 0).unwrap()).unwrap();
                    plan.run_with(&query, &cache, &mut out, Some(&mut lse)).unwrap();
                }
                Op::Cascade(backend) => {
                    let cascade = MultiLevelCascade::new(stream, &self.spec(backend), heads).unwrap();
                    let half = |len: usize| len / 2 / PAGE * PAGE;
                    let first = PageTable::new(stream, self.table(|len| 0..half(len)).0).unwrap();
                    let second = PageTable::new(stream, self.table(|len| half(len)..len).0).unwrap();
                    let levels = [&first, &second].map(|table| PagedBatch::new(&rows_table, table));
                    let mut workspace = CascadeWorkspace::new(stream, 2).unwrap();
                    let plan = PlanOptions::default();
                    let plan = cascade.plan(&mut workspace, &levels, &plan).unwrap();
                    plan.run_with(&q, &kv, &mut out, Some(&mut lse), &options).unwrap();
                }
            }
        }
        Results { out: out.download(), lse: lse.download() }
    }

    /// Attention in `f64`: outputs, and base-2 LSE.
    pub fn expected(&self) -> (Vec<f64>, Vec<f64>) {
        let (heads, [qk, vo]) = (self.op.heads(), self.op.widths());
        let Heads { num_qo_heads, num_kv_heads } = heads;
        let group = num_qo_heads / num_kv_heads;
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        for request in 0..self.requests.len() {
            let [queries, keys] = self.spans(request);
            for (query, head) in queries.flat_map(|query| (0..num_qo_heads).map(move |head| (query, head))) {
                let q = &self.q[(query * num_qo_heads + head) * qk..][..qk];
                let k_of = |key: usize| &self.k[(key * num_kv_heads + head / group) * qk..][..qk];
                let v_of = |key: usize| match self.op.is_mla() {
                    true => &k_of(key)[..vo],
                    false => &self.v[(key * num_kv_heads + head / group) * vo..][..vo],
                };
                let score = |key: usize| {
                    let product: f64 = q.iter().zip(k_of(key)).map(|(q, k)| q.to_f64() * k.to_f64()).sum();
                    product * self.sm_scale
                };
                let scores: Vec<f64> = keys.clone().map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
                let sum: f64 = weights.iter().sum();
                let mut row = vec![0.0; vo];
                for (weight, key) in weights.iter().zip(keys.clone()) {
                    row.iter_mut().zip(v_of(key)).for_each(|(o, v)| *o += weight / sum * v.to_f64());
                }
                out.extend(row);
                lse.push(if sum > 0.0 {
                    max * std::f64::consts::LOG2_E + sum.log2()
                } else {
                    f64::NEG_INFINITY
                });
            }
        }
        (out, lse)
    }
}

impl Results {
    /// Whether it is what [`Batch::expected`] says.
    pub fn is_close(&self, (out, lse): (&[f64], &[f64])) -> bool {
        assert_eq!((self.out.len(), self.lse.len()), (out.len(), lse.len()));
        let near =
            |got: f64, want: f64, bound: f64| got == want || want.is_finite() && (got - want).abs() <= bound;
        let mut outputs = self.out.iter().zip(out);
        let mut sums = self.lse.iter().zip(lse);
        outputs.all(|(got, &want)| near(got.to_f64(), want, 0.02 + 0.01 * want.abs()))
            && sums.all(|(&got, &want)| near(got.into(), want, 0.01 + 1e-6 * want.abs()))
    }
}
