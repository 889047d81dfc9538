//! Sums over the GPUs of one machine by FlashInfer's kernel, which may add them to a residual and norm that.
//!
//! Each rank writes its rows into memory of all others, where what was not written yet is `-0.0`, and adds up
//! what it finds in its own.
//!
//! Source: `trtllm_allreduce_fusion` of the module `trtllm_comm` (`csrc/trtllm_allreduce_fusion.cu`,
//! `comm/trtllm_ar.py` of FlashInfer 0.6.13).

use std::{env, ops::RangeInclusive, sync::Arc};

use cudarc::driver::CudaStream;
use flashinfer_rs::{
    DType, FlashInferRuntime, ModuleName, Stream, TensorMut, TensorRef, args, ffi::Function, gpu::Tensor,
    norm::NormOptions,
};

use super::neighbours;
use crate::{Result, group::Group, model::shard::Rank};

/// Says what adds up, if not the fastest: `nccl`.
const VARIABLE: &str = "FLASHINFER_SUMS";
const MODULE: &str = "trtllm_comm";
const FUNCTION: &str = "trtllm_allreduce_fusion";
/// What it says of itself, in FlashInfer 0.6.13 and 0.7.4.
const SIGNATURE: &str = "trtllm_allreduce_fusion(0: DLTensor*, 1: int, 2: int, 3: int, 4: int, 5: DLTensor*, \
    6: bool, 7: bool, 8: bool, 9: bool, 10: int, 11: Optional<DLTensor*>, 12: Optional<DLTensor*>, \
    13: Optional<DLTensor*>, 14: Optional<DLTensor*>, 15: Optional<DLTensor*>, 16: Optional<DLTensor*>, \
    17: Optional<DLTensor*>, 18: Optional<float>, 19: Optional<DLTensor*>, 20: Optional<int>, \
    21: Optional<int>, 22: Optional<float>) -> void";
