// Quantization of rows to `e4m3` with a scale each, for `f16` and `bf16`. A block for each row.
// Architecture: compute_89

#include "half.cuh"

// Eight numbers, which a thread reads at once; widths are in these.
struct __align__(16) Eight {
    u16 bits[8];
};

// Eight of `e4m3`, which it writes.
struct __align__(8) Quantized {
    u16 pairs[4];
};

// Two numbers, the first in the lower half. What is beyond the type becomes its largest number.
__device__ u16 pair(float first, float second) {
    u16 bits;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(second), "f"(first));
    return bits;
}

const float LARGEST = 448.0f;
// Rows of smaller numbers, and of zeros, have the scale of this one, whose inverse is finite.
const float SMALLEST = 1e-30f;

// The largest of what all threads have. NaN is passed over.
__device__ float largest(float number) {
    __shared__ float of_warps[32];
    for (int lane = 16; lane > 0; lane /= 2)
        number = fmaxf(number, __shfl_xor_sync(0xffffffff, number, lane));
    if (threadIdx.x % 32 == 0)
        of_warps[threadIdx.x / 32] = number;
    __syncthreads();
    for (u32 warp = 0; warp < blockDim.x / 32; ++warp)
        number = fmaxf(number, of_warps[warp]);
    return number;
}

// Each row is divided by its scale, which makes its largest number that of `e4m3`. NaN stays
// NaN, and so does a row that is infinite somewhere.
template <class Number>
__device__ void quantize_rows(Quantized *out, float *scales, const Eight *in, u32 width) {
    const Eight *from = in + (u64)blockIdx.x * width;
    Quantized *to = out + (u64)blockIdx.x * width;
    float number = SMALLEST;
    for (u32 at = threadIdx.x; at < width; at += blockDim.x)
        for (u16 bits : from[at].bits)
            number = fmaxf(number, fabsf(Number::number(bits)));
    number = largest(number);
    const float inverse = LARGEST / number;
    for (u32 at = threadIdx.x; at < width; at += blockDim.x) {
        const Eight numbers = from[at];
        Quantized quantized;
        for (int two = 0; two < 4; ++two)
            quantized.pairs[two] = pair(Number::number(numbers.bits[2 * two]) * inverse,
                                        Number::number(numbers.bits[2 * two + 1]) * inverse);
        to[at] = quantized;
    }
    if (threadIdx.x == 0)
        scales[blockIdx.x] = number / LARGEST;
}

extern "C" __global__ void quantize_rows_f16(Quantized *out, float *scales, const Eight *in, u32 width) {
    quantize_rows<F16>(out, scales, in, width);
}
extern "C" __global__ void quantize_rows_bf16(Quantized *out, float *scales, const Eight *in, u32 width) {
    quantize_rows<Bf16>(out, scales, in, width);
}
