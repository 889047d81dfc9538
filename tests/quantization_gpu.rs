//! Packing of bits on the GPU against the CPU reference.
#![cfg(feature = "cudarc")]

mod common;

use common::{Gpu, Rng, attention::capture, leave_cuda_error, refused, say};
use cudarc::driver::{CudaSlice, result::ctx};
use flashinfer_rs::{
    ModuleName, TensorMut, TensorRef,
    gpu::{TensorExt, TensorExtMut},
    indices::{MaskIndices, PackedIndices, PackedTable},
    quantization::{self, BitOrder},
    reference,
};

const ORDERS: [BitOrder; 2] = [BitOrder::Big, BitOrder::Little];
/// What outputs are filled with beforehand.
const POISON: u8 = 0xa5;

fn start(start: fn() -> Option<Gpu>) -> Option<Gpu> {
    let gpu = start()?;
    gpu.runtime.preload([&ModuleName::QUANTIZATION]).expect("the module quantization");
    Some(gpu)
}

fn random_bits(rng: &mut Rng, len: usize) -> Vec<u8> {
    (0..len).map(|_| (rng.bits() >> 40) as u8 & 1).collect()
}

/// Bytes on the device, of which there is at least one.
fn upload(gpu: &Gpu, bytes: &[u8]) -> CudaSlice<u8> {
    gpu.cuda.clone_htod(if bytes.is_empty() { &[POISON][..] } else { bytes }).unwrap()
}

fn download(gpu: &Gpu, bytes: &CudaSlice<u8>) -> Vec<u8> {
    let content = gpu.cuda.clone_dtoh(bytes).unwrap();
    gpu.synchronize();
    content
}

fn view(bytes: &[u8]) -> TensorRef<'_> {
    TensorRef::from_slice(bytes, &[bytes.len()]).unwrap()
}

fn view_mut(bytes: &mut [u8]) -> TensorMut<'_> {
    let len = bytes.len();
    TensorMut::from_slice(bytes, &[len]).unwrap()
}

/// Packs `bits[start..]`, with a byte after the output that stays.
fn packs(gpu: &Gpu, bits: &[u8], start: usize, order: BitOrder) {
    let len = bits.len() - start;
    let bytes = len.div_ceil(8);
    let mut want = vec![0; bytes];
    reference::packbits(&mut view_mut(&mut want), &view(&bits[start..]), order).unwrap();
    want.push(POISON);
    let (x, mut y) = (upload(gpu, bits), upload(gpu, &vec![POISON; bytes + 1]));
    {
        let x = x.tensor(&gpu.cuda, &[bits.len()]).unwrap();
        let mut y = y.tensor_mut(&gpu.cuda, &[bytes + 1]).unwrap();
        let (x, mut y) = (x.view().narrow(0, start, len).unwrap(), y.view_mut().narrow(0, 0, bytes).unwrap());
        quantization::packbits(&gpu.stream, &mut y, &x, order).unwrap();
    }
    assert!(download(gpu, &y) == want, "{len} bits from {start}, {order:?}");
}

#[test]
fn sizes() {
    let Some(gpu) = start(Gpu::start) else { return };
    let rng = &mut Rng::new();
    for len in [0, 1, 7, 8, 9, 63, 255, 2047, 2048, 2049, 4096, 65_537, 99_991, 100_000] {
        let bits = random_bits(rng, len);
        for order in ORDERS {
            packs(&gpu, &bits, 0, order);
        }
    }
    for _ in 0..20 {
        let len = 1 + rng.below(20_000);
        let bits = random_bits(rng, len);
        packs(&gpu, &bits, 0, BitOrder::Little);
    }
}

/// The kernels read single bytes, wherever they start.
#[test]
fn any_alignment() {
    let Some(gpu) = start(Gpu::start) else { return };
    let bits = random_bits(&mut Rng::new(), 5000);
    for start in [1, 2, 3, 5, 8, 4097] {
        packs(&gpu, &bits, start, BitOrder::Big);
    }
}

/// Packs segments of these lengths, and compares with the reference.
fn packs_segments(gpu: &Gpu, rng: &mut Rng, lens: &[usize]) {
    let segments = PackedIndices::from_lens(lens.iter().copied()).unwrap();
    let table = PackedTable::new(&gpu.stream, segments.clone()).unwrap();
    let bits = random_bits(rng, segments.num_elements());
    let x = upload(gpu, &bits);
    for order in ORDERS {
        let mut want = vec![0; segments.num_bytes()];
        reference::segment_packbits(&mut view_mut(&mut want), &view(&bits), &segments, order).unwrap();
        want.push(POISON);
        let mut y = upload(gpu, &vec![POISON; want.len()]);
        {
            let x = x.tensor(&gpu.cuda, &[bits.len()]).unwrap();
            let mut y = y.tensor_mut(&gpu.cuda, &[want.len()]).unwrap();
            let mut y = y.view_mut().narrow(0, 0, segments.num_bytes()).unwrap();
            quantization::segment_packbits(&gpu.stream, &mut y, &x.view(), &table, order).unwrap();
        }
        assert!(download(gpu, &y) == want, "{lens:?} {order:?}");
    }
}

