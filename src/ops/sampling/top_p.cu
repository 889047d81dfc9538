// Keeps the largest numbers of each row that together reach `top_p`, and all equal to the
// smallest of them; divides them by their sum, and makes the others 0. A block of 1024
// threads for each row.
//
// Numbers that are not above 0, and NaN, count as 0. The others are ordered as their bits
// are, and the threshold is searched among the bits. Sums are of integers, in which order
// does not matter. Where a row holds infinity, it becomes NaN there.

#include "rows.cuh"

constexpr u32 INFINITY_BITS = 0x7f800000;

extern "C" __global__ void __launch_bounds__(THREADS)
    top_p_renorm(const float *probs, float *out, const float *top_ps, float top_p, u32 vocab) {
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
    largest = block_all(largest, Max());
    below = ~block_all(~below, Max());
    total = block_all(total, Add());

    // Every number from here on is kept, and this is their sum.
    Cut cut = {1, 0};
    if (!(p > 0) || largest == 0) {
        cut.low = ~0u;
    } else if (largest >= INFINITY_BITS) {
        cut.low = INFINITY_BITS;
    }
    const Units units = {exponent(largest), 7 + (u32)__clz((int)vocab - 1)};
    auto measure = [&](u32 bits) { return units.of(bits); };
    if (cut.low == 1 && p < 1) {
        // Numbers of which each is less than a share of what `top_p` leaves out are not
        // needed for it; a margin covers the rounding of the sum.
        u32 low = max(below, 1u);
        if (total - p > total / 256) low = max(low, __float_as_uint((total - p) / 4 / vocab));
        cut = cut_at(row, vocab, low, largest, units.limit(__float_as_uint(p)), measure);
    }
    if (cut.low < INFINITY_BITS && cut.kept == 0) cut.kept = sum_from(row, vocab, cut.low, measure);

    // Both are scaled, so that the largest number is below 2.
    const float scale = ldexpf(1, 127 - (int)units.largest);
    const float sum = ldexpf((float)cut.kept, -23 - (int)units.guard);
    for_each(row, vocab, [&](u32 at, float x) {
        const float kept = cut.low == INFINITY_BITS ? NAN : x * scale / sum;
        target[at] = bits_of(x) >= cut.low ? kept : 0;
    });
}
