// Draws a token from each row of logits, by a number of the row's own. A block of 1024
// threads for each row, which looks at no other; `wide` says whether tokens have 64 bits.
//
// A token's weight is 2 to the power of its distance from the largest logit: at most 1. It
// is made by additions, multiplications and a division that are rounded each, and summed as
// an integer. So the same row and numbers give the same token wherever they are, and
// `reference::sample`, which does the same, gives it too. Weights replace the logits.

#include "rows.cuh"

constexpr u32 ONE = 0x3f800000;

// A weight of 1 has 2^40, so rows of 2^23 have fewer than 2^64.
__device__ u64 units_of(u32 bits) { return Units{127, 17}.of(bits); }

// The weight of a logit that is not above the largest. Less than a unit is 0.
__device__ float weight(float x, float largest, float temperature) {
    if (x == largest) return 1;
    const float power = __fmul_rn(__fdiv_rn(__fsub_rn(x, largest), temperature), 1.44269504f);
    if (!(power > -41)) return 0;
    const float whole = rintf(power);
    const float part = __fsub_rn(power, whole);
    // The series of 2 to the power of `part`, which is between -0.5 and 0.5.
    float sum = 1.5403530e-4f;
    sum = __fadd_rn(__fmul_rn(sum, part), 1.3333558e-3f);
    sum = __fadd_rn(__fmul_rn(sum, part), 9.6181291e-3f);
    sum = __fadd_rn(__fmul_rn(sum, part), 5.5504109e-2f);
    sum = __fadd_rn(__fmul_rn(sum, part), 2.4022651e-1f);
    sum = __fadd_rn(__fmul_rn(sum, part), 6.9314718e-1f);
    sum = __fadd_rn(__fmul_rn(sum, part), 1);
    return __uint_as_float(__float_as_uint(sum) + ((int)whole << 23));
}

// What a filter has to reach: a number of tokens, or a sum of weights.
struct Measure {
    bool counts;
    __device__ u64 operator()(u32 bits) const { return counts ? 1 : units_of(bits); }
};

// A number between 0 and 1 as a part of 2^64, below it; NaN is 0.
__device__ u64 part_of(float x) {
    return x > 0 ? __float2ull_rz(fminf(x, 0.99999994f) * 18446744073709551616.0f) : 0;
}

// The first token up to which those from `low` on have more than `part` of their sum.
__device__ u32 pick(const float *row, u32 vocab, u32 low, u64 part) {
    __shared__ u64 of_warps[WARPS];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 from = 0, len = vocab;
    u64 rest = 0;
    // Each warp sums a part of the range; the next range is the part that has the token.
    do {
        const u32 share = (len + WARPS - 1) / WARPS;
        const u32 end = min((warp + 1) * share, len);
        u64 sum = 0;
#pragma unroll 8
        for (u32 at = warp * share + lane; at < end; at += 32) {
            const u32 bits = bits_of(row[from + at]);
            sum += bits >= low ? units_of(bits) : 0;
        }
        sum = warp_all(sum, Add());
        if (lane == 0) of_warps[warp] = sum;
        __syncthreads();
        if (len == vocab) rest = __umul64hi(warp_all(of_warps[lane], Add()), part);
        u32 chosen = 0;
        for (; chosen < WARPS - 1 && rest >= of_warps[chosen]; ++chosen) rest -= of_warps[chosen];
        __syncthreads();
        from += chosen * share;
        len = min(share, len - chosen * share);
    } while (len > 1);
    return from;
}

extern "C" __global__ void __launch_bounds__(THREADS) sample(
    float *logits, void *tokens, const float *uniforms, const float *temperatures, float temperature,
    const int *top_ks, int top_k, const float *top_ps, float top_p, const float *min_ps, float min_p,
    u32 vocab, u32 wide
) {
    const u32 at = blockIdx.x;
    float *row = logits + (u64)at * vocab;
    const Largest largest = largest_of<F32>(row, vocab);
    long long token = largest.place;
    temperature = temperatures ? temperatures[at] : temperature;
    if (largest.nan() || largest.number() == -INFINITY) {
        token = -1;
    } else if (temperature > 0) {
        top_k = top_ks ? top_ks[at] : top_k;
        top_p = top_ps ? top_ps[at] : top_p;
        min_p = min_ps ? min_ps[at] : min_p;
        for_each(row, vocab, [&](u32 at, float x) { row[at] = weight(x, largest.number(), temperature); });
        __syncthreads();
        u32 low = min_p > 0 ? __float_as_uint(fminf(min_p, 1)) : 1;
        if (top_k > 0 && top_k < vocab) {
            low = cut_at(row, vocab, low, ONE, top_k, Measure{true}).low;
        }
        if (!(top_p >= 1)) {
            const u64 sum = sum_from(row, vocab, low, Measure{false});
            const u64 limit = max(__umul64hi(sum, part_of(top_p)), 1ull);
            low = cut_at(row, vocab, low, ONE, limit, Measure{false}).low;
        }
        token = pick(row, vocab, low, part_of(uniforms[at]));
    }
    if (threadIdx.x == 0) write_place(tokens, wide, token);
}
