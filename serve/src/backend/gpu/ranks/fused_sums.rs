//! Sums over the GPUs of one machine by FlashInfer's kernel, which may add them to a residual and norm that.
//!
//! Each rank writes its rows into memory of all others, where what was not written yet is `-0.0`, and adds up
//! what it finds in its own.
//!
//! Source: `trtllm_allreduce_fusion` of the module `trtllm_comm` (`csrc/trtllm_allreduce_fusion.cu`,
//! `comm/trtllm_ar.py` of FlashInfer 0.6.13).

use std::{env, fs, process, sync::Arc};

use cudarc::driver::{CudaStream, result, sys};
use flashinfer_rs::{
    DType, FlashInferRuntime, ModuleName, Stream, TensorMut, TensorRef, args, ffi::Function, gpu::Tensor,
    norm::NormOptions,
};
use serde::{Deserialize, Serialize};

use crate::{Result, group::Group, model::shard::Rank};

/// Says what adds up, if not the fastest: `nccl`.
const VARIABLE: &str = "FLASHINFER_SUMS";
const MODULE: &str = "trtllm_comm";
const FUNCTION: &str = "trtllm_allreduce_fusion";
/// Numbers of ranks that there are kernels for, and up to how many MiB FlashInfer's Python has each rank write
/// all of its rows to all others (`_should_use_oneshot`: twice those of all ranks).
const SIZES: [(usize, usize); 3] = [(2, 512), (4, 64), (8, 42)];
/// The most rows that are added up so, for which there is memory.
const MOST_ROWS: usize = 256;
/// Numbers of a row that a thread takes at once.
const VECTOR: usize = 8;
/// Flags of each rank.
const BARRIER_FLAGS: usize = 256;
/// What is computed: sums; or sums, the residual with them, and its norm.
const SUMS: i64 = 0;
const SUMS_RESIDUAL_NORM: i64 = 1;
/// `-0.0` of either 16-bit type.
const UNWRITTEN: u16 = 0x8000;

/// Memory that the kernels of all ranks reach, and the kernel.
///
/// The memory is left to the end of the process, as the other ranks have it open.
pub struct FusedSums {
    function: Function,
    rank: Rank,
    dtype: DType,
    hidden: usize,
    most_rows: usize,
    stream: Stream,
    /// Addresses of all ranks' memory, and of the counters.
    pointers: Tensor<i64>,
    _counters: Tensor<i32>,
}

impl FusedSums {
    /// Meets the other ranks, for rows of so many numbers of 16 bits; none if they are not processes of one
    /// machine, have no such kernel, or do not reach each other's memory. All ranks call it at a time.
    ///
    /// # Errors
    /// `FLASHINFER_SUMS` is neither empty nor `nccl`; ranks have failed.
    pub fn meet(group: &Group, cuda: &Arc<CudaStream>, dtype: DType, hidden: usize) -> Result<Option<Self>> {
        let rank = group.rank();
        let most_rows = if is_wanted()? { most_rows(rank.size, hidden) } else { 0 };
        let function = if most_rows > 0 { kernel() } else { None };
        let places = group.gather(Place::here(function.is_some()))?;
        let Some(function) = function.filter(|_| are_neighbours(&places)) else { return Ok(None) };

        let rows_bytes = rank.size * most_rows * hidden * dtype.size();
        let memory = Memory::new(cuda, [rows_bytes, rank.size * BARRIER_FLAGS * 4, 3 * rows_bytes]);
        let offers = group.gather(memory.as_ref().ok().map(|memory| memory.handles.clone()))?;
        let reached = memory.as_ref().map(|memory| memory.reach(cuda, rank, &offers));
        let reached = reached.ok().and_then(|reached| {
            reached.inspect_err(|error| tracing::info!("NCCL adds up all rows: {error}")).ok()
        });
        if group.gather(reached.is_some())?.contains(&false) {
            close(cuda, rank, &reached.unwrap_or_default())?;
            // What others have open is not freed.
            group.gather(())?;
            memory.map_or(Ok(()), |memory| memory.free(cuda))?;
            return Ok(None);
        }
        let reached = reached.unwrap_or_default();
        let stream = Stream::from(cuda);
        let counters = Tensor::from_slice(&stream, &[5], &[0, 0, 0, i32::try_from(rows_bytes)?, 0])?;
        let of_ranks = (0..3).flat_map(|kind| reached.iter().map(move |addresses| addresses[kind] as i64));
        let pointers: Vec<_> = of_ranks.chain([counters.view().data_ptr() as i64]).collect();
        let pointers = Tensor::from_slice(&stream, &[pointers.len()], &pointers)?;
        cuda.synchronize()?;
        // Nobody writes before all memory is as it is to be.
        group.gather(())?;
        tracing::info!(most_rows, "FlashInfer adds up rows of all ranks");
        Ok(Some(Self { function, rank, dtype, hidden, most_rows, stream, pointers, _counters: counters }))
    }

