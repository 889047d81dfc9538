// The place of the first of the largest numbers of each row; -1 where one is NaN.
// A block of 1024 threads for each row. `wide` says whether places have 64 bits.

#include "rows.cuh"

struct F16 {
    using Bits = u16;
    static __device__ float number(Bits bits) {
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
        return x;
    }
};

struct Bf16 {
    using Bits = u16;
    static __device__ float number(Bits bits) { return __uint_as_float((u32)bits << 16); }
};

template <class Number>
__device__ void argmax(const typename Number::Bits *input, void *places, u32 vocab, u32 wide) {
    const Largest largest = largest_of<Number>(input + (u64)blockIdx.x * vocab, vocab);
    if (threadIdx.x > 0) return;
    write_place(places, wide, largest.nan() ? -1 : (long long)largest.place);
}

#define ARGMAX(NAME, NUMBER)                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS)                                              \
        NAME(const NUMBER::Bits *input, void *places, u32 vocab, u32 wide) {                           \
        argmax<NUMBER>(input, places, vocab, wide);                                                    \
    }
ARGMAX(argmax_f32, F32)
ARGMAX(argmax_f16, F16)
ARGMAX(argmax_bf16, Bf16)
