// A row of `f16` or `bf16` times the rows of an `e4m3` matrix, each of which has a scale. A warp for
// every two of them.
// Architecture: compute_89

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

__device__ float f16(u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

struct F16 {
    static __device__ float number(u16 bits) { return f16(bits); }
    static __device__ u16 bits(float x) {
        u16 bits;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
        return bits;
    }
};

struct Bf16 {
    static __device__ float number(u16 bits) { return __uint_as_float((u32)bits << 16); }
    static __device__ u16 bits(float x) {
        u16 bits;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
        return bits;
    }
};

// Sixteen numbers, which a thread reads at once; widths are in these.
struct __align__(16) Sixteen {
    u32 words[8];
};
struct __align__(16) SixteenE4m3 {
    u16 pairs[8];
};

// Numbers that are read once stay out of the way of the row, which all warps read.
__device__ SixteenE4m3 stream(const SixteenE4m3 *from) {
    u32 words[4];
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(from));
    SixteenE4m3 numbers;
#pragma unroll
    for (int two = 0; two < 8; ++two)
        numbers.pairs[two] = (u16)(words[two / 2] >> 16 * (two % 2));
    return numbers;
}

// The sum of products, added to what there is.
template <class Number>
__device__ float dot(float sum, const SixteenE4m3 &weight, const Sixteen &x) {
#pragma unroll
    for (int two = 0; two < 8; ++two) {
        u32 pair;
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(weight.pairs[two]));
        sum = fmaf(f16((u16)pair), Number::number((u16)x.words[two]), sum);
        sum = fmaf(f16((u16)(pair >> 16)), Number::number((u16)(x.words[two] >> 16)), sum);
    }
    return sum;
}

__device__ float of_warp(float sum) {
    for (int lane = 16; lane > 0; lane /= 2)
        sum += __shfl_xor_sync(0xffffffff, sum, lane);
    return sum;
}

// Reads of a thread from each row that are under way at once.
const u32 DEPTH = 4;
// What is added to a product.
const u32 BIAS = 1, OUTPUT = 2;

template <class Number>
__device__ void gemv(u16 *out, const SixteenE4m3 *weight, const float *scales, const Sixteen *x, const u16 *bias,
                     u32 rows, u32 width, float factor, u32 added) {
    const u32 lane = threadIdx.x % 32, row = 2 * ((blockIdx.x * blockDim.x + threadIdx.x) / 32);
    if (row >= rows)
        return;
    // The last warp of an odd number of rows computes one of them twice.
    const u32 all[2] = {row, row + 1 < rows ? row + 1 : row};
    const SixteenE4m3 *from[2] = {weight + (u64)all[0] * width, weight + (u64)all[1] * width};
    float sums[2] = {};
    for (u32 start = lane; start < width; start += 32 * DEPTH) {
        // All are asked for before the first is needed.
        SixteenE4m3 weights[2][DEPTH];
#pragma unroll
        for (u32 step = 0; step < DEPTH; ++step)
#pragma unroll
            for (u32 which = 0; which < 2; ++which)
                weights[which][step] =
                    start + 32 * step < width ? stream(from[which] + start + 32 * step) : SixteenE4m3{};
#pragma unroll
        for (u32 step = 0; step < DEPTH; ++step) {
            if (start + 32 * step >= width)
                break;
            const Sixteen numbers = x[start + 32 * step];
            sums[0] = dot<Number>(sums[0], weights[0][step], numbers);
            sums[1] = dot<Number>(sums[1], weights[1][step], numbers);
        }
    }
#pragma unroll
    for (u32 which = 0; which < 2; ++which) {
        const float sum = of_warp(sums[which]) * scales[all[which]] * factor;
        if (lane != which || (which == 1 && all[1] == row))
            continue;
        u16 *to = out + all[which];
        const float before = added == BIAS ? Number::number(bias[all[which]])
                             : added == OUTPUT ? Number::number(*to) : 0.0f;
        *to = Number::bits(sum + before);
    }
}

extern "C" __global__ void gemv_f16(u16 *out, const SixteenE4m3 *weight, const float *scales, const Sixteen *x,
                                    const u16 *bias, u32 rows, u32 width, float factor, u32 added) {
    gemv<F16>(out, weight, scales, x, bias, rows, width, factor, added);
}
extern "C" __global__ void gemv_bf16(u16 *out, const SixteenE4m3 *weight, const float *scales, const Sixteen *x,
                                     const u16 *bias, u32 rows, u32 width, float factor, u32 added) {
    gemv<Bf16>(out, weight, scales, x, bias, rows, width, factor, added);
}
