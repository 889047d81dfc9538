//! Sums over ranks, and numbers of all ranks, on the CPU: rank 0 adds, in the order of ranks. It
//! stands in for NCCL where there are no GPUs.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
};

use crate::{Result, model::shard::Rank};

/// Numbers that are read at once.
const AT_ONCE: usize = 1 << 16;

/// Connections for numbers: of rank 0 to the others in their order, of the others to rank 0.
pub struct Sums {
    rank: Rank,
    connections: Vec<TcpStream>,
}

impl Sums {
    pub(super) fn new(rank: Rank, connections: Vec<TcpStream>) -> Self {
        Self { rank, connections }
    }

    /// Replaces numbers by their sums over all ranks, of which each has as many.
    ///
    /// # Errors
    /// A rank has another number of them, or has ended.
    pub fn all_reduce(&mut self, numbers: &mut [f32]) -> Result<()> {
        if self.rank.rank > 0 {
            let to = self.first_rank()?;
            write(to, numbers)?;
            return read_to(to, numbers);
        }
        let mut others = vec![0.0; numbers.len()];
        for from in &mut self.connections {
            read_to(from, &mut others)?;
            numbers.iter_mut().zip(&others).for_each(|(sum, number)| *sum += number);
        }
        self.connections.iter_mut().try_for_each(|to| write(to, numbers))
    }

    /// The numbers of all ranks, in their order.
    ///
    /// # Errors
    /// A rank has ended.
    pub fn all_gather(&mut self, numbers: &[f32]) -> Result<Vec<Vec<f32>>> {
        if self.rank.rank > 0 {
            let size = self.rank.size;
            let to = self.first_rank()?;
            write(to, numbers)?;
            return (0..size).map(|_| read(to)).collect();
        }
        let mut all = vec![numbers.to_vec()];
        for from in &mut self.connections {
            all.push(read(from)?);
        }
        for to in &mut self.connections {
            all.iter().try_for_each(|numbers| write(to, numbers))?;
        }
        Ok(all)
    }

    fn first_rank(&mut self) -> Result<&mut TcpStream> {
        Ok(self.connections.first_mut().ok_or("there is no connection to rank 0")?)
    }
}

impl Drop for Sums {
    fn drop(&mut self) {
        for connection in &self.connections {
            // Others may wait for numbers. It may be closed.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

fn write(to: &mut TcpStream, numbers: &[f32]) -> Result<()> {
    let mut bytes = Vec::with_capacity(8 + size_of_val(numbers));
    bytes.extend((numbers.len() as u64).to_le_bytes());
    numbers.iter().for_each(|number| bytes.extend(number.to_le_bytes()));
    to.write_all(&bytes).map_err(lost)
}

fn read(from: &mut TcpStream) -> Result<Vec<f32>> {
    let mut left = read_len(from)?;
    let mut numbers = Vec::new();
    while left > 0 {
        let some = left.min(AT_ONCE);
        let at = numbers.len();
        numbers.resize(at + some, 0.0);
        read_numbers(from, &mut numbers[at..])?;
        left -= some;
    }
    Ok(numbers)
}

fn read_to(from: &mut TcpStream, numbers: &mut [f32]) -> Result<()> {
    let len = read_len(from)?;
    if len != numbers.len() {
        return Err(format!("a rank adds {len} numbers to {}; expected as many", numbers.len()).into());
    }
    numbers.chunks_mut(AT_ONCE).try_for_each(|numbers| read_numbers(from, numbers))
}

fn read_len(from: &mut TcpStream) -> Result<usize> {
    let mut len = [0; 8];
    from.read_exact(&mut len).map_err(lost)?;
    Ok(usize::try_from(u64::from_le_bytes(len))?)
}

fn read_numbers(from: &mut TcpStream, numbers: &mut [f32]) -> Result<()> {
    let mut bytes = vec![0; size_of_val(numbers)];
    from.read_exact(&mut bytes).map_err(lost)?;
    let (read, _) = bytes.as_chunks::<4>();
    numbers.iter_mut().zip(read).for_each(|(number, bytes)| *number = f32::from_le_bytes(*bytes));
    Ok(())
}

fn lost(error: io::Error) -> crate::Error {
    format!("the connection to another rank is lost: {error}").into()
}
