//! Appending to a paged KV cache, in FlashInfer's module `page`.
//!
//! Source of the contract: `csrc/page.cu`, `include/flashinfer/page.cuh` of
//! FlashInfer 0.6.13.

use super::{FixedFunction, check::Check};
use crate::{
    dtype::DType,
    error::Result,
    ffi::{DlTensor, Kernel, Signature, kernels},
    indices::{HostSlotMapping, PageIndices, SlotMapping},
    kv::{KvLayout, PagedKvMut, layout::MLA_DIMS},
    module::ModuleName,
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
    struct AppendPagedKvCache = "append_paged_kv_cache"(
        append_key: Tensor, append_value: Tensor, batch_indices: Tensor, positions: Tensor,
        paged_k_cache: Tensor, paged_v_cache: Tensor,
        kv_indices: Tensor, kv_indptr: Tensor, kv_last_page_len: Tensor, layout: Int,
    ) -> "void";
    struct AppendPagedMlaKvCache = "append_paged_mla_kv_cache"(
        append_ckv: Tensor, append_kpe: Tensor, batch_indices: Tensor, positions: Tensor,
        ckv_cache: Tensor, kpe_cache: Tensor,
        kv_indices: Tensor, kv_indptr: Tensor, kv_last_page_len: Tensor,
    ) -> "void";
}

impl ModuleName {
    /// Appending to a paged KV cache.
    pub const PAGE: Self = Self::fixed("page");
}

pub(super) const SIGNATURES: &[(&str, &[Signature])] =
    &[("page", AppendPagedKvCache::SIGNATURES), ("page", AppendPagedMlaKvCache::SIGNATURES)];

static APPEND: FixedFunction = FixedFunction::of(ModuleName::PAGE, AppendPagedKvCache::SIGNATURES);
static APPEND_MLA: FixedFunction = FixedFunction::of(ModuleName::PAGE, AppendPagedMlaKvCache::SIGNATURES);

/// Element types of a cache.
const DTYPES: [DType; 4] = [DType::F16, DType::BF16, DType::E4M3, DType::E5M2];
/// Head dimensions that the kernel is compiled for.
const HEAD_DIMS: [i64; 4] = [64, 128, 256, 512];

/// The sizes of a checked cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CacheShape {
    pub(crate) heads: i64,
    pub(crate) head_dim: i64,
}

/// Checks a cache against a page table: the pages that the table names exist,
/// with the page size it was made for.
pub(crate) fn check_cache(
    check: &Check<'_>,
    [k, v]: [&RawTensor; 2],
    layout: KvLayout,
    table: &impl AsRef<PageIndices>,
    dtypes: &[DType],
) -> Result<CacheShape> {
    check.tensor("kv.k", k, dtypes, &[4])?;
    check.tensor("kv.v", v, &[k.dtype], &[4])?;
    check.shape("kv.v", v, k.shape())?;
    if k.strides() != v.strides() {
        return check.fail(
            "kv.v",
            format!(
                "its strides are {:?}, those of kv.k are {:?}; they must be equal",
                v.strides(),
                k.strides()
            ),
        );
    }
    let (page_size, heads) = layout.page_size_and_heads(k.shape());
    check_pages(check, "kv.k", k.shape()[0], page_size, table.as_ref())?;
    check_rows_in_32_bits(check, "kv.k", k)?;
    check_rows_in_32_bits(check, "kv.v", v)?;
    Ok(CacheShape { heads, head_dim: k.shape()[3] })
}

fn check_pages(
    check: &Check<'_>,
    argument: &'static str,
    pages: i64,
    page_size: i64,
    table: &PageIndices,
) -> Result<()> {
    if page_size != table.page_size() as i64 {
        return check.fail(
            argument,
            format!("its pages hold {page_size} tokens, those of the page table {}", table.page_size()),
        );
    }
    if pages < table.num_pages() as i64 {
        return check.fail(
            argument,
            format!("it has {pages} pages, but the page table was checked for {}", table.num_pages()),
        );
    }
    Ok(())
}

