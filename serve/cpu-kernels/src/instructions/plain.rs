//! No instructions but those that the compiler finds.

use super::{Instructions, Task};
use crate::packed::{ROWS, VECTOR};

#[derive(Clone, Copy, Debug)]
pub struct Plain;

impl Instructions for Plain {
    type Codes = [u8; VECTOR];
    type Sums = [i32; ROWS];
    type Numbers = [f32; ROWS];
    const PARTS: usize = 1;

    fn run(self, task: impl Task) {
        task.run(self);
    }

    #[inline(always)]
    fn codes(self, codes: &[u8; VECTOR], _: usize) -> Self::Codes {
        *codes
    }

    #[inline(always)]
    fn sums(self, start: i32) -> Self::Sums {
        [start; ROWS]
    }

    #[inline(always)]
    fn add_products(self, mut sums: Self::Sums, codes: Self::Codes, x: i64) -> Self::Sums {
        let x = [0, 16, 32, 48].map(|bit| (x >> bit) as i16);
        for (sum, codes) in sums.iter_mut().zip(codes.as_chunks::<4>().0) {
            for (code, x) in codes.iter().zip(x) {
                *sum += i32::from(i16::from(*code)) * i32::from(x);
            }
        }
        sums
    }

    #[inline(always)]
    fn numbers(self, sums: Self::Sums) -> Self::Numbers {
        sums.map(|sum| sum as f32)
    }

    #[inline(always)]
    fn load(self, numbers: &[f32; ROWS], _: usize) -> Self::Numbers {
        *numbers
    }

    #[inline(always)]
    fn splat(self, number: f32) -> Self::Numbers {
        [number; ROWS]
    }

    #[inline(always)]
    fn multiply(self, mut a: Self::Numbers, b: Self::Numbers) -> Self::Numbers {
        a.iter_mut().zip(b).for_each(|(a, b)| *a *= b);
        a
    }

    #[inline(always)]
    fn add(self, mut a: Self::Numbers, b: Self::Numbers) -> Self::Numbers {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        a
    }

    #[inline(always)]
    fn store(self, numbers: Self::Numbers, to: &mut [f32; ROWS], _: usize) {
        *to = numbers;
    }
}