#[test]
fn segments() {
    let Some(gpu) = start(Gpu::start) else { return };
    let rng = &mut Rng::new();
    for lens in [
        &[][..],
        &[0],
        &[0, 0, 0],
        &[1],
        &[8],
        &[4, 3, 4],
        &[0, 5, 0, 0, 17, 0],
        &[2048, 2049, 1, 0, 100_000, 7],
        &[1; 1000],
    ] {
        packs_segments(&gpu, rng, lens);
    }
    for _ in 0..10 {
        let lens: Vec<_> = (0..1 + rng.below(40)).map(|_| rng.below(5) * rng.below(1500)).collect();
        packs_segments(&gpu, rng, &lens);
    }
}

/// What the kernel packs in little order is what custom masks are made of.
#[test]
fn masks_are_packed_as_on_the_host() {
    let Some(gpu) = start(Gpu::start) else { return };
    let rng = &mut Rng::new();
    let mask = MaskIndices::new([(2, 5), (0, 9), (1, 3), (17, 401), (64, 64), (3, 0), (5, 8)]).unwrap();
    let segments = PackedIndices::of_mask(&mask).unwrap();
    let bits = random_bits(rng, segments.num_elements());
    let want = mask.pack(&bits.iter().map(|&bit| bit == 1).collect::<Vec<_>>()).unwrap();
    assert_eq!(segments.num_bytes(), mask.num_bytes());
    let table = PackedTable::new(&gpu.stream, segments).unwrap();
    let (x, mut y) = (upload(&gpu, &bits), upload(&gpu, &vec![POISON; want.len()]));
    quantization::segment_packbits(
        &gpu.stream,
        &mut y.tensor_mut(&gpu.cuda, &[want.len()]).unwrap().view_mut(),
        &x.tensor(&gpu.cuda, &[bits.len()]).unwrap().view(),
        &table,
        BitOrder::Little,
    )
    .unwrap();
    assert_eq!(download(&gpu, &y), want);
}

/// A captured graph packs what the tensors and the table hold at its replay.
#[test]
fn graph_replay() {
    let Some(gpu) = start(Gpu::start_alone) else { return };
    let rng = &mut Rng::new();
    let of = |lens: [usize; 3]| PackedIndices::from_lens(lens).unwrap();
    let mut x = upload(&gpu, &random_bits(rng, 3000));
    let (mut y, mut all) = (upload(&gpu, &[POISON; 375]), upload(&gpu, &[POISON; 375]));
    let mut table = PackedTable::with_capacity(&gpu.stream, of([1000, 0, 2000]), 3).unwrap();
    let graph = {
        let x = x.tensor(&gpu.cuda, &[3000]).unwrap();
        let mut y = y.tensor_mut(&gpu.cuda, &[375]).unwrap();
        let mut all = all.tensor_mut(&gpu.cuda, &[375]).unwrap();
        let (x, mut y, mut all) = (x.view(), y.view_mut(), all.view_mut());
        let mut run = || {
            quantization::segment_packbits(&gpu.stream, &mut y, &x, &table, BitOrder::Big)?;
            quantization::packbits(&gpu.stream, &mut all, &x, BitOrder::Little)
        };
        run().unwrap();
        gpu.synchronize();
        let (graph, captured) = capture(&gpu, run);
        captured.unwrap();
        graph.expect("a graph")
    };
    for lens in [[1000, 0, 2000], [8, 1496, 1496], [0, 0, 3000]] {
        let bits = random_bits(rng, 3000);
        gpu.cuda.memcpy_htod(&bits, &mut x).unwrap();
        table.update(of(lens)).unwrap();
        graph.launch().unwrap();
        let segments = of(lens);
        let mut want = vec![0; segments.num_bytes()];
        reference::segment_packbits(&mut view_mut(&mut want), &view(&bits), &segments, BitOrder::Big)
            .unwrap();
        assert_eq!(download(&gpu, &y), want, "{lens:?}");
        let mut want = vec![0; 375];
        reference::packbits(&mut view_mut(&mut want), &view(&bits), BitOrder::Little).unwrap();
        assert_eq!(download(&gpu, &all), want, "{lens:?}");
    }
}

