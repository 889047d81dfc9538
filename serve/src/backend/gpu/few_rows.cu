// Up to eight rows of `f16` or `bf16` times the rows of a matrix of that type, or of `e4m3` with a
// scale for each of its rows. The matrix is read once, for tensor cores.
//
// A launch may overlap the one before (programmatic dependent launch): the matrix, which no kernel
// writes, is asked for before that is over.
// Architecture: compute_90

#include "half.cuh"

// A warp multiplies a tile of so many rows of the matrix by eight rows of `x`.
const u32 TILE = 16, ROWS = 8;
// The warps of a block share a tile: each sums up other columns.
const u32 WARPS = 8;
// Reads of a thread from each row of the matrix that are under way at once.
const u32 DEPTH = 8;
// What is added to a product.
const u32 BIAS = 1, OUTPUT = 2;

// What a thread reads at once.
struct __align__(16) Vector {
    u32 words[4];
};

// A tile's sums: of two rows of the matrix by two rows of `x` in each thread.
struct Sums {
    float of[4];
};

// Adds the products of a tile and sixteen columns: `a` are two numbers of two rows of the matrix, and
// two more of each; `b` those of a row of `x`. Which columns a thread has is the same for both.
__device__ void multiply(F16, Sums &sums, const u32 (&a)[4], u32 first, u32 second) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums.of[0]), "+f"(sums.of[1]), "+f"(sums.of[2]), "+f"(sums.of[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(first), "r"(second));
}
__device__ void multiply(Bf16, Sums &sums, const u32 (&a)[4], u32 first, u32 second) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums.of[0]), "+f"(sums.of[1]), "+f"(sums.of[2]), "+f"(sums.of[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(first), "r"(second));
}

// Two numbers of `e4m3`, which are exact in either type.
__device__ u32 widened(F16, u16 pair) {
    u32 both;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(both) : "h"(pair));
    return both;
}
__device__ u32 widened(Bf16, u16 pair) {
    const u32 both = widened(F16{}, pair);
    return Bf16::bits(F16::number((u16)both)) | (u32)Bf16::bits(F16::number((u16)(both >> 16))) << 16;
}

// Weights of the type of `x`.
struct Same {
    // Pairs of numbers in a vector.
    static const u32 PAIRS = 4;
    template <class Number>
    static __device__ u32 pair(const Vector &vector, u32 index) {
        return vector.words[index];
    }
};
// Weights of 8 bits.
struct E4m3 {
    static const u32 PAIRS = 8;
    template <class Number>
    static __device__ u32 pair(const Vector &vector, u32 index) {
        return widened(Number{}, (u16)(vector.words[index / 2] >> 16 * (index % 2)));
    }
};

// Weights are read once, and stay out of the way of `x`, which all blocks read.
__device__ Vector once(const Vector *from) {
    Vector vector;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(vector.words[0]), "=r"(vector.words[1]), "=r"(vector.words[2]), "=r"(vector.words[3])
                 : "l"(from));
    return vector;
}

// A tile of the matrix, whose rows have `width` vectors. A row's results do not depend on the other
// rows of `x`.
template <class Number, class Weight>
__device__ void few_rows(u16 *out, const Vector *weight, const float *scales, const Vector *x, const u16 *bias,
                         u32 rows, u32 outputs, u32 width, float factor, u32 added) {
    // Vectors of `x` for each of the matrix.
    const u32 WIDER = Weight::PAIRS / 4;
    __shared__ float parts[WARPS][TILE][ROWS];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4, first = blockIdx.x * TILE;
    const u32 row = lane / 4;
    // What is beyond the last row of the matrix is that row once more.
    const Vector *from[2];
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        const u32 output = first + row + 8 * half;
        from[half] = weight + (u64)(output < outputs ? output : outputs - 1) * width;
    }
    // The kernel after this may begin what it does before it waits for this.
    asm volatile("griddepcontrol.launch_dependents;");
    Sums sums = {};
    for (u32 begin = 0; begin < width; begin += 4 * WARPS * DEPTH) {
        const u32 start = begin + 4 * warp + quad;
        // All are asked for before the first is needed.
        Vector weights[DEPTH][2];
#pragma unroll
        for (u32 step = 0; step < DEPTH; ++step)
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                const u32 at = start + 4 * WARPS * step;
                weights[step][half] = at < width ? once(from[half] + at) : Vector{};
            }
        // The kernel before is over, which may have written `x`.
        if (begin == 0)
            asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll
        for (u32 step = 0; step < DEPTH; ++step) {
            const u32 at = start + 4 * WARPS * step;
#pragma unroll
            for (u32 part = 0; part < WIDER; ++part) {
                const Vector of_row = at < width && row < rows ? x[((u64)row * width + at) * WIDER + part] : Vector{};
#pragma unroll
                for (u32 two = 0; two < 4; two += 2) {
                    u32 a[4];
#pragma unroll
                    for (u32 index = 0; index < 4; ++index)
                        a[index] = Weight::template pair<Number>(weights[step][index % 2],
                                                                 4 * part + two + index / 2);
                    multiply(Number{}, sums, a, of_row.words[two], of_row.words[two + 1]);
                }
            }
        }
    }
#pragma unroll
    for (u32 half = 0; half < 2; ++half)
#pragma unroll
        for (u32 which = 0; which < 2; ++which)
            parts[warp][row + 8 * half][2 * quad + which] = sums.of[2 * half + which];
    __syncthreads();
    const u32 of_x = threadIdx.x / TILE, output = first + threadIdx.x % TILE;
    if (of_x >= rows || output >= outputs)
        return;
    float sum = 0.0f;
#pragma unroll
    for (u32 part = 0; part < WARPS; ++part)
        sum += parts[part][threadIdx.x % TILE][of_x];
    u16 *to = out + (u64)of_x * outputs + output;
    const float before = added == BIAS     ? Number::number(bias[output])
                         : added == OUTPUT ? Number::number(*to)
                                           : 0.0f;
    *to = Number::bits(fmaf(sum, (scales ? scales[output] : 1.0f) * factor, before));
}

#define KERNEL(name, Number, Weight)                                                                               \
    extern "C" __global__ void name(u16 *out, const Vector *weight, const float *scales, const Vector *x,          \
                                    const u16 *bias, u32 rows, u32 outputs, u32 width, float factor, u32 added) {  \
        few_rows<Number, Weight>(out, weight, scales, x, bias, rows, outputs, width, factor, added);               \
    }
KERNEL(few_rows_f16_by_f16, F16, Same)
KERNEL(few_rows_bf16_by_bf16, Bf16, Same)
KERNEL(few_rows_f16_by_e4m3, F16, E4m3)
KERNEL(few_rows_bf16_by_e4m3, Bf16, E4m3)
