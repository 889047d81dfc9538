//! Attention by the modules' own functions, with arguments packed once.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use flashinfer_rs::{
    DType, Module, PageIndices, TensorRef,
    artifacts::FlashInferVersion,
    attention::{Heads, Workspace},
    ffi::{Arg, Object, Packed},
};

use crate::{HEAD_DIM, Result, measure::Raw, operand::Operand, packed};

pub const NONE: Arg<'static> = Arg::NONE;
/// What upstream passes for rotary embeddings that modules do not have.
pub const ROPE: (f64, f64) = (1.0, 1e-4);

/// Scratch memory of plans.
pub struct Scratch {
    pub float: Operand,
    pub int: Operand,
    pub pinned: Operand,
}

impl Scratch {
    pub fn new(cuda: &Arc<CudaStream>) -> Result<Self> {
        Ok(Self {
            float: Operand::zeros(cuda, DType::U8, &[Workspace::DEFAULT_FLOAT_BYTES])?,
            int: Operand::zeros(cuda, DType::U8, &[Workspace::DEFAULT_INT_BYTES])?,
            pinned: Operand::pinned(cuda, Workspace::DEFAULT_INT_BYTES)?,
        })
    }
}

/// The index arrays of a step in which each request has as many queries.
pub struct Arrays {
    pub batch: usize,
    pub page_size: usize,
    queries: usize,
    /// For planners.
    pub qo_indptr: Operand,
    pub kv_indptr: Operand,
    pub kv_lens: Operand,
    /// On the device: offsets of queries; offsets, numbers and last lengths of pages.
    device_qo_indptr: Operand,
    pub pages: [Operand; 3],
}

impl Arrays {
    pub fn new(cuda: &Arc<CudaStream>, indices: &PageIndices, queries: usize) -> Result<Self> {
        let batch = indices.batch_size();
        let offsets: Vec<i32> = (0..=batch).map(|request| (request * queries) as i32).collect();
        Ok(Self {
            batch,
            page_size: indices.page_size(),
            queries,
            qo_indptr: Operand::on_host(&offsets)?,
            kv_indptr: Operand::on_host(indices.indptr())?,
            kv_lens: Operand::on_host(&indices.seq_lens())?,
            device_qo_indptr: Operand::integers(cuda, &offsets)?,
            pages: [
                Operand::integers(cuda, indices.indptr())?,
                Operand::integers(cuda, indices.indices())?,
                Operand::integers(cuda, indices.last_page_len())?,
            ],
        })
    }
}

/// Attention by the functions of a prefill module, which also decode.
pub struct Attention<'a> {
    pub scratch: &'a Scratch,
    pub arrays: &'a Arrays,
    pub heads: Heads,
    pub causal: bool,
    pub fa3: bool,
    pub pdl: bool,
}

impl<'a> Attention<'a> {
    pub fn sm_scale(&self) -> f64 {
        1.0 / (HEAD_DIM as f64).sqrt()
    }

    pub fn plan(&self, module: &Module) -> Result<Raw<'a>> {
        let (scratch, arrays) = (self.scratch, self.arrays);
        let Heads { num_qo_heads, num_kv_heads } = self.heads;
        let mut held = packed![
            scratch.float.view(),
            scratch.int.view(),
            scratch.pinned.view(),
            arrays.qo_indptr.view(),
            arrays.kv_indptr.view(),
            arrays.kv_lens.view(),
            arrays.batch * arrays.queries,
            arrays.batch,
            num_qo_heads,
            num_kv_heads,
            arrays.page_size,
            false,
            HEAD_DIM,
            HEAD_DIM,
            self.causal,
            -1,
        ];
        if !self.fa3 {
            held.extend(packed![-1, false, 0]);
            if module.version().is_some_and(|version| version >= FlashInferVersion::new(0, 7, 4)) {
                held.extend(packed![0, false]);
            }
        }
        Ok(Raw { function: module.function("plan")?, held })
    }

    /// Of queries, keys and values to outputs.
    pub fn run<'t>(
        &self,
        module: &Module,
        info: &'t Object,
        [q, k, v, out]: [&'t TensorRef<'_>; 4],
    ) -> Result<Raw<'t>>
    where
        'a: 't,
    {
        let [indptr, indices, last_page_len] = self.arrays.pages.each_ref().map(Operand::view);
        let mut held = packed![
            self.scratch.float.view(),
            self.scratch.int.view(),
            info,
            q,
            k,
            v,
            self.arrays.device_qo_indptr.view(),
            indptr,
            indices,
            last_page_len,
            out,
            NONE,
            i64::from(self.causal),
            0,
            -1,
            self.pdl,
        ];
        held.extend((0..if self.fa3 { 4 } else { 8 }).map(|_| Packed::from(NONE)));
        held.extend(packed![0.0, self.sm_scale()]);
        held.extend(if self.fa3 { packed![1.0, 0] } else { packed![ROPE.0, ROPE.1, 0] });
        Ok(Raw { function: module.function("paged_run")?, held })
    }
}
