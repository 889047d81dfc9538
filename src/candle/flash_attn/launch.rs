//! Calls on CUDA tensors, and what each thread keeps for its streams.

use std::{cell::RefCell, sync::Arc};

use candle_core::{
    CudaStorage, DType, Device, Error, Result,
    backend::BackendStorage,
    bail,
    cuda_backend::{
        CudaDType,
        cudarc::driver::{CudaSlice, CudaStream, DeviceRepr},
    },
};

use super::{
    super::tensor,
    operation::{CallKeys, FlashAttnCall},
    visible::Visible,
};
use crate::{
    FlashInferError, Stream,
    attention::{
        AttentionSpec, Backend, BatchDecode, BatchPrefill, Heads, Mask, PagedBatch, PlanOptions, Workspace,
    },
    dtype::Element,
    gpu::{exclusive, shared},
    indices::{IndexArrays, MaskTable, OnDevice, PageIndices, PageTable, RaggedTable},
    kv::{KvLayout, PagedKv},
    tensor::{TensorMut, TensorRef},
};

/// Batches that a thread keeps for each stream, with their plans: layers of two
/// kinds in turn, and a step of another shape now and then, find theirs again.
const MAX_STEPS: usize = 4;
/// Streams that a thread keeps something for, and modules for each.
const MAX_STREAMS: usize = 8;
const MAX_MODULES: usize = 16;
/// Requests and pages that tables have room for at least.
const MIN_REQUESTS: usize = 64;
const MIN_PAGES: usize = 4096;

thread_local! {
    static STREAMS: RefCell<Vec<OnStream>> = const { RefCell::new(Vec::new()) };
}

/// Frees what the calling thread keeps.
pub(super) fn release_workspaces() {
    // Freed when the list is no longer borrowed. A thread that ends has none.
    drop(STREAMS.try_with(RefCell::take));
}

/// Attention of CUDA tensors whose views are the call's.
pub(super) fn attention(call: &FlashAttnCall, storages: [&CudaStorage; 3]) -> Result<CudaStorage> {
    match storages[0].dtype() {
        DType::F16 => typed::<half::f16>(call, storages),
        DType::BF16 => typed::<half::bf16>(call, storages),
        other => bail!("flash_attn: tensors of {}; on CUDA there are f16 and bf16", other.as_str()),
    }
}

fn typed<T>(call: &FlashAttnCall, storages: [&CudaStorage; 3]) -> Result<CudaStorage>
where
    T: CudaDType + DeviceRepr + Element,
{
    let (device, [rows, heads, width]) = (storages[0].device(), call.rows());
    let stream = device.cuda_stream();
    let [q, k, v] = [0, 1, 2].map(|at| tensor::on_cuda(storages[at], &call.views[at], &stream));
    let (q, k, v) = (q?, k?, v?);
    // SAFETY: the kernel writes all elements before anything reads them, because
    // each row belongs to a request; if it is not launched, they are freed.
    let mut slice = unsafe { device.alloc::<T>(rows * heads * width) }?;
    let mut out = exclusive(&mut slice, &stream, 0, &[rows, heads, width], None).map_err(tensor::error)?;
    let run = |streams: &RefCell<Vec<OnStream>>| {
        let (mut streams, kv) = (streams.borrow_mut(), [&k.view(), &v.view()]);
        call.beside(&Device::Cuda(device.clone()), |sinks, lse| {
            let (q, out) = (&q.view(), &mut out.view_mut());
            OnStream::of(&mut streams, &stream).run(call, Operands { q, kv, sinks, out, lse })
        })
    };
    match STREAMS.try_with(run) {
        Ok(result) => result?,
        Err(_) => bail!("flash_attn: the thread is ending and has given its workspaces back"),
    }
    drop(out);
    Ok(CudaStorage::wrap_cuda_slice(slice, device.clone()))
}

/// What a call reads and writes.
struct Operands<'a, 'o, 'l> {
    q: &'a TensorRef<'a>,
    kv: [&'a TensorRef<'a>; 2],
    sinks: Option<TensorRef<'a>>,
    out: &'a mut TensorMut<'o>,
    lse: Option<&'a mut TensorMut<'l>>,
}

/// What serves calls.
#[derive(Clone, Copy)]
enum Kernels {
    Prefill(BatchPrefill),
    /// Calls of one query for each request over pages, where there is no module of prefill.
    Decode(BatchDecode),
}

impl Kernels {
    fn serves(&self, call: &FlashAttnCall) -> bool {
        let backendless = |spec: &AttentionSpec| AttentionSpec { backend: Backend::Auto, ..*spec };
        match self {
            Self::Prefill(prefill) => (prefill.spec(), prefill.heads()) == (&call.spec, call.heads),
            Self::Decode(decode) => {
                call.is_decode() && (*decode.spec(), decode.heads()) == (backendless(&call.spec), call.heads)
            }
        }
    }

