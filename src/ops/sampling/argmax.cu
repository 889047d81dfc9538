// The place of the first of the largest numbers of each row; -1 where one is NaN.
// A block of 1024 threads for each row. `wide` says whether places have 64 bits.

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct F32 {
    using Bits = float;
    static __device__ float number(Bits x) { return x; }
};

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

constexpr u32 THREADS = 1024, WARPS = THREADS / 32;
// Numbers that a thread reads at once.
constexpr u32 BATCH = 8;
constexpr u32 NAN_KEY = 0xffffffff;

// In the order of the numbers, none of which is NaN. Both zeros are the same.
__device__ u32 key(float x) {
    const u32 bits = __float_as_uint(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

template <class Number>
__device__ void argmax(const typename Number::Bits *input, void *places, u32 vocab, u32 wide) {
    const typename Number::Bits *row = input + (u64)blockIdx.x * vocab;
    float largest = -INFINITY;
    u32 place = threadIdx.x;
    bool nan = false;
    auto take = [&](u32 at, typename Number::Bits bits) {
        const float x = Number::number(bits);
        nan |= x != x;
        if (x > largest) {
            largest = x;
            place = at;
        }
    };
    u32 from = threadIdx.x;
    for (; from + (BATCH - 1) * THREADS < vocab; from += BATCH * THREADS) {
        typename Number::Bits batch[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) batch[i] = __ldg(row + from + i * THREADS);
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) take(from + i * THREADS, batch[i]);
    }
#pragma unroll 1
    for (; from < vocab; from += THREADS) take(from, __ldg(row + from));
    // Of equal numbers, the smaller place is the larger.
    u64 best = (u64)(nan ? NAN_KEY : key(largest)) << 32 | ~place;
    if (threadIdx.x >= vocab) best = 0;

    __shared__ u64 of_warps[WARPS];
    for (u32 step = 16; step > 0; step /= 2) best = max(best, __shfl_xor_sync(~0u, best, step));
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (u32 warp = 1; warp < WARPS; ++warp) best = max(best, of_warps[warp]);
    const long long found = best >> 32 == NAN_KEY ? -1 : (long long)(u32)~best;
    if (wide) {
        ((long long *)places)[blockIdx.x] = found;
    } else {
        ((int *)places)[blockIdx.x] = (int)found;
    }
}

#define ARGMAX(NAME, NUMBER)                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS)                                              \
        NAME(const NUMBER::Bits *input, void *places, u32 vocab, u32 wide) {                           \
        argmax<NUMBER>(input, places, vocab, wide);                                                    \
    }
ARGMAX(argmax_f32, F32)
ARGMAX(argmax_f16, F16)
ARGMAX(argmax_bf16, Bf16)
