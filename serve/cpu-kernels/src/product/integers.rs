//! Products of codes and activations in 16 bits.

use crate::{
    activations::{ActivationBlock, Activations},
    instructions::{Instructions, Task},
    packed::{Factors, Packed, Panel, ROWS, VECTOR},
};

/// Panels from `first` on, as many as `tiles` have room for: of each, a tile for each row of `x`.
pub struct IntegerProduct<'a> {
    pub weights: &'a Packed,
    pub first: usize,
    pub x: &'a Activations,
    pub count: usize,
    pub tiles: &'a mut [[f32; ROWS]],
}

impl Task for IntegerProduct<'_> {
    #[inline(always)]
    fn run<I: Instructions>(self, instructions: I) {
        let format = &self.weights.format;
        match (format.group, format.offset) {
            (16, false) => self.of_groups::<I, 16, false>(instructions),
            (16, true) => self.of_groups::<I, 16, true>(instructions),
            (_, false) => self.of_groups::<I, 32, false>(instructions),
            (_, true) => self.of_groups::<I, 32, true>(instructions),
        }
    }
}

impl IntegerProduct<'_> {
    #[inline(always)]
    fn of_groups<I: Instructions, const GROUP: usize, const OFFSET: bool>(self, instructions: I) {
        let Self { weights, first, x, count, tiles } = self;
        let zero = i32::from(weights.format.zero);
        let mut panel = Panel::default();
        for (index, tiles) in tiles.chunks_exact_mut(count).enumerate() {
            weights.read(instructions, first + index, &mut panel);
            let (four, rest) = tiles.as_chunks_mut::<4>();
            let mut row = 0;
            for tiles in four {
                let x = [x.row(row), x.row(row + 1), x.row(row + 2), x.row(row + 3)];
                multiply::<I, 4, GROUP, OFFSET>(instructions, &panel, zero, x, tiles);
                row += 4;
            }
            for tile in rest.as_chunks_mut::<1>().0 {
                multiply::<I, 1, GROUP, OFFSET>(instructions, &panel, zero, [x.row(row)], tile);
                row += 1;
            }
        }
    }
}

/// The products of a panel's rows and these of `x`.
#[inline(always)]
fn multiply<I: Instructions, const X: usize, const GROUP: usize, const OFFSET: bool>(
    instructions: I,
    panel: &Panel,
    zero: i32,
    mut x: [&[ActivationBlock]; X],
    tiles: &mut [[f32; ROWS]; X],
) {
    let groups = 32 / GROUP;
    let blocks = panel.codes.len();
    let factors: &[Factors] = &panel.factors[..groups * blocks];
    for x in &mut x {
        *x = &x[..blocks];
    }
    for part in 0..I::PARTS {
        let mut totals = [instructions.splat(0.0); X];
        for (at, codes) in panel.codes.iter().enumerate() {
            for group in 0..groups {
                let mut sums = [instructions.sums(0); X];
                for (sums, x) in sums.iter_mut().zip(x) {
                    *sums = instructions.sums(-zero * sum::<GROUP>(&x[at], group));
                }
                for four in group * GROUP / 4..(group + 1) * GROUP / 4 {
                    let codes = instructions.codes(&codes.as_chunks::<VECTOR>().0[four], part);
                    for (sums, x) in sums.iter_mut().zip(x) {
                        *sums = instructions.add_products(*sums, codes, x[at].codes[four]);
                    }
                }
                let factors = &factors[at * groups + group];
                let scale = instructions.load(&factors.scale, part);
                for ((total, sums), x) in totals.iter_mut().zip(sums).zip(x) {
                    let mut number = instructions.multiply(instructions.numbers(sums), scale);
                    if OFFSET {
                        let sum = sum::<GROUP>(&x[at], group);
                        let offset = instructions.load(&factors.offset, part);
                        let offset = instructions.multiply(offset, instructions.splat(sum as f32));
                        number = instructions.add(number, offset);
                    }
                    let number = instructions.multiply(number, instructions.splat(x[at].scale));
                    *total = instructions.add(*total, number);
                }
            }
        }
        for (total, tile) in totals.into_iter().zip(&mut *tiles) {
            instructions.store(total, tile, part);
        }
    }
}

/// The sum of the codes of a group of a block.
#[inline(always)]
fn sum<const GROUP: usize>(block: &ActivationBlock, group: usize) -> i32 {
    if GROUP == 32 { block.sums[0] + block.sums[1] } else { block.sums[group] }
}