    /// Whether these are rows that can be added up so.
    pub fn takes(&self, x: &TensorRef<'_>) -> bool {
        let are_rows = matches!(*x.shape(), [rows, width]
            if (1..=self.most_rows as i64).contains(&rows) && width == self.hidden as i64);
        are_rows && x.dtype() == self.dtype && x.is_contiguous() && x.device() == self.stream.device()
    }

    /// Replaces rows, which this [takes](Self::takes), by their sums over all ranks.
    pub fn sum(&self, x: &mut TensorMut<'_>) -> Result<()> {
        let x = x.as_ref();
        self.check(&[&x])?;
        // SAFETY: the tensors are what the function takes. A thread reads the numbers that it replaces before, and
        // waits for the kernel before this one earlier than that.
        unsafe { self.call(SUMS, true, &x, [Some(&x), None, None, None], None) }
    }

    /// Adds the sums of `x` over all ranks to the residual, and writes its norm to `x`. Both are rows that
    /// this [takes](Self::takes). `early` has the kernel begin before the one in front of it is over.
    ///
    /// # Safety
    /// The residual is read as soon as the kernel begins. So with `early` one of those that lie between it and the
    /// last that writes the residual begins when all before it is over.
    pub unsafe fn sum_add_norm(
        &self,
        x: &mut TensorMut<'_>,
        residual: &mut TensorMut<'_>,
        weight: &TensorRef<'_>,
        options: &NormOptions,
        early: bool,
    ) -> Result<()> {
        let (x, residual) = (x.as_ref(), residual.as_ref());
        self.check(&[&x, &residual])?;
        if weight.shape() != [self.hidden as i64] || weight.dtype() != self.dtype || !weight.is_contiguous() {
            return Err(format!("weights {weight:?} of a norm of {x:?}").into());
        }
        let outputs = [None, Some(&residual), Some(&residual), Some(&x)];
        // SAFETY: as in `sum`, and as the caller says.
        unsafe { self.call(SUMS_RESIDUAL_NORM, early, &x, outputs, Some((weight, options.eps))) }
    }