/// Bytes other than 0 and 1 spoil the bits of their own output byte at most.
#[test]
fn bytes_that_are_no_bits() {
    let Some(gpu) = start(Gpu::start) else { return };
    let bits = random_bits(&mut Rng::new(), 4096);
    let mut odd = bits.clone();
    for (at, byte) in [2, 3, 0x7f, 0x80, 0xff].into_iter().enumerate() {
        odd[800 * at] = byte;
    }
    let (x, mut y) = (upload(&gpu, &odd), upload(&gpu, &[POISON; 513]));
    {
        let x = x.tensor(&gpu.cuda, &[4096]).unwrap();
        let mut y = y.tensor_mut(&gpu.cuda, &[513]).unwrap();
        let mut y = y.view_mut().narrow(0, 0, 512).unwrap();
        quantization::packbits(&gpu.stream, &mut y, &x.view(), BitOrder::Little).unwrap();
    }
    let mut want = vec![0; 512];
    reference::packbits(&mut view_mut(&mut want), &view(&bits), BitOrder::Little).unwrap();
    want.push(POISON);
    for (at, (got, want)) in download(&gpu, &y).into_iter().zip(want).enumerate() {
        assert!(got == want || (at % 100 == 0 && at <= 400), "byte {at} is {got:#x}, not {want:#x}");
    }
}

/// An error that other code left in the thread is not taken for one of a launch.
#[test]
fn errors_of_others() {
    let Some(gpu) = start(Gpu::start) else { return };
    leave_cuda_error();
    packs_segments(&gpu, &mut Rng::new(), &[4, 3, 4]);
    leave_cuda_error();
    packs(&gpu, &[1; 40], 0, BitOrder::Big);
}

#[test]
fn wrong_input() {
    let Some(gpu) = start(Gpu::start) else { return };
    let other = gpu.elsewhere();
    let (x, mut y) = (upload(&gpu, &[1; 64]), upload(&gpu, &[POISON; 8]));
    let table = PackedTable::new(&gpu.stream, PackedIndices::from_lens([40, 24]).unwrap()).unwrap();
    {
        let mut y = y.tensor_mut(&gpu.cuda, &[8]).unwrap();
        let mut y = y.view_mut();
        let x = x.tensor(&gpu.cuda, &[64]).unwrap();
        let x = x.view();
        let pack = |y: &mut TensorMut<'_>, x: &TensorRef<'_>| {
            quantization::packbits(&gpu.stream, y, x, BitOrder::Little)
        };
        let segment = |y: &mut TensorMut<'_>, x: &TensorRef<'_>| {
            quantization::segment_packbits(&gpu.stream, y, x, &table, BitOrder::Little)
        };
        let host = [1u8; 64];
        refused(pack(&mut y, &view(&host)), "x");
        refused(segment(&mut y, &view(&host)), "x");
        refused(pack(&mut y, &x.narrow(0, 0, 56).unwrap()), "y");
        refused(segment(&mut y, &x.narrow(0, 0, 56).unwrap()), "x");
        refused(pack(&mut y.reborrow().narrow(0, 0, 7).unwrap(), &x), "y");
        refused(segment(&mut y.reborrow().narrow(0, 0, 7).unwrap(), &x), "y");
        let floats = gpu.cuda.alloc_zeros::<f32>(64).unwrap();
        let floats = floats.tensor(&gpu.cuda, &[64]).unwrap();
        refused(pack(&mut y, &floats.view()), "x");
        refused(quantization::packbits(&other.stream, &mut y, &x, BitOrder::Big), "x");
        let foreign = PackedTable::new(&other.stream, table.host().clone()).unwrap();
        let call = quantization::segment_packbits(&gpu.stream, &mut y, &x, &foreign, BitOrder::Big);
        refused(call, "segments");
    }
    assert_eq!(download(&gpu, &y), [POISON; 8]);
    refused(PackedTable::with_capacity(&gpu.stream, table.host().clone(), 1), "capacity");
}

/// The launchers use the current device; here it is that of the tensors, and
/// afterwards what it was before.
#[test]
fn the_current_device_is_set_and_put_back() {
    let Some(first) = start(Gpu::start) else { return };
    if first.runtime.device_count().unwrap() < 2 {
        return say("skipped: there is one GPU only");
    }
    let second = first.on_another();
    let bits = random_bits(&mut Rng::new(), 1001);
    let mut want = vec![0; 126];
    reference::packbits(&mut view_mut(&mut want), &view(&bits), BitOrder::Big).unwrap();
    let (x, mut y) = (upload(&second, &bits), upload(&second, &[POISON; 126]));
    {
        let x = x.tensor(&second.cuda, &[1001]).unwrap();
        let mut y = y.tensor_mut(&second.cuda, &[126]).unwrap();
        first.cuda.context().bind_to_thread().unwrap();
        quantization::packbits(&second.stream, &mut y.view_mut(), &x.view(), BitOrder::Big).unwrap();
        assert_eq!(ctx::get_current().unwrap(), Some(first.cuda.context().cu_ctx()));
    }
    assert_eq!(download(&second, &y), want);
}
