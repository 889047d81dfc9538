//! A call as an operation of candle's, and the work on the CPU.

#[cfg(not(feature = "candle-cuda"))]
use candle_core::bail;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp3, Device, Layout, Result, Shape, Tensor,
    backend::{BackendDevice, BackendStorage},
    cpu_backend::CpuDevice,
};

#[cfg(feature = "candle-cuda")]
use super::launch;
use super::{
    super::{lse::Lse, tensor},
    visible::{Request, Visible},
};
use crate::{
    attention::{AttentionSpec, Heads, RunOptions},
    indices::{PageIndices, RaggedIndices},
    kv::{KvLayout, PagedKv},
    reference,
    tensor::{TensorMut, TensorRef},
};

/// What keys and values were divided by when they were quantized.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct CacheScales {
    pub(super) k: f64,
    pub(super) v: f32,
}

/// Keys of a call, and where requests have them.
pub(super) enum CallKeys {
    Ragged(RaggedIndices),
    Paged(PageIndices),
}

/// One call, in the kernels' terms.
pub(super) struct FlashAttnCall {
    pub(super) spec: AttentionSpec,
    pub(super) heads: Heads,
    pub(super) softmax_scale: f64,
    pub(super) visible: Visible,
    pub(super) requests: Vec<Request>,
    pub(super) queries: RaggedIndices,
    pub(super) keys: CallKeys,
    pub(super) slopes: Option<Vec<f32>>,
    /// Of 8-bit keys and values.
    pub(super) scales: Option<CacheScales>,
    pub(super) sinks: Option<Tensor>,
    /// Where the LSE goes, if it is asked for.
    pub(super) lse: Option<Lse>,
    /// Queries, keys and values as the kernels see them.
    pub(super) views: [Layout; 3],
    pub(super) out: Shape,
}

impl FlashAttnCall {
    /// One query for each request, which sees its keys in pages up to the last.
    #[cfg(feature = "candle-cuda")]
    pub(super) fn is_decode(&self) -> bool {
        matches!(self.keys, CallKeys::Paged(_))
            && !matches!(self.visible, Visible::Bits { .. })
            && self.slopes.is_none()
            && self.requests.iter().all(|request| request.queries == 1)
    }

    /// The output's rows, heads and width.
    pub(super) fn rows(&self) -> [usize; 3] {
        [self.queries.total(), self.heads.num_qo_heads, self.spec.head_dim_vo]
    }

    pub(super) fn options<'a>(
        &self,
        slopes: Option<TensorRef<'a>>,
        sinks: Option<TensorRef<'a>>,
    ) -> RunOptions<'a> {
        RunOptions {
            alibi_slopes: slopes,
            sinks,
            // They may come from the kernel just before.
            enable_pdl: sinks.is_some().then_some(false),
            k_scale: self.scales.map(|scales| scales.k),
            v_scale: self.scales.map(|scales| scales.v),
            ..RunOptions::with_sm_scale(self.softmax_scale)
        }
    }

    /// Calls `run` with the sinks, and with room for the LSE.
    pub(super) fn beside(
        &self,
        device: &Device,
        run: impl FnOnce(Option<TensorRef<'_>>, Option<&mut TensorMut<'_>>) -> Result<()>,
    ) -> Result<()> {
        let [rows, heads, _] = self.rows();
        tensor::with_view(self.sinks.as_ref(), device, |sinks| {
            Lse::with_view(self.lse.as_ref(), [rows, heads], device, |lse| run(sinks, lse))
        })
    }

    fn on_cpu(&self, storages: [&CpuStorage; 3]) -> Result<CpuStorage> {
        let [q, k, v] = [0, 1, 2].map(|at| tensor::on_cpu(storages[at], &self.views[at]));
        let (q, k, v) = (q?, k?, v?);
        let [rows, heads, width] = self.rows();
        let mut storage = CpuDevice.zeros_impl(&self.out, storages[0].dtype())?;
        let mut out = tensor::on_cpu_mut(&mut storage, &Layout::contiguous((rows, heads, width)))?;
        let packed = self.visible.pack(&self.requests).map_err(tensor::error)?;
        let mask = match (&self.visible, &packed) {
            (_, Some((indices, bits))) => reference::HostMask::Custom(indices, bits),
            (Visible::Causal { .. }, _) => reference::HostMask::Causal,
            _ => reference::HostMask::None,
        };
        let slopes = self.slopes.as_ref().map(|slopes| TensorRef::from_slice(slopes, &[slopes.len()]));
        let slopes = slopes.transpose().map_err(tensor::error)?;
        let (paged, ragged) = (PagedKv::new(k, v, KvLayout::Nhd), [&k, &v]);
        let kv = match &self.keys {
            CallKeys::Paged(table) => reference::KeysAndValues::Paged(&paged, table),
            CallKeys::Ragged(keys) => reference::KeysAndValues::Ragged(ragged, keys),
        };
        self.beside(&Device::Cpu, |sinks, lse| {
            let (options, queries) = (self.options(slopes, sinks), &self.queries);
            reference::flash_attention(&self.spec, &q, &kv, queries, &mut out, lse, mask, &options)
                .map_err(tensor::error)
        })?;
        Ok(storage)
    }
}

impl CustomOp3 for FlashAttnCall {
    fn name(&self) -> &'static str {
        "flash_attn"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        _: &Layout,
        k: &CpuStorage,
        _: &Layout,
        v: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((self.on_cpu([q, k, v])?, self.out.clone()))
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        _: &Layout,
        k: &CudaStorage,
        _: &Layout,
        v: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Ok((launch::attention(self, [q, k, v])?, self.out.clone()))
    }

    #[cfg(not(feature = "candle-cuda"))]
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        bail!("flash_attn: CUDA tensors need flashinfer-rs with its feature `candle-cuda`")
    }
}
