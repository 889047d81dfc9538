//! What operations take of strides and addresses, found by their checks: the table of docs/engines.md.
//!
//! Each argument is given in an odd place, and the others in plain ones, to the strict CPU path, which
//! runs the kernel's own checks. So nothing here says what a kernel takes but the checks themselves.

use flashinfer_rs::{
    DType, Device, FlashInferError, PageIndices, Result, TensorMut, TensorRef,
    activation::ActivationOptions,
    attention::{AttentionSpec, MlaQuery, MlaSpec, RunOptions},
    cascade::{State, StateMut},
    gemm::SegmentGemmInput,
    indices::{AppendIndices, RaggedIndices, SegmentIndices, SlotMapping},
    kv::{KvLayout, MlaCache, PagedKv, PagedKvMut},
    norm::NormOptions,
    reference::{self, HostMask},
    rope::{RopeTensors, Rotation},
    sampling::SampleOptions,
    topk::TopKOptions,
};

const PAGE: &str = include_str!("../../docs/engines.md");

/// How an argument lies in memory.
#[derive(Clone, Copy, PartialEq)]
enum Odd {
    /// Entries of the first dimension have so many bytes between them.
    Apart(usize),
    /// Rows and heads have changed places; in a cache, heads and the tokens of a page.
    Swapped,
    /// Each element has a gap behind it.
    Elements,
    /// It begins so many bytes behind a multiple of 256.
    Offset(usize),
}

/// The arguments of a call, of which those of one name are odd.
struct Operands {
    odd: Option<(&'static str, Odd)>,
    /// Dimensions of the odd one, and bytes of an element.
    rank: usize,
    element: usize,
    buffers: Vec<Vec<[u128; 16]>>,
}

impl Operands {
    /// Memory, shape and strides of an argument.
    fn place(&mut self, name: &str, dtype: DType, shape: &[usize]) -> (*mut u8, Vec<usize>) {
        let odd = self.odd.filter(|(odd, _)| *odd == name).map(|(_, odd)| odd);
        let mut order: Vec<usize> = (0..shape.len()).collect();
        if odd == Some(Odd::Swapped) && shape.len() >= 3 {
            order.swap(shape.len() - 3, shape.len() - 2);
        }
        let (mut strides, mut next) = (vec![0; shape.len()], if odd == Some(Odd::Elements) { 2 } else { 1 });
        for &axis in order.iter().rev() {
            strides[axis] = next;
            next *= shape[axis];
        }
        let mut offset = 0;
        match odd {
            Some(Odd::Apart(bytes)) => strides[0] += bytes / dtype.size(),
            Some(Odd::Offset(bytes)) => offset = bytes,
            _ => {}
        }
        if odd.is_some() {
            (self.rank, self.element) = (shape.len(), dtype.size());
        }
        let reach: usize = shape.iter().zip(&strides).map(|(size, stride)| (size - 1) * stride).sum();
        let mut buffer = vec![[0u128; 16]; ((reach + 1) * dtype.size() + offset).div_ceil(256) + 1];
        let start = buffer.as_mut_ptr().cast::<u8>();
        self.buffers.push(buffer);
        (start.wrapping_add(start.align_offset(256) + offset), strides)
    }

    fn read<'a>(&mut self, name: &str, dtype: DType, shape: &[usize]) -> TensorRef<'a> {
        let (data, strides) = self.place(name, dtype, shape);
        // SAFETY: the buffer has all elements, and outlives the call that the view is made for.
        unsafe { TensorRef::from_raw_parts(data.cast(), Device::Cpu, dtype, shape, Some(&strides)) }.unwrap()
    }

    fn write<'a>(&mut self, name: &str, dtype: DType, shape: &[usize]) -> TensorMut<'a> {
        let (data, strides) = self.place(name, dtype, shape);
        // SAFETY: as above; each view has a buffer of its own.
        unsafe { TensorMut::from_raw_parts(data.cast(), Device::Cpu, dtype, shape, Some(&strides)) }.unwrap()
    }
}

/// An operation, the arguments to be varied, and a call with all arguments but these as they should be.
struct Operation {
    name: &'static str,
    arguments: &'static [&'static str],
    call: fn(&mut Operands) -> Result<()>,
}

