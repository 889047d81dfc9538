//! A call of the functions: its checks, and what it is in the kernels' terms.

use candle_core::{DType, Device, Layout, Result, Tensor, bail};

use super::{
    super::{
        lse::Lse,
        run::{finite, per_head},
        tensor,
    },
    lengths,
    operation::{CacheScales, CallKeys, FlashAttnCall},
    views,
    visible::{Lens, Request, Visible, Window},
};
use crate::{
    attention::{AttentionSpec, Backend, Heads, PosEncodingMode},
    indices::{PageIndices, RaggedIndices},
};

/// The most elements of a head, as candle-flash-attn has it.
const MAX_HEAD_DIM: usize = 512;
/// FlashAttention 3 works on tiles of this many queries, and does not divide
/// the keys of one: with fewer queries, FlashAttention 2 is faster.
const FA3_TILE: usize = 128;

/// Attention as a caller describes it.
pub(super) struct AttentionParams<'a> {
    pub(super) softmax_scale: f32,
    /// To the left and to the right.
    pub(super) window: [Option<usize>; 2],
    pub(super) softcap: Option<f32>,
    pub(super) alibi_slopes: Option<&'a Tensor>,
    pub(super) batch: BatchLayout<'a>,
}

/// How the sequences of a batch lie.
pub(super) enum BatchLayout<'a> {
    /// All as long as each other, in a dimension of their own.
    Dense,
    /// One after the other.
    Ragged(Lengths<'a>),
    /// The keys in pages.
    Paged {
        lengths: Lengths<'a>,
        block_table: &'a Tensor,
        page_size: usize,
        ranges: Option<&'a Tensor>,
        /// What 8-bit keys and values were divided by; `None` where those are not taken.
        scales: Option<CacheScales>,
        /// Each query head's logit of a key that has no value.
        sinks: Option<&'a Tensor>,
    },
}

/// Cumulative lengths, and the longest.
#[derive(Clone, Copy)]
pub(super) struct Lengths<'a> {
    pub(super) queries: &'a Tensor,
    pub(super) keys: &'a Tensor,
    pub(super) max: [usize; 2],
}

