//! Turned queries, and turned keys and values in a paged cache of 16 bits, by a kernel of this crate.

use std::ffi::c_void;

use super::{DTYPES, options::Rotation};
use crate::{
    cuda::{Launch, PtxKernel},
    dtype::DType,
    error::{FlashInferError, Result},
    indices::{HostSlotMapping, SlotMapping},
    kv::PagedKvMut,
    ops::{
        check::Check,
        page::{DeviceArrays, check_append, check_slots},
    },
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

const PTX: &str = concat!(include_str!("append.ptx"), "\0");
static F16: PtxKernel = PtxKernel::new(PTX, c"rope_append_f16");
static BF16: PtxKernel = PtxKernel::new(PTX, c"rope_append_bf16");

/// Threads of a block.
const THREADS: u32 = 128;
/// Elements of a head that a thread has.
const ELEMENTS: i64 = 16;
/// The compute capability from which on a launch may overlap the one before.
const MIN_COMPUTE_CAPABILITY: (i32, i32) = (9, 0);

/// HeadRows as the kernel takes them.
#[repr(C)]
struct HeadRows {
    data: *mut c_void,
    token: u64,
    head: u64,
    heads: u32,
}

impl HeadRows {
    fn of(tensor: &RawTensor) -> Self {
        let [token, head] = [0, 1].map(|dim| tensor.strides()[dim] as u64);
        Self { data: tensor.data, token, head, heads: tensor.shape()[1] as u32 }
    }
}

/// What the kernel takes.
#[repr(C)]
struct Arguments {
    q: HeadRows,
    k: HeadRows,
    v: HeadRows,
    pages: [*mut c_void; 2],
    page: u64,
    slot: u64,
    head: u64,
    cos_sin: *mut c_void,
    pos_ids: *mut c_void,
    requests: *mut c_void,
    places: *mut c_void,
    indptr: *mut c_void,
    indices: *mut c_void,
    wide: u32,
    page_size: u32,
    head_dim: u32,
    rotary_dim: u32,
    interleave: u32,
    blocks: u32,
}

/// [`apply_rope_pos_ids_cos_sin_cache`](super::apply_rope_pos_ids_cos_sin_cache) of queries, in place, and of
/// keys, which go to a paged cache with values, as
/// [`append_paged_kv_cache`](crate::page::append_paged_kv_cache) writes them: one kernel in place of two, which
/// by programmatic dependent launch may overlap the kernels before and after it.
///
/// `q` is `[tokens, qo_heads, head_dim]`, `key` and `value` are `[tokens, kv_heads, head_dim]`, all `f16` or
/// all `bf16`, as the cache is; tokens and heads may be strided. What is turned is a multiple of 16 elements.
/// `slots` says where each token goes; the positions of `rotation` may be `slots.append`'s. No tokens are
/// nothing to do.
///
/// Call once before the first capture into a CUDA graph, because the first call compiles the kernel.
///
/// # Errors
/// [`Unsupported`](FlashInferError::Unsupported): the device's compute capability is below 9.0.
/// [`InvalidArgument`](FlashInferError::InvalidArgument) before anything is launched: a device, stream, dtype,
/// shape, stride or alignment does not fit; a position may have no row; the arrays of `slots` are of different
/// states of a batch; the stream is being captured and the kernel is not compiled yet. Else what CUDA said.
pub fn rope_append_paged_kv_cache(
    stream: &Stream,
    q: &mut TensorMut<'_>,
    [key, value]: [&TensorRef<'_>; 2],
    rotation: &Rotation<'_>,
    slots: &SlotMapping<'_>,
    cache: &mut PagedKvMut<'_>,
) -> Result<()> {
    let check = Check::new("rope_append_paged_kv_cache", stream)?;
    let host = check_slots(&check, slots)?;
    let tensors = [&q.raw, &key.raw, &value.raw];
    check_rope_append(&check, tensors, rotation, &host, cache)?;
    let pos_ids = rotation.positions(&check, q.raw.shape()[0])?;
    let runtime = FlashInferRuntime::get()?;
    let (major, minor) = runtime.compute_capability(stream.ordinal())?;
    if (major, minor) < MIN_COMPUTE_CAPABILITY {
        return Err(FlashInferError::Unsupported {
            what: format!("rope_append_paged_kv_cache on compute capability {major}.{minor}"),
            available: "9.0 and newer; below it, apply_rope_pos_ids_cos_sin_cache and append_paged_kv_cache"
                .into(),
        });
    }
    let kernel = if q.raw.dtype == DType::BF16 { &BF16 } else { &F16 };
    check.compiled("q", kernel)?;
    let [tokens, head_dim] = [0, 2].map(|dim| q.raw.shape()[dim] as u64);
    let heads: u64 = tensors.iter().map(|tensor| tensor.shape()[1] as u64).sum();
    let blocks = (heads * (head_dim / ELEMENTS as u64)).div_ceil(u64::from(THREADS));
    let Ok(grid @ 1..) = u32::try_from(tokens * blocks) else { return Ok(()) };
    let (arrays, (k, v)) = (DeviceArrays::of(slots)?, (&cache.k.raw, &cache.v.raw));
    let [slot, head] =
        <[i64; 2]>::from(cache.layout.page_size_and_heads(k.strides())).map(|stride| stride as u64);
    let mut arguments = Arguments {
        q: HeadRows::of(&q.raw),
        k: HeadRows::of(&key.raw),
        v: HeadRows::of(&value.raw),
        pages: [k.data, v.data],
        page: k.strides()[0] as u64,
        slot,
        head,
        cos_sin: rotation.cos_sin_cache.raw.data,
        pos_ids: pos_ids.data,
        requests: arrays.batch_indices.data,
        places: arrays.positions.data,
        indptr: arrays.indptr.data,
        indices: arrays.indices.data,
        wide: u32::from(pos_ids.dtype == DType::I64),
        page_size: host.pages.page_size() as u32,
        head_dim: head_dim as u32,
        rotary_dim: rotation.cos_sin_cache.raw.shape()[1] as u32,
        interleave: u32::from(rotation.interleave),
        blocks: blocks as u32,
    };
    let memory = [
        &q.raw,
        &key.raw,
        &value.raw,
        k,
        v,
        &rotation.cos_sin_cache.raw,
        &pos_ids,
        &arrays.batch_indices,
        &arrays.positions,
        &arrays.indptr,
        &arrays.indices,
    ]
    .map(Some);
    let mut args: [*mut c_void; 1] = [(&raw mut arguments).cast()];
    let launch = Launch { blocks: grid, threads: THREADS, overlaps: true };
    // SAFETY: the kernel takes these arguments. A thread reads and writes sixteen elements of a head of this
    // dtype, which was checked to be there; positions were checked to be below the rows of the table; the
    // index arrays are the device copies of values that were checked against each other and against a cache
    // of at most this many pages. It waits for the kernel before it before it reads or writes.
    unsafe { kernel.launch(runtime.cuda(), stream, launch, &mut args, &memory) }
}

/// All that the kernel of [`rope_append_paged_kv_cache`] assumes but of positions.
pub(crate) fn check_rope_append<P>(
    check: &Check<'_>,
    [q, key, value]: [&RawTensor; 3],
    rotation: &Rotation<'_, P>,
    slots: &HostSlotMapping<'_>,
    cache: &PagedKvMut<'_>,
) -> Result<()> {
    let shape = check_append(check, [key, value], slots, cache)?;
    check.tensor("key", key, &DTYPES, &[3])?;
    check.tensor("q", q, &[key.dtype], &[3])?;
    check.shape("q", q, &[slots.append.len() as i64, q.shape()[1], shape.head_dim])?;
    check.last_dim_contiguous("q", q)?;
    check.aligned("q", q, 16)?;
    rotation.check_table(check)?;
    let rotary_dim = rotation.cos_sin_cache.raw.shape()[1];
    if rotary_dim > shape.head_dim || rotary_dim == 0 || rotary_dim % ELEMENTS != 0 {
        return check.fail(
            "cos_sin_cache",
            format!(
                "its rows are for {rotary_dim} elements; expected a multiple of {ELEMENTS} up to the {} of heads",
                shape.head_dim
            ),
        );
    }
    let units = [q, key, value].iter().map(|tensor| tensor.shape()[1]).fold(0, i64::saturating_add);
    let units = units.saturating_mul(shape.head_dim / ELEMENTS).saturating_mul(q.shape()[0].max(1));
    if units > i64::from(i32::MAX) {
        return check
            .fail("q", format!("{units} parts of heads of {ELEMENTS} elements; there may be 2^31 − 1"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::Device,
        indices::{AppendIndices, PageIndices},
        kv::KvLayout,
        reference,
    };

    const ADDRESS: usize = 1 << 20;

    /// What is refused, in the words that the strict CPU path has, too.
    #[test]
    fn wrong_input_is_refused() {
        let table = PageIndices::from_requests(8, 16, [(&[7, 0][..], 20)]).unwrap();
        let append = AppendIndices::new(&table, vec![0], vec![19]).unwrap();
        let slots = SlotMapping::new(&append, &table);
        let tensor = |dtype, shape: &[usize]| {
            RawTensor::new(ADDRESS as *mut c_void, Device::Cpu, dtype, shape, None).unwrap()
        };
        let refused = |q: RawTensor, kv: RawTensor, rotary_dim: usize| {
            let [k, v] = [(); 2].map(|()| TensorMut::new(tensor(kv.dtype, &[8, 16, 2, 64])));
            let mut cache = PagedKvMut { k, v, layout: KvLayout::Nhd };
            let (mut q, kv) = (TensorMut::new(q), TensorRef::new(kv));
            let cos_sin_cache = TensorRef::new(tensor(DType::F32, &[32, rotary_dim]));
            let rotation = Rotation { cos_sin_cache, pos_ids: &[19][..], interleave: false };
            let _strict = reference::strict();
            match reference::rope_append_paged_kv_cache(&mut q, [&kv; 2], &rotation, &slots, &mut cache) {
                Err(FlashInferError::InvalidArgument { argument, .. }) => argument,
                other => panic!("{other:?}"),
            }
        };
        let f16 = |shape: &[usize]| tensor(DType::F16, shape);
        let (q, kv) = (f16(&[1, 4, 64]), f16(&[1, 2, 64]));
        assert_eq!(refused(f16(&[2, 4, 64]), kv, 64), "q");
        assert_eq!(refused(f16(&[1, 4, 128]), kv, 64), "q");
        assert_eq!(refused(tensor(DType::BF16, &[1, 4, 64]), kv, 64), "q");
        assert_eq!(refused(q, f16(&[1, 3, 64]), 64), "key");
        let e4m3 = |shape: &[usize]| tensor(DType::E4M3, shape);
        assert_eq!(refused(e4m3(&[1, 4, 64]), e4m3(&[1, 2, 64]), 64), "key");
        for rotary_dim in [0, 8, 40, 80] {
            assert_eq!(refused(q, kv, rotary_dim), "cos_sin_cache");
        }
    }
}
