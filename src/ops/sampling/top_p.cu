// Keeps the largest numbers of each row that together reach `top_p`, and all equal to the
// smallest of them; divides them by their sum, and makes the others 0. A block of 1024
// threads for each row.
//
// Numbers that are not above 0, and NaN, count as 0. The others are ordered as their bits
// are, and the threshold is searched among the bits: each round divides the range that it
// lies in by four, so there are 17 at most. Sums are of integers, in which order does not
// matter. Where a row holds infinity, it becomes NaN there.

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr u32 THREADS = 1024, WARPS = THREADS / 32;
constexpr u32 INFINITY_BITS = 0x7f800000;
// What a thread keeps of the range, where it is no more than this.
constexpr u32 HELD = 8;
// Numbers that a thread reads at once.
constexpr u32 BATCH = 8;

// The bits of a number above 0, else 0.
__device__ u32 bits_of(float x) { return x > 0 ? __float_as_uint(x) : 0; }

// The exponent that multiplies the mantissa of a number: that of denormal ones is 1.
__device__ u32 exponent(u32 bits) { return max(bits >> 23, 1u); }

__device__ u64 mantissa(u32 bits) { return bits >> 23 ? (bits & 0x7fffff) | 0x800000 : bits; }

// Integers of a row: the mantissa of its largest number, with `guard` bits behind it.
struct Units {
    u32 largest;
    u32 guard;

    // Rounded down.
    __device__ u64 of(u32 bits) const {
        return mantissa(bits) << guard >> min(largest - exponent(bits), 63u);
    }

    // A sum to reach, at least 1; no sum does where it is too large to be counted.
    __device__ u64 limit(u32 bits) const {
        if (exponent(bits) <= largest) return max(of(bits), 1ull);
        const u32 further = exponent(bits) - largest;
        return further > 39 - guard ? ~0ull : mantissa(bits) << guard << further;
    }
};

// Calls `take` with this thread's numbers of a row, several of which are read at once.
template <class Take>
__device__ void for_each(const float *row, u32 vocab, Take take) {
    u32 from = threadIdx.x;
    for (; from + (BATCH - 1) * THREADS < vocab; from += BATCH * THREADS) {
        float batch[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) batch[i] = __ldg(row + from + i * THREADS);
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) take(from + i * THREADS, batch[i]);
    }
#pragma unroll 1
    for (; from < vocab; from += THREADS) take(from, __ldg(row + from));
}

__device__ u64 warp_sum(u64 x) {
    for (u32 step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

template <u32 COUNT>
__device__ void block_sums(u64 (&sums)[COUNT]) {
    __shared__ u64 of_warps[WARPS][COUNT];
    __shared__ u64 of_block[COUNT];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (u32 i = 0; i < COUNT; ++i) {
        const u64 sum = warp_sum(sums[i]);
        if (lane == 0) of_warps[warp][i] = sum;
    }
    __syncthreads();
    if (warp < COUNT) {
        const u64 sum = warp_sum(of_warps[lane][warp]);
        if (lane == 0) of_block[warp] = sum;
    }
    __syncthreads();
    for (u32 i = 0; i < COUNT; ++i) sums[i] = of_block[i];
}

__device__ float block_sum(float x) {
    __shared__ float of_warps[WARPS];
    for (u32 step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = of_warps[threadIdx.x % 32];
    for (u32 step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

__device__ u32 block_max(u32 x) {
    __shared__ u32 of_warps[WARPS];
    x = __reduce_max_sync(~0u, x);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = __reduce_max_sync(~0u, of_warps[threadIdx.x % 32]);
    __syncthreads();
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    top_p_renorm(const float *probs, float *out, const float *top_ps, float top_p, u32 vocab) {
    __shared__ u32 held[HELD][THREADS];
    const float *row = probs + (u64)blockIdx.x * vocab;
    float *target = out + (u64)blockIdx.x * vocab;
    const float p = top_ps ? top_ps[blockIdx.x] : top_p;

    // The largest, what comes before the smallest above 0, and about the sum.
    u32 largest = 0, below = ~0u;
    float total = 0;
    for_each(row, vocab, [&](u32, float x) {
        const u32 bits = bits_of(x);
        largest = max(largest, bits);
        below = min(below, bits - 1);
        total += __uint_as_float(bits);
    });
    largest = block_max(largest);
    below = ~block_max(~below);
    total = block_sum(total);

    // Every number from here on is kept, and this is their sum.
    u32 low = 1;
    u64 kept[1] = {0};
    if (!(p > 0) || largest == 0) {
        low = ~0u;
    } else if (largest >= INFINITY_BITS) {
        low = INFINITY_BITS;
    }
    const Units units = {exponent(largest), 7 + (u32)__clz((int)vocab - 1)};
    if (low == 1 && p < 1) {
        const u64 limit = units.limit(__float_as_uint(p));
        // The numbers from `low` on reach the limit, or all are kept. Numbers of which
        // each is less than a share of what `top_p` leaves out are not needed for it; a
        // margin covers the rounding of the sum.
        low = max(below, 1u);
        if (total - p > total / 256) low = max(low, __float_as_uint((total - p) / 4 / vocab));
        // Those from `high` on, whose sum is `above`, do not.
        u32 high = largest + 1, count = 0;
        u64 above = 0;
        bool is_held = false;
        while (high - low > 1) {
            const u32 range = high - low;
            const u32 pivots[3] = {low + max(range / 4, 1u), low + range / 2, low + range / 2 + range / 4};
            const u64 first = threadIdx.x == 0 ? above : 0;
            u64 sums[3] = {first, first, first};
            u32 found = 0;
            auto take = [&](u32 bits) {
                if (bits - low - 1 >= range - 1) return;
                if (found < HELD) held[found][threadIdx.x] = bits;
                ++found;
                if (bits < pivots[0]) return;
                const u64 x = units.of(bits);
                sums[0] += x;
                sums[1] += bits >= pivots[1] ? x : 0;
                sums[2] += bits >= pivots[2] ? x : 0;
            };
            if (is_held) {
                for (u32 at = 0; at < count; ++at) take(held[at][threadIdx.x]);
            } else {
                for_each(row, vocab, [&](u32, float x) { take(bits_of(x)); });
            }
            count = found;
            is_held = __syncthreads_and(found <= HELD);
            block_sums(sums);
#pragma unroll
            for (int i = 2; i >= 0; --i) {
                if (sums[i] >= limit) {
                    low = pivots[i];
                    kept[0] = sums[i];
                    break;
                }
                high = pivots[i];
                above = sums[i];
            }
        }
    }
    if (low < INFINITY_BITS && kept[0] == 0) {
        for_each(row, vocab, [&](u32, float x) {
            const u32 bits = bits_of(x);
            if (bits >= low) kept[0] += units.of(bits);
        });
        block_sums(kept);
    }

    // Both are scaled, so that the largest number is below 2.
    const float scale = ldexpf(1, 127 - (int)units.largest);
    const float sum = ldexpf((float)kept[0], -23 - (int)units.guard);
    for_each(row, vocab, [&](u32 at, float x) {
        const float kept = low == INFINITY_BITS ? NAN : x * scale / sum;
        target[at] = bits_of(x) >= low ? kept : 0;
    });
}