    /// Refuses what this does not take, or differs in shape.
    fn check(&self, tensors: &[&TensorRef<'_>]) -> Result<()> {
        match tensors.iter().all(|x| self.takes(x) && x.shape() == tensors[0].shape()) {
            true => Ok(()),
            false => Err(format!("FlashInfer adds up no {tensors:?}").into()),
        }
    }

    /// # Safety
    /// Tensors are rows that this takes; and what [`sum_add_norm`](Self::sum_add_norm) asks for.
    unsafe fn call(
        &self,
        pattern: i64,
        early: bool,
        input: &TensorRef<'_>,
        [sums, residual, residual_out, normed]: [Option<&TensorRef<'_>>; 4],
        norm: Option<(&TensorRef<'_>, f64)>,
    ) -> Result<()> {
        let (gamma, eps) = norm.unzip();
        // The kernel behind this begins when it is over, and numbers are added up in `f32`.
        let (one_shot, until_the_end, in_f32) = (true, true, true);
        let pointers = self.pointers.view();
        // SAFETY: as the caller says. All ranks call it with as many rows, which their memory has room for.
        unsafe {
            self.function.call_on(
                &self.stream,
                args![
                    input,
                    self.rank.size as i64,
                    self.rank.rank as i64,
                    input.shape()[0],
                    self.hidden as i64,
                    &pointers,
                    early,
                    one_shot,
                    until_the_end,
                    in_f32,
                    pattern,
                    sums,
                    residual,
                    residual_out,
                    normed,
                    None,
                    None,
                    gamma,
                    eps,
                    None,
                    None,
                    None,
                    None
                ],
            )?;
        }
        Ok(())
    }
}

/// Whether the variable leaves it to this.
fn is_wanted() -> Result<bool> {
    match env::var(VARIABLE).as_deref() {
        Err(env::VarError::NotPresent) | Ok("") => Ok(true),
        Ok("nccl") => Ok(false),
        other => Err(format!("{VARIABLE} is {other:?}; expected `nccl`, or nothing for the fastest").into()),
    }
}

/// The most rows of so many numbers; 0 if there are no kernels for them.
fn most_rows(ranks: usize, hidden: usize) -> usize {
    let size = SIZES.into_iter().find(|&(size, _)| size == ranks);
    match size {
        Some((_, most)) if hidden > 0 && hidden.is_multiple_of(VECTOR) => {
            MOST_ROWS.min((most << 20) / (4 * ranks * hidden))
        }
        _ => 0,
    }
}

/// The kernel, if it is at hand.
fn kernel() -> Option<Function> {
    let find = || -> flashinfer_rs::Result<Function> {
        FlashInferRuntime::get()?.module(&ModuleName::new(MODULE))?.function(FUNCTION)
    };
    find().inspect_err(|error| tracing::info!("NCCL adds up all rows: {error}")).ok()
}

/// Where a rank is, and whether it has the kernel.
#[derive(Clone, Serialize, Deserialize)]
struct Place {
    /// What a machine is known by since it was started; nothing if it says nothing.
    machine: String,
    process: u32,
    has_kernel: bool,
}

impl Place {
    fn here(has_kernel: bool) -> Self {
        let machine = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self { machine, process: process::id(), has_kernel }
    }
}

/// Whether these are processes of one machine that have the kernel.
fn are_neighbours(places: &[Place]) -> bool {
    let first = &places[0];
    let mut processes: Vec<_> = places.iter().map(|place| place.process).collect();
    processes.sort_unstable();
    processes.dedup();
    !first.machine.is_empty()
        && processes.len() == places.len()
        && places.iter().all(|place| place.has_kernel && place.machine == first.machine)
}

/// A rank's memory: for rows, for flags, and for what others write.
struct Memory {
    addresses: [u64; 3],
    /// What other processes open it by.
    handles: Vec<Vec<u8>>,
}

impl Memory {
    /// So many bytes of each.
    fn new(cuda: &CudaStream, bytes: [usize; 3]) -> Result<Self> {
        cuda.context().bind_to_thread()?;
        let mut memory = Self { addresses: [0; 3], handles: Vec::new() };
        match memory.allocate(bytes) {
            // Fills may be done later than they return.
            Ok(()) => cuda.context().synchronize()?,
            Err(error) => {
                memory.free(cuda)?;
                return Err(error);
            }
        }
        Ok(memory)
    }

    fn allocate(&mut self, bytes: [usize; 3]) -> Result<()> {
        for (address, bytes) in self.addresses.iter_mut().zip(bytes) {
            let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
            // SAFETY: so much memory is allocated and filled; a handle is written.
            unsafe {
                *address = result::malloc_sync(bytes)?;
                sys::cuMemsetD8_v2(*address, 0, bytes).result()?;
                sys::cuIpcGetMemHandle(&mut handle, *address).result()?;
            }
            self.handles.push(handle.reserved.iter().map(|&byte| byte as u8).collect());
        }
        // SAFETY: so many numbers of two bytes are there.
        unsafe { sys::cuMemsetD16_v2(self.addresses[2], UNWRITTEN, bytes[2] / 2).result()? };
        Ok(())
    }

    /// The addresses of all ranks' memory, as this one reaches it.
    fn reach(&self, cuda: &CudaStream, rank: Rank, offers: &[Option<Vec<Vec<u8>>>]) -> Result<Vec<[u64; 3]>> {
        cuda.context().bind_to_thread()?;
        let mut reached = vec![[0; 3]; rank.size];
        reached[rank.rank] = self.addresses;
        for (other, offer) in offers.iter().enumerate().filter(|&(other, _)| other != rank.rank) {
            let opened = offer.as_ref().ok_or_else(|| format!("rank {other} has no memory for it").into());
            let opened = opened.and_then(|handles| open(&mut reached[other], handles));
            if let Err(error) = opened {
                close(cuda, rank, &reached)?;
                return Err(error);
            }
        }
        Ok(reached)
    }

    fn free(self, cuda: &CudaStream) -> Result<()> {
        cuda.context().bind_to_thread()?;
        for address in self.addresses.into_iter().filter(|&address| address != 0) {
            // SAFETY: it was allocated so, and nobody uses it.
            unsafe { result::free_sync(address)? };
        }
        Ok(())
    }
}

/// Opens another rank's memory.
fn open(addresses: &mut [u64; 3], handles: &[Vec<u8>]) -> Result<()> {
    for (address, bytes) in addresses.iter_mut().zip(handles) {
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        handle.reserved.iter_mut().zip(bytes).for_each(|(to, &byte)| *to = byte as _);
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        // SAFETY: a handle of another process, or what the driver refuses; an address is written.
        unsafe { sys::cuIpcOpenMemHandle_v2(address, handle, flags).result()? };
    }
    Ok(())
}

/// Closes the memory of other ranks, where it was opened.
fn close(cuda: &CudaStream, rank: Rank, reached: &[[u64; 3]]) -> Result<()> {
    cuda.context().bind_to_thread()?;
    let others = reached.iter().enumerate().filter(|&(other, _)| other != rank.rank);
    for address in others.flat_map(|(_, addresses)| addresses).filter(|&&address| address != 0) {
        // SAFETY: it was opened, and nothing was launched that uses it.
        unsafe { sys::cuIpcCloseMemHandle(*address).result()? };
    }
    Ok(())
}
