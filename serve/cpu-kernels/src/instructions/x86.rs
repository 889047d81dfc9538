//! AVX-512 with VNNI, and AVX2.

use std::arch::x86_64::*;

use super::{Instructions, Task};
use crate::{
    activations::Four,
    packed::{ROWS, VECTOR},
};

/// AVX-512 with VNNI. A value of it says that the processor has them.
#[derive(Clone, Copy, Debug)]
pub struct Avx512(());

/// AVX2 with F16C. A value of it says that the processor has them.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

/// A call of intrinsics by a type of which there is a value only where the processor has their
/// instructions, with pointers into arrays that are as long as what is read or written.
macro_rules! intrinsics {
    ($($calls:tt)*) => {{
        // SAFETY: as the macro's rule says, which each use keeps.
        unsafe { $($calls)* }
    }};
}

impl Avx512 {
    pub fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni");
        found.then_some(Self(()))
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn enabled(self, task: impl Task) {
        task.run(self);
    }
}

/// Sixteen rows at a time.
impl Instructions for Avx512 {
    type Codes = __m512i;
    /// Of the low bytes of activations, and of the high ones.
    type Sums = [__m512i; 2];
    type Numbers = __m512;
    const PARTS: usize = 1;

    fn run(self, task: impl Task) {
        intrinsics!(self.enabled(task))
    }

    #[inline(always)]
    fn halves(self, halves: &[u8; 2 * ROWS]) -> [f32; ROWS] {
        let mut numbers = [0.0; ROWS];
        intrinsics!({
            let halves = _mm512_cvtph_ps(_mm256_loadu_si256(halves.as_ptr().cast()));
            _mm512_storeu_ps(numbers.as_mut_ptr(), halves);
        });
        numbers
    }

    #[inline(always)]
    fn codes(self, codes: &[u8; VECTOR], _: usize) -> __m512i {
        intrinsics!(_mm512_loadu_si512(codes.as_ptr().cast()))
    }

    #[inline(always)]
    fn sums(self, start: i32) -> [__m512i; 2] {
        intrinsics!([_mm512_set1_epi32(start), _mm512_setzero_si512()])
    }

    #[inline(always)]
    fn add_products(self, [low, high]: [__m512i; 2], codes: __m512i, x: Four) -> [__m512i; 2] {
        intrinsics!([
            _mm512_dpbusd_epi32(low, codes, _mm512_set1_epi32(x.low)),
            _mm512_dpbusd_epi32(high, codes, _mm512_set1_epi32(x.high)),
        ])
    }

    #[inline(always)]
    fn numbers(self, [low, high]: [__m512i; 2]) -> __m512 {
        intrinsics!(_mm512_cvtepi32_ps(_mm512_add_epi32(low, _mm512_slli_epi32::<8>(high))))
    }

    #[inline(always)]
    fn load(self, numbers: &[f32; ROWS], _: usize) -> __m512 {
        intrinsics!(_mm512_loadu_ps(numbers.as_ptr()))
    }

    #[inline(always)]
    fn splat(self, number: f32) -> __m512 {
        intrinsics!(_mm512_set1_ps(number))
    }

    #[inline(always)]
    fn multiply(self, a: __m512, b: __m512) -> __m512 {
        intrinsics!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        intrinsics!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn store(self, numbers: __m512, to: &mut [f32; ROWS], _: usize) {
        intrinsics!(_mm512_storeu_ps(to.as_mut_ptr(), numbers));
    }
}

impl Avx2 {
    pub fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }

    #[target_feature(enable = "avx2,f16c")]
    fn enabled(self, task: impl Task) {
        task.run(self);
    }
}

/// Eight rows at a time, four columns of each side by side.
impl Instructions for Avx2 {
    /// In 16 bits each.
    type Codes = [__m256i; 2];
    /// A product adds up two neighbours, so each row has two.
    type Sums = [__m256i; 2];
    type Numbers = __m256;
    const PARTS: usize = 2;

    fn run(self, task: impl Task) {
        intrinsics!(self.enabled(task))
    }

    #[inline(always)]
    fn halves(self, halves: &[u8; 2 * ROWS]) -> [f32; ROWS] {
        let mut numbers = [0.0; ROWS];
        for (numbers, halves) in numbers.as_chunks_mut::<8>().0.iter_mut().zip(halves.as_chunks::<16>().0) {
            intrinsics!({
                let halves = _mm256_cvtph_ps(_mm_loadu_si128(halves.as_ptr().cast()));
                _mm256_storeu_ps(numbers.as_mut_ptr(), halves);
            });
        }
        numbers
    }

    #[inline(always)]
    fn codes(self, codes: &[u8; VECTOR], part: usize) -> [__m256i; 2] {
        let [low, high] = [&codes.as_chunks::<16>().0[2 * part], &codes.as_chunks::<16>().0[2 * part + 1]];
        intrinsics!([
            _mm256_cvtepu8_epi16(_mm_loadu_si128(low.as_ptr().cast())),
            _mm256_cvtepu8_epi16(_mm_loadu_si128(high.as_ptr().cast())),
        ])
    }

    #[inline(always)]
    fn sums(self, start: i32) -> [__m256i; 2] {
        intrinsics!([_mm256_set1_epi64x(i64::from(start as u32)); 2])
    }

    #[inline(always)]
    fn add_products(self, [a, b]: [__m256i; 2], [low, high]: [__m256i; 2], x: Four) -> [__m256i; 2] {
        intrinsics!({
            let x = _mm256_set1_epi64x(x.codes);
            [_mm256_add_epi32(a, _mm256_madd_epi16(low, x)), _mm256_add_epi32(b, _mm256_madd_epi16(high, x))]
        })
    }

    #[inline(always)]
    fn numbers(self, [a, b]: [__m256i; 2]) -> __m256 {
        // Rows 0, 1, 4, 5, 2, 3, 6, 7: the halves of vectors are added up by themselves.
        intrinsics!(_mm256_cvtepi32_ps(_mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0b11_01_10_00)))
    }

    #[inline(always)]
    fn load(self, numbers: &[f32; ROWS], part: usize) -> __m256 {
        intrinsics!(_mm256_loadu_ps(numbers.as_chunks::<8>().0[part].as_ptr()))
    }

    #[inline(always)]
    fn splat(self, number: f32) -> __m256 {
        intrinsics!(_mm256_set1_ps(number))
    }

    #[inline(always)]
    fn multiply(self, a: __m256, b: __m256) -> __m256 {
        intrinsics!(_mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        intrinsics!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn store(self, numbers: __m256, to: &mut [f32; ROWS], part: usize) {
        intrinsics!(_mm256_storeu_ps(to.as_chunks_mut::<8>().0[part].as_mut_ptr(), numbers));
    }
}
