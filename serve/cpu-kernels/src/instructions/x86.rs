//! AVX-512 with VNNI, and AVX2.

use std::arch::x86_64::*;

use super::{Instructions, Task};
use crate::packed::{ROWS, VECTOR};

/// AVX-512 with VNNI. A value of it says that the processor has them.
#[derive(Clone, Copy, Debug)]
pub struct Avx512(());

/// AVX2. A value of it says that the processor has it.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

// Codes become 16 bits wide, four columns of a row side by side. A product adds up two neighbours,
// so a row has two sums until all products are there.

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
    type Codes = [__m512i; 2];
    type Sums = [__m512i; 2];
    type Numbers = __m512;
    const PARTS: usize = 1;

    fn run(self, task: impl Task) {
        intrinsics!(self.enabled(task))
    }

    #[inline(always)]
    fn codes(self, codes: &[u8; VECTOR], _: usize) -> [__m512i; 2] {
        let halves = codes.as_chunks::<32>().0;
        let [low, high] = [&halves[0], &halves[1]];
        intrinsics!([
            _mm512_cvtepu8_epi16(_mm256_loadu_si256(low.as_ptr().cast())),
            _mm512_cvtepu8_epi16(_mm256_loadu_si256(high.as_ptr().cast())),
        ])
    }

    #[inline(always)]
    fn sums(self, start: i32) -> [__m512i; 2] {
        intrinsics!([_mm512_set1_epi64(i64::from(start as u32)); 2])
    }

    #[inline(always)]
    fn add_products(self, [a, b]: [__m512i; 2], [low, high]: [__m512i; 2], x: i64) -> [__m512i; 2] {
        intrinsics!({
            let x = _mm512_set1_epi64(x);
            [_mm512_dpwssd_epi32(a, low, x), _mm512_dpwssd_epi32(b, high, x)]
        })
    }

    #[inline(always)]
    fn numbers(self, [a, b]: [__m512i; 2]) -> __m512 {
        intrinsics!({
            let first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let second = _mm512_or_si512(first, _mm512_set1_epi32(1));
            let [first, second] =
                [_mm512_permutex2var_epi32(a, first, b), _mm512_permutex2var_epi32(a, second, b)];
            _mm512_cvtepi32_ps(_mm512_add_epi32(first, second))
        })
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
        is_x86_feature_detected!("avx2").then_some(Self(()))
    }

    #[target_feature(enable = "avx2")]
    fn enabled(self, task: impl Task) {
        task.run(self);
    }
}

/// Eight rows at a time.
impl Instructions for Avx2 {
    type Codes = [__m256i; 2];
    type Sums = [__m256i; 2];
    type Numbers = __m256;
    const PARTS: usize = 2;

    fn run(self, task: impl Task) {
        intrinsics!(self.enabled(task))
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
    fn add_products(self, [a, b]: [__m256i; 2], [low, high]: [__m256i; 2], x: i64) -> [__m256i; 2] {
        intrinsics!({
            let x = _mm256_set1_epi64x(x);
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
