//! What a run over a batch assumes of its arguments, whatever its plan and its GPU are.

use super::{
    modules::Family,
    options::{RunOptions, check_sm_scale},
    planned::{check_keys, check_output},
    published::{is_published, unpublished},
    resolve::flash_attention,
    spec::{AttentionSpec, Backend, Heads},
};
use crate::{
    artifacts::FlashInferVersion,
    error::Result,
    indices::PageIndices,
    kv::PagedKv,
    ops::{check::Check, page::check_cache},
    tensor::RawTensor,
};

/// A compute capability that has all of FlashAttention.
pub(super) const ANY_BACKEND: (i32, i32) = (9, 0);

/// The arguments of a run, and what its plan is for.
pub(crate) struct BatchRun<'a> {
    pub(crate) spec: &'a AttentionSpec,
    pub(crate) heads: Heads,
    /// Rows of queries.
    pub(crate) rows: usize,
    pub(crate) q: &'a RawTensor,
    pub(crate) out: &'a RawTensor,
    pub(crate) lse: Option<&'a RawTensor>,
    pub(crate) options: &'a RunOptions<'a>,
}

impl BatchRun<'_> {
    /// Queries, outputs and options.
    pub(crate) fn check(&self, check: &Check<'_>) -> Result<()> {
        check_output(check, self.spec, self.heads, self.rows, self.q, self.out, self.lse)?;
        self.options.check(check, self.spec, self.heads)
    }

    /// As [`check`](Self::check), on tensor cores.
    pub(crate) fn check_on_tensor_cores(&self, check: &Check<'_>) -> Result<()> {
        self.check(check)?;
        check_sm_scale(check, self.options.logit_scale(self.spec))
    }

    /// Keys and values in pages.
    pub(crate) fn check_pages(
        &self,
        check: &Check<'_>,
        kv: &PagedKv<'_>,
        table: &impl AsRef<PageIndices>,
    ) -> Result<()> {
        let cache = check_cache(check, [&kv.k.raw, &kv.v.raw], kv.layout, table, &[self.spec.dtype_kv])?;
        self.heads.check_cache(check, cache, self.spec.head_dim_qk)
    }

    /// Keys and values of `keys` rows, one after the other.
    pub(crate) fn check_rows(&self, check: &Check<'_>, kv: [&RawTensor; 2], keys: usize) -> Result<()> {
        check_keys(check, self.spec, self.heads, keys, kv)
    }
}

impl AttentionSpec {
    /// FlashInfer's wheels have a module of batch decode for this spec.
    pub(crate) fn check_decode(&self) -> Result<()> {
        self.check_paged()?;
        self.check_published(
            Family::Batch,
            match &self.backend {
                Backend::Auto => &[Backend::Fa2, Backend::CudaCores],
                asked => std::slice::from_ref(asked),
            },
        )
    }

    /// FlashInfer's wheels have a module of batch prefill for this spec.
    pub(crate) fn check_prefill(&self) -> Result<()> {
        self.check_published(Family::Batch, flash_attention(self.backend, ANY_BACKEND)?)
    }

    /// FlashInfer's wheels have a module of prefill of one request for this spec.
    pub(crate) fn check_single_prefill(&self) -> Result<()> {
        self.check_published(Family::Single, flash_attention(self.backend, ANY_BACKEND)?)
    }

    /// FlashInfer's wheels have a module of decode of one request for this spec.
    pub(crate) fn check_single_decode(&self) -> Result<()> {
        self.check_published(Family::Single, &[Backend::CudaCores])
    }

