//! Ranks that are processes of one machine, with the same GPUs: whether they are, and memory that all of them reach.

use std::{fs, process, sync::Arc};

use cudarc::driver::{
    CudaStream, result,
    sys::{self, CUdevice_attribute},
};
use serde::{Deserialize, Serialize};

use crate::{Result, group::Group, model::shard::Rank};

/// Whether all ranks are neighbours, and have a kernel; if not, why. All call it at a time.
///
/// # Errors
/// The ranks have failed.
pub fn check(group: &Group, cuda: &CudaStream, has_kernel: bool) -> Result<Result<()>> {
    Ok(check_places(&group.gather(Place::here(cuda, has_kernel)?)?))
}

/// Memory of each rank in two parts, of so many bytes that are filled with a number of 16 bits: by rank the addresses by
/// which this one reaches it, or why it does not. The first part has room for 4 bytes of each rank. All call it at a
/// time. The memory is left to the end of the process, as other ranks have it open.
///
/// # Errors
/// The ranks have failed.
pub fn share(
    group: &Group,
    cuda: &Arc<CudaStream>,
    parts: [(usize, u16); 2],
) -> Result<Result<Vec<[u64; 2]>>> {
    let rank = group.rank();
    let mut memory =
        Memory { cuda: cuda.clone(), rank, handles: Vec::new(), of_ranks: vec![[0; 2]; rank.size] };
    let made = memory.allocate(parts);
    let handles = group.gather(memory.handles.clone())?;
    let marked = made.and_then(|()| memory.open(&handles)).and_then(|()| memory.mark());
    let marked = agree(group, marked)?;
    let seen = agree(group, marked.and_then(|()| memory.check_marks()))?;
    if let Err(error) = seen {
        memory.close();
        // What others have open is not freed.
        group.gather(())?;
        memory.free();
        return Ok(Err(error));
    }
    Ok(Ok(memory.of_ranks))
}

/// Whether all ranks have done something.
fn agree(group: &Group, done: Result<()>) -> Result<Result<()>> {
    let all = group.gather(done.as_ref().err().map(ToString::to_string))?;
    let problem = all.into_iter().enumerate().find_map(|(rank, problem)| Some((rank, problem?)));
    Ok(problem.map_or(Ok(()), |(rank, problem)| Err(format!("rank {rank}: {problem}").into())))
}

/// Where a rank is, and whether it has the kernel.
#[derive(Clone, Serialize, Deserialize)]
struct Place {
    /// What a machine is known by since it was started; nothing if it says nothing.
    machine: String,
    process: u32,
    /// A GPU's name and multiprocessors, by which rows are divided.
    gpu: (String, i32),
    has_kernel: bool,
}

impl Place {
    fn here(cuda: &CudaStream, has_kernel: bool) -> Result<Self> {
        let machine = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let multiprocessors = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let gpu = (cuda.context().name()?, cuda.context().attribute(multiprocessors)?);
        Ok(Self { machine, process: process::id(), gpu, has_kernel })
    }
}

/// Refuses ranks that are not processes of one machine, with the same GPUs and the kernel.
fn check_places(places: &[Place]) -> Result<()> {
    let first = &places[0];
    for (rank, place) in places.iter().enumerate() {
        let problem = if !place.has_kernel {
            "has no kernel of FlashInfer's"
        } else if place.machine.is_empty() || place.machine != first.machine {
            "is not known to be on the machine of rank 0"
        } else if places[..rank].iter().any(|other| other.process == place.process) {
            "has the process number of another rank"
        } else if place.gpu != first.gpu {
            "has another GPU than rank 0"
        } else {
            continue;
        };
        return Err(format!("rank {rank} {problem}").into());
    }
    Ok(())
}

/// Memory of a rank, and that of the others as it reaches it, in two parts, of which the first has room for a flag
/// of each rank.
struct Memory {
    cuda: Arc<CudaStream>,
    rank: Rank,
    /// What other processes open this one's by.
    handles: Vec<Vec<u8>>,
    /// By rank; 0 where there is none.
    of_ranks: Vec<[u64; 2]>,
}