impl Operation {
    /// Whether it takes an argument in such a place, and what the argument is.
    fn takes(&self, argument: &'static str, odd: Odd) -> (bool, Operands) {
        let mut operands = Operands { odd: Some((argument, odd)), rank: 0, element: 0, buffers: Vec::new() };
        let of_it = |refused: &str| match argument {
            // Keys and values, which are odd in the same way.
            "kv" => ["k", "v", "kv.k", "kv.v"].contains(&refused),
            argument => refused == argument,
        };
        let taken = match (self.call)(&mut operands) {
            Ok(()) => true,
            Err(FlashInferError::InvalidArgument { argument: refused, .. }) if of_it(refused) => false,
            Err(error) => panic!("{}, `{argument}`: {error}", self.name),
        };
        (taken, operands)
    }

    /// The least power of two, of an element at least, that is taken in all multiples.
    fn least(&self, argument: &'static str, element: usize, odd: fn(usize) -> Odd) -> Option<usize> {
        let taken = |bytes: usize| self.takes(argument, odd(bytes)).0;
        let all = [2, 4, 8, 16, 32, 64, 128].into_iter().filter(|&bytes| bytes >= element);
        all.into_iter().find(|&bytes| taken(bytes) && taken(3 * bytes))
    }

    /// The last four columns of an argument's row.
    fn columns(&self, argument: &'static str) -> String {
        let (taken, Operands { rank, element, .. }) = self.takes(argument, Odd::Offset(0));
        assert!(taken && rank > 0, "{} takes `{argument}` where it is not odd", self.name);
        let yes_or_no = |odd| if self.takes(argument, odd).0 { "yes" } else { "no" };
        let apart = match self.least(argument, element, Odd::Apart) {
            _ if rank < 2 => "–".to_owned(),
            None => "no".to_owned(),
            Some(bytes) => bytes.to_string(),
        };
        let swapped = if rank < 3 { "–" } else { yes_or_no(Odd::Swapped) };
        let address = self.least(argument, element, Odd::Offset).unwrap();
        format!("{apart} | {swapped} | {} | {address}", yes_or_no(Odd::Elements))
    }

    /// Its rows of the table, one for all arguments that are taken alike.
    fn rows(&self) -> String {
        let mut rows: Vec<(String, Vec<String>)> = Vec::new();
        for argument in self.arguments {
            let (columns, name) = (self.columns(argument), format!("`{argument}`"));
            match rows.iter_mut().find(|(known, _)| *known == columns) {
                Some((_, names)) => names.push(name),
                None => rows.push((columns, vec![name])),
            }
        }
        let row = |(columns, names): (_, Vec<_>)| {
            format!("| `{}` | {} | {columns} |\n", self.name, names.join(", "))
        };
        rows.into_iter().map(row).collect()
    }
}

const F16: DType = DType::F16;
const F32: DType = DType::F32;

/// Two requests of 20 and 3 tokens.
fn pages() -> PageIndices {
    PageIndices::from_requests(8, 16, [(&[7, 0][..], 20), (&[1][..], 3)]).unwrap()
}

fn paged<'a>(at: &mut Operands) -> PagedKv<'a> {
    let [k, v] = [(); 2].map(|()| at.read("kv", F16, &[8, 16, 2, 64]));
    PagedKv::new(k, v, KvLayout::Nhd)
}

fn append(at: &mut Operands) -> Result<()> {
    let pages = pages();
    let append = AppendIndices::last_tokens(&pages, &[0, 4, 7])?;
    let [key, value] = ["key", "value"].map(|name| at.read(name, F16, &[7, 2, 64]));
    let [k, v] = [(); 2].map(|()| at.write("kv", F16, &[8, 16, 2, 64]));
    let mut cache = PagedKvMut::new(k, v, KvLayout::Nhd);
    reference::append_paged_kv_cache(&key, &value, &SlotMapping::new(&append, &pages), &mut cache)
}

fn append_latent(at: &mut Operands) -> Result<()> {
    let pages = pages();
    let append = AppendIndices::last_tokens(&pages, &[0, 4, 7])?;
    let (ckv, kpe) = (at.read("ckv", F16, &[7, 512]), at.read("kpe", F16, &[7, 64]));
    let caches =
        [&mut at.write("ckv_cache", F16, &[8, 16, 512]), &mut at.write("kpe_cache", F16, &[8, 16, 64])];
    reference::append_paged_mla_kv_cache(&ckv, &kpe, &SlotMapping::new(&append, &pages), caches)
}

fn decode(at: &mut Operands) -> Result<()> {
    let (q, kv) = (at.read("q", F16, &[2, 4, 64]), paged(at));
    let (mut out, mut lse) = (at.write("out", F16, &[2, 4, 64]), at.write("lse", F32, &[2, 4]));
    let (spec, options) = (AttentionSpec::new(F16, 64), RunOptions::default());
    reference::batch_decode(&spec, &q, &kv, &pages(), &mut out, Some(&mut lse), &options)
}

