// What kernels share that give a block of 1024 threads to each row of numbers.

#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr u32 THREADS = 1024, WARPS = THREADS / 32;
// Numbers that a thread reads at once.
constexpr u32 BATCH = 8;
// What a thread keeps of the range of a search, where it is no more than this.
constexpr u32 HELD = 8;

struct Add {
    template <class T>
    __device__ T operator()(T a, T b) const { return a + b; }
};

struct Max {
    template <class T>
    __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};

// Calls `take` with this thread's numbers of a row and their places. It may write them.
template <class Number, class Take>
__device__ void for_each(const Number *row, u32 len, Take take) {
    u32 from = threadIdx.x;
    for (; from + (BATCH - 1) * THREADS < len; from += BATCH * THREADS) {
        Number batch[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) batch[i] = row[from + i * THREADS];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) take(from + i * THREADS, batch[i]);
    }
#pragma unroll 1
    for (; from < len; from += THREADS) take(from, row[from]);
}

// What all threads of a warp have together, in each of them.
template <class T, class Combine>
__device__ T warp_all(T x, Combine combine) {
#pragma unroll
    for (u32 step = 16; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// What all threads of the block have together, in each of them, for each of some numbers.
template <u32 COUNT, class T, class Combine>
__device__ void block_all(T (&x)[COUNT], Combine combine) {
    __shared__ T of_warps[COUNT][WARPS], of_block[COUNT];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) {
        const T of_warp = warp_all(x[i], combine);
        if (lane == 0) of_warps[i][warp] = of_warp;
    }
    __syncthreads();
    if (warp < COUNT) {
        const T all = warp_all(of_warps[warp][lane], combine);
        if (lane == 0) of_block[warp] = all;
    }
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) x[i] = of_block[i];
}

template <class T, class Combine>
__device__ T block_all(T x, Combine combine) {
    T all[1] = {x};
    block_all(all, combine);
    return all[0];
}

// In the order of the numbers, none of which is NaN. Both zeros are the same.
__device__ u32 key(float x) {
    const u32 bits = __float_as_uint(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

constexpr u32 NAN_KEY = 0xffffffff;

// The first of the largest numbers of a row.
struct Largest {
    u32 place;
    // NAN_KEY where any number is NaN.
    u32 key;

    __device__ bool nan() const { return key == NAN_KEY; }
    __device__ float number() const { return __uint_as_float(key >> 31 ? key & 0x7fffffff : ~key); }
};

// Numbers that a thread reads at once, in 16 bytes.
template <class Bits>
struct __align__(16) Wide {
    static constexpr u32 COUNT = 16 / sizeof(Bits);
    Bits of[COUNT];
};

template <class Number>
__device__ Largest largest_of(const typename Number::Bits *row, u32 len) {
    using Bits = typename Number::Bits;
    float largest = -INFINITY;
    u32 place = threadIdx.x;
    bool nan = false;
    const auto take = [&](u32 at, Bits bits) {
        const float x = Number::number(bits);
        nan |= x != x;
        if (x > largest) {
            largest = x;
            place = at;
        }
    };
    // Numbers before the first that is aligned, wide ones, and those after them: each thread's places ascend.
    const u32 before = min(len, (u32)(-(u64)row % 16 / sizeof(Bits)));
    const u32 wide = (len - before) / Wide<Bits>::COUNT, after = before + wide * Wide<Bits>::COUNT;
    if (threadIdx.x < before) take(threadIdx.x, row[threadIdx.x]);
    const auto *from = (const Wide<Bits> *)(row + before);
    for (u32 at = threadIdx.x; at < wide; at += BATCH * THREADS) {
        Wide<Bits> batch[BATCH];
        // What is beyond the last is that once more.
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) batch[i] = from[min(at + i * THREADS, wide - 1)];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i)
#pragma unroll
            for (u32 which = 0; which < Wide<Bits>::COUNT; ++which)
                take(before + min(at + i * THREADS, wide - 1) * Wide<Bits>::COUNT + which, batch[i].of[which]);
    }
    if (threadIdx.x < len - after) take(after + threadIdx.x, row[after + threadIdx.x]);
    // Of equal numbers, the smaller place is the larger.
    u64 best = (u64)(nan ? NAN_KEY : key(largest)) << 32 | ~place;
    if (threadIdx.x >= len) best = 0;
    best = block_all(best, Max());
    return {(u32)~best, (u32)(best >> 32)};
}

// Writes a row's place, of 64 bits or of 32.
__device__ void write_place(void *places, u32 wide, long long place) {
    if (wide) {
        ((long long *)places)[blockIdx.x] = place;
    } else {
        ((int *)places)[blockIdx.x] = (int)place;
    }
}

struct F32 {
    using Bits = float;
    static __device__ float number(Bits x) { return x; }
};

// The bits of a number above 0, else 0. They have the order of the numbers.
__device__ u32 bits_of(float x) { return x > 0 ? __float_as_uint(x) : 0; }

// The exponent that multiplies the mantissa of a number: that of denormal ones is 1.
__device__ u32 exponent(u32 bits) { return max(bits >> 23, 1u); }

__device__ u64 mantissa(u32 bits) { return bits >> 23 ? (bits & 0x7fffff) | 0x800000 : bits; }

// Integers of a row, in whose sums order does not matter: the mantissa of its largest
// number, with `guard` bits behind it.
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

// The sum of `measure` over a row's numbers that are `low` or larger.
template <class Measure>
__device__ u64 sum_from(const float *row, u32 len, u32 low, Measure measure) {
    u64 sum = 0;
    for_each(row, len, [&](u32, float x) {
        const u32 bits = bits_of(x);
        if (bits >= low) sum += measure(bits);
    });
    return block_all(sum, Add());
}

// Where a row is cut, in bits of its numbers.
struct Cut {
    u32 low;
    // What the numbers from `low` on measure; 0 where that was not summed.
    u64 kept;
};

// The largest cut from which on a row's numbers measure `limit` or more; `low` where none
// larger does. None is larger than `most`. Each round divides the range that the cut lies in
// by four, so there are 17 at most.
template <class Measure>
__device__ Cut cut_at(const float *row, u32 len, u32 low, u32 most, u64 limit, Measure measure) {
    __shared__ u32 held[HELD][THREADS];
    u64 kept = 0;
    // Numbers from `high` on, which measure `above`, do not reach the limit.
    u64 above = 0;
    u32 high = most + 1, count = 0;
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
            const u64 x = measure(bits);
            sums[0] += x;
            sums[1] += bits >= pivots[1] ? x : 0;
            sums[2] += bits >= pivots[2] ? x : 0;
        };
        if (is_held) {
            for (u32 at = 0; at < count; ++at) take(held[at][threadIdx.x]);
        } else {
            for_each(row, len, [&](u32, float x) { take(bits_of(x)); });
        }
        count = found;
        is_held = __syncthreads_and(found <= HELD);
        block_all(sums, Add());
#pragma unroll
        for (int i = 2; i >= 0; --i) {
            if (sums[i] >= limit) {
                low = pivots[i];
                kept = sums[i];
                break;
            }
            high = pivots[i];
            above = sums[i];
        }
    }
    return {low, kept};
}