    fn load(stream: &Stream, call: &FlashAttnCall) -> crate::Result<Self> {
        let missing = match BatchPrefill::new(stream, &call.spec, call.heads) {
            Ok(prefill) => return Ok(Self::Prefill(prefill)),
            Err(error) => error,
        };
        if !call.is_decode() {
            return Err(missing);
        }
        let decode = BatchDecode::new(stream, &call.spec.with_backend(Backend::Auto), call.heads);
        decode.map(Self::Decode).map_err(|_| missing)
    }
}

/// What a thread keeps for a stream.
struct OnStream {
    stream: Stream,
    cuda: Arc<CudaStream>,
    modules: Vec<Kernels>,
    /// The one that was used last comes last.
    steps: Vec<DeviceBatch>,
}

impl OnStream {
    /// What is kept for a stream, which becomes the last.
    fn of<'s>(streams: &'s mut Vec<Self>, cuda: &Arc<CudaStream>) -> &'s mut Self {
        let stream = Stream::from(cuda);
        match streams.iter().rposition(|kept| kept.stream == stream) {
            Some(at) => streams[at..].rotate_left(1),
            None => {
                if streams.len() == MAX_STREAMS {
                    streams.remove(0);
                }
                streams.push(Self { stream, cuda: cuda.clone(), modules: Vec::new(), steps: Vec::new() });
            }
        }
        let last = streams.len() - 1;
        &mut streams[last]
    }

    fn run(&mut self, call: &FlashAttnCall, operands: Operands<'_, '_, '_>) -> Result<()> {
        let module = self.module(call)?;
        match self.steps.iter().rposition(|step| step.is_of(call)) {
            Some(at) => self.steps[at..].rotate_left(1),
            None => {
                if self.steps.len() == MAX_STEPS {
                    self.steps.rotate_left(1);
                } else {
                    self.steps.push(DeviceBatch::new(&self.stream, self.steps.first())?);
                }
                let last = self.steps.len() - 1;
                self.steps[last].become_of(call, &self.stream, &self.cuda)?;
            }
        }
        let last = self.steps.len() - 1;
        self.steps[last].run(&module, call, &self.cuda, operands).map_err(tensor::error)
    }

    /// What serves a call.
    fn module(&mut self, call: &FlashAttnCall) -> Result<Kernels> {
        if let Some(module) = self.modules.iter().find(|module| module.serves(call)) {
            return Ok(*module);
        }
        let module = Kernels::load(&self.stream, call).map_err(tensor::error)?;
        if self.modules.len() == MAX_MODULES {
            self.modules.remove(0);
        }
        self.modules.push(module);
        Ok(module)
    }
}

/// What tells calls apart, besides their offsets and pages.
struct Key {
    spec: AttentionSpec,
    heads: Heads,
    visible: Visible,
    slopes: Option<Vec<f32>>,
    /// Tables of the other kind may be left from an earlier batch.
    paged: bool,
}

/// A batch on the device, and the workspace with its plan.
struct DeviceBatch {
    /// `None` until all of the rest belongs to it.
    key: Option<Key>,
    workspace: Workspace,
    queries: Option<RaggedTable>,
    /// One of the two.
    ragged: Option<RaggedTable>,
    paged: Option<PageTable>,
    masks: Option<MaskTable>,
    /// The bits of a mask.
    bits: Option<CudaSlice<u8>>,
    slopes: Option<CudaSlice<f32>>,
}

/// Replaces the arrays of a table, in place if they fit.
fn put<T: IndexArrays>(
    table: &mut Option<OnDevice<T>>,
    host: T,
    make: impl FnOnce(T) -> crate::Result<OnDevice<T>>,
) -> Result<()> {
    let put = match table {
        Some(table) if table.has_room_for(&host) => table.update(host),
        _ => make(host).map(|made| *table = Some(made)),
    };
    put.map_err(tensor::error)
}

fn same_pages(one: &PageIndices, other: &PageIndices) -> bool {
    (one.num_pages(), one.page_size()) == (other.num_pages(), other.page_size())
        && one.indptr() == other.indptr()
        && one.last_page_len() == other.last_page_len()
        && one.indices() == other.indices()
}

impl DeviceBatch {
    /// For a batch to come. Steps of a stream share the memory for partial
    /// results: they are one thread's, which enqueues one run after the other.
    fn new(stream: &Stream, other: Option<&Self>) -> Result<Self> {
        let workspace = match other {
            Some(step) => step.workspace.beside(),
            None => Workspace::new(stream),
        };
        Ok(Self {
            key: None,
            workspace: workspace.map_err(tensor::error)?,
            queries: None,
            ragged: None,
            paged: None,
            masks: None,
            bits: None,
            slopes: None,
        })
    }