fn prefill_paged(at: &mut Operands) -> Result<()> {
    let (q, kv) = (at.read("q", F16, &[7, 4, 64]), paged(at));
    let (mut out, mut lse) = (at.write("out", F16, &[7, 4, 64]), at.write("lse", F32, &[7, 4]));
    let (spec, options) = (AttentionSpec::new(F16, 64), RunOptions::default());
    let (queries, lse, mask) = (RaggedIndices::from_lens([4, 3])?, Some(&mut lse), HostMask::Causal);
    reference::batch_prefill_paged(&spec, &q, &kv, &queries, &pages(), &mut out, lse, mask, &options)
}

fn prefill_ragged(at: &mut Operands) -> Result<()> {
    let q = at.read("q", F16, &[7, 4, 64]);
    let [k, v] = ["k", "v"].map(|name| at.read(name, F16, &[9, 2, 64]));
    let (mut out, mut lse) = (at.write("out", F16, &[7, 4, 64]), at.write("lse", F32, &[7, 4]));
    let (spec, options) = (AttentionSpec::new(F16, 64), RunOptions::default());
    let (queries, keys) = (RaggedIndices::from_lens([4, 3])?, RaggedIndices::from_lens([5, 4])?);
    let (lse, mask) = (Some(&mut lse), HostMask::Causal);
    reference::batch_prefill_ragged(&spec, &q, [&k, &v], &queries, &keys, &mut out, lse, mask, &options)
}

fn single_prefill(at: &mut Operands) -> Result<()> {
    let q = at.read("q", F16, &[7, 4, 64]);
    let [k, v] = ["k", "v"].map(|name| at.read(name, F16, &[9, 2, 64]));
    let (mut out, mut lse) = (at.write("out", F16, &[7, 4, 64]), at.write("lse", F32, &[7, 4]));
    let (spec, options) = (AttentionSpec::new(F16, 64), RunOptions::default());
    reference::single_prefill(&spec, &q, [&k, &v], &mut out, Some(&mut lse), HostMask::Causal, &options)
}

fn single_decode(at: &mut Operands) -> Result<()> {
    let q = at.read("q", F16, &[4, 64]);
    let [k, v] = [(); 2].map(|()| at.read("kv", F16, &[9, 2, 64]));
    let (mut out, mut lse) = (at.write("out", F16, &[4, 64]), at.write("lse", F32, &[4]));
    let (spec, options) = (AttentionSpec::new(F16, 64), RunOptions::default());
    reference::single_decode(&spec, &q, [&k, &v], &mut out, Some(&mut lse), &options)
}

fn latent(at: &mut Operands) -> Result<()> {
    let q = MlaQuery::new(at.read("q.nope", F16, &[7, 16, 512]), at.read("q.pe", F16, &[7, 16, 64]));
    let cache =
        MlaCache::new(at.read("cache.ckv", F16, &[8, 16, 512]), at.read("cache.kpe", F16, &[8, 16, 64]));
    let (mut out, mut lse) = (at.write("out", F16, &[7, 16, 512]), at.write("lse", F32, &[7, 16]));
    let (spec, queries) = (MlaSpec::new(F16, 0.1), RaggedIndices::from_lens([4, 3])?);
    reference::batch_mla(&spec, &q, &cache, &queries, &pages(), &mut out, Some(&mut lse), HostMask::Causal)
}

fn merge(at: &mut Operands) -> Result<()> {
    let [a, b] = [["a.v", "a.s"], ["b.v", "b.s"]]
        .map(|[v, s]| State::new(at.read(v, F16, &[3, 8, 64]), at.read(s, F32, &[3, 8])));
    let (v, s) = (at.write("merged.v", F16, &[3, 8, 64]), at.write("merged.s", F32, &[3, 8]));
    reference::merge_state(&mut StateMut::new(v, s), &a, &b)
}

fn rmsnorm(at: &mut Operands) -> Result<()> {
    let (input, weight) = (at.read("input", F16, &[7, 4, 64]), at.read("weight", F16, &[64]));
    let mut out = at.write("out", F16, &[7, 4, 64]);
    reference::rmsnorm(&mut out, &input, &weight, &NormOptions::default())
}

fn fused_add_rmsnorm(at: &mut Operands) -> Result<()> {
    let (mut input, mut residual) = (at.write("input", F16, &[7, 64]), at.write("residual", F16, &[7, 64]));
    let weight = at.read("weight", F16, &[64]);
    reference::fused_add_rmsnorm(&mut input, &mut residual, &weight, &NormOptions::default())
}