    fn check_published(&self, family: Family, backends: &[Backend]) -> Result<()> {
        const VERSION: FlashInferVersion = FlashInferVersion::OLDEST;
        if backends.iter().any(|&backend| is_published(self, VERSION, family, backend)) {
            return Ok(());
        }
        let name = self.module(VERSION, family, backends[0])?;
        Err(unpublished(self, family, backends.iter().copied(), name.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;

    use super::*;
    use crate::{
        device::Device,
        dtype::DType,
        indices::RaggedIndices,
        kv::KvLayout,
        reference,
        stream::Stream,
        tensor::{TensorMut, TensorRef},
    };

    /// What is wrong with a call.
    #[derive(Clone, Copy)]
    struct Call {
        q: (DType, [usize; 3]),
        out: (DType, [usize; 3]),
        lse: (DType, [usize; 2]),
        kv: (DType, [usize; 4]),
        offset: usize,
        sm_scale: f64,
    }

    /// One query of four heads for each of two requests, over pages of 16 tokens.
    const GOOD: Call = Call {
        q: (DType::F16, [2, 4, 64]),
        out: (DType::F16, [2, 4, 64]),
        lse: (DType::F32, [2, 4]),
        kv: (DType::F16, [8, 16, 2, 64]),
        offset: 0,
        sm_scale: 0.125,
    };

    impl Call {
        /// What is said of it on a device.
        fn said(self, device: Device, decode: bool) -> Option<String> {
            let at = |address: usize, (dtype, shape): (DType, &[usize])| {
                RawTensor::new(address as *mut c_void, device, dtype, shape, None).unwrap()
            };
            let q = TensorRef::new(at((1 << 20) + self.offset, (self.q.0, &self.q.1)));
            let mut out = TensorMut::new(at(1 << 30, (self.out.0, &self.out.1)));
            let mut lse = TensorMut::new(at(1 << 31, (self.lse.0, &self.lse.1)));
            let cache = TensorRef::new(at(1 << 40, (self.kv.0, &self.kv.1)));
            let kv = PagedKv { k: cache, v: cache, layout: KvLayout::Nhd };
            let spec = AttentionSpec::new(DType::F16, 64);
            let options = RunOptions::with_sm_scale(self.sm_scale);
            let table = PageIndices::from_requests(8, 16, [(&[7, 0][..], 20), (&[1][..], 3)]).unwrap();
            let queries = RaggedIndices::from_lens([1, 1]).unwrap();
            if device == Device::Cpu {
                let (lse, _strict) = (Some(&mut lse), reference::strict());
                let call = if decode {
                    reference::batch_decode(&spec, &q, &kv, &table, &mut out, lse, &options)
                } else {
                    let mask = reference::HostMask::Causal;
                    reference::batch_prefill_paged(
                        &spec, &q, &kv, &queries, &table, &mut out, lse, mask, &options,
                    )
                };
                return call.err().map(|error| error.to_string());
            }
            // SAFETY: nothing is enqueued on the stream.
            let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
            let op = if decode { "DecodePlan::run_with" } else { "PrefillPlan::run_with" };
            let check = Check::new(op, &stream).unwrap();
            let (heads, rows) =
                (Heads::new(self.q.1[1], self.kv.1[2]), if decode { 2 } else { self.q.1[0].max(2) });
            let (spec, options, lse) = (&spec, &options, Some(&lse.raw));
            let run = BatchRun { spec, heads, rows, q: &q.raw, out: &out.raw, lse, options };
            let call = if decode { run.check(&check) } else { run.check_on_tensor_cores(&check) };
            call.and_then(|()| run.check_pages(&check, &kv, &table)).err().map(|error| error.to_string())
        }
    }

    #[test]
    fn the_strict_reference_says_the_same() {
        let wrong = [
            Call { q: (DType::F32, GOOD.q.1), ..GOOD },
            Call { q: (DType::BF16, GOOD.q.1), ..GOOD },
            Call { q: (DType::F16, [2, 4, 128]), ..GOOD },
            Call { q: (DType::F16, [1, 4, 64]), ..GOOD },
            Call { offset: 8, ..GOOD },
            Call { out: (DType::F32, GOOD.out.1), ..GOOD },
            Call { out: (DType::F16, [2, 4, 63]), ..GOOD },
            Call { lse: (DType::F64, GOOD.lse.1), ..GOOD },
            Call { lse: (DType::F32, [4, 2]), ..GOOD },
            Call { kv: (DType::F32, GOOD.kv.1), ..GOOD },
            Call { kv: (DType::F16, [8, 16, 2, 128]), ..GOOD },
            Call { kv: (DType::F16, [8, 15, 2, 64]), ..GOOD },
            Call { kv: (DType::F16, [7, 16, 2, 64]), ..GOOD },
            Call { sm_scale: f64::NAN, ..GOOD },
        ];
        for (at, call) in wrong.into_iter().enumerate() {
            for decode in [true, false] {
                let on_gpu = call.said(Device::Cuda(0), decode);
                assert!(on_gpu.is_some(), "{at} is wrong");
                assert_eq!(call.said(Device::Cpu, decode), on_gpu, "{at}");
            }
        }
        for decode in [true, false] {
            assert_eq!(GOOD.said(Device::Cuda(0), decode), None);
        }
        let small = Call { sm_scale: 1e-4, ..GOOD };
        assert_eq!(small.said(Device::Cpu, false), small.said(Device::Cuda(0), false));
        assert!(small.said(Device::Cpu, false).unwrap().contains("sm_scale"));
    }

    #[test]
    fn specs_without_a_module_are_refused() {
        let call = |head_dim| {
            let spec = AttentionSpec::new(DType::F16, head_dim);
            [spec.check_decode(), spec.check_prefill()].map(|result| result.is_ok())
        };
        assert_eq!([call(64), call(128), call(256)], [[true; 2]; 3]);
        assert_eq!([call(96), call(1 << 20)], [[false; 2]; 2]);
    }
}
