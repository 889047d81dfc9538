// A few rows of `f16` or `bf16` times the rows of a matrix of the same type, or of `e4m3` with a
// scale for each. A warp for every two rows of the matrix, which are read once.
//
// A launch may overlap the one before (programmatic dependent launch): the matrix, which no kernel
// writes, is asked for before that is over.
// Architecture: compute_90

#include "half.cuh"

// What a thread reads at once.
struct __align__(16) Bytes {
    u32 words[4];
};

// Numbers that are read once stay out of the way of the rows, which all warps read.
__device__ Bytes stream(const Bytes *from) {
    Bytes bytes;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bytes.words[0]), "=r"(bytes.words[1]), "=r"(bytes.words[2]), "=r"(bytes.words[3])
                 : "l"(from));
    return bytes;
}

// The kernel before is over, and what it wrote can be read.
__device__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The kernel after this may begin what it does before it waits for this.
__device__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }

// Two numbers of 16 bits.
template <class Number>
__device__ void unpack(u32 pair, float *numbers) {
    numbers[0] = Number::number((u16)pair);
    numbers[1] = Number::number((u16)(pair >> 16));
}

// Elements of a matrix: how many there are in 16 bytes, and which.
struct E4m3 {
    static const u32 COUNT = 16;
    static __device__ void unpack(const Bytes &bytes, float *numbers) {
#pragma unroll
        for (int two = 0; two < 8; ++two) {
            u32 pair;
            const u16 both = (u16)(bytes.words[two / 2] >> 16 * (two % 2));
            asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(both));
            ::unpack<F16>(pair, numbers + 2 * two);
        }
    }
};
template <class Number>
struct Half {
    static const u32 COUNT = 8;
    static __device__ void unpack(const Bytes &bytes, float *numbers) {
#pragma unroll
        for (int two = 0; two < 4; ++two)
            ::unpack<Number>(bytes.words[two], numbers + 2 * two);
    }
};

__device__ float of_warp(float sum) {
    for (int lane = 16; lane > 0; lane /= 2)
        sum += __shfl_xor_sync(0xffffffff, sum, lane);
    return sum;
}

// Reads of a thread from each row of the matrix that are under way at once.
const u32 DEPTH = 4;
// What is added to a product.
const u32 BIAS = 1, OUTPUT = 2;

// `outputs` rows of the matrix, of `width` times 16 bytes. There are scales or none. A row's results
// do not depend on the others.
template <class Number, class Weight, u32 ROWS>
__device__ void few_rows(u16 *out, const Bytes *weight, const float *scales, const Bytes *x, const u16 *bias,
                         u32 outputs, u32 width, float factor, u32 added) {
    const u32 COUNT = Weight::COUNT, X_READS = COUNT / 8;
    const u32 lane = threadIdx.x % 32, output = 2 * ((blockIdx.x * blockDim.x + threadIdx.x) / 32);
    let_next_begin();
    if (output >= outputs)
        return;
    // The last warp of an odd number computes one of them twice.
    const u32 both[2] = {output, output + 1 < outputs ? output + 1 : output};
    const Bytes *from[2] = {weight + (u64)both[0] * width, weight + (u64)both[1] * width};
    float sums[2][ROWS] = {};
    for (u32 first = 0; first < width; first += 32 * DEPTH) {
        const u32 start = first + lane;
        // All are asked for before the first is needed.
        Bytes weights[2][DEPTH];
#pragma unroll
        for (u32 step = 0; step < DEPTH; ++step)
#pragma unroll
            for (u32 which = 0; which < 2; ++which)
                weights[which][step] = start + 32 * step < width ? stream(from[which] + start + 32 * step) : Bytes{};
        if (first == 0)
            wait_for_previous();
#pragma unroll
        for (u32 step = 0; step < DEPTH; ++step) {
            if (start + 32 * step >= width)
                break;
            float numbers[2][COUNT];
            Weight::unpack(weights[0][step], numbers[0]);
            Weight::unpack(weights[1][step], numbers[1]);
#pragma unroll
            for (u32 row = 0; row < ROWS; ++row) {
                const Bytes *of_row = x + ((u64)row * width + start + 32 * step) * X_READS;
#pragma unroll
                for (u32 read = 0; read < X_READS; ++read) {
                    const Bytes some = of_row[read];
                    float xs[8];
                    Half<Number>::unpack(some, xs);
#pragma unroll
                    for (u32 at = 0; at < 8; ++at) {
                        sums[0][row] = fmaf(numbers[0][8 * read + at], xs[at], sums[0][row]);
                        sums[1][row] = fmaf(numbers[1][8 * read + at], xs[at], sums[1][row]);
                    }
                }
            }
        }
    }
#pragma unroll
    for (u32 which = 0; which < 2; ++which) {
        const float scale = scales ? scales[both[which]] * factor : factor;
#pragma unroll
        for (u32 row = 0; row < ROWS; ++row) {
            const float sum = of_warp(sums[which][row]) * scale;
            if (lane != 0 || (which == 1 && both[1] == output))
                continue;
            u16 *to = out + (u64)row * outputs + both[which];
            const float before = added == BIAS ? Number::number(bias[both[which]])
                                 : added == OUTPUT ? Number::number(*to) : 0.0f;
            *to = Number::bits(sum + before);
        }
    }
}

// Kernels for rows of a type and a matrix of one.
#define KERNEL(type, Number, of, Weight, ROWS)                                                                       \
    extern "C" __global__ void few_rows_##type##_by_##of##_##ROWS(                                                   \
        u16 *out, const Bytes *weight, const float *scales, const Bytes *x, const u16 *bias, u32 outputs, u32 width, \
        float factor, u32 added) {                                                                                   \
        few_rows<Number, Weight, ROWS>(out, weight, scales, x, bias, outputs, width, factor, added);                 \
    }
#define KERNELS(type, Number, of, Weight)  \
    KERNEL(type, Number, of, Weight, 1)    \
    KERNEL(type, Number, of, Weight, 2)    \
    KERNEL(type, Number, of, Weight, 4)    \
    KERNEL(type, Number, of, Weight, 8)
KERNELS(f16, F16, f16, Half<F16>)
KERNELS(f16, F16, e4m3, E4m3)
KERNELS(bf16, Bf16, bf16, Half<Bf16>)
KERNELS(bf16, Bf16, e4m3, E4m3)