fn rope(at: &mut Operands) -> Result<()> {
    let (q, k) = (at.write("q", F16, &[7, 4, 64]), at.write("k", F16, &[7, 2, 64]));
    let cos_sin_cache = at.read("cos_sin_cache", F32, &[32, 64]);
    let rotation = Rotation { cos_sin_cache, pos_ids: &[3; 7][..], interleave: false };
    reference::apply_rope_pos_ids_cos_sin_cache(&mut RopeTensors::InPlace { q, k }, &rotation)
}

fn silu_and_mul(at: &mut Operands) -> Result<()> {
    let (mut out, input) = (at.write("out", F16, &[7, 64]), at.read("input", F16, &[7, 128]));
    reference::silu_and_mul(&mut out, &input, &ActivationOptions::default())
}

fn segment_gemm(at: &mut Operands) -> Result<()> {
    let (x, weights) = (at.read("x", F16, &[7, 64]), at.read("weights", F16, &[2, 32, 64]));
    let input = SegmentGemmInput::column_major(x, weights);
    reference::segment_gemm(&mut at.write("out", F16, &[7, 32]), &input, &SegmentIndices::from_lens([4, 3])?)
}

fn sample(at: &mut Operands) -> Result<()> {
    let options = SampleOptions::new(at.read("uniforms", F32, &[3]));
    reference::sample(&at.read("logits", F32, &[3, 64]), &options).map(drop)
}

fn argmax(at: &mut Operands) -> Result<()> {
    reference::argmax(&at.read("logits", F16, &[3, 64])).map(drop)
}

fn radix_topk(at: &mut Operands) -> Result<()> {
    let input = at.read("input", F32, &[3, 64]);
    let (mut values, mut indices) =
        (at.write("values", F32, &[3, 8]), at.write("indices", DType::I32, &[3, 8]));
    reference::radix_topk(&mut values, &mut indices, &input, &TopKOptions::default())
}

const OPERATIONS: [Operation; 17] = [
    Operation { name: "append_paged_kv_cache", arguments: &["key", "value", "kv"], call: append },
    Operation {
        name: "append_paged_mla_kv_cache",
        arguments: &["ckv", "kpe", "ckv_cache", "kpe_cache"],
        call: append_latent,
    },
    Operation { name: "BatchDecode", arguments: &["q", "kv", "out", "lse"], call: decode },
    Operation {
        name: "BatchPrefill::plan_paged",
        arguments: &["q", "kv", "out", "lse"],
        call: prefill_paged,
    },
    Operation {
        name: "BatchPrefill::plan_ragged",
        arguments: &["q", "k", "v", "out", "lse"],
        call: prefill_ragged,
    },
    Operation { name: "SinglePrefill", arguments: &["q", "k", "v", "out", "lse"], call: single_prefill },
    Operation { name: "SingleDecode", arguments: &["q", "kv", "out", "lse"], call: single_decode },
    Operation {
        name: "BatchMla",
        arguments: &["q.nope", "q.pe", "cache.ckv", "cache.kpe", "out", "lse"],
        call: latent,
    },
    Operation { name: "merge_state", arguments: &["a.v", "a.s", "merged.v", "merged.s"], call: merge },
    Operation { name: "rmsnorm", arguments: &["input", "weight", "out"], call: rmsnorm },
    Operation {
        name: "fused_add_rmsnorm",
        arguments: &["input", "residual", "weight"],
        call: fused_add_rmsnorm,
    },
    Operation {
        name: "apply_rope_pos_ids_cos_sin_cache",
        arguments: &["q", "k", "cos_sin_cache"],
        call: rope,
    },
    Operation { name: "silu_and_mul", arguments: &["out", "input"], call: silu_and_mul },
    Operation { name: "SegmentGemm", arguments: &["x", "weights", "out"], call: segment_gemm },
    Operation { name: "sample", arguments: &["logits", "uniforms"], call: sample },
    Operation { name: "argmax", arguments: &["logits"], call: argmax },
    Operation { name: "radix_topk", arguments: &["input", "values", "indices"], call: radix_topk },
];

#[test]
fn the_table_of_the_page_for_engines() {
    let _strict = reference::strict();
    let rows: String = OPERATIONS.iter().map(Operation::rows).collect();
    let table = format!(
        "| operation | argument | rows apart | heads first | elements apart | address |\n|---|---|---|---|---|---|\n{rows}\n"
    );
    assert!(PAGE.contains(&table), "docs/engines.md does not have this table:\n{table}");
}
