// A few rows of `f16` or `bf16` times the rows of an `e4m3` matrix, each of which has a scale. A warp
// for every two of the matrix, which are read once.
// Architecture: compute_89

#include "half.cuh"

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

// Sixteen weights as numbers.
struct Numbers {
    float of[16];
};

__device__ Numbers numbers(const SixteenE4m3 &weight) {
    Numbers numbers;
#pragma unroll
    for (int two = 0; two < 8; ++two) {
        u32 pair;
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(weight.pairs[two]));
        numbers.of[2 * two] = F16::number((u16)pair);
        numbers.of[2 * two + 1] = F16::number((u16)(pair >> 16));
    }
    return numbers;
}

// The sum of products, added to what there is.
template <class Number>
__device__ float dot(float sum, const Numbers &weight, const Sixteen &x) {
#pragma unroll
    for (int two = 0; two < 8; ++two) {
        sum = fmaf(weight.of[2 * two], Number::number((u16)x.words[two]), sum);
        sum = fmaf(weight.of[2 * two + 1], Number::number((u16)(x.words[two] >> 16)), sum);
    }
    return sum;
}

__device__ float of_warp(float sum) {
    for (int lane = 16; lane > 0; lane /= 2)
        sum += __shfl_xor_sync(0xffffffff, sum, lane);
    return sum;
}

// Reads of a thread from each row of the matrix that are under way at once.
const u32 DEPTH = 4;
// What is added to a product.
const u32 BIAS = 1, OUTPUT = 2;

// `outputs` rows of the matrix. A row's results do not depend on the others.
template <class Number, u32 ROWS>
__device__ void few_rows(u16 *out, const SixteenE4m3 *weight, const float *scales, const Sixteen *x, const u16 *bias,
                         u32 outputs, u32 width, float factor, u32 added) {
    const u32 lane = threadIdx.x % 32, output = 2 * ((blockIdx.x * blockDim.x + threadIdx.x) / 32);
    if (output >= outputs)
        return;
    // The last warp of an odd number computes one of them twice.
    const u32 both[2] = {output, output + 1 < outputs ? output + 1 : output};
    const SixteenE4m3 *from[2] = {weight + (u64)both[0] * width, weight + (u64)both[1] * width};
    float sums[2][ROWS] = {};
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
            const Numbers first = numbers(weights[0][step]), second = numbers(weights[1][step]);
#pragma unroll
            for (u32 row = 0; row < ROWS; ++row) {
                const Sixteen of_row = x[row * width + start + 32 * step];
                sums[0][row] = dot<Number>(sums[0][row], first, of_row);
                sums[1][row] = dot<Number>(sums[1][row], second, of_row);
            }
        }
    }
#pragma unroll
    for (u32 which = 0; which < 2; ++which) {
        const float scale = scales[both[which]] * factor;
#pragma unroll
        for (u32 row = 0; row < ROWS; ++row) {
            const float sum = of_warp(sums[which][row]) * scale;
            if (lane != 0 || (which == 1 && both[1] == output))
                continue;
            u16 *to = out + row * outputs + both[which];
            const float before = added == BIAS ? Number::number(bias[both[which]])
                                 : added == OUTPUT ? Number::number(*to) : 0.0f;
            *to = Number::bits(sum + before);
        }
    }
}

#define KERNEL(type, Number, ROWS)                                                                                 \
    extern "C" __global__ void few_rows_##type##_##ROWS(u16 *out, const SixteenE4m3 *weight, const float *scales,   \
                                                        const Sixteen *x, const u16 *bias, u32 outputs, u32 width, \
                                                        float factor, u32 added) {                                 \
        few_rows<Number, ROWS>(out, weight, scales, x, bias, outputs, width, factor, added);                       \
    }
KERNEL(f16, F16, 1)
KERNEL(f16, F16, 2)
KERNEL(f16, F16, 4)
KERNEL(f16, F16, 8)
KERNEL(bf16, Bf16, 1)
KERNEL(bf16, Bf16, 2)
KERNEL(bf16, Bf16, 4)
KERNEL(bf16, Bf16, 8)