/// Checks the compressed and the position part of an MLA cache against a page
/// table, as [`check_cache`] does.
pub(crate) fn check_mla_cache(
    check: &Check<'_>,
    names: [&'static str; 2],
    parts: [&RawTensor; 2],
    table: &impl AsRef<PageIndices>,
    dtypes: &[DType],
) -> Result<()> {
    check.tensor(names[0], parts[0], dtypes, &[3])?;
    let (dtype, pages, page_size) = (parts[0].dtype, parts[0].shape()[0], parts[0].shape()[1]);
    check_pages(check, names[0], pages, page_size, table.as_ref())?;
    for ((name, part), dim) in names.into_iter().zip(parts).zip(MLA_DIMS) {
        check.tensor(name, part, &[dtype], &[3])?;
        check.shape(name, part, &[pages, page_size, dim])?;
        check_rows_in_32_bits(check, name, part)?;
    }
    Ok(())
}

/// Rows are adjacent elements, vectors of 16 bytes are aligned, and each
/// stride fits the 32 bits in which kernels keep it.
pub(crate) fn check_rows_in_32_bits(
    check: &Check<'_>,
    argument: &'static str,
    cache: &RawTensor,
) -> Result<()> {
    check.last_dim_contiguous(argument, cache)?;
    check.aligned(argument, cache, 16)?;
    if let Some(stride) = cache.strides().iter().find(|&&stride| stride > i64::from(u32::MAX)) {
        return check
            .fail(argument, format!("a stride of {stride} elements; kernels keep strides in 32 bits"));
    }
    Ok(())
}

/// Writes new keys and values to their places in a paged cache.
///
/// `key` and `value` are `[tokens, heads, head_dim]`, of the cache's dtype
/// (`f16`, `bf16`, `e4m3`, `e5m2`; nothing is converted); `slots` says where each
/// token goes. Head dimensions are 64, 128, 256 and 512. No tokens are nothing to do.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) before anything is
/// launched: a device, stream, dtype, shape, stride or alignment does not fit;
/// the arrays of `slots` are of different states of a batch; a block would need
/// more than 1024 threads. Else what the module or CUDA said.
pub fn append_paged_kv_cache(
    stream: &Stream,
    key: &TensorRef<'_>,
    value: &TensorRef<'_>,
    slots: &SlotMapping<'_>,
    cache: &mut PagedKvMut<'_>,
) -> Result<()> {
    let check = Check::new("append_paged_kv_cache", stream)?;
    let host = check_slots(&check, slots)?;
    let shape = check_append(&check, [&key.raw, &value.raw], &host, cache)?;
    if host.append.is_empty() || shape.heads == 0 {
        return Ok(());
    }
    let arrays = DeviceArrays::of(slots)?;
    let kernel = AppendPagedKvCache {
        append_key: key.into(),
        append_value: value.into(),
        batch_indices: DlTensor::new(&arrays.batch_indices),
        positions: DlTensor::new(&arrays.positions),
        paged_k_cache: DlTensor::new(&cache.k.raw),
        paged_v_cache: DlTensor::new(&cache.v.raw),
        kv_indices: DlTensor::new(&arrays.indices),
        kv_indptr: DlTensor::new(&arrays.indptr),
        kv_last_page_len: DlTensor::new(&arrays.last_page_len),
        layout: cache.layout.code(),
    };
    // SAFETY: tensors were checked for all that the kernel assumes; the index
    // arrays are the device copies of values that were checked against each
    // other and against a cache of at most this many pages.
    unsafe { kernel.call(APPEND.get(FlashInferRuntime::get()?)?, stream) }.map(drop)
}

/// All that the kernel of [`append_paged_kv_cache`] assumes of tensors.
pub(crate) fn check_append(
    check: &Check<'_>,
    [key, value]: [&RawTensor; 2],
    slots: &HostSlotMapping<'_>,
    cache: &PagedKvMut<'_>,
) -> Result<CacheShape> {
    let (k, v) = (&cache.k.raw, &cache.v.raw);
    let shape = check_cache(check, [k, v], cache.layout, slots.pages, &DTYPES)?;
    if !HEAD_DIMS.contains(&shape.head_dim) {
        return check.fail("kv.k", format!("head_dim {}; the kernel has {HEAD_DIMS:?}", shape.head_dim));
    }
    for (name, tensor) in [("key", key), ("value", value)] {
        check.tensor(name, tensor, &[k.dtype], &[3])?;
        check.shape(name, tensor, &[slots.append.len() as i64, shape.heads, shape.head_dim])?;
        check.last_dim_contiguous(name, tensor)?;
        check.aligned(name, tensor, 16)?;
    }
    let vector = (16 / k.dtype.size() as i64).max(shape.head_dim / 32);
    let threads = shape.head_dim / vector * shape.heads;
    if threads > 1024 {
        return check.fail(
            "kv.k",
            format!(
                "{} heads of {} elements need {threads} threads in a block; the GPU has 1024, enough for {} heads",
                shape.heads,
                shape.head_dim,
                1024 / (shape.head_dim / vector)
            ),
        );
    }
    Ok(shape)
}

/// Writes new tokens to their places in the paged cache of multi-head latent
/// attention.
///
/// `ckv` is `[tokens, 512]`, `kpe` `[tokens, 64]`; the caches are
/// `[pages, page_size, 512]` and `[pages, page_size, 64]`, all of one dtype
/// (`f16`, `bf16`, `e4m3`, `e5m2`). The caches may be the parts of one tensor
/// `[pages, page_size, 576]`; see [`TensorMut::split_at`].
///
/// # Errors
/// As [`append_paged_kv_cache`].
pub fn append_paged_mla_kv_cache(
    stream: &Stream,
    ckv: &TensorRef<'_>,
    kpe: &TensorRef<'_>,
    slots: &SlotMapping<'_>,
    caches: [&mut TensorMut<'_>; 2],
) -> Result<()> {
    let check = Check::new("append_paged_mla_kv_cache", stream)?;
    let host = check_slots(&check, slots)?;
    let [ckv_cache, kpe_cache] = caches.map(|cache| cache.raw);
    let (new, caches) = ([&ckv.raw, &kpe.raw], [&ckv_cache, &kpe_cache]);
    check_append_mla(&check, new, &host, caches)?;
    if host.append.is_empty() {
        return Ok(());
    }
    let arrays = DeviceArrays::of(slots)?;
    let kernel = AppendPagedMlaKvCache {
        append_ckv: ckv.into(),
        append_kpe: kpe.into(),
        batch_indices: DlTensor::new(&arrays.batch_indices),
        positions: DlTensor::new(&arrays.positions),
        ckv_cache: DlTensor::new(&ckv_cache),
        kpe_cache: DlTensor::new(&kpe_cache),
        kv_indices: DlTensor::new(&arrays.indices),
        kv_indptr: DlTensor::new(&arrays.indptr),
        kv_last_page_len: DlTensor::new(&arrays.last_page_len),
    };
    // SAFETY: as in `append_paged_kv_cache`; both caches have the pages and
    // page size that the table was checked for.
    unsafe { kernel.call(APPEND_MLA.get(FlashInferRuntime::get()?)?, stream) }.map(drop)
}

/// All that the kernel of [`append_paged_mla_kv_cache`] assumes of tensors.
pub(crate) fn check_append_mla(
    check: &Check<'_>,
    new: [&RawTensor; 2],
    slots: &HostSlotMapping<'_>,
    caches: [&RawTensor; 2],
) -> Result<()> {
    check_mla_cache(check, ["ckv_cache", "kpe_cache"], caches, slots.pages, &DTYPES)?;
    for ((name, rows), dim) in ["ckv", "kpe"].into_iter().zip(new).zip(MLA_DIMS) {
        check.tensor(name, rows, &[caches[0].dtype], &[2])?;
        check.shape(name, rows, &[slots.append.len() as i64, dim])?;
        check.last_dim_contiguous(name, rows)?;
        check.aligned(name, rows, 16)?;
    }
    Ok(())
}

/// The values on the host, which are of one state of a batch, with their copies on the operation's
/// stream.
pub(super) fn check_slots<'a>(check: &Check<'_>, slots: &SlotMapping<'a>) -> Result<HostSlotMapping<'a>> {
    check.on_stream("append", slots.append.stream())?;
    check.on_stream("table", slots.pages.stream())?;
    let host = HostSlotMapping::new(slots.append.host(), slots.pages.host());
    host.check(check.op())?;
    Ok(host)
}

/// The index arrays of an append on the device.
pub(super) struct DeviceArrays {
    pub(super) batch_indices: RawTensor,
    pub(super) positions: RawTensor,
    pub(super) indptr: RawTensor,
    pub(super) indices: RawTensor,
    last_page_len: RawTensor,
}

impl DeviceArrays {
    pub(super) fn of(slots: &SlotMapping<'_>) -> Result<Self> {
        let SlotMapping { append, pages } = slots;
        Ok(Self {
            batch_indices: append.batch_indices()?,
            positions: append.positions()?,
            indptr: pages.indptr()?,
            indices: pages.indices()?,
            last_page_len: pages.last_page_len()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;

    use super::*;
    use crate::{
        FlashInferError,
        device::Device,
        indices::{PageIndices, PageTable},
    };

    const ADDRESS: usize = 1 << 20;

    #[test]
    fn caches_are_checked_against_their_table() {
        // SAFETY: nothing is enqueued on the stream.
        let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
        let pages = PageIndices::from_requests(8, 16, [(&[7, 0][..], 20)]).unwrap();
        let null = std::ptr::null();
        // SAFETY: no work uses the table.
        let table = unsafe { PageTable::from_device_unchecked(&stream, pages, null, null, null) };
        let at = |address: usize, dtype, shape: [usize; 4], strides: Option<&[usize]>| {
            RawTensor::new(address as *mut c_void, Device::Cuda(0), dtype, &shape, strides).unwrap()
        };
        let of = |shape| at(ADDRESS, DType::F16, shape, None);
        let refused = |k: &RawTensor, v: &RawTensor| {
            let check = Check::new("test", &stream).unwrap();
            match check_cache(&check, [k, v], KvLayout::Nhd, &table, &DTYPES) {
                Ok(_) => None,
                Err(FlashInferError::InvalidArgument { argument, .. }) => Some(argument),
                Err(other) => panic!("{other}"),
            }
        };
        let good = of([8, 16, 2, 64]);
        assert_eq!(refused(&good, &good), None);
        assert_eq!(refused(&of([9, 16, 2, 64]), &of([9, 16, 2, 64])), None);
        for k in [
            of([7, 16, 2, 64]),
            of([8, 15, 2, 64]),
            of([8, 2, 16, 64]),
            at(ADDRESS, DType::F32, [8, 16, 2, 64], None),
            at(ADDRESS + 8, DType::F16, [8, 16, 2, 64], None),
            at(ADDRESS, DType::F16, [8, 16, 2, 64], Some(&[2112, 132, 66, 1])),
            at(ADDRESS, DType::F16, [8, 16, 2, 64], Some(&[4096, 256, 128, 2])),
            at(ADDRESS, DType::F16, [8, 16, 2, 64], Some(&[1 << 32, 128, 64, 1])),
        ] {
            assert_eq!(refused(&k, &k), Some("kv.k"), "{k:?}");
        }
        for v in [
            of([9, 16, 2, 64]),
            of([8, 16, 2, 128]),
            at(ADDRESS, DType::BF16, [8, 16, 2, 64], None),
            at(ADDRESS + 8, DType::F16, [8, 16, 2, 64], None),
            at(ADDRESS, DType::F16, [8, 16, 2, 64], Some(&[4096, 128, 64, 1])),
        ] {
            assert_eq!(refused(&good, &v), Some("kv.v"), "{v:?}");
        }
    }

    /// The strict CPU path refuses in the words of the GPU's.
    #[test]
    fn the_strict_reference_says_the_same() {
        use crate::{
            indices::AppendIndices,
            reference,
            tensor::{TensorMut, TensorRef},
        };
        // SAFETY: nothing is enqueued on the stream.
        let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
        let table = PageIndices::from_requests(8, 16, [(&[7, 0][..], 20)]).unwrap();
        let append = AppendIndices::new(&table, vec![0], vec![19]).unwrap();
        let slots = SlotMapping::new(&append, &table);
        for (dtype, shape, new, new_dtype) in [
            (DType::F32, [8, 16, 2, 64], [1, 2, 64], DType::F32),
            (DType::F16, [7, 16, 2, 64], [1, 2, 64], DType::F16),
            (DType::F16, [8, 15, 2, 64], [1, 2, 64], DType::F16),
            (DType::F16, [8, 16, 2, 80], [1, 2, 80], DType::F16),
            (DType::F16, [8, 16, 2, 64], [2, 2, 64], DType::F16),
            (DType::F16, [8, 16, 2, 64], [1, 2, 64], DType::F32),
            (DType::F16, [8, 16, 512, 64], [1, 512, 64], DType::F16),
        ] {
            let at = |device, dtype, shape: &[usize]| {
                RawTensor::new(ADDRESS as *mut c_void, device, dtype, shape, None).unwrap()
            };
            let said = [Device::Cuda(0), Device::Cpu].map(|device| {
                let [k, v] = [(); 2].map(|()| TensorMut::new(at(device, dtype, &shape)));
                let mut cache = PagedKvMut { k, v, layout: KvLayout::Nhd };
                let new = TensorRef::new(at(device, new_dtype, &new));
                if device == Device::Cpu {
                    let _strict = reference::strict();
                    return reference::append_paged_kv_cache(&new, &new, &slots, &mut cache)
                        .unwrap_err()
                        .to_string();
                }
                let check = Check::new("append_paged_kv_cache", &stream).unwrap();
                check_append(&check, [&new.raw; 2], &slots, &cache).err().unwrap().to_string()
            });
            assert_eq!(said[0], said[1]);
        }
    }
}