    /// Whether this is the call's batch.
    fn is_of(&self, call: &FlashAttnCall) -> bool {
        let of = |key: &Key| {
            (key.spec, key.heads) == (call.spec, call.heads)
                && (&key.visible, &key.slopes) == (&call.visible, &call.slopes)
                && key.paged == matches!(call.keys, CallKeys::Paged(_))
        };
        let queries = || self.queries.as_ref().is_some_and(|q| q.host().indptr() == call.queries.indptr());
        let keys = || match &call.keys {
            CallKeys::Ragged(keys) => {
                self.ragged.as_ref().is_some_and(|k| k.host().indptr() == keys.indptr())
            }
            CallKeys::Paged(pages) => {
                self.paged.as_ref().is_some_and(|table| same_pages(table.host(), pages))
            }
        };
        self.key.as_ref().is_some_and(of) && queries() && keys()
    }

    /// Puts the call's batch in the place of the last one.
    fn become_of(&mut self, call: &FlashAttnCall, stream: &Stream, cuda: &Arc<CudaStream>) -> Result<()> {
        self.key = None;
        let room = |requests: usize| requests.next_power_of_two().max(MIN_REQUESTS);
        put(&mut self.queries, call.queries.clone(), |host| {
            let requests = room(host.batch_size());
            RaggedTable::with_capacity(stream, host, requests)
        })?;
        match &call.keys {
            CallKeys::Ragged(keys) => put(&mut self.ragged, keys.clone(), |host| {
                let requests = room(host.batch_size());
                RaggedTable::with_capacity(stream, host, requests)
            })?,
            CallKeys::Paged(pages) => put(&mut self.paged, pages.clone(), |host| {
                let pages = host.indices().len().next_power_of_two().max(MIN_PAGES);
                let requests = room(host.batch_size());
                PageTable::with_capacity(stream, host, requests, pages)
            })?,
        }
        self.bits = None;
        if let Some((indices, bits)) = call.visible.pack(&call.requests).map_err(tensor::error)? {
            put(&mut self.masks, indices, |host| {
                let requests = room(host.batch_size());
                MaskTable::with_capacity(stream, host, requests)
            })?;
            self.bits = Some(cuda.clone_htod(&bits).map_err(Error::wrap)?);
        }
        let slopes = call.slopes.as_ref().map(|slopes| cuda.clone_htod(slopes)).transpose();
        self.slopes = slopes.map_err(Error::wrap)?;
        self.key = Some(Key {
            spec: call.spec,
            heads: call.heads,
            visible: call.visible.clone(),
            slopes: call.slopes.clone(),
            paged: matches!(call.keys, CallKeys::Paged(_)),
        });
        Ok(())
    }

    /// Runs the call, whose batch this is. The workspace has its plan, unless
    /// this is the first time.
    fn run(
        &mut self,
        module: &Kernels,
        call: &FlashAttnCall,
        cuda: &Arc<CudaStream>,
        Operands { q, kv: [k, v], sinks, out, lse }: Operands<'_, '_, '_>,
    ) -> crate::Result<()> {
        let bits = self.bits.as_ref().map(|bits| shared(bits, cuda, 0, &[bits.len()], None)).transpose()?;
        let slopes = self.slopes.as_ref().map(|all| shared(all, cuda, 0, &[all.len()], None)).transpose()?;
        let mask = match (&self.masks, &bits) {
            (Some(indices), Some(bits)) => Mask::Custom { indices, bits: bits.view() },
            _ if matches!(call.visible, Visible::Causal { .. }) => Mask::Causal,
            _ => Mask::None,
        };
        let options = PlanOptions::default().with_mask(mask);
        let run = call.options(slopes.as_ref().map(|slopes| slopes.view()), sinks);
        let workspace = &mut self.workspace;
        let paged = PagedKv::new(*k, *v, KvLayout::Nhd);
        match (&call.keys, module, &self.queries, &self.ragged, &self.paged) {
            (CallKeys::Ragged(_), Kernels::Prefill(prefill), Some(queries), Some(keys), _) => {
                prefill.plan_ragged(workspace, queries, keys, &options)?.run_with(q, [k, v], out, lse, &run)
            }
            (CallKeys::Paged(_), Kernels::Prefill(prefill), Some(queries), _, Some(table)) => {
                let batch = PagedBatch::new(queries, table);
                prefill.plan_paged(workspace, batch, &options)?.run_with(q, &paged, out, lse, &run)
            }
            (CallKeys::Paged(_), Kernels::Decode(decode), _, _, Some(table)) => {
                decode.plan(workspace, table, &options)?.run_with(q, &paged, out, lse, &run)
            }
            _ => Err(FlashInferError::invalid("flash_attn", "batch", "it is of another call")),
        }
    }
}