/// Numbers of ranks that there are kernels for, and up to how many MiB FlashInfer's Python has each rank write
/// all of its rows to all others (`_should_use_oneshot`: twice those of all ranks).
const SIZES: [(usize, usize); 3] = [(2, 512), (4, 64), (8, 42)];
/// Compute capabilities that the module is compiled for, in all versions: their first numbers.
const CAPABILITIES: RangeInclusive<i32> = 9..=10;
/// The most rows that are added up so, for which there is memory.
const MOST_ROWS: usize = 256;
/// Blocks that a row may be divided among, and how many threads each has at least then.
const DIVISIONS: [usize; 4] = [1, 2, 4, 8];
const LEAST_THREADS: usize = 128;
/// Threads that a block can have.
const MOST_THREADS: usize = 1024;
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
    /// Meets the other ranks, for rows of so many numbers of 16 bits; none, of which the log has the reason, if they
    /// are not processes of one machine with the same GPUs, have no such kernel, or do not reach each other's
    /// memory. All ranks call it at a time.
    ///
    /// # Errors
    /// `FLASHINFER_SUMS` is neither empty nor `nccl`; ranks have failed.
    pub fn meet(group: &Group, cuda: &Arc<CudaStream>, dtype: DType, hidden: usize) -> Result<Option<Self>> {
        let (rank, wanted) = (group.rank(), is_wanted()?);
        let most_rows = most_rows(rank.size, hidden);
        let kernel = if wanted { kernel(cuda, rank.size, most_rows) } else { Err("it is not wanted".into()) };
        let near = neighbours::check(group, cuda, kernel.is_ok())?;
        let function = match kernel.and_then(|function| near.map(|()| function)) {
            Ok(function) => function,
            Err(error) => return Ok(left_to_nccl(&error)),
        };

        let rows_bytes = rank.size * most_rows * hidden * dtype.size();
        let buffers = [(rank.size * BARRIER_FLAGS * 4, 0), (3 * rows_bytes, UNWRITTEN)];
        let memory = match neighbours::share(group, cuda, buffers)? {
            Ok(memory) => memory,
            Err(error) => return Ok(left_to_nccl(&error)),
        };
        let stream = Stream::from(cuda);
        let counters = Tensor::from_slice(&stream, &[5], &[0, 0, 0, i32::try_from(rows_bytes)?, 0])?;
        // What this kernel does not use, memory for sums in two steps, is that of flags.
        let of_ranks = [0, 0, 1].into_iter().flat_map(|kind| memory.iter().map(move |of| of[kind] as i64));
        let pointers: Vec<_> = of_ranks.chain([counters.view().data_ptr() as i64]).collect();
        let pointers = Tensor::from_slice(&stream, &[pointers.len()], &pointers)?;
        cuda.synchronize()?;
        tracing::info!(most_rows, "FlashInfer adds up rows of all ranks");
        Ok(Some(Self { function, rank, dtype, hidden, most_rows, stream, pointers, _counters: counters }))
    }

    /// Whether the kernel norms rows, too. That of FlashInfer 0.6.13 has a block's warps add up as if all their
    /// threads existed.
    pub fn norms(&self) -> bool {
        has_whole_warps(self.hidden)
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

/// Whether variables leave it to this.
fn is_wanted() -> Result<bool> {
    let without_peers = env::var("NCCL_P2P_DISABLE").is_ok_and(|value| !["", "0"].contains(&value.as_str()));
    match env::var(VARIABLE).as_deref() {
        Err(env::VarError::NotPresent) | Ok("") => Ok(!without_peers),
        Ok("nccl") => Ok(false),
        other => Err(format!("{VARIABLE} is {other:?}; expected `nccl`, or nothing for the fastest").into()),
    }
}

fn left_to_nccl<T>(error: &crate::Error) -> Option<T> {
    tracing::info!("NCCL adds up rows of all ranks: {error}");
    None
}

/// The most rows of so many numbers; 0 if there are no kernels for them.
fn most_rows(ranks: usize, hidden: usize) -> usize {
    let size = SIZES.into_iter().find(|&(size, _)| size == ranks);
    match size {
        Some((_, most)) if hidden > 0 && hidden.is_multiple_of(VECTOR) && fits_blocks(hidden) => {
            MOST_ROWS.min((most << 20) / (4 * ranks * hidden))
        }
        _ => 0,
    }
}

/// Whether a row can be divided so that blocks have threads for it; else the launcher fails.
fn fits_blocks(hidden: usize) -> bool {
    let threads = hidden / VECTOR;
    DIVISIONS.into_iter().any(|blocks| threads.is_multiple_of(blocks) && threads / blocks <= MOST_THREADS)
}

/// Whether no block has a part of a warp, however a row is divided.
fn has_whole_warps(hidden: usize) -> bool {
    let threads = hidden / VECTOR;
    let mut blocks = DIVISIONS.into_iter().filter(|blocks| {
        threads.is_multiple_of(*blocks) && (*blocks == 1 || threads / blocks >= LEAST_THREADS)
    });
    blocks.all(|blocks| (threads / blocks).is_multiple_of(32))
}

/// The kernel.
fn kernel(cuda: &CudaStream, ranks: usize, most_rows: usize) -> Result<Function> {
    let (major, minor) = cuda.context().compute_capability()?;
    if most_rows == 0 {
        return Err(format!("FlashInfer has no kernel for {ranks} ranks, or rows as wide").into());
    }
    if !CAPABILITIES.contains(&major) {
        return Err(format!("FlashInfer has no kernel for compute capability {major}.{minor}").into());
    }
    function()
}

/// The function, if it takes what it is called with here.
fn function() -> Result<Function> {
    let module = FlashInferRuntime::get()?.module(&ModuleName::new(MODULE))?;
    // SAFETY: the function was made with TVM-FFI's headers, and refuses the call.
    match unsafe { module.printed_signature(FUNCTION)? } {
        Some(printed) if printed == SIGNATURE => Ok(module.function(FUNCTION)?),
        printed => {
            let printed = printed.unwrap_or_else(|| "nothing".to_owned());
            Err(format!("{FUNCTION} says `{printed}` of itself; expected `{SIGNATURE}`").into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_module_has_the_function() {
        if let Err(error) =
            FlashInferRuntime::get().and_then(|runtime| runtime.module(&ModuleName::new(MODULE)))
        {
            return test_support::say(&format!("skipped: {error}"));
        }
        function().unwrap();
    }

    #[test]
    fn rows_are_normed_where_blocks_have_whole_warps() {
        for hidden in [1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192, 16384] {
            assert!(has_whole_warps(hidden), "{hidden}");
        }
        for hidden in [64, 576, 896, 960, 2880, 3200, 4608, 11008] {
            assert!(!has_whole_warps(hidden), "{hidden}");
        }
    }

    #[test]
    fn rows_have_room_in_what_all_ranks_write() {
        assert_eq!(
            [(1, 4096), (3, 4096), (2, 12), (2, 0), (2, 8200), (4, 16400)]
                .map(|(ranks, hidden)| most_rows(ranks, hidden)),
            [0; 6]
        );
        assert_eq!(
            [(2, 4096), (4, 8192), (8, 16384), (2, 8192 + 16)]
                .map(|(ranks, hidden)| most_rows(ranks, hidden)),
            [256, 256, 84, 256]
        );
    }
}