impl AttentionParams<'_> {
    pub(super) fn of(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        self.keeping(None, q, k, v)
    }

    /// The result, and the LSE: `f32` `(rows, heads)`.
    pub(super) fn with_lse(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let kept = Lse::default();
        let out = self.keeping(Some(&kept), q, k, v)?;
        let (rows, heads, _) = q.dims3()?;
        Ok((out, kept.of(q, [rows, heads], self.sinks())?))
    }

    fn keeping(&self, lse: Option<&Lse>, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let heads = self.check(q, k, v)?;
        // A copy: its lock is taken while candle holds those of the queries, keys and values, and it may
        // be a view of them.
        let per_head = |sinks: &Tensor| {
            per_head("paged_attention", "sinks", sinks, heads.num_qo_heads, q.device())?.copy()
        };
        let sinks = self.sinks().map(per_head).transpose()?;
        let (sequences, max_keys) = self.sequences(q, k)?;
        if q.elem_count() == 0 {
            // The same, without an allocation of nothing.
            return Ok(q.clone());
        }
        if sequences.iter().all(|&(_, keys)| keys == 0) {
            return Tensor::zeros(q.shape(), q.dtype(), q.device());
        }
        let ranges = match &self.batch {
            BatchLayout::Paged { ranges: Some(ranges), .. } => lengths::ranges(ranges, sequences.len())?,
            _ => Vec::new(),
        };
        let visible = Visible::new(Window::new(self.window, max_keys), &sequences, ranges);
        let slopes =
            self.alibi_slopes.map(|slopes| lengths::slopes(slopes, heads.num_qo_heads)).transpose()?;
        if slopes.is_some() && q.device().is_cuda() && !visible.is_causal(&sequences) {
            bail!(
                "flash_attn: on CUDA, ALiBi needs window_size_right = Some(0) (causal): FlashInfer's kernels \
                 add the slope times the key's place, which FlashAttention does only where no key lies after \
                 its query; the CPU has both"
            )
        }
        let spec = self.spec(q, k, &visible, slopes.is_some())?;
        let (mut call, [q, k, v]) = self.call([q, k, v], (spec, heads), (visible, sequences), slopes)?;
        (call.sinks, call.lse) = (sinks, lse.cloned());
        q.apply_op3(&k, &v, call)
    }

    /// Devices, dtypes, shapes and scales; returns the heads.
    fn check(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Heads> {
        let quantized = self.scales(k).is_some();
        if let BatchLayout::Paged { scales: Some(CacheScales { k: of_keys, v: of_values }), .. } = self.batch
        {
            for (name, scale) in [("k_scale", of_keys), ("v_scale", of_values.into())] {
                finite("paged_attention", name, scale)?;
                if scale != 1.0 && !quantized {
                    let dtype = k.dtype().as_str();
                    bail!(
                        "paged_attention: {name} is {scale} for caches of {dtype}; only those of f8e4m3 have scales"
                    )
                }
            }
        }
        for (name, tensor) in [("k", k), ("v", v)] {
            let expected = if quantized { k.dtype() } else { q.dtype() };
            if tensor.dtype() != expected {
                let other = if quantized { "k" } else { "q" };
                bail!("flash_attn: {name} is {}, {other} is {}", tensor.dtype().as_str(), expected.as_str())
            }
            if !tensor.device().same_device(q.device()) {
                bail!(
                    "flash_attn: {name} is on {:?}, q is on {:?}",
                    tensor.device().location(),
                    q.device().location()
                )
            }
        }
        match (q.device(), q.dtype()) {
            (_, DType::F16 | DType::BF16) | (Device::Cpu, DType::F32 | DType::F64) => {}
            (Device::Cpu, other) => {
                bail!("flash_attn: tensors of {}; there are f32, f16, bf16 and f64", other.as_str())
            }
            (_, other) => bail!(
                "flash_attn: tensors of {}; on CUDA there are f16 and bf16: convert with to_dtype",
                other.as_str()
            ),
        }
        let (rank, kv_rank) = match self.batch {
            BatchLayout::Dense => (4, 4),
            BatchLayout::Ragged(_) => (3, 3),
            BatchLayout::Paged { .. } => (3, 4),
        };
        for (name, tensor, rank) in [("q", q, rank), ("k", k, kv_rank), ("v", v, kv_rank)] {
            if tensor.rank() != rank {
                bail!("flash_attn: {name} has shape {:?}; expected {rank} dimensions", tensor.shape())
            }
        }
        let (q_dims, k_dims) = (q.dims(), k.dims());
        let [num_qo_heads, width] = [q_dims[rank - 2], q_dims[rank - 1]];
        let num_kv_heads = k_dims[kv_rank - 2];
        let fits = k_dims[kv_rank - 1] == width && (kv_rank == 3 || rank == 3 || k_dims[0] == q_dims[0]);
        if k_dims != v.dims() || !fits {
            bail!(
                "flash_attn: q has shape {:?}, k {:?} and v {:?}; k and v must be alike, with the batch and \
                 the head dimension of q",
                q.shape(),
                k.shape(),
                v.shape()
            )
        }
        if width % 8 != 0 || width > MAX_HEAD_DIM || width == 0 {
            bail!("flash_attn: a head dimension of {width}; there are multiples of 8 up to {MAX_HEAD_DIM}")
        }
        let heads = Heads { num_qo_heads, num_kv_heads };
        if heads.group_size().is_none() {
            bail!(
                "flash_attn: {num_qo_heads} heads of q over {num_kv_heads} of k and v; expected a multiple, \
                 and at least one"
            )
        }
        Ok(heads)
    }

    /// Queries and keys of each sequence, and the number that wider windows
    /// have no effect from.
    fn sequences(&self, q: &Tensor, k: &Tensor) -> Result<(Vec<Lens>, usize)> {
        let (lengths, total_keys) = match &self.batch {
            BatchLayout::Dense => {
                let (batch, queries, keys) = (q.dims()[0], q.dims()[1], k.dims()[1]);
                return Ok((vec![(queries, keys); batch], keys));
            }
            BatchLayout::Ragged(lengths) => (lengths, Some(k.dims()[0])),
            BatchLayout::Paged { lengths, page_size, .. } => {
                let pages_of = k.dims()[1];
                if *page_size != pages_of || pages_of == 0 {
                    bail!(
                        "flash_attn: page_block_size is {page_size}, but the blocks of k hold {pages_of} keys"
                    )
                }
                (lengths, None)
            }
        };
        let queries = lengths::from_cumulative("seqlens_q", lengths.queries, lengths.max[0])?;
        let keys = lengths::from_cumulative("seqlens_k", lengths.keys, lengths.max[1])?;
        if queries.len() != keys.len() {
            bail!("seqlens_q is of {} sequences, seqlens_k of {}", queries.len(), keys.len())
        }
        let totals = [("q", "seqlens_q", &queries, Some(q.dims()[0])), ("k", "seqlens_k", &keys, total_keys)];
        for (name, argument, lens, rows) in totals {
            let total: usize = lens.iter().sum();
            if rows.is_some_and(|rows| rows != total) {
                bail!(
                    "{argument} ends with {total}, but {name} has shape {:?}",
                    if name == "q" { q } else { k }.shape()
                )
            }
        }
        Ok((queries.into_iter().zip(keys).collect(), lengths.max[1]))
    }

    /// The scales of keys and values that have 8 bits, if they may.
    fn scales(&self, k: &Tensor) -> Option<CacheScales> {
        match self.batch {
            BatchLayout::Paged { scales, .. } => scales.filter(|_| k.dtype() == DType::F8E4M3),
            BatchLayout::Dense | BatchLayout::Ragged(_) => None,
        }
    }

    fn sinks(&self) -> Option<&Tensor> {
        match self.batch {
            BatchLayout::Paged { sinks, .. } => sinks,
            BatchLayout::Dense | BatchLayout::Ragged(_) => None,
        }
    }

    fn spec(&self, q: &Tensor, k: &Tensor, visible: &Visible, alibi: bool) -> Result<AttentionSpec> {
        let width = q.dims()[q.rank() - 1];
        let mut spec = AttentionSpec::new(q.dtype().try_into()?, width).with_kv_dtype(k.dtype().try_into()?);
        if let Some(left) = visible.left() {
            // A window never reaches beyond the keys, of which there are fewer.
            spec = spec.with_window_left(u32::try_from(left).unwrap_or(u32::MAX));
        }
        if let Some(cap) = self.softcap.filter(|&cap| cap > 0.0) {
            spec = spec.with_logits_soft_cap(cap);
        }
        if alibi {
            spec = spec.with_pos_encoding_mode(PosEncodingMode::Alibi);
        }
        if self.sinks().is_some() {
            spec = spec.with_attention_sink();
        }
        Ok(spec)
    }

    /// The call, and the tensors that its views are of.
    fn call(
        &self,
        [q, k, v]: [&Tensor; 3],
        (mut spec, heads): (AttentionSpec, Heads),
        (visible, sequences): (Visible, Vec<Lens>),
        slopes: Option<Vec<f32>>,
    ) -> Result<(FlashAttnCall, [Tensor; 3])> {
        let (dtype, out, scales) = (q.dtype(), q.shape().clone(), self.scales(k));
        let (q, q_view) = views::viewed(q, views::queries)?;
        let ([k, v], kv_views, gap, pages) = match &self.batch {
            BatchLayout::Paged { block_table, page_size, .. } => {
                let keys: Vec<usize> = sequences.iter().map(|&(_, keys)| keys).collect();
                let pages = lengths::pages(block_table, &keys, *page_size)?;
                let (tensors, views) = views::blocks(k, v)?;
                (tensors, views, 0, Some((pages, *page_size)))
            }
            BatchLayout::Dense | BatchLayout::Ragged(_) => {
                let (tensors, views, apart) = views::keys_and_values(k, v)?;
                let gap = if let BatchLayout::Dense = self.batch { apart - sequences[0].1 } else { 0 };
                (tensors, views, gap, None)
            }
        };
        let requests = visible.requests(&sequences, gap);
        let queries = RaggedIndices::from_lens(requests.iter().map(|request| request.queries));
        let keys = match pages {
            None => {
                RaggedIndices::from_lens(requests.iter().map(|request| request.keys)).map(CallKeys::Ragged)
            }
            Some((pages, page_size)) => {
                let of = |request: &Request| request.sequence.map_or(&[][..], |at| &pages[at]);
                let requests = requests.iter().map(|request| (of(request), request.keys));
                PageIndices::from_requests(k.dims()[0], page_size, requests).map(CallKeys::Paged)
            }
        };
        let [k_view, v_view] = kv_views;
        let views = [q_view, k_view, v_view];
        // FlashAttention 3 has no 8-bit keys.
        let fa3 = scales.is_none() && self.is_for_fa3(&visible, &requests, &views, dtype)?;
        spec.backend = if fa3 { Backend::Auto } else { Backend::Fa2 };
        let call = FlashAttnCall {
            spec,
            heads,
            softmax_scale: self.softmax_scale.into(),
            visible,
            requests,
            queries: queries.map_err(tensor::error)?,
            keys: keys.map_err(tensor::error)?,
            slopes,
            scales,
            sinks: None,
            lse: None,
            views,
            out,
        };
        Ok((call, [q, k, v]))
    }

    /// Whether FlashAttention 3 can serve a call, and may be the faster. Keys of
    /// several requests it reads as pages, for which rows of keys and of values
    /// are equally far apart.
    fn is_for_fa3(
        &self,
        visible: &Visible,
        requests: &[Request],
        views: &[Layout; 3],
        dtype: DType,
    ) -> Result<bool> {
        let unread = |request: &Request| request.sequence.is_none() && request.keys > 0;
        let direct = !matches!(visible, Visible::Bits { .. }) && self.alibi_slopes.is_none();
        let long = requests.iter().any(|request| request.queries >= FA3_TILE);
        if !direct || !long || requests.iter().any(unread) {
            return Ok(false);
        }
        let several = requests.iter().filter(|request| request.keys > 0).count() > 1;
        let paged = matches!(self.batch, BatchLayout::Paged { .. });
        if several && !paged && views[1].stride()[0] != views[2].stride()[0] {
            return Ok(false);
        }
        let described = if paged { &views[..1] } else { &views[..] };
        for view in described {
            if views::overlaps(view, dtype)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