impl Memory {
    /// So many bytes of each, filled with numbers of 16 bits.
    fn allocate(&mut self, parts: [(usize, u16); 2]) -> Result<()> {
        self.cuda.context().bind_to_thread()?;
        let addresses = &mut self.of_ranks[self.rank.rank];
        for (address, (bytes, number)) in addresses.iter_mut().zip(parts) {
            let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
            // SAFETY: so much memory is allocated and filled; a handle is written.
            unsafe {
                *address = result::malloc_sync(bytes)?;
                sys::cuMemsetD16_v2(*address, number, bytes / 2).result()?;
                sys::cuIpcGetMemHandle(&mut handle, *address).result()?;
            }
            self.handles.push(handle.reserved.iter().map(|&byte| byte as u8).collect());
        }
        // Fills may be done later than they return.
        Ok(self.cuda.context().synchronize()?)
    }

    /// Opens that of the other ranks.
    fn open(&mut self, handles: &[Vec<Vec<u8>>]) -> Result<()> {
        for (rank, handles) in handles.iter().enumerate().filter(|&(rank, _)| rank != self.rank.rank) {
            if handles.len() != self.of_ranks[rank].len() {
                return Err(format!("rank {rank} has no memory for it").into());
            }
            for (address, bytes) in self.of_ranks[rank].iter_mut().zip(handles) {
                let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
                handle.reserved.iter_mut().zip(bytes).for_each(|(to, &byte)| *to = byte as _);
                let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
                // SAFETY: a handle of another process, or what the driver refuses; an address is written.
                unsafe { sys::cuIpcOpenMemHandle_v2(address, handle, flags).result()? };
            }
        }
        Ok(())
    }

    /// Writes this rank's number to the flags of all, one more than it is.
    fn mark(&self) -> Result<()> {
        let rank = self.rank.rank;
        for [flags, _] in &self.of_ranks {
            // SAFETY: each rank has a flag for each.
            unsafe { sys::cuMemsetD32_v2(flags + 4 * rank as u64, rank as u32 + 1, 1).result()? };
        }
        Ok(self.cuda.context().synchronize()?)
    }

    /// Whether all have marked this one's flags, which are cleared.
    fn check_marks(&self) -> Result<()> {
        let [flags, _] = self.of_ranks[self.rank.rank];
        let mut marks = vec![0u32; self.rank.size];
        // SAFETY: so many flags are there.
        unsafe {
            result::memcpy_dtoh_sync(&mut marks, flags)?;
            sys::cuMemsetD32_v2(flags, 0, self.rank.size).result()?;
        }
        self.cuda.context().synchronize()?;
        match marks.iter().zip(1..).position(|(&mark, number)| mark != number) {
            Some(other) => Err(format!("what rank {other} writes does not arrive").into()),
            None => Ok(()),
        }
    }

    /// Closes that of other ranks, which nothing was launched for.
    fn close(&mut self) {
        let others = self.of_ranks.iter_mut().enumerate().filter(|&(rank, _)| rank != self.rank.rank);
        for address in others.flat_map(|(_, addresses)| addresses).filter(|address| **address != 0) {
            // SAFETY: it was opened. If that fails, it stays open to the end of the process.
            let _ = unsafe { sys::cuIpcCloseMemHandle(*address).result() };
            *address = 0;
        }
    }

    /// Frees this one's, which nobody has open.
    fn free(self) {
        for address in self.of_ranks[self.rank.rank].into_iter().filter(|&address| address != 0) {
            // SAFETY: it was allocated so. If that fails, it is left to the end of the process.
            let _ = unsafe { result::free_sync(address) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_processes_of_one_machine_with_the_same_gpus() {
        let place =
            |process| Place { machine: "a".into(), process, gpu: ("GPU".into(), 132), has_kernel: true };
        let with = |change: fn(&mut Place)| {
            let mut places = [place(1), place(2), place(3)];
            change(&mut places[2]);
            check_places(&places).map_err(|error| error.to_string())
        };
        assert_eq!(with(|_| ()), Ok(()));
        let refused =
            |change, problem: &str| assert_eq!(with(change).unwrap_err(), format!("rank 2 {problem}"));
        refused(|place| place.has_kernel = false, "has no kernel of FlashInfer's");
        refused(|place| place.machine = "b".into(), "is not known to be on the machine of rank 0");
        refused(|place| place.process = 1, "has the process number of another rank");
        refused(|place| place.gpu.1 = 114, "has another GPU than rank 0");
    }
}
